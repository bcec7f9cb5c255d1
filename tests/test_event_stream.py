"""Section 6: the Amazon event stream in, server-sent events out."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
import sys
import time
import uuid
import zlib
from typing import Any

import pytest
from fake_kiro import error_frame, exception_frame, frame, message
from goldens import VECTORS, Json, one_by_one

from aiclient_api import (
    MAX_EVENT_HEADERS_BYTES,
    MAX_EVENT_MESSAGE_BYTES,
    EventMessage,
    EventStreamFraming,
    UpstreamError,
    WireError,
    parse_event_headers,
)

SEED = 20261122


def event_headers(name: str, content_type: str = "application/json") -> Json:
    """The headers of an event."""
    return {":event-type": name, ":content-type": content_type, ":message-type": "event"}


CALL = {"name": "get_weather", "toolUseId": "tooluse_1"}
TOKENS = {"uncachedInputTokens": 10, "cacheReadInputTokens": 5, "cacheWriteInputTokens": 0}
# kiro.md (c): each vector's text headers and payload; JSON as a value, its keys in any order.
MEANINGS: dict[str, tuple[Json, Any]] = {
    "V0": ({}, b""),
    "V1": ({}, b"{'foo':'bar'}"),
    "V2": (event_headers("assistantResponseEvent"), {"content": "Hello"}),
    "V3": (event_headers("assistantResponseEvent"), {"content": "\u00e9\u20ac\U0001f600"}),
    "V4": (event_headers("toolUseEvent"), CALL),
    "V5": (event_headers("toolUseEvent"), {**CALL, "input": '{"city":"Pa'}),
    "V6": (event_headers("toolUseEvent"), {**CALL, "input": 'ris"}'}),
    "V7": (event_headers("toolUseEvent"), {**CALL, "stop": True}),
    "V8": (event_headers("contextUsageEvent"), {"contextUsagePercentage": 1.5}),
    "V9": (
        event_headers("meteringEvent"),
        {"unit": "credit", "unitPlural": "credits", "usage": 0.25},
    ),
    "V10": (
        event_headers("metadataEvent"),
        {
            "stopReason": "END_TURN",
            "tokenUsage": {**TOKENS, "outputTokens": 7, "totalTokens": 22},
        },
    ),
    "V11": (event_headers("reasoningContentEvent"), {"text": "Let me think."}),
    "V12": (
        {
            ":exception-type": "ThrottlingException",
            ":content-type": "application/json",
            ":message-type": "exception",
        },
        {"message": "Too many requests", "reason": "INSUFFICIENT_MODEL_CAPACITY"},
    ),
    "V13": (
        {
            ":error-code": "InternalServerException",
            ":error-message": "boom",
            ":message-type": "error",
        },
        b"",
    ),
    "V14": (event_headers("initial-response", "application/x-amz-json-1.0"), {}),
    "V15": ({"z": "h\u00e9"}, b"x"),
}
V2 = VECTORS["V2"]
HELLO: tuple[Json, Any] = MEANINGS["V2"]
ALL = b"".join(VECTORS.values())
SAID = "The upstream's response is malformed"


def meaning(found: EventMessage, like: Any) -> tuple[Json, Any]:
    """A message with its payload as `like` is written: bytes or a JSON value."""
    headers, payload = found
    return headers, payload if isinstance(like, bytes) else json.loads(payload)


def read_all(reads: list[bytes]) -> tuple[list[EventMessage], EventStreamFraming]:
    """The messages of these reads, and the reader after them."""
    reader = EventStreamFraming()
    return [found for data in reads for found in reader.read_messages(data)], reader


def is_clean(reader: EventStreamFraming) -> bool:
    """Whether the bytes ended between two messages, and all were good."""
    return not reader.error and not reader.buffer


def packed(total: int, headers_size: int, rest: bytes) -> bytes:
    """A message that says of itself what it likes, both checksums good."""
    head = struct.pack(">II", total, headers_size)
    head += struct.pack(">I", zlib.crc32(head))
    return head + rest + struct.pack(">I", zlib.crc32(head + rest))


def with_headers(block: bytes, payload: bytes = b"{}") -> bytes:
    """A message around any header block."""
    return packed(len(block) + len(payload) + 16, len(block), block + payload)


# ---- the vectors -------------------------------------------------------------------------------


def test_there_is_a_meaning_for_each_vector() -> None:
    """A file that moved must not turn the tests below into nothing."""
    assert list(VECTORS) == list(MEANINGS)
    sizes = [16, 45, 127, 131, 144, 169, 161, 156, 133, 152, 249, 131, 183, 98, 114, 95]
    assert [len(data) for data in VECTORS.values()] == sizes
    assert zlib.crc32(b"123456789") == 0xCBF43926


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_read_whole_and_byte_by_byte(name: str) -> None:
    """And nothing comes out before its last byte."""
    data, (headers, payload) = VECTORS[name], MEANINGS[name]
    found, reader = read_all([data])
    assert [meaning(item, payload) for item in found] == [(headers, payload)]
    assert is_clean(reader)
    reader = EventStreamFraming()
    assert [reader.read_messages(byte) for byte in one_by_one(data)[:-1]] == [[]] * (len(data) - 1)
    assert [meaning(item, payload) for item in reader.read_messages(data[-1:])] == [
        (headers, payload)
    ]
    assert is_clean(reader)


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_read_the_same_when_cut_in_two_anywhere(name: str) -> None:
    """An empty read between the halves says nothing."""
    data, (headers, payload) = VECTORS[name], MEANINGS[name]
    for cut in range(len(data) + 1):
        found, reader = read_all([data[:cut], b"", data[cut:]])
        assert [meaning(item, payload) for item in found] == [(headers, payload)], cut
        assert is_clean(reader), cut


def test_all_vectors_in_one_stream_cut_anywhere() -> None:
    """Several messages in a read, and the border anywhere in them."""
    whole, _ = read_all([ALL])
    expected = list(MEANINGS.values())
    assert [meaning(m, like) for m, (_, like) in zip(whole, expected)] == expected
    for cut in range(len(ALL) + 1):
        found, reader = read_all([ALL[:cut], ALL[cut:]])
        assert found == whole and is_clean(reader), cut


def test_messages_in_random_reads() -> None:
    """Seeded: any order of the vectors, any cuts."""
    rng = random.Random(SEED)
    for _ in range(300):
        names = rng.choices(list(VECTORS), k=6)
        data = b"".join(VECTORS[name] for name in names)
        cuts = sorted(rng.sample(range(len(data)), rng.randint(1, 12)))
        reads = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
        found, reader = read_all(reads)
        expected = [MEANINGS[name] for name in names]
        assert [meaning(m, like) for m, (_, like) in zip(found, expected)] == expected
        assert len(found) == len(names) and is_clean(reader)


def test_messages_come_out_as_soon_as_they_are_complete() -> None:
    """A token may not wait for the next one."""
    reader = EventStreamFraming()
    assert len(reader.read_messages(V2 + V2 + V2[:50])) == 2
    assert len(reader.read_messages(V2[50:] + V2[:5])) == 1
    assert reader.read_messages(V2[5:-1]) == []
    assert len(reader.read_messages(V2[-1:])) == 1


def test_the_same_message_twice_is_two_messages() -> None:
    """Kiro repeats a line break, a blank, an equals sign: that is text."""
    found, _ = read_all([V2 + V2])
    assert [meaning(item, {}) for item in found] == [HELLO, HELLO]


def test_messages_do_not_share_their_headers_with_what_changes_them() -> None:
    """Two messages with other payloads and the same headers are read alike."""
    found, _ = read_all([V2 + VECTORS["V3"] + VECTORS["V4"] + V2])
    kinds = [headers[":event-type"] for headers, _ in found]
    assert kinds == [*["assistantResponseEvent"] * 2, "toolUseEvent", "assistantResponseEvent"]


def test_a_hundred_kinds_of_headers_are_read() -> None:
    """However many are remembered, each is read as its own."""
    names = [f"event{at}" for at in range(100)] * 2
    found, _ = read_all([b"".join(frame(name, {}) for name in names)])
    assert [headers[":event-type"] for headers, _ in found] == names


# ---- what is broken ----------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_never_gives_a_message(bit: int) -> None:
    """kiro.md (c): in any byte of V2 it is an error, or a message that waits for more."""
    for at in range(len(V2)):
        broken = bytearray(V2)
        broken[at] ^= 1 << bit
        for reads in ([bytes(broken)], one_by_one(bytes(broken)), [bytes(broken) + V2]):
            found, reader = read_all(reads)
            assert found == [] and not is_clean(reader), at


@pytest.mark.parametrize("name", VECTORS)
def test_a_flipped_bit_in_any_vector_keeps_only_what_came_before(name: str) -> None:
    """Seeded bits; a good message before, good ones behind."""
    rng = random.Random(f"{SEED}{name}")
    for at in range(len(VECTORS[name])):
        broken = bytearray(VECTORS[name])
        broken[at] ^= 1 << rng.randrange(8)
        found, reader = read_all([V2, bytes(broken), V2, V2])
        assert [meaning(item, {}) for item in found] == [HELLO], at
        assert not is_clean(reader), at


def test_a_wrong_checksum_is_told_apart_from_a_wrong_prelude() -> None:
    """kiro.md (c): the sixth byte from the end, and byte 9."""
    payload = V2[:-6] + bytes([V2[-6] ^ 1]) + V2[-5:]
    assert payload.endswith(bytes.fromhex("6c6c6f237d9b5d0635"))
    _, reader = read_all([payload])
    assert "checksum" in reader.error and "prelude" not in reader.error
    prelude = V2[:9] + bytes([V2[9] ^ 1]) + V2[10:]
    _, reader = read_all([prelude])
    assert "checksum" in reader.error and "prelude" in reader.error


def test_a_wrong_prelude_is_an_error_at_its_twelfth_byte() -> None:
    """Else a wrong length would wait for bytes that never come."""
    broken = bytes([0x7F]) + V2[1:]
    reader = EventStreamFraming()
    assert reader.read_messages(broken[:11]) == [] and not reader.error
    assert reader.read_messages(broken[11:12]) == [] and reader.error


@pytest.mark.parametrize("total", [0, 1, 12, 15, MAX_EVENT_MESSAGE_BYTES + 1, 2**31, 2**32 - 1])
def test_an_impossible_length_is_an_error_at_once(total: int) -> None:
    """kiro.md 5.1: 16 bytes to 25 MiB, though the prelude's checksum is good."""
    _, reader = read_all([V2, packed(total, 0, b"")[:12]])
    assert "length" in reader.error


