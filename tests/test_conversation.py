"""Section 7: turns, names, the grammar of events, stop strings, estimates."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import time
from typing import Any

import pytest

from aiclient_api import (
    EFFORTS,
    INTERRUPTED,
    BlockDelta,
    BlockStart,
    BlockStop,
    CallIds,
    Converter,
    Image,
    InvalidRequest,
    MessageStart,
    MessageStop,
    Model,
    Overloaded,
    Refusal,
    ResponseContext,
    RunawayGuard,
    StopCutter,
    StreamError,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    Turn,
    UnsupportedFeature,
    UpstreamError,
    Usage,
    UsageUpdate,
    clamp_budget,
    clamp_effort,
    complete_arguments,
    downgrade_system_turns,
    effort_of_budget,
    estimate_image,
    estimate_request,
    estimate_text,
    image_type,
    merge_turns,
    normalize_turns,
    object_schema,
    parse_arguments,
    read_data_url,
    read_image_url,
    split_stops,
    wire_id,
    wire_name,
    wire_names,
    wire_table,
)

SEED = 20261122
Blocks = list[Any]

# ---- the grammar of events ---------------------------------------------------------------------

EVENTS: dict[str, Any] = {
    "MessageStart": MessageStart(),
    "BlockStart": BlockStart("text"),
    "BlockDelta": BlockDelta("text", "x"),
    "BlockStop": BlockStop(),
    "UsageUpdate": UsageUpdate(Usage()),
    "MessageStop": MessageStop("end"),
}
# A way into each state, and which events it allows.
WAYS: dict[str, list[str]] = {
    "new": [],
    "open": ["MessageStart"],
    "block": ["MessageStart", "BlockStart"],
    "complete": ["MessageStart", "MessageStop"],
}
ALLOWED: dict[str, dict[str, str]] = {
    "new": {"MessageStart": "open", "UsageUpdate": "new"},
    "open": {"BlockStart": "block", "UsageUpdate": "open", "MessageStop": "complete"},
    "block": {"BlockDelta": "block", "UsageUpdate": "block", "BlockStop": "open"},
    "complete": {},
}


class Ends:
    """Both ends of a converter: reads no frames, records the events that it is to write."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def read(self, frame: Any) -> list[Any]:
        return []

    def end(self) -> list[Any]:
        return []

    def write(self, event: Any) -> list[Any]:
        self.events.append(event)
        return []

    def track(self, kind: str, text: str) -> None:
        raise NotImplementedError


def converted(events: list[Any]) -> tuple[Converter, list[Any]]:
    """A converter that was given `events`, and the list of those that it passes on."""
    ends = Ends()
    converter = Converter(ends, ends, ResponseContext("id", 0, "m"))
    for event in events:
        converter.write_event(event)
    return converter, ends.events


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WAYS, EVENTS)))
def test_every_event_in_every_state_is_allowed_or_an_error(state: str, event: str) -> None:
    """The full product."""
    converter, passed = converted([EVENTS[step] for step in WAYS[state]])
    assert converter.state == state
    if event in ALLOWED[state]:
        converter.write_event(EVENTS[event])
        assert passed[-1] is EVENTS[event]
        assert converter.state == ALLOWED[state][event]
    else:
        with pytest.raises(UpstreamError):
            converter.write_event(EVENTS[event])


@pytest.mark.parametrize("state", WAYS)
def test_an_end_before_the_finish_is_an_error(state: str) -> None:
    """A truncated upstream is never a silent finish."""
    converter, _ = converted([EVENTS[step] for step in WAYS[state]])
    if state == "complete":
        assert converter.end() == []
    else:
        with pytest.raises(UpstreamError, match="ended prematurely"):
            converter.end()
    with pytest.raises(Overloaded):
        converter.write_event(StreamError(Overloaded("busy")))


@pytest.mark.parametrize(
    ("reported", "reason"),
    [
        ("end", "tool"),
        ("stop", "tool"),
        ("tool", "tool"),
        ("length", "length"),
        ("filter", "filter"),
    ],
)
def test_a_call_makes_the_reason_tool(reported: str, reason: str) -> None:
    """Any call in the response, unless a limit ended it."""
    call = [MessageStart(), BlockStart("tool", "a", "f"), BlockStop()]
    _, passed = converted([*call, MessageStop(reported)])
    assert isinstance(passed[-1], MessageStop) and passed[-1].reason == reason


