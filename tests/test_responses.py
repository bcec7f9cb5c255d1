"""The responses endpoint, embeddings, model names and the model list: the real program, end to end.

One gateway stands between the client and the imitations of both services, so that every kind of
model is one name away; the echo provider is the third.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from fake_kiro import FakeKiro
from fake_kiro import default_brain as kiro_brain
from fakes import (
    Answer,
    AnyPart,
    Call,
    FakeCopilot,
    Part,
    Say,
    Seen,
    Stop,
    Think,
    default_brain,
    default_models,
    embeddings_of,
    numbered,
    tokens_in,
    usage_of,
)
from kiro_rules import results_of, tools_of
from support import Gateway, Reply, Wire
from test_copilot import (
    CHAT,
    GEMINI,
    GPT,
    MESSAGES,
    ONLY_MESSAGES,
    OPUS,
    PNG,
    SONNET,
    STREAMED,
    Heard,
    check_end,
    error,
    frames,
    heard,
    leave,
    pieces,
    refusal,
    stream_error,
    streaming,
    user,
)
from test_copilot import answered as answered_before
from test_copilot import image as image_before
from test_copilot import tool as tool_before

import aiclient_api as gw

Json = dict[str, Any]
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
CALLERS = [CHAT, MESSAGES, RESPONSES]
NAMES = ["chat", "messages", "responses"]
EVERY_CALLER = pytest.mark.parametrize("path", CALLERS, ids=NAMES)
OLDER = pytest.mark.parametrize("path", [CHAT, MESSAGES], ids=NAMES[:2])

CODEX = "gpt-5.3-codex"
GPT52 = "gpt-5.2"
#: Served by /responses alone, and used by nobody but the tests that let it rest.
RESTED = "gpt-5.4"
LONG = "claude-sonnet-4.5-1m"
KIRO_SONNET = "kiro/claude-sonnet-4.5"
KIRO_OPUS = "kiro/claude-opus-4.8"
KIRO_GPT = "kiro/gpt-5.6-sol"
ECHO = "echo"
EMBEDDER = "text-embedding-3-small"
#: native, then converted to chat, to messages, to Kiro; the echo speaks chat
COPILOTS = [CODEX, GPT52, GPT, GEMINI, SONNET, OPUS, ONLY_MESSAGES]
KINDS = [*COPILOTS, KIRO_SONNET, KIRO_GPT, ECHO]
EVERY_KIND = pytest.mark.parametrize("model", KINDS)
#: one of each upstream dialect
FEW = pytest.mark.parametrize("model", [CODEX, GPT, SONNET, KIRO_SONNET])
NATIVE_OR_NOT = pytest.mark.parametrize("model", [CODEX, GPT, SONNET])
UPSTREAM_PATHS = {CHAT: "/chat/completions", MESSAGES: "/v1/messages", RESPONSES: "/responses"}


# ---- the three programs --------------------------------------------------------------------------


def entry(name: str, like: str, endpoints: list[str], **more: Any) -> Json:
    """A model of the list that is like another one but for its endpoints."""
    model = copy.deepcopy(next(m for m in default_models() if m.get("id") == like))
    return {**model, "id": name, "name": name, "supported_endpoints": endpoints, **more}


#: "pick-cm": a model of /chat/completions and /v1/messages
PICKS = {
    f"pick-{''.join(key for key, _ in chosen)}": [path for _, path in chosen]
    for chosen in (
        [pair for at, pair in enumerate(zip("cmr", UPSTREAM_PATHS.values())) if subset >> at & 1]
        for subset in range(1, 8)
    )
}


def copilot_models() -> list[Json]:
    """The imitation's list, and what it does not have: a variant, a locked model, odd endpoints."""
    both = ["/chat/completions", "/v1/messages"]
    long = entry(LONG, SONNET, both)
    long["capabilities"]["limits"].update(
        max_context_window_tokens=1_000_000, max_prompt_tokens=936_000
    )
    locked = {"state": "unconfigured", "terms": "Enable access to Claude Opus 5."}
    return [
        *default_models(),
        entry(ONLY_MESSAGES, "claude-haiku-4.5", ["/v1/messages"]),
        long,
        entry("claude-opus-5", OPUS, both, policy=locked),
        entry("claude-haiku-4.5-1m", SONNET, both, policy=locked),
        *(entry(name, GPT, endpoints) for name, endpoints in PICKS.items()),
    ]


def steps_done(body: Json) -> int:
    """How many tool results a body of any of Copilot's dialects holds."""
    text = json.dumps(body)
    return sum(text.count(f'{mark}"') for mark in ('"tool_call_id', '"tool_use_id', "_call_output"))


def brain(dialect: str, body: Json) -> Sequence[AnyPart]:
    """The default one, and some more key words."""
    text = json.dumps(body.get("messages", body.get("input")))
    if "step by step" in text:  # two turns with a thought, some words and two calls in each
        done = steps_done(body) // 2
        calls = [Call("look", {"path": f"{done}"}), Call("read", {"path": f"{done}"})]
        if done < 2:
            return [Think(f"step {done}"), Say(f"Looking {done}."), *calls]
        return [Think("last"), Say("done")]
    if "think twice" in text:
        calls = [Call("look", {"path": "a"}), Call("read", {"path": "b"})]
        if steps_done(body):
            return [Think("last"), Say("done")]
        return [Think("one"), calls[0], Think("two"), calls[1]]
    for mark, reasons in STOPS.items():
        if mark in text:
            return [Say("Part of it"), Stop(reasons[dialect])]
    if "fail with " in text:
        return [Say("Part of it"), Stop(text.partition("fail with ")[2].split()[0].strip('."}]'))]
    return default_brain(dialect, body)


#: key words -> the reason to stop in the words of each dialect
STOPS = {
    "run out of tokens": {"chat": "length", "messages": "max_tokens",
                          "responses": "max_output_tokens"},
    "be filtered": {"chat": "content_filter", "messages": "refusal",
                    "responses": "content_filter"},
}  # fmt: skip


def steps_of_kiro(body: Json) -> list[Part]:
    """The same steps in Kiro's words."""
    state = body["conversationState"]
    turns = [turn.get("userInputMessage", {}) for turn in state.get("history", ())]
    turns.append(state["currentMessage"]["userInputMessage"])
    if not any("step by step" in turn.get("content", "") for turn in turns):
        return list(kiro_brain(body))
    done = sum(len(results_of(turn)) for turn in turns) // 2
    if done < 2 and tools_of(turns[-1]):
        return [Think(f"step {done}"), Say(f"Looking {done}."),
                Call("look", {"path": f"{done}"}), Call("read", {"path": f"{done}"})]  # fmt: skip
    return [Think("last"), Say("done")]


@dataclass
class Trio:
    """A gateway that is signed in to the imitations of both services."""

    fake: FakeCopilot
    kiro: FakeKiro
    gateway: Gateway

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """One request with a body."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request("POST", path, body, fields)

    def get(self, path: str, **headers: str) -> Reply:
        """One request without a body."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request("GET", path, None, fields)

    def ask(self, path: str, words: Any, model: str = CODEX, **more: Any) -> Reply:
        """One request for an answer to `words`."""
        return self.post(path, asking(path, words, model, **more))

    def send(self, path: str, body: Json) -> Wire:
        """A connection on which a request was sent."""
        wire = self.gateway.wire()
        wire.send(self.gateway.request_bytes("POST", path, body))
        return wire

    def seen(self) -> list[Seen]:
        """The calls that arrived at either service."""
        return [*self.fake.calls, *self.kiro.calls]

    def usage(self) -> Json:
        """The total of /v1/usage."""
        total: Json = self.get("/v1/usage").json()["total"]
        return total

    def clear(self) -> None:
        """Forgets what came before."""
        for fake in (self.fake, self.kiro):
            for seen in (fake.requests, fake.calls, fake.cancelled, fake.violations):
                seen.clear()
            fake._queue.clear()  # noqa: SLF001 - what a test before did not take


CONFIG = """
default_provider = "copilot"
[models]
"fast" = "copilot/gpt-4.1"
"smart" = "kiro/claude-opus-4.8"
"gpt-4" = "copilot/gpt-5.3-codex"
"vectors" = "copilot/text-embedding-3-small"
[providers.copilot]
type = "copilot"
github_url = "{copilot}"
github_api_url = "{copilot}"
[providers.kiro]
type = "kiro"
api_url = "{kiro}"
management_url = "{kiro}"
oidc_url = "{kiro}"
auth_url = "{kiro}"
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Trio]:
    """One trio for all tests that leave no trace in it."""
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot(copilot_models(), brain))
        kiro = stack.enter_context(FakeKiro(brain=steps_of_kiro))
        tokens: Json = {
            "copilot": {"type": "copilot", "github_token": fake.github_token},
            "kiro": kiro.token_file(),
        }
        config = CONFIG.format(copilot=fake.url, kiro=kiro.url)
        gateway = stack.enter_context(Gateway(config, tokens))
        stack.callback(check_end, gateway)
        yield Trio(fake, kiro, gateway)


@contextmanager
def fresh_copilot() -> Iterator[tuple[FakeCopilot, Gateway]]:
    """A gateway of one's own with an imitation of Copilot, in which every rule must be kept."""
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot(copilot_models(), brain))
        tokens = {"copilot": {"type": "copilot", "github_token": fake.github_token}}
        config = CONFIG.format(copilot=fake.url, kiro="http://127.0.0.1:9")
        gateway = stack.enter_context(Gateway(config, tokens))
        stack.callback(check_end, gateway)
        yield fake, gateway
        assert fake.violations == []


@pytest.fixture
def trio(running: Trio) -> Iterator[Trio]:
    """The shared trio with empty lists, in which every rule must have been kept afterwards."""
    running.clear()
    yield running
    assert running.fake.violations == []
    assert running.kiro.violations == []


@pytest.fixture
def limited(trio: Trio) -> Iterator[Trio]:
    """The shared trio for tests that make a model rest."""
    yield trio
    for name in ("copilot", "kiro"):
        trio.gateway.control("provider.enable", name=name)


# ---- requests in three dialects ------------------------------------------------------------------

SCHEMA: Json = {
    "type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"],
}  # fmt: skip


def asking(path: str, words: Any, model: str = CODEX, **more: Any) -> Json:
    """A body that asks for an answer to `words`: text, or parts of the endpoint's kind."""
    if path == RESPONSES:
        said = words if isinstance(words, str) else [{"role": "user", "content": words}]
        return {"model": model, "input": said, **more}
    return {"model": model, "max_tokens": 4000, "messages": [user(words)], **more}


def tool(path: str, name: str = "look") -> Json:
    """A tool in the words of an endpoint."""
    if path == RESPONSES:
        return {"type": "function", "name": name, "description": "Looks.", "parameters": SCHEMA}
    return tool_before(path, name)


def image(path: str) -> Json:
    """An image in the words of an endpoint."""
    if path == RESPONSES:
        return {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}",
                "detail": "high"}  # fmt: skip
    return image_before(path)


def words_part(path: str, text: str) -> Json:
    """Text as a part, in the words of an endpoint."""
    return {"type": "input_text" if path == RESPONSES else "text", "text": text}


def hard(path: str) -> Json:
    """What asks a model to think hard, in the words of an endpoint."""
    if path == MESSAGES:
        return {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 8000}
    if path == CHAT:
        return {"reasoning_effort": "high"}
    return {"reasoning": {"effort": "high", "summary": "auto"}}


def answered(path: str, body: Json, said: Heard, results: list[Any]) -> Json:
    """The next body of a tool loop: what the model said, and what its tools did."""
    if path != RESPONSES:
        return answered_before(path, body, said, results)
    items = said.message["output"]
    calls = [item for item in items if item["type"].endswith("_call")]
    outputs = [{"type": f"{call['type']}_output", "call_id": call["call_id"], "output": result}
               for call, result in zip(calls, results, strict=True)]  # fmt: skip
    said_before = body["input"]
    if isinstance(said_before, str):
        said_before = [{"type": "message", "role": "user", "content": said_before}]
    return {**body, "input": [*said_before, *items, *outputs]}


# ---- answers in three dialects -------------------------------------------------------------------

