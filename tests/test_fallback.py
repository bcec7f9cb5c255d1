"""Rests after limits, and lists of models that are tried in order, over real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from fake_kiro import FakeKiro, exception_frame
from fakes import Answer, FakeCopilot, Seen, dump, sse
from machine import Machine, fetch
from support import Gateway, Reply, Wire
from test_command_line import typed
from test_copilot import asking, check_end, error, heard, pieces, stream_error, streaming
from test_copilot import refusal as copilot_no
from test_kiro import refusal as kiro_no
from test_kiro import until

import aiclient_api as gw

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
GPT = "gpt-4.1"
SONNET = "claude-sonnet-4.5"
#: Each caller once, one with a stream, where it does not matter.
EITHER = pytest.mark.parametrize(
    ("path", "stream"), [(CHAT, True), (MESSAGES, False)], ids=["chat", "messages"]
)
#: Longer than the gateway waits itself.
LONG = "100"

CONFIG = """
default_provider = "copilot"
[models]
both = ["copilot/gpt-4.1", "kiro/claude-sonnet-4.5"]
swapped = ["kiro/claude-sonnet-4.5", "copilot/gpt-4.1"]
three = ["copilot/gpt-4.1", "kiro/claude-sonnet-4.5", "work/gpt-4.1"]
unsigned = ["work/gpt-4.1", "copilot/gpt-4.1"]
away = ["gone/claude-sonnet-4.5", "echo/echo"]
unknown = ["no-such-model", "echo"]
off = ["off/gpt-4.1", "echo/echo"]
vectors = ["echo/echo", "copilot/text-embedding-3-small"]
"gpt-4.1" = ["gpt-4.1", "echo/echo"]
single = "copilot/gpt-4.1"
nowhere = ["no-such-model", "neither-this"]
[providers.copilot]
type = "copilot"
github_url = "{copilot}"
github_api_url = "{copilot}"
[providers.kiro]
type = "kiro"
api_url = "{kiro}"
management_url = "{kiro}"
oidc_url = "{kiro}"
auth_url = "{kiro}"
[providers.work]
type = "copilot"
[providers.off]
type = "copilot"
enabled = false
[providers.gone]
type = "kiro"
api_url = "http://127.0.0.1:9"
"""


# ---- the programs --------------------------------------------------------------------------------


class Copilot(FakeCopilot):
    """An imitation whose account may have used up its credits, and tell when they come back."""

    resets_at: float | None = None

    def route(self, seen: Seen) -> Answer:
        """The answer to one request."""
        answer = super().route(seen)
        if seen.path != "/copilot_internal/user" or self.resets_at is None:
            return answer
        user = json.loads(b"".join(answer.pieces()))
        user["quota_snapshots"]["premium_interactions"] |= {"remaining": 0, "quota_remaining": 0}
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.resets_at))
        user |= {"quota_reset_date": moment[:10], "quota_reset_date_utc": moment}
        return Answer(200, answer.headers, dump(user), chunked=False)


@dataclass
class Trio:
    """A gateway that is signed in to both services."""

    copilot: Copilot
    kiro: FakeKiro
    gateway: Gateway

    def ask(self, path: str, model: str, words: str = "hi", **more: Any) -> Reply:
        """One request for an answer."""
        body = asking(words, model, **more)
        if path == RESPONSES:
            body = {"model": model, "input": words, **more}
        return self.gateway.request("POST", path, body)

    def cooldowns(self, name: str) -> list[Json]:
        """What `status` says of a provider's rests."""
        rows = self.gateway.control("status")["providers"]
        row: Json = next(row for row in rows if row["name"] == name)
        assert (row["health"] == "cooling down") == bool(row["cooldowns"])
        found: list[Json] = row["cooldowns"]
        return found

    def wake(self) -> None:
        """Ends every rest, and forgets what was asked."""
        for name in ("copilot", "kiro"):
            self.gateway.control("provider.enable", name=name)
        for fake in (self.copilot, self.kiro):
            for seen in (fake.requests, fake.calls, fake.cancelled):
                seen.clear()
            fake._queue.clear()  # noqa: SLF001 - what a test before did not take
        self.copilot.resets_at = None


@pytest.fixture(scope="module")
def running() -> Iterator[Trio]:
    """One trio for all tests."""
    with ExitStack() as stack:
        copilot = stack.enter_context(Copilot())
        kiro = stack.enter_context(FakeKiro())
        tokens = {
            "copilot": {"type": "copilot", "github_token": copilot.github_token},
            "kiro": kiro.token_file(),
            "gone": kiro.token_file(),
        }
        config = CONFIG.format(copilot=copilot.url, kiro=kiro.url)
        gateway = stack.enter_context(Gateway(config, tokens))
        stack.callback(check_end, gateway)
        yield Trio(copilot, kiro, gateway)
        assert copilot.violations == []
        assert kiro.violations == []


@pytest.fixture
def trio(running: Trio) -> Iterator[Trio]:
    """The shared trio, in which nothing rests."""
    running.wake()
    yield running


def close_to(moment: float, wanted: float) -> bool:
    """Whether a time is the one that was told, give or take what a test takes."""
    return abs(moment - wanted) <= 10


