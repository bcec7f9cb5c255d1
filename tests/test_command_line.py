"""Section 20: every verb as a person or a script uses it, and what it costs to start one."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import plistlib
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeCopilot, default_models
from machine import BYTECODE, Machine, echo, fetch, wait_until
from support import PROGRAM

import aiclient_api as gw

Json = dict[str, Any]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A user's machine on which nothing runs."""
    with Machine() as made:
        yield made


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine with a daemon, for tests that leave no trace in it."""
    with Machine() as made:
        made.start()
        yield made


def typed(
    machine: Machine, words: list[str], keys: str = "", seconds: float = 20, **env: str
) -> str:
    """What a verb shows on a terminal to somebody who types `keys`."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        machine.command(*words), env=machine.environment(TERM="xterm", **env), cwd=machine.folder,
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    os.write(leader, keys.encode())
    shown = b""
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 65536)
    except OSError:
        pass  # the other end is closed: it has ended
    finally:
        os.close(leader)
        if time.monotonic() > until:
            process.kill()
        process.wait(seconds)
    return shown.decode().replace("\r\n", "\n")


# ---- wrong usage, and nothing there --------------------------------------------------------------


@pytest.mark.parametrize("words", ["status", "stop", "restart", "models", "usage", "quota",
                                   "config reload"])  # fmt: skip
def test_without_a_gateway_the_status_is_3_and_says_what_to_type(
    machine: Machine, words: str
) -> None:
    said = machine.run(*words.split()).failure(3)
    assert said == (
        f"aiclient-api: the gateway is not running; start it with: python3 {PROGRAM} start\n"
    )


@pytest.mark.parametrize(
    "words",
    [[], ["config"], ["provider"], ["service"], ["nonsense"], ["config", "set", "a"],
     ["logs", "--level", "loud"], ["completion", "tcsh"], ["status", "--nonsense"]],
)  # fmt: skip
def test_wrong_usage_has_status_2_and_help(machine: Machine, words: list[str]) -> None:
    done = machine.run(*words)
    assert done.status == 2
    assert "usage: aiclient-api" in done.out + done.err


