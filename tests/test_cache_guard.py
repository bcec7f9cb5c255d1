"""The cache guard: which block of a prompt broke its cache, found by hashes, told without text."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from fakes import Answer, FakeCopilot, default_models
from machine import Machine, fetch, wait_until
from test_command_line import typed
from test_kiro import start as start_kiro

import aiclient_api as gw

Json = dict[str, Any]
SALT = b"salt of a process"
SECRET = "a sentence that only the prompt holds"
MARK = {"type": "ephemeral"}


# ---- prompts -----------------------------------------------------------------------------------


def text(words: str, **more: Any) -> Json:
    """A block of text."""
    return {"type": "text", "text": words, **more}


def tool(name: str, words: str = "does something") -> Json:
    """A tool as Anthropic knows it."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"name": name, "description": words, "input_schema": schema}


def user(*words: str) -> Json:
    """A user's message."""
    return {"role": "user", "content": [text(said) for said in words]}


def call(**arguments: Any) -> Json:
    """An assistant's message: a thought and a call."""
    thought = {"type": "thinking", "thinking": "well", "signature": "sig"}
    use = {"type": "tool_use", "id": "toolu_1", "name": "one", "input": arguments}
    return {"role": "assistant", "content": [thought, use]}


def result(words: str) -> Json:
    """A user's message with a tool's result."""
    block = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text(words)]}
    return {"role": "user", "content": [block]}


def conversation() -> Json:
    """A request to Anthropic in the middle of a conversation."""
    return {
        "model": "claude-sonnet-4.5",
        "tools": [tool("one"), tool("two"), tool("three")],
        "system": [text("You are a helper.", cache_control=MARK), text("Today is Monday.")],
        "messages": [user(SECRET), call(city="Paris", day=1), result("sunny"), user("and now?")],
    }


def grown(body: Json, *more: Json) -> Json:
    """The request after it, where all went well."""
    later = copy.deepcopy(body)
    later["messages"] += more or (call(city="Rome"), result("rain"))
    return later


def prompt(body: Json, dialect: str = "messages", salt: bytes = SALT) -> gw.Prompt:
    """A prompt as it comes from the wire: no object shared with another one."""
    return gw.read_prompt(dialect, json.loads(json.dumps(body)), salt)


def kiro(*turns: str, tools: int = 2) -> Json:
    """A conversation state with user and assistant in turns."""
    rows: list[Json] = []
    for at, words in enumerate(turns):
        if at % 2:
            rows.append({"assistantResponseMessage": {"content": words}})
        else:
            rows.append({"userInputMessage": {"content": words, "modelId": "m", "origin": "IDE"}})
    specs = [{"toolSpecification": {"name": f"tool{at}"}} for at in range(tools)]
    rows[-1]["userInputMessage"]["userInputMessageContext"] = {"tools": specs}
    *history, current = rows
    return {"conversationState": {"history": history, "currentMessage": current}}


NAMES: list[tuple[str, Json, str]] = [
    (
        "messages",
        conversation(),
        (
            "tools[0], tools[1], tools[2], system[0], system[1], settings, messages[0] (user), "
            "messages[1] (assistant), messages[2] (user), messages[3] (user)"
        ),
    ),
    (
        "messages",
        {"system": "s", "messages": [user("u")]},
        "system[0], settings, messages[0] (user)",
    ),
    (
        "chat",
        {"messages": [{"role": r, "content": "c"} for r in ("system", "user", "tool", SECRET)]},
        (
            "settings, messages[0] (system), messages[1] (user), messages[2] (tool), "
            "messages[3] (other)"
        ),
    ),
    (
        "responses",
        {
            "tools": [{"type": "function", "name": "f"}],
            "instructions": "i",
            "input": [
                {"role": "developer", "content": "d"},
                {"type": "message", "role": "user", "content": "u"},
                {"type": "reasoning", "encrypted_content": "r"},
                {"type": "function_call", "call_id": "c"},
                {"type": "function_call_output", "call_id": "c"},
                {"type": "item_reference", "id": "x"},
            ],
        },
        (
            "tools[0], instructions[0], settings, input[0] (developer), input[1] (user), "
            "input[2] (reasoning), input[3] (function_call), input[4] (function_call_output), "
            "input[5] (other)"
        ),
    ),
    ("responses", {"input": "just words"}, "settings, input[0] (user)"),
    (
        "kiro",
        kiro("u", "a", "u2"),
        (
            "tools[0], tools[1], settings, history[0] (user), history[1] (assistant), "
            "history[2] (user)"
        ),
    ),
]


