"""Section 8.4, requests: both dialects read, Kiro's conversation state written.

What is written is held against the imitation's own rules (`kiro_rules.py`) as it would go over the
wire. The numbers of cases are those of the project's sheet of wire formats; those of traps and of
sections 4.x are of its sheet about Kiro. A is Anthropic messages, C is OpenAI chat, K is Kiro.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from fake_kiro import default_models
from fakes import Issued
from kiro_rules import (
    Fault,
    check_fields,
    check_images,
    check_origin_and_model,
    check_reasoning,
    check_shape,
    check_tools,
    check_turns,
    current,
    read_body,
    results_of,
    schema_fault,
    tag_notes,
    tools_of,
)
from kiro_rules import check_size as check_size_upstream

import aiclient_api as gw
from aiclient_api import (
    CHAT,
    KIRO,
    KIRO_RULES,
    MESSAGES,
    Conversation,
    Dialect,
    KiroDraft,
    Model,
    Turn,
)

Json = dict[str, Any]
Rule = Callable[[KiroDraft], None]

PNG = "iVBORw0KGgo="
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0EXAMPLE").decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
SENT_IMAGE = {"format": "png", "source": {"bytes": PNG}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}
ARN = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLE"
CONVERSATION = "5d7c2f0e-8f0b-4c39-9a1e-0d1f5b1f6a11"
RUN = "0b0d3c1e-4f57-4b7e-9f0a-0a4f8f2f6a55"
ENVELOPE = gw.kiro_mark("kiro")

SONNET = "claude-sonnet-4.5"  # thinks between tags
OPUS = "claude-opus-4.8"  # thinks in fields of its own, up to `max`
NEWER_SONNET = "claude-sonnet-4.6"  # without `xhigh`
GPT = "gpt-5.6-sol"
QWEN = "qwen3-coder-next"  # reads text only
RAW = {entry["modelId"]: entry for entry in default_models()}
MODELS = gw.read_kiro_models(default_models(), "kiro")
EMPTY_SCHEMA = {"type": "object", "properties": {}}


# ---- what is asked, and what is sent -------------------------------------------------------------


def user(content: Any) -> Json:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Json:
    """An assistant message."""
    return {"role": "assistant", "content": content, **more}


def text(words: str) -> Json:
    """A text part, the same in both dialects."""
    return {"type": "text", "text": words}


def use(call: str, name: str = "f", **arguments: Any) -> Json:
    """An Anthropic call."""
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def result(call: str, content: Any = "done", **more: Any) -> Json:
    """An Anthropic result."""
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def thinking(words: str, signature: str) -> Json:
    """An Anthropic thought."""
    return {"type": "thinking", "thinking": words, "signature": signature}


def function_call(call: str, arguments: Any = "{}", name: str = "f") -> Json:
    """An OpenAI call."""
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_message(call: str, content: Any = "done") -> Json:
    """An OpenAI result."""
    return {"role": "tool", "tool_call_id": call, "content": content}


def a_tool(name: str = "f", schema: Any = None, description: str = "Does it.") -> Json:
    """An Anthropic tool."""
    return {"name": name, "description": description, "input_schema": schema or EMPTY_SCHEMA}


def c_tool(name: str = "f", schema: Any = None, description: str = "Does it.") -> Json:
    """An OpenAI tool."""
    function = {"name": name, "description": description, "parameters": schema or EMPTY_SCHEMA}
    return {"type": "function", "function": function}


def a_body(*messages: Json, **more: Any) -> Json:
    """A messages body."""
    return {"model": "m", "max_tokens": 1000, "messages": list(messages) or [user("hi")], **more}


def c_body(*messages: Json, **more: Any) -> Json:
    """A chat body."""
    return {"model": "m", "messages": list(messages) or [user("hi")], **more}


def convert(dialect: Dialect, body: Json, model: Model) -> tuple[Json, Conversation]:
    """(What Kiro is asked, the Chat after that); the caller's body must not be changed."""
    before = copy.deepcopy(body)
    chat = dialect.read_request(body)
    written = KIRO.write_request(chat, model)
    assert body == before
    return written, chat


def a_to_k(body: Json, model: str = SONNET) -> Json:
    """What Kiro is asked for a messages body: it has passed the imitation's checks."""
    written, _ = convert(MESSAGES, body, MODELS[model])
    assert faults_of(written, model) == []
    return written


def c_to_k(body: Json, model: str = SONNET) -> Json:
    """What Kiro is asked for a chat body: it has passed the imitation's checks."""
    written, _ = convert(CHAT, body, MODELS[model])
    assert faults_of(written, model) == []
    return written


def on_the_wire(written: Json, shape: str = "ide") -> bytes:
    """The bytes of a call in one of the two shapes."""
    arn = ARN if shape == "ide" else ""
    endpoint = gw.KiroEndpoint("https://runtime.us-east-1.kiro.dev", shape, arn)
    return gw.dump_json(gw.address_kiro_request(written, endpoint, CONVERSATION, RUN))


def faults_of(
    written: Json, model: str, issued: Issued | None = None, shape: str = "ide"
) -> list[str]:
    """What the service would refuse, or only dislike, about a request."""
    raw = RAW[model]
    try:
        body = read_body(on_the_wire(written, shape))
        check_shape(body, "request")
        notes = check_turns(body)
        check_origin_and_model(body, shape, [raw])
        check_tools(body)
        check_images(body, raw)
        check_fields(body, raw)
        if issued is not None:
            check_reasoning(body, issued, set())
        check_size_upstream(body, raw)
    except Fault as fault:
        return [fault.note or fault.text]
    return notes + tag_notes(body, raw)


def turns(written: Json) -> list[Json]:
    """The whole conversation, each turn without the name of its kind and of the model."""
    state = written["conversationState"]
    rows = [*state.get("history", ()), state["currentMessage"]]
    bare = []
    for row in rows:
        (message,) = row.values()
        bare.append({key: value for key, value in message.items() if key != "modelId"})
    return bare


def without_tools(turn: Json) -> Json:
    """A turn without the tools that are declared in it."""
    context = {k: v for k, v in turn.get("userInputMessageContext", {}).items() if k != "tools"}
    bare = {key: value for key, value in turn.items() if key != "userInputMessageContext"}
    return {**bare, "userInputMessageContext": context} if context else bare


def tools(written: Json) -> list[Json]:
    """The declared tools."""
    return tools_of(current(written))


def sent_result(call: str, *words: str, status: str = "success") -> Json:
    """A result in Kiro's form."""
    return {"toolUseId": call, "status": status, "content": [{"text": w} for w in words]}


def sent_results(content: str, *results: Json) -> Json:
    """A user turn with results."""
    return {"content": content, "userInputMessageContext": {"toolResults": list(results)}}


def sent_use(call: str, name: str = "f", **arguments: Any) -> Json:
    """A call in Kiro's form."""
    return {"toolUseId": call, "name": name, "input": arguments}


def refused(dialect: Dialect, body: Json, model: str = SONNET) -> gw.InvalidRequest:
    """The 400 for a body."""
    with pytest.raises(gw.InvalidRequest) as caught:
        convert(dialect, body, MODELS[model])
    assert caught.value.status == 400
    return caught.value


# ---- the rules, one by one -----------------------------------------------------------------------


def draft_of(
    *rows: Turn, model: str = SONNET, tools: list[gw.Tool] | None = None, **more: Any
) -> KiroDraft:
    """A draft as the writer begins with it."""
    chat = Conversation(turns=list(rows), tools=list(tools or ()), **more)
    preface = [words.text for words in chat.system]
    return KiroDraft(chat, MODELS[model], [*chat.turns], [*chat.tools], preface)


def said(role: str, *blocks: Any) -> Turn:
    """A turn; strings are texts."""
    return Turn(role, [gw.Text(b) if isinstance(b, str) else b for b in blocks])


def call(call_id: str, name: str = "f", arguments: str = "{}") -> gw.ToolCall:
    """A call."""
    return gw.ToolCall(call_id, name, arguments)


def answer(call_id: str, *blocks: Any, is_error: bool = False) -> gw.ToolResult:
    """A result; strings are texts."""
    return gw.ToolResult(call_id, said("user", *(blocks or ("done",))).blocks, is_error)


def declared(name: str = "f", description: str = "Does it.", **schema: Any) -> gw.Tool:
    """A tool in the neutral form."""
    return gw.Tool(name, description, {**EMPTY_SCHEMA, **schema})


def plain_draft() -> KiroDraft:
    """A conversation that Kiro takes as it is."""
    own = gw.Thinking("hm", ENVELOPE + "EXAMPLE")
    image = gw.Image("image/png", PNG)
    return draft_of(
        said("user", "q", image),
        said("assistant", own, "T", call("t1"), call("t2", "g", '{"a":1}')),
        said("user", answer("t1"), answer("t2")),
        said("assistant", "done"),
        said("user", "thanks"),
        tools=[declared(), declared("g", a={"type": "string"}), declared("h-1")],
    )


@pytest.mark.parametrize("rule", KIRO_RULES, ids=lambda rule: rule.__name__)
def test_a_rule_leaves_a_conversation_alone_that_does_not_need_it(rule: Rule) -> None:
    """And says so."""
    draft = plain_draft()
    assert draft.apply(rule) is False
    assert draft == plain_draft()


def test_a_conversation_that_needs_no_rule_names_none() -> None:
    """4.6: nothing but the form changes."""
    chat = plain_draft().chat
    written = KIRO.write_request(chat, MODELS[SONNET])
    assert chat.touched == [] and chat.dropped == []
    assert faults_of(written, SONNET) == []


