"""Section 17 in one process: what a client is told of a bug; small writes leave at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
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


async def ask(provider: gw.Provider, path: str, usage_file: str) -> Reply:
    """The streamed answer of a gateway that has only this provider."""
    config, ticker = gw.Config(default_provider="echo"), gw.Ticker()
    ledger = gw.Ledger(usage_file, ticker)
    gateway = gw.Gateway(config, {"echo": provider}, ticker, ledger, dict)
    server = gw.Server(config.server, ticker, gateway.handle, gateway.write_error)
    (listener,) = gw.open_listeners("127.0.0.1", 0)
    port = listener.getsockname()[1]
    await server.listen([listener])
    turns = [{"role": "user", "content": "hi there you"}]
    body = gw.dump_json({"model": "echo", "max_tokens": 9, "stream": True, "messages": turns})
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    received = await asyncio.wait_for(reader.read(-1), 10)
    writer.close()
    await server.drain(1)
    await ledger.close()
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
