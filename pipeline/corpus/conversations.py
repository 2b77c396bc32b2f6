"""Conversations as people store them -> messages and tools as chat templates take them.

Read are lists of {role, content} and of ShareGPT's {from, value}, also as JSON text; content as text or as a list of
parts; reasoning beside or among them; and calls of tools, with their arguments as an object or as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..base.errors import RecipeError
from ..recipe.schema import CorpusConfig

Messages = list[dict[str, Any]]

ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "ai", "chatbot", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
"""Other names of the roles that chat templates know."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which data sets keep the reasoning before an answer; templates read the first or the second."""


def read_conversation(record: Mapping[str, Any], where: str, config: CorpusConfig) -> tuple[Messages, Messages | None]:
    """The messages of a record, and its tools where it has any. Raises RecipeError, naming `where`, for others."""
    column = str(config.messages_column)
    messages = _parsed(record[column])
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RecipeError(
            f"corpus: {where} has no conversation in column {column!r}: it must be a list of {{role, content}}, or of "
            "{from, value}"
        )
    roles = {**ROLES, **config.roles}
    tools = _parsed(record.get(config.tools_column))
    if not tools:
        tools = None
    elif isinstance(tools, list):
        tools = [_parsed(tool) for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecipeError(
            f"corpus: {where} has no list of tools in column {config.tools_column!r}: name their column, or '' for none, by "
            "corpus.tools_column"
        )
    return [_message(m, f"message {n} of {where}", roles) for n, m in enumerate(messages, 1)], tools


def with_json_arguments(messages: Messages) -> Messages:
    """The messages with the arguments of calls as JSON text."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": list(map(as_text, m["tool_calls"]))} if "tool_calls" in m else m for m in messages]


def _message(stored: dict[str, Any], where: str, roles: Mapping[str, str]) -> dict[str, Any]:
    """One message with role and content, without keys that are null."""
    message = {key: value for key, value in stored.items() if value is not None}
    role = message.pop("from", None) if "role" not in message else message["role"]
    if not isinstance(role, str) or not role:
        raise RecipeError(f"corpus: {where} has no role (its keys are {', '.join(stored) or 'none'})")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    message["role"] = roles.get(role, role)
    if role == "function_call" and isinstance(call := _parsed(message.get("content")), dict) and "name" in call:
        message["tool_calls"] = [call]
        del message["content"]
    if "content" in message:
        message |= _parts(message["content"], where)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = [_call(call, where) for call in _parsed(message["tool_calls"])]
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if "content" not in message and "tool_calls" not in message and reasoning is None:
        raise RecipeError(f"corpus: {where} has no content (its keys are {', '.join(stored)})")
    return message


def _parts(content: Any, where: str) -> dict[str, str]:
    """Content as text, and the reasoning among its parts. Raises RecipeError for parts that are no text."""
    if isinstance(content, str):
        return {"content": content}
    texts: dict[str, list[str]] = {"content": []}
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else part.get(kind) if isinstance(part, dict) else None
        key = {"text": "content", "thinking": "reasoning_content", "reasoning": "reasoning_content"}.get(str(kind))
        if key is None or not isinstance(text, str):
            what = f"a part of type {kind!r}" if key is None else f"content of type {type(part).__name__}"
            raise RecipeError(f"corpus: {where} has {what}, not text: leave the record out")
        texts.setdefault(key, []).append(text)
    return {key: "".join(parts) for key, parts in texts.items()}


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool as templates take it: {type, function: {name, arguments}}, the arguments as an object."""
    call = _parsed(call)
    function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecipeError(
            f"corpus: {where} has a call of a tool without a name: it must be {{function: {{name, arguments}}}}"
        )
    arguments = _parsed(function.get("arguments", {}))
    others = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return {"type": "function", **others, "function": {**function, "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """The object or list of JSON text, or the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value