@pytest.mark.parametrize("verb", gw.VERBS, ids=[verb.words for verb in gw.VERBS])
def test_every_verb_has_help_with_an_example(verb: gw.Verb, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gw.main([*verb.words.split(), "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: aiclient-api {verb.words}" in shown
    description = verb.run.__doc__ or verb.summary[1:]
    first = " ".join(description.split(".")[0].split())
    assert first and shown.count(first) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_an_output_that_is_full_is_told(running: Machine) -> None:
    for words in ("status", "logs", "--version", "config set logging.level info"):
        with open("/dev/full", "w") as full:
            process = running.popen(*words.split(), stdout=full)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and "Traceback" not in said, said
        assert said.startswith("aiclient-api: ") and "No space left on device" in said


def test_what_no_verb_can_do_without_is_told(machine: Machine) -> None:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 7; exec "$@"', "-", *machine.command("start", "--port", "0")],
        env=machine.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert done.stderr.startswith("aiclient-api: ") and "Too many open files" in done.stderr


def test_a_program_in_an_archive_asks_to_be_taken_out(machine: Machine) -> None:
    archive = machine.folder / "a.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(PROGRAM, "__main__.py")
    for verb in ("--version", "start"):
        done = subprocess.run(
            [sys.executable, str(archive), verb],
            env=machine.environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "take it out of the archive" in done.stderr, done


# ---- people and programs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "head"),
    [
        (["status"], "PROVIDER"),
        (["models"], "MODEL"),
        (["usage"], "MODEL"),
        (["quota"], "PROVIDER"),
        (["config", "show"], "KEY"),
    ],
)
def test_a_table_on_a_terminal_and_json_in_a_pipe(
    running: Machine, words: list[str], head: str
) -> None:
    assert isinstance(running.run(*words).json(), dict)
    shown = typed(running, words)
    assert re.search(rf"^{head} ", shown, re.MULTILINE), shown
    assert json.loads(typed(running, [*words, "--json"])) is not None


def test_states_are_coloured_unless_that_is_unwanted(running: Machine) -> None:
    assert "\x1b[32mready\x1b[0m" in typed(running, ["status"])
    running.env["NO_COLOR"] = "1"
    assert "\x1b" not in typed(running, ["status"])
    del running.env["NO_COLOR"]


def test_a_pipe_that_closes_early_is_no_error(running: Machine) -> None:
    words = " ".join(running.command("config", "show"))
    done = subprocess.run(
        ["/bin/sh", "-c", f"{words} | head -1"], env=running.environment(),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_usage_and_models_are_those_of_the_gateway(machine: Machine) -> None:
    status = machine.start()
    fetch(status, "/v1/chat/completions", echo("hi"))
    for words, query in (([], ""), (["--by", "day", "--since", "2d"], "?by=day&since=2d")):
        told, served = (
            machine.run("usage", *words).json(),
            fetch(status, f"/v1/usage{query}").json(),
        )
        assert abs(told.pop("until") - served.pop("until")) < 60
        assert told == served
    assert machine.run("models").json()["models"] == fetch(status, "/v1/models").json()["data"]


def test_usage_is_a_table_with_bars_or_csv(machine: Machine) -> None:
    status = machine.start()
    for words in ("hi", "a longer question"):
        fetch(status, "/v1/chat/completions", echo(words))
    table = typed(machine, ["usage"])
    head, row = table.splitlines()[:2]
    assert head.split()[:3] == ["MODEL", "PROVIDER", "REQUESTS"]
    assert row.split()[:3] == ["echo", "echo", "2"] and row.endswith("\N{FULL BLOCK}" * 10)
    assert "TIME" not in head and max(map(len, table.splitlines())) <= 80
    wide = typed(machine, ["usage"], COLUMNS="150").splitlines()
    assert {"ERRORS", "TIME", "TOKENS"} <= set(wide[0].split())
    assert "TIME" in typed(machine, ["usage", "--recent", "5"]).splitlines()[-3]
    rows = list(csv.DictReader(io.StringIO(machine.run("usage", "--csv").out)))
    assert [(row["model"], row["request_count"]) for row in rows] == [("echo", "2")]
    rows = list(csv.DictReader(io.StringIO(machine.run("usage", "--recent", "9", "--csv").out)))
    assert [row["status"] for row in rows] == ["200", "200"]
    assert list(rows[0]) == list(machine.run("usage", "--recent", "1").json()["recent"][0])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [(["--since", "x"], 2, "since: must be a time"), (["--recent", "1e9"], 2, "recent: must be"),
     (["--by", "hour"], 2, "invalid choice")],
)  # fmt: skip
def test_wrong_usage_of_usage_is_told(
    machine: Machine, words: list[str], status: int, said: str
) -> None:
    machine.start()
    done = machine.run("usage", *words)
    assert done.status == status and said in done.err


def test_usage_is_there_without_a_gateway_and_is_reset(machine: Machine) -> None:
    status = machine.start()
    fetch(status, "/v1/chat/completions", echo("hi"))
    machine.run("stop")
    assert machine.run("usage", "--since", "1h").json()["total"]["request_count"] == 1
    assert machine.run("usage", "--reset").status == 3
    machine.start()
    assert machine.run("usage", "--reset").json()["total"]["request_count"] == 0
    assert machine.run("usage").json()["providers"] == {}


def test_limits_are_set_by_word(machine: Machine) -> None:
    machine.start()
    machine.run("config", "set", "limits.labels.my.app.daily_tokens", "100")
    machine.run("config", "set", "limits.providers.copilot.monthly_credits", "2.5")
    rows = {row["name"]: row for row in machine.run("usage").json()["limits"]}
    assert rows["labels.my.app.daily_tokens"]["limit"] == 100
    assert rows["providers.copilot.monthly_credits"]["limit"] == 2.5
    assert "limit labels.my.app.daily_tokens: 0 of 100 tokens" in typed(machine, ["usage"])
    wrong = machine.run("config", "set", "limits.labels.x.daily_tokens", "many")
    assert wrong.status == 2 and "limits.labels.x.daily_tokens: must be an integer" in wrong.err


def test_quota_is_what_the_service_says() -> None:
    with FakeCopilot(default_models()) as fake:
        config = f'[providers.copilot]\ngithub_url = "{fake.url}"\ngithub_api_url = "{fake.url}"\n'
        with Machine(config) as machine:
            folder = machine.config / "copilot"
            folder.mkdir(mode=0o700)
            token = folder / "token.json"
            token.touch(mode=0o600)
            token.write_text(json.dumps({"type": "copilot", "github_token": fake.github_token}))
            machine.start()
            found = machine.run("quota").json()["providers"]["copilot"]
            rows = {row["name"]: row for row in found["allowances"]}
            assert found["plan"] and found["resets_at"]
            premium = rows["premium_interactions"]
            assert premium["used"] + premium["remaining"] == pytest.approx(premium["limit"])
            assert "premium_interactions" in typed(machine, ["quota"])
            assert machine.status()["providers"][0]["health"] == "ready"


# ---- what GitHub says is left --------------------------------------------------------------------


def test_a_quota_is_read_whatever_is_missing() -> None:
    assert gw.read_copilot_quota({}).as_json() == {
        "account": None, "plan": None, "resets_at": None, "allowances": [],
    }  # fmt: skip
    odd = {"quota_snapshots": {"a": 1, "b": {"entitlement": "x"}, "c": {"unlimited": True},
           "d": {"entitlement": 0, "percent_remaining": 0}, "e": {"entitlement": -1}}}  # fmt: skip
    rows = gw.read_copilot_quota(odd).as_json()["allowances"]
    assert [(row["name"], row["unlimited"]) for row in rows] == [("c", True), ("e", True)]


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        ({"entitlement": 300, "remaining": 100}, (200, 300, 100)),
        ({"entitlement": 300, "quota_remaining": 100.5, "remaining": 100}, (199.5, 300, 100.5)),
        ({"entitlement": 300, "percent_remaining": 50.0}, (150, 300, 150)),
        ({"entitlement": 300, "remaining": 400}, (0, 300, 400)),
        ({"entitlement": 300}, (None, 300, None)),
    ],
)
def test_used_limit_and_remaining_fit_together(row: Json, figures: tuple[Any, ...]) -> None:
    (found,) = gw.read_copilot_quota({"quota_snapshots": {"x": row}}).allowances
    assert (found.used, found.limit, found.remaining) == figures


def test_free_plans_of_earlier_have_a_form_of_their_own() -> None:
    body = {
        "login": "octocat",
        "monthly_quotas": {"chat": 50, "completions": 2000},
        "limited_user_quotas": {"chat": 10},
        "limited_user_reset_date": "2026-12-05",
    }
    quota = gw.read_copilot_quota(body)
    assert [(row.name, row.used) for row in quota.allowances] == [
        ("chat", 40),
        ("completions", None),
    ]
    assert gw.format_day(quota.resets_at) == "2026-12-05" and quota.account == "octocat"


# ---- config --------------------------------------------------------------------------------------


def test_config_show_tells_where_each_value_is_from() -> None:
    with Machine('api_key = "EXAMPLEsecret"\n[server]\nport = 1\nidle_seconds = 5\n') as machine:
        machine.env["AICLIENT_API_SERVER_IDLE_SECONDS"] = "6"
        for _ in ("without a gateway", "with one"):
            rows = machine.run("config", "show").json()["settings"]
            found = {row["key"]: (row["value"], row["origin"]) for row in rows}
            assert found["server.idle_seconds"] == (6.0, "AICLIENT_API_SERVER_IDLE_SECONDS")
            assert found["server.host"] == ("127.0.0.1", "default")
            assert found["api_key"] == ("(set, not shown)", "file")
            assert found["server.port"] in ((1, "file"), (0, "--port"))
            if found["server.port"][0]:
                machine.start()


def test_config_set_keeps_comments_and_order_and_is_applied(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    text = '# mine\napi_key = "a" # the key\n\n[server] # s\n# where\nport = 0 # any\n'
    machine.config_file.write_text(text)
    assert machine.run("start").status == 0
    status = machine.status()
    done = machine.run("config", "set", "api_key", "-", typed="b c\n")
    assert done.status == 0 and "changed: api_key" in done.out
    assert machine.config_file.read_text() == text.replace('"a"', '"b c"')
    assert fetch(status, "/v1/models", headers=["x-api-key: b c"]).status == 200
    done = machine.run("config", "set", "server.port", "9")
    assert f"server.port: takes effect after: python3 {PROGRAM} restart" in done.out
    assert machine.config_file.stat().st_mode & 0o777 == 0o600
    assert not [name for name in os.listdir(machine.config) if name.startswith(".new")]


def test_config_set_says_what_overrides_the_file(machine: Machine) -> None:
    machine.start()
    assert "--port overrides the file" in machine.run("config", "set", "server.port", "9").out


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("server.prot", "1", "did you mean 'port'?"),
        ("server.port", "x", "must be an integer"),
        ("server.port", "70000", "must be between"),
        ("server", "1", "server: must be a table"),
        ("providers.kiro.region", "moon", "a region like"),
        ("default_provider", "x", "no such provider"),
        ("default_provider", "copliot", "did you mean copilot?"),
        (
            "models.x",
            "copliot/gpt-4.1",
            'models."x": no such provider: copliot; did you mean copilot?',
        ),
        ("models.x", "echo/echo,gh/gpt-4.1,echo/echo", "there are: copilot, kiro, echo"),
        ("api_key", "", "to remove it: config unset api_key"),
        ("api_keys.ci", " ", "to remove it: config unset api_keys.ci"),
    ],
)
def test_nonsense_is_not_written(machine: Machine, key: str, value: str, words: str) -> None:
    assert words in machine.run("config", "set", key, value).failure(2)
    assert not machine.config_file.exists()


