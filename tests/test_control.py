"""Section 19: the control channel, spoken to over its real socket, also by those who may not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import Machine, connect, echo, fetch, read_frame, send_frame, wait_until

import aiclient_api as gw

Json = dict[str, Any]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

SECRET = "sk-EXAMPLE-hunter2-hunter2"
PROXY = "http://user:EXAMPLEpassword@127.0.0.1:1"


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine with a daemon, for tests that leave no trace in it."""
    with Machine(f'api_key = "{SECRET}"\n[network]\nproxy = "{PROXY}"\n') as machine:
        machine.start()
        yield machine


# ---- frames --------------------------------------------------------------------------------------


def test_one_connection_serves_many_messages(running: Machine) -> None:
    with running.control() as peer:
        for _ in range(3):
            send_frame(peer, {"method": "status", "params": {}})
            answer = read_frame(peer)
            assert answer["ok"] and answer["data"]["state"] == "serving"


def test_a_message_may_come_byte_by_byte(running: Machine) -> None:
    data = b'{"method":"status"}'
    with running.control() as peer:
        for byte in len(data).to_bytes(4, "big") + data:
            peer.sendall(bytes([byte]))
        assert read_frame(peer)["ok"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "a message is like"),
        (b"{", "a message is like"),
        (b"[]", "a message is like"),
        (b"\xff\xfe", "a message is like"),
        (b"[" * 5000, "a message is like"),
        (b'{"method":1}', "a message is like"),
        (b'{"method":"rm"}', "no such method; there are: config.reload, "),
        (b'{"method":"status","params":[]}', "params: must be an object"),
        (b'{"method":"config.set","params":{"key":"server.port"}}', "value: is required"),
        (b'{"method":"config.set","params":{"key":1,"value":"1"}}', "key: must be a string"),
        (b'{"method":"provider.enable","params":{"name":"../x"}}', "there is none; there are: "),
        (b'{"method":"logs.tail","params":{"lines":"x"}}', "lines: must be an integer"),
    ],
)
def test_nonsense_is_answered_and_hurts_nothing(
    running: Machine, message: bytes, words: str
) -> None:
    with running.control() as peer:
        send_frame(peer, message)
        answer = read_frame(peer)
        assert answer["ok"] is False and words in answer["error"]
        send_frame(peer, {"method": "status"})
        assert read_frame(peer)["ok"]


def test_a_method_that_fails_is_answered() -> None:
    broken: Any = None
    answer = asyncio.run(gw.run_control_method(broken, b'{"method":"status"}'))
    assert answer == {"ok": False, "error": "Internal error; see the log of the gateway."}


def test_a_level_that_is_none_is_told(running: Machine) -> None:
    answer = running.ask("logs.tail", level="loud")
    assert answer == {"ok": False, "error": "level: must be one of debug, info, warning, error."}


@pytest.mark.parametrize("size", [gw.MAX_CONTROL_BYTES + 1, 0xFFFFFFFF])
def test_an_oversized_frame_is_refused_before_it_comes(running: Machine, size: int) -> None:
    with running.control() as peer:
        peer.sendall(size.to_bytes(4, "big"))
        assert "a message may have" in read_frame(peer)["error"]
        with pytest.raises(EOFError):
            read_frame(peer)


def test_a_frame_of_the_largest_size_is_taken(running: Machine) -> None:
    padding = "x" * (gw.MAX_CONTROL_BYTES - 40)
    data = json.dumps({"method": "status", "params": {}, "p": padding}, separators=(",", ":"))
    padded = data.encode().ljust(gw.MAX_CONTROL_BYTES)
    assert len(padded) == gw.MAX_CONTROL_BYTES
    with running.control() as peer:
        sending = threading.Thread(target=send_frame, args=(peer, padded))
        sending.start()
        assert read_frame(peer)["ok"]
        sending.join(10)


