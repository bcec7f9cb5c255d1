"""Section 8.4 and 8.5: Kiro's answers, from its event stream to both callers."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_kiro import error_frame, exception_frame, frame, message
from goldens import (
    CALLERS,
    GRAMMARS,
    KIRO_CASES,
    KIRO_PAIR_IDS,
    KIRO_PAIRS,
    KIRO_WINDOWS,
    VECTORS,
    Json,
    KiroCase,
    check_ending,
    kiro_window,
    make_flow,
    one_by_one,
    pass_on,
    play,
    split_events,
    write_events,
)

from aiclient_api import (
    KIRO,
    UNSIGNED,
    ApiError,
    ContextTooLong,
    EventStreamFraming,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotSignedIn,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    StreamTranslator,
    ThinkingTags,
    UpstreamError,
    classify_kiro_message,
    estimate_request,
    estimate_text,
    kiro_mark,
)

SEED = 20261122
ASKED: Json = {"messages": [{"content": "hi"}]}  # as goldens.py asks
MARK = kiro_mark("")
V2, V3, V4, V5, V6, V7, V8, V9, V10, V11, V12, V13, V14 = (
    VECTORS[f"V{number}"] for number in range(2, 15)
)

# ---- what Kiro says ----------------------------------------------------------------------------


def text(content: str, **more: Any) -> bytes:
    """Words of the answer."""
    return frame("assistantResponseEvent", {"content": content, **more})


def thought(words: str | None = None, **more: Any) -> bytes:
    """Words of a thought, or its signature."""
    return frame("reasoningContentEvent", {**({} if words is None else {"text": words}), **more})


def call(call_id: str | None, name: str | None = None, piece: Any = None, **more: Any) -> bytes:
    """A fragment of a call."""
    said = {"toolUseId": call_id, "name": name, "input": piece}
    return frame("toolUseEvent", {**{k: v for k, v in said.items() if v is not None}, **more})


def whole_call(call_id: str, name: str, arguments: str) -> bytes:
    """A call in one frame."""
    return call(call_id, name, arguments, stop=True)


def metadata(reason: str | None = None, **usage: int) -> bytes:
    """The stop reason and the tokens."""
    said: Json = {"stopReason": reason} if reason else {}
    return frame("metadataEvent", {**said, **({"tokenUsage": usage} if usage else {})})


def reported(output: int = 7) -> bytes:
    """Tokens as the service counts them."""
    return metadata(uncachedInputTokens=10, cacheReadInputTokens=5, outputTokens=output)


def context(share: float) -> bytes:
    """How full the context is."""
    return frame("contextUsageEvent", {"contextUsagePercentage": share})


def metering(credit: float) -> bytes:
    """What it costs."""
    return frame("meteringEvent", {"unit": "credit", "unitPlural": "credits", "usage": credit})


# ---- what a caller gets ------------------------------------------------------------------------


def meaning(sent: bytes) -> list[Any]:
    """The events of a stream with their JSON read."""
    return [
        (name, data if data == "[DONE]" else json.loads(data)) for name, data in split_events(sent)
    ]


def joined(sent: bytes) -> list[Any]:
    """Like `meaning`, with the growth of one block in one piece: where it is cut is free."""
    events: list[Any] = []
    for name, data in meaning(sent):
        before: Json = events[-1][1] if events else {}
        kind = name == "content_block_delta" and data["delta"]["type"]
        if kind and before.get("delta", {}).get("type") == kind:
            key = next(key for key in data["delta"] if key != "type")
            before["delta"][key] += data["delta"][key]
        else:
            events.append((name, data))
    return joined_chunks(events)


def joined_chunks(events: list[Any]) -> list[Any]:
    """The same for chat chunks that hold nothing but words."""
    kept: list[Any] = []
    for name, data in events:
        for key in ("content", "reasoning_content"):
            if kept and words_of(data, key) and words_of(kept[-1][1], key):
                kept[-1][1]["choices"][0]["delta"][key] += words_of(data, key)
                break
        else:
            kept.append((name, data))
    return kept


def words_of(data: Any, key: str) -> str:
    """The words of a chunk that holds only `key`."""
    choices = data.get("choices") if isinstance(data, dict) else None
    delta = choices[0]["delta"] if choices else {}
    return str(delta[key]) if list(delta) == [key] else ""


def answer(*messages: bytes, caller: str = "messages", **changes: Any) -> Json:
    """The caller's whole answer, after its stream was held to the caller's grammar."""
    data = b"".join(messages)
    flow = make_flow("kiro", caller, **changes)
    assert check_ending(flow, caller, play(flow, [data])) == "complete"
    flow = make_flow("kiro", caller, stream=False, **changes)
    assert play(flow, [data]) == b""
    return flow.response_body()


def blocks(*messages: bytes, **changes: Any) -> list[Json]:
    """The content that an Anthropic caller gets."""
    content: list[Json] = answer(*messages, **changes)["content"]
    return content


def stop_of(*messages: bytes, caller: str = "messages", **changes: Any) -> str:
    """The stop reason in the caller's words."""
    whole = answer(*messages, caller=caller, **changes)
    reason = whole["stop_reason"] if caller == "messages" else whole["choices"][0]["finish_reason"]
    return str(reason)


def said(text_: str) -> Json:
    """A text block."""
    return {"type": "text", "text": text_}


def called(call_id: str, name: str, arguments: Json) -> Json:
    """A call's block."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def thinking(words: str, signature: str = UNSIGNED) -> Json:
    """A thinking block."""
    return {"type": "thinking", "thinking": words, "signature": signature}


def played(
    *messages: bytes, caller: str = "messages", **changes: Any
) -> tuple[StreamTranslator, bytes]:
    """A streaming flow after its end, and what it sent."""
    flow = make_flow("kiro", caller, **changes)
    return flow, play(flow, [b"".join(messages)])


def random_reads(rng: random.Random, data: bytes) -> list[bytes]:
    """`data` cut at up to twelve places."""
    cuts = sorted(rng.sample(range(len(data)), min(len(data), rng.randint(1, 12))))
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]


# ---- every golden stream -----------------------------------------------------------------------


def test_there_are_goldens() -> None:
    """A folder that moved must not turn the tests below into nothing."""
    assert len(KIRO_CASES) == 6 and len(VECTORS) == 16


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_becomes_what_was_written_down(case: KiroCase, caller: str) -> None:
    """Whole, and message by message."""
    for reads in ([case.stream], case.messages()):
        flow = make_flow("kiro", caller, **case.context)
        sent = play(flow, reads)
        assert joined(sent) == joined(case.expected(caller))
        assert check_ending(flow, caller, sent) == "complete"


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_what_was_written_down_follows_the_grammar(case: KiroCase, caller: str) -> None:
    """The expectations themselves are held to the vendors' grammars."""
    assert GRAMMARS[caller](case.expected(caller)) == "complete"


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_fed_byte_by_byte_becomes_the_same(case: KiroCase, caller: str) -> None:
    """Reads may end anywhere, in the middle of a character too."""
    sent = play(make_flow("kiro", caller, **case.context), one_by_one(case.stream))
    assert joined(sent) == joined(case.expected(caller))


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_in_random_reads_becomes_the_same(case: KiroCase, caller: str) -> None:
    """Fifty seeded ways to cut the same bytes."""
    rng = random.Random(f"{SEED}{case.name}")
    told = joined(case.expected(caller))
    for _ in range(50):
        sent = play(make_flow("kiro", caller, **case.context), random_reads(rng, case.stream))
        assert joined(sent) == told


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_folds_to_the_whole_answer(case: KiroCase, caller: str) -> None:
    """Without streaming nothing is sent before the end, and the answer is the fold."""
    for reads in ([case.stream], one_by_one(case.stream)):
        flow = make_flow("kiro", caller, stream=False, **case.context)
        assert play(flow, reads) == b""
        assert flow.response_body() == case.whole(caller)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_cut_inside_a_message_is_an_error(
    case: KiroCase, caller: str, stream: bool
) -> None:
    """kiro.md 5.1: bytes that are left are a truncated stream, with or without streaming."""
    borders = {0, *itertools.accumulate(map(len, case.messages()))}
    for cut in range(0, len(case.stream), 1 if len(case.stream) < 1500 else 3):
        if cut in borders:
            continue
        flow = make_flow("kiro", caller, stream=stream, **case.context)
        sent = play(flow, [case.stream[:cut]])
        assert check_ending(flow, caller, sent) == "error", cut
        assert isinstance(flow.error, UpstreamError)


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_a_golden_stream_cut_between_messages_is_an_answer(case: KiroCase, caller: str) -> None:
    """kiro.md 5.1: there is no message that ends a stream; what is cut is no finished call."""
    messages = case.messages()
    for count in range(1, len(messages)):
        flow = make_flow("kiro", caller, **case.context)
        sent = play(flow, messages[:count])
        assert check_ending(flow, caller, sent) == "complete", count


@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_an_error_from_below_at_any_offset_ends_the_answer(case: KiroCase, caller: str) -> None:
    """A reset or a timeout of the connection is told the same way as the upstream's own word."""
    for cut in range(0, len(case.stream), 7):
        flow = make_flow("kiro", caller, **case.context)
        sent = flow.feed(case.stream[:cut])
        sent += flow.end(UpstreamError("The connection broke."))
        assert check_ending(flow, caller, sent) == "error"
        assert flow.feed(case.stream) == b"" and flow.end() == b""


ODD_VALUES: list[Any] = [None, "", "x", 0, -1, 7, 1e308, 10**400, True, [], {}, [None], {"a": 1}]
NOTHING = object()