LONG = "long description " * 1000
TOUCHING: list[tuple[str, Json]] = [
    ("inline_system_turns", a_body(user("a"), {"role": "system", "content": "R"}, user("b"))),
    (
        "adapt_assistant_turns",
        a_body(user("a"), assistant([thinking("x", "EqQB"), text("T")]), user("b")),
    ),
    ("adapt_assistant_turns", a_body(user("a"), assistant([IMAGE]), user("b"))),
    ("begin_and_end_with_user", a_body(assistant("T"), user("b"))),
    ("begin_and_end_with_user", a_body(user("a"), assistant("T"))),
    (
        "adapt_user_turns",
        a_body(user("a"), assistant([use("t1")]), user([result("t1", [IMAGE])])),
    ),
    ("adapt_user_turns", a_body(user([IMAGE]))),
    ("inline_settings", a_body(tools=[a_tool()], tool_choice={"type": "any"})),
    ("adapt_kiro_tools", a_body(user("a"), assistant([use("t1")]), user([result("t1")]))),
    ("adapt_kiro_tools", a_body(tools=[a_tool("a.b")])),
    ("adapt_kiro_tools", a_body(tools=[a_tool(description="")])),
    ("adapt_kiro_tools", a_body(tools=[a_tool(schema={**EMPTY_SCHEMA, "required": []})])),
    (
        "inline_settings",
        a_body(output_config={"format": {"type": "json_schema", "schema": {}}}),
    ),
    ("request_thinking", a_body(thinking={"type": "enabled", "budget_tokens": 2000})),
    ("pass_settings", a_body()),
    ("insert_preface", a_body(system="S")),
]


@pytest.mark.parametrize(("name", "body"), TOUCHING)
def test_a_rule_that_changes_something_is_named(name: str, body: Json) -> None:
    """For the log, when the service refuses the conversation."""
    model = OPUS if name == "pass_settings" else SONNET
    written, chat = convert(MESSAGES, body, MODELS[model])
    assert name in chat.touched
    assert faults_of(written, model) == []


def test_every_rule_is_tried_by_a_conversation_that_needs_it() -> None:
    """And none is tried that is no rule."""
    assert {name for name, _ in TOUCHING} == {rule.__name__ for rule in KIRO_RULES}


def test_a_system_turn_becomes_marked_user_text() -> None:
    """4.6 rule 1; its neighbours are joined with it."""
    draft = draft_of(said("user", "a"), said("system", "R"), said("user", "b"))
    assert draft.apply(gw.inline_system_turns)
    reminder = "<system-reminder>\nR\n</system-reminder>"
    assert draft.turns == [said("user", "a", reminder, "b")]


FOREIGN_THOUGHTS = [
    gw.Thinking("x", "EqQBEXAMPLE"),
    gw.Thinking("x", "gw1.r.EXAMPLE"),
    gw.Thinking("x", "gw1.c.EXAMPLE"),
    gw.Thinking("x", ""),
    gw.Thinking(redacted="EXAMPLE"),
]


@pytest.mark.parametrize("thought", FOREIGN_THOUGHTS)
def test_a_thought_of_another_maker_is_left_out(thought: gw.Thinking) -> None:
    """Trap 22."""
    draft = draft_of(said("user", "a"), said("assistant", thought, "T"), said("user", "b"))
    assert draft.apply(gw.adapt_assistant_turns)
    assert draft.turns == [said("user", "a"), said("assistant", "T"), said("user", "b")]


def test_a_turn_of_nothing_but_foreign_thoughts_goes_and_its_neighbours_join() -> None:
    """4.6 rules 3 and 7."""
    thought = gw.Thinking("x", "EqQBEXAMPLE")
    draft = draft_of(said("user", "a"), said("assistant", thought), said("user", "b"))
    assert draft.apply(gw.adapt_assistant_turns)
    assert draft.turns == [said("user", "a", "b")]


def test_the_first_turn_is_made_the_users() -> None:
    """4.6 rule 5."""
    draft = draft_of(said("assistant", "T"), said("user", "b"))
    assert draft.apply(gw.begin_and_end_with_user)
    assert [turn.role for turn in draft.turns] == ["user", "assistant", "user"]
    assert isinstance(draft.turns[0].blocks[0], gw.Text)


def test_an_answer_begun_by_the_caller_becomes_history() -> None:
    """4.6 rule 6."""
    draft = draft_of(said("user", "a"), said("assistant", "It is"))
    assert draft.apply(gw.begin_and_end_with_user)
    assert draft.turns == [said("user", "a"), said("assistant", "It is"), said("user", "Continue")]


def test_a_bare_brace_to_begin_with_is_a_wish_for_json() -> None:
    """4.6 rule 6: the brace itself goes."""
    draft = draft_of(said("user", "a"), said("assistant", "{"))
    assert draft.apply(gw.begin_and_end_with_user)
    assert draft.turns == [said("user", "a")]
    assert "JSON" in " ".join(draft.notes)


def test_media_in_a_result_move_to_its_turn() -> None:
    """4.8: results hold text only, and a note stays behind."""
    image = gw.Image("image/png", PNG)
    draft = draft_of(said("user", answer("t1", "seen", image), answer("t2", image)))
    assert draft.apply(gw.adapt_user_turns)
    first, second, *lifted = draft.turns[0].blocks
    assert isinstance(first, gw.ToolResult) and isinstance(second, gw.ToolResult)
    assert lifted == [image, image]
    assert [gw.join_texts(r.blocks) != "" for r in (first, second)] == [True, True]
    assert gw.join_texts(first.blocks).startswith("seen")


def test_a_turn_of_an_image_alone_gets_words() -> None:
    """4.6 rule 7: else REQUEST_BODY_INVALID."""
    image = gw.Image("image/png", PNG)
    draft = draft_of(said("user", image))
    assert draft.apply(gw.adapt_user_turns)
    assert gw.join_texts(draft.turns[0].blocks).strip()
    assert image in draft.turns[0].blocks


@pytest.mark.parametrize(
    ("choice", "names", "note"),
    [
        (gw.ToolChoice("none"), [], ""),
        (gw.ToolChoice("required"), ["f", "g"], "one of the tools"),
        (gw.ToolChoice("named", "g"), ["f", "g"], "tool g"),
    ],
)
def test_a_tool_choice_is_said_in_words(choice: gw.ToolChoice, names: list[str], note: str) -> None:
    """4.7: there is no field for it."""
    draft = draft_of(said("user", "a"), tools=[declared(), declared("g")], choice=choice)
    assert draft.apply(gw.inline_settings)
    assert [tool.name for tool in draft.tools] == names
    assert note in " ".join(draft.notes) and bool(draft.notes) == bool(note)


def test_one_call_at_a_time_is_said_in_words_where_there_are_tools() -> None:
    """4.7: there is no switch."""
    draft = draft_of(said("user", "a"), tools=[declared()], parallel=False)
    assert draft.apply(gw.inline_settings)
    assert "one tool" in " ".join(draft.notes)


def test_without_tools_one_call_at_a_time_changes_nothing() -> None:
    """So the rule says."""
    draft = draft_of(said("user", "a"), parallel=False)
    assert draft.apply(gw.inline_settings) is False
    assert draft.notes == []


def test_every_tool_called_in_history_is_declared() -> None:
    """Trap 7: also beside another list."""
    draft = draft_of(
        said("user", "q"),
        said("assistant", call("t1"), call("t2", "g"), call("t3", "g")),
        said("user", answer("t1"), answer("t2"), answer("t3")),
        tools=[declared("h")],
    )
    assert draft.apply(gw.adapt_kiro_tools)
    assert [tool.name for tool in draft.tools] == ["h", "f", "g"]
    assert draft.tools[1] == gw.Tool("f", "Tool", EMPTY_SCHEMA)


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("mcp.server/go!", "mcp_server_go_"),
        ("n" * 64, "n" * 64),
        ("n" * 65, "n" * 55 + "_" + hashlib.sha256(b"n" * 65).hexdigest()[:8]),
        ("füße", "f__e"),
    ],
)
def test_a_tool_has_a_name_that_kiro_takes(name: str, wire: str) -> None:
    """4.7."""
    draft = draft_of(said("user", "a"), tools=[declared(name)])
    assert draft.apply(gw.adapt_kiro_tools) is (name != wire)
    assert draft.tools[0].name == wire
    assert draft.chat.tools[0].name == name


@pytest.mark.parametrize("description", ["", " \n"])
def test_a_tool_without_a_description_is_described_by_its_name(description: str) -> None:
    """4.7."""
    draft = draft_of(said("user", "a"), tools=[declared("f", description)])
    assert draft.apply(gw.adapt_kiro_tools)
    assert draft.tools[0].description == "f" and draft.preface == []


@pytest.mark.parametrize("letter", ["x", "ä", "\N{GRINNING FACE}", "\ud800"])
def test_a_long_description_is_cut_between_characters_and_kept_whole_elsewhere(
    letter: str,
) -> None:
    """4.7: at most 10,240 bytes, and nothing is lost."""
    whole = letter * 12_000
    draft = draft_of(said("user", "a"), tools=[declared("f", whole)])
    assert draft.apply(gw.adapt_kiro_tools)
    kept = draft.tools[0].description
    assert len(kept.encode("utf-8", "replace")) <= 10_240
    assert kept.startswith(letter.encode("utf-8", "replace").decode() * 100)
    assert whole in draft.preface[-1] and 'name="f"' in draft.preface[-1]


def test_a_description_of_the_longest_size_stays() -> None:
    """The limit counts bytes."""
    draft = draft_of(said("user", "a"), tools=[declared("f", "x" * gw.KIRO_DESCRIPTION_BYTES)])
    assert draft.apply(gw.adapt_kiro_tools) is False


def test_structured_output_is_asked_for_in_words() -> None:
    """The schema is in them."""
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    draft = draft_of(said("user", "a"), output=gw.OutputFormat(schema))
    assert draft.apply(gw.inline_settings)
    assert json.dumps(schema, separators=(",", ":")) in draft.preface[-1]


def test_preface_and_notes_stand_around_the_words() -> None:
    """4.10 (ii): the first words get the system prompt, the last ones the notes."""
    draft = draft_of(said("user", "a"), said("assistant", "b"), said("user", "c"))
    draft.preface, draft.notes = ["S1", "S2\n"], ["N1", "N2"]
    assert draft.apply(gw.insert_preface)
    note = "<system-reminder>\nN1\nN2\n</system-reminder>"
    assert draft.turns == [
        said("user", "S1\n\nS2", "a"),
        said("assistant", "b"),
        said("user", "c", note),
    ]


