"""The teacher's pass, on the real teacher: what is cached is what the model says, whatever happens to the process."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache.base.errors import RecipeError
from logit_cache.capture.teacher_pass import TeacherPass, check_numbers
from logit_cache.corpus.labels import IGNORE
from logit_cache.corpus.rows import PackedRows
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.packing import document_positions
from logit_cache.models.teacher import Teacher
from logit_cache.stages.app import main
from logit_cache.store.draft import ShardDraft
from logit_cache.store.reader import LogitCache
from logit_cache.store.writer import CacheWriter
from logit_cache.targets.sparse_targets import SparseTargets
from logit_cache.targets.supports import Support
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import REPOSITORY, Run, files_of
from tests.helpers.synthetic import make_cache
from tests.helpers.tiny import make_recipe

KNOTS = (0.25, 0.5, 0.75, 1.0)
TOP32 = Support("topk", k=32)


def rows_of(cache: LogitCache, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = cache.batch(np.arange(count))
    return batch["input_ids"], batch["segment_ids"], batch["labels"]


def test_targets_are_the_models_own_distribution(teacher: Teacher, small_run: Run) -> None:
    input_ids, segment_ids, labels = rows_of(LogitCache(small_run.dir / "cache"), 4)
    result = TeacherPass(teacher, TOP32, KNOTS)(input_ids, segment_ids, labels)
    targets, losses = result.targets, result.nats_B
    with torch.no_grad():
        logits = teacher.model(
            input_ids=input_ids, position_ids=document_positions(segment_ids), use_cache=False
        ).logits.double()
    reference = logits.log_softmax(-1)
    mask = labels != IGNORE
    # The same bf16 logits come out of both paths, so only float32 arithmetic differs: a few times 49,152 roundings of
    # a sum of positive numbers, relative 2^-24 each at worst, in practice 1e-6.
    at_ids = reference.gather(-1, targets.token_ids.clamp(min=0))
    assert (at_ids - targets.log_probs)[mask].abs().max() < 1e-4
    kept = targets.log_probs[mask][:, -1]
    assert ((reference[mask] > kept[:, None] + 1e-4).sum(-1) < 32).all(), "a token above the last kept one is missing"
    expected = -reference.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses, torch.where(mask, expected, 0.0).sum(-1), rtol=1e-5, atol=1e-3)


def test_the_target_at_t_predicts_the_label_at_t(small_run: Run) -> None:
    """Shifted by one in either direction, the gold token would be among the candidates far less often."""
    batch = LogitCache(small_run.dir / "cache").batch(np.arange(20))
    ids, labels, mask = batch["targets"].token_ids, batch["labels"], batch["targets"].mask

    def found(shift: int) -> float:
        moved = torch.roll(labels, shift, dims=1)
        return float((ids == moved.unsqueeze(-1)).any(-1)[mask].float().mean())

    assert found(0) > 0.55
    assert found(0) > found(1) + 0.15
    assert found(0) > found(-1) + 0.15
    inside = mask[:, :-1]
    assert torch.equal(batch["input_ids"][:, 1:][inside], labels[:, :-1][inside])


def test_documents_of_one_row_do_not_see_each_other(teacher: Teacher) -> None:
    first = torch.arange(1000, 1020)
    second = torch.arange(3000, 3030)
    segments = torch.tensor([[0] * 20 + [1] * 30])
    labels = torch.full((1, 50), 5)

    def targets(one: torch.Tensor) -> SparseTargets:
        row = torch.cat([one, second])[None]
        return TeacherPass(teacher, TOP32, KNOTS)(row, segments, labels).targets

    before, after = targets(first), targets(first + 7)
    assert not torch.equal(before.log_probs[:, :20], after.log_probs[:, :20])
    assert torch.equal(before.token_ids[:, 20:], after.token_ids[:, 20:])
    assert torch.equal(before.log_probs[:, 20:], after.log_probs[:, 20:])
    assert torch.equal(before.tail_curve[:, 20:], after.tail_curve[:, 20:])


def test_a_packed_document_gets_the_targets_it_gets_alone(teacher: Teacher) -> None:
    model = copy.deepcopy(teacher.model).float()
    exact = replace(teacher, model=model, output_layer=OutputLayer.of(model))
    row, labels = torch.arange(1000, 1050)[None], torch.full((1, 50), 5)
    segments = torch.tensor([[0] * 20 + [1] * 30])
    run = TeacherPass(exact, Support("topk", k=8), KNOTS)
    packed = run(row, segments, labels).targets
    alone = run(row[:, 20:], segments[:, 20:] - 1, labels[:, 20:]).targets
    # The mask selects another attention kernel: logits of size 20 differ by some hundred float32 roundings.
    assert (alone.log_probs - packed.log_probs[:, 20:]).abs().max() < 20 * 2**-24 * 1000


def test_full_logits_never_exist_in_float32(teacher: Teacher) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor) or result.data_ptr() == teacher.output_layer.weight.data_ptr():
                return result  # the weights seen from another side
            if result.dtype == torch.float32:
                Largest.numel = max(Largest.numel, result.numel())
            return result

    ids = torch.arange(6 * 256).reshape(6, 256)
    with Largest():
        TeacherPass(teacher, TOP32, KNOTS)(ids, torch.zeros_like(ids), ids)
    assert 0 < Largest.numel <= 512 * teacher.vocab_size < ids.numel() * teacher.vocab_size


def test_run_again_it_finds_everything(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(small_run.dir / "cache")
    assert small_run.stage("cache") == 0
    assert "cache: done, " in capsys.readouterr().out
    assert files_of(small_run.dir / "cache") == before


def test_tasks_share_the_shards_and_give_the_same_bytes(small_run: Run, tmp_path: Path) -> None:
    other = small_run.copy(tmp_path / "run", keep=())
    assert other.stage("prepare") == 0
    assert other.stage("cache", "--task", "1", "--num-tasks", "2") == 0
    assert not LogitCache(other.dir / "cache", partial=True).complete
    assert other.stage("cache", "--task", "0", "--num-tasks", "2") == 0
    assert files_of(other.dir / "cache") == files_of(small_run.dir / "cache")


def start_cache(run: Run) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "logit_cache", "cache", "demo", *run.arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_a_shard(run: Run, process: subprocess.Popen[str]) -> None:
    shards = run.dir / "cache" / "shards"
    deadline = time.monotonic() + 300
    while not list(shards.glob("*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_killed_anywhere_it_resumes_to_the_same_bytes(
    small_run: Run, tmp_path: Path, sign: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run.copy(tmp_path / "run", keep=())
    assert run.stage("prepare") == 0
    process = start_cache(run)
    wait_for_a_shard(run, process)
    process.send_signal(sign)
    output = process.communicate()[0]
    assert process.returncode == (75 if sign == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in output
    done = {p.name: p.stat().st_mtime_ns for p in (run.dir / "cache/shards").glob("*.json")}
    assert 1 <= len(done) < 5, "the signal came too late to test anything"
    capsys.readouterr()
    assert run.stage("cache") == 0
    assert f"{len(done)} of 5 shards found, {5 - len(done)} to do" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in (run.dir / "cache/shards").glob("*.json")}
    assert all(after[name] == when for name, when in done.items()), "a committed shard was written again"
    assert files_of(run.dir / "cache") == files_of(small_run.dir / "cache")


@pytest.mark.parametrize(
    ("support", "profile"),
    [("topk", "compact"), ("topk", "fast"), ("topp", "fast"), ("threshold", "fast"), ("sampled", "fast")],
)
def test_a_teacher_whose_logits_are_no_numbers_is_refused(
    tmp_path: Path, support: str, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounded, they would look like a distribution, and nobody would ever know."""
    learns = profile == "compact"
    recipe = make_recipe(tmp_path, cache__profile=profile, cache__support=support, cache__tail_rank=0)
    assert main(["prepare", str(recipe)]) == 0
    input_ids, _ = PackedRows(tmp_path / "run/cache/corpus").take(np.arange(40))
    first_rows = {int(word): int(row) for row, word in reversed([(r, w) for r in range(40) for w in set(input_ids[r])])}
    word = next(word for word, row in first_rows.items() if row >= 12)
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights["model.embed_tokens.weight"][word] = math.nan
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["cache", str(recipe)]) == 2
    row, shard = first_rows[word], first_rows[word] // 4
    where = "learning" if learns else f"shard {shard} of .*cache"
    # A masked weight of 0 makes NaN of NaN, so that other positions of the row have none either.
    said = rf"{where}: .* not finite numbers at \d+ of \d+ positions, first at position \d+ of row {row}: .*dtype"
    assert re.search(said, capsys.readouterr().err)
    assert (tmp_path / "run/cache/manifest.json").exists() != learns, "a codec was learned from what are no numbers"
    assert not (tmp_path / f"run/cache/shards/{shard:05}.json").exists()


