"""A loopback stand-in for GitHub, Copilot and Kiro that answers at once and is hard to outrun.

    python3 upstream.py         prints `listening on http://127.0.0.1:PORT`, ends with its stdin

It knows the token exchange, the model lists, `/chat/completions`, `/v1/messages`, `/responses` and
Kiro's `/generateAssistantResponse`. How an answer is played is written in the last user text of the
request, and so travels through any gateway:

    [[chunks=2000 batch=16 pace_ms=0 shape=copilot kind=text]]

    chunks   deltas in the answer
    batch    deltas in one write (one HTTP chunk)
    pace_ms  time from write to write; 0 = as fast as the reader takes them
    shape    clean: frames as the vendors document them; copilot: as Copilot sends them, chat with
             an empty first chunk and no `object`, responses with another long id in each event
    kind     text, or arguments (of one tool call), or thinking (before a word of text)

Delta number k is `k@T;`. T is the moment of sending in nanoseconds of the monotonic clock for a
paced answer, and 0 for others, whose bytes are rendered once and kept. Every eighth delta of
arguments and of thinking also holds a line break, which JSON escapes: twice in arguments.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import math
import random
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

#: An upstream head of ordinary size: what stands in it costs its reader something.
COMMON_HEADERS = (
    b"Date: Sat, 22 Nov 2025 12:00:00 GMT\r\n"
    b"Content-Security-Policy: default-src 'none'; sandbox\r\n"
    b"Strict-Transport-Security: max-age=31536000\r\n"
    b"X-Request-Id: 00000000-0000-4000-8000-000000000000\r\n"
    b"X-GitHub-Request-Id: BE2C:1A2B3C:4D5E6F:708192:68A0B1C2\r\n"
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n" + COMMON_HEADERS + b"Content-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
KIRO_HEAD = STREAM_HEAD.replace(b"text/event-stream", b"application/vnd.amazon.eventstream")
KIRO_PATH = b"/generateAssistantResponse"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
MARKER_FIELD = re.compile(rb"(\w+)=(\w+)")
CREATED = 1_763_800_000
#: Deltas of paced streams leave at multiples of this.
GRID_S = 0.002


@dataclass
class Script:
    """How one answer is played: the meaning of a `[[...]]` marker."""

    chunks: int = 2
    batch: int = 2
    pace_s: float = 0.0
    shape: str = "clean"
    kind: str = "text"


@dataclass
class Frames:
    """The events of one dialect: around the whole answer, and one delta."""

    opening: bytes
    #: (number, moment) -> the event of one delta
    delta: Callable[[int, int], bytes]
    closing: Callable[[int], bytes]
    head: bytes = STREAM_HEAD


#: What the JSON text of a call's arguments begins and ends with.
BEGIN_ARGUMENTS, END_ARGUMENTS = '{"path":"notes.txt","text":"', '"}'
SIGNATURE = "EqQBCgIYAhIM" + "bench+/0" * 40 + "=="
LINE_BREAKS = {"text": "", "thinking": "\n", "arguments": "\\n"}


def delta_text(kind: str, number: int, moment: int) -> str:
    """What delta `number` says."""
    return f"{number}@{moment};" + (LINE_BREAKS[kind] if number % 8 == 7 else "")


def all_text(kind: str, chunks: int) -> str:
    """What the deltas of an answer that is not paced say together."""
    return "".join(delta_text(kind, number, 0) for number in range(chunks))


def between(frame: bytes, kind: str) -> Callable[[int, int], bytes]:
    """Deltas that are `frame` with their text in the place of `@@`."""
    before, after = frame.split(b"@@")

    def delta(number: int, moment: int) -> bytes:
        text = json.dumps(delta_text(kind, number, moment))[1:-1].encode()
        return b"%b%b%b" % (before, text, after)

    return delta


@dataclass
class Rendered:
    """An answer ready to be written: the opening with its head, one item per write, the closing."""

    opening: bytes
    pieces: list[bytes]
    closing: bytes


def read_script(marker: bytes) -> Script:
    """The script that a marker asks for; what it does not name keeps its default."""
    fields = {name.decode(): value.decode() for name, value in MARKER_FIELD.findall(marker)}
    return Script(
        chunks=int(fields.get("chunks", "2")),
        batch=int(fields.get("batch", "2")),
        pace_s=int(fields.get("pace_ms", "0")) / 1000,
        shape=fields.get("shape", "clean"),
        kind=fields.get("kind", "text"),
    )


def compact(value: Any) -> bytes:
    """JSON without blanks, as bytes."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event; a name gives it an `event:` line."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + compact(value) + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    """Data framed as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chat_frames(shape: str, kind: str) -> Frames:
    """OpenAI chat frames, as documented or as Copilot sends them."""
    is_copilot = shape == "copilot"
    base: dict[str, Any] = {"id": "chatcmpl-bench", "object": "chat.completion.chunk"}
    base |= {"created": CREATED, "model": "gpt-4.1", "choices": []}
    filters: dict[str, Any] = {"prompt_filter_results": [{"content_filter_results": {}}]}
    if is_copilot:
        del base["object"]

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "delta": delta}
        if finish is not None or not is_copilot:
            choice |= {"logprobs": None, "finish_reason": finish}
        return event(base | {"choices": [choice]})

    def arguments(text: str, **head: str) -> dict[str, Any]:
        name = {"name": "write_file"} if head else {}
        return {"tool_calls": [{"index": 0, **head, "function": {**name, "arguments": text}}]}

    def closing(chunks: int) -> bytes:
        usage = {"prompt_tokens": 9, "completion_tokens": chunks, "total_tokens": 9 + chunks}
        finish = chunk({}, "tool_calls" if kind == "arguments" else "stop")
        return before_finish + finish + event(base | {"usage": usage}) + b"data: [DONE]\n\n"

    empty = event(base | {"id": "", "model": "", "created": 0} | filters) if is_copilot else b""
    opening = empty + chunk({"role": "assistant", "content": ""})
    before_finish, delta = b"", {"content": "@@"}
    if kind == "arguments":
        call = arguments("", id="call_bench", type="function")
        opening += chunk({"content": None} | call) + chunk(arguments(BEGIN_ARGUMENTS))
        before_finish, delta = chunk(arguments(END_ARGUMENTS)), arguments("@@")
    elif kind == "thinking":
        before_finish, delta = chunk({"content": "So."}), {"reasoning_text": "@@"}
        before_finish = chunk({"reasoning_opaque": SIGNATURE}) + before_finish
    return Frames(opening, between(chunk(delta), kind), closing)


def messages_frames(shape: str, kind: str) -> Frames:
    """Anthropic messages frames; Copilot adds nothing to them, so the shape changes nothing."""
    message: dict[str, Any] = {"id": "msg_bench", "type": "message", "role": "assistant"}
    message |= {"model": "claude-sonnet-4.5", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None}
    message |= {"usage": {"input_tokens": 9, "output_tokens": 1}}

    def named(value: dict[str, Any]) -> bytes:
        return event(value, value["type"])

    def start(index: int, **block: Any) -> bytes:
        return named({"type": "content_block_start", "index": index, "content_block": block})

    def delta(index: int, **delta: str) -> bytes:
        return named({"type": "content_block_delta", "index": index, "delta": delta})

    def stop(index: int) -> bytes:
        return named({"type": "content_block_stop", "index": index})

    def closing(chunks: int) -> bytes:
        reason = "tool_use" if kind == "arguments" else "end_turn"
        last = {"stop_reason": reason, "stop_sequence": None}
        usage = {"output_tokens": chunks}
        return (
            ending
            + named({"type": "message_delta", "delta": last, "usage": usage})
            + named({"type": "message_stop"})
        )

    opening = named({"type": "message_start", "message": message})
    if kind == "arguments":
        opening += start(0, type="tool_use", id="toolu_bench", name="write_file", input={})
        opening += delta(0, type="input_json_delta", partial_json=BEGIN_ARGUMENTS)
        frame = delta(0, type="input_json_delta", partial_json="@@")
        ending = delta(0, type="input_json_delta", partial_json=END_ARGUMENTS) + stop(0)
    elif kind == "thinking":
        opening += start(0, type="thinking", thinking="", signature="")
        frame = delta(0, type="thinking_delta", thinking="@@")
        ending = delta(0, type="signature_delta", signature=SIGNATURE) + stop(0)
        ending += start(1, type="text", text="") + delta(1, type="text_delta", text="So.") + stop(1)
    else:
        opening += start(0, type="text", text="")
        frame = delta(0, type="text_delta", text="@@")
        ending = stop(0)
    return Frames(opening, between(frame, kind), closing)


#: Ids as Copilot's responses have them: 300 to 450 characters, another one in each event.
LONG_IDS = [base64.b64encode(random.Random(k).randbytes(225 + k)).decode() for k in range(100)]


def responses_frames(shape: str, kind: str) -> Frames:
    """OpenAI responses frames, numbered; one item, whose text the last events repeat."""
    is_copilot = shape == "copilot"
    item_types = {"text": "message", "arguments": "function_call", "thinking": "reasoning"}
    item_type = item_types[kind]

    def item_id(number: int) -> str:
        return LONG_IDS[number % len(LONG_IDS)] if is_copilot else f"{item_type}_bench"

    def numbered(number: int, name: str, **fields: Any) -> bytes:
        name = f"response.{name}"
        return event({"type": name, "sequence_number": number, **fields}, name)

    def inside(number: int, name: str, **fields: Any) -> bytes:
        place: dict[str, Any] = {"item_id": item_id(number), "output_index": 0}
        if kind != "arguments":
            place["content_index" if kind == "text" else "summary_index"] = 0
        return numbered(number, name, **place, **fields)

    def item(number: int, text: str, status: str) -> dict[str, Any]:
        found: dict[str, Any] = {"id": item_id(number), "type": item_type}
        if kind == "thinking":
            summary = [{"type": "summary_text", "text": text}] if text else []
            return found | {"summary": summary, "encrypted_content": SIGNATURE}
        found["status"] = status
        if kind == "arguments":
            return found | {"call_id": "call_bench", "name": "write_file", "arguments": text}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return found | {"role": "assistant", "content": [part] if text else []}

    def response(status: str, output: list[dict[str, Any]], usage: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"id": item_id(0) if is_copilot else "resp_bench"}
        found |= {"object": "response", "created_at": CREATED, "status": status, "error": None}
        found |= {"incomplete_details": None, "model": "gpt-5.3-codex", "output": output}
        return found | {"parallel_tool_calls": True, "tools": [], "usage": usage}

    delta_name, part_name = {
        "text": ("output_text", "content_part"),
        "arguments": ("function_call_arguments", ""),
        "thinking": ("reasoning_summary_text", "reasoning_summary_part"),
    }[kind]

    def part(text: str) -> dict[str, Any]:
        if kind == "thinking":
            return {"type": "summary_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def whole_delta(number: int, text: str) -> bytes:
        fields: dict[str, Any] = {"delta": text}
        if kind == "text":
            fields["logprobs"] = []
        if is_copilot:
            fields["obfuscation"] = "abcdefghijklmnop"[number % 16 :]
        return inside(number, f"{delta_name}.delta", **fields)

    created = response("in_progress", [], None)
    head = [
        numbered(0, "created", response=created),
        numbered(1, "in_progress", response=created),
        numbered(2, "output_item.added", output_index=0, item=item(2, "", "in_progress")),
    ]
    if part_name:
        head.append(inside(3, f"{part_name}.added", part=part("")))
    else:
        head.append(whole_delta(3, BEGIN_ARGUMENTS))

    def delta(number: int, moment: int) -> bytes:
        return whole_delta(number + len(head), delta_text(kind, number, moment))

    def closing(chunks: int) -> bytes:
        at, text = len(head) + chunks, all_text(kind, chunks)
        events: list[bytes] = []
        if kind == "arguments":
            events.append(whole_delta(at, END_ARGUMENTS))
            text = BEGIN_ARGUMENTS + text + END_ARGUMENTS
        said = {"arguments" if kind == "arguments" else "text": text}
        events.append(inside(at + len(events), f"{delta_name}.done", **said))
        if part_name:
            events.append(inside(at + len(events), f"{part_name}.done", part=part(text)))
        whole = item(at, text, "completed")
        events.append(numbered(at + len(events), "output_item.done", output_index=0, item=whole))
        output = [item(at + 1, text, "completed")]
        if kind == "thinking":
            output.append(ANSWER_ITEM)
            for name in ("added", "done"):
                number = at + len(events)
                said_item = ANSWER_ITEM | ({"content": []} if name == "added" else {})
                last = {"output_index": 1, "item": said_item}
                events.append(numbered(number, f"output_item.{name}", **last))
        usage = {"input_tokens": 9, "output_tokens": chunks, "total_tokens": 9 + chunks}
        completed = response("completed", output, usage)
        events.append(numbered(at + len(events), "completed", response=completed))
        return b"".join(events)

    return Frames(b"".join(head), delta, closing)


#: What is said after thinking; its text comes with its end alone.
ANSWER_ITEM: dict[str, Any] = {
    "id": "msg_bench",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "So.", "annotations": [], "logprobs": []}],
}


def kiro_message(name: str, payload: Any) -> bytes:
    """One message of an Amazon event stream."""
    fields = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        struct.pack(">B", len(key))
        + key.encode()
        + struct.pack(">BH", 7, len(value))
        + value.encode()
        for key, value in fields.items()
    )
    body = compact(payload)
    prelude = struct.pack(">II", 16 + len(headers) + len(body), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + body
    return message + struct.pack(">I", zlib.crc32(message))


def kiro_frames(shape: str, kind: str) -> Frames:
    """Kiro's events."""
    call = {"toolUseId": "tooluse_bench", "name": "write_file"}

    def delta(number: int, moment: int) -> bytes:
        text = delta_text(kind, number, moment)
        if kind == "arguments":
            return kiro_message("toolUseEvent", call | {"input": text})
        if kind == "thinking":
            return kiro_message("reasoningContentEvent", {"text": text})
        return kiro_message("assistantResponseEvent", {"content": text, "modelId": "claude-kiro"})

    def closing(chunks: int) -> bytes:
        counted = {"uncachedInputTokens": 9, "outputTokens": chunks}
        metering = {"unit": "credit", "unitPlural": "credits", "usage": 0.01}
        reason = "TOOL_USE" if kind == "arguments" else "END_TURN"
        last = {"stopReason": reason, "tokenUsage": counted}
        events = [kiro_message("meteringEvent", metering), kiro_message("metadataEvent", last)]
        if kind == "arguments":
            end = call | {"input": END_ARGUMENTS}
            events[:0] = [kiro_message("toolUseEvent", e) for e in (end, call | {"stop": True})]
        elif kind == "thinking":
            text = {"content": "So.", "modelId": "claude-kiro"}
            events.insert(0, kiro_message("assistantResponseEvent", text))
            events.insert(0, kiro_message("reasoningContentEvent", {"signature": SIGNATURE}))
        return b"".join(events)

    opening = kiro_message("initial-response", {})
    if kind == "arguments":
        begin = call | {"input": BEGIN_ARGUMENTS}
        opening += kiro_message("toolUseEvent", call) + kiro_message("toolUseEvent", begin)
    return Frames(opening, delta, closing, KIRO_HEAD)


