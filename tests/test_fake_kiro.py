"""The imitation of Kiro keeps its own rules: what it accepts, refuses, puts on the wire."""

from __future__ import annotations

import base64
import copy
import hashlib
import http.client
import json
import platform
import socket
import ssl
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pytest
from fake_kiro import (
    BUILDER_ARN,
    CA_FILE,
    SOCIAL_ARN,
    Answer,
    Call,
    FakeKiro,
    Json,
    Say,
    Stop,
    Think,
    error_frame,
    exception_frame,
    frame,
    message,
)

MACHINE = hashlib.sha256(b"EXAMPLE").hexdigest()
IDE = f"KiroIDE-1.1.14-{MACHINE}"
LONG = "aws-sdk-js/1.0.34 ua/2.1 os/linux#6.8.0 lang/js md/nodejs#22.22.0 api/codewhisperer"
CLI = "aws-sdk-rust/1.3.15 ua/2.1 os/linux lang/rust/1.92.0 m/F app/AmazonQ-For-CLI"
TARGET = "AmazonCodeWhispererStreamingService.GenerateAssistantResponse"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
SCHEMA: Json = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
SONNET = "claude-sonnet-4.5"


@pytest.fixture
def fake() -> Iterator[FakeKiro]:
    with FakeKiro("google") as running:
        yield running


class Client:
    """A well-behaved client of the imitation: holds a token file, sends the right headers."""

    def __init__(self, fake: FakeKiro, host: str = "") -> None:
        self.fake = fake
        #: Asked through the proxy, when not "".
        self.host = host
        self.file = fake.token_file()

    def headers(self, plane: str, **changes: str | None) -> dict[str, str]:
        """The right headers; `changes` name them with underscores, None leaves one out."""
        kinds = {"api_key": "API_KEY", "external_idp": "EXTERNAL_IDP"}
        full: dict[str, str | None] = {
            "Authorization": f"Bearer {self.file['access_token']}",
            "TokenType": kinds.get(self.fake.kind),
            "amz-sdk-request": "attempt=1; max=3",
            "amz-sdk-invocation-id": str(uuid.uuid4()),
        }
        if plane == "cli":
            full |= {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": TARGET,
                     "Accept": "*/*", "User-Agent": CLI, "x-amz-user-agent": CLI}  # fmt: skip
        elif plane == "ide":
            full |= {"Content-Type": "application/json", "x-amzn-kiro-agent-mode": "vibe",
                     "Accept": "application/vnd.amazon.eventstream",
                     "User-Agent": f"{LONG}streaming#1.0.34 m/E {IDE}",
                     "x-amz-user-agent": f"aws-sdk-js/1.0.34 {IDE}"}  # fmt: skip
        else:
            full |= {"Accept": "application/json", "Content-Type": "application/json",
                     "User-Agent": f"{LONG}runtime#1.0.0 m/N,E {IDE}",
                     "x-amz-user-agent": f"aws-sdk-js/1.0.0 {IDE}"}  # fmt: skip
        if plane != "control":
            full["x-amzn-codewhisperer-optout"] = "true"
        full |= {name.replace("_", "-"): value for name, value in changes.items()}
        lower = {name.lower(): value for name, value in full.items()}
        return {name: value for name, value in lower.items() if value is not None}

    def open(self) -> http.client.HTTPConnection:
        if not self.host:
            return http.client.HTTPConnection(self.fake.host, timeout=5)
        context = ssl.create_default_context(cafile=CA_FILE)
        proxy = urlsplit(self.fake.proxy_url)
        assert proxy.hostname
        tunnel = http.client.HTTPSConnection(proxy.hostname, proxy.port, timeout=5, context=context)
        tunnel.set_tunnel(self.host, 443)
        return tunnel

    def send(
        self, method: str, path: str, headers: dict[str, str], raw: bytes | None = None
    ) -> tuple[int, bytes]:
        """(status, body) of one request on its own connection."""
        connection = self.open()
        try:
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def call(
        self, body: Json | bytes, plane: str = "ide", **changes: str | None
    ) -> tuple[int, Any]:
        """(status, events or error) of a model call."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = "/generateAssistantResponse" if plane == "ide" else "/"
        status, got = self.send("POST", path, self.headers(plane, **changes), raw)
        return status, read_stream(got) if status == 200 else json.loads(got)

    def get(self, path: str, **query: str | None) -> tuple[int, Any]:
        asked = urlencode({"origin": "AI_EDITOR"} | {k: v for k, v in query.items() if v})
        headers = self.headers("control", Content_Type=None)
        status, got = self.send("GET", f"{path}?{asked}", headers)
        return status, json.loads(got)

    def post(self, path: str, fields: Json, **headers: str) -> tuple[int, Any]:
        """A request to a sign-in service."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        told = {"Content-Type": "application/json", "Accept": "application/json",
                "User-Agent": IDE, **named}  # fmt: skip
        form = told["Content-Type"].endswith("urlencoded")
        raw = urlencode(fields) if form else json.dumps(fields)
        status, got = self.send("POST", path, told, raw.encode())
        return status, json.loads(got)

    def refresh(self, path: str = "/refreshToken") -> tuple[int, Any]:
        if path == "/refreshToken":
            return self.post(path, {"refreshToken": self.file["refresh_token"]})
        client = {"clientId": self.file["client_id"], "clientSecret": self.file["client_secret"]}
        return self.post(path, {**client, "refreshToken": self.file["refresh_token"],
                                "grantType": "refresh_token"})  # fmt: skip

    def body(self, content: str = "hi", plane: str = "ide", **more: Any) -> Json:
        """A right body; `model`, `history`, `tools`, `results`, `images`, `fields` by name."""
        origin = "AI_EDITOR" if plane == "ide" else "KIRO_CLI"
        model = more.get("model", SONNET)
        user: Json = {"content": content, "modelId": model, "origin": origin}
        context = {"tools": more.get("tools"), "toolResults": more.get("results")}
        if context := {name: value for name, value in context.items() if value is not None}:
            user["userInputMessageContext"] = context
        if "images" in more:
            user["images"] = more["images"]
        state: Json = {
            "chatTriggerType": "MANUAL", "agentTaskType": "vibe",
            "conversationId": str(uuid.uuid4()), "currentMessage": {"userInputMessage": user},
        }  # fmt: skip
        if "history" in more:
            state["history"] = [
                {"userInputMessage": {"modelId": model, "origin": origin, **turn}}
                if at % 2 == 0
                else {"assistantResponseMessage": turn}
                for at, turn in enumerate(more["history"])
            ]
        body: Json = {"conversationState": state}
        if "profile_arn" in self.file:
            body["profileArn"] = self.file["profile_arn"]
        if "fields" in more:
            body["additionalModelRequestFields"] = more["fields"]
        return body


