"""Nothing that a client sends or an upstream says costs more than linear time, holds the others up
for more than half a second, or takes more than a small multiple of its size in memory.

A shape is a function of a number, and one line in a table.  Each is sent through the real gateway
at its full size; only what takes long there is sent at a quarter of it as well.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_kiro import frame, message
from fakes import default_models, sse
from support import Gateway, Reply

Json = dict[str, Any]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
#: who answers in which dialect
MODELS = {
    "chat": "copilot/gpt-4.1",
    "messages": "copilot/claude-haiku-4.6",
    "responses": "copilot/gpt-5.3-codex",
    "kiro": "kiro/claude-sonnet-4.5",
}
GROWTH = 2.6  # of CPU per doubling: 2 is linear, 4 quadratic
NOISE_FLOOR_S = 0.1  # CPU; what takes less at its full size is not compared
BLOCKED_S = 0.5  # the longest wait of anybody else
TRIES = 3  # what is too slow is too slow each time
MEMORY_FACTOR = 12  # of a body's size
MEMORY_FLOOR = 48 << 20  # bytes; CPython keeps arenas
IN_PROC = Path("/proc/self/clear_refs").exists()


# ---- the upstream --------------------------------------------------------------------------------


def reply(body: bytes, kind: str = "application/json", status: int = 200) -> bytes:
    """A whole HTTP response."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream(body: bytes, kind: str = "text/event-stream") -> bytes:
    """A stream, whose frames come as fast as they are read."""
    return reply(body, kind)


CHAT_STREAM = sse(
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "ok"}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}},
)


def named(*frames: Json) -> bytes:
    """Events that carry their type as a name."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (f["type"].encode(), dump(f)) for f in frames)


def dump(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


USAGE: Json = {"input_tokens": 1, "output_tokens": 1}


def messages_stream(*blocks: tuple[Json, list[Json]]) -> bytes:
    """An Anthropic stream of (block, deltas)."""
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": []}
    frames: list[Json] = [{"type": "message_start", "message": {**message, "usage": USAGE}}]
    for index, (block, deltas) in enumerate(blocks):
        frames.append({"type": "content_block_start", "index": index, "content_block": block})
        place = {"type": "content_block_delta", "index": index}
        frames += [{**place, "delta": delta} for delta in deltas]
        frames.append({"type": "content_block_stop", "index": index})
    frames.append({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE})
    return named(*frames, {"type": "message_stop"})


def response_stream(*items: tuple[Json, list[Json]], last: Json | None = None) -> bytes:
    """A stream of OpenAI responses of (item, its frames)."""
    response: Json = {"id": "r", "object": "response", "model": "m", "output": []}
    frames: list[Json] = [{"type": "response.created", "response": {**response}}]
    for index, (item, inner) in enumerate(items):
        place = {"output_index": index}
        frames.append({"type": "response.output_item.added", **place, "item": item})
        frames += [{**place, "item_id": item["id"], **frame} for frame in inner]
        frames.append({"type": "response.output_item.done", **place, "item": item})
        response["output"].append(item)
    usage = {**USAGE, "total_tokens": 2}
    done = {"type": "response.completed", "response": {**response, "usage": usage, **(last or {})}}
    return named(*frames, done)


def kiro_stream(*payloads: tuple[str, Json]) -> bytes:
    """Kiro's events."""
    counted = {"uncachedInputTokens": 1, "outputTokens": 1}
    last = ("metadataEvent", {"stopReason": "END_TURN", "tokenUsage": counted})
    return b"".join(frame(kind, payload) for kind, payload in (*payloads, last))


KIRO_KIND = "application/vnd.amazon.eventstream"
TEXT_ITEM: Json = {
    "id": "i", "type": "message", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "ok", "annotations": []}],
}  # fmt: skip
ANSWERS = {
    "/chat/completions": stream(CHAT_STREAM),
    "/v1/messages": stream(
        messages_stream(({"type": "text", "text": ""}, [{"type": "text_delta", "text": "ok"}]))
    ),
    "/responses": stream(response_stream((TEXT_ITEM, []))),
    "/generateAssistantResponse": stream(
        kiro_stream(("assistantResponseEvent", {"content": "ok"})), KIRO_KIND
    ),
}


