"""Every regular expression of the file takes linear time, whatever it is asked to search.

The texts are made from the patterns themselves: for each repetition in a pattern, what may stand
before it, then what it repeats, very often, then something that fits nowhere.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest

import aiclient_api as gw

SOURCE = Path(gw.__file__).read_text(encoding="utf-8")
METHODS = ("search", "match", "fullmatch", "sub", "split", "findall", "finditer")
PUMPS = (" ", "a", "0", "\t", "\n", "\\", '"', "-", "a.", "a ", "0 s ", "again in ", "x=", "<", "[")
SIZES = (190, 375, 750, 1_500, 3_000, 6_000, 12_000)  # characters
NOISE_FLOOR_S = 0.004  # a linear search of the longest text takes far less
GROWTH = 2.6  # per doubling: quadratic is 4


def compiled_patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    """(name, pattern) of everything compiled at module level, in tables and classes too."""
    waiting: list[tuple[str, Any]] = list(vars(gw).items())
    seen = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, re.Pattern):
            yield name, value
        elif isinstance(value, gw.Fault):
            yield name, re.compile(value.pattern)
        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            rows = value.values() if isinstance(value, dict) else value
            waiting += [(name, row) for row in rows]
        elif isinstance(value, type) and value.__module__ == gw.__name__ and id(value) not in seen:
            seen.add(id(value))
            waiting += [(key, row) for key, row in vars(value).items()]


def searches() -> list[tuple[str, str, re.Pattern[Any]]]:
    """(name, method, pattern): how each pattern is used; `search` where the source cannot tell."""
    uses: dict[str, set[str]] = {}
    inline: set[tuple[str, Any, int]] = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        method, owner = node.func.attr, node.func.value
        if method not in METHODS:
            continue
        if isinstance(owner, ast.Name) and owner.id == "re":
            if isinstance(node.args[0], ast.Constant):
                flags = " ".join(ast.unparse(arg) for arg in node.args[1:] + node.keywords)
                flag = re.ASCII if "ASCII" in flags else 0
                inline.add((method, node.args[0].value, flag | (16 if "DOTALL" in flags else 0)))
        elif isinstance(owner, (ast.Name, ast.Attribute)):
            name = owner.id if isinstance(owner, ast.Name) else owner.attr
            uses.setdefault(name, set()).add(method)
    names: dict[re.Pattern[Any], set[str]] = {}
    for name, pattern in compiled_patterns():
        names.setdefault(pattern, set()).add(name)
    found = [
        (min(known), method, pattern)
        for pattern, known in names.items()
        for method in sorted(set().union(*(uses.get(name, ()) for name in known)) or {"search"})
    ]
    found += [(str(text)[:30], method, re.compile(text, flags)) for method, text, flags in inline]
    return sorted(found, key=lambda row: row[:2])


def sample(tree: Any) -> str:
    """A short text that the parsed pattern matches, nearly always."""
    return "".join(sample_node(op, argument) for op, argument in tree)


def sample_node(op: Any, argument: Any) -> str:
    """A short text for one node."""
    if op is _constants.LITERAL:
        return chr(argument)
    if op is _constants.IN:
        return sample_class(argument)
    if op in (_constants.NOT_LITERAL, _constants.ANY):
        return "a" if argument != ord("a") else "b"
    if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
        least: int = argument[0]
        return sample(argument[2]) * max(least, 1)
    if op is _constants.SUBPATTERN:
        return sample(argument[3])
    if op is _constants.ATOMIC_GROUP:
        return sample(argument)
    if op is _constants.BRANCH:
        return sample(argument[1][0])
    return ""


def sample_class(items: Any) -> str:
    """A character of a class."""
    classes = {"DIGIT": "0", "SPACE": " ", "WORD": "a"}
    for op, argument in items:
        if op is _constants.NEGATE:
            used = {chr(row[1]) for row in items if row[0] is _constants.LITERAL}
            return next(letter for letter in "a0-!" if letter not in used)
        if op is _constants.LITERAL:
            return chr(argument)
        if op is _constants.RANGE:
            return chr(argument[0])
        if op is _constants.CATEGORY:
            kind = str(argument).removeprefix("CATEGORY_")
            return classes.get(kind, "!")
    return "a"


def repetitions(tree: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """(what stands before it, what it repeats) of each open repetition, at any depth."""
    for op, argument in tree:
        inner: list[Any] = []
        if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            inner = [argument[2]]
            if argument[1] > 50:
                yield before, sample(argument[2])
        elif op is _constants.SUBPATTERN:
            inner = [argument[3]]
        elif op is _constants.ATOMIC_GROUP:
            inner = [argument]
        elif op is _constants.BRANCH:
            inner = argument[1]
        elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
            inner = [argument[1]]
        for part in inner:
            yield from repetitions(part, before)
        before += sample_node(op, argument)


def hostile_texts(pattern: re.Pattern[Any]) -> set[tuple[str, str, str]]:
    """(start, what is repeated, end) of texts that a pattern of this form might choke on."""
    tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    texts = {("", pump, "") for pump in PUMPS}
    for before, pump in repetitions(tree):
        texts |= {(before, item, end) for item in {pump, *PUMPS} for end in ("", "\0")}
        texts |= {("", before + pump, ""), ("", before + pump * 3, "\0"), ("", before, "")}
    return {text for text in texts if text[1]}


def seconds(pattern: re.Pattern[Any], method: str, text: str) -> float:
    """How long one search takes, at best of two."""
    subject: Any = text if isinstance(pattern.pattern, str) else text.encode("latin-1", "replace")
    best = float("inf")
    for _ in range(2):
        begun = time.process_time()
        if method == "sub":
            pattern.sub(subject[:0], subject)
        elif method == "finditer":
            list(pattern.finditer(subject))
        else:
            getattr(pattern, method)(subject)
        best = min(best, time.process_time() - begun)
        if best < NOISE_FLOOR_S:
            break
    return best


def is_slow(pattern: re.Pattern[Any], method: str, start: str, pump: str, end: str) -> bool:
    """Whether the time grows faster than the text."""
    taken = [0.0, 0.0]
    for size in SIZES:
        taken.append(seconds(pattern, method, start + pump * (size // len(pump)) + end))
        if taken[-1] > NOISE_FLOOR_S:
            return taken[-1] > GROWTH**2 * max(taken[-3], NOISE_FLOOR_S / 8)
    return False


SEARCHES = searches()


def test_the_test_sees_a_quadratic_pattern() -> None:
    """The shape of redaction that once took half a minute."""
    bad = re.compile(r"eyJ[\w-]{4,}\.[\w-]+")
    assert any(is_slow(bad, "search", *text) for text in hostile_texts(bad))
    worse = re.compile(r"\s*-*-*x")  # cubic
    assert any(is_slow(worse, "search", *text) for text in hostile_texts(worse))


@pytest.mark.parametrize(
    ("name", "method", "pattern"), SEARCHES, ids=[f"{row[0]}-{row[1]}" for row in SEARCHES]
)
def test_a_search_takes_linear_time(name: str, method: str, pattern: re.Pattern[Any]) -> None:
    """At 1x, 2x and 4x, on every text made for it."""
    slow = [text for text in sorted(hostile_texts(pattern)) if is_slow(pattern, method, *text)]
    assert slow == []
