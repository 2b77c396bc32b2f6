"""How fast `prepare` is against the bare tokenizer, and what memory it takes by the number of documents. No test.

    python -m tests.lab.prepare_speed TOKENIZER TEXT...

Both sides tokenise the same documents, cut from the text files, in turns, in calls of the same size, on the same cores.
The bare side asks the tokenizer's backend for the ids of a list of texts and drops them. `prepare` is all of it: reading
JSON lines, hashes, tokens, packing, digests, files that are synced; but not the digest of the tokenizer, which is taken
once, before. Memory is the peak of a process of its own, over
what it has before the first document.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from logit_cache.corpus import prepare
from logit_cache.corpus.packing_pass import BATCH_CHARACTERS
from logit_cache.corpus.prepare import prepare_corpus
from logit_cache.corpus.rows import PackedRows
from logit_cache.corpus.tokenizer import tokenizer_digest
from logit_cache.models.loading import load_tokenizer
from logit_cache.recipe.loading import load_recipe
from logit_cache.recipe.schema import Recipe

LENGTHS = {"short": 500, "long": 50_000}
"""Characters of a document."""
CHARACTERS = 40_000_000
"""Of the text, repeated, so that what a start takes (half a second) does not count."""
TURNS = 5


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - wall, after.user + after.system - before.user - before.system


def recipe_of(folder: Path, source: Path, tokenizer: str) -> Recipe:
    text = f'run_dir = "{folder}"\n[teacher]\nmodel = "{tokenizer}"\n[corpus]\nsource = "{source}"\nrow_length = 1024\ndocument_separator = "\\u001e"\n'
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")


def speed(scratch: Path, tokenizer_name: str, documents: list[str], name: str) -> None:
    tokenizer, source = load_tokenizer(tokenizer_name), scratch / f"{name}.jsonl"
    digest = tokenizer_digest(tokenizer)
    prepare.tokenizer_digest = lambda tokenizer: digest  # type: ignore[assignment]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    at_once = max(BATCH_CHARACTERS // len(documents[0]), 1)
    batches = [documents[first : first + at_once] for first in range(0, len(documents), at_once)]

    def bare() -> None:
        for batch in batches:
            tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)

    ratios: list[tuple[float, ...]] = []
    for turn in range(TURNS):
        recipe = recipe_of(scratch / f"{name}-{turn}", source, tokenizer_name)
        work = {"bare": bare, "prepare": lambda recipe=recipe: prepare_corpus(recipe, tokenizer, None)}
        names = list(work) if turn % 2 else list(work)[::-1]
        found = {of: seconds_of(work[of]) for of in names}
        ratios.append(tuple(b / p for b, p in zip(found["bare"], found["prepare"], strict=True)))
    rows = PackedRows(scratch / f"{name}-0/cache/corpus")
    stored = sum(file.stat().st_size for file in rows.path.glob("*.arrow")) / (rows.rows * rows.row_length)
    for kind, values in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(
            f"{name} documents: prepare at {statistics.median(values):.2f} ({spread}) of the bare tokenizer, {kind} time"
        )
    print(f"{name} documents: {stored:.3f} bytes a position")


def _peak(folder: Path, source: Path, tokenizer_name: str, answer: multiprocessing.Queue[float]) -> None:
    tokenizer = load_tokenizer(tokenizer_name)
    recipe = recipe_of(folder, source, tokenizer_name)
    prepare_corpus(recipe, tokenizer, None)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(scratch: Path, tokenizer_name: str, documents: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    peaks = []
    for times in (1, 10):
        source = scratch / f"{times}.txt"  # one file, cut by a separator
        with source.open("w") as file:
            for number in range(times):
                file.writelines(f"{number} {text}\x1e" for text in documents)
        answer: multiprocessing.Queue[float] = context.Queue()
        folder = scratch / f"memory-{times}"
        process = context.Process(target=_peak, args=(folder, source, tokenizer_name, answer))
        process.start()
        peaks.append(answer.get())
        process.join()
    print(f"memory: {peaks[0]:,.0f} MB; of 10 times the documents {peaks[1]:,.0f} MB, {peaks[1] / peaks[0] - 1:+.1%}")


def main() -> None:
    tokenizer_name, *files = sys.argv[1:]
    once = "".join(Path(file).read_text(errors="ignore") for file in files)
    text = (once * (CHARACTERS // len(once) + 1))[:CHARACTERS]
    with tempfile.TemporaryDirectory() as scratch:
        for name, length in LENGTHS.items():
            documents = [text[first : first + length] for first in range(0, len(text), length)]
            speed(Path(scratch), tokenizer_name, documents, name)
        memory(Path(scratch), tokenizer_name, [text[first : first + 500] for first in range(0, 6_000_000, 500)])


if __name__ == "__main__":
    main()
