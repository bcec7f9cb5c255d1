"""The HTTP client against upstreams and proxies that are written here, byte by byte.

`certs/server.pem` is a key with its certificate for localhost and copilot.test, signed by
`certs/ca.pem`; both were made with openssl for these tests and are good for nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import gzip
import json
import os
import re
import socket
import ssl
import struct
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import aiclient_api as gw

Result = TypeVar("Result")
CERTS = Path(__file__).parent / "certs"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PATIENCE_SECONDS = 10


def run(story: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine returns, which must not take long."""

    async def limited() -> Result:
        return await asyncio.wait_for(story, PATIENCE_SECONDS)

    try:
        return asyncio.run(limited())
    finally:
        gc.collect()  # what was left open is reported where it was left


class Peer:
    """One connection of a client, on the server's side."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: Any, number: int):
        self.server = server
        self.reader = reader
        self.writer = writer
        #: counted from 1
        self.number = number

    async def request(self) -> bytes:
        """The next request, head and body; b"" when the client has left."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            body = await self.reader.readexactly(int(found[1])) if found else b""
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        self.server.requests.append(head + body)
        return head + body

    async def send(self, data: bytes) -> None:
        """Sends bytes and waits until the kernel has them."""
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Until the client has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """Ends the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class Server:
    """A loopback server that plays a script on each connection and closes it afterwards."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The address of some resource here."""
        return f"http://127.0.0.1:{self.port}/v1/x"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await self.script(Peer(self, reader, writer, self.connections))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.tasks.discard(task)


@contextlib.asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Server]:
    """A server for the time of a `with`."""
    server = Server(script)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in list(server.tasks):
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def using(**network: Any) -> AsyncIterator[gw.HttpClient]:
    """A client for the time of a `with`."""
    client = gw.HttpClient(gw.NetworkConfig(**network), gw.Ticker())
    try:
        yield client
    finally:
        client.close()
        await asyncio.sleep(0)  # aborted transports close in the next round of the loop


def answering(*answers: bytes) -> Script:
    """Plays one answer per request, on every connection from the first one; then it closes."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            if not await peer.request():
                return
            await peer.send(answer)

    return script


def nothing() -> dict[str, str]:
    """No headers of the caller's."""
    return {}


async def whole(client: gw.HttpClient, url: str, method: str = "GET") -> tuple[int, bytes]:
    """(status, body) of one request, the connection given back."""
    answer = await client.open(method, url, nothing, b"{}" if method == "POST" else b"")
    try:
        return answer.status, await answer.read(1 << 20)
    finally:
        answer.close(is_complete=False)


async def ask(script: Script, method: str = "GET", **network: Any) -> tuple[int, bytes]:
    """(status, body) of one request to a server of its own."""
    async with serving(script) as server, using(**network) as client:
        return await whole(client, server.url, method)


def replied(answer: bytes, method: str = "GET", **network: Any) -> tuple[int, bytes]:
    """(status, body) that a client makes of an answer after which the connection closes."""
    return run(ask(answering(answer), method, **network))


# ---- requests ------------------------------------------------------------------------------------


def test_a_request_says_host_length_and_body_once() -> None:
    async def story() -> bytes:
        async with serving(answering(OK)) as server, using() as client:
            url = f"http://127.0.0.1:{server.port}/a/b?c=d"
            answer = await client.open("POST", url, lambda: {"X-One": "1"}, b'{"a":1}')
            answer.close(is_complete=False)
            return server.requests[0].replace(b"%d" % server.port, b"PORT")

    assert run(story()) == (
        b"POST /a/b?c=d HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nX-One: 1\r\n"
        b'Content-Length: 7\r\n\r\n{"a":1}'
    )


def test_a_post_without_body_has_a_length_too() -> None:
    async def story() -> bytes:
        async with serving(answering(OK)) as server, using() as client:
            (await client.open("POST", server.url, nothing)).close(is_complete=False)
            return server.requests[0]

    assert b"\r\nContent-Length: 0\r\n" in run(story())


