"""Usage: what answers cost, how it is kept in a real database, and what may be spent."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import os
import signal
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import Answer, FakeCopilot, default_models, dump, sse
from support import PROGRAM, Gateway, Reply

import aiclient_api as gw

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
NOON = dt.datetime(2026, 11, 22, 12, 0).timestamp()
MONTH = dt.datetime(2026, 11, 1).timestamp()


def answer(number: int = 1, at: float = NOON, **more: Any) -> gw.UsageRecord:
    """An answer whose figures tell it apart from others."""
    usage = gw.Usage(
        number, number * 2, number * 3, number * 5, number, number * 7,
        source="reported", credits_source="reported",
    )  # fmt: skip
    fields = {"provider": "p", "account": "", "model": "m", "label": "l", "dialect": "chat"}
    return gw.UsageRecord(at=at, streamed=False, usage=usage, **{**fields, **more})


def report(store: gw.UsageStore, now: float = NOON, **given: str) -> Json:
    """What a store reports."""
    found: Json = store.report(gw.read_usage_query(given, now), now)
    return found


# ---- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "label"),
    [
        ("claude-cli/2.1.0 (external, cli)", "claude-cli"),
        ("codex_cli_rs/0.169.0 (Ubuntu 24.4.0; x86_64) xterm", "codex_cli_rs"),
        ("OpenAI/Python 2.1.0", "openai-python"),
        ("Anthropic/JS 0.70.0", "anthropic-js"),
        ("curl/8.5.0", "curl"),
        ("Mozilla/5.0 (X11; Linux x86_64)", "mozilla"),
        ("python-requests/2.32", "python-requests"),
        ("", "unknown"),
        ("<script>", "unknown"),
        ("a" * 500, "a" * 40),
    ],
)
def test_a_caller_is_labelled_by_the_family_of_its_user_agent(agent: str, label: str) -> None:
    assert gw.client_label(agent) == label


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90m", NOON - 5400),
        ("24h", NOON - 86400),
        ("7d", NOON - 7 * 86400),
        ("2w", NOON - 14 * 86400),
        ("1763800000", 1763800000.0),
        ("today", dt.datetime(2026, 11, 22).timestamp()),
        ("2026-11-01", dt.datetime(2026, 11, 1).timestamp()),
        ("2026-11-01T10:30", dt.datetime(2026, 11, 1, 10, 30).timestamp()),
        ("2026-11-01T10:30:00+00:00", 1793529000.0),
    ],
)
def test_a_time_may_be_written_in_many_ways(text: str, moment: float) -> None:
    assert gw.read_since(text, NOON) == moment


@pytest.mark.parametrize(
    "text", ["", "x", "7", "7y", "-1d", "2026-13-01", "9" * 12, "\N{ARABIC-INDIC DIGIT SEVEN}d"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(gw.InvalidRequest) as refused:
        gw.read_since(text, NOON)
    assert refused.value.param == "since"


@pytest.mark.parametrize(
    ("given", "param"),
    [({"by": "hour"}, "by"), ({"recent": "-1"}, "recent"), ({"recent": "1001"}, "recent"),
     ({"recent": "²"}, "recent"), ({"sinse": "7d"}, "sinse")],
)  # fmt: skip
def test_a_wrong_parameter_is_named(given: dict[str, str], param: str) -> None:
    with pytest.raises(gw.InvalidRequest) as refused:
        gw.read_usage_query(given, NOON)
    assert refused.value.param == param


PRICES = {"input_price": 300, "output_price": 1500, "cache_read_price": 30,
          "cache_write_price": 375, "max_prompt_tokens": 168_000}  # fmt: skip
LONG = {name: price * 2 for name, price in PRICES.items()}
TIERED = {"batch_size": 1_000_000, "default": PRICES, "long_context": LONG}
FLAT = {"batch_size": 1000, "input_price": 300_000_000, "output_price": 1_500_000_000,
        "cache_price": 30_000_000}  # fmt: skip


@pytest.mark.parametrize(
    ("prices", "usage", "price"),
    [
        # the sample that facts give: 6.402225 credits, told by the service itself
        (TIERED, gw.Usage(3857, 0, 12539, 362, source="reported"), 6.402225),
        (TIERED, gw.Usage(1000, 1000, 0, 0, source="derived"), 0.33),
        (TIERED, gw.Usage(200_000, 0, 0, 10, source="reported"), 120.03),
        (FLAT, gw.Usage(1000, 1000, 0, 1000, source="reported"), 1.83),
        (TIERED, gw.Usage(1000), None),  # nobody counted
        ({}, gw.Usage(1000, source="reported"), None),
        ({"batch_size": 0, **PRICES}, gw.Usage(1000, source="reported"), None),
        ({"batch_size": 10, "default": {"input_price": "3"}}, gw.Usage(1, source="x"), None),
    ],
)
def test_what_was_not_billed_is_priced_by_the_catalogue(
    prices: Json, usage: gw.Usage, price: float | None
) -> None:
    model = gw.Model("m", "p", raw={"billing": {"token_prices": prices}})
    found = gw.price_nano_credits(model, usage)
    assert found == (None if price is None else round(price * 1e9))


def test_a_period_ends_at_this_machines_midnight() -> None:
    assert gw.period_end("day", NOON) == dt.datetime(2026, 11, 23).timestamp()
    assert gw.period_end("month", NOON) == dt.datetime(2026, 12, 1).timestamp()
    last = dt.datetime(2026, 12, 31, 23, 59, 59).timestamp()
    assert gw.period_end("day", last) == gw.period_end("month", last) == last + 1


# ---- caps ----------------------------------------------------------------------------------------


def limits(**caps: float) -> gw.LimitsConfig:
    """Limits with one provider's caps."""
    return gw.LimitsConfig(providers={"p": gw.CapConfig(**cast(Any, caps))})


