"""Answers of inference engines as their servers write them: kept whole, or refused by their line.

The records are literal ones of vLLM's completions, chat completions, run-batch and RequestOutput, and of SGLang's
/generate, cut to two candidates.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logit_cache import LogitCache
from logit_cache.base.errors import RecipeError
from logit_cache.exchange.export import export_cache
from logit_cache.exchange.importing import import_cache
from logit_cache.exchange.records import read_sequences
from logit_cache.store.verify import verify
from logit_cache.targets.supports import Support

from tests.helpers.synthetic import VOCAB, make_cache, word_tokenizer

Record = dict[str, Any]


def by_id(*entries: tuple[int, float, int]) -> Record:
    """A vLLM entry: the token of the text first, then the others."""
    return {str(token): {"logprob": p, "rank": rank, "decoded_token": " x"} for token, p, rank in entries}


PROMPT = [None, by_id((7, -0.5, 1), (9, -1.5, 2)), by_id((4, -6.0, 30), (8, -0.2, 1), (3, -2.0, 2))]
"""prompt_logprobs of the tokens 5, 7, 4: nothing is known of the first, and 4 is not among the two best."""
PROMPT_CANDIDATES = [[(-0.5, 7), (-1.5, 9)], [(-0.2, 8), (-2.0, 3)]]
ANSWER = {
    "content": [
        {
            "token": "token_id:8",
            "logprob": -0.3,
            "bytes": [32, 120],
            "top_logprobs": [
                {"token": "token_id:8", "logprob": -0.3, "bytes": [32, 120]},
                {"token": "token_id:2", "logprob": -1.9, "bytes": None},
                {"token": "token_id:3", "logprob": -2.5, "bytes": None},
            ],
        },
        {  # sampled outside the three best, of which two are listed
            "token": "token_id:1",
            "logprob": -5.0,
            "bytes": None,
            "top_logprobs": [
                {"token": "token_id:1", "logprob": -5.0, "bytes": None},
                {"token": "token_id:6", "logprob": -0.4, "bytes": None},
                {"token": "token_id:2", "logprob": -1.4, "bytes": None},
            ],
        },
    ]
}
ANSWER_CANDIDATES = [[(-0.3, 8), (-1.9, 2), (-2.5, 3)], [(-0.4, 6), (-1.4, 2)]]
COMPLETION = {
    "text_offset": [0, 11],
    "token_logprobs": [-0.3, -5.0],
    "tokens": ["token_id:8", "token_id:1"],
    "top_logprobs": [
        {"token_id:8": -0.3, "token_id:2": -1.9, "token_id:3": -2.5},
        {"token_id:1": -5.0, "token_id:6": -0.4, "token_id:2": -1.4, "token_id:3": -4.0},
    ],
}
CHAT: Record = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " x x"},
            "logprobs": ANSWER,
            "finish_reason": "stop",
            "token_ids": [8, 1],
        }
    ],
    "usage": {"prompt_tokens": 3},
    "prompt_logprobs": PROMPT,
    "prompt_token_ids": [5, 7, 4],
}


def text_completion(**choice: Any) -> Record:
    return {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "finish_reason": "stop", **choice}]}


def read(folder: Path, *lines: Any, form: str = "auto") -> list[Any]:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(read_sequences([file], form, VOCAB))


def refused(folder: Path, record: Any) -> str:
    """The message for a record on line 2, which is one line."""
    with pytest.raises(RecipeError) as caught:
        read(folder, CHAT, record)
    assert "line 2 of answers.jsonl" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


BATCH = {"id": "vllm-1", "custom_id": "a", "response": {"status_code": 200, "body": CHAT}, "error": None}
WHOLE = [*PROMPT_CANDIDATES, *ANSWER_CANDIDATES, None]
"""Candidates of the positions of the prompt 5, 7, 4 and the answer 8, 1."""


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        text_completion(prompt_token_ids=[5, 7, 4], prompt_logprobs=PROMPT, logprobs=COMPLETION, token_ids=[8, 1]),
        text_completion(prompt_token_ids=[5, 7, 4], prompt_logprobs=PROMPT, logprobs=COMPLETION, token_ids=None),
        text_completion(
            prompt_token_ids=[5, 7, 4],
            prompt_logprobs=PROMPT,
            token_ids=[8, 1],
            logprobs={
                "token_logprobs": [None, -0.5, -6.0, *COMPLETION["token_logprobs"]],
                "tokens": ["token_id:5", "token_id:7", "token_id:4", *COMPLETION["tokens"]],
                "top_logprobs": [None, {"token_id:7": -0.5}, {"token_id:4": -6.0}, *COMPLETION["top_logprobs"]],
            },
        ),
        {
            "request_id": "0",
            "prompt_token_ids": [5, 7, 4],
            "prompt_logprobs": PROMPT,
            "outputs": [
                {
                    "index": 0,
                    "token_ids": [8, 1],
                    "logprobs": [
                        by_id((8, -0.3, 1), (2, -1.9, 2), (3, -2.5, 3)),
                        by_id((1, -5.0, 9), (6, -0.4, 1), (2, -1.4, 2), (3, -4.0, 3)),
                    ],
                    "finish_reason": "length",
                }
            ],
        },
        BATCH,
    ],
    ids=["chat", "completion", "without token_ids", "echo", "RequestOutput", "run-batch"],
)
def test_prompt_and_answer_are_one_sequence(tmp_path: Path, record: Record) -> None:
    (sequence,) = read(tmp_path, record)
    assert sequence.token_ids == [5, 7, 4, 8, 1]
    last = ANSWER_CANDIDATES[1] if record in (CHAT, BATCH) else [*ANSWER_CANDIDATES[1], (-4.0, 3)]
    assert sequence.candidates == [*WHOLE[:3], last, None]
    assert sequence.label_log_probs == [-0.5, -6.0, -0.3, -5.0, 0.0]


def test_an_answer_to_a_prompt_without_log_probabilities(tmp_path: Path) -> None:
    """What a teacher says itself, with its prompt as context that nothing is learned of."""
    (sequence,) = read(tmp_path, {**CHAT, "prompt_logprobs": None})
    assert sequence.token_ids == [5, 7, 4, 8, 1] and sequence.candidates == [None, None, *ANSWER_CANDIDATES, None]
    assert sequence.label_log_probs == [0.0, 0.0, -0.3, -5.0, 0.0]


def test_echo_alone_has_the_ids_of_the_prompt(tmp_path: Path) -> None:
    echoed = {
        "token_logprobs": [None, -0.5, -0.3],
        "tokens": ["token_id:5", "token_id:7", "token_id:8"],
        "top_logprobs": [None, {"token_id:7": -0.5, "token_id:9": -1.5}, {"token_id:8": -0.3, "token_id:2": -1.9}],
    }
    (sequence,) = read(tmp_path, text_completion(logprobs=echoed))
    assert sequence.token_ids == [5, 7, 8]
    assert sequence.candidates == [[(-0.5, 7), (-1.5, 9)], [(-0.3, 8), (-1.9, 2)], None]


def test_the_token_of_the_text_is_a_candidate_where_it_is_one_of_the_best(tmp_path: Path) -> None:
    """Of two: the second best at the first place, and neither at the second, where its rank is 3 or unknown."""
    ranked = [None, by_id((7, -1.5, 2), (9, -0.5, 1)), by_id((4, -3.0, 3), (8, -0.2, 1), (3, -2.0, 2))]
    (sequence,) = read(tmp_path, {"prompt_token_ids": [5, 7, 4], "prompt_logprobs": ranked})
    named = {
        "tokens": ["token_id:5", "token_id:7", "token_id:4", "token_id:9"],
        "token_logprobs": [None, -1.5, -3.0, -0.1],
        "top_logprobs": [
            None,
            {"token_id:7": -1.5, "token_id:9": -0.5},
            {"token_id:4": -3.0, "token_id:8": -0.2, "token_id:3": -2.0},
            {"token_id:9": -0.1, "token_id:1": -4.0},
        ],
    }
    (other,) = read(tmp_path, text_completion(logprobs=named))
    expected = [[(-1.5, 7), (-0.5, 9)], [(-0.2, 8), (-2.0, 3)]]
    assert sequence.candidates[:2] == other.candidates[:2] == expected


def test_every_choice_is_a_sequence(tmp_path: Path) -> None:
    other = {**CHAT["choices"][0], "index": 1, "logprobs": {"content": ANSWER["content"][:1]}, "token_ids": [8]}
    first, second = read(tmp_path, {**CHAT, "choices": [CHAT["choices"][0], other]})
    assert first.token_ids == [5, 7, 4, 8, 1] and first.candidates == WHOLE
    assert second.token_ids == [5, 7, 4, 8] and second.candidates == [*WHOLE[:3], None]
    assert "choice 1 of line 1" in second.where


def test_the_token_that_follows_a_scored_prompt_is_left_out(tmp_path: Path) -> None:
    """vLLM generates one at least; several choices of a prompt that alone was scored are the prompt once."""
    bare = {"index": 0, "text": " x", "logprobs": None, "finish_reason": "length", "token_ids": [8]}
    record = {"choices": [bare, {**bare, "index": 1}], "prompt_logprobs": PROMPT, "prompt_token_ids": [5, 7, 4]}
    (sequence,) = read(tmp_path, record)
    assert sequence.token_ids == [5, 7, 4] and sequence.candidates == [*PROMPT_CANDIDATES, None]


META: Record = {
    "id": "a",
    "finish_reason": {"type": "length", "length": 1},
    "prompt_tokens": 3,
    "completion_tokens": 1,
    "cached_tokens": 0,
    "input_token_logprobs": [[None, 5, None], [-0.5, 7, None], [-6.0, 4, None]],
    "input_top_logprobs": [None, [[-0.5, 7, None], [-1.5, 9, None]], [[-0.2, 8, None], [-2.0, 3, None]]],
    "output_token_logprobs": [[-0.3, 8, None]],
    "output_top_logprobs": [[[-0.3, 8, None], [-1.9, 2, None], [-2.5, 3, None]]],
}


def test_an_answer_of_sglang_is_one_sequence(tmp_path: Path) -> None:
    (sequence,) = read(tmp_path, {"text": "x", "output_ids": [8], "meta_info": META})
    assert sequence.token_ids == [5, 7, 4, 8] and sequence.candidates == [*WHOLE[:3], None]
    assert sequence.label_log_probs == [-0.5, -6.0, -0.3, 0.0]


def test_several_answers_of_sglang_are_a_list(tmp_path: Path) -> None:
    """What /generate returns for n = 2, and for several prompts."""
    sequences = read(tmp_path, [{"meta_info": META}, {"meta_info": META}], {"meta_info": META})
    assert [sequence.candidates for sequence in sequences] == 3 * [[*WHOLE[:3], None]]
    assert [sequence.where for sequence in sequences] == [
        "entry 0 of line 1 of answers.jsonl",
        "entry 1 of line 1 of answers.jsonl",
        "line 2 of answers.jsonl",
    ]


def changed(record: Record, **changes: Any) -> Record:
    return {**record, **changes}


def choice(**changes: Any) -> Record:
    return changed(CHAT, choices=[{**CHAT["choices"][0], **changes}])


NAMED = {"content": [{"token": " x", "logprob": -0.3, "bytes": [32], "top_logprobs": []}]}
BARE = {"content": [{"token": "token_id:8", "logprob": -9999.0, "bytes": None, "top_logprobs": []}]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (choice(logprobs=NAMED, token_ids=[8]), "return_tokens_as_token_ids"),
        (choice(logprobs=BARE, token_ids=[8]), "token 3 has no candidates"),
        (choice(token_ids=[8, 2]), "token_ids of the answer are not those"),
        (choice(delta={}, finish_reason=None), "part of a stream"),
        (choice(finish_reason=None), "part of a stream"),
        (changed(CHAT, prompt_token_ids=None), "return_token_ids"),
        (changed(CHAT, prompt_logprobs=PROMPT[1:]), "2 log-probabilities for 3 tokens of the prompt"),
        (changed(CHAT, prompt_logprobs=[None, by_id((7, -0.5, 3)), PROMPT[2]]), "token 1 has no candidates beside"),
        (changed(CHAT, prompt_logprobs=None, choices=[{"logprobs": None}]), "no token has candidates"),
        (changed(CHAT, prompt_logprobs=[], prompt_token_ids=[], choices=[{"logprobs": None}]), "no token has candid"),
        (changed(CHAT, prompt_logprobs={"start_indices": [0]}), "1 log-probabilities for 3"),
        (changed(CHAT, prompt_logprobs=[None, by_id((7, -9999.0, 1), (9, -0.1, 2)), PROMPT[2]]), "probability 0"),
        (changed(CHAT, prompt_logprobs=[None, by_id((7, -math.inf, 1), (9, -0.1, 2)), PROMPT[2]]), "probability 0"),
        (changed(CHAT, prompt_logprobs=[None, by_id((7, math.nan, 1), (9, -0.1, 2)), PROMPT[2]]), "log-probability"),
        ({"object": "error", "message": "too long", "code": 400}, "error of the server (too long)"),
        ({"error": {"message": "too long", "code": 400}}, "error of the server (too long)"),
        ({"custom_id": "a", "response": {"status_code": 400, "body": {"error": {"message": "bad"}}}}, "(bad)"),
        ({"custom_id": "a", "response": None, "error": "timeout"}, "error of the server (timeout)"),
        ({"meta_info": changed(META, prompt_tokens=9)}, "3 of 9 prompt tokens"),
        ({"meta_info": changed(META, input_token_logprobs=[], input_top_logprobs=[])}, "0 of 3 prompt tokens"),
        ({"meta_info": {"output_token_logprobs": META["output_token_logprobs"]}}, "logprob_start_len = 0"),
        ({"meta_info": changed(META, finish_reason=None)}, "part of a stream"),
        ({"meta_info": changed(META, finish_reason={"type": "abort", "message": "no room"})}, "no room"),
        ({"meta_info": changed(META, input_top_logprobs=None)}, "token 1 has no candidates"),
        ({"meta_info": changed(META, input_top_logprobs=META["input_top_logprobs"][:2])}, "2 entries"),
        ([{"meta_info": META}, 3], "line 2"),
        ({"input_ids": [], "token_ids": [], "log_probs": []}, "no tokens"),
        ({"input_ids": [1, 2], "token_ids": [[3], []], "log_probs": [[-math.inf], []]}, "above 0"),
        (
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "token_ids": [[3], [3], []], "log_probs": [[-1], [-1], []]},
            "labels[0] is 1 and the token after position 0 is 2",
        ),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, record: Any, said: str) -> None:
    assert said in refused(tmp_path, record)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_fewer_candidates_at_some_positions(tmp_path: Path, tokenizer_dir: str) -> None:
    """All are kept, none of probability 0, and the tail is what each position leaves."""
    shut = by_id((7, math.log(0.75), 1), (9, -9999.0, 2), (2, -9999.0, 3))  # a grammar excludes the rest
    open_ = by_id((4, math.log(0.5), 1), (8, math.log(0.25), 2), (3, math.log(0.125), 3))
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt_token_ids": [5, 7, 4], "prompt_logprobs": [None, shut, open_]}) + "\n")
    made = import_cache([file], tmp_path / "cache", tokenizer=tokenizer_dir)
    assert verify(tmp_path / "cache") == {} and made.manifest.codec.support.name == "topp"
    targets = made[0]["targets"]
    assert targets.token_ids.tolist()[:2] == [[7, -1, -1], [4, 8, 3]]
    np.testing.assert_allclose(targets.at_temperature(1.0)[1].exp()[:2], [0.25, 0.125], atol=1 / 512)
    two = import_cache([file], tmp_path / "two", tokenizer=tokenizer_dir, k=2)[0]["targets"]
    assert two.token_ids.tolist()[:2] == [[7, -1], [4, 8]]
    with pytest.raises(RecipeError, match="no position has more than 3"):
        import_cache([file], tmp_path / "four", tokenizer=tokenizer_dir, k=4)


def test_an_export_with_fewer_candidates_comes_back(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", support=Support("topp", k=6, p=0.9))
    export_cache(cache, tmp_path / "out", "jsonl")
    back = import_cache([tmp_path / "out"], tmp_path / "back")
    assert back.manifest.codec.support == cache.manifest.codec.support
    rows = np.arange(len(cache))
    one, two = (source.batch(rows)["targets"] for source in (cache, LogitCache(tmp_path / "back")))
    assert one.token_ids.tolist() == two.token_ids.tolist() and one.mask.tolist() == two.mask.tolist()
    np.testing.assert_allclose(one.log_probs[one.token_ids >= 0], two.log_probs[two.token_ids >= 0], atol=1e-4)
