"""Golden streams, ways to feed them, and the two stream grammars as small validators.

A case is a folder `golden/<dialect>/<case>/`: `stream.sse` is what an upstream of that dialect
sends; `to_chat.sse` and `to_messages.sse` are what the callers of each dialect get for it;
`whole.json` is what they get without streaming, by dialect.  The stream files were written by
hand and read against the vendors' grammars; TERMS are the only inputs beside them.

The validators share no code with the program.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fake_kiro import message

from aiclient_api import DIALECTS, UPSTREAM_DIALECTS, ApiError, Flow, Terms

Json = dict[str, Any]

GOLDEN = Path(__file__).resolve().parent / "golden"
CREATED = 1763800000
REQUEST_ID = "req_1"


def make_terms(**changes: Any) -> Terms:
    """The terms every golden case is played under."""
    values: Json = {"id": "gw-1", "created": CREATED, "model": "asked", "include_usage": True}
    return Terms(**{**values, "asked": {"messages": [{"content": "hi"}]}, **changes})


def make_flow(upstream: str, caller: str, *, stream: bool = True, **changes: Any) -> Flow:
    """One answer between two dialects."""
    terms = make_terms(**changes)
    return Flow(UPSTREAM_DIALECTS[upstream], DIALECTS[caller], terms, stream, REQUEST_ID)


class Case:
    """One golden folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.upstream = folder.parent.name
        self.name = f"{self.upstream}-{folder.name}"
        self.stream = self.read_stream()

    def read_stream(self) -> bytes:
        """What the upstream sends."""
        return (self.folder / "stream.sse").read_bytes()

    def expected(self, caller: str) -> bytes:
        """The caller's bytes."""
        return (self.folder / f"to_{caller}.sse").read_bytes()

    def whole(self, caller: str) -> Json:
        """The caller's answer without streaming."""
        answers: Json = json.loads((self.folder / "whole.json").read_text("utf-8"))
        whole: Json = answers[caller]
        return whole


CASES = [Case(path.parent) for path in sorted(GOLDEN.glob("*/*/stream.sse"))]
#: The callers that every golden answer is written down for.
CALLERS = ("chat", "messages")
PAIRS = [(case, caller) for case in CASES for caller in CALLERS]
PAIR_IDS = [f"{case.name}-to-{caller}" for case, caller in PAIRS]


KIRO_WINDOWS = {"auto": 1000, "claude-sonnet-4.5": 200_000, "claude-opus-4.8": 1_000_000}


def kiro_window(model_id: str) -> int:
    """The context window of a model, 0 where nobody knows it."""
    return KIRO_WINDOWS.get(model_id, 0)


# What a case was asked with, where that matters for reading its answer.
KIRO_TERMS: dict[str, Json] = {"thinking_in_tags": {"tagged_thinking": True}}


class KiroCase(Case):
    """One golden folder of an upstream that answers with an event stream."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.terms: Json = {"window": kiro_window, **KIRO_TERMS.get(folder.name, {})}

    def read_stream(self) -> bytes:
        """What the upstream sends."""
        return b"".join(self.messages())

    def messages(self) -> list[bytes]:
        """The messages one by one."""
        return write_events((self.folder / "stream.events").read_bytes())


def write_events(lines: bytes) -> list[bytes]:
    """Lines of an event's type and its payload as messages of an event stream."""
    messages = []
    for line in lines.splitlines():
        name, _, payload = line.partition(b" ")
        head = {":event-type": name.decode(), ":content-type": "application/json"}
        messages.append(message({**head, ":message-type": "event"}, payload))
    return messages


def read_vectors() -> dict[str, bytes]:
    """Whole messages by name."""
    rows = (GOLDEN / "kiro" / "vectors.txt").read_text("ascii").splitlines()
    return {name: bytes.fromhex(data) for name, data in (row.split() for row in rows)}


KIRO_CASES = [KiroCase(path.parent) for path in sorted(GOLDEN.glob("kiro/*/stream.events"))]
KIRO_PAIRS = [(case, caller) for case in KIRO_CASES for caller in CALLERS]
KIRO_PAIR_IDS = [f"{case.name}-to-{caller}" for case, caller in KIRO_PAIRS]
VECTORS = read_vectors()


def play(flow: Flow, reads: Iterable[bytes]) -> bytes:
    """Everything the caller gets when the upstream's reads are these and then it ends."""
    sent = b"".join(flow.feed(data) for data in reads)
    return sent + flow.end()


def one_by_one(data: bytes) -> list[bytes]:
    """`data` as reads of one byte."""
    return [data[at : at + 1] for at in range(len(data))]