@pytest.mark.parametrize(
    ("setting", "unit"),
    [("daily_tokens", 11), ("monthly_tokens", 11), ("daily_credits", 7e-9),
     ("monthly_credits", 7e-9)],
)  # fmt: skip
def test_a_cap_holds_from_the_request_on_that_reaches_it(setting: str, unit: float) -> None:
    spending = gw.Spending()
    capped = limits(**{setting: unit * 3})
    for number in range(3):
        spending.check(capped, "p", "l", NOON)
        assert number < 3
        spending.add(answer())
    with pytest.raises(gw.LimitReached) as refused:
        spending.check(capped, "p", "l", NOON)
    assert setting in refused.value.message and refused.value.status == 429
    assert refused.value.retry is False
    spending.check(capped, "other", "l", NOON)
    period = gw.CAPS[setting][0]
    after = gw.period_end(period, NOON)
    spending.check(capped, "p", "l", after)
    if period == "month":
        with pytest.raises(gw.LimitReached):
            spending.check(capped, "p", "l", NOON + 86400)


def test_a_label_has_caps_of_its_own() -> None:
    spending = gw.Spending()
    capped = gw.LimitsConfig(labels={"ci": gw.CapConfig(daily_tokens=11)})
    spending.add(answer(label="ci", provider="a"))
    spending.check(capped, "a", "desk", NOON)
    with pytest.raises(gw.LimitReached, match=r"limits\.labels\.ci\.daily_tokens"):
        spending.check(capped, "b", "ci", NOON)
    rows = list(spending.rows(capped, NOON))
    assert [(row["name"], row["used"], row["limit"]) for row in rows] == [
        ("labels.ci.daily_tokens", 11, 11)
    ]


def test_what_others_have_spent_counts_and_nothing_counts_twice() -> None:
    spending = gw.Spending()
    spending.add(answer())
    spending.unwritten.clear()
    spending.add(answer())  # while that was written
    spending.replace([("2026-11-22", "p", "l", 111, 70)])  # with a hundred of another process
    capped = limits(daily_tokens=1000, daily_credits=1000)
    capped.labels["l"] = gw.CapConfig(monthly_tokens=1000)
    used = {row["name"]: row["used"] for row in spending.rows(capped, NOON)}
    assert used["providers.p.daily_tokens"] == used["labels.l.monthly_tokens"] == 122
    assert used["providers.p.daily_credits"] == pytest.approx(77e-9)


def test_the_same_request_again_and_again_is_noticed() -> None:
    guard = gw.RepeatGuard()
    often = gw.LimitsConfig(runaway_requests=3, runaway_seconds=10)
    for now in (0.0, 1.0, 2.0):
        guard.check(often, 1, now)
    with pytest.raises(gw.LimitReached, match="3 times within 10 seconds") as refused:
        guard.check(often, 1, 4.0)
    assert refused.value.retry_after == 6
    guard.check(often, 2, 4.0)
    guard.check(often, 1, 10.0)
    off = gw.LimitsConfig(runaway_requests=0)
    for _ in range(100):
        guard.check(off, 3, 0.0)


def test_the_guard_remembers_a_bounded_number_of_requests() -> None:
    guard = gw.RepeatGuard()
    for number in range(3 * gw.MAX_RUNAWAYS):
        guard.check(gw.LimitsConfig(), number, 0.0)
    assert len(guard.seen) <= gw.MAX_RUNAWAYS


# ---- the database --------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a database may be."""
    return str(tmp_path / "state" / "usage.db")


@pytest.fixture
def store(path: str) -> Iterator[gw.UsageStore]:
    """An empty store."""
    made = gw.UsageStore(path, busy_s=0.05)
    yield made
    made.close()