def odd_versions(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was changed, the value) with something odd at each path."""
    for odd in ODD_VALUES:
        yield f"= {odd!r:.20}", odd
    if isinstance(value, dict):
        for key in value:
            without = {k: v for k, v in value.items() if k != key}
            yield f".{key} removed", without
            for where, inner in odd_versions(value[key]):
                yield f".{key}{where}", {**without, key: inner}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("case", "caller"), KIRO_PAIRS, ids=KIRO_PAIR_IDS)
def test_no_strange_value_anywhere_in_a_stream_is_more_than_an_error(
    case: KiroCase, caller: str, stream: bool
) -> None:
    """Whatever an upstream puts at any path, the caller hears an answer or an ApiError."""
    lines = (case.folder / "stream.events").read_bytes().splitlines(keepends=True)
    broken: set[str] = set()
    for at, line in enumerate(lines):
        name, _, payload = line.decode().partition(" ")
        for where, odd in odd_versions(json.loads(payload)):
            row = f"{name} {json.dumps(odd)}\n".encode()
            data = write_events(b"".join([*lines[:at], row, *lines[at + 1 :]]))
            flow = make_flow("kiro", caller, stream=stream, **case.context)
            try:
                play(flow, [b"".join(data)])
                if not stream and not flow.error:
                    flow.response_body()
            except ApiError:
                pass
            except Exception as error:  # noqa: BLE001 - each kind is told with its path
                broken.add(f"{name}{where}: {type(error).__name__}: {error}")
    assert not broken, "\n".join(sorted(broken))


# ---- the turns of kiro.md (c) ------------------------------------------------------------------

ACCENTS = "\u00e9\u20ac\U0001f600"
WEATHER = called("tooluse_1", "get_weather", {"city": "Paris"})
# name -> (the stream, an Anthropic caller's content, its stop reason, OpenAI's finish)
TURNS: dict[str, tuple[bytes, list[Json], str, str]] = {
    "text": (
        V14 + V2 + V3 + V8 + V9 + V10,
        [said("Hello" + ACCENTS)],
        "end_turn",
        "stop",
    ),
    "tool": (
        V2 + V4 + V5 + V6 + V7 + V8 + V9,
        [said("Hello"), WEATHER],
        "tool_use",
        "tool_calls",
    ),
    "zero-argument tool": (
        V4 + V7,
        [called("tooluse_1", "get_weather", {})],
        "tool_use",
        "tool_calls",
    ),
    "the same words twice": (V2 + V2, [said("HelloHello")], "end_turn", "stop"),
    "thought": (V11 + V2 + V10, [thinking("Let me think."), said("Hello")], "end_turn", "stop"),
}


def chat_message(content: list[Json]) -> Json:
    """What an OpenAI caller gets for an Anthropic caller's content."""
    texts = [block["text"] for block in content if block["type"] == "text"]
    calls = [
        (block["id"], block["name"], block["input"])
        for block in content
        if block["type"] == "tool_use"
    ]
    thoughts = [block["thinking"] for block in content if block["type"] == "thinking"]
    return {"text": "".join(texts) or None, "calls": calls, "thought": "".join(thoughts) or None}


def read_chat_message(whole: Json) -> Json:
    """The same facts from an OpenAI answer."""
    said_ = whole["choices"][0]["message"]
    calls = [
        (item["id"], item["function"]["name"], json.loads(item["function"]["arguments"]))
        for item in said_.get("tool_calls") or ()
    ]
    return {"text": said_["content"], "calls": calls, "thought": said_.get("reasoning_content")}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_reaches_both_callers_streamed_and_whole(turn: str) -> None:
    """kiro.md (c)."""
    stream, content, reason, finish = TURNS[turn]
    whole = answer(stream, window=kiro_window)
    assert (whole["content"], whole["stop_reason"]) == (content, reason)
    whole = answer(stream, caller="chat", window=kiro_window)
    assert read_chat_message(whole) == chat_message(content)
    assert whole["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_is_the_same_however_it_is_cut(turn: str, caller: str) -> None:
    """In one read, byte by byte, at seeded random places; streamed and whole."""
    stream = TURNS[turn][0]
    rng = random.Random(f"{SEED}{turn}")
    ways = [one_by_one(stream), *(random_reads(rng, stream) for _ in range(30))]
    expected = meaning(play(make_flow("kiro", caller), [stream]))
    whole = answer(stream, caller=caller)
    for reads in ways:
        assert meaning(play(make_flow("kiro", caller), reads)) == expected
        flow = make_flow("kiro", caller, stream=False)
        play(flow, reads)
        assert flow.response_body() == whole


def test_the_text_turn_counts_what_it_says() -> None:
    """kiro.md (c): 15 input tokens in all, 7 output, 0.25 credits."""
    for caller in CALLERS:
        flow, _ = played(TURNS["text"][0], caller=caller, window=kiro_window)
        usage = flow.usage
        assert (usage.input, usage.cache_read, usage.cache_write, usage.prompt) == (10, 5, 0, 15)
        assert (usage.output, usage.nano_credits) == (7, 250_000_000)
        assert usage.source == "reported"
    assert answer(TURNS["text"][0])["usage"] == {
        "input_tokens": 10,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 7,
    }
    assert answer(TURNS["text"][0], caller="chat")["usage"]["prompt_tokens"] == 15


def test_a_truncated_call_is_no_tool_use() -> None:
    """kiro.md (c) and trap 5: V4 and V5, then the end."""
    assert stop_of(V4 + V5) == "max_tokens"
    assert stop_of(V4 + V5, caller="chat") == "length"
    assert stop_of(V2 + V4) == "max_tokens"


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("failure", "kind", "word"),
    [(V12, Overloaded, "Too many requests"), (V13, UpstreamError, "boom")],
    ids=["exception", "error"],
)
def test_a_failure_in_the_middle_ends_the_stream_with_an_error(
    failure: bytes, kind: type[ApiError], word: str, caller: str
) -> None:
    """kiro.md (c) and trap 2: text, then the error event; never a finish."""
    stream = V2 + failure
    for reads in ([stream], one_by_one(stream), [stream + V2 + V10], [stream, V2, V10]):
        flow = make_flow("kiro", caller)
        sent = play(flow, reads)
        assert check_ending(flow, caller, sent) == "error"
        assert sent.count(b"Hello") == 1 and word.encode() in sent
        assert type(flow.error) is kind
        assert b"message_stop" not in sent and b"[DONE]" not in sent
    flow = make_flow("kiro", caller, stream=False)
    assert play(flow, [stream]) == b""
    with pytest.raises(kind):
        flow.response_body()


# ---- stop reasons ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "word", "finish"),
    [
        (None, "end_turn", "stop"),
        ("END_TURN", "end_turn", "stop"),
        ("STOP_SEQUENCE", "end_turn", "stop"),
        ("TOOL_USE", "end_turn", "stop"),
        ("UNKNOWN", "end_turn", "stop"),
        ("A_NEW_ONE", "end_turn", "stop"),
        ("MAX_TOKENS", "max_tokens", "length"),
        ("MODEL_CONTEXT_WINDOW_EXCEEDED", "model_context_window_exceeded", "length"),
        ("CONTENT_FILTERED", "refusal", "content_filter"),
        ("GUARDRAIL_INTERVENED", "refusal", "content_filter"),
        ("PAUSE_TURN", "pause_turn", "stop"),
    ],
)
def test_a_stop_reason_has_its_word_in_each_dialect(
    reason: str | None, word: str, finish: str
) -> None:
    """kiro.md 5.6."""
    end = metadata(reason) if reason else b""
    assert stop_of(V2, end) == word
    assert stop_of(V2, end, caller="chat") == finish
    assert stop_of(end, V2) == word, "the order of the last events varies"


@pytest.mark.parametrize(
    "reason",
    [None, "END_TURN", "TOOL_USE", "MAX_TOKENS", "PAUSE_TURN", "CONTENT_FILTERED", "UNKNOWN"],
)
def test_a_complete_call_wins_over_every_stop_reason(reason: str | None) -> None:
    """kiro.md 5.6, the first row."""
    end = metadata(reason) if reason else b""
    assert stop_of(V4, V7, end) == "tool_use"
    assert stop_of(V4, V7, end, caller="chat") == "tool_calls"


@pytest.mark.parametrize("reason", [None, "END_TURN", "TOOL_USE"])
def test_a_truncated_call_wins_over_a_good_stop_reason(reason: str | None) -> None:
    """kiro.md 5.6: truncated JSON is max_tokens."""
    end = metadata(reason) if reason else b""
    assert stop_of(V4, V5, end) == "max_tokens"
    assert stop_of(V4, V5, end, caller="chat") == "length"


@pytest.mark.parametrize("share", [100, 100.0, 113.5])
def test_a_full_context_is_a_reason_where_none_is_told(share: float) -> None:
    """kiro.md 5.6: contextUsagePercentage of 100 and more."""
    assert stop_of(V2, context(share)) == "model_context_window_exceeded"
    assert stop_of(V2, context(share), caller="chat") == "length"
    assert stop_of(V2, context(99.9)) == "end_turn"
    assert stop_of(V4, V7, context(share)) == "tool_use"


# ---- usage -------------------------------------------------------------------------------------


def usage_of(*messages: bytes, **changes: Any) -> tuple[str, int, int]:
    """(source, input, output) of an answer."""
    flow, _ = played(*messages, **{"window": kiro_window, **changes})
    return flow.usage.source, flow.usage.input, flow.usage.output


@pytest.mark.parametrize("model", KIRO_WINDOWS)
def test_a_share_of_the_context_is_of_the_window_of_the_model_that_answers(model: str) -> None:
    """kiro.md 7.2 and trap 23: the share is of what comes after the answer."""
    source, input_, output = usage_of(text("x" * 36, modelId=model), context(50))
    assert (source, output) == ("derived", int(estimate_text("x" * 36)))
    assert input_ == KIRO_WINDOWS[model] // 2 - output