@pytest.fixture
def client(fake: FakeKiro) -> Client:
    return Client(fake)


def read_stream(data: bytes) -> list[tuple[str, Json]]:
    """(event type, payload) of every message, its checksums compared."""
    found, start = [], 0
    while start < len(data):
        total, length, prelude = struct.unpack(">III", data[start : start + 12])
        one = data[start : start + total]
        assert prelude == zlib.crc32(one[:8])
        start += total
        assert struct.unpack(">I", one[-4:])[0] == zlib.crc32(one[:-4])
        at, headers = 12, {}
        while at < 12 + length:
            name_end = at + 1 + one[at]
            name, kind, size = one[at + 1 : name_end].decode(), one[name_end], one[name_end + 1 :]
            assert kind == 7
            length_of = struct.unpack(">H", size[:2])[0]
            headers[name] = size[2 : 2 + length_of].decode()
            at = name_end + 3 + length_of
        found.append((headers[":event-type"], json.loads(one[12 + length : -4])))
    return found


def text_of(events: list[tuple[str, Json]]) -> str:
    return "".join(p["content"] for kind, p in events if kind == "assistantResponseEvent")


def thoughts_of(events: list[tuple[str, Json]]) -> tuple[str, str]:
    """(text, signature) of the native thoughts."""
    told = [payload for kind, payload in events if kind == "reasoningContentEvent"]
    return tuple("".join(p.get(key, "") for p in told) for key in ("text", "signature"))  # type: ignore[return-value]


def calls_of(events: list[tuple[str, Json]]) -> dict[str, tuple[str, Json]]:
    """id -> (name, input)."""
    inputs: dict[str, str] = {}
    names: dict[str, str] = {}
    for kind, payload in events:
        if kind == "toolUseEvent":
            use = payload["toolUseId"]
            inputs[use] = inputs.get(use, "") + payload.get("input", "")
            names[use] = payload.get("name") or names[use]
    return {use: (names[use], json.loads(inputs[use] or "{}")) for use in inputs}


def tool(name: str = "read", schema: Json | None = None, description: str = "Reads.") -> Json:
    inside = {"json": SCHEMA if schema is None else schema}
    return {"toolSpecification": {"name": name, "description": description, "inputSchema": inside}}


def use(name: str = "read", number: int = 1) -> Json:
    return {"toolUseId": f"tooluse_{number}", "name": name, "input": {}}


def result(number: int = 1, text: str = "done") -> Json:
    return {"toolUseId": f"tooluse_{number}", "status": "success", "content": [{"text": text}]}


def called(*uses: Json, content: str = "") -> list[Json]:
    return [{"content": "q"}, {"content": content, "toolUses": list(uses)}]


def image(data: str = PNG, kind: str = "png") -> Json:
    return {"format": kind, "source": {"bytes": data}}


# ---- The event stream ----------------------------------------------------------------------------