ENDS = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
ID_STARTS = {
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "custom_tool_call": "ctc_",
    "tool_search_call": "tsc_",
}  # fmt: skip
#: which deltas belong to a part
DELTAS_OF = {
    "output_text": "response.output_text",
    "refusal": "response.refusal",
    "summary_text": "response.reasoning_summary_text",
}


def rows_of(body: bytes) -> list[Json]:
    """The events of a responses stream, each under its name and with its number."""
    rows: list[Json] = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            rows.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {rows[-1]['type']}"
    assert [row["sequence_number"] for row in rows] == list(range(len(rows)))
    return rows


def fold_response(rows: list[Json]) -> Json:
    """The response of a stream that keeps OpenAI's grammar, with the items as they were done."""
    first, last = rows[0]["response"], rows[-1]["response"]
    assert rows[0]["type"] == "response.created"
    assert (first["status"], first["output"]) == ("in_progress", [])
    assert last["status"] == ENDS[rows[-1]["type"]]
    told = [row["response"] for row in rows if "response" in row]
    assert len({(r["id"], r["model"], r["object"]) for r in told}) == 1
    assert first["id"].startswith("resp_")
    assert len(first["id"]) <= 64
    done: list[Json] = []
    item: Json | None = None
    heard_: dict[tuple[str, int], str] = {}
    for row in rows[1:-1]:
        kind = row["type"]
        if kind == "response.in_progress":
            continue
        assert row["output_index"] == len(done), row
        if kind == "response.output_item.added":
            assert item is None
            item, heard_ = row["item"], {}
            assert item["id"].startswith(ID_STARTS[item["type"]]), item
            assert len(item["id"]) <= 64
            continue
        assert item is not None, row
        if kind == "response.output_item.done":
            assert (row["item"]["id"], row["item"]["type"]) == (item["id"], item["type"])
            check_item(row["item"], heard_, last["status"])
            done.append(row["item"])
            item = None
            continue
        assert row["item_id"] == item["id"], row
        follow(row, heard_)
    assert item is None or last["status"] == "failed"
    if last["status"] != "failed":
        assert [bare(i) for i in last["output"]] == [bare(i) for i in done]
    return {**last, "output": done}


def bare(item: Json) -> Json:
    """An item without what is encrypted in it."""
    return {key: value for key, value in item.items() if key != "encrypted_content"}


def follow(row: Json, told: dict[tuple[str, int], str]) -> None:
    """Takes one event inside an item into what was told of it."""
    kind: str = row["type"]
    base, _, step = kind.rpartition(".")
    place: int = next((row[k] for k in ("content_index", "summary_index") if k in row), 0)
    if base.endswith("_part"):
        deltas = DELTAS_OF[row["part"]["type"]]
        if step == "added":
            assert (deltas, place) not in told
            told[deltas, place] = ""
        else:
            assert told[deltas, place] == row["part"].get("text", row["part"].get("refusal"))
    elif step == "delta":
        assert (base, place) in told or base not in DELTAS_OF.values(), row
        told[base, place] = told.get((base, place), "") + row["delta"]
    else:
        assert step == "done"
        (text,) = (row[key] for key in ("text", "refusal", "arguments", "input") if key in row)
        assert told.get((base, place), "") == text


def check_item(item: Json, told: dict[tuple[str, int], str], status: str) -> None:
    """A finished item holds what was told of it before."""
    kind = item["type"]
    if kind != "reasoning":
        assert item["status"] == "completed" or status == "incomplete"
    if kind == "message":
        said = [part.get("text", part.get("refusal")) for part in item["content"]]
        assert list(told.values()) == said
    elif kind == "reasoning":
        assert list(told.values()) == [part["text"] for part in item["summary"]]
    elif kind == "function_call":
        assert told["response.function_call_arguments", 0] == item["arguments"]
    elif kind == "custom_tool_call":
        assert told["response.custom_tool_call_input", 0] == item["input"]


def read_response(whole: Json) -> Heard:
    """A response of OpenAI's."""
    assert whole["object"] == "response"
    assert whole["error"] is None
    output = whole["output"]
    parts = [part for item in output if item["type"] == "message" for part in item["content"]]
    thoughts = [part for item in output if item["type"] == "reasoning" for part in item["summary"]]
    calls = [
        (i["call_id"], i["name"], json.loads(i["arguments"]))
        for i in output
        if i["type"] == "function_call"
    ]
    usage = whole["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    return Heard(
        text="".join(part.get("text", part.get("refusal")) for part in parts),
        thinking="\n\n".join(part["text"] for part in thoughts),
        calls=calls,
        finish=(whole["incomplete_details"] or {}).get("reason") or whole["status"],
        model=whole["model"],
        usage=usage,
        message={"output": output},
    )


def hear(reply: Reply) -> Heard:
    """What an answer of any dialect says; asserts that it keeps its grammar."""
    assert reply.status == 200, reply
    assert reply.complete
    if reply.headers["content-type"].startswith("text/event-stream"):
        if b"event: response." not in reply.body[:400]:
            return heard(reply)
        return read_response(fold_response(rows_of(reply.body)))
    whole = reply.json()
    return read_response(whole) if whole.get("object") == "response" else heard(reply)


def call_items(said: Heard) -> list[Json]:
    """The calls among the items of a response."""
    return [item for item in said.message["output"] if item["type"].endswith("_call")]


def bill(seen: Seen) -> tuple[int, int]:
    """(prompt tokens, output tokens) of a first call, as the imitation counts them."""
    dialects = {"/chat/completions": "chat", "/v1/messages": "messages", "/responses": "responses"}
    said = brain(dialects[seen.path], copy.deepcopy(seen.body))
    counts = usage_of(seen.body, said, cached=False)
    return counts["input"] + counts["cache_read"] + counts["cache_write"], counts["output"]


def count_of(path: str, usage: Json) -> tuple[int, int]:
    """(prompt tokens, output tokens) in a usage of any dialect."""
    if path == CHAT:
        return usage["prompt_tokens"], usage["completion_tokens"]
    cached = usage.get("cache_read_input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)
    return usage["input_tokens"] + cached, usage["output_tokens"]


def told_events(words: str = "one two three") -> list[bytes]:
    """A stream of /responses, one piece per event."""
    response = {"id": "r1", "object": "response", "model": CODEX, "output": [], "created_at": 5,
                "status": "in_progress", "error": None, "incomplete_details": None}  # fmt: skip
    part: Json = {"type": "output_text", "text": "", "annotations": []}
    item: Json = {"id": "i1", "type": "message", "role": "assistant", "status": "in_progress",
                  "content": []}  # fmt: skip
    place = {"item_id": "i2", "output_index": 0, "content_index": 0}
    full = "".join(f"{word} " for word in words.split())
    whole = {**item, "status": "completed", "content": [{**part, "text": full}]}
    usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
    end = {**response, "status": "completed", "output": [whole], "usage": usage}
    rows: list[Json] = [
        {"type": "response.created", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **place, "part": part},
        *({"type": "response.output_text.delta", **place, "delta": f"{word} "}
          for word in words.split()),
        {"type": "response.output_text.done", **place, "text": full},
        {"type": "response.content_part.done", **place, "part": {**part, "text": full}},
        {"type": "response.output_item.done", "output_index": 0, "item": whole},
        {"type": "response.completed", "response": end},
    ]  # fmt: skip
    return [numbered(row, first=at) for at, row in enumerate(rows)]


def upstream_pieces(path: str, model: str) -> list[bytes]:
    """A stream as the endpoint writes it that a caller of `model` reaches."""
    if model == CODEX:
        return told_events()
    return pieces(MESSAGES if model.startswith("claude") else CHAT, model)


# ---- every kind of model -------------------------------------------------------------------------


@EVERY_KIND
@STREAMED
def test_every_kind_of_model_answers_a_responses_caller(
    trio: Trio, model: str, stream: bool
) -> None:
    words = f"h\N{SNOWMAN}llo {model} {stream}"
    reply = trio.ask(RESPONSES, words, model, stream=stream)
    said = hear(reply)
    assert words in said.text
    assert (said.finish, said.model) == ("completed", model)
    assert said.usage["input_tokens"] > 1
    assert said.usage["output_tokens"] > 1
    assert reply.headers["x-aiclient-model"] == model.removeprefix("kiro/")
    assert reply.headers["content-type"].startswith(
        "text/event-stream" if stream else "application/json"
    )
    if model in COPILOTS:
        assert trio.fake.calls[0].body["stream"] is True


def test_a_whole_response_repeats_what_was_asked(trio: Trio) -> None:
    more: Json = {
        "tools": [tool(RESPONSES)], "tool_choice": "auto", "metadata": {"a": "b"},
        "reasoning": {"effort": "low"}, "instructions": "Be brief.", "max_output_tokens": 500,
    }  # fmt: skip
    for model in (CODEX, SONNET, KIRO_OPUS):
        whole = trio.ask(RESPONSES, "hi", model, **more).json()
        assert {key: whole[key] for key in ("instructions", "max_output_tokens")} == {
            "instructions": "Be brief.", "max_output_tokens": 500,
        }, model  # fmt: skip
        assert (whole["tool_choice"], whole["tools"][0]["name"]) == ("auto", "look")
        assert whole["reasoning"]["effort"] == "low"
        assert whole["previous_response_id"] is None
        assert whole["store"] is False
        assert isinstance(whole["created_at"], int)


@EVERY_KIND
def test_system_words_of_every_sort_reach_the_model(trio: Trio, model: str) -> None:
    items = [
        {"role": "developer", "content": "You are FIRST."},
        {"type": "message", "role": "system",
         "content": [{"type": "input_text", "text": "You are SECOND."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]  # fmt: skip
    body = {"model": model, "input": items, "instructions": "You are ZEROTH."}
    assert "hi" in hear(trio.post(RESPONSES, body)).text
    sent = json.dumps([seen.body for seen in trio.seen()])
    if model != ECHO:
        places = [sent.index(f"You are {word}.") for word in ("FIRST", "SECOND")]
        assert places == sorted(places)
        assert "You are ZEROTH." in sent


@EVERY_KIND
@STREAMED
def test_tools_are_called_and_their_results_come_back(trio: Trio, model: str, stream: bool) -> None:
    words = f"use the tool; call the tool {stream}"
    body = asking(RESPONSES, words, model, tools=[tool(RESPONSES)], stream=stream)
    said = hear(trio.post(RESPONSES, body))
    ((_, name, arguments),) = said.calls
    assert (name, set(arguments)) == ("look", {"path"})
    assert said.finish == "completed"
    done = hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["four files"])))
    assert "The tool said: four files" in done.text


@pytest.mark.parametrize("model", [m for m in KINDS if m != ECHO])
@STREAMED
def test_tools_are_called_in_parallel_over_several_turns(
    trio: Trio, model: str, stream: bool
) -> None:
    tools = [tool(RESPONSES, "look"), tool(RESPONSES, "read")]
    body = asking(RESPONSES, f"step by step {stream}", model, tools=tools, stream=stream)
    for step in range(2):
        said = hear(trio.post(RESPONSES, body))
        assert [(name, arguments) for _, name, arguments in said.calls] == [
            ("look", {"path": f"{step}"}),
            ("read", {"path": f"{step}"}),
        ]
        assert said.text == f"Looking {step}."
        assert len({call for call, _, _ in said.calls}) == 2
        body = answered(RESPONSES, body, said, [f"one {step}", f"two {step}"])
    assert hear(trio.post(RESPONSES, body)).text == "done"
    sent = json.dumps(trio.seen()[-1].body)
    for words in ("one 0", "two 0", "one 1", "two 1", "Looking 0.", "Looking 1."):
        assert words in sent


@FEW
def test_results_in_another_order_than_their_calls_are_taken(trio: Trio, model: str) -> None:
    tools = [tool(RESPONSES, "look"), tool(RESPONSES, "read")]
    body = asking(RESPONSES, "step by step, disordered", model, tools=tools)
    said = hear(trio.post(RESPONSES, body))
    body = answered(RESPONSES, body, said, ["a", "b"])
    body["input"][-2:] = body["input"][:-3:-1]
    assert len(hear(trio.post(RESPONSES, body)).calls) == 2


PATCH: Json = {
    "type": "custom", "name": "apply_patch", "description": "Patches.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}  # fmt: skip


@pytest.mark.parametrize("model", [CODEX, GPT52, GPT, SONNET, KIRO_SONNET, ECHO])
@STREAMED
def test_a_custom_tool_is_called_with_plain_text(trio: Trio, model: str, stream: bool) -> None:
    body = asking(RESPONSES, "use the tool; call the tool", model, tools=[PATCH], stream=stream)
    said = hear(trio.post(RESPONSES, body))
    (item,) = call_items(said)
    assert (item["type"], item["name"]) == ("custom_tool_call", "apply_patch")
    assert item["input"] in ("example", "echo")
    done = hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["patched"])))
    assert "The tool said: patched" in done.text