def test_a_stop_without_a_call_stays() -> None:
    """With the string that was found."""
    _, passed = converted([MessageStart(), MessageStop("stop", "END")])
    assert passed[-1] == MessageStop("stop", "END")


# ---- stop strings ------------------------------------------------------------------------------


def cut(stops: list[str], parts: list[str], end: bool = True) -> tuple[str, str | None]:
    """(text that goes on, the stop string that was found) for text in these deltas."""
    cutter = StopCutter(stops)
    events: list[Any] = [BlockStart("text"), *(BlockDelta("text", part) for part in parts)]
    if end:
        events += [BlockStop(), MessageStop("end")]
    kept = [item for event in events for item in cutter.take(event)]
    converted([MessageStart(), *kept])
    finish = [event for event in kept if isinstance(event, MessageStop)]
    text = "".join(event.text for event in kept if isinstance(event, BlockDelta))
    return text, finish[0].stop_text if finish else None


@pytest.mark.parametrize(
    ("stops", "parts", "text", "found"),
    [
        (["END"], ["a END b"], "a ", "END"),
        (["END"], ["a E", "N", "D b"], "a ", "END"),
        (["END"], ["a E", "N", "X"], "a ENX", None),
        (["END"], ["a EEND"], "a E", "END"),
        (["END"], ["a E", "EN", "D"], "a E", "END"),
        (["END"], ["EN"], "EN", None),
        (["END"], ["END"], "", "END"),
        (["aab"], ["aaab"], "a", "aab"),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["b", "abc"], ["xa", "bc"], "xa", "b"),
        (["abc", "b"], ["xabc"], "xa", "b"),
        (["b", "ab"], ["xab"], "x", "ab"),
        (["abcd", "c"], ["xab", "ce"], "xab", "c"),
        (["ab", "abc"], ["xabc"], "x", "ab"),
        (["\n"], ["a", "\n", "b"], "a", "\n"),
        (["日本"], ["x日", "本"], "x", "日本"),
        (["END"], ["", "a", ""], "a", None),
    ],
)
def test_an_answer_is_cut_at_a_stop_string(
    stops: list[str], parts: list[str], text: str, found: str | None
) -> None:
    """formats.md 6.3: held back until it is clear, never a character too much."""
    assert cut(stops, parts) == (text, found)


def test_cutting_does_not_depend_on_how_the_text_was_split() -> None:
    """Seeded texts of few letters, against a plain search."""
    rng = random.Random(SEED)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 2))]
        parts, at = [], 0
        while at < len(text):
            size = rng.randint(1, 3)
            parts.append(text[at : at + size])
            at += size
        # What a model that stops by itself would do: the first string to be complete decides.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        if found:
            end, begin = min(found)
            assert cut(stops, parts) == (text[:begin], text[begin:end])
        else:
            assert cut(stops, parts) == (text, None)


def test_only_words_are_cut() -> None:
    """Not thinking, not arguments."""
    for kind, part in (("thinking", "text"), ("tool", "arguments")):
        cutter = StopCutter(["END"])
        events: list[Any] = [
            BlockStart(kind),
            BlockDelta(part, "END"),
            BlockStop(),
            MessageStop("end"),
        ]
        assert [item for event in events for item in cutter.take(event)] == events


def test_usage_is_still_counted_behind_a_stop() -> None:
    """Everything else behind it is not heard."""
    cutter = StopCutter(["END"])
    cutter.take(BlockStart("text"))
    cutter.take(BlockDelta("text", "END"))
    assert cutter.take(BlockDelta("text", "more")) == []
    assert cutter.take(UsageUpdate(Usage(output=3))) == [UsageUpdate(Usage(output=3))]
    assert cutter.take(MessageStop("end")) == []


@pytest.mark.parametrize(
    ("dialect", "stops", "sent", "left"),
    [
        ("chat", 4, "abcd", "ef"),
        ("messages", 6, "abcdef", ""),
    ],
)
def test_stop_strings_are_shared_between_upstream_and_cutter(
    dialect: str, stops: int, sent: str, left: str
) -> None:
    """formats.md 1.2: four go up in chat, the rest is cut here."""
    asked = list("abcdef")
    assert split_stops(asked, dialect, Model("m", "p")) == (list(sent), list(left))
    assert len(sent) == stops