VECTORS = {
    "000000100000000005c248eb7d98c8ff": message({}, b""),
    "0000002d0000001041c424b80a6576656e742d74797065040000a00c7b27666f6f273a27626172277d36f480a0":
        message({"event-type": 40972}, b"{'foo':'bar'}"),
    "0000007f0000005c7c7db5a80b3a6576656e742d74797065070016617373697374616e74526573706f6e73654576656e"
    "740d3a636f6e74656e742d747970650700106170706c69636174696f6e2f6a736f6e0d3a6d6573736167652d74797065"
    "0700056576656e747b22636f6e74656e74223a2248656c6c6f227d9b5d0635":
        frame("assistantResponseEvent", {"content": "Hello"}),
    "000000b700000061fd705aa30f3a657863657074696f6e2d747970650700135468726f74746c696e674578636570746"
    "96f6e0d3a636f6e74656e742d747970650700106170706c69636174696f6e2f6a736f6e0d3a6d6573736167652d7479"
    "7065070009657863657074696f6e7b226d657373616765223a22546f6f206d616e79207265717565737473222c22726"
    "561736f6e223a22494e53554646494349454e545f4d4f44454c5f4341504143495459227dafdabf94":
        exception_frame("ThrottlingException", {"message": "Too many requests",
                                                "reason": "INSUFFICIENT_MODEL_CAPACITY"}),
    "000000620000005203b5cb9c0b3a6572726f722d636f6465070017496e7465726e616c536572766572457863657074"
    "696f6e0e3a6572726f722d6d657373616765070004626f6f6d0d3a6d6573736167652d747970650700056572726f72"
    "5d35df69":
        error_frame("InternalServerException", "boom"),
    "0000005f0000004e4e05ebe4017400016601016202ff017303fffe01690400010000016c0500000100000000000179"
    "06000200ff017a07000368c3a90164080000018bcfe5680001750900112233445566778899aabbccddeeff78d9afc877":
        message({"t": True, "f": False, "b": (2, -1), "s": (3, -2), "i": 65536, "l": (5, 2**40),
                 "y": b"\x00\xff", "z": "hé", "d": (8, 1700000000000),
                 "u": uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")}, b"x"),
}  # fmt: skip


@pytest.mark.parametrize("expected", VECTORS)
def test_messages_are_those_of_the_official_codec(expected: str) -> None:
    assert VECTORS[expected].hex() == expected


# ---- What it accepts and how it answers ----------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["builder_id", "idc", "google", "github", "external_idp", "api_key"]
)
@pytest.mark.parametrize("plane", ["ide", "cli"])
def test_every_kind_of_account_is_answered_in_both_shapes(kind: str, plane: str) -> None:
    with FakeKiro(kind) as fake:
        client = Client(fake)
        asked = client.body("good day", plane)
        if kind == "builder_id" and plane == "ide":
            asked["profileArn"] = BUILDER_ARN
        status, events = client.call(asked, plane)
        assert status == 200, events
        assert text_of(events) == f"Hello from {SONNET}. You said: good day"
        kinds = [kind for kind, _ in events]
        assert (kinds[0] == "initial-response") == (plane == "cli")
        assert kinds[-4:-1] == ["contextUsageEvent", "meteringEvent", "meteringEvent"]
        assert events[-1][1]["stopReason"] == "END_TURN"
        assert fake.violations == []


def test_two_tools_are_called_and_their_results_told(fake: FakeKiro, client: Client) -> None:
    tools = [tool("a"), tool("b")]
    _, events = client.call(client.body("call two tools", tools=tools))
    calls = calls_of(events)
    assert list(calls.values()) == [("a", {"path": "example"}), ("b", {"path": "example"})]
    assert dict(events)["metadataEvent"]["stopReason"] == "TOOL_USE"
    uses = [{"toolUseId": i, "name": n, "input": told} for i, (n, told) in calls.items()]
    results = [
        {"toolUseId": i, "content": [{"text": f"result {n}"}]} for i, (n, _) in calls.items()
    ]
    asked = client.body("", tools=tools, results=results, history=called(*uses))
    assert text_of(client.call(asked)[1]) == "The tool said: result a and result b"
    assert fake.violations == []


def test_a_call_without_arguments_has_no_input_and_a_stop_frame(client: Client) -> None:
    asked = client.body("call the tool", tools=[tool(schema={"type": "object", "properties": {}})])
    frames = [payload for kind, payload in client.call(asked)[1] if kind == "toolUseEvent"]
    assert len(frames) == 2 and frames[1]["stop"] is True
    assert not any("input" in payload for payload in frames)


ADAPTIVE: Json = {"thinking": {"type": "adaptive", "display": "summarized"}}


def test_a_native_thought_comes_back_only_as_it_was_given(fake: FakeKiro, client: Client) -> None:
    more: Json = {"model": "claude-opus-4.8", "fields": ADAPTIVE}
    _, events = client.call(client.body(**more))
    text, signature = thoughts_of(events)
    assert text == "Let me think about that."
    assert sum("signature" in payload for _, payload in events) == 2
    good: Json = {"reasoningText": {"text": text, "signature": signature}}
    for thought, reason in (
        (good, None),
        ({"text": text, "signature": signature}, "REQUEST_BODY_INVALID"),
        ({"reasoningText": {"text": text}}, "REQUEST_BODY_INVALID"),
        ({"reasoningText": {"text": text, "signature": "foreign"}}, "THINKING_SIGNATURE_INVALID"),
        ({"reasoningText": {"text": "x", "signature": signature}}, "THINKING_SIGNATURE_INVALID"),
        ({"redactedContent": "QUJD"}, "THINKING_SIGNATURE_INVALID"),
    ):
        history: list[Json] = [{"content": "q"}, {"content": "a", "reasoningContent": thought}]
        status, answer = client.call(client.body(history=history, **more))
        assert (status, reason) == ((200, None) if reason is None else (400, answer["reason"]))
    assert len(fake.violations) == 5
    fake.forget_signatures()
    history[1]["reasoningContent"] = good
    answer = client.call(client.body(history=history, **more))[1]
    assert answer["reason"] == "THINKING_SIGNATURE_INVALID"
    assert len(fake.violations) == 5


def test_a_thought_without_a_summary_is_a_signature_only(client: Client) -> None:
    asked = client.body(model="claude-sonnet-4.6", fields={"thinking": {"type": "adaptive"}})
    text, signature = thoughts_of(client.call(asked)[1])
    assert text == "" and signature


def test_gpt_reasons_late_and_in_three_dots(client: Client) -> None:
    asked = client.body(model="gpt-5.6-sol", fields={"reasoning": {"effort": "high"}})
    events = client.call(asked)[1]
    text, signature = thoughts_of(events)
    kinds = [kind for kind, _ in events]
    assert text == "..." and signature.startswith(".KTR~~")
    assert kinds.index("assistantResponseEvent") < kinds.index("reasoningContentEvent")


def test_tags_bring_thoughts_inside_the_text(fake: FakeKiro, client: Client) -> None:
    tags = "<thinking_mode>enabled</thinking_mode><max_thinking_length>10000</max_thinking_length>"
    text = text_of(client.call(client.body(f"{tags}\n\nhi"))[1])
    assert text.startswith("<thinking>Let me think about that.</thinking>\n\nHello")
    assert fake.violations == []
    assert "<thinking>" not in text_of(client.call(client.body(f"hi {tags}"))[1])
    client.call(client.body(tags, model="qwen3-coder-next"))
    assert len(fake.violations) == 2


def test_a_brain_and_a_stop_reason_of_ones_own(client: Client) -> None:
    call = Call("read", {"ключ": "знач"}, "tooluse_x")
    client.fake.brain = lambda _: [Say("é " * 9), call, Think("lost"), Stop("MAX_TOKENS")]
    events = client.call(client.body())[1]
    assert text_of(events) == "é " * 9
    assert calls_of(events) == {"tooluse_x": ("read", {"ключ": "знач"})}
    assert dict(events)["metadataEvent"]["stopReason"] == "MAX_TOKENS"


def test_closing_frames_can_be_left_out(client: Client) -> None:
    fake = client.fake
    fake.with_metadata = fake.with_context = fake.with_metering = fake.with_oddities = False
    kinds = {kind for kind, _ in client.call(client.body())[1]}
    assert kinds == {"messageMetadataEvent", "assistantResponseEvent"}


def test_images_are_seen(fake: FakeKiro, client: Client) -> None:
    text = text_of(client.call(client.body("look", images=[image()]))[1])
    assert "I see 1 image(s)" in text
    assert fake.violations == []


def test_the_list_of_models_comes_in_pages(fake: FakeKiro, client: Client) -> None:
    fake.page_size = 5
    arn = client.file["profile_arn"]
    _, first = client.get("/ListAvailableModels", profileArn=arn, maxResults="50")
    _, last = client.get("/List-Available-Models", profileArn=arn, nextToken=first["nextToken"])
    assert len(first["models"]) == 5 and last["nextToken"] is None
    assert first["models"] + last["models"] == fake.model_list
    assert client.get("/ListAvailableModels")[0] == 400
    assert client.get("/ListAvailableModels", profileArn=arn, size="1")[0] == 400
    assert len(fake.violations) == 2


def test_usage_tells_the_address_only_when_asked(fake: FakeKiro, client: Client) -> None:
    query = {"resourceType": "AGENTIC_REQUEST", "profileArn": client.file["profile_arn"]}
    assert "email" not in client.get("/getUsageLimits", **query)[1]["userInfo"]
    status, body = client.get("/getUsageLimits", isEmailRequired="true", **query)
    assert (status, body["userInfo"]["email"]) == (200, "user@example.org")
    assert fake.violations == []


@pytest.mark.parametrize(
    ("kind", "status", "count"),
    [("idc", 200, 1), ("external_idp", 200, 1), ("google", 200, 0), ("builder_id", 403, 0)],
)
def test_profiles_are_for_organisations(kind: str, status: int, count: int) -> None:
    with FakeKiro(kind, region="eu-central-1") as fake:
        for host in ("", "management.eu-central-1.kiro.dev", "management.us-east-1.kiro.dev"):
            client = Client(fake, host)
            headers = client.headers("control")
            got, raw = client.send("POST", "/ListAvailableProfiles", headers, b"{}")
            expected = 0 if "us-east-1" in host else count
            assert (got, len(json.loads(raw).get("profiles", ()))) == (status, expected)
        assert fake.violations == []


def test_the_command_line_targets_of_the_control_plane_are_served(client: Client) -> None:
    arn = client.file["profile_arn"]
    for target, asked in (
        ("AmazonCodeWhispererService.ListAvailableModels", {"origin": "CLI", "profileArn": arn}),
        ("AmazonCodeWhispererService.GetUsageLimits", {"origin": "CLI"}),
        ("KiroControlPlaneBearerService.GetUsageLimits", {}),
    ):
        headers = client.headers("control", X_Amz_Target=target)
        status, raw = client.send("POST", "/", headers, json.dumps(asked).encode())
        assert status == 200, raw
    assert client.fake.violations == []


# ---- Signing in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["builder_id", "idc"])
def test_the_device_flow_waits_and_then_hands_out_tokens(kind: str) -> None:
    with FakeKiro(kind) as fake:
        fake.poll_seconds = 0
        client = Client(fake, f"oidc.{fake.sso_region}.amazonaws.com")
        scopes = [f"codewhisperer:{name}" for name in ("completions", "analysis", "conversations")]
        asked = {"clientName": "EXAMPLE", "clientType": "public", "scopes": scopes}
        registered = client.post("/client/register", asked)[1]
        app = {key: registered[key] for key in ("clientId", "clientSecret")}
        _, code = client.post("/device_authorization", {**app, "startUrl": fake.start_url})
        grant = "urn:ietf:params:oauth:grant-type:device_code"
        poll = {**app, "grantType": grant, "deviceCode": code["deviceCode"]}
        assert client.post("/token", poll)[1]["error"] == "authorization_pending"
        tokens = client.post("/token", poll)[1]
        client.file |= {"client_id": app["clientId"], "client_secret": app["clientSecret"],
                        "refresh_token": tokens["refreshToken"]}  # fmt: skip
        assert client.refresh("/token")[1]["accessToken"].startswith("aoa_EXAMPLE")
        assert fake.violations == []
        wrong = {**app, "startUrl": "https://elsewhere.awsapps.com/start"}
        assert client.post("/device_authorization", wrong)[0] == 400
        assert client.post("/token", {**poll, "clientSecret": "x"})[0] == 401
        assert client.post("/client/register", {**asked, "scopes": ["x"]})[0] == 400
        form = "application/x-www-form-urlencoded"
        assert client.post("/token", poll, Content_Type=form)[0] == 400
        assert len(fake.violations) == 4


@pytest.mark.parametrize("portal", [False, True])
def test_a_social_sign_in_wants_its_verifier_and_its_whole_redirect(portal: bool) -> None:
    verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    challenge = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    redirect = "kiro://kiro.kiroAgent/authenticate-success"
    path, exchanged = "/login", redirect
    if portal:
        path, redirect = "/signin", "http://localhost:3128"
        exchanged = f"{redirect}/oauth/callback?login_option=google"
    asked = {"idp": "Google", "redirect_uri": redirect, "code_challenge": challenge,
             "code_challenge_method": "S256", "state": "EXAMPLEstate"}  # fmt: skip
    with FakeKiro("google") as fake:
        client = Client(fake)
        for told, status in ((exchanged, 200), (redirect + "/", 401)):
            back = urlsplit(fake.visit(f"https://service.example{path}?{urlencode(asked)}"))
            query = parse_qs(back.query)
            assert query["state"] == ["EXAMPLEstate"]
            fields = {"code": query["code"][0], "code_verifier": verifier, "redirect_uri": told}
            got, body = client.post("/oauth/token", fields)
            assert got == status
            assert body.get("profileArn") == (fake.arn if status == 200 else None)
        assert len(fake.violations) == 1
        fake.visit(f"https://service.example/login?{urlencode({**asked, 'redirect_uri': 'x'})}")
        assert len(fake.violations) == 2


@pytest.mark.parametrize(
    ("kind", "path"), [("github", "/refreshToken"), ("idc", "/token"), ("builder_id", "/token")]
)
def test_a_refresh_token_is_used_once(kind: str, path: str) -> None:
    refused = 401 if path == "/refreshToken" else 400
    with FakeKiro(kind) as fake:
        client = Client(fake)
        first = client.refresh(path)[1]
        assert first["refreshToken"] != client.file["refresh_token"]
        assert fake.violations == []
        assert client.refresh(path)[0] == refused
        assert fake.violations == ["a refresh token was used twice"]
        client.file["refresh_token"] = first["refreshToken"]
        fake.rotate = False
        assert "refreshToken" not in client.refresh(path)[1]
        client.file = fake.refreshed_elsewhere() | {"refresh_token": first["refreshToken"]}
        assert client.refresh(path)[0] == refused
        client.file = fake.token_file()
        assert client.refresh(path)[0] == 200
        fake.revoke()
        assert client.refresh(path)[0] == refused
        assert fake.refreshes == 6
        assert len(fake.violations) == 1


def test_an_identity_provider_takes_forms_and_answers_in_snake_case() -> None:
    with FakeKiro("external_idp") as fake:
        client = Client(fake)
        form = {"grant_type": "refresh_token", "client_id": client.file["client_id"],
                "refresh_token": client.file["refresh_token"], "scope": "openid"}  # fmt: skip
        assert client.post("/idp/token", form)[0] == 400
        kind = "application/x-www-form-urlencoded"
        status, body = client.post("/idp/token", form, Content_Type=kind)
        assert status == 200
        assert set(body) == {"access_token", "refresh_token", "expires_in", "token_type"}
        assert len(fake.violations) == 1


def test_prepared_answers_come_first(fake: FakeKiro, client: Client) -> None:
    for line in (fake.refresh_answers, fake.models_answers, fake.usage_answers):
        line.append(Answer(500, body=b'{"message":"boom"}'))
    arn = client.file["profile_arn"]
    for expected in (500, 200):
        assert client.refresh()[0] == expected
        assert client.get("/ListAvailableModels", profileArn=arn)[0] == expected
        assert client.get("/getUsageLimits")[0] == expected
    fake.queue(Answer(429, {"Retry-After": "2"}, b'{"message":"Too many requests"}'))
    assert client.call(client.body(chatTriggerType="x", model="nonsense"))[0] == 400
    assert client.call(client.body())[0] == 429
    fake.queue(Answer(body=[frame("assistantResponseEvent", {"content": "x"})], strict=False))
    assert text_of(client.call({"nonsense": True})[1]) == "x"
    assert len(fake.violations) == 1


# ---- What it refuses -----------------------------------------------------------------------------

HISTORY = [{"content": "q"}, {"content": "a"}]
CONFIG: Json = {"model": "claude-opus-4.8"}


def changed(client: Client, path: str, value: Any, **more: Any) -> Json:
    """A right body with one member set, or taken away when the value is `...`."""
    body = client.body(**more)
    *above, last = path.split(".")
    inside: Any = body
    for name in above:
        inside = inside[int(name) if name.isdigit() else name]
    if value is ...:
        del inside[last]
    else:
        inside[last] = copy.deepcopy(value)
    return body


STATE = "conversationState"
USER = f"{STATE}.currentMessage.userInputMessage"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("inferenceConfig", {"temperature": 1}),
        ("systemPrompt", "x"),
        ("agentMode", "vibe"),
        ("temperature", 1),
        (STATE, ...),
        (f"{STATE}.chatTriggerType", "AUTO"),
        (f"{STATE}.chatTriggerType", ...),
        (f"{STATE}.agentTaskType", "vibes"),
        (f"{STATE}.conversationId", "1"),
        (f"{STATE}.conversationId", None),
        (f"{STATE}.history", []),
        (f"{STATE}.stream", True),
        (f"{STATE}.currentMessage.assistantResponseMessage", {"content": "x"}),
        (f"{STATE}.currentMessage", {"assistantResponseMessage": {"content": "x"}}),
        (f"{USER}.content", ...),
        (f"{USER}.content", " \n"),
        (f"{USER}.content", None),
        (f"{USER}.modelId", ...),
        (f"{USER}.origin", "KIRO_CLI"),
        (f"{USER}.origin", ...),
        (f"{USER}.images", []),
        (f"{USER}.toolResults", [result()]),
        (f"{USER}.userInputMessageContext", {}),
        (f"{USER}.userInputMessageContext", {"tools": []}),
        (f"{USER}.userInputMessageContext", {"images": [image()]}),
        (f"{USER}.userInputMessageContext", {"envState": {"operatingSystem": "darwin"}}),
        (f"{USER}.userInputMessageContext", {"tools": [{"cachePoint": {"type": "default"}}]}),
        (f"{USER}.userInputMessageContext", {"tools": [{**tool(), "type": "function"}]}),
        ("additionalModelRequestFields", {"thinking": {"type": "adaptive"}}),
        ("additionalModelRequestFields", {}),
    ],
)
def test_a_body_of_another_shape_is_improper(client: Client, path: str, value: Any) -> None:
    status, answer = client.call(changed(client, path, value))
    assert (status, answer["message"]) == (400, "Improperly formed request.")
    assert answer["reason"] == "REQUEST_BODY_INVALID"
    assert len(client.fake.violations) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": NaN}',
        b'{"a": "\\ud83d"}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
    ],
)
def test_what_is_no_json_in_utf8_is_refused(client: Client, raw: bytes) -> None:
    status, answer = client.call(raw)
    assert (status, answer["message"]) == (400, "Improperly formed request.")


