"""Section 17.3: one line of the log for every request, however it ends."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fakes import Answer
from machine import wait_until
from test_copilot import (
    CHAT,
    GPT,
    MESSAGES,
    Pair,
    asking,
    start,
    streaming,
    upstream_pieces,
)
from test_copilot import refusal as refused

Fields = dict[str, str]
CONFIG = """
[models]
both = ["copilot/gpt-4.1", "echo/echo"]
bad = ["copilot/no-such", "copilot/gpt-4.1"]
[network]
first_byte_seconds = 5
"""
EITHER = pytest.mark.parametrize("path", [CHAT, MESSAGES])


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    """One pair for all tests; what it answers is never the real thing's."""
    with ExitStack() as stack:
        yield start(stack, CONFIG)


@pytest.fixture
def pair(running: Pair) -> Iterator[Pair]:
    """The shared pair, in which nothing rests."""
    running.gateway.control("provider.enable", name="copilot")
    yield running


def lines(pair: Pair) -> list[Fields]:
    """The access log so far."""
    rows = re.findall(r" (?:INFO|DEBUG) request (.*)", pair.gateway.log())
    return [dict(word.split("=", 1) for word in row.split()) for row in rows]


def logged(pair: Pair, act: Callable[[], object]) -> Fields:
    """The one line that `act` leaves."""
    before = len(lines(pair))
    act()
    wait_until(lambda: len(lines(pair)) > before)
    pair.gateway.request("GET", "/v1/models")  # its line is behind every other
    wait_until(lambda: lines(pair)[-1]["path"] == "/v1/models")
    (line, _) = lines(pair)[before:]
    return line


def check(line: Fields, **expected: Any) -> None:
    assert {name: line.get(name) for name in expected} == expected


@EITHER
@pytest.mark.parametrize("stream", [False, True])
def test_a_success_has_no_kind(pair: Pair, path: str, stream: bool) -> None:
    line = logged(pair, lambda: pair.ask(path, "hi", stream=stream))
    check(line, status="200", provider="copilot", model=GPT, kind=None, end="ok", path=path)


@EITHER
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda: refused(429, "slow down", Retry_After="0"), "rate_limited"),
        (lambda: refused(400, "nonsense"), "invalid_request"),
        (lambda: Answer(0, then="reset"), "upstream_error"),
    ],
)
def test_an_error_names_the_model_and_the_kind(
    pair: Pair, path: str, stream: bool, answer: Callable[[], Answer], kind: str
) -> None:
    for _ in range(9):
        pair.fake.queue(answer())
    line = logged(pair, lambda: pair.ask(path, "hi", stream=stream))
    check(line, provider="copilot", model=GPT, kind=kind, end="error")
    assert int(line["status"]) >= 400
    pair.fake._queue.clear()  # noqa: SLF001 - what was not taken


@EITHER
def test_a_stream_that_breaks_tells_its_true_end(pair: Pair, path: str) -> None:
    pair.fake.queue(streaming(*upstream_pieces(GPT)[:3], then="reset"))
    line = logged(pair, lambda: pair.ask(path, "hi", stream=True))
    check(line, status="200", provider="copilot", model=GPT, kind="upstream_error", end="error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_response_has_a_line(pair: Pair, stream: bool) -> None:
    pair.fake.queue(Answer(0, then="hang"))
    asked = len(pair.fake.requests)

    def leave() -> None:
        with pair.send(CHAT, asking("hi", stream=stream)):
            wait_until(lambda: len(pair.fake.requests) > asked)

    check(
        logged(pair, leave),
        status="499", provider="copilot", model=GPT, kind="cancelled", end="cancelled",
    )  # fmt: skip


def test_a_client_that_leaves_a_stream_has_a_line(pair: Pair) -> None:
    some = upstream_pieces(GPT)
    pair.fake.queue(streaming(b"".join(some[:4]), *some[4:], pause=threading.Event()))

    def leave() -> None:
        with pair.send(CHAT, asking("hi", stream=True)) as wire:
            wire.read_until(b"one")

    line = logged(pair, leave)
    check(line, status="200", provider="copilot", model=GPT, kind="cancelled", end="cancelled")


def test_a_client_that_leaves_in_its_body_has_a_line(pair: Pair) -> None:
    data = pair.gateway.request_bytes("POST", CHAT, asking("hi"))

    def leave() -> None:
        with pair.gateway.wire() as wire:
            wire.send(data[:-5])

    check(logged(pair, leave), status="499", model="-", kind="cancelled", end="cancelled")


def test_a_body_that_is_no_http_has_a_line(pair: Pair) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = f"{head}Transfer-Encoding: chunked\r\n\r\nnonsense\r\n".encode()
    line = logged(pair, lambda: pair.gateway.raw(data))
    check(line, status="400", kind="invalid_request", end="error")


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/nowhere", None, {"status": "404", "kind": "unknown_url", "model": "-"}),
        ("PUT", CHAT, {}, {"status": "405", "kind": "method_not_allowed"}),
        ("POST", CHAT, b"{", {"status": "400", "kind": "invalid_request", "model": "-"}),
        ("POST", CHAT, asking("hi", "gpt 4"), {"kind": "invalid_request", "model": "-"}),
        ("POST", CHAT, asking("hi", "no-such"), {"kind": "model_not_found", "model": "no-such"}),
        ("POST", CHAT, asking("hi", "kiro/x"),
         {"kind": "not_signed_in", "provider": "kiro", "model": "x"}),
        ("POST", "/v1/embeddings", {"model": "echo", "input": "hi"},
         {"provider": "echo", "model": "echo"}),
    ],
)  # fmt: skip
def test_what_never_reaches_a_service_has_a_line(
    pair: Pair, method: str, path: str, body: Any, expected: Fields
) -> None:
    line = logged(pair, lambda: pair.gateway.request(method, path, body))
    check(line, end="error", **expected)


def test_of_a_list_the_model_that_responded_is_named(pair: Pair) -> None:
    for _ in range(9):
        pair.fake.queue(Answer(0, then="reset"))
    line = logged(pair, lambda: pair.ask(CHAT, "hi", "both"))
    check(line, status="200", provider="echo", model="echo", kind=None, end="ok")
    pair.fake._queue.clear()  # noqa: SLF001 - what was not taken
    line = logged(pair, lambda: pair.ask(CHAT, "hi", "bad"))
    check(line, status="200", provider="copilot", model=GPT, kind=None, end="ok")


def test_requests_that_the_stop_ends_have_a_line() -> None:
    """Those in a stream, and those that have no response yet."""
    with ExitStack() as stack:
        pair = start(stack, "[server]\ndrain_seconds = 0.3")
        some = upstream_pieces(GPT)
        held = threading.Event()
        pair.fake.queue(streaming(b"".join(some[:4]), *some[4:], pause=held))
        pair.fake.queue(Answer(0, then="hang"))
        with pair.send(CHAT, asking("hi", stream=True)) as stream:
            stream.read_until(b"one")
            with pair.send(CHAT, asking("hi")) as whole:
                wait_until(lambda: len(pair.fake.requests) >= 4)
                pair.gateway.terminate()
                assert b"stopping" in stream.rest(20) and b" 503 " in whole.rest(20)[:20]
        pair.gateway.wait(20)
        ends = sorted((line["status"], line["kind"], line["end"]) for line in lines(pair))
        assert ends == [("200", "overloaded", "error"), ("503", "overloaded", "error")]
