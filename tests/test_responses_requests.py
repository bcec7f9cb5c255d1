"""Requests of OpenAI's responses dialect: read, written, and scrubbed for an upstream of its own.

Numbers of cases and of sections 3.x and 5.x are those of the project's sheet of wire formats, 6.1
is of its sheet about Copilot. R is OpenAI responses, A is Anthropic messages, C is OpenAI chat, K
is Kiro; `R>A` is a request in R that an upstream of A is asked with. What is written is held
against the imitations' own rules as it would go over the wire.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from fake_kiro import default_models as default_kiro_models
from fakes import Issued, Refusal, check_chat, check_messages, check_responses, default_models
from kiro_rules import (
    Fault,
    check_fields,
    check_images,
    check_origin_and_model,
    check_reasoning,
    check_shape,
    check_tools,
    check_turns,
    read_body,
)
from support import growth

import aiclient_api as gw
from aiclient_api import CHAT, KIRO, MESSAGES, RESPONSES, Conversation, Dialect, Model

Json = dict[str, Any]

PNG = "iVBORw0KGgo="
IMAGE_URL = f"data:image/png;base64,{PNG}"
INPUT_IMAGE = {"type": "input_image", "image_url": IMAGE_URL, "detail": "auto"}
A_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
C_IMAGE = {"type": "image_url", "image_url": {"url": IMAGE_URL}}
PDF_URL = "data:application/pdf;base64,JVBE"
A_PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf",
                                        "data": "JVBE"}}  # fmt: skip
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}}
EMPTY_SCHEMA = {"type": "object", "properties": {}}
CUSTOM_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
KEY = "00000000-0000-7000-8000-0EXAMPLE0000"
ARN = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLE"

GPT = "gpt-4.1"
GPT5 = "gpt-5.2"
CODEX = "gpt-5.3-codex"  # speaks responses only
SONNET = "claude-sonnet-4.5"  # thinks with a budget
OPUS = "claude-opus-4.8"  # thinks adaptively
GEMINI = "gemini-3.1-pro-preview"
RAW = {entry["id"]: entry for entry in reversed(default_models()) if "id" in entry}
MODELS = gw.read_copilot_models({"data": default_models()}, "copilot")
KIRO_RAW = {entry["modelId"]: entry for entry in default_kiro_models()}
KIRO_MODELS = gw.read_kiro_models(default_kiro_models(), "kiro")
KIRO_MARK = gw.kiro_mark("kiro")


# ---- what is asked -------------------------------------------------------------------------------


def user(content: Any = "hi", **more: Any) -> Json:
    """A user's message: an item of R, a message of A and of C."""
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> Json:
    """An assistant's message of any dialect."""
    return {"role": "assistant", "content": content, **more}


def developer(content: Any, **more: Any) -> Json:
    """A developer's message of R or C."""
    return {"role": "developer", "content": content, **more}


def said(words: str, **more: Any) -> Json:
    """An item of R: what the assistant said."""
    part = {"type": "output_text", "text": words, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [part], **more}


def input_text(words: str) -> Json:
    """A text part of R."""
    return {"type": "input_text", "text": words}


def text(words: str) -> Json:
    """A text part of A and C."""
    return {"type": "text", "text": words}


def call(call_id: str, name: str = "f", arguments: Any = "{}", **more: Any) -> Json:
    """An item of R: a function's call."""
    head = {"type": "function_call", "call_id": call_id, "name": name}
    return {**head, "arguments": arguments, **more}


def output(call_id: str, said: Any = "done", **more: Any) -> Json:
    """An item of R: a function's output."""
    return {"type": "function_call_output", "call_id": call_id, "output": said, **more}


def custom_call(call_id: str, words: str, name: str = "apply_patch", **more: Any) -> Json:
    """An item of R: a custom tool's call."""
    head = {"type": "custom_tool_call", "call_id": call_id, "name": name}
    return {**head, "input": words, **more}


def custom_output(call_id: str, said: Any = "done") -> Json:
    """An item of R: a custom tool's output."""
    return {"type": "custom_tool_call_output", "call_id": call_id, "output": said}


def reasoning(encrypted: str, *summary: str, **more: Any) -> Json:
    """An item of R: a thought."""
    rows = [{"type": "summary_text", "text": words} for words in summary]
    return {"type": "reasoning", "summary": rows, "encrypted_content": encrypted, **more}


def function(name: str = "f", **more: Any) -> Json:
    """A tool of R."""
    return {"type": "function", "name": name, "parameters": OBJECT, "strict": False, **more}


def namespace(name: str, *tools: Json, **more: Any) -> Json:
    """Tools of R inside of a namespace."""
    return {"type": "namespace", "name": name, "tools": list(tools), **more}


def use(call_id: str, name: str = "f", **arguments: Any) -> Json:
    """A call of A."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id: str, content: Any = "done", **more: Any) -> Json:
    """A result of A."""
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def chat_call(call_id: str, name: str = "f", arguments: str = "{}") -> Json:
    """A call of C."""
    entry = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": entry}


def tool_message(call_id: str, content: Any = "done") -> Json:
    """A result of C."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def chat_tool(name: str = "f", schema: Any = None, **more: Any) -> Json:
    """A tool of C."""
    return {"type": "function", "function": {"name": name, "parameters": schema or OBJECT, **more}}


def r_body(*items: Json, **more: Any) -> Json:
    """A responses body."""
    return {"model": "m", "input": list(items) or [user()], **more}


def a_body(*messages: Json, **more: Any) -> Json:
    """A messages body."""
    return {"model": "m", "max_tokens": 1000, "messages": list(messages) or [user()], **more}


def c_body(*messages: Json, **more: Any) -> Json:
    """A chat body."""
    return {"model": "m", "messages": list(messages) or [user()], **more}


# ---- what is sent --------------------------------------------------------------------------------


def read(body: Json, dialect: Dialect = RESPONSES) -> Conversation:
    """The Chat in a body, which must not be changed."""
    before = copy.deepcopy(body)
    chat = dialect.read_request(body)
    assert body == before
    return chat


def on_the_wire(body: Json) -> Json:
    """A body as the upstream reads it."""
    decoded: Json = json.loads(gw.dump_json(body))
    return decoded


def accept(dialect: str, body: Json, model: str, issued: Issued | None = None) -> Json:
    """A body after the rules, once the imitation has taken it; the body must not be changed."""
    before = copy.deepcopy(body)
    scrubbed = gw.sanitize_body(dialect, body, MODELS[model], {}, True).body
    assert body == before
    sent, issued = on_the_wire(scrubbed), issued or Issued()
    if dialect == "chat":
        check_chat(copy.deepcopy(sent), RAW[model], issued)
    elif dialect == "responses":
        check_responses(copy.deepcopy(sent), RAW[model], issued)
    else:
        betas = gw.messages_betas(scrubbed, "", set(), MODELS[model])
        check_messages(copy.deepcopy(sent), RAW[model], set(betas.split(",")) - {""}, issued)
    return sent


def to_chat(body: Json, model: str = GPT, source: Dialect = RESPONSES) -> Json:
    """What a chat upstream is asked, before the rules; they make of it what Copilot takes."""
    written = CHAT.write_request(read(body, source), MODELS[model])
    accept("chat", written, model)
    return written


def to_messages(body: Json, model: str = SONNET, issued: Issued | None = None) -> Json:
    """What a messages upstream is asked, before the rules; they make of it what Copilot takes."""
    written = MESSAGES.write_request(read(body), MODELS[model])
    accept("messages", written, model, issued)
    return written


def to_responses(
    body: Json, source: Dialect, model: str = CODEX, issued: Issued | None = None
) -> Json:
    """What a responses upstream is asked, before the rules; they make of it what Copilot takes."""
    written = RESPONSES.write_request(read(body, source), MODELS[model])
    accept("responses", written, model, issued)
    return written


def kiro_faults(written: Json, model: str, issued: Issued | None = None) -> list[str]:
    """What Kiro would refuse, or only dislike."""
    endpoint = gw.KiroEndpoint("https://runtime.us-east-1.kiro.dev", "ide", ARN)
    placed = gw.address_kiro_request(
        written,
        endpoint,
        "5d7c2f0e-8f0b-4c39-9a1e-0d1f5b1f6a11",
        "0b0d3c1e-4f57-4b7e-9f0a-0a4f8f2f6a55",
    )
    try:
        body = read_body(gw.dump_json(placed))
        check_shape(body, "request")
        notes = check_turns(body)
        check_origin_and_model(body, "ide", [KIRO_RAW[model]])
        check_tools(body)
        check_images(body, KIRO_RAW[model])
        check_fields(body, KIRO_RAW[model])
        if issued is not None:
            check_reasoning(body, issued, set())
    except Fault as fault:
        return [fault.note or fault.text]
    return notes


def to_kiro(body: Json, model: str = OPUS, issued: Issued | None = None) -> list[Json]:
    """The turns that Kiro is asked with, once the imitation has taken them."""
    written = KIRO.write_request(read(body), KIRO_MODELS[model])
    assert kiro_faults(written, model, issued) == []
    state = written["conversationState"]
    rows = [*state.get("history", ()), state["currentMessage"]]
    bare = []
    for row in rows:
        (message,) = row.values()
        bare.append({key: value for key, value in message.items() if key != "modelId"})
    return bare


def kiro_tools(turns: list[Json]) -> list[Json]:
    """The tools that Kiro is told of."""
    declared = turns[-1].get("userInputMessageContext", {}).get("tools", ())
    return [entry["toolSpecification"] for entry in declared]


def kiro_results(turn: Json) -> list[tuple[str, str]]:
    """(id, words) of the results in a turn for Kiro."""
    rows = turn.get("userInputMessageContext", {}).get("toolResults", ())
    return [(row["toolUseId"], row["content"][0]["text"]) for row in rows]


def native(*items: Any, model: str = CODEX, issued: Issued | None = None, **more: Any) -> Json:
    """A body of R after the rules, once the imitation has taken it."""
    return accept("responses", r_body(*items, **more), model, issued)


def items_of(*items: Any, model: str = CODEX, issued: Issued | None = None) -> list[Json]:
    """The items that stay of a native body."""
    rows: list[Json] = native(*items, model=model, issued=issued)["input"]
    return rows


def scrubbed(*items: Json, model: Model | None = None, **more: Any) -> gw.BodyDraft:
    """A native body after the rules, unseen by the imitation."""
    return gw.sanitize_body("responses", r_body(*items, **more), model or MODELS[CODEX], {}, True)


def refused(body: Json, dialect: Dialect = RESPONSES) -> gw.InvalidRequest:
    """The 400 for a body that is to be converted."""
    with pytest.raises(gw.InvalidRequest) as caught:
        read(body, dialect)
    assert caught.value.status == 400
    return caught.value


def refused_natively(body: Json) -> gw.InvalidRequest:
    """The 400 for a body that is to go up in its own dialect."""
    with pytest.raises(gw.InvalidRequest) as caught:
        gw.sanitize_body("responses", body, MODELS[CODEX], {}, True)
    assert caught.value.status == 400
    return caught.value


REFUSERS: list[Callable[[Json], gw.InvalidRequest]] = [refused, refused_natively]


def hash_id(call_id: str) -> str:
    """5.0: what stands for a call id that not every vendor takes."""
    return "call_" + hashlib.sha256(call_id.encode()).hexdigest()[:24]


