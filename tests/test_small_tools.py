"""Section 3: typed JSON fields, compact JSON, redaction."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from aiclient_api import (
    MAX_JSON_DEPTH,
    MAX_JSON_KEYS,
    MAX_JSON_VALUES,
    BodyTooLarge,
    InvalidRequest,
    bool_field,
    dict_field,
    dump_json,
    int_field,
    join_path,
    list_field,
    load_body,
    load_json,
    load_object,
    mask_secrets,
    nearest,
    need_dict,
    need_str,
    number_field,
    one_line,
    redact,
    short_hash,
    str_field,
)

SEED = 20261122


def test_json_is_compact_in_order_and_not_escaped() -> None:
    """formats.md 5.0: prompt caches depend on stable bytes."""
    assert (
        dump_json({"b": [1, 2.5, None], "a": "é日🙂"}) == '{"b":[1,2.5,null],"a":"é日🙂"}'.encode()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ud83d", "\ufffd"),
        ("a\ud83d b", "a\ufffd b"),
        ("\ude42", "\ufffd"),
        ("\ud83d\ude42", "\U0001f642"),
        ("\ud83d\ud83d\ude42\ude42", "\ufffd\U0001f642\ufffd"),
    ],
)
def test_half_an_emoji_becomes_a_replacement_character(text: str, expected: str) -> None:
    """formats.md 6.4: a lone surrogate would make every later request of the session a 400."""
    assert json.loads(dump_json([text])) == [expected]


def test_half_an_emoji_that_was_parsed_can_be_written_again() -> None:
    """`json.loads` accepts what `.encode` refuses."""
    value = load_json(b'{"a":"\\ud83d","b":"ok"}')
    assert json.loads(dump_json(value)) == {"a": "\ufffd", "b": "ok"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_is_not_json_is_never_written(value: Any) -> None:
    """NaN would break the caller's parser."""
    with pytest.raises(ValueError, match="JSON"):
        dump_json(value)


def test_a_request_nested_too_deeply_is_told_so() -> None:
    """A recursion error is a 400, not a 500."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        dump_json(deep)
    while deep:
        deep = deep[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", "NaN", "[Infinity]", "-Infinity", "{'a':1}", "1 2", "\x00", "[" * 200_000],
)
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    """However it is broken."""
    for data in (text, text.encode()):
        with pytest.raises(ValueError):
            load_json(data)


def test_bytes_that_are_not_utf_8_are_a_value_error() -> None:
    """UnicodeDecodeError is one."""
    with pytest.raises(ValueError):
        load_json(b'"\xff"')


@pytest.mark.parametrize("text", ["[]", "1", "null", "x", "", '"{}"', "{"])
def test_only_an_object_is_an_object(text: str) -> None:
    """An upstream's words are looked at, never trusted."""
    assert load_object(text) is None
    assert load_object('{"a":1}') == {"a": 1}


@pytest.mark.parametrize("text", ["1e999", "[-1e999]", '{"a":[1,2e400]}'])
def test_a_number_that_would_become_infinity_is_not_read(text: str) -> None:
    """It could not be written again."""
    assert load_object(text) is None
    with pytest.raises(ValueError, match="too large"):
        load_json(text)


