"""The HTTP server from outside: what it does with good bytes, bad bytes and slow peers."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any

import pytest
from support import (
    Gateway,
    GatewayFailed,
    Headers,
    Received,
    Reply,
    Wire,
    exchange,
    parse_responses,
)

MESSAGES = "/v1/messages"
CHAT = "/v1/chat/completions"
DIALECTS = pytest.mark.parametrize("path", [MESSAGES, CHAT], ids=["messages", "chat"])
#: for what takes time and happens below the dialects
ONE_DIALECT = pytest.mark.parametrize("path", [MESSAGES], ids=["messages"])

KIB = 1024
MIB = 1024 * KIB
KEY = "key-5f1e9a-Correct"
SMALL_LIMITS = """
[server]
head_seconds = 1
body_seconds = 1
idle_seconds = 1
max_body_mib = 1
"""
#: A deadline of one second may be kept this late by a coarse clock on a busy machine.
LATEST_SECONDS = 3.0
IN_PROC = os.path.exists("/proc/self/status")


# ---- the programs under test -------------------------------------------------------------------


def is_clean(gateway: Gateway) -> bool:
    """Whether the program ends well and never met an exception that it did not expect."""
    status = gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()[-4000:]
    return status == 0


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """The file itself, as a user starts it, with the default limits and no key."""
    with Gateway(bare=True) as running:
        yield running
        assert is_clean(running)


@pytest.fixture(scope="module")
def small() -> Iterator[Gateway]:
    """A gateway with deadlines of a second and bodies of a MiB."""
    with Gateway(config=SMALL_LIMITS) as running:
        yield running
        assert is_clean(running)


@pytest.fixture(scope="module")
def locked() -> Iterator[Gateway]:
    """A gateway that asks for a key and logs all it ever logs."""
    config = f'api_key = "{KEY}"\n[server]\nmax_body_mib = 1\n[logging]\nlevel = "debug"\n'
    with Gateway(config=config) as running:
        yield running
        assert is_clean(running)


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """A gateway that serves one more host name and grants one browser origin, with a key."""
    config = (
        f'api_key = "{KEY}"\n[server]\nallowed_hosts = ["gateway.internal"]\n'
        'cors_origins = ["https://app.example"]\n'
    )
    with Gateway(config=config) as running:
        yield running
        assert is_clean(running)


# ---- requests ----------------------------------------------------------------------------------


def asking(text: str, **fields: Any) -> dict[str, Any]:
    """A body that both dialects understand: the echo model is to say `text`."""
    messages = [{"role": "user", "content": text}]
    return {"model": "echo", "max_tokens": 64, "messages": messages, **fields}


def packed(text: str) -> bytes:
    """The same as bytes."""
    return json.dumps(asking(text)).encode()


def head(*fields: str, line: str = f"POST {MESSAGES} HTTP/1.1", host: str = "127.0.0.1") -> bytes:
    """A request head of a request line, a Host field and `fields`, sent as latin-1."""
    lines = [line, *([f"Host: {host}"] if host else []), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


JSON_TYPE = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
CLOSE = "Connection: close"
HEALTH = head(line="GET /healthz HTTP/1.1")
LAST_HEALTH = head(CLOSE, line="GET /healthz HTTP/1.1")


def sized(body: bytes, *fields: str, line: str = f"POST {MESSAGES} HTTP/1.1") -> bytes:
    """A request with a JSON body of known length."""
    return head(JSON_TYPE, f"Content-Length: {len(body)}", *fields, line=line) + body


def chunked(*chunks: bytes) -> bytes:
    """Chunks of data, without the last one."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


def said(reply: Reply) -> str:
    """The text of a whole answer of the echo model, in either dialect."""
    assert reply.status == 200, reply
    answer = reply.json()
    if "choices" in answer:
        return str(answer["choices"][0]["message"]["content"])
    return "".join(part["text"] for part in answer["content"])


def streamed(body: bytes) -> str:
    """The text of a streamed answer that came to its end, in either dialect."""
    frames = [line[5:].strip() for line in body.decode().split("\n") if line.startswith("data:")]
    if frames[-1] == "[DONE]":
        choices = [json.loads(frame)["choices"] for frame in frames[:-1]]
        return "".join(some[0]["delta"].get("content") or "" for some in choices if some)
    events = [json.loads(frame) for frame in frames]
    assert events[-1]["type"] == "message_stop", events[-1]
    return "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")


# ---- what every answer has ---------------------------------------------------------------------


def checked(reply: Reply) -> Reply:
    """`reply`, once it has what every answer must have: an id, a type, no sniffing, no 500."""
    headers = reply.headers
    assert reply.complete, reply
    assert reply.status != 500, reply
    assert headers.get("x-request-id"), headers
    assert headers["x-request-id"] == headers.get("request-id")
    assert headers.get("x-content-type-options") == "nosniff"
    if reply.body:
        kind = headers["content-type"].split(";")[0]
        assert kind in ("application/json", "text/event-stream"), kind
    if reply.status >= 400 and reply.body:
        assert len(reply.body) < 20_000
        assert reply.json()["error"]["message"], reply
    return reply


ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
OPENAI_CODES = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_content_encoding",
    429: "rate_limit_exceeded",
}


def refused(reply: Reply, status: int, path: str) -> str:
    """The message of an error of `status` in the shape that callers of `path` can read."""
    assert checked(reply).status == status, reply
    body = reply.json()
    error = body["error"]
    if path.startswith(MESSAGES):
        assert body["type"] == "error"
        assert error["type"] == ANTHROPIC_TYPES.get(status, error["type"])
        assert body["request_id"] == reply.headers["request-id"]
    else:
        assert set(body) == {"error"}
        assert {"message", "type", "param", "code"} <= set(error)
        assert error["type"] in ("invalid_request_error", "server_error", "requests", "tokens")
    return str(error["message"])