class Upstream:
    """GitHub, Copilot and Kiro: reads a request to its end and answers from a table."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answers = dict(ANSWERS)
        models = default_models()
        haiku = next(model for model in models if model.get("id") == "claude-haiku-4.5")
        models.append({**haiku, "id": "claude-haiku-4.6", "supported_endpoints": [MESSAGES]})
        for model in models:
            for name in ("max_context_window_tokens", "max_prompt_tokens"):
                model.get("capabilities", {}).get("limits", {})[name] = 10**9
        limits = {"maxInputTokens": 10**9, "maxOutputTokens": 64_000}
        listed = [
            {"modelId": "claude-sonnet-4.5", "tokenLimits": limits},
            {"modelId": "claude-opus-4.6", "tokenLimits": {**limits, "maxInputTokens": 10**6}},
        ]
        exchange = {"token": "tid=1;exp=2", "expires_at": int(time.time()) + 1800,
                    "refresh_in": 1500, "endpoints": {"api": self.url}}  # fmt: skip
        self.answers["/copilot_internal/v2/token"] = reply(dump(exchange))
        self.answers["/models"] = reply(dump({"data": models}))
        self.answers["/ListAvailableModels"] = reply(dump({"models": listed}))
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self) -> None:
        """Listens no longer."""
        self.listener.close()

    def accept(self) -> None:
        """A thread for each connection."""
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def serve(self, peer: socket.socket) -> None:
        """Requests on one connection, one after the other."""
        with peer, peer.makefile("rb", buffering=1 << 20) as lines:
            while True:
                try:
                    line = lines.readline()
                    length = 0
                    while (field_line := lines.readline()) not in (b"\r\n", b""):
                        name, _, value = field_line.partition(b":")
                        length = int(value) if name.lower() == b"content-length" else length
                    while length:
                        length -= len(lines.read(min(length, 1 << 20)))
                    if not line:
                        return
                    path = line.split()[1].decode().partition("?")[0]
                    peer.sendall(self.answers.get(path, reply(b"{}", status=404)))
                except OSError:
                    return  # the gateway went away


@dataclass
class Cost:
    """What one request took."""

    reply: Reply
    cpu_s: float
    #: the most that the gateway computed while one health check waited
    waited_s: float
    #: bytes more than before, at the worst moment
    memory: int


@dataclass
class Rig:
    """A gateway, its upstream, and who watches both."""

    gateway: Gateway
    upstream: Upstream
    waits: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Asks for the health, again and again.

        A wait is what the gateway computed meanwhile: other programs may keep it from its core.
        """
        while not self.ended.is_set():
            begun, computed = time.monotonic(), self.cpu_s()
            with self.gateway.wire() as wire:
                wire.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                wire.reply(seconds=300)
            self.waits.append(min(time.monotonic() - begun, self.cpu_s() - computed))
            self.ended.wait(0.01)

    def proc(self, name: str) -> str:
        """A file of /proc about the gateway."""
        return Path(f"/proc/{self.gateway.pid}/{name}").read_text()

    def cpu_s(self) -> float:
        """Seconds that all threads of the gateway have computed."""
        tasks = Path(f"/proc/{self.gateway.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory(self, name: str) -> int:
        """VmRSS or VmHWM in bytes."""
        rows = self.proc("status").splitlines()
        return next(int(row.split()[1]) << 10 for row in rows if row.startswith(name))

    def post(self, path: str, body: bytes) -> Cost:
        """One request, while another client asks for the health."""
        Path(f"/proc/{self.gateway.pid}/clear_refs").write_text("5")
        memory, cpu_s = self.memory("VmRSS"), self.cpu_s()
        self.waits.clear()
        reply = self.gateway.request("POST", path, body, seconds=300)
        cpu_s = self.cpu_s() - cpu_s
        seen = len(self.waits)
        while len(self.waits) < seen + 2:  # the one that waited meanwhile has come back too
            time.sleep(0.005)
        return Cost(reply, cpu_s, max(self.waits), self.memory("VmHWM") - memory)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One for all shapes."""
    with ExitStack() as stack:
        upstream = Upstream()
        stack.callback(upstream.close)
        config = f"""
            [providers.copilot]
            type = "copilot"
            github_url = "{upstream.url}"
            github_api_url = "{upstream.url}"
            [providers.kiro]
            type = "kiro"
            api_url = "{upstream.url}"
            auth_url = "{upstream.url}"
            management_url = "{upstream.url}"
            [limits]
            runaway_requests = 0
            """
        soon = int(time.time()) + 3600
        tokens: dict[str, Json] = {
            "copilot": {"type": "copilot", "github_token": "ghu_" + "x" * 36},
            "kiro": {"type": "kiro", "auth_method": "google", "access_token": "aoaEXAMPLE",
                     "refresh_token": "aorEXAMPLE", "expires_at": soon, "region": "us-east-1",
                     "profile_arn": "arn:aws:codewhisperer:us-east-1:123456789012:profile/EXAMPLE"},
        }  # fmt: skip
        gateway = stack.enter_context(Gateway(config=config, tokens=tokens))
        made = Rig(gateway, upstream)
        watcher = threading.Thread(target=made.watch)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(made.ended.set)
        yield made
        assert "Traceback" not in gateway.log(), gateway.log()[-4000:]


def check(
    rig: Rig,
    path: str,
    make: Callable[[int], bytes],
    most: int,
    size: Callable[[], int] = lambda: 0,
) -> Cost:
    """Sends a shape at `most`; where that takes long, at a quarter of it too.

    `size` is that of the response where it is the larger one.
    """
    body = make(most)
    cost = rig.post(path, body)
    assert cost.reply.status not in (500, 503), cost.reply
    most_memory = MEMORY_FLOOR + MEMORY_FACTOR * max(len(body), size())
    assert cost.memory < most_memory, (cost.memory >> 20, most_memory >> 20)
    tries = 1
    while cost.waited_s > BLOCKED_S and tries < TRIES:  # others compute on this machine, too
        cost, tries = rig.post(path, body), tries + 1
    assert cost.waited_s < BLOCKED_S, cost.waited_s
    while cost.cpu_s > NOISE_FLOOR_S:
        quarter = rig.post(path, make(most // 4)).cpu_s
        if cost.cpu_s < GROWTH**2 * max(quarter, NOISE_FLOOR_S / 8):
            break
        assert tries < TRIES, (quarter, cost.cpu_s)
        cost, tries = rig.post(path, make(most)), tries + 1
    return cost


# ---- what a client may send ----------------------------------------------------------------------


def chat(**fields: Any) -> Json:
    """A chat body."""
    return {"stream": True, "messages": [{"role": "user", "content": "hi"}], **fields}


def messages(**fields: Any) -> Json:
    """A messages body."""
    return {"max_tokens": 100, **chat(**fields)}


def responses(*items: Json, **fields: Any) -> Json:
    """A responses body."""
    last = {"role": "user", "content": "hi"}
    return {"stream": True, "input": [*items, last], **fields}


def numbered(make: Callable[[int], Any], count: int) -> list[Any]:
    """`make` of every number below `get_int`."""
    return [make(number) for number in range(count)]


def twice(make: Callable[[int], tuple[Any, Any]], count: int) -> list[Any]:
    """The pairs of every number below `get_int`, one after the other."""
    return [row for number in range(count) for row in make(number)]


SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "string"}}}
OK = [{"role": "user", "content": "hi"}]


def chat_calls(count: int, same: bool = False) -> Json:
    """Parallel calls and their results."""
    ids = ["c" if same else f"c{number}" for number in range(count)]
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for i in ids]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": i, "content": "r"} for i in reversed(ids)]
    return chat(messages=[*OK, {"role": "assistant", "tool_calls": calls}, *results, *OK])


def message_calls(count: int, same: bool = False) -> Json:
    """Parallel calls and their results."""
    ids = ["c" if same else f"c{number}" for number in range(count)]
    calls = [{"type": "tool_use", "id": i, "name": f"f{i}", "input": {}} for i in ids]
    results = [{"type": "tool_result", "tool_use_id": i, "content": "r"} for i in reversed(ids)]
    turns = [{"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    return messages(messages=[*OK, *turns])


def response_calls(count: int, same: bool = False) -> Json:
    """Calls first, then their results."""
    ids = ["c" if same else f"c{number}" for number in range(count)]
    calls = [{"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in ids]
    results = [{"type": "function_call_output", "call_id": i, "output": "r"} for i in reversed(ids)]
    return responses(*calls, *results)


def user(content: str) -> list[Json]:
    """One turn."""
    return [{"role": "user", "content": content}]


def user_and_assistant(number: int) -> tuple[Json, Json]:
    """Two turns."""
    said = {"role": "assistant", "content": f"a{number}"}
    return {"role": "user", "content": f"u{number}"}, said


def text(number: int) -> Json:
    """A text part."""
    return {"type": "text", "text": f"t{number}"}


def chat_tool(number: int) -> Json:
    """A function, one of a few names."""
    return {"type": "function", "function": {"name": f"f{number}", "parameters": SCHEMA}}


def message_tool(number: int) -> Json:
    """A function."""
    return {"name": f"f{number}", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}


def response_tool(number: int) -> Json:
    """A function."""
    return {"type": "function", "name": f"f{number}", "parameters": SCHEMA}


REFS = {"type": "object", "$defs": {"a": SCHEMA}}


def one_call(arguments: str) -> Json:
    """A conversation with one call."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": "r"}
    return chat(messages=[*OK, {"role": "assistant", "tool_calls": [call]}, result])