def test_a_key_that_stands_twice_at_the_top_is_refused() -> None:
    """formats.md 6.4: two `model` keys are read differently by two programs."""
    inner = b'{"model":"a","x":{"y":1,"y":2},"z":[{"model":2}]}'
    assert load_body(inner)["model"] == "a"
    with pytest.raises(InvalidRequest, match="duplicate key"):
        load_body(b'{"model":"a","x":{"model":1},"model":"b"}')


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a":NaN}', "not valid JSON"),
        (b'{"a":1e999}', "not valid JSON"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"a":1}', "must be a JSON object"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'[{"a":1,"a":2}]', "must be a JSON object"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_object_is_a_400(data: bytes, words: str) -> None:
    """The reason is told, the body is not repeated."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        load_body(data)
    assert len(str(caught.value)) < 300


def test_a_body_may_be_nested_as_deep_as_the_limit_says() -> None:
    """One level more is refused, lists and objects alike."""
    for opening, closing in (("[", "]"), ('{"k":', "}")):
        for depth, good in ((MAX_JSON_DEPTH - 1, True), (MAX_JSON_DEPTH, False)):
            middle = "1" if opening != "[" else ""
            text = '{"a":' + opening * depth + middle + closing * depth + "}"
            if good:
                assert load_body(text.encode())
            else:
                with pytest.raises(InvalidRequest, match="nested"):
                    load_body(text.encode())


@pytest.mark.parametrize("tiny", [b"1,", b"[],", b"{},", b'{"":[]},', b'"",', b"[[[[[[[[]]]]]]]],"])
def test_a_body_of_tiny_values_is_refused_before_it_is_parsed(tiny: bytes) -> None:
    """Thirty megabytes of them would stop every stream for seconds."""
    with pytest.raises(BodyTooLarge):
        load_body(b'{"a":[' + tiny * (MAX_JSON_VALUES + 1) + b"1]}")


@pytest.mark.parametrize("text", ["1,2;[x]{y}:\n", '\\",', "\\\\,", '\\\\\\",:'])
def test_what_stands_inside_a_string_is_not_counted(text: str) -> None:
    """A table in a prompt is one value, however many commas it has."""
    table = (text * MAX_JSON_VALUES).replace("\n", "\\n")
    assert len(load_body(b'{"a":["%b","x"]}' % table.encode())["a"]) == 2


def test_a_quote_that_is_never_closed_costs_no_more_than_its_length() -> None:
    """Each of the quotes behind it would start a search of its own."""
    for size in (200_000, 800_000):
        begun = time.process_time()
        with pytest.raises((InvalidRequest, BodyTooLarge)):
            load_body(b'{"a":"' + b'\\",' * size)
        assert time.process_time() - begun < size * 2e-6


def test_the_keys_at_the_top_are_read_in_one_pass() -> None:
    """They are compared with each other, not searched for in the text."""
    long = "x" * 1_000_000
    keys = {f"k{number}": long[:1000] for number in range(MAX_JSON_KEYS)}
    begun = time.process_time()
    assert load_body(json.dumps(keys).encode()) == keys
    assert time.process_time() - begun < 0.2
    with pytest.raises(InvalidRequest, match="keys"):
        load_body(json.dumps({**keys, "more": 1}).encode())


@pytest.mark.parametrize("blank", ["", " ", "\n", "\t \r\n"])
def test_blanks_may_stand_between_all_members(blank: str) -> None:
    """RFC 8259 section 2; what stands behind the object is refused."""
    text = blank.join(["", "{", '"a"', ":", "[1]", ",", '"\\u0062"', ":", "null", "}", ""])
    assert load_body(text.encode()) == {"a": [1], "b": None}
    assert load_body(f"{blank}{{{blank}}}{blank}".encode()) == {}
    for broken in (text + "x", text + "{}", text.replace(",", ",,"), text.replace("null", "")):
        with pytest.raises(InvalidRequest, match="not valid JSON"):
            load_body(broken.encode())


FIELDS: list[tuple[Callable[..., Any], list[Any], list[Any], Any]] = [
    (str_field, ["", "x"], [1, 1.5, True, [], {}], None),
    (int_field, [0, -3, 2**70], ["1", 1.5, True, [], {}, float("inf"), float("nan")], None),
    (number_field, [0, 1.5, -2], ["1", True, [], {}], None),
    (bool_field, [True, False], [0, 1, "true", [], {}], None),
    (list_field, [[], [1]], ["x", 1, True, {}], []),
    (dict_field, [{}, {"a": 1}], ["x", 1, True, []], {}),
]


@pytest.mark.parametrize(
    ("reader", "good", "bad", "absent"), FIELDS, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_field_is_itself_or_absent_or_a_400_that_names_it(
    reader: Callable[..., Any], good: list[Any], bad: list[Any], absent: Any
) -> None:
    """Null counts as absent, as clients send null for every optional field."""
    assert reader({}, "k") == absent and reader({"k": None}, "k") == absent
    for value in good:
        assert reader({"k": value}, "k") == value
    for value in bad:
        with pytest.raises(InvalidRequest) as caught:
            reader({"k": value}, "k", "messages.3")
        assert caught.value.param == "messages.3.k"
        assert str(caught.value).startswith("messages.3.k: must be ")


def test_a_float_without_fraction_is_an_integer() -> None:
    """JavaScript writes 5 as 5.0 in places."""
    value = int_field({"n": 5.0}, "n")
    assert value == 5 and isinstance(value, int)


def test_what_must_be_there_is_asked_for() -> None:
    """The path stands in the message and in `param`."""
    with pytest.raises(InvalidRequest, match=r"^tools\.0\.name: is required\.$") as caught:
        need_str({}, "name", "tools.0")
    assert caught.value.param == "tools.0.name"
    with pytest.raises(InvalidRequest, match=r"^tools\.0: must be an object\.$"):
        need_dict([], "tools.0")
    assert need_str({"name": ""}, "name") == ""


def test_paths_are_written_with_dots() -> None:
    """The way Anthropic writes them."""
    assert join_path("messages", 3) == "messages.3"
    assert join_path("", "model") == "model"


def test_a_hash_is_the_same_for_the_same_text() -> None:
    """Half emojis may stand in it."""
    assert short_hash("abc", 8) == "ba7816bf"
    assert len(short_hash("\ud83d", 24)) == 24


@pytest.mark.parametrize(
    ("name", "expected"),
    [("prot", ["port"]), ("PORT", ["port"]), ("hots", ["host"]), ("zzzzzz", [])],
)
def test_the_nearest_name_is_found(name: str, expected: list[str]) -> None:
    """Case does not count."""
    assert nearest(name, ["port", "host", "max_body_mib"], 1) == expected


SECRETS = [
    "ghu_16C7e42F292c6912E7710c838347Ae178B4a",
    "gho_16C7e42F292c6912E7710c838347Ae178B4a",
    "ghp_abcd1234",
    "github_pat_11ABCDEFG0_abcdefg",
    "tid=0123;exp=1795430000;sku=copilot;8kp=1:0123abcd",
    "sk-ant-api03-abcdefghijkl",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "around", ["{}", "x: {} y", '{{"token":"{}"}}', "Authorization: Bearer {}"]
)
def test_what_looks_like_a_secret_is_taken_out(secret: str, around: str) -> None:
    """The forms of GitHub, Copilot, OpenAI, Anthropic and of JWTs."""
    shown = redact(around.format(secret), 1000)
    assert secret not in shown and "[secret]" in shown
    assert not any(secret[at : at + 12] in shown for at in range(4, len(secret) - 12))


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_that_the_limit_cuts_in_two_is_taken_out_all_the_same(secret: str) -> None:
    """Text is cut before it is searched: what is left of a secret is one still."""
    for limit in range(1, len(secret) + 20):
        shown = redact(f"why: {secret} " + "x" * 500, limit)
        assert len(shown) <= limit
        assert not any(secret[at : at + 12] in shown for at in range(4, len(secret) - 12))


def test_a_secret_in_use_is_hidden_whatever_it_looks_like() -> None:
    """Also where a limit has left only the beginning of it."""
    secret = "correct horse battery staple"
    for cut in (len(secret), 20, 12):
        shown = mask_secrets(f"no {secret[:cut]}, and again {secret[:cut]}", ["", "no", secret])
        assert shown == "no [secret], and again [secret]"
    assert mask_secrets("a correct answer", [secret]) == "a correct answer"


def test_what_stands_behind_the_limit_costs_nothing() -> None:
    """An upstream's error may be a frame of megabytes, made to be hard to search."""
    begun = time.process_time()
    for hard in ("eyJaaaa", "token ", "Bearer\t", "gho_a", "sk-a", "aoa", "tid=", "eyJ.-."):
        assert len(redact(hard * 1_000_000, 2000)) <= 2000
    assert time.process_time() - begun < 0.1


