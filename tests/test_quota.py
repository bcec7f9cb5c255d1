"""What is left of a plan: read from both services, kept up while they are used, warned of."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from fake_kiro import Answer as KiroAnswer
from fake_kiro import FakeKiro, default_usage
from fakes import QUOTA_HEADERS, Answer, FakeCopilot, default_user, dump
from machine import Machine, fetch, wait_until
from support import PROGRAM

import aiclient_api as gw

Json = dict[str, Any]
NOW = 1_795_000_000.0
DAY = 86400.0
DECEMBER = 1_796_083_200.0
GPT, SONNET = "copilot/gpt-4.1", "kiro/claude-sonnet-4.5"


# ---- Copilot: the account (facts 8.1) ------------------------------------------------------------


def premium(**changes: Any) -> gw.Allowance | None:
    """The bucket that costs money, of a paying account's answer with these changes."""
    body = copy.deepcopy(default_user())
    body["quota_snapshots"]["premium_interactions"].update(changes)
    rows = {row.name: row for row in gw.read_copilot_quota(body).allowances}
    return rows.get("premium_interactions")


def test_a_paying_account_is_read_whole() -> None:
    quota = gw.read_copilot_quota(default_user())
    assert (quota.account, quota.plan, quota.resets_at) == ("octocat", "individual_pro", DECEMBER)
    chat, completions, row = quota.as_json()["allowances"]
    assert chat["unlimited"] and completions["unlimited"] and chat["percent_used"] is None
    assert row == {
        "name": "premium_interactions", "used": pytest.approx(289.6), "limit": 1500,
        "remaining": 1210.4, "unlimited": False, "unit": "credits", "percent_used": 19.31,
        "resets_at": DECEMBER, "overage_permitted": True, "overage_used": 0, "overage_limit": 5000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of_row", "of_account", "unit"),
    [
        (True, False, "credits"),
        (False, True, "premium requests"),
        (None, True, "credits"),
        (None, False, "premium requests"),
        (None, None, ""),
        ("no", None, ""),
    ],
)
def test_token_based_billing_decides_the_unit(of_row: Any, of_account: Any, unit: str) -> None:
    body = copy.deepcopy(default_user())
    body["token_based_billing"] = of_account
    for row in body["quota_snapshots"].values():
        row["token_based_billing"] = of_row
    units = {row.name: row.unit for row in gw.read_copilot_quota(body).allowances}
    assert units["premium_interactions"] == unit
    assert (units["chat"], units["completions"]) == ("messages", "completions")


def test_a_bucket_that_does_not_apply_is_never_all_used_up() -> None:
    assert premium(entitlement=0, has_quota=False, percent_remaining=0) is None
    assert premium(entitlement=0, has_quota=True, percent_remaining=0) is None
    assert premium(entitlement=None, has_quota=False) is None


def test_no_limit_is_a_flag_or_minus_one() -> None:
    for change in ({"unlimited": True}, {"entitlement": -1}, {"entitlement": "-1"}):
        row = premium(**change)
        assert row and row.limit == math.inf and row.percent_used is None, change


@pytest.mark.parametrize(
    ("changes", "used", "left", "percent"),
    [
        ({}, 289.6, 1210.4, 19.3),
        ({"quota_remaining": None}, 290, 1210, 19.3),
        ({"quota_remaining": None, "remaining": None}, 289.5, 1210.5, 19.3),
        ({"quota_remaining": None, "remaining": None, "percent_remaining": None}, 289.6, 1210.4,
         19.3),
        ({"entitlement": "1500", "quota_remaining": "1210.4"}, 289.6, 1210.4, 19.3),
        ({"quota_remaining": -12.5}, 1512.5, 0, 100.8),
        ({"quota_remaining": 1600}, 0, 1600, 0),
        ({"entitlement": None}, None, 1210.4, 19.3),
    ],
)  # fmt: skip
def test_every_figure_may_be_missing(
    changes: Json, used: float | None, left: float, percent: float
) -> None:
    row = premium(**changes)
    assert row and row.percent_used is not None
    assert row.used == (None if used is None else pytest.approx(used))
    assert row.remaining == pytest.approx(left)
    assert row.percent_used == pytest.approx(percent, abs=0.05)