def test_the_longest_length_waits_for_its_bytes() -> None:
    """25 MiB are allowed."""
    found, reader = read_all([packed(MAX_EVENT_MESSAGE_BYTES, 0, b"")[:12]])
    assert found == [] and not reader.error and not is_clean(reader)


@pytest.mark.parametrize("headers_size", [1, 2, 100, 2**32 - 1])
def test_headers_longer_than_their_message_are_an_error(headers_size: int) -> None:
    """kiro.md 5.1: H <= T - 16."""
    _, reader = read_all([packed(16, headers_size, b"")])
    assert "headers" in reader.error


def test_headers_beyond_the_limit_of_aws_are_an_error_at_once() -> None:
    """Millions of three bytes each would hold everybody up."""
    size = MAX_EVENT_HEADERS_BYTES + 1
    _, reader = read_all([packed(size + 16, size, b"")[:12]])
    assert "headers" in reader.error


def test_headers_may_fill_their_message() -> None:
    """No payload is a payload."""
    block = b"\x01a\x07\x00\x01x"
    found, reader = read_all([with_headers(block, b"")])
    assert found == [({"a": "x"}, b"")] and is_clean(reader)


@pytest.mark.parametrize(
    "broken",
    [packed(15, 0, b""), packed(16, 1, b""), V2[:-1] + b"\x00", V2[:8] + b"\0\0\0\0" + V2[12:]],
    ids=["length", "headers", "checksum", "prelude"],
)
def test_nothing_is_read_behind_an_error(broken: bytes) -> None:
    """No byte can be trusted any more: not in the same read, not in a later one."""
    found, reader = read_all([V2 + broken + V2, V2, *one_by_one(V2)])
    assert [meaning(item, {}) for item in found] == [HELLO]
    assert reader.error
    found, again = read_all([V2, broken, V2])
    assert len(found) == 1 and again.error == reader.error