def after(*uses: Json, results: list[Json] | None = None, **more: Any) -> Json:
    """What a body holds after tool uses: their results, and the tool."""
    return {"history": called(*uses), "results": results, "tools": [tool()], **more}


LATER = [*called(use()), {"content": "", "userInputMessageContext": {"toolResults": [result()]}}]
TURNS: list[tuple[Json, str | None]] = [
    ({"history": HISTORY}, None),
    ({"history": [{"content": "q"}]}, "REQUEST_BODY_INVALID"),
    ({"history": [*HISTORY, {"content": "q"}]}, "REQUEST_BODY_INVALID"),
    ({"history": [{"content": "q"}, {"content": " "}]}, "REQUEST_BODY_INVALID"),
    ({"history": [{"content": ""}, {"content": "a"}]}, "REQUEST_BODY_INVALID"),
    ({"history": [{"content": "q", "modelId": "auto"}, {"content": "a"}]}, "REQUEST_BODY_INVALID"),
    ({"history": [{**LATER[2], "content": "q"}, HISTORY[1]]}, "TOOL_USE_RESULT_MISMATCH"),
    ({"history": [{"content": "q", "userInputMessageContext": {"tools": [tool()]}}, HISTORY[1]]},
     "REQUEST_BODY_INVALID"),
    ({"model": "claude-9"}, "INVALID_MODEL_ID"),
    ({"content": "word " * 170_000}, "CONTENT_LENGTH_EXCEEDS_THRESHOLD"),
    ({"content": "word " * 170_000, "model": "claude-opus-4.8"}, None),
    (after(use(), results=[result()], content=""), None),
    (after(use()), "TOOL_USE_RESULT_MISMATCH"),
    (after(use(), history=HISTORY, results=[result()]), "TOOL_USE_RESULT_MISMATCH"),
    (after(use(), results=[result(2)]), "TOOL_USE_RESULT_MISMATCH"),
    (after(use(), use(number=2), results=[result()]), "TOOL_USE_RESULT_MISMATCH"),
    ({"results": [result()], "tools": [tool()]}, "TOOL_USE_RESULT_MISMATCH"),
    (after(use(), use(), results=[result()]), "TOOL_DUPLICATE"),
    (after(use(), results=[result(), result()]), "TOOL_DUPLICATE"),
    (after(history=[*LATER, called(use())[1]], results=[result()]), "TOOL_DUPLICATE"),
    (after(use(), results=[result()], tools=None), "TOOL_CONFIG_MISSING"),
    (after(use("b"), results=[result()]), "TOOL_CONFIG_MISSING"),
    (after(use("a.b"), results=[result()]), "TOOL_NAME"),
    (after({**use(), "input": "{}"}, results=[result()]), "REQUEST_BODY_INVALID"),
    (after({**use(), "toolUseId": "a.b"}), "REQUEST_BODY_INVALID"),
    (after(use(), results=[{**result(), "content": []}]), "REQUEST_BODY_INVALID"),
    (after(use(), results=[{**result(), "status": "ok"}]), "REQUEST_BODY_INVALID"),
]  # fmt: skip
BAD_SCHEMAS: list[Json] = [
    {},
    {"properties": {}},
    {"type": "string"},
    {**SCHEMA, "anyOf": [SCHEMA]},
    {**SCHEMA, "required": []},
    {**SCHEMA, "required": None},
    {**SCHEMA, "properties": []},
    {**SCHEMA, "$schema": "x"},
    {**SCHEMA, "additionalProperties": False},
    {**SCHEMA, "$defs": {}},
    {"type": "object", "properties": {"a": {"$ref": "#/x"}}},
    {"type": "object", "properties": {"a": {"type": "string", "format": "uri"}}},
    {"type": "object", "properties": {"a": {"anyOf": [{"minLength": 1}]}}},
    {"type": "object", "properties": {"a": {"items": {**SCHEMA, "required": []}}}},
]
TOOLS: list[tuple[Json, str | None]] = [
    ({"tools": [tool(schema={"type": "object", "properties": {"format": SCHEMA}})]}, None),
    ({"tools": [tool("a-b_C9")]}, None),
    ({"tools": [tool("a.b")]}, "TOOL_NAME"),
    ({"tools": [tool("a" * 65)]}, "TOOL_NAME"),
    ({"tools": [tool(), tool()]}, "TOOL_DUPLICATE"),
    ({"tools": [tool(description="")]}, "REQUEST_BODY_INVALID"),
    ({"tools": [tool(description="é" * 5121)]}, "REQUEST_BODY_INVALID"),
    ({"tools": [tool(description="é" * 5120)]}, None),
    *(({"tools": [tool(schema=schema)]}, "TOOL_SCHEMA_INVALID") for schema in BAD_SCHEMAS),
]
IMAGES: list[tuple[Json, str | None]] = [
    ({"images": [image()] * 20}, None),
    ({"images": [image()] * 21}, "IMAGE_COUNT_EXCEEDED"),
    ({"images": [image(kind="jpg")]}, "IMAGE_FORMAT_UNSUPPORTED"),
    ({"images": [image(kind="jpeg")]}, "IMAGE_MIME_MISMATCH"),
    ({"images": [image("data:image/png;base64," + PNG)]}, "REQUEST_BODY_INVALID"),
    ({"images": [image()], "content": ""}, "REQUEST_BODY_INVALID"),
    ({"images": [image()], "model": "qwen3-coder-next"}, "REQUEST_BODY_INVALID"),
    ({"images": [image()], "model": "claude-sonnet-4"}, None),
]
FIELDS: list[tuple[Json, str | None]] = [
    ({**CONFIG, "fields": {**ADAPTIVE, "output_config": {"effort": "xhigh"}}}, None),
    ({**CONFIG, "fields": {"max_tokens": 1024}}, None),
    ({**CONFIG, "fields": {"max_tokens": 1023}}, "REQUEST_BODY_INVALID"),
    ({**CONFIG, "fields": {"thinking": {"type": "enabled"}}}, "REQUEST_BODY_INVALID"),
    ({**CONFIG, "fields": {"reasoning": {"effort": "low"}}}, "REQUEST_BODY_INVALID"),
    (
        {"model": "claude-sonnet-4.6", "fields": {"output_config": {"effort": "xhigh"}}},
        "REQUEST_BODY_INVALID",
    ),
    ({"model": "gpt-5.6-sol", "fields": {"reasoning": {"effort": "none"}}}, None),
    ({"model": "gpt-5.6-sol", "fields": ADAPTIVE}, "REQUEST_BODY_INVALID"),
    ({"model": "auto", "fields": ADAPTIVE}, "REQUEST_BODY_INVALID"),
]


