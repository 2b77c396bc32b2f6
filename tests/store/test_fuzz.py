"""Whatever bytes are there: an answer, or one of the errors that are promised. `make fuzz` looks longer and deeper."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logit_cache.base.durable import json_digest
from logit_cache.base.errors import PipelineError
from logit_cache.corpus.rows import PackedRows
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import Recipe
from logit_cache.store.manifest import Manifest
from logit_cache.store.reader import LogitCache
from logit_cache.store.records import read_record

from tests.helpers.synthetic import make_cache

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
QUICK = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "cache"
    make_cache(folder, rows=4, length=8, shard_rows=2)
    return folder


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, part in inside for deeper in paths_of(part, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


@QUICK
@given(data=st.data(), value=JSON, sealed=st.booleans())
@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json", "corpus/prepared.json"])
def test_any_value_anywhere_in_a_json_file(
    cache: Path, name: str, data: st.DataObject, value: Any, sealed: bool
) -> None:
    file = cache / name
    original = file.read_bytes()
    document = json.loads(original)
    changed = replaced(document, data.draw(st.sampled_from(paths_of(document))), value)
    if sealed and isinstance(changed, dict) and "record_sha256" in changed:
        changed["record_sha256"] = json_digest({k: v for k, v in changed.items() if k != "record_sha256"})
    if sealed and isinstance(changed, dict) and "identity_digest" in changed:
        changed["identity_digest"] = json_digest(changed.get("identity"))
    try:
        file.write_text(json.dumps(changed))
        reader = LogitCache(cache)
        reader.batch(np.arange(len(reader)))
    except PipelineError as error:
        assert error.exit_code in (3, 4)
    finally:
        file.write_bytes(original)


@QUICK
@given(data=st.binary(max_size=300))
@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json", "corpus/prepared.json"])
def test_any_bytes_as_a_json_file(cache: Path, name: str, data: bytes) -> None:
    file = cache / name
    original = file.read_bytes()
    try:
        file.write_bytes(data)
        if name == "corpus/prepared.json":
            PackedRows(cache / "corpus")
        else:
            read_record(cache, Manifest.read(cache), 1)
    except PipelineError as error:
        assert error.exit_code == 4
    finally:
        file.write_bytes(original)


@settings(QUICK, max_examples=2 * EXAMPLES)
@given(data=st.data())
@pytest.mark.parametrize("profile", ["compact", "fast"])
@pytest.mark.parametrize("support", ["topk", "topp", "threshold", "sampled"])
def test_any_numbers_as_stored_arrays(profile: str, support: str, data: st.DataObject) -> None:
    """Behind valid checksums: targets of the right shape, or ValueError or IndexError, which the cache turns into exit 4."""
    from logit_cache.store.codec import TargetCodec
    from logit_cache.targets.supports import Support

    codec = TargetCodec(
        Support.of(support, k=4, p=0.9, tau=0.25, draws=3), (0.5, 1.0), 60, profile, label_log_probs=True
    )
    stored = {}
    for name, dtype in codec.layout().items():
        if dtype == "float32":
            continue  # the loss of rows, which `decode` does not read
        of_positions = ("head_counts", "sample_counts", "head_mass", "tail_steps", "label_levels")
        length = 3 * (4 if name not in of_positions else 1)
        if data.draw(st.booleans(), label=f"another length of {name}"):
            length = data.draw(st.integers(0, 20))
        info = np.iinfo(dtype)
        small = st.integers(max(info.min, -5), min(info.max, 60))
        values = data.draw(
            st.lists(small | st.integers(int(info.min), int(info.max)), min_size=length, max_size=length)
        )
        stored[name] = [np.array(values, dtype)]
    mask = np.array([[True, data.draw(st.booleans()), True]])
    try:
        targets = codec.decode(stored, np.array([[1, 2, 3]]), mask, np.array([[2, 3, -100]]))
    except (ValueError, IndexError):
        return
    assert targets.token_ids.shape[:2] == (1, 3)
    assert targets.label_log_probs is not None and targets.label_log_probs.shape == (1, 3)
    assert int(targets.token_ids.min()) >= -1 and int(targets.token_ids.max()) < 60


@QUICK
@given(text=st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_any_text_as_a_recipe(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_recipe(file)
        except PipelineError as error:
            assert error.exit_code == 2 and "\n" not in str(error).strip()


@QUICK
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_in_a_recipe(data: st.DataObject, value: Any) -> None:
    import tomli_w

    base: dict[str, Any] = {
        "run_dir": "runs/x",
        "seed": 1,
        "teacher": {"model": "m", "dtype": "auto"},
        "corpus": {"source": ["a.txt"], "row_length": 8},
        "cache": {"k": 4, "knots": [0.5], "location": "runs/y"},
        "train": {"steps": 3, "kd_weight": {"shape": "linear", "end": 0.5}},
        "students": {"one": {"layers": [0, 1]}, "two": {"model": "m", "lora": {"r": 4}}},
        "cluster": {"time": "1:00:00", "train": {"nodes": 2}},
    }
    changed = replaced(base, data.draw(st.sampled_from(paths_of(base)[1:])), value)
    try:
        content = tomli_w.dumps(changed).encode()
    except (TypeError, ValueError):
        return  # TOML has no null, and no such numbers or text
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_bytes(content)
        try:
            assert isinstance(load_recipe(file), Recipe)
        except PipelineError as error:
            assert error.exit_code == 2