def test_a_conversation_far_above_the_window_is_refused_here() -> None:
    """4.9: in the words that clients know, with both figures."""
    draft = draft_of(said("user", "a " * 1_000_000))
    with pytest.raises(gw.ContextTooLong, match=r"prompt is too long: \d+ tokens > 200000"):
        gw.check_context_window(draft)


@pytest.mark.parametrize(
    "rows",
    [
        [said("user", answer("t1", "a " * 1_000_000))],
        [said("assistant", call("t1", "f", '{"a":"' + "a " * 1_000_000 + '"}'))],
    ],
)
def test_results_and_arguments_count_for_the_size(rows: list[Turn]) -> None:
    """They are what fills a window."""
    with pytest.raises(gw.ContextTooLong):
        gw.check_context_window(draft_of(*rows))


def test_a_conversation_near_the_window_is_left_to_kiro() -> None:
    """The estimate may be wrong by a third; and an unknown window is no limit."""
    gw.check_context_window(draft_of(said("user", "a " * 400_000)))
    gw.check_context_window(draft_of(said("user", "x" * 400_000)))  # a long run is few tokens
    gw.check_context_window(draft_of(said("user", ("x" * 4_000 + "a " * 500) * 200)))
    draft = draft_of(said("user", "a " * 1_000_000), model="claude-sonnet-4")
    assert draft.model.max_prompt is None
    gw.check_context_window(draft)
    gw.check_context_window(draft_of(said("user", "a " * 1_000_000), model=OPUS))


# ---- schemas -------------------------------------------------------------------------------------

KEYWORDS = [
    "$schema",
    "additionalProperties",
    "contains",
    "contentEncoding",
    "contentMediaType",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "if",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "pattern",
    "patternProperties",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
]


def fit(schema: Json) -> Json:
    """A schema as it is sent: without faults, the caller's own not changed."""
    before = copy.deepcopy(schema)
    fitted = gw.adapt_schema(schema, "kiro")
    assert schema == before
    assert schema_fault(fitted, "") == "" and fitted["type"] == "object"
    return fitted


@pytest.mark.parametrize("word", KEYWORDS)
def test_a_keyword_kiro_refuses_is_stripped_at_every_depth(word: str) -> None:
    """4.7."""
    leaf = {"type": "string", word: {"x": 1}, "description": "d"}
    bare = {"type": "string", "description": "d"}
    schema = {
        "type": "object",
        word: {"x": 1},
        "properties": {"a": leaf, "b": {"type": "array", "items": leaf}, "c": {"anyOf": [leaf]}},
    }
    assert fit(schema)["properties"] == {
        "a": bare,
        "b": {"type": "array", "items": bare},
        "c": {"anyOf": [bare]},
    }


@pytest.mark.parametrize("word", [*KEYWORDS, "required", "$ref", "enum", "definitions", "$defs"])
def test_a_property_may_have_the_name_of_a_keyword(word: str) -> None:
    """Trap 8."""
    inner = {"type": "object", "properties": {word: {"type": "string"}}, "required": [word]}
    schema = {"type": "object", "properties": {word: inner}, "required": [word]}
    assert fit(schema) == schema


def test_a_property_of_a_definition_may_have_the_name_of_a_keyword() -> None:
    """Trap 8: names under `$defs` and `definitions` are kept too."""
    spot = {"type": "object", "properties": {"format": {"type": "string", "format": "x"}}}
    for word in ("$defs", "definitions"):
        reference = f"#/{word}/pattern"
        schema = {
            "type": "object",
            "properties": {"a": {"$ref": reference}},
            word: {"pattern": spot},
        }
        properties = fit(schema)["properties"]
        assert properties["a"]["properties"] == {"format": {"type": "string"}}


@pytest.mark.parametrize(
    "required", [None, [], True, False, "a", 5, {"a": True}, [1, None], ["a", 5]]
)
def test_required_is_a_list_of_names_or_absent(required: Any) -> None:
    """4.7; `required: true` beside a property is how draft 3 of JSON Schema wrote it."""
    inner = {"type": "string", "required": required}
    fitted = fit({"type": "object", "properties": {"a": inner}, "required": required})
    wanted = ["a"] if required == ["a", 5] else None
    assert fitted.get("required") == fitted["properties"]["a"].get("required") == wanted


@pytest.mark.parametrize("properties", [None, [], "x"])
def test_properties_are_an_object_at_every_depth(properties: Any) -> None:
    """4.7; `null` is what Go writes for no properties."""
    inner = {"type": "object", "properties": properties}
    fitted = fit({"type": "object", "properties": {"a": inner}})
    assert fitted["properties"]["a"].get("properties", {}) == {}
    assert fit(inner)["properties"] == {}


def test_unions_at_the_top_are_folded() -> None:
    """4.7: `allOf` keeps what is required, the others do not."""
    branch = {"properties": {"b": {"type": "string"}}, "required": ["b"]}
    other = {"properties": {"c": {"type": "integer"}}, "required": ["c"]}
    for word, needed in (("allOf", ["a", "b", "c"]), ("anyOf", ["a"]), ("oneOf", ["a"])):
        schema = {
            "type": "object",
            "properties": {"a": {"type": "string"}},
            "required": ["a"],
            word: [branch, other],
        }
        fitted = fit(schema)
        assert set(fitted["properties"]) == {"a", "b", "c"} and word not in fitted
        assert fitted["required"] == needed


@pytest.mark.parametrize("branches", [None, [], {}, [True], ["x"], [None], [[]], [{}], "x"])
def test_an_odd_union_at_the_top_is_no_accident(branches: Any) -> None:
    """What a caller sends is never an internal error."""
    for word in ("allOf", "anyOf", "oneOf"):
        fitted = fit({"type": "object", "properties": {"a": {"type": "string"}}, word: branches})
        assert fitted == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_references_are_replaced_and_a_circle_ends() -> None:
    """No `$ref` is left."""
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    fitted = fit(
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    )
    assert fitted["properties"]["a"]["properties"]["next"] == {"type": "object"}


def test_definitions_that_refer_to_one_another_stay_small() -> None:
    """Schemas of page blocks do: each of seven kinds may hold any of the others."""
    kinds = [f"k{number}" for number in range(7)]
    holder = {
        "type": "object",
        "properties": {kind: {"$ref": f"#/$defs/{kind}"} for kind in kinds},
    }
    schema = {
        "type": "object",
        "properties": {"page": {"$ref": "#/$defs/k0"}},
        "$defs": dict.fromkeys(kinds, holder),
    }
    size = len(gw.dump_json(gw.adapt_schema(schema, "kiro")))
    assert size < 100_000


def test_a_schema_that_kiro_takes_is_sent_as_it_is() -> None:
    """Descriptions, enums, defaults and nesting are kept."""
    schema = {
        "type": "object",
        "title": "T",
        "description": "d",
        "properties": {
            "a": {"type": ["string", "null"], "enum": ["x", None], "default": None},
            "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "c": {"type": "array", "items": {"type": "object", "properties": {}}},
            "d": {"const": {"format": 1, "pattern": 2}},
        },
        "required": ["a"],
    }
    assert fit(schema) == schema


# ---- whole conversations -------------------------------------------------------------------------

MINIMAL = {
    "conversationState": {
        "chatTriggerType": "MANUAL",
        "agentTaskType": "vibe",
        "currentMessage": {"userInputMessage": {"content": "Say hi", "modelId": SONNET}},
    }
}


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES])
def test_a_first_question_has_nothing_but_its_words(dialect: Dialect) -> None:
    """4.3; rule 9: no empty history, tools, results, images or context."""
    written, chat = convert(dialect, {"model": "m", "messages": [user("Say hi")]}, MODELS[SONNET])
    assert written == MINIMAL
    assert chat.touched == [] and chat.dropped == []


def test_a_placed_call_has_the_form_of_the_fact_sheet() -> None:
    """4.3, in both shapes; what is written once is placed anew for every host."""
    written = a_to_k({"model": "m", "messages": [user("Say hi")]}, SONNET)
    sent = json.loads(on_the_wire(written))
    message = {"content": "Say hi", "modelId": SONNET, "origin": "AI_EDITOR"}
    assert sent == {
        "conversationState": {
            "chatTriggerType": "MANUAL",
            "agentTaskType": "vibe",
            "conversationId": CONVERSATION,
            "agentContinuationId": RUN,
            "currentMessage": {"userInputMessage": message},
        },
        "profileArn": ARN,
    }
    sent = json.loads(on_the_wire(written, "cli"))
    assert sent["conversationState"]["currentMessage"]["userInputMessage"]["origin"] == "KIRO_CLI"
    assert "profileArn" not in sent
    assert written == MINIMAL


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER_SENT = {
    "toolSpecification": {
        "name": "get_weather",
        "description": "Current weather.",
        "inputSchema": {"json": WEATHER},
    }
}
WEATHER_STATE = {
    "chatTriggerType": "MANUAL",
    "agentTaskType": "vibe",
    "history": [
        {
            "userInputMessage": {
                "content": "You are terse.\n\nWeather in Paris?",
                "modelId": SONNET,
            }
        },
        {
            "assistantResponseMessage": {
                "content": "Checking.",
                "toolUses": [sent_use("tooluse_1", "get_weather", city="Paris")],
            }
        },
    ],
    "currentMessage": {
        "userInputMessage": {
            "content": "",
            "modelId": SONNET,
            "userInputMessageContext": {
                "toolResults": [sent_result("tooluse_1", "18 C, rain")],
                "tools": [WEATHER_SENT],
            },
        }
    },
}


def test_the_conversation_of_the_fact_sheet_from_messages() -> None:
    """4.4: the turn of results stays empty (trap 11)."""
    written = a_to_k(
        a_body(
            user("Weather in Paris?"),
            assistant([text("Checking."), use("tooluse_1", "get_weather", city="Paris")]),
            user([result("tooluse_1", "18 C, rain")]),
            system="You are terse.",
            tools=[a_tool("get_weather", WEATHER, "Current weather.")],
        )
    )
    assert written == {"conversationState": WEATHER_STATE}