def test_blank_stop_strings_are_cut_here() -> None:
    """formats.md 5.2: Anthropic refuses them; reasoning models of OpenAI take none at all."""
    assert split_stops(["\n", "x"], "messages", Model("m", "p")) == (["x"], ["\n"])
    assert split_stops(["\n", "x"], "chat", Model("m", "p", stops=0)) == ([], ["\n", "x"])


# ---- turns -------------------------------------------------------------------------------------


def call(call_id: str) -> ToolCall:
    """A call."""
    return ToolCall(call_id, "f", "{}")


def result(call_id: str, text: str = "r") -> ToolResult:
    """Its result."""
    return ToolResult(call_id, [Text(text)])


def missing(call_id: str) -> ToolResult:
    """What stands for a result that never came."""
    return ToolResult(call_id, [Text(INTERRUPTED)], True)


def turn(role: str, *blocks: Any) -> Turn:
    """A turn; strings are texts."""
    return Turn(role, [Text(item) if isinstance(item, str) else item for item in blocks])


@pytest.mark.parametrize(
    ("turns", "settled"),
    [
        ([], []),
        ([turn("user", "a"), turn("user", "b")], [turn("user", "a", "b")]),
        ([turn("user", " ", "a", ""), turn("user")], [turn("user", "a")]),
        (
            [turn("assistant", call("1"), call("2")), turn("user", "x", result("2"), result("1"))],
            [turn("assistant", call("1"), call("2")), turn("user", result("1"), result("2"), "x")],
        ),
        (
            [turn("assistant", call("1")), turn("user", "x")],
            [turn("assistant", call("1")), turn("user", missing("1"), "x")],
        ),
        (
            [turn("assistant", call("1"))],
            [turn("assistant", call("1")), turn("user", missing("1"))],
        ),
        (
            [turn("assistant", call("1")), turn("assistant", call("2")), turn("user", result("2"))],
            [turn("assistant", call("1"), call("2")), turn("user", missing("1"), result("2"))],
        ),
        (
            [turn("assistant", call("1")), turn("system", "s"), turn("user", result("1"))],
            [turn("assistant", call("1")), turn("user", result("1")), turn("system", "s")],
        ),
        (
            [turn("user", result("9", "late"))],
            [turn("user", "[tool output for unknown call 9]", "late")],
        ),
        (
            [turn("user", "a"), turn("system", "s"), turn("assistant", "b"), turn("user", "c")],
            [turn("user", "a"), turn("system", "s"), turn("assistant", "b"), turn("user", "c")],
        ),
    ],
)
def test_turns_are_put_in_the_order_vendors_demand(turns: list[Turn], settled: list[Turn]) -> None:
    """formats.md 1.5."""
    assert normalize_turns(copy.deepcopy(turns)) == settled


def random_turns(rng: random.Random) -> list[Turn]:
    """Any roles in any order, with calls, results of theirs and of nobody, and blanks."""
    turns, ids, serial = [], ["ghost"], 0
    for _ in range(rng.randint(0, 9)):
        role = rng.choice(["user", "user", "assistant", "system"])
        blocks: Blocks = []
        for _ in range(rng.randint(0, 4)):
            serial += 1
            kind = rng.random()
            if kind < 0.2:
                blocks.append(Text(rng.choice(["", " ", "\n"])))
            elif kind < 0.5 or role == "system":
                blocks.append(Text(f"word{serial}"))
            elif role == "assistant":
                ids.append(f"c{serial}")
                blocks.append(rng.choice([call(ids[-1]), Thinking(f"word{serial}"), Refusal("no")]))
            else:
                blocks.append(result(rng.choice(ids), f"word{serial}"))
        turns.append(Turn(role, blocks))
    return turns


def words_of(turns: list[Turn]) -> list[str]:
    """Every word in turns, in results too, without what settling adds."""
    found: list[str] = []
    for block in (block for item in turns for block in item.blocks):
        inner = block.blocks if isinstance(block, ToolResult) else [block]
        found += [b.text for b in inner if isinstance(b, (Text, Thinking)) and "word" in b.text]
    return sorted(found)


def calls_of(turns: list[Turn]) -> list[str]:
    """The ids of every call, in order."""
    return [b.id for item in turns for b in item.blocks if isinstance(b, ToolCall)]