def test_a_bucket_may_have_a_date_of_its_own() -> None:
    body = copy.deepcopy(default_user())
    body["quota_snapshots"]["premium_interactions"]["quota_reset_at"] = DECEMBER + DAY
    body["quota_snapshots"]["chat"]["quota_reset_at"] = 0
    quota = gw.read_copilot_quota(body)
    dates = {row["name"]: row["resets_at"] for row in quota.as_json()["allowances"]}
    assert dates["premium_interactions"] == DECEMBER + DAY
    assert dates["chat"] == quota.resets_at == DECEMBER


def test_a_free_plan_is_told_by_its_sku_and_may_name_only_what_is_left() -> None:
    body = {"copilot_plan": "individual", "access_type_sku": "free_limited_copilot",
            "quota_snapshots": None, "limited_user_quotas": {"chat": 10, "completions": "x"},
            "limited_user_reset_date": "2026-12-05"}  # fmt: skip
    quota = gw.read_copilot_quota(body)
    assert quota.plan == "free" and gw.iso_day(quota.resets_at) == "2026-12-05"
    (row,) = quota.allowances
    assert (row.name, row.limit, row.remaining, row.percent_used) == ("chat", None, 10, None)


# ---- Copilot: header fields (facts 8.3) ----------------------------------------------------------

PREMIUM = "x-quota-snapshot-premium_interactions"


def heard(known: gw.Quota | None, **changes: str | None) -> dict[str, gw.Allowance]:
    """The allowances after an answer with the usual fields, changed."""
    named = {f"x-quota-snapshot-{name}": text for name, text in changes.items()}
    fields = {k: v for k, v in {**QUOTA_HEADERS, **named}.items() if v is not None}
    found = gw.quota_fields(gw.Headers({"x-request-id": "1", "x-quota": "ent=1", **fields}))
    assert set(found) == set(fields)
    return {row.name: row for row in gw.apply_quota_headers(known, found, NOW).allowances}


def test_the_fields_of_an_answer_are_read() -> None:
    rows = heard(None)
    assert list(rows) == ["chat", "completions", "premium_interactions", "session", "weekly"]
    assert rows["chat"].limit == rows["completions"].limit == math.inf
    row = rows["premium_interactions"]
    assert (row.limit, row.remaining, row.resets_at) == (1500, 1210.4, DECEMBER)
    assert row.used == pytest.approx(289.6)
    assert (row.overage_permitted, row.overage_used) == (True, 0)
    assert rows["session"].percent_used == pytest.approx(2.5) and rows["weekly"].limit == 5000


def test_what_the_account_said_stays_where_the_fields_say_nothing() -> None:
    known = gw.read_copilot_quota(default_user())
    row = heard(known, premium_interactions="ent=1500&rem=50.0&rst=")["premium_interactions"]
    assert (row.unit, row.overage_limit, row.resets_at) == ("credits", 5000, DECEMBER)
    assert (row.used, row.remaining) == (750, 750)


def test_missing_fields_erase_nothing_and_a_bucket_of_nothing_goes() -> None:
    known = gw.read_copilot_quota(default_user())
    rows = heard(known, premium_interactions=None, chat="ent=0&rem=0.0")
    assert rows["premium_interactions"].remaining == 1210.4
    assert "chat" not in rows
    quota = gw.apply_quota_headers(known, {}, NOW)
    assert (quota.plan, quota.account, quota.as_of) == ("individual_pro", "octocat", NOW)


@pytest.mark.parametrize(
    "text",
    [
        "", "ent=1500", "rem=80", "ent=x&rem=80", "ent=1500&rem=nan", "ent=1500&rem=",
        "ent=1500&rem=inf", "ent=-7&rem=80", "ent=1500&rem=80&totRem=lots", "ent=1e9&rem=80",
        "ent=1500&rem=80&ov=?", "ent=1500, ent=1500&rem=80", "&".join("ent=1" for _ in range(99)),
    ],
)  # fmt: skip
def test_a_damaged_bucket_is_passed_over_and_the_others_count(text: str) -> None:
    known = gw.read_copilot_quota(default_user())
    rows = heard(known, premium_interactions=text, future="ent=10&rem=30.0")
    assert rows["premium_interactions"].remaining == 1210.4
    assert rows["future"].used == pytest.approx(7)
    assert "premium_interactions" not in heard(None, premium_interactions=text)