def only(received: Received, *methods: str) -> Reply:
    """The one answer in `received`, after which the peer closed without a reset."""
    assert received.ended == "closed", (received.ended, bytes(received[:500]))
    replies = parse_responses(received, methods)
    assert len(replies) == 1, replies
    return checked(replies[0])


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    """Ask again and again until `is_so`, which must be within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


# ---- heads that are refused --------------------------------------------------------------------

GET = "GET /healthz HTTP/1.1"
HOST_LINE = b"Host: 127.0.0.1\r\n"

BAD_REQUEST_LINES: dict[str, tuple[bytes, set[int]]] = {
    "two spaces": (b"GET  /healthz HTTP/1.1", {400}),
    "space before": (b" GET /healthz HTTP/1.1", {400}),
    "space after": (b"GET /healthz HTTP/1.1 ", {400}),
    "tabs": (b"GET\t/healthz\tHTTP/1.1", {400}),
    "no version": (b"GET /healthz", {400}),
    "no target": (b"GET HTTP/1.1", {400}),
    "no method": (b"/healthz HTTP/1.1", {400}),
    "one word": (b"GET", {400}),
    "four words": (b"GET /healthz HTTP/1.1 x", {400}),
    "space in target": (b"GET /heal thz HTTP/1.1", {400}),
    "method not a token": (b"G(T /healthz HTTP/1.1", {400}),
    "method with colon": (b"GET: /healthz HTTP/1.1", {400}),
    "NUL in method": (b"GE\x00T /healthz HTTP/1.1", {400}),
    "NUL in target": (b"GET /heal\x00thz HTTP/1.1", {400}),
    "control in target": (b"GET /heal\x01thz HTTP/1.1", {400}),
    "DEL in target": (b"GET /heal\x7fthz HTTP/1.1", {400}),
    "obs-text in target": (b"GET /heal\xe9thz HTTP/1.1", {400}),
    "CR in target": (b"GET /heal\rthz HTTP/1.1", {400}),
    "vertical tab for space": (b"GET /healthz\x0bHTTP/1.1", {400}),
    "no slash": (b"GET healthz HTTP/1.1", {400}),
    "fragment": (b"GET /healthz#x HTTP/1.1", {400}),
    "star for GET": (b"GET * HTTP/1.1", {400}),
    "authority for CONNECT": (b"CONNECT evil.example:443 HTTP/1.1", {400, 405, 501}),
    "absolute form without host": (b"GET http:///healthz HTTP/1.1", {400}),
    "absolute form with user": (b"GET http://a@127.0.0.1/healthz HTTP/1.1", {400}),
    "absolute form with a port too high": (b"GET http://127.0.0.1:99999/healthz HTTP/1.1", {400}),
    "absolute form with percent-escapes": (b"GET http://127.0.0.%31/healthz HTTP/1.1", {400}),
    "absolute form of another scheme": (b"GET ftp://127.0.0.1/healthz HTTP/1.1", {400}),
    "lower-case version": (b"GET /healthz http/1.1", {400}),
    "HTTP/2.0": (b"GET /healthz HTTP/2.0", {400, 505}),
    "HTTP/0.9": (b"GET /healthz HTTP/0.9", {400, 505}),
    "HTTP/1.10": (b"GET /healthz HTTP/1.10", {400, 505}),
    "HTTP/01.1": (b"GET /healthz HTTP/01.1", {400, 505}),
    "HTTP/1,1": (b"GET /healthz HTTP/1,1", {400}),
    "HTTP/1.": (b"GET /healthz HTTP/1.", {400}),
    "superscript version": (b"GET /healthz HTTP/1.\xb9", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
}

BAD_FIELDS: dict[str, bytes] = {
    "space before colon": b"X-Note : a",
    "tab before colon": b"X-Note\t: a",
    "no colon": b"X-Note",
    "empty name": b": a",
    "folded by space": b"X-Note: a\r\n b",
    "folded by tab": b"X-Note: a\r\n\tb",
    "folded to nothing": b"X-Note: a\r\n ",
    "leading space": b" X-Note: a",
    "space in name": b"X Note: a",
    "brackets in name": b"X(Note): a",
    "quoted name": b'"X-Note": a',
    "slash in name": b"X/Note: a",
    "at in name": b"X@Note: a",
    "obs-text in name": b"X-N\xf6te: a",
    "utf-8 in name": "X-Nöte: a".encode(),
    "NUL in name": b"X-No\x00te: a",
    "control in name": b"X-No\x01te: a",
    "NUL in value": b"X-Note: a\x00b",
    "CR in value": b"X-Note: a\rb",
    "CR before CRLF": b"X-Note: a\r",
    "LF for CRLF": b"X-Note: a\nX-More: b",
    "CR for CRLF": b"X-Note: a\rX-More: b",
    "smuggled by LF": b"X-Note: a\n\nGET /healthz HTTP/1.1",
    "control in value": b"X-Note: a\x01b",
    "escape in value": b"X-Note: a\x1bb",
    "DEL in value": b"X-Note: a\x7fb",
    "vertical tab in value": b"X-Note: a\x0bb",
    "form feed in value": b"X-Note: a\x0cb",
}

BAD_HOSTS: dict[str, list[str]] = {
    "missing": [],
    "doubled": ["127.0.0.1", "127.0.0.1"],
    "doubled and different": ["127.0.0.1", "evil.example"],
    "with a space": ["127.0.0.1 evil.example"],
    "with a tab": ["127.0.0.1\tevil.example"],
    "port of letters": ["127.0.0.1:http"],
    "port with a sign": ["127.0.0.1:+80"],
    "negative port": ["127.0.0.1:-1"],
    "superscript port": ["127.0.0.1:\xb2"],
    "two ports": ["127.0.0.1:80:80"],
    "port over 65535": ["127.0.0.1:99999"],
    "port over 65535, foreign": ["evil.example:65536"],
    "percent-escapes": ["127.0.0.%31"],
    "percent-escapes, foreign": ["%65vil.example"],
    "empty label": ["evil..example"],
    "only a dot": ["."],
    "IPv6 of colons": ["[:::]"],
    "IPv6 of nine groups": ["[1:2:3:4:5:6:7:8:9]"],
    "IPv6 with a zone": ["[fe80::1%25eth0]"],
    "IPv4 in brackets": ["[127.0.0.1]"],
    "with a path": ["127.0.0.1/healthz"],
    "with a scheme": ["http://127.0.0.1"],
    "with a user": ["user@127.0.0.1"],
    "with a query": ["127.0.0.1?x"],
    "with a fragment": ["127.0.0.1#x"],
    "with a backslash": ["127.0.0.1\\x"],
    "quoted": ['"127.0.0.1"'],
    "IPv6 without brackets": ["::1"],
    "IPv6 not closed": ["[::1"],
    "IPv6 not opened": ["::1]"],
    "IPv6 with a tail": ["[::1]x"],
    "obs-text": ["127.0.0.\xff"],
    "non-breaking space": ["127.0.0.1\xa0"],
}

BAD_LENGTHS: dict[str, list[str]] = {
    "plus": ["+5"],
    "minus": ["-5"],
    "underscore": ["5_0"],
    "hexadecimal": ["0x5"],
    "superscript two": ["\xb2"],
    "empty": [""],
    "decimal point": ["5.0"],
    "exponent": ["5e0"],
    "space inside": ["5 5"],
    "next line character": ["5\x85"],
    "non-breaking space": ["\xa05"],
    "a word": ["five"],
    "quoted": ['"5"'],
    "5,000 digits": ["5" * 5000],
    "5,000 zeros": ["0" * 5000],
    "20 digits": ["0" * 19 + "5"],
    "list of same": ["5, 5"],
    "list of different": ["5, 6"],
    "list with nothing": ["5,"],
    "twice the same": ["5", "5"],
    "twice different": ["5", "6"],
    "twice, once empty": ["5", ""],
}

BAD_CODINGS: dict[str, tuple[list[str], set[int]]] = {
    "with a length": (["Transfer-Encoding: chunked", "Content-Length: 5"], {400}),
    "behind a length": (["Content-Length: 5", "Transfer-Encoding: chunked"], {400}),
    "with length zero": (["Content-Length: 0", "Transfer-Encoding: chunked"], {400}),
    "identity with a length": (["Content-Length: 5", "Transfer-Encoding: identity"], {400}),
    "gzip": (["Transfer-Encoding: gzip"], {400, 501}),
    "identity": (["Transfer-Encoding: identity"], {400, 501}),
    "gzip, chunked": (["Transfer-Encoding: gzip, chunked"], {501}),
    "gzip and chunked apart": (["Transfer-Encoding: gzip", CHUNKED], {501}),
    "chunked, gzip": (["Transfer-Encoding: chunked, gzip"], {400, 501}),
    "chunked twice": (["Transfer-Encoding: chunked, chunked"], {400}),
    "chunked in two fields": ([CHUNKED, CHUNKED], {400}),
    "empty": (["Transfer-Encoding:"], {400, 501}),
    "empty item": (["Transfer-Encoding: ,chunked"], {400, 501}),
    "parameter": (["Transfer-Encoding: chunked;q=1"], {400, 501}),
    "quoted": (['Transfer-Encoding: "chunked"'], {400, 501}),
    "prefixed": (["Transfer-Encoding: xchunked"], {400, 501}),
    "suffixed": (["Transfer-Encoding: chunkedx"], {400, 501}),
    "vertical tab": (["Transfer-Encoding: \x0bchunked"], {400}),
    "next line character": (["Transfer-Encoding: chunked\x85"], {400, 501}),
    "folded": (["Transfer-Encoding:\r\n chunked"], {400}),
    "space before colon": (["Transfer-Encoding : chunked"], {400}),
}


def all_bad_heads() -> Iterator[tuple[str, bytes, set[int]]]:
    """(name, head, statuses) of each head that is refused."""
    for name, (line, statuses) in BAD_REQUEST_LINES.items():
        yield f"line: {name}", line + b"\r\n" + HOST_LINE + b"\r\n", statuses
    for name, field in BAD_FIELDS.items():
        first = b"GET /healthz HTTP/1.1\r\n" + field + b"\r\n" + HOST_LINE + b"\r\n"
        last = b"GET /healthz HTTP/1.1\r\n" + HOST_LINE + field + b"\r\n\r\n"
        yield f"first field: {name}", first, {400}
        yield f"last field: {name}", last, {400}
    for name, hosts in BAD_HOSTS.items():
        fields = [f"Host: {host}" for host in hosts]
        yield f"host: {name}", head(*fields, line=GET, host=""), {400}
    for name, lengths in BAD_LENGTHS.items():
        fields = [f"Content-Length: {length}" for length in lengths]
        yield f"length: {name}", head(JSON_TYPE, *fields) + b"xxxxx", {400}
    for name, (fields, statuses) in BAD_CODINGS.items():
        yield f"coding: {name}", head(JSON_TYPE, *fields) + b"5\r\nhello\r\n0\r\n\r\n", statuses
    old = head(CHUNKED, line=f"POST {MESSAGES} HTTP/1.0")
    yield "coding: in HTTP/1.0", old + b"5\r\nhello\r\n0\r\n\r\n", {400}
    yield "bare LF throughout", HEALTH.replace(b"\r\n", b"\n"), {400}
    yield "bare LF at the very end", HEALTH[:-2] + b"\n", {400}
    yield "bare CR throughout", HEALTH.replace(b"\r\n", b"\r") + b"\r\n\r\n", {400}
    yield "bare LF for an empty line", b"\n" + HEALTH, {400}
    yield "a hundred empty lines", b"\r\n" * 100 + HEALTH, {400}
    yield "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}


BAD_HEADS = list(all_bad_heads())


@pytest.mark.parametrize(
    ("data", "statuses"), [case[1:] for case in BAD_HEADS], ids=[case[0] for case in BAD_HEADS]
)
def test_a_doubtful_head_gets_one_error_and_the_connection_is_closed(
    gateway: Gateway, data: bytes, statuses: set[int]
) -> None:
    reply = only(gateway.raw(data + HEALTH))
    assert reply.status in statuses, reply
    assert reply.headers["connection"] == "close"


def test_a_doubtful_head_is_refused_also_after_a_good_request(gateway: Gateway) -> None:
    for _, data, statuses in BAD_HEADS[::7]:
        received = gateway.raw(HEALTH + data + HEALTH)
        assert received.ended == "closed"
        statuses_seen = [checked(reply).status for reply in parse_responses(received)]
        assert statuses_seen[0] == 200, (data, statuses_seen)
        assert len(statuses_seen) == 2, (data, statuses_seen)
        assert statuses_seen[1] in statuses, (data, statuses_seen)


def test_a_post_without_any_length_has_no_body(gateway: Gateway) -> None:
    reply = only(gateway.raw(head(JSON_TYPE, CLOSE)))
    assert reply.status in (400, 411), reply


# ---- bodies that are refused -------------------------------------------------------------------

BAD_CHUNKS: dict[str, bytes] = {
    "prefix 0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "leading space": b" 5\r\nhello\r\n0\r\n\r\n",
    "leading tab": b"\t5\r\nhello\r\n0\r\n\r\n",
    "trailing space": b"5 \r\nhello\r\n0\r\n\r\n",
    "empty": b"\r\nhello\r\n0\r\n\r\n",
    "underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "not hexadecimal": b"g\r\nhello\r\n0\r\n\r\n",
    "superscript two": b"\xb2\r\nhello\r\n0\r\n\r\n",
    "full-width digit": "\uff15\r\nhello\r\n0\r\n\r\n".encode(),
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "5,000 digits": b"0" * 5000 + b"5\r\nhello\r\n0\r\n\r\n",
    "NUL": b"5\x00\r\nhello\r\n0\r\n\r\n",
    "bare LF behind the size": b"5\nhello\r\n0\r\n\r\n",
    "bare CR behind the size": b"5\rhello\r\n0\r\n\r\n",
    "CR CR LF behind the size": b"5\r\r\nhello\r\n0\r\n\r\n",
    "nothing behind the data": b"5\r\nhello0\r\n\r\n",
    "one byte too many": b"5\r\nhelloX\r\n0\r\n\r\n",
    "one byte too few": b"6\r\nhello\r\n0\r\n\r\n",
    "LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "CR behind the data": b"5\r\nhello\r0\r\n\r\n",
    "LF CR behind the data": b"5\r\nhello\n\r0\r\n\r\n",
    "extension without a name": b"5;\r\nhello\r\n0\r\n\r\n",
    "extension of a value only": b"5;=x\r\nhello\r\n0\r\n\r\n",
    "extension without a value": b"5;a=\r\nhello\r\n0\r\n\r\n",
    "extension not closed": b'5;a="b\r\nhello\r\n0\r\n\r\n',
    "extension with NUL": b"5;a=b\x00\r\nhello\r\n0\r\n\r\n",
    "extension with bare LF": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "extension with bare CR": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "extension with obs-text": b"5;a=\xe9\r\nhello\r\n0\r\n\r\n",
    "extension with a space": b"5;a b\r\nhello\r\n0\r\n\r\n",
    "trailer without colon": b"5\r\nhello\r\n0\r\nnonsense\r\n\r\n",
    "trailer without name": b"5\r\nhello\r\n0\r\n: a\r\n\r\n",
    "trailer with space before colon": b"5\r\nhello\r\n0\r\nX-Note : a\r\n\r\n",
    "trailer with leading space": b"5\r\nhello\r\n0\r\n X-Note: a\r\n\r\n",
    "trailer folded": b"5\r\nhello\r\n0\r\nX-Note: a\r\n b\r\n\r\n",
    "trailer with bare LF": b"5\r\nhello\r\n0\r\nX-Note: a\nX-More: b\r\n\r\n",
    "trailer with bare CR": b"5\r\nhello\r\n0\r\nX-Note: a\rb\r\n\r\n",
    "trailer with NUL": b"5\r\nhello\r\n0\r\nX-Note: a\x00b\r\n\r\n",
    "trailers ended by bare LF": b"5\r\nhello\r\n0\r\nX-Note: a\r\n\n",
    "last chunk ended by bare LF": b"5\r\nhello\r\n0\r\n\n",
    "last chunk of bare LFs": b"5\r\nhello\r\n0\n\n",
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_a_doubtful_chunk_gets_one_400_and_the_connection_is_closed(
    gateway: Gateway, chunks: bytes
) -> None:
    reply = only(gateway.raw(head(JSON_TYPE, CHUNKED) + chunks + HEALTH))
    assert reply.status == 400, reply
    assert reply.headers["connection"] == "close"


@DIALECTS
def test_a_doubtful_chunk_is_refused_in_the_shape_of_the_endpoint(
    gateway: Gateway, path: str
) -> None:
    for chunks in (b"0x5\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"):
        data = head(JSON_TYPE, CHUNKED, line=f"POST {path} HTTP/1.1") + chunks
        refused(only(gateway.raw(data)), 400, path)


def test_a_doubtful_chunk_is_refused_also_when_it_comes_byte_by_byte(gateway: Gateway) -> None:
    for chunks in list(BAD_CHUNKS.values())[::8]:
        if len(chunks) < 100:
            reply = only(gateway.raw(head(JSON_TYPE, CHUNKED) + chunks + HEALTH, piece=1))
            assert reply.status == 400, (chunks, reply)


# ---- heads and bodies that are too large -------------------------------------------------------


def fields_of(count: int) -> list[str]:
    """`get_int` small fields."""
    return [f"X-Field-{number}: {number}" for number in range(count)]


TOO_LARGE: dict[str, tuple[bytes, set[int]]] = {
    "request line": (head(line=f"GET /{'a' * 17_000} HTTP/1.1"), {414}),
    "request line without an end": (b"GET /" + b"a" * 70_000, {414, 431}),
    "query": (head(line=f"GET /healthz?{'a' * 17_000} HTTP/1.1"), {414}),
    "method": (head(line=f"{'A' * 17_000} /healthz HTTP/1.1"), {400, 414, 431}),
    "one field": (head(f"X-Note: {'a' * 66_000}", line=GET), {431}),
    "field name": (head(f"{'X' * 66_000}: a", line=GET), {431}),
    "head of many fields": (head(*[f"X-{n}: {'a' * 4000}" for n in range(20)], line=GET), {431}),
    "head without an end": (f"{GET}\r\nX-Note: ".encode() + b"a" * 200_000, {431}),
    "129 fields": (head(*fields_of(128), line=GET), {431}),
    "5,000 fields": (head(*fields_of(5000), line=GET), {431}),
    "declared body": (head(JSON_TYPE, "Content-Length: 67108865"), {413}),
    "declared body of 19 digits": (head(JSON_TYPE, "Content-Length: " + "9" * 19), {413}),
    "declared chunk": (head(JSON_TYPE, CHUNKED) + b"FFFFFFFFFFFFFFFF\r\nhello", {413}),
    "chunk line": (head(CHUNKED) + b"5;" + b"a" * 9000 + b"\r\nhello\r\n", {400, 413, 431}),
    "chunk line without an end": (head(CHUNKED) + b"5;" + b"a" * 70_000, {400, 413, 431}),
    "trailer": (
        head(CHUNKED) + b"0\r\nX-Note: " + b"a" * 9000 + b"\r\n\r\n",
        {400, 413, 431},
    ),
    "trailers without an end": (
        head(CHUNKED) + b"0\r\n" + b"X-Note: a\r\n" * 7000,
        {400, 413, 431},
    ),
}


@pytest.mark.parametrize(("data", "statuses"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_what_is_too_large_is_refused_at_once_and_the_connection_is_closed(
    gateway: Gateway, data: bytes, statuses: set[int]
) -> None:
    reply = only(gateway.raw(data))
    assert reply.status in statuses, reply
    assert reply.headers["connection"] == "close"


WITHIN_LIMITS = {
    "request line of 16,000 octets": head(CLOSE, line=f"GET /healthz?{'a' * 15_900} HTTP/1.1"),
    "128 fields": head(CLOSE, *fields_of(126), line=GET),
    "head of 60 KiB": head(CLOSE, *[f"X-{n}: {'a' * 4000}" for n in range(15)], line=GET),
}


@pytest.mark.parametrize("data", WITHIN_LIMITS.values(), ids=WITHIN_LIMITS.keys())
def test_a_head_just_within_the_limits_is_served(gateway: Gateway, data: bytes) -> None:
    assert only(gateway.raw(data)).status == 200


@DIALECTS
def test_a_body_over_the_limit_is_refused_from_its_length_alone(small: Gateway, path: str) -> None:
    line = f"POST {path} HTTP/1.1"
    reply = only(small.raw(head(JSON_TYPE, f"Content-Length: {MIB + 1}", line=line)))
    refused(reply, 413, path)


@DIALECTS
def test_the_answer_to_a_body_too_large_survives_the_rest_of_it(small: Gateway, path: str) -> None:
    body = b" " * (2 * MIB)
    plain = sized(body, line=f"POST {path} HTTP/1.1")
    refused(only(small.raw(plain)), 413, path)
    pieces = chunked(*[body[:60_000]] * 35) + b"0\r\n\r\n"
    refused(
        only(small.raw(head(JSON_TYPE, CHUNKED, line=f"POST {path} HTTP/1.1") + pieces)), 413, path
    )


def test_a_body_of_the_very_limit_is_read(small: Gateway) -> None:
    body = packed("as large as may be")
    body += b" " * (MIB - len(body))
    assert "as large as may be" in said(small.request("POST", CHAT, body))
    pieces = chunked(*[body[at : at + 30_000] for at in range(0, MIB, 30_000)]) + b"0\r\n\r\n"
    reply = only(small.raw(head(JSON_TYPE, CHUNKED, CLOSE) + pieces))
    assert "as large as may be" in said(reply)


# ---- what is accepted, however it is cut -------------------------------------------------------

HELLO = packed("hello there")
ACCEPTED: dict[str, bytes] = {
    "length": sized(HELLO),
    "length with zeros": head(JSON_TYPE, f"Content-Length: 000{len(HELLO)}") + HELLO,
    "length with white space": head(JSON_TYPE, f"Content-Length: \t {len(HELLO)} \t") + HELLO,
    "names in any case": sized(HELLO).replace(b"Content-", b"cOnTeNt-").replace(b"Host", b"hOST"),
    "no white space": sized(HELLO).replace(b": ", b":", 3),
    "one chunk": head(JSON_TYPE, CHUNKED) + chunked(HELLO) + b"0\r\n\r\n",
    "chunks of a byte": head(JSON_TYPE, CHUNKED)
    + chunked(*[HELLO[at : at + 1] for at in range(len(HELLO))])
    + b"0\r\n\r\n",
    "chunked in any case": head(JSON_TYPE, "transfer-encoding: \tCHUNKED ")
    + chunked(HELLO)
    + b"0\r\n\r\n",
    "chunk size with zeros": head(JSON_TYPE, CHUNKED)
    + b"%016X\r\n" % len(HELLO)
    + HELLO
    + b"\r\n0000\r\n\r\n",
    "chunk extensions": head(JSON_TYPE, CHUNKED)
    + b'%x;a;b=c;d="e;\\" f"\r\n' % len(HELLO)
    + HELLO
    + b"\r\n0;last\r\n\r\n",
    "trailers": head(JSON_TYPE, CHUNKED, "Trailer: X-Sum")
    + chunked(HELLO)
    + b"0\r\nX-Sum: 1\r\nX-More:\r\n\r\n",
    "trailer that names a length": head(JSON_TYPE, CHUNKED)
    + chunked(HELLO)
    + b"0\r\nContent-Length: 5\r\n\r\n",
    "obs-text in a value": sized(HELLO, "X-Note: caf\xe9 \xff\x80"),
    "empty value": sized(HELLO, "X-Note:"),
    "tab in a value": sized(HELLO, "X-Note: a\tb"),
    "upgrade to h2c": sized(HELLO, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"),
    "upgrade to websocket": sized(HELLO, "Connection: Upgrade", "Upgrade: websocket"),
    "eight empty lines before": b"\r\n" * 8 + sized(HELLO),
    "expectation": sized(HELLO, "Expect: 100-continue"),
}


def final(replies: list[Reply]) -> list[Reply]:
    """The answers that are not interim ones."""
    return [checked(reply) for reply in replies if reply.status >= 200]


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_good_request_is_answered_and_what_follows_stays_in_step(
    gateway: Gateway, data: bytes
) -> None:
    received = gateway.raw(data + data + LAST_HEALTH)
    assert received.ended == "closed"
    replies = final(parse_responses(received))
    assert len(replies) == 3, replies
    assert "hello there" in said(replies[0])
    assert "hello there" in said(replies[1])
    assert replies[2].json() == {"status": "ok"}


@pytest.mark.parametrize(
    "name", ["length", "chunk extensions", "trailers", "chunks of a byte", "expectation"]
)
def test_a_good_request_is_answered_when_it_comes_byte_by_byte(gateway: Gateway, name: str) -> None:
    received = gateway.raw(ACCEPTED[name] + LAST_HEALTH, piece=1, read_seconds=10)
    assert received.ended == "closed"
    replies = final(parse_responses(received))
    assert [reply.status for reply in replies] == [200, 200]
    assert "hello there" in said(replies[0])


def test_a_connection_is_kept_for_the_next_request(gateway: Gateway) -> None:
    with gateway.wire() as wire:
        for number in range(5):
            wire.send(gateway.request_bytes("POST", CHAT, asking(f"round {number}")))
            assert f"round {number}" in said(checked(wire.reply()))


def test_pipelined_requests_are_answered_in_order(gateway: Gateway) -> None:
    requests = [
        ("POST", MESSAGES, asking("first")),
        ("HEAD", "/healthz", None),
        ("POST", CHAT, asking("second", stream=True)),
        ("GET", "/v1/nothing/here", None),
        ("GET", MESSAGES, None),
        ("POST", CHAT, b"not json"),
        ("POST", MESSAGES, asking("third", stream=True)),
        ("GET", "/v1/models", None),
        ("POST", CHAT, asking("fourth")),
    ]
    data = b"".join(gateway.request_bytes(*request) for request in requests)
    received = gateway.raw(data + LAST_HEALTH)
    assert received.ended == "closed"
    methods = [request[0] for request in requests]
    replies = [checked(reply) for reply in parse_responses(received, methods)]
    assert [r.status for r in replies] == [200, 200, 200, 404, 405, 400, 200, 200, 200, 200]
    assert "first" in said(replies[0])
    assert replies[1].body == b""
    assert "second" in streamed(replies[2].body)
    assert "third" in streamed(replies[6].body)
    assert "fourth" in said(replies[8])
    assert len({reply.headers["request-id"] for reply in replies}) == len(replies)


def test_a_long_pipeline_is_answered_to_its_end(gateway: Gateway) -> None:
    received = gateway.raw(HEALTH * 500 + LAST_HEALTH)
    assert received.ended == "closed"
    replies = parse_responses(received)
    assert len(replies) == 501
    assert {reply.status for reply in replies} == {200}
    assert len({reply.headers["x-request-id"] for reply in replies}) == 501


UNWANTED_BODIES: dict[str, tuple[str, list[str]]] = {
    "GET with a body": ("GET /healthz HTTP/1.1", []),
    "HEAD with a body": ("HEAD /healthz HTTP/1.1", []),
    "unknown path": ("POST /nothing HTTP/1.1", []),
    "wrong method": (f"PUT {CHAT} HTTP/1.1", []),
    "wrong kind": (f"POST {CHAT} HTTP/1.1", ["Content-Type: text/html"]),
    "wrong coding": (f"POST {CHAT} HTTP/1.1", [JSON_TYPE, "Content-Encoding: br"]),
    "wrong origin": (f"POST {CHAT} HTTP/1.1", [JSON_TYPE, "Origin: https://evil.example"]),
    "preflight": ("OPTIONS /healthz HTTP/1.1", []),
}


@pytest.mark.parametrize(("line", "fields"), UNWANTED_BODIES.values(), ids=UNWANTED_BODIES.keys())
def test_a_body_that_nobody_wants_is_not_taken_for_a_request(
    gateway: Gateway, line: str, fields: list[str]
) -> None:
    smuggled = head(line="GET /smuggled HTTP/1.1")
    plain = head(f"Content-Length: {len(smuggled)}", *fields, line=line) + smuggled
    pieces = head(CHUNKED, *fields, line=line) + chunked(smuggled) + b"0\r\n\r\n"
    for data in (plain, pieces):
        received = gateway.raw(data + LAST_HEALTH)
        assert received.ended == "closed"
        replies = final(parse_responses(received, [line.split()[0]]))
        assert len(replies) in (1, 2)
        assert len(replies) == 1 or replies[1].json() == {"status": "ok"}


def test_requests_cut_anywhere_are_the_same_requests(gateway: Gateway) -> None:
    data = ACCEPTED["trailers"] + HEALTH
    with gateway.wire() as wire:
        for at in range(1, len(data), 11):
            wire.send(data[:at])
            wire.send(data[at:])
            assert "hello there" in said(checked(wire.reply()))
            assert checked(wire.reply()).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "data",
    [
        HEALTH,
        head(line="GET /v1/models HTTP/1.1"),
        sized(HELLO, line=f"POST {MESSAGES}/count_tokens HTTP/1.1"),
        sized(b"not json"),
    ],
    ids=["health", "models", "count_tokens", "error"],
)
def test_a_client_that_sends_no_more_gets_its_answer_where_no_model_is_asked(
    gateway: Gateway, data: bytes
) -> None:
    assert only(gateway.raw(data, half_close=True)).status in (200, 400)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET", HEALTH[:-1], sized(HELLO)[:-5]],
    ids=["silent", "method", "head", "body"],
)
def test_a_client_that_leaves_in_the_middle_is_let_go(gateway: Gateway, data: bytes) -> None:
    received = gateway.raw(data, half_close=True)
    assert received.ended == "closed"
    assert all(reply.status == 400 for reply in parse_responses(received))


# ---- keeping and closing connections -----------------------------------------------------------


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, CLOSE", "close, te"])
def test_a_client_that_wants_the_connection_closed_is_told_so(gateway: Gateway, value: str) -> None:
    reply = only(gateway.raw(head(f"Connection: {value}", line=GET) + HEALTH))
    assert reply.status == 200
    assert reply.headers["connection"].lower() == "close"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_http_1_0_is_answered_once_and_closed(gateway: Gateway, method: str) -> None:
    reply = only(gateway.raw(head(line=f"{method} /healthz HTTP/1.0") + HEALTH), method)
    assert reply.status == 200
    assert reply.headers.get("connection", "close") == "close"


@DIALECTS
def test_a_stream_for_http_1_0_is_not_chunked_and_ends_with_the_connection(
    gateway: Gateway, path: str
) -> None:
    body = json.dumps(asking("old times", stream=True)).encode()
    received = gateway.raw(sized(body, "Connection: keep-alive", line=f"POST {path} HTTP/1.0"))
    reply = only(received)
    assert reply.status == 200
    assert "transfer-encoding" not in reply.headers
    assert "old times" in streamed(reply.body)


def test_a_kept_http_1_0_connection_is_announced_or_closed(gateway: Gateway) -> None:
    data = head("Connection: keep-alive", line="GET /healthz HTTP/1.0")
    received = gateway.raw(data + head(line="GET /healthz HTTP/1.0"))
    assert received.ended == "closed"
    replies = final(parse_responses(received))
    kept = replies[0].headers.get("connection", "").lower() == "keep-alive"
    assert "content-length" in replies[0].headers
    assert [reply.status for reply in replies] == ([200, 200] if kept else [200])


@DIALECTS
def test_a_stream_is_chunked_and_the_connection_goes_on(gateway: Gateway, path: str) -> None:
    with gateway.wire() as wire:
        wire.send(gateway.request_bytes("POST", path, asking("one by one", stream=True)))
        reply = checked(wire.reply())
        assert reply.headers["transfer-encoding"] == "chunked"
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in reply.headers["cache-control"]
        assert "one by one" in streamed(reply.body)
        wire.send(HEALTH)
        assert checked(wire.reply()).status == 200


@pytest.mark.parametrize("target", ["/", "/healthz", "/v1/models", "/nothing/here", MESSAGES])
def test_an_answer_to_head_has_no_body(gateway: Gateway, target: str) -> None:
    received = gateway.raw(head(line=f"HEAD {target} HTTP/1.1") + LAST_HEALTH)
    assert received.ended == "closed"
    replies = [checked(reply) for reply in parse_responses(received, ["HEAD", "GET"])]
    assert len(replies) == 2, replies
    assert replies[0].status in (200, 404, 405)
    assert replies[0].status == 200 or target not in ("/", "/healthz")
    assert replies[1].json() == {"status": "ok"}


def test_an_upgrade_is_not_taken_up(gateway: Gateway) -> None:
    fields = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    with gateway.wire() as wire:
        wire.send(head(*fields, line=GET))
        reply = checked(wire.reply())
        assert reply.status == 200
        assert "upgrade" not in reply.headers
        wire.send(HEALTH)
        assert checked(wire.reply()).status == 200


# ---- Expect: 100-continue ----------------------------------------------------------------------

CONTINUE = "Expect: 100-continue"


def test_a_client_that_waits_is_told_to_continue(gateway: Gateway) -> None:
    data = sized(HELLO, CONTINUE)
    with gateway.wire() as wire:
        wire.send(data[: -len(HELLO)])
        assert wire.reply().status == 100
        wire.send(HELLO)
        assert "hello there" in said(checked(wire.reply()))


def test_a_waiting_client_of_a_chunked_body_is_told_to_continue(gateway: Gateway) -> None:
    with gateway.wire() as wire:
        wire.send(head(JSON_TYPE, CHUNKED, "expect: 100-Continue"))
        assert wire.reply().status == 100
        wire.send(chunked(HELLO) + b"0\r\n\r\n")
        assert "hello there" in said(checked(wire.reply()))


def never_told_to_continue(gateway: Gateway, data: bytes) -> Reply:
    """The answer to a waiting client, which must be the first thing it gets, and at once."""
    with gateway.wire() as wire:
        wire.send(data)
        return checked(wire.reply(seconds=5))


@DIALECTS
def test_a_waiting_client_with_the_wrong_key_gets_401_and_no_100(
    locked: Gateway, path: str
) -> None:
    line = f"POST {path} HTTP/1.1"
    for field in ("Authorization: Bearer wrong", "x-api-key: wrong", "X-Note: no key"):
        data = head(JSON_TYPE, CONTINUE, "Content-Length: 500", field, line=line)
        refused(never_told_to_continue(locked, data), 401, path)


@DIALECTS
def test_a_waiting_client_with_too_large_a_body_gets_413_and_no_100(
    locked: Gateway, path: str
) -> None:
    size = f"Content-Length: {MIB + 1}"
    data = head(JSON_TYPE, CONTINUE, size, f"x-api-key: {KEY}", line=f"POST {path} HTTP/1.1")
    refused(never_told_to_continue(locked, data), 413, path)


def test_a_waiting_page_of_a_foreign_origin_gets_403_and_no_100(gateway: Gateway) -> None:
    data = head(JSON_TYPE, CONTINUE, "Content-Length: 500", "Origin: https://evil.example")
    refused(never_told_to_continue(gateway, data), 403, MESSAGES)


def test_nobody_is_told_to_continue_who_has_nothing_to_send(gateway: Gateway) -> None:
    assert never_told_to_continue(gateway, head(CONTINUE, line=GET)).status == 200


def test_a_client_of_http_1_0_is_never_told_to_continue(gateway: Gateway) -> None:
    reply = only(gateway.raw(sized(HELLO, CONTINUE, line=f"POST {MESSAGES} HTTP/1.0")))
    assert "hello there" in said(reply)


# ---- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "/v1/models/",
        "//v1//models//",
        "/v1/v1/models",
        "/models",
        "/v1/models?limit=1000",
        "/v1/%6dode%6Cs",
        "http://127.0.0.1/v1/models",
        "HTTP://LOCALHOST:1234/v1/models",
        "http://[::1]:80//v1/models?x=http://evil.example/",
    ],
)
def test_ways_to_name_the_list_of_models(gateway: Gateway, target: str) -> None:
    reply = only(gateway.raw(head(CLOSE, line=f"GET {target} HTTP/1.1")))
    assert reply.status == 200, reply
    assert "echo" in [model["id"].rpartition("/")[2] for model in reply.json()["data"]]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/messages?beta=true",
        "/v1/v1/messages",
        "/messages",
        "/v1/messages/",
        "//v1///messages/?beta=true",
        "/v1/%6Dessages?beta=true",
        "/v1/chat/completions",
        "/v1/v1/chat/completions?x=1",
        "/chat/completions",
        "/chat/completions/",
        "http://localhost/v1/messages?beta=true",
    ],
)
def test_ways_to_name_the_conversations(gateway: Gateway, target: str) -> None:
    reply = checked(gateway.request("POST", target, asking("by any name")))
    assert "by any name" in said(reply)
    assert ("choices" in reply.json()) == ("chat" in target)


@pytest.mark.parametrize(
    "target", ["/%zz", "/%", "/%00", "/%ff%fe", "/..%2f..", "/v1/models/%00", "/a\\b", "/v1/%2f%2f"]
)
def test_odd_escapes_in_a_path_are_a_client_error(gateway: Gateway, target: str) -> None:
    reply = checked(gateway.request("GET", target))
    assert reply.status in (400, 404), reply


def test_the_host_of_an_absolute_target_replaces_the_field(gateway: Gateway) -> None:
    good, bad = (
        "GET http://127.0.0.1/v1/models HTTP/1.1",
        "GET http://evil.example/v1/models HTTP/1.1",
    )
    assert only(gateway.raw(head(CLOSE, line=good, host="evil.example"))).status == 200
    assert only(gateway.raw(head(CLOSE, line=bad, host="127.0.0.1"))).status in (403, 421)


# ---- content codings ---------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    """Deflate without the zlib wrapping, as some clients send it."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


