"""Upstream rules: what Copilot refuses, adds and means, held against the imitation's own checks."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from typing import Any

import pytest
from fakes import Issued, check_chat, check_messages, default_models

import aiclient_api as gw

Json = dict[str, Any]
PNG = "iVBORw0KGgo="
NOW = 1_795_000_000.0

SONNET = "claude-sonnet-4.5"  # thinks with a budget
OPUS = "claude-opus-4.8"  # thinks adaptively, takes system turns, no sampling
HAIKU = "claude-haiku-4.5"
GEMINI = "gemini-3.1-pro-preview"
GPT5 = "gpt-5.2"

RAW = {entry["id"]: entry for entry in reversed(default_models()) if "id" in entry}
MODELS = gw.read_copilot_models({"data": default_models()}, "copilot")


def user(content: Any) -> Json:
    """A user message of either dialect."""
    return {"role": "user", "content": content}


def assistant(*blocks: Json) -> Json:
    """An assistant message of the messages dialect."""
    return {"role": "assistant", "content": list(blocks)}


def text(words: str, **more: Any) -> Json:
    """A text block."""
    return {"type": "text", "text": words, **more}


def tool_use(call: str, name: str = "look") -> Json:
    """A call of the messages dialect."""
    return {"type": "tool_use", "id": call, "name": name, "input": {}}


def result(call: str, content: Any = "done", **more: Any) -> Json:
    """The result of a call of the messages dialect."""
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def call_message(*calls: str, **more: Any) -> Json:
    """An assistant message of the chat dialect that calls tools."""
    function = {"name": "look", "arguments": "{}"}
    rows = [{"id": call, "type": "function", "function": dict(function)} for call in calls]
    return {"role": "assistant", "content": None, "tool_calls": rows, **more}


def tool_message(call: str, content: Any = "done") -> Json:
    """The result of a call of the chat dialect."""
    return {"role": "tool", "tool_call_id": call, "content": content}


def tool(name: str = "look", schema: Json | None = None, **more: Any) -> Json:
    """A tool of the messages dialect."""
    plain = {"type": "object", "properties": {"path": {"type": "string"}}}
    return {"name": name, "description": "Looks.", "input_schema": schema or plain, **more}


def function(name: str = "look", schema: Json | None = None, **more: Any) -> Json:
    """A tool of the chat dialect."""
    plain = {"type": "object", "properties": {"path": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": name, "description": "Looks.", "parameters": schema or plain, **more},
    }


def scrub(
    dialect: str, model: str, lessons: gw.Rejections | None = None, **fields: Any
) -> gw.BodyDraft:
    """A body after the rules; `fields` complete or replace the plainest one."""
    body: Json = {"messages": [user("hello")], **fields}
    if dialect == "messages":
        body.setdefault("max_tokens", 4000)
    return gw.sanitize_body(dialect, body, MODELS[model], lessons or {}, True)


def messages(model: str = SONNET, **fields: Any) -> Json:
    """A messages body after the rules, once the imitation has taken it."""
    body = scrub("messages", model, **fields).body
    betas = gw.messages_betas(body, fields.get("asked", ""), set(), MODELS[model])
    check_messages(copy.deepcopy(body), RAW[model], set(betas.split(",")) - {""}, signed())
    return body


def chat(model: str = "gpt-4.1", **fields: Any) -> Json:
    """A chat body after the rules, once the imitation has taken it."""
    body = scrub("chat", model, **fields).body
    check_chat(copy.deepcopy(body), RAW[model], signed())
    return body


def signed() -> Issued:
    """One thought that the imitation takes for its own."""
    issued = Issued()
    issued.sign("hm", "GENUINE")
    return issued


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "GENUINE"}


# ---- the model list ------------------------------------------------------------------------------


def test_a_list_without_end_is_read_in_part() -> None:
    rows = [{"id": f"m-{number}", "name": "n" * 1000, "vendor": []} for number in range(5000)]
    models = gw.read_copilot_models({"data": rows}, "copilot")
    assert len(models) == gw.MAX_LISTED_MODELS
    assert len(models["m-0"].name) == gw.MAX_NAME_CHARS and models["m-0"].vendor == ""


def test_names_without_end_are_cut_wherever_they_are_shown() -> None:
    long = "n" * 100_000
    body = {"login": long, "copilot_plan": long, "quota_snapshots": {long: {"entitlement": 9}}}
    credits_ = {"currentUsage": 1, "usageLimit": 2, "bonuses": [{"displayName": long}]}
    limits = {"subscriptionInfo": {"subscriptionTitle": long}, "usageBreakdownList": [credits_]}
    for quota in (gw.read_copilot_quota(body), gw.read_kiro_quota(limits, 0.0)):
        assert quota.allowances and len(gw.dump_json(quota.as_json())) < 2000


@pytest.mark.parametrize("odd", [None, "1", [], 1e39, 10**400])
def test_embeddings_that_are_no_numbers_are_an_error_of_the_upstream(odd: Any) -> None:
    with pytest.raises(gw.UpstreamError, match="not numbers"):
        gw.write_embeddings([{"embedding": [0.5, odd]}], gw.Usage(), is_packed=True)


def test_the_list_skips_odd_entries_and_keeps_the_first_of_doubled_ids() -> None:
    odd: list[Any] = [None, "text", {"object": "model"}, {"id": ""}, {"id": 5}, {"id": None}]
    models = gw.read_copilot_models({"data": [*odd, *default_models()]}, "copilot")
    assert list(models) == [m for m in RAW if m in models][::-1]
    assert models["gpt-4o"].name == "Gpt 4O"
    assert models["text-embedding-3-small"].embeds
    assert models["text-embedding-3-small"].dialects == ()


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": {}}, {"data": []}, {"error": "x"}])
def test_a_list_without_entries_is_empty(body: Json) -> None:
    assert gw.read_copilot_models(body, "copilot") == {}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"capabilities": None, "billing": None, "policy": None, "supported_endpoints": None},
        {"capabilities": {"limits": None, "supports": None}, "request_headers": None},
        {"capabilities": {"limits": {"max_output_tokens": 0, "max_prompt_tokens": "many"}}},
        {"capabilities": {"supports": {"reasoning_effort": "high", "max_thinking_budget": "big"}}},
    ],
)
def test_everything_but_the_id_may_be_missing(entry: Json) -> None:
    model = gw.read_copilot_model({"id": "new-1", **entry}, "copilot")
    assert model is not None
    assert model.dialects == ("chat",)
    assert (model.max_output, model.budget, model.efforts, model.listed) == (None, None, (), True)


@pytest.mark.parametrize(
    ("endpoints", "dialects"),
    [
        (None, ("chat",)),
        (["/chat/completions"], ("chat",)),
        (["/v1/messages", "/chat/completions"], ("messages", "chat")),
        (["/responses", "ws:/responses"], ("responses",)),
        (["/chat/completions", "/new"], ("chat",)),
        ([[], {}, None, "/chat/completions"], ("chat",)),
        ([], ()),
    ],
)
def test_supported_endpoints_become_dialects(endpoints: Any, dialects: tuple[str, ...]) -> None:
    entry = {"id": "m"} if endpoints is None else {"id": "m", "supported_endpoints": endpoints}
    model = gw.read_copilot_model(entry, "copilot")
    assert model is not None
    assert model.dialects == dialects


@pytest.mark.parametrize(
    "hidden",
    [
        {"policy": {"state": "unconfigured"}},
        {"policy": {"state": "disabled"}},
        {"model_picker_enabled": False},
    ],
)
def test_a_model_that_is_switched_off_is_known_but_not_listed(hidden: Json) -> None:
    model = gw.read_copilot_model({"id": "m", **hidden}, "copilot")
    assert model is not None
    assert not model.listed


def test_limits_thinking_and_unknown_fields_are_kept() -> None:
    model = MODELS[OPUS]
    assert (model.adaptive, model.efforts) == (True, ("low", "medium", "high"))
    assert (model.max_output, model.max_prompt, model.context) == (32_000, 168_000, 200_000)
    assert MODELS[GEMINI].budget == (256, 32_000)
    assert model.raw["billing"]["multiplier"] == 1


def test_headers_that_a_model_wants_are_taken_unless_they_mean_more_than_the_model() -> None:
    asked = {"X-Example": "1", "x bad name": "1", "x-number": 1, "x-split": "1\r\nx-evil: 2"}
    of_http = ("Host", "Content-Length", "transfer-encoding", "Authorization", "Cookie", "Expect",
               "Accept-Encoding", "Connection", "User-Agent", "Proxy-Authorization")  # fmt: skip
    asked = asked | dict.fromkeys(of_http, "1")
    model = gw.read_copilot_model({"id": "m", "request_headers": asked}, "copilot")
    assert model is not None
    assert model.headers == {"x-example": "1"}


# ---- model names ---------------------------------------------------------------------------------

NAMES = {
    name: gw.Model(name, "copilot")
    for name in (
        "claude-sonnet-4.5", "claude-sonnet-4", "claude-opus-4.6", "claude-opus-4.6-1m",
        "claude-opus-4.8-fast", "claude-3.5-sonnet", "gpt-4.1", "gpt-4o-2024-11-20", "Mixed-Case",
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("claude-sonnet-4.5", "claude-sonnet-4.5"),
        ("Claude-Sonnet-4.5", "claude-sonnet-4.5"),
        ("mixed-case", "Mixed-Case"),
        ("claude-sonnet-4-5", "claude-sonnet-4.5"),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4.5"),
        ("claude-sonnet-4-5-latest", "claude-sonnet-4.5"),
        ("claude-sonnet-4.5-20250929", "claude-sonnet-4.5"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("claude-3-5-sonnet-latest", "claude-3.5-sonnet"),
        ("claude-3-5-sonnet-20241022", "claude-3.5-sonnet"),
        ("claude-opus-4-8-fast", "claude-opus-4.8-fast"),
        ("claude-opus-4-6[1m]", "claude-opus-4.6-1m"),
        ("claude-opus-4.6[1m]", "claude-opus-4.6-1m"),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4.5"),
        ("claude-sonnet-4-0", "claude-sonnet-4"),
        ("claude-sonnet-4.0", "claude-sonnet-4"),
        ("Claude-4-0-Sonnet-20250514", "claude-sonnet-4"),
        ("anthropic/claude-sonnet-4.5", "claude-sonnet-4.5"),
        ("anthropic/claude-4.0-sonnet", "claude-sonnet-4"),
        ("github_copilot/claude-opus-4-6[1m]", "claude-opus-4.6-1m"),
        ("OpenAI/gpt-4o-2024-11-20", "gpt-4o-2024-11-20"),
        ("bedrock/anthropic/claude-sonnet-4-5", "claude-sonnet-4.5"),
        ("elsewhere/claude-sonnet-4.5", None),
        ("gpt-4o-2024-11-20", "gpt-4o-2024-11-20"),
        ("gpt-4", None),
        ("claude-opus-4-1", None),
        ("", None),
    ],
)
def test_a_model_is_found_in_every_usual_spelling(asked: str, found: str | None) -> None:
    model = gw.find_model(asked, NAMES)
    assert (model and model.id) == found


def test_a_family_name_finds_its_model() -> None:
    dated = {"id": "gpt-4o-2024-11-20", "capabilities": {"family": "gpt-4o"}}
    models = gw.read_copilot_models({"data": [dated]}, "copilot")
    found = gw.find_model("gpt-4o", models)
    assert found is not None
    assert found.id == "gpt-4o-2024-11-20"


def test_a_guessed_model_speaks_what_its_kind_speaks() -> None:
    assert gw.guess_copilot_model("claude-new-9", "p").dialects == ("messages", "chat")
    assert gw.guess_copilot_model("gpt-9", "p").dialects == ("chat",)
    for name in ("gpt-5.6-sol", "gpt-6-astra", "gpt-6.2-luna", "grok-4.7", "mai-code-2"):
        assert gw.guess_copilot_model(name, "p").dialects == ("responses",)
    for name in ("gemini-4-argon", "kimi-k3"):
        assert gw.guess_copilot_model(name, "p").dialects == ("chat",)
    assert gw.guess_copilot_model("gpt-9", "p").guessed


# ---- hosts and tokens ----------------------------------------------------------------------------

FOREIGN_HOSTS = [
    "https://evil.example",
    "https://githubcopilot.com.evil.example",
    "https://evilgithubcopilot.com",
    "https://api.githubcopilot.com@evil.example",
    "https://evil.example/.githubcopilot.com",
    "https://evil.example?.githubcopilot.com",
    "https://evil.example#.ghe.com",
    "http://api.individual.githubcopilot.com",
    "http://127.0.0.1:9",
    "https://localhost",
    "//api.githubcopilot.com",
    "ftp://api.githubcopilot.com",
    "https://[::1",
    "https://api.individual.githubcopilot.com:port",
]


@pytest.mark.parametrize("url", FOREIGN_HOSTS)
def test_a_token_answer_that_names_a_foreign_host_is_refused(url: str) -> None:
    body = {"token": "tid=1", "endpoints": {"api": url}}
    with pytest.raises(gw.UpstreamError) as caught:
        gw.read_token_response(body, gw.CopilotConfig(), NOW)
    assert "tid=" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.individual.githubcopilot.com",
        "https://api.githubcopilot.com",
        "https://copilot-api.octo.ghe.com",
        "https://API.Business.GithubCopilot.com",
    ],
)
def test_a_token_goes_to_the_host_of_its_own_answer(url: str) -> None:
    body = {"token": "tid=1", "endpoints": {"api": url + "/"}}
    assert gw.read_token_response(body, gw.CopilotConfig(), NOW).api_url == url


def test_loopback_is_a_copilot_host_only_beside_a_loopback_github() -> None:
    config = gw.CopilotConfig(github_api_url="http://127.0.0.1:5")
    assert gw.allowed_api_host("http://127.0.0.1:6", config)
    assert not gw.allowed_api_host("https://evil.example", config)
    assert not gw.allowed_api_host("http://127.0.0.1:6", gw.CopilotConfig())


def test_a_configured_host_wins_over_the_answer_and_a_plan_host_fills_in() -> None:
    named = {"token": "t", "endpoints": {"api": "https://api.business.githubcopilot.com"}}
    own = gw.CopilotConfig(api_url="https://gateway.example/")
    assert gw.read_token_response(named, own, NOW).api_url == "https://gateway.example"
    plan = gw.CopilotConfig(account_type="enterprise")
    token = gw.read_token_response({"token": "t", "endpoints": None}, plan, NOW)
    assert token.api_url == "https://api.enterprise.githubcopilot.com"


@pytest.mark.parametrize(
    ("said", "life"), [(900, 900), (None, 1500), (0, 1500), (-5, 1500), ("900", 1500), (True, 1500)]
)
def test_refresh_in_decides_how_long_a_token_lasts(said: Any, life: int) -> None:
    token = gw.read_token_response({"token": "t", "refresh_in": said}, gw.CopilotConfig(), NOW)
    assert token.refresh_in == life
    assert token.expires_at == NOW + life + 60


@pytest.mark.parametrize("token", [None, "", 5, "a\nb", "a\rb", "a\0b", "tid=\N{EURO SIGN}"])
def test_a_token_that_fits_into_no_header_is_refused(token: Any) -> None:
    with pytest.raises(gw.UpstreamError):
        gw.read_token_response({"token": token}, gw.CopilotConfig(), NOW)


def test_a_token_never_shows_itself() -> None:
    token = gw.read_token_response({"token": "tid=SECRET"}, gw.CopilotConfig(), NOW)
    assert "SECRET" not in repr(token)


def test_every_call_carries_the_editor_s_identity_and_the_exchange_its_own() -> None:
    token = gw.CopilotToken("T", "https://api.githubcopilot.com", NOW, 1500.0)
    identity = gw.copilot_headers(token, gw.CopilotConfig(), ("s", "m", "d"), "i", "r")
    assert identity["Authorization"] == "Bearer T"
    assert {"Editor-Version", "Editor-Plugin-Version", "User-Agent"} <= set(identity)
    exchange = gw.exchange_headers("G")
    assert exchange["Authorization"] == "token G"
    assert exchange["X-GitHub-Api-Version"] == "2025-04-01"
    assert {"Editor-Version", "Editor-Plugin-Version", "User-Agent"} <= set(exchange)


def test_an_interaction_id_is_the_same_for_the_same_conversation() -> None:
    assert gw.hash_uuid("a") == gw.hash_uuid("a") != gw.hash_uuid("b")
    assert gw.hash_uuid("a")[14] == "4"


# ---- betas ---------------------------------------------------------------------------------------

INTERLEAVED = "interleaved-thinking-2025-05-14"
CONTEXT = "context-management-2025-06-27"
BUDGET = {"type": "enabled", "budget_tokens": 2000}


@pytest.mark.parametrize(
    ("model", "asked", "fields", "sent"),
    [
        (SONNET, "", {}, ""),
        (SONNET, "claude-code-20250219, effort-2025-11-24", {},
         "claude-code-20250219,effort-2025-11-24"),
        (SONNET, "new-2027-01-01,new-2027-01-01", {}, "new-2027-01-01"),
        (SONNET, "context-1m-2025-08-07, prompt-caching-2024-07-31", {},
         "prompt-caching-2024-07-31"),
        (SONNET, ", ,\u00e9", {}, ""),
        (SONNET, "effort-2025-11-24", {"thinking": BUDGET}, f"effort-2025-11-24,{INTERLEAVED}"),
        (SONNET, INTERLEAVED, {"thinking": BUDGET}, INTERLEAVED),
        (SONNET, "", {"thinking": BUDGET}, INTERLEAVED),
        (OPUS, INTERLEAVED, {"thinking": {"type": "adaptive"}}, INTERLEAVED),
        (SONNET, "", {"context_management": {"edits": []}}, CONTEXT),
        (SONNET, CONTEXT, {"context_management": {"edits": []}}, CONTEXT),
    ],
)  # fmt: skip
def test_betas_of_the_client_and_of_the_body_go_up(
    model: str, asked: str, fields: Json, sent: str
) -> None:
    assert gw.messages_betas(fields, asked, set(), MODELS[model]) == sent


def test_a_beta_that_was_refused_once_stays_away() -> None:
    body = {"thinking": BUDGET, "context_management": {}}
    assert gw.messages_betas(body, INTERLEAVED, {INTERLEAVED}, MODELS[SONNET]) == CONTEXT


# ---- messages rules ------------------------------------------------------------------------------


def test_unknown_keys_of_a_messages_body_are_dropped_and_named() -> None:
    extra: Json = {"service_tier": "standard_only", "speed": "fast", "container": "c"}
    scrubbed = scrub(
        "messages",
        SONNET,
        metadata={"user_id": "u"},
        inference_geo=None,
        stream_options={},
        **extra,
    )
    assert not {*extra, "metadata", "inference_geo"} & set(scrubbed.body)
    assert set(scrubbed.dropped) == set(extra)


@pytest.mark.parametrize(
    ("asked", "sent"), [(100, 100), (10**6, 16_000), (None, 16_000), (100.0, 100)]
)
def test_max_tokens_is_always_there_and_within_the_model(asked: Any, sent: int) -> None:
    assert messages(max_tokens=asked)["max_tokens"] == sent


def test_the_billing_line_and_blank_system_blocks_are_left_out() -> None:
    billing = text("x-anthropic-billing-header: cc_version=1; cch=abc;")
    body = messages(system=[billing, text(" "), text("Be kind.")])
    assert body["system"] == [text("Be kind.")]
    assert "system" not in messages(system=[billing])


@pytest.mark.parametrize("system", ["", "  \n", [], None])
def test_an_empty_system_prompt_is_left_out(system: Any) -> None:
    assert "system" not in messages(system=system)


CONVERSATIONS: dict[str, list[Json]] = {
    "neighbours of one role": [user("a"), user([text("b")]), assistant(text("c")), user("d")],
    "blank texts": [user([text(" "), text("a")]), assistant(text("")), user("b")],
    "an empty message": [user("a"), {"role": "assistant", "content": []}, user("b")],
    "a call without its result": [user("a"), assistant(tool_use("c1")), user("b")],
    "a result without its call": [user("a"), user([result("c0")]), user("b")],
    "a result after other words": [
        user("a"), assistant(tool_use("c1")), user([text("so"), result("c1")])
    ],
    "results in another order": [
        user("a"), assistant(tool_use("c1"), tool_use("c2")), user([result("c2"), result("c1")])
    ],
    "the result of one of two calls": [
        user("a"), assistant(tool_use("c1"), tool_use("c2")), user([result("c2")])
    ],
    "a result over two messages": [
        user("a"), assistant(tool_use("c1"), tool_use("c2")),
        user([result("c1")]), user([result("c2")]),
    ],
    "a result without content": [
        user("a"), assistant(tool_use("c1")),
        user([{"type": "tool_result", "tool_use_id": "c1"}]),
    ],
    "a result of blank text": [
        user("a"), assistant(tool_use("c1")), user([result("c1", [text("")])])
    ],
    "a result of nothing": [user("a"), assistant(tool_use("c1")), user([result("c1", [])])],
    "foreign ids": [user("a"), assistant(tool_use("call:1.2/3")), user([result("call:1.2/3")])],
    "a foreign tool name": [
        user("a"), assistant(tool_use("c1", "mcp.look at")), user([result("c1")])
    ],
    "a long tool name": [user("a"), assistant(tool_use("c1", "n" * 80)), user([result("c1")])],
    "a call at the end": [user("a"), assistant(tool_use("c1"))],
    "a prefill": [user("a"), assistant(text("It is"))],
    "a prefill with blank end": [user("a"), {"role": "assistant", "content": "It is "}],
    "a system turn first": [{"role": "system", "content": "s"}, user("a")],
    "a system turn inside": [
        user("a"), {"role": "system", "content": [text("s")]}, assistant(text("b")), user("c")
    ],
    "a system turn last": [user("a"), {"role": "system", "content": "s"}],
    "a system turn between users": [user("a"), {"role": "system", "content": "s"}, user("b")],
    "thinking of another vendor": [
        user("a"),
        assistant({"type": "thinking", "thinking": "x", "signature": "gw1.c.AAA"}, text("b")),
        user("c"),
    ],
    "thinking without signature": [
        user("a"), assistant({"type": "thinking", "thinking": "Thinking..."}, text("b")), user("c")
    ],
    "nothing but foreign thinking": [
        user("a"), assistant({"type": "thinking", "thinking": "x", "signature": ""}), user("b")
    ],
    "foreign redacted thinking": [
        user("a"), assistant({"type": "redacted_thinking", "data": "gw1.r.A"}, text("b")), user("c")
    ],
    "own thinking": [user("a"), assistant(THOUGHT, tool_use("c1")), user([result("c1")])],
    "own thinking without its text": [
        user("a"), assistant({**THOUGHT, "thinking": ""}, text("b")), user("c")
    ],
    "marked thinking": [
        user("a"), assistant({**THOUGHT, "cache_control": {"type": "ephemeral"}}, text("b")),
        user("c"),
    ],
    "a text document": [
        user([{"type": "document", "title": "T",
               "source": {"type": "text", "media_type": "text/plain", "data": "words"}}])
    ],
    "a PDF": [
        user([text("a"), {"type": "document", "source": {
            "type": "base64", "media_type": "application/pdf", "data": PNG}}])
    ],
    "a tool reference": [
        user("a"), assistant(tool_use("c1")),
        user([result("c1", [{"type": "tool_reference", "tool_name": "gone"}])]),
    ],
    "an image in a result": [
        user("a"), assistant(tool_use("c1")),
        user([result("c1", [{"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": PNG}}])]),
    ],
}  # fmt: skip


def test_a_call_of_a_native_body_has_one_result() -> None:
    """Anthropic refuses a second one, and a call id that was used before."""
    marked = result("c1", "old", cache_control={"type": "ephemeral"})
    asked = [user("a"), assistant(tool_use("c1")), user([marked, result("c1", "new")])]
    again = [assistant(tool_use("c1")), user([text("so"), result("c1")])]
    settled = messages(messages=[*asked, *again])["messages"]
    assert settled[2]["content"] == [{**marked, "content": [text("old"), text("new")]}]
    assert settled[3]["content"] == [tool_use("c1_2")]
    assert settled[4]["content"] == [result("c1_2"), text("so")]


@pytest.mark.parametrize("model", [SONNET, OPUS])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_settled_until_copilot_takes_it(name: str, model: str) -> None:
    body = messages(model, messages=copy.deepcopy(CONVERSATIONS[name]))
    roles = [m["role"] for m in body["messages"] if m["role"] != "system"]
    assert roles[-1] == "user"
    assert all(one != two for one, two in pairwise(roles))


def test_own_thinking_and_words_go_up_byte_for_byte() -> None:
    turns = [user("a"), assistant(THOUGHT, text("  b  ")), user([text("c \N{SNOWMAN}")])]
    assert messages(messages=copy.deepcopy(turns))["messages"] == turns


def test_a_missing_result_is_said_to_be_missing() -> None:
    body = messages(messages=[user("a"), assistant(tool_use("c1")), user("b")])
    filled = body["messages"][2]["content"][0]
    assert (filled["tool_use_id"], filled["is_error"]) == ("c1", True)
    assert body["messages"][2]["content"][-1] == text("b")


def test_a_trailing_assistant_turn_is_asked_to_continue() -> None:
    body = messages(messages=[user("a"), assistant(text("It is"))])
    assert body["messages"][-1] == user([text("Please continue.")])


@pytest.mark.parametrize("turns", [[user("")], [user([text(" ")])], [user([])]])
def test_a_conversation_without_any_word_is_refused_here(turns: list[Json]) -> None:
    with pytest.raises(gw.InvalidRequest):
        scrub("messages", SONNET, messages=turns)


def test_system_turns_become_reminders_where_the_model_does_not_know_them() -> None:
    turns = [user("a"), {"role": "system", "content": "mind"}, assistant(text("b")), user("c")]
    assert messages(OPUS, messages=copy.deepcopy(turns))["messages"][1]["role"] == "system"
    old = messages(SONNET, messages=copy.deepcopy(turns))["messages"]
    assert [m["role"] for m in old] == ["user", "assistant", "user"]
    assert "<system-reminder>\nmind" in json.dumps(old[0]).replace("\\n", "\n")


ODD_TOOLS: dict[str, list[Json]] = {
    "custom": [tool(type="custom")],
    "extra keys": [
        tool(strict=True, eager_input_streaming=True, defer_loading=True, input_examples=[{}])
    ],
    "callers": [tool(allowed_callers=["direct"])],
    "no schema": [{"name": "look"}],
    "a schema without type": [tool(schema={"properties": {}})],
    "a schema with its address": [
        tool(schema={"type": "object", "$schema": "http://json-schema.org/x", "$id": "y"})
    ],
    "an address inside": [
        tool(schema={"type": "object", "properties": {
            "a": {"type": "object", "$schema": "http://json-schema.org/x"}}})
    ],
    "a foreign name": [tool("mcp.look at")],
    "a name of 100 letters": [tool("n" * 100)],
    "a hosted tool beside": [tool(), {"type": "web_search_20250305", "name": "web_search"}],
    "a tool search beside": [
        tool(), {"type": "tool_search_tool_regex_20251119", "name": "tool_search"}
    ],
    "marked": [tool(cache_control={"type": "ephemeral", "ttl": "1h", "scope": "global"})],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_TOOLS)
def test_tools_are_made_plain(name: str) -> None:
    body = messages(tools=copy.deepcopy(ODD_TOOLS[name]))
    assert len(body["tools"]) == 1


def test_a_hosted_tool_is_dropped_by_name_and_refused_when_it_is_the_only_one() -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    assert any(
        "web_search" in name for name in scrub("messages", SONNET, tools=[tool(), hosted]).dropped
    )
    with pytest.raises(gw.InvalidRequest):
        scrub("messages", SONNET, tools=[hosted])


def test_a_history_with_calls_gets_a_tool_and_a_choice_without_tools_goes() -> None:
    turns = [user("a"), assistant(tool_use("c1")), user([result("c1")])]
    assert len(messages(messages=turns)["tools"]) == 1
    bare = messages(tools=[], tool_choice={"type": "auto"})
    assert not {"tools", "tool_choice"} & set(bare)


def test_a_tool_is_renamed_in_its_choice_and_its_history_alike() -> None:
    turns = [user("a"), assistant(tool_use("c1", "a.b")), user([result("c1")])]
    choice = {"type": "tool", "name": "a.b"}
    body = messages(messages=turns, tools=[tool("a.b")], tool_choice=choice)
    names = {body["tools"][0]["name"], body["tool_choice"]["name"]}
    assert names == {body["messages"][1]["content"][0]["name"]} == {"a_b"}


@pytest.mark.parametrize("place", ["output_config", "output_format"])
@pytest.mark.parametrize("thinking", [None, BUDGET], ids=["plain", "thinking"])
def test_a_schema_for_the_answer_becomes_a_tool_or_goes_into_the_prompt(
    place: str, thinking: Json | None
) -> None:
    """Claude takes no forced choice beside thinking."""
    wanted = {"type": "json_schema", "schema": {"type": "object", "title": "MARK"}}
    fields = {"output_config": {"format": wanted}} if place == "output_config" else {place: wanted}
    fields |= {"thinking": thinking} if thinking else {}
    body = messages(system=[text("Be kind.")], **fields)
    assert body["system"][0] == text("Be kind.")
    assert not {"output_config", "output_format"} & set(body)
    place = "system" if thinking else "tools"
    assert [key for key in ("system", "tools") if "MARK" in str(body.get(key))] == [place]
    assert thinking or body["tool_choice"] == {"type": "tool", "name": "structured_output"}


THINKING_CASES: dict[str, tuple[str, Json, Json]] = {
    "a budget": (SONNET, {"thinking": BUDGET}, {"thinking": BUDGET}),
    "a budget below the least": (
        SONNET,
        {"thinking": {"type": "enabled", "budget_tokens": 1}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    "a budget over the most": (
        HAIKU,
        {"max_tokens": 64_000, "thinking": {"type": "enabled", "budget_tokens": 60_000}},
        {"thinking": {"type": "enabled", "budget_tokens": 32_000}},
    ),
    "no room for a budget": (
        SONNET, {"max_tokens": 500, "thinking": BUDGET}, {"thinking": None}
    ),
    "no budget": (
        SONNET, {"thinking": {"type": "enabled", "budget_tokens": 0}}, {"thinking": None}
    ),
    "a budget for an adaptive model": (
        OPUS,
        {"thinking": {"type": "enabled", "budget_tokens": 10_000}},
        {"thinking": {"type": "adaptive", "display": "summarized"},
         "output_config": {"effort": "medium"}},
    ),
    "adaptive": (
        OPUS,
        {"thinking": {"type": "adaptive", "display": "omitted"},
         "output_config": {"effort": "low"}},
        {"thinking": {"type": "adaptive", "display": "omitted"},
         "output_config": {"effort": "low"}},
    ),
    "adaptive for a budget model": (
        SONNET,
        {"max_tokens": 16_000, "thinking": {"type": "adaptive"},
         "output_config": {"effort": "low"}},
        {"thinking": {"type": "enabled", "budget_tokens": 4096}, "output_config": None},
    ),
    "disabled for a budget model": (
        SONNET, {"thinking": {"type": "disabled"}}, {"thinking": None}
    ),
    "disabled for an adaptive model": (
        OPUS, {"thinking": {"type": "disabled"}}, {"thinking": {"type": "disabled"}}
    ),
    "an unknown kind": (OPUS, {"thinking": {"type": "between_tools"}}, {"thinking": None}),
    "an effort above the list": (
        OPUS, {"output_config": {"effort": "max"}}, {"output_config": {"effort": "high"}}
    ),
    "an effort where none is known": (
        HAIKU, {"output_config": {"effort": "high"}}, {"output_config": None}
    ),
    "an effort nobody knows": (
        OPUS, {"output_config": {"effort": "huge", "task_budget": 5}}, {"output_config": None}
    ),
    "a forced tool": (
        SONNET,
        {"thinking": BUDGET, "tools": [tool()], "tool_choice": {"type": "any"}},
        {"thinking": None},
    ),
    "sampling beside thinking": (
        SONNET,
        {"thinking": BUDGET, "temperature": 0.5, "top_p": 0.5, "top_k": 5},
        {"temperature": None, "top_p": None, "top_k": None},
    ),
    "two samplings": (
        SONNET, {"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.5, "top_p": None}
    ),
    "one sampling": (SONNET, {"top_p": 0.5, "top_k": 3}, {"top_p": 0.5, "top_k": 3}),
    "sampling on the newest": (
        OPUS, {"temperature": 0.5, "top_k": 5}, {"temperature": None, "top_k": None}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THINKING_CASES)
def test_thinking_effort_and_sampling_fit_the_model(name: str) -> None:
    model, fields, expected = THINKING_CASES[name]
    body = messages(model, **copy.deepcopy(fields))
    assert {key: body.get(key) for key in expected} == expected


def test_a_budget_is_dropped_in_a_tool_loop_that_began_without_a_thought() -> None:
    turns = [user("a"), assistant(tool_use("c1")), user([result("c1")])]
    assert "thinking" not in messages(messages=turns, thinking=BUDGET)


def test_context_edits_stay_away_from_the_long_window() -> None:
    model = gw.Model("claude-opus-4.6-1m", "copilot", ("messages",), max_output=1000)
    body = {"messages": [user("a")], "max_tokens": 5, "context_management": {"edits": []}}
    scrubbed = gw.sanitize_body("messages", body, model, {}, True)
    assert "context_management" not in scrubbed.body
    assert scrubbed.dropped == ["context_management"]


def test_four_plain_cache_marks_survive_the_last_of_the_messages_first() -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    turns = [user([text(str(n), cache_control=dict(mark))]) for n in range(3)]
    turns.append(user([result("c0", [text("r", cache_control=dict(mark))])]))
    system = [text("s", cache_control=dict(mark)), text("t", cache_control=dict(mark))]
    body = messages(messages=turns, system=system, tools=[tool(cache_control=dict(mark))])
    marked = json.dumps(body).count('"cache_control": {"type": "ephemeral"}')
    assert marked == json.dumps(body).count("cache_control") == 4
    assert "cache_control" not in body["tools"][0]


def test_a_mark_for_the_whole_body_moves_to_its_last_block() -> None:
    turns = [user([text("a"), text("b")])]
    body = messages(messages=turns, cache_control={"type": "ephemeral", "ttl": "1h"})
    assert body["messages"][-1]["content"][-1] == text("b", cache_control={"type": "ephemeral"})
    assert "cache_control" not in body


# ---- chat rules ----------------------------------------------------------------------------------


def test_keys_that_the_service_refuses_or_only_openai_knows_are_dropped_and_named() -> None:
    refused: Json = {"service_tier": "flex", "store": True, "metadata": {"a": "b"}, "top_k": 5}
    own: Json = {"seed": 1, "logit_bias": {"5": 1}, "user": "u", "parallel_tool_calls": False}
    scrubbed = scrub("chat", "gpt-4.1", tools=[function()], **refused, **own)
    assert set(scrubbed.dropped) == set(refused)
    assert set(own) <= set(scrubbed.body)
    assert not {*refused, *own} & set(chat(GEMINI, tools=[function()], **refused, **own))


@pytest.mark.parametrize(
    ("model", "fields", "key", "number"),
    [
        ("gpt-4.1", {"max_tokens": 10**6}, "max_tokens", 16_000),
        ("gpt-4.1", {"max_completion_tokens": 50}, "max_tokens", 50),
        ("gpt-4.1", {}, "max_tokens", 16_000),
        (GPT5, {"max_tokens": 50}, "max_completion_tokens", 50),
        (GPT5, {}, "max_completion_tokens", 64_000),
        (SONNET, {"max_completion_tokens": 50}, "max_tokens", 50),
    ],
)
def test_the_output_limit_has_the_name_and_size_that_the_model_takes(
    model: str, fields: Json, key: str, number: int
) -> None:
    body = chat(model, **fields)
    assert body[key] == number
    assert len({"max_tokens", "max_completion_tokens"} & set(body)) == 1


SAMPLING_CASES: dict[str, tuple[str, Json, Json]] = {
    "a reasoning model": (
        GPT5, {"temperature": 1, "top_p": 1}, {"temperature": None, "top_p": None}
    ),
    "a reasoning model that does not": (
        GPT5,
        {"temperature": 0.5, "reasoning_effort": "none"},
        {"temperature": 0.5, "reasoning_effort": "none"},
    ),
    "an effort between": (GPT5, {"reasoning_effort": "minimal"}, {"reasoning_effort": "none"}),
    "an effort above": (GPT5, {"reasoning_effort": "max"}, {"reasoning_effort": "xhigh"}),
    "an effort for a plain model": (
        "gpt-4.1", {"reasoning_effort": "high"}, {"reasoning_effort": None}
    ),
    "an effort for a budget": (
        GEMINI,
        {"reasoning_effort": "low"},
        {"reasoning_effort": None, "thinking_budget": 4096},
    ),
    "no effort for a budget": (
        GEMINI, {"reasoning_effort": "none"}, {"reasoning_effort": None, "thinking_budget": None}
    ),
    "two samplings on Claude": (
        SONNET, {"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.5, "top_p": None}
    ),
    "sampling on the newest Claude": (OPUS, {"temperature": 0.5}, {"temperature": None}),
    "two samplings on GPT": (
        "gpt-4.1", {"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.5, "top_p": 0.5}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING_CASES)
def test_sampling_and_effort_fit_the_chat_model(name: str) -> None:
    model, fields, expected = SAMPLING_CASES[name]
    body = chat(model, **fields)
    assert {key: body.get(key) for key in expected} == expected


CHAT_CONVERSATIONS: dict[str, list[Json]] = {
    "echoes of an answer": [
        user("a"),
        {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None,
         "reasoning_content": "hm", "tool_calls": None, "function_call": None},
        user("c"),
    ],
    "a developer": [{"role": "developer", "content": "d"}, user("a")],
    "an empty answer": [user("a"), {"role": "assistant", "content": ""}, user("b")],
    "blank content": [user("a"), {"role": "assistant", "content": "  "}, user("b")],
    "blank words of the user": [user(" "), {"role": "assistant", "content": "a"}, user("b")],
    "parts of an assistant": [
        user("a"), {"role": "assistant", "content": [text("b"), text("c")]}, user("d")
    ],
    "blank parts": [user([text(""), text("a")])],
    "a call with empty words": [user("a"), call_message("c1", content=""), tool_message("c1")],
    "a call without type": [
        user("a"),
        {"role": "assistant", "tool_calls": [
            {"id": "c1", "type": None, "function": {"name": "look", "arguments": ""}}]},
        tool_message("c1"),
    ],
    "broken arguments": [
        user("a"),
        {"role": "assistant", "tool_calls": [
            {"id": "c1", "function": {"name": "look", "arguments": '{"a":'}}]},
        tool_message("c1"),
    ],
    "arguments as an object": [
        user("a"),
        {"role": "assistant", "tool_calls": [
            {"id": "c1", "function": {"name": "look", "arguments": {"a": 1}}}]},
        tool_message("c1"),
    ],
    "arguments that are a list": [
        user("a"),
        {"role": "assistant", "tool_calls": [
            {"id": "c1", "function": {"name": "look", "arguments": "[1]"}}]},
        tool_message("c1"),
    ],
    "a foreign tool name": [
        user("a"),
        {"role": "assistant", "tool_calls": [
            {"id": "c1", "function": {"name": "mcp.look at", "arguments": "{}"}}]},
        tool_message("c1"),
    ],
    "a result in parts": [user("a"), call_message("c1"), tool_message("c1", [text("r")])],
    "an empty result": [user("a"), call_message("c1"), tool_message("c1", "")],
    "an image in a result": [
        user("a"), call_message("c1", "c2"),
        tool_message("c1", [{"type": "image_url", "image_url": {
            "url": f"data:image/png;base64,{PNG}"}}]),
        tool_message("c2"),
    ],
    "own reasoning": [
        user("a"), call_message("c1", reasoning_opaque="GENUINE", reasoning_text="hm"),
        tool_message("c1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", ["gpt-4.1", GPT5, SONNET, GEMINI])
@pytest.mark.parametrize("name", CHAT_CONVERSATIONS)
def test_a_chat_conversation_is_fitted_until_copilot_takes_it(name: str, model: str) -> None:
    turns = copy.deepcopy(CHAT_CONVERSATIONS[name])
    if model == GEMINI:  # it wants a signature with every call of the turn
        for turn in turns:
            if turn.get("tool_calls"):
                turn["reasoning_opaque"] = "GENUINE"
    chat(model, messages=turns)


def test_neighbours_of_one_role_are_joined_for_gemini() -> None:
    turns = [user("a"), user("b"), {"role": "assistant", "content": "c"}, user("d")]
    body = chat(GEMINI, messages=turns)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]


def test_an_image_of_a_tool_follows_all_results_in_a_user_message() -> None:
    body = chat(messages=copy.deepcopy(CHAT_CONVERSATIONS["an image in a result"]))
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "user"]
    assert body["messages"][-1]["content"][-1]["type"] == "image_url"


def test_broken_arguments_are_kept_as_words() -> None:
    body = chat(messages=copy.deepcopy(CHAT_CONVERSATIONS["broken arguments"]))
    arguments = body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"_raw": '{"a":'}


def nested(**inner: Any) -> Json:
    """A tool schema with one odd property."""
    return {"type": "object", "properties": {"a": inner}}


ODD_SCHEMAS: dict[str, Json] = {
    "no type": {"properties": {}},
    "an address": {"type": "object", "$schema": "x", "$id": "y", "properties": {}},
    "an address inside": nested(type="object", **{"$schema": "x"}),
    "an array without items": nested(type="array"),
    "an array of arrays": nested(type="array", items={"type": "array"}),
    "closed": {"type": "object", "properties": {}, "additionalProperties": False},
    "closed inside": nested(type="object", additionalProperties={"type": "string"}),
    "patterns of names": nested(type="object", patternProperties={"^x": {"type": "string"}}),
    "rules for names": nested(type="object", propertyNames={"pattern": "^x"}),
    "what is not evaluated": nested(type="object", unevaluatedProperties=False),
    "a format": nested(type="string", format="uri"),
    "a choice beside types": nested(type=["string", "null"], anyOf=[{"minLength": 1}]),
    "a property called default": nested(type="object", properties={"default": {"type": "string"}}),
}


@pytest.mark.parametrize("model", ["gpt-4.1", SONNET, GEMINI])
@pytest.mark.parametrize("name", ODD_SCHEMAS)
def test_tool_schemas_fit_the_vendor(name: str, model: str) -> None:
    body = chat(model, tools=[function(schema=copy.deepcopy(ODD_SCHEMAS[name]))])
    assert body["tools"][0]["function"]["name"] == "look"


def test_a_property_keeps_its_name_even_where_the_name_is_a_keyword() -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string"}, "$id": {}}}
    body = chat(GEMINI, tools=[function(schema=schema)])
    assert set(body["tools"][0]["function"]["parameters"]["properties"]) == {"format", "$id"}


GOOGLE_WORDS = {"anyOf", "description", "enum", "format", "items", "maxItems", "maxLength",
                "maximum", "minItems", "minLength", "minimum", "nullable", "pattern", "properties",
                "required", "title", "type"}  # fmt: skip


def keywords(schema: Json) -> set[str]:
    """Every keyword in a schema that has properties and alternatives; their names are none."""
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    return set(schema).union(*map(keywords, inner))


def test_gemini_gets_known_keywords_only_and_others_get_theirs() -> None:
    inner = {"type": "string", "x-new": 1, "default": "d", "minLength": 2, "examples": ["e"]}
    schema: Json = {"type": "object", "additionalProperties": False, "unevaluatedItems": True,
                    "properties": {"a": inner, "default": {"anyOf": [inner, {"type": "null"}]}},
                    "required": ["a"]}  # fmt: skip
    asked = [function(schema=copy.deepcopy(schema))]
    google = chat(GEMINI, tools=copy.deepcopy(asked))["tools"][0]["function"]["parameters"]
    assert keywords(google) <= GOOGLE_WORDS
    plain = {"type": "string", "minLength": 2}
    assert google["properties"] == {"a": plain, "default": {"anyOf": [plain, {"type": "null"}]}}
    assert google["required"] == ["a"]
    assert chat("gpt-4.1", tools=asked)["tools"][0]["function"]["parameters"] == schema


def test_references_inside_a_schema_are_written_out_for_gemini() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}
    word = {"type": "string", "description": "defined"}
    schema: Json = {
        "type": "object",
        "properties": {
            "tree": {"$ref": "#/$defs/tree"},
            "own": {"$ref": "#/definitions/word", "description": "own"},
            "lost": {"$ref": "#/$defs/lost"},
        },
        "$defs": {"tree": tree},
        "definitions": {"word": word},
    }
    asked = [function(schema=copy.deepcopy(schema))]
    google = chat(GEMINI, tools=copy.deepcopy(asked))["tools"][0]["function"]["parameters"]
    assert google == {
        "type": "object",
        "properties": {
            "tree": {"type": "object", "properties": {"next": {"type": "object"}}},
            "own": {"type": "string", "description": "own"},
            "lost": {"type": "object"},
        },
    }
    assert chat("gpt-4.1", tools=asked)["tools"][0]["function"]["parameters"] == schema


def test_a_reference_without_definitions_is_no_keyword_for_gemini() -> None:
    body = chat(GEMINI, tools=[function(schema=nested(**{"$ref": "#/properties/b"}))])
    inner = body["tools"][0]["function"]["parameters"]["properties"]["a"]
    assert keywords(inner) <= GOOGLE_WORDS


@pytest.mark.parametrize("model", [SONNET, GEMINI])
def test_several_choices_are_openai_s_only(model: str) -> None:
    with pytest.raises(gw.UnsupportedFeature, match="n:") as caught:
        scrub("chat", model, n=2)
    assert (caught.value.status, caught.value.param) == (400, "n")
    one = scrub("chat", model, n=1)
    assert ("n" in one.body, one.dropped) == (False, [])
    assert chat("gpt-4.1", n=2)["n"] == 2


@pytest.mark.parametrize("model", ["gpt-4.1", SONNET])
def test_tools_that_are_none_go_and_a_history_with_calls_gets_one_for_claude(model: str) -> None:
    assert not {"tools", "tool_choice"} & set(chat(model, tools=[], tool_choice="auto"))
    body = chat(model, messages=[user("a"), call_message("c1"), tool_message("c1")])
    assert ("tools" in body) == (model == SONNET)


def test_more_tools_than_copilot_takes_are_refused_with_the_number() -> None:
    tools = [function(f"t{n}") for n in range(129)]
    with pytest.raises(gw.UnsupportedFeature, match=r"129.*128"):
        scrub("chat", "gpt-4.1", tools=tools)
    assert len(chat(tools=tools[:128])["tools"]) == 128


def test_a_chat_tool_is_renamed_in_its_choice_too() -> None:
    choice = {"type": "function", "function": {"name": "a.b"}}
    body = chat(tools=[function("a.b")], tool_choice=choice)
    assert body["tool_choice"]["function"]["name"] == body["tools"][0]["function"]["name"] == "a_b"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"type": "json_object"}, "JSON object"),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"title": "MARK"}}},
            "MARK",
        ),
        ({"type": "text"}, None),
    ],
)
def test_a_response_format_becomes_a_tool_or_words_for_other_vendors(
    wanted: Json, words: str | None
) -> None:
    turns = [{"role": "system", "content": "Be kind."}, user("a")]
    body = chat(SONNET, messages=turns, response_format=wanted)
    assert body["messages"] == turns
    assert "response_format" not in body
    assert ("structured_output" in str(body.get("tool_choice"))) is (words is not None)
    assert words != "MARK" or words in str(body["tools"])
    thinking = chat(SONNET, messages=turns, response_format=wanted, reasoning_effort="low")
    assert "tools" not in thinking
    assert words is None or words in thinking["messages"][0]["content"]
    assert chat("gpt-4.1", response_format=wanted)["response_format"] == wanted


def test_usage_is_always_asked_for_and_an_empty_prediction_is_not_sent() -> None:
    body = chat(stream_options={"include_usage": False, "x": 1}, prediction={"content": ""})
    assert body["stream_options"] == {"include_usage": True}
    assert "prediction" not in body
    whole = gw.sanitize_body("chat", {"messages": [user("a")]}, MODELS["gpt-4.1"], {}, False)
    assert "stream_options" not in whole.body


# ---- all rules -----------------------------------------------------------------------------------

WHOLE_BODIES: dict[str, tuple[str, Json]] = {
    "messages": (
        OPUS,
        {
            "system": [text("s", cache_control={"type": "ephemeral", "ttl": "1h"})],
            "thinking": {"type": "adaptive"},
            "output_config": {
                "effort": "high",
                "format": {"type": "json_schema", "schema": {"type": "object", "title": "MARK"}},
            },
            "tools": [tool("a.b", strict=True)],
            "messages": [
                user([text("a", cache_control={"type": "ephemeral", "ttl": "1h"})]),
                assistant(tool_use("c.1", "a.b")),
                user([result("c.1", [text("r"), {"type": "tool_reference", "tool_name": "x"}])]),
            ],
        },
    ),
    "chat": (
        SONNET,
        {
            "response_format": {"type": "json_object"},
            "tools": [function("a.b", nested(type="array"))],
            "messages": [
                {"role": "developer", "content": [text("d")]},
                user("a"),
                call_message("c1", reasoning_content="hm"),
                tool_message("c1", [text("r"), {"type": "image_url", "image_url": {"url": "x"}}]),
            ],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("dialect", WHOLE_BODIES)
def test_a_second_attempt_is_made_from_an_unchanged_request(dialect: str) -> None:
    model, fields = WHOLE_BODIES[dialect]
    body = {"max_tokens": 4000, **copy.deepcopy(fields)}
    before = copy.deepcopy(body)
    first = gw.sanitize_body(dialect, body, MODELS[model], {}, True)
    once = copy.deepcopy(first.body)
    second = gw.sanitize_body(dialect, body, MODELS[model], {}, True)
    assert second.body == once
    assert second.dropped == first.dropped
    assert body == before


def test_a_field_that_was_learned_is_named_at_every_attempt() -> None:
    lessons = {"field": ["messages.*.content.*.text.citations"]}
    body = {"max_tokens": 4000, "messages": [user([text("a", citations=[])])]}
    for _ in range(2):
        dropped = gw.sanitize_body("messages", body, MODELS[OPUS], lessons, True).dropped
        assert dropped == ["messages.*.content.*.text.citations"]


def test_replayed_reasoning_is_stripped_in_either_dialect() -> None:
    body = {"messages": [user("a"), assistant(THOUGHT, text("b")), assistant(dict(THOUGHT))]}
    assert gw.strip_reasoning(body)
    assert body["messages"][1]["content"] == [text("b")]
    assert body["messages"][2]["content"]
    chat_body = {"messages": [call_message("c1", reasoning_opaque="x", reasoning_text="y")]}
    assert gw.strip_reasoning(chat_body)
    assert not {"reasoning_opaque", "reasoning_text"} & set(chat_body["messages"][0])
    assert not gw.strip_reasoning(chat_body)


# ---- reasoning memory ----------------------------------------------------------------------------


def test_a_signature_returns_to_its_call_and_to_no_other() -> None:
    memory = gw.ReasoningMemory()
    memory.store(["c1", "c2"], "hm", "OPAQUE")
    body = {"messages": [user("a"), call_message("c2"), call_message("c3")]}
    memory.attach(body)
    assert body["messages"][1]["reasoning_opaque"] == "OPAQUE"
    assert body["messages"][1]["reasoning_text"] == "hm"
    assert "reasoning_opaque" not in body["messages"][2]


def test_a_signature_that_the_caller_brought_stays() -> None:
    memory = gw.ReasoningMemory()
    memory.store(["c1"], "", "OURS")
    body = {"messages": [call_message("c1", reasoning_opaque="THEIRS")]}
    memory.attach(body)
    assert body["messages"][0]["reasoning_opaque"] == "THEIRS"
    assert "reasoning_text" not in body["messages"][0]


def test_the_memory_forgets_the_oldest_and_keeps_what_was_said_again() -> None:
    memory = gw.ReasoningMemory(limit=2)
    for call in ("c1", "c2", "c1", "c3"):
        memory.store([call], "", f"for {call}")
    assert set(memory.entries) == {"c1", "c3"}


# ---- what error answers mean ---------------------------------------------------------------------


def said(message: str, code: str | None = None, **more: Any) -> bytes:
    """The service's own error form."""
    error = {"message": message, **({} if code is None else {"code": code}), **more}
    return json.dumps({"error": error}).encode()