def test_bytes_that_are_no_text_are_no_setting(machine: Machine) -> None:
    for words in (
        "config set api_key \udcff",
        "config set server.host \udcff",
        "start --host \udcff",
    ):
        assert "valid UTF-8" in machine.run(*words.split()).failure(2)


def test_a_linked_configuration_stays_a_link(machine: Machine) -> None:
    elsewhere = machine.folder / "dotfiles.toml"
    elsewhere.write_text("[server]\nport = 1\n")
    machine.config.mkdir(parents=True)
    machine.config_file.symlink_to(elsewhere)
    assert machine.run("config", "set", "server.port", "2").status == 0
    assert machine.config_file.is_symlink() and elsewhere.read_text() == "[server]\nport = 2\n"


def test_changes_at_once_are_all_kept(machine: Machine) -> None:
    words = [("config", "set", f"models.alias{n}", "echo/echo") for n in range(10)]
    for process in [machine.popen(*w) for w in words]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(tomllib.loads(machine.config_file.read_text())["models"]) == 10


def test_init_asks_little_and_shows_what_it_writes(machine: Machine) -> None:
    shown = typed(machine, ["config", "init"], "echo\n\nyes\nyes\n")
    text = machine.config_file.read_text()
    written = tomllib.loads(text)
    assert written["default_provider"] == "echo" and written["server"] == {"port": 9090}
    assert re.fullmatch(r"sk-local-[0-9a-f]{48}", written["api_key"])
    assert text in shown and machine.config_file.stat().st_mode & 0o777 == 0o600
    assert "exists" in machine.run("config", "init", "--yes").failure()


