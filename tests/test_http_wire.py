"""Section 5: message heads and body framing, bytes in, values out."""

from __future__ import annotations

import contextlib
import gzip
import random
import time
import zlib

import pytest

from aiclient_api import (
    LAST_CHUNK,
    MAX_CHUNK_LINE_BYTES,
    MAX_FIELDS,
    MAX_REQUEST_LINE_BYTES,
    MAX_TRAILER_BYTES,
    Body,
    BodyTooLarge,
    ChunkedBody,
    InvalidRequest,
    WireError,
    head_end,
    inflate,
    parse_request_head,
    parse_response_head,
    request_body,
    response_body,
    status_line,
    write_chunk,
    write_head,
)

SEED = 20261122
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost:9090\r\n"


def request(*lines: str, first: str = "POST / HTTP/1.1", host: str = "Host: h") -> bytes:
    """A request head of these fields."""
    return "\r\n".join([first, host, *lines, "", ""]).encode("latin-1")


def response(*lines: str, first: str = "HTTP/1.1 200 OK") -> bytes:
    """A response head of these fields."""
    return "\r\n".join([first, *lines, "", ""]).encode("latin-1")


def status_of(data: bytes) -> int:
    """The status a request head, or the framing it announces, is refused with; 0 for none."""
    try:
        request_body(parse_request_head(data))
    except WireError as error:
        return error.status
    return 0


# ---- the end of a head -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", -1),
        (b"GET / HTTP/1.1\r\n", -1),
        (b"GET / HTTP/1.1\r\nA: b\r\n\r", -1),
        (b"A\r\n\r\n", 5),
        (b"A\r\n\r\nrest", 5),
        (b"A\n\nrest", 3),
        (b"A\r\nB\n\r\nrest", 7),
        (b"A\n\nB\r\n\r\n", 3),
        (b"A\r\n\r\nB\n\n", 5),
    ],
)
def test_the_end_of_a_head_is_found(data: bytes, end: int) -> None:
    """Bare LFs end it as well, to be refused at once."""
    assert head_end(data) == end
    assert head_end(bytearray(data)) == end


def test_the_end_of_a_head_is_found_wherever_the_search_goes_on() -> None:
    """A reader that remembers how far it looked must not step over the end."""
    data = b"GET / HTTP/1.1\r\nHost: h\r\n\r\nbody"
    for start in range(len(data) - 4):
        found = head_end(data, start)
        assert found == len(data) - 4 or start > len(data) - 4


# ---- request heads -----------------------------------------------------------------------------


def test_a_request_head_is_read() -> None:
    """Names in lower case, values without the white space around them."""
    head = parse_request_head(
        b"POST /v1/messages?beta=true HTTP/1.1\r\nHOST: localhost\r\nX-Api-Key: \t k \t\r\n\r\n"
    )
    assert (head.method, head.path, head.query, head.minor) == (
        "POST",
        "/v1/messages",
        "beta=true",
        1,
    )
    assert head.headers == {"host": "localhost", "x-api-key": "k"}


def test_repeated_fields_are_joined_and_named() -> None:
    """formats.md 1.1: anthropic-beta may repeat."""
    head = parse_request_head(request("Beta: a", "X: 1", "BETA: b"))
    assert head.headers["beta"] == "a, b"
    assert head.headers.repeated == {"beta"}
    assert head.headers.has_token("beta", "b") and not head.headers.has_token("beta", "c")


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        ("/", "/", "", "h"),
        ("/a%20b/%C3%A9?x=%20", "/a b/é", "x=%20", "h"),
        ("/a?b?c", "/a", "b?c", "h"),
        ("//a//b", "//a//b", "", "h"),
        ("http://other:8/a?b", "/a", "b", "other:8"),
        ("HTTP://other", "/", "", "other"),
        ("http://other?q", "/", "q", "other"),
        ("/%ff", "/\ufffd", "", "h"),
    ],
)
def test_a_request_target_is_read(target: str, path: str, query: str, host: str) -> None:
    """The host of an absolute target replaces the field."""
    head = parse_request_head(request(first=f"GET {target} HTTP/1.1"))
    assert (head.path, head.query, head.headers["host"]) == (path, query, host)
    assert head.target == target


