"""What the Kiro service refuses: its errors, its hosts, and the rules of headers and bodies.

`fake_kiro.py` asks these rules; they are plain functions of a request, of the list of models and
of what the imitation has given out. A Refusal is an answer; a note is for `violations` alone.
Facts are from public sources up to 2026-10; where they leave a choice, the harder one stands here
and a comment says so.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import platform
import re
import socket
import uuid
from collections.abc import Callable
from typing import Any

from fakes import Answer, Issued, Json, Refusal, Seen, dump

# ---- Refusals ------------------------------------------------------------------------------------

JSON_TYPE = {"Content-Type": "application/json"}
BAD_TOKEN = "The bearer token included in the request is invalid."


class Fault(Refusal):
    """An error of a service of AWS; `route` sets `rpc` when it was called in the CLI shape."""

    def __init__(
        self, status: int, kind: str, text: str, reason: str | None = None, note: str | None = None
    ) -> None:
        super().__init__(status, b"", f"{reason or kind}: {text}" if note is None else note)
        self.kind = kind
        self.text = text
        self.reason = reason
        self.rpc = False

    def answer(self) -> Answer:
        """The REST form, or that of awsJson."""
        body: Json = {"message": self.text, "reason": self.reason}
        headers = {"x-amzn-requestid": str(uuid.uuid4())}
        if self.rpc:
            headers["Content-Type"] = "application/x-amz-json-1.0"
            body["__type"] = f"com.amazon.aws.codewhisperer#{self.kind}"
        else:
            headers["Content-Type"] = "application/json"
            headers["x-amzn-ErrorType"] = f"{self.kind}:http://internal.amazon.com/coral/"
        return Answer(self.status, headers, dump(body), chunked=False)


class SignInFault(Refusal):
    """An error of a sign-in service; `kind` is the exception's name, as a header of SSO OIDC."""

    def __init__(self, status: int, body: Json, note: str, kind: str = "") -> None:
        super().__init__(status, dump(body), note)
        self.kind = kind

    def answer(self) -> Answer:
        """JSON, and called so."""
        kind = {"x-amzn-ErrorType": self.kind} if self.kind else {}
        return Answer(self.status, {**JSON_TYPE, **kind}, self.body, chunked=False)


def improper(why: str, reason: str = "REQUEST_BODY_INVALID") -> Fault:
    """The words for most of what is wrong in a body; only `violations` tells what it is."""
    note = f"{reason}: {why}"
    return Fault(400, "ValidationException", "Improperly formed request.", reason, note)


def invalid(text: str, reason: str | None, why: str = "") -> Fault:
    """A refused body with words of its own."""
    note = f"{reason or 'ValidationException'}: {why or text}"
    return Fault(400, "ValidationException", text, reason, note)


def denied(note: str, text: str = BAD_TOKEN, reason: str | None = None) -> Fault:
    """403, which the service says to expired tokens, wrong ARNs and suspended people alike."""
    return Fault(403, "AccessDeniedException", text, reason, note)


def unknown_operation(note: str) -> Fault:
    """What a host says that does not serve this path or target."""
    text = "The requested operation is not recognized by the service."
    return Fault(404, "UnknownOperationException", text, None, note)


_OIDC_NAMES = {
    "invalid_grant": "InvalidGrantException",
    "invalid_client": "InvalidClientException",
    "invalid_request": "InvalidRequestException",
    "invalid_scope": "InvalidScopeException",
    "unsupported_grant_type": "UnsupportedGrantTypeException",
    "authorization_pending": "AuthorizationPendingException",
    "slow_down": "SlowDownException",
    "expired_token": "ExpiredTokenException",
    "access_denied": "AccessDeniedException",
}


def oidc(error: str, description: str, note: str | None = None) -> SignInFault:
    """An error of SSO OIDC."""
    status = 401 if error == "invalid_client" else 400
    body = {"error": error, "error_description": description}
    note = f"{error}: {description}" if note is None else note
    return SignInFault(status, body, note, _OIDC_NAMES.get(error, ""))