def test_init_writes_nothing_unasked(machine: Machine) -> None:
    assert "--yes" in machine.run("config", "init").failure(2)
    assert "nothing was written" in typed(machine, ["config", "init"], "\n\n\nno\n")
    assert not machine.config_file.exists()
    assert machine.run("config", "init", "--yes").status == 0
    assert gw.read_config_text(machine.config_file.read_text(), "f") == gw.Config()


def test_providers_are_switched_without_a_gateway_too(machine: Machine) -> None:
    assert machine.run("provider", "disable", "kiro").status == 0
    written = tomllib.loads(machine.config_file.read_text())
    assert written == {"providers": {"kiro": {"enabled": False}}}
    assert "there are: copilot, kiro, echo" in machine.run("provider", "enable", "x").failure(2)
    machine.start()
    assert "providers.kiro.enabled" in machine.run("provider", "enable", "kiro").out
    assert "kiro" in [row["name"] for row in machine.status()["providers"]]


# ---- logs ----------------------------------------------------------------------------------------

LINES = [f"2026-11-22T10:00:{n:02d}.000Z {level} event n={n}" for n, level in
         enumerate(["DEBUG", "INFO", "WARNING", "ERROR", "INFO"])]  # fmt: skip


@pytest.fixture
def logged(machine: Machine) -> Machine:
    """A machine with a log in two files, a traceback in it."""
    machine.state.mkdir(parents=True, mode=0o700)
    machine.log_file.with_suffix(".log.1").write_text("\n".join(LINES[:3]) + "\n")
    machine.log_file.write_text(f"{LINES[3]}\nTraceback:\n  deep\n{LINES[4]}\n")
    return machine


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [*LINES[:4], "Traceback:", "  deep", LINES[4]]),
        (["--lines", "1"], [LINES[4]]),
        (["--lines", "0"], []),
        (["--level", "warning"], [LINES[2], LINES[3], "Traceback:", "  deep"]),
        (["--level", "WARN"], [LINES[2], LINES[3], "Traceback:", "  deep"]),
        (["--level", "error", "--lines", "1"], ["  deep"]),
    ],
)
def test_the_last_lines_of_the_log(logged: Machine, words: list[str], expected: list[str]) -> None:
    assert logged.run("logs", *words).out.splitlines() == expected