def anthropic(message: str) -> bytes:
    """Anthropic's error form."""
    error = {"type": "invalid_request_error", "message": message}
    return json.dumps({"type": "error", "error": error, "request_id": "req_vrtx_1"}).encode()


UNSUPPORTED = "The requested model is not supported."
WAF = "Access to this endpoint is forbidden. Please review our Terms of Service."
JUDGED: dict[str, tuple[int, bytes, type[gw.ApiError], str]] = {
    "400 model": (
        400, said(UNSUPPORTED, "model_not_supported", param="model"), gw.ModelNotFound, "relist"
    ),
    "400 model, bare": (
        400, json.dumps({"message": UNSUPPORTED[:-1]}).encode(), gw.ModelNotFound, "relist"
    ),
    "400 endpoint": (
        400,
        said('model "x" is not accessible via the /chat/completions endpoint',
             "unsupported_api_for_model"),
        gw.InvalidRequest, "reroute",
    ),
    "400 long": (
        400,
        said("prompt token count of 138898 exceeds the limit of 64000",
             "model_max_prompt_tokens_exceeded"),
        gw.ContextTooLong, "",
    ),
    "400 long, no code": (
        400, said("prompt token count of 138898 exceeds the limit of 64000", ""),
        gw.ContextTooLong, "",
    ),
    "400 long, Anthropic": (
        400, anthropic("prompt is too long: 200001 tokens > 200000 maximum"),
        gw.ContextTooLong, "",
    ),
    "400 long, window": (
        400, b"Request body is too large for model context window\n", gw.ContextTooLong, ""
    ),
    "400 long, code": (
        400, said("too many tokens", "context_length_exceeded"), gw.ContextTooLong, ""
    ),
    "400 body": (
        400, said("invalid request body", "invalid_request_body"), gw.InvalidRequest, "forget"
    ),
    "400 signature": (
        400, anthropic("messages.1.content.0: Invalid `signature` in `thinking` block"),
        gw.InvalidRequest, "forget",
    ),
    "400 vision": (
        400, said("missing required Copilot-Vision-Request header for vision requests", ""),
        gw.InvalidRequest, "",
    ),
    "400 editor": (
        400, b"bad request: missing Editor-Version header for IDE auth\n", gw.InvalidRequest, ""
    ),
    "400 beta": (
        400, anthropic(f"Unexpected value(s) `{gw.CONTEXT_BETA}` for the `anthropic-beta` header."),
        gw.InvalidRequest, "repair",
    ),
    "400 extra": (
        400, anthropic("context_management: Extra inputs are not permitted"),
        gw.InvalidRequest, "repair",
    ),
    "400 thinking": (
        400,
        anthropic('"thinking.type.enabled" is not supported for this model. Use '
                  '"thinking.type.adaptive" and "output_config.effort".'),
        gw.InvalidRequest, "repair",
    ),
    "400 effort": (
        400, said("effort high is not supported", "invalid_reasoning_effort"),
        gw.InvalidRequest, "repair",
    ),
    "400 system role": (
        400, anthropic("role 'system' is not supported on this model"), gw.InvalidRequest, "repair"
    ),
    "400 other system role": (
        400, anthropic('messages.1: Unexpected role "system"'), gw.InvalidRequest, "repair"
    ),
    "400 topic": (400, said("off_topic", "off_topic"), gw.InvalidRequest, ""),
    "400 empty": (400, b"", gw.InvalidRequest, "retry_once"),
    "401 expired": (401, b"unauthorized: token expired\n", gw.NotSignedIn, "refresh"),
    "401 IDE": (
        401, b"IDE token expired: unauthorized: token expired\n", gw.NotSignedIn, "refresh"
    ),
    "401 agent": (401, b'{"authorize_url":"https://example.com"}', gw.ApiError, ""),
    "401 PAT": (
        401,
        b"unauthorized: Personal Access Token does not have Copilot Requests permission\n",
        gw.NotSignedIn, "",
    ),
    "402": (402, said("You have no quota", "quota_exceeded"), gw.QuotaExceeded, "cool_down"),
    "402 overage": (402, said("", "overage_limit_reached"), gw.QuotaExceeded, "cool_down"),
    "403 firewall": (403, WAF.encode(), gw.Forbidden, "refresh"),
    "403 HTML": (403, b"<html><body>" + WAF.encode(), gw.Forbidden, "refresh"),
    "403 JSON": (403, said(WAF), gw.Forbidden, "refresh"),
    "403 seat": (
        403, b"unauthorized: not authorized to use this Copilot feature\n", gw.Forbidden, "refresh"
    ),
    "404": (404, b"404 page not found\n", gw.ModelNotFound, ""),
    "408": (408, b"", gw.UpstreamTimeout, "retry_once"),
    "413": (413, b"Request Entity Too Large\n", gw.BodyTooLarge, ""),
    "413 parse": (413, said("failed to parse request", ""), gw.BodyTooLarge, ""),
    "421": (421, b"Misdirected Request\n", gw.Forbidden, "refresh"),
    "422": (422, b"Responsible AI says no\n", gw.InvalidRequest, ""),
    "424": (424, b"", gw.ApiError, ""),
    "429": (429, said("rate limit exceeded", "rate_limited"), gw.RateLimited, "pause"),
    "429 suffix": (
        429, said("slow", "user_global_rate_limited:enterprise"), gw.RateLimited, "pause"
    ),
    "429 extension": (
        429, b'{"code":"extension_blocked","type":"rate_limit_error"}', gw.RateLimited, "pause"
    ),
    "466": (
        466, said("bad request: the specified API version is no longer supported.\n", type="error"),
        gw.UpstreamError, "",
    ),
    "499": (499, b"", gw.UpstreamError, "wait"),
    "500": (500, b"<!DOCTYPE html><title>Unicorn!</title>", gw.UpstreamError, "wait"),
    "502": (502, b"bad gateway", gw.UpstreamError, "wait"),
    "503": (503, b"busy", gw.Overloaded, "pause"),
    "504": (504, b"", gw.UpstreamTimeout, "retry_once"),
}  # fmt: skip


