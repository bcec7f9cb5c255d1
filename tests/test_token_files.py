"""Token files: who can read them, who waits for whom, and what a running gateway makes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from fake_kiro import FakeKiro
from fakes import Answer, FakeCopilot, dump
from machine import wait_until
from support import Gateway
from test_sign_in import (
    SECONDS,
    SIGNED_IN,
    TOKEN_MARKS,
    Home,
    Json,
    Make,
    ask,
    at_once,
    config_for,
    copilot_of,
    gateway_in,
    kiro_of,
    make,
)

import aiclient_api as gw

__all__ = ["make"]

GPT = "copilot/gpt-4.1"
SONNET = "kiro/claude-sonnet-4.5"


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


def put(home: Home, name: str, content: Json | bytes, mode: int = 0o600) -> Path:
    """Writes a token file as another process does."""
    path = home.file(name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    beside = path.with_name("other.json")
    beside.touch(mode=mode)
    beside.write_bytes(content if isinstance(content, bytes) else dump(content))
    beside.replace(path)
    return path


def token_of(fake: FakeCopilot | FakeKiro, **more: Any) -> Json:
    """A matching token file."""
    if isinstance(fake, FakeKiro):
        return fake.token_file(**more)
    return {"type": "copilot", "github_token": fake.github_token, **more}


def sign_in(home: Home) -> None:
    """A new sign-in to Copilot."""
    done = home.run("auth", "copilot", "--token-stdin", given=copilot_of(home).github_token)
    assert (done.status, done.out) == (0, SIGNED_IN), done


# ---- files ---------------------------------------------------------------------------------------


def test_only_the_owner_can_read_them_whatever_the_umask(make: Make) -> None:
    home = make("copilot")
    fake = copilot_of(home)
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for path in home.config_folder.rglob("copilot/*"):
                try:
                    seen.add(stat.S_IMODE(path.lstat().st_mode))
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    line = " ".join(home.command(["auth", "copilot", "--token-stdin"]))
    try:
        done = subprocess.run(
            f"umask 000; {line}", shell=True, env=home.env, capture_output=True,
            input=fake.github_token.encode(), check=False, timeout=SECONDS,
        )  # fmt: skip
    finally:
        stop.set()
        watcher.join()
    assert done.returncode == 0, done
    assert seen == {0o600}
    assert mode_of(home.file().parent) == 0o700
    # One that others could read is closed to them when it is used.
    os.chmod(home.file(), 0o644)
    os.chmod(home.file().parent, 0o755)
    assert "token_file_was_readable" in home.run("auth", "list").err
    assert mode_of(home.file()) == 0o600


def test_a_link_is_neither_read_nor_written_through(make: Make) -> None:
    home = make("copilot")
    target = home.folder / "precious"
    target.write_text(json.dumps(token_of(copilot_of(home))))
    home.file().parent.mkdir(mode=0o700)
    home.file().symlink_to(target)
    before = target.read_bytes()
    health = home.rows()["copilot"]["health"]
    assert "symbolic link" in health
    with gateway_in(home) as gateway:
        status, words = ask(gateway, GPT)
        assert (status, "symbolic link" in words) == (503, True), words
        assert "auth copilot" in words
        assert home.file().is_symlink()
        sign_in(home)
        assert not home.file().is_symlink()
        assert mode_of(home.file()) == 0o600
        assert ask(gateway, GPT)[0] == 200
    assert target.read_bytes() == before


def test_what_is_no_plain_file_of_ours_is_not_read(make: Make) -> None:
    def fifo(home: Home) -> str:
        os.mkfifo(home.file(), 0o600)
        return "not a plain file"

    def folder(home: Home) -> str:
        home.file().mkdir(mode=0o700)
        return "not a plain file"

    def foreign(home: Home) -> str:
        put(home, "copilot", token_of(copilot_of(home)))
        os.chown(home.file(), 12345, 12345)
        return "another user"

    def check(prepare: Callable[[Home], str]) -> None:
        home = make("copilot")
        home.file().parent.mkdir(mode=0o700)
        words = prepare(home)
        health = home.rows()["copilot"]["health"]
        assert health.startswith("unusable: "), health
        with gateway_in(home) as gateway:
            status, said = ask(gateway, GPT)
            assert status == 503
            assert str(home.file()) in said
        assert home.fakes[0].requests == []
        if words == "another user":
            os.chown(home.file(), 0, 0)

    jobs = [fifo, folder] + [foreign] * (os.getuid() == 0)
    at_once(*[lambda job=job: check(job) for job in jobs])


def test_only_a_plain_file_or_a_link_is_replaced(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "token.json"
    precious.write_text("kept")
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match="not a plain file"):
        gw.replace_file(str(path), b"new")
    assert path.is_fifo() and sorted(os.listdir(tmp_path)) == ["precious", "token.json"]
    path.unlink()
    path.symlink_to(precious)
    gw.replace_file(str(path), b"new")
    assert (path.read_bytes(), path.is_symlink(), precious.read_text()) == (b"new", False, "kept")


def test_a_sign_in_that_others_could_have_written_is_refused_and_kept(make: Make) -> None:
    home = make("copilot")
    path = put(home, "copilot", token_of(copilot_of(home)), mode=0o666)
    path.chmod(0o666)
    before = path.read_bytes()
    assert f"chmod go-w {path}" in home.rows()["copilot"]["health"]
    with gateway_in(home) as gateway:
        status, said = ask(gateway, GPT)
        assert (status, "other users can write to" in said) == (503, True), said
        path.chmod(0o600)
        path.parent.chmod(0o770)
        assert f"chmod go-w {path.parent}" in ask(gateway, GPT)[1]
        assert path.read_bytes() == before and home.fakes[0].requests == []
        path.parent.chmod(0o700)
        assert ask(gateway, GPT)[0] == 200


def test_a_new_token_waits_for_a_file_that_can_be_trusted_again(tmp_path: Path) -> None:
    """It must neither be lost nor take the place of all else that the file holds."""
    path = tmp_path / "token.json"
    path.write_bytes(dump({"client_id": "kept", "refresh_token": "old"}))
    path.chmod(0o666)
    file = gw.TokenFile(str(path))
    file.save({"refresh_token": "new"})
    assert json.loads(path.read_bytes())["refresh_token"] == "old"
    path.chmod(0o600)
    file.save({})
    assert json.loads(path.read_bytes()) == {"client_id": "kept", "refresh_token": "new"}


def test_a_folder_of_somebody_else_is_refused(make: Make) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    home = make("copilot")
    folder = home.file().parent
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    done = home.run("auth", "copilot", "--token-stdin", given=copilot_of(home).github_token)
    assert (done.status, done.out) == (1, ""), done
    assert "belongs to another user" in done.err
    assert list(folder.iterdir()) == []
    assert home.fakes[0].requests == []


def test_a_damaged_file_is_kept_aside(make: Make) -> None:
    home = make("copilot")
    for damaged in (b'{"github_token": "ghu_EX', b"", b"\xff\xfe", b"[]"):
        put(home, "copilot", damaged)
        assert "is damaged" in home.rows()["copilot"]["health"]
    put(home, "copilot", damaged := b'{"github_token": "ghu_EX')
    with gateway_in(home) as gateway:
        for _ in range(3):
            status, words = ask(gateway, GPT)
            assert (status, "is damaged" in words) == (503, True), words
            assert "auth copilot" in words
        assert home.file().read_bytes() == damaged
        sign_in(home)
        assert ask(gateway, GPT)[0] == 200
    [aside] = home.file().parent.glob("token.json.damaged-*")
    assert aside.read_bytes() == damaged
    done = home.run("auth", "revoke", "copilot")
    assert done.status == 0
    assert not home.file().parent.exists()


def test_killed_at_any_moment_leaves_the_old_or_the_new(make: Make) -> None:
    home = make("copilot")
    sign_in(home)
    fake = copilot_of(home)
    command = home.command(["auth", "copilot", "--token-stdin"])

    def kill_after(delay: float) -> None:
        before = home.file().read_bytes()
        asked = len(fake.requests)
        process = subprocess.Popen(
            command, env=home.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(fake.github_token.encode())
        process.stdin.close()
        process.stdin = None
        enough = asked + 3  # then it writes
        fake.wait_until(lambda: len(fake.requests) >= enough, SECONDS)
        time.sleep(delay)
        process.kill()
        process.communicate()
        after = home.file().read_bytes()
        assert json.loads(after)["github_token"] == fake.github_token
        assert after == before or json.loads(after)["login"] == "octocat"
        assert mode_of(home.file()) == 0o600

    for delay in (0.0, 0.001, 0.002, 0.004, 0.01):
        kill_after(delay)
    sign_in(home)  # the dead hold no lock
    for path in home.litter():
        assert mode_of(Path(path)) == 0o600
    home.run("auth", "revoke", "copilot")
    assert home.litter() == []


# ---- a disk without room -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; skips where none can be had."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(make: Make, small_disk: Path) -> None:
    home = make("google")
    fake = kiro_of(home)
    folder = small_disk / "aiclient-api"
    home.config_folder.rename(home.folder / "old")
    folder.mkdir(mode=0o700)
    home.config_folder.symlink_to(folder)
    home.config_file.write_text(config_for(home.fakes))
    put(home, "kiro", fake.token_file(expires_at=int(time.time()) - 10))
    fill(small_disk)
    before = home.file("kiro").read_bytes()
    done = home.run("auth", "kiro", "--method", "google")
    assert (done.status, done.out) == (1, ""), done
    assert "cannot be written: No space left on device" in done.err
    assert fake.requests == []
    with gateway_in(home) as gateway:
        assert ask(gateway, SONNET)[0] == 200
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1
        assert home.file("kiro").read_bytes() == before
        assert "token_not_saved" in gateway.log()
        (small_disk / "fill").unlink()
        # The next attempt comes with a request, SAVE_RETRY_SECONDS later: the end has to do.
    held = home.token("kiro")
    assert held["refresh_token"] in fake.secrets
    assert home.file("kiro").read_bytes() != before, "the token was lost at the end"


def fill(folder: Path) -> None:
    """Leaves not a byte."""
    with open(folder / "fill", "wb", buffering=0) as file:
        while True:
            try:
                if not file.write(bytes(4096)):
                    return
            except OSError:
                return


# ---- files that cannot be replaced ---------------------------------------------------------------


@pytest.fixture(params=["a mount", "a read-only folder"])
def pinned(make: Make, request: pytest.FixtureRequest) -> Iterator[Home]:
    """Somebody whose configuration and Kiro sign-in are mounted as single files."""
    home = make("google")
    folder, outside = home.config_folder, home.folder / "outside"
    outside.mkdir(mode=0o700)
    (outside / "config.toml").write_text(config_for(home.fakes))
    put(home, "kiro", b"")
    (outside / "token.json").touch(mode=0o600)
    files = [(home.config_file, "config.toml"), (home.file("kiro"), "token.json")]
    mounts = [["--bind", str(outside / name), str(path)] for path, name in files]
    if request.param == "a read-only folder":
        mounts.insert(0, ["-o", "bind,ro", str(folder), str(folder)])
    with ExitStack() as stack:
        for mount in mounts:
            try:
                subprocess.run(["mount", *mount], check=True, capture_output=True)
            except (OSError, subprocess.SubprocessError):
                pytest.skip("nothing can be mounted here")
            stack.callback(subprocess.run, ["umount", mount[-1]], check=True)
        yield home


def test_a_file_that_cannot_be_replaced_is_written_in_place(pinned: Home) -> None:
    home, fake = pinned, kiro_of(pinned)
    assert home.rows()["kiro"]["health"] == "not signed in"  # empty, as Docker wants it
    done = home.run("config", "set", "logging.level", "debug")
    assert done.status == 0, done
    assert 'level = "debug"' in (home.folder / "outside" / "config.toml").read_text()
    home.file("kiro").write_text(json.dumps(token_of(fake, expires_at=int(time.time()) - 10)))
    before = home.token("kiro")["refresh_token"]
    with gateway_in(home) as gateway:
        assert gateway.log().count("file_written_in_place") == 2
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1
        assert home.token("kiro")["refresh_token"] != before
        assert home.file("kiro").read_bytes().count(b"\n") == 1
    with gateway_in(home) as gateway:  # as after a restart of the container
        fake.expire_tokens()
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 2
        done = home.run("auth", "revoke", "kiro")
        assert done.status == 0, done
        assert ask(gateway, SONNET)[0] == 503
    assert home.file("kiro").read_bytes() == b""
    assert home.rows()["kiro"]["health"] == "not signed in"


def test_two_containers_share_a_file_that_is_mounted_alone(pinned: Home) -> None:
    home, fake = pinned, kiro_of(pinned)
    home.file("kiro").write_text(json.dumps(token_of(fake, expires_at=int(time.time()) - 10)))
    states = [str(home.folder / name) for name in ("state1", "state2")]
    with ExitStack() as stack:
        pair = [stack.enter_context(gateway_in(home, XDG_STATE_HOME=state)) for state in states]
        with ThreadPoolExecutor(2) as pool:
            statuses = list(pool.map(lambda gateway: ask(gateway, SONNET)[0], pair))
    assert statuses == [200, 200]
    assert fake.refreshes == 1


def test_a_torn_write_in_place_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    old, new = {"refresh_token": "o" * 40}, {"refresh_token": "n" * 60}
    for first, second in ((old, new), (new, old)):
        before, after = (json.dumps(value).encode() + b"\n" for value in (first, second))
        at = max(len(before), len(after))
        long = before.ljust(at, b"\0") + b"\n" + after
        torn = [long[:cut] for cut in range(len(before), len(long))]
        assert all(gw.read_private_object(data) == first for data in torn[:-1])
        torn = [after[:cut] + long[cut:] for cut in range(len(after) + 1)]
        assert all(gw.read_private_object(data) == second for data in torn)
        # What is really written, by a process that is stopped after so many bytes:
        path = tmp_path / "token.json"
        code = (
            "import resource, sys, aiclient_api as gw\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
            "gw.write_in_place(sys.argv[1], sys.stdin.buffer.read())"
        )
        for limit in (len(before) + 1, at + len(after) // 2, len(long)):
            path.write_bytes(before)
            path.chmod(0o600)
            command = [sys.executable, "-c", code, str(path), str(limit)]
            done = subprocess.run(
                command, input=after, capture_output=True, check=False, cwd=Path(gw.__file__).parent
            )
            is_whole = limit == len(long)
            assert (done.returncode == 0) == is_whole, done.stderr
            assert gw.read_private_object(path.read_bytes()) == (second if is_whole else first)
        assert path.read_bytes() == after


# ---- between processes ---------------------------------------------------------------------------


def expired(fake: FakeCopilot | FakeKiro) -> Json:
    """A token file whose access token is of no use any more."""
    return token_of(fake, expires_at=int(time.time()) - 10)


@pytest.mark.parametrize("kind", ["copilot", "google", "builder_id"])
def test_two_gateways_refresh_once_between_them(make: Make, kind: str) -> None:
    home = make(kind)
    fake = home.fakes[0]
    model = GPT if isinstance(fake, FakeCopilot) else SONNET
    put(home, model.partition("/")[0], expired(fake))
    with ExitStack() as stack:
        states = [f"{home.folder}/state{number}" for number in range(2)]
        pair = [stack.enter_context(gateway_in(home, XDG_STATE_HOME=state)) for state in states]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda gateway: ask(gateway, model), pair * 4))
        assert [status for status, _ in answers] == [200] * 8, answers
        count = fake.exchanges if isinstance(fake, FakeCopilot) else fake.refreshes
        assert count == 1


@pytest.mark.parametrize("kind", ["copilot", "google"])
def test_a_dead_sign_in_is_not_tried_again(make: Make, kind: str) -> None:
    home = make(kind)
    fake = home.fakes[0]
    name = "copilot" if isinstance(fake, FakeCopilot) else "kiro"
    model = GPT if name == "copilot" else SONNET
    put(home, name, expired(fake))
    if isinstance(fake, FakeCopilot):
        bad = Answer(401, {}, dump({"message": "Bad credentials"}), chunked=False)
        fake.exchange_answers.extend([bad] * 100)
    else:
        fake.revoke()

    def tries() -> int:
        return fake.exchanges if isinstance(fake, FakeCopilot) else fake.refreshes

    with ExitStack() as stack:
        one = stack.enter_context(gateway_in(home))
        for _ in range(6):
            status, words = ask(one, model)
            assert (status, f"auth {name}" in words) == (503, True), words
            # What changes nothing in the sign-in is no reason to try again.
            os.utime(home.file(name))
        assert tries() == 1
        assert home.rows()[name]["health"].startswith("needs sign-in: ")
        two = stack.enter_context(gateway_in(home, XDG_STATE_HOME=f"{home.folder}/state2"))
        for _ in range(4):
            for gateway in (one, two):
                assert ask(gateway, model)[0] == 503
        assert tries() <= 2
        if isinstance(fake, FakeCopilot):
            fake.exchange_answers.clear()
            fake.github_token = fake.github_token.replace("0", "1")
            sign_in(home)
        else:
            put(home, name, fake.token_file())
        assert home.rows()[name]["health"] == "ok"
        for gateway in (one, two):
            assert ask(gateway, model)[0] == 200


def test_another_sign_in_is_used_by_the_next_request(make: Make) -> None:
    home = make("copilot")
    fake = copilot_of(home)
    with gateway_in(home) as gateway:
        status, words = ask(gateway, GPT)
        assert (status, "auth copilot" in words) == (503, True), words
        sign_in(home)
        assert ask(gateway, GPT)[0] == 200
        before = models_of(gateway)
        # Another account, which has other models.
        fake.github_token = "ghu_EXAMPLE1111111111111111111111111111"
        fake.expire_tokens()
        [gpt] = [model for model in fake.model_list if model.get("id") == "gpt-4.1"]
        fake.model_list = [{**gpt, "id": "gpt-4.1-b"}]
        sign_in(home)
        assert ask(gateway, "copilot/gpt-4.1-b")[0] == 200
        assert models_of(gateway) == {"gpt-4.1-b", "auto"} != before
        used = fake.exchanges
        assert ask(gateway, "copilot/gpt-4.1-b")[0] == 200
        assert fake.exchanges == used
        done = home.run("auth", "revoke", "copilot")
        assert done.status == 0, done
        status, words = ask(gateway, "copilot/gpt-4.1-b")
        assert (status, "auth copilot" in words) == (503, True), words
        assert fake.exchanges == used
        assert not home.file().exists()


def models_of(gateway: Gateway) -> set[str]:
    """Copilot's models."""
    rows = gateway.request("GET", "/v1/models").json()["data"]
    return {row["id"].rpartition("/")[2] for row in rows if row["provider"] == "copilot"}