def test_the_model_that_auto_chose_decides() -> None:
    """kiro.md 7.2: the window of the actual model, whatever was asked for."""

    def window(model_id: str) -> int:
        return KIRO_WINDOWS.get(model_id, KIRO_WINDOWS["auto"])

    hello = text("Hello", modelId="claude-opus-4.8")
    assert usage_of(hello, context(1.5), window=window) == ("derived", 14_999, 1)
    assert usage_of(V2, context(1.5), window=window) == ("derived", 14, 1)
    assert usage_of(V4, V7, context(1.5), window=window)[0] == "derived"


def test_the_share_may_come_before_the_models_name() -> None:
    """kiro.md 5.3: the order of events varies."""
    hello = text("Hello", modelId="claude-opus-4.8")
    assert usage_of(context(1.5), hello) == ("derived", 14_999, 1)


def test_an_input_is_never_below_zero() -> None:
    """kiro.md 7.2: max(0, total - output)."""
    source, input_, output = usage_of(text("x" * 3600, modelId="auto"), context(50))
    assert (source, input_, output) == ("derived", 0, int(estimate_text("x" * 3600)))


def test_reported_tokens_win_over_derived_ones_in_any_order() -> None:
    """kiro.md 7.2, the order of trust; the context does not change what was counted."""
    for events in itertools.permutations([reported(), context(1.5), metering(0.25)]):
        flow, _ = played(text("Hi", modelId="auto"), *events, window=kiro_window)
        usage = flow.usage
        assert (usage.source, usage.input, usage.cache_read, usage.output) == ("reported", 10, 5, 7)
        assert usage.nano_credits == 250_000_000


def test_a_stop_reason_alone_reports_nothing() -> None:
    """kiro.md U10: CLI captures of 2026 had no tokenUsage."""
    assert usage_of(text("Hi", modelId="auto"), metadata("END_TURN"), context(1.5))[0] == "derived"
    assert usage_of(text("Hi"), metadata("END_TURN"))[0] == "estimated"


@pytest.mark.parametrize("name", ["usageEvent", "metricsEvent"])
def test_the_rare_usage_events_are_reports(name: str) -> None:
    """kiro.md 5.3: peers have seen them."""
    counted = frame(name, {"inputTokens": 11, "outputTokens": 3})
    assert usage_of(V2, counted, context(1.5)) == ("reported", 11, 3)


def test_an_output_without_an_input_does_not_make_the_input_zero() -> None:
    """kiro.md 7.2: what is not reported is derived, else estimated."""
    counted = metadata(outputTokens=7)
    _, input_, output = usage_of(text("Hi", modelId="auto"), counted, context(50))
    assert (input_, output) == (493, 7)
    _, input_, output = usage_of(text("Hi"), counted)
    assert input_ > 1 and output == 7


def test_what_nobody_counted_is_estimated() -> None:
    """kiro.md 7.2: over the request, and over text, thought and calls of the answer."""
    asked = {"messages": [{"role": "user", "content": "word " * 500}]}
    source, input_, output = usage_of(text("word " * 100), request_body=asked)
    assert source == "estimated" and input_ > 400 and 80 < output < 200
    assert usage_of(text("x"), context(1.5), window=None)[0] == "estimated"
    assert usage_of(text("x"), context(1.5))[0] == "estimated", "nobody knows the window"


def test_thoughts_and_calls_are_output_too() -> None:
    """Trap 23: an answer of calls alone is not 0 tokens."""
    assert usage_of(thought("x" * 360))[2] == int(estimate_text("x" * 360)) >= 100
    arguments = json.dumps({"text": "x" * 349})
    assert usage_of(whole_call("a", "f", arguments))[2] >= 100
    assert usage_of(V4, V7)[2] >= 1


def test_a_signature_is_no_output() -> None:
    """kiro.md 7.2: text, thought and calls; an opaque signature of 2 KB is no token of these."""
    signed = [thought("x" * 36), thought(signature="Eq" + "A" * 2000), text("x" * 36)]
    assert usage_of(*signed) == usage_of(signed[0], signed[2])
    late = [text("x" * 36), thought("..."), thought(signature=".KTR~~" + "A" * 2000)]
    assert usage_of(*late) == usage_of(text("x" * 36))


def test_tokens_are_never_below_zero() -> None:
    """Whatever an upstream reports."""
    counted = metadata(uncachedInputTokens=-5, cacheReadInputTokens=-1, outputTokens=-2)
    usage = answer(V2, counted)["usage"]
    assert all(number >= 0 for number in usage.values())


def test_credits_add_up_whatever_the_tokens_are_from() -> None:
    """kiro.md 5.3 and 7.2: several per answer, steps finer than a hundredth."""
    bills = metering(0.0417) + metering(0.25) + metering(0.000000001) + metering(3)
    ends = {"reported": reported(), "derived": context(1.5), "estimated": b""}
    for source, end in ends.items():
        for order in (bills + end, end + bills):
            flow, _ = played(text("Hi", modelId="auto"), order, window=kiro_window)
            assert flow.usage.nano_credits == 3_291_700_001
            assert flow.usage.source == source


def test_both_callers_are_told_the_same_tokens() -> None:
    """The last frame corrects what message_start estimated."""
    stream = text("Hi there", modelId="claude-sonnet-4.5") + context(1.5)
    usage = answer(stream, window=kiro_window)["usage"]
    chat = answer(stream, caller="chat", window=kiro_window)["usage"]
    output = max(1, int(estimate_text("Hi there")))
    assert usage["input_tokens"] == chat["prompt_tokens"] == 3000 - output
    assert usage["output_tokens"] == chat["completion_tokens"] == output
    _, sent = played(stream, window=kiro_window)
    assert meaning(sent)[0][1]["message"]["usage"]["input_tokens"] == estimate_request(ASKED)
    assert meaning(sent)[-2][1]["usage"] == usage


@pytest.mark.parametrize("words", ["a", "word ", "日本語", "Привет ", 'say "x"\n'])
@pytest.mark.parametrize("caller", CALLERS)
def test_the_estimate_does_not_depend_on_how_the_answer_was_cut(words: str, caller: str) -> None:
    """The same bytes are the same answer, in one read or in many."""
    messages = [text(words, modelId="claude-sonnet-4.5") for _ in range(400)]
    stream = b"".join([*messages, context(50)])
    usages = set()
    in_two = [b"".join(messages), context(50)]
    for reads in ([stream], in_two, [*messages, context(50)], one_by_one(stream)):
        flow = make_flow("kiro", caller, window=kiro_window)
        play(flow, reads)
        usages.add((flow.usage.input, flow.usage.output))
    whole = make_flow("kiro", caller, stream=False, window=kiro_window)
    play(whole, [stream])
    usages.add((whole.usage.input, whole.usage.output))
    assert len(usages) == 1


# ---- tool calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fragments",
    [
        [call("a", "f"), call("a", "f", '{"x"'), call("a", "f", ":1}"), call("a", "f", stop=True)],
        [call("a", "f"), call("a", None, '{"x"'), call("a", None, ":1}"), call("a", stop=True)],
        [call("a", "f"), call(None, None, '{"x"'), call(None, None, ":1}"), call(None, stop=True)],
        [call("a", "f", '{"x":1}', stop=True)],
        [call("a", "f", '{"x"'), call("a", "f", ":1}", stop=True)],
        [call("a", "f", {"x": 1}, stop=True)],
        [call("a", "f"), call("a", "f", {"x": 1}), call("a", "f", stop=True)],
        [call("a", None, '{"x"'), call("a", "f", ":1}"), call("a", stop=True)],
        [call("a", "f", '{"x":1}'), call("a", "f", "", stop=True)],
        [call("a", "f", '{"x":1}', stop=True), call("a", "f", '{"x":1}', stop=True)],
        [call("a", "f", '{"x":1}', stop=True), call("a", stop=True)],
        [call("a", "f", '{"x":1}', stop=False)],
        [call("a", "f", '{"x"', stop=None), call("a", "f", ":1}", stop="yes")],
        [call("a", "f", '{"x":1}\n ')],
    ],
    ids=[
        "all repeated",
        "names missing",
        "ids missing",
        "one frame",
        "stop with input",
        "an object",
        "an object between",
        "name later",
        "stop with nothing",
        "completed twice",
        "stopped twice",
        "no stop",
        "a stop that is none",
        "white space behind",
    ],
)
def test_a_call_is_put_together_from_its_fragments(fragments: list[bytes]) -> None:
    """kiro.md 5.4, trap 4."""
    whole = answer(*fragments)
    assert whole["content"] == [called("a", "f", {"x": 1})]
    assert whole["stop_reason"] == "tool_use"
    chat = answer(*fragments, caller="chat")
    assert read_chat_message(chat)["calls"] == [("a", "f", {"x": 1})]
    assert chat["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    "fragments",
    [
        [call("a", "f"), call("a", "f", stop=True)],
        [call("a", "f", stop=True)],
        [call("a", "f", ""), call("a", "f", "", stop=True)],
        [call("a", "f", "  "), call("a", "f", " \n", stop=True)],
        [call("a", "f", {}), call("a", "f", stop=True)],
        [call("a", "f", "{}"), call("a", "f", stop=True)],
        [frame("toolUseEvent", {"toolUseId": "a", "name": "f", "input": None, "stop": True})],
    ],
    ids=["two frames", "one frame", "empty", "white space", "an object", "braces", "null"],
)
def test_a_call_without_arguments_has_an_empty_object(fragments: list[bytes], caller: str) -> None:
    """kiro.md 5.4: an empty or blank total is a valid call; clients parse what they get."""
    flow, sent = played(*fragments, caller=caller)
    assert check_ending(flow, caller, sent) == "complete"
    whole = answer(*fragments, caller=caller)
    if caller == "messages":
        assert whole["content"] == [called("a", "f", {})]
        assert whole["stop_reason"] == "tool_use"
    else:
        assert read_chat_message(whole)["calls"] == [("a", "f", {})]


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "end"])
@pytest.mark.parametrize(
    "arguments",
    ["[1]", '"x"', "null", "1", "true", '{"x":', '{"x":1}}', '{"x":1', '{"x":NaN}', "x", "{'x':1}"],
)
def test_arguments_that_are_no_object_are_no_tool_use(arguments: str, stop: bool) -> None:
    """kiro.md 5.4: the call is broken; the caller must not run it."""
    broken = call("a", "f", arguments, **({"stop": True} if stop else {}))
    assert stop_of(broken) == "max_tokens"
    assert stop_of(broken, caller="chat") == "length"
    assert stop_of(broken, metadata("TOOL_USE")) == "max_tokens"