def test_a_teacher_that_rules_out_what_stands_there_is_refused() -> None:
    targets = SparseTargets.from_logits(torch.zeros(1, 4, 9), k=3)
    check_numbers(targets, torch.ones(1), [5], "shard 7")
    with pytest.raises(RecipeError, match=r"shard 7: .* a token of row 5 probability 0"):
        check_numbers(targets, torch.tensor([math.inf]), [5], "shard 7")


def test_shards_are_the_same_written_beside_the_teacher_or_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, written_by = str(make_recipe(tmp_path)), []
    commit = CacheWriter.commit

    def noted(self: CacheWriter, draft: ShardDraft) -> None:
        written_by.append(threading.current_thread())
        commit(self, draft)

    monkeypatch.setattr(CacheWriter, "commit", noted)
    for spare in (True, False):
        monkeypatch.setattr("logit_cache.capture.shard_pass._has_spare_core", lambda teacher, spare=spare: spare)
        folder = tmp_path / str(spare)
        assert main(["prepare", recipe, "--set", f"run_dir={folder}"]) == 0
        assert main(["cache", recipe, "--set", f"run_dir={folder}"]) == 0
        assert all((thread is threading.main_thread()) != spare for thread in written_by)
        assert len(written_by) == 12
        written_by.clear()
    assert files_of(tmp_path / "True/cache") == files_of(tmp_path / "False/cache")


