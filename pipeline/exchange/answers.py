"""The answers of inference engines, whole: prompt and generated tokens of every choice, with the candidates of each.

vLLM gives log-probabilities in three forms: by token id (`prompt_logprobs`, and `logprobs` of its own Python objects),
and by the names of tokens in two forms of OpenAI's interface, completions and chat. A name is a token's text, from
which no id follows, unless the request says `return_tokens_as_token_ids`: then it is `token_id:17`.

The token that a sequence has is listed also where it is not among the k best; as a candidate it then says nothing of
the tokens between. vLLM's ranks tell that apart, and without ranks the least likely candidate is left out where it may
be that token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from ..base.errors import RecipeError
from .sequence import TokenSequence

IMPOSSIBLE = -9999.0
"""The log-probability that OpenAI's interface has for -inf, which JSON lacks."""
_NAME = "token_id:"

Candidates = list[tuple[float, int]] | None
"""(log-probability, id) pairs for one token; None where the engine was not asked about it."""
Scored = tuple[int, float | None, Candidates]
"""A token, its own log-probability where the engine gave it, and the candidates in its place."""


def unwrapped(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The answer in a line of a batch (`vllm run-batch`), and any other record as it is.

    Raises RecipeError for a record that is an error of the server.
    """
    body = record
    if isinstance(response := record.get("response"), dict) and isinstance(response.get("body"), dict):
        body = response["body"]
    failed = record.get("error") or body.get("error") or (body.get("object") == "error" and body.get("message"))
    if failed:
        text = failed.get("message", failed) if isinstance(failed, dict) else failed
        raise RecipeError(f"{where}: an error of the server ({text}): ask again, or delete the line")
    return body


def read_vllm(record: dict[str, Any], where: str) -> list[TokenSequence]:
    """The sequences of a completion, a chat completion or a RequestOutput: prompt and answer of every choice.

    A prompt that several choices share is part of each. An answer that has no log-probabilities is left out, as the one
    token is that vLLM generates after a scored prompt. Raises ValueError for what is missing, and what to ask for.
    """
    choices = record.get("choices") or record.get("outputs") or [{}]
    sequences: list[TokenSequence] = []
    for number, choice in enumerate(choices):
        if "delta" in choice or choice.get("finish_reason", "") is None:
            raise ValueError("part of a stream: save whole answers")
        ids, prompt = (
            next((part[key] for part in (choice, record) if part.get(key) is not None), None)
            for key in ("prompt_token_ids", "prompt_logprobs")
        )
        answer = _answer(choice)
        if ids is None:
            if not (answer and answer[0][1] is None):
                raise ValueError("prompt_token_ids is missing: ask for it with return_token_ids")
            scored = answer  # the request said `echo`: its first token has no log-probability
        else:
            ids = [index(token) for token in ids]
            echoed = [token for token, _, _ in answer[: len(ids)]] == ids and bool(answer) and answer[0][1] is None
            if prompt is not None or not echoed:
                prompt = [None] * len(ids) if prompt is None else list(prompt)
                scored = [*_by_id(ids, prompt, "prompt"), *(answer[len(ids) :] if echoed else answer)]
            else:
                scored = answer
        alone = where if len(choices) == 1 else f"choice {number} of {where}"
        if answer or not any(sequence.token_ids == ids for sequence in sequences):
            sequences.append(_sequence(alone, scored))
    return sequences


def _answer(choice: dict[str, Any]) -> list[Scored]:
    """The scored tokens of a choice: the generated ones, after the prompt where the request said `echo`."""
    given, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if not logprobs:
        return []
    if isinstance(logprobs, list):
        if given is None:
            raise ValueError("the answer has no token_ids")
        return _by_id([index(token) for token in given], logprobs, "answer")
    if chat := "content" in logprobs:
        parts = [
            (part["token"], part["logprob"], [(top["token"], top["logprob"]) for top in part.get("top_logprobs") or ()])
            for part in logprobs["content"] or ()
        ]
    else:
        names, own = logprobs["tokens"], logprobs["token_logprobs"]
        tops = logprobs.get("top_logprobs") or [None] * len(names)
        parts = [(name, log_p, list((top or {}).items())) for name, log_p, top in zip(names, own, tops, strict=True)]
    scored = _by_name(parts, chat)
    if given is not None and [token for token, _, _ in scored][-len(given) :] != list(given):
        raise ValueError("the token_ids of the answer are not those of its logprobs")
    return scored


def _by_name(parts: Iterable[tuple[str, float | None, list[tuple[str, float]]]], chat: bool) -> list[Scored]:
    """Tokens with candidates by name, without their own where it may stand beside the best ones.

    A completion lists k, and one more for a token that is not among them; so k is known from the tokens that are not
    the least likely of their candidates. A chat lists k in both cases.
    """
    read = [
        (_token_of(name), log_p, [(float(p), _token_of(other)) for other, p in tops]) for name, log_p, tops in parts
    ]
    inside = [len(tops) for token, _, tops in read if tops and min(tops)[1] != token]
    k = 0 if chat else min(inside, default=0)
    scored: list[Scored] = []
    for token, log_p, tops in read:
        if len(tops) > k and min(tops)[1] == token:
            tops.remove(min(tops))
        scored.append((token, None, None) if log_p is None else (token, float(log_p), tops))
    return scored


def _token_of(name: str) -> int:
    if not name.startswith(_NAME):
        raise ValueError(
            f"the answer names a token by its text ({name!r}), from which no id follows: ask vLLM with "
            "return_tokens_as_token_ids (SGLang: ask /generate)"
        )
    return int(name.removeprefix(_NAME))


def _by_id(ids: Sequence[int], entries: Sequence[dict[str, Any] | None], what: str) -> list[Scored]:
    """Tokens with vLLM's entries {id: {logprob, rank}}: k, and one more for a token that is not among them."""
    if len(ids) != len(entries):
        raise ValueError(f"{len(entries)} log-probabilities for {len(ids)} tokens of the {what}")
    ranks = [[value["rank"] for value in entry.values() if value.get("rank") is not None] for entry in entries if entry]
    k = min((len(some) - (max(some) > len(some)) for some in ranks if some), default=0)
    scored: list[Scored] = []
    for token, entry in zip(ids, entries, strict=True):
        if not entry:
            scored.append((token, None, None))
            continue
        values = [(float(value["logprob"]), int(other), value.get("rank")) for other, value in entry.items()]
        own = next((log_p for log_p, other, _ in values if other == token), None)
        scored.append((token, own, [(log_p, other) for log_p, other, rank in values if rank is None or rank <= k]))
    return scored


def read_sglang(record: dict[str, Any], where: str) -> list[TokenSequence]:
    """The sequence of an answer of SGLang's /generate, prompt and generated tokens.

    Raises ValueError for a prompt that is not whole, and for an answer that is part of a stream.
    """
    meta = record["meta_info"]
    reason = meta.get("finish_reason", "")
    if reason is None:
        raise ValueError("part of a stream: save whole answers")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise ValueError(f"the request was aborted ({reason.get('message')}): ask again, or delete the line")
    scored: list[Scored] = []
    for side in ("input", "output"):
        tokens = meta.get(f"{side}_token_logprobs") or []
        tops = meta.get(f"{side}_top_logprobs") or [None] * len(tokens)
        if len(tops) != len(tokens):
            raise ValueError(f"{side}_top_logprobs has {len(tops)} entries and {side}_token_logprobs {len(tokens)}")
        if side == "input" and len(tokens) != meta.get("prompt_tokens", len(tokens) or None):
            raise ValueError(
                f"log-probabilities of {len(tokens)} of {meta.get('prompt_tokens', 'the')} prompt tokens: ask for "
                "return_logprob with logprob_start_len = 0"
            )
        for (log_p, token, *_), top in zip(tokens, tops, strict=True):
            candidates = [(float(p), index(other)) for p, other, *_ in top] if top else None
            scored.append((index(token), None if log_p is None else float(log_p), candidates))
    return [_sequence(where, scored)]


def _sequence(where: str, scored: Iterable[Scored]) -> TokenSequence:
    """Engines give the candidates for token t, and its own log-probability, at t; a target of position t is about token
    t + 1.

    Raises ValueError for a token that was scored and has no candidates, and where no token has.
    """
    token_ids, own, expected = (list(column) for column in zip(*scored, strict=True)) if scored else ([], [], [])
    bare = [t for t in range(1, len(token_ids)) if not expected[t] and (expected[t] is not None or own[t] is not None)]
    if bare:
        raise ValueError(
            f"token {bare[0]} has no candidates beside itself: ask for some (vLLM: prompt_logprobs = K, logprobs = K; "
            "SGLang: top_logprobs_num = K)"
        )
    if not any(expected[1:]):
        raise ValueError(
            "no token has candidates: ask for them (vLLM: prompt_logprobs = K; SGLang: return_logprob and top_logprobs_num "
            "= K)"
        )
    candidates, labels = [*expected[1:], None], [*own[1:], None]
    known = all(value is not None for value, others in zip(labels, candidates, strict=True) if others is not None)
    of_labels = [0.0 if value is None else value for value in labels] if known else None
    return TokenSequence(where, token_ids, None, None, candidates, None, label_log_probs=of_labels)
