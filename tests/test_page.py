"""The page at `/`: who gets it, what it may do, and what a person sees of it in a browser."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Page
from fakes import FakeCopilot
from support import Gateway, Reply

from aiclient_api import PAGE_SCRIPT, PAGE_STYLE, prefers_html, write_page

Json = dict[str, Any]

#: As Chromium, Firefox and Safari ask for a page.
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
KEY = "s\u00e9same-of-the-page-42"
KEY_FIELD = {"x-api-key": KEY.encode().decode("latin-1")}

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")


# ---- who gets it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML; Charset=utf-8", True),
        ("application/json;q=0.9, text/html", True),
        ("text/html;q=0.5, */*;q=0.1", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/plain, */*", False),  # axios
        (",;q=1,,;;=,", False),
    ],
)
def test_the_page_is_for_those_who_ask_for_html(accept: str, wanted: bool) -> None:
    """A program that probes the path goes on to get JSON."""
    assert prefers_html(accept) is wanted


@pytest.fixture(scope="module")
def locked() -> Iterator[Gateway]:
    """A gateway with a key and no account."""
    with Gateway(config=f'api_key = "{KEY}"\n[providers.echo]\ntype = "echo"\n') as gateway:
        yield gateway


def look(gateway: Gateway, method: str = "GET", path: str = "/", **headers: str) -> Reply:
    """One request of a browser."""
    fields = {"Accept": BROWSER, **{n.replace("_", "-"): v for n, v in headers.items()}}
    return gateway.request(method, path, headers=fields)


def test_a_browser_gets_the_page_and_a_program_the_health_check(locked: Gateway) -> None:
    """One path, by the Accept field; neither needs the key."""
    page = look(locked)
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!doctype html>")
    for accept in ("*/*", "application/json", ""):
        probed = locked.request("GET", "/", headers={"Accept": accept} if accept else {})
        assert (probed.status, probed.json()) == (200, {"status": "ok"})
    assert look(locked, path="/healthz").json() == {"status": "ok"}


def test_head_is_get_without_the_body(locked: Gateway) -> None:
    """As for every path."""
    page, head = look(locked), look(locked, "HEAD")
    own = ("date", "request-id", "x-request-id")
    assert head.status == 200 and head.body == b""
    shown = [{k: v for k, v in r.headers.items() if k not in own} for r in (page, head)]
    assert shown[0] == shown[1]
    assert int(head.headers["content-length"]) == len(page.body)


def test_other_methods_are_refused(locked: Gateway) -> None:
    """The page takes nothing."""
    assert look(locked, "POST", **{"x-api-key": KEY_FIELD["x-api-key"]}).status == 405


def test_the_headers_let_the_page_do_only_what_it_does(locked: Gateway) -> None:
    """Not framed, not kept, and nothing runs but its own words."""
    headers = look(locked).headers
    policy = dict(
        part.partition(" ")[::2] for part in headers["content-security-policy"].split("; ")
    )
    hashes = {name: policy.pop(name) for name in ("script-src", "style-src")}
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert all(re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", value) for value in hashes.values())
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["vary"] == "Accept"
    assert "access-control-allow-origin" not in headers and "set-cookie" not in headers


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_names_the_hash_of_what_is_sent(locked: Gateway, tag: str) -> None:
    """Computed here again, from the bytes between the tags."""
    page = look(locked)
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
    assert len(inside) == 1
    found = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{found}'" in page.headers["content-security-policy"]


def test_the_page_holds_no_state(locked: Gateway) -> None:
    """The same bytes with the key and without it, here and everywhere: nothing of this gateway."""
    seen = {look(locked).body, look(locked, **KEY_FIELD).body, look(locked, path="/?a=<b>").body}
    assert seen == {write_page()[0]}


class Outline(HTMLParser):
    """The elements of a document, and the attributes that fetch or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.active: list[tuple[str, str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes it."""
        self.tags.append(tag)
        fetching = ("src", "href", "action", "style", "srcset", "formaction")
        self.active += [(tag, n, v) for n, v in attrs if n in fetching or n.startswith("on")]


def test_the_page_names_no_outside_resource() -> None:
    """No address, no import, no attribute that runs: it works without any network."""
    text = write_page()[0].decode()
    outline = Outline(text)
    assert outline.active == [("link", "href", "data:,")]
    assert not {"img", "iframe", "object", "embed", "base", "template"} & set(outline.tags)
    assert not re.search(r"https?:|url\(|@import|(?<![:\w])//\w", text)


def test_the_script_makes_no_markup_of_text() -> None:
    """Every way from a string to elements or to code is missing."""
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|createContextual|srcdoc"
    assert not re.search(ways + r"|\beval\b|\bFunction\(|import\(|localStorage|cookie", PAGE_SCRIPT)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", "/v1/status"])
def test_the_shield_holds(locked: Gateway, path: str, headers: dict[str, str]) -> None:
    """Neither the page nor its figures for other sites, even with the key."""
    refused = look(locked, path=path, **headers, **KEY_FIELD)
    assert refused.status == 403
    assert refused.headers["content-type"] == "application/json"


@pytest.mark.parametrize("site", ["none", "same-origin", "same-site"])
def test_a_person_who_types_the_address_is_let_in(locked: Gateway, site: str) -> None:
    """As browsers mark that, and the page's own requests."""
    assert look(locked, **{"Sec-Fetch-Site": site}).status == 200


# ---- its figures -------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"Authorization": "Bearer x"}])
def test_the_status_wants_the_key(locked: Gateway, headers: dict[str, str]) -> None:
    """The page may be had without; what it shows may not."""
    refused = look(locked, path="/v1/status", **headers)
    assert refused.status == 401 and "providers" not in refused.text


def test_the_status_tells_how_things_stand(locked: Gateway) -> None:
    """As the control channel does."""
    status = look(locked, path="/v1/status", **KEY_FIELD).json()
    assert status["state"] == "serving" and status["needs_key"] is True
    assert status["connections"] >= 1 and status["requests_in_flight"] >= 1
    assert status["url"] == locked.url and status["uptime_s"] >= 0
    [echo] = [row for row in status["providers"] if row["name"] == "echo"]
    assert echo["type"] == "echo" and echo["health"] == "ready" and echo["cooldowns"] == []


def test_the_status_tells_no_path_and_no_process(locked: Gateway) -> None:
    """They are nobody's business who only has the key."""
    reply = look(locked, path="/v1/status", **KEY_FIELD)
    assert str(locked.folder) not in reply.text and KEY not in reply.text
    assert not {"pid", "config_file", "log_file"} & set(reply.json())
    assert look(locked, path="/status", **KEY_FIELD).json().keys() == reply.json().keys()


# ---- its colours -------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """The relative luminance of `#abc` or `#aabbcc` (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(c + c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "card"])
def test_every_text_can_be_read(scheme: str, ground: str) -> None:
    """4.5 to 1 for words, 3 to 1 for bars, on both grounds (WCAG 2.2, 1.4.3 and 1.4.11)."""
    light, dark = PAGE_STYLE.split("@media (prefers-color-scheme: dark)")
    found = re.findall(r"--(\w+): (#\w+);", dark if scheme == "dark" else light)
    colours = {name: luminance(colour) for name, colour in found}

    def contrast(name: str) -> float:
        low, high = sorted((colours[name], colours[ground]))
        return (high + 0.05) / (low + 0.05)

    words = {name: contrast(name) for name in ("ink", "soft", "accent", "good", "warn", "bad")}
    assert min(words.values()) >= 4.5, words
    bars = {name: contrast(name) for name in colours if re.fullmatch(r"s\d", name)}
    assert len(bars) == 6 and min(bars.values()) >= 3, bars


# ---- in a browser: a stage with any figures -----------------------------------------------------


def count_row(requests: int, tokens: int, credit: float = 0.0) -> Json:
    """A row of /v1/usage; a quarter of the input came from the cache."""
    return {
        "request_count": requests, "error_count": requests // 10, "cancelled_count": 0,
        "input_tokens": tokens, "cache_read_tokens": tokens // 4, "cache_write_tokens": 0,
        "output_tokens": tokens // 2, "reasoning_tokens": 7, "total_tokens": tokens + tokens // 2,
        "token_sources": {"reported": requests}, "credits": credit, "credit_sources": {},
    }  # fmt: skip


def recent_row(**more: Any) -> Json:
    """One of the recent requests of /v1/usage."""
    return {
        "at": time.time(), "provider": "copilot", "account": "octocat", "model": "gpt-4.1",
        "label": "claude-cli", "dialect": "messages", "streamed": True, "status": 200, "kind": "",
        "duration_ms": 12345, "first_byte_ms": 850, "input_tokens": 4321, "cache_read_tokens": 1080,
        "cache_write_tokens": 0, "output_tokens": 99, "reasoning_tokens": 7, "credits": 1.5,
        "input_source": "reported", "output_source": "reported", "credits_source": "reported",
        **more,
    }  # fmt: skip


def day_name(days_ago: int = 0) -> str:
    """A day as the rows of /v1/usage name it."""
    return (dt.date.today() - dt.timedelta(days_ago)).isoformat()


def stage_status() -> Json:
    """What /v1/status tells of three accounts, one of each kind of trouble."""
    row = {"type": "copilot", "account": "octocat", "plan": "pro", "reason": "",
           "token_expires_at": time.time() + 1500.5, "cooldowns": []}  # fmt: skip
    return {
        "version": "9.8.7", "url": "http://127.0.0.1:9090", "state": "serving",
        "uptime_s": 93784, "connections": 5, "requests_in_flight": 3,
        "memory_bytes": 61 << 20, "needs_key": False, "warnings": ["copilot: 82 percent are used"],
        "providers": [
            {**row, "name": "copilot", "health": "cooling down",
             "cooldowns": [{"model": "gpt-5", "seconds": 44, "reason": "Its rate limit."},
                           {"model": "*", "seconds": 7, "reason": "Copilot is busy."}]},
            {**row, "name": "kiro", "type": "kiro", "health": "ready"},
            {**row, "name": "work", "health": "not signed in", "reason": "To sign in, type: x",
             "token_expires_at": None, "account": None, "plan": None},
        ],
    }  # fmt: skip


def stage_usage() -> Json:
    """What /v1/usage?by=day&recent= tells of two days of two providers."""

    resets_at = time.time() + 9 * 86400

    def allowance(name: str, used: float, limit: float) -> Json:
        return {"name": name, "used": used, "limit": limit, "remaining": limit - used,
                "unlimited": False, "unit": None, "percent_used": round(100 * used / limit, 2),
                "resets_at": resets_at, "overage_used": None}  # fmt: skip

    return {
        "providers": {
            "copilot": {"models": {"gpt-4.1": count_row(40, 8000, 12.5)}},
            "kiro": {"models": {"auto": {**count_row(2, 400), "token_sources": {"estimated": 1}}}},
        },
        "total": count_row(42, 8400),
        "trouble": "usage.db: is full",
        "by": "day",
        "rows": [
            {"day": day_name(), "provider": "copilot", **count_row(30, 6000, 10)},
            {"day": day_name(1), "provider": "copilot", **count_row(10, 2000, 2.5)},
            {"day": day_name(), "provider": "kiro", **count_row(2, 400)},
        ],
        "recent": [
            recent_row(),
            recent_row(provider="kiro", model="auto", input_source="estimated", streamed=False),
            recent_row(status=429, kind="rate_limited", first_byte_ms=None),
            recent_row(status=499, kind="cancelled", output_source="estimated"),
        ],
        "quota": {
            "copilot": {"account": "octocat", "plan": "pro", "resets_at": resets_at,
                        "as_of": time.time(), "allowances": [
                            allowance("premium", 246, 300),
                            {**allowance("odd", 298, 300), "overage_used": 3},
                            {**allowance("chat", 0, 1), "unlimited": True}]},
            "kiro": {"error": "Kiro does not answer"},
        },
        "limits": [{"name": "providers.copilot.daily_credits", "used": 10, "limit": 40,
                    "unit": "credits", "period": "day", "resets_at": resets_at}],
    }  # fmt: skip


class Stage:
    """A server with the page and with figures that a test chooses, on 127.0.0.1."""

    def __init__(self) -> None:
        self.status: Callable[[], Json] = stage_status
        self.usage: Callable[[], Json] = stage_usage
        #: the status of its figures
        self.code = 200
        #: it takes requests and says nothing
        self.gone = False
        self.asked: list[str] = []
        stage = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name
                """Says nothing."""

            def do_GET(self) -> None:
                """One answer."""
                stage.asked.append(self.path)
                if not stage.gone:
                    stage.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Writes what a gateway would."""
        path = handler.path.partition("?")[0]
        told = {"/v1/status": self.status, "/v1/usage": self.usage}.get(path)
        body, headers = write_page()
        if told is not None:
            body, headers = json.dumps(told()).encode(), {"Content-Type": "application/json"}
        elif path == "/other":
            body, headers = b"<!doctype html><title>other</title><link rel=icon href=data:,>", {}
        handler.send_response(self.code if told else 200 if path in ("/", "/other") else 404)
        for name, value in {"Content-Type": "text/html; charset=utf-8", **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        with contextlib.suppress(OSError):  # a tab that was closed meanwhile
            handler.wfile.write(body)

    def close(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """One stage for one test."""
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each has pages of its own."""
    with Browser() as browser:
        yield browser


SHOWN = "!document.querySelector('#figures').hidden"
#: Before the page's own script: a clock that is 50 times as fast, for its timers only.
HURRY = "{ const real = setTimeout; window.setTimeout = (f, ms) => real(f, ms / 50); }"


@contextlib.contextmanager
def opened(browser: Browser, stage: Stage, **window: Any) -> Iterator[Page]:
    """The page on a stage, its figures shown."""
    with browser.open_page(**window) as page:
        page.go(stage.url)
        page.wait(SHOWN)
        yield page


def only_asks(page: Page, url: str) -> bool:
    """Whether a page sent requests to nobody but this server."""
    asked = [request["url"] for request in page.requests()]
    return bool(asked) and all(each.startswith((url, "data:")) for each in asked)


@needs_chromium
def test_every_part_is_drawn(browser: Browser, stage: Stage) -> None:
    """Of figures that are known here."""
    with opened(browser, stage) as page:
        assert page.text("#version").startswith("9.8.7, serving at 127.0.0.1:")
        tiles = dict(zip(page.texts("#tiles dt"), page.texts("#tiles dd")))
        assert tiles == {
            "Uptime": "1 d 2 h", "Connections": "5", "In flight": "2", "Memory": "61 MiB",
            "Requests, 30 d": "42", "Failed, 30 d": "4", "Tokens, 30 d": "12.6K",
            "From cache": "25%",
        }  # fmt: skip
        assert page.texts("#warnings li") == ["copilot: 82 percent are used", "usage.db: is full"]
        copilot, kiro, work = page.texts("#providers article")
        for words in ("cooling down", "octocat", "pro", "token expires in 25 min", "82% used",
                      "99% used",
                      "gpt-5, 44 s: Its rate limit", "all models, 7 s: Copilot is busy.",
                      "unlimited", "3 beyond it", "as of ",
                      "54 of 300 left, resets "):  # fmt: skip
            assert words in copilot
        assert "ready" in kiro and "quota: Kiro does not answer" in kiro
        assert "not signed in" in work and "To sign in, type: x" in work and "token" not in work
        assert "providers.copilot.daily_credits" in page.text("#caps") and "25% used" in page.text(
            "#caps"
        )
        assert page.texts("#models tr") == [
            "copilot/gpt-4.1\t40\t4\t8,000\t25%\t4,000\t7\t12.50",
            "kiro/auto\t2\t0\t~400\t25%\t~200\t7\t0.00",
        ]
        rows = [row.split("\t")[1:] for row in page.texts("#recent tr")]
        assert rows[0] == ["copilot/gpt-4.1", "200", "claude-cli", "messages, streamed", "12.3 s",
                           "850 ms", "4,321", "1,080", "99", "1.50"]  # fmt: skip
        assert rows[1][0] == "kiro/auto" and rows[1][3] == "messages" and rows[1][6] == "~4,321"
        assert rows[2][1] == "429 rate_limited" and rows[2][5] == "-"
        assert rows[3][1] == "499 cancelled" and rows[3][8] == "~99"
        levels = "[...document.querySelectorAll('#providers .bar :last-child')]"
        assert page.evaluate(f"{levels}.map(e => e.className.baseVal)") == ["near", "out"]
        assert page.troubles() == [] and only_asks(page, stage.url)


@needs_chromium
def test_the_chart_is_to_scale(browser: Browser, stage: Stage) -> None:
    """Bars of a day stand on each other; credits of two providers are never added."""
    with opened(browser, stage) as page:
        titles = page.texts("#charts strong")
        assert titles == ["Tokens", "Credits"]  # kiro was billed none
        assert page.texts("#charts output") == ["12.6K in 30 days", "12.50 in 30 days"]
        script = """[...document.querySelectorAll('#charts figure:first-child g')].slice(-2).map(
            day => [...day.querySelectorAll('rect:not(.day)')].map(
                bar => ['y', 'height'].map(name => Number(bar.getAttribute(name)))))"""
        yesterday, today = page.evaluate(script)
        assert today[0][1] == pytest.approx(3 * yesterday[0][1])  # 9,000 and 3,000 tokens
        assert today[0][1] == pytest.approx(15 * today[1][1])  # 9,000 and 600
        assert today[1][0] + today[1][1] == pytest.approx(today[0][0])
        assert yesterday[0][0] + yesterday[0][1] == pytest.approx(158)
        lines = """[...document.querySelectorAll('#charts figure:first-child line')].map(
            line => [line.nextSibling.textContent, Number(line.getAttribute('y1'))])"""
        assert page.evaluate(lines) == [["0", 158], ["5K", 79], ["10K", 0]]
        assert today[0][1] == pytest.approx(158 * 9000 / 10000)
        page.evaluate("""document.querySelector('#charts g:last-of-type').dispatchEvent(
            new PointerEvent('pointerenter'))""")
        assert page.texts("#charts output")[0].endswith(": copilot 9K, kiro 600")


@needs_chromium
def test_another_range_of_days_can_be_chosen(browser: Browser, stage: Stage) -> None:
    """By hand or by keyboard: it asks for no more than it shows."""
    with opened(browser, stage) as page:
        for days in (7, 90, 30):
            page.evaluate(f"document.querySelector('[value=\"{days}\"]').click()")
            page.wait(
                f"document.querySelectorAll('#charts figure:first-child g').length === {days}"
            )
            page.wait(f"document.querySelector('#tiles').innerText.includes('Requests, {days} d')")
            asked = [path for path in stage.asked if "usage" in path][-1]
            assert re.findall(r"since=([^&]*)", asked) == [day_name(days - 1)]
        assert page.troubles() == []


@needs_chromium
def test_an_empty_gateway_is_no_error(browser: Browser, stage: Stage) -> None:
    """Nothing asked yet, nobody signed in, fields of later versions missing."""
    nothing = {"providers": {}, "total": count_row(0, 0)}
    stage.usage = lambda: nothing
    stage.status = lambda: {"version": "1", "state": "serving", "uptime_s": 0, "providers": [],
                            "connections": 1, "requests_in_flight": 1}  # fmt: skip
    with opened(browser, stage) as page:
        assert page.texts("#charts output") == ["0 in 30 days"]
        assert page.evaluate("document.querySelector('#limits').hidden") is True
        assert "NaN" not in page.text("body") and "undefined" not in page.text("body")
        assert page.troubles() == []


@needs_chromium
def test_foreign_words_stay_words(browser: Browser, stage: Stage) -> None:
    """Names, labels, reasons and figures that try to be markup are shown as they are."""
    attack = "<img src=x onerror=hacked()><script>hacked()</script>\"'><svg onload=hacked()>"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in SHAPE else attack + k: poisoned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return attack if isinstance(value, str) else value

    def usage() -> Json:
        told: Json = poisoned(stage_usage())
        for row, real in zip(told["rows"], stage_usage()["rows"]):
            row["day"] = real["day"]
        told["recent"].append(recent_row(input_tokens=attack, credits=attack, status=attack))
        return told

    stage.usage, stage.status = usage, lambda: poisoned(stage_status())
    with browser.open_page() as page:
        page.before("window.hits = 0; window.hacked = () => { window.hits += 1; };")
        page.go(stage.url)
        page.wait(SHOWN)
        for part in ("#warnings", "#providers", "#caps", "#charts", "#models", "#recent"):
            assert attack in page.text(part), part
        count = "document.querySelectorAll('img, script:not(:last-of-type), [onload]').length"
        assert page.evaluate(count) == 0
        assert page.evaluate("window.hits") == 0
        assert page.troubles() == [] and only_asks(page, stage.url)


#: The keys of the two answers; every other key is a name that somebody chose.
SHAPE = (
    {"providers", "total", "by", "rows", "recent", "quota", "limits", "models", "allowances"}
    | {"name", "used", "limit", "remaining", "unlimited", "unit", "period", "resets_at", "error"}
    | {"day", "provider", *count_row(1, 1), *recent_row(), *stage_status()}
    | {"cooldowns", "health", "reason", "type", "account", "plan", "token_expires_at"}
    | {"model", "seconds", "as_of", "percent_used", "overage_used", "trouble"}
)


@needs_chromium
def test_the_page_follows_the_gateway_while_it_is_seen(browser: Browser, stage: Stage) -> None:
    """By itself; what has not changed stays in place, and a hidden page asks for nothing."""
    with browser.open_page() as page:
        page.before(HURRY)
        page.go(stage.url)
        page.wait(SHOWN)
        page.evaluate("document.querySelector('#models tr').mark = true")
        stage.status = lambda: {**stage_status(), "requests_in_flight": 77}
        page.wait("document.querySelector('#tiles').innerText.includes('76')")
        assert page.evaluate("document.querySelector('#models tr').mark") is True
        hide = """Object.defineProperty(document, 'hidden', {value: %s, configurable: true});
                  document.dispatchEvent(new Event('visibilitychange'));"""
        page.evaluate(hide % "true")
        page.evaluate("new Promise(done => setTimeout(done, 50 * 200))")  # what was under way
        count = len(stage.asked)
        page.evaluate("new Promise(done => setTimeout(done, 50 * 500))")  # five times its period
        assert len(stage.asked) == count
        stage.status = lambda: {**stage_status(), "requests_in_flight": 88}
        page.evaluate(hide % "false")
        page.wait("document.querySelector('#tiles').innerText.includes('87')")
        assert page.troubles() == []


@needs_chromium
def test_a_gateway_that_is_gone_is_told_and_comes_back(browser: Browser, stage: Stage) -> None:
    """The last figures stay, marked as old."""
    with browser.open_page() as page:
        page.before(HURRY)
        page.go(stage.url)
        page.wait(SHOWN)
        stage.gone = True
        page.wait("document.querySelector('#notice').innerText.includes('does not respond')")
        assert "figures are of" in page.text("#notice")
        assert page.evaluate("document.querySelector('main').className") == "gone"
        assert "octocat" in page.text("#providers")
        stage.gone = False
        page.wait("document.querySelector('#notice').innerText === ''")
        assert page.evaluate("document.querySelector('main').className") == ""


@needs_chromium
def test_a_refusal_is_told_in_its_own_words(browser: Browser, stage: Stage) -> None:
    """Those of the gateway's error."""
    stage.usage = lambda: {"error": {"message": "since: must be a time."}}
    stage.code = 400
    with browser.open_page() as page:
        page.go(stage.url)
        page.wait("document.querySelector('#notice').innerText.includes('must be a time')")
        assert page.evaluate("document.querySelector('#figures').hidden") is True


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_window(browser: Browser, stage: Stage, width: int) -> None:
    """Wide tables scroll by themselves; the page never does, on a phone neither."""
    with opened(browser, stage, width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = """[...document.querySelectorAll('h1, h2, h3, p, dt, dd, figure')].filter(
            e => e.offsetParent && e.getBoundingClientRect().right > innerWidth
                 && !e.closest('[tabindex]')).map(e => e.innerText)"""
        assert page.evaluate(cut) == []


@needs_chromium
def test_both_colour_schemes_are_painted(browser: Browser, stage: Stage) -> None:
    """As the system says, at once when it changes."""
    colours = "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    with opened(browser, stage) as page:
        assert page.evaluate(colours) == ["rgb(244, 245, 247)", "rgb(26, 32, 39)"]
        page.paint(dark=True)
        assert page.evaluate(colours) == ["rgb(15, 19, 23)", "rgb(227, 232, 237)"]
        assert page.picture().startswith(b"\x89PNG")


@needs_chromium
def test_the_page_tells_its_parts_to_a_screen_reader(browser: Browser, stage: Stage) -> None:
    """Drawings and tables have names, headings an order, fields labels; all is reachable."""
    with opened(browser, stage) as page:
        nameless = """[...document.querySelectorAll('svg:not([aria-hidden])')].filter(
            e => e.getAttribute('role') !== 'img' || !e.getAttribute('aria-label')).length"""
        assert page.evaluate(nameless) == 0
        assert page.evaluate("document.querySelectorAll('table:not(:has(caption))').length") == 0
        headings = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => e.tagName)")
        assert headings[0] == "H1" and headings.count("H1") == 1
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.evaluate("document.querySelector('#key').labels.length") == 1
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        names = {(n["role"]["value"], n["name"]["value"]) for n in tree if n.get("name")}
        assert ("image", "premium: 82% used") in names
        assert ("image", "Tokens: 12.6K in 30 days") in names
        assert ("region", "Recent requests") in names and ("radio", "7 days") in names


# ---- in a browser: a real gateway ---------------------------------------------------------------


@needs_chromium
def test_the_page_asks_for_the_key(browser: Browser, locked: Gateway) -> None:
    """Nothing is shown before; a wrong key is told; the right one is kept for this tab only."""
    asking = "!document.querySelector('#ask').hidden"
    with browser.open_page() as page:
        page.go(locked.url + "/")
        page.wait(asking)
        assert "needs its key" in page.text("#ask") and page.text("#wrong") == ""
        assert page.evaluate("document.activeElement.id") == "key"
        assert "echo" not in page.text("body")
        page.type("a wrong one")
        page.wait("document.querySelector('#wrong').innerText.includes('not the gateway')")
        page.type(KEY)
        page.wait(SHOWN)
        assert "responds locally" in page.text("#providers")
        assert page.evaluate("document.querySelector('#ask').hidden") is True
        kept = "[location.href, document.cookie, localStorage.length]"
        assert page.evaluate(kept) == [locked.url + "/", "", 0]
        page.go(locked.url + "/")
        page.wait(SHOWN)  # after a reload as well
        page.evaluate("document.querySelector('#forget').click()")
        page.wait(asking)
        assert "responds locally" not in page.evaluate("document.body.textContent")
        assert page.evaluate("sessionStorage.length") == 0
        assert all(KEY not in r["url"] and "same" not in r["url"] for r in page.requests())
        assert only_asks(page, locked.url)
        # The console tells of the answers 401, as it must; of nothing else.
        assert all("401" in words for words in page.troubles()), page.troubles()
    assert KEY not in locked.log()


@needs_chromium
def test_the_page_shows_real_requests(browser: Browser) -> None:
    """Their figures are those of /v1/usage, and those are the service's."""
    with ExitStack() as stack:
        fake = stack.enter_context(FakeCopilot())
        token = {"type": "copilot", "github_token": fake.github_token}
        config = (
            f'[providers.copilot]\ntype = "copilot"\ngithub_url = "{fake.url}"\n'
            f'github_api_url = "{fake.url}"\n[providers.echo]\ntype = "echo"\n'
        )
        gateway = stack.enter_context(Gateway(config=config, tokens={"copilot": token}))
        body = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "<b>secret</b>"}]}
        agent = {"user-agent": "<b>evil</b>/1.0"}
        for more in ({}, {"stream": True}):
            done = gateway.request("POST", "/v1/chat/completions", {**body, **more}, agent)
            assert done.status == 200
        usage = gateway.request("GET", "/v1/usage").json()
        [row] = usage["providers"]["copilot"]["models"].values()
        page = stack.enter_context(browser.open_page())
        page.go(gateway.url + "/")
        page.wait("document.querySelectorAll('#recent tr').length === 2")
        [shown] = page.texts("#models tr")
        figures = shown.split("\t")
        assert figures[0] == "copilot/gpt-4.1" and figures[1:3] == ["2", "0"]
        assert (
            figures[3] == f"{row['input_tokens']:,}" and figures[5] == f"{row['output_tokens']:,}"
        )
        assert figures[7] == f"{row['credits']:.2f}"
        assert {line.split("\t")[4] for line in page.texts("#recent tr")} == {
            "chat", "chat, streamed"
        }  # fmt: skip
        assert "copilot" in page.text("#providers") and "echo" in page.text("#providers")
        assert "secret" not in page.evaluate("document.documentElement.outerHTML")
        assert page.evaluate("document.querySelectorAll('main b').length") == 0
        assert page.troubles() == [] and only_asks(page, gateway.url)


