"""Golden streams, ways to feed them, and the three stream grammars as small validators.

A case is a folder `golden/<dialect>/<case>/`: `stream.sse` is what an upstream of that dialect
sends; `to_chat.sse` and `to_messages.sse` are what the callers of each dialect get for it;
`whole.json` is what they get without streaming, by dialect.  The stream files were written by
hand and read against the vendors' grammars; TERMS are the only inputs beside them.  A responses
upstream's cases have `to_responses.sse` as well, with item ids that tell type and place only.

The validators share no code with the program.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fake_kiro import message

from aiclient_api import DIALECTS, UPSTREAM_DIALECTS, ApiError, ResponseContext, StreamTranslator

Json = dict[str, Any]

GOLDEN = Path(__file__).resolve().parent / "golden"
CREATED = 1763800000
REQUEST_ID = "req_1"


def make_terms(**changes: Any) -> ResponseContext:
    """The terms every golden case is played under."""
    values: Json = {"id": "gw-1", "created": CREATED, "model": "asked", "include_usage": True}
    asked = {"messages": [{"content": "hi"}], "thinking": {"type": "enabled"}}
    return ResponseContext(**{**values, "request_body": asked, **changes})


def make_flow(
    upstream: str, caller: str, *, stream: bool = True, **changes: Any
) -> StreamTranslator:
    """One answer between two dialects."""
    terms = make_terms(**changes)
    return StreamTranslator(
        UPSTREAM_DIALECTS[upstream], DIALECTS[caller], terms, stream, REQUEST_ID
    )


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


def read_cases(dialect: str) -> list[Case]:
    """The cases of one upstream dialect that sends server-sent events."""
    return [Case(path.parent) for path in sorted(GOLDEN.glob(f"{dialect}/*/stream.sse"))]


#: The callers that every golden answer is written down for.
CALLERS = ("chat", "messages")
CASES = [case for dialect in CALLERS for case in read_cases(dialect)]
PAIRS = [(case, caller) for case in CASES for caller in CALLERS]
PAIR_IDS = [f"{case.name}-to-{caller}" for case, caller in PAIRS]

RESPONSES_CASES = read_cases("responses")
RESPONSES_PAIRS = [(case, caller) for case in RESPONSES_CASES for caller in DIALECTS]
RESPONSES_PAIR_IDS = [f"{case.name}-to-{caller}" for case, caller in RESPONSES_PAIRS]


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
        self.context: Json = {"window": kiro_window, **KIRO_TERMS.get(folder.name, {})}

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


def pass_on(flow: StreamTranslator, frames: list[Any]) -> bytes:
    """What parsed frames become, without a template."""
    try:
        flow.relay_frames(frames)
    except ApiError as error:
        flow.fail(error)
    return flow.take_output()


def play(flow: StreamTranslator, reads: Iterable[bytes]) -> bytes:
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


# An item's body when it is added.
EMPTY_ITEMS: dict[str, Json] = {
    "message": {"content": []},
    "function_call": {"arguments": ""},
    "custom_tool_call": {"input": ""},
    "tool_search_call": {"arguments": {}},
    "reasoning": {"summary": []},
}
# The words of a part: the part's type, what counts the parts, and where the words stand in it.
PART_WORDS = {
    "output_text": ("output_text", "content_index", "text"),
    "refusal": ("refusal", "content_index", "refusal"),
    "reasoning_text": ("reasoning_text", "content_index", "text"),
    "reasoning_summary_text": ("summary_text", "summary_index", "text"),
}


class StreamedItem:
    """An item of a responses stream: what was said of it so far."""

    def __init__(self, item: Json) -> None:
        self.id: str = item["id"]
        self.type: str = item["type"]
        self.call_id = item.get("call_id")
        self.name = item.get("name")
        self.parts: dict[str, list[Json]] = {"content_index": [], "summary_index": []}
        self.words: dict[tuple[str, int], str] = {}
        self.told: set[tuple[str, int]] = set()  # parts whose words were told as complete
        self.closed: set[tuple[str, int]] = set()
        self.arguments: str | None = None
        self.input = ""
        self.is_told = False  # its arguments or its input, as a whole
        self.done: Json | None = None


class ResponsesGrammar:
    """formats.md 3.6: created, dense items that grow and end, one terminal event, no gaps.

    With `native` a part, or its words, may come whole in the event that completes it: an upstream
    leaves deltas out.  Everything else holds there too.
    """

    ENDS = ("response.completed", "response.incomplete", "response.failed")

    def __init__(self, native: bool = False) -> None:
        self.native = native
        self.state = "START"
        self.number = 0
        self.head: tuple[Any, ...] = ()
        self.items: list[StreamedItem] = []

    def take(self, name: str, frame: Json) -> None:
        """One frame; AssertionError where the grammar does not allow it."""
        kind = frame["type"]
        assert name == kind, "the event line must name the type"
        assert frame["sequence_number"] == self.number, f"{kind}: a gap in the numbers"
        self.number += 1
        assert self.state != "END", f"{kind} after the end"
        assert (kind == "response.created") == (self.state == "START"), f"{kind} in {self.state}"
        if kind in ("response.created", "response.in_progress"):
            self.state = "OPEN"
            self.check_response(frame["response"], "in_progress")
            assert frame["response"]["output"] == [], "clients add these items a second time"
        elif kind in self.ENDS:
            self.state = "END"
            self.take_end(kind.partition(".")[2], frame["response"])
        elif kind == "response.output_item.added":
            self.take_added(frame)
        else:
            self.take_about(kind.partition(".")[2], frame)

    def check_response(self, response: Json, status: str) -> None:
        """What every response object has, and what may not change."""
        assert response["object"] == "response" and response["status"] == status
        assert isinstance(response["created_at"], int)
        head = (response["id"], response["model"], response["created_at"])
        self.head = self.head or head
        assert head == self.head and all(head), f"id, model or time changed: {head}"

    def take_added(self, frame: Json) -> None:
        """The next item, with nothing in it yet."""
        item = frame["item"]
        assert frame["output_index"] == len(self.items), "the items are not dense"
        assert isinstance(item["id"], str) and 0 < len(item["id"]) <= 64, item["id"]
        assert item["id"] not in [known.id for known in self.items], "an id came twice"
        for key, value in EMPTY_ITEMS.get(item["type"], {}).items():
            assert item[key] == value, f"{key} of a new item is not empty: {item}"
        if "call" in item["type"]:
            assert item.get("call_id") or self.native, item
        if item["type"] in ("function_call", "custom_tool_call"):
            assert item["call_id"] and item["name"], item
        if item["type"] != "reasoning":
            assert item["status"] == "in_progress", item
        self.items.append(StreamedItem(item))

    def take_about(self, kind: str, frame: Json) -> None:
        """An event about one item, which must be open."""
        assert 0 <= frame["output_index"] < len(self.items), f"{kind} before its item was added"
        item = self.items[frame["output_index"]]
        assert item.done is None, f"{kind} behind its item's end"
        if kind == "output_item.done":
            self.take_done(item, frame["item"])
            return
        assert frame["item_id"] == item.id, f"{kind}: another id for the same item"
        stem, _, step = kind.rpartition(".")
        if stem in PART_WORDS:
            self.take_words(stem, step, item, frame)
        elif stem == "content_part":
            self.take_part("content_index", step, item, frame)
        elif stem == "reasoning_summary_part":
            self.take_part("summary_index", step, item, frame)
        elif stem == "function_call_arguments":
            self.take_arguments(step, item, frame)
        elif stem == "custom_tool_call_input":
            self.take_input(step, item, frame)
        else:
            assert self.native, f"{kind} is not known"

    def take_part(self, key: str, step: str, item: StreamedItem, frame: Json) -> None:
        """A part begins empty at the next index, and ends with all its words."""
        assert item.type == ("message" if key == "content_index" else "reasoning") or self.native
        at, part = frame[key], frame["part"]
        word = "refusal" if part["type"] == "refusal" else "text"
        if step == "added":
            assert at == len(item.parts[key]), "the parts are not dense"
            assert part[word] == "", "words in a part's start are not read by clients"
            assert len(item.closed) == len(item.words), "the part before is still open"
            item.parts[key].append(part)
            item.words[key, at] = ""
        else:
            assert step == "done" and (key, at) in item.told and (key, at) not in item.closed
            assert part[word] == item.words[key, at]
            item.parts[key][at] = part
            item.closed.add((key, at))

    def take_words(self, stem: str, step: str, item: StreamedItem, frame: Json) -> None:
        """Words of the open part; all of them together are the part's."""
        type_, key, word = PART_WORDS[stem]
        place = (key, frame[key])
        assert frame[key] < len(item.parts[key]), f"{stem} before its part was added"
        assert item.parts[key][frame[key]]["type"] == type_
        assert place not in item.told, f"{stem}.{step} behind the part's end"
        if step == "delta":
            item.words[place] += frame["delta"]
        else:
            assert step == "done"
            if not (self.native and not item.words[place]):
                assert frame[word] == item.words[place], "the deltas are not the text"
            item.words[place] = frame[word]
            item.told.add(place)

    def take_arguments(self, step: str, item: StreamedItem, frame: Json) -> None:
        """Arguments of a function."""
        assert item.type == "function_call" and not item.is_told
        if step == "delta":
            item.arguments = (item.arguments or "") + frame["delta"]
            return
        assert step == "done" and (frame["name"] == item.name or self.native)
        if not (self.native and item.arguments is None):
            assert frame["arguments"] == item.arguments, "the deltas are not the arguments"
        item.arguments, item.is_told = frame["arguments"], True

    def take_input(self, step: str, item: StreamedItem, frame: Json) -> None:
        """Input of a custom tool."""
        assert item.type == "custom_tool_call" and not item.is_told
        if step == "delta":
            item.input += frame["delta"]
            return
        assert step == "done" and (frame["input"] == item.input or self.native)
        item.input, item.is_told = frame["input"], True

    def take_done(self, item: StreamedItem, said: Json) -> None:
        """The item's end: all that was told of it, once more."""
        assert (said["id"], said["type"]) == (item.id, item.type)
        assert (said.get("call_id"), said.get("name")) == (item.call_id, item.name)
        assert len(item.closed) == len(item.words), "a part is still open"
        is_cut = said.get("status") == "incomplete"
        if item.type != "reasoning":
            assert is_cut or said["status"] == "completed" or self.native, said["status"]
        keys = {"message": ("content", "content_index"), "reasoning": ("summary", "summary_index")}
        if item.type in keys:
            key, index = keys[item.type]
            untold = self.native and not item.parts[index]
            assert untold or said[key] == item.parts[index], "the parts are not the item's"
        if item.type == "function_call":
            untold = self.native and item.arguments is None
            assert untold or said["arguments"] == item.arguments
            assert (untold and not is_cut) or item.is_told is not is_cut, "cut, and told as done"
        if item.type == "custom_tool_call":
            assert self.native or (said["input"] == item.input and item.is_told is not is_cut)
        if item.type == "tool_search_call":
            assert isinstance(said["arguments"], dict)
        item.done = said

    def take_end(self, status: str, response: Json) -> None:
        """The terminal event: everything that was done, and what it cost."""
        self.check_response(response, status)
        if status == "failed":
            said = response["error"]
            assert isinstance(said["code"], str) and said["code"], said
            assert isinstance(said["message"], str) and said["message"], said
            return
        assert response["error"] is None
        assert response["output"] == [item.done for item in self.items], "not the done items"
        statuses = [item.get("status") for item in response["output"]]
        assert status == "incomplete" or "incomplete" not in statuses, statuses
        assert status == "completed" or self.native or "incomplete" in statuses[-1:] or not statuses
        reason = (response["incomplete_details"] or {}).get("reason")
        reasons = ("max_output_tokens", "content_filter") if status == "incomplete" else (None,)
        assert reason in reasons
        usage = response["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens_details"]["cached_tokens"] <= usage["input_tokens"]
        assert usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]