def definitions(count: int, words: int = 0) -> Json:
    """A tool whose definitions name one another twice each, the last one with a description."""
    deeper = {f"d{i}": {"properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "lr"}}
              for i in range(count)}  # fmt: skip
    named = {**deeper, f"d{count}": {"type": "object", "description": "a" * words}}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": named}
    return chat(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])


def picture(url: str) -> Json:
    """A question about a picture."""
    part = {"type": "image_url", "image_url": {"url": url}}
    return chat(messages=[{"role": "user", "content": [part]}])


def packed(count: int) -> Json:
    """Reasoning that claims to be ours."""
    text = base64.urlsafe_b64encode(b'{"a":[' + b"{}," * count + b"1]}").decode()
    return responses({"type": "reasoning", "id": "r", "encrypted_content": f"gw1.a.{text}"})


#: (name, path, body of a number, that number at full size)
CLIENT_SHAPES: list[tuple[str, str, Callable[[int], Json], int]] = [
    ("turns", CHAT, lambda n: chat(messages=twice(user_and_assistant, n) + OK), 4000),
    ("system", CHAT, lambda n: chat(messages=[{"role": "system", "content": "s"}] * n + OK), 8000),
    ("parts", CHAT, lambda n: chat(messages=[{"role": "user", "content": numbered(text, n)}]),
     8000),
    ("calls", CHAT, chat_calls, 4000),
    ("calls of one id", CHAT, lambda n: chat_calls(n, same=True), 4000),
    ("tools", CHAT, lambda n: chat(tools=numbered(chat_tool, n)), 4000),
    ("tools of one name", CHAT, lambda n: chat(tools=[chat_tool(0)] * n), 4000),
    ("functions", CHAT, lambda n: chat(functions=[{"name": f"f{i}"} for i in range(n)]), 4000),
    ("schema", CHAT, lambda n: chat(tools=[{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": {
            f"p{i}": {"$ref": "#/$defs/a"} for i in range(n)}, "$defs": {"a": SCHEMA}}}}]), 4000),
    ("one of many", CHAT, lambda n: chat(tools=[{"type": "function", "function": {
        "name": "f", "parameters": {"anyOf": [SCHEMA] * n}}}]), 4000),
    ("arguments", CHAT, lambda n: one_call(json.dumps({"a": "x\n" * n})), 1_000_000),
    ("broken arguments", CHAT, lambda n: one_call('{"a":"' + "\\n" * n), 1_000_000),
    ("dense arguments", CHAT, lambda n: one_call('{"a":[' + "{}," * n + "1]}"), 5_000_000),
    ("long text", CHAT, lambda n: chat(messages=[{"role": "user", "content": "a, b\n" * n}]),
     1_000_000),
    ("halves", CHAT, lambda n: chat(messages=user("\ud800a" * n)), 4_000_000),
    ("definitions", CHAT, definitions, 4000),
    ("a long definition", CHAT, lambda n: definitions(20, n), 1_000_000),
    ("no data URL", CHAT, lambda n: picture("data:" + ";a" * n), 8_000_000),
    ("escaped data URL", CHAT, lambda n: picture("data:image/png," + "%41" * n), 8_000_000),
    ("wrapped data URL", CHAT, lambda n: picture("data:image/png;base64,iVBORw0KGgo" + "A\n" * n),
     8_000_000),
    ("stops", CHAT, lambda n: chat(stop=["s"] * n), 50_000),
    ("bias", CHAT, lambda n: chat(logit_bias={str(i): 1 for i in range(n)}), 50_000),
    ("metadata", CHAT, lambda n: chat(metadata={str(i): "x" for i in range(n)}), 50_000),
    ("unknown part", CHAT, lambda n: chat(
        messages=[{"role": "user", "content": [{"type": f"t{i}"} for i in range(n)]}]), 4000),
    ("allowed tools", CHAT, lambda n: chat(tools=[chat_tool(0)], tool_choice={
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": numbered(chat_tool, n)},
    }), 4000),
    ("turns", MESSAGES, lambda n: messages(messages=twice(user_and_assistant, n) + OK), 4000),
    ("equal turns", MESSAGES, lambda n: messages(messages=OK * n), 8000),
    ("parts", MESSAGES,
     lambda n: messages(messages=[{"role": "user", "content": numbered(text, n)}]), 8000),
    ("system", MESSAGES, lambda n: messages(system=numbered(text, n)), 8000),
    ("calls", MESSAGES, message_calls, 4000),
    ("calls of one id", MESSAGES, lambda n: message_calls(n, same=True), 4000),
    ("results without calls", MESSAGES, lambda n: messages(messages=[{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": f"c{i}", "content": "r"} for i in range(n)]}]),
     4000),
    ("result of many parts", MESSAGES, lambda n: messages(messages=[
        *OK, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": numbered(text, n)}]}]), 8000),
    ("input", MESSAGES, lambda n: messages(messages=[
        *OK, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": [1] * n}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": "r"}]}]), 50_000),
    ("thinking", MESSAGES, lambda n: messages(messages=[
        *OK, {"role": "assistant", "content": [
            *[{"type": "thinking", "thinking": f"t{i}", "signature": "s"} for i in range(n)],
            text(0)]}, *OK]), 4000),
    ("tools", MESSAGES, lambda n: messages(tools=numbered(message_tool, n)), 4000),
    ("documents", MESSAGES, lambda n: messages(messages=[{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}}
        for _ in range(n)]}]), 4000),
    ("long text", MESSAGES, lambda n: messages(messages=[{"role": "user", "content": "ä\n" * n}]),
     1_000_000),
    ("long system", MESSAGES, lambda n: messages(system="x-anthropic-billing-header: " * n),
     100_000),
    ("metadata", MESSAGES, lambda n: messages(metadata={"user_id": '{"a":' * n}), 100_000),
    ("user id", MESSAGES, lambda n: messages(metadata={"user_id": '{"a":[' + "{}," * n + "1]}"}),
     5_000_000),
    ("long user id", MESSAGES, lambda n: messages(metadata={"user_id": "a" * n}), 20_000_000),
    ("numbers", MESSAGES, lambda n: messages(tools=[
        {"name": "f", "input_schema": {"type": "object", "enum": [10**4000] * n}}]), 1000),
    ("items", RESPONSES, lambda n: responses(*twice(user_and_assistant, n)), 4000),
    ("parts", RESPONSES, lambda n: responses({"role": "user", "content": [
        {"type": "input_text", "text": f"t{i}"} for i in range(n)]}), 8000),
    ("calls", RESPONSES, response_calls, 4000),
    ("calls of one id", RESPONSES, lambda n: response_calls(n, same=True), 4000),
    ("tools", RESPONSES, lambda n: responses(tools=numbered(response_tool, n)), 4000),
    ("namespaces", RESPONSES, lambda n: responses(tools=[
        {"type": "namespace", "name": f"n{i}", "tools": [response_tool(0)]} for i in range(n)]),
     2000),
    ("reasoning", RESPONSES, lambda n: responses(*[
        {"type": "reasoning", "id": f"rs_{i}", "summary": [], "encrypted_content": "e"}
        for i in range(n)]), 4000),
    ("packed reasoning", RESPONSES, packed, 5_000_000),
    ("unknown items", RESPONSES, lambda n: responses(*[{"type": f"t{i}"} for i in range(n)]), 4000),
    ("custom calls", RESPONSES, lambda n: responses(*twice(lambda i: (
        {"type": "custom_tool_call", "call_id": f"c{i}", "name": "p", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": f"c{i}", "output": "r"}), n),
        tools=[{"type": "custom", "name": "p"}]), 2000),
    ("instructions", RESPONSES, lambda n: responses(instructions="You are, so to say, { } " * n),
     50_000),
]  # fmt: skip


def text_of(words: str) -> Callable[[int], str]:
    """So many MiB of `words`."""
    return lambda size: words * ((size << 20) // len(json.dumps(words)[1:-1]))


#: as many values and bytes as the limits allow, whole
LARGE_SHAPES: list[tuple[str, str, Callable[[int], Json], int]] = [
    ("turns", CHAT, lambda n: chat(messages=twice(user_and_assistant, n) + OK), 10_500),
    ("parts", CHAT, lambda n: chat(messages=[{"role": "user", "content": numbered(text, n)}]),
     39_000),
    ("calls", CHAT, chat_calls, 9_000),
    ("tools", CHAT, lambda n: chat(tools=numbered(chat_tool, n)), 10_000),
    ("text", CHAT, lambda n: chat(messages=user(text_of("a")(n))), 31),
    ("lines", CHAT, lambda n: chat(messages=user(text_of("a, [\n")(n))), 31),
    ("escapes", CHAT, lambda n: chat(messages=user(text_of('\\"')(n))), 31),
    ("turns", MESSAGES, lambda n: messages(messages=twice(user_and_assistant, n) + OK), 10_500),
    ("parts", MESSAGES,
     lambda n: messages(messages=[{"role": "user", "content": numbered(text, n)}]), 39_000),
    ("calls", MESSAGES, message_calls, 9_000),
    ("text", MESSAGES, lambda n: messages(messages=user(text_of("a")(n))), 31),
    ("lines", MESSAGES, lambda n: messages(messages=user(text_of("a, [\n")(n))), 31),
    ("turns", RESPONSES, lambda n: responses(*twice(user_and_assistant, n)), 10_500),
    ("calls", RESPONSES, response_calls, 9_000),
    ("text", RESPONSES, lambda n: responses(*user(text_of("a")(n))), 31),
    ("lines", RESPONSES, lambda n: responses(*user(text_of("a, [\n")(n))), 31),
]  # fmt: skip


def names_of(shapes: list[Any]) -> list[str]:
    """What the cases are called."""
    return [f"{row[1].rpartition('/')[2]}-{row[0]}".replace(" ", "_") for row in shapes]


NATIVE = {CHAT: "chat", MESSAGES: "messages", RESPONSES: "responses"}
#: shapes on which each upstream's writer works, not the reader alone
WRITTEN = {"turns", "parts", "calls", "calls of one id", "tools"}


def asked_of(shapes: list[Any], every: set[str]) -> list[Any]:
    """Each shape with whom it is sent to: all for the names of `every`, else two.

    One of the two is its own upstream, which is sent little else than what came; the other is
    Kiro, whose form is further from every dialect than they are from each other.
    """
    return [
        pytest.param(*row, spoken, id=f"{name}-{spoken}")
        for name, row in zip(names_of(shapes), shapes)
        for spoken in (MODELS if row[0] in every else (NATIVE[row[1]], "kiro"))
    ]


READS_PROC = pytest.mark.skipif(not IN_PROC, reason="CPU and memory are read from /proc")


@READS_PROC
@pytest.mark.parametrize(
    ("name", "path", "make", "most", "spoken"), asked_of(CLIENT_SHAPES, WRITTEN)
)
def test_a_request_costs_what_its_size_does(
    rig: Rig, name: str, path: str, make: Callable[[int], Json], most: int, spoken: str
) -> None:
    """Native and converted, to each upstream."""
    check(rig, path, lambda n: dump({**make(n), "model": MODELS[spoken]}), most)


@READS_PROC
@pytest.mark.parametrize(("name", "path", "make", "most"), LARGE_SHAPES, ids=names_of(LARGE_SHAPES))
def test_the_largest_request_holds_nobody_up(
    rig: Rig, name: str, path: str, make: Callable[[int], Json], most: int
) -> None:
    """It is answered, and others are meanwhile; Kiro is sent nothing as it came."""
    cost = check(rig, path, lambda n: dump({**make(n), "model": MODELS["kiro"]}), most)
    assert cost.reply.status == 200


@READS_PROC
@pytest.mark.parametrize(
    "words", ["a", "[", "a, [\n", '\\"'], ids=["a", "bracket", "lines", "quotes"]
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES], ids=["chat", "messages"])
def test_a_text_far_above_the_window_holds_nobody_up(rig: Rig, path: str, words: str) -> None:
    """Whether Kiro would take it is found out from a part of it."""

    def make(size: int) -> bytes:
        body = chat(messages=user(text_of(words)(size)), model="kiro/claude-opus-4.6")
        return dump({**body, "max_tokens": 100})

    assert check(rig, path, make, 31).reply.status in (200, 400)


#: (name, what stands in a body, that number): never JSON that is served
BROKEN_SHAPES: list[tuple[str, Callable[[int], bytes], int]] = [
    ("keys", lambda n: b"{%b}" % b",".join(b'"k%d":1' % i for i in range(n)), 400_000),
    ("long keys", lambda n: b"{%b}" % b",".join(b'"k%d":1' % i + b" " * 99 for i in range(n)), 900),
    ("lists", lambda n: b'{"a":[' + b"[" * 90 * n, 30_000),
    ("deep lists", lambda n: b'{"a":[' + (b"[" * 90 + b"]" * 90 + b",") * n + b"1]}", 30_000),
    ("objects", lambda n: b'{"a":[' + b"{}," * n + b"1]}", 5_000_000),
    ("strings", lambda n: b'{"a":[' + b'"",' * n + b"1]}", 5_000_000),
    ("quotes", lambda n: b'{"a":"' + b'\\",' * n, 4_000_000),
    ("backslashes", lambda n: b'{"a":"' + b"\\" * n, 16_000_000),
    ("blanks", lambda n: b'{"a"' + b" " * n, 16_000_000),
    ("digits", lambda n: b'{"a":' + b"1" * n + b"}", 16_000_000),
    ("halves", lambda n: b'{"a":"' + b"\\ud800" * n + b'"}', 4_000_000),
    ("no text", lambda n: b"\xff" * n, 16_000_000),
]


def test_requests_that_are_sent_ahead_wait_for_those_of_others(rig: Rig) -> None:
    """Thousands on one connection, each answered at once, are not answered in one go."""
    count = 1000
    head = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with rig.gateway.wire() as wire:
        rig.waits.clear()
        wire.send(head * count)
        for _ in range(count):
            assert wire.reply().status == 200
    assert len(rig.waits) > 5
    assert max(rig.waits) < BLOCKED_S


@READS_PROC
@pytest.mark.parametrize(("name", "make", "most"), BROKEN_SHAPES, ids=[r[0] for r in BROKEN_SHAPES])
def test_a_body_that_is_refused_costs_little(
    rig: Rig, name: str, make: Callable[[int], bytes], most: int
) -> None:
    """Bounds come before work, and before any dialect."""
    cost = check(rig, CHAT, make, most)
    assert cost.reply.status in (400, 413), cost.reply


# ---- what an upstream may send -------------------------------------------------------------------


def chat_deltas(*deltas: Json, finish: str = "stop") -> bytes:
    """A chat stream of these deltas."""
    frames: list[Json] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return sse(*frames, {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})


def call_delta(index: int, arguments: str, **more: Any) -> Json:
    """A piece of a call."""
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments, **more}}]}