@pytest.mark.parametrize(("dialect", "body", "names"), NAMES)
def test_blocks_are_named_by_where_they_stand(dialect: str, body: Json, names: str) -> None:
    found = prompt(body, dialect)
    assert ", ".join(map(found.name, range(len(found.hashes)))) == names
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("messages", {}),
        ("chat", {"messages": "words", "tools": {"a": 1}}),
        ("chat", {"messages": [None, 3, ["a"], {"role": ["x"]}, {"content": {"text": 1}}]}),
        ("responses", {"input": None, "tools": None}),
        ("kiro", {}),
        ("kiro", {"conversationState": {"history": "x", "currentMessage": 3}}),
        ("messages", {"messages": [user("cut \ud83d in half")]}),
    ],
)
def test_no_body_is_too_odd_to_be_read(dialect: str, body: Json) -> None:
    found = prompt(body, dialect)
    assert len(set(map(found.name, range(len(found.hashes))))) == len(found.hashes)
    assert found == prompt(body, dialect)


def hashed(block: Any, salt: bytes = SALT) -> int:
    """The hash of one block."""
    return gw.hash_block(block, salt)[0]


CITY = json.loads('["Paris"]')[0]
SAME: list[tuple[Any, Any]] = [
    (user("hello"), {"content": [text("hello")], "role": "user"}),
    (user("hello"), {"role": "user", "content": "hello"}),  # a string until it is marked
    (text("hello", cache_control=MARK), "hello"),
    (tool("one"), {**tool("one"), "cache_control": MARK}),
    ({"role": "user", "content": "x"}, {"role": "user", "content": "x", "cachePoint": {}}),
    (
        {"role": "tool", "content": "x"},
        {"copilot_cache_control": MARK, "content": "x", "role": "tool"},
    ),
    (
        {"type": "tool_result", "tool_use_id": "t", "content": [text("x")]},
        {"content": [text("x", cache_control=MARK)], "tool_use_id": "t", "type": "tool_result"},
    ),
    (["Paris", "Paris"], ["Paris", CITY]),  # one object twice, and two
]
OTHER: list[tuple[Any, Any]] = [
    (user("hello"), user("hello ")),
    (user("a", "b"), user("ab")),
    (user("a", "b"), user("b", "a")),
    (call(city="Paris", day=1), call(day=1, city="Paris")),  # shown to the model as text
    (call(day=1), call(day="1")),
    (call(day=1), call(day=True)),
    (call(day=None), call()),
    (tool("one"), tool("two")),
    (text("x", citations=[]), text("x")),
    ({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}),
    ("\ud83d", "\ufffd"),
]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_equal_blocks_have_equal_hashes(one: Any, two: Any) -> None:
    assert hashed(one) == hashed(two) == hashed(copy.deepcopy(two))


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_different_blocks_have_different_hashes(one: Any, two: Any) -> None:
    assert hashed(one) != hashed(two)


def test_hashes_tell_nothing_without_the_salt() -> None:
    """The same words hash to other numbers in another process."""
    one, two = prompt(conversation()), prompt(conversation(), salt=b"salt of another")
    assert not set(one.hashes) & set(two.hashes)
    assert list(one.sizes) == list(two.sizes)
    assert all(0 <= number < 2**64 for number in one.hashes)


# ---- what is a miss ------------------------------------------------------------------------------