def judge(
    status: int, body: bytes, headers: Json | None = None, sent: Json | None = None
) -> gw.RetryDecision:
    """The verdict on one answer to a call of SONNET."""
    fields = gw.Headers(headers or {})
    turn = {"role": "system", "content": "s"}
    sent = sent or {
        "thinking": BUDGET, "output_config": {"effort": "high"}, "messages": [turn]
    }  # fmt: skip
    betas = [gw.CONTEXT_BETA]
    return gw.classify_copilot_error(status, fields, body, MODELS[SONNET], sent, {}, NOW, betas)


@pytest.mark.parametrize("name", JUDGED)
def test_an_error_answer_means_what_the_table_says(name: str) -> None:
    status, body, kind, remedy = JUDGED[name]
    verdict = judge(status, body)
    assert isinstance(verdict.error, kind)
    assert verdict.action == remedy
    assert not any(mark in verdict.error.text() for mark in ("<html", "<!DOCTYPE", "{"))


@pytest.mark.parametrize("name", [n for n in JUDGED if n.startswith("400 long")][:3])
def test_a_prompt_that_is_too_long_is_said_in_the_words_that_clients_know(name: str) -> None:
    status, body, _, _ = JUDGED[name]
    assert judge(status, body).error.message.startswith("prompt is too long: ")
    assert " tokens > " in judge(status, body).error.message


