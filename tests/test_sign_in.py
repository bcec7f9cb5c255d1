"""Signing in with the real program, in a pipe and on a real terminal, against strict imitations."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import http.client
import json
import os
import pty
import re
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import forks
import pytest
from fake_kiro import CA_FILE, FakeKiro
from fakes import Answer, FakeCopilot, dump
from support import Gateway, clean_environment, compiled_program

import aiclient_api as gw

Json = dict[str, Any]
Fake = FakeCopilot | FakeKiro
SECONDS = 30.0
#: What every token of the imitations, and of the services, begins with.
TOKEN_MARKS = ("ghu_", "gho_", "ghs_", "github_pat_", "tid=", "aoa", "aor", "ksk_", "eyJ")


# ---- a person's folders and their programs -------------------------------------------------------


class Done:
    """A command that has ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"<Done {self.status}\n{self.out}\n--\n{self.err}>"

    @property
    def said(self) -> str:
        """All that it said."""
        return self.out + self.err


class Home:
    """The folders of one person, where the program runs in a pipe or on a terminal."""

    def __init__(self, folder: Path, fakes: Iterable[Fake], config: str = "") -> None:
        self.folder = folder
        self.fakes = list(fakes)
        folder.mkdir(mode=0o700, exist_ok=True)
        self.env = clean_environment(folder)
        for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
            self.env.pop(name, None)
        self.config_folder = folder / "config" / "aiclient-api"
        self.state_folder = folder / "state" / "aiclient-api"
        self.config_file = self.config_folder / "config.toml"
        self.config_folder.mkdir(mode=0o700, parents=True)
        self.config_file.write_text(config or config_for(self.fakes))
        #: all that was said on any output
        self.said = ""
        self.terminals: list[Terminal] = []

    @property
    def path(self) -> Path:
        """The home folder."""
        return Path(self.env["HOME"])

    def file(self, name: str = "copilot") -> Path:
        """A provider's token file."""
        return self.config_folder / name / "token.json"

    def token(self, name: str = "copilot") -> Json:
        """What a provider's token file holds."""
        held: Json = json.loads(self.file(name).read_text())
        return held

    def litter(self) -> list[str]:
        """Files that should not be there any more."""
        return [str(path) for path in self.folder.rglob(".new-*")]

    def command(self, args: Iterable[str]) -> list[str]:
        """What runs the program."""
        return [sys.executable, str(compiled_program()), *args]

    def run(self, *args: str, given: bytes | str = b"", seconds: float = SECONDS) -> Done:
        """One command in a pipe, to its end."""
        data = given.encode() if isinstance(given, str) else given
        done = forks.complete(compiled_program(), args, self.env, self.folder, data, seconds)
        result = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        self.said += result.said
        assert "Traceback" not in result.err, result
        return result

    def terminal(self, *args: str, **env: str) -> Terminal:
        """One command on a terminal of its own."""
        terminal = Terminal(self, args, {**self.env, **env})
        self.terminals.append(terminal)
        return terminal

    def rows(self) -> dict[str, Json]:
        """What `auth list` tells a pipe, by name."""
        done = self.run("auth", "list", "--json")
        assert done.status == 0, done
        return {row["name"]: row for row in json.loads(done.out)["accounts"]}

    def check_end(self) -> None:
        """No secret was shown or is where it does not belong, and nothing is half done."""
        for terminal in self.terminals:
            terminal.close()
        secrets = {secret for fake in self.fakes for secret in fake.secrets}
        texts = {"output": self.said}
        if self.config_file.exists():
            texts["config"] = self.config_file.read_text()
        for folder in self.folder.glob("state*"):
            files = (path for path in folder.rglob("*") if path.is_file())
            texts |= {str(path): path.read_text(errors="replace") for path in files}
        for where, text in texts.items():
            found = [secret[:12] for secret in secrets if secret in text]
            assert not found, f"in the {where}: {found}"
        assert not self.litter()
        for path in self.config_folder.rglob("*"):
            private = not path.is_symlink() and path.parent != self.config_folder
            assert not private or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