def test_the_conversation_of_the_fact_sheet_from_chat() -> None:
    """4.4."""
    call_ = function_call("tooluse_1", '{"city":"Paris"}', "get_weather")
    written = c_to_k(
        c_body(
            {"role": "system", "content": "You are terse."},
            user("Weather in Paris?"),
            assistant("Checking.", tool_calls=[call_]),
            tool_message("tooluse_1", "18 C, rain"),
            tools=[c_tool("get_weather", WEATHER, "Current weather.")],
        )
    )
    assert written == {"conversationState": WEATHER_STATE}


# A>K and C>K twins of the conversion cases


def test_system_blocks_stand_before_the_first_words() -> None:
    """Case 1: without the billing line, which changes with every request."""
    billing = text("x-anthropic-billing-header: cc_version=1;")
    written = a_to_k(a_body(system=[billing, text("S1"), text("S2")]))
    assert turns(written) == [{"content": "S1\n\nS2\n\nhi"}]


def test_the_system_prompt_stays_at_the_beginning_when_the_conversation_grows() -> None:
    """4.10: a stable prefix is what the prompt cache relies on."""
    first = turns(a_to_k(a_body(user("a"), system="S")))[0]
    later = turns(a_to_k(a_body(user("a"), assistant("b"), user("c"), system="S")))
    assert later == [first, {"content": "b"}, {"content": "c"}]


def test_a_system_message_in_the_middle_is_user_text_in_its_place() -> None:
    """Case 2."""
    messages = [user("a"), {"role": "system", "content": "R"}, assistant("b"), user("c")]
    reminder = "<system-reminder>\nR\n</system-reminder>"
    expected = [{"content": f"a\n\n{reminder}"}, {"content": "b"}, {"content": "c"}]
    assert turns(a_to_k(a_body(*messages))) == expected
    assert turns(c_to_k(c_body(*messages))) == expected


def test_a_system_message_at_the_end_is_the_current_message() -> None:
    """Case 3."""
    written = a_to_k(a_body(user("a"), {"role": "system", "content": "R"}))
    assert turns(written) == [{"content": "a\n\n<system-reminder>\nR\n</system-reminder>"}]


def test_developer_is_system_and_late_system_is_a_reminder() -> None:
    """Case 21."""
    late = {"role": "system", "content": "L"}
    first = {"role": "developer", "content": "D"}
    written = c_to_k(c_body(first, user("a"), assistant("b"), late, user("c")))
    reminder = "<system-reminder>\nL\n</system-reminder>"
    expected = [{"content": "D\n\na"}, {"content": "b"}, {"content": f"{reminder}\n\nc"}]
    assert turns(written) == expected


def test_text_and_two_calls_are_one_turn_with_objects_for_arguments() -> None:
    """Case 4, trap 6."""
    turn = assistant([text("T"), use("t1", a=1), use("t2", "g")])
    written = a_to_k(a_body(user("q"), turn, user([result("t1", "1"), result("t2", "2")])))
    assert turns(written)[1] == {
        "content": "T",
        "toolUses": [sent_use("t1", a=1), sent_use("t2", "g")],
    }


def test_results_come_in_the_order_of_their_calls_beside_the_words() -> None:
    """Case 5."""
    answers = user([text("go on"), result("t2", "2"), result("t1", [text("1")])])
    written = a_to_k(a_body(user("q"), assistant([use("t1"), use("t2")]), answers))
    wanted = sent_results("go on", sent_result("t1", "1"), sent_result("t2", "2"))
    assert without_tools(turns(written)[2]) == wanted


def test_tool_messages_become_one_turn() -> None:
    """Case 22, trap 10: results are joined before any is taken for an orphan."""
    calls = [function_call("c1"), function_call("c2")]
    written = c_to_k(
        c_body(
            user("q"),
            assistant(None, tool_calls=calls),
            tool_message("c2", "2"),
            tool_message("c1", "1"),
            user("x"),
        )
    )
    assert turns(written)[1] == {"content": "", "toolUses": [sent_use("c1"), sent_use("c2")]}
    wanted = sent_results("x", sent_result("c1", "1"), sent_result("c2", "2"))
    assert without_tools(turns(written)[2]) == wanted


def test_results_split_over_two_user_messages_are_kept() -> None:
    """Trap 10, from messages."""
    turn = assistant([use("t1"), use("t2")])
    rows = [user("q"), turn, user([result("t1", "1")]), user([result("t2", "2")])]
    wanted = sent_results("", sent_result("t1", "1"), sent_result("t2", "2"))
    assert without_tools(turns(a_to_k(a_body(*rows)))[2]) == wanted


def test_an_image_in_a_result_is_lifted_into_its_turn() -> None:
    """Case 6, trap 20: neither in the result nor in the context."""
    written = a_to_k(a_body(user("q"), assistant([use("t1")]), user([result("t1", [IMAGE])])))
    turn = without_tools(turns(written)[2])
    assert turn["images"] == [SENT_IMAGE] and turn["content"] == ""
    (sent,) = turn["userInputMessageContext"]["toolResults"]
    assert set(sent["content"][0]) == {"text"} and sent["content"][0]["text"].strip()


@pytest.mark.parametrize(("is_error", "status"), [(True, "error"), (False, "success")])
def test_a_result_says_whether_it_is_an_error(is_error: bool, status: str) -> None:
    """Case 7: Kiro has a field for it, so the words stay as they are."""
    answers = user([result("t1", "no file", is_error=is_error)])
    written = a_to_k(a_body(user("q"), assistant([use("t1")]), answers))
    wanted = sent_results("", sent_result("t1", "no file", status=status))
    assert without_tools(turns(written)[2]) == wanted


@pytest.mark.parametrize("content", ["", None, [], [text("")]])
def test_a_result_without_words_gets_some(content: Any) -> None:
    """4.5: the content is a list that must not be empty (rule 9)."""
    written = a_to_k(a_body(user("q"), assistant([use("t1")]), user([result("t1", content)])))
    (sent,) = results_of(turns(written)[2])
    assert sent["content"][0]["text"].strip()


def test_a_missing_result_is_filled_in() -> None:
    """Case 11, 4.6 rule 4: or TOOL_USE_RESULT_MISMATCH for the rest of the session."""
    written = a_to_k(a_body(user("q"), assistant([use("t1"), use("t2")]), user([result("t1")])))
    first, second = results_of(turns(written)[2])
    assert first == sent_result("t1", "done")
    assert (second["toolUseId"], second["status"]) == ("t2", "error")
    assert second["content"][0]["text"]


def test_calls_at_the_very_end_get_results_and_a_turn() -> None:
    """4.6 rules 4 and 6."""
    written = a_to_k(a_body(user("q"), assistant([use("t1")])))
    assert [r["toolUseId"] for r in results_of(turns(written)[2])] == ["t1"]


def test_an_orphan_result_becomes_words() -> None:
    """4.6 rule 4: its text is not lost."""
    written = a_to_k(a_body(user("q"), assistant("b"), user([result("t9", "found"), text("x")])))
    turn = turns(written)[2]
    assert "found" in turn["content"] and "x" in turn["content"]
    assert "userInputMessageContext" not in turn


def test_a_first_turn_with_results_becomes_words() -> None:
    """4.6 rule 5: a conversation cut by its client."""
    for written in (
        a_to_k(a_body(user([result("t9", "found")]))),
        c_to_k(c_body(tool_message("t9", "found"), user("x"))),
    ):
        (turn,) = turns(written)
        assert "found" in turn["content"] and "userInputMessageContext" not in turn


def test_two_answers_in_a_row_are_one_turn() -> None:
    """4.6 rule 3: a proven cause of 400 (KRS #79)."""
    written = a_to_k(a_body(user("a"), assistant("b"), assistant("c"), user("d"), user("e")))
    assert turns(written) == [{"content": "a"}, {"content": "b\n\nc"}, {"content": "d\n\ne"}]


def test_a_message_between_a_call_and_its_result_stands_behind_it() -> None:
    """Case 33."""
    rows = [user("q"), assistant([use("t1")]), user("note"), user([result("t1", "r")])]
    written = a_to_k(a_body(*rows))
    assert without_tools(turns(written)[2]) == sent_results("note", sent_result("t1", "r"))


def test_an_id_used_in_two_turns_is_rewritten_on_both_sides() -> None:
    """4.6 rule 4."""
    rows = [
        user("q"),
        assistant([use("t1")]),
        user([result("t1", "first")]),
        assistant([use("t1")]),
        user([result("t1", "second")]),
    ]
    sent = turns(a_to_k(a_body(*rows, tools=[a_tool()])))
    first, second = sent[1]["toolUses"][0]["toolUseId"], sent[3]["toolUses"][0]["toolUseId"]
    assert first == "t1" and second != "t1"
    assert results_of(sent[2]) == [sent_result(first, "first")]
    assert results_of(sent[4]) == [sent_result(second, "second")]


def test_a_long_id_used_twice_stays_within_its_length() -> None:
    """4.6 rule 4: `^[A-Za-z0-9_-]{1,64}$`."""
    long = "i" * 64
    rows = [user("q"), *[assistant([use(long)]), user([result(long)])] * 2]
    assert len(turns(a_to_k(a_body(*rows, tools=[a_tool()])))) == 5


def test_a_call_sent_twice_is_one_call_with_one_result() -> None:
    """4.6 rule 4: the words of its result are there once."""
    turn = assistant([use("t1"), use("t1")])
    sent = turns(a_to_k(a_body(user("q"), turn, user([result("t1", "one")]), tools=[a_tool()])))
    assert sent[1]["toolUses"] == [sent_use("t1")]
    assert results_of(sent[2]) == [sent_result("t1", "one")]