DIALECTS = {
    b"/chat/completions": chat_frames,
    b"/v1/messages": messages_frames,
    b"/responses": responses_frames,
    KIRO_PATH: kiro_frames,
}


def render(frames: Frames, script: Script) -> Rendered:
    """Every byte of an answer that is not paced."""
    deltas = [frames.delta(k, 0) for k in range(script.chunks)]
    pieces = [
        http_chunk(b"".join(deltas[start : start + script.batch]))
        for start in range(0, script.chunks, script.batch)
    ]
    closing = http_chunk(frames.closing(script.chunks)) + b"0\r\n\r\n"
    return Rendered(frames.head + http_chunk(frames.opening), pieces, closing)


def whole_answer(path: bytes, script: Script) -> bytes:
    """The answer to a request that asked for no stream, in the dialect of its path."""
    text = all_text("text", script.chunks)
    if path == b"/v1/messages":
        return compact(
            {"id": "msg_bench", "type": "message", "role": "assistant"}
            | {"model": "claude-sonnet-4.5", "content": [{"type": "text", "text": text}]}
            | {"stop_reason": "end_turn", "stop_sequence": None}
            | {"usage": {"input_tokens": 9, "output_tokens": script.chunks}}
        )
    if path == b"/responses":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return compact(
            {"id": "resp_bench", "object": "response", "created_at": CREATED}
            | {"status": "completed", "error": None, "incomplete_details": None}
            | {"model": "gpt-5.3-codex", "output": [ANSWER_ITEM | {"content": [part]}]}
            | {"usage": {"input_tokens": 9, "output_tokens": script.chunks}}
        )
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 9, "completion_tokens": script.chunks}
    return compact(
        {"id": "chatcmpl-bench", "object": "chat.completion", "created": CREATED}
        | {"model": "gpt-4.1", "choices": [choice | {"finish_reason": "stop"}]}
        | {"usage": usage | {"total_tokens": 9 + script.chunks}}
    )


