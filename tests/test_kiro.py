"""Kiro from end to end: the real program between a client and the strict imitation."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_kiro import (
    BUILDER_ARN,
    CA_FILE,
    SOCIAL_ARN,
    Answer,
    Call,
    FakeKiro,
    KiroBrain,
    Say,
    Seen,
    Think,
    chunk,
    default_models,
    drip,
    dump,
    error_frame,
    exception_frame,
    frame,
)
from fakes import Part
from kiro_rules import BAD_TOKEN, characters_in, results_of
from support import Gateway, Reply, Wire
from test_copilot import answered, error, frames, heard, image, stream_error, tool, user

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
#: Each caller once, one with a stream, where it does not matter and waiting costs time.
EITHER = pytest.mark.parametrize(
    ("path", "stream"), [(CHAT, True), (MESSAGES, False)], ids=["chat", "messages"]
)


def by_turns(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each name once, for a caller in turn: where waiting costs time."""
    rows = [(name, (CHAT, MESSAGES)[at % 2]) for at, name in enumerate(names)]
    return pytest.mark.parametrize(("name", "path"), rows)


BOTH = pytest.mark.parametrize("path", [CHAT, MESSAGES], ids=["chat", "messages"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
KINDS = ["builder_id", "idc", "google", "github", "external_idp", "api_key"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)

SONNET = "claude-sonnet-4.5"
OPUS = "claude-opus-4.8"
GPT = "gpt-5.6-sol"
RUNTIME = "runtime.us-east-1.kiro.dev"
Q = "q.us-east-1.amazonaws.com"
OLD = "codewhisperer.us-east-1.amazonaws.com"
MANAGEMENT = "management.us-east-1.kiro.dev"
#: where each kind renews its tokens: (path, host, members of the body)
REFRESHES: dict[str, tuple[str, str, set[str]]] = {
    "builder_id": ("/token", "oidc.us-east-1.amazonaws.com",
                   {"clientId", "clientSecret", "refreshToken", "grantType"}),
    "idc": ("/token", "oidc.eu-west-1.amazonaws.com",
            {"clientId", "clientSecret", "refreshToken", "grantType"}),
    "google": ("/refreshToken", "prod.us-east-1.auth.desktop.kiro.dev", {"refreshToken"}),
    "github": ("/refreshToken", "prod.us-east-1.auth.desktop.kiro.dev", {"refreshToken"}),
    "external_idp": ("/idp/token", "idp.example.com", set()),
}  # fmt: skip


# ---- the two programs ----------------------------------------------------------------------------


class Watched(FakeKiro):
    """An imitation that looks at the client's token file whenever it is asked for something."""

    file: Path | None = None
    #: what happens when a refresh arrives, before it is answered
    on_refresh: Callable[[], None] | None = None

    def __init__(self, kind: str = "google", **more: Any) -> None:
        super().__init__(kind, **more)
        #: (bearer, what the file then held, its mode)
        self.looks: list[tuple[str, Json, int]] = []

    def route(self, seen: Seen) -> Answer:
        """The answer to one request."""
        if seen.path in {path for path, _, _ in REFRESHES.values()} and self.on_refresh:
            self.on_refresh()
        bearer = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if bearer and self.file is not None:
            mode = stat.S_IMODE(self.file.stat().st_mode)
            self.looks.append((bearer, json.loads(self.file.read_text()), mode))
        return super().route(seen)


@dataclass
class Pair:
    """A gateway that is signed in to an imitation of Kiro."""

    fake: Watched
    gateway: Gateway

    @property
    def file(self) -> Path:
        """The token file."""
        return self.gateway.config_folder / "kiro" / "token.json"

    def saved(self) -> Json:
        """What the token file holds."""
        held: Json = json.loads(self.file.read_text())
        return held

    def replace_file(self, content: Json) -> None:
        """Writes the token file as another program does that replaces it at once."""
        beside = self.file.with_name("other.json")
        beside.touch(mode=0o600)
        beside.write_text(json.dumps(content))
        beside.replace(self.file)

    def post(self, path: str, body: Json, **headers: str) -> Reply:
        """One request for an answer."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request("POST", path, body, fields)

    def ask(self, path: str, words: Any, model: str = SONNET, **more: Any) -> Reply:
        """One request for an answer to `words`."""
        return self.post(path, asking(words, model, **more))

    def send(self, path: str, body: Json) -> Wire:
        """A connection on which a request was sent."""
        wire = self.gateway.wire()
        wire.send(self.gateway.request_bytes("POST", path, body))
        return wire

    def models(self) -> dict[str, Json]:
        """The rows of /v1/models by id."""
        rows = self.gateway.request("GET", "/v1/models").json()["data"]
        return {row["id"]: row for row in rows if row["provider"] == "kiro"}

    def usage(self, model: str = SONNET) -> Json:
        """The row of a model in /v1/usage."""
        report = self.gateway.request("GET", "/v1/usage").json()
        row: Json = report["providers"]["kiro"]["models"][model]
        return row

    def controls(self, name: str) -> list[Seen]:
        """The requests to the control plane for `name`."""
        return [seen for seen in self.fake.requests if seen.path.startswith(f"/{name}")]


def config_for(fake: FakeKiro, proxied: bool = False, kiro: str = "", network: str = "") -> str:
    """A configuration whose only provider is the imitation, directly or under the real names."""
    if proxied:
        network = f'proxy = "{fake.proxy_url}"\nca_file = "{CA_FILE}"\n{network}'
    else:
        names = ("api_url", "management_url", "oidc_url", "auth_url")
        kiro = "".join(f'{name} = "{fake.url}"\n' for name in names) + kiro
    return (
        'default_provider = "kiro"\n'
        '[providers.copilot]\ntype = "copilot"\nenabled = false\n'
        f'[providers.kiro]\ntype = "kiro"\n{kiro}'
        f'[network]\n{network}\n[logging]\nlevel = "debug"\n'
    )


def start(
    stack: ExitStack,
    kind: str = "google",
    *,
    proxied: bool = False,
    kiro: str = "",
    network: str = "",
    token: Json | None = None,
    region: str = "us-east-1",
    brain: KiroBrain | None = None,
    models: list[Json] | None = None,
    **switches: Any,
) -> Pair:
    """A fresh pair; it ends, and is checked, with the stack."""
    fake = stack.enter_context(Watched(kind, region=region, brain=brain, models=models))
    for name, value in switches.items():
        setattr(fake, name, value)
    idp = {"token_endpoint": "https://idp.example.com/idp/token",
           "issuer_url": "https://idp.example.com/idp"}  # fmt: skip
    more = idp if proxied and kind == "external_idp" else {}
    # A model's region is not a setting here: it has to be found.
    held = fake.token_file(**{**more, "region": None, **(token or {})})
    gateway = Gateway(config_for(fake, proxied, kiro, network), tokens={"kiro": held})
    fake.file = gateway.config_folder / "kiro" / "token.json"
    stack.enter_context(gateway)
    stack.callback(check_end, gateway)
    return Pair(fake, gateway)


def check_end(gateway: Gateway) -> None:
    """The program ends well and never met an exception that it did not expect."""
    status = gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()[-4000:]
    assert "never retrieved" not in gateway.log(), gateway.log()[-4000:]
    assert status == 0


Make = Callable[..., Pair]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes pairs of one's own, which must have kept every rule afterwards."""
    with ExitStack() as stack:
        pairs: list[Pair] = []

        def made(*args: Any, **more: Any) -> Pair:
            pairs.append(start(stack, *args, **more))
            return pairs[-1]

        yield made
        assert [pair.fake.violations for pair in pairs] == [[] for _ in pairs]


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    """One pair for all tests that leave no trace in it."""
    with ExitStack() as stack:
        yield start(stack)


@pytest.fixture
def pair(running: Pair) -> Iterator[Pair]:
    """The shared pair with empty lists, which must have kept every rule afterwards."""
    clear(running.fake)
    yield running
    assert running.fake.violations == []


@pytest.fixture
def limited(pair: Pair) -> Iterator[Pair]:
    """The shared pair for tests that make a model or the account rest."""
    yield pair
    pair.gateway.control("provider.enable", name="kiro")


def clear(fake: FakeKiro) -> None:
    """Forgets what came before."""
    for seen in (fake.requests, fake.calls, fake.cancelled, fake.violations):
        seen.clear()
    fake._queue.clear()  # noqa: SLF001 - what a test before did not take


# ---- requests and answers ------------------------------------------------------------------------


def asking(words: Any, model: str = SONNET, **more: Any) -> Json:
    """A body that both dialects understand."""
    return {"model": f"kiro/{model}", "max_tokens": 4000, "messages": [user(words)], **more}


def refusal(
    status: int,
    message: str = "",
    reason: str | None = None,
    kind: str = "",
    strict: bool = True,
    **headers: str,
) -> Answer:
    """An error answer in the service's form; it counts as nobody's fault."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if kind:
        fields["x-amzn-ErrorType"] = f"{kind}:http://internal.amazon.com/coral/"
    body = dump({"message": message, "reason": reason})
    return Answer(status, fields, body, chunked=False, strict=strict)


def streaming(*pieces: bytes, **more: Any) -> Answer:
    """A stream as an answer."""
    return Answer(200, {}, list(pieces), **more)


def text(words: str) -> bytes:
    """A piece of an answer."""
    return frame("assistantResponseEvent", {"content": words, "modelId": SONNET})


OPENING = frame("messageMetadataEvent", {"conversationId": "EXAMPLE", "utteranceId": "EXAMPLE"})
CLOSING = frame("contextUsageEvent", {"contextUsagePercentage": 1.0}) + frame(
    "metadataEvent", {"stopReason": "END_TURN"}
)
WHOLE = [OPENING, text("one "), text("two "), text("three "), CLOSING]


def state_of(seen: Seen) -> Json:
    """The conversation state of a model call."""
    state: Json = seen.body["conversationState"]
    return state


def thoughts(seen: Seen) -> list[Json]:
    """Every replayed thought of a model call."""
    turns = [turn.get("assistantResponseMessage", {}) for turn in state_of(seen).get("history", ())]
    return [turn["reasoningContent"] for turn in turns if "reasoningContent" in turn]


def shapes(fake: FakeKiro) -> list[tuple[str, str]]:
    """(host, shape) of every model call."""
    return [(c.via, "cli" if c.path == "/" else "ide") for c in fake.calls]


def until(true: Callable[[], bool], seconds: float = 8) -> bool:
    """Asks until something is so."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    return found


def effort(path: str) -> Json:
    """What asks for thinking."""
    if path == CHAT:
        return {"reasoning_effort": "high"}
    return {"thinking": {"type": "enabled", "budget_tokens": 2000}}


# ---- every kind of sign-in -----------------------------------------------------------------------


@EVERY_KIND
def test_every_kind_of_sign_in_answers_and_lists_its_models(make: Make, kind: str) -> None:
    pair = make(kind, proxied=True)
    for path in (CHAT, MESSAGES):
        for stream in (False, True):
            said = heard(pair.ask(path, f"hi {path} {stream}", stream=stream))
            assert said.text == f"Hello from {SONNET}. You said: hi {path} {stream}"
            assert said.finish == ("stop" if path == CHAT else "end_turn")
    assert pair.fake.refreshes == 0
    assert len(pair.fake.calls) == 4
    shape = "cli" if kind == "api_key" else "ide"
    assert set(shapes(pair.fake)) == {(RUNTIME, shape)}
    arns = {call.body.get("profileArn") for call in pair.fake.calls}
    assert arns == {pair.fake.arn}
    assert set(pair.models()) == {model["modelId"] for model in default_models()}
    assert not any("guessed" in row for row in pair.models().values())
    assert {seen.via for seen in pair.controls("ListAvailableModels")} == {MANAGEMENT}


@pytest.mark.parametrize("kind", REFRESHES)
def test_every_kind_of_sign_in_is_renewed_at_its_own_place_and_saved_before_use(
    make: Make, kind: str
) -> None:
    token = {"expires_at": int(time.time()) + 30, "x_unknown": {"a": [1]}, "provider": "Example"}
    pair = make(kind, proxied=True, token=token)
    old = pair.saved()
    assert heard(pair.ask(CHAT, "hi")).text
    path, host, members = REFRESHES[kind]
    (seen,) = (seen for seen in pair.fake.requests if seen.path == path)
    assert (seen.method, seen.via, pair.fake.refreshes) == ("POST", host, 1)
    if members:
        assert seen.headers["content-type"].startswith("application/json")
        assert set(seen.body) == members
        assert seen.body["refreshToken"] == old["refresh_token"]
    else:
        assert seen.headers["content-type"] == "application/x-www-form-urlencoded"
        assert b"grant_type=refresh_token" in seen.raw
    assert len(pair.fake.looks) == 2  # the list of models, and the call
    for bearer, held, mode in pair.fake.looks:
        assert held["access_token"] == bearer != old["access_token"]
        assert held["refresh_token"] != old["refresh_token"]
        assert (mode, held["x_unknown"], held["provider"]) == (0o600, {"a": [1]}, "Example")
    saved = pair.saved()
    assert not set(old) - set(saved)
    changed = {key for key in old if saved[key] != old[key]}
    assert changed == {"access_token", "refresh_token", "expires_at"}
    assert saved["expires_at"] > time.time() + 3000
    assert stat.S_IMODE(pair.file.parent.stat().st_mode) == 0o700
    assert sorted(os.listdir(pair.file.parent)) == ["token.json", "token.lock"]


def test_an_api_key_that_is_refused_is_never_renewed(make: Make) -> None:
    pair = make("api_key")
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    replies = [pair.ask(CHAT, f"hi {n}") for n in range(3)]
    assert {reply.status for reply in replies} == {503}
    assert {reply.headers["x-should-retry"] for reply in replies} == {"false"}
    assert pair.fake.refreshes == 0


@BOTH
def test_without_a_sign_in_the_answer_says_what_to_do(path: str) -> None:
    with Gateway() as gateway:
        reply = gateway.request("POST", path, asking("hi"))
        check_end(gateway)
    assert reply.status == 503
    assert reply.headers["x-should-retry"] == "false"
    assert "type: " in error(reply)["message"] and "auth kiro" in error(reply)["message"]


#: What makes a Builder ID's file one that cannot be right.
ODD: list[Json] = [
    {"refresh_token": "aorEXAMPLE..."},
    {"refresh_token": "aorEXAMPLE\nX: y", "expires_at": 0},
    {"idc_region": "evil.example/x", "expires_at": 0},
    {"client_secret": None, "expires_at": 0},
    {"profile_arn": "arn:aws:s3:::EXAMPLE"},
    {"auth_method": "external_idp", "token_endpoint": "https://evil.example/token",
     "issuer_url": "https://idp.example.com/idp", "expires_at": 0},
    {"auth_method": "external_idp", "token_endpoint": "http://idp.example.com/token",
     "issuer_url": "http://idp.example.com/idp", "expires_at": 0},
]  # fmt: skip


def test_a_token_file_that_cannot_be_right_is_told_and_sent_nowhere(make: Make) -> None:
    pair = make("builder_id", proxied=True)
    right = pair.saved()
    for odd in ODD:
        pair.replace_file({**right, **odd})
        reply = pair.ask(CHAT, "hi")
        assert reply.status == 503, odd
        assert reply.headers["x-should-retry"] == "false"
        assert "type: " in error(reply)["message"] and "auth kiro" in error(reply)["message"]
        assert "EXAMPLE" not in error(reply)["message"]
    for data in (b"", b"[]", b"{", b"\xff"):
        pair.file.write_bytes(data)
        assert "token.json" in error(pair.ask(CHAT, "hi"))["message"]
    assert (pair.fake.requests, pair.fake.connects) == ([], [])
    pair.replace_file(right)
    assert heard(pair.ask(CHAT, "hi")).text


def test_a_file_with_a_refresh_token_alone_is_enough(make: Make) -> None:
    bare = dict.fromkeys(("access_token", "expires_at", "auth_method", "profile_arn"))
    pair = make("google", token=bare)
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.refreshes == 1
    assert pair.saved()["profile_arn"] == pair.fake.arn


@pytest.mark.parametrize(
    ("said", "refreshes"),
    [
        (time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() + 3600)), 0),
        (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 3600)), 0),
        (int((time.time() + 3600) * 1000), 0),
        (time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 30)), 1),
        ("soon", 1),
    ],
    ids=["nine digits", "no zone", "milliseconds", "almost over", "nonsense"],
)
def test_an_expiry_is_understood_in_every_form(make: Make, said: Any, refreshes: int) -> None:
    pair = make(token={"expires_at": said})
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.refreshes == refreshes