def calls_of(count: int) -> list[Json]:
    """The beginnings of calls, each with its name and its arguments."""
    return [
        {"tool_calls": [{"index": i, "id": f"c{i}", "type": "function",
                         "function": {"name": "f", "arguments": "{}"}}]}
        for i in range(count)
    ]  # fmt: skip


def text_block(*texts: str) -> tuple[Json, list[Json]]:
    """A block of Anthropic's and its deltas."""
    return {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in texts]


def call_block(number: int, *pieces: str) -> tuple[Json, list[Json]]:
    """A call and its pieces."""
    block = {"type": "tool_use", "id": f"toolu_{number}", "name": "f", "input": {}}
    return block, [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]


def call_item(number: int, *pieces: str) -> tuple[Json, list[Json]]:
    """A call of the responses API, its deltas and its end."""
    item = {"id": f"fc_{number}", "type": "function_call", "call_id": f"c{number}", "name": "f",
            "arguments": "".join(pieces), "status": "completed"}  # fmt: skip
    kind = "response.function_call_arguments"
    frames = [{"type": f"{kind}.delta", "delta": piece} for piece in pieces]
    return item, [*frames, {"type": f"{kind}.done", "arguments": item["arguments"]}]


def text_item(*texts: str) -> tuple[Json, list[Json]]:
    """A message of the responses API and its deltas."""
    frames = [
        {"type": "response.output_text.delta", "content_index": 0, "delta": text} for text in texts
    ]
    part = {"type": "output_text", "text": "".join(texts), "annotations": []}
    return {**TEXT_ITEM, "content": [part]}, frames


