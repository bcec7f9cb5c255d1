"""Section 8, requests: one dialect read, the other written; and native bodies scrubbed.

The numbers are those of the conversion cases in the project's sheet of wire formats; A is
Anthropic messages, C is OpenAI chat, `A>C` is a request in A that an upstream of C is asked with.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from support import growth

from aiclient_api import (
    CHAT,
    DIALECTS,
    MESSAGES,
    MIN_THINKING_BUDGET,
    UPSTREAM_DIALECTS,
    ApiError,
    Conversation,
    Dialect,
    Headers,
    InvalidRequest,
    Model,
    Rejections,
    UnsupportedFeature,
    adapt_schema,
    classify_copilot_error,
    dump_json,
    has_image,
    sanitize_body,
)

Json = dict[str, Any]

GPT = Model("gpt-4.1", "copilot", efforts=("low", "medium", "high"), files=True)
CLAUDE = Model(
    "claude-sonnet-4.5", "copilot", ("messages",), max_output=64000, budget=(1024, 32000)
)
NEW_CLAUDE = Model(
    "claude-opus-4.8",
    "copilot",
    ("messages",),
    max_output=64000,
    adaptive=True,
    efforts=("low", "medium", "high"),
)
OTHER: dict[str, Dialect] = {"chat": MESSAGES, "messages": CHAT}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}
IMAGE = {"type": "base64", "media_type": "image/png", "data": "AA=="}


def user(content: Any) -> Json:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Json:
    """An assistant message."""
    return {"role": "assistant", "content": content, **more}


def use(call: str, name: str = "f", **arguments: Any) -> Json:
    """An Anthropic call."""
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def result(call: str, content: Any, **more: Any) -> Json:
    """An Anthropic result."""
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def function_call(call: str, arguments: str = "{}", name: str = "f") -> Json:
    """An OpenAI call."""
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


def text(words: str) -> Json:
    """A text part, the same in both."""
    return {"type": "text", "text": words}


def a_body(*messages: Json, **more: Any) -> Json:
    """A messages body."""
    return {"model": "m", "max_tokens": 1000, "messages": list(messages) or [user("hi")], **more}


def c_body(*messages: Json, **more: Any) -> Json:
    """A chat body."""
    return {"model": "m", "messages": list(messages) or [user("hi")], **more}


def a_to_c(body: Json, model: Model = GPT) -> Json:
    """What a chat upstream is asked for a messages body, which must not be changed."""
    before = copy.deepcopy(body)
    written = CHAT.write_request(MESSAGES.read_request(body), model)
    assert body == before
    assert (written["stream"], written["stream_options"]) == (True, {"include_usage": True})
    assert json.loads(json.dumps(written)) == written
    return written


def c_to_a(body: Json, model: Model = CLAUDE) -> Json:
    """What a messages upstream is asked for a chat body, which must not be changed."""
    before = copy.deepcopy(body)
    written = MESSAGES.write_request(CHAT.read_request(body), model)
    assert body == before
    assert written["stream"] is True and written["max_tokens"] >= 1
    return written


def a_to_a(body: Json, model: Model = CLAUDE, lessons: Rejections | None = None) -> Json:
    """What Copilot's own messages endpoint is asked."""
    scrubbed = sanitize_body("messages", copy.deepcopy(body), model, lessons or {}, True)
    return scrubbed.body


def dropped(body: Json) -> list[str]:
    """What reading a messages body names as left out."""
    return MESSAGES.read_request(body).dropped


def refused(dialect: str, body: Json) -> InvalidRequest:
    """The 400 for a body."""
    with pytest.raises(InvalidRequest) as caught:
        DIALECTS[dialect].read_request(body)
    assert caught.value.status == 400
    return caught.value


# ---- A>C ---------------------------------------------------------------------------------------


def test_system_blocks_become_one_message_without_the_billing_line() -> None:
    """Case 1."""
    billing = text("x-anthropic-billing-header: cc_version=1;")
    written = a_to_c(a_body(system=[billing, text("S1"), text("S2")]))
    assert written["messages"] == [{"role": "system", "content": "S1\n\nS2"}, user("hi")]


def test_a_system_message_in_the_middle_stays_there() -> None:
    """Case 2."""
    messages = [user("a"), {"role": "system", "content": "R"}, assistant("b"), user("c")]
    assert a_to_c(a_body(*messages))["messages"] == messages


def test_text_and_two_calls_become_one_assistant_message() -> None:
    """Case 4."""
    turn = assistant([text("T"), use("t1", a=1), use("t2", "g")])
    written = a_to_c(a_body(user("q"), turn, user([result("t1", "1"), result("t2", "2")])))
    assert written["messages"][1] == {
        "role": "assistant",
        "content": "T",
        "tool_calls": [function_call("t1", '{"a":1}'), function_call("t2", "{}", "g")],
    }


def test_results_come_first_and_in_the_order_of_the_calls() -> None:
    """Case 5."""
    answers = user([text("go on"), result("t2", "2"), result("t1", [text("1")])])
    written = a_to_c(a_body(user("q"), assistant([use("t1"), use("t2")]), answers))
    assert written["messages"][2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": "2"},
        user("go on"),
    ]


def test_an_image_in_a_result_goes_into_the_next_message() -> None:
    """Case 6."""
    image = {"type": "image", "source": IMAGE}
    written = a_to_c(a_body(user("q"), assistant([use("t1")]), user([result("t1", [image])])))
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert written["messages"][2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "[image in next message]"},
        user([text("Image from tool call t1:"), url]),
    ]


