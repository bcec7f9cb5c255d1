"""Copilot from end to end: the real program between a client and the strict imitation."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    Answer,
    Brain,
    Call,
    FakeCopilot,
    Part,
    Say,
    Seen,
    Think,
    chunk,
    copilot_usage,
    default_brain,
    default_models,
    drip,
    dump,
    events,
    sse,
    tool_results,
    usage_of,
)
from support import Gateway, Reply, Wire

import aiclient_api as gw

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
BOTH = pytest.mark.parametrize("path", [CHAT, MESSAGES], ids=["chat", "messages"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PNG = "iVBORw0KGgo="

SONNET = "claude-sonnet-4.5"
OPUS = "claude-opus-4.8"
GPT = "gpt-4.1"
GEMINI = "gemini-3.1-pro-preview"
#: Speaks the messages dialect only, so that chat callers need a conversion.
ONLY_MESSAGES = "claude-haiku-4.6"
#: (path, model): native and converted, both ways
WAYS = [(CHAT, GPT), (CHAT, SONNET), (CHAT, GEMINI), (CHAT, ONLY_MESSAGES),
        (MESSAGES, SONNET), (MESSAGES, OPUS), (MESSAGES, GPT), (MESSAGES, GEMINI)]  # fmt: skip
EVERY_WAY = pytest.mark.parametrize(("path", "model"), WAYS)


# ---- the two programs ----------------------------------------------------------------------------


def models() -> list[Json]:
    """The imitation's list, and one model that it does not have."""
    haiku = next(m for m in default_models() if m.get("id") == "claude-haiku-4.5")
    return [*default_models(), {**haiku, "id": ONLY_MESSAGES, "supported_endpoints": [MESSAGES]}]


@dataclass
class Pair:
    """A gateway that is signed in to an imitation of Copilot."""

    fake: FakeCopilot
    gateway: Gateway

    def post(self, path: str, body: Json | bytes, **headers: str) -> Reply:
        """One request for an answer."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request("POST", path, body, fields)

    def ask(self, path: str, words: Any, model: str = GPT, **more: Any) -> Reply:
        """One request for an answer to `words`."""
        return self.post(path, asking(words, model, **more))

    def send(self, path: str, body: Json) -> Wire:
        """A connection on which a request was sent."""
        wire = self.gateway.wire()
        wire.send(self.gateway.request_bytes("POST", path, body))
        return wire

    def usage(self) -> Json:
        """The total of /v1/usage."""
        total: Json = self.gateway.request("GET", "/v1/usage").json()["total"]
        return total


def start(stack: ExitStack, config: str = "", brain: Brain | None = None) -> Pair:
    """A fresh pair; it ends, and is checked, with the stack."""
    fake = stack.enter_context(FakeCopilot(models(), brain))
    gateway = stack.enter_context(gateway_for(fake, config))
    stack.callback(check_end, gateway)
    return Pair(fake, gateway)


def gateway_for(fake: FakeCopilot, config: str = "", **token: Any) -> Gateway:
    """A gateway whose provider `copilot` is the imitation."""
    copilot = f'[providers.copilot]\ntype = "copilot"\ngithub_url = "{fake.url}"\n'
    saved = {"type": "copilot", "github_token": fake.github_token, "copilot_token": None,
             "expires_at": None, **token}  # fmt: skip
    whole = f'{config}\n{copilot}github_api_url = "{fake.url}"\n'
    return Gateway(config=whole, tokens={"copilot": saved})


def check_end(gateway: Gateway) -> None:
    """The program ends well and never met an exception that it did not expect."""
    status = gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()[-4000:]
    assert "never retrieved" not in gateway.log(), gateway.log()[-4000:]
    assert status == 0


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    """One pair for all tests that leave no trace in it."""
    with ExitStack() as stack:
        yield start(stack)


@pytest.fixture
def pair(running: Pair) -> Iterator[Pair]:
    """The shared pair with empty lists, which must have kept every rule afterwards."""
    fake = running.fake
    for seen in (fake.requests, fake.calls, fake.cancelled, fake.violations):
        seen.clear()
    fake._queue.clear()  # noqa: SLF001 - what a test before did not take
    yield running
    assert fake.violations == []


@pytest.fixture
def limited(pair: Pair) -> Iterator[Pair]:
    """The shared pair for tests that make a model rest."""
    yield pair
    pair.gateway.control("provider.enable", name="copilot")


@pytest.fixture
def fresh() -> Iterator[Pair]:
    """A pair of one's own, which must have kept every rule afterwards."""
    with ExitStack() as stack:
        pair = start(stack)
        yield pair
        assert pair.fake.violations == []


@pytest.fixture(scope="module")
def hasty() -> Iterator[Pair]:
    """A pair with the least patience for its upstream and for its own end."""
    config = "[network]\nstream_idle_seconds = 0.3\nfirst_byte_seconds = 0.3\n"
    with ExitStack() as stack:
        yield start(stack, config)


# ---- requests and answers ------------------------------------------------------------------------


def user(content: Any) -> Json:
    """A user message."""
    return {"role": "user", "content": content}


def asking(words: Any, model: str = GPT, **more: Any) -> Json:
    """A body that both dialects understand."""
    return {"model": model, "max_tokens": 4000, "messages": [user(words)], **more}


def tool(path: str, name: str = "look") -> Json:
    """A tool in the words of an endpoint."""
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    if path == MESSAGES:
        return {"name": name, "description": "Looks.", "input_schema": schema}
    return {"type": "function",
            "function": {"name": name, "description": "Looks.", "parameters": schema}}  # fmt: skip


def image(path: str) -> Json:
    """An image in the words of an endpoint."""
    if path == CHAT:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    return {"type": "image", "source": source}


def frames(body: bytes) -> list[Json]:
    """The data of a stream's events; `[DONE]` becomes an object of that type."""
    rows = [line[5:].strip() for line in body.decode().split("\n") if line.startswith("data:")]
    return [{"type": row} if row == "[DONE]" else json.loads(row) for row in rows]


@dataclass
class Heard:
    """An answer of either dialect, streamed or whole, checked while it was read."""

    text: str = ""
    thinking: str = ""
    #: (id, name, arguments)
    calls: list[tuple[str, str, Json]] = field(default_factory=list)
    finish: str = ""
    model: str = ""
    usage: Json = field(default_factory=dict)
    #: the message as a client sends it back
    message: Json = field(default_factory=dict)


def heard(reply: Reply) -> Heard:
    """What an answer says; asserts that it keeps the grammar of its dialect."""
    assert reply.status == 200, reply
    assert reply.complete
    if reply.headers["content-type"].startswith("text/event-stream"):
        rows = frames(reply.body)
        messages = any(row.get("type") == "message_start" for row in rows)
        return read_message(fold_messages(rows)) if messages else read_chat(fold_chat(rows))
    whole = reply.json()
    return read_chat(whole) if "choices" in whole else read_message(whole)


def fold_messages(rows: list[Json]) -> Json:
    """The message of a stream that keeps Anthropic's grammar."""
    rows = [row for row in rows if row["type"] != "ping"]
    assert rows[0]["type"] == "message_start", rows[0]
    assert [row["type"] for row in rows[-2:]] == ["message_delta", "message_stop"], rows[-2:]
    message: Json = rows[0]["message"]
    content: list[Json] = message["content"]
    parts: dict[int, str] = {}
    is_open = False
    for row in rows[1:-2]:
        if row["type"] == "content_block_start":
            assert not is_open
            assert row["index"] == len(content)
            content.append(row["content_block"])
            is_open = True
            continue
        assert is_open
        assert row["index"] == len(content) - 1
        is_open = row["type"] != "content_block_stop"
        if is_open:
            delta = row["delta"]
            key = delta["type"].removesuffix("_delta")
            if key == "input_json":
                parts[row["index"]] = parts.get(row["index"], "") + delta["partial_json"]
            else:
                content[-1][key] = content[-1].get(key, "") + delta[key]
    assert not is_open
    for index, text in parts.items():
        content[index]["input"] = json.loads(text or "{}")
    return {**message, **rows[-2]["delta"], "usage": {**message["usage"], **rows[-2]["usage"]}}


def fold_chat(rows: list[Json]) -> Json:
    """The completion of a stream that keeps OpenAI's grammar."""
    assert rows[-1]["type"] == "[DONE]", rows[-1]
    message: Json = {"role": "assistant", "content": None}
    finish = ""
    usage: Json = {}
    assert rows[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({(row["id"], row["model"], row["object"]) for row in rows[:-1]}) == 1
    for row in rows[:-1]:
        usage = row.get("usage") or usage
        for choice in row["choices"]:
            assert choice["index"] == 0
            assert not finish
            finish = choice.get("finish_reason") or ""
            for key in ("content", "reasoning_content"):
                if choice["delta"].get(key):
                    message[key] = (message.get(key) or "") + choice["delta"][key]
            for part in choice["delta"].get("tool_calls") or ():
                calls = message.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    assert part["id"]
                    calls.append({"id": part["id"], "type": "function",
                                  "function": {**part["function"], "arguments": ""}})  # fmt: skip
                assert part["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += part["function"].get("arguments") or ""
    return {**rows[0], "usage": usage, "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": finish, "message": message}]}  # fmt: skip


def read_message(whole: Json) -> Heard:
    """A message of Anthropic's."""
    assert (whole["type"], whole["role"]) == ("message", "assistant")
    content = whole["content"]
    return Heard(
        text="".join(b["text"] for b in content if b["type"] == "text"),
        thinking="".join(b["thinking"] for b in content if b["type"] == "thinking"),
        calls=[(b["id"], b["name"], b["input"]) for b in content if b["type"] == "tool_use"],
        finish=whole["stop_reason"],
        model=whole["model"],
        usage=whole["usage"],
        message={"role": "assistant", "content": content},
    )