# ---- models --------------------------------------------------------------------------------------


def test_the_list_shows_windows_where_the_service_tells_them(pair: Pair) -> None:
    rows = pair.models()
    assert rows[OPUS]["max_input_tokens"] == 1_000_000
    assert rows[OPUS]["max_tokens"] == 128_000
    assert "max_input_tokens" not in rows["claude-sonnet-4"]
    assert rows["claude-haiku-4.5"]["display_name"]


def test_a_list_of_many_pages_with_odd_entries_is_read(make: Make) -> None:
    odd: list[Any] = [{"modelId": None}, {"name": "x"}, "claude", None, {"modelId": "a b/c"},
                      {"modelId": "late-1", "tokenLimits": "many"}]  # fmt: skip
    pair = make(models=[*default_models(), *odd], page_size=4)
    assert set(pair.models()) == {m["modelId"] for m in default_models()} | {"late-1"}
    assert len(pair.controls("ListAvailableModels")) == 4


def test_a_list_without_end_is_left_after_some_pages(make: Make) -> None:
    pair = make()
    page = dump({"models": [{"modelId": "claude-sonnet-4.5"}], "nextToken": "EXAMPLE-0"})
    answers = (Answer(200, {"Content-Type": "application/json"}, page) for _ in range(200))
    pair.fake.models_answers.extend(answers)
    assert set(pair.models()) == {SONNET}
    assert len(pair.controls("ListAvailableModels")) < 20


def test_a_list_whose_next_page_has_no_name_ends_there(make: Make) -> None:
    pair = make()
    page = b'{"models":[{"modelId":"claude-sonnet-4.5"}],"nextToken":"\\ud800"}'
    pair.fake.models_answers.append(Answer(200, {"Content-Type": "application/json"}, page))
    assert set(pair.models()) == {SONNET}


@pytest.mark.parametrize("status", [200, 503])
def test_a_list_that_cannot_be_had_is_replaced_by_one_marked_as_guessed(
    make: Make, status: int
) -> None:
    pair = make()
    body = b'{"models":[]}' if status == 200 else dump({"message": "no EXAMPLE"})
    for _ in range(9):
        pair.fake.models_answers.append(Answer(status, {}, body, chunked=False))
    rows = pair.models()
    assert {"auto", SONNET, OPUS, "claude-haiku-4.5"} <= set(rows)
    assert all(row["guessed"] is True for row in rows.values())
    assert heard(pair.ask(CHAT, "hi")).text
    pair.fake.models_answers.clear()
    # A name that the guess does not have makes it ask again.
    assert heard(pair.post(CHAT, {**asking("hi"), "model": "qwen3-coder-next"})).text
    assert not any("guessed" in row for row in pair.models().values())


def test_a_stale_token_of_the_list_is_renewed_once(make: Make) -> None:
    pair = make()
    pair.fake.expire_tokens()
    assert not any("guessed" in row for row in pair.models().values())
    assert pair.fake.refreshes == 1


def test_a_list_that_refuses_every_token_does_not_stop_the_calls(make: Make) -> None:
    pair = make("builder_id")
    for _ in range(9):
        said = dump({"message": BAD_TOKEN, "reason": None})
        pair.fake.models_answers.append(Answer(403, {}, said, chunked=False, strict=False))
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.refreshes <= 1


def test_the_older_host_lists_models_when_the_newer_is_gone(make: Make) -> None:
    pair = make(proxied=True, dead_hosts={MANAGEMENT})
    assert set(pair.models()) == {m["modelId"] for m in default_models()}
    assert {seen.via for seen in pair.controls("ListAvailableModels")} == {Q}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("claude-sonnet-4.5", SONNET),
        ("kiro/claude-sonnet-4.5", SONNET),
        ("claude-sonnet-4-5", SONNET),
        ("claude-sonnet-4-5-20250929", SONNET),
        ("Claude-Sonnet-4.5", SONNET),
        ("claude-sonnet-4-5-latest", SONNET),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("kiro/claude-opus-4-8[1m]", OPUS),
        ("claude-opus-4-8", OPUS),
        ("claude-haiku-4-5", "claude-haiku-4.5"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-4.6"),
        ("claude-3-haiku-20240307", "claude-haiku-4.5"),
        ("kiro/kiro-auto", "auto"),
        ("kiro/auto", "auto"),
        (GPT, GPT),
        ("qwen3-coder-next", "qwen3-coder-next"),
        ("claude-sonnet-4-5-20250929-thinking", SONNET),
        ("claude-sonnet-4.5-thinking", SONNET),
        ("claude-opus-4.8-high", OPUS),
    ],
)
def test_a_name_in_any_usual_spelling_reaches_the_right_model(
    pair: Pair, asked: str, sent: str
) -> None:
    reply = pair.post(MESSAGES, {**asking("hi"), "model": asked})
    assert heard(reply).model == asked
    assert reply.headers["x-aiclient-model"] == sent
    current = state_of(pair.fake.calls[0])["currentMessage"]["userInputMessage"]
    assert current["modelId"] == sent


@BOTH
def test_a_name_that_the_service_does_not_know_is_a_404(pair: Pair, path: str) -> None:
    reply = pair.ask(path, "hi", "claude-sonnet-9.9")
    assert reply.status == 404
    assert error(reply)["type"] == (
        "not_found_error" if path == MESSAGES else "invalid_request_error"
    )
    if path == CHAT:
        assert error(reply)["code"] == "model_not_found"
    assert len(pair.fake.calls) == 1  # an exact name is tried, listed or not
    pair.fake.violations.clear()


# ---- usage ---------------------------------------------------------------------------------------


@BOTH
@STREAMED
def test_tokens_and_credits_are_counted_as_the_service_tells_them(
    pair: Pair, path: str, stream: bool
) -> None:
    pair.gateway.request("DELETE", "/v1/usage")
    more: Json = {"stream_options": {"include_usage": True}} if path == CHAT and stream else {}
    said = heard(pair.ask(path, f"hi {path} {stream}", stream=stream, **more))
    prompt = characters_in(pair.fake.calls[0].body) // 4 + 1
    output = len(said.text) // 4 + 1
    row = pair.usage()
    assert (row["input_tokens"], row["output_tokens"]) == (prompt, output)
    assert row["cache_read_tokens"] == prompt // 3
    assert row["credits"] == pytest.approx(0.09375)
    assert (row["request_count"], row["error_count"]) == (1, 0)
    if path == CHAT:
        assert (said.usage["prompt_tokens"], said.usage["completion_tokens"]) == (prompt, output)
    else:
        assert said.usage["input_tokens"] == prompt - prompt // 3
        assert said.usage["cache_read_input_tokens"] == prompt // 3
        assert said.usage["output_tokens"] == output


