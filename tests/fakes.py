"""A strict imitation of GitHub and of the Copilot service, for tests, on 127.0.0.1.

One server plays github.com, api.github.com and the Copilot API; its token answer names itself as
`endpoints.api`. It refuses what the real service refuses, answers with the real service's oddities,
and writes down in `fake.violations` everything that a well-behaved client does not do: refusals,
and some things that the real service lets pass (a wrong X-Initiator, a request id used twice).

    with FakeCopilot() as fake:
        ...point the gateway at fake.url...
        fake.queue(Answer(429, {"Retry-After": "2"}, b"slow down"))  # instead of an imitation
        assert fake.violations == []
        assert fake.calls[0].body["model"] == "gpt-4.1"

What is here, in this order:
    Answers and parts    what tests hand in and get back
    Frames               bytes of a stream, and ways to cut them
    Models               the catalogue that is served
    Refusals             the error bodies of the service
    Looking at bodies    images, text, last item
    Rules                of HTTP, of identity headers, and one part for each endpoint
    Imitation            the default brain, usage, the three dialects it is spoken in, embeddings
    Connection           reading requests, writing answers byte by byte
    FakeService          a server on loopback: its doors, lists and queue, for any imitation
    FakeCopilot          the routes of this one

Facts about the service are from public sources up to 2026-09. Where they leave a choice, this file
takes the harder one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import copy
import hashlib
import json
import re
import secrets
import select
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import responses
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

Json = dict[str, Any]
Names = frozenset[str]

#: How long a connection waits for a test that forgot to set `pause`, or behind `then="hang"`.
PATIENCE_SECONDS = 30.0
#: How often a waiting connection looks whether its client is still there.
LOCK_PROBE_SECONDS = 0.01
#: Older `X-GitHub-Api-Version` values answer 466; the oldest one that clients still used in 2026.
OLDEST_API_VERSION = "2025-05-01"

# ---- Answers and parts ---------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """One HTTP answer, written piece by piece, one send each."""

    #: 0 writes no head: the pieces are all that goes over the wire.
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | list[bytes] = b""
    #: Waited for before every piece but the first; after an empty first piece the head waits alone.
    pause: threading.Event | None = None
    #: "keep" ends the body properly; "close" and "reset" (RST) end the connection after the last
    #: piece, so that a chunked body lacks its end; "hang" stays silent until the client leaves.
    then: str = "keep"
    #: False sends Content-Length or, with then="close", a body that ends with the connection.
    chunked: bool = True
    #: False skips every check of the request that gets this answer.
    strict: bool = True
    #: True: the pieces already hold the chunk framing (see `chunk`), for cuts inside it.
    framed: bool = False

    def pieces(self) -> list[bytes]:
        """The body as a list of the sends to make."""
        return [self.body] if isinstance(self.body, bytes) else self.body


@dataclass(slots=True)
class Seen:
    """One request as it arrived; header names in lower case, repeated ones joined by ", "."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    raw: bytes
    connection: int
    #: Host name of the CONNECT tunnel it came through, "" when it came directly.
    via: str = ""


@dataclass(slots=True)
class Say:
    """Text of the answer."""

    text: str


@dataclass(slots=True)
class Think:
    """A thought; without a signature it gets a fresh one. Given signatures count as issued too.

    On /responses the signature is its encrypted content, and paragraphs are parts of its summary.
    """

    text: str
    signature: str | None = None
    #: True: a stream of /responses tells the summary only when the thought is done, as happens.
    late: bool = False


@dataclass(slots=True)
class Call:
    """A tool call."""

    name: str
    arguments: Json
    id: str | None = None


@dataclass(slots=True)
class CustomCall:
    """A call of a custom tool, whose input is plain text; only /responses knows it."""

    name: str
    input: str
    id: str | None = None


@dataclass(slots=True)
class Stop:
    """A stop reason in the words of the dialect, instead of the one that follows from the parts.

    On /responses "max_output_tokens" and "content_filter" make the answer incomplete; any other
    reason is the error code of a failed one.
    """

    reason: str


Part = Say | Think | Call | Stop
AnyPart = Part | CustomCall
#: (dialect "chat", "messages" or "responses", request body) -> what to answer
Brain = Callable[[str, Json], Sequence[AnyPart]]

# ---- Frames --------------------------------------------------------------------------------------


def dump(value: object) -> bytes:
    """Compact JSON in UTF-8, not escaped, so that characters of several bytes stay such."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(*objects: Json, done: bool = True) -> bytes:
    """Frames of a chat stream."""
    return b"".join(b"data: %s\n\n" % dump(o) for o in objects) + b"data: [DONE]\n\n" * done


def events(*objects: Json) -> bytes:
    """Frames of an Anthropic stream, with `event:` lines taken from each `type`."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (o["type"].encode(), dump(o)) for o in objects)


def numbered(*objects: Json, first: int = 0) -> bytes:
    """Frames of a Responses stream: as `events`, with a `sequence_number` in each."""
    return events(*({**o, "sequence_number": n} for n, o in enumerate(objects, first)))


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body; `chunk(b"")` is the end of the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def drip(data: bytes, size: int = 1) -> list[bytes]:
    """`data` in pieces of `size` bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


# ---- Models --------------------------------------------------------------------------------------

_TIERED = {
    "batch_size": 1_000_000,
    "default": {"input_price": 300, "output_price": 1500, "cache_read_price": 30,
                "cache_write_price": 375, "max_prompt_tokens": 168_000},
    "long_context": {"input_price": 600, "output_price": 2250, "cache_read_price": 60,
                     "cache_write_price": 750, "max_prompt_tokens": 936_000},
}  # fmt: skip
_FLAT = {
    "batch_size": 1_000_000,
    "input_price": 200 * 10**9,
    "output_price": 800 * 10**9,
    "cache_price": 50 * 10**9,
}
_VISION = {
    "max_prompt_image_size": 3_145_728,
    "max_prompt_images": 5,
    "supported_media_types": ["image/jpeg", "image/png", "image/webp", "image/gif"],
}
_BOTH = ["/chat/completions", "/v1/messages"]
_BUDGET = {"min_thinking_budget": 1024, "max_thinking_budget": 32_000}


def _model(
    name: str,
    vendor: str,
    endpoints: list[str] | None = None,
    limits: tuple[int, int] = (128_000, 16_000),
    prices: Json | None = None,
    vision: bool = True,
    supports: Mapping[str, Any] | None = None,
) -> Json:
    """One entry of the list; `limits` are the most prompt and output tokens."""
    entry: Json = {
        "id": name, "object": "model", "name": name.replace("-", " ").title(), "vendor": vendor,
        "version": name, "preview": name.endswith("-preview"), "model_picker_enabled": True,
        "billing": {"is_premium": True, "multiplier": 1, "token_prices": prices or _TIERED},
        "capabilities": {
            "object": "model_capabilities", "type": "chat", "family": name,
            "tokenizer": "o200k_base",
            "limits": {"max_context_window_tokens": sum(limits), "max_prompt_tokens": limits[0],
                       "max_output_tokens": limits[1]},
            "supports": {"streaming": True, "tool_calls": True, "parallel_tool_calls": True,
                         **(supports or {})},
        },
    }  # fmt: skip
    if endpoints:
        entry["supported_endpoints"] = endpoints
    if vision:
        entry["capabilities"]["supports"]["vision"] = True
        entry["capabilities"]["limits"]["vision"] = _VISION
    if vendor == "Anthropic":
        entry["capabilities"]["limits"]["max_non_streaming_output_tokens"] = 16_000
    return copy.deepcopy(entry)


def default_models() -> list[Json]:
    """A list as odd as real ones: a duplicate, a nameless entry, missing keys, two price forms."""
    effort = ["low", "medium", "high"]
    formats = {"structured_outputs": True}
    responses_only = ["/responses", "ws:/responses"]
    gpt4o = _model("gpt-4o", "Azure OpenAI", prices=_FLAT)
    locked = _model("claude-sonnet-4", "Anthropic", _BOTH, supports=_BUDGET)
    locked["policy"] = {
        "state": "unconfigured",
        "terms": "Enable access to Claude Sonnet 4. [Learn more](https://example.com)",
    }
    unbilled = _model("grok-code-fast-1", "xAI", ["/chat/completions"], vision=False)
    del unbilled["billing"]
    embeddings = _model("text-embedding-3-small", "Azure OpenAI", prices=_FLAT, vision=False)
    embeddings["capabilities"] = {
        "type": "embeddings", "family": "text-embedding-3-small",
        "limits": {"max_inputs": 512}, "supports": {"dimensions": True},
    }  # fmt: skip
    return [
        _model("claude-sonnet-4.5", "Anthropic", _BOTH, (168_000, 16_000), supports=_BUDGET),
        _model("claude-opus-4.8", "Anthropic", _BOTH[::-1], (168_000, 32_000),
               supports={"adaptive_thinking": True, "reasoning_effort": effort}),
        _model("claude-haiku-4.5", "Anthropic", _BOTH, (136_000, 64_000), supports=_BUDGET),
        _model("gpt-4.1", "Azure OpenAI", prices=_FLAT),
        gpt4o,
        {**gpt4o, "name": "GPT-4o (second entry)"},
        _model("gpt-5.2", "OpenAI", ["/chat/completions", "/responses", "ws:/responses"],
               (128_000, 64_000),
               supports={**formats, "reasoning_effort": ["none", *effort, "xhigh"]}),
        _model("gpt-5.3-codex", "OpenAI", responses_only, (272_000, 128_000),
               supports={**formats, "reasoning_effort": [*effort, "xhigh"]}),
        _model("gpt-5.4", "OpenAI", responses_only, (272_000, 128_000),
               supports={**formats, "reasoning_effort": ["none", *effort, "xhigh"]}),
        _model("gemini-3.1-pro-preview", "Google", ["/chat/completions"], (136_000, 64_000),
               supports={"min_thinking_budget": 256, "max_thinking_budget": 32_000}),
        embeddings,
        {"object": "model", "name": "An entry without an id", "vendor": "Nobody"},
        locked,
        unbilled,
    ]  # fmt: skip


def supports(model: Json, name: str) -> Any:
    """What the catalogue says under capabilities.supports, None when it says nothing."""
    return model.get("capabilities", {}).get("supports", {}).get(name)


def limit(model: Json, name: str) -> int:
    """A limit of the catalogue; a missing one is no limit."""
    return int(model.get("capabilities", {}).get("limits", {}).get(name) or 10**9)


def claude_version(model: Json) -> tuple[int, int]:
    """(4, 5) of claude-sonnet-4.5, (0, 0) of what is no Claude."""
    found = re.match(r"claude-[a-z]+-(\d+)(?:[.-](\d{1,2}))?(?!\d)", model["id"])
    return (int(found.group(1)), int(found.group(2) or 0)) if found else (0, 0)


def is_claude(model: Json) -> bool:
    """Claude has its own habits on every endpoint."""
    return bool(model.get("vendor") == "Anthropic")


def is_openai(model: Json) -> bool:
    """The vendor is spelled in two ways."""
    return model.get("vendor") in ("OpenAI", "Azure OpenAI")


def is_google(model: Json) -> bool:
    """Gemini's validator is the strictest."""
    return bool(model.get("vendor") == "Google")


# ---- Refusals ------------------------------------------------------------------------------------


class Refusal(Exception):
    """An error answer; `note` goes into `violations`, "" stands for what the test itself caused."""

    def __init__(self, status: int, body: bytes, note: str) -> None:
        super().__init__(note)
        self.status = status
        self.body = body
        self.note = note

    def answer(self) -> Answer:
        """JSON or not, the service calls it text/plain."""
        kind = "text/html" if self.body.startswith(b"<") else "text/plain; charset=utf-8"
        return Answer(self.status, {"Content-Type": kind}, self.body, chunked=False)


def plain(status: int, text: str, note: str | None = None) -> Refusal:
    """An error of bare text, with the newline that the service adds."""
    return Refusal(status, text.encode() + b"\n", text if note is None else note)


def capi(status: int, message: str, code: str | None, **more: str) -> Refusal:
    """An error in the service's own form."""
    error = {"message": message, **({} if code is None else {"code": code}), **more}
    return Refusal(status, dump({"error": error}), message)


def bad_body(why: str) -> Refusal:
    """The service never says what it dislikes in a chat body; `violations` does."""
    refusal = capi(400, "invalid request body", "invalid_request_body")
    refusal.note = f"invalid request body: {why}"
    return refusal


def anthropic(message: str, kind: str = "invalid_request_error") -> Refusal:
    """An error in Anthropic's form, as the backends of /v1/messages give it."""
    request = "req_vrtx_" + hashlib.sha256(message.encode()).hexdigest()[:24]
    return Refusal(
        400,
        dump({"type": "error", "error": {"type": kind, "message": message}, "request_id": request}),
        message,
    )


def refused_at(param: str, message: str, code: str | None = "invalid_value") -> Refusal:
    """An error in OpenAI's form, as the backends of /responses give it."""
    return capi(400, message, code, param=param, type="invalid_request_error")


def extra(path: str) -> Refusal:
    """The validator's words for a key that it does not know."""
    return anthropic(f"{path}: Extra inputs are not permitted")


def no_extras(value: Json, known: Names | set[str], where: str = "") -> None:
    """Refuses an object with a key that the validator does not know."""
    if unknown := sorted(set(value) - known):
        raise extra(where + unknown[0])


def wrong_kind(where: str, kind: Any) -> Refusal:
    """The validator's words for a type that it does not expect here."""
    return anthropic(f"{where}: Input tag '{kind}' does not match any of the expected tags")


def wrong_name(where: str, most: str = "{1,64}") -> Refusal:
    """The validator's words for an id or a name with foreign characters."""
    return anthropic(f"{where}: String should match pattern '^[a-zA-Z0-9_-]{most}$'")


_FORBIDDEN = "Access to this endpoint is forbidden. Please review our Terms of Service."


def forbidden(note: str) -> Refusal:
    """The firewall in front of the service: it does not like who is asking."""
    return plain(403, _FORBIDDEN, note)


# ---- Looking at bodies ---------------------------------------------------------------------------