def test_half_a_frame_and_then_nothing_ends_the_connection(running: Machine) -> None:
    with running.control() as peer:
        peer.sendall(b"\0\0\0\x10half")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            read_frame(peer)


# ---- who may, and how slowly ---------------------------------------------------------------------


def test_the_socket_is_the_owners_alone(running: Machine) -> None:
    path = running.pid_file.read_text().split("\n")[1]
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700


def test_slow_clients_block_nobody_and_are_let_go(running: Machine) -> None:
    held = [running.control() for _ in range(gw.MAX_CONTROL_CLIENTS - 2)]
    try:
        for peer in held:
            peer.sendall(b"\0\0")
        begun = time.monotonic()
        assert running.ask("status")["ok"]
        assert time.monotonic() - begun < gw.CONTROL_SECONDS - 1
        assert fetch(running.status(), "/healthz").status == 200
        # More than there is room for: turned away at once, and never a thread more.
        more = [running.control() for _ in range(8)]
        wait_until(lambda: any(is_ended(peer) for peer in more), 5)
        for peer in more:
            peer.close()
        begun = time.monotonic()
        for peer in held:
            assert peer.recv(1) == b""
        assert time.monotonic() - begun < gw.CONTROL_SECONDS + 3
    finally:
        for peer in held:
            peer.close()
    wait_until(lambda: running.ask("status")["ok"])


def is_ended(peer: socket.socket) -> bool:
    """Whether the other side has closed."""
    peer.settimeout(0.01)
    try:
        return peer.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_requests_are_served_while_the_channel_is_hammered(running: Machine) -> None:
    over = threading.Event()
    asked = []

    def hammer() -> None:
        while not over.is_set():
            asked.append(running.ask("status")["ok"])

    hammers = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in hammers:
        thread.start()
    status = running.status()
    headers = [f"x-api-key: {SECRET}"]
    for number in range(50):
        reply = fetch(status, "/v1/chat/completions", echo(f"word{number}"), headers)
        assert f"[echo] word{number}" in reply.text
    over.set()
    for thread in hammers:
        thread.join(20)
    assert asked and all(asked)


def ask_path(path: Path) -> Any:
    """The answer of whoever serves the socket at `path`; EOFError where it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(30)
        peer.connect(str(path))
        try:
            send_frame(peer, {"method": "status"})
            return read_frame(peer)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None


def test_clients_that_no_thread_could_be_started_for_take_no_room(tmp_path: Path) -> None:
    server = gw.ControlServer(str(tmp_path / "control"), lambda _: {"ok": True})
    threading.stack_size(1 << 47)  # more than there are addresses: no thread can be started
    try:
        for _ in range(gw.MAX_CONTROL_CLIENTS + 1):
            with pytest.raises(EOFError):
                ask_path(tmp_path / "control")
    finally:
        threading.stack_size(0)
    assert ask_path(tmp_path / "control") == {"ok": True}
    server.close()


def few_files() -> None:
    """No process may have more than 50 files open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    figures = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(figures[11]) + int(figures[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_gateway_without_descriptors_waits_for_some_and_does_not_spin() -> None:
    with Machine() as machine, contextlib.ExitStack() as held:
        status = machine.start(preexec_fn=few_files)
        clients = [held.enter_context(connect(status)) for _ in range(60)]
        wait_until(lambda: "too_many_open_files" in machine.log())
        peers = [held.enter_context(machine.control()) for _ in range(2)]
        before = cpu_s(status["pid"])
        peers[0].settimeout(1)
        with pytest.raises(TimeoutError):  # nobody can be accepted meanwhile
            peers[0].recv(1)
        assert cpu_s(status["pid"]) - before < 0.2
        for client in clients:
            client.close()
        send_frame(peers[1], {"method": "status"})
        assert read_frame(peers[1])["ok"]


# ---- whose socket it is --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["daemon.sock", "daemon.sock.new"])
def test_only_a_socket_is_replaced_by_the_control_socket(name: str) -> None:
    with Machine() as machine:
        machine.state.mkdir(parents=True, mode=0o700)
        path = machine.state / name
        path.write_text("precious")
        said = machine.run("start", "--port", "0").failure()
        assert f"{path} is not a socket of this user; move it away" in said
        assert path.read_text() == "precious"
        path.unlink()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))  # as a gateway leaves it that was killed
        machine.start()