def test_a_cut_stream_is_told_from_a_clean_end() -> None:
    """kiro.md 5.1: only the border between two messages is an end."""
    stream = V2 + VECTORS["V3"] + VECTORS["V10"]
    borders = {0, 127, 127 + 131, len(stream)}
    for cut in range(len(stream) + 1):
        framing = EventStreamFraming()
        framing.complete(stream[:cut])
        if cut in borders:
            assert framing.last_frames() == []
            continue
        with pytest.raises(UpstreamError, match="ended prematurely"):
            framing.last_frames()


# ---- cost --------------------------------------------------------------------------------------


def test_a_message_in_small_pieces_costs_what_its_bytes_cost() -> None:
    """Twice the bytes take twice the time, and what is kept takes no more memory than they do."""
    seconds = {}
    for size in (1 << 18, 1 << 20):
        data = message(event_headers("assistantResponseEvent"), b'"' + b"x" * size + b'"')
        reader, began = EventStreamFraming(), time.process_time()
        found = [
            m for at in range(0, len(data), 2) for m in reader.read_messages(data[at : at + 2])
        ]
        seconds[size] = time.process_time() - began
        assert len(found) == 1 and is_clean(reader)
        reader.read_messages(data[:-1])
        assert sys.getsizeof(reader.buffer) < 2 * size
    assert seconds[1 << 20] < 12 * seconds[1 << 18] + 0.05