# ---- Hosts ---------------------------------------------------------------------------------------

REGIONS = ("us-east-1", "eu-central-1")
_HOSTS = (
    (r"runtime\.(us-east-1|eu-central-1)\.kiro\.dev", {"ide", "cli"}),
    (r"management\.(us-east-1|eu-central-1)\.kiro\.dev", {"control"}),
    (r"q\.(us-east-1|eu-central-1)\.amazonaws\.com", {"ide", "cli", "control"}),
    (r"codewhisperer\.(us-east-1)\.amazonaws\.com", {"ide", "control"}),
    (r"oidc\.([a-z0-9-]+)\.amazonaws\.com", {"oidc"}),
    (r"prod\.(us-east-1)\.auth\.desktop\.kiro\.dev", {"desktop"}),
    (r"idp\.()example\.com", {"idp"}),
)


def find_host(name: str) -> tuple[set[str], str] | None:
    """(planes that a host serves, its region), None for a name that does not resolve."""
    for pattern, planes in _HOSTS:
        if found := re.fullmatch(pattern, name):
            return planes, found.group(1)
    return None


def is_legacy(seen: Seen) -> bool:
    """Whether a request came to one of the two older hosts."""
    return seen.via.endswith(".amazonaws.com")


# ---- Rules: headers ------------------------------------------------------------------------------

_IDE_AGENT = r"aws-sdk-js/[\d.]+ KiroIDE-[\d.]+-(?P<machine>\S+)"
_IDE_LONG = (
    r"aws-sdk-js/[\d.]+ ua/2\.1 os/(darwin|linux|win32)#[\w.-]+ lang/js md/nodejs#[\d.]+ "
    r"api/codewhisperer%s#[\d.]+ (m/[\w,]+ )?KiroIDE-[\d.]+-(?P<machine>\S+)"
)
_CLI_AGENT = r"aws-sdk-rust/.* app/AmazonQ-For-CLI"
_ATTEMPT = r"attempt=\d+; max=\d+"
#: What each plane's headers look like; "?" may be left out. Wrong ones are noted, not refused.
_HEADERS: dict[str, dict[str, str]] = {
    "ide": {
        "accept": r"application/vnd\.amazon\.eventstream",
        "x-amzn-kiro-agent-mode": "vibe|spec",
        "x-amzn-codewhisperer-optout": "true",
        "x-amz-user-agent": _IDE_AGENT,
        "user-agent": _IDE_LONG % "streaming",
        "amz-sdk-request": _ATTEMPT,
        "accept-encoding?": "identity",
    },
    "cli": {
        "accept": r"\*/\*|application/vnd\.amazon\.eventstream",
        "x-amzn-codewhisperer-optout": "true",
        "x-amz-user-agent": _CLI_AGENT,
        "user-agent": _CLI_AGENT,
        "amz-sdk-request": _ATTEMPT,
        "accept-encoding?": "identity",
        "x-amzn-kiro-agent-mode?": "(?!)",
    },
    "control": {
        "accept": r"application/json.*|\*/\*",
        "x-amz-user-agent": f"{_IDE_AGENT}|{_CLI_AGENT}",
        "user-agent": f"{_IDE_LONG % 'runtime'}|{_CLI_AGENT}",
        "amz-sdk-request": _ATTEMPT,
    },
    "desktop": {
        "content-type": r"application/json(;.*)?",
        "accept": r"application/json.*|\*/\*",
        "user-agent": r"KiroIDE-[\d.]+-(?P<machine>\S+)",
    },
}
CONTENT_TYPES = {"ide": "application/json", "cli": "application/x-amz-json-1.0"}
TOKEN_TYPES = {"api_key": "API_KEY", "external_idp": "EXTERNAL_IDP"}


def _of_this_host() -> set[str]:
    """Machine ids that give away the host's name."""
    names = {socket.gethostname(), platform.node()}
    return {hashlib.sha256(name.encode()).hexdigest() for name in names}