def _parts(content: Any) -> list[Json]:
    """The dict parts of a message's content; a string has none."""
    return [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []


def text_of(content: Any) -> str:
    """All text of a message's content or of a tool result."""
    if isinstance(content, str):
        return content
    kinds = ("text", "input_text", "output_text")
    return "".join(p.get("text", "") for p in _parts(content) if p.get("type") in kinds)


def images_in(value: Any) -> int:
    """How many images a body holds, in whatever dialect and however deep."""
    if isinstance(value, list):
        return sum(images_in(item) for item in value)
    if not isinstance(value, dict):
        return 0
    here = value.get("type") in ("image", "image_url", "input_image")
    return (
        int(here)
        + images_in(value.get("content"))
        + images_in(value.get("messages"))
        + images_in(value.get("input"))
        + images_in(value.get("output"))
    )


def tokens_in(value: Any) -> int:
    """A rough count of tokens: a quarter of all characters but those of images and signatures."""
    if isinstance(value, str):
        return (len(value) + 3) // 4
    if isinstance(value, list):
        return sum(tokens_in(item) for item in value)
    if isinstance(value, dict):
        hidden = (
            "data", "url", "image_url", "signature", "reasoning_opaque", "encrypted_content",
        )  # fmt: skip
        return sum(tokens_in(item) for key, item in value.items() if key not in hidden)
    return 0


def kind_of(item: Json) -> str:
    """The type of an input item of /responses; a message may leave it out."""
    return str(item.get("type", "message"))


def messages_of(body: Json) -> list[Json]:
    """The messages of a body in whatever dialect."""
    if "messages" in body:
        return list(body["messages"])
    said = body.get("input")
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    return [item for item in _parts(said) if kind_of(item) == "message"]


def tool_results(dialect: str, body: Json) -> list[str]:
    """Texts of the tool results that a body ends with; empty when it ends with something else."""
    if dialect == "responses":
        items = _parts(body["input"])
        ends = len(items)
        while ends and kind_of(items[ends - 1]).endswith("_output"):
            ends -= 1
        return [text_of(item["output"]) for item in items[ends:]]
    messages: list[Json] = body["messages"]
    if dialect == "chat":
        ends = len(messages)
        while ends and messages[ends - 1]["role"] == "tool":
            ends -= 1
        return [text_of(m["content"]) for m in messages[ends:]]
    blocks = _parts(messages[-1]["content"])
    return [text_of(b.get("content")) for b in blocks if b["type"] == "tool_result"]


def last_user_text(body: Json) -> str:
    """What the user said last."""
    said = (text_of(m["content"]) for m in reversed(messages_of(body)) if m["role"] == "user")
    return next(said, "")


def offered_tools(body: Json) -> list[tuple[str, Json]]:
    """Name and schema of every tool of a body; those of a namespace are left out."""
    offered = (t for t in body.get("tools") or () if t.get("type") != "namespace")
    tools = (t.get("function", t) for t in offered)
    return [(t["name"], t.get("input_schema") or t.get("parameters") or {}) for t in tools]


def right_initiators(endpoint: str, body: Json) -> set[str]:
    """What X-Initiator may say: the last item decides; both where a repair may hide that item."""
    if endpoint == "/responses":
        items = _parts(body["input"]) or messages_of(body)
        last, before = items[-1], kind_of(items[-2]) if len(items) > 1 else ""
        if kind_of(last) != "message" or last["role"] == "assistant":
            return {"agent"}
        # Images of a tool result cannot stay in it: they follow as a user message.
        moved = before.endswith("_output") and images_in(last) > 0
        again = text_of(last["content"]) == "Please continue."
        unsure = moved or again or last["role"] in ("system", "developer")
        return {"user", "agent"} if unsure else {"user"}
    messages = body["messages"]
    last, before = messages[-1], messages[-2]["role"] if len(messages) > 1 else ""
    if last["role"] in ("system", "developer") or text_of(last["content"]) == "Please continue.":
        return {"user", "agent"}
    if last["role"] in ("assistant", "tool"):
        return {"agent"}
    blocks = _parts(last["content"])
    if blocks and all(b.get("type") == "tool_result" for b in blocks):
        return {"agent"}
    # Images of a tool result cannot stay in it on chat: they follow as a user message.
    moved = before == "tool" and images_in(last) > 0
    return {"user", "agent"} if moved else {"user"}


def schema_trouble(schema: Any, google: bool = False, items_needed: bool = True) -> str | None:
    """What a validator dislikes in a tool's schema, at any depth; None when it likes all."""
    if not isinstance(schema, dict):
        return None
    refused = ["$schema", "$id"]
    if google:
        refused += [
            "additionalProperties",
            "patternProperties",
            "propertyNames",
            "unevaluatedProperties",
        ]
        if schema.get("format", "enum") not in (
            "enum",
            "date-time",
            "int32",
            "int64",
            "float",
            "double",
        ):
            return f"format {schema['format']}"
        if "anyOf" in schema and isinstance(schema.get("type"), list):
            return "anyOf beside a list of types"
    if bad := [key for key in refused if key in schema]:
        return bad[0]
    if items_needed and schema.get("type") == "array" and not isinstance(schema.get("items"), dict):
        return "an array without items"
    below = [schema.get("items"), schema.get("additionalProperties")]
    for key in ("properties", "$defs", "definitions"):
        below += (schema.get(key) or {}).values()
    for key in ("anyOf", "oneOf", "allOf"):
        below += schema.get(key) or []
    troubles = (schema_trouble(part, google, items_needed) for part in below)
    return next((trouble for trouble in troubles if trouble), None)


def right_image(media_type: str, data: str, model: Json) -> bool:
    """Whether an inlined image is of a kind that the model takes, and real base64."""
    vision = model.get("capabilities", {}).get("limits", {}).get("vision", {})
    try:
        size = len(base64.b64decode(data, validate=True))
    except binascii.Error:
        return False
    return (
        media_type in vision.get("supported_media_types", ())
        and 0 < size <= vision["max_prompt_image_size"]
    )


class Issued:
    """The signatures of thoughts that this imitation has given out, each with its text."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        #: Encrypted thoughts of /responses, each with the ids of the calls that came after it.
        self.sealed: dict[str, Names] = {}

    def seal(self, calls: Iterable[str], content: str | None = None) -> str:
        """The encrypted content of a thought, remembered."""
        content = content or "gAAAAA" + base64.urlsafe_b64encode(secrets.token_bytes(600)).decode()
        self.sealed[content] = frozenset(calls)
        return content

    def sign(self, text: str, signature: str | None = None) -> str:
        """A signature for a thought, remembered."""
        if signature is None:
            seed = f"{len(self.texts)}:{text}".encode()
            signature = "EqQB" + base64.b64encode(hashlib.sha512(seed).digest()).decode()
        self.texts[signature] = text
        return signature


# ---- Rules: HTTP and identity --------------------------------------------------------------------


def _words(text: str) -> Names:
    """The words of a text: a long set of names that stays readable."""
    return frozenset(text.split())


_HOP_BY_HOP = _words(
    "transfer-encoding te trailer upgrade keep-alive proxy-connection proxy-authorization"
)
#: What a client sent to the gateway and the gateway must keep to itself.
_SECRETS = _words(
    """
    x-api-key api-key x-goog-api-key cookie anthropic-dangerous-direct-browser-access x-app
    x-claude-code-session-id openai-organization openai-project x-model-provider-preference
    """
)
_INTEGRATIONS = ("vscode-chat", "copilot-developer-cli", "agentic-workflows")
#: Fine-grained and server tokens: never exchanged, and taken under some of those ids only.
PROGRAM_TOKENS = ("github_pat_", "ghs_")
_PROGRAM_INTEGRATIONS = _INTEGRATIONS[1:]


def check_http(method: str, target: str, fields: list[tuple[str, str]], size: int | None) -> None:
    """What HTTP/1.1 asks of a request head, and the oddities that a plain client has no need of."""
    names = [name for name, _ in fields]
    values = dict(fields)
    if names.count("host") != 1 or not values["host"]:
        raise plain(400, f"Bad Request: {names.count('host')} Host headers")
    if again := [name for name in names if names.count(name) > 1]:
        raise plain(400, f"Bad Request: {again[0]} sent twice")
    if not target.startswith("/"):
        raise plain(400, f"Bad Request: target {target}")
    if "expect" in values:
        raise plain(417, "Expectation Failed")
    if odd := [name for name in names if name in _HOP_BY_HOP]:
        raise plain(400, f"Bad Request: hop-by-hop header {odd[0]}")
    if values.get("connection", "keep-alive").lower() not in ("keep-alive", "close"):
        raise plain(400, f"Bad Request: Connection: {values['connection']}")
    codings = {
        c.split(";")[0].strip().lower()
        for c in values.get("accept-encoding", "identity").split(",")
    }
    if odd := sorted(codings - {"identity", "gzip"}):
        raise plain(400, f"Accept-Encoding asks for {odd[0]}, which nobody here can decode")
    if method == "POST" and size is None:
        raise plain(411, "Length Required")


def check_management(seen: Seen, github_token: str, issued_tokens: set[str]) -> None:
    """What api.github.com wants on its two copilot_internal endpoints."""
    if not seen.headers.get("user-agent"):
        text = "Request forbidden by administrative rules. "
        text += "Please make sure your request has a User-Agent header"
        raise plain(
            403, text + " (https://docs.github.com/en/rest/overview/resources-in-the-rest-api)."
        )
    for name in ("editor-version", "editor-plugin-version"):
        if not seen.headers.get(name):
            raise forbidden(f"{name} missing on {seen.path}")
    scheme, _, token = seen.headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("token", "bearer") or token != github_token:
        leaked = " (a Copilot token)" if token in issued_tokens else ""
        body = {
            "message": "Bad credentials",
            "documentation_url": "https://docs.github.com/rest",
            "status": "401",
        }
        raise Refusal(401, dump(body), f"Bad credentials on {seen.path}{leaked}")


def check_secrets(seen: Seen) -> None:
    """Headers of the gateway's own clients stay with the gateway."""
    prefixes = ("x-stainless-",) if seen.path == "/v1/messages" else ("x-stainless-", "anthropic-")
    for name in seen.headers:
        if name in _SECRETS or name.startswith(prefixes):
            raise plain(400, f"Bad Request: the header {name} was passed on from a client")


def check_identity(seen: Seen, host: str) -> None:
    """The headers that every request to the Copilot API carries, beside its token."""
    headers = seen.headers
    if headers["host"] != host:
        raise plain(421, "Misdirected Request")
    if not headers.get("editor-version"):
        raise plain(400, "bad request: missing Editor-Version header for IDE auth")
    if headers.get("x-github-api-version", "") < OLDEST_API_VERSION:
        why = "bad request: the specified API version is no longer supported. "
        why += "You may need to update your client to a newer version.\n"
        raise capi(466, why, None, type="error")
    if headers.get("copilot-integration-id") not in _INTEGRATIONS:
        raise forbidden(f"Copilot-Integration-Id is {headers.get('copilot-integration-id')}")
    for name in ("user-agent", "editor-plugin-version"):
        if not headers.get(name):
            raise forbidden(f"{name} missing")


def is_uuid(text: str) -> bool:
    """Whether a header holds a UUID in its usual spelling."""
    return bool(re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text))


def find_model(models: list[Json], name: Any, endpoint: str) -> Json:
    """The entry of the list that may be called at this endpoint."""
    kind, usual = ("chat", "/chat/completions")
    if endpoint == "/embeddings":
        kind, usual = ("embeddings", endpoint)
    found = next((m for m in models if m.get("id") == name), None)
    if (
        found is None
        or found.get("policy", {}).get("state", "enabled") != "enabled"
        or found.get("capabilities", {}).get("type", "chat") != kind
    ):
        refusal = capi(400, "The requested model is not supported.", "model_not_supported",
                       param="model", type="invalid_request_error")  # fmt: skip
        refusal.note += f" ({name})"
        raise refusal
    if endpoint not in found.get("supported_endpoints", [usual]):
        raise capi(
            400,
            f'model "{name}" is not accessible via the {endpoint} endpoint',
            "unsupported_api_for_model",
        )
    return found


def check_vision(seen: Seen, model: Json) -> str:
    """Images need their header and a model that sees; a header without images is only noted."""
    asked = seen.headers.get("copilot-vision-request")
    if not images_in(seen.body):
        return "" if asked is None else "Copilot-Vision-Request without an image"
    if asked != "true":
        raise capi(400, "missing required Copilot-Vision-Request header for vision requests", "")
    if not supports(model, "vision"):
        raise bad_body(f"{model['id']} does not see images")
    return ""


# ---- Rules: /chat/completions --------------------------------------------------------------------

_CHAT_KEYS = _words(
    """
    model messages stream n temperature top_p max_tokens max_completion_tokens tools tool_choice
    stream_options stop prediction reasoning_effort thinking_budget response_format snippy intent
    """
)
#: Known to OpenAI's models; elsewhere refused or silently ignored, so they had better not be sent.
_OPENAI_KEYS = _words(
    """
    user logit_bias seed parallel_tool_calls presence_penalty frequency_penalty logprobs
    top_logprobs verbosity prompt_cache_key safety_identifier
    """
)
_CHAT_MESSAGE_KEYS = _words(
    """
    role content name tool_calls tool_call_id reasoning_text reasoning_opaque
    copilot_cache_control
    """
)
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def _check_chat_numbers(body: Json, model: Json) -> None:
    gpt5 = model["id"].startswith("gpt-5")
    right, wrong = (
        ("max_completion_tokens", "max_tokens") if gpt5 else ("max_tokens", "max_completion_tokens")
    )
    if wrong in body:
        why = f"Unsupported parameter: '{wrong}' is not supported with this model. "
        why += f"Use '{right}' instead."
        raise capi(400, why, "unsupported_parameter", param=wrong)
    if not 1 <= body.get(right, 1) <= limit(model, "max_output_tokens"):
        raise bad_body(f"{right} is {body[right]}")
    effort = body.get("reasoning_effort")
    if effort is not None and effort not in (supports(model, "reasoning_effort") or ()):
        why = f"reasoning_effort {effort} is not supported by {model['id']}"
        raise capi(400, why, "invalid_reasoning_effort")
    sampling = {"temperature", "top_p"} & set(body)
    if gpt5 and sampling and effort != "none":
        why = "Unsupported parameter: sampling is not supported with this model."
        raise capi(400, why, "unsupported_parameter")
    if len(sampling) == 2 and claude_version(model) >= (4, 1):
        raise bad_body("temperature and top_p together")
    if sampling and claude_version(model) >= (4, 7):
        raise bad_body("sampling parameters on a Claude that has none")
    if (budget := body.get("thinking_budget")) is not None:
        low, high = supports(model, "min_thinking_budget"), supports(model, "max_thinking_budget")
        if high is None or not low <= budget <= high:
            raise bad_body(f"thinking_budget {budget}")
    if not is_openai(model) and (body.get("n", 1) != 1 or "response_format" in body):
        raise bad_body("n or response_format on a model of another vendor")
    if "stream_options" in body and not body.get("stream"):
        raise bad_body("stream_options without stream")
    if "prediction" in body and not body["prediction"].get("content"):
        raise bad_body("an empty prediction")


def _check_chat_tools(body: Json, model: Json) -> None:
    tools, choice = body.get("tools"), body.get("tool_choice")
    if "tools" not in body:
        if choice is not None:
            raise bad_body("tool_choice without tools")
        return
    if not isinstance(tools, list) or not 1 <= len(tools) <= 128:
        raise bad_body(f"{len(tools) if isinstance(tools, list) else tools} tools")
    names = set()
    for at, tool in enumerate(tools):
        function = tool.get("function")
        if (
            set(tool) != {"type", "function"}
            or tool["type"] != "function"
            or not isinstance(function, dict)
        ):
            raise bad_body(f"tools[{at}] is no function")
        name, schema = str(function.get("name")), function.get("parameters")
        if not _NAME.fullmatch(name) or name in names:
            raise bad_body(f"tools[{at}] is called {name}")
        names.add(name)
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise bad_body(f"the parameters of {name} are no object schema")
        if trouble := schema_trouble(schema, google=is_google(model)):
            raise bad_body(f"the parameters of {name}: {trouble}")
    if isinstance(choice, dict):
        if choice.get("type") != "function" or choice.get("function", {}).get("name") not in names:
            raise bad_body(f"tool_choice {choice}")
    elif choice not in (None, "none", "auto", "required"):
        raise bad_body(f"tool_choice {choice}")


