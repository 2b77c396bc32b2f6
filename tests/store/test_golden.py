"""Caches written once and kept: what this program reads of them must stay what it was.

Every one in the folder is read, of whatever format version, so that no later version of the program can lose one.
`python -m tests.store.test_golden` writes those of the present format version, where they are missing; those of a frozen
one are never written again. A change of the format gives it another version, and these files a sibling.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from logit_cache.base.errors import MismatchError
from logit_cache.stages.app import main
from logit_cache.store.manifest import FORMAT_VERSION
from logit_cache.store.reader import LogitCache
from logit_cache.store.verify import verify
from logit_cache.targets.supports import Support

from tests.helpers.synthetic import make_cache
from tests.helpers.tiny import make_recipe

GOLDEN = Path(__file__).resolve().parent / "golden"
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"support": Support("topk", k=8)},
    "fast": {"support": Support("topk", k=8), "profile": "fast"},
    "topp": {"support": Support("topp", k=12, p=0.8), "label_log_probs": False},
    "threshold": {"support": Support("threshold", tau=0.1)},
    "threshold-T1": {"support": Support("threshold", tau=0.1), "knots": (1.0,)},
    "loss-mask": {"support": Support("topk", k=8), "loss_mask": np.arange(6 * 16).reshape(6, 16) % 3 // 2 ^ 1},
    "sampled": {"support": Support("sampled", draws=9)},
    "shape": {"support": Support("topk", k=8), "tail_rank": 5},
    "shape-fast": {"support": Support("topk", k=8), "profile": "fast", "tail_rank": 5},
    "shape-topp": {"support": Support("topp", k=12, p=0.8), "tail_rank": 5},
    "shape-threshold": {"support": Support("threshold", tau=0.1), "tail_rank": 5},
    "wide": {"support": Support("topk", k=8), "vocab_size": 70_000},
    "wide-fast": {"support": Support("sampled", draws=9), "vocab_size": 70_000, "profile": "fast"},
}
"""Of a teacher that is a function of the tokens: what is written today can be compared with them."""
CAPTURED: dict[str, dict[str, Any]] = {
    "masked": {
        "corpus__objective": "masked",
        "cache__targets_on": "masked",
        "cache__signals": ["hidden.1:float16", "hidden.3:direction", "attention.0", "qk.2"],
        "cache__tail_rank": 4,
    },
    "masked-real": {"corpus__objective": "masked", "cache__support": "topp", "cache__profile": "fast"},
}
"""Of a small model, whose last bits differ between machines."""
NAMES = sorted(file.stem for file in GOLDEN.glob("v*-*.json"))


def folder_of(kind: str) -> Path:
    return GOLDEN / f"v{FORMAT_VERSION}-{kind}"


def what_is_read(cache: LogitCache) -> dict[str, object]:
    """Numbers to a hundred-thousandth, and digests of the integers."""
    batch = cache.batch(np.arange(len(cache)))
    targets = batch["targets"]
    integers = [batch["input_ids"], batch["labels"], batch["segment_ids"], targets.token_ids, targets.mask]
    integers += [] if targets.draws is None else [targets.draws]
    position = targets[0][targets.mask[0]][0]
    shape: dict[str, object] = {}
    if targets.label_log_probs is not None:
        losses = {"label_log_probs": targets.label_log_probs.double().sum(1), "teacher_losses": cache.teacher_losses()}
        shape = {name: [round(float(value), 5) for value in values] for name, values in losses.items()}
    if targets.tail_coordinates is not None:
        shape |= {
            "coordinates": [round(float(value), 5) for value in targets.tail_coordinates.double().sum((0, 1))],
            "whole": [round(float(value), 5) for value in targets[0].dense(2.0).double().sum(0)],
        }
    for name in cache.signals:
        shape[name] = hashlib.sha256(batch[name].numpy().tobytes()).hexdigest()  # type: ignore[literal-required]
    return shape | {
        "integers": [hashlib.sha256(part.long().numpy().tobytes()).hexdigest() for part in integers],
        "weights": [round(float(value), 5) for value in targets.weights.double().sum((0, 1))],
        "tail_masses": [
            round(float(targets.at_temperature(t)[1].exp()[targets.mask].double().mean()), 5)
            for t in ((1.0, 2.0, 5.0) if len(cache.knots) > 1 else (1.0,))
        ],
        "first_token_ids": position.token_ids.tolist(),
        "first_log_probs": [round(value, 5) for value in position.log_probs.clamp(min=-99).tolist()],
    }


def test_every_kind_is_kept() -> None:
    assert {folder_of(kind).name for kind in (*KINDS, *CAPTURED)} <= set(NAMES)
    assert set(NAMES) == {folder.name for folder in GOLDEN.iterdir() if folder.is_dir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_cache_reads_as_it_did(name: str, tmp_path: Path) -> None:
    # A copy: the checkout may be read-only, and reading must not change it.
    shutil.copytree(GOLDEN / name, tmp_path / "cache")
    assert verify(tmp_path / "cache") == {}
    found, expected = (
        what_is_read(LogitCache(tmp_path / "cache")),
        json.loads((GOLDEN / f"{name}.json").read_text()),
    )
    assert found["integers"] == expected["integers"]
    assert found["first_token_ids"] == expected["first_token_ids"]
    assert found.keys() == expected.keys()
    for part in found.keys() - {"integers", "first_token_ids"}:
        # Rounded to 1e-5, of float32 sums.
        assert found[part] == pytest.approx(expected[part], abs=5e-5), part


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_shown_whatever_its_support(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates are entries that are used, with what each stands for, so that those of samples add up to 1."""
    shutil.copytree(folder_of(kind), tmp_path / "cache")
    cache = LogitCache(tmp_path / "cache")
    assert main(["inspect", str(cache.path), "--row", "0", "--json"]) == 0
    positions = json.loads(capsys.readouterr().out)["positions"]
    targets = cache[0]["targets"]
    for position, line in enumerate(positions):
        weights = [weight for _, weight in line["candidates"]]
        used = int((targets.token_ids[position] >= 0).sum())
        assert len(weights) == min(used, 10) and weights == sorted(weights, reverse=True)
        if used <= 10:
            assert sum(weights) == pytest.approx(float(targets.weights[position].sum()), abs=1e-3)
    assert main(["inspect", str(cache.path), "--row", "0"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_now_is_what_was_written_then(kind: str, tmp_path: Path) -> None:
    """Integers decode to the same, whatever the versions of the libraries below; else the format has changed."""
    cache = make_cache(tmp_path / "cache", rows=6, shard_rows=4, **KINDS[kind])
    kept = LogitCache(folder_of(kind))
    assert what_is_read(cache)["integers"] == what_is_read(kept)["integers"]


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "cache again"), (3, "cache again"), (FORMAT_VERSION + 1, "upgrade this program")]
)
def test_other_versions_are_refused(version: int, remedy: str, tmp_path: Path) -> None:
    shutil.copytree(folder_of("topk"), tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    (tmp_path / "cache/manifest.json").write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(MismatchError, match=f"format version {version}.*{remedy}"):
        LogitCache(tmp_path / "cache")


def keep(cache: LogitCache) -> None:
    """Note what is read of a new one."""
    (GOLDEN / f"{Path(str(cache.path)).name}.json").write_text(json.dumps(what_is_read(cache), indent=1) + "\n")


if __name__ == "__main__":
    for kind, settings in KINDS.items():
        folder = folder_of(kind)
        if not folder.exists():
            keep(make_cache(folder, rows=6, shard_rows=4, **settings))
    for kind, settings in CAPTURED.items():
        if not folder_of(kind).exists():
            with TemporaryDirectory() as scratch, chdir(scratch):  # relative paths: some are stored
                recipe = make_recipe(Path(), corpus__max_rows=6, **settings)
                assert main(["prepare", str(recipe)]) == main(["cache", str(recipe)]) == 0
                Path("run/cache/corpus/sources.json").unlink(missing_ok=True)
                shutil.copytree("run/cache", folder_of(kind))
            keep(LogitCache(folder_of(kind)))
