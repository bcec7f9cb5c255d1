"""Section 18: the lock, start and stop, signals, reload, restart; real processes throughout."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import (
    HEALTH,
    Done,
    Machine,
    connect,
    echo,
    fetch,
    is_alive,
    open_stream,
    request_bytes,
    wait_until,
)
from support import PROGRAM, ResponseReader, Wire, clean_environment

import aiclient_api as gw

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A user's machine on which nothing runs."""
    with Machine() as made:
        yield made


# ---- start ---------------------------------------------------------------------------------------


def test_start_returns_when_the_gateway_answers_and_says_what_to_do_next(machine: Machine) -> None:
    done = machine.run("start", "--port", "0", script=True)
    assert done.status == 0 and done.err == "", done
    url = re.search(r"listening on (http://127\.0\.0\.1:\d+) \(process (\d+)\)", done.out)
    assert url
    assert fetch({"url": url[1]}, "/healthz").status == 200
    assert "provider echo: ready" in done.out and "provider copilot: not signed in" in done.out
    line = done.out[done.out.index("curl") : done.out.index("It logs to")].replace("\\\n", " ")
    told = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
    if told.returncode != 127:  # where there is curl
        assert "[echo] hello" in told.stdout, told
    assert machine.processes() == [int(url[2])]


def test_the_daemon_has_left_the_terminal_and_everything_else(machine: Machine) -> None:
    reader, writer = os.pipe()
    try:
        pid = machine.start(pass_fds=[writer])["pid"]
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as left:
        assert left.read() == b""  # nobody holds the other end any more
    assert os.getsid(pid) not in (os.getsid(0), pid)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{pid}/fd/2") == str(machine.log_file)


