"""Tool schemas: what a vendor refuses goes, and what the original allows stays allowed."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest

import aiclient_api as gw

Json = dict[str, Any]
VENDORS = ("", "Azure OpenAI", "Anthropic", "Google", "kiro")
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),), "object": (dict,), "array": (list,),
}  # fmt: skip
STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def is_valid(value: Any, schema: Any, root: Json) -> bool:
    """Whether a value is valid, by the keywords that these tests use."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root[schema["$ref"].split("/")[1]][schema["$ref"].rpartition("/")[2]]
        if not is_valid(value, target, root):
            return False
    checks = [
        is_of_type(value, schema.get("type"), schema),
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"] or (value is None and "nullable" in schema),
        all(is_valid(value, part, root) for part in schema.get("allOf", ())),
        "anyOf" not in schema or any(is_valid(value, part, root) for part in schema["anyOf"]),
        "oneOf" not in schema or sum(is_valid(value, p, root) for p in schema["oneOf"]) == 1,
        "not" not in schema or not is_valid(value, schema["not"], root),
    ]
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        checks.append(all(name in value for name in schema.get("required") or ()))
        checks += [
            is_valid(value[name], inner, root)
            for name, inner in properties.items()
            if name in value
        ]
        if schema.get("additionalProperties") is False:
            checks.append(value.keys() <= properties.keys())
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        checks += [is_valid(item, schema["items"], root) for item in value]
    return all(checks)


def is_of_type(value: Any, kinds: Any, schema: Json) -> bool:
    """Whether `type` (or `nullable`) allows a value."""
    if kinds is None or (value is None and schema.get("nullable")):
        return True
    names = kinds if isinstance(kinds, list) else [kinds]
    return any(isinstance(value, TYPES[name]) and not (
        isinstance(value, bool) and name in ("integer", "number")) for name in names)  # fmt: skip


def random_schema(rng: random.Random, depth: int) -> Json:
    """A schema of one property."""
    kind = rng.randrange(9 if depth else 5)
    if kind == 0:
        return {"type": rng.choice([["string", "null"], ["string", "integer"], ["null"]])}
    if kind == 1:
        return {rng.choice(["const", "enum"]): ["a"]} | {"description": "d"}
    if kind == 2:
        return {"$ref": rng.choice(["#/$defs/word", "#/$defs/pair", "#/definitions/loop"])}
    if kind == 3:
        return {"type": "string", "enum": ["a", "b"], "format": "uri"}
    if kind == 4:
        return rng.choice([STRING, INTEGER, {}, {"type": "array"}, {"type": "boolean"}])
    inner = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if kind == 5:
        return {rng.choice(["anyOf", "oneOf", "allOf"]): inner}
    if kind == 6:
        return {"type": "array", "items": inner[0]}
    return random_object(rng, depth - 1)


