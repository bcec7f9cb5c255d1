"""A strict imitation of the Kiro service and of its sign-in services, for tests, on 127.0.0.1.

One port plays AWS SSO OIDC, the desktop auth service, an external identity provider, the control
plane and the data plane in both of its shapes. A second port is a CONNECT proxy that serves the
same imitation behind TLS under the real host names, each host with what it really offers.
As in `fakes.py` it refuses what the real service refuses, answers with the real service's oddities,
and writes down in `fake.violations` what a well-behaved client does not do.

    with FakeKiro("builder_id") as fake:
        ...point the gateway at fake.url, give it fake.token_file()...
        fake.queue(Answer(429, {}, b'{"message":"Too many requests","reason":null}'))
        assert fake.violations == []
        assert fake.calls[0].body["conversationState"]["chatTriggerType"] == "MANUAL"

What is here, in this order:
    Event stream         messages with their checksums
    Models and usage     what the control plane tells
    Imitation            the default brain and the stream it is spoken in
    Tunnel               a connection behind TLS
    FakeKiro             the server and its routes
What is refused stands in `kiro_rules.py`.

Facts about the service are from public sources up to 2026-10. Where they leave a choice, this file
takes the harder one and says so; a switch of FakeKiro gives the other one where tests need it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import json
import re
import socket
import ssl
import struct
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from fakes import (
    Answer,
    Call,
    Connection,
    FakeService,
    Issued,
    Json,
    Part,
    Say,
    Seen,
    Stop,
    Think,
    chunk,
    drip,
    dump,
    example_of,
    plain,
    words,
)
from kiro_rules import (
    CONTENT_TYPES,
    JSON_TYPE,
    TOKEN_TYPES,
    Fault,
    SignInFault,
    characters_in,
    check_fields,
    check_images,
    check_origin_and_model,
    check_reasoning,
    check_shape,
    check_size,
    check_tools,
    check_turns,
    current,
    denied,
    find_host,
    header_notes,
    improper,
    invalid,
    is_legacy,
    is_uuid4,
    oidc,
    read_body,
    results_of,
    tag_notes,
    thinking_asked,
    tools_of,
    unknown_operation,
    user_turns,
    window_of,
)

__all__ = [
    "BUILDER_ARN",
    "CA_FILE",
    "SOCIAL_ARN",
    "Answer",
    "Call",
    "FakeKiro",
    "Json",
    "Say",
    "Seen",
    "Stop",
    "Think",
    "chunk",
    "default_brain",
    "default_models",
    "drip",
    "dump",
    "error_frame",
    "exception_frame",
    "frame",
    "message",
]

#: request body -> what to answer
KiroBrain = Callable[[Json], list[Part]]

CERTIFICATES = Path(__file__).with_name("certs")
#: What a client of the proxy trusts.
CA_FILE = CERTIFICATES / "kiro-ca.pem"

#: Constants of the public IDE, not somebody's accounts.
BUILDER_ARN = "arn:aws:codewhisperer:us-east-1:638616132270:profile/AAAACCCCXXXX"
SOCIAL_ARN = "arn:aws:codewhisperer:us-east-1:699475941385:profile/EHGA3GRVQMUK"

# ---- Event stream --------------------------------------------------------------------------------

#: (type number 2 to 5 or 8, value): the other types follow from the Python type, int being i32.
Header = bool | int | bytes | str | uuid.UUID | tuple[int, int]
_NUMBERS = {2: ">b", 3: ">h", 4: ">i", 5: ">q", 8: ">q"}


@functools.lru_cache(maxsize=1024, typed=True)
def _header(name: str, value: Header) -> bytes:
    """One header of a message."""
    key = name.encode()
    head = struct.pack(">B", len(key)) + key
    if isinstance(value, bool):
        return head + (b"\x00" if value else b"\x01")
    if isinstance(value, int):
        value = (4, value)
    if isinstance(value, tuple):
        kind, number = value
        return head + struct.pack(">B", kind) + struct.pack(_NUMBERS[kind], number)
    if isinstance(value, uuid.UUID):
        return head + b"\x09" + value.bytes
    data, number = (value, 6) if isinstance(value, bytes) else (value.encode(), 7)
    return head + struct.pack(">BH", number, len(data)) + data


def message(headers: Mapping[str, Header], payload: bytes) -> bytes:
    """One message of an event stream, with both checksums."""
    block = b"".join(_header(name, value) for name, value in headers.items())
    prelude = struct.pack(">II", len(block) + len(payload) + 16, len(block))
    head = prelude + struct.pack(">I", zlib.crc32(prelude))
    return head + block + payload + struct.pack(">I", zlib.crc32(head + block + payload))


def frame(event_type: str, payload: Json, content_type: str = "application/json") -> bytes:
    """An event, its members bare as the service sends them."""
    headers = {":event-type": event_type, ":content-type": content_type, ":message-type": "event"}
    return message(headers, dump(payload))


def exception_frame(kind: str, payload: Json) -> bytes:
    """A modelled exception in the middle of a stream."""
    headers = {":exception-type": kind, ":content-type": "application/json"}
    return message({**headers, ":message-type": "exception"}, dump(payload))


def error_frame(code: str, text: str) -> bytes:
    """An error that no model knows, told in headers."""
    headers = {":error-code": code, ":error-message": text, ":message-type": "error"}
    return message(headers, b"")


# ---- Models and usage ----------------------------------------------------------------------------


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _words_schema(*allowed: str) -> Json:
    return {"type": "string", "enum": list(allowed)}


def _claude_fields(most: int, *efforts: str) -> Json:
    return _object({
        "thinking": _object({"type": _words_schema("adaptive", "disabled"),
                             "display": _words_schema("summarized", "omitted")}),
        "output_config": _object({"effort": {**_words_schema(*efforts), "default": "high"}}),
        "max_tokens": {"type": "integer", "minimum": 1024, "maximum": most},
    })  # fmt: skip


def _model(
    name: str, window: int, most: int | None, rate: float, fields: Json | None = None
) -> Json:
    """A complete entry of the list."""
    return {
        "modelId": name, "modelName": name.replace("-", " ").title(),
        "description": f"The model {name}", "rateMultiplier": rate, "rateUnit": "Credit",
        "supportedInputTypes": ["TEXT", "IMAGE"],
        "tokenLimits": {"maxInputTokens": window, "maxOutputTokens": most},
        "promptCaching": {"supportsPromptCaching": True, "maximumCacheCheckpointsPerRequest": 4,
                          "minimumTokensPerCacheCheckpoint": 1024},
        "additionalModelRequestFieldsSchema": fields,
    }  # fmt: skip


def default_models() -> list[Json]:
    """A list as odd as real ones: members missing or null, five kinds of thinking."""
    efforts = ["low", "medium", "high", "max"]
    sonnet4 = _model("claude-sonnet-4", 200_000, 64_000, 1.3)
    del sonnet4["tokenLimits"], sonnet4["additionalModelRequestFieldsSchema"]
    sonnet4["supportedInputTypes"] = None
    haiku = _model("claude-haiku-4.5", 200_000, None, 0.4)
    haiku.update(modelName=None, description=None, promptCaching=None)
    del haiku["rateUnit"]
    qwen = _model("qwen3-coder-next", 256_000, None, 0.05)
    qwen["supportedInputTypes"] = ["TEXT"]
    gpt_efforts = _words_schema("none", "low", "medium", "high", "xhigh", "max")
    return [
        _model("auto", 200_000, None, 1.0),
        _model("claude-sonnet-4.5", 200_000, 64_000, 1.3),
        sonnet4,
        haiku,
        _model("claude-opus-4.8", 1_000_000, 128_000, 2.2,
               _claude_fields(128_000, "low", "medium", "high", "xhigh", "max")),
        _model("claude-sonnet-4.6", 1_000_000, 64_000, 1.3, _claude_fields(64_000, *efforts)),
        _model("gpt-5.6-sol", 272_000, 128_000, 2.4,
               _object({"reasoning": _object({"effort": gpt_efforts})})),
        qwen,
    ]  # fmt: skip


#: Models that the CLI shape does not serve without a profile ARN (seen 2026-08).
GATED = ("claude-opus-5", "claude-sonnet-5")


def default_usage(now: float) -> Json:
    """Credits as a paying account has them: base, trial and one bonus."""
    reset = now + 12 * 86400.0
    return {
        "daysUntilReset": 12, "nextDateReset": reset,
        "subscriptionInfo": {
            "type": "Q_DEVELOPER_STANDALONE_PRO", "subscriptionTitle": "KIRO PRO",
            "upgradeCapability": "UPGRADE_CAPABLE", "overageCapability": "OVERAGE_CAPABLE",
            "subscriptionManagementTarget": "MANAGE",
        },
        "overageConfiguration": {"overageStatus": "DISABLED"},
        "userInfo": {"userId": "d-EXAMPLE.00000000", "email": "user@example.org"},
        "usageBreakdownList": [{
            "resourceType": "CREDIT", "displayName": "Credit", "displayNamePlural": "Credits",
            "unit": "INVOCATIONS", "currency": "USD",
            "currentUsage": 125, "currentUsageWithPrecision": 125.37,
            "usageLimit": 1000, "usageLimitWithPrecision": 1000.0,
            "currentOverages": 0, "currentOveragesWithPrecision": 0.0, "overageRate": 0.04,
            "overageCap": 10000, "overageCharges": 0.0, "nextDateReset": reset,
            "freeTrialInfo": {
                "freeTrialStatus": "ACTIVE", "freeTrialExpiry": now + 5 * 86400.0,
                "currentUsage": 50, "currentUsageWithPrecision": 50.2,
                "usageLimit": 500, "usageLimitWithPrecision": 500.0,
            },
            "bonuses": [{
                "bonusCode": "EXAMPLE", "displayName": "Welcome", "currentUsage": 0.0,
                "usageLimit": 100.0, "expiresAt": now + 30 * 86400.0,
                "redeemedAt": now - 86400.0, "status": "ACTIVE",
            }],
        }],
        "limits": [],
    }  # fmt: skip


# ---- Imitation -----------------------------------------------------------------------------------


def default_brain(body: Json) -> list[Part]:
    """Answers by simple key words, so that a test can ask for what it needs in the prompt."""
    user = current(body)
    seen = sum(len(turn.get("images", [])) for turn in user_turns(body))
    sight = f" I see {seen} image(s)." if seen else ""
    parts: list[Part] = [Think("Let me think about that.")] if thinking_asked(body) else []
    if results := results_of(user):
        texts = [p.get("text", "") or json.dumps(p.get("json")) for r in results
                 for p in r["content"]]  # fmt: skip
        return [*parts, Say(f"The tool said: {' and '.join(texts)}{sight}")]
    text, tools = user["content"], tools_of(user)
    if tools and "call two tools" in text:
        tools = (tools * 2)[:2]
    elif "call the tool" in text:
        tools = tools[:1]
    else:
        tools = []
    calls = [Call(tool["name"], example_of(tool["inputSchema"]["json"])) for tool in tools]
    if calls:
        return [*parts, *calls]
    return [*parts, Say(f"Hello from {user['modelId']}.{sight} You said: {text}")]


class KiroVoice:
    """Parts spoken in the event stream of one answer."""

    def __init__(self, parts: list[Part], body: Json, model: Json, issued: Issued) -> None:
        self.parts = parts
        self.body = body
        self.model = model
        self.issued = issued
        self.native = model.get("additionalModelRequestFieldsSchema") is not None
        self.asked = thinking_asked(body)
        self.is_gpt = model["modelId"].startswith("gpt-")
        #: `auto` tells in its text events what it chose.
        name = model["modelId"]
        self.speaker = "claude-sonnet-4.5" if name == "auto" else name
        self.calls = [part for part in parts if isinstance(part, Call)]

    def content(self) -> Iterator[bytes]:
        """Text, thoughts and calls in the order of the parts, GPT's reasoning after them."""
        tagged = ""
        late: list[Think] = []
        for part in self.parts:
            if isinstance(part, Think) and not self.native:
                if self.asked == "tags":
                    tagged += f"<thinking>{part.text}</thinking>\n\n"
            elif isinstance(part, Think) and self.is_gpt:
                late.append(part)
            elif isinstance(part, Think):
                yield from self.thought(part.text if self.asked != "hidden" else "", part.signature)
            elif isinstance(part, Say):
                # Pieces of seven cut the tags at arbitrary points.
                for piece in _pieces(tagged, 7) + _few(words(part.text)):
                    yield self.text(piece)
                tagged = ""
            elif isinstance(part, Call):
                for piece in _pieces(tagged, 7):
                    yield self.text(piece)
                tagged = ""
                yield from self.call(part)
        for piece in _pieces(tagged, 7):
            yield self.text(piece)
        for part in late:
            seed = hashlib.sha256(part.text.encode()).hexdigest()
            yield from self.thought(
                "...", part.signature or f".KTR~~{len(self.issued.texts)}{seed}"
            )

    def text(self, piece: str) -> bytes:
        return frame("assistantResponseEvent", {"content": piece, "modelId": self.speaker})

    def thought(self, text: str, signature: str | None) -> Iterator[bytes]:
        """A thought in pieces, its signature in two."""
        for piece in words(text):
            yield frame("reasoningContentEvent", {"text": piece})
        signature = self.issued.sign(text, signature)
        half = len(signature) // 2
        for piece in filter(None, (signature[:half], signature[half:])):
            yield frame("reasoningContentEvent", {"signature": piece})

    def call(self, part: Call) -> Iterator[bytes]:
        """A tool call: opened without input, arguments in pieces, some of them nameless."""
        part.id = part.id or f"tooluse_{uuid.uuid4().hex[:22]}"
        named = {"toolUseId": part.id, "name": part.name}
        yield frame("toolUseEvent", named)
        written = json.dumps(part.arguments, ensure_ascii=False) if part.arguments else ""
        for at, piece in enumerate(_pieces(written, 9)):
            known = {"toolUseId": part.id} if at % 3 == 2 else named
            yield frame("toolUseEvent", {**known, "input": piece})
        yield frame("toolUseEvent", {**named, "stop": True})

    def usage(self) -> Json:
        """Counts that add up; a third of the prompt was cached."""
        prompt = characters_in(self.body) // 4 + 1
        spoken = "".join(
            json.dumps(part.arguments) if isinstance(part, Call) else part.text
            for part in self.parts
            if not isinstance(part, Stop)
        )
        cached, output = prompt // 3, len(spoken) // 4 + 1
        return {
            "uncachedInputTokens": prompt - cached, "cacheReadInputTokens": cached,
            "cacheWriteInputTokens": 0, "outputTokens": output, "totalTokens": prompt + output,
        }  # fmt: skip

    def stop_reason(self) -> str:
        """The last Stop of the parts, or what follows from them."""
        told = [part.reason for part in self.parts if isinstance(part, Stop)]
        return told[-1] if told else "TOOL_USE" if self.calls else "END_TURN"