def envelope(mark: str, **fields: Any) -> str:
    """4.5: opaque text of ours, written as the sheet describes it."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return mark + base64.urlsafe_b64encode(text.encode()).decode()


def opened(mark: str, opaque: str) -> Json:
    """4.5: what is in opaque text of ours."""
    assert opaque.startswith(mark)
    decoded: Json = json.loads(base64.urlsafe_b64decode(opaque.removeprefix(mark)))
    return decoded


# ---- the numbered cases --------------------------------------------------------------------------


def test_an_image_of_a_result_follows_it_in_a_user_message() -> None:
    """Case 8, with 6.1: Copilot takes words only in an output, the image stands behind it."""
    body = a_body(user("q"), assistant([use("t1")]), user([result("t1", [A_IMAGE])]))
    written = to_responses(body, MESSAGES)
    outputs = [item for item in written["input"] if item.get("type") == "function_call_output"]
    assert [(o["call_id"], type(o["output"])) for o in outputs] == [("t1", str)]
    assert outputs[0]["output"]
    last = written["input"][-1]
    assert last["role"] == "user" and last["content"][-1] == INPUT_IMAGE
    assert "t1" in last["content"][0]["text"]


def test_an_answer_keeps_the_order_of_its_blocks() -> None:
    """Case 9."""
    issued = Issued()
    sealed = issued.seal(["t1"])
    thought = {
        "type": "thinking",
        "thinking": "why",
        "signature": envelope("gw1.r.", id="rs_1", enc=sealed),
    }
    turn = assistant([thought, text("T"), use("t1", a=1)])
    written = to_responses(a_body(user("q"), turn, user([result("t1")])), MESSAGES, CODEX, issued)
    _, thinking, message, called, answered = written["input"]
    assert (thinking["type"], thinking["encrypted_content"]) == ("reasoning", sealed)
    assert thinking["summary"] == [{"type": "summary_text", "text": "why"}]
    assert message["content"] == [{"type": "output_text", "text": "T", "annotations": []}]
    assert called == call("t1", arguments='{"a":1}')
    assert answered == output("t1")


def test_a_thought_of_anthropic_is_none_of_a_responses_upstream() -> None:
    """Case 9."""
    thought = {"type": "thinking", "thinking": "x", "signature": "EqQBEXAMPLE"}
    body = a_body(user("q"), assistant([thought, text("T")]), user("go"))
    assert [i.get("type") for i in to_responses(body, MESSAGES)["input"]] == ["message"] * 3


def test_a_chat_conversation_becomes_items() -> None:
    """Case 28."""
    rows = [assistant(None, tool_calls=[chat_call("call_1")]), tool_message("call_1", "r")]
    more = {"stop": "END", "max_completion_tokens": 5, "stream_options": {"include_usage": True}}
    written = to_responses(c_body(*rows, **more), CHAT)
    assert written["input"] == [call("call_1"), output("call_1", "r")]
    assert written["max_output_tokens"] == 16
    assert written["include"] == ["reasoning.encrypted_content"]
    assert not {"stop", "stream_options", "max_tokens"} & set(written)


@pytest.mark.parametrize("model", [CODEX, GPT5, "mai-code-1-EXAMPLE"])
def test_stop_strings_are_cut_here_as_the_dialect_has_none(model: str) -> None:
    """Case 28 and 2.2: `stop` is emulated on R, whichever model it is."""
    fitting = gw.read_copilot_model({"id": model, "supported_endpoints": ["/responses"]}, "copilot")
    assert fitting is not None
    assert gw.split_stops(["END", "\n"], "responses", fitting) == ([], ["END", "\n"])


def test_codex_begins_with_developer_items_that_become_the_system_prompt() -> None:
    """Case 29."""
    items = [
        developer([input_text("A")], type="message", id="msg_1"),
        developer([input_text("B"), input_text("C")], type="message", id="msg_2"),
        user([input_text("E")], type="message", id="msg_3"),
        user([input_text("P")], type="message", id="msg_4"),
    ]
    written = to_messages(r_body(*items))
    assert written["system"] == [text("A"), text("B"), text("C")]
    assert written["messages"] == [user([text("E"), text("P")])]


def test_a_namespace_is_part_of_the_name_where_there_are_none() -> None:
    """Case 30."""
    tools = [namespace("mcp__x", {"type": "function", "name": "go", "parameters": {}})]
    history = [user("q"), call("c1", "go", namespace="mcp__x"), output("c1"), user("on")]
    chat = read(r_body(*history, tools=tools))
    written = to_messages(r_body(*history, tools=tools))
    assert [tool["name"] for tool in written["tools"]] == ["mcp__x__go"]
    assert written["tools"][0]["input_schema"] == EMPTY_SCHEMA
    assert written["messages"][1]["content"] == [use("c1", "mcp__x__go")]
    item = answered_call(chat, "mcp__x__go", "{}")
    assert (item["type"], item["name"], item["namespace"]) == ("function_call", "go", "mcp__x")


def answered_call(chat: Conversation, name: str, arguments: str) -> Json:
    """The item that the caller gets for a call of the tool that is upstream called so."""
    terms = gw.ResponseContext("resp_1", 0, "m", tools={tool.name: tool for tool in chat.tools})
    terms.names = {wire: own for own, wire in chat.names.items()}
    writer = RESPONSES.writer(terms)
    events: list[Any] = [
        gw.MessageStart("x", "m"),
        gw.BlockStart("tool", "c9", terms.names.get(name, name)),
        gw.BlockDelta("arguments", arguments),
        gw.BlockStop(),
        gw.MessageStop("tool"),
    ]
    frames = [frame for event in events for frame in writer.write(event)]
    (item,) = [f["item"] for f in frames if f["type"] == "response.output_item.done"]
    assert item["call_id"] == "c9"
    return dict(item)


def test_a_custom_tool_is_a_function_with_one_text() -> None:
    """Case 31."""
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    tool = {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": grammar}
    body = r_body(user("q"), tools=[tool])
    (sent,) = to_chat(body)["tools"]
    assert sent["function"]["name"] == "apply_patch"
    assert sent["function"]["parameters"] == CUSTOM_SCHEMA
    assert sent["function"]["description"].startswith("Patches.")
    assert "start: /x/" in sent["function"]["description"]
    item = answered_call(read(body), "apply_patch", '{"input":"*** Begin Patch\\n"}')
    assert item["type"] == "custom_tool_call"
    assert (item["name"], item["input"]) == ("apply_patch", "*** Begin Patch\n")


def test_an_output_of_parts_is_a_result_of_blocks() -> None:
    """Case 32."""
    parts = [input_text("t"), {"type": "input_image", "image_url": "data:image/png;base64,AA=="}]
    written = to_messages(r_body(user("q"), call("c1"), output("c1", parts)))
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    (block,) = written["messages"][2]["content"]
    assert block == result("c1", [text("t"), {"type": "image", "source": source}])


def test_a_message_between_a_call_and_its_output_belongs_to_the_call() -> None:
    """Case 33."""
    written = to_chat(r_body(user("q"), call("c1"), said("note"), output("c1", "r")))
    assert written["messages"][1:] == [
        assistant("note", tool_calls=[chat_call("c1")]),
        tool_message("c1", "r"),
    ]


@pytest.mark.parametrize("refuse", REFUSERS)
def test_an_answer_that_was_not_kept_cannot_be_gone_on_from(
    refuse: Callable[[Json], gw.InvalidRequest],
) -> None:
    """Case 34."""
    error = refuse(r_body(user(), previous_response_id="resp_1"))
    said = RESPONSES.error_body(error, "req_1")["error"]
    assert said["message"]
    assert (said["type"], said["param"], said["code"]) == (
        "invalid_request_error",
        "previous_response_id",
        "previous_response_not_found",
    )


def test_ids_that_the_upstream_gave_and_then_refuses_do_not_go_up() -> None:
    """Case 35."""
    issued, long_id = Issued(), "call_" + "x" * 85
    sealed = issued.seal([gw.wire_id(long_id)])
    thought = reasoning(sealed, id="rs_" + "x" * 397)
    sent = items_of(user("q"), thought, call(long_id), output(long_id), issued=issued)
    assert sent[1:] == [reasoning(sealed), call(hash_id(long_id)), output(hash_id(long_id))]
    assert len(hash_id(long_id)) == 29


def test_tools_that_a_search_found_are_offered() -> None:
    """Case 36."""
    found = {
        "type": "tool_search_output",
        "call_id": "s1",
        "execution": "client",
        "tools": [function("T", description="Finds.")],
    }
    searched = {"type": "tool_search_call", "call_id": "s1", "execution": "client",
                "arguments": {"query": "t"}}  # fmt: skip
    tool = {"type": "tool_search", "execution": "client", "parameters": OBJECT}
    written = to_chat(r_body(user("q"), searched, found, tools=[tool]))
    assert [t["function"]["name"] for t in written["tools"]] == ["T", "tool_search"]
    assert written["messages"][1]["tool_calls"] == [chat_call("s1", "tool_search", '{"query":"t"}')]
    message = written["messages"][2]
    assert (message["role"], message["tool_call_id"]) == ("tool", "s1")
    assert "T" in message["content"]


def test_a_thought_comes_back_to_its_maker_byte_by_byte() -> None:
    """Case 50: summary parts and encrypted content of R, carried by a client of A."""
    issued = Issued()
    sealed = issued.seal([])
    terms = gw.ResponseContext("msg_1", 0, "m", request_body={"thinking": {"type": "adaptive"}})
    reader, writer = RESPONSES.reader(terms), MESSAGES.writer(terms)
    item = reasoning(sealed, "a \n", "\tb", id="rs_1")
    frames: list[Json] = [
        {"type": "response.created", "response": {"id": "resp_1", "model": "m"}},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "summary": []}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 1, "item": said("T", id="msg_1")},
        {"type": "response.completed", "response": {"id": "resp_1", "output": []}},
    ]
    written = [f for frame in frames for event in reader.read(frame) for f in writer.write(event)]
    deltas = [frame["delta"] for frame in written if frame["type"] == "content_block_delta"]
    thinking = "".join(d.get("thinking", "") for d in deltas)
    signature = "".join(d.get("signature", "") for d in deltas)
    assert thinking == "a \n\n\n\tb"
    assert opened("gw1.r.", signature)["enc"] == sealed
    thought = {"type": "thinking", "thinking": thinking, "signature": signature}
    body = a_body(user("q"), assistant([thought, text("T")]), user("on"))
    (back,) = [
        i
        for i in to_responses(body, MESSAGES, CODEX, issued)["input"]
        if i.get("type") == "reasoning"
    ]
    assert back["encrypted_content"] == sealed
    assert "\n\n".join(part["text"] for part in back["summary"]) == thinking


# ---- settings (3.2) ------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
ANY_OBJECT = {"type": "json_object"}
HASHED_KEY = hashlib.sha256(KEY.encode()).hexdigest()[:32]


def settings_of(written: Json) -> Json:
    """What a body says beside the conversation and what every body says."""
    usual = {"model", "messages", "input", "stream", "stream_options", "system", "tools"}
    return {key: value for key, value in written.items() if key not in usual}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, {}),
        ({"max_output_tokens": 77}, {"max_tokens": 77}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"prompt_cache_key": KEY}, {"prompt_cache_key": HASHED_KEY}),
        ({"text": {"format": {"type": "text"}}}, {}),
        ({"text": {"format": ANY_OBJECT}}, {"response_format": ANY_OBJECT}),
        (
            {"text": {"format": FORMAT}},
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "answer", "schema": SCHEMA, "strict": True}}},
        ),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_settings_of_a_chat_upstream(asked: Json, sent: Json) -> None:
    """3.2, R>C."""
    assert settings_of(to_chat(r_body(**asked))) == sent


@pytest.mark.parametrize(
    ("effort", "sent"),
    [("none", "none"), ("minimal", "none"), ("low", "low"), ("high", "high"), ("max", "xhigh")],
)
def test_the_effort_is_one_that_a_chat_model_lists(effort: str, sent: str) -> None:
    """5.5: the nearest listed level below, else the nearest above."""
    written = to_chat(r_body(reasoning={"effort": effort}), GPT5)
    assert accept("chat", written, GPT5)["reasoning_effort"] == sent


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"max_output_tokens": 77}, {"max_tokens": 77}),
        ({"max_output_tokens": 10**6}, {"max_tokens": 16_000}),
        ({}, {"max_tokens": 16_000}),
        ({"temperature": 1.5}, {"temperature": 1, "max_tokens": 16_000}),
        ({"top_p": 0.5}, {"top_p": 0.5, "max_tokens": 16_000}),
        (
            {"prompt_cache_key": KEY},
            {"metadata": {"user_id": HASHED_KEY}, "max_tokens": 16_000},
        ),
        (
            {"reasoning": {"effort": "low"}},
            {"thinking": {"type": "enabled", "budget_tokens": 4096}, "max_tokens": 16_000},
        ),
        (
            {"reasoning": {"effort": "high"}, "max_output_tokens": 9000},
            {"thinking": {"type": "enabled", "budget_tokens": 8999}, "max_tokens": 9000},
        ),
        ({"reasoning": {"effort": "none"}}, {"max_tokens": 16_000}),
        ({"text": {"verbosity": "low"}}, {"max_tokens": 16_000}),
    ],
)
def test_settings_of_a_messages_upstream(asked: Json, sent: Json) -> None:
    """3.2 and 5.5, R>A."""
    assert settings_of(to_messages(r_body(**asked))) == sent


@pytest.mark.parametrize("effort", ["low", "medium", "high", "xhigh"])
def test_a_model_that_thinks_adaptively_is_told_the_effort(effort: str) -> None:
    """5.5: xhigh is high where it is not listed."""
    written = to_messages(r_body(reasoning={"effort": effort}), OPUS)
    assert written["thinking"]["type"] == "adaptive"
    assert written["output_config"]["effort"] == {"xhigh": "high"}.get(effort, effort)


def test_a_format_reaches_a_messages_upstream() -> None:
    """5.3: `text.format`; the rules decide whether the model takes the field."""
    written = to_messages(r_body(instructions="I", text={"format": FORMAT}))
    assert written["system"] == [text("I")]
    assert written["output_config"]["format"] == {"type": "json_schema", "schema": SCHEMA}


UNHEARD: list[Json] = [
    {"store": True},
    {"store": False},
    {"include": ["reasoning.encrypted_content", "web_search_call.results"]},
    {"max_tool_calls": 3},
    {"truncation": "disabled"},
    {"truncation": "auto"},
    {"context_management": [{"type": "compaction", "compact_threshold": 1000}]},
    {"metadata": {"a": "b"}},
    {"user": "u"},
    {"safety_identifier": "s"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"ttl": "1h"}},
    {"service_tier": "flex"},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"client_metadata": {"x": "EXAMPLE"}},
    {"top_logprobs": 2},
    {"reasoning": {"summary": "detailed", "context": "auto", "mode": "x"}},
    {"background": False, "previous_response_id": None, "conversation": None, "prompt": None},
    {"something_new": 1},
]


@pytest.mark.parametrize("asked", UNHEARD, ids=lambda asked: "-".join(asked))
def test_what_other_upstreams_have_no_word_for_is_left_out_and_never_refused(asked: Json) -> None:
    """3.2 and 5.7."""
    assert to_chat(r_body(**asked)) == to_chat(r_body())
    assert to_messages(r_body(**asked)) == to_messages(r_body())
    assert to_kiro(r_body(**asked)) == to_kiro(r_body())


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"truncation": "auto"}, ["truncation"]),
        ({"truncation": "disabled"}, []),
        ({"store": True, "include": ["reasoning.encrypted_content"]}, []),
        ({"client_metadata": {}, "service_tier": "auto", "stream": True}, []),
        ({"something_new": 1}, ["something_new"]),
        ({"something_new": None}, []),
    ],
)
def test_what_the_caller_will_miss_is_named(asked: Json, named: list[str]) -> None:
    """3.2: truncation auto is a warning, the rest is silent."""
    assert read(r_body(**asked)).dropped == named


NULLS = (
    "instructions", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "top_logprobs",
    "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "include", "store",
    "previous_response_id", "conversation", "background", "prompt", "truncation",
    "context_management", "metadata", "user", "safety_identifier", "prompt_cache_key",
    "service_tier", "stream_options", "client_metadata",
)  # fmt: skip


def test_a_null_says_nothing() -> None:
    """3.2: clients send null for what is not set."""
    nulls: Json = dict.fromkeys(NULLS)
    assert to_chat(r_body(**nulls)) == to_chat(r_body())
    assert to_messages(r_body(**nulls)) == to_messages(r_body())
    assert to_kiro(r_body(**nulls)) == to_kiro(r_body())
    assert native(user(), **nulls) == native(user())
    assert read(r_body(**nulls)).dropped == scrubbed(user(), **nulls).dropped == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"instructions": 5},
        {"max_output_tokens": "many"},
        {"temperature": "hot"},
        {"tools": {}},
        {"tools": [5]},
        {"tool_choice": 5},
        {"tool_choice": "sometimes"},
        {"parallel_tool_calls": "yes"},
        {"text": "short"},
        {"text": {"format": 5}},
        {"reasoning": "high"},
        {"reasoning": {"effort": 5}},
        {"reasoning": {"effort": "huge"}},
        {"prompt_cache_key": 5},
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_type_is_named(wrong: Json) -> None:
    """3.2."""
    (key,) = wrong
    assert (refused(r_body(**wrong)).param or "").partition(".")[0] == key


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("previous_response_id", "resp_1", "previous_response_not_found"),
        ("conversation", "conv_1", "previous_response_not_found"),
        ("conversation", {"id": "conv_1"}, "previous_response_not_found"),
        ("background", True, None),
        ("prompt", {"id": "pmpt_1"}, None),
    ],
)
@pytest.mark.parametrize("refuse", REFUSERS)
def test_state_that_is_kept_nowhere_is_refused(
    key: str, value: Any, code: str | None, refuse: Callable[[Json], gw.InvalidRequest]
) -> None:
    """3.2: without it the conversation would be forgotten in silence."""
    error = refuse(r_body(user(), **{key: value}))
    assert (error.param, error.code) == (key, code)
    with pytest.raises(gw.InvalidRequest):
        RESPONSES.request_info(r_body(user(), **{key: value}))


# ---- input items (3.3) ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["hi", [user("hi")], [user([input_text("hi")], type="message")]])
def test_a_string_is_what_the_user_says(value: Any) -> None:
    """3.2 and 3.3: a message needs no type."""
    body = {"model": "m", "input": value}
    assert to_chat(body)["messages"] == [user("hi")]
    assert to_messages(body)["messages"] == [user([text("hi")])]
    assert to_kiro(body) == [{"content": "hi"}]


@pytest.mark.parametrize("refuse", REFUSERS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": ["hi"]}, "input.0"),
        ({"input": [user(), None]}, "input.1"),
    ],
)
def test_an_input_that_is_none_is_refused(
    body: Json, param: str, refuse: Callable[[Json], gw.InvalidRequest]
) -> None:
    assert refuse({"model": "m", **body}).param == param


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "message", "content": "hi"}, "input.1.role"),
        ({"role": "tool", "content": "hi"}, "input.1.role"),
        ({"role": 5, "content": "hi"}, "input.1.role"),
        (user(5), "input.1.content"),
        (user([5]), "input.1.content.0"),
        (user([{"type": "input_text"}]), "input.1.content.0.text"),
        (user([{"type": "input_audio", "input_audio": {}}]), "input.1.content.0"),
        (user([{"type": "unheard_of"}]), "input.1.content.0"),
        (user([{"type": "input_image", "file_id": "file_1"}]), "input.1.content.0"),
        (user([{"type": "input_image", "image_url": "http://a.example/b.png"}]),
         "input.1.content.0.image_url"),
        (user([{"type": "input_image", "image_url": "data:image/tiff;base64,AA=="}]),
         "input.1.content.0.image_url"),
        (user([{"type": "input_file", "file_id": "file_1"}]), "input.1.content.0"),
        (user([{"type": "input_file", "file_url": "https://a.example/b.pdf"}]),
         "input.1.content.0"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input.1.call_id"),
        ({"type": "function_call", "call_id": "c1", "arguments": "{}"}, "input.1.name"),
        ({"type": "custom_tool_call", "call_id": "c1", "name": "f"}, "input.1.input"),
        ({"type": "item_reference", "id": "msg_1"}, "input.1"),
        ({"type": "unheard_of"}, "input.1.type"),
        ({"type": "compaction", "encrypted_content": "gAAAEXAMPLE"}, "input.1.type"),
        ({"type": "context_compaction", "encrypted_content": "gAAAEXAMPLE"}, "input.1.type"),
        ({}, "input.1.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_an_item_that_cannot_be_carried_over_is_refused_by_its_path(item: Json, param: str) -> None:
    """3.3 and 5.7."""
    error = refused(r_body(user(), item))
    assert (error.param or "").removesuffix(".type") == param.removesuffix(".type")
    assert param.split(".")[1] in str(error)


@pytest.mark.parametrize("refuse", REFUSERS)
def test_an_item_that_was_not_kept_cannot_be_referred_to(
    refuse: Callable[[Json], gw.InvalidRequest],
) -> None:
    """3.3: the code tells clients to send the item itself."""
    error = refuse(r_body(user(), {"type": "item_reference", "id": "msg_1"}))
    assert error.code == "invalid_item_reference"
    assert (error.param or "").startswith("input.1")


def test_an_output_without_the_id_of_its_call_is_told_so() -> None:
    """3.3: the type is known, the id is missing."""
    error = refused(r_body(user(), {"type": "function_call_output", "output": "done"}))
    assert error.param == "input.1.call_id"


PICTURES = [
    input_text("see"),
    {"type": "input_image", "image_url": IMAGE_URL, "detail": "high"},
    {"type": "input_image", "image_url": "https://a.example/b.png"},
    {"type": "input_file", "file_data": PDF_URL, "filename": "a.pdf"},
]


def test_every_part_of_a_users_message_arrives() -> None:
    """3.3."""
    source = {"type": "url", "url": "https://a.example/b.png"}
    written = MESSAGES.write_request(read(r_body(user(PICTURES))), MODELS[SONNET])
    assert written["messages"][0]["content"] == [
        text("see"), A_IMAGE, {"type": "image", "source": source}, {**A_PDF, "title": "a.pdf"},
    ]  # fmt: skip
    model = Model("gpt-x", "copilot", files=True)
    written = CHAT.write_request(read(r_body(user(PICTURES))), model)
    parts = written["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "file"]
    assert parts[3]["file"] == {"filename": "a.pdf", "file_data": PDF_URL}
    (turn,) = to_kiro(r_body(user([PICTURES[0], PICTURES[1], PICTURES[3]])))
    assert turn["images"] == [{"format": "png", "source": {"bytes": PNG}}]
    assert [d["format"] for d in turn["documents"]] == ["pdf"]
    assert turn["content"] == "see"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("T", ["T"]),
        ([{"type": "output_text", "text": "T", "annotations": [], "logprobs": []}], ["T"]),
        ([{"type": "refusal", "refusal": "No."}], ["No."]),
        ([{"type": "output_text", "text": "T"}, {"type": "refusal", "refusal": "No."}],
         ["T", "No."]),
    ],
)  # fmt: skip
def test_what_the_assistant_said_is_text(content: Any, words: list[str]) -> None:
    """5.3: output_text and refusal."""
    more = {"type": "message", "id": "msg_1", "status": "completed", "phase": "commentary"}
    body = r_body(user("q"), assistant(content, **more), user("on"))
    assert to_messages(body)["messages"][1] == assistant([text(w) for w in words])
    assert to_chat(body)["messages"][1] == assistant("\n\n".join(words))
    assert to_kiro(body)[1] == {"content": "\n\n".join(words)}


def test_instructions_stand_before_the_leading_developer_items() -> None:
    """5.3: instructions are system[0], each part of a developer item one block."""
    items = [developer("D"), {"role": "system", "content": [input_text("S1"), input_text("S2")]}]
    body = r_body(*items, user("hi"), instructions="I")
    assert to_messages(body)["system"] == [text("I"), text("D"), text("S1"), text("S2")]
    assert to_chat(body)["messages"] == [
        {"role": "system", "content": "I\n\nD\n\nS1\n\nS2"}, user("hi"),
    ]  # fmt: skip
    assert to_kiro(body)[0]["content"] == "I\n\nD\n\nS1\n\nS2\n\nhi"


def test_a_later_developer_item_stays_in_its_place() -> None:
    """5.3: Codex says something in the middle of a run."""
    body = r_body(user("a"), said("b"), developer("L"), user("c"))
    reminder = "<system-reminder>\nL\n</system-reminder>"
    assert to_messages(body)["messages"][2] == user([text(reminder), text("c")])
    assert to_kiro(body)[2]["content"] == f"{reminder}\n\nc"
    assert to_chat(body)["messages"][2:] == [{"role": "system", "content": "L"}, user("c")]


@pytest.mark.parametrize("model", [GPT, GPT5])
def test_a_developer_is_the_system_in_chat(model: str) -> None:
    """5.4 has `developer` for gpt-5 and o; `system` means the same and every model has it."""
    messages = to_chat(r_body(developer("D"), user("a"), developer("L"), user("c")), model)
    assert [m["role"] for m in messages["messages"]] == ["system", "user", "system", "user"]


def test_calls_in_a_row_are_one_turn() -> None:
    """5.4: peers write a message for each and get a 400."""
    calls = [call("c1", "f", '{"a":1}'), call("c2", "g")]
    body = r_body(user("q"), said("T"), *calls, output("c1", "1"), output("c2", "2"))
    assert to_chat(body)["messages"][1:] == [
        assistant("T", tool_calls=[chat_call("c1", "f", '{"a":1}'), chat_call("c2", "g")]),
        tool_message("c1", "1"),
        tool_message("c2", "2"),
    ]
    assert to_messages(body)["messages"][1:] == [
        assistant([text("T"), use("c1", a=1), use("c2", "g")]),
        user([result("c1", "1"), result("c2", "2")]),
    ]
    _, answer, results = to_kiro(body)
    assert answer["content"] == "T"
    assert [(u["toolUseId"], u["name"], u["input"]) for u in answer["toolUses"]] == [
        ("c1", "f", {"a": 1}), ("c2", "g", {}),
    ]  # fmt: skip
    assert kiro_results(results) == [("c1", "1"), ("c2", "2")]


def test_outputs_come_in_the_order_of_the_calls() -> None:
    """5.3: results follow their calls directly."""
    body = r_body(user("q"), call("c1"), call("c2"), output("c2", "2"), output("c1", "1"))
    assert to_chat(body)["messages"][2:] == [tool_message("c1", "1"), tool_message("c2", "2")]
    assert to_messages(body)["messages"][2] == user([result("c1", "1"), result("c2", "2")])


@pytest.mark.parametrize(
    ("arguments", "read_as"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a":', {"_raw": '{"a":'}),
        ("[1]", {"_raw": "[1]"}),
    ],
)
def test_arguments_become_an_object(arguments: Any, read_as: Json) -> None:
    """Case 23, from R: what is no object is kept, never lost."""
    body = r_body(user("q"), call("c1", arguments=arguments), output("c1"))
    assert to_messages(body)["messages"][1]["content"][0]["input"] == read_as
    assert to_kiro(body)[1]["toolUses"][0]["input"] == read_as
    to_chat(body)


@pytest.mark.parametrize("call_id", ["call|abc+/", "x" * 65, "", "é", "half \ud83d"])
def test_a_call_and_its_output_keep_one_id(call_id: str) -> None:
    """5.0: what not every vendor takes is hashed, the same for both."""
    body = r_body(user("q"), call(call_id), output(call_id))
    messages = to_messages(body)["messages"]
    sent = messages[1]["content"][0]["id"]
    assert messages[2]["content"][0]["tool_use_id"] == sent
    assert len(sent) == 29
    assert to_chat(body)["messages"][2]["tool_call_id"] == sent
    assert kiro_results(to_kiro(body)[2])[0][0] == sent


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("r", "r"),
        ([input_text("r")], "r"),
        ([input_text("r"), input_text("s")], "r\n\ns"),
        ("", "(no output)"),
        (None, "(no output)"),
        ([], "(no output)"),
        ([input_text(" ")], "(no output)"),
        ({"ok": True}, '{"ok":true}'),
    ],
)
def test_an_output_is_words(value: Any, words: str) -> None:
    """5.1 and 5.3: an empty one is said to be so where the vendor refuses it."""
    body = r_body(user("q"), call("c1"), output("c1", value))
    sent = accept("chat", to_chat(body), GPT)["messages"][2]
    assert sent == tool_message("c1", words)
    ((call_id, told),) = kiro_results(to_kiro(body)[2])
    assert (call_id, told.strip() or "(no output)") == ("c1", words)
    to_messages(body)


def test_an_image_of_an_output_is_shown() -> None:
    """5.4: tool text and a later user message; in A it stays inside of the result."""
    outputs = [output("c1", [INPUT_IMAGE]), output("c2", [input_text("t"), INPUT_IMAGE])]
    body = r_body(user("q"), call("c1"), call("c2"), *outputs, user("go"))
    messages = to_chat(body)["messages"]
    assert [m["role"] for m in messages[2:]] == ["tool", "tool", "user"]
    assert [m["content"] for m in messages[2:4]] == ["[image in next message]", "t"]
    assert [p["type"] for p in messages[4]["content"]] == [
        "text", "image_url", "text", "image_url", "text",
    ]  # fmt: skip
    results = to_messages(body)["messages"][2]["content"]
    assert results[:2] == [result("c1", [A_IMAGE]), result("c2", [text("t"), A_IMAGE])]
    assert len(to_kiro(body)[2]["images"]) == 2


def test_a_file_of_an_output_is_a_document() -> None:
    """5.3: input_file is a document."""
    file = {"type": "input_file", "file_data": PDF_URL, "filename": "a.pdf"}
    written = to_messages(r_body(user("q"), call("c1"), output("c1", [input_text("t"), file])))
    (block,) = written["messages"][2]["content"]
    assert block == result("c1", [text("t"), {**A_PDF, "title": "a.pdf"}])


def test_a_custom_call_is_one_of_a_function() -> None:
    """3.3: `{"input": text}`."""
    body = r_body(user("q"), custom_call("c1", 'a "b"\n'), custom_output("c1", "ok"))
    words = {"input": 'a "b"\n'}
    assert to_messages(body)["messages"][1:] == [
        assistant([use("c1", "apply_patch", **words)]), user([result("c1", "ok")]),
    ]  # fmt: skip
    (sent,) = to_chat(body)["messages"][1]["tool_calls"]
    assert json.loads(sent["function"]["arguments"]) == words
    assert to_kiro(body)[1]["toolUses"][0]["input"] == words


def test_the_output_of_a_custom_tool_may_hold_images() -> None:
    """3.3: a string or a list."""
    parts = [input_text("t"), INPUT_IMAGE]
    body = r_body(user("q"), custom_call("c1", "x"), custom_output("c1", parts))
    assert to_messages(body)["messages"][2] == user([result("c1", [text("t"), A_IMAGE])])


SHELL_OUTPUT = [{"stdout": "file.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]


@pytest.mark.parametrize(
    ("kind", "name", "action", "said"),
    [
        ("local_shell_call", "local_shell", {"action": {"type": "exec", "command": ["ls"]}},
         "file.txt"),
        ("shell_call", "shell", {"action": {"commands": ["ls"]}}, SHELL_OUTPUT),
        ("apply_patch_call", "apply_patch",
         {"operation": {"type": "delete_file", "path": "file.txt"}}, "deleted file.txt"),
    ],
)  # fmt: skip
def test_a_tool_of_the_vendor_that_the_client_ran_is_a_call(
    kind: str, name: str, action: Json, said: Any
) -> None:
    """3.3: with the action as its input, and its result."""
    rows = [
        {"type": kind, "call_id": "c1", "status": "completed", **action},
        {"type": f"{kind}_output", "call_id": "c1", "output": said},
    ]
    _, called, answered = to_messages(r_body(user("q"), *rows))["messages"]
    (inner,) = action.values()
    assert called["content"] == [use("c1", name, **inner)]
    assert "file.txt" in json.dumps(answered["content"])


def test_the_screenshot_of_a_computer_is_no_text() -> None:
    """5.1 and 3.3: a picture in base64 is no words for a model to read."""
    shot = {"type": "computer_screenshot", "image_url": IMAGE_URL}
    rows = [
        {"type": "computer_call", "call_id": "c1", "action": {"type": "screenshot"}},
        {"type": "computer_call_output", "call_id": "c1", "output": shot},
    ]
    answered = to_messages(r_body(user("q"), *rows, user("on")))["messages"][2]["content"][0]
    assert answered["tool_use_id"] == "c1"
    assert answered["content"] == [A_IMAGE]


HOSTED_HISTORY: list[tuple[Json, str]] = [
    ({"type": "web_search_call", "id": "ws_1", "status": "completed",
      "action": {"type": "search", "query": "w1w"}}, ""),
    ({"type": "file_search_call", "id": "fs_1", "queries": ["q"], "status": "completed",
      "results": [{"filename": "a.md", "text": "found words"}]}, "found words"),
    ({"type": "code_interpreter_call", "id": "ci_1", "code": "print(6 * 7)",
      "outputs": [{"type": "logs", "logs": "42 logged"}]}, "42 logged"),
    ({"type": "image_generation_call", "id": "ig_1", "result": PNG, "status": "completed"}, ""),
    ({"type": "mcp_call", "id": "mcp_1", "name": "go", "server_label": "s", "arguments": "{}",
      "output": "the tool's words"}, "the tool's words"),
    ({"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "s", "tools": []}, ""),
    ({"type": "mcp_approval_request", "id": "mcpr_1", "name": "go", "server_label": "s",
      "arguments": "{}"}, ""),
    ({"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("item", "words"), HOSTED_HISTORY, ids=[item["type"] for item, _ in HOSTED_HISTORY]
)
def test_what_the_vendor_ran_is_told_in_words_where_there_are_any(item: Json, words: str) -> None:
    """3.3: folded to text if readable, else dropped; never a 400."""
    body = r_body(user("q"), item, said("T"), user("on"))
    written = to_messages(body)
    assert words in json.dumps(written["messages"], ensure_ascii=False)
    assert [m["role"] for m in written["messages"]] == ["user", "assistant", "user"]
    to_chat(body)
    to_kiro(body)


def test_tools_that_came_later_are_offered() -> None:
    """3.3: additional_tools."""
    more = {"type": "additional_tools", "role": "developer", "tools": [function("later")]}
    body = r_body(user("q"), more, user("on"), tools=[function("first")])
    sent = {tool["function"]["name"] for tool in to_chat(body)["tools"]}
    assert sent == {"first", "later"}


def test_tools_that_came_later_are_offered_natively() -> None:
    """Codex 0.169 declares all of its tools for GPT-5.6 as an item (2026-11)."""
    inside = [namespace("functions", function("run")), function("first")]
    more = {"type": "additional_tools", "role": "developer", "tools": inside}
    for tools in ([], [function("first")]):
        sent = native(more, user("q"), tools=tools)
        assert sorted(tool["name"] for tool in sent["tools"]) == ["first", "functions"]
        assert [item["role"] for item in sent["input"]] == ["user"]
    search = {"type": "tool_search", "execution": "client"}
    assert gw.searches_tools(r_body({**more, "tools": [search]}, user("q")))
    assert not gw.searches_tools(r_body(more, user("q")))


@pytest.mark.parametrize(
    ("searches", "named"),
    [
        ([[namespace("ns", function("alpha"), function("beta"))]], [["alpha", "beta"]]),
        (
            [[function("alpha"), function("beta")], [function("alpha")]],
            [["alpha", "beta"], ["alpha"]],
        ),
        ([[]], [[]]),
    ],
)
def test_a_search_for_tools_is_answered_with_their_names(
    searches: list[list[Json]], named: list[list[str]]
) -> None:
    """3.3: the output is a text list of the tools that this search found."""
    items: list[Json] = [user("q")]
    for at, tools in enumerate(searches):
        head = {"call_id": f"s{at}", "execution": "client", "status": "completed"}
        items += [
            {"type": "tool_search_call", "arguments": {"query": "x"}, **head},
            {"type": "tool_search_output", "tools": tools, **head},
        ]
    messages = to_chat(r_body(*items))["messages"]
    texts = [m["content"] for m in messages if m["role"] == "tool"]
    for found, names in zip(texts, named):
        assert [name for name in ("alpha", "beta") if name in found] == names


# ---- the order of items (3.3, 5.4) ---------------------------------------------------------------


def test_a_developer_between_a_call_and_its_output_comes_behind() -> None:
    """3.3."""
    body = r_body(user("q"), call("c1"), developer("D"), output("c1", "r"), said("T"), user("on"))
    reminder = "<system-reminder>\nD\n</system-reminder>"
    assert to_messages(body)["messages"][2] == user([result("c1", "r"), text(reminder)])
    assert to_chat(body)["messages"][2:4] == [
        tool_message("c1", "r"), {"role": "system", "content": "D"},
    ]  # fmt: skip
    assert to_kiro(body)[2]["content"] == reminder
    assert items_of(*body["input"])[1:4] == [call("c1"), output("c1", "r"), developer("D")]


def test_a_message_between_two_outputs_belongs_to_the_calls() -> None:
    """3.3: an assistant message between a call and its output stands before the calls."""
    calls = [call("c1"), call("c2")]
    body = r_body(user("q"), *calls, output("c1", "1"), said("note"), output("c2", "2"))
    assert to_messages(body)["messages"][1:] == [
        assistant([text("note"), use("c1"), use("c2")]),
        user([result("c1", "1"), result("c2", "2")]),
    ]


def test_an_output_that_comes_late_still_answers_its_call() -> None:
    """3.3: outputs follow directly; only a call without any output was aborted."""
    rows = [call("c1"), user("steer"), call("c2"), output("c1", "1"), output("c2", "2")]
    messages = to_messages(r_body(user("q"), *rows))["messages"]
    results = [b for m in messages for b in m["content"] if b["type"] == "tool_result"]
    assert results == [result("c1", "1"), result("c2", "2")]


@pytest.mark.parametrize("rest", [[], [user("on")], [said("T"), user("on")]])
def test_a_call_without_an_output_was_aborted(rest: list[Json]) -> None:
    """3.3: vendors refuse the conversation else."""
    body = r_body(user("q"), call("c1"), *rest)
    (answered,) = [
        b for m in to_messages(body)["messages"] for b in m["content"] if b["type"] == "tool_result"
    ]
    assert answered["tool_use_id"] == "c1" and answered["is_error"] is True
    assert answered["content"]
    assert [m["role"] for m in to_chat(body)["messages"]].count("tool") == 1
    assert kiro_results(to_kiro(body)[2])[0][0] == "c1"
    sent = items_of(*body["input"])
    assert (sent[2]["type"], sent[2]["call_id"]) == ("function_call_output", "c1")


def test_an_aborted_custom_call_is_answered_in_its_own_kind() -> None:
    """3.3, native."""
    sent = items_of(user("q"), custom_call("c1", "x"), user("on"))
    assert [item.get("type") for item in sent[1:3]] == [
        "custom_tool_call", "custom_tool_call_output",
    ]  # fmt: skip


def test_an_output_of_an_unknown_call_is_what_the_user_says() -> None:
    """3.3."""
    body = r_body(user("q"), output("c9", "lost words"), user("on"))
    (sent,) = to_chat(body)["messages"]
    assert sent["role"] == "user"
    assert "[tool output for unknown call" in json.dumps(sent) and "lost words" in json.dumps(sent)
    assert "lost words" in to_kiro(body)[0]["content"]
    (item,) = [i for i in items_of(*body["input"]) if "lost words" in json.dumps(i)]
    assert item["role"] == "user" and "[tool output for unknown call" in json.dumps(item)


def test_the_image_of_an_unknown_call_is_not_lost() -> None:
    """3.3: its output becomes what the user says, whatever it is."""
    body = r_body(user("q"), output("c9", [input_text("lost words"), INPUT_IMAGE]))
    assert A_IMAGE in to_messages(body)["messages"][0]["content"]
    assert PNG in json.dumps(native(*body["input"])["input"])


# ---- tools and the choice among them (3.4) -------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "schema"),
    [
        (function(), OBJECT),
        (function(parameters=None), EMPTY_SCHEMA),
        (function(parameters={}), EMPTY_SCHEMA),
        ({"type": "function", "name": "f"}, EMPTY_SCHEMA),
        (function(parameters={"properties": OBJECT["properties"]}), OBJECT),
        (function(parameters={**OBJECT, "$schema": "http://json-schema.org/x"}), OBJECT),
        (function(strict=None, defer_loading=True, output_schema={}), OBJECT),
        ({"type": "custom", "name": "f"}, CUSTOM_SCHEMA),
        ({"type": "custom", "name": "f", "format": {"type": "text"}}, CUSTOM_SCHEMA),
        ({"type": "custom", "name": "f", "format": None, "description": None}, CUSTOM_SCHEMA),
        ({"type": "tool_search", "execution": "client", "parameters": OBJECT}, OBJECT),
    ],
)
def test_every_kind_of_tool_is_a_function(tool: Json, schema: Json) -> None:
    """3.4 and 5.3: an object schema, whatever was missing."""
    name = tool.get("name", "tool_search")
    body = r_body(tools=[tool])
    (sent,) = to_messages(body)["tools"]
    assert (sent["name"], sent["input_schema"]) == (name, schema)
    (chat_sent,) = to_chat(body)["tools"]
    assert (chat_sent["function"]["name"], chat_sent["function"]["parameters"]) == (name, schema)
    assert [t["name"] for t in kiro_tools(to_kiro(body))] == [name]


def test_a_tool_says_what_it_does() -> None:
    """3.4."""
    body = r_body(tools=[function(description="Does it.", strict=True)])
    assert to_messages(body)["tools"][0]["description"] == "Does it."
    sent = CHAT.write_request(read(body), MODELS[GPT])["tools"][0]["function"]
    assert (sent["description"], sent["strict"]) == ("Does it.", True)
    assert kiro_tools(to_kiro(body))[0]["description"] == "Does it."


def test_a_long_name_in_a_namespace_is_cut_and_comes_back_whole() -> None:
    """3.4: at most 64 characters, with a hash; the client gets its own two names."""
    space, name = "mcp__" + "s" * 40, "t" * 40
    flat = f"{space}__{name}"
    wire = f"{flat[:55]}_{hashlib.sha256(flat.encode()).hexdigest()[:8]}"
    history = [user("q"), call("c1", name, namespace=space), output("c1")]
    body = r_body(*history, tools=[namespace(space, function(name))])
    written = to_messages(body)
    assert written["tools"][0]["name"] == wire
    assert written["messages"][1]["content"][0]["name"] == wire
    item = answered_call(read(body), wire, "{}")
    assert (item["name"], item["namespace"]) == (name, space)


def test_a_custom_tool_in_a_namespace_comes_back_as_one() -> None:
    """3.4: namespaces hold functions and custom tools."""
    body = r_body(tools=[namespace("ns", {"type": "custom", "name": "patch"})])
    item = answered_call(read(body), "ns__patch", '{"input":"x"}')
    assert (item["type"], item["name"], item["namespace"]) == ("custom_tool_call", "patch", "ns")
    assert item["input"] == "x"


def test_a_call_of_the_search_for_tools_comes_back_as_one() -> None:
    """3.4: with its arguments as an object."""
    tool = {"type": "tool_search", "execution": "client", "parameters": OBJECT}
    item = answered_call(read(r_body(tools=[tool])), "tool_search", '{"query":"x"}')
    assert (item["type"], item["execution"]) == ("tool_search_call", "client")
    assert (item["arguments"], item["status"]) == ({"query": "x"}, "completed")


@pytest.mark.parametrize(
    ("arguments", "unwrapped"),
    [
        ('{"input":"x\\n"}', "x\n"),
        ('{"patch":"x"}', "x"),
        ('{"input":""}', ""),
        ('{"input":5}', '{"input":5}'),
        ('{"input":"x","more":1}', '{"input":"x","more":1}'),
        ("{}", "{}"),
        ("*** Begin Patch", "*** Begin Patch"),
        ('{"input":"x', '{"input":"x'),
        ('"x"', '"x"'),
    ],
)
def test_the_input_of_a_custom_tool_is_unwrapped(arguments: str, unwrapped: str) -> None:
    """3.4: an object with a single string is that string, everything else is as it is."""
    assert gw.unwrap_input(arguments) == unwrapped


def test_two_tools_that_become_one_are_refused() -> None:
    """3.4: naming both, as calls could not be told apart."""
    tools = [namespace("mcp__x", function("go")), function("mcp__x__go")]
    assert "mcp__x__go" in str(refused(r_body(tools=tools)))


def test_the_same_tool_said_twice_is_one() -> None:
    """3.3: a search finds what is offered already."""
    more = {"type": "additional_tools", "role": "developer", "tools": [function()]}
    assert len(to_chat(r_body(user("q"), more, tools=[function()]))["tools"]) == 1


HOSTED: list[Json] = [
    {"type": "web_search"},
    {"type": "web_search", "external_web_access": True},
    {"type": "web_search_preview"},
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "image_generation"},
    {"type": "mcp", "server_label": "s", "server_url": "https://a.example"},
    {"type": "computer"},
    {"type": "computer_use_preview", "environment": "browser"},
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "apply_patch"},
    {"type": "programmatic_tool_calling"},
    {"type": "tool_search", "execution": "server"},
]


@pytest.mark.parametrize("tool", HOSTED, ids=lambda tool: tool["type"])
def test_a_hosted_tool_beside_others_is_left_out_and_named(tool: Json) -> None:
    """3.4 and 5.7."""
    body = r_body(user(), tools=[tool, function()])
    chat = read(body)
    assert [t.name for t in chat.tools] == ["f"]
    assert chat.dropped == [f"tools.{tool['type']}"]
    assert [t["name"] for t in to_messages(body)["tools"]] == ["f"]
    scrub = scrubbed(user(), tools=body["tools"])
    assert [t["name"] for t in scrub.body["tools"]] == ["f"]
    assert scrub.dropped == [f"tools.{tool['type']}"]


@pytest.mark.parametrize("refuse", REFUSERS)
@pytest.mark.parametrize("tool", HOSTED, ids=lambda tool: tool["type"])
def test_a_hosted_tool_alone_is_refused(
    tool: Json, refuse: Callable[[Json], gw.InvalidRequest]
) -> None:
    """5.7."""
    error = refuse(r_body(user(), tools=[tool]))
    assert error.param == "tools" and tool["type"] in str(error)


@pytest.mark.parametrize("refuse", REFUSERS)
@pytest.mark.parametrize(
    "choice",
    [
        {"type": "web_search_preview"},
        {"type": "file_search"},
        {"type": "mcp", "server_label": "s"},
        {"type": "mcp", "server_label": "s", "name": "go"},
        {"type": "apply_patch"},
        {"type": "shell"},
    ],
    ids=lambda choice: "-".join([choice["type"], *choice]),
)
def test_a_hosted_tool_that_is_forced_is_refused(
    choice: Json, refuse: Callable[[Json], gw.InvalidRequest]
) -> None:
    """3.4 and 5.7."""
    hosted = {**choice, "type": choice["type"]}
    hosted.pop("name", None)
    error = refuse(r_body(user(), tools=[hosted, function()], tool_choice=choice))
    assert choice["type"] in str(error)


@pytest.mark.parametrize(
    ("choice", "in_chat", "in_messages"),
    [
        ("auto", "auto", {"type": "auto"}),
        ("none", "none", {"type": "none"}),
        ("required", "required", {"type": "any"}),
        (
            {"type": "function", "name": "f"},
            {"type": "function", "function": {"name": "f"}},
            {"type": "tool", "name": "f"},
        ),
        (
            {"type": "custom", "name": "patch"},
            {"type": "function", "function": {"name": "patch"}},
            {"type": "tool", "name": "patch"},
        ),
        (
            {"type": "function", "name": "go", "namespace": "ns"},
            {"type": "function", "function": {"name": "ns__go"}},
            {"type": "tool", "name": "ns__go"},
        ),
    ],
)
def test_the_choice_of_a_tool(choice: Any, in_chat: Any, in_messages: Json) -> None:
    """3.4."""
    tools = [function(), {"type": "custom", "name": "patch"}, namespace("ns", function("go"))]
    body = r_body(tools=tools, tool_choice=choice)
    assert to_chat(body)["tool_choice"] == in_chat
    assert to_messages(body)["tool_choice"] == in_messages
    to_kiro(body)


@pytest.mark.parametrize(("mode", "sent"), [("auto", "auto"), ("required", "required")])
def test_only_the_allowed_tools_are_offered(mode: str, sent: str) -> None:
    """3.4."""
    tools = [function(), function("g"), {"type": "custom", "name": "patch"}]
    allowed = [{"type": "function", "name": "g"}, {"type": "custom", "name": "patch"}]
    choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
    written = to_chat(r_body(tools=tools, tool_choice=choice))
    assert [t["function"]["name"] for t in written["tools"]] == ["g", "patch"]
    assert written["tool_choice"] == sent


def test_an_allowed_tool_may_be_in_a_namespace() -> None:
    """3.4."""
    tools = [namespace("ns", function("go"), function("stay")), function()]
    allowed = [{"type": "function", "name": "go", "namespace": "ns"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    written = to_chat(r_body(tools=tools, tool_choice=choice))
    assert [t["function"]["name"] for t in written["tools"]] == ["ns__go"]


def test_a_hosted_tool_among_the_allowed_ones_is_left_out() -> None:
    """3.4 and 5.7: offered beside others it is never refused."""
    tools = [function(), {"type": "web_search"}]
    allowed = [{"type": "function", "name": "f"}, {"type": "web_search"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    written = to_chat(r_body(tools=tools, tool_choice=choice))
    assert [t["function"]["name"] for t in written["tools"]] == ["f"]
    sent = native(user(), tools=tools, tool_choice=choice)
    assert [t["name"] for t in sent["tools"]] == ["f"]


@pytest.mark.parametrize(
    ("parallel", "in_messages"),
    [
        (True, None),
        (None, None),
        (False, {"type": "auto", "disable_parallel_tool_use": True}),
    ],
)
def test_calls_side_by_side_may_be_forbidden(parallel: bool | None, in_messages: Any) -> None:
    """5.3: true says nothing."""
    body = r_body(tools=[function()], parallel_tool_calls=parallel)
    assert to_messages(body).get("tool_choice") == in_messages
    assert to_chat(body).get("parallel_tool_calls") == parallel


# ---- thoughts of other makers (4.5) --------------------------------------------------------------

THOUGHT = " why \n\né\N{GRINNING FACE}\t\n"


def carried(**fields: Any) -> Json:
    """A reasoning item of R that carries another upstream's thought."""
    return reasoning(envelope("gw1.a.", **fields), "reformatted", id="rs_1", content=None)