def test_the_vision_policy_and_an_old_version_are_explained() -> None:
    assert "policy" in judge(*JUDGED["400 vision"][:2]).error.hint
    assert "pdate" in judge(*JUDGED["466"][:2]).error.hint


@pytest.mark.parametrize("status", [402, 429, 503])
@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("183600", 183_600.0), ("Wed, 18 Nov 2026 11:07:40 GMT", 60.0), ("soon", None)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(
    status: int, value: str, seconds: float | None
) -> None:
    verdict = judge(status, b"", {"retry-after": value})
    assert verdict.error.retry_after == verdict.wait_s == seconds
    assert verdict.action == (
        "cool_down" if status == 402 else "pause"
    )  # a quota is never waited for


WILD = [math.inf, -math.inf, math.nan, 10**400, -(10**400), 1e300, 1e-300, -5, True, "9" * 5000, []]


@pytest.mark.parametrize("wild", WILD, ids=lambda value: str(value)[:8])
def test_no_number_of_an_upstream_is_too_wild(wild: Any) -> None:
    month = NOW + gw.MAX_RESET_SECONDS
    assert 0 <= gw.read_time(wild) <= gw.MAX_UNIX_SECONDS
    assert (gw.parse_retry_after(str(wild)[:600], NOW) or 0) <= gw.MAX_RESET_SECONDS
    token = gw.read_token_response({"token": "t", "refresh_in": wild}, gw.CopilotConfig(), NOW)
    assert NOW < token.expires_at < month
    renewed = {"accessToken": "t", "expiresIn": wild}
    assert NOW <= gw.read_refresh_response(renewed, NOW)["expires_at"] < month
    row = {"entitlement": wild, "percent_remaining": wild, "reset_date": wild, "remaining": wild}
    plan = {"quota_snapshots": {"chat": {**row, "entitlement": 1e-300}, "completions": row}}
    kiro = {"usageBreakdown": {"currentUsage": wild, "usageLimit": 1}, "nextDateReset": wild}
    for quota in (gw.read_copilot_quota(plan), gw.read_kiro_quota(kiro, NOW)):
        gw.dump_json([quota.as_json(), gw.quota_warnings("copilot", quota, NOW)])
    prices = {"batch_size": 1, "input_price": wild, "output_price": wild}
    model = gw.Model("m", "p", raw={"billing": {"token_prices": prices}})
    price = gw.price_nano_credits(model, gw.Usage(10**6, output=10**6, source="reported")) or 0
    assert 0 <= price <= gw.MAX_FIGURE


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Please try again in 51 hours", 183_600.0),  # copilot.md 9.3
        ("try again in about 1 minute.", 60.0),
        ("Your limit resets in 2 hours and 5 minutes", 7500.0),
        ("Available again after 1.5s, please wait", 1.5),
        ("resets at 2026-11-18T11:07:40Z", 60.0),
        ("resets on 2026-11-19", 46_400.0),
        ("Try again after 2026-11-18 11:06:30", 0.0),
        ("Too many requests, please wait before trying again.", None),
        ("again in 5 months", None),
        ("resets at 2026-99-99", None),
        ("5 hours ago", None),
    ],
)
def test_a_time_in_words_is_read_where_no_field_names_one(
    words: str, seconds: float | None
) -> None:
    assert judge(429, said(words, "rate_limited")).wait_s == seconds
    assert judge(429, said(words, "rate_limited"), {"retry-after": "7"}).wait_s == 7