def random_object(rng: random.Random, depth: int) -> Json:
    """A schema of an object, with unions beside its properties.

    All define the same: a result says of a property what the branches that define it say.
    """
    schema: Json = {"type": "object", "properties": {n: random_schema(rng, depth) for n in "abcd"}}
    schema["required"] = rng.sample("abcd", rng.randint(0, 2))
    if depth and rng.random() < 0.6:
        branches = [random_object(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        schema[rng.choice(["anyOf", "oneOf", "allOf"])] = branches
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    return schema


VALUES = [None, "a", "b", 1, True, [], ["a"], {}, {"a": "a"}, {"a": 1, "b": "b"}]


def random_value(rng: random.Random) -> Json:
    """Arguments of a call, as a model might write them."""
    return {name: rng.choice(VALUES) for name in rng.sample("abcd", rng.randint(0, 4))}


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("seed", range(4))
def test_what_the_original_allows_is_allowed(vendor: str, seed: int) -> None:
    rng = random.Random(seed)
    allowed = 0
    for _ in range(100):
        schema = random_object(rng, 2)
        schema["$defs"] = {"word": STRING, "pair": {"type": "object", "properties": {"a": STRING}}}
        schema["definitions"] = {"loop": {"properties": {"a": {"$ref": "#/definitions/loop"}}}}
        before = copy.deepcopy(schema)
        fitted = gw.adapt_schema(schema, vendor)
        assert schema == before
        check_top(fitted)
        for _ in range(20):
            value = random_value(rng)
            if is_valid(value, schema, schema):
                allowed += 1
                assert is_valid(value, fitted, fitted), (value, schema, fitted)
    assert allowed > 30


def check_top(schema: Json) -> None:
    """What Claude, GPT, Gemini and Kiro all demand of the top."""
    assert schema["type"] == "object" and isinstance(schema["properties"], dict)
    assert not {"anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref"} & schema.keys()
    assert set(schema.get("required", ())) <= schema["properties"].keys()


REQUIRED_A = {"properties": {"a": STRING}, "required": ["a"]}
REQUIRED_B = {"properties": {"b": INTEGER}, "required": ["b"]}
TOPS: dict[str, tuple[Json, Json]] = {
    "a choice": ({"anyOf": [REQUIRED_A, REQUIRED_B]}, {"properties": {"a": STRING, "b": INTEGER}}),
    "one of": (
        {"oneOf": [{**REQUIRED_A}, {"properties": {"a": INTEGER}, "required": ["a"]}]},
        {"properties": {"a": {"anyOf": [STRING, INTEGER]}}, "required": ["a"]},
    ),
    "kinds": (
        {"oneOf": [{"properties": {"k": {"const": word}}, "required": ["k"]} for word in "xy"]},
        {"properties": {"k": {"enum": ["x", "y"]}}, "required": ["k"]},
    ),
    "all of": (
        {"allOf": [REQUIRED_A, REQUIRED_B]},
        {"properties": {"a": STRING, "b": INTEGER}, "required": ["a", "b"]},
    ),
    "a reference": (
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", **REQUIRED_A}}},
        {"properties": {"a": STRING}, "required": ["a"]},
    ),
    "all of a reference": (
        {"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": REQUIRED_A}},
        {"properties": {"a": STRING}, "required": ["a"]},
    ),
    "conditions": (
        {**REQUIRED_A, "if": {}, "then": {}, "else": {}, "not": {"required": ["b"]}},
        {"properties": {"a": STRING}, "required": ["a"]},
    ),
    "nulls": ({"properties": None, "required": None, "description": None}, {"properties": {}}),
    "nulls inside": (
        {"properties": {"a": {"type": "string", "enum": None, "items": None}, "b": None}},
        {"properties": {"a": STRING, "b": {}}},
    ),
    "undefined names": ({"properties": {"a": STRING}, "required": ["a", "z"]}, REQUIRED_A),
    "a tuple": (
        {"properties": {"a": {"type": "array", "items": [STRING, INTEGER]}}},
        {"properties": {"a": {"type": "array", "items": {"anyOf": [STRING, INTEGER]}}}},
    ),
}


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", TOPS)
def test_the_top_of_a_schema_is_an_object(name: str, vendor: str) -> None:
    schema, wanted = copy.deepcopy(TOPS[name])
    fitted = gw.adapt_schema(schema, vendor)
    check_top(fitted)
    if vendor == "Google":
        wanted = {key: value for key, value in wanted.items() if key != "default"}
    assert fitted == {"type": "object", **wanted}


GEMINI: dict[str, tuple[Json, Json]] = {
    "a reference": ({"allOf": [{"$ref": "#/$defs/kind"}], "description": "d"},
                    {"type": "string", "enum": ["a", "b"], "description": "d"}),
    "one of": ({"oneOf": [STRING, INTEGER]}, {"anyOf": [STRING, INTEGER]}),
    "two parts": ({"allOf": [STRING, {"minLength": 2}]}, {"type": "string", "minLength": 2}),
    "a constant": ({"const": "x"}, {"enum": ["x"]}),
    "perhaps nothing": ({"type": ["string", "null"], "enum": ["a", None]},
                        {"type": "string", "enum": ["a"], "nullable": True}),
    "two types": ({"type": ["string", "integer"]}, {"anyOf": [STRING, INTEGER]}),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMINI)
def test_gemini_gets_the_meaning_in_its_own_keywords(name: str) -> None:
    inner, wanted = copy.deepcopy(GEMINI[name])
    schema = {"type": "object", "properties": {"p": inner}}
    schema["$defs"] = {"kind": {"type": "string", "enum": ["a", "b"]}}
    assert gw.adapt_schema(schema, "Google")["properties"] == {"p": wanted}


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_property_may_have_the_name_of_any_keyword(vendor: str) -> None:
    words = ["anyOf", "not", "if", "$ref", "const", "items", "required", "properties", "$defs"]
    schema = {"type": "object", "properties": dict.fromkeys(words, STRING), "required": words}
    assert gw.adapt_schema(copy.deepcopy(schema), vendor) == schema


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("odd", [None, True, 5, "x", [], [None], [5], {"a": 1}, [[]]])
def test_odd_values_of_keywords_are_no_accident(odd: Any, vendor: str) -> None:
    words = ["anyOf", "allOf", "oneOf", "required", "properties", "items", "enum", "type", "$ref",
             "not", "if", "$defs", "definitions", "const", "format"]  # fmt: skip
    for first, second in itertools.pairwise([*words, words[0]]):
        schema = {"type": "object", first: copy.deepcopy(odd), second: copy.deepcopy(odd)}
        check_top(
            gw.adapt_schema({**schema, "properties": {"p": {first: odd, second: odd}}}, vendor)
        )
        check_top(gw.adapt_schema(schema, vendor))