def test_images_of_several_results_come_after_all_of_them() -> None:
    """5.1: no user message may stand between two tool messages."""
    image = {"type": "image", "source": IMAGE}
    answers = user([result("t1", [image]), result("t2", [text("x"), image]), text("go")])
    written = a_to_c(a_body(user("q"), assistant([use("t1"), use("t2")]), answers))
    assert [m["role"] for m in written["messages"][2:]] == ["tool", "tool", "user"]
    kinds = [part["type"] for part in written["messages"][4]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]


@pytest.mark.parametrize(
    ("content", "is_error", "said"),
    [
        ("no file", True, "Error: no file"),
        ("Error: no file", True, "Error: no file"),
        ("no file", False, "no file"),
        ("", False, "(no output)"),
        (None, False, "(no output)"),
        ([], False, "(no output)"),
        ([text("")], False, "(no output)"),
    ],
)
def test_a_result_says_whether_it_is_an_error(content: Any, is_error: bool, said: str) -> None:
    """Case 7 and 5.1."""
    answer = result("t1", content, is_error=is_error)
    written = a_to_c(a_body(user("q"), assistant([use("t1")]), user([answer])))
    assert written["messages"][2] == {"role": "tool", "tool_call_id": "t1", "content": said}


def test_a_document_beside_a_result_becomes_a_file() -> None:
    """Case 12: how Claude Code reads a PDF."""
    content = [result("t1", "PDF file read"), {"type": "document", "source": PDF}]
    body = a_body(user("q"), assistant([use("t1")]), user(content))
    file = {"filename": "document.pdf", "file_data": "data:application/pdf;base64,JVBE"}
    assert a_to_c(body)["messages"][3] == user([{"type": "file", "file": file}])
    with pytest.raises(UnsupportedFeature, match=r"^messages\.2\.content\.1: ") as caught:
        a_to_c(body, Model("gpt", "copilot", files=False))
    assert caught.value.param == "messages.2.content.1"


def test_a_tool_reference_is_words_and_its_tool_is_sent() -> None:
    """Case 13."""
    reference = [{"type": "tool_reference", "tool_name": "X"}]
    tool = {"name": "X", "input_schema": {"type": "object"}, "defer_loading": True}
    messages = [user("q"), assistant([use("t1", "search")]), user([result("t1", reference)])]
    written = a_to_c(a_body(*messages, tools=[tool]))
    assert written["messages"][2]["content"] == "Tool available: X"
    assert written["tools"][0]["function"]["name"] == "X"
    assert "defer_loading" not in json.dumps(written)


@pytest.mark.parametrize(
    ("asked", "listed", "effort"),
    [
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "lmh", "high"),
        ({"thinking": {"type": "adaptive"}}, "lmh", None),
        ({}, "lmh", None),
        ({"thinking": {"type": "disabled"}}, "nlmh", "none"),
        ({"thinking": {"type": "disabled"}}, "lmh", "low"),
        ({"output_config": {"effort": "low"}}, "lmh", "low"),
        ({"output_config": {"effort": "low"}}, "", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, "lmh", "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "lmh", "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "lmh", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "lmh", None),
        ({"thinking": {"type": "between_tools"}}, "lmh", None),
    ],
)
def test_thinking_becomes_an_effort_that_is_listed(
    asked: Json, listed: str, effort: str | None
) -> None:
    """Case 14 and 5.5."""
    names = {"n": "none", "l": "low", "m": "medium", "h": "high"}
    model = Model("gpt-5", "copilot", efforts=tuple(names[letter] for letter in listed))
    sent = sanitize_body("chat", a_to_c(a_body(**asked), model), model, {}, True)
    assert sent.body.get("reasoning_effort") == effort
    is_dropped = effort is None and asked.get("output_config", {}).get("effort") == "low"
    assert ("reasoning_effort" in sent.dropped) is is_dropped


def test_a_hosted_tool_beside_others_is_dropped_by_name() -> None:
    """Case 17."""
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    body = a_body(tools=[hosted, {"name": "f", "input_schema": {}}])
    assert [tool["function"]["name"] for tool in a_to_c(body)["tools"]] == ["f"]
    assert dropped(body) == ["tools.web_search"]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {
            "tools": [
                {"type": "web_search_20250305", "name": "web_search"},
                {"name": "f", "input_schema": {}},
            ],
            "tool_choice": {"type": "tool", "name": "web_search"},
        },
    ],
)
def test_a_hosted_tool_alone_or_forced_is_refused(more: Json) -> None:
    """Case 17 and 1.4: the text becomes the tool's error in Claude Code."""
    assert "web_search is not available" in str(refused("messages", a_body(**more)))


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, None, None),
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        (
            {"type": "tool", "name": "f"},
            {"type": "function", "function": {"name": "f"}},
            None,
        ),
        ({"type": "auto", "disable_parallel_tool_use": False}, "auto", None),
    ],
)
def test_a_tool_choice_has_its_word_in_chat(choice: Any, expected: Any, parallel: Any) -> None:
    """Case 18 and 1.4."""
    more = {"tool_choice": choice} if choice else {}
    written = a_to_c(a_body(tools=[{"name": "f", "input_schema": {}}], **more))
    assert written.get("tool_choice") == expected
    assert written.get("parallel_tool_calls") == parallel


def test_the_user_id_becomes_a_cache_key_only() -> None:
    """Case 19: OpenAI's `user` takes 64 characters, and it names the device."""
    session = "0f8fad5b-d9cb-469f-a165-70867728950e"
    user_id = json.dumps({"device_id": "d" * 64, "account_uuid": "", "session_id": session})
    written = a_to_c(a_body(metadata={"user_id": user_id}))
    assert written["prompt_cache_key"] == hashlib.sha256(session.encode()).hexdigest()[:32]
    assert "user" not in written and "d" * 64 not in json.dumps(written)


def test_user_text_blocks_stay_parts() -> None:
    """5.1: joining changes the tokens between turns."""
    written = a_to_c(a_body(user([text("a"), text("b")])))
    assert written["messages"] == [user([text("a"), text("b")])]