@functools.lru_cache(maxsize=64)
def check_responses(sent: bytes, native: bool = False) -> str:
    """What became of a responses stream: complete, error, or nothing."""
    grammar = ResponsesGrammar(native)
    events = split_events(sent)
    assert all(data != "[DONE]" for _, data in events), "[DONE] is chat's"
    for name, data in events:
        grammar.take(name, json.loads(data))
    if not events:
        return "nothing"
    assert grammar.state == "END", f"the stream ends in {grammar.state}"
    return "error" if events[-1][0] == "response.failed" else "complete"


GRAMMARS: dict[str, Callable[[bytes], str]] = {
    "chat": check_chat,
    "messages": check_messages,
    "responses": check_responses,
}


def check_ending(flow: StreamTranslator, caller: str, sent: bytes) -> str:
    """The grammar's word on what was sent, which must agree with the flow's own."""
    native = caller == "responses" and flow.upstream is flow.client
    outcome = check_responses(sent, native=True) if native else GRAMMARS[caller](sent)
    assert flow.is_finished
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
    if upstream == "responses":
        return frame.get("type") in ("response.completed", "response.incomplete")
    return any(choice.get("finish_reason") for choice in frame.get("choices") or ())


def has_finished(upstream: str, seen: bytes) -> bool:
    """Whether an upstream's bytes, line ends normalised, hold its finish already."""
    lines = seen.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return any(finishes(upstream, line) for line in lines if line)
