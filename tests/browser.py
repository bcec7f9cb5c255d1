"""A headless Chromium, driven over its debugging pipe: the standard library is enough.

    with Browser() as browser, browser.open_page() as page:
        page.go("http://127.0.0.1:9090/")
        page.wait("document.title === 'aiclient-api'")
        assert page.troubles() == []

The pipe carries JSON with a NUL after each message: commands on the browser's descriptor 3, their
answers and its events on 4.  Every wait is bounded.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]

#: The program, "" where there is none.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""

COMMAND_SECONDS = 40.0  # the first one waits for the program to be loaded
WAIT_SECONDS = 20.0
END_SECONDS = 5.0
READ_BYTES = 1 << 20

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)

#: Before any script of the page: what its policy forbids and it tried all the same.
WATCH_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event =>
  window.violations.push(`${event.effectiveDirective}: ${event.blockedURI}`));
"""


class BrowserFailed(Exception):
    """A command was refused, or nothing came in time."""


class Browser:
    """One process with a profile of its own, which is removed with it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gw-browser-"))
        self._commands, self._answers, self._pid = self._start()
        self._held = b""
        self._count = 0
        self._pages: dict[str, Page] = {}

    def _start(self) -> tuple[int, int, int]:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Above 4, so that neither is overwritten on its way to 3 and 4.
        high_in = fcntl.fcntl(theirs_in, fcntl.F_DUPFD_CLOEXEC, 10)
        high_out = fcntl.fcntl(theirs_out, fcntl.F_DUPFD_CLOEXEC, 10)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(self.folder / "log"), os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, high_in, 3),
            (os.POSIX_SPAWN_DUP2, high_out, 4),
        ]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        env = {**os.environ, "HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        pid = os.posix_spawn(CHROMIUM, command, env, file_actions=actions, setsid=True)
        for number in (theirs_in, theirs_out, high_in, high_out):
            os.close(number)
        return ours_out, ours_in, pid

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it and all its processes by whatever that takes, and removes its folder."""
        with contextlib.suppress(OSError, BrowserFailed):
            self.call("Browser.close", seconds=END_SECONDS)
        os.close(self._commands)
        os.close(self._answers)
        until = time.monotonic() + END_SECONDS
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)  # what it left behind
        shutil.rmtree(self.folder, ignore_errors=True)

    # Commands and events...

    def call(
        self, method: str, session: str = "", seconds: float = COMMAND_SECONDS, **params: Any
    ) -> Json:
        """The result of one command; raises BrowserFailed."""
        self._count += 1
        message: Json = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        until = time.monotonic() + seconds
        while True:
            came = self._next(until)
            if came.get("id") != message["id"]:
                continue
            if "error" in came:
                raise BrowserFailed(f"{method}: {came['error'].get('message')}")
            result: Json = came["result"]
            return result

    def listen(self, until: float) -> None:
        """Takes one more event; raises BrowserFailed where none comes until then."""
        self._next(until)

    def _next(self, until: float) -> Json:
        """The next message; an event is handed to its page as well."""
        while b"\0" not in self._held:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise BrowserFailed(f"nothing came in time\n{self.log()}")
            piece = os.read(self._answers, READ_BYTES)
            if not piece:
                raise BrowserFailed(f"the browser has ended\n{self.log()}")
            self._held += piece
        line, _, self._held = self._held.partition(b"\0")
        message: Json = json.loads(line)
        page = self._pages.get(message.get("sessionId", ""))
        if page is not None and "method" in message:
            page.events.append(message)
        return message

    def log(self) -> str:
        """The end of what it wrote to standard error."""
        path = self.folder / "log"
        return path.read_text("utf-8", "replace")[-2000:] if path.exists() else ""

    @contextlib.contextmanager
    def open_page(self, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
        """An empty page that shares nothing with others: no storage, no cache, no key."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        try:
            for domain in ("Page", "Runtime", "Network", "Log"):
                page.call(f"{domain}.enable")
            page.before(WATCH_VIOLATIONS)
            page.resize(width, height)
            page.paint(dark)
            yield page
        finally:
            del self._pages[page.session]
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """One tab, and every event it told of."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session
        self.events: list[Json] = []

    def call(self, method: str, seconds: float = COMMAND_SECONDS, **params: Any) -> Json:
        """The result of one command of this tab."""
        return self.browser.call(method, self.session, seconds, **params)

    def go(self, url: str) -> None:
        """Opens an address, as one that was typed; raises BrowserFailed where nothing answers."""
        failed = self.call("Page.navigate", url=url, transitionType="typed").get("errorText")
        if failed:
            raise BrowserFailed(f"{url}: {failed}")

    def before(self, script: str) -> None:
        """Runs a script in every document to come, before its own ones."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def evaluate(self, script: str, seconds: float = COMMAND_SECONDS) -> Any:
        """The value of an expression, which may be a promise."""
        done = self.call(
            "Runtime.evaluate",
            seconds,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in done:
            raise BrowserFailed(f"{script}\n{json.dumps(done['exceptionDetails'])[:1000]}")
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = WAIT_SECONDS) -> None:
        """Returns when the expression is true."""
        until = time.monotonic() + seconds
        look = f"""new Promise(done => {{
          const until = performance.now() + 250;
          const look = () => {{
            let found = false;
            try {{ found = Boolean({condition}); }} catch (error) {{ found = false; }}
            if (found || performance.now() > until) done(found); else setTimeout(look, 20);
          }};
          look();
        }})"""
        while time.monotonic() < until:
            # A page that has just gone takes the question with it: it is asked of the next one.
            with contextlib.suppress(BrowserFailed):
                if self.evaluate(look):
                    return
        text = self.evaluate("document.body && document.body.innerText")
        raise BrowserFailed(f"not true after {seconds} s: {condition}\n{text}")

    def text(self, selector: str) -> str:
        """What a person can read inside the first element that the selector finds."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """The same of every element that the selector finds."""
        script = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"
        return list(self.evaluate(script))

    def type(self, words: str) -> None:
        """Types into what has the focus, and presses Enter."""
        self.call("Input.insertText", text=words)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "",
            )  # fmt: skip

    def paint(self, dark: bool) -> None:
        """Chooses what `prefers-color-scheme` says."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])

    def resize(self, width: int, height: int) -> None:
        """Chooses the window's size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    # What it told of...

    def told(self, method: str) -> list[Json]:
        """The parameters of every event of one kind."""
        return [event["params"] for event in self.events if event["method"] == method]

    def requests(self) -> list[Json]:
        """Every request the page made or tried: `{"url", "method", "headers", ...}`."""
        return [params["request"] for params in self.told("Network.requestWillBeSent")]

    def status_of(self, url: str, seconds: float = WAIT_SECONDS) -> int:
        """The status of the last answer to a request of this address, even if no script may see it.

        What the network tells comes on a way of its own: it is waited for.
        """
        until = time.monotonic() + seconds
        while True:
            sent = self.told("Network.requestWillBeSent")
            ids = {each["requestId"] for each in sent if each["request"]["url"] == url}
            came = self.told("Network.responseReceivedExtraInfo")
            found = [each["statusCode"] for each in came if each["requestId"] in ids]
            if found:
                return int(found[-1])
            self.browser.listen(until)

    def troubles(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the page's policy forbade."""
        found = [f"policy: {words}" for words in self.evaluate("window.violations ?? []")]
        found += [f"exception: {json.dumps(e)[:500]}" for e in self.told("Runtime.exceptionThrown")]
        found += [f"console: {json.dumps(e)[:500]}" for e in self.told("Runtime.consoleAPICalled")]
        for entry in (params["entry"] for params in self.told("Log.entryAdded")):
            found.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}".strip())
        return found
