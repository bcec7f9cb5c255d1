"""Every request field of the vendors' SDKs, native and converted: honoured, named, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import Reply
from test_copilot import (
    CHAT,
    GEMINI,
    GPT,
    MESSAGES,
    ONLY_MESSAGES,
    OPUS,
    SONNET,
    error,
    pieces,
    streaming,
)
from test_responses import (  # noqa: F401 - `running` and `trio` are fixtures
    CODEX,
    EMBEDDER,
    KIRO_SONNET,
    RESPONSES,
    Trio,
    asking,
    running,
    tool,
    trio,
)

import aiclient_api as gw

Json = dict[str, Any]

#: request fields of the vendors' SDKs, by endpoint
SDK_FIELDS: Json = json.loads(Path(__file__).with_name("sdk_fields.json").read_text())

TABLES = {
    CHAT: (gw.CHAT_FIELDS, SDK_FIELDS["chat"]),
    MESSAGES: (gw.MESSAGES_FIELDS, SDK_FIELDS["messages"]),
    RESPONSES: (gw.RESPONSES_FIELDS, SDK_FIELDS["responses"]),
    "/v1/embeddings": (gw.EMBEDDINGS_FIELDS, SDK_FIELDS["embeddings"]),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
#: plausible values that are nobody's default
VALUES: Json = {
    "access_programs": {"type": "x"},
    "audio": {"voice": "ash", "format": "wav"},
    "background": True,
    "background_options": {"a": "b"},
    "billing_policy": {"type": "x"},
    "cache_control": {"type": "ephemeral"},
    "compaction": {"type": "summarize"},
    "container": "container_1",
    "conversation": "conv_1",
    "diagnostics": {"previous_message_id": "msg_1"},
    "fallback_credit_token": "token",
    "fallbacks": [{"model": "claude-opus-5"}],
    "frequency_penalty": 0.5,
    "function_call": {"name": "look"},
    "functions": [{"name": "look", "parameters": SCHEMA}],
    "image": {"detail": "high"},
    "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
    "inference_geo": "us",
    "input": "hi",
    "instructions": "Mind.",
    "logit_bias": {"5": 1},
    "logprobs": True,
    "max_completion_tokens": 2000,
    "max_output_tokens": 2000,
    "max_tokens": 2000,
    "max_tool_calls": 3,
    "mcp_servers": [{"type": "url", "url": "https://mcp.example.com", "name": "m"}],
    "modalities": ["text", "audio"],
    "moderation": {"type": "x"},
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "hi"},
    "presence_penalty": 0.5,
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"ttl": "1h"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "high"},
    "reasoning_effort": "high",
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "safety_identifier": "person",
    "seed": 0,
    "speed": "fast",
    "stop": ["END"],
    "stop_sequences": ["END"],
    "store": True,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "system": "Mind.",
    "temperature": 0.2,
    "text": {"verbosity": "low"},
    "thread": {"type": "continue", "previous_message_id": "msg_1"},
    "top_logprobs": 2,
    "top_p": 0.9,
    "truncation": "auto",
    "user": "person",
    "user_profile_id": "uprof_1",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}
#: those whose value depends on the endpoint
OWN_VALUES: dict[str, Json] = {
    CHAT: {"metadata": {"a": "b"}, "service_tier": "flex", "tool_choice": "required"},
    RESPONSES: {
        "context_management": [{"type": "compaction", "compact_threshold": 9000}],
        "metadata": {"a": "b"}, "service_tier": "flex", "tool_choice": "required",
    },
    MESSAGES: {
        "context_management": {"edits": []}, "metadata": {"user_id": "u"},
        "output_config": {"effort": "high"}, "service_tier": "standard_only",
        "thinking": {"type": "enabled", "budget_tokens": 2000}, "tool_choice": {"type": "any"},
    },
}  # fmt: skip
TOOLED = {"tool_choice", "parallel_tool_calls", "web_search_options"}
UPSTREAMS = [GPT, GEMINI, SONNET, OPUS, ONLY_MESSAGES, CODEX, KIRO_SONNET]
ROWS = [
    (path, name)
    for path in (CHAT, MESSAGES, RESPONSES)
    for name in TABLES[path][1]
    if name not in ("model", "messages")
]


def names_dropped(reply: Any) -> list[str]:
    """What the response says was left out."""
    value: str = reply.headers.get("x-aiclient-dropped", "")
    return value.split(", ") if value else []


def asked_for(path: str, name: str, model: str) -> Json:
    body = asking(path, "hi", model)
    if name in TOOLED:
        body["tools"] = [tool(path)]
    if name == "function_call":
        body["functions"] = VALUES["functions"]
    if name == "max_completion_tokens":
        del body["max_tokens"]
    values = {**VALUES, **OWN_VALUES[path], "tools": [tool(path)]}
    return {**body, name: values[name]}


@pytest.mark.parametrize("path", TABLES)
def test_every_field_of_the_sdks_has_verdicts(path: str) -> None:
    table, names = TABLES[path]
    assert set(names) <= set(table)
    words = {"keep", "openai", "drop", "silent", "refuse"}
    assert {verdict for pair in table.values() for verdict in pair} <= words


#: what the gateway does itself, whatever the upstream gets
BY_GATEWAY = ("stop", "stop_sequences", "stream", "stream_options")
NATIVE = {
    CHAT: (GPT, GEMINI, SONNET, OPUS),
    MESSAGES: (SONNET, OPUS, ONLY_MESSAGES),
    RESPONSES: (CODEX,),
}


def sent_for(trio: Trio, path: str, body: Json) -> tuple[Reply, str]:  # noqa: F811
    """The response, and what went up without ids and times."""
    trio.clear()
    reply = trio.post(path, body)
    assert not trio.fake.violations and not trio.kiro.violations
    sent = [(seen.body, seen.headers.get("x-interaction-id")) for seen in trio.seen()]
    text = json.dumps(sent, sort_keys=True)
    return reply, re.sub(r'"agentContinuationId": ?"[^"]*"', "", text)


@pytest.mark.parametrize("model", UPSTREAMS)
@pytest.mark.parametrize(("path", "name"), ROWS)
def test_every_field_is_honoured_or_named(trio: Trio, path: str, name: str, model: str) -> None:  # noqa: F811
    """The imitations refuse what the services refuse, and that must not reach the client."""
    body = asked_for(path, name, model)
    others = {"input": "hello", "max_tokens": None if path == CHAT else 3000}
    without = {**body, name: others.get(name)}
    plain, sent_before = sent_for(trio, path, without)
    reply, sent = sent_for(trio, path, body)
    if reply.status != 200:
        assert reply.status == 400 and name in error(reply)["message"]
        assert sent == "[]"
        return
    named = set(names_dropped(reply))
    named -= set(names_dropped(plain)) if name != "max_tokens" else set()
    is_native = model in NATIVE[path] and name not in ("functions", "function_call")
    verdict = TABLES[path][0][name][is_native]
    if verdict == "openai":
        verdict = "keep" if model == GPT else "drop"
    if verdict == "drop":
        assert name in {item.partition(".")[0] for item in named}
    elif verdict == "silent":
        assert not named
    elif name == "metadata" and path == RESPONSES:
        assert reply.json()["metadata"] == body["metadata"]
    elif not named and sent == sent_before:
        assert name in BY_GATEWAY, "lost in silence"


@pytest.mark.parametrize("value", [1, 0, {"a": [None]}, "x"], ids=str)
@pytest.mark.parametrize("model", UPSTREAMS)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_an_unknown_field_is_tried_natively_and_named_where_it_is_lost(
    trio: Trio,  # noqa: F811
    path: str,
    model: str,
    value: Any,
) -> None:
    """A refusal is remembered, also if it names nothing; Anthropic's validator takes no news."""
    name = f"news_{model[-3:]}_{type(value).__name__}_{value == 0}".replace(".", "_")
    relays = model in NATIVE[path] and path != MESSAGES
    for is_first in (True, False):
        trio.clear()
        reply = trio.post(path, {**asking(path, "hi", model), name: value})
        assert reply.status == 200 and name in names_dropped(reply)
        tried = [name in seen.body for seen in trio.seen()]
        assert tried == ([True, False] if relays and is_first else [False])
        trio.fake.violations.clear()