@pytest.mark.parametrize(
    ("path", "model", "window"),
    [(CHAT, SONNET, 200_000), (MESSAGES, OPUS, 1_000_000), (CHAT, "auto", 200_000)],
)
def test_tokens_are_derived_from_the_share_of_the_window(
    make: Make, path: str, model: str, window: int
) -> None:
    pair = make(with_metadata=False)
    said = heard(pair.ask(path, "word " * 4000, model))
    told = round(100 * (characters_in(pair.fake.calls[0].body) // 4 + 1
                        + len(said.text) // 4 + 1) / window, 4)  # fmt: skip
    row = pair.usage(model)
    assert row["output_tokens"] > 1000
    assert row["total_tokens"] == pytest.approx(told * window / 100, abs=2)
    assert row["credits"] == pytest.approx(0.09375)


def test_tokens_are_estimated_where_the_service_tells_nothing(make: Make) -> None:
    pair = make(with_metadata=False, with_context=False, with_metering=False)
    body = asking("please call the tool", tools=[tool(CHAT)])
    assert heard(pair.post(CHAT, body)).calls
    row = pair.usage()
    assert row["input_tokens"] > 10
    assert row["output_tokens"] > 0
    assert row["credits"] == 0


# ---- conversations -------------------------------------------------------------------------------


@BOTH
@STREAMED
@pytest.mark.parametrize("model", [SONNET, OPUS, GPT])
def test_two_tools_are_called_in_parallel_over_many_turns(
    pair: Pair, path: str, model: str, stream: bool
) -> None:
    tools = [tool(path, "look"), tool(path, "read")]
    body = asking("call two tools", model, tools=tools, stream=stream)
    for turn in range(3):
        said = heard(pair.post(path, body))
        assert [name for _, name, _ in said.calls] == ["look", "read"]
        assert said.calls[0][2] == {"path": "example"}
        assert said.finish == ("tool_calls" if path == CHAT else "tool_use")
        body = answered(path, body, said, [f"a{turn}", f"b{turn}"])
        said = heard(pair.post(path, body))
        assert said.text == f"The tool said: a{turn} and b{turn}"
        assert said.finish == ("stop" if path == CHAT else "end_turn")
        body["messages"] += [said.message, user("call two tools")]
    assert len({state_of(call)["conversationId"] for call in pair.fake.calls}) == 1


@BOTH
def test_tools_that_are_no_longer_offered_do_not_break_the_history(pair: Pair, path: str) -> None:
    body = asking("call the tool", tools=[tool(path)])
    body = answered(path, body, heard(pair.post(path, body)), ["r"])
    for offered in ([], [tool(path, "other")]):
        said = heard(pair.post(path, {**body, "tools": offered} if offered else
                               {k: v for k, v in body.items() if k != "tools"}))  # fmt: skip
        assert said.text == "The tool said: r"


@BOTH
@STREAMED
def test_a_long_tool_name_is_restored(pair: Pair, path: str, stream: bool) -> None:
    name = "mcp__a_server_with_a_long_name__" + "x" * 32 if path == CHAT else "mcp__" + "y" * 120
    body = asking("call the tool", tools=[tool(path, name)], stream=stream)
    said = heard(pair.post(path, body))
    assert [called for _, called, _ in said.calls] == [name]
    assert heard(pair.post(path, answered(path, body, said, ["r"]))).text == "The tool said: r"


@BOTH
@STREAMED
def test_a_tool_without_arguments_is_called_with_an_empty_object(
    pair: Pair, path: str, stream: bool
) -> None:
    bare = tool(path)
    place = bare if path == MESSAGES else bare["function"]
    place["input_schema" if path == MESSAGES else "parameters"] = {"type": "object"}
    body = asking("call the tool", tools=[bare], stream=stream)
    said = heard(pair.post(path, body))
    assert [arguments for _, _, arguments in said.calls] == [{}]
    assert heard(pair.post(path, answered(path, body, said, [""]))).text


@BOTH
def test_a_schema_with_every_keyword_is_taken(pair: Pair, path: str) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
        "additionalProperties": False, "required": [],
        "properties": {
            "format": {"type": "string", "format": "uri", "pattern": "^x", "minLength": 1},
            "many": {"type": "array", "items": {"$ref": "#/$defs/one"}, "uniqueItems": True},
            "maybe": {"type": ["string", "null"], "default": None},
        },
        "$defs": {"one": {"type": "object", "properties": {"pattern": {"type": "integer",
                                                                       "minimum": 1}}}},
    }  # fmt: skip
    full = tool(path)
    place = full if path == MESSAGES else full["function"]
    place["input_schema" if path == MESSAGES else "parameters"] = schema
    place["description"] = "\N{SNOWMAN}" * 9000
    assert heard(pair.post(path, asking("hi", tools=[full]))).text
    (sent,) = state_of(pair.fake.calls[0])["currentMessage"]["userInputMessage"][
        "userInputMessageContext"]["tools"]  # fmt: skip
    kept = sent["toolSpecification"]["inputSchema"]["json"]["properties"]
    assert {"format", "many", "maybe"} == set(kept)
    assert "pattern" in json.dumps(kept["many"])


@BOTH
@pytest.mark.parametrize("model", [SONNET, GPT])
def test_an_image_of_the_user_is_seen(pair: Pair, path: str, model: str) -> None:
    said = heard(pair.ask(path, [image(path), {"type": "text", "text": "look"}], model))
    assert "I see 1 image(s)." in said.text
    assert "I see 1 image(s)." in heard(pair.ask(path, [image(path)], model)).text


@STREAMED
def test_images_in_tool_results_are_seen(pair: Pair, stream: bool) -> None:
    tools = [tool(MESSAGES, "look"), tool(MESSAGES, "read")]
    body = asking("call two tools", tools=tools, stream=stream)
    said = heard(pair.post(MESSAGES, body))
    words = {"type": "text", "text": "seen"}
    results = [[words, image(MESSAGES)], [image(MESSAGES)]]
    done = heard(pair.post(MESSAGES, answered(MESSAGES, body, said, results)))
    assert "I see 2 image(s)." in done.text
    assert "seen" in done.text


@BOTH
def test_an_image_called_by_a_wrong_name_is_told_by_its_bytes(pair: Pair, path: str) -> None:
    wrong = json.loads(json.dumps(image(path)).replace("image/png", "image/jpeg"))
    assert "I see 1" in heard(pair.ask(path, [wrong, {"type": "text", "text": "look"}])).text


@BOTH
def test_an_image_that_cannot_be_sent_is_refused_here(pair: Pair, path: str) -> None:
    url = "https://example.com/EXAMPLE.png"
    remote = ({"type": "image_url", "image_url": {"url": url}} if path == CHAT else
              {"type": "image", "source": {"type": "url", "url": url}})  # fmt: skip
    for part, model in ((remote, SONNET), (image(path), "qwen3-coder-next")):
        reply = pair.ask(path, [part, {"type": "text", "text": "look"}], model)
        assert reply.status == 400
        assert "image" in error(reply)["message"]
    assert pair.fake.calls == []


@BOTH
@STREAMED
def test_system_prompts_come_first_and_once(pair: Pair, path: str, stream: bool) -> None:
    body = asking("hi", stream=stream)
    if path == MESSAGES:
        body["system"] = [{"type": "text", "text": "Be terse."},
                          {"type": "text", "text": "Be kind.",
                           "cache_control": {"type": "ephemeral"}}]  # fmt: skip
    else:
        body["messages"] = [{"role": "system", "content": "Be terse."},
                            {"role": "developer", "content": "Be kind."},
                            *body["messages"]]  # fmt: skip
    said = heard(pair.post(path, body))
    assert re.search(r"You said: Be terse\.\s+Be kind\.\s+hi$", said.text)


@BOTH
def test_a_prefilled_answer_becomes_history(pair: Pair, path: str) -> None:
    body = asking("hi")
    body["messages"] += [{"role": "assistant", "content": "It is"}]
    assert heard(pair.post(path, body)).text
    body["messages"][-1]["content"] = "{"
    assert heard(pair.post(path, body)).text


@BOTH
def test_a_conversation_in_disorder_is_put_right(pair: Pair, path: str) -> None:
    lone = "caf\udc00"
    turns = [{"role": "assistant", "content": "Welcome."}, user("a"), user("b"),
             {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"},
             user(lone)]  # fmt: skip
    assert heard(pair.post(path, {**asking(""), "messages": turns})).text
    if path == CHAT:
        call = {"id": "call:1/x", "type": "function",
                "function": {"name": "look", "arguments": "{broken"}}  # fmt: skip
        calls = [call, {**call, "id": "lost"}]
        turns = [user("a"), {"role": "assistant", "content": None, "tool_calls": calls},
                 {"role": "tool", "tool_call_id": "call:1/x", "content": ""},
                 {"role": "tool", "tool_call_id": "orphan", "content": "o"},
                 user("go on")]  # fmt: skip
        assert heard(pair.post(path, {**asking(""), "messages": turns})).text


@BOTH
def test_a_session_is_one_conversation_and_another_is_not(pair: Pair, path: str) -> None:
    for words in ("one", "one", "two"):
        heard(pair.ask(path, words))
    first, second, third = (state_of(call)["conversationId"] for call in pair.fake.calls)
    assert first == second != third
    if path == MESSAGES:
        session = "0a1b2c3d-0000-4000-8000-000000000001"
        heard(pair.ask(path, "x", metadata={"user_id": f"user_EXAMPLE_session_{session}"}))
        assert state_of(pair.fake.calls[-1])["conversationId"] == session


# ---- thinking ------------------------------------------------------------------------------------


def two_steps(body: Json) -> list[Part]:
    """Thinks and calls a tool twice, then is done."""
    state = body["conversationState"]
    turns = [turn.get("userInputMessage", {}) for turn in state.get("history", ())]
    turns.append(state["currentMessage"]["userInputMessage"])
    done = sum(len(results_of(turn)) for turn in turns)
    if done < 2 and turns[-1].get("userInputMessageContext", {}).get("tools"):
        return [Think(f"step {done}"), Call("look", {"path": str(done)})]
    return [Think("last"), Say("done")]


@pytest.fixture(scope="module")
def thinker() -> Iterator[Pair]:
    """A pair whose models think before each of two tool calls."""
    with ExitStack() as stack:
        yield start(stack, brain=two_steps)


@pytest.fixture
def thinking(thinker: Pair) -> Iterator[Pair]:
    """The same with empty lists, which must have kept every rule afterwards."""
    clear(thinker.fake)
    thinker.fake.issued.texts.clear()
    yield thinker
    assert thinker.fake.violations == []


@pytest.mark.parametrize("model", [OPUS, GPT])
@BOTH
@STREAMED
def test_signatures_of_thoughts_return_over_two_tool_turns(
    thinking: Pair, path: str, model: str, stream: bool
) -> None:
    body = asking("go", model, tools=[tool(path)], stream=stream, **effort(path))
    for step in range(2):
        said = heard(thinking.post(path, body))
        assert said.thinking == ("" if model == GPT else f"step {step}")
        if path == CHAT:  # a client that keeps nothing but what the standard has
            said.message = {k: v for k, v in said.message.items() if k != "reasoning_content"}
        body = answered(path, body, said, [f"result {step}"])
    assert heard(thinking.post(path, body)).text == "done"
    sent = [thought["reasoningText"]["signature"] for thought in thoughts(thinking.fake.calls[-1])]
    assert sent == list(thinking.fake.issued.texts)[:2]
    assert len(thinking.fake.calls) == 3


@BOTH
@STREAMED
def test_thinking_in_tags_is_thinking_and_is_not_sent_back(
    thinking: Pair, path: str, stream: bool
) -> None:
    body = asking("go", tools=[tool(path)], stream=stream, **effort(path))
    for step in range(2):
        said = heard(thinking.post(path, body))
        assert (said.thinking, said.text) == (f"step {step}", "")
        body = answered(path, body, said, [f"result {step}"])
    said = heard(thinking.post(path, body))
    assert (said.thinking, said.text) == ("last", "done")
    assert thoughts(thinking.fake.calls[-1]) == []


@BOTH
def test_a_model_that_was_not_asked_to_think_shows_no_thoughts(thinking: Pair, path: str) -> None:
    said = heard(thinking.ask(path, "go", SONNET))
    assert (said.thinking, said.text) == ("", "done")


@pytest.mark.parametrize(
    "foreign",
    [
        {"type": "thinking", "thinking": "MARK", "signature": "ErcBEXAMPLE"},
        {"type": "thinking", "thinking": "MARK", "signature": ""},
        {"type": "thinking", "thinking": "MARK", "signature": "gw1.c.EXAMPLE"},
        {"type": "redacted_thinking", "data": "EmwKEXAMPLE"},
    ],
    ids=["Anthropic's", "none", "Copilot's", "redacted"],
)
def test_a_signature_of_another_maker_is_dropped(thinking: Pair, foreign: Json) -> None:
    content = [foreign, {"type": "text", "text": "hm"}]
    turns = [user("go"), {"role": "assistant", "content": content}, user("on")]
    body = {**asking("", OPUS), "messages": turns, **effort(MESSAGES)}
    assert heard(thinking.post(MESSAGES, body)).text == "done"
    assert thoughts(thinking.fake.calls[0]) == []
    assert "MARK" not in thinking.fake.calls[0].raw.decode()
    assert len(thinking.fake.calls) == 1


@BOTH
def test_a_signature_of_another_account_is_dropped(path: str) -> None:
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeKiro("google", brain=two_steps)) for _ in range(2)]
        config = config_for(fakes[0]).replace(
            "[network]", f'[providers.work]\ntype = "kiro"\napi_url = "{fakes[1].url}"\n[network]'
        )
        tokens = {"kiro": fakes[0].token_file(), "work": fakes[1].token_file()}
        gateway = stack.enter_context(Gateway(config, tokens=tokens))
        body = asking("go", OPUS, tools=[tool(path)], **effort(path))
        said = heard(gateway.request("POST", path, body))
        body = {**answered(path, body, said, ["r"]), "model": f"work/{OPUS}"}
        assert heard(gateway.request("POST", path, body)).calls
        assert [fake.violations for fake in fakes] == [[], []]
        assert thoughts(fakes[1].calls[-1]) == []