@pytest.mark.parametrize(
    ("url", "origin", "host", "path"),
    [
        ("https://a.test/x?y=z", ("https", "a.test", 443), "a.test", "/x?y=z"),
        ("https://a.test:443/", ("https", "a.test", 443), "a.test", "/"),
        ("https://a.test:8443/x", ("https", "a.test", 8443), "a.test:8443", "/x"),
        ("http://a.test:443/x", ("http", "a.test", 443), "a.test:443", "/x"),
        ("http://127.0.0.1:80", ("http", "127.0.0.1", 80), "127.0.0.1", "/"),
        ("http://[::1]:8/x", ("http", "::1", 8), "[::1]:8", "/x"),
    ],
)
def test_a_url_says_where_to_connect_and_what_to_ask_for(
    url: str, origin: tuple[str, str, int], host: str, path: str
) -> None:
    async def story() -> None:
        async with using(proxy="http://proxy.test:1") as client:
            proxy = "" if origin[1] in ("127.0.0.1", "::1") else "http://proxy.test:1"
            for _ in range(2):
                assert client.plan(url) == (gw.Origin(*origin, proxy), host, path)

    run(story())


def test_urls_without_end_are_not_all_remembered() -> None:
    async def story() -> int:
        async with using() as client:
            for number in range(3000):
                client.plan(f"https://a.test/x?page={number}")
            return client.plan.cache_info().currsize

    assert run(story()) < 1000


def test_headers_are_asked_for_each_sending() -> None:
    async def story() -> list[bytes]:
        numbers = iter(range(9))

        def numbered() -> dict[str, str]:
            return {"X-Number": str(next(numbers))}

        script = closing_on_the_second(None, again=False)
        async with serving(script) as server, using() as client:
            for _ in range(2):
                answer = await client.open("POST", server.url, numbered, b"{}")
                assert await answer.read(9) == b"ok"
                answer.close(is_complete=False)
            return [row for r in server.requests for row in re.findall(rb"X-Number: \d", r)]

    assert run(story()) == [b"X-Number: 0", b"X-Number: 1", b"X-Number: 2"]


# ---- framing -------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODIES = {
    "length": (OK, b"ok"),
    "length 0": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    "close": (b"HTTP/1.1 200 OK\r\n\r\nall of it", b"all of it"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nall of it", b"all of it"),
    "chunked": (CHUNKED + b"3\r\nabc\r\n0002;x=1\r\nde\r\n0\r\nX-T: 1\r\n\r\n", b"abcde"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b""),
    "1xx before": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK,
        b"ok",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_read_by_its_framing(name: str) -> None:
    answer, body = BODIES[name]
    assert replied(answer)[1] == body


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_may_come_byte_by_byte(name: str) -> None:
    answer, body = BODIES[name]

    async def drip(peer: Peer) -> None:
        await peer.request()
        for at in range(len(answer)):
            await peer.send(answer[at : at + 1])
            await asyncio.sleep(0)

    assert run(ask(drip))[1] == body


def test_an_answer_to_head_has_no_body() -> None:
    assert replied(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD") == (200, b"")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
        CHUNKED,
        CHUNKED + b"2\r\nok",
        CHUNKED + b"2\r\nok\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\nX-T: 1\r\n",
    ],
)
def test_a_body_that_breaks_off_is_an_error(answer: bytes) -> None:
    with pytest.raises(gw.UpstreamError):
        replied(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
        CHUNKED + b"+2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nokay\r\n0\r\n\r\n",
    ],
)
def test_what_breaks_http_is_an_error(answer: bytes) -> None:
    with pytest.raises(gw.UpstreamError):
        replied(answer)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_packed_answer_is_unpacked_as_it_comes(coding: str, size: int) -> None:
    plain = b"words " * 500
    packed = zlib.compress(plain) if coding == "deflate" else gzip.compress(plain)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(packed)}\r\n\r\n"

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head.encode())
        for at in range(0, len(packed), size):
            await peer.send(packed[at : at + size])

    assert run(ask(script)) == (200, plain)