def test_sums_add_up_by_every_key(store: gw.UsageStore) -> None:
    for number in range(1, 30):
        more = {"provider": f"p{number % 3}", "model": f"m{number % 5}", "label": f"l{number % 2}"}
        kind = {4: "cancelled", 5: "upstream_error"}.get(number, "")
        at = NOON - number * 86400
        assert store.write([answer(number, at, kind=kind, duration_s=number, **more)]) is None
    whole = report(store)
    rows = [row for p in whole["providers"].values() for row in p["models"].values()]
    skipped = {"token_sources", "credit_sources", "duration_ms", "first_byte_ms"}
    for key in whole["total"].keys() - skipped:
        assert whole["total"][key] == sum(row[key] for row in rows), key
    assert whole["total"]["request_count"] == 29
    assert (whole["total"]["error_count"], whole["total"]["cancelled_count"]) == (1, 1)
    assert whole["total"]["total_tokens"] == 11 * sum(range(30))
    assert whole["total"]["token_sources"] == {"reported": 29}
    assert whole["total"]["duration_ms"] == 15_000
    assert "credits" not in whole["total"]  # of different units
    for by, names in gw.USAGE_GROUPS.items():
        rows = report(store, by=by)["rows"]
        assert sum(row["total_tokens"] for row in rows) == whole["total"]["total_tokens"]
        assert len({tuple(row[name] for name in names) for row in rows}) == len(rows)
        assert all(row["credits"] > 0 for row in rows)
    assert [row["day"] for row in report(store, by="day")["rows"]][-1] == "2026-11-21"
    week = report(store, since="7d")
    assert week["total"]["request_count"] == 7
    assert week["since"] <= NOON - 7 * 86400


def test_answers_come_back_as_they_were_the_newest_first(store: gw.UsageStore) -> None:
    rows = [
        answer(1, NOON - 5, kind="cancelled", status=499, first_byte_s=0.25, duration_s=1.5),
        answer(2, NOON - 4, account="octocat"),
        answer(3, NOON - 3),
    ]
    store.write(rows)
    found = report(store, recent="10")["recent"]
    assert found == [gw.request_row(row.row()) for row in reversed(rows)]
    assert found[2] == {
        "at": NOON - 5, "provider": "p", "account": None, "model": "m", "label": "l",
        "dialect": "chat", "streamed": False, "status": 499, "kind": "cancelled",
        "duration_ms": 1500, "first_byte_ms": 250, "input_tokens": 6, "cache_read_tokens": 2,
        "cache_write_tokens": 3, "output_tokens": 5, "reasoning_tokens": 1, "credits": 7e-9,
        "input_source": "reported", "output_source": "reported", "credits_source": "reported",
    }  # fmt: skip
    assert len(report(store, recent="2")["recent"]) == 2
    assert [row["at"] for row in report(store, recent="9", since=str(int(NOON) - 4))["recent"]] == [
        NOON - 3,
        NOON - 4,
    ]


def test_each_figure_says_where_it_is_from(store: gw.UsageStore) -> None:
    told = answer(1)
    guessed = answer(1)
    guessed.usage = gw.Usage(
        10, output=5, source="derived", nano_credits=1, credits_source="derived"
    )
    store.write([told, guessed])
    newest, oldest = report(store, recent="2")["recent"]
    names = ("input_source", "output_source", "credits_source")
    assert [newest[name] for name in names] == ["derived", "estimated", "derived"]
    assert [oldest[name] for name in names] == ["reported"] * 3
    total = report(store)["total"]
    assert total["token_sources"] == total["credit_sources"] == {"reported": 1, "derived": 1}


def test_a_store_opens_what_another_has_written(store: gw.UsageStore, path: str) -> None:
    store.write([answer(2)])
    with closing(gw.UsageStore(path)) as other:
        assert report(other)["total"]["request_count"] == 1
        other.write([answer(3)])
    assert report(store)["total"]["total_tokens"] == 55


def test_the_files_are_their_owners_alone(store: gw.UsageStore, path: str) -> None:
    store.write([answer()])
    for suffix in ("", "-wal", "-shm"):
        assert os.stat(path + suffix).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700


def test_a_reset_forgets_all_but_what_caps_look_at(store: gw.UsageStore) -> None:
    store.write([answer(1, account="octocat", model="secret-plan"), answer(9, costs=False)])
    store.write([answer(2)])
    assert store.reset()
    found = report(store, recent="5", by="day")
    assert found["recent"] == found["rows"] == [] and found["since"] is None
    assert found["total"]["request_count"] == 0
    assert store.write([answer(3)], MONTH) == [("2026-11-22", "p", "l", 66, 42)]
    hidden = "SELECT account, model, status FROM requests WHERE NOT shown"
    assert store.open().execute(hidden).fetchall() == [("", "other", None)]


def test_a_reset_that_fails_forgets_nothing(store: gw.UsageStore, path: str) -> None:
    store.write([answer(1)])
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        store.write([answer(2)])
        assert not store.reset()
        holder.execute("ROLLBACK")
    store.write([])
    assert report(store)["total"]["request_count"] == 2


def test_what_costs_nothing_is_no_spending(store: gw.UsageStore) -> None:
    assert store.write([answer(1, costs=False)], MONTH) == []
    assert report(store)["total"]["request_count"] == 1


def test_spending_is_read_again_where_another_process_has_written(
    store: gw.UsageStore, path: str
) -> None:
    assert store.write([answer(1)], MONTH) == [("2026-11-22", "p", "l", 11, 7)]
    assert store.write([answer(1)], MONTH) is None  # nothing but what the caller knows
    with closing(gw.UsageStore(path)) as other:
        other.write([answer(1)])
    assert store.write([answer(1)], MONTH) == [("2026-11-22", "p", "l", 44, 28)]
    assert store.write([], NOON + 1) == []  # a new month