def write_frames(frames: Iterable[Json], *, names: bool) -> bytes:
    """Frames as an upstream would send them, with `event:` lines or without."""
    lines = []
    for frame in frames:
        head = f"event: {frame['type']}\n" if names else ""
        lines.append(f"{head}data: {json.dumps(frame, ensure_ascii=False)}\n\n")
    return "".join(lines).encode()


# ---- grammars ----------------------------------------------------------------------------------


def split_events(sent: bytes) -> list[tuple[str, str]]:
    """(event name, data) of bytes in the one form that the gateway writes; comments left out."""
    text = sent.decode("utf-8")
    assert not text or text.endswith("\n\n"), "a frame is not closed by an empty line"
    events = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        first, _, second = block.partition("\n")
        name = ""
        if second:
            assert first.startswith("event: "), block
            name, first = first[len("event: ") :], second
        assert first.startswith("data: ") and "\n" not in first, block
        events.append((name, first[len("data: ") :]))
    return events


def check_error(said: Json) -> None:
    """An error object must tell a type and a message."""
    assert isinstance(said["type"], str) and said["type"], said
    assert isinstance(said["message"], str) and said["message"], said


class MessagesGrammar:
    """formats.md 1.7: START, OPEN, BLOCK, CLOSING, END, with dense indexes and growing blocks."""

    PARTS = (
        ("text_delta", "text"),
        ("input_json_delta", "partial_json"),
        ("thinking_delta", "thinking"),
        ("signature_delta", "signature"),
        ("citations_delta", "citation"),
    )

    def __init__(self) -> None:
        self.state = "START"
        self.index = -1
        self.stop_reason: str | None = None
        self.arguments: dict[int, str] = {}

    def take(self, name: str, frame: Json) -> None:
        """One frame; AssertionError where the grammar does not allow it."""
        kind = frame["type"]
        assert name == kind, "the event line must name the type"
        assert self.state != "END", f"{kind} after the end"
        if kind == "ping":
            assert self.state in ("OPEN", "BLOCK"), "a ping outside a message"
        elif kind == "error":
            check_error(frame["error"])
            assert frame["request_id"] == REQUEST_ID
            self.state = "END"
        else:
            getattr(self, f"take_{kind}")(frame)

    def move(self, before: tuple[str, ...], after: str) -> None:
        """A step from one of the states `before`."""
        assert self.state in before, f"{after} from {self.state}"
        self.state = after

    def take_message_start(self, frame: Json) -> None:
        """Exactly one, first."""
        self.move(("START",), "OPEN")
        message = frame["message"]
        assert message["content"] == [] and message["role"] == "assistant"
        assert message["type"] == "message" and message["id"] and message["model"]
        assert message["stop_reason"] is None and message["stop_sequence"] is None
        assert isinstance(message["usage"]["input_tokens"], int)
        assert isinstance(message["usage"]["output_tokens"], int)

    def take_content_block_start(self, frame: Json) -> None:
        """The next index, with nothing in it yet."""
        self.move(("OPEN",), "BLOCK")
        self.index += 1
        assert frame["index"] == self.index
        block = frame["content_block"]
        if block["type"] in ("text", "thinking"):
            assert block[block["type"]] == "", "words in a block's start are not read by clients"
        if block["type"] == "tool_use":
            assert block["id"] and block["name"] and block["input"] == {}
            self.arguments[self.index] = ""

    def take_content_block_delta(self, frame: Json) -> None:
        """Growth of the open block only."""
        self.move(("BLOCK",), "BLOCK")
        assert frame["index"] == self.index
        delta = frame["delta"]
        key = dict(self.PARTS)[delta["type"]]
        assert key in delta
        if key == "partial_json" and self.index in self.arguments:
            self.arguments[self.index] += delta[key]

    def take_content_block_stop(self, frame: Json) -> None:
        """The open block's end; a call's arguments are an object by then, unless cut by a limit."""
        self.move(("BLOCK",), "OPEN")
        assert frame["index"] == self.index

    def take_message_delta(self, frame: Json) -> None:
        """The stop reason and the output tokens."""
        self.move(("OPEN", "CLOSING"), "CLOSING")
        assert "stop_sequence" in frame["delta"]
        self.stop_reason = frame["delta"]["stop_reason"]
        assert isinstance(self.stop_reason, str)
        assert isinstance(frame["usage"]["output_tokens"], int)
        if self.arguments and self.stop_reason not in ("max_tokens", "refusal"):
            assert self.stop_reason == "tool_use"
            for text in self.arguments.values():
                assert isinstance(json.loads(text or "{}"), dict)

    def take_message_stop(self, frame: Json) -> None:
        """The end."""
        self.move(("CLOSING",), "END")