class Terminal:
    """A command on a pseudo-terminal: what is shown is read, answers are typed."""

    def __init__(self, home: Home, args: Iterable[str], env: Mapping[str, str]) -> None:
        self.home = home
        self.shown = ""
        self._at = 0
        self._news = threading.Condition()
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        self.process = subprocess.Popen(
            home.command(args), env={**env, "TERM": "xterm"}, cwd=home.folder,
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=functools.partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError as error:
                assert error.errno in (errno.EIO, errno.EBADF)
                data = b""
            with self._news:
                self.shown += data.decode("utf-8", "replace")
                self._news.notify_all()
            if not data:
                return

    def expect(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Waits until `pattern` is shown after what was expected before."""
        deadline = time.monotonic() + seconds
        with self._news:
            while True:
                found = re.compile(pattern).search(self.shown, self._at)
                if found:
                    self._at = found.end()
                    return found
                left = deadline - time.monotonic()
                ended = not self._reader.is_alive()
                assert left > 0 and not ended, f"no {pattern!r} in:\n{self.shown}"
                self._news.wait(min(left, 0.2))

    def type(self, text: str) -> None:
        """Types a line."""
        os.write(self._master, text.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        """Presses keys: b"\\x03" is Ctrl-C."""
        os.write(self._master, keys)

    def expect_hidden(self, pattern: str) -> None:
        """Waits for a question whose answer is not shown: getpass drops what came before."""
        self.expect(pattern)
        deadline = time.monotonic() + SECONDS
        while termios.tcgetattr(self._master)[3] & termios.ECHO:
            assert time.monotonic() < deadline, "what is typed would be shown"
            time.sleep(0.01)

    def answer(self, question: str, text: str) -> None:
        """Waits for a question and answers it."""
        self.expect(question)
        self.type(text)

    def end(self, seconds: float = SECONDS) -> int:
        """The exit status; all that was shown has been read then."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.shown}") from None
        self._reader.join(5)
        assert "Traceback" not in self.shown, self.shown
        return status

    def close(self) -> None:
        """Ends it by whatever it takes."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
            self.home.said += self.shown


def config_for(fakes: Iterable[Fake], more: str = "") -> str:
    """A configuration that knows the imitations only."""
    text = "# mine\n"
    for fake in fakes:
        if isinstance(fake, FakeCopilot):
            name, keys = "copilot", "github_url github_api_url"
        else:
            name, keys = "kiro", "oidc_url auth_url api_url management_url"
        text += f"[providers.{name}]\n"
        text += "".join(f'{key} = "{fake.url}"\n' for key in keys.split())
    return text + more


def at_once(*jobs: Callable[[], None]) -> None:
    """Runs independent flows side by side: they mostly wait."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


Make = Callable[..., Home]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes people with services of their own, which are checked afterwards."""
    homes: list[Home] = []
    lock = threading.Lock()
    with ExitStack() as stack:

        def made(*kinds: str, config: str = "", **switches: Any) -> Home:
            fakes: list[Fake] = [
                FakeCopilot() if kind == "copilot" else FakeKiro(kind) for kind in kinds
            ]
            for fake in fakes:
                stack.enter_context(fake)
                fake.device_states.clear()
                for name, value in switches.items():
                    setattr(fake, name, value)
            with lock:
                home = Home(tmp_path / str(len(homes)), fakes, config)
                homes.append(home)
            return home

        yield made
        for home in homes:
            home.check_end()
            assert [fake.violations for fake in home.fakes] == [[] for _ in home.fakes]


def copilot_of(home: Home) -> FakeCopilot:
    """The imitation of Copilot."""
    return next(fake for fake in home.fakes if isinstance(fake, FakeCopilot))


def kiro_of(home: Home) -> FakeKiro:
    """The imitation of Kiro."""
    return next(fake for fake in home.fakes if isinstance(fake, FakeKiro))


def ask(gateway: Gateway, model: str) -> tuple[int, str]:
    """(status, text) of one request for an answer."""
    body = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
    reply = gateway.request("POST", "/v1/chat/completions", body)
    said = reply.json()
    if reply.status != 200:
        return reply.status, said["error"]["message"]
    return 200, said["choices"][0]["message"]["content"]


def poll_answer(status: int, body: bytes, **more: Any) -> Answer:
    """A prepared answer to a poll."""
    return Answer(status, {"Content-Type": "text/html"}, body, chunked=False, **more)


# ---- Copilot -------------------------------------------------------------------------------------

TERMS = "github-acceptable-use-policies"
SIGNED_IN = "Signed in to Copilot as octocat at 127.0.0.1, plan individual_pro\n"
HTML = b"<!doctype html><html><title>Unicorn!</title></html>"


def state(name: str, **more: Any) -> Answer:
    """An answer of GitHub's to a poll."""
    return Answer(200, {"Content-Type": "application/json"}, dump({"error": name, **more}))


def copilot_that_waits(make: Make) -> list[Callable[[], None]]:
    """Copilot in a pipe, through all that passes."""

    def passes(*answers: Answer, at_least: float = 0.0) -> None:
        home = make("copilot")
        fake = copilot_of(home)
        fake.device_answers.extend(answers)
        began = time.monotonic()
        done = home.run("auth", "copilot")
        assert (done.status, done.out) == (0, SIGNED_IN), done
        assert time.monotonic() - began >= at_least
        assert not fake.device_answers
        assert f"Open    {fake.url}/login/device\n" in done.err
        assert "and type    ABCD-1234\n" in done.err
        assert "\x1b" not in done.said
        held = home.token()
        assert held["github_token"] == fake.github_token
        assert (held["type"], held["login"], held["plan"]) == (
            "copilot", "octocat", "individual_pro",
        )  # fmt: skip

    broken = Answer(200, {}, [b'{"error"'], then="close")
    return [
        lambda: passes(state("authorization_pending"), poll_answer(502, HTML)),
        lambda: passes(poll_answer(0, b"HTTP/1.1 20", then="close"), broken),
        lambda: passes(state("slow_down", interval=2), at_least=5),
        lambda: passes(state("slow_down"), at_least=9),  # RFC 8628: five seconds more
        lambda: passes(poll_answer(429, b"")),
    ]


def copilot_by_a_form(make: Make) -> None:
    """GitHub's responses as a form, which is what it sends where it overlooks the Accept header."""
    home = make("copilot")
    fake = copilot_of(home)
    form = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    for body in ("error=authorization_pending&error_description=wait",
                 f"access_token={fake.github_token}&scope=&token_type=bearer"):  # fmt: skip
        fake.device_answers.append(Answer(200, form, body.encode(), chunked=False))
    done = home.run("auth", "copilot")
    assert (done.status, done.out) == (0, SIGNED_IN), done


def copilot_that_ends(make: Make) -> list[Callable[[], None]]:
    """Copilot in a pipe, where no sign-in comes."""

    def fails(words: str, *answers: Answer, **switches: Any) -> None:
        home = make("copilot", **switches)
        fake = copilot_of(home)
        fake.device_answers.extend(answers)
        done = home.run("auth", "copilot")
        assert (done.status, done.out) == (1, ""), done
        assert re.search(rf"^aiclient-api: .*{words}", done.err, re.MULTILINE), done
        assert not home.file().exists()
        assert fake.exchanges == 0

    return [
        lambda: fails("has expired", state("expired_token")),
        lambda: fails("has expired", state("token_expired")),
        lambda: fails("has expired", expires_in=2),
        lambda: fails("cancelled at GitHub", state("access_denied")),
        lambda: fails("is wrong", state("incorrect_device_code", error_description="is wrong")),
        lambda: fails("incorrect_client", state("incorrect_client_credentials")),
        lambda: fails("issued no code: Not Found", only_client="Ov23li8tweQw6odWQebz"),
    ]


def test_a_sign_in_that_copilot_refuses_is_not_kept(make: Make) -> None:
    envelope = {
        "can_signup_for_limited": True, "message": "Resource not accessible by integration",
        "error_details": {
            "message": "No access to GitHub Copilot found.", "title": "x",
            "notification_id": "no_copilot_access",
            "url": "https://github.com/github-copilot/signup",
        },
    }  # fmt: skip

    def refused(status: int, body: bytes, words: str, keep: bool) -> None:
        home = make("copilot")
        fake = copilot_of(home)
        first = home.run("auth", "copilot", "--token-stdin", given=fake.github_token)
        assert (first.status, first.out) == (0, SIGNED_IN), first
        assert TERMS in first.err
        before = home.file().read_bytes()
        fake.exchange_answers.append(Answer(status, {}, body, chunked=False))
        done = home.run("auth", "copilot", "--token-stdin", given=fake.github_token)
        assert re.search(words, done.said), done
        assert TERMS not in done.said, "told once is enough"
        if keep:
            assert done.status == 0
            assert home.file().read_bytes() != before  # without the token of an exchange
            assert home.token()["github_token"] == fake.github_token
        else:
            assert (done.status, done.out) == (1, ""), done
            assert home.file().read_bytes() == before

    at_once(
        lambda: refused(403, dump(envelope), "no Copilot.* github-copilot/signup|signup", False),
        lambda: refused(401, dump({"message": "Bad credentials"}), "no longer accepts", False),
        lambda: refused(404, dump({"message": "Not Found"}), "does not exchange", False),
        lambda: refused(502, HTML, "could not be checked now", True),
        lambda: refused(
            403, dump({"message": "API rate limit exceeded for user ID 123."}), "rate limit", True
        ),
    )


@pytest.mark.parametrize("prefix", ["gho_", "github_pat_", "ghu_"])
def test_a_token_that_github_does_not_exchange(make: Make, prefix: str) -> None:
    home = make("copilot", direct=True, github_token=prefix + "EXAMPLE00000000000000000000000000")
    fake = copilot_of(home)
    done = home.run("auth", "copilot", "--token-stdin", given=fake.github_token)
    if prefix == "ghu_":
        assert (done.status, done.out) == (1, ""), done
        assert "does not exchange this token" in done.err
        assert not home.file().exists()
        return
    assert (done.status, done.out) == (0, SIGNED_IN), done
    assert home.rows()["copilot"]["health"] == "ok"
    with gateway_in(home) as gateway:
        assert ask(gateway, "gpt-4.1")[0] == 200
        scheme = "Bearer" if prefix == "github_pat_" else "token"
        assert fake.calls[0].headers["authorization"] == f"{scheme} {fake.github_token}"


@pytest.mark.parametrize("variable", ["COPILOT_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN"])
def test_a_token_for_programs_is_offered_first(make: Make, variable: str) -> None:
    token = "github_pat_EXAMPLE00000000000000000000000000"

    def in_a_pipe() -> None:
        home = make("copilot", github_token=token)
        home.env[variable] = token
        done = home.run("auth", "copilot")
        assert (done.status, done.out) == (0, SIGNED_IN), done
        assert f"{variable} holds a token" in done.err
        assert home.token()["github_token"] == token
        assert copilot_of(home).exchanges == 0

    def at_a_terminal() -> None:
        home = make("copilot", github_token=token)
        terminal = home.terminal("auth", "copilot", **{variable: token})
        terminal.answer(f"{variable} holds a token[^$]*Use it", "n")
        terminal.expect("and type    ABCD-1234")
        terminal.press(b"\x03")
        terminal = home.terminal("auth", "copilot", **{variable: token})
        terminal.answer(f"{variable} holds a token[^$]*Use it", "")
        terminal.expect("Signed in to Copilot as octocat")

    def without_one() -> None:
        home = make("copilot")
        home.env[variable] = "ghp_EXAMPLE000000000000000000000000000000"
        terminal = home.terminal("auth", "copilot")
        terminal.expect("and type    ABCD-1234")
        terminal.press(b"\x03")

    def refused() -> None:
        home = make("copilot", github_token=token)
        text = "unauthorized: Personal Access Token does not have Copilot Requests permission"
        copilot_of(home).models_answers.append(Answer(401, {}, text.encode(), chunked=False))
        done = home.run("auth", "copilot", "--token-stdin", given=token)
        assert (done.status, done.out) == (1, ""), done
        assert "does not have Copilot Requests permission" in done.err
        assert not home.file().exists()

    at_once(in_a_pipe, at_a_terminal, without_one, refused)


@contextlib.contextmanager
def gateway_in(home: Home, **env: str) -> Iterator[Gateway]:
    """A gateway over a person's own folders."""
    own = {k: home.env[k] for k in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")}
    with Gateway(env={**own, **env}) as gateway:
        yield gateway
        status = gateway.stop()
        home.said += gateway.stdout() + gateway.log()
        assert "Traceback" not in gateway.log(), gateway.log()
        assert "never retrieved" not in gateway.log(), gateway.log()
        assert status == 0


def test_tokens_are_taken_as_people_paste_them(make: Make) -> None:
    def taken(home: Home, form: str) -> None:
        token = copilot_of(home).github_token
        done = home.run("auth", "copilot", "--token-stdin", given=form.replace("T", token))
        assert (done.status, done.out) == (0, SIGNED_IN), (form, done)
        assert home.token()["github_token"] == token

    def refused(home: Home, data: bytes) -> None:
        done = home.run("auth", "copilot", "--token-stdin", given=data)
        assert (done.status, done.out) == (1, ""), (data, done)
        assert done.err.startswith("aiclient-api: the"), (data, done)
        assert not home.file().exists()

    good = ["T", "Bearer T\n", "token T", '"T"\r\n', "  'T'  \n", '"Bearer T"\n']
    bad = [b"", b"\n", b"Bearer \n", b"ghu_EXAMPLE...\n", "ghu_EXAMPLE\u2026\n".encode(),
           b"\xff\xfe\x00\n", b"\x00" * 100, b"two words\n"]  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda form: taken(make("copilot"), form), good))
        home = make("copilot")
        list(pool.map(lambda data: refused(home, data), bad))


