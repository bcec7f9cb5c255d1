"""Section 8.4: responses streams, from every upstream and to every caller."""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_kiro import exception_frame
from fake_kiro import frame as kiro_event
from goldens import (
    CASES,
    CREATED,
    GRAMMARS,
    KIRO_CASES,
    RESPONSES_CASES,
    RESPONSES_PAIR_IDS,
    RESPONSES_PAIRS,
    Case,
    Json,
    KiroCase,
    check_ending,
    check_responses,
    has_finished,
    make_flow,
    one_by_one,
    play,
    split_events,
    write_frames,
)

from aiclient_api import (
    DIALECTS,
    RESPONSES,
    UNSIGNED,
    UPSTREAM_DIALECTS,
    ApiError,
    ContextTooLong,
    InvalidRequest,
    Model,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    SseReader,
    StreamTranslator,
    Thinking,
    Tool,
    ToolCall,
    UpstreamError,
    UpstreamTimeout,
)

SEED = 20261123
UPSTREAMS = ("chat", "messages", "responses", "kiro")
ALL_CASES = [*CASES, *KIRO_CASES, *RESPONSES_CASES]
FOREIGN_CASES = [*CASES, *KIRO_CASES]
TO_RESPONSES = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
FROM_OTHERS = pytest.mark.parametrize("case", FOREIGN_CASES, ids=lambda case: case.name)
FROM_RESPONSES = pytest.mark.parametrize(
    ("case", "caller"), RESPONSES_PAIRS, ids=RESPONSES_PAIR_IDS
)

# ---- what upstreams say ------------------------------------------------------------------------


def terms_of(case: Case) -> Json:
    """What a case was asked with."""
    return case.context if isinstance(case, KiroCase) else {}


def response(status: str = "in_progress", **more: Any) -> Json:
    """A response object of an upstream."""
    head = {"id": "resp_up", "object": "response", "created_at": CREATED, "model": "up"}
    rest: Json = {"status": status, "error": None, "incomplete_details": None, "usage": None}
    return {**head, **rest, "output": [], **more}


def counted(prompt: int = 9, output: int = 4, cached: int = 0, **more: Any) -> Json:
    """The usage of a response."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
        **more,
    }


def event(kind: str, **more: Any) -> Json:
    """A frame of a responses upstream; its number is put in where it is sent."""
    return {"type": f"response.{kind}", **more}


def created() -> Json:
    """The first event."""
    return event("created", response=response())


def ended(*items: Json, status: str = "completed", **more: Any) -> Json:
    """The terminal event with these items."""
    said = response(status, output=list(items), **{"usage": counted(), **more})
    return event(status, response=said)


def message_item(*parts: Json, at: int = 0) -> Json:
    """A message that is complete."""
    head = {"id": f"msg_{at}", "type": "message", "role": "assistant"}
    return {**head, "status": "completed", "content": list(parts)}


def output_text(text: str) -> Json:
    """A part with words."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def text_item(*words: str, at: int = 0) -> list[Json]:
    """The events of a message."""
    text, place = "".join(words), {"item_id": f"msg_{at}", "output_index": at}
    opened = {**message_item(at=at), "status": "in_progress"}
    part = {**place, "content_index": 0}
    return [
        event("output_item.added", output_index=at, item=opened),
        event("content_part.added", **part, part=output_text("")),
        *(event("output_text.delta", **part, delta=word, logprobs=[]) for word in words),
        event("output_text.done", **part, text=text, logprobs=[]),
        event("content_part.done", **part, part=output_text(text)),
        event("output_item.done", output_index=at, item=message_item(output_text(text), at=at)),
    ]


def call_item(name: str, *pieces: str, at: int = 0) -> list[Json]:
    """The events of a function call."""
    place = {"item_id": f"fc_{at}", "output_index": at}
    item: Json = {"id": f"fc_{at}", "type": "function_call", "call_id": f"call_{at}", "name": name}
    whole = "".join(pieces)
    opened = {**item, "status": "in_progress", "arguments": ""}
    grown = [event("function_call_arguments.delta", **place, delta=piece) for piece in pieces]
    return [
        event("output_item.added", output_index=at, item=opened),
        *grown,
        event("function_call_arguments.done", **place, name=name, arguments=whole),
        event(
            "output_item.done",
            output_index=at,
            item={**item, "status": "completed", "arguments": whole},
        ),
    ]


def done_items(frames: list[Json]) -> list[Json]:
    """The items of frames that end one."""
    return [frame["item"] for frame in frames if frame["type"].endswith("output_item.done")]


def numbered(frames: list[Json]) -> list[Json]:
    """Frames with their sequence numbers."""
    return [{**frame, "sequence_number": at} for at, frame in enumerate(frames)]


def complete(*frames: Json, **more: Any) -> list[Json]:
    """A responses stream around the events of items."""
    return [created(), *frames, ended(*done_items(list(frames)), **more)]


def chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
    """One chunk of a chat upstream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "created": CREATED, "model": "m", "choices": [choice], **more}


def chat_call(name: str, arguments: str, at: int = 0) -> Json:
    """A chunk with a whole call."""
    function = {"name": name, "arguments": arguments}
    return chunk({"tool_calls": [{"index": at, "id": f"call_{at}", "function": function}]})


def block(index: int, start: Json, *deltas: Json) -> list[Json]:
    """A content block of an Anthropic upstream."""
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text_block(index: int, *words: str) -> list[Json]:
    """A text block."""
    deltas = [{"type": "text_delta", "text": word} for word in words]
    return block(index, {"type": "text", "text": ""}, *deltas)


def thinking_block(index: int, *words: str, signature: str = "EqQB") -> list[Json]:
    """A thinking block, signed at its end."""
    deltas: list[Json] = [{"type": "thinking_delta", "thinking": word} for word in words]
    if signature:
        deltas.append({"type": "signature_delta", "signature": signature})
    return block(index, {"type": "thinking", "thinking": "", "signature": ""}, *deltas)


def tool_block(index: int, name: str, *pieces: str) -> list[Json]:
    """A call."""
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    start = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}
    return block(index, start, *deltas)


def message_start(**usage: int) -> Json:
    """The first event of an Anthropic upstream."""
    usage = {"input_tokens": 6, "output_tokens": 1, **usage}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "up", "content": []}
    return {"type": "message_start", "message": {**message, "usage": usage}}


def message_end(reason: str, output: int = 3, **delta: Any) -> list[Json]:
    """Its last two events."""
    said = {"stop_reason": reason, "stop_sequence": None, **delta}
    usage = {"output_tokens": output}
    return [{"type": "message_delta", "delta": said, "usage": usage}, {"type": "message_stop"}]


def wire(upstream: str, frames: list[Json]) -> bytes:
    """Frames as the upstream sends them."""
    if upstream == "responses":
        frames = numbered(frames)
    rows = (write_frames([f], names=upstream != "chat" and "type" in f) for f in frames)
    return b"".join(rows)


def thoughtful() -> list[Json]:
    """A thought of two paragraphs with its encrypted form, words, a call."""
    place = {"item_id": "rs_0", "output_index": 0}
    frames = []
    for at, text in enumerate("ab"):
        part = {**place, "summary_index": at}
        whole = {"type": "summary_text", "text": text}
        frames += [
            event("reasoning_summary_part.added", **part, part={**whole, "text": ""}),
            event("reasoning_summary_text.delta", **part, delta=text),
            event("reasoning_summary_text.done", **part, text=text),
            event("reasoning_summary_part.done", **part, part=whole),
        ]
    summary = [{"type": "summary_text", "text": text} for text in "ab"]
    item = {"id": "rs_0", "type": "reasoning", "summary": []}
    done = {**item, "summary": summary, "encrypted_content": "gAAAEXAMPLE"}
    return complete(
        event("output_item.added", output_index=0, item={**item, "encrypted_content": "early"}),
        *frames,
        event("output_item.done", output_index=0, item=done),
        *text_item("T", at=1),
        *call_item("Bash", '{"a":1}', at=2),
    )


def model(dialect: str) -> Model:
    """A model of an upstream dialect."""
    return Model("m", "p", (dialect,))


# ---- what callers get --------------------------------------------------------------------------


def with_plain_ids(sent: bytes) -> bytes:
    """A responses stream whose item ids tell type and place only."""
    text = sent.decode()
    for name, data in split_events(sent):
        if name == "response.output_item.added":
            frame = json.loads(data)
            known = frame["item"]["id"]
            text = text.replace(known, f"{known.rpartition('_')[0]}_{frame['output_index']}")
    return text.encode()


def plain_whole(whole: Json) -> Json:
    """The same for a whole answer of any dialect."""
    output = [
        {**item, "id": f"{item['id'].rpartition('_')[0]}_{at}"}
        for at, item in enumerate(whole.get("output", ()))
    ]
    return {**whole, "output": output} if "output" in whole else whole


def meaning(sent: bytes) -> list[Any]:
    """The events of a stream with their JSON read."""
    return [
        (name, data if data == "[DONE]" else json.loads(data))
        for name, data in split_events(with_plain_ids(sent))
    ]


def joined(sent: bytes) -> list[Any]:
    """Like `meaning`, with the growth of one place in one piece: where it is cut is free."""
    events: list[Any] = []
    for name, data in meaning(sent):
        before = events[-1][1] if events else {}
        free = {"delta", "sequence_number"}
        same = {k: v for k, v in data.items() if k not in free} == {
            k: v for k, v in before.items() if k not in free
        }
        if same and isinstance(data.get("delta"), str):
            before["delta"] += data["delta"]
        else:
            events.append((name, data))
    for at, (_, data) in enumerate(events):
        data["sequence_number"] = at
    return events


def random_reads(rng: random.Random, data: bytes) -> list[bytes]:
    """`data` cut at up to twelve places."""
    cuts = sorted(rng.sample(range(len(data)), min(len(data), rng.randint(1, 12))))
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]


def frames_of(sent: bytes) -> list[Json]:
    """The frames of a stream, without `[DONE]`."""
    return [json.loads(data) for _, data in split_events(sent) if data != "[DONE]"]


def streamed(
    upstream: str, frames: list[Json], caller: str = "responses", **changes: Any
) -> list[Json]:
    """The caller's frames of a complete stream, held to the caller's grammar."""
    flow = make_flow(upstream, caller, **changes)
    sent = play(flow, [wire(upstream, frames)])
    assert check_ending(flow, caller, sent) == "complete"
    return frames_of(sent)


def whole_of(upstream: str, frames: list[Json], caller: str = "responses", **changes: Any) -> Json:
    """The caller's whole answer; a responses caller's is its stream's last word too."""
    flow = make_flow(upstream, caller, stream=False, **changes)
    assert play(flow, [wire(upstream, frames)]) == b""
    whole = flow.response_body()
    said = streamed(upstream, frames, caller, **changes)
    if caller == "responses":
        assert said[-1]["response"] == whole
    return whole