def test_options_may_ask_for_the_whole_server() -> None:
    """And only OPTIONS may."""
    assert parse_request_head(request(first="OPTIONS * HTTP/1.1")).path == "*"
    assert status_of(request(first="GET * HTTP/1.1")) == 400


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"GET / HTTP/1.1\r\nHost: h\n\r\n",
        b"GET / HTTP/1.1\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\rX: y\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n",
        b" GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n",
        b"GET /\r\nHost: h\r\n\r\n",
        b"GET / \r\nHost: h\r\n\r\n",
        b"GET\t/\tHTTP/1.1\r\nHost: h\r\n\r\n",
        b"G(T / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / http/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.10\r\nHost: h\r\n\r\n",
        b"GET /\xe9 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET a HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http:///a HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://a b/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://u@h/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h, i\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h/i\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: u@h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h:port\r\n\r\n",
        GET + b"X : y\r\n\r\n",
        GET + b": y\r\n\r\n",
        GET + b"X\r\n\r\n",
        GET + b" folded\r\n\r\n",
        GET + b"X: y\r\n folded\r\n\r\n",
        GET + b"X\x00: y\r\n\r\n",
        GET + b"X: a\x00b\r\n\r\n",
        GET + b"X: a\x0bb\r\n\r\n",
        GET + b"X: a\x7fb\r\n\r\n",
        GET + b"X\xe9: y\r\n\r\n",
    ],
)
def test_a_doubtful_head_is_refused(data: bytes) -> None:
    """RFC 9112: what two programs in a row could read differently is how requests are smuggled."""
    assert status_of(data) == 400


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(first="GET / HTTP/2.0"), 505),
        (request(first="GET / HTTP/1.2"), 505),
        (request(first="GET / HTTP/0.9"), 505),
        (request(first="GET /" + "a" * MAX_REQUEST_LINE_BYTES + " HTTP/1.1"), 414),
        (request(*(f"X{i}: y" for i in range(MAX_FIELDS))), 431),
        (request(*(f"X{i}: y" for i in range(MAX_FIELDS - 1))), 0),
    ],
)
def test_some_refusals_have_a_status_of_their_own(data: bytes, status: int) -> None:
    """RFC 9110, RFC 6585."""
    assert status_of(data) == status


def test_http_1_0_needs_no_host() -> None:
    """RFC 9112 section 3.2 is about 1.1."""
    assert parse_request_head(b"GET / HTTP/1.0\r\n\r\n").minor == 0


@pytest.mark.parametrize(
    "host",
    [
        "h",
        "h:",
        "h:65535",
        "127.0.0.1:1",
        "[::1]:9090",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "a_b.c",
        "h.",
    ],
)
def test_usual_hosts_are_taken(host: str) -> None:
    """Names, addresses, ports."""
    assert parse_request_head(request(host=f"Host: {host}")).headers["host"] == host


def test_bytes_above_ascii_in_a_value_are_kept() -> None:
    """obs-text: seen, never understood."""
    assert parse_request_head(request("X: \xe9")).headers["x"] == "\xe9"


def test_random_bytes_are_a_head_or_a_wire_error() -> None:
    """Seeded: nothing else may leave the parsers."""
    rng = random.Random(SEED)
    seeds = [request("Content-Length: 3", "A: b"), response("Content-Length: 3")]
    for _ in range(4000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data) - 4)] = rng.choice(b"\r\n\t :,;/?#[]%\x00\x80\xffaZ09")
        data += b"\r\n\r\n"
        data = data[: head_end(data)]
        for parse in (parse_request_head, parse_response_head):
            try:
                parse(bytes(data))
            except WireError as error:
                assert 400 <= error.status <= 505


# ---- response heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "status", "minor"),
    [
        ("HTTP/1.1 200 OK", 200, 1),
        ("HTTP/1.1 466", 466, 1),
        ("HTTP/1.0 404 ", 404, 0),
        ("HTTP/1.1 299 a b \xe9", 299, 1),
    ],
)
def test_a_response_head_is_read(first: str, status: int, minor: int) -> None:
    """The reason is nobody's business."""
    head = parse_response_head(response("A: b", first=first))
    assert (head.status, head.minor, head.headers) == (status, minor, {"a": "b"})