def test_two_results_of_one_call_are_one() -> None:
    """4.6 rule 4, TOOL_DUPLICATE: nothing is said twice."""
    answers = user([result("t1", "one"), result("t1", "two")])
    sent = turns(a_to_k(a_body(user("q"), assistant([use("t1")]), answers, tools=[a_tool()])))
    (one,) = results_of(sent[2])
    words = "".join(part["text"] for part in one["content"])
    assert [words.count(word) for word in ("one", "two")] == [1, 1]


def test_two_different_calls_of_one_id_have_a_result_each() -> None:
    """4.6 rule 4."""
    answers = user([result("t1", "one"), result("t1", "two")])
    turn = assistant([use("t1", a=1), use("t1", a=2)])
    sent = turns(a_to_k(a_body(user("q"), turn, answers, tools=[a_tool()])))
    first, second = (row["toolUseId"] for row in sent[1]["toolUses"])
    assert first != second
    assert results_of(sent[2]) == [sent_result(first, "one"), sent_result(second, "two")]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a":', {"_raw": '{"a":'}),
        ("", {}),
        ("[1]", {"_raw": "[1]"}),
        ('"x"', {"_raw": '"x"'}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
        ('{"b":1,"a":2}', {"b": 1, "a": 2}),
    ],
)
def test_arguments_are_an_object_always(arguments: Any, value: Json) -> None:
    """Case 23, trap 6."""
    calls = [function_call("c1", arguments)]
    written = c_to_k(c_body(user("q"), assistant("", tool_calls=calls), tool_message("c1")))
    assert turns(written)[1]["toolUses"] == [sent_use("c1", **value)]


@pytest.mark.parametrize("call_id", ["call|abc+/", "x" * 90])
def test_odd_ids_are_the_same_in_call_and_result(call_id: str) -> None:
    """Case 24."""
    expected = "call_" + hashlib.sha256(call_id.encode()).hexdigest()[:24]
    calls = [function_call(call_id)]
    for written in (
        c_to_k(c_body(user("q"), assistant(None, tool_calls=calls), tool_message(call_id))),
        a_to_k(a_body(user("q"), assistant([use(call_id)]), user([result(call_id)]))),
    ):
        sent = turns(written)
        assert sent[1]["toolUses"][0]["toolUseId"] == expected
        assert results_of(sent[2])[0]["toolUseId"] == expected


def test_anthropic_shapes_are_read_in_a_chat_body() -> None:
    """Case 25: Cursor sends them."""
    rows = [
        user("q"),
        assistant([text("T"), use("t1", a=1)]),
        user([result("t1", "ok"), IMAGE]),
    ]
    tool = {"name": "f", "input_schema": {"type": "object"}}
    written = c_to_k(c_body(*rows, tools=[tool]))
    sent = turns(written)
    assert sent[1] == {"content": "T", "toolUses": [sent_use("t1", a=1)]}
    assert without_tools(sent[2]) == {
        **sent_results("", sent_result("t1", "ok")),
        "images": [SENT_IMAGE],
    }
    assert tools(written)[0]["inputSchema"] == {"json": EMPTY_SCHEMA}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "f"},
        {"type": "function", "function": {"name": "f", "parameters": {}, "description": ""}},
    ],
)
def test_a_tool_of_a_name_alone_is_whole(tool: Json) -> None:
    """Case 26, 4.7: a description that is not empty, a schema of type object."""
    assert tools(c_to_k(c_body(tools=[tool]))) == [
        {"name": "f", "description": "f", "inputSchema": {"json": EMPTY_SCHEMA}}
    ]


def test_two_tools_of_one_name_are_declared_once() -> None:
    """4.6: TOOL_DUPLICATE; agents with several sources of tools send them."""
    written = a_to_k(a_body(tools=[a_tool(), a_tool("g"), a_tool()]))
    assert [tool["name"] for tool in tools(written)] == ["f", "g"]


@pytest.mark.parametrize("name", ["", " "])
def test_a_tool_without_a_name_never_reaches_kiro(name: str) -> None:
    """4.7: at least one letter; refused here or given a name that fits."""
    for dialect, tool in ((MESSAGES, a_tool(name)), (CHAT, c_tool(name))):
        try:
            written, _ = convert(dialect, a_body(tools=[tool]), MODELS[SONNET])
        except gw.InvalidRequest:
            continue
        assert faults_of(written, SONNET) == []


@pytest.mark.parametrize("word", ["anyOf", "oneOf", "allOf"])
def test_a_schema_that_is_only_a_union_is_folded(word: str) -> None:
    """4.7: the root is of type object."""
    branch = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
    (tool,) = tools(a_to_k(a_body(tools=[a_tool(schema={word: [branch]})])))
    assert tool["inputSchema"] == {"json": branch}


def test_a_hosted_tool_beside_others_is_dropped_by_name() -> None:
    """Case 17."""
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    body = a_body(tools=[hosted, a_tool()])
    assert [tool["name"] for tool in tools(a_to_k(body))] == ["f"]
    assert "tools.web_search" in convert(MESSAGES, body, MODELS[SONNET])[1].dropped
    assert "web_search is not available" in str(refused(MESSAGES, a_body(tools=[hosted])))


def test_a_tool_reference_is_words_and_its_tool_is_sent() -> None:
    """Case 13."""
    reference = [{"type": "tool_reference", "tool_name": "X"}]
    tool = {**a_tool("X"), "defer_loading": True}
    rows = [user("q"), assistant([use("t1", "search")]), user([result("t1", reference)])]
    written = a_to_k(a_body(*rows, tools=[tool]))
    assert results_of(turns(written)[2]) == [sent_result("t1", "Tool available: X")]
    assert [row["name"] for row in tools(written)] == ["X", "search"]


def test_a_hosted_pair_of_history_becomes_words() -> None:
    """1.3: nothing Kiro would take for a call."""
    hosted = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    row = {"type": "web_search_result", "title": "Title", "url": "https://u"}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": [row]}
    written = a_to_k(a_body(user("a"), assistant([hosted, found, text("done")]), user("go")))
    sent = turns(written)[1]
    assert "toolUses" not in sent and tools(written) == []
    assert all(words in sent["content"] for words in ("q", "Title", "https://u", "done"))


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (CHAT, c_body(n=2)),
        (CHAT, c_body(logprobs=True)),
        (CHAT, c_body(logit_bias={"1": 1})),
        (MESSAGES, a_body(mcp_servers=[{"url": "x"}])),
        (MESSAGES, a_body(user(""))),
        (CHAT, c_body(user(""), assistant(""))),
    ],
)
def test_what_cannot_be_carried_over_is_refused(dialect: Dialect, body: Json) -> None:
    """Case 27 and 5.7."""
    assert refused(dialect, body).kind == "invalid_request"


@pytest.mark.parametrize("key", ["seed", "user", "temperature", "top_p", "stop"])
def test_settings_kiro_has_no_field_for_are_never_refused(key: str) -> None:
    """Case 27."""
    value: Any = {"user": "u", "stop": ["END"]}.get(key, 1)
    assert turns(c_to_k(c_body(**{key: value}))) == [{"content": "hi"}]


def test_no_setting_reaches_the_wire() -> None:
    """Trap 25, case 19: no inferenceConfig, no unknown key, nothing about the person."""
    more = {"temperature": 1.7, "top_p": 0.5, "max_tokens": 77, "seed": 1, "user": "u EXAMPLE"}
    written, chat = convert(CHAT, c_body(**more, stop=["END"]), MODELS[SONNET])
    minimal = copy.deepcopy(MINIMAL)
    minimal["conversationState"]["currentMessage"]["userInputMessage"]["content"] = "hi"  # type: ignore[index]
    assert written == minimal
    assert {"temperature", "top_p", "max_tokens"} <= set(chat.dropped)
    metadata = {"user_id": json.dumps({"device_id": "d" * 64, "session_id": "s EXAMPLE"})}
    written, chat = convert(MESSAGES, a_body(metadata=metadata, top_k=3), MODELS[SONNET])
    assert written == minimal
    assert "top_k" in chat.dropped and chat.session == "s EXAMPLE"


def test_stop_strings_are_left_to_the_cutter() -> None:
    """There is no field: they are kept, not dropped."""
    for dialect, more in ((CHAT, {"stop": "END"}), (MESSAGES, {"stop_sequences": ["END"]})):
        written, chat = convert(dialect, {**a_body(), **more}, MODELS[SONNET])
        assert chat.stop == ["END"] and "END" not in json.dumps(written)
        assert not {"stop", "stop_sequences"} & set(chat.dropped)


# ---- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mcp.server/go", "n" * 70])
def test_a_tool_has_one_name_in_history_list_and_choice(name: str) -> None:
    """Trap 9: and the answer's name can be turned back."""
    wire = gw.wire_name(name)
    rows = [user("q"), assistant([use("t1", name)]), user([result("t1")])]
    choice = {"type": "tool", "name": name}
    written = a_to_k(a_body(*rows, tools=[a_tool(name)], tool_choice=choice))
    assert turns(written)[1]["toolUses"] == [sent_use("t1", wire)]
    assert [tool["name"] for tool in tools(written)] == [wire]
    assert wire in turns(written)[2]["content"] and name not in json.dumps(written)
    chat = MESSAGES.read_request(a_body(tools=[a_tool(name)]))
    assert gw.wire_names(tool.name for tool in chat.tools) == {wire: name}


def test_two_names_that_would_become_one_are_told_apart() -> None:
    """4.7: collisions are resolved, in history too; the name that fits stays as it is."""
    rows = [user("q"), assistant([use("t1", "a.b"), use("t2", "a_b")])]
    written, chat = convert(
        MESSAGES, a_body(*rows, tools=[a_tool("a.b"), a_tool("a_b")]), MODELS[SONNET]
    )
    assert faults_of(written, SONNET) == []
    names = [tool["name"] for tool in tools(written)]
    assert names[1] == "a_b" and names[0] != "a_b"
    assert [row["name"] for row in turns(written)[1]["toolUses"]] == names
    assert chat.names == {"a.b": names[0], "a_b": "a_b"}