def test_a_model_without_the_asked_endpoint_is_asked_in_another_dialect() -> None:
    why = f'model "{SONNET}" is not accessible via the /v1/messages endpoint'
    for body in (said(why), said("no", "unsupported_api_for_model")):
        verdict = judge(400, body)
        assert (type(verdict.error), verdict.action) == (gw.InvalidRequest, "reroute")
        assert verdict.rejections == []  # the provider's models remember it


def test_github_s_request_id_is_named_and_tokens_are_not() -> None:
    body = said("no tid=1;exp=2:mac for ghu_ABCDEFGH1234 here")
    for status in (400, 402, 403, 429, 466):
        error = judge(status, body, {"x-github-request-id": "AB12:34:56"}).error
        assert "tid=1" not in error.text()
        assert "ghu_ABCDEFGH1234" not in error.text()
    assert "AB12:34:56" in judge(500, body, {"x-github-request-id": "AB12:34:56"}).error.text()


def test_an_error_wrapped_into_an_error_is_unwrapped() -> None:
    inner = json.dumps({"error": {"message": "prompt is too long: 5 tokens > 4 maximum"}})
    assert isinstance(judge(400, said(inner)).error, gw.ContextTooLong)
    assert gw.read_error_response(400, said("m", "c:suffix")) == ("m", "c")
    assert gw.read_error_response(400, b'{"error":"text"}') == ("text", "")
    assert gw.read_error_response(400, b'{"code":"c","message":"m"}') == ("m", "c")
    assert gw.read_error_response(400, b"\n") == ("", "")