def test_old_requests_become_sums_of_their_day(store: gw.UsageStore) -> None:
    now = time.time()
    old = now - (gw.MAX_SINGLE_DAYS + 3) * 86400
    rows = [
        answer(number, old - day * 86400, model=f"m{number % 2}", kind="x" * (number % 3))
        for day in range(20)
        for number in range(1, 13)
    ]
    store.prune_at = math.inf
    store.write([*rows, answer(at=now), answer(at=now - (gw.MAX_USAGE_DAYS + 3) * 86400)])
    before = report(store, now, since="1000d", by="day")
    store.prune_at = 0.0
    store.write([])
    (kept,) = store.open().execute("SELECT count(*) FROM requests").fetchone()
    after = report(store, now, since=f"{gw.MAX_USAGE_DAYS}d", by="day", recent="9")
    assert kept == 20 * 2 + 1 and len(after["recent"]) == 1
    assert after["rows"] == before["rows"][1:]
    assert after["total"]["request_count"] == before["total"]["request_count"] - 1 == 241


def test_a_month_of_a_long_history_is_reported_in_no_time(store: gw.UsageStore) -> None:
    store.prune_at = math.inf
    connection = store.open()
    columns = ", ".join(gw.USAGE_COLUMNS)
    store.write([answer(at=0.0)])
    values = columns.replace("at", f"{NOON} - (40000 - i) * 864", 1)
    connection.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000) "
        f"INSERT INTO requests ({columns}) SELECT {values} FROM n, (SELECT * FROM requests)"
    )
    plan = str(
        connection.execute("EXPLAIN QUERY PLAN SELECT * FROM requests WHERE at >= 1").fetchall()
    )
    assert "requests_at" in plan
    started = time.perf_counter()
    assert report(store, since="30d")["total"]["request_count"] == 3001
    assert time.perf_counter() - started < 0.5


def test_the_file_is_bounded_and_counting_goes_on(path: str) -> None:
    with closing(gw.UsageStore(path, max_pages=40)) as small:
        for number in range(60):
            small.write([answer(model=f"{number}-{n}") for n in range(50)], MONTH)
        assert os.path.getsize(path) <= 40 * 4096
        assert small.trouble == ""
        assert report(small)["total"]["request_count"] == 3000  # rows were joined, none was lost
        assert [row["label"] for row in report(small, by="label")["rows"]] == ["l"]


def test_the_thread_that_writes_is_there_before_it_is_needed(path: str) -> None:
    """No thread may be left to be had by then, and what was counted would be lost at the end."""
    ledger = gw.Ledger(path, gw.Ticker())
    assert any(thread.name.startswith("usage") for thread in threading.enumerate())
    ledger.thread.shutdown()


def test_a_full_file_joins_rows_and_keeps_their_days(path: str) -> None:
    with closing(gw.UsageStore(path, max_pages=60)) as small:
        small.write([answer(at=NOON - 86400 * day) for day in range(30)])
        for number in range(60):
            small.write([answer(model=f"{number}-{n}") for n in range(50)])
        assert (small.trouble, small.pending) == ("", [])
        assert os.path.getsize(path) <= 60 * 4096
        assert len(report(small, by="day")["rows"]) == 30


def ledger_rows(path: str, answers: list[gw.UsageRecord]) -> Json:
    """The report of a ledger that has counted these answers."""

    async def count() -> Json:
        ledger = gw.Ledger(path, gw.Ticker())
        for row in answers:
            ledger.record(row)
        found = await ledger.report(gw.UsageQuery(by="model", recent=1000), gw.LimitsConfig())
        await ledger.close()
        return found

    return asyncio.run(count())


def test_what_is_counted_is_made_fit_for_it(path: str) -> None:
    wild = answer(10**30, model="a\nb\ud83d\u202e" + "c" * 500, account="\udfff")
    (row,) = ledger_rows(path, [wild])["recent"]
    assert row["model"] == "a b" + "c" * (gw.MAX_NAME_CHARS - 5)
    assert (row["account"], row["output_tokens"]) == (None, gw.MAX_FIGURE)


def test_a_day_tells_a_bounded_number_of_models_apart_and_the_next_begins_anew(path: str) -> None:
    names = [f"model-{number}" for number in range(gw.MAX_MODELS + 50)]
    rows = [answer(at=NOON, model=name) for name in names]
    found = ledger_rows(path, [*rows, answer(at=NOON + 86400, model="late")])
    told = {row["model"]: row["request_count"] for row in found["rows"]}
    assert (len(told), told["other"], told["late"]) == (gw.MAX_MODELS + 2, 50, 1)


