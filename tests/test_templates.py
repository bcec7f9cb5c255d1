"""Section 8.6: deltas that are copied by a template give the bytes that parsed ones give."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from fake_kiro import message
from goldens import make_flow, one_by_one, play, split_events

from aiclient_api import DIALECTS, UPSTREAM_DIALECTS, StreamTranslator, Tool

Json = dict[str, Any]

SEED = 20261201
ROUNDS = 25
UPSTREAMS = tuple(UPSTREAM_DIALECTS)
#: What a model may write: escapes, controls, halves of a pair, blanks, text that looks like JSON.
WORDS = (
    *("word ", "two  words", "é", "漢字", "😀", '"', "\\", "\n", "\t", "\r\n", "\x01", "%b %d %%"),
    *('","text":"', '"}}\n\n', "data: ", "{", "}", '{"content":"x"}', "0", " ", "</thinking>\n\n"),
    *("sequence_number", '"sequence_number":7,', "obfuscation", "event: x\n", "[DONE]", "\x7f"),
)
ODD_WORDS = ("", "\ud83d", "\ude00", "\n" * 30, " " * 30)
#: Members of one event that mean nothing here; some of them change how the upstream's row looks.
EXTRAS: tuple[Json, ...] = (
    {"obfuscation": "abc"}, {"obfuscation": ""}, {"padding": "zz"}, {"obfuscation": 'q"\\é'},
    {"x": 1}, {"text": "word "}, {"usage": None}, {"item_id": "other"}, {"sequence_number": "7"},
)  # fmt: skip


def random_steps(rng: random.Random) -> Iterator[tuple[str, int, str]]:
    """(kind, number of the call, text) of the deltas of a response, in runs."""
    kind, call = "text", 0
    for _ in range(rng.randint(1, 50)):
        if rng.random() < 0.2:
            kind = rng.choice(["text", "thinking", "arguments", "arguments", "refusal", "input"])
        if kind == "arguments" and rng.random() < 0.1:
            call = rng.randint(0, 3)
        words = ODD_WORDS if rng.random() < 0.02 else WORDS
        yield kind, call, "".join(rng.choices(words, k=rng.randint(1, 3)))


def extras(rng: random.Random, always: Json) -> Json:
    """Members for one event: `always` with other values, or now and then others."""
    some = rng.choice(EXTRAS) if rng.random() < 0.05 else {}
    return {**{key: rng.choice(["a", "bb", "ccc"]) for key in always}, **some}


class Service:
    """What an upstream of one dialect sends for deltas."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.always = rng.choice([{}, {"obfuscation": ""}])
        self.separators = rng.choice([(",", ":"), (",", ":"), (", ", ": ")])
        self.is_ascii = rng.random() < 0.2
        self.mangled = rng.choice([0, 0, 0.02])
        self.open_key: Any = None
        self.index = -1

    def rows(self) -> list[bytes]:
        rows = [*self.start()]
        for kind, call, text in random_steps(self.rng):
            rows += self.delta(kind, call, text)
        return [*rows, *self.stop()]

    def row(self, frame: Json, name: str = "") -> bytes:
        head = f"event: {name}\n".encode() if name else b""
        return b"%bdata: %b\n\n" % (head, self.dump(frame))

    def dump(self, value: Json) -> bytes:
        """As JSON, half a pair of surrogates escaped; now and then with one byte that is wrong."""
        text = json.dumps(value, ensure_ascii=self.is_ascii, separators=self.separators)
        if any("\ud800" <= character <= "\udfff" for character in text):
            text = json.dumps(value, separators=self.separators)
        data = bytearray(text.encode())
        if self.rng.random() < self.mangled:
            data[self.rng.randrange(len(data))] = self.rng.choice(b'"\\ ,:{}0\x01\xff\xc3a')
        return bytes(data)

    def start(self) -> Iterator[bytes]:
        yield from ()

    def delta(self, kind: str, call: int, text: str) -> Iterator[bytes]:
        raise NotImplementedError

    def stop(self) -> Iterator[bytes]:
        yield from ()


