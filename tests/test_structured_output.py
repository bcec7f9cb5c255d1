"""Structured output: JSON is what comes, whatever way the upstream has to be made to send it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from fake_kiro import FakeKiro
from fakes import AnyPart, Call, FakeCopilot, Part, Say, anthropic, offered_tools, tool_results
from machine import wait_until
from support import Gateway
from test_copilot import (
    CHAT,
    GEMINI,
    GPT,
    MESSAGES,
    ONLY_MESSAGES,
    OPUS,
    SONNET,
    STREAMED,
    check_end,
    frames,
)
from test_responses import (
    CALLERS,
    CODEX,
    CONFIG,
    EVERY_CALLER,
    KIRO_SONNET,
    RESPONSES,
    Trio,
    answered,
    copilot_models,
    entry,
    hear,
    tool,
)

import aiclient_api as gw
from aiclient_api import BlockDelta, BlockStart, BlockStop, MessageStop

Json = dict[str, Any]

#: Lists structured outputs; speaks the messages dialect only.
LISTED = "claude-sonnet-5"
GROK = "grok-code-fast-1"
TOOL = "structured_output"
ANSWER = {"colour": "blue", "code": "```\nx = {}\n```"}
SCHEMA: Json = {
    "type": "object", "properties": {"colour": {"type": "string"}, "code": {"type": "string"}},
    "required": ["colour", "code"], "additionalProperties": False,
}  # fmt: skip
LIST: Json = {"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}
#: one of each upstream dialect and vendor that has no field for it
OTHERS = [SONNET, OPUS, ONLY_MESSAGES, GEMINI, GROK]
FINISHES = ("stop", "end_turn", "completed")


def wish(path: str, schema: Json | None = SCHEMA) -> Json:
    """The field that asks for structured output; without a schema, for any object."""
    if path == CHAT:
        named = {"name": "colours", "schema": schema, "strict": True}
        wanted = (
            {"type": "json_schema", "json_schema": named} if schema else {"type": "json_object"}
        )
        return {"response_format": wanted}
    if path == MESSAGES:
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    named = {"type": "json_schema", "name": "colours", "schema": schema, "strict": True}
    return {"text": {"format": named if schema else {"type": "json_object"}}}


def fenced(value: Any) -> str:
    """How a model likes to send JSON."""
    return f"\n```json\n{json.dumps(value, indent=2)}\n```\nThat is all."


def brain(dialect: str, body: Json) -> Sequence[AnyPart]:
    """Answers as it is made to: by a call, by the field; else, asked in words, with a fence."""
    text, schemas = json.dumps(body), dict(offered_tools(body))
    choice = body.get("tool_choice")
    value: Any = [1, 2] if "integer" in text else ANSWER
    if "say nothing useful" in text:
        return [Say("I would rather not.")]
    if dialect == "responses" or "response_format" in body or "output_config" in body:
        return [Say(json.dumps(value))]
    chatter = [Say("Let me see.")] if "chatter" in text else []
    if "use the tool" in text and not tool_results(dialect, body):
        return [*chatter, Call("look", {"path": "a"})]
    forced = json.dumps(choice)
    if TOOL in forced or "required" in forced or "any" in forced:
        wrapped = "value" in schemas[TOOL]["properties"]
        call = Call(TOOL, {"value": value} if wrapped else value)
        return [*chatter, call, call] if "twice" in text else [*chatter, call]
    return [Say(fenced(value))]


def kiro_brain(body: Json) -> list[Part]:
    """Kiro has no way but words."""
    text = json.dumps(body)
    assert "JSON" in text
    if "say nothing useful" in text:
        return [Say("I would rather not.")]
    return [Say(fenced([1, 2] if "integer" in text else ANSWER))]


@pytest.fixture(scope="module")
def running() -> Iterator[Trio]:
    """One gateway for all tests; they use models of their own where it remembers something."""
    listed = [entry(f"{LISTED}{n}", "claude-opus-4.8", ["/v1/messages"]) for n in ("", "-a", "-b")]
    for model in listed:
        model["capabilities"]["supports"]["structured_outputs"] = True
    models = [*copilot_models(), *listed]
    models += [entry("claude-opus-5.5", "claude-opus-4.8", ["/v1/messages"])]
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot(models, brain))
        kiro = stack.enter_context(FakeKiro(brain=kiro_brain))
        tokens: Json = {
            "copilot": {"type": "copilot", "github_token": fake.github_token},
            "kiro": kiro.token_file(),
        }
        config = CONFIG.format(copilot=fake.url, kiro=kiro.url)
        gateway = stack.enter_context(Gateway(config, tokens))
        stack.callback(check_end, gateway)
        yield Trio(fake, kiro, gateway)


@pytest.fixture
def trio(running: Trio) -> Iterator[Trio]:
    """The shared gateway; every rule must have been kept afterwards."""
    running.clear()
    yield running
    assert running.fake.violations == []
    assert running.kiro.violations == []


def output_of(reply: Any) -> Any:
    """The JSON of a complete answer without calls."""
    said = hear(reply)
    assert not said.calls and said.finish in FINISHES, said
    return json.loads(said.text)


def text_delta(row: Json) -> Any:
    """The text that one frame of a stream adds to the answer, in any dialect."""
    if row.get("type") == "response.output_text.delta":
        return row["delta"]
    if "choices" in row:
        return any(choice["delta"].get("content") for choice in row["choices"])
    return row.get("type") == "content_block_delta" and row["delta"].get("text")


def names(body: Json) -> list[str]:
    """The tools of a body."""
    return [name for name, _ in offered_tools(body)]


# ---- the ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "schema"),
    [
        *((model, schema) for model in [*OTHERS, KIRO_SONNET, LISTED] for schema in (SCHEMA, LIST)),
        (GPT, SCHEMA),
        (CODEX, SCHEMA),
    ],
)
@STREAMED
@EVERY_CALLER
def test_json_comes_from_every_model(
    trio: Trio, path: str, stream: bool, model: str, schema: Json
) -> None:
    reply = trio.ask(path, "hi", model, stream=stream, **wish(path, schema))
    assert output_of(reply) == ([1, 2] if schema is LIST else ANSWER)
    if model in OTHERS:
        (seen,) = trio.fake.calls
        assert names(seen.body) == [TOOL] and TOOL in json.dumps(seen.body["tool_choice"])
        assert "x-aiclient-dropped" not in reply.headers
    if stream and model in OTHERS and schema is SCHEMA and model != GEMINI:  # sends it in one piece
        deltas = [row for row in frames(reply.body) if text_delta(row)]
        assert len(deltas) > 1, reply.text


@pytest.mark.parametrize("model", [SONNET, ONLY_MESSAGES, GROK])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_any_object_comes_by_a_call(trio: Trio, path: str, model: str) -> None:
    assert output_of(trio.ask(path, "hi", model, **wish(path, None))) == ANSWER
    assert names(trio.fake.calls[0].body) == [TOOL]


def test_gemini_is_asked_in_words_for_an_object_without_schema(trio: Trio) -> None:
    """It sets no property that the schema does not name."""
    assert output_of(trio.ask(CHAT, "hi", GEMINI, **wish(CHAT, None))) == ANSWER
    assert "tools" not in trio.fake.calls[0].body


@STREAMED
@pytest.mark.parametrize("model", OTHERS)
@EVERY_CALLER
def test_tools_of_the_client_work_beside_it(
    trio: Trio, path: str, model: str, stream: bool
) -> None:
    more = {"tools": [tool(path)], "stream": stream, **wish(path)}
    first = trio.ask(path, "use the tool", model, **more)
    said = hear(first)
    assert [name for _, name, _ in said.calls] == ["look"]
    assert said.finish in ("tool_calls", "tool_use", "completed")
    key = "input" if path == RESPONSES else "messages"
    asked = [{"role": "user", "content": "use the tool"}]
    body = {"model": model, key: asked, **({} if path == RESPONSES else {"max_tokens": 4000})}
    reply = trio.post(path, answered(path, {**body, **more}, said, ["blue"]))
    assert output_of(reply) == ANSWER
    assert all(names(seen.body) == ["look", TOOL] for seen in trio.fake.calls)
    assert str(trio.fake.calls[1].body["tool_choice"]) in ("{'type': 'any'}", "required")


@STREAMED
@pytest.mark.parametrize("model", [GEMINI, SONNET, ONLY_MESSAGES, GROK])
@EVERY_CALLER
def test_words_before_the_call_are_dropped(trio: Trio, path: str, model: str, stream: bool) -> None:
    assert output_of(trio.ask(path, "chatter", model, stream=stream, **wish(path))) == ANSWER


@STREAMED
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_words_before_a_call_of_the_client_stay(trio: Trio, path: str, stream: bool) -> None:
    more = {"tools": [tool(path)], "stream": stream, **wish(path)}
    said = hear(trio.ask(path, "chatter, use the tool", SONNET, **more))
    assert said.text == "Let me see." and len(said.calls) == 1


@STREAMED
def test_a_second_call_is_not_sent_behind_the_first(trio: Trio, stream: bool) -> None:
    reply = trio.ask(CHAT, "twice", ONLY_MESSAGES, stream=stream, **wish(CHAT))
    assert output_of(reply) == ANSWER


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_choice_of_the_client_and_its_tool_of_that_name_stay(trio: Trio, path: str) -> None:
    named: Json = {"type": "tool", "name": "look"}
    if path == CHAT:
        named = {"type": "function", "function": {"name": "look"}}
    trio.ask(path, "hi", SONNET, tools=[tool(path)], tool_choice=named, **wish(path))
    own = trio.ask(path, "hi", SONNET, tools=[tool(path, TOOL)], **wish(path))
    assert output_of(own) == ANSWER
    first, second = (seen.body for seen in trio.fake.calls)
    assert names(first) == ["look"] and first["tool_choice"] == named
    assert names(second) == [TOOL] and "tool_choice" not in second


@STREAMED
@pytest.mark.parametrize(
    ("path", "model", "thinking"),
    [
        (MESSAGES, SONNET, {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        (MESSAGES, OPUS, {"thinking": {"type": "adaptive"}}),
        (CHAT, SONNET, {"reasoning_effort": "high"}),
        (CHAT, ONLY_MESSAGES, {"reasoning_effort": "high"}),
        (RESPONSES, OPUS, {"reasoning": {"effort": "high"}}),
    ],
)
def test_beside_thinking_it_is_asked_for_in_words(
    trio: Trio, path: str, model: str, thinking: Json, stream: bool
) -> None:
    reply = trio.ask(path, "hi", model, stream=stream, **thinking, **wish(path))
    assert output_of(reply) == ANSWER
    body = trio.fake.calls[0].body
    assert "tools" not in body and "JSON Schema" in json.dumps(body)
    assert ("thinking" in body) or ("thinking_budget" in body) or ("reasoning_effort" in body)


# ---- the field -----------------------------------------------------------------------------------


@EVERY_CALLER
def test_the_field_is_sent_where_the_model_lists_it(trio: Trio, path: str) -> None:
    """With thinking, too; the vendor wants each object closed."""
    efforts: dict[str, Json] = {
        CHAT: {"reasoning_effort": "high"}, RESPONSES: {"reasoning": {"effort": "high"}},
        MESSAGES: {"thinking": {"type": "adaptive"}},
    }  # fmt: skip
    schema = {key: value for key, value in SCHEMA.items() if key != "additionalProperties"}
    reply = trio.ask(path, "hi", LISTED, **efforts[path], **wish(path, schema))
    assert output_of(reply) == ANSWER
    body = trio.fake.calls[0].body
    assert body["output_config"]["format"] == {"type": "json_schema", "schema": SCHEMA}
    assert "tools" not in body and body["thinking"]["type"] == "adaptive"
    assert "x-aiclient-dropped" not in reply.headers


@pytest.mark.parametrize("schema", [{"type": "object"}, LIST], ids=["any object", "list"])
def test_the_field_is_not_used_for_an_open_object_or_another_root(trio: Trio, schema: Json) -> None:
    """The vendor wants each object closed, and an object at the root."""
    reply = trio.ask(MESSAGES, "hi", LISTED, **wish(MESSAGES, schema))
    assert output_of(reply) == ([1, 2] if schema is LIST else ANSWER)
    assert names(trio.fake.calls[0].body) == [TOOL]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_the_choice_of_no_tool_is_for_those_of_the_client(trio: Trio, path: str) -> None:
    choice: Any = "none" if path == CHAT else {"type": "none"}
    more = {"tools": [tool(path)], "tool_choice": choice, **wish(path)}
    assert output_of(trio.ask(path, "use none", SONNET, **more)) == ANSWER
    assert TOOL in json.dumps(trio.fake.calls[0].body["tool_choice"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{LISTED}-a", "FAILED_PRECONDITION: not allowed by the organization policy"),
        (f"{LISTED}-b", "output_config.format: Extra inputs are not permitted"),
    ],
)
def test_a_refusal_of_the_field_is_remembered(trio: Trio, model: str, message: str) -> None:
    refused = anthropic(message).answer()
    refused.strict = False
    trio.fake.queue(refused)
    for path in CALLERS:
        assert output_of(trio.ask(path, "hi", model, **wish(path))) == ANSWER
    first, *others = trio.fake.calls
    assert "format" in first.body["output_config"]
    assert [names(seen.body) for seen in others] == [[TOOL]] * 3
    assert not any("output_config" in seen.body for seen in others)


def test_a_refusal_of_the_forced_choice_is_remembered(trio: Trio) -> None:
    """Opus 5.5 takes no forced tool choice."""
    message = "tool_choice: Thinking may not be enabled when tool_choice forces tool use."
    refused = anthropic(message).answer()
    refused.strict = False
    trio.fake.queue(refused)
    for path in CALLERS:
        assert output_of(trio.ask(path, "hi", "claude-opus-5.5", **wish(path))) == ANSWER
    first, *others = trio.fake.calls
    assert names(first.body) == [TOOL]
    assert not any("tools" in seen.body for seen in others) and len(others) == 3


# ---- what is no JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SONNET, LISTED, KIRO_SONNET])
@STREAMED
@EVERY_CALLER
def test_text_that_is_no_json_is_reported(trio: Trio, path: str, model: str, stream: bool) -> None:
    """Without a word of it."""
    before = trio.gateway.log().count("structured_output_invalid")
    reply = trio.ask(path, "say nothing useful", model, stream=stream, **wish(path))
    assert hear(reply).text == "I would rather not."
    if not stream:
        assert "structured_output_invalid" in reply.headers["x-aiclient-dropped"]
    wait_until(lambda: trio.gateway.log().count("structured_output_invalid") > before)
    log = trio.gateway.log()
    assert log.count("structured_output_invalid") == before + 1
    assert model.rpartition("/")[2] in log and "rather" not in log


def filtered(kind: str, text: str, schema: Json | None, rng: random.Random) -> str:
    """What the client gets of text, or of a call's input, that comes in random pieces."""
    output = gw.OutputFormat(schema)
    context = gw.ResponseContext(id="x", created=0, model="m", output=output)
    output_filter = gw.OutputFilter(context, output)
    events: list[Any] = [BlockStart(kind, name=TOOL if kind == "tool" else "")]
    while text:
        size = rng.randint(1, 5)
        events.append(BlockDelta("text" if kind == "text" else "arguments", text[:size]))
        text = text[size:]
    events += [BlockStop(), MessageStop("tool" if kind == "tool" else "end")]
    passed = [item for event in events for item in output_filter.take(event)]
    assert passed[0] == BlockStart("text") and passed[-2:] == [BlockStop(), MessageStop("end")]
    return "".join(event.text for event in passed if isinstance(event, BlockDelta))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"a": "`` ```"}', '{"a": "`` ```"}'),
        ('```json\n{"a": "`` ```"}\n```', '{"a": "`` ```"}'),
        ("  \n```JSON \r\n\n[1,\n 2]\r\n```  \n", "[1,\n 2]"),
        ('```{"a": 1}```', '{"a": 1}'),
        ('```\n"x"\n```\nHope it helps: ```', '"x"'),
        ('```json\n{"a": "not closed', '{"a": "not closed'),
        ("```python is a language", "```python is a language"),
        ("Here it is:\n```\n1\n```", "Here it is:\n```\n1\n```"),
        ("true", "true"),
        ("", ""),
    ],
)
def test_a_code_fence_around_all_of_the_text_goes(text: str, kept: str) -> None:
    rng = random.Random(7)
    for _ in range(50):
        assert filtered("text", text, SCHEMA, rng).strip() == kept


