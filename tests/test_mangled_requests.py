"""Requests mangled at random: whatever a caller sends, nothing but an ApiError may come of it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import aiclient_api as gw

Json = dict[str, Any]

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 1.5, 10**30, "", "x", "text", "user", "\ud800", [], {}, [None],
    [[]], [{}], {"type": "text"}, {"type": "tool_use"}, {"type": "image"},
    [{"type": "tool_result"}], {"type": "enabled", "budget_tokens": 5000},
)  # fmt: skip
PICTURE = "data:image/png;base64,iVBORw0KGgoAAA"
CHAT_BODY: Json = {
    "model": "m", "max_tokens": 100, "stream": True, "stream_options": {"include_usage": True},
    "temperature": 0.5, "top_p": 1, "stop": ["a"], "reasoning_effort": "high", "n": 1, "user": "u",
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "parameters": {
            "type": "object",
            "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
            "$defs": {"x": {"type": ["string", "null"]}}}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [
            {"type": "text", "text": "t"},
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBE"}}]},
        {"role": "assistant", "content": None, "reasoning_text": "r", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        {"role": "user", "content": "go"}],
}  # fmt: skip
MARK: Json = {"type": "ephemeral", "ttl": "1h"}
MESSAGES_BODY: Json = {
    "model": "m", "max_tokens": 100, "stream": True, "stop_sequences": ["x"],
    "system": [{"type": "text", "text": "x-anthropic-billing-header: a"},
               {"type": "text", "text": "S", "cache_control": MARK}],
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
    "metadata": {"user_id": '{"session_id":"s"}'}, "context_management": {"edits": []},
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True},
              {"type": "web_search_20250305", "name": "web_search"},
              {"type": "bash_20250124", "name": "bash"}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "t", "cache_control": MARK},
            {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "AA=="}},
            {"type": "document", "title": "T", "source": {"type": "text", "data": "d"}}]},
        {"role": "system", "content": "L"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "x", "signature": "s"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "is_error": True,
             "content": [{"type": "text", "text": "r"},
                         {"type": "tool_reference", "tool_name": "z"}]},
            {"type": "text", "text": "go"}]}],
}  # fmt: skip
BODIES: dict[str, Json] = {"chat": CHAT_BODY, "messages": MESSAGES_BODY}
MODELS = (
    gw.Model("gpt-4.1", "p", vendor="OpenAI", max_output=1000),
    gw.Model("gpt-5.2", "p", vendor="OpenAI", stops=0, efforts=("low", "high")),
    gw.Model("gemini-3", "p", vendor="Google", budget=(128, 32000)),
    gw.Model("claude-sonnet-4.5", "p", vendor="Anthropic", budget=(1024, 32000)),
    gw.Model("claude-opus-4.8", "p", vendor="Anthropic", adaptive=True, efforts=("low", "high")),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of `value`."""
    rows: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    rows = enumerate(value) if isinstance(value, list) else rows
    for key, item in rows:
        yield (*path, key)
        yield from places(item, (*path, key))


def mangle(body: Json, chance: random.Random) -> Json:
    """A copy of `body` with one to three values replaced or taken out."""
    mangled = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2, 3))):
        path = chance.choice(list(places(mangled)))
        holder: Any = mangled
        for key in path[:-1]:
            holder = holder[key]
        if chance.random() < 0.8:
            holder[path[-1]] = copy.deepcopy(chance.choice(ODD_VALUES))
        else:
            del holder[path[-1]]
    return mangled


def make_call(name: str, body: Json, model: gw.Model, spoken: str) -> bytes:
    """The bytes that go upstream, made the way the gateway and the provider make them."""
    asked, upstream = gw.DIALECTS[name], gw.DIALECTS[spoken]
    terms = gw.Terms("id", 1, "m", asked=body)
    outline = asked.outline(body)
    call = gw.Gateway.write_call(body, asked, upstream, model, terms, outline)
    scrub = gw.scrub_body(spoken, call.body, model, {}, True)
    upstream.has_image(scrub.body)
    gw.messages_betas(scrub.body, "", set(), model)
    gw.estimate_request(body)
    return gw.dump_json(scrub.body)


@pytest.mark.parametrize("spoken", sorted(BODIES))
@pytest.mark.parametrize("name", sorted(BODIES))
def test_no_mangled_request_is_more_than_an_error(name: str, spoken: str) -> None:
    chance = random.Random(f"{name} {spoken}")
    refused = 0
    for _ in range(2500):
        body = mangle(BODIES[name], chance)
        try:
            make_call(name, body, chance.choice(MODELS), spoken)
        except gw.ApiError as error:
            refused += 1
            assert 400 <= error.status < 500
    assert 0 < refused < 2500