def failed(
    upstream: str, frames: list[Json], caller: str = "responses", **changes: Any
) -> tuple[StreamTranslator, list[Json]]:
    """A flow that ended in an error, and what it sent."""
    flow = make_flow(upstream, caller, **changes)
    sent = play(flow, [wire(upstream, frames)])
    assert check_ending(flow, caller, sent) == "error"
    return flow, frames_of(sent)


def kinds(frames: list[Json]) -> list[str]:
    """The types of frames, without what they have in common."""
    return [frame["type"].removeprefix("response.") for frame in frames]


def opened_envelope(text: str, mark: str) -> Json:
    """What is in opaque text under a mark, read by formats.md 4.5 alone."""
    assert text.startswith(mark)
    packed = text[len(mark) :]
    value: Json = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
    return value


def items_told(whole: Json) -> list[Any]:
    """What a responses caller is told, in plain words: (kind, ...) for each item."""
    told: list[Any] = []
    for item in whole["output"]:
        if item["type"] == "message":
            told += [
                ("refusal", part["refusal"]) if "refusal" in part else ("text", part["text"])
                for part in item["content"]
            ]
        elif item["type"] == "function_call":
            told.append(("call", item["call_id"], item["name"], arguments_of(item["arguments"])))
        elif item["type"] == "reasoning":
            shown = "\n\n".join(part["text"] for part in item["summary"])
            if "encrypted_content" not in item:
                told.append(("thinking", shown, ""))
                continue
            carried = opened_envelope(item["encrypted_content"], "gw1.a.")
            if "data" in carried:
                told.append(("redacted", carried["data"]))
            else:
                assert carried["thinking"] == shown
                told.append(("thinking", shown, carried["signature"]))
    return told


def arguments_of(text: str) -> Json:
    """A call's arguments as an Anthropic caller has them."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"_raw": text}


def blocks_told(whole: Json) -> list[Any]:
    """The same of an Anthropic caller's answer; what only Anthropic can express is left out."""
    told: list[Any] = []
    for part in whole["content"]:
        if part["type"] == "text":
            told.append(("text", part["text"]))
        elif part["type"] == "thinking":
            signature = part.get("signature", "").removeprefix(UNSIGNED)
            told.append(("thinking", part["thinking"], signature))
        elif part["type"] == "redacted_thinking":
            told.append(("redacted", part["data"]))
        elif part["type"] == "tool_use":
            told.append(("call", part["id"], part["name"], part["input"]))
    return told


# ---- every golden stream -----------------------------------------------------------------------


def test_there_are_goldens() -> None:
    """A folder that moved must not turn the tests below into nothing."""
    assert len(RESPONSES_CASES) == 11 and len(FOREIGN_CASES) > 15


@FROM_RESPONSES
def test_a_golden_stream_becomes_what_was_written_down(case: Case, caller: str) -> None:
    """One read for the whole stream."""
    flow = make_flow("responses", caller)
    sent = play(flow, [case.stream])
    assert meaning(sent) == meaning(case.expected(caller))
    assert check_ending(flow, caller, sent) == "complete"


@FROM_RESPONSES
def test_what_was_written_down_follows_the_grammar(case: Case, caller: str) -> None:
    """The expectations themselves are held to the vendors' grammars."""
    sent = case.expected(caller)
    native = caller == "responses"
    outcome = check_responses(sent, native=True) if native else GRAMMARS[caller](sent)
    assert outcome == "complete"


@FROM_RESPONSES
def test_a_golden_stream_folds_to_the_whole_answer(case: Case, caller: str) -> None:
    """Without streaming nothing is sent before the end, and the answer is the fold."""
    for reads in ([case.stream], one_by_one(case.stream)):
        flow = make_flow("responses", caller, stream=False)
        assert play(flow, reads) == b""
        assert plain_whole(flow.response_body()) == case.whole(caller)


@FROM_RESPONSES
def test_a_golden_stream_means_the_same_however_it_is_cut(case: Case, caller: str) -> None:
    """Byte by byte and fifty seeded ways."""
    rng = random.Random(f"{SEED}{case.name}")
    told = meaning(case.expected(caller))
    for reads in (
        one_by_one(case.stream),
        *(random_reads(rng, case.stream) for _ in range(50)),
    ):
        sent = play(make_flow("responses", caller), reads)
        assert meaning(sent) == told


@FROM_OTHERS
def test_another_dialects_answer_means_the_same_however_it_is_cut(case: Case) -> None:
    """For a responses caller, held to the grammar each time."""
    flow = make_flow(case.upstream, "responses", **terms_of(case))
    sent = play(flow, [case.stream])
    assert check_ending(flow, "responses", sent) == "complete"
    told = joined(sent)
    rng = random.Random(f"{SEED}{case.name}")
    for reads in (
        one_by_one(case.stream),
        *(random_reads(rng, case.stream) for _ in range(50)),
    ):
        flow = make_flow(case.upstream, "responses", **terms_of(case))
        again = play(flow, reads)
        assert joined(again) == told
        assert check_ending(flow, "responses", again) == "complete"


@FROM_OTHERS
def test_a_responses_caller_is_told_what_an_anthropic_caller_is_told(case: Case) -> None:
    """The golden answers of the one are the measure for the other."""
    flow = make_flow(case.upstream, "responses", stream=False, **terms_of(case))
    assert play(flow, [case.stream]) == b""
    whole = flow.response_body()
    explained = (case.whole("messages").get("stop_details") or {}).get("explanation")
    told = [item for item in items_told(whole) if item != ("refusal", explained)]
    told = [("text", item[1]) if item[0] == "refusal" else item for item in told]
    if len(told) > 1 and told[-1][:2] == ("thinking", ""):
        told.pop()  # a signature alone does not end an answer in Anthropic's dialect
    assert told == blocks_told(case.whole("messages"))
    usage = case.whole("messages")["usage"]
    cached = usage["cache_read_input_tokens"]
    written = usage["cache_creation_input_tokens"]
    prompt = usage["input_tokens"] + cached + written
    assert whole["usage"]["input_tokens"] == prompt
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    assert whole["usage"]["input_tokens_details"] == details
    assert whole["usage"]["output_tokens"] == usage["output_tokens"]
    assert whole["usage"]["total_tokens"] == prompt + usage["output_tokens"]


@TO_RESPONSES
def test_a_whole_answer_is_the_last_word_of_its_stream(case: Case) -> None:
    """Both hold the items that were told as done."""
    whole = make_flow(case.upstream, "responses", stream=False, **terms_of(case))
    assert play(whole, one_by_one(case.stream)) == b""
    sent = play(make_flow(case.upstream, "responses", **terms_of(case)), [case.stream])
    assert frames_of(sent)[-1]["response"] == whole.response_body()


@TO_RESPONSES
def test_signs_of_life_anywhere_leave_no_gap_in_the_numbers(case: Case) -> None:
    """A ping between any two reads is an event like the others, or a comment before the first."""
    rng = random.Random(f"{SEED}{case.name}")
    for _ in range(20):
        flow = make_flow(case.upstream, "responses", **terms_of(case))
        sent, reads = flow.ping(), random_reads(rng, case.stream)
        for data in reads:
            sent += flow.feed(data)
            if not flow.is_finished:
                sent += flow.ping()
        sent += flow.end()
        assert check_ending(flow, "responses", sent) == "complete"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@FROM_RESPONSES
def test_a_golden_stream_cut_anywhere_never_looks_finished(
    case: Case, caller: str, stream: bool
) -> None:
    """Upstream breaking off is `response.failed`, or an error before the first frame."""
    for cut in range(0, len(case.stream), 11):
        seen = case.stream[:cut]
        flow = make_flow("responses", caller, stream=stream)
        outcome = check_ending(flow, caller, play(flow, [seen])) if stream else ""
        if not stream:
            assert play(flow, [seen]) == b""
            outcome = "error" if flow.error else "complete"
        assert outcome == "error" or has_finished("responses", seen), cut


@FROM_OTHERS
def test_another_dialects_answer_cut_anywhere_never_looks_finished(case: Case) -> None:
    """The same for a responses caller of other upstreams; Kiro's stream has no last message."""
    for cut in range(0, len(case.stream), 5):
        seen = case.stream[:cut]
        flow = make_flow(case.upstream, "responses", **terms_of(case))
        outcome = check_ending(flow, "responses", play(flow, [seen]))
        kiro = case.upstream == "kiro"
        assert kiro or outcome == "error" or has_finished(case.upstream, seen), cut


@TO_RESPONSES
def test_an_error_from_below_at_any_offset_ends_the_answer(case: Case) -> None:
    """A reset or a timeout of the connection is a `response.failed`; nothing follows."""
    for cut in range(0, len(case.stream), 7):
        flow = make_flow(case.upstream, "responses", **terms_of(case))
        sent = flow.feed(case.stream[:cut])
        over = flow.is_finished
        sent += flow.end(UpstreamError("The connection broke."))
        assert check_ending(flow, "responses", sent) == ("complete" if over else "error")
        assert flow.feed(case.stream) == b"" and flow.end() == b""


@pytest.mark.parametrize(
    "tail",
    [
        b"data: [DONE]\n\n",
        b": bye\n\n",
        b'data: {"type":"response.output_text.delta","output_index":0,"delta":"ghost"}\n\n',
        b'data: {"type":"error","error":{"code":"server_error","message":"late"}}\n\n',
        b"data: \xff\x00 {]\n\n",
    ],
)
@FROM_RESPONSES
def test_what_comes_behind_the_terminal_event_is_not_heard(
    case: Case, caller: str, tail: bytes
) -> None:
    """In the same read or in a later one."""
    for reads in ([case.stream + tail], [case.stream, tail]):
        sent = play(make_flow("responses", caller), reads)
        assert meaning(sent) == meaning(case.expected(caller))


# ---- formats.md cases 37 to 50 -----------------------------------------------------------------


def test_case_37_usage_after_the_finish_is_in_the_terminal_event() -> None:
    """The chat upstream counts behind its finish; prompts include what was cached."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    details = {"prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1}}
    reasoning = {"completion_tokens_details": {"reasoning_tokens": 1}}
    counts = {"choices": [], "usage": {**usage, **details, **reasoning}}
    frames = [chunk({"content": "He"}), chunk({"content": "y"}), chunk({}, "stop"), counts]
    whole = whole_of("chat", frames)
    assert whole["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 12,
    }
    assert whole["status"] == "completed"


def test_case_38_interleaved_calls_arrive_one_after_the_other() -> None:
    """No delta of one call under the id of the other."""

    def piece(index: int, arguments: str, **more: str) -> Json:
        function = {"arguments": arguments, **({"name": more.pop("name")} if more else {})}
        return chunk({"tool_calls": [{"index": index, **more, "function": function}]})

    frames = streamed(
        "chat",
        [
            piece(0, "", id="a", name="f"),
            piece(1, "", id="b", name="g"),
            piece(1, "{}"),
            piece(0, '{"x":1}'),
            chunk({}, "tool_calls"),
        ],
    )
    assert items_told(frames[-1]["response"]) == [
        ("call", "a", "f", {"x": 1}),
        ("call", "b", "g", {}),
    ]


def test_case_39_text_after_a_call_is_an_item_of_its_own() -> None:
    """The call is done before the message is added."""
    frames = streamed("chat", [chat_call("f", "{}"), chunk({"content": "z"}), chunk({}, "stop")])
    steps = [kind for kind in kinds(frames) if kind.startswith("output_item")]
    assert steps == ["output_item.added", "output_item.done"] * 2
    assert items_told(frames[-1]["response"]) == [("call", "call_0", "f", {}), ("text", "z")]


@pytest.mark.parametrize("finish", ["stop", "tool_calls", "function_call"])
def test_case_41_an_answer_with_a_call_is_completed(finish: str) -> None:
    """formats.md 4.1: a call is no reason to be incomplete."""
    whole = whole_of("chat", [chat_call("f", "{}"), chunk({}, finish)])
    assert whole["status"] == "completed" and whole["incomplete_details"] is None


@pytest.mark.parametrize("upstream", ["chat", "messages", "responses"])
def test_case_42_an_upstream_that_breaks_off_is_a_failure(upstream: str) -> None:
    """Never a bare end: Codex would take it for a dropped connection and ask again."""
    opened = {
        "chat": [chunk({"content": "par"})],
        "messages": [message_start(), *text_block(0, "par")[:2]],
        "responses": [created(), *text_item("par")[:3]],
    }
    flow, frames = failed(upstream, opened[upstream])
    assert isinstance(flow.error, UpstreamError)
    assert frames[-1]["type"] == "response.failed"
    whole = make_flow(upstream, "responses", stream=False)
    assert play(whole, [wire(upstream, opened[upstream])]) == b""
    with pytest.raises(UpstreamError):
        whole.response_body()


def test_case_43_thinking_text_and_call_of_a_responses_upstream_become_chat_deltas() -> None:
    """The encrypted thought has no place there."""
    frames = streamed("responses", thoughtful(), "chat", include_usage=False)
    said = [frame["choices"][0]["delta"] for frame in frames]
    call = {"index": 0, "id": "call_2", "type": "function"}
    assert said[1:] == [
        {"reasoning_content": "a"},
        {"reasoning_content": "\n\n"},
        {"reasoning_content": "b"},
        {"content": "T"},
        {"tool_calls": [{**call, "function": {"name": "Bash", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]},
        {},
    ]
    assert "gAAA" not in json.dumps(frames)
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_case_44_caches_count_as_input() -> None:
    """An Anthropic upstream counts them apart."""
    start = message_start(cache_read_input_tokens=4, cache_creation_input_tokens=5)
    end = message_end("end_turn", 3)
    end[0]["usage"]["output_tokens_details"] = {"thinking_tokens": 2}
    whole = whole_of("messages", [start, *text_block(0, "x"), *end])
    assert whole["usage"] == {
        "input_tokens": 15,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 18,
    }


@pytest.mark.parametrize("pieces", [(), ("",), ("", ""), ("{}",), ("{", "}")])
def test_case_45_a_call_without_arguments_has_an_empty_object(pieces: tuple[str, ...]) -> None:
    """From an Anthropic upstream, to whom no delta is an empty object."""
    frames = [message_start(), *tool_block(0, "f", *pieces), *message_end("tool_use")]
    item = whole_of("messages", frames)["output"][0]
    assert item["arguments"] == "{}" and item["call_id"] == "toolu_0"


@pytest.mark.parametrize("caller", ["chat", "messages"])
@pytest.mark.parametrize("pieces", [(), ("",), ("{}",)])
def test_a_call_of_a_responses_upstream_without_arguments(
    pieces: tuple[str, ...], caller: str
) -> None:
    """The same in the other direction."""
    whole = whole_of("responses", complete(*call_item("f", *pieces)), caller)
    if caller == "chat":
        call = whole["choices"][0]["message"]["tool_calls"][0]
        assert call["function"] == {"name": "f", "arguments": "{}"}
    else:
        call = {"type": "tool_use", "id": "call_0", "name": "f", "input": {}}
        assert whole["content"] == [call]


def test_case_46_split_choices_are_one_answer() -> None:
    """Copilot's Claude puts text in one choice and the call in another."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    choices = [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "T"},
            "finish_reason": "tool_calls",
        },
        {"index": 1, "message": silent, "finish_reason": "tool_calls"},
    ]
    flow = make_flow("chat", "responses", stream=False)
    assert flow.feed_buffered(json.dumps({"id": "x", "choices": choices}).encode()) == b""
    assert items_told(flow.response_body()) == [("text", "T"), ("call", "c1", "f", {})]


def test_case_47_thinking_text_and_call_of_an_anthropic_upstream() -> None:
    """Each event in its order; the signature travels in the item's encrypted content."""
    frames = streamed(
        "messages",
        [
            message_start(),
            *thinking_block(0, "hm, ", "né"),
            *text_block(1, "T"),
            *tool_block(2, "Bash", '{"a"', ":1}"),
            *message_end("tool_use"),
        ],
    )
    assert kinds(frames) == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    thought, message, call = frames[-1]["response"]["output"]
    assert (thought["id"][:3], message["id"][:4], call["id"][:3]) == ("rs_", "msg_", "fc_")
    carried = opened_envelope(thought["encrypted_content"], "gw1.a.")
    assert carried == {"thinking": "hm, né", "signature": "EqQB"}
    assert message["content"][0] == output_text("T")
    done = next(f for f in frames if f["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["arguments"]) == ("Bash", '{"a":1}')
    assert (call["call_id"], call["name"], call["arguments"]) == ("toolu_2", "Bash", '{"a":1}')
    assert frames[0]["response"]["created_at"] == CREATED


def test_case_48_the_output_limit_is_incomplete() -> None:
    """A call that was cut keeps what there is of it."""
    blocks = [*text_block(0, "x"), *tool_block(1, "f", '{"a')]
    whole = whole_of("messages", [message_start(), *blocks, *message_end("max_tokens")])
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][1]["arguments"] == '{"a'


def test_case_48_a_refusal_is_a_refusal_part_and_completed() -> None:
    """Why it was refused must not get lost."""
    stop_details = {"type": "refusal", "category": "cyber", "explanation": "Not this."}
    frames = [message_start(), *message_end("refusal", stop_details=stop_details)]
    whole = whole_of("messages", frames)
    parts = [part for item in whole["output"] for part in item["content"]]
    assert parts == [{"type": "refusal", "refusal": "Not this."}]
    assert whole["status"] == "completed"


def test_case_48_an_error_of_the_upstream_is_a_failure_with_a_code() -> None:
    """`server_error` is the code that OpenAI's clients know for it."""
    error = {"type": "error", "error": {"type": "api_error", "message": "broken"}}
    flow, frames = failed("messages", [message_start(), *text_block(0, "x")[:2], error])
    assert isinstance(flow.error, UpstreamError)
    assert frames[-1]["response"]["error"]["code"] == "server_error"
    assert "broken" in frames[-1]["response"]["error"]["message"]


def test_case_49_every_item_has_one_short_id() -> None:
    """Copilot's blobs of 400 characters, another one in each event."""
    case = next(case for case in RESPONSES_CASES if case.folder.name == "copilot_ids")
    sent = play(make_flow("responses", "responses"), [case.stream])
    assert check_responses(sent, native=True) == "complete"
    frames = frames_of(sent)
    ids = [frame["item"]["id"] for frame in frames if "item" in frame]
    assert len(ids) == 6 and len(set(ids)) == 3 and max(map(len, ids)) <= 64
    assert [item["id"] for item in frames[-1]["response"]["output"]] == ids[::2]
    assert {f["response"]["id"] for f in frames if "response" in f} == {"gw-1"}
    assert max(map(len, split_words(sent))) < 100, "no blob is left"


def split_words(sent: bytes) -> list[str]:
    """The strings of a stream, roughly."""
    return sent.decode().split('"')


def test_case_50_a_thought_with_its_encrypted_content_becomes_signed_thinking() -> None:
    """Summary parts are paragraphs; what the maker needs is under our mark."""
    whole = whole_of("responses", thoughtful(), "messages")
    block_ = whole["content"][0]
    assert (block_["type"], block_["thinking"]) == ("thinking", "a\n\nb")
    assert opened_envelope(block_["signature"], "gw1.r.")["enc"] == "gAAAEXAMPLE"
    frames = streamed("responses", thoughtful(), "messages")
    deltas = [f["delta"] for f in frames if f["type"] == "content_block_delta"]
    at = next(i for i, delta in enumerate(deltas) if delta["type"] == "signature_delta")
    assert [delta["type"] for delta in deltas[:at]] == ["thinking_delta"] * at
    assert sum(delta["type"] == "signature_delta" for delta in deltas) == 1


def test_case_50_and_9_the_thought_comes_back_as_it_was() -> None:
    """What an Anthropic caller echoes is the upstream's own item again."""
    whole = whole_of("responses", thoughtful(), "messages")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": whole["content"]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "call_2", "content": "r"}],
        },
    ]
    chat = DIALECTS["messages"].read_request({"model": "m", "max_tokens": 9, "messages": messages})
    items = UPSTREAM_DIALECTS["responses"].write_request(chat, model("responses"))["input"]
    kinds_ = [item.get("type") for item in items]
    assert kinds_[1:4] == ["reasoning", "message", "function_call"]
    assert items[1]["encrypted_content"] == "gAAAEXAMPLE"
    assert "\n\n".join(part["text"] for part in items[1]["summary"]) == "a\n\nb"


# ---- calls in their own kinds of item ----------------------------------------------------------

TOOLS: Json = {
    "f": Tool("f", "", {}),
    "apply_patch": Tool("apply_patch", "", {}, kind="custom"),
    "mcp__x__go": Tool("mcp__x__go", "", {}, namespace="mcp__x"),
    "mcp__x__raw": Tool("mcp__x__raw", "", {}, kind="custom", namespace="mcp__x"),
    "tool_search": Tool("tool_search", "", {}, kind="tool_search"),
}
# name -> (what the model called, its arguments, the item without id and call_id)
OWN_KINDS: dict[str, tuple[str, str, Json]] = {
    "a function": ("f", '{"a":1}', {"type": "function_call", "name": "f", "arguments": '{"a":1}'}),
    "a function without arguments": (
        "f",
        "",
        {"type": "function_call", "name": "f", "arguments": "{}"},
    ),
    "a function that was never offered": (
        "g__h",
        "{}",
        {"type": "function_call", "name": "g__h", "arguments": "{}"},
    ),
    "a custom tool": (
        "apply_patch",
        '{"input":"*** Begin Patch\\n é\\ud83d\\ude42"}',
        {
            "type": "custom_tool_call",
            "name": "apply_patch",
            "input": "*** Begin Patch\n é\U0001f642",
        },
    ),
    "a custom tool without input": (
        "apply_patch",
        '{"input":""}',
        {"type": "custom_tool_call", "name": "apply_patch", "input": ""},
    ),
    "a custom tool without arguments": (
        "apply_patch",
        "",
        {"type": "custom_tool_call", "name": "apply_patch", "input": ""},
    ),
    "a custom tool with an input that looks wrapped": (
        "apply_patch",
        '{"input":"{\\"input\\":\\"x\\"}"}',
        {"type": "custom_tool_call", "name": "apply_patch", "input": '{"input":"x"}'},
    ),
    "a custom tool with bare words": (
        "apply_patch",
        "*** Begin Patch",
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Patch"},
    ),
    "a function of a namespace": (
        "mcp__x__go",
        '{"a":1}',
        {
            "type": "function_call",
            "name": "go",
            "namespace": "mcp__x",
            "arguments": '{"a":1}',
        },
    ),
    "a custom tool of a namespace": (
        "mcp__x__raw",
        '{"input":"i"}',
        {"type": "custom_tool_call", "name": "raw", "namespace": "mcp__x", "input": "i"},
    ),
    "the search for tools": (
        "tool_search",
        '{"query":"q"}',
        {"type": "tool_search_call", "execution": "client", "arguments": {"query": "q"}},
    ),
    "the search for tools without arguments": (
        "tool_search",
        "",
        {"type": "tool_search_call", "execution": "client", "arguments": {}},
    ),
}


def called_upstream(upstream: str, name: str, arguments: str) -> list[bytes]:
    """The reads of an answer that calls one tool, its arguments in pieces of three letters."""
    pieces = [arguments[at : at + 3] for at in range(0, len(arguments), 3)]
    if upstream == "kiro":
        said = {"toolUseId": "c1", "name": name}
        grown = [kiro_event("toolUseEvent", {**said, "input": piece}) for piece in pieces]
        return [*grown, kiro_event("toolUseEvent", {**said, "stop": True})]
    if upstream == "messages":
        frames = tool_block(0, name, *pieces)
        frames[0]["content_block"]["id"] = "c1"
        return [wire("messages", [message_start(), *frames, *message_end("tool_use")])]
    heads = [{"index": 0, "id": "c1", "type": "function", "function": {"name": name}}]
    rows = [{"index": 0, "function": {"arguments": piece}} for piece in pieces]
    grown_ = [chunk({"tool_calls": [row]}) for row in [*heads, *rows]]
    return [wire("chat", [*grown_, chunk({}, "tool_calls")])]


KIND_PAIRS = [
    (kind, upstream)
    for kind in OWN_KINDS
    for upstream in ("chat", "messages", "kiro")
    if upstream != "kiro" or "bare words" not in kind  # which are no input of a Kiro tool
]


@pytest.mark.parametrize(("kind", "upstream"), KIND_PAIRS)
def test_a_call_comes_back_in_the_kind_its_tool_was_offered_as(kind: str, upstream: str) -> None:
    """formats.md cases 30 and 31: by the tools of the request."""
    name, arguments, expected = OWN_KINDS[kind]
    reads = called_upstream(upstream, name, arguments)
    flow = make_flow(upstream, "responses", tools=TOOLS)
    sent = play(flow, reads)
    assert check_ending(flow, "responses", sent) == "complete"
    (item,) = frames_of(sent)[-1]["response"]["output"]
    assert {k: v for k, v in item.items() if k not in ("id", "call_id", "status")} == expected
    assert item["call_id"] == "c1"
    prefixes = {"function_call": "fc_", "custom_tool_call": "ctc_", "tool_search_call": "tsc_"}
    assert item["id"].startswith(prefixes[item["type"]])


@pytest.mark.parametrize("upstream", ["chat", "messages", "kiro"])
def test_what_a_caller_is_told_of_a_call_can_be_sent_back(upstream: str) -> None:
    """The item of each kind, echoed with an output, is the same call for the next request."""
    for name, arguments, expected in OWN_KINDS.values():
        if expected["type"] == "custom_tool_call" and not arguments.startswith("{"):
            continue
        flow = make_flow(upstream, "responses", tools=TOOLS)
        sent = play(flow, called_upstream(upstream, name, arguments))
        (item,) = frames_of(sent)[-1]["response"]["output"]
        kind = item["type"] + "_output"
        output: Json = {"type": kind, "call_id": "c1", "output": "r", "tools": []}
        body = {"model": "m", "input": [{"role": "user", "content": "hi"}, item, output]}
        chat = RESPONSES.read_request(body)
        parts = [part for turn in chat.turns for part in turn.blocks]
        (call,) = [part for part in parts if isinstance(part, ToolCall)]
        assert (call.name, call.id) == (name, "c1")
        assert json.loads(call.arguments or "{}") == json.loads(arguments or "{}")


@pytest.mark.parametrize("upstream", ["chat", "messages", "kiro"])
def test_wire_names_become_the_callers_before_their_kind_is_looked_up(upstream: str) -> None:
    """formats.md 5.0: the upstream may know a tool under another name."""
    names = {"mcp_x_go_1": "mcp__x__go", "patch_it": "apply_patch"}
    for wire_name, kind in (("mcp_x_go_1", "function_call"), ("patch_it", "custom_tool_call")):
        flow = make_flow(upstream, "responses", tools=TOOLS, names=names)
        sent = play(flow, called_upstream(upstream, wire_name, '{"input":"x"}'))
        assert check_ending(flow, "responses", sent) == "complete"
        item = frames_of(sent)[-1]["response"]["output"][0]
        assert item["type"] == kind
        assert item["name"] == {"function_call": "go", "custom_tool_call": "apply_patch"}[kind]
        assert wire_name.encode() not in sent


def test_many_calls_have_an_id_each() -> None:
    """In one answer, and in the next one with another id of its own."""
    calls = [chat_call("f", "{}", at) for at in range(20)]
    ids = []
    for answer in ("gw-1", "gw-2"):
        output = whole_of("chat", [*calls, chunk({}, "tool_calls")], id=answer)["output"]
        ids += [item["id"] for item in output]
        assert [item["call_id"] for item in output] == [f"call_{at}" for at in range(20)]
    assert len(set(ids)) == 40


# ---- thinking ----------------------------------------------------------------------------------


def thoughts_read_back(item: Json) -> list[Any]:
    """What the next request of the caller makes of a reasoning item."""
    words = [{"role": "assistant", "content": "T"}, {"role": "user", "content": "go"}]
    body: Json = {"model": "m", "input": [{"role": "user", "content": "hi"}, item, *words]}
    return [
        (part.text, part.signature, part.redacted)
        for turn in RESPONSES.read_request(body).turns
        for part in turn.blocks
        if isinstance(part, Thinking)
    ]


@pytest.mark.parametrize("text", ["hm", 'né \U0001f642\n\n"q" \\', "x" * 5000])
@pytest.mark.parametrize("signature", ["EqQB+/==", "é", "s" * 5000])
def test_a_thought_is_unpacked_exactly_as_it_was_packed(text: str, signature: str) -> None:
    """formats.md 4.5: clients may change the summary, never the encrypted content."""
    blocks = [*thinking_block(0, *text, signature=signature), *text_block(1, "T")]
    item = whole_of("messages", [message_start(), *blocks, *message_end("end_turn")])["output"][0]
    changed = {**item, "summary": [{"type": "summary_text", "text": "something else"}]}
    assert thoughts_read_back(changed) == [(text, signature, "")]
    assert json.loads(json.dumps(item)) == item


def test_redacted_thinking_is_carried_without_a_word() -> None:
    """It has data only."""
    redacted = block(0, {"type": "redacted_thinking", "data": "RRR+/=="})
    frames = [message_start(), *redacted, *text_block(1, "T"), *message_end("end_turn")]
    item = whole_of("messages", frames)["output"][0]
    assert item["type"] == "reasoning" and item["summary"] == []
    assert opened_envelope(item["encrypted_content"], "gw1.a.") == {"data": "RRR+/=="}
    assert thoughts_read_back(item) == [("", "", "RRR+/==")]


def test_a_thought_without_a_signature_carries_nothing() -> None:
    """Nobody could use it again."""
    frames = [chunk({"reasoning_text": "hm"}), chunk({"content": "T"}), chunk({}, "stop")]
    item = whole_of("chat", frames)["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "encrypted_content" not in item


def test_a_hidden_thought_keeps_its_envelope_and_shows_no_word() -> None:
    """`reasoning.summary: none`: no summary event, the text only where it is opaque."""
    blocks = [*thinking_block(0, "secret"), *text_block(1, "T")]
    frames = [message_start(), *blocks, *message_end("end_turn")]
    said = streamed("messages", frames, hide_thinking=True)
    assert not [kind for kind in kinds(said) if "summary" in kind]
    assert "secret" not in json.dumps(said)
    item = whole_of("messages", frames, hide_thinking=True)["output"][0]
    assert item["type"] == "reasoning" and item["summary"] == []
    assert thoughts_read_back(item) == [("secret", "EqQB", "")]


@pytest.mark.parametrize("words", [("", "hm"), ("", "", "hm", ""), ("hm", ""), ("", ""), ()])
@pytest.mark.parametrize("hide", [False, True])
def test_empty_deltas_of_a_thought_open_no_second_part(words: tuple[str, ...], hide: bool) -> None:
    """An Anthropic upstream sends them, and for a thought that it does not show nothing else."""
    blocks = [*thinking_block(0, *words), *text_block(1, "T")]
    frames = [message_start(), *blocks, *message_end("end_turn")]
    item = whole_of("messages", frames, hide_thinking=hide)["output"][0]
    shown = "".join(words) and not hide
    assert item["summary"] == ([{"type": "summary_text", "text": "hm"}] if shown else [])
    assert thoughts_read_back(item) == [("".join(words), "EqQB", "")]


def test_two_thoughts_are_two_items() -> None:
    """With a call between them, as Claude thinks between calls."""
    blocks = [*thinking_block(0, "a", signature="S1"), *tool_block(1, "f", "{}")]
    blocks += thinking_block(2, "b", signature="S2")
    whole = whole_of("messages", [message_start(), *blocks, *message_end("tool_use")])
    assert items_told(whole) == [
        ("thinking", "a", "S1"),
        ("call", "toolu_1", "f", {}),
        ("thinking", "b", "S2"),
    ]


@pytest.mark.parametrize("caller", ["chat", "messages"])
@pytest.mark.parametrize("quiet", [False, True], ids=["with deltas", "without deltas"])
def test_the_last_thought_of_a_responses_upstream_is_remembered_by_its_calls(
    caller: str, quiet: bool
) -> None:
    """Callers without a field for it do not send it back: the words and the signature."""
    kept: list[Any] = []
    frames = [f for f in thoughtful() if not quiet or "summary" not in f["type"]]
    streamed("responses", frames, caller, store_reasoning=lambda *said: kept.append(said))
    ((calls, text, signature),) = kept
    assert calls == ["call_2"]
    assert opened_envelope(signature, "gw1.r.")["enc"] == "gAAAEXAMPLE"
    assert text == "a\n\nb"


def test_a_thought_of_a_responses_upstream_without_words_is_redacted_thinking() -> None:
    """formats.md 4.5: no summary, the same data."""
    item = {"id": "rs_0", "type": "reasoning", "summary": [], "encrypted_content": "gAAAEXAMPLE"}
    frames = complete(
        event("output_item.added", output_index=0, item={**item, "encrypted_content": ""}),
        event("output_item.done", output_index=0, item=item),
        *text_item("T", at=1),
    )
    block_ = whole_of("responses", frames, "messages")["content"][0]
    assert block_["type"] == "redacted_thinking"
    assert opened_envelope(block_["data"], "gw1.r.")["enc"] == "gAAAEXAMPLE"


def test_a_hidden_thought_of_a_responses_upstream_keeps_its_signature() -> None:
    """formats.md 5.6: `display: omitted`."""
    block_ = whole_of("responses", thoughtful(), "messages", hide_thinking=True)["content"][0]
    assert (block_["type"], block_["thinking"]) == ("thinking", "")
    assert opened_envelope(block_["signature"], "gw1.r.")["enc"] == "gAAAEXAMPLE"


def test_raw_reasoning_of_an_open_model_is_thinking() -> None:
    """formats.md 3.6: `reasoning_text` in content parts."""
    place = {"item_id": "rs_0", "output_index": 0, "content_index": 0}
    item: Json = {"id": "rs_0", "type": "reasoning", "summary": []}
    part = {"type": "reasoning_text", "text": ""}
    frames = complete(
        event("output_item.added", output_index=0, item=item),
        event("content_part.added", **place, part=part),
        event("reasoning_text.delta", **place, delta="chain"),
        event("reasoning_text.done", **place, text="chain"),
        event("content_part.done", **place, part={**part, "text": "chain"}),
        event("output_item.done", output_index=0, item={**item, "content": [{**part}]}),
        *text_item("T", at=1),
    )
    content = whole_of("responses", frames, "messages")["content"]
    assert blocks_told({"content": content}) == [("thinking", "chain", ""), ("text", "T")]


# ---- refusals and stop reasons -----------------------------------------------------------------

REASONS = [
    ("messages", "end_turn", "completed", None),
    ("messages", "stop_sequence", "completed", None),
    ("messages", "pause_turn", "completed", None),
    ("messages", "max_tokens", "incomplete", "max_output_tokens"),
    ("messages", "model_context_window_exceeded", "incomplete", "max_output_tokens"),
    ("chat", "stop", "completed", None),
    ("chat", "length", "incomplete", "max_output_tokens"),
    ("chat", "content_filter", "incomplete", "content_filter"),
    ("kiro", "END_TURN", "completed", None),
    ("kiro", "MAX_TOKENS", "incomplete", "max_output_tokens"),
]


@pytest.mark.parametrize(("upstream", "reason", "status", "detail"), REASONS)
def test_a_stop_reason_has_its_status(
    upstream: str, reason: str, status: str, detail: str | None
) -> None:
    """formats.md 4.1."""
    if upstream == "messages":
        data = wire(upstream, [message_start(), *text_block(0, "x"), *message_end(reason)])
    elif upstream == "chat":
        data = wire(upstream, [chunk({"content": "x"}), chunk({}, reason)])
    else:
        data = kiro_event("assistantResponseEvent", {"content": "x"})
        data += kiro_event("metadataEvent", {"stopReason": reason})
    flow = make_flow(upstream, "responses")
    sent = play(flow, [data])
    assert check_ending(flow, "responses", sent) == "complete"
    last = frames_of(sent)[-1]
    assert last["type"] == f"response.{status}"
    assert (last["response"]["incomplete_details"] or {}).get("reason") == detail
    assert items_told(last["response"]) == [("text", "x")]


@pytest.mark.parametrize(
    ("frame", "stop", "finish"),
    [
        (ended(), "end_turn", "stop"),
        (
            ended(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            "max_tokens",
            "length",
        ),
        (
            ended(status="incomplete", incomplete_details={"reason": "content_filter"}),
            "refusal",
            "content_filter",
        ),
        (ended(status="incomplete", incomplete_details=None), "max_tokens", "length"),
    ],
)
def test_a_terminal_event_has_its_stop_reason(frame: Json, stop: str, finish: str) -> None:
    """formats.md 4.1, the other way."""
    frames = [created(), *text_item("x")]
    frame = {**frame, "response": {**frame["response"], "output": done_items(frames)}}
    assert whole_of("responses", [*frames, frame], "messages")["stop_reason"] == stop
    choice = whole_of("responses", [*frames, frame], "chat")["choices"][0]
    assert choice["finish_reason"] == finish


def refused(*words: str) -> list[Json]:
    """A responses stream that refuses."""
    place = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    part = {"type": "refusal", "refusal": "".join(words)}
    opened = {**message_item(), "status": "in_progress"}
    return complete(
        event("output_item.added", output_index=0, item=opened),
        event("content_part.added", **place, part={**part, "refusal": ""}),
        *(event("refusal.delta", **place, delta=word) for word in words),
        event("refusal.done", **place, refusal="".join(words)),
        event("content_part.done", **place, part=part),
        event("output_item.done", output_index=0, item=message_item(part)),
    )


def test_a_refusal_of_a_responses_upstream_is_a_refusal_everywhere() -> None:
    """formats.md 5.6: text and the stop reason for one caller, `refusal` for the other."""
    whole = whole_of("responses", refused("I ", "won't."), "messages")
    assert whole["content"] == [{"type": "text", "text": "I won't."}]
    assert whole["stop_reason"] == "refusal"
    choice = whole_of("responses", refused("I ", "won't."), "chat")["choices"][0]
    assert choice["message"]["refusal"] == "I won't."
    assert choice["finish_reason"] in ("stop", "content_filter")


def test_a_refusal_of_a_chat_upstream_is_a_refusal_part() -> None:
    """With its words, as `refusal` deltas."""
    frames = [chunk({"refusal": "I "}), chunk({"refusal": "won't."}), chunk({}, "stop")]
    whole = whole_of("chat", frames)
    assert whole["output"][0]["content"] == [{"type": "refusal", "refusal": "I won't."}]
    assert whole["status"] == "completed"
    assert "refusal.delta" in kinds(streamed("chat", frames))


# ---- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
def test_copilots_bill_is_read(caller: str, inside: bool) -> None:
    """copilot.md 6.2: `copilot_usage` is beside the response or in it."""
    rows = [("input", 9), ("cache_read", 6), ("cache_write", 5)]
    tokens = [{"token_type": kind, "token_count": count} for kind, count in rows]
    bill = {"copilot_usage": {"total_nano_aiu": 120000, "token_details": tokens}}
    frames = complete(*text_item("x"), usage=counted(20, 8, 6))
    (frames[-1]["response"] if inside else frames[-1]).update(bill)
    flow = make_flow("responses", caller)
    play(flow, [wire("responses", frames)])
    usage = flow.usage
    assert (usage.input, usage.cache_read, usage.cache_write) == (9, 6, 5)
    assert (usage.output, usage.nano_credits, usage.source) == (8, 120000, "reported")


@pytest.mark.parametrize("caller", DIALECTS)
def test_a_native_answers_usage_is_read(caller: str) -> None:
    """formats.md 4.2: input includes what was cached."""
    details = {"output_tokens_details": {"reasoning_tokens": 3}}
    frames = complete(*text_item("x"), usage=counted(20, 8, 6, **details))
    flow = make_flow("responses", caller)
    play(flow, [wire("responses", frames)])
    usage = flow.usage
    assert (usage.input, usage.cache_read, usage.output, usage.reasoning) == (14, 6, 8, 3)
    assert usage.prompt == 20 and usage.source == "reported"


@pytest.mark.parametrize("caller", DIALECTS)
def test_an_answer_that_nobody_counted_is_estimated(caller: str) -> None:
    """formats.md 4.2."""
    frames = complete(*text_item("word " * 40), usage=None)
    flow = make_flow("responses", caller)
    play(flow, [wire("responses", frames)])
    assert flow.usage.source == "estimated" and flow.usage.output > 20
    whole = whole_of("messages", [message_start(), *text_block(0, "x"), *message_end("end_turn")])
    assert whole["usage"]["total_tokens"] == 9


# ---- what the response repeats of the request --------------------------------------------------


def test_a_response_repeats_what_was_asked() -> None:
    """formats.md 3.5: in the first event as in the last."""
    asked = {
        "model": "asked",
        "input": "hi",
        "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": "required",
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "low"},
        "temperature": 0,
        "parallel_tool_calls": False,
        "max_output_tokens": 77,
        "metadata": {"a": "b"},
    }
    frames = streamed("chat", [chunk({"content": "x"}), chunk({}, "stop")], request_body=asked)
    for frame in (frames[0], frames[-1]):
        for key in asked.keys() - {"model", "input"}:
            assert frame["response"][key] == asked[key], key
        assert "input" not in frame["response"]
        assert frame["response"]["model"] == "asked"


def test_a_response_has_all_that_clients_look_for() -> None:
    """formats.md 3.5, where nothing was said."""
    whole = whole_of("chat", [chunk({"content": "x"}), chunk({}, "stop")])
    keys = "id object created_at status error incomplete_details instructions max_output_tokens"
    keys += " model output parallel_tool_calls previous_response_id reasoning store temperature"
    keys += " text tool_choice tools top_p truncation usage user metadata"
    assert whole.keys() == set(keys.split())


# ---- errors ------------------------------------------------------------------------------------

SAID_ERRORS: list[tuple[Json, type[ApiError], str]] = [
    ({"code": "rate_limit_exceeded", "message": "slow"}, RateLimited, "rate_limit_exceeded"),
    ({"code": "insufficient_quota", "message": "all gone"}, QuotaExceeded, "insufficient_quota"),
    (
        {"code": "context_length_exceeded", "message": "long"},
        ContextTooLong,
        "context_length_exceeded",
    ),
    ({"code": "invalid_prompt", "message": "no"}, InvalidRequest, "invalid_prompt"),
    ({"code": "server_error", "message": "broken"}, UpstreamError, "server_error"),
    ({"code": "server_is_overloaded", "message": "busy"}, Overloaded, "server_is_overloaded"),
]


def error_frames(said: Json) -> dict[str, Json]:
    """The ways in which a responses upstream fails."""
    return {
        "response.failed": event("failed", response=response("failed", error=said)),
        "flat": {"type": "error", **said, "param": None},
        "nested": {"type": "error", "error": said, "copilot_quota_snapshots": {}},
        "untyped": {"error": said},
    }


@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize("form", error_frames({}))
@pytest.mark.parametrize(("said", "kind", "code"), SAID_ERRORS)
def test_an_error_before_the_first_frame_is_no_frame(
    said: Json, kind: type[ApiError], code: str, form: str, caller: str
) -> None:
    """It can still become a status."""
    flow = make_flow("responses", caller)
    assert play(flow, [write_frames([error_frames(said)[form]], names=False)]) == b""
    assert type(flow.error) is kind, code


@pytest.mark.parametrize("form", error_frames({}))
@pytest.mark.parametrize(("said", "kind", "code"), SAID_ERRORS)
@pytest.mark.parametrize("caller", DIALECTS)
def test_an_error_in_the_middle_ends_the_stream(
    said: Json, kind: type[ApiError], code: str, form: str, caller: str
) -> None:
    """And nothing that comes after it is heard."""
    frames = [created(), *text_item("x")[:3], error_frames(said)[form], *text_item("y", at=1)]
    flow, _ = failed("responses", frames, caller)
    assert type(flow.error) is kind, code


@pytest.mark.parametrize("form", error_frames({}))
@pytest.mark.parametrize(("said", "kind", "code"), SAID_ERRORS)
def test_a_failure_of_a_native_answer_keeps_its_code(
    said: Json, kind: type[ApiError], code: str, form: str
) -> None:
    """formats.md 3.6: Codex tells by it whether to try again, and how to word it."""
    frames = [created(), *text_item("x")[:3], error_frames(said)[form]]
    _, sent = failed("responses", frames)
    assert sent[-1]["response"]["error"]["code"] == code, kind


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_failure_from_below_before_and_behind_the_first_frame(upstream: str) -> None:
    """Held as an error while it can be a status; a `response.failed` with its code later."""
    error = UpstreamTimeout("Nothing came for a minute.")
    flow = make_flow(upstream, "responses")
    assert flow.end(error) == b"" and flow.error is error
    flow = make_flow(upstream, "responses")
    flow.has_output = True  # the head went out while the upstream was silent
    sent = flow.ping() + flow.end(error)
    frames = frames_of(sent)
    assert kinds(frames) == ["created", "failed"]
    assert frames[-1]["response"]["error"]["code"] in ("upstream_timeout", "server_error")
    assert check_responses(sent) == "error"


def test_kiros_exception_in_the_middle_is_a_failure() -> None:
    """A throttle is a rate limit for Codex, which waits then."""
    words = kiro_event("assistantResponseEvent", {"content": "par"})
    thrown = exception_frame("ThrottlingException", {"message": "Too many requests."})
    flow = make_flow("kiro", "responses")
    sent = play(flow, [words, thrown])
    assert check_ending(flow, "responses", sent) == "error"
    assert isinstance(flow.error, RateLimited)
    said = frames_of(sent)[-1]["response"]["error"]
    assert said["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("upstream", ["chat", "messages", "responses"])
@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize("stream", [True, False])
def test_an_upstream_that_says_nothing_is_an_error(
    upstream: str, caller: str, stream: bool
) -> None:
    """An empty body, comments only, or a lone [DONE]."""
    for data in (b"", b": ping\n\n", b"data: [DONE]\n\n", b"\n\n\n"):
        flow = make_flow(upstream, caller, stream=stream)
        assert play(flow, [data]) == b""
        assert isinstance(flow.error, UpstreamError)


@pytest.mark.parametrize("caller", DIALECTS)
def test_a_cancelled_response_is_a_failure(caller: str) -> None:
    """copilot.md 6.2: a terminal event, but no answer; streamed or whole."""
    cancelled = response("cancelled")
    frames = [created(), *text_item("x")[:3], event("cancelled", response=cancelled)]
    failed("responses", frames, caller)
    flow = make_flow("responses", caller, stream=False)
    flow.feed_buffered(json.dumps(cancelled).encode())
    assert flow.error is not None


def test_an_error_text_is_redacted() -> None:
    """Nothing that looks like a token goes on."""
    said = {"code": "server_error", "message": "bad ghu_abcdefgh1234EXAMPLE"}
    frames = [created(), *text_item("x")[:3], error_frames(said)["response.failed"]]
    _, sent = failed("responses", frames)
    assert "ghu_" not in json.dumps(sent)


# ---- reading what upstreams leave out ----------------------------------------------------------


def everything() -> list[Json]:
    """A responses stream with an item of each kind that is read."""
    refusal = copy.deepcopy(refused("No.")[1:-1])
    for frame in refusal:
        frame["output_index"] = 4
        if "item" in frame:
            frame["item"]["id"] = "msg_4"
        if "item_id" in frame:
            frame["item_id"] = "msg_4"
    place = {"item_id": "ctc_5", "output_index": 5}
    custom = {"id": "ctc_5", "type": "custom_tool_call", "call_id": "call_5", "name": "p"}
    return complete(
        *thoughtful()[1:-1],
        *call_item("g", '{"b":', "2}", at=3),
        *refusal,
        event(
            "output_item.added",
            output_index=5,
            item={**custom, "status": "in_progress", "input": ""},
        ),
        event("custom_tool_call_input.delta", **place, delta="in"),
        event("custom_tool_call_input.done", **place, input="in"),
        event(
            "output_item.done",
            output_index=5,
            item={**custom, "status": "completed", "input": "in"},
        ),
    )


LEFT_OUT: dict[str, Callable[[str], bool]] = {
    "deltas": lambda kind: kind.endswith(".delta"),
    "all but the items' ends": lambda kind: (
        not kind.endswith(("created", "output_item.done", "completed"))
    ),
    "the items' ends": lambda kind: kind.endswith("output_item.done"),
    "content parts": lambda kind: "content_part." in kind,
    "words that are repeated": lambda kind: kind.endswith(("_text.done", "refusal.done")),
    "all but the last": lambda kind: not kind.endswith(("created", "completed")),
    "the first": lambda kind: kind.endswith("created"),
    "all but the terminal event": lambda kind: not kind.endswith("completed"),
}


@pytest.mark.parametrize("caller", ["chat", "messages"])
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_an_answer_means_the_same_whatever_its_upstream_leaves_out(
    left_out: str, caller: str
) -> None:
    """formats.md 5.6, copilot.md 6.2: each word comes up to three times, and once is enough."""
    expected = whole_of("responses", everything(), caller)
    frames = [frame for frame in everything() if not LEFT_OUT[left_out](frame["type"])]
    assert whole_of("responses", frames, caller) == expected


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_a_native_whole_answer_is_complete_whatever_its_upstream_leaves_out(left_out: str) -> None:
    """The terminal event has it all."""
    frames = [frame for frame in everything() if not LEFT_OUT[left_out](frame["type"])]
    flow = make_flow("responses", "responses", stream=False)
    assert play(flow, [wire("responses", frames)]) == b""
    assert len(flow.response_body()["output"]) == 6


@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize("output", [[], None])
def test_a_terminal_event_without_items_takes_none_away(caller: str, output: Any) -> None:
    """What was told as done is in the whole answer, also for a native caller."""
    frames = [*everything()[:-1], ended()]
    frames[-1]["response"]["output"] = output
    flow = make_flow("responses", caller, stream=False)
    assert play(flow, [wire("responses", frames)]) == b""
    expected = make_flow("responses", caller, stream=False)
    play(expected, [wire("responses", everything())])
    whole, wanted = flow.response_body(), expected.response_body()
    for key in ("output", "content", "choices"):
        assert whole.get(key) == wanted.get(key)


@pytest.mark.parametrize("caller", ["chat", "messages"])
@pytest.mark.parametrize("repeat", range(30))
def test_items_in_any_order_of_their_events_keep_their_place(caller: str, repeat: int) -> None:
    """Seeded ways to interleave the events of all items, each item's in its own order."""
    rng = random.Random(SEED + repeat)
    frames = everything()
    waiting: dict[int, list[Json]] = {}
    for frame in frames[1:-1]:
        waiting.setdefault(frame["output_index"], []).append(frame)
    mixed: list[Json] = []
    while waiting:
        at = rng.choice(list(waiting))
        mixed.append(waiting[at].pop(0))
        if not waiting[at]:
            del waiting[at]
    expected = whole_of("responses", frames, caller)
    assert whole_of("responses", [frames[0], *mixed, frames[-1]], caller) == expected


@pytest.mark.parametrize("caller", ["chat", "messages"])
def test_parts_that_came_in_different_ways_are_all_kept(caller: str) -> None:
    """The first part in deltas, the second only in the item's end."""
    frames = text_item("one ")
    frames[-1]["item"]["content"].append(output_text("two"))
    said = json.dumps(whole_of("responses", complete(*frames), caller))
    assert "one " in said and "two" in said


@pytest.mark.parametrize("caller", ["chat", "messages"])
def test_the_input_of_a_custom_call_that_a_limit_cut_is_kept(caller: str) -> None:
    """No end of the item, and no item in the terminal event."""
    place = {"item_id": "ctc_0", "output_index": 0}
    item = {"id": "ctc_0", "type": "custom_tool_call", "call_id": "c", "name": "p", "input": ""}
    frames = [
        created(),
        event("output_item.added", output_index=0, item=item),
        event("custom_tool_call_input.delta", **place, delta="*** Begin"),
        ended(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
    ]
    assert "*** Begin" in json.dumps(whole_of("responses", frames, caller))


@pytest.mark.parametrize("caller", DIALECTS)
def test_events_that_nobody_knows_disturb_nothing(caller: str) -> None:
    """Between any two events: kept or dropped, never a gap, never a failure."""
    strangers: list[Json] = [
        {"type": "keepalive", "sequence_number": 7},
        {"type": "ping"},
        {"type": "response.queued", "response": response("queued")},
        {"type": "copilot.notice", "output_index": 0, "delta": "ghost"},
        {"comment": 1},
    ]
    frames = everything()
    expected = whole_of("responses", frames, caller)
    for stranger in strangers[:2] + strangers[3:]:
        for at in range(1, len(frames)):
            mixed = [*frames[:at], {**stranger}, *frames[at:]]
            flow = make_flow("responses", caller)
            sent = play(flow, [write_frames(mixed, names=False)])
            assert check_ending(flow, caller, sent) == "complete"
            assert b"ghost" not in sent
    mixed = [frames[0], *strangers, *frames[1:]]
    flow = make_flow("responses", caller, stream=False)
    play(flow, [write_frames(mixed, names=False)])
    assert flow.response_body() == expected


# ---- native answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_native_answer_has_the_callers_model_and_our_id(stream: bool) -> None:
    """In every response object of the stream."""
    flow = make_flow("responses", "responses", stream=stream)
    sent = play(flow, [wire("responses", everything())])
    heads = (
        [f["response"] for f in frames_of(sent) if "response" in f]
        if stream
        else [flow.response_body()]
    )
    assert {(head["id"], head["model"]) for head in heads} == {("gw-1", "asked")}


@pytest.mark.parametrize("stream", [True, False])
def test_a_native_answers_tool_names_become_the_callers(stream: bool) -> None:
    """formats.md 5.0: in the call's events, in its items and in the last response."""
    names = {"g": "my.tool", "p": "my.patch"}
    flow = make_flow("responses", "responses", stream=stream, names=names)
    sent = play(flow, [wire("responses", everything())])
    frames = frames_of(sent) if stream else [{"response": flow.response_body()}]
    output = frames[-1]["response"]["output"]
    assert [item["name"] for item in output if "name" in item] == ["Bash", "my.tool", "my.patch"]
    text = json.dumps(frames)
    assert '"name": "g"' not in text and '"name": "p"' not in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_native_answers_words_and_thoughts_are_untouched(stream: bool) -> None:
    """Encrypted content, summaries, arguments and inputs pass as they are."""
    flow = make_flow("responses", "responses", stream=stream)
    sent = play(flow, [wire("responses", everything())])
    whole = frames_of(sent)[-1]["response"] if stream else flow.response_body()
    expected = everything()[-1]["response"]["output"]
    assert [{**item, "id": ""} for item in whole["output"]] == [
        {**item, "id": ""} for item in expected
    ]


def test_a_native_answer_is_numbered_here() -> None:
    """Whatever numbers the upstream gave."""
    frames = everything()
    for numbers in ([7] * len(frames), list(range(len(frames), 0, -1)), [None] * len(frames)):
        said = [
            copy.deepcopy({**frame, "sequence_number": number})
            for frame, number in zip(frames, numbers, strict=True)
        ]
        flow = make_flow("responses", "responses")
        sent = play(flow, [write_frames(said, names=True)])
        assert check_ending(flow, "responses", sent) == "complete"


def test_a_native_answer_whose_beginning_is_missing_gets_one() -> None:
    """openai-python raises where the first event is another one."""
    sent = streamed("responses", everything()[1:])
    assert sent[0]["type"] == "response.created" and sent[0]["response"]["output"] == []


def test_a_native_answer_is_over_at_its_terminal_event() -> None:
    """The connection may stay open: the caller's end does not wait for the upstream's."""
    flow = make_flow("responses", "responses")
    sent = flow.feed(wire("responses", everything()))
    assert flow.is_finished and check_ending(flow, "responses", sent) == "complete"


def test_a_native_answer_tells_one_time() -> None:
    """The upstream's own or ours: in its events, in signs of life, and in a failure."""
    frames = everything()
    frames[0]["response"]["created_at"] = frames[-1]["response"]["created_at"] = 1763800005
    data = wire("responses", frames)
    for cut in (len(data), len(data) // 2):
        flow = make_flow("responses", "responses")
        sent = flow.feed(data[:300]) + flow.feed(data[300:600]) + flow.ping()
        sent += flow.feed(data[600:cut]) + flow.end()
        check_ending(flow, "responses", sent)


def test_quota_snapshots_stay_here() -> None:
    """copilot.md 6.2: they are the account's affair."""
    frames = everything()
    for frame in frames:
        frame["copilot_quota_snapshots"] = {"premium_interactions": {"entitlement": "1500"}}
    assert "entitlement" not in json.dumps(streamed("responses", frames))


# ---- whole answers of an upstream --------------------------------------------------------------


def said_whole(case: Case) -> Json:
    """The response that a case's upstream would give without streaming."""
    reader = SseReader()
    whole: Json = reader.frames(reader.complete(case.stream))[-1]["response"]
    return whole


@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize("case", RESPONSES_CASES, ids=lambda case: case.name)
def test_an_upstreams_whole_answer_means_what_its_stream_means(case: Case, caller: str) -> None:
    """An upstream may answer with one object, whatever it was asked."""
    data = json.dumps(said_whole(case)).encode()
    flow = make_flow("responses", caller, stream=False)
    assert flow.feed_buffered(data) == b""
    if case.folder.name != "copilot_ids":  # whose bill and other ids stand beside the response
        assert plain_whole(flow.response_body()) == case.whole(caller)
    flow = make_flow("responses", caller)
    sent = flow.feed_buffered(data)
    assert check_ending(flow, caller, sent) == "complete"


@pytest.mark.parametrize("case", RESPONSES_CASES, ids=lambda case: case.name)
def test_a_whole_answer_unfolds_into_the_words_of_its_stream(case: Case) -> None:
    """They come as deltas for a native caller too: AI SDK clients read nothing else."""
    whole = said_whole(case)
    flow = make_flow("responses", "responses")
    sent = frames_of(flow.feed_buffered(json.dumps(whole).encode()))

    def words(told: list[Json]) -> str:
        return "".join(f["delta"] for f in told if f["type"].endswith("output_text.delta"))

    expected = "".join(
        part.get("text", "")
        for item in whole["output"]
        if item["type"] == "message"
        for part in item["content"]
    )
    assert words(sent) == expected


@pytest.mark.parametrize("caller", DIALECTS)
@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b'{"output":[', b"{}", b"null", b'{"output":null}']
)
def test_a_whole_answer_that_is_none_is_an_error(caller: str, data: bytes) -> None:
    """Never a 200 with nothing in it."""
    for stream in (True, False):
        flow = make_flow("responses", caller, stream=stream)
        flow.feed_buffered(data)
        assert flow.error is not None


# ---- stop strings cut here ---------------------------------------------------------------------


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_stop_string_split_over_deltas_ends_the_answer(upstream: str) -> None:
    """The item is complete, the response too, and the upstream can be hung up on."""
    words = ["one S", "T", "OP two"]
    data = {
        "chat": lambda: wire("chat", [chunk({"content": word}) for word in words]),
        "messages": lambda: wire("messages", [message_start(), *text_block(0, *words)[:-1]]),
        "responses": lambda: wire("responses", [created(), *text_item(*words)[:-3]]),
        "kiro": lambda: b"".join(
            kiro_event("assistantResponseEvent", {"content": word}) for word in words
        ),
    }[upstream]()
    for reads in ([data], one_by_one(data)):
        flow = make_flow(upstream, "responses", stop_strings=["STOP"])
        sent = b"".join(flow.feed(read) for read in reads)
        assert flow.is_finished, "before the upstream has ended"
        assert check_responses(sent) == "complete"
        last = frames_of(sent)[-1]
        assert last["type"] == "response.completed"
        assert items_told(last["response"]) == [("text", "one ")]
        assert last["response"]["usage"]["output_tokens"] > 0
        assert flow.end() == b""


@pytest.mark.parametrize("caller", ["chat", "messages"])
def test_a_stop_string_of_a_responses_upstream_is_cut(caller: str) -> None:
    """That dialect has no such field."""
    frames = complete(*text_item("one S", "T", "OP two"))
    whole = whole_of("responses", frames, caller, stop_strings=["STOP"])
    if caller == "messages":
        assert whole["content"] == [{"type": "text", "text": "one "}]
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "STOP")
    else:
        assert whole["choices"][0]["message"]["content"] == "one "
        assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("upstream", ["chat", "messages"])
def test_a_stop_string_at_the_beginning_leaves_an_empty_message(upstream: str) -> None:
    """And text that only looks like one is told in the end."""
    for words, told in ((("STOP", "x"), ""), (("x ST",), "x ST")):
        frames = [*(chunk({"content": word}) for word in words), chunk({}, "stop")]
        if upstream == "messages":
            frames = [message_start(), *text_block(0, *words), *message_end("end_turn")]
        whole = whole_of(upstream, frames, stop_strings=["STOP"])
        assert "".join(said for _, said in items_told(whole)) == told


# ---- odd values --------------------------------------------------------------------------------

#: every writer of a stream, and the one way in which events become a whole answer
EACH_WRITER = pytest.mark.parametrize(
    ("caller", "stream"), [*((caller, True) for caller in DIALECTS), ("responses", False)]
)
ODD_VALUES: list[Any] = [None, "", "x", 0, -1, 7, 10**400, True, [], {}, [None], [7], {"a": 1}]


def odd_versions(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was changed, the value) with something odd at each path."""
    for odd in ODD_VALUES:
        yield f" = {odd!r:.20}", odd
    if isinstance(value, dict):
        for key in value:
            without = {k: v for k, v in value.items() if k != key}
            yield f".{key} removed", without
            for where, inner in odd_versions(value[key]):
                yield f".{key}{where}", {**without, key: inner}
    elif isinstance(value, list):
        for at, item in enumerate(value):
            for where, inner in odd_versions(item):
                yield f".*{where}", [*value[:at], inner, *value[at + 1 :]]


def odd_streams() -> Iterator[tuple[str, bytes]]:
    """The stream of everything, with something odd at each place of each frame."""
    frames = everything()
    for frame in frames:
        frame.pop("logprobs", None)
    rows = [write_frames([frame], names=False) for frame in frames]
    seen: set[str] = set()
    for at, frame in enumerate(frames):
        for where, odd in odd_versions(frame):
            place = f"{frame['type']}{where} {frame.get('output_index')}"
            if place in seen:
                continue  # the same place of another delta
            seen.add(place)
            row = f"data: {json.dumps(odd)}\n\n".encode()
            yield place, b"".join([*rows[:at], row, *rows[at + 1 :]])


def strange(flow: StreamTranslator, run: Callable[[], object]) -> str:
    """What went wrong in a way that it must not; an ApiError is right."""
    try:
        run()
        if not flow.stream and not flow.error:
            flow.response_body()
    except ApiError:
        return ""
    except Exception as error:  # noqa: BLE001 - each kind is told with its place
        return f"{type(error).__name__}: {error}"
    return ""


@EACH_WRITER
def test_no_strange_value_anywhere_in_a_stream_is_more_than_an_error(
    caller: str, stream: bool
) -> None:
    """Whatever a responses upstream puts at any place: an answer or an ApiError."""
    broken: set[str] = set()
    for place, data in odd_streams():
        flow = make_flow("responses", caller, stream=stream)
        fault = strange(flow, functools.partial(play, flow, [data]))
        broken |= {f"{place}: {fault}"} if fault else set()
        assert flow.is_finished or fault, place
    assert not broken, "\n".join(sorted(broken))


@EACH_WRITER
def test_no_strange_value_anywhere_in_a_whole_answer_is_more_than_an_error(
    caller: str, stream: bool
) -> None:
    """The same for an upstream that answers with one object."""
    broken: set[str] = set()
    for place, whole in odd_versions(everything()[-1]["response"]):
        flow = make_flow("responses", caller, stream=stream)
        data = json.dumps(whole).encode()
        fault = strange(flow, functools.partial(flow.feed_buffered, data))
        broken |= {f"response{place}: {fault}"} if fault else set()
    assert not broken, "\n".join(sorted(broken))


@pytest.mark.parametrize("caller", DIALECTS)
def test_any_events_in_any_order_follow_the_callers_grammar(caller: str) -> None:
    """Seeded shuffles, repetitions and losses: an answer in the grammar, or an error in it."""
    rng = random.Random(SEED)
    frames = everything()
    for round_ in range(300):
        some = [copy.deepcopy(rng.choice(frames)) for _ in range(rng.randint(1, 40))]
        flow = make_flow("responses", caller)
        sent = play(flow, [write_frames(some, names=False)])
        assert flow.is_finished, round_
        if caller == "responses":
            events = frames_of(sent)
            numbers = [frame["sequence_number"] for frame in events]
            assert numbers == list(range(len(events)))
            assert not events or events[0]["type"] == "response.created"
            terminal = [f for f in events if f["type"] in ("response.completed", "response.failed")]
            assert terminal == events[-1:]
        else:
            check_ending(flow, caller, sent)


@pytest.mark.parametrize("upstream", ["chat", "messages"])
def test_odd_values_of_other_upstreams_follow_the_responses_grammar(upstream: str) -> None:
    """Whatever they put at any place, a responses caller hears a legal stream."""
    frames: list[Json] = [
        chunk({"role": "assistant", "reasoning_text": "hm", "reasoning_opaque": "B=="}),
        chunk({"content": "T"}),
        chunk({"refusal": "no"}),
        chat_call("apply_patch", '{"input":"x"}'),
        chunk({}, "tool_calls"),
    ]
    if upstream == "messages":
        frames = [
            message_start(),
            *thinking_block(0, "hm"),
            *text_block(1, "T"),
            *tool_block(2, "apply_patch", '{"input":"x"}'),
            *message_end("tool_use"),
        ]
    for at, frame in enumerate(frames):
        for where, odd in odd_versions(frame):
            row = f"data: {json.dumps(odd)}\n\n".encode()
            before = write_frames(frames[:at], names=False)
            data = before + row + write_frames(frames[at + 1 :], names=False)
            flow = make_flow(upstream, "responses", tools=TOOLS)
            try:
                check_ending(flow, "responses", play(flow, [data]))
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"frame {at}{where}: {error}") from error
