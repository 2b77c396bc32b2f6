"""Conversations through the tokenizer's chat template, with a mask of the assistant's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from ..base.errors import RecipeError
from .special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **options: Any
) -> Any:
    """The tokenizer's `apply_chat_template`. Raises RecipeError, naming `where`, for a conversation that it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:
        raise RecipeError(
            f"corpus: {where}: the tokenizer's chat template refuses the conversation ({error}): change it, or the template"
        ) from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str = "a conversation",
    special_tokens: SpecialTokens | None = None,
    loss_on: str = "assistant",
) -> tuple[list[int], list[int] | None]:
    """Messages -> token ids [n], and a mask [n] that is 1 on the assistant's words, None with `loss_on` "all".

    A template with {% generation %} marks them itself. For any other template, a reply is the text that the template
    adds to the earlier conversation plus the generation prompt, without trailing white space. `where` names the
    conversation in errors; `special_tokens` says what their names in messages are, by default text.

    Raises RecipeError where the template refuses the conversation, or rewrites earlier turns, so that replies cannot be
    located.
    """
    special_tokens = special_tokens or SpecialTokens(tokenizer, as_text=True)
    messages = special_tokens.shield(messages)
    text = str(apply_template(tokenizer, messages, where, tokenize=False))
    ids, offsets = special_tokens.encode_shielded(text)
    if loss_on == "all":
        return ids, None
    if not tokenizer.is_fast:
        raise RecipeError(
            "corpus.messages_column: the teacher's tokenizer does not tell where its tokens stand in a text, so that replies "
            "cannot be located: set corpus.loss_on = 'all'"
        )
    template = tokenizer.get_chat_template()
    marks = "generation %}" in template or "generation -%}" in template
    learned = np.zeros(len(text) + 2, np.int64)
    for begin, stop in (_marked_spans if marks else _reply_spans)(tokenizer, messages, text, where):
        learned[begin + 1 : stop + 1] = 1
    before = learned.cumsum()  # learned characters before each place
    # A token may have no character of its own: it belongs to the next one.
    return ids, [int(before[max(stop, begin + 1)] > before[begin]) for begin, stop in offsets]


def _marked_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], text: str, where: str) -> Spans:
    """The places in the rendered text that the template marks with {% generation %}, token by token."""
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    kwargs = {"return_offsets_mapping": True, "verbose": False}
    marked = apply_template(tokenizer, messages, where, tokenize=True, tokenizer_kwargs=kwargs, **options)
    return [place for place, on in zip(marked["offset_mapping"], marked["assistant_masks"], strict=True) if on]


def _reply_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], text: str, where: str) -> Spans:
    """The places of the replies in the rendered text. Raises RecipeError as `encode_chat`."""

    def rendered(turns: int, prompt: bool = False) -> str:
        return str(apply_template(tokenizer, messages[:turns], where, tokenize=False, add_generation_prompt=prompt))

    spans: Spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = rendered(turn + 1)
        before: str | None
        if turn > 0:
            before = rendered(turn, prompt=True)
        else:
            # No template accepts an empty conversation; the generation prompt is the same before and after this turn.
            prompt = rendered(1, prompt=True).removeprefix(after)
            before = after[: after.index(prompt) + len(prompt)] if prompt in after else None
        after = after.rstrip()
        if before is None or not text.startswith(before) or not text.startswith(after):
            raise RecipeError(
                f"corpus: {where}: the tokenizer's chat template changes earlier turns when a new one is added: mark the "
                "assistant's words in it with {% generation %}, or set corpus.loss_on = 'all'"
            )
        spans.append((len(before), len(after)))
    return spans