COMPRESSED: dict[str, tuple[str, bytes]] = {
    "gzip": ("gzip", gzip.compress(HELLO)),
    "in any case": ("GZip", gzip.compress(HELLO)),
    "deflate": ("deflate", zlib.compress(HELLO)),
    "raw deflate": ("deflate", raw_deflate(HELLO)),
    "identity": ("identity", HELLO),
}


@pytest.mark.parametrize(("coding", "body"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_a_compressed_body_is_decoded(gateway: Gateway, coding: str, body: bytes) -> None:
    reply = checked(gateway.request("POST", CHAT, body, {"Content-Encoding": coding}))
    assert "hello there" in said(reply)


def test_a_compressed_body_may_come_in_chunks(gateway: Gateway) -> None:
    fields = [JSON_TYPE, CHUNKED, "Content-Encoding: gzip", CLOSE]
    data = head(*fields) + chunked(gzip.compress(HELLO)) + b"0\r\n\r\n"
    assert "hello there" in said(only(gateway.raw(data)))


@ONE_DIALECT
def test_a_bomb_is_refused_before_it_fills_the_memory(small: Gateway, path: str) -> None:
    bomb = gzip.compress(b" " * (64 * MIB))
    reply = small.request("POST", path, bomb, {"Content-Encoding": "gzip"})
    refused(reply, 413, path)
    reply = small.request(
        "POST", path, zlib.compress(bytes(2 * MIB)), {"Content-Encoding": "deflate"}
    )
    refused(reply, 413, path)


@DIALECTS
@pytest.mark.parametrize("coding", ["zstd", "br", "compress", "x-nonsense", "z\xe4st"])
def test_a_coding_that_cannot_be_read_is_415_with_a_way_out(
    gateway: Gateway, path: str, coding: str
) -> None:
    reply = gateway.request("POST", path, HELLO, {"Content-Encoding": coding})
    message = refused(reply, 415, path)
    assert "gzip" in message or "compress" in message, message
    if path == CHAT:
        assert reply.json()["error"]["code"] == OPENAI_CODES[415]


def test_a_zstd_body_names_the_setting_of_the_client_that_sends_them(gateway: Gateway) -> None:
    reply = gateway.request("POST", CHAT, b"\x28\xb5\x2f\xfd", {"Content-Encoding": "zstd"})
    assert "enable_request_compression" in refused(reply, 415, CHAT)


@pytest.mark.parametrize(
    "coding", ["gzip, gzip", "deflate, gzip", "gzip,br", "gzip gzip", "gzip;q=1"]
)
def test_stacked_codings_are_refused(gateway: Gateway, coding: str) -> None:
    body = gzip.compress(gzip.compress(HELLO))
    reply = checked(gateway.request("POST", MESSAGES, body, {"Content-Encoding": coding}))
    assert reply.status in (400, 415), reply


def test_codings_stacked_over_two_fields_are_refused(gateway: Gateway) -> None:
    fields = [("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")]
    reply = checked(gateway.request("POST", MESSAGES, gzip.compress(HELLO), fields))
    assert reply.status in (400, 415), reply


@DIALECTS
@pytest.mark.parametrize(
    "body",
    [HELLO, b"", gzip.compress(HELLO)[:-9], gzip.compress(HELLO)[:20], b"\x1f\x8b" + b"x" * 50],
    ids=["plain", "empty", "no checksum", "cut off", "nonsense"],
)
def test_a_body_that_is_not_the_gzip_it_claims_is_400(
    gateway: Gateway, path: str, body: bytes
) -> None:
    refused(gateway.request("POST", path, body, {"Content-Encoding": "gzip"}), 400, path)


# ---- JSON --------------------------------------------------------------------------------------

START = b'{"model":"echo","max_tokens":64,"messages":[{"role":"user","content":"hi"}]'

BAD_JSON: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "white space": (b" \r\n\t", 400),
    "a word": (b"hello", 400),
    "cut off": (START, 400),
    "garbage behind": (START + b"} x", 400),
    "two objects": (START + b"}{}", 400),
    "single quotes": (b"{'model':'echo'}", 400),
    "trailing comma": (START + b",}", 400),
    "comment": (START + b"/* */}", 400),
    "control in a string": (START.replace(b"hi", b"h\x01i") + b"}", 400),
    "list": (b"[]", 400),
    "string": (b'"echo"', 400),
    "number": (b"1", 400),
    "true": (b"true", 400),
    "null": (b"null", 400),
    "list of the request": (b"[" + START + b"}]", 400),
    "100,000 open brackets": (b"[" * 100_000, 400),
    "100,000 open braces": (b'{"a":' * 100_000, 400),
    "100,000 bracket pairs": (START + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "500 bracket pairs": (START + b',"x":' + b"[" * 500 + b"]" * 500 + b"}", 400),
    "500 objects": (START + b',"x":' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", 400),
    "int of 5,000 digits": (START.replace(b"64", b"6" * 5000) + b"}", 400),
    "unread int of 5,000 digits": (START + b',"x":' + b"6" * 5000 + b"}", 400),
    "NaN": (START + b',"temperature":NaN}', 400),
    "unread NaN": (START + b',"x":[NaN]}', 400),
    "Infinity": (START + b',"x":Infinity}', 400),
    "minus Infinity": (START + b',"x":-Infinity}', 400),
    "1e999": (START + b',"temperature":1e999}', 400),
    "unread -1e999": (START + b',"x":{"y":-1e999}}', 400),
    "leading zero": (START + b',"x":01}', 400),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + START + b"}", 400),
    "UTF-16": ((START + b"}").decode().encode("utf-16"), 400),
    "UTF-16 without a mark": ((START + b"}").decode().encode("utf-16-le"), 400),
    "UTF-32": ((START + b"}").decode().encode("utf-32"), 400),
    "latin-1": (START.replace(b"hi", b"h\xe9") + b"}", 400),
    "overlong UTF-8": (START.replace(b"hi", b"\xc0\xaf") + b"}", 400),
    "surrogate in UTF-8": (START.replace(b"hi", b"\xed\xa0\x80") + b"}", 400),
    "UTF-8 cut off": (START.replace(b"hi", b"\xe2\x82") + b"}", 400),
    "model twice": (START + b',"model":"echo"}', 400),
    "model twice, escaped": (START + b',"\\u006dodel":"other"}', 400),
    "messages twice": (START + b',"messages":[]}', 400),
    "max_tokens twice": (START + b',"max_tokens":5}', 400),
    "an unread key twice": (START + b',"x":1,"x":1}', 400),
    "half a million small values": (START + b',"x":[' + b"1," * 500_000 + b"1]}", 413),
    "half a million small keys": (
        START + b',"x":{' + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}}",
        413,
    ),
}