@pytest.mark.parametrize("model", [CODEX, GPT, SONNET, KIRO_SONNET, ECHO])
def test_a_custom_tool_can_be_forced(trio: Trio, model: str) -> None:
    choice = {"type": "custom", "name": "apply_patch"}
    more: Json = {"tools": [PATCH, tool(RESPONSES)], "tool_choice": choice}
    assert trio.ask(RESPONSES, "use the tool; call the tool", model, **more).status == 200


NAMESPACE: Json = {
    "type": "namespace", "name": "mcp__x", "description": "",
    "tools": [{"type": "function", "name": "go", "description": "Goes.", "strict": False,
               "parameters": SCHEMA}],
}  # fmt: skip


def named_space(name: str) -> Json:
    """A namespace whose tool has this name."""
    return {**NAMESPACE, "tools": [{**NAMESPACE["tools"][0], "name": name}]}


@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET, ECHO])
@STREAMED
def test_a_tool_of_a_namespace_is_called_by_its_two_names(
    trio: Trio, model: str, stream: bool
) -> None:
    words = "use the tool; call the tool"
    body = asking(RESPONSES, words, model, tools=[NAMESPACE, tool(RESPONSES)], stream=stream)
    said = hear(trio.post(RESPONSES, body))
    (item,) = call_items(said)
    assert (item["type"], item["name"], item["namespace"]) == ("function_call", "go", "mcp__x")
    done = hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["gone"])))
    assert "The tool said: gone" in done.text
    if model != ECHO:
        assert '"mcp__x__go"' in json.dumps(trio.seen()[-1].body)


@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET])
def test_a_tool_of_a_namespace_may_have_long_names(trio: Trio, model: str) -> None:
    space, name = "mcp__" + "s" * 45, "tool.with-a/long_name_" + "n" * 30
    inner = {**NAMESPACE["tools"][0], "name": name}
    tools = [{**NAMESPACE, "name": space, "tools": [inner]}]
    body = asking(RESPONSES, "use the tool; call the tool", model, tools=tools)
    said = hear(trio.post(RESPONSES, body))
    (item,) = call_items(said)
    assert (item["name"], item["namespace"]) == (name, space)
    done = hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["gone"])))
    assert "The tool said: gone" in done.text


@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET])
def test_two_tools_that_would_have_one_name_are_refused(trio: Trio, model: str) -> None:
    tools = [NAMESPACE, tool(RESPONSES, "mcp__x__go")]
    reply = trio.ask(RESPONSES, "hi", model, tools=tools)
    assert reply.status == 400
    assert "mcp__x__go" in error(reply)["message"]
    assert trio.seen() == []


def tells_tools(dialect: str, body: Json) -> list[Part]:
    """Says which tools it was offered."""
    return [Say(json.dumps(body["tools"]))]


@STREAMED
@pytest.mark.parametrize("name", ["go", "go.far/away"])
def test_a_namespace_reaches_an_upstream_that_knows_them(
    trio: Trio, stream: bool, name: str
) -> None:
    body = asking(RESPONSES, f"go {stream}", CODEX, tools=[named_space(name)], stream=stream)
    trio.fake.brain = tells_tools
    try:
        (space,) = json.loads(hear(trio.post(RESPONSES, body)).text)
    finally:
        trio.fake.brain = brain
    assert (space["type"], space["name"]) == ("namespace", "mcp__x")
    call = {"type": "function_call", "call_id": "call_1", "name": space["tools"][0]["name"],
            "namespace": "mcp__x", "arguments": '{"path":"x"}'}  # fmt: skip
    rows = [json.loads(piece.partition(b"data: ")[2]) for piece in told_events()]
    item = {"id": "i1", "status": "completed", **call}
    rows[-1]["response"]["output"] = [item]
    place = {"output_index": 0}
    arguments = "response.function_call_arguments"
    rows[1:-1] = [
        {"type": "response.output_item.added", **place, "item": {**item, "arguments": ""}},
        {"type": f"{arguments}.delta", **place, "item_id": "i2", "delta": '{"path":"x"}'},
        {"type": f"{arguments}.done", **place, "item_id": "i3", "arguments": '{"path":"x"}'},
        {"type": "response.output_item.done", **place, "item": item},
    ]
    trio.fake.queue(streaming(numbered(*rows), strict=True))
    said = hear(trio.post(RESPONSES, body))
    (got,) = call_items(said)
    assert (got["name"], got["namespace"]) == (name, "mcp__x")
    assert hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["gone"]))).text
    sent = next(i for i in trio.fake.calls[-1].body["input"] if i.get("type") == "function_call")
    assert (sent["name"], sent["namespace"]) == (space["tools"][0]["name"], "mcp__x")


@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET])
@STREAMED
def test_a_search_for_tools_is_the_client_s(trio: Trio, model: str, stream: bool) -> None:
    search = {"type": "tool_search", "execution": "client", "description": "Finds tools.",
              "parameters": SCHEMA}  # fmt: skip
    body = asking(RESPONSES, "use the tool; call the tool", model, tools=[search], stream=stream)
    said = hear(trio.post(RESPONSES, body))
    (item,) = call_items(said)
    assert (item["type"], item["execution"], set(item["arguments"])) == (
        "tool_search_call", "client", {"path"},
    )  # fmt: skip
    found = {"type": "tool_search_output", "call_id": item["call_id"], "execution": "client",
             "status": "completed", "tools": [tool(RESPONSES, "found_one")]}  # fmt: skip
    body = {**body, "input": [user("use it"), item, found]}
    assert hear(trio.post(RESPONSES, body)).finish == "completed"
    assert '"found_one"' in json.dumps(trio.seen()[-1].body)


def codex_body(model: str, **more: Any) -> Json:
    """A first request as Codex 0.169 sends it."""
    function = {"type": "function", "strict": False, "description": "Does it.",
                "parameters": {**SCHEMA, "additionalProperties": False}}  # fmt: skip
    names = ("close_agent", "resume_agent", "send_input", "spawn_agent", "wait_agent")
    agents = {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.",
              "tools": [{**function, "name": name} for name in names]}  # fmt: skip

    def said(role: str, at: int, *texts: str) -> Json:
        parts = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "role": role, "id": f"msg_{at}", "content": parts}

    return {
        "model": model, "stream": True, "store": False, "tool_choice": "auto",
        "parallel_tool_calls": True, "include": ["reasoning.encrypted_content"],
        "input": [
            said("developer", 0, "You are a coding agent."),
            said("developer", 1, "Skills.", "Permissions."),
            said("user", 2, "<environment_context>here</environment_context>"),
            said("user", 3, "hello there"),
        ],
        "tools": [
            *({**function, "name": name} for name in ("exec_command", "write_stdin", "view_image")),
            agents, {"type": "web_search", "external_web_access": True}, PATCH,
            {"type": "tool_search", "execution": "client", "description": "Finds tools.",
             "parameters": SCHEMA},
        ],
        "reasoning": {"effort": "high", "summary": "auto"}, "text": {"verbosity": "low"},
        "prompt_cache_key": "0193a1b2-0000-7000-8000-00000EXAMPLE",
        "client_metadata": {"x-codex-installation-id": "EXAMPLE"}, **more,
    }  # fmt: skip


@EVERY_KIND
def test_a_request_as_codex_sends_it_is_answered(trio: Trio, model: str) -> None:
    headers = {"originator": "codex_exec", "session_id": "EXAMPLE", "thread_id": "EXAMPLE",
               "user_agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64) xterm",
               "x_codex_turn_metadata": "{}", "accept": "text/event-stream"}  # fmt: skip
    reply = trio.post(RESPONSES, codex_body(model), **headers)
    assert "hello there" in hear(reply).text
    assert "tools.web_search" in reply.headers.get("x-aiclient-dropped", "")


# ---- reasoning -----------------------------------------------------------------------------------

#: (path, model): thoughts travel in their own dialect, through another one, and beside it
THINKERS = [
    (RESPONSES, CODEX), (RESPONSES, GPT52), (RESPONSES, SONNET), (RESPONSES, OPUS),
    (RESPONSES, ONLY_MESSAGES), (RESPONSES, GEMINI), (RESPONSES, KIRO_OPUS), (RESPONSES, KIRO_GPT),
    (CHAT, CODEX), (MESSAGES, CODEX),
]  # fmt: skip


def signatures(trio: Trio, model: str) -> list[str]:
    """The signatures of thoughts that came before a call, in their order."""
    if model.startswith("kiro/"):
        return list(trio.kiro.issued.texts)[:2]
    sealed = [content for content, calls in trio.fake.issued.sealed.items() if calls]
    return sealed or [s for s, text in trio.fake.issued.texts.items() if text != "last"]


def forget_thoughts(trio: Trio) -> None:
    """Forgets which thoughts were given out before."""
    for issued in (trio.fake.issued, trio.kiro.issued):
        issued.texts.clear()
        issued.sealed.clear()


@pytest.mark.parametrize(("path", "model"), THINKERS)
@STREAMED
def test_thoughts_return_to_their_maker_over_two_tool_turns(
    trio: Trio, path: str, model: str, stream: bool
) -> None:
    forget_thoughts(trio)
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking(path, f"step by step {stream}", model, tools=tools, stream=stream)
    body.update(hard(path))
    for step in range(2):
        said = hear(trio.post(path, body))
        assert said.thinking == ("" if model == KIRO_GPT else f"step {step}")
        if path == CHAT:  # a client that keeps nothing but what the standard has
            said.message.pop("reasoning_content", None)
        body = answered(path, body, said, [f"one {step}", f"two {step}"])
    assert hear(trio.post(path, body)).text == "done"
    sent = json.dumps(trio.seen()[-1].body)
    wanted = signatures(trio, model)
    assert len(wanted) == 2
    assert [sent.count(signature) for signature in wanted] == [1, 1]


@EVERY_CALLER
@STREAMED
def test_thoughts_without_a_summary_return_too(trio: Trio, path: str, stream: bool) -> None:
    forget_thoughts(trio)
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking(path, "step by step, unsaid", CODEX, tools=tools, stream=stream)
    for _ in range(2):
        said = hear(trio.post(path, body))
        assert said.thinking == ""
        body = answered(path, body, said, ["a", "b"])
    assert hear(trio.post(path, body)).text == "done"
    sent = json.dumps(trio.fake.calls[-1].body)
    assert [sent.count(signature) for signature in signatures(trio, CODEX)] == [1, 1]


@EVERY_CALLER
@STREAMED
def test_two_thoughts_of_one_turn_return_in_their_places(
    trio: Trio, path: str, stream: bool
) -> None:
    forget_thoughts(trio)
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking(path, "think twice", CODEX, tools=tools, stream=stream, **hard(path))
    said = hear(trio.post(path, body))
    assert [name for _, name, _ in said.calls] == ["look", "read"]
    assert hear(trio.post(path, answered(path, body, said, ["a", "b"]))).text == "done"
    items = trio.fake.calls[-1].body["input"]
    sent = [item["encrypted_content"] for item in items if item.get("type") == "reasoning"]
    if path != CHAT:  # which has one place for a thought in a message
        assert sent == signatures(trio, CODEX)
        kinds = [item.get("type", "message") for item in items]
        assert kinds[1:5] == ["reasoning", "function_call"] * 2
    else:
        assert set(sent) <= set(signatures(trio, CODEX))
        assert len(sent) == len(set(sent))


@STREAMED
def test_the_last_event_holds_the_same_items_as_those_before(trio: Trio, stream: bool) -> None:
    """Of an upstream whose last event has a worthless copy of what is encrypted."""
    trio.fake.issued.sealed.clear()
    reply = trio.ask(RESPONSES, "think", CODEX, stream=stream, **hard(RESPONSES))
    if stream:
        rows = rows_of(reply.body)
        output = rows[-1]["response"]["output"]
        assert output == [r["item"] for r in rows if r["type"] == "response.output_item.done"]
    else:
        output = reply.json()["output"]
    assert [i["encrypted_content"] for i in output if i["type"] == "reasoning"] == list(
        trio.fake.issued.sealed
    )