def results_of(turns: list[Turn]) -> dict[str, list[str]]:
    """The words of the results that came after their call, by call, in order."""
    found: dict[str, list[str]] = {}
    asked: set[str] = set()
    for item in merge_turns(turns):
        if item.role == "assistant":
            asked |= set(calls_of([item]))
        for block in item.blocks:
            if isinstance(block, ToolResult) and block.id in asked:
                words = [b.text for b in block.blocks if isinstance(b, Text) and "word" in b.text]
                found[block.id] = found.get(block.id, []) + words
    return {key: words for key, words in found.items() if words}


@pytest.mark.parametrize("seed", range(8))
def test_settled_turns_keep_what_they_promise(seed: int) -> None:
    """Random turns: roles alternate, calls are answered next, results first, nothing is lost."""
    rng = random.Random(SEED + seed)
    for _ in range(400):
        turns = random_turns(rng)
        settled = normalize_turns(copy.deepcopy(turns))
        for before, after in itertools.pairwise(settled):
            assert before.role != after.role
        assert all(item.blocks for item in settled)
        assert calls_of(settled) == calls_of(turns)
        for index, item in enumerate(settled):
            ids = [b.id for b in item.blocks if isinstance(b, ToolCall)]
            answered = [b.id for b in item.blocks if isinstance(b, ToolResult)]
            before_ids = [
                b.id for b in settled[index - 1].blocks if index and isinstance(b, ToolCall)
            ]
            assert [key for key, _ in itertools.groupby(answered)] == before_ids
            kinds = [isinstance(b, ToolResult) for b in item.blocks]
            assert kinds == sorted(kinds, reverse=True)
            if ids:
                assert settled[index + 1].role == "user"
        assert words_of(settled) == words_of(turns)
        assert results_of(settled) == results_of(turns)
        assert normalize_turns(copy.deepcopy(settled)) == settled


def test_all_results_of_one_call_are_kept_in_order_and_in_place() -> None:
    """Clients that retry send a result twice, or in another turn: each stays with its call."""
    turns = [
        turn("assistant", call("1"), call("2")),
        turn("user", result("2", "b"), result("1", "old"), "meanwhile", result("1", "old")),
        turn("system", "s"),
        turn("user", result("1", "new")),
    ]
    assert normalize_turns(copy.deepcopy(turns)) == [
        turn("assistant", call("1"), call("2")),
        turn(
            "user",
            ToolResult("1", [Text("old"), Text("old"), Text("new")]),
            result("2", "b"),
            "meanwhile",
        ),
        turn("system", "s"),
    ]


def test_a_call_id_used_twice_has_a_result_each() -> None:
    """formats.md 1.5: duplicate ids are refused upstream; each call still needs its own result."""
    turns = [
        turn("assistant", call("1")),
        turn("user", result("1", "first")),
        turn("assistant", call("1")),
        turn("user", result("1", "second")),
    ]
    assert normalize_turns(copy.deepcopy(turns)) == [
        *turns[:2],
        turn("assistant", call("1_2")),
        turn("user", result("1_2", "second")),
    ]


def test_equal_calls_of_a_turn_are_one_and_others_of_that_id_have_a_result_each() -> None:
    calls = [call("1"), call("1"), ToolCall("1", "g", "{}"), call("2")]
    replies = [result("2", "c"), result("1", "a"), result("1", "b"), result("1", "more")]
    assert normalize_turns([turn("assistant", *calls), turn("user", *replies)]) == [
        turn("assistant", call("1"), ToolCall("1_2", "g", "{}"), call("2")),
        turn("user", result("1", "a"), ToolResult("1_2", [Text("b"), Text("more")]), replies[0]),
    ]
    assert normalize_turns([turn("assistant", *calls), turn("user", *replies[:2])])[1:] == [
        turn("user", result("1", "a"), missing("1_2"), replies[0])
    ]


def test_merging_leaves_the_given_turns_alone() -> None:
    """A caller's list may be used again."""
    turns = [turn("user", "a"), turn("user", "b")]
    merge_turns(turns)
    assert turns == [turn("user", "a"), turn("user", "b")]