def read_chat(whole: Json) -> Heard:
    """A completion of OpenAI's."""
    assert whole["object"] == "chat.completion"
    (choice,) = whole["choices"]
    message = choice["message"]
    called = [(c["id"], c["function"]) for c in message.get("tool_calls") or ()]
    return Heard(
        text=message["content"] or "",
        thinking=message.get("reasoning_content") or "",
        calls=[(call, f["name"], json.loads(f["arguments"])) for call, f in called],
        finish=choice["finish_reason"],
        model=whole["model"],
        usage=whole["usage"],
        message=message,
    )


def answered(path: str, body: Json, said: Heard, results: list[Any]) -> Json:
    """The next body of a tool loop: what the model said, and what its tools did."""
    pairs = list(zip([call for call, _, _ in said.calls], results, strict=True))
    if path == MESSAGES:
        blocks = [{"type": "tool_result", "tool_use_id": c, "content": r} for c, r in pairs]
        new = [said.message, user(blocks)]
    else:
        rows = [{"role": "tool", "tool_call_id": c, "content": r} for c, r in pairs]
        new = [said.message, *rows]
    return {**body, "messages": [*body["messages"], *new]}


def error(reply: Reply) -> Json:
    """The error of an answer, in the shape of either vendor."""
    body = reply.json()
    if body.get("type") == "error":
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def stream_error(body: bytes) -> Json:
    """The error that a broken stream ends with; asserts that it does not look finished."""
    assert b"[DONE]" not in body
    assert b"message_stop" not in body
    assert b'"finish_reason":"' not in body.replace(b" ", b"")
    last = frames(body)[-1]
    assert "error" in last, last
    if b"message_start" in body:
        assert last["type"] == "error"
        assert b"event: error\n" in body
    return dict(last["error"])


def bill(pair: Pair, at: int, brain: Brain = default_brain) -> Json:
    """What one call cost, as the imitation counts it."""
    seen = pair.fake.calls[at]
    dialect = "messages" if seen.path == MESSAGES else "chat"
    return usage_of(seen.body, brain(dialect, seen.body), cached=False)


def pieces(path: str, model: str, words: str = "one two three") -> list[bytes]:
    """A stream as the upstream of (path, model) writes it, one piece per event."""
    upstream = MESSAGES if model.startswith("claude") and path == MESSAGES else CHAT
    if upstream == CHAT:
        base = {"id": "c1", "model": model, "created": 5}
        deltas: list[Json] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word + " "} for word in words.split()]
        rows = [{**base, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        rows += [{**base, "choices": [end]}, {**base, "choices": [], "usage": usage}]
        return [*(sse(row, done=False) for row in rows), sse()]
    message: Json = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 0},
    }  # fmt: skip
    block = {"type": "text", "text": ""}
    rows = [{"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": block}]  # fmt: skip
    rows += [
        {"type": "content_block_delta", "index": 0,
         "delta": {"type": "text_delta", "text": word + " "}} for word in words.split()
    ]  # fmt: skip
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    rows += [{"type": "content_block_stop", "index": 0},
             {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 3}},
             {"type": "message_stop"}]  # fmt: skip
    return [events(row) for row in rows]


def streaming(*body: bytes, **more: Any) -> Answer:
    """A stream as an answer."""
    return Answer(200, {"Content-Type": "text/event-stream"}, list(body), **more)