def test_thinking_of_the_history_is_not_shown_as_words() -> None:
    """5.1: nor is a vendor's signature."""
    thinking = {"type": "thinking", "thinking": "hm", "signature": "EqQB"}
    redacted = {"type": "redacted_thinking", "data": "RRR"}
    written = a_to_c(a_body(user("a"), assistant([thinking, redacted, text("T")]), user("b")))
    assert written["messages"][1] == assistant("T")


def test_copilots_reasoning_comes_back_out_of_its_envelope() -> None:
    """4.5: what an Anthropic client echoes goes back to the chat upstream byte for byte."""
    signed = {"type": "thinking", "thinking": "hm", "signature": "gw1.c.B=="}
    written = a_to_c(a_body(user("a"), assistant([signed, text("T")]), user("b")))
    assert written["messages"][1]["reasoning_opaque"] == "B=="
    assert written["messages"][1]["reasoning_text"] == "hm"


def test_client_tools_of_the_vendor_get_their_schema() -> None:
    """1.4: bash and its like come without one."""
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "e"},
    ]
    written = a_to_c(a_body(tools=tools))["tools"]
    assert "command" in written[0]["function"]["parameters"]["properties"]
    assert written[1]["function"]["parameters"]["required"] == ["command", "path"]


def test_a_schema_loses_its_dialect_mark_and_keeps_its_definitions() -> None:
    """1.4: Claude Code sends `$schema`."""
    schema = {
        "$schema": "x",
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/b"}},
        "$defs": {},
    }
    written = a_to_c(a_body(tools=[{"name": "f", "input_schema": schema}]))
    parameters = written["tools"][0]["function"]["parameters"]
    assert "$schema" not in parameters and "$defs" in parameters


@pytest.mark.parametrize("prefill", ["{", [text("{")]])
def test_a_prefill_is_refused(prefill: Any) -> None:
    """5.1."""
    chat = MESSAGES.read_request(a_body(user("a"), assistant(prefill)))
    with pytest.raises(InvalidRequest) as caught:
        CHAT.write_request(chat, GPT)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "body",
    [
        a_body(mcp_servers=[{"url": "x"}]),
        a_body(container={"id": "x"}),
        a_body(user([{"type": "container_upload", "file_id": "f"}])),
        a_body(user([{"type": "image", "source": {"type": "file", "file_id": "f"}}])),
        a_body(user([{"type": "image", "source": {"type": "url", "url": "http://h/a.png"}}])),
        a_body(user([{"type": "image", "source": {**IMAGE, "media_type": "image/bmp"}}])),
        a_body(user([{"type": "document", "source": {"type": "url", "url": "https://h/a.pdf"}}])),
        a_body(user([{"type": "document", "source": {"type": "file", "file_id": "f"}}])),
        a_body(user([{"type": "hologram", "data": "x"}])),
    ],
)
def test_what_cannot_be_carried_over_is_refused(body: Json) -> None:
    """5.7."""
    assert refused("messages", body).kind == "invalid_request"


def test_tools_whose_names_become_one_are_told_apart_in_calls_and_in_their_history() -> None:
    """2.3: the same names in the next request, whatever was called."""
    tools: list[Json] = [{"name": name, "input_schema": {}} for name in ("a.b", "a_b")]
    calls = [{"type": "tool_use", "id": f"t{n}", "name": tool["name"], "input": {}}
             for n, tool in enumerate(tools)]  # fmt: skip
    written = a_to_c(a_body(user("x"), assistant(calls), tools=tools))
    names = [tool["function"]["name"] for tool in written["tools"]]
    assert names == ["a_b_2e7336dc", "a_b"]
    called = [call["function"]["name"] for call in written["messages"][1]["tool_calls"]]
    assert called == names


def test_an_unknown_block_with_text_is_kept_as_text() -> None:
    """1.3."""
    written = a_to_c(a_body(user([{"type": "hologram", "text": "see"}])))
    assert written["messages"] == [user("see")]


def test_unknown_fields_are_dropped_by_name_and_silent_ones_in_silence() -> None:
    """5.7: never a 400."""
    more = {"context_management": {"edits": []}, "speed": "fast", "metadata": {"user_id": "u"}}
    body = a_body(**more, cache_control={"type": "ephemeral"}, top_k=5)
    assert "context_management" in dropped(body) and "speed" in dropped(body)
    assert "metadata" not in dropped(body) and "cache_control" not in dropped(body)
    chat = MESSAGES.read_request(body)
    CHAT.write_request(chat, GPT)
    assert "top_k" in chat.dropped


def test_unknown_fields_of_a_chat_body_are_dropped_by_name() -> None:
    """As in the other dialects; what asks for nothing is not named."""
    more = {"seed": 1, "speed": "fast", "enable_thinking": False, "metadata": {"a": "b"}}
    assert CHAT.read_request({"model": "m", "messages": [user("a")], **more}).dropped == [
        "seed",
        "speed",
        "metadata",
    ]


def test_a_closed_schema_for_the_answer_is_strict() -> None:
    """1.2."""
    for closed in (True, False):
        schema = {"type": "object", "additionalProperties": not closed}
        body = a_body(output_config={"format": {"type": "json_schema", "schema": schema}})
        wanted = {"name": "structured_output", "schema": schema, "strict": closed}
        assert a_to_c(body)["response_format"] == {"type": "json_schema", "json_schema": wanted}


def test_a_search_result_and_a_hosted_pair_become_words() -> None:
    """1.3: never half a pair."""
    found = {"type": "search_result", "source": "S", "title": "T", "content": [text("B")]}
    hosted = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    row = {"type": "web_search_result", "title": "Title", "url": "https://u"}
    answer = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [row]}
    body = a_body(user([found]), assistant([hosted, answer, text("done")]), user("go"))
    messages = a_to_c(body)["messages"]
    assert messages[0] == user("T\nS\nB")
    for words in ("q", "Title", "https://u", "done"):
        assert words in messages[1]["content"]
    assert "tool_calls" not in messages[1]