@pytest.mark.parametrize(
    "packed", [b"this is no gzip", gzip.compress(b"words " * 500)[:-12]], ids=["foreign", "torn"]
)
def test_a_packed_answer_that_is_torn_is_an_error(packed: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with pytest.raises(gw.UpstreamError):
        replied(head + packed)


@pytest.mark.parametrize(
    "behind",
    [b"x", bytes(100_000), gzip.compress(b"x")],
    ids=["a byte", "zeros", "another member"],
)
def test_bytes_behind_the_end_of_a_packed_answer_are_an_error(behind: bytes) -> None:
    packed = gzip.compress(b"words") + behind
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"
    with pytest.raises(gw.UpstreamError):
        replied(head + packed)


def test_a_packed_answer_that_is_a_bomb_is_an_error_and_never_unfolded() -> None:
    async def story() -> int:
        bomb = gzip.compress(bytes(64 << 20))
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"
        async with serving(answering(head + bomb)) as server, using() as client:
            answer = await client.open("GET", server.url, nothing)
            tracemalloc.start()
            with pytest.raises(gw.UpstreamError, match="malformed"):
                await answer.read(1 << 30)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            answer.close(is_complete=False)
            return peak

    assert run(story()) < 32 << 20


def test_what_follows_an_answer_is_not_kept_and_ends_the_connection() -> None:
    async def story() -> int:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            with contextlib.suppress(ConnectionError):
                while True:
                    await peer.send(bytes(1 << 20))

        async with serving(script) as server, using() as client:
            answer = await client.open("GET", server.url, nothing)
            assert await answer.read(9) == b"ok"
            answer.close(is_complete=True)
            await answer.connection.wait_closed()
            return len(answer.body.excess) + len(answer.connection.buffer)

    assert run(story()) < 1 << 20


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "x" * 5000])
def test_a_coding_that_cannot_be_read_is_an_error_that_does_not_hide_the_status(
    coding: str,
) -> None:
    async def story() -> int:
        head = f"HTTP/1.1 429 X\r\nContent-Encoding: {coding}\r\nContent-Length: 2\r\n\r\nok"
        async with serving(answering(head.encode())) as server, using() as client:
            answer = await client.open("GET", server.url, nothing)
            with pytest.raises(gw.UpstreamError, match="unrequested coding"):
                await answer.read(9)
            answer.close(is_complete=False)
            return answer.status

    assert run(story()) == 429


def test_interim_responses_without_end_are_an_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        with contextlib.suppress(ConnectionError):
            while True:
                await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)

    with pytest.raises(gw.UpstreamError, match="interim"):
        run(ask(script))


def test_a_whole_answer_has_a_largest_size() -> None:
    async def story() -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000
        async with serving(answering(answer)) as server, using() as client:
            opened = await client.open("GET", server.url, nothing)
            try:
                with pytest.raises(gw.UpstreamError, match="larger than 2 KiB"):
                    await opened.read(2048)
            finally:
                opened.close(is_complete=False)

    run(story())


def test_a_redirect_is_returned_not_followed() -> None:
    async def story() -> tuple[int, str, int]:
        async with serving(answering(OK)) as other, using() as client:
            where = f"HTTP/1.1 307 T\r\nLocation: {other.url}\r\nContent-Length: 0\r\n\r\n"
            async with serving(answering(where.encode())) as server:
                answer = await client.open("GET", server.url, lambda: {"Authorization": "Bearer x"})
                answer.close(is_complete=False)
            return answer.status, answer.headers["location"], other.connections

    status, location, followed = run(story())
    assert (status, followed) == (307, 0)
    assert location.startswith("http://127.0.0.1:")


# ---- the pool ------------------------------------------------------------------------------------


async def count(script: Script, times: int = 2, read: bool = True) -> tuple[int, int]:
    """(connections, requests) that a server sees of requests made one after the other."""
    async with serving(script) as server, using() as client:
        for _ in range(times):
            if read:
                await whole(client, server.url, "POST")
            else:
                answer = await client.open("POST", server.url, nothing, b"{}")
                answer.close(is_complete=False)
        return server.connections, len(server.requests)


@pytest.mark.parametrize("name", ["length", "length 0", "chunked", "no content", "1xx before"])
def test_a_connection_whose_answer_was_read_is_used_again(name: str) -> None:
    answer = BODIES[name][0]
    assert run(count(answering(answer, answer, answer), 3)) == (1, 3)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\n",  # more than was asked for
    ],
)
def test_a_connection_that_may_not_be_used_again_is_not(answer: bytes) -> None:
    assert run(count(answering(answer, answer))) == (2, 2)


def test_an_answer_that_was_half_read_does_not_return_to_the_pool() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(half)
        await peer.gone()

    assert run(count(script, read=False)) == (2, 2)


def test_what_an_idle_peer_says_is_never_an_answer() -> None:
    async def story() -> tuple[int, bytes]:
        spoken = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK if peer.number == 1 else OK.replace(b"ok", b"no"))
            if peer.number == 1:
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
                await peer.gone()
                spoken.set()

        async with serving(script) as server, using() as client:
            await whole(client, server.url)
            await spoken.wait()
            return server.connections, (await whole(client, server.url))[1]

    assert run(story()) == (1, b"no") or run(story()) == (2, b"no")


