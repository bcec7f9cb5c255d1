"""Metrics: the text format of Prometheus, what is counted, and what a scrape of /metrics shows."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import Answer, FakeCopilot, copilot_usage, default_brain, dump, sse, usage_of
from machine import wait_until
from support import Gateway, Wire

import aiclient_api as gw

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"


# ---- a strict reader of the format ---------------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')
SAMPLE = re.compile(rf"({NAME})(?:\{{(.+)\}})? (-?[0-9][0-9.e+-]*)")
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
Key = tuple[tuple[str, str], ...]


@dataclass
class Family:
    """One metric of a scrape."""

    kind: str
    help: str
    #: (name of the sample, its labels) -> value
    samples: dict[tuple[str, Key], float] = field(default_factory=dict)

    def value(self, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        wanted = set(labels.items())
        found = [v for (_, key), v in self.samples.items() if wanted <= set(key)]
        assert found, f"no sample with {labels} among {sorted(self.samples)}"
        return sum(found)


def read_labels(text: str) -> Key:
    """`a="b",c="d"`; fails for anything else."""
    pairs, at = [], 0
    while at < len(text):
        match = LABEL.match(text, at)
        assert match, text[at:]
        value = re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], match[2])
        pairs.append((match[1], value))
        at = match.end()
        assert at == len(text) or text[at] == ",", text[at:]
        at += 1
    assert len({name for name, _ in pairs}) == len(pairs), text
    return tuple(sorted(pairs))


def check_histogram(name: str, family: Family) -> None:
    """The buckets of each series are cumulative, and the last one is the count."""
    buckets: dict[Key, list[tuple[float, float]]] = {}
    for (sample, key), value in family.samples.items():
        if sample == f"{name}_bucket":
            bound = float(dict(key)["le"])
            rest = tuple(pair for pair in key if pair[0] != "le")
            buckets.setdefault(rest, []).append((bound, value))
    counts = {key for sample, key in family.samples if sample == f"{name}_count"}
    sums = {key for sample, key in family.samples if sample == f"{name}_sum"}
    assert set(buckets) == counts == sums
    for key, found in buckets.items():
        assert [bound for bound, _ in found] == sorted({bound for bound, _ in found})
        assert [number for _, number in found] == sorted(number for _, number in found)
        assert found[-1] == (math.inf, family.samples[f"{name}_count", key])


def read_metrics(text: str) -> dict[str, Family]:
    """The metrics by name; fails for what Prometheus's own reader or its conventions refuse."""
    families: dict[str, Family] = {}
    helps: dict[str, str] = {}
    last = ""
    assert text.endswith("\n") and "\n\n" not in text
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            comment = COMMENT.fullmatch(line)
            assert comment, line
            word, name, rest = comment.groups()
            if word == "HELP":
                assert name not in helps, f"{line}: a second time"
                assert "\\" not in rest
                helps[name], last = rest, name
            else:
                assert name == last and name not in families, f"{line}: not behind its HELP"
                assert rest in ("counter", "gauge", "histogram")
                families[name] = Family(rest, helps[name])
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        name, family = sample[1], families[last]
        endings = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        assert name in [last + ending for ending in endings], f"{line}: not behind its TYPE"
        key = name, read_labels(sample[2] or "")
        assert key not in family.samples, f"{line}: a second time"
        family.samples[key] = float(sample[3])
    for name, family in families.items():
        assert family.samples, f"{name}: no samples"
        if family.kind == "histogram":
            check_histogram(name, family)
        assert (family.kind == "counter") == name.endswith("_total")
    return families


GAUGE = "# HELP a b\n# TYPE a gauge\n"
HISTOGRAM = "# HELP a b\n# TYPE a histogram\n"