def test_revoke_and_list(make: Make) -> None:
    home = make("copilot", "google")
    sign_in(home)
    put(home, "kiro", kiro_of(home).token_file())
    note = home.file().with_name("note.txt")
    note.touch(mode=0o600)
    table = home.terminal("auth", "list")
    assert table.end() == 0
    lines = table.shown.splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "KIND", "USER", "PLAN", "EXPIRES", "HEALTH"]
    assert any(re_row(line, "copilot", "octocat", "individual_pro", "ok") for line in lines)
    assert any(re_row(line, "kiro", "google", "ok") for line in lines)
    said = home.run("auth", "list").out + table.shown
    assert not [mark for mark in TOKEN_MARKS if mark in said]
    for wrong in ("copilto", "..", "../copilot", "", "work"):
        done = home.run("auth", "revoke", wrong)
        assert (done.status, done.out) == (2, ""), done
    assert "did you mean copilot?" in home.run("auth", "revoke", "copilto").err
    assert home.file().exists()
    done = home.run("auth", "revoke", "copilot")
    assert done.status == 0, done
    assert "https://github.com/settings" in done.out
    assert sorted(os.listdir(note.parent)) == ["note.txt"]
    assert home.file("kiro").exists()
    again = home.run("auth", "revoke", "copilot")
    assert again.status != 0
    assert "did you mean copilot" not in again.err, again
    assert home.rows()["copilot"]["health"] == "not signed in"