def test_reasoning_as_codex_sends_it_back_is_taken(trio: Trio) -> None:
    for model in (CODEX, SONNET):
        body = codex_body(model)
        body["input"].append(user("step by step, by Codex"))
        body["tools"] += [tool(RESPONSES, "look"), tool(RESPONSES, "read")]
        said = hear(trio.post(RESPONSES, body))
        for item in said.message["output"]:
            if item["type"] == "reasoning":
                item["content"] = None
        body = answered(RESPONSES, body, said, ["a", "b"])
        assert hear(trio.post(RESPONSES, body)).text == "Looking 1."


@pytest.mark.parametrize("model", [CODEX, SONNET, GPT, KIRO_SONNET])
def test_reasoning_of_another_maker_is_left_out(trio: Trio, model: str) -> None:
    other = SONNET if model == CODEX else CODEX
    body = asking(RESPONSES, "step by step, elsewhere", other, **hard(RESPONSES))
    body["tools"] = [tool(RESPONSES, "look"), tool(RESPONSES, "read")]
    said = hear(trio.post(RESPONSES, body))
    assert said.thinking == "step 0"
    body = {**answered(RESPONSES, body, said, ["a", "b"]), "model": model}
    assert hear(trio.post(RESPONSES, body)).text == "Looking 1."
    assert 'encrypted_content":' not in json.dumps(trio.seen()[-1].body.get("input"))


def thinks_late(dialect: str, body: Json) -> list[Part]:
    """Tells the summary of its thought only when that is done."""
    return [Think("a\n\nb", late=True), Say("done")]


def test_a_summary_that_comes_late_is_told(trio: Trio) -> None:
    trio.fake.brain = thinks_late
    try:
        for path in CALLERS:
            for stream in (True, False):
                reply = trio.ask(path, "hi", CODEX, stream=stream, **hard(path))
                if path == RESPONSES and stream:  # as it came: without deltas
                    assert b'"text":"b"' in reply.body
                else:
                    assert hear(reply).thinking == "a\n\nb"
    finally:
        trio.fake.brain = brain


@pytest.mark.parametrize(
    "why",
    [
        "input item ID does not belong to this connection",
        "The encrypted content gAAA... could not be verified.",
        "Invalid encrypted_content in input[2]",
    ],
)
@EVERY_CALLER
def test_reasoning_that_is_refused_is_left_out_once(trio: Trio, path: str, why: str) -> None:
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking(path, "step by step, refused", CODEX, tools=tools, **hard(path))
    body = answered(path, body, hear(trio.post(path, body)), ["a", "b"])
    trio.fake.calls.clear()
    trio.fake.queue(refusal(400, why, "invalid_encrypted_content"))
    assert hear(trio.post(path, body)).text == "Looking 1."
    marks = ['encrypted_content":' in json.dumps(c.body["input"]) for c in trio.fake.calls]
    assert marks == [True, False]


# ---- images and structured output ----------------------------------------------------------------


@EVERY_KIND
def test_an_image_of_the_user_is_seen(trio: Trio, model: str) -> None:
    parts = [{"type": "input_text", "text": "<image name=a.png>"}, image(RESPONSES),
             {"type": "input_text", "text": "</image>"}]  # fmt: skip
    said = hear(trio.ask(RESPONSES, parts, model)).text
    assert "I see 1 image(s)." in said or "(images seen: 1)" in said
    hear(trio.ask(RESPONSES, "no image", model))
    headers = [call.headers.get("copilot-vision-request") for call in trio.fake.calls]
    assert headers == (["true", None] if model in COPILOTS else [])


@EVERY_KIND
def test_an_image_that_a_tool_shows_is_seen(trio: Trio, model: str) -> None:
    words = "use the tool; call the tool"
    body = asking(RESPONSES, words, model, tools=[tool(RESPONSES, "view_image")])
    said = hear(trio.post(RESPONSES, body))
    shown = [{"type": "input_image", "image_url": image(RESPONSES)["image_url"]}]
    assert hear(trio.post(RESPONSES, answered(RESPONSES, body, said, [shown]))).text
    sent = trio.seen()[-1:]
    assert model == ECHO or PNG in json.dumps(sent[0].body)


WANTED: Json = {
    "type": "object", "properties": {"colour_of_it": {"type": "string"}},
    "required": ["colour_of_it"], "additionalProperties": False,
}  # fmt: skip


@EVERY_KIND
def test_a_wanted_shape_reaches_the_model(trio: Trio, model: str) -> None:
    shape = {"type": "json_schema", "name": "codex_output_schema", "strict": True,
             "schema": WANTED}  # fmt: skip
    reply = trio.ask(RESPONSES, "hi", model, text={"format": shape, "verbosity": "low"})
    assert hear(reply).finish == "completed"
    assert all("colour_of_it" in json.dumps(seen.body) for seen in trio.seen())


@OLDER
def test_a_wanted_shape_of_an_older_caller_reaches_a_responses_model(trio: Trio, path: str) -> None:
    named = {"name": "it", "schema": WANTED, "strict": True}
    more: Json = {"response_format": {"type": "json_schema", "json_schema": named}}
    if path == MESSAGES:
        more = {"output_config": {"format": {"type": "json_schema", "schema": WANTED}}}
    assert hear(trio.ask(path, "hi", CODEX, **more)).text
    sent = trio.fake.calls[0].body["text"]["format"]
    assert (sent["type"], sent["schema"]) == ("json_schema", WANTED)


# ---- what a native upstream would refuse ---------------------------------------------------------

