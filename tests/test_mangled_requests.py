"""Requests mangled in every field: whatever a client sends, nothing but a 4xx may come of it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import aiclient_api as gw

Json = dict[str, Any]
Path = tuple[Any, ...]

# Every JSON type, empty and full, with members that mean something elsewhere.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1.5,
    10**30,
    "",
    "\ud800",
    [],
    ["x"],
    [None],
    [[{}]],
    {},
    {"type": ["x"], "name": {}, "id": [], "role": 1, "content": {"a": 1}},
)
# Kinds of something: a field that holds them is read differently.
KINDS = (
    "text",
    "user",
    "assistant",
    "system",
    "tool",
    "any",
    "image",
    "adaptive",
    "namespace",
    "custom",
    "allowed_tools",
    "tool_use",
    "tool_result",
    "function_call",
    "shell_call",
    "shell_call_output",
)
PICTURE = "data:image/png;base64,iVBORw0KGgoAAA"
PDF = "data:application/pdf;base64,JVBE"
MARK: Json = {"type": "ephemeral", "ttl": "1h"}
SCHEMA: Json = {
    "type": "object",
    "required": ["a"],
    "additionalProperties": False,
    "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}, "b": {"const": 1}},
    "allOf": [{"properties": {"c": {"type": "string", "format": "uri"}}, "required": ["c"]}],
    "$defs": {"x": {"type": ["string", "null"]}},
}
GRAMMAR: Json = {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}
USER: Json = {"role": "user", "content": "u"}


def chat(*messages: Json, **settings: Any) -> Json:
    """A chat body."""
    return {"model": "m", "messages": list(messages) or [USER], **settings}


def messages(*turns: Json, **settings: Any) -> Json:
    """A messages body."""
    return {"model": "m", "max_tokens": 3000, "messages": list(turns) or [USER], **settings}


def responses(*items: Json, **settings: Any) -> Json:
    """A responses body."""
    return {"model": "m", "input": list(items) or "u", **settings}


def user(*parts: Json) -> Json:
    """A user's message."""
    return {"role": "user", "content": list(parts)}


def assistant(*parts: Json) -> Json:
    """The assistant's message."""
    return {"role": "assistant", "content": list(parts)}


def text(kind: str = "text") -> Json:
    """Words as a content part."""
    return {"type": kind, "text": "t", "cache_control": MARK}


def image(kind: str = "base64", **source: Any) -> Json:
    """Anthropic's image."""
    found = {"media_type": "image/png", "data": "iVBORw0KGgoAAA"}
    return {"type": "image", "source": {"type": kind, **(source or found)}}


def document(kind: str, **source: Any) -> Json:
    """Anthropic's document."""
    return {"type": "document", "title": "T", "source": {"type": kind, **source}}


def tool_use(call_id: str) -> Json:
    """A call in the messages dialect."""
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {"a": 1}}


def tool_result(call_id: str, *parts: Json) -> Json:
    """A result in the messages dialect."""
    return {
        "type": "tool_result",
        "tool_use_id": call_id,
        "is_error": True,
        "content": list(parts) or "r",
    }


def function(name: str = "f") -> Json:
    """A tool of the chat dialect."""
    declared = {"name": name, "description": "d", "parameters": SCHEMA, "strict": True}
    return {"type": "function", "function": declared}


def flat(kind: str = "function", **more: Any) -> Json:
    """A tool of the responses dialect."""
    return {"type": kind, "name": "f", "description": "d", **more}