# ---- C>A ---------------------------------------------------------------------------------------


def test_developer_is_system_and_late_system_is_a_reminder() -> None:
    """Case 21."""
    late = {"role": "system", "content": "L"}
    first = {"role": "developer", "content": "D"}
    written = c_to_a(c_body(first, user("a"), assistant("b"), late, user("c")))
    assert written["system"] == [text("D")]
    assert written["messages"] == [
        user([text("a")]),
        assistant([text("b")]),
        user([text("<system-reminder>\nL\n</system-reminder>"), text("c")]),
    ]


def test_tool_messages_become_one_user_message() -> None:
    """Case 22."""
    written = c_to_a(
        c_body(
            user("q"),
            assistant(None, tool_calls=[function_call("c1"), function_call("c2")]),
            {"role": "tool", "tool_call_id": "c2", "content": "2"},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            user("x"),
        )
    )
    assert written["messages"][2] == user([result("c1", "1"), result("c2", "2"), text("x")])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a":', {"_raw": '{"a":'}),
        ("", {}),
        ("[1]", {"_raw": "[1]"}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
        ('{"b":1,"a":2}', {"b": 1, "a": 2}),
    ],
)
def test_bad_arguments_are_kept_and_good_ones_are_read(arguments: Any, value: Json) -> None:
    """Case 23 and 2.3."""
    calls = [function_call("c1", arguments)]
    written = c_to_a(c_body(user("q"), assistant("", tool_calls=calls)))
    assert written["messages"][1]["content"] == [
        {"type": "tool_use", "id": "c1", "name": "f", "input": value}
    ]


@pytest.mark.parametrize("call", ["call|abc+/", "x" * 90])
def test_odd_ids_are_the_same_in_call_and_result(call: str) -> None:
    """Case 24, in both directions."""
    expected = "call_" + hashlib.sha256(call.encode()).hexdigest()[:24]
    tool = {"role": "tool", "tool_call_id": call, "content": "r"}
    messages = c_to_a(c_body(user("q"), assistant(None, tool_calls=[function_call(call)]), tool))[
        "messages"
    ]
    assert messages[1]["content"][0]["id"] == expected
    assert messages[2]["content"][0]["tool_use_id"] == expected
    messages = a_to_c(a_body(user("q"), assistant([use(call)]), user([result(call, "r")])))[
        "messages"
    ]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == expected


def test_anthropic_shapes_are_read_in_a_chat_body() -> None:
    """Case 25: Cursor and Zed send them."""
    written = c_to_a(
        c_body(
            user("q"),
            assistant([text("T"), use("t1", a=1)]),
            user([result("t1", "ok"), {"type": "image", "source": IMAGE}]),
            tools=[{"name": "f", "input_schema": {"type": "object"}}],
        )
    )
    assert written["messages"][1] == assistant([text("T"), use("t1", a=1)])
    assert written["messages"][2] == user([result("t1", "ok"), {"type": "image", "source": IMAGE}])
    assert written["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]


def test_a_tool_without_parameters_gets_an_object_schema() -> None:
    """Case 26; flat tools of the Responses API are read as well."""
    empty = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
    for tool in (
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "f"},
    ):
        assert c_to_a(c_body(tools=[tool]))["tools"] == [empty]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [user(5)]}, "messages.0.content"),
        ({"messages": [user([5])]}, "messages.0.content.0"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"tools": [5]}, "tools.0"),
    ],
)
def test_a_bad_chat_field_is_named(more: Json, param: str) -> None:
    """Case 27 and 4.3: `param` is the path of the field at fault."""
    error = refused("chat", {**c_body(), **more})
    assert error.param == param
    assert str(error).startswith(param)


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 1, "user": "u"},
        {"n": 1, "logit_bias": {}, "logprobs": False, "frequency_penalty": 0},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low"},
        {"stream_options": {"include_usage": True}, "frobnicate": 1},
        dict.fromkeys(["temperature", "top_p", "stop", "tools", "tool_choice", "max_tokens", "n"]),
    ],
)
def test_what_can_be_left_out_is_never_refused(more: Json) -> None:
    """Case 27 and 5.7; null stands for absent."""
    assert c_to_a(c_body(**more))["messages"] == [user([text("hi")])]


