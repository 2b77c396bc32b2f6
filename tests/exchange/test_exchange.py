"""Export and import: what other programs read is what the cache holds, and what engines return is taken at its word."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.errors import CorruptError, MismatchError, RecipeError
from logit_cache.exchange.answers import read_sglang, read_vllm
from logit_cache.exchange.export import export_cache
from logit_cache.exchange.importing import import_cache
from logit_cache.exchange.packing import tail_at_one
from logit_cache.exchange.records import check_sequence
from logit_cache.stages.app import main
from logit_cache.store.masses import TAIL_STEP
from logit_cache.store.verify import verify

from tests.helpers.synthetic import VOCAB, codec_error, make_cache, random_rows, teacher_logits, word_tokenizer

K = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("exchange") / "cache", k=K)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return folder


def assert_rows_hold_the_cache(cache: LogitCache, rows: list[dict[str, Any]]) -> None:
    assert len(rows) == len(cache)
    for number, row in enumerate(rows):
        item = cache[number]
        targets = item["targets"]
        assert row["input_ids"] == item["input_ids"].tolist()
        assert row["labels"] == item["labels"].tolist()
        for position in range(cache.row_length):
            if not targets.mask[position]:
                assert row["token_ids"][position] == row["log_probs"][position] == row["tail_curve"][position] == []
                continue
            assert row["token_ids"][position] == targets.token_ids[position].tolist()
            assert row["log_probs"][position] == targets.log_probs[position].tolist()
            assert row["tail_curve"][position] == targets.tail_curve[position].tolist()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_an_export_holds_what_the_cache_holds(cache: LogitCache, tmp_path: Path, form: str) -> None:
    """Read by other programs than this one: `datasets`, pyarrow and a JSON parser."""
    export_cache(cache, tmp_path / "out", form)
    files = sorted((tmp_path / "out").glob("data-*"))
    if form == "parquet":
        assert_rows_hold_the_cache(cache, pq.read_table(files).to_pylist())
        opened = datasets.Dataset.from_parquet([str(f) for f in files], cache_dir=str(tmp_path / "hf"))
        assert_rows_hold_the_cache(cache, list(opened))
    else:
        assert_rows_hold_the_cache(cache, [json.loads(line) for f in files for line in f.read_text().splitlines()])
    about = json.loads((tmp_path / "out/exchange.json").read_text())
    assert about["knots"] == list(cache.knots) and about["identity_digest"] == cache.digest


def lagrange(nodes: list[float], node: float, at: float) -> float:
    """The weight of the value at `node` in the polynomial through all nodes."""
    return math.prod((at - other) / (node - other) for other in nodes if other != node)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_an_export_comes_back_as_the_same_cache(cache: LogitCache, tmp_path: Path, form: str) -> None:
    export_cache(cache, tmp_path / "out", form)
    back = import_cache([tmp_path / "out"], tmp_path / "back")
    assert verify(tmp_path / "back") == {}
    assert back.knots == cache.knots and back.vocab_size == cache.vocab_size and back.positions == cache.positions
    one, two = (source.batch(np.arange(len(cache))) for source in (cache, back))
    for name in ("input_ids", "labels", "segment_ids"):
        assert torch.equal(one[name], two[name]), name
    mask = one["targets"].mask
    assert torch.equal(mask, two["targets"].mask)
    # Coding is repeated on values that are coded already: nothing moves.
    assert torch.equal(one["targets"].token_ids, two["targets"].token_ids)
    assert float((one["targets"].log_probs - two["targets"].log_probs)[mask].abs().max()) < 1e-4
    of_labels = [batch["targets"].label_log_probs for batch in (one, two)]
    assert of_labels[0] is not None and of_labels[1] is not None
    torch.testing.assert_close(of_labels[1], of_labels[0], rtol=0, atol=1e-4)
    # The losses of rows are now those of values that are rounded.
    for row in range(len(back)):
        has_label = mask[row] & (one["labels"][row] != -100)
        mean = -float(of_labels[0][row][has_label].double().mean()) if has_label.any() else 0.0
        assert back.teacher_losses([row])[0] == pytest.approx(mean, rel=1e-6)
    for temperature in (1.0, 2.0, 5.0):
        tails = [batch["targets"].at_temperature(temperature)[1].exp()[mask] for batch in (one, two)]
        # The new cache predicts its tail curve from itself, so it rounds anew: half a step at each knot but 1, as far as
        # interpolation weighs it, of which mass (1 - mass) <= 1/4.
        rounded = sum(abs(lagrange([0.0, *cache.knots], knot, 1 / temperature)) for knot in cache.knots if knot != 1.0)
        assert float((tails[0] - tails[1]).abs().max()) < rounded * TAIL_STEP / 2 / 4 + 1e-5
    assert back.tokenizer_digest == cache.tokenizer_digest


def test_axolotls_columns(cache: LogitCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "axolotl", temperature=2.0)
    rows = pq.read_table(sorted((tmp_path / "out").glob("data-*"))).to_pylist()
    assert len(rows) == len(cache)
    for number, row in enumerate(rows):
        item = cache[number]
        targets = item["targets"]
        shape = (cache.row_length, K)
        ids, log_probs, mask = (np.asarray(row[f"target_{name}"]) for name in ("token_ids", "logprobs", "mask"))
        assert ids.shape == log_probs.shape == mask.shape == shape
        assert np.array_equal(mask, np.repeat(targets.mask.numpy()[:, None], K, 1))
        # Its trainer moves labels by one before it uses them, as transformers does.
        moved = [*row["labels"][1:], -100]
        assert moved == item["labels"].tolist()
        expected = targets.at_temperature(2.0)[0].log_softmax(-1)
        assert np.allclose(log_probs[mask == 1], expected[targets.mask].reshape(-1), atol=1e-5)
        assert (log_probs[mask == 0] == -1e9).all()
        boundaries = np.flatnonzero(np.diff(item["segment_ids"].numpy())) + 1
        assert [p for p in range(1, 16) if row["position_ids"][p] == 0] == boundaries.tolist()


def test_an_export_is_whole_or_absent(cache: LogitCache, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        export_cache(cache, tmp_path / "taken", "parquet")
    with pytest.raises(RecipeError, match="one of parquet, jsonl, axolotl"):
        export_cache(cache, tmp_path / "out", "csv")
    with pytest.raises(RecipeError, match=r"--temperature: .*inverse temperature 2"):
        export_cache(cache, tmp_path / "out", "axolotl", temperature=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def engine_records(
    kind: str, sequences: int = 6, seed: int = 3, k: int = K
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What an engine returns for some sequences of the synthetic teacher, and the sequences."""
    rng = np.random.default_rng(seed)
    records, tokens = [], []
    for _ in range(sequences):
        ids = rng.integers(0, VOCAB, rng.integers(4, 13))
        log_p = torch.log_softmax(teacher_logits(torch.from_numpy(ids)[None], torch.zeros(1, len(ids)))[0], -1)
        tops = [None]
        for position in range(len(ids) - 1):
            values, best = log_p[position].float().topk(k)
            entries = list(zip(values.tolist(), best.tolist(), range(1, k + 1), strict=True))
            actual = int(ids[position + 1])
            if kind == "vllm" and actual not in best.tolist():
                rank = 1 + int((log_p[position] > log_p[position, actual]).sum())
                # vLLM puts the token of the prompt first.
                entries.insert(0, (float(log_p[position, actual]), actual, rank))
            tops.append(entries)
        if kind == "vllm":
            listed = [
                None if top is None else {str(t): {"logprob": p, "rank": r, "decoded_token": "x"} for p, t, r in top}
                for top in tops
            ]
            records.append({"id": "cmpl", "choices": [{"prompt_token_ids": ids.tolist(), "prompt_logprobs": listed}]})
        else:
            meta = {
                "input_token_logprobs": [
                    [None if i == 0 else float(log_p[i - 1, t]), int(t), None] for i, t in enumerate(ids)
                ],
                "input_top_logprobs": [None if top is None else [[p, t, None] for p, t, _ in top] for top in tops],
            }
            records.append({"text": "", "meta_info": meta})
        tokens.append(ids)
    return records, tokens


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_engines_log_probabilities_become_a_cache(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    """Against the teacher's own distribution: the right tokens at the right positions, and the tail at T = 1."""
    records, tokens = engine_records(kind)
    file = write_lines(tmp_path / "answers.jsonl", records)
    made = import_cache([file], tmp_path / "cache", tokenizer=str(tokenizer_dir), row_length=24)
    assert verify(tmp_path / "cache") == {} and made.knots == (1.0,)
    assert made.positions == sum(len(ids) - 1 for ids in tokens)
    batch = made.batch(np.arange(len(made)))
    seen: list[list[int]] = []
    for row in range(len(made)):
        segments = batch["segment_ids"][row]
        for segment in segments.unique():
            at = segments == segment
            if (batch["labels"][row][at] != -100).any():
                seen.append(batch["input_ids"][row][at].tolist())
    assert seen == [ids.tolist() for ids in tokens], "each sequence whole, in order, in a segment of its own"
    exact = torch.log_softmax(teacher_logits(batch["input_ids"], batch["segment_ids"]), -1)
    targets = batch["targets"]
    mask = targets.mask
    assert torch.equal(mask, batch["labels"] != -100)
    assert torch.equal(exact.topk(K).indices.sort(-1).values[mask], targets.token_ids.sort(-1).values[mask])
    log_p, log_tail = targets.at_temperature(1.0)
    expected_tail = 1 - exact.exp().topk(K).values.sum(-1)
    # The codec keeps the tail in steps of 1/512 nat.
    assert float((log_tail.exp() - expected_tail)[mask].abs().max()) < 1 / 512
    expected = exact.gather(-1, targets.token_ids.clamp(min=0))
    assert ((log_p - expected).abs() <= codec_error(expected))[mask].all()
    with pytest.raises(ValueError, match="at 1 only"):
        targets.at_temperature(2.0)
    # Engines say how likely the text's own token is, also where it is not among the best.
    own = torch.where(mask, exact.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1))[..., 0], 0.0)
    np.testing.assert_allclose(made.teacher_losses(), (-own.sum(-1) / mask.sum(-1)).numpy(), rtol=1e-5)
    assert made.teacher_loss == pytest.approx(-float(own.sum() / mask.sum()), rel=1e-5)