def answer(
    at: float = 0.0,
    *,
    read: int = 0,
    write: int = 0,
    fresh: int = 0,
    source: str = "reported",
    model: str = "claude-sonnet-4.5",
    label: str = "claude-cli",
    first_byte_s: float | None = 1.0,
) -> gw.UsageRecord:
    """An answer with these tokens in its prompt."""
    return gw.UsageRecord(
        at=at,
        provider="copilot",
        account="",
        model=model,
        label=label,
        dialect="messages",
        streamed=True,
        duration_s=2.0,
        first_byte_s=first_byte_s,
        usage=gw.Usage(fresh, read, write, output=5, source=source),
    )


def look(
    guard: gw.CacheGuard,
    body: Json,
    record: gw.UsageRecord,
    session: str = "s",
    opening: str = "opening",
) -> Json | None:
    """What the guard has to log of one request to Anthropic."""
    return guard.record(record, session, opening, prompt(body))


Kw = dict[str, Any]
WRITTEN: Kw = {"write": 19_000, "fresh": 1_000}  # the first call: all but the end is kept
HIT: Kw = {"read": 19_000, "write": 1_000, "fresh": 500}
MISS: Kw = {"read": 0, "write": 20_000, "fresh": 500}

Change = Callable[[Json], None]


def date(body: Json) -> None:
    """Another day in the system prompt."""
    body["system"][1]["text"] = "Today is Tuesday."


def swap_tools(body: Json) -> None:
    """The same tools in another order."""
    body["tools"][1:] = reversed(body["tools"][1:])


def drop_tool(body: Json) -> None:
    """The second tool is gone."""
    del body["tools"][1]


def drop_last_tool(body: Json) -> None:
    """The third tool is gone."""
    del body["tools"][2]


def add_tool(body: Json) -> None:
    """A tool before the others."""
    body["tools"].insert(0, tool("zero"))


def new_words_for_tool(body: Json) -> None:
    """Another description."""
    body["tools"][2]["description"] = "does something else"


def drop_thought(body: Json) -> None:
    """An old answer without its thinking."""
    del body["messages"][1]["content"][0]


def edit_first(body: Json) -> None:
    """The first message in other words."""
    body["messages"][0] = user("something else")


def think(body: Json) -> None:
    """Thinking switched on."""
    body["thinking"] = {"type": "enabled", "budget_tokens": 2000}


def add_system(body: Json) -> None:
    """One more block in the system prompt."""
    body["system"].insert(1, text("By the way."))


def cut_result(body: Json) -> None:
    """An old tool result was cut."""
    body["messages"][2]["content"][0]["content"] = "(cut)"


CHANGES: list[tuple[Change, str, str]] = [
    (date, "system[1]", "date"),
    (add_system, "system[1]", "date"),
    (swap_tools, "tools[1]", "order"),
    (drop_tool, "tools[1]", "differs"),
    (add_tool, "tools[0]", "differs"),
    (new_words_for_tool, "tools[2]", "differs"),
    (drop_last_tool, "tools[2]", "differs"),
    (drop_thought, "messages[1] (assistant)", "thinking"),
    (edit_first, "messages[0] (user)", "old message"),
    (cut_result, "messages[2] (user)", "old message"),
    (think, "settings", "thinking"),
]


@pytest.mark.parametrize(("change", "block", "hint"), CHANGES)
def test_the_first_block_that_changed_is_named(change: Change, block: str, hint: str) -> None:
    guard, body = gw.CacheGuard(SALT), conversation()
    later = grown(body)
    change(later)
    assert look(guard, body, answer(**WRITTEN)) is None
    found = look(guard, later, answer(10.0, **MISS))
    assert found is not None and (found["block"], found["tokens"]) == (block, 19_000)
    assert hint in found["hint"]
    # The service's own figures are the last word.
    assert look(guard, body, answer(20.0, **HIT)) is None


def again(body: Json) -> Json:
    """The same request."""
    return body


def compacted(body: Json) -> Json:
    """The older half dropped."""
    return {**body, "messages": body["messages"][2:]}


def summed_up(body: Json) -> Json:
    """The first message, then a summary."""
    return {**body, "messages": [body["messages"][0], user("what was said")]}


def rewound(body: Json) -> Json:
    """Back to an earlier message."""
    return {**body, "messages": body["messages"][:-1]}