def test_a_call_that_is_cut_short_is_not_hidden_by_a_good_one() -> None:
    """Trap 5: the caller would run one call and think that it was all."""
    good, cut = whole_call("a", "f", "{}"), call("b", "g", '{"x":')
    for messages in ([good, cut], [cut, good], [call("b", "g"), good]):
        assert stop_of(*messages) == "max_tokens"
        assert stop_of(*messages, caller="chat") == "length"


def test_a_new_call_before_the_stop_completes_the_earlier_one() -> None:
    """kiro.md 5.4: complete when its JSON parses; the stop may still come, and late."""
    first, second = called("a", "f", {"x": 1}), called("b", "g", {"y": 2})
    opened = [call("a", "f"), call("a", "f", '{"x":1}'), call("b", "g"), call("b", "g", '{"y":2}')]
    for more in ([], [call("b", stop=True)], [call("b", stop=True), call("a", stop=True)]):
        whole = answer(*opened, *more)
        assert whole["content"] == [first, second]
        assert whole["stop_reason"] == "tool_use"


def test_interleaved_calls_come_out_one_after_the_other() -> None:
    """kiro.md 5.4: keyed by id; seeded orders of the fragments of three calls."""
    rng = random.Random(SEED)
    for _ in range(100):
        values = [{"key": f"v{at} }}{{\U0001f642" * rng.randint(0, 4)} for at in range(3)]
        queues = []
        for at, value in enumerate(values):
            arguments = json.dumps(value, ensure_ascii=rng.random() < 0.5)
            cut = sorted(rng.choices(range(len(arguments) + 1), k=2))
            ends = [0, *cut, len(arguments)]
            parts = [arguments[a:b] for a, b in itertools.pairwise(ends)]
            pieces = [call(f"id{at}", f"f{at}", part) for part in parts]
            queues.append([call(f"id{at}", f"f{at}"), *pieces, call(f"id{at}", stop=True)])
        opened = [queue.pop(0) for queue in queues]
        order = [at for at, queue in enumerate(queues) for _ in queue]
        rng.shuffle(order)
        stream = b"".join([*opened, *(queues[at].pop(0) for at in order)])
        whole = answer(stream)
        assert [b["name"] for b in whole["content"]] == ["f0", "f1", "f2"]
        assert [b["input"] for b in whole["content"]] == values
        assert whole["stop_reason"] == "tool_use"
        chat = read_chat_message(answer(stream, caller="chat"))
        assert [arguments for _, _, arguments in chat["calls"]] == values


def random_turn(rng: random.Random) -> list[bytes]:
    """Any events in any order, as no service would send them."""
    words = ["x", "<thinking>", "</thinking>", "\n\n", "<th", "inking>", "`", "..."]
    pieces = [None, "{", "}", '{"x":1}', "{}", {"a": 1}, "[1]"]
    rare = [metadata("MAX_TOKENS"), thought(redactedContent="R"), V8, V9, V10]
    failures = [V12, exception_frame("ContentLengthExceededException", {})]
    makers: list[Callable[[], bytes]] = [
        lambda: text(rng.choice(words)),
        lambda: thought(rng.choice(words)),
        lambda: thought(signature="S"),
        lambda: call(
            rng.choice(["a", "b", "c", None]),
            rng.choice(["f", "g", None]),
            rng.choice(pieces),
            **rng.choice([{}, {"stop": True}]),
        ),
        lambda: rng.choice(rare),
        lambda: rng.choice(failures) if rng.random() < 0.1 else text("y"),
    ]
    weights = [3, 1, 1, 4, 1, 1]
    return [make() for make in rng.choices(makers, weights, k=rng.randint(1, 14))]


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "tagged"])
@pytest.mark.parametrize("caller", CALLERS)
def test_any_events_in_any_order_follow_the_callers_grammar(caller: str, tagged: bool) -> None:
    """Seeded: a tool_use never holds what is no object, and no order of events breaks a stream."""
    rng = random.Random(f"{SEED}{caller}{tagged}")
    for _ in range(700):
        messages = random_turn(rng)
        flow = make_flow("kiro", caller, tagged_thinking=tagged)
        check_ending(flow, caller, play(flow, messages))
        whole = make_flow("kiro", caller, stream=False, tagged_thinking=tagged)
        assert play(whole, [b"".join(messages)]) == b""
        assert (whole.error is None) == (flow.error is None)


def test_a_call_follows_another_with_words_between() -> None:
    """Each block on its own."""
    stream = [V2, whole_call("a", "f", "{}"), text("and"), whole_call("b", "g", "{}"), text("end")]
    assert blocks(*stream) == [
        said("Hello"),
        called("a", "f", {}),
        said("and"),
        called("b", "g", {}),
        said("end"),
    ]
    assert stop_of(*stream) == "tool_use"


def test_words_between_the_fragments_of_a_call_are_kept() -> None:
    """They may not fall into the call's block, nor be lost, nor break the call."""
    stream = [call("a", "f", '{"x"'), text("wait"), thought("hm"), call("a", "f", ":1}", stop=True)]
    content = blocks(*stream)
    assert content[0] == called("a", "f", {"x": 1})
    assert said("wait") in content and thinking("hm") in content
    chat = read_chat_message(answer(*stream, caller="chat"))
    assert chat == {"text": "wait", "calls": [("a", "f", {"x": 1})], "thought": "hm"}


def test_words_inside_a_call_that_is_cut_short_are_kept() -> None:
    """The last words before the end are the caller's."""
    content = blocks(call("a", "f", '{"x"'), text("wait"))
    assert said("wait") in content
    assert stop_of(call("a", "f", '{"x"'), text("wait")) == "max_tokens"


def test_calls_without_any_id_are_all_called() -> None:
    """A fragment without id belongs to the open call; where none is open it is a new one."""
    stream = [call(None, "f", '{"x":1}', stop=True), call(None, "g", '{"y":2}', stop=True)]
    content = blocks(*stream)
    assert [(b["name"], b["input"]) for b in content] == [("f", {"x": 1}), ("g", {"y": 2})]
    assert len({b["id"] for b in content}) == 2 and all(b["id"] for b in content)
    chat = read_chat_message(answer(*stream, caller="chat"))
    assert [row[1:] for row in chat["calls"]] == [("f", {"x": 1}), ("g", {"y": 2})]


def test_a_call_without_id_gets_one() -> None:
    """A caller answers a call by its id."""
    (block,) = blocks(call(None, "f"), call(None, "f", '{"x":1}'), call(None, "f", stop=True))
    assert block["id"] and (block["name"], block["input"]) == ("f", {"x": 1})


def test_ids_made_up_for_calls_differ_between_answers() -> None:
    """A conversation holds several answers: two calls of one id cannot be told apart."""
    ids = [blocks(call(None, "f", "{}", stop=True), id=f"gw-{at}")[0]["id"] for at in range(2)]
    assert len(set(ids)) == 2


def test_a_call_without_a_name_is_none() -> None:
    """kiro.md 5.6: no call emitted is no tool_use."""
    assert stop_of(V2, call("a", None, "{}", stop=True)) in ("end_turn", "max_tokens")
    assert blocks(V2, call("a", None, "{}", stop=True)) == [said("Hello")]


@pytest.mark.parametrize("caller", CALLERS)
def test_upstream_tool_names_become_the_callers(caller: str) -> None:
    """Trap 9: one map for each request, both ways."""
    stream = [whole_call("a", "short_1", "{}"), whole_call("b", "other", "{}")]
    names = {"short_1": "mcp__a.very/long-name"}
    whole = answer(*stream, caller=caller, names=names)
    assert '"mcp__a.very/long-name"' in json.dumps(whole) and "short_1" not in json.dumps(whole)
    assert '"other"' in json.dumps(whole)
    _, sent = played(*stream, caller=caller, names=names)
    assert b"short_1" not in sent


def test_a_calls_arguments_go_on_as_they_come() -> None:
    """kiro.md 5.4: minutes may lie between the fragments of a big one."""
    flow = make_flow("kiro", "messages")
    assert b"tool_use" in flow.feed(V4)
    assert b"Pa" in flow.feed(V5)
    assert b"ris" in flow.feed(V6)
    assert b"content_block_stop" in flow.feed(V7)


def test_a_big_calls_arguments_are_passed_on_once_each() -> None:
    """What was sent is not sent again with each fragment."""
    pieces = ['{"t":"', *["x" * 50] * 2000, '"}']
    flow, sent = played(call("a", "f"), *(call("a", "f", p) for p in pieces), call("a", stop=True))
    assert check_ending(flow, "messages", sent) == "complete"
    assert sent.count(b"x" * 50) == 2000 and len(sent) < 2000 * 300


def test_the_function_call_shape_of_2023_is_answered_in_kind() -> None:
    """Who sent `functions` gets `function_call`."""
    flow = make_flow("kiro", "chat", stream=False, legacy_functions=True)
    play(flow, [V4, V5, V6, V7])
    choice = flow.response_body()["choices"][0]
    function_call = choice["message"]["function_call"]
    assert function_call["name"] == "get_weather"
    assert json.loads(function_call["arguments"]) == {"city": "Paris"}
    assert choice["finish_reason"] == "function_call"


# ---- native thinking ---------------------------------------------------------------------------