def refusal(status: int, message: str = "no", code: str = "", **headers: str) -> Answer:
    """An error answer in the service's form; it counts as nobody's fault."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    body = dump({"error": {"message": message, "code": code}})
    return Answer(status, fields, body, chunked=False)


# ---- answers -------------------------------------------------------------------------------------


@EVERY_WAY
@STREAMED
def test_an_answer_arrives_whole_and_under_the_name_that_was_asked_for(
    pair: Pair, path: str, model: str, stream: bool
) -> None:
    said = heard(pair.ask(path, "h\N{SNOWMAN}llo \N{GRINNING FACE}", model, stream=stream))
    assert said.text == f"Hello from {model}. You said: h\N{SNOWMAN}llo \N{GRINNING FACE}"
    assert said.finish == ("stop" if path == CHAT else "end_turn")
    assert said.model == model
    assert pair.fake.calls[0].body["stream"] is True
    assert pair.fake.calls[0].body["model"] == model


@EVERY_WAY
@STREAMED
def test_a_tool_is_called_and_its_result_comes_back(
    pair: Pair, path: str, model: str, stream: bool
) -> None:
    body = asking("use the tool", model, tools=[tool(path)], stream=stream)
    said = heard(pair.post(path, body))
    assert [(name, arguments) for _, name, arguments in said.calls] == [
        ("look", {"path": "example"})
    ]
    assert said.finish == ("tool_calls" if path == CHAT else "tool_use")
    done = heard(pair.post(path, answered(path, body, said, ["four files"])))
    assert done.text == "The tool said: four files"
    assert done.finish == ("stop" if path == CHAT else "end_turn")


@EVERY_WAY
@STREAMED
def test_two_tools_are_called_in_parallel(pair: Pair, path: str, model: str, stream: bool) -> None:
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking("use both tools", model, tools=tools, stream=stream)
    said = heard(pair.post(path, body))
    assert [name for _, name, _ in said.calls] == ["look", "read"]
    assert len({call for call, _, _ in said.calls}) == 2
    done = heard(pair.post(path, answered(path, body, said, ["a", "b"])))
    assert done.text == "The tool said: a and b"


def two_steps(dialect: str, body: Json) -> list[Part]:
    """Thinks and calls a tool twice, then is done."""
    asked = json.dumps(body["messages"])
    done = asked.count('"tool_call_id"') + asked.count('"tool_use_id"')
    if done < 2 and body.get("tools"):
        return [Think(f"step {done}"), Call("look", {"path": str(done)})]
    return [Think("last"), Say("done")]


@pytest.fixture(scope="module")
def thinking() -> Iterator[Pair]:
    """A pair whose models think before each of two tool calls."""
    with ExitStack() as stack:
        yield start(stack, brain=two_steps)


@pytest.mark.parametrize(
    ("path", "model"),
    [(MESSAGES, SONNET), (MESSAGES, OPUS), (MESSAGES, GEMINI), (CHAT, SONNET), (CHAT, GEMINI)],
)
@STREAMED
def test_signatures_of_thoughts_return_over_two_tool_turns(
    thinking: Pair, path: str, model: str, stream: bool
) -> None:
    fake = thinking.fake
    fake.calls.clear()
    fake.issued.texts.clear()
    effort = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 8000}
    more: Json = effort if path == MESSAGES else {"reasoning_effort": "high"}
    body = asking("go", model, tools=[tool(path)], stream=stream, **more)
    for step in range(2):
        said = heard(thinking.post(path, body))
        assert said.thinking == f"step {step}"
        body = answered(path, body, said, [f"result {step}"])
    assert heard(thinking.post(path, body)).text == "done"
    replayed = json.dumps(fake.calls[-1].body)
    assert list(fake.issued.texts.values()) == ["step 0", "step 1", "last"]
    assert all(s in replayed for s, t in fake.issued.texts.items() if t != "last")
    assert fake.violations == []


@STREAMED
def test_thoughts_that_were_not_asked_for_return_unseen(thinking: Pair, stream: bool) -> None:
    fake = thinking.fake
    fake.calls.clear()
    fake.issued.texts.clear()
    body = asking("go", GEMINI, tools=[tool(MESSAGES)], stream=stream)
    for step in range(2):
        said = heard(thinking.post(MESSAGES, body))
        assert said.thinking == ""
        body = answered(MESSAGES, body, said, [f"result {step}"])
    assert heard(thinking.post(MESSAGES, body)).text == "done"
    replayed = json.dumps(fake.calls[-1].body)
    assert list(fake.issued.texts.values()) == ["step 0", "step 1", "last"]
    assert all(s in replayed for s, t in fake.issued.texts.items() if t != "last")
    assert fake.violations == []


def test_thinking_works_for_a_chat_caller_of_a_model_without_that_endpoint(thinking: Pair) -> None:
    body = asking("go", ONLY_MESSAGES, tools=[tool(CHAT)], reasoning_effort="high", stream=True)
    said = heard(thinking.post(CHAT, body))
    assert said.thinking == "step 0"
    for step in range(2):
        body = answered(CHAT, body, said, [f"result {step}"])
        said = heard(thinking.post(CHAT, body))
    assert said.text == "done"
    assert thinking.fake.violations == []


@EVERY_WAY
def test_an_image_brings_its_header_and_words_do_not(pair: Pair, path: str, model: str) -> None:
    said = heard(pair.ask(path, [image(path), {"type": "text", "text": "look"}], model))
    assert "I see 1 image(s)." in said.text
    assert "I see" not in heard(pair.ask(path, "look", model)).text
    headers = [call.headers.get("copilot-vision-request") for call in pair.fake.calls]
    assert headers == ["true", None]


@pytest.mark.parametrize("model", [SONNET, GPT])
def test_an_image_inside_a_tool_result_is_seen(pair: Pair, model: str) -> None:
    body = asking("use the tool", model, tools=[tool(MESSAGES)])
    said = heard(pair.post(MESSAGES, body))
    done = heard(pair.post(MESSAGES, answered(MESSAGES, body, said, [[image(MESSAGES)]])))
    assert pair.fake.calls[1].headers["copilot-vision-request"] == "true"
    assert model == GPT or "I see 1 image(s)." in done.text


@pytest.mark.parametrize(
    ("path", "asked", "sent"),
    [
        (MESSAGES, "claude-sonnet-4-5-20250929", SONNET),
        (MESSAGES, "claude-opus-4-8", OPUS),
        (CHAT, "copilot/gpt-4.1", GPT),
        (CHAT, "GPT-4.1", GPT),
    ],
)
def test_a_model_name_becomes_the_catalogue_s_and_the_answer_keeps_the_caller_s(
    pair: Pair, path: str, asked: str, sent: str
) -> None:
    reply = pair.ask(path, "hi", asked)
    assert heard(reply).model == asked
    assert reply.headers["x-aiclient-model"] == sent == pair.fake.calls[0].body["model"]
    assert reply.headers["x-aiclient-provider"] == "copilot"


@pytest.mark.parametrize(("path", "model"), [(CHAT, GPT), (MESSAGES, SONNET)])
def test_a_conversation_goes_up_as_it_was_spelled(pair: Pair, path: str, model: str) -> None:
    """Also a large one, and one key of the body that a rule changes; no key is read twice."""
    turns = '[{"content" : "%s \\u00e9\\/\u00e9" , "role":"user"}]' % ("words\\n" * 40_000)
    text = f'{{"model":"{model}","max_tokens":99,\n"metadata":{{}} , "messages": {turns} }}'
    heard(pair.post(path, text.encode()))
    sent = pair.fake.calls[0]
    assert turns.encode() in sent.raw
    assert "metadata" not in sent.body
    twice = text.replace('"role":"user"', '"role":"system" , "role":"user"')
    heard(pair.post(path, twice.encode()))
    assert b'"system"' not in pair.fake.calls[1].raw
    assert pair.fake.calls[1].body == sent.body


def test_what_is_left_out_is_named(pair: Pair) -> None:
    reply = pair.ask(MESSAGES, "hi", SONNET, service_tier="standard_only", speed="fast")
    assert reply.headers["x-aiclient-dropped"] == "service_tier, speed"


def test_the_list_shows_models_that_can_be_used(pair: Pair) -> None:
    rows = pair.gateway.request("GET", "/v1/models").json()["data"]
    names = [row["id"] for row in rows if row["provider"] == "copilot"]
    assert {GPT, SONNET, OPUS, GEMINI, ONLY_MESSAGES, "grok-code-fast-1"} <= set(names)
    assert {"text-embedding-3-small", "gpt-5.3-codex"} <= set(names)
    assert "claude-sonnet-4" not in names  # its terms were never accepted
    assert len(names) == len(set(names))


def test_a_model_of_embeddings_holds_no_conversation(pair: Pair) -> None:
    reply = pair.ask(CHAT, "hi", "text-embedding-3-small")
    assert reply.status == 400
    assert "is not a chat model" in error(reply)["message"]
    assert pair.fake.calls == []


# ---- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model", "last", "initiator"),
    [
        (CHAT, GPT, user("b"), "user"),
        (CHAT, SONNET, user("b"), "user"),
        (CHAT, GPT, {"role": "assistant", "content": "b"}, "agent"),
        (CHAT, SONNET, {"role": "assistant", "content": "b"}, "agent"),
        (MESSAGES, SONNET, user("b"), "user"),
        (MESSAGES, GPT, user("b"), "user"),
        (MESSAGES, SONNET, {"role": "assistant", "content": "It is"}, "agent"),
    ],
)
def test_the_last_message_tells_who_asks(
    pair: Pair, path: str, model: str, last: Json, initiator: str
) -> None:
    turns = [user("a"), {"role": "assistant", "content": "x"}, user("y"), last]
    heard(pair.post(path, asking("", model) | {"messages": turns}))
    assert pair.fake.calls[0].headers["x-initiator"] == initiator


@EVERY_WAY
def test_a_tool_result_is_asked_by_an_agent(pair: Pair, path: str, model: str) -> None:
    body = asking("use the tool", model, tools=[tool(path)])
    pair.post(path, answered(path, body, heard(pair.post(path, body)), ["r"]))
    assert [call.headers["x-initiator"] for call in pair.fake.calls] == ["user", "agent"]


@EVERY_WAY
def test_a_conversation_keeps_its_interaction_and_every_call_has_its_own_id(
    pair: Pair, path: str, model: str
) -> None:
    body = asking("use the tool", model, tools=[tool(path)])
    pair.post(path, answered(path, body, heard(pair.post(path, body)), ["r"]))
    pair.ask(path, "something else", model)
    first, second, other = (call.headers["x-interaction-id"] for call in pair.fake.calls)
    assert first == second != other
    assert len({call.headers["x-request-id"] for call in pair.fake.calls}) == 3


def test_a_caller_s_session_is_its_interaction(pair: Pair) -> None:
    session = "0a1b2c3d-0000-4000-8000-000000000001"
    for words, user_id in [("a", f"user_x_session_{session}"), ("b", f"user_y_session_{session}")]:
        pair.ask(MESSAGES, words, SONNET, metadata={"user_id": user_id})
    first, second = (call.headers["x-interaction-id"] for call in pair.fake.calls)
    assert first == second
    assert all(session not in json.dumps([c.headers, c.body]) for c in pair.fake.calls)


def test_a_caller_s_own_initiator_wins(pair: Pair) -> None:
    turns = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    pair.post(CHAT, {"model": GPT, "messages": turns}, X_Initiator="agent")
    assert pair.fake.calls[0].headers["x-initiator"] == "agent"
    pair.fake.violations.clear()  # the imitation cannot know that the caller said so


def test_a_caller_s_headers_stay_here(pair: Pair) -> None:
    reply = pair.post(
        MESSAGES, asking("hi", SONNET), X_Api_Key="KEYMARK", Cookie="COOKIEMARK",
        X_Stainless_Lang="js", Anthropic_Beta="claude-code-20250219,context-1m-2025-08-07",
        Anthropic_Dangerous_Direct_Browser_Access="true", X_App="cli", X_Custom="CUSTOMMARK",
    )  # fmt: skip
    assert reply.status == 200
    headers = pair.fake.calls[0].headers
    assert headers["anthropic-beta"] == "claude-code-20250219"
    assert not [mark for mark in ("KEYMARK", "COOKIEMARK", "CUSTOMMARK") if mark in str(headers)]
    pair.fake.violations.clear()  # the imitation takes few betas


def test_refused_betas_are_left_out_at_once_and_from_then_on() -> None:
    with ExitStack() as stack:
        pair = start(stack)
        betas = f"{', '.join(f'news-{n}-2026-11-01' for n in range(12))},{gw.CONTEXT_BETA}"
        for _ in range(2):
            assert pair.post(MESSAGES, asking("hi", SONNET), Anthropic_Beta=betas).status == 200
        assert pair.post(CHAT, asking("hi", SONNET), Anthropic_Beta=betas).status == 200
        assert pair.post(MESSAGES, asking("hi", GPT), Anthropic_Beta=betas).status == 200
        sent = [call.headers.get("anthropic-beta", "") for call in pair.fake.calls]
        assert sent == [betas.replace(" ", ""), gw.CONTEXT_BETA, gw.CONTEXT_BETA, "", ""]
        assert len(pair.fake.violations) == 1
        pair.fake.violations.clear()


# ---- tokens --------------------------------------------------------------------------------------


def models_calls(fake: FakeCopilot) -> int:
    """How often the model list was asked for."""
    return sum(seen.path == "/models" for seen in fake.requests)


def test_twenty_first_requests_share_one_exchange_and_one_model_list(fresh: Pair) -> None:
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda n: fresh.ask(CHAT, f"hi {n}"), range(20)))
    assert {reply.status for reply in replies} == {200}
    assert (fresh.fake.exchanges, models_calls(fresh.fake)) == (1, 1)


@BOTH
def test_an_expired_token_is_exchanged_and_the_call_repeated_once(fresh: Pair, path: str) -> None:
    fake = fresh.fake
    heard(fresh.ask(path, "hi", SONNET))
    fake.expire_tokens()
    schema = {"type": "json_schema", "schema": {"type": "object", "title": "MARK"}}
    more: Json = {"output_config": {"format": schema, "effort": "low"}} if path == MESSAGES else {}
    assert heard(fresh.ask(path, "hi again", SONNET, **more)).text
    assert (fake.exchanges, len(fake.calls)) == (2, 3)
    refused, repeated = fake.calls[1:]
    assert repeated.body == refused.body
    assert repeated.headers["x-interaction-id"] == refused.headers["x-interaction-id"]
    assert repeated.headers["x-request-id"] != refused.headers["x-request-id"]
    assert repeated.headers["authorization"] != refused.headers["authorization"]


def test_twenty_calls_with_an_expired_token_share_one_exchange(fresh: Pair) -> None:
    heard(fresh.ask(CHAT, "hi"))
    fresh.fake.expire_tokens()
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda n: fresh.ask(CHAT, f"hi {n}"), range(20)))
    assert {reply.status for reply in replies} == {200}
    assert fresh.fake.exchanges == 2


@pytest.mark.parametrize("status", [401, 403, 421])
@BOTH
def test_a_lasting_refusal_makes_no_storm_of_exchanges(fresh: Pair, status: int, path: str) -> None:
    for _ in range(20):
        fresh.fake.queue(Answer(status, {}, b"Access to this endpoint is forbidden.\n"))
    replies = [fresh.ask(path, f"hi {n}", SONNET) for n in range(5)]
    assert fresh.fake.exchanges <= 2
    assert len(fresh.fake.calls) <= 6
    assert all(error(reply)["message"] for reply in replies)
    if status != 401:
        assert {reply.status for reply in replies} == {403}
        return
    overloaded = 503 if path == CHAT else 529
    for reply in replies:  # a new sign-in would not help, so nobody is asked for one
        assert reply.status == overloaded, reply
        assert 0 < int(reply.headers["retry-after"]) <= 60
        assert "x-should-retry" not in reply.headers


def test_a_misdirected_call_is_repeated_with_a_new_token(fresh: Pair) -> None:
    fresh.fake.queue(Answer(421, {}, b"Misdirected Request\n"))
    assert heard(fresh.ask(CHAT, "hi")).text
    assert (fresh.fake.exchanges, len(fresh.fake.calls)) == (2, 2)


def test_a_token_is_kept_for_the_next_start_and_for_nobody_else() -> None:
    with ExitStack() as stack:
        pair = start(stack)
        pair.ask(CHAT, "hi")
        folder = pair.gateway.config_folder / "copilot"
        saved = json.loads((folder / "token.json").read_text())
        assert stat.S_IMODE(os.stat(folder / "token.json").st_mode) == 0o600
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert saved["github_token"] == pair.fake.github_token
        assert saved["copilot_token"].startswith("tid=")
        assert saved["expires_at"] > time.time() + 300
        assert sorted(os.listdir(folder)) == ["token.json", "token.lock"]
        second = Pair(pair.fake, stack.enter_context(gateway_for(pair.fake, **saved)))
        assert heard(second.ask(CHAT, "hi")).text
        assert pair.fake.exchanges == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"api_url": "https://evil.example"},
        {"api_url": 5},
        {"expires_at": 0},
        {"expires_at": 10**12},
        {"expires_at": "soon"},
        {"copilot_token": ""},
        {"copilot_token": ["x"]},
    ],
)
def test_a_saved_token_that_cannot_be_right_is_exchanged_anew(odd: Json) -> None:
    with FakeCopilot() as fake:
        saved = {"copilot_token": "tid=old", "expires_at": time.time() + 1000, "api_url": fake.url}
        with gateway_for(fake, **{**saved, **odd}) as gateway:
            reply = gateway.request("POST", CHAT, asking("hi"))
        assert reply.status == 200, reply
        assert (fake.exchanges, len(fake.calls)) == (1, 1)


def test_a_token_answer_that_names_a_foreign_host_is_not_obeyed(fresh: Pair) -> None:
    with FakeCopilot() as other:
        named = {"token": "tid=1", "refresh_in": 1500, "endpoints": {"api": "https://evil.example"}}
        for _ in range(9):
            fresh.fake.exchange_answers.append(Answer(200, {}, dump(named), chunked=False))
        reply = fresh.ask(CHAT, "hi")
        assert reply.status == 502
        assert "host" in error(reply)["message"]
        assert other.requests == fresh.fake.calls == []


def test_an_old_token_serves_on_while_github_fails() -> None:
    with ExitStack() as stack:
        pair = start(stack)
        pair.fake.token_life = 30  # so little that each request would like a new one
        assert pair.ask(CHAT, "one").status == 200
        pair.fake.exchange_answers.extend(Answer(500, {}, b"<html>Unicorn!") for _ in range(9))
        assert [pair.ask(CHAT, f"{n}").status for n in range(4)] == [200] * 4
        assert pair.fake.exchanges <= 3


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"message":"Bad credentials","status":"401"}'),
        (403, b'{"error_details":{"message":"No access","notification_id":"no_copilot_access"}}'),
        (404, b'{"message":"Not Found","status":"404"}'),
    ],
)
def test_a_final_refusal_of_the_exchange_is_told_and_not_asked_for_again(
    fresh: Pair, status: int, body: bytes
) -> None:
    answers = (Answer(status, {}, body, chunked=False, strict=False) for _ in range(30))
    fresh.fake.exchange_answers.extend(answers)
    for number in range(5):
        reply = fresh.ask(CHAT, f"{number}")
        assert reply.status == 503, reply
        assert reply.headers["x-should-retry"] == "false"
    assert fresh.fake.exchanges == 1
    # What was signed in anew is asked at once.
    file = fresh.gateway.config_folder / "copilot" / "token.json"
    saved = json.loads(file.read_text())
    assert saved.pop("refused")
    fresh.fake.exchange_answers.clear()
    file.write_text(json.dumps(saved))
    assert heard(fresh.ask(CHAT, "hi")).text
    assert fresh.fake.exchanges == 2


def test_another_provider_does_not_wait_for_github(fresh: Pair) -> None:
    fresh.fake.exchange_answers.extend(Answer(0, then="hang") for _ in range(3))
    reply = fresh.gateway.request("POST", CHAT, asking("hi", "echo/echo"), seconds=4)
    assert heard(reply).text == "[echo] hi"
    body = asking("hi", "echo")
    reply = fresh.gateway.request("POST", CHAT, body, {"X-Provider": "echo"}, seconds=4)
    assert heard(reply).text == "[echo] hi"
    assert fresh.fake.requests == []


def test_a_client_that_leaves_while_github_hangs_is_not_waited_for() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.exchange_answers.append(Answer(0, then="hang"))
        wire = Pair(fake, gateway).send(CHAT, asking("hi"))
        assert fake.wait_until(lambda: len(fake.requests) == 1)
        wire.abort()
        gateway.terminate()
        assert gateway.wait(5) == 0


@BOTH
def test_without_a_sign_in_the_answer_says_what_to_do(path: str) -> None:
    with Gateway() as gateway:
        reply = gateway.request("POST", path, asking("hi", "copilot/gpt-4.1"))
        check_end(gateway)
    assert reply.status == 503
    assert reply.headers["x-should-retry"] == "false"
    assert "type: " in error(reply)["message"] and "auth copilot" in error(reply)["message"]


# ---- the model list ------------------------------------------------------------------------------


def test_a_list_that_fails_once_costs_no_answer(fresh: Pair) -> None:
    fresh.fake.models_answers.append(Answer(500, {}, b"oops"))
    assert heard(fresh.ask(CHAT, "hi", "copilot/gpt-4.1")).text


def test_an_exact_name_is_tried_even_when_the_list_wobbles(fresh: Pair) -> None:
    rest = [m for m in models() if m.get("id") != GPT]
    fresh.fake.models_answers.append(Answer(200, {}, dump({"data": rest}), chunked=False))
    assert heard(fresh.ask(CHAT, "hi", "copilot/gpt-4.1")).text
    assert heard(fresh.ask(CHAT, "hi", GPT)).text


def test_a_name_that_nobody_has_is_answered_with_the_nearest(pair: Pair) -> None:
    reply = pair.ask(MESSAGES, "hi", "claude-sonet-4.5")
    assert reply.status == 404
    assert SONNET in error(reply)["message"]


def test_a_model_that_vanishes_from_the_list_is_kept(tmp_path: Path) -> None:
    async def story(fake: FakeCopilot) -> tuple[set[str], set[str]]:
        paths = gw.Paths(str(tmp_path), str(tmp_path))
        gw.save_private_json(paths.token_file("c"), {"github_token": fake.github_token})
        client = gw.HttpClient(gw.NetworkConfig(), gw.Ticker())
        config = gw.CopilotConfig(github_api_url=fake.url)
        provider = gw.CopilotProvider("c", config, paths, client)
        first = set(await provider.models())
        fake.model_list[:] = [{"id": "new-1", "name": "New"}]
        provider.catalogue.fetched_at = float("-inf")
        second = set(await provider.models())
        fake.models_answers.append(Answer(500, {}, b"oops"))
        provider.catalogue.fetched_at = float("-inf")
        assert set(await provider.models()) == second
        provider.close()
        client.close()
        await asyncio.sleep(0)
        return first, second

    with FakeCopilot() as fake:
        first, second = asyncio.run(story(fake))
        assert fake.violations == []
    assert second == first | {"new-1"}


# ---- refusals ------------------------------------------------------------------------------------


@BOTH
@STREAMED
def test_an_empty_quota_is_told_and_never_tried_again(
    limited: Pair, path: str, stream: bool
) -> None:
    limited.fake.queue(refusal(402, "You have no quota", "quota_exceeded", Retry_After="86400"))
    reply = limited.ask(path, "hi", SONNET, stream=stream)
    assert reply.status == 429
    assert reply.headers["x-should-retry"] == "false"
    assert int(reply.headers["retry-after"]) <= 60
    kind = "insufficient_quota" if path == CHAT else ("rate_limit_error", "billing_error")
    assert error(reply)["type"] in kind
    assert len(limited.fake.calls) == 1


@BOTH
def test_a_short_limit_is_waited_for(pair: Pair, path: str) -> None:
    pair.fake.queue(refusal(429, "slow down", "rate_limited", Retry_After="0.3"))
    began = time.monotonic()
    assert heard(pair.ask(path, f"hi {path}", SONNET)).text
    assert 0.3 <= time.monotonic() - began < 1.5
    first, second = pair.fake.calls
    assert [c.headers["x-initiator"] for c in (first, second)] == ["user", "agent"]
    assert first.headers["x-interaction-id"] == second.headers["x-interaction-id"]
    assert first.body == second.body


def test_a_limit_without_a_time_is_waited_for_two_seconds(pair: Pair) -> None:
    def timed(path: str, status: int) -> float:
        began = time.monotonic()
        assert heard(pair.ask(path, f"hi without {status}", SONNET)).text
        return time.monotonic() - began

    for status in (429, 503):
        pair.fake.queue(refusal(status, "slow down"))
    with ThreadPoolExecutor(2) as pool:  # both waits at once
        took = list(pool.map(timed, (CHAT, MESSAGES), (429, 503)))
    assert min(took) >= 1.9
    assert len(pair.fake.calls) == 4


@pytest.mark.parametrize("said", ["183600", "Fri, 01 Jan 2049 00:00:00 GMT"])
def test_a_long_limit_is_passed_on_with_a_time_that_no_client_hangs_for(
    fresh: Pair, said: str
) -> None:
    ways = [(CHAT, GPT, False), (CHAT, GEMINI, True), (MESSAGES, SONNET, False),
            (MESSAGES, OPUS, True)]  # fmt: skip
    for path, model, stream in ways:
        fresh.fake.queue(refusal(429, "in 51 hours", "user_model_rate_limited", Retry_After=said))
        reply = fresh.ask(path, "hi", model, stream=stream)
        assert reply.status == 429
        assert 0 < int(reply.headers["retry-after"]) <= 60
        assert reply.headers["x-should-retry"] == "false"
        assert "51 hours" in error(reply)["message"]
    assert len(fresh.fake.calls) == len(ways)


@pytest.mark.parametrize("code", ["user_model_rate_limited", "user_weekly_rate_limited"])
def test_what_is_limited_for_long_is_refused_here_for_a_while(fresh: Pair, code: str) -> None:
    fresh.fake.queue(refusal(429, "in 51 hours", code, Retry_After="183600"))
    for _ in range(3):
        reply = fresh.ask(MESSAGES, "hi", SONNET)
        assert reply.status == 429
        assert 0 < int(reply.headers["retry-after"]) <= 60
        assert "51 hours" in error(reply)["message"]
    assert len(fresh.fake.calls) == 1
    whole_account = code == "user_weekly_rate_limited"
    assert fresh.ask(CHAT, "hi", GPT).status == (429 if whole_account else 200)
    assert len(fresh.fake.calls) == (1 if whole_account else 2)


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_a_failure_is_tried_again(pair: Pair, status: int) -> None:
    fields = {"Retry-After": "0"} if status in (503, 529) else {}
    pair.fake.queue(Answer(status, fields, b"<html>Unicorn!</html>", chunked=False))
    assert heard(pair.ask(CHAT, f"hi {status}", stream=True)).text
    assert len(pair.fake.calls) == 2


@pytest.mark.parametrize("status", [400, 408, 504])
def test_an_empty_400_and_a_timeout_are_tried_again_once(pair: Pair, status: int) -> None:
    for _ in range(3):
        pair.fake.queue(Answer(status, {}, b"", chunked=False))
    reply = pair.ask(CHAT, f"hi {status}")
    assert reply.status in (400, 504)
    assert len(pair.fake.calls) == 2


def test_a_lasting_failure_is_told_after_three_attempts(pair: Pair) -> None:
    for _ in range(3):
        pair.fake.queue(Answer(500, {}, b"<html>Unicorn!</html>", chunked=False))
    reply = pair.ask(MESSAGES, "hi, thrice", SONNET)
    assert reply.status == 502
    assert "html" not in error(reply)["message"].lower()
    assert len(pair.fake.calls) == 3


@pytest.mark.parametrize(("status", "told"), [(429, 429), (503, 529)])
def test_a_lasting_limit_is_told_after_three_attempts(
    limited: Pair, status: int, told: int
) -> None:
    for _ in range(3):
        limited.fake.queue(refusal(status, "slow down", Retry_After="0"))
    reply = limited.ask(MESSAGES, f"hi, thrice {status}", SONNET)
    assert reply.status == told
    assert int(reply.headers["retry-after"]) >= 1
    assert len(limited.fake.calls) == 3


@pytest.mark.parametrize(
    ("status", "message", "code", "answered_with"),
    [
        (400, "off_topic", "off_topic", 400),
        (404, "404 page not found", "", 404),
        (413, "failed to parse request", "", 413),
        (422, "Responsible AI", "", 400),
        (466, "the specified API version is no longer supported", "", 502),
        (401, "unauthorized: Personal Access Token does not have x permission", "", 503),
    ],
)
def test_what_cannot_be_helped_is_told_after_one_attempt(
    pair: Pair, status: int, message: str, code: str, answered_with: int
) -> None:
    pair.fake.queue(refusal(status, message, code))
    reply = pair.ask(CHAT, "hi")
    assert reply.status == answered_with
    assert error(reply)["message"]
    assert len(pair.fake.calls) == 1


@BOTH
def test_a_prompt_that_is_too_long_is_said_in_the_caller_s_words(pair: Pair, path: str) -> None:
    why = "prompt token count of 138898 exceeds the limit of 64000"
    pair.fake.queue(refusal(400, why, "model_max_prompt_tokens_exceeded"))
    reply = pair.ask(path, "hi", SONNET)
    assert reply.status == 400
    text = "prompt is too long: 138898 tokens > 64000 maximum"
    if path == CHAT:
        text = "is 64000 tokens. However, your messages resulted in 138898 tokens."
    assert text in error(reply)["message"]
    if path == CHAT:
        assert error(reply)["code"] == "context_length_exceeded"


def test_a_listed_model_that_is_not_supported_for_a_moment_is_tried_again(pair: Pair) -> None:
    pair.fake.queue(refusal(400, "The requested model is not supported.", "model_not_supported"))
    assert heard(pair.ask(CHAT, "hi, wobble")).text
    assert len(pair.fake.calls) == 2


@BOTH
@STREAMED
def test_a_misspelt_model_of_a_named_provider_is_told_the_nearest(
    pair: Pair, path: str, stream: bool
) -> None:
    """The catalogue fluctuates, so it was tried; then a typing error is the likeliest reason."""
    answer = refusal(400, "The requested model is not supported.", "model_not_supported")
    answer.strict = False
    pair.fake.queue(answer)
    reply = pair.ask(path, "hi", "copilot/gtp-4.1", stream=stream)
    assert reply.status == 404
    assert "Copilot does not offer gtp-4.1 to this account." in reply.text
    assert "Nearest: gpt-4.1" in reply.text


def test_an_endpoint_that_a_model_does_not_serve_is_left_for_another(fresh: Pair) -> None:
    why = f'model "{SONNET}" is not accessible via the /v1/messages endpoint'
    fresh.fake.queue(refusal(400, why, "unsupported_api_for_model"))
    assert heard(fresh.ask(MESSAGES, "hi", SONNET)).text
    assert heard(fresh.ask(MESSAGES, "hi again", SONNET)).text
    paths = [call.path for call in fresh.fake.calls]
    assert paths == ["/v1/messages", "/chat/completions", "/chat/completions"]


def test_a_model_that_serves_neither_endpoint_is_refused_after_both(fresh: Pair) -> None:
    for _ in range(3):
        fresh.fake.queue(refusal(400, "no", "unsupported_api_for_model"))
    reply = fresh.ask(MESSAGES, "hi", SONNET)
    assert reply.status == 400
    assert SONNET in error(reply)["message"]
    assert [call.path for call in fresh.fake.calls] == ["/v1/messages", "/chat/completions"]


def test_several_choices_are_refused_for_models_that_give_one(pair: Pair) -> None:
    reply = pair.ask(CHAT, "hi", SONNET, n=2)
    assert (reply.status, error(reply)["param"]) == (400, "n")
    assert pair.fake.calls == []


def test_a_reset_before_the_head_on_a_used_connection_is_repeated(pair: Pair) -> None:
    heard(pair.ask(CHAT, "hi"))
    pair.fake.queue(Answer(0, then="reset"))
    assert heard(pair.ask(CHAT, "hi again")).text
    assert [call.connection for call in pair.fake.calls][1] != pair.fake.calls[2].connection
    assert len(pair.fake.calls) == 3


@pytest.mark.parametrize("stream", [False, True], ids=["status", "frame"])
def test_a_key_that_an_upstream_repeats_is_neither_returned_nor_logged(stream: bool) -> None:
    """Whatever it looks like, before the first byte and after it."""
    key = "correct-horse-battery"
    with ExitStack() as stack:
        pair = start(stack, f'api_key = "{key}"')
        failure = {"error": {"message": f"no {key} here"}}
        begun = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "x"}}]}
        frames = sse(begun, failure) if stream else dump(failure)
        kind = "text/event-stream" if stream else "application/json"
        status = 200 if stream else 400
        pair.fake.queue(Answer(status, {"Content-Type": kind}, frames, strict=False))
        body = {**asking("hi", GPT), "stream": stream}
        reply = pair.post(CHAT, body, Authorization=f"Bearer {key}")
        assert "no [secret] here" in reply.text and key not in reply.text
        assert key not in pair.gateway.log()


# ---- learn and strip -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner() -> Iterator[Pair]:
    """A pair whose gateway is taught."""
    with ExitStack() as stack:
        yield start(stack)


BUDGET = {"type": "enabled", "budget_tokens": 2000}
SYSTEM_TURN = [user("a"), {"role": "system", "content": "mind"}]
LESSONS: dict[str, tuple[str, Json, str, Callable[[Seen], bool]]] = {
    "a field": (
        OPUS,
        {"context_management": {"edits": []}},
        "context_management: Extra inputs are not permitted",
        lambda seen: "context_management" in seen.body or "anthropic-beta" in seen.headers,
    ),
    "a field of a tool": (
        SONNET,
        {"tools": [{**tool(MESSAGES), "cache_control": {"type": "ephemeral"}}]},
        "tools.0.custom.cache_control: Extra inputs are not permitted",
        lambda seen: "cache_control" in seen.body["tools"][0],
    ),
    "a beta": (
        SONNET,
        {"thinking": BUDGET},
        "Unexpected value(s) `interleaved-thinking-2025-05-14` for the `anthropic-beta` header.",
        lambda seen: "anthropic-beta" in seen.headers,
    ),
    "an effort": (
        OPUS,
        {"output_config": {"effort": "high"}},
        "invalid_reasoning_effort: reasoning_effort high is not supported",
        lambda seen: "output_config" in seen.body,
    ),
    "a system turn": (
        OPUS,
        {"messages": SYSTEM_TURN},
        "role 'system' is not supported on this model",
        lambda seen: any(m["role"] == "system" for m in seen.body["messages"]),
    ),
    "a budget": (
        "claude-haiku-4.5",
        {"thinking": BUDGET},
        '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive".',
        lambda seen: seen.body["thinking"]["type"] == "enabled",
    ),
}


@pytest.mark.parametrize("name", LESSONS)
def test_what_was_refused_once_is_left_out_from_then_on(learner: Pair, name: str) -> None:
    model, fields, why, has_it = LESSONS[name]
    said = dump({"type": "error", "error": {"type": "invalid_request_error", "message": why}})
    learner.fake.calls.clear()
    learner.fake.queue(Answer(400, {}, said, strict=False))
    for _ in range(2):
        learner.fake.queue(streaming(*pieces(MESSAGES, model), strict=False))
    for words in ("one", "two"):
        assert heard(learner.post(MESSAGES, {**asking(words, model), **fields})).text
    assert [has_it(call) for call in learner.fake.calls] == [True, False, False]


def test_one_clients_stray_field_is_taken_from_nobody_else(learner: Pair) -> None:
    """The next request goes up with its system prompt, its tools and their names."""
    said = dump(
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "messages.0.content.0.text.system: Extra inputs are not permitted",
            },
        }
    )
    model = "claude-sonnet-4.5"
    learner.fake.calls.clear()
    learner.fake.queue(Answer(400, {}, said, strict=False))
    for _ in range(2):
        learner.fake.queue(streaming(*pieces(MESSAGES, model), strict=False))
    stray = {"messages": [user([{"type": "text", "text": "hi", "system": "x"}])]}
    for fields in (stray, {"system": "mind", "tools": [tool(MESSAGES)]}):
        assert heard(learner.post(MESSAGES, {**asking("hi", model), **fields})).text
    first, second, other = [call.body for call in learner.fake.calls]
    assert "system" in first["messages"][0]["content"][0]
    assert "system" not in second["messages"][0]["content"][0]
    assert other["system"] and other["tools"][0]["name"]


@pytest.mark.parametrize(
    ("path", "model", "why", "code"),
    [
        (MESSAGES, SONNET, "messages.1.content.0: Invalid `signature` in `thinking` block", ""),
        (CHAT, GEMINI, "invalid request body", "invalid_request_body"),
    ],
)
def test_reasoning_that_is_refused_is_left_out_once(
    thinking: Pair, path: str, model: str, why: str, code: str
) -> None:
    fake = thinking.fake
    more: Json = {"thinking": BUDGET} if path == MESSAGES else {}
    body = asking("go", model, tools=[tool(path)], **more)
    body = answered(path, body, heard(thinking.post(path, body)), ["r"])
    fake.calls.clear()
    fake.queue(refusal(400, why, code))
    fake.queue(streaming(*pieces(path, model), strict=False))
    assert heard(thinking.post(path, body)).text == "one two three "
    marks = [any(s in json.dumps(c.body) for s in fake.issued.texts) for c in fake.calls]
    assert marks == [True, False]


# ---- broken streams ------------------------------------------------------------------------------

BREAKS = [(CHAT, GPT), (CHAT, ONLY_MESSAGES), (MESSAGES, SONNET), (MESSAGES, GPT)]
EVERY_BREAK = pytest.mark.parametrize(("path", "model"), BREAKS)


def upstream_pieces(model: str) -> list[bytes]:
    """The stream of the endpoint that a caller of this row reaches."""
    return pieces(MESSAGES if model.startswith("claude") else CHAT, model)


@EVERY_BREAK
@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_stream_that_is_cut_ends_with_an_error_and_is_counted(
    pair: Pair, path: str, model: str, then: str
) -> None:
    before = pair.usage()
    pair.fake.queue(streaming(*upstream_pieces(model)[:4], then=then))
    reply = pair.ask(path, "hi", model, stream=True)
    assert reply.status == 200
    assert stream_error(reply.body)["message"]
    assert b"one" in reply.body
    after = pair.usage()
    assert after["request_count"] - before["request_count"] == 1
    assert after["error_count"] - before["error_count"] == 1
    assert len(pair.fake.calls) == 1


@EVERY_BREAK
def test_a_stream_that_ends_too_early_but_cleanly_is_an_error_too(
    pair: Pair, path: str, model: str
) -> None:
    pair.fake.queue(streaming(*upstream_pieces(model)[:4]))
    assert stream_error(pair.ask(path, "hi", model, stream=True).body)["message"]


@EVERY_BREAK
@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_cut_answer_is_an_error_with_a_status_for_who_wants_it_whole(
    pair: Pair, path: str, model: str, then: str
) -> None:
    pair.fake.queue(streaming(*upstream_pieces(model)[:4], then=then))
    reply = pair.ask(path, "hi", model)
    assert reply.status == 502
    assert error(reply)["message"]
    assert len(pair.fake.calls) == 1


@EVERY_BREAK
def test_an_error_inside_a_stream_is_passed_on_in_the_caller_s_form(
    pair: Pair, path: str, model: str
) -> None:
    said: Json = {"error": {"message": "Overloaded now", "type": "overloaded_error"}}
    if model.startswith("claude"):
        said["type"] = "error"
    frame = events(said) if "type" in said else sse(said, done=False)
    pair.fake.queue(streaming(*upstream_pieces(model)[:4], frame))
    found = stream_error(pair.ask(path, "hi", model, stream=True).body)
    assert "Overloaded now" in found["message"]
    assert found["type"] == ("server_error" if path == CHAT else "overloaded_error")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_object_at_the_end_without_its_prefix_is_an_error(
    pair: Pair, stream: bool
) -> None:
    late = dump({"error": {"message": "late failure", "code": "x"}})
    pair.fake.queue(streaming(*upstream_pieces(GPT)[:3], late))
    reply = pair.ask(CHAT, "hi", stream=stream)
    found = stream_error(reply.body) if stream else error(reply)
    assert "late failure" in found["message"]


@BOTH
@STREAMED
@pytest.mark.parametrize("body", [b"", b": nothing\n\n", b"data: [DONE]\n\n", b"<html>no</html>"])
def test_an_answer_without_an_answer_is_an_error(
    pair: Pair, path: str, stream: bool, body: bytes
) -> None:
    pair.fake.queue(streaming(body))
    reply = pair.ask(path, "hi", stream=stream)
    assert reply.status == 502
    assert error(reply)["message"]
    assert len(pair.fake.calls) == 1


@pytest.mark.parametrize(("path", "stream"), [(CHAT, True), (MESSAGES, False)])
def test_an_upstream_that_falls_silent_ends_with_an_error(
    hasty: Pair, path: str, stream: bool
) -> None:
    hasty.fake.queue(streaming(*upstream_pieces(GPT)[:3], then="hang"))
    reply = hasty.ask(path, "hi", stream=stream)
    found = stream_error(reply.body) if stream else error(reply)
    assert reply.status == (200 if stream else 504)
    assert found["type"] == ("server_error" if path == CHAT else "timeout_error")
    assert hasty.fake.wait_cancelled()
    hasty.fake.cancelled.clear()


def test_an_error_whose_words_do_not_come_is_told_by_its_status(pair: Pair) -> None:
    pair.fake.queue(Answer(413, {"Content-Type": "application/json"}, [b"{"], then="hang"))
    reply = pair.ask(CHAT, "hi", GPT)
    assert reply.status == 413, reply


@BOTH
def test_an_upstream_that_never_answers_is_a_timeout(hasty: Pair, path: str) -> None:
    hasty.fake.calls.clear()
    hasty.fake.queue(Answer(0, then="hang"))
    reply = hasty.ask(path, "hi", stream=True)
    assert reply.status == 504
    assert len(hasty.fake.calls) == 1


# ---- odd streams ---------------------------------------------------------------------------------

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda s: s,
    "CRLF": lambda s: s.replace(b"\n", b"\r\n"),
    "CR": lambda s: s.replace(b"\n", b"\r"),
    "no space": lambda s: s.replace(b"data: ", b"data:").replace(b"event: ", b"event:"),
    "comments": lambda s: b": hello\n\n" + s.replace(b"\n\n", b"\n\n: ping\n\n"),
    "a byte order mark": lambda s: b"\xef\xbb\xbf" + s,
    "no last empty line": lambda s: s.rstrip(b"\n"),
    "no end mark": lambda s: s.replace(b"data: [DONE]\n\n", b""),
    "more fields": lambda s: s.replace(b"data: ", b"id: 7\nretry: 5\ndata: "),
    "no event names": lambda s: b"".join(
        line for line in s.splitlines(True) if not line.startswith(b"event:")
    ),
}


@EVERY_BREAK
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 100_000], ids=["dripped", "at once"])
def test_a_stream_is_understood_in_every_form_and_wherever_it_is_cut(
    pair: Pair, path: str, model: str, form: str, size: int
) -> None:
    kind = MESSAGES if model.startswith("claude") else CHAT
    stream = b"".join(pieces(kind, model, "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} ok"))
    pair.fake.queue(streaming(*drip(FORMS[form](stream), size)))
    said = heard(pair.ask(path, "hi", model, stream=True))
    assert said.text == "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} ok "


@STREAMED
def test_a_connection_whose_last_chunk_comes_late_is_used_again(pair: Pair, stream: bool) -> None:
    answer = b"".join(map(chunk, upstream_pieces(GPT)))
    for _ in range(20):  # the chunk may be later than the next request: then that takes another
        late = threading.Event()
        pair.fake.queue(streaming(answer, chunk(b""), framed=True, pause=late))
        assert heard(pair.ask(CHAT, "hi", stream=stream)).text == "one two three "
        late.set()
        first = pair.fake.calls[-1].connection
        heard(pair.ask(CHAT, "again"))
        if pair.fake.calls[-1].connection == first:
            return
    raise AssertionError("the connection was not used again")


def test_a_stream_is_understood_when_its_chunks_are_cut(pair: Pair) -> None:
    whole = b"".join(map(chunk, upstream_pieces(GPT))) + chunk(b"")
    pair.fake.queue(streaming(*drip(whole), framed=True))
    assert heard(pair.ask(CHAT, "hi", stream=True)).text == "one two three "


@BOTH
@STREAMED
@pytest.mark.parametrize("model", [SONNET, GPT])
def test_json_instead_of_a_stream_is_an_answer_too(
    pair: Pair, path: str, stream: bool, model: str
) -> None:
    if path == MESSAGES and model == SONNET:
        whole: Json = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": model,
            "content": [{"type": "text", "text": "all"},
                        {"type": "tool_use", "id": "c1", "name": "look", "input": {"path": "x"}}],
            "stop_reason": "tool_use", "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 3},
        }  # fmt: skip
    else:
        call = {"id": "c1", "type": "function",
                "function": {"name": "look", "arguments": '{"path":"x"}'}}  # fmt: skip
        message = {"role": "assistant", "content": "all", "tool_calls": [call], "padding": "ab"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
        whole = {"id": "c", "model": model, "choices": [choice], "usage": usage}
    before = pair.usage()
    pair.fake.queue(Answer(200, {"Content-Type": "application/json"}, drip(dump(whole), 50)))
    said = heard(pair.ask(path, "hi", model, stream=stream, tools=[tool(path)]))
    assert (said.text, said.calls) == ("all", [("c1", "look", {"path": "x"})])
    assert pair.usage()["total_tokens"] - before["total_tokens"] == 10


# ---- clients that leave, or read slowly ----------------------------------------------------------


def leave(wire: Wire, how: str) -> None:
    """Ends a connection as a client does that is closed, or killed."""
    if how == "abort":
        wire.abort()
    else:
        wire.sock.close()


@EVERY_BREAK
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("moment", ["head", "first byte", "middle"])
def test_the_upstream_is_left_when_the_client_leaves(
    pair: Pair, path: str, model: str, how: str, moment: str
) -> None:
    some = upstream_pieces(model)
    held = threading.Event()
    answer = {
        "head": Answer(0, {}, [b"", b"x"], pause=held),
        "first byte": streaming(b"", *some, pause=held),
        "middle": streaming(b"".join(some[:4]), *some[4:], pause=held),
    }[moment]
    pair.fake.queue(answer)
    wire = pair.send(path, asking("hi", model, stream=True))
    assert pair.fake.wait_calls(1)
    if moment == "middle":
        wire.read_until(b"one")
    leave(wire, how)
    assert pair.fake.wait_cancelled(2)


@BOTH
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("moment", ["head", "middle"])
def test_the_upstream_of_a_whole_answer_is_left_too(
    pair: Pair, path: str, how: str, moment: str
) -> None:
    held = threading.Event()
    some = upstream_pieces(GPT)
    half = streaming(b"".join(some[:4]), *some[4:], pause=held)
    pair.fake.queue(half if moment == "middle" else Answer(0, {}, [b"", b"x"], pause=held))
    wire = pair.send(path, asking("hi"))
    assert pair.fake.wait_calls(1)
    leave(wire, how)
    assert pair.fake.wait_cancelled(2)


def test_a_client_that_leaves_while_a_limit_is_waited_for_costs_no_second_call(pair: Pair) -> None:
    pair.fake.queue(refusal(429, "slow down", "rate_limited", Retry_After="0.5"))
    wire = pair.send(CHAT, asking("hi"))
    assert pair.fake.wait_calls(1)
    wire.abort()
    assert not pair.fake.wait_calls(2, 1)


#: for what takes time and happens below the dialects
RELAYED_OR_CONVERTED = pytest.mark.parametrize(("path", "model"), [(CHAT, GPT), (MESSAGES, GPT)])


class Watched(list[bytes]):
    """Pieces of an answer that count how many of them were taken."""

    taken = 0

    def __iter__(self) -> Iterator[bytes]:
        self.taken = 0  # the imitation looks at all of them before it sends the first
        for piece in super().__iter__():
            self.taken += 1
            yield piece


def enlarged(some: list[bytes], times: int) -> Watched:
    """A stream whose second word is 16,000 letters long and comes many times."""
    at = next(at for at, piece in enumerate(some) if b"two" in piece)
    long = some[at].replace(b"two", b"x" * 16_000)
    return Watched([*some[:at], *[long] * times, *some[at + 1 :]])


def memory_mib(pid: int) -> float:
    """What a process holds in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def stalled(count: Callable[[], int]) -> int:
    """The count once it has stood still for half a second."""
    deadline = time.monotonic() + 20
    seen, since = count(), time.monotonic()
    while time.monotonic() - since < 0.5 and time.monotonic() < deadline:
        time.sleep(0.02)
        if count() != seen:
            seen, since = count(), time.monotonic()
    return seen


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@RELAYED_OR_CONVERTED
def test_a_slow_reader_holds_the_upstream_back(pair: Pair, path: str, model: str) -> None:
    many = enlarged(upstream_pieces(model), 6000)  # 96 MB
    heard(pair.ask(path, "hi", model))
    before = memory_mib(pair.gateway.pid)
    pair.fake.queue(Answer(200, {"Content-Type": "text/event-stream"}, many))
    body = pair.gateway.request_bytes("POST", path, asking("hi", model, stream=True))
    with pair.gateway.wire(receive_buffer=4096) as wire:
        wire.send(body)
        wire.read_until(b"one")
        drawn = stalled(lambda: many.taken) * 16_000
        grown = memory_mib(pair.gateway.pid) - before
        wire.abort()
    assert drawn < 64 << 20
    assert grown < 32
    assert pair.fake.wait_cancelled(2)