def test_a_temperature_above_one_is_one() -> None:
    """Case 27."""
    assert c_to_a(c_body(temperature=1.7))["temperature"] == 1
    assert c_to_a(c_body(temperature=0.2))["temperature"] == 0.2


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        ({}, 32000),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_tokens": 999_999}, 64000),
    ],
)
def test_a_limit_on_the_answer_is_always_there(more: Json, limit: int) -> None:
    """2.2: Anthropic requires one; clamped to the model's."""
    assert c_to_a(c_body(**more))["max_tokens"] == limit


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", {"type": "none"}),
        ("auto", {"type": "auto"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
        ({"type": "function", "name": "f"}, {"type": "tool", "name": "f"}),
    ],
)
@pytest.mark.parametrize("parallel", [None, True, False])
def test_a_chat_tool_choice_has_its_word_in_messages(
    choice: Any, expected: Json, parallel: bool | None
) -> None:
    """2.4: `none` takes no say on parallel calls."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    written = c_to_a(c_body(tools=tools, tool_choice=choice, parallel_tool_calls=parallel))
    alone = parallel is False and choice != "none"
    more = {"disable_parallel_tool_use": True} if alone else {}
    assert written["tool_choice"] == {**expected, **more}


def test_one_call_at_a_time_without_a_choice_makes_one() -> None:
    """2.4: `{type: auto}` if absent."""
    written = c_to_a(c_body(tools=[{"name": "f"}], parallel_tool_calls=False))
    assert written["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


def test_allowed_tools_filter_the_list() -> None:
    """2.4."""
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    allowed = {"mode": "required", "tools": [tools[1]]}
    written = c_to_a(
        c_body(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    )
    assert [tool["name"] for tool in written["tools"]] == ["g"]
    assert written["tool_choice"] == {"type": "any"}


def test_functions_of_2023_are_tools() -> None:
    """2.2 and 2.3: a result is paired by its place, as it has no id."""
    asked = {"name": "f", "arguments": "{}"}
    messages = [
        user("q"),
        assistant(None, function_call=asked),
        {"role": "function", "name": "f", "content": "r"},
    ]
    written = c_to_a(
        c_body(*messages, functions=[{"name": "f", "parameters": {}}], function_call="auto")
    )
    call = written["messages"][1]["content"][0]
    assert written["messages"][2]["content"] == [result(call["id"], "r")]
    assert written["tools"][0]["name"] == "f" and written["tool_choice"] == {"type": "auto"}


def test_names_are_written_only_where_they_tell_speakers_apart() -> None:
    """2.3."""
    two = [{**user("a"), "name": "Ann"}, assistant("x"), {**user("b"), "name": "Bob"}]
    one = [{**user("a"), "name": "Ann"}]
    assert c_to_a(c_body(*two))["messages"][0] == user([text("Ann: a")])
    assert c_to_a(c_body(*one))["messages"][0] == user([text("a")])


@pytest.mark.parametrize(
    ("part", "block"),
    [
        (
            {
                "type": "image_url",
                "image_url": {"url": "data:image/jpeg;base64,iVBORw0KGgo", "detail": "high"},
            },
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo"},
            },
        ),
        (
            {"type": "image_url", "image_url": "https://h/a.png"},
            {"type": "image", "source": {"type": "url", "url": "https://h/a.png"}},
        ),
        (
            {
                "type": "file",
                "file": {"file_data": "data:application/pdf;base64,JVBE", "filename": "a.pdf"},
            },
            {"type": "document", "source": PDF, "title": "a.pdf"},
        ),
        ({"type": "input_text", "text": "x"}, text("x")),
        ({"type": "refusal", "refusal": "no"}, text("no")),
    ],
)
def test_parts_become_blocks(part: Json, block: Json) -> None:
    """2.3: the real media type, not the claimed one."""
    assert c_to_a(c_body(user([part])))["messages"][0]["content"] == [block]


def test_a_text_file_becomes_a_text_document() -> None:
    """2.3."""
    file = {"file_data": "data:text/plain;base64,w6k=", "filename": "a.txt"}
    written = c_to_a(c_body(user([{"type": "file", "file": file}])))
    source = {"type": "text", "media_type": "text/plain", "data": "é"}
    assert written["messages"][0]["content"][0]["source"] == source


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "file", "file": {"file_data": "data:application/zip;base64,AA=="}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,!!!"}},
        {"type": "image_url", "image_url": {"url": "http://h/a.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url"},
        {"type": "text"},
        {"type": "text", "text": 5},
        {"type": ["text"], "data": 1},
        {"type": "unknown"},
        {},
    ],
)
def test_parts_that_cannot_be_sent_are_a_400(part: Json) -> None:
    """5.2: nothing is fetched, nothing is guessed, nothing crashes."""
    assert str(refused("chat", c_body(user([part])))).startswith("messages.0.content.0")


def test_reasoning_without_a_signature_is_not_sent_to_anthropic() -> None:
    """5.2: unsigned thinking is refused there."""
    written = c_to_a(c_body(user("q"), assistant("T", reasoning_content="hm"), user("x")))
    assert written["messages"][1] == assistant([text("T")])


def test_a_missing_result_is_filled_in_and_an_orphan_is_words() -> None:
    """5.2 and 1.5."""
    calls = [function_call("c1")]
    written = c_to_a(c_body(user("q"), assistant(None, tool_calls=calls), user("x")))
    filled = result("c1", "[no result: call interrupted]", is_error=True)
    assert written["messages"][2]["content"] == [filled, text("x")]
    orphan = {"role": "tool", "tool_call_id": "zz", "content": "r"}
    assert "r" in json.dumps(c_to_a(c_body(user("q"), orphan))["messages"])


def test_images_of_a_tool_message_stay_in_its_result() -> None:
    """5.2."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    tool = {"role": "tool", "tool_call_id": "c1", "content": [text("see"), image]}
    written = c_to_a(c_body(user("q"), assistant(None, tool_calls=[function_call("c1")]), tool))
    content = [text("see"), {"type": "image", "source": IMAGE}]
    assert written["messages"][2]["content"] == [result("c1", content)]


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_structured_output_is_written_for_the_rules(kind: str) -> None:
    """Whether a model takes the field is their business."""
    schema = {"name": "s", "schema": {"type": "object"}}
    written = c_to_a(c_body(response_format={"type": kind, "json_schema": schema}))
    wanted = {"type": kind, **({"schema": schema["schema"]} if kind == "json_schema" else {})}
    assert written["output_config"]["format"] == wanted


@pytest.mark.parametrize(
    ("model", "effort", "thinking"),
    [
        (CLAUDE, "high", {"type": "enabled", "budget_tokens": 24000}),
        (CLAUDE, "none", None),
        (CLAUDE, None, None),
        (NEW_CLAUDE, "high", {"type": "adaptive", "display": "summarized"}),
        (NEW_CLAUDE, "none", {"type": "disabled"}),
        (Model("claude-x", "copilot", ("messages",)), "high", None),
    ],
)
def test_an_effort_becomes_thinking_as_the_model_takes_it(
    model: Model, effort: str | None, thinking: Json | None
) -> None:
    """5.5."""
    written = c_to_a(c_body(reasoning_effort=effort, max_tokens=30000), model)
    assert written.get("thinking") == thinking
    levels = {"effort": "high"} if model.adaptive and effort == "high" else None
    assert written.get("output_config") == levels