def test_longer_sequences_lose_their_end(tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "logit_cache")
    records, tokens = engine_records("sglang")
    file = write_lines(tmp_path / "answers.jsonl", records)
    made = import_cache([file], tmp_path / "cache", tokenizer=str(tokenizer_dir), row_length=6, k=3)
    assert made.positions == sum(min(len(ids), 6) - 1 for ids in tokens)
    assert made.manifest.codec.support.k == 3
    cut = sum(max(len(ids) - 6, 0) for ids in tokens)
    assert f"{cut} tokens beyond row ends" in caplog.text and "T = 1 only" in caplog.text


def test_a_generated_answer_is_joined_to_its_prompt() -> None:
    entry = {"7": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}, "9": {"logprob": -3.0, "rank": 2}}
    record = {
        "prompt_token_ids": [1, 2],
        "prompt_logprobs": [None, entry],
        "outputs": [{"token_ids": [7, 9], "logprobs": [entry, entry]}],
    }
    (sequence,) = read_vllm(record, "here")
    assert sequence.token_ids == [1, 2, 7, 9]
    pairs = [(-0.1, 7), (-3.0, 9)]
    assert sequence.candidates == [pairs, pairs, pairs, None]
    assert sequence.label_log_probs is None, "nothing tells how likely token 2 is"
    meta = {
        "input_token_logprobs": [[None, 1, None], [-1.0, 2, None]],
        "input_top_logprobs": [None, [[-0.1, 7, None], [-3.0, 9, None]]],
        "output_token_logprobs": [[-0.1, 7, None]],
        "output_top_logprobs": [[[-0.1, 7, None], [-3.0, 9, None]]],
    }
    (answered,) = read_sglang({"meta_info": meta}, "here")
    assert answered.candidates == [pairs, pairs, None]