def offset(pid: int, path: Path) -> int:
    """Where a process is in a file that it reads; -1 where that cannot be seen."""
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        if entry.resolve() == path.resolve():
            return int(Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split()[1])
    return -1


@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="offsets cannot be seen here")
def test_following_goes_on_through_rotations(logged: Machine) -> None:
    process = logged.popen("logs", "--follow", "--lines", "1", "--level", "info")
    too_long = threading.Timer(30, process.kill)
    too_long.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == LINES[4] + "\n"
        with logged.log_file.open("a") as file:
            file.write("2026-11-22T10:01:00.000Z INFO before\n")
            file.write("2026-11-22T10:01:00.000Z DEBUG unseen\n")
            file.flush()
            assert "before" in process.stdout.readline()
            logged.log_file.rename(logged.log_file.with_suffix(".log.1"))
            file.write("2026-11-22T10:02:00.000Z INFO into the old one\n")
        logged.log_file.write_text("2026-11-22T10:03:00.000Z INFO into the new one\n")
        assert "into the old one" in process.stdout.readline()
        assert "into the new one" in process.stdout.readline()
        for number in range(2):  # `> daemon.log`, and logrotate's copytruncate
            logged.log_file.write_text("")
            wait_until(lambda: offset(process.pid, logged.log_file) == 0)
            with logged.log_file.open("a") as file:
                file.write(f"2026-11-22T10:04:00.000Z INFO truncated {number}\n")
            assert f"truncated {number}" in process.stdout.readline()
    finally:
        too_long.cancel()
        process.kill()
        process.communicate()


def test_no_log_is_told(machine: Machine) -> None:
    assert "no log yet" in machine.run("logs").failure()


def test_what_is_no_plain_file_is_not_read_as_a_log(machine: Machine) -> None:
    """Not waited for, as whoever opens a FIFO does, and not read without an end."""
    machine.state.mkdir(parents=True, mode=0o700)
    os.mkfifo(machine.log_file)
    assert "not a plain file" in machine.run("logs", "--follow").failure()
    machine.log_file.unlink()
    machine.log_file.symlink_to("/dev/zero")
    assert "not a plain file" in machine.run("logs").failure()
    machine.log_file.unlink()
    machine.log_file.write_text("line\n")
    os.mkfifo(machine.state / "daemon.log.1")
    assert machine.run("logs").out == "line\n"


def test_no_sign_in_of_another_program_is_waited_for(machine: Machine) -> None:
    home = Path(machine.env["HOME"])
    for name in (".aws/sso/cache/kiro-auth-token.json", ".local/share/kiro-cli/data.sqlite3"):
        (home / name).parent.mkdir(parents=True)
        os.mkfifo(home / name)
    assert "no sign-in of another program" in machine.run("auth", "import", "--yes").failure()