@pytest.mark.parametrize(
    "text",
    [
        "a 1\n",
        "# TYPE a gauge\na 1\n",
        GAUGE,
        GAUGE + "a 1",
        GAUGE + "a 1\na 2\n",
        GAUGE + "b 1\n",
        GAUGE + "a one\n",
        GAUGE + 'a{b="c",d="e"} 1\na{d="e",b="c"} 1\n',
        GAUGE + 'a{b="c"d="e"} 1\n',
        GAUGE + 'a{b="\\t"} 1\n',
        GAUGE + 'a{b="c"c"} 1\n',
        GAUGE + 'a{b="c",b="d"} 1\n',
        "# HELP a b\n" + GAUGE + "a 1\n",
        "# HELP a b\n# TYPE a counter\na 1\n",
        HISTOGRAM + 'a_bucket{le="1"} 1\na_bucket{le="+Inf"} 2\na_sum 1\n',
        HISTOGRAM + 'a_bucket{le="1"} 3\na_bucket{le="+Inf"} 2\na_sum 1\na_count 2\n',
        HISTOGRAM + 'a_bucket{le="1"} 2\na_sum 1\na_count 2\n',
        HISTOGRAM + 'a_bucket{le="+Inf"} 1\na_sum 1\na_count 2\n',
    ],
)
def test_the_reader_of_these_tests_is_strict(text: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        read_metrics(text)


# ---- what is rendered ----------------------------------------------------------------------------


def answer(model: str = "gpt-4.1", provider: str = "copilot", **more: Any) -> gw.UsageRecord:
    """A good answer."""
    fields: Json = {
        "at": 1_800_000_000.0, "provider": provider, "account": "somebody", "model": model,
        "label": "claude-cli", "dialect": "chat", "streamed": True, "duration_s": 3.0,
        "first_byte_s": 0.5, "usage": gw.Usage(100, 20, 3, 40, 30, 1_500_000_000), **more,
    }  # fmt: skip
    return gw.UsageRecord(**fields)


def scrape(*answers: gw.UsageRecord) -> dict[str, Family]:
    """What is rendered after these answers."""
    metrics = gw.Metrics()
    for one in answers:
        metrics.observe(one)
    return read_metrics(metrics.render({}))


def every_metric() -> gw.Metrics:
    """Something of each metric that is counted."""
    metrics = gw.Metrics()
    metrics.observe(answer())
    metrics.observe(answer("claude-sonnet-4.5", "kiro", status=429, kind="rate_limited"))
    metrics.count_request("/v1/messages", "POST", 200)
    metrics.count_attempts("copilot", 3, ["rate_limited", "upstream_error"])
    return metrics


def every_gauge() -> dict[str, gw.Series]:
    """Something of each metric that is read, not counted."""
    counted = {*gw.Metrics().series} - MEASURED_COUNTERS
    named = [metric for metric in gw.METRICS if metric.name not in counted]
    return {m.name: {tuple("x" for _ in m.labels.split()): 1.5} for m in named}


MEASURED_COUNTERS = {
    "process_cpu_seconds_total",
    "log_lines_dropped_total",
    "usage_rows_lost_total",
}


def test_every_metric_is_rendered_as_the_format_wants_it() -> None:
    families = read_metrics(every_metric().render(every_gauge()))
    assert set(families) == {metric.full_name for metric in gw.METRICS}
    for metric in gw.METRICS:
        family = families[metric.full_name]
        assert (family.kind, family.help) == (metric.kind, metric.help)
        names = {name for _, key in family.samples for name, _ in key} - {"le"}
        assert names == set(metric.labels.split())


def test_the_names_keep_the_conventions() -> None:
    names = [metric.full_name for metric in gw.METRICS]
    assert len(set(names)) == len(names)
    for metric in gw.METRICS:
        assert re.fullmatch(r"(aiclient_api|process)(_[a-z]+)+", metric.full_name)
        assert not re.search(r"_(ms|millis|milliseconds|minutes|kib|mib|percent)\b", metric.name)
        assert not metric.name.endswith(("_count", "_sum", "_bucket"))
        assert metric.help.endswith(".") or metric.name == "build_info"
        assert "\\" not in metric.help and "\n" not in metric.help
    for bounds in gw.METRIC_BUCKETS.values():
        assert list(bounds) == sorted(set(bounds))


def test_nothing_is_said_of_what_never_happened() -> None:
    assert read_metrics(gw.Metrics().render({"http_connections": {(): 0}})).keys() == {
        "aiclient_api_http_connections"
    }


PROMTOOL = shutil.which("promtool")


def check_with_promtool(text: str) -> str:
    """What Prometheus's own checker says of a scrape."""
    assert PROMTOOL
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3), done  # 3: it has found something
    return done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on this machine")