@BOTH
@STREAMED
def test_a_signature_that_is_refused_is_left_out_once(
    thinking: Pair, path: str, stream: bool
) -> None:
    body = asking("go", OPUS, tools=[tool(path)], stream=stream, **effort(path))
    body = answered(path, body, heard(thinking.post(path, body)), ["r"])
    thinking.fake.forget_signatures()
    said = heard(thinking.post(path, body))
    assert said.thinking == "step 1"
    assert [len(thoughts(call)) for call in thinking.fake.calls] == [0, 1, 0]
    thinking.fake.queue(refusal(400, "Invalid signature", "THINKING_SIGNATURE_INVALID"))
    thinking.fake.queue(refusal(400, "Invalid signature", "THINKING_SIGNATURE_INVALID"))
    reply = thinking.post(path, answered(path, body, said, ["r"]))
    assert reply.status == 400
    assert len(thinking.fake.calls) == 5


# ---- token life ----------------------------------------------------------------------------------

#: A file that tells it, as one does that this program has written.
MACHINE = {"machine_id": "0123456789abcdef" * 4}
SOON = pytest.mark.parametrize("left_s", [200, -10], ids=["soon", "past"])


@SOON
def test_twenty_requests_share_one_early_refresh(make: Make, left_s: int) -> None:
    pair = make(token={"expires_at": int(time.time()) + left_s})
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda n: pair.ask(CHAT, f"hi {n}"), range(20)))
    assert {reply.status for reply in replies} == {200}
    assert pair.fake.refreshes == 1
    assert len(pair.controls("ListAvailableModels")) == 1


def test_twenty_calls_with_a_stale_token_share_one_refresh(make: Make) -> None:
    pair = make()
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda n: pair.ask(MESSAGES, f"hi {n}"), range(20)))
    assert {reply.status for reply in replies} == {200}
    assert pair.fake.refreshes == 1


@BOTH
def test_a_refused_token_is_renewed_and_the_call_repeated_once(make: Make, path: str) -> None:
    pair = make("builder_id")
    heard(pair.ask(path, "hi"))
    pair.fake.expire_tokens()
    assert heard(pair.ask(path, "hi again", stream=True)).text
    assert (pair.fake.refreshes, len(pair.fake.calls)) == (1, 3)
    refused, repeated = pair.fake.calls[1:]
    assert repeated.body == refused.body
    for name in ("authorization", "amz-sdk-invocation-id"):
        assert repeated.headers[name] != refused.headers[name]


@pytest.mark.parametrize(
    ("kind", "path", "status", "name"),
    [
        ("google", CHAT, 403, "AccessDeniedException"),
        ("builder_id", MESSAGES, 403, "AccessDeniedException"),
        ("idc", CHAT, 403, "AccessDeniedException"),
        ("google", MESSAGES, 401, ""),
        ("google", MESSAGES, 401, "AccessDeniedException"),
        ("google", MESSAGES, 401, "UnauthorizedException"),
    ],
)
def test_a_lasting_refusal_makes_no_storm_of_refreshes(
    make: Make, kind: str, path: str, status: int, name: str
) -> None:
    pair = make(kind)
    for _ in range(60):
        said = BAD_TOKEN if status == 403 else "Unauthorized"
        pair.fake.queue(refusal(status, said, kind=name, strict=False))
    replies = [pair.ask(path, f"hi {n}") for n in range(4)]
    assert pair.fake.refreshes == 1
    assert len(pair.fake.calls) <= 16
    for reply in replies:
        assert reply.status == 503, reply
        assert reply.headers["x-should-retry"] == "false"
        assert "ign in" in error(reply)["message"]


def test_a_refresh_without_a_new_refresh_token_keeps_the_old_one(make: Make) -> None:
    pair = make(token={"expires_at": 0}, rotate=False)
    old = pair.saved()["refresh_token"]
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.saved()["refresh_token"] == old


@pytest.mark.parametrize("kind", ["builder_id", "google"])
def test_the_machine_stays_the_same_over_rotation_and_restart(make: Make, kind: str) -> None:
    pair = make(kind)
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    heard(pair.ask(CHAT, "hi"))
    assert pair.fake.refreshes == 1
    pair.gateway.stop()
    with Gateway(config_for(pair.fake), tokens={"kiro": pair.saved()}) as gateway:
        assert gateway.request("POST", CHAT, asking("hi")).status == 200
    machines = {
        re.search("KiroIDE-[0-9.]+-([0-9a-f]{64})$", seen.headers["user-agent"])
        for seen in pair.fake.calls
    }
    assert len({found[1] for found in machines if found}) == 1  # violations tell of changes too


@pytest.mark.parametrize("kind", ["builder_id", "google"])
def test_what_another_program_has_refreshed_is_noticed(make: Make, kind: str) -> None:
    pair = make(kind, token=MACHINE)
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    pair.replace_file({**pair.fake.refreshed_elsewhere(), **MACHINE})
    assert heard(pair.ask(CHAT, "hi again")).text
    assert pair.fake.refreshes == 0
    assert len(pair.fake.calls) == 2, "the old token was used once more"


def test_the_machine_stays_the_same_when_another_program_rewrites_the_file(make: Make) -> None:
    pair = make()
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    pair.replace_file(pair.fake.refreshed_elsewhere())
    assert heard(pair.ask(CHAT, "hi again")).text


@pytest.mark.parametrize("kind", ["builder_id", "google", "external_idp"])
def test_a_dead_refresh_token_is_looked_up_again_in_the_file(make: Make, kind: str) -> None:
    pair = make(kind, token={"expires_at": 0, **MACHINE})
    fake = pair.fake

    def elsewhere() -> None:
        fake.on_refresh = None
        pair.replace_file({**pair.saved(), **fake.refreshed_elsewhere()})

    fake.on_refresh = elsewhere
    assert heard(pair.ask(CHAT, "hi")).text
    assert fake.refreshes == 1
    assert len(fake.calls) == 1


@pytest.mark.parametrize(("kind", "path"), [("builder_id", CHAT), ("google", MESSAGES)])
def test_a_revoked_sign_in_is_told_without_hammering(make: Make, kind: str, path: str) -> None:
    pair = make(kind, token={"expires_at": 0, **MACHINE})
    pair.fake.revoke()
    for number in range(4):
        reply = pair.ask(path, f"{number}")
        assert reply.status == 503, reply
        assert reply.headers["x-should-retry"] == "false"
        assert "ign in" in error(reply)["message"]
    assert pair.fake.refreshes == 1
    assert pair.fake.calls == []
    # What was signed in anew is used at once.
    pair.replace_file({**pair.fake.token_file(), **MACHINE})
    assert heard(pair.ask(path, "hi")).text
    assert pair.fake.refreshes == 1


def test_a_sign_in_revoked_in_the_middle_is_told_without_hammering(make: Make) -> None:
    pair = make("builder_id", token=MACHINE)
    heard(pair.ask(CHAT, "hi"))
    pair.fake.expire_tokens()
    pair.fake.revoke()
    replies = [pair.ask(CHAT, f"{number}") for number in range(4)]
    assert {reply.status for reply in replies} == {503}
    assert {reply.headers.get("x-should-retry") for reply in replies} == {"false"}
    assert pair.fake.refreshes <= 2
    pair.replace_file({**pair.saved(), **pair.fake.token_file()})
    assert heard(pair.ask(CHAT, "hi")).text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refresh_that_fails_for_now_is_a_warning_while_the_token_lasts(
    make: Make, status: int
) -> None:
    pair = make("builder_id", token={"expires_at": int(time.time()) + 200})
    pair.fake.refresh_answers.extend(Answer(status, {}, b"oops", chunked=False) for _ in range(30))
    assert [pair.ask(CHAT, f"{n}").status for n in range(5)] == [200] * 5
    assert pair.fake.refreshes <= 3
    assert until(lambda: "WARNING token_refresh_failed" in pair.gateway.log())