@pytest.mark.parametrize(
    "first",
    [
        "HTTP/2 200 OK",
        "HTTP/1.1 20 OK",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1 600 X",
        "HTTP/1.1  200",
        "200 OK",
        "",
    ],
)
def test_a_doubtful_status_line_is_refused(first: str) -> None:
    """An upstream is held to the same grammar."""
    with pytest.raises(WireError):
        parse_response_head(response(first=first))


# ---- which body follows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Content-Length: 3"], 0),
        (["Content-Length: 0"], 0),
        (["Content-Length: 00003"], 0),
        (["Content-Length: +3"], 400),
        (["Content-Length: -3"], 400),
        (["Content-Length: 3 3"], 400),
        (["Content-Length: 3,3"], 400),
        (["Content-Length: 3", "Content-Length: 3"], 400),
        (["Content-Length: 0x3"], 400),
        (["Content-Length: 3_0"], 400),
        (["Content-Length:"], 400),
        (["Content-Length: \xb2"], 400),
        (["Content-Length: " + "9" * 20], 400),
        (["Transfer-Encoding: chunked"], 0),
        (["Transfer-Encoding: CHUNKED"], 0),
        (["Transfer-Encoding: chunked", "Content-Length: 3"], 400),
        (["Transfer-Encoding: gzip, chunked"], 501),
        (["Transfer-Encoding: chunked, chunked"], 400),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: chunked, gzip"], 400),
        (["Transfer-Encoding: identity"], 400),
        (["Transfer-Encoding: xchunked"], 400),
        (["Transfer-Encoding: chunked;q=1"], 400),
        (["Transfer-Encoding:"], 400),
    ],
)
def test_what_frames_a_request_is_never_in_doubt(lines: list[str], status: int) -> None:
    """RFC 9112 section 6.3."""
    assert status_of(request(*lines)) == status


def test_chunked_in_http_1_0_is_refused() -> None:
    """RFC 9112 section 6.1: such a message is faulty."""
    data = request("Transfer-Encoding: chunked", first="POST / HTTP/1.0")
    assert status_of(data) == 400


@pytest.mark.parametrize(
    ("method", "first", "lines", "kind", "length"),
    [
        ("HEAD", "HTTP/1.1 200 OK", ["Content-Length: 5"], Body, 0),
        ("GET", "HTTP/1.1 204 X", ["Content-Length: 5"], Body, 0),
        ("GET", "HTTP/1.1 304 X", [], Body, 0),
        ("POST", "HTTP/1.1 200 OK", ["Transfer-Encoding: chunked"], ChunkedBody, 0),
        ("POST", "HTTP/1.1 200 OK", ["Content-Length: 5"], Body, 5),
        ("POST", "HTTP/1.1 200 OK", [], Body, None),
    ],
)
def test_the_body_of_a_response(
    method: str, first: str, lines: list[str], kind: type[Body], length: int | None
) -> None:
    """RFC 9112 section 6.3, as a client."""
    body = response_body(parse_response_head(response(*lines, first=first)), method)
    assert type(body) is kind and body.remaining == (length or 0)
    assert body.until_close == (length is None)
    assert body.is_complete == (method == "HEAD" or "204" in first or "304" in first)


@pytest.mark.parametrize(
    "lines",
    [
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: x"],
    ],
)
def test_a_doubtful_answer_is_refused(lines: list[str]) -> None:
    """Rather no answer than a wrong one on a pooled connection."""
    with pytest.raises(WireError):
        response_body(parse_response_head(response(*lines)), "POST")


# ---- bodies ------------------------------------------------------------------------------------