def test_promtool_has_no_complaint() -> None:
    assert check_with_promtool(every_metric().render(every_gauge())) == ""
    assert check_with_promtool("# HELP a_total b\n# TYPE a_total gauge\na_total 1\n")


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a\nb", 'a\\"b', "a\\nb", "{a}", 'a",b="c', "\N{SNOWMAN}", "a b,c=d"]
)
def test_any_label_comes_through_as_it_is(name: str) -> None:
    families = scrape(answer(name, name))
    assert families["aiclient_api_tokens_total"].value(provider=name, model=name, type="input")
    assert families["aiclient_api_completion_duration_seconds"].value(provider=name, model=name)


# ---- what is counted -----------------------------------------------------------------------------


def test_the_types_of_tokens_add_up_and_reasoning_is_not_counted_twice() -> None:
    families = scrape(answer(), answer())
    tokens = families["aiclient_api_tokens_total"]
    each = {kind: tokens.value(type=kind) for kind in ("input", "cache_read", "cache_write")}
    assert each == {"input": 200, "cache_read": 40, "cache_write": 6}
    assert tokens.value(type="output") == 80
    assert tokens.value() == 2 * (100 + 20 + 3 + 40)
    assert families["aiclient_api_reasoning_tokens_total"].value() == 60
    assert families["aiclient_api_credits_total"].value(provider="copilot") == 3


def test_answers_are_told_apart_by_provider_model_dialect_and_status() -> None:
    families = scrape(
        answer(),
        answer(),
        answer("claude-sonnet-4.5", "kiro", dialect="messages"),
        answer(status=429, kind="rate_limited"),
        answer(status=499, kind="cancelled"),
    )
    assert families["aiclient_api_completions_total"].samples == {
        ("aiclient_api_completions_total", read_labels(labels)): value
        for labels, value in [
            ('provider="copilot",model="gpt-4.1",dialect="chat",status="200"', 2),
            ('provider="kiro",model="claude-sonnet-4.5",dialect="messages",status="200"', 1),
            ('provider="copilot",model="gpt-4.1",dialect="chat",status="429"', 1),
            ('provider="copilot",model="gpt-4.1",dialect="chat",status="499"', 1),
        ]
    }
    errors = families["aiclient_api_completion_errors_total"]
    assert errors.value() == errors.value(provider="copilot", kind="rate_limited") == 1


def bucket(families: dict[str, Family], name: str, bound: str) -> float:
    """How many observations were not above `bound`."""
    family = families[f"aiclient_api_{name}"]
    found = [v for (sample, key), v in family.samples.items() if ("le", bound) in key]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("seconds", "bounds"),
    [
        (0.0, {"0.5": 1, "640": 1, "+Inf": 1}),
        (0.5, {"0.5": 1, "640": 1, "+Inf": 1}),  # a bound belongs to its bucket
        (0.51, {"0.5": 0, "1": 1, "640": 1, "+Inf": 1}),
        (640.0, {"320": 0, "640": 1, "+Inf": 1}),
        (3600.0, {"640": 0, "+Inf": 1}),
    ],
)
def test_a_duration_is_counted_in_every_bucket_that_it_fits(
    seconds: float, bounds: dict[str, int]
) -> None:
    families = scrape(answer(duration_s=seconds))
    counted = {bound: bucket(families, "completion_duration_seconds", bound) for bound in bounds}
    assert counted == bounds
    samples = families["aiclient_api_completion_duration_seconds"].samples
    sums = [v for (sample, _), v in samples.items() if sample.endswith("_sum")]
    assert sums == [seconds]


def test_only_good_answers_have_a_duration_and_only_begun_ones_a_first_byte() -> None:
    families = scrape(
        answer(),
        answer(status=502, kind="upstream_error"),
        answer(status=499, kind="cancelled", first_byte_s=None),
    )
    assert bucket(families, "completion_duration_seconds", "+Inf") == 1
    assert bucket(families, "completion_first_byte_seconds", "+Inf") == 2


