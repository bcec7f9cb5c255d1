"""Section 8: nothing of a response is lost or joined wrongly between model and client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_kiro import message
from goldens import make_flow, one_by_one, play, split_events

from aiclient_api import DIALECTS, UPSTREAM_DIALECTS, Tool, dump_json, load_object

Json = dict[str, Any]


def rows(upstream: str, frames: list[Json]) -> list[bytes]:
    """The frames as an upstream sends them, one read each; Kiro's are `{event: payload}`."""
    if upstream == "kiro":
        head = {":content-type": "application/json", ":message-type": "event"}
        events = [item for frame in frames for item in frame.items()]
        return [message({":event-type": n, **head}, json.dumps(p).encode()) for n, p in events]
    named = upstream != "chat"
    heads = [f"event: {frame['type']}\n" if named else "" for frame in frames]
    reads = [f"{h}data: {json.dumps(f)}\n\n" for h, f in zip(heads, frames, strict=True)]
    return [read.encode() for read in reads] + ([] if named else [b"data: [DONE]\n\n"])


def streamed(upstream: str, client: str, frames: list[Json], **terms: Any) -> list[Json]:
    """The client's frames, which must not depend on how the stream is cut."""
    reads = rows(upstream, frames)
    data = b"".join(reads)
    cuts = [[data], one_by_one(data), [data[: len(data) // 3], data[len(data) // 3 :]]]
    sent = play(make_flow(upstream, client, **terms), reads)
    for cut in cuts:
        assert play(make_flow(upstream, client, **terms), cut) == sent
    return [json.loads(row) for _, row in split_events(sent) if row != "[DONE]"]


def collected(upstream: str, client: str, frames: list[Json], **terms: Any) -> Json:
    """The non-streaming response for the same frames."""
    flow = make_flow(upstream, client, stream=False, **terms)
    play(flow, rows(upstream, frames))
    body: Json = json.loads(dump_json(flow.response_body()))
    return body


def chunk(delta: Json, finish: str | None = None, index: int = 0) -> Json:
    return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def joined(frames: list[Json], key: str, index: int = 0) -> str:
    """A text of a chat stream's choice."""
    choices = [choice for frame in frames for choice in frame["choices"]]
    return "".join(c["delta"].get(key) or "" for c in choices if c["index"] == index)


def calls_of(client: str, body: Json) -> list[tuple[str, str, Any]]:
    """(id, name, arguments) of the calls in a non-streaming response."""
    if client == "chat":
        calls = body["choices"][0]["message"]["tool_calls"]
        found = [(call["id"], call["function"]) for call in calls]
        return [(call_id, f["name"], load_object(f["arguments"])) for call_id, f in found]
    if client == "messages":
        return [(b["id"], b["name"], b["input"]) for b in body["content"]]
    return [(i["call_id"], i["name"], load_object(i["arguments"])) for i in body["output"]]


def streamed_calls(client: str, frames: list[Json]) -> list[tuple[str, str, Any]]:
    """The same of a stream, whose indexes must be dense and whose ids and names come once."""
    calls: list[list[str]] = []
    for frame in frames:
        if client == "responses":
            if frame["type"] == "response.completed":
                return calls_of(client, frame["response"])
            continue
        block = frame.get("content_block", {})
        if block:
            calls.append([block["id"], block["name"], ""])
        elif frame.get("delta", {}).get("partial_json"):
            calls[frame["index"]][2] += frame["delta"]["partial_json"]
        for choice in frame.get("choices", ()):
            for call in choice["delta"].get("tool_calls", ()):
                if call["index"] == len(calls):
                    calls.append([call["id"], call["function"]["name"], ""])
                else:
                    assert call.keys() == {"index", "function"}
                calls[call["index"]][2] += call["function"]["arguments"]
    return [(call_id, name, load_object(text)) for call_id, name, text in calls]


def piece(index: int | None, name: str, text: str, call_id: str | None = None) -> Json:
    """A fragment of a call; what is empty or None is left out."""
    function = {"arguments": text} | ({"name": name} if name else {})
    place = {} if index is None else {"index": index}
    return {**place, **({} if call_id is None else {"id": call_id}), "function": function}


A, B = '{"city":"Paris"}', '{"city":"London","n":{}}'
#: fragments by chunk, of two calls: of f with A and of f or g with B
PARALLEL: dict[str, list[list[Json]]] = {
    "ids": [[piece(0, "f", A, "x")], [piece(0, "f", B, "y")]],
    "ids in one chunk": [[piece(0, "f", A, "x"), piece(0, "f", B, "y")]],
    "empty ids": [[piece(0, "f", A, "")], [piece(0, "f", B, "")]],
    "no ids in one chunk": [[piece(0, "f", A), piece(0, "f", B)]],
    "no ids, in pieces": [
        [piece(0, name, text)]
        for name, text in (("f", ""), ("", A[:5]), ("", A[5:]), ("f", B[:4]), ("", B[4:]))
    ],
    "one id": [[piece(0, "f", A, "x"), piece(0, "g", B, "x")]],
    "one id, two indexes": [[piece(0, "f", A, "x")], [piece(1, "g", B, "x")]],
    "ids, in pieces": [
        [piece(0, "f", "", "x")],
        [piece(0, "", A)],
        [piece(0, "g", B[:9], "y"), piece(0, "", B[9:])],
    ],
    "id and name in each": [
        [piece(0, name, text, call_id)]
        for name, whole, call_id in (("f", A, "x"), ("g", B, "y"))
        for text in (whole[:4], whole[4:9], whole[9:], "")
    ],
    "a call that is repeated": [[piece(0, "f", A, "x")]] * 2 + [[piece(0, "g", B, "y")]],
    "no index": [
        [piece(None, "f", A[:6], "x"), piece(None, "g", B[:6], "y")],
        [piece(None, "", A[6:], "x"), piece(None, "", B[6:], "y")],
    ],
    "a late id": [[piece(0, "f", "")], [piece(0, "", A, "x")], [piece(0, "g", B, "y")]],
}  # fmt: skip


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("case", PARALLEL)
def test_parallel_calls_at_one_index_stay_apart(case: str, client: str, rewritten: bool) -> None:
    deltas: list[Json] = [{"role": "assistant", "content": ""}]
    deltas += [*({"tool_calls": c} for c in PARALLEL[case])]
    frames = [*map(chunk, deltas), chunk({}, "tool_calls")]
    found = streamed_calls(client, streamed("chat", client, frames, rewritten=rewritten))
    assert found == calls_of(client, collected("chat", client, frames, rewritten=rewritten))
    (first_id, first, a), (second_id, second, b) = found
    assert (first, a, b) == ("f", load_object(A), load_object(B)) and second in ("f", "g")
    given = {p.get("id") for pieces in PARALLEL[case] for p in pieces} - {"", None}
    assert first_id and second_id and first_id != second_id
    assert given == {"x"} or case == "a late id" or given <= {first_id, second_id}


@pytest.mark.parametrize("client", DIALECTS)
def test_parallel_calls_of_a_whole_response_stay_apart(client: str) -> None:
    message = {"role": "assistant", "tool_calls": PARALLEL["empty ids"][0] * 2}
    body = {"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    flow = make_flow("chat", client, stream=False)
    flow.feed_buffered(json.dumps(body).encode())
    found = calls_of(client, json.loads(dump_json(flow.response_body())))
    assert [call[1:] for call in found] == [("f", load_object(A))] * 2
    assert found[0][0] != found[1][0]


@pytest.mark.parametrize("last", [A, load_object(A), f" {A}\n"], ids=["text", "object", "blanks"])
@pytest.mark.parametrize("pieces", [[A], [A[:5], A[5:]], [load_object(A)]], ids=str)
@pytest.mark.parametrize("client", DIALECTS)
def test_complete_arguments_that_kiro_repeats_count_once(
    client: str, pieces: list[Any], last: Any
) -> None:
    call = {"toolUseId": "tooluse_1", "name": "f"}
    payloads = [call, *({**call, "input": part} for part in pieces)]
    frames = [{"toolUseEvent": payload} for payload in payloads]
    frames.append({"toolUseEvent": {**call, "input": last, "stop": True}})
    expected = [("tooluse_1", "f", load_object(A))]
    assert streamed_calls(client, streamed("kiro", client, frames)) == expected
    assert calls_of(client, collected("kiro", client, frames)) == expected


@pytest.mark.parametrize("roles", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("split", [False, True])
def test_each_choice_begins_with_its_role(roles: tuple[int, ...], split: bool) -> None:
    choices = []
    for index in (0, 1):
        role = {"role": "assistant"} if index in roles else {}
        choices.append(chunk({**role, "content": f"a{index}"}, index=index)["choices"][0])
    first = [[choice] for choice in choices] if split else [choices]
    frames: list[Json] = [{"id": "c", "choices": row} for row in first]
    frames += [chunk({"role": "assistant", "content": "b"}, index=at) for at in (0, 1)]
    frames += [chunk({}, "stop", index=at) for at in (0, 1)]
    sent = streamed("chat", "chat", frames, multiple_choices=True)
    for index in (0, 1):
        assert joined(sent, "role", index) == "assistant"
        assert joined(sent, "content", index) == f"a{index}b"
        own = [c["delta"] for frame in sent for c in frame["choices"] if c["index"] == index]
        assert own[0]["role"] == "assistant"


HEADS: dict[str, list[Json]] = {
    "chat": [chunk({"role": "assistant", "content": ""})],
    "messages": [{"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1}}}],
    "responses": [{"type": "response.created", "response": {"id": "r", "output": []}}],
    "kiro": [],
}
KIRO_TEXTS = {
    "text": ("assistantResponseEvent", "content"),
    "thinking": ("reasoningContentEvent", "text"),
    "arguments": ("toolUseEvent", "input"),
}


def delta_stream(upstream: str, kind: str, texts: list[str], between: list[Json]) -> list[Json]:
    """A response of one block whose deltas are `texts`, with `between` after the first half."""
    whole, frames = "".join(texts), [*HEADS[upstream]]
    if upstream == "kiro":
        name, key = KIRO_TEXTS[kind]
        call = {"toolUseId": "t1", "name": "f"} if kind == "arguments" else {}
        deltas: list[Json] = [{name: {**call, key: text}} for text in texts]
        ends: list[Json] = [{name: {**call, "stop": True}}] if call else []
    elif upstream == "chat":
        key = {"text": "content", "thinking": "reasoning_text"}.get(kind, "")
        calls = [[{"index": 0, "function": {"arguments": text}}] for text in texts]
        pieces = [{key: text} if key else {"tool_calls": c} for text, c in zip(texts, calls)]
        if not key:
            frames.append(chunk({"tool_calls": [piece(0, "f", "", "c1")]}))
        deltas, ends = [*map(chunk, pieces)], [chunk({}, "stop" if key else "tool_calls")]
    elif upstream == "messages":
        block: Json = {"type": kind, kind: ""}
        key, type_ = kind, f"{kind}_delta"
        if kind == "arguments":
            block = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
            key, type_ = "partial_json", "input_json_delta"
        where: Json = {"index": 0}
        frames.append({"type": "content_block_start", **where, "content_block": block})
        deltas = [
            {"type": "content_block_delta", **where, "delta": {"type": type_, key: text}}
            for text in texts
        ]
        stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}
        ends = [{"type": "content_block_stop", **where}, stop, {"type": "message_stop"}]
    else:
        items: dict[str, Json] = {
            "text": {"type": "message", "content": [{"type": "output_text", "text": whole}]},
            "thinking": {"type": "reasoning", "summary": [{"type": "summary_text", "text": whole}]},
            "arguments": {
                "type": "function_call",
                "call_id": "c1",
                "name": "f",
                "arguments": whole,
            },
        }
        item = items[kind]
        names = {"text": "output_text", "thinking": "reasoning_summary_text"}
        name = f"response.{names.get(kind, 'function_call_arguments')}.delta"
        part = {"thinking": "summary_index", "text": "content_index"}.get(kind, "x")
        where = {"output_index": 0, "item_id": "i"}
        empty = {**item, "arguments": "", "summary": [], "content": []}
        frames.append({"type": "response.output_item.added", "output_index": 0, "item": empty})
        if kind == "thinking":
            added = {"type": "response.reasoning_summary_part.added", part: 0, "part": {}}
            frames.append({**added, **where})
        deltas = [{"type": name, **where, part: 0, "delta": text} for text in texts]
        done = {"type": "response.output_item.done", "output_index": 0, "item": item}
        response = {"id": "r", "status": "completed", "output": [item]}
        ends = [done, {"type": "response.completed", "response": response}]
    at = next((n + 1 for n, text in enumerate(texts) if text[-1:] == "\ud83d"), 1)
    return [*frames, *deltas[:at], *between, *deltas[at:], *ends]


def texts_of(client: str, frames: list[Json], kind: str) -> str:
    """All text of one kind in the deltas of a client's stream."""
    if client == "chat":
        calls = (c for f in frames for h in f["choices"] for c in h["delta"].get("tool_calls", ()))
        arguments = "".join(call["function"]["arguments"] for call in calls)
        key = "reasoning_content" if kind == "thinking" else "content"
        return arguments if kind == "arguments" else joined(frames, key)
    if client == "messages":
        key = "partial_json" if kind == "arguments" else kind
        deltas = (f["delta"] for f in frames if f["type"] == "content_block_delta")
        return "".join(delta.get(key, "") for delta in deltas)
    return "".join(f["delta"] for f in frames if f["type"].endswith(".delta"))


def collected_text(client: str, body: Json, kind: str) -> str:
    if kind == "arguments":
        return json.dumps(calls_of(client, body)[0][2], ensure_ascii=False, separators=(",", ":"))
    if client == "chat":
        message = body["choices"][0]["message"]
        return str(message["reasoning_content" if kind == "thinking" else "content"])
    if client == "messages":
        return str(body["content"][0][kind])
    item = body["output"][0]
    return str(item["summary" if kind == "thinking" else "content"][0]["text"])


WORDS = [f"w{n} " for n in range(30)]  # enough for a template
LATER: dict[str, list[Json]] = {
    "messages": [{"type": "ping"}],
    "chat": [{"id": "c", "choices": []}],
}


@pytest.mark.parametrize("kind", ["text", "thinking", "arguments"])
@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("upstream", UPSTREAM_DIALECTS)
def test_a_character_that_is_split_between_deltas_is_joined(
    upstream: str, client: str, kind: str
) -> None:
    for halves, expected in (
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "\ude00\ud83d", "\ude01"], "😀😁"),
        (["a\ud83d", "b"], "a\ufffdb"),
        (["a\ud83d"], "a\ufffd"),
        (["a", "\ude00"], "a\ufffd"),
    ):
        texts, whole = [*WORDS, *halves, *WORDS], "".join([*WORDS, expected, *WORDS])
        if len(halves) == 1:
            texts, whole = texts[: -len(WORDS)], "".join([*WORDS, expected])
        if kind == "arguments":
            texts, whole = ['{"a":"', *texts, '"}'], f'{{"a":"{whole}"}}'
        frames = delta_stream(upstream, kind, texts, LATER.get(upstream, []))
        terms = {"store_reasoning": lambda *_: None}
        assert texts_of(client, streamed(upstream, client, frames, **terms), kind) == whole
        assert collected_text(client, collected(upstream, client, frames), kind) == whole


def message_frames(index: int, *texts: str) -> list[Json]:
    """A message item of a responses upstream, one part and its deltas."""
    item = {"id": f"m{index}", "type": "message", "role": "assistant"}
    part = {"type": "output_text", "text": "".join(texts), "annotations": []}
    where = {"output_index": index}
    delta = {"type": "response.output_text.delta", **where, "content_index": 0}
    return [
        {"type": "response.output_item.added", **where, "item": {**item, "content": []}},
        *({**delta, "delta": text} for text in texts),
        {"type": "response.output_text.done", **where, "content_index": 0, "text": part["text"]},
        {"type": "response.output_item.done", **where, "item": {**item, "content": [part]}},
    ]


@pytest.mark.parametrize("between", ["nothing", "a call"])
def test_two_messages_of_a_responses_upstream_are_two_paragraphs(between: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": A}
    middle = [{"type": "response.output_item.done", "output_index": 1, "item": call}]
    middle = middle if between == "a call" else []
    first, last = "I am checking.", "It is done."
    answer = message_frames(1 + len(middle), last[:5], *WORDS, last[5:])
    frames = [*HEADS["responses"], *message_frames(0, first[:4], first[4:]), *middle, *answer]
    frames.append({"type": "response.completed", "response": {"id": "r", "output": []}})
    last = "".join([last[:5], *WORDS, last[5:]])
    sent = streamed("responses", "chat", frames)
    assert joined(sent, "content") == f"{first}\n\n{last}"
    body = collected("responses", "chat", frames)
    assert body["choices"][0]["message"]["content"] == f"{first}\n\n{last}"
    for content in (
        collected("responses", "messages", frames)["content"],
        [
            f["content_block"]
            for f in streamed("responses", "messages", frames)
            if "content_block" in f
        ],
    ):
        assert [b["type"] for b in content if b["type"] == "text"] == ["text"] * 2
    texts = [b.get("text") for b in collected("responses", "messages", frames)["content"]]
    assert [text for text in texts if text] == [first, last]
    output = collected("responses", "responses", frames)["output"]
    assert [i["content"][0]["text"] for i in output if "content" in i] == [first, last]


def call_frames(upstream: str, arguments: str) -> list[Json]:
    """A call at whose arguments a response ends, up to its last frames."""
    if upstream == "chat":
        fragments = [piece(0, "f", "", "x"), piece(0, "", arguments)]
        return [*(chunk({"tool_calls": [part]}) for part in fragments), chunk({}, "length")]
    where: Json = {"index": 0}
    block = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": arguments}
    stop = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {}}
    return [
        {"type": "content_block_start", **where, "content_block": block},
        {"type": "content_block_delta", **where, "delta": delta},
        {"type": "content_block_stop", **where},
        *(stop, {"type": "message_stop"}),
    ]


@pytest.mark.parametrize("tool_kind", ["function", "custom", "tool_search"])
@pytest.mark.parametrize("arguments", ['{"a":"b', "", A])
@pytest.mark.parametrize("upstream", ["chat", "messages"])
def test_a_call_that_is_cut_is_incomplete(upstream: str, arguments: str, tool_kind: str) -> None:
    frames = [*HEADS[upstream], *call_frames(upstream, arguments)]
    tools = {"f": Tool("f", "", {}, kind=tool_kind)}
    sent = streamed(upstream, "responses", frames, tools=tools)
    status = "completed" if arguments == A else "incomplete"
    done = next(f["item"] for f in sent if f["type"] == "response.output_item.done")
    assert done["status"] == status
    assert sent[-1]["type"] == "response.incomplete" and sent[-1]["response"]["output"] == [done]
    told = [f["type"] for f in sent if f["type"].endswith(("arguments.done", "input.done"))]
    assert len(told) == (status == "completed" and tool_kind != "tool_search")
    assert collected(upstream, "responses", frames, tools=tools)["output"] == [done]


@pytest.mark.parametrize("kind", ["text", "thinking"])
@pytest.mark.parametrize("upstream", DIALECTS)
def test_text_that_is_cut_at_the_limit_is_incomplete(upstream: str, kind: str) -> None:
    """Also where a responses upstream calls the item complete and the response incomplete."""
    frames = delta_stream(upstream, kind, WORDS, [])
    limits: Json = {"chat": ("finish_reason", "stop", "length")}
    limits |= {"messages": ("stop_reason", "end_turn", "max_tokens")}
    limits |= {"responses": ("status", "completed", "incomplete")}
    key, old, new = limits[upstream]
    text = json.dumps(frames[-2:]).replace(f'"{key}": "{old}"', f'"{key}": "{new}"')
    frames[-2:] = json.loads(text.replace('"response.completed"', '"response.incomplete"'))
    sent = streamed(upstream, "responses", frames)
    assert sent[-1]["type"] == "response.incomplete"
    last = next(f["item"] for f in reversed(sent) if f["type"] == "response.output_item.done")
    assert last["status"] == sent[-1]["response"]["output"][-1]["status"] == "incomplete"
    assert collected(upstream, "responses", frames)["output"][-1]["status"] == "incomplete"
    flow = make_flow(upstream, "responses")
    play(flow, rows(upstream, delta_stream(upstream, kind, WORDS, [])))
    assert flow.is_complete


@pytest.mark.parametrize("kind", ["function_call", "custom_tool_call"])
@pytest.mark.parametrize("end", ["completed", "incomplete"])
def test_a_responses_upstream_that_contradicts_itself_is_corrected(end: str, kind: str) -> None:
    key = "arguments" if kind == "function_call" else "input"
    item = {"type": kind, "id": "i", "call_id": "c", "name": "f", "status": "completed"}
    item[key] = '{"a":"b'
    where: Json = {"output_index": 0, "item_id": "i"}
    stem = f"response.{kind}_{key}"
    frames = [
        *HEADS["responses"],
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, key: ""}},
        {"type": f"{stem}.delta", **where, "delta": item[key]},
        {"type": f"{stem}.done", **where, key: item[key]},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": f"response.{end}", "response": {"id": "r", "status": end, "output": [item]}},
    ]
    is_cut = kind == "function_call" or end == "incomplete"
    sent = streamed("responses", "responses", frames)
    status = "incomplete" if is_cut else "completed"
    response = sent[-1]["response"]
    assert (sent[-1]["type"], response["status"]) == (f"response.{status}", status)
    done = next(f["item"] for f in sent if f["type"] == "response.output_item.done")
    assert done["status"] == response["output"][0]["status"] == status
    assert (f"{stem}.done" in [f["type"] for f in sent]) is not is_cut
    whole = collected("responses", "responses", frames)
    assert (whole["status"], whole["output"][0]["status"]) == (status, status)


@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("repeated", [True, False])
def test_blank_deltas_of_a_custom_tools_input_are_kept(client: str, repeated: bool) -> None:
    deltas = ["\n", "if x:", "\n", "    ", "y()", " ", "\n\n"]
    item = {"type": "custom_tool_call", "id": "i", "call_id": "c", "name": "f", "input": ""}
    where: Json = {"output_index": 0, "item_id": "i"}
    done = {**item, "input": "".join(deltas) if repeated or client == "responses" else ""}
    name = "response.custom_tool_call_input.delta"
    frames = [
        *HEADS["responses"],
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        *({"type": name, **where, "delta": delta} for delta in deltas),
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed", "response": {"id": "r", "output": [done]}},
    ]
    sent = streamed("responses", client, frames)
    expected = "".join(deltas)
    if client == "responses":
        assert [frame["delta"] for frame in sent if frame["type"] == name] == deltas
        assert collected("responses", client, frames)["output"][0]["input"] == expected
    else:
        assert streamed_calls(client, sent) == [("c", "f", {"input": expected})]
        assert calls_of(client, collected("responses", client, frames)) == [
            ("c", "f", {"input": expected})
        ]


@pytest.mark.parametrize("upstream", ["chat", "messages", "kiro"])
def test_blanks_around_a_custom_tools_input_are_kept(upstream: str) -> None:
    texts = ['{"input":"', "\\n", "  ", "if x:", "\\n", " ", "y()", "\\n", '"}']
    frames = delta_stream(upstream, "arguments", texts, [])
    tools = {"f": Tool("f", "", {}, kind="custom")}
    output = collected(upstream, "responses", frames, tools=tools)["output"]
    assert output[0]["input"] == "\n  if x:\n y()\n"
    sent = streamed(upstream, "responses", frames, tools=tools)
    assert sent[-1]["response"]["output"] == output