def test_two_names_of_one_bucket_are_one() -> None:
    known = gw.read_copilot_quota(default_user())
    rows = heard(known, premium_interactions=None, premium_models="ent=1500&rem=10.0&totRem=150")
    assert rows["premium_interactions"].remaining == 150 and "premium_models" not in rows


def test_names_that_never_end_are_not_all_kept() -> None:
    many = {f"x-quota-snapshot-b{n}": "ent=10&rem=50" for n in range(100)}
    known = gw.apply_quota_headers(None, QUOTA_HEADERS, NOW)
    quota = gw.apply_quota_headers(known, many, NOW)
    assert len(quota.allowances) == gw.MAX_ALLOWANCES
    assert quota.allowances[2].name == "premium_interactions"


def test_a_rolling_window_has_a_date_of_its_own() -> None:
    later = {"x-usage-ratelimit-weekly": "ent=5000&rem=90.0&rst=2026-12-05T00%3A00%3A00Z"}
    quota = gw.apply_quota_headers(None, {**QUOTA_HEADERS, **later}, NOW)
    dates = {row["name"]: row["resets_at"] for row in quota.as_json()["allowances"]}
    assert quota.resets_at == dates["premium_interactions"] == DECEMBER
    assert dates["session"] < DECEMBER < dates["weekly"]


# ---- Kiro (facts 7.1) ----------------------------------------------------------------------------


def kiro(change: Callable[[Json, Json], None] | None = None) -> gw.Quota:
    """A paying account's plan, after a change to the answer and its row."""
    body = default_usage(NOW)
    if change:
        change(body, body["usageBreakdownList"][0])
    return gw.read_kiro_quota(body, NOW)


def test_kiros_credits_are_one_allowance_with_its_parts() -> None:
    quota = kiro()
    assert (quota.plan, quota.resets_at, quota.as_of) == ("KIRO PRO", NOW + 12 * DAY, NOW)
    (row,) = quota.as_json()["allowances"]
    assert row["parts"] == [
        {"name": "plan", "used": 125.37, "limit": 1000, "ends_at": None},
        {"name": "free trial", "used": 50.2, "limit": 500, "ends_at": NOW + 5 * DAY},
        {"name": "Welcome", "used": 0, "limit": 100, "ends_at": NOW + 30 * DAY},
    ]
    assert (row["used"], row["limit"], row["unit"]) == (pytest.approx(175.57), 1600, "credits")
    assert (row["overage_permitted"], row["overage_limit"]) == (False, 10000)
    assert row["percent_used"] == 10.97


def test_kiros_overage_is_told() -> None:
    def overdraw(body: Json, row: Json) -> None:
        body["overageConfiguration"]["overageStatus"] = "ENABLED"
        row.update(currentOverages=3, currentOveragesWithPrecision=3.25)

    (row,) = kiro(overdraw).allowances
    assert (row.overage_permitted, row.overage_used) == (True, 3.25)


def test_kiros_plan_alone_has_no_parts_and_dates_may_be_words() -> None:
    def reduce(body: Json, row: Json) -> None:
        row["freeTrialInfo"] = row["bonuses"] = None
        row["nextDateReset"] = "2026-12-01T00:00:00Z"
        del body["overageConfiguration"]

    quota = kiro(reduce)
    (row,) = quota.allowances
    assert quota.resets_at == DECEMBER
    assert (row.parts, row.overage_permitted) == ([], None)
    assert "parts" not in quota.as_json()["allowances"][0]


@pytest.mark.parametrize("body", [{}, {"usageBreakdownList": "x"}, {"usageBreakdownList": [{}]}])
def test_kiro_that_says_nothing_of_credits_allows_nothing(body: Json) -> None:
    named = {**body, "subscriptionInfo": {"subscriptionTitle": "KIRO FREE"}}
    quota = gw.read_kiro_quota(named, NOW)
    assert (quota.plan, quota.allowances) == ("KIRO FREE", [])


# ---- warnings ------------------------------------------------------------------------------------