LONG_CALL = "call_" + "x" * 85
CALLED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"path":"a"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "ok"}
#: name -> (items behind the first of the user, other members)
ODD: dict[str, tuple[list[Json], Json]] = {
    "vendor keys": ([], {"service_tier": "auto", "user": "u", "safety_identifier": "s",
                         "metadata": {"a": "b"}, "stream_options": {"include_obfuscation": False},
                         "client_metadata": {"a": "b"}, "background": False, "store": True,
                         "previous_response_id": None, "conversation": None, "prompt": None,
                         "max_tool_calls": 4, "top_logprobs": 0}),
    "settings": ([], {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 1,
                      "truncation": "auto"}),
    "too many tokens": ([], {"max_output_tokens": 10_000_000}),
    "include": ([], {"include": ["file_search_call.results", "reasoning.encrypted_content"]}),
    "effort max": ([], {"reasoning": {"effort": "max", "summary": "auto"}}),
    "effort minimal": ([], {"reasoning": {"effort": "minimal"}}),
    "summary concise": ([], {"reasoning": {"effort": "low", "summary": "concise"}}),
    "summary nulls": ([], {"reasoning": {"effort": None, "summary": None}}),
    "generate_summary": ([], {"reasoning": {"effort": "low", "generate_summary": "auto"}}),
    "verbosity": ([], {"text": {"verbosity": "high", "format": {"type": "text"}}}),
    "hosted tool beside": ([], {"tools": [tool(RESPONSES), {"type": "web_search"},
                                          {"type": "image_generation"}]}),
    "no parameters": ([], {"tools": [{"type": "function", "name": "look", "parameters": None,
                                      "strict": None}]}),
    "deferred tool": ([], {"tools": [{**tool(RESPONSES), "defer_loading": True}]}),
    "schema of MCP": ([], {"tools": [{
        "type": "function", "name": "look", "strict": False,
        "parameters": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
                       "properties": {"many": {"type": "array"}}},
    }]}),
    "namespaced schema of MCP": ([], {"tools": [{
        "type": "namespace", "name": "mcp__y", "description": "",
        "tools": [{"type": "function", "name": "a.dotted/name", "parameters": None}],
    }]}),
    "odd tool name": ([], {"tools": [tool(RESPONSES, "a.dotted/" + "name" * 20)]}),
    "allowed tools": ([], {"tools": [tool(RESPONSES)], "tool_choice": {
        "type": "allowed_tools", "mode": "auto",
        "tools": [{"type": "function", "name": "look"}]}}),
    "allowed odd tool": ([], {"tools": [tool(RESPONSES, "a.dotted.name")], "tool_choice": {
        "type": "allowed_tools", "mode": "auto",
        "tools": [{"type": "function", "name": "a.dotted.name"}]}}),
    "choice without tools": ([], {"tools": [], "tool_choice": "auto",
                                  "parallel_tool_calls": True}),
    "image without detail": ([user([{"type": "input_image",
                                     "image_url": image(RESPONSES)["image_url"]}])], {}),
    "image of any detail": ([user([{**image(RESPONSES), "detail": "original"}])], {}),
    "empty assistant": ([{"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "", "annotations": []}]}, user("go on")], {}),
    "no assistant content": ([{"role": "assistant", "content": ""}, user("go on")], {}),
    "empty user part": ([user([{"type": "input_text", "text": ""},
                               {"type": "input_text", "text": "go on"}])], {}),
    "assistant string": ([{"role": "assistant", "content": "before"}, user("go on")], {}),
    "refusal": ([{"type": "message", "role": "assistant", "content": [
        {"type": "refusal", "refusal": "No."}]}, user("go on")], {}),
    "no arguments": ([{**CALLED, "arguments": ""}, RESULT], {}),
    "cut arguments": ([{**CALLED, "arguments": '{"path":'}, RESULT], {}),
    "long call id": ([{**CALLED, "call_id": LONG_CALL}, {**RESULT, "call_id": LONG_CALL}], {}),
    "foreign ids": ([{**CALLED, "id": "x" * 400, "status": None},
                     {**RESULT, "id": "toolu_1", "status": "completed"}], {}),
    "no output": ([CALLED, user("go on")], {}),
    "no call": ([RESULT, user("go on")], {}),
    "words between": ([CALLED, {"role": "developer", "content": "Mind."}, RESULT], {}),
    "assistant between": ([CALLED, {"role": "assistant", "content": "note"}, RESULT], {}),
    "output of nothing": ([CALLED, {**RESULT, "output": ""}], {}),
    "output of parts": ([CALLED, {**RESULT, "output": [{"type": "input_text", "text": "t"}]}], {}),
    "output of no parts": ([CALLED, {**RESULT, "output": []}], {}),
    "bare reasoning": ([{"type": "reasoning", "summary": [], "id": "rs_1"},
                        {"role": "assistant", "content": "before"}, user("go on")], {}),
    "late developer": ([{"role": "assistant", "content": "b"}, user("c"),
                        {"role": "developer", "content": "Mind."}], {}),
    "hosted history": ([{"type": "web_search_call", "id": "ws_1", "status": "completed",
                         "action": {"type": "search", "query": "q"}},
                        {"role": "assistant", "content": "found"}, user("go on")], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@FEW
def test_an_odd_but_honest_request_is_answered(trio: Trio, model: str, name: str) -> None:
    items, more = copy.deepcopy(ODD[name])
    body = {"model": model, "input": [user("hello"), *items], **more}
    said = hear(trio.post(RESPONSES, body))
    assert said.finish == "completed"
    assert said.text
    if (name, model) == ("words between", SONNET):  # the imitation takes the words for the user's
        trio.fake.violations.remove("X-Initiator is agent, should be user")


SHELL_CALL = {"type": "local_shell_call", "id": "lsh_1", "call_id": "c9", "status": "completed",
              "action": {"type": "exec", "command": ["ls"], "env": {}}}  # fmt: skip
#: items that only a vendor's own upstream knows -> words that have to arrive
FOREIGN: list[tuple[list[Json], str]] = [
    ([SHELL_CALL, {"type": "local_shell_call_output", "call_id": "c9", "output": "9 files"}],
     "9 files"),
    ([{"type": "custom_tool_call", "call_id": "c8", "name": "apply_patch", "input": "*** Begin"},
      {"type": "custom_tool_call_output", "call_id": "c8", "output": "patched 3"}], "*** Begin"),
    ([{"type": "additional_tools", "role": "developer", "tools": [tool(RESPONSES, "later_one")]}],
     "later_one"),
    ([CALLED, {**RESULT, "output": [{"type": "input_text", "text": "part 7"},
                                    image(RESPONSES)]}], "part 7"),
]  # fmt: skip


@pytest.mark.parametrize(("items", "words"), FOREIGN)
@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET])
def test_items_of_a_vendor_s_own_become_words_and_tools(
    trio: Trio, model: str, items: list[Json], words: str
) -> None:
    body = {"model": model, "input": [user("hello"), *copy.deepcopy(items)]}
    assert hear(trio.post(RESPONSES, body)).text
    assert words in json.dumps(trio.seen()[-1].body)


def test_settings_that_a_native_upstream_takes_stay(trio: Trio) -> None:
    more: Json = {
        "instructions": "Be brief.", "truncation": "auto", "parallel_tool_calls": False,
        "prompt_cache_key": "k", "text": {"verbosity": "low"}, "tools": [PATCH, tool(RESPONSES)],
        "tool_choice": {"type": "function", "name": "look"}, "max_output_tokens": 300,
        "context_management": [{"type": "compaction", "compact_threshold": 200_000}],
        "reasoning": {"effort": "xhigh", "summary": "detailed"},
    }  # fmt: skip
    assert trio.ask(RESPONSES, "hi", CODEX, **more).status == 200
    sent = trio.fake.calls[0].body
    sent["tools"][1].pop("strict", None)
    assert {key: sent[key] for key in more} == more
    assert sent["store"] is False
    assert sent["include"] == ["reasoning.encrypted_content"]


@FEW
@STREAMED
def test_a_long_tool_name_is_the_caller_s_again(trio: Trio, model: str, stream: bool) -> None:
    name = "mcp__server.tool/" + "n" * 60
    body = asking(RESPONSES, "use the tool; call the tool", model, tools=[tool(RESPONSES, name)])
    said = hear(trio.post(RESPONSES, {**body, "stream": stream}))
    assert [called for _, called, _ in said.calls] == [name]
    done = hear(trio.post(RESPONSES, answered(RESPONSES, body, said, ["well"])))
    assert "The tool said: well" in done.text


@pytest.mark.parametrize("model", [CODEX, GPT52, GPT, GEMINI, SONNET, OPUS])
@pytest.mark.parametrize(
    ("words", "reason"),
    [("run out of tokens", "max_output_tokens"), ("be filtered", "content_filter")],
)
@STREAMED
def test_an_answer_that_is_cut_short_says_why(
    trio: Trio, model: str, words: str, reason: str, stream: bool
) -> None:
    said = hear(trio.ask(RESPONSES, words, model, stream=stream))
    assert said.text.startswith("Part of it")
    refused = reason == "content_filter" and model in (SONNET, OPUS)
    assert said.finish in ((reason, "completed") if refused else (reason,))


# ---- older callers of a model that has only /responses -------------------------------------------


@OLDER
@STREAMED
@pytest.mark.parametrize("model", [CODEX, "pick-r"])
def test_an_older_caller_is_answered_by_a_responses_model(
    trio: Trio, path: str, model: str, stream: bool
) -> None:
    words = f"h\N{SNOWMAN}llo {path} {stream}"
    more: Json = {"stream_options": {"include_usage": True}} if path == CHAT and stream else {}
    before = trio.usage()
    reply = trio.ask(path, words, model, stream=stream, **more)
    said = hear(reply)
    assert said.text == f"Hello from {model}. You said: {words}"
    assert said.finish == ("stop" if path == CHAT else "end_turn")
    assert said.model == reply.headers["x-aiclient-model"] == model
    prompt, output = bill(trio.fake.calls[0])
    assert count_of(path, said.usage) == (prompt, output)
    now = trio.usage()
    assert now["total_tokens"] - before["total_tokens"] == prompt + output
    assert trio.fake.calls[0].path == "/responses"


@OLDER
@STREAMED
def test_an_older_caller_s_tools_are_called_in_parallel_over_several_turns(
    trio: Trio, path: str, stream: bool
) -> None:
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking(path, f"step by step, older {stream}", CODEX, tools=tools, stream=stream)
    for step in range(2):
        said = hear(trio.post(path, body))
        assert [(name, arguments["path"]) for _, name, arguments in said.calls] == [
            ("look", f"{step}"),
            ("read", f"{step}"),
        ]
        assert said.text == f"Looking {step}."
        assert said.finish == ("tool_calls" if path == CHAT else "tool_use")
        body = answered(path, body, said, [f"one {step}", f"two {step}"])
    assert hear(trio.post(path, body)).text == "done"


@OLDER
def test_an_older_caller_s_images_are_seen(trio: Trio, path: str) -> None:
    said = hear(trio.ask(path, [image(path), words_part(path, "look")], CODEX))
    assert "I see 1 image(s)." in said.text
    body = asking(path, "use the tool", CODEX, tools=[tool(path)])
    results: list[Any] = [[image(path)] if path == MESSAGES else "seen"]
    body = answered(path, body, hear(trio.post(path, body)), results)
    assert hear(trio.post(path, body)).text
    assert path == CHAT or PNG in json.dumps(trio.fake.calls[-1].body)
    assert trio.fake.calls[0].headers["copilot-vision-request"] == "true"


@OLDER
@STREAMED
def test_a_stop_string_ends_the_answer_of_a_responses_model(
    trio: Trio, path: str, stream: bool
) -> None:
    more: Json = {"stop": ["END"]} if path == CHAT else {"stop_sequences": ["END"]}
    reply = trio.ask(path, "alpha END beta", CODEX, stream=stream, **more)
    said = hear(reply)
    assert said.text == f"Hello from {CODEX}. You said: alpha "
    assert said.finish == ("stop" if path == CHAT else "stop_sequence")
    assert b"beta" not in reply.body
    if path == MESSAGES:
        assert b'"stop_sequence":"END"' in reply.body
    assert "stop" not in trio.fake.calls[0].body


@OLDER
@pytest.mark.parametrize(("asked", "sent"), [(1, 16), (5000, 5000), (900_000, 128_000)])
def test_a_limit_of_an_older_caller_fits_a_responses_model(
    trio: Trio, path: str, asked: int, sent: int
) -> None:
    assert trio.ask(path, "hi", CODEX, max_tokens=asked).status == 200
    assert trio.fake.calls[0].body["max_output_tokens"] == sent


@OLDER
@pytest.mark.parametrize(
    ("words", "chat", "messages"),
    [
        ("run out of tokens", "length", "max_tokens"),
        ("be filtered", "content_filter", "refusal"),
    ],
)
@STREAMED
def test_an_older_caller_is_told_why_an_answer_is_cut_short(
    trio: Trio, path: str, words: str, chat: str, messages: str, stream: bool
) -> None:
    said = hear(trio.ask(path, words, CODEX, stream=stream))
    assert said.finish == (chat if path == CHAT else messages)
    assert said.text.startswith("Part of it")


@OLDER
def test_settings_of_an_older_caller_are_taken_by_a_responses_model(trio: Trio, path: str) -> None:
    more: Json = {"temperature": 0.3, "top_p": 0.9, "tools": [tool(path)]}
    if path == CHAT:
        more |= {"tool_choice": {"type": "function", "function": {"name": "look"}}, "seed": 1,
                 "parallel_tool_calls": False, "reasoning_effort": "minimal", "user": "u",
                 "presence_penalty": 0, "verbosity": "low"}  # fmt: skip
    else:
        choice = {"type": "tool", "name": "look", "disable_parallel_tool_use": True}
        more |= {"tool_choice": choice, "system": [{"type": "text", "text": "Be brief."}],
                 "metadata": {"user_id": "u"}, "top_k": 5}  # fmt: skip
    assert trio.ask(path, "hi", CODEX, **more).status == 200
    sent = trio.fake.calls[0].body
    assert sent["tool_choice"] == {"type": "function", "name": "look"}
    assert sent["parallel_tool_calls"] is False
    assert path == CHAT or sent["instructions"] == "Be brief."


def test_several_choices_are_refused_for_a_responses_model(trio: Trio) -> None:
    reply = trio.ask(CHAT, "hi", CODEX, n=2)
    assert (reply.status, error(reply)["param"]) == (400, "n")
    assert trio.fake.calls == []


# ---- errors --------------------------------------------------------------------------------------


@EVERY_KIND
@STREAMED
@pytest.mark.parametrize("key", ["previous_response_id", "conversation"])
def test_an_answer_of_before_is_not_stored(trio: Trio, model: str, key: str, stream: bool) -> None:
    reply = trio.ask(RESPONSES, "hi", model, stream=stream, **{key: "resp_1"})
    assert reply.status == 400
    said = error(reply)
    assert (said["type"], said["code"], said["param"]) == (
        "invalid_request_error", "previous_response_not_found", key,
    )  # fmt: skip
    assert trio.seen() == []


@FEW
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"model": 5}, "model"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    trio: Trio, model: str, more: Json, param: str
) -> None:
    reply = trio.post(RESPONSES, {**asking(RESPONSES, "hi", model), **more})
    assert reply.status == 400
    said = error(reply)
    assert said["type"] == "invalid_request_error"
    assert str(said["param"]).startswith(param)
    if "item_reference" in json.dumps(more):
        assert said["code"] == "invalid_item_reference"
    assert trio.seen() == []


@pytest.mark.parametrize("model", [GPT, SONNET, KIRO_SONNET])
@pytest.mark.parametrize(
    "item",
    [{"type": "compaction", "encrypted_content": "foreign"}, {"type": "no_such_item"}],
)
def test_an_item_that_cannot_be_converted_is_named(trio: Trio, model: str, item: Json) -> None:
    reply = trio.post(RESPONSES, {"model": model, "input": [user("hi"), item]})
    assert reply.status == 400
    assert str(error(reply)["param"]).startswith("input")
    assert item["type"] in error(reply)["message"]
    assert trio.seen() == []


@pytest.fixture(scope="module")
def signed_out() -> Iterator[Gateway]:
    """A gateway without any sign-in, whose services are out of reach."""
    away = "http://127.0.0.1:9"
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(CONFIG.format(copilot=away, kiro=away)))
        stack.callback(check_end, gateway)
        yield gateway


@pytest.mark.parametrize("model", ["copilot/gpt-5.3-codex", KIRO_SONNET, CODEX])
@STREAMED
def test_a_missing_sign_in_is_not_for_codex_to_retry(
    signed_out: Gateway, model: str, stream: bool
) -> None:
    body = asking(RESPONSES, "hi", model, stream=stream)
    reply = signed_out.request("POST", RESPONSES, body)
    said = error(reply)
    assert reply.status == 400
    assert (said["type"], said["code"]) == ("invalid_request_error", "provider_not_authenticated")
    assert "sign-in" in said["message"]


def test_what_needs_no_sign_in_works_without_one(signed_out: Gateway) -> None:
    for path in CALLERS:
        assert hear(signed_out.request("POST", path, asking(path, "hi", ECHO))).text
    assert signed_out.request("GET", "/v1/models").status == 200
    reply = signed_out.request("POST", EMBEDDINGS, {"model": EMBEDDER, "input": "hi"})
    assert reply.status in (400, 503)
    assert error(reply)["code"] == "provider_not_authenticated"


@EVERY_CALLER
@STREAMED
@pytest.mark.parametrize("model", ["gpt-5.3-codecs", "copilot/gpt-5.3-codecs"])
def test_a_model_that_nobody_has_is_a_404_with_the_nearest(
    trio: Trio, path: str, model: str, stream: bool
) -> None:
    reply = trio.ask(path, "hi", model, stream=stream)
    assert reply.status == 404
    said = error(reply)
    if path == MESSAGES:
        assert said["type"] == "not_found_error"
    else:
        assert (said["code"], said["param"]) == ("model_not_found", "model")
    if not model.startswith("copilot/"):
        assert CODEX in said["message"]
        assert trio.seen() == []
    trio.fake.violations.clear()  # a name with its provider is tried, listed or not


@NATIVE_OR_NOT
@STREAMED
def test_a_used_up_quota_is_told_and_not_tried_again(
    limited: Trio, model: str, stream: bool
) -> None:
    limited.fake.queue(refusal(402, "You have no quota", "quota_exceeded", Retry_After="600000"))
    reply = limited.ask(RESPONSES, "hi", model, stream=stream)
    said = error(reply)
    assert (reply.status, said["type"], said["code"]) == (
        429, "usage_limit_reached", "insufficient_quota",
    )  # fmt: skip
    assert reply.headers["x-should-retry"] == "false"
    assert int(reply.headers.get("retry-after", "1")) <= 60
    assert len(limited.fake.calls) == 1