@pytest.mark.parametrize(("more", "reason"), [*TURNS, *TOOLS, *IMAGES, *FIELDS])
def test_a_wrong_conversation_is_refused_for_its_reason(
    client: Client, more: Json, reason: str | None
) -> None:
    status, answer = client.call(client.body(**more))
    notes = client.fake.violations
    if reason is None:
        assert (status, notes) == (200, [])
        return
    assert (status, len(notes)) == (400, 1)
    if reason == "TOOL_NAME":
        assert answer == {"message": "Invalid tool use format.", "reason": None}
    else:
        assert answer["reason"] == reason
        assert notes[0].startswith(reason)


@pytest.mark.parametrize("content", ["Continue", ".", "Tool results provided."])
def test_padding_beside_tool_results_is_noted(client: Client, content: str) -> None:
    assert client.call(client.body(content, **after(use(), results=[result()])))[0] == 200
    assert len(client.fake.violations) == 1
    assert client.call(client.body("Continue"))[0] == 200
    assert len(client.fake.violations) == 1


# ---- Headers, tokens, profiles -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plane", "changes"),
    [
        ("ide", {"Accept": "*/*"}),
        ("ide", {"amz_sdk_request": None}),
        ("ide", {"amz_sdk_invocation_id": None}),
        ("ide", {"amz_sdk_invocation_id": "9b1d9c3e-0000-1000-8000-000000000000"}),
        ("ide", {"x_amzn_codewhisperer_optout": None}),
        ("ide", {"x_amzn_kiro_agent_mode": "chat"}),
        ("ide", {"User_Agent": "python"}),
        ("ide", {"x_amz_user_agent": f"aws-sdk-js/1.0.34 KiroIDE-1.1.14-{'0' * 64}"}),
        ("ide", {"x_amz_user_agent": f"aws-sdk-js/1.0.34 KiroIDE-1.1.14-{MACHINE.upper()}"}),
        ("ide", {"Accept_Encoding": "gzip"}),
        ("ide", {"Content_Type": "application/x-amz-json-1.0"}),
        ("ide", {"redirect_for_internal": "true"}),
        ("ide", {"x_amzn_kiro_profile_arn": SOCIAL_ARN}),
        ("cli", {"User_Agent": "python"}),
        ("cli", {"x_amzn_kiro_agent_mode": "vibe"}),
        ("cli", {"x_amz_user_agent": None}),
    ],
)
def test_odd_headers_are_noted(client: Client, plane: str, changes: dict[str, Any]) -> None:
    assert client.call(client.body(plane=plane), plane, **changes)[0] == 200
    assert client.fake.violations