def closing_on_the_second(ending: bytes | None, again: bool = True) -> Script:
    """Answers once per connection and ends the second request with `ending`, None is a reset.

    Only the first connection does so unless `again`; the others answer all.
    """

    async def script(peer: Peer) -> None:
        while await peer.request():
            if len(peer.server.requests) == 1 or (peer.number > 1 and not again):
                await peer.send(OK)
            elif ending is None:
                peer.reset()
                break
            else:
                await peer.send(ending)
                break

    return script


def test_a_post_on_a_connection_that_is_reset_at_once_is_sent_again_once() -> None:
    assert run(count(closing_on_the_second(None, again=False))) == (2, 3)


@pytest.mark.parametrize("ending", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["", "after 100"])
def test_a_post_that_was_read_before_the_connection_was_closed_is_not_sent_again(
    ending: bytes,
) -> None:
    async def story() -> tuple[int, int]:
        async with serving(closing_on_the_second(ending, again=False)) as server, using() as client:
            await whole(client, server.url, "POST")
            with pytest.raises(gw.UpstreamError, match="closed the connection"):
                await whole(client, server.url, "POST")
            assert await whole(client, server.url, "POST") == (200, b"ok")
            return server.connections, len(server.requests)

    assert run(story()) == (2, 3)


def test_a_post_that_was_worked_on_before_a_reset_is_not_sent_again() -> None:
    async def script(peer: Peer) -> None:
        while await peer.request():
            if len(peer.server.requests) == 2:
                await asyncio.sleep(2 * gw.RESET_SECONDS)
                peer.reset()
            await peer.send(OK)

    with pytest.raises(gw.UpstreamError, match="without a response"):
        run(count(script, 2))


async def pooled(client: gw.HttpClient, url: str, ours: socket.socket) -> gw.PooledConnection:
    """A connected socket as an idle connection to `url`."""
    loop = asyncio.get_running_loop()
    origin = client.plan(url)[0]
    _, connection = await loop.create_connection(lambda: gw.PooledConnection(origin), sock=ours)
    client.pool.release(connection, loop.time())
    return connection


@pytest.mark.parametrize("read", [0, 4096], ids=["nothing", "all"])
def test_a_post_of_which_nothing_was_read_before_the_close_is_sent_again(read: int) -> None:
    async def story() -> tuple[int, int]:
        async with serving(answering(OK)) as server, using() as client:
            # A Unix socket counts as unsent what its peer has not read.
            ours, theirs = socket.socketpair()
            await pooled(client, server.url, ours)
            asking = asyncio.ensure_future(whole(client, server.url, "POST"))
            while not gw.is_readable(theirs):
                await asyncio.sleep(0)
            theirs.recv(read)
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(gw.UpstreamError):
                await asking
            theirs.close()
            return server.connections, len(server.requests)

    assert run(story()) == ((0, 0) if read else (1, 1))


@pytest.mark.parametrize("last", [b"", b"x"], ids=["closed", "spoken to"])
def test_a_connection_whose_end_the_loop_has_not_seen_yet_is_not_used(last: bytes) -> None:
    async def story() -> gw.PooledConnection | None:
        async with using() as client:
            ours, theirs = socket.socketpair()
            idle = await pooled(client, "http://127.0.0.1/", ours)
            theirs.send(last)
            theirs.close()
            return client.pool.acquire(idle.origin, asyncio.get_running_loop().time())

    assert run(story()) is None


def test_a_get_on_a_stale_connection_is_not_sent_a_third_time() -> None:
    async def story() -> tuple[int, int]:
        async with serving(closing_on_the_second(b"")) as server, using() as client:
            await whole(client, server.url)
            with pytest.raises(gw.UpstreamError):
                await whole(client, server.url)
            return server.connections, len(server.requests)

    assert run(story()) == (2, 3)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("ending", [b"H", b"HTTP/1.1 200 OK\r\nContent-Le", OK[:-2]])