def test_the_key_of_a_flag_is_in_no_argument_file_or_log(machine: Machine) -> None:
    key = "sk-EXAMPLE-of-a-flag"
    status = machine.start("--api-key", key)
    machine.run("restart")
    assert fetch(status, "/v1/models").status == 401
    assert fetch(status, "/v1/models", headers=[f"x-api-key: {key}"]).status == 200
    (pid,) = machine.processes()[-1:]
    assert key not in Path(f"/proc/{pid}/cmdline").read_text()
    for path in machine.folder.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_all_that_it_makes_is_private(machine: Machine) -> None:
    os.umask(os.umask(0))
    done = machine.run("start", "--port", "0", umask=0)
    assert done.status == 0, done
    made = [machine.state, *machine.state.iterdir()]
    assert {path.name for path in made} >= {"daemon.pid", "daemon.sock", "daemon.log"}
    open_to_others = [path for path in made if path.stat().st_mode & 0o077]
    assert not open_to_others


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_it_starts_where_standard_streams_are_closed(machine: Machine, closed: str) -> None:
    """Else its sockets would become what others take for their input."""
    line = shlex.join(machine.command("start", "--port", "0"))
    done = subprocess.run(
        ["/bin/sh", "-c", f"{line} {closed}"],
        env=machine.environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert done.stderr == b""
    assert fetch(machine.status(), "/healthz").status == 200


def test_a_second_start_says_what_runs(machine: Machine) -> None:
    status = machine.start()
    again = machine.run("start")
    assert again.status == 0 and again.err == ""
    assert (
        again.out == f"aiclient-api is already running: {status['url']} (process {status['pid']})\n"
    )
    for words in (["--port", "1"], ["--foreground"], ["--host", "localhost"],
                  ["--api-key", "other"], ["--log-file", "elsewhere.log"]):  # fmt: skip
        said = machine.run("start", *words).failure()
        assert f"the flags were not applied: {words[0]}; first run: " in said
    assert machine.processes() == [status["pid"]]


def test_flags_that_change_nothing_are_no_conflict(machine: Machine) -> None:
    status = machine.start("--api-key", "k1", "--log-file", str(machine.folder / "a.log"))
    port = status["url"].rpartition(":")[2]
    for words in (["--port", port], ["--port", "0"], ["--host", "127.0.0.1"], ["--api-key", "k1"],
                  ["--log-file", "a.log"], ["--port", "", "--host", ""]):  # fmt: skip
        again = machine.run("start", *words)
        assert (again.status, again.err) == (0, ""), (words, again)
    assert "--api-key" in machine.run("start", "--api-key", "k2", "--port", port).failure()


@pytest.mark.parametrize("blank", ["", " "])
def test_empty_variables_and_flags_leave_the_gateway_as_safe_as_it_was(
    machine: Machine, blank: str
) -> None:
    """The key of the file stays, and it listens on loopback only."""
    machine.config.mkdir(parents=True)
    machine.config_file.write_text('api_key = "k"\n[server]\nport = 0\nhost = ""\n')
    names = ("KEY", "API_KEY", "HOST", "SERVER_HOST", "PORT", "SERVER_PORT", "LOGGING_LEVEL")
    env = {f"AICLIENT_API_{name}": blank for name in names}
    flags = [f"{flag}={blank}" for flag in ("--host", "--port", "--api-key", "--log-file")]
    started = machine.run("start", *flags, env=env)
    assert started.status == 0, started
    status = machine.status()
    assert status["url"].startswith("http://127.0.0.1:") and status["needs_key"]
    assert fetch(status, "/v1/models").status == 401


def test_the_variables_of_a_kubernetes_service_cost_one_warning(machine: Machine) -> None:
    env = {
        "AICLIENT_API_PORT": "tcp://10.0.0.1:9090",
        "AICLIENT_API_SERVICE_HOST": "10.0.0.1",
        "AICLIENT_API_PORT_9090_TCP_ADDR": "10.0.0.1",
    }
    machine.start(env=env)
    machine.run("config", "reload")
    assert machine.run("config", "set", "logging.level", "info", env=env).err.count("WARN") == 1
    (line,) = [row for row in machine.log().splitlines() if "service_variables_ignored" in row]
    assert line.endswith(" WARNING service_variables_ignored names=" + ",".join(sorted(env)))


def test_many_starts_at_once_make_one_daemon(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text("[server]\nport = 0\n")
    starts = [machine.popen("start") for _ in range(10)]
    said = [start.communicate(timeout=60) for start in starts]
    assert [start.returncode for start in starts] == [0] * 10, said
    (pid,) = machine.processes()
    assert all(f"(process {pid})" in out for out, _ in said), said
    assert sum("is already running" in out for out, _ in said) == 9


def test_a_busy_port_is_told_with_what_shows_who_has_it(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = machine.run("start", "--port", str(port)).failure()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert f"lsof -i :{port}" in said and "try --port" in said
    assert machine.processes() == []


def test_of_a_host_with_several_addresses_those_of_this_machine_will_do(machine: Machine) -> None:
    """As `localhost` is `::1` too where there is no IPv6."""
    hosts = machine.folder / "hosts"
    hosts.write_text("192.0.2.1 both.test other.test\n127.0.0.1 both.test\n")
    inside = f"mount --bind {hosts} /etc/hosts && exec"
    # Names of its own, for this process and what it starts.
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-c"]
    tried = [*namespace, f"{inside} true"]
    if (
        not shutil.which("unshare")
        or subprocess.run(tried, capture_output=True, check=False).returncode
    ):
        pytest.skip("no file can be mounted here")

    def start(host: str) -> Done:
        line = shlex.join(machine.command("start", "--port", "0", "--host", host))
        env = machine.environment(AICLIENT_API_KEY="sk-EXAMPLE")
        done = subprocess.run(
            [*namespace, f"{inside} {line}"],
            env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return Done(done)

    said = start("other.test").failure()
    assert "other.test:0: Cannot assign requested address; try --host" in said
    assert start("both.test").status == 0
    port = machine.status()["url"].rpartition(":")[2]
    assert fetch({"url": f"http://127.0.0.1:{port}"}, "/healthz").status == 200


def test_a_start_that_fails_late_tells_why_and_leaves_nothing(machine: Machine) -> None:
    machine.state.mkdir(parents=True)
    (machine.state / "daemon.sock.new").mkdir()
    said = machine.run("start", "--port", "0").failure()
    assert "the gateway did not start" in said and "daemon.sock" in said
    assert machine.processes() == []
    (machine.state / "daemon.sock.new").rmdir()
    machine.start()


def test_a_python_that_cannot_run_is_told_with_the_last_lines_of_the_log(machine: Machine) -> None:
    machine.state.mkdir(parents=True)
    copied = machine.folder / "gateway.py"
    text = PROGRAM.read_text("utf-8")
    copied.write_text(text.replace("def main_detached(", "def main_detached_("))
    done = Done(
        subprocess.run(
            [sys.executable, str(copied), "start", "--port", "0"],
            env=machine.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    assert done.status == 1 and "the gateway did not start" in done.err
    assert "AttributeError" in done.err  # of the log


def test_the_foreground_has_the_same_lock_and_channel(machine: Machine) -> None:
    process = machine.popen("start", "--foreground", "--port", "0")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        status = machine.status()
        assert status["url"] in line and status["pid"] == process.pid
        assert status["log_file"] is None and not status["detached"]
        assert "in the foreground" in machine.run("restart").failure()
        assert "terminal" in machine.run("logs").failure()
        assert machine.run("stop").status == 0
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    """What it prints once it serves; its log if it never does."""
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline() or process.stderr.read()


def url_in(line: str) -> Json:
    """What `fetch` wants to know of a gateway that has printed this line."""
    found = re.search(r"listening on (http://\S+)", line)
    assert found, line
    return {"url": found[1]}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("flags", [[], ["-I"], ["-E", "-s"], ["-X", "dev"]], ids=" ".join)
def test_the_bare_file_in_the_foreground_runs_from_bytecode(
    machine: Machine, flags: list[str]
) -> None:
    """Compiling the file takes 45 MB that would never be given back."""
    command = [sys.executable, *flags, str(PROGRAM), "start", "--foreground", "--port", "0"]
    process = subprocess.Popen(
        command, env=machine.environment(), cwd=machine.folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = first_line(process)
        assert f"(process {process.pid})" in line
        assert process.stdout is not None and f"{PROGRAM} auth copilot" in process.stdout.readline()
        assert fetch(url_in(line), "/healthz").status == 200
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 45e6
        words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert words[1 : 1 + len(flags)] == flags and str(PROGRAM) in words
        said = machine.run("start", "--foreground", script=True).failure()
        assert "flags were not applied" in said
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_in_the_foreground_it_also_runs_from_standard_input(machine: Machine) -> None:
    words = ["start", "--foreground", "--port", "0"]
    with PROGRAM.open() as program:
        process = subprocess.Popen(
            [sys.executable, "-", *words], env=machine.environment(), cwd=machine.folder,
            stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        line = first_line(process)
        assert f"(process {process.pid})" in line
        assert fetch(url_in(line), "/healthz").status == 200
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def without_power() -> list[str]:
    """What a command begins with so that not even root writes where its mode forbids it."""
    if os.getuid():
        return []
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("root cannot give up its powers here")
    return prefix


@pytest.mark.parametrize("is_there", [False, True], ids=["no state folder", "read-only"])
@pytest.mark.parametrize("script", [False, True], ids=["module", "file"])
def test_in_the_foreground_it_serves_without_a_place_to_write(
    machine: Machine, is_there: bool, script: bool
) -> None:
    """As in a container whose root is read-only: usage is counted in memory."""
    machine.state.mkdir(mode=0o700, parents=True)
    place = machine.state if is_there else machine.folder / "closed"
    place.mkdir(mode=0o700, exist_ok=True)
    if not is_there:
        machine.env["XDG_STATE_HOME"] = str(place)
    place.chmod(0o500)
    before = sorted(path.name for path in place.iterdir())
    words = machine.command("start", "--foreground", "--port", "0", script=script)
    process = subprocess.Popen(
        [*without_power(), *words], env=machine.environment(), cwd=machine.folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        status = url_in(first_line(process))
        assert fetch(status, CHAT, echo("hello")).status == 200
        wait_until(lambda: json.loads(fetch(status, "/v1/usage").body)["providers"])
        usage = json.loads(fetch(status, "/v1/usage").body)
        assert usage["providers"]["echo"]["request_count"] == 1
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0 and "state_not_writable" in err and "Traceback" not in err
        assert sorted(path.name for path in place.iterdir()) == before
    finally:
        process.kill()
        process.communicate()
        place.chmod(0o700)


def test_the_first_process_of_a_container_drains_and_exits(machine: Machine) -> None:
    """Process 1 of its namespace, to which the kernel passes only signals that it handles."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("there are no namespaces here")
    words = machine.command("start", "--foreground", "--port", "0", script=True)
    process = subprocess.Popen(
        [*unshare, *words], env=machine.environment(), cwd=machine.folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = first_line(process)
        assert "(process 1)" in line
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (first,) = map(int, children)
        assert machine.status()["pid"] == 1
        with open_stream(url_in(line)) as stream:
            os.kill(first, signal.SIGTERM)
            assert stream.read_until(STREAM_END)
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
        machine.pid_file.unlink(missing_ok=True)  # its number is another process's here


def test_two_state_folders_are_two_gateways(machine: Machine) -> None:
    with Machine() as other:
        first, second = machine.start(), other.start()
        assert first["pid"] != second["pid"]
        assert machine.run("stop").status == 0
        assert other.status()["pid"] == second["pid"]


# ---- the lock ------------------------------------------------------------------------------------


def test_a_killed_daemon_hinders_nobody(machine: Machine) -> None:
    for _ in range(2):
        status = machine.start()
        os.kill(status["pid"], signal.SIGKILL)
        wait_until(lambda: not is_alive(status["pid"]))  # noqa: B023 - called at once
        assert machine.run("status").failure(3)
        assert machine.run("stop").failure(3)


def test_a_pid_file_that_names_a_bystander_hurts_nobody(machine: Machine) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        machine.state.mkdir(parents=True)
        machine.pid_file.write_text(f"{bystander.pid}\n{machine.state}/daemon.sock\n")
        assert machine.run("stop").failure(3)
        assert machine.run("restart").failure(3)
        status = machine.start()
        assert status["pid"] != bystander.pid
        assert machine.run("stop").status == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()


@pytest.mark.parametrize("text", ["", "-1\n/x\n", "0\n/x\n", "1\n/x", "x\n", "\0" * 99, "9" * 99])
def test_a_pid_file_of_nonsense_names_nobody(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pid"
    path.write_text(text)
    assert gw.read_pid_file(str(path)) == (0, "")


def test_a_link_in_the_place_of_the_pid_file_is_refused(machine: Machine) -> None:
    machine.state.mkdir(parents=True)
    target = machine.folder / "precious"
    target.write_text("kept")
    machine.pid_file.symlink_to(target)
    assert "cannot be used as the lock" in machine.run("start", "--port", "0").failure()
    assert target.read_text() == "kept"


def test_the_lock_is_taken_on_the_file_that_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "pid")
    first = gw.take_lock(path)
    assert first is not None and gw.take_lock(path) is None and gw.is_locked(path)
    os.unlink(path)
    second = gw.take_lock(path)  # whoever removes the file has removed the lock
    assert second is not None and gw.is_locked(path)
    os.close(first)
    assert gw.is_locked(path)
    os.close(second)
    assert not gw.is_locked(path)


# ---- stop and signals ----------------------------------------------------------------------------


def test_stop_waits_for_a_stream(machine: Machine) -> None:
    status = machine.start()
    with open_stream(status) as wire:
        stopping = machine.popen("stop")
        wait_until(lambda: machine.ask("status")["data"]["state"] == "stopping")
        assert machine.ask("status")["data"]["requests_in_flight"] == 1
        assert wire.rest().endswith(STREAM_END)
        out, err = stopping.communicate(timeout=20)
    assert (stopping.returncode, out) == (0, "stopped\n"), err
    waiting = "1 request in flight; waiting up to 30 s (Ctrl-C: do not wait; it still stops)\n"
    assert err == waiting
    assert machine.processes() == []
    assert not (machine.state / "daemon.sock").exists()


def test_stop_tells_what_became_of_what_it_waited_for(machine: Machine) -> None:
    status = machine.start(env={"AICLIENT_API_SERVER_DRAIN_SECONDS": "0.2"})
    with open_stream(status):
        done = machine.run("stop", env={"AICLIENT_API_SERVER_DRAIN_SECONDS": "0.2"})
    assert done.out == "stopped; requests that had not finished were cut off\n"
    assert done.err.startswith("1 request in flight; waiting up to 0.2 s")


def test_a_frozen_gateway_is_told_and_ended(machine: Machine) -> None:
    """By every verb within seconds, also where a service is asked; stop insists in the end."""
    pid = machine.start()["pid"]
    os.kill(pid, signal.SIGSTOP)  # it can do nothing any more
    verbs = ("status", "config show", "config reload", "provider disable echo", "usage", "models",
             "quota", "restart", "start", "config set logging.level info")  # fmt: skip
    began = time.monotonic()
    asked = [machine.popen(*words.split()) for words in verbs]
    for process in asked:
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 1 and "the gateway does not respond" in said, said
        assert f"process {pid} holds the lock but does not answer" in said
        stop = "python3 -m aiclient_api stop"
        assert f"end it with: {stop}; or, if somebody has paused it: kill -CONT {pid}\n" in said
    assert time.monotonic() - began < 45  # ten programs start at once
    done = machine.run("stop")
    assert done.status == 0 and "killing it" in done.err, done
    assert time.monotonic() - began < 60
    assert not is_alive(pid) and machine.processes() == []


def test_a_second_signal_ends_it_at_once(machine: Machine) -> None:
    status = machine.start()
    with open_stream(status):
        os.kill(status["pid"], signal.SIGTERM)
        wait_until(lambda: machine.ask("status")["data"]["state"] == "stopping")
        os.kill(status["pid"], signal.SIGTERM)
        wait_until(lambda: not is_alive(status["pid"]), 5)
    machine.start()


def test_a_hangup_reloads_and_a_bad_file_changes_nothing(machine: Machine) -> None:
    status = machine.start()
    assert fetch(status, "/v1/models").status == 200
    machine.config.mkdir(parents=True, exist_ok=True)
    machine.config_file.write_text('api_key = "first"\n')
    os.kill(status["pid"], signal.SIGHUP)
    wait_until(lambda: fetch(status, "/v1/models").status == 401)
    machine.config_file.write_text('api_key = "second"\n[server]\nprot = 1\n')
    os.kill(status["pid"], signal.SIGHUP)
    wait_until(lambda: "configuration_not_reloaded" in machine.log())
    assert "server.prot" in machine.log()
    assert fetch(status, "/v1/models", headers=["x-api-key: first"]).status == 200
    said = machine.run("config", "reload").failure()
    assert "server.prot: is not a known key; did you mean 'port'?" in said


def test_a_broken_pipe_and_other_signals_do_not_end_it(machine: Machine) -> None:
    status = machine.start()
    for number in (signal.SIGPIPE, signal.SIGUSR1, signal.SIGHUP, signal.SIGWINCH):
        os.kill(status["pid"], number)
    assert fetch(status, "/healthz").status == 200


def test_usr1_opens_the_log_anew(machine: Machine) -> None:
    status = machine.start()
    moved = machine.log_file.rename(machine.state / "moved")
    os.kill(status["pid"], signal.SIGUSR1)
    wait_until(machine.log_file.exists)
    fetch(status, "/v1/models")
    wait_until(lambda: "path=/v1/models" in machine.log())
    assert "listening" in moved.read_text()


# ---- reload --------------------------------------------------------------------------------------


class Load:
    """Clients that ask without a pause, half of them on connections that they keep."""

    def __init__(self, status: Json, clients: int = 6) -> None:
        self.status = status
        self.answers = 0
        self.failures: list[str] = []
        self.over = threading.Event()
        works = [self.work_kept if n % 2 else self.work_new for n in range(clients)]
        self.threads = [threading.Thread(target=work) for work in works]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(30)

    def check(self, reply: Any, words: str) -> None:
        """Counts an answer."""
        good = reply.status == 200 and reply.complete and f"[echo] {words}" in reply.text
        self.answers += 1
        if not good:
            self.failures.append(repr(reply))

    def work_new(self) -> None:
        """A connection for each request."""
        while not self.over.is_set():
            words = f"word{self.answers}"
            try:
                self.check(fetch(self.status, CHAT, echo(words)), words)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a lost request
                self.failures.append(repr(error))

    def work_kept(self) -> None:
        """As many requests on a connection as the gateway allows."""
        while not self.over.is_set():
            try:
                self.converse()
            except Exception as error:  # noqa: BLE001 - as above
                self.failures.append(repr(error))

    def converse(self) -> None:
        """One connection, until one of the two has had enough."""
        with connect(self.status) as sock:
            reader = ResponseReader(lambda: sock.recv(65536))
            while not self.over.is_set():
                words = f"word{self.answers}"
                sock.sendall(request_bytes(CHAT, echo(words)))
                reply = reader.take_reply("POST")
                assert reply is not None, "closed without a response"
                self.check(reply, words)
                if reply.headers.get("connection", "") == "close":
                    return

    def more(self, answers: int = 30) -> None:
        """Returns after so many more answers."""
        target = self.answers + answers
        wait_until(lambda: self.answers >= target)


def test_a_storm_of_reloads_under_load_drops_nothing(machine: Machine) -> None:
    status = machine.start()
    with Load(status) as load:
        for number in range(30):
            level = ("info", "warning")[number % 2]
            if number % 3:
                machine.config.mkdir(parents=True, exist_ok=True)
                machine.config_file.write_text(f'[logging]\nlevel = "{level}"\n')
                os.kill(status["pid"], signal.SIGHUP)
            else:
                connect_seconds = 5 + number  # the providers and their client are made anew
                text = f"[network]\nconnect_seconds = {connect_seconds}\n"
                machine.config_file.parent.mkdir(parents=True, exist_ok=True)
                machine.config_file.write_text(text)
                assert machine.ask("config.reload")["ok"]
            load.more(5)
    assert load.failures == []
    assert machine.processes() == [status["pid"]]


def test_a_stream_goes_on_with_the_provider_that_a_reload_has_taken_away(machine: Machine) -> None:
    status = machine.start()
    with open_stream(status) as wire:
        assert machine.ask("provider.disable", name="echo")["ok"]
        assert fetch(status, CHAT, echo("hi")).status in (404, 503)
        assert wire.read_until(b"\r\n0\r\n\r\n").endswith(STREAM_END)
    assert machine.ask("provider.enable", name="echo")["ok"]
    assert "[echo] hi" in fetch(status, CHAT, echo("hi")).text


def test_what_needs_a_restart_is_told_and_the_rest_is_applied(machine: Machine) -> None:
    machine.config.mkdir(parents=True)
    machine.config_file.write_text("[server]\nport = 0\n")
    assert machine.run("start").status == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    machine.config_file.write_text(f"[server]\nport = {port}\nmax_body_mib = 1\n")
    done = machine.run("config", "reload").json()
    assert done == {"changed": ["server.max_body_mib", "server.port"],
                    "needs_restart": ["server.port"]}  # fmt: skip
    status = machine.status()
    assert fetch(status, CHAT, echo("x" * 2_000_000)).status == 413
    assert machine.run("restart").status == 0
    assert machine.status()["url"] == f"http://127.0.0.1:{port}"
    wait_until(lambda: machine.processes() == [machine.status()["pid"]])  # the old one has ended
    with pytest.raises(ConnectionRefusedError):
        connect(status)


# ---- restart -------------------------------------------------------------------------------------


def test_restarts_under_load_lose_no_request(machine: Machine) -> None:
    status = machine.start("--api-key", "", "--host", "127.0.0.1")
    pids = {status["pid"]}
    with Load(status) as load:
        for _ in range(2):
            load.more()
            done = machine.run("restart")
            assert done.status == 0, done
            assert status["url"] in done.out
            pids.add(machine.status()["pid"])
        load.more()
    assert load.failures == []
    assert len(pids) == 3
    wait_until(lambda: len(machine.processes()) == 1)
    assert "Traceback" not in machine.log()


def test_a_stream_ends_in_the_old_process_while_the_new_one_serves(machine: Machine) -> None:
    old = machine.start()
    with open_stream(old) as wire:
        done = machine.run("restart")
        new = machine.status()
        assert new["pid"] != old["pid"] and new["url"] == old["url"]
        first, last = done.out.splitlines()
        assert first == (
            f"restarted: aiclient-api {new['version']} listening on {new['url']} "
            f"(process {new['pid']})"
        )
        assert last == f"process {old['pid']} finishes 1 request in flight"
        assert "[echo] hi" in fetch(new, CHAT, echo("hi")).text
        assert is_alive(old["pid"])
        assert wire.read_until(b"\r\n0\r\n\r\n").endswith(STREAM_END)
    wait_until(lambda: not is_alive(old["pid"]))
    assert machine.status()["pid"] == new["pid"]  # the old one took nothing along


def test_an_idle_client_of_the_old_process_can_ask_once_more(machine: Machine) -> None:
    old = machine.start()
    with Wire(connect(old)) as wire:
        wire.send(HEALTH.encode())
        assert wire.reply().status == 200
        assert machine.run("restart").status == 0
        wire.send(HEALTH.encode())
        reply = wire.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")


def test_a_restart_that_fails_leaves_the_old_one(machine: Machine) -> None:
    status = machine.start()
    machine.config.mkdir(parents=True, exist_ok=True)
    machine.config_file.write_text("[server]\nprot = 1\n")
    said = machine.run("restart").failure()
    assert "the old process keeps serving" in said and "server.prot" in said
    assert machine.status()["pid"] == status["pid"]
    assert machine.processes() == [status["pid"]]
    machine.config_file.write_text("")
    assert machine.run("restart").status == 0


def test_restarts_at_once_leave_one_gateway(machine: Machine) -> None:
    status = machine.start()
    restarts = [machine.popen("restart") for _ in range(6)]
    said = [restart.communicate(timeout=60) for restart in restarts]
    assert any(restart.returncode == 0 for restart in restarts), said
    wait_until(lambda: len(machine.processes()) == 1)
    assert machine.processes() == [machine.status()["pid"]]
    assert fetch(status, "/healthz").status == 200
    assert machine.run("stop").status == 0
    assert machine.processes() == []


def test_a_stop_during_a_restart_ends_both(machine: Machine) -> None:
    old = machine.start()
    restart = machine.popen("restart")
    wait_until(lambda: machine.ask("status")["data"]["state"] == "restarting")
    os.kill(old["pid"], signal.SIGTERM)
    _, err = restart.communicate(timeout=30)
    assert restart.returncode == 1 and "stopped during the restart" in err
    wait_until(lambda: machine.processes() == [])
    assert machine.run("status").failure(3)


def test_a_successor_ignores_what_it_does_not_know_and_does_without_the_rest(
    machine: Machine,
) -> None:
    """Versions follow each other in both directions."""
    machine.state.mkdir(parents=True, mode=0o700)
    starter, peer = socket.socketpair()
    launch = {"flags": {"server.port": "0", "server.colour": "red"}, "hue": 1}
    words = ["0", gw.program_file(), "main_detached", "", str(peer.fileno())]
    with peer:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", gw.LAUNCHER, *words],
            env=machine.env, pass_fds=[peer.fileno()],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    with starter, process:
        assert process.stdin is not None
        process.stdin.write(gw.load_bytecode())
        process.stdin.close()
        starter.sendall(json.dumps(launch).encode())
        starter.shutdown(socket.SHUT_WR)
        assert process.stderr is not None
        status = json.loads(starter.makefile("rb").read())
        process.terminate()
        assert "url" in status, (status, process.stderr.read())


# ---- service managers ----------------------------------------------------------------------------


def test_sockets_of_a_service_manager_are_accepted(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        words = machine.command("start", "--foreground")
        # As systemd does it: descriptor 3, and the process id of whoever is to take it.
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(listener.fileno()), *words],
            env=machine.environment(), pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port} " in process.stdout.readline()
            assert fetch({"url": f"http://127.0.0.1:{port}"}, "/healthz").status == 200
        finally:
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == 0


def test_a_service_manager_hears_when_it_is_ready_and_who_it_is(machine: Machine) -> None:
    path = str(machine.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(20)
        env = machine.environment(NOTIFY_SOCKET=path)
        process = machine.popen("start", "--foreground", "--port", "0", env=env)
        try:
            assert manager.recv(999).decode() == f"READY=1\nMAINPID={process.pid}"
            assert machine.run("restart").status == 0
            ready = manager.recv(999).decode()
            assert ready == f"READY=1\nMAINPID={machine.status()['pid']}"
            assert process.wait(20) == 0
            assert machine.run("stop").status == 0
            assert manager.recv(999) == b"STOPPING=1"
        finally:
            process.kill()
            process.communicate()


# ---- limits ------------------------------------------------------------------------------------


def few_files() -> None:
    """No process may have more than 50 files open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))


def test_more_clients_than_files_are_told_once_and_served_later(machine: Machine) -> None:
    status = machine.start(preexec_fn=few_files)
    clients = [connect(status) for _ in range(80)]
    wait_until(lambda: "too_many_open_files" in machine.log())
    for client in clients:
        client.close()
    wait_until(lambda: machine.run("status").status == 0)
    assert "[echo] hi" in fetch(status, CHAT, echo("hi")).text
    assert machine.log().count("too_many_open_files") == 1 and "Traceback" not in machine.log()


# ---- what others could have written --------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "mode"),
    [
        ("state/aiclient-api", 0o777),
        ("state/aiclient-api", 0o770),
        ("config/aiclient-api", 0o777),
    ],
)
def test_a_folder_that_others_can_write_to_is_refused(
    machine: Machine, which: str, mode: int
) -> None:
    folder = machine.folder / which
    folder.mkdir(parents=True)
    folder.chmod(mode)
    said = machine.run("start", "--port", "0").failure()
    assert said.count("\n") == 1 and "move it away" in said and f"chmod go-w {folder}" in said
    folder.chmod(0o755)
    machine.start()


def test_a_folder_in_one_that_everybody_can_write_to_is_refused(machine: Machine) -> None:
    for which in ("state", "config"):
        folder = machine.folder / which
        (folder / "aiclient-api").mkdir(parents=True)
        folder.chmod(0o777)
        assert f"chmod o-w {folder}" in machine.run("start", "--port", "0").failure()
        folder.chmod(0o1777)  # nobody can rename what is another user's
    machine.start()


@pytest.mark.parametrize("name", ["config.toml", "daemon.pid"])
def test_a_file_that_others_can_write_to_is_refused(machine: Machine, name: str) -> None:
    folder = machine.config if name == "config.toml" else machine.state
    folder.mkdir(parents=True)
    path = folder / name
    path.touch()
    path.chmod(0o664)
    assert f"chmod go-w {path}" in machine.run("start", "--port", "0").failure()
    if os.getuid() == 0:
        path.chmod(0o600)
        os.chown(path, 12345, 12345)
        assert f"{path} belongs to another user" in machine.run("start", "--port", "0").failure()


def test_a_linked_configuration_that_everybody_can_replace_is_refused(machine: Machine) -> None:
    machine.config.mkdir(parents=True, mode=0o700)
    folder = machine.folder / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "config.toml").write_text("")
    machine.config_file.symlink_to(folder / "config.toml")
    assert f"chmod o-w {folder}" in machine.run("start", "--port", "0").failure()
    folder.chmod(0o775)  # a group may be that of one user
    machine.start()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs two users")
@pytest.mark.parametrize("name", ["config.toml", "daemon.log"])
def test_a_link_that_another_user_has_made_is_not_followed(machine: Machine, name: str) -> None:
    folder = machine.config if name == "config.toml" else machine.state
    folder.mkdir(parents=True, mode=0o700)
    (machine.folder / "victim").write_text("")
    (folder / name).symlink_to(machine.folder / "victim")
    machine.start()
    machine.run("stop")
    before = (machine.folder / "victim").read_text()
    os.lchown(folder / name, 12345, 12345)
    assert "symbolic link created by another user" in machine.run("start", "--port", "0").failure()
    assert (machine.folder / "victim").read_text() == before


def test_a_running_gateway_is_not_lost_when_its_folder_is_opened_to_others(
    machine: Machine,
) -> None:
    status = machine.start()
    machine.state.chmod(0o777)
    machine.config.mkdir(parents=True)
    machine.config.chmod(0o777)
    for verb in ("status", "stop"):
        assert f"chmod go-w {machine.state}" in machine.run(verb).failure()
    machine.state.chmod(0o700)
    assert f"chmod go-w {machine.config}" in machine.run("config", "reload").failure()
    assert fetch(status, "/healthz").status == 200
    assert machine.run("stop").status == 0


def test_folders_are_private_whatever_verb_makes_them(machine: Machine) -> None:
    assert machine.run("config", "set", "server.port", "0", umask=0).status == 0
    assert machine.run("start", umask=0).status == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["config.toml", "daemon.pid", "daemon.log"])
def test_what_is_in_the_place_of_a_file_is_reported_and_left(
    machine: Machine, name: str, make: Callable[[Path], None]
) -> None:
    """It is not waited for, as whoever opens a FIFO does."""
    folder = machine.config if name == "config.toml" else machine.state
    folder.mkdir(parents=True, mode=0o700)
    make(folder / name)
    kind = (folder / name).stat().st_mode
    said = machine.run("start", "--port", "0").failure()
    assert str(folder / name) in said and said.count("\n") == 1
    assert (folder / name).stat().st_mode == kind
    (folder / name).rename(machine.folder / "moved")
    assert machine.processes() == []


# ---- bytecode ------------------------------------------------------------------------------------


def test_what_runs_is_the_file_as_it_is(machine: Machine) -> None:
    """Also where another one had its size and its time: only its bytes tell."""
    copied = machine.folder / "gateway.py"
    text = PROGRAM.read_text("utf-8")
    for version in ("0.8.1", "0.8.2"):
        copied.write_text(text.replace(f'"{gw.__version__}"', f'"{version}"'))
        os.utime(copied, (0, 0))
        command = [sys.executable, str(copied), "start", "--port", "0"]
        subprocess.run(command, env=machine.environment(), check=True, timeout=60)
        assert machine.status()["version"] == version
        assert machine.run("stop").status == 0


# ---- broken paths --------------------------------------------------------------------------------


def test_a_state_folder_that_cannot_be_is_told(machine: Machine) -> None:
    (machine.folder / "state").write_text("a file")
    said = machine.run("start", "--port", "0").failure()
    assert "cannot be used: " in said and "XDG_STATE_HOME" in said
    assert machine.run("status").failure(3)


@pytest.mark.parametrize("odd", [" a\nb %h$HOME\t\x1b[3mend\n", "\udcff"])
def test_folders_of_any_name_serve_all_verbs(machine: Machine, odd: str) -> None:
    folder = machine.folder / odd
    machine.env |= {"XDG_STATE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    machine.state = folder / "aiclient-api"
    machine.start()
    for words in ("status", "logs", "config set logging.level debug", "restart", "service print"):
        done = machine.run(*words.split(), env={"PYTHONIOENCODING": "ascii:strict"})
        assert done.status == 0, (words, done)
    assert machine.run("stop").status == 0


@pytest.mark.parametrize(
    "changes",
    [{"HOME": ""}, {"HOME": "here"}, {"HOME": "/"}, {"XDG_STATE_HOME": "here"},
     {"HOME": "", "XDG_STATE_HOME": "~/state"}],
    ids=str,
)  # fmt: skip
def test_a_home_that_is_no_absolute_path_is_refused(
    machine: Machine, changes: dict[str, str]
) -> None:
    del machine.env["XDG_STATE_HOME"]
    machine.env |= changes
    for verb in ("start", "status", "logs", "stop", "auth import"):
        said = machine.run(*verb.split()).failure()
        assert "set HOME or XDG_STATE_HOME to the absolute path" in said
    assert os.listdir(machine.folder) == ["home"]


def test_a_user_without_a_name_or_a_home_needs_the_folders_named() -> None:
    python = shutil.which("python3", path=os.defpath) or ""
    new_enough = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if os.getuid() or not python or subprocess.run(new_enough, check=False).returncode:
        pytest.skip("this needs root, and a Python for everybody")
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        shutil.copy(gw.program_file(), folder)
        os.chown(folder, 54321, 54321)
        named = {"XDG_CONFIG_HOME": f"{folder}/c", "XDG_STATE_HOME": f"{folder}/s"}
        for env in ({}, named):
            done = subprocess.run(
                [python, "aiclient_api.py", "config", "set", "server.port", "1"],
                env={"PATH": os.defpath, **env}, user=54321, group=54321, cwd=folder,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == (0 if env else 1), done.stderr
            assert bool(env) or "set HOME or XDG_CONFIG_HOME" in done.stderr
            assert sorted(os.listdir(folder)) == ["aiclient_api.py"] + ["c"] * bool(env)


SHADOWS = (
    "asyncio argparse base64 bisect copy csv dataclasses datetime email getpass hashlib http "
    "inspect json keyword logging marshal select shlex signal socket sqlite3 ssl struct subprocess "
    "tempfile token tokenize tomllib typing urllib zlib"
)


@pytest.mark.parametrize("how", ["script", "module", "console script"])
def test_files_beside_the_program_are_not_taken_for_the_library(tmp_path: Path, how: str) -> None:
    for name in SHADOWS.split():
        if how == "module" and name in ("keyword", "typing"):
            continue  # Python itself needs them before
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('not the library')")
    env = clean_environment(tmp_path)
    shutil.copy(gw.program_file(), tmp_path / "aiclient_api.py")
    script = tmp_path / "aiclient-api"
    script.write_text("import sys\nfrom aiclient_api import main\nsys.exit(main())\n")
    words = {"script": ["aiclient_api.py"], "module": ["-m", "aiclient_api"]}
    command = [sys.executable, *words.get(how, [str(script)])]
    for verb in ("start --port 0", "stop") if how == "script" else ("auth list",):
        done = subprocess.run(
            [*command, *verb.split()], env=env, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


MALFORMED_PROXIES = (
    "http://user:S3CR/ET@host.test:3128", "http://user:12/S3CRET@host.test", "http://[S3CRET",
    "http://user:S3CRET@host.test:port", "http://user:S3CRET@host.test:99999", "http://S3CRET host",
    "http://user:S3CR?ET@host.test", "http://user:1#S3CRET@host.test", "http://", "S3CRET@",
    "socks5://user:S3CRET@host.test:1080",
)  # fmt: skip


@pytest.mark.parametrize("value", MALFORMED_PROXIES)
def test_a_malformed_proxy_variable_is_named_but_not_shown(machine: Machine, value: str) -> None:
    variable = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")[len(value) % 3]
    machine.env[variable] = value
    for words in ("start --port 0", "auth kiro --method builder-id", "auth import --yes"):
        said = machine.run(*words.split()).failure()
        assert f"environment: {variable}: must be like http://[user:password@]host:port" in said
        assert "S3CR" not in said + machine.log()
    machine.run("config", "set", "network.proxy", "http://proxy.test:1")
    assert machine.run("auth", "list").status == 0, "the file's comes first"


def test_a_config_that_cannot_be_read_is_told(machine: Machine) -> None:
    machine.config_file.mkdir(parents=True)
    said = machine.run("start", "--port", "0").failure()
    assert f"{machine.config_file}: cannot be read: Is a directory" in said


def test_a_log_that_cannot_be_written_is_told(machine: Machine) -> None:
    for more in ([], ["--foreground"]):
        words = ["start", "--port", "0", "--log-file", str(machine.folder), *more]
        assert "the log cannot be written: Is a directory" in machine.run(*words).failure()
    assert machine.processes() == []


def test_a_long_path_gets_its_socket_elsewhere(machine: Machine) -> None:
    runtime = machine.folder / "run"
    runtime.mkdir(mode=0o700)
    machine.env["XDG_STATE_HOME"] = str(machine.folder / ("long" * 30))
    machine.state = machine.folder / ("long" * 30) / "aiclient-api"
    machine.pid_file = machine.state / "daemon.pid"
    machine.env["XDG_RUNTIME_DIR"] = str(runtime)
    status = machine.start()
    (folder,) = runtime.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (made,) = folder.iterdir()
    assert made.is_socket() and machine.pid_file.read_text().split("\n")[1] == str(made)
    assert machine.run("restart").status == 0
    wait_until(lambda: not folder.exists())  # the old process takes its own along
    assert machine.run("stop").status == 0
    wait_until(lambda: not any(runtime.iterdir()))
    machine.env["XDG_RUNTIME_DIR"] = str(machine.folder / ("run" * 40))
    machine.env["TMPDIR"] = str(machine.folder)
    assert machine.start()["url"] != status["url"]
    (folder,) = machine.folder.glob("aiclient-api-*")
    assert folder.stat().st_mode & 0o777 == 0o700 and list(folder.iterdir())
    assert machine.run("stop").status == 0
    machine.env["TMPDIR"] = str(machine.folder / ("tmp" * 40))
    (machine.folder / ("tmp" * 40)).mkdir()
    assert "is too long for a socket" in machine.run("start", "--port", "0").failure()


def test_a_folder_that_others_can_rename_is_not_used_for_the_socket(machine: Machine) -> None:
    machine.env["XDG_STATE_HOME"] = str(machine.folder / ("long" * 30))
    shared = machine.folder / "run"
    shared.mkdir()
    shared.chmod(0o777)
    machine.env["XDG_RUNTIME_DIR"] = str(shared)
    assert f"{shared}: cannot be used" in machine.run("start", "--port", "0").failure()


def full_disk() -> None:
    """No file of this process can grow: as on a full disk, each write to one fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_full_disk_is_told_and_does_not_end_what_runs(machine: Machine) -> None:
    done = machine.run("start", "--port", "0", preexec_fn=full_disk)
    assert "daemon.pid: cannot be written: File too large" in done.failure()
    assert machine.processes() == []
    said = machine.run("config", "set", "server.port", "1", preexec_fn=full_disk).failure()
    assert "config.toml: cannot be written: " in said
    assert not machine.config_file.exists() and os.listdir(machine.config) == []


def test_lines_for_a_full_disk_are_counted_not_raised(machine: Machine) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    status = machine.start("--log-file", "/dev/full")
    assert fetch(status, CHAT, echo("hi")).status == 200
    assert machine.status()["log_lines_dropped"] > 1
    assert machine.run("stop").status == 0


def test_a_machine_without_fork_is_told_what_to_do(machine: Machine) -> None:
    code = "import os; del os.fork; import aiclient_api as g; raise SystemExit(g.main(['start']))"
    done = Done(
        subprocess.run(
            [sys.executable, "-c", code],
            env=machine.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    assert "start --foreground" in done.failure(2)


def test_memory_is_that_of_cached_bytecode(machine: Machine) -> None:
    memory = machine.start()["memory_bytes"]
    if memory is None:
        pytest.skip("this system does not tell")
    assert memory < 48 << 20  # 25 MiB measured; 60 where the file was compiled in the process


def test_a_start_does_not_wait_for_the_file_to_be_compiled(machine: Machine) -> None:
    """A ratio, as machines differ: `start` as an installed program does not compile the file."""
    begun = time.perf_counter()
    compile(PROGRAM.read_text("utf-8"), "x", "exec")
    compiled_s = time.perf_counter() - begun
    machine.start()
    machine.run("stop")

    def start_s() -> float:
        begun = time.perf_counter()
        assert machine.run("start", "--port", "0").status == 0
        return time.perf_counter() - begun

    if start_s() >= 4 * compiled_s:  # others compute on this machine, too
        machine.run("stop")
        assert start_s() < 4 * compiled_s


# ---- who else can read what ----------------------------------------------------------------------


def mode(path: Path) -> int:
    """The rights to a file."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("words", [("--foreground",), ()], ids=["foreground", "background"])
def test_a_key_given_as_a_flag_leaves_the_process_list(
    machine: Machine, words: tuple[str, ...]
) -> None:
    key = "sk-in-the-open"
    process = machine.popen("start", *words, "--port=0", "--api-key", key)
    try:
        wait_until(lambda: machine.run("status").status == 0)
        status = machine.status()
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in machine.processes()]
        assert commands and key.encode() not in b"".join(commands)
        assert fetch(status, "/v1/models").status == 401
        assert fetch(status, "/v1/models", headers=[f"x-api-key: {key}"]).status == 200
    finally:
        machine.run("stop")
        process.communicate()


def test_a_config_file_with_a_key_and_an_old_log_are_closed_to_others(machine: Machine) -> None:
    machine.config.mkdir(parents=True, mode=0o700)
    machine.config_file.write_text('default_provider = "echo"\n')
    machine.config_file.chmod(0o644)
    machine.run("config", "show")
    assert mode(machine.config_file) == 0o644  # there is no secret in it
    machine.config_file.write_text('api_key = "sk-in-the-open"\n')
    machine.state.mkdir(parents=True, mode=0o700, exist_ok=True)
    machine.log_file.touch()
    machine.log_file.chmod(0o644)
    done = machine.run("start", "--port", "0")
    assert "config_file_with_secrets_was_readable" in done.err and "log_was_readable" in done.err
    assert (mode(machine.config_file), mode(machine.log_file)) == (0o600, 0o600)
    assert machine.run("config", "show").err == ""  # it is told once