@RELAYED_OR_CONVERTED
def test_a_reader_that_was_slow_gets_every_byte(pair: Pair, path: str, model: str) -> None:
    many = enlarged(upstream_pieces(model), 400)
    pair.fake.queue(Answer(200, {"Content-Type": "text/event-stream"}, many))
    body = pair.gateway.request_bytes("POST", path, asking("hi", model, stream=True))
    with pair.gateway.wire(receive_buffer=4096) as wire:
        wire.send(body)
        stalled(lambda: many.taken)
        assert heard(wire.reply()).text == "one " + ("x" * 16_000 + " ") * 400 + "three "


# ---- the end -------------------------------------------------------------------------------------


@RELAYED_OR_CONVERTED
def test_a_signal_to_stop_ends_a_stream_legally_after_the_drain_time(path: str, model: str) -> None:
    with (
        FakeCopilot(models()) as fake,
        gateway_for(fake, "[server]\ndrain_seconds = 0.3") as gateway,
    ):
        some = upstream_pieces(model)
        held = threading.Event()
        fake.queue(streaming(b"".join(some[:4]), *some[4:], pause=held))
        with Pair(fake, gateway).send(path, asking("hi", model, stream=True)) as wire:
            wire.read_until(b"one")
            gateway.terminate()
            rest = wire.rest(5)
        assert gateway.wait(5) == 0
        assert rest.endswith(b"0\r\n\r\n")
        head = b"message_start" if path == MESSAGES else b""
        assert "stopping" in stream_error(head + b"\n" + rest)["message"]
        assert fake.wait_cancelled(2)
        assert "Traceback" not in gateway.log()