@pytest.mark.parametrize("model", [RESTED, "pick-m", "pick-c"])
def test_a_rate_limit_is_told_with_its_time(trio: Trio, model: str) -> None:
    trio.fake.queue(refusal(429, "slow down", "user_model_rate_limited", Retry_After="42"))
    for _ in range(2):  # the second one is answered here: the model rests
        reply = trio.ask(RESPONSES, "hi", model, stream=True)
        said = error(reply)
        assert (reply.status, said["code"]) == (429, "rate_limit_exceeded")
        assert 40 <= int(reply.headers["retry-after"]) <= 42
    assert len(trio.fake.calls) == 1


@pytest.mark.parametrize(("wait_s", "stops"), [(None, False), (42.0, False), (183_600.0, True)])
def test_a_rate_limit_of_hours_is_one_that_codex_stops_at(
    wait_s: float | None, stops: bool
) -> None:
    async def told() -> gw.ApiError:
        rests = gw.Breaker()
        rests.open("m", gw.RateLimited("slow down", retry_after=wait_s), 42.0)
        with pytest.raises(gw.RateLimited) as second:
            rests.check("m")
        return second.value

    error = asyncio.run(told())  # the second one, told while the model rests
    assert (
        gw.RESPONSES.error_body(error, "req_1")["error"]["type"] == "usage_limit_reached"
    ) == stops
    assert (gw.error_headers(error).get("x-should-retry") == "false") == stops


@NATIVE_OR_NOT
def test_a_short_rate_limit_is_waited_for(trio: Trio, model: str) -> None:
    trio.fake.queue(refusal(429, "slow down", "user_model_rate_limited", Retry_After="0"))
    assert hear(trio.ask(RESPONSES, "hi", model, stream=True)).text
    assert len(trio.fake.calls) == 2


TOO_LONG = "prompt token count of 300000 exceeds the limit of 272000"


@EVERY_CALLER
@STREAMED
@NATIVE_OR_NOT
def test_a_prompt_that_is_too_long_is_said_in_the_caller_s_words(
    trio: Trio, path: str, model: str, stream: bool
) -> None:
    trio.fake.queue(refusal(400, TOO_LONG, "model_max_prompt_tokens_exceeded"))
    reply = trio.ask(path, "hi", model, stream=stream)
    said = error(reply)
    assert reply.status == 400
    text = "prompt is too long: 300000 tokens > 272000 maximum"
    if path != MESSAGES:
        text = "is 272000 tokens. However, your messages resulted in 300000 tokens."
    assert text in said["message"]
    assert path == MESSAGES or said["code"] == "context_length_exceeded"
    assert len(trio.fake.calls) == 1


def test_a_prompt_that_is_too_long_names_its_field(trio: Trio) -> None:
    for path, param in ((RESPONSES, "input"), (CHAT, "messages")):
        trio.fake.queue(refusal(400, TOO_LONG, "model_max_prompt_tokens_exceeded"))
        assert error(trio.ask(path, "hi", CODEX))["param"] == param


@NATIVE_OR_NOT
@STREAMED
def test_a_failure_of_the_upstream_is_tried_again(trio: Trio, model: str, stream: bool) -> None:
    trio.fake.queue(refusal(500, "oops"))
    assert hear(trio.ask(RESPONSES, "hi", model, stream=stream)).text
    assert len(trio.fake.calls) == 2


def test_a_lasting_failure_of_the_upstream_is_a_502(trio: Trio) -> None:
    for _ in range(3):
        trio.fake.queue(refusal(500, "oops"))
    reply = trio.ask(RESPONSES, "hi", CODEX, stream=True)
    assert (reply.status, error(reply)["type"]) == (502, "server_error")
    assert len(trio.fake.calls) == 3


@pytest.mark.parametrize("path", [*CALLERS, EMBEDDINGS])
def test_a_stale_token_is_renewed_once(path: str) -> None:
    body = asking(path, "hi", CODEX)
    if path == EMBEDDINGS:
        body = {"model": EMBEDDER, "input": "hi"}
    with fresh_copilot() as (fake, gateway):
        assert gateway.request("POST", path, body).status == 200
        fake.expire_tokens()
        assert gateway.request("POST", path, body).status == 200
        assert fake.exchanges == 2
        assert len(fake.calls) == 3


@NATIVE_OR_NOT
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("moment", ["head", "middle", "whole"])
def test_the_upstream_is_left_when_the_client_leaves(
    trio: Trio, model: str, how: str, moment: str
) -> None:
    held = threading.Event()
    some = upstream_pieces(RESPONSES, model)
    half = streaming(b"".join(some[:4]), *some[4:], pause=held)
    trio.fake.queue(Answer(0, {}, [b"", b"x"], pause=held) if moment == "head" else half)
    body = asking(RESPONSES, "hi", model, stream=moment != "whole")
    wire = trio.send(RESPONSES, body)
    assert trio.fake.wait_calls(1)
    if moment == "middle":
        wire.read_until(b"one")
    leave(wire, how)
    assert trio.fake.wait_cancelled(2)


