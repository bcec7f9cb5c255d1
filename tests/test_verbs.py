"""Section 20: what a verb says to somebody who got it wrong, and the verbs that change the file."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import Machine, echo, fetch, open_stream, wait_until
from support import PROGRAM
from test_command_line import typed

import aiclient_api as gw

Json = dict[str, Any]
HOSTED = "[providers.work]\ntype = 'copilot'\n"


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


def signed_in(machine: Machine, name: str) -> Path:
    """A sign-in at Copilot of a provider."""
    folder = machine.config / name
    folder.mkdir(mode=0o700, parents=True)
    path = folder / "token.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"type": "copilot", "github_token": "gho_0123456789abcdef"}))
    return path


# ---- suggestions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("statsu", "did you mean status?"),
        ("Status", "did you mean status?"),
        ("login", "did you mean auth copilot, auth kiro or auth import?"),
        ("logout", "did you mean auth revoke?"),
        ("version", "did you mean --version?"),
        ("ls", "did you mean models?"),
        ("revoke", "did you mean auth revoke?"),
        ("list", "did you mean auth list or provider list?"),
        ("zzzzzz", "there are: start, stop, "),
        ("auth lst", "did you mean list?"),
        ("auth zzzzzz", "there are: copilot, kiro, "),
        ("provider enabel x", "did you mean enable?"),
        ("start --prot 1", "did you mean --port?"),
        ("start --prot=1", "did you mean --port?"),
        ("logs --folow", "did you mean --follow?"),
        ("usage --by modle", "did you mean model?"),
        ("auth kiro --method gogle", "did you mean google?"),
        ("help statsu", "did you mean status?"),
        ("auth revoke copilto", "did you mean copilot?"),
        ("auth revoke echo", "responds locally and needs no sign-in"),
        ("provider enable kirro", "did you mean kiro?"),
        ("provider remove kiro", "kiro is built in"),
        ("provider remove zzz", "there is none"),
        ("config get server.prot", "did you mean server.port?"),
        ("config set server.prot 1", "did you mean 'port'?"),
        ("config unset server.prot", "is not set here"),
        ("config unset server.port", "is not set here"),
        ("start --port abc", "--port: must be an integer"),
        ("start --host http://x", "not a URL"),
        # Abbreviations are none.
        ("status --js", "did you mean --json?"),
        ("start --fore", "did you mean --foreground?"),
    ],
)
def test_wrong_usage_is_2_and_names_what_was_meant(machine: Machine, words: str, hint: str) -> None:
    assert hint in machine.run(*words.split()).failure(2)


def test_an_error_shows_the_usage_of_its_own_verb(machine: Machine) -> None:
    assert "usage: aiclient-api start [-h]" in machine.run("start", "--prot", "1").err
    assert "usage: aiclient-api auth [-h]" in machine.run("auth", "lst").err


def test_a_running_gateway_changes_no_exit_status(running: Machine) -> None:
    for words in ("provider disable nope", "usage --since x", "usage --recent x", "auth revoke x",
                  "config set server.port x", "start --port abc"):  # fmt: skip
        running.run(*words.split()).failure(2)


SECRETS = [
    "ghp_0123456789abcdefghij", "gho_0123456789abcdefghij", "ghu_0123456789abcdefghij",
    "ghs_0123456789abcdefghij", "github_pat_11ABCDEFG0abcdefghij", "sk-ant-0123456789abcdef",
    "aoaAAAAAGsecret0123456789:xyz/+=", "ksk_0123456789abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MA+/QUJDREVG==", "0123456789abcdef0123456789abcdef01234567",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS, ids=[secret[:6] for secret in SECRETS])
def test_no_error_repeats_an_argument_that_is_a_secret(machine: Machine, secret: str) -> None:
    """Whatever the verb, and wherever it stands."""
    for words in (
        ["auth", "copilot", "--token", secret], ["auth", "copilot", f"--token={secret}"],
        ["auth", "copilot", secret], ["auth", "kiro", "--method", secret], [secret],
        ["auth", "revoke", secret], ["provider", "enable", secret], ["provider", "remove", secret],
        ["config", "get", secret], ["config", "set", secret, "x"], ["config", "unset", secret],
        ["config", "set", "server.port", secret], ["config", "set", "models.x", secret + "/"],
        ["start", "--port", secret], ["start", "--host", f"http://{secret}"], ["start", secret],
        ["usage", "--since", secret], ["logs", "--lines", secret], ["logs", f"-n{secret}"],
        ["help", secret], ["completion", secret], ["auth", "import", "--from", secret],
    ):  # fmt: skip
        done = machine.run(*words)
        assert done.status == 2, (words, done)
        assert secret not in done.out + done.err, words


def test_a_password_after_an_unknown_flag_is_not_repeated(machine: Machine) -> None:
    for words in (["--apikey", "hunter2"], ["--apikey=hunter2"], ["--password", "hunter2"]):
        assert "hunter2" not in machine.run("start", *words).failure(2)


# ---- help ----------------------------------------------------------------------------------------


def test_help_explains_a_verb(machine: Machine) -> None:
    assert machine.run("help", "auth", "kiro").out == machine.run("auth", "kiro", "--help").out
    assert machine.run("help", "auth").out == machine.run("auth", "--help").out
    everything = machine.run("help")
    assert everything.status == 0 and everything.out == machine.run("--help").out
    assert machine.run("-V").out == machine.run("--version").out


@pytest.mark.parametrize("verb", gw.VERBS, ids=[verb.words for verb in gw.VERBS])
def test_the_example_of_every_verb_works(machine: Machine, verb: gw.Verb) -> None:
    """What needs a browser, a service manager, the network or an end is only read."""
    signed_in(machine, "work")
    machine.config_file.write_text(HOSTED + "[server]\nport = 0\n[limits.providers.work]\n")
    words = shlex.split(verb.example.partition(" > ")[0])
    gw.make_parser().parse_args(words)
    needs = {"auth copilot", "auth kiro", "auth import", "service install", "service uninstall",
             "doctor"}  # fmt: skip
    if verb.words in needs or "--follow" in words:
        return
    if verb.words == "auth revoke":
        signed_in(machine, "copilot")
    if verb.words == "start":
        words = ["start", "--port", "0"]
    elif verb.words in ("stop", "restart", "status", "models", "quota", "usage",
                        "config reload"):  # fmt: skip
        machine.start()
    env = {"EDITOR": "true"} if verb.words == "config edit" else {}
    if verb.words == "config init":
        machine.config_file.unlink()
        words.append("--yes")
    elif verb.words == "config unset":
        machine.run("config", "set", "server.port", "0")
    done = machine.run(*words, env=env)
    assert done.status == 0, done


@pytest.mark.parametrize("folder", ["plain", "with blanks"])
def test_hints_call_the_program_as_its_user_did(machine: Machine, folder: str) -> None:
    place = machine.folder / folder
    place.mkdir()
    copy = place / "aiclient_api.py"
    shutil.copy(PROGRAM, copy)
    for call, expected in (
        ([sys.executable, str(copy)], f"python3 {shlex.quote(str(copy))}"),
        ([sys.executable, "aiclient_api.py"], "python3 aiclient_api.py"),
        ([sys.executable, "-m", "aiclient_api"], "python3 -m aiclient_api"),
    ):
        done = subprocess.run(
            [*call, "status"], env={**machine.env, "PYTHONPYCACHEPREFIX": str(machine.folder)},
            cwd=place, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stderr.endswith(f"; start it with: {expected} start\n")


# ---- the file ------------------------------------------------------------------------------------

FILE = """# mine
api_key = "k"  # of all
[server] # where
port = 0
# more of it
idle_seconds = 5
[models]
"a.b" = "echo/echo"
[providers.work] # the other account
type = "copilot"
# kept
[limits.providers.work]
daily_tokens = 5
[logging]
level = "info"
"""


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("api_key", 'api_key = "k"  # of all\n'),
        ("server.port", "port = 0\n"),
        ("server.idle_seconds", "idle_seconds = 5\n"),
        ("models.a.b", '"a.b" = "echo/echo"\n'),
        ("logging", '[logging]\nlevel = "info"\n'),
        ("limits.providers.work", "[limits.providers.work]\ndaily_tokens = 5\n"),
    ],
)
def test_unset_removes_one_thing_and_keeps_the_rest(machine: Machine, key: str, gone: str) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text(FILE)
    machine.config_file.chmod(0o600)
    machine.run("config", "unset", "models.nothing").failure(2)
    assert machine.config_file.read_text() == FILE
    assert machine.run("config", "unset", key).status == 0
    assert machine.config_file.read_text() == FILE.replace(gone, "")


def test_unset_refuses_what_it_cannot_edit(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    text = "server = { port = 0, idle_seconds = 5 }\n"
    machine.config_file.write_text(text)
    assert "edit it" in machine.run("config", "unset", "server.port").failure(1)
    assert machine.config_file.read_text() == text


def test_get_prints_a_value_and_secrets_only_when_asked(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text(FILE + '[api_keys]\nci = "k2"\n')
    for key, value in {
        "server.port": "0", "server.host": "127.0.0.1", "models.a.b": "echo/echo",
        "server.allowed_hosts": "[]", "providers.work.enabled": "true",
    }.items():  # fmt: skip
        assert machine.run("config", "get", key).out == value + "\n"
    for key, value in {"api_key": "k", "api_keys.ci": "k2"}.items():
        assert machine.run("config", "get", key).out == "(set; --reveal shows it)\n"
        assert machine.run("config", "get", key, "--reveal").out == value + "\n"
    env = {"AICLIENT_API_SERVER_PORT": "7"}
    assert machine.run("config", "get", "server.port", env=env).out == "7\n"


def test_start_says_how_to_see_the_key(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text('[api_keys]\nci = "k2"\n')
    out = machine.run("start", "--port", "0").out
    assert f"to see it: python3 {PROGRAM} config get api_keys.ci --reveal\n" in out
    machine.run("stop")
    machine.config_file.write_text("")
    for flags in ([], ["--api-key", "k3"]):
        out = machine.run("start", "--port", "0", *flags).out
        assert "--reveal" not in out and "k3" not in out
        machine.run("stop")


def test_the_first_and_the_last_key_are_told_for_what_they_do(machine: Machine) -> None:
    """README: any client is served while no key is set."""
    machine.config.mkdir(parents=True)
    machine.config_file.write_text('api_key = ""\n')
    status = machine.start()
    assert fetch(status, "/v1/models").status == 200
    first = machine.run("config", "set", "api_keys.ci", "k1").out
    assert "From now on clients need a key: api_key or one of api_keys.\n" in first
    assert fetch(status, "/v1/models").status == 401
    assert "From now on" not in machine.run("config", "set", "api_keys.laptop", "k2").out
    assert "From now on" not in machine.run("config", "unset", "api_keys.laptop").out
    last = machine.run("config", "unset", "api_keys.ci").out
    assert "From now on clients need no key: there is none.\n" in last
    assert fetch(status, "/v1/models").status == 200


def test_edit_checks_and_applies_the_file(machine: Machine) -> None:
    status = machine.start()
    edit = 'sh -c \'echo "[logging]\nlevel = \\"$LEVEL\\"" > "$0"\''
    good = machine.run("config", "edit", env={"VISUAL": edit, "LEVEL": "debug"})
    assert good.status == 0 and "changed: logging.level\n" in good.out, good
    assert machine.config_file.stat().st_mode & 0o777 == 0o600
    bad = machine.run("config", "edit", env={"EDITOR": edit, "LEVEL": "loud"})
    assert "logging.level: must be one of" in bad.failure()
    assert "not-there" in machine.run("config", "edit", env={"EDITOR": "not-there"}).failure()
    assert machine.status()["pid"] == status["pid"]


def test_only_what_changed_is_reported(machine: Machine) -> None:
    machine.start()

    def changed(*words: str) -> str:
        done = machine.run("config", *words)
        assert done.status == 0, done
        return next(line for line in done.out.splitlines() if line.startswith("changed: "))

    for name in ("providers.copilot", "labels.ci"):
        key = f"limits.{name}.daily_tokens"
        assert changed("set", key, "5") == f"changed: {key}"
        assert changed("set", key, "6") == f"changed: {key}"
        assert changed("unset", key) == f"changed: {key}"
    assert changed("set", "server.idle_seconds", "9") == "changed: server.idle_seconds"
    done = machine.run("config", "set", "server.host", "localhost")
    assert "changed: server.host\n" in done.out and "takes effect after" in done.out
    assert changed("set", "server.idle_seconds", "8") == "changed: server.idle_seconds"
    assert machine.run("config", "reload").json() == {"changed": [], "needs_restart": []}
    with machine.config_file.open("a") as file:
        file.write(HOSTED)
    reloaded = machine.run("config", "reload").json()
    assert reloaded == {"changed": ["providers.work.type"], "needs_restart": []}


# ---- providers -----------------------------------------------------------------------------------


def test_providers_are_listed_switched_and_removed(machine: Machine) -> None:
    token = signed_in(machine, "work")
    machine.config_file.write_text(FILE)
    status = machine.start("--api-key", "k")
    assert machine.run("provider", "disable", "kiro").out.startswith("kiro is off ")
    rows = {row["name"]: row for row in machine.run("provider", "list").json()["providers"]}
    assert set(rows) == {"copilot", "kiro", "work", "echo"}
    assert rows["work"]["health"] == "ok" and not rows["kiro"]["enabled"]
    assert re_lines(typed(machine, ["provider", "list"]), "NAME", "kiro", "echo", "work")
    shown = typed(machine, ["status"])
    assert "disabled: kiro; to use one: " in shown and machine.status()["disabled"] == ["kiro"]
    done = machine.run("provider", "remove", "work")
    assert done.status == 0 and "Removed" in done.out, done
    assert not token.exists() and not token.parent.exists()
    written = tomllib.loads(machine.config_file.read_text())
    assert "work" not in written["providers"] and "work" not in written.get("limits", {}).get(
        "providers", {}
    )
    assert "work" not in [row["name"] for row in machine.status()["providers"]]
    assert machine.status()["pid"] == status["pid"]


def test_a_switch_that_a_variable_overrides_is_told(machine: Machine) -> None:
    variable = "AICLIENT_API_PROVIDERS_KIRO_ENABLED"
    machine.start(env={variable: "true"})
    assert f"{variable} overrides the file" in machine.run("provider", "disable", "kiro").out
    assert "default overrides" not in machine.run("config", "unset", "providers.kiro.enabled").out


def re_lines(text: str, *starts: str) -> bool:
    """Whether a line begins with each of these."""
    return all(any(row.startswith(start) for row in text.splitlines()) for start in starts)


def test_a_provider_that_is_in_use_is_not_removed(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    text = f'default_provider = "work"\n{HOSTED}'
    machine.config_file.write_text(text)
    assert "default_provider" in machine.run("provider", "remove", "work").failure(2)
    assert machine.config_file.read_text() == text


def test_revoke_offers_to_remove_a_provider_of_ones_own(machine: Machine) -> None:
    for name, offers in (("work", True), ("copilot", False)):
        signed_in(machine, name)
        machine.config_file.write_text(HOSTED)
        out = machine.run("auth", "revoke", name).out
        assert (f"python3 {PROGRAM} provider remove {name}" in out) is offers
    assert machine.run("provider", "remove", "work").status == 0


# ---- names in requests ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("off/gpt-4.1", ["The provider 'off' is disabled.", "provider enable off"]),
        ("ecoh/echo", ["there is no provider 'ecoh'", "Nearest: echo/echo"]),
        ("ecko", ["does not exist here", "Nearest: echo"]),
    ],
)
def test_a_model_that_is_not_there_is_told_why(machine: Machine, model: str, words: Any) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text(
        "default_provider = 'echo'\n[providers.off]\ntype = 'copilot'\nenabled = false\n"
    )
    status = machine.start()
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        body = {**echo("hi", model=model, max_tokens=9), "input": "hi"}
        reply = fetch(status, path, body)
        assert reply.status == 404
        assert [word for word in words if word not in reply.text] == []
    body = echo("hi")
    reply = fetch(status, "/v1/chat/completions", body, headers=["x-provider: off"])
    assert reply.status == 400 and "'off' is disabled" in reply.text
    assert "/v1/messages, " in fetch(status, "/v1/nowhere").text


# ---- usage and services --------------------------------------------------------------------------


def test_a_reset_asks_at_a_terminal_and_says_what_was_forgotten(machine: Machine) -> None:
    status = machine.start()
    fetch(status, "/v1/chat/completions", echo("hi"))
    assert "nothing was changed" in typed(machine, ["usage", "--reset"], "\n")
    assert machine.run("usage").json()["total"]["request_count"] == 1
    shown = typed(machine, ["usage", "--reset"], "yes\n")
    assert "Forget the usage of 1 request? (yes, no) [no]: " in shown
    assert "forgot the usage of 1 request; limits keep counting\n" in shown
    assert machine.run("usage").json()["total"]["request_count"] == 0
    assert "forgot the usage of 0 requests" in typed(machine, ["usage", "--reset", "--yes"])
    assert machine.run("usage", "--reset", "--yes").json()["total"]["request_count"] == 0


def test_service_print_prints_a_unit_and_nothing_else(machine: Machine) -> None:
    done = machine.run("service", "print", "--manager", "systemd")
    assert done.out.startswith("[Unit]\n") and done.err.endswith("/aiclient-api.service\n")


def test_ctrl_c_at_a_stop_leaves_it_stopping(machine: Machine) -> None:
    status = machine.start()
    with open_stream(status) as wire:
        stopping = machine.popen("stop")
        wait_until(lambda: machine.ask("status")["data"]["state"] == "stopping")
        stopping.send_signal(signal.SIGINT)
        stopping.communicate(timeout=20)
        assert stopping.returncode == 130
        assert wire.rest().endswith(b"0\r\n\r\n")
    wait_until(lambda: machine.processes() == [])