@DIALECTS
@pytest.mark.parametrize(("body", "status"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_no_json_gets_anything_but_an_error_of_the_vendor(
    gateway: Gateway, path: str, body: bytes, status: int
) -> None:
    reply = gateway.request("POST", path, body)
    refused(reply, status, path)


@DIALECTS
def test_a_lone_surrogate_becomes_the_replacement_character(gateway: Gateway, path: str) -> None:
    for half in (b"\\ud800", b"\\udfff", b"\\ud83d"):
        body = START.replace(b"hi", b"left " + half + b" right")
        whole = checked(gateway.request("POST", path, body + b"}"))
        assert "left \ufffd right" in said(whole)
        stream = checked(gateway.request("POST", path, body + b',"stream":true}'))
        assert "left \ufffd right" in streamed(stream.body)


@DIALECTS
def test_a_surrogate_pair_is_one_character(gateway: Gateway, path: str) -> None:
    body = START.replace(b"hi", b"\\ud83d\\ude00 \xf0\x9f\x98\x80") + b"}"
    assert "\U0001f600 \U0001f600" in said(checked(gateway.request("POST", path, body)))


BAD_FIELD_VALUES: dict[str, dict[str, Any]] = {
    "messages missing": {"model": "echo", "max_tokens": 5},
    "messages a string": {"messages": "hi"},
    "messages a number": {"messages": 5},
    "messages an object": {"messages": {"role": "user"}},
    "messages null": {"messages": None},
    "messages of numbers": {"messages": [1]},
    "messages of strings": {"messages": ["hi"]},
    "messages of null": {"messages": [None]},
    "model a number": {"model": 5},
    "model null": {"model": None},
    "model a list": {"model": ["echo"]},
    "stream a word": {"stream": "yes"},
}
#: Passed on unread where the upstream speaks the caller's dialect, read where it is converted.
BAD_INNER_VALUES: dict[str, dict[str, Any]] = {
    "message without role": {"messages": [{"content": "hi"}]},
    "role a number": {"messages": [{"role": 5, "content": "hi"}]},
    "content a number": {"messages": [{"role": "user", "content": 5}]},
    "content an object": {"messages": [{"role": "user", "content": {}}]},
    "content of numbers": {"messages": [{"role": "user", "content": [5]}]},
    "text a number": {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    "max_tokens a word": {"max_tokens": "many"},
    "tools a string": {"tools": "none"},
    "tools of numbers": {"tools": [5]},
}


@DIALECTS
@pytest.mark.parametrize("fields", BAD_FIELD_VALUES.values(), ids=BAD_FIELD_VALUES.keys())
def test_a_field_of_the_wrong_type_is_400(
    gateway: Gateway, path: str, fields: dict[str, Any]
) -> None:
    body = fields if "missing" in fields or len(fields) > 1 else {**asking("hi"), **fields}
    refused(gateway.request("POST", path, body), 400, path)


@DIALECTS
@pytest.mark.parametrize("fields", BAD_INNER_VALUES.values(), ids=BAD_INNER_VALUES.keys())
def test_a_wrong_type_further_in_is_400_where_it_is_read(
    gateway: Gateway, path: str, fields: dict[str, Any]
) -> None:
    reply = checked(gateway.request("POST", path, {**asking("hi"), **fields}))
    if reply.status != 200 or path == MESSAGES:
        refused(reply, 400, path)


@DIALECTS
@pytest.mark.parametrize("model", ["", " ", "a" * 300, "no such", "\n", "echo/../x"])
def test_a_model_that_is_no_name_is_a_client_error(gateway: Gateway, path: str, model: str) -> None:
    reply = gateway.request("POST", path, {**asking("hi"), "model": model})
    assert reply.status in (400, 404), reply
    refused(reply, reply.status, path)


@DIALECTS
def test_an_error_does_not_repeat_the_body(gateway: Gateway, path: str) -> None:
    for body in (b'{"x": "PRIVATE" NaN', START.replace(b"hi", b"PRIVATE") + b',"x":NaN}'):
        assert b"PRIVATE" not in gateway.request("POST", path, body).body


@DIALECTS
def test_an_error_does_not_grow_with_what_was_sent(gateway: Gateway, path: str) -> None:
    long = "x" * 30_000
    checked(gateway.request("GET", path + "%01" * 5000))
    checked(gateway.request("GET", f"/v1/models/{long[:15_000]}"))
    checked(gateway.request("GET", f"/v1/usage?{'%01' * 5000}"))
    for name in ("Content-Encoding", "Content-Type", "X-Provider", "X-Output-Format"):
        checked(gateway.request("POST", path, asking("hi"), {name: long}))
    strange: list[dict[str, Any]] = [
        {"model": long},
        {"messages": [{"role": long, "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": long}]}]},
        {"tools": [{"type": long}]},
        {"tool_choice": long},
    ]
    for fields in strange:
        checked(gateway.request("POST", path, {**asking("hi"), **fields}))


@DIALECTS
@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/html",
        "text/plain",
        "text/plain; charset=application/json",
        "text/plain, application/json",
        "application/json, text/plain",
        "application/jsonx",
        "text/json+json",
        "",
        "a/\xe9",
    ],
)
def test_a_body_of_another_kind_is_415(gateway: Gateway, path: str, kind: str) -> None:
    reply = gateway.request("POST", path, HELLO, {"Content-Type": kind})
    refused(reply, 415, path)