def test_the_prompts_own_token_is_not_among_the_best_where_its_rank_says_so() -> None:
    entry = {"3": {"logprob": -9.0, "rank": 40}, "7": {"logprob": -0.1, "rank": 1}, "9": {"logprob": -3.0, "rank": 2}}
    record = {"prompt_token_ids": [1, 3], "prompt_logprobs": [None, entry]}
    (sequence,) = read_vllm(record, "here")
    assert sequence.candidates[0] == [(-0.1, 7), (-3.0, 9)] and sequence.label_log_probs == [-9.0, 0.0]


def test_the_tail_at_one() -> None:
    best = [(math.log(0.5), 0), (math.log(0.3), 1)]
    assert tail_at_one(best, 100, "") == pytest.approx(math.log(0.2), abs=1e-12)
    assert tail_at_one(best, 2, "") == -math.inf
    # No token outside can be likelier than the last one inside: 3 of them cannot hold 0.2 at 0.01 each.
    small = [(math.log(0.79), 0), (math.log(0.01), 1)]
    assert tail_at_one(small, 5, "") == pytest.approx(math.log(0.03))
    # Rounding above 1 leaves a tail that is small, not none.
    assert tail_at_one([(0.0, 0)], 10, "") == pytest.approx(math.log(2.0**-24))
    with pytest.raises(RecipeError, match=r"sum to 1\.2.*raw_logprobs"):
        tail_at_one([(math.log(0.7), 0), (math.log(0.5), 1)], 10, "line 3")


