"""Accounts as they are in the field: tokens for programs, Auto, plans without a denominator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import Answer, FakeCopilot, dump, plain
from support import Gateway, Reply

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
        sent = [seen for seen in fake.requests if seen.path != "/copilot_internal/user"]
        assert {seen.headers["authorization"] for seen in sent} == {f"Bearer {token}"}
        ids = {seen.headers["copilot-integration-id"] for seen in sent}
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
        for status in (400, 401):
            text = "Authorization header is badly formatted"
            for _ in range(2):
                fake.queue(plain(status, text).answer())
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