def test_another_name_is_added_to_the_configuration(make: Make) -> None:
    home = make("copilot")
    fake = copilot_of(home)
    # The new provider is GitHub's own, which no test reaches.
    more = f'[network]\nproxy = "http://{closed_port()}"\n\n# my models\n'
    before = config_for([fake], more + '[models]\n"fast" = "gpt-4.1"   # \u00e4\n')
    for text in (before, before.rstrip("\n"), before + "\n\n", before.replace("\n", "\r\n")):
        home.config_file.write_bytes(text.encode())
        done = home.run("auth", "copilot", "--token-stdin", "--name", "work",
                        given=fake.github_token)  # fmt: skip
        assert done.status == 0, done
        assert "could not be checked now" in done.out
        after = home.config_file.read_bytes()
        assert after.startswith(text.encode()), after
        assert b"\n[providers.work]" in after[len(text.encode()) - 1 :]
        assert b'type = "copilot"' in after[len(text.encode()) :]
        assert home.rows()["work"]["type"] == "copilot"


def test_what_is_changed_in_the_configuration_meanwhile_stays(tmp_path: Path) -> None:
    """A person takes minutes to type a code; another command may write the file in that time."""
    paths = gw.Paths(str(tmp_path), str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text("# mine\n")

    async def meanwhile() -> None:
        client = gw.HttpClient(gw.NetworkConfig(), gw.Ticker())
        context = gw.SignInContext(gw.load_config(paths, {}, {}), paths, client, gw.Console())
        with context.adding_provider("work", "copilot", {}):
            assert file.read_text() == "# mine\n"
            gw.change_config(paths, {}, "server.port", "8080")
        client.close()

    asyncio.run(meanwhile())
    config = gw.load_config(paths, {}, {})
    assert config.server.port == 8080
    assert config.providers["work"].type == "copilot"
    assert file.read_text().startswith("# mine\n")


def closed_port() -> str:
    """host:port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_copilot_on_a_terminal(make: Make) -> None:
    def new_code() -> None:
        home = make("copilot")
        copilot_of(home).device_answers.append(state("expired_token"))
        terminal = home.terminal("auth", "copilot")
        terminal.expect("Waiting for you; the code expires in 15 min, Ctrl-C cancels")
        terminal.expect("the code has expired; start again for a new one")
        assert terminal.end() == 1
        terminal = home.terminal("auth", "copilot")
        terminal.expect("Signed in to Copilot as octocat")
        assert terminal.end() == 0
        assert home.token()["login"] == "octocat"

    def no_new_code() -> None:
        home = make("copilot", expires_in=1)
        terminal = home.terminal("auth", "copilot")
        terminal.expect("the code has expired")
        assert terminal.end() == 1
        assert not home.file().exists()

    def interrupted(question: str) -> None:
        home = make("copilot")
        fake = copilot_of(home)
        fake.device_states.extend(["authorization_pending"] * 50)
        terminal = home.terminal("auth", "copilot")
        terminal.expect(question)
        terminal.press(b"\x03")
        assert terminal.end(10) == 130
        assert re.search(
            r"aiclient-api: sign-in cancelled; nothing was changed\s*$", terminal.shown
        )
        assert not home.file().exists()

    def typed_token() -> None:
        home = make("copilot")
        fake = copilot_of(home)
        terminal = home.terminal("auth", "copilot", "--token-stdin")
        terminal.expect_hidden("GitHub token: ")
        terminal.type(fake.github_token)
        terminal.expect("Signed in to Copilot as octocat")
        assert terminal.end() == 0
        for keys, status in ((b"\x03", 130), (b"\x04", 1)):
            terminal = home.terminal("auth", "copilot", "--token-stdin")
            terminal.expect_hidden("GitHub token: ")
            terminal.press(keys)
            assert terminal.end(10) == status, terminal.shown

    def slow_check() -> None:
        home = make("copilot")
        fake = copilot_of(home)
        fake.exchange_answers.append(Answer(then="hang"))
        terminal = home.terminal("auth", "copilot")
        assert fake.wait_until(lambda: fake.exchanges == 1, SECONDS)
        terminal.press(b"\x03")
        assert terminal.end(10) == 130
        assert not home.file().exists()

    at_once(
        new_code, no_new_code, typed_token, slow_check,
        lambda: interrupted("Waiting for you"),
    )  # fmt: skip


def test_a_browser_is_opened_where_there_is_one(make: Make, tmp_path: Path) -> None:
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$#" "$@" >> {tmp_path}/opened.$KIND\n')
    script.chmod(0o700)

    def opened(kind: str, *more: str, **env: str) -> str:
        home = make("copilot")
        home.env.update(env, KIND=kind)
        done = home.run("auth", "copilot", *more)
        assert done.status == 0, done
        record = tmp_path / f"opened.{kind}"
        said = record.read_text() if record.exists() else ""
        assert ("should open" in done.err) == bool(said)
        return said.replace(copilot_of(home).url, "URL")

    def check(kind: str, expected: str, *more: str, **env: str) -> None:
        assert opened(kind, *more, **env) == expected

    browser = str(script)
    at_once(
        lambda: check("browser", "1 URL/login/device\n", BROWSER=browser),
        lambda: check("ssh", "1 URL/login/device\n", BROWSER=browser, SSH_CONNECTION="x"),
        lambda: check("told", "", "--no-browser", BROWSER=browser),
        lambda: check("none", ""),
    )


def test_names_that_cannot_be_signed_in(make: Make) -> None:
    home = make("copilot", "kiro")
    wrong = [
        (["copilot", "--name", "kiro"], "type is kiro, not copilot"),
        (["copilot", "--name", "echo"], "type is echo, not copilot"),
        (["kiro", "--name", "copilot", "--method", "google"], "type is copilot, not kiro"),
        (["copilot", "--name", "../x"], "a name is letters"),
        (["copilot", "--github-host", "example.com"], "TENANT.ghe.com"),
        (["copilot", "--github-host", "https://ghe.com"], "TENANT.ghe.com"),
        (["kiro", "--start-url", "https://x", "--method", "google"], "organisation only"),
        (["kiro", "--start-url", "http://x"], "must be like"),
        (["kiro", "--start-url", "https://x", "--region", "us"], "must be a region"),
        (["kiro"], "--method builder-id|google|github|organisation"),
    ]

    def refused(args: list[str], words: str) -> None:
        done = home.run("auth", *args, given="ghu_EXAMPLE")
        assert done.status == 2, done
        assert words in done.err

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: refused(*pair), wrong))
    assert all(fake.requests == [] for fake in home.fakes)
    # Two in a row: what is wrong comes before the terms, which are for whoever can sign in.
    assert "suspend" not in home.said


def test_a_disabled_provider_is_signed_in_and_told_of(make: Make) -> None:
    home = make("copilot")
    fake = copilot_of(home)
    home.config_file.write_text(config_for([fake], "enabled = false\n"))
    done = home.run("auth", "copilot", "--token-stdin", given=fake.github_token)
    assert done.status == 0, done
    assert "enabled" in done.said or "disabled" in done.said, done
    assert home.rows()["copilot"]["health"] == "ok"


def without_standard_input(make: Make, status: int, *args: str) -> None:
    """A program that was started with a closed standard input."""
    home = make("copilot")
    line = " ".join(home.command(["auth", "copilot", *args]))
    done = subprocess.run(
        f"{line} <&-", shell=True, env=home.env, capture_output=True, check=False, timeout=SECONDS
    )
    assert done.returncode == status, done
    assert b"Traceback" not in done.stderr, done.stderr.decode()


# ---- Kiro ----------------------------------------------------------------------------------------

AWS = {"Content-Type": "application/json"}


def aws(name: str, status: int = 400, form: str = "error") -> Answer:
    """An answer of AWS to a poll, in one of its spellings."""
    if form == "header":
        return Answer(status, {**AWS, "x-amzn-errortype": f"{name}:http://x/"}, b"{}")
    value = f"com.amazonaws.sso#{name}" if form == "__type" else name
    return Answer(status, AWS, dump({form: value, "error_description": f"words of {name}"}))


def kiro_that_waits(make: Make) -> list[Callable[[], None]]:
    """Kiro in a pipe, through all that passes."""

    def passes(method: list[str], kind: str, *answers: Answer, at_least: float = 0) -> None:
        home = make(kind)
        fake = kiro_of(home)
        fake.device_answers.extend(answers)
        began = time.monotonic()
        done = home.run("auth", "kiro", *method)
        assert (done.status, done.out) == (0, KIRO_SIGNED_IN), done
        assert time.monotonic() - began >= at_least
        assert not fake.device_answers
        assert re.search(r"Open    https://device\.sso\.[a-z0-9-]+\.amazonaws\.com/\n", done.err)
        assert "or open    https://device.sso." in done.err
        assert "https://kiro.dev/faq/" in done.err
        held = home.token("kiro")
        assert held["auth_method"] == kind
        assert held["start_url"] == fake.start_url
        assert held["idc_region"] == fake.sso_region
        assert held.get("profile_arn") == (fake.arn if kind == "idc" else None)
        if answers[0].status == 502:
            row = home.rows()["kiro"]
            assert (row["kind"], row["health"], row["user"]) == (kind, "ok", "user@example.org")
            assert row["plan"] == "KIRO PRO"
            assert row["expires_at"] > time.time() + 80 * 86400

    builder = ["--method", "builder-id"]
    there = ["--start-url", "https://d-example000.awsapps.com/start", "--region", "eu-west-1"]
    return [
        lambda: passes(builder, "builder_id", aws("authorization_pending"),
                       aws("AuthorizationPendingException", form="__type")),
        lambda: passes(builder, "builder_id", aws("AuthorizationPendingException", form="header"),
                       aws("InternalServerException", 500, "__type")),
        lambda: passes(builder, "builder_id", aws("SlowDownException", form="__type"), at_least=9),
        lambda: passes(there, "idc", poll_answer(502, HTML), Answer(0, {}, b"H", then="close")),
    ]  # fmt: skip


KIRO_SIGNED_IN = (
    "Signed in to Kiro as user@example.org, plan KIRO PRO, 175.57 of 1600 credits used\n"
)


def kiro_that_ends(make: Make) -> list[Callable[[], None]]:
    """Kiro in a pipe, where no sign-in comes."""

    def fails(words: str, *answers: Answer, **switches: Any) -> None:
        home = make("builder_id", **switches)
        fake = kiro_of(home)
        fake.device_answers.extend(answers)
        done = home.run("auth", "kiro", "--method", "builder-id")
        assert (done.status, done.out) == (1, ""), done
        assert re.search(rf"^aiclient-api: .*{words}", done.err, re.MULTILINE), done
        assert not home.file("kiro").exists()

    def wrong_url() -> None:
        home = make("builder_id")
        done = home.run("auth", "kiro", "--start-url", "https://other.awsapps.com/start")
        assert (done.status, done.out) == (1, ""), done
        assert "are the start URL and the region right?" in done.err
        home.fakes[0].violations.clear()

    return [
        lambda: fails("has expired", aws("expired_token")),
        lambda: fails("has expired", aws("ExpiredTokenException", 401, "__type")),
        lambda: fails("has expired", expires_in=1),
        lambda: fails("cancelled", aws("access_denied")),
        lambda: fails("cancelled", aws("AccessDeniedException", form="header")),
        lambda: fails("words of invalid_grant", aws("invalid_grant")),
        lambda: fails(
            "words of InvalidClientException", aws("InvalidClientException", 401, "__type")
        ),
        wrong_url,
    ]


def test_kiro_by_the_menu_of_a_terminal(make: Make) -> None:
    def builder() -> None:
        home = make("builder_id")
        terminal = home.terminal("auth", "kiro")
        terminal.expect("How do you sign in to Kiro")
        terminal.expect("1  AWS Builder ID\r\n  2  Google\r\n  3  GitHub\r\n  4  your organisation")
        terminal.answer(r"Choice \[1\]", "7")
        terminal.answer(r"a number from 1 to 4\.\s+Choice \[1\]", "builder-id")
        terminal.expect(re.escape(KIRO_SIGNED_IN.strip()))
        assert terminal.end() == 0

    def organisation() -> None:
        home = make("idc")
        fake = kiro_of(home)
        other = fake.profiles[0]["arn"].replace("EXAMPLE", "OTHER")
        fake.profiles = [
            {"arn": other, "profileName": "team A", "status": "ACTIVE"},
            *fake.profiles,
        ]
        terminal = home.terminal("auth", "kiro")
        terminal.answer("Choice", "4")
        terminal.answer("start URL:", fake.start_url + "/")
        terminal.answer(r"Region of its IAM Identity Center: \[us-east-1\]", "eu-west-1")
        terminal.expect(r"Which profile\?\s+1  team A.*\s+2  team EXAMPLE")
        terminal.answer("Choice", "2")
        terminal.expect(re.escape(KIRO_SIGNED_IN.strip()))
        assert terminal.end() == 0
        assert home.token("kiro")["profile_arn"] == fake.arn

    def interrupted(*steps: tuple[str, str]) -> None:
        home = make("idc")
        kiro_of(home).device_states.extend(["authorization_pending"] * 50)
        terminal = home.terminal("auth", "kiro")
        for question, text in steps[:-1]:
            terminal.answer(question, text)
        terminal.expect(steps[-1][0])
        terminal.press(b"\x03")
        assert terminal.end(10) == 130
        assert not home.file("kiro").exists()

    menu, url = ("Choice", "4"), ("start URL:", "https://d-example000.awsapps.com/start")
    at_once(
        builder, organisation,
        lambda: interrupted(menu),
        lambda: interrupted(menu, url),
        lambda: interrupted(menu, url, ("Region", "eu-west-1"), ("Waiting for you", "")),
        lambda: interrupted(("Choice", "2"), ("paste it here", "")),
    )  # fmt: skip


def kiro_through_a_proxy(make: Make) -> None:
    """Every host by its real name, through a CONNECT proxy."""
    home = make("builder_id")
    fake = kiro_of(home)
    home.config_file.write_text(f'[network]\nproxy = "{fake.proxy_url}"\nca_file = "{CA_FILE}"\n')
    done = home.run("auth", "kiro", "--method", "builder-id")
    assert (done.status, done.out) == (0, KIRO_SIGNED_IN), done
    assert "oidc.us-east-1.amazonaws.com:443" in fake.connects


def test_what_is_answered_to_a_poll(make: Make) -> None:
    """Each state has a person of its own: they mostly wait, and do so side by side."""
    at_once(
        *copilot_that_waits(make), *kiro_that_waits(make),
        lambda: copilot_by_a_form(make),
        lambda: kiro_through_a_proxy(make),
        lambda: without_standard_input(make, 0),
        lambda: without_standard_input(make, 1, "--token-stdin"),
        *copilot_that_ends(make), *kiro_that_ends(make),
    )  # fmt: skip


def test_a_kiro_api_key(make: Make) -> None:
    home = make("api_key")
    fake = kiro_of(home)
    key = fake.token_file()["access_token"]
    done = home.run("auth", "kiro", "--token-stdin", given=f"{key}\n")
    assert (done.status, done.out) == (0, KIRO_SIGNED_IN), done
    assert home.rows()["kiro"]["kind"] == "api_key"
    before = home.file("kiro").read_bytes()
    done = home.run("auth", "kiro", "--token-stdin", given="ksk_WRONG0000000000\n")
    assert (done.status, done.out) == (1, ""), done
    assert home.file("kiro").read_bytes() == before
    fake.usage_answers.append(poll_answer(503, HTML))
    done = home.run("auth", "kiro", "--token-stdin", given=f"{key}\n")
    assert done.status == 0
    assert "could not be checked" in done.out
    fake.violations.clear()  # a key that is not known, which brought a machine id of its own


# ---- Kiro's portal -------------------------------------------------------------------------------


def portal_of(terminal: Terminal) -> tuple[str, int]:
    """(the URL that is to be opened, the port that it comes back to)."""
    url = terminal.expect(r"Open    (https://app\.kiro\.dev/signin\?\S+)")[1]
    back = parse_qs(urlsplit(url).query)["redirect_uri"][0]
    terminal.expect("paste it here")
    return url, int(back.rpartition(":")[2])


def browse(
    url: str, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> tuple[int, str]:
    """What a browser gets at a URL of this machine."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(host, parts.port, timeout=10)
    with contextlib.closing(connection):
        headers = {"Host": parts.netloc, **headers}
        connection.request(method, f"{parts.path}?{parts.query}", headers=headers)
        answer = connection.getresponse()
        page = answer.read().decode()
        assert answer.getheader("cache-control") == "no-store"
        assert answer.getheader("referrer-policy") == "no-referrer"
        for value in parse_qs(parts.query).values():
            assert len(value[0]) < 8 or value[0] not in page
        return answer.status, page


@pytest.mark.parametrize("kind", ["google", "github"])
def test_kiro_by_the_portal_in_a_pipe(make: Make, kind: str) -> None:
    home = make(kind)
    fake = kiro_of(home)
    process = subprocess.Popen(
        home.command(["auth", "kiro", "--method", kind]), env=home.env, cwd=home.folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    url, said = "", ""
    while not url:
        line = process.stderr.readline()
        assert line, said
        said += line
        url = line.split()[1] if line.startswith("Open  ") else ""
    assert browse(fake.visit(url))[0] == 200
    out, err = process.communicate(timeout=SECONDS)
    home.said += out + said + err
    assert (process.returncode, out) == (0, KIRO_SIGNED_IN), err
    held = home.token("kiro")
    assert (held["auth_method"], held["profile_arn"]) == (kind, fake.arn)


def test_what_else_comes_to_the_portals_listener(make: Make) -> None:
    home = make("google")
    fake = kiro_of(home)
    terminal = home.terminal("auth", "kiro", "--method", "google")
    url, port = portal_of(terminal)
    assert terminal.shown.count("EXAMPLE") == 0
    good = fake.visit(url)
    state_ = parse_qs(urlsplit(url).query)["state"][0]
    hanging = socket.create_connection(("127.0.0.1", port))
    hanging.sendall(b"GET /oauth/callback?")
    refused = {
        good.replace(state_, "wrong" + state_[5:]): 400,
        good.replace("state=", "stat="): 400,
        good.replace("code=", "cod="): 400,
        good.replace("/oauth/callback", "/"): 404,
        good.replace("/oauth/callback", "/oauth/callback/"): 404,
        f"http://localhost:{port}/favicon.ico": 404,
    }
    for wrong, status in refused.items():
        assert browse(wrong)[0] == status, wrong
    assert browse(good, Host=f"evil.example:{port}")[0] == 421
    assert browse(good, Host="localhost:1")[0] == 421
    for method in ("POST", "HEAD", "OPTIONS"):
        assert browse(good, method)[0] in (404, 405)
    assert terminal.process.poll() is None
    assert not [seen for seen in fake.requests if seen.path == "/oauth/token"]
    addresses = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = re.findall(rf"\d: (\w+):{port:04X} \w+:\w+ 0A ", addresses)
    assert set(listening) <= {"0100007F", "0" * 24 + "01000000"}
    status, page = browse(good)
    assert (status, "<h1>" in page) == (200, True)
    terminal.expect(re.escape(KIRO_SIGNED_IN.strip()))
    assert terminal.end() == 0
    hanging.close()
    assert len([seen for seen in fake.requests if seen.path == "/oauth/token"]) == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)


def test_kiro_by_the_portal_on_a_terminal(make: Make) -> None:
    """The ports are the machine's: these go one after the other."""

    def signed_in(act: Callable[[FakeKiro, str, int, Terminal], None]) -> Home:
        home = make("google")
        fake = kiro_of(home)
        terminal = home.terminal("auth", "kiro", "--method", "google")
        url, port = portal_of(terminal)
        act(fake, url, port, terminal)
        terminal.expect(re.escape(KIRO_SIGNED_IN.strip()))
        assert terminal.end() == 0
        assert home.token("kiro")["profile_arn"] == fake.arn
        return home

    def paste_url(fake: FakeKiro, url: str, port: int, terminal: Terminal) -> None:
        good = fake.visit(url)
        state_ = parse_qs(urlsplit(url).query)["state"][0]
        terminal.type(good.replace(state_, "x" * len(state_)))
        terminal.expect("This does not fit: it does not belong to this sign-in")
        terminal.type("")
        terminal.expect("This does not fit")
        terminal.type(f"  {good}  ")

    def paste_code(fake: FakeKiro, url: str, port: int, terminal: Terminal) -> None:
        terminal.type(parse_qs(urlsplit(fake.visit(url)).query)["code"][0])

    def by_ipv6(fake: FakeKiro, url: str, port: int, terminal: Terminal) -> None:
        assert browse(fake.visit(url), host="::1")[0] == 200

    def second_port(fake: FakeKiro, url: str, port: int, terminal: Terminal) -> None:
        assert port != 3128
        assert browse(fake.visit(url))[0] == 200

    signed_in(paste_url)
    signed_in(paste_code)
    if has_ipv6():
        signed_in(by_ipv6)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # somebody else has it: as well
            stack.enter_context(socket.create_server(("127.0.0.1", 3128)))
        signed_in(second_port)


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_the_portal_tells_a_refusal(make: Make) -> None:
    home = make("google")
    fake = kiro_of(home)
    terminal = home.terminal("auth", "kiro", "--method", "google")
    url, port = portal_of(terminal)
    state_ = parse_qs(urlsplit(url).query)["state"][0]
    back = (
        f"http://localhost:{port}/oauth/callback?error=access_denied&error_description=You%20said"
    )
    assert browse(f"{back}%1b%5b31mno&state=nobodys")[0] == 400
    status, page = browse(f"{back}%1b%5b31mno&state={state_}")
    assert (status, "<h1>Not signed in</h1>" in page) == (200, True)
    assert terminal.end() == 1
    assert re.search(r"the sign-in page says: You said", terminal.shown)
    assert "\x1b[31m" not in terminal.shown
    # A code that Kiro does not take.
    terminal = home.terminal("auth", "kiro", "--method", "google")
    portal_of(terminal)
    terminal.type("EXAMPLEwrongcode")
    terminal.expect("Kiro refuses the sign-in: Invalid code or redirect_uri")
    assert terminal.end() == 1
    fake.violations.clear()
    assert not home.file("kiro").exists()


# ---- sign-ins of other programs ------------------------------------------------------------------


def plugin_file(home: Home, name: str, content: Json) -> Path:
    """A file of the editors' Copilot plugins."""
    folder = home.folder / "config" / "github-copilot"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def plugin_login(user: str, token: str, app: str = "Iv1.b507a08c87ecfe98") -> Json:
    """An entry of it."""
    return {"user": user, "oauth_token": token, "githubAppId": app}


def test_import_of_an_editors_sign_in(make: Make) -> None:
    home = make("copilot")
    token = copilot_of(home).github_token
    # The imitation's host stands for GitHub's.
    apps = plugin_file(home, "apps.json", {
        "127.0.0.1:Iv1.b507a08c87ecfe98": plugin_login("octocat", token),
        "broken": {"user": 1}, "empty": {"oauth_token": ""}, "list": [],
    })  # fmt: skip
    plugin_file(home, "hosts.json", {"127.0.0.1": plugin_login("octocat", token)})
    before = apps.read_bytes()
    done = home.run("auth", "import")
    assert (done.status, done.out) == (1, ""), done  # nobody can be asked
    assert "this needs a terminal to ask" in done.err
    assert not home.file().exists()
    terminal = home.terminal("auth", "import")
    terminal.expect(r"Found on this machine:\s+copilot: octocat at 127\.0\.0\.1 \(.*apps\.json\)")
    question = r"Use octocat at 127.0.0.1 .* as provider 'copilot'\? \[Y/n\]"
    terminal.answer(question, "perhaps")
    terminal.answer(rf"Please answer y or n\.\s+{question}", "n")
    terminal.expect("Nothing was changed")
    assert terminal.end() == 0
    assert terminal.shown.count("apps.json") + terminal.shown.count("hosts.json") == 1
    assert not home.file().exists()
    done = home.run("auth", "import", "--yes")
    assert (done.status, done.out) == (0, SIGNED_IN), done
    # An older sign-in is not replaced unless somebody says so.
    kept = home.file().read_bytes()
    done = home.run("auth", "import", "--yes")
    assert "is signed in already" in done.said
    assert home.file().read_bytes() == kept
    terminal = home.terminal("auth", "import")
    terminal.answer(r"instead of its present sign-in\? \[y/N\]", "")
    assert terminal.end() == 0
    assert home.file().read_bytes() == kept
    terminal = home.terminal("auth", "import")
    terminal.expect(r"\[y/N\]")
    terminal.press(b"\x03")
    assert terminal.end(10) == 130
    assert home.file().read_bytes() == kept
    done = home.run("auth", "import", "--yes", "--name", "copilot")
    assert (done.status, done.out) == (0, SIGNED_IN), done
    assert apps.read_bytes() == before


def test_import_of_several_users_and_hosts(make: Make) -> None:
    home = make("copilot")
    token = copilot_of(home).github_token
    plugin_file(home, "apps.json", {
        "127.0.0.1:Iv1.b507a08c87ecfe98": plugin_login("revoked", "ghu_EXAMPLEofnobody"),
        "127.0.0.1:Iv1.other": plugin_login("octocat", token),
        "127.0.0.1:Ov1.third": plugin_login("third", "ghu_EXAMPLEofsomebodyelse"),
    })  # fmt: skip
    done = home.run("auth", "import", "--yes")
    assert (done.status, done.out) == (0, SIGNED_IN), done
    assert "revoked at 127.0.0.1" in done.err
    assert "GitHub no longer accepts the token" in done.err
    assert home.token()["github_token"] == token
    home.fakes[0].violations.clear()  # the token of nobody


OTHER_STORES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    # name: (program, path in the home, content, environment)
    "copilot-api": ("copilot-api", ".local/share/copilot-api/github_token", "TOKEN\n", {}),
    "copilot-api on macOS": (
        "copilot-api", "Library/Application Support/copilot-api/github_token", "TOKEN", {},
    ),
    "litellm": ("LiteLLM", ".config/litellm/github_copilot/access-token", "TOKEN", {}),
    "litellm elsewhere": (
        "LiteLLM", "tokens/mine", "TOKEN",
        {"GITHUB_COPILOT_TOKEN_DIR": "HOME/tokens", "GITHUB_COPILOT_ACCESS_TOKEN_FILE": "mine"},
    ),
    "opencode": (
        "opencode", ".local/share/opencode/auth.json",
        '{"anthropic": {}, "github-copilot": {"type": "oauth", "refresh": "TOKEN", "access": "x"}}',
        {},
    ),
    "opencode elsewhere": (
        "opencode", "data/opencode/auth.json",
        '{"github-copilot": {"type": "oauth", "refresh": "TOKEN", "expires": 0}}',
        {"XDG_DATA_HOME": "HOME/data"},
    ),
    "opencode for a company": (
        "opencode", ".local/share/opencode/auth.json",
        '{"github-copilot-enterprise": {"refresh": "TOKEN", "enterpriseUrl": "http://Acme.ghe.com"}}',
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_STORES)
def test_import_from_other_gateways(make: Make, case: str) -> None:
    home = make("copilot")
    program, name, content, env = OTHER_STORES[case]
    home.env |= {key: value.replace("HOME", str(home.path)) for key, value in env.items()}
    path = home.path / name
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("TOKEN", copilot_of(home).github_token))
    # It is GitHub's own, so that its provider cannot be the imitation: no net, no harm.
    home.config_file.write_text(f'[network]\nproxy = "http://{closed_port()}"\n')
    done = home.run("auth", "import", "--yes")
    assert done.status == 0, done
    host, target = "github.com", "copilot"
    if "company" in case:
        host, target = "acme.ghe.com", "copilot-acme"
    assert f"  copilot: an account at {host} ({program}, {path})\n" in done.said
    assert home.token(target)["github_token"] == copilot_of(home).github_token
    path.write_text("")
    done = home.run("auth", "import", "--yes")
    assert done.status == 1
    assert f"  {program}: {path}: " in done.err