def re_row(line: str, *cells: str) -> bool:
    """Whether a line of the table holds these cells, in this order."""
    found = iter(line.split())
    return all(cell in found for cell in cells)


# ---- shared with other programs ------------------------------------------------------------------


def ide_file(home: Home, fake: FakeKiro, **more: Any) -> Path:
    """The Kiro IDE's sign-in on this machine."""
    token = fake.token_file()
    folder = home.path / ".aws" / "sso" / "cache"
    folder.mkdir(parents=True)
    body: Json = {"accessToken": token["access_token"], "refreshToken": token["refresh_token"],
                  "expiresAt": iso(time.time() - 60), "unknownKey": {"kept": [1, 2]}}  # fmt: skip
    if fake.kind in ("google", "github"):
        body |= {"profileArn": token["profile_arn"], "authMethod": "social",
                 "provider": fake.kind.capitalize()}  # fmt: skip
    else:
        name = "e909a0580879b06ece1202964fbe9dda95ea4ce3"
        kind = "BuilderId" if fake.kind == "builder_id" else "Enterprise"
        body |= {"clientIdHash": name, "authMethod": "IdC", "provider": kind,
                 "region": fake.sso_region}  # fmt: skip
        client = {"clientId": token["client_id"], "clientSecret": token["client_secret"],
                  "expiresAt": "2099-10-30T12:00:00.000"}  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(client))
    path = folder / "kiro-auth-token.json"
    path.write_text(json.dumps({**body, **more}))
    path.chmod(0o600)
    return path


