"""Section 17 in one process: what a client is told of a bug; small writes leave at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from support import Reply, parse_responses

import aiclient_api as gw


class FaultyProvider(gw.EchoProvider):
    """An echo that has a bug: behind so many pieces of a stream."""

    def __init__(self, pieces: int) -> None:
        super().__init__("echo")
        self.pieces = pieces

    async def open(self, call: gw.Call) -> gw.BodyStream:
        """The echo, with the bug."""
        source = await super().open(call)
        assert isinstance(source, gw.LocalResponse)
        whole = list(source.pieces)

        def pieces() -> Iterator[bytes]:
            yield from whole[: self.pieces]
            raise KeyError("content")

        return gw.LocalResponse(pieces())


@contextlib.asynccontextmanager
async def serving(provider: gw.Provider, usage_file: str) -> AsyncIterator[int]:
    """The port of a gateway that has only this provider."""
    config, ticker = gw.Config(default_provider="echo"), gw.Ticker()
    config.limits.runaway_requests = 0
    ledger = gw.Ledger(usage_file, ticker)
    gateway = gw.Gateway(config, {"echo": provider}, ticker, ledger, dict)
    server = gw.Server(config.server, ticker, gateway.handle, gateway.write_error)
    (listener,) = gw.open_listeners("127.0.0.1", 0)
    port = listener.getsockname()[1]
    await server.listen([listener])
    yield port
    await server.drain(1)
    await ledger.close()


def small_body(stream: bool) -> bytes:
    turns = [{"role": "user", "content": "hi there you"}]
    return gw.dump_json({"model": "echo", "max_tokens": 9, "stream": stream, "messages": turns})


async def ask(provider: gw.Provider, path: str, usage_file: str) -> Reply:
    """The streamed answer of a gateway that has only this provider."""
    body = small_body(stream=True)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    async with serving(provider, usage_file) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        received = await asyncio.wait_for(reader.read(-1), 10)
        writer.close()
    (reply,) = parse_responses(received)
    return reply


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_accepted_connections_send_small_writes_at_once(host: str) -> None:
    with contextlib.ExitStack() as stack:
        for listener in gw.open_listeners(host, 0):
            stack.enter_context(listener)
            stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
            accepted = stack.enter_context(listener.accept()[0])
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class InstantProvider(gw.EchoProvider):
    """Always the same frame of its own dialect, so that little is counted but the gateway."""

    async def open(self, call: gw.Call) -> gw.BodyStream:
        choice = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}
        frame = gw.CHAT.encode({"choices": [choice]})
        return gw.LocalResponse(iter([frame + gw.CHAT.tail]))


async def calls_per_request(connection: str, usage_file: str) -> float:
    """How many functions of Python the gateway's thread enters for a small request."""
    fields = {"Content-Type": "application/json", "Connection": connection}
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    async with serving(InstantProvider("echo"), usage_file) as port:

        def send(times: int) -> None:
            with contextlib.closing(HTTPConnection("127.0.0.1", port, 10)) as client:
                for _ in range(times):
                    client.request("POST", "/v1/chat/completions", small_body(False), fields)
                    assert client.getresponse().read()

        await asyncio.to_thread(send, 20)
        previous = sys.getprofile()
        sys.setprofile(count)
        try:
            await asyncio.to_thread(send, 100)
        finally:
            sys.setprofile(previous)
    return calls / 100


@pytest.mark.parametrize(("connection", "most"), [("keep-alive", 340), ("close", 540)])
def test_a_small_request_takes_few_calls(connection: str, most: int, tmp_path: Path) -> None:
    # 327 and 520 with Python 3.11; a count, unlike a time, is the same on a busy machine.
    assert asyncio.run(calls_per_request(connection, str(tmp_path / "usage.db"))) < most


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("pieces", [0, 2], ids=["before a byte", "in the stream"])
def test_a_bug_is_told_as_internal_and_leaves_a_traceback(
    path: str, pieces: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = FaultyProvider(pieces)
    reply = asyncio.run(ask(provider, path, str(tmp_path / "usage.db")))
    assert reply.complete and "Internal error" in reply.text
    assert reply.status == (200 if pieces else 500)
    assert "[DONE]" not in reply.text and "message_stop" not in reply.text
    assert "KeyError: 'content'" in caplog.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_request_that_has_ended_is_freed_at_once(path: str, tmp_path: Path) -> None:
    """No cycle of objects keeps it, and with it its body, for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        reply = asyncio.run(ask(gw.EchoProvider("echo"), path, str(tmp_path / "usage.db")))
        kinds = (gw.Request, gw.Exchange, gw.StreamTranslator, gw.Response)
        assert [o for o in gc.get_objects() if isinstance(o, kinds)] == []
    finally:
        gc.enable()
    assert reply.complete and reply.status == 200