@DIALECTS
@pytest.mark.parametrize("framing", [f"Content-Length: {len(HELLO)}", CHUNKED])
def test_a_body_of_no_kind_is_415(gateway: Gateway, path: str, framing: str) -> None:
    data = head(framing, CLOSE, line=f"POST {path} HTTP/1.1")
    refused(only(gateway.raw(data + (b"" if framing == CHUNKED else HELLO))), 415, path)


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"],
)
def test_json_is_recognised_however_it_is_written(gateway: Gateway, kind: str) -> None:
    reply = checked(gateway.request("POST", CHAT, HELLO, {"Content-Type": kind}))
    assert "hello there" in said(reply)


# ---- unknown paths and methods -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing/here"),
        ("POST", "/v1/nothing"),
        ("DELETE", "/nothing"),
        ("BREW", "/pot"),
        ("GET", "/v1"),
        ("GET", "/v1/modelsx"),
        ("GET", "/healthz/more"),
        ("POST", "/v1/messages/batches"),
        ("GET", "/v1/messages/batches/msgbatch_1/results"),
    ],
)
def test_an_unknown_path_is_404_in_the_shape_of_its_neighbours(
    gateway: Gateway, method: str, path: str
) -> None:
    reply = gateway.request(method, path)
    refused(reply, 404, path)
    if not path.startswith(MESSAGES):
        assert reply.json()["error"]["code"] == OPENAI_CODES[404]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", MESSAGES, {"POST"}),
        ("PUT", MESSAGES, {"POST"}),
        ("DELETE", "/v1/messages/count_tokens", {"POST"}),
        ("GET", CHAT, {"POST"}),
        ("PATCH", "/chat/completions/", {"POST"}),
        ("BREW", "/healthz", {"GET"}),
        ("POST", "/v1/models", {"GET"}),
        ("POST", "/v1/models/echo", {"GET"}),
        ("POST", "/v1/usage", {"GET", "DELETE"}),
        ("POST", "/metrics", {"GET", "HEAD"}),
        ("TRACE", "/healthz", {"GET"}),
        ("post", CHAT, {"POST"}),
    ],
)
def test_a_wrong_method_is_405_and_names_the_right_ones(
    gateway: Gateway, method: str, path: str, allowed: set[str]
) -> None:
    reply = gateway.request(method, path)
    refused(reply, 405, path)
    assert allowed <= set(re.split(r", *", reply.headers["allow"]))
    if not path.startswith(MESSAGES):
        assert reply.json()["error"]["code"] == OPENAI_CODES[405]