# ---- what is learned -----------------------------------------------------------------------------

LEARNED: dict[str, tuple[Json, Json]] = {
    "context_management": ({"context_management": {"edits": []}}, {}),
    "tools.0.custom.cache_control": (
        {"tools": [tool(cache_control={"type": "ephemeral"})]}, {"tools": [tool()]}
    ),
    "system.0.text.citations": (
        {"system": [text("s", citations=[])]}, {"system": [text("s")]}
    ),
    "messages.0.content.0.text.citations": (
        {"messages": [user([text("a", citations=[])])]}, {"messages": [user([text("a")])]}
    ),
    "messages.1.content.0.tool_use.caller": (
        {"messages": [user("a"), assistant({**tool_use("c1"), "caller": {}}), user([result("c1")])],
         "tools": [tool()]},
        {"messages": [user("a"), assistant(tool_use("c1")), user([result("c1")])],
         "tools": [tool()]},
    ),
    "messages.2.content.0.tool_result.content.0.text.citations": (
        {"messages": [user("a"), assistant(tool_use("c1")),
                      user([result("c1", [text("r", citations=[])])])], "tools": [tool()]},
        {"messages": [user("a"), assistant(tool_use("c1")), user([result("c1", [text("r")])])],
         "tools": [tool()]},
    ),
    "thinking.enabled.display": (
        {"thinking": {**BUDGET, "display": "summarized"}}, {"thinking": BUDGET}
    ),
    "tool_choice.auto.disable_parallel_tool_use": (
        {"tools": [tool()], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"tools": [tool()], "tool_choice": {"type": "auto"}},
    ),
}  # fmt: skip


