"""What goes wrong ends in one line that says what to do, the documented exit code, and nothing half-written."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logit_cache.base import durable
from logit_cache.stages.app import main
from logit_cache.store.reader import LogitCache

from tests.conftest import REPOSITORY, Run, files_of
from tests.helpers.shards import flip_bit, shard_file


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


RECIPE_MISTAKES = {
    "unknown key": ({"cache.kk": 3}, "unknown key 'cache.kk': did you mean 'k'?"),
    "unknown student key": ({"students.student.temprature": 3}, "did you mean 'temperature'?"),
    "unknown train key": ({"train.step": 3}, "did you mean 'steps'?"),
    "unknown section": ({"corpse.source": "x"}, "did you mean 'corpus'?"),
    "temperature 0": ({"train.temperature": 0}, "temperature"),
    "temperature below 0": ({"students.student.temperature": -1}, "temperature"),
    "k = 0": ({"cache.k": 0}, "cache.k"),
    "unknown tail": ({"train.tail": "tale"}, "tail"),
    "missing corpus": ({"corpus.source": "no/such/*.txt"}, "no file matches"),
    "missing teacher": ({"teacher.model": "./no-teacher"}, "no such directory"),
    "teacher package not installed": ({"teacher.model": "package:no_such_package/x.gguf"}, "is not installed"),
    "package inside one that is not installed": (
        {"teacher.model": "package:no_such_package.inner/x.gguf"},
        "is not installed",
    ),
    "no package": ({"teacher.model": "package:/x.gguf"}, "is not installed"),
    "row_length beyond positions": ({"corpus.row_length": 9000}, "256 positions"),
    "unknown recipe": ({}, "no shipped recipe"),
}


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_recipe_mistakes(tiny_run: Run, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = RECIPE_MISTAKES[mistake]
    run = Run({**tiny_run.overrides, "run_dir": tmp_path / "run", **overrides})
    code = main(["prepare", "nothing" if mistake == "unknown recipe" else "demo", *run.arguments])
    assert code == 2
    assert expected in error_line(capsys)
    assert not files_of(tmp_path), "something was written"


def test_k_beyond_the_vocabulary(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.copy(tmp_path / "run")
    shutil.rmtree(run.dir / "cache/shards")
    (run.dir / "cache/manifest.json").unlink()
    assert run.stage("cache", cache__k=301) == 2
    assert "301 is outside 1..300" in error_line(capsys)
    assert not (run.dir / "cache/shards/00002.json").exists()


def test_temperature_beyond_the_stored_tail(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.copy(tmp_path / "run")
    assert run.stage("train", train__temperature=0.5) == 2
    assert "cache.knots" in error_line(capsys)
    assert not (run.dir / "students/student/checkpoints").exists()


@pytest.mark.parametrize("content", [b"", b"   \n\n  "])
def test_empty_corpus(tiny_run: Run, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "empty.txt"
    text.write_bytes(content)
    run = Run({**tiny_run.overrides, "run_dir": tmp_path / "run", "corpus.source": text})
    assert run.stage("prepare") == 2
    assert "every document is empty" in error_line(capsys)
    assert not (tmp_path / "run").exists() or not files_of(tmp_path / "run")


def test_invalid_utf8_is_located(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("first line\nna\xefve\n".encode("latin-1"))
    run = Run({**tiny_run.overrides, "run_dir": tmp_path / "run", "corpus.source": text})
    assert run.stage("prepare") == 2
    line = error_line(capsys)
    assert "not valid UTF-8 at byte 13 (line 2)" in line
    assert "latin.txt" in line


def test_steps_out_of_order(tmp_path: Path, tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run({**tiny_run.overrides, "run_dir": tmp_path / "run"})
    for command, expected in (("cache", "prepare"), ("train", "cache"), ("evaluate", "cache"), ("report", "evaluate")):
        assert run.stage(command) == 3
        assert f"run `logit-cache {expected}`" in error_line(capsys)
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir(exist_ok=True)
    places = {
        "nowhere": "no cache here (no such directory): run `logit-cache cache`",
        "file": "no cache here (it is a file): run `logit-cache cache`",
        "run": "no cache here (manifest.json is missing): run `logit-cache cache`",
    }
    for command, (place, said) in itertools.product(("inspect", "verify", "export"), places.items()):
        assert main([command, str(tmp_path / place), *([str(tmp_path / "out")] if command == "export" else [])]) == 3
        assert said in error_line(capsys)
    assert main(["inspect", str(tiny_run.dir)]) == 3
    assert f"that of this run is {tiny_run.dir / 'cache'}" in error_line(capsys)


def test_another_teacher_into_the_same_cache(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(tiny_run.dir / "cache")
    there = LogitCache(tiny_run.dir / "cache").manifest.identity["teacher"]["dtype"]
    now = "float32" if there == "bfloat16" else "bfloat16"  # "auto" depends on the machine
    assert tiny_run.stage("cache", teacher__dtype=now) == 4
    line = error_line(capsys)
    assert f"teacher.dtype is {there} in the cache and {now} now" in line
    assert files_of(tiny_run.dir / "cache") == before


def test_another_support_into_the_same_cache(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_run.stage("cache", cache__k=6) == 4
    assert "support.k is 8 in the cache and 6 now" in error_line(capsys)


def test_student_with_another_tokenizer(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logit_cache.corpus.tokenizer import tokenizer_digest
    from logit_cache.models.loading import load_tokenizer

    from tests.distill.test_stage_two import tiny_student

    tiny_student().save_pretrained(tmp_path / "other")
    tokenizer = load_tokenizer(str(tiny_run.dir / "cache/corpus/tokenizer"))
    ours = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    theirs = tokenizer_digest(load_tokenizer(str(tmp_path / "other")))
    run = tiny_run.copy(tmp_path / "run")
    assert run.stage("train", "--student", "other", students__other__model=tmp_path / "other") == 4
    line = error_line(capsys)
    assert ours[:16] in line
    assert theirs[:16] in line


def damage(kind: str, run: Run) -> None:
    shard = shard_file(run.dir / "cache", 1)
    if kind == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif kind == "missing":
        shard.unlink()
    elif kind == "flipped":
        flip_bit(shard, "codes")
    elif kind == "swapped":
        other = shard_file(run.dir / "cache", 2)
        mine, theirs = shard.read_bytes(), other.read_bytes()
        shard.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == "record":
        (run.dir / "cache/shards/00001.json").write_text("{")
    elif kind == "manifest":
        manifest = run.dir / "cache/manifest.json"
        manifest.write_text(manifest.read_text().replace('"k": 8', '"k": 7', 1))


def test_damage_that_a_loaders_worker_meets(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.copy(tmp_path / "run", keep=("cache", "heldout", "students"))
    damage("flipped", run)
    assert run.stage("train", "--student", "student", train__loader_workers=1, train__epochs=1) == 4
    line = error_line(capsys)
    assert line.startswith(f"error: {run.dir / 'cache/shards'}") and "Caught" not in line


@pytest.mark.parametrize("kind", ["truncated", "missing", "flipped", "swapped", "record"])
def test_damaged_shards(tiny_run: Run, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.copy(tmp_path / "run", keep=("cache", "heldout", "students"))
    damage(kind, run)
    cache = run.dir / "cache"
    assert run.stage("train", "--student", "student") == 4
    line = error_line(capsys)
    assert "00001" in line or "00002" in line
    assert not (run.dir / "students/student/final").exists()
    assert main(["verify", str(cache)]) == 4
    assert "shard 00001" in capsys.readouterr().out
    assert main(["verify", str(cache), "--repair"]) == 0
    assert run.stage("cache") == 0
    assert main(["verify", str(cache)]) == 0
    assert files_of(cache) == files_of(tiny_run.dir / "cache")


def test_damaged_manifest(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.copy(tmp_path / "run")
    damage("manifest", run)
    assert run.stage("train") == 4
    assert "contradict" in error_line(capsys)


def test_an_incomplete_cache_is_not_trained_on(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run.copy(tmp_path / "run")
    (run.dir / "cache/shards/00003.json").unlink()
    assert run.stage("train") == 3
    assert "4 of 5 shards" in error_line(capsys)


def test_a_cache_without_a_shard_is_not_trained_on(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run.copy(tmp_path / "run")
    for record in (run.dir / "cache/shards").glob("*.json"):
        record.unlink()
    assert run.stage("train", "--partial") == 3
    assert "no shard is committed yet" in error_line(capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [1, 4, 9])
def test_full_or_failing_disk(
    tiny_run: Run,
    tmp_path: Path,
    number: int,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The n-th fsync fails; the next run completes to the same bytes."""
    run = tiny_run.copy(tmp_path / "run")
    shutil.rmtree(run.dir / "cache/shards")
    real, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        assert run.stage("cache") == 3
    line = error_line(capsys)
    assert ("no space left" if number == errno.ENOSPC else "input/output error") in line
    committed = list((run.dir / "cache/shards").glob("*.json"))
    assert len(committed) <= 1
    assert run.stage("cache") == 0
    assert files_of(run.dir / "cache") == files_of(tiny_run.dir / "cache")