def test_system_turns_become_reminders_in_place() -> None:
    """formats.md 1.3."""
    turns = [turn("user", "a"), turn("system", "s", "t"), turn("assistant", "b")]
    reminders = [f"<system-reminder>\n{text}\n</system-reminder>" for text in "st"]
    assert downgrade_system_turns(turns) == [turn("user", "a", *reminders), turn("assistant", "b")]


# ---- names, ids, arguments, schemas ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("f", "f"),
        ("mcp__x.y/z", "mcp__x_y_z"),
        ("é", "_"),
        ("a" * 64, "a" * 64),
        ("a" * 65, "a" * 55 + "_" + "635361c4"),
    ],
)
def test_tool_names_become_what_vendors_take(name: str, wire: str) -> None:
    """formats.md 5.0: `name[:55] + "_" + sha256(name)[:8]`."""
    assert wire_name(name) == wire
    assert wire_name(wire) == wire and len(wire) <= 64


def test_two_long_names_stay_apart() -> None:
    """The hash is of the whole name."""
    assert wire_name("a" * 70 + "1") != wire_name("a" * 70 + "2")


def test_names_that_become_one_are_refused_by_both_names() -> None:
    """formats.md 5.0."""
    assert wire_names(["a.b", "c", "a.b"]) == {"a_b": "a.b", "c": "c"}
    with pytest.raises(InvalidRequest, match=r"'a\.b' and 'a_b'"):
        wire_names(["a.b", "a_b"])


@pytest.mark.parametrize("call_id", ["call|abc+/", "", "x" * 65, "a b", "é", "toolu.1"])
def test_odd_call_ids_are_hashed(call_id: str) -> None:
    """formats.md case 24."""
    wire = wire_id(call_id)
    assert wire.startswith("call_") and len(wire) == 29 and wire_id(wire) == wire
    assert wire_id("toolu_01-x") == "toolu_01-x"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        ('{"a":1}', {"a": 1}),
        ('{"a":', {"_raw": '{"a":'}),
        ("[1]", {"_raw": "[1]"}),
        ("null", {}),
        ('{"a":NaN}', {"_raw": '{"a":NaN}'}),
        ('"x"', {"_raw": '"x"'}),
    ],
)
def test_arguments_become_an_object(text: str, value: Any) -> None:
    """formats.md case 23."""
    assert parse_arguments(text) == value


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("{}", True),
        ('{"a":"}', False),
        ('{"a":"}"}', True),
        ("{} \n", True),
        ("", False),
        ("[]", False),
    ],
)
def test_streamed_arguments_are_complete_or_not(text: str, complete: bool) -> None:
    """A brace inside a string is none."""
    assert (complete_arguments(text) == text.strip()) is complete


@pytest.mark.parametrize(
    ("schema", "fitted"),
    [
        (None, {"type": "object", "properties": {}}),
        ({}, {"type": "object", "properties": {}}),
        ({"$schema": "x", "type": "object"}, {"type": "object", "properties": {}}),
        (
            {"type": "object", "properties": {"a": {}}, "$defs": {}},
            {"type": "object", "properties": {"a": {}}, "$defs": {}},
        ),
    ],
)
def test_a_schema_gets_what_every_vendor_wants(schema: Any, fitted: Any) -> None:
    """formats.md case 26, 1.4."""
    before = copy.deepcopy(schema)
    assert object_schema(schema, "f") == fitted
    assert schema == before


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (["b", "a"], {"a": "a", "b": "b"}),
        (["a.b", "a_b"], {"a_b": "a_b", "a.b": "a_b_2e7336dc"}),
        (["x:y", "x.y"], {"x.y": "x_y", "x:y": "x_y_1274e286"}),
        (["a.b", "a.b"], {"a.b": "a_b"}),
    ],
)
def test_every_tool_has_a_wire_name_of_its_own(names: list[str], table: dict[str, str]) -> None:
    """Clean names stay as they are; of two that would become one, one is told apart."""
    assert wire_table(names) == table


# ---- effort ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effort", "listed", "level"),
    [
        ("max", ["low", "medium", "high"], "high"),
        ("none", ["none", "low"], "none"),
        ("none", ["low", "high"], "low"),
        ("minimal", ["low", "high"], "low"),
        ("medium", ["low", "high"], "low"),
        ("high", [], None),
        ("high", ["strange"], None),
    ],
)
def test_an_effort_is_lowered_to_a_listed_one(
    effort: str, listed: list[str], level: str | None
) -> None:
    """formats.md 5.5, case 14."""
    assert clamp_effort(effort, listed) == level