def test_what_is_kept_of_many_small_messages_does_not_grow() -> None:
    """A long answer is never held."""
    reader = EventStreamFraming()
    for _ in range(1000):
        reader.read_messages(V2 + V2[:60])
        assert reader.buffer == V2[:60]
        reader.read_messages(V2[60:])
        assert not reader.buffer


# ---- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"", {}),
        (b"\x01a\x07\x00\x00", {"a": ""}),
        (b"\x01a\x07\x00\x03" + "日".encode(), {"a": "日"}),
        (b"\x02" + "é".encode() + b"\x07\x00\x01x", {"é": "x"}),
        (b"\xff" + b"n" * 255 + b"\x07\x00\x00", {"n" * 255: ""}),
        (b"\x01a\x07\xff\xff" + b"v" * 65535, {"a": "v" * 65535}),
        (b"\x01a\x07\x00\x01x" * 2 + b"\x01b\x07\x00\x01y", {"a": "x", "b": "y"}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_text_headers_are_read(block: bytes, expected: Json) -> None:
    """kiro.md 5.1, the table of types."""
    assert parse_event_headers(block) == expected


@pytest.mark.parametrize(
    "skipped",
    [
        b"\x00",
        b"\x01",
        b"\x02\x80",
        b"\x03\x7f\xff",
        b"\x04\xff\xff\xff\xff",
        b"\x05\x80" + b"\x00" * 7,
        b"\x06\x00\x00",
        b"\x06\x00\x02\x00\xff",
        b"\x08" + b"\xff" * 8,
        b"\x09" + bytes(range(16)),
    ],
    ids=repr,
)
def test_headers_of_every_other_type_are_skipped(skipped: bytes) -> None:
    """kiro.md 5.1, the table of types: each by its size, before and between text."""
    text = b"\x01%b\x07\x00\x01x"
    block = b"\x01a" + skipped + text % b"b" + b"\x01a" + skipped + text % b"c"
    assert parse_event_headers(block) == {"b": "x", "c": "x"}
    assert parse_event_headers(b"\x01a" + skipped) == {}


@pytest.mark.parametrize(
    "block",
    [
        b"\x00",
        b"\x00\x00",
        b"\x01",
        b"\x01a",
        b"\x05ab",
        b"\x01a\x0a",
        b"\x01a\xff\x00\x01x",
        b"\x01a\x02",
        b"\x01a\x03\x00",
        b"\x01a\x04\x00\x00\x00",
        b"\x01a\x05" + b"\x00" * 7,
        b"\x01a\x06",
        b"\x01a\x06\x00",
        b"\x01a\x06\x00\x01",
        b"\x01a\x07\x00\x05abcd",
        b"\x01a\x07\xff\xffx",
        b"\x01a\x08" + b"\x00" * 7,
        b"\x01a\x09" + b"\x00" * 15,
        b"\x01a\x00\x01",
        b"\x01a\x00\x00\x00",
    ],
    ids=repr,
)
def test_malformed_headers_are_an_error(block: bytes) -> None:
    """And end the stream, though both checksums are good."""
    with pytest.raises(WireError):
        parse_event_headers(block)
    found, reader = read_all([V2 + with_headers(block) + V2])
    assert len(found) == 1 and "headers" in reader.error


def test_random_header_blocks_are_read_or_refused() -> None:
    """Seeded: nothing else is ever raised."""
    rng = random.Random(SEED)
    good = VECTORS["V15"][12:-5]
    for _ in range(3000):
        block = bytearray(good[: rng.randrange(1, len(good) + 1)])
        for _ in range(rng.randrange(3)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        with contextlib.suppress(WireError):
            assert isinstance(parse_event_headers(bytes(block)), dict)


# ---- framing -----------------------------------------------------------------------------------


def framed(data: bytes) -> list[Json]:
    """The frames that a stream becomes."""
    framing = EventStreamFraming()
    frames = framing.frames(framing.complete(data))
    assert framing.last_frames() == []
    return frames


def event(payload: bytes, name: str = "assistantResponseEvent") -> bytes:
    """An event with any payload."""
    return message(event_headers(name), payload)


@pytest.mark.parametrize("name", ["V2", "V3", "V4", "V5", "V6", "V7", "V8", "V9", "V10", "V11"])
def test_an_event_becomes_a_member_of_the_union(name: str) -> None:
    """kiro.md 5.2: `{"assistantResponseEvent": {"content": "Hi"}}`."""
    headers, payload = MEANINGS[name]
    assert framed(VECTORS[name]) == [{headers[":event-type"]: payload}]


def test_events_become_server_sent_events_of_one_line_each() -> None:
    """What Flow cuts at empty lines must have none inside."""
    framing = EventStreamFraming()
    blocks = framing.complete(ALL[16 + 45 :])
    rows = blocks.split(b"\n\n")
    assert rows.pop() == b"" and len(rows) == len(VECTORS) - 2
    assert all(row.startswith(b"data: {") and b"\n" not in row for row in rows)
    last = framing.frames(blocks)[-1]
    assert "error" in last  # V15's payload is no JSON


def test_complete_keeps_what_is_torn() -> None:
    """Half a message is nothing yet."""
    framing = EventStreamFraming()
    assert framing.complete(V2[:60]) == b""
    blocks = framing.complete(V2[60:] + V2[:1])
    assert framing.frames(blocks) == [{"assistantResponseEvent": HELLO[1]}]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"assistantResponseEvent":{"content":"Hi"}}',
        b'{"content":"Hi"}',
        b'{\n  "content": "Hi"\n}\n',
        b'{\r\n\t"content":\r\n\r\n"Hi"}',
        b'\n\n{"content":"Hi"}',
        b'{"content":"H\\u0069"}',
    ],
    ids=repr,
)
def test_a_payload_may_be_wrapped_in_its_member_and_have_line_breaks(payload: bytes) -> None:
    """kiro.md 5.2 takes both forms; JSON allows white space between its tokens."""
    assert framed(event(payload)) == [{"assistantResponseEvent": {"content": "Hi"}}]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"assistantResponseEvent": {"content": "Hi"}}',
        b'{ "assistantResponseEvent":{"content":"Hi"}}',
        b'{"assistantResponseEvent" :{"content":"Hi"}}',
        b'{\n  "assistantResponseEvent": {\n    "content": "Hi"\n  }\n}',
        b' {"assistantResponseEvent":{"content":"Hi"}}',
    ],
    ids=repr,
)
def test_a_wrapped_payload_may_have_white_space_anywhere(payload: bytes) -> None:
    """The same JSON value means the same however it is written."""
    assert framed(event(payload)) == [{"assistantResponseEvent": {"content": "Hi"}}]