def marked(body: Json) -> Json:
    """The marks moved to the newest message, as every client moves them."""
    later = grown(body)
    del later["system"][0]["cache_control"]
    later["messages"][-1]["content"][0]["cache_control"] = MARK
    return later


def dated(body: Json) -> Json:
    """Another day in the system prompt."""
    later = grown(body)
    date(later)
    return later


NO_MISSES: list[tuple[str, Callable[[Json], Json], Kw, Kw]] = [
    ("goes on", grown, WRITTEN, HIT),
    ("marks move", marked, WRITTEN, MISS),
    ("the same once more", again, WRITTEN, {"read": 19_000, "fresh": 1000}),
    ("the service lost it", grown, WRITTEN, MISS),
    ("the end alone is read anew", dated, WRITTEN, {"read": 17_400, "fresh": 2_000}),
    ("nothing to keep", dated, {"write": 900, "fresh": 50}, {"fresh": 1000}),
    ("six minutes later", dated, WRITTEN, {"at": 360.0, **MISS}),
    ("asked before it was answered", dated, WRITTEN, {"at": 0.5, **MISS}),
    ("older messages dropped", compacted, WRITTEN, {"write": 9000}),
    ("summed up", summed_up, WRITTEN, {"write": 9000}),
    ("back, and nothing is there", rewound, WRITTEN, {"write": 15_000}),
    ("another model", dated, WRITTEN, {"model": "claude-opus-4.5", **MISS}),
    ("another client", dated, WRITTEN, {"label": "curl", **MISS}),
]


@pytest.mark.parametrize(
    ("change", "before", "after"), [row[1:] for row in NO_MISSES], ids=[row[0] for row in NO_MISSES]
)
def test_what_is_no_miss(change: Callable[[Json], Json], before: Kw, after: Kw) -> None:
    guard, body = gw.CacheGuard(SALT), conversation()
    look(guard, body, answer(**before), "")
    assert look(guard, change(body), answer(**{"at": 10.0, **after}), "") is None
    assert all(row["lost_tokens"] == 0 for row in guard.report())


def test_a_change_is_found_where_the_service_reports_no_figures() -> None:
    """Kiro's tokens are derived from the share of its window: all that is known are the hashes."""
    guard = gw.CacheGuard(SALT)
    turns = ["a preface of Monday\n\n" + "words " * 400, "an answer", "more", "ok", "and?"]
    changed = ["a preface of Tuesday\n\n" + "words " * 400, *turns[1:]]
    usage: Kw = {"fresh": 20_000, "source": "derived"}

    def ask(at: float, turns: list[str]) -> Json | None:
        return guard.record(answer(at, **usage), "s", "hi", prompt(kiro(*turns), "kiro"))

    assert ask(0.0, turns[:3]) is ask(10.0, turns) is None
    found = ask(20.0, changed)
    assert found is not None and found["block"] == "history[0] (user)"
    assert 15_000 < found["tokens"] <= 20_000 and "Kiro" in found["hint"]
    row = guard.report()[0]
    assert row["hit_ratio"] is None and row["changed"]["times"] == 1


def test_openai_reports_what_it_read_only() -> None:
    """All of a prompt of 1,024 tokens should be there then, whether or not that was reported."""
    guard, body = gw.CacheGuard(SALT), conversation()
    gpt: Kw = {"model": "gpt-5"}
    look(guard, body, answer(0.0, fresh=20_000, **gpt))
    later = grown(body)
    assert look(guard, later, answer(10.0, read=19_968, fresh=500, **gpt)) is None
    found = look(guard, dated(later), answer(20.0, fresh=21_000, **gpt))
    assert found is not None and (found["block"], found["tokens"]) == ("system[1]", 19_968)


def test_a_service_that_caches_only_what_is_marked_is_not_blamed() -> None:
    """Once a model reported what it writes, a prompt of which nothing was written is not missed."""
    guard, body = gw.CacheGuard(SALT), conversation()
    look(guard, body, answer(0.0, **WRITTEN))
    look(guard, body, answer(10.0, fresh=20_000), "t")
    assert look(guard, dated(body), answer(20.0, fresh=20_500), "t") is None


