"""The measuring itself: what is divided by what, not how fast this machine is."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from logit_cache import model_inputs
from logit_cache.capture.writers import training_codec
from logit_cache.corpus.rows import PackedRows
from logit_cache.lab.bench_capture import divergence, measure_rounding
from logit_cache.lab.scratch_cache import CacheMaker
from logit_cache.lab.timing import in_turns, peak_bytes
from logit_cache.models.teacher import load_teacher
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main
from logit_cache.targets.sparse_targets import SparseTargets

from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("bench")
    recipe = make_recipe(folder)
    assert main(["prepare", str(recipe)]) == 0
    assert main(["bench", str(recipe), "--json", str(folder / "bench.json"), "--rounds", "3", "--rows", "8"]) == 0
    assert not (folder / "run/bench").exists(), "the scratch directory was left"
    value: dict[str, object] = json.loads((folder / "bench.json").read_text())
    return value


def test_every_promised_figure_is_there_with_its_runs(figures: dict[str, object]) -> None:
    for name in (
        "capture_overhead",
        "bytes_per_position",
        "kl_T1",
        "kl_T2",
        "kl_T4",
        "tail_mass_error_T2",
        "read_positions_per_second",
        "memmap_positions_per_second",
        "step_vs_ce",
        "step_vs_hf",
        "memory_vs_hf",
        "bucket_step_vs_ce",
        "bucket_step_vs_hf",
        "bucket_memory_vs_hf",
        "online_vs_cached",
    ):
        runs = figures["runs"][name]  # type: ignore[index]
        assert figures[name] == statistics.median(runs)
        assert all(math.isfinite(run) and run >= 0 for run in runs), name
    for name in ("capture_overhead", "read_positions_per_second", "step_vs_ce", "step_vs_hf", "online_vs_cached"):
        assert len(figures["runs"][name]) == 3  # type: ignore[index]
    assert 0 <= figures["data_wait"] <= 1  # type: ignore[operator]


@pytest.mark.parametrize(
    "keep",
    [
        {"support": "topp", "p": 0.7, "k": 40},
        {"support": "threshold", "tau": 0.1},
        {"support": "sampled", "draws": 9},
        {"support": "topk", "k": 8, "knots": [1.0]},
        {"support": "topk", "k": 8, "tail_rank": 16},
    ],
    ids=str,
)
def test_fidelity_of_every_support(tmp_path: Path, keep: dict[str, object]) -> None:
    """Decoded targets differ by the codec's rounding: steps of some hundredths, which enter the KL by their square."""
    recipe = load_recipe(make_recipe(tmp_path, **{f"cache__{name}": value for name, value in keep.items()}))
    assert main(["prepare", str(tmp_path / "recipe.toml")]) == 0
    teacher = load_teacher(recipe.teacher.model, recipe.teacher)
    codec = training_codec(recipe.cache, teacher.facts)
    maker = CacheMaker(teacher, PackedRows(recipe.paths.cache / "corpus"), codec, 3, 16)
    cache = maker.cache(tmp_path / "whole")
    runs = measure_rounding(maker, cache)
    whole = {name: runs.pop(name) for name in list(runs) if name.startswith("whole_kl")}
    served = (1.0,) if keep.get("knots") else (1.0, 2.0, 4.0)
    assert list(whole) == ([f"whole_kl_T{t:g}" for t in served] if recipe.cache.rank else [])
    if whole:
        batch = cache.batch(range(3))
        mask = batch["targets"].mask
        with torch.no_grad():
            logits = teacher.model(**model_inputs(batch, teacher.model)).logits[mask].double()
        for temperature in served:
            p, other = (logits / temperature).softmax(-1), batch["targets"][mask].dense(temperature).double()
            expected = float((p * (p / other).log()).sum(-1).mean())
            assert whole[f"whole_kl_T{temperature:g}"][0] == pytest.approx(expected, rel=1e-3)
    names = {"kl_T1"} if keep.get("knots") else {"kl_T1", "kl_T2", "kl_T4", "tail_mass_error_T2"}
    assert runs.keys() == names
    for name in names:
        assert 0 <= statistics.median(runs[name]) + 1e-9 < 0.01, name


def test_jobs_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    seconds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    # Back and forth, so that a drift of the machine favours none.
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert [len(runs) for runs in seconds.values()] == [2, 2]


def test_the_divergence_is_that_of_the_definition() -> None:
    """Against float64 over the whole vocabulary, the tail taken as one token; and 0 for equal targets in another
    order."""
    torch.manual_seed(0)
    logits = torch.randn(5, 40, dtype=torch.float64) * 3
    other = logits + 0.1 * torch.randn_like(logits)
    exact = SparseTargets.from_logits(logits, k=6)
    # The same tokens, as a decoded target has them.
    moved = other.log_softmax(-1).gather(-1, exact.token_ids)
    rest = other.log_softmax(-1).scatter(-1, exact.token_ids, -math.inf)
    curve = torch.stack([torch.logsumexp(knot * rest, -1) for knot in exact.knots], -1)
    decoded = SparseTargets(exact.token_ids.flip(-1), moved.flip(-1), curve, exact.mask, exact.knots, 40)
    for temperature in (1.0, 2.0, 4.0):
        p, q = ((x / temperature).softmax(-1) for x in (logits, other))
        cells = [
            torch.cat([t.gather(-1, exact.token_ids), t.scatter(-1, exact.token_ids, 0.0).sum(-1, True)], -1)
            for t in (p, q)
        ]
        expected = (cells[0] * (cells[0] / cells[1]).log()).sum(-1)
        kl, error = divergence(exact, decoded, temperature)
        torch.testing.assert_close(kl, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(error, (cells[0] - cells[1])[:, -1].abs(), rtol=0, atol=1e-12)
    assert divergence(exact, exact, 2.0)[0].abs().max() == 0


def test_peak_memory_counts_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    kept = torch.zeros(1 << 20)

    def job() -> None:
        first = torch.zeros(1 << 20)  # 4 MiB
        del first
        second, third = torch.zeros(1 << 20), torch.zeros(1 << 19)
        del second, third

    assert peak_bytes(job, kept.device) == 6 << 20
    assert capfd.readouterr().err == ""