@pytest.mark.parametrize("target", ["*", "/healthz", MESSAGES, "/nothing"])
def test_options_without_an_origin_is_harmless(gateway: Gateway, target: str) -> None:
    received = gateway.raw(head(line=f"OPTIONS {target} HTTP/1.1") + LAST_HEALTH)
    replies = [checked(reply) for reply in parse_responses(received)]
    assert replies[-1].json() == {"status": "ok"}
    assert not [name for name in replies[0].headers if name.startswith("access-control-")]


# ---- the shield --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9090",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil-localhost",
        "localhostx",
        "foo.localhost",
        "xn--localhost",
        "192.168.1.10",
        "10.0.0.1:9090",
        "[::2]",
        "[fe80::1]:9090",
        "2130706433",
        "gateway.internal",
    ],
)
@pytest.mark.parametrize("line", ["GET /v1/models HTTP/1.1", "GET / HTTP/1.1"])
def test_a_foreign_host_is_refused(gateway: Gateway, host: str, line: str) -> None:
    reply = only(gateway.raw(head(CLOSE, line=line, host=host)))
    assert reply.status in (403, 421), reply


def test_a_foreign_host_learns_nothing_from_healthz(gateway: Gateway) -> None:
    reply = only(gateway.raw(head(CLOSE, line=GET, host="evil.example")))
    assert reply.status in (403, 421) or reply.json() == {"status": "ok"}
    assert b"0.1.0" not in reply.body
    assert "aiclient" not in reply.headers.get("server", "")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost",
        "LocalHost:65535",
        "LOCALHOST",
        "[::1]",
        "[::1]:8080",
    ],
)
def test_a_loopback_host_is_served_with_any_port_in_any_case(gateway: Gateway, host: str) -> None:
    line = "GET /v1/models HTTP/1.1"
    assert only(gateway.raw(head(CLOSE, line=line, host=host))).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("gateway.internal", 200),
        ("Gateway.Internal:9090", 200),
        ("x.gateway.internal", 0),
        ("gateway.internal.evil.example", 0),
        ("gateway", 0),
    ],
)
def test_a_configured_host_is_compared_whole(shared: Gateway, host: str, status: int) -> None:
    data = head(CLOSE, f"x-api-key: {KEY}", line="GET /v1/models HTTP/1.1", host=host)
    assert only(shared.raw(data)).status in ({200} if status else {403, 421})


FOREIGN_ORIGINS = [
    "https://evil.example",
    "http://evil.example:9090",
    "null",
    "NULL",
    "file://",
    "http://127.0.0.1.evil.example",
    "http://localhost.evil.example",
    "http://evil.example/127.0.0.1",
    "http://localhost@evil.example",
    "http://evil.example#localhost",
    "http://127.0.0.1 http://evil.example",
    "http://127.0.0.1, http://evil.example",
    "chrome-extension://localhost.x",
    "https://app.example.evil.example",
    "localhost",
    "http://",
    "*",
    "http://lo\xe9calhost",
]


@DIALECTS
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_page_of_a_foreign_origin_is_refused(gateway: Gateway, path: str, origin: str) -> None:
    reply = gateway.request("POST", path, asking("hi"), {"Origin": origin})
    refused(reply, 403, path)
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    assert gateway.request("GET", "/v1/models", headers={"Origin": origin}).status == 403


def test_two_origins_are_foreign(gateway: Gateway) -> None:
    fields = [("Origin", "http://localhost"), ("Origin", "http://localhost")]
    reply = checked(gateway.request("POST", MESSAGES, asking("hi"), fields))
    assert reply.status in (400, 403), reply


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://127.0.0.1:3000", "https://localhost:8443", "http://[::1]:5173"],
)
def test_a_page_of_this_machine_is_served_without_a_grant(gateway: Gateway, origin: str) -> None:
    reply = checked(gateway.request("POST", CHAT, asking("hi"), {"Origin": origin}))
    assert "hi" in said(reply)
    assert not [name for name in reply.headers if name.startswith("access-control-")]


@DIALECTS
def test_a_cross_site_request_is_refused_even_without_an_origin(
    gateway: Gateway, path: str
) -> None:
    site = {"Sec-Fetch-Site": "cross-site"}
    refused(gateway.request("POST", path, asking("hi"), site), 403, path)
    assert checked(gateway.request("GET", "/v1/models", headers=site)).status == 403


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_a_request_from_the_same_site_is_served(gateway: Gateway, site: str) -> None:
    reply = checked(gateway.request("GET", "/v1/models", headers={"Sec-Fetch-Site": site}))
    assert reply.status == 200


def test_a_simple_request_of_a_page_is_refused(gateway: Gateway) -> None:
    for origin in ("http://localhost:3000", "https://evil.example"):
        fields = {"Content-Type": "text/plain", "Origin": origin}
        reply = checked(gateway.request("POST", CHAT, asking("hi"), fields))
        assert reply.status in (403, 415), reply


def preflight(gateway: Gateway, origin: str, path: str = CHAT) -> Reply:
    """The answer to what a browser asks before it sends a POST from another origin."""
    fields = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    return checked(gateway.request("OPTIONS", path, headers=fields))


def test_the_preflight_of_an_unknown_origin_gets_no_grant(
    gateway: Gateway, shared: Gateway
) -> None:
    for server in (gateway, shared):
        for origin in ("https://evil.example", "null", "https://app.example.evil.example"):
            reply = preflight(server, origin)
            assert reply.status == 403, reply
            assert not [name for name in reply.headers if name.startswith("access-control-")]


def words(value: str) -> set[str]:
    """The items of a comma list, in lower case."""
    return {word.strip().lower() for word in value.split(",")}


def test_the_preflight_of_a_listed_origin_is_granted_what_it_asks(shared: Gateway) -> None:
    for path in (CHAT, MESSAGES, "/v1/models"):
        reply = preflight(shared, "https://app.example", path)
        assert reply.status == 204, reply
        headers = reply.headers
        assert headers["access-control-allow-origin"] == "https://app.example"
        asked = {"authorization", "content-type", "x-stainless-os"}
        assert words(headers["access-control-allow-headers"]) >= asked
        assert words(headers["access-control-allow-methods"]) >= {"get", "post", "delete"}
        assert "origin" in words(headers["vary"])
        assert "access-control-allow-credentials" not in headers
        assert "access-control-allow-private-network" not in headers


def granted(headers: Headers) -> bool:
    """Whether a page of the listed origin may read this answer and its ids."""
    exposed = words(headers.get("access-control-expose-headers", ""))
    return (
        headers.get("access-control-allow-origin") == "https://app.example"
        and "origin" in words(headers.get("vary", ""))
        and {"request-id", "x-request-id"} <= exposed
    )


def test_a_listed_origin_may_read_answers_errors_and_streams(shared: Gateway) -> None:
    fields = {"Origin": "https://app.example", "Authorization": f"Bearer {KEY}"}
    site = {"Sec-Fetch-Site": "cross-site"}
    whole = checked(shared.request("POST", CHAT, asking("hi"), {**fields, **site}))
    assert whole.status == 200
    assert granted(whole.headers)
    stream = checked(shared.request("POST", CHAT, asking("hi", stream=True), fields))
    assert granted(stream.headers)
    assert granted(checked(shared.request("POST", CHAT, b"x", fields)).headers)
    no_key = checked(shared.request("POST", CHAT, asking("hi"), {"Origin": "https://app.example"}))
    assert no_key.status == 401
    assert granted(no_key.headers)


# ---- obs-text where it is read -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Accept",
        "Accept-Encoding",
        "anthropic-beta",
        "Connection",
        "Content-Type",
        "Expect",
        "Origin",
        "Sec-Fetch-Site",
        "User-Agent",
        "X-Output-Format",
        "X-Provider",
        "x-request-id",
        "x-stainless-timeout",
    ],
)
@pytest.mark.parametrize("value", ["caf\xe9", "\xff\xfe\x80", "\x85\xa0", ""])
def test_odd_bytes_in_a_field_never_fail_the_server(
    gateway: Gateway, name: str, value: str
) -> None:
    received = gateway.raw(sized(HELLO, f"{name}: {value}") + LAST_HEALTH)
    replies = final(parse_responses(received))
    assert replies, received
    assert replies[0].status < 500, replies[0]


# ---- the key -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        ("Authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer {KEY}"),
        ("AUTHORIZATION", f"BEARER {KEY}"),
        ("x-api-key", KEY),
        ("X-Api-Key", KEY),
    ],
)
@DIALECTS
def test_the_right_key_opens_in_either_field(
    locked: Gateway, path: str, field: tuple[str, str]
) -> None:
    assert "hi" in said(checked(locked.request("POST", path, asking("hi"), [field])))
    assert checked(locked.request("GET", "/v1/models", headers=[field])).status == 200


