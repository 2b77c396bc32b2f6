"""The teacher's continuation of the report's prompt: saved by stage one, so that the report needs no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.durable import read_json, write_json
from ..corpus.tokenizer import text_prefix
from ..models.teacher import Teacher
from ..targets.sparse_targets import SparseTargets

TEMPERATURES = (None, 2.0, 3.0, 6.0)
"""Temperatures of the drawn texts. None is T = 1, the teacher's own distribution."""
_KEPT, _LENGTH = 64, 24
_TENSORS = ("token_ids", "log_probs", "tail_curve")


@dataclass(frozen=True)
class Continuation:
    """A prompt, the teacher's target for the next token, and one drawn text per temperature."""

    prompt: str
    target: SparseTargets
    """One position, no leading axes."""
    tokens: list[str]
    """The kept tokens as text."""
    drawn: list[str]
    """One text per entry of `TEMPERATURES`; empty for a masked teacher."""


def save_prompt_sample(teacher: Teacher, tokenizer: Any, prompt: str, file: Path, seed: int) -> None:
    """Write the teacher's continuation of `prompt` to `file`, unless the file holds it already.

    A masked teacher predicts one hidden token after the prompt.
    """
    about = _about(prompt, teacher.identity["weights"], seed)
    if has_prompt_sample(file, prompt, teacher.identity["weights"], seed):
        return
    masked = tokenizer.mask_token_id is not None and teacher.objective == "masked"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if masked:
        ids = [tokenizer.cls_token_id, *ids, tokenizer.mask_token_id, tokenizer.sep_token_id]
    else:
        ids = [*text_prefix(tokenizer), *ids]
    logits_V = _logits(teacher, ids)[-2 if masked else -1]
    target = SparseTargets.from_logits(logits_V, k=min(_KEPT, teacher.vocab_size))
    drawn = [] if masked else [_draw(teacher, tokenizer, ids, T or 1.0, seed) for T in TEMPERATURES]
    value = {
        "about": about,
        **{name: getattr(target, name).tolist() for name in _TENSORS},
        "knots": list(target.knots),
        "vocab_size": target.vocab_size,
        "tokens": [tokenizer.decode([token]) for token in target.token_ids.tolist()],
        "drawn": drawn,
    }
    write_json(file, value)


def has_prompt_sample(file: Path, prompt: str, weights: str, seed: int) -> bool:
    """Whether `file` holds the continuation of `prompt` by a teacher of these weights. Raises CorruptError for a damaged
    file."""
    return bool((read_json(file, f"delete {file}") or {}).get("about") == _about(prompt, weights, seed))


def _about(prompt: str, weights: str, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "weights": weights, "seed": seed}


def read_prompt_sample(file: Path) -> Continuation | None:
    """The saved continuation, None where the recipe has no prompt. Raises CorruptError for a damaged file."""
    value = read_json(file, f"delete {file} and run `logit-cache cache`")
    if value is None:
        return None
    tensors: dict[str, Any] = {name: torch.tensor(value[name]) for name in _TENSORS}
    target = SparseTargets(
        **tensors,
        mask=torch.tensor(True),
        knots=tuple(value["knots"]),
        vocab_size=value["vocab_size"],
    )
    return Continuation(value["about"]["prompt"], target, value["tokens"], value["drawn"])


def _logits(teacher: Teacher, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    return teacher.output_layer.logits(teacher.hidden(row, torch.zeros_like(row))[0]).float().cpu()


def _draw(teacher: Teacher, tokenizer: Any, ids: list[int], temperature: float, seed: int) -> str:
    """A text of at most `_LENGTH` tokens, each drawn from the whole distribution at this temperature."""
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    while len(new) < _LENGTH and (not new or new[-1] != tokenizer.eos_token_id):
        p_V = (_logits(teacher, [*ids, *new])[-1] / temperature).softmax(-1)
        new.append(int(torch.multinomial(p_V, 1, generator=generator)))
    return str(tokenizer.decode(new, skip_special_tokens=True))
