"""Section 8.6: what is copied from an upstream's stream equals what is parsed and written."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from goldens import CALLERS, make_flow, one_by_one, play

from aiclient_api import Json

SEED = 20261201
TEXTS = (
    "Hello", " world", "a", "content", 'q"', "\\", "\\n", "\n", "\t\r\b\f", "\x00\x1f\x7f", "é",
    "日本", "🙂", "\u2028", "/", "</x>", '","', '"},"finish_reason":null}', "data: ", ' "text": "',
    "{", "%b%d", "\ud83d", "\udc00 ", "        ", "\n\n\n\n\n\n\n", "text", "stop",
)  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Words, and what is escaped or looks like the syntax around it."""
    if rng.random() < 0.5:
        return f"w{rng.randrange(100)} "
    return "".join(rng.choices(TEXTS, k=rng.randint(0, 3)))


def chat_stream(rng: random.Random) -> Iterator[Json]:
    """Runs of deltas of one kind, in the shapes in which gateways and services send them."""
    base: Json = {"id": "chatcmpl-1", "created": 1763800000, "model": "gpt"}
    base |= rng.choice([{}, {"object": "chat.completion.chunk"}, {"system_fingerprint": "fp"}])
    extra: Json = rng.choice(
        [{}, {"usage": None}, {"usage": {"prompt_tokens": 3, "completion_tokens": 0}}, {"x": "y"}]
    )
    role: Json = rng.choice([{}, {"role": "assistant"}, {"refusal": None}])
    ending: Json = rng.choice([{}, {"logprobs": None, "finish_reason": None}])
    has_padding, has_offsets = rng.random() < 0.3, rng.random() < 0.3

    def chunk(delta: Json, **changes: Any) -> Json:
        choice: Json = {"index": 0}
        if has_offsets:
            offsets = {"check_offset": rng.choice([0, 7, -1]), "end_offset": rng.randrange(99)}
            choice["content_filter_offsets"] = offsets
        frame = {**base, **extra, "choices": [{**choice, "delta": delta, **ending, **changes}]}
        return frame | ({"obfuscation": random_text(rng)} if has_padding else {})

    yield chunk({"role": "assistant", "content": rng.choice(["", "So"])})
    names = ["content", "content", "reasoning_text", "reasoning_content", "refusal", "call"]
    calls = 0
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(names)
        if name == "call":
            function = {"name": "f", "arguments": rng.choice(["", "{"])}
            call = {"index": calls, "id": f"c{calls}", "type": "function", "function": function}
            yield chunk({"tool_calls": [call]})
            calls += 1
        for _ in range(rng.choice([1, 3, 12, 40])):
            delta: Json = {name: random_text(rng)}
            if name == "call":
                index = calls - 1 if rng.random() < 0.95 else 0
                fragment = {"index": index, "function": {"arguments": random_text(rng)}}
                delta = {"tool_calls": [fragment]}
            yield chunk({**role, **delta})
            if rng.random() < 0.06:
                odd = {**chunk({"content": "odd"}), "model": "other", "created": 1763800001}
                yield rng.choice(
                    [odd, chunk({}), chunk({"content": "l"}, logprobs={"content": []})]
                )
    yield chunk({}, finish_reason="tool_calls" if calls else "stop")
    if rng.random() < 0.7:
        yield {**base, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 8}}


def messages_stream(rng: random.Random) -> Iterator[Json]:
    """Blocks of all kinds, each with a run of deltas."""
    usage = rng.choice([{}, {"input_tokens": 5, "output_tokens": 1}])
    yield {"type": "message_start", "message": {"id": "m", "model": "c", "usage": usage}}
    parts = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
    reason = "end_turn"
    for index in range(rng.randint(1, 5)):
        kind = rng.choice(list(parts))
        block: Json = {"type": kind, "text": ""}
        if kind == "tool_use":
            block, reason = {"type": kind, "id": f"t{index}", "name": "f", "input": {}}, "tool_use"
        elif kind == "thinking":
            block = {"type": kind, "thinking": "", "signature": ""}
        frame: Json = {"index": index}
        yield {"type": "content_block_start", **frame, "content_block": block}
        frame = {"type": "content_block_delta", **frame}
        name = "input_json_delta" if kind == "tool_use" else f"{kind}_delta"
        for _ in range(rng.choice([0, 1, 3, 12, 40])):
            yield {**frame, "delta": {"type": name, parts[kind]: random_text(rng)}}
            if rng.random() < 0.06:
                odd: list[Json] = [{"type": "ping"}, {"type": "strange"}]
                odd.append({**frame, "delta": {"type": name, parts[kind]: "odd"}, "extra": "text"})
                yield rng.choice(odd)
        if kind == "thinking":
            yield {**frame, "delta": {"type": "signature_delta", "signature": "c2ln"}}
        yield {"type": "content_block_stop", "index": index}
    delta = {"stop_reason": reason, "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": rng.choice([{}, {"output_tokens": 7}])}
    yield {"type": "message_stop"}