def test_an_unknown_field_that_the_upstream_knows_goes_up(trio: Trio) -> None:  # noqa: F811
    trio.fake.queue(streaming(*pieces(CHAT, GPT), strict=False))
    reply = trio.post(CHAT, {**asking(CHAT, "hi", GPT), "from_2027": {"a": 1}})
    assert reply.status == 200 and not names_dropped(reply)
    assert trio.fake.calls[0].body["from_2027"] == {"a": 1}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("model", UPSTREAMS)
def test_what_asks_for_the_default_is_not_named(trio: Trio, path: str, model: str) -> None:  # noqa: F811
    defaults: Json = {"service_tier": "auto", "temperature": 1, "top_p": 1.0}
    if path == MESSAGES:
        defaults |= {"speed": "standard", "mcp_servers": [], "container": None, "fallbacks": []}
    else:
        defaults |= {"prompt_cache_retention": "in_memory", "top_logprobs": 0, "metadata": {}}
        defaults |= {"service_tier": "default", "parallel_tool_calls": True, "store": False}
    if path == CHAT:
        defaults |= {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1}
        defaults |= {"logprobs": False, "modalities": ["text"], "verbosity": "medium"}
        defaults |= {"seed": None, "functions": [], "function_call": "auto", "stop": []}
    before = names_dropped(trio.post(path, asking(path, "hi", model)))
    reply = trio.post(path, {**asking(path, "hi", model), **defaults})
    assert reply.status == 200 and names_dropped(reply) == before