def test_ordinary_words_stay() -> None:
    """Redaction may not eat an upstream's reason."""
    text = "prompt token count of 200001 exceeds the limit of 128000; use a token later"
    assert redact(text, 1000) == text


def test_json_survives_a_round_trip_byte_for_byte() -> None:
    """Seeded random values: what is read from compact bytes is written as the same bytes."""
    rng = random.Random(SEED)

    def value(depth: int) -> Any:
        kind = rng.randint(0, 6 if depth else 4)
        if kind == 5:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        if kind == 6:
            return {chr(rng.randint(32, 0x2FFF)): value(depth - 1) for _ in range(3)}
        return [None, True, rng.randint(-(2**60), 2**60), rng.random(), 'é\u2028\n"\\🙂'][kind]

    for _ in range(300):
        data = json.dumps(value(3), ensure_ascii=False, separators=(",", ":")).encode()
        assert dump_json(load_json(data)) == data


UNSEEN = ["\x1b", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\u200f", "\ufeff",
          "\u061c", "\xad", "\u3164", "\U000e0041", "\ud83d"]  # fmt: skip
BREAKS = ["\n", "\r", "\t", "\x0b", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("letter", UNSEEN + BREAKS, ids=ascii)
def test_what_steers_a_terminal_or_is_not_seen_there_is_no_part_of_a_line(letter: str) -> None:
    shown = "pro kiro" if letter in BREAKS else "prokiro"
    assert one_line(f"pro{letter}kiro") == shown


@pytest.mark.parametrize(
    "words", ["Gr\u00fc\u00dfe", "\u65e5\u672c\u8a9e", "\u05e9\u05dc", "a b  c", "\U0001f642"]
)
def test_words_of_any_language_are_shown_as_they_are(words: str) -> None:
    assert one_line(words) == words