def field_lessons(*paths: str) -> gw.Rejections:
    """What a refusal of these paths teaches."""
    return {"field": [p for path in paths for p in gw.rejected_paths(refusal_of(path))]}


def refusal_of(path: str) -> str:
    """In Anthropic's words."""
    return f"{path}: Extra inputs are not permitted"


@pytest.mark.parametrize("path", LEARNED)
def test_a_field_that_was_refused_once_is_left_out_from_then_on(path: str) -> None:
    fields, left = LEARNED[path]
    verdict = judge(400, anthropic(refusal_of(path)))
    assert verdict.action == "repair"
    lessons = {"field": [name for kind, name in verdict.rejections if kind == "field"]}
    asked = scrub("messages", SONNET, lessons, **copy.deepcopy(fields))
    assert asked.body == scrub("messages", SONNET, **copy.deepcopy(left)).body
    assert asked.dropped
    body = anthropic(refusal_of(path))
    again = gw.classify_copilot_error(
        400, gw.Headers(), body, MODELS[SONNET], asked.body, lessons, NOW
    )
    assert (again.action, again.rejections) == ("", [])


SEMANTIC = (
    *("model", "messages", "system", "tools", "input", "max_tokens", "stream", "instructions"),
    *("tool_choice", "response_format", "messages.0", "messages.0.role", "messages.0.content"),
    *("messages.0.content.0", "messages.0.content.0.text", "messages.0.content.0.text.text"),
    "messages.1.content.0.tool_use.id", "messages.1.content.0.tool_use.name",
    "messages.1.content.0.tool_use.input", "messages.1.content.0.tool_use.input.path.0",
    "messages.2.content.0.tool_result.content", "messages.2.content.0.tool_result.tool_use_id",
    "messages.2.content.0.tool_result.content.0.text.text", "messages.0.content.0.image.source",
    "messages.0.content.0.image.source.base64.data", "tools.0", "system.0", "tools.0.name",
    "tools.0.custom.name", "tools.0.custom.input_schema", "tools.0.custom.input_schema.type",
    "tools.0.input_schema.properties.a.format", "tools.0.function.parameters",
    "tools.0.function.name", "messages.1.tool_calls", "input.0.output", "input.0.call_id",
    "messages.1.tool_calls.0.function.arguments", "input.0.content.0.text", "text.format",
    "thinking.enabled.budget_tokens", "text.format.schema", "response_format.json_schema",
)  # fmt: skip


@pytest.mark.parametrize("path", SEMANTIC)
def test_a_field_that_carries_the_meaning_is_never_learned(path: str) -> None:
    verdict = judge(400, anthropic(refusal_of(path)))
    assert (verdict.action, verdict.rejections) == ("", [])


STRAY: dict[str, Json] = {
    "messages.2.content.0.tool_result.name": {},
    "messages.0.content.0.text.system": {"system": "S"},
    "messages.0.content.0.text.messages": {},
    "messages.0.model": {},
    "messages.0.content.0.text.content": {},
    "messages.0.content.0.text.tools": {},
    "messages.0.content.0.text.max_tokens": {},
    "messages.0.content.0.text.input": {},
    "tools.0.custom.messages": {},
    "system.0.text.model": {"system": [text("s")]},
    "tool_choice.auto.messages": {"tool_choice": {"type": "auto"}},
}


@pytest.mark.parametrize("path", STRAY)
def test_one_clients_stray_field_takes_nothing_from_anybody_else(path: str) -> None:
    """Only a step that names the type of that very object is no step down."""
    fields: Json = {
        "messages": [
            user([text("a"), text("b")]), assistant(tool_use("c1")),
            user([result("c1", [text("r")])]), assistant(text("b")), user("c"),
        ],
        "tools": [tool()], **STRAY[path],
    }  # fmt: skip
    lessons = field_lessons(path)
    assert lessons["field"]
    asked = scrub("messages", SONNET, lessons, **copy.deepcopy(fields))
    assert asked.body == scrub("messages", SONNET, **copy.deepcopy(fields)).body
    assert not asked.dropped


def test_a_stray_field_goes_from_its_own_place_only() -> None:
    stray = {**result("c1", [text("r")]), "name": "x"}
    messages = [user("a"), assistant(tool_use("c1")), user([stray])]
    lessons = field_lessons("messages.2.content.0.tool_result.name")
    body = scrub("messages", SONNET, lessons, messages=messages, tools=[tool()]).body
    assert "name" not in body["messages"][2]["content"][0]
    assert body["messages"][1]["content"][0]["name"] and body["tools"][0]["name"]


@pytest.mark.parametrize(
    "message",
    [
        'thinking.type.enabled: Extra inputs are not permitted',
        'messages.0.thinking.type.enabled: Extra inputs are not permitted',
        'messages.0.reasoning_effort: Extra inputs are not permitted',
        f'messages.0.model "{SONNET}" is not accessible via the /x: Extra inputs are not permitted',
    ],
)  # fmt: skip
def test_the_name_of_a_stray_field_teaches_nothing_but_itself(message: str) -> None:
    """A client may name a field as it likes, and a refusal repeats the name."""
    verdict = judge(400, anthropic(message))
    assert verdict.action in ("", "repair")
    assert all(kind == "field" for kind, _ in verdict.rejections)


@pytest.mark.parametrize("why", [
    "Invalid schema for function 'reasoning_effort': it has no type.",
    "Invalid value: 'reasoning_effort'.",
    "tools.0.custom.input_schema.properties.thinking.type.enabled: Input should be an object",
    "messages.0.content: role 'system' is not supported",
    """tools.0.name: 'Unexpected role "system"' is no name""",
])  # fmt: skip
def test_words_of_the_caller_in_a_refusal_teach_nothing(why: str) -> None:
    turns = [{"role": "system", "content": "s"}]
    sent = {"thinking": {"type": "enabled"}, "reasoning_effort": "high", "messages": turns}
    assert gw.read_rejections(why, "invalid_request_body", sent, {}) == []


def test_only_what_was_sent_can_be_refused() -> None:
    for why in (
        '"thinking.type.enabled" is not supported for this model.',
        "invalid_reasoning_effort: reasoning_effort high is not supported",
        "role 'system' is not supported on this model",
        "Unexpected value(s) `somebody-elses-beta` for the `anthropic-beta` header.",
    ):
        assert judge(400, anthropic(why), sent={"messages": [user("a")]}).rejections == []


def test_a_lesson_is_for_its_model_and_dialect_and_ends() -> None:
    learned = gw.RejectionMemory()
    learned.add(SONNET, "messages", [("field", "context_management")], 100.0)
    assert learned.rejections(SONNET, "messages", 101.0) == {"field": ["context_management"]}
    assert not learned.rejections(HAIKU, "messages", 101.0)
    assert not learned.rejections(SONNET, "chat", 101.0)
    assert not learned.rejections(SONNET, "messages", 100.0 + gw.REJECTION_SECONDS)


def test_lessons_are_few() -> None:
    """Whoever makes up fields makes the oldest lessons go, and costs nobody time."""
    learned = gw.RejectionMemory()
    for number in range(1000):
        learned.add(SONNET, "messages", [("field", f"messages.*.stray{number}")], 0.0)
        learned.add(f"made-up-{number}", "messages", [("field", "x")], 0.0)
    learned.add(SONNET, "messages", [("field", "y")], 0.0)
    before = dict(learned.scopes)
    learned.add("another", "messages", [], 0.0)  # a refusal that teaches nothing
    assert learned.scopes == before and len(before) <= gw.MAX_REJECTION_SCOPES
    assert all(len(scope) <= gw.MAX_REJECTIONS for scope in learned.scopes.values())


def test_a_model_that_turned_out_adaptive_is_asked_adaptively() -> None:
    kind, name = judge(*JUDGED["400 thinking"][:2]).rejections[0]
    body = scrub("messages", SONNET, {kind: [name]}, thinking=BUDGET).body
    assert body["thinking"]["type"] == "adaptive"


def test_a_model_without_an_effort_or_system_turns_is_asked_without() -> None:
    lessons = {"effort": ["low"], "system": ["turns"]}
    turns = [user("a"), {"role": "system", "content": "s"}]
    body = scrub("messages", OPUS, lessons, messages=turns, output_config={"effort": "low"}).body
    assert "output_config" not in body
    assert [m["role"] for m in body["messages"]] == ["user"]
    assert scrub("messages", OPUS, lessons, output_config={"effort": "high"}).body["output_config"]
    assert (
        "reasoning_effort"
        not in scrub("chat", GPT5, {"effort": ["low"]}, reasoning_effort="low").body
    )


# ---- the exchange --------------------------------------------------------------------------------


def envelope(notice: str, url: str = "https://github.com/github-copilot/signup") -> bytes:
    """GitHub's refusal of Copilot."""
    said_ = {"message": "No access found", "notification_id": notice, "title": "T", "url": url}
    return json.dumps({"error_details": said_, "message": "Resource not accessible"}).encode()