# ---- which conversation it is ------------------------------------------------------------------


def test_conversations_are_told_apart() -> None:
    """By session, or by client where there is none; in each by the first words and the model."""
    guard, body = gw.CacheGuard(SALT), conversation()
    for session, opening, label, model in (
        ("s", "one", "a", "m"),
        ("t", "one", "a", "m"),
        ("s", "two", "a", "m"),
        ("", "one", "a", "m"),
        ("", "one", "b", "m"),
    ):
        row = answer(label=label, model=model, **WRITTEN)
        look(guard, body, row, session, opening)
    look(guard, body, answer(model="n", **WRITTEN), "s", "one")
    look(guard, body, answer(model="m", label="another", **WRITTEN), "s", "one")
    rows = guard.report()
    assert sorted(row["calls"] for row in rows) == [1, 1, 1, 1, 1, 2]
    assert len({row["conversation"] for row in rows}) == 5  # that of two models is one


def test_a_date_in_the_system_prompt_makes_no_new_conversation() -> None:
    guard, body = gw.CacheGuard(SALT), conversation()
    for minute in range(39):
        body["system"][1]["text"] = f"It is 12:{minute}."
        look(guard, body, answer(60.0 * minute, **MISS), "")
        body = grown(body)
    [row] = guard.report()
    assert (row["changed"]["block"], row["changed"]["times"], row["calls"]) == ("system[1]", 38, 39)


# ---- what is kept and reported -----------------------------------------------------------------


def test_the_report_adds_up() -> None:
    guard, body = gw.CacheGuard(SALT), conversation()
    look(guard, body, answer(0.0, **WRITTEN))
    look(guard, grown(body), answer(10.0, **HIT))
    found = look(guard, dated(grown(body)), answer(20.0, **MISS))
    assert found is not None
    assert guard.report() == [
        {
            "conversation": found["conversation"],
            "provider": "copilot",
            "model": "claude-sonnet-4.5",
            "label": "claude-cli",
            "calls": 3,
            "hit_ratio": round(19_000 / 61_000, 4),
            "input_tokens": 61_000,
            "cache_read_tokens": 19_000,
            "lost_tokens": 20_000,
            "last_at": 20.0,
            "changed": {
                "block": "system[1]",
                "times": 1,
                "hint": "a date, a time or an id in the system prompt?",
            },
        }
    ]
    assert SECRET not in repr(guard.watched)


def test_the_same_miss_is_news_only_now_and_then() -> None:
    """A client whose every call changes a block must not fill the log."""
    guard, body = gw.CacheGuard(SALT), conversation()
    news = []
    for call_number in range(100):
        at = 20.0 * call_number
        body["system"][1]["text"] = f"It is {at}."
        news += [at] if look(guard, body, answer(at, **MISS)) else []
    assert news == [20.0, 620.0, 1220.0, 1820.0]
    swap_tools(body)
    assert look(guard, body, answer(2000.0, **MISS))  # another part


def test_a_block_that_wanders_is_one_kind_of_miss() -> None:
    """A reminder put into each last message is logged once, not once for each place."""
    guard, body = gw.CacheGuard(SALT), conversation()
    logged = 0
    for number in range(10):
        at = len(body["messages"]) - 1
        body["messages"][at] = user(f"reminder {number}")
        logged += look(guard, body, answer(10.0 * number, **MISS)) is not None
        body["messages"][at] = user(f"plain {number}")
        body = grown(body, call(city=str(number)), result("ok"))
    [row] = guard.report()
    assert logged == 1 and row["changed"]["times"] == 9


def test_conversations_are_bounded_and_the_latest_come_first() -> None:
    guard, found = gw.CacheGuard(SALT), prompt(conversation())
    for number in range(gw.MAX_WATCHED + 50):
        guard.record(answer(float(number), **MISS), str(number), "", found)
    assert len(guard.watched) == gw.MAX_WATCHED
    last = [row["last_at"] for row in guard.report()]
    assert last == sorted(last, reverse=True) and len(last) == gw.MAX_WATCHED
    assert last[-1] == 50.0  # the first ones went first