def test_unusable_records_are_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    good, _ = engine_records("vllm", sequences=1)

    def refused(record: Any, **options: Any) -> str:
        file = tmp_path / "bad.jsonl"
        file.write_text(json.dumps(good[0]) + "\n" + (record if isinstance(record, str) else json.dumps(record)) + "\n")
        with pytest.raises((RecipeError, MismatchError)) as caught:
            import_cache([file], tmp_path / "cache", **{"tokenizer": str(tokenizer_dir), **options})
        assert not (tmp_path / "cache").exists() and not list(tmp_path.glob("*.tmp*"))
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "line 2" in refused("{") and "JSON" in refused("{")
    assert "not an object" in refused("[]")
    assert "unknown format" in refused({"text": "a"})
    assert "return_token_ids" in refused({"choices": [{"prompt_logprobs": [None]}]})
    entry = {"1": {"logprob": -0.5, "rank": 1}}
    assert "for 2 tokens" in refused({"prompt_token_ids": [1, 2], "prompt_logprobs": [None]})
    assert "outside the vocabulary" in refused({"prompt_token_ids": [1, 999], "prompt_logprobs": [None, entry]})
    wild = {"999": {"logprob": -0.5, "rank": 1}}
    assert "--vocab-size" in refused({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, wild]})
    positive = {"1": {"logprob": 12.5, "rank": 1}}
    assert "is not a log-probability" in refused({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, positive]})
    one = {"prompt_token_ids": [1, 2], "prompt_logprobs": [None, entry]}
    assert "no position has more than 8 candidates" in refused(one, k=9)
    raw = {str(i): {"logprob": -0.01, "rank": i + 1} for i in range(K)}
    assert "sum to 7.9" in refused({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, raw]})
    assert "--tokenizer" in refused(one, tokenizer=None)
    (twice,) = read_sglang(
        {"meta_info": {"input_token_logprobs": [[None, 1], [-1, 2]], "input_top_logprobs": [None, [[-1, 5], [-2, 5]]]}},
        "x",
    )
    with pytest.raises(RecipeError, match="appears twice"):
        check_sequence(twice, VOCAB)
    assert "line 2" in refused({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"1": {"logprob": None}}]})
    assert "line 2" in refused({"prompt_token_ids": ["1", "2"], "prompt_logprobs": [None, entry]})
    plain = {"input_ids": [1, 2, 3], "token_ids": [[1], [2], []], "log_probs": [[-1.0], [-1.0], []]}
    for change in (
        {"log_probs": [[None], [-1.0], []]},
        {"token_ids": [["1"], [2], []]},
        {"token_ids": [[1.5], [2], []]},
        {"input_ids": ["1", 2, 3]},
        {"input_ids": [1.5, 2, 3]},
        {"segment_ids": [0, 0]},
        {"segment_ids": [0, 0, None]},
        {"labels": [2]},
        {"labels": [2, "3", -100]},
        {"tail_curve": [[-1.0]]},
        {"tail_curve": [["x"], [-1.0], []]},
        {"tail_curve": [-1.0, -1.0, -1.0]},
    ):
        assert "line 2" in refused({**plain, **change}), change