def test_a_refresh_that_fails_for_now_does_not_end_the_sign_in(make: Make) -> None:
    pair, path = make(token={"expires_at": 0}), MESSAGES
    pair.fake.refresh_answers.append(Answer(500, {}, b"oops", chunked=False))
    reply = pair.ask(path, "hi")
    assert reply.status == 529
    assert "x-should-retry" not in reply.headers
    assert until(lambda: pair.ask(path, "hi").status == 200)
    assert pair.fake.refreshes == 2


@pytest.mark.parametrize(
    "body",
    [b"<html>EXAMPLE", b"{}", dump({"accessToken": "a\r\nb: c"})],
)
def test_a_refresh_answer_that_makes_no_sense_is_not_kept(make: Make, body: bytes) -> None:
    pair = make(token={"expires_at": 0})
    old = pair.saved()
    pair.fake.refresh_answers.append(Answer(200, {}, body, chunked=False))
    reply = pair.ask(CHAT, "hi")
    assert reply.status == 502
    assert "EXAMPLE" not in error(reply)["message"]
    assert pair.saved() == old


def test_a_folder_that_cannot_be_written_is_told_and_no_reason_to_stop(make: Make) -> None:
    pair = make(token={"expires_at": 0})
    pair.file.parent.chmod(0o500)
    if hasattr(resource, "prlimit"):  # a superuser may write everywhere, but not without limit
        resource.prlimit(pair.gateway.pid, resource.RLIMIT_FSIZE, (0, 0))
    elif os.geteuid() == 0:
        pytest.skip("a superuser may write everywhere")
    old = pair.saved()
    assert heard(pair.ask(CHAT, "hi")).text
    assert heard(pair.ask(MESSAGES, "hi", stream=True)).text
    assert pair.fake.refreshes == 1
    assert pair.saved() == old
    assert until(lambda: "ERROR token_not_saved" in pair.gateway.log())
    pair.file.parent.chmod(0o700)


@pytest.mark.parametrize("others", [0, 5])
def test_a_client_that_leaves_during_a_refresh_does_not_lose_the_new_token(
    make: Make, others: int
) -> None:
    pair = make(token={"expires_at": 0})
    reached, held = threading.Event(), threading.Event()
    old = pair.saved()["refresh_token"]

    def wait() -> None:
        pair.fake.on_refresh = None
        reached.set()
        held.wait(5)

    pair.fake.on_refresh = wait
    wire = pair.send(CHAT, asking("hi"))
    assert reached.wait(5)
    with ThreadPoolExecutor(others + 1) as pool:
        waiting = [pool.submit(pair.ask, MESSAGES, f"hi {n}") for n in range(others)]
        wire.abort()
        # The service gives out what nobody else can get again.
        until(lambda: "cancelled" in pair.gateway.log(), 0.5)
        held.set()
        assert until(lambda: pair.saved()["refresh_token"] != old, 3)
        assert all(heard(reply.result()).text for reply in waiting)
    assert heard(pair.ask(CHAT, "hi again")).text
    assert pair.fake.refreshes == 1


# ---- hosts and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dead", "ways"),
    [
        ("google", [RUNTIME], [(Q, "ide")]),
        ("google", [RUNTIME, Q], [(OLD, "ide")]),
        ("builder_id", [RUNTIME], [(Q, "ide")]),
        ("builder_id", [RUNTIME, Q], [(OLD, "ide")]),
        ("idc", [RUNTIME], [(Q, "ide"), (Q, "ide")]),
        ("external_idp", [RUNTIME, Q], [(OLD, "ide")]),
        ("api_key", [RUNTIME], [(OLD, "ide")]),
        ("api_key", [RUNTIME, OLD], [(Q, "ide")]),
    ],
)
def test_another_host_answers_and_is_remembered(
    make: Make, kind: str, dead: list[str], ways: list[tuple[str, str]]
) -> None:
    pair = make(kind, proxied=True, dead_hosts=set(dead))
    assert heard(pair.ask(CHAT, "hi")).text
    assert shapes(pair.fake)[-1] == ways[-1]
    assert len(pair.fake.calls) <= len(ways) + 1  # one refused profile, and one refresh for it
    assert pair.fake.connects.index(f"{dead[0]}:443") < len(pair.fake.connects)
    clear(pair.fake)
    pair.fake.connects.clear()
    assert heard(pair.ask(MESSAGES, "hi again", stream=True)).text
    assert shapes(pair.fake) == [ways[-1]]
    assert not {f"{host}:443" for host in dead} & set(pair.fake.connects)


def test_a_host_that_dies_later_is_left_for_another(make: Make) -> None:
    pair = make(proxied=True)
    assert heard(pair.ask(CHAT, "hi")).text
    pair.fake.dead_hosts = {RUNTIME}  # its open connections answer 503 from now on
    assert heard(pair.ask(CHAT, "hi again")).text
    assert heard(pair.ask(CHAT, "and again")).text
    assert [host for host, _ in shapes(pair.fake)] == [RUNTIME, RUNTIME, Q, Q]
    pair.fake.dead_hosts = {Q}
    assert heard(pair.ask(CHAT, "and back")).text
    assert shapes(pair.fake)[-1] == (RUNTIME, "ide")


def test_all_hosts_dead_is_told(make: Make) -> None:
    pair = make(proxied=True)
    assert heard(pair.ask(CHAT, "hi")).text
    pair.fake.dead_hosts = {RUNTIME, Q, OLD, MANAGEMENT}
    reply = pair.ask(CHAT, "hi again")
    assert reply.status in (502, 503)
    assert error(reply)["message"]
    pair.fake.dead_hosts = set()
    assert heard(pair.ask(CHAT, "back")).text


def test_a_profile_in_europe_is_asked_there(make: Make) -> None:
    pair = make(proxied=True, region="eu-central-1", token={"expires_at": 0})
    assert heard(pair.ask(CHAT, "hi")).text
    assert set(pair.models())
    assert {seen.via for seen in pair.fake.requests} == {
        "prod.us-east-1.auth.desktop.kiro.dev", "management.eu-central-1.kiro.dev",
        "runtime.eu-central-1.kiro.dev",
    }  # fmt: skip
    pair.fake.dead_hosts = {"runtime.eu-central-1.kiro.dev"}
    assert heard(pair.ask(CHAT, "hi again")).text
    assert pair.fake.calls[-1].via == "q.eu-central-1.amazonaws.com"


def test_a_sign_in_in_ireland_with_a_profile_in_america_is_asked_in_both(make: Make) -> None:
    pair = make("idc", proxied=True, token={"expires_at": 0})
    assert heard(pair.ask(CHAT, "hi")).text
    assert {seen.via for seen in pair.fake.requests} == {
        "oidc.eu-west-1.amazonaws.com", MANAGEMENT, RUNTIME,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "switches", "model"),
    [
        ("builder_id", {"needs_arn": True}, SONNET),
        ("builder_id", {"refuses_arn": True}, SONNET),
        ("builder_id", {"shapes": {"cli"}}, OPUS),
        ("idc", {"refuses_arn": True}, SONNET),
        ("google", {"needs_arn": True}, SONNET),
        ("api_key", {"shapes": {"ide"}}, SONNET),
    ],
)
def test_a_way_that_is_refused_leads_to_the_next_which_is_remembered(
    make: Make, kind: str, switches: Json, model: str
) -> None:
    pair = make(kind, proxied=True, token=MACHINE, **switches)
    assert heard(pair.ask(MESSAGES, "hi", model)).text
    assert pair.fake.refreshes <= 1
    assert len(pair.fake.calls) <= 5
    way = shapes(pair.fake)[-1]
    clear(pair.fake)
    assert heard(pair.ask(CHAT, "hi again", model, stream=True)).text
    assert shapes(pair.fake) == [way]


def test_a_token_that_is_refused_twice_leads_to_the_other_shape(make: Make) -> None:
    pair = make("builder_id", proxied=True, token=MACHINE)
    for _ in range(2):
        pair.fake.queue(refusal(403, BAD_TOKEN, None, "AccessDeniedException"))
    assert heard(pair.ask(MESSAGES, "hi")).text
    assert shapes(pair.fake) == [(RUNTIME, "ide"), (RUNTIME, "ide"), (RUNTIME, "cli")]
    assert [call.body.get("profileArn") for call in pair.fake.calls][1:] == [BUILDER_ARN, None]
    assert pair.fake.refreshes == 1
    assert heard(pair.ask(CHAT, "hi again")).text
    assert shapes(pair.fake)[3:] == [(RUNTIME, "cli")]


def test_a_social_sign_in_without_a_profile_uses_the_constant_until_it_is_told(make: Make) -> None:
    pair = make("google", token={"profile_arn": None})
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.calls[0].body["profileArn"] == SOCIAL_ARN
    pair.fake.expire_tokens()
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.calls[-1].body["profileArn"] == pair.fake.arn == pair.saved()["profile_arn"]


def test_a_builder_id_uses_the_constant_and_does_not_save_it(make: Make) -> None:
    pair = make("builder_id")
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.calls[0].body["profileArn"] == BUILDER_ARN
    assert pair.controls("ListAvailableProfiles") == []


@pytest.mark.parametrize(
    ("kind", "region"), [("idc", "us-east-1"), ("external_idp", "eu-central-1")]
)
def test_the_profile_of_an_organisation_is_found_and_saved(
    make: Make, kind: str, region: str
) -> None:
    pair = make(kind, proxied=True, region=region, token={"profile_arn": None, **MACHINE})
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: pair.ask(CHAT, f"hi {n}"), range(8)))
    assert {reply.status for reply in replies} == {200}
    assert pair.saved()["profile_arn"] == pair.fake.arn
    asked = pair.controls("ListAvailableProfiles")
    assert sorted(seen.via for seen in asked) == [
        "management.eu-central-1.kiro.dev", MANAGEMENT,
    ]  # fmt: skip
    assert {call.via for call in pair.fake.calls} == {f"runtime.{region}.kiro.dev"}


def test_several_profiles_are_named_until_one_is_set(make: Make) -> None:
    other = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLEOTHER"
    pair = make("idc", token={"profile_arn": None})
    name = "EXAMPLE two" + "o" * 100_000
    pair.fake.profiles.append({"arn": other, "profileName": name, "status": "ACTIVE"})
    for path in (CHAT, MESSAGES, CHAT):
        reply = pair.ask(path, "hi")
        assert reply.status == 503 and len(reply.body) < 2000
        assert reply.headers["x-should-retry"] == "false"
        for words in ("profile_arn", str(pair.fake.arn), other, "EXAMPLE two"):
            assert words in error(reply)["message"]
    assert pair.fake.calls == []
    assert len(pair.controls("ListAvailableProfiles")) <= 3
    assert "profile_arn" not in pair.saved()


def test_a_profile_that_is_set_decides(make: Make) -> None:
    arn = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLEIDC"
    pair = make("idc", kiro=f'profile_arn = "{arn}"\n', token={"profile_arn": None})
    other = arn.replace("EXAMPLEIDC", "EXAMPLEOTHER")
    pair.fake.profiles.append({"arn": other, "profileName": "EXAMPLE two", "status": "ACTIVE"})
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.fake.calls[0].body["profileArn"] == arn
    assert pair.controls("ListAvailableProfiles") == []


def test_profiles_that_cannot_be_listed_for_now_are_sought_again(make: Make) -> None:
    pair = make("idc", token={"profile_arn": None})
    for _ in range(9):
        pair.fake.profiles_answers.append(Answer(503, {}, b'{"message":"busy"}', chunked=False))
    reply = pair.ask(CHAT, "hi")
    assert reply.status >= 400
    pair.fake.violations.clear()  # the way without a profile may be tried meanwhile
    pair.fake.profiles_answers.clear()
    assert heard(pair.ask(CHAT, "hi")).text
    assert pair.saved()["profile_arn"] == pair.fake.arn