RIGHT_KEY = ("x-api-key", KEY)
#: Claude Desktop sends a token of its own beside the gateway's key.
KEYS_BESIDE_OTHERS: dict[str, list[tuple[str, str]]] = {
    "another bearer": [("Authorization", "Bearer sk-ant-oat01-other"), RIGHT_KEY],
    "basic": [RIGHT_KEY, ("Authorization", "Basic dTpw")],
    "an empty bearer": [("Authorization", "Bearer "), RIGHT_KEY],
    "another x-api-key": [("x-api-key", "other"), ("Authorization", f"Bearer {KEY}")],
    "api-key": [("Authorization", "Bearer other"), ("x-api-key", "other"), ("api-key", KEY)],
}


@DIALECTS
@pytest.mark.parametrize("fields", KEYS_BESIDE_OTHERS.values(), ids=KEYS_BESIDE_OTHERS.keys())
def test_the_right_key_opens_beside_another_credential(
    locked: Gateway, path: str, fields: list[tuple[str, str]]
) -> None:
    assert "hi" in said(checked(locked.request("POST", path, asking("hi"), fields)))


WRONG_KEYS: dict[str, list[tuple[str, str]]] = {
    "two wrong ones": [("x-api-key", "other"), ("Authorization", "Bearer another")],
    "none": [],
    "another": [("Authorization", "Bearer another")],
    "prefix": [("Authorization", f"Bearer {KEY[:-1]}")],
    "longer": [("x-api-key", KEY + "x")],
    "other case": [("x-api-key", KEY.lower())],
    "empty": [("x-api-key", "")],
    "empty bearer": [("Authorization", "Bearer ")],
    "no scheme": [("Authorization", KEY)],
    "basic": [("Authorization", f"Basic {KEY}")],
    "bearer in bearer": [("Authorization", f"Bearer Bearer {KEY}")],
    "obs-text": [("Authorization", "Bearer caf\xe9")],
    "obs-text in x-api-key": [("x-api-key", KEY + "\xff")],
    "non-breaking space": [("x-api-key", KEY + "\xa0")],
    "non-breaking space in bearer": [("Authorization", f"Bearer {KEY}\xa0")],
    "next line in bearer": [("Authorization", f"Bearer \x85{KEY}")],
    "cookie": [("Cookie", f"x-api-key={KEY}")],
}