def test_a_stream_that_finishes_while_the_gateway_stops_is_whole(fresh: Pair) -> None:
    some = upstream_pieces(GPT)
    held = threading.Event()
    fresh.fake.queue(streaming(b"".join(some[:4]), *some[4:], pause=held))
    with fresh.send(CHAT, asking("hi", stream=True)) as wire:
        wire.read_until(b"one")
        fresh.gateway.terminate()
        held.set()
        assert b"[DONE]" in wire.rest(5)
    assert fresh.gateway.wait(5) == 0


# ---- usage ---------------------------------------------------------------------------------------


@EVERY_WAY
@STREAMED
def test_usage_is_counted_as_it_was_billed(pair: Pair, path: str, model: str, stream: bool) -> None:
    pair.gateway.request("DELETE", "/v1/usage")
    marked = {"type": "text", "text": f"hi {path} {stream}", "cache_control": {"type": "ephemeral"}}
    words: Any = [marked] if path == MESSAGES else f"hi {path} {stream}"
    said = heard(
        pair.ask(path, words, model, stream=stream, stream_options={"include_usage": True})
    )
    used = bill(pair, 0)
    row = pair.gateway.request("GET", "/v1/usage").json()["providers"]["copilot"]["models"][model]
    prompt = used["input"] + used["cache_read"] + used["cache_write"]
    assert (row["input_tokens"], row["output_tokens"]) == (prompt, used["output"])
    assert (row["cache_read_tokens"], row["cache_write_tokens"]) == (
        used["cache_read"],
        used["cache_write"],
    )
    assert row["credits"] == pytest.approx(copilot_usage(dict(used))["total_nano_aiu"] / 1e9)
    assert (row["request_count"], row["error_count"]) == (1, 0)
    assert said.usage["completion_tokens" if path == CHAT else "output_tokens"] == used["output"]
    if path == CHAT:
        assert said.usage["prompt_tokens"] == prompt
    else:
        assert said.usage["input_tokens"] == used["input"]
        assert said.usage.get("cache_creation_input_tokens", 0) == used["cache_write"]