@pytest.mark.parametrize(
    "value", [[1, {"value": {}}], "a } b", {"a": {"b": {"c": [{}]}}}, 4, None, True, "}", ""]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_value_is_taken_out_of_its_wrapper(value: Any, indent: int | None) -> None:
    rng = random.Random(7)
    text = json.dumps({"value": value}, indent=indent)
    for schema in ({"type": ["array", "null"]}, {"anyOf": [{"type": "string"}]}):
        for _ in range(50):
            assert json.loads(filtered("tool", text, schema, rng)) == value


@pytest.mark.parametrize("text", ["{}", "[1, 2]", json.dumps({"other": "x" * 200})])
def test_an_input_without_the_wrapper_stays(text: str) -> None:
    rng = random.Random(7)
    for _ in range(50):
        assert filtered("tool", text, {"type": "array"}, rng) == text


@pytest.mark.parametrize("text", ["\n" * 200_000, "```" + "`" * 200_000, "}" * 200_000])
def test_text_without_an_end_costs_linear_time_and_little_memory(text: str) -> None:
    assert len(filtered("text", f"```\n{text}", SCHEMA, random.Random(7))) <= len(text) + 4


def test_the_helper_of_the_openai_library_finds_its_model(trio: Trio) -> None:
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")
    colours = pydantic.create_model("Colours", colour=(str, ...), code=(str, ...))
    client = openai.OpenAI(base_url=f"{trio.gateway.url}/v1", api_key="x")
    for model in (SONNET, ONLY_MESSAGES, KIRO_SONNET):
        messages = [{"role": "user", "content": "hi"}]
        said = client.chat.completions.parse(
            model=model, messages=messages, response_format=colours
        )
        assert said.choices[0].message.parsed.colour == "blue"
        parsed = client.responses.parse(model=model, input="hi", text_format=colours)
        assert parsed.output_parsed.colour == "blue"