def _check_chat_call(call: Json, where: str) -> None:
    function = call.get("function") or {}
    if call.get("type") != "function" or not call.get("id"):
        raise bad_body(f"{where}: a tool call of type {call.get('type')} with id {call.get('id')}")
    if not _NAME.fullmatch(str(function.get("name"))):
        raise bad_body(f"{where}: a call of {function.get('name')}")
    try:
        good = isinstance(json.loads(function["arguments"]), dict)
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise bad_body(f"{where}: arguments are {function.get('arguments')!r}")


def _check_chat_parts(content: Any, where: str, role: str, model: Json) -> None:
    if not isinstance(content, list) or not content:
        raise bad_body(f"{where}: content {content!r}")
    for part in content:
        kind = part.get("type")
        if kind == "text" and str(part.get("text") or "").strip():
            continue
        if kind != "image_url" or role != "user":
            raise bad_body(f"{where}: a part of type {kind} in a {role} message, or an empty one")
        url = re.fullmatch(r"data:([^;,]+);base64,(.*)", part["image_url"]["url"], re.DOTALL)
        if not url or not right_image(url.group(1), url.group(2), model):
            raise bad_body(f"{where}: an image that is not inlined or of a wrong kind")


def _check_chat_message(message: Json, where: str, model: Json, issued: Issued) -> None:
    role, content = message.get("role"), message.get("content")
    if unknown := sorted(set(message) - _CHAT_MESSAGE_KEYS):
        raise bad_body(f"{where}.{unknown[0]}")
    roles = {"system", "user", "assistant", "tool"} | (
        {"developer"} if model["id"].startswith("gpt-5") else set()
    )
    if role not in roles:
        raise bad_body(f"{where}: role {role}")
    if role == "tool" and not message.get("tool_call_id"):
        raise bad_body(f"{where}: a tool message without tool_call_id")
    if role == "assistant" and isinstance(content, list) and is_claude(model):
        raise bad_body(f"{where}: assistant content in parts, to Claude")
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not calls):
        raise bad_body(f"{where}: tool_calls {calls}")
    for call in calls or ():
        _check_chat_call(call, where)
    opaque = message.get("reasoning_opaque")
    if opaque is not None and opaque not in issued.texts:
        raise bad_body(f"{where}: a foreign reasoning_opaque")
    if content is None:
        if not calls:
            raise bad_body(f"{where}: no content")
    elif isinstance(content, str):
        if not content.strip():
            raise bad_body(f"{where}: empty content")
    else:
        _check_chat_parts(content, where, role, model)


def _check_chat_order(messages: list[Json], body: Json, model: Json) -> None:
    waiting: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                raise bad_body(f"messages[{at}]: a tool message without its call")
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            raise bad_body(f"messages[{at}]: no tool message for {waiting[0]}")
        waiting = [call["id"] for call in message.get("tool_calls", ())]
        if is_google(model) and at and message["role"] == messages[at - 1]["role"]:
            raise bad_body(f"messages[{at}]: two {message['role']} messages in a row, to Gemini")
    if waiting:
        raise bad_body(f"no tool message for {waiting[0]}")
    if sum("copilot_cache_control" in m for m in messages) > 4:
        raise bad_body("more than 4 cache marks")
    if is_claude(model) and "tools" not in body and any(m.get("tool_calls") for m in messages):
        raise bad_body("tool calls in the history, but no tools, to Claude")
    users = [at for at, m in enumerate(messages) if m["role"] == "user"]
    turn = messages[users[-1] :] if users else messages
    if is_google(model) and any(m.get("tool_calls") and "reasoning_opaque" not in m for m in turn):
        raise bad_body("a tool call without its reasoning_opaque, to Gemini")


def check_chat(body: Json, model: Json, issued: Issued) -> None:
    """Everything that /chat/completions refuses in a body."""
    known = _CHAT_KEYS | (_OPENAI_KEYS if is_openai(model) else frozenset())
    if unknown := sorted(set(body) - known):
        raise bad_body(f"the key {unknown[0]}")
    _check_chat_numbers(body, model)
    _check_chat_tools(body, model)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_body("no messages")
    for at, message in enumerate(messages):
        _check_chat_message(message, f"messages[{at}]", model, issued)
    _check_chat_order(messages, body, model)
    if (size := tokens_in(body)) > limit(model, "max_prompt_tokens"):
        why = (
            f"prompt token count of {size} exceeds the limit of {limit(model, 'max_prompt_tokens')}"
        )
        raise capi(400, why, "model_max_prompt_tokens_exceeded")


# ---- Rules: /v1/messages -------------------------------------------------------------------------

_MESSAGES_KEYS = _words(
    """
    model messages system max_tokens stream stop_sequences temperature top_p top_k tools
    tool_choice thinking output_config context_management metadata
    """
)
_BETAS = {
    "interleaved-thinking-2025-05-14",
    "context-management-2025-06-27",
    "advanced-tool-use-2025-11-20",
}
_BLOCK_KEYS = {
    "text": {"text", "cache_control"},
    "image": {"source", "cache_control"},
    "document": {"source", "title", "context", "citations", "cache_control"},
    "tool_use": {"id", "name", "input", "cache_control"},
    "tool_result": {"tool_use_id", "content", "is_error", "cache_control"},
    "tool_reference": {"tool_name"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
}
_ROLE_BLOCKS = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use"},
    "system": {"text"},
    "tool_result": {"text", "image", "document", "tool_reference"},
}
_ID = re.compile(r"[a-zA-Z0-9_-]+")


def _check_output_format(wanted: Json) -> None:
    """Claude takes a JSON schema whose objects are all closed."""
    no_extras(wanted, {"type", "schema"}, "output_config.format.")
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        raise anthropic("output_config.format: Input should be a json_schema")
    if trouble := schema_trouble(wanted["schema"], items_needed=False):
        raise anthropic(f"output_config.format.schema: {trouble} is not permitted")
    pending: list[Any] = [wanted["schema"]]
    while pending:
        value = pending.pop()
        is_object = isinstance(value, dict) and "properties" in value and "type" in value
        if is_object and value.get("additionalProperties") is not False:
            why = "For 'object' type, 'additionalProperties' must be explicitly set to false"
            raise anthropic(f"output_config.format.schema: {why}")
        if isinstance(value, (dict, list)):
            pending += value.values() if isinstance(value, dict) else value


def _check_messages_limits(body: Json, model: Json) -> None:
    most = body.get("max_tokens")
    if not isinstance(most, int) or most < 1:
        raise anthropic("max_tokens: Field required")
    if most > limit(model, "max_output_tokens"):
        why = f"which is the maximum allowed number of output tokens for {model['id']}"
        raise anthropic(f"max_tokens: {most} > {limit(model, 'max_output_tokens')}, {why}")
    if not body.get("stream") and most > limit(model, "max_non_streaming_output_tokens"):
        raise anthropic("max_tokens: streaming is required for this many output tokens")
    for sequence in body.get("stop_sequences", ()):
        if not sequence.strip():
            raise anthropic("stop_sequences: each stop sequence must contain non-whitespace")
    config = body.get("output_config", {})
    if "format" in config and not supports(model, "structured_outputs"):
        raise anthropic(
            "FAILED_PRECONDITION: structured outputs are not allowed by the organization policy"
        )
    no_extras(config, {"effort", "format"}, "output_config.")
    if "format" in config:
        _check_output_format(config["format"])
    if "effort" in config and config["effort"] not in (supports(model, "reasoning_effort") or ()):
        why = f"output_config.effort {config['effort']} is not supported by {model['id']}"
        raise capi(400, why, "invalid_reasoning_effort")


def _check_budget(budget: Any, most: int, model: Json, newest: bool) -> None:
    if newest:
        raise anthropic(
            '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" '
            'and "output_config.effort" to control thinking behavior.'
        )
    low, high = supports(model, "min_thinking_budget"), supports(model, "max_thinking_budget")
    if high is None:
        raise anthropic("thinking is not supported on this model")
    if not isinstance(budget, int) or not low <= budget <= high:
        raise anthropic(f"thinking.enabled.budget_tokens: Input should be between {low} and {high}")
    if budget >= most:
        raise anthropic("`max_tokens` must be greater than `thinking.budget_tokens`.")


def _check_thinking(body: Json, model: Json) -> None:
    thinking = body.get("thinking", {"type": "disabled"})
    kind, newest = thinking.get("type"), claude_version(model) >= (4, 7)
    keys = {
        "enabled": {"type", "budget_tokens", "display"},
        "adaptive": {"type", "display"},
        "disabled": {"type"},
    }
    if kind not in keys:
        raise anthropic(f"thinking.type: {kind}")
    no_extras(thinking, keys[kind], f"thinking.{kind}.")
    if kind == "enabled":
        _check_budget(thinking.get("budget_tokens"), body["max_tokens"], model, newest)
    if kind == "adaptive" and not supports(model, "adaptive_thinking"):
        raise anthropic("adaptive thinking is not supported on this model")
    if newest and {"temperature", "top_p", "top_k"} & set(body):
        raise anthropic("sampling parameters are not supported on this model")
    if "temperature" in body and "top_p" in body and claude_version(model) >= (4, 1):
        raise anthropic(
            "`temperature` and `top_p` cannot both be specified for this model. Use only one."
        )
    if kind == "disabled":
        return
    if body.get("temperature", 1) != 1 or body.get("top_p", 1) < 0.95 or "top_k" in body:
        raise anthropic(
            "when thinking is enabled `temperature` may only be set to 1, `top_p` to 0.95 or more"
        )
    if body.get("tool_choice", {}).get("type") in ("any", "tool"):
        raise anthropic("Thinking may not be enabled when tool_choice forces tool use.")


def _check_messages_tools(body: Json, betas: set[str]) -> None:
    tools, choice = body.get("tools", []), body.get("tool_choice")
    advanced = "advanced-tool-use-2025-11-20" in betas
    names: set[str] = set()
    for at, tool in enumerate(tools):
        kind = tool.get("type", "custom")
        if kind == "tool_search_tool_regex_20251119" and advanced:
            names.add(tool["name"])
            continue
        if kind != "custom":
            raise wrong_kind(f"tools.{at}", kind)
        known = {"name", "description", "input_schema", "cache_control"} | (
            {"defer_loading"} if advanced else set()
        )
        no_extras(tool, known, f"tools.{at}.custom.")
        name, schema = str(tool.get("name")), tool.get("input_schema")
        if not _NAME.fullmatch(name):
            raise wrong_name(f"tools.{at}.custom.name")
        if name in names:
            raise anthropic("tools: Tool names must be unique.")
        names.add(name)
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise anthropic(f"tools.{at}.custom.input_schema.type: Field required")
        if trouble := schema_trouble(schema, items_needed=False):
            raise anthropic(f"tools.{at}.custom.input_schema: {trouble} is not permitted")
    if choice is None:
        return
    if not tools:
        raise anthropic("tool_choice: may only be specified while providing tools.")
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none") or (
        kind == "tool" and choice.get("name") not in names
    ):
        raise anthropic(f"tool_choice: {kind} {choice.get('name')}")
    no_extras(choice, {"type", "name", "disable_parallel_tool_use"}, f"tool_choice.{kind}.")


def _check_block(block: Json, where: str, role: str) -> None:
    """The shape of one block: known to this role, no foreign keys, no empty text."""
    kind = block.get("type")
    if kind not in _ROLE_BLOCKS[role]:
        raise wrong_kind(where, kind)
    keys = _BLOCK_KEYS[kind]
    no_extras(block, keys | {"type"}, f"{where}.{kind}.")
    if kind == "text" and not str(block.get("text") or "").strip():
        raise anthropic(f"{where}: text content blocks must contain non-whitespace text")
    if kind == "tool_result" and isinstance(content := block.get("content"), list):
        for n, inner in enumerate(content):
            _check_block(inner, f"{where}.content.{n}", "tool_result")


def _check_system(system: Any) -> None:
    if system is None or (isinstance(system, str) and system.strip()):
        return
    if not isinstance(system, list) or not system:
        raise anthropic("system: text content blocks must be non-empty")
    for at, block in enumerate(system):
        _check_block(block, f"system.{at}", "system")


def _check_system_turn(messages: list[Json], at: int, model: Json) -> None:
    if claude_version(model) < (4, 8):
        raise anthropic("role 'system' is not supported on this model")
    after = messages[at + 1]["role"] if at + 1 < len(messages) else "assistant"
    if at == 0 or messages[at - 1]["role"] != "user" or after != "assistant":
        raise anthropic(
            f"messages.{at}: role 'system' must follow a user turn and precede an assistant turn"
        )


def _check_block_values(
    block: Json, where: str, body: Json, model: Json, betas: set[str], issued: Issued
) -> None:
    """What is inside one block: ids, images, documents, signatures."""
    kind, source = block["type"], block.get("source", {})
    if kind in ("tool_use", "tool_result"):
        name = "id" if kind == "tool_use" else "tool_use_id"
        if not _ID.fullmatch(str(block.get(name, ""))):
            raise wrong_name(f"{where}.{kind}.{name}", "+")
    if kind == "tool_use":
        if not _NAME.fullmatch(str(block.get("name"))):
            raise wrong_name(f"{where}.tool_use.name")
        if not isinstance(block.get("input"), dict):
            raise anthropic(f"{where}.tool_use.input: Input should be a valid dictionary")
    if kind == "tool_result":
        for n, inner in enumerate(_parts(block.get("content"))):
            _check_block_values(inner, f"{where}.content.{n}", body, model, betas, issued)
    if kind == "image" and (
        source.get("type") != "base64"
        or not right_image(source["media_type"], source["data"], model)
    ):
        raise anthropic(
            f"{where}.image.source: only base64 images of the listed kinds are supported"
        )
    if kind == "document" and (source.get("type"), source.get("media_type")) != (
        "base64",
        "application/pdf",
    ):
        raise anthropic(f"{where}.document.source: Input should be 'application/pdf'")
    if kind == "tool_reference" and block["tool_name"] not in dict(offered_tools(body)):
        raise anthropic(f"Tool reference '{block['tool_name']}' not found in available tools")
    if kind == "thinking":
        signed = issued.texts.get(str(block.get("signature")))
        if signed is None or block.get("thinking") not in ("", signed):
            raise anthropic(f"{where}: Invalid `signature` in `thinking` block")
    if kind == "redacted_thinking" and block.get("data") not in issued.texts:
        raise anthropic(f"{where}: Invalid `data` in `redacted_thinking` block")


def _check_pairs(messages: list[Json]) -> None:
    """Each tool_use has its result at the start of the next message, and the other way round."""
    expected: list[str] = []
    seen: set[str] = set()
    for at, message in enumerate(messages):
        blocks = _parts(message["content"])
        results = [
            (n, b["tool_use_id"]) for n, b in enumerate(blocks) if b["type"] == "tool_result"
        ]
        leading = [name for n, (place, name) in enumerate(results) if n == place]
        if missing := [name for name in expected if name not in leading]:
            raise anthropic(
                f"messages.{at - 1}: `tool_use` ids were found without `tool_result` blocks "
                f"immediately after: {', '.join(missing)}. Each `tool_use` block must have a "
                "corresponding `tool_result` block in the next message."
            )
        for place, name in results:
            if leading.count(name) != 1 or name not in expected:
                raise anthropic(
                    f"messages.{at}.content.{place}: unexpected `tool_use_id` found in "
                    f"`tool_result` blocks: {name}. Each `tool_result` block must have a "
                    "corresponding `tool_use` block in the previous message."
                )
        expected = [b["id"] for b in blocks if b["type"] == "tool_use"]
        if seen & set(expected) or len(set(expected)) < len(expected):
            raise anthropic(f"messages.{at}: `tool_use` ids must be unique")
        seen |= set(expected)


