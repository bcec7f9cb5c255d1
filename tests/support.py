"""The real program, started in a folder of its own and spoken to over raw sockets."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import marshal
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Union

import forks

PROGRAM = Path(__file__).resolve().parent.parent / "aiclient_api.py"

START_SECONDS = 20.0
STOP_SECONDS = 45.0
REPLY_SECONDS = 30.0
RECV_BYTES = 65536
PIECE_PAUSE_SECONDS = 0.001

LISTENING = re.compile(r"listening on http://(\[[^\]]+\]|[^\s:/]+):(\d+)")
STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-9][0-9]{2}) ([\t\x20-\x7e\x80-\xff]*)")
FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[\t ]*([^\x00\r\n]*?)[\t ]*")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})")

HeaderFields = Union[Mapping[str, str], Sequence[tuple[str, str]]]


# ---- answers -----------------------------------------------------------------------------------


class Headers(dict[str, str]):
    """The fields of an answer under lower-case names; repeated ones joined here, apart in `all`."""

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self.fields = [(name.lower(), value) for name, value in fields]
        for name, value in self.fields:
            self[name] = f"{self[name]}, {value}" if name in self else value

    def all(self, name: str) -> list[str]:
        """Every value of one field, in the order in which they came."""
        return [value for key, value in self.fields if key == name.lower()]


class Reply:
    """One answer as it came: `complete` is False when its body was cut off before its end."""

    def __init__(
        self, version: str, status: int, reason: str, headers: Headers, body: bytes, complete: bool
    ) -> None:
        self.version = version
        self.status = status
        self.reason = reason
        self.headers = headers
        self.body = body
        self.complete = complete

    def __repr__(self) -> str:
        cut = "" if self.complete else ", cut off"
        return f"<Reply {self.status} {self.body[:300]!r}{cut}>"

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body.decode("utf-8"))


class ResponseReader:
    """Takes answers apart, strictly, out of bytes that `more` supplies until it returns nothing."""

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._held = bytearray()
        self._at = 0
        self.ended = False

    def _fill(self) -> bool:
        if self.ended:
            return False
        if self._at > RECV_BYTES:
            del self._held[: self._at]
            self._at = 0
        piece = self._more()
        self.ended = not piece
        self._held += piece
        return bool(piece)

    def take(self, count: int) -> bytes:
        """The next `get_int` bytes, fewer when the end comes first."""
        while len(self._held) - self._at < count and self._fill():
            pass
        taken = bytes(self._held[self._at : self._at + count])
        self._at += len(taken)
        return taken

    def take_until(self, mark: bytes) -> bytes:
        """What comes up to and including `mark`, all that is left when it does not come."""
        searched = 0
        while True:
            found = self._held.find(mark, self._at + searched)
            if found >= 0:
                return self.take(found + len(mark) - self._at)
            searched = max(0, len(self._held) - self._at - len(mark))
            if not self._fill():
                return self.take(len(self._held) - self._at)

    def take_rest(self) -> bytes:
        """Everything until the end."""
        while self._fill():
            pass
        return self.take(len(self._held) - self._at)

    def _take_line(self) -> bytes:
        line = self.take_until(b"\n")
        if not line.endswith(b"\r\n"):
            raise ValueError(f"a line of the answer does not end in CRLF: {line[-200:]!r}")
        return line[:-2]

    def _take_fields(self) -> Headers:
        fields: list[tuple[str, str]] = []
        while True:
            line = self._take_line()
            if not line:
                return Headers(fields)
            match = FIELD_LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"malformed field in the answer: {line[:200]!r}")
            fields.append((match[1].decode("ascii"), match[2].decode("latin-1")))

    def _take_chunked(self) -> tuple[bytes, bool]:
        body = bytearray()
        while True:
            line = self.take_until(b"\n")
            if not line.endswith(b"\r\n"):
                return bytes(body), False
            match = CHUNK_LINE.fullmatch(line[:-2])
            if match is None:
                raise ValueError(f"malformed chunk size in the answer: {line[:200]!r}")
            size = int(match[1], 16)
            if size == 0:
                return bytes(body), self.take(2) == b"\r\n"
            piece = self.take(size)
            body += piece
            if len(piece) < size:
                return bytes(body), False
            end = self.take(2)
            if end != b"\r\n":
                if len(end) < 2:
                    return bytes(body), False
                raise ValueError(f"chunk of {size} bytes is followed by {end!r}")

    def _take_body(self, method: str, status: int, headers: Headers) -> tuple[bytes, bool]:
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if coding is not None and length is not None:
            raise ValueError("an answer with both Transfer-Encoding and Content-Length")
        if coding is not None and coding.lower() != "chunked":
            raise ValueError(f"unexpected Transfer-Encoding {coding!r}")
        if method == "HEAD" or status < 200 or status in (204, 304):
            return b"", True
        if coding is not None:
            return self._take_chunked()
        if length is None:
            return self.take_rest(), True
        if not re.fullmatch(r"[0-9]{1,19}", length):
            raise ValueError(f"malformed Content-Length in the answer: {length!r}")
        body = self.take(int(length))
        return body, len(body) == int(length)

    def take_reply(self, method: str = "GET") -> Reply | None:
        """The next answer, given the method it answers; None when nothing more comes."""
        first = self.take_until(b"\n")
        if not first:
            return None
        match = STATUS_LINE.fullmatch(first[:-2]) if first.endswith(b"\r\n") else None
        if match is None:
            raise ValueError(f"malformed status line: {first[:200]!r}")
        status, headers = int(match[2]), self._take_fields()
        body, complete = self._take_body(method, status, headers)
        reason = match[3].decode("latin-1")
        return Reply(match[1].decode("ascii"), status, reason, headers, body, complete)


def parse_responses(data: bytes, methods: Sequence[str] = ()) -> list[Reply]:
    """All answers in `data`; `methods` names the requests' methods where one was HEAD."""
    pieces = iter((data, b""))
    reader = ResponseReader(lambda: next(pieces))
    replies: list[Reply] = []
    answered = 0
    while True:
        method = methods[answered] if answered < len(methods) else "GET"
        reply = reader.take_reply(method)
        if reply is None:
            return replies
        replies.append(reply)
        answered += reply.status >= 200