class ChatService(Service):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.role = rng.choice([{}, {"role": "assistant"}])
        self.padded = rng.choice([{}, {"padding": ""}])
        self.reasoning = rng.choice(["reasoning_text", "reasoning_content", "reasoning"])
        self.called: set[int] = set()
        self.repeats_names = rng.random() < 0.2

    def chunk(self, delta: Json, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
        return self.row({**head, "choices": [choice], **extras(self.rng, self.always), **more})

    def delta(self, kind: str, call: int, text: str) -> Iterator[bytes]:
        if kind == "arguments":
            function: Json = {"arguments": text}
            fragment: Json = {"index": call, "function": function}
            if call not in self.called or self.repeats_names:
                fragment.update(id=f"call_{call}", type="function")
                function["name"] = "Write"
            self.called.add(call)
            yield self.chunk({"tool_calls": [fragment]})
        else:
            keys = {"thinking": self.reasoning, "refusal": "refusal"}
            more = extras(self.rng, self.padded)
            yield self.chunk({**self.role, keys.get(kind, "content"): text, **more})

    def stop(self) -> Iterator[bytes]:
        usage = self.rng.choice([{}, {"usage": {"prompt_tokens": 5, "completion_tokens": 6}}])
        yield self.chunk({}, "tool_calls" if self.called else "stop", **usage)
        yield b"data: [DONE]\n\n"


class MessagesService(Service):
    BLOCKS = ("text", "thinking", "arguments")

    def named(self, frame: Json) -> bytes:
        return self.row(frame, frame["type"])

    def start(self) -> Iterator[bytes]:
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "up"}
        usage = {"input_tokens": 6, "output_tokens": 1}
        yield self.named({"type": "message_start", "message": {**message, "usage": usage}})

    def close(self) -> Iterator[bytes]:
        if self.open_key:
            yield self.named({"type": "content_block_stop", "index": self.index})
        self.open_key = None

    def delta(self, kind: str, call: int, text: str) -> Iterator[bytes]:
        kind = kind if kind in self.BLOCKS else "text"
        if self.open_key != (kind, call):
            yield from self.close()
            self.open_key = kind, call
            self.index += 1
            block = {
                "text": {"type": "text", "text": ""},
                "thinking": {"type": "thinking", "thinking": "", "signature": ""},
                "arguments": {"type": "tool_use", "id": f"t{self.index}", "name": "f", "input": {}},
            }[kind]
            start = {"type": "content_block_start", "index": self.index}
            yield self.named({**start, "content_block": block})
        key = {"arguments": "partial_json"}.get(kind, kind)
        type_ = {"arguments": "input_json_delta"}.get(kind, f"{kind}_delta")
        frame = {"type": "content_block_delta", "index": self.index}
        more = extras(self.rng, self.always)
        yield self.named({**frame, "delta": {"type": type_, key: text}, **more})
        if self.rng.random() < 0.02:
            yield self.named({"type": "ping"})

    def stop(self) -> Iterator[bytes]:
        yield from self.close()
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        yield self.named({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 9}})
        yield self.named({"type": "message_stop"})


class ResponsesService(Service):
    KINDS: ClassVar = {
        "text": ("message", "msg", "output_text", {"content_index": 0}),
        "refusal": ("message", "msg", "refusal", {"content_index": 0}),
        "thinking": ("reasoning", "rs", "reasoning_summary_text", {"summary_index": 0}),
        "arguments": ("function_call", "fc", "function_call_arguments", {}),
        "input": ("custom_tool_call", "ctc", "custom_tool_call_input", {}),
    }

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.number = rng.choice([0, 95])
        self.changes_ids = rng.random() < 0.4
        self.text: list[str] = []
        self.items: list[Json] = []
        self.item: Json = {}

    def named(self, kind: str, **members: Any) -> bytes:
        frame = {"type": f"response.{kind}", "sequence_number": self.number, **members}
        self.number += 1
        return self.row(frame, frame["type"])

    def item_id(self) -> str:
        return "".join(self.rng.choices("abc/+", k=9)) if self.changes_ids else self.item["id"]

    def start(self) -> Iterator[bytes]:
        response = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
        yield self.named("created", response=response)

    def close(self) -> Iterator[bytes]:
        if not self.open_key:
            return
        text, item = "".join(self.text), self.item
        if self.open_key[0] == "arguments":
            item["arguments"] = text
        elif self.open_key[0] == "input":
            item["input"] = text
        elif self.open_key[0] == "thinking":
            item["summary"] = [{"type": "summary_text", "text": text}]
            item["encrypted_content"] = "gAAAA"
        else:
            kind = {"text": "output_text"}.get(self.open_key[0], "refusal")
            item["content"] = [{"type": kind, kind.removeprefix("output_"): text}]
        yield self.named("output_item.done", output_index=self.index, item=item)
        self.items.append(item)
        self.open_key = None

    def delta(self, kind: str, call: int, text: str) -> Iterator[bytes]:
        item_type, prefix, name, place = self.KINDS[kind]
        if self.open_key != (kind, call):
            yield from self.close()
            self.open_key, self.text = (kind, call), []
            self.index += 1
            self.item = {"id": f"{prefix}_{self.index}", "type": item_type}
            if kind in ("arguments", "input"):
                self.item.update(call_id=f"call_{self.index}", name="Write")
            yield self.named("output_item.added", output_index=self.index, item=self.item)
            if kind == "thinking":
                part = {"type": "summary_text", "text": ""}
                where = {"output_index": self.index, "item_id": self.item_id()}
                yield self.named("reasoning_summary_part.added", **where, **place, part=part)
        self.text.append(text)
        where = {"item_id": self.item_id(), "output_index": self.index, **place}
        more = extras(self.rng, self.always)
        yield self.named(f"{name}.delta", **{**where, "delta": text, **more})

    def stop(self) -> Iterator[bytes]:
        yield from self.close()
        usage = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
        response = {"id": "resp_1", "object": "response", "status": "completed", "usage": usage}
        yield self.named("completed", response={**response, "output": self.items})