def test_a_signature_in_pieces_is_joined_and_marked_as_ours() -> None:
    """kiro.md 4.11, trap 22."""
    stream = [thought("hm"), thought(signature="Eq"), thought(signature="QB=="), V2]
    assert blocks(*stream) == [thinking("hm", MARK + "EqQB=="), said("Hello")]
    assert blocks(*stream[:3]) == [thinking("hm", MARK + "EqQB==")]
    with_words = [thought("hm", signature="EqQB=="), V2]
    assert blocks(*with_words) == blocks(*stream)


def test_a_chat_caller_gets_the_thought_and_never_the_signature() -> None:
    """Its dialect has no place for one."""
    _, sent = played(thought("hm"), thought(signature="EqEXAMPLE"), V2, caller="chat")
    assert b'"reasoning_content":"hm"' in sent and b"EqEXAMPLE" not in sent


def test_a_thought_without_signature_is_a_thought() -> None:
    """kiro.md 5.3: all members are optional."""
    assert blocks(V11, V2) == [thinking("Let me think."), said("Hello")]


def test_each_thought_has_its_own_signature() -> None:
    """A model that thinks between its calls signs each thought; a wrong one is a 400 later."""
    stream = [
        thought("one"),
        thought(signature="EqONE"),
        whole_call("a", "f", "{}"),
        thought("two"),
        thought(signature="EqTWO"),
        whole_call("b", "g", "{}"),
    ]
    assert blocks(*stream) == [
        thinking("one", MARK + "EqONE"),
        called("a", "f", {}),
        thinking("two", MARK + "EqTWO"),
        called("b", "g", {}),
    ]


def test_a_thought_without_signature_does_not_take_the_one_before() -> None:
    """Text and signature belong together."""
    stream = [thought("one"), thought(signature="EqONE"), V2, thought("two")]
    assert blocks(*stream)[-1] == thinking("two")


def test_a_hidden_thought_is_a_signature_without_words() -> None:
    """kiro.md 4.11: GPT's literal dots, with the signature late and in one frame or two.

    Behind words it is not shown: clients take the last block for the answer.
    """
    for late in (
        [thought("..."), thought(signature=".KTR~~EXAMPLE")],
        [thought("...", signature=".KTR~~EXAMPLE")],
        [thought("..."), thought(signature=".KTR~~"), thought(signature="EXAMPLE")],
    ):
        assert blocks(V2, *late) == [said("Hello")]
        called = blocks(V2, V4, V5, V6, V7, *late)
        assert [block["type"] for block in called] == ["text", "tool_use", "thinking"]
        assert called[-1] == thinking("", called[-1]["signature"])
        assert called[-1]["signature"].endswith(".KTR~~EXAMPLE")
        chat = read_chat_message(answer(V2, *late, caller="chat"))
        assert chat == {"text": "Hello", "calls": [], "thought": None}
    assert blocks(V2, thought("...")) == [said("Hello")]


def test_dots_in_a_thought_of_words_are_kept() -> None:
    """Only a thought that is nothing else is hidden: a delta of Claude's may be dots."""
    assert blocks(thought("Wait"), thought("..."), thought(" yes"), V2)[0] == thinking(
        "Wait... yes"
    )


def test_redacted_thinking_is_carried_as_such() -> None:
    """kiro.md 5.3."""
    stream = [thought(redactedContent="b64EXAMPLE=="), V2]
    assert blocks(*stream) == [
        {"type": "redacted_thinking", "data": MARK + "b64EXAMPLE=="},
        said("Hello"),
    ]
    assert b"EXAMPLE" not in played(*stream, caller="chat")[1]


def test_redacted_thinking_inside_a_call_does_not_break_the_call() -> None:
    """Like words between its fragments."""
    stream = [call("a", "f", '{"x"'), thought(redactedContent="b64EXAMPLE"), call("a", "f", ":1}")]
    whole = answer(*stream, call("a", "f", stop=True))
    assert called("a", "f", {"x": 1}) in whole["content"]
    assert whole["stop_reason"] == "tool_use"


def test_thinking_is_hidden_from_a_caller_who_omits_it() -> None:
    """The block and its signature stay."""
    stream = [thought("secret words"), thought(signature="EqQB=="), V2]
    assert blocks(*stream, hide_thinking=True)[0] == thinking("", MARK + "EqQB==")
    assert b"secret words" not in played(*stream, hide_thinking=True)[1]


def test_a_signature_is_kept_for_callers_who_cannot_carry_it() -> None:
    """kiro.md 4.11: without it Claude stops thinking after the first tool round."""
    kept: list[tuple[list[str], str, str]] = []

    def keep(ids: list[str], words: str, signature: str) -> None:
        kept.append((ids, words, signature))

    calls = [whole_call("a", "f", "{}"), whole_call("b", "g", "{}")]
    signed = [thought("hm "), thought("so"), thought(signature="Eq"), thought(signature="QB")]
    played(*signed, *calls, caller="chat", store_reasoning=keep)
    assert kept == [(["a", "b"], "hm so", "EqQB")]
    played(*calls, thought("..."), thought(signature=".KTR~~"), caller="chat", store_reasoning=keep)
    assert kept.pop() == (["a", "b"], "...", ".KTR~~")
    kept.clear()
    played(*signed, V2, caller="chat", store_reasoning=keep)
    played(thought("hm"), *calls, caller="chat", store_reasoning=keep)
    played(*signed, V4, V5, caller="chat", store_reasoning=keep)
    assert [row for row in kept if row[0] != ["tooluse_1"]] == []


# ---- thinking in tags --------------------------------------------------------------------------

# answer -> (thought, text): kiro.md 4.11
TAGGED: dict[str, tuple[str, str]] = {
    "<thinking>a</thinking>\n\nb": ("a", "b"),
    "<thinking>\na\n</thinking>\n\nb": ("a\n", "b"),
    "<thinking>\n\na</thinking>\n\n\nb": ("\na", "\nb"),
    " \n\t<thinking>a</thinking>\n\nb": ("a", "b"),
    "<thinking>a</thinking>\n\n": ("a", ""),
    "<thinking></thinking>\n\nb": ("", "b"),
    "<thinking>\n</thinking>\n\nb": ("", "b"),
    "<thinking>a</thinking>": ("a", ""),
    "<thinking>a</thinking>\n": ("a", ""),
    "<thinking></thinking>": ("", ""),
    "<thinking>a": ("a", ""),
    "<thinking>a</thi": ("a</thi", ""),
    "<thinking>a</thinking": ("a</thinking", ""),
    "<thinking>\n": ("", ""),
    "<thinking>": ("", ""),
    "<thinking>a \n\n": ("a \n\n", ""),
    "<thinking>a</thinking> b": ("a</thinking> b", ""),
    "<thinking>a</thinking>\nb": ("a</thinking>\nb", ""),
    "<thinking>a</thinking>\n b</thinking>\n\nc": ("a</thinking>\n b", "c"),
    "<thinking>a</thinking>b</thinking>\n\nc": ("a</thinking>b", "c"),
    "<thinking>a</thinking></thinking>\n\nc": ("a</thinking>", "c"),
    "<thinking>a`</thinking>` b</thinking>\n\nc": ("a`</thinking>` b", "c"),
    "<thinking>a`</thinking>\n\n` b</thinking>\n\nc": ("a`</thinking>\n\n` b", "c"),
    "<thinking>a'</thinking>\n\n' b</thinking>\n\nc": ("a'</thinking>\n\n' b", "c"),
    '<thinking>a"</thinking>\n\n" b</thinking>\n\nc': ('a"</thinking>\n\n" b', "c"),
    "<thinking>the tag is `</thinking>": ("the tag is `</thinking>", ""),
    "<thinking>日本</thinking>\n\n🙂": ("日本", "🙂"),
    "<thinking>a<thinking>b</thinking>\n\nc": ("a<thinking>b", "c"),
    "<thinking>a</thinking>\n\n<thinking>b</thinking>\n\nc": (
        "a",
        "<thinking>b</thinking>\n\nc",
    ),
    "": ("", ""),
    " \n": ("", " \n"),
    "plain": ("", "plain"),
    "x<thinking>a</thinking>\n\nb": ("", "x<thinking>a</thinking>\n\nb"),
    "`<thinking>`\n\nb": ("", "`<thinking>`\n\nb"),
    "Use <thinking>a</thinking>\n\nb": ("", "Use <thinking>a</thinking>\n\nb"),
    "<": ("", "<"),
    "<thinking": ("", "<thinking"),
    "<thinkings>a": ("", "<thinkings>a"),
    "<think>a</think>\n\nb": ("", "<think>a</think>\n\nb"),
    "<Thinking>a": ("", "<Thinking>a"),
    "</thinking>\n\nb": ("", "</thinking>\n\nb"),
}


def untagged(pieces: list[str]) -> tuple[str, str]:
    """(thought, text) of an answer in these pieces, and the thought comes first."""
    tags = ThinkingTags()
    parts = [part for piece in pieces if piece for part in tags.feed(piece)] + tags.flush()
    assert all(words for _, words in parts)
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True), "a thought behind the text"
    found = {kind: "".join(w for k, w in parts if k == kind) for kind in ("thinking", "text")}
    return found["thinking"], found["text"]


@pytest.mark.parametrize("words", TAGGED, ids=repr)
def test_tags_part_an_answer_into_thought_and_text(words: str) -> None:
    """Whole, letter by letter, and cut in two and three at every place."""
    assert untagged([words]) == TAGGED[words]
    assert untagged(list(words)) == TAGGED[words]
    for one in range(len(words) + 1):
        assert untagged([words[:one], words[one:]]) == TAGGED[words], one
        for two in range(one, len(words) + 1, 5):
            assert untagged([words[:one], words[one:two], words[two:]]) == TAGGED[words]