def test_a_stream_shows_usage_only_to_who_asked(pair: Pair) -> None:
    reply = pair.ask(CHAT, "hi", stream=True)
    assert b'"usage":{' not in reply.body.replace(b" ", b"")
    assert b"copilot_usage" not in reply.body


def test_an_error_before_the_answer_is_not_counted_as_one(limited: Pair) -> None:
    before = limited.usage()
    limited.fake.queue(refusal(402, "You have no quota", "quota_exceeded"))
    limited.ask(CHAT, "hi")
    assert limited.usage()["total_tokens"] == before["total_tokens"]


# ---- secrets -------------------------------------------------------------------------------------

SECRETS = ("PROMPTMARK", "ANSWERMARK", "ARGUMENTMARK", "ghu_", "tid=")


def test_no_token_prompt_or_answer_is_ever_logged_or_told() -> None:
    def brain(dialect: str, body: Json) -> list[Part]:
        if tool_results(dialect, body):
            return [Say("ANSWERMARK done")]
        return [Think("ANSWERMARK"), Say("ANSWERMARK"), Call("look", {"path": "ARGUMENTMARK"})]

    with ExitStack() as stack:
        pair = start(stack, '[logging]\nlevel = "debug"\n', brain)
        fake = pair.fake
        for path, model in BREAKS:
            body = asking("PROMPTMARK", model, tools=[tool(path)], stream=True)
            said = heard(pair.post(path, body))
            assert heard(pair.post(path, answered(path, body, said, ["PROMPTMARK"]))).text
        told = []
        token = fake.calls[-1].headers["authorization"].removeprefix("Bearer ")
        why = f"bad tokens {token} and {fake.github_token}"
        for status in (400, 402, 404, 413, 422, 429, 466):
            fake.queue(refusal(status, why, Retry_After="99999"))
            model = {402: SONNET, 429: GEMINI}.get(status, GPT)  # they rest from then on
            told.append(pair.ask(CHAT, "PROMPTMARK", model))
        fake.queue(streaming(*upstream_pieces(GPT)[:3], sse({"error": {"message": why}})))
        told.append(pair.ask(CHAT, "PROMPTMARK", stream=True))
        fake.queue(streaming(b"data: {ANSWERMARK\n\n"))
        told.append(pair.ask(CHAT, "PROMPTMARK"))
        told.append(pair.gateway.request("POST", CHAT, b'{"model":"PROMPTMARK'))
        told.append(pair.ask(MESSAGES, "PROMPTMARK", "no-such-model"))
        fake.expire_tokens()
        fake.exchange_answers.append(Answer(500, {}, why.encode()))
        told.append(pair.ask(CHAT, "PROMPTMARK"))
        assert 429 not in [reply.status for reply in told[-6:]]
        for place in [pair.gateway.log(), pair.gateway.stdout(), *(str(r.body) for r in told)]:
            assert not [mark for mark in SECRETS if mark in place], place[-3000:]