def error_in(dialect: str) -> Callable[[int], bytes]:
    """A stream that ends with an error whose message is hard to search."""
    words = "eyJaaaa.token Bearer\\t "
    return {
        "chat": lambda n: sse({"error": {"message": words * n, "code": "x"}}),
        "messages": lambda n: named(
            {"type": "error", "error": {"type": "api_error", "message": words * n}}
        ),
        "responses": lambda n: named({"type": "error", "code": "x", "message": words * n}),
    }[dialect]


def dense(before: bytes, count: int) -> bytes:
    """One event of so many values, where each dialect has some."""
    rows = b"[%b1]" % (b"{}," * count)
    return b'%b{"content":"x","choices":%b,"response":{"output":%b}}\n\n' % (before, rows, rows)


TOOL_USE = {"toolUseId": "t", "name": "f"}
#: (name, the path upstream, response of a number, that number)
UPSTREAM_SHAPES: list[tuple[str, str, Callable[[int], bytes], int]] = [
    ("text", "chat", lambda n: stream(chat_deltas(*[{"content": "a b"}] * n)), 4_000),
    ("one frame", "chat", lambda n: stream(chat_deltas({"content": "a, b\n" * n})), 1_000_000),
    ("thinking", "chat", lambda n: stream(chat_deltas(*[{"reasoning_text": "a"}] * n)), 4_000),
    ("arguments", "chat", lambda n: stream(chat_deltas(
        *calls_of(1), *[call_delta(0, '"a b"')] * n)), 4_000),
    ("calls", "chat", lambda n: stream(chat_deltas(*calls_of(n), finish="tool_calls")), 2_000),
    ("calls by turns", "chat", lambda n: stream(chat_deltas(
        *calls_of(2), *[call_delta(0, "}a"), call_delta(1, "}b")] * n)), 2_000),
    ("blanks", "chat", lambda n: stream(chat_deltas(
        *calls_of(1), *[call_delta(0, " ")] * n)), 4_000),
    ("choices", "chat", lambda n: stream(sse({"choices": [
        {"index": i, "delta": {"content": "a"}} for i in range(n)]})), 4_000),
    ("keys", "chat", lambda n: stream(sse({f"k{i}": 1 for i in range(n)})), 50_000),
    ("comments", "chat", lambda n: stream(b": x\n\n" * n + CHAT_STREAM), 100_000),
    ("lines", "chat", lambda n: stream(b"data: x\n" * n + b"\n" + CHAT_STREAM), 100_000),
    ("returns", "chat", lambda n: stream(b"\r" * n + CHAT_STREAM), 1_000_000),
    ("error", "chat", lambda n: stream(error_in("chat")(n)), 50_000),
    ("refusal", "chat", lambda n: reply(dump({"error": {"message": "try again in 1 s " * n}}),
                                        status=400), 50_000),
    ("no JSON", "chat", lambda n: reply(b"token eyJa " * n, "text/plain", 400), 50_000),
    ("text", "messages", lambda n: stream(messages_stream(text_block(*["a b"] * n))), 4_000),
    ("blocks", "messages", lambda n: stream(messages_stream(*[text_block("a")] * n)), 2_000),
    ("calls", "messages", lambda n: stream(messages_stream(
        *[call_block(i, "{}") for i in range(n)])), 2_000),
    ("arguments", "messages", lambda n: stream(messages_stream(call_block(0, *['"a"'] * n))),
     4_000),
    ("error", "messages", lambda n: stream(error_in("messages")(n)), 50_000),
    ("text", "responses", lambda n: stream(response_stream(text_item(*["a b"] * n))), 4_000),
    ("items", "responses", lambda n: stream(response_stream(*[text_item("a")] * n)), 2_000),
    ("calls", "responses", lambda n: stream(response_stream(
        *[call_item(i, "{}") for i in range(n)])), 2_000),
    ("arguments", "responses", lambda n: stream(response_stream(
        call_item(0, *['"a"'] * n))), 4_000),
    ("error", "responses", lambda n: stream(error_in("responses")(n)), 50_000),
    ("text", "kiro", lambda n: stream(kiro_stream(
        *[("assistantResponseEvent", {"content": "a < b"})] * n), KIRO_KIND), 4_000),
    ("arguments", "kiro", lambda n: stream(kiro_stream(
        *[("toolUseEvent", {**TOOL_USE, "input": '"a"'})] * n), KIRO_KIND), 4_000),
    ("calls", "kiro", lambda n: stream(kiro_stream(*[
        ("toolUseEvent", {"toolUseId": f"t{i}", "name": "f", "input": "{}", "stop": True})
        for i in range(n)]), KIRO_KIND), 2_000),
    ("meters", "kiro", lambda n: stream(kiro_stream(
        *[("meteringEvent", {"usage": 1e300})] * n), KIRO_KIND), 4_000),
    ("no words", "kiro", lambda n: stream(kiro_stream(
        *[("newEvent", {"x": "y" * 1000})] * n), KIRO_KIND), 20_000),
    ("values", "chat", lambda n: stream(dense(b"data: ", n)), 4_000_000),
    ("values, whole", "chat", lambda n: reply(dense(b"", n)), 4_000_000),
    ("values", "messages", lambda n: stream(dense(b"event: message_start\ndata: ", n)), 4_000_000),
    ("values", "responses", lambda n: stream(dense(b"event: response.created\ndata: ", n)),
     4_000_000),
    ("values", "kiro", lambda n: stream(message(
        {":message-type": "event", ":event-type": "assistantResponseEvent"}, dense(b"", n).strip()
    ), KIRO_KIND), 4_000_000),
    ("refusal", "kiro", lambda n: reply(dump({"message": "Throttling again in 1 s " * n}),
                                        status=400), 50_000),
]  # fmt: skip
UPSTREAM_PATHS = {
    "chat": "/chat/completions",
    "messages": "/v1/messages",
    "responses": "/responses",
    "kiro": "/generateAssistantResponse",
}
ASKED = {CHAT: chat(), MESSAGES: messages(), RESPONSES: responses()}


