"""Section 8: what an answer holds, for every pair of dialects, however its bytes arrive."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_kiro import message
from goldens import (
    GRAMMARS,
    Json,
    check_ending,
    has_finished,
    make_flow,
    one_by_one,
    play,
    write_frames,
)

from aiclient_api import (
    DIALECTS,
    OPENAI_PRICES,
    UNSIGNED,
    UPSTREAM_DIALECTS,
    Model,
    UpstreamError,
    byte_prices,
    estimate_text,
    kiro_mark,
    sanitize_body,
    write_chat_request,
    write_kiro_request,
    write_messages_request,
    write_responses_request,
)

CLIENTS = tuple(DIALECTS)
CONVERTED = ("chat", "responses", "kiro")  # what is no native answer to a client of messages
PLAIN: Json = {"messages": [{"role": "user", "content": "hi"}]}
THINKING: Json = {**PLAIN, "thinking": {"type": "enabled", "budget_tokens": 1024}}

each_client = pytest.mark.parametrize("client", CLIENTS)

# ---- what upstreams send -----------------------------------------------------------------------


def kiro_event(name: str, payload: Json) -> bytes:
    head = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    return message(head, json.dumps(payload).encode())


def chat_chunk(delta: Json, finish: str | None = None, index: int = 0) -> Json:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c", "created": 1763800000, "model": "m", "choices": [choice]}


def start(**changes: Any) -> Json:
    counts = {"input_tokens": 6, "output_tokens": 1}
    head: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": "up"}
    head |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counts}
    return {"type": "message_start", "message": {**head, **changes}}


def stop(reason: str = "end_turn", **usage: int) -> list[Json]:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


def text_block(text: str, index: int = 0) -> list[Json]:
    delta = {"type": "text_delta", "text": text}
    position = {"index": index}
    block = {"type": "text", "text": ""}
    return [
        {"type": "content_block_start", **position, "content_block": block},
        {"type": "content_block_delta", **position, "delta": delta},
        {"type": "content_block_stop", **position},
    ]


def as_bytes(upstream: str, frames: list[Json]) -> bytes:
    return write_frames(frames, names=upstream == "messages")


def thinking_answer(upstream: str, signature: str, *, calls: bool) -> bytes:
    """The thought "hm", signed or not, the text "Hello" and maybe a call."""
    if upstream == "kiro":
        rows = [kiro_event("reasoningContentEvent", {"text": word}) for word in ("h", "m")]
        if signature:
            rows.append(kiro_event("reasoningContentEvent", {"signature": signature}))
        rows.append(kiro_event("assistantResponseEvent", {"content": "Hello"}))
        call = {"toolUseId": "t1", "name": "f", "input": "{}", "stop": True}
        return b"".join(rows + ([kiro_event("toolUseEvent", call)] if calls else []))
    if upstream == "chat":
        opaque = {"reasoning_opaque": signature} if signature else {}
        function = {"name": "f", "arguments": "{}"}
        call = {"index": 0, "id": "t1", "type": "function", "function": function}
        frames = [chat_chunk({"role": "assistant", "reasoning_text": "h"})]
        frames += [chat_chunk({"reasoning_text": "m", **opaque}), chat_chunk({"content": "Hello"})]
        frames += [chat_chunk({"tool_calls": [call]})] if calls else []
        return as_bytes("chat", [*frames, chat_chunk({}, "tool_calls" if calls else "stop")])
    summary = [{"type": "summary_text", "text": "hm"}]
    items: list[Json] = [{"type": "reasoning", "id": "rs_1", "summary": summary}]
    items[0] |= {"encrypted_content": signature} if signature else {}
    part = {"type": "output_text", "text": "Hello", "annotations": []}
    done = {"status": "completed"}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]}
    items.append({**item, **done})
    if calls:
        call = {"type": "function_call", "id": "fc_1", "call_id": "t1", "name": "f"}
        items.append({**call, "arguments": "{}", **done})
    whole: Json = {"id": "resp_1", "object": "response", "model": "m", "status": "completed"}
    whole |= {"output": items}
    return as_bytes("responses", UPSTREAM_DIALECTS["responses"].expand(whole))


# ---- feeding them ------------------------------------------------------------------------------


def answer(upstream: str, client: str, data: bytes, **context: Any) -> Json:
    """The whole answer: as one, and folded from the stream's frames in any reads."""
    flow = make_flow(upstream, client, stream=False, **context)
    assert play(flow, [data]) == b""
    whole = flow.response_body()
    flow = make_flow(upstream, client, stream=False, **context)
    play(flow, one_by_one(data))
    assert flow.response_body() == whole
    sent = b""
    for reads in ([data], one_by_one(data), [data[:-7], data[-7:]]):
        flow = make_flow(upstream, client, **context)
        sent = play(flow, reads)
        assert check_ending(flow, client, sent) == "complete"
        frames = [json.loads(line[6:]) for line in sent.split(b"\n") if line[:7] == b"data: {"]
        for number, frame in enumerate(frames):
            assert frame.pop("sequence_number", number) == number
        assert comparable(DIALECTS[client].aggregate(frames)) == comparable(whole)
    for end in range(0, len(data), len(data) // 12):
        flow = make_flow(upstream, client, **context)
        check_ending(flow, client, play(flow, [data[:end]]))
    return whole


def comparable(whole: Json) -> Json:
    return {key: value for key, value in whole.items() if key not in ("object", "usage")}


def content_of(client: str, whole: Json) -> list[tuple[str, str]]:
    """(thinking, text or call, its words) of an answer."""
    if client == "messages":
        keys = {"thinking": "thinking", "text": "text", "tool_use": "name"}
        return [(keys[part["type"]], part[keys[part["type"]]]) for part in whole["content"]]
    if client == "chat":
        said = whole["choices"][0]["message"]
        found = [("thinking", said.get("reasoning_content")), ("text", said["content"])]
        names = [("name", call["function"]["name"]) for call in said.get("tool_calls", ())]
        return [(kind, words) for kind, words in found if words] + names
    found = []
    for item in whole["output"]:
        if item["type"] == "reasoning":
            found += [("thinking", part["text"]) for part in item["summary"]]
        elif item["type"] == "message":
            found += [("text", part["text"]) for part in item["content"]]
        else:
            found.append(("name", item["name"]))
    return found


# ---- thinking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("signature", ["", "EqQB"])
@pytest.mark.parametrize("asked", [None, {"type": "disabled"}, {"type": "enabled"}])
@pytest.mark.parametrize("upstream", CONVERTED)
def test_thinking_comes_first_only_where_it_was_asked_for(
    upstream: str, asked: Json | None, signature: str, calls: bool
) -> None:
    kept: list[Any] = []
    context = {"request_body": {**PLAIN, "thinking": asked}}
    data = thinking_answer(upstream, signature, calls=calls)
    whole = answer(upstream, "messages", data, **context, store_reasoning=lambda *k: kept.append(k))
    shows = asked == {"type": "enabled"}
    expected = [("thinking", "hm")] * shows + [("text", "Hello")] + [("name", "f")] * calls
    assert content_of("messages", whole) == expected
    is_kept = calls and signature != ""
    assert {(*ids, text) for ids, text, _ in kept} == ({("t1", "hm")} if is_kept else set())


@pytest.mark.parametrize("client", ["chat", "responses"])
@pytest.mark.parametrize("upstream", CONVERTED)
def test_clients_of_openai_get_reasoning_unasked(upstream: str, client: str) -> None:
    whole = answer(upstream, client, thinking_answer(upstream, "", calls=True))
    assert content_of(client, whole) == [("thinking", "hm"), ("text", "Hello"), ("name", "f")]


@pytest.mark.parametrize(
    ("body", "shows"),
    [
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}, "model": "claude-sonnet-4.5-thinking"}, False),
        ({"model": "claude-sonnet-4.5-thinking[1m]"}, True),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "high"}}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"output_config": {"effort": "high"}}, False),
        ({"thinking": "x"}, False),
    ],
)
def test_thinking_is_asked_for_by_field_or_by_the_models_name(body: Json, shows: bool) -> None:
    data = thinking_answer("chat", "EqQB", calls=False)
    content = answer("chat", "messages", data, request_body={**PLAIN, **body})["content"]
    assert (content[0]["type"] == "thinking") is shows


WRITERS: dict[str, Callable[..., Json]] = {
    "chat": write_chat_request,
    "messages": write_messages_request,
    "responses": write_responses_request,
    "kiro": write_kiro_request,
}


@pytest.mark.parametrize("upstream", CONVERTED)
def test_unsigned_thinking_is_marked_and_the_mark_stays_here(upstream: str) -> None:
    data = thinking_answer(upstream, "", calls=True)
    content = answer(upstream, "messages", data, request_body=THINKING)["content"]
    assert content[0] == {"type": "thinking", "thinking": "hm", "signature": UNSIGNED}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
    turns = [{"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    body = {**THINKING, "model": "m", "max_tokens": 2048, "messages": [*PLAIN["messages"], *turns]}
    for name, write in WRITERS.items():
        model = Model("m", "p", dialects=(name,), budget=(1024, 2000))
        sent = json.dumps(write(DIALECTS["messages"].read_request(body), model))
        assert "gw1." not in sent and '"hm"' not in sent and '"t1"' in sent, name
    native = sanitize_body("messages", body, Model("m", "p", ("messages",)), {}, True).body
    assert "gw1." not in json.dumps(native) and '"t1"' in json.dumps(native)