def tagged_content(words: str) -> list[Json]:
    """The blocks that words between tags become."""
    thought_, text_ = TAGGED[words]
    return [*([thinking(thought_)] if thought_ else []), *([said(text_)] if text_ else [])]


@pytest.mark.parametrize("words", [w for w in TAGGED if w], ids=repr)
def test_tagged_words_reach_both_callers_by_the_end_or_by_a_call(words: str) -> None:
    """kiro.md 4.11: a tool event ends the thought like the end of the stream."""
    cut = len(words) // 2
    pieces = [text(part) for part in (words[:cut], words[cut:]) if part]
    assert blocks(*pieces, tagged_thinking=True) == tagged_content(words)
    tool = called("a", "f", {})
    content = blocks(*pieces, whole_call("a", "f", "{}"), tagged_thinking=True)
    assert content == [*tagged_content(words), tool]
    whole = answer(*pieces, whole_call("a", "f", "{}"), caller="chat", tagged_thinking=True)
    assert read_chat_message(whole) == chat_message([*tagged_content(words), tool])


@pytest.mark.parametrize("words", [w for w in TAGGED if w], ids=repr)
def test_tags_are_text_where_they_were_not_asked_for(words: str) -> None:
    """Trap 21."""
    assert blocks(text(words)) == [said(words)]
    assert read_chat_message(answer(text(words), caller="chat"))["text"] == words


@pytest.mark.parametrize("caller", CALLERS)
def test_a_tag_split_at_every_offset_reaches_the_caller_whole(caller: str) -> None:
    """One letter in each event."""
    words = "\n<thinking>\nI see `</thinking>`.</thinking>\n\nUse <thinking> and </thinking>\n\nok"
    stream = [text(letter) for letter in words] + [reported()]
    facts = read_chat_message if caller == "chat" else (lambda whole: whole["content"])
    expected = [thinking("I see `</thinking>`."), said("Use <thinking> and </thinking>\n\nok")]
    whole = facts(answer(*stream, caller=caller, tagged_thinking=True))
    assert whole == (chat_message(expected) if caller == "chat" else expected)


@pytest.mark.parametrize("first", ["H", "Hello", "<b", "<x", "`<", "<think>", "1"])
def test_text_without_a_tag_is_not_delayed(first: str) -> None:
    """Only what could still become the tag waits."""
    assert ThinkingTags().feed(first) == [("text", first)]
    flow = make_flow("kiro", "messages", tagged_thinking=True)
    assert b"text_delta" in flow.feed(text(first))
    assert b"</thinking" in flow.feed(text("</thinking"))


def test_a_thought_between_tags_is_held_back_by_a_tag_at_most() -> None:
    """Its words go on as they come."""
    tags = ThinkingTags()
    tags.feed("<thinking>")
    sent = "".join(words for _ in range(50) for _, words in tags.feed("word "))
    assert len(sent) >= 250 - len("`</thinking>\n\n")


def test_the_text_behind_a_tag_goes_on_at_once() -> None:
    """The hold is over when the tag is."""
    tags = ThinkingTags()
    assert tags.feed("<thinking>a</thinking>\n\nb") == [("thinking", "a"), ("text", "b")]
    assert tags.feed("<") == [("text", "<")]
    assert tags.flush() == []


def test_words_behind_a_call_are_text_though_they_look_like_a_tag() -> None:
    """The opening tag counts at the start of the answer only."""
    words = "<thinking>a</thinking>\n\nb"
    stream = [whole_call("a", "f", "{}"), text(words)]
    assert blocks(*stream, tagged_thinking=True) == [called("a", "f", {}), said(words)]


def test_native_thoughts_and_text_are_read_where_tags_were_asked_for() -> None:
    """kiro.md 4.11: a gateway handles both outputs whatever it asked for."""
    stream = [thought("hm"), thought(signature="EqQB"), V2, whole_call("a", "f", "{}"), V2]
    expected = [thinking("hm", MARK + "EqQB"), said("Hello"), called("a", "f", {}), said("Hello")]
    assert blocks(*stream, tagged_thinking=True) == expected


# ---- what adds nothing -------------------------------------------------------------------------

IGNORED: dict[str, Json] = {
    "initial-response": {"conversationId": "c-EXAMPLE"},
    "messageMetadataEvent": {"conversationId": "c-EXAMPLE", "utteranceId": "u-EXAMPLE"},
    "followupPromptEvent": {"followupPrompt": {"content": "ghost", "userIntent": "x"}},
    "toolResultEvent": {"toolResult": {"toolUseId": "ghost", "content": [{"text": "ghost"}]}},
    "supplementaryWebLinksEvent": {"supplementaryWebLinks": [{"url": "u", "snippet": "ghost"}]},
    "codeReferenceEvent": {"references": [{"licenseName": "ghost"}]},
    "citationEvent": {"target": {"location": 1}, "citationText": "ghost"},
    "documentCitationEvent": {"citationText": "ghost"},
    "intentsEvent": {"intents": {"ghost": {}}},
    "interactionComponentsEvent": {"content": "ghost"},
    "dryRunSucceedEvent": {},
    "messageStopEvent": {},
    "aNewEvent": {"content": "ghost", "text": "ghost", "toolUseId": "ghost", "name": "ghost"},
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", IGNORED)
def test_an_event_that_says_nothing_of_the_answer_adds_nothing(name: str, caller: str) -> None:
    """kiro.md 5.3 and trap 1: dispatch on the event's name, never on what is in it."""
    ghost = frame(name, IGNORED[name])
    clean = play(make_flow("kiro", caller), [V2, V4, V5, V6, V7, V2, V10])
    stream = [ghost, V2, ghost, V4, ghost, V5, ghost, V6, V7, ghost, V2, ghost, V10, ghost]
    for reads in (stream, [b"".join(stream)]):
        assert meaning(play(make_flow("kiro", caller), reads)) == meaning(clean)
    flow = make_flow("kiro", caller)
    assert flow.feed(ghost) == b""


@pytest.mark.parametrize("name", ["assistantResponseEvent", "toolUseEvent", "meteringEvent"])
def test_a_message_is_what_its_header_says(name: str) -> None:
    """A payload that looks like another event's does not make it one."""
    payload = {"toolUseId": "a", "name": "f", "stop": True, "text": "ghost", "usage": 0.5}
    flow, _ = played(V2, frame(name, payload))
    content = blocks(V2, frame(name, payload))
    assert "ghost" not in json.dumps(content)
    assert ("tool_use" in json.dumps(content)) == (name == "toolUseEvent")
    assert flow.usage.nano_credits == (500_000_000 if name == "meteringEvent" else 0)


@pytest.mark.parametrize("piece", ["\n", "  ", "=", "-", "ha", "{}", '{"content":"x"}'])
def test_equal_words_one_after_the_other_are_all_kept(piece: str) -> None:
    """kiro.md 5.5, trap 3."""
    assert blocks(V2, *[text(piece)] * 7) == [said("Hello" + piece * 7)]


def test_empty_words_add_nothing() -> None:
    """Not even a block."""
    assert blocks(text(""), V4, V7, text("")) == [called("tooluse_1", "get_weather", {})]
    flow = make_flow("kiro", "messages")
    assert flow.feed(text("")) == b""


@pytest.mark.parametrize("caller", CALLERS)
def test_an_empty_answer_is_an_empty_answer(caller: str) -> None:
    """kiro.md 5.5: after the retries that are the provider's."""
    for stream in ([], [V14], [V14, V8, V9, V10]):
        flow, sent = played(*stream, caller=caller)
        assert check_ending(flow, caller, sent) == "complete"
        assert stop_of(*stream, caller=caller) == {"chat": "stop", "messages": "end_turn"}[caller]
    assert blocks(V14) == []


def test_code_is_appended_as_text() -> None:
    """kiro.md 5.3."""
    assert blocks(V2, frame("codeEvent", {"content": "\nx = 1"})) == [said("Hello\nx = 1")]


@pytest.mark.parametrize("name", ["assistantResponseEvent", "contextUsageEvent", "toolUseEvent"])
def test_a_payload_wrapped_in_its_members_name_means_the_same(name: str) -> None:
    """kiro.md 5.2: both forms."""
    payloads: dict[str, Json] = {
        "assistantResponseEvent": {"content": "Hi"},
        "contextUsageEvent": {"contextUsagePercentage": 120},
        "toolUseEvent": {"toolUseId": "a", "name": "f", "input": "{}", "stop": True},
    }
    bare, wrapped = payloads[name], {name: payloads[name]}
    assert answer(V2, frame(name, wrapped)) == answer(V2, frame(name, bare))


# ---- the quick way -----------------------------------------------------------------------------

QUICK_WORDS = [
    "a",
    " ",
    "é",
    "日本",
    "🙂",
    "\ud83d",
    '"',
    "\\",
    "\\\\",
    "\n\n",
    "\t",
    "\r\n",
    "\x00",
    "\x7f",
    "\u2028",
    "/",
    "</thinking>",
    "data: {",
    "[DONE]",
    '"}}',
    '"}}\n\ndata: {"assistantResponseEvent":{"content":"',
    ',"modelId":"x"',
    "{}",
    "\\u0041",
    "x" * 300,
]


def payload_bytes(said_: Json, style: int) -> bytes:
    """A payload in one of the ways to write the same JSON."""
    if style == 0:
        return json.dumps(said_, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
    if style == 1:
        return json.dumps(said_, separators=(",", ":")).encode()
    if style == 2:
        return json.dumps(said_).encode()
    return json.dumps(said_, separators=(",", ":")).replace("/", "\\/").encode()


def event(name: str, payload: bytes) -> bytes:
    """An event with this payload."""
    head = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    return message(head, payload)


def random_answer(rng: random.Random, style: int, plain: bool) -> list[bytes]:
    """The messages of an answer with long runs of text, ending in its usage."""
    words = [w for w in QUICK_WORDS if not plain or w != "\ud83d"]
    messages: list[bytes] = [V14] if rng.random() < 0.5 else []
    model = rng.choice([{}, {"modelId": "claude-sonnet-4.5"}])
    model_first = rng.random() < 0.5
    for at in range(rng.randint(1, 8)):
        for _ in range(rng.choice([1, 3, 20, 60])):
            content = "".join(rng.choices(words, k=rng.choice([0, 1, 1, 1, 2, 4])))
            if style == 0:
                content = content.replace("\ud83d", "?")
            said_ = {**model, "content": content} if model_first else {"content": content, **model}
            messages.append(event("assistantResponseEvent", payload_bytes(said_, style)))
            if rng.random() < 0.03:
                messages.append(rng.choice([V8, V9, frame("aNewEvent", {"content": "ghost"})]))
        if rng.random() < 0.4:
            messages.append(rng.choice([whole_call(f"id{at}", "f", "{}"), thought("hm")]))
        if rng.random() < 0.2:
            model, model_first = {"modelId": rng.choice(["a", "auto"])}, not model_first
    return [*messages, reported()]


def grouped(rng: random.Random, messages: list[bytes]) -> list[bytes]:
    """Reads of whole messages: of one, of many, of all but the last."""
    reads, rest = [], messages[:-1]
    most = rng.choice([2, 10, len(messages)])
    while rest:
        size = rng.randint(1, most)
        reads.append(b"".join(rest[:size]))
        rest = rest[size:]
    return [*reads, messages[-1]]


def slow_twin(caller: str, messages: list[bytes], **changes: Any) -> tuple[bytes, StreamTranslator]:
    """What a flow sends when every frame is read and written by itself."""
    flow, framing = make_flow("kiro", caller, **changes), EventStreamFraming()
    sent = b""
    for frame_ in framing.frames(framing.complete(b"".join(messages))):
        if not flow.is_finished:
            sent += pass_on(flow, [frame_])
    assert flow.template is None
    return sent + flow.end(), flow


@pytest.mark.parametrize("style", range(4), ids=["utf-8", "escaped", "spaced", "slashes"])
@pytest.mark.parametrize("caller", CALLERS)
def test_reads_of_many_events_mean_what_their_events_mean(caller: str, style: int) -> None:
    """Seeded texts in reads of any size against one event at a time."""
    rng = random.Random(f"{SEED}{caller}{style}")
    for round_ in range(20):
        messages = random_answer(rng, style, plain=False)
        slow, twin = slow_twin(caller, messages)
        data = b"".join(messages)
        meant = meaning(slow)
        for reads in ([data], messages, random_reads(rng, data), grouped(rng, messages)):
            flow = make_flow("kiro", caller)
            sent = play(flow, reads)
            assert sent == slow or meaning(sent) == meant, round_
            assert flow.usage == twin.usage and flow.error is None and twin.error is None
        assert GRAMMARS[caller](slow) == "complete"


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "tagged"])
@pytest.mark.parametrize("caller", CALLERS)
def test_the_quick_way_writes_the_same_bytes(caller: str, tagged: bool) -> None:
    """Where the upstream writes text as the gateway does, the output is equal to the byte."""
    rng = random.Random(f"{SEED}{caller}{tagged}")
    for round_ in range(30):
        messages = random_answer(rng, 0, plain=True)
        if tagged and rng.random() < 0.7:
            messages = [text("<thinking>hm</thinking>\n\n"), *messages]
        slow, _ = slow_twin(caller, messages, tagged_thinking=tagged)
        data = b"".join(messages)
        for reads in ([data], messages, random_reads(rng, data), grouped(rng, messages)):
            sent = play(make_flow("kiro", caller, tagged_thinking=tagged), reads)
            assert sent == slow, round_