# ---- marks for the prompt cache ------------------------------------------------------------------


CLOCK = {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object"}}


def loop_body(model: str, **more: Any) -> Json:
    """A tool loop of a caller of OpenAI's chat completions."""
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    tools = [{"type": "function", "function": CLOCK}]
    return {"model": model, "messages": messages, "tools": tools, **more}


def test_what_a_chat_caller_cannot_mark_is_marked_for_claude(pair: Pair) -> None:
    assert pair.post(CHAT, loop_body(SONNET)).status == 200
    messages = pair.fake.calls[-1].body["messages"]
    assert ["copilot_cache_control" in m for m in messages] == [True, True, False, True]
    assert pair.post(CHAT, loop_body(ONLY_MESSAGES)).status == 200
    body = pair.fake.calls[-1].body
    assert body["system"][-1]["cache_control"] == {"type": "ephemeral"}
    marked = ["cache_control" in message["content"][-1] for message in body["messages"]]
    assert marked == [True, False, True]
    item = {"role": "user", "content": "What time is it?"}
    tools = [{"type": "function", **CLOCK}]
    asked = {"model": SONNET, "instructions": "Be brief.", "input": [item], "tools": tools}
    assert pair.post("/v1/responses", asked).status == 200
    body = pair.fake.calls[-1].body
    assert (
        "cache_control" in body["system"][-1] and "cache_control" in dump(body["messages"]).decode()
    )


def test_what_is_asked_once_is_not_marked(pair: Pair) -> None:
    """To write a cache costs more than not to."""
    for model in (SONNET, ONLY_MESSAGES):
        assert pair.ask(CHAT, "hi once", model).status == 200
        assert b"cache_control" not in dump(pair.fake.calls[-1].body)


def test_marks_of_the_caller_and_of_others_models_stay_as_they_are(pair: Pair) -> None:
    own = loop_body(SONNET)
    own["messages"][0] = {"role": "system", "content": [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}  # fmt: skip
    assert pair.post(CHAT, own).status == 200
    messages = pair.fake.calls[-1].body["messages"]
    assert ["copilot_cache_control" in m for m in messages] == [True, False, False, False]
    assert pair.post(CHAT, loop_body(GPT)).status == 200
    assert b"cache_control" not in dump(pair.fake.calls[-1].body)
    said = (("user", "hi"), ("assistant", "yes"), ("user", "go on"))
    turns = [{"role": role, "content": words} for role, words in said]
    native = {"model": SONNET, "max_tokens": 50, "system": "Be brief.", "messages": turns}
    assert pair.post(MESSAGES, native).status == 200
    assert b"cache_control" not in dump(pair.fake.calls[-1].body)


# ---- what a chat client sends in other vendors' shapes -------------------------------------------

PDF = "data:application/pdf;base64,JVBERi0xLjQK"
TEXT_FILE = "data:text/plain;base64,VEhFIFdPUkRT"
IMAGE_URL = f"data:image/png;base64,{PNG}"
FILES: dict[str, Json] = {
    "file": {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
    "input_file": {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
    "document": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF[28:]},
    },
}
TEXT_FILES: dict[str, Json] = {
    "file": {"type": "file", "file": {"filename": "a.txt", "file_data": TEXT_FILE}},
    "document": {"type": "document", "source": {"type": "text", "data": "THE WORDS"}},
}
IMAGES: dict[str, Json] = {
    "image_url": {"type": "image_url", "image_url": {"url": IMAGE_URL}},
    "input_image": {"type": "input_image", "image_url": IMAGE_URL},
    "image": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_pdf_of_a_chat_client_goes_where_it_is_taken(pair: Pair, name: str) -> None:
    reply = pair.ask(CHAT, [{"type": "text", "text": "read"}, FILES[name]], SONNET)
    assert reply.status == 200, reply
    call = pair.fake.calls[-1]
    assert call.path == MESSAGES
    assert [part["type"] for part in call.body["messages"][-1]["content"]] == ["text", "document"]


@pytest.mark.parametrize("model", [GPT, SONNET, GEMINI])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_text_file_of_a_chat_client_becomes_text(pair: Pair, name: str, model: str) -> None:
    reply = pair.ask(CHAT, [{"type": "text", "text": "read"}, TEXT_FILES[name]], model)
    assert reply.status == 200, reply
    assert "THE WORDS" in json.dumps(pair.fake.calls[-1].body)


@pytest.mark.parametrize("model", [GPT, SONNET])
@pytest.mark.parametrize("name", IMAGES)
@BOTH
def test_an_image_in_any_shape_is_announced(pair: Pair, path: str, name: str, model: str) -> None:
    reply = pair.ask(path, [{"type": "text", "text": "look"}, IMAGES[name]], model)
    assert reply.status == 200, reply
    assert pair.fake.calls[-1].headers["copilot-vision-request"] == "true"


@pytest.mark.parametrize("model", [GPT, SONNET])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
        {"type": "container_upload", "file_id": "f"},
        {"type": "file", "file": {"file_id": "file-1"}},
    ],
    ids=lambda part: part["type"],
)
def test_a_part_that_nobody_takes_is_named(pair: Pair, part: Json, model: str) -> None:
    reply = pair.ask(CHAT, [{"type": "text", "text": "hear"}, part], model)
    assert reply.status == 400, reply
    assert reply.json()["error"]["param"].startswith("messages.0.content.1")
    assert not pair.fake.calls


def test_tool_blocks_of_anthropic_in_a_chat_conversation_are_calls(pair: Pair) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"path": "a"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "RESULT"}
    rows = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    assert pair.post(CHAT, {"model": GPT, "messages": rows, "tools": [tool]}).status == 200
    sent = pair.fake.calls[-1].body["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "user"]
    assert (sent[1]["tool_calls"][0]["id"], sent[2]["content"]) == ("t1", "RESULT")
