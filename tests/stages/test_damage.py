"""Bytes that change on disk are noticed, named and made again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from logit_cache import LogitCache
from logit_cache.base.errors import CorruptError, IncompleteError, MismatchError
from logit_cache.stages.app import main
from logit_cache.store.verify import verify

from tests.helpers.fault_client import Rows, Server, same_caches
from tests.helpers.synthetic import make_cache

pytestmark = pytest.mark.slow


DAMAGES = 1000


def damage(folder: Path, draw: random.Random) -> tuple[str, list[Path]]:
    """Do one harm to one file, each kind of file as often; returns what, and the files that it touched."""
    kinds = ("basis-*/**/*", "codebook-*/**/*", "corpus/**/*", "manifest.json", "shards/*.json", "shards/*.zip")
    file = draw.choice(sorted(p for p in folder.glob(draw.choice(kinds)) if p.is_file()))
    data = file.read_bytes()
    kind = draw.choice(("flipped", "truncated", "emptied", "deleted", "swapped"))
    if kind == "swapped":
        inside = file.relative_to(folder).as_posix()
        alike = [p for p in sorted(folder.rglob(file.name)) if p != file and p.is_file() and p.read_bytes() != data]
        twins = [p for p in alike if p.relative_to(folder).as_posix()[12:] == inside[12:]] or alike
        others = twins or sorted(p for p in folder.rglob("*") if p.is_file() and p != file and p.read_bytes() != data)
        other = draw.choice(others)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return kind, [file, other]
    if kind == "deleted":
        file.unlink()
    elif kind == "flipped" and data:
        bad = bytearray(data)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
    else:
        file.write_bytes(data[: draw.randrange(len(data))] if kind == "truncated" and data else b"")
    return kind, [file]


def means_the_same(now: Path, before: bytes) -> bool:
    """Whether a damaged JSON file still says what it said, as without its last line end."""
    try:
        return now.suffix == ".json" and json.loads(now.read_bytes()) == json.loads(before)
    except (OSError, ValueError):
        return False


def test_a_thousand_damages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every kind of file: the reader and the commands refuse it in one line, or read what was written."""
    folder = tmp_path / "cache"
    good = Rows(make_cache(folder, rows=6, length=8, shard_rows=2, tail_rank=3))
    originals = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    draw = random.Random(3)
    refused = harmless = named = 0
    commands = (["verify"], ["inspect", "--json"], ["inspect", "--row=0", "--json"], ["export", str(tmp_path / "out")])
    for number in range(DAMAGES):
        kind, touched = damage(folder, draw)
        names = [file.relative_to(folder).as_posix() for file in touched]
        changed = [f for f in touched if not f.exists() or f.read_bytes() != originals[f]]
        what = f"{kind}: {names}"
        try:
            assert Rows(LogitCache(folder)) == good, f"{what}: wrong numbers reach a student"
            harmless += 1
        except (CorruptError, MismatchError, IncompleteError):
            refused += 1
        try:
            bad = verify(folder)
        except (CorruptError, MismatchError, IncompleteError):
            assert not all(name.startswith("shards/") for name in names), what
        else:
            deleted = [name for name in names if not (folder / name).exists()]
            uncommitted = {int(name[7:12]) for name in deleted if len(name) == len("shards/00000.json")}
            expected = {int(name[7:12]) for name in names if name.startswith("shards/")} - uncommitted
            quiet = all(means_the_same(file, originals[file]) for file in changed)
            assert set(bad) == expected or quiet, f"{what}: verify says {bad}"
            named += bool(bad)
        if number % 5 == 0:
            command, *options = draw.choice(commands)
            capsys.readouterr()
            code, said = main([command, str(folder), *options]), capsys.readouterr().err.splitlines()
            assert (code, len(said)) == (0, 0) or (code in (3, 4) and len(said) == 1), f"{what}: {command}: {said}"
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for file in touched:
            file.write_bytes(originals[file])
    assert Rows(LogitCache(folder)) == good and verify(folder) == {}
    print(
        f"{DAMAGES} damages: {refused} refused by the reader, {harmless} that change no number; {named} named by shard"
    )
    assert refused > DAMAGES / 2


def test_repair_makes_only_the_bad_shards_again(recipe: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    cache = tmp_path / "run/cache"
    (cache / "shards/00001.zarr.zip").write_bytes(b"")
    (cache / "shards/00003.json").write_text("{}")
    assert main(["verify", str(cache)]) == 4
    assert main(["verify", str(cache), "--repair"]) == 0
    ended = server.run("cache", str(recipe), "--set", f"run_dir={tmp_path / 'run'}")
    assert (ended.code, ended.shards) == (0, ["cache 1", "cache 3"]), ended.output
    assert same_caches(tmp_path / "run", recipe.parent / "run")


def test_a_damaged_corpus_is_prepared_again(recipe: Path, server: Server, tmp_path: Path) -> None:
    """No shard is dropped for it, and the teacher never sees it."""
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    corpus = tmp_path / "run/cache/corpus"
    row = LogitCache(corpus.parent).columns([20])["input_ids"].astype("<u2")  # of shard 2
    (arrow,) = corpus.glob("*.arrow")
    data = arrow.read_bytes()
    assert data.count(row.tobytes()) == 1
    arrow.write_bytes(data.replace(row.tobytes(), (row ^ 1).tobytes()))
    options = ("--set", f"run_dir={tmp_path / 'run'}")
    assert main(["verify", str(corpus.parent), "--repair"]) == 4
    (corpus.parent / "shards/00002.json").unlink()
    assert server.run("cache", str(recipe), *options).code == 4
    assert len(list((corpus.parent / "shards").glob("*.json"))) == 4
    shutil.rmtree(corpus)
    assert server.run("prepare", str(recipe), *options).code == 0
    assert server.run("cache", str(recipe), *options).code == 0
    assert same_caches(tmp_path / "run", recipe.parent / "run")