def test_blocks_are_bounded() -> None:
    """What comes behind the bound is not compared, and not missed."""
    body = conversation()
    body["messages"] = [user(str(number)) for number in range(gw.MAX_WATCHED_BLOCKS + 100)]
    guard = gw.CacheGuard(SALT)
    found = prompt(body)
    assert len(found.hashes) == len(found.sizes) == len(found.parts) == gw.MAX_WATCHED_BLOCKS
    look(guard, body, answer(0.0, **WRITTEN))
    body["messages"][-1] = user("other")
    assert look(guard, body, answer(20.0, **MISS)) is None


def test_a_clock_set_back_breaks_nothing() -> None:
    guard, body = gw.CacheGuard(SALT), conversation()
    look(guard, body, answer(10_000.0, **WRITTEN))
    assert look(guard, dated(body), answer(10.0, **MISS)) is None
    assert look(guard, grown(dated(body)), answer(20.0, **HIT)) is None


# ---- end to end --------------------------------------------------------------------------------

PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
SONNET, GPT, CODEX = "claude-sonnet-4.5", "gpt-4.1", "gpt-5.3-codex"


@dataclass
class Gateway:
    """The real program before an imitation of Copilot."""

    machine: Machine
    status: Json
    fake: FakeCopilot

    def ask(self, dialect: str, body: Json, label: str) -> None:
        """One request, and its answer."""
        agent = [f"User-Agent: {label}/1.0"]
        reply = fetch(self.status, PATHS[dialect], body, agent)
        assert reply.status == 200 and reply.complete, reply

    def row(self, label: str, calls: int) -> Json:
        """The only conversation of one client, when so many of its calls have been looked at."""
        found: list[Json] = []

        def is_there() -> bool:
            report = fetch(self.status, "/v1/usage?cache=1").json()["cache"]["conversations"]
            found[:] = [row for row in report if row["label"] == label]
            return sum(int(row["calls"]) for row in found) == calls

        wait_until(is_there)
        assert len(found) == 1, found
        return found[0]

    def logged(self, row: Json) -> list[str]:
        """The lines of log about one conversation."""
        lines = self.machine.log().splitlines()
        mark = f"conversation={row['conversation']}"
        return [line for line in lines if " cache_miss " in line and mark in line]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """One gateway for all; nothing of any prompt may be in its log or its report."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    with FakeCopilot(default_models()) as fake:
        config = f'[providers.copilot]\ngithub_url = "{fake.url}"\ngithub_api_url = "{fake.url}"\n'
        with Machine(config) as machine:
            folder = machine.config / "copilot"
            folder.mkdir(mode=0o700)
            token = folder / "token.json"
            token.touch(mode=0o600)
            token.write_text(json.dumps({"type": "copilot", "github_token": fake.github_token}))
            made = Gateway(machine, machine.start(), fake)
            yield made
            shown = machine.log() + machine.run("usage", "--cache").out
            assert "Traceback" not in shown
            for words in (SECRET, "Monday", "Tuesday", "question", "lookup"):
                assert words not in shown
            assert fake.violations == []


def asking(label: str, dialect: str, model: str, day: str, turns: int, size: int = 20_000) -> Json:
    """A request of a client that writes the day into its system prompt; `size` in characters."""
    rules = f"{SECRET} {label}. It is {day}. " + "All of this is a rule. " * (size // 23)
    said = [
        {"role": ("user", "assistant")[at % 2], "content": f"question or answer {at}"}
        for at in range(turns)
    ]
    common = {"model": model, "stream": True}
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    if dialect == "responses":
        function = {"type": "function", "name": "lookup", "parameters": schema, "strict": False}
        return {**common, "instructions": rules, "input": said, "tools": [function]}
    if dialect == "messages":
        system = [text("Be brief."), text(rules, cache_control=MARK)]
        offered = {"name": "lookup", "description": "Looks.", "input_schema": schema}
        return {**common, "max_tokens": 4000, "system": system, "messages": said,
                "tools": [offered]}  # fmt: skip
    block = text(rules, cache_control=MARK) if model == SONNET else text(rules)
    messages = [{"role": "system", "content": [block]}, *said]
    function = {"name": "lookup", "description": "Looks.", "parameters": schema}
    return {**common, "messages": messages, "tools": [{"type": "function", "function": function}]}


# (asked in, model, the block that changes, whether the service tells what it read)
ROUTES = [
    ("messages", SONNET, "system[1]", True),
    ("chat", SONNET, "messages[0] (system)", True),
    ("responses", CODEX, "instructions[0]", True),
    ("chat", GPT, "messages[0] (system)", False),
]


@pytest.mark.parametrize(("dialect", "model", "block", "is_told"), ROUTES)
@pytest.mark.parametrize("size", [20_000, 300_000], ids=["small", "in a thread"])
def test_a_day_in_the_system_prompt_is_found(
    gateway: Gateway, dialect: str, model: str, block: str, is_told: bool, size: int
) -> None:
    label = f"{dialect}-{model}-{size}"
    for turns in (1, 3, 5):
        gateway.ask(dialect, asking(label, dialect, model, "Monday", turns, size), label)
    row = gateway.row(label, 3)
    assert row["changed"] is None and row["lost_tokens"] == 0 and gateway.logged(row) == []
    assert (row["hit_ratio"] is not None) == is_told
    gateway.ask(dialect, asking(label, dialect, model, "Tuesday", 7, size), label)
    row = gateway.row(label, 4)
    assert (row["provider"], row["model"]) == ("copilot", model)
    assert (row["changed"]["block"], row["changed"]["times"]) == (block, 1)
    assert row["lost_tokens"] > size / 10
    [line] = gateway.logged(row)
    assert " WARNING cache_miss provider=copilot " in line
    assert f"model={model}" in line and f"block={block} " in line.replace('"', "")
    gateway.ask(dialect, asking(label, dialect, model, "Wednesday", 9, size), label)
    row = gateway.row(label, 5)
    assert row["changed"]["times"] == 2 and len(gateway.logged(row)) == 1  # told just now


def test_who_marks_nothing_is_not_told_of_misses(gateway: Gateway) -> None:
    """Claude caches what is marked; a caller that could mark and does not gets its way."""
    for turns, day in ((1, "Monday"), (3, "Tuesday"), (5, "Wednesday")):
        body = asking("unmarked", "messages", SONNET, day, turns)
        del body["system"][1]["cache_control"]
        gateway.ask("messages", body, "unmarked")
    row = gateway.row("unmarked", 3)
    assert (row["hit_ratio"], row["changed"]) == (0.0, None)
    assert gateway.logged(row) == []


def test_what_is_watched_is_what_was_sent(gateway: Gateway) -> None:
    """Claude Code's billing line, another one each time, is taken out before."""
    for number, day in enumerate(("Monday", "Tuesday")):
        body = asking("billed", "messages", SONNET, day, 2 * number + 1)
        body["system"].insert(0, text(f"x-anthropic-billing-header: cc_version=2; cch={number};"))
        gateway.ask("messages", body, "billed")
    assert gateway.row("billed", 2)["changed"]["block"] == "system[1]"