def json_answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole HTTP answer that carries JSON."""
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    kind = b"Content-Type: application/json\r\n"
    return b"HTTP/1.1 " + status + b"\r\n" + COMMON_HEADERS + kind + length + body


def token_answer(port: int) -> bytes:
    """What the token exchange says: a token for half an hour, and this server as the API."""
    now = int(time.time())
    token = f"tid=bench;exp={now + 1800};sku=bench;chat=1:00"
    endpoints = {"api": f"http://127.0.0.1:{port}"}
    return compact(
        {"token": token, "expires_at": now + 1800, "refresh_in": 1500, "endpoints": endpoints}
    )


def models_answer() -> bytes:
    """A model for each dialect alone, and one that speaks two."""
    speaks: dict[str, list[str] | None] = {
        "gpt-4.1": None,
        "claude-sonnet-4.5": ["/v1/messages"],
        "gpt-5.3-codex": ["/responses"],
        "claude-chat": ["/chat/completions", "/v1/messages"],
    }
    limits = {"max_context_window_tokens": 2_000_000, "max_prompt_tokens": 1_900_000}
    limits |= {"max_output_tokens": 64_000, "max_non_streaming_output_tokens": 64_000}
    supports = {"streaming": True, "tool_calls": True, "parallel_tool_calls": True}
    capabilities = {"type": "chat", "tokenizer": "o200k_base", "limits": limits}
    data: list[dict[str, Any]] = []
    for name, endpoints in speaks.items():
        vendor = "OpenAI" if name.startswith("gpt") else "Anthropic"
        model: dict[str, Any] = {"id": name, "name": name, "object": "model", "version": name}
        model |= {"vendor": vendor, "preview": False, "model_picker_enabled": True}
        model["capabilities"] = capabilities | {"family": name, "supports": supports}
        if endpoints is not None:
            model["supported_endpoints"] = endpoints
        data.append(model)
    return compact({"object": "list", "data": data})


class Upstream:
    """The server: what all connections share, most of it rendered once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.port = 0
        self.streams: dict[tuple[bytes, bytes], tuple[Script, Frames, Rendered | None]] = {}
        self.wholes: dict[tuple[bytes, bytes], bytes] = {}

    def stream(self, path: bytes, marker: bytes) -> tuple[Script, Frames, Rendered | None]:
        """Script and frames of a streamed answer, and its bytes when no clock is in them."""
        key = (path, marker)
        if key not in self.streams:
            script = read_script(marker)
            frames = DIALECTS[path](script.shape, script.kind)
            rendered = None if script.pace_s else render(frames, script)
            self.streams[key] = (script, frames, rendered)
        return self.streams[key]

    def whole(self, path: bytes, marker: bytes) -> bytes:
        """Head and body of an answer that is not streamed."""
        key = (path, marker)
        if key not in self.wholes:
            self.wholes[key] = json_answer(whole_answer(path, read_script(marker)))
        return self.wholes[key]

    def plain_answer(self, path: bytes) -> bytes:
        """Answers of the endpoints around the model calls."""
        if path == b"/copilot_internal/v2/token":
            return json_answer(token_answer(self.port))
        if path == b"/models":
            return json_answer(models_answer())
        if path == b"/ListAvailableModels":
            limits = {"maxInputTokens": 1_900_000, "maxOutputTokens": 64_000}
            return json_answer(
                compact({"models": [{"modelId": "claude-kiro", "tokenLimits": limits}]})
            )
        if path == b"/healthz":
            return json_answer(b'{"status":"ok"}')
        return json_answer(b'{"message":"Not Found","status":"404"}', b"404 Not Found")