def test_every_effort_is_clamped_into_every_list() -> None:
    """The nearest below, else the nearest above."""
    for size in range(1, 4):
        for listed in itertools.combinations(EFFORTS, size):
            for effort in EFFORTS:
                level = clamp_effort(effort, reversed(listed))
                below = [item for item in listed if EFFORTS.index(item) <= EFFORTS.index(effort)]
                assert level == (below[-1] if below else listed[0])


@pytest.mark.parametrize(
    ("budget", "limits", "max_tokens", "expected"),
    [
        (5000, (1024, 32000), 4000, 3999),
        (5000, (1024, 32000), 1000, None),
        (5000, (1024, 32000), 1024, None),
        (5000, (1024, 32000), 1025, 1024),
        (10, (1024, 32000), 8000, 1024),
        (99999, (1024, 32000), 64000, 32000),
        (5000, (128, 32768), 8000, 5000),
        (5000, None, 8000, 5000),
        (5000, None, 500, None),
    ],
)
def test_a_thinking_budget_fits_or_is_none(
    budget: int, limits: tuple[int, int] | None, max_tokens: int, expected: int | None
) -> None:
    """formats.md case 15: never at or above max_tokens, never under the least."""
    assert clamp_budget(budget, limits, max_tokens) == expected


def test_a_budget_stands_for_an_effort() -> None:
    """copilot.md 5.4."""
    budgets = [1, 4096, 4097, 16384, 16385]
    assert [effort_of_budget(b) for b in budgets] == ["low", "low", "medium", "medium", "high"]


# ---- images ------------------------------------------------------------------------------------

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAYAAAC56t6BAAAA"


@pytest.mark.parametrize(
    ("data", "claimed", "kind"),
    [
        (PNG, "image/jpeg", "image/png"),
        ("/9j/4AAQ", "", "image/jpeg"),
        ("R0lGODlh", "image/png", "image/gif"),
        ("UklGRhIA", "image/webp", "image/webp"),
        ("AA==", "image/png", "image/png"),
        ("AA==", "image/jpg", "image/jpeg"),
    ],
)
def test_an_image_says_itself_what_it_is(data: str, claimed: str, kind: str) -> None:
    """formats.md 2.3: clients lie."""
    assert image_type(data, claimed, "p") == kind


@pytest.mark.parametrize("claimed", ["image/bmp", "image/svg+xml", "", "text/html"])
def test_other_images_are_refused_with_their_path(claimed: str) -> None:
    """formats.md 5.7."""
    with pytest.raises(UnsupportedFeature) as caught:
        image_type("AA==", claimed, "messages.0.content.1")
    assert caught.value.param == "messages.0.content.1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png;base64,AA==", ("image/png", "AA==")),
        ("data:Image/PNG;base64,AA==", ("image/png", "AA==")),
        ("data:text/plain;charset=utf-8;base64,YQ==", ("text/plain", "YQ==")),
        ("data:text/plain,a%20b", ("text/plain", base64.b64encode(b"a b").decode())),
        ("data:,x", ("", base64.b64encode(b"x").decode())),
    ],
)
def test_a_data_url_is_read(url: str, expected: tuple[str, str]) -> None:
    """RFC 2397."""
    assert read_data_url(url, "p") == expected


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:a b,x", "data:"])
def test_a_data_url_that_is_none_is_a_400(url: str) -> None:
    """With its path."""
    with pytest.raises(InvalidRequest, match=r"^p: "):
        read_data_url(url, "p")


@pytest.mark.parametrize("url", ["http://h/a.png", "file:///etc/passwd", "ftp://h/a", "", "//h/a"])
def test_nothing_is_fetched_for_a_caller(url: str) -> None:
    """formats.md 5.2: http and file URLs are a 400, https goes up as it is."""
    with pytest.raises(UnsupportedFeature):
        read_image_url(url, "p")
    assert read_image_url("https://h/a.png", "p") == Image(url="https://h/a.png")


def test_a_hostile_data_url_does_not_stop_the_program() -> None:
    """The pattern may not backtrack."""
    with pytest.raises(InvalidRequest):
        read_data_url("data:image/png" + ";a=b" * 50_000 + "!", "p")


# ---- estimates ---------------------------------------------------------------------------------