def test_the_order_of_tools_is_found(gateway: Gateway) -> None:
    """A program that keeps its tools in a set."""
    body = asking("unordered", "messages", SONNET, "Monday", 1)
    body["tools"] = [{**body["tools"][0], "name": f"lookup_{at}"} for at in range(4)]
    for number, order in enumerate(([0, 1, 2, 3], [0, 2, 1, 3])):
        asked = {**body, "tools": [body["tools"][at] for at in order]}
        if number:
            gateway.fake._interactions.clear()  # noqa: SLF001 - its cache knows no order
        gateway.ask("messages", asked, "unordered")
    row = gateway.row("unordered", 2)
    assert row["changed"]["block"] == "tools[1]"
    assert "order" in row["changed"]["hint"]


def test_what_fails_is_not_compared(gateway: Gateway) -> None:
    """An answer that never came says nothing of a cache."""
    body = asking("failing", "messages", SONNET, "Monday", 1)
    gateway.ask("messages", body, "failing")
    gateway.fake.queue(Answer(422, {"Content-Type": "text/plain"}, [b"filtered"]))
    other = asking("failing", "messages", SONNET, "Tuesday", 3)
    reply = fetch(gateway.status, PATHS["messages"], other, ["User-Agent: failing/1.0"])
    assert reply.status == 400
    gateway.ask("messages", body, "failing")
    row = gateway.row("failing", 2)
    assert row["cache_read_tokens"] > 0 and row["changed"] is None


