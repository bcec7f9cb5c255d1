"""How fast and how small the program is, each figure beside the same work done without it.

    python3 tests/bench/bench.py [--quick] [--only NAME ...] [--json | --markdown] [--program FILE]

It starts an upstream on loopback (`upstream.py`), the program in temporary folders, and plays the
clients itself. Where the system allows it, the program gets one core, and upstream and clients
share another. "direct" is the same client talking to the upstream itself. The sides take turns
within one run, and of several rounds the median counts: trust ratios, not absolute times.

Every delta of text, arguments and thinking carries its number, and every answer of every measure is
checked for deltas that were lost, doubled or out of order. Exit status: 0; 1 when a measure failed
or a delta did; a missed target is only shown.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import py_compile
import re
import resource
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "aiclient_api.py"
READY_LINE = re.compile(rb"listening on http://127\.0\.0\.1:(\d+)")
HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
#: `number@nanoseconds;`, the text of every delta (see upstream.py).
DELTA = re.compile(rb"(\d+)@(\d+);")
DELTA_NUMBER = re.compile(rb"(\d+)@\d+;")
#: From here on, the events of a responses stream repeat what its deltas said.
REPEATS = re.compile(rb'"type": ?"response\.\w+\.done"')
#: Thinking in both spellings that clients of the chat dialect look for.
SAID_TWICE = re.compile(rb'"reasoning_text": ?"([^"]*)", ?"reasoning_content": ?"\1"')
COMPLETED = re.compile(rb'\ndata: \{"type": ?"response\.completed"[^\n]*\n\n\Z')
ENDINGS = (b"data: [DONE]\n\n", b'data: {"type":"message_stop"}\n\n', b"}", b"}\n")
READ_BYTES = 1 << 18
#: A single answer that takes longer than this is a failure of the measure.
ANSWER_S = 20.0
START_S = 10.0
#: A delta that arrives this long after it was due was not delivered in time.
LATE_NS = 200_000_000
#: 20 deltas a second.
FLOOD_PACE_MS = 50
#: More cores than this at other work disturb whatever is measured by the wall clock.
QUIET_CORES = 0.3
US = 1e6
MS = 1e3
KB = 1e3
MB = 1e6
NS_PER_US = 1e3
NS_PER_MS = 1e6

T = TypeVar("T")


class BenchError(Exception):
    """A measure that could not be taken, with the reason."""


# ---- What is done how often ----------------------------------------------------------------------


@dataclass
class Plan:
    """How much work each measure is given."""

    rounds: int = 3
    hammer_s: float = 1.2
    latency_requests: int = 1200
    pace_s: float = 6.0
    full_speed_chunks: int = 1000
    streams: int = 8
    many_streams: int = 1000
    many_spread_s: float = 2.0
    many_s: float = 8.0
    large_requests: int = 18
    worst_mb: int = 30
    starts: int = 5
    #: No measure begins after this, so that a busy machine ends in time too.
    limit_s: float = 270.0


QUICK = Plan(
    rounds=1,
    hammer_s=0.8,
    latency_requests=400,
    pace_s=2.0,
    full_speed_chunks=500,
    streams=5,
    many_streams=200,
    many_spread_s=0.5,
    many_s=2.5,
    large_requests=3,
    worst_mb=16,
    starts=1,
    limit_s=52.0,
)


@dataclass
class Row:
    """One line of the table; `added` rows are judged by the difference, others by the gateway."""

    measure: str
    unit: str
    direct: float | None = None
    gateway: float | None = None
    is_added: bool = False
    at_most: float | None = None
    at_least: float | None = None

    def relation(self) -> float | None:
        """Gateway minus direct for `added` rows, else gateway by direct."""
        if self.direct is None or self.gateway is None:
            return None
        if self.is_added:
            return self.gateway - self.direct
        return self.gateway / self.direct if self.direct else None

    def is_met(self) -> bool | None:
        """Whether the target is met; None where there is no target or no figure."""
        judged = self.relation() if self.is_added else self.gateway
        if judged is None or (self.at_most is None and self.at_least is None):
            return None
        if self.at_most is not None:
            return judged <= self.at_most
        return self.at_least is not None and judged >= self.at_least


# ---- Requests ------------------------------------------------------------------------------------


def marker(
    chunks: int, batch: int = 1, pace_ms: int = 0, shape: str = "copilot", kind: str = "text"
) -> str:
    """The text that tells the upstream how to play its answer."""
    return f"[[chunks={chunks} batch={batch} pace_ms={pace_ms} shape={shape} kind={kind}]]"


#: Asks for a small answer in one write.
HELLO = f"Say hello. {marker(2, 2)}"


def small_body(dialect: str, model: str, text: str, is_streamed: bool) -> dict[str, Any]:
    """A request of one short user message."""
    message = {"role": "user", "content": text}
    body: dict[str, Any] = {"model": model}
    body["input" if dialect == "responses" else "messages"] = [message]
    if dialect == "messages":
        body["max_tokens"] = 4096
    if is_streamed:
        body["stream"] = True
    return body


#: What a client asks for beside the text, by kind of delta and dialect.
EXTRAS: dict[tuple[str, str], dict[str, Any]] = {
    ("thinking", "chat"): {"reasoning_effort": "high"},
    ("thinking", "messages"): {"thinking": {"type": "enabled", "budget_tokens": 2048}},
    ("thinking", "responses"): {
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
    },
}
WRITE_FILE: dict[str, Any] = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
}


def stream_body(dialect: str, model: str, kind: str, script: str) -> dict[str, Any]:
    """A request for a streamed answer of one kind of deltas."""
    body = small_body(dialect, model, f"Go on. {script}", is_streamed=True)
    if kind == "arguments":
        name = {"name": "write_file", "description": "Writes a file."}
        if dialect == "messages":
            body["tools"] = [{**name, "input_schema": WRITE_FILE}]
        elif dialect == "chat":
            function = {**name, "parameters": WRITE_FILE}
            body["tools"] = [{"type": "function", "function": function}]
        else:
            body["tools"] = [{"type": "function", **name, "parameters": WRITE_FILE}]
    return body | EXTRAS.get((kind, dialect), {})


def tool_schema(number: int) -> dict[str, Any]:
    """The JSON schema of one made-up tool."""
    properties: dict[str, Any] = {
        f"argument_{k}": {
            "type": "string",
            "description": f"What argument {k} of tool {number} is for, in one plain sentence.",
        }
        for k in range(8)
    }
    return {"type": "object", "properties": properties, "required": ["argument_0"]}


def source_text(size: int, number: int) -> str:
    """Text like a file that an agent has read: short lines, quotes, indentation."""
    lines: list[str] = []
    length = 0
    while length < size:
        line = f'    if table["{number}"].get({len(lines)}) is None:\n'
        line += f'\t\treturn "caf\u00e9 {length}"\n'
        lines.append(line)
        length += len(line)
    return "".join(lines)


def large_body(dialect: str, model: str, text: str, size: int) -> dict[str, Any]:
    """An agent's request: system prompt, 20 tools, and tool rounds until it weighs `size` bytes."""
    system = source_text(14_000, 0)
    rounds = [(f"call_{k}", source_text(3_600, k)) for k in range(max(1, (size - 40_000) // 4_350))]
    tools = [(f"tool_{k}", f"Does thing {k}. " * 12, tool_schema(k)) for k in range(20)]
    arguments = {"argument_0": "src/main.py"}
    messages: list[dict[str, Any]] = []
    if dialect == "messages":
        for name, result in rounds:
            use = {"type": "tool_use", "id": name, "name": "tool_1", "input": arguments}
            reply = {"type": "tool_result", "tool_use_id": name, "content": result}
            messages.append({"role": "assistant", "content": [use]})
            messages.append({"role": "user", "content": [reply]})
        messages.insert(0, {"role": "user", "content": "Read the project."})
        last = {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}
        messages[-1]["content"].append(last)
        return {
            "model": model,
            "max_tokens": 1024,
            "system": [{"type": "text", "text": system}],
            "messages": messages,
            "tools": [{"name": n, "description": d, "input_schema": s} for n, d, s in tools],
            "stream": True,
        }
    messages = [{"role": "system", "content": system}]
    for name, result in rounds:
        function = {"name": "tool_1", "arguments": json.dumps(arguments)}
        call = {"id": name, "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": name, "content": result})
    messages.append({"role": "user", "content": text})
    functions = [{"name": n, "description": d, "parameters": s} for n, d, s in tools]
    return {
        "model": model,
        "messages": messages,
        "tools": [{"type": "function", "function": f} for f in functions],
        "stream": True,
    }


HEADERS = (
    "Host: 127.0.0.1\r\nAccept: application/json\r\nAccept-Encoding: gzip, deflate\r\n"
    "User-Agent: bench/1.0\r\nAuthorization: Bearer bench\r\n"
)


def http_post(path: str, data: bytes) -> bytes:
    """A POST of JSON with the headers that an SDK sends."""
    head = f"POST {path} HTTP/1.1\r\n{HEADERS}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def http_request(path: str, body: dict[str, Any] | None = None) -> bytes:
    """A whole HTTP request; without body a GET."""
    if body is None:
        return f"GET {path} HTTP/1.1\r\n{HEADERS}\r\n".encode()
    return http_post(path, json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode())


# ---- The client ----------------------------------------------------------------------------------


@dataclass
class Answer:
    """One answer as it came: what was read, and when, in nanoseconds of the monotonic clock."""

    sent_at: int
    pieces: list[tuple[int, bytes]]

    def took_ns(self) -> int:
        """From the sending of the request to the last byte of the answer."""
        return self.pieces[-1][0] - self.sent_at


@dataclass
class Delta:
    """A text delta: its number, when the upstream sent it (0 = not noted), when it arrived."""

    number: int
    sent_at: int
    came_at: int


@dataclass
class Load:
    """What one run of the client gave."""

    answers: list[Answer]
    elapsed_s: float
    #: CPU seconds of the process that was asked, meanwhile.
    cpu_s: float = 0.0


#: A figure taken direct and through the gateway.
Pair = tuple[float, float]
#: The rounds of a comparison, direct and through the gateway.
Sides = tuple[list[Load], list[Load]]


class Caller:
    """One connection that sends a request and collects the answer."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port = port
        self.request = request
        self.connect()

    def connect(self) -> None:
        """Open a (new) connection."""
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def ask(self) -> None:
        """Send the request; what arrives from now on belongs to its answer."""
        self.pieces: list[tuple[int, bytes]] = []
        self.tail = b""
        self.is_head_read = False
        #: Body bytes still to come; None when the body is chunked.
        self.left: int | None = None
        self.sent_at = time.monotonic_ns()
        self.sock.sendall(self.request)

    def take(self) -> bool:
        """Read what has arrived; True when the answer is whole."""
        data = self.sock.recv(READ_BYTES)
        if not data:
            got = b"".join(piece for _, piece in self.pieces)
            raise BenchError(f"the connection was closed after {got[-300:]!r}")
        self.pieces.append((time.monotonic_ns(), data))
        if self.is_head_read:
            if self.left is not None:
                self.left -= len(data)
        else:
            self.read_head()
        if self.left is not None:
            return self.left <= 0
        self.tail = data[-7:] if len(data) >= 7 else (self.tail + data)[-7:]
        return self.is_head_read and self.tail == LAST_CHUNK

    def read_head(self) -> None:
        """Learn from the head, once it is whole, how the body ends."""
        got = b"".join(piece for _, piece in self.pieces)
        head_end = got.find(HEAD_END)
        if head_end < 0:
            return
        self.is_head_read = True
        length = CONTENT_LENGTH.search(got, 0, head_end)
        if length is not None:
            self.left = head_end + len(HEAD_END) + int(length[1]) - len(got)


def run_load(
    port: int,
    request: bytes,
    *,
    callers: int,
    seconds: float = 0.0,
    times: int = 0,
    spread_s: float = 0.0,
    is_reconnecting: bool = False,
    halfway: Callable[[], None] | None = None,
) -> Load:
    """Ask over `callers` connections, each `times` times or until `seconds` are over.

    The connections start evenly over `spread_s`; `halfway` is called once, halfway in `seconds`.
    """
    answers: list[Answer] = []
    left_to_ask = [times or sys.maxsize] * callers
    started = time.monotonic()
    starts = [started + k * spread_s / callers for k in range(callers)]
    stop_at = started + seconds if seconds else sys.maxsize
    half_at = started + seconds / 2 if halfway else sys.maxsize
    deadline = started + seconds + spread_s + ANSWER_S
    opened = active = 0
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        while opened < callers or active:
            now = time.monotonic()
            while opened < callers and starts[opened] <= now:
                caller = Caller(port, request)
                selector.register(caller.sock, selectors.EVENT_READ, (opened, caller))
                stack.callback(caller.close)
                caller.ask()
                opened += 1
                active += 1
            if halfway and now >= half_at:
                half_at = sys.maxsize
                halfway()
            if now > deadline:
                raise BenchError(f"{active} of {callers} answers did not end in time")
            wait = min(starts[opened] if opened < callers else deadline, half_at, deadline) - now
            for key, _ in selector.select(max(0.0, wait)):
                number, caller = key.data
                if not caller.take():
                    continue
                answers.append(Answer(caller.sent_at, caller.pieces))
                left_to_ask[number] -= 1
                is_done = not left_to_ask[number] or time.monotonic() >= stop_at
                if is_done or is_reconnecting:
                    selector.unregister(caller.sock)
                    caller.close()
                if is_done:
                    active -= 1
                    continue
                if is_reconnecting:
                    caller.connect()
                    selector.register(caller.sock, selectors.EVENT_READ, (number, caller))
                caller.ask()
    return Load(answers, time.monotonic() - started)


def read_body(answer: Answer) -> tuple[bytes, list[tuple[int, int]]]:
    """The body of an answer with status 200, and where its parts are.

    For each part: where it starts in the body, and where in the bytes on the wire.
    """
    raw = b"".join(piece for _, piece in answer.pieces)
    head_end = raw.index(HEAD_END) + len(HEAD_END)
    starts: list[tuple[int, int]] = [(0, head_end)]
    body = raw[head_end:]
    if CONTENT_LENGTH.search(raw, 0, head_end) is None:
        parts: list[bytes] = []
        starts.clear()
        at, length = head_end, 0
        while True:
            line_end = raw.index(b"\r\n", at)
            size = int(raw[at:line_end], 16)
            if not size:
                break
            starts.append((length, line_end + 2))
            parts.append(raw[line_end + 2 : line_end + 2 + size])
            length += size
            at = line_end + 4 + size
        body = b"".join(parts)
    if not raw.startswith(b"HTTP/1.1 200 "):
        raise BenchError(f"{raw[:head_end].splitlines()[0].decode()}: {body[:300].decode()}")
    return body, starts


def read_deltas(answer: Answer) -> Iterator[Delta]:
    """The deltas of an answer, each with the moment when the read that completed it returned."""
    body, starts = read_body(answer)
    pieces = answer.pieces
    part = piece = 0
    wire_end = len(pieces[0][1])
    for match in DELTA.finditer(body):
        last = match.end() - 1
        while part + 1 < len(starts) and starts[part + 1][0] <= last:
            part += 1
        wire_at = starts[part][1] + last - starts[part][0]
        while wire_at >= wire_end:
            piece += 1
            wire_end += len(pieces[piece][1])
        yield Delta(int(match[1]), int(match[2]), pieces[piece][0])


# ---- Processes -----------------------------------------------------------------------------------


def cores() -> tuple[int, int]:
    """The core of the program and that of upstream and clients; (-1, -1) without a choice."""
    if not hasattr(os, "sched_setaffinity"):
        return -1, -1
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (-1, -1)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used up to now."""
    if sys.platform == "linux":
        # The number of another process's CPU clock, as clock_getcpuclockid(3) builds it.
        return time.clock_gettime((~pid << 3) | 2)
    clock = subprocess.check_output(["ps", "-o", "time=", "-p", str(pid)], text=True).strip()
    total = 0.0
    for figure in clock.replace("-", ":").split(":"):
        total = total * 60 + float(figure)
    return total


def resident_bytes(pid: int) -> float:
    """Resident memory of a process."""
    statm = Path(f"/proc/{pid}/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)) * 1024


def machine_busy_s() -> float:
    """CPU seconds that the whole machine has worked since its start; 0 where that is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq = map(int, stat.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """Within, children are started on this core; afterwards this process is where it was."""
    if core < 0:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Side:
    """One end of the comparison: a process that listens, and its paths by dialect."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    paths: dict[str, str]

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return self.process.pid

    def run(self, request: bytes, **shape: Any) -> Load:
        """A run of the client against this side, with the CPU time that it cost here."""
        before = cpu_s(self.pid)
        try:
            load = run_load(self.port, request, **shape)
        except OSError as error:
            raise BenchError(f"the {self.name}: {type(error).__name__}: {error}") from error
        return replace(load, cpu_s=cpu_s(self.pid) - before)

    def stop(self) -> None:
        """End the process, first kindly."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        else:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def read_port(process: subprocess.Popen[bytes], log: Path | None = None) -> int:
    """The port from the line that a server prints when it is ready."""
    if process.stdout is None:
        raise BenchError("the server has no stdout")
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(START_S) else b""
    match = READY_LINE.search(line)
    if match is None:
        process.kill()
        said = log.read_text()[-1000:] if log is not None else ""
        raise BenchError(f"the server did not start: {line.decode()!r} {said}")
    return int(match[1])


def write_home(home: Path, upstream_port: int) -> dict[str, str]:
    """Config and token for a program that knows only our upstream; returns its environment."""
    url = f"http://127.0.0.1:{upstream_port}"
    settings = home / "config" / "aiclient-api"
    for folder in (home, home / "config", home / "state", settings):
        folder.mkdir(mode=0o700, exist_ok=True)
    (settings / "config.toml").write_text(
        'default_provider = "copilot"\n\n[server]\nmax_connections = 2048\n\n'
        f'[providers.copilot]\ntype = "copilot"\ngithub_url = "{url}"\ngithub_api_url = "{url}"\n'
        f'[providers.kiro]\ntype = "kiro"\napi_url = "{url}"\n'
    )
    tokens: dict[str, dict[str, Any]] = {
        "copilot": {"github_token": "ghu_" + "0" * 36, "copilot_token": None, "expires_at": None},
        "kiro": {"access_token": "aoaEXAMPLE", "refresh_token": "aorEXAMPLE", "expires_at": 4e9},
    }
    for name, keys in tokens.items():
        token = settings / name / "token.json"
        token.parent.mkdir(mode=0o700, exist_ok=True)
        token.write_text(json.dumps({"type": name, **keys}))
        token.chmod(0o600)
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_RUNTIME_DIR": str(home / "state"),
        "AICLIENT_API_LIMITS_RUNAWAY_REQUESTS": "0",  # load is the same request again and again
    }


# ---- The bench -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the deltas of every answer."""

    deltas: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    unfinished: int = 0

    def add(self, body: bytes, expected: int) -> None:
        """Count one answer that should hold the deltas 0 ... expected-1."""
        repeats = REPEATS.search(body)
        body = SAID_TWICE.sub(rb"\1", body)
        end = repeats.start() if repeats else len(body)
        numbers = list(map(int, DELTA_NUMBER.findall(body, 0, end)))
        self.deltas += len(numbers)
        self.unfinished += not (body.endswith(ENDINGS) or COMPLETED.search(body))
        whole = list(range(expected))
        repeated = list(map(int, DELTA_NUMBER.findall(body, end)))
        if repeats and (not repeated or repeated != whole * (len(repeated) // expected)):
            self.lost += 1
        if numbers == whole:
            return
        distinct = set(numbers)
        self.lost += len(set(range(expected)) - distinct)
        self.doubled += len(numbers) - len(distinct)
        self.reordered += sum(a > b for a, b in itertools.pairwise(numbers))

    def is_clean(self) -> bool:
        """Whether everything arrived once, in order, with an end."""
        return not (self.lost or self.doubled or self.reordered or self.unfinished)


@dataclass
class Bench:
    """What the measures share: the plan, the processes, and the tally of deltas."""

    plan: Plan
    program: Path
    folder: Path
    program_core: int
    other_core: int
    #: Ends every process that was started.
    stack: ExitStack
    tally: Tally = field(default_factory=Tally)
    gateway: Side | None = None
    homes: int = 0

    def __post_init__(self) -> None:
        self.upstream = self.start_upstream()

    def start_upstream(self) -> Side:
        """A fresh upstream, listening, on the clients' core."""
        command = [sys.executable, str(HERE / "upstream.py")]
        with pinned_to(self.other_core):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        paths = {"chat": "/chat/completions", "messages": "/v1/messages"}
        side = Side("upstream", process, 0, paths | {"responses": "/responses"})
        self.stack.callback(side.stop)
        side.port = read_port(process)
        return side

    def cached(self) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment that run the program from cached bytecode, as installed."""
        folder = self.folder / "cached"
        copied = folder / "aiclient_api.py"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(self.program, copied)
            py_compile.compile(str(copied), doraise=True)
        return ["-m", "aiclient_api"], {"PYTHONPATH": str(folder)}

    def start_gateway(self, *, is_cached: bool = False) -> Side:
        """A fresh program, listening and pinned, with an empty home."""
        self.homes += 1
        home = self.folder / f"home{self.homes}"
        environment = write_home(home, self.upstream.port)
        log = home / "stderr.log"
        what, extra = self.cached() if is_cached else ([str(self.program)], {})
        command = [sys.executable, *what, "start", "--foreground", "--port", "0"]
        with pinned_to(self.program_core), log.open("wb") as errors:
            process = subprocess.Popen(
                command, env=environment | extra, cwd=home, stdout=subprocess.PIPE, stderr=errors
            )
        paths = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}
        side = Side("gateway", process, 0, paths | {"responses": "/v1/responses"})
        self.stack.callback(side.stop)
        side.port = read_port(process, log)
        return side

    def shared_gateway(self) -> Side:
        """The program that most measures use, warmed up."""
        if self.gateway is None:
            self.gateway = self.start_gateway()
            body = small_body("chat", "gpt-4.1", marker(2, 2), is_streamed=False)
            request = http_request(self.gateway.paths["chat"], body)
            self.gateway.run(request, callers=4, times=100)
        return self.gateway

    def check(self, load: Load, expected: int) -> None:
        """Count what is wrong with the deltas of every answer."""
        for answer in load.answers:
            self.tally.add(read_body(answer)[0], expected)

    def compare(
        self, dialect: str, body: dict[str, Any], expected: int, rounds: int, **shape: Any
    ) -> Sides:
        """The same work direct and through the gateway, in turns; every answer checked."""
        loads: Sides = ([], [])
        sides = (self.upstream, self.shared_gateway())
        requests = [http_request(side.paths[dialect], body) for side in sides]
        for side, request in zip(sides, requests, strict=True):
            self.check(side.run(request, callers=1, times=1), expected)
        for _ in range(rounds):
            for side, request, found in zip(sides, requests, loads, strict=True):
                load = side.run(request, **shape)
                self.check(load, expected)
                found.append(load)
        return loads


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def pair(figure: Callable[[T], float], both: Sequence[T]) -> Pair:
    """One figure of both sides: direct, and through the gateway."""
    direct, gateway = map(figure, both)
    return direct, gateway


def medians(sides: Sides, figure: Callable[[Load], float]) -> Pair:
    """The median over rounds of one figure, for both sides."""
    return pair(lambda loads: statistics.median(map(figure, loads)), sides)


def percentiles(sides: Sides, share: float, unit_ns: float) -> Pair:
    """The time within which this share of the answers was whole, for both sides."""

    def within(loads: list[Load]) -> float:
        return percentile([a.took_ns() / unit_ns for load in loads for a in load.answers], share)

    return pair(within, sides)


def answers_per_s(load: Load) -> float:
    """Whole answers per second."""
    return len(load.answers) / load.elapsed_s


def cpu_per_answer_us(load: Load) -> float:
    """CPU microseconds for one answer on the side that was asked."""
    return load.cpu_s / len(load.answers) * US


def cpu_per_answer_ms(load: Load) -> float:
    """The same in milliseconds."""
    return load.cpu_s / len(load.answers) * MS


# ---- Measures ------------------------------------------------------------------------------------
# Each takes its figures and yields the rows that show them. In rows about CPU, "direct" is what the
# upstream itself spent on the same answers: a ruler for the speed of this machine.


def small(bench: Bench) -> Iterator[Row]:
    """Small answers that are not streamed, over 16 kept connections."""
    body = small_body("chat", "gpt-4.1", HELLO, is_streamed=False)
    sides = bench.compare(
        "chat", body, 2, bench.plan.rounds, callers=16, seconds=bench.plan.hammer_s
    )
    rates = medians(sides, answers_per_s)
    yield Row("small answers, 16 connections", "requests/s", *rates)
    yield Row(
        "small answers, 16 connections: CPU", "us", *medians(sides, cpu_per_answer_us), at_most=420
    )


def latency(bench: Bench) -> Iterator[Row]:
    """One request after the other over one kept connection."""
    body = small_body("chat", "gpt-4.1", HELLO, is_streamed=False)
    times = bench.plan.latency_requests // bench.plan.rounds
    sides = bench.compare("chat", body, 2, bench.plan.rounds, callers=1, times=times)
    for name, share, target in (("p50", 0.5, 400), ("p99", 0.99, 4000)):
        took = percentiles(sides, share, NS_PER_US)
        yield Row(f"one connection, {name}", "us", *took, is_added=True, at_most=target)


def connect(bench: Bench) -> Iterator[Row]:
    """A new connection for each request, 16 at a time."""
    body = small_body("chat", "gpt-4.1", HELLO, is_streamed=False)
    shape = {"callers": 16, "seconds": bench.plan.hammer_s, "is_reconnecting": True}
    sides = bench.compare("chat", body, 2, bench.plan.rounds, **shape)
    rates = medians(sides, answers_per_s)
    yield Row("new connection per request", "requests/s", *rates)
    yield Row(
        "new connection per request: CPU", "us", *medians(sides, cpu_per_answer_us), at_most=520
    )


def pace(bench: Bench) -> Iterator[Row]:
    """Streams at the pace of a model: eight at a time, a delta each 10 ms."""
    chunks = 20
    body = small_body("chat", "gpt-4.1", f"Talk. {marker(chunks, pace_ms=10)}", is_streamed=True)
    seconds = bench.plan.pace_s / bench.plan.rounds
    sides = bench.compare(
        "chat", body, chunks, bench.plan.rounds, callers=8, seconds=seconds, spread_s=0.15
    )
    for name, unit, delays, targets in (
        ("first token", "ms", first_delays_ms, (1.5, 10)),
        ("delta", "us", delta_delays_us, (350, 10_000)),
    ):
        found = [delays(loads) for loads in sides]
        for share, target in zip((0.5, 0.99), targets, strict=True):
            label = f"8 streams, a delta each 10 ms: {name} p{share * 100:.0f}"
            direct, gateway = (percentile(values, share) for values in found)
            yield Row(label, unit, direct, gateway, is_added=True, at_most=target)


def first_delays_ms(loads: list[Load]) -> list[float]:
    """From the sending of each request to the arrival of its first delta."""
    answers = [answer for load in loads for answer in load.answers]
    return [(next(read_deltas(a)).came_at - a.sent_at) / NS_PER_MS for a in answers]


def delta_delays_us(loads: list[Load]) -> list[float]:
    """From the upstream's sending of each delta to its arrival."""
    deltas = [d for load in loads for answer in load.answers for d in read_deltas(answer)]
    return [(delta.came_at - delta.sent_at) / NS_PER_US for delta in deltas]


@dataclass
class Way:
    """A way that streams take: who asks in which dialect, and which model answers in which."""

    name: str
    dialect: str
    model: str
    #: CPU microseconds for a delta of text, with 1 and with 16 deltas in each write.
    targets: Pair
    shape: str = "copilot"
    kinds: tuple[str, ...] = ("text", "arguments", "thinking")


def full_speed(bench: Bench, way: Way) -> Iterator[Row]:
    """Streams as fast as they go, with 1 and with 16 deltas in each write of the upstream.

    Arguments and thinking are judged by what text costs on the same way, in the same run.
    """
    rounds = min(2, bench.plan.rounds)
    for batch, times, target in ((1, 1, way.targets[0]), (16, 4, way.targets[1])):
        chunks = bench.plan.full_speed_chunks * times
        costs: dict[str, Pair] = {}
        for kind in way.kinds:
            script = marker(chunks, batch, shape=way.shape, kind=kind)
            body = stream_body(way.dialect, way.model, kind, script)
            shape = {"callers": bench.plan.streams, "times": 1}
            sides = bench.compare(way.dialect, body, chunks, rounds, **shape)
            # One answer holds `chunks` chunks.
            answers, cpu = medians(sides, answers_per_s), medians(sides, cpu_per_answer_us)
            costs[kind] = cpu[0] / chunks, cpu[1] / chunks
            name = f"{way.name}, {kind}, {batch} per packet"
            if kind == "text":
                rates = answers[0] * chunks, answers[1] * chunks
                yield Row(f"{name}: rate", "deltas/s", *rates)
                yield Row(f"{name}: CPU", STREAM_UNIT, *costs[kind], at_most=target)
                continue
            yield Row(f"{name}: CPU", STREAM_UNIT, *costs[kind])
            direct, gateway = (a / b for a, b in zip(costs[kind], costs["text"], strict=True))
            yield Row("  beside text", "x", direct, gateway, at_most=RATIO)


STREAM_UNIT = "us/delta"
#: Arguments, thinking and numbered frames may cost this much of what text costs.
RATIO = 1.3
CHAT, CLAUDE, CODEX, KIRO = "gpt-4.1", "claude-sonnet-4.5", "gpt-5.3-codex", "kiro/claude-kiro"
NATIVE = (
    Way("chat->chat", "chat", CHAT, (11.0, 3.0)),
    Way("chat->chat, documented frames", "chat", CHAT, (11.0, 3.0), "clean", ("text",)),
    Way("messages->messages", "messages", CLAUDE, (9.5, 3.0)),
)
CONVERTED = (
    Way("chat->messages", "messages", CHAT, (12.0, 4.0)),
    Way("messages->chat", "chat", CLAUDE, (12.0, 4.0)),
)
FROM_KIRO = (
    Way("Kiro->chat", "chat", KIRO, (14.0, 5.0)),
    Way("Kiro->messages", "messages", KIRO, (14.0, 5.0)),
)
#: Beside native and converted streams of frames that are not numbered.
NUMBERED = (
    Way("responses->responses", "responses", CODEX, (RATIO * 9.5, RATIO * 3.0)),
    Way("messages->responses", "responses", CLAUDE, (RATIO * 12.0, RATIO * 4.0)),
    Way("Kiro->responses", "responses", KIRO, (RATIO * 14.0, RATIO * 5.0)),
    Way("responses->chat", "chat", CODEX, (RATIO * 12.0, RATIO * 4.0)),
)


def streams(ways: Sequence[Way]) -> Callable[[Bench], Iterator[Row]]:
    """The measure of streams that take these ways, named upstream->client."""
    return lambda bench: itertools.chain.from_iterable(full_speed(bench, way) for way in ways)


def many(bench: Bench) -> Iterator[Row]:
    """Very many streams of 20 deltas a second, on a fresh program."""
    fresh = bench.start_gateway()
    warm_up = small_body("chat", "gpt-4.1", f"Talk. {marker(2)}", is_streamed=True)
    fresh.run(http_request(fresh.paths["chat"], warm_up), callers=8, times=20)
    idle_bytes = resident_bytes(fresh.pid)
    floods = [flood(bench, side) for side in (bench.upstream, fresh)]
    fresh.stop()
    name = f"{bench.plan.many_streams} streams of 20 deltas/s: "
    yield Row(f"{name}in time", "%", *pair(lambda f: f.in_time * 100, floods), at_least=98)
    for share, target in ((0.5, None), (0.99, 100)):
        direct, gateway = (percentile(found.delays_ms, share) for found in floods)
        yield Row(f"{name}p{share * 100:.0f}", "ms", direct, gateway, at_most=target)
    per_stream = (floods[1].resident - idle_bytes) / bench.plan.many_streams / KB
    yield Row(f"{name}memory", "kB/stream", None, per_stream, at_most=25)
    yield Row("  CPU per delta", "us", *pair(lambda f: f.cpu_us, floods))


@dataclass
class Flood:
    """What became of very many paced streams on one side."""

    #: Share of all deltas that arrived soon after they were due.
    in_time: float
    delays_ms: list[float]
    #: Resident bytes of the side while all streams were running.
    resident: float
    #: CPU microseconds for one delta.
    cpu_us: float


def flood(bench: Bench, side: Side) -> Flood:
    """Run the many streams once against one side."""
    plan = bench.plan
    chunks = int(plan.many_s * 1000 / FLOOD_PACE_MS)
    text = f"Talk. {marker(chunks, pace_ms=FLOOD_PACE_MS)}"
    resident: list[float] = []
    load = side.run(
        http_request(side.paths["chat"], small_body("chat", "gpt-4.1", text, is_streamed=True)),
        callers=plan.many_streams,
        times=1,
        seconds=plan.many_s,
        spread_s=plan.many_spread_s,
        halfway=lambda: resident.append(resident_bytes(side.pid)),
    )
    bench.check(load, chunks)
    answers = [list(read_deltas(answer)) for answer in load.answers]
    deltas = [delta for answer in answers for delta in answer]
    total = plan.many_streams * chunks
    return Flood(
        in_time=sum(map(punctual_deltas, answers)) / total,
        delays_ms=[(delta.came_at - delta.sent_at) / NS_PER_MS for delta in deltas],
        resident=resident[0],
        cpu_us=load.cpu_s / total * US,
    )


def punctual_deltas(deltas: list[Delta]) -> int:
    """How many deltas of a stream arrived soon after its first one says that they were due."""
    start = deltas[0].sent_at if deltas else 0
    step = FLOOD_PACE_MS * int(NS_PER_MS)
    return sum(delta.came_at <= start + delta.number * step + LATE_NS for delta in deltas)


def large(bench: Bench) -> Iterator[Row]:
    """Requests as agents send them late in a session."""
    native, converted, kiro = range(3)
    ways = (
        ("chat->chat", "chat", CHAT, native),
        ("messages->messages", "messages", CLAUDE, native),
        ("messages->chat", "messages", CHAT, converted),
        ("chat->messages", "chat", CLAUDE, converted),
        ("messages->Kiro", "messages", KIRO, kiro),
    )
    for label, size, times, targets in (
        ("200 KB", 200_000, bench.plan.large_requests, (2.5, 6.0, 8.0)),
        ("2 MB", 2_000_000, max(2, bench.plan.large_requests // 3), (22.0, 45.0)),
    ):
        for name, dialect, model, kind in ways:
            if kind >= len(targets):
                continue
            body = large_body(dialect, model, marker(2, 2), size)
            sides = bench.compare(dialect, body, 2, 1, callers=1, times=times)
            took = percentiles(sides, 0.5, NS_PER_MS)
            yield Row(f"request of {label}, {name}: p50", "ms", *took, is_added=True)
            cpu = medians(sides, cpu_per_answer_ms)
            yield Row(f"request of {label}, {name}: CPU", "ms", *cpu, at_most=targets[kind])


#: What a worst body holds below the limit of values, a few of which the rest of it needs.
MOST_VALUES = 199_000


def worst_bodies(dialect: str, model: str, size: int) -> Iterator[tuple[str, bytes]]:
    """Requests within the limits that take as long as can be, `size` bytes where that counts."""

    def asking(text: str, **more: Any) -> bytes:
        body = small_body(dialect, model, "Go on.", is_streamed=True) | more
        place = b'"content":"Go on."'
        data = json.dumps(body, separators=(",", ":")).encode()
        return data.replace(place, b'"content":"' + text.encode() + b'"', 1)

    ask = marker(2, 2)
    yield "quotes", asking(ask + '\\"' * (size // 2))
    yield "brackets in a text", asking(ask + "[" * size)
    yield "one string", asking(ask + "a" * size)
    yield "escapes", asking(ask + "\\u00e9" * (size // 6))
    schema = {"type": "object", "default": [[] for _ in range(MOST_VALUES // 3)]}
    if dialect == "messages":
        tool: dict[str, Any] = {"name": "f", "input_schema": schema}
    else:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    yield "brackets of values", asking(ask, tools=[tool])
    turns = [{"role": ("user", "assistant")[k % 2], "content": ask} for k in range(39_001)]
    yield "short turns", asking(ask, messages=turns)


def block(bench: Bench) -> Iterator[Row]:
    """How long one worst request keeps the program from answering anybody else.

    `/healthz` is asked again and again on another connection. The figure is the most CPU time that
    the program took before one of the answers: the wait, on a machine that does nothing else.
    Direct: the same without the request.
    """
    side = bench.start_gateway()
    size = bench.plan.worst_mb << 20
    for name, dialect, model in (
        ("chat->chat", "chat", CHAT),
        ("messages->chat", "messages", CHAT),
        ("messages->Kiro", "messages", KIRO),
    ):
        found: list[tuple[float, str, float]] = []
        for shape, data in worst_bodies(dialect, model, size):
            quiet, _ = longest_block_s(side, b"")
            longest, status = longest_block_s(side, http_post(side.paths[dialect], data))
            told = "" if status == 200 else f", refused with {status}"
            found.append((longest, f"{len(data) / MB:.1f} MB of {shape}{told}", quiet))
            yield Row(f"  block, {name}, {found[-1][1]}", "CPU s", quiet, longest)
        longest, body, quiet = max(found)
        yield Row(f"longest block, {name}: {body}", "CPU s", quiet, longest, at_most=0.5)
    side.stop()


def longest_block_s(side: Side, request: bytes) -> tuple[float, int]:
    """The most CPU time before an answer of `/healthz` during a request, and its status."""
    statuses: list[int] = []

    def post() -> None:
        with socket.create_connection(("127.0.0.1", side.port), timeout=ANSWER_S) as sock:
            with contextlib.suppress(ConnectionError):  # refused before all was sent
                sock.sendall(request)
            with sock.makefile("rb") as answer:
                statuses.append(int(answer.readline().split(b" ", 2)[1]))
                while line := answer.readline():
                    if line in (b"\r\n", b"data: [DONE]\n", b"event: message_stop\n"):
                        break

    blocks: list[float] = []
    thread = threading.Thread(target=post if request else lambda: time.sleep(0.2), daemon=True)
    with socket.create_connection(("127.0.0.1", side.port), timeout=ANSWER_S) as sock:
        before = cpu_s(side.pid)
        thread.start()
        while thread.is_alive():
            sock.sendall(http_request("/healthz"))
            if b" 200 " not in sock.recv(READ_BYTES):
                raise BenchError("/healthz does not answer")
            now = cpu_s(side.pid)
            blocks.append(now - before)
            before = now
            time.sleep(0.001)
    if request and not statuses:
        raise BenchError("the worst request had no answer")
    return max(blocks), (statuses or [0])[0]


def command_cpu_ms(command: list[str], environment: dict[str, str], times: int) -> float:
    """The median CPU time of a command that must succeed."""
    found: list[float] = []
    for _ in range(times):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise BenchError(f"{command} ended with exit status {process.returncode}")
        found.append((usage.ru_utime + usage.ru_stime) * MS)
    return statistics.median(found)


def first_answer_ms(start_side: Callable[[], Side]) -> float:
    """Milliseconds from starting a server to its first good answer on `/healthz`."""
    started = time.monotonic()
    side = start_side()
    load = run_load(side.port, http_request("/healthz"), callers=1, times=1)
    took = time.monotonic() - started
    side.stop()
    read_body(load.answers[0])
    return took * MS


def start(bench: Bench) -> Iterator[Row]:
    """How long small verbs and the first answer take; direct: `python -c pass`, the upstream."""
    environment = write_home(bench.folder / "home0", 1)
    times = bench.plan.starts
    # -S: what other packages of this Python hook into its start is not the program's doing.
    python = [sys.executable, "-S"]
    bare = command_cpu_ms([*python, "-c", "pass"], environment, times)
    cached, path = bench.cached()
    for way, what, extra, target in (
        ("copied file", [str(bench.program)], {}, 150),
        ("cached bytecode", cached, path, 80),
    ):
        for verb in ("--version", "--help"):
            cpu = command_cpu_ms([*python, *what, verb], environment | extra, times)
            yield Row(f"{verb}, {way}: CPU", "ms", bare, cpu, at_most=target)
    upstream = statistics.median(first_answer_ms(bench.start_upstream) for _ in range(times))
    for way, is_cached in (("copied file", False), ("cached bytecode", True)):
        start_side = functools.partial(bench.start_gateway, is_cached=is_cached)
        took = statistics.median(first_answer_ms(start_side) for _ in range(times))
        yield Row(f"start to /healthz, {way}", "ms", upstream, took, at_most=350)


def daemon(bench: Bench) -> Iterator[Row]:
    """The gateway in the background: how long `start` takes, what a verb costs, what it holds."""
    environment = write_home(bench.folder / "daemon", 1)
    python = [sys.executable, "-S"]
    bare = command_cpu_ms([*python, "-c", "pass"], environment, bench.plan.starts)
    cached, path = bench.cached()
    ways: tuple[tuple[str, list[str], dict[str, str], int], ...] = (
        ("copied file", [str(bench.program)], {}, 150),
        ("cached bytecode", cached, path, 80),
    )

    def run(*words: str) -> str:
        command = [*python, *what, *words]
        return subprocess.check_output(command, env=environment | extra, text=True)

    for way, what, extra, target in ways:
        took = []
        for _ in range(bench.plan.starts):
            started = time.monotonic()
            run("start", "--port", "0")  # which returns when /healthz was answered
            took.append((time.monotonic() - started) * MS)
            if len(took) < bench.plan.starts:
                run("stop")
        yield Row(f"start in the background, {way}", "ms", None, statistics.median(took))
        try:
            status = [*python, *what, "status"]
            cpu = command_cpu_ms(status, environment | extra, bench.plan.starts)
            yield Row(f"status, {way}: CPU", "ms", bare, cpu, at_most=target)
            resident = resident_bytes(json.loads(run("status"))["pid"]) / MB
            yield Row(f"resident, in the background, {way}", "MB", None, resident, at_most=28)
        finally:
            run("stop")


def memory(bench: Bench) -> Iterator[Row]:
    """Resident memory of a fresh idle program, and of the one that has done all the work so far."""
    idle = bench.start_upstream(), bench.start_gateway(), bench.start_gateway(is_cached=True)
    for side in idle:
        read_body(run_load(side.port, http_request("/healthz"), callers=1, times=1).answers[0])
    upstream, *gateways = map(resident_mb, idle)
    for way, resident in zip(("copied file", "cached bytecode"), gateways, strict=True):
        yield Row(f"resident, --foreground, {way}", "MB", upstream, resident, at_most=32)
    for side in idle:
        side.stop()
    body = small_body("chat", "gpt-4.1", HELLO, is_streamed=False)
    bench.compare("chat", body, 2, 1, callers=16, seconds=bench.plan.hammer_s)
    loaded = bench.upstream, bench.shared_gateway()
    yield Row("resident, after the load of this run", "MB", *pair(resident_mb, loaded))


def resident_mb(side: Side) -> float:
    """Resident memory of one side in megabytes."""
    return resident_bytes(side.pid) / MB


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "small": small,
    "latency": latency,
    "connect": connect,
    "pace": pace,
    "large": large,
    "block": block,
    "start": start,
    "daemon": daemon,
    "many": many,
    "memory": memory,
    "native": streams(NATIVE),
    "converted": streams(CONVERTED),
    "kiro": streams(FROM_KIRO),
    "responses": streams(NUMBERED),
}


# ---- Table ---------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """A figure with three significant digits or all of its whole part."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    """All rows as aligned text."""
    cells = [("measure", "unit", "direct", "gateway", "ratio/added", "target", "")]
    for row in rows:
        relation = row.relation()
        related = "-"
        if relation is not None:
            related = f"{relation:+,.2f}" if row.is_added else f"x {relation:.2f}"
            if row.is_added and abs(relation) >= 10:
                related = f"{relation:+,.0f}"
        target = "-"
        if row.at_most is not None:
            target = f"<= {'+' if row.is_added else ''}{row.at_most:,g}"
        if row.at_least is not None:
            target = f">= {row.at_least:,g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row.is_met()]
        figures = (short(row.direct), short(row.gateway), related, target)
        cells.append((row.measure, row.unit, *figures, verdict))
    widths = [max(len(line[k]) for line in cells) for k in range(7)]
    lines = []
    for line in cells:
        texts = [line[k].ljust(widths[k]) if k < 2 else line[k].rjust(widths[k]) for k in range(6)]
        lines.append("  ".join([*texts, line[6]]).rstrip())
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """The tables that README shows: the rows with targets, and the streams by kind of delta."""
    lines = ["| | direct | gateway | at most |", "|---|---:|---:|---:|"]
    costs: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.unit == STREAM_UNIT:
            way, kind, _ = row.measure.rsplit(", ", 2)
            costs.setdefault(way, {}).setdefault(kind, []).append(short(row.gateway))
        elif row.at_most and not row.measure.startswith("  "):
            figures = f"{short(row.direct)} | {short(row.gateway)} | {short(row.at_most)}"
            lines.append(f"| {row.measure}, {row.unit} | {figures} |")
    kinds = ("text", "arguments", "thinking")
    lines += ["", f"| CPU us/delta | {' | '.join(kinds)} |", "|---|---:|---:|---:|"]
    for way, found in costs.items():
        cells = [" / ".join(found.get(kind, ["-"])) for kind in kinds]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def integrity_rows(tally: Tally) -> list[Row]:
    """How the promise that no delta is lost, doubled or reordered was kept."""
    return [
        Row("deltas checked", "", None, tally.deltas),
        Row("  lost", "", None, tally.lost, at_most=0),
        Row("  doubled", "", None, tally.doubled, at_most=0),
        Row("  out of order", "", None, tally.reordered, at_most=0),
        Row("  answers without an end", "", None, tally.unfinished, at_most=0),
    ]


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark of the gateway on this machine.")
    parser.add_argument("--quick", action="store_true", help="less of everything, a minute")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, metavar="NAME", default=list(MEASURES)
    )
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print the figures as JSON")
    printed.add_argument("--markdown", action="store_true", help="print README's tables")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="the file to measure")
    return parser.parse_args(arguments)


def raise_file_limit() -> None:
    """Allow as many open files as the system grants, here and in the children."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measures asked for and print what they found."""
    options = read_arguments(arguments)
    raise_file_limit()
    program_core, other_core = cores()
    started, busy = time.monotonic(), machine_busy_s()
    failures: list[str] = []
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiclient-bench-")))
        stack.enter_context(pinned_to(other_core))
        gc.disable()  # its pauses would be measured; what is kept is dropped measure by measure
        plan = QUICK if options.quick else Plan()
        bench = Bench(plan, options.program.resolve(), folder, program_core, other_core, stack)
        for name in options.only:
            at_s = time.monotonic() - started
            if at_s > plan.limit_s:
                failures.append(f"{name}: left out, the run took too long")
                continue
            print(f"{at_s:5.1f} s  {name}", file=sys.stderr, flush=True)
            try:
                rows.extend(MEASURES[name](bench))
            except (BenchError, OSError) as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
            gc.collect()
        used = sum(map(cpu_s, [os.getpid(), bench.upstream.pid]))
        used += cpu_s(bench.gateway.pid) if bench.gateway is not None else 0.0
    elapsed = time.monotonic() - started
    rows.extend(integrity_rows(bench.tally))
    others = max(0.0, machine_busy_s() - busy - used) / elapsed
    machine = (
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores; {elapsed:.0f} s; work besides these processes: {others:.2f} cores"
    )
    if others > QUIET_CORES:
        machine += ", too many for rates and delays to be trusted; CPU times still tell"
    if options.json:
        figures = [asdict(row) | {"met": row.is_met()} for row in rows]
        print(json.dumps({"machine": machine, "rows": figures, "failures": failures}, indent=1))
    else:
        shown = markdown(rows) if options.markdown else table(rows)
        print("\n".join([shown, "", machine, *failures]))
    return 0 if bench.tally.is_clean() and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