def test_a_log_file_is_rotated_and_three_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = gw.LogFile(str(path), max_bytes=1000)
    for number in range(100):
        log.write(f"line {number:03d} {'x' * 40}\n")
    os.close(log.fd)
    files = [path, tmp_path / "x.log.1", tmp_path / "x.log.2"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(
        0 < file.stat().st_size <= 1000 and file.stat().st_mode & 0o777 == 0o600 for file in files
    )
    kept = "".join(file.read_text() for file in reversed(files)).splitlines()
    assert [line[5:8] for line in kept] == [f"{n:03d}" for n in range(100 - len(kept), 100)]


def test_two_writers_of_one_log_rotate_it_once(tmp_path: Path) -> None:
    """A process that is replaced goes on for a while beside its successor."""
    path = str(tmp_path / "x.log")
    logs = [gw.LogFile(path, max_bytes=2000) for _ in range(2)]
    for number in range(60):
        logs[number % 2].write(f"line {number:02d} {'x' * 40}\n")
    text = "".join((tmp_path / name).read_text() for name in os.listdir(tmp_path))
    assert sorted(re.findall(r"line (\d\d)", text)) == [f"{n:02d}" for n in range(60)]
    for log in logs:
        os.close(log.fd)


def test_a_running_gateway_rotates_its_log(machine: Machine) -> None:
    machine.state.mkdir(parents=True, mode=0o700)
    machine.log_file.touch(mode=0o600)
    os.truncate(machine.log_file, gw.MAX_LOG_BYTES - 50)
    fetch(machine.start(), "/v1/models")
    rotated = machine.log_file.with_suffix(".log.1")
    wait_until(rotated.exists)
    assert rotated.stat().st_size == gw.MAX_LOG_BYTES - 50
    wait_until(lambda: "/v1/models" in machine.log())


def test_a_log_that_was_moved_away_is_opened_anew(machine: Machine) -> None:
    status = machine.start("--log-file", "mine.log")
    path = machine.folder / "mine.log"
    assert status["log_file"] == str(path) and path.stat().st_mode & 0o777 == 0o600
    path.rename(machine.folder / "moved.log")

    def is_back() -> bool:
        fetch(status, "/v1/models")
        return path.exists()

    wait_until(is_back)
    assert "path=/v1/models" in machine.run("logs").out


def test_neither_words_nor_keys_are_in_the_log(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text('[logging]\nlevel = "debug"\n')
    status = machine.start("--api-key", "sk-EXAMPLEkey")
    body = echo("a private word", stream=True)
    reply = fetch(status, "/v1/chat/completions", body, ["x-api-key: sk-EXAMPLEkey"])
    assert reply.status == 200
    fetch(status, "/v1/chat/completions", body, ["x-api-key: wrongEXAMPLE"])
    fetch(status, "/v1/models?secret=EXAMPLEquery", headers=["x-api-key: sk-EXAMPLEkey"])
    log = machine.log()
    assert "status=200" in log and "status=401" in log and reply.headers["x-request-id"] in log
    assert "private" not in log and "EXAMPLE" not in log


# ---- services ------------------------------------------------------------------------------------


def fake_manager(machine: Machine, name: str, status: int = 0) -> Path:
    """A service manager on PATH that writes down how it was called."""
    folder = machine.folder / "bin"
    folder.mkdir(exist_ok=True)
    calls = machine.folder / "calls"
    program = folder / name
    program.write_text(
        f'#!/bin/sh\necho "{name} $*" >> {calls}\necho it says no >&2\nexit {status}\n'
    )
    program.chmod(0o755)
    machine.env["PATH"] = f"{folder}:{machine.env['PATH']}"
    return calls


def test_a_systemd_unit_is_installed_and_removed(machine: Machine) -> None:
    calls = fake_manager(machine, "systemctl")
    path = machine.folder / "config" / "systemd" / "user" / "aiclient-api.service"
    done = machine.run("service", "install", "--manager", "systemd")
    assert done.status == 0 and str(path) in done.out and "enable-linger" in done.out, done
    assert calls.read_text().splitlines() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now aiclient-api.service",
    ]
    unit = path.read_text()
    assert machine.run("service", "print", "--manager", "systemd").out.endswith(unit)
    command = f'"{sys.executable}" "-I" "{PROGRAM}" "start" "--foreground"'
    assert f"ExecStart={command}\n" in unit and "Type=notify\n" in unit
    assert f'Environment="XDG_STATE_HOME={machine.env["XDG_STATE_HOME"]}"\n' in unit
    assert machine.run("service", "uninstall", "--manager", "systemd").status == 0
    assert not path.exists() and "disable --now" in calls.read_text()
    said = machine.run("service", "uninstall", "--manager", "systemd").failure()
    assert "nothing is installed" in said


def test_the_unit_is_one_that_systemd_understands(machine: Machine) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    path = machine.folder / "aiclient-api.service"
    odd = {"XDG_STATE_HOME": '/home/a$b %h "q"\\n\n'}
    path.write_text(gw.systemd_unit({**machine.env, **odd}))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**machine.env, "XDG_RUNTIME_DIR": str(machine.folder)},
    )  # fmt: skip
    assert "aiclient-api.service:" not in done.stderr, done.stderr