@pytest.mark.parametrize("status", [302, 308])
def test_a_redirect_is_not_followed_with_the_token(make: Make, status: int) -> None:
    with FakeKiro() as other:
        pair = make()
        for _ in range(9):
            pair.fake.queue(Answer(status, {"Location": f"{other.url}/x"}, b"", chunked=False))
        reply = pair.ask(CHAT, "hi")
        assert reply.status >= 400
        assert other.requests == []


@pytest.mark.parametrize(
    ("arn_region", "sso_region"),
    [("evil.example", "us-east-1"), ("us-east-1", "evil.example:80"), ("us-east-1@x", "us-east-1")],
)
def test_a_region_that_is_none_leads_nowhere(make: Make, arn_region: str, sso_region: str) -> None:
    arn = f"arn:aws:codewhisperer:{arn_region}:000000000000:profile/EXAMPLE"
    token = {"profile_arn": arn, "idc_region": sso_region, "expires_at": 0}
    pair = make("idc", proxied=True, token=token)
    pair.ask(CHAT, "hi")
    known = re.compile(r"(\w+\.)(us-east-1|eu-central-1|eu-west-1)\.(kiro\.dev|amazonaws\.com):443")
    assert all(known.fullmatch(target) for target in pair.fake.connects)
    pair.fake.violations.clear()  # of asking for such a profile, if that was done


# ---- refusals ------------------------------------------------------------------------------------

CHAT_TYPES = {
    400: ("invalid_request_error",), 403: ("invalid_request_error",),
    404: ("invalid_request_error",), 429: ("rate_limit_error", "insufficient_quota", "requests"),
    502: ("server_error",), 503: ("server_error",), 504: ("server_error",),
}  # fmt: skip
MESSAGES_TYPES = {
    400: ("invalid_request_error",), 403: ("permission_error",), 404: ("not_found_error",),
    429: ("rate_limit_error",), 502: ("api_error",), 503: ("api_error",), 504: ("timeout_error",),
    529: ("overloaded_error",),
}  # fmt: skip


def check_error(path: str, reply: Reply, status: int, code: str = "") -> Json:
    """The error of an answer with a status, in the words of the caller's vendor."""
    busy = status == 503 and path == MESSAGES and "x-should-retry" not in reply.headers
    assert reply.status == (529 if busy else status), reply
    found = error(reply)
    types = CHAT_TYPES if path == CHAT else MESSAGES_TYPES
    assert found["type"] in types[reply.status], found
    assert found["message"]
    if path == CHAT and code:
        assert found["code"] == code
    return found


#: (status, message, reason, exception) -> code for an OpenAI caller
RESTING: dict[str, tuple[tuple[int, str, str | None, str], str]] = {
    "402": ((402, "You have reached the limit.", "MONTHLY_REQUEST_COUNT",
             "ServiceQuotaExceededException"), "insufficient_quota"),
    "402, no reason": ((402, "", None, ""), "insufficient_quota"),
    "400": ((400, "You have reached the limit.", None, "ValidationException"),
            "insufficient_quota"),
    "429": ((429, "Too many", "MONTHLY_REQUEST_COUNT", "ThrottlingException"),
            "insufficient_quota"),
    "overage": ((402, "Overage", "OVERAGE_REQUEST_LIMIT_EXCEEDED",
                 "ServiceQuotaExceededException"), "insufficient_quota"),
    "day": ((429, "Slow down", "DAILY_REQUEST_COUNT", "ThrottlingException"), ""),
    "suspended, 403": ((
        403, "Your User ID (EXAMPLE) temporarily is suspended. We detected unusual user activity",
        "TEMPORARILY_SUSPENDED", "AccessDeniedException"), ""),
    "suspended, 403, no reason": ((
        403, "Your User ID (EXAMPLE) temporarily is suspended.", None, "AccessDeniedException"),
        ""),
    "suspended, 423": ((423, "locked", None, "AccountSuspendedException"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", RESTING)
def test_what_stays_is_told_after_one_attempt_and_comes_back_by_itself(
    make: Make, name: str
) -> None:
    said, code = RESTING[name]
    suspended = name.startswith("suspended")
    pair = make()
    heard(pair.ask(CHAT, "hi"))
    pair.fake.queue(refusal(*said, Retry_After="1"))
    for path, stream in ((CHAT, True), (MESSAGES, True), (MESSAGES, False)):
        reply = pair.ask(path, "hi", stream=stream)
        found = check_error(path, reply, 403 if suspended else 429, code)
        assert (said[1] or "credits").rstrip(".") in found["message"]
        assert "support" in found["message"] or not suspended
        assert reply.headers.get("x-should-retry") == "false" or suspended
        assert int(reply.headers.get("retry-after", "1")) <= 60
    assert (len(pair.fake.calls), pair.fake.refreshes) == (2, 0)
    if name in ("402", "suspended, 403"):
        assert until(lambda: pair.ask(CHAT, "hi").status == 200)


#: (status, message, reason, exception) -> (status, code) for the caller
FINAL: dict[str, tuple[tuple[int, str, str | None, str], tuple[int, str]]] = {
    "conversation": (
        (402, "x", "CONVERSATION_LIMIT_EXCEEDED", "ServiceQuotaExceededException"), (429, "")),
    "feature": (
        (403, "no", "FEATURE_NOT_SUPPORTED", "AccessDeniedException"), (403, "")),
    "form": ((400, "Improperly formed request.", None, "ValidationException"), (400, "")),
    "pairs, 500": ((500, "x", "TOOL_USE_RESULT_MISMATCH", "InternalServerException"), (400, "")),
    "tool": ((400, "x", "TOOL_SCHEMA_INVALID", "ValidationException"), (400, "")),
    "image": ((400, "x", "IMAGE_SIZE_EXCEEDED", "ValidationException"), (400, "")),
    "long": (
        (400, "Input is too long.", "CONTENT_LENGTH_EXCEEDS_THRESHOLD", "ValidationException"),
        (400, "context_length_exceeded")),
    "long, no reason": (
        (400, "Input is too long.", None, "ValidationException"), (400, "context_length_exceeded")),
    "prompt": ((400, "x", "PROMPT_TOO_LONG", "ValidationException"),
               (400, "context_length_exceeded")),
    "model": (
        (400, "Invalid model. Please select a different model to continue.", "INVALID_MODEL_ID",
         "ValidationException"), (404, "model_not_found")),
    "524": ((524, "", None, ""), (504, "")),
}  # fmt: skip


@pytest.mark.parametrize("name", FINAL)
@BOTH
@STREAMED
def test_what_cannot_be_helped_is_told_after_one_attempt(
    pair: Pair, path: str, stream: bool, name: str
) -> None:
    said, (status, code) = FINAL[name]
    for _ in range(4):
        pair.fake.queue(refusal(*said))
    refreshes = pair.fake.refreshes
    reply = pair.ask(path, f"hi {name}", stream=stream)
    found = check_error(path, reply, status, code)
    assert (len(pair.fake.calls), pair.fake.refreshes) == (1, refreshes)
    if name.startswith(("long", "prompt")):
        words = "maximum context length" if path == CHAT else "prompt is too long"
        assert words in found["message"]
    elif said[1] and said[1] != "x":
        assert said[1].rstrip(".") in found["message"]
    elif said[2]:
        assert said[2] in found["message"]


@BOTH
def test_the_service_s_request_id_is_told(pair: Pair, path: str) -> None:
    fields = {"x-amzn-RequestId": "0a1b2c3d-0000-4000-8000-00000000EXAM"}
    body = dump({"message": "Improperly formed request.", "reason": None})
    pair.fake.queue(Answer(400, fields, body, chunked=False))
    assert fields["x-amzn-RequestId"] in error(pair.ask(path, "hi"))["message"]


@pytest.mark.parametrize("form", ["Message", "errorMessage", "error", "__type", "text"])
def test_a_refusal_is_understood_in_every_form(pair: Pair, form: str) -> None:
    bodies = {
        "__type": dump({"__type": "com.amazon.aws.codewhisperer#ThrottlingException",
                        "Message": "x", "reason": "PROMPT_TOO_LONG"}),
        "text": b"Input is too long.",
    }  # fmt: skip
    body = bodies.get(form, dump({form: "Input is too long."}))
    pair.fake.queue(Answer(400, {"Content-Type": "text/plain"}, body, chunked=False))
    check_error(CHAT, pair.ask(CHAT, f"hi {form}"), 400, "context_length_exceeded")
    assert len(pair.fake.calls) == 1


@pytest.mark.parametrize(("trouble", "status"), [("suspended", 403), ("out_of_credits", 429)])
def test_an_account_in_trouble_is_neither_tried_again_nor_refreshed(
    make: Make, trouble: str, status: int
) -> None:
    pair = make("builder_id")
    heard(pair.ask(CHAT, "hi"))
    setattr(pair.fake, trouble, True)
    for path in (CHAT, MESSAGES):
        reply = pair.ask(path, "hi", stream=True)
        check_error(path, reply, status)
        assert int(reply.headers.get("retry-after", "1")) <= 60
    assert pair.fake.refreshes == 0
    assert len(pair.fake.calls) <= 3


PASSING: dict[str, tuple[int, str, str | None, str]] = {
    "rate": (429, "Too many requests, please wait before trying again.", None,
             "ThrottlingException"),
    "capacity, 429": (429, "x", "INSUFFICIENT_MODEL_CAPACITY", "ThrottlingException"),
    "capacity, 500": (500, "x", "INSUFFICIENT_MODEL_CAPACITY", "InternalServerException"),
    "load": (500, "Encountered unexpectedly high load when processing the request.", None,
             "InternalServerException"),
    "model": (500, "x", "MODEL_TEMPORARILY_UNAVAILABLE", "InternalServerException"),
    "500": (500, "Internal error", None, "InternalServerException"),
    "502": (502, "", None, ""),
    "503": (503, "", None, "ServiceUnavailableException"),
    "408": (408, "", None, ""),
}  # fmt: skip


@by_turns(PASSING)
def test_what_passes_is_tried_again(pair: Pair, path: str, name: str) -> None:
    pair.fake.queue(refusal(*PASSING[name], Retry_After="0"))
    assert heard(pair.ask(path, f"hi {name}", stream=True)).text
    first, second = pair.fake.calls
    assert first.body == second.body
    assert first.headers["amz-sdk-invocation-id"] != second.headers["amz-sdk-invocation-id"]


@pytest.mark.parametrize(
    ("name", "status"),
    [("capacity, 429", 503), ("load", 503), ("500", 502), ("503", 503)],
)
def test_what_does_not_pass_is_told_after_three_attempts(
    limited: Pair, name: str, status: int
) -> None:
    for _ in range(8):
        limited.fake.queue(refusal(*PASSING[name], Retry_After="0"))
    reply = limited.ask(MESSAGES, f"hi, thrice {name}")
    check_error(MESSAGES, reply, status)
    assert len(limited.fake.calls) == 3
    assert limited.fake.refreshes == 0


def test_limits_without_a_time_are_waited_for(pair: Pair) -> None:
    def timed(path: str, name: str) -> float:
        began = time.monotonic()
        assert heard(pair.ask(path, f"hi without {name}")).text
        return time.monotonic() - began

    names = ["rate", "load", "capacity, 429"]
    for name in names:
        pair.fake.queue(refusal(*PASSING[name]))
    with ThreadPoolExecutor(3) as pool:  # all waits at once
        took = list(pool.map(timed, (CHAT, MESSAGES, CHAT), names))
    assert min(took) >= 1.9
    assert len(pair.fake.calls) == 6


def test_a_time_as_a_date_is_understood(pair: Pair) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - 5))
    pair.fake.queue(refusal(*PASSING["rate"], Retry_After=date))
    began = time.monotonic()
    assert heard(pair.ask(CHAT, "hi, dated")).text
    assert time.monotonic() - began < 1.5


def test_a_rate_that_stays_is_told_and_the_account_rests_for_a_while(make: Make) -> None:
    pair, path = make(), MESSAGES
    for _ in range(3):
        pair.fake.queue(refusal(*PASSING["rate"], Retry_After="0"))
    reply = pair.ask(path, "hi")
    check_error(path, reply, 429)
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert len(pair.controls("getUsageLimits")) == 1  # spent credits look the same
    again = pair.ask(path, "hi", OPUS)
    assert (again.status, len(pair.fake.calls)) == (429, 3)
    assert until(lambda: pair.ask(path, "hi").status == 200)


@BOTH
def test_a_rate_that_stays_because_the_credits_are_spent_is_told_so(make: Make, path: str) -> None:
    pair = make()
    row = pair.fake.usage_limits["usageBreakdownList"][0]
    for part in (row, row["freeTrialInfo"], *row["bonuses"]):
        part["currentUsage"] = part["currentUsageWithPrecision"] = part["usageLimit"]
    for _ in range(3):
        pair.fake.queue(refusal(*PASSING["rate"], Retry_After="0"))
    reply = pair.ask(path, "hi", stream=True)
    found = check_error(path, reply, 429, "insufficient_quota")
    assert reply.headers["x-should-retry"] == "false"
    assert "1600" in found["message"]
    assert re.search(r"\d{4}-\d\d-\d\d", found["message"])


def test_a_limit_of_an_hour_rests_the_account_and_ends_by_itself(make: Make) -> None:
    pair = make()
    heard(pair.ask(CHAT, "hi"))
    said = "60-minute credit limit exceeded"
    pair.fake.queue(refusal(429, said, None, "ThrottlingException", Retry_After="1"))
    for path, model in ((CHAT, SONNET), (MESSAGES, OPUS)):
        reply = pair.ask(path, "hi", model)
        assert said in check_error(path, reply, 429)["message"]
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert len(pair.fake.calls) == 2
    assert until(lambda: pair.ask(CHAT, "hi").status == 200)


def test_a_long_limit_is_passed_on_with_a_time_that_no_client_hangs_for(make: Make) -> None:
    pair = make()
    pair.fake.queue(refusal(*PASSING["rate"], Retry_After="183600"))
    for path in (CHAT, MESSAGES):
        reply = pair.ask(path, "hi")
        check_error(path, reply, 429)
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert len(pair.fake.calls) == 1


def test_a_profile_that_is_wanted_is_told_of(make: Make) -> None:
    pair = make("google")
    for words in ("profileArn is required for this request.", "Invalid profileArn."):
        for _ in range(4):
            pair.fake.queue(refusal(400, words, None, "ValidationException"))
        reply = pair.ask(CHAT, words)
        assert reply.status in (400, 503)
        assert "rofile" in error(reply)["message"]
        assert "ign in" in error(reply)["message"]
        clear(pair.fake)
    assert pair.fake.refreshes == 0


@pytest.mark.parametrize("status", [404, 405])
@BOTH
def test_a_host_without_this_operation_is_a_502(pair: Pair, path: str, status: int) -> None:
    for _ in range(4):
        pair.fake.queue(refusal(status, "no", None, "UnknownOperationException"))
    check_error(path, pair.ask(path, "hi"), 502)
    assert pair.fake.refreshes == 0


@pytest.mark.parametrize(
    ("path", "status"), [(CHAT, 200), (MESSAGES, 400), (CHAT, 403), (MESSAGES, 500)]
)
def test_a_page_of_html_is_not_shown(pair: Pair, path: str, status: int) -> None:
    page = b"<!DOCTYPE html><html><body>EXAMPLEPAGE " + b"x" * 100_000 + b"</body></html>"
    for _ in range(8):
        fields = {"Content-Type": "text/html", "Retry-After": "0"}
        pair.fake.queue(Answer(status, fields, page, chunked=False))
    reply = pair.ask(path, f"hi {status}")
    assert reply.status >= 400
    assert "EXAMPLEPAGE" not in reply.text
    assert len(reply.text) < 2000


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"__type": "com.amazon#ThrottlingException", "message": "x",
                "reason": "INVALID_MODEL_ID"}, 404),
        (MESSAGES, {"Output": {"__type": "com.amazon#ValidationException", "message": "x"}}, 400),
        (CHAT, {"message": "Improperly formed request."}, 400),
        (MESSAGES, {"message": "EXAMPLE"}, 502),
    ],
)  # fmt: skip
def test_json_in_the_place_of_a_stream_is_an_error(
    pair: Pair, path: str, body: Json, status: int
) -> None:
    for _ in range(4):
        pair.fake.queue(Answer(200, {"Content-Type": "application/json"}, dump(body)))
    check_error(path, pair.ask(path, f"hi {status}", stream=path == CHAT), status)
    assert len(pair.fake.calls) <= 3