def test_while_nothing_can_be_written_rows_wait_in_a_bounded_number(
    store: gw.UsageStore, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.write([answer()])
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for _ in range(3):
            assert store.write([answer()] * (gw.MAX_PENDING_REQUESTS // 2)) is None
        assert store.trouble == "database is locked"
        assert len(store.pending) == gw.MAX_PENDING_REQUESTS
        found = report(store)
        assert found["total"]["request_count"] == 1 and "locked" in found["trouble"]
        holder.execute("ROLLBACK")
    store.write([])
    found = report(store)
    assert found["total"]["request_count"] == gw.MAX_PENDING_REQUESTS + 1
    assert store.lost == gw.MAX_PENDING_REQUESTS // 2
    assert "trouble" not in found
    events = [record.message.split()[0] for record in caplog.records]
    assert events == ["usage_not_written"]


def damage(path: str, how: str) -> None:
    """Makes a database unusable in one of the ways that happen."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        if how == "not a database":
            file.write(b"nonsense" * 512)
        elif how == "torn":
            file.truncate(size // 2 + 100)
        else:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
    if how == "other tables":
        os.unlink(path)
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE requests (x)")
            other.execute(f"PRAGMA user_version = {gw.USAGE_VERSION}")


@pytest.mark.parametrize("how", ["not a database", "torn", "overwritten", "other tables"])
def test_a_damaged_database_is_set_aside_and_counting_goes_on(path: str, how: str) -> None:
    with closing(gw.UsageStore(path)) as before:
        before.write([answer(n) for n in range(500)])
    damage(path, how)
    with closing(gw.UsageStore(path)) as store:
        for _ in range(2):
            store.write([answer(2)])
        assert report(store)["total"]["request_count"] == 2
    assert list(Path(path).parent.glob("usage.db.damaged-*"))
    with closing(gw.UsageStore(path)) as after:
        assert report(after)["total"]["request_count"] == 2


def test_the_database_of_a_later_version_is_left_alone(store: gw.UsageStore, path: str) -> None:
    os.makedirs(os.path.dirname(path))
    with closing(sqlite3.connect(path)) as later:
        later.execute("CREATE TABLE new (x)")
        later.execute("PRAGMA user_version = 99")
    before = Path(path).read_bytes()
    assert store.write([answer()]) is None
    assert "later version" in report(store)["trouble"] and len(store.pending) == 1
    store.close()
    assert Path(path).stat().st_size == len(before)
    with closing(sqlite3.connect(path)) as later:
        names = [name for (name,) in later.execute("SELECT name FROM sqlite_master")]
    assert names == ["new"]


def test_a_planted_link_is_not_followed(store: gw.UsageStore, path: str, tmp_path: Path) -> None:
    os.makedirs(os.path.dirname(path))
    os.symlink(tmp_path / "elsewhere", path)
    store.write([answer()])
    assert "trouble" in report(store) and len(store.pending) == 1
    assert not (tmp_path / "elsewhere").exists()


WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("aiclient_api", sys.argv[1])
gw = sys.modules["aiclient_api"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gw)
store = gw.UsageStore(sys.argv[2])
waiting = []
for batch in range(100):
    rows = [
        gw.UsageRecord(1795350000.0 + n, "p", "", f"m{n % 3}", sys.argv[3], "chat", False,
                  gw.Usage(n, output=1, source="reported"))
        for n in range(20)
    ]
    store.write(rows)
    waiting.append(bool(store.pending))
while store.pending:
    store.write([])
store.close()
print(sum(waiting))
"""


def test_two_processes_over_one_database_lose_nothing(path: str) -> None:
    command = [sys.executable, "-c", WRITER, str(PROGRAM), path]
    writers = [
        subprocess.Popen([*command, label], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for label in ("one", "two")
    ]
    for writer in writers:
        said = writer.communicate(timeout=60)[0]
        assert writer.returncode == 0, said
    with closing(gw.UsageStore(path)) as store:
        rows = {row["label"]: row for row in report(store, by="label")["rows"]}
        assert rows.keys() == {"one", "two"}
        for row in rows.values():
            assert row["request_count"] == 2000
            assert row["input_tokens"] == 100 * sum(range(20))
        assert store.connection is not None
        (count,) = store.connection.execute("SELECT count(*) FROM requests").fetchone()
        assert count == 4000


# ---- through the gateway -------------------------------------------------------------------------


def usage(gateway: Gateway, query: str = "") -> Json:
    """What /v1/usage says."""
    reply = gateway.request("GET", "/v1/usage" + query)
    assert reply.status == 200, reply
    return cast(Json, reply.json())


def ask(gateway: Gateway, words: str, model: str = "echo", path: str = CHAT, **more: Any) -> Reply:
    """One request for an answer."""
    headers = more.pop("headers", {})
    body = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": words}]}
    return gateway.request("POST", path, {**body, **more}, headers)


def signed_in(
    fake: FakeCopilot, config: str = "", api_url: str = "", env: dict[str, str] | None = None
) -> Gateway:
    """A gateway whose provider `copilot` is the imitation."""
    urls = f'github_url = "{fake.url}"\ngithub_api_url = "{fake.url}"\napi_url = "{api_url}"\n'
    token = {"type": "copilot", "github_token": fake.github_token, "user": "octocat"}
    whole = f'{config}\n[providers.copilot]\ntype = "copilot"\n{urls}'
    return Gateway(config=whole, tokens={"copilot": token}, env=env)


@pytest.fixture(scope="module")
def plain() -> Iterator[Gateway]:
    """A gateway with the echo alone."""
    with Gateway() as gateway:
        yield gateway


def test_every_answer_is_a_row_of_metadata(plain: Gateway) -> None:
    plain.request("DELETE", "/v1/usage")
    secret = "a word nobody else says"
    agent = {"User-Agent": "OpenAI/Python 2.1"}
    ask(plain, secret, headers=agent)
    ask(plain, secret, path=MESSAGES, stream=True)
    plain.request("POST", "/v1/responses", {"model": "echo", "input": secret, "stream": True})
    found = usage(plain, "?recent=9&by=label")
    rows = list(reversed(found["recent"]))
    assert [(row["dialect"], row["streamed"], row["label"]) for row in rows] == [
        ("chat", False, "openai-python"),
        ("messages", True, "unknown"),
        ("responses", True, "unknown"),
    ]
    for row in rows:
        assert (row["provider"], row["model"], row["status"]) == ("echo", "echo", 200)
        assert row["kind"] == "" and row["input_tokens"] > 0 and row["output_tokens"] > 0
        assert 0 <= row["first_byte_ms"] <= row["duration_ms"] < 30_000
        assert abs(row["at"] - time.time()) < 60
    assert {row["label"]: row["request_count"] for row in found["rows"]} == {
        "openai-python": 1,
        "unknown": 2,
    }
    folder = plain.state_folder
    assert not any(secret.encode() in file.read_bytes() for file in folder.glob("usage.db*"))


@pytest.mark.parametrize(
    "query", ["?by=hour", "?since=x", "?recent=x", "?cachet=1", "?by=day&by=x"]
)
def test_a_bad_query_is_a_400_that_names_it(plain: Gateway, query: str) -> None:
    reply = plain.request("GET", "/v1/usage" + query)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == query[1:].rpartition("&")[2].partition("=")[0]


def test_usage_survives_a_restart_of_the_process() -> None:
    """Also what was counted a moment before the end."""
    with Gateway() as gateway:
        ask(gateway, "one")
        assert gateway.stop() == 0
        gateway.start_again()
        assert usage(gateway)["total"]["request_count"] == 1


def test_keys_have_names_and_names_are_labels() -> None:
    config = 'api_key = "main-key"\n[api_keys]\nlaptop = "sk-laptop"\nci = "sk-ci"\n'
    with Gateway(config=config) as gateway:
        agent = {"User-Agent": "curl/8"}
        for key in ("main-key", "sk-laptop", "sk-ci", "sk-ci"):
            assert ask(gateway, "hi", headers={**agent, "x-api-key": key}).status == 200
        for key in ("", "sk-", "laptop", "sk-laptopx"):
            assert ask(gateway, "hi", headers={**agent, "x-api-key": key}).status == 401
        assert ask(gateway, "hi", headers=agent).status == 401
        found = gateway.request("GET", "/v1/usage?by=label", headers={"x-api-key": "sk-ci"})
        rows = {row["label"]: row["request_count"] for row in found.json()["rows"]}
        assert rows == {"curl": 1, "laptop": 1, "ci": 2}
        assert "sk-" not in gateway.log()


def test_an_answer_is_counted_with_its_bill_and_its_account() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake))
        whole = ask(gateway, "hi", "claude-sonnet-4.5", MESSAGES)
        stream = ask(gateway, "hi", "gpt-4.1", stream=True)
        rows = usage(gateway, "?recent=2")["recent"]
        assert [row["account"] for row in rows] == ["octocat"] * 2
        assert [row["credits_source"] for row in rows] == ["reported"] * 2
        assert all(row["credits"] > 0 for row in rows)
        assert float(whole.headers["x-aiclient-credits"]) == rows[1]["credits"]
        assert "x-aiclient-credits" not in stream.headers  # which came before the bill
        assert "credits=" in gateway.log() and "input=" in gateway.log()


def test_whoever_leaves_is_counted_as_well() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake))
        ask(gateway, "warm up", "gpt-4.1")
        held = threading.Event()
        stack.callback(held.set)
        row = {
            "id": "c",
            "model": "gpt-4.1",
            "choices": [{"index": 0, "delta": {"content": "one "}}],
        }
        kind = {"Content-Type": "text/event-stream"}
        fake.queue(Answer(200, kind, [sse(row, done=False) * 5, sse()], pause=held))
        body = {"model": "gpt-4.1", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with gateway.wire() as wire:
            wire.send(gateway.request_bytes("POST", CHAT, body))
            wire.read_until(b"one")
        by = time.monotonic() + 10
        while usage(gateway)["total"]["request_count"] < 2:
            assert time.monotonic() < by
        found = usage(gateway, "?recent=1")
        [row] = found["recent"]
        assert (row["kind"], row["status"], row["streamed"]) == ("cancelled", 499, True)
        assert found["total"]["cancelled_count"] == 1 and found["total"]["error_count"] == 0
        assert row["input_tokens"] > 0 and row["output_tokens"] > 1
        assert (row["input_source"], row["output_source"]) == ("estimated", "estimated")


def test_what_an_upstream_refuses_is_counted_with_its_status() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake))
        body = dump({"error": {"message": "no", "code": "quota_exceeded"}})
        fake.queue(Answer(402, {"Retry-After": "9999"}, body, chunked=False))
        assert ask(gateway, "hi", "gpt-4.1").status == 429
        found = usage(gateway, "?recent=1")
        [row] = found["recent"]
        assert (row["status"], row["kind"]) == (429, "quota_exceeded")
        assert row["input_tokens"] == row["output_tokens"] == 0
        assert found["total"]["error_count"] == 1