# ---- what makes something rest, and for how long -------------------------------------------------


def http_date(seconds: float) -> str:
    """A time from now as an HTTP date."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))


#: name -> (refusal, model or "*", at most so many seconds of rest, passes after or None, kind)
COPILOT_RESTS: dict[str, tuple[Callable[[], Answer], str, int, float | None, str]] = {
    "seconds": (lambda: copilot_no(429, "slow down", "user_model_rate_limited", Retry_After="42"),
                GPT, 42, 42, "rate_limited"),
    "hours": (lambda: copilot_no(429, "in 51 hours", "rate_limited", Retry_After="183600"),
              GPT, 60, 183_600, "rate_limited"),
    "date": (lambda: copilot_no(429, "no", "rate_limited", Retry_After=http_date(3600)),
             GPT, 60, 3600, "rate_limited"),
    "words": (lambda: copilot_no(429, "Please try again in 51 hours.", "rate_limited"),
              GPT, 60, 183_600, "rate_limited"),
    "week": (lambda: copilot_no(429, "no", "user_weekly_rate_limited:pro", Retry_After=LONG),
             "*", 60, 100, "rate_limited"),
    "global": (lambda: copilot_no(429, "no", "user_global_rate_limited", Retry_After=LONG),
               "*", 60, 100, "rate_limited"),
    "integration": (lambda: copilot_no(429, "no", "integration_rate_limited", Retry_After=LONG),
                    "*", 60, 100, "rate_limited"),
    "busy": (lambda: copilot_no(503, "no", Retry_After=LONG), GPT, 60, 100, "overloaded"),
    "quota": (lambda: copilot_no(402, "no", "quota_exceeded"), GPT, 60, None, "quota_exceeded"),
    "quota, date": (lambda: copilot_no(402, "no", "quota_exceeded", Retry_After=http_date(86_400)),
                    GPT, 60, 86_400, "quota_exceeded"),
    "quota, seconds": (lambda: copilot_no(402, "no", "overage_limit_reached", Retry_After="30"),
                       GPT, 30, 30, "quota_exceeded"),
    "stream": (lambda: streaming(sse({"error": {"message": "no", "code": "rate_limited"}})),
               GPT, 4, None, "rate_limited"),
}  # fmt: skip


@pytest.mark.parametrize("name", COPILOT_RESTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_copilot_limits_rests_for_as_long_as_it_said(
    trio: Trio, name: str, stream: bool
) -> None:
    make, model, most, passes, kind = COPILOT_RESTS[name]
    trio.copilot.queue(make())
    first = trio.ask(CHAT, "single", stream=stream)
    assert first.status == (503 if kind == "overloaded" else 429)
    assert len(trio.copilot.calls) == 1
    (rest,) = trio.cooldowns("copilot")
    assert (rest["model"], rest["kind"], rest["probing"]) == (model, kind, False)
    assert most - 5 <= rest["seconds"] <= most
    assert rest["reason"].startswith(error(first)["message"][:20])
    if passes is None:
        assert rest["recovers_at"] is None
    else:
        assert close_to(rest["recovers_at"], time.time() + passes)
    again = trio.ask(MESSAGES, "single", "again")
    assert again.status in (429, 529)
    assert error(again)["message"] == error(first)["message"]
    assert len(trio.copilot.calls) == 1
    other = trio.ask(CHAT, f"copilot/{SONNET}")
    assert other.status == (429 if model == "*" else 200)


#: name -> (refusal, model or "*", at most so many seconds of rest, passes after or None, kind)
KIRO_RESTS: dict[str, tuple[Callable[[], Answer], str, int, float | None, str]] = {
    "seconds": (lambda: kiro_no(429, "slow", None, "ThrottlingException", Retry_After="42"),
                "*", 42, 42, "rate_limited"),
    "date": (lambda: kiro_no(429, "no", None, "ThrottlingException", Retry_After=http_date(3600)),
             "*", 60, 3600, "rate_limited"),
    "hour": (lambda: kiro_no(429, "60-minute credit limit exceeded", None, "ThrottlingException"),
             "*", 60, None, "rate_limited"),
    "day": (lambda: kiro_no(429, "no", "DAILY_REQUEST_COUNT", "ThrottlingException"),
            "*", 60, None, "quota_exceeded"),
    "month": (lambda: kiro_no(402, "no", "MONTHLY_REQUEST_COUNT", "ServiceQuotaExceededException"),
              "*", 60, None, "quota_exceeded"),
    "month, 429": (lambda: kiro_no(429, "You have reached the limit.", None, "", Retry_After="30"),
                   "*", 30, 30, "quota_exceeded"),
    "bare 402": (lambda: kiro_no(402), "*", 60, None, "quota_exceeded"),
    "suspended": (lambda: kiro_no(403, "no", "TEMPORARILY_SUSPENDED", "AccessDeniedException"),
                  "*", 60, None, "forbidden"),
    "capacity": (lambda: kiro_no(429, "no", "INSUFFICIENT_MODEL_CAPACITY", "ThrottlingException",
                                 Retry_After="42"), SONNET, 42, 42, "overloaded"),
    "frame": (lambda: Answer(200, {}, [exception_frame(
        "ThrottlingException", {"message": "no", "reason": "MONTHLY_REQUEST_COUNT"})]),
        "*", 60, None, "quota_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", KIRO_RESTS)
def test_what_kiro_limits_rests_for_as_long_as_it_said(trio: Trio, name: str) -> None:
    make, model, most, passes, kind = KIRO_RESTS[name]
    trio.kiro.queue(make())
    first = trio.ask(CHAT, f"kiro/{SONNET}")
    assert first.status in (403, 429, 503)
    assert len(trio.kiro.calls) == 1
    (rest,) = trio.cooldowns("kiro")
    assert (rest["model"], rest["kind"], rest["probing"]) == (model, kind, False)
    assert most - 5 <= rest["seconds"] <= most
    if passes is None:
        assert rest["recovers_at"] is None
    else:
        assert close_to(rest["recovers_at"], time.time() + passes)
    again = trio.ask(CHAT, f"kiro/{SONNET}", "again", stream=True)
    assert (again.status, len(trio.kiro.calls)) == (first.status, 1)
    other = trio.ask(CHAT, "kiro/claude-opus-4.8")
    assert other.status == (first.status if model == "*" else 200)


def test_a_limit_of_one_conversation_rests_nobody(trio: Trio) -> None:
    no = kiro_no(402, "x", "CONVERSATION_LIMIT_EXCEEDED", "ServiceQuotaExceededException")
    trio.kiro.queue(no)
    assert trio.ask(CHAT, f"kiro/{SONNET}").status == 429
    assert trio.cooldowns("kiro") == []
    assert trio.ask(CHAT, f"kiro/{SONNET}").status == 200


def test_spent_credits_of_copilot_are_told_with_the_day_they_come_back(trio: Trio) -> None:
    trio.gateway.control("config.set", key="providers.copilot.account_type", value="business")
    trio.copilot.resets_at = time.time() + 5 * 86_400  # of a new provider, which has not asked yet
    trio.copilot.queue(copilot_no(402, "You have no quota", "quota_exceeded"))
    day = time.strftime("%Y-%m-%d", time.gmtime(trio.copilot.resets_at))
    for _ in range(2):
        reply = trio.ask(CHAT, "single")
        assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
        assert f"come back on {day}" in error(reply)["message"]
    (rest,) = trio.cooldowns("copilot")
    assert close_to(rest["recovers_at"], trio.copilot.resets_at)
    assert rest["seconds"] <= 60
    asked = [seen.path for seen in trio.copilot.requests].count("/copilot_internal/user")
    trio.copilot.queue(copilot_no(402, "You have no quota", "quota_exceeded"))
    assert day in error(trio.ask(CHAT, f"copilot/{SONNET}"))["message"]
    assert [s.path for s in trio.copilot.requests].count("/copilot_internal/user") == asked == 1


@pytest.mark.parametrize("how", ["402", "429 thrice"])
def test_spent_credits_of_kiro_are_told_with_the_day_they_come_back(trio: Trio, how: str) -> None:
    before = trio.kiro.usage_limits
    spent = json.loads(json.dumps(before))
    row = spent["usageBreakdownList"][0]
    for part in (row, row["freeTrialInfo"], *row["bonuses"]):
        part["currentUsage"] = part["currentUsageWithPrecision"] = part["usageLimit"]
    resets_at = row["nextDateReset"]
    no = kiro_no(402, "x", "MONTHLY_REQUEST_COUNT", "ServiceQuotaExceededException")
    if how != "402":
        no = kiro_no(429, "Too many requests", None, "ThrottlingException", Retry_After="0")
    trio.kiro.usage_limits = spent
    try:
        for _ in range(1 if how == "402" else 3):
            trio.kiro.queue(no)
        reply = trio.ask(MESSAGES, f"kiro/{SONNET}")
        assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
        day = time.strftime("%Y-%m-%d", time.gmtime(resets_at))
        assert f"come back on {day}" in error(reply)["message"]
        (rest,) = trio.cooldowns("kiro")
        assert close_to(rest["recovers_at"], resets_at)
        assert (rest["model"], rest["kind"]) == ("*", "quota_exceeded")
    finally:
        trio.kiro.usage_limits = before


def test_a_limit_that_names_no_time_makes_the_model_rest_briefly(trio: Trio) -> None:
    for _ in range(3):
        trio.copilot.queue(copilot_no(429, "slow down", "rate_limited", Retry_After="0"))
    reply = trio.ask(CHAT, "single")
    assert (reply.status, reply.headers["retry-after"]) == (429, "4")
    (rest,) = trio.cooldowns("copilot")
    assert (rest["model"], rest["recovers_at"]) == (GPT, None)
    assert 1 <= rest["seconds"] <= 4


def test_embeddings_rest_as_well(trio: Trio) -> None:
    body = {"model": "copilot/text-embedding-3-small", "input": "a"}
    trio.copilot.queue(copilot_no(429, "slow down", "rate_limited", Retry_After=LONG))
    for _ in range(2):
        assert trio.gateway.request("POST", "/v1/embeddings", body).status == 429
    assert len(trio.copilot.calls) == 1
    assert trio.cooldowns("copilot")[0]["model"] == "text-embedding-3-small"
    assert trio.ask(CHAT, "single").status == 200


# ---- the end of a rest ---------------------------------------------------------------------------


def rested(trio: Trio, times: int = 1) -> None:
    """Makes a model rest for a second, and waits until that is over."""
    for _ in range(times):
        trio.copilot.queue(copilot_no(402, "You have no quota", "quota_exceeded", Retry_After="1"))
        assert trio.ask(CHAT, "single").status == 429
        assert trio.cooldowns("copilot")
        assert until(lambda: not trio.cooldowns("copilot"))
    trio.copilot.calls.clear()


def probe(trio: Trio, answer: Answer) -> Wire:
    """A request that finds out and gets this answer, on its way."""
    trio.copilot.queue(answer)
    wire = trio.gateway.wire()
    wire.send(trio.gateway.request_bytes("POST", CHAT, asking("probe", "single")))
    assert trio.copilot.wait_calls(1)
    return wire


def held(answer: Answer) -> tuple[Answer, threading.Event]:
    """An answer that waits until it is let go."""
    go = threading.Event()
    return Answer(0, {}, [b"", *whole_answer(answer)], pause=go, then="close"), go


def whole_answer(answer: Answer) -> list[bytes]:
    """An answer with its head, as one piece."""
    body = b"".join(answer.pieces())
    head = f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    return [head.encode() + b"Connection: close\r\n\r\n" + body]


def good_answer() -> Answer:
    """A short stream."""
    return streaming(b"".join(pieces(CHAT, GPT)))


def test_after_a_rest_one_request_finds_out_while_others_are_told_to_wait(trio: Trio) -> None:
    rested(trio)
    answer, go = held(good_answer())
    with probe(trio, answer) as wire:
        with ThreadPoolExecutor(8) as pool:
            others = list(pool.map(lambda at: trio.ask(CHAT, "single", f"{at}"), range(8)))
        assert {reply.status for reply in others} == {429}
        assert len(trio.copilot.calls) == 1
        (rest,) = trio.cooldowns("copilot")
        assert (rest["seconds"], rest["probing"]) == (0, True)
        go.set()
        assert wire.reply().status == 200
    assert trio.cooldowns("copilot") == []
    assert trio.ask(CHAT, "single").status == 200


def test_many_that_come_at_once_after_a_rest_are_one_call(trio: Trio) -> None:
    rested(trio)
    answer, go = held(copilot_no(402, "You have no quota", "quota_exceeded", Retry_After=LONG))
    trio.copilot.queue(answer)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(trio.ask, CHAT, "single", f"{at}") for at in range(8)]
        assert until(lambda: sum(reply.done() for reply in asked) == 7)
        go.set()
        assert {reply.result().status for reply in asked} == {429}
    assert len(trio.copilot.calls) == 1


def test_a_refusal_prolongs_the_rest(trio: Trio) -> None:
    rested(trio)
    trio.copilot.queue(copilot_no(402, "You have no quota", "quota_exceeded", Retry_After=LONG))
    assert [trio.ask(CHAT, "single").status for _ in range(3)] == [429, 429, 429]
    assert len(trio.copilot.calls) == 1
    assert 55 <= trio.cooldowns("copilot")[0]["seconds"] <= 60


def test_a_request_that_finds_nothing_out_leaves_it_to_the_next(trio: Trio) -> None:
    rested(trio)
    answer, _ = held(good_answer())
    probe(trio, answer).abort()
    assert trio.copilot.wait_cancelled()
    assert until(lambda: not trio.cooldowns("copilot"))
    trio.copilot.queue(copilot_no(400, "no", "invalid_value"))
    assert trio.ask(CHAT, "single").status == 400
    assert trio.ask(CHAT, "single").status == 200
    assert len(trio.copilot.calls) == 3


def story(steps: Callable[[gw.Breaker], None]) -> None:
    """Plays with cool-downs where there is a clock."""

    async def play() -> None:
        steps(gw.Breaker())

    asyncio.run(play())


def end_rest(rests: gw.Breaker, model: str = "m", ago: float = 0.0) -> None:
    """Lets a rest have ended."""
    rest = rests.cooldowns[model]
    rest.until = asyncio.get_running_loop().time() - ago


def test_a_rest_without_a_time_grows_with_each_refusal_up_to_a_minute() -> None:
    def steps(rests: gw.Breaker) -> None:
        lengths = []
        for _ in range(6):
            lengths.append(rests.open("m", gw.RateLimited("no"), None))
            end_rest(rests)
        assert lengths == [4, 8, 16, 32, 60, 60]

    story(steps)


def test_refusals_at_the_same_time_do_not_make_a_rest_grow() -> None:
    def steps(rests: gw.Breaker) -> None:
        assert [rests.open("m", gw.RateLimited("no"), None) for _ in range(5)] == [4] * 5
        assert rests.open("m", gw.RateLimited("no"), 30.0) == 30
        rests.open("m", gw.RateLimited("no"), 2.0)
        assert rests.rows()[0]["seconds"] == 30  # the longer one counts

    story(steps)


def test_a_good_answer_lets_the_next_rest_begin_small() -> None:
    def steps(rests: gw.Breaker) -> None:
        for _ in range(4):
            rests.open("m", gw.RateLimited("no"), None)
            end_rest(rests)
        with rests.guarded("m"):
            assert rests.rows()[0]["probing"]
        assert rests.rows() == []
        assert rests.open("m", gw.RateLimited("no"), None) == 4

    story(steps)


def test_a_request_of_before_the_rest_does_not_end_it() -> None:
    def steps(rests: gw.Breaker) -> None:
        with rests.guarded("m"):
            rests.open("m", gw.RateLimited("no"), 30.0)
        with pytest.raises(gw.RateLimited):
            rests.check("m")

    story(steps)


def test_one_request_finds_out_for_its_model_and_the_account() -> None:
    def steps(rests: gw.Breaker) -> None:
        for model in ("m", ""):
            rests.open(model, gw.RateLimited("no"), 30.0)
            end_rest(rests, model)
        with rests.guarded("m"), pytest.raises(gw.RateLimited), rests.guarded("other"):
            pass
        assert rests.cooldowns == {}

    story(steps)


def test_what_has_ended_long_ago_needs_nobody_to_find_out() -> None:
    def steps(rests: gw.Breaker) -> None:
        rests.open("m", gw.RateLimited("no"), 30.0)
        end_rest(rests, ago=gw.MAX_COOLDOWN_SECONDS)
        with rests.guarded("m"), rests.guarded("m"):
            assert rests.rows() == []
        rests.open("m", gw.RateLimited("no", retry_after=7200.0), 60.0)
        end_rest(rests, ago=gw.MAX_COOLDOWN_SECONDS)  # but this one ought to last for two hours
        with rests.guarded("m"), pytest.raises(gw.RateLimited), rests.guarded("m"):
            pass

    story(steps)


def test_a_rest_is_told_with_the_time_that_is_left_of_it() -> None:
    def steps(rests: gw.Breaker) -> None:
        rests.open("m", gw.RateLimited("no", retry_after=7200.0), 7200.0)
        with pytest.raises(gw.RateLimited) as caught:
            rests.check("m")
        assert caught.value.retry_after == pytest.approx(7200, abs=5)
        rests.open("n", gw.QuotaExceeded("none left"), 60.0, 7200.0)
        with pytest.raises(gw.QuotaExceeded) as spent:
            rests.check("n")
        assert spent.value.retry_after is None  # no program should wait for that
        assert close_to(rests.rows()[1]["recovers_at"], time.time() + 7200)

    story(steps)


def test_cool_downs_are_shown_to_people() -> None:
    row = {
        "model": GPT, "seconds": 12, "reason": "Copilot's rate limit: no.", "probing": False,
        "recovers_at": None,
    }  # fmt: skip
    assert gw.format_cooldown(row) == f"{GPT}, 12 s: Copilot's rate limit: no."
    row |= {"model": "*", "probing": True, "recovers_at": time.time() + 7290}
    assert gw.format_cooldown(row) == (
        "all models, one request is probing: Copilot's rate limit: no."
        " Expected to recover in 2 h 1 min."
    )


def test_enabling_an_enabled_provider_ends_its_rests() -> None:
    """As a user does it: with the verb, while the gateway runs."""
    with FakeCopilot() as fake, Machine(config_of(fake)) as machine:
        folder = machine.config / "copilot"
        folder.mkdir(mode=0o700)
        file = folder / "token.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps({"type": "copilot", "github_token": fake.github_token}))
        status = machine.start()

        def ask() -> int:
            reply: Reply = fetch(status, CHAT, asking("hi", GPT))
            return reply.status

        fake.queue(copilot_no(429, "no", "user_weekly_rate_limited", Retry_After="183600"))
        assert [ask(), ask(), len(fake.calls)] == [429, 429, 1]
        (row,) = (row for row in machine.status()["providers"] if row["name"] == "copilot")
        assert [cooldown["model"] for cooldown in row["cooldowns"]] == ["*"]
        assert row["health"] == "cooling down"
        said = typed(machine, ["status"])
        assert "copilot: all models, " in said
        assert "Expected to recover in 2 d 2 h." in said
        assert machine.run("provider", "enable", "copilot").status == 0
        (row,) = (row for row in machine.status()["providers"] if row["name"] == "copilot")
        assert (row["cooldowns"], row["health"]) == ([], "ready")
        assert [ask(), len(fake.calls)] == [200, 2]
        assert fake.violations == []


def config_of(fake: FakeCopilot) -> str:
    """A configuration whose copilot is the imitation."""
    return f'[providers.copilot]\ngithub_url = "{fake.url}"\ngithub_api_url = "{fake.url}"\n'


# ---- lists ---------------------------------------------------------------------------------------

#: name -> (alias, who refuses, refusals, kind)
PASSED: dict[str, tuple[str, str, list[Callable[[], Answer]], str]] = {
    "limit": ("both", "copilot",
              [lambda: copilot_no(429, "no", "rate_limited", Retry_After=LONG)], "rate_limited"),
    "quota": ("both", "copilot", [lambda: copilot_no(402, "no", "quota_exceeded")],
              "quota_exceeded"),
    "busy": ("both", "copilot", [lambda: copilot_no(503, "no", Retry_After=LONG)], "overloaded"),
    "failure": ("both", "copilot", [lambda: copilot_no(500, "no")] * 3, "upstream_error"),
    "timeout": ("both", "copilot", [lambda: copilot_no(504, "no")] * 2, "upstream_timeout"),
    "no model": ("both", "copilot", [lambda: copilot_no(404, "no")], "model_not_found"),
    "in the stream": (
        "both", "copilot",
        [lambda: streaming(sse({"error": {"message": "no", "code": "rate_limited"}}))],
        "rate_limited"),
    "cut before a word": ("both", "copilot", [lambda: streaming(b"", then="close")],
                          "upstream_error"),
    "kiro's limit": (
        "swapped", "kiro",
        [lambda: kiro_no(429, "no", None, "ThrottlingException", Retry_After=LONG)],
        "rate_limited"),
    "kiro's credits": (
        "swapped", "kiro",
        [lambda: kiro_no(402, "no", "MONTHLY_REQUEST_COUNT", "ServiceQuotaExceededException")],
        "quota_exceeded"),
    "kiro's suspension": (
        "swapped", "kiro",
        [lambda: kiro_no(403, "no", "TEMPORARILY_SUSPENDED", "AccessDeniedException")],
        "forbidden"),
    "kiro's model": (
        "swapped", "kiro", [lambda: kiro_no(400, "no", "INVALID_MODEL_ID", "ValidationException")],
        "model_not_found"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
@EITHER
def test_the_next_of_a_list_answers_where_the_first_cannot(
    trio: Trio, name: str, path: str, stream: bool
) -> None:
    alias, who, refusals, kind = PASSED[name]
    fakes = {"copilot": trio.copilot, "kiro": trio.kiro}
    for make in refusals:
        fakes[who].queue(make())
    reply = trio.ask(path, alias, name, stream=stream)
    assert heard(reply).text
    other = {"copilot": "kiro", "kiro": "copilot"}[who]
    model = {"copilot": GPT, "kiro": SONNET}
    told = {key: reply.headers.get(f"x-aiclient-{key}") for key in ("provider", "model")}
    assert told == {"provider": other, "model": model[other]}
    assert reply.headers["x-aiclient-fallback-from"] == f"{who}/{model[who]} {kind}"
    assert (len(fakes[who].calls), len(fakes[other].calls)) == (len(refusals), 1)
    request = reply.headers["x-request-id"]
    line = f"fallback id={request} alias={alias} candidate={who}/{model[who]}"
    assert until(lambda: f"{line} kind={kind} reason=" in trio.gateway.log())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_next_answers_in_the_dialect_of_responses_too(trio: Trio, stream: bool) -> None:
    trio.copilot.queue(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    reply = trio.ask(RESPONSES, "both", stream=stream)
    assert (reply.status, reply.headers["x-aiclient-provider"]) == (200, "kiro")
    assert b'"completed"' in reply.body


@pytest.mark.parametrize(
    ("alias", "passed"),
    [
        ("unsigned", "work/gpt-4.1 not_signed_in"),
        ("away", "gone/claude-sonnet-4.5 upstream_error"),
        ("unknown", "no-such-model model_not_found"),
        ("off", ""),
    ],
)
def test_who_is_not_there_is_passed_over(trio: Trio, alias: str, passed: str) -> None:
    reply = trio.ask(CHAT, alias, stream=True)
    assert heard(reply).text
    assert reply.headers["x-aiclient-provider"] == ("copilot" if alias == "unsigned" else "echo")
    assert reply.headers.get("x-aiclient-fallback-from", "") == passed


def test_the_first_of_a_list_answers_where_it_can(trio: Trio) -> None:
    reply = trio.ask(MESSAGES, "both", stream=True)
    assert heard(reply).text
    assert reply.headers["x-aiclient-provider"] == "copilot"
    assert "x-aiclient-fallback-from" not in reply.headers
    assert (len(trio.copilot.calls), len(trio.kiro.calls)) == (1, 0)


#: of the request itself: (refusal, status)
FAULTS: dict[str, tuple[Callable[[], Answer], int]] = {
    "form": (lambda: copilot_no(400, "messages.0: no", "invalid_value"), 400),
    "too long": (lambda: copilot_no(400, "prompt token count of 9 exceeds the limit of 8",
                                    "model_max_prompt_tokens_exceeded"), 400),
    "too large": (lambda: copilot_no(413, "Request Entity Too Large"), 413),
    "filter": (lambda: copilot_no(422, "filtered"), 400),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@EITHER
def test_a_request_at_fault_is_told_so_and_nobody_else_is_asked(
    trio: Trio, name: str, path: str, stream: bool
) -> None:
    make, status = FAULTS[name]
    trio.copilot.queue(make())
    assert trio.ask(path, "both", stream=stream).status == status
    assert (len(trio.copilot.calls), len(trio.kiro.calls)) == (1, 0)


def test_a_body_that_no_model_takes_goes_nowhere(trio: Trio) -> None:
    reply = trio.gateway.request("POST", CHAT, {"model": "both", "messages": "x"})
    assert reply.status == 400
    assert (len(trio.copilot.calls), len(trio.kiro.calls)) == (0, 0)


@EITHER
def test_after_the_first_byte_nobody_else_is_asked(trio: Trio, path: str, stream: bool) -> None:
    said = pieces(CHAT, GPT)[:3]
    trio.copilot.queue(streaming(*said, sse({"error": {"message": "no", "code": "rate_limited"}})))
    reply = trio.ask(path, "both", stream=True)
    assert (reply.status, reply.headers["x-aiclient-provider"]) == (200, "copilot")
    assert stream_error(reply.body)["message"]
    assert trio.kiro.calls == []
    assert trio.cooldowns("copilot")[0]["model"] == GPT  # a limit all the same


def test_a_whole_answer_that_breaks_in_the_middle_is_asked_of_the_next(trio: Trio) -> None:
    """Nothing has gone to the caller."""
    trio.copilot.queue(streaming(*pieces(CHAT, GPT)[:3], then="close"))
    reply = trio.ask(CHAT, "both")
    assert heard(reply).text
    assert reply.headers["x-aiclient-provider"] == "kiro"


def test_who_rests_is_skipped_at_once(trio: Trio) -> None:
    trio.copilot.queue(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    for number in range(3):
        began = time.monotonic()
        reply = trio.ask(CHAT, "both", f"{number}", stream=True)
        assert reply.headers["x-aiclient-provider"] == "kiro"
        assert time.monotonic() - began < 2
    assert (len(trio.copilot.calls), len(trio.kiro.calls)) == (1, 3)


def test_while_one_request_finds_out_the_others_go_to_the_next(trio: Trio) -> None:
    rested(trio)
    answer, go = held(good_answer())
    with probe(trio, answer) as wire:
        assert trio.ask(CHAT, "both").headers["x-aiclient-provider"] == "kiro"
        go.set()
        assert wire.reply().status == 200
    assert trio.ask(CHAT, "both").headers["x-aiclient-provider"] == "copilot"


@EITHER
def test_when_all_fail_it_is_told_when_to_come_back_and_who_was_asked(
    trio: Trio, path: str, stream: bool
) -> None:
    trio.copilot.queue(copilot_no(402, "no quota", "quota_exceeded"))
    trio.kiro.queue(kiro_no(429, "slow", None, "ThrottlingException", Retry_After="42"))
    for _ in range(2):
        reply = trio.ask(path, "three", stream=stream)
        said = error(reply)
        assert reply.status == 429
        assert 35 <= int(reply.headers["retry-after"]) <= 42
        assert "x-should-retry" not in reply.headers
        assert "Kiro's rate limit" in said["message"]
        for name in ("copilot/gpt-4.1 (quota_exceeded)", "work/gpt-4.1 (not_signed_in)"):
            assert name in said["message"]
    assert (len(trio.copilot.calls), len(trio.kiro.calls)) == (1, 1)


def test_a_list_of_models_that_nobody_has_is_a_404(trio: Trio) -> None:
    reply = trio.ask(CHAT, "nowhere")
    assert (reply.status, error(reply)["code"]) == (404, "model_not_found")


def test_a_caller_who_leaves_is_followed_through_the_list(trio: Trio) -> None:
    """Nobody is asked for somebody who has gone."""
    no, go = held(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    trio.copilot.queue(no)
    wire = trio.gateway.wire()
    wire.send(trio.gateway.request_bytes("POST", CHAT, asking("hi", "both", stream=True)))
    assert trio.copilot.wait_calls(1)
    wire.abort()
    assert trio.copilot.wait_cancelled()
    go.set()
    assert not trio.kiro.wait_calls(1, 0.5)
    never = Answer(0, {}, [b"", b"x"], pause=threading.Event())
    trio.copilot.queue(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    trio.kiro.queue(never)
    wire = trio.gateway.wire()
    wire.send(trio.gateway.request_bytes("POST", CHAT, asking("hi", "both", stream=True)))
    assert trio.kiro.wait_calls(1)
    wire.abort()
    assert trio.kiro.wait_cancelled()


def test_each_attempt_is_counted_once(trio: Trio) -> None:
    trio.gateway.request("DELETE", "/v1/usage")
    trio.copilot.queue(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    assert trio.ask(CHAT, "both", stream=True).status == 200
    report = trio.gateway.request("GET", "/v1/usage").json()["providers"]
    counts = {
        name: (row["request_count"], row["error_count"]) for name, row in sorted(report.items())
    }
    assert counts == {"copilot": (1, 1), "kiro": (1, 0)}


def test_embeddings_go_to_the_next_as_well(trio: Trio) -> None:
    reply = trio.gateway.request("POST", "/v1/embeddings", {"model": "vectors", "input": "a"})
    assert (reply.status, reply.headers["x-aiclient-provider"]) == (200, "copilot")
    assert reply.headers["x-aiclient-fallback-from"] == "echo/echo invalid_request"


def test_a_cap_of_one_s_own_leads_to_the_next(trio: Trio) -> None:
    control = trio.gateway.control
    control("config.set", key="limits.providers.copilot.daily_tokens", value="1")
    try:
        trio.ask(CHAT, "copilot/gpt-4.1")
        reply = trio.ask(CHAT, "both", stream=True)
        assert heard(reply).text
        assert reply.headers["x-aiclient-fallback-from"] == "copilot/gpt-4.1 limit_reached"
        assert len(trio.copilot.calls) <= 1
    finally:
        control("config.set", key="limits.providers.copilot.daily_tokens", value="0")


@pytest.mark.parametrize("limit", ["", "[limits.providers.copilot]\ndaily_tokens = 1\n"])
def test_a_program_in_a_loop_is_counted_once_a_request_and_stopped_at_every_model(
    limit: str,
) -> None:
    with FakeCopilot() as copilot, FakeKiro() as kiro:
        config = CONFIG.format(copilot=copilot.url, kiro=kiro.url) + limit
        tokens = {
            "copilot": {"type": "copilot", "github_token": copilot.github_token},
            "kiro": kiro.token_file(),
        }
        env = {"AICLIENT_API_LIMITS_RUNAWAY_REQUESTS": "4"}
        with Gateway(config, tokens, env) as gateway:
            body = asking("the same", "both")
            asked = [gateway.request("POST", CHAT, body) for _ in range(6)]
        assert [reply.status for reply in asked] == [200, 200, 200, 200, 429, 429]
        assert "loop" in error(asked[-1])["message"]
        assert len(copilot.calls) == (1 if limit else 4)
        assert len(copilot.calls) + len(kiro.calls) == 4


# ---- what is listed and configured ---------------------------------------------------------------


def test_aliases_are_listed_with_what_they_lead_to(trio: Trio) -> None:
    rows = trio.gateway.request("GET", "/v1/models").json()["data"]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    assert by_id["both"]["alias_of"] == ["copilot/gpt-4.1", "kiro/claude-sonnet-4.5"]
    assert (by_id["both"]["provider"], by_id["swapped"]["provider"]) == ("copilot", "kiro")
    assert by_id["unsigned"]["provider"] == "copilot"  # who is not signed in is not shown
    assert by_id["single"]["context_window"] == by_id["both"]["context_window"]
    assert by_id[GPT]["alias_of"] == ["gpt-4.1", "echo/echo"]
    assert "alias_of" not in by_id["copilot/gpt-4.1"]  # its own name, while an alias has the short
    assert "nowhere" not in by_id
    for name in ("both", GPT):
        assert trio.gateway.request("GET", f"/v1/models/{name}").json() == by_id[name]
    assert trio.gateway.request("GET", "/v1/models/nowhere").status == 404


def test_an_alias_may_have_the_name_of_the_model_that_it_begins_with(trio: Trio) -> None:
    assert trio.ask(CHAT, GPT).headers["x-aiclient-provider"] == "copilot"
    trio.copilot.queue(copilot_no(429, "no", "rate_limited", Retry_After=LONG))
    assert trio.ask(CHAT, GPT).headers["x-aiclient-provider"] == "echo"


def test_a_list_is_set_with_commas_and_shown(trio: Trio) -> None:
    trio.gateway.control("config.set", key="models.new-1.5", value="copilot/gpt-4.1, echo/echo")
    shown = trio.gateway.control("config.show")["settings"]
    (row,) = (row for row in shown if row["key"] == "models.new-1.5")
    assert row["value"] == ["copilot/gpt-4.1", "echo/echo"]
    trio.copilot.queue(copilot_no(402, "no", "quota_exceeded"))
    assert trio.ask(CHAT, "new-1.5").headers["x-aiclient-provider"] == "echo"
    trio.gateway.control("config.set", key="models.new-1.5", value="echo/echo")
    assert heard(trio.ask(CHAT, "new-1.5")).text
    file = trio.gateway.config_folder / "config.toml"
    assert '"new-1.5" = "echo/echo"' in file.read_text()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[]", 'c.toml: models."a": must be like "copilot/gpt-4.1", or a list of such names'),
        ("5", 'c.toml: models."a": must be like "copilot/gpt-4.1", or a list of such names'),
        ('""', 'c.toml: models."a": must be like'),
        ('"copilot/"', 'c.toml: models."a": must be like'),
        ('"two words"', 'c.toml: models."a": must be like'),
        ('["copilot/gpt-4.1", 5]', 'c.toml: models."a": must be like "copilot/gpt-4.1"'),
        ('["a,b"]', 'c.toml: models."a": must be like'),
        ("{ x = 1 }", 'c.toml: models."a": must be like'),
    ],
)
def test_what_an_alias_cannot_lead_to_is_named(value: str, problem: str) -> None:
    with pytest.raises(gw.ConfigError) as caught:
        gw.read_config_text(f"[models]\na = {value}\n", "c.toml")
    assert str(caught.value).startswith(problem)