@BOTH
def test_a_reset_before_the_head_on_a_used_connection_is_repeated(pair: Pair, path: str) -> None:
    heard(pair.ask(path, "hi"))
    pair.fake.queue(Answer(0, then="reset"))
    assert heard(pair.ask(path, "hi again", stream=True)).text
    assert len(pair.fake.calls) == 3


def test_a_refused_form_names_the_rules_that_touched_it_and_no_content(make: Make) -> None:
    pair = make()
    heard(pair.ask(CHAT, "hi"))
    pair.fake.queue(refusal(400, "Improperly formed request.", None, "ValidationException"))
    turns = [{"role": "system", "content": "PROMPTMARK"},
             {"role": "assistant", "content": "ANSWERMARK"}, user("PROMPTMARK"),
             {"role": "assistant", "content": "ANSWERMARK"}]  # fmt: skip
    body = {**asking(""), "messages": turns, "tools": [tool(CHAT, "TOOLMARK." + "x" * 70)]}
    check_error(CHAT, pair.post(CHAT, body), 400)
    assert until(lambda: "conversation_refused" in pair.gateway.log())
    log = pair.gateway.log()
    (line,) = (row for row in log.splitlines() if "conversation_refused" in row)
    for rule in (
        "begin_and_end_with_user",
        "adapt_kiro_tools",
        "insert_preface",
    ):
        assert rule in line
    assert "MARK" not in log


def test_a_form_that_is_refused_for_its_size_is_told_as_too_long(make: Make) -> None:
    pair = make()
    pair.fake.queue(
        refusal(400, "Improperly formed request.", None, "ValidationException", strict=False)
    )
    reply = pair.ask(MESSAGES, "word " * 200_000)
    assert "prompt is too long" in check_error(MESSAGES, reply, 400)["message"]
    assert "prompt is too long" in error(pair.ask(MESSAGES, "word " * 400_000))["message"]
    assert len(pair.fake.calls) == 1


# ---- broken streams ------------------------------------------------------------------------------

FIRST: dict[str, tuple[bytes, int]] = {
    "internal": (exception_frame("InternalServerException", {"message": "boom"}), 200),
    "error": (error_frame("InternalServerException", "boom"), 200),
    "the modelled error": (exception_frame("error", {"message": "boom"}), 200),
    "form": (exception_frame("ValidationException", {"message": "Improperly formed request."}),
             400),
    "long": (exception_frame("ContentLengthExceededException", {"message": "x"}), 400),
    "feature": (exception_frame("AccessDeniedException", {
        "message": "x", "reason": "FEATURE_NOT_SUPPORTED"}), 403),
    "model": (exception_frame("ValidationException", {
        "message": "x", "reason": "INVALID_MODEL_ID"}), 404),
}  # fmt: skip


@by_turns(FIRST)
def test_an_exception_in_the_place_of_an_answer_is_mended_or_becomes_a_status(
    pair: Pair, path: str, name: str
) -> None:
    data, status = FIRST[name]
    pair.fake.queue(streaming(OPENING, data))
    reply = pair.ask(path, f"hi {name}", stream=path == CHAT)
    if status == 200:
        assert heard(reply).text.startswith("Hello")
    else:
        check_error(path, reply, status)
    assert len(pair.fake.calls) == (2 if status == 200 else 1)


@pytest.mark.parametrize(
    ("path", "reason", "status"),
    [(CHAT, "MONTHLY_REQUEST_COUNT", 429), (MESSAGES, "TEMPORARILY_SUSPENDED", 403)],
)
def test_an_end_of_the_account_in_the_place_of_an_answer_is_told_once(
    make: Make, path: str, reason: str, status: int
) -> None:
    pair = make()
    said = {"message": "x", "reason": reason}
    pair.fake.queue(streaming(OPENING, exception_frame("ThrottlingException", said)))
    check_error(path, pair.ask(path, "hi", stream=True), status)
    assert (len(pair.fake.calls), pair.fake.refreshes) == (1, 0)


def test_an_overload_in_the_place_of_an_answer_is_waited_for(pair: Pair) -> None:
    reason = {"message": "Too many requests", "reason": "INSUFFICIENT_MODEL_CAPACITY"}
    pair.fake.queue(streaming(exception_frame("ThrottlingException", reason)))
    pair.fake.queue(streaming(frame("modelTemporarilyUnavailableEvent", {"message": "x"})))
    with ThreadPoolExecutor(2) as pool:  # both waits at once
        replies = list(pool.map(lambda path: pair.ask(path, "hi", stream=True), (CHAT, MESSAGES)))
    assert all(heard(reply).text.startswith("Hello") for reply in replies)
    assert len(pair.fake.calls) == 4


@EITHER
def test_an_empty_answer_is_asked_for_once_more(pair: Pair, path: str, stream: bool) -> None:
    pair.fake.queue(streaming(OPENING, CLOSING))
    assert heard(pair.ask(path, "hi", stream=stream)).text
    assert len(pair.fake.calls) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, b""), (MESSAGES, OPENING + CLOSING), (CHAT, text("  \n") + CLOSING)],
    ids=["nothing", "no words", "white space"],
)
def test_an_answer_that_stays_empty_is_told_or_passed_on(
    pair: Pair, path: str, body: bytes
) -> None:
    for _ in range(4):
        pair.fake.queue(streaming(body))
    reply = pair.ask(path, f"hi {len(body)}")
    assert reply.status in (200, 502)
    if reply.status == 200:
        assert heard(reply).text.strip() == ""
    assert len(pair.fake.calls) == 2


