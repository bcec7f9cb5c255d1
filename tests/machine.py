"""A user's machine: folders of its own, the verbs of the program, and daemons that end with it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import forks
from support import (
    PROGRAM,
    Wire,
    clean_environment,
    compiled_program,
    exchange,
    parse_responses,
)

# Verbs run from cached bytecode, as an installed program does: a script is compiled each time.
BYTECODE = tempfile.mkdtemp(prefix="gw-bytecode-")
atexit.register(shutil.rmtree, BYTECODE, ignore_errors=True)
VERB_SECONDS = 60.0

Json = dict[str, Any]


def wait_until(happened: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns as soon as it has happened."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


class Done:
    """What a verb did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    def __repr__(self) -> str:
        return f"<exit {self.status}\n{self.out}\n{self.err}>"

    def json(self) -> Any:
        """Standard output as JSON; the verb must have succeeded."""
        assert self.status == 0, self
        return json.loads(self.out)

    def failure(self, status: int = 1) -> str:
        """The one line that says why it failed."""
        assert self.status == status, self
        assert "Traceback" not in self.err, self.err
        assert self.err.startswith("aiclient-api: "), self
        return self.err


class Machine:
    """The program as a user has it: a context manager that leaves no process and no file."""

    def __init__(self, config: str = "", env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gw-"))
        self.config = self.folder / "config" / "aiclient-api"
        self.state = self.folder / "state" / "aiclient-api"
        self.config_file = self.config / "config.toml"
        self.pid_file = self.state / "daemon.pid"
        self.log_file = self.state / "daemon.log"
        self.env = {**clean_environment(self.folder), **(env or {})}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        if config:
            self.config.mkdir(mode=0o700, parents=True)
            self.config_file.write_text(config, encoding="utf-8")

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.processes():
            wait_until(lambda: not is_alive(pid))  # noqa: B023 - called before the next one
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """The daemons of this machine, by the state folder in their environment."""
        mark = f"XDG_STATE_HOME={self.folder}/".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*") if Path("/proc/self/environ").exists() else ():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes() and is_alive(int(entry.name)):
                    found.append(int(entry.name))
        if not found and self.pid_file.exists():
            first = self.pid_file.read_text().partition("\n")[0]
            found = [int(first)] if first.isdigit() and is_alive(int(first)) else []
        return [pid for pid in found if pid != os.getpid()]

    # Verbs...

    def command(self, *words: str, script: bool = False) -> list[str]:
        """The command line of a verb, by module or as the bare file."""
        how = [str(PROGRAM)] if script else ["-m", "aiclient_api"]
        return [sys.executable, *how, *words]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a verb."""
        cached = {"PYTHONPATH": str(PROGRAM.parent), "PYTHONPYCACHEPREFIX": BYTECODE}
        return {**self.env, **cached, **more}

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """A verb that is not waited for."""
        settings: Json = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "text": True, "env": self.environment(), "cwd": self.folder, **more,
        }  # fmt: skip
        return subprocess.Popen(self.command(*words), **settings)

    def run(self, *words: str, typed: str = "", script: bool = False, **more: Any) -> Done:
        """A verb and what it did."""
        forked = not script and not more  # a real process obeys what Python reads from it
        env = self.environment(**more.pop("env", {}))
        if forked:
            given = typed.encode()
            found = forks.complete(
                compiled_program(), words, env, self.folder, given, VERB_SECONDS, name=PROGRAM
            )
            out, err = found.stdout.decode(), found.stderr.decode()
            return Done(subprocess.CompletedProcess(words, found.returncode, out, err))
        done = subprocess.run(
            self.command(*words, script=script), env=env, cwd=self.folder, input=typed,
            capture_output=True, text=True, timeout=VERB_SECONDS, check=False, **more,
        )  # fmt: skip
        return Done(done)

    def start(self, *words: str, **more: Any) -> Json:
        """Starts a daemon on a free port; its status."""
        started = self.run("start", "--port", "0", *words, **more)
        assert started.status == 0, started
        return self.status()

    def status(self) -> Json:
        """What `status` says in a pipe."""
        found: Json = self.run("status").json()
        return found

    def ask(self, method: str, **params: Any) -> Json:
        """A message over the control socket; the whole answer."""
        with self.control() as peer:
            send_frame(peer, {"method": method, "params": params})
            answer: Json = read_frame(peer)
            return answer

    def control(self) -> socket.socket:
        """A connection to the control socket."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(30)
        peer.connect(self.pid_file.read_text().split("\n")[1])
        return peer

    def log(self) -> str:
        """The log so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""


# ---- the control protocol, written down once more ------------------------------------------------


def send_frame(peer: socket.socket, message: Any) -> None:
    """One message."""
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    peer.sendall(len(data).to_bytes(4, "big") + data)


def read_frame(peer: socket.socket) -> Any:
    """The next message; EOFError where there is none."""
    data = b""
    size = 4
    while len(data) < size:
        piece = peer.recv(65536)
        if not piece:
            raise EOFError
        data += piece
        if len(data) >= 4:
            size = 4 + int.from_bytes(data[:4], "big")
    return json.loads(data[4:])


# ---- HTTP ----------------------------------------------------------------------------------------

HEALTH = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
Body = Union[Mapping[str, Any], None]


def connect(status: Mapping[str, Any]) -> socket.socket:
    """A connection to a gateway."""
    host, _, port = str(status["url"]).rpartition("//")[2].rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def request_bytes(path: str, body: Body = None, headers: Sequence[str] = ()) -> bytes:
    """A request: GET, or POST where there is a body."""
    data = b"" if body is None else json.dumps(body).encode()
    fields = ["Host: localhost", *headers]
    if body is not None:
        fields += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    method = "GET" if body is None else "POST"
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""])
    return head.encode() + data


def fetch(
    status: Mapping[str, Any], path: str, body: Body = None, headers: Sequence[str] = ()
) -> Any:
    """The answer to one request on a connection of its own."""
    with connect(status) as sock:
        data = request_bytes(path, body, [*headers, "Connection: close"])
        return parse_responses(exchange(sock, data, 30, half_close=False))[0]


def echo(words: str, **more: Any) -> Json:
    """A request that the echo answers."""
    return {"model": "echo", "messages": [{"role": "user", "content": words}], **more}


@contextlib.contextmanager
def open_stream(status: Mapping[str, Any], size: int = 6_000_000) -> Iterator[Wire]:
    """A streamed answer of `size` characters that nobody reads yet, its head read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = str(status["url"]).rpartition("//")[2].rpartition(":")
    sock.connect((host, int(port)))
    with Wire(sock) as wire:
        wire.send(request_bytes("/v1/chat/completions", echo("x" * size, stream=True)))
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        yield wire