LIMITED = b'{"message":"API rate limit exceeded for user ID 123.","status":"403"}'
RULES = b"Request forbidden by administrative rules. Please make sure your request has a User-Agent"
EXCHANGES: dict[str, tuple[int, bytes, type[gw.ApiError], str]] = {
    "401": (401, b'{"message":"Bad credentials","status":"401"}', gw.NotSignedIn, ""),
    "403 no access": (403, envelope("no_copilot_access"), gw.NotSignedIn, ""),
    "403 not signed up": (403, envelope("not_signed_up"), gw.NotSignedIn, ""),
    "403 abuse": (403, envelope("programmatic_token_generation"), gw.NotSignedIn, ""),
    "403 new notice": (403, envelope("something_new"), gw.NotSignedIn, ""),
    "403 server": (403, envelope("server_error"), gw.ApiError, "wait"),
    "403 limit": (403, LIMITED, gw.RateLimited, "wait"),
    "403 rules": (403, RULES, gw.ApiError, ""),
    "404": (404, b'{"message":"Not Found","status":"404"}', gw.NotSignedIn, ""),
    "429": (429, b"", gw.ApiError, "wait"),
    "500": (500, b"<html>Unicorn!</html>", gw.ApiError, "wait"),
    "502": (502, b"", gw.ApiError, "wait"),
    "503": (503, b"", gw.ApiError, "wait"),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_refused_exchange_means_what_the_table_says(name: str) -> None:
    status, body, kind, remedy = EXCHANGES[name]
    verdict = gw.classify_exchange_error(status, gw.Headers(), body, NOW)
    assert isinstance(verdict.error, kind)
    assert verdict.action == remedy
    assert "<html" not in verdict.error.text()


def test_a_refusal_of_copilot_shows_github_s_page_and_no_other() -> None:
    ours = gw.classify_exchange_error(403, gw.Headers(), envelope("x"), NOW).error
    assert "https://github.com/github-copilot/signup" in ours.text()
    assert "No access found" in ours.text()
    foreign = envelope("x", "https://evil.example/signup")
    assert "evil" not in gw.classify_exchange_error(403, gw.Headers(), foreign, NOW).error.text()


def test_a_rate_limited_exchange_says_when_to_come_back() -> None:
    verdict = gw.classify_exchange_error(403, gw.Headers({"retry-after": "90"}), LIMITED, NOW)
    assert verdict.wait_s == verdict.error.retry_after == 90


# ---- chat relayed to chat: ids, calls and results in order --------------------------------------

CHAT_MODELS = ("gpt-4.1", GPT5, HAIKU)  # Gemini demands a signature besides


def paired(sent: Json) -> list[tuple[str, str]]:
    """(call id, its output) of a chat body, in order; asserts what every vendor demands."""
    rows, pairs = sent["messages"], []
    for index, message in enumerate(rows):
        calls = message.get("tool_calls") or []
        outputs = rows[index + 1 : index + 1 + len(calls)]
        assert [c["id"] for c in calls] == [o.get("tool_call_id") for o in outputs]
        pairs += [(output["tool_call_id"], output["content"]) for output in outputs]
    assert len({call_id for call_id, _ in pairs}) == len(pairs)
    assert sum(message["role"] == "tool" for message in rows) == len(pairs)
    return pairs


@pytest.mark.parametrize("model", CHAT_MODELS)
@pytest.mark.parametrize("call", ["functions.f:0", "a" * 41, "call:1", "\u2603", "x.y", "t" * 90])
def test_ids_of_relayed_calls_are_those_that_copilot_takes(model: str, call: str) -> None:
    rows = [user("q"), call_message(call, "c2"), tool_message(call, "1"), tool_message("c2", "2")]
    pairs = paired(chat(model, messages=rows, tools=[function()]))
    assert [output for _, output in pairs] == ["1", "2"]
    assert pairs[0][0] != call and pairs[1][0] == "c2"
    assert pairs == paired(chat(model, messages=rows, tools=[function()]))


ODD_CALLS: dict[str, tuple[list[Json], list[str]]] = {
    "no result": ([call_message("a"), user("on")], [gw.INTERRUPTED]),
    "one of two": (
        [call_message("a", "b"), tool_message("b", "2"), user("on")],
        [gw.INTERRUPTED, "2"],
    ),
    "the last message calls": ([call_message("a")], [gw.INTERRUPTED]),
    "a user between": ([call_message("a"), user("wait"), tool_message("a", "1")], ["1"]),
    "a system message between": (
        [call_message("a"), {"role": "system", "content": "S"}, tool_message("a", "1")],
        ["1"],
    ),
    "another order": (
        [call_message("a", "b"), tool_message("b"), tool_message("a", "1")],
        ["1", "done"],
    ),
    "used twice": (
        [call_message("a"), tool_message("a", "1"), call_message("a"), tool_message("a", "2")],
        ["1", "2"],
    ),
    "used twice, once without": (
        [call_message("a"), user("no"), call_message("a"), tool_message("a", "2")],
        [gw.INTERRUPTED, "2"],
    ),
    "two results of one call": (
        [call_message("a"), tool_message("a", "1"), tool_message("a", "2")],
        ["1\n\n2"],
    ),
    "late": (
        [call_message("a"), call_message("b"), tool_message("b", "2"), tool_message("a", "1")],
        ["1", "2"],
    ),
}


@pytest.mark.parametrize("model", CHAT_MODELS)
@pytest.mark.parametrize("name", ODD_CALLS)
def test_relayed_calls_and_results_are_put_in_order(name: str, model: str) -> None:
    rows, outputs = ODD_CALLS[name]
    sent = chat(model, messages=[user("q"), *copy.deepcopy(rows)], tools=[function()])
    assert [output for _, output in paired(sent)] == outputs
    for words in [row["content"] for row in rows if row["role"] in ("user", "system")]:
        assert words in json.dumps(sent)


@pytest.mark.parametrize("model", CHAT_MODELS)
def test_a_relayed_result_of_no_call_becomes_words(model: str) -> None:
    sent = chat(model, messages=[user("q"), tool_message("gone", "42"), user("on")])
    assert not paired(sent)
    assert "unknown call gone" in json.dumps(sent) and "42" in json.dumps(sent)


@pytest.mark.parametrize("model", CHAT_MODELS)
@pytest.mark.parametrize("content", ["", " \n", [], [text(" ")]])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_relayed_message_of_nothing_is_left_out(role: str, content: Any, model: str) -> None:
    sent = chat(model, messages=[{"role": role, "content": content}, user("q")])
    assert [message["content"] for message in sent["messages"]] == ["q"]


@pytest.mark.parametrize("model", CHAT_MODELS)
def test_a_conversation_in_order_goes_up_as_it_came(model: str) -> None:
    rows = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q", "name": "ann"},
        call_message("a", "b", reasoning_text="hm", reasoning_opaque="GENUINE"),
        tool_message("a", "1"),
        tool_message("b", "2"),
        {"role": "assistant", "content": "done"},
        user(
            [
                text("and"),
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ]
        ),
    ]
    body = chat(model, messages=copy.deepcopy(rows), tools=[function()])
    marks = ("copilot_cache_control",)
    assert [{k: v for k, v in m.items() if k not in marks} for m in body["messages"]] == rows


# ---- stop strings --------------------------------------------------------------------------------


def call_of(dialect: str, model: str, body: Json) -> tuple[gw.Call, gw.ResponseContext]:
    """A native request as the gateway makes it, before the rules."""
    own = gw.DIALECTS[dialect]
    info = own.request_info(body)
    context = gw.ResponseContext("id", 0, model)
    return gw.write_call(body, None, own, MODELS[model], context, info), context


@pytest.mark.parametrize(
    ("dialect", "model", "sent", "emulated"),
    [
        ("chat", HAIKU, ["a"], [" ", "\n"]),
        ("messages", HAIKU, ["a"], [" ", "\n"]),
        ("chat", "gpt-4.1", [" ", "a", "\n"], []),
    ],
)
def test_blank_stop_strings_are_applied_here_for_claude(
    dialect: str, model: str, sent: list[str], emulated: list[str]
) -> None:
    key = gw.STOP_FIELDS[dialect]
    body = {"model": model, "max_tokens": 9, "messages": [user("q")], key: [" ", "a", "", "\n"]}
    call, context = call_of(dialect, model, body)
    stops = gw.sanitize_body(dialect, call.body, MODELS[model], {}, True).body[key]
    assert ([stop for stop in stops if stop], context.stop_strings) == (sent, emulated)


@pytest.mark.parametrize("stop", ["\n", [" "], ["\n", ""]])
def test_only_blank_stop_strings_leave_nothing_to_send(stop: Any) -> None:
    call, context = call_of("chat", HAIKU, {"model": HAIKU, "messages": [user("q")], "stop": stop})
    assert "stop" not in gw.sanitize_body("chat", call.body, MODELS[HAIKU], {}, True).body
    assert len(context.stop_strings) == 1


# ---- refusals in the words of every service ------------------------------------------------------

#: text -> (tokens, limit), as the text names them
FULL: dict[str, tuple[int, int] | None] = {
    "prompt is too long: 205000 tokens > 200000 maximum": (205000, 200000),
    "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease input "
    "length or `max_tokens` and try again": (209573, 200000),
    "The input token count (1058234) exceeds the maximum number of tokens allowed (1048576).":
        (1058234, 1048576),
    "Unable to submit request because the input token count is 1236790 but model only supports up "
    "to 1048576.": (1236790, 1048576),
    "This model's maximum context length is 128000 tokens. However, your messages resulted in "
    "130000 tokens.": (130000, 128000),
    "This model's maximum context length is 128,000 tokens. However, you requested 140,000 tokens":
        (140000, 128000),
    "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 "
    "tokens.": (300000, 272000),
    "prompt token count of 138898 exceeds the limit of 64000": (138898, 64000),
    "This model's maximum prompt length is 131072 but the request contains 137197 tokens.":
        (137197, 131072),
    "Your request exceeded model token limit: 262144 (requested: 291351)": (291351, 262144),
    "Your input exceeds the context window of this model.": None,
    "Input is too long for requested model.": None,
    "Input Tokens Exceeded: Number of input tokens exceeds maximum length": None,
}  # fmt: skip
NOT_FULL = [
    "tools.0.name: 'context_window' is not a valid name",
    "max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens",
    "tools.0.description is too long",
    "unknown parameter: context_length",
]


@pytest.mark.parametrize("words", FULL)
@pytest.mark.parametrize("place", ["copilot", "kiro", "copilot stream", "kiro stream"])
def test_a_full_context_is_known_in_the_words_of_every_service(place: str, words: str) -> None:
    """Clients compact, or choose another model, only where they recognise their vendor's text."""
    if place == "copilot":
        error = judge(400, said(words)).error
    elif place == "copilot stream":
        error = gw.read_stream_error({"message": words})
    else:
        decision = gw.classify_kiro_message("ValidationException", "", words)
        assert decision is not None
        error = decision.error
    assert isinstance(error, gw.ContextTooLong)
    anthropic_error = gw.MESSAGES.error_body(error, "r")["error"]
    assert anthropic_error["type"] == "invalid_request_error"
    assert anthropic_error["message"].startswith("prompt is too long")
    for dialect, param in ((gw.CHAT, "messages"), (gw.RESPONSES, "input")):
        openai_error = dialect.error_body(error, "r")["error"]
        assert openai_error["code"] == "context_length_exceeded"
        assert openai_error["param"] == param
        assert openai_error["message"].startswith("This model's maximum context length is ")
    counts = FULL[words]
    if counts:
        used, limit = counts
        assert anthropic_error["message"] == f"prompt is too long: {used} tokens > {limit} maximum"
        assert (
            f"is {limit} tokens. However, your messages resulted in {used} tokens"
            in (openai_error["message"])
        )


@pytest.mark.parametrize("words", NOT_FULL)
def test_other_refusals_are_no_full_context(words: str) -> None:
    assert not isinstance(judge(400, said(words)).error, gw.ContextTooLong)
    assert not isinstance(gw.read_stream_error({"message": words}), gw.ContextTooLong)


@pytest.mark.parametrize(
    ("words", "is_reasoning"),
    [
        ("messages.1.content.0: Invalid `signature` in `thinking` block", True),
        ("The encrypted content for item rs_1 could not be verified.", True),
        ("messages.3: thinking is bound to a different conversation", True),
        ("Function call is missing a thought_signature in functionCall parts.", True),
        ("input item ID does not belong to this connection", True),
        ("`thinking` or `redacted_thinking` blocks in the latest message cannot be modified", True),
        ("Unknown parameter: 'verify_signature'", False),
        ("tools.0.function.name 'signature' is reserved", False),
        ("Unknown parameter: 'encrypted_content'", False),
    ],
)
def test_only_a_refusal_of_reasoning_drops_it(words: str, is_reasoning: bool) -> None:
    assert (judge(400, said(words)).action == "forget") is is_reasoning


def test_the_code_and_the_field_of_a_refusal_are_the_upstreams() -> None:
    body = {"message": "Invalid 'seed'", "code": "invalid_value", "param": "seed", "type": "x"}
    error = judge(400, json.dumps({"error": body}).encode()).error
    assert (error.code, error.param) == ("invalid_value", "seed")