def test_marks_in_paths_mean_nothing_to_systemd() -> None:
    unit = gw.systemd_unit({"XDG_STATE_HOME": '/a b/%h/$x/"q"\\\n'})
    assert 'Environment="XDG_STATE_HOME=/a b/%%h/$x/\\"q\\"\\\\\\x0a"\n' in unit
    assert gw.unit_command(["/py", "/$x/%h"]) == '"/py" "/$$x/%%h"'
    # What is run is not expanded, what it is called is.
    assert gw.unit_command(["/$x/py", "a"]) == '@"/$x/py" "/$$x/py" "a"'


@pytest.mark.parametrize("manager", ["systemd", "launchd"])
def test_a_path_that_is_no_text_or_no_file_ends_in_a_sentence(
    machine: Machine, manager: str
) -> None:
    fake_manager(machine, "systemctl")
    fake_manager(machine, "launchctl")
    machine.env["XDG_STATE_HOME"] += "/\udcff"
    done = machine.run("service", "install", "--manager", manager)
    assert "Traceback" not in done.err and done.status == (manager == "launchd"), done
    machine.env["XDG_STATE_HOME"] = str(machine.folder / "state")
    assert machine.run("service", "install", "--manager", manager).status == 0
    path = Path(re.findall("installed (.*)", machine.run("service", "install", "--manager",
                                                         manager).out)[0])  # fmt: skip
    path.unlink()
    (path / "inside").mkdir(parents=True)
    for verb in ("install", "uninstall"):
        assert str(path) in machine.run("service", verb, "--manager", manager).failure()


def test_a_launchd_agent_is_installed_and_removed(machine: Machine) -> None:
    calls = fake_manager(machine, "launchctl")
    path = Path(machine.env["HOME"]) / "Library" / "LaunchAgents" / "aiclient-api.plist"
    assert machine.run("service", "install", "--manager", "launchd").status == 0
    agent = plistlib.loads(path.read_bytes())
    assert agent["ProgramArguments"][:4] == [sys.executable, "-I", str(PROGRAM), "start"]
    assert agent["RunAtLoad"] and agent["Label"] == "aiclient-api"
    assert machine.run("service", "uninstall", "--manager", "launchd").status == 0
    assert not path.exists()
    domain = f"gui/{os.getuid()}"
    assert calls.read_text().splitlines() == [
        f"launchctl bootstrap {domain} {path}", f"launchctl bootout {domain}/aiclient-api",
    ]  # fmt: skip


def test_a_manager_that_refuses_or_is_not_there_is_told(machine: Machine) -> None:
    fake_manager(machine, "systemctl", 1)
    said = machine.run("service", "install", "--manager", "systemd").failure()
    assert "systemctl --user daemon-reload failed: it says no" in said
    machine.env["PATH"] = str(machine.folder)
    said = machine.run("service", "install", "--manager", "systemd").failure()
    assert "there is no systemctl here" in said


def test_a_service_is_not_installed_beside_a_running_gateway(running: Machine) -> None:
    said = running.run("service", "install", "--manager", "systemd").failure()
    assert "is already running" in said


# ---- completion ----------------------------------------------------------------------------------