def header_notes(seen: Seen, plane: str) -> tuple[list[str], set[str]]:
    """(what is wrong with the headers of a request, machine ids in them)."""
    notes, machines = [], set()
    for name, pattern in _HEADERS.get(plane, {}).items():
        value = seen.headers.get(name.rstrip("?"))
        if value is None and name.endswith("?"):
            continue
        found = re.fullmatch(pattern, value or "")
        if not found:
            notes.append(f"{plane}: the header {name.rstrip('?')} is {value!r}")
        elif machine := found.groupdict().get("machine"):
            machines.add(machine)
    for machine in machines:
        if not re.fullmatch(r"[0-9a-f]{64}", machine):
            notes.append(f"the machine id {machine} is not 64 lower-case hex digits")
        elif machine in _of_this_host():
            notes.append("the machine id is made from the name of this host")
    return notes, machines


def is_uuid4(text: object) -> bool:
    """Whether a value is a random UUID in its usual spelling."""
    pattern = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    return isinstance(text, str) and bool(re.fullmatch(pattern, text))


# ---- Rules: the shape of a body ------------------------------------------------------------------

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _any(value: object) -> bool:
    return True


def _text(value: object) -> bool:
    return isinstance(value, str)


def _free(value: object) -> bool:
    return isinstance(value, dict)


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _uuid(value: object) -> bool:
    return isinstance(value, str) and bool(_UUID.fullmatch(value))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _one_of(text: str) -> Callable[[object], bool]:
    allowed = _words(text)
    return lambda value: isinstance(value, str) and value in allowed


#: Object -> its members; "*" are required. A value is judged by a function, or is an object by its
#: name, or a list of such objects. There are no others: an unknown key is refused, and so are null,
#: empty lists and empty objects. `agentMode` is a header; `systemPrompt` and `inferenceConfig`
#: have been seen with single clients only, so they are unknown here.
_SHAPES: dict[str, dict[str, Any]] = {
    "request": {
        "conversationState*": "state", "profileArn": _text, "additionalModelRequestFields": _free,
    },
    "state": {
        "currentMessage*": "message", "history": ["message"],
        "chatTriggerType*": _one_of("MANUAL DIAGNOSTIC INLINE_CHAT"),
        "conversationId": _uuid, "agentContinuationId": _uuid,
        "agentTaskType": _one_of("vibe spectask"),
        "workspaceId": _text, "customizationArn": _text,
    },
    "message": {"userInputMessage": "user", "assistantResponseMessage": "assistant"},
    "user": {
        "content*": _text, "modelId*": _text, "origin*": _text, "images": ["image"],
        "userInputMessageContext": "context", "userIntent": _text, "documents": ["document"],
        "cachePoint": "cachePoint", "clientCacheConfig": "cacheConfig",
    },
    "context": {
        "tools": ["tool"], "toolResults": ["toolResult"], "envState": "env",
        "editorState": _free, "shellState": _free, "gitState": _free,
        "additionalContext": ["additional"],
    },
    "env": {
        "operatingSystem": _one_of("linux macos windows"), "currentWorkingDirectory": _text,
        "environmentVariables": ["variable"], "timezoneOffset": _number,
    },
    "variable": {"key": _text, "value": _text},
    "additional": {"name": _text, "description": _text, "innerContext": _text},
    "tool": {"toolSpecification*": "specification"},
    "specification": {"name*": _text, "description*": _text, "inputSchema*": "inputSchema"},
    "inputSchema": {"json*": _free},
    "toolResult": {
        "toolUseId*": _text, "content*": ["resultContent"], "status": _one_of("success error"),
    },
    "resultContent": {"text": _text, "json": _any},
    "image": {"format*": _text, "source*": "source"},
    "source": {"bytes*": _text},
    "document": {
        "name*": _text, "source*": "source",
        "format*": _one_of("csv doc docx html md pdf txt xls xlsx"),
    },
    "assistant": {
        "content*": _text, "messageId": _text, "toolUses": ["toolUse"],
        "reasoningContent": "reasoning", "cachePoint": "cachePoint",
    },
    "toolUse": {"toolUseId*": _text, "name*": _text, "input*": _free},
    "reasoning": {"reasoningText": "reasoningText", "redactedContent": _text},
    "reasoningText": {"text*": _text, "signature*": _text},
    "cachePoint": {"type*": _one_of("default")},
    "cacheConfig": {"useClientCachingOnly": _any},
}  # fmt: skip
#: Of these exactly one member is there.
_UNIONS = {"message", "reasoning", "resultContent"}


