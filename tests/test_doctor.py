"""The verb `doctor`: what it finds on a person's machine, and what it never shows."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeCopilot
from machine import Machine
from test_sign_in import (
    Home,
    Json,
    Make,
    closed_port,
    config_for,
    copilot_of,
    gateway_in,
    kiro_of,
    make,
)
from test_token_files import put, token_of

__all__ = ["make"]

Rows = dict[str, list[Json]]
STATES = {"ok", "note", "fault"}
CHECKS = ("program", "folders", "settings", "gateway", "hosts", "accounts", "clients")


def examine(home: Home, status: int) -> Rows:
    """The findings of each check; there is a fault exactly where the exit status says so."""
    began = time.monotonic()
    done = home.run("doctor")
    assert time.monotonic() - began < 10
    assert (done.status, done.err) == (status, ""), done
    report = json.loads(done.out)
    rows = report["checks"]
    assert report["healthy"] == (status == 0) == all(row["state"] != "fault" for row in rows), done
    assert all(set(row) == {"check", "state", "text", "hint"} for row in rows)
    assert {row["state"] for row in rows} <= STATES
    assert all(row["hint"] for row in rows if row["state"] == "fault"), "nothing to do or to type"
    return {name: [row for row in rows if row["check"] == name] for name in CHECKS}


def faults(home: Home) -> list[str]:
    return [
        f"{row['text']}; {row['hint']}"
        for rows in examine(home, 1).values()
        for row in rows
        if row["state"] == "fault"
    ]


@pytest.fixture
def healthy(make: Make) -> Home:
    """Somebody who is signed in everywhere."""
    home = make("copilot", "google")
    put(home, "copilot", token_of(copilot_of(home), login="octocat", user="octocat"))
    put(home, "kiro", token_of(kiro_of(home), user="somebody@example.com"))
    home.env["AICLIENT_API_PORT"] = closed_port().rpartition(":")[2]
    return home


@pytest.mark.parametrize("is_running", [False, True])
def test_all_is_well(healthy: Home, is_running: bool) -> None:
    home = healthy
    if is_running:
        with gateway_in(home) as gateway:
            rows = examine(home, 0)
            assert f" is serving at {gateway.url}" in rows["gateway"][0]["text"]
    else:
        rows = examine(home, 0)
        assert rows["gateway"][0]["state"] == "note"
        assert rows["gateway"][0]["hint"].endswith(" start")
    assert [row["state"] for row in rows["accounts"]] == ["ok", "ok"]
    assert "copilot: plan " in rows["accounts"][0]["text"]
    assert all(" models" in row["text"] for row in rows["accounts"])
    assert {row["text"].partition(":")[0] for row in rows["hosts"]} == {"127.0.0.1"}
    assert "months old" in rows["program"][1]["text"]
    assert "mode 0700" in rows["folders"][0]["text"]
    assert "octocat" not in home.said and "somebody" not in home.said
    assert str(home.path) not in home.said


def test_it_is_one_screen_on_a_terminal(healthy: Home) -> None:
    terminal = healthy.terminal("doctor")
    terminal.expect(r"CHECK +FINDING")
    terminal.expect(r"ok +accounts +copilot: plan ")
    terminal.expect(r"gateway: type: \S.* start")
    assert terminal.end() == 0
    assert terminal.shown.count("\n") < 40


def close_config(home: Home) -> None:
    home.config_file.write_text("[server]\nprot = 1\n")


def open_folder(home: Home) -> None:
    home.config_folder.chmod(0o777)


def revoke_copilot(home: Home) -> None:
    fake = copilot_of(home)
    put(home, "copilot", {"type": "copilot", "github_token": "ghu_EXAMPLEofnobody"})
    fake.violations.clear()


def lose_host(home: Home) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    text = f'[providers.copilot]\ngithub_api_url = "{url}"\n[providers.kiro]\nenabled = false\n'
    home.config_file.write_text(text)


def forget_accounts(home: Home) -> None:
    for name in ("copilot", "kiro"):
        home.file(name).unlink()


FAULTS: dict[str, tuple[Callable[[Home], object], str]] = {
    "config": (close_config, "did you mean 'port'"),
    "proxy": (lambda home: home.env.update(HTTPS_PROXY="http://u:p/S3CRET@h:1"), "HTTPS_PROXY"),
    "folder": (open_folder, "chmod go-w"),
    "refused": (revoke_copilot, "auth copilot"),
    "no host": (lose_host, "No connection to 127.0.0.1"),
    "no account": (forget_accounts, "auth kiro"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_with_what_to_do(healthy: Home, case: str) -> None:
    prepare, words = FAULTS[case]
    prepare(healthy)
    assert any(words in text for text in faults(healthy))
    assert "S3CRET" not in healthy.said
    for fake in healthy.fakes:
        fake.violations.clear()  # the token of nobody


def test_an_unused_provider_is_no_fault(healthy: Home) -> None:
    healthy.file("kiro").unlink()
    rows = examine(healthy, 0)["accounts"]
    assert [row["state"] for row in rows] == ["ok", "note"]
    assert "auth kiro" in rows[1]["hint"]


def test_a_port_that_is_taken(healthy: Home) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        healthy.env["AICLIENT_API_PORT"] = str(door.getsockname()[1])
        [text] = faults(healthy)
    assert "Address already in use" in text and "config set server.port" in text


def test_a_gateway_that_is_frozen_and_hosts_that_say_nothing(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as door, Machine() as machine:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        machine.config.mkdir(mode=0o700, parents=True)
        machine.config_file.write_text(f'[providers.copilot]\ngithub_api_url = "{url}"\n')
        folder = machine.config / "copilot"
        folder.mkdir(mode=0o700)
        (folder / "token.json").touch(mode=0o600)
        (folder / "token.json").write_text('{"github_token": "ghu_EXAMPLE"}')
        pid = machine.start()["pid"]
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        done = machine.run("doctor", "--json")
        assert time.monotonic() - began < 10
        os.kill(pid, signal.SIGCONT)
    assert done.status == 1
    texts = " ".join(row["text"] for row in json.loads(done.out)["checks"])
    assert f"process {pid} holds the lock" in texts and "copilot: no response within" in texts


class LateCopilot(FakeCopilot):
    """Its clock is an hour ahead."""

    def answer(self, seen: Any) -> Any:
        answer = super().answer(seen)
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
        answer.headers["Date"] = date
        return answer


def test_a_clock_that_is_wrong(make: Make) -> None:
    home = make("copilot")
    with LateCopilot() as fake:
        home.config_file.write_text(config_for([fake], "[server]\nport = 0\n"))
        put(home, "copilot", token_of(fake))
        [text] = faults(home)
    assert "clock is -3600 s" in text or "clock is -3599 s" in text


def test_clients_that_point_here_or_elsewhere(healthy: Home) -> None:
    home = healthy
    port = home.env["AICLIENT_API_PORT"]
    files = {
        ".claude/settings.json": f'{{"env": {{"ANTHROPIC_BASE_URL": "http://127.0.0.1:{port}"}}}}',
        ".codex/config.toml": '[model_providers.x]\nbase_url = "http://localhost:4141/v1"\n',
    }
    for name, text in files.items():
        (home.path / name).parent.mkdir()
        (home.path / name).write_text(text)
    opencode = home.folder / "config" / "opencode"
    opencode.mkdir()
    (opencode / "opencode.json").write_text('{"baseURL": "https://api.example.com/v1"}')
    home.env["OPENAI_BASE_URL"] = f"http://[::1]:{port}/v1"
    rows = examine(home, 0)["clients"]
    assert [(row["state"], row["text"]) for row in rows] == [
        ("ok", "Claude Code points here: ~/.claude/settings.json"),
        ("note", "Codex points to port 4141: ~/.codex/config.toml"),
        ("ok", "OpenAI's libraries points here: $OPENAI_BASE_URL"),
    ]