def written_thoughts(*events: Any) -> list[Json]:
    """The items that a caller of R gets for an answer's thoughts."""
    writer = RESPONSES.writer(gw.ResponseContext("resp_1", 0, "m"))
    events = (gw.MessageStart("x", "m"), *events, gw.MessageStop("end"))
    frames = [frame for event in events for frame in writer.write(event)]
    return [dict(f["item"]) for f in frames if f["type"] == "response.output_item.done"]


def test_a_thought_of_anthropic_goes_through_a_responses_client_byte_by_byte() -> None:
    """4.5: the text stands in the envelope, as the client may reformat the summary."""
    issued = Issued()
    signature = issued.sign(THOUGHT)
    added = [gw.BlockDelta("text", THOUGHT), gw.BlockDelta("signature", signature)]
    (item,) = written_thoughts(gw.BlockStart("thinking"), *added, gw.BlockStop())
    said_in = opened("gw1.a.", item["encrypted_content"])
    assert (said_in["thinking"], said_in["signature"]) == (THOUGHT, signature)
    item["summary"] = [{"type": "summary_text", "text": "reformatted"}]
    body = r_body(user("q"), item, call("c1"), output("c1"))
    assert to_messages(body, SONNET, issued)["messages"][1] == assistant(
        [{"type": "thinking", "thinking": THOUGHT, "signature": signature}, use("c1")]
    )