def test_a_damaged_database_stops_no_request() -> None:
    with Gateway() as gateway:
        ask(gateway, "one")
        assert gateway.stop() == 0
        database = gateway.state_folder / "usage.db"
        database.write_bytes(b"not a database at all" * 1000)
        gateway.start_again()
        assert ask(gateway, "two").status == 200
        assert usage(gateway)["total"]["request_count"] == 1
        assert "usage_database_unusable" in gateway.log()
        assert len(list(gateway.state_folder.glob("usage.db.damaged-*"))) == 1


# ---- caps and the guard, as callers see them -----------------------------------------------------


CAPPED = "[limits.providers.copilot]\nmonthly_tokens = 1\n"


def test_a_cap_is_a_429_in_the_callers_words_and_nothing_goes_up() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake, CAPPED))
        assert ask(gateway, "hi", "gpt-4.1").status == 200
        sent = len(fake.calls)
        chat = ask(gateway, "hi", "gpt-4.1")
        assert chat.status == 429
        error = chat.json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert "limits.providers.copilot.monthly_tokens" in error["message"]
        assert "config set limits.providers.copilot.monthly_tokens" in error["message"]
        assert chat.headers["x-should-retry"] == "false"
        messages = ask(gateway, "hi", "gpt-4.1", MESSAGES)
        assert (messages.status, messages.json()["type"]) == (429, "error")
        assert messages.json()["error"]["type"] == "rate_limit_error"
        responses = gateway.request(
            "POST", "/v1/responses", {"model": "gpt-5.3-codex", "input": "x"}
        )
        assert responses.json()["error"]["type"] == "usage_limit_reached"
        stream = ask(gateway, "hi", "gpt-4.1", stream=True)
        assert stream.status == 429
        assert len(fake.calls) == sent
        assert ask(gateway, "hi").status == 200  # the echo costs nothing
        [row] = usage(gateway)["limits"]
        assert row["name"] == "providers.copilot.monthly_tokens"
        assert row["used"] > 1 and row["limit"] == 1 and row["resets_at"] > time.time()
        gateway.request("DELETE", "/v1/usage")
        assert ask(gateway, "hi", "gpt-4.1").status == 429  # a reset lifts no cap