def plan_at(percent: float, *, resets_at: float = DECEMBER, limit: float | None = 1500) -> gw.Quota:
    """A plan of which so much is used."""
    used = None if limit is None or limit == math.inf else limit * percent / 100
    left = None if limit is None or used is None else limit - used
    row = gw.Allowance("premium", used, limit, left, unit="credits")
    return gw.Quota("", "pro", [row], resets_at, as_of=NOW)


def told(alarm: gw.QuotaAlarm, *percents: float, now: float = NOW, **more: Any) -> list[bool]:
    """Whether each of these figures in turn is news."""
    return [bool(alarm.new_warnings(plan_at(percent, **more), now)) for percent in percents]


def test_each_threshold_is_told_once() -> None:
    alarm = gw.QuotaAlarm()
    assert told(alarm, 0, 79.99, 80, 80.1, 94.9, 95, 96, 99.9, 100, 100, 120) == [
        False, False, True, False, False, True, False, False, True, False, False,
    ]  # fmt: skip


def test_a_jump_over_both_is_told_once() -> None:
    assert told(gw.QuotaAlarm(), 50, 97, 97) == [False, True, False]
    text = gw.quota_warning("copilot", plan_at(97).allowances[0], DECEMBER)
    assert "97 %" in text and "80" not in text


def test_within_a_period_nothing_is_told_twice() -> None:
    assert told(gw.QuotaAlarm(), 81, 79, 81, 0, 94, 95, 80, 95) == [
        True, False, False, False, False, True, False, False,
    ]  # fmt: skip


def test_after_a_reset_all_is_told_again() -> None:
    alarm, later = gw.QuotaAlarm(), DECEMBER + 31 * DAY
    assert told(alarm, 96) == [True]
    assert told(alarm, 96, now=DECEMBER + 1) == [False]  # an answer from before the reset
    assert told(alarm, 1, 80, 96, now=DECEMBER + DAY, resets_at=later) == [False, True, True]
    assert told(alarm, 80, now=later + 1, resets_at=later + 31 * DAY) == [True]


def test_a_window_that_rolls_on_is_told_once_in_its_length() -> None:
    alarm, length = gw.QuotaAlarm(), 5 * 3600.0
    told_at = [
        minute
        for minute in range(24 * 60)
        if any(told(alarm, 85, now=NOW + 60 * minute, resets_at=NOW + 60 * minute + length))
    ]
    assert told_at == [0, 300, 600, 900, 1200]


def test_where_no_date_is_known_a_fall_begins_a_period() -> None:
    alarm = gw.QuotaAlarm()
    assert told(alarm, 96, 85, 96, 2, 85, resets_at=0.0) == [True, False, True, False, True]


def test_a_clock_that_is_ahead_repeats_nothing() -> None:
    assert told(gw.QuotaAlarm(), 85, 86, 87, now=DECEMBER + DAY) == [True, False, False]


@pytest.mark.parametrize("limit", [None, math.inf, 0.0])
def test_what_has_no_limit_is_never_told(limit: float | None) -> None:
    assert told(gw.QuotaAlarm(), 100, limit=limit) == [False]
    assert gw.quota_warnings("p", plan_at(100, limit=limit), NOW) == []


def test_warnings_are_sentences_for_people() -> None:
    def of(percent: float, **changes: Any) -> str:
        quota = plan_at(percent)
        for name, value in changes.items():
            setattr(quota.allowances[0], name, value)
        (text,) = gw.quota_warnings("work", quota, NOW)
        return text

    assert of(81) == "work: 81 % of premium used, 285 of 1,500 credits left, resets on 2026-12-01"
    assert of(99.9).startswith("work: 99 % of premium used, 1.5 of 1,500 credits left")
    empty = "work: premium: used up, nothing left of 1,500 credits, resets on 2026-12-01"
    assert of(100) == empty
    assert of(100, overage_permitted=True) == empty + "; further use is billed"
    bare = {"limit": None, "used": None, "remaining": None, "percent_left": 4.0, "unit": ""}
    assert of(0, **bare) == "work: 96 % of premium used, resets on 2026-12-01"