def test_a_hidden_thought_of_anthropic_goes_through_a_responses_client() -> None:
    """4.5: redacted data."""
    issued = Issued()
    data = issued.sign("hidden")
    events = [
        gw.BlockStart("redacted", raw={"type": "redacted_thinking", "data": data}),
        gw.BlockStop(),
    ]
    (item,) = written_thoughts(*events)
    assert item["summary"] == [] and opened("gw1.a.", item["encrypted_content"])["data"] == data
    written = to_messages(r_body(user("q"), item, said("T"), user("on")), SONNET, issued)
    assert written["messages"][1] == assistant(
        [{"type": "redacted_thinking", "data": data}, text("T")]
    )


def test_a_thought_comes_first_in_its_turn() -> None:
    """5.3: before what was said and called."""
    issued = Issued()
    signature = issued.sign("w")
    thought = carried(thinking="w", signature=signature)
    body = r_body(user("q"), thought, said("T"), call("c1"), said("note"), output("c1"))
    kinds = [b["type"] for b in to_messages(body, SONNET, issued)["messages"][1]["content"]]
    assert kinds == ["thinking", "text", "text", "tool_use"]


def test_a_thought_of_kiro_goes_back_to_the_account_that_signed_it() -> None:
    """4.5, and 5.4 for K: `reasoningContent` with its own text."""
    issued = Issued()
    signature = issued.sign(THOUGHT)
    thought = carried(thinking=THOUGHT, signature=KIRO_MARK + signature)
    body = r_body(user("q"), thought, call("c1"), output("c1"))
    answer = to_kiro(body, OPUS, issued)[1]
    assert answer["reasoningContent"] == {
        "reasoningText": {"text": THOUGHT, "signature": signature}
    }
    assert [b["type"] for b in to_messages(body)["messages"][1]["content"]] == ["tool_use"]