def test_an_empty_payload_is_an_empty_object() -> None:
    """kiro.md 5.3: all members are optional."""
    assert framed(event(b"", "messageStopEvent")) == [{"messageStopEvent": {}}]
    assert framed(event(b"")) == [{"assistantResponseEvent": {}}]


@pytest.mark.parametrize(
    "payload",
    [b"Hello", b"{", b'{"content":"Hi"', b'{"content":"\xff"}', b'{"content":NaN}', b"{'a':1}"],
    ids=repr,
)
def test_a_payload_that_is_no_json_is_an_error_and_the_last(payload: bytes) -> None:
    """Never a message with less in it."""
    first, last = framed(V2 + event(payload) + V2)
    assert first == {"assistantResponseEvent": {"content": "Hello"}}
    assert last["error"]["message"] and "assistantResponseEvent" not in last


@pytest.mark.parametrize(
    "payload",
    [
        b'{"content":"a"},"error":{"message":"x"}',
        b'{"content":"a"}}\n\ndata: {"error":{"message":"x"}',
        b'{"content":"a","b":"\n\ndata: {}"}',
    ],
    ids=repr,
)
def test_a_payload_cannot_become_two_events(payload: bytes) -> None:
    """What is no JSON by itself may not become some by what is put around it."""
    frames = framed(event(payload) + V2)
    assert len(frames) == 1
    assert "error" in frames[0] and "assistantResponseEvent" not in frames[0]