def test_import_asks_gh_only_when_told_to(make: Make, tmp_path: Path) -> None:
    home = make("copilot", direct=True, github_token="gho_EXAMPLE00000000000000000000000000")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "gh"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/token\n')
    script.chmod(0o700)
    (folder / "token").write_text(copilot_of(home).github_token + "\n")
    home.env["PATH"] = f"{folder}:{home.env['PATH']}"
    done = home.run("auth", "import", "--yes")
    assert (done.status, done.out) == (1, ""), done
    assert "no sign-in of another program was found" in done.err
    assert not (folder / "asked").exists()
    # It is GitHub's own, so that its provider cannot be the imitation: no net, no harm.
    home.config_file.write_text(f'[network]\nproxy = "http://{closed_port()}"\n')
    done = home.run("auth", "import", "--yes", "--from", "gh")
    assert done.status == 0, done
    assert "could not be checked now" in done.out
    assert home.token()["github_token"] == copilot_of(home).github_token
    assert (folder / "asked").read_text() == "auth token\n"
    (folder / "token").write_text("")
    done = home.run("auth", "import", "--yes", "--from", "gh")
    assert (done.status, done.out) == (1, ""), done


# ---- the first start -----------------------------------------------------------------------------


def test_a_first_start_offers_to_sign_in(make: Make) -> None:
    start = ("start", "--foreground", "--port", "0")

    def stop(terminal: Terminal) -> None:
        terminal.expect(r"listening on http://127\.0\.0\.1:\d+")
        terminal.expect("curl")
        terminal.press(b"\x03")
        assert terminal.end() in (0, 130)

    def signs_in() -> None:
        home = make("copilot")
        terminal = home.terminal(*start)
        terminal.expect("There is no account yet")
        terminal.answer(r"sign in to GitHub Copilot[^$]*Choice", "copilot")
        terminal.expect("and type    ABCD-1234")
        terminal.expect("Signed in to Copilot as octocat")
        stop(terminal)
        assert re.search("provider copilot: .*ready", terminal.shown)
        assert home.token()["login"] == "octocat"
        terminal = home.terminal(*start)
        stop(terminal)
        assert "There is no account" not in terminal.shown

    def imports() -> None:
        home = make("copilot")
        token = copilot_of(home).github_token
        plugin_file(home, "apps.json", {"127.0.0.1:Iv1": plugin_login("octocat", token)})
        terminal = home.terminal(*start)
        terminal.answer(
            r"use what is on this machine: copilot of an editor's plugin[^$]*Choice", ""
        )
        terminal.answer("as provider 'copilot'", "y")
        terminal.expect("Signed in to Copilot as octocat")
        stop(terminal)

    def later() -> None:
        home = make("copilot")
        terminal = home.terminal(*start)
        terminal.answer("Choice", "later")
        stop(terminal)
        assert "auth copilot" in terminal.shown

    def interrupted() -> None:
        home = make("copilot")
        terminal = home.terminal(*start)
        terminal.expect("Choice")
        terminal.press(b"\x03")
        assert terminal.end(10) == 130

    def piped() -> None:
        home = make("copilot")
        with gateway_in(home) as gateway:
            assert ask(gateway, "echo")[0] == 200
            assert re.search("provider copilot: not signed in: .*auth copilot", gateway.stdout())

    at_once(signs_in, imports, later, interrupted, piped)


def test_nothing_secret_is_in_the_process_list(make: Make) -> None:
    home = make("copilot")
    fake = copilot_of(home)
    pause = threading.Event()
    fake.exchange_answers.append(Answer(502, {}, [b"", b"x"], pause=pause))
    process = subprocess.Popen(
        home.command(["auth", "copilot", "--token-stdin"]), env=home.env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(fake.github_token.encode())
    process.stdin.close()
    process.stdin = None
    assert fake.wait_until(lambda: fake.exchanges == 1, SECONDS)
    for name in ("cmdline", "environ"):
        seen = Path(f"/proc/{process.pid}/{name}").read_bytes()
        assert fake.github_token.encode() not in seen
    pause.set()
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