@functools.lru_cache(maxsize=64)
def check_messages(sent: bytes) -> str:
    """What became of an Anthropic stream: complete, error, or nothing."""
    grammar = MessagesGrammar()
    events = split_events(sent)
    assert all(data != "[DONE]" for _, data in events), "[DONE] is not Anthropic's"
    for name, data in events:
        grammar.take(name, json.loads(data))
    if not events:
        return "nothing"
    assert grammar.state == "END", f"the stream ends in {grammar.state}"
    return "error" if events[-1][0] == "error" else "complete"


class ChatGrammar:
    """formats.md 2.6: role, growth, finish, usage, [DONE]; the same head members on each chunk."""

    def __init__(self) -> None:
        self.state = "START"
        self.head: tuple[Any, ...] = ()
        self.calls: list[str] = []
        self.finish: str | None = None

    def take(self, data: str) -> None:
        """One event's data."""
        assert self.state not in ("END", "ERROR"), f"{data} after the end"
        if data == "[DONE]":
            assert self.state in ("FINISHED", "COUNTED"), f"[DONE] from {self.state}"
            self.state = "END"
            return
        frame = json.loads(data)
        if "error" in frame:
            check_error(frame["error"])
            assert {"param", "code"} <= frame["error"].keys()
            self.state = "ERROR"
            return
        assert frame["object"] == "chat.completion.chunk"
        head = (frame["id"], frame["created"], frame["model"])
        self.head = self.head or head
        assert head == self.head and all(head), f"id, created and model changed: {head}"
        if frame["choices"]:
            self.take_choice(frame["choices"])
        else:
            assert self.state == "FINISHED" and frame["usage"]["total_tokens"] >= 0
            self.state = "COUNTED"

    def take_choice(self, choices: list[Json]) -> None:
        """The one choice of a chunk."""
        assert [choice["index"] for choice in choices] == [0]
        delta, finish = choices[0]["delta"], choices[0]["finish_reason"]
        assert isinstance(delta, dict)
        if self.state == "START":
            assert delta.get("role") == "assistant"
            self.state = "OPEN"
        else:
            assert self.state == "OPEN", f"a chunk after the finish: {delta}"
            assert "role" not in delta, "the role came twice"
        for fragment in delta.get("tool_calls") or ():
            self.take_fragment(fragment)
        if finish is not None:
            assert finish in ("stop", "length", "tool_calls", "content_filter"), finish
            self.finish, self.state = finish, "FINISHED"
            self.check_calls()

    def take_fragment(self, fragment: Json) -> None:
        """A call's first fragment has id, type and name; later ones have arguments only."""
        index, function = fragment["index"], fragment["function"]
        if index == len(self.calls):
            assert fragment["id"] and fragment["type"] == "function" and function["name"]
            self.calls.append("")
        else:
            assert index < len(self.calls), "the indexes of calls have a gap"
            assert set(fragment) == {"index", "function"} and set(function) == {"arguments"}
        self.calls[index] += function["arguments"]

    def check_calls(self) -> None:
        """Calls end in tool_calls and hold an object each, unless a limit cut them."""
        if self.calls and self.finish not in ("length", "content_filter"):
            assert self.finish == "tool_calls"
            for text in self.calls:
                assert isinstance(json.loads(text), dict)


@functools.lru_cache(maxsize=64)
def check_chat(sent: bytes) -> str:
    """What became of an OpenAI stream: complete, error, or nothing."""
    grammar = ChatGrammar()
    events = split_events(sent)
    for name, data in events:
        assert name == "", "OpenAI's stream has no event lines"
        grammar.take(data)
    if not events:
        return "nothing"
    assert grammar.state in ("END", "ERROR"), f"the stream ends in {grammar.state}"
    return "error" if grammar.state == "ERROR" else "complete"


GRAMMARS = {"chat": check_chat, "messages": check_messages}


def check_ending(flow: Flow, caller: str, sent: bytes) -> str:
    """The grammar's word on what was sent, which must agree with the flow's own."""
    outcome = GRAMMARS[caller](sent)
    assert flow.over
    if outcome == "nothing":
        assert isinstance(flow.error, ApiError), "neither bytes nor an error"
        return "error"
    assert (flow.error is not None) == (outcome == "error")
    return outcome


@functools.lru_cache(maxsize=4096)
def finishes(upstream: str, line: bytes) -> bool:
    """Whether one line of an upstream's stream tells the finish."""
    try:
        frame = json.loads(line.removeprefix(b"data:"))
    except ValueError:
        return False
    if not isinstance(frame, dict):
        return False
    if upstream == "messages" and (frame.get("delta") or {}).get("stop_reason"):
        return True
    return any(choice.get("finish_reason") for choice in frame.get("choices") or ())


def has_finished(upstream: str, seen: bytes) -> bool:
    """Whether an upstream's bytes, line ends normalised, hold its finish already."""
    lines = seen.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return any(finishes(upstream, line) for line in lines if line)
