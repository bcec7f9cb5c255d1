"""Runs the program in forks of a process that has imported it, which start in a tenth of the time.

A fork is a process like any other to whoever signals, waits or measures; only its command line in
the process list is that of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REQUEST_BYTES = 1 << 20
# What the program loads only when it serves.
MODULES = (
    "argparse asyncio base64 concurrent.futures.thread email.utils encodings.idna hashlib hmac "
    "http.client ipaddress logging selectors socketserver sqlite3 ssl tomllib urllib.parse zlib"
)

NUMBER_BYTES = 12
ONE_AT_A_TIME = threading.Lock()

# ---- the client ----------------------------------------------------------------------------------


class Fork:
    """A running program: what subprocess.Popen has of it."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; raises TimeoutExpired."""
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = _receive(self._status)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to it while it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def _receive(status: socket.socket) -> int:
    return int(status.recv(NUMBER_BYTES, socket.MSG_WAITALL))


@functools.cache
def _server(program: Path) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(program), str(theirs.fileno())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        )  # fmt: skip

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def run(
    program: Path,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    files: Sequence[int],
    name: Path | None = None,
) -> Fork:
    """Starts the program with `files` as its standard input, output and error.

    It finds `name`, or else its own path, as the first of its arguments.
    """
    ours, theirs = socket.socketpair()
    request = {"args": [str(name or program), *args], "env": dict(env), "cwd": str(cwd)}
    with theirs, ONE_AT_A_TIME:
        data = json.dumps(request).encode()
        socket.send_fds(_server(program), [data], [*files, theirs.fileno()])
        return Fork(_receive(ours), ours)


def complete(
    program: Path,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    given: bytes = b"",
    seconds: float | None = None,
    name: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs the program to its end, `given` on its standard input; raises TimeoutExpired."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(given)
        files[0].seek(0)
        fork = run(program, args, env, cwd, [file.fileno() for file in files], name)
        try:
            status = fork.wait(seconds)
        except subprocess.TimeoutExpired:
            fork.kill()
            fork.wait()
            raise
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(args, status, files[1].read(), files[2].read())


# ---- the server ----------------------------------------------------------------------------------


def serve(program: str, channel: socket.socket) -> Any:
    """Forks for each request; returns in the fork, with the status of the program."""
    for name in MODULES.split():
        importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("aiclient_api", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.__file__ = module.main.__code__.co_filename  # not that of its bytecode
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        data, files, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 4)
        if not data:
            return 0
        if os.fork() == 0:
            break
        for descriptor in files:
            os.close(descriptor)
    channel.close()
    *streams, status = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.closerange(0, status)
        os.write(status, str(pid).rjust(NUMBER_BYTES).encode())
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, str(ended).rjust(NUMBER_BYTES).encode())
        os._exit(0)
    os.close(status)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    request = json.loads(data)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv[:] = request["args"]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    return module.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))))