def test_retries_are_the_attempts_after_the_first() -> None:
    metrics = gw.Metrics()
    metrics.count_attempts("kiro", 1, [])
    metrics.count_attempts("kiro", 3, ["overloaded", "overloaded"])
    metrics.count_attempts("kiro", 0, [])
    families = read_metrics(metrics.render({}))
    assert families["aiclient_api_upstream_retries_total"].value(provider="kiro") == 2
    refusals = families["aiclient_api_upstream_refusals_total"]
    assert refusals.value(provider="kiro", kind="overloaded") == 2


def test_methods_that_clients_make_up_are_one() -> None:
    metrics = gw.Metrics()
    for number in range(20):
        metrics.count_request("other", f"BREW{number}", 405)
    requests = read_metrics(metrics.render({}))["aiclient_api_http_requests_total"]
    assert list(requests.samples.values()) == [20]
    assert requests.value(method="other", route="other", status="405") == 20


# ---- how many series there may be ----------------------------------------------------------------


def models_in(families: dict[str, Family]) -> set[str]:
    """The models that a scrape names."""
    keys = [key for family in families.values() for _, key in family.samples]
    return {value for key in keys for name, value in key if name == "model"}


def test_too_many_models_become_one() -> None:
    names = [f"model-{number}" for number in range(gw.MAX_METRIC_SERIES + 50)]
    families = scrape(*map(answer, names), answer("model-0"))
    assert models_in(families) == {*names[: gw.MAX_METRIC_SERIES], "other"}
    tokens = families["aiclient_api_tokens_total"]
    assert tokens.value(model="other", type="input") == 50 * 100
    assert tokens.value(model="model-0", type="input") == 2 * 100
    assert tokens.value(type="input") == 100 * (len(names) + 1)


def test_a_name_that_the_upstream_does_not_know_gets_no_series() -> None:
    denied: Callable[[str], gw.UsageRecord] = lambda name: answer(  # noqa: E731
        name, status=404, kind="model_not_found", first_byte_s=None, usage=gw.Usage()
    )
    families = scrape(denied("made-up-1"), denied("made-up-2"), answer("real"), denied("real"))
    assert models_in(families) == {"other", "real"}
    assert families["aiclient_api_completions_total"].value(model="other", status="404") == 2
    assert families["aiclient_api_completions_total"].value(model="real", status="404") == 1


# ---- a scrape of the real program ----------------------------------------------------------------

KEY = "key-for-metrics"
SONNET, GPT, GPT5 = "claude-sonnet-4.5", "gpt-4.1", "gpt-5.4"


@dataclass
class Pair:
    """A gateway that is signed in to an imitation of Copilot."""

    fake: FakeCopilot
    gateway: Gateway

    def scrape(self) -> dict[str, Family]:
        """The metrics as they are now."""
        reply = self.gateway.request("GET", "/metrics")
        assert (reply.status, reply.headers["content-type"]) == (200, gw.METRICS_TYPE)
        return read_metrics(reply.text)

    def count(self, name: str, **labels: str) -> float:
        """A sum of one metric as it is now, 0 where nothing was counted yet."""
        family = self.scrape().get(f"aiclient_api_{name}")
        keys = [set(key) for _, key in family.samples] if family else []
        known = any(set(labels.items()) <= key for key in keys)
        return family.value(**labels) if family and known else 0

    def ask(self, path: str = CHAT, model: str = GPT, **more: Any) -> int:
        """The status of an answer to a few words."""
        return self.gateway.request("POST", path, asking(path, model, **more)).status

    def send(self, model: str = GPT) -> Wire:
        """A connection on which a stream was asked for."""
        wire = self.gateway.wire()
        wire.send(self.gateway.request_bytes("POST", CHAT, asking(CHAT, model, stream=True)))
        return wire

    def sent(self) -> Json:
        """What the imitation has billed: tokens by type, and credits."""
        total = {"input": 0, "cache_read": 0, "cache_write": 0, "output": 0, "credits": 0.0}
        for seen in self.fake.calls:
            dialect = {MESSAGES: "messages", "/responses": "responses"}.get(seen.path, "chat")
            used = usage_of(seen.body, default_brain(dialect, seen.body), cached=False)
            for name, number in used.items():
                total[name] += number
            total["credits"] += copilot_usage(used)["total_nano_aiu"] / 1e9
        return total