def test_embeddings_name_what_they_lose(trio: Trio) -> None:  # noqa: F811
    body = {"model": EMBEDDER, "input": "hi", "dimensions": 4, "encoding_format": "float"}
    assert not names_dropped(trio.post("/v1/embeddings", {**body, "truncate": None}))
    reply = trio.post("/v1/embeddings", {**body, "user": "person", "truncate": "END"})
    assert reply.status == 200 and names_dropped(reply) == ["user", "truncate"]


@pytest.mark.parametrize(
    ("refusal", "path", "field"),
    [
        ("Unknown parameter: 'input[0].author'.", "input.*.author", "author"),
        ("Unsupported parameter: 'text.verbosity' is not supported.", "text.verbosity", "text"),
    ],
)
def test_openais_refusals_teach(refusal: str, path: str, field: str) -> None:
    assert gw.read_rejections(refusal, "unknown_parameter", {field: 1}, {}) == [("field", path)]
    assert not gw.read_rejections(refusal, "unknown_parameter", {field: 1}, {"field": [path]})
    assert not gw.read_rejections(f"quoted: {refusal}", "unknown_parameter", {field: 1}, {})
    assert not gw.read_rejections("Unknown parameter: 'messages'.", "unknown_parameter", {}, {})


@pytest.mark.parametrize(
    ("path", "model", "asked", "named"),
    [
        (CHAT, KIRO_SONNET, {"max_tokens": None, "max_completion_tokens": 9},
         "max_completion_tokens"),
        (RESPONSES, KIRO_SONNET, {"max_output_tokens": 9}, "max_output_tokens"),
        (RESPONSES, KIRO_SONNET, {"text": {"verbosity": "low"}}, "text"),
        (CHAT, "claude-haiku-4.6", {"reasoning_effort": "high", "tool_choice": "required"},
         "reasoning_effort"),
        (MESSAGES, SONNET, {"output_config": {"effort": "high"}}, "output_config.effort"),
        (MESSAGES, SONNET, {"output_config": {"task_budget": {"total": 9}}},
         "output_config.task_budget"),
        (MESSAGES, GPT, {"output_config": {"task_budget": {"total": 9}}},
         "output_config.task_budget"),
    ],
)  # fmt: skip
def test_a_loss_has_the_clients_own_name(
    trio: Trio,  # noqa: F811
    path: str,
    model: str,
    asked: Json,
    named: str,
) -> None:
    body = {**asking(path, "hi", model), "tools": [tool(path)], **asked}
    reply = trio.post(path, {name: value for name, value in body.items() if value is not None})
    assert reply.status == 200 and named in names_dropped(reply)
