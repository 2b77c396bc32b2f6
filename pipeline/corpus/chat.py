"""Conversations through the tokenizer's chat template, with a mask of the assistant's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..base.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str = "a conversation"
) -> tuple[list[int], list[int]]:
    """Messages -> token ids [n], and a mask [n] that is 1 on the assistant's words.

    A template with {% generation %} gives the mask itself. For any other template, a reply is the text that the
    template adds to the earlier conversation plus the generation prompt, without trailing white space. `where` names
    the conversation in errors.

    Raises RecipeError where the template refuses the conversation, or rewrites earlier turns, so that replies cannot be
    located.
    """
    template = tokenizer.get_chat_template()
    if "generation %}" in template or "generation -%}" in template:
        marked = apply_template(
            tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(marked["input_ids"]), list(marked["assistant_masks"])

    def rendered(turns: int, prompt: bool = False) -> str:
        return str(apply_template(tokenizer, messages[:turns], where, tokenize=False, add_generation_prompt=prompt))

    text = rendered(len(messages))
    spans = []
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
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [int(any(begin < stop and end > start for start, stop in spans)) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask
