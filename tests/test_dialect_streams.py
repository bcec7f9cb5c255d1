"""Section 8, answers: readers, writers, relays, and translating one response."""

from __future__ import annotations

import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from goldens import (
    CALLERS,
    CASES,
    GRAMMARS,
    PAIR_IDS,
    PAIRS,
    REQUEST_ID,
    Case,
    Json,
    check_ending,
    check_messages,
    has_finished,
    make_flow,
    one_by_one,
    pass_on,
    play,
    split_events,
    write_frames,
)
from support import growth

from aiclient_api import (
    DIALECTS,
    ApiError,
    ContextTooLong,
    Overloaded,
    RateLimited,
    SseReader,
    StreamTranslator,
    UpstreamError,
)

SEED = 20261122
TAILS = {
    "comment": b": bye\n\n",
    "done": b"data: [DONE]\n\n",
    "ghost chunk": b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"ghost"}}]}\n\n',
    "ghost event": b'event: content_block_start\ndata: {"type":"content_block_start","index":9,'
    b'"content_block":{"type":"text","text":"ghost"}}\n\n',
    "ghost finish": b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n',
    "error": b'data: {"type":"error","error":{"type":"api_error","message":"late"}}\n\n',
    "garbage": b"data: \xff\x00 {]\n\n",
    "torn frame": b'data: {"choices":[{"in',
}


def meaning(sent: bytes) -> list[Any]:
    """The events of a stream with their JSON read."""
    return [
        (name, data if data == "[DONE]" else json.loads(data)) for name, data in split_events(sent)
    ]


def chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
    """One chat chunk of an upstream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "created": 1763800000, "model": "m", "choices": [choice], **more}


def fragment(index: int, arguments: str = "", **more: str) -> Json:
    """A delta with a piece of one call."""
    function = {"arguments": arguments}
    if "name" in more:
        function["name"] = more.pop("name")
    return {"tool_calls": [{"index": index, **more, "function": function}]}


def usage_chunk(prompt: int, completion: int, **more: Any) -> Json:
    """The chunk that counts."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, **more}
    return {"id": "c", "created": 1763800000, "model": "m", "choices": [], "usage": usage}


def message_start(**usage: int) -> Json:
    """The first event of an Anthropic upstream."""
    counted = {"input_tokens": 6, "output_tokens": 1, **usage}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "up", "content": []}
    stop: Json = {"stop_reason": None, "stop_sequence": None}
    return {"type": "message_start", "message": {**message, **stop, "usage": counted}}


def block(index: int, start: Json, *deltas: Json) -> list[Json]:
    """A content block from its start to its end."""
    grown = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
    first = {"type": "content_block_start", "index": index, "content_block": start}
    return [first, *grown, {"type": "content_block_stop", "index": index}]


def text_block(index: int, *words: str) -> list[Json]:
    """A text block."""
    deltas = [{"type": "text_delta", "text": word} for word in words]
    return block(index, {"type": "text", "text": ""}, *deltas)


def message_end(reason: str, output: int = 2, **delta: Any) -> list[Json]:
    """The last two events."""
    said = {"stop_reason": reason, "stop_sequence": None, **delta}
    usage = {"output_tokens": output}
    return [{"type": "message_delta", "delta": said, "usage": usage}, {"type": "message_stop"}]


def answer(upstream: str, caller: str, frames: list[Json], **changes: Any) -> list[Json]:
    """The caller's frames for an upstream's, checked against the caller's grammar."""
    flow = make_flow(upstream, caller, **changes)
    sent = play(flow, [write_frames(frames, names=upstream == "messages")])
    assert check_ending(flow, caller, sent) == "complete"
    return [json.loads(data) for _, data in split_events(sent) if data != "[DONE]"]


def whole_answer(upstream: str, caller: str, frames: list[Json], **changes: Any) -> Json:
    """The caller's answer without streaming."""
    flow = make_flow(upstream, caller, stream=False, **changes)
    assert play(flow, [write_frames(frames, names=upstream == "messages")]) == b""
    return flow.response_body()


def kinds(frames: list[Json]) -> list[str]:
    """The types of Anthropic events."""
    return [frame["type"] for frame in frames]


def deltas(frames: list[Json]) -> list[Json]:
    """The deltas of chat chunks with a choice."""
    return [frame["choices"][0]["delta"] for frame in frames if frame["choices"]]


def cuts_of(stream: bytes) -> list[int]:
    """Where a stream is cut: at every offset of a small one, else about each line's end closely."""
    if len(stream) < 1000:
        return list(range(len(stream)))
    ends = [at for at, byte in enumerate(stream) if byte == ord("\n")]
    close = {at + near for at in ends for near in range(-3, 4)}
    return sorted(close.intersection(range(len(stream))) | set(range(0, len(stream), 3)))


# ---- every golden stream -----------------------------------------------------------------------


def test_there_are_goldens_for_each_dialect() -> None:
    """A folder that moved must not turn the tests below into nothing."""
    assert {case.upstream for case in CASES} == set(CALLERS)
    assert 10 <= len(CASES) <= 14


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_becomes_what_was_written_down(case: Case, caller: str) -> None:
    """One read for the whole stream."""
    flow = make_flow(case.upstream, caller)
    sent = play(flow, [case.stream])
    assert meaning(sent) == meaning(case.expected(caller))
    assert check_ending(flow, caller, sent) == "complete"


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_what_was_written_down_follows_the_grammar(case: Case, caller: str) -> None:
    """The expectations themselves are held to the vendors' grammars."""
    assert GRAMMARS[caller](case.expected(caller)) == "complete"


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_fed_byte_by_byte_becomes_the_same(case: Case, caller: str) -> None:
    """Reads may end anywhere, in the middle of a character too."""
    flow = make_flow(case.upstream, caller)
    assert meaning(play(flow, one_by_one(case.stream))) == meaning(case.expected(caller))


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_in_random_reads_becomes_the_same(case: Case, caller: str) -> None:
    """Fifty seeded ways to cut the same bytes."""
    rng = random.Random(f"{SEED}{case.name}")
    told = meaning(case.expected(caller))
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(case.stream)), rng.randint(1, 12)))
        ends = [0, *cuts, len(case.stream)]
        reads = [case.stream[a:b] for a, b in itertools.pairwise(ends)]
        assert meaning(play(make_flow(case.upstream, caller), reads)) == told


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_folds_to_the_whole_answer(case: Case, caller: str) -> None:
    """Without streaming nothing is sent before the end, and the answer is the fold."""
    for reads in ([case.stream], one_by_one(case.stream)):
        flow = make_flow(case.upstream, caller, stream=False)
        assert play(flow, reads) == b""
        assert flow.response_body() == case.whole(caller)


@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_what_comes_behind_the_end_is_not_heard(case: Case, caller: str, tail: str) -> None:
    """Behind `[DONE]` or `message_stop` the answer is over, in the same read or in a later one."""
    ended = case.upstream == "messages" or b"[DONE]" in case.stream
    stream = case.stream if ended else case.stream + b"data: [DONE]\n\n"
    for reads in ([stream + TAILS[tail]], [stream, TAILS[tail]]):
        assert meaning(play(make_flow(case.upstream, caller), reads)) == meaning(
            case.expected(caller)
        )


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_cut_anywhere_never_looks_finished(case: Case, caller: str) -> None:
    """formats.md case 42: a torn answer is an error frame, or an error before the first byte."""
    for cut in cuts_of(case.stream):
        seen = case.stream[:cut]
        flow = make_flow(case.upstream, caller)
        sent = play(flow, [seen])
        outcome = check_ending(flow, caller, sent)
        assert outcome == "error" or has_finished(case.upstream, seen), (cut, sent[-200:])


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_a_golden_stream_cut_anywhere_is_no_whole_answer(case: Case, caller: str) -> None:
    """Without streaming a torn answer must become a status, never a 200."""
    for cut in cuts_of(case.stream):
        seen = case.stream[:cut]
        flow = make_flow(case.upstream, caller, stream=False)
        assert play(flow, [seen]) == b""
        assert flow.error is not None or has_finished(case.upstream, seen), cut


@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_an_error_from_below_at_any_offset_ends_the_answer(case: Case, caller: str) -> None:
    """A reset or a timeout of the connection is told the same way as the upstream's own word."""
    for cut in range(0, len(case.stream), 7):
        flow = make_flow(case.upstream, caller)
        sent = flow.feed(case.stream[:cut])
        over = flow.is_finished
        sent += flow.end(UpstreamError("The connection broke."))
        assert check_ending(flow, caller, sent) == ("complete" if over else "error")
        assert flow.feed(case.stream) == b"" and flow.end() == b""


REPLACEMENTS: list[Any] = [None, "", "x", 0, -1, 7, True, [], {}, [None], {"a": 1}, [[]]]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value inside a JSON value."""
    found = [path] if path else []
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, item in pairs:
        found += paths_of(item, (*path, key))
    return found


def with_value(item: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`item` with another value at `path`; the value REMOVED takes the key out."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    changed = copy.copy(item)
    if rest or value is not REMOVED:
        changed[key] = with_value(item[key], rest, value)
    else:
        del changed[key]
    return changed


def broken_streams(frames: list[Json]) -> Iterator[tuple[tuple[Any, ...], Any, bytes]]:
    """(path, value, stream) for every strange value at every path of a stream's frames."""
    wire = [write_frames([frame], names=False) for frame in frames]
    for path in paths_of(frames):
        at, *inner = path
        before, behind = b"".join(wire[:at]), b"".join(wire[at + 1 :])
        for value in (REMOVED, *REPLACEMENTS):
            row = b""
            if inner or value is not REMOVED:
                changed = with_value(frames[at], tuple(inner), value)
                row = b"data: %b\n\n" % json.dumps(changed).encode()
            yield path, value, before + row + behind


REMOVED = object()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_no_strange_value_anywhere_in_a_stream_is_more_than_an_error(
    case: Case, caller: str, stream: bool
) -> None:
    """Whatever an upstream puts at any path, the caller hears an answer or an ApiError."""
    reader = SseReader()
    frames = [f for f in reader.frames(reader.complete(case.stream)) if f.get("type") != "[DONE]"]
    broken: set[str] = set()
    for path, value, data in broken_streams(frames):
        flow = make_flow(case.upstream, caller, stream=stream)
        try:
            play(flow, [data, b"data: [DONE]\n\n"])
            if not stream and not flow.error:
                flow.response_body()
        except ApiError:
            pass
        except Exception as error:  # noqa: BLE001 - each kind is told with its path
            shown = "removed" if value is REMOVED else repr(value)
            where = ".".join("*" if isinstance(key, int) else key for key in path[1:])
            broken.add(f"{where} {shown}: {type(error).__name__}: {error}")
    assert not broken, "\n".join(sorted(broken))


# ---- chat upstream, messages caller ------------------------------------------------------------


def test_usage_after_the_finish_reaches_message_delta() -> None:
    """formats.md case 37."""
    details = {"cached_tokens": 4}
    counted = usage_chunk(10, 2, total_tokens=12, prompt_tokens_details=details)
    frames = answer("chat", "messages", [chunk({"content": "Hey"}), chunk({}, "stop"), counted])
    assert kinds(frames)[-2:] == ["message_delta", "message_stop"]
    assert frames[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    usage = frames[-2]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (6, 4)
    assert usage["output_tokens"] == 2


def test_interleaved_calls_arrive_one_after_the_other() -> None:
    """formats.md case 38."""
    frames = answer(
        "chat",
        "messages",
        [
            chunk(fragment(0, id="a", name="f")),
            chunk(fragment(1, id="b", name="g")),
            chunk(fragment(1, "{}")),
            chunk(fragment(0, '{"x":1}')),
            chunk({}, "tool_calls"),
        ],
    )
    starts = [f["content_block"] for f in frames if f["type"] == "content_block_start"]
    parts = [
        (f["index"], f["delta"]["partial_json"])
        for f in frames
        if "index" in f.get("delta", {}) or f["type"] == "content_block_delta"
    ]
    assert [(b["id"], b["name"]) for b in starts] == [("a", "f"), ("b", "g")]
    assert parts == [(0, '{"x":1}'), (1, "{}")]
    assert frames[-2]["delta"]["stop_reason"] == "tool_use"


def test_text_after_a_call_opens_a_block_of_its_own() -> None:
    """formats.md case 39."""
    frames = answer(
        "chat",
        "messages",
        [chunk(fragment(0, "{}", id="a", name="f")), chunk({"content": "z"}), chunk({}, "stop")],
    )
    blocks = [f["type"] for f in frames if "block" in f["type"] and "delta" not in f["type"]]
    assert blocks == ["content_block_start", "content_block_stop"] * 2
    starts = [f["content_block"]["type"] for f in frames if f["type"] == "content_block_start"]
    assert starts == ["tool_use", "text"]


def test_text_between_the_fragments_of_a_call_is_kept() -> None:
    """It comes after the call, and before later text."""
    frames = [
        chunk(fragment(0, '{"a"', id="a", name="f")),
        chunk({"content": "wait"}),
        chunk(fragment(0, ":1}")),
        chunk({"content": " and see"}),
        chunk({}, "tool_calls"),
    ]
    assert whole_answer("chat", "messages", frames)["content"] == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}},
        {"type": "text", "text": "wait and see"},
    ]


def test_thinking_between_the_fragments_of_a_call_is_kept() -> None:
    """A reasoning delta is no less the model's word than text."""
    frames = [
        chunk(fragment(0, '{"a"', id="a", name="f")),
        chunk({"reasoning_text": "hm"}),
        chunk(fragment(0, ":1}")),
        chunk({}, "tool_calls"),
    ]
    content = whole_answer("chat", "messages", frames)["content"]
    assert "hm" in json.dumps(content)
    assert {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}} in content


def test_a_refusal_between_the_fragments_of_a_call_is_kept() -> None:
    """A model that stops in the middle of a call says why."""
    frames = [
        chunk(fragment(0, '{"a"', id="a", name="f")),
        chunk({"refusal": "no"}),
        chunk({}, "content_filter"),
    ]
    assert "no" in json.dumps(
        [part.get("text") for part in whole_answer("chat", "messages", frames)["content"]]
    )


def test_ids_and_names_repeated_on_every_fragment_count_once() -> None:
    """formats.md case 40."""
    frames = [chunk(fragment(0, part, id="a", name="f")) for part in ('{"p"', ":", "2}")]
    whole = whole_answer("chat", "messages", [*frames, chunk({}, "tool_calls")])
    assert whole["content"] == [{"type": "tool_use", "id": "a", "name": "f", "input": {"p": 2}}]


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("content_filter", "refusal"),
        ("tool_calls", "tool_use"),
        ("function_call", "tool_use"),
    ],
)
def test_a_chat_finish_has_its_word_in_messages(finish: str, reason: str) -> None:
    """formats.md cases 41 and 4.1."""
    delta = fragment(0, "{}", id="a", name="f") if "call" in finish else {"content": "x"}
    whole = whole_answer("chat", "messages", [chunk(delta), chunk({}, finish)])
    assert whole["stop_reason"] == reason


def test_a_stop_after_a_call_is_a_tool_use() -> None:
    """formats.md case 41: Copilot says stop."""
    frames = [chunk(fragment(0, "{}", id="a", name="f")), chunk({}, "stop")]
    assert whole_answer("chat", "messages", frames)["stop_reason"] == "tool_use"
    assert whole_answer("chat", "chat", frames)["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("caller", CALLERS)
def test_an_answer_that_ends_without_a_finish_is_an_error(caller: str) -> None:
    """formats.md case 42."""
    flow = make_flow("chat", caller)
    sent = play(flow, [write_frames([chunk({"content": "par"})], names=False)])
    assert check_ending(flow, caller, sent) == "error"
    last = json.loads(split_events(sent)[-1][1])
    assert last["error"]["type"] == {"chat": "server_error", "messages": "api_error"}[caller]


@pytest.mark.parametrize("caller", CALLERS)
def test_a_finish_that_nobody_knows_is_an_error(caller: str) -> None:
    """formats.md 4.1: unknown reasons never pass unmapped; Copilot's own is `error`."""
    frames = [chunk({"content": "par"}), chunk({}, "error")]
    flow = make_flow("chat", caller)
    assert check_ending(flow, caller, play(flow, [write_frames(frames, names=False)])) == "error"


def test_a_long_answer_keeps_its_half_call() -> None:
    """formats.md 4.1: `length` with an incomplete call keeps the partial arguments."""
    frames = [chunk(fragment(0, '{"a', id="a", name="f")), chunk({}, "length")]
    whole = whole_answer("chat", "messages", frames)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["content"][0]["input"] == {"_raw": '{"a'}


def test_an_answer_that_nobody_counted_is_estimated() -> None:
    """formats.md 4.2: no usage upstream means an estimate, in both dialects."""
    frames = [chunk({"content": "word " * 40}), chunk({}, "stop")]
    assert whole_answer("chat", "messages", frames)["usage"]["output_tokens"] > 20
    usage = whole_answer("chat", "chat", frames)["usage"]
    assert usage["prompt_tokens"] > 1 and usage["completion_tokens"] > 20


def test_reasoning_without_text_becomes_redacted_thinking() -> None:
    """copilot.md 4.5: the opaque blob is carried in our envelope."""
    frames = [chunk({"reasoning_opaque": "B=="}), chunk({"content": "x"}), chunk({}, "stop")]
    content = whole_answer("chat", "messages", frames)["content"]
    assert {"type": "redacted_thinking", "data": "gw1.c.B=="} in content


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, "x"])
def test_who_asked_for_no_thinking_gets_text_first(thinking: object) -> None:
    """As Anthropic's own service does: programs read `content[0].text`."""
    frames = [chunk({"reasoning_opaque": "B=="}), chunk({"content": "x"}), chunk({}, "stop")]
    asked = {"messages": [{"content": "hi"}], "thinking": thinking}
    content = whole_answer("chat", "messages", frames, request_body=asked)["content"]
    assert content == [{"type": "text", "text": "x"}]


def test_sealed_reasoning_that_is_not_shown_is_remembered_by_its_calls() -> None:
    """Gemini refuses the turn after a call without it."""
    kept: list[tuple[list[str], str, str]] = []
    frames = [
        chunk({"reasoning_text": "hm"}),
        chunk({"reasoning_opaque": "B=="}),
        chunk(fragment(0, "{}", id="a", name="f")),
        chunk(fragment(1, "{}", id="b", name="g")),
        chunk({}, "tool_calls"),
    ]
    asked = {"messages": [{"content": "hi"}]}
    whole = whole_answer(
        "chat", "messages", frames, request_body=asked, store_reasoning=lambda *k: kept.append(k)
    )
    assert [block["type"] for block in whole["content"]] == ["tool_use", "tool_use"]
    assert kept == [(["a", "b"], "hm", "B==")]


def test_reasoning_with_its_blob_becomes_signed_thinking() -> None:
    """The signature comes once, right before the block's end."""
    frames = answer(
        "chat",
        "messages",
        [
            chunk({"reasoning_text": "hm", "reasoning_opaque": "B=="}),
            chunk({"content": "x"}),
            chunk({}, "stop"),
        ],
    )
    said = [f["delta"] for f in frames if f["type"] == "content_block_delta"]
    assert said[:2] == [
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "signature_delta", "signature": "gw1.c.B=="},
    ]


def test_thinking_is_hidden_from_a_caller_who_omits_it() -> None:
    """formats.md 5.6: `display: omitted` keeps the block and its signature, not the text."""
    frames = [
        chunk({"reasoning_text": "hm", "reasoning_opaque": "B=="}),
        chunk({"content": "x"}),
        chunk({}, "stop"),
    ]
    whole = whole_answer("chat", "messages", frames, hide_thinking=True)
    assert whole["content"][0] == {"type": "thinking", "thinking": "", "signature": "gw1.c.B=="}


def test_message_start_carries_an_estimate_of_the_input() -> None:
    """formats.md 1.7: zero shows an empty context in Claude Code."""
    asked = {"messages": [{"role": "user", "content": "word " * 500}]}
    frames = answer(
        "chat", "messages", [chunk({"content": "x"}), chunk({}, "stop")], request_body=asked
    )
    assert frames[0]["message"]["usage"]["input_tokens"] > 400


def test_a_whole_call_in_one_fragment_without_id_or_index_is_read() -> None:
    """formats.md 2.6: what readers must tolerate."""
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    frames = [chunk({"tool_calls": [call]}), chunk({}, "tool_calls")]
    block_read = whole_answer("chat", "messages", frames)["content"][0]
    assert block_read["name"] == "f" and block_read["input"] == {"a": 1}
    assert block_read["id"]


@pytest.mark.parametrize("caller", CALLERS)
def test_upstream_tool_names_become_the_callers(caller: str) -> None:
    """formats.md 5.0: the reverse map is built from the request's tools."""
    frames = [chunk(fragment(0, "{}", id="a", name="my_tool")), chunk({}, "tool_calls")]
    whole = whole_answer("chat", caller, frames, names={"my_tool": "my.tool"})
    assert '"my.tool"' in json.dumps(whole) and "my_tool" not in json.dumps(whole)


# ---- messages upstream, chat caller ------------------------------------------------------------


def test_thinking_text_and_call_become_deltas() -> None:
    """formats.md case 43."""
    frames = answer(
        "messages",
        "chat",
        [
            message_start(),
            *block(
                0,
                {"type": "thinking", "thinking": "", "signature": ""},
                {"type": "thinking_delta", "thinking": "hm"},
                {"type": "signature_delta", "signature": "EqQB"},
            ),
            *text_block(1, "T"),
            *block(
                2,
                {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}},
                {"type": "input_json_delta", "partial_json": '{"a":1}'},
            ),
            *message_end("tool_use"),
        ],
        include_usage=False,
    )
    call = {"index": 0, "id": "toolu_1", "type": "function"}
    assert deltas(frames)[1:] == [
        {"reasoning_content": "hm"},
        {"content": "T"},
        {"tool_calls": [{**call, "function": {"name": "Bash", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]},
        {},
    ]
    assert "EqQB" not in json.dumps(frames) and all(f["choices"] for f in frames)
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_caches_count_as_prompt_for_a_chat_caller() -> None:
    """formats.md case 44."""
    start = message_start(cache_read_input_tokens=4, cache_creation_input_tokens=5)
    frames = [start, *text_block(0, "x"), *message_end("end_turn", 3)]
    usage = whole_answer("messages", "chat", frames)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (15, 3)
    assert usage["total_tokens"] == 18
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


def test_a_call_without_deltas_has_an_empty_object() -> None:
    """formats.md case 45."""
    call = block(0, {"type": "tool_use", "id": "t", "name": "f", "input": {}})
    whole = whole_answer("messages", "chat", [message_start(), *call, *message_end("tool_use")])
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_input_that_came_whole_in_the_block_start_is_passed_on() -> None:
    """formats.md 5.6."""
    call = block(0, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "é"}})
    whole = whole_answer("messages", "chat", [message_start(), *call, *message_end("tool_use")])
    function = whole["choices"][0]["message"]["tool_calls"][0]["function"]
    assert function["arguments"] == '{"a":"é"}'


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
    ],
)
def test_a_stop_reason_has_its_word_in_chat(reason: str, finish: str) -> None:
    """formats.md 4.1."""
    frames = [message_start(), *text_block(0, "x"), *message_end(reason)]
    assert whole_answer("messages", "chat", frames)["choices"][0]["finish_reason"] == finish


def test_a_refusal_without_words_is_explained() -> None:
    """formats.md 5.6: `message.refusal` is the explanation."""
    stop_details = {"type": "refusal", "explanation": "Not this."}
    frames = [message_start(), *message_end("refusal", stop_details=stop_details)]
    choice = whole_answer("messages", "chat", frames)["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["refusal"] == "Not this."


def test_a_hosted_tool_of_the_vendor_leaves_nothing_in_chat() -> None:
    """A `server_tool_use` is not the caller's to run: no fragment of it may reach one."""
    hosted = block(
        0,
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "input_json_delta", "partial_json": '{"query":"x"}'},
    )
    frames = [message_start(), *hosted, *text_block(1, "Found."), *message_end("end_turn")]
    said = deltas(answer("messages", "chat", frames))
    assert not any("tool_calls" in delta for delta in said)
    assert whole_answer("messages", "chat", frames)["choices"][0]["message"]["content"] == "Found."


def test_a_hosted_tool_beside_a_call_does_not_grow_that_call() -> None:
    """The query of a search must not be appended to an earlier call's arguments."""
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    hosted = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    frames = [
        message_start(),
        *block(0, call, {"type": "input_json_delta", "partial_json": '{"a":1}'}),
        *block(1, hosted, {"type": "input_json_delta", "partial_json": '{"q":2}'}),
        *message_end("tool_use"),
    ]
    calls = whole_answer("messages", "chat", frames)["choices"][0]["message"]["tool_calls"]
    assert [item["function"]["arguments"] for item in calls] == ['{"a":1}']


def test_the_function_call_shape_of_2023_is_answered_in_kind() -> None:
    """formats.md 2.2: who sent `functions` gets `function_call`."""
    call = block(
        0,
        {"type": "tool_use", "id": "t", "name": "f", "input": {}},
        {"type": "input_json_delta", "partial_json": '{"a":1}'},
    )
    frames = [message_start(), *call, *message_end("tool_use")]
    choice = whole_answer("messages", "chat", frames, legacy_functions=True)["choices"][0]
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}
    assert choice["finish_reason"] == "function_call"
    assert "tool_calls" not in choice["message"]


# ---- errors ------------------------------------------------------------------------------------

OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}


@pytest.mark.parametrize("caller", CALLERS)
def test_an_error_before_the_first_byte_is_no_frame(caller: str) -> None:
    """It can still become a status."""
    flow = make_flow("messages", caller)
    assert play(flow, [write_frames([OVERLOADED], names=True)]) == b""
    assert isinstance(flow.error, Overloaded)


@pytest.mark.parametrize("caller", CALLERS)
def test_an_error_in_the_middle_is_the_last_frame(caller: str) -> None:
    """And nothing that comes after it is heard."""
    flow = make_flow("messages", caller)
    frames = [message_start(), *text_block(0, "x")[:2], OVERLOADED, *message_end("end_turn")]
    sent = play(flow, [write_frames(frames, names=True)])
    assert check_ending(flow, caller, sent) == "error"
    kind = json.loads(split_events(sent)[-1][1])["error"]["type"]
    assert kind == {"messages": "overloaded_error", "chat": "server_error"}[caller]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    "tail",
    [
        b'{"error":{"message":"slow down","code":"rate_limited"}}\n',
        b'{"error":{"message":"slow down","code":"rate_limited"}}',
        b'data: {"choices":null,"error":{"message":"slow down","code":"rate_limited"}}\n\n',
        b'event: error\ndata: {"error":{"message":"slow down","type":"rate_limit_error"}}\n\n',
    ],
)
def test_copilots_errors_inside_a_stream_are_heard(caller: str, tail: bytes) -> None:
    """copilot.md 4.4: bare JSON, `choices: null`, named events."""
    flow = make_flow("chat", caller)
    sent = play(flow, [write_frames([chunk({"content": "par"})], names=False), tail])
    assert check_ending(flow, caller, sent) == "error"
    assert isinstance(flow.error, RateLimited) and "slow down" in str(flow.error)


def test_an_error_text_is_redacted() -> None:
    """Nothing that looks like a token goes on."""
    said = {"type": "error", "error": {"type": "api_error", "message": "bad ghu_abcdefgh1234"}}
    flow = make_flow("messages", "messages")
    play(flow, [write_frames([said], names=True)])
    assert "ghu_abcdefgh1234" not in str(flow.error)


def test_nan_in_a_chunk_is_an_error_not_a_crash() -> None:
    """NaN is not JSON: it can neither be relayed nor break the connection's task."""
    data = write_frames([chunk({"role": "assistant", "content": "a"})], names=False)
    odd = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"b"},"score":NaN}]}\n\n'
    flow = make_flow("chat", "chat")
    assert check_ending(flow, "chat", play(flow, [data, odd])) == "error"


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("stream", [True, False])
def test_an_upstream_that_says_nothing_is_an_error(
    upstream: str, caller: str, stream: bool
) -> None:
    """An empty body, comments only, or a lone [DONE]."""
    for data in (b"", b": ping\n\n", b"data: [DONE]\n\n", b"\n\n\n"):
        flow = make_flow(upstream, caller, stream=stream)
        assert play(flow, [data]) == b""
        assert isinstance(flow.error, UpstreamError)


@pytest.mark.parametrize("caller", CALLERS)
def test_error_bodies_have_their_vendors_shape(caller: str) -> None:
    """formats.md 4.3."""
    body = DIALECTS[caller].error_body(ContextTooLong(9, 5), REQUEST_ID)
    message = "prompt is too long: 9 tokens > 5 maximum"
    kind = "invalid_request_error"
    if caller == "messages":
        said = {"type": kind, "message": message}
        assert body == {"type": "error", "error": said, "request_id": REQUEST_ID}
    else:
        message = (
            "This model's maximum context length is 5 tokens. However, your messages resulted in "
            "9 tokens. Please reduce the length of the messages."
        )
        said = {"message": message, "type": kind, "param": "messages"}
        assert body == {"error": {**said, "code": "context_length_exceeded"}}


def all_errors(base: type[ApiError]) -> list[type[ApiError]]:
    """An error class and everything below it."""
    return [base, *(item for sub in base.__subclasses__() for item in all_errors(sub))]


@pytest.mark.parametrize("caller", CALLERS)
def test_every_error_has_a_body_in_every_dialect(caller: str) -> None:
    """A kind without a table line would be a KeyError in the worst moment."""
    for kind in all_errors(ApiError):
        error = kind() if kind is ContextTooLong else kind("what happened", hint="Do this.")
        body = DIALECTS[caller].error_body(error, REQUEST_ID)
        openai_text = getattr(error, "openai_text", str(error))
        text = str(error) if caller == "messages" else openai_text
        assert body["error"]["message"].startswith(text)
        assert 400 <= DIALECTS[caller].error_status(error) <= 599


def test_an_overload_is_529_for_anthropic_only() -> None:
    """formats.md 4.3."""
    statuses = {name: d.error_status(Overloaded("busy")) for name, d in DIALECTS.items()}
    assert statuses == {"messages": 529, "chat": 503, "responses": 503}


# ---- native relays -----------------------------------------------------------------------------


def test_every_chunk_of_a_native_answer_has_the_same_head() -> None:
    """formats.md 2.6, copilot.md 4.4: one id and one timestamp per stream, the finish included."""
    frames = [chunk({"content": "a"}, created=5, id="up"), chunk({}, "stop", created=5, id="up")]
    sent = answer("chat", "chat", [*frames, usage_chunk(5, 5, total_tokens=10)])
    assert len({(f["id"], f["created"], f["model"]) for f in sent}) == 1


def test_a_native_chunk_that_changes_its_head_is_mended() -> None:
    """Ids and timestamps that come and go in the middle."""
    heads = [(5, "up"), (5, "up"), (0, ""), (6, "other"), (5, "up")]
    frames = [chunk({"content": "a"}, created=at, id=name) for at, name in heads]
    reads = [write_frames([f], names=False) for f in [*frames, chunk({}, "stop")]]
    flow = make_flow("chat", "chat")
    assert check_ending(flow, "chat", play(flow, reads)) == "complete"


def test_copilots_split_choices_become_one() -> None:
    """formats.md case 46, for an answer that is not a stream."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    empty = {"role": "assistant", "content": None, "tool_calls": [call]}
    choices = [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "T"},
            "finish_reason": "tool_calls",
        },
        {"index": 1, "message": empty, "finish_reason": "tool_calls"},
    ]
    for caller in CALLERS:
        flow = make_flow("chat", caller, stream=False)
        assert flow.feed_buffered(json.dumps({"id": "x", "choices": choices}).encode()) == b""
        whole = flow.response_body()
        if caller == "chat":
            assert len(whole["choices"]) == 1
            message = whole["choices"][0]["message"]
            assert (message["content"], message["tool_calls"]) == ("T", [call])
            assert whole["choices"][0]["finish_reason"] == "tool_calls"
        else:
            assert [b["type"] for b in whole["content"]] == ["text", "tool_use"]


def test_several_choices_that_were_asked_for_stay_apart() -> None:
    """With n above 1 nothing is folded."""
    frames = [
        {
            **chunk({}),
            "choices": [
                {
                    "index": i,
                    "delta": {"role": "assistant", "content": str(i)},
                    "finish_reason": "stop",
                }
                for i in (0, 1)
            ],
        }
    ]
    flow = make_flow("chat", "chat", stream=False, multiple_choices=True)
    play(flow, [write_frames(frames, names=False)])
    assert [c["message"]["content"] for c in flow.response_body()["choices"]] == ["0", "1"]
    assert [c["finish_reason"] for c in flow.response_body()["choices"]] == ["stop", "stop"]


def test_the_usage_chunk_is_hidden_from_who_did_not_ask() -> None:
    """formats.md 6.4: the usage is still known inside."""
    flow = make_flow("chat", "chat", include_usage=False)
    frames = [chunk({"content": "x"}), chunk({}, "stop"), usage_chunk(5, 6, total_tokens=11)]
    sent = play(flow, [write_frames(frames, names=False)])
    assert check_ending(flow, "chat", sent) == "complete" and b'"usage":{' not in sent
    assert (flow.usage.input, flow.usage.output) == (5, 6)


def test_a_native_answer_without_message_stop_gets_one() -> None:
    """formats.md 1.7: when the stop reason was seen, only the last line is missing."""
    frames = [message_start(), *text_block(0, "x"), message_end("end_turn")[0]]
    assert kinds(answer("messages", "messages", frames))[-1] == "message_stop"


def test_null_usage_in_native_events_is_mended() -> None:
    """`usage: null` is what an absent usage looks like from some backends."""
    start, end = message_start(), message_end("end_turn")
    start["message"]["usage"] = None
    end[0]["usage"] = None
    frames = answer("messages", "messages", [start, *text_block(0, "x"), *end])
    assert frames[0]["message"]["usage"]["output_tokens"] == 0


def test_a_caller_of_messages_never_sees_the_upstreams_model() -> None:
    """formats.md 1.6: the id the client sent."""
    frames = answer(
        "messages", "messages", [message_start(), *text_block(0, "x"), *message_end("end_turn")]
    )
    assert frames[0]["message"]["model"] == "asked"


def test_context_edits_are_told_only_to_who_asked_for_them() -> None:
    """Some clients fail on a `context_management` that they did not ask for."""
    edits: Json = {"applied_edits": []}
    for asks in (True, False):
        asked: Json = {"messages": [], **({"context_management": {"edits": []}} if asks else {})}
        end = message_end("end_turn")
        end[0]["context_management"] = edits
        frames = [message_start(), *text_block(0, "x"), *end]
        last = answer("messages", "messages", frames, request_body=asked)[-2]
        assert ("context_management" in last) is asks
        whole = whole_answer("messages", "messages", frames, request_body=asked)
        assert whole.get("context_management") == (edits if asks else None)


FILLINGS = [
    "padding",
    "obfuscation",
    "content_filter_results",
    "content_filter_offsets",
    "prompt_filter_results",
    "copilot_usage",
]


@pytest.mark.parametrize("filling", FILLINGS)
def test_fillings_around_the_words_do_not_reach_a_chat_caller(filling: str) -> None:
    """Clients echo a message with all it had, and the upstream would refuse it."""
    more: dict[str, Any] = {filling: {"x": 1}}
    frames = [
        chunk({"role": "assistant", "content": ""}, **more),
        *(chunk({"content": word}, **more) for word in "abcdef"),
        chunk({}, "stop", **more),
        {**usage_chunk(5, 6, total_tokens=11), **more},
    ]
    if filling != "copilot_usage":
        frames[2]["choices"][0] |= more
        frames[2]["choices"][0]["delta"] |= more
    sent = answer("chat", "chat", frames)
    assert filling not in json.dumps(sent)
    assert "".join(delta.get("content", "") for delta in deltas(sent)) == "abcdef"
    assert filling not in json.dumps(whole_answer("chat", "chat", frames))


def test_a_native_chat_answer_is_over_at_done() -> None:
    """The connection may stay open: the caller's end does not wait for the upstream's."""
    frames = [chunk({"content": "x"}), chunk({}, "stop"), usage_chunk(5, 6, total_tokens=11)]
    flow = make_flow("chat", "chat")
    sent = flow.feed(write_frames(frames, names=False))
    assert not flow.is_finished
    sent += flow.feed(b"data: [DONE]\n\n")
    assert flow.is_finished and check_ending(flow, "chat", sent) == "complete"
    torn = make_flow("chat", "chat")
    sent = torn.feed(write_frames(frames[:1], names=False) + b"data: [DONE]\n\n")
    assert check_ending(torn, "chat", sent) == "error"


@pytest.mark.parametrize("size", range(1, 7))
def test_words_that_look_like_an_event_line_do_not_steer_the_relay(size: int) -> None:
    """A model may write about server-sent events."""
    delta = {"type": "text_delta", "text": "event: content_block_ event: ping"}
    growth = {"type": "content_block_delta", "index": 0, "delta": delta}
    rest = [growth, growth, text_block(0)[-1], *message_end("end_turn")]
    reads = [[message_start(), text_block(0)[0]]]
    reads += [rest[at : at + size] for at in range(0, len(rest), size)]
    flow = make_flow("messages", "messages")
    sent = play(flow, [write_frames(frames, names=True) for frames in reads])
    assert check_ending(flow, "messages", sent) == "complete"


def test_words_that_look_like_an_event_line_do_not_hide_an_error() -> None:
    """An error frame in one read with such words is still an error for the flow."""
    word = {"type": "text_delta", "text": "event: content_block_"}
    delta = {"type": "content_block_delta", "index": 0, "delta": word}
    flow = make_flow("messages", "messages")
    sent = flow.feed(write_frames([message_start(), text_block(0)[0]], names=True))
    sent += flow.feed(write_frames([delta, OVERLOADED], names=True))
    sent += flow.end()
    assert check_messages(sent) == "error"
    assert isinstance(flow.error, Overloaded)


def plain(**more: Any) -> Json:
    """A choice with words in it."""
    return {"index": 0, "delta": {"content": "x"}, "finish_reason": None, **more}


ODD_CHUNKS: dict[str, Json] = {
    "no delta": {"choices": [plain(delta=None)]},
    "a delta that is no object": {"choices": [plain(delta="x")]},
    "another index": {"choices": [plain(index=1)]},
    "no index": {"choices": [{"delta": {"content": "x"}}]},
    "two choices": {"choices": [plain(), plain(index=1)]},
    "a choice that is none": {"choices": [plain(), None]},
    "no choices": {"choices": []},
    "null choices": {"choices": None},
    "null usage": {"choices": [plain()], "usage": None},
    "a null id": {"choices": [plain()], "id": None},
    "an empty id": {"choices": [plain()], "id": ""},
    "another id": {"choices": [plain()], "id": "other"},
    "a null model": {"choices": [plain()], "model": None},
    "another model": {"choices": [plain()], "model": "other"},
    "no time": {"choices": [plain()], "created": 0},
    "another time": {"choices": [plain()], "created": 6},
    "another object": {"choices": [plain()], "object": ""},
    "an empty finish": {"choices": [plain(finish_reason="")]},
    "a refusal": {"choices": [plain(delta={"refusal": "no"})]},
    "logprobs": {"choices": [plain(logprobs={"content": [{"token": "x", "index": 0}]})]},
    "a nested id": {"choices": [plain(extra={"id": "7"})]},
}


@pytest.mark.parametrize("spaced", [False, True], ids=["compact", "spaced"])
@pytest.mark.parametrize("odd", ODD_CHUNKS)
def test_an_odd_chunk_among_plain_ones_is_mended(odd: str, spaced: bool) -> None:
    """Each oddity alone, in reads of one frame, against the slow path."""
    head = {"id": "up", "object": "chat.completion.chunk", "created": 5, "model": "m"}
    opening = {**head, "choices": [plain(delta={"role": "assistant", "content": ""})]}
    middle = {**head, "choices": [plain()]}
    final = {**head, "choices": [plain(delta={}, finish_reason="stop")]}
    frames = [opening, middle, {**head, **ODD_CHUNKS[odd]}, middle, final]
    separators = None if spaced else (",", ":")
    reads = [f"data: {json.dumps(frame, separators=separators)}\n\n".encode() for frame in frames]
    slow, _ = slow_twin("chat", "chat", b"".join(reads))
    quick = play(make_flow("chat", "chat"), reads)
    assert without_gaps(meaning(quick)) == without_gaps(meaning(slow))
    chunks = [json.loads(data) for _, data in split_events(quick) if data != "[DONE]"]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks if chunk["choices"])
    assert all(isinstance(c["delta"], dict) for chunk in chunks for c in chunk["choices"])


WORDS = [
    "a",
    " ",
    "é",
    "日本",
    "🙂",
    '"',
    "\\",
    "\n\n",
    "data: {",
    "event: ping\n",
    "[DONE]",
    '"index":0',
    '"usage":{',
    "event: content_block_",
    "\r\n",
    "\u2028",
    "{}",
    '"error":',
]


def random_chat_frames(rng: random.Random) -> list[Json]:
    """Chunks as Copilot may write them: plain ones with oddities between."""
    head: Json = {"id": "up", "created": 5, "model": "m-2026", "object": "chat.completion.chunk"}
    for key in rng.sample(list(head), rng.randint(0, 3)):
        del head[key]
    frames: list[Json] = [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    ]
    for _ in range(rng.randint(3, 25)):
        delta: Any = {"content": "".join(rng.choices(WORDS, k=rng.randint(1, 3)))}
        choice: Json = {"index": 0, "delta": delta, "finish_reason": None}
        frame: Json = {**head, "choices": [choice]}
        odd = rng.random()
        if odd < 0.05:
            choice["delta"] = None
        elif odd < 0.1:
            choice["index"] = 1
        elif odd < 0.15:
            frame["choices"].append({"index": 1, "delta": {"content": "second"}})
        elif odd < 0.2:
            frame["usage"] = None
        elif odd < 0.25:
            delta["reasoning_text"] = "hm"
        elif odd < 0.3:
            frame["choices"] = rng.choice([[], None])
        elif odd < 0.35:
            choice["delta"] = fragment(rng.randint(0, 1), "{}", id="c", name="f")
        elif odd < 0.4:
            frame["id"] = rng.choice(["", "other", None])
        elif odd < 0.45:
            frame["model"] = rng.choice(["", "other", None])
        elif odd < 0.5:
            delta["role"] = "assistant"
        frames.append(frame)
    final = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    return [*frames, final, usage_chunk(5, 6, total_tokens=11)]


def random_messages_frames(rng: random.Random) -> list[Json]:
    """Events of one message with pings, calls and strangers between."""
    frames = [message_start()]
    for index in range(rng.randint(1, 4)):
        words = ["".join(rng.choices(WORDS, k=2)) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.3:
            call = {"type": "tool_use", "id": f"t{index}", "name": "f", "input": {}}
            frames += block(index, call, {"type": "input_json_delta", "partial_json": "{}"})
        else:
            frames += text_block(index, *words)
        if rng.random() < 0.3:
            frames.append({"type": "ping"})
        if rng.random() < 0.1:
            frames.append({"type": "stranger", "words": "event: content_block_"})
    return [*frames, *message_end("end_turn")]


def slow_twin(upstream: str, caller: str, data: bytes) -> tuple[bytes, StreamTranslator]:
    """What a flow sends when every frame is read and mended by itself."""
    flow, reader = make_flow(upstream, caller), SseReader()
    frames = reader.frames(reader.complete(data))
    sent = b"".join(pass_on(flow, [frame]) for frame in frames if not flow.is_finished)
    return sent + flow.end(), flow


def without_gaps(frame: Any) -> Any:
    """A frame without what says nothing: an absent finish, usage or logprobs may be null."""
    if isinstance(frame, dict):
        empty = ("finish_reason", "logprobs", "usage")
        return {k: without_gaps(v) for k, v in frame.items() if v is not None or k not in empty}
    return [without_gaps(item) for item in frame] if isinstance(frame, (list, tuple)) else frame


def as_wire(frames: list[Json], upstream: str, rng: random.Random) -> list[bytes]:
    """Frames as an upstream writes them: compact or not, escaped or not, but always the same."""
    separators = rng.choice([(",", ":"), None])
    escaped = rng.random() < 0.5
    names = [f"event: {f['type']}\n" if upstream == "messages" else "" for f in frames]
    pieces = [json.dumps(f, ensure_ascii=escaped, separators=separators) for f in frames]
    return [f"{n}data: {p}\n\n".encode() for n, p in zip(names, pieces, strict=True)]


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_reads_of_many_frames_mean_what_their_frames_mean(upstream: str, caller: str) -> None:
    """Seeded frames in reads of any size, and torn ones, against one mended frame at a time."""
    make = {"chat": random_chat_frames, "messages": random_messages_frames}[upstream]
    rng = random.Random(SEED)
    for round_ in range(300):
        wire = as_wire(make(rng), upstream, rng)
        slow, twin = slow_twin(upstream, caller, b"".join(wire))
        flow = make_flow(upstream, caller)
        data, reads = b"".join(wire), []
        while data:
            size = rng.choice([len(wire[0]), len(wire[-1]), rng.randint(1, 900)])
            reads.append(data[:size])
            data = data[size:]
        sent = play(flow, reads)
        same = sent == slow or without_gaps(meaning(sent)) == without_gaps(meaning(slow))
        assert same, round_
        assert (flow.error is None) == (twin.error is None), round_
        assert flow.usage == twin.usage, round_


BROKEN_TEXTS = {
    "a raw line break": b"a\ndata: b",
    "a raw event line": b"a\nevent: error",
    "a control character": b"a\x01b",
    "a tab": b"a\tb",
    "an unknown escape": b"a\\qb",
    "half an escape": b"a\\u12",
    "a byte that is not UTF-8": b"a\xffb",
    "a quote": b'a"b',
    "a member": b'a","role":"user',
    "an escaped quote at the end": b"a\\",
}


@pytest.mark.parametrize("broken", BROKEN_TEXTS)
@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_broken_text_among_plain_deltas_never_goes_on(
    upstream: str, caller: str, broken: str
) -> None:
    """What is no JSON is an error in the tenth delta as in the first."""
    if upstream == "chat":
        opening = [chunk({"role": "assistant", "content": ""})]
        growth = chunk({"content": "WORD"})
    else:
        opening = [message_start(), text_block(0)[0]]
        growth = text_block(0, "WORD")[1]
    row = write_frames([growth], names=upstream == "messages")
    opened = write_frames(opening, names=upstream == "messages")
    odd = row.replace(b"WORD", BROKEN_TEXTS[broken])
    flow = make_flow(upstream, caller)
    sent = flow.feed(opened)
    for _ in range(4):
        sent += flow.feed(row + row)
    sent += flow.feed(row + odd + row)
    sent += flow.end()
    assert check_ending(flow, caller, sent) == "error"
    behind = broken == "a member"  # an odd event, but an event
    assert sent.count(b"WORD") == 9 + behind, "before goes on, behind does not"
    slow = slow_twin(upstream, caller, opened + row * 9 + odd + row)[0]
    assert meaning(sent) == meaning(slow)


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_the_same_delta_means_something_else_in_another_block(upstream: str, caller: str) -> None:
    """Equal bytes before and after a call, and behind the finish, are not equal events."""
    words = [chunk({"content": part}) for part in ("one", "two", "three")]
    call = [chunk(fragment(0, "{}", id="a", name="f"))]
    frames = [*words, *call, *words, chunk({}, "stop")]
    if upstream == "messages":
        tool = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
        frames = [message_start(), *text_block(0, "one", "two", "three"), *block(1, tool)]
        frames += [*text_block(2, "one", "two", "three"), *message_end("tool_use")]
    wire = write_frames(frames, names=upstream == "messages")
    slow, _ = slow_twin(upstream, caller, wire)
    for size in (len(wire), 1, 300):
        reads = [wire[at : at + size] for at in range(0, len(wire), size)]
        assert meaning(play(make_flow(upstream, caller), reads)) == meaning(slow)
    assert GRAMMARS[caller](slow) == "complete"


def growing(upstream: str, *texts: str) -> tuple[bytes, list[bytes]]:
    """(the start of an answer, one text delta for each text), as an upstream writes them."""
    names = upstream == "messages"
    if names:
        opening = [message_start(), text_block(0)[0]]
        frames = text_block(0, *texts)[1:-1]
    else:
        opening = [chunk({"role": "assistant", "content": ""})]
        frames = [chunk({"content": text}) for text in texts]
    rows = [write_frames([frame], names=names) for frame in frames]
    return write_frames(opening, names=names), rows


def text_sent(sent: bytes) -> str:
    """The words of a stream of either dialect, joined."""
    words = []
    for _, data in meaning(sent):
        if data == "[DONE]":
            continue
        choices = data.get("choices") or ()
        words += [choice["delta"].get("content") or "" for choice in choices]
        if data.get("type") == "content_block_delta":
            words.append(data["delta"].get("text", ""))
    return "".join(words)


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_run_of_plain_deltas_teaches_a_template_that_copies(upstream: str, caller: str) -> None:
    """After the first few events of a run nothing is parsed any more."""
    texts = [f"w{at} " for at in range(200)]
    opening, rows = growing(upstream, *texts)
    flow = make_flow(upstream, caller)
    sent = flow.feed(opening + b"".join(rows))
    learned = flow.template
    assert learned is not None
    assert text_sent(sent) == "".join(texts)
    fresh = b"".join(rows[:50])
    copied = learned.copy(fresh, 0)
    assert copied is not None and text_sent(copied[3]) == "".join(texts[:50])
    assert flow.feed(fresh) == copied[3] and flow.template is learned


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("odd_at", range(0, 40, 3))
def test_something_odd_in_a_long_run_of_deltas_takes_the_slow_way(
    upstream: str, caller: str, odd_at: int
) -> None:
    """Wherever among the first 4, 8, 16 ... events it stands, and torn reads too."""
    texts = [f"w{at} " for at in range(40)]
    opening, rows = growing(upstream, *texts)
    odd = chunk({"content": "odd ", "role": "assistant"})
    if upstream == "messages":
        odd = {**text_block(0, "odd ")[1], "extra": 1}
    rows.insert(odd_at, write_frames([odd], names=upstream == "messages"))
    said = [*texts[:odd_at], "odd ", *texts[odd_at:]]
    stream = opening + b"".join(rows)
    slow = slow_twin(upstream, caller, stream)[0]
    for reads in (
        [stream],
        [opening, stream[len(opening) :]],
        [opening + b"".join(rows[:odd_at]), b"".join(rows[odd_at:])],
        [stream[: len(opening) + 500], stream[len(opening) + 500 :]],
    ):
        flow = make_flow(upstream, caller)
        sent = b"".join(flow.feed(data) for data in reads)
        assert text_sent(sent) == "".join(said)
        assert meaning(sent + flow.end()) == meaning(slow)
        assert sent.count(b'"extra"') == slow.count(b'"extra"')


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_read_that_no_template_fits_costs_time_in_line_with_its_size(
    upstream: str, caller: str
) -> None:
    """A pattern that goes back over the words would need hours for a long one before a quote."""
    opening, rows = growing(upstream, "one", "two", "three", "four", "w" * 20_000, "last")
    long_then_odd = rows[4] + rows[4].replace(b'"index":', b'"x":0,"index":') + rows[5]
    flow = make_flow(upstream, caller)
    sent = flow.feed(opening + b"".join(rows[:4]))
    assert flow.template is not None
    begun = time.process_time()
    sent += flow.feed(long_then_odd)
    assert time.process_time() - begun < 1
    assert text_sent(sent).count("w") == 1 + 2 * 20_000


@pytest.mark.parametrize("dialect", CALLERS)
def test_a_finished_flow_says_nothing_more(dialect: str) -> None:
    """Neither feed nor end add a byte after the end."""
    case = next(case for case in CASES if case.upstream == dialect)
    flow = make_flow(dialect, dialect)
    play(flow, [case.stream])
    assert flow.feed(case.stream) == b"" and flow.end() == b""
    assert flow.end(UpstreamError("late")) == b"" and flow.error is None


# ---- stop strings cut here ---------------------------------------------------------------------


@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_stop_string_split_over_deltas_ends_the_answer(upstream: str, caller: str) -> None:
    """formats.md 1.2, 4.1: cut in the gateway, told as what stopped it."""
    pieces = ["one S", "T", "OP two"]
    frames: list[Json] = [*(chunk({"content": p}) for p in pieces), chunk({}, "stop")]
    if upstream == "messages":
        frames = [message_start(), *text_block(0, *pieces), *message_end("end_turn")]
    whole = whole_answer(upstream, caller, frames, stop_strings=["STOP"])
    if caller == "messages":
        assert whole["content"] == [{"type": "text", "text": "one "}]
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "STOP")
    else:
        assert whole["choices"][0]["message"]["content"] == "one "
        assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("upstream", CALLERS)
def test_a_stop_string_cut_here_ends_the_flow_at_once(upstream: str) -> None:
    """The upstream can be hung up on: the answer is over before it is."""
    frames: list[Json] = [chunk({"content": "a END"}), chunk({"content": "b"})]
    if upstream == "messages":
        frames = [message_start(), *text_block(0, "a END", "b")]
    flow = make_flow(upstream, "messages", stop_strings=["END"])
    sent = flow.feed(write_frames(frames, names=upstream == "messages"))
    assert flow.is_finished and check_messages(sent) == "complete"


# ---- whole answers of the upstream -------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("case", "caller"), PAIRS, ids=PAIR_IDS)
def test_an_upstreams_whole_answer_means_what_its_stream_means(
    case: Case, caller: str, stream: bool
) -> None:
    """Unfolding is the inverse of folding, for callers who stream and who do not."""
    whole = case.whole(case.upstream)
    flow = make_flow(case.upstream, caller, stream=stream)
    sent = flow.feed_buffered(json.dumps(whole).encode())
    assert flow.error is None and flow.is_finished
    if stream:
        assert GRAMMARS[caller](sent) == "complete"
    elif caller == case.upstream:
        expected = {**case.whole(caller), "id": whole["id"]}
        assert without_gaps(flow.response_body()) == without_gaps(expected)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_whole_answer_unfolds_into_the_words_of_its_stream(case: Case, caller: str) -> None:
    """They come as deltas: clients do not read the words in a block's start."""
    flow = make_flow(case.upstream, caller)
    sent = flow.feed_buffered(json.dumps(case.whole(case.upstream)).encode())
    assert text_sent(sent) == text_sent(case.expected(caller))


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("upstream", CALLERS)
@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"choices":[', b"{}", b"null"])
def test_a_whole_answer_that_is_none_is_an_error(upstream: str, caller: str, data: bytes) -> None:
    """Never a 200 with nothing in it."""
    flow = make_flow(upstream, caller, stream=False)
    assert flow.feed_buffered(data) == b""
    assert isinstance(flow.error, UpstreamError)


def test_a_signs_of_life_is_what_clients_take_for_one() -> None:
    """formats.md section 8: a comment for OpenAI, `ping` inside an Anthropic message."""
    assert DIALECTS["chat"].ping(True) == DIALECTS["chat"].ping(False) == b": ping\n\n"
    assert DIALECTS["messages"].ping(False) == b": ping\n\n"
    assert meaning(DIALECTS["messages"].ping(True)) == [("ping", {"type": "ping"})]


def test_a_stream_that_is_collected_has_a_largest_size_and_one_that_is_passed_on_has_none() -> None:
    """Whoever plays an upstream may send comments without end."""
    collected, passed_on = make_flow("chat", "chat", stream=False), make_flow("chat", "messages")
    piece = b":" + b"x" * (1 << 20) + b"\n\n"
    for _ in range(70):
        collected.feed(piece)
        passed_on.feed(piece)
    assert isinstance(collected.error, UpstreamError) and collected.is_finished
    assert passed_on.error is None


# ---- cost --------------------------------------------------------------------------------------


def chat_pieces(count: int, *deltas: Json) -> list[Json]:
    """Chunks with each of `deltas` in turn, `get_int` in all, and the finish."""
    chunks: list[Json] = [
        {"id": "i", "choices": [{"index": 0, "delta": deltas[at % len(deltas)]}]}
        for at in range(count)
    ]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]


def call_piece(index: int, arguments: str) -> Json:
    """A fragment of one of several calls."""
    function = {"name": "f", "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": f"c{index}", "function": function}]}


PIECE = "x}" * 1000
OPENED = [call_piece(at, '{"a":"') for at in range(2)]
GROWING: dict[str, tuple[list[Json], list[Json]]] = {
    "text": ([], [{"content": PIECE}]),
    "thinking": ([], [{"reasoning_text": PIECE}]),
    "arguments": (OPENED[:1], [call_piece(0, PIECE)]),
    "two calls at once": (OPENED, [call_piece(0, PIECE), call_piece(1, PIECE)]),
    "words inside a call": (OPENED[:1], [call_piece(0, PIECE), {"content": "w"}]),
    "blanks": ([], [call_piece(0, " " * 400)]),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("caller", sorted(DIALECTS))
@pytest.mark.parametrize("case", GROWING)
def test_eight_times_the_answer_costs_some_eight_times_as_much(
    case: str, caller: str, stream: bool
) -> None:
    def work(count: int) -> Callable[[], object]:
        opening, repeated = GROWING[case]
        frames = [*chat_pieces(len(opening), *opening)[:-1], *chat_pieces(count, *repeated)]
        flow = make_flow("chat", caller, stream=stream)
        return lambda: [pass_on(flow, [copy.deepcopy(frame)]) for frame in frames] + [flow.end()]

    assert growth(work, 250) < 24  # 64 where all that came is looked at with each piece


@pytest.mark.parametrize("upstream", ["chat", "messages", "responses", "kiro"])
def test_a_runaway_ends_the_answer_of_every_upstream(upstream: str) -> None:
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}
    blank = "\n" * 5
    opening: dict[str, list[Json]] = {
        "chat": chat_pieces(1, call_piece(0, "{"))[:1],
        "messages": [
            {"type": "message_start", "message": {"id": "i"}},
            {"type": "content_block_start", "index": 0, "content_block": call},
        ],
        "responses": [{"type": "response.output_item.added", "output_index": 0, "item": item}],
        "kiro": [{"toolUseEvent": {"toolUseId": "c", "name": "f", "input": "{"}}],
    }
    delta = {"type": "input_json_delta", "partial_json": blank}
    arguments = "response.function_call_arguments.delta"
    pieces: dict[str, Json] = {
        "chat": chat_pieces(1, call_piece(0, blank))[0],
        "messages": {"type": "content_block_delta", "index": 0, "delta": delta},
        "responses": {"type": arguments, "output_index": 0, "delta": blank},
        "kiro": {"toolUseEvent": {"toolUseId": "c", "name": "f", "input": blank}},
    }
    for caller in DIALECTS:
        flow = make_flow(upstream, caller)
        pass_on(flow, copy.deepcopy([*opening[upstream], *[pieces[upstream]] * 4]))
        assert flow.error is None
        pass_on(flow, copy.deepcopy([pieces[upstream]] * 2))
        assert flow.error and "stuck" in flow.error.message