@NATIVE_OR_NOT
@pytest.mark.parametrize("then", ["close", "reset", "keep"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_stream_that_breaks_off_ends_with_response_failed(
    trio: Trio, model: str, then: str, at: int
) -> None:
    some = upstream_pieces(RESPONSES, model)
    trio.fake.queue(streaming(*some[:at], then=then))
    reply = trio.ask(RESPONSES, "hi", model, stream=True)
    assert (reply.status, reply.complete) == (200, True)
    rows = rows_of(reply.body)
    assert rows[-1]["type"] == "response.failed"
    failed = rows[-1]["response"]
    assert failed["status"] == "failed"
    assert failed["error"]["code"]
    assert failed["error"]["message"]
    assert not {"response.completed", "response.incomplete"} & {row["type"] for row in rows}
    trio.fake.queue(streaming(*some[:at], then=then))
    whole = trio.ask(RESPONSES, "hi", model)
    assert (whole.status, error(whole)["type"]) == (502, "server_error")


@NATIVE_OR_NOT
def test_a_stream_that_breaks_off_has_the_vendor_s_code(trio: Trio, model: str) -> None:
    trio.fake.queue(streaming(*upstream_pieces(RESPONSES, model)[:4], then="close"))
    failed = rows_of(trio.ask(RESPONSES, "hi", model, stream=True).body)[-1]["response"]
    assert failed["error"]["code"] == "server_error"


@OLDER
def test_a_responses_stream_that_breaks_off_is_an_error_of_an_older_caller(
    trio: Trio, path: str
) -> None:
    trio.fake.queue(streaming(*told_events()[:5], then="close"))
    reply = trio.ask(path, "hi", CODEX, stream=True)
    assert stream_error(reply.body)["message"]
    trio.fake.queue(streaming(*told_events()[:5], then="close"))
    assert trio.ask(path, "hi", CODEX).status == 502


#: code of a failed response -> the status for who wants it whole
FAILURES = {
    "server_error": 502,
    "context_length_exceeded": 400,
    "insufficient_quota": 429,
    "rate_limit_exceeded": 429,
    "invalid_prompt": 400,
}


@pytest.mark.parametrize("code", [*FAILURES, "cyber_policy"])
@pytest.mark.parametrize("user_agent", ["codex_exec/0.169.0", "python"])
def test_a_failed_response_keeps_its_code(limited: Trio, code: str, user_agent: str) -> None:
    body = asking(RESPONSES, f"fail with {code} .", CODEX, stream=True)
    rows = rows_of(limited.post(RESPONSES, body, user_agent=user_agent).body)
    assert rows[-1]["type"] == "response.failed"
    assert rows[-1]["response"]["error"]["code"] == code
    if code != "context_length_exceeded":  # which has words that clients know
        assert f"The answer failed: {code}" in rows[-1]["response"]["error"]["message"]


@EVERY_CALLER
@pytest.mark.parametrize(("code", "status"), FAILURES.items())
def test_a_failed_response_is_an_error_of_every_caller(
    limited: Trio, path: str, code: str, status: int
) -> None:
    body = asking(path, f"fail with {code} .", CODEX, stream=True)
    if path != RESPONSES:
        assert stream_error(limited.post(path, body).body)["message"]
    assert limited.post(path, {**body, "stream": False}).status == status


@STREAMED
def test_an_error_event_that_is_nested_is_understood(limited: Trio, stream: bool) -> None:
    rows = told_events()[:4]
    nested = {
        "type": "error",
        "error": {"code": "rate_limit_exceeded", "message": "try again"},
        "copilot_quota_snapshots": {"premium_interactions": {"entitlement": "1500"}},
    }
    limited.fake.queue(streaming(*rows, numbered(nested, first=4)))
    reply = limited.ask(RESPONSES, "hi", CODEX, stream=stream)
    if stream:
        failed = rows_of(reply.body)[-1]["response"]["error"]
        assert (failed["code"], "try again" in failed["message"]) == ("rate_limit_exceeded", True)
    else:
        assert (reply.status, error(reply)["code"]) == (429, "rate_limit_exceeded")


@EVERY_CALLER
def test_an_error_event_in_the_place_of_an_answer_is_a_status(limited: Trio, path: str) -> None:
    nested = {"type": "error", "error": {"code": "rate_limit_exceeded", "message": "no"}}
    limited.fake.queue(streaming(numbered(nested)))
    assert limited.ask(path, "hi", CODEX, stream=True).status == 429


# ---- HTTP ----------------------------------------------------------------------------------------

UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "OpenAI-Beta": "responses_websockets=2026-02-06",
    "Sec-WebSocket-Extensions": "permessage-deflate",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/responses", "/responses"])
def test_a_websocket_is_refused_and_the_connection_goes_on(trio: Trio, path: str) -> None:
    with trio.gateway.wire() as wire:
        wire.send(trio.gateway.request_bytes("GET", path, None, UPGRADE))
        reply = wire.reply()
        assert reply.status == 426
        assert error(reply)["message"]
        assert reply.headers["content-type"].startswith("application/json")
        wire.send(trio.gateway.request_bytes("POST", path, asking(path, "hi", ECHO, input="hi")))
        assert wire.reply().status == 200


def test_a_get_without_an_upgrade_is_the_wrong_method(trio: Trio) -> None:
    reply = trio.get(RESPONSES)
    assert (reply.status, error(reply)["code"]) == (405, "method_not_allowed")
    assert "POST" in reply.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/input_items"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ],
)
def test_no_response_is_stored(trio: Trio, method: str, path: str) -> None:
    reply = trio.gateway.request(method, path, {} if method == "POST" else None)
    said = error(reply)
    assert reply.status == 404
    assert (said["type"], said["param"], said["code"]) == (
        "invalid_request_error", "response_id", "not_found",
    )  # fmt: skip


COUNTED: list[tuple[str, Json]] = [
    ("/v1/messages/count_tokens", {"messages": [user("foo")], "tools": []}),
    ("/v1/messages/count_tokens", {"messages": [user("")]}),
    ("/v1/messages/count_tokens", {"messages": [user([])]}),
    ("/v1/messages/count_tokens", {"messages": [user("foo")], "tool_choice": {"type": "auto"},
                                   "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("/messages/count_tokens", {"messages": [user("foo")]}),
    ("/v1/responses/input_tokens", {"input": "foo"}),
    ("/v1/responses/input_tokens", {"input": [user("foo")]}),
    ("/v1/responses/input_tokens", {"input": [user([image(RESPONSES)])]}),
    ("/responses/input_tokens", {"input": "foo", "instructions": "Be brief."}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), COUNTED)
@pytest.mark.parametrize("model", ["x", "claude-opus-4-8", "kiro/claude-opus-4.8"])
def test_tokens_are_counted_here(trio: Trio, path: str, body: Json, model: str) -> None:
    reply = trio.post(path, {"model": model, **body})
    assert reply.status == 200
    said = reply.json()
    most = 2000 if "image" in json.dumps(body) else 20
    assert 1 < said["input_tokens"] < most
    if "responses" in path:
        assert said["object"] == "response.input_tokens"
    else:
        assert set(said) == {"input_tokens"}
    assert (trio.fake.requests, trio.kiro.requests) == ([], [])


def test_a_longer_request_counts_more(trio: Trio) -> None:
    for path, body in COUNTED[:6:5]:
        text = json.dumps(body).replace("foo", "some words of prose " * 500)
        long = trio.post(path, {"model": "x", **json.loads(text)}).json()["input_tokens"]
        assert 1800 < long < 2600  # tokenizers of both vendors count some 2,000
        tools = [tool(RESPONSES if "input" in body else MESSAGES)] * 3
        with_tools = trio.post(path, {"model": "x", **json.loads(text), "tools": tools}).json()
        assert with_tools["input_tokens"] > long


@EVERY_CALLER
def test_a_body_in_zstd_is_refused_with_what_to_switch_off(trio: Trio, path: str) -> None:
    body = b"\x28\xb5\x2f\xfd" + b"\0" * 20
    reply = trio.post(path, body, content_encoding="zstd")
    assert reply.status == 415
    said = error(reply)
    assert path == MESSAGES or said["code"] == "unsupported_content_encoding"
    if path == RESPONSES:
        assert "enable_request_compression" in said["message"]
    assert trio.seen() == []


def test_a_body_in_gzip_is_read(trio: Trio) -> None:
    body = gzip.compress(json.dumps(asking(RESPONSES, "hi", CODEX)).encode())
    assert hear(trio.post(RESPONSES, body, content_encoding="gzip")).text


@pytest.mark.parametrize("before", ["", "/v1", "/v1/v1", "//v1/"])
def test_a_path_is_known_in_every_usual_form(trio: Trio, before: str) -> None:
    assert hear(trio.post(f"{before}/responses", asking(RESPONSES, "hi", CODEX))).text
    assert hear(trio.post(f"{before}/responses/", asking(RESPONSES, "hi", ECHO))).text
    vectors = trio.post(f"{before}/embeddings", {"model": EMBEDDER, "input": "hi"})
    assert len(vectors.json()["data"]) == 1
    assert trio.get(f"{before}/models").json()["data"]
    assert trio.get(f"{before}/models/{CODEX}").json()["id"] == CODEX
    count = trio.post(f"{before}/messages/count_tokens", {"model": "x", "messages": [user("a")]})
    assert count.json()["input_tokens"] > 1
    reply = trio.post(f"{before}/responses", {"model": CODEX, "input": 5})
    assert error(reply)["type"] == "invalid_request_error"


# ---- embeddings ----------------------------------------------------------------------------------


def vectors_of(reply: Reply) -> list[list[float]]:
    """The vectors of an answer in OpenAI's form."""
    assert reply.status == 200, reply
    body = reply.json()
    assert body["object"] == "list"
    rows = body["data"]
    assert [(row["object"], row["index"]) for row in rows] == [
        ("embedding", at) for at in range(len(rows))
    ]
    return [row["embedding"] for row in rows]


def expected(*texts: str, **more: Any) -> list[list[float]]:
    """The imitation's vectors of texts."""
    return [row["embedding"] for row in embeddings_of({"input": list(texts), **more}, True)["data"]]


@pytest.mark.parametrize("given", ["hello", ["hello"], ["a", "b", "a"]])
def test_texts_become_vectors(trio: Trio, given: Any) -> None:
    texts = [given] if isinstance(given, str) else given
    for _ in range(2):  # of two answers one is bare
        before = trio.usage()
        reply = trio.post(EMBEDDINGS, {"model": EMBEDDER, "input": given, "user": "u"})
        assert vectors_of(reply) == expected(*texts)
        count = tokens_in(texts)
        body = reply.json()
        assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert body["model"] == EMBEDDER
        assert trio.usage()["input_tokens"] - before["input_tokens"] == count
        assert trio.usage()["request_count"] - before["request_count"] == 1
    assert reply.headers["x-aiclient-model"] == EMBEDDER
    assert reply.headers["x-aiclient-provider"] == "copilot"


def test_vectors_in_base64_are_the_same_floats(trio: Trio) -> None:
    body = {"model": EMBEDDER, "input": ["a", "b"], "encoding_format": "base64"}
    rows = [base64.b64decode(row) for row in vectors_of(trio.post(EMBEDDINGS, body))]  # type: ignore[arg-type]
    assert [list(struct.unpack(f"<{len(row) // 4}f", row)) for row in rows] == expected("a", "b")


def test_shorter_vectors_are_to_be_had(trio: Trio) -> None:
    body = {"model": EMBEDDER, "input": "a", "dimensions": 256, "encoding_format": "float"}
    (vector,) = vectors_of(trio.post(EMBEDDINGS, body))
    assert vector == expected("a", dimensions=256)[0]
    assert len(vector) == 256


def test_many_texts_are_asked_for_in_batches_and_keep_their_order(trio: Trio) -> None:
    texts = [f"text {at}" for at in range(600)]
    before = trio.usage()["input_tokens"]
    body = {"model": EMBEDDER, "input": texts, "dimensions": 8}
    reply = trio.post(EMBEDDINGS, body)
    assert vectors_of(reply) == expected(*texts, dimensions=8)
    assert [text for call in trio.fake.calls for text in call.body["input"]] == texts
    assert len(trio.fake.calls) == 2 or max(len(c.body["input"]) for c in trio.fake.calls) <= 256
    assert reply.json()["usage"]["prompt_tokens"] == tokens_in(texts)
    assert trio.usage()["input_tokens"] - before == tokens_in(texts)


def test_rows_in_disorder_are_put_right(trio: Trio) -> None:
    answer = embeddings_of({"model": EMBEDDER, "input": ["a", "b"], "dimensions": 4}, False)
    answer["data"].reverse()
    trio.fake.queue(Answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode()))
    body = {"model": EMBEDDER, "input": ["a", "b"], "dimensions": 4}
    assert vectors_of(trio.post(EMBEDDINGS, body)) == expected("a", "b", dimensions=4)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": [1, 2, 3]}, "input"),
        ({"input": [[1, 2], [3]]}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": "many"}, "dimensions"),
        ({"model": GPT}, "model"),
        ({"model": CODEX}, "model"),
        ({"model": ECHO}, "model"),
        ({"model": KIRO_SONNET}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_become_a_vector_is_a_400(trio: Trio, more: Json, param: str) -> None:
    reply = trio.post(EMBEDDINGS, {"model": EMBEDDER, "input": "a", **more})
    said = error(reply)
    assert (reply.status, said["type"], said["param"]) == (400, "invalid_request_error", param)
    assert trio.seen() == []


@EVERY_CALLER
def test_an_embeddings_model_answers_no_conversation(trio: Trio, path: str) -> None:
    reply = trio.ask(path, "hi", EMBEDDER)
    assert reply.status == 400
    assert EMBEDDER in error(reply)["message"]
    assert trio.seen() == []


def test_an_embeddings_model_has_names_too(trio: Trio) -> None:
    for name in ("copilot/text-embedding-3-small", "Text-Embedding-3-Small", "vectors"):
        reply = trio.post(EMBEDDINGS, {"model": name, "input": "a"})
        assert vectors_of(reply) == expected("a")
        assert reply.json()["model"] == name
    reply = trio.post(EMBEDDINGS, {"model": "text-embedding-3-tiny", "input": "a"})
    assert reply.status == 404
    assert EMBEDDER in error(reply)["message"]


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (refusal(402, "You have no quota", "quota_exceeded"), 429, "insufficient_quota"),
        (refusal(429, "slow", "user_model_rate_limited", Retry_After="9000"), 429,
         "rate_limit_exceeded"),
        (refusal(400, "invalid request body", "invalid_request_body"), 400,
         "invalid_request_body"),
        (Answer(200, {}, b"no JSON", chunked=False), 502, "upstream_error"),
    ],
)  # fmt: skip
def test_an_error_of_embeddings_is_told(
    limited: Trio, answer: Answer, status: int, code: str | None
) -> None:
    limited.fake.queue(copy.deepcopy(answer))
    reply = limited.post(EMBEDDINGS, {"model": EMBEDDER, "input": "a"})
    assert (reply.status, error(reply)["code"]) == (status, code)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_embeddings_that_fail_for_a_moment_are_asked_for_again(trio: Trio, status: int) -> None:
    trio.fake.queue(refusal(status, "oops", Retry_After="0"))
    reply = trio.post(EMBEDDINGS, {"model": EMBEDDER, "input": "a"})
    assert vectors_of(reply) == expected("a")
    assert len(trio.fake.calls) == 2


# ---- the names of models -------------------------------------------------------------------------

#: (asked, sent, provider)
NAMED = [
    (SONNET, SONNET, "copilot"),
    ("claude-sonnet-4-5", SONNET, "copilot"),
    ("claude-sonnet-4-5-20250929", SONNET, "copilot"),
    ("claude-sonnet-4.5-20250929", SONNET, "copilot"),
    ("claude-sonnet-4-5-latest", SONNET, "copilot"),
    ("Claude-Sonnet-4.5", SONNET, "copilot"),
    ("copilot/claude-opus-4-8", OPUS, "copilot"),
    ("copilot/GPT-4.1", GPT, "copilot"),
    ("GPT-5.3-Codex", CODEX, "copilot"),
    ("gpt-5-3-codex", CODEX, "copilot"),
    ("gpt-4.1-2025-04-14", GPT, "copilot"),
    ("gpt-4o-latest", "gpt-4o", "copilot"),
    ("claude-haiku-4-6", ONLY_MESSAGES, "copilot"),
    ("fast", GPT, "copilot"),
    ("smart", "claude-opus-4.8", "kiro"),
    ("gpt-4", CODEX, "copilot"),
    ("kiro/claude-sonnet-4-20250514", "claude-sonnet-4", "kiro"),
    ("kiro/claude-opus-4-8[1m]", "claude-opus-4.8", "kiro"),
    ("gpt-5.6-sol", "gpt-5.6-sol", "kiro"),  # only one has it
    ("claude-sonnet-4-6", "claude-sonnet-4.6", "kiro"),
    ("claude-sonnet-4.5[1m]", LONG, "copilot"),
    ("claude-sonnet-4-5-20250929[1m]", LONG, "copilot"),
    ("claude-sonnet-4.5-1m", LONG, "copilot"),
    ("claude-opus-4-8[1m]", OPUS, "copilot"),  # nothing longer is listed
    ("claude-opus-4.8-1m", OPUS, "copilot"),
    ("claude-haiku-4.5[1m]", "claude-haiku-4.5", "copilot"),  # the longer one is locked
    ("claude-sonnet-4.5-thinking[1m]", LONG, "copilot"),
    ("claude-sonnet-4-5-20250929-thinking", SONNET, "copilot"),
    ("claude-opus-4.8-high", OPUS, "copilot"),
    ("gpt-5.3-codex-xhigh", CODEX, "copilot"),
    ("gpt-5.2-low", GPT52, "copilot"),
    ("claude-3-5-sonnet-20241022", SONNET, "copilot"),
    ("claude-3-5-sonnet-latest", SONNET, "copilot"),
    ("claude-3-7-sonnet-20250219", SONNET, "copilot"),
    ("claude-3-5-haiku-20241022", ONLY_MESSAGES, "copilot"),
    ("claude-3-haiku-20240307", ONLY_MESSAGES, "copilot"),
    ("claude-3-opus-20240229", OPUS, "copilot"),  # Opus 5 is locked
    ("kiro/claude-3-5-sonnet-20241022", "claude-sonnet-4.6", "kiro"),
]


@pytest.mark.parametrize(("asked", "sent", "provider"), NAMED)
@EVERY_CALLER
def test_a_name_in_any_usual_spelling_reaches_its_model(
    trio: Trio, path: str, asked: str, sent: str, provider: str
) -> None:
    reply = trio.ask(path, "hi", asked, stream=path == MESSAGES)
    assert hear(reply).model == asked
    assert reply.headers["x-aiclient-model"] == sent
    assert reply.headers["x-aiclient-provider"] == provider
    if provider == "copilot":
        assert trio.fake.calls[0].body["model"] == sent
    else:
        assert f'"modelId": "{sent}"' in json.dumps(trio.kiro.calls[0].body)


@EVERY_CALLER
def test_a_header_names_the_provider(trio: Trio, path: str) -> None:
    body = asking(path, "hi", SONNET)
    assert trio.post(path, body).headers["x-aiclient-provider"] == "copilot"
    reply = trio.post(path, body, x_provider="kiro")
    assert (reply.headers["x-aiclient-provider"], hear(reply).model) == ("kiro", SONNET)
    reply = trio.post(path, {**body, "model": KIRO_SONNET}, x_provider="copilot")
    assert reply.headers["x-aiclient-provider"] == "kiro"  # the prefix is nearer
    reply = trio.post(path, body, x_provider="nobody")
    assert reply.status == 400
    assert "copilot, kiro, echo" in error(reply)["message"]


@EVERY_CALLER
@pytest.mark.parametrize(
    ("asked", "betas", "sent"),
    [
        (SONNET, "context-1m-2025-08-07", LONG),
        ("claude-sonnet-4-5-20250929", "oauth-2025-04-20,context-1m-2025-08-07", LONG),
        (OPUS, "context-1m-2025-08-07", OPUS),
        ("claude-haiku-4-5", "context-1m-2025-08-07", "claude-haiku-4.5"),  # it is locked
        (LONG, "context-1m-2025-08-07", LONG),
        (CODEX, "context-1m-2025-08-07", CODEX),
        (KIRO_SONNET, "context-1m-2025-08-07", SONNET),
        (SONNET, "interleaved-thinking-2025-05-14", SONNET),
        ("fast", "context-1m-2025-08-07", GPT),
    ],
)
def test_a_beta_header_asks_for_the_longer_variant(
    trio: Trio, path: str, asked: str, betas: str, sent: str
) -> None:
    reply = trio.post(path, asking(path, "hi", asked), anthropic_beta=betas)
    assert hear(reply).model == asked
    assert reply.headers["x-aiclient-model"] == sent
    assert all("context-1m" not in c.headers.get("anthropic-beta", "") for c in trio.fake.calls)
    trio.fake.violations.clear()  # the imitation takes few betas


@EVERY_CALLER
@pytest.mark.parametrize(
    ("asked", "sign"),
    [
        ("claude-sonnet-4.5-thinking", '"budget_tokens"'),
        ("claude-sonnet-4-5-20250929-thinking", '"budget_tokens"'),
        ("claude-opus-4.8-low", '"effort":"low"'),
        ("gpt-5.3-codex-xhigh", '"effort":"xhigh"'),
        ("gpt-5.2-low", '"low"'),
        ("kiro/claude-opus-4.8-low", '"effort":"low"'),
    ],
)
def test_a_setting_behind_a_name_is_obeyed(trio: Trio, path: str, asked: str, sign: str) -> None:
    more: Json = {"max_tokens": 16_000} if path != RESPONSES else {}
    assert hear(trio.ask(path, "hi", asked, **more)).text
    sent = json.dumps(trio.seen()[0].body, separators=(",", ":"))
    # A chat upstream of Claude's may be asked in its own words.
    signs = [sign, '"thinking_budget"', '"reasoning_effort"'] if path == CHAT else [sign]
    assert any(one in sent for one in signs), sent


@EVERY_CALLER
def test_a_caller_s_own_effort_wins_over_that_of_a_name(trio: Trio, path: str) -> None:
    assert hear(trio.ask(path, "hi", "gpt-5.3-codex-low", **hard(path))).text
    effort = trio.fake.calls[0].body["reasoning"]["effort"]
    assert effort == ("high" if path != MESSAGES else effort)
    assert effort in ("low", "medium", "high")


# ---- the list of models --------------------------------------------------------------------------


def rows_by_id(trio: Trio, query: str = "", **headers: str) -> dict[str, Json]:
    """The rows of /v1/models."""
    body = trio.get(f"/v1/models{query}", **headers).json()
    assert body["object"] == "list"
    names = [row["id"] for row in body["data"]]
    assert (body["first_id"], body["last_id"]) == (names[0], names[-1])
    assert body["has_more"] is False
    assert len(names) == len(set(names))
    return {row["id"]: row for row in body["data"]}


@pytest.mark.parametrize(
    "query", ["", "?limit=1000", "?client_version=0.169.0", "?limit=20&after_id=x", "?raw=0"]
)
def test_the_list_speaks_to_both_vendors_clients(trio: Trio, query: str) -> None:
    rows = rows_by_id(trio, query)
    assert {CODEX, GPT52, RESTED, GPT, GEMINI, OPUS.replace("claude", "copilot/claude"),
            KIRO_OPUS, ECHO, EMBEDDER, LONG, "gpt-5.6-sol", "pick-r"} <= set(rows)  # fmt: skip
    assert not {"claude-sonnet-4", "claude-opus-5"} & {
        name for name, row in rows.items() if row["provider"] == "copilot"
    }
    for row in rows.values():
        assert (row["object"], row["type"]) == ("model", "model")
        assert isinstance(row["created"], int)
        assert row["created_at"].endswith("Z")
        assert row["owned_by"]
        assert row["display_name"]
        assert "raw" not in row


def test_a_row_tells_the_limits(trio: Trio) -> None:
    limits = ("context_window", "max_input_tokens", "max_tokens")
    rows = rows_by_id(trio)
    assert [rows[CODEX][key] for key in limits] == [400_000, 272_000, 128_000]
    assert [rows[LONG][key] for key in limits[:2]] == [1_000_000, 936_000]
    assert [rows[f"copilot/{SONNET}"][key] for key in limits] == [184_000, 168_000, 16_000]
    assert rows[KIRO_OPUS]["context_window"] >= 1_000_000
    assert rows[KIRO_OPUS]["max_tokens"] == 128_000


def test_every_name_in_the_list_can_be_asked_for(trio: Trio) -> None:
    for name, row in rows_by_id(trio).items():
        one = trio.get(f"/v1/models/{name}")
        assert (one.status, one.json()) == (200, row)
        if name not in (RESTED, "pick-m", "pick-c"):  # which may rest
            said = trio.get(f"/v1/models/{name}", anthropic_version="2023-06-01")
            assert said.json() == row


@pytest.mark.parametrize(
    ("asked", "provider"),
    [
        ("claude-sonnet-4-5-20250929", "copilot"),
        ("copilot/claude-sonnet-4.5", "copilot"),
        ("kiro/claude-sonnet-4.5", "kiro"),
        ("smart", "kiro"),
        ("GPT-5.3-CODEX", "copilot"),
        ("claude-sonnet-4.5%5B1m%5D", "copilot"),
    ],
)
def test_one_model_is_told_under_the_name_that_was_asked(
    trio: Trio, asked: str, provider: str
) -> None:
    reply = trio.get(f"/v1/models/{asked}")
    assert reply.status == 200
    row = reply.json()
    assert row["id"] == asked.replace("%5B", "[").replace("%5D", "]")
    assert row["provider"] == provider


def test_a_model_that_is_not_listed_is_a_404_in_the_caller_s_form(trio: Trio) -> None:
    reply = trio.get("/v1/models/gpt-5.3-codecs")
    assert (reply.status, error(reply)["code"]) == (404, "model_not_found")
    assert CODEX in error(reply)["message"]
    reply = trio.get("/v1/models/gpt-5.3-codecs", anthropic_version="2023-06-01")
    assert (reply.status, error(reply)["type"]) == (404, "not_found_error")


@pytest.mark.parametrize("query", ["?raw=1", "?limit=1000&raw=1"])
def test_the_upstream_s_own_words_are_to_be_had(trio: Trio, query: str) -> None:
    rows = rows_by_id(trio, query)
    own = {model["id"]: model for model in trio.fake.model_list if "id" in model}
    assert rows[CODEX]["raw"] == own[CODEX]
    assert rows[EMBEDDER]["raw"] == own[EMBEDDER]
    assert rows[KIRO_OPUS]["raw"]["modelId"] == "claude-opus-4.8"
    assert {k: v for k, v in rows[CODEX].items() if k != "raw"} == rows_by_id(trio)[CODEX]


def test_the_upstream_s_own_words_of_one_model_are_to_be_had(trio: Trio) -> None:
    own = next(model for model in trio.fake.model_list if model.get("id") == CODEX)
    assert trio.get(f"/v1/models/{CODEX}?raw=1").json()["raw"] == own
    assert "raw" not in trio.get(f"/v1/models/{CODEX}").json()


# ---- the choice of the upstream's dialect --------------------------------------------------------

#: what each caller would rather have, best first
PREFERRED = {CHAT: "crm", MESSAGES: "mrc", RESPONSES: "rmc"}


@pytest.mark.parametrize("model", PICKS)
@EVERY_CALLER
def test_the_endpoint_is_the_least_lossy_of_those_a_model_has(
    trio: Trio, path: str, model: str
) -> None:
    if model in ("pick-m", "pick-c"):
        model = {"pick-m": ONLY_MESSAGES, "pick-c": GPT}[model]  # which do not rest
        endpoints = "m" if model == ONLY_MESSAGES else "c"
    else:
        endpoints = model.removeprefix("pick-")
    assert hear(trio.ask(path, "hi", model)).text
    best = next(key for key in PREFERRED[path] if key in endpoints)
    chosen = dict(zip("cmr", UPSTREAM_PATHS.values()))[best]
    assert [call.path for call in trio.fake.calls] == [chosen]


def test_an_endpoint_that_a_model_does_not_serve_is_left_for_another() -> None:
    why = f'model "{GPT52}" is not accessible via the /responses endpoint'
    with fresh_copilot() as (fake, gateway):
        fake.queue(refusal(400, why, "unsupported_api_for_model"))
        for _ in range(2):
            reply = gateway.request("POST", RESPONSES, asking(RESPONSES, "hi", GPT52))
            assert hear(reply).text
        paths = [call.path for call in fake.calls]
        assert paths == ["/responses", "/chat/completions", "/chat/completions"]


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [CODEX, GPT52, GPT, SONNET, OPUS])
@STREAMED
def test_usage_is_told_and_counted_as_it_was_billed(trio: Trio, model: str, stream: bool) -> None:
    before = trio.usage()
    said = hear(trio.ask(RESPONSES, f"bill {model} {stream}", model, stream=stream))
    prompt, output = bill(trio.fake.calls[0])
    assert (said.usage["input_tokens"], said.usage["output_tokens"]) == (prompt, output)
    assert "cached_tokens" in said.usage["input_tokens_details"]
    assert "reasoning_tokens" in said.usage["output_tokens_details"]
    now = trio.usage()
    counted = [now[key] - before[key] for key in ("input_tokens", "output_tokens")]
    assert counted == [prompt, output]
    assert now["request_count"] - before["request_count"] == 1


def test_what_was_cached_is_part_of_the_prompt(trio: Trio) -> None:
    body = asking(RESPONSES, "cached words " * 30, CODEX, prompt_cache_key="EXAMPLE")
    first, second = (hear(trio.post(RESPONSES, body)).usage for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"]
    assert first["input_tokens_details"]["cached_tokens"] == 0
    assert second["input_tokens_details"]["cached_tokens"] > 0
    for path in (CHAT, MESSAGES):
        _, said = (hear(trio.ask(path, "cached words " * 30, CODEX)) for _ in range(2))
        if path == CHAT:
            assert said.usage["prompt_tokens_details"]["cached_tokens"] > 0
        else:
            assert said.usage["cache_read_input_tokens"] > 0


@NATIVE_OR_NOT
def test_a_stream_that_breaks_off_is_counted_as_an_error(trio: Trio, model: str) -> None:
    before = trio.usage()
    some = upstream_pieces(RESPONSES, model)
    trio.fake.queue(streaming(*some[:5], then="close"))
    assert frames(trio.ask(RESPONSES, "hi", model, stream=True).body)
    now = trio.usage()
    assert now["error_count"] - before["error_count"] == 1
    assert now["request_count"] - before["request_count"] == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "input_image", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
        },
        {"type": "text", "text": "words"},
    ],
    ids=["chat", "a mixture", "messages", "text"],
)
@NATIVE_OR_NOT
def test_parts_in_other_vendors_shapes_are_understood(trio: Trio, model: str, part: Json) -> None:
    """Some clients keep one history for all endpoints."""
    rows = [user("look"), {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    rows.append({"role": "user", "content": [{"type": "input_text", "text": "this"}, part]})
    assert hear(trio.post(RESPONSES, {"model": model, "input": rows})).text