#: who speaks what upstream is converted for, and the shapes that each writer and buffer works on
FOREIGN = {"chat": MESSAGES, "messages": RESPONSES, "responses": CHAT, "kiro": MESSAGES}
HEARD = {
    ("text", "kiro"), ("calls", "kiro"), ("calls by turns", "chat"), ("items", "responses"),
}  # fmt: skip


def asked_for() -> list[Any]:
    """Each shape with who asks and how: everybody for HEARD, else two.

    One has it relayed as a stream, the other has it converted and buffered.
    """
    cases = []
    for row in UPSTREAM_SHAPES:
        name, spoken = row[:2]
        native = next((path for path in NATIVE if NATIVE[path] == spoken), CHAT)
        asked = [(native, True), (FOREIGN[spoken], False)]
        if (name, spoken) in HEARD:
            asked = [(path, streamed) for path in ASKED for streamed in (True, False)]
        cases += [(*row, path, streamed) for path, streamed in asked]
    return cases


@READS_PROC
@pytest.mark.parametrize(("name", "spoken", "make", "most", "path", "streamed"), asked_for())
def test_a_response_costs_what_its_size_does(
    rig: Rig, path: str, streamed: bool, name: str, spoken: str, make: Callable[[int], bytes],
    most: int,
) -> None:  # fmt: skip
    """Relayed and converted, to each client, whole and as a stream."""
    body = dump({**ASKED[path], "model": MODELS[spoken], "stream": streamed})
    size = 0

    def play(count: int) -> bytes:
        nonlocal size
        rig.upstream.answers[UPSTREAM_PATHS[spoken]] = make(count)
        size = size or len(make(count))
        return body

    try:
        check(rig, path, play, most, lambda: size)
    finally:
        rig.upstream.answers.update(ANSWERS)