def test_a_period_that_is_over_warns_of_nothing() -> None:
    assert gw.quota_warnings("p", plan_at(99), DECEMBER - 1)
    assert not gw.quota_warnings("p", plan_at(99), DECEMBER)
    assert not gw.quota_warnings("p", plan_at(79.9), NOW)
    assert not gw.quota_warnings("p", None, NOW)
    quota = plan_at(99)
    quota.as_of = DECEMBER + 1  # it was said after that date: one of both clocks is wrong
    assert gw.quota_warnings("p", quota, DECEMBER + 2)


def test_a_day_beyond_the_calendar_is_none() -> None:
    assert [gw.iso_day(at) for at in (0.0, DECEMBER, 1e18)] == ["", "2026-12-01", ""]


# ---- keeping it up -------------------------------------------------------------------------------


class Service:
    """A service that is asked what is left; `asked` is set with each question."""

    def __init__(self, error: gw.ApiError | None = None) -> None:
        self.error = error
        self.count = 0
        self.asked = asyncio.Event()
        self.watch = gw.QuotaWatch("p", self.ask)

    async def ask(self) -> gw.Quota | None:
        """Its answer."""
        self.count += 1
        self.asked.set()
        if self.error is not None:
            raise self.error
        return self.watch.update(plan_at(50))

    async def hear(self) -> None:
        """Waits for a question and its answer."""
        await asyncio.wait_for(self.asked.wait(), 20)
        assert self.watch.task is not None
        await asyncio.wait((self.watch.task,), timeout=20)
        self.asked.clear()

    def planned_s(self) -> float | None:
        """Seconds until the next look; None where none is planned."""
        watch = self.watch
        if watch.task is None or watch.task.done():
            return None
        return watch.poll_at - asyncio.get_running_loop().time()


def test_a_first_use_is_followed_by_a_look_and_more_use_by_few() -> None:
    async def story() -> None:
        service = Service()
        watch = service.watch
        assert service.planned_s() is None  # nobody asks for what nobody uses
        watch.soon_s = 0.0
        for _ in range(100):
            watch.poll_soon()
        await service.hear()
        assert (service.count, watch.latest and watch.latest.plan) == (1, "pro")
        assert service.planned_s() is None
        watch.poll_soon()
        left = service.planned_s()
        assert left is not None and left > gw.QUOTA_POLL_SECONDS - 30
        watch.close()
        assert service.planned_s() is None

    asyncio.run(story())


def test_spent_credits_are_looked_at_at_once_but_not_all_the_time() -> None:
    async def story() -> None:
        service = Service()
        watch = service.watch
        watch.poll_soon()
        watch.on_error(gw.RateLimited("slowly"))
        left = service.planned_s()
        assert left is not None and left > 1
        watch.soon_s = 0.05
        watch.on_error(gw.QuotaExceeded("no more"))
        await service.hear()
        watch.poll_soon()
        watch.on_error(gw.QuotaExceeded("no more"))
        left = service.planned_s()
        assert left is not None and gw.QUOTA_RETRY_SECONDS - 30 < left <= gw.QUOTA_RETRY_SECONDS
        assert service.count == 1
        watch.close()

    asyncio.run(story())


def test_a_look_in_vain_is_quiet_and_forgets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        service = Service(gw.Overloaded("not now"))
        watch = service.watch
        watch.update(plan_at(50))
        watch.polled_at = float("-inf")
        watch.soon_s = 0.0
        watch.poll_soon()
        await service.hear()
        assert watch.latest and service.planned_s() is None
        watch.poll_soon()
        left = service.planned_s()
        assert left is not None and left > 60  # nor is it asked the faster
        watch.close()

    with caplog.at_level("DEBUG", "aiclient-api"):
        asyncio.run(story())
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


def test_a_new_account_begins_anew_also_when_a_look_finds_it() -> None:
    async def story() -> None:
        service = Service()
        watch = service.watch

        async def ask() -> gw.Quota | None:
            watch.reset()  # as the token file has changed
            await asyncio.sleep(0)
            return await service.ask()

        watch.fetch, watch.soon_s = ask, 0.0
        watch.update(plan_at(99))
        watch.reset()
        assert watch.latest is None and watch.alarm.reported == {}
        watch.poll_soon()
        await service.hear()
        assert watch.latest is not None

    asyncio.run(story())