def test_a_thought_of_a_chat_model_goes_back_to_chat() -> None:
    """4.5: `reasoning_text` and `reasoning_opaque`."""
    thought = carried(thinking=THOUGHT, signature="gw1.c.OPAQUE")
    body = r_body(user("q"), thought, call("c1"), output("c1"))
    message = CHAT.write_request(read(body), MODELS[GEMINI])["messages"][1]
    assert (message["reasoning_text"], message["reasoning_opaque"]) == (THOUGHT, "OPAQUE")
    assert [b["type"] for b in to_messages(body)["messages"][1]["content"]] == ["tool_use"]


FOREIGN = [
    "gAAAAAEXAMPLE",
    "",
    "litellm_encrypted_reasoning:EXAMPLE",
    envelope("gw1.r.", id="rs_1", enc="gAAAAAEXAMPLE"),
    "gw1.a.",
    "gw1.a.not base64!",
    "gw1.a.\ud83d",
    "gw1.a." + base64.urlsafe_b64encode(b"[1]").decode(),
    "gw1.a." + base64.urlsafe_b64encode(b"\xff").decode(),
    envelope("gw1.a.", thinking="x"),
    envelope("gw1.a.", thinking="x", signature=""),
    envelope("gw1.a.", thinking=5, signature=5),
    envelope("gw1.a.", thinking="x", signature="gw1.r.EXAMPLE"),
    envelope("gw1.a.", thinking="x", signature="litellm_encrypted_reasoning:EXAMPLE"),
]


@pytest.mark.parametrize("encrypted", FOREIGN)
def test_a_foreign_thought_is_left_out(encrypted: str) -> None:
    """4.5 and 5.3: no upstream would know it."""
    body = r_body(user("q"), reasoning(encrypted, "s"), said("T"), user("on"))
    assert to_messages(body)["messages"] == [
        user([text("q")]), assistant([text("T")]), user([text("on")]),
    ]  # fmt: skip
    assert to_chat(body)["messages"] == [user("q"), assistant("T"), user("on")]
    assert to_kiro(body) == [{"content": "q"}, {"content": "T"}, {"content": "on"}]


@pytest.mark.parametrize("encrypted", [None, *[f for f in FOREIGN if not f.startswith("gAAA")]])
def test_a_thought_that_openai_did_not_encrypt_stays_here(encrypted: str | None) -> None:
    """4.5, native: the upstream refuses what it has not given out."""
    thought = {**reasoning("", "s"), "encrypted_content": encrypted}
    assert items_of(user("q"), thought, said("T"), user("on")) == [
        user("q"), said("T"), user("on"),
    ]  # fmt: skip


def test_an_envelope_can_be_opened_again() -> None:
    """4.5: whatever is in it."""
    value = {"thinking": THOUGHT, "signature": "+/=", "nested": {"a": [1, None, "\0"]}}
    packed = gw.pack("gw1.a.", value)
    assert gw.unpack("gw1.a.", packed) == value
    assert gw.unpack("gw1.r.", packed) is None
    assert packed.isascii() and not set("+/ \n") & set(packed)


@pytest.mark.parametrize(
    ("signature", "sent"),
    [
        (envelope("gw1.r.", id="rs_1", enc="E"), "E"),
        (envelope("gw1.r.", enc="E+/="), "E+/="),
        (envelope("gw1.r.", id="rs_1"), None),
        (envelope("gw1.r.", id="rs_1", enc=None), None),
        (envelope("gw1.r.", id="rs_1", enc=5), None),
        (envelope("gw1.a.", signature="E"), None),
        ("gw1.r.broken", None),
        ("EqQBEXAMPLE", None),
        ("", None),
    ],
)
def test_a_reasoning_item_is_only_for_its_maker(signature: str, sent: str | None) -> None:
    """4.5."""
    item = gw.write_reasoning_item(" a\n", signature)
    if sent is None:
        assert item is None
    else:
        assert item == reasoning(sent, " a\n")
        assert gw.write_reasoning_item("", signature) == reasoning(sent)


def test_a_hidden_thought_of_openai_goes_through_an_anthropic_client() -> None:
    """4.5: without a summary it is redacted thinking."""
    issued = Issued()
    sealed = issued.seal([])
    thought = {"type": "redacted_thinking", "data": envelope("gw1.r.", id="rs_1", enc=sealed)}
    body = a_body(user("q"), assistant([thought, text("T")]), user("on"))
    assert to_responses(body, MESSAGES, CODEX, issued)["input"][1] == reasoning(sealed)


# ---- asking a responses upstream: A>R and C>R ----------------------------------------------------

USUAL = {"model": CODEX, "store": False, "include": ["reasoning.encrypted_content"], "stream": True}


@pytest.mark.parametrize(("body", "source"), [(a_body(), MESSAGES), (c_body(), CHAT)])
def test_the_plainest_request_says_that_nothing_is_stored(body: Json, source: Dialect) -> None:
    """5.4: always store false, encrypted reasoning, streamed."""
    body.pop("max_tokens", None)
    message = {"type": "message", "role": "user", "content": [input_text("hi")]}
    assert to_responses(body, source) == {**USUAL, "input": [message]}


def test_the_system_prompt_is_the_instructions() -> None:
    """5.4, A>R: joined; a later one is a developer item in its place."""
    rows = [user("a"), {"role": "system", "content": "R"}, assistant("b"), user("c")]
    written = to_responses(a_body(*rows, system=[text("S1"), text("S2")]), MESSAGES)
    assert written["instructions"] == "S1\n\nS2"
    assert [i["role"] for i in written["input"]] == ["user", "developer", "assistant", "user"]
    assert written["input"][1]["content"] == "R"


def test_a_later_system_message_of_chat_stays_in_its_place() -> None:
    """5.4, C>R: not hoisted."""
    rows = [developer("D"), user("a"), assistant("b"), {"role": "system", "content": "L"}]
    written = to_responses(c_body(*rows, user("c")), CHAT)
    roles = [i["role"] for i in written["input"]]
    assert [written.get("instructions"), *roles] in (
        ["D", "user", "assistant", "developer", "user"],
        [None, "developer", "user", "assistant", "developer", "user"],
    )


def test_words_behind_a_call_stay_behind_it() -> None:
    """5.4, A>R: the order of blocks is kept; peers put the text after the calls."""
    turn = assistant([text("T"), use("t1"), text("U"), use("t2")])
    rows = [user("q"), turn, user([result("t2", "2"), text("go"), result("t1", "1")])]
    written = RESPONSES.write_request(read(a_body(*rows), MESSAGES), MODELS[CODEX])
    kinds = [item["type"] for item in written["input"]]
    assert kinds[1:5] == ["message", "function_call", "message", "function_call"]
    sent = accept("responses", written, CODEX)["input"]
    assert [i["output"] for i in sent if i["type"] == "function_call_output"] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "is_error", "words"),
    [
        ("no file", True, "Error: no file"),
        ("Error: no file", True, "Error: no file"),
        ([text("a"), text("b")], False, "a\n\nb"),
        (None, False, "(no output)"),
        ("", False, "(no output)"),
    ],
)
def test_a_result_is_an_output(content: Any, is_error: bool, words: str) -> None:
    """5.4, A>R."""
    answers = user([result("t1", content, is_error=is_error)])
    written = to_responses(a_body(user("q"), assistant([use("t1")]), answers), MESSAGES)
    assert written["input"][-1] == output("t1", words)


def test_a_tool_is_a_flat_function() -> None:
    """5.4, A>R: strict is said, the schema has no `$schema`."""
    schema = {**SCHEMA, "$schema": "http://json-schema.org/x"}
    tools = [
        {"name": "f", "description": "Does it.", "input_schema": schema},
        {"name": "g", "input_schema": schema, "strict": True},
        {"name": "a.b", "input_schema": {}},
    ]
    written = to_responses(
        a_body(tools=tools, tool_choice={"type": "tool", "name": "a.b"}), MESSAGES
    )
    head = {"type": "function", "parameters": SCHEMA}
    assert written["tools"] == [
        {**head, "name": "f", "description": "Does it.", "strict": False},
        {**head, "name": "g", "strict": True},
        {**head, "name": "a_b", "parameters": EMPTY_SCHEMA, "strict": False},
    ]
    assert written["tool_choice"] == {"type": "function", "name": "a_b"}


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ({"type": "auto"}, ("auto", None)),
        ({"type": "any"}, ("required", None)),
        ({"type": "none"}, ("none", None)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
    ],
)
def test_the_choice_of_anthropic_is_one_of_openai(choice: Json, sent: Any) -> None:
    """5.4, A>R."""
    tools = [{"name": "f", "input_schema": OBJECT}]
    written = to_responses(a_body(tools=tools, tool_choice=choice), MESSAGES)
    assert (written["tool_choice"], written.get("parallel_tool_calls")) == sent


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"max_tokens": 1}, {"max_output_tokens": 16}),
        ({"max_tokens": 5000}, {"max_output_tokens": 5000}),
        ({"stop_sequences": ["END"], "top_k": 5}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
         {"reasoning": {"effort": "xhigh", "summary": "auto"}}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "low", "summary": "auto"}}),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
         {"text": {"format": {"type": "json_schema", "name": "structured_output",
                              "schema": SCHEMA, "strict": True}}}),
        ({"metadata": {"user_id": json.dumps({"session_id": KEY})}},
         {"prompt_cache_key": HASHED_KEY}),
    ],
)  # fmt: skip
def test_settings_of_anthropic_at_a_responses_upstream(asked: Json, sent: Json) -> None:
    """5.4 and 5.5, A>R."""
    written = to_responses(a_body(**asked), MESSAGES)
    settings = {k: v for k, v in settings_of(written).items() if k not in USUAL}
    assert settings == {"max_output_tokens": 1000, **sent}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"max_tokens": 50}, {"max_output_tokens": 50}),
        ({"max_tokens": 50, "max_completion_tokens": 60}, {"max_output_tokens": 60}),
        ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high", "summary": "auto"}}),
        ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
        ({"prompt_cache_key": KEY}, {"prompt_cache_key": HASHED_KEY}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": ANY_OBJECT}, {"text": {"format": ANY_OBJECT}}),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "answer", "schema": SCHEMA, "strict": True, "description": "D"}}},
         {"text": {"format": {**FORMAT, "description": "D"}}}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"seed": 1, "frequency_penalty": 1, "service_tier": "flex", "store": True,
          "metadata": {"a": "b"}, "stop": ["END"]}, {}),
    ],
)  # fmt: skip
def test_settings_of_chat_at_a_responses_upstream(asked: Json, sent: Json) -> None:
    """2.2 and 5.4, C>R: all that has a place there is passed on."""
    written = to_responses(c_body(**asked), CHAT)
    assert {k: v for k, v in settings_of(written).items() if k not in USUAL} == sent


def test_calls_side_by_side_are_a_setting_of_both() -> None:
    """5.4, C>R."""
    body = c_body(tools=[chat_tool()], parallel_tool_calls=False, tool_choice="required")
    written = to_responses(body, CHAT)
    assert (written["parallel_tool_calls"], written["tool_choice"]) == (False, "required")
    assert written["tools"] == [function()]


@pytest.mark.parametrize("refused_field", [{"n": 2}, {"logit_bias": {"1": 1}}])
def test_what_a_responses_upstream_cannot_do_is_refused(refused_field: Json) -> None:
    """5.4, C>R."""
    assert refused(c_body(**refused_field), CHAT).param == next(iter(refused_field))


