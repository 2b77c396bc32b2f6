"""Conversations through the tokenizer's chat template, with a mask of the assistant's words.

A template with {% generation %} marks them itself. Of any other template, a reply is the text that the template adds to
the earlier conversation and the generation prompt. Where it writes earlier turns differently once a new one is added, as
those do that leave out old reasoning, a reply is what changes with its message.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import RecipeError
from .conversations import Messages
from .special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "\ufdefanother reply\ufdef"
"""A reply that no conversation has: Unicode keeps its first and last character out of all text."""


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, **options: Any) -> Any:
    """The tokenizer's `apply_chat_template`. Raises RecipeError, naming `where`, for a conversation that it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program that others wrote
        what = " ".join(f"{error}".split()) or type(error).__name__
        raise RecipeError(
            f"corpus: {where}: the tokenizer's chat template refuses the conversation ({what[:300]}): change it, or the template"
        ) from error


def template_text(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The chat template for conversations with or without tools. Raises RecipeError for a tokenizer without one."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise RecipeError("corpus.messages_column: the teacher's tokenizer has no chat template") from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str = "a conversation",
    special_tokens: SpecialTokens | None = None,
    loss_on: str = "assistant",
    **template: Any,
) -> tuple[list[int], list[int] | None]:
    """Messages -> token ids [n], and a mask [n] that is 1 on the assistant's words, None with `loss_on` "all".

    `where` names the conversation in errors; `special_tokens` says what their names in messages are, by default text;
    `template` has tools and other variables of the template.

    Raises RecipeError where the template refuses the conversation, or leaves out a reply.
    """
    special_tokens = special_tokens or SpecialTokens(tokenizer, as_text=True)
    shielded = special_tokens.shield({**template, "messages": messages})
    rendering = _Rendering(tokenizer, shielded.pop("messages"), where, shielded)
    ids, offsets = special_tokens.encode_shielded(rendering.text)
    if loss_on == "all":
        return ids, None
    if not tokenizer.is_fast:
        raise RecipeError(
            "corpus.messages_column: the teacher's tokenizer does not tell where its tokens stand in a text, so that replies "
            "cannot be located: set corpus.loss_on = 'all'"
        )
    marks = _MARKS.search(template_text(tokenizer, shielded.get("tools"))) is not None
    learned = np.zeros(len(rendering.text) + 2, np.int64)
    for begin, stop in rendering.marked_spans() if marks else rendering.reply_spans():
        learned[begin + 1 : stop + 1] = 1
    before = learned.cumsum()  # learned characters before each place
    # A token may have no character of its own: it belongs to the next one.
    return ids, [int(before[max(stop, begin + 1)] > before[begin]) for begin, stop in offsets]


class _Rendering:
    """A conversation as text, and the places of the assistant's words in it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, variables: dict[str, Any]
    ) -> None:
        self._tokenizer, self._messages, self._where, self._variables = tokenizer, messages, where, variables
        self.text = self._rendered(messages)

    def _rendered(self, messages: Messages, prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": prompt, **self._variables}
        return str(apply_template(self._tokenizer, messages, self._where, **options))

    def marked_spans(self) -> list[Span]:
        """What the template marks with {% generation %}, token by token."""
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **self._variables}
        kwargs = {"return_offsets_mapping": True, "verbose": False}
        marked = apply_template(
            self._tokenizer, self._messages, self._where, tokenize=True, tokenizer_kwargs=kwargs, **options
        )
        return [place for place, on in zip(marked["offset_mapping"], marked["assistant_masks"], strict=True) if on]

    def reply_spans(self) -> list[Span]:
        """The replies, each with the token that ends its turn. Raises RecipeError where the text lacks one."""
        spans: list[Span] = []
        for turn, message in enumerate(self._messages):
            if message["role"] == "assistant":
                span = self._added(turn) or self._changed(turn, spans[-1][1] if spans else 0)
                if span is None:
                    raise RecipeError(
                        f"corpus: {self._where}: the tokenizer's chat template leaves out the reply in message {turn + 1}, or "
                        "writes it so that it cannot be located: mark the assistant's words in it with {% generation %}, or "
                        "set corpus.loss_on = 'all'"
                    )
                spans.append(span)
        return spans

    def _prompt(self, turn: int) -> str:
        """What the template writes to ask for the reply of this turn."""
        earlier = self._messages[:turn] or self._messages[:1]  # no template accepts an empty conversation
        without, asked = self._rendered(earlier), self._rendered(earlier, prompt=True)
        return asked[len(without) :] if asked.startswith(without) else ""

    def _added(self, turn: int) -> Span | None:
        """The place of a reply, where the text is the earlier conversation, the reply, and later ones."""
        after = self._rendered(self._messages[: turn + 1]).rstrip()
        if turn > 0:
            before: str | None = self._rendered(self._messages[:turn], prompt=True)
        else:
            prompt = self._prompt(0)
            before = after[: after.index(prompt) + len(prompt)] if prompt and prompt in after else None
        if before is None or not self.text.startswith(before) or not self.text.startswith(after):
            return None
        return (len(before), len(after)) if len(before) < len(after) else None

    def _changed(self, turn: int, earliest: int) -> Span | None:
        """The place of a reply, found as what changes where another one stands in its message."""
        other = {"role": self._messages[turn]["role"], "content": _OTHER}
        changed = self._rendered([*self._messages[:turn], other, *self._messages[turn + 1 :]])
        begin = _shared(self.text, changed)
        same = _shared(self.text[begin:][::-1], changed[begin:][::-1])
        stop = len(self.text) - same
        if _OTHER not in changed[begin : len(changed) - same]:
            return None
        # The reply begins behind the prompt for it, with what the template may write before its content.
        prompt = self._prompt(turn)
        asked = self.text.rfind(prompt, earliest, begin) if prompt else -1
        if asked >= 0:
            begin = asked + len(prompt)
        # It ends with the token that ends the turn.
        alone = self._rendered([*self._messages[:turn], other])
        ending = alone[alone.rindex(_OTHER) + len(_OTHER) :].rstrip() if _OTHER in alone else ""
        if not ending or not self.text.startswith(ending, stop):
            names = (str(token) for token in self._tokenizer.added_tokens_decoder.values())
            ending = max((name for name in names if self.text.startswith(name, stop)), key=len, default="")
        return begin, stop + len(ending)


def _shared(one: str, other: str) -> int:
    """Number of characters with which two texts begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