@pytest.mark.parametrize(
    ("plane", "changes", "status"),
    [
        ("ide", {"Content_Type": "text/plain"}, 400),
        ("ide", {"Content_Encoding": "gzip"}, 400),
        ("ide", {"X_Amz_Target": TARGET}, 403),
        ("ide", {"TokenType": "API_KEY"}, 403),
        ("ide", {"Authorization": None}, 403),
        ("ide", {"Authorization": "Bearer nonsense"}, 403),
        ("ide", {"Host": "runtime.us-east-1.kiro.dev"}, 421),
        ("cli", {"X_Amz_Target": "AmazonQDeveloperStreamingService.SendMessage"}, 404),
        ("cli", {"X_Amz_Target": None}, 404),
    ],
)
def test_wrong_headers_are_refused(
    client: Client, plane: str, changes: dict[str, Any], status: int
) -> None:
    raw = json.dumps(client.body(plane=plane)).encode()
    path = "/generateAssistantResponse" if plane == "ide" else "/"
    assert client.send("POST", path, client.headers(plane, **changes), raw)[0] == status
    assert len(client.fake.violations) == 1


def test_a_machine_id_is_stable_and_not_the_name_of_the_host(client: Client) -> None:
    for machine in (MACHINE, hashlib.sha256(platform.node().encode()).hexdigest()):
        ide = f"KiroIDE-1.1.14-{machine}"
        agents = {"User_Agent": f"{LONG}streaming#1.0.34 {ide}",
                  "x_amz_user_agent": f"aws-sdk-js/1.0.34 {ide}"}  # fmt: skip
        client.call(client.body(), **agents)
    notes = sorted(note.partition(machine)[0] for note in client.fake.violations)
    assert notes == [
        "the machine id changed to ",
        "the machine id is made from the name of this host",
    ]


