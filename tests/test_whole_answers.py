"""Section 8: what an answer holds, for every pair of dialects, however its bytes arrive."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_kiro import message
from goldens import (
    Json,
    check_ending,
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


@pytest.mark.parametrize(
    ("upstream", "client"),
    [(a, b) for a in CONVERTED for b in ("chat", "responses") if a != "responses" or a != b],
)
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


Steps = list[tuple[str, str]]
SAID = [("thinking", "hm"), ("text", "Hello"), ("name", "f")]
# Kiro's thinking in events (e), signatures (s), text (t) and a call (c) -> what a client gets of
# it, and what is kept for the next turn.
TOLD: dict[str, tuple[Steps, Steps, tuple[str, str] | None]] = {
    "events, then tags": (
        [("e", "hm"), ("t", "<thinking>hm</thinking>\n\nHello"), ("s", "S")],
        SAID,
        ("hm", "S"),
    ),
    "events and their signature, then tags": (
        [("e", "hm"), ("s", "S"), ("t", "<thinking>h"), ("t", "m</thinking>\n\nHello")],
        SAID,
        ("hm", "S"),
    ),
    "tags, then events": (
        [("t", "<thinking>hm</thinking>\n\nHello"), ("e", "h"), ("e", "m"), ("s", "S")],
        SAID,
        ("hm", "S"),
    ),
    "by turns": (
        [("e", "h"), ("t", "<thinking>h"), ("e", "m"), ("s", "S"), ("t", "m</thinking>\n\nHello")],
        SAID,
        ("hm", "S"),
    ),
    "tags first, by turns": (
        [
            ("t", "<thinking>\nh"),
            ("e", "h"),
            ("t", "m</thinking>\n\nHello"),
            ("e", "m"),
            ("s", "S"),
        ],
        SAID,
        ("hm", "S"),
    ),
    "a signature alone, then tags": (
        [("s", "S"), ("t", "<thinking>hm</thinking>\n\nHello")],
        SAID,
        ("", "S"),
    ),
    "tags alone": (
        [("t", "<thinking>hm</thinking>\n\nHello")],
        SAID,
        None,
    ),
    "two thoughts": (
        [("e", "a"), ("s", "A"), ("s", "1"), ("e", "b"), ("s", "B"), ("t", "Hello")],
        [("thinking", "a"), ("thinking", "b"), ("text", "Hello"), ("name", "f")],
        ("b", "B"),
    ),
    "a late signature": (
        [("e", "hm"), ("t", "Hello"), ("s", "S")],
        SAID,
        ("hm", "S"),
    ),
    "a late signature, then another thought": (
        [("e", "a"), ("t", "Hello"), ("s", "A"), ("e", "b"), ("s", "B")],
        [("thinking", "a"), ("text", "Hello"), ("thinking", "b"), ("name", "f")],
        ("b", "B"),
    ),
}


@each_client
@pytest.mark.parametrize("case", TOLD)
def test_kiros_thinking_is_told_once_and_under_its_own_signature(case: str, client: str) -> None:
    steps, expected, memory = TOLD[case]
    call = {"toolUseId": "t1", "name": "f", "input": "{}", "stop": True}
    events: dict[str, Callable[[str], bytes]] = {
        "e": lambda text: kiro_event("reasoningContentEvent", {"text": text}),
        "s": lambda text: kiro_event("reasoningContentEvent", {"signature": text}),
        "t": lambda text: kiro_event("assistantResponseEvent", {"content": text}),
        "c": lambda _: kiro_event("toolUseEvent", call),
    }
    data = b"".join(events[kind](text) for kind, text in [*steps, ("c", "")])
    kept: list[Any] = []
    context = {"tagged_thinking": True, "store_reasoning": lambda *k: kept.append(k)}
    whole = answer("kiro", client, data, **context)
    found = content_of(client, whole)
    if client == "chat":  # one field for all of it
        expected = [
            (kind, "".join(words for k, words in expected if k == kind))
            for kind in dict.fromkeys(kind for kind, _ in expected)
        ]
    assert found == expected
    assert kept[:1] == ([(["t1"], *memory)] if memory else [])
    if client == "messages":
        signed = {
            (block["thinking"], block["signature"].removeprefix(kiro_mark("")))
            for block in whole["content"]
            if block["type"] == "thinking" and block["signature"] != UNSIGNED
        }
        assert signed <= {("hm", "S"), ("a", "A1"), ("b", "B")}


# ---- how an answer begins and ends -------------------------------------------------------------


@each_client
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_repeated_message_start_is_ignored(client: str, place: int) -> None:
    frames = [start(), *text_block("Hello"), *stop(output_tokens=5)]
    expected = answer("messages", client, as_bytes("messages", frames))
    frames.insert(place, start())
    whole = answer("messages", client, as_bytes("messages", frames))
    assert whole == expected and content_of(client, whole) == [("text", "Hello")]
    flow = make_flow("messages", client)
    sent = play(flow, [as_bytes("messages", frames)])
    assert sent.count(b'"message_start"') == (client == "messages")


@each_client
def test_a_second_message_in_one_stream_is_an_error(client: str) -> None:
    frames = [start(), start(id="msg_2"), *text_block("Hello"), *stop()]
    flow = make_flow("messages", client)
    sent = play(flow, [as_bytes("messages", frames)])
    assert check_ending(flow, client, sent) == "error" and isinstance(flow.error, UpstreamError)


@each_client
@pytest.mark.parametrize("more", [[], stop("tool_use", output_tokens=9)])
def test_a_start_may_hold_the_whole_answer(client: str, more: list[Json]) -> None:
    """Seen where tools are called from code."""
    caller = {"type": "code_execution_20250825", "tool_id": "srvtoolu_1"}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "é"}, "caller": caller}
    content = [{"type": "text", "text": "Hello"}, call]
    counts = {"input_tokens": 6, "output_tokens": 9}
    first = start(content=content, stop_reason="tool_use", usage=counts)
    frames = [first, *(more or [{"type": "message_stop"}])]
    whole = answer("messages", client, as_bytes("messages", frames))
    assert content_of(client, whole) == [("text", "Hello"), ("name", "f")]
    if client == "messages":
        assert whole["content"] == content and whole["stop_reason"] == "tool_use"
        assert whole["usage"]["output_tokens"] == 9
    else:
        count = "completion_tokens" if client == "chat" else "output_tokens"
        assert whole["usage"][count] == 9
        assert "\\u00e9" in json.dumps(whole) or "é" in json.dumps(whole, ensure_ascii=False)


@each_client
def test_a_start_with_content_may_be_continued(client: str) -> None:
    first = start(content=[{"type": "text", "text": "Hello"}])
    frames = [first, *text_block(" there", index=1), *stop()]
    whole = answer("messages", client, as_bytes("messages", frames))
    assert "".join(words for _, words in content_of(client, whole)) == "Hello there"


@each_client
def test_a_start_with_content_and_no_end_is_cut_off(client: str) -> None:
    data = as_bytes("messages", [start(content=[{"type": "text", "text": "Hello"}])])
    flow = make_flow("messages", client)
    assert check_ending(flow, client, play(flow, [data])) == "error"


EMPTY: dict[str, list[bytes]] = {
    "chat": [
        as_bytes("chat", frames)
        for frames in (
            [chat_chunk({}, "stop")],
            [chat_chunk({"role": "assistant", "content": ""}, "stop")],
            [chat_chunk({"content": None}), chat_chunk({}, "stop")],
            [chat_chunk({"role": "assistant"}), chat_chunk({"content": ""}, "stop")],
        )
    ],
    "messages": [as_bytes("messages", [start(), *stop()])],
    "responses": [
        as_bytes("responses", UPSTREAM_DIALECTS["responses"].expand({"id": "r", "output": []}))
    ],
    "kiro": [b"", kiro_event("metadataEvent", {"stopReason": "END_TURN"})],
}


@pytest.mark.parametrize(
    ("upstream", "data"), [(name, data) for name in EMPTY for data in EMPTY[name]]
)
def test_an_empty_answer_has_a_role_in_chat(upstream: str, data: bytes) -> None:
    flow = make_flow(upstream, "chat", stream=False)
    play(flow, [data])
    message = flow.response_body()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "", "refusal": None}
    sent = play(make_flow(upstream, "chat"), [data])
    deltas = [
        choice["delta"]
        for line in sent.split(b"\n")
        if line[:7] == b"data: {"
        for choice in json.loads(line[6:])["choices"]
    ]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])


def test_each_choice_that_was_asked_for_has_a_role() -> None:
    frames = [chat_chunk({"content": "a"}), chat_chunk({"content": "b"}, index=1)]
    frames += [chat_chunk({}, "stop", index=index) for index in (0, 1, 2)]
    data = as_bytes("chat", frames)
    flow = make_flow("chat", "chat", stream=False, multiple_choices=True)
    play(flow, [data])
    found = [c["message"] for c in flow.response_body()["choices"]]
    assert [message["role"] for message in found] == ["assistant"] * 3
    assert [message["content"] for message in found] == ["a", "b", ""]


# ---- what is counted here ----------------------------------------------------------------------

ARGUMENTS = json.dumps({"path": "/srv/data/report.txt", "text": "Once upon a time. " * 20})


def call_answer(upstream: str) -> bytes:
    """A call and nothing else, of which the upstream counts nothing."""
    if upstream == "kiro":
        call = {"toolUseId": "t1", "name": "write_file"}
        half = len(ARGUMENTS) // 2
        pieces: list[Json] = [
            {"input": ARGUMENTS[:half]},
            {"input": ARGUMENTS[half:]},
            {"stop": True},
        ]
        return b"".join(kiro_event("toolUseEvent", {**call, **piece}) for piece in pieces)
    if upstream == "chat":
        function = {"name": "write_file", "arguments": ARGUMENTS}
        fragment = {"index": 0, "id": "t1", "type": "function", "function": function}
        return as_bytes(
            "chat", [chat_chunk({"tool_calls": [fragment]}), chat_chunk({}, "tool_calls")]
        )
    if upstream == "messages":
        block = {"type": "tool_use", "id": "t1", "name": "write_file", "input": {}}
        delta = {"type": "input_json_delta", "partial_json": ARGUMENTS}
        frames: list[Json] = [
            start(usage={}),
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
        ]
        return as_bytes("messages", [*frames, *stop("tool_use")])
    item = {"type": "function_call", "id": "fc_1", "call_id": "t1", "name": "write_file"}
    whole = {"id": "r", "output": [{**item, "arguments": ARGUMENTS, "status": "completed"}]}
    return as_bytes("responses", UPSTREAM_DIALECTS["responses"].expand(whole))


@each_client
@pytest.mark.parametrize("model", ["gpt-5.6-sol", "claude-sonnet-4.5", "claude-opus-4.8"])
@pytest.mark.parametrize("upstream", UPSTREAM_DIALECTS)
def test_calls_that_nobody_counted_are_estimated_at_the_models_prices(
    upstream: str, model: str, client: str
) -> None:
    expected = int(estimate_text("write_file" + ARGUMENTS, byte_prices(model)))
    for stream, reads in itertools.product((True, False), (lambda d: [d], one_by_one)):
        flow = make_flow(upstream, client, stream=stream, model=model, request_body=PLAIN)
        play(flow, reads(call_answer(upstream)))
        assert flow.usage.output == expected > 50


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("upstream", CLIENTS)
def test_an_alias_is_counted_as_the_model_that_it_stands_for(upstream: str, client: str) -> None:
    body = {"model": "fast", "messages": [{"role": "user", "content": "Wie geht es dir? " * 50}]}
    terms: Json = {"model": "fast", "upstream_model": "gpt-5.6-sol", "request_body": body}
    flow = make_flow(upstream, client, **terms)
    play(flow, [call_answer(upstream)])
    assert flow.usage.output == int(estimate_text("write_file" + ARGUMENTS, OPENAI_PRICES))
    plain = make_flow(upstream, client, model="gpt-5.6-sol", request_body={**body, "model": "gpt"})
    assert flow.context.input_estimate == plain.context.input_estimate