def test_a_word_alone_is_estimated_above_one() -> None:
    """formats.md case 51: never 0 or 1, which breaks Claude Code's compaction."""
    body = {"model": "x", "messages": [{"role": "user", "content": "foo"}], "tools": []}
    assert 1 < estimate_request(body) < 20
    assert estimate_request({}) >= 2
    assert estimate_request({"messages": None, "tools": None, "system": None}) >= 2


def test_an_estimate_grows_with_what_is_asked() -> None:
    """Messages, system, tools."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * 100}]}
    plain = estimate_request(body)
    assert 100 < plain < 250
    with_system = estimate_request({**body, "system": "word " * 100})
    assert with_system > plain + 90
    tool = {"name": "f", "input_schema": {"type": "object"}}
    assert estimate_request({**body, "tools": [tool]}) > plain + 346


def test_an_image_is_estimated_by_its_size_not_by_its_bytes() -> None:
    """formats.md 1.8: width * height / 750, at most 1600."""
    assert estimate_image(PNG) == 2 * 3 / 750
    data = PNG + "A" * 500_000
    part = {"type": "image", "source": {"type": "base64", "data": data}}
    assert estimate_request({"messages": [{"role": "user", "content": [part]}]}) < 60
    url = "data:image/jpeg;base64,/9j/" + "A" * 500_000
    other = {"type": "image_url", "image_url": {"url": url}}
    estimate = estimate_request({"messages": [{"role": "user", "content": [other]}]})
    assert 1500 <= estimate < 1700


def test_a_pdf_is_not_estimated_by_its_bytes() -> None:
    """formats.md 1.8: a page is about 2000 tokens; 1 MB of base64 is not 290,000."""
    source = {"type": "base64", "media_type": "application/pdf", "data": "JVBE" * 250_000}
    part = {"type": "document", "source": source}
    assert estimate_request({"messages": [{"role": "user", "content": [part]}]}) < 100_000


@pytest.mark.parametrize("odd", [{"messages": "x"}, {"messages": [1, None, "x"]}, {"tools": 5}])
def test_an_estimate_never_fails(odd: Any) -> None:
    """formats.md 1.8: never an error."""
    assert estimate_request(odd) >= 2


def test_other_scripts_cost_more_per_character() -> None:
    """One ideograph is about a token."""
    assert estimate_text("日本語" * 10) > 3 * estimate_text("abc" * 10)
    assert estimate_text("") == 0
    assert json.dumps(estimate_text("🙂" * 10)) != "0"


# ---- cost --------------------------------------------------------------------------------------


def test_ids_that_are_alike_where_they_are_cut_stay_apart() -> None:
    ids = CallIds()
    stem = "p" * 32
    given = [ids.add(call) for call in (f"{stem}_2", stem, stem, f"{stem}xy", f"{stem}xy")]
    assert given == [f"{stem}_2", stem, f"{stem}_3", f"{stem}xy", f"{stem}_4"]
    assert max(map(len, given)) <= 40


def test_a_runaway_is_noticed_however_it_is_cut_and_spaces_do_not_count() -> None:
    run = '{"a": 1,' + "\n \t" * 10
    for cuts in ([run], [*run], [run[:9], run[9:20], run[20:]]):
        guard = RunawayGuard()
        for piece in cuts:
            guard.check(piece)
        with pytest.raises(UpstreamError):
            guard.check(" \r x")


def test_a_runaway_is_of_one_call() -> None:
    start = BlockStart("tool", "a", "f")
    call = [start, BlockDelta("arguments", "\n" * 20), BlockStop()]
    converter, _ = converted([MessageStart(), *call * 3, start])
    with pytest.raises(UpstreamError, match="stuck"):
        converter.write_event(BlockDelta("arguments", "\n" * 21))


def test_a_long_stop_string_is_as_cheap_as_a_short_one() -> None:
    """The answer is its beginning, over and over."""
    took = []
    for stop in ("a" * 8 + "b", "a" * 8000 + "b"):
        cutter = StopCutter([stop])
        cutter.take(BlockStart("text"))
        began = time.process_time()
        for _ in range(2000):
            cutter.take(BlockDelta("text", "aaac" * 10))
            cutter.take(BlockDelta("text", "aaaa" * 10))
        took.append(time.process_time() - began)
    assert took[1] < 20 * took[0]