class KiroService(Service):
    def event(self, name: str, payload: Json) -> bytes:
        headers = {":event-type": name, ":content-type": "application/json"}
        return message({**headers, ":message-type": "event"}, self.dump(payload))

    def start(self) -> Iterator[bytes]:
        if self.rng.random() < 0.3:
            yield self.event("assistantResponseEvent", {"content": "<thinking>hm"})

    def delta(self, kind: str, call: int, text: str) -> Iterator[bytes]:
        more = self.rng.choice(EXTRAS) if self.rng.random() < 0.05 else {}
        if kind == "arguments":
            payload = {"input": text, "name": "Write", "toolUseId": f"tooluse_{call}"}
            yield self.event("toolUseEvent", {**payload, **more})
        elif kind == "thinking":
            yield self.event("reasoningContentEvent", {"text": text, **more})
        else:
            payload = {"content": text, "modelId": "claude"}
            yield self.event("assistantResponseEvent", {**payload, **more})
        if self.rng.random() < 0.05:
            yield self.event("toolUseEvent", {"toolUseId": f"tooluse_{call}", "stop": True})
        if self.rng.random() < 0.05:
            yield self.event("meteringEvent", {"unit": "credit", "usage": 0.01})


SERVICES: dict[str, type[Service]] = {
    "chat": ChatService,
    "messages": MessagesService,
    "responses": ResponsesService,
    "kiro": KiroService,
}


def random_reads(rng: random.Random, rows: list[bytes]) -> Iterator[list[bytes]]:
    """The same stream whole, row by row, in groups of rows, and cut anywhere."""
    data = b"".join(rows)
    yield [data]
    yield rows
    groups, at = [], 0
    while at < len(rows):
        size = rng.choice([1, 2, 5, 16])
        groups.append(b"".join(rows[at : at + size]))
        at += size
    yield groups
    cuts = sorted(rng.sample(range(len(data)), min(len(data), 20)))
    yield [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if len(data) < 3000:
        yield one_by_one(data)


def outcome(flow: StreamTranslator, stored: list[Any], sent: bytes) -> tuple[Any, ...]:
    """What the client, the accounting and the store of reasoning get."""
    events = [data if data == "[DONE]" else json.loads(data) for _, data in split_events(sent)]
    relay = flow.relay
    return events, str(flow.error), flow.usage, relay.output_estimate, flow.frame_count, stored


def played(
    upstream: str, client: str, reads: list[bytes], *, copies: bool, **terms: Any
) -> tuple[bytes, tuple[Any, ...]]:
    """A stream's bytes and outcome, with templates or without."""
    stored: list[Any] = []
    terms["store_reasoning"] = lambda *args: stored.append(args)
    flow = make_flow(upstream, client, **terms)
    flow.may_copy = copies
    sent = play(flow, reads)
    return sent, outcome(flow, stored, sent)


def called(kind: str) -> Json:
    """The terms of a request that offers the only tool of these streams."""
    return {"tools": {name: Tool(name, "", {}, kind=kind) for name in ("Write", "f")}}


TERMS: tuple[Json, ...] = (
    {}, {"hide_thinking": True}, called("custom"), called("tool_search"),
    {"tagged_thinking": True}, {"tagged_thinking": True, "hide_thinking": True},
)  # fmt: skip


@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_copied_deltas_are_what_parsed_ones_are(upstream: str, client: str) -> None:
    rng = random.Random(f"{SEED}{upstream}{client}")
    for round_ in range(ROUNDS):
        service, terms = SERVICES[upstream](rng), rng.choice(TERMS)
        rows = service.rows()
        slow, expected = played(upstream, client, [b"".join(rows)], copies=False, **terms)
        is_canonical = service.separators == (",", ":") and not service.is_ascii
        for reads in random_reads(rng, rows):
            sent, found = played(upstream, client, reads, copies=True, **terms)
            assert found == expected, (round_, len(reads))
            assert sent == slow or not is_canonical or upstream == "kiro", round_


class Calm(random.Random):
    """Lets nothing unlikely happen."""

    def random(self) -> float:
        return 0.99


@pytest.mark.parametrize("kind", ["text", "thinking", "arguments"])
@pytest.mark.parametrize("client", DIALECTS)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_run_of_deltas_is_copied(upstream: str, client: str, kind: str) -> None:
    """The template that its first deltas give is not given up, so no later one is parsed."""
    service, words = SERVICES[upstream](Calm(SEED)), [f'w{index} "é"\\' for index in range(40)]
    rows = [*service.start()]
    for word in words:
        rows += service.delta(kind, 0, word)
    flow = make_flow(upstream, client)
    flow.feed(b"".join(rows[:10]))
    template = flow.template
    assert template is not None and template.kind == kind
    for size in (1, 1, 16):
        reads, rows = rows[10 : 10 + size], rows[size:]
        sent = flow.feed(b"".join(reads))
        assert flow.template is template and sent.count(b"\n\n") == size