@pytest.mark.parametrize("declared_too", [True, False])
def test_a_name_of_history_that_would_become_a_declared_one_is_another_tool(
    declared_too: bool,
) -> None:
    """4.6 rule 8 and 4.7."""
    offered = [a_tool("a_b")] + [a_tool("a.b")] * declared_too
    rows = [user("q"), assistant([use("t1", "a.b")]), user([result("t1")])]
    written = a_to_k(a_body(*rows, tools=offered))
    called = turns(written)[1]["toolUses"][0]["name"]
    assert called != "a_b"
    assert [tool["name"] for tool in tools(written)] == ["a_b", called]


def test_tools_are_declared_in_the_current_message_only() -> None:
    """4.6 rule 8."""
    sent = turns(a_to_k(a_body(user("a"), assistant("b"), user("c"), tools=[a_tool()])))
    assert "userInputMessageContext" not in sent[0]
    assert list(sent[2]["userInputMessageContext"]) == ["tools"]


@pytest.mark.parametrize("offered", [[], [a_tool("other")]])
def test_tools_of_history_have_stubs(offered: list[Json]) -> None:
    """Trap 7."""
    rows = [user("q"), assistant([use("t1"), use("t2", "a.b")]), user([result("t1")])]
    written = a_to_k(a_body(*rows, tools=offered))
    names = [tool["name"] for tool in offered]
    assert [tool["name"] for tool in tools(written)] == [*names, "f", "a_b"]
    stub = {"name": "f", "description": "Tool", "inputSchema": {"json": EMPTY_SCHEMA}}
    assert tools(written)[len(offered)] == stub


def test_no_tool_may_be_called_but_stubs_remain() -> None:
    """4.7: `none` sends no tools, except those history needs."""
    rows = [user("q"), assistant([use("t1")]), user([result("t1")])]
    more: Json = {"tools": [a_tool(), a_tool("g")], "tool_choice": {"type": "none"}}
    assert tools(a_to_k(a_body(**more))) == []
    (stub,) = tools(a_to_k(a_body(*rows, **more)))
    assert (stub["name"], stub["description"]) == ("f", "Tool")


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        (MESSAGES, {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
        (CHAT, {"tool_choice": "required", "parallel_tool_calls": False}),
    ],
)
def test_a_forced_choice_and_one_call_at_a_time_are_said_behind_the_words(
    dialect: Dialect, more: Json
) -> None:
    """Case 18: in the current message, where they do not spoil the cache."""
    tool = a_tool() if dialect is MESSAGES else c_tool()
    rows = [user("a"), assistant("b"), user("c")]
    written, _ = convert(dialect, {**a_body(*rows), "tools": [tool], **more}, MODELS[SONNET])
    first, _, last = turns(written)
    assert first == {"content": "a"}
    assert re.fullmatch(
        r"c\n\n<system-reminder>\n.*one of the tools.*\n.*at most one tool.*\n</system-reminder>",
        last["content"],
    )
    assert "tool_choice" not in json.dumps(written)
    assert faults_of(written, SONNET) == []


@pytest.mark.parametrize(
    ("dialect", "choice"),
    [
        (MESSAGES, {"type": "tool", "name": "f"}),
        (CHAT, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_a_named_tool_is_named_in_words(dialect: Dialect, choice: Json) -> None:
    """Case 16: it does not forbid thinking, which is in words as well."""
    tool = a_tool() if dialect is MESSAGES else c_tool()
    written, _ = convert(
        dialect, {**a_body(), "tools": [tool], "tool_choice": choice}, MODELS[SONNET]
    )
    assert "a call of the tool f" in turns(written)[0]["content"]


def test_an_open_choice_says_nothing() -> None:
    """`auto` is what Kiro does."""
    for more in ({"tool_choice": {"type": "auto"}}, {}):
        written = a_to_k(a_body(tools=[a_tool()], **more))
        assert without_tools(turns(written)[0]) == {"content": "hi"}


def test_a_long_description_moves_to_the_system_prompt() -> None:
    """4.7."""
    whole = "long description " * 1000
    written = a_to_k(a_body(system="S", tools=[a_tool(description=whole)]))
    assert turns(written)[0]["content"].startswith("S\n\n<tool")
    assert whole.strip() in turns(written)[0]["content"]


# ---- images and files ----------------------------------------------------------------------------


def test_images_stand_in_the_message_under_their_true_kind() -> None:
    """Trap 20: `jpg` is `jpeg`, the prefix goes, the bytes tell the kind."""
    url = {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{JPEG}"}}
    wrong = {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{PNG}"}}
    (turn,) = turns(c_to_k(c_body(user([text("see"), url, wrong]))))
    sent = {"format": "jpeg", "source": {"bytes": JPEG}}
    assert turn == {"content": "see", "images": [sent, SENT_IMAGE]}


@pytest.mark.parametrize("blank", ["\n", "\r\n", " "])
def test_base64_in_lines_is_sent_in_one(blank: str) -> None:
    """Trap 20: bare base64; mail libraries break it into lines."""
    data = PNG[:8] + blank + PNG[8:] + blank
    source = {"type": "base64", "media_type": "image/png", "data": data}
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    for part in ({"type": "image", "source": source}, url):
        (turn,) = turns(c_to_k(c_body(user([text("see"), part]))))
        assert turn["images"] == [SENT_IMAGE]


def test_an_image_alone_gets_words_that_are_no_request() -> None:
    """4.6 rule 7, trap 11."""
    (turn,) = turns(a_to_k(a_body(user([IMAGE]))))
    assert turn["images"] == [SENT_IMAGE] and turn["content"].strip()
    assert turn["content"].lower().strip(".") not in ("", "continue")


def test_images_of_history_stay_in_their_turns() -> None:
    """They are not moved to the current message."""
    sent = turns(a_to_k(a_body(user([text("see"), IMAGE]), assistant("b"), user("c"))))
    assert sent == [{"content": "see", "images": [SENT_IMAGE]}, {"content": "b"}, {"content": "c"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "url", "url": "https://host.example/a.png"}},
        {"type": "image_url", "image_url": {"url": "https://host.example/a.png"}},
    ],
)
def test_a_remote_image_is_refused(part: Json) -> None:
    """4.8: Kiro takes data only, and nothing is fetched here."""
    for dialect in (CHAT, MESSAGES):
        assert "base64" in str(refused(dialect, a_body(user([text("see"), part]))))


def test_an_image_for_a_model_that_reads_only_is_refused_by_its_name() -> None:
    """4.8, `supportedInputTypes`; a model that does not say takes them."""
    assert QWEN in str(refused(MESSAGES, a_body(user([text("see"), IMAGE])), QWEN))
    assert "images" in turns(a_to_k(a_body(user([text("see"), IMAGE])), "claude-sonnet-4"))[0]


def test_a_document_beside_a_result_becomes_a_document() -> None:
    """Case 12, 4.5: how Claude Code reads a PDF."""
    content = [result("t1", "PDF file read"), {"type": "document", "source": PDF}]
    written = a_to_k(a_body(user("q"), assistant([use("t1")]), user(content)))
    turn = without_tools(turns(written)[2])
    (document,) = turn.pop("documents")
    assert turn == sent_results("", sent_result("t1", "PDF file read"))
    assert document.pop("name")
    assert document == {"format": "pdf", "source": {"bytes": "JVBE"}}


@pytest.mark.parametrize(
    ("source", "kind", "data"),
    [
        ({"type": "text", "media_type": "text/plain", "data": "wörds"}, "txt", "wörds"),
        ({"type": "text", "data": ""}, "txt", ""),
    ],
)
def test_a_text_document_is_sent_as_bytes(source: Json, kind: str, data: str) -> None:
    """4.5."""
    part = {"type": "document", "source": source, "title": "a/b.txt"}
    (turn,) = turns(a_to_k(a_body(user([text("see"), part]))))
    (document,) = turn["documents"]
    assert document["format"] == kind
    assert base64.b64decode(document["source"]["bytes"]).decode() == data


def test_an_unknown_kind_of_file_is_refused_at_its_place() -> None:
    """4.5: only nine kinds."""
    source = {"type": "base64", "media_type": "application/zip", "data": "UEsD"}
    error = refused(MESSAGES, a_body(user([text("a"), {"type": "document", "source": source}])))
    assert error.param == "messages.0.content.1"


# ---- thinking ------------------------------------------------------------------------------------


def tags(tokens: int) -> str:
    """What asks an older Claude to think."""
    return (
        f"<thinking_mode>enabled</thinking_mode><max_thinking_length>{tokens}</max_thinking_length>"
    )


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 20000}}, 20000),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, 1024),
        ({"thinking": {"type": "enabled", "budget_tokens": 999_999}}, 50_000),
        ({"output_config": {"effort": "low"}}, 4096),
        ({"output_config": {"effort": "minimal"}}, 1024),
        ({"output_config": {"effort": "max"}}, 31_999),
    ],
)
def test_an_older_claude_is_asked_between_tags(asked: Json, tokens: int) -> None:
    """4.11: `enabled`, at the very start of the system text, and no field beside them."""
    written, chat = convert(MESSAGES, a_body(system="S", **asked), MODELS[SONNET])
    assert turns(written) == [{"content": f"{tags(tokens)}\n\nS\n\nhi"}]
    assert "additionalModelRequestFields" not in written
    assert chat.tagged_thinking is True
    assert faults_of(written, SONNET) == []


@pytest.mark.parametrize("asked", [{}, {"thinking": {"type": "disabled"}}])
@pytest.mark.parametrize("model", [SONNET, QWEN, "auto", GPT])
def test_no_thinking_is_asked_for_where_none_is_wanted(model: str, asked: Json) -> None:
    """Trap 21: without the question no tag in an answer is a thought."""
    written, chat = convert(MESSAGES, a_body(**asked), MODELS[model])
    assert turns(written) == [{"content": "hi"}] and chat.tagged_thinking is False
    fields = written.get("additionalModelRequestFields", {})
    assert fields in ({}, {"reasoning": {"effort": "none"}})