def test_an_exception_becomes_an_error_with_its_code_and_reason() -> None:
    """kiro.md 5.2."""
    said = {"message": "Too many requests", "reason": "INSUFFICIENT_MODEL_CAPACITY"}
    assert framed(VECTORS["V12"]) == [{"error": {**said, "code": "ThrottlingException"}}]


@pytest.mark.parametrize(
    ("payload", "words"),
    [(b"", ""), (b"plain words", "plain words"), (b"[1]", "[1]"), (b"a\n\nb\xff", "a\n\nb\ufffd")],
)
def test_an_exception_without_json_keeps_its_words(payload: bytes, words: str) -> None:
    """It is an error all the same, and stays one event."""
    head = {":message-type": "exception", ":exception-type": "ValidationException"}
    assert framed(message(head, payload) + V2)[0] == {
        "error": {"message": words, "code": "ValidationException"}
    }
    assert len(framed(message(head, payload))) == 1


@pytest.mark.parametrize("kind", ["exception", "error"])
def test_a_failure_whose_headers_are_no_text_is_still_one(kind: str) -> None:
    names = (":exception-type", ":error-code", ":error-message")
    data = message({":message-type": kind, **dict.fromkeys(names, b"\xff\x00")}, b"{}")
    framing = EventStreamFraming()
    (found,) = framing.frames(framing.complete(data))
    assert found["error"]["code"] == ""


def test_an_exceptions_own_code_does_not_hide_its_type() -> None:
    """The header is the modelled name."""
    data = exception_frame("ThrottlingException", {"message": "m", "code": "other"})
    assert framed(data)[0]["error"]["code"] == "ThrottlingException"


def test_an_error_message_is_told_from_its_headers() -> None:
    """kiro.md 5.2: its payload is empty."""
    expected = {"error": {"code": "InternalServerException", "message": "boom"}}
    assert framed(VECTORS["V13"]) == [expected]
    assert framed(error_frame("a\n\nb", "c\n\nd")) == [
        {"error": {"code": "a\n\nb", "message": "c\n\nd"}}
    ]


def test_a_message_of_no_known_kind_is_never_text() -> None:
    """No type is an event without a name; a new type is an error without words."""
    assert framed(VECTORS["V0"]) != []
    assert "assistantResponseEvent" not in framed(VECTORS["V0"])[0]
    odd = message({":message-type": "novelty", ":event-type": "assistantResponseEvent"}, b"{}")
    assert "assistantResponseEvent" not in framed(odd)[0]


@pytest.mark.parametrize("name", ["", "a\n\nb", 'x":{},"assistantResponseEvent', "é", "n" * 5000])
def test_a_strange_event_name_does_not_break_the_framing(name: str) -> None:
    """Unknown events are passed over, whatever they are called."""
    first, second = framed(event(b'{"content":"no"}', name) + V2)
    assert "assistantResponseEvent" not in first and "error" not in first
    assert second == {"assistantResponseEvent": {"content": "Hello"}}


@pytest.mark.parametrize("value", [True, 7, b"assistantResponseEvent", uuid.UUID(int=5)])
def test_an_event_name_that_is_no_string_does_not_break_the_framing(value: Any) -> None:
    """All ten types of headers may come."""
    head = {":message-type": "event", ":event-type": value}
    first, second = framed(message(head, b"{}") + V2)
    assert "error" not in first and "assistantResponseEvent" not in first
    assert "assistantResponseEvent" in second


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_malformed_stream_is_told_once_and_behind_what_came_before(size: int) -> None:
    """kiro.md 5.1: an upstream protocol error; no resync."""
    broken = V2[:-1] + b"\x00"
    framing, blocks = EventStreamFraming(), b""
    data = V2 + broken + V2 + V2
    for at in range(0, len(data), size):
        blocks += framing.complete(data[at : at + size])
    first, last = framing.frames(blocks)
    assert first == {"assistantResponseEvent": {"content": "Hello"}}
    assert SAID in last["error"]["message"]
    assert framing.last_frames() == []


def test_a_cut_inside_a_message_that_is_wrong_already_is_told_once() -> None:
    """The error was told; its cut end adds nothing."""
    framing = EventStreamFraming()
    assert SAID.encode() in framing.complete(b"\x7f" + V2[1:20])
    assert framing.last_frames() == []