def random_rows(rng: random.Random, upstream: str) -> list[bytes]:
    """The events of an answer as an upstream writes them: compact or not, escaped or not."""
    separators = rng.choice([(",", ":"), None])
    escaped, has_slashes = rng.random() < 0.4, rng.random() < 0.2
    line_end = rng.choice(["\n", "\n", "\n", "\r\n"])
    rows = []
    for frame in (messages_stream if upstream == "messages" else chat_stream)(rng):
        text = json.dumps(frame, ensure_ascii=escaped, separators=separators)
        # Half of a pair can only be sent as an escape.
        text = "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)
        text = text.replace("/", "\\/") if has_slashes else text
        name = f"event: {frame['type']}{line_end}" if upstream == "messages" else ""
        rows.append(f"{name}data: {text}{line_end}{line_end}".encode())
        if rng.random() < 0.02:
            rows.append(f": ping{line_end}{line_end}".encode())
    return rows if upstream == "messages" else [*rows, b"data: [DONE]\n\n"]


def all_reads(rng: random.Random, rows: list[bytes]) -> Iterator[list[bytes]]:
    """The same bytes as reads of every kind."""
    data = b"".join(rows)
    yield [data]
    yield rows
    for size in (2, 16):
        yield [b"".join(rows[at : at + size]) for at in range(0, len(rows), size)]
    cuts = sorted(rng.choices(range(len(data)), k=rng.randint(1, 40)))
    yield [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    yield one_by_one(data)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("upstream", CALLERS)
def test_copied_streams_equal_parsed_ones(upstream: str, caller: str, broken: bool) -> None:
    """To the byte, with the same usage, the same estimate, the same error at the same place."""
    rng = random.Random(f"{SEED}{upstream}{caller}{broken}")
    for round_ in range(25):
        rows = random_rows(rng, upstream)
        if broken:  # a torn row, or an answer that does not end
            at = rng.randrange(1, len(rows))
            row = rows[at][: rng.randrange(len(rows[at]))] + b"\n\n"
            rows[at:] = rng.choice([[], [row], [row, *rows[at + 1 :]]])
        parsed = make_flow(upstream, caller)
        parsed.may_copy = False
        sent = play(parsed, [b"".join(rows)])
        for reads in all_reads(rng, rows):
            flow = make_flow(upstream, caller)
            assert play(flow, reads) == sent, (round_, len(reads))
            assert flow.usage == parsed.usage
            assert flow.relay.output_estimate == parsed.relay.output_estimate
            assert repr(flow.error) == repr(parsed.error)
            assert flow.frame_count == parsed.frame_count


START: dict[str, list[Json]] = {
    "chat": [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"tool_calls": [{"id": "a", "function": {"name": "f"}}]}}]},
    ],
    "messages": [{"type": "message_start", "message": {}}],
}
BLOCKS: dict[str, Json] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": ""},
    "partial_json": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
}
OFFSETS = {"check_offset": 1, "start_offset": 1, "end_offset": "@"}
#: dialect -> a delta whose text is "@@", and a number that changes "@"
DELTAS: list[tuple[str, Json]] = [
    *(("messages", {"delta": {"type": "text_delta", key: "@@"}}) for key in BLOCKS),
    ("messages", {"delta": {"type": "text_delta", "text": "@@"}, "index": 0, "extra": [1]}),
    *(
        ("chat", {"choices": [{"index": 0, "delta": delta, **more}], **extra})
        for delta in (
            {"content": "@@"},
            {"content": "@@", "role": "assistant", "refusal": None},
            {"reasoning_text": "@@"},
            {"content": None, "reasoning_content": "@@"},
            {"refusal": "@@"},
            {"tool_calls": [{"index": 0, "function": {"arguments": "@@"}}]},
            {"tool_calls": [{"index": 0, "id": "", "function": {"name": "", "arguments": "@@"}}]},
        )
        for more, extra in (
            ({}, {}),
            ({"finish_reason": None, "logprobs": None}, {"usage": None}),
            ({}, {"usage": {"prompt_tokens": 1, "completion_tokens": 0}}),
            ({"content_filter_offsets": OFFSETS}, {}),
            ({}, {"obfuscation": "x@"}),
        )
    ),
]


@pytest.mark.parametrize(("dialect", "delta"), DELTAS, ids=str)
def test_native_deltas_of_every_kind_are_copied(dialect: str, delta: Json) -> None:
    """After the first ones none is parsed, be it text, thinking or arguments."""
    start = START[dialect]
    if dialect == "messages":
        block = BLOCKS[next(key for key in BLOCKS if key in delta["delta"])]
        name = "input_json_delta" if block["type"] == "tool_use" else f"{block['type']}_delta"
        delta = {"type": "content_block_delta", "index": 0, **delta}
        delta = {**delta, "delta": {**delta["delta"], "type": name}}
        opening = {"type": "content_block_start", "index": 0, "content_block": block}
        start = [*start, opening]
    frames = [*start, *[delta] * 60]
    names = [f"event: {f['type']}\n" if dialect == "messages" else "" for f in frames]
    rows = [f"{n}data: {json.dumps(f)}\n\n" for n, f in zip(names, frames, strict=True)]
    stream = [r.replace("@@", f"w{n}").replace('"@"', str(n)) for n, r in enumerate(rows)]
    reads = [row.replace("x@", "x" * (at % 7)).encode() for at, row in enumerate(stream)]
    flow, parsed = make_flow(dialect, dialect), make_flow(dialect, dialect)
    parsed.may_copy = False
    sent = b"".join(map(flow.feed, reads[:20]))
    template = flow.template
    assert template is not None
    for _ in range(2):
        sent += b"".join(map(flow.feed, reads[20:40]))
        sent += flow.feed(b"".join(reads[40:]))
        assert flow.template is template
    assert sent == parsed.feed(b"".join([*reads, *reads[20:]]))
    assert flow.relay.output_estimate == parsed.relay.output_estimate