def test_tags_the_caller_has_written_are_not_doubled() -> None:
    """4.11: skip if the text already has them."""
    more = {"system": tags(20_000) + "\nS", "thinking": {"type": "enabled", "budget_tokens": 2000}}
    written, _ = convert(MESSAGES, a_body(**more), MODELS[SONNET])
    assert turns(written)[0]["content"].count("<thinking_mode>") == 1
    assert faults_of(written, SONNET) == []


def test_tags_come_before_a_first_turn_that_had_to_be_made_up() -> None:
    """4.11: at the very start."""
    asked = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
    written = a_to_k(a_body(assistant("T"), user("b"), **asked))
    assert turns(written)[0]["content"].startswith(tags(2000))


@pytest.mark.parametrize(
    ("model", "effort", "sent"),
    [
        (OPUS, "low", "low"),
        (OPUS, "minimal", "low"),
        (OPUS, "xhigh", "xhigh"),
        (OPUS, "max", "max"),
        (NEWER_SONNET, "xhigh", "high"),
        (NEWER_SONNET, "max", "max"),
    ],
)
def test_a_newer_claude_is_asked_in_its_own_fields(model: str, effort: str, sent: str) -> None:
    """4.11: with `display`, and an effort that its schema lists."""
    written = a_to_k(a_body(system="S", output_config={"effort": effort}), model)
    assert written["additionalModelRequestFields"] == {
        "thinking": {"type": "adaptive", "display": "summarized"},
        "output_config": {"effort": sent},
        "max_tokens": 1024,
    }
    assert turns(written) == [{"content": "S\n\nhi"}]


def test_a_newer_claude_is_told_not_to_think() -> None:
    """4.11: `disabled`, without an effort."""
    written = a_to_k(a_body(thinking={"type": "disabled"}), OPUS)
    assert written["additionalModelRequestFields"]["thinking"] == {"type": "disabled"}
    assert "output_config" not in written["additionalModelRequestFields"]


@pytest.mark.parametrize(
    ("asked", "effort"),
    [("high", "high"), ("minimal", "none"), ("xhigh", "xhigh"), ("none", "none")],
)
def test_gpt_is_asked_by_its_effort(asked: str, effort: str) -> None:
    """4.11: each family rejects the other's keys; the nearest below counts."""
    written = c_to_k(c_body(reasoning_effort=asked, max_tokens=9), GPT)
    assert written["additionalModelRequestFields"] == {"reasoning": {"effort": effort}}


@pytest.mark.parametrize("model", [QWEN, "deepseek-3.2"])
def test_a_model_without_thinking_is_not_asked_and_the_caller_is_told(model: str) -> None:
    """Trap 25: an effort never is a 400."""
    described = MODELS.get(model) or gw.read_kiro_model({"modelId": model}, "kiro")
    assert described is not None
    written, chat = convert(CHAT, c_body(reasoning_effort="high"), described)
    assert turns(written) == [{"content": "hi"}]
    assert "additionalModelRequestFields" not in written
    assert "thinking" in chat.dropped and not chat.tagged_thinking


@pytest.mark.parametrize(
    ("asked", "sent"), [(5, 1024), (5000, 5000), (128_000, 128_000), (999_999, 128_000)]
)
def test_max_tokens_are_clamped_to_what_the_schema_takes(asked: int, sent: int) -> None:
    """Trap 25: and sent only where there is a field for them."""
    written = a_to_k(a_body(max_tokens=asked), OPUS)
    assert written["additionalModelRequestFields"] == {"max_tokens": sent}
    assert "additionalModelRequestFields" not in a_to_k(a_body(max_tokens=asked), SONNET)


def test_a_limit_that_had_to_be_raised_is_named_as_dropped() -> None:
    """The answer may be longer than was asked for; one that was lowered can only be shorter."""
    for asked, named in ((5, True), (5000, False), (999_999, False)):
        assert (
            "max_tokens" in convert(MESSAGES, a_body(max_tokens=asked), MODELS[OPUS])[1].dropped
        ) is named


OWN = thinking("hm", ENVELOPE + "EqQBEXAMPLE+/==")


def test_a_thought_of_kiro_comes_back_nested() -> None:
    """4.11, trap 22: without our envelope, and only in the nested form."""
    written = a_to_k(a_body(user("a"), assistant([OWN, text("T")]), user("b")))
    assert turns(written)[1] == {
        "content": "T",
        "reasoningContent": {"reasoningText": {"text": "hm", "signature": "EqQBEXAMPLE+/=="}},
    }


def test_a_hidden_thought_of_kiro_comes_back_as_it_came() -> None:
    """4.5: `redactedContent`."""
    hidden = {"type": "redacted_thinking", "data": ENVELOPE + "RRR="}
    written = a_to_k(a_body(user("a"), assistant([hidden, text("T")]), user("b")))
    assert turns(written)[1]["reasoningContent"] == {"redactedContent": "RRR="}


def test_a_thought_that_was_never_shown_comes_back_with_what_stood_in_its_place() -> None:
    """4.11: GPT's, whose text is the literal `...`."""
    hidden = thinking("", ENVELOPE + ".KTR~~EXAMPLE")
    written = a_to_k(a_body(user("a"), assistant([hidden, text("T")]), user("b")), GPT)
    sent = {"reasoningText": {"text": "...", "signature": ".KTR~~EXAMPLE"}}
    assert turns(written)[1]["reasoningContent"] == sent


@pytest.mark.parametrize(
    "thought",
    [
        thinking("x", "EqQBEXAMPLE"),
        thinking("x", "gw1.r.abc"),
        thinking("x", "gw1.c.abc"),
        thinking("x", ""),
        thinking("x", ENVELOPE),
        {"type": "thinking", "thinking": "x"},
        {"type": "redacted_thinking", "data": "EXAMPLE"},
        {"type": "redacted_thinking", "data": ENVELOPE},
    ],
)
def test_a_thought_without_kiros_own_signature_is_dropped(thought: Json) -> None:
    """Case 10, trap 22: neither as reasoningContent nor as words."""
    written = a_to_k(a_body(user("a"), assistant([thought, text("T")]), user("b")))
    assert turns(written)[1] == {"content": "T"}


def test_reasoning_of_a_chat_client_is_dropped() -> None:
    """4.5 of the sheet of formats: C clients have no field for a signature of Kiro's."""
    turn = assistant("T", reasoning_content="hm", reasoning_opaque="B==")
    assert turns(c_to_k(c_body(user("a"), turn, user("b"))))[1] == {"content": "T"}


@pytest.mark.parametrize("rows", [[user("b")], []])
def test_an_answer_of_nothing_but_a_thought_is_no_turn(rows: list[Json]) -> None:
    """4.6 rule 7: drop assistant turns with neither text nor tools."""
    sent = turns(a_to_k(a_body(user("a"), assistant([OWN]), *rows)))
    assert all(turn["content"].strip() for turn in sent)


@pytest.mark.parametrize(
    "part", [IMAGE, {"type": "document", "source": PDF}, result("t1", "found")]
)
def test_an_answer_of_nothing_an_answer_can_hold_is_no_empty_turn(part: Json) -> None:
    """4.6 rule 7: it may go, move or become words, but never is a turn without any."""
    for rows in ([user("b")], []):
        sent = turns(a_to_k(a_body(user("a"), assistant([part]), *rows)))
        assert all(turn["content"].strip() for turn in sent)


def test_a_thought_before_a_call_keeps_its_turn() -> None:
    """4.11: without it Claude stops thinking after the first round of tools."""
    rows = [user("a"), assistant([OWN, use("t1")]), user([result("t1")])]
    sent = turns(a_to_k(a_body(*rows, tools=[a_tool()])))[1]
    assert sent["content"] == "" and "reasoningContent" in sent and "toolUses" in sent


# ---- what a body may hold ------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["text", "arguments", "result", "name", "description", "system"])
def test_a_lone_surrogate_never_reaches_the_wire(place: str) -> None:
    """4.6 rule 10."""
    bad = "a\ud83d"
    words = dict.fromkeys(["text", "arguments", "result", "name", "description", "system"], "a")
    words[place] = bad
    tool = a_tool(words["name"], description=words["description"])
    rows = [
        user(words["text"]),
        assistant([use("t1", words["name"], a=words["arguments"])]),
        user([result("t1", words["result"])]),
    ]
    written = a_to_k(a_body(*rows, tools=[tool], system=words["system"]))
    assert b"\\ud8" not in on_the_wire(written)
    assert on_the_wire(written).decode("utf-8")


def test_every_user_turn_names_the_model_and_no_answer_does() -> None:
    """4.6 rule 11: the upstream's id, not the caller's."""
    rows = [user("a"), assistant("b"), user("c")]
    state = a_to_k({**a_body(*rows), "model": "kiro/Claude-Sonnet-4-5"})["conversationState"]
    assert state["history"][0]["userInputMessage"]["modelId"] == SONNET
    assert state["currentMessage"]["userInputMessage"]["modelId"] == SONNET
    assert "modelId" not in state["history"][1]["assistantResponseMessage"]


def test_no_turn_of_results_is_padded() -> None:
    """Trap 11: models take the padding for the user's words."""
    rows = [user("q"), *[assistant([use("t1")]), user([result("t1")])] * 3]
    sent = turns(a_to_k(a_body(*rows, tools=[a_tool()])))
    assert [turn["content"] for turn in sent[1:]] == [""] * 6


def test_a_prefill_goes_into_history() -> None:
    """4.6 rule 6: not refused, as the rest of the conversation can be served."""
    for written in (
        a_to_k(a_body(user("a"), assistant("It is"))),
        c_to_k(c_body(user("a"), assistant("It is"))),
    ):
        assert turns(written) == [{"content": "a"}, {"content": "It is"}, {"content": "Continue"}]


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES])
def test_a_system_prompt_alone_is_what_the_user_says(dialect: Dialect) -> None:
    """4.6 rule 7: there are words, so there is something to answer."""
    system = {"role": "system", "content": "S"}
    written, _ = convert(dialect, {"model": "m", "messages": [system]}, MODELS[SONNET])
    assert "S" in turns(written)[-1]["content"]
    assert faults_of(written, SONNET) == []


