"""The imitation of Copilot keeps its own rules: what it accepts, refuses, puts on the wire."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import (
    Answer,
    AnyPart,
    Call,
    CustomCall,
    FakeCopilot,
    Json,
    Say,
    Stop,
    Think,
    chunk,
    default_models,
    drip,
    numbered,
    sse,
)

PNG = "iVBORw0KGgo="
TOOL: Json = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


@pytest.fixture
def fake() -> Iterator[FakeCopilot]:
    with FakeCopilot() as running:
        yield running


class Client:
    """A well-behaved client of the imitation: signs in once, sends the right headers."""

    def __init__(self, fake: FakeCopilot) -> None:
        self.fake = fake
        self.interaction = str(uuid.uuid4())
        status, body = self.send("GET", "/copilot_internal/v2/token", self.github())
        assert status == 200
        self.token = body["token"]

    def github(self) -> dict[str, str]:
        return {
            "Authorization": f"token {self.fake.github_token}",
            "User-Agent": "GitHubCopilotChat/0.52.0",
            "Editor-Version": "vscode/1.124.2",
            "Editor-Plugin-Version": "copilot-chat/0.52.0",
        }

    def headers(self, **changes: str | None) -> dict[str, str]:
        """The right headers; `changes` name them with underscores, None leaves one out."""
        full: dict[str, str | None] = {
            **self.github(),
            "Authorization": f"Bearer {self.token}",
            "Content-Type": "application/json",
            "Copilot-Integration-Id": "vscode-chat",
            "X-GitHub-Api-Version": "2026-06-01",
            "X-Request-Id": str(uuid.uuid4()),
            "X-Interaction-Id": self.interaction,
            "X-Initiator": "user",
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        return {name: value for name, value in full.items() if value is not None}

    def send(
        self, method: str, path: str, headers: dict[str, str], body: Any = None
    ) -> tuple[int, Any]:
        """(status, JSON or text) of one request on its own connection."""
        connection = http.client.HTTPConnection(self.fake.host, timeout=5)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def chat(self, body: Json, **changes: str | None) -> tuple[int, Any]:
        return self.send("POST", "/chat/completions", self.headers(**changes), body)

    def messages(self, body: Json, **changes: str | None) -> tuple[int, Any]:
        return self.send("POST", "/v1/messages", self.headers(**changes), body)


@pytest.fixture
def client(fake: FakeCopilot) -> Client:
    return Client(fake)


def chat(text: str = "hi", model: str = "gpt-4.1", **more: Any) -> Json:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def ask(text: Any = "hi", model: str = "claude-sonnet-4.5", **more: Any) -> Json:
    return {
        "model": model,
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": text}],
    } | more


def chat_tool(name: str = "read", schema: Json = TOOL) -> Json:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def tool(name: str = "read", **more: Any) -> Json:
    return {"name": name, "input_schema": TOOL, **more}


def frames(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


# ---- What it accepts and how it answers ----------------------------------------------------------


def test_an_exchange_names_the_imitation_as_its_api(fake: FakeCopilot, client: Client) -> None:
    _, body = client.send("GET", "/copilot_internal/v2/token", client.github())
    assert body["endpoints"]["api"] == fake.url
    assert body["refresh_in"] == 1500
    assert fake.exchanges == 2
    assert fake.violations == []


def test_a_whole_chat_answer_lacks_what_the_service_leaves_out(
    fake: FakeCopilot, client: Client
) -> None:
    status, body = client.chat(chat("good day"))
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "Hello from gpt-4.1. You said: good day"
    assert body["choices"][0]["message"]["padding"]
    assert "object" not in body and "created" not in body
    assert body["model"] == "gpt-4.1-2025-04-14"
    assert fake.violations == []


def test_a_chat_stream_opens_without_choices_and_ends_with_usage(
    fake: FakeCopilot, client: Client
) -> None:
    asked = chat("hi", stream=True, stream_options={"include_usage": True})
    _, text = client.chat(asked)
    first, *middle, last = frames(text)
    assert first["choices"] == [] and "prompt_filter_results" in first
    assert all(frame["usage"] is None for frame in middle)
    assert last["choices"] == [] and last["usage"]["total_tokens"] > 0 and last["copilot_usage"]
    assert text.endswith("data: [DONE]\n\n")
    assert fake.violations == []


@pytest.mark.parametrize("stream", [False, True])
def test_claude_on_chat_speaks_in_one_choice_and_calls_in_the_next(stream: bool) -> None:
    def brain(dialect: str, body: Json) -> list[Say | Think | Call | Stop]:
        return [
            Think("hm"),
            Say("I will."),
            Call("read", {"path": "a"}),
            Call("read", {"path": "b"}),
        ]

    with FakeCopilot(brain=brain) as fake:
        asked = chat("hi", "claude-sonnet-4.5", tools=[chat_tool()], stream=stream)
        if stream:
            asked["stream_options"] = {"include_usage": True}
        _, body = Client(fake).chat(asked)
        chunks = frames(body) if stream else [body]
        choices = [choice for part in chunks for choice in part["choices"]]
        bodies = [(c["index"], c.get("delta") or c.get("message")) for c in choices]
        assert {index for index, said in bodies if said.get("content")} == {0}
        assert {index for index, said in bodies if said.get("tool_calls")} == {1}
        assert any(said.get("reasoning_opaque") for _, said in bodies)
        assert [c["finish_reason"] for c in choices if c.get("finish_reason")] == [
            "stop",
            "tool_calls",
        ]
        assert fake.violations == []


def test_a_messages_stream_counts_at_its_end_and_says_done_once_too_often(
    fake: FakeCopilot, client: Client
) -> None:
    _, text = client.messages(ask("use the tool", tools=[tool()], stream=True))
    events = frames(text)
    assert [event["type"] for event in events] == [
        "message_start", "ping", "content_block_start", "content_block_delta",
        "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["id"].startswith("msg_vrtx_")
    assert events[0]["message"]["usage"]["input_tokens"] == 0
    assert events[-2]["usage"]["input_tokens"] > 0 and events[-2]["copilot_usage"]
    arguments = "".join(e["delta"]["partial_json"] for e in events[3:6])
    assert json.loads(arguments) == {"path": "example"}
    assert text.startswith("event: message_start\n") and text.endswith("data: [DONE]\n\n")
    assert fake.violations == []


def test_both_tools_are_called_and_their_results_told(fake: FakeCopilot, client: Client) -> None:
    first = ask("use both tools", tools=[tool("a"), tool("b")])
    _, body = client.messages(first)
    assert [block["name"] for block in body["content"]] == ["a", "b"]
    assert body["stop_reason"] == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": f"result {block['name']}"}
        for block in body["content"]
    ]
    first["messages"] += [
        {"role": "assistant", "content": body["content"]},
        {"role": "user", "content": results},
    ]
    _, body = client.messages(first, X_Initiator="agent")
    assert body["content"][0]["text"] == "The tool said: result a and result b"
    assert fake.violations == []


def test_a_thought_comes_back_only_with_its_own_signature(
    fake: FakeCopilot, client: Client
) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    first = ask("think", thinking=thinking)
    _, body = client.messages(first)
    thought = body["content"][0]
    assert thought["type"] == "thinking" and thought["signature"].startswith("EqQB")
    again: list[Json] = [
        *first["messages"],
        {"role": "assistant", "content": body["content"]},
        {"role": "user", "content": "and?"},
    ]
    assert client.messages({**first, "messages": again})[0] == 200
    assert fake.violations == []
    thought["signature"] = "EqQBforeign"
    assert client.messages({**first, "messages": again})[0] == 400
    assert "Invalid `signature`" in fake.violations[0]


def test_adaptive_thoughts_stay_hidden_unless_a_summary_is_asked(client: Client) -> None:
    for display, text in ((None, ""), ("summarized", "Let me think about that.")):
        thinking = {"type": "adaptive", **({"display": display} if display else {})}
        asked = ask("think", "claude-opus-4.8", thinking=thinking, output_config={"effort": "low"})
        assert client.messages(asked)[1]["content"][0]["thinking"] == text


def test_gemini_wants_its_signature_back_after_a_tool_call(
    fake: FakeCopilot, client: Client
) -> None:
    first = chat("use the tool", "gemini-3.1-pro-preview", tools=[chat_tool()])
    _, body = client.chat(first)
    assert body["choices"][0]["finish_reason"] == "stop"
    said = {k: v for k, v in body["choices"][0]["message"].items() if k != "padding"}
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "42"}
    first["messages"] += [said, result]
    _, body = client.chat(first, X_Initiator="agent")
    assert body["choices"][0]["message"]["content"] == "The tool said: 42"
    assert fake.violations == []
    del said["reasoning_opaque"]
    status, body = client.chat(first, X_Initiator="agent")
    assert (status, body["error"]["code"]) == (400, "invalid_request_body")


def test_usage_is_lumped_on_chat_and_split_beside_it(client: Client) -> None:
    asked = chat("hello " * 50, "claude-sonnet-4.5")
    asked["messages"][0]["copilot_cache_control"] = {"type": "ephemeral"}
    wrote, read = client.chat(asked)[1], client.chat(asked)[1]
    details = [answer["copilot_usage"]["token_details"] for answer in (wrote, read)]
    counts = [{d["token_type"]: d["token_count"] for d in detail} for detail in details]
    assert counts[0]["cache_write"] == counts[1]["cache_read"] > 0
    assert wrote["usage"]["prompt_tokens"] == counts[0]["input"] + counts[0]["cache_write"]
    assert read["usage"]["prompt_tokens_details"]["cached_tokens"] == counts[1]["cache_read"]


def test_images_are_seen(fake: FakeCopilot, client: Client) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    parts: list[Json] = [{"type": "text", "text": "look"}]
    asked = chat()
    asked["messages"][0]["content"] = [*parts, url]
    _, body = client.chat(asked, Copilot_Vision_Request="true")
    assert "I see 1 image(s)" in body["choices"][0]["message"]["content"]
    _, body = client.messages(ask([image, *parts, image]), Copilot_Vision_Request="true")
    assert "I see 2 image(s)" in body["content"][0]["text"]
    assert fake.violations == []
    assert client.chat(asked)[1]["error"]["message"].startswith("missing required Copilot-Vision")
    client.chat(chat(), Copilot_Vision_Request="true")
    assert fake.violations[1] == "Copilot-Vision-Request without an image"


def test_the_default_list_has_its_oddities(client: Client) -> None:
    _, body = client.send("GET", "/models", client.headers())
    ids = [entry.get("id") for entry in body["data"]]
    assert ids.count("gpt-4o") == 2 and None in ids
    assert client.chat(chat(model="claude-sonnet-4"))[1]["error"]["code"] == "model_not_supported"
    enable = client.send(
        "POST", "/models/claude-sonnet-4/policy", client.headers(), {"state": "enabled"}
    )
    assert enable == (200, {"state": "enabled"})
    assert client.chat(chat(model="claude-sonnet-4"))[0] == 200


def test_a_list_of_bare_entries_is_enough() -> None:
    with FakeCopilot(models=[{"id": "bare"}]) as fake:
        _, body = Client(fake).chat(chat(model="bare"))
        assert body["choices"][0]["message"]["content"] == "Hello from bare. You said: hi"


def test_quota_headers_come_on_success_only(client: Client) -> None:
    connection = http.client.HTTPConnection(client.fake.host, timeout=5)
    for body, name in ((chat(), "80.7"), (chat(store=True), None)):
        connection.request("POST", "/chat/completions", json.dumps(body), client.headers())
        answer = connection.getresponse()
        answer.read()
        quota = answer.getheader("x-quota-snapshot-premium_interactions")
        assert name in quota if name and quota else quota is None
    connection.close()
    assert client.fake.calls[0].connection == client.fake.calls[1].connection


def test_the_device_flow_waits_and_then_hands_out_the_token(
    fake: FakeCopilot, client: Client
) -> None:
    headers = {"User-Agent": "x", "Accept": "application/json", "Content-Type": "application/json"}
    asked = {"client_id": "Iv1.b507a08c87ecfe98", "scope": "read:user"}
    fake.poll_seconds = 0
    _, code = client.send("POST", "/login/device/code", headers, asked)
    poll = {
        **asked,
        "device_code": code["device_code"],
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
    }
    answers = [client.send("POST", "/login/oauth/access_token", headers, poll)[1] for _ in range(4)]
    states = ["authorization_pending", "authorization_pending", "slow_down", None]
    assert [a.get("error") for a in answers] == states
    assert answers[3]["access_token"] == fake.github_token
    assert fake.violations == []


# ---- What it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"Authorization": "Bearer nonsense"}, 401, "unauthorized: token expired"),
        ({"Authorization": "Bearer ghu_EXAMPLE000000000000000000000000000000"}, 403, "forbidden"),
        ({"Editor_Version": None}, 400, "missing Editor-Version header for IDE auth"),
        ({"X_GitHub_Api_Version": "2024-12-01"}, 466, "no longer supported"),
        ({"X_GitHub_Api_Version": None}, 466, "no longer supported"),
        ({"Copilot_Integration_Id": None}, 403, "Access to this endpoint is forbidden"),
        ({"Host": "elsewhere.example"}, 421, "Misdirected Request"),
        ({"x_api_key": "sk-EXAMPLE"}, 400, "x-api-key"),
        ({"cookie": "a=b"}, 400, "cookie"),
        ({"x_stainless_lang": "js"}, 400, "x-stainless-lang"),
        ({"anthropic_beta": "x"}, 400, "anthropic-beta"),
        ({"Expect": "100-continue"}, 417, "Expectation Failed"),
        ({"Accept_Encoding": "gzip, br"}, 400, "br"),
        ({"TE": "trailers"}, 400, "hop-by-hop"),
    ],
)
def test_wrong_headers_are_refused(
    fake: FakeCopilot, client: Client, changes: dict[str, str | None], status: int, text: str
) -> None:
    if "Accept_Encoding" not in changes:
        changes = {"Accept_Encoding": "gzip", **changes}
    got, body = client.chat(chat(), **changes)
    assert got == status
    assert text in json.dumps(body)
    assert len(fake.violations) == 1


@pytest.mark.parametrize("name", ["User-Agent", "Editor-Version", "Authorization"])
def test_an_exchange_without_a_header_is_refused(
    fake: FakeCopilot, client: Client, name: str
) -> None:
    headers = client.github()
    del headers[name]
    assert client.send("GET", "/copilot_internal/v2/token", headers)[0] in (401, 403)
    assert len(fake.violations) == 1


def test_expired_tokens_are_refused_without_blame(fake: FakeCopilot, client: Client) -> None:
    fake.expire_tokens()
    assert client.chat(chat()) == (401, "unauthorized: token expired\n")
    client.token = client.send("GET", "/copilot_internal/v2/token", client.github())[1]["token"]
    assert client.chat(chat(), X_Initiator="agent")[0] == 200
    assert fake.violations == []


HISTORIES: list[tuple[str, Json]] = [
    ("gpt-4.1", {"role": "developer", "content": "x"}),
    ("gpt-4.1", {"role": "function", "name": "f", "content": "x"}),
    ("gpt-4.1", {"role": "assistant", "content": None}),
    ("gpt-4.1", {"role": "assistant", "content": "x", "reasoning_opaque": "y"}),
    ("gpt-4.1", {"role": "tool", "tool_call_id": "c", "content": "x"}),
    ("claude-sonnet-4.5", {"role": "assistant", "content": [{"type": "text", "text": "x"}]}),
    ("gemini-3.1-pro-preview", {"role": "user", "content": "x"}),
]
LAST = {"role": "user", "content": "go on"}


@pytest.mark.parametrize(
    "body",
    [
        chat(service_tier="auto"),
        chat(metadata={}),
        chat(_note=1),
        chat(model="gpt-5.2", max_tokens=5),
        chat(model="gpt-5.2", temperature=1),
        chat(model="gpt-5.2", reasoning_effort="max"),
        chat(model="claude-sonnet-4.5", seed=1),
        chat(model="claude-sonnet-4.5", temperature=1, top_p=1),
        chat(max_tokens=10**6),
        chat(tools=[]),
        chat(tools=[chat_tool(f"t{n}") for n in range(129)]),
        chat(tools=[chat_tool("a.b")]),
        chat(tools=[chat_tool(schema={"type": "object", "$schema": "x"})]),
        chat(
            tools=[chat_tool(schema={"type": "object", "properties": {"a": {"type": "array"}}})],
        ),
        chat(
            model="gemini-3.1-pro-preview",
            tools=[chat_tool(schema={"type": "object", "additionalProperties": False})],
        ),
        chat(tool_choice="auto"),
        chat(""),
        chat("   "),
        chat("word " * 200_000),
        {**chat(), "messages": []},
        *({"model": model, "messages": [first, LAST]} for model, first in HISTORIES),
    ],
)
def test_a_wrong_chat_body_is_refused(fake: FakeCopilot, client: Client, body: Json) -> None:
    status, _ = client.chat(body)
    assert status == 400
    assert len(fake.violations) == 1
    assert "Error" not in fake.violations[0]


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c", "type": None, "function": {"name": "f", "arguments": "{}"}},
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}},
        {"id": "c", "type": "function", "function": {"name": "a:b", "arguments": "{}"}},
        {"id": "d", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ],
)
def test_a_wrong_chat_tool_call_is_refused(client: Client, call: Json) -> None:
    asked = chat()
    asked["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    assert client.chat(asked, X_Initiator="agent")[0] == 400


def test_images_in_a_chat_tool_message_are_refused(client: Client) -> None:
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = chat()
    asked["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [url]},
    ]
    assert client.chat(asked, X_Initiator="agent", Copilot_Vision_Request="true")[0] == 400


def turns(*messages: tuple[str, Any], **more: Any) -> Json:
    return ask(**more) | {"messages": [{"role": role, "content": said} for role, said in messages]}


USE = {"type": "tool_use", "id": "t1", "name": "read", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "x"}
TEXT = {"type": "text", "text": "x"}
MARK = {"type": "ephemeral"}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (ask(service_tier="auto"), "service_tier: Extra inputs are not permitted"),
        (ask(stream_options={}), "stream_options: Extra inputs are not permitted"),
        (ask(context_management={}), "context_management: Extra inputs are not permitted"),
        (ask(metadata={"session": 1}), "metadata.session"),
        (ask(max_tokens=99_999), "max_tokens: 99999 > 16000"),
        (ask(max_tokens=20_000, model="claude-haiku-4.5"), "streaming is required"),
        (ask(output_config={"format": {}}), "FAILED_PRECONDITION"),
        (
            ask(output_config={"effort": "low"}, model="claude-haiku-4.5"),
            "invalid_reasoning_effort",
        ),
        (ask(output_config={"effort": "max"}, model="claude-opus-4.8"), "invalid_reasoning_effort"),
        (ask(thinking={"type": "enabled", "budget_tokens": 512}), "between 1024 and 32000"),
        (ask(thinking={"type": "enabled", "budget_tokens": 4096}), "must be greater than"),
        (ask(thinking={"type": "adaptive"}), "adaptive thinking is not supported"),
        (
            ask(model="claude-opus-4.8", thinking={"type": "enabled", "budget_tokens": 2048}),
            "is not supported for this model. Use",
        ),
        (
            ask(thinking={"type": "enabled", "budget_tokens": 2048}, temperature=0.5),
            "only be set to 1",
        ),
        (ask(model="claude-opus-4.8", temperature=1), "sampling"),
        (
            ask(
                thinking={"type": "enabled", "budget_tokens": 2048},
                tools=[tool()],
                tool_choice={"type": "any"},
            ),
            "forces tool use",
        ),
        (ask(tools=[tool(strict=True)]), "tools.0.custom.strict: Extra inputs"),
        (ask(tools=[tool(type="custom")]), "tools.0.custom.type: Extra inputs"),
        (ask(tools=[tool("a.b")]), "should match pattern"),
        (ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "web_search_20250305"),
        (ask(tools=[{"name": "a", "input_schema": {**TOOL, "$schema": "x"}}]), "$schema"),
        (ask(system=""), "non-empty"),
        (
            ask(system=[{**TEXT, "cache_control": {**MARK, "ttl": "1h"}}]),
            "cache_control.ephemeral.ttl",
        ),
        (ask(tools=[tool(cache_control={**MARK, "scope": "x"})]), "cache_control.ephemeral.scope"),
        (ask([{**TEXT, "cache_control": MARK}] * 5), "maximum of 4 blocks"),
        (ask(""), "non-whitespace"),
        (ask([]), "non-empty content"),
        (ask([{"type": "text", "text": " "}]), "non-whitespace"),
        (turns(("user", "x"), ("assistant", "y")), "prefill"),
        (
            turns(("user", "x"), ("system", "y"), ("assistant", "z"), ("user", "x")),
            "'system' is not",
        ),
        (
            turns(("system", "y"), ("user", "x"), model="claude-opus-4.8"),
            "must follow a user turn",
        ),
        (turns(("user", "x"), ("assistant", [USE]), ("user", "y")), "without `tool_result` blocks"),
        (
            turns(("user", "x"), ("assistant", [USE]), ("user", [TEXT, RESULT])),
            "without `tool_result` blocks",
        ),
        (turns(("user", [RESULT])), "unexpected `tool_use_id`"),
        (
            turns(("user", "x"), ("assistant", [{**USE, "id": "a.b"}]), ("user", "y")),
            "should match pattern",
        ),
        (
            turns(
                ("user", "x"),
                ("assistant", [{"type": "thinking", "thinking": "Thinking...", "signature": ""}]),
                ("user", "y"),
            ),
            "Invalid `signature`",
        ),
        (
            turns(
                ("user", "x"),
                ("assistant", [USE]),
                ("user", [RESULT]),
                tools=[tool()],
                thinking={"type": "enabled", "budget_tokens": 2048},
            ),
            "must start with a thinking block",
        ),
        (ask([{"type": "document", "source": {"type": "text", "data": "x"}}]), "application/pdf"),
        (ask("word " * 200_000), "prompt is too long: "),
        (ask(model="claude-9"), "model_not_supported"),
        (ask(model="gpt-4.1"), "unsupported_api_for_model"),
    ],
)
def test_a_wrong_messages_body_is_refused(
    fake: FakeCopilot, client: Client, body: Json, text: str
) -> None:
    status, answer = client.messages(body)
    assert status == 400
    assert text in json.dumps(answer, ensure_ascii=False)
    assert len(fake.violations) == 1
    assert "Error" not in fake.violations[0]


def test_only_three_betas_are_accepted(fake: FakeCopilot, client: Client) -> None:
    good = "interleaved-thinking-2025-05-14,context-management-2025-06-27"
    edits: Json = {"edits": []}
    assert client.messages(ask(context_management=edits), anthropic_beta=good)[0] == 200
    assert fake.violations == []
    status, body = client.messages(ask(), anthropic_beta="context-1m-2025-08-07")
    wanted = "Unexpected value(s) `context-1m-2025-08-07` for the `anthropic-beta` header."
    assert (status, body["error"]["message"]) == (400, wanted)


def test_a_system_turn_is_accepted_where_the_newest_models_take_it(
    fake: FakeCopilot, client: Client
) -> None:
    asked = turns(("user", "x"), ("system", "y"), model="claude-opus-4.8")
    assert client.messages(asked)[0] == 200
    assert fake.violations == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"X_Initiator": "agent"}, "X-Initiator is agent, should be user"),
        ({"X_Initiator": None}, "X-Initiator is None, should be user"),
        ({"X_Interaction_Id": None}, "X-Interaction-Id is missing or no UUID: ''"),
        ({"X_Request_Id": "1"}, "X-Request-Id is missing, no UUID, or used twice: '1'"),
    ],
)
def test_a_wrong_identity_of_the_call_is_noted_and_answered(
    fake: FakeCopilot, client: Client, changes: dict[str, str | None], note: str
) -> None:
    assert client.chat(chat(), **changes)[0] == 200
    assert fake.violations == [note]


def test_a_request_id_is_used_once(fake: FakeCopilot, client: Client) -> None:
    again = str(uuid.uuid4())
    client.chat(chat(), X_Request_Id=again)
    client.chat(chat(), X_Request_Id=again)
    assert len(fake.violations) == 1


def test_a_retry_may_call_itself_agent(fake: FakeCopilot, client: Client) -> None:
    fake.queue(Answer(503, body=b"busy"))
    assert client.chat(chat()) == (503, "busy")
    assert client.chat(chat(), X_Initiator="agent")[0] == 200
    assert fake.violations == []


# ---- /responses ----------------------------------------------------------------------------------

CODEX = "gpt-5.3-codex"
SEALED: Json = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}


def respond(said: Any = "hi", model: str = "gpt-5.2", **more: Any) -> Json:
    return {"model": model, "input": said, **more}


def item(kind: str, call_id: str = "c1", **more: Any) -> Json:
    """An input item that is right for its kind."""
    bodies: dict[str, Json] = {
        "function_call": {"call_id": call_id, "name": "read", "arguments": "{}"},
        "function_call_output": {"call_id": call_id, "output": "42"},
        "custom_tool_call": {"call_id": call_id, "name": "patch", "input": "a\nb"},
        "custom_tool_call_output": {"call_id": call_id, "output": "done"},
    }
    return {"type": kind, **bodies.get(kind, {}), **more}


def said(role: str, *parts: Any, **more: Any) -> Json:
    return {"type": "message", "role": role, "content": list(parts), **more}


CALL, OUTPUT = item("function_call"), item("function_call_output")
ASK: Json = {"role": "user", "content": "go on"}
HEARD = {"type": "input_text", "text": "look"}
SAID = {"type": "output_text", "text": "I did", "annotations": []}
SIGHT = {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{PNG}"}
LONG = "x" * 65
READ: Json = {"type": "function", "name": "read", "parameters": TOOL}
PATCH: Json = {"type": "custom", "name": "patch", "format": {"type": "text"}}
STRICT: Json = {**TOOL, "additionalProperties": False}


def answer_of(client: Client, body: Json, **changes: str | None) -> Any:
    """The whole answer, or the objects of the stream."""
    status, got = client.send("POST", "/responses", client.headers(**changes), body)
    assert status == 200, got
    return frames(got) if body.get("stream") else got


def test_a_responses_stream_calls_one_item_by_many_long_names() -> None:
    def brain(dialect: str, body: Json) -> list[AnyPart]:
        assert dialect == "responses"
        return [
            Think("First this.\n\nThen that."),
            Say("I will."),
            Call("read", {"path": "a"}),
            CustomCall("patch", "a\nb"),
        ]

    with FakeCopilot(brain=brain) as fake:
        asked = respond(model=CODEX, stream=True, tools=[READ, PATCH], **SEALED)
        events = answer_of(Client(fake), asked)
        kinds = [event["type"].removeprefix("response.") for event in events]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert kinds[:3] == ["created", "in_progress", "output_item.added"]
        assert kinds[-1] == "completed" and kinds.count("reasoning_summary_part.done") == 2
        ids = [event["item_id"] for event in events if "item_id" in event]
        ids += [event["item"]["id"] for event in events if "item" in event]
        ids += [event["response"]["id"] for event in events if "response" in event]
        last = events[-1]["response"]
        ids += [entry["id"] for entry in last["output"]]
        assert len(set(ids)) == len(ids)
        assert {300 <= len(name) <= 450 for name in ids} == {True}
        done = [event["item"] for event in events if event["type"].endswith("output_item.done")]
        assert [entry["type"] for entry in done] == [
            "reasoning", "message", "function_call", "custom_tool_call",
        ]  # fmt: skip
        assert json.loads(done[2]["arguments"]) == {"path": "a"} and done[3]["input"] == "a\nb"
        for name, whole in (("arguments", done[2]["arguments"]), ("input", "a\nb")):
            marks = ("function_call_arguments", "custom_tool_call_input")
            kind = f"response.{marks[name == 'input']}.delta"
            assert "".join(e["delta"] for e in events if e["type"] == kind) == whole
        assert done[1]["phase"] == "commentary"
        assert "store" not in last and last["output_text"] is None
        assert last["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        assert events[-1]["copilot_usage"]["total_nano_aiu"] > 0
        assert fake.violations == []


def test_only_a_finished_item_carries_the_right_encrypted_content(client: Client) -> None:
    asked = respond("think", stream=True, **SEALED)
    events = answer_of(client, asked)
    items = [event["item"] for event in events if "item" in event]
    items += events[-1]["response"]["output"]
    sealed = [entry for entry in items if entry["type"] == "reasoning"]
    contents = [entry["encrypted_content"] for entry in sealed]
    assert [text in client.fake.issued.sealed for text in contents] == [False, True, False]


def test_thoughts_are_told_only_as_far_as_they_are_asked_for(client: Client) -> None:
    bare = answer_of(client, respond("think"))["output"][0]
    assert bare["summary"] == [] and "encrypted_content" not in bare
    full = answer_of(client, respond("think", **SEALED))["output"][0]
    assert full["summary"] == [{"type": "summary_text", "text": "Let me think about that."}]
    assert full["encrypted_content"] in client.fake.issued.sealed


def test_a_late_summary_comes_without_deltas() -> None:
    def brain(dialect: str, body: Json) -> list[AnyPart]:
        return [Think("hm", late=True), Say("hi")]

    with FakeCopilot(brain=brain) as fake:
        events = answer_of(Client(fake), respond(stream=True, **SEALED))
        assert not [event for event in events if "reasoning_summary" in event["type"]]
        done = [event["item"] for event in events if event["type"].endswith("output_item.done")]
        assert done[0]["summary"] == [{"type": "summary_text", "text": "hm"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("max_output_tokens", "incomplete"),
        ("content_filter", "incomplete"),
        ("cyber_policy", "failed"),
    ],
)
def test_an_answer_that_stops_early_says_why(reason: str, status: str, stream: bool) -> None:
    def brain(dialect: str, body: Json) -> list[Say | Think | Call | Stop]:
        return [Say("half a"), Stop(reason)]

    with FakeCopilot(brain=brain) as fake:
        got = answer_of(Client(fake), respond(stream=stream))
        if stream:
            assert got[-1]["type"] == f"response.{status}"
            got = got[-1]["response"]
        told = got["error"]["code"] if status == "failed" else got["incomplete_details"]["reason"]
        assert (got["status"], told) == (status, reason)


@pytest.mark.parametrize("model", ["gpt-5.2", CODEX, "gpt-5.4"])
def test_a_thought_and_its_calls_come_back_to_responses(
    fake: FakeCopilot, client: Client, model: str
) -> None:
    asked = respond("think and use both tools", model, tools=[READ, PATCH], **SEALED)
    history = answer_of(client, asked)["output"]
    assert [entry["type"] for entry in history] == [
        "reasoning", "function_call", "custom_tool_call",
    ]  # fmt: skip
    bare = [{key: v for key, v in entry.items() if key != "id"} for entry in history]
    results = [
        {"type": f"{entry['type']}_output", "call_id": entry["call_id"], "output": entry["name"]}
        for entry in bare[1:]
    ]
    asked["input"] = [said("user", HEARD), *bare, *results]
    again = answer_of(client, asked, X_Initiator="agent")
    assert again["output"][0]["content"][0]["text"] == "The tool said: read and patch"
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert fake.violations == []
    for wrong, text in (
        ([*history, *results], "string_above_max_length"),
        (
            [bare[1], bare[2], *results, bare[0], said("assistant", SAID)],
            "its required 'reasoning'",
        ),
        ([bare[1], bare[0], bare[2], *results], "its required 'reasoning'"),
        ([{**bare[0], "encrypted_content": "foreign"}, *bare[1:], *results], "does not belong"),
        ([bare[0], said("user", HEARD)], "following item"),
        ([{**bare[0], "content": None}, *bare[1:], *results], "input[0].content"),
        ([{**bare[0], "status": None}, *bare[1:], *results], "input[0].status"),
        ([{**bare[0], "id": "x"}, *bare[1:], *results], "begins with 'rs'"),
        ([{k: v for k, v in bare[0].items() if k != "summary"}, bare[1], results[0]], "summary"),
        ([{"type": "reasoning", "summary": []}, *bare[1:], *results], "not found"),
    ):
        status, body = client.send(
            "POST", "/responses", client.headers(X_Initiator="agent"), {**asked, "input": wrong}
        )
        assert (status, text in json.dumps(body)) == (400, True), body


@pytest.mark.parametrize(
    ("body", "initiator"),
    [
        (respond(), "user"),
        (respond(store=False, truncation="auto", prompt_cache_key="c:gpt"), "user"),
        (
            respond(max_output_tokens=16, instructions="Be brief.", parallel_tool_calls=False),
            "user",
        ),
        (respond(reasoning={"effort": "none"}), "user"),
        (respond(reasoning={"effort": "xhigh", "summary": "detailed"}), "user"),
        (respond(text={"verbosity": "low", "format": {"type": "json_object"}}), "user"),
        (
            respond(
                text={
                    "format": {
                        "type": "json_schema",
                        "name": "a",
                        "schema": STRICT,
                        "strict": True,
                    }
                }
            ),
            "user",
        ),
        (
            respond(context_management=[{"type": "compaction", "compact_threshold": 9_000}]),
            "user",
        ),
        (respond(tools=[READ, PATCH], tool_choice={"type": "custom", "name": "patch"}), "user"),
        (respond(tools=[{**READ, "strict": True, "parameters": STRICT}]), "user"),
        (
            respond(
                tools=[{"type": "namespace", "name": "n", "description": "d", "tools": [READ]}],
            ),
            "user",
        ),
        (
            respond(
                tools=[READ],
                tool_choice={
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "read"}],
                },
            ),
            "user",
        ),
        (respond([{"role": "developer", "content": "x"}, ASK]), "user"),
        (
            respond([said("user", HEARD), said("assistant", SAID, phase="final_answer"), ASK]),
            "user",
        ),
        (respond([ASK, said("assistant", SAID, id="msg_1", status="completed")]), "agent"),
        (respond([ASK, {**CALL, "id": "fc_1", "status": "completed"}, OUTPUT]), "agent"),
        (
            respond(
                [
                    CALL,
                    item("custom_tool_call", "c2", id="ctc_1"),
                    item("custom_tool_call_output", "c2"),
                    OUTPUT,
                    ASK,
                ]
            ),
            "user",
        ),
    ],
)
def test_a_right_responses_body_is_accepted(
    fake: FakeCopilot, client: Client, body: Json, initiator: str
) -> None:
    answer_of(client, body, X_Initiator=initiator)
    assert fake.violations == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (respond(store=True), "store is not supported"),
        (respond(store=None), "store is not supported"),
        (respond(previous_response_id="resp_1"), "previous_response_not_found"),
        *(
            ({**respond(), key: {}}, f"Unsupported parameter: '{key}'")
            for key in (
                "stream_options",
                "service_tier",
                "user",
                "safety_identifier",
                "metadata",
                "background",
                "conversation",
                "prompt",
            )
        ),
        (respond(client_metadata={}), "Unknown parameter: 'client_metadata'"),
        (respond(max_tokens=50), "Unknown parameter: 'max_tokens'"),
        (respond(stop=["x"]), "Unknown parameter: 'stop'"),
        (respond(instructions=None), "instructions"),
        (respond(instructions=[HEARD]), "instructions"),
        (respond(stream="yes"), "stream"),
        (respond(prompt_cache_key=LONG), "string_above_max_length"),
        (respond(include=["usage"]), "include[0]"),
        (respond(truncation="none"), "truncation"),
        (respond(context_management={}), "context_management"),
        (respond(reasoning={"effort": "max"}), "reasoning.effort"),
        (respond(reasoning={"effort": "none"}, model=CODEX), "reasoning.effort"),
        (respond(reasoning={"effort": None}), "reasoning.effort"),
        (respond(reasoning={"summary": "none"}), "reasoning.summary"),
        (respond(reasoning={"max_tokens": 1}), "reasoning.max_tokens"),
        (respond(temperature=1), "'temperature' is not supported with this model"),
        (respond(top_p=1, reasoning={"effort": "none"}), "'top_p' is not supported"),
        (respond(max_output_tokens=15), "integer_below_min_value"),
        (respond(max_output_tokens=64_001), "integer_above_max_value"),
        (respond(text={"verbosity": "loud"}), "text.verbosity"),
        (respond(text={"format": {"type": "json_schema", "schema": TOOL}}), "text.format.name"),
        (
            respond(
                text={
                    "format": {"type": "json_schema", "name": "a", "schema": TOOL, "strict": True}
                }
            ),
            "additionalProperties",
        ),
        (respond(tools=[chat_tool()]), "tools[0].function"),
        (respond(tools=[{"type": "function", "name": "a"}]), "type: "),
        (respond(tools=[{**READ, "parameters": {"type": "object"}}]), "missing properties"),
        (respond(tools=[{**READ, "parameters": {**TOOL, "$schema": "x"}}]), "$schema"),
        (respond(tools=[{**READ, "parameters": TOOL, "strict": True}]), "additionalProperties"),
        (respond(tools=[{**READ, "strict": None}]), "tools[0].strict"),
        (respond(tools=[{**READ, "name": "a.b"}]), "does not match pattern"),
        (respond(tools=[{**READ, "name": LONG}]), "string_above_max_length"),
        (respond(tools=[READ, READ]), "Duplicate tool name"),
        (respond(tools=[{**READ, "name": f"t{n}"} for n in range(129)]), "array_above_max_length"),
        (respond(tools=[{**PATCH, "format": {"type": "grammar"}}]), "format.syntax"),
        (
            respond(tools=[{"type": "namespace", "name": "n", "description": "", "tools": [READ]}]),
            "tools[0].description",
        ),
        *(
            (respond(tools=[{"type": kind}]), f"The requested tool {kind} is not supported")
            for kind in (
                "image_generation",
                "web_search",
                "web_search_preview",
                "tool_search",
                "local_shell",
                "computer_use_preview",
                "apply_patch",
                "shell",
                "mcp",
            )
        ),
        (respond(tool_choice="required"), "must be specified with 'tools'"),
        (respond(tools=[READ], tool_choice="any"), "tool_choice"),
        (respond(tools=[READ], tool_choice={"type": "function", "name": "b"}), "not found"),
        (respond(tools=[PATCH], tool_choice={"type": "function", "name": "patch"}), "not found"),
        ({"model": "gpt-5.2"}, "Missing required parameter: 'input'"),
        (respond([]), "Missing required parameter: 'input'"),
        (respond(" "), "empty_string"),
        (respond(["hi"]), "input[0]"),
        (respond([{"type": "web_search_call", "id": "ws_1"}, ASK]), "input[0].type"),
        (respond([{"type": "item_reference", "id": "msg_1"}, ASK]), "Items are not persisted"),
        (respond([{"type": "compaction", "encrypted_content": "x"}, ASK]), "does not belong"),
        (respond([{**ASK, "name": "bob"}]), "Unknown parameter: 'input[0].name'"),
        (respond([{**ASK, "role": "tool"}]), "input[0].role"),
        (respond([{**ASK, "content": None}]), "input[0].content"),
        (respond([{**ASK, "content": []}]), "input[0].content"),
        (respond([{**ASK, "status": None}]), "input[0].status"),
        (respond([{**ASK, "phase": "commentary"}]), "input[0].phase"),
        (respond([{**ASK, "id": "m1"}]), "begins with 'msg'"),
        (respond([{**ASK, "id": "msg_" + LONG}]), "string_above_max_length"),
        (respond([{**ASK, "id": "msg_1"}] * 2), "Duplicate item"),
        (respond([said("user", TEXT)]), "input[0].content[0].type"),
        (respond([said("user", SAID)]), "input[0].content[0].type"),
        (respond([said("assistant", HEARD), ASK]), "input[0].content[0].type"),
        (respond([said("assistant", {**SAID, "text": ""}), ASK]), "empty_string"),
        (respond([said("assistant", {**SAID, "annotations": None}), ASK]), "annotations"),
        (respond([ASK, CALL]), "No tool output found for function call c1"),
        (respond([ASK, CALL, ASK, OUTPUT]), "No tool output found for function call c1"),
        (respond([ASK, CALL, said("assistant", SAID), OUTPUT]), "No tool output found"),
        (
            respond([CALL, item("function_call", "c2"), OUTPUT, item("function_call", "c3")]),
            "No tool output found for function call c2",
        ),
        (respond([CALL, CALL, OUTPUT]), "No tool output found"),
        (respond([OUTPUT, ASK]), "No tool call found"),
        (respond([CALL, OUTPUT, OUTPUT]), "No tool call found"),
        (respond([CALL, item("custom_tool_call_output")]), "No tool call found"),
        (respond([{**CALL, "id": "call_1"}, OUTPUT]), "begins with 'fc'"),
        (respond([{**CALL, "arguments": ""}, OUTPUT]), "input[0].arguments"),
        (respond([{**CALL, "arguments": {}}, OUTPUT]), "input[0].arguments"),
        (respond([{**CALL, "name": "a.b"}, OUTPUT]), "does not match pattern"),
        (respond([{**CALL, "call_id": LONG}, OUTPUT]), "string_above_max_length"),
        (respond([{**CALL, "call_id": ""}, OUTPUT]), "empty_string"),
        (respond([CALL, {**OUTPUT, "output": [HEARD]}]), "input[1].output"),
        (respond([CALL, {**OUTPUT, "output": None}]), "input[1].output"),
        (respond("word " * 200_000), "model_max_prompt_tokens_exceeded"),
        (respond(model="gpt-4.1"), "unsupported_api_for_model"),
        (respond(model="text-embedding-3-small"), "model_not_supported"),
    ],
)
def test_a_wrong_responses_body_is_refused(
    fake: FakeCopilot, client: Client, body: Json, text: str
) -> None:
    status, answer = client.send("POST", "/responses", client.headers(), body)
    assert status == 400
    assert text in json.dumps(answer, ensure_ascii=False)
    assert len(fake.violations) == 1
    assert "Error" not in fake.violations[0]


def test_options_of_text_need_a_model_that_knows_them() -> None:
    with FakeCopilot(models=[{"id": "bare", "supported_endpoints": ["/responses"]}]) as fake:
        client = Client(fake)
        plain_text = respond(model="bare", text={"format": {"type": "text"}}, temperature=0.5)
        assert answer_of(client, plain_text)["status"] == "completed"
        asked = respond(model="bare", text={"verbosity": "low"})
        assert client.send("POST", "/responses", client.headers(), asked)[0] == 400


def test_images_on_responses_are_messages_with_a_detail(fake: FakeCopilot, client: Client) -> None:
    answer = answer_of(client, respond([said("user", HEARD, SIGHT)]), Copilot_Vision_Request="true")
    assert "I see 1 image(s)" in answer["output"][0]["content"][0]["text"]
    for initiator in ("user", "agent"):
        moved = respond([CALL, OUTPUT, said("user", SIGHT)])
        answer_of(client, moved, Copilot_Vision_Request="true", X_Initiator=initiator)
    assert fake.violations == []
    wrong = [
        ({"X_Initiator": "user"}, [said("user", SIGHT)], "Copilot-Vision-Request"),
        ({}, [said("user", {k: v for k, v in SIGHT.items() if k != "detail"})], "detail"),
        ({}, [said("user", {**SIGHT, "image_url": "https://a.example/b.png"})], "image_url"),
        ({}, [said("user", {"type": "input_image", "file_id": "f", "detail": "auto"})], "file_id"),
        ({}, [said("developer", SIGHT), ASK], "content[0].type"),
        ({}, [CALL, {**OUTPUT, "output": [SIGHT]}], "input[1].output"),
    ]
    for changes, items, text in wrong:
        headers = client.headers(**(changes or {"Copilot_Vision_Request": "true"}))
        status, body = client.send("POST", "/responses", headers, respond(items))
        assert (status, text in json.dumps(body)) == (400, True), body
    assert len(fake.violations) == len(wrong)


@pytest.mark.parametrize(
    ("items", "right"),
    [
        ("hi", "user"),
        ([CALL, OUTPUT], "agent"),
        ([ASK, said("assistant", SAID)], "agent"),
        ([CALL, OUTPUT, ASK], "user"),
    ],
)
def test_the_last_item_tells_who_asks_responses(
    fake: FakeCopilot, client: Client, items: Any, right: str
) -> None:
    for initiator in ("user", "agent"):
        answer_of(client, respond(items), X_Initiator=initiator)
    wrong = "user" if right == "agent" else "agent"
    assert fake.violations == [f"X-Initiator is {wrong}, should be {right}"]


def test_a_hand_made_responses_stream_is_numbered_and_named() -> None:
    made = numbered({"type": "response.created"}, {"type": "error"}, first=3)
    assert [frame["sequence_number"] for frame in frames(made.decode())] == [3, 4]
    assert made.startswith(b"event: response.created\ndata: {")


# ---- /embeddings ---------------------------------------------------------------------------------


def embed(said: Any, **more: Any) -> Json:
    return {"model": "text-embedding-3-small", "input": said, **more}


def test_vectors_come_in_the_asked_size_and_sometimes_nameless(
    fake: FakeCopilot, client: Client
) -> None:
    answers = []
    for _ in range(2):
        headers = client.headers(X_Initiator=None)
        asked = embed(["a", "b", "a"], dimensions=8, encoding_format="float")
        status, answer = client.send("POST", "/embeddings", headers, asked)
        assert status == 200
        answers.append(answer)
    vectors = [row["embedding"] for row in answers[0]["data"]]
    assert vectors[0] == vectors[2] != vectors[1] and {len(v) for v in vectors} == {8}
    assert [("object" in answer, "model" in answer) for answer in answers] == [
        (False, False),
        (True, True),
    ]
    assert answers[1]["data"][2]["object"] == "embedding" and answers[1]["data"][2]["index"] == 2
    assert [call.path for call in fake.calls] == ["/embeddings"] * 2
    assert fake.violations == []


@pytest.mark.parametrize(
    "body",
    [
        embed("a"),
        embed([]),
        embed([""]),
        embed([[1, 2]]),
        embed(["a"] * 513),
        embed(["a"], encoding_format="base64"),
        embed(["a"], dimensions=0),
        embed(["a"], dimensions=1537),
        embed(["a"], user="me"),
        embed(["a"]) | {"model": "gpt-4.1"},
        embed(["a"], dimensions=8) | {"model": "old"},
    ],
)
def test_a_wrong_embeddings_body_is_refused(body: Json) -> None:
    old = {"id": "old", "capabilities": {"type": "embeddings", "limits": {"max_inputs": 1}}}
    with FakeCopilot(models=[*default_models(), old]) as fake:
        client = Client(fake)
        headers = client.headers(X_Initiator=None)
        assert client.send("POST", "/embeddings", headers, body)[0] == 400
        assert len(fake.violations) == 1
        assert "Error" not in fake.violations[0]
        right = embed(["a"]) | {"model": "old"}
        headers = client.headers(X_Initiator=None)
        assert client.send("POST", "/embeddings", headers, right)[0] == 200


def test_nobody_initiates_embeddings_and_their_answer_can_be_queued(
    fake: FakeCopilot, client: Client
) -> None:
    fake.queue(Answer(429, {"Retry-After": "2"}, b"slow down"))
    assert client.send("POST", "/embeddings", client.headers(), embed(["a"])) == (429, "slow down")
    assert fake.violations == ["X-Initiator on /embeddings, where nobody initiates a turn"]


# ---- Bytes on the wire ---------------------------------------------------------------------------


def raw(client: Client, body: Json, path: str = "/chat/completions") -> socket.socket:
    """A socket on which a right request has been sent."""
    sock = socket.create_connection(("127.0.0.1", int(client.fake.host.split(":")[1])), timeout=5)
    data = json.dumps(body).encode()
    headers = {"Host": client.fake.host, "Content-Length": str(len(data)), **client.headers()}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode() + data)
    return sock


def receive(sock: socket.socket) -> bytes:
    """All bytes until the connection ends."""
    got = b""
    while data := sock.recv(65536):
        got += data
    return got


def test_a_queued_answer_waits_until_the_request_is_right(
    fake: FakeCopilot, client: Client
) -> None:
    fake.queue(Answer(429, {"Retry-After": "2"}, b"slow down"))
    assert client.chat(chat(store=True))[0] == 400
    assert client.chat(chat()) == (429, "slow down")
    fake.queue(Answer(418, strict=False))
    assert client.chat(chat(store=True))[0] == 418
    assert len(fake.violations) == 1


def test_pieces_come_when_the_test_lets_them(fake: FakeCopilot, client: Client) -> None:
    go = threading.Event()
    text = sse({"choices": [], "text": "é"})
    cut = text.index("é".encode()) + 1
    fake.queue(Answer(body=[text[:cut], text[cut:]], pause=go))
    with raw(client, chat()) as sock:
        got = b""
        while chunk(text[:cut]) not in got:
            got += sock.recv(65536)
        assert b"text/event-stream" in got
        go.set()
        while not got.endswith(chunk(b"")):
            got += sock.recv(65536)
    assert got.endswith(chunk(text[:cut]) + chunk(text[cut:]) + chunk(b""))
    assert fake.cancelled == []


def test_even_the_chunk_framing_can_be_cut(fake: FakeCopilot, client: Client) -> None:
    framed = chunk(b"abc") + chunk(b"")
    fake.queue(Answer(body=drip(framed), framed=True))
    assert client.chat(chat()) == (200, "abc")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_closed_answer_ends_with_its_connection(
    fake: FakeCopilot, client: Client, chunked: bool
) -> None:
    fake.queue(Answer(body=b"abc", then="close", chunked=chunked))
    with raw(client, chat()) as sock:
        head, _, body = receive(sock).partition(b"\r\n\r\n")
    assert body == (chunk(b"abc") if chunked else b"abc")
    assert b"Content-Length" not in head


@pytest.mark.parametrize("status", [0, 200])
def test_a_reset_is_a_reset(fake: FakeCopilot, client: Client, status: int) -> None:
    fake.queue(Answer(status, then="reset"))
    with raw(client, chat()) as sock, pytest.raises(ConnectionResetError):
        receive(sock)


def test_a_client_that_leaves_is_noticed(fake: FakeCopilot, client: Client) -> None:
    fake.queue(Answer(body=b"data: {}\n\n", then="hang"))
    fake.queue(Answer(body=[b"a", b"b"], pause=threading.Event()))
    for count in (1, 2):
        sock = raw(client, chat())
        assert sock.recv(10)
        sock.close()
        assert fake.wait_cancelled(5, count)
    assert fake.cancelled == fake.calls
    assert fake.violations == []


def test_prepared_exchanges_and_lists_come_first(fake: FakeCopilot, client: Client) -> None:
    fake.exchange_answers.append(Answer(500, body=b"<html>Unicorn!"))
    fake.models_answers.append(Answer(429))
    headers = client.github()
    assert client.send("GET", "/copilot_internal/v2/token", headers)[0] == 500
    assert client.send("GET", "/copilot_internal/v2/token", headers)[0] == 200
    assert client.send("GET", "/models", client.headers())[0] == 429
    assert client.send("GET", "/models", client.headers())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        "GET /models HTTP/1.1\r\n\r\n",
        "GET /models HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET /models HTTP/1.0\r\nHost: a\r\n\r\n",
        "GET http://a/models HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /models HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET /models HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
        "POST /models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST /models HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /models HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_http_is_taken_to_the_letter(fake: FakeCopilot, head: str) -> None:
    port = int(fake.host.split(":")[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(head.encode())
        assert receive(sock).startswith(b"HTTP/1.1 4")
    assert len(fake.violations) == 1


def test_a_failing_brain_is_a_violation() -> None:
    def brain(dialect: str, body: Json) -> list[Say | Think | Call | Stop]:
        raise AssertionError("the test did not expect this")

    with FakeCopilot(brain=brain) as fake:
        assert Client(fake).chat(chat())[0] == 500
        assert "the test did not expect this" in fake.violations[0]