# ---- methods -------------------------------------------------------------------------------------


def test_status_tells_how_things_are(running: Machine) -> None:
    status = running.ask("status")["data"]
    assert status["version"] == gw.__version__ and status["needs_key"] is True
    assert status["uptime_s"] >= 0 and status["requests_in_flight"] == 0
    assert {row["name"]: row["health"] for row in status["providers"]} == {
        "copilot": "not signed in", "kiro": "not signed in", "echo": "ready",
    }  # fmt: skip
    for row in status["providers"]:
        keys = {"name", "type", "health", "reason", "account", "plan", "token_expires_at"}
        assert row.keys() >= keys | {"cooldowns"}
    assert "auth copilot" in status["providers"][0]["reason"]


def test_no_secret_travels(running: Machine) -> None:
    """Whatever is asked, and whatever is set."""
    methods = sorted(gw.CONTROL_METHODS.keys() - {"restart"})
    params = {"name": "echo", "key": "logging.level", "value": "info"}
    said = [json.dumps(running.ask(method, **params)) for method in methods]
    said.append(json.dumps(running.ask("config.set", key="api_key", value=SECRET)))
    said.append(json.dumps(running.ask("config.set", key="network.proxy", value=PROXY)))
    assert "secrets do not travel here" in said[-1] and "secrets do not travel here" in said[-2]
    rows = running.ask("config.show")["data"]["settings"]
    shown = {row["key"]: row["value"] for row in rows}
    assert shown["api_key"] == shown["network.proxy"] == "(set, not shown)"
    assert not any(SECRET in words or "EXAMPLEpassword" in words for words in said)
    assert SECRET not in running.log() and "EXAMPLEpassword" not in running.log()


def test_a_setting_is_set_applied_and_kept() -> None:
    with Machine("# mine\n[server]\nmax_body_mib = 64 # as it was\n") as machine:
        status = machine.start()
        done = machine.ask("config.set", key="server.max_body_mib", value="1")
        assert done == {"ok": True, "data": {"changed": ["server.max_body_mib"],
                                             "needs_restart": []}}  # fmt: skip
        assert machine.config_file.read_text() == (
            "# mine\n[server]\nmax_body_mib = 1 # as it was\n"
        )
        body = echo("x" * 2_000_000)
        assert fetch(status, "/v1/chat/completions", body).status == 413
        refused = machine.ask("config.set", key="server.max_body_mib", value="0")
        assert "must be between 1 and 1024" in refused["error"]
        assert "max_body_mib = 1 " in machine.config_file.read_text()


def test_providers_are_switched_at_once_and_for_good() -> None:
    with Machine() as machine:
        status = machine.start()
        assert machine.ask("provider.disable", name="echo")["ok"]
        assert fetch(status, "/v1/chat/completions", echo("hi")).status != 200
        assert machine.run("restart").status == 0
        names = [row["name"] for row in machine.status()["providers"]]
        assert names == ["copilot", "kiro"]
        assert machine.ask("provider.enable", name="echo")["ok"]
        assert fetch(status, "/v1/chat/completions", echo("hi")).status == 200


def test_the_tail_of_the_log_can_be_asked_for(running: Machine) -> None:
    fetch(running.status(), "/v1/no-such-thing")
    lines = running.ask("logs.tail", lines=3)["data"]["lines"]
    assert len(lines) == 3 and "path=/v1/no-such-thing" in lines[-1]
    assert running.ask("logs.tail", level="error")["data"]["lines"] == []