def test_a_really_full_disk(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full answers every write with ENOSPC."""
    run = tiny_run.copy(tmp_path / "run")
    (run.dir / "cache/shards/00002.json").unlink()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(durable, "staging_path", lambda path: full)
    assert run.stage("cache") == 3
    assert "no space left on the device" in error_line(capsys)
    assert not (run.dir / "cache/shards/00002.json").exists()


def test_no_permission(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """/sys takes no new directories, not even from root."""
    run = Run({**tiny_run.overrides, "run_dir": "/sys/kernel/no-place"})
    assert run.stage("prepare") == 3
    line = error_line(capsys)
    assert "/sys/kernel" in line
    assert "choose another directory" in line


def test_a_file_in_the_place_of_the_run(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here")
    for where in ("file", "file/run", "x" * 300):
        run = Run({**tiny_run.overrides, "run_dir": tmp_path / where})
        assert run.stage("prepare") == 3
        assert f"{tmp_path / where}" in error_line(capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_a_model_does_not_fit_on(
    tiny_run: Run,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While a model is converted or fetched, too, it is the disk's fault and not the model's."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", full)
    run = tiny_run.copy(tmp_path / "run")
    assert run.stage("prepare") == 3
    assert "somewhere: " in error_line(capsys)


def test_a_file_system_without_hard_links(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run.copy(tmp_path / "run")
    (run.dir / "cache/shards/00002.json").unlink()

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        assert run.stage("cache") == 3
    assert "must have hard links" in error_line(capsys)
    assert run.stage("cache") == 0


def test_a_device_that_is_too_small(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("logit_cache.capture.stage_one.fill_shards", too_much)
    assert tiny_run.copy(tmp_path / "run").stage("cache") == 2
    line = error_line(capsys)
    assert "lower teacher.batch_rows" in line and "CUDA out of memory" in line


def test_wrong_flags_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "demo", "--task", "3", "--num-tasks", "2"]) == 2
    assert "outside 0..1" in error_line(capsys)
    for half in (["--num-tasks", "4"], ["--task", "0"]):
        assert main(["cache", "demo", *half]) == 2
        assert "--task and --num-tasks go together" in error_line(capsys)
    for arguments in (["cache"], ["nonsense"], ["cache", "demo", "--wrong"], ["inspect", "x", "--row", "one"]):
        assert main(arguments) == 2
        assert error_line(capsys)
    assert main(["train", "demo", "--student", "nobody"]) == 2
    assert "there are: student, control" in error_line(capsys)


def test_digests_are_shown_whole(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_run.dir / "cache")]) == 0
    shown = "".join(character for character in capsys.readouterr().out if character.isalnum())
    assert LogitCache(tiny_run.dir / "cache").digest in shown


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from logit_cache.stages.app import main; code = main(['--help']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


def test_interrupt_ends_in_one_line(small_run: Run, tmp_path: Path) -> None:
    import signal

    from tests.capture.test_stage_one import start_cache, wait_for_a_shard

    run = small_run.copy(tmp_path / "run")
    shutil.rmtree(run.dir / "cache/shards")
    process = start_cache(run)
    wait_for_a_shard(run, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 130
    assert "to go on: logit-cache cache" in output.splitlines()[-1]
    assert "Traceback" not in output