def test_a_forced_tool_excludes_thinking() -> None:
    """5.2: the choice is kept."""
    written = c_to_a(c_body(tools=[{"name": "f"}], tool_choice="required", reasoning_effort="high"))
    assert written["tool_choice"] == {"type": "any"} and "thinking" not in written


def test_sampling_is_left_out_beside_thinking() -> None:
    """1.5: temperature other than 1 is refused with it."""
    more = {"temperature": 0.2, "top_p": 0.5, "top_k": 5, "reasoning_effort": "high"}
    written = c_to_a(c_body(**more, max_tokens=30000))
    assert "thinking" in written
    sent = sanitize_body("messages", written, CLAUDE, {}, True)
    assert not {"temperature", "top_p", "top_k"} & sent.body.keys()
    assert {"temperature", "top_p", "top_k"} <= set(sent.dropped)


@pytest.mark.parametrize("dialect", ["chat", "messages"])
def test_one_of_temperature_and_top_p_goes_up_and_the_other_is_named(dialect: str) -> None:
    """1.5: Claude takes one of them."""
    more = {"temperature": 0.2, "top_p": 0.5}
    body = c_to_a(c_body(**more)) if dialect == "chat" else a_body(**more)
    sent = sanitize_body("messages", body, CLAUDE, {}, True)
    assert sent.body["temperature"] == 0.2 and "top_p" not in sent.body
    assert sent.dropped == ["top_p"]


def test_thinking_is_left_out_where_the_last_calls_have_none() -> None:
    """1.5: manual thinking wants the trailing tool turn to begin with a signed block."""
    calls = [function_call("c1")]
    tool = {"role": "tool", "tool_call_id": "c1", "content": "r"}
    messages = [user("q"), assistant("T", tool_calls=calls), tool]
    written = c_to_a(c_body(*messages, reasoning_effort="high", max_tokens=30000))
    assert "thinking" not in written


def test_a_long_tool_name_is_the_same_in_tools_choice_and_history() -> None:
    """5.0."""
    name = "mcp__server.with.dots__" + "x" * 60
    calls = [function_call("c1", name=name)]
    choice = {"type": "function", "function": {"name": name}}
    tools = [{"type": "function", "function": {"name": name}}]
    written = c_to_a(
        c_body(user("q"), assistant(None, tool_calls=calls), tools=tools, tool_choice=choice)
    )
    short = written["tools"][0]["name"]
    assert len(short) <= 64 and written["tool_choice"]["name"] == short
    assert written["messages"][1]["content"][0]["name"] == short


def test_empty_messages_are_left_out() -> None:
    """2.3 and 1.5."""
    written = c_to_a(c_body(user("a"), assistant(""), assistant(None), user(" "), user("b")))
    assert written["messages"] == [user([text("a"), text("b")])]


@pytest.mark.parametrize("blank", ["", " ", [], None, [text("")]])
@pytest.mark.parametrize(("dialect", "model"), [("chat", CLAUDE), ("messages", GPT)])
def test_a_request_that_says_nothing_is_refused(dialect: str, model: Model, blank: Any) -> None:
    """1.5: an empty list of messages is a 400 upstream: better ours, with a name."""
    body = c_body(user(blank)) if dialect == "chat" else a_body(user(blank))
    with pytest.raises(InvalidRequest, match=r"^messages: "):
        OTHER[dialect].write_request(DIALECTS[dialect].read_request(body), model)


# ---- A>A: Copilot's own messages endpoint ------------------------------------------------------


def test_a_system_turn_becomes_a_reminder_on_older_models() -> None:
    """Case 3."""
    body = a_body(user("a"), {"role": "system", "content": "R"})
    reminder = "<system-reminder>\nR\n</system-reminder>"
    assert a_to_a(body)["messages"] == [user([text("a"), text(reminder)])]
    assert a_to_a(body, NEW_CLAUDE)["messages"] == body["messages"]


def test_foreign_thinking_is_left_out() -> None:
    """Case 10; the vendor's own stays byte for byte."""
    foreign = {"type": "thinking", "thinking": "x", "signature": "gw1.r.abc"}
    own = {"type": "thinking", "thinking": "x ", "signature": "EqQB"}
    unsigned = {"type": "thinking", "thinking": "x", "signature": ""}
    body = a_body(user("a"), assistant([foreign, unsigned, own, text("T")]), user("b"))
    assert a_to_a(body)["messages"][1] == assistant([own, text("T")])


def test_an_unanswered_call_gets_a_result() -> None:
    """Case 11."""
    body = a_body(user("a"), assistant([use("t1")]), user("b"))
    filled = result("t1", "[no result: call interrupted]", is_error=True)
    content = a_to_a(body)["messages"][2]["content"]
    assert content[0] == filled and content[1] == text("b")


@pytest.mark.parametrize(
    ("max_tokens", "budget", "expected"),
    [(31999, -1, None), (1000, 5000, None), (4000, 5000, 3999), (31999, 10, MIN_THINKING_BUDGET)],
)
def test_a_bad_budget_is_mended_or_left_out(
    max_tokens: int, budget: int, expected: int | None
) -> None:
    """Case 15 and 1.5."""
    thinking = {"type": "enabled", "budget_tokens": budget}
    scrubbed = a_to_a({**a_body(thinking=thinking), "max_tokens": max_tokens})
    assert scrubbed.get("thinking", {}).get("budget_tokens") == expected