@pytest.mark.parametrize("content", [gzip.compress(b"{}"), '{"a": "ä"}'.encode("latin-1")], ids=["gzip", "latin-1"])
def test_what_is_not_utf8_is_no_import(tmp_path: Path, tokenizer_dir: Path, content: bytes) -> None:
    (tmp_path / "answers.jsonl.gz").write_bytes(content)
    with pytest.raises(RecipeError, match="line 1 is not valid UTF-8"):
        import_cache([tmp_path / "answers.jsonl.gz"], tmp_path / "cache", tokenizer=str(tokenizer_dir))


def test_a_damaged_file_of_an_export_is_named(cache: LogitCache, tmp_path: Path) -> None:
    """Its footer, which tells where the rows are, and its rows."""
    export_cache(cache, tmp_path / "out", "parquet")
    file = next((tmp_path / "out").glob("data-*"))
    data = file.read_bytes()
    for damaged in (data[:-9], b"", data[:400] + bytes(400) + data[800:]):
        file.write_bytes(damaged)
        with pytest.raises(RecipeError, match=r"data-00000\.parquet: cannot be read as parquet") as caught:
            import_cache([tmp_path / "out"], tmp_path / "back")
        assert len(str(caught.value).splitlines()) == 1


def test_a_broken_export_is_not_imported(cache: LogitCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "jsonl")
    file = tmp_path / "out/exchange.json"
    about = json.loads(file.read_text())
    broken = [{key: value for key, value in about.items() if key != name} for name in ("format", "knots", "identity")]
    broken += [{**about, "support": None}, {**about, "support": {"name": "topk", "k": "8"}}, {**about, "knots": ["1"]}]
    for text in ("{", "[]", *map(json.dumps, broken)):
        file.write_text(text)
        with pytest.raises(CorruptError, match=r"exchange\.json: not .* export the cache again"):
            import_cache([tmp_path / "out"], tmp_path / "cache")


def test_where_an_exchange_is_written_to(
    cache: LogitCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_cache(cache, tmp_path / "out", "parquet")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    commands = (["export", str(cache.path)], ["import", "out", "--output"])
    for command, (where, said) in itertools.product(
        commands, {".": "exists already", "memory://bucket/out": "not a local directory"}.items()
    ):
        assert main([*command, where]) == 2
        error = capsys.readouterr().err
        assert said in error and "--temperature" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(cache.path), "."]) == 0
    assert (tmp_path / "here/exchange.json").exists()


def test_the_commands(
    cache: LogitCache, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(cache.path), str(out)]) == 0
    assert main(["import", str(out), "--output", str(tmp_path / "back")]) == 0
    assert main(["verify", str(tmp_path / "back")]) == 0
    assert main(["export", str(cache.path), str(out)]) == 2
    assert main(["export", str(cache.path), str(tmp_path / "t"), "--format", "axolotl", "--temperature", "0.3"]) == 2
    assert main(["import", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    records, _ = engine_records("sglang")
    file = write_lines(tmp_path / "answers.jsonl", records)
    capsys.readouterr()
    arguments = ["import", str(file), "--output", str(tmp_path / "new"), "--tokenizer", str(tokenizer_dir)]
    assert main([*arguments, "--teacher", "served"]) == 0
    assert "T = 1 only" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "new"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["knots"] == [1.0] and facts["teacher"]["source"] == "served" and facts["complete"]


def test_a_plain_record_without_a_tail_curve(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The simplest form that one's own script can write."""
    input_ids, _ = random_rows(1, 5)
    log_p = math.log(0.25)
    record = {
        "input_ids": input_ids[0].tolist(),
        "token_ids": [[1, 2], [3, 4], [], [5, 6], []],
        "log_probs": [[log_p, log_p], [log_p, log_p], [], [log_p, log_p], []],
    }
    file = write_lines(tmp_path / "plain.jsonl", [record])
    made = import_cache([file], tmp_path / "cache", tokenizer=str(tokenizer_dir))
    item = made[0]
    assert item["targets"].mask.tolist() == [True, True, False, True, False]
    assert float(item["targets"].at_temperature(1.0)[1][0]) == pytest.approx(math.log(0.5), abs=1 / 512)