def completed(*words: str) -> set[str]:
    """What bash offers behind these words."""
    script = gw.write_bash(gw.completion_words())
    line = " ".join(f"'{word}'" for word in ("aiclient-api", *words))
    script += f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _aiclient_api\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_verbs_and_flags() -> None:
    assert {"start", "stop", "config", "auth", "--version"} <= completed("")
    assert completed("sta") == {"start", "status"}
    assert {"init", "show", "set", "reload"} <= completed("config", "")
    assert completed("config", "s") == {"show", "set"}
    assert {"--host", "--port", "--foreground"} <= completed("start", "--")
    assert "--host" not in completed("stop", "--")
    assert completed("start", "--port", "80", "--fo") == {"--foreground"}
    assert {"copilot", "kiro", "list"} <= completed("auth", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_every_shell_holds_every_verb(shell: str, capsys: Any) -> None:
    assert gw.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = {word for verb in gw.VERBS for word in verb.words.split()}
    assert all(word in script for word in words)
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True)


# ---- what a small verb costs ---------------------------------------------------------------------

COSTLY = {
    "_sqlite3", "_ssl", "asyncio.events", "concurrent.futures", "email.message", "http.client",
    "socketserver", "subprocess", "tempfile", "urllib.request",
}  # fmt: skip
SPY = """\
import sys, types
sys.path.insert(0, sys.argv.pop(1))
import aiclient_api
try:
    aiclient_api.main(sys.argv[1:])
except SystemExit:
    pass
print(*[n for n, m in sys.modules.items() if type(m) is types.ModuleType], file=sys.stderr)
"""


@pytest.mark.parametrize("words", ["--version", "status", "stop", "--help", "usage"])
def test_a_small_verb_does_not_load_what_it_does_not_need(running: Machine, words: str) -> None:
    with Machine() as idle:
        machine = running if words in ("status", "usage") else idle
        done = subprocess.run(
            [sys.executable, "-I", "-c", SPY, str(PROGRAM.parent), *words.split()],
            env=machine.environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        loaded = done.stderr.splitlines()[-1].split()
        assert "aiclient_api" in loaded
        bare = subprocess.run(
            [sys.executable, "-I", "-c", "import sys; print(*sys.modules)"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        brought = set(loaded) - set(bare.stdout.split())  # a site may load things of its own
        assert not brought & COSTLY


def test_status_is_quick_beside_a_bare_python(running: Machine) -> None:
    """A ratio in one run, as machines differ: 2.2 bare starts measured, 10 with a compilation."""

    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run(command, env=running.environment(), capture_output=True, check=True)
            times.append(time.perf_counter() - begun)
        return min(times)

    bare = best([sys.executable, "-c", "import argparse, dataclasses, json, socket"])
    assert best(running.command("status")) < 4 * bare
    assert os.path.isdir(BYTECODE)


# ---- what a terminal is shown --------------------------------------------------------------------

WILD = "pro\nkiro SPOOFED\t\x9b2J\u202e\u2028\ud83d"


def test_no_name_makes_a_row_or_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    allowance = gw.Allowance(WILD, 1.0, 2.0, 1.0)
    quota = gw.Quota("", WILD, [allowance], 0.0).as_json()
    gw.print_quota({"providers": {"copilot": {**quota, "error": WILD}}})
    gw.tell(WILD)
    gw.App(argparse.Namespace(json=True)).show({"plan": WILD}, print)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 1 + 3
    assert [line.startswith("kiro") for line in lines] == [False] * 7
    assert json.loads("".join(lines[4:])) == {"plan": WILD}
    assert "\u202e" not in "".join(lines) and "\x9b" not in "".join(lines)


def test_no_line_of_a_traceback_passes_for_an_event_of_the_log() -> None:
    try:
        raise ValueError(f"{WILD}\n2026-11-22T13:14:15.123Z ERROR spoofed")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "", 0, WILD, (), sys.exc_info())
    first, *rest = gw.LogHandler().format(record).split("\n")
    assert first.endswith("ERROR pro kiro SPOOFED 2J ")
    assert rest[-1] == "  2026-11-22T13:14:15.123Z ERROR spoofed"
    assert not any(gw.LOG_LINE.match(line) for line in rest)