def asking(path: str, model: str, **more: Any) -> Json:
    """A request in the words of an endpoint, different from all others."""
    words: Any = f"{time.monotonic_ns()}"
    if path == RESPONSES:
        return {"model": model, "input": words, **more}
    if path == MESSAGES:
        words = [{"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}]
    turn = {"role": "user", "content": words}
    return {"model": model, "max_tokens": 4000, "messages": [turn], **more}


def start(stack: ExitStack, config: str = "") -> Pair:
    """A fresh pair, which ends with the stack."""
    fake = stack.enter_context(FakeCopilot())
    where = f'github_url = "{fake.url}"\ngithub_api_url = "{fake.url}"\n'
    saved = {"type": "copilot", "github_token": fake.github_token, "copilot_token": None,
             "expires_at": None}  # fmt: skip
    whole = f'{config}\n[providers.echo]\ntype = "echo"\n[providers.copilot]\n{where}'
    gateway = stack.enter_context(Gateway(whole, tokens={"copilot": saved}))
    return Pair(fake, gateway)


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    """One pair for all tests."""
    with ExitStack() as stack:
        yield start(stack)


@pytest.fixture
def pair(running: Pair) -> Iterator[Pair]:
    """The shared pair; what its imitation has seen is forgotten, its counters go on."""
    for seen in (running.fake.requests, running.fake.calls, running.fake.cancelled):
        seen.clear()
    yield running
    assert running.fake.violations == []


def refusal(status: int, code: str = "", **headers: str) -> Answer:
    """An error answer in the service's form."""
    body = dump({"error": {"message": "no", "code": code}})
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, fields, body, chunked=False)


def begun(**more: Any) -> Answer:
    """The beginning of a stream."""
    delta = {"role": "assistant", "content": "one"}
    first = {"id": "c1", "model": GPT, "created": 5, "choices": [{"index": 0, "delta": delta}]}
    kind = {"Content-Type": "text/event-stream"}
    return Answer(200, kind, [sse(first, done=False), b": more\n\n"], **more)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "model"), [(CHAT, GPT), (CHAT, SONNET), (MESSAGES, SONNET), (RESPONSES, GPT5)]
)
def test_scraped_sums_are_what_the_upstream_has_sent(
    pair: Pair, path: str, model: str, stream: bool
) -> None:
    def counted() -> Json:
        types = ("input", "cache_read", "cache_write", "output")
        tokens = {t: pair.count("tokens_total", provider="copilot", type=t) for t in types}
        return {**tokens, "credits": pair.count("credits_total", provider="copilot")}

    before = counted()
    answers = pair.count("completions_total", model=model, status="200")
    requests = pair.count("http_requests_total", route=path, status="200")
    for _ in range(3):
        assert pair.ask(path, model, stream=stream) == 200
    after = counted()
    assert {n: after[n] - before[n] for n in after} == pytest.approx(pair.sent())
    assert pair.count("completions_total", model=model, status="200") - answers == 3
    assert pair.count("http_requests_total", route=path, status="200") - requests == 3
    assert pair.count("completion_duration_seconds", model=model) > 0
    assert pair.count("completion_first_byte_seconds", model=model) > 0


def test_an_answer_that_was_refused_is_an_error_of_its_kind(pair: Pair) -> None:
    before = pair.count("completion_errors_total"), pair.count("upstream_refusals_total")
    pair.fake.queue(refusal(422, "odd"))
    status = pair.ask()
    assert status >= 400
    families = pair.scrape()
    errors = families["aiclient_api_completion_errors_total"]
    assert errors.value(provider="copilot") - before[0] == 1
    assert families["aiclient_api_upstream_refusals_total"].value() - before[1] == 1
    assert families["aiclient_api_completions_total"].value(model=GPT, status=str(status)) >= 1