def iso(seconds: float) -> str:
    """A time as the IDE writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def take(home: Home, *more: str) -> str:
    """Imports without being asked: what was said of it."""
    done = home.run("auth", "import", "--yes", *more)
    assert done.status == 0, done
    return done.said


@pytest.mark.parametrize("kind", ["google", "builder_id", "idc"])
def test_an_ide_and_the_gateway_live_on_one_sign_in(make: Make, kind: str) -> None:
    home = make(kind)
    fake = kiro_of(home)
    path = ide_file(home, fake)
    before = json.loads(path.read_text())
    if kind == "idc":
        profile = home.folder / "config" / "Kiro" / "User" / "globalStorage" / "kiro.kiroagent"
        profile.mkdir(parents=True)
        (profile / "profile.json").write_text(json.dumps({"arn": fake.arn, "name": "x"}))
    said = take(home)
    assert "the Kiro IDE" in said
    assert str(path) in said
    assert fake.refreshes == 1  # it had expired
    held = home.token("kiro")
    assert held["auth_method"] == kind
    written = json.loads(path.read_text())
    assert written["refreshToken"] == held["refresh_token"] != before["refreshToken"]
    assert written["unknownKey"] == {"kept": [1, 2]}
    assert set(written) - set(before) <= {"profileArn"}
    assert written["expiresAt"].endswith("Z")
    assert mode_of(path) == 0o600
    with gateway_in(home) as gateway:
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1
        # The IDE refreshes: what we hold is dead, and its file says how to go on.
        new = fake.refreshed_elsewhere()
        fake.expire_tokens()
        newer = {**written, "refreshToken": new["refresh_token"],
                 "accessToken": fake.token_file()["access_token"],
                 "expiresAt": iso(time.time() + 3600)}  # fmt: skip
        path.write_text(json.dumps(newer))
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1, "the IDE's token was there to be taken"
        assert json.loads(path.read_text()) == newer
        # It cannot be written: the gateway goes on by itself, and says so.
        fake.expire_tokens()
        path.unlink()
        path.symlink_to("/proc/version")
        assert ask(gateway, SONNET)[0] == 200
        path.unlink()
    assert home.token("kiro")["refresh_token"] != new["refresh_token"]


def database(home: Home, fake: FakeKiro, program: str = "kiro-cli", wal: bool = False) -> Path:
    """The sign-in of one of Kiro's command lines."""
    path = home.path / ".local" / "share" / program / "data.sqlite3"
    path.parent.mkdir(parents=True)
    token = fake.token_file()
    body = {"access_token": token["access_token"], "refresh_token": token["refresh_token"],
            "expires_at": iso(time.time() - 60).replace(".000Z", ".123456789Z"),
            "region": fake.sso_region, "unknown_key": 1}  # fmt: skip
    rows: dict[str, Json] = {}
    if fake.kind in ("google", "github"):
        body |= {"profile_arn": token["profile_arn"], "provider": fake.kind}
        rows["kirocli:social:token"] = body
    else:
        name = "kirocli" if program == "kiro-cli" else "codewhisperer"
        body |= {"start_url": fake.start_url, "oauth_flow": "DeviceCode", "scopes": ["a"]}
        rows[f"{name}:odic:token"] = body
        rows[f"{name}:odic:device-registration"] = {
            "client_id": token["client_id"], "client_secret": token["client_secret"],
            "client_secret_expires_at": "2099-10-30T12:00:00.123Z", "region": fake.sso_region,
        }  # fmt: skip
    with closing(sqlite3.connect(path)) as base:
        if wal:
            base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE auth_kv (key TEXT PRIMARY KEY, value TEXT)")
        base.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT)")
        for key, value in rows.items():
            base.execute("INSERT INTO auth_kv VALUES (?, ?)", (key, json.dumps(value)))
        profile = json.dumps({"arn": fake.arn, "profile_name": "x"})
        base.execute("INSERT INTO state VALUES ('api.codewhisperer.profile', ?)", (profile,))
        base.commit()
    path.chmod(0o600)
    return path