@DIALECTS
@pytest.mark.parametrize("fields", WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
def test_a_wrong_key_is_401(locked: Gateway, path: str, fields: list[tuple[str, str]]) -> None:
    reply = locked.request("POST", path, asking("hi"), fields)
    refused(reply, 401, path)
    if path == CHAT:
        assert reply.json()["error"]["code"] == OPENAI_CODES[401]


@pytest.mark.parametrize("target", ["/v1/models", "/v1/usage", "/metrics", "/v1/models/echo"])
def test_everything_but_healthz_asks_for_the_key(locked: Gateway, target: str) -> None:
    refused(locked.request("GET", target), 401, target)
    refused(locked.request("GET", f"{target}?api_key={KEY}&key={KEY}"), 401, target)


def test_healthz_asks_for_no_key(locked: Gateway) -> None:
    assert checked(locked.request("GET", "/healthz")).json() == {"status": "ok"}
    assert checked(locked.request("HEAD", "/healthz")).status == 200
    assert checked(locked.request("HEAD", "/")).status in (200, 401)


def test_two_authorization_fields_are_refused(locked: Gateway) -> None:
    right, wrong = ("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")
    for fields in ([right, wrong], [wrong, right], [right, right]):
        reply = checked(locked.request("POST", CHAT, asking("hi"), fields))
        assert reply.status in (400, 401), (fields, reply)


@DIALECTS
def test_a_wrong_key_is_refused_before_the_body_is_read(locked: Gateway, path: str) -> None:
    data = head(JSON_TYPE, "Content-Length: 100000", "x-api-key: no", line=f"POST {path} HTTP/1.1")
    with locked.wire() as wire:
        wire.send(data + b"{")
        refused(wire.reply(seconds=5), 401, path)


def test_the_answer_to_a_wrong_key_survives_a_large_body(locked: Gateway) -> None:
    body = b" " * (900 * KIB)
    for _ in range(5):
        received = locked.raw(sized(body, "x-api-key: no", CLOSE))
        assert only(received).status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_listening_beyond_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(GatewayFailed) as failure, Gateway(args=["--host", host]):
        pass
    assert failure.value.status not in (None, 0)
    assert "key" in failure.value.stderr
    assert "Traceback" not in failure.value.stderr


def test_the_log_holds_no_key_and_nothing_of_a_request(locked: Gateway) -> None:
    secret = "PRIVATE-9c41"
    right = ("Authorization", f"Bearer {KEY}")
    for path in (MESSAGES, CHAT):
        locked.request("POST", path, asking(f"say {secret}"), [right])
        locked.request("POST", path, asking(f"say {secret}", stream=True), [right])
        locked.request("POST", f"{path}?token={secret}", asking("hi"), [right])
        locked.request("POST", path, f'{{"x":"{secret}"'.encode(), [right])
        locked.request("POST", path, {**asking("hi"), "max_tokens": secret}, [right])
        locked.request("POST", path, asking("hi"), [("x-api-key", secret)])
        locked.request("POST", path, asking("hi"), [right, ("Cookie", secret)])
        locked.request("POST", path, asking("hi"), [right, ("Origin", f"https://{secret}.example")])
    locked.raw(b"GET /%s HTTP/9.9\r\nAuthorization: Bearer %s\r\n\r\n" % (b"x", secret.encode()))
    locked.raw(head(f"X-Note : {secret}"))
    locked.raw(head(CHUNKED, f"x-api-key: {KEY}") + f"{secret}\r\n".encode())
    locked.request("GET", "/healthz")
    assert secret not in locked.log()
    assert KEY not in locked.log()


@pytest.mark.parametrize(
    "escapes", ["%0d%0a", "%1b]0;x%07", "%c2%85", "%e2%80%a8", "%0b%7f", "%c2%9b31m", "%e2%80%ae"]
)
def test_control_characters_of_a_path_do_not_reach_the_log(gateway: Gateway, escapes: str) -> None:
    name = f"forged-{escapes.replace('%', '')[:6]}"
    checked(gateway.request("GET", f"/a{escapes}{name}"))
    wait_until(lambda: name in gateway.log(), 5)
    line = next(line for line in gateway.log().split("\n") if name in line)
    assert "status=404" in line
    assert line.isprintable(), ascii(line)


# ---- the rate limit ----------------------------------------------------------------------------


def test_the_rate_limit_answers_429_in_both_shapes_and_spares_the_probes() -> None:
    with Gateway(config="[server]\nrate_limit_seconds = 30\n") as limited:
        assert "hi" in said(checked(limited.request("POST", CHAT, asking("hi"))))
        for path in (MESSAGES, CHAT):
            reply = limited.request("POST", path, asking("hi"))
            refused(reply, 429, path)
            assert 0 < float(reply.headers["retry-after"]) <= 30
        assert reply.json()["error"]["code"] == OPENAI_CODES[429]
        for method, target in (("GET", "/healthz"), ("HEAD", "/healthz"), ("HEAD", "/")):
            for _ in range(3):
                assert checked(limited.request(method, target)).status == 200
        assert is_clean(limited)


def test_the_rate_limit_counts_each_address_alone() -> None:
    with Gateway(config="[server]\nrate_limit_seconds = 30\n") as limited:
        try:
            limited.connect(source="127.0.0.2").close()
        except OSError:
            pytest.skip("this system has one loopback address only")
        for source in ("127.0.0.1", "127.0.0.2"):
            first = limited.request("POST", CHAT, asking("hi"), source=source)
            assert checked(first).status == 200
            again = limited.request("POST", CHAT, asking("hi"), source=source)
            assert checked(again).status == 429


# ---- deadlines ---------------------------------------------------------------------------------


def drip(wire: Wire, data: bytes, gap_seconds: float = 0.2) -> Received:
    """Send a byte each `gap_seconds` until the peer answers or closes; what it said last."""
    for at in range(len(data)):
        wire.send(data[at : at + 1])
        wire.sock.settimeout(gap_seconds)
        try:
            wire.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        break
    return exchange(wire.sock, b"", 5, half_close=False)


def test_a_byte_now_and_then_does_not_renew_the_deadline_of_a_head(small: Gateway) -> None:
    began = time.monotonic()
    with small.wire() as wire:
        received = drip(wire, HEALTH)
    assert 0.9 < time.monotonic() - began < LATEST_SECONDS
    assert only(received).status == 408


def test_empty_lines_now_and_then_do_not_renew_the_deadline_of_a_head(small: Gateway) -> None:
    began = time.monotonic()
    with small.wire() as wire:
        received = drip(wire, b"\r\n" * 8)
    assert time.monotonic() - began < LATEST_SECONDS
    assert received.ended == "closed"
    assert [reply.status for reply in parse_responses(received)] in ([], [408])


def test_an_error_just_before_a_deadline_is_the_only_answer_and_stops_no_clock() -> None:
    cases = [
        (b"GET /x", b"\0\0", 400),
        (head(JSON_TYPE, CHUNKED), b"zz\r\n", 400),
        (head(JSON_TYPE, CHUNKED), chunked(b" " * (MIB + 1)), 413),
    ]
    with Gateway(config=SMALL_LIMITS) as quick, ExitStack() as stack:
        wires = [stack.enter_context(quick.wire()) for _ in cases]
        for wire, (start, _, _) in zip(wires, cases):
            wire.send(start)
        time.sleep(0.6)  # into the second half of the deadline
        for wire, (_, error, status) in zip(wires, cases):
            assert only(exchange(wire.sock, error, 2, half_close=False)).status == status
        time.sleep(0.8)  # past the deadline, while the server still listens for a close
        silent = stack.enter_context(quick.wire())
        assert exchange(silent.sock, b"", 3, half_close=False).ended == "closed"
        assert is_clean(quick)


@ONE_DIALECT
def test_a_byte_now_and_then_does_not_renew_the_deadline_of_a_body(
    small: Gateway, path: str
) -> None:
    with small.wire() as wire:
        wire.send(head(JSON_TYPE, "Content-Length: 1000", line=f"POST {path} HTTP/1.1"))
        began = time.monotonic()
        received = drip(wire, b" " * 30)
    assert 0.9 < time.monotonic() - began < LATEST_SECONDS
    refused(only(received), 408, path)


def test_chunks_now_and_then_do_not_renew_the_deadline_of_a_body(small: Gateway) -> None:
    with small.wire() as wire:
        wire.send(head(JSON_TYPE, CHUNKED))
        began = time.monotonic()
        received = drip(wire, b"1\r\n \r\n" * 20, gap_seconds=0.05)
    assert 0.9 < time.monotonic() - began < LATEST_SECONDS
    refused(only(received), 408, MESSAGES)


def test_a_kept_connection_that_is_not_used_is_closed_without_a_word(small: Gateway) -> None:
    with small.wire() as wire:
        wire.send(HEALTH)
        assert checked(wire.reply()).status == 200
        began = time.monotonic()
        assert wire.rest(seconds=5) == b""
        assert 0.7 < time.monotonic() - began < LATEST_SECONDS


def test_a_connection_that_never_says_anything_is_closed(small: Gateway) -> None:
    with small.wire() as wire:
        began = time.monotonic()
        received = exchange(wire.sock, b"", 5, half_close=False)
    assert time.monotonic() - began < LATEST_SECONDS
    assert received.ended == "closed"
    assert [reply.status for reply in parse_responses(received)] in ([], [408])


def test_the_deadline_of_a_head_starts_anew_with_each_request(small: Gateway) -> None:
    until = time.monotonic() + 1.6
    with small.wire() as wire:
        while time.monotonic() < until:
            received = b""
            for at in range(0, len(HEALTH), 8):
                wire.send(HEALTH[at : at + 8])
                wire.sock.settimeout(0.05)
                with pytest.raises(TimeoutError) if at + 8 < len(HEALTH) else ExitStack():
                    received = wire.sock.recv(1, socket.MSG_PEEK)
            assert received == b"H"
            assert checked(wire.reply()).status == 200


def test_deadlines_of_requests_do_not_cut_an_answer_that_is_read_slowly() -> None:
    config = "[server]\nhead_seconds = 1\nbody_seconds = 1\nidle_seconds = 1\n"
    text = "slow but sure " * 500_000
    with Gateway(config=config) as quick, quick.wire(receive_buffer=4096) as wire:
        wire.send(quick.request_bytes("POST", CHAT, asking(text, stream=True)))
        until = time.monotonic() + 1.8
        held = b""
        while time.monotonic() < until:
            held += wire.read(512)
            time.sleep(0.02)  # a slow reader, as the test is about
        replies = parse_responses(held + wire.rest())
    assert len(replies) == 1
    assert text in streamed(checked(replies[0]).body)


# ---- many connections --------------------------------------------------------------------------


def test_a_connection_over_the_limit_is_told_so_and_closed() -> None:
    config = "[server]\nmax_connections = 8\n"
    with Gateway(config=config) as limited, ExitStack() as stack:
        held = [stack.enter_context(limited.wire()) for _ in range(8)]
        for wire in held:
            wire.send(HEALTH)
            assert checked(wire.reply()).status == 200
        for _ in range(5):
            assert only(limited.raw(HEALTH)).status == 503
        held[0].send(HEALTH)
        assert checked(held[0].reply()).status == 200
        held[0].sock.close()
        wait_until(lambda: limited.request("GET", "/healthz").status == 200, 5)
        stack.close()
        assert is_clean(limited)


def test_connections_that_come_in_bursts_are_all_served(gateway: Gateway) -> None:
    until = time.monotonic() + 2  # long enough for a coarse clock to tick in between
    while time.monotonic() < until:
        with ExitStack() as stack:
            wires = [stack.enter_context(gateway.wire()) for _ in range(100)]
            for wire in wires:
                wire.send(LAST_HEALTH)
            for wire in wires:
                assert checked(wire.reply()).status == 200


def test_200_idle_connections_do_not_hold_a_request_up(gateway: Gateway) -> None:
    beginnings = (b"", b"GET /hea", HEALTH, sized(HELLO)[:-3])
    with ExitStack() as stack:
        for number in range(200):
            stack.enter_context(gateway.wire()).send(beginnings[number % 4])
        began = time.monotonic()
        assert "hi" in said(checked(gateway.request("POST", CHAT, asking("hi"))))
        assert time.monotonic() - began < 1


# ---- large requests ----------------------------------------------------------------------------

LARGE = 32 * MIB
ANNOUNCED = {
    "length": head(JSON_TYPE, f"Content-Length: {LARGE}"),
    "chunk": head(JSON_TYPE, CHUNKED) + b"%x\r\n" % LARGE,
}


@pytest.mark.parametrize("name", ANNOUNCED)
@ONE_DIALECT
def test_large_bodies_share_a_budget_and_the_next_one_is_told_to_come_again(
    path: str, name: str
) -> None:
    data = ANNOUNCED[name].replace(MESSAGES.encode(), path.encode(), 1)
    with Gateway() as gateway, ExitStack() as stack:
        wires = [stack.enter_context(gateway.wire()) for _ in range(8)]
        for wire in wires:
            wire.send(data + b" " * (LARGE - MIB))
        assert "hi" in said(checked(gateway.request("POST", path, asking("hi"))))
        reply = only(gateway.raw(data + b" " * (LARGE - MIB), read_seconds=10))
        refused(reply, 503, path)
        assert reply.headers["retry-after"] == "1"
        for wire in wires:
            wire.abort()
        assert checked(gateway.request("GET", "/healthz")).status == 200
        late = gateway.raw(data + b" " * (LARGE - MIB), read_seconds=0.5)
        assert (late.ended, late) == ("deadline", b"")


@pytest.mark.parametrize("name", ANNOUNCED)
def test_a_body_that_is_only_announced_takes_nothing_from_others(
    gateway: Gateway, name: str
) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(gateway.wire()).send(ANNOUNCED[name] + b"{")
        assert "hi" in said(checked(gateway.request("POST", MESSAGES, asking("hi"))))


def test_a_large_body_that_was_refused_or_answered_leaves_the_budget(gateway: Gateway) -> None:
    blanks, field = gzip.compress(b" " * (LARGE - MIB)), {"Content-Encoding": "gzip"}
    for body in (blanks, blanks[:-9], gzip.compress(packed("hi") + b" " * (LARGE - MIB))) * 3:
        reply = checked(gateway.request("POST", CHAT, body, field))
        assert reply.status in (200, 400), reply


# ---- slow and vanishing readers ----------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    """The memory that a process holds now."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read())
    assert found is not None
    return int(found[1]) * KIB


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rests(pid: int) -> bool:
    """Whether a process uses next to no processor time for a fifth of a second."""
    before = cpu_seconds(pid)
    time.sleep(0.2)
    return cpu_seconds(pid) - before < 0.03


#: Longer than what the kernel holds for a client that does not read (some MiB).
LONG_TEXT = "All work and no play makes a stream. " * 200_000
#: Longer by far than the growth that is allowed.
HUGE_TEXT = "x" * (31 * MIB)


@pytest.mark.skipif(not IN_PROC, reason="memory is read from /proc")
@ONE_DIALECT
def test_a_reader_that_does_not_read_costs_no_memory(gateway: Gateway, path: str) -> None:
    with gateway.wire(receive_buffer=4096) as wire:
        wire.send(gateway.request_bytes("POST", path, asking(HUGE_TEXT, stream=True)))
        assert wire.read_until(b"x" * 1000).startswith(b"HTTP/1.1 200")
        before = resident_bytes(gateway.pid)
        wait_until(lambda: rests(gateway.pid), 10)
        assert resident_bytes(gateway.pid) - before < 20 * MIB
        assert checked(gateway.request("GET", "/healthz")).status == 200


@ONE_DIALECT
def test_readers_that_hang_up_leave_a_healthy_server(gateway: Gateway, path: str) -> None:
    for number in range(4):
        with gateway.wire(receive_buffer=4096) as wire:
            wire.send(gateway.request_bytes("POST", path, asking(LONG_TEXT, stream=True)))
            if number:
                assert wire.read_until(b"data:")
            if number % 2:
                wire.abort()
    assert "hi" in said(checked(gateway.request("POST", path, asking("hi"))))
    if IN_PROC:
        wait_until(lambda: rests(gateway.pid), 3)


def test_clients_that_reset_at_any_moment_leave_a_healthy_server(gateway: Gateway) -> None:
    data = sized(HELLO) + HEALTH
    for at in range(0, len(data), 16):
        with gateway.wire() as wire:
            wire.send(data[:at])
            wire.abort()
    assert checked(gateway.request("GET", "/healthz")).status == 200


# ---- the end -----------------------------------------------------------------------------------


def is_refused(gateway: Gateway) -> bool:
    """Whether nobody listens at the gateway's port any more."""
    try:
        gateway.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it stood in the queue of a listener that has just closed
        return False
    return False


@ONE_DIALECT
def test_at_sigterm_streams_are_finished_and_nobody_new_is_let_in(path: str) -> None:
    with Gateway() as ending, ending.wire() as idle, ending.wire(receive_buffer=4096) as wire:
        idle.send(HEALTH)
        assert checked(idle.reply()).status == 200
        wire.send(ending.request_bytes("POST", path, asking(LONG_TEXT, stream=True)))
        start = wire.read_until(b"\r\n\r\n")
        ending.terminate()
        wait_until(lambda: is_refused(ending), 5)
        assert idle.rest(seconds=5) == b""
        replies = parse_responses(start + wire.rest())
        assert len(replies) == 1
        assert LONG_TEXT in streamed(checked(replies[0]).body)
        assert ending.wait(5) == 0
        assert "Traceback" not in ending.log()


def test_at_sigterm_idle_connections_do_not_count_as_work() -> None:
    with Gateway() as ending, ending.wire() as idle, ending.wire() as silent:
        idle.send(HEALTH)
        assert checked(idle.reply()).status == 200
        silent.send(b"GET /hea")
        ending.terminate()
        assert ending.wait(5) == 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_does_not_read_cannot_keep_a_gateway_from_stopping(stream: bool) -> None:
    config = "[server]\ndrain_seconds = 1\n"
    with Gateway(config=config) as ending, ending.wire(receive_buffer=4096) as wire:
        wire.send(ending.request_bytes("POST", CHAT, asking(LONG_TEXT, stream=stream)))
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        ending.terminate()
        assert ending.wait(10) == 0
        with suppress(ConnectionError):
            assert b"HTTP/1.1" not in wire.rest()  # there is one head, and no second one
        assert "Traceback" not in ending.log()


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", CHAT])
def test_a_response_has_a_date(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST" if path == CHAT else "GET", path, asking("hi", stream=True))
    date = parsedate_to_datetime(reply.headers["date"])
    assert reply.headers["date"] == format_datetime(date, usegmt=True)
    assert abs(time.time() - date.timestamp()) < 60
    assert "date" in only(gateway.raw(b"nonsense\r\n\r\n")).headers


def test_the_second_sigterm_ends_at_once() -> None:
    with Gateway() as ending, ending.wire(receive_buffer=4096) as wire:
        wire.send(ending.request_bytes("POST", CHAT, asking(LONG_TEXT, stream=True)))
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        ending.terminate()
        wait_until(lambda: is_refused(ending), 5)
        ending.terminate()
        ending.wait(5)


# ---- what Anthropic and OpenAI would say ---------------------------------------------------------


@pytest.mark.parametrize("limit", [{}, {"max_tokens": None}])
@pytest.mark.parametrize("stream", [False, True])
def test_messages_without_max_tokens_are_refused_as_anthropic_does(
    gateway: Gateway, limit: dict[str, Any], stream: bool
) -> None:
    body = {**asking("hi", stream=stream), **limit}
    if not limit:
        del body["max_tokens"]
    reply = gateway.request("POST", MESSAGES, body)
    assert refused(reply, 400, MESSAGES) == "max_tokens: Field required."
    assert checked(gateway.request("POST", CHAT, body)).status == 200


@pytest.mark.parametrize("path", ["/v1/responses/compact", "/responses/compact"])
def test_compaction_is_refused_by_its_name(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST", path, {"model": "echo", "input": "hi"})
    assert reply.status == 400
    assert "Compaction" in reply.json()["error"]["message"]


BOM = b"\xef\xbb\xbf"


@DIALECTS
def test_a_byte_order_mark_before_a_body_is_skipped(gateway: Gateway, path: str) -> None:
    line = f"POST {path} HTTP/1.1"
    assert "hi" in said(only(gateway.raw(sized(BOM + packed("hi"), CLOSE, line=line))))