# ---- talking over one socket -------------------------------------------------------------------


class Received(bytes):
    """Bytes that a peer sent, and how they ended: `closed`, `reset` or `deadline`."""

    ended = "deadline"


def exchange(
    sock: socket.socket, data: bytes, read_seconds: float, half_close: bool, piece: int = 0
) -> Received:
    """Send `data` while reading; return all that came until the peer closed or the time was up."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    deadline = time.monotonic() + read_seconds
    came, ended = bytearray(), "deadline"
    left = memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        while ended == "deadline" and time.monotonic() < deadline:
            if left:
                try:
                    left = left[sock.send(left[: piece or RECV_BYTES]) :]
                except BlockingIOError:
                    selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
                except OSError:  # the peer takes no more: what it said may still be read
                    left = left[len(left) :]
            if half_close and not left:
                half_close = False
                _shut_down_writing(sock)
            wait = deadline - time.monotonic()
            if left and selector.get_key(sock).events == selectors.EVENT_READ:
                wait = PIECE_PAUSE_SECONDS if piece else 0
            for _, events in selector.select(max(0.0, wait)):
                if events & selectors.EVENT_WRITE:
                    selector.modify(sock, selectors.EVENT_READ)
                if events & selectors.EVENT_READ:
                    try:
                        got = sock.recv(RECV_BYTES)
                    except BlockingIOError:
                        continue
                    except OSError:
                        ended = "reset"
                        break
                    came += got
                    ended = ended if got else "closed"
    received = Received(came)
    received.ended = ended
    return received


def _shut_down_writing(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


class Wire:
    """One connection to the gateway on which requests are sent and answers read one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = ResponseReader(self._recv)
        self._by = 0.0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def _recv(self) -> bytes:
        self.sock.settimeout(max(0.001, self._by - time.monotonic()))
        return self.sock.recv(RECV_BYTES)

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self.sock.settimeout(REPLY_SECONDS)
        self.sock.sendall(data)

    def reply(self, method: str = "GET", seconds: float = REPLY_SECONDS) -> Reply:
        """The next answer; EOFError when the peer closes first, TimeoutError when none comes."""
        self._by = time.monotonic() + seconds
        reply = self._reader.take_reply(method)
        if reply is None:
            raise EOFError("the gateway closed the connection without a response")
        return reply

    def read_until(self, mark: bytes, seconds: float = REPLY_SECONDS) -> bytes:
        """Raw bytes up to and including `mark`."""
        self._by = time.monotonic() + seconds
        return self._reader.take_until(mark)

    def read(self, count: int, seconds: float = REPLY_SECONDS) -> bytes:
        """The next `get_int` raw bytes, fewer when the peer closes."""
        self._by = time.monotonic() + seconds
        return self._reader.take(count)

    def rest(self, seconds: float = REPLY_SECONDS) -> bytes:
        """Raw bytes until the peer closes; TimeoutError when it does not."""
        self._by = time.monotonic() + seconds
        return self._reader.take_rest()

    def abort(self) -> None:
        """Close with a reset, as a process that dies does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


# ---- the program -------------------------------------------------------------------------------


@functools.cache
def compiled_program() -> Path:
    """The program as bytecode, which runs as the file does: Python compiles that at each start."""
    folder = Path(tempfile.mkdtemp(prefix="gw-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{PROGRAM.stem}.pyc"
    source = PROGRAM.read_bytes()
    code = marshal.dumps(compile(source, str(PROGRAM), "exec", dont_inherit=True))
    path.write_bytes(importlib.util.MAGIC_NUMBER + bytes(12) + code)
    return path


class GatewayFailed(Exception):
    """The program did not come to listen; `status` is its exit status, None when it hung."""

    def __init__(self, status: int | None, stdout: str, stderr: str) -> None:
        super().__init__(f"the gateway did not start (exit status {status})\n{stdout}\n{stderr}")
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


class Gateway:
    """The real program, listening on a port of its own, with config and state of its own.

    `config` is the text of config.toml, `tokens` maps a provider's name to its token.json.
    `bare` starts the file itself, as a user does, which takes longer than a fork.
    """

    def __init__(
        self,
        config: str = "",
        tokens: Mapping[str, Mapping[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        *,
        bare: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gw-"))
        self.config_folder = self.folder / "config" / "aiclient-api"
        self.state_folder = self.folder / "state" / "aiclient-api"
        self.host = "127.0.0.1"
        self.port = 0
        self._args = list(args)
        self._bare = bare
        self._env = {**clean_environment(self.folder), **(env or {})}
        self._process: subprocess.Popen[bytes] | forks.Fork | None = None
        self._readers: list[threading.Thread] = []
        self._out: list[str] = []
        self._err: list[str] = []
        self._started = threading.Event()
        self._write_files(config, tokens or {})

    def _write_files(self, config: str, tokens: Mapping[str, Mapping[str, Any]]) -> None:
        self.config_folder.mkdir(mode=0o700, parents=True)
        (self.config_folder / "config.toml").write_text(config, encoding="utf-8")
        for name, token in tokens.items():
            folder = self.config_folder / name
            folder.mkdir(mode=0o700)
            path = folder / "token.json"
            path.touch(mode=0o600)
            path.write_text(json.dumps(token), encoding="utf-8")

    # Starting and stopping...

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Run the program until it listens; GatewayFailed when it does not."""
        words = ["start", "--foreground", "--port", "0", *self._args]
        streams = self._run(words)
        for stream, lines in zip(streams, (self._out, self._err)):
            reader = threading.Thread(target=self._read_lines, args=(stream, lines), daemon=True)
            reader.start()
            self._readers.append(reader)
        self._started.wait(START_SECONDS)
        if not self.port:
            status = self._exit_status(0.5)
            self.close()
            raise GatewayFailed(status, self.stdout(), self.log())

    def _run(self, words: Sequence[str]) -> list[IO[bytes]]:
        """Begins the process; what it writes to standard output and error."""
        if self._bare:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *words],
                env=self._env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            )  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            self._process = process
            return [process.stdout, process.stderr]
        pipes = [os.pipe(), os.pipe()]
        nothing = os.open(os.devnull, os.O_RDONLY)
        theirs = [nothing, *(writer for _, writer in pipes)]
        self._process = forks.run(compiled_program(), words, self._env, self.folder, theirs)
        for descriptor in theirs:
            os.close(descriptor)
        return [os.fdopen(reader, "rb") for reader, _ in pipes]

    def start_again(self) -> None:
        """Run it once more in the same folder, after it has ended."""
        self.port = 0
        self._started.clear()
        self._out.clear()
        self._readers.clear()
        self.start()

    def _read_lines(self, stream: IO[bytes], lines: list[str]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace")
                lines.append(line)
                match = LISTENING.search(line) if lines is self._out else None
                if match is not None and not self.port:
                    self.host = {"0.0.0.0": "127.0.0.1"}.get(match[1], match[1].strip("[]"))
                    self.port = int(match[2])
                    self._started.set()
        if lines is self._out:
            self._started.set()

    def _exit_status(self, seconds: float) -> int | None:
        assert self._process is not None
        by = time.monotonic() + seconds
        for reader in self._readers:  # end with it, at once; `wait` only looks now and then
            reader.join(max(0.0, by - time.monotonic()))
        try:
            return self._process.wait(max(0.0, by - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status of the program, which must end within `seconds`."""
        status = self._exit_status(seconds)
        assert status is not None, f"still running after {seconds} s\n{self.log()}"
        for reader in self._readers:
            reader.join(5)
        return status

    def stop(self) -> int:
        """SIGTERM, wait, return the exit status."""
        self.terminate()
        return self.wait()

    def close(self) -> None:
        """End the program by whatever it takes and remove its folder."""
        if self._process is not None:
            for _ in range(2):  # the second SIGTERM means: at once
                self.terminate()
                if self._exit_status(3) is not None:
                    break
            else:
                self._process.kill()
                self._process.wait()
            for reader in self._readers:
                reader.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def control(self, method: str, **params: Any) -> Any:
        """The answer over the control socket."""
        path = (self.state_folder / "daemon.pid").read_text().split("\n")[1]
        message = json.dumps({"method": method, "params": params}).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(REPLY_SECONDS)
            peer.connect(path)
            peer.sendall(len(message).to_bytes(4, "big") + message)
            reader = ResponseReader(lambda: peer.recv(RECV_BYTES))
            answer = json.loads(reader.take(int.from_bytes(reader.take(4), "big")))
        assert answer["ok"], answer
        return answer["data"]

    # What it is and says...

    @property
    def pid(self) -> int:
        """The process id of the running program."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stdout(self) -> str:
        """Standard output so far."""
        return "".join(self._out)

    def log(self) -> str:
        """Standard error so far."""
        return "".join(self._err)

    # Talking to it...

    def connect(self, receive_buffer: int = 0, source: str = "") -> socket.socket:
        """A connected socket, with a small receive buffer or from another address if asked."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(REPLY_SECONDS)
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source:
                sock.bind((source, 0))
            sock.connect((self.host, self.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            sock.close()
            raise
        return sock

    def wire(self, receive_buffer: int = 0, source: str = "") -> Wire:
        """A connection on which answers are read one at a time."""
        return Wire(self.connect(receive_buffer, source))

    def raw(
        self, data: bytes, *, read_seconds: float = 5, half_close: bool = False, piece: int = 0
    ) -> Received:
        """Send bytes (`piece` at a time if given); all that comes until close or deadline."""
        with self.connect() as sock:
            return exchange(sock, data, read_seconds, half_close, piece)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: HeaderFields = (),
        *,
        source: str = "",
        seconds: float = REPLY_SECONDS,
    ) -> Reply:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        fields = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        data = self.request_bytes(method, path, body, [*fields, ("Connection", "close")])
        with self.connect(source=source) as sock:
            received = exchange(sock, data, seconds, half_close=False)
        if received.ended == "deadline":
            raise TimeoutError(f"{method} {path}: not closed after {seconds} s: {received[:500]!r}")
        replies = [reply for reply in parse_responses(received, [method]) if reply.status >= 200]
        assert len(replies) == 1, f"{method} {path}: {len(replies)} answers: {received[:500]!r}"
        return replies[0]

    def request_bytes(
        self, method: str, path: str, body: Any = None, headers: HeaderFields = ()
    ) -> bytes:
        """A well-formed HTTP/1.1 request; Host, Content-Type and length are added where missing."""
        fields = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        given = {name.lower() for name, _ in fields}
        if "host" not in given:
            fields.insert(0, ("Host", self.url.partition("//")[2]))
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8")
            if "content-type" not in given:
                fields.append(("Content-Type", "application/json"))
            if not given & {"content-length", "transfer-encoding"}:
                fields.append(("Content-Length", str(len(data))))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + data


def clean_environment(folder: Path) -> dict[str, str]:
    """The caller's environment less what steers the program, all its folders inside `folder`."""
    steering = re.compile(r"(?i)AICLIENT_.*|XDG_.*|.*_PROXY|(GH|.*GITHUB)_.*TOKEN|AWS_.*")
    kept = {name: value for name, value in os.environ.items() if not steering.fullmatch(name)}
    home = folder / "home"
    home.mkdir(mode=0o700)
    return {
        **kept,
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_STATE_HOME": str(folder / "state"),
        "PYTHONUNBUFFERED": "",
        # Tests ask the same again and again.
        "AICLIENT_API_LIMITS_RUNAWAY_REQUESTS": "0",
    }


# ---- cost --------------------------------------------------------------------------------------


def growth(work: Callable[[int], Callable[[], object]], size: int = 500) -> float:
    """How many times as long `work(8 * size)` runs as `work(size)`: 8 where the cost is linear.

    In seconds of the processor; what is not clearly linear is measured again, and the best of
    three counts, so that a busy machine changes little.
    """
    best = {size: float("inf"), 8 * size: float("inf")}
    for _ in range(3):
        for count in best:
            run = work(count)
            began = time.process_time()
            run()
            best[count] = min(best[count], time.process_time() - began)
        ratio = best[8 * size] / max(best[size], 0.001)
        if ratio < 12:
            break
    return ratio