CHUNKED = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello"),
    (b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    (b'5;ext\r\nhello\r\n0;a=b;c="d;\\"e"\r\n\r\n', b"hello"),
    (b"5 ; a = b\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    (b"5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello"),
]


@pytest.mark.parametrize(("data", "payload"), CHUNKED)
def test_a_chunked_body_arrives_whole_byte_by_byte_and_with_a_tail(
    data: bytes, payload: bytes
) -> None:
    """Chunk boundaries are where proxies break."""
    for tail in (b"", b"GET / HTTP/1.1\r\n"):
        body = ChunkedBody()
        assert body.feed(data + tail) == payload
        assert body.is_complete and body.excess == tail
        body.on_eof()
    body = ChunkedBody()
    pieces = []
    for at in range(len(data)):
        assert not body.is_complete
        pieces.append(body.feed(data[at : at + 1]))
    assert b"".join(pieces) == payload and body.is_complete and body.excess == b""


@pytest.mark.parametrize(("data", "payload"), CHUNKED)
def test_a_chunked_body_cut_anywhere_is_not_complete(data: bytes, payload: bytes) -> None:
    """A truncated answer must never pass for a whole one."""
    for cut in range(len(data)):
        body = ChunkedBody()
        assert payload.startswith(body.feed(data[:cut]))
        with pytest.raises(WireError):
            body.on_eof()


def test_a_chunked_body_in_random_reads_arrives_whole() -> None:
    """Seeded chunks, seeded cuts."""
    rng = random.Random(SEED)
    for _ in range(300):
        parts = [rng.randbytes(rng.randint(0, 40)) for _ in range(rng.randint(0, 8))]
        data = b"".join(map(write_chunk, parts)) + LAST_CHUNK
        body, payload = ChunkedBody(), b""
        at = 0
        while at < len(data):
            size = rng.randint(1, 30)
            payload += body.feed(data[at : at + size])
            at += size
        assert payload == b"".join(parts) and body.is_complete


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"\n",
        b"g\r\n",
        b"-1\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\rhello\r\n",
        b"5;\r\nhello\r\n",
        b"5;a\x00\r\nhello\r\n",
        b'5;a="b\r\nhello\r\n',
        b"5;a\nb\r\nhello\r\n",
        b"5\r\nhelloX",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\rX",
        b"5\r\nhello0\r\n\r\n",
        b"0\r\nA b\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n A: b\r\n\r\n",
        b"0\r\n\n",
        b"0\r\nA: b\n\r\n",
        b"1" * 17 + b"\r\n",
        b"5;" + b"a" * MAX_CHUNK_LINE_BYTES + b"\r\n",
        b"5;" + b"a" * (MAX_CHUNK_LINE_BYTES + 1),
        b"0\r\nA: " + b"b" * MAX_TRAILER_BYTES + b"\r\n\r\n",
        b"0\r\nA: " + b"b" * (MAX_TRAILER_BYTES + 1),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_doubtful_chunk_is_refused(data: bytes) -> None:
    """At the latest when the bytes that show it are there, in one read or one by one."""
    with pytest.raises(WireError):
        ChunkedBody().feed(data)
    body = ChunkedBody()
    step = len(data) // 1000 + 1
    with pytest.raises(WireError):
        for at in range(0, len(data), step):
            body.feed(data[at : at + step])


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b""], ids=["good", "bad", "cut"])
def test_a_long_chunk_line_byte_by_byte_costs_time_in_line_with_its_size(end: bytes) -> None:
    """Its extension is looked at when the line is there, not at each byte again."""
    line = b"5;" + b"a" * (MAX_CHUNK_LINE_BYTES - 4) + end
    body, begun = ChunkedBody(), time.process_time()
    for at in range(len(line) - 1):
        assert body.feed(line[at : at + 1]) == b""
    took = time.process_time() - begun
    begun = time.process_time()
    for _ in range(1000):
        with contextlib.suppress(WireError):
            ChunkedBody().feed(line)
    assert took < 10 * (time.process_time() - begun)
    if end == b"\r\n":
        assert body.feed(b"\nhello\r\n") == b"hello"
    elif end:
        with pytest.raises(WireError):
            body.feed(b"\n")