def _check_loop(messages: list[Json], body: Json) -> None:
    """With a thinking budget, the turn that the last tool results answer begins with a thought."""
    if body.get("thinking", {}).get("type") != "enabled" or not tool_results("messages", body):
        return
    first = _parts(messages[-2]["content"])[0]["type"]
    if first not in ("thinking", "redacted_thinking"):
        raise anthropic(
            f"messages.{len(messages) - 2}.content.0.type: Expected `thinking` or "
            f"`redacted_thinking`, but found `{first}`. When `thinking` is enabled, a final "
            "`assistant` message must start with a thinking block."
        )


def _check_turns(body: Json, model: Json, betas: set[str], issued: Issued) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise anthropic("messages: at least one message is required")
    for at, message in enumerate(messages):
        no_extras(message, {"role", "content"}, f"messages.{at}.")
        role, content = message.get("role"), message.get("content")
        if role == "system":
            _check_system_turn(messages, at, model)
        elif role not in ("user", "assistant"):
            raise anthropic(f'messages.{at}: Unexpected role "{role}"')
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise anthropic(f"messages.{at}: all messages must have non-empty content")
        for n, block in enumerate(content):
            where = f"messages.{at}.content.{n}"
            _check_block(block, where, role)
            _check_block_values(block, where, body, model, betas, issued)
    if messages[-1]["role"] == "assistant":
        raise anthropic(
            "This model does not support assistant message prefill. "
            "The conversation must end with a user message."
        )
    _check_pairs(messages)
    _check_loop(messages, body)


def _blocks(value: Any, where: str) -> Iterator[tuple[str, Json]]:
    """Every block of a list and of the tool results in it."""
    for at, block in enumerate(_parts(value)):
        yield f"{where}.{at}", block
        yield from _blocks(block.get("content"), f"{where}.{at}.content")


def _check_marks(body: Json) -> None:
    marked = [*_blocks(body.get("system"), "system"), *_blocks(body.get("tools"), "tools")]
    marked += _blocks(body["messages"], "messages")
    marked = [(where, block) for where, block in marked if "cache_control" in block]
    for where, block in marked:
        no_extras(block["cache_control"], {"type"}, f"{where}.cache_control.ephemeral.")
        if block["cache_control"].get("type") != "ephemeral":
            raise anthropic(f"{where}.cache_control.type: Input should be 'ephemeral'")
    if len(marked) > 4:
        raise anthropic(
            f"A maximum of 4 blocks with cache_control may be provided. Found {len(marked)}."
        )


def check_messages(body: Json, model: Json, betas: set[str], issued: Issued) -> None:
    """Everything that /v1/messages refuses in a body."""
    allowed = _BETAS | ({"extended-cache-ttl-2025-04-11"} if "-1m" in model["id"] else set())
    if unexpected := ", ".join(f"`{beta}`" for beta in sorted(betas - allowed)):
        raise anthropic(f"Unexpected value(s) {unexpected} for the `anthropic-beta` header.")
    no_extras(body, _MESSAGES_KEYS)
    if "context_management" in body and "context-management-2025-06-27" not in betas:
        raise extra("context_management")
    no_extras(body.get("metadata", {}), {"user_id"}, "metadata.")
    _check_messages_limits(body, model)
    _check_thinking(body, model)
    _check_messages_tools(body, betas)
    _check_system(body.get("system"))
    _check_turns(body, model, betas, issued)
    _check_marks(body)
    if (size := tokens_in(body)) > limit(model, "max_prompt_tokens"):
        raise anthropic(
            f"prompt is too long: {size} tokens > {limit(model, 'max_prompt_tokens')} maximum"
        )


# ---- Rules: /responses ---------------------------------------------------------------------------

_RESPONSES_KEYS = _words(
    """
    model input instructions stream store include reasoning text truncation max_output_tokens
    temperature top_p tools tool_choice parallel_tool_calls prompt_cache_key context_management
    """
)
_UNSUPPORTED_KEYS = _words(
    """
    stream_options service_tier user safety_identifier metadata background conversation prompt
    """
)
#: Keys of an input item beside type, id and status.
_ITEM_KEYS = {
    "message": {"role", "content", "phase"},
    "reasoning": {"summary", "content", "encrypted_content"},
    "function_call": {"call_id", "name", "arguments", "namespace"},
    "function_call_output": {"call_id", "output"},
    "custom_tool_call": {"call_id", "name", "input", "namespace"},
    "custom_tool_call_output": {"call_id", "output"},
    "compaction": {"encrypted_content"},
}
_ID_STARTS = {
    "message": "msg_",
    "reasoning": "rs_",
    "function_call": "fc_",
    "function_call_output": "fc",
    "custom_tool_call": "ctc_",
    "custom_tool_call_output": "ctc",
    "compaction": "cmp_",
}
_ANSWERED_BY = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
}
_ROLE_PARTS = {
    "user": {"input_text", "input_image"},
    "system": {"input_text"},
    "developer": {"input_text"},
    "assistant": {"output_text", "refusal"},
}
_PART_KEYS = {
    "input_text": {"text"},
    "input_image": {"image_url", "detail"},
    "output_text": {"text", "annotations", "logprobs"},
    "refusal": {"refusal"},
}
_LONGEST_ID = 64


def _only_known(value: Json, known: Names | set[str], where: str = "") -> None:
    """Refuses an object of /responses with a key nobody knows, or a null."""
    for key in sorted(value):
        if key not in known:
            path = where + key
            raise refused_at(path, f"Unknown parameter: '{path}'.", "unknown_parameter")
        if value[key] is None:
            raise _wrong_type(where + key, "null")


def _wrong_type(path: str, got: str) -> Refusal:
    return refused_at(
        path, f"Invalid type for '{path}': it cannot be {got} instead.", "invalid_type"
    )


def _one_of(value: Any, path: str, known: Iterable[str]) -> None:
    """Refuses a word that is not in a list."""
    choice = sorted(known)
    if value not in choice:
        listed = ", ".join(f"'{word}'" for word in choice)
        raise refused_at(path, f"Invalid value: '{value}'. Supported values are: {listed}.")


def _string(value: Json, key: str, where: str, most: int | None = None) -> str:
    """A string that has to be there; one with a limit must not be empty."""
    path = where + key
    if key not in value:
        missing = f"Missing required parameter: '{path}'."
        raise refused_at(path, missing, "missing_required_parameter")
    text = value[key]
    if not isinstance(text, str):
        raise _wrong_type(path, type(text).__name__)
    if most is not None and not text:
        raise refused_at(path, f"Invalid '{path}': empty string.", "empty_string")
    if most is not None and len(text) > most:
        why = f"Invalid '{path}': string too long. Expected a string with maximum length {most}, "
        why += f"but got a string with length {len(text)} instead."
        raise refused_at(path, why, "string_above_max_length")
    return text


