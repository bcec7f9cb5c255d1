"""Accounts as they are in the field: tokens for programs, Auto, plans without a denominator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_kiro import CA_FILE, FakeKiro
from fakes import (
    Answer,
    FakeCopilot,
    Seen,
    auto_model,
    capi,
    default_models,
    dump,
    plain,
    seat_user,
)
from support import Gateway, Reply

import aiclient_api as gw

Json = dict[str, Any]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
ALL = pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PAT = "github_pat_EXAMPLE0000000000000000000000"
SERVER = "ghs_EXAMPLE0000000000000000000000000000"
GPT = "gpt-4.1"


def config_for(fake: FakeCopilot, more: str = "") -> str:
    """A configuration whose provider `copilot` is the imitation."""
    return (
        f'[providers.copilot]\ntype = "copilot"\ngithub_url = "{fake.url}"\n'
        f'github_api_url = "{fake.url}"\n{more}\n'
    )


@contextmanager
def gateway_for(
    fake: FakeCopilot, more: str = "", env: dict[str, str] | None = None
) -> Iterator[Gateway]:
    """A gateway that is signed in to the imitation, or that has only its environment."""
    saved = {"copilot": {"type": "copilot", "github_token": fake.github_token}}
    with Gateway(config_for(fake, more), {} if env else saved, env) as gateway:
        yield gateway
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log(), gateway.log()[-4000:]
        said = gateway.log() + gateway.stdout()
        assert not [secret for secret in fake.secrets if secret in said]


def body_for(path: str, model: str, words: Any = "hello", **more: Any) -> Json:
    """One question in the dialect of an endpoint."""
    if path == RESPONSES:
        return {"model": model, "input": words, **more}
    limit = {"max_tokens": 1000} if path == MESSAGES else {}
    return {"model": model, "messages": [{"role": "user", "content": words}], **limit, **more}


def ask(gateway: Gateway, path: str, model: str, words: Any = "hello", **more: Any) -> Reply:
    """One question."""
    return gateway.request("POST", path, body_for(path, model, words, **more))


def message(reply: Reply) -> str:
    """The words of an error, whatever its dialect."""
    assert reply.status >= 400, reply
    return str(reply.json()["error"]["message"])


# ---- tokens for programs -------------------------------------------------------------------------


@pytest.mark.parametrize("token", [PAT, SERVER], ids=["pat", "server"])
def test_a_token_for_programs_is_used_as_it_is(token: str) -> None:
    with FakeCopilot(github_token=token) as fake, gateway_for(fake) as gateway:
        listed = [row["id"] for row in gateway.request("GET", "/v1/models").json()["data"]]
        assert GPT in listed
        for path in (CHAT, MESSAGES, RESPONSES):
            for stream in (False, True):
                assert ask(gateway, path, GPT, stream=stream).status == 200
        embedded = {"model": "text-embedding-3-small", "input": "x"}
        assert gateway.request("POST", "/v1/embeddings", embedded).status == 200
        assert fake.exchanges == 0
        sent = fake.requests
        assert {seen.headers["authorization"] for seen in sent} == {f"Bearer {token}"}
        called = [seen for seen in sent if seen.path != "/copilot_internal/user"]
        ids = {seen.headers["copilot-integration-id"] for seen in called}
        assert ids == {"copilot-developer-cli"}
        assert fake.violations == []


@pytest.mark.parametrize("answer", [403, 404, 500, 0])
def test_a_token_for_programs_works_where_the_account_may_not_be_asked(answer: int) -> None:
    with FakeCopilot(github_token=PAT) as fake:
        body = dump({"message": "Resource not accessible by personal access token"})
        fake.user_answers.extend(
            [Answer(answer, {}, body if answer else b"", then="close", chunked=False)] * 9
        )
        with gateway_for(fake, f'api_url = "{fake.url}"') as gateway:
            assert ask(gateway, CHAT, GPT).status == 200
            assert fake.violations == []


@pytest.mark.parametrize(
    ("token", "scheme"), [(PAT, "token"), (SERVER, "token"), ("gho_EXAMPLE00000000", "Bearer")]
)
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/v1/embeddings"])
def test_a_scheme_that_is_refused_is_switched_once(token: str, scheme: str, path: str) -> None:
    with FakeCopilot(github_token=token) as fake:
        fake.direct, fake.direct_scheme = True, scheme
        with gateway_for(fake) as gateway:
            for _ in range(2):
                if path == "/v1/models":
                    reply = gateway.request("GET", path)
                    assert GPT in reply.text
                elif path == CHAT:
                    assert ask(gateway, path, f"copilot/{GPT}").status == 200
                else:
                    embedded = {"model": "copilot/text-embedding-3-small", "input": "x"}
                    assert gateway.request("POST", path, embedded).status == 200
        refused = [note for note in fake.violations if "badly formatted" in note]
        assert len(refused) == len(fake.violations) == 1


def test_both_schemes_refused_is_an_error() -> None:
    with FakeCopilot(github_token=PAT) as fake, gateway_for(fake) as gateway:
        assert ask(gateway, CHAT, GPT).status == 200
        for status, text in (
            (400, "Authorization header is badly formatted"),
            (401, "malformed Authorization header"),
        ):
            for _ in range(2):
                fake.queue(Answer(status, {}, text.encode(), chunked=False, strict=False))
            assert text in message(ask(gateway, CHAT, GPT))
        assert len(fake.calls) == 5


def test_an_integration_id_that_is_not_allowed_is_explained() -> None:
    with FakeCopilot(github_token=PAT) as fake:
        with gateway_for(fake, 'integration_id = "vscode-chat"') as gateway:
            reply = ask(gateway, CHAT, f"copilot/{GPT}")
            assert reply.status == 403
            assert "integration_id" in message(reply)
        fake.violations.clear()
        with gateway_for(fake, 'integration_id = "agentic-workflows"') as gateway:
            assert ask(gateway, CHAT, GPT).status == 200
            assert fake.calls[-1].headers["copilot-integration-id"] == "agentic-workflows"
            assert fake.violations == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unauthorized: Personal Access Token does not have Copilot Requests permission",
         "permission Copilot Requests"),
        ("unauthorized: token expired", "auth copilot"),
    ],
)  # fmt: skip
def test_a_token_for_programs_that_copilot_refuses_asks_for_another(text: str, words: str) -> None:
    with FakeCopilot(github_token=SERVER) as fake, gateway_for(fake) as gateway:
        assert ask(gateway, CHAT, GPT).status == 200
        for _ in range(2):
            fake.queue(plain(401, text).answer())
        assert words in message(ask(gateway, CHAT, GPT))


@pytest.mark.parametrize("token", [PAT, "ghu_EXAMPLE000000000000000000000000000000"])
def test_a_token_in_the_environment_needs_no_sign_in(token: str) -> None:
    with FakeCopilot(github_token=token) as fake:
        with gateway_for(fake, env={"AICLIENT_COPILOT_TOKEN": f" {token}\n"}) as gateway:
            assert ask(gateway, CHAT, GPT).status == 200
            assert "provider copilot: not" not in gateway.stdout()
            assert not (gateway.config_folder / "copilot").exists()
        assert fake.violations == []


def test_a_variable_that_holds_no_token_is_named() -> None:
    env = {"AICLIENT_COPILOT_TOKEN": "two words"}
    with FakeCopilot() as fake, gateway_for(fake, env=env) as gateway:
        reply = ask(gateway, CHAT, f"copilot/{GPT}")
        assert "AICLIENT_COPILOT_TOKEN holds no" in message(reply)


# ---- Auto ----------------------------------------------------------------------------------------

AUTO = "copilot/auto"
CHOSEN = "gpt-6.1-luna"


def auto_calls(fake: FakeCopilot) -> list[Seen]:
    """The requests for a choice, so far."""
    return [seen for seen in fake.requests if seen.path in ("/auto", "/models/session")]


def listed(gateway: Gateway) -> list[str]:
    """The ids of /v1/models."""
    return [row["id"] for row in gateway.request("GET", "/v1/models").json()["data"]]


def named_models(path: str, reply: Reply, stream: bool) -> set[str]:
    """Every model that an answer names."""
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    rows = [json.loads(line) for line in lines] if stream else [reply.json()]
    inner = [row.get("response") or row.get("message") or row for row in rows]
    return {row["model"] for row in inner if "model" in row}


def hard_words(path: str) -> Any:
    """What the last user said, in parts."""
    kind = "input_text" if path == RESPONSES else "text"
    parts = [{"type": kind, "text": "look"}, {"type": kind, "text": "here"}]
    return [{"role": "user", "content": parts}] if path == RESPONSES else parts


@ALL
@STREAMED
@pytest.mark.parametrize("way", ["auto", "session"])
@pytest.mark.parametrize("only_auto", [True, False], ids=["student", "paid"])
def test_auto_chooses_a_model_for_a_conversation(
    path: str, stream: bool, way: str, only_auto: bool
) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_ways, fake.only_auto = {way}, only_auto
        if way == "session":
            fake.auto_models = [default_models()[0]]
        chosen = fake.auto_models[0]["id"]
        for turn in range(3):
            reply = ask(gateway, path, AUTO, hard_words(path), stream=stream)
            assert reply.status == 200, reply
            assert reply.headers["x-aiclient-model"] == chosen
            assert named_models(path, reply, stream) == {chosen}
            sent = fake.calls[turn]
            assert sent.body["model"] == chosen
            assert sent.headers["copilot-session-token"] == "auto-session-0-EXAMPLE"
        asked = auto_calls(fake)
        assert [seen.path for seen in asked].count("/auto") == 1
        if way == "auto":
            assert asked[0].body == {"prompt": "look\nhere"}
            assert asked[0].headers["x-github-api-version"] == "2026-08-01"
        used = gateway.request("GET", "/v1/usage").json()["providers"]["copilot"]["models"]
        assert list(used) == [chosen]
        assert fake.violations == []
        assert AUTO in listed(gateway)


def test_every_conversation_has_its_own_choice_and_the_oldest_is_forgotten() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_models = [auto_model(), default_models()[0], default_models()[3]]
        names = [model["id"] for model in fake.auto_models]
        told = [ask(gateway, CHAT, AUTO, str(n)).headers["x-aiclient-model"] for n in range(3)]
        assert told == names
        again = [ask(gateway, CHAT, AUTO, str(n)).headers["x-aiclient-model"] for n in range(3)]
        assert again == names
        assert len(auto_calls(fake)) == 3
        history = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"},
                   {"role": "user", "content": "2"}]  # fmt: skip
        body = {"model": AUTO, "messages": history}
        reply = gateway.request("POST", CHAT, body, {"X-Initiator": "user"})
        assert reply.headers["x-aiclient-model"] == names[1]
        for n in range(3, 53):
            assert ask(gateway, CHAT, AUTO, str(n)).status == 200
        assert len(auto_calls(fake)) == 53
        assert ask(gateway, CHAT, AUTO, "52").status == 200
        assert len(auto_calls(fake)) == 53
        assert ask(gateway, CHAT, AUTO, "0").status == 200
        assert len(auto_calls(fake)) == 54
        assert fake.violations == []


NO_SESSION = capi(400, "the choice is void", "invalid_session").answer()


@pytest.mark.parametrize("how", ["expired", "refused", "odd"])
@ALL
def test_a_choice_that_ended_is_made_anew(path: str, how: str) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.session_life = 0 if how == "expired" else 86_400
        assert ask(gateway, path, AUTO).status == 200
        fake.session_life = 86_400
        if how == "refused":
            fake.end_sessions()
            fake.auto_models = [default_models()[0]]
        elif how == "odd":
            fake.queue(NO_SESSION)
        reply = ask(gateway, path, AUTO, stream=True)
        assert reply.status == 200
        assert reply.headers["x-aiclient-model"] == fake.auto_models[0]["id"]
        assert len(auto_calls(fake)) == 2
        assert fake.violations == []


HTML = Answer(404, {"Content-Type": "text/html"}, b"<html>Not Found</html>", chunked=False)
GONE = Answer(404, {}, dump({"error": "not_found"}), chunked=False)
BUSY = Answer(503, {}, dump({"error": "unavailable"}), chunked=False)
ODD = Answer(200, {}, b"<html>hello</html>", chunked=False)
NAMELESS = Answer(200, {}, dump({"session_token": "x", "selected_model": {}}), chunked=False)


@pytest.mark.parametrize(
    ("first", "lasting"),
    [(HTML, True), (GONE, True), (BUSY, False), (ODD, False), (NAMELESS, False)],
)
def test_the_next_way_is_taken_for_good_only_where_auto_is_gated_off(
    first: Answer, lasting: bool
) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_ways = {"auto", "session"}
        fake.auto_answers.append(first)
        for words in ("one", "two"):
            assert ask(gateway, CHAT, AUTO, words).status == 200
        paths = [seen.path for seen in auto_calls(fake)]
        assert paths == ["/auto", "/models/session", "/models/session" if lasting else "/auto"]


@ALL
@STREAMED
def test_auto_without_a_name_is_the_last_way(path: str, stream: bool) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_ways, fake.only_auto = {"unnamed"}, True
        for _ in range(2):
            reply = ask(gateway, path, AUTO, stream=stream)
            assert reply.status == 200, reply
            assert reply.headers["x-aiclient-model"].startswith("gpt-4.1")
            assert named_models(path, reply, stream) == {reply.headers["x-aiclient-model"]}
            assert "model" not in fake.calls[-1].body
        assert len(auto_calls(fake)) == 2
        assert fake.violations == []
        used = gateway.request("GET", "/v1/usage").json()["providers"]["copilot"]["models"]
        assert list(used) == [reply.headers["x-aiclient-model"]]


@ALL
def test_an_account_without_auto_is_told_so(path: str) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_ways = set()
        assert AUTO in listed(gateway)
        for _ in range(2):
            reply = ask(gateway, path, AUTO, stream=True)
            assert reply.status == 404
            assert "does not offer Auto" in message(reply)
        assert len(fake.calls) == 1
        assert AUTO not in listed(gateway)
        assert ask(gateway, path, GPT).status == 200


def test_auto_that_is_busy_is_not_lost() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_answers.append(BUSY)
        assert ask(gateway, CHAT, AUTO).status == 200
        assert [seen.path for seen in auto_calls(fake)] == ["/auto", "/models/session", "/auto"]


@ALL
def test_a_plan_that_has_only_auto_says_so(path: str) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.only_auto = True
        for row in fake.model_list:
            row["model_picker_enabled"] = False
        assert listed(gateway)[0] == AUTO
        reply = ask(gateway, path, "copilot/gpt-5.2")
        assert reply.status == 404
        assert AUTO in message(reply)
        assert len(fake.calls) == 1


def test_auto_hangs_for_five_seconds_at_most() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.auto_ways = {"auto", "session"}
        fake.auto_answers.append(Answer(0, then="hang"))
        started = time.monotonic()
        assert ask(gateway, CHAT, AUTO).status == 200
        assert 4 < time.monotonic() - started < 9


def test_an_image_and_a_tier_are_told_to_auto() -> None:
    with FakeCopilot() as fake, gateway_for(fake, 'auto_tier = "intelligence"') as gateway:
        fake.auto_models = [default_models()[0]]
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        words = [{"type": "text", "text": "see"}, image]
        assert ask(gateway, CHAT, AUTO, words).status == 200
        told = {"prompt": "see", "has_image": True, "tier": "intelligence"}
        assert auto_calls(fake)[0].body == told
        assert fake.violations == []


# ---- plans without a denominator -----------------------------------------------------------------


@pytest.mark.parametrize("bucket", [None, "-1", "0"], ids=["no headers", "unlimited", "empty"])
def test_a_seat_billed_by_tokens_shows_what_it_used(bucket: str | None) -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        fake.user = seat_user()
        name = "x-quota-snapshot-premium_interactions"
        figures = f"ent={bucket}&ov=0.0&ovPerm=false&rem=100.0&rst=2026-12-01T00%3A00%3A00Z"
        fake.quota_headers = {name: figures} if bucket else {}
        for _ in range(2):
            rows = gateway.control("quota")["providers"]["copilot"]["allowances"]
            [row] = [row for row in rows if row["name"] == "premium_interactions"]
            assert (row["used"], row["limit"], row["unit"]) == (289.6, None, "credits")
            assert row["unlimited"] and row["percent_used"] is None
            assert ask(gateway, CHAT, GPT).status == 200
            known = gateway.request("GET", "/v1/usage").json()["quota"]["copilot"]["allowances"]
            assert [row["used"] for row in known if row["name"] == "premium_interactions"] == [
                289.6
            ]
            assert gateway.control("status")["quota"]["copilot"]["allowances"] == known
        assert fake.violations == []


def test_what_was_used_is_shown_where_there_is_no_limit() -> None:
    [row] = [
        row
        for row in gw.read_copilot_quota(seat_user()).as_json()["allowances"]
        if row["name"] == "premium_interactions"
    ]
    assert gw.format_remaining(row) == "289.6 credits used, no limit"


# ---- the model list ------------------------------------------------------------------------------


def test_flags_that_hide_every_chat_model_hide_none() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        for row in fake.model_list:
            if row.get("capabilities", {}).get("type") != "embeddings":
                row["model_picker_enabled"] = False
        names = listed(gateway)
        assert {AUTO, GPT, "claude-opus-4.8", "text-embedding-3-small"} <= set(names)
        assert "claude-sonnet-4" not in names  # its terms are not accepted


def test_one_flag_that_shows_a_model_hides_the_others() -> None:
    with FakeCopilot() as fake, gateway_for(fake) as gateway:
        for row in fake.model_list:
            row["model_picker_enabled"] = row.get("id") == GPT
        assert {name for name in listed(gateway) if name.startswith(("gpt", "claude"))} == {GPT}


# ---- Kiro and what is built in -------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kind", ["google", "builder_id", "api_key"])
@pytest.mark.parametrize("shape", ["ide", "cli"])
def test_a_shape_that_kiro_refuses_is_changed_once_and_remembered(
    path: str, kind: str, shape: str
) -> None:
    with FakeKiro(kind) as fake:
        names = ("api_url", "management_url", "oidc_url", "auth_url")
        urls = "".join(f'{name} = "{fake.url}"\n' for name in names)
        fake.refused_shapes, fake.needs_arn = {shape}, False
        config = f'[providers.kiro]\ntype = "kiro"\n{urls}'
        with Gateway(config, {"kiro": fake.token_file()}) as gateway:
            for _ in range(3):
                assert ask(gateway, path, "kiro/claude-sonnet-4.5").status == 200
            tried = ["ide" if seen.path != "/" else "cli" for seen in fake.calls]
            other = {"ide": "cli", "cli": "ide"}[shape]
            assert tried in ([other] * 3, [shape, *[other] * 3])
            fake.refused_shapes = {"ide", "cli"}
            before = len(fake.calls)
            assert ask(gateway, path, "kiro/claude-sonnet-4.5").status == 400
            assert len(fake.calls) == before + 2


def test_a_region_that_lists_no_profiles_is_passed_over() -> None:
    refusal = dump({"__type": "AccessDeniedException", "message": "not here"})
    with FakeKiro("idc", region="eu-central-1") as fake:
        fake.profiles_answers.append(Answer(403, {}, refusal, chunked=False))
        config = (
            f'[providers.kiro]\ntype = "kiro"\n[network]\nproxy = "{fake.proxy_url}"\n'
            f'ca_file = "{CA_FILE}"\n'
        )
        with Gateway(config, {"kiro": fake.token_file(region=None)}) as gateway:
            assert ask(gateway, CHAT, "kiro/claude-sonnet-4.5").status == 200
            held = json.loads((gateway.config_folder / "kiro" / "token.json").read_text())
            assert held["profile_arn"] == fake.profiles[0]["arn"]


def test_status_tells_of_when_the_built_in_facts_are() -> None:
    with Gateway() as gateway:
        facts = gateway.control("status")["built_in_facts"]
        assert facts["copilot"] == facts["kiro"] == "2026-11"
