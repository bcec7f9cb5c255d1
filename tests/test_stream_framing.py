"""Section 6: server-sent events in and out."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from aiclient_api import (
    MAX_EVENT_LINES,
    MAX_FRAME_BYTES,
    MAX_JSON_VALUES,
    SSE_COMMENT_PING,
    SSE_DONE,
    SseReader,
    UpstreamError,
    load_frames,
    write_sse,
)

Events = list[tuple[bytes, bytes]]


class Reader(SseReader):
    """A reader whose events are compared before they are decoded as JSON."""

    def feed(self, data: bytes) -> Events:
        """The events that `data` completes."""
        return self.parse_all(self.complete(data))

    def end(self) -> Events:
        """The event that the end of the stream completes."""
        return self.parse_all(bytes(self.buffer))


SEED = 20261122

STREAMS: dict[str, tuple[bytes, Events]] = {
    "one event": (b"data: a\n\n", [(b"", b"a")]),
    "named": (b"event: x\ndata: a\n\n", [(b"x", b"a")]),
    "name behind": (b"data: a\nevent: x\n\n", [(b"x", b"a")]),
    "no space": (b"event:x\ndata:a\n\n", [(b"x", b"a")]),
    "only the first space": (b"data:  a\n\n", [(b"", b" a")]),
    "several lines": (b"data: a\ndata: b\ndata:\n\n", [(b"", b"a\nb\n")]),
    "comments": (b": x\n\n:\n\ndata: a\n: y\n\n", [(b"", b"a")]),
    "CRLF": (b"event: x\r\ndata: a\r\n\r\ndata: b\r\n\r\n", [(b"x", b"a"), (b"", b"b")]),
    "CR": (b"event: x\rdata: a\r\rdata: b\r\r", [(b"x", b"a"), (b"", b"b")]),
    "mixed ends": (b"data: a\r\n\ndata: b\n\r\n", [(b"", b"a"), (b"", b"b")]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", [(b"", b"a")]),
    "name resets": (b"event: x\n\ndata: a\n\n", [(b"", b"a")]),
    "other fields": (b"id: 7\nretry: 5\nfoo: bar\ndata: a\n\n", [(b"", b"a")]),
    "many blanks": (b"\n\n\ndata: a\n\n\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
    "no last blank line": (b"data: a\n\ndata: b\n", [(b"", b"a"), (b"", b"b")]),
    "no last line end": (b"data: a\n\ndata: b", [(b"", b"a"), (b"", b"b")]),
    "bare JSON": (b'data: a\n\n{"error":1}\n', [(b"", b"a"), (b"", b'{"error":1}')]),
    "UTF-8": ("data: é日🙂\n\n".encode(), [(b"", "é日🙂".encode())]),
    "LF in a line": (b"data: {\ndata: }\n\n", [(b"", b"{\n}")]),
}


def read_all(reads: list[bytes]) -> Events:
    """The events of these reads and of the end."""
    reader = Reader()
    events = [event for data in reads for event in reader.feed(data)]
    return events + reader.end()


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_whole_and_byte_by_byte(name: str) -> None:
    """formats.md 6.5."""
    stream, expected = STREAMS[name]
    assert read_all([stream]) == expected
    assert read_all([stream[at : at + 1] for at in range(len(stream))]) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_the_same_when_cut_in_two_anywhere(name: str) -> None:
    """A CR and its LF may come in two reads."""
    stream, expected = STREAMS[name]
    for cut in range(len(stream) + 1):
        assert read_all([stream[:cut], b"", stream[cut:]]) == expected, cut


def test_streams_one_after_another_in_random_reads() -> None:
    """Seeded: any order of complete streams without a byte order mark, any cuts."""
    rng = random.Random(SEED)
    whole = [v for k, v in STREAMS.items() if k != "BOM" and "last" not in k and k != "bare JSON"]
    for _ in range(300):
        chosen = rng.choices(whole, k=5)
        data = b"".join(stream for stream, _ in chosen)
        expected = [event for _, events in chosen for event in events]
        cuts = sorted(rng.sample(range(len(data)), 6))
        reads = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
        assert read_all(reads) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_complete_gives_whole_events_and_parse_all_splits_them(name: str) -> None:
    """Events can be copied before anyone looks into them: LF only, nothing torn, nothing lost."""
    stream, expected = STREAMS[name]
    for cut in range(len(stream) + 1):
        reader, found = Reader(), []
        for data in (stream[:cut], stream[cut:]):
            blocks = reader.complete(data)
            assert (blocks == b"" or blocks.endswith(b"\n\n")) and b"\r" not in blocks
            found += Reader().parse_all(blocks)
        assert found + reader.end() == expected, cut


def test_complete_keeps_what_is_torn() -> None:
    """Several events at once, the begun one with the next read."""
    reader = Reader()
    assert reader.complete(b"data: a\n\nevent: x\ndata: b\n\nda") == (
        b"data: a\n\nevent: x\ndata: b\n\n"
    )
    assert reader.complete(b"ta: c\n") == b""
    assert reader.complete(b"\n") == b"data: c\n\n"
    assert reader.end() == []


def test_events_come_out_as_soon_as_they_are_complete() -> None:
    """A token may not wait for the next one."""
    reader = Reader()
    assert reader.feed(b"data: a\n\nda") == [(b"", b"a")]
    assert reader.feed(b"ta: b\n") == []
    assert reader.feed(b"\n") == [(b"", b"b")]


def test_a_complete_event_with_crlf_does_not_wait_for_the_next_one() -> None:
    """The LF of the last CR may be in the next read, but the line is complete without it."""
    reader = Reader()
    assert reader.feed(b"data: a\r\n\r") == [(b"", b"a")]
    assert reader.feed(b"") + reader.feed(b"\ndata: b\r\n\r\n") == [(b"", b"b")]


@pytest.mark.parametrize("read", [b"x", b"\r", b"x\r", b"\rx", b"x\n", b"\r\nx", b"data: x\r" * 9])
def test_an_event_that_does_not_end_costs_what_its_bytes_cost(read: bytes) -> None:
    """Four times the reads take four times the time, not sixteen: each byte is searched once."""
    seconds = {}
    for count in (10_000, 40_000):
        reader, began = Reader(), time.process_time()
        for _ in range(count):
            reader.feed(read)
        seconds[count] = time.process_time() - began
    assert seconds[40_000] < 8 * seconds[10_000] + 0.05


def test_an_event_of_too_many_lines_is_refused() -> None:
    """Each line becomes an object: 16 MiB of empty ones would be hundreds."""
    assert Reader().feed(b"data:x\n" * MAX_EVENT_LINES + b"\n")
    with pytest.raises(UpstreamError, match="too many lines"):
        Reader().feed(b"data:x\n" * (MAX_EVENT_LINES + 2) + b"\n")


def test_an_event_of_too_many_values_is_refused() -> None:
    """16 MiB of tiny ones take seconds and gigabytes."""
    row = b'{"x":[' + b"{}," * MAX_JSON_VALUES + b"1]}"
    assert load_frames([(b"", row)])[0]["type"] == "error"
    assert load_frames([(b"", b'{"x":"%b"}' % (b"[," * MAX_JSON_VALUES))]) != []


def test_an_endless_event_is_refused() -> None:
    """formats.md 6.5: 16 MB."""
    reader = Reader()
    reader.feed(b"data: " + b"x" * (MAX_FRAME_BYTES - 100))
    with pytest.raises(UpstreamError, match="too large"):
        reader.feed(b"x" * 200)


def test_frames_are_json_objects_with_a_type() -> None:
    """The event's name stands in for a missing type, `[DONE]` has one of its own."""
    events = [(b"x", b'{"a":1}'), (b"y", b'{"type":"z"}'), (b"", b"[DONE]"), (b"", b'{"b":2}')]
    frames = load_frames(events)
    assert frames == [{"a": 1, "type": "x"}, {"type": "z"}, {"type": "[DONE]"}, {"b": 2}]
    assert load_frames([]) == []


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        ([b"x"], 0),
        ([b""], 0),
        ([b"[]"], 0),
        ([b"1"], 0),
        ([b"null"], 0),
        ([b'"a"'], 0),
        ([b"{"], 0),
        ([b'{"a":1}', b"{"], 1),
        ([b'{"a":1}', b"[DONE]", b'{"b":2}', b"[]"], 3),
        ([b'{"a":1},{"b":2}'], 0),
        ([b'{"a":1}', b'{"a":1} {"b":2}'], 1),
        ([b'{"a":1},{"b":[2', b"3]}"], 0),
        ([b'{"a":1', b'"b":2},{}'], 0),
        ([b'{"a":NaN}'], 0),
        ([b'{"a":-Infinity}'], 0),
        ([b'{"a":Infinity}'], 0),
        ([b'{"a":1e999}'], 0),
        ([b'{"a":-1e999}'], 0),
        ([b'{"a":"\xff"}'], 0),
        ([b'{"a":"\x01"}'], 0),
        ([b'{"a":' + b"[" * 100_000], 0),
        ([b"[DONE] "], 0),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_event_that_is_no_json_object_is_an_error(texts: list[bytes], kept: int) -> None:
    """Each event for itself: halves of two may not make a whole.

    What came before goes on, nothing behind is read, and nothing is raised.
    """
    good = load_frames([(b"", text) for text in texts[:kept]])
    *before, last = load_frames([(b"x", text) for text in [*texts, b'{"late":1}']])
    assert [frame | {"type": frame.get("type", "x")} for frame in good] == before
    assert len(before) == kept
    assert set(last) == {"type", "error"} and last["type"] == "error"
    assert set(last["error"]) == {"message"}
    assert isinstance(last["error"]["message"], str) and last["error"]["message"]


def test_blanks_around_an_object_are_no_error() -> None:
    """RFC 8259 section 2 allows them."""
    assert load_frames([(b"", b' \t{"a": 1}\n ')]) == [{"a": 1}]


def test_frames_are_written_with_and_without_a_name() -> None:
    """formats.md 1.7 and 2.6."""
    assert write_sse({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()
    assert write_sse({"type": "x"}, "x") == b'event: x\ndata: {"type":"x"}\n\n'
    assert SSE_DONE == b"data: [DONE]\n\n"


def test_what_is_written_is_read_back() -> None:
    """Line breaks of a model's words never break a frame."""
    frame = {"type": "t", "text": "a\n\nb\r\ndata: c\u2028\x85 event: d"}
    assert load_frames(read_all([write_sse(frame, "t"), SSE_COMMENT_PING])) == [frame]