def call(kind: str, call_id: str, **more: Any) -> Json:
    """An item of the responses dialect that is a call, or what came of one."""
    return {"type": kind, "call_id": call_id, "id": "i", **more}


ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
NAMESPACE = {"type": "namespace", "name": "n", "tools": [flat(), flat("custom", format=GRAMMAR)]}
# Together they hold every kind of tool, choice, part, item and setting; each is a good request.
SEEDS: dict[str, tuple[Json, ...]] = {
    "chat": (
        chat(
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=100,
            max_completion_tokens=9,
            temperature=0.5,
            top_p=1,
            top_k=3,
            stop=["a", "b"],
            n=1,
            user="u",
            seed=1,
            prompt_cache_key="k",
            safety_identifier="s",
            verbosity="low",
            logprobs=False,
            top_logprobs=0,
            logit_bias={},
            modalities=["text"],
            frequency_penalty=0,
            store=False,
            metadata={"a": "b"},
            prediction={"type": "content", "content": "p"},
        ),
        chat(
            reasoning_effort="high",
            reasoning={"effort": "low"},
            thinking={"type": "enabled", "budget_tokens": 2000},
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
            },
        ),
        chat(
            {"role": "system", "content": "S"},
            {"role": "developer", "content": [text()]},
            {
                "role": "user",
                "name": "n",
                "content": [
                    text(),
                    text("input_text"),
                    {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
                    image(),
                    {"type": "file", "file": {"filename": "n", "file_data": PDF}},
                    tool_result("a"),
                ],
            },
            {"role": "user", "name": "o", "content": "t"},
            {"role": "assistant", "content": "no", "refusal": "no", "reasoning_opaque": "o"},
            assistant({"type": "refusal", "refusal": "no"}),
            USER,
        ),
        chat(
            USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning_text": "r",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"id": "d", "type": "custom", "custom": {"name": "c", "input": "i"}},
                ],
            },
            {
                "role": "tool",
                "tool_call_id": "c",
                "content": [text(), {"type": "image_url", "image_url": {"url": PICTURE}}],
            },
            {"role": "tool", "tool_call_id": "d", "content": "r"},
            tools=[function(), flat(parameters=SCHEMA)],
            tool_choice={"type": "function", "function": {"name": "f"}},
            parallel_tool_calls=False,
        ),
        chat(
            USER,
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "r"},
            functions=[{"name": "f", "parameters": SCHEMA}],
            function_call={"name": "f"},
            web_search_options={},
        ),
        chat(
            tools=[function(), function("g")],
            stream=True,
            tool_choice={"type": "allowed_tools", "allowed_tools": ALLOWED},
        ),
    ),
    "messages": (
        messages(
            stream=True,
            stop_sequences=["x"],
            temperature=0.5,
            top_p=1,
            top_k=3,
            system=[{"type": "text", "text": "x-anthropic-billing-header: a"}, text()],
            metadata={"user_id": '{"session_id":"s"}'},
            context_management={"edits": []},
            cache_control=MARK,
            service_tier="auto",
            mcp_servers=[],
            container=None,
        ),
        messages(
            thinking={"type": "enabled", "budget_tokens": 2000, "display": "omitted"},
            output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
        ),
        messages(
            system="S",
            thinking={"type": "adaptive"},
            output_config={"effort": "low"},
            output_format={"type": "json_schema", "schema": SCHEMA},
        ),
        messages(
            user(
                text(),
                image(),
                document("text", data="d"),
                document("base64", media_type="application/pdf", data="JVBE"),
                document("content", content=[text()]),
                {"type": "search_result", "title": "T", "source": "s", "content": [text()]},
            )
        ),
        messages(
            USER,
            assistant(
                {"type": "thinking", "thinking": "x", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                tool_use("t1"),
                tool_use("t2"),
                {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "w",
                    "content": [{"type": "web_search_result", "title": "T", "url": "u"}],
                },
                {"type": "compaction", "content": "c"},
                {"type": "fallback"},
            ),
            user(
                tool_result("t1", text(), image(), {"type": "tool_reference", "tool_name": "z"}),
                tool_result("t2"),
                text(),
            ),
            {"role": "system", "content": [text(), tool_use("s"), tool_result("s"), image()]},
            USER,
        ),
        messages(
            tool_choice={"type": "auto", "disable_parallel_tool_use": True},
            tools=[
                {
                    "name": "f",
                    "description": "d",
                    "input_schema": SCHEMA,
                    "strict": True,
                    "cache_control": MARK,
                },
                {"type": "web_search_20250305", "name": "web_search"},
                {"type": "bash_20250124", "name": "bash"},
            ],
        ),
        messages(
            tool_choice={"type": "tool", "name": "f"},
            thinking={"type": "adaptive"},
            tools=[{"type": "custom", "name": "f", "input_schema": {"type": "object"}}],
        ),
    ),
    "responses": (
        responses(
            stream=True,
            max_output_tokens=100,
            temperature=0.5,
            top_p=1,
            include=[],
            store=False,
            reasoning={"effort": "high", "summary": "auto"},
            user="u",
            prompt_cache_key="k",
            instructions="I",
            metadata={"a": "b"},
            truncation="auto",
            background=False,
            prompt=None,
            previous_response_id=None,
            conversation=None,
            text={
                "verbosity": "low",
                "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
            },
        ),
        responses(
            {"role": "developer", "content": "D"},
            user(
                text("input_text"),
                {"type": "input_image", "image_url": PICTURE, "detail": "low"},
                {"type": "input_file", "filename": "n", "file_data": PDF},
            ),
            {
                "type": "message",
                "id": "i",
                **assistant(
                    {"type": "output_text", "text": "t", "annotations": []},
                    {"type": "refusal", "refusal": "no"},
                ),
            },
            {
                "type": "reasoning",
                "id": "r",
                "summary": [],
                "content": None,
                "encrypted_content": gw.pack("gw1.a.", {"thinking": "t", "signature": "s"}),
            },
            USER,
        ),
        responses(
            USER,
            call("function_call", "a", name="f", arguments="{}", namespace="n", status="done"),
            assistant(text("output_text")),
            call("function_call_output", "a", output="r"),
            call("custom_tool_call", "b", name="c", input="i"),
            call(
                "custom_tool_call_output",
                "b",
                output=[text("input_text"), {"type": "input_image", "image_url": PICTURE}],
            ),
        ),
        responses(
            call("local_shell_call", "s", action={"command": ["ls"]}),
            call("local_shell_call_output", "s", output={"stdout": "x"}),
            call("shell_call", "t", action={"commands": ["ls"]}),
            call("shell_call_output", "t", output=[{"stdout": "x"}]),
            call("apply_patch_call", "p", operation={"type": "update"}),
            call("apply_patch_call_output", "p", output="done"),
            call("computer_call", "k", action={"type": "click"}),
            call(
                "computer_call_output",
                "k",
                output={"type": "computer_screenshot", "image_url": PICTURE},
            ),
        ),
        responses(
            USER,
            call("tool_search_call", "s", execution="client", arguments={"q": "x"}),
            call("tool_search_output", "s", tools=[flat(parameters=SCHEMA)]),
            {"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]},
            {"type": "web_search_call", "id": "w", "results": [{"text": "t"}]},
            {"type": "code_interpreter_call", "outputs": [{"logs": "t"}], "output": "o"},
            tools=[{"type": "tool_search", "execution": "client", "parameters": SCHEMA}],
        ),
        responses(
            tools=[
                flat(parameters=SCHEMA, strict=None),
                {"type": "custom", "name": "c", "format": GRAMMAR},
                NAMESPACE,
                {"type": "web_search"},
            ],
            tool_choice={"type": "function", "name": "f", "namespace": "n"},
            parallel_tool_calls=False,
        ),
        responses(
            tools=[flat(), NAMESPACE],
            tool_choice={
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "f"}],
            },
        ),
        responses(tools=[flat("custom")], tool_choice={"type": "custom", "name": "f"}),
    ),
}
# What one upstream or another refuses, good as it is.
CUSTOM: Json = {"name": "c", "format": {"type": "grammar", "grammar": {"definition": "x"}}}
STRANGE: dict[str, tuple[Json, ...]] = {
    "chat": (
        chat(
            {"role": "user", "content": ["w", image("url", url="https://a/b")]},
            tools=[{"type": "custom", "custom": CUSTOM}, {"type": "web_search"}, function()],
            tool_choice={"type": "custom", "custom": {"name": "c"}},
        ),
    ),
    "messages": (
        messages(
            user(image("url", url="https://a/b"), {"type": "container_upload", "file_id": "f"}),
            assistant(text()),
            tools=[{"type": "web_search_20250305", "name": "web_search"}],
        ),
    ),
    "responses": (
        responses(
            {"type": "item_reference", "id": "i"},
            {"type": "compaction", "encrypted_content": "e"},
            tools=[{"type": "mcp"}],
            tool_choice={"type": "mcp", "server_label": "l"},
            previous_response_id="r",
        ),
    ),
}
KIRO_FIELDS: Json = {
    "max_tokens": {"minimum": 1, "maximum": 9000},
    "thinking": {"properties": {"type": {"enum": ["adaptive", "disabled"]}, "display": {}}},
    "output_config": {"properties": {"effort": {"enum": ["low", "high"]}}},
}
SONNET = gw.Model(
    "claude-sonnet-4.5", "p", vendor="Anthropic", budget=(1024, 32000), max_prompt=10**5, files=True
)
OPUS = gw.Model(
    "claude-opus-4.8",
    "p",
    vendor="Anthropic",
    adaptive=True,
    efforts=("low", "high"),
    raw={"additionalModelRequestFieldsSchema": {"properties": KIRO_FIELDS}},
)
GPT = gw.Model(
    "gpt-5.2", "p", vendor="OpenAI", stops=0, efforts=("low", "high"), max_output=10**4, files=True
)
GEMINI = gw.Model("gemini-3", "p", vendor="Google", budget=(128, 32000), files=True)
MODELS: dict[str, tuple[gw.Model, ...]] = {
    "chat": (gw.Model("gpt-4.1", "p", vendor="OpenAI", files=True), GPT, GEMINI, SONNET),
    "messages": (SONNET, OPUS),
    "responses": (GPT,),
    "kiro": (SONNET, OPUS),
}
ANSWERS: dict[str, Json] = {
    "chat": {
        "id": "i",
        "choices": [
            {
                "message": {
                    "content": "a",
                    "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                },
                "finish_reason": "tool_calls",
            }
        ],
    },
    "messages": {
        "id": "i",
        "content": [{"type": "text", "text": "a"}, tool_use("c")],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 1},
    },
    "responses": {
        "id": "i",
        "status": "completed",
        "output": [
            {"type": "message", "content": [{"type": "output_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        ],
    },
}


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every value inside of `value`."""
    rows: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    rows = enumerate(value) if isinstance(value, list) else rows
    for key, item in rows:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value: Any, path: Path, *new: Any) -> Any:
    """A copy of `value` with `new` at `path`, or with nothing there."""
    key, *deeper = path
    changed = value.copy()
    if deeper:
        changed[key] = replaced(value[key], tuple(deeper), *new)
    elif new:
        changed[key] = new[0]
    else:
        del changed[key]
    return changed


def mangled(name: str, chance: random.Random) -> Iterator[Json]:
    """Each field of each seed taken out and given each odd value; then several at once.

    Pieces of other seeds are put in as well: what is legal in one place stands in another.
    """
    seeds = (*SEEDS[name], *STRANGE[name])
    pieces: list[Any] = [*ODD_VALUES, *KINDS]
    for seed in seeds:
        for path in places(seed):
            yield replaced(seed, path)
            for value in ODD_VALUES:
                yield replaced(seed, path, value)
            piece: Any = seed
            for key in path:
                piece = piece[key]
            pieces += [piece] if isinstance(piece, (dict, list)) else []
    for _ in range(300):
        body = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 2, 3))):
            body = replaced(body, chance.choice([*places(body)]), chance.choice(pieces))
        yield {**chance.choice(seeds), **body}


def send(spoken: str, call: gw.Call, body: Json) -> None:
    """Makes of a call what goes up, with everything that looks at it on the way."""
    model, memory = call.model, gw.ReasoningMemory()
    memory.store(["a", "c", "t1"], "thought", gw.pack("gw1.r.", {"enc": "e"}))
    if spoken == "kiro":
        gw.attach_kiro_thinking(call.body, memory)
        gw.summarize_kiro_body(call.body)
        return
    lessons = {"thinking": ["enabled"], "system": ["turns"]} if body.get("stream") else {}
    scrub = gw.sanitize_body(spoken, call.body, model, lessons, True)
    gw.has_image([scrub.body.get("messages"), scrub.body.get("input")])
    gw.messages_betas(scrub.body, "", set(), model)
    if spoken == "chat":
        memory.attach(scrub.body)
        gw.CHAT.read_request(scrub.body)  # as the echo does
    elif spoken == "responses":
        memory.attach_items(scrub.body)
    gw.read_prompt(spoken, scrub.body, b"")
    gw.dump_json(scrub.body)
    gw.strip_reasoning(scrub.body)


def exchange(name: str, spoken: str, body: Json, model: gw.Model) -> None:
    """One request and its answer, by the functions that gateway and providers use."""
    asked, upstream = gw.DIALECTS[name], gw.UPSTREAM_DIALECTS[spoken]
    outline = asked.request_info(body)
    terms = gw.ResponseContext("id", 1, "m", request_body=body, include_usage=outline.include_usage)
    chat = gw.read_conversation(body, asked, upstream, terms)
    call = gw.write_call(body, chat, upstream, model, terms, outline)
    flow = gw.StreamTranslator(upstream, asked, terms, outline.stream, "r")
    send(spoken, call, body)
    if spoken in ANSWERS:
        flow.feed_buffered(gw.dump_json(ANSWERS[spoken]))
        assert outline.stream or flow.response_body()


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_seed_is_taken_by_every_upstream(name: str) -> None:
    for seed in SEEDS[name]:
        for spoken, models in MODELS.items():
            for model in models:
                exchange(name, spoken, seed, model)


@pytest.mark.parametrize("spoken", sorted(MODELS))
@pytest.mark.parametrize("name", sorted(SEEDS))
def test_a_mangled_request_is_answered_or_refused_with_its_field(name: str, spoken: str) -> None:
    """Each upstream is sent half of the bodies, each a half of its own."""
    seeds, models = copy.deepcopy(SEEDS[name]), MODELS[spoken]
    refused = 0
    coin = random.Random(f"{spoken} {name}")
    bodies = mangled(name, random.Random(f"{name} {spoken}"))
    for number, body in enumerate(body for body in bodies if coin.random() < 0.5):
        try:
            exchange(name, spoken, body, models[number % len(models)])
        except gw.ApiError as error:
            refused += 1
            assert 400 <= error.status < 500, body
            field = (error.param or "").partition(".")[0]
            assert field in body or any(field in seed for seed in seeds), (error, body)
    assert 0 < refused < number
    assert seeds == SEEDS[name], "what the client sent was written to"


def spellings(body: Json) -> Iterator[bytes]:
    """One body as different clients write it."""
    yield json.dumps(body).encode()
    yield json.dumps(body, indent="\t", separators=(" ,", " : ")).encode()
    yield gw.dump_json(body)
    # The same key twice in every object but the outermost: the last one counts.
    text = json.dumps(body).replace("{", '{"type": "repeated", ').replace("}", ', "id": "x"}')
    outermost = text.replace('{"type": "repeated", ', "{", 1).removesuffix(', "id": "x"}') + "}"
    yield outermost.replace(", }", "}").encode()


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_what_is_copied_from_a_request_is_what_would_be_written(name: str) -> None:
    copied = 0
    coin = random.Random(name)
    bodies = (body for body in mangled(name, random.Random(name)) if coin.random() < 0.1)
    for number, body in enumerate([*SEEDS[name], *bodies]):
        model = MODELS[name][number % len(MODELS[name])]
        for data in spellings(body):
            try:
                received = gw.load_body(data)
                call = gw.Call(model, name, received, gw.DIALECTS[name].request_info(received))
                call.received = received
                sent = gw.sanitize_body(name, call.body, model, {}, True).body
            except gw.ApiError:
                continue
            written = gw.dump_json(sent)
            dumped = call.dump(sent)
            assert json.loads(dumped) == json.loads(written), data
            assert repr(gw.load_body(data)) == repr(received), "the request was written to"
            copied += dumped != written
    assert copied > 50


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_what_no_rule_changes_goes_up_byte_by_byte(name: str) -> None:
    """Prompt caches depend on stable bytes; only what a rule replaces is written anew."""
    turns = '[ {"role":"user" , "content":"caf\u00e9 \\u00e9\\/"},\n{"content":"b","role":"user"}]'
    if name == "messages":
        turns = '[ {"content" : [{"text":"caf\u00e9 \\u00e9\\/" , "type":"text"}],"role":"user"}]'
    if name == "responses":
        turns = turns.replace('"role"', '"type":"message" , "role"')
    key = "input" if name == "responses" else "messages"
    text = f'{{ "model":"m", "{key}" :{turns}, "max_tokens":9, "temperature":1e0}}'
    received = gw.load_body(text.encode())
    call = gw.Call(MODELS[name][0], name, received, gw.DIALECTS[name].request_info(received))
    call.received = received
    sent = gw.sanitize_body(name, received, call.model, {}, True).body
    assert turns.encode() in call.dump(sent)
    changed = {**sent, key: [*sent[key], {"role": "user", "content": "new"}]}
    dumped = call.dump(changed)
    assert turns[:-1].rpartition("{")[2].encode() in dumped
    assert json.loads(dumped) == changed
    lone = gw.load_body(text.replace("\\u00e9", "\\ud800").encode())
    assert "\ufffd".encode() in lone.dump({**lone, "model": "other"})