@pytest.mark.parametrize("caller", CALLERS)
def test_a_run_of_plain_text_teaches_a_template_that_copies(caller: str) -> None:
    """The quick way is really taken, with the model's name in the event and without."""
    for more in ({}, {"modelId": "claude-sonnet-4.5"}):
        messages = [text(f"w{at} ", **more) for at in range(200)]
        flow = make_flow("kiro", caller)
        sent = flow.feed(b"".join(messages))
        learned = flow.template
        assert learned is not None
        again = flow.feed(b"".join(messages))
        assert flow.template is learned
        sent += again + flow.end()
        assert meaning(sent)[:-3] == meaning(slow_twin(caller, messages * 2)[0])[:-3]


@pytest.mark.parametrize("caller", CALLERS)
def test_equal_text_behind_a_call_is_not_the_same_event(caller: str) -> None:
    """A block was closed between the two: the template of the one is not the other's."""
    run = [text(word) for word in ("one", "two", "three", "four", "five", "six")]
    for between in (V4 + V5 + V6 + V7, V11, V4 + V5, thought(signature="Eq"), V8, V4):
        messages = [*run, between, *run, reported()]
        slow, _ = slow_twin(caller, messages)
        data = b"".join(messages)
        for reads in ([data], messages, [b"".join(run), b"".join(messages[6:])]):
            assert meaning(play(make_flow("kiro", caller), reads)) == meaning(slow)


BROKEN_TEXTS = {
    "a control character": b"a\x01b",
    "a tab": b"a\tb",
    "a carriage return": b"a\rb",
    "a line break": b"a\nb",
    "an unknown escape": b"a\\qb",
    "half an escape": b"a\\u12",
    "a byte that is not UTF-8": b"a\xffb",
    "a quote": b'a"b',
    "an escaped quote at the end": b"a\\",
}


@pytest.mark.parametrize("broken", BROKEN_TEXTS)
@pytest.mark.parametrize("caller", CALLERS)
def test_broken_text_among_plain_events_never_goes_on(caller: str, broken: str) -> None:
    """What is no JSON is an error in the tenth event as in the first."""
    odd = event("assistantResponseEvent", b'{"content":"%b"}' % BROKEN_TEXTS[broken])
    for before in (0, 1, 9, 40):
        run = [text("WORD")] * before
        for reads in ([*run, odd, text("WORD")], [b"".join([*run, odd, text("WORD")])]):
            flow = make_flow("kiro", caller)
            sent = play(flow, reads)
            assert check_ending(flow, caller, sent) == "error", before
            assert sent.count(b"WORD") == before


# ---- stop strings cut here ---------------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS)
def test_a_stop_string_split_over_events_ends_the_answer(caller: str) -> None:
    """Kiro has no field for them: they are cut in the gateway."""
    stream = [text("one S"), text("T"), text("OP two"), V10]
    whole = answer(*stream, caller=caller, stop_strings=["STOP"])
    if caller == "messages":
        assert whole["content"] == [said("one ")]
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "STOP")
    else:
        assert whole["choices"][0]["message"]["content"] == "one "
        assert whole["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("caller", CALLERS)
def test_a_stop_string_is_found_however_the_answer_is_cut(caller: str) -> None:
    """In long runs too, where text is copied else."""
    messages = [text(f"w{at} ") for at in range(50)] + [text("en"), text("d of it")]
    data = b"".join(messages)
    sent = {
        play(make_flow("kiro", caller, stop_strings=["end"]), reads) for reads in ([data], messages)
    }
    assert len(sent) == 1 and b" of it" not in next(iter(sent))
    flow = make_flow("kiro", caller, stop_strings=["end"])
    flow.feed(data)
    assert flow.is_finished, "the upstream can be hung up on"


def test_a_stop_string_in_a_thought_or_call_does_not_cut() -> None:
    """Only text is looked at: native thoughts, tagged ones, arguments."""
    stream = [text("<thinking>STOP</thinking>\n\nfine"), whole_call("a", "f", '{"x":"STOP"}')]
    assert blocks(*stream, stop_strings=["STOP"], tagged_thinking=True) == [
        thinking("STOP"),
        said("fine"),
        called("a", "f", {"x": "STOP"}),
    ]
    assert blocks(thought("STOP"), V2, stop_strings=["STOP"])[0] == thinking("STOP")


def test_what_could_become_a_stop_string_is_given_back() -> None:
    """At the end, and before a call."""
    assert blocks(text("a S"), stop_strings=["STOP"]) == [said("a S")]
    assert blocks(text("a S"), V4, V7, stop_strings=["STOP"])[0] == said("a S")


# ---- errors ------------------------------------------------------------------------------------

# (code, reason, message) -> what it is and what may help: kiro.md 8.3
WORDS: list[tuple[str, str, str, type[ApiError], str]] = [
    ("ThrottlingException", "", "Too many requests, please wait.", RateLimited, "pause"),
    ("ThrottlingException", "INSUFFICIENT_MODEL_CAPACITY", "Too many", Overloaded, "pause"),
    ("ThrottlingException", "MONTHLY_REQUEST_COUNT", "m", QuotaExceeded, "cool_down"),
    ("ThrottlingException", "DAILY_REQUEST_COUNT", "m", QuotaExceeded, "cool_down"),
    ("ThrottlingException", "", "60-minute credit limit exceeded", RateLimited, "cool_down"),
    ("ServiceQuotaExceededException", "MONTHLY_REQUEST_COUNT", "m", QuotaExceeded, "cool_down"),
    (
        "ServiceQuotaExceededException",
        "OVERAGE_REQUEST_LIMIT_EXCEEDED",
        "m",
        QuotaExceeded,
        "cool_down",
    ),
    ("", "", "You have reached the limit.", QuotaExceeded, "cool_down"),
    ("InternalServerException", "MODEL_TEMPORARILY_UNAVAILABLE", "m", Overloaded, "pause"),
    (
        "InternalServerException",
        "",
        "Encountered unexpectedly high load when processing the request, please try again.",
        Overloaded,
        "pause",
    ),
    ("AccessDeniedException", "TEMPORARILY_SUSPENDED", "m", Forbidden, "cool_down"),
    ("AccountSuspendedException", "", "m", Forbidden, "cool_down"),
    ("AccessDeniedException", "", "Your User ID temporarily is suspended.", Forbidden, "cool_down"),
    (
        "AccessDeniedException",
        "",
        "The bearer token included in the request is invalid.",
        NotSignedIn,
        "refresh",
    ),
    ("AccessDeniedException", "", "Invalid token", Forbidden, "reroute"),
    ("AccessDeniedException", "", "User is not authorized to do this.", Forbidden, "reroute"),
    ("AccessDeniedException", "FEATURE_NOT_SUPPORTED", "m", Forbidden, ""),
    ("ValidationException", "", "Improperly formed request.", InvalidRequest, ""),
    ("ValidationException", "REQUEST_BODY_INVALID", "m", InvalidRequest, "reshape"),
    ("ValidationException", "CONTENT_LENGTH_EXCEEDS_THRESHOLD", "m", ContextTooLong, ""),
    ("ValidationException", "PROMPT_TOO_LONG", "m", ContextTooLong, ""),
    ("ValidationException", "", "Input is too long.", ContextTooLong, ""),
    ("ContentLengthExceededException", "", "m", ContextTooLong, ""),
    ("ValidationException", "INVALID_MODEL_ID", "m", ModelNotFound, "relist"),
    ("ValidationException", "THINKING_SIGNATURE_INVALID", "m", InvalidRequest, "forget"),
    ("ValidationException", "TOOL_USE_RESULT_MISMATCH", "m", InvalidRequest, ""),
    ("InternalServerException", "TOOL_SCHEMA_INVALID", "m", InvalidRequest, ""),
    ("ValidationException", "IMAGE_TOO_LARGE", "m", InvalidRequest, ""),
    ("ValidationException", "", "profileArn is required for this request.", NotSignedIn, "reroute"),
    ("ValidationException", "", "Invalid profileArn.", NotSignedIn, "reroute"),
    ("UnknownOperationException", "", "", UpstreamError, "reroute"),
]


@pytest.mark.parametrize(("code", "reason", "words", "kind", "remedy"), WORDS)
def test_kiros_words_are_judged(
    code: str, reason: str, words: str, kind: type[ApiError], remedy: str
) -> None:
    """kiro.md 8.3: the words before any status."""
    verdict = classify_kiro_message(code, reason, words)
    assert verdict is not None
    assert (type(verdict.error), verdict.action) == (kind, remedy)


def test_words_that_nobody_knows_are_not_judged() -> None:
    """The status decides then."""
    assert classify_kiro_message("InternalServerException", "", "boom") is None
    assert classify_kiro_message("", "", "") is None


def test_a_reason_is_told_to_the_caller() -> None:
    """It is what a user can search for."""
    verdict = classify_kiro_message("ValidationException", "TOOL_DUPLICATE", "Bad tools.")
    assert verdict and "TOOL_DUPLICATE" in str(verdict.error) and "Bad tools" in str(verdict.error)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("code", "reason", "words", "kind", "remedy"), WORDS)