def row_of(path: Path) -> Json:
    """The sign-in in such a database."""
    with closing(sqlite3.connect(path)) as base:
        query = "SELECT value FROM auth_kv WHERE key LIKE '%:token'"
        found: Json = json.loads(base.execute(query).fetchone()[0])
        return found


@pytest.mark.parametrize(
    ("kind", "program", "wal"),
    [("builder_id", "kiro-cli", True), ("google", "kiro-cli", False), ("idc", "amazon-q", False)],
)
def test_a_command_line_and_the_gateway_live_on_one_sign_in(
    make: Make, kind: str, program: str, wal: bool
) -> None:
    home = make(kind)
    fake = kiro_of(home)
    path = database(home, fake, program, wal)
    before = row_of(path)
    with closing(sqlite3.connect(path)) as living:  # the program that owns it is running
        living.execute("SELECT count(*) FROM auth_kv").fetchall()
        take(home)
        held = home.token("kiro")
        assert held["auth_method"] == kind
        written = row_of(path)
        assert written["refresh_token"] == held["refresh_token"] != before["refresh_token"]
        assert written["unknown_key"] == 1
        assert set(written) == set(before)
    with gateway_in(home) as gateway:
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1
        new = fake.refreshed_elsewhere()
        fake.expire_tokens()
        newer = {**written, "refresh_token": new["refresh_token"],
                 "access_token": fake.token_file()["access_token"],
                 "expires_at": iso(time.time() + 3600)}  # fmt: skip
        with closing(sqlite3.connect(path)) as base:
            base.execute("UPDATE auth_kv SET value = ? WHERE key LIKE '%:token'",
                         (json.dumps(newer),))  # fmt: skip
            base.commit()
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 1
        assert row_of(path) == newer
        path.unlink()
        fake.expire_tokens()
        assert ask(gateway, SONNET)[0] == 200
        assert fake.refreshes == 2