def test_a_capped_label_is_told_apart_whatever_else_calls() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        capped = "[limits.labels.claude-cli]\ndaily_tokens = 1\n"
        gateway = stack.enter_context(signed_in(fake, capped))

        def status(agent: str, model: str = "gpt-4.1") -> int:
            body = {"model": model, "messages": [{"role": "user", "content": agent}]}
            return gateway.request("POST", CHAT, body, {"User-Agent": agent}).status

        for number in range(gw.MAX_LABELS + 1):
            assert status(f"agent{number}/1.0", "echo") == 200
        assert [status("claude-cli/2.1"), status("claude-cli/2.2")] == [200, 429]
        assert status("late/1.0") == 200
        found = {row["label"] for row in usage(gateway, "?by=label")["rows"]}
        assert len(found) == gw.MAX_LABELS + 2
        assert {"claude-cli", "other"} <= found and "late" not in found


def test_a_model_that_no_list_has_and_that_failed_is_other() -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake))
        for number in range(3):
            assert ask(gateway, "hi", f"copilot/made-up-{number}").status >= 400
        found = usage(gateway, "?by=model&recent=9")
        assert [(row["model"], row["request_count"]) for row in found["rows"]] == [("other", 3)]
        assert {row["model"] for row in found["recent"]} == {"other"}


@pytest.mark.parametrize("first", ["requests", "report"])
def test_caps_know_what_an_earlier_process_has_spent(first: str) -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake, CAPPED))
        assert ask(gateway, "hi", "gpt-4.1").status == 200
        assert gateway.stop() == 0
        gateway.start_again()
        if first == "report":
            assert usage(gateway)["limits"][0]["used"] > 1
        with ThreadPoolExecutor(8) as pool:  # all at once, before anything else was asked
            replies = list(pool.map(lambda _: ask(gateway, "hi", "gpt-4.1"), range(8)))
        assert {reply.status for reply in replies} == {429}