@pytest.mark.parametrize(("detail", "sent"), [(None, "auto"), ("low", "low"), ("high", "high")])
def test_an_image_of_chat_keeps_its_detail(detail: str | None, sent: str) -> None:
    """5.4, C>R: auto is only the default."""
    url = {"url": IMAGE_URL, **({"detail": detail} if detail else {})}
    body = c_body(user([text("see"), {"type": "image_url", "image_url": url}]))
    (message,) = to_responses(body, CHAT)["input"]
    assert message["content"] == [input_text("see"), {**INPUT_IMAGE, "detail": sent}]


def test_two_calls_and_their_results_of_chat() -> None:
    """5.4, C>R: calls without an `id`, which would have to begin with fc_."""
    calls = [chat_call("c1", "f", '{"a": 1}'), chat_call("call|abc+/", "a.b", "")]
    rows = [user("q"), assistant("T", tool_calls=calls)]
    rows += [tool_message("call|abc+/", "2"), tool_message("c1", "1"), user("on")]
    odd = hash_id("call|abc+/")
    assert to_responses(c_body(*rows), CHAT)["input"][1:-1] == [
        said("T"), call("c1", "f", '{"a": 1}'), call(odd, "a_b"), output("c1", "1"),
        output(odd, "2"),
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", ['{"a":', "[1]", "null", "x"])
def test_arguments_that_broke_off_do_not_end_a_conversation(arguments: str) -> None:
    """Case 23: a model that was cut short leaves them, and the history is sent for ever after."""
    rows = [user("q"), assistant(None, tool_calls=[chat_call("c1", "f", arguments)])]
    to_responses(c_body(*rows, tool_message("c1")), CHAT)


def test_a_prefilled_answer_is_refused() -> None:
    """5.1: no model of OpenAI goes on with one."""
    chat = read(a_body(user("q"), assistant("{")), MESSAGES)
    with pytest.raises(gw.UnsupportedFeature):
        RESPONSES.write_request(chat, MODELS[CODEX])


def test_a_system_prompt_alone_is_a_conversation() -> None:
    """3.2: `input` is required, an empty one is refused."""
    to_responses(c_body({"role": "system", "content": "S"}), CHAT)


def test_a_format_with_an_optional_property_is_not_strict() -> None:
    """5.4, A>R: a strict schema must require every property, Anthropic's need not."""
    schema = {**SCHEMA, "required": []}
    to_responses(
        a_body(output_config={"format": {"type": "json_schema", "schema": schema}}), MESSAGES
    )


def test_a_file_of_the_user_is_an_input_file() -> None:
    """5.4, A>R."""
    written = RESPONSES.write_request(
        read(a_body(user([A_PDF, text("see")])), MESSAGES), MODELS[CODEX]
    )
    file = {"type": "input_file", "filename": "document.pdf", "file_data": PDF_URL}
    assert written["input"][0]["content"] == [file, input_text("see")]


# ---- native bodies: the rules (6.1) --------------------------------------------------------------


def test_a_plain_native_body_goes_up_as_it_came() -> None:
    """6.1: but that nothing is stored and reasoning comes encrypted."""
    more: Json = {
        "instructions": "I",
        "max_output_tokens": 5000,
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low", "format": FORMAT},
        "tools": [
            function(description="Does it."),
            {"type": "custom", "name": "patch", "description": "Patches.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}},
            namespace("ns", function("go"), description="Goes."),
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": KEY,
        "truncation": "auto",
        "context_management": [{"type": "compaction", "compact_threshold": 1000}],
    }  # fmt: skip
    items = [
        developer([input_text("D")], type="message"),
        user([input_text("q"), INPUT_IMAGE], type="message"),
        said("T", status="completed", phase="commentary"),
        call("c1", "go", '{"a": 1}', namespace="ns"),
        custom_call("c2", "x", "patch"),
        output("c1"),
        custom_output("c2"),
        user("on"),
    ]
    assert native(*items, **more) == {**r_body(*items, **more), **USUAL}
    assert scrubbed(*items, **more).dropped == []


def test_a_string_goes_up_as_it_came() -> None:
    """3.2."""
    assert accept("responses", {"model": "m", "input": "hi"}, CODEX)["input"] == "hi"


@pytest.mark.parametrize("streaming", [True, False])
def test_the_model_and_the_stream_are_the_upstreams(streaming: bool) -> None:
    body = {"model": "copilot/Gpt-5.3-Codex", "input": "hi"}
    sent = gw.sanitize_body("responses", body, MODELS[CODEX], {}, streaming).body
    assert (sent["model"], sent["stream"]) == (CODEX, streaming)


@pytest.mark.parametrize("store", [True, False, None])
@pytest.mark.parametrize(
    "include", [None, [], ["reasoning.encrypted_content"], ["web_search_call.results", 5], "all", 5]
)
def test_nothing_is_stored_and_reasoning_comes_encrypted(store: Any, include: Any) -> None:
    """6.1: `store` false, `include` always the one member, whatever was asked."""
    sent = native(user(), store=store, include=include)
    assert (sent["store"], sent["include"]) == (False, ["reasoning.encrypted_content"])


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"client_metadata": {"x": "EXAMPLE"}}, []),
        ({"stream_options": {"include_obfuscation": False}}, []),
        ({"service_tier": "auto", "metadata": {}}, []),
        ({"service_tier": "flex", "user": "u"}, ["service_tier", "user"]),
        ({"max_tool_calls": 3}, ["max_tool_calls"]),
        ({"top_logprobs": 3, "safety_identifier": "s"}, ["safety_identifier", "top_logprobs"]),
        ({"prompt_cache_retention": "24h"}, ["prompt_cache_retention"]),
    ],
)
def test_keys_that_copilot_does_not_know_are_left_out(asked: Json, named: list[str]) -> None:
    """6.1."""
    assert native(user(), **asked) == native(user())
    assert sorted(scrubbed(user(), **asked).dropped) == named


ITEM_IDS: list[Json] = [
    user("q", type="message", id="msg_" + "x" * 400),
    said("T", id="msg_" + "x" * 60),
    call("c1", id="fc_" + "x" * 1100),
    output("c1", id="fco_1"),
    custom_call("c2", "x", "patch", id="ctc_1"),
    custom_output("c2"),
]


def test_ids_of_items_do_not_go_up() -> None:
    """3.3: with nothing stored they mean nothing, and too long ones are refused."""
    sent = items_of(*ITEM_IDS)
    assert not [item["id"] for item in sent if "id" in item]
    assert [i.get("call_id") for i in sent] == [None, None, "c1", "c1", "c2", "c2"]


def test_the_same_id_on_two_items_does_no_harm() -> None:
    """3.3: gateways give the same id twice."""
    assert len(items_of(user("q"), said("a", id="msg_1"), said("b", id="msg_1"), user("on"))) == 4


@pytest.mark.parametrize("size", [64, 65, 90])
def test_only_a_call_id_above_64_characters_is_hashed(size: int) -> None:
    """3.3 and 5.0."""
    long_id = "c" * size
    sent = items_of(user("q"), custom_call(long_id, "x"), custom_output(long_id))
    wanted = long_id if size == 64 else hash_id(long_id)
    assert [i["call_id"] for i in sent[1:]] == [wanted, wanted]


@pytest.mark.parametrize(
    "item",
    [
        said("T", status=None, phase=None, id=None),
        call("c1", status=None, namespace=None, id=None),
        custom_call("c1", "x", namespace=None, status=None),
        reasoning("SEALED", status=None, content=None, id=None),
    ],
    ids=lambda item: item["type"],
)
def test_nulls_do_not_go_up(item: Json) -> None:
    """6.1: never `status: null` or `content: null`; clients echo what they got."""
    issued = Issued()
    issued.seal([], "SEALED")
    rest = [said("U")] if item["type"] == "reasoning" else []
    answers = {"function_call": [output("c1")], "custom_tool_call": [custom_output("c1")]}
    rest += answers.get(item["type"], [])
    sent = items_of(user("q"), item, *rest, user("on"), issued=issued)
    assert sent[1] == {key: value for key, value in item.items() if value is not None}


@pytest.mark.parametrize(
    "blank",
    [
        assistant(""),
        assistant(None),
        assistant([]),
        said(""),
        said(" \n"),
        {**said(""), "content": [{"type": "output_text", "text": "", "annotations": []}] * 2},
        user("", type="message"),
        user([input_text(" ")]),
        developer(""),
    ],
    ids=str,
)
def test_a_message_that_says_nothing_does_not_go_up(blank: Json) -> None:
    """6.1: empty text dropped."""
    assert items_of(user("q"), said("T"), blank, user("on")) == [user("q"), said("T"), user("on")]


def test_a_blank_part_does_not_go_up() -> None:
    """6.1: empty text dropped, the rest of its message not."""
    sent = items_of(user([input_text(""), input_text("q"), INPUT_IMAGE]))
    assert sent == [user([input_text("q"), INPUT_IMAGE])]


def test_an_image_without_detail_gets_one() -> None:
    """6.1: `detail` auto."""
    bare = {"type": "input_image", "image_url": IMAGE_URL}
    assert items_of(user([input_text("q"), bare])) == [user([input_text("q"), INPUT_IMAGE])]


@pytest.mark.parametrize("kind", ["function", "custom"])
@pytest.mark.parametrize("words", ["", "t"])
def test_an_image_of_a_native_output_stands_behind_it(kind: str, words: str) -> None:
    """6.1: outputs are text; the picture comes in a user message."""
    bare = {"type": "input_image", "image_url": IMAGE_URL}
    parts = [*([input_text(words)] if words else []), bare]
    rows = [call("c1"), output("c1", parts)]
    if kind == "custom":
        rows = [custom_call("c1", "x"), custom_output("c1", parts)]
    sent = items_of(user("q"), *rows, user("on"))
    assert [i.get("type", i.get("role")) for i in sent[2:]] == [rows[1]["type"], "message", "user"]
    assert sent[2]["output"] == words or (not words and sent[2]["output"])
    assert sent[3]["content"][-1] == INPUT_IMAGE and "c1" in sent[3]["content"][0]["text"]


@pytest.mark.parametrize("nothing", ["", [], [input_text("")], None])
def test_an_output_of_nothing_promises_no_image(nothing: Any) -> None:
    """6.1: an output is a string, and says nothing of a message that does not come."""
    sent = items_of(user("q"), call("c1"), output("c1", nothing), user("on"))
    assert len(sent) == 4
    assert "next message" not in sent[2]["output"]


def test_images_of_several_outputs_come_behind_their_own() -> None:
    """3.3 and 6.1: outputs stay directly behind the calls."""
    parts = [input_text("t"), INPUT_IMAGE]
    rows = [call("c1"), call("c2"), output("c1", parts), output("c2", parts), user("on")]
    sent = items_of(user("q"), *rows)
    assert len([i for i in sent if PNG in json.dumps(i)]) >= 1
    assert json.dumps(sent).count(PNG) == 2


def test_native_outputs_come_directly_behind_their_calls() -> None:
    """3.3: whatever stood between them comes behind."""
    rows = [
        call("c1"),
        user("steer"),
        call("c2"),
        said("note"),
        output("c2", "2"),
        output("c1", "1"),
    ]
    assert items_of(user("q"), *rows, user("on"))[1:] == [
        call("c1"), output("c1", "1"), user("steer"), call("c2"), output("c2", "2"), said("note"),
        user("on"),
    ]  # fmt: skip


def test_thoughts_between_calls_stay_before_their_call() -> None:
    """6.1: order before its function_call."""
    issued = Issued()
    thoughts = [reasoning(issued.seal(["c1"]), "a"), reasoning(issued.seal(["c2"]), "b")]
    rows = [thoughts[0], call("c1"), thoughts[1], call("c2"), output("c1"), output("c2")]
    assert items_of(user("q"), *rows, issued=issued)[1:] == rows


def test_a_thought_that_nothing_follows_does_no_harm() -> None:
    """3.3: Codex keeps the thought of a turn that was interrupted."""
    issued = Issued()
    sealed = issued.seal([])
    sent = items_of(user("q"), reasoning(sealed, "a"), user("stop, and do this"), issued=issued)
    assert sent[0] == user("q") and sent[-1] == user("stop, and do this")


def test_the_readable_text_of_a_thought_does_not_go_up() -> None:
    """3.3: `content` is null or for models that show it; the upstream takes none."""
    issued = Issued()
    sealed = issued.seal([])
    shown = [{"type": "reasoning_text", "text": "hm"}]
    sent = items_of(user("q"), reasoning(sealed, "s", content=shown), said("T"), issued=issued)
    assert sent[1] == reasoning(sealed, "s")


def test_a_call_id_that_is_used_again_is_answered_twice() -> None:
    """5.0: some clients and models count their calls in every turn from the beginning."""
    rows = [call("c1"), output("c1", "first"), user("on"), call("c1"), output("c1", "second")]
    outputs = [i["output"] for i in items_of(user("q"), *rows) if "output" in i]
    assert outputs == ["first", "second"]
    outputs = [m["content"] for m in to_chat(r_body(user("q"), *rows))["messages"]
               if m["role"] == "tool"]  # fmt: skip
    assert outputs == ["first", "second"]


def test_two_outputs_of_one_call_are_one() -> None:
    """3.3: a call has one output; none of its words is lost."""
    rows = [call("c1"), output("c1", "first"), output("c1", "second"), user("on")]
    (sent,) = [i for i in items_of(user("q"), *rows) if i.get("type") == "function_call_output"]
    assert "first" in sent["output"] and "second" in sent["output"]


@pytest.mark.parametrize("target", [to_chat, to_messages, to_kiro])
def test_two_outputs_of_one_call_are_one_elsewhere(target: Callable[[Json], Any]) -> None:
    """5.3: vendors refuse two results with one id."""
    rows = [call("c1"), output("c1", "first"), output("c1", "second"), user("on")]
    sent = json.dumps(target(r_body(user("q"), *rows)))
    assert (sent.count("first"), sent.count("second")) == (1, 1)


def test_a_compaction_goes_back_to_the_vendor() -> None:
    """3.3: native only."""
    issued = Issued()
    item = {"type": "compaction", "encrypted_content": issued.seal([]), "id": "cmp_1"}
    assert items_of(item, user("on"), issued=issued) == [
        {key: value for key, value in item.items() if key != "id"}, user("on"),
    ]  # fmt: skip


@pytest.mark.parametrize("item", [{}, {"id": "x"}, {"type": None}, {"type": 5}])
def test_an_item_of_no_type_is_refused_natively(item: Json) -> None:
    """3.3: by its path."""
    assert refused_natively(r_body(user(), item)).param == "input.1.type"


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (call("c1") | {"call_id": None}, "input.1.call_id"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input.1.call_id"),
        ({"type": "custom_tool_call", "name": "f", "input": "x"}, "input.1.call_id"),
        ({"type": "function_call_output", "output": "x"}, "input.1.call_id"),
        ({"role": "user", "content": 5}, "input.1.content"),
    ],
)
def test_a_native_item_that_no_vendor_could_read_is_refused(item: Json, param: str) -> None:
    """3.3: by its path, never a failure of the gateway's own, never left out in silence."""
    assert refused_natively(r_body(user(), item)).param == param