def flipped(data: bytes, at: int) -> bytes:
    """`data` with one bit wrong."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BROKEN: dict[str, tuple[list[bytes], Json]] = {
    "exception": ([exception_frame("InternalServerException", {"message": "boom"})], {}),
    "throttled": ([exception_frame("ThrottlingException", {"message": "Too many requests"})], {}),
    "error": ([error_frame("InternalServerException", "boom")], {}),
    "state": ([frame("invalidStateEvent", {"reason": "INVALID_TASK_ASSIST_PLAN",
                                           "message": "x"})], {}),
    "unavailable": ([frame("modelUnavailableEvent", {"message": "x"})], {}),
    "cut in a frame": ([text("two ")[:-3]], {}),
    "cut in a chunk": ([chunk(text("two "))[:-9]], {"framed": True, "then": "close"}),
    "no last chunk": ([text("two ")], {"then": "close"}),
    "reset": ([text("two ")], {"then": "reset"}),
    "a wrong checksum": ([flipped(text("two "), -6), *WHOLE[3:]], {}),
    "a wrong prelude": ([flipped(text("two "), 9), *WHOLE[3:]], {}),
    "a wrong length": ([b"\0\0\0\x0f" + text("two ")[4:], *WHOLE[3:]], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@BOTH
@STREAMED
def test_a_stream_that_breaks_after_words_never_looks_finished(
    limited: Pair, path: str, stream: bool, name: str
) -> None:
    pieces, how = BROKEN[name]
    begun = [OPENING + text("one ")]
    begun = [chunk(piece) for piece in begun] if how.get("framed") else begun
    limited.fake.queue(streaming(*begun, *pieces, **how))
    reply = limited.ask(path, f"hi {name}", stream=stream)
    if stream:
        assert reply.status == 200
        found = stream_error(reply.body)
        assert b"one " in reply.body
    else:
        assert reply.status in (400, 429, 502, 503, 529), reply
        found = error(reply)
    assert found["message"]
    assert len(limited.fake.calls) == 1


@pytest.mark.parametrize("name", ["cut in a frame", "a wrong checksum", "a wrong prelude", "reset",
                                  "no last chunk"])  # fmt: skip
def test_a_stream_that_breaks_before_any_word_is_asked_for_again(pair: Pair, name: str) -> None:
    pieces, how = BROKEN[name]
    first = [] if name in ("reset", "no last chunk") else pieces[:1]
    pair.fake.queue(streaming(OPENING, *first, **how))
    path = MESSAGES if "wrong" in name else CHAT
    said = heard(pair.ask(path, f"hi {name}", stream="cut" not in name))
    assert said.text.startswith("Hello")
    assert len(pair.fake.calls) == 2


@BOTH
@STREAMED
def test_a_call_that_is_cut_short_is_not_one(pair: Pair, path: str, stream: bool) -> None:
    named = {"toolUseId": "tooluse_1", "name": "look"}
    pieces = [text("hm "), frame("toolUseEvent", named),
              frame("toolUseEvent", {**named, "input": '{"path": "exa'}), CLOSING]  # fmt: skip
    pair.fake.queue(streaming(*pieces))
    reply = pair.post(path, asking("call the tool", tools=[tool(path)], stream=stream))
    assert reply.status == 200
    finish = "length" if path == CHAT else "max_tokens"
    assert f'"{finish}"' in reply.text
    assert "tool_calls" not in [row.get("finish_reason") for row in choices_of(reply)]
    assert '"tool_use","stop_sequence' not in reply.text


def choices_of(reply: Reply) -> list[Json]:
    """The choices of a chat answer, whole or streamed."""
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    rows = frames(reply.body) if streamed else [reply.json()]
    return [choice for row in rows for choice in row.get("choices", ())]


@BOTH
@STREAMED
@pytest.mark.parametrize("size", [1, 7, 100_000], ids=["by bytes", "by sevens", "at once"])
def test_a_stream_is_understood_wherever_it_is_cut(
    pair: Pair, path: str, stream: bool, size: int
) -> None:
    words = [
        "caf\N{LATIN SMALL LETTER E WITH ACUTE} ",
        "\N{GRINNING FACE}",
        "\N{GRINNING FACE}",
        "\n",
    ]
    named = {"toolUseId": "tooluse_1", "name": "look"}
    body = OPENING + b"".join(map(text, words))
    body += frame("toolUseEvent", named) + frame("toolUseEvent", {**named, "input": '{"path": "x'})
    body += frame("toolUseEvent", {"toolUseId": "tooluse_1", "input": '"}', "stop": True}) + CLOSING
    pair.fake.queue(streaming(*drip(body, size)))
    said = heard(pair.post(path, asking("hi", tools=[tool(path)], stream=stream)))
    assert said.text == "".join(words)
    assert said.calls == [("tooluse_1", "look", {"path": "x"})]


@pytest.mark.parametrize(
    ("reason", "chat", "messages"),
    [
        ("MAX_TOKENS", "length", "max_tokens"),
        ("CONTENT_FILTERED", "content_filter", "refusal"),
        ("MODEL_CONTEXT_WINDOW_EXCEEDED", "length", "model_context_window_exceeded"),
        ("PAUSE_TURN", "stop", "pause_turn"),
        ("STOP_SEQUENCE", "stop", "end_turn"),
        ("TOOL_USE", "stop", "end_turn"),
        ("UNKNOWN", "stop", "end_turn"),
    ],
)
@STREAMED
def test_the_reason_to_stop_is_told_in_the_caller_s_words(
    pair: Pair, stream: bool, reason: str, chat: str, messages: str
) -> None:
    for path, finish in ((CHAT, chat), (MESSAGES, messages)):
        pair.fake.queue(streaming(text("one "), frame("metadataEvent", {"stopReason": reason})))
        assert heard(pair.ask(path, f"hi {reason}", stream=stream)).finish == finish


# ---- clients that leave --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("moment", ["head", "first event", "middle", "whole"])
def test_the_upstream_is_left_when_the_client_leaves(pair: Pair, path: str, moment: str) -> None:
    held = threading.Event()
    pair.fake.queue({
        "head": Answer(0, {}, [b"", b"x"], pause=held),
        "first event": streaming(OPENING, *WHOLE, pause=held),
        "middle": streaming(OPENING + text("one "), *WHOLE, pause=held),
        "whole": streaming(OPENING + text("one "), *WHOLE, pause=held),
    }[moment])  # fmt: skip
    wire = pair.send(path, asking("hi", stream=moment != "whole"))
    assert pair.fake.wait_calls(1)
    if moment == "middle":
        wire.read_until(b"one")
    wire.abort()
    assert pair.fake.wait_cancelled(2)
    assert len(pair.fake.calls) == 1


def test_a_client_that_leaves_while_a_limit_is_waited_for_costs_no_second_call(pair: Pair) -> None:
    pair.fake.queue(refusal(*PASSING["rate"], Retry_After="0.5"))
    wire = pair.send(CHAT, asking("hi"))
    assert pair.fake.wait_calls(1)
    wire.abort()
    assert not pair.fake.wait_calls(2, 1)


@pytest.mark.parametrize(("limit", "path"), [("first_byte_seconds", CHAT),
                                             ("stream_idle_seconds", MESSAGES)])  # fmt: skip
def test_an_upstream_that_falls_silent_is_a_timeout(make: Make, limit: str, path: str) -> None:
    pair = make(network=f"{limit} = 0.3\n")
    some = [] if limit.startswith("first") else [OPENING + text("one ")]
    pair.fake.queue(streaming(*some, then="hang") if some else Answer(0, then="hang"))
    reply = pair.ask(path, "hi")
    check_error(path, reply, 504)
    assert pair.fake.wait_cancelled(2)
    if some:
        pair.fake.queue(streaming(*some, then="hang"))
        assert stream_error(pair.ask(path, "hi", stream=True).body)["type"] == "timeout_error"


def test_another_provider_does_not_wait_for_a_sign_in(make: Make) -> None:
    path = CHAT
    pair = make(token={"expires_at": 0})
    pair.fake.refresh_answers.extend(Answer(0, then="hang") for _ in range(3))
    body = {**asking("hi"), "model": "echo/echo"}
    reply = pair.gateway.request("POST", path, body, seconds=4)
    assert heard(reply).text == "[echo] hi"
    wire = pair.send(path, asking("hi"))
    assert pair.fake.wait_until(lambda: len(pair.fake.requests) == 1)
    wire.abort()
    pair.gateway.terminate()
    assert pair.gateway.wait(5) == 0


# ---- secrets -------------------------------------------------------------------------------------


def secret_brain(body: Json) -> list[Part]:
    """Says what nobody but the caller may read."""
    state = body["conversationState"]
    if results_of(state["currentMessage"]["userInputMessage"]):
        return [Think("ANSWERMARK"), Say("ANSWERMARK done")]
    return [Think("ANSWERMARK"), Say("ANSWERMARK"), Call("look", {"path": "ARGUMENTMARK"})]


def test_no_secret_and_no_word_is_ever_logged_or_told(make: Make) -> None:
    pair = make("builder_id", brain=secret_brain, token=MACHINE)
    fake = pair.fake
    for path in (CHAT, MESSAGES):
        body = asking("PROMPTMARK", OPUS, tools=[tool(path)], stream=True, **effort(path))
        said = heard(pair.post(path, body))
        assert heard(pair.post(path, answered(path, body, said, ["PROMPTMARK"]))).text
    held = pair.saved()
    secrets = [held[name] for name in ("access_token", "refresh_token", "client_secret")]
    why = f"no: Bearer {secrets[0]} and {secrets[1]}"
    told = [pair.gateway.request("GET", "/v1/models"), pair.gateway.request("GET", "/v1/usage")]
    for status in (400, 404, 413, 500):
        for _ in range(4):
            fake.queue(refusal(status, why, Retry_After="0", strict=False))
        told.append(pair.ask(CHAT, "PROMPTMARK"))
        fake._queue.clear()  # noqa: SLF001 - what was not tried again
    exception = exception_frame("ValidationException", {"message": why})
    fake.queue(streaming(text("x "), exception))
    told.append(pair.ask(CHAT, "PROMPTMARK", stream=True))
    fake.queue(streaming(text("x "), error_frame("InternalServerException", why)))
    told.append(pair.ask(MESSAGES, "PROMPTMARK"))
    fake.queue(streaming(text("ANSWERMARK"), flipped(text("ANSWERMARK"), -6)))
    told.append(pair.ask(CHAT, "PROMPTMARK"))
    told.append(pair.gateway.request("POST", CHAT, b'{"model":"PROMPTMARK'))
    fake.queue(refusal(402, why, Retry_After="1", strict=False))
    told.append(pair.ask(CHAT, "PROMPTMARK"))
    assert until(lambda: pair.ask(CHAT, "PROMPTMARK").status == 200)
    pair.fake.expire_tokens()
    ended = dump({"error": "invalid_grant", "error_description": why})
    fake.refresh_answers.append(Answer(400, {}, ended, chunked=False))
    told.append(pair.ask(CHAT, "PROMPTMARK"))
    assert told[-1].status == 503
    pair.replace_file({**held, **fake.token_file()})
    secrets.append(pair.saved()["access_token"])
    spent = refusal(429, why, None, "ThrottlingException", Retry_After="0", strict=False)
    for _ in range(3):
        fake.queue(spent)
    told.append(pair.ask(MESSAGES, "PROMPTMARK"))  # asks for what is left, which names the user
    assert pair.controls("getUsageLimits")
    marks = ["PROMPTMARK", "ANSWERMARK", "ARGUMENTMARK", *secrets, "user@example.org"]
    marks += [secret[:40] for secret in secrets]
    places = {"log": pair.gateway.log(), "stdout": pair.gateway.stdout()}
    places |= {f"answer {at}": reply.text for at, reply in enumerate(told)}
    assert len(places["log"].splitlines()) > 20
    leaks = {(name, mark) for name, place in places.items() for mark in marks if mark in place}
    assert not leaks