def test_usage_cache_shows_a_table(gateway: Gateway) -> None:
    """On a terminal a table with what it means, in a pipe JSON."""
    for turns, day in ((1, "Monday"), (3, "Tuesday")):
        gateway.ask("messages", asking("table", "messages", SONNET, day, turns), "table")
        gateway.ask("messages", asking("brief", "messages", SONNET, day, turns, 100), "brief")
    row = gateway.row("table", 2)
    report = gateway.machine.run("usage", "--cache").json()
    labels = [row["label"] for row in report["cache"]["conversations"]]
    assert "brief" not in labels  # too short for any cache
    assert row in report["cache"]["conversations"]
    assert "cache" not in gateway.machine.run("usage").json()
    shown = typed(gateway.machine, ["usage", "--cache"])
    assert "CONVERSATION" in shown
    [line] = [x for x in shown.splitlines() if x.startswith(row["conversation"] + " ")]
    assert line.split()[1:5] == [f"copilot/{SONNET}", "table", "2", "0%"]
    words = f"{row['conversation']}: system[1] changed once: a date, a time or an id"
    assert words in shown
    written = gateway.machine.run("usage", "--cache", "--csv").out.splitlines()
    assert written[0].startswith("conversation,provider,model,label,calls,hit_ratio")
    assert any(line.startswith(f"{row['conversation']},copilot,") for line in written[1:])


def test_a_reset_forgets_and_a_wrong_word_is_refused(gateway: Gateway) -> None:
    gateway.ask("messages", asking("forgotten", "messages", SONNET, "Monday", 1), "forgotten")
    gateway.row("forgotten", 1)
    report = gateway.machine.ask("usage", cache=1, reset=True)
    assert report["data"]["cache"] == {"conversations": []}
    reply = fetch(gateway.status, "/v1/usage?cache=yes")
    assert reply.status == 400 and "cache" in reply.text


def test_what_answers_here_is_not_watched(gateway: Gateway) -> None:
    """The echo has no cache."""
    gateway.ask("chat", asking("echo", "chat", "echo", "Monday", 1), "echoing")
    gateway.ask("messages", asking("echo", "messages", SONNET, "Monday", 1), "after-the-echo")
    gateway.row("after-the-echo", 1)
    rows = fetch(gateway.status, "/v1/usage?cache=1").json()["cache"]["conversations"]
    assert "echoing" not in [row["label"] for row in rows]


def test_kiro_tells_no_figures_but_its_prompts_do() -> None:
    """The system prompt is part of Kiro's first message."""
    with ExitStack() as stack:
        pair = start_kiro(stack, with_metadata=False)
        fields = {"User-Agent": "kiro-client/1.0"}
        for turns, day in ((1, "Monday"), (3, "Monday"), (5, "Tuesday")):
            body = asking("kiro", "messages", SONNET, day, turns, 100_000)
            body.pop("tools")
            reply = pair.gateway.request("POST", PATHS["messages"], body, fields)
            assert reply.status == 200, reply
        rows: list[Json] = []

        def is_there() -> bool:
            report = pair.gateway.request("GET", "/v1/usage?cache=1").json()
            rows[:] = report["cache"]["conversations"]
            return sum(int(row["calls"]) for row in rows) == 3

        wait_until(is_there)
        assert len(rows) == 1, rows
        assert rows[0]["hit_ratio"] is None
        assert rows[0]["changed"]["block"] == "history[0] (user)"
        wait_until(lambda: " cache_miss " in pair.gateway.log())
        assert SECRET not in pair.gateway.log() + json.dumps(rows)