def test_a_program_in_a_loop_is_stopped() -> None:
    config = "[limits]\nrunaway_seconds = 60\n"
    env = {"AICLIENT_API_LIMITS_RUNAWAY_REQUESTS": "3"}
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        gateway = stack.enter_context(signed_in(fake, config, env=env))
        statuses = [ask(gateway, "again", "gpt-4.1").status for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        refused = ask(gateway, "again", "gpt-4.1").json()["error"]["message"]
        assert "3 times within 60 seconds" in refused and "runaway_requests" in refused
        assert ask(gateway, "something else", "gpt-4.1").status == 200
        assert [ask(gateway, "again").status for _ in range(5)] == [200] * 5  # the echo is free


# ---- under load ----------------------------------------------------------------------------------


class Upstream(socketserver.ThreadingTCPServer):
    """A service that answers at once, and knows to the token what it has said it counted."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Talker)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bill(self) -> Json:
        """The figures of the next answer, unlike those of the one before."""
        with self.lock:
            self.told["requests"] += 1
            n = self.told["requests"]
            figures = {"input": n % 977, "cache_read": n % 13 * 64, "cache_write": n % 5,
                       "output": n % 311 + 1, "nano": n * 1_000_003 % 10**9}  # fmt: skip
            self.told.update(figures)
        prompt = figures["input"] + figures["cache_read"] + figures["cache_write"]
        details = [
            {"token_type": kind, "token_count": figures[kind]}
            for kind in ("input", "cache_read", "cache_write", "output")
        ]
        return {
            "usage": {"prompt_tokens": prompt, "completion_tokens": figures["output"],
                      "total_tokens": prompt + figures["output"],
                      "prompt_tokens_details": {"cached_tokens": figures["cache_read"]}},
            "copilot_usage": {"total_nano_aiu": figures["nano"], "token_details": details},
        }  # fmt: skip


class Talker(socketserver.StreamRequestHandler):
    """One connection to it."""

    def handle(self) -> None:
        """Answers until the peer has had enough."""
        while line := self.rfile.readline():
            length = 0
            while (field := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = field.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = json.loads(self.rfile.read(length)) if length else {}
            self.reply(line.split()[1].decode(), body)

    def reply(self, path: str, body: Json) -> None:
        """The model list, or an answer."""
        kind = b"application/json"
        if path.startswith("/models"):
            data = json.dumps({"data": default_models()}).encode()
        else:
            base = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4.1"}
            counted = cast(Upstream, self.server).bill()
            said = {"role": "assistant", "content": "ok"}
            end = {"index": 0, "finish_reason": "stop"}
            if body.get("stream"):
                kind = b"text/event-stream"
                delta = {**base, "choices": [{**end, "delta": said}]}
                data = sse(delta, {**base, "choices": [], **counted})
            else:
                choice = {**end, "message": said}
                data = json.dumps({**base, "choices": [choice], **counted}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
        self.wfile.write(head % (kind, len(data)) + data)


def test_thousands_of_requests_add_up_to_what_the_upstream_said() -> None:
    workers, each = 10, 200
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        upstream = stack.enter_context(Upstream())
        threading.Thread(target=upstream.serve_forever, args=(0.05,), daemon=True).start()
        stack.callback(upstream.shutdown)
        gateway = stack.enter_context(signed_in(fake, api_url=upstream.url))
        shapes = [
            gateway.request_bytes(
                "POST", path, {"model": "gpt-4.1", "max_tokens": 9, "stream": stream,
                               "messages": [{"role": "user", "content": "hi"}]},
            )
            for path in (CHAT, MESSAGES) for stream in (False, True)
        ]  # fmt: skip

        def work(_: int) -> int:
            good = 0
            with gateway.wire() as wire:
                for number in range(each):
                    wire.send(shapes[number % len(shapes)])
                    good += wire.reply().status == 200
            return good

        with ThreadPoolExecutor(workers) as pool:
            assert sum(pool.map(work, range(workers))) == workers * each
        total = usage(gateway)["providers"]["copilot"]
        told = upstream.told
        assert total["request_count"] == told["requests"] == workers * each
        assert total["cache_read_tokens"] == told["cache_read"]
        assert total["cache_write_tokens"] == told["cache_write"]
        fresh = total["input_tokens"] - total["cache_read_tokens"] - total["cache_write_tokens"]
        assert fresh == told["input"]
        assert total["output_tokens"] == told["output"]
        assert round(total["credits"] * 1e9) == told["nano"]
        assert total["token_sources"] == total["credit_sources"] == {"reported": workers * each}
        with closing(sqlite3.connect(gateway.state_folder / "usage.db")) as database:
            (rows, nano) = database.execute(
                "SELECT count(*), sum(nano_credits) FROM requests"
            ).fetchone()
        assert (rows, nano) == (workers * each, told["nano"])


def test_kill_9_in_the_middle_of_load_loses_no_more_than_a_second() -> None:
    with Gateway() as gateway:
        request = gateway.request_bytes(
            "POST", CHAT, {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
        )
        done: list[float] = []
        ended = threading.Event()

        def work() -> None:
            try:
                with gateway.wire() as wire:
                    while True:
                        wire.send(request)
                        if wire.reply().status == 200:
                            done.append(time.monotonic())
            except (OSError, EOFError, ValueError):
                ended.set()  # as it must come to be

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        by = time.monotonic() + 30
        while not (len(done) > 300 and done[-1] - done[0] > 2.5):
            assert time.monotonic() < by and not ended.wait(0.05)
        os.kill(gateway.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        for thread in threads:
            thread.join(10)
        safe = sum(moment < killed_at - 1.0 for moment in done)
        with closing(sqlite3.connect(gateway.state_folder / "usage.db")) as database:
            (rows,) = database.execute("SELECT count(*) FROM requests").fetchone()
        assert 100 < safe <= rows <= len(done) + len(threads)