def _few(pieces: list[str], most: int = 200) -> list[str]:
    """Not more than so many pieces: a test with a huge text need not wait for each word."""
    size = len(pieces) // most + 1
    return ["".join(pieces[at : at + size]) for at in range(0, len(pieces), size)]


def _pieces(text: str, size: int) -> list[str]:
    """Text in pieces of `size` characters."""
    return [text[at : at + size] for at in range(0, len(text), size)]


# ---- Tunnel --------------------------------------------------------------------------------------


class Tunnel(Connection):
    """A connection behind TLS, whose socket cannot be peeked at."""

    def gone(self) -> bool:
        """Whether the client has closed its side; what it sent instead is kept."""
        self.sock.settimeout(0)
        try:
            data = self.sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            self.sock.settimeout(None)
        self.buffer += data
        return not data

    def close(self) -> None:
        """Says goodbye in TLS without waiting for an answer, unless the end is to be a reset."""
        with contextlib.suppress(OSError, ValueError):
            self.sock.settimeout(0)
            linger = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
            if isinstance(self.sock, ssl.SSLSocket) and not struct.unpack("ii", linger)[0]:
                self.sock.unwrap()
        self.sock.close()


# ---- FakeKiro ------------------------------------------------------------------------------------

STREAMING = "AmazonCodeWhispererStreamingService.GenerateAssistantResponse"
BUILDER_START = "https://view.awsapps.com/start"
_DEVICE_CODE = "EXAMPLE-device-code-0123456789"
_SCOPES = {
    f"codewhisperer:{name}"
    for name in ("completions", "analysis", "conversations", "transformations", "taskassist")
}
#: The redirects of the two browser pages. Harder reading: `/login` takes the custom scheme only.
_LOGIN_REDIRECTS = r"kiro://kiro\.kiroAgent/authenticate-success"
_PORTAL_PORTS = "3128|4649|6588|8008|9091|49153|50153|51153|52153|53153"
_PORTAL_REDIRECTS = rf"http://localhost:({_PORTAL_PORTS})"
_SOCIAL = ("google", "github")
_OIDC = ("builder_id", "idc")
_ACCOUNT = "arn:aws:codewhisperer:{}:000000000000:profile/EXAMPLE{}"
_ARN = re.compile(r"arn:aws(-us-gov)?:codewhisperer:[a-z0-9-]+:\d{12}:profile/[A-Za-z0-9]+")