@pytest.mark.parametrize("dead_is_newer", [False, True])
def test_the_living_one_of_several_sign_ins_is_found(make: Make, dead_is_newer: bool) -> None:
    home = make("builder_id")
    path = database(home, kiro_of(home))
    dead = {"access_token": "aoaEXAMPLE", "refresh_token": "aorEXAMPLEofnobody",
            "provider": "google",
            "expires_at": iso(time.time() + (-30 if dead_is_newer else -90))}  # fmt: skip
    rows = {"kirocli:social:token": dead, "kirocli:oidc:token": {"access_token": "aoaEXAMPLE"}}
    with closing(sqlite3.connect(path)) as base:
        for key, value in rows.items():
            base.execute("INSERT INTO auth_kv VALUES (?, ?)", (key, json.dumps(value)))
        base.commit()
    said = take(home)
    assert home.token("kiro")["auth_method"] == "builder_id"
    assert home.token("kiro")["source"]["key"] == "kirocli:odic:token"
    assert (said.index("google (kiro") < said.index("AWS Builder ID (kiro")) == dead_is_newer
    assert f"{path}: kirocli:oidc:token: it has no refresh token" in said
    assert bool(kiro_of(home).violations) == dead_is_newer, "a dead one was tried for nothing"
    kiro_of(home).violations.clear()