@needs_chromium
def test_another_site_cannot_ask_it(browser: Browser, stage: Stage, locked: Gateway) -> None:
    """A real browser's own words to the shield: `localhost` is another site than 127.0.0.1."""
    with browser.open_page() as page:
        page.go(stage.url.replace("127.0.0.1", "localhost") + "other")
        page.wait("document.title === 'other'")
        asked = json.dumps(f"{locked.url}/v1/status")
        assert page.evaluate(f"fetch({asked}).then(() => 'told', () => 'refused')") == "refused"
        assert page.status_of(f"{locked.url}/v1/status") == 403


@needs_chromium
@pytest.mark.parametrize(("name", "status"), [("localhost", 403), ("127.0.0.1", 200)])
def test_another_page_cannot_frame_it(
    browser: Browser, stage: Stage, locked: Gateway, name: str, status: int
) -> None:
    """The shield refuses other sites; a page on another port is the same site: the policy does."""
    with browser.open_page() as page:
        page.go(stage.url.replace("127.0.0.1", name) + "other")
        page.wait("document.title === 'other'")
        page.evaluate(f"""new Promise(done => {{
            const frame = document.createElement("iframe");
            frame.addEventListener("load", done);
            frame.src = {json.dumps(locked.url)};
            document.body.append(frame);
        }}).then(() => 1)""")
        assert page.status_of(locked.url + "/") == status
        tree = page.call("Page.getFrameTree")["frameTree"]
        shown = [each["frame"].get("unreachableUrl", "") for each in tree.get("childFrames", [])]
        assert status == 403 or shown == [locked.url + "/"]