def _list(value: Json, key: str, where: str = "") -> list[Json]:
    """A list of objects; an absent one is empty."""
    listed = value.get(key, [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise _wrong_type(where + key, "other than a list of objects")
    return listed


def _object_at(value: Json, key: str, known: set[str], where: str = "") -> Json:
    """An object of known keys; an absent one is empty."""
    inner = value.get(key, {})
    if not isinstance(inner, dict):
        raise _wrong_type(where + key, type(inner).__name__)
    _only_known(inner, known, f"{where}{key}.")
    return inner


def _name_at(value: Json, where: str) -> str:
    name = _string(value, "name", where, _LONGEST_ID)
    if not _NAME.fullmatch(name):
        why = f"Invalid '{where}name': string does not match pattern. "
        why += "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
        raise refused_at(f"{where}name", why)
    return name


def _check_response_keys(body: Json) -> None:
    if body.get("store", False) is not False:
        raise capi(400, "store is not supported", "unsupported_value", param="store")
    if "previous_response_id" in body:
        raise capi(400, "previous response not found", "previous_response_not_found")
    for key in sorted(_UNSUPPORTED_KEYS & set(body)):
        raise capi(400, f"Unsupported parameter: '{key}'", "unsupported_parameter", param=key)
    _only_known(body, _RESPONSES_KEYS)
    for key in ("stream", "parallel_tool_calls"):
        if not isinstance(body.get(key, True), bool):
            raise _wrong_type(key, type(body[key]).__name__)
    for key, longest in (("instructions", None), ("prompt_cache_key", _LONGEST_ID)):
        if key in body:
            _string(body, key, "", longest)
    if "truncation" in body:
        _one_of(body["truncation"], "truncation", ("auto", "disabled"))
    include = body.get("include", [])
    if not isinstance(include, list):
        raise _wrong_type("include", type(include).__name__)
    for at, member in enumerate(include):
        _one_of(member, f"include[{at}]", ["reasoning.encrypted_content"])
    for at, edit in enumerate(_list(body, "context_management")):
        where = f"context_management[{at}]."
        _only_known(edit, {"type", "compact_threshold"}, where)
        _one_of(edit.get("type"), where + "type", ["compaction"])


def _check_response_numbers(body: Json, model: Json) -> None:
    efforts = supports(model, "reasoning_effort") or ()
    reasoning = _object_at(body, "reasoning", {"effort", "summary"})
    if "effort" in reasoning and reasoning["effort"] not in efforts:
        why = f"Unsupported value: '{reasoning['effort']}' is not supported with the "
        why += f"'{model['id']}' model. Supported values are: {', '.join(efforts)}."
        raise refused_at("reasoning.effort", why, "unsupported_value")
    if "summary" in reasoning:
        _one_of(reasoning["summary"], "reasoning.summary", ("auto", "detailed"))
    for key in sorted({"temperature", "top_p"} & set(body)):
        if efforts:
            why = f"Unsupported parameter: '{key}' is not supported with this model."
            raise refused_at(key, why, "unsupported_parameter")
    most = body.get("max_output_tokens", 16)
    if not isinstance(most, int) or isinstance(most, bool):
        raise _wrong_type("max_output_tokens", type(most).__name__)
    if most < 16:
        why = "Invalid 'max_output_tokens': integer below minimum value. "
        why += f"Expected a value >= 16, but got {most} instead."
        raise refused_at("max_output_tokens", why, "integer_below_min_value")
    if most > (highest := limit(model, "max_output_tokens")):
        why = "Invalid 'max_output_tokens': integer above maximum value. "
        why += f"Expected a value <= {highest}, but got {most} instead."
        raise refused_at("max_output_tokens", why, "integer_above_max_value")


def _check_text_options(body: Json, model: Json) -> None:
    text = _object_at(body, "text", {"verbosity", "format"})
    shape = text.get("format", {"type": "text"})
    if ("verbosity" in text or shape != {"type": "text"}) and not supports(
        model, "structured_outputs"
    ):
        why = "Unsupported parameter: 'text' is not supported with this model."
        raise refused_at("text", why, "unsupported_parameter")
    if "verbosity" in text:
        _one_of(text["verbosity"], "text.verbosity", ("low", "medium", "high"))
    kind = shape.get("type")
    _one_of(kind, "text.format.type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        _only_known(shape, {"type", "name", "schema", "strict", "description"}, "text.format.")
        _name_at(shape, "text.format.")
        schema = shape.get("schema")
        if not isinstance(schema, dict) or schema.get("type") != "object":
            why = "Invalid schema for response_format: schema must be of type object."
            raise refused_at("text.format.schema", why, "invalid_json_schema")
        if shape.get("strict") and (trouble := strict_trouble(schema)):
            why = f"Invalid schema for response_format: {trouble}"
            raise refused_at("text.format.schema", why, "invalid_json_schema")


def strict_trouble(schema: Any) -> str | None:
    """What strict mode dislikes in a schema, at any depth: optional and further properties."""
    if not isinstance(schema, dict):
        return None
    properties = schema.get("properties") or {}
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            return "'additionalProperties' is required to be supplied and to be false."
        if set(schema.get("required", ())) != set(properties):
            return "'required' is required to be supplied and to hold every key in properties."
    below = [*properties.values(), schema.get("items"), *(schema.get("anyOf") or ())]
    return next((trouble for part in below if (trouble := strict_trouble(part))), None)


def _check_function_tool(tool: Json, where: str) -> None:
    _only_known(tool, {"type", "name", "description", "parameters", "strict"}, where)
    name, schema = _name_at(tool, where), tool.get("parameters")
    trouble = None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        trouble = "schema must be a JSON Schema of 'type: \"object\"'."
    elif not isinstance(schema.get("properties"), dict):
        trouble = "object schema missing properties."
    elif not isinstance(tool.get("strict", False), bool):
        raise _wrong_type(where + "strict", type(tool["strict"]).__name__)
    elif tool.get("strict"):
        trouble = strict_trouble(schema)
    if trouble := trouble or schema_trouble(schema):
        why = f"Invalid schema for function '{name}': {trouble}"
        raise refused_at(where + "parameters", why, "invalid_function_parameters")


def _check_custom_tool(tool: Json, where: str) -> None:
    _only_known(tool, {"type", "name", "description", "format"}, where)
    _name_at(tool, where)
    shape = _object_at(tool, "format", {"type", "syntax", "definition"}, where)
    _one_of(shape.get("type", "text"), where + "format.type", ("text", "grammar"))
    if shape.get("type") == "grammar":
        _one_of(shape.get("syntax"), where + "format.syntax", ("lark", "regex"))
        _string(shape, "definition", where + "format.")


def _check_tool(tool: Json, where: str, nested: bool = False) -> None:
    kind = tool.get("type")
    if kind == "function":
        _check_function_tool(tool, where)
    elif kind == "custom":
        _check_custom_tool(tool, where)
    elif kind == "namespace" and not nested:
        _only_known(tool, {"type", "name", "description", "tools"}, where)
        _name_at(tool, where)
        if not _string(tool, "description", where).strip():
            raise refused_at(where + "description", f"Invalid '{where}description': empty string.")
        for at, inner in enumerate(_list(tool, "tools", where)):
            _check_tool(inner, f"{where}tools[{at}].", nested=True)
    else:
        why = f"The requested tool {kind} is not supported."
        raise refused_at(where + "type", why, "unsupported_value")


def _check_responses_tools(body: Json) -> None:
    tools, choice = _list(body, "tools"), body.get("tool_choice", "auto")
    if len(tools) > 128:
        why = "Invalid 'tools': array too long. Expected an array with maximum length 128."
        raise refused_at("tools", why, "array_above_max_length")
    offered: set[tuple[str, str]] = set()
    for at, tool in enumerate(tools):
        _check_tool(tool, f"tools[{at}].")
        if tool["name"] in {name for _, name in offered}:
            raise refused_at(f"tools[{at}].name", f"Duplicate tool name: '{tool['name']}'.")
        offered.add((tool["type"], tool["name"]))
    if choice in ("auto", "none"):
        return
    if not tools:
        raise refused_at("tool_choice", "Tool choice must be specified with 'tools' parameter.")
    if choice == "required":
        return
    if not isinstance(choice, dict):
        raise refused_at("tool_choice", f"Invalid value: '{choice}'.")
    named = [choice]
    if choice.get("type") == "allowed_tools":
        _only_known(choice, {"type", "mode", "tools"}, "tool_choice.")
        _one_of(choice.get("mode"), "tool_choice.mode", ("auto", "required"))
        named = _list(choice, "tools", "tool_choice.")
    for one in named:
        _only_known(one, {"type", "name"}, "tool_choice.")
        if (one.get("type"), one.get("name")) not in offered:
            name = one.get("name", one.get("type"))
            raise refused_at("tool_choice", f"Tool choice '{name}' not found in 'tools' parameter.")


def _check_item_parts(item: Json, where: str, model: Json) -> None:
    """What a message says: text, or parts of the kinds that its role may send."""
    role, content = item["role"], item.get("content")
    if isinstance(content, str):
        content = [
            {"type": "output_text" if role == "assistant" else "input_text", "text": content}
        ]
    if not isinstance(content, list) or not content:
        raise _wrong_type(where + "content", type(content).__name__)
    for n, part in enumerate(content):
        path = f"{where}content[{n}]."
        if not isinstance(part, dict):
            raise _wrong_type(path[:-1], type(part).__name__)
        kind = str(part.get("type"))
        _one_of(kind, path + "type", _ROLE_PARTS[role])
        _only_known(part, _PART_KEYS[kind] | {"type"}, path)
        if kind == "input_image":
            _check_input_image(part, path, model)
        elif not _string(part, "refusal" if kind == "refusal" else "text", path).strip():
            raise refused_at(path + "text", f"Invalid '{path}text': empty string.", "empty_string")
        for key in ("annotations", "logprobs"):
            if not isinstance(part.get(key, []), list):
                raise _wrong_type(path + key, type(part[key]).__name__)


def _check_input_image(part: Json, where: str, model: Json) -> None:
    _one_of(part.get("detail"), where + "detail", ("auto", "low", "high"))
    url = _string(part, "image_url", where)
    data = re.fullmatch(r"data:([^;,]+);base64,(.*)", url, re.DOTALL)
    if not data or not right_image(data.group(1), data.group(2), model):
        why = f"Invalid '{where}image_url': an image that is not inlined or of a wrong kind."
        raise refused_at(where + "image_url", why, "invalid_image_url")


def _check_item(item: Any, where: str, model: Json, issued: Issued) -> None:
    """The shape of one input item."""
    if not isinstance(item, dict):
        raise _wrong_type(where[:-1], type(item).__name__)
    kind = kind_of(item)
    if kind == "item_reference":
        why = f"Item with id '{item.get('id')}' not found. "
        raise refused_at("input", why + "Items are not persisted when `store` is set to false.")
    _one_of(kind, where + "type", _ITEM_KEYS)
    _only_known(item, _ITEM_KEYS[kind] | {"type", "id", "status"}, where)
    if "id" in item and not _string(item, "id", where, _LONGEST_ID).startswith(_ID_STARTS[kind]):
        start = _ID_STARTS[kind].rstrip("_")
        why = f"Invalid '{where}id': '{item['id']}'. Expected an ID that begins with '{start}'."
        raise refused_at(where + "id", why)
    if "status" in item:
        _one_of(item["status"], where + "status", ("completed", "in_progress", "incomplete"))
    if kind == "message":
        _one_of(item.get("role"), where + "role", _ROLE_PARTS)
        if "phase" in item:
            known = ("commentary", "final_answer") if item["role"] == "assistant" else ()
            _one_of(item["phase"], where + "phase", known)
        _check_item_parts(item, where, model)
    elif kind in ("reasoning", "compaction"):
        _check_sealed(item, where, issued)
    else:
        _check_call_item(item, kind, where)


def _check_call_item(item: Json, kind: str, where: str) -> None:
    """A tool call or its output; outputs are text and nothing else."""
    _string(item, "call_id", where, _LONGEST_ID)
    if kind.endswith("_output"):
        _string(item, "output", where)
        return
    _name_at(item, where)
    text = _string(item, "arguments" if kind == "function_call" else "input", where)
    if kind == "function_call":
        try:
            good = isinstance(json.loads(text), dict)
        except ValueError:
            good = False
        if not good:
            why = f"Invalid '{where}arguments': {text!r} is no JSON object."
            raise refused_at(where + "arguments", why)


def _check_sealed(item: Json, where: str, issued: Issued) -> None:
    """A thought comes back as it was given out, encrypted; nobody has its id in store."""
    if item["type"] == "reasoning":
        if "summary" not in item:
            why = f"Missing required parameter: '{where}summary'."
            raise refused_at(where + "summary", why, "missing_required_parameter")
        for n, part in enumerate(_list(item, "summary", where)):
            path = f"{where}summary[{n}]."
            _only_known(part, {"type", "text"}, path)
            _one_of(part.get("type"), path + "type", ["summary_text"])
            _string(part, "text", path)
        if item.get("content", []) != []:
            raise refused_at(where + "content", f"Invalid '{where}content': array too long.",
                             "array_above_max_length")  # fmt: skip
        if "encrypted_content" not in item:
            why = f"Item with id '{item.get('id')}' not found. "
            raise refused_at("input", why + "Items are not persisted when `store` is set to false.")
    if _string(item, "encrypted_content", where) not in issued.sealed:
        refusal = refused_at("input", "input item ID does not belong to this connection", None)
        refusal.note += f": {where}encrypted_content was not issued here"
        raise refusal


def _check_items(items: list[Json], issued: Issued) -> None:
    """Ids are used once, calls have their outputs right behind them, thoughts stand in front."""
    ids = [item["id"] for item in items if "id" in item]
    if again := [name for name in ids if ids.count(name) > 1]:
        raise refused_at("input", f"Duplicate item found with id {again[0]}.", None)
    waiting: dict[str, str] = {}
    answering = False
    for item in items:
        kind, name = kind_of(item), str(item.get("call_id"))
        if kind.endswith("_output"):
            if waiting.pop(name, None) != kind:
                why = f"No tool call found for function call output with call_id {name}."
                raise refused_at("input", why, None)
            answering = bool(waiting)
            continue
        between = kind in _ANSWERED_BY or kind == "reasoning"
        if waiting and (answering or not between or name in waiting):
            why = f"No tool output found for function call {next(iter(waiting))}."
            raise refused_at("input", why, None)
        if kind in _ANSWERED_BY:
            waiting[name] = _ANSWERED_BY[kind]
    if waiting:
        why = f"No tool output found for function call {next(iter(waiting))}."
        raise refused_at("input", why, None)
    for at, item in enumerate(items):
        if kind_of(item) == "reasoning":
            _check_thought_place(items[:at], item, items[at + 1 :], issued)


def _check_thought_place(
    before: list[Json], thought: Json, behind: list[Json], issued: Issued
) -> None:
    """A thought stands in front of what the model went on to say or call."""
    calls = [
        {i["call_id"] for i in items if kind_of(i) in _ANSWERED_BY} for items in (before, behind)
    ]
    if late := sorted((calls[0] - calls[1]) & issued.sealed[thought["encrypted_content"]]):
        why = f"Item of function call {late[0]} was provided without its required 'reasoning' item."
        raise refused_at("input", why, None)
    after = next((item for item in behind if kind_of(item) != "reasoning"), {"type": "nothing"})
    if kind_of(after) not in _ANSWERED_BY and after.get("role") != "assistant":
        why = f"Item '{thought.get('id')}' of type 'reasoning' was provided without its required "
        raise refused_at("input", why + "following item.", None)


def check_responses(body: Json, model: Json, issued: Issued) -> None:
    """Everything that /responses refuses in a body."""
    _check_response_keys(body)
    _check_response_numbers(body, model)
    _check_text_options(body, model)
    _check_responses_tools(body)
    said = body.get("input")
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        raise refused_at("input", "Missing required parameter: 'input'.",
                         "missing_required_parameter")  # fmt: skip
    for at, item in enumerate(said):
        _check_item(item, f"input[{at}].", model, issued)
    _check_items(said, issued)
    if (size := tokens_in(body)) > (most := limit(model, "max_prompt_tokens")):
        why = f"prompt token count of {size} exceeds the limit of {most}"
        raise capi(400, why, "model_max_prompt_tokens_exceeded")


# ---- Rules: /embeddings --------------------------------------------------------------------------


def check_embeddings(body: Json, model: Json) -> None:
    """Everything that /embeddings refuses in a body."""
    if unknown := sorted(set(body) - {"model", "input", "dimensions", "encoding_format"}):
        raise bad_body(f"the key {unknown[0]}")
    texts = body.get("input")
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise bad_body("input is no list of texts")
    if not 1 <= len(texts) <= limit(model, "max_inputs"):
        raise bad_body(f"{len(texts)} inputs")
    if body.get("encoding_format", "float") != "float":
        raise bad_body(f"encoding_format {body['encoding_format']}")
    size = body.get("dimensions", 1)
    if "dimensions" in body and not supports(model, "dimensions"):
        raise bad_body(f"dimensions, which {model['id']} does not know")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= DIMENSIONS:
        raise bad_body(f"dimensions {size}")


# ---- Imitation -----------------------------------------------------------------------------------


def example_of(schema: Any) -> Any:
    """A value that fits a JSON schema, with the required properties only."""
    if not isinstance(schema, dict):
        return "example"
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return example_of(schema[key][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_of(properties.get(name)) for name in schema.get("required", ())}
    if kind == "array":
        return [example_of(schema.get("items"))]
    return {"integer": 7, "number": 1.5, "boolean": True, "null": None}.get(kind, "example")


def default_brain(dialect: str, body: Json) -> list[AnyPart]:
    """Answers by simple key words, so that a test can ask for what it needs in the prompt."""
    seen = images_in(body)
    sight = f" I see {seen} image(s)." if seen else ""
    if results := tool_results(dialect, body):
        return [Say(f"The tool said: {' and '.join(results)}{sight}")]
    text, tools = last_user_text(body), offered_tools(body)
    # With a thinking budget every turn begins with a thought, and the validator expects it back.
    thinks = "think" in text or body.get("thinking", {}).get("type") == "enabled"
    parts: list[AnyPart] = [Think("Let me think about that.")] if thinks else []
    wanted = 2 if "use both tools" in text else int("use the tool" in text)
    if tools and wanted:
        custom = {t["name"] for t in body["tools"]
                  if t.get("type") == "custom" and "input_schema" not in t}  # fmt: skip
        return parts + [
            CustomCall(name, "example") if name in custom else Call(name, example_of(schema))
            for name, schema in (tools * 2)[:wanted]
        ]
    return [*parts, Say(f"Hello from {body.get('model')}.{sight} You said: {text}")]


def spoken(part: AnyPart) -> int:
    """Tokens of one part of an answer."""
    if isinstance(part, Stop):
        return 0
    if isinstance(part, (Say, Think)):
        return tokens_in(part.text) + 1
    return tokens_in(part.input if isinstance(part, CustomCall) else part.arguments) + 1


def usage_of(body: Json, parts: Sequence[AnyPart], cached: bool) -> dict[str, int]:
    """Counts that add up: half of a prompt with cache marks is written, or read when `cached`.

    /responses needs no marks, and says nothing of what it writes.
    """
    prompt = tokens_in(body) + 1
    marked = b'cache_control"' in dump(body) or ("input" in body and cached)
    half = prompt // 2 if marked else 0
    return {
        "input": prompt - half,
        "cache_read": half if cached else 0,
        "cache_write": 0 if cached else half,
        "output": sum(spoken(part) for part in parts),
    }


def copilot_usage(usage: dict[str, int]) -> Json:
    """What the answer costs at Sonnet's prices: 3, 0.3, 3.75 and 15 USD per million tokens."""
    price = {"input": 300_000, "cache_read": 30_000, "cache_write": 375_000, "output": 1_500_000}
    details = [{"token_type": kind, "token_count": count} for kind, count in usage.items()]
    total = sum(price[kind] * count for kind, count in usage.items())
    return {"total_nano_aiu": total, "token_details": details}


def dated(model: Json) -> str:
    """The vendor's own name of a model: what answers carry instead of the one asked for."""
    if is_claude(model):
        return str(model["id"]).replace(".", "-") + "-20250929"
    return f"{model['id']}-2025-04-14" if is_openai(model) else str(model["id"])


def words(text: str) -> list[str]:
    """Text in the small pieces that a stream brings."""
    return re.findall(r"\S+\s*|\s+", text)


_SAFE = {
    kind: {"filtered": False, "severity": "safe"}
    for kind in ("hate", "self_harm", "sexual", "violence")
}
_PROMPT_SAFE = {"prompt_filter_results": [{"content_filter_results": {}, "prompt_index": 0}]}


class ChatVoice:
    """Parts rendered as /chat/completions does, stream or whole."""

    def __init__(
        self, parts: Sequence[AnyPart], body: Json, model: Json, issued: Issued, cached: bool
    ) -> None:
        self.parts = parts
        self.model = model
        self.issued = issued
        self.usage = usage_of(body, parts, cached)
        self.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.stream = bool(body.get("stream"))
        #: Claude speaks in choice 0 and calls its tools in choice 1.
        self.call_index = int(is_claude(model) and any(isinstance(p, (Say, Think)) for p in parts))
        self.id = f"chatcmpl-{uuid.uuid4().hex[:24]}"

    def deltas(self) -> Iterator[tuple[int, Json]]:
        """(choice, delta) as they come; a whole answer has the same ones, less finely cut."""
        calls = opaques = 0
        for part in self.parts:
            if isinstance(part, Say):
                for piece in words(part.text) if self.stream else [part.text]:
                    yield 0, {"content": piece, "padding": "abcdefghijkl"[: len(piece)]}
            elif isinstance(part, Think):
                for piece in words(part.text) if self.stream else [part.text]:
                    yield 0, {"reasoning_text": piece}
                opaques += 1
                yield 0, {"reasoning_opaque": self.issued.sign(part.text, part.signature)}
            elif isinstance(part, Call):
                if is_google(self.model) and not opaques:
                    opaques += 1
                    yield 0, {"reasoning_opaque": self.issued.sign("")}
                yield from self.call(part, calls)
                calls += 1

    def call(self, part: Call, at: int) -> Iterator[tuple[int, Json]]:
        """The fragments of one call; Gemini and whole answers have a single one."""
        text = dump(part.arguments).decode()
        half = (len(text) + 1) // 2
        whole = is_google(self.model) or not self.stream
        first, *rest = [text] if whole else ["", text[:half], text[half:]]
        head = {"id": part.id or f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        function = {"name": part.name, "arguments": first}
        yield (
            self.call_index,
            {"content": None, "tool_calls": [{"index": at, **head, "function": function}]},
        )
        for piece in rest:
            yield self.call_index, {"tool_calls": [{"index": at, "function": {"arguments": piece}}]}

    def finishes(self) -> list[tuple[int, str]]:
        """(choice, finish_reason): Claude's text stops for itself, Gemini says stop to a call."""
        calls = any(isinstance(p, Call) for p in self.parts)
        reason = "tool_calls" if calls and not is_google(self.model) else "stop"
        for part in self.parts:
            reason = part.reason if isinstance(part, Stop) else reason
        return [(0, "stop"), (1, reason)] if calls and self.call_index else [(0, reason)]

    def counts(self) -> Json:
        """The two usage objects; the first lumps fresh and cached input together."""
        used = self.usage
        prompt = used["input"] + used["cache_read"] + used["cache_write"]
        flat = {
            "prompt_tokens": prompt,
            "completion_tokens": used["output"],
            "total_tokens": prompt + used["output"],
            "prompt_tokens_details": {"cached_tokens": used["cache_read"]},
            "completion_tokens_details": {"accepted_prediction_tokens": 0},
        }
        return {"usage": flat, "copilot_usage": copilot_usage(used)}

    def frames(self) -> list[bytes]:
        """The stream; `object` is missing everywhere, `created` on all but OpenAI's models."""
        common: Json = {"id": self.id, "model": dated(self.model), "usage": None}
        if is_openai(self.model):
            common.update(created=int(time.time()), system_fingerprint="fp_0000000000")
        opening = {"choices": [], "created": 0, "id": "", "model": "", "object": "", **_PROMPT_SAFE}
        first = {
            "index": 0,
            "content_filter_offsets": {"check_offset": 35, "start_offset": 35, "end_offset": 60},
            "content_filter_results": _SAFE,
            "delta": {"content": "", "role": "assistant"},
        }
        chunks: list[Json] = [opening, {"choices": [first], **common}]
        chunks += [
            {"choices": [{"index": index, "delta": delta}], **common}
            for index, delta in self.deltas()
        ]
        last = [
            {"index": index, "finish_reason": why, "delta": {"content": None}}
            for index, why in self.finishes()
        ]
        chunks.append({"choices": last, **common})
        if self.wants_usage:
            chunks.append({"choices": [], **common, **self.counts()})
        return [sse(c, done=False) for c in chunks] + [sse()]

    def whole(self) -> Json:
        """The answer in one piece; without text there is no `content` key at all."""
        messages: dict[int, Json] = {}
        for index, delta in self.deltas():
            message = messages.setdefault(index, {"role": "assistant", "padding": "abcdefghijkl"})
            for key in ("content", "reasoning_text", "reasoning_opaque"):
                if delta.get(key) is not None:
                    message[key] = (
                        message.get(key, "") if key != "reasoning_opaque" else ""
                    ) + delta[key]
            for call in delta.get("tool_calls", ()):
                bare = {key: value for key, value in call.items() if key != "index"}
                message.setdefault("tool_calls", []).append(bare)
        reasons = dict(self.finishes())
        choices = [
            {
                "index": at,
                "finish_reason": reasons[at],
                "content_filter_results": _SAFE,
                "message": said,
            }
            for at, said in sorted(messages.items())
        ]
        common = {"id": self.id, "model": dated(self.model), **_PROMPT_SAFE}
        return {"choices": choices, **common, **self.counts()}


class MessagesVoice:
    """Parts rendered as /v1/messages does, stream or whole."""

    def __init__(
        self, parts: Sequence[AnyPart], body: Json, model: Json, issued: Issued, cached: bool
    ) -> None:
        thinking = body.get("thinking", {})
        self.parts = parts
        self.issued = issued
        self.stop = "tool_use" if any(isinstance(p, Call) for p in parts) else "end_turn"
        for part in parts:
            self.stop = part.reason if isinstance(part, Stop) else self.stop
        #: Adaptive models keep their thoughts to themselves unless asked for a summary.
        self.silent = thinking.get("type") == "adaptive" and thinking.get("display") != "summarized"
        used = usage_of(body, parts, cached)
        usage = {
            "input_tokens": used["input"],
            "output_tokens": used["output"],
            "cache_creation_input_tokens": used["cache_write"],
            "cache_read_input_tokens": used["cache_read"],
        }
        #: What only the end of a stream tells.
        self.last: Json = {"usage": usage, "copilot_usage": copilot_usage(used)}
        if "context_management" in body:
            self.last["context_management"] = {"applied_edits": []}
        self.head = {"id": f"msg_vrtx_{uuid.uuid4().hex[:22]}", "model": dated(model)}
        self.head.update(type="message", role="assistant")

    @staticmethod
    def stopped(reason: str | None) -> Json:
        """Why the model stopped, None while it speaks."""
        return {"stop_reason": reason, "stop_sequence": None}

    def content(self) -> list[Json]:
        """The blocks of the answer."""
        blocks: list[Json] = []
        for part in self.parts:
            if isinstance(part, Say):
                blocks.append({"type": "text", "text": part.text})
            elif isinstance(part, Think):
                signature = self.issued.sign(part.text, part.signature)
                blocks.append(
                    {
                        "type": "thinking",
                        "thinking": "" if self.silent else part.text,
                        "signature": signature,
                    }
                )
            elif isinstance(part, Call):
                name = part.id or f"toolu_vrtx_{uuid.uuid4().hex[:22]}"
                blocks.append(
                    {"type": "tool_use", "id": name, "name": part.name, "input": part.arguments}
                )
        return blocks

    def block(self, at: int, block: Json) -> Iterator[Json]:
        """The events of one block."""
        deltas: list[Json]
        if block["type"] == "text":
            start: Json = {"type": "text", "text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in words(block["text"])]
        elif block["type"] == "thinking":
            start = {"type": "thinking", "thinking": "", "signature": ""}
            deltas = [
                {"type": "thinking_delta", "thinking": piece} for piece in words(block["thinking"])
            ]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        else:
            start, text = {**block, "input": {}}, dump(block["input"]).decode()
            half = (len(text) + 1) // 2
            deltas = [
                {"type": "input_json_delta", "partial_json": piece}
                for piece in ("", text[:half], text[half:])
            ]
        yield {"type": "content_block_start", "index": at, "content_block": start}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": at, "delta": delta}
        yield {"type": "content_block_stop", "index": at}

    def frames(self) -> list[bytes]:
        """The stream; true counts come only at its end, and after the end a stray [DONE]."""
        counts = {"input_tokens": 0, "output_tokens": 0}
        message = {**self.head, "content": [], **self.stopped(None), "usage": counts}
        parts: list[Json] = [{"type": "message_start", "message": message}, {"type": "ping"}]
        for at, block in enumerate(self.content()):
            parts += self.block(at, block)
        parts.append({"type": "message_delta", "delta": self.stopped(self.stop), **self.last})
        # One piece, so that a client may leave at message_stop and does not count as cancelling.
        return [events(p) for p in parts] + [events({"type": "message_stop"}) + sse()]

    def whole(self) -> Json:
        """The answer in one piece."""
        return {**self.head, "content": self.content(), **self.stopped(self.stop), **self.last}


def blob() -> str:
    """An id as /responses gives them: 300 to 448 characters of base64, never the same twice."""
    return base64.b64encode(secrets.token_bytes(225 + secrets.randbelow(112))).decode()


class ResponsesVoice:
    """Parts rendered as /responses does, stream or whole."""

    def __init__(
        self, parts: Sequence[AnyPart], body: Json, model: Json, issued: Issued, cached: bool
    ) -> None:
        self.body = body
        self.model = model
        self.issued = issued
        self.created = int(time.time())
        self.reason = next((p.reason for p in parts if isinstance(p, Stop)), "")
        self.used = usage_of(body, parts, cached)
        self.thought = sum(spoken(part) for part in parts if isinstance(part, Think))
        self.summary = "summary" in body.get("reasoning", {})
        self.sealing = "reasoning.encrypted_content" in body.get("include", ())
        #: Thoughts whose summary comes without deltas.
        self.late: set[int] = set()
        self.items = self.rendered([part for part in parts if not isinstance(part, Stop)])

    @property
    def status(self) -> str:
        """How the answer ends."""
        cut = ("max_output_tokens", "content_filter")
        return "incomplete" if self.reason in cut else "failed" if self.reason else "completed"

    def rendered(self, parts: Sequence[Say | Think | Call | CustomCall]) -> list[Json]:
        """The finished items of the answer, each without its id."""
        names = [getattr(part, "id", None) or f"call_{uuid.uuid4().hex[:24]}" for part in parts]
        calls = [isinstance(part, (Call, CustomCall)) for part in parts]
        items: list[Json] = []
        for at, part in enumerate(parts):
            call = {"status": "completed", "call_id": names[at]}
            if isinstance(part, Say):
                items.append(self.message(part.text, any(calls[at:])))
            elif isinstance(part, Think):
                if part.late:
                    self.late.add(at)
                after = [names[n] for n in range(at, len(parts)) if calls[n]]
                items.append(self.thought_item(part, after))
            elif isinstance(part, Call):
                text = dump(part.arguments).decode()
                call.update(type="function_call", name=part.name, arguments=text)
                items.append(call)
            else:
                call.update(type="custom_tool_call", name=part.name, input=part.input)
                items.append(call)
        if items and self.status == "incomplete" and "status" in items[-1]:
            items[-1]["status"] = "incomplete"
        return items

    def message(self, text: str, calls: bool) -> Json:
        """A message; models of this endpoint alone tell an announcement from the answer."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
        if "/chat/completions" not in self.model.get("supported_endpoints", ()):
            item["phase"] = "commentary" if calls else "final_answer"
        return item

    def thought_item(self, part: Think, calls: list[str]) -> Json:
        """A thought; its summary and its encrypted content only where they are asked for."""
        said = part.text.split("\n\n") if self.summary and part.text else []
        item: Json = {"type": "reasoning", "summary": []}
        item["summary"] += [{"type": "summary_text", "text": text} for text in said]
        if self.sealing:
            item["encrypted_content"] = self.issued.seal(calls, part.signature)
        return item

    @staticmethod
    def disguised(item: Json) -> Json:
        """The item with an id of this moment, and an encrypted content that is good for nothing."""
        worthless = {"encrypted_content": blob()} if "encrypted_content" in item else {}
        return {"id": blob(), **item, **worthless}

    def response(self, status: str, output: list[Json]) -> Json:
        """The response object: it has no `store`, and its `output_text` is never filled."""
        asked = self.body
        reasoning = {"effort": "medium", "summary": None, **asked.get("reasoning", {})}
        value: Json = {
            "id": blob(), "object": "response", "created_at": self.created, "status": status,
            "background": False, "error": None, "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"), "model": dated(self.model),
            "output": output, "output_text": None,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": None, "prompt_cache_key": asked.get("prompt_cache_key"),
            "reasoning": reasoning, "temperature": 1.0, "top_p": 1.0,
            "text": {"format": {"type": "text"}, "verbosity": "medium", **asked.get("text", {})},
            "tool_choice": asked.get("tool_choice", "auto"), "tools": asked.get("tools", []),
            "truncation": asked.get("truncation", "disabled"), "usage": None, "user": None,
            "metadata": {},
        }  # fmt: skip
        if status == "incomplete":
            value["incomplete_details"] = {"reason": self.reason}
        if status == "failed":
            value["error"] = {"code": self.reason, "message": f"The answer failed: {self.reason}"}
        elif status != "in_progress":
            value["usage"] = self.counts()
        return value

    def counts(self) -> Json:
        """The usage inside the response; cached input is part of all input."""
        prompt = self.used["input"] + self.used["cache_read"] + self.used["cache_write"]
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.used["cache_read"]},
            "output_tokens": self.used["output"],
            "output_tokens_details": {"reasoning_tokens": self.thought},
            "total_tokens": prompt + self.used["output"],
        }

    def inside(self, at: int, item: Json) -> Iterator[Json]:
        """The events between the beginning and the end of an item, without ids."""
        if item["type"] == "message":
            part = item["content"][0]
            place = {"content_index": 0}
            yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
            for piece in words(part["text"]):
                yield {
                    "type": "response.output_text.delta", **place, "delta": piece, "logprobs": [],
                    "obfuscation": "abcdefghijkl"[: len(piece)],
                }  # fmt: skip
            yield {
                "type": "response.output_text.done", **place, "text": part["text"], "logprobs": [],
            }  # fmt: skip
            yield {"type": "response.content_part.done", **place, "part": part}
        elif item["type"] == "reasoning":
            for n, part in enumerate([] if at in self.late else item["summary"]):
                head, place = "response.reasoning_summary_", {"summary_index": n}
                yield {"type": head + "part.added", **place, "part": {**part, "text": ""}}
                for piece in words(part["text"]):
                    yield {"type": head + "text.delta", **place, "delta": piece}
                yield {"type": head + "text.done", **place, "text": part["text"]}
                yield {"type": head + "part.done", **place, "part": part}
        else:
            function = item["type"] == "function_call"
            key = "arguments" if function else "input"
            head = "response." + (
                "function_call_arguments" if function else "custom_tool_call_input"
            )
            half = (len(item[key]) + 1) // 2
            for piece in (item[key][:half], item[key][half:]):
                yield {"type": head + ".delta", "delta": piece, "obfuscation": "abc"}
            yield {"type": head + ".done", key: item[key]}

    def item_events(self, at: int, item: Json) -> Iterator[Json]:
        """All events of one item; each of them calls it by another id."""
        started = {**item, "status": "in_progress"} if "status" in item else item
        bare = {"message": "content", "reasoning": "summary", "function_call": "arguments"}
        key = bare.get(item["type"], "input")
        empty = self.disguised({**started, key: "" if isinstance(item[key], str) else []})
        yield {"type": "response.output_item.added", "output_index": at, "item": empty}
        for event in self.inside(at, item):
            yield {**event, "output_index": at, "item_id": blob()}
        whole = {"id": blob(), **item}
        yield {"type": "response.output_item.done", "output_index": at, "item": whole}

    def events(self) -> list[Json]:
        """The stream as objects, for tests that want to change some; `numbered` makes it bytes."""
        told = [{"type": f"response.{name}", "response": self.response("in_progress", [])}
                for name in ("created", "in_progress")]  # fmt: skip
        for at, item in enumerate(self.items):
            told += self.item_events(at, item)
        output = [self.disguised(item) for item in self.items]
        last = {"type": f"response.{self.status}", "response": self.response(self.status, output)}
        paid = {} if self.status == "failed" else {"copilot_usage": copilot_usage(self.used)}
        return [*told, {**last, **paid}]

    def frames(self) -> list[bytes]:
        """The stream; it just ends, without a [DONE]."""
        return [numbered(event, first=n) for n, event in enumerate(self.events())]

    def whole(self) -> Json:
        """The answer in one piece: here the encrypted content is the right one."""
        value = self.response(self.status, [{"id": blob(), **item} for item in self.items])
        paid = {} if self.status == "failed" else {"copilot_usage": copilot_usage(self.used)}
        return {**value, **paid}


#: Numbers in a vector, unless fewer are asked for.
DIMENSIONS = 1536


def embeddings_of(body: Json, bare: bool) -> Json:
    """A vector for each text, the same one for the same text; a bare answer lacks some names."""
    size = body.get("dimensions", DIMENSIONS)
    data: list[Json] = []
    for at, text in enumerate(body["input"]):
        drawn = hashlib.shake_256(text.encode()).digest(size)
        vector = [(byte - 128) / 128 for byte in drawn]
        data.append({"index": at, "embedding": vector} | ({} if bare else {"object": "embedding"}))
    count = tokens_in(body["input"])
    usage = {"prompt_tokens": count, "total_tokens": count}
    named = {} if bare else {"object": "list", "model": body["model"]}
    return {"data": data, "usage": usage, **named}


# ---- Connection ----------------------------------------------------------------------------------


class ClientLeft(Exception):
    """The client closed the connection in the middle of an answer."""


def _content_type(status: int, body: bytes) -> str:
    """What the service would call this body."""
    if status >= 400:
        return "text/plain; charset=utf-8"
    streamed = body.lstrip().startswith((b"data:", b"event:", b":"))
    return "text/event-stream" if streamed else "application/json"


class Connection:
    """One client connection, served by one thread."""

    def __init__(self, fake: FakeService, sock: socket.socket, number: int, via: str = "") -> None:
        self.fake = fake
        self.sock = sock
        self.number = number
        self.via = via
        self.buffer = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        """Requests one after the other until somebody closes."""
        seen: Seen | None = None
        try:
            while True:
                seen = None
                try:
                    seen = self.read()
                    if seen is None:
                        return
                    answer = self.fake.answer(seen)
                    last = seen.headers.get("connection", "").lower() == "close"
                except Refusal as refusal:  # of the head: where this request ends is not known
                    self.fake.violate(refusal.note)
                    self.write(refusal.answer())
                    return self.drain()
                if not self.write(answer) or last:
                    return
        except (ClientLeft, OSError):
            if seen is not None:
                self.fake.client_left(seen)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection."""
        self.sock.close()

    def drain(self) -> None:
        """Reads what is still coming: closing on unread bytes would reset the answer away."""
        self.sock.shutdown(socket.SHUT_WR)
        self.sock.settimeout(1)
        while self.sock.recv(65536):
            pass

    def read(self) -> Seen | None:
        """The next request, None at the end of the connection."""
        while b"\r\n\r\n" not in self.buffer:
            if len(self.buffer) > 65536:
                raise plain(431, "Request Header Fields Too Large")
            data = self.sock.recv(65536)
            if not data:
                return None
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        method, target, fields = self.parse(head)
        sizes = [value for name, value in fields if name == "content-length"]
        size = int(sizes[0]) if sizes and re.fullmatch(r"\d+", sizes[0]) else None
        check_http(method, target, fields, size)
        while len(self.buffer) < (size or 0):
            data = self.sock.recv(1 << 20)
            if not data:
                return None
            self.buffer += data
        raw, self.buffer = self.buffer[: size or 0], self.buffer[size or 0 :]
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        seen = Seen(method, target, dict(fields), body, raw, self.number, self.via)
        return self.fake.record(seen)

    @staticmethod
    def parse(head: bytes) -> tuple[str, str, list[tuple[str, str]]]:
        """(method, target, [(lower-case name, value)]) of a head that keeps to the grammar."""
        first, *lines = head.decode("latin-1").split("\r\n")
        request = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.1", first)
        if not request:
            raise plain(400, f"Bad Request: {first!r}")
        fields = []
        for line in lines:
            found = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*?)[ \t]*", line)
            if not found:
                raise plain(400, f"Bad Request: header line {line!r}")
            fields.append((found.group(1).lower(), found.group(2)))
        return request.group(1), request.group(2), fields

    def write(self, answer: Answer) -> bool:
        """Writes an answer; True when the connection can carry another one."""
        pieces = answer.pieces()
        if answer.status:
            self.sock.sendall(self.head(answer, pieces))
        framing = answer.status and answer.chunked and not answer.framed
        for at, piece in enumerate(pieces):
            if at and answer.pause:
                self.wait(answer.pause)
            elif self.gone():
                raise ClientLeft
            if piece:
                self.sock.sendall(chunk(piece) if framing else piece)
        if answer.then == "hang":
            self.wait(threading.Event())
        elif answer.then == "reset":
            # Lingering for no time makes close() send RST instead of FIN.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer.then != "keep":
            return False
        if framing:
            try:
                self.sock.sendall(chunk(b""))
            except OSError:  # the client had all it wanted
                return False
        told = {name.lower(): value.lower() for name, value in answer.headers.items()}
        return answer.status != 0 and told.get("connection") != "close"

    @staticmethod
    def head(answer: Answer, pieces: list[bytes]) -> bytes:
        """Status line and headers, those of the answer first."""
        headers = {"Content-Type": _content_type(answer.status, b"".join(pieces)), **answer.headers}
        told = {name.lower() for name in headers}
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.then == "close" and "content-length" not in told:
            headers["Connection"] = "close"
        elif "content-length" not in told:
            headers["Content-Length"] = str(sum(map(len, pieces)))
        lines = [
            f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def gone(self) -> bool:
        """Whether the client has closed its side."""
        if not select.select([self.sock], [], [], 0)[0]:
            return False
        return not self.sock.recv(1, socket.MSG_PEEK)

    def wait(self, event: threading.Event) -> None:
        """Waits for a test, and looks after the client meanwhile."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not event.wait(LOCK_PROBE_SECONDS):
            if self.gone() or self.fake.stopping.is_set():
                raise ClientLeft
            if time.monotonic() > deadline:
                self.fake.violate(
                    "waited too long: a pause that no test ended, or a client that never leaves"
                )
                raise ClientLeft


# ---- FakeService ---------------------------------------------------------------------------------


class FakeService:
    """A server on loopback, a context manager; `is_call` and `route` tell what it imitates."""

    def __init__(self) -> None:
        self.requests: list[Seen] = []
        self.calls: list[Seen] = []
        self.cancelled: list[Seen] = []
        self.violations: list[str] = []
        self.stopping = threading.Event()
        self._queue: deque[Answer] = deque()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._connections = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._doors: list[tuple[socket.socket, Callable[[socket.socket, int], None]]] = []
        self.host = self._open_door(lambda sock, number: Connection(self, sock, number).serve())
        self.url = f"http://{self.host}"

    def __enter__(self) -> Self:
        for door, serve in self._doors:
            self._start(self._accept, door, serve)
        return self

    def __exit__(self, *_: object) -> None:
        # shutdown() wakes the threads that wait in accept() and recv(), the accepting ones first;
        # the plain one, for that of an SSLSocket tears down what its thread is using.
        self.stopping.set()
        doors = [door for door, _ in self._doors]
        for door in doors:
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[: len(doors)]:
            thread.join(5)
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads[len(doors) :]:
            thread.join(5)
        for door in doors:
            door.close()

    # What an imitation tells

    def is_call(self, seen: Seen) -> bool:
        """Whether a request asks a model for an answer."""
        raise NotImplementedError

    def route(self, seen: Seen) -> Answer:
        """The answer to a request, or a Refusal."""
        raise NotImplementedError

    # What tests call

    def queue(self, answer: Answer) -> None:
        """This answer for the next generation call that is not refused, instead of the brain's."""
        self._queue.append(answer)

    def wait_until(self, true: Callable[[], bool], timeout: float = 5) -> bool:
        """Waits for a condition over the lists; False when `timeout` seconds were not enough."""
        with self._news:
            return self._news.wait_for(true, timeout)

    def wait_calls(self, count: int, timeout: float = 5) -> bool:
        """Waits until so many generation calls have arrived."""
        return self.wait_until(lambda: len(self.calls) >= count, timeout)

    def wait_cancelled(self, timeout: float = 5, count: int = 1) -> bool:
        """Waits until so many clients have left in the middle of an answer."""
        return self.wait_until(lambda: len(self.cancelled) >= count, timeout)

    # What connections call

    def violate(self, note: str) -> None:
        """Writes down what a well-behaved client would not have done."""
        if note:
            with self._lock:
                self.violations.append(note.strip())

    def record(self, seen: Seen) -> Seen:
        """Takes a request into the lists."""
        with self._news:
            self.requests.append(seen)
            if self.is_call(seen):
                self.calls.append(seen)
            self._news.notify_all()
        return seen

    def client_left(self, seen: Seen) -> None:
        """Takes a call into `cancelled`."""
        with self._news:
            if not self.stopping.is_set() and any(seen is call for call in self.calls):
                self.cancelled.append(seen)
            self._news.notify_all()

    def answer(self, seen: Seen) -> Answer:
        """The answer to one request."""
        try:
            return self.route(seen)
        except Refusal as refusal:
            self.violate(refusal.note)
            return refusal.answer()
        except Exception as error:  # noqa: BLE001
            # A brain's assertion, or a body that no rule foresaw: the test must hear of it.
            self.violate(f"{type(error).__name__} while answering {seen.path}: {error}")
            return plain(500, "Internal Server Error").answer()

    # Inside

    def _open_door(self, serve: Callable[[socket.socket, int], None]) -> str:
        """A listening port as host:port; `serve` gets each of its sockets in a thread."""
        door = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._doors.append((door, serve))
        return f"127.0.0.1:{door.getsockname()[1]}"

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, door: socket.socket, serve: Callable[[socket.socket, int], None]) -> None:
        while not self.stopping.is_set():
            try:
                sock, _ = door.accept()
            except OSError:
                return
            with self._lock:
                self._connections += 1
                self._sockets.append(sock)
                self._start(serve, sock, self._connections)

    def _take(self, line: deque[Answer], check: Callable[[], None]) -> Answer | None:
        """The next prepared answer, after `check` unless that answer asks for none."""
        with self._lock:
            if not line or line[0].strict:
                check()
            return line.popleft() if line else None


# ---- FakeCopilot ---------------------------------------------------------------------------------

GENERATION = ("/chat/completions", "/v1/messages", "/responses")
#: Seen on every successful generation answer, and on no other.
QUOTA_HEADERS = {
    **{
        f"x-quota-snapshot-{bucket}": f"{figures}&rst=2026-12-01T00%3A00%3A00Z&totRem={rest}"
        for bucket, figures, rest in (
            ("chat", "ent=-1&ov=0.0&ovPerm=false&rem=100.0", "-1"),
            ("completions", "ent=-1&ov=0.0&ovPerm=false&rem=100.0", "-1"),
            ("premium_interactions", "ent=1500&ov=0.0&ovPerm=true&rem=80.7", "1210.4"),
        )
    },
    "x-usage-ratelimit-session": "ent=500&rem=97.5&rst=2026-11-22T15%3A00%3A00Z",
    "x-usage-ratelimit-weekly": "ent=5000&rem=90.0&rst=2026-11-27T10%3A00%3A00Z",
}
_DEVICE_CODE = "0123456789abcdef0123456789abcdefEXAMPLE1"
_CLIENT_IDS = ("Iv1.b507a08c87ecfe98", "01ab8ac9400c4e429b23")


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status, {"Content-Type": "application/json", **(headers or {})}, dump(value), chunked=False
    )


def auto_model() -> Json:
    """A model that only Auto has: shaped as in the list, without the flags that change."""
    entry = _model(
        "gpt-6.1-luna",
        "OpenAI",
        ["/responses", "ws:/responses"],
        (272_000, 64_000),
        supports={"structured_outputs": True, "reasoning_effort": ["low", "high"]},
    )
    return {key: value for key, value in entry.items() if key != "model_picker_enabled"}


def seat_user() -> Json:
    """A Business seat that is billed by tokens: no limit, but its use is counted."""
    user = default_user()
    premium = {**user["quota_snapshots"]["chat"], "quota_id": "premium_interactions",
               "credits_used": 289.6, "entitlement": 0, "unlimited": True}  # fmt: skip
    snapshots = {**user["quota_snapshots"], "premium_interactions": premium}
    return {**user, "copilot_plan": "business", "quota_snapshots": snapshots}


def default_user() -> Json:
    """A paying account, billed by tokens."""
    told = {"overage_count": 0, "token_based_billing": True,
            "timestamp_utc": "2026-11-22T10:00:00.000Z"}  # fmt: skip
    unlimited = {
        **told, "entitlement": 0, "remaining": 0, "quota_remaining": 0.0, "unlimited": True,
        "percent_remaining": 100.0, "overage_permitted": False, "has_quota": False,
        "quota_reset_at": 0,
    }  # fmt: skip
    premium = {
        **told, "entitlement": 1500, "remaining": 1210, "quota_remaining": 1210.4,
        "percent_remaining": 80.7, "unlimited": False, "overage_permitted": True,
        "overage_entitlement": 5000, "credits_used": 289.6, "has_quota": True,
        "quota_reset_at": 1796083200,
    }  # fmt: skip
    buckets = {"chat": unlimited, "completions": unlimited, "premium_interactions": premium}
    return {
        "login": "octocat", "copilot_plan": "individual_pro", "access_type_sku": "EXAMPLE_SKU",
        "chat_enabled": True, "token_based_billing": True,
        "quota_reset_date": "2026-12-01", "quota_reset_date_utc": "2026-12-01T00:00:00.000Z",
        "quota_snapshots": {name: {"quota_id": name, **b} for name, b in buckets.items()},
    }  # fmt: skip


class FakeCopilot(FakeService):
    """The server; a context manager. Its lists may be read and its attributes set at any time."""

    def __init__(
        self,
        models: list[Json] | None = None,
        brain: Brain | None = None,
        github_token: str = "ghu_EXAMPLE000000000000000000000000000000",
    ) -> None:
        super().__init__()
        self.model_list = default_models() if models is None else models
        self.brain = brain or default_brain
        self.github_token = github_token
        #: `refresh_in` of the tokens given out; they last until `expire_tokens()`.
        self.token_life = 1500
        #: Answers that take the place of the next exchanges and of the next model lists.
        self.exchange_answers: deque[Answer] = deque()
        self.models_answers: deque[Answer] = deque()
        #: `error` values of the next device-flow polls; after them the sign-in succeeds.
        self.device_states = deque(["authorization_pending", "authorization_pending", "slow_down"])
        #: Answers that take the place of the next polls, before those states.
        self.device_answers: deque[Answer] = deque()
        #: `interval` of the device flow; who polls faster is told of in `violations`.
        self.poll_seconds = 1
        self.expires_in = 900
        #: The only client id that is known, "" for those of the editors.
        self.only_client = ""
        #: Of good answers; older versions of the service send none.
        self.quota_headers = dict(QUOTA_HEADERS)
        #: What `/copilot_internal/user` says of the account, and answers that take its place.
        self.user = default_user()
        self.user_answers: deque[Answer] = deque()
        #: GitHub does not exchange this account's token, the Copilot API takes it itself.
        self.direct = False
        #: The Authorization scheme of such a token; "" is "Bearer" for fine-grained and server
        #: tokens, and "token", which a plan's own host wants, for others.
        self.direct_scheme = ""
        #: Ways to Auto: "auto", "session" (the older one), "unnamed" (a chat without a model).
        self.auto_ways = {"auto"}
        #: What Auto chooses next, the first again and again; such models need not be listed.
        self.auto_models: list[Json] = [auto_model()]
        #: Nothing but Auto is allowed, as on Free and Student plans.
        self.only_auto = False
        #: Seconds that a choice of Auto lasts.
        self.session_life = 86_400.0
        #: Answers that take the place of the next ones to `/auto` and `/models/session`.
        self.auto_answers: deque[Answer] = deque()
        self._sessions: dict[str, tuple[str, float]] = {}
        self.exchanges = 0
        self.embedded = 0
        self.issued = Issued()
        self._live_tokens: set[str] = set()
        self._all_tokens: set[str] = set()
        self._request_ids: set[str] = set()
        #: Interactions seen, and those whose last call failed: their retry may call itself `agent`.
        self._interactions: set[str] = set()
        self._failed: set[str] = set()
        self._device_code = ""
        self._polled_at = 0.0
        self._poll_after = 0.0

    # What tests call

    @property
    def secrets(self) -> set[str]:
        """All that was handed out and must never be shown."""
        return {self.github_token, *self._all_tokens}

    @property
    def for_programs(self) -> bool:
        """Whether the token is of a kind that GitHub never exchanges."""
        return self.github_token.startswith(PROGRAM_TOKENS)

    def expire_tokens(self) -> None:
        """Every Copilot token handed out so far is refused; those refusals are no violations."""
        with self._lock:
            self._live_tokens.clear()

    # Routes

    def is_call(self, seen: Seen) -> bool:
        """A POST to one of the three dialects, or for embeddings."""
        return seen.method == "POST" and seen.path in (*GENERATION, "/embeddings")

    def route(self, seen: Seen) -> Answer:
        """The answer to one request."""
        routes: dict[tuple[str, str], Callable[[Seen], Answer]] = {
            ("POST", "/login/device/code"): self._start_device,
            ("POST", "/login/oauth/access_token"): self._access_token,
            ("GET", "/user"): self._user,
            ("GET", "/copilot_internal/v2/token"): self._exchange,
            ("GET", "/copilot_internal/user"): self._quota,
            ("GET", "/models"): self._models,
            **{("POST", path): self._generate for path in GENERATION},
            ("POST", "/embeddings"): self._embed,
            ("POST", "/auto"): self._auto,
            ("POST", "/models/session"): self._auto,
        }
        route = routes.get((seen.method, seen.path))
        if (
            route is None
            and seen.method == "POST"
            and re.fullmatch(r"/models/[^/]+/policy", seen.path)
        ):
            route = self._policy
        if route is None:
            raise plain(404, "404 page not found", f"{seen.method} {seen.path}: 404 page not found")
        return route(seen)

    def _start_device(self, seen: Seen) -> Answer:
        client = self._form(seen).get("client_id")
        if client not in _CLIENT_IDS or self.only_client not in ("", client):
            raise Refusal(
                404, dump({"error": "Not Found"}), "" if self.only_client else "unknown client_id"
            )
        self._device_code = _DEVICE_CODE
        self._poll_after, self._polled_at = float(self.poll_seconds), time.monotonic()
        code = {
            "device_code": _DEVICE_CODE, "user_code": "ABCD-1234", "expires_in": self.expires_in,
            "verification_uri": f"{self.url}/login/device", "interval": self.poll_seconds,
        }  # fmt: skip
        return self._as_accepted(seen, code)

    def _access_token(self, seen: Seen) -> Answer:
        form = self._form(seen)
        if form.get("grant_type") != "urn:ietf:params:oauth:grant-type:device_code":
            state = "unsupported_grant_type"
        elif form.get("device_code") != self._device_code:
            state = "incorrect_device_code"
            self.violate("a device code that is not known, or was used up")
        else:
            now = time.monotonic()
            if now - self._polled_at < self._poll_after - 0.1:
                self.violate(f"polled again after {now - self._polled_at:.2f} seconds")
            self._polled_at = now
            if self.device_answers:
                return self.device_answers.popleft()
            state = self.device_states.popleft() if self.device_states else ""
        if not state:
            self._device_code = ""  # it is good for one sign-in
            return self._as_accepted(
                seen, {"access_token": self.github_token, "token_type": "bearer", "scope": ""}
            )
        slower = {"interval": self.poll_seconds} if state == "slow_down" else {}
        return self._as_accepted(
            seen, {"error": state, "error_description": state.replace("_", " "), **slower}
        )

    @staticmethod
    def _form(seen: Seen) -> Json:
        """The fields of a sign-in request, JSON or form-encoded."""
        return seen.body if isinstance(seen.body, dict) else dict(parse_qsl(seen.raw.decode()))

    def _as_accepted(self, seen: Seen, value: Json) -> Answer:
        """JSON if it was asked for, else a form, as GitHub's sign-in pages do."""
        if not seen.headers.get("user-agent"):
            raise plain(403, "Request forbidden by administrative rules.", "User-Agent missing")
        if "application/json" in seen.headers.get("accept", ""):
            return _json(value)
        self.violate(f"{seen.path} without Accept: application/json")
        return Answer(
            200,
            {"Content-Type": "application/x-www-form-urlencoded"},
            urlencode(value).encode(),
            chunked=False,
        )

    def _user(self, seen: Seen) -> Answer:
        if seen.headers.get("authorization", "").partition(" ")[2] != self.github_token:
            raise Refusal(401, dump({"message": "Bad credentials"}), "Bad credentials on /user")
        return _json({"login": "octocat", "id": 1})

    def _exchange(self, seen: Seen) -> Answer:
        with self._lock:
            self.exchanges += 1
            number = self.exchanges
        prepared = self._take(
            self.exchange_answers,
            lambda: check_management(seen, self.github_token, self._all_tokens),
        )
        if prepared:
            return prepared
        if self.for_programs:
            why = "Resource not accessible by personal access token"
            raise Refusal(403, dump({"message": why, "status": "403"}), why)
        if self.direct:
            raise Refusal(404, dump({"message": "Not Found", "status": "404"}), "")
        expires = int(time.time()) + self.token_life + 300
        token = (
            f"tid=fake{number};exp={expires};sku=EXAMPLE_SKU;st=dotcom;chat=1;8kp=1:5f1cEXAMPLEMAC"
        )
        with self._lock:
            self._live_tokens.add(token)
            self._all_tokens.add(token)
        return _json({
            "token": token, "expires_at": expires, "refresh_in": self.token_life,
            "sku": "EXAMPLE_SKU", "individual": True,
            "endpoints": {"api": self.url, "proxy": "https://proxy.individual.githubcopilot.com",
                          "telemetry": "https://telemetry.individual.githubcopilot.com"},
            "chat_enabled": True, "public_suggestions": "enabled", "organization_list": [],
            "enterprise_list": None, "limited_user_quotas": None, "limited_user_reset_date": None,
        })  # fmt: skip

    def _quota(self, seen: Seen) -> Answer:
        prepared = self._take(
            self.user_answers,
            lambda: check_management(seen, self.github_token, self._all_tokens),
        )
        return prepared or _json({**self.user, "endpoints": {"api": self.url}})

    def _models(self, seen: Seen) -> Answer:
        prepared = self._take(self.models_answers, lambda: self._check_access(seen))
        return prepared or _json({"object": "list", "data": self.model_list})

    def _auto(self, seen: Seen) -> Answer:
        """A model for a conversation, and the token that its requests carry."""
        return self._take(self.auto_answers, lambda: self._check_auto(seen)) or self._choose(seen)

    def _check_auto(self, seen: Seen) -> None:
        self._check_access(seen)
        body, version = self._object(seen), seen.headers["x-github-api-version"]
        if seen.path == "/auto":
            if "auto" not in self.auto_ways:
                raise Refusal(404, dump({"error": "not_found"}), "")
            if version < "2026-08-01":
                raise Refusal(404, dump({"error": "invalid apiVersion"}), "invalid apiVersion")
            if not isinstance(body.get("prompt"), str) or set(body) - {
                "prompt",
                "has_image",
                "tier",
            }:
                raise Refusal(400, dump({"error": "invalid_request"}), f"/auto with {set(body)}")
            return
        if "session" not in self.auto_ways:
            raise Refusal(404, b"<html><body>Not Found</body></html>", "")
        if body != {"auto_mode": {"model_hints": ["auto"]}}:
            raise Refusal(400, dump({"error": "invalid_request"}), f"/models/session with {body}")

    def _choose(self, seen: Seen) -> Answer:
        with self._lock:
            chosen = self.auto_models[0]
            if len(self.auto_models) > 1:
                self.auto_models.append(self.auto_models.pop(0))
            token = f"auto-session-{len(self._sessions)}-EXAMPLE"
            self._sessions[token] = chosen["id"], time.time() + self.session_life
            self._all_tokens.add(token)
        told = {"session_token": token, "expires_at": int(time.time() + self.session_life),
                "discounted_costs": {chosen["id"]: 0.1}}  # fmt: skip
        if seen.path == "/auto":
            return _json({**told, "selected_model": chosen})
        offered = [model["id"] for model in self.auto_models]
        return _json({**told, "available_models": offered, "selected_model": chosen["id"]})

    def end_sessions(self) -> None:
        """Every choice of Auto made so far is refused; those refusals are no violations."""
        self._sessions = {token: (name, 0.0) for token, (name, _) in self._sessions.items()}

    def _model_of(self, seen: Seen) -> Json:
        """The model that is called, which Auto or the caller has chosen."""
        body, token = seen.body, seen.headers.get("copilot-session-token")
        if token is not None:
            name, ends = self._sessions.get(token, ("", 0.0))
            if not name:
                raise plain(401, "unauthorized: unknown session token")
            if ends < time.time() - 1:
                raise plain(401, "unauthorized: session token expired", "")
            if name != body.get("model"):
                raise plain(400, f"the session token is for {name}, not {body.get('model')}")
            known = [*self.model_list, *self.auto_models]
            return find_model(known, name, seen.path)
        if "model" not in body and seen.path == "/chat/completions":
            if "unnamed" in self.auto_ways:
                return find_model(self.model_list, "gpt-4.1", seen.path)
            raise capi(400, "model is required", "invalid_request_body")
        if self.only_auto:
            raise capi(400, "The requested model is not supported.", "model_not_supported",
                       param="model", type="invalid_request_error")  # fmt: skip
        return find_model(self.model_list, body.get("model"), seen.path)

    def _policy(self, seen: Seen) -> Answer:
        self._check_access(seen)
        name = seen.path.split("/")[2]
        found = [m for m in self.model_list if m.get("id") == name and "policy" in m]
        if not found or seen.body != {"state": "enabled"}:
            raise plain(404, "404 page not found", f"{seen.path} with {seen.body}")
        found[0]["policy"]["state"] = "enabled"
        return _json({"state": "enabled"})

    # Generation

    def _generate(self, seen: Seen) -> Answer:
        prepared = self._take(self._queue, lambda: self._check_call(seen))
        interaction = seen.headers.get("x-interaction-id", "")
        answer = prepared or self._imitate(seen, interaction in self._interactions)
        with self._lock:
            self._interactions.add(interaction)
            self._failed.discard(interaction)
            if not 200 <= answer.status < 300:
                self._failed.add(interaction)
        quota = self.quota_headers if 200 <= answer.status < 300 else {}
        return replace(answer, headers={**self._ids(seen), **quota, **answer.headers})

    def _ids(self, seen: Seen) -> dict[str, str]:
        """The headers by which the service knows an answer again."""
        asked = seen.headers.get("x-request-id", "")
        return {"x-request-id": asked, "x-github-request-id": f"FAKE:{len(self.calls):04X}"}

    def _imitate(self, seen: Seen, cached: bool) -> Answer:
        """The brain's answer in the endpoint's dialect."""
        voices: dict[str, tuple[str, type[ChatVoice | MessagesVoice | ResponsesVoice]]] = {
            "/chat/completions": ("chat", ChatVoice),
            "/v1/messages": ("messages", MessagesVoice),
            "/responses": ("responses", ResponsesVoice),
        }
        dialect, voice_of = voices[seen.path]
        model = self._model_of(seen)
        parts = self.brain(dialect, copy.deepcopy(seen.body))
        with self._lock:
            voice = voice_of(parts, seen.body, model, self.issued, cached)
            if not seen.body.get("stream"):
                return _json(voice.whole())
            return Answer(200, {"Content-Type": "text/event-stream"}, voice.frames())

    def _embed(self, seen: Seen) -> Answer:
        """Vectors; the first answer and every other one lack what is missing at times."""
        answer = self._take(self._queue, lambda: self._check_embeddings(seen))
        if answer is None:
            with self._lock:
                self.embedded += 1
                answer = _json(embeddings_of(seen.body, bare=self.embedded % 2 == 1))
        return replace(answer, headers={**self._ids(seen), **answer.headers})

    def _check_embeddings(self, seen: Seen) -> None:
        """Everything about a call for embeddings."""
        self._check_access(seen)
        body = self._object(seen)
        model = find_model(self.model_list, body.get("model"), seen.path)
        self.violate(check_vision(seen, model))
        check_embeddings(body, model)
        if "x-initiator" in seen.headers:
            self.violate("X-Initiator on /embeddings, where nobody initiates a turn")

    def _check_access(self, seen: Seen) -> None:
        """Token and headers of any request to the Copilot API."""
        check_secrets(seen)
        scheme, _, token = seen.headers.get("authorization", "").partition(" ")
        if token == self.github_token and (self.direct or self.for_programs):
            if scheme != (self.direct_scheme or ("Bearer" if self.for_programs else "token")):
                raise plain(400, "Bad Request: Authorization header is badly formatted")
            integration = seen.headers.get("copilot-integration-id")
            if self.for_programs and integration not in _PROGRAM_INTEGRATIONS:
                raise plain(400, "Personal Access Tokens are not supported for this endpoint")
        elif token == self.github_token:
            raise forbidden("the GitHub token was sent to the Copilot API")
        elif scheme != "Bearer" or token not in self._live_tokens:
            note = "" if token in self._all_tokens else "unauthorized: not a token from here"
            raise plain(401, "unauthorized: token expired", note)
        check_identity(seen, self.host)
        request = seen.headers.get("x-request-id", "")
        if not is_uuid(request) or request in self._request_ids:
            self.violate(f"X-Request-Id is missing, no UUID, or used twice: {request!r}")
        self._request_ids.add(request)

    @staticmethod
    def _object(seen: Seen) -> Json:
        """The body of a call, if it is an object and called JSON."""
        kind = seen.headers.get("content-type", "").split(";")[0]
        if not isinstance(seen.body, dict) or kind != "application/json":
            raise bad_body("no JSON object, or not called so")
        return seen.body

    def _check_call(self, seen: Seen) -> None:
        """Everything about a generation call; a refused one marks its interaction as failed."""
        try:
            self._check_access(seen)
            body = self._object(seen)
            model = self._model_of(seen)
            self.violate(check_vision(seen, model))
            if seen.path == "/chat/completions":
                check_chat(body, model, self.issued)
                if body.get("stream") and not (body.get("stream_options") or {}).get(
                    "include_usage"
                ):
                    self.violate("a chat stream without stream_options.include_usage")
            elif seen.path == "/v1/messages":
                betas = set(re.findall(r"[^\s,]+", seen.headers.get("anthropic-beta", "")))
                check_messages(body, model, betas, self.issued)
                if "x-anthropic-billing-header:" in text_of(body.get("system")):
                    self.violate(
                        "a billing line in the system prompt, which changes and defeats caching"
                    )
            else:
                check_responses(body, model, self.issued)
            self._check_conversation(seen)
        except Refusal:
            self._failed.add(seen.headers.get("x-interaction-id", ""))
            raise

    def _check_conversation(self, seen: Seen) -> None:
        """The headers that tell who asks, and in which conversation; wrong ones are only noted."""
        interaction = seen.headers.get("x-interaction-id", "")
        if not is_uuid(interaction):
            self.violate(f"X-Interaction-Id is missing or no UUID: {interaction!r}")
        right = right_initiators(seen.path, seen.body)
        if interaction in self._failed:
            right.add("agent")
        said = seen.headers.get("x-initiator")
        if said not in right:
            self.violate(f"X-Initiator is {said}, should be {' or '.join(sorted(right))}")