def test_fields_that_did_not_change_are_not_read_again(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        watch = Service().watch
        watch.update(gw.read_copilot_quota(default_user()))
        low = {**QUOTA_HEADERS, PREMIUM: "ent=1500&rem=4.0&totRem=60"}
        watch.update_from_headers(gw.Headers(low))
        first = watch.latest
        assert first and watch.task is None  # the fields are enough
        first.as_of = 1.0
        watch.update_from_headers(gw.Headers({"date": "now", **low}))
        assert watch.latest is first and first.as_of > 1.0
        watch.update_from_headers(gw.Headers({"date": "now"}))
        assert watch.latest is first and watch.task is not None  # an older service
        watch.close()

    with caplog.at_level("DEBUG", "aiclient-api"):
        asyncio.run(story())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "percent=96 left=60 unit=credits resets=2026-12-01" in line


def test_an_answer_without_a_full_one_before_asks_for_plan_and_unit() -> None:
    async def story() -> None:
        watch = Service().watch
        watch.update_from_headers(gw.Headers(QUOTA_HEADERS))
        assert watch.latest and watch.latest.plan == "" and watch.task is not None
        watch.close()

    asyncio.run(story())


# ---- the program between both services -----------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


class Home:
    """A machine that is signed in to imitations of both services."""

    def __init__(self, stack: ExitStack) -> None:
        self.copilot = stack.enter_context(FakeCopilot())
        self.kiro = stack.enter_context(FakeKiro())
        config = f'[providers.copilot]\ngithub_url = "{self.copilot.url}"\n'
        config += f'github_api_url = "{self.copilot.url}"\n[providers.kiro]\n'
        names = ("api_url", "management_url", "oidc_url", "auth_url")
        config += "".join(f'{name} = "{self.kiro.url}"\n' for name in names)
        self.machine = stack.enter_context(Machine(config))
        github = {"type": "copilot", "github_token": self.copilot.github_token}
        for name, token in (("copilot", github), ("kiro", self.kiro.token_file())):
            folder = self.machine.config / name
            folder.mkdir(mode=0o700)
            (folder / "token.json").touch(mode=0o600)
            (folder / "token.json").write_text(json.dumps(token))
        self.status = self.machine.start()

    def ask(self, model: str) -> int:
        """The status of one answer."""
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        status: int = fetch(self.status, "/v1/chat/completions", body).status
        return status

    def known(self) -> Json:
        """What /v1/usage says is left."""
        quota: Json = fetch(self.status, "/v1/usage").json()["quota"]
        return quota

    def warnings(self) -> list[str]:
        """What `status` warns of."""
        warnings: list[str] = self.machine.status()["warnings"]
        return warnings

    def warned(self) -> list[str]:
        """The warnings in the log."""
        lines = self.machine.log().splitlines()
        return [line.partition("WARNING ")[2] for line in lines if " WARNING quota_" in line]

    def spend_kiro(self, share: float) -> None:
        """So much of Kiro's credits is gone."""
        row = self.kiro.usage_limits["usageBreakdownList"][0]
        for part in (row, row["freeTrialInfo"], *row["bonuses"]):
            part["currentUsage"] = part["currentUsageWithPrecision"] = share * part["usageLimit"]

    def looks(self) -> tuple[int, int]:
        """How often each service was asked what is left."""
        return (
            sum(seen.path == "/copilot_internal/user" for seen in self.copilot.requests),
            sum(seen.path.startswith("/getUsageLimits") for seen in self.kiro.requests),
        )


@contextmanager
def new_home() -> Iterator[Home]:
    """A home of one's own, whose services must have seen nothing odd."""
    with ExitStack() as stack:
        made = Home(stack)
        yield made
        assert (made.copilot.violations, made.kiro.violations) == ([], [])
        assert "Traceback" not in made.machine.log()


@pytest.fixture
def home() -> Iterator[Home]:
    """The same for one test."""
    with new_home() as made:
        yield made


def no_quota() -> Answer:
    """Copilot's refusal of an account without credits."""
    said = {"error": {"message": "You have no quota", "code": "quota_exceeded"}}
    return Answer(402, {}, dump(said), chunked=False, strict=False)


@needs_fork
def test_answers_tell_what_is_left_and_warn_once(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (home.ask(GPT), home.known()["copilot"]["allowances"][2]["remaining"]) == (200, 1210.4)
    assert home.warnings() == home.warned() == []
    home.copilot.quota_headers[PREMIUM] = "ent=1500&rem=4.0&rst=2026-12-01T00%3A00%3A00Z&totRem=60"
    assert [home.ask(GPT) for _ in range(3)] == [200, 200, 200]
    (line,) = home.warned()
    assert line.startswith("quota_low provider=copilot allowance=premium_interactions percent=96")
    assert "left=60" in line and line.endswith("resets=2026-12-01")
    (words,) = home.warnings()
    assert words.startswith("copilot: 96 % of premium_interactions used, 60 of 1,500")
    gw.print_status(home.machine.status())
    assert capsys.readouterr().out.endswith(f"warning: {words}\n")
    home.copilot.quota_headers.clear()  # what is missing erases nothing
    assert (home.ask(GPT), home.known()["copilot"]["allowances"][2]["remaining"]) == (200, 60)


@needs_fork
def test_a_refusal_for_want_of_credits_asks_what_is_left(home: Home) -> None:
    home.spend_kiro(1.0)
    home.kiro.out_of_credits = True
    home.copilot.user["quota_snapshots"]["premium_interactions"].update(quota_remaining=0.0)
    home.copilot.queue(no_quota())
    assert (home.ask(GPT), home.ask(SONNET)) == (429, 429)
    wait_until(lambda: len(home.warned()) == 2)
    assert all(line.startswith("quota_used_up provider=") for line in home.warned())
    copilot, kiro = sorted(home.warnings())
    assert copilot.startswith("copilot: premium_interactions: used up, nothing left of 1,500 cred")
    assert copilot.endswith("; further use is billed")
    assert kiro.startswith("kiro: credits: used up, nothing left of 1,600 credits, resets on ")
    assert home.known()["kiro"]["allowances"][0]["percent_used"] == 100
    home.copilot.queue(no_quota())
    home.ask(GPT)
    assert home.looks() == (1, 1) and len(home.warned()) == 2


def check_a_first_use(home: Home) -> None:
    home.spend_kiro(0.85)
    home.copilot.quota_headers.clear()
    assert (home.ask(GPT), home.ask(SONNET), home.ask(SONNET)) == (200, 200, 200)
    assert (home.looks(), home.known()) == ((0, 0), {})  # nobody waited for it
    wait_until(lambda: len(home.known()) == 2)
    assert home.looks() == (1, 1)
    known = home.known()
    assert (known["copilot"]["plan"], known["kiro"]["plan"]) == ("individual_pro", "KIRO PRO")
    assert home.warnings() == [w for w in home.warnings() if w.startswith("kiro: 85 % of credits")]
    assert len(home.warnings()) == 1


def check_silent_services(home: Home) -> None:
    """A service that does not tell hurts nothing."""
    for _ in range(20):
        home.kiro.usage_answers.append(KiroAnswer(500, {}, b"<html>", chunked=False, strict=False))
        home.copilot.user_answers.append(Answer(500, {}, b"Unicorn!", chunked=False, strict=False))
    home.copilot.quota_headers.clear()
    home.kiro.out_of_credits = True
    home.copilot.queue(no_quota())
    texts = {"model": "copilot/text-embedding-3-small", "input": "hi"}
    assert fetch(home.status, "/v1/embeddings", texts).status == 429
    assert home.ask(SONNET) == 429
    wait_until(lambda: home.looks()[0] > 0 and home.looks()[1] > 0)
    assert (home.ask(GPT), home.known(), home.warned()) == (200, {}, [])


@needs_fork
def test_both_are_asked_in_the_background_soon_after_a_first_use() -> None:
    """And no harm is done where they do not answer: both stories wait side by side."""
    with new_home() as first, new_home() as second, ThreadPoolExecutor(2) as pool:
        stories = [pool.submit(check_a_first_use, first)]
        stories.append(pool.submit(check_silent_services, second))
        for story in stories:
            story.result()


# ---- the verb ------------------------------------------------------------------------------------


@needs_fork
def test_quota_falls_back_to_what_was_last_known(home: Home) -> None:
    first = home.machine.run("quota").json()["providers"]
    assert set(first) == {"copilot", "kiro"} and "error" not in first["kiro"]
    for _ in range(9):
        home.kiro.usage_answers.append(KiroAnswer(500, {}, b"oops", chunked=False, strict=False))
    second = home.machine.run("quota").json()["providers"]
    kiro = second["kiro"]
    assert kiro.pop("error") and kiro == first["kiro"]
    assert second["copilot"]["as_of"] > first["copilot"]["as_of"]


def table(found: Json, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `quota` shows on a terminal."""
    gw.print_quota(found)
    return capsys.readouterr().out.splitlines()


def both(now: float) -> Json:
    """What the daemon answers of two services."""
    copilot = gw.read_copilot_quota(default_user())
    copilot.resets_at = 0.0
    for row in copilot.allowances:
        row.resets_at = now + 9 * DAY - 3600
    kiro = gw.read_kiro_quota(default_usage(now), now)
    return {"providers": {"copilot": copilot.as_json(), "kiro": kiro.as_json()}}


def test_both_plans_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = table(both(time.time()), capsys)
    assert head.split() == ["PROVIDER", "PLAN", "OF", "USED", "LEFT", "RESETS"]
    assert re.fullmatch(r"copilot +individual_pro +chat +- +no limit +\S+, 9 days", rows[0])
    premium = r"premium_interactions +19 %  \u2588\u2588 +1,210\.4 of 1,500 credits +\S+, 9 days"
    assert re.fullmatch(rf"copilot +individual_pro +{premium}", rows[2])
    assert re.fullmatch(r"kiro +KIRO PRO +credits .* 1,424\.43 of 1,600 credits +\S+, 12 days",
                        rows[3])  # fmt: skip
    assert [row.split("  ")[0].strip() for row in rows[4:]] == ["", "", ""]
    assert re.search(r"  free trial +10 % +\S+ +449\.8 of 500 +\S+, 5 days$", rows[5])


def test_what_is_old_or_not_known_is_said_below_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = both(time.time())
    found["providers"]["kiro"] |= {"error": "No answer.", "as_of": time.time() - 725}
    found["providers"]["copilot"]["allowances"][2]["overage_used"] = 12.5
    found["providers"]["other"] = {"error": "Not signed in."}
    lines = table(found, capsys)
    assert lines[-3] == "copilot: premium_interactions: 12.5 beyond the limit"
    assert re.fullmatch(r"kiro: No answer\.  The figures are 12 min \d+ s old\.", lines[-2])
    assert lines[-1] == "other: Not signed in." and not any(r.startswith("other ") for r in lines)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"limit": 1500.0, "remaining": 60.0, "unit": "credits"}, "60 of 1,500 credits"),
        ({"limit": None, "remaining": 60.0, "unit": None}, "60"),
        ({"limit": 50.0, "remaining": None, "unit": "messages"}, "? of 50 messages"),
        ({"limit": None, "remaining": None, "unit": "credits"}, "-"),
    ],
)
def test_as_much_is_shown_as_is_known(row: Json, shown: str) -> None:
    assert gw.format_remaining({"unlimited": False, **row}) == shown


def test_a_reset_says_how_far_it_is() -> None:
    shown = [
        gw.format_reset(at, NOW) for at in (None, NOW - 1, NOW + 7200, NOW + DAY, NOW + 2 * DAY)
    ]
    assert [text.partition(", ")[2] for text in shown] == ["", "", "2 h", "1 d", "2 days"]
    assert shown[0] == "-"


def test_a_terminal_without_blocks_gets_ascii() -> None:
    def shown(encoding: str) -> str:
        code = (
            "import aiclient_api as gw; print([gw.format_share(p) for p in (0, 55.5, 99.9, 130)])"
        )
        command = [sys.executable, "-c", code]
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            command, env=env, cwd=PROGRAM.parent, capture_output=True, check=True, timeout=30
        )
        return str(done.stdout.decode(encoding).strip())

    assert shown("ascii") == str(["  0 %  ", " 55 %  ######", " 99 %  ##########",
                                  "130 %  ##########"])  # fmt: skip
    assert "\u2588" * 5 in shown("utf-8")