@pytest.mark.parametrize("blank", [user(""), developer(" "), reasoning("gw1.a.EXAMPLE")])
def test_a_native_body_that_says_nothing_is_refused(blank: Json) -> None:
    """3.2: `input` is required; what is left of it must not be empty."""
    assert refused_natively(r_body(blank)).param == "input"


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a":', {"_raw": '{"a":'}),
        ("[1]", {"_raw": "[1]"}),
    ],
)
def test_native_arguments_are_an_object(arguments: Any, sent: Json) -> None:
    """Case 23: a call that broke off must not end the conversation."""
    rows = items_of(user("q"), call("c1", arguments=arguments), output("c1"))
    assert json.loads(rows[1]["arguments"]) == sent


def test_a_native_output_that_is_an_object_is_words() -> None:
    """5.3: nothing that a tool said is lost."""
    assert items_of(user("q"), call("c1"), output("c1", {"ok": True}))[2] == (
        output("c1", '{"ok":true}')
    )


def test_a_namespace_has_a_name_that_the_upstream_takes() -> None:
    """5.0: the same in the tools and in the history."""
    tools = [namespace("my.server", function("go"), description="Goes.")]
    rows = [user("q"), call("c1", "go", namespace="my.server"), output("c1")]
    sent = native(*rows, tools=tools)
    assert sent["tools"][0]["name"] == sent["input"][1]["namespace"] == "my_server"


# tools and settings


@pytest.mark.parametrize(
    ("tool", "sent"),
    [
        (function(strict=None), function()),
        (function(strict=True, parameters=SCHEMA), function(strict=True, parameters=SCHEMA)),
        ({"type": "function", "name": "f"}, function(parameters=EMPTY_SCHEMA)),
        (function(parameters=None), function(parameters=EMPTY_SCHEMA)),
        (function(parameters={}), function(parameters=EMPTY_SCHEMA)),
        (function(parameters={**OBJECT, "$schema": "x"}), function()),
        (function("a.b/c"), function("a_b_c")),
        (function("n" * 65), function(gw.wire_name("n" * 65))),
        (function(defer_loading=True, output_schema={"type": "object"}), function()),
        (function(description=None), function()),
        ({"type": "custom", "name": "a.b"}, {"type": "custom", "name": "a_b"}),
        (
            {"type": "custom", "name": "c", "description": None, "format": None},
            {"type": "custom", "name": "c"},
        ),
        (
            namespace("ns", function("a.b", strict=None), description=""),
            namespace("ns", function("a_b"), description="ns"),
        ),
        (namespace("ns", function()), namespace("ns", function(), description="ns")),
        (
            namespace("ns", function(defer_loading=True), description="D"),
            namespace("ns", function(), description="D"),
        ),
    ],
)  # fmt: skip
def test_a_native_tool_is_fitted(tool: Json, sent: Json) -> None:
    """6.1: flat functions with an object schema, custom tools, namespaces with a description."""
    assert native(user(), tools=[tool])["tools"] == [sent]


def test_native_calls_are_named_as_their_tools() -> None:
    """5.0: the same in the tools, in the history and in the choice."""
    odd = "server.tool/" + "x" * 60
    choice = {"type": "function", "name": odd}
    rows = [call("c1", odd), output("c1")]
    sent = native(user("q"), *rows, tools=[function(odd)], tool_choice=choice)
    wire = gw.wire_name(odd)
    assert (
        sent["tools"][0]["name"] == sent["input"][1]["name"] == sent["tool_choice"]["name"] == wire
    )