def test_what_a_torn_shard_left_is_removed(small_run: Run, tmp_path: Path) -> None:
    run = small_run.copy(tmp_path / "run")
    (run.dir / "cache/shards/00002.json").unlink()
    (run.dir / "cache/shards/00002.zarr.zip.tmp").write_bytes(b"half")
    (run.dir / "cache/shards/00002.zarr.zip").write_bytes(b"torn")
    assert run.stage("cache") == 0
    assert files_of(run.dir / "cache") == files_of(small_run.dir / "cache")


def test_what_a_dead_process_left_of_a_beginning_is_removed(tmp_path: Path) -> None:
    """Before a cache is begun others may be about to; once it is, nobody needs what they have begun."""
    made = make_cache(tmp_path / "made", rows=8, length=64, shard_rows=4, support=Support("sampled", draws=40))
    cache, codec = tmp_path / "cache", made.manifest.codec
    shutil.copytree(tmp_path / "made/corpus", cache / "corpus")
    leftover = cache / "codebook-0.zarr.tmp-0/entries"
    leftover.mkdir(parents=True)
    CacheWriter(cache, made.manifest).pending()
    assert leftover.exists()
    CacheWriter(cache, made.manifest).begin(codec)
    CacheWriter(cache, made.manifest).pending()
    assert not leftover.parent.exists()


def test_inspect_shows_a_row_with_ten_candidates(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_run.dir / "cache"), "--row", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    with_target = [line for line in shown["positions"] if line["candidates"]]
    assert len(shown["positions"]) == 48
    assert len(with_target) > 30
    for line in with_target:
        probabilities = [p for _, p in line["candidates"]]
        assert len(probabilities) == 10
        assert probabilities == sorted(probabilities, reverse=True)
    assert main(["inspect", str(small_run.dir / "cache"), "--row", "1"]) == 0
    assert "candidates" in capsys.readouterr().out


def test_inspect_json_has_the_promised_fields(small_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    cache = small_run.dir / "cache"
    assert main(["inspect", str(cache), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    files = (p for p in cache.rglob("*") if p.is_file() and p.relative_to(cache).parts[0] != "corpus")
    size = sum(p.stat().st_size for p in files)
    assert facts["complete"] is True
    assert (facts["rows"], facts["shards"], facts["bytes"], facts["vocab_size"]) == (20, 5, size, 49152)
    assert facts["positions"] == int(LogitCache(cache).batch(np.arange(20))["targets"].mask.sum())
    assert facts["bytes_per_position"] == pytest.approx(size / facts["positions"], abs=0.01)
    assert facts["support"] == {"name": "topk", "k": 32}
    assert len(facts["identity"]) == 64


def test_what_is_read_back_is_what_the_teacher_said(teacher: Teacher, small_run: Run) -> None:
    """From the file to the full vocabulary: the whole error of caching, in float64, on real text."""
    cache = LogitCache(small_run.dir / "cache")
    batch = cache.batch(np.arange(4))  # one shard and one forward pass, so the logits are those of stage one
    hidden = teacher.hidden(batch["input_ids"], batch["segment_ids"])
    mask = batch["targets"].mask
    exact = teacher.output_layer.logits(hidden)[mask].double()
    targets = batch["targets"].flatten()[mask.flatten()]
    for temperature in (1.0, 4 / 3, 1.7, 2.0, 3.0, 4.0, 6.0, 8.0):
        log_p = (exact / temperature).log_softmax(-1)
        inside = log_p.gather(-1, targets.token_ids)
        log_q, log_tail = targets.at_temperature(temperature)
        tail_error = (1 - inside.exp().sum(-1) - log_tail.double().exp()).abs()
        assert tail_error.mean() <= 0.001, temperature
        # Between the knots 0.0024 of interpolation; head's mass and tail curve are known to 1/128 nat, which is 1/4 of
        # that in mass at most.
        assert tail_error.max() <= 0.0024 + 2 / 4 / 128, temperature
        inside = inside - inside.logsumexp(-1, keepdim=True)
        decoded = log_q.double() - log_q.double().logsumexp(-1, keepdim=True)
        divergence = (inside.exp() * (inside - decoded)).sum(-1).mean()
        # 1/2 sum p e^2 with steps of 0.045 + 0.033 x, uniform within: s^2 / 24, on average over p about 4e-4.
        assert divergence <= 5e-4, temperature