def test_a_forced_tool_excludes_thinking_natively() -> None:
    """Case 16."""
    thinking = {"type": "enabled", "budget_tokens": 2000}
    choice = {"type": "tool", "name": "f"}
    body = a_body(tools=[{"name": "f", "input_schema": {}}], tool_choice=choice, thinking=thinking)
    scrubbed = a_to_a({**body, "max_tokens": 8000})
    assert scrubbed["tool_choice"] == choice and "thinking" not in scrubbed


def test_a_field_that_was_refused_once_is_left_out_from_then_on() -> None:
    """Case 20."""
    tool = {"name": "f", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    body = a_body(tools=[tool])
    message = "tools.0.custom.cache_control: Extra inputs are not permitted"
    sent = a_to_a(body)
    assert "cache_control" in sent["tools"][0]
    refusal = (400, Headers(), json.dumps({"error": {"message": message}}).encode(), CLAUDE)
    verdict = classify_copilot_error(*refusal, sent, {}, 0.0)
    assert verdict.action == "repair"
    lessons = {kind: [name] for kind, name in verdict.rejections}
    sent = a_to_a(body, lessons=lessons)
    assert "cache_control" not in sent["tools"][0]
    assert classify_copilot_error(*refusal, sent, lessons, 0.0).action != "repair"


def test_eager_input_streaming_is_never_sent() -> None:
    """Case 20: the field that taught it."""
    tool = {"name": "f", "input_schema": {"type": "object"}, "eager_input_streaming": True}
    assert "eager_input_streaming" not in json.dumps(a_to_a(a_body(tools=[tool])))


# ---- what routing needs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "initiator"),
    [
        ([user("a")], "user"),
        ([user([text("a")])], "user"),
        ([user("a"), assistant([use("t")]), user([result("t", "r")])], "agent"),
        ([user("a"), assistant([use("t")]), user([result("t", "r"), text("and b")])], "user"),
        (
            [
                user("a"),
                assistant([use("t")]),
                user([result("t", "r"), text("<system-reminder>\nx\n</system-reminder>")]),
            ],
            "agent",
        ),
        ([user("a"), assistant([use("t")]), user([result("t", "r"), text(" ")])], "agent"),
        ([user("a"), assistant([use("t")]), user([result("t", "r")]), user([text("")])], "agent"),
        ([user("a"), {"role": "system", "content": "s"}], "user"),
        ([user("a"), assistant("b")], "agent"),
    ],
)
def test_who_spoke_last_in_messages(messages: list[Json], initiator: str) -> None:
    """X-Initiator: a person's turn is billed, a tool loop is not."""
    assert MESSAGES.request_info(a_body(*messages)).initiator == initiator


@pytest.mark.parametrize(
    ("last", "initiator"),
    [("user", "user"), ("tool", "agent"), ("assistant", "agent"), ("function", "agent")],
)
def test_who_spoke_last_in_chat(last: str, initiator: str) -> None:
    """The same for OpenAI's roles."""
    assert (
        CHAT.request_info(c_body(user("a"), {"role": last, "content": "x"})).initiator == initiator
    )
    blank = user([text("")])  # does not go up
    rows = [user("a"), {"role": last, "content": "x"}, blank]
    assert CHAT.request_info(c_body(*rows)).initiator == initiator


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": [1]}, {"messages": [user("a")]}, {"messages": {}}]
)
@pytest.mark.parametrize("dialect", ("chat", "messages"))
def test_an_outline_of_a_bad_body_is_a_400(dialect: str, body: Json) -> None:
    """It is the first look at what a caller sent."""
    with pytest.raises(InvalidRequest):
        DIALECTS[dialect].request_info(body)


def test_the_opening_is_the_same_in_every_request_of_one_conversation() -> None:
    """The billing line changes per request and may not count."""
    openings = set()
    for number in range(3):
        billing = text(f"x-anthropic-billing-header: cch={number};")
        messages = [user("first"), assistant("x"), user(f"later {number}")]
        openings.add(MESSAGES.request_info(a_body(*messages, system=[billing, text("S")])).opening)
    assert len(openings) == 1


# ---- hostile bodies ----------------------------------------------------------------------------

FULL_A = a_body(
    user([text("a"), {"type": "image", "source": IMAGE}, {"type": "document", "source": PDF}]),
    assistant([{"type": "thinking", "thinking": "x", "signature": "s"}, text("b"), use("t", a=1)]),
    user([result("t", [text("r")], is_error=True), text("c")]),
    {"role": "system", "content": "s"},
    system=[text("S")],
    tools=[{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}],
    tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    thinking={"type": "enabled", "budget_tokens": 2000},
    output_config={
        "effort": "low",
        "format": {"type": "json_schema", "schema": {"type": "object"}},
    },
    metadata={"user_id": "{}"},
    stop_sequences=["x"],
    temperature=0.5,
)
FULL_C = c_body(
    {"role": "developer", "content": [text("D")]},
    {
        **user(
            [text("a"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        ),
        "name": "n",
    },
    assistant("b", tool_calls=[function_call("c", '{"a":1}')], reasoning_content="r", refusal="no"),
    {"role": "tool", "tool_call_id": "c", "content": [text("r")]},
    tools=[
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object"}, "strict": True},
        }
    ],
    tool_choice={"type": "function", "function": {"name": "f"}},
    response_format={
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "object"}},
    },
    stream_options={"include_usage": True},
    reasoning={"effort": "low"},
    thinking={"type": "enabled", "budget_tokens": 5},
    stop=["x"],
    user="u",
)
STRANGE: list[Any] = [None, "", "x", 0, -1, 7, True, 1.5, [], {}, [None], {"a": 1}, [[]], "\ud83d"]