def test_allowed_tools_are_named_as_the_tools() -> None:
    """5.0."""
    allowed = [{"type": "function", "name": "a.b"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    sent = native(user(), tools=[function("a.b"), function("g")], tool_choice=choice)
    assert sent["tool_choice"]["tools"] == [{"type": "function", "name": "a_b"}]


def test_names_inside_of_a_namespace_come_back_whole() -> None:
    """5.0: what is renamed on the way up has to be known on the way back."""
    tools = [namespace("mcp__x", function("a.b")), function("c.d")]
    names = gw.wire_names(gw.tool_names(r_body(tools=tools)))
    assert names["c_d"] == "c.d"
    assert names["a_b"] == "a.b"


@pytest.mark.parametrize("tools", [None, []])
def test_a_choice_among_no_tools_is_left_out(tools: Any) -> None:
    """3.4."""
    more = {"tools": tools, "tool_choice": "auto", "parallel_tool_calls": False}
    assert native(user(), **more) == native(user())


@pytest.mark.parametrize(
    ("model", "asked", "sent"),
    [
        (CODEX, {"max_output_tokens": 1}, {"max_output_tokens": 16}),
        (CODEX, {"max_output_tokens": 10**6}, {"max_output_tokens": 128_000}),
        (GPT5, {"max_output_tokens": 10**6}, {"max_output_tokens": 64_000}),
        (CODEX, {"reasoning": {"effort": "max"}}, {"reasoning": {"effort": "xhigh"}}),
        (CODEX, {"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "low"}}),
        (GPT5, {"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "none"}}),
        (GPT5, {"reasoning": {"effort": "minimal"}}, {"reasoning": {"effort": "none"}}),
        (CODEX, {"reasoning": {"effort": "unheard of"}}, {}),
        (CODEX, {"reasoning": {"effort": None, "summary": None}}, {}),
        (CODEX, {"reasoning": {"summary": "auto"}}, {"reasoning": {"summary": "auto"}}),
        (CODEX, {"reasoning": {"summary": "detailed", "generate_summary": "auto", "context": "x",
                               "mode": "y"}}, {"reasoning": {"summary": "detailed"}}),
        (CODEX, {"temperature": 1, "top_p": 1}, {}),
        (GPT5, {"temperature": 0.2}, {}),
        (CODEX, {"text": {}}, {"text": {}}),
    ],
)  # fmt: skip
def test_settings_are_those_the_model_takes(model: str, asked: Json, sent: Json) -> None:
    """6.1."""
    settings = {k: v for k, v in native(user(), model=model, **asked).items() if k not in USUAL}
    settings.pop("input")
    assert settings == sent


@pytest.mark.parametrize("summary", ["concise", "none"])
def test_a_summary_that_copilot_does_not_know_is_not_asked_for(summary: str) -> None:
    """6.1: detailed or auto."""
    asked = native(user(), reasoning={"effort": "low", "summary": summary})["reasoning"]
    assert asked["effort"] == "low"


def test_the_model_that_gives_no_summary_is_asked_for_none() -> None:
    """6.1."""
    listed = {"reasoning_effort": ["low", "high"]}
    entry = {"id": "gpt-5.3-codex-spark-preview", "capabilities": {"supports": listed}}
    model = gw.read_copilot_model(entry, "copilot")
    asked = {"effort": "low", "summary": "auto"}
    assert scrubbed(user(), model=model, reasoning=asked).body["reasoning"] == {"effort": "low"}


def test_an_effort_is_not_asked_of_a_model_that_lists_none() -> None:
    """5.5: dropped, never a 400."""
    scrub = scrubbed(user(), model=Model("m", "copilot"), reasoning={"effort": "high"})
    assert "reasoning" not in scrub.body


def test_sampling_stays_where_the_model_does_not_reason() -> None:
    """6.1: dropped for reasoning models, and named."""
    asked: Json = {"temperature": 0.2, "top_p": 0.9}
    kept = scrubbed(user(), model=Model("mai-code-1", "copilot"), **asked)
    assert (kept.body["temperature"], kept.body["top_p"], kept.dropped) == (0.2, 0.9, [])
    assert sorted(scrubbed(user(), **asked).dropped) == ["temperature", "top_p"]


def test_a_long_key_of_the_cache_is_shortened() -> None:
    """6.1 and 5.1: the vendor takes 64 characters; the same key stays the same."""
    sent = {native(user(), prompt_cache_key=KEY * 3)["prompt_cache_key"] for _ in range(2)}
    assert len(sent) == 1


def test_what_was_refused_once_is_left_out_and_named() -> None:
    """Case 20, for R."""
    lessons = {"field": ["truncation", "text.verbosity", "tools.*.function.strict"]}
    body = r_body(user(), truncation="auto", text={"verbosity": "low", "format": FORMAT},
                  tools=[function()])  # fmt: skip
    before = copy.deepcopy(body)
    scrub = gw.sanitize_body("responses", body, MODELS[CODEX], lessons, True)
    assert body == before
    assert scrub.body["text"] == {"format": FORMAT}
    assert "truncation" not in scrub.body and "strict" not in scrub.body["tools"][0]
    assert sorted(scrub.dropped) == ["text.verbosity", "tools.*.function.strict", "truncation"]


def test_the_callers_own_body_is_never_changed() -> None:
    """A second attempt begins with it, and so does another provider."""
    bare = {"type": "input_image", "image_url": IMAGE_URL}
    items = [
        user([input_text("q"), bare], id="msg_1"),
        reasoning("gAAAA", id="rs_1", content=None),
        call("c" * 90, "a.b", id="fc_1", namespace=None, status=None),
        output("c" * 90, [input_text("t"), bare]),
        output("c9", [input_text("t"), bare]),
        said("T", id="msg_2", status=None),
    ]
    tools = [
        namespace("ns", function("a.b", strict=None, defer_loading=True)),
        function("c.d", parameters={"$schema": "x"}),
        {"type": "web_search"},
    ]
    more = {
        "tools": tools,
        "tool_choice": {"type": "function", "name": "c.d"},
        "reasoning": {"effort": "max", "mode": "x"},
        "include": ["a"],
        "text": {"verbosity": None},
        "max_output_tokens": 1,
    }
    body = r_body(*items, **more)
    before = copy.deepcopy(body)
    sent = gw.sanitize_body("responses", body, MODELS[CODEX], {}, True).body
    gw.strip_reasoning(sent)
    gw.ReasoningMemory().attach_items(sent)
    assert body == before


def test_the_rules_leave_nothing_to_do_for_themselves() -> None:
    """What was scrubbed once goes up the same the next time."""
    items = [user("q"), call("c" * 90, "a.b"), user("steer"), output("c9"), said("T")]
    first = native(*items, tools=[function("a.b")], reasoning={"effort": "max"})
    assert accept("responses", first, CODEX) == first


# ---- reasoning that is kept, and reasoning that is given up --------------------------------------


def remember(*calls: str, enc: str = "E", words: str = "hm") -> gw.ReasoningMemory:
    """A memory of one thought before these calls."""
    memory = gw.ReasoningMemory()
    memory.store(calls, words, gw.pack("gw1.r.", {"id": "rs_1", "enc": enc}))
    return memory


def test_a_thought_is_put_back_before_its_calls() -> None:
    """6.1: order before its function_call; clients of C have no field for it."""
    issued = Issued()
    memory = remember("c1", "c2", enc=issued.seal(["c1", "c2"]))
    rows = [user("q"), call("c1"), call("c2"), output("c1"), output("c2"), user("on"), call("c3"),
            output("c3")]  # fmt: skip
    body = native(*rows)
    memory.attach_items(body)
    check_responses(copy.deepcopy(body), RAW[CODEX], issued)
    kinds = [item.get("type") for item in body["input"]]
    assert kinds[1:4] == ["reasoning", "function_call", "function_call"]
    assert kinds.count("reasoning") == 1
    assert body["input"][1]["summary"] == [{"type": "summary_text", "text": "hm"}]


@pytest.mark.parametrize(
    "items",
    [
        [user("q"), call("c9"), output("c9")],
        [user("q"), reasoning("E2"), call("c1"), output("c1")],
        [user("q"), said("T")],
    ],
)
def test_nothing_is_put_back_where_nothing_is_missing(items: list[Json]) -> None:
    body = {"input": copy.deepcopy(items)}
    remember("c1").attach_items(body)
    assert body == {"input": items}


def test_a_string_lacks_no_thought() -> None:
    body = {"input": "hi"}
    remember("c1").attach_items(body)
    assert body == {"input": "hi"}


def test_a_thought_behind_words_is_put_between_them_and_the_call() -> None:
    body = {"input": [user("q"), said("T"), call("c1"), output("c1")]}
    remember("c1").attach_items(body)
    assert [i.get("type") for i in body["input"]] == [
        None, "message", "reasoning", "function_call", "function_call_output",
    ]  # fmt: skip


def test_a_signature_of_chat_is_not_put_before_an_item() -> None:
    """4.5: it is of another maker."""
    memory = gw.ReasoningMemory()
    memory.store(["c1"], "hm", "OPAQUE")
    body = {"input": [user("q"), call("c1"), output("c1")]}
    memory.attach_items(body)
    assert body == {"input": [user("q"), call("c1"), output("c1")]}


def test_a_thought_of_a_responses_model_is_not_given_to_a_chat_model() -> None:
    """4.5: the client goes on with another model, which refuses a foreign `reasoning_opaque`."""
    body = {"messages": [user("q"), assistant(None, tool_calls=[chat_call("c1")])]}
    before = copy.deepcopy(body)
    remember("c1").attach(body)
    assert body == before


def test_the_oldest_thoughts_are_forgotten_first() -> None:
    memory = gw.ReasoningMemory(limit=2)
    for name in ("c1", "c2", "c1", "c3"):
        memory.store([name], "", "o")
    assert list(memory.entries) == ["c1", "c3"]


def test_reasoning_that_is_refused_is_given_up() -> None:
    """4.5: the conversation goes on without it."""
    body = {"input": [user("q"), reasoning("E"), call("c1"), reasoning("F"), output("c1")]}
    assert gw.strip_reasoning(body)
    assert body["input"] == [user("q"), call("c1"), output("c1")]
    assert not gw.strip_reasoning(body)
    assert body["input"] == [user("q"), call("c1"), output("c1")]


def test_a_string_has_no_reasoning_to_give_up() -> None:
    body = {"input": "hi"}
    assert not gw.strip_reasoning(body)
    assert body == {"input": "hi"}


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "texts", "is_packed"),
    [
        ({"input": "a"}, ["a"], False),
        ({"input": ["a", "b"]}, ["a", "b"], False),
        ({"input": ["a"], "encoding_format": "float"}, ["a"], False),
        ({"input": ["a"], "encoding_format": "base64", "dimensions": 4}, ["a"], True),
        ({"input": ["a"], "encoding_format": None, "dimensions": None}, ["a"], False),
    ],
)
def test_texts_to_embed(body: Json, texts: list[str], is_packed: bool) -> None:
    """Always a list upstream; base64 is made here."""
    assert gw.read_embeddings(body) == (texts, is_packed)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": ["a", None]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "encoding_format": 5}, "encoding_format"),
        ({"input": "a", "dimensions": "many"}, "dimensions"),
        ({"input": "a", "dimensions": True}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_is_refused(body: Json, param: str) -> None:
    with pytest.raises(gw.InvalidRequest) as caught:
        gw.read_embeddings(body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_embeddings_answer_is_complete(is_packed: bool) -> None:
    """Copilot leaves `object` and `model` out at times."""
    rows: list[Json] = [{"embedding": [0.5, -1.0]}, {"embedding": [0.25, 2.0], "index": 1}]
    whole = gw.write_embeddings(rows, gw.Usage(input=7), is_packed)
    assert (whole["object"], whole["usage"]) == ("list", {"prompt_tokens": 7, "total_tokens": 7})
    assert [(d["object"], d["index"]) for d in whole["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    vector = whole["data"][0]["embedding"]
    if is_packed:
        vector = list(struct.unpack("<2f", base64.b64decode(vector)))
    assert vector == [0.5, -1.0]


# ---- names of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("gpt-5.2", ["gpt-5.2"]),
        ("GPT-5.2", ["gpt-5.2"]),
        ("claude-sonnet-4-5", ["claude-sonnet-4-5", "claude-sonnet-4.5"]),
        ("claude-sonnet-4-5-latest", ["claude-sonnet-4-5-latest", "claude-sonnet-4.5"]),
        ("claude-sonnet-4-20250514", ["claude-sonnet-4-20250514", "claude-sonnet-4"]),
        ("claude-4.5-sonnet", ["claude-4.5-sonnet", "claude-sonnet-4.5"]),
        ("claude-4-5-sonnet", ["claude-4-5-sonnet", "claude-sonnet-4.5"]),
        ("kiro-claude-sonnet-4-5", ["kiro-claude-sonnet-4-5", "claude-sonnet-4.5"]),
        ("claude-opus-4-6[1m]", ["claude-opus-4.6-1m", "claude-opus-4.6"]),
    ],
)
def test_a_name_is_looked_for_in_these_spellings(name: str, spellings: list[str]) -> None:
    """Exact, any case, undated, dotted; of the spellings in between the order is kept."""
    found = gw.model_spellings(name)
    assert [spelling for spelling in found if spelling in spellings] == spellings
    assert len(set(found)) == len(found)
    assert not [s for s in found if "4.20" in s]


LISTED = {
    name: Model(name, "p")
    for name in (
        "claude-sonnet-4", "claude-sonnet-4.5", "claude-haiku-4.5", "claude-opus-4.6",
        "claude-opus-4.6-1m", "gpt-5.2", "gpt-5.3-codex", "gpt-5.3-codex-high",
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found", "effort"),
    [
        ("gpt-5.2", "gpt-5.2", None),
        ("gpt-5.2-high", "gpt-5.2", "high"),
        ("GPT-5.2-XHIGH", "gpt-5.2", "xhigh"),
        ("gpt-5.3-codex-high", "gpt-5.3-codex-high", None),
        ("gpt-5.3-codex-low", "gpt-5.3-codex", "low"),
        ("claude-sonnet-4-5-thinking", "claude-sonnet-4.5", "high"),
        ("claude-sonnet-4.5-max", "claude-sonnet-4.5", "max"),
        ("claude-opus-4-6[1m]", "claude-opus-4.6-1m", None),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4.5", None),
        ("claude-3-5-haiku-20241022", "claude-haiku-4.5", None),
        ("claude-3-7-sonnet-latest", "claude-sonnet-4.5", None),
        ("claude-3-opus-20240229", "claude-opus-4.6", None),
        ("gpt-4", None, None),
        ("claude-2.1", None, None),
        ("high", None, None),
        ("-high", None, None),
        ("", None, None),
    ],
)
def test_a_name_finds_a_model_and_may_ask_for_an_effort(
    name: str, found: str | None, effort: str | None
) -> None:
    """3.4 of the sheet about Copilot; a suffix that no listed model has is a setting."""
    model = gw.find_model(name, LISTED)
    if found is None:
        assert model is None
        return
    assert model is not None
    allowed = {found, "claude-opus-4.6-1m"} if "3-opus" in name else {found}
    assert model.id in allowed
    assert gw.implied_effort(name, model) == effort


# ---- the first look ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "initiator"),
    [
        ([user()], "user"),
        ([user(), said("T"), user()], "user"),
        ([user(), call("c1"), output("c1")], "agent"),
        ([user(), developer("D")], "user"),
        ([user(), call("c1"), output("c1"), developer("D")], "agent"),
        ([developer("D")], "user"),
        ([user(), said("T")], "agent"),
        ([user(), call("c1"), output("c1"), user(" ")], "agent"),
    ],
)
def test_who_spoke_last(items: list[Json], initiator: str) -> None:
    """What a developer says in the middle of a run is nobody's word."""
    assert RESPONSES.request_info(r_body(*items)).initiator == initiator


@pytest.mark.parametrize(
    ("body", "has_image"),
    [
        ({"input": "hi"}, False),
        (r_body(user([input_text("q")])), False),
        (r_body(user([INPUT_IMAGE])), True),
        (r_body(user("q"), call("c1"), output("c1", [INPUT_IMAGE])), True),
        (r_body(user("q"), call("c1"), output("c1", "input_image")), False),
    ],
)
def test_an_image_is_seen_wherever_it_stands(body: Json, has_image: bool) -> None:
    """It takes a header of its own."""
    assert gw.has_image(body["input"]) is has_image


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "m"},
        {"input": "hi"},
        {"model": 5, "input": "hi"},
        {"model": "m", "input": []},
        {"model": "m", "input": ["hi"]},
        {"model": "m", "input": "hi", "stream": "yes"},
    ],
)
def test_an_outline_of_a_bad_body_is_a_400(body: Json) -> None:
    """It is the first look at what a caller sent."""
    with pytest.raises(gw.InvalidRequest):
        RESPONSES.request_info(body)


# ---- conversations by chance ---------------------------------------------------------------------

BLANK_WORDS = ["", " ", "\n\n"]
ODD_ENDS = ["", " ", "\n\n", "é\N{GRINNING FACE}", " half \ud83d", "\udc00 other half", "."]
ODD_IDS = ["call|abc+/", "x" * 64, "x" * 90, "", "é", "toolu_1", "half \ud83d", "call_1"]
ODD_NAMES = ["f", "g", "mcp__x__go", "a.b/c", "n" * 64, "n" * 65, "1st", "-", "s\ud83d"]
ODD_SCHEMAS: list[Any] = [
    {},
    None,
    EMPTY_SCHEMA,
    OBJECT,
    SCHEMA,
    {**OBJECT, "$schema": "http://json-schema.org/x"},
    {"properties": {"format": {"type": "string", "format": "uri"}}, "required": []},
]


class Dice:
    """Conversations that a client might send, and some that only a careless one would.

    Every word that must arrive carries a mark of its own (`w1w`, `w2w`, ...).
    """

    def __init__(self, seed: int, wild: bool) -> None:
        self.random = random.Random(seed)
        #: call ids that are used again, calls with two outputs or one of another kind
        self.wild = wild
        self.marks: list[str] = []
        self.issued = Issued()
        self.ids = itertools.count()
        #: (id, kind) of the calls whose output may still come
        self.open: list[tuple[str, str]] = []

    def once_in(self, many: int) -> bool:
        return self.random.randrange(many) == 0

    def words(self, blank: bool = True) -> str:
        """Text, mostly with a mark in it."""
        if blank and self.once_in(5):
            return self.random.choice(BLANK_WORDS)
        self.marks.append(f"w{len(self.marks)}w")
        return self.marks[-1] + self.random.choice(ODD_ENDS)

    def call_id(self) -> str:
        odd = self.random.choice(ODD_IDS)
        return odd if self.wild else f"{odd}-{next(self.ids)}"

    def with_nulls(self, item: Json, *keys: str) -> Json:
        """An item with an id, a state, and nulls where nothing was set."""
        more: Json = {}
        if self.once_in(3):
            more["id"] = self.random.choice([None, "msg_1", "x" * 400, "fc_\ud83d"])
        for key in ("status", *keys):
            if self.once_in(4):
                more[key] = None
        if "status" not in more and self.once_in(3):
            more["status"] = "completed"
        return {**item, **more}

    def parts(self, kind: str, most: int = 3) -> list[Json]:
        """Parts of a message or of an output."""
        rows: list[Json] = []
        for _ in range(self.random.randrange(1, most + 1)):
            if kind == "output_text":
                row = {"type": kind, "text": self.words(), "annotations": []}
            elif kind == "input_text" and self.once_in(4):
                row = dict(INPUT_IMAGE)
                if self.once_in(2):
                    del row["detail"]
            else:
                row = input_text(self.words())
            rows.append(row)
        return rows

    def message(self) -> list[Json]:
        role = self.random.choice(["user", "user", "assistant", "assistant", "developer", "system"])
        if self.once_in(2):
            item: Json = {"role": role, "content": self.words()}
        elif role == "assistant":
            item = {"role": role, "content": self.parts("output_text")}
        elif role == "user":
            item = {"role": role, "content": self.parts("input_text")}
        else:
            item = {"role": role, "content": [input_text(self.words())]}
        if self.once_in(2):
            item = {"type": "message", **item}
        return [self.with_nulls(item, *(["phase"] if role == "assistant" else []))]

    def thought(self, call_id: str) -> list[Json]:
        """None, one of the upstream's, or one of another maker."""
        # An id that is used again may get another name, so the thought is tied to none.
        calls = [] if self.wild else [gw.wire_id(call_id)]
        sealed = self.issued.seal(calls, f"gAAAAAEXAMPLE{next(self.ids)}")
        signed = envelope("gw1.a.", thinking="hm", signature=self.issued.sign("hm"))
        encrypted = self.random.choice([sealed, signed, "", "gw1.r.broken"])
        if self.once_in(2):
            return []
        summary = ["s"] * self.random.randrange(3)
        return [self.with_nulls(reasoning(encrypted, *summary), "content")]

    def arguments(self) -> Any:
        """As models write them."""
        if self.once_in(4):
            return self.random.choice(["{}", '{"a": 1}'])
        return json.dumps({"a": self.words(blank=False)}, ensure_ascii=False)

    def call(self) -> list[Json]:
        """A call, mostly with the thought before it."""
        call_id = self.call_id()
        name = self.random.choice(ODD_NAMES)
        kind = "custom_tool_call" if self.once_in(4) else "function_call"
        self.open.append((call_id, kind))
        if kind == "custom_tool_call":
            item = custom_call(call_id, self.words(), name)
        else:
            item = call(call_id, name, self.arguments())
        return [*self.thought(call_id), self.with_nulls(item, "namespace")]

    def output(self) -> list[Json]:
        """The output of a call that is open, sometimes of one that nobody knows."""
        if self.open and not self.once_in(12):
            at = self.random.randrange(len(self.open))
            call_id, kind = self.open[at] if self.wild and self.once_in(4) else self.open.pop(at)
        else:
            call_id, kind = f"lost-{next(self.ids)}", "function_call"
        if self.wild and self.once_in(8):
            kind = self.random.choice(["function_call", "custom_tool_call"])
        said = self.parts("input_text") if self.once_in(3) else self.words()
        item = {"type": f"{kind}_output", "call_id": call_id, "output": said}
        return [self.with_nulls(item)]

    def tools(self) -> list[Json]:
        """Tools without two that become one upstream."""
        names = [n for n in ODD_NAMES if self.once_in(3) and n != "mcp__x__go"]
        made: list[Json] = []
        for name in names:
            if self.once_in(4):
                made.append({"type": "custom", "name": name})
                continue
            tool = function(name, parameters=self.random.choice(ODD_SCHEMAS))
            tool["strict"] = self.random.choice([None, False])
            tool["description"] = self.random.choice([None, "", "Does it.", "long " * 2000])
            made.append(tool)
        if made and self.once_in(3):
            described = self.random.choice([None, "", "Goes."])
            made.append(namespace("mcp__x", function("go"), description=described))
        if made and self.once_in(3):
            made.append({"type": "web_search"})
        return made

    def body(self) -> Json:
        """A request that says something at least."""
        makers = [self.message, self.call, self.call, self.output, self.output]
        groups = [self.random.choice(makers)() for _ in range(self.random.randrange(10))]
        groups.insert(self.random.randrange(len(groups) + 1), [user("w-spoken")])
        items = [item for group in groups for item in group]
        body: Json = {"model": "m", "input": items, "tools": self.tools()}
        names = [tool["name"] for tool in body["tools"] if tool["type"] == "function"]
        choices: list[Any] = [None, "auto", "none"]
        if names:
            choices += ["required", {"type": "function", "name": names[0]}]
        body["tool_choice"] = self.random.choice(choices)
        body["instructions"] = self.random.choice([None, "", self.words()])
        body["reasoning"] = self.random.choice([None, {"effort": "max"}, {"effort": None}])
        body["max_output_tokens"] = self.random.choice([None, 1, 5000, 10**7])
        body["parallel_tool_calls"] = self.random.choice([None, True, False])
        body["store"] = self.random.choice([None, True, False])
        body["truncation"] = self.random.choice([None, "auto"])
        return body

    def lost(self, sent: str, body: Json) -> list[str]:
        """Which words of the body did not arrive exactly once."""
        asked = json.dumps(body, ensure_ascii=False)
        marks = [mark for mark in self.marks if mark in asked]
        counts = {mark: sent.count(mark) for mark in [*marks, "w-spoken"]}
        return [f"{mark} is there {n} times" for mark, n in counts.items() if n != 1]


def trouble_with(seed: int, target: str, wild: bool) -> str:
    """What is wrong with one conversation by chance, "" when nothing is."""
    dice = Dice(seed, wild)
    body = dice.body()
    before = copy.deepcopy(body)
    models = {
        "responses": [CODEX, GPT5],
        "chat": [GPT, GPT5, SONNET],
        "messages": [SONNET, OPUS],
        "kiro": [SONNET, OPUS, "auto", "gpt-5.6-sol"],
    }
    model = dice.random.choice(models[target])
    try:
        if target == "kiro":
            written = KIRO.write_request(RESPONSES.read_request(body), KIRO_MODELS[model])
            found = kiro_faults(written, model)
        else:
            written, found = body, []
            if target != "responses":
                chat = RESPONSES.read_request(body)
                written = gw.DIALECTS[target].write_request(chat, MODELS[model])
            written = accept(target, written, model, dice.issued)
    except Refusal as refusal:
        found = [refusal.note]
    if body != before:
        found.append("the caller's body was changed")
    if not found:
        found = dice.lost(gw.dump_json(written).decode(), body)
    return f"seed {seed}, {model}: {found} from {json.dumps(body)[:3000]}" if found else ""


TARGETS = ["responses", "chat", "messages", "kiro"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_any_conversation_is_taken_and_every_word_arrives_once(first: int, target: str) -> None:
    """3.3: outputs missing, late or of unknown calls, blanks, lone surrogates, odd names, nulls."""
    troubles = [trouble_with(seed, target, wild=False) for seed in range(first, first + 100)]
    assert list(filter(None, troubles)) == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("first", range(0, 200, 100))
def test_ids_that_are_used_again_do_no_harm(first: int, target: str) -> None:
    """3.3: two calls with one id, two outputs of one call, outputs of another kind."""
    troubles = [trouble_with(seed, target, wild=True) for seed in range(first, first + 100)]
    assert list(filter(None, troubles)) == []


# ---- cost --------------------------------------------------------------------------------------


def test_eight_times_the_tools_cost_some_eight_times_as_much() -> None:
    """Of the request, of its conversation, and those that a choice allows."""

    def work(count: int) -> Callable[[], object]:
        tools = [{"type": "function", "name": f"f{at}"} for at in range(count)]
        hosted = [{"type": f"hosted_{at}"} for at in range(count)]
        body = {
            "model": "m",
            "input": [
                {"role": "user", "content": "u"},
                {"type": "additional_tools", "tools": tools},
            ],
            "tools": [*tools, *hosted],
            "tool_choice": {"type": "allowed_tools", "tools": tools},
        }
        native = Model("gpt-5.2", "copilot", vendor="OpenAI")

        def run() -> None:
            RESPONSES.read_request(body)
            gw.sanitize_body("responses", body, native, {}, True)

        return run

    assert growth(work, 250) < 24  # 64 where each tool is compared with each