def test_an_invocation_id_is_used_once(client: Client) -> None:
    again = str(uuid.uuid4())
    for _ in range(2):
        client.call(client.body(), amz_sdk_invocation_id=again)
    assert len(client.fake.violations) == 1


def test_what_the_test_itself_causes_is_no_violation(fake: FakeKiro, client: Client) -> None:
    fake.suspended = True
    assert client.call(client.body())[1]["reason"] == "TEMPORARILY_SUSPENDED"
    assert client.get("/getUsageLimits")[1]["reason"] == "TEMPORARILY_SUSPENDED"
    fake.suspended, fake.out_of_credits = False, True
    status, body = client.call(client.body())
    assert (status, body["reason"]) == (402, "MONTHLY_REQUEST_COUNT")
    fake.out_of_credits, fake.shapes = False, {"cli"}
    assert client.call(client.body())[0] == 404
    status, body = client.call(client.body(plane="cli"), "cli")
    assert status == 200
    fake.expire_tokens()
    status, body = client.call(client.body(plane="cli"), "cli")
    assert (status, body["message"]) == (
        403,
        "The bearer token included in the request is invalid.",
    )
    assert body["__type"].endswith("#AccessDeniedException")
    assert fake.violations == []


def test_secrets_stay_where_they_belong(fake: FakeKiro, client: Client) -> None:
    client.call(client.body(client.file["refresh_token"]))
    client.call(client.body(client.file["access_token"]))
    client.post("/refreshToken", {"refreshToken": "x"}, Authorization="Bearer x")
    assert len(fake.violations) == 4