def remove_registration(path: Path) -> None:
    with closing(sqlite3.connect(path)) as base:
        base.execute("DELETE FROM auth_kv WHERE key LIKE '%:device-registration'")
        base.commit()


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda path: path.write_bytes(b"SQLite format 3\0torn"), "file is not a database"),
    "empty": (lambda path: path.write_bytes(b""), "no such table"),
    "fifo": (replace_by_fifo, "it is not a plain file"),
    "no registration": (remove_registration, "it has no client_id and client_secret"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_sign_in_that_cannot_be_used_is_named_with_the_reason(make: Make, case: str) -> None:
    home = make("builder_id")
    path = database(home, kiro_of(home))
    ide = ide_file(home, kiro_of(home))
    ide.write_bytes(ide.read_bytes()[:-9])
    prepare, reason = UNUSABLE[case]
    prepare(path)
    done = home.run("auth", "import", "--yes")
    assert (done.status, done.out) == (1, ""), done
    lines = done.err.splitlines()
    assert any(line.startswith(f"  kiro-cli: {path}: ") and reason in line for line in lines), done
    assert f"  the Kiro IDE: {ide}: it is not a JSON object" in lines
    assert "  opencode: there is nothing" in lines


def test_locked_databases_do_not_delay_an_import(make: Make) -> None:
    home = make("builder_id")
    paths = [database(home, kiro_of(home), program) for program in ("kiro-cli", "amazon-q")]
    with ExitStack() as stack:
        for path in paths:
            base = stack.enter_context(closing(sqlite3.connect(path)))
            base.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        done = home.run("auth", "import", "--yes")
        assert time.monotonic() - began < 5
    assert done.status == 1
    assert all(f"{path}: database is locked" in done.err for path in paths)


def test_an_idle_database_is_read_from_a_read_only_mount(make: Make) -> None:
    home = make("builder_id")
    path = database(home, kiro_of(home), wal=True)
    mount = ["mount", "-o", "bind,ro", str(path.parent), str(path.parent)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("nothing can be mounted here")
    try:
        said = take(home)
    finally:
        subprocess.run(["umount", str(path.parent)], check=True)
    assert "shared_login_not_updated" in said
    assert home.token("kiro")["auth_method"] == "builder_id"


def test_a_sign_in_of_another_user_is_named_with_the_reason(tmp_path: Path) -> None:
    python = shutil.which("python3", path=os.defpath) or ""
    new_enough = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if os.getuid() or not python or subprocess.run(new_enough, check=False).returncode:
        pytest.skip("this needs root, and a Python for everybody")
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        os.chown(folder, 54321, 54321)
        shutil.copy(gw.program_file(), folder)
        cache = Path(folder, ".aws", "sso", "cache")
        cache.mkdir(parents=True)
        (cache / "kiro-auth-token.json").touch(mode=0o600)
        done = subprocess.run(
            [python, "aiclient_api.py", "auth", "import", "--yes"],
            env={"PATH": os.defpath, "HOME": folder}, user=54321, group=54321, cwd=folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"  the Kiro IDE: {cache}/kiro-auth-token.json: Permission denied\n" in done.stderr


def test_a_refresh_outlives_its_caller_and_the_stop(make: Make) -> None:
    """The service has spent the old token when its answer comes: it must still be kept."""
    home = make("builder_id")
    fake = kiro_of(home)
    put(home, "kiro", token_of(fake, expires_at=0))
    answered = threading.Event()
    new = {"accessToken": "aoaEXAMPLEnew", "refreshToken": "aorEXAMPLEnew" * 9, "expiresIn": 3600}
    fake.refresh_answers.append(Answer(200, {}, [b"", dump(new)], pause=answered))
    with gateway_in(home) as gateway:
        caller = gateway.wire()
        body = {"model": SONNET, "messages": [{"role": "user", "content": "hi"}]}
        caller.send(gateway.request_bytes("POST", "/v1/chat/completions", body))
        assert fake.wait_until(lambda: fake.refreshes == 1, SECONDS)
        caller.sock.close()
        gateway.terminate()
        deadline = time.monotonic() + SECONDS
        while "stopping" not in gateway.log():
            assert time.monotonic() < deadline, gateway.log()
            time.sleep(0.01)
        answered.set()
        assert gateway.wait() == 0
    assert home.token("kiro")["refresh_token"] == new["refreshToken"]
    fake.violations.clear()  # of tokens that it did not issue itself


def pass_time(seconds: float) -> None:
    """Gives a fault the time to show."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until)


@pytest.mark.parametrize("more", ['kiro_version = "9"\n', "[network]\nconnect_seconds = 9\n"])
def test_a_refresh_outlives_the_reload_that_replaces_its_provider(make: Make, more: str) -> None:
    home = make("builder_id")
    fake = kiro_of(home)
    put(home, "kiro", token_of(fake, expires_at=0))
    answered = threading.Event()
    new = {"accessToken": "aoaEXAMPLEnew", "refreshToken": "aorEXAMPLEnew" * 9, "expiresIn": 3600}
    fake.refresh_answers.append(Answer(200, {}, [b"", dump(new)], pause=answered))
    with gateway_in(home) as gateway:
        client = gateway.wire()
        body = {"model": SONNET, "messages": [{"role": "user", "content": "hi"}]}
        client.send(gateway.request_bytes("POST", "/v1/chat/completions", body))
        assert fake.wait_until(lambda: fake.refreshes == 1, SECONDS)
        client.abort()
        home.config_file.write_text(home.config_file.read_text() + more)
        os.kill(gateway.pid, signal.SIGHUP)
        wait_until(lambda: "configuration_reloaded" in gateway.log())
        pass_time(4 * gw.TICK_SECONDS)  # what nobody uses any more is closed
        gateway.terminate()
        wait_until(lambda: "stopping" in gateway.log())
        pass_time(gw.REFRESH_DRAIN_SECONDS / 3)
        answered.set()
        assert gateway.wait() == 0
    assert home.token("kiro")["refresh_token"] == new["refreshToken"]
    fake.violations.clear()  # of tokens that it did not issue itself


def test_a_byte_order_mark_before_a_sign_in_is_skipped(make: Make) -> None:
    home = make("copilot")
    with gateway_in(home) as gateway:
        sign_in(home)
        put(home, "copilot", b"\xef\xbb\xbf" + home.file().read_bytes())
        assert ask(gateway, GPT)[0] == 200