def test_an_attempt_that_a_later_one_mends_is_a_refusal_and_a_retry_but_no_error(
    pair: Pair,
) -> None:
    assert pair.ask() == 200
    names = ("upstream_refusals_total", "upstream_retries_total", "completion_errors_total")
    before = [pair.count(name) for name in names]
    pair.fake.expire_tokens()
    assert pair.ask() == 200
    after = [pair.count(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [1, 1, 0]
    assert pair.count("upstream_refusals_total", provider="copilot", kind="not_signed_in")


def test_a_stream_that_breaks_is_an_error_of_an_answer(pair: Pair) -> None:
    before, broken = pair.count("completion_errors_total"), {"model": GPT, "status": "502"}
    counted = pair.count("completions_total", **broken)
    pair.fake.queue(begun(then="reset"))
    assert pair.ask(stream=True) == 200  # its head had gone out
    assert pair.count("completion_errors_total") - before == 1
    assert pair.count("completions_total", **broken) == counted + 1


def test_an_answer_that_nobody_waits_for_is_counted_as_such_and_is_no_error(pair: Pair) -> None:
    before, left = pair.count("completion_errors_total"), {"model": GPT, "status": "499"}
    counted = pair.count("completions_total", **left)
    pair.fake.queue(begun(then="hang"))
    with pair.send() as wire:
        wire.read_until(b"one")
        wait_until(lambda: pair.count("http_requests_in_flight") == 2)  # this, and the scrape
        assert pair.count("http_connections") >= 2
    wait_until(lambda: pair.count("completions_total", **left) == counted + 1)
    assert pair.count("completion_errors_total") == before
    wait_until(lambda: pair.count("http_requests_in_flight") == 1)


def test_answers_wait_for_the_database_only_for_a_moment(pair: Pair) -> None:
    assert pair.ask() == 200
    wait_until(lambda: pair.scrape()["aiclient_api_usage_rows_waiting"].value() == 0)
    assert pair.scrape()["aiclient_api_usage_rows_lost_total"].value() == 0


def test_requests_are_told_apart_by_route_method_and_status(pair: Pair) -> None:
    wanted: list[tuple[str, str, str, str]] = [
        ("GET", "/v1/models/echo", "/v1/models/ID", "200"),
        ("GET", "/v1/models/none/such", "/v1/models/ID", "404"),
        ("GET", "/v1/v1//models/", "/v1/models", "200"),
        ("GET", "/v1/responses/resp_1", "/v1/responses/ID", "404"),
        ("HEAD", "/healthz", "/healthz", "200"),
        ("GET", "/no/such/path?a=b", "other", "404"),
        ("BREW", "/healthz", "/healthz", "405"),
        ("GET", "/metrics", "/metrics", "200"),
    ]
    for method, path, route, status in wanted:
        shown = method if method != "BREW" else "other"
        labels = {"route": route, "method": shown, "status": status}
        before = pair.count("http_requests_total", **labels)
        pair.gateway.request(method, path)
        scraped = 1 if route == "/metrics" else 0  # a scrape is counted when it has ended
        assert pair.count("http_requests_total", **labels) == before + 1 + scraped, path


def test_a_caller_that_goes_away_before_its_answer_is_499(pair: Pair) -> None:
    labels = {"route": CHAT, "method": "POST", "status": "499"}
    pair.fake.queue(begun(then="hang", pause=threading.Event()))
    before = pair.count("http_requests_total", **labels)
    with pair.gateway.wire() as wire:
        wire.send(pair.gateway.request_bytes("POST", CHAT, asking(CHAT, GPT)))
        assert pair.fake.wait_calls(1)
    wait_until(lambda: pair.count("http_requests_total", **labels) == before + 1)


def test_names_that_callers_make_up_get_no_series(pair: Pair) -> None:
    for number in range(3):
        assert pair.ask(model=f"copilot/made-up-{number}") >= 400
        pair.gateway.request("GET", f"/made/up/{number}")
    pair.fake.violations.clear()  # it has no such models
    text = pair.gateway.request("GET", "/metrics").text
    assert "made" not in text
    assert read_metrics(text)["aiclient_api_completions_total"].value(model="other") >= 3


def test_the_process_and_the_build_are_described(pair: Pair) -> None:
    families = pair.scrape()
    build = families["aiclient_api_build_info"]
    assert build.value(version=gw.__version__) == 1
    started_s = families["process_start_time_seconds"].value()
    assert 0 <= time.time() - started_s < 3600
    assert families["process_cpu_seconds_total"].value() > 0
    if os.path.exists("/proc/self/fd"):
        assert families["process_resident_memory_bytes"].value() > 1_000_000
        assert 3 < families["process_open_fds"].value() < 1000
    assert families["aiclient_api_log_lines_dropped_total"].value() == 0
    assert families["aiclient_api_provider_ready"].value(provider="copilot") == 1
    assert families["aiclient_api_cool_down_seconds"].value(provider="echo", model="*") == 0


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on this machine")
def test_promtool_has_no_complaint_about_a_scrape(pair: Pair) -> None:
    pair.ask()
    assert check_with_promtool(pair.gateway.request("GET", "/metrics").text) == ""


def test_a_head_request_says_what_a_get_would(pair: Pair) -> None:
    reply = pair.gateway.request("HEAD", "/metrics")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["content-type"] == gw.METRICS_TYPE
    assert int(reply.headers["content-length"]) > 1000


def test_web_pages_are_kept_out(pair: Pair) -> None:
    for name, value in [
        ("Origin", "https://evil.example"),
        ("Host", "evil.example"),
        ("Sec-Fetch-Site", "cross-site"),
    ]:
        assert pair.gateway.request("GET", "/metrics", None, {name: value}).status == 403


@pytest.mark.parametrize(
    ("code", "resting"), [("", GPT), ("user_global_rate_limited", "*")], ids=["model", "account"]
)
def test_what_rests_shows_for_how_long(code: str, resting: str) -> None:
    with ExitStack() as stack:
        pair = start(stack)
        pair.fake.queue(refusal(429, code, Retry_After="99999"))
        assert pair.ask() == 429
        families = pair.scrape()
        rests = families["aiclient_api_cool_down_seconds"]
        assert {dict(key)["model"] for (_, key), v in rests.samples.items() if v > 0} == {resting}
        assert rests.value(provider="copilot", model="*") == rests.value() * (resting == "*")
        ready = families["aiclient_api_provider_ready"]
        assert ready.value(provider="copilot") == int(resting != "*")
        assert ready.value(provider="kiro") == 0  # nobody is signed in


@pytest.mark.parametrize("said", ["inf", "1e400", "1e300", "-1", "9" * 19, "9" * 500, "nan"])
def test_a_retry_after_of_any_form_leaves_status_and_metrics_as_they_are(said: str) -> None:
    with ExitStack() as stack:
        pair = start(stack)
        pair.fake.queue(refusal(402, "quota_exceeded", Retry_After=said))
        assert pair.ask() >= 400
        assert pair.scrape()["aiclient_api_cool_down_seconds"].value() <= 60
        rows = pair.gateway.request("GET", "/v1/status").json()["providers"]
        (at,) = [rest["recovers_at"] for row in rows for rest in row["cooldowns"]]
        assert at is None or at - time.time() <= gw.MAX_RESET_SECONDS


def test_a_body_that_is_no_http_is_counted_with_the_status_it_got(pair: Pair) -> None:
    labels = {"route": CHAT, "method": "POST", "status": "400"}
    before = pair.count("http_requests_total", **labels)
    with pair.gateway.wire() as wire:
        fields = {"Transfer-Encoding": "chunked"}
        wire.send(pair.gateway.request_bytes("POST", CHAT, b"no chunk\r\n", fields))
        assert wire.reply().status == 400
    assert pair.count("http_requests_total", **labels) == before + 1


def test_a_key_is_asked_for_and_neither_a_reload_nor_a_reset_of_usage_undoes_a_count() -> None:
    with Gateway(f'api_key = "{KEY}"\n[server]\nrate_limit_seconds = 600\n') as gateway:
        assert gateway.request("GET", "/metrics").status == 401
        fields = {"Authorization": f"Bearer {KEY}"}
        asked = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
        assert gateway.request("POST", CHAT, asked, fields).status == 200
        assert gateway.request("POST", CHAT, asked, fields).status == 429
        os.kill(gateway.pid, signal.SIGHUP)
        wait_until(lambda: "configuration_reloaded" in gateway.log())
        assert gateway.request("DELETE", "/v1/usage", None, fields).status == 200
        for _ in range(3):  # never in the rate limit
            reply = gateway.request("GET", "/metrics", None, fields)
            assert reply.status == 200
        assert KEY not in reply.text
        families = read_metrics(reply.text)
        assert families["aiclient_api_completions_total"].value(provider="echo", status="200") == 1
        requests = families["aiclient_api_http_requests_total"]
        assert requests.value(route="/metrics", status="401") == 1
        assert requests.value(route=CHAT, status="429") == 1