def _json(value: object, status: int = 200) -> Answer:
    headers = {**JSON_TYPE, "x-amzn-requestid": str(uuid.uuid4())}
    return Answer(status, headers, dump(value), chunked=False)


class FakeKiro(FakeService):
    """The server; a context manager. Its lists may be read and its attributes set at any time."""

    def __init__(
        self,
        kind: str = "social",
        *,
        region: str = "us-east-1",
        models: list[Json] | None = None,
        brain: KiroBrain | None = None,
    ) -> None:
        super().__init__()
        self.proxy_url = f"http://{self._open_door(self._tunnel)}"
        #: "builder_id", "idc", "google", "github", "external_idp" or "api_key".
        self.kind = "google" if kind == "social" else kind
        #: Of the account's profile, and of the sign-in: an organisation's is another one.
        self.region = region
        self.sso_region = "eu-west-1" if kind == "idc" else "us-east-1"
        self.start_url = (
            "https://d-example000.awsapps.com/start" if kind == "idc" else BUILDER_START
        )
        #: The right ARN of this account, None where there is none. Builder ID takes the constant.
        self.arn: str | None = _ACCOUNT.format(region, self.kind.replace("_", "").upper())
        if self.kind in ("builder_id", "api_key"):
            self.arn = {"builder_id": BUILDER_ARN}.get(self.kind)
        #: What ListAvailableProfiles tells to the kinds that have profiles.
        self.profiles: list[Json] = [
            {"arn": self.arn, "profileName": "team EXAMPLE", "status": "ACTIVE"}
        ] * (self.kind in ("idc", "external_idp"))
        self.model_list = default_models() if models is None else models
        #: Entries of a page of the model list, 0 for all in one.
        self.page_size = 0
        self.usage_limits = default_usage(time.time())
        self.brain = brain or default_brain

        # Switches. None is what sections 3 and 4.1 of the facts say: the IDE shape needs the ARN,
        # the CLI shape only of people with a real profile or for gated models; the legacy hosts,
        # reached through the proxy, refuse it from Builder ID and organisations.
        self.needs_arn: bool | None = None
        self.refuses_arn: bool | None = None
        #: Shapes of the model call that are served; others answer like an unknown operation.
        self.shapes = {"ide", "cli"}
        #: Shapes whose body is refused (reported of the path-style one, 2026-09).
        self.refused_shapes: set[str] = set()
        #: Host names that the proxy cannot reach; tunnels that are already open answer 503.
        self.dead_hosts: set[str] = set()
        self.suspended = False
        self.out_of_credits = False
        #: Whether a refresh gives a new refresh token and kills the old one.
        self.rotate = True
        #: Closing frames, and events that are to be ignored.
        self.with_metadata = True
        self.with_context = True
        self.with_metering = True
        self.with_oddities = True

        # Answers that take the place of the next ones of their kind.
        self.refresh_answers: deque[Answer] = deque()
        self.models_answers: deque[Answer] = deque()
        self.usage_answers: deque[Answer] = deque()
        self.profiles_answers: deque[Answer] = deque()
        #: `error` values of the next device-flow polls; after them the sign-in succeeds.
        self.device_states = deque(["authorization_pending"])
        #: Answers that take the place of the next polls, before those states.
        self.device_answers: deque[Answer] = deque()
        #: `interval` of the device flow; who polls faster is told of in `violations`.
        self.poll_seconds = 1
        self.expires_in = 600

        self.refreshes = 0
        #: "host:port" of every CONNECT.
        self.connects: list[str] = []
        self.issued = Issued()
        self._forgotten: set[str] = set()
        self._live_tokens: set[str] = set()
        self._all_tokens: set[str] = set()
        self._issues = 0
        self._refresh_token = self._new_refresh_token()
        #: Refresh tokens that are no more, each with the note of its use.
        self._dead_refresh_tokens: dict[str, str] = {}
        self._client = ("EXAMPLEclientid0", "eyJEXAMPLE.client.secret0")
        self._clients = dict([self._client])
        self._polled_at = 0.0
        self._poll_after = 0.0
        #: Sign-in codes of `visit`: code -> (challenge, redirect_uri of the exchange).
        self._codes: dict[str, tuple[str, str]] = {}
        self._told_arn = False
        self._machine = ""
        self._invocations: set[str] = set()

    # What tests call

    @property
    def secrets(self) -> set[str]:
        """All that was handed out and must never be shown."""
        registered = set(self._clients.values()) | {self._client[1]}
        return {
            *self._all_tokens, *registered, *self._dead_refresh_tokens, self._refresh_token,
        }  # fmt: skip

    def token_file(self, **overrides: Any) -> Json:
        """The content of a matching token.json, with a live token; None leaves a key out."""
        content: Json = {
            "type": "kiro", "auth_method": self.kind, "access_token": self._new_access_token(),
            "region": self.region, "expires_at": int(time.time()) + 3600,
        }  # fmt: skip
        if self.kind == "api_key":
            del content["expires_at"]
        else:
            content["refresh_token"] = self._refresh_token
        if self.kind in _OIDC:
            content["client_id"], content["client_secret"] = self._client
            content["idc_region"], content["start_url"] = self.sso_region, self.start_url
        if self.kind == "external_idp":
            content |= {
                "client_id": self._client[0], "token_endpoint": f"{self.url}/idp/token",
                "issuer_url": f"{self.url}/idp", "scope": "openid offline_access",
            }  # fmt: skip
        if self.kind not in ("builder_id", "api_key"):
            content["profile_arn"] = self.arn
        content = {k: v for k, v in {**content, **overrides}.items() if v is not None}
        self._told_arn = self._told_arn or "profile_arn" in content
        return content

    def expire_tokens(self) -> None:
        """Access tokens given out so far are refused; those refusals are no violations."""
        with self._lock:
            self._live_tokens.clear()

    def revoke(self) -> None:
        """The refresh token is dead, by no fault of the client."""
        with self._lock:
            self._dead_refresh_tokens[self._refresh_token] = ""
            self._refresh_token = self._new_refresh_token()

    def refreshed_elsewhere(self) -> Json:
        """Another program took the refresh token and got a new one: its new token.json."""
        self.revoke()
        return self.token_file()

    def forget_signatures(self) -> None:
        """Signatures issued so far are refused as foreign, by no fault of the client."""
        self._forgotten |= set(self.issued.texts)

    def visit(self, url: str) -> str:
        """Plays the browser at a social sign-in page: the URL that it is sent back to."""
        parts = urlsplit(url)
        asked = dict(parse_qsl(parts.query, strict_parsing=True))
        portal = parts.path == "/signin"
        redirect = asked.get("redirect_uri", "")
        allowed = _PORTAL_REDIRECTS if portal else _LOGIN_REDIRECTS
        if parts.path not in ("/signin", "/login") or not re.fullmatch(allowed, redirect):
            self.violate(f"the sign-in page {parts.path} refuses to send to {redirect}")
        if not portal and asked.get("idp") not in ("Google", "Github"):
            self.violate(f"the sign-in page knows no idp {asked.get('idp')}")
        if asked.get("code_challenge_method") != "S256" or not asked.get("state"):
            self.violate("the sign-in page was asked without S256 or without state")
        code = f"EXAMPLEcode{len(self._codes)}"
        back = {"code": code, "state": asked.get("state", "")}
        if portal:
            back["login_option"] = self.kind
            redirect += "/oauth/callback"
        exchanged = f"{redirect}?login_option={self.kind}" if portal else redirect
        self._codes[code] = (asked.get("code_challenge", ""), exchanged)
        return f"{redirect}?{urlencode(back)}"

    # Connections

    def is_call(self, seen: Seen) -> bool:
        """A model call in either shape."""
        path = seen.path.partition("?")[0]
        named = path == "/" and seen.headers.get("x-amz-target") == STREAMING
        return seen.method == "POST" and (named or path == "/generateAssistantResponse")

    def _tunnel(self, sock: socket.socket, number: int) -> None:
        """Serves one connection of the proxy: a CONNECT, then TLS in the name of that host."""
        with contextlib.suppress(OSError):
            via = self._connect(sock)
            if not via:
                return sock.close()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATES / "kiro.pem")
            context.set_alpn_protocols(["http/1.1"])
            context.sni_callback = lambda _, name, __: self.violate(
                "" if name == via else f"TLS asks for {name} inside a tunnel to {via}"
            )
            with self._lock:
                secured = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                self._sockets.append(secured)
            try:
                secured.settimeout(10)
                secured.do_handshake()
                secured.settimeout(None)
            except OSError:
                return secured.close()
            return Tunnel(self, secured, number, via).serve()
        return sock.close()

    def _connect(self, sock: socket.socket) -> str:
        """Reads and answers a CONNECT; the host it asks for, "" when it is refused."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 65536:
            data = sock.recv(65536)
            if not data:
                return ""
            head += data
        asked = re.match(rb"CONNECT (([a-z0-9.-]+):(\d+)) HTTP/1\.[01]\r\n", head)
        if not asked or not head.endswith(b"\r\n\r\n"):
            self.violate(f"the proxy was sent {head[:80]!r}")
            status = "405 Method Not Allowed"
        else:
            target, host = asked[1].decode(), asked[2].decode()
            with self._news:
                self.connects.append(target)
                self._news.notify_all()
            if host in self.dead_hosts:
                status = "503 Service Unavailable"
            elif find_host(host) and asked[3] == b"443":
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                return host
            else:
                self.violate(f"{target} is no place to go")
                status = "502 Bad Gateway"
        sock.sendall(
            f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        return ""

    # Routes

    def route(self, seen: Seen) -> Answer:
        """The answer to one request."""
        path = urlsplit(seen.path).path
        try:
            plane, serve = self._find_route(seen, path)
            self._check_host(seen, plane)
            self._check_secrets(seen, plane)
            self._note_headers(seen, plane)
            return serve(seen)
        except Fault as fault:
            fault.rpc = path == "/"
            raise

    def _find_route(self, seen: Seen, path: str) -> tuple[str, Callable[[Seen], Answer]]:
        target = seen.headers.get("x-amz-target")
        routes: dict[tuple[str, str], tuple[str, Callable[[Seen], Answer]]] = {
            ("POST", "/client/register"): ("oidc", self._register),
            ("POST", "/device_authorization"): ("oidc", self._device_code),
            ("POST", "/token"): ("oidc", self._oidc_token),
            ("POST", "/oauth/token"): ("desktop", self._social_token),
            ("POST", "/refreshToken"): ("desktop", self._social_refresh),
            ("POST", "/idp/token"): ("idp", self._idp_token),
            ("POST", "/generateAssistantResponse"): ("ide", self._generate_ide),
            ("GET", "/ListAvailableModels"): ("control", self._models),
            ("GET", "/List-Available-Models"): ("control", self._models),
            ("GET", "/getUsageLimits"): ("control", self._usage),
            ("GET", "/Get-Usage-Limits"): ("control", self._usage),
            ("POST", "/ListAvailableProfiles"): ("control", self._profiles),
            ("POST", "/List-Available-Profiles"): ("control", self._profiles),
        }
        operations: dict[str, tuple[str, Callable[[Seen], Answer]]] = {
            STREAMING: ("cli", self._generate_cli),
            "AmazonCodeWhispererService.ListAvailableModels": ("control", self._models),
            "AmazonCodeWhispererService.GetUsageLimits": ("control", self._usage),
            "KiroControlPlaneBearerService.GetUsageLimits": ("control", self._usage),
            "AmazonCodeWhispererService.ListAvailableProfiles": ("control", self._profiles),
        }
        if (seen.method, path) == ("POST", "/") and target in operations:
            return operations[target]
        if (seen.method, path) not in routes:
            raise unknown_operation(f"{seen.method} {seen.path} with target {target}: unknown")
        if target is not None:
            raise denied(f"{seen.path} with the target {target}", "User is not authorized.")
        return routes[seen.method, path]

    def _check_host(self, seen: Seen, plane: str) -> None:
        """The host that was asked is alive and serves this; directly everything is served."""
        if seen.headers["host"].removesuffix(":443" if seen.via else "") != (seen.via or self.host):
            raise plain(421, "Misdirected Request", f"{seen.headers['host']} asked at {seen.via}")
        if not seen.via:
            return
        if seen.via in self.dead_hosts:
            raise Fault(503, "ServiceUnavailableException", "Service is unavailable.", None, "")
        planes, region = find_host(seen.via) or (set(), "")
        if plane not in planes:
            raise unknown_operation(f"{seen.via} does not serve {seen.path}")
        # Harder reading: the control plane of the legacy host is retired in eu-central-1.
        if plane == "control" and seen.via == "q.eu-central-1.amazonaws.com":
            raise unknown_operation("")
        if plane == "oidc" and region != self.sso_region:
            raise oidc("invalid_request", f"{seen.via} is not where this account signs in")
        if plane in ("ide", "cli") and region != self.region:
            raise denied(f"{seen.via} is not the region of this account", "Invalid token")

    def _check_secrets(self, seen: Seen, plane: str) -> None:
        """What is told to one service is not told to another."""
        everything = seen.raw + dump([seen.path, seen.headers])
        signs_in = plane in ("oidc", "desktop", "idp")
        secrets = {"refresh token": self._refresh_token, "client secret": self._client[1]}
        if not signs_in:
            for what, secret in secrets.items():
                if secret.encode() in everything:
                    self.violate(f"the {what} was sent to {seen.path}")
        elif "authorization" in seen.headers:
            self.violate(f"an Authorization header was sent to {seen.path}")
        beside = seen.raw + seen.path.encode()
        if any(token.encode() in beside for token in self._all_tokens):
            self.violate(f"an access token outside its header was sent to {seen.path}")

    def _note_headers(self, seen: Seen, plane: str) -> None:
        notes, machines = header_notes(seen, plane)
        with self._lock:
            for machine in machines:
                if self._machine not in ("", machine):
                    notes.append(f"the machine id changed to {machine}")
                self._machine = machine
            asked = seen.headers.get("amz-sdk-invocation-id")
            if asked is None and plane not in ("ide", "cli"):
                pass
            elif not is_uuid4(asked) or asked in self._invocations:
                notes.append(f"amz-sdk-invocation-id is no UUID 4, or used twice: {asked}")
            self._invocations.add(str(asked))
        for note in notes:
            self.violate(note)

    # Sign-in

    def _new_access_token(self) -> str:
        with self._lock:
            self._issues += 1
            name = "ksk" if self.kind == "api_key" else "aoa"
            token = f"{name}_EXAMPLE{self._issues:04}{uuid.uuid4().hex}"
            self._live_tokens.add(token)
            self._all_tokens.add(token)
            return token

    @staticmethod
    def _new_refresh_token() -> str:
        return "aorEXAMPLE" + uuid.uuid4().hex * 4

    @staticmethod
    def _fields(seen: Seen, needed: str, optional: str = "") -> Json:
        """The members of a JSON body, exactly those that a sign-in service knows."""
        body, known = seen.body, set(needed.split())
        if not isinstance(body, dict) or "application/json" not in seen.headers.get(
            "content-type", ""
        ):
            raise oidc("invalid_request", "no JSON object, or not called so")
        if known - set(body) or set(body) - known - set(optional.split()):
            raise oidc("invalid_request", f"{seen.path} with the keys {sorted(body)}")
        return body

    def _check_client(self, fields: Json) -> None:
        if self._clients.get(fields["clientId"]) != fields["clientSecret"]:
            raise oidc("invalid_client", "Invalid client provided")

    def _register(self, seen: Seen) -> Answer:
        optional = "grantTypes issuerUrl redirectUris"
        fields = self._fields(seen, "clientName clientType scopes", optional)
        scopes = fields["scopes"]
        if fields["clientType"] != "public" or not fields["clientName"]:
            raise oidc("invalid_request", "a client of another type or without a name")
        if not isinstance(scopes, list) or not {*scopes} <= _SCOPES or len(scopes) < 3:
            raise oidc("invalid_scope", f"the scopes {scopes}")
        with self._lock:
            number, now = len(self._clients), int(time.time())
            self._clients[f"EXAMPLEclientid{number}"] = f"eyJEXAMPLE.client.secret{number}"
        return _json({
            "clientId": f"EXAMPLEclientid{number}",
            "clientSecret": f"eyJEXAMPLE.client.secret{number}",
            "clientIdIssuedAt": now, "clientSecretExpiresAt": now + 90 * 86400,
        })  # fmt: skip

    def _device_code(self, seen: Seen) -> Answer:
        fields = self._fields(seen, "clientId clientSecret startUrl")
        self._check_client(fields)
        if fields["startUrl"].rstrip("/") != self.start_url:
            raise oidc("invalid_request", f"the start URL {fields['startUrl']}")
        page = f"https://device.sso.{self.sso_region}.amazonaws.com/"
        self._poll_after, self._polled_at = float(self.poll_seconds), time.monotonic()
        return _json({
            "deviceCode": _DEVICE_CODE, "userCode": "ABCD-EFGH", "verificationUri": page,
            "verificationUriComplete": f"{page}?user_code=ABCD-EFGH",
            "expiresIn": self.expires_in, "interval": self.poll_seconds,
        })  # fmt: skip

    def _oidc_token(self, seen: Seen) -> Answer:
        kind = seen.body.get("grantType") if isinstance(seen.body, dict) else None
        if kind == "refresh_token":
            return self._refresh(self._check_oidc_refresh, seen, _OIDC)
        if kind != "urn:ietf:params:oauth:grant-type:device_code":
            raise oidc("unsupported_grant_type", f"the grant type {kind}")
        fields = self._fields(seen, "clientId clientSecret grantType deviceCode")
        self._check_client(fields)
        if fields["deviceCode"] != _DEVICE_CODE:
            raise oidc("invalid_grant", "Invalid device code provided")
        now = time.monotonic()
        if now - self._polled_at < self._poll_after - 0.1:
            self.violate(f"polled again after {now - self._polled_at:.2f} seconds")
        self._polled_at = now
        if self.device_answers:
            return self.device_answers.popleft()
        if self.device_states:
            state = self.device_states.popleft()
            self._poll_after += 5 * (state == "slow_down")
            raise oidc(state, state.replace("_", " "), "")
        self._client = (fields["clientId"], fields["clientSecret"])
        return _json(self._tokens(fresh=True))

    def _tokens(self, fresh: bool) -> Json:
        """The answer to a sign-in or refresh, in camelCase; `fresh` brings a new refresh token."""
        with self._lock:
            if fresh:
                self._dead_refresh_tokens[self._refresh_token] = "a refresh token was used twice"
                self._refresh_token = self._new_refresh_token()
            new = {"refreshToken": self._refresh_token} if fresh else {}
            return {"accessToken": self._new_access_token(), "expiresIn": 3600, **new}

    def _refresh(self, check: Callable[[Seen], Json], seen: Seen, kinds: tuple[str, ...]) -> Answer:
        """The answer to a refresh in the words of its service; `check` gives the fields."""

        def checked() -> None:
            if self.kind not in kinds:
                raise oidc("invalid_grant", f"{seen.path} is not where {self.kind} refreshes")
            told = check(seen)["refreshToken"]
            if told != self._refresh_token:
                note = self._dead_refresh_tokens.get(told, "an unknown refresh token")
                raise oidc("invalid_grant", "Invalid refresh token provided", note)

        with self._lock:
            self.refreshes += 1
            prepared = self._take(self.refresh_answers, checked)
            return prepared or _json({**self._tokens(self.rotate), "tokenType": "Bearer"})

    def _check_oidc_refresh(self, seen: Seen) -> Json:
        fields = self._fields(seen, "clientId clientSecret refreshToken grantType")
        self._check_client(fields)
        if fields["clientId"] != self._client[0]:
            raise oidc("invalid_grant", "the refresh token belongs to another client")
        return fields

    def _social_refresh(self, seen: Seen) -> Answer:
        try:
            answer = self._refresh(lambda s: self._fields(s, "refreshToken"), seen, _SOCIAL)
        except SignInFault as fault:
            raise SignInFault(401, {"message": "Invalid refresh token"}, fault.note) from None
        body = answer.body if isinstance(answer.body, bytes) else b""
        if answer.status == 200 and body.startswith(b"{") and "x-amzn-requestid" in answer.headers:
            self._told_arn = True
            return _json({**json.loads(body), "profileArn": self.arn, "csrfToken": "EXAMPLEcsrf"})
        return answer

    def _social_token(self, seen: Seen) -> Answer:
        fields = self._fields(seen, "code code_verifier redirect_uri", "invitation_code")
        challenge, redirect = self._codes.pop(fields["code"], ("", ""))
        digest = hashlib.sha256(fields["code_verifier"].encode()).digest()
        proof = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        if not challenge or proof != challenge or fields["redirect_uri"] != redirect:
            note = f"/oauth/token: {fields['redirect_uri']} for {redirect}, or a wrong code"
            raise SignInFault(401, {"message": "Invalid code or redirect_uri"}, note)
        self._told_arn = True
        more = {"profileArn": self.arn, "csrfToken": "EXAMPLEcsrf"}
        return _json({**self._tokens(fresh=True), **more})

    def _check_idp(self, seen: Seen) -> Json:
        if seen.headers.get("content-type", "").split(";")[0] != (
            "application/x-www-form-urlencoded"
        ):
            raise oidc("invalid_request", "the identity provider takes forms only")
        form = dict(parse_qsl(seen.raw.decode(), keep_blank_values=True))
        if set(form) - {"scope"} != {"grant_type", "client_id", "refresh_token"}:
            raise oidc("invalid_request", f"/idp/token with the keys {sorted(form)}")
        if form["grant_type"] != "refresh_token" or form["client_id"] != self._client[0]:
            raise oidc("invalid_client", f"{form['grant_type']} of {form['client_id']}")
        return {"refreshToken": form["refresh_token"]}

    def _idp_token(self, seen: Seen) -> Answer:
        answer = self._refresh(self._check_idp, seen, ("external_idp",))
        for camel, snake in (("accessToken", "access_token"), ("refreshToken", "refresh_token"),
                             ("expiresIn", "expires_in"), ("tokenType", "token_type")):  # fmt: skip
            if isinstance(answer.body, bytes):
                answer.body = answer.body.replace(camel.encode(), snake.encode())
        return answer

    # Access

    def _check_access(self, seen: Seen) -> None:
        """The token, the headers that go with its kind, and whether the account is in order."""
        headers = seen.headers
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise denied(f"no bearer token on {seen.path}", "Missing Authentication Token")
        if token not in self._live_tokens:
            raise denied("" if token in self._all_tokens else "not an access token from here")
        if headers.get("tokentype") != TOKEN_TYPES.get(self.kind):
            raise denied(f"tokentype is {headers.get('tokentype')} for {self.kind}")
        if "redirect-for-internal" in headers:
            self.violate("redirect-for-internal is for the staff of AWS")
        if self.suspended:
            text = "Your User ID (EXAMPLE) temporarily is suspended. We detected unusual user "
            text += "activity and locked it as a security precaution."
            raise denied("", text, "TEMPORARILY_SUSPENDED")

    def _check_arn(self, seen: Seen, told: str | None, needed: bool) -> None:
        """The profile ARN of a request, by the kind of account."""
        header = seen.headers.get("x-amzn-kiro-profile-arn")
        if header is not None and header != told:
            self.violate(f"x-amzn-kiro-profile-arn is {header}, the request says {told}")
        needed = needed if self.needs_arn is None else self.needs_arn
        if told is None:
            if needed and self.refuses_arn is not True:
                # Who needs it by the rules should have known; a switch or a gated model surprises.
                known = self.arn is not None and self.needs_arn is None
                text = "profileArn is required for this request."
                raise Fault(400, "ValidationException", text, None, text if known else "")
            return
        if not _ARN.fullmatch(told):
            raise invalid("Invalid profileArn.", "REQUEST_BODY_INVALID", f"profileArn {told!r}")
        if self.kind == "api_key":
            raise denied("an API key with a profileArn")
        legacy = is_legacy(seen) and self.kind in _OIDC
        if self.refuses_arn or (self.refuses_arn is None and legacy):
            raise denied("")
        if told == SOCIAL_ARN and self.kind in _SOCIAL:
            if self._told_arn:
                self.violate("the social constant instead of the account's own profileArn")
        elif told != self.arn:
            raise denied(f"the profileArn {told} belongs to somebody else")

    # Control plane

    def _asked(self, seen: Seen) -> Json:
        """The parameters of a control request, from its query or its body."""
        if seen.method == "POST":
            if seen.headers.get("content-type", "").split(";")[0] not in CONTENT_TYPES.values():
                raise improper("a body that is not called JSON")
            return read_body(seen.raw)
        if seen.raw:
            self.violate(f"GET {seen.path} with a body")
        query = parse_qs(urlsplit(seen.path).query, keep_blank_values=True)
        if again := [name for name, values in query.items() if len(values) > 1]:
            raise improper(f"{again[0]} twice in a query")
        return {name: values[0] for name, values in query.items()}

    def _check_asked(self, seen: Seen, known: str, needs_arn: bool) -> Json:
        self._check_access(seen)
        asked = self._asked(seen)
        if unknown := sorted(set(asked) - set(known.split())):
            raise improper(f"{seen.path}: the parameter {unknown[0]}")
        origins = ("AI_EDITOR", "KIRO_CLI", "CLI", "IDE")
        bare = seen.headers.get("x-amz-target", "").startswith("KiroControlPlane")
        if "origin" in known.split() and not bare and asked.get("origin") not in origins:
            raise improper(f"{seen.path}: the origin {asked.get('origin')}")
        if not str(asked.get("maxResults", 1)).isdigit() or not (
            1 <= int(asked.get("maxResults", 1)) <= 100
        ):
            raise improper(f"{seen.path}: maxResults {asked['maxResults']}")
        if "profileArn" in known.split():
            self._check_arn(seen, asked.get("profileArn"), needs_arn)
        return asked

    def _page(self, asked: Json) -> Json:
        """A page of the model list."""
        start = int(str(asked.get("nextToken", "EXAMPLE-0")).removeprefix("EXAMPLE-"))
        size = min(self.page_size or len(self.model_list) or 1, int(asked.get("maxResults", 100)))
        more = start + size < len(self.model_list)
        return {
            "models": self.model_list[start : start + size],
            "defaultModel": {"modelId": "auto"},
            "nextToken": f"EXAMPLE-{start + size}" if more else None,
        }

    def _models(self, seen: Seen) -> Answer:
        known = "origin profileArn maxResults nextToken modelProvider"
        asked: Json = {}

        def check() -> None:
            # Who has an ARN of their own must tell it; Builder ID and API keys need none here.
            needs = self.kind not in ("builder_id", "api_key")
            asked.update(self._check_asked(seen, known, needs))

        return self._take(self.models_answers, check) or _json(self._page(asked))

    def _usage(self, seen: Seen) -> Answer:
        known = "origin resourceType profileArn isEmailRequired"
        asked: Json = {}

        def check() -> None:
            asked.update(self._check_asked(seen, known, needs_arn=False))
            if asked.get("resourceType", "CREDIT") not in ("CREDIT", "AGENTIC_REQUEST"):
                raise improper(f"resourceType {asked['resourceType']}")

        prepared = self._take(self.usage_answers, check)
        limits = copy.deepcopy(self.usage_limits)
        if str(asked.get("isEmailRequired")).lower() != "true":
            limits.get("userInfo", {}).pop("email", None)
        return prepared or _json(limits)

    def _profiles(self, seen: Seen) -> Answer:
        def check() -> None:
            if self.kind == "external_idp" and "tokentype" not in seen.headers:
                return  # the list is empty then: see below
            self._check_asked(seen, "maxResults nextToken", needs_arn=False)
            if self.kind == "builder_id":
                text = "AWS Builder ID is not supported for this operation."
                raise denied("", text, "FEATURE_NOT_SUPPORTED")

        prepared = self._take(self.profiles_answers, check)
        _, region = find_host(seen.via) or ((), "")
        found = [p for p in self.profiles if not region or f":{region}:" in p["arn"]]
        if self.kind == "external_idp" and "tokentype" not in seen.headers:
            self.violate("ListAvailableProfiles of an external IdP without TokenType")
            found = []
        return prepared or _json({"profiles": found, "nextToken": None})

    # Generation

    def _generate_ide(self, seen: Seen) -> Answer:
        return self._generate(seen, "ide")

    def _generate_cli(self, seen: Seen) -> Answer:
        return self._generate(seen, "cli")

    def _generate(self, seen: Seen, plane: str) -> Answer:
        if plane not in self.shapes:
            raise unknown_operation("")
        if plane in self.refused_shapes:
            refusal = improper("a shape that is refused", "REQUEST_BODY_INVALID")
            refusal.note = ""
            raise refusal
        prepared = self._take(self._queue, lambda: self._check_call(seen, plane))
        answer = prepared or self._imitate(seen, plane)
        body = b"".join(answer.pieces())
        if answer.status >= 400 or body.lstrip().startswith(b"{"):
            kind = CONTENT_TYPES[plane]
        else:
            kind = "application/vnd.amazon.eventstream"
        told = {name.lower() for name in answer.headers}
        headers = {
            "Content-Type": kind,
            "x-amzn-RequestId": str(uuid.uuid4()),
            "x-amzn-codewhisperer-conversation-id": self._conversation(seen),
        }
        ours = {name: value for name, value in headers.items() if name.lower() not in told}
        return replace(answer, headers={**ours, **answer.headers})

    @staticmethod
    def _conversation(seen: Seen) -> str:
        state = seen.body.get("conversationState") if isinstance(seen.body, dict) else None
        told = state.get("conversationId") if isinstance(state, dict) else None
        return str(told or uuid.uuid4())

    def _check_call(self, seen: Seen, plane: str) -> None:
        """Everything about a model call."""
        if "content-encoding" in seen.headers:
            raise improper("a compressed body", "REQUEST_BODY_INVALID_JSON")
        told = seen.headers.get("content-type", "").split(";")[0].strip()
        if told not in CONTENT_TYPES.values():
            raise improper(f"a body called {told}", "REQUEST_BODY_INVALID_JSON")
        if told != CONTENT_TYPES[plane]:
            self.violate(f"{plane}: a body called {told}")
        self._check_access(seen)
        body = read_body(seen.raw)
        check_shape(body, "request")
        notes = check_turns(body)
        model = check_origin_and_model(body, plane, self.model_list)
        runtime_key = self.kind == "api_key" and plane == "ide" and seen.via.startswith("runtime.")
        if runtime_key:
            text = "profileArn is required for this request."
            note = "an API key in the IDE shape, which runtime refuses"
            raise Fault(400, "ValidationException", text, None, note)
        if plane == "ide":
            needs_arn = self.kind != "api_key" and not (is_legacy(seen) and self.kind in _OIDC)
        else:
            bare = self.kind in ("builder_id", "api_key")
            needs_arn = not bare or model["modelId"] in GATED
        self._check_arn(seen, body.get("profileArn"), needs_arn)
        check_tools(body)
        check_images(body, model)
        check_fields(body, model)
        check_reasoning(body, self.issued, self._forgotten)
        check_size(body, model)
        for note in notes + tag_notes(body, model):
            self.violate(note)
        if self.out_of_credits:
            text = "You have reached the limit."
            kind, reason = "ServiceQuotaExceededException", "MONTHLY_REQUEST_COUNT"
            raise Fault(402, kind, text, reason, "")

    def _imitate(self, seen: Seen, plane: str) -> Answer:
        """The brain's answer as an event stream, cut without regard to its frames."""
        body = read_body(seen.raw)
        name = current(body)["modelId"]
        model = next(m for m in self.model_list if m["modelId"] == name)
        parts = self.brain(copy.deepcopy(body))
        with self._lock:
            voice = KiroVoice(parts, body, model, self.issued)
            stream = self._opening(seen, plane) + b"".join(voice.content()) + self._closing(voice)
        return Answer(200, {}, drip(stream, max(701, len(stream) // 200)))

    def _opening(self, seen: Seen, plane: str) -> bytes:
        """What comes before the answer."""
        names = {"conversationId": self._conversation(seen), "utteranceId": str(uuid.uuid4())}
        opened = frame("messageMetadataEvent", names)
        if plane == "cli":
            opened = frame("initial-response", {}, "application/x-amz-json-1.0") + opened
        return opened

    def _closing(self, voice: KiroVoice) -> bytes:
        """What comes after the answer; credits in two halves, which have to be added up."""
        usage, closing = voice.usage(), b""
        used = round(100 * usage["totalTokens"] / window_of(voice.model), 4)
        if self.with_oddities:
            followup = {"content": "This is no answer.", "userIntent": "EXPLAIN_CODE_SELECTION"}
            closing += frame("followupPromptEvent", {"followupPrompt": followup})
            closing += frame("exampleUnknownEvent", {"content": "Nor is this."})
        if self.with_context:
            closing += frame("contextUsageEvent", {"contextUsagePercentage": used})
        if self.with_metering:
            credit = {"unit": "credit", "unitPlural": "credits"}
            closing += frame("meteringEvent", {**credit, "usage": 0.03125})
            closing += frame("meteringEvent", {**credit, "usage": 0.0625})
        if self.with_metadata:
            told = {"stopReason": voice.stop_reason(), "tokenUsage": usage}
            closing += frame("metadataEvent", told)
        return closing