def test_an_exception_is_an_error_before_the_words_and_behind_them(
    code: str, reason: str, words: str, kind: type[ApiError], remedy: str, caller: str
) -> None:
    """Trap 2: a status where that is still possible, else the error event."""
    failure = exception_frame(code, {"message": words, "reason": reason or None})
    for before in (b"", V14, V14 + V8 + V9, text("")):
        flow, sent = played(before, failure, caller=caller)
        assert sent == b"" and type(flow.error) is kind
    if kind is not ContextTooLong:
        for opened in (V2, V4, V11):
            flow, sent = played(opened, failure, V2, V10, caller=caller)
            assert check_ending(flow, caller, sent) == "error"
            assert type(flow.error) is kind


@pytest.mark.parametrize(
    "failure",
    [
        exception_frame("ContentLengthExceededException", {"message": "m"}),
        exception_frame("ValidationException", {"message": "Input is too long."}),
        exception_frame("ValidationException", {"reason": "CONTENT_LENGTH_EXCEEDS_THRESHOLD"}),
        frame("error", {"message": "Input is too long."}),
    ],
    ids=["its own", "words", "reason", "event"],
)
def test_a_context_that_fills_up_behind_the_words_is_a_long_answer(failure: bytes) -> None:
    """kiro.md 5.6: what was said counts; before any word it is an error."""
    long = ("max_tokens", "model_context_window_exceeded")
    for before, content in (
        (V2, [said("Hello")]),
        (V11, [thinking("Let me think.")]),
        (V11 + V2, [thinking("Let me think."), said("Hello")]),
    ):
        whole = answer(before, failure, V2, V10)
        assert whole["content"] == content and whole["stop_reason"] in long
        assert stop_of(before, failure, V2, V10, caller="chat") == "length"
    assert stop_of(V2, V4, V5, failure) in long
    assert stop_of(V2, V4, V5, failure, caller="chat") == "length"
    flow, sent = played(failure)
    assert sent == b"" and isinstance(flow.error, ContextTooLong)


def test_a_context_that_fills_up_behind_a_call_keeps_the_call() -> None:
    """kiro.md 5.6: a complete call wins over everything, and a length is no failure."""
    failure = exception_frame("ContentLengthExceededException", {"message": "m"})
    whole = answer(V2, V4, V5, V6, V7, failure)
    assert whole["content"] == [said("Hello"), WEATHER]
    assert whole["stop_reason"] == "tool_use"


def test_a_context_that_fills_up_while_a_tag_is_held_back_is_a_long_answer() -> None:
    """Words that wait were said too."""
    failure = exception_frame("ContentLengthExceededException", {"message": "m"})
    whole = answer(text("<thin"), failure, tagged_thinking=True)
    assert whole["content"] == [said("<thin")]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (frame("error", {"message": "boom", "reason": None}), UpstreamError),
        (frame("error", {"message": "m", "reason": "INSUFFICIENT_MODEL_CAPACITY"}), Overloaded),
        (frame("error", {}), UpstreamError),
        (exception_frame("error", {"message": "boom"}), UpstreamError),
        (
            frame("invalidStateEvent", {"reason": "INVALID_TASK_ASSIST_PLAN", "message": "m"}),
            UpstreamError,
        ),
        (frame("modelTemporarilyUnavailableEvent", {"message": "m"}), Overloaded),
        (frame("modelUnavailableEvent", {}), Overloaded),
        (error_frame("ThrottlingException", "Too many requests"), RateLimited),
        (error_frame("", ""), UpstreamError),
        (message({":message-type": "error"}, b""), UpstreamError),
        (message({":message-type": "exception"}, b""), UpstreamError),
        (message({":message-type": "exception"}, b"<html>"), UpstreamError),
        (V2[:-1] + b"\x00", UpstreamError),
        (event("assistantResponseEvent", b"nothing"), UpstreamError),
    ],
)
def test_whatever_fails_in_the_stream_is_an_error(
    failure: bytes, kind: type[ApiError], caller: str
) -> None:
    """kiro.md 5.2 and 5.3: before the words a status, behind them the error event."""
    flow, sent = played(V14, failure, V2, V10, caller=caller)
    assert sent == b"" and type(flow.error) is kind
    for opened in (V2, V2 * 30, V11, V4 + V5, V4 + V5 + V6 + V7):
        for reads in ([opened + failure + V2 + V10], [opened, failure, V2, V10]):
            flow = make_flow("kiro", caller)
            sent = play(flow, reads)
            assert check_ending(flow, caller, sent) == "error"
            assert type(flow.error) is kind and sent.count(b"Hello") == opened.count(b"Hello")


def test_an_overload_in_the_stream_is_told_in_each_dialects_words() -> None:
    """Clients try again then."""
    _, sent = played(V2, V12, caller="messages")
    assert meaning(sent)[-1][1]["error"]["type"] == "overloaded_error"
    _, sent = played(V2, V12, caller="chat")
    assert "error" in meaning(sent)[-1][1]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"__type": "com.amazon.x#ThrottlingException", "message": "m"}, RateLimited),
        ({"Output": {"__type": "x#ThrottlingException", "message": "m"}}, RateLimited),
        ({"message": "Input is too long."}, ContextTooLong),
        ({"message": "boom"}, UpstreamError),
        ({}, UpstreamError),
        ({"assistantResponseEvent": {"content": "ghost"}}, UpstreamError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_json_body_instead_of_a_stream_is_an_error(
    body: Json, kind: type[ApiError], caller: str, stream: bool
) -> None:
    """kiro.md 5.2: HTTP 200 with a JSON body has been seen."""
    flow = make_flow("kiro", caller, stream=stream)
    assert flow.feed_buffered(json.dumps(body).encode()) == b""
    assert type(flow.error) is kind


def test_secrets_in_an_errors_words_are_not_shown() -> None:
    """A service that quotes a header quotes a token."""
    words = "token aoaAAAAAEXAMPLE0123456789abcdef0123456789 is bad: Bearer abcdefEXAMPLE0123456789"
    flow, sent = played(V2, exception_frame("Odd", {"message": words}))
    assert b"abcdefEXAMPLE0123456789" not in sent and "abcdefEXAMPLE" not in str(flow.error)


def test_plain_text_is_told_from_everything_else() -> None:
    """What may be copied without a look at it."""
    assert KIRO.read_delta({"assistantResponseEvent": {"content": "x"}}) == ("text", "x")
    assert KIRO.read_delta({"assistantResponseEvent": {"modelId": "m", "content": "x"}}) == (
        "text",
        "x",
    )
    for odd in (
        {},
        {"codeEvent": {"content": "x"}},
        {"followupPromptEvent": {"content": "x"}},
        {"assistantResponseEvent": "x"},
        {"assistantResponseEvent": {"content": 1}},
        {"assistantResponseEvent": {"modelId": "m"}},
        {"assistantResponseEvent": {"content": "x", "references": []}},
        {"error": {"content": "x"}},
    ):
        assert KIRO.read_delta(copy.deepcopy(odd)) is None