@pytest.mark.parametrize(
    "reads",
    [
        [b"5\r\nhello\r\n"],
        [b"005\r\nhello\r\n"],
        [b"5;a=b\r\nhello\r\n"],
        [b"5\r\nhel", b"lo\r\n"],
        [b"5\r\nhello", b"\r\n"],
        [b"5", b"\r\nhello\r\n"],
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [b"0\r\n\r\n", b"00;a\r\n\r\n", b"0\r\nA: b\r\n\r\n"], ids=str)
def test_a_chunk_in_a_read_of_its_own_is_like_any_other(reads: list[bytes], last: bytes) -> None:
    """Also the last one, which is empty."""
    for _ in range(2):
        body = ChunkedBody()
        assert b"".join(map(body.feed, [*reads, *reads])) == b"hellohello"
        assert not body.is_complete
        assert body.feed(last) == b"" and body.is_complete and body.excess == b""
        assert body.feed(b"5\r\nhello\r\n") == b"" and body.excess == b"5\r\nhello\r\n"


def test_a_body_of_known_length_takes_no_more() -> None:
    """What is behind it is the next message."""
    body = Body(5)
    assert body.feed(b"he") == b"he" and body.remaining == 3 and not body.is_complete
    assert body.feed(b"lloGET") == b"llo" and body.is_complete
    assert body.excess == b"GET" and body.feed(b" /") == b"" and body.excess == b"GET /"


def test_a_body_of_known_length_cut_short_is_an_error() -> None:
    """And an empty one is complete at once."""
    body = Body(5)
    body.feed(b"hell")
    with pytest.raises(WireError):
        body.on_eof()
    assert Body(0).is_complete


def test_the_end_of_the_connection_ends_the_last_kind_of_body() -> None:
    """HTTP/1.0 upstreams and proxies."""
    body = Body()
    assert body.feed(b"abc") == b"abc" and not body.is_complete
    body.on_eof()
    assert body.is_complete


# ---- writing -----------------------------------------------------------------------------------


def test_a_head_is_written() -> None:
    """And read back."""
    data = write_head("POST /a HTTP/1.1", [("Host", "h"), ("X", "a b")])
    assert data == b"POST /a HTTP/1.1\r\nHost: h\r\nX: a b\r\n\r\n"
    assert parse_request_head(data).headers == {"host": "h", "x": "a b"}


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\rb", "a\x00b"])
def test_a_value_that_would_split_a_head_is_never_written(value: str) -> None:
    """Whoever let it come that far."""
    with pytest.raises(ValueError, match="header X"):
        write_head("GET / HTTP/1.1", [("X", value)])


def test_a_status_line_has_a_reason_even_for_odd_ones() -> None:
    """Some clients want the second space."""
    assert status_line(529) == "HTTP/1.1 529 Overloaded"
    assert status_line(299) == "HTTP/1.1 299 Unknown"


def test_an_empty_chunk_is_nothing() -> None:
    """It would end the body."""
    assert write_chunk(b"") == b""
    assert write_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


# ---- compressed bodies -------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", b"{}", b"a" * 1000])
def test_compressed_bodies_are_decoded(text: bytes) -> None:
    """formats.md case 53: gzip, and deflate in both its forms."""
    raw = zlib.compressobj(wbits=-15)
    assert inflate(gzip.compress(text, mtime=0), "gzip", 1000) == text
    assert inflate(zlib.compress(text), "deflate", 1000) == text
    assert inflate(raw.compress(text) + raw.flush(), "deflate", 1000) == text


def test_a_bomb_is_refused_before_it_grows() -> None:
    """formats.md case 53: seventy megabytes out of seventy thousand bytes."""
    bomb = gzip.compress(bytes(70 * 1024 * 1024))
    with pytest.raises(BodyTooLarge, match="64 MiB"):
        inflate(bomb, "gzip", 64 * 1024 * 1024)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "data", [b"", b"x", b"{}", gzip.compress(b"abc", mtime=0)[:-1], b"\x1f\x8b\x08"]
)
def test_a_torn_or_foreign_body_is_a_400(coding: str, data: bytes) -> None:
    """Not a crash of zlib."""
    with pytest.raises(InvalidRequest, match=f"not valid {coding}"):
        inflate(data, coding, 1000)


@pytest.mark.parametrize(
    "tail", [b"junk", b"\x1f\x8b", gzip.compress(b"1}", mtime=0), zlib.compress(b"1}")]
)
def test_what_follows_a_compressed_body_is_refused(tail: bytes) -> None:
    """Two readers would disagree on it; no client sends several gzip members."""
    with pytest.raises(InvalidRequest, match="not valid gzip"):
        inflate(gzip.compress(b"{}", mtime=0) + tail, "gzip", 1000)


def test_a_decoded_body_may_be_as_large_as_the_limit() -> None:
    """One byte more is refused."""
    packed = gzip.compress(bytes(1200))
    assert inflate(packed, "gzip", 1200) == bytes(1200)
    with pytest.raises(BodyTooLarge):
        inflate(packed, "gzip", 1199)
