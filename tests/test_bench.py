"""What the benchmark's upstream sends, and whether its client notices when a delta is missing."""

from __future__ import annotations

import json
import zlib

import bench
import pytest
import upstream

CHUNKS = 20
PATHS = {"chat": b"/chat/completions", "messages": b"/v1/messages", "responses": b"/responses"}
STREAMS = [
    (path, shape, kind)
    for path in PATHS.values()
    for shape in ("clean", "copilot")
    for kind in ("text", "arguments", "thinking")
]


def rendered(path: bytes, shape: str, kind: str) -> upstream.Rendered:
    """An answer of so many deltas, one in each write."""
    script = upstream.Script(CHUNKS, batch=1, shape=shape, kind=kind)
    return upstream.render(upstream.DIALECTS[path](shape, kind), script)


def tally(pieces: list[bytes]) -> bench.Tally:
    """What the client makes of these bytes, read one after the other."""
    found = bench.Tally()
    answer = bench.Answer(0, [(number, piece) for number, piece in enumerate(pieces, 1)])
    found.add(bench.read_body(answer)[0], CHUNKS)
    return found


@pytest.mark.parametrize(("path", "shape", "kind"), STREAMS)
def test_every_delta_is_found_once(path: bytes, shape: str, kind: str) -> None:
    answer = rendered(path, shape, kind)
    found = tally([answer.opening, *answer.pieces, answer.closing])
    assert found.is_clean() and found.deltas == CHUNKS


@pytest.mark.parametrize(("path", "shape", "kind"), STREAMS)
def test_a_delta_that_is_lost_doubled_or_late_is_noticed(
    path: bytes, shape: str, kind: str
) -> None:
    answer = rendered(path, shape, kind)
    one, two, *rest = answer.pieces
    lost = tally([answer.opening, one, *rest, answer.closing])
    doubled = tally([answer.opening, one, two, two, *rest, answer.closing])
    late = tally([answer.opening, two, one, *rest, answer.closing])
    assert (lost.lost, doubled.doubled, late.reordered) == (1, 1, 1)
    whole = tally([answer.opening, *answer.pieces, b"0\r\n\r\n"])
    assert whole.unfinished == 1


@pytest.mark.parametrize("kind", ["text", "arguments"])
def test_what_the_end_of_a_responses_stream_repeats_is_compared(kind: str) -> None:
    answer = rendered(PATHS["responses"], "copilot", kind)
    closing = answer.closing.replace(b"7@0;", b"8@0;", 1)
    found = tally([answer.opening, *answer.pieces, closing])
    assert found.deltas == CHUNKS and not found.is_clean()


@pytest.mark.parametrize("kind", ["text", "arguments", "thinking"])
def test_kiro_frames_are_well_formed(kind: str) -> None:
    frames = upstream.kiro_frames("clean", kind)
    data = frames.opening + frames.delta(7, 0) + frames.closing(8)
    while data:
        size = int.from_bytes(data[:4], "big")
        assert size and zlib.crc32(data[: size - 4]).to_bytes(4, "big") == data[size - 4 : size]
        data = data[size:]


@pytest.mark.parametrize("dialect", PATHS)
def test_the_worst_bodies_are_json_within_the_limits(dialect: str) -> None:
    for name, data in bench.worst_bodies(dialect, "m", 1 << 20):
        body = json.loads(data)
        assert body["model"] == "m" and len(data) < 5 << 20, name