def check_shape(value: Any, shape: str, where: str = "") -> None:
    """Refuses an object that the service's model does not describe."""
    if not isinstance(value, dict) or not value:
        raise improper(f"{where or 'the body'} is no object, or an empty one")
    members = {name.rstrip("*"): kind for name, kind in _SHAPES[shape].items()}
    if unknown := sorted(set(value) - set(members)):
        raise improper(f"{where}.{unknown[0]} is unknown".lstrip("."))
    needed = {name[:-1] for name in _SHAPES[shape] if name.endswith("*")}
    if missing := sorted(needed - set(value)):
        raise improper(f"{where}.{missing[0]} is missing".lstrip("."))
    if shape in _UNIONS and len(value) != 1:
        raise improper(f"{where} has {len(value)} members instead of one")
    for name, item in value.items():
        kind, path = members[name], f"{where}.{name}".lstrip(".")
        if isinstance(kind, str):
            check_shape(item, kind, path)
        elif isinstance(kind, list):
            if not isinstance(item, list) or not item:
                raise improper(f"{path} is no list, or an empty one")
            for at, part in enumerate(item):
                check_shape(part, kind[0], f"{path}[{at}]")
        elif not kind(item):
            raise improper(f"{path} is {str(item)[:80]!r}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_body(raw: bytes) -> Json:
    """The JSON of a request, which is UTF-8 without lone surrogates."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise improper("a lone surrogate", "REQUEST_BODY_INVALID_JSON") from None
    except ValueError as error:
        raise improper(f"no JSON in UTF-8: {error}", "REQUEST_BODY_INVALID_JSON") from None
    if not isinstance(body, dict):
        raise improper("the body is no object")
    return body


# ---- Rules: turns --------------------------------------------------------------------------------

#: Sentences that clients put beside tool results, and that models take for the user's words.
_PADDING = {"continue", "continue.", "please continue.", ".", "tool results provided."}
_MOST_ENTRIES = 10_000


def user_turns(body: Json) -> list[Json]:
    """Every userInputMessage, the current one last."""
    state = body["conversationState"]
    turns = [*state.get("history", ()), state["currentMessage"]]
    return [turn["userInputMessage"] for turn in turns if "userInputMessage" in turn]


def current(body: Json) -> Json:
    """The current message, which a checked body has from the user."""
    message: Json = body["conversationState"]["currentMessage"]["userInputMessage"]
    return message


def results_of(user: Json) -> list[Json]:
    """The tool results of a user turn."""
    results: list[Json] = user.get("userInputMessageContext", {}).get("toolResults", [])
    return results


def tools_of(user: Json) -> list[Json]:
    """The tool specifications of a user turn."""
    tools = user.get("userInputMessageContext", {}).get("tools", [])
    return [tool["toolSpecification"] for tool in tools]


def _check_assistant(turn: Json, where: str, used: set[str]) -> None:
    uses = turn.get("toolUses", [])
    if not uses and not turn["content"].strip():
        raise improper(f"{where}: neither text nor tool uses")
    for use in uses:
        if not _ID.fullmatch(use["toolUseId"]):
            raise improper(f"{where}: the tool use id {use['toolUseId']}")
        if not _ID.fullmatch(use["name"]):
            raise invalid("Invalid tool use format.", None, f"{where}: the name {use['name']}")
        # Harder reading: an id may not come back in a later turn either.
        if use["toolUseId"] in used:
            raise improper(f"{where}: {use['toolUseId']} used twice", "TOOL_DUPLICATE")
        used.add(use["toolUseId"])


def _check_results(user: Json, where: str, waiting: list[str]) -> None:
    found = [result["toolUseId"] for result in results_of(user)]
    if len(set(found)) != len(found):
        raise improper(f"{where}: two results with one id", "TOOL_DUPLICATE")
    if set(found) != set(waiting):
        why = f"{where}: results of {found}, tool uses {waiting} before"
        raise improper(why, "TOOL_USE_RESULT_MISMATCH")


def check_turns(body: Json) -> list[str]:
    """The order of turns, what each must hold, and tools paired; returns what is only noted."""
    state, notes = body["conversationState"], []
    turns = [*state.get("history", ()), state["currentMessage"]]
    if len(turns) > _MOST_ENTRIES:
        raise improper(f"{len(turns)} turns")
    used: set[str] = set()
    waiting: list[str] = []
    called: set[str] = set()
    for at, turn in enumerate(turns):
        where = f"history[{at}]" if at < len(turns) - 1 else "currentMessage"
        # Harder reading of two: the turns alternate strictly, beginning and ending with the user.
        role = "assistantResponseMessage" if at % 2 else "userInputMessage"
        if role not in turn:
            raise improper(f"{where}: no {role}, so the turns do not alternate from the user on")
        if role == "assistantResponseMessage":
            _check_assistant(turn[role], where, used)
            waiting = [use["toolUseId"] for use in turn[role].get("toolUses", [])]
            called |= {use["name"] for use in turn[role].get("toolUses", [])}
            padded = bool(waiting) and turn[role]["content"].strip() == "."
        else:
            user = turn[role]
            _check_results(user, where, waiting)
            if not user["content"].strip() and not results_of(user):
                raise improper(f"{where}: neither text nor tool results")
            if tools_of(user) and where != "currentMessage":
                raise improper(f"{where}: tools outside the current message")
            padded = bool(results_of(user)) and user["content"].strip().lower() in _PADDING
        if padded:
            notes.append(f"{where}: padding on a turn with tools: {turn[role]['content']!r}")
    if "userInputMessage" not in state["currentMessage"]:
        raise improper("currentMessage is not from the user")
    declared = {tool["name"] for tool in tools_of(current(body))}
    if missing := sorted(called - declared):
        raise improper(f"no specification of {missing[0]}", "TOOL_CONFIG_MISSING")
    return notes


def check_origin_and_model(body: Json, plane: str, models: list[Json]) -> Json:
    """The entry of the one model that all user turns name; the origin fits the shape."""
    names = {user["modelId"] for user in user_turns(body)}
    if len(names) > 1:
        raise improper(f"several models: {sorted(names)}")
    right = "AI_EDITOR" if plane == "ide" else "KIRO_CLI"
    for user in user_turns(body):
        if user["origin"] != right:
            raise improper(f"origin {user['origin']} in the {plane} shape")
    name = names.pop()
    for model in models:
        if model["modelId"] == name:
            return model
    text = "Invalid model. Please select a different model to continue."
    raise invalid(text, "INVALID_MODEL_ID", f"the model {name}")


def characters_in(value: Any) -> int:
    """Characters of all texts but those of images, documents and signatures."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(characters_in, value))
    if isinstance(value, dict):
        hidden = ("bytes", "signature", "redactedContent")
        return sum(characters_in(item) for key, item in value.items() if key not in hidden)
    return 0


def window_of(model: Json) -> int:
    """Input tokens that a model takes; 200,000 when the list does not say."""
    return int((model.get("tokenLimits") or {}).get("maxInputTokens") or 200_000)


def check_size(body: Json, model: Json) -> None:
    """Four characters are a token; more tokens than the window are refused."""
    tokens = characters_in(body) // 4
    if tokens > window_of(model):
        why = f"{tokens} tokens into a window of {window_of(model)}"
        raise invalid("Input is too long.", "CONTENT_LENGTH_EXCEEDS_THRESHOLD", why)


# ---- Rules: tools --------------------------------------------------------------------------------

_MOST_DESCRIPTION = 10_240
#: Keywords that one source or another has seen refused; references are refused with them here.
_FORBIDDEN_KEYWORDS = _words(
    """
    $schema $ref $defs $id definitions additionalProperties pattern format minLength maxLength
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems uniqueItems
    minProperties maxProperties contentEncoding contentMediaType patternProperties propertyNames
    dependentSchemas dependentRequired if then else contains unevaluatedProperties unevaluatedItems
    """
)


def schema_fault(schema: Any, where: str) -> str:
    """What the service dislikes in a tool's schema at any depth, "" when it likes all."""
    if not isinstance(schema, dict):
        return "" if isinstance(schema, bool) else f"{where} is no schema"
    if bad := sorted(_FORBIDDEN_KEYWORDS & set(schema)):
        return f"{where}.{bad[0]}"
    if "required" in schema:
        required = schema["required"]
        if not isinstance(required, list) or not required:
            return f"{where}.required is {required!r}"
        if not all(isinstance(name, str) for name in required):
            return f"{where}.required holds more than names"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return f"{where}.properties is {properties!r}"
    below = [(f"{where}.properties.{name}", part) for name, part in properties.items()]
    for key in ("items", "prefixItems", "not", "anyOf", "oneOf", "allOf"):
        if key in schema:
            parts = schema[key] if isinstance(schema[key], list) else [schema[key]]
            below += [(f"{where}.{key}[{at}]", part) for at, part in enumerate(parts)]
    troubles = (schema_fault(part, path) for path, part in below)
    return next((trouble for trouble in troubles if trouble), "")


def check_tools(body: Json) -> None:
    """Names, descriptions and schemas of the tools."""
    names: set[str] = set()
    for tool in tools_of(current(body)):
        name, schema = tool["name"], tool["inputSchema"]["json"]
        if not _ID.fullmatch(name):
            raise invalid("Invalid tool use format.", None, f"a tool called {name!r}")
        if name in names:
            raise improper(f"two tools called {name}", "TOOL_DUPLICATE")
        names.add(name)
        size = len(tool["description"].encode())
        if not tool["description"].strip() or size > _MOST_DESCRIPTION:
            raise improper(f"the description of {name} has {size} bytes")
        if schema.get("type") != "object" or {"anyOf", "oneOf", "allOf"} & set(schema):
            raise improper(f"the schema of {name} is not simply an object", "TOOL_SCHEMA_INVALID")
        if trouble := schema_fault(schema, name):
            raise improper(f"the schema of {trouble}", "TOOL_SCHEMA_INVALID")


# ---- Rules: images -------------------------------------------------------------------------------

_MOST_IMAGES = 20
_MOST_IMAGE_BYTES = 10 * 1024 * 1024


def image_format(data: bytes) -> str:
    """The format that the first bytes of an image tell."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def _check_image(image: Json) -> None:
    told = image["format"]
    if told not in ("png", "jpeg", "gif", "webp"):
        raise improper(f"an image of format {told}", "IMAGE_FORMAT_UNSUPPORTED")
    try:
        data = base64.b64decode(image["source"]["bytes"], validate=True)
    except (binascii.Error, ValueError):
        raise improper("an image that is no bare base64") from None
    if image_format(data) != told:
        why = f"an image called {told} is {image_format(data) or 'none'}"
        raise improper(why, "IMAGE_MIME_MISMATCH")
    if len(data) > _MOST_IMAGE_BYTES:
        raise improper(f"an image of {len(data)} bytes", "IMAGE_SIZE_EXCEEDED")


def check_images(body: Json, model: Json) -> None:
    """Images are inlined, called what they are, few, and sent to models that see."""
    for user in user_turns(body):
        images = user.get("images", [])
        if images and "IMAGE" not in (model.get("supportedInputTypes") or ["IMAGE"]):
            raise improper(f"an image for {model['modelId']}, which takes text only")
        if len(images) > _MOST_IMAGES:
            raise improper(f"{len(images)} images in one message", "IMAGE_COUNT_EXCEEDED")
        for image in images:
            _check_image(image)


# ---- Rules: thinking -----------------------------------------------------------------------------

_TAGS = re.compile(
    r"<thinking_mode>(?:(?P<enabled>enabled)</thinking_mode>\n?"
    r"<max_thinking_length>[1-9]\d*</max_thinking_length>"
    r"|adaptive</thinking_mode>\n?<thinking_effort>(?:low|medium|high)</thinking_effort>)"
)
_ANY_TAG = re.compile(r"<(?:thinking_mode|max_thinking_length|thinking_effort)>")


def value_fault(value: Any, schema: Json, where: str) -> str:
    """Where a value breaks a model's schema, "" when it does not."""
    kinds = {"object": _free, "string": _text, "integer": _number}
    if not kinds[schema["type"]](value):
        return f"{where} is no {schema['type']}"
    if value not in schema.get("enum", [value]):
        return f"{where} is {value}"
    if schema["type"] == "integer":
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return "" if low <= value <= high else f"{where} is {value}"
    if schema["type"] == "object":
        if not value or set(value) - set(schema["properties"]):
            return f"{where} has the keys {sorted(value)}"
        parts = schema["properties"]
        troubles = (value_fault(value[k], parts[k], f"{where}.{k}") for k in value)
        return next((trouble for trouble in troubles if trouble), "")
    return ""


def check_fields(body: Json, model: Json) -> None:
    """`additionalModelRequestFields` only as the model's own schema has them."""
    if "additionalModelRequestFields" not in body:
        return
    schema = model.get("additionalModelRequestFieldsSchema")
    if schema is None:
        raise improper(f"additionalModelRequestFields for {model['modelId']}, which has no schema")
    where = "additionalModelRequestFields"
    if trouble := value_fault(body[where], schema, where):
        raise improper(trouble)


def check_reasoning(body: Json, issued: Issued, forgotten: set[str]) -> None:
    """Thoughts come back with the signature they were given out with."""
    for at, turn in enumerate(body["conversationState"].get("history", ())):
        reasoning = turn.get("assistantResponseMessage", {}).get("reasoningContent")
        if reasoning is None:
            continue
        told = reasoning.get("reasoningText") or {"signature": reasoning.get("redactedContent")}
        signature = told["signature"]
        if not signature:
            raise improper(f"history[{at}]: an empty signature")
        known = issued.texts.get(signature)
        if known is None or known != told.get("text", known) or signature in forgotten:
            note = "" if signature in forgotten else f"history[{at}]: a foreign or changed thought"
            text = "Invalid signature in thinking block."
            raise Fault(400, "ValidationException", text, "THINKING_SIGNATURE_INVALID",
                        note and f"THINKING_SIGNATURE_INVALID: {note}")  # fmt: skip


def tag_notes(body: Json, model: Json) -> list[str]:
    """Thinking tags stand at the very start of the first or of the current user text, once."""
    turns, notes = user_turns(body), []
    for at, user in enumerate(turns):
        found = len(_ANY_TAG.findall(user["content"]))
        if not found:
            continue
        if at not in (0, len(turns) - 1) or not _TAGS.match(user["content"]) or found != 2:
            notes.append("thinking tags that are not once at the start of a text")
        if "additionalModelRequestFields" in body:
            notes.append("thinking tags beside additionalModelRequestFields")
        if not model["modelId"].startswith(("claude-", "auto")):
            notes.append(f"thinking tags for {model['modelId']}")
    return notes


def thinking_asked(body: Json) -> str:
    """How a request wants thoughts: "shown", "hidden" (signature only), "tags", or "" for none."""
    fields = body.get("additionalModelRequestFields", {})
    thinking = fields.get("thinking", {})
    if thinking.get("type") == "adaptive":
        return "shown" if thinking.get("display") == "summarized" else "hidden"
    if fields.get("reasoning", {}).get("effort", "none") != "none":
        return "hidden"
    turns = user_turns(body)
    # Harder reading: of the two forms of tags only `enabled` is obeyed.
    found = (_TAGS.match(user["content"]) for user in (turns[0], turns[-1]))
    return "tags" if any(match and match["enabled"] for match in found) else ""