def test_a_request_is_not_sent_again_once_a_byte_has_come(
    ending: bytes, how: str, method: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(ending)
        if how == "reset":
            peer.reset()

    async def story() -> tuple[int, int]:
        async with serving(script) as server, using() as client:
            await whole(client, server.url, method)
            with pytest.raises(gw.UpstreamError):
                await whole(client, server.url, method)
            return server.connections, len(server.requests)

    assert run(story()) == (1, 2)


def test_two_stale_connections_cost_one_repetition_not_two() -> None:
    async def story() -> tuple[int, int]:
        together = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            if len(peer.server.requests) == 2:
                together.set()
            await together.wait()
            await peer.send(OK)
            if peer.number > 2:
                await peer.gone()
            else:
                await peer.request()  # and closes without a word

        async with serving(script) as server, using() as client:
            await asyncio.gather(whole(client, server.url), whole(client, server.url))
            assert await whole(client, server.url) == (200, b"ok")
            return server.connections, len(server.requests)

    assert run(story()) == (3, 4)


def test_a_connection_that_the_peer_has_closed_meanwhile_is_not_tried() -> None:
    async def story() -> tuple[int, int]:
        async with serving(answering(OK)) as server, using() as client:
            await whole(client, server.url)
            while server.tasks or not all(
                c.is_disconnected for stack in client.pool.idle.values() for c in stack
            ):
                await asyncio.sleep(0.01)
            await whole(client, server.url)
            return server.connections, len(server.requests)

    assert run(story()) == (2, 2)


def test_an_old_connection_is_closed_and_not_used() -> None:
    async def story() -> tuple[int, int]:
        async with serving(answering(OK, OK)) as server, using() as client:
            await whole(client, server.url)
            (idle,) = next(iter(client.pool.idle.values()))
            idle.idle_since -= gw.POOL_IDLE_SECONDS + 1
            client.pool.close_expired(asyncio.get_running_loop().time())
            await whole(client, server.url)
            return server.connections, len(server.requests)

    assert run(story()) == (2, 2)


def test_the_pool_keeps_only_so_many() -> None:
    async def story() -> int:
        many = gw.POOL_IDLE_PER_HOST + 3
        all_there = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            if len(peer.server.requests) == many:
                all_there.set()
            await all_there.wait()
            await peer.send(OK)
            await peer.gone()

        async with serving(script) as server, using() as client:
            await asyncio.gather(*(whole(client, server.url) for _ in range(many)))
            return sum(map(len, client.pool.idle.values()))

    assert run(story()) == gw.POOL_IDLE_PER_HOST


def test_a_cancelled_request_closes_its_connection() -> None:
    async def story() -> bool:
        left = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.gone()
            left.set()

        async with serving(script) as server, using() as client:
            task = asyncio.ensure_future(client.open("POST", server.url, nothing, b"{}"))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            await left.wait()
            return task.cancelled()

    assert run(story())


# ---- faults --------------------------------------------------------------------------------------


def test_a_reset_anywhere_inside_a_head_is_an_error_and_not_repeated() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    async def story() -> None:
        for offset in range(len(head)):

            async def script(peer: Peer, size: int = offset) -> None:
                await peer.request()
                if size:
                    await peer.send(head[:size])
                peer.reset()

            async with serving(script) as server, using() as client:
                with pytest.raises(gw.UpstreamError):
                    await whole(client, server.url, "POST")
                assert (server.connections, len(server.requests)) == (1, 1), offset

    run(story())


def test_a_reset_inside_a_body_is_an_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nok\r\n")
        peer.reset()

    with pytest.raises(gw.UpstreamError):
        run(ask(script))


def test_a_refused_connection_is_unreachable_and_says_where() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def story() -> None:
        async with using() as client:
            await client.open("GET", f"http://127.0.0.1:{port}/", nothing)

    with pytest.raises(gw.Unreachable, match=r"127\.0\.0\.1"):
        run(story())


def test_a_name_that_nobody_knows_is_unreachable() -> None:
    async def story() -> None:
        async with using() as client:
            await client.open("GET", "http://nowhere.invalid:1/", nothing)

    with pytest.raises(gw.Unreachable, match=r"nowhere\.invalid"):
        run(story())


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_head_that_does_not_come_in_time_is_a_timeout(sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        await peer.gone()

    with pytest.raises(gw.UpstreamTimeout):
        run(ask(script, first_byte_seconds=0.1))


@pytest.mark.parametrize("relayed", [False, True])
def test_silence_inside_a_body_is_a_timeout(relayed: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nok\r\n")
        await peer.gone()

    async def story() -> None:
        async with serving(script) as server, using(stream_idle_seconds=0.1) as client:
            answer = await client.open("GET", server.url, nothing)
            try:
                assert await answer.read_some() == b"ok"
                await (answer.relay(lambda _: None) if relayed else answer.read_some())
            finally:
                answer.close(is_complete=False)

    with pytest.raises(gw.UpstreamTimeout):
        run(story())


def test_an_answer_that_is_held_back_does_not_time_out() -> None:
    async def story() -> bytes:
        go_on = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED + b"2\r\nok\r\n")
            await go_on.wait()
            await peer.send(b"3\r\nend\r\n0\r\n\r\n")

        async with serving(script) as server, using(stream_idle_seconds=0.1) as client:
            answer = await client.open("GET", server.url, nothing)
            assert await answer.read_some() == b"ok"
            answer.hold(True)
            late = asyncio.get_running_loop().time() + 1
            for tick in range(4):
                answer.watch(late + tick)
            go_on.set()
            answer.hold(False)
            pieces: list[bytes] = []
            await answer.relay(pieces.append)
            answer.close(is_complete=False)
            return b"".join(pieces)

    assert run(story()) == b"end"


def test_a_sink_that_cannot_take_more_holds_the_upstream_back_from_its_first_piece() -> None:
    async def story() -> list[int]:
        go_on, over = asyncio.Event(), asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED + b"2\r\nok\r\n")
            await go_on.wait()
            await peer.send(b"3\r\nend\r\n")
            over.set()
            await peer.gone()

        async with serving(script) as server, using() as client:
            answer = await client.open("GET", server.url, nothing)
            pieces: list[int] = []

            def sink(data: bytes) -> None:
                pieces.append(len(data))
                answer.hold(True)

            while not answer.connection.buffer:
                await asyncio.sleep(0)
            relaying = asyncio.ensure_future(answer.relay(sink))
            go_on.set()
            await over.wait()
            for _ in range(20):  # rounds of the loop in which the rest could be read
                await asyncio.sleep(0.005)
            relaying.cancel()
            await asyncio.wait([relaying])
            answer.close(is_complete=False)
            return pieces

    assert run(story()) == [2]


@pytest.mark.parametrize("early", [True, False], ids=["what waited", "what comes"])
def test_a_bug_in_a_sink_is_no_fault_of_the_upstreams_and_leaves_a_traceback(
    early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def sink(data: bytes) -> None:
        json.loads(b"{}")["content"]

    async def story() -> None:
        go_on = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED + (b"2\r\nok\r\n" if early else b""))
            await go_on.wait()
            await peer.send(b"3\r\nend\r\n")
            await peer.gone()

        async with serving(script) as server, using() as client:
            answer = await client.open("GET", server.url, nothing)
            while early and not answer.connection.buffer:
                await asyncio.sleep(0)
            go_on.set()
            try:
                await answer.relay(sink)
            finally:
                answer.close(is_complete=False)

    with pytest.raises(gw.ApiError, match="Internal error") as caught:
        run(story())
    assert (caught.value.status, caught.value.kind) == (500, "internal")
    assert "KeyError: 'content'" in caplog.text


def test_a_small_answer_must_be_whole_in_time() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        with contextlib.suppress(ConnectionError):
            while True:
                await peer.send(b"1\r\nx\r\n")
                await asyncio.sleep(0.02)

    async def story() -> None:
        async with serving(script) as server, using() as client:
            await client.fetch("GET", server.url, {}, 0.3)

    with pytest.raises(gw.UpstreamTimeout):
        run(story())


# ---- proxies -------------------------------------------------------------------------------------


def tunnel(target_port: int = 0, refusal: bytes = b"") -> Script:
    """A CONNECT proxy: to a loopback port whatever the name, or itself the origin behind it."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    async def script(peer: Peer) -> None:
        if not await peer.request() or refusal:
            await peer.send(refusal)
            return
        await peer.send(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
        if not target_port:
            while await peer.request():
                await peer.send(OK)
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", target_port)
        try:
            await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
        finally:
            writer.close()

    return script


async def through(script: Script, url: str, user: str = "", **network: Any) -> list[bytes]:
    """The requests that a proxy sees while two answers are fetched through it."""
    async with serving(script) as proxy:
        address = f"http://{user}127.0.0.1:{proxy.port}"
        async with using(proxy=address, **network) as client:
            for _ in range(2):
                assert await whole(client, url, "POST") == (200, b"ok")
        return proxy.requests


def test_a_proxy_is_asked_for_a_tunnel_that_is_then_used_again() -> None:
    connect, first, second = run(through(tunnel(), "http://copilot.test/models"))
    assert connect == b"CONNECT copilot.test:80 HTTP/1.1\r\nHost: copilot.test:80\r\n\r\n"
    assert first == second
    assert first.startswith(b"POST /models HTTP/1.1\r\nHost: copilot.test\r\n")


@pytest.mark.parametrize(
    ("userinfo", "sent"),
    [("us%40er:p%3Aass@", b"us@er:p:ass"), ("u:a@b@", b"u:a@b"), ("u:\udcff@", b"u:\xff")],
    ids=ascii,
)
def test_a_proxy_gets_the_password_that_its_url_holds(userinfo: str, sent: bytes) -> None:
    asked = run(through(tunnel(), "http://copilot.test/", userinfo))
    basic = base64.b64encode(sent)
    assert b"\r\nProxy-Authorization: Basic " + basic + b"\r\n" in asked[0]
    assert not any(b"Proxy-Authorization" in request for request in asked[1:])


@pytest.mark.parametrize(
    ("refusal", "said", "hint"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407", "user:password"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "403", ""),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502", ""),
        (b"SSH-2.0-x\r\n\r\n", "malformed", ""),
        (b"HTTP/1.1 200", "proxy", ""),
    ],
)
def test_a_tunnel_that_is_refused_is_explained_without_the_password(
    refusal: bytes, said: str, hint: str
) -> None:
    with pytest.raises(gw.Unreachable) as caught:
        run(through(tunnel(refusal=refusal), "http://copilot.test/", "me:SECRET@"))
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert "SECRET" not in caught.value.text()


def test_a_proxy_that_says_nothing_is_given_up_and_left_after_a_while() -> None:
    async def story() -> None:
        left = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.gone()
            left.set()

        async with serving(script) as proxy:
            network = {"proxy": f"http://127.0.0.1:{proxy.port}", "connect_seconds": 0.2}
            async with using(**network) as client:
                with pytest.raises(gw.Unreachable, match="through the proxy within"):
                    await client.open("GET", "http://copilot.test/", nothing)
            await asyncio.wait_for(left.wait(), 2)

    run(story())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_loopback_is_never_reached_through_a_proxy(host: str) -> None:
    async def story() -> tuple[int, bytes]:
        async with serving(answering(OK)) as server, serving(tunnel()) as proxy:
            async with using(proxy=f"http://127.0.0.1:{proxy.port}") as client:
                answer = await whole(client, f"http://{host}:{server.port}/")
            assert (server.connections, proxy.connections) == (1, 0)
            return answer

    assert run(story()) == (200, b"ok")


P = "http://p:1"
HOST, PORT = "api.test", 443


@pytest.mark.parametrize(
    ("environ", "proxy"),
    [
        ({}, ""),
        ({"HTTPS_PROXY": P}, P),
        ({"https_proxy": P, "HTTPS_PROXY": "http://other:1"}, P),
        ({"https_proxy": " ", "HTTPS_PROXY": P}, P),  # compose files give blanks for unset ones
        ({"ALL_PROXY": P}, P),
        ({"all_proxy": "socks5://other", "https_proxy": P}, P),
        ({"HTTP_PROXY": P}, ""),
        ({"HTTPS_PROXY": "p:1"}, P),
        ({"HTTPS_PROXY": " http://p:1/ \n"}, P),
        ({"HTTPS_PROXY": "HTTP://p:1"}, P),
        ({"HTTPS_PROXY": "u:a@b@p"}, "http://u:a@b@p"),
        ({"HTTPS_PROXY": "https://[::1]:8"}, "https://[::1]:8"),
    ],
    ids=str,
)
def test_the_environment_names_the_proxy(environ: dict[str, str], proxy: str) -> None:
    assert gw.read_proxy_variables(environ)(HOST, PORT) == proxy


@pytest.mark.parametrize(
    ("exceptions", "host", "excepted"),
    [
        ("api.test", HOST, True), ("API.test", HOST, True), (".test,other", HOST, True),
        ("*", HOST, True), ("pi.test", HOST, False), ("other", HOST, False), ("", HOST, False),
        ("a, api.test ,b", HOST, True), ("a api.test", HOST, True), ("*.test", HOST, True),
        ("*.api.test", HOST, False), (".api.test", HOST, True), ("*.api.test", "x.api.test", True),
        ("api.test:443", HOST, True), ("api.test:8443", HOST, False), ("*:443", HOST, False),
        ("api.test.", HOST, True), ("api.test", "API.TEST.", True), ("10.0.0.0/8", HOST, False),
        ("10.0.0.0/8", "10.1.2.3", True), ("10.1.2.3/8", "10.9.9.9", True),
        ("10.0.0.0/8", "11.1.2.3", False), ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:443", "10.1.2.3", True), ("fd00::/8", "fd00::1", True),
        ("[fd00::1]:443", "fd00::1", True), ("[fd00::1]:1", "fd00::1", False),
        ("a:b:c,[,/,:1,a/b,999.1/99", HOST, False),
    ],
)  # fmt: skip
def test_no_proxy_is_read_as_curl_and_go_do(exceptions: str, host: str, excepted: bool) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        choose = gw.read_proxy_variables({"HTTPS_PROXY": P, name: exceptions})
        assert choose(host, PORT) == ("" if excepted else P)


# ---- TLS -----------------------------------------------------------------------------------------


class TlsServer:
    """A TLS server in a thread: one answer per connection; `rude` ends it without close_notify."""

    def __init__(self, answer: bytes, rude: bool = False) -> None:
        self.answer = answer
        self.rude = rude
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(CERTS / "server.pem")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self) -> TlsServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.listener.close()

    def serve(self) -> None:
        """One connection after the other until the listener closes."""
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), plain:
                plain.settimeout(PATIENCE_SECONDS)
                self.talk(self.context.wrap_socket(plain, server_side=True))

    def talk(self, secure: ssl.SSLSocket) -> None:
        """One request and its answer."""
        seen = b""
        while b"\r\n\r\n" not in seen:
            data = secure.recv(65536)
            if not data:
                break
            seen += data
        if seen:
            secure.sendall(self.answer)
        if self.rude:
            os.close(secure.detach())
        else:
            with contextlib.suppress(OSError):
                secure.unwrap()
            secure.close()


async def secured(port: int, host: str = "localhost", **network: Any) -> tuple[int, bytes]:
    """(status, body) of one https request to a loopback port, by proxy for a made-up name."""
    async with serving(tunnel(port)) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        async with using(proxy=address, **network) as client:
            url = f"https://{host}:{port}/" if host == "localhost" else f"https://{host}/"
            return await whole(client, url)


CA = str(CERTS / "ca.pem")


@pytest.fixture(scope="module")
def tls() -> Iterator[TlsServer]:
    """A polite TLS server."""
    with TlsServer(OK) as server:
        yield server


@pytest.mark.parametrize("host", ["localhost", "copilot.test"], ids=["directly", "by a tunnel"])
def test_a_server_of_the_configured_ca_is_trusted(tls: TlsServer, host: str) -> None:
    assert run(secured(tls.port, host, ca_file=CA)) == (200, b"ok")


@pytest.mark.parametrize("host", ["localhost", "copilot.test"], ids=["directly", "by a tunnel"])
def test_a_server_of_an_unknown_ca_is_not_and_the_setting_is_named(
    tls: TlsServer, host: str
) -> None:
    with pytest.raises(gw.Unreachable, match="not trusted") as caught:
        run(secured(tls.port, host))
    assert "network.ca_file" in caught.value.hint


def test_a_certificate_for_another_name_is_not_trusted(tls: TlsServer) -> None:
    with pytest.raises(gw.Unreachable, match="not trusted"):
        run(secured(tls.port, "elsewhere.test", ca_file=CA))


def test_a_server_that_speaks_no_tls_is_unreachable() -> None:
    async def story() -> None:
        async def script(peer: Peer) -> None:
            await peer.send(OK)

        async with serving(script) as server, using(ca_file=CA) as client:
            await client.open("GET", f"https://localhost:{server.port}/", nothing)

    with pytest.raises(gw.UpstreamError):
        run(story())


@pytest.mark.parametrize("file", ["missing.pem", "server.txt"])
def test_a_ca_file_that_cannot_be_used_is_an_error_for_the_caller(
    tls: TlsServer, file: str, tmp_path: Path
) -> None:
    (tmp_path / "server.txt").write_text("no certificate")
    with pytest.raises(gw.UpstreamError):
        run(secured(tls.port, ca_file=str(tmp_path / file)))


def test_a_body_that_the_end_of_tls_ends_is_whole() -> None:
    with TlsServer(b"HTTP/1.1 200 OK\r\n\r\nall of it") as server:
        assert run(secured(server.port, ca_file=CA)) == (200, b"all of it")


def test_a_body_that_ends_without_the_end_of_tls_was_cut_off() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\nhalf of"
    with TlsServer(answer, rude=True) as server, pytest.raises(gw.UpstreamError):
        run(secured(server.port, ca_file=CA))