def replaced(value: Any) -> list[tuple[str, Any]]:
    """(where and what, copy) of every JSON value with one strange value at one place."""
    found: list[tuple[str, Any]] = []
    if isinstance(value, (dict, list)):
        pairs: list[tuple[Any, Any]] = (
            list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        )
        for key, item in pairs:
            for where, inner in [(repr(s), s) for s in STRANGE] + replaced(item):
                changed = copy.copy(value)
                changed[key] = inner
                found.append((f"{key}.{where}", changed))
    return found


@pytest.mark.parametrize(("dialect", "body"), [("messages", FULL_A), ("chat", FULL_C)])
def test_no_strange_value_in_a_body_is_more_than_a_400(dialect: str, body: Json) -> None:
    """Whatever stands at any path: a request upstream or an ApiError, never a crash."""
    broken = set()
    other = OTHER[dialect]
    assert isinstance(DIALECTS[dialect].read_request(copy.deepcopy(body)), Conversation)
    for where, changed in replaced(body):
        for step in ("outline", "image", "read"):
            try:
                if step == "read":
                    chat = DIALECTS[dialect].read_request(copy.deepcopy(changed))
                    for model in (GPT, NEW_CLAUDE):
                        json.dumps(other.write_request(copy.deepcopy(chat), model))
                elif step == "outline":
                    DIALECTS[dialect].request_info(copy.deepcopy(changed))
                else:
                    DIALECTS[dialect].request_info(copy.deepcopy(changed))
                    has_image(copy.deepcopy([*changed.values()]))
            except ApiError:
                pass
            except Exception as error:  # noqa: BLE001 - each kind is told with its path
                broken.add(f"{step} {where}: {type(error).__name__}: {error}")
    assert not broken, "\n".join(sorted(broken))


@pytest.mark.parametrize(("dialect", "body"), [("messages", FULL_A), ("chat", FULL_C)])
def test_no_strange_value_in_a_native_body_is_more_than_a_400(dialect: str, body: Json) -> None:
    """The same for bodies that are scrubbed, not converted."""
    broken = set()
    for where, changed in replaced(body):
        for model in (GPT, CLAUDE, NEW_CLAUDE):
            try:
                DIALECTS[dialect].request_info(copy.deepcopy(changed))
                scrubbed = sanitize_body(dialect, copy.deepcopy(changed), model, {}, True)
                json.dumps(scrubbed.body)
            except ApiError:
                pass
            except Exception as error:  # noqa: BLE001 - each kind is told with its path
                broken.add(f"{where}: {type(error).__name__}: {error}")
    assert not broken, "\n".join(sorted(broken))


# ---- cost --------------------------------------------------------------------------------------


def many_calls(dialect: str, ids: list[str]) -> Json:
    """A body with calls under `ids`, and their results in the opposite order."""
    names = [(call, f"f{at}") for at, call in enumerate(ids)]
    if dialect == "chat":
        calls = [function_call(call, name=name) for call, name in names]
        results = [{"role": "tool", "tool_call_id": call, "content": "r"} for call in ids[::-1]]
        return c_body(user("u"), assistant(None, tool_calls=calls), *results)
    if dialect == "messages":
        uses = [use(call, name) for call, name in names]
        return a_body(user("u"), assistant(uses), user([result(call, "r") for call in ids[::-1]]))
    more = {"type": "function_call", "arguments": "{}"}
    said = [{**more, "call_id": call, "name": name} for call, name in names]
    outputs = [{"type": "function_call_output", "call_id": c, "output": "r"} for c in ids[::-1]]
    between = [row for output in outputs for row in (assistant("between"), output)]
    return {"model": "m", "input": [*said, *between]}


@pytest.mark.parametrize("ids", ["c{0}", "c", "{1}c{0}"])
@pytest.mark.parametrize("upstream", ["chat", "messages", "responses", "kiro"])
@pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
def test_eight_times_the_calls_cost_some_eight_times_as_much(
    dialect: str, upstream: str, ids: str
) -> None:
    """With ids of their own, with one id for all, with ids that are alike where they are cut."""
    asked, spoken = DIALECTS[dialect], UPSTREAM_DIALECTS[upstream]

    def work(count: int) -> Callable[[], object]:
        body = many_calls(dialect, [ids.format(at // 2, "p" * 60) for at in range(count)])
        if asked is spoken:
            return lambda: sanitize_body(upstream, body, GPT, {}, True)
        return lambda: spoken.write_request(asked.read_request(body), CLAUDE)

    assert growth(work, 250) < 24  # 64 where each call is compared with each


@pytest.mark.parametrize(("dialect", "key"), [("chat", "stop"), ("messages", "stop_sequences")])
def test_stop_strings_are_bounded_together(dialect: str, key: str) -> None:
    """Each is looked for in every piece of an answer."""
    body = c_body() if dialect == "chat" else a_body()
    read = DIALECTS[dialect].read_request
    assert read({**body, key: ["ab"] * 4096}).stop
    for stops in (["ab"] * 4096 + ["c"], ["a" * 8193]):
        with pytest.raises(InvalidRequest, match=f"^{key}: "):
            read({**body, key: stops})


def test_inlined_definitions_stay_a_small_multiple_of_their_schema() -> None:
    """Each names the next one twice; a chain of them ends before it is too deep to be written."""
    for names, count in (("ab", 40), ("a", 3000)):
        definitions = {
            f"d{at}": {"properties": {name: {"$ref": f"d{at + 1}"} for name in names}}
            for at in range(count)
        }
        schema = {"$defs": definitions, "properties": {"p": {"$ref": "d0"}}}
        for fitted in (adapt_schema(schema, "Google"), adapt_schema(schema, "kiro")):
            assert len(dump_json(fitted)) < 20 * len(dump_json(schema))
            assert fitted["properties"]["p"]["properties"]["a"]["properties"]