def test_a_brace_begun_by_the_caller_is_a_wish_for_json() -> None:
    """4.6 rule 6: the last words say so."""
    (turn,) = turns(a_to_k(a_body(user("a"), assistant("{"))))
    assert turn["content"].startswith("a\n\n") and "JSON" in turn["content"]


def test_structured_output_stands_in_the_preface() -> None:
    """With its schema; in both dialects."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    for written in (
        c_to_k(c_body(response_format=wanted)),
        a_to_k(a_body(output_config=config)),
    ):
        assert json.dumps(schema, separators=(",", ":")) in turns(written)[0]["content"]
        assert "additionalModelRequestFields" not in written


def test_an_input_far_above_the_window_is_refused_in_known_words() -> None:
    """4.9: the client compacts; nothing is trimmed in silence."""
    error = refused(MESSAGES, a_body(user("word " * 500_000)))
    assert isinstance(error, gw.ContextTooLong) and "prompt is too long" in str(error)


def test_nothing_of_a_long_history_is_trimmed() -> None:
    """4.9."""
    rows = [row for at in range(300) for row in (user(f"q{at}"), assistant(f"a{at}"))]
    sent = turns(a_to_k(a_body(*rows, user("last"))))
    assert len(sent) == 601 and sent[300] == {"content": "q150"}


# ---- conversations by chance ---------------------------------------------------------------------

BLANK_WORDS = ["", " ", "\n\n", "\t"]
ODD_ENDS = ["", " ", "\n\n", "é\N{GRINNING FACE}", " half \ud83d", "\udc00 other half", "."]
ODD_IDS = ["t1", "t1", "t2", "t1_2", "call|abc+/", "x" * 64, "x" * 90, "", "é", "tooluse_1"]
ODD_NAMES = ["f", "g", "mcp__x__go", "a.b/c", "n" * 64, "n" * 65, "1st", "-", "s\ud83d"]
ODD_SCHEMAS: list[Any] = [
    {},
    None,
    EMPTY_SCHEMA,
    {"type": "object", "properties": {"a": {"type": "string", "format": "uri"}}, "required": ["a"]},
    {"type": "object", "properties": {"format": {"type": "string"}}, "required": []},
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/x"}},
        "$defs": {"x": {"type": "null"}},
    },
    {"type": "object", "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
    {"oneOf": [{"type": "object", "properties": {"c": {"type": "string"}}, "required": ["c"]}]},
]


class Dice:
    """Conversations that a client might send, and some that only a broken one would.

    Every word that must arrive carries a mark of its own (`w1w`, `w2w`, ...).
    """

    def __init__(self, seed: int, wild: bool) -> None:
        self.random = random.Random(seed)
        #: parts also in messages of the wrong role
        self.wild = wild
        self.marks: list[str] = []
        self.issued = Issued()

    def once_in(self, many: int) -> bool:
        return self.random.randrange(many) == 0

    def words(self) -> str:
        """Text, mostly with a mark in it."""
        if self.once_in(4):
            return self.random.choice(BLANK_WORDS)
        self.marks.append(f"w{len(self.marks)}w")
        return self.marks[-1] + self.random.choice(ODD_ENDS)

    def call_id(self) -> str:
        return self.random.choice(ODD_IDS)

    def name(self) -> str:
        return self.random.choice(ODD_NAMES)

    def arguments(self) -> Json:
        return {} if self.once_in(3) else {"a": self.words()}

    def signature(self, words: str) -> str:
        """Our own, another one, none."""
        own = ENVELOPE + self.issued.sign(words) if words else ""
        return self.random.choice([own, "EqQBEXAMPLE", "gw1.r.EXAMPLE", ""])

    def media(self) -> Json:
        document = {"type": "document", "source": PDF}
        return self.random.choice([IMAGE, IMAGE, document])

    def result_content(self) -> Any:
        kind = self.random.randrange(4)
        if kind == 0:
            return self.words()
        if kind == 1:
            return None
        return [text(self.words()) if self.once_in(2) else IMAGE for _ in range(kind)]

    def part(self, role: str) -> Json:
        """A part of a message in Anthropic's form."""
        choices = {"user": "text text media result result", "assistant": "text text call think"}
        kinds = choices.get(role, "text").split()
        if self.wild and self.once_in(3):
            kinds = ["text", "media", "result", "call", "think"]
        kind = self.random.choice(kinds)
        if kind == "media":
            return self.media()
        if kind == "result":
            is_error = self.once_in(3)
            return result(self.call_id(), self.result_content(), is_error=is_error)
        if kind == "call":
            return use(self.call_id(), self.name(), **self.arguments())
        if kind == "think":
            words = self.random.choice(["hm", "", "..."])
            return thinking(words, self.signature(words))
        return text(self.words())

    def content(self, role: str) -> Any:
        if self.once_in(3):
            return self.words()
        return [self.part(role) for _ in range(self.random.randrange(5))]

    def a_message(self) -> Json:
        role = self.random.choice(["user", "user", "assistant", "assistant", "system"])
        return {"role": role, "content": self.content(role)}

    def c_message(self) -> Json:
        role = self.random.choice(["user", "assistant", "assistant", "tool", "tool", "system"])
        if role == "tool":
            return tool_message(self.call_id(), self.result_content())
        if role != "assistant" or self.once_in(2):
            return {"role": role, "content": self.content(role)}
        calls = [
            function_call(self.call_id(), self.arguments_text(), self.name())
            for _ in range(self.random.randrange(3))
        ]
        content = None if self.once_in(3) else self.words()
        return assistant(content, tool_calls=calls, reasoning_content="hm")

    def arguments_text(self) -> str:
        """Arguments as models write them, some of them broken off."""
        if self.once_in(4):
            return self.random.choice(["", " ", "[1]", "null", '{"a": ', "{'a': 1}"])
        return json.dumps(self.arguments())

    def tools(self, make: Callable[[str, Any, str], Json]) -> list[Json]:
        """Tools without two that become one upstream."""
        names = dict.fromkeys(self.name() for _ in range(self.random.randrange(4)))
        descriptions = ["", "Does it.", "long words " * 1000, "half \ud83d" * 3000]
        return [
            make(name, self.random.choice(ODD_SCHEMAS), self.random.choice(descriptions))
            for name in names
        ]

    def body(self, dialect: Dialect) -> Json:
        """A request that says something at least."""
        anthropic = dialect is MESSAGES
        make = self.a_message if anthropic else self.c_message
        rows = [make() for _ in range(self.random.randrange(9))]
        spoken = user("w-spoken")
        rows.insert(self.random.randrange(len(rows) + 1), spoken)
        body: Json = {"model": "m", "messages": rows}
        body["tools"] = self.tools(a_tool if anthropic else c_tool)
        if anthropic:
            choices: list[Any] = [{"type": "none"}, {"type": "any"}, {"type": "auto"}]
            thoughts: list[Json] = [{}]
            thoughts += [{"thinking": {"type": "enabled", "budget_tokens": 3000}}]
            thoughts += [{"output_config": {"effort": "max"}}, {"thinking": {"type": "disabled"}}]
            body |= {"system": self.words(), "max_tokens": self.random.choice([1, 32_000, 10**6])}
        else:
            choices = ["none", "required", "auto"]
            thoughts = [{}, {"reasoning_effort": "xhigh"}, {"reasoning_effort": "none"}]
            body |= {"parallel_tool_calls": self.random.choice([True, False])}
        body |= self.random.choice(thoughts)
        if self.once_in(2):
            body["tool_choice"] = self.random.choice(choices)
        return body


def trouble_with(seed: int, dialect: Dialect, wild: bool) -> str:
    """What is wrong with one conversation by chance, "" when nothing is."""
    dice = Dice(seed, wild)
    body = dice.body(dialect)
    model = dice.random.choice([SONNET, OPUS, GPT, "auto", "claude-sonnet-4"])
    shape = dice.random.choice(["ide", "cli"])
    written, _ = convert(dialect, body, MODELS[model])
    sent = on_the_wire(written, shape).decode()
    found = faults_of(written, model, dice.issued, shape)
    if not wild:
        counts = {mark: sent.count(mark) for mark in [*dice.marks, "w-spoken"]}
        found += [f"{mark} is there {n} times" for mark, n in counts.items() if n != 1]
    return f"seed {seed}: {found} from {json.dumps(body)[:3000]}" if found else ""


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("first", range(0, 400, 50))
def test_any_conversation_is_taken_and_every_word_arrives_once(
    first: int, dialect: Dialect
) -> None:
    """4.6: ids reused, results missing or split, empty texts, lone surrogates, odd names."""
    troubles = [trouble_with(seed, dialect, wild=False) for seed in range(first, first + 50)]
    assert list(filter(None, troubles)) == []


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_parts_in_messages_of_the_wrong_role_do_no_harm(first: int, dialect: Dialect) -> None:
    """Results that an assistant says, calls and thoughts of a user: nobody should, some do."""
    troubles = [trouble_with(seed, dialect, wild=True) for seed in range(first, first + 50)]
    assert list(filter(None, troubles)) == []


def test_tools_that_differ_in_case_only_are_told_apart_and_history_finds_its_own() -> None:
    """Kiro ignores case: a stub for `LOOK` would be a second `look`."""
    calls = assistant([use("c1", "LOOK"), use("c2", "Run")])
    body = a_body(user("q"), calls, user([result("c1"), result("c2")]))
    body["tools"] = [a_tool("look"), a_tool("Save"), a_tool("save")]
    written, chat = convert(MESSAGES, body, MODELS[SONNET])
    names = [tool["name"] for tool in tools(written)]
    assert len({name.lower() for name in names}) == len(names) == 4
    assert {"look", "Save", "Run"} < set(names)
    (renamed,) = set(names) - {"look", "Save", "Run"}
    assert chat.client_names() == {renamed: "save"}
    uses = [turn.get("toolUses", ()) for turn in turns(written)]
    assert [use["name"] for row in uses for use in row] == ["look", "Run"]