RUNTIME = "runtime.us-east-1.kiro.dev"
Q = "q.us-east-1.amazonaws.com"
#: (kind, plane, host, profileArn, switches, status, violations)
ARNS: list[tuple[str, str, str, str | None, Json, int, int]] = [
    ("google", "ide", "", None, {}, 400, 1),
    ("google", "cli", "", None, {}, 400, 1),
    ("google", "ide", "", None, {"needs_arn": False}, 200, 0),
    ("google", "ide", "", "arn:EXAMPLE", {}, 400, 1),
    ("google", "ide", "", BUILDER_ARN, {}, 403, 1),
    ("google", "ide", "", SOCIAL_ARN, {}, 200, 1),
    ("google", "ide", "", "own", {"refuses_arn": True}, 403, 0),
    ("google", "ide", "", None, {"refuses_arn": True}, 200, 0),
    ("google", "ide", Q, "own", {}, 200, 0),
    ("idc", "ide", RUNTIME, "own", {}, 200, 0),
    ("idc", "ide", Q, "own", {}, 403, 0),
    ("idc", "ide", Q, None, {}, 200, 0),
    ("builder_id", "ide", RUNTIME, None, {}, 400, 1),
    ("builder_id", "ide", RUNTIME, BUILDER_ARN, {}, 200, 0),
    ("builder_id", "ide", RUNTIME, SOCIAL_ARN, {}, 403, 1),
    ("builder_id", "cli", RUNTIME, None, {}, 200, 0),
    ("builder_id", "cli", RUNTIME, None, {"needs_arn": True}, 400, 0),
    ("builder_id", "ide", Q, BUILDER_ARN, {}, 403, 0),
    ("builder_id", "ide", Q, None, {}, 200, 0),
    ("external_idp", "ide", "", SOCIAL_ARN, {}, 403, 1),
    ("api_key", "ide", "", SOCIAL_ARN, {}, 403, 1),
    ("api_key", "ide", RUNTIME, None, {}, 400, 1),
    ("api_key", "cli", RUNTIME, None, {}, 200, 0),
    ("api_key", "ide", "codewhisperer.us-east-1.amazonaws.com", None, {}, 200, 0),
]


@pytest.mark.parametrize("case", ARNS, ids=lambda case: "-".join(map(str, case[:4])))
def test_the_profile_is_told_as_the_kind_of_account_wants_it(case: Any) -> None:
    kind, plane, host, arn, switches, status, notes = case
    with FakeKiro(kind) as fake:
        for name, value in switches.items():
            setattr(fake, name, value)
        client = Client(fake, host)
        asked = client.body(plane=plane)
        asked.pop("profileArn", None)
        if arn is not None:
            asked["profileArn"] = fake.arn if arn == "own" else arn
        got, answer = client.call(asked, plane)
        assert (got, len(fake.violations)) == (status, notes), (answer, fake.violations)


# ---- Hosts ---------------------------------------------------------------------------------------

#: (host, method, path, status): what each host is not for.
WRONG = [
    (RUNTIME, "GET", "/ListAvailableModels?origin=AI_EDITOR", 404),
    (RUNTIME, "POST", "/token", 404),
    ("management.us-east-1.kiro.dev", "POST", "/generateAssistantResponse", 404),
    ("oidc.us-east-1.amazonaws.com", "POST", "/generateAssistantResponse", 404),
    ("oidc.eu-west-1.amazonaws.com", "POST", "/token", 400),
    ("prod.us-east-1.auth.desktop.kiro.dev", "GET", "/getUsageLimits?origin=AI_EDITOR", 404),
    ("codewhisperer.us-east-1.amazonaws.com", "POST", "/", 404),
    ("runtime.eu-central-1.kiro.dev", "POST", "/generateAssistantResponse", 403),
]


@pytest.mark.parametrize(("host", "method", "path", "status"), WRONG)
def test_a_host_serves_what_it_is_for(
    fake: FakeKiro, host: str, method: str, path: str, status: int
) -> None:
    client = Client(fake, host)
    plane = "cli" if path == "/" else "ide"
    raw = b"{}" if method == "POST" else None
    assert client.send(method, path, client.headers(plane), raw)[0] == status
    assert fake.connects == [f"{host}:443"]
    assert fake.requests[0].headers["host"] == fake.requests[0].via == host
    assert len(fake.violations) == 1


@pytest.mark.parametrize("host", ["codewhisperer.eu-west-1.amazonaws.com", "example.org"])
def test_other_hosts_do_not_resolve(fake: FakeKiro, host: str) -> None:
    with pytest.raises(OSError, match="502"):
        Client(fake, host).get("/")
    assert len(fake.violations) == 1


def test_a_dead_host_is_dead_in_both_ways(fake: FakeKiro) -> None:
    client = Client(fake, RUNTIME)
    connection = client.open()
    try:
        connection.connect()
        fake.dead_hosts.add(RUNTIME)
        connection.request("POST", "/generateAssistantResponse", b"{}", client.headers("ide"))
        assert connection.getresponse().status == 503
    finally:
        connection.close()
    with pytest.raises(OSError, match="503"):
        client.call(client.body())
    assert fake.violations == []


def test_a_client_that_leaves_its_tunnel_is_noticed(fake: FakeKiro) -> None:
    client = Client(fake, RUNTIME)
    fake.queue(Answer(body=[frame("assistantResponseEvent", {"content": "x"})], then="hang"))
    fake.queue(Answer(body=[b"a", b"b"], pause=threading.Event()))
    for count in (1, 2):
        connection = client.open()
        raw = json.dumps(client.body()).encode()
        connection.request("POST", "/generateAssistantResponse", raw, client.headers("ide"))
        answer = connection.getresponse()
        assert answer.read(1)
        answer.close()
        connection.close()
        assert fake.wait_cancelled(5, count)
    assert fake.violations == []


def test_a_reset_inside_a_tunnel_is_a_reset(fake: FakeKiro) -> None:
    client = Client(fake, RUNTIME)
    fake.queue(Answer(body=b"abc", then="reset"))
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        client.call(client.body())


def test_the_proxy_takes_nothing_but_connect(fake: FakeKiro) -> None:
    proxy = urlsplit(fake.proxy_url)
    with socket.create_connection((proxy.hostname, proxy.port), timeout=5) as sock:
        sock.sendall(b"GET http://runtime.us-east-1.kiro.dev/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 405 ")
    assert len(fake.violations) == 1


def test_the_address_of_a_profile_may_be_quoted(client: Client) -> None:
    arn = quote(client.file["profile_arn"], safe="")
    headers = client.headers("control", Content_Type=None)
    path = f"/ListAvailableModels?origin=AI_EDITOR&profileArn={arn}"
    assert client.send("GET", path, headers)[0] == 200
    assert client.fake.violations == []