class Connection(asyncio.Protocol):
    """One client: requests in, answers out, one after the other."""

    def __init__(self, server: Upstream) -> None:
        self.server = server
        self.loop = server.loop
        self.buffer = bytearray()
        #: Bytes of the request that is arriving, head and body; 0 while its head is not whole.
        self.need = 0
        self.answer: Rendered | None = None
        self.frames: Frames | None = None
        self.script = Script()
        #: The next piece (or, when paced, the next delta) of the answer under way.
        self.at = 0
        self.due = 0.0
        self.is_paused = False
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop whatever is being played."""
        self.is_lost = True

    def pause_writing(self) -> None:
        """Wait: the reader is slower than we are."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Go on."""
        self.is_paused = False
        if self.answer is not None:
            self.loop.call_soon(self.write_piece)

    def data_received(self, data: bytes) -> None:
        """Collect a request and serve it when it is whole."""
        self.buffer += data
        if not self.need:
            head_end = self.buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            length = CONTENT_LENGTH.search(self.buffer, 0, head_end)
            self.need = head_end + 4 + (int(length[1]) if length else 0)
        if len(self.buffer) >= self.need:
            request = bytes(self.buffer)
            self.buffer.clear()
            self.need = 0
            self.serve(request)

    def serve(self, request: bytes) -> None:
        """Answer one request."""
        path = request.split(b" ", 2)[1].partition(b"?")[0]
        if path not in DIALECTS:
            self.transport.write(self.server.plain_answer(path))
            return
        start = request.rfind(b"[[")
        marker = request[start : request.find(b"]]", start)] if start >= 0 else b""
        if path == KIRO_PATH or b'"stream":true' in request or b'"stream": true' in request:
            self.start_stream(path, marker)
        else:
            self.transport.write(self.server.whole(path, marker))

    def start_stream(self, path: bytes, marker: bytes) -> None:
        """Write what can be written at once, and arrange for the rest."""
        self.script, self.frames, answer = self.server.stream(path, marker)
        self.at = 0
        if answer is None:
            self.transport.write(self.frames.head + http_chunk(self.frames.opening))
            # On the grid, so that one wake-up of the loop serves many streams.
            self.due = math.ceil(self.loop.time() / GRID_S) * GRID_S
            self.write_delta()
        elif len(answer.pieces) == 1:
            self.transport.write(answer.opening + answer.pieces[0] + answer.closing)
        else:
            self.answer = answer
            self.transport.write(answer.opening)
            self.write_piece()

    def write_piece(self) -> None:
        """Write one piece and let the other streams have their turn."""
        if self.answer is None or self.is_paused or self.is_lost:
            return
        self.transport.write(self.answer.pieces[self.at])
        self.at += 1
        if self.at < len(self.answer.pieces):
            # When that write filled the buffer, `resume_writing` goes on instead.
            if not self.is_paused:
                self.loop.call_soon(self.write_piece)
        else:
            self.transport.write(self.answer.closing)
            self.answer = None

    def write_delta(self) -> None:
        """Write the deltas of one tick, stamped now, and wait for the next tick."""
        if self.frames is None or self.is_lost:
            return
        stop = min(self.at + self.script.batch, self.script.chunks)
        stamp = time.monotonic_ns()
        deltas = [self.frames.delta(k, stamp) for k in range(self.at, stop)]
        self.transport.write(http_chunk(b"".join(deltas)))
        self.at = stop
        self.due += self.script.pace_s
        if self.at < self.script.chunks:
            self.loop.call_at(self.due, self.write_delta)
        else:
            closing = self.frames.closing(self.script.chunks)
            self.loop.call_at(self.due, self.finish, http_chunk(closing) + b"0\r\n\r\n")

    def finish(self, closing: bytes) -> None:
        """End a paced answer."""
        if not self.is_lost:
            self.transport.write(closing)


async def serve() -> None:
    """Listen on a port of the system's choice until stdin ends."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(loop)
    server = await loop.create_server(lambda: Connection(upstream), "127.0.0.1", 0, backlog=2048)
    upstream.port = server.sockets[0].getsockname()[1]
    stdin_ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stdin_ended.set)
    print(f"listening on http://127.0.0.1:{upstream.port}", flush=True)
    await stdin_ended.wait()
    server.close()


if __name__ == "__main__":
    gc.disable()  # nothing here lives long enough to need it, and its pauses would be measured
    asyncio.run(serve())
