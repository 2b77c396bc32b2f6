"""Conversations as people store them, through templates as models have them: what is rendered, and what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from logit_cache.base.errors import MismatchError, RecipeError
from logit_cache.corpus.chat import encode_chat
from logit_cache.corpus.documents import Document, read_documents
from logit_cache.recipe.schema import CorpusConfig

from tests.corpus.test_chosen_positions import PLAIN, learned, prepare
from tests.corpus.test_prepare import train_tokenizer

# Reasoning as Qwen3 has it: earlier turns lose theirs, the last reply has an empty one, and a switch fills the prompt.
REASONING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<system># Tools{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}<|end|>
{% endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<assistant>' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}{% set call = call.function or call %}
{{- '<call>{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}</call>' }}{% endfor %}
{{- '<|end|>\n' }}
{%- else %}{{ '<' + m.role + '>' + content + '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# Ends of turns as gpt-oss has them: another one for the last reply, reasoning in a message of its own.
CHANNELS = (
    "{% for m in messages %}{{ '<start>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<analysis>' + m.thinking + '<end><start>assistant' }}{% endif %}"
    "{{ '<final>' + m.content + ('<return>' if loop.last else '<end>') }}"
    "{% else %}{{ '<message>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"
)

TURNS = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over the lazy dog"},
    {"role": "user", "content": "taught once"},
    {"role": "assistant", "content": "a cache"},
]
CALL = {"name": "weather", "arguments": {"place": "the lazy dog", "days": 2}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def tokenizer_with(template: str, *tokens: str) -> Any:
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def read(tmp_path: Path, tokenizer: Any, *conversations: Any, form: str = "jsonl", **settings: Any) -> list[Document]:
    """Records, or the messages of one, stored as data sets are."""
    records = [c if isinstance(c, dict) else {"messages": c} for c in conversations]
    file = tmp_path / f"chat.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(records).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = CorpusConfig(source=str(file), **{"messages_column": "messages", **settings})
    return list(read_documents(config, tokenizer))


def refusal(tmp_path: Path, tokenizer: Any, *conversations: Any, **settings: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        for document in read(tmp_path, tokenizer, *conversations, **settings):
            assert document.messages is not None
            encode_chat(tokenizer, document.messages, document.where)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "line 1 of" in message or "has no chat template" in message
    return message


# --- what is learned --------------------------------------------------------------------------------------------------------


def replies(tokenizer: Any, messages: list[dict[str, Any]], **template: Any) -> list[str]:
    ids, mask = encode_chat(tokenizer, messages, **template)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template)
    assert mask is not None and tokenizer.decode(ids) == text
    return learned(tokenizer, ids, mask)


def test_replies_in_a_template_that_drops_old_reasoning() -> None:
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>\nwhat?\n</think>\n\njumps over the lazy dog"
    turns[3]["reasoning_content"] = "hm"
    tokenizer = tokenizer_with(REASONING)
    assert replies(tokenizer, turns) == ["jumps over the lazy dog<|end|>", "<think>\nhm\n</think>\n\na cache<|end|>"]
    assert replies(tokenizer, turns[:2]) == ["<think>\nwhat?\n</think>\n\njumps over the lazy dog<|end|>"]
    # The switch puts an empty thought into the prompt: it is not learned, where the reply has it.
    assert replies(tokenizer, TURNS, enable_thinking=False) == ["jumps over the lazy dog<|end|>", "a cache<|end|>"]


def test_replies_whose_last_one_ends_in_another_token() -> None:
    tokenizer = tokenizer_with(CHANNELS, "<start>", "<end>", "<return>", "<final>", "<message>", "<analysis>")
    turns = [*TURNS[:3], {**TURNS[3], "thinking": "hm"}]
    assert replies(tokenizer, turns) == [
        "<final>jumps over the lazy dog<end>",
        "<analysis>hm<end><start>assistant<final>a cache<return>",
    ]


def test_equal_replies_are_told_apart() -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "yes"}, TURNS[2], {"role": "assistant", "content": "yes"}]
    tokenizer = tokenizer_with(REASONING)
    assert replies(tokenizer, turns) == ["yes<|end|>", "<think>\n\n</think>\n\nyes<|end|>"]


def test_calls_of_tools_are_learned_and_their_results_are_not() -> None:
    turns = [
        TURNS[0],
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "brown"},
        {"role": "assistant", "content": "a cache"},
    ]
    first, last = replies(tokenizer_with(REASONING), turns, tools=TOOLS)
    assert first == '<call>{"name": "weather", "arguments": {"place": "the lazy dog", "days": 2}}</call><|end|>'
    assert last == "<think>\n\n</think>\n\na cache<|end|>"


# --- what people store ------------------------------------------------------------------------------------------------------


PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
SHAREGPT = [{"from": "human" if n % 2 == 0 else "gpt", "value": turn["content"]} for n, turn in enumerate(TURNS)]
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "content as parts": (PARTS, {}),
    "content in several parts": (
        [{**turn, "content": [{"type": "text", "text": c} for c in turn["content"]]} for turn in TURNS],
        {},
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, {"messages_column": "conversations"}),
    "ShareGPT keys, other names": (
        {"conversations": [{**turn, "from": {"human": "user", "gpt": "model"}[turn["from"]]} for turn in SHAREGPT]},
        {"messages_column": "conversations"},
    ),
    "role model": ([{**turn, "role": turn["role"].replace("assistant", "model")} for turn in TURNS], {}),
    "JSON text": (json.dumps(TURNS), {}),
    "roles of the recipe": (
        [{**turn, "role": {"user": "patient", "assistant": "doctor"}[turn["role"]]} for turn in TURNS],
        {"roles": {"patient": "user", "doctor": "assistant"}},
    ),
    "nulls": ([{**turn, "name": None, "tool_calls": None, "reasoning_content": None} for turn in TURNS], {}),
    "empty calls": ([{**turn, "tool_calls": []} for turn in TURNS], {}),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_conversation_is_the_same(tmp_path: Path, name: str, form: str) -> None:
    stored, settings = FORMS[name]
    record = stored if isinstance(stored, dict) else {"messages": stored}
    tokenizer = tokenizer_with(PLAIN)
    (document,) = read(tmp_path, tokenizer, record, form=form, **settings)
    assert document.text == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert document.messages is not None
    assert replies(tokenizer, document.messages) == ["jumps over the lazy dog<|end|>", "a cache<|end|>"]


CALLS: dict[str, Any] = {
    "OpenAI": {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    "JSON arguments": {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
    },
    "bare": {"role": "assistant", "tool_calls": [CALL]},
    "JSON text": {"role": "assistant", "tool_calls": json.dumps([CALL])},
    "ShareGPT": {"from": "function_call", "value": json.dumps(CALL)},
}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]], ids=["list", "text", "texts"])
@pytest.mark.parametrize("name", CALLS)
def test_every_form_of_a_call_is_the_same(tmp_path: Path, name: str, tools: Any) -> None:
    tokenizer = tokenizer_with(REASONING)
    turns = [TURNS[0], CALLS[name], {"role": "tool", "content": "brown"}, TURNS[3]]
    (document,) = read(tmp_path, tokenizer, {"messages": turns, "tools": tools})
    expected = [TURNS[0], {"role": "assistant", "tool_calls": [{"function": CALL}]}, turns[2], TURNS[3]]
    assert document.text == tokenizer.apply_chat_template(expected, tools=TOOLS, tokenize=False)
    assert '{"place": "the lazy dog", "days": 2}' in document.text and '"name": "weather"' in document.text
    (other,) = read(tmp_path, tokenizer, {"messages": turns, "functions": tools}, tools_column="functions")
    assert other.text == document.text


def test_arguments_that_parquet_adds_are_not_rendered(tmp_path: Path) -> None:
    others = {"name": "clock", "arguments": {"zone": "UTC"}}
    schema = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "default": "UTC"}}}]
    records = [
        {
            "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}],
            "tools": tools,
        }
        for call, tools in ((CALL, TOOLS), (others, schema))
    ]
    tokenizer = tokenizer_with(REASONING)
    one, other = (read(tmp_path, tokenizer, *records, form=form) for form in ("jsonl", "parquet"))
    assert [document.text for document in other] == [document.text for document in one]
    assert "null" not in other[0].text and "None" not in other[0].text


def test_a_template_that_joins_arguments_to_text(tmp_path: Path) -> None:
    template = PLAIN.replace("m['content']", "(m.content or m.tool_calls[0]['function']['arguments'])")
    turns = [TURNS[0], CALLS["OpenAI"]]
    (document,) = read(tmp_path, tokenizer_with(template), turns)
    assert json.dumps(CALL["arguments"]) in document.text


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "part"])
def test_reasoning_is_kept_for_templates_that_read_it(tmp_path: Path, key: str) -> None:
    reply: dict[str, Any] = {"role": "assistant", "content": "a cache", key: "hm"}
    if key == "part":
        parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a cache"}]
        reply = {"role": "assistant", "content": parts}
    tokenizer = tokenizer_with(REASONING)
    (document,) = read(tmp_path, tokenizer, [TURNS[0], reply])
    assert document.text.endswith("<assistant><think>\nhm\n</think>\n\na cache<|end|>\n")


def test_what_a_template_does_not_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [TURNS[0], {**TURNS[1], "thinking": "hm"}]
    read(tmp_path, tokenizer_with(PLAIN), *[{"messages": turns, "tools": TOOLS}] * 3)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "line 1 of" in caplog.text and "has tools" in caplog.text and "has reasoning" in caplog.text


def test_template_arguments_of_the_recipe(tmp_path: Path) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text((json.dumps({"messages": TURNS}) + "\n") * 6)
    tokenizer = tokenizer_with("{{ '[thinking]' if thinks else '[plain]' }}" + PLAIN)
    made = {}
    for thinks in (True, False):
        rows = prepare(tmp_path, tokenizer, source, messages_column="messages", template_arguments={"thinks": thinks})
        made[thinks] = tokenizer.decode(rows.take(np.arange(3))[0].reshape(-1).tolist())
    assert "[thinking]" in made[True] and "[plain]" in made[False] and "[thinking]" not in made[False]
    with pytest.raises(ValueError, match="'tokenize' is set by `prepare`"):
        CorpusConfig(source="x", template_arguments={"tokenize": True})


def test_another_chat_template_makes_other_rows(tmp_path: Path) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text((json.dumps({"messages": TURNS}) + "\n") * 6)
    before = prepare(tmp_path, tokenizer_with(PLAIN), source, messages_column="messages")
    edited = tokenizer_with(PLAIN.replace("'<'", "'['"))
    after = prepare(tmp_path, edited, source, messages_column="messages")
    assert before.meta["digest"] != after.meta["digest"]
    (after.path.parent / "manifest.json").write_text("{}")
    with pytest.raises(MismatchError, match="chat_template differ"):
        prepare(tmp_path, tokenizer_with(PLAIN), source, messages_column="messages")


# --- what is refused --------------------------------------------------------------------------------------------------------

LONE = [TURNS[0]]
REFUSED: dict[str, tuple[str | None, Any, str]] = {
    "no list": (PLAIN, {"messages": "hello"}, "no conversation in column 'messages'"),
    "empty": (PLAIN, {"messages": []}, "no conversation"),
    "texts": (PLAIN, {"messages": ["hello"]}, "no conversation"),
    "no role": (PLAIN, [{"content": "hello"}], "message 1 of line 1"),
    "null role": (PLAIN, [TURNS[0], {"role": None, "content": "hello"}], "message 2 of line 1"),
    "no content": (PLAIN, [{"role": "user"}], "has no content (its keys are role)"),
    "an image": (PLAIN, [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part of type 'image'"),
    "a number": (PLAIN, [{"role": "user", "content": 3}], "content of type int"),
    "a call without a name": (REASONING, [{"role": "assistant", "tool_calls": [{"x": 1}]}], "without a name"),
    "calls that are left out": (PLAIN, [TURNS[0], CALLS["bare"]], "leaves out"),
    "no tools": (REASONING, {"messages": LONE, "tools": "a hammer"}, "no list of tools in column 'tools'"),
    "no template": (None, LONE, "has no chat template"),
    "raise_exception": ("{{ raise_exception('roles\n must alternate') }}", LONE, "roles must alternate"),
    "undefined": ("{{ nothing.at_all }}", LONE, "'nothing' is undefined"),
    "syntax": ("{% for %}", LONE, "refuses the conversation"),
    "missing key": ("{{ {}['a'] + messages[0]['b'] }}", LONE, "refuses the conversation"),
    "division": ("{{ 1 // 0 }}", LONE, "refuses the conversation"),
    "index": ("{{ 'abc'.index('z') }}", LONE, "refuses the conversation"),
    "type": ("{{ messages[0].content + 1 }}", LONE, "refuses the conversation"),
    "a reply that is left out": ("{{ messages[0].content }}", TURNS, "leaves out the reply in message 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rendered_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    template, stored, said = REFUSED[name]
    record = stored if isinstance(stored, dict) else {"messages": stored}
    tokenizer = train_tokenizer() if template is None else tokenizer_with(template)
    assert said in refusal(tmp_path, tokenizer, record)


def test_a_role_that_is_not_known_is_named(tmp_path: Path) -> None:
    source = tmp_path / "chat.jsonl"
    turns = [{**turn, "role": turn["role"].replace("assistant", "doctor")} for turn in TURNS]
    source.write_text((json.dumps({"messages": turns}) + "\n") * 6)
    with pytest.raises(RecipeError, match="the roles are 'doctor', 'user': name it by corpus"):
        prepare(tmp_path, tokenizer_with(PLAIN), source, messages_column="messages")
    rows = prepare(tmp_path, tokenizer_with(PLAIN), source, messages_column="messages", roles={"doctor": "assistant"})
    assert rows.rows > 0
