#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""aiclient-api: a local gateway: GitHub Copilot and Kiro as the OpenAI and the Anthropic API.

One file, Python 3.11 or newer, standard library only.  Start it with

    python3 aiclient_api.py start

and point an OpenAI client at http://127.0.0.1:9090/v1 or an Anthropic client at
http://127.0.0.1:9090.  See README.md for the rest.

Map
---
    1  Numbers          every limit, timeout, margin and default, with its reason
    2  Errors           one tree; each API error has a status, a kind and a hint
    3  Small tools      typed JSON fields, compact JSON, redaction
    4  Configuration    TOML tables as dataclasses; editing the file in place, comments kept
    5  HTTP wire        message heads and body framing: bytes in, values out
    6  Stream framing   server-sent events; the Amazon event stream
    7  Conversation     requests, events, usage, stop strings, token estimate
    8  Dialects         the contract; chat; messages; responses; Kiro; translating one response
    9  Upstream rules   the quirks and limits of Copilot and Kiro: the pure half of the providers
   10  Accounting       model names, rate limit; usage, limits, metrics, cache misses
   ==  the I/O line: no socket, file, clock, randomness or await above it
   11  Ticker           the log, one coarse clock for every deadline, connections
   12  HTTP client      connection pool, TLS, proxies, streamed bodies
   13  HTTP server      accept, keep-alive, slow-client limits, drain
   14  State on disk    XDG paths, config file, token files, the usage database
   15  Providers        the contract; Echo; Copilot; Kiro
   16  Sign-in          device codes, the browser's redirect, import; the terminal dialogue
   17  Gateway          the status page; one request from start to end; the endpoint table
   18  Daemon           the lock, the port, fork, signals, reload, restart without downtime
   19  Control channel  a Unix socket, framed JSON, a table of methods
   20  Command line     a table of verbs, serve() where every object is created, main

One request
-----------
    HTTP server -> Gateway.handle -> endpoint table -> Gateway.converse -> Router
    -> dialect.read_request -> upstream dialect.write_request -> provider.open -> HTTP client;
    then upstream bytes -> StreamTranslator.feed (relay, or reader -> events -> writer) -> client.

Glossary
--------
    client        the program that talks to this gateway
    upstream      the service this gateway talks to
    dialect       one wire format: "chat" (OpenAI chat completions), "messages" (Anthropic
                  messages), "responses" (OpenAI responses), "kiro" (upstream only)
    Conversation  a request in the form that all dialects are read into and written from
    event         one step of a response, in the form between all dialects
    frame         one event of a stream in its dialect, as decoded JSON
    endpoint      of Kiro: a host, a request style and a profile
    native        the upstream speaks the client's dialect: frames are relayed, not converted

Hosts contacted
---------------
    https://github.com, or the configured github_url: device-code sign-in
    https://api.github.com, or the configured github_api_url: token exchange, account, quota
    the host named by the token response, under githubcopilot.com or ghe.com: models, completions
    https://runtime.REGION.kiro.dev, or https://q.REGION.amazonaws.com, or
        https://codewhisperer.us-east-1.amazonaws.com: Kiro's completions
    https://management.REGION.kiro.dev, or q.REGION: Kiro's models, profiles and quota
    https://oidc.REGION.amazonaws.com, or https://prod.us-east-1.auth.desktop.kiro.dev, or the
        token_endpoint of a company's sign-in: Kiro's sign-in and token refresh
    never contacted, only shown as links or compared with: https://app.kiro.dev, https://kiro.dev,
        https://docs.github.com, https://profile.aws.amazon.com, https://myaccount.google.com,
        https://view.awsapps.com, https://awsapps.com

Files read and written
----------------------
    $XDG_CONFIG_HOME/aiclient-api/config.toml            read; changed by `auth --name`
        and by the verbs config and provider
    $XDG_CONFIG_HOME/aiclient-api/<provider>/token.json  read, written (0600)
    $XDG_CONFIG_HOME/aiclient-api/<provider>/token.lock  held while a token is refreshed
    $XDG_STATE_HOME/aiclient-api/usage.db                read, written (0600), with -wal and -shm
    $XDG_STATE_HOME/aiclient-api/machine.json            read, written (0600): random ids
    $XDG_STATE_HOME/aiclient-api/daemon.pid, .sock, .log, .log.1, .log.2  (0600), of the daemon;
        if its path would be too long, the socket is in $XDG_RUNTIME_DIR or the temporary folder
    $XDG_CONFIG_HOME/systemd/user/aiclient-api.service, or on macOS
        ~/Library/LaunchAgents/aiclient-api.plist        written by `service install` only
    by `auth import` only: the places of IMPORTS, like ~/.config/github-copilot, ~/.aws/sso/cache
        and kiro-cli's database; an imported Kiro sign-in is refreshed at its source as well
    by `doctor` only: the settings of known clients, CLIENTS
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):
    raise SystemExit(
        f"aiclient-api needs Python 3.11 or newer; this is Python {sys.version.split()[0]}."
    )

# Python looks in the script's folder first, or with -m in the working directory: a token.py or
# json.py there must not replace the library's.  A program that imports this file keeps its path.
if not sys.flags.safe_path and (
    __name__ == "__main__" or os.path.basename(sys.argv[0]) == "aiclient-api"
):
    sys.path[:] = [folder for folder in sys.path[1:] if folder != sys.path[0]]

import contextlib
import copy
import errno
import functools
import gc
import importlib.util
import json
import marshal
import math
import re
import stat
import struct
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import KW_ONLY, Field, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import product, zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TextIO, TypeVar


def lazy_module(name: str) -> Any:
    """Imported on first use of an attribute; None if this system lacks it (fcntl on Windows)."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Slow imports (asyncio alone takes 70 ms) are loaded on first use, so that `--version` and the
# other small verbs never pay for them.  All lazy imports are here.
if TYPE_CHECKING:
    import argparse
    import asyncio
    import base64
    import concurrent.futures
    import csv
    import datetime as dt
    import difflib
    import email.utils
    import fcntl
    import getpass
    import hashlib
    import hmac
    import http
    import ipaddress
    import logging
    import plistlib
    import resource
    import select
    import shlex
    import shutil
    import signal
    import socket
    import socketserver
    import sqlite3
    import ssl
    import subprocess
    import tempfile
    import termios
    import threading
    import time
    import tomllib
    import urllib.parse
    import urllib.request
    from types import CodeType
else:
    import concurrent
    import email
    import urllib

    dt = lazy_module("datetime")
    logging = lazy_module("logging")
    concurrent.futures = lazy_module("concurrent.futures")
    email.utils = lazy_module("email.utils")
    urllib.parse = lazy_module("urllib.parse")
    urllib.request = lazy_module("urllib.request")
    for name in (
        "argparse", "asyncio", "base64", "csv", "difflib", "fcntl", "getpass", "hashlib", "hmac",
        "http", "ipaddress", "plistlib", "resource", "select", "shlex", "shutil", "signal",
        "socket", "socketserver", "sqlite3", "ssl", "subprocess", "tempfile", "termios",
        "threading", "time", "tomllib",
    ):  # fmt: skip
        globals()[name] = lazy_module(name)


Result = TypeVar("Result")


def run_in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, with no module left lazy: until 3.13 that is not thread-safe (gh-114763)."""
    for module in (
        base64, concurrent.futures, difflib, dt, email.utils, fcntl, hashlib, hmac, http, ipaddress,
        logging, resource, select, shlex, shutil, signal, socket, socketserver, sqlite3, ssl,
        subprocess, tempfile, termios, threading, time, tomllib, urllib.parse, urllib.request,
    ):  # fmt: skip
        dir(module)
    return asyncio.run(work)


__version__ = "0.1.0"

Json = dict[str, Any]


# ---- 1. Numbers --------------------------------------------------------------------------------

KIB = 1024
MIB = 1024 * KIB

# HTTP heads.  h11 and uvicorn allow 16 KiB, nginx 32, waitress 256; agents send long headers.
MAX_HEAD_BYTES = 64 * KIB
MAX_REQUEST_LINE_BYTES = 16 * KIB  # RFC 9112 section 3: at least 8,000 octets
MAX_FIELDS = 128  # hyper and Envoy: 100
MAX_CHUNK_LINE_BYTES = 8 * KIB
MAX_TRAILER_BYTES = 8 * KIB
MAX_INFLATED_BYTES = 4 * MIB  # per read of 64 KiB: text compresses 10 to 50 times, bombs 1,000
# Anthropic's API takes 32 MB; text made only of escapes blocks all others for 9 ms per MiB.
MAX_BODY_MIB = 32
MAX_BODIES_BYTES = 256 * MIB  # of all requests in flight: eight of the largest, hundreds of typical
MAX_PORT = 65_535
# Brackets, commas and colons outside strings, counted before parsing, which blocks all streams:
# the most expensive body below this limit, 10,000 pairs of turns, takes 0.3 s to convert.
MAX_JSON_VALUES = 200_000
MAX_URL_ESCAPES = 100_000  # like %41, in a data URL: pictures and files come as base64
MAX_PACKED_VALUES = 100  # in what a client gives back of ours; it has 10
MAX_EMBEDDING_VALUES = 1_000_000  # numbers cost less; 256 texts of 3,072 dimensions are fewer
MAX_JSON_KEYS = 1000  # at the top level of a body; no API has 100
MAX_JSON_DEPTH = 100
MAX_LONE_SURROGATES = 10_000  # halves of characters in a body, each 0.2 us; cut emoji are a few
MAX_ERROR_TEXT = 4000  # characters of an error message
MAX_REFUSAL_TEXT = 2000  # characters kept of an upstream's message
MAX_CODE_TEXT = 100  # and of its code
MAX_LOG_LINE = 16_000  # characters; of a traceback, too
MAX_ERROR_BODY_BYTES = 64 * KIB  # of an upstream's error response; more is not read
ERROR_BODY_SECONDS = 5.0  # for all of it, as a byte now and then is no silence
MAX_COLLECTED_BYTES = 64 * MIB  # of an upstream's stream, for a caller that wants no stream
FIRST_PARSED_EVENTS = 2  # of a read, before its plain deltas are copied
MAX_FRAME_BYTES = 16 * MIB  # one event, as images come as one, or a non-streaming response
MAX_EVENT_LINES = 100_000  # of one server-sent event: those seen have two
MAX_EVENT_MESSAGE_BYTES = 25 * MIB  # AWS: payloads up to 24 MiB
MAX_EVENT_HEADERS_BYTES = 128 * KIB  # AWS; each of them becomes an object

STREAM_BUFFER_BYTES = 64 * KIB  # received and not yet taken; with more, reading pauses
RECV_BYTES = 64 * KIB  # below the 128 KiB from which malloc uses mmap
WRITE_HIGH_WATER_BYTES = 128 * KIB  # unsent to a slow client: reading from the upstream pauses
# New objects before Python looks for garbage in cycles.  With its default of 700, a thousand
# streams stop for 20 ms and more while they begin.
GARBAGE_OBJECTS = 10_000

LONG_STEP_SECONDS = 0.03  # after such a step, a request yields to the others for a moment
YIELD_SECONDS = 0.01
TICK_SECONDS = 0.25  # resolution of the clock that all deadlines are checked with
WRITE_STALL_SECONDS = 60.0  # a client that accepts no byte for this long is gone
LINGER_SECONDS = 1.0  # lingering close: an RST would discard our response, or spoil the pool
LISTEN_BACKLOG = 1024  # the system may cap it
PING_SECONDS = 15.0  # Codex and Claude Code give up on silence after minutes, proxies after 30-60 s
# The response head waits for the first upstream event, so that upstream errors become real status
# codes, but no longer than clients wait for a head: proxies give up at 60 s.
HOLD_STATUS_SECONDS = 25.0
HOLD_LIST_SECONDS = 50.0  # for all candidates of a request together

POOL_IDLE_SECONDS = 30.0  # below the 60 s at which common load balancers close
POOL_IDLE_PER_HOST = 32
RESET_SECONDS = 0.3  # a round trip around the world: the RST of a stale connection is here by then

# Upstream attempts (facts: VS Code, gh-aw-firewall; 2026-08).
MAX_ATTEMPTS = 3
MAX_WAIT_SECONDS = 10.0  # a longer Retry-After is left to the client
MAX_RETRY_AFTER_SECONDS = 60.0  # anthropic 2.x obeys any value, even days
MAX_COOLDOWN_SECONDS = 60.0  # then one request probes: the upstream's limit may have passed
MAX_COOLDOWNS = 100  # models per provider; clients may name models that no list has
FIRST_COOLDOWN_SECONDS = 4.0  # after a limit without a reset time; doubles while it still holds
BACKOFF_SECONDS = (0.5, 1.5)
OVERLOAD_BACKOFF_SECONDS = (2.0, 4.0)  # after a 429 or 503 that names no time
UNSUPPORTED_MODEL_WAITS = (1.0, 2.0)  # Copilot's catalogue flaps (seen in gh-aw-firewall, 2026-08)

COPILOT_REFRESH_MARGIN_SECONDS = 300.0  # VS Code refreshes when less than 5 minutes are left
COPILOT_REFRESH_MARGIN_SHARE = 0.2  # of a short-lived token's life, if that is less
COPILOT_DIRECT_SECONDS = 3600.0  # between account checks of a GitHub token used directly
COPILOT_REFRESH_EARLY_SECONDS = 60.0  # the background timer: refresh_in minus this
COPILOT_DEFAULT_LIFE_SECONDS = 1500.0
FORCED_RENEWAL_GAP_SECONDS = 60.0  # a persistent 403 must not cause a storm of exchanges
SHARED_WAIT_SECONDS = 2.0  # for each of two databases that another program has locked
SIGN_IN_RETRY_MAX_SECONDS = 300.0
SIGN_IN_RETRY_AFTER_SECONDS = 3600.0  # GitHub's own limits last an hour
EXCHANGE_SECONDS = 15.0
MODELS_SECONDS = 30.0
MODELS_FRESH_SECONDS = 900.0  # VS Code 10 min, opencode 1 h
MODELS_STALE_SECONDS = 24 * 3600.0  # an entitled model may be missing from one list
MODELS_RETRY_SECONDS = 60.0  # after a list that could not be had
MODELS_MISS_SECONDS = 30.0  # an unknown name may refresh the list, but not more often
AUTO_SECONDS = 5.0  # for Auto's choice of a model, as in VS Code
MAX_AUTO_CHOICES = 50  # conversations, as in VS Code
AUTO_PROMPT_CHARS = 32_768
AUTO_PEEK_BYTES = 4096  # of a response, searched for the name of its model
MAX_LISTED_MODELS = 1000  # of one provider, which lists 15 to 40
MAX_MODEL_HEADERS = 16  # that a catalogue adds to the requests for a model
MAX_HELD_FRAMES = 16  # of a stream, until a split character is complete
MAX_BLANK_RUN = 20  # line breaks and tabs in a row inside a call's arguments
MAX_TOOLS = 128  # VS Code cuts there
MAX_INLINED_BYTES = 2 * MIB  # that inlined `$ref`s may add to a request: 16 KiB a tool
INLINED_VALUE_BYTES = 16  # of them, for a value, besides its texts
MAX_CACHE_BREAKPOINTS = 4  # Anthropic and Copilot
MAX_CHAT_STOPS = 4  # OpenAI
MAX_CALL_ID_LENGTH = 40  # of chat completions, the least of all dialects
MAX_NATIVE_ID_LENGTH = 64  # of responses and messages
MAX_STOP_CHARACTERS = 8192  # of all together: each piece of a response may be searched for them
MAX_EMBEDDED = 256  # texts per request: Copilot takes 512, VS Code sends 256
EMBEDDINGS_SECONDS = 60.0
REASONING_MEMORY_ENTRIES = 500
# What was rejected is left out of later requests until then: the service may have changed.
REJECTION_SECONDS = 3600.0
MAX_BETAS = 32  # of one request; Claude Code sends 10
MAX_OPENING_CHARS = 64  # of a code fence before structured output, with its language
MAX_HELD_CHARS = 4 * KIB  # of white space and closing marks that may be the end of such output
MAX_REJECTIONS = 64  # per model and dialect, whatever odd clients add
MAX_REJECTION_SCOPES = 64  # pairs of model and dialect
MAX_REJECTION_STEPS = 12  # in a path; the deepest known has 9

# The cache guard.
CACHE_LIFE_SECONDS = 300.0  # Anthropic: 5 min since the last use; OpenAI: 5 to 10
MIN_CACHED_TOKENS = 1024  # no shorter prompt is cached (Anthropic, OpenAI; some models want more)
CACHE_SLACK_SHARE = 0.1  # of a cached prompt: less than this uncached is its end, not a miss
CACHE_QUIET_SECONDS = 600.0  # between equal log lines about one conversation
MAX_WATCHED = 200  # conversations
MAX_WATCHED_BLOCKS = 2000  # per prompt, 20 bytes each; later ones are not compared
MAX_CACHED_SCHEMAS = 256  # adapted schemas of tools
MAX_CACHED_SCHEMA_BYTES = 16 * KIB  # of one, packed
CACHE_INLINE_BYTES = 256 * KIB  # hashed inline in 0.5 ms; larger requests go to a thread
DEFAULT_MAX_TOKENS = 32_000  # if the client sends none and the catalogue has no limit
MIN_THINKING_BUDGET = 1024

KIRO_REFRESH_MARGIN_SECONDS = 300.0  # the vendor's CLI: 1 min; other clients: 2 to 10
KIRO_FORCED_GAP_SECONDS = 10.0  # between refreshes caused by rejected tokens
KIRO_TOKEN_SECONDS = 3600.0  # lifetime of every token seen
KIRO_REFRESH_SECONDS = 30.0
REFRESH_DRAIN_SECONDS = 3.0  # for a pending refresh at shutdown: losing it may lose the sign-in
KIRO_CONTROL_SECONDS = 30.0
KIRO_PEEK_BYTES = 256 * KIB  # of a response, searched for its first text
KIRO_MODEL_PAGES = 5  # of a list that never ends
KIRO_PROFILES = 10  # of an organisation, which are named where one must be chosen
MAX_TOKEN_SECONDS = 24 * 3600.0  # a token that says it lasts longer met a wrong clock

# Numbers from outside may be NaN, infinite or a thousand digits long.
MAX_FIGURE = 10**15  # tokens, nano-credits, quotas: below 2**53, so exact as a double
MAX_RESET_SECONDS = 31 * 86400.0  # a wait: plans reset monthly
MAX_UNIX_SECONDS = 1e10  # the year 2286; larger timestamps are in milliseconds
MAX_PERCENT_USED = 10_000.0  # a plan may be overdrawn; a limit near 0 would give a huge figure

# Quotas.  No known client polls them more often than every few minutes.
QUOTA_WARNING_PERCENTS = (80.0, 95.0)  # used; a warning at each of these and at 100
QUOTA_FIRST_POLL_SECONDS = 5.0  # from first use to first poll: a short response is billed by then
QUOTA_POLL_SECONDS = 600.0  # between polls while the provider is in use
QUOTA_RETRY_SECONDS = 300.0  # between polls caused by "out of credits"
MAX_ALLOWANCES = 32  # quotas kept from header fields; Copilot sends 5

# Signing in (RFC 8628, RFC 8252).
SIGN_IN_SECONDS = 30.0  # per request
DEVICE_LIFE_SECONDS = 600.0  # if the service names none
DEVICE_INTERVAL_SECONDS = 5.0  # RFC 8628 section 3.2
DEVICE_EXTRA_SECONDS = 1.0  # timers of virtual machines run early, and GitHub is strict
DEVICE_SLOWER_SECONDS = 5.0  # what slow_down adds: RFC 8628 section 3.5
CALLBACK_SECONDS = 300.0  # for the browser's redirect; the portal itself waits for 10 minutes
LOCK_SECONDS = 45.0  # another process's refresh takes KIRO_REFRESH_SECONDS at most
LOCK_POLL_SECONDS = 0.05
SAVE_RETRY_SECONDS = 30.0  # before a failed write of a token is retried
CLOCK_JUMP_SECONDS = 30.0  # wall clock against monotonic: beyond this the machine has slept

# The daemon.
START_SECONDS = 30.0  # until a new process listens; a cold, busy machine needs 5
HEALTH_SECONDS = 5.0  # for the first response of a gateway that reports it is listening
KILL_AFTER_SECONDS = 5.0  # after the drain; then a daemon that does not stop is killed
POLL_SECONDS = 0.05  # between checks of a lock or a file
LOCK_PROBE_SECONDS = 0.3  # probing the daemon's lock holds it for a moment
RETIRE_SECONDS = 5.0  # for one more request on a replaced process's connections
MAX_LOG_BYTES = 10 * MIB
LOG_FILES = 3  # the current one and two older
DESCRIPTOR_WARNING_SECONDS = 60.0  # between log lines about too many open files
MAX_DESCRIPTORS = 65_536  # open files and sockets
MAX_LOG_LINES = 10_000  # per query
DEFAULT_LOG_LINES = 50

# The control channel.
MAX_CONTROL_BYTES = MIB
CONTROL_SECONDS = 5.0  # to read or to write one frame
DOCTOR_SECONDS = 5.0  # for all checks at once; before it, a third for the gateway's status
MAX_SKEW_SECONDS = 120.0  # of this machine's clock; tokens are renewed minutes before their end
CONTROL_WORK_SECONDS = 90.0  # model lists and quotas are fetched from upstream
CONTROL_ACCEPT_SECONDS = 0.5  # before accepting again after too many open files
MAX_CONTROL_CLIENTS = 16
MAX_SOCKET_PATH_BYTES = 103  # macOS: 104 with the final NUL; Linux: 108

# Usage.
USAGE_WRITE_SECONDS = 0.4  # between writes: under a second with a tick and the write itself
USAGE_BUSY_SECONDS = 5.0  # that a write waits for another process's lock
USAGE_PRUNE_SECONDS = 3600.0
MAX_SINGLE_DAYS = 62  # single requests, 115 bytes each, then sums by day; caps look back a month
MAX_USAGE_DAYS = 800
MAX_USAGE_PAGES = 24_576  # of 4 KiB: 96 MiB, more than 800,000 requests
MAX_MEMORY_PAGES = 2048  # where no file can be: 8 MiB, 70,000 requests
MAX_PENDING_REQUESTS = 20_000  # held in memory while the database cannot be written, 30 MB
MAX_RECENT_REQUESTS = 1_000  # per query
# Distinct client-supplied names per day: nobody uses 200 user agents or 200 models.
MAX_LABELS = 200
MAX_MODELS = 200
MAX_NAME_CHARS = 200  # of a name that is counted, or of a session
MAX_USER_ID_CHARS = 2000  # of `metadata.user_id` where it is JSON; Claude Code's has 250
MAX_RUNAWAYS = 1_000  # requests that are remembered by their hash

# Pairs of provider and model; later ones share one series for good, as a series must not end.  A
# provider lists 15 to 40 models; each one used adds 40 lines to GET /metrics, which take 45 us.
MAX_METRIC_SERIES = 200

GITHUB_URL = "https://github.com"
KIRO_VERSION = "1.1.14"  # of the IDE, seen in 2026-09; older ones were never refused
# As of when the versions, hosts and models of the tables below were seen.
BUILT_IN_FACTS = {"copilot": "2026-11", "kiro": "2026-11", "kiro_version": "2026-09"}
MAX_FACTS_MONTHS = 6


# ---- 2. Errors ---------------------------------------------------------------------------------
#
# `str(error)` is always safe to show: it never holds a token, key, prompt or completion.


class ProgramError(Exception):
    """A command failed: `str()` is one line for the terminal, `log` further lines."""

    exit_status = 1

    def __init__(self, message: str, *log: str) -> None:
        super().__init__(message)
        self.log = log


class WrongUsage(ProgramError):
    exit_status = 2


class ConfigError(ProgramError):
    """`source: key: what is wrong`."""


class BadSetting(ConfigError):
    """The command line gave a wrong key or value."""

    exit_status = 2


class SignInFailed(ProgramError):
    """Sign-in failed; nothing was changed."""


class NotRunning(ProgramError):
    exit_status = 3


class NotResponding(ProgramError):
    """A process holds the lock, but is frozen."""


@dataclass(eq=False, repr=False)
class ApiError(Exception):
    """An error response to a client.

    `kind` names what happened (each dialect maps kinds to its vendor's error types), `hint` says
    what to do next, `param` is the path of the offending field, `retry_after` is in seconds,
    `retry` False tells the vendors' SDKs not to retry, `code` is OpenAI's, if the kind has several.
    """

    message: str
    _: KW_ONLY
    hint: str = ""
    param: str | None = None
    retry_after: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None

    status = 500
    kind = "internal"
    retry: ClassVar[bool | None] = None

    def __init_subclass__(
        cls, status: int | None = None, kind: str = "", retry: bool | None = None
    ) -> None:
        """A class with a status of its own is a kind of its own, named after it."""
        cls.status = status or cls.status
        cls.retry = cls.retry if retry is None else retry
        if status or kind:
            cls.kind = kind or re.sub(r"\B([A-Z])", r"_\1", cls.__name__).lower()

    def __str__(self) -> str:
        return self.message

    def text(self) -> str:
        return f"{self.message[:MAX_ERROR_TEXT]} {self.hint}".strip()

    def with_hint(self, hint: str, retry_after: float | None) -> ApiError:
        """A copy with another hint and retry_after: a cached error is raised many times."""
        error = copy.copy(self)
        error.hint, error.retry_after = hint, retry_after
        return error


class InvalidRequest(ApiError, status=400):
    """A field is missing, of the wrong type or out of range."""


class UnsupportedFeature(InvalidRequest):
    """A field requests something that this model or gateway could only ignore."""


class WrongDialect(InvalidRequest):
    """The model does not support the requested dialect, whatever the catalogue lists."""


class ContextTooLong(InvalidRequest, kind="context_too_long"):
    """The prompt does not fit; clients compact when they recognise their vendor's wording.

    The text is Anthropic's; `openai_text`, OpenAI's, which LiteLLM looks for as well.
    """

    def __init__(self, used: int | None = None, limit: int | None = None) -> None:
        self.is_counted = used is not None and limit is not None
        if self.is_counted:
            text = f"prompt is too long: {used} tokens > {limit} maximum"
            openai_text = f"is {limit} tokens. However, your messages resulted in {used} tokens. "
            openai_text += "Please reduce the length of the messages."
        else:
            text = "prompt is too long for the context window of this model"
            openai_text = "is exceeded by your messages. Please reduce their length."
        self.openai_text = f"This model's maximum context length {openai_text}"
        super().__init__(text)


# How the services say that the prompt is too long, with the counts and without (seen in 2026-11).
CONTEXT_COUNTS = (
    # Anthropic, also with the output that was asked for; Copilot; Gemini and Vertex
    r"prompt is too long: (?P<used>N) tokens > (?P<limit>N)",
    r"exceed context limit: (?P<used>N) \+ (?P<output>N) > (?P<limit>N)",
    r"token count (?:of )?\(?(?P<used>N)\)? exceeds the (?:limit|maximum)[a-z ]* \(?(?P<limit>N)",
    r"input token count is (?P<used>N) but (?:the )?model only supports up to (?P<limit>N)",
    # OpenAI, xAI, Moonshot
    r"(?:context length is|limit of) (?P<limit>N) tokens.{0,60}?(?:in|requested|about) (?P<used>N)",
    r"maximum prompt length is (?P<limit>N) but the request contains (?P<used>N)",
    r"token limit: (?P<limit>N) \(requested: (?P<used>N)",
    # Bedrock
    r"too many (?:total )?(?:input )?tokens: (?P<used>N) > (?P<limit>N)",
)
CONTEXT_PHRASES = re.compile(
    r"\b(?:context_length_exceeded|model_max_prompt_tokens_exceeded|CONTENT_LENGTH_EXCEEDS\w*"
    r"|ContentLengthExceeded\w*|PROMPT_TOO_LONG)\b"
    r"|(?i:\b(?:prompt|input) is too long|too large for model context window|input tokens exceeded"
    r"|(?:exceed(?:s|ed)?|longer than|larger than) (?:the |this |your )?(?:model(?:'s)? )?"
    r"(?:maximum )?(?:context (?:length|window|limit)|token limit)|maximum context length is"
    r"|context (?:length|window) (?:is |was )?exceeded|exceeds the maximum number of tokens)"
)


def read_context_error(text: str) -> ContextTooLong | None:
    """The error if a refusal says that the prompt is too long, with the counts that it names."""
    for pattern in CONTEXT_COUNTS:
        match = re.search(pattern.replace("N", r"[\d,]{1,15}"), text, re.IGNORECASE | re.DOTALL)
        if match:
            counts = {k: int(v.replace(",", "") or 0) for k, v in match.groupdict().items()}
            return ContextTooLong(counts["used"] + counts.get("output", 0), counts["limit"])
    return ContextTooLong() if CONTEXT_PHRASES.search(text) else None


class InvalidKey(ApiError, status=401, retry=False):
    """The gateway's own key; without `retry` False, Claude Code retries a 401 forever."""


class Forbidden(ApiError, status=403):
    """Refused by the gateway's host or origin check, or by the account's plan or policy."""


class ModelNotFound(ApiError, status=404): ...


class UnknownUrl(ApiError, status=404): ...


class NotStored(ApiError, status=404):
    """Stored responses and the like are not supported."""


class MethodNotAllowed(ApiError, status=405): ...


class RequestTimeout(ApiError, status=408): ...


class BodyTooLarge(ApiError, status=413): ...


class UnsupportedMediaType(ApiError, status=415): ...


class UnsupportedEncoding(ApiError, status=415): ...


class UpgradeRefused(ApiError, status=426): ...


class RateLimited(ApiError, status=429): ...


class QuotaExceeded(ApiError, status=429, retry=False):
    """The plan's quota is used up: retrying does not help."""


class LimitReached(ApiError, status=429, retry=False):
    """A limit configured in `[limits]`; nothing is sent upstream."""


class RequestRepeated(LimitReached):
    """Too many identical requests: no fallback to another provider either."""


class UpstreamError(ApiError, status=502): ...


class Unreachable(UpstreamError):
    """The connection failed before anything was sent: retrying is safe."""


class NotSignedIn(ApiError, status=503, retry=False):
    """No usable sign-in.  503, because clients retry a 401 (seen in 2026-10)."""


class NotEntitled(NotSignedIn):
    """The sign-in is valid, but the account may not use the service."""


class Overloaded(ApiError, status=503): ...


class Busy(ApiError, status=503, kind="overloaded"):
    """Not the upstream but this gateway is overloaded."""


class UpstreamTimeout(ApiError, status=504): ...


@dataclass(slots=True)
class RetryDecision:
    """What one refused attempt means: the error for the client, and what to try before that.

    `action` is "" (nothing helps), wait (back off), pause (as long as the upstream asks, or longer
    than a backoff), retry_once (back off, but only once), refresh (the token), relist (the models),
    reroute (to another dialect or host), reshape (as another client would send it), repair (the
    body, by what was rejected), forget (replayed reasoning), switch (the Authorization scheme),
    choose (Auto's model), cool_down.
    """

    error: ApiError
    action: str = ""
    wait_s: float | None = None
    account_wide: bool = False  #: all models of the account are affected
    resets_in: float | None = None  #: seconds to the expected recovery, if too long to wait
    rejections: list[tuple[str, str]] = field(default_factory=list)  #: for the action repair


class Fault(NamedTuple):
    """A kind of refusal, as a row of a table in which the first row that matches counts."""

    pattern: str  #: searched in "429 code: message"
    error: type[ApiError]
    text: str = ""  #: a template, see `classify`
    action: str = ""
    hint: str = ""
    param: str | None = None


class WireError(Exception):
    """A peer violated HTTP; `status` is a server's response to it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# ---- 3. Small tools ----------------------------------------------------------------------------

json_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON in key order: prompt caches depend on stable bytes.

    JavaScript clients split surrogate pairs; vendors refuse lone surrogates (seen in 2026-09), and
    a conversation that has one would be stuck.  Each becomes U+FFFD, or "?" if there are too many.
    """
    try:
        text = json_encoder.encode(value)
    except RecursionError:
        raise InvalidRequest("The request is nested too deeply.") from None
    try:
        return text.encode()
    except UnicodeEncodeError:
        replaced = text.encode("utf-8", "replace")
        if len(text.encode("utf-8", "surrogatepass")) - len(replaced) > 2 * MAX_LONE_SURROGATES:
            return replaced
        repaired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return repaired.encode()


def bounded_int(text: str) -> int:
    """For `json.loads`: thousands of digits would take quadratic time; floats have up to 309."""
    if len(text) > 310:
        raise ValueError("a number is too large")
    return int(text)


def finite_float(text: str) -> float:
    """For `json.loads`, which would accept NaN, and 1e999 as Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large or not a number")
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> Json:
    """For `json.loads`; raises KeyError for repeated keys: parsers disagree on which one counts."""
    obj = dict(pairs)
    if len(obj) < len(pairs):
        raise KeyError
    return obj


# Shared, as making one per call costs as much as parsing a small body.
number_parsers: Json = {
    "parse_constant": finite_float, "parse_float": finite_float, "parse_int": bounded_int,
}  # fmt: skip
json_decoder: Any = json.JSONDecoder(**number_parsers)
unique_decoder: Any = json.JSONDecoder(**number_parsers, object_pairs_hook=unique_pairs)
BOM = "\ufeff"  # editors on Windows put one before a text


def load_json(data: bytes | str) -> Any:
    """Strict JSON, also after a byte order mark (RFC 8259 section 8.1); raises ValueError."""
    text = data if isinstance(data, str) else data.decode()
    try:
        return json_decoder.decode(text.removeprefix(BOM))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


JSON_WHITESPACE = " \t\n\r"
JSON_SEPARATORS = b"[{,:"
# Matches at every quote, an unterminated string up to the end, so that the search is linear.
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
TOO_MANY_VALUES = f"The body holds more than {MAX_JSON_VALUES} values."
EMBEDDED_JSON = re.compile(r"\s*+[{\[]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def count_values(data: bytes, limit: int = MAX_JSON_VALUES) -> int:
    """How many of `[ { , :` JSON holds outside its strings, or more than `limit`.

    Every string but one follows a mark, so no more than that many strings need to be cut out.
    """
    outside = JSON_STRING.sub(b"", data, limit + 1)
    return len(outside) - len(outside.translate(None, JSON_SEPARATORS))


def has_too_many_values(data: bytes | str, limit: int = MAX_JSON_VALUES) -> bool:
    """Whether `count_values` is over `limit`, with less work for most JSON."""
    if len(data) <= limit:
        return False
    raw = data.encode("utf-8", "replace") if isinstance(data, str) else data
    marks = len(raw) - len(raw.translate(None, JSON_SEPARATORS))
    return marks > limit and count_values(raw, limit) > limit


def check_values(body: Json) -> None:
    """Limits the depth, and the values in strings that are parsed as JSON: arguments of calls."""
    level: list[Any] = [body]
    embedded: list[str] = []
    for _ in range(MAX_JSON_DEPTH):
        containers, level = level, []
        for container in containers:
            if isinstance(container, dict):
                if "arguments" in container or "input" in container:
                    texts = (container.get("arguments"), container.get("input"))
                    embedded += [t for t in texts if isinstance(t, str) and EMBEDDED_JSON.match(t)]
                container = container.values()
            for item in container:  # most are strings
                if not isinstance(item, str) and isinstance(item, (dict, list)):
                    level.append(item)
        if not level:
            break
    else:
        raise InvalidRequest(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")
    counts = (count_values(text.encode("utf-8", "replace")) for text in embedded)
    if sum(map(len, embedded)) > MAX_JSON_VALUES and sum(counts) > MAX_JSON_VALUES:
        raise BodyTooLarge(TOO_MANY_VALUES)


class ReceivedBody(dict[str, Any]):
    """A request's body and the text it was read from: what no rule changes goes up as it came.

    Prompt caches depend on stable bytes, and copying takes a fraction of the time of encoding.
    """

    text = ""
    #: (start, end) in `text`, by `id`: of members and of objects in lists that are members
    spans: Mapping[int, tuple[int, int]]

    def dump(self, body: Json) -> bytes:
        """As `dump_json`; members and items of `body` that equal this body's are copied."""
        if not body or not self.spans or SURROGATE_ESCAPE.search(self.text):
            return dump_json(body)
        pieces = [b"{"]
        for key, value in body.items():
            pieces += [dump_json(key), b":", self.dump_value(value, self.get(key)), b","]
        return b"".join([*pieces[:-1], b"}"])

    def dump_value(self, value: Any, own: Any) -> bytes:
        span = self.spans.get(id(own))
        if span is not None and type(value) is type(own) and value == own:  # True equals 1
            return self.text[slice(*span)].encode()
        if isinstance(value, list) and isinstance(own, list):
            pairs = zip_longest(value, own[: len(value)])
            return b"[%b]" % b",".join([self.dump_value(*pair) for pair in pairs])
        return dump_json(value)


def parse_members(text: str, start: int, decoder: Any) -> tuple[ReceivedBody, int]:
    """(body, its end) of the object in `text` whose first member is at `start`.

    The standard library's parsers in Python for this object and for lists that are its members,
    its scanner in C for all else.
    """
    spans: dict[int, tuple[int, int]] = {}

    def scan_item(text: str, start: int) -> tuple[Any, int]:
        value, end = decoder.scan_once(text, start)
        if isinstance(value, dict):
            spans[id(value)] = start, end
        return value, end

    def scan_member(text: str, start: int) -> tuple[Any, int]:
        if text.startswith("[", start):
            value, end = decoder.parse_array((text, start + 1), scan_item)
        else:
            value, end = decoder.scan_once(text, start)
        spans[id(value)] = start, end
        return value, end

    pairs, end = decoder.parse_object((text, start), True, scan_member, None, list)
    if len(pairs) > MAX_JSON_KEYS:
        raise InvalidRequest(f"The body has more than {MAX_JSON_KEYS} keys.")
    body = ReceivedBody(pairs)
    body.text, body.spans = text, spans if decoder is unique_decoder else {}
    if len(body) < len(pairs):
        raise InvalidRequest("The body has a duplicate key at its top level.")
    return body, end


def load_body(data: bytes) -> ReceivedBody:
    """A request's body, one JSON object; raises InvalidRequest and BodyTooLarge.

    A duplicate key at its top level is refused; a body with others is never copied.
    """
    if has_too_many_values(data):
        raise BodyTooLarge(TOO_MANY_VALUES)
    try:
        text = data.decode().removeprefix(BOM)
        start = len(text) - len(text.lstrip(JSON_WHITESPACE))
        if not text.startswith("{", start):
            load_json(text)
            raise InvalidRequest("The body must be a JSON object.")
        try:
            body, end = parse_members(text, start + 1, unique_decoder)
        except KeyError:
            body, end = parse_members(text, start + 1, json_decoder)
        if text[end:].strip(JSON_WHITESPACE):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not UTF-8.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {redact(str(error), 200)}.") from None
    if len(data) > MAX_JSON_VALUES or data.count(b"{") + data.count(b"[") > MAX_JSON_DEPTH:
        check_values(body)
    return body


def load_object(data: bytes | str, max_values: int = MAX_JSON_VALUES) -> Json | None:
    """The JSON object in untrusted `data`, or None, also if it has too many values."""
    if has_too_many_values(data, max_values):
        return None
    try:
        value = load_json(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def join_path(path: str, key: str | int) -> str:
    """`messages`, 3 -> `messages.3`, as in Anthropic's errors."""
    return f"{path}.{key}" if path else str(key)


def wrong_type(path: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: must be {expected}.", param=path)


def typed_field(
    obj: Json, key: str, path: str, kind: type[Result] | tuple[type[Result], ...], expected: str
) -> Result | None:
    """The value at `key`, None if absent or null; like all below raises InvalidRequest."""
    value: Result | None = obj.get(key)
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise wrong_type(join_path(path, key), expected)


def str_field(obj: Json, key: str, path: str = "") -> str | None:
    return typed_field(obj, key, path, str, "a string")


def word_field(obj: Json, key: str, choices: Iterable[str], path: str = "") -> str | None:
    value = str_field(obj, key, path)
    if value is None or value in choices:
        return value
    raise wrong_type(join_path(path, key), f"one of {', '.join(choices)}")


def int_field(obj: Json, key: str, path: str = "") -> int | None:
    """The integer at `key`; 2.0 counts as one."""
    value = typed_field(obj, key, path, (int, float), "an integer")
    if isinstance(value, float) and not value.is_integer():
        raise wrong_type(join_path(path, key), "an integer")
    return None if value is None else int(value)


def number_field(obj: Json, key: str, path: str = "") -> float | None:
    return typed_field(obj, key, path, (int, float), "a number")


def bool_field(obj: Json, key: str, path: str = "") -> bool | None:
    return typed_field(obj, key, path, bool, "true or false")


def list_field(obj: Json, key: str, path: str = "") -> list[Any]:
    return typed_field(obj, key, path, list, "a list") or []


def dict_field(obj: Json, key: str, path: str = "") -> Json:
    return typed_field(obj, key, path, dict, "an object") or {}


def need_dict(value: Any, path: str) -> Json:
    if isinstance(value, dict):
        return value
    raise wrong_type(path, "an object")


def need_str(obj: Json, key: str, path: str = "") -> str:
    value = obj.get(key)
    if isinstance(value, str):
        return value
    param = join_path(path, key)
    if value is not None:
        raise wrong_type(param, "a string")
    raise InvalidRequest(f"{param}: is required.", param=param)


def get_str(obj: Json, key: str) -> str:
    """The string at `key`, stripped; "" for any other type."""
    value = obj.get(key)
    return value.strip() if isinstance(value, str) else ""


# Controls a terminal or is invisible there: controls, bidi marks, line separators, Unicode's
# Default_Ignorable_Code_Point (DerivedCoreProperties); and lone surrogates, which UTF-8 lacks.
INVISIBLE_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def one_line(text: str) -> str:
    """Untrusted `text` on one line: white space becomes spaces, other UNSEEN is dropped."""
    if text.isascii() and text.isprintable():
        return text
    return INVISIBLE_CHARACTERS.sub(lambda match: " " if match[0].isspace() else "", text)


def get_name(obj: Json, key: str) -> str:
    """The name at `key`, truncated; "" for any other type."""
    return get_str(obj, key)[:MAX_NAME_CHARS]


def get_text(obj: Json, key: str) -> str:
    """The string at `key`, unstripped; "" for any other type."""
    value = obj.get(key)
    return value if isinstance(value, str) else ""


def short_hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:length]


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    by_lower = {item.lower(): item for item in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower, count, 0.5)
    return [by_lower[match] for match in matches]


def suggest(name: str, candidates: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    names = list(candidates)
    matches = [item for item in names if item.startswith(name)] or nearest(name, names, 1)
    return f"did you mean {matches[0]}?" if matches else f"there are: {', '.join(names)}"


# Each pattern matches a prefix of the secret, as the text may be truncated after it.
SECRET_PATTERNS = re.compile(
    r"gh[opsur]_[A-Za-z0-9_]{4,}|github_pat_\w{4,}|tid=[^\s\"']+"
    r"|(?i:bearer|token)\s+(?=[^\s\"']*[0-9_-]|[^\s\"']{20})[^\s\"']{8,}"
    r"|ao[ar][A-Za-z0-9_.:/+=-]{8,}|ksk_\w{4,}|eyJ[\w-]{4,}(?:\.[\w-]*){0,2}|sk-[\w-]{8,}"
)
# What could be a key or a token of some service: base64 or hexadecimal digits, and no path.
KEY_LIKE = re.compile(r"[0-9a-f]{32,}|(?![/.~])(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])[\w+/=~-]{32,}")
# In lower case: no pattern matches a text without one of these, and most log lines have none.
SECRET_HINTS = (
    "gh", "github_pat_", "tid=", "bearer", "token", "aoa", "aor", "ksk_", "eyj", "sk-",
)  # fmt: skip


def redact(text: str, limit: int) -> str:
    """The first `limit` characters with secrets masked, even one that the limit cuts."""
    text = text[: limit + 64]  # any pattern's shortest match is shorter
    lower = text.lower()
    if any(map(lower.__contains__, SECRET_HINTS)):
        text = SECRET_PATTERNS.sub("[secret]", text)
    return text[:limit]


def mask_arguments(text: str, arguments: Iterable[str]) -> str:
    """An error without those of the command line's words that look like a secret."""
    for word in arguments:
        value = re.sub(r"\A(?:--[\w-]+=|-\w)", "", word)
        if KEY_LIKE.fullmatch(value) or redact(word, len(word)) != word:
            text = text.replace(value, "[secret]")
    return redact(text, len(text))


def mask_secrets(text: str, known_secrets: Iterable[str]) -> str:
    """`text` without any of the `known_secrets`, even if only the beginning of one is left."""
    for secret in filter(None, known_secrets):
        prefix = secret[:12]
        index = text.find(prefix) if len(prefix) >= 6 else -1  # shorter ones occur in any text
        while index >= 0:
            size = next(n for n in range(len(secret), 0, -1) if text.startswith(secret[:n], index))
            text = f"{text[:index]}[secret]{text[index + size :]}"
            index = text.find(prefix, index + 1)
    return text


# ---- 4. Configuration --------------------------------------------------------------------------

LOG_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}  # those of `logging`
SETTING_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a string"),
    "int": (int, "an integer"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "list[str]": (list, "a list of strings"),
}
# These settings become part of a host name or a header.
AWS_REGION = re.compile(r"[a-z]{2}(?:-[a-z]+)+-[0-9]", re.ASCII)
KIRO_ARN = re.compile(
    r"arn:aws[a-z-]*:codewhisperer:([a-z0-9-]+):[0-9]{12}:profile/[\w-]+", re.ASCII
)
KIRO_VERSION_FORM = re.compile(r"[0-9A-Za-z.-]{1,40}")
HEADER_WORD = re.compile(r"[0-9A-Za-z._-]{0,60}")
PROVIDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
LABEL = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
MODEL_NAME = re.compile(r"(?!.*(?://|\.\.))[A-Za-z0-9][\w./:\[\]@+-]{0,199}", re.ASCII)
# RFC 3986 section 3.2 without userinfo and percent-encoding, which no real host has.
HOST_VALUE = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|[\w~!$&'()*+,;=-]+(?:\.[\w~!$&'()*+,;=-]+)*\.?)(?::([0-9]{0,5}))?",
    re.ASCII,
)
TARGET = re.compile(r"[!-~]+")
# A name or an address alone; two colons make it IPv6, whose zone may follow.
HOST = re.compile(r"[\w-]+(?:\.[\w-]+)*\.?|(?=[^:]{0,4}:[^:]{0,4}:)[0-9A-Fa-f:.]+(?:%[\w.-]+)?")
PROXY_FORM = "must be like http://[user:password@]host:port; SOCKS is not supported"
HOST_FORM = "a host name or an IP address, not a URL; the port goes into server.port"


def split_host(value: str) -> tuple[str, str] | None:
    """(host, port or "") of a Host field or a URL's authority; None if malformed."""
    match = HOST_VALUE.fullmatch(value)
    if match is None or int(match[2] or 0) > MAX_PORT:
        return None
    if match[1].startswith("["):
        try:
            ipaddress.IPv6Address(match[1][1:-1])
        except ValueError:
            return None
    return match[1], match[2] or ""


def is_loopback(host: str) -> bool:
    host = host.strip("[]").lower()
    if host in ("localhost", "localhost.localdomain", "ip6-localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # is_loopback handles it from 3.13 on
    return (mapped or address).is_loopback


def check_url(value: str) -> str:
    try:
        parts = urllib.parse.urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    is_valid = host and split_host(parts.netloc) and TARGET.fullmatch(value)
    if not is_valid or parts.query or parts.fragment:
        return "must be like https://host[:port]"
    if parts.scheme == "http" and not is_loopback(host or ""):
        return "plain http is accepted for loopback only; write https://"
    if parts.scheme not in ("http", "https"):
        return "must begin with https://"
    return ""


def proxy_url(value: str) -> str:
    """A proxy's URL as curl and Go read it, which do without http://; "" if it is malformed.

    A character that would have to be escaped in the password makes the rest look like a path.
    """
    value = value.strip()
    try:
        parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
    except ValueError:  # a bracket
        return ""
    is_valid = parts.scheme in ("http", "https") and not re.search(r"\s", value)
    has_rest = parts.path.strip("/") or parts.query or parts.fragment
    if not is_valid or has_rest or not split_host(parts.netloc.rpartition("@")[2]):
        return ""
    return f"{parts.scheme}://{parts.netloc}"


def check_proxy(value: str) -> str:
    """Never repeats the value: it may contain a password."""
    return PROXY_FORM if value and not ("://" in value and proxy_url(value)) else ""


Check = Callable[[Any], str]  # returns the problem with a value of the right type, or ""


def one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else "must be one of " + ", ".join(choices)


def between(low: float, high: float) -> Check:
    return lambda value: "" if low <= value <= high else f"must be between {low:g} and {high:g}"


def matching(pattern: re.Pattern[str], requirement: str) -> Check:
    return lambda value: "" if not value or pattern.fullmatch(value) else f"must be {requirement}"


def setting(default: Any, check: Check, *, is_secret: bool = False, normalize: Any = str) -> Any:
    """`normalize` turns what people write into what the check accepts."""
    metadata = {"check": check, "normalize": normalize}
    return field(default=default, repr=not is_secret, metadata=metadata)


def log_level(value: str) -> str:
    """In any case; `warn`, as many programs spell it, is `warning`."""
    return {"warn": "warning"}.get(value.lower(), value.lower())


def seconds(default: float) -> Any:
    return setting(default, between(0.05, 86400))


def url(default: str = "") -> Any:
    return setting(default, lambda value: check_url(value) if value else "")


def check_text(value: str) -> str:
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        return "must not contain control characters"
    return "must be valid UTF-8" if re.search("[\ud800-\udfff]", value) else ""


def check_api_key(value: Any) -> str:
    is_key = isinstance(value, str) and value.strip()
    return check_text(value) if is_key else "must be a key that is not empty"


def check_alias(value: Any) -> str:
    """alias = "provider/model", or a list of them, tried in order."""
    for name in value or [""] if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name) or name.endswith("/"):
            return 'must be like "copilot/gpt-4.1", or a list of such names'
    return ""


@dataclass(slots=True)
class ServerConfig:
    host: str = setting(
        "127.0.0.1", matching(HOST, HOST_FORM), normalize=lambda value: value.strip("[]")
    )
    port: int = setting(9090, between(0, MAX_PORT))
    #: between two requests of one client IP; 0 = off
    rate_limit_seconds: float = setting(0.0, between(0, 3600))
    allowed_hosts: list[str] = field(default_factory=list)
    cors_origins: list[str] = field(default_factory=list)
    max_body_mib: int = setting(MAX_BODY_MIB, between(1, 1024))
    max_connections: int = setting(1024, between(1, 65536))
    head_seconds: float = seconds(10.0)  #: from the first byte to the end of the head
    body_seconds: float = seconds(60.0)
    idle_seconds: float = seconds(75.0)  #: between requests on one connection
    drain_seconds: float = setting(30.0, between(0, 3600))


@dataclass(slots=True)
class NetworkConfig:
    #: "" = HTTPS_PROXY, NO_PROXY; may contain a password
    proxy: str = setting("", check_proxy, is_secret=True)
    ca_file: str = ""  #: an additional PEM bundle
    connect_seconds: float = seconds(10.0)
    first_byte_seconds: float = seconds(120.0)  #: until the upstream's response head
    stream_idle_seconds: float = seconds(300.0)  #: between two bytes of the stream


@dataclass(slots=True)
class CopilotConfig:
    type: str = "copilot"
    enabled: bool = True
    #: selects the host if the token response names none
    account_type: str = setting(
        "individual", one_of("individual", "business", "enterprise"), normalize=str.lower
    )
    github_url: str = url(GITHUB_URL)
    github_api_url: str = url("https://api.github.com")
    api_url: str = url()  #: "" = endpoints.api of the token response
    #: Copilot-Integration-Id; "" = the editor's, or for tokens for programs the Copilot CLI's
    integration_id: str = setting("", matching(HEADER_WORD, "a word like copilot-developer-cli"))
    #: of the model `auto`; "" = the service's default
    auto_tier: str = setting("", matching(HEADER_WORD, "a word like balance"))


@dataclass(slots=True)
class KiroConfig:
    type: str = "kiro"
    enabled: bool = True
    #: "" = the profile's, or the nearer one of us-east-1 and eu-central-1
    region: str = setting("", matching(AWS_REGION, "a region like us-east-1"))
    #: for an organisation with several; "" = the sign-in's
    profile_arn: str = setting(
        "", matching(KIRO_ARN, "like arn:aws:codewhisperer:REGION:ACCOUNT:profile/ID")
    )
    api_url: str = url()  #: data plane, the only host tried; control plane too unless that is set
    management_url: str = url()
    oidc_url: str = url()  #: instead of https://oidc.REGION.amazonaws.com
    auth_url: str = url()  #: instead of https://prod.us-east-1.auth.desktop.kiro.dev
    #: the IDE version sent in requests
    kiro_version: str = setting(KIRO_VERSION, matching(KIRO_VERSION_FORM, "a version like 1.1.14"))


@dataclass(slots=True)
class EchoConfig:
    type: str = "echo"
    enabled: bool = True


@dataclass(slots=True)
class LoggingConfig:
    level: str = setting("info", one_of(*LOG_LEVELS), normalize=log_level)


@dataclass(slots=True)
class CapConfig:
    """`[limits.providers.NAME]`, `[limits.labels.LABEL]`: 0 = no cap; local days and months."""

    daily_credits: float = setting(0.0, between(0, 1e9))
    monthly_credits: float = setting(0.0, between(0, 1e9))
    daily_tokens: int = setting(0, between(0, 1e15))
    monthly_tokens: int = setting(0, between(0, 1e15))


@dataclass(slots=True)
class LimitsConfig:
    """`[limits]`: a request over a limit gets a 429 and is not sent upstream."""

    #: identical requests allowed within `runaway_seconds`; 0 = off
    runaway_requests: int = setting(50, between(0, 1e6))
    runaway_seconds: float = seconds(300.0)
    providers: dict[str, CapConfig] = field(default_factory=dict)
    #: by name of a key in [api_keys], or user agent family as shown by `usage --by label`
    labels: dict[str, CapConfig] = field(default_factory=dict)


# Tables whose keys are names chosen by the user.
NAMED_TABLES = ("providers", "models", "api_keys", "limits.providers", "limits.labels")
ProviderConfig = CopilotConfig | KiroConfig | EchoConfig
PROVIDER_CONFIGS: dict[str, type[ProviderConfig]] = {
    "copilot": CopilotConfig,
    "kiro": KiroConfig,
    "echo": EchoConfig,
}


@dataclass(slots=True)
class Config:
    """The checked configuration.  `repr` shows no secret."""

    #: where the endpoint does not determine it
    default_format: str = setting("openai", one_of("openai", "anthropic"), normalize=str.lower)
    default_provider: str = "copilot"
    api_key: str = field(default="", repr=False)  #: "" = no key required
    api_keys: dict[str, str] = field(default_factory=dict, repr=False)  #: usage label -> key
    server: ServerConfig = field(default_factory=ServerConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    providers: dict[str, ProviderConfig] = field(
        default_factory=lambda: {name: default() for name, default in PROVIDER_CONFIGS.items()}
    )
    #: alias -> provider/model, or several, tried in order
    models: dict[str, str | list[str]] = field(default_factory=dict)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    #: dotted key -> origin of its value, unless it is the default; not a setting
    origins: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def needs_key(self) -> bool:
        return bool(self.api_key or self.api_keys)


class ConfigReader:
    """Reads TOML tables into the dataclasses above; errors are `source: key: problem`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.origins: dict[str, str] = {}

    def error(self, key: str, problem: str) -> ConfigError:
        kind = BadSetting if self.source == "command line" else ConfigError
        return kind(f"{self.source}: {key}: {problem}")

    def unknown_key(self, key: str, name: str, known_keys: Collection[str]) -> ConfigError:
        matches = nearest(name, known_keys, 1)
        valid = f"did you mean {matches[0]!r}?" if matches else f"valid: {', '.join(known_keys)}"
        return self.error(key, f"is not a known key; {valid}")

    def read_config(self, table: Json) -> Config:
        config = Config(origins=self.origins)
        self.fill(config, table, "")
        providers = [("default_provider", config.default_provider)]
        providers += [(f"limits.providers.{name}", name) for name in config.limits.providers]
        for alias, targets in config.models.items():
            models = [targets] if isinstance(targets, str) else targets
            prefixes = [model.partition("/")[0] for model in models if "/" in model]
            providers += [(f'models."{alias}"', prefix) for prefix in prefixes]
        for key, name in providers:
            if name not in config.providers:
                reason = f"no such provider: {name}; {suggest(name, config.providers)}"
                raise self.error(key, reason)
        names = {secret: name for name, secret in config.api_keys.items()}
        for name, secret in config.api_keys.items():
            if names[secret] != name:
                raise self.error(f"api_keys.{name}", "has the same value as another key")
        return config

    def fill(self, target: Any, table: Json, path: str) -> None:
        settings = {item.name: item for item in fields(target) if item.name != "origins"}
        for name, value in table.items():
            key = join_path(path, name)
            if name not in settings:
                raise self.unknown_key(key, name, settings)
            current = getattr(target, name)
            if key in NAMED_TABLES:
                for entry_name, entry in self.require_table(value, key).items():
                    current[entry_name] = self.read_entry(key, entry_name, entry)
            elif is_dataclass(current):
                self.fill(current, self.require_table(value, key), key)
            elif not isinstance(value, str) or value.strip():  # otherwise as if it were not there
                setattr(target, name, self.read_value(key, settings[name], value))
                self.origins[key] = "file"

    def read_entry(self, path: str, name: str, value: Any) -> Any:
        """One entry of a table in NAMED_TABLES; a built-in provider is replaced."""
        key = f"{path}.{name}"
        pattern, marks = (PROVIDER_NAME, "- _") if path == "providers" else (LABEL, ". _ + -")
        if path != "models" and not pattern.fullmatch(name):
            raise self.error(key, f"a name is letters, digits and {marks}")
        if path in ("models", "api_keys"):
            problem = check_alias(value) if path == "models" else check_api_key(value)
            if problem:
                raise self.error(f'models."{name}"' if path == "models" else key, problem)
            self.origins[key] = "file"
            return value
        table = self.require_table(value, key)
        entry: Any = CapConfig()
        if path == "providers":
            kind = table.get("type") or name
            if not isinstance(kind, str) or kind not in PROVIDER_CONFIGS:
                supported = ", ".join(sorted(PROVIDER_CONFIGS))
                raise self.error(f"{key}.type", f"must be one of {supported}")
            entry = PROVIDER_CONFIGS[kind]()
        self.fill(entry, table, key)
        return entry

    def read_value(self, key: str, item: Field[Any], value: Any) -> Any:
        kind, type_name = SETTING_TYPES[str(item.type)]
        if isinstance(value, str):
            value = item.metadata.get("normalize", str)(value.strip(" "))
        is_valid = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_valid or (kind is list and not all(isinstance(entry, str) for entry in value)):
            raise self.error(key, f"must be {type_name}")
        check: Check | None = item.metadata.get("check")
        problem = (kind is str and check_text(value)) or (check and check(value))
        if problem:
            raise self.error(key, problem)
        return float(value) if item.type == "float" else value

    def require_table(self, value: Any, key: str) -> Json:
        if not isinstance(value, dict):
            raise self.error(key, "must be a table")
        return value


def read_config_text(text: str, source: str) -> Config:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply") from None
    return ConfigReader(source).read_config(table)


def iter_settings(target: Any, path: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Every scalar setting below `target`: (dotted key, owner, field)."""
    for item in fields(target):
        value = getattr(target, item.name)
        key = join_path(path, item.name)
        if str(item.type) in SETTING_TYPES and item.name != "type":
            yield key, target, item
        tables = value if isinstance(value, dict) else {"": value}
        for name, table in tables.items():
            if is_dataclass(table):
                yield from iter_settings(table, join_path(key, name) if name else key)


def parse_setting(text: str, kind: str) -> Any:
    """A value given as text in a flag or variable; the text itself if it is not of `kind`."""
    booleans = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if kind == "bool":
        return booleans.get(text.strip().lower(), text)
    if kind == "list[str]":
        return [item.strip() for item in text.split(",") if item.strip()]
    with contextlib.suppress(ValueError):
        return {"int": int, "float": float}.get(kind, str)(text)
    return text


def override_setting(config: Config, source: str, origin: str, key: str, text: str) -> None:
    """`text` is the value of the variable or flag `origin`."""
    owner, item = next((owner, item) for name, owner, item in iter_settings(config) if name == key)
    value = parse_setting(text, str(item.type))
    setattr(owner, item.name, ConfigReader(source).read_value(origin, item, value))
    config.origins[key] = origin


# Short forms of variables, like the command line's flags.
ENV_SHORT = {"HOST": "SERVER_HOST", "PORT": "SERVER_PORT", "KEY": "API_KEY"}
# What Kubernetes (Service, "Environment variables") and Docker's links set for a service called
# aiclient-api, or aiclient-api-X, in all containers.
SERVICE_VARIABLE = re.compile(
    r"(?:\w{1,99}_)?(?:SERVICE_(?:HOST|PORT(?:_\w{1,99})?)"
    r"|PORT_[0-9]{1,5}_(?:TCP|UDP|SCTP)(?:_[A-Z]{1,9})?)=.*"
    r"|(?:\w{1,99}_)?(?:PORT=(?:tcp|udp|sctp)://.*|NAME=/.*|ENV_\w{1,99}=.*)",
    re.DOTALL,
)


def apply_environment(config: Config, environ: dict[str, str]) -> list[str]:
    """`AICLIENT_API_SERVER_PORT=8080` overrides `server.port`; short forms: HOST, PORT, KEY.

    An empty variable is one that is not set.  Returns the variables that belong to a service.
    """
    keys = [key for key, _, _ in iter_settings(config)]
    names = {key.upper().replace(".", "_").replace("-", "_"): key for key in keys}
    ignored = []
    for variable, text in sorted(environ.items()):
        name = variable.removeprefix("AICLIENT_API_")
        if name == variable or not text.strip():
            continue
        key = names.get(ENV_SHORT.get(name, name))
        is_address = text.startswith(("tcp://", "udp://", "sctp://"))
        if SERVICE_VARIABLE.fullmatch(f"{name}={text}") and (key is None or is_address):
            ignored.append(variable)
        elif key is None:
            raise ConfigReader("environment").unknown_key(variable, name, names)
        else:
            override_setting(config, "environment", variable, key, text)
    return ignored


def apply_flags(config: Config, flags: dict[str, str | None]) -> None:
    """None and "" mean not given; unknown keys are ignored: another version may pass them."""
    for key, _, _ in list(iter_settings(config)):
        text = flags.get(key) or ""
        if text.strip():
            flag = "--" + key.rpartition(".")[2].replace("_", "-")
            override_setting(config, "command line", flag, key, text)


def check_exposure(config: Config) -> None:
    """Requires a key beyond loopback: anyone on the network could spend the subscription."""
    if not config.needs_key and not is_loopback(config.server.host):
        raise ConfigError(
            f"configuration: server.host: {config.server.host} can be reached from other machines; "
            "set api_key (or --api-key) first, or listen on 127.0.0.1"
        )


def is_secret_setting(key: str) -> bool:
    """Secrets never leave the process: not in responses, tables or over the control channel."""
    return key in ("api_key", "network.proxy") or key.startswith("api_keys.")


def effective_settings(config: Config) -> Iterator[tuple[str, Any]]:
    for key, owner, item in iter_settings(config):
        yield key, getattr(owner, item.name)
    for name, entry in config.providers.items():
        yield f"providers.{name}.type", entry.type
    for table in ("models", "api_keys"):
        for name, value in getattr(config, table).items():
            yield f"{table}.{name}", value


def describe_settings(config: Config) -> list[Json]:
    """`[{"key", "value", "origin"}]`: file, a variable, a flag or default; secrets are masked."""
    return [
        {
            "key": key,
            "value": "(set, not shown)" if is_secret_setting(key) and value else value,
            "origin": config.origins.get(key, "default"),
        }
        for key, value in effective_settings(config)
    ]


def changed_settings(old: Config, new: Config) -> list[str]:
    """Of a table that is only in one of them, the settings that it does not leave at default."""
    values, new_values = dict(effective_settings(old)), dict(effective_settings(new))
    keys = values.keys() & new_values.keys() | old.origins.keys() | new.origins.keys()
    return sorted(key for key in keys if values.get(key) != new_values.get(key))


# 4.1 editing config.toml in place: comments and order are kept

TOML_LINE = re.compile(
    r"""[ \t]*+(?:(?P<header>\[(?:[^\]"'#]|"(?:\\.|[^"\\])*+"|'[^']*+')++\])"""
    r"""|(?P<key>(?:[^="'#\[]|"(?:\\.|[^"\\])*+"|'[^']*+')++)"""
    r"""=[ \t]*+(?P<value>(?:[^"'#\r]|"(?:\\.|[^"\\])*+"|'[^']*+')*+))[ \t]*+(?:#.*)?\r?"""
)
TOML_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
LEADING_COMMENT = re.compile(r"(?:[ \t]*#[^\n]*\n)+(?=\s*\n)")


def parse_toml_path(text: str) -> tuple[str, ...]:
    """The path of a header or a key: `a."b.c"=0` -> ("a", "b.c"); () if it is neither."""
    path = []
    with contextlib.suppress(tomllib.TOMLDecodeError):
        table: Any = tomllib.loads(text)
        while isinstance(table, dict) and table:
            key, table = next(iter(table.items()))
            path.append(key)
    return tuple(path)


def write_toml(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)  # the same in TOML for all types of settings


def write_toml_path(path: Iterable[str]) -> str:
    """("models", "gpt-4.1") -> `models."gpt-4.1"`."""
    return ".".join(part if TOML_BARE_KEY.fullmatch(part) else write_toml(part) for part in path)


def edit_toml(text: str, path: tuple[str, ...], value: Any) -> str:
    """`text` with the value at `path` replaced or added to its table; None removes what is there.

    Works on single lines: where a value or a string spans several, the result may be wrong, so
    the caller parses it again.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    text += newline if text and not text.endswith("\n") else ""
    lines: list[str] = []
    table: tuple[str, ...] = ()
    table_end = None  # index of the line after the last one of the table that `path` belongs to
    is_done = value is None
    for line in text.split("\n"):
        match = TOML_LINE.fullmatch(line)
        key: tuple[str, ...] = ()
        if match and match["header"]:
            table = parse_toml_path(match["header"])
        elif match:
            key = parse_toml_path(match["key"] + "=0")
        if match and value is None and (*table, *key)[: len(path)] == path:
            continue
        if match and key and (*table, *key) == path:
            begin = match.start("value")
            line = line[:begin] + write_toml(value) + line[begin + len(match["value"].rstrip()) :]
            is_done = True
        lines.append(line)
        if table == path[:-1] and line.strip() and not line.lstrip().startswith("#"):
            table_end = len(lines)
    if is_done:
        return "\n".join(lines)
    new_line = f"{write_toml_path(path[-1:])} = {write_toml(value)}{newline}"
    if table_end is None and path[:-1]:
        blank_line = newline if text.strip() else ""
        return f"{text}{blank_line}[{write_toml_path(path[:-1])}]{newline}{new_line}"
    if table_end is None:
        comment = LEADING_COMMENT.match(text)
        table_end = comment[0].count("\n") if comment else 0
    lines.insert(table_end, new_line.removesuffix("\n"))
    return "\n".join(lines)


def split_setting_key(key: str) -> tuple[str, ...]:
    """`models.gpt-4.1` -> ("models", "gpt-4.1"): user-defined names may contain dots."""
    first, _, remainder = key.partition(".")
    if first in ("models", "api_keys") and remainder:
        return first, remainder
    if key.startswith("limits.labels."):
        label, _, setting = remainder.removeprefix("labels.").rpartition(".")
        return first, "labels", label, setting
    return tuple(key.split("."))


def change_setting(text: str, source: str, key: str, value: str | None) -> str:
    """The edited `text`, None removes the key; raises ConfigError, also if the edit fails."""
    config = read_config_text(text, source)
    path = split_setting_key(key)
    caps = iter_settings(CapConfig(), key.rpartition(".")[0])
    kinds = {name: str(item.type) for name, _, item in (*caps, *iter_settings(config))}
    kind = kinds.get(key, "str")
    if path[0] == "models" and "," in (value or ""):  # no model name has a comma
        kind = "list[str]"
    expected = tomllib.loads(text)
    table, reader = expected, ConfigReader(source)
    changed = None if value is None else parse_setting(value, kind)
    try:
        for part in path[:-1]:
            table = reader.require_table(table.setdefault(part, {}), part)
        if value is None and path[-1] not in table:
            raise reader.error(key, "is not set here")
        table[path[-1]] = changed
        if value is None:
            del table[path[-1]]
        wanted = reader.read_config(expected)
    except ConfigError as error:
        raise BadSetting(str(error)) from None
    edited = edit_toml(text, path, changed)
    with contextlib.suppress(ConfigError):
        if read_config_text(edited, source) == wanted:
            return edited
    raise reader.error(key, "cannot be changed in a file of this form; edit it")


# ---- 5. HTTP wire ------------------------------------------------------------------------------
#
# One strict grammar for both sides (RFC 9110, RFC 9112).  Two programs in a row that parse the same
# bytes differently allow request smuggling, so anything ambiguous is refused.

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
DIGITS = re.compile(r"[0-9]{1,19}")  # 2**63 has 19
CHUNK_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
CHUNK_STRING = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t -~])*"'
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")  # of a chunk without extensions
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*\r\n"
    % (CHUNK_TOKEN, CHUNK_TOKEN, CHUNK_STRING)
)
ABSOLUTE_FORM = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
HEAD_END = re.compile(rb"\n\r?\n")
# Without CTLs other than HTAB (RFC 9110 section 5.5).
HEAD_LINES = re.compile("(?:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+")
STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: ([^\r\n]*))?")
HEADER_BREAKS = re.compile(r"[\r\n\0]")
NO_BODY_STATUSES = (204, 304)


class Headers(dict[str, str]):
    """By lower-case name; repeated fields are joined by ", " and listed in `repeated`."""

    repeated: frozenset[str] = frozenset()

    def has_token(self, name: str, token: str) -> bool:
        """Whether the comma list in field `name` contains the lower-case `token`."""
        items = self[name].split(",") if name in self else ()
        return any(item.strip(" \t").lower() == token for item in items)


@dataclass(eq=False)
class RequestHead:
    method: str
    target: str
    path: str  #: percent-decoded, without the query
    query: str
    minor: int  #: 0 for HTTP/1.0, 1 for HTTP/1.1
    headers: Headers


class ResponseHead(NamedTuple):
    status: int
    minor: int
    headers: Headers


def head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """The offset after a head's final empty line, or -1; bare LFs count, to be refused at once."""
    match = HEAD_END.search(buffer, max(0, start - 3))
    return match.end() if match else -1


def head_lines(data: bytes) -> list[str]:
    """The lines of a complete head; raises WireError on control characters and stray CR or LF."""
    text = data.decode("latin-1")
    lines = text.split("\r\n")
    if not HEAD_LINES.fullmatch(text):
        is_bare = text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1
        raise WireError(f"{'bare CR or LF' if is_bare else 'control character'} in the head")
    return lines[:-2]


@functools.lru_cache(maxsize=64)  # most clients send the same, and open streams share them
def field_name(name: str) -> str:
    """In lower case; also refuses white space before the colon, and obsolete line folding."""
    if not TOKEN.fullmatch(name):
        raise WireError("malformed header field")
    return name.lower()


def parse_headers(lines: list[str]) -> Headers:
    if len(lines) > MAX_FIELDS:
        raise WireError(f"more than {MAX_FIELDS} header fields", 431)
    headers = Headers()
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = field_name(name if colon else ""), value.strip(" \t")
        if name in headers:
            headers.repeated |= {name}
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def parse_target(method: str, target: str) -> tuple[str, str, str]:
    """(path, query, host) of a request target; host is "" unless it is in absolute-form."""
    if target == "*" and method == "OPTIONS":
        return "*", "", ""
    absolute = None if target.startswith("/") else ABSOLUTE_FORM.fullmatch(target)
    host, origin_form = absolute.groups() if absolute else ("", target)
    is_valid = TARGET.fullmatch(target) and "#" not in target
    if not is_valid or not (absolute or target.startswith("/")):
        raise WireError("malformed request target")
    path, _, query = origin_form.partition("?")
    if "%" in path:
        path = urllib.parse.unquote(path, errors="replace")
    return path or "/", query, host


def parse_request_head(data: bytes) -> RequestHead:
    lines = head_lines(data)
    if len(lines[0]) > MAX_REQUEST_LINE_BYTES:
        raise WireError("request line too long", 414)
    parts = lines[0].split(" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise WireError("malformed request line")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        if re.fullmatch(r"HTTP/[0-9]\.[0-9]", version):
            raise WireError("only HTTP/1.1 and HTTP/1.0 are supported", 505)
        raise WireError("malformed request line")
    minor = int(version[-1])
    path, query, host = parse_target(method, target)
    headers = parse_headers(lines[1:])
    if "host" in headers.repeated or ("host" not in headers and minor):
        raise WireError("exactly one Host field is required")
    if "host" in headers and not split_host(headers["host"]):
        raise WireError("malformed Host field")
    if host:
        if not split_host(host):
            raise WireError("malformed request target")
        headers["host"] = host  # RFC 9112 section 3.2.2: the target's host replaces the field's
    return RequestHead(method, target, path, query, minor, headers)


def parse_response_head(data: bytes) -> ResponseHead:
    lines = head_lines(data)
    match = STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise WireError("malformed status line")
    return ResponseHead(int(match[2]), int(match[1]), parse_headers(lines[1:]))


def parse_length(headers: Headers) -> int | None:
    """Content-Length; any ambiguity is an error (RFC 9112 section 6.3)."""
    value = headers.get("content-length")
    if value is None:
        return None
    if "content-length" in headers.repeated or not DIGITS.fullmatch(value):
        raise WireError("malformed Content-Length")
    return int(value)


class Body:
    """An incoming body of `length` bytes, by default all up to the end of the connection."""

    def __init__(self, length: int | None = None) -> None:
        self.until_close = length is None
        self.remaining = length or 0  # payload bytes announced but not received
        self.is_complete = length == 0
        self.excess = b""  # received after the end of the body

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; raises WireError."""
        if self.until_close:
            return data
        self.excess += data[self.remaining :]
        payload = data[: self.remaining]
        self.remaining -= len(payload)
        self.is_complete = self.remaining == 0
        return payload

    def on_eof(self) -> None:
        self.is_complete |= self.until_close
        if not self.is_complete:
            raise WireError("the connection ended inside a message body")


class ChunkedBody(Body):
    """Chunked coding (RFC 9112 section 7.1); extensions and trailers are checked and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.until_close = False
        self.buffer = b""
        self.expected = "size"  #: the next part: size, data, trailers or, at the end, none

    def feed(self, data: bytes) -> bytes:
        if self.expected == "size" and not self.buffer:
            line = CHUNK_SIZE.match(data)
            if (
                line
                and data.endswith(b"\r\n")
                and 0 < int(line[1], 16) == len(data) - line.end() - 2
            ):
                return data[line.end() : -2]  # one complete chunk, as usual
        return self.feed_parts(self.buffer + data)

    def feed_parts(self, data: bytes) -> bytes:
        payload: list[bytes] = []
        offset = 0
        while not self.is_complete:
            if self.expected == "size":
                limit = offset + MAX_CHUNK_LINE_BYTES
                has_line = data.find(b"\n", offset, limit) >= 0
                line = CHUNK_LINE.match(data, offset, limit) if has_line else None
                if line is None:
                    if has_line:
                        raise WireError("malformed chunk size line")
                    if len(data) > limit:
                        raise WireError("chunk size line too long")
                    break
                offset, self.remaining = line.end(), int(line[1], 16)
                end = offset + self.remaining
                if self.remaining and data[end : end + 2] == b"\r\n":
                    payload.append(data[offset:end])
                    offset, self.remaining = end + 2, 0
                else:
                    self.expected = "data" if self.remaining else "trailers"
            elif self.expected == "data":
                fragment = data[offset : offset + self.remaining]
                payload.append(fragment)
                offset += len(fragment)
                self.remaining -= len(fragment)
                line_end = data[offset : offset + 2]
                if not b"\r\n".startswith(line_end):
                    raise WireError("chunk data is not followed by CRLF")
                if len(line_end) < 2:
                    break
                offset += 2
                self.expected = "size"
            else:
                size = self.read_trailers(data[offset : offset + MAX_TRAILER_BYTES + 1])
                if not size:
                    break
                offset += size
                self.is_complete, self.expected = True, "none"
        if self.is_complete:
            self.excess += data[offset:]
        self.buffer = b"" if self.is_complete else data[offset:]
        return b"".join(payload)

    @staticmethod
    def read_trailers(data: bytes) -> int:
        """The size of the trailers with their empty line; 0 if more data is needed."""
        if data.startswith(b"\r\n"):
            return 2
        if data.startswith(b"\n"):
            raise WireError("bare LF after the last chunk")
        end = head_end(data)
        if end > MAX_TRAILER_BYTES or (end < 0 and len(data) > MAX_TRAILER_BYTES):
            raise WireError("trailers too long", 431)
        if end > 0:
            parse_headers(head_lines(data[:end]))
        return max(end, 0)


def request_body(head: RequestHead) -> Body:
    """Raises WireError if two programs could disagree on the framing."""
    headers = head.headers
    length = parse_length(headers)
    coding = headers.get("transfer-encoding")
    if coding is None:
        return Body(length or 0)
    if length is not None:
        raise WireError("both Content-Length and Transfer-Encoding")
    if head.minor == 0:
        raise WireError("Transfer-Encoding in HTTP/1.0")
    codings = [item.strip(" \t") for item in coding.lower().split(",")]
    if codings == ["chunked"]:
        return ChunkedBody()
    is_final = codings[-1] == "chunked" and codings.count("chunked") == 1
    raise WireError("unknown transfer coding", 501 if is_final else 400)


def response_body(head: ResponseHead, method: str) -> Body:
    """RFC 9112 section 6.3; raises WireError."""
    if method == "HEAD" or head.status in NO_BODY_STATUSES or head.status < 200:
        return Body(0)
    coding = head.headers.get("transfer-encoding")
    length = parse_length(head.headers)
    if coding is None:
        return Body(length)
    if coding.lower() != "chunked" or length is not None:
        raise WireError("ambiguous or unsupported body framing")
    return ChunkedBody()


def write_head(first_line: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """A request or response head.  Values come only from tables, checked names and numbers."""
    lines = [first_line, *map(": ".join, headers)]
    if not "".join(lines).isprintable():
        for line in filter(HEADER_BREAKS.search, lines):
            raise ValueError(f"control character in header {line.partition(':')[0]}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@functools.cache
def status_line(status: int) -> str:
    reasons = {item.value: item.phrase for item in http.HTTPStatus}
    reasons[529] = "Overloaded"  # Anthropic's
    return f"HTTP/1.1 {status} {reasons.get(status, 'Unknown')}"


def prefers_html(accept: str) -> bool:
    """Whether the client is a browser."""
    return "text/html" in accept.lower()


def write_chunk(data: bytes) -> bytes:
    """`data` as one chunk; b"" for no data, as an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK = b"0\r\n\r\n"

# zlib's wbits; 47 detects zlib or gzip by its header.
GZIP_WBITS, ZLIB_WBITS, RAW_WBITS = 31, 47, -15


def decompress(decompressor: zlib._Decompress, data: bytes, limit: int) -> bytes:
    """The next decoded data, at most `limit` + 1 bytes; raises WireError for malformed data."""
    try:
        decoded = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise WireError("corrupt compressed data") from error
    if decompressor.unused_data:
        raise WireError("data after the end of the compressed body")
    return decoded


def inflate(data: bytes, coding: str, limit: int) -> bytes:
    """A decoded gzip or deflate body; raises ApiError if it is oversized, truncated or corrupt."""
    # Some clients send raw deflate.
    for wbits in (ZLIB_WBITS, RAW_WBITS) if coding == "deflate" else (GZIP_WBITS,):
        decompressor = zlib.decompressobj(wbits)
        with contextlib.suppress(WireError):
            decoded = decompress(decompressor, data, limit)
            if len(decoded) > limit:
                raise BodyTooLarge(f"The decoded body is larger than {limit // MIB} MiB.")
            if decompressor.eof:
                return decoded
    raise InvalidRequest(f"The body is not valid {coding}.")


# ---- 6. Stream framing -------------------------------------------------------------------------

TRUNCATED_RESPONSE = "The upstream's response ended prematurely."
MALFORMED_EVENT = "The upstream sent an event that is not a JSON object."


class SseReader:
    """Server-sent events in, `(event name, data)` out, wherever the reads are split.

    Accepts LF, CRLF and CR as line ends, `data:` with and without the space, several data lines,
    comments, a byte order mark, a last event without its empty line, and a bare JSON object as an
    event (Copilot appends such errors, seen in 2026-08).
    """

    def __init__(self) -> None:
        self.buffer = bytearray()  # an incomplete event
        self.after_cr = False

    def complete(self, data: bytes) -> bytes:
        """The completed events, unparsed, with LF line ends; searches each byte only once."""
        if data and (self.after_cr or b"\r" in data):  # a CRLF may be split over two reads
            data = data.removeprefix(b"\n") if self.after_cr else data
            self.after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not self.buffer and data.endswith(b"\n\n"):
            return data  # no event is split, as usual
        searched = max(0, len(self.buffer) - 1)
        self.buffer += data
        end = self.buffer.rfind(b"\n\n", searched) + 2
        if end > 1:
            blocks = bytes(self.buffer[:end])
            del self.buffer[:end]
            return blocks
        if len(self.buffer) > MAX_FRAME_BYTES:
            raise UpstreamError("The upstream sent an event that is too large.")
        return b""

    def frames(self, blocks: bytes) -> list[Json]:
        return load_frames(self.parse_all(blocks))

    def last_frames(self) -> list[Json]:
        """The last event, if the stream ended without an empty line."""
        block, self.buffer = bytes(self.buffer), bytearray()
        return self.frames(block)

    def parse_all(self, blocks: bytes) -> list[tuple[bytes, bytes]]:
        return [event for block in blocks.split(b"\n\n") if block and (event := self.parse(block))]

    @staticmethod
    def parse(block: bytes) -> tuple[bytes, bytes] | None:
        """(name, data); None for a block without data, such as comments."""
        if b"\n" not in block and block.startswith(b"data: "):
            return b"", block[6:]
        name, data = b"", []
        lines = block.removeprefix(b"\xef\xbb\xbf").split(b"\n", MAX_EVENT_LINES)
        if len(lines) > MAX_EVENT_LINES:
            raise UpstreamError("The upstream sent an event of too many lines.")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line.startswith(b"event:"):
                name = line[6:].strip()
            elif line.startswith(b"{"):
                data.append(line)
        return (name, b"\n".join(data)) if data else None


def load_frame(data: bytes) -> Json | None:
    """The JSON object of one event or None; in half the time of `json.loads` with options."""
    if has_too_many_values(data):
        return None
    try:
        text = data.decode()
        value, end = json_decoder.scan_once(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return load_object(data)  # which allows white space around the object
    is_complete = end == len(text) or not text[end:].strip()
    return value if isinstance(value, dict) and is_complete else None


def load_frames(events: list[tuple[bytes, bytes]]) -> list[Json]:
    """The events' data as JSON objects; one that is not becomes an error frame, and the last.

    An object without a `type` gets the event's name, and `[DONE]` becomes `{"type": "[DONE]"}`.
    """
    frames: list[Json] = []
    for name, data in events:
        if data == b"[DONE]":
            frames.append({"type": "[DONE]"})
            continue
        frame = load_frame(data)
        if frame is None:
            return [*frames, {"type": "error", "error": {"message": MALFORMED_EVENT}}]
        if name not in (b"", b"message") and "type" not in frame:
            frame["type"] = name.decode("utf-8", "replace")
        frames.append(frame)
    return frames


# What tells the texts of a stream apart, besides their keys.
TEXT_INDEXES = ("type", "index", "output_index", "content_index", "summary_index", "toolUseId")


def find_texts(value: Any, path: tuple[str, ...] = (), depth: int = 9) -> Iterator[Any]:
    """(path, the object that holds it) of each text in a frame; the path ends with its key."""
    if isinstance(value, dict):
        path = (*path, *(str(value.get(key)) for key in TEXT_INDEXES))
        yield from (((*path, key), value) for key in value if get_text(value, key))
    members = value.items() if isinstance(value, dict) else [("", member) for member in value]
    for key, member in members:
        if depth and isinstance(member, (dict, list)):
            yield from find_texts(member, (*path, key), depth - 1)


@dataclass(slots=True)
class PairJoiner:
    """Joins surrogate pairs, as in emoji, that were split between two deltas of a text.

    Services that count in UTF-16 cut strings there.  A frame whose text ends with a first half is
    held until that text goes on, or cannot.
    """

    held: list[Json] = field(default_factory=list)  #: frames
    halves: dict[Any, Json] = field(default_factory=dict)  #: path of a text -> what holds it

    def join(self, blocks: bytes, frames: list[Json]) -> list[Json]:
        """The frames of `blocks`, and those held before, as far as they are complete."""
        if not self.held and b"\\ud" not in blocks and b"\\uD" not in blocks:
            return frames
        ready: list[Json] = []
        for frame in frames:
            for path, holder in find_texts(frame):
                key, text = path[-1], holder[path[-1]]
                former = self.halves.pop(path, None)
                if former and "\udc00" <= text[0] <= "\udfff":
                    pair = (former[key][-1] + text[0]).encode("utf-16-le", "surrogatepass")
                    former[key], holder[key] = former[key][:-1], pair.decode("utf-16-le") + text[1:]
                if "\ud800" <= text[-1] <= "\udbff":
                    self.halves[path] = holder
            self.held.append(frame)
            kind = get_text(frame, "type")
            is_delta = not kind or kind == "ping" or "delta" in kind
            if not (self.halves and is_delta and len(self.held) < MAX_HELD_FRAMES):
                ready += self.release()
        return ready

    def release(self) -> list[Json]:
        frames, self.held = self.held, []
        self.halves.clear()
        return frames


def write_sse(frame: Json, name: str = "") -> bytes:
    if name:
        return b"event: %b\ndata: %b\n\n" % (name.encode(), dump_json(frame))
    return b"data: %b\n\n" % dump_json(frame)


# The Amazon event stream: `application/vnd.amazon.eventstream` (Smithy's specification).

EventMessage = tuple[dict[str, str], bytes]  # text headers and payload, checksums verified
PRELUDE = struct.Struct(">III")  # total length, headers length, CRC-32 of these two
MESSAGE_OVERHEAD = 16  # the prelude and the CRC-32 of the message
# By header type: booleans (their value is the type), integers, a timestamp and a UUID.
HEADER_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
TEXT_HEADER = 7  # begins with two bytes of length, like 6: bytes


@functools.lru_cache(maxsize=64)  # few differ
def parse_event_headers(block: bytes) -> dict[str, str]:
    """The headers that are text; the others are checked and skipped.  Raises WireError."""
    headers: dict[str, str] = {}
    offset, end = 0, len(block)
    while offset < end:
        name_end = offset + 1 + block[offset]
        if name_end == offset + 1 or name_end >= end or block[name_end] > 9:
            raise WireError("an event's headers are malformed")
        kind, start = block[name_end], name_end + 1
        size = HEADER_SIZES.get(kind)
        if size is None:
            size, start = int.from_bytes(block[start : start + 2], "big"), start + 2
        if start + size > end:
            raise WireError("an event's headers are truncated")
        if kind == TEXT_HEADER:
            name = block[offset + 1 : name_end].decode("utf-8", "replace")
            headers[name] = block[start : start + size].decode("utf-8", "replace")
        offset = start + size
    return headers


class EventStreamFraming:
    """An event stream, rewritten as server-sent events.

    A message becomes `data: {"assistantResponseEvent": {"content": "Hi"}}`, the union that the
    service defines; exceptions and errors become `data: {"error": {"code", "message", ...}}`.
    A wrong length or checksum sets `error` and ends reading; earlier messages still count.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()  # an incomplete message
        self.bytes_needed = PRELUDE.size
        self.error = ""

    def complete(self, data: bytes) -> bytes:
        if self.error:
            return b""
        events = [self.write(headers, payload) for headers, payload in self.read_messages(data)]
        if self.error:
            message = f"The upstream's response is malformed: {self.error}."
            events.append(write_sse({"error": {"code": "WireError", "message": message}}))
        return b"".join(events)

    def read_messages(self, data: bytes) -> list[EventMessage]:
        """The messages that `data` completes."""
        if self.error:
            return []
        if self.buffer:  # joined only once complete, as a message may be huge
            self.buffer += data
            if len(self.buffer) < self.bytes_needed:
                return []
            data = bytes(self.buffer)
            self.buffer.clear()
            self.bytes_needed = PRELUDE.size
        messages: list[EventMessage] = []
        start, length, crc32 = 0, len(data), zlib.crc32
        try:
            while length - start >= PRELUDE.size:
                size, headers_size, checksum = PRELUDE.unpack_from(data, start)
                if crc32(data[start : start + 8]) != checksum:
                    raise WireError("an event has a wrong prelude checksum")
                if not MESSAGE_OVERHEAD <= size <= MAX_EVENT_MESSAGE_BYTES:
                    raise WireError("an event has an impossible length")
                if headers_size > size - MESSAGE_OVERHEAD or headers_size > MAX_EVENT_HEADERS_BYTES:
                    raise WireError("an event's headers are too long")
                end = start + size - 4
                if end + 4 > length:
                    self.bytes_needed = size
                    break
                message = data[start + 8 : end]  # without the numbers that `checksum` is of
                if crc32(message, checksum) != int.from_bytes(data[end : end + 4], "big"):
                    raise WireError("an event has a wrong checksum")
                headers = parse_event_headers(message[4 : 4 + headers_size])
                messages.append((headers, message[4 + headers_size :]))
                start = end + 4
        except WireError as error:
            self.error = str(error)
        else:
            self.buffer += data[start:]
        return messages

    def write(self, headers: dict[str, str], payload: bytes) -> bytes:
        kind = headers.get(":message-type", "event")
        if kind == "exception":
            error = load_object(payload) or {"message": payload.decode("utf-8", "replace")}
            return write_sse({"error": {**error, "code": headers.get(":exception-type", "")}})
        if kind != "event":
            error = {name: headers.get(f":error-{name}", "") for name in ("code", "message")}
            return write_sse({"error": error})
        event_type = headers.get(":event-type", "")
        member = event_type.encode() if event_type.isidentifier() else b"unnamed"
        if b"\n" in payload or (member in payload and payload.lstrip()[:1] == b"{"):
            payload = self.unwrap(payload, event_type)
        return b'data: {"%b":%b}\n\n' % (member, payload or b"{}")

    @staticmethod
    def unwrap(payload: bytes, member: str) -> bytes:
        """The payload on one line, unwrapped: some hosts put it under the member's name."""
        value = load_object(payload)
        if value is None:
            return b"?"  # makes the event malformed
        inner = value.get(member) if len(value) == 1 else None
        try:  # as ASCII, as a text may end with half of a surrogate pair
            return json.dumps(inner if isinstance(inner, dict) else value, allow_nan=False).encode()
        except RecursionError:
            return b"?"

    def frames(self, blocks: bytes) -> list[Json]:
        """The frames of unparsed events, each with one member; a malformed one is the last."""
        frames = load_frames([(b"", event[6:]) for event in blocks.split(b"\n\n") if event])
        for index, frame in enumerate(frames):
            if len(frame) != 1:  # malformed, or its payload closed the object early
                error = {"code": "WireError", "message": MALFORMED_EVENT}
                return [*frames[:index], {"error": error}]
        return frames

    def last_frames(self) -> list[Json]:
        """Always empty; raises UpstreamError if a message is truncated."""
        if self.buffer and not self.error:
            raise UpstreamError(TRUNCATED_RESPONSE)
        return []


SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT_PING = b": ping\n\n"


# ---- 7. Conversation ---------------------------------------------------------------------------
#
# The request (Conversation) and the response (events), in a form that loses nothing of any dialect.


def invalid(param: str, problem: str) -> InvalidRequest:
    """`param` is the path of a request's field, as in `messages.3.content`."""
    return InvalidRequest(f"{param}: {problem}", param=param)


def unsupported(param: str, problem: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{param}: {problem}", param=param)


# `source` of a block is the client's own part, call or message, for a request that goes up in the
# client's dialect: what no rule changes is sent as it came.


@dataclass(slots=True)
class Text:
    text: str
    source: Json | None = field(default=None, compare=False)


@dataclass(slots=True)
class Image:
    """Base64 `data` with its `media_type`, or an https `url`."""

    media_type: str = ""
    data: str = ""
    url: str = ""
    detail: str = ""  #: OpenAI's low, high or auto
    path: str = field(default="", compare=False)  #: position in the request, for errors


@dataclass(slots=True)
class Document:
    media_type: str = ""
    data: str = ""
    text: str = ""
    title: str = ""
    path: str = ""  #: position in the request, for errors


@dataclass(slots=True)
class Thinking:
    """Reasoning: `text` with the vendor's `signature`, or only `redacted` (encrypted) data."""

    text: str = ""
    signature: str = ""
    redacted: str = ""


@dataclass(slots=True)
class ToolCall:
    """`arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str
    source: Json | None = field(default=None, compare=False)


@dataclass(slots=True)
class ToolResult:
    id: str
    blocks: list[Block]
    is_error: bool = False
    source: Json | None = field(default=None, compare=False)


@dataclass(slots=True)
class Refusal:
    text: str


@dataclass(slots=True)
class Native:
    """A part, item or message that is sent in the client's dialect only, as it came."""

    source: Json


Block = Text | Image | Document | Thinking | ToolCall | ToolResult | Refusal | Native


@dataclass(slots=True)
class Turn:
    """One message; `role` is user, assistant or system (mid-conversation)."""

    role: str
    blocks: list[Block]


@dataclass(slots=True)
class Tool:
    """A function; `schema` is a JSON Schema of type object."""

    name: str
    description: str
    schema: Json
    strict: bool | None = None
    kind: str = "function"  #: or custom (plain text instead of JSON arguments), tool_search
    namespace: str = ""  #: prefix of `name` here; a separate field in the responses dialect


@dataclass(slots=True)
class ToolChoice:
    """`mode` is auto, none, required, or named (with `name`)."""

    mode: str
    name: str = ""


@dataclass(slots=True)
class OutputFormat:
    """Structured output; `schema` None means any JSON object."""

    schema: Json | None
    name: str = "structured_output"
    strict: bool | None = None
    description: str = ""


ENCRYPTED_REASONING = "reasoning.encrypted_content"
# From least reasoning to most; dialects and models support subsets.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

#: field -> verdicts on it, in a converted request and in one sent in its own dialect; "*" stands
#: for all unknown fields.  "keep": read or sent.  "drop": left out, and reported if it asks for
#: anything.  "openai": sent to models of OpenAI, else "drop".  "silent": left out, and the response
#: does not depend on it.  "refuse": a 400 if it asks for anything.
FieldTable = Mapping[str, tuple[str, str]]

# Values that ask for what vendors do by default.
DEFAULT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "function_call": ("auto", "none"),
    "include": ([ENCRYPTED_REASONING],), "modalities": (["text"],), "n": (1,),
    "parallel_tool_calls": (True,), "presence_penalty": (0,), "speed": ("standard",),
    "prompt_cache_retention": ("in_memory",), "service_tier": ("auto", "default"),
    "temperature": (1,), "top_logprobs": (0,), "top_p": (1,), "truncation": ("disabled",),
    "verbosity": ("medium",),
}  # fmt: skip


def field_table(rows: dict[tuple[str, str], str]) -> FieldTable:
    """From the names that share a pair of verdicts."""
    return {name: verdicts for verdicts, names in rows.items() for name in names.split()}


def is_default(name: str, value: Any) -> bool:
    defaults = DEFAULT_VALUES.get(name, ())
    is_empty = value is None or value in ("", [], {})
    return is_empty or value in defaults or (value is False and True not in defaults)


def split_fields(
    body: Json, table: FieldTable, *, native: bool = False, openai: bool = False
) -> tuple[Json, list[str]]:
    """(the fields to keep, names of those the client will miss); raises UnsupportedFeature."""
    kept, missed = {}, []
    for name, value in body.items():
        verdict = table.get(name, table["*"])[native]
        if verdict == "keep" or (verdict == "openai" and openai):
            kept[name] = value
        elif verdict != "silent" and not is_default(name, value):
            if verdict == "refuse":
                raise UnsupportedFeature(f"{name}: is not supported on this model.", param=name)
            missed.append(name)
    return kept, missed


@dataclass(slots=True)
class Conversation:
    model: str = ""
    system: list[Text] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    choice: ToolChoice | None = None
    parallel: bool | None = None  #: None = the vendor's default
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] = field(default_factory=list)
    effort: str | None = None  #: one of EFFORTS; None = the vendor's default
    thinking_budget: int | None = None
    output: OutputFormat | None = None
    verbosity: str | None = None  #: OpenAI's low, medium or high
    session: str = ""  #: stable id of the conversation, for prompt caches
    prefilled: bool = False  #: prefill: the last turn is the assistant's
    tagged_thinking: bool = False  #: thinking is prompted for, and comes as tags in the text
    server_tools: list[str] = field(default_factory=list)  #: server-side tools
    dropped: list[str] = field(default_factory=list)  #: not convertible; for x-aiclient-dropped
    touched: list[str] = field(default_factory=list)  #: rules that changed it, for the log
    names: dict[str, str] = field(default_factory=dict)  #: client's tool names -> wire names
    turns_field: str = "messages"  #: the request's field for the turns, for errors

    def drop_settings(self, *names: str) -> None:
        self.dropped += [name for name in names if not is_default(name, getattr(self, name))]

    def refuse_prefill(self) -> None:
        """Raises UnsupportedFeature if the model is to continue the last turn."""
        if self.prefilled:
            problem = "the last message must be the user's; this model supports no prefill."
            raise unsupported(self.turns_field, problem)

    def refuse_empty(self) -> InvalidRequest:
        return invalid(self.turns_field, "the conversation is empty.")

    def name_tools(self) -> None:
        """Sets `names` for declared tools and for those only called in earlier turns."""
        if any(not tool.name for tool in self.tools):
            raise invalid("tools", "a tool has no name.")
        blocks = (block for turn in self.turns for block in turn.blocks)
        called = {block.name: None for block in blocks if isinstance(block, ToolCall)}
        declared = {tool.name.lower(): tool.name for tool in self.tools}
        # A called name in another case is the declared tool: Kiro ignores case (seen in 2026-11).
        others = [name for name in called if name.lower() not in declared]
        self.names = wire_table([*(tool.name for tool in self.tools), *others])
        for name in called:
            self.names.setdefault(name, self.names[declared.get(name.lower(), name)])

    def client_names(self) -> dict[str, str]:
        """wire name -> the client's, of the tools whose name goes up changed."""
        first: dict[str, str] = {}
        for name, wire in self.names.items():
            first.setdefault(wire, name)
        return {wire: name for wire, name in first.items() if wire != name}

    def wire_name(self, name: str) -> str:
        return self.names.get(name) or wire_name(name)

    def normalize(self) -> None:
        """Normalizes the turns for all vendors; raises InvalidRequest if there are none."""
        normalized = normalize_turns(self.turns)
        if not normalized and not self.system:
            raise self.refuse_empty()
        if normalized != self.turns:
            self.touched.append("normalize_turns")
        self.turns = normalized


@dataclass(slots=True)
class Model:
    id: str
    provider: str
    dialects: tuple[str, ...] = ("chat",)  #: supported upstream, preferred first
    name: str = ""
    family: str = ""
    vendor: str = ""
    max_output: int | None = None
    max_prompt: int | None = None
    context: int | None = None
    efforts: tuple[str, ...] = ()
    adaptive: bool = False
    budget: tuple[int, int] | None = None  #: (min, max) thinking tokens
    structured: bool = False  #: can be given a JSON Schema for its output
    stops: int | None = None  #: how many stop strings it accepts; None = no known limit
    files: bool = False  #: accepts PDF parts in the chat dialect
    streaming: bool = True
    listed: bool = True  #: in model lists by default
    headers: dict[str, str] = field(default_factory=dict)  #: to send upstream with this model
    guessed: bool = False  #: not in the upstream's list, only named by the client
    embeds: bool = False  #: an embedding model
    auto: bool = False  #: stands for, or is, the service's choice for a conversation
    raw: Json = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """Tokens of one response; `input` excludes both caches, `output` includes reasoning."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    nano_credits: int = 0  #: billionths of the billing unit: Copilot's AI credit, Kiro's credit
    credits_source: str = ""  #: like `source`, for credits; "" if none are billed or reported
    context: int = 0  #: tokens in the context after the response, if the upstream reports only that
    source: str = ""  #: of the input: "", reported, derived (from `context`) or estimated here

    @property
    def prompt(self) -> int:
        """All input tokens, as OpenAI counts them."""
        return self.input + self.cache_read + self.cache_write

    @prompt.setter
    def prompt(self, tokens: int) -> None:
        self.input = max(0, tokens - self.cache_read - self.cache_write)

    @property
    def total(self) -> int:
        return self.prompt + self.output


# Events.  A response is  MessageStart (BlockStart BlockDelta* BlockStop | UsageUpdate)*
# (MessageStop | StreamError)  and nothing after that; blocks never overlap, so they need no index.


@dataclass(slots=True)
class MessageStart:
    id: str = ""
    model: str = ""


@dataclass(slots=True)
class BlockStart:
    """A block begins: `kind` is text, thinking, redacted, refusal, tool or opaque."""

    kind: str
    id: str = ""
    name: str = ""
    raw: Json | None = None  #: the upstream's block, if only its own dialect can express it
    is_paragraph: bool = False  #: not the continuation of an earlier text


@dataclass(slots=True)
class BlockDelta:
    """A delta of the open block: `part` is text, arguments, signature or citation."""

    part: str
    text: str
    raw: Json | None = None


@dataclass(slots=True)
class BlockStop:
    """The open block is complete."""


@dataclass(slots=True)
class UsageUpdate:
    """Cumulative usage: the last one counts."""

    usage: Usage


@dataclass(slots=True)
class MessageStop:
    """The response is complete: `reason` is end, stop, tool, length, context, filter or pause."""

    reason: str
    stop_text: str | None = None
    details: Json | None = None


@dataclass(slots=True)
class StreamError:
    error: ApiError


Event = MessageStart | BlockStart | BlockDelta | BlockStop | UsageUpdate | MessageStop | StreamError

PROTOCOL_VIOLATION = "The upstream's response violates its own protocol."

# event -> state -> state; any other event is a protocol error.
EVENT_STATES: dict[type, dict[str, str]] = {
    MessageStart: {"new": "open"},
    BlockStart: {"open": "block"},
    BlockDelta: {"block": "block"},
    BlockStop: {"block": "open"},
    UsageUpdate: {"new": "new", "open": "open", "block": "block"},
    MessageStop: {"open": "complete"},
}

LINE_BREAKS = "\r\n\t"
RUNAWAY = re.compile(f"[{LINE_BREAKS}]{{{MAX_BLANK_RUN + 1}}}")


class RunawayGuard:
    """Detects line breaks without end in tool-call arguments (seen in Floway, 2026-08)."""

    def __init__(self) -> None:
        self.tail = ""  # trailing line breaks and tabs so far

    def check(self, text: str) -> None:
        if text.isprintable() and not text.isspace():
            self.tail = ""  # no line break, as usual
            return
        text = self.tail + text.replace(" ", "")
        if RUNAWAY.search(text):
            raise UpstreamError("The model got stuck inside a tool call.")
        self.tail = text[len(text.rstrip(LINE_BREAKS)) :]


@dataclass(slots=True)
class StopCutter:
    """Applies stop strings for upstreams without that field; a possible beginning is held back."""

    stops: list[str]
    held_text: str = ""
    in_text: bool = False
    stopped: bool = False

    def take(self, event: Event) -> list[Event]:
        if self.stopped:
            return [event] if isinstance(event, UsageUpdate) else []
        if isinstance(event, BlockStart):
            self.in_text = event.kind == "text"
        elif isinstance(event, BlockDelta) and self.in_text and event.part == "text":
            return self.cut(self.held_text + event.text)
        elif isinstance(event, BlockStop) and self.held_text:
            text, self.held_text = self.held_text, ""
            return [BlockDelta("text", text), event]
        return [event]

    def cut(self, text: str) -> list[Event]:
        matches = [(index, stop) for stop in self.stops if (index := text.find(stop)) >= 0]
        if matches:
            # The one completed first, so that chunk boundaries do not matter.
            index, stop = min(matches, key=lambda match: (match[0] + len(match[1]), match[0]))
            self.stopped = True
            leading: list[Event] = [BlockDelta("text", text[:index])] if index else []
            return [*leading, BlockStop(), MessageStop("stop", stop)]
        held_length = max(self.overlap(text, stop) for stop in self.stops)
        self.held_text = text[len(text) - held_length :]
        text = text[: len(text) - held_length]
        return [BlockDelta("text", text)] if text else []

    @staticmethod
    def overlap(text: str, stop: str) -> int:
        """The length of the longest suffix of `text` that begins `stop`."""
        index = max(0, len(text) - len(stop) + 1)
        while (index := text.find(stop[0], index)) >= 0:
            if stop.startswith(text[index:]):
                return len(text) - index
            index += 1
        return 0


WIRE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NON_NAME_CHARS = re.compile(r"[^A-Za-z0-9_-]")


def wire_name(name: str) -> str:
    """A tool name that every vendor accepts; deterministic, so history needs no state."""
    cleaned = NON_NAME_CHARS.sub("_", name)
    return cleaned if len(cleaned) <= 64 else f"{cleaned[:55]}_{short_hash(name, 8)}"


def wire_id(call_id: str, max_length: int = MAX_CALL_ID_LENGTH) -> str:
    """A call id that every vendor accepts; deterministic, so that calls and results still match."""
    is_valid = WIRE_NAME.fullmatch(call_id) and len(call_id) <= max_length
    return call_id if is_valid else "call_" + short_hash(call_id, 24)


def fits_strict(schema: Any) -> bool:
    """Whether OpenAI accepts a strict schema: closed objects with all properties required."""
    if isinstance(schema, list):
        return all(map(fits_strict, schema))
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties", {} if schema.get("type") == "object" else None)
    if not isinstance(properties, dict):
        return all(map(fits_strict, schema.values()))
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    is_closed = schema.get("additionalProperties") is False
    has_optional = properties.keys() - {name for name in required if isinstance(name, str)}
    return is_closed and not has_optional and all(map(fits_strict, properties.values()))


INTERRUPTED = "[no result: call interrupted]"
NO_OUTPUT = "(no output)"  # of a tool: vendors refuse an empty result


def output_text(text: str, is_error: bool) -> str:
    """A tool's output, for dialects without a field for errors."""
    text = text if text.strip() else NO_OUTPUT
    return f"Error: {text}" if is_error and not text.startswith("Error") else text


def is_blank(block: Block) -> bool:
    """Whether a block has no content: vendors reject blank text."""
    if isinstance(block, (Text, Refusal)):
        return not block.text or block.text.isspace()
    return isinstance(block, Thinking) and not (block.text or block.signature or block.redacted)


def merge_turns(turns: list[Turn]) -> list[Turn]:
    """Drops blank blocks and empty turns, and joins adjacent turns of one role."""
    merged: list[Turn] = []
    for turn in turns:
        blocks = [block for block in turn.blocks if not is_blank(block)]
        if not blocks:
            continue
        if merged and merged[-1].role == turn.role:
            merged[-1].blocks.extend(blocks)
        else:
            merged.append(Turn(turn.role, blocks))
    return merged


class CallIds:
    """The call ids of one conversation; repeated ones get a numeric suffix."""

    def __init__(self, max_length: int = MAX_CALL_ID_LENGTH) -> None:
        self.max_length = max_length
        self.used_ids: set[str] = set()
        self.last_suffixes: dict[str, int] = {}  # last suffix of each stem

    def add(self, call_id: str) -> str:
        """A valid id: `call_id` or what stands for it, or if that is taken a new one."""
        unique_id = wire_id(call_id, self.max_length)
        stem = unique_id[: self.max_length - 8]
        while unique_id in self.used_ids:
            suffix = self.last_suffixes[stem] = self.last_suffixes.get(stem, 1) + 1
            unique_id = f"{stem}_{suffix}"
        self.used_ids.add(unique_id)
        return unique_id


def is_normalized(turns: list[Turn], max_id_length: int) -> bool:
    """Whether `normalize_turns`, which takes far longer, would change nothing."""
    role = ""
    call_ids: list[str] = []  # of the turn before
    used_ids: set[str] = set()
    for turn in turns:
        if turn.role == role or not turn.blocks:
            return False
        role, earlier_ids, call_ids, result_count = turn.role, call_ids, [], 0
        for index, block in enumerate(turn.blocks):
            if isinstance(block, ToolResult):
                result_count += 1
                if index >= len(earlier_ids) or block.id != earlier_ids[index]:
                    return False
            elif isinstance(block, ToolCall):
                is_valid = block.id not in used_ids and wire_id(block.id, max_id_length) == block.id
                if role != "assistant" or not is_valid:
                    return False
                used_ids.add(block.id)
                call_ids.append(block.id)
            elif is_blank(block):
                return False
        if result_count < len(earlier_ids):
            return False
    return not call_ids


def normalize_turns(turns: list[Turn], max_id_length: int = MAX_CALL_ID_LENGTH) -> list[Turn]:
    """Turns in the order that every vendor demands.

    Each assistant turn with calls is followed by one user turn that begins with their results, in
    the order of the calls; missing results are filled in, as vendors otherwise reject the request.
    Each call has a unique valid id; a turn's equal calls are merged, and so are results of one
    call.  Results of unknown calls become plain content.
    """
    if is_normalized(turns, max_id_length):
        return turns
    normalized: list[Turn] = []
    call_ids = CallIds(max_id_length)
    results: list[Block] = []  # of the last assistant turn's calls
    #: the client's call id -> (our id, its turn's results, index there) of each missing result
    missing: dict[str, deque[tuple[str, list[Block], int]]] = {}
    last_results: dict[str, ToolResult] = {}  # by the client's call id
    for turn in merge_turns(turns):
        blocks: list[Block] = []
        normalized.append(Turn(turn.role, blocks))
        is_assistant = turn.role == "assistant"
        if is_assistant:
            results = []
            normalized.append(Turn("user", results))
        seen: set[tuple[str, str, str]] = set()
        called_ids: set[str] = set()
        for block in turn.blocks:
            if isinstance(block, ToolCall) and is_assistant:
                call_key = (block.id, block.name, block.arguments)
                if call_key in seen:
                    continue
                seen.add(call_key)
                if block.id not in called_ids:  # used again: results now belong to this turn
                    called_ids.add(block.id)
                    missing[block.id] = deque()
                    last_results.pop(block.id, None)
                call_id = call_ids.add(block.id)
                missing[block.id].append((call_id, results, len(results)))
                results.append(ToolResult(call_id, [Text(INTERRUPTED)], True))
                blocks.append(block if block.id == call_id else replace(block, id=call_id))
            elif is_assistant or not isinstance(block, ToolResult):
                blocks.append(block)
            elif missing.get(block.id):
                call_id, turn_results, index = missing[block.id].popleft()
                result = ToolResult(call_id, [*block.blocks], block.is_error, block.source)
                last_results[block.id] = turn_results[index] = result
            elif block.id in last_results:
                last_results[block.id].blocks.extend(block.blocks)
            else:
                blocks += [Text(f"[tool output for unknown call {block.id}]"), *block.blocks]
    return merge_turns(normalized)


def downgrade_system_turns(turns: list[Turn]) -> list[Turn]:
    """System turns as user text, marked as Claude Code does it (seen in 2.1.197, 2026-11)."""
    if all(turn.role != "system" for turn in turns):
        return turns
    downgraded = []
    for turn in turns:
        if turn.role == "system":
            texts = (block.text for block in turn.blocks if isinstance(block, Text))
            turn = Turn("user", [Text(as_reminder(text)) for text in texts])
        downgraded.append(turn)
    return merge_turns(downgraded)


def as_reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def is_reminder(text: str) -> bool:
    """Whether a coding agent, not a person, put the text into a user turn."""
    return text.lstrip().startswith("<system-reminder>")


def wire_table(names: Iterable[str]) -> dict[str, str]:
    """The client's names -> wire names, unique in any case; valid names stay if they can."""
    table: dict[str, str] = {}
    used: set[str] = set()
    for name in sorted(set(names), key=lambda name: (wire_name(name) != name, name)):
        candidate = wire_name(name)
        if candidate.lower() in used:
            candidate = f"{candidate[:55]}_{short_hash(name, 8)}"
        used.add(candidate.lower())
        table[name] = candidate
    return table


def wire_names(names: Iterable[str]) -> dict[str, str]:
    """wire name -> the client's, for a native body; raises InvalidRequest on a collision."""
    table: dict[str, str] = {}
    for name in names:
        other = table.setdefault(wire_name(name), name)
        if other != name:
            problem = f"{other!r} and {name!r} become the same name upstream; rename one."
            raise invalid("tools", problem)
    return table


def parse_arguments(text: str) -> Json:
    """A call's arguments as an object; text that is none becomes the value of `_raw`."""
    if text.strip() in ("", "null"):
        return {}
    value = load_object(text)
    return {"_raw": text} if value is None else value


def complete_arguments(text: str) -> str:
    """A call's arguments as the JSON text of an object, unchanged if they are one."""
    if load_object(text) is not None:
        return text.strip()
    return dump_json(parse_arguments(text)).decode()


def object_schema(schema: Any, path: str) -> Json:
    """A tool's JSON Schema with `type` and `properties`, as every vendor requires."""
    if schema is None:
        return {"type": "object", "properties": {}}
    completed = {**need_dict(schema, path), "type": "object"}
    completed.pop("$schema", None)
    completed.setdefault("properties", {})
    return completed


def clamp_effort(effort: str, supported: Iterable[str]) -> str | None:
    """The supported effort nearest to `effort`, lower ones first; None if there is none."""
    ranks = [EFFORTS.index(name) for name in supported if name in EFFORTS]
    if not ranks:
        return None
    not_above = [rank for rank in ranks if rank <= EFFORTS.index(effort)]
    return EFFORTS[max(not_above) if not_above else min(ranks)]


EFFORT_BUDGETS = {
    "minimal": 1024, "low": 4096, "medium": 10_000, "high": 24_000, "xhigh": 31_999, "max": 31_999,
}  # fmt: skip


def effort_of_budget(budget: int) -> str:
    return ("low", "medium", "high")[bisect_left((4096, 16_384), budget)]


def clamp_budget(budget: int, limits: tuple[int, int] | None, max_tokens: int) -> int | None:
    """A thinking budget that the model accepts; None if there is no room for thinking."""
    low, high = limits or (MIN_THINKING_BUDGET, max_tokens)
    budget = min(max(budget, low, MIN_THINKING_BUDGET), high, max_tokens - 1)
    return budget if budget >= max(low, MIN_THINKING_BUDGET) else None


STOP_FIELDS = {"chat": "stop", "messages": "stop_sequences"}


def split_stops(stops: list[str], dialect: str, model: Model) -> tuple[list[str], list[str]]:
    """(stop strings the upstream takes, stop strings to be applied here)"""
    if dialect in ("responses", "kiro"):
        return [], stops
    limit = MAX_CHAT_STOPS if model.stops is None else model.stops
    if dialect == "messages" or model.vendor == "Anthropic":  # Claude refuses blank ones
        blank = [stop for stop in stops if not stop.strip()]
        stops = [stop for stop in stops if stop.strip()]
        if dialect == "messages":
            return stops, blank
        return stops[:limit], [*blank, *stops[limit:]]
    return stops[:limit], stops[limit:]


#: dialect -> (parent, key) of the fields that ask for structured output
OUTPUT_FIELDS = {
    "chat": (("", "response_format"),), "responses": (("text", "format"),),
    "messages": (("output_config", "format"), ("", "output_format")),
}  # fmt: skip


def wanted_output(body: Json, dialect: str) -> OutputFormat | None:
    for parent, key in OUTPUT_FIELDS[dialect]:
        entry = dict_field(dict_field(body, parent) if parent else body, key, parent)
        path = join_path(parent, key)
        kind = word_field(entry, "type", ("text", "json_object", "json_schema"), path)
        if kind == "json_object":
            return OutputFormat(None)
        if entry and kind != "text":
            if dialect == "chat":
                entry, path = dict_field(entry, "json_schema", path), f"{path}.json_schema"
            return OutputFormat(
                dict_field(entry, "schema", path),
                str_field(entry, "name", path) or "structured_output",
                bool_field(entry, "strict", path),
                str_field(entry, "description", path) or "",
            )
    return None


# The tool whose input is the structured output of models that have no field for a schema.
OUTPUT_TOOL = "structured_output"


def is_wrapped(output: OutputFormat) -> bool:
    """Whether OUTPUT_TOOL takes the output as `value`, as the input of a tool is an object."""
    schema = output.schema or {"type": "object"}
    return "properties" not in schema and schema.get("type") != "object"


def output_instruction(output: OutputFormat) -> str:
    if not output.schema:
        return "Reply with one JSON object and nothing else: no prose, no code fence."
    return (
        "Reply with one JSON value that is valid against this JSON Schema, and nothing else: "
        f"no prose, no code fence.\n{dump_json(output.schema).decode()}"
    )


# Magic numbers, in base64: clients send wrong media types.
IMAGE_SIGNATURES = {
    "iVBORw0KGgo": "image/png", "/9j/": "image/jpeg", "R0lGOD": "image/gif", "UklGR": "image/webp",
}  # fmt: skip
DATA_URL = re.compile(r"data:([\w.+/-]{0,100})(?:;[\w=.+-]{1,300}){0,8}?(;base64)?,", re.ASCII)


def image_type(data: str, declared: str, path: str) -> str:
    for prefix, kind in IMAGE_SIGNATURES.items():
        if data.startswith(prefix):
            return kind
    declared = "image/jpeg" if declared == "image/jpg" else declared
    if declared not in IMAGE_SIGNATURES.values():
        shown = declared or "of unknown type"
        raise unsupported(path, f"images must be PNG, JPEG, GIF or WebP, not {shown!r}.")
    return declared


def base64_image(data: str, declared: str, path: str) -> Image:
    if any(blank in data[:200] for blank in "\n\r "):
        data = "".join(data.split())  # some programs wrap it
    return Image(image_type(data, declared, path), data, path=path)


def read_data_url(url: str, path: str) -> tuple[str, str]:
    """(media type, base64 data)"""
    match = DATA_URL.match(url)
    if match is None:
        raise invalid(path, "is not a valid data URL.")
    data = url[match.end() :]
    if not match[2]:
        if data.count("%") > MAX_URL_ESCAPES:
            raise invalid(path, "a data URL this long must be base64.")
        data = base64.b64encode(urllib.parse.unquote_to_bytes(data)).decode()
    return match[1].lower(), data


def read_image_url(url: str, path: str) -> Image:
    """An image from a data URL or an https URL; the gateway never fetches it."""
    if url.startswith("data:"):
        media_type, data = read_data_url(url, path)
        return base64_image(data, media_type, path)
    if url.startswith("https://"):
        return Image(url=url, path=path)
    raise unsupported(path, "must be a data URL or an https URL.")


# Cost of a UTF-8 byte in 1/64 token: for Claude up to 4.6, Claude from 4.7 on, OpenAI.  A character
# is charged on its first byte.  Fitted in 2026-11 by least squares of the relative error over 1870
# samples (prose in 30 languages, code, JSON, tool output, chats, numbers) against o200k_base and a
# public reconstruction of Claude's counts, then raised by 5 %: a client that compacts too late
# fails.  Digits are set between prose (1 token a digit) and ids (1/3).
BYTE_PRICES: tuple[tuple[bytes, int, int, int], ...] = (
    (b"aiotcpsvbfym", 11, 18, 13), (b"erlnwgdukh", 17, 23, 11), (b"jqxz", 99, 138, 78),
    (b"ABCDEFGHILMNOPRSTU", 26, 63, 18), (b"JKQVWXYZ", 103, 126, 84), (b"0123456789", 47, 47, 47),
    (b" \r", 10, 8, 8), (b"\t\n", 82, 73, 65), (b'"#=;`*{}', 21, 33, 22),
    (b"()[]\\|.:'-/_,", 54, 62, 35), (b"!$%&+<>?@^~", 66, 69, 58),
    (bytes(range(0xC2, 0xC3)), 44, 36, 44),  # signs of Latin-1
    (bytes(range(0xC3, 0xCA)), 151, 160, 86),  # accented Latin
    (bytes(range(0xCA, 0xD0)), 52, 52, 26),  # Greek, modifiers
    (bytes(range(0xD0, 0xD4)), 28, 28, 18),  # Cyrillic
    (bytes(range(0xD4, 0xE0)), 54, 53, 32),  # Armenian, Hebrew, Arabic
    (bytes(range(0xE0, 0xE2)), 63, 63, 29),  # scripts of India, Thai, Georgian
    (bytes(range(0xE2, 0xE3)), 88, 112, 59),  # signs, lines, arrows
    (bytes(range(0xE3, 0xE4)), 57, 57, 50),  # kana
    (bytes(range(0xE4, 0xEA)), 73, 74, 50),  # ideographs
    (bytes(range(0xEA, 0xEE)), 90, 90, 47),  # Hangul
    (bytes(range(0xEE, 0xF0)), 99, 109, 31),  # full-width forms
    (bytes(range(0xF0, 0xF5)), 210, 190, 145),  # emoji
)  # fmt: skip


def build_price_table(tokenizer: int) -> bytes:
    """One column of BYTE_PRICES, indexed by byte."""
    table = bytearray(256)
    table[:32] = bytes([64]) * 32  # most control characters are tokens of their own
    for characters, *prices in BYTE_PRICES:
        for byte in characters:
            table[byte] = prices[tokenizer]
    return bytes(table)


CLAUDE_PRICES, NEW_CLAUDE_PRICES, OPENAI_PRICES = map(build_price_table, range(3))
CLAUDE_VERSION = re.compile(r"claude-[a-z]+-(\d+)(?:[.-](\d)(?!\d))?")
OPENAI_MODEL = re.compile(r"gpt|codex|\bo[1-9]\b")


def claude_version(model_id: str) -> tuple[int, int] | None:
    """(4, 8) for `claude-opus-4.8`; None for other names."""
    match = CLAUDE_VERSION.match(model_id)
    return (int(match[1]), int(match[2] or 0)) if match else None


def byte_prices(model: str) -> bytes:
    """The byte prices of a model's tokenizer; those of Claude up to 4.6 if it is unknown."""
    name = model.rpartition("/")[2].lower()
    if (claude_version(name) or (0, 0)) >= (4, 7):
        return NEW_CLAUDE_PRICES
    return OPENAI_PRICES if OPENAI_MODEL.search(name) else CLAUDE_PRICES


def sum_bytes(data: bytes) -> int:
    """`sum(data)` in a tenth of the time: Adler-32's low half, which 256 bytes cannot overflow."""
    if len(data) <= 256:
        return (zlib.adler32(data) & 0xFFFF) - 1
    view = memoryview(data)
    starts = range(0, len(data), 256)
    return sum(zlib.adler32(view[start : start + 256]) & 0xFFFF for start in starts) - len(starts)


def estimate_text(text: str, prices: bytes = CLAUDE_PRICES) -> float:
    """Approximate tokens: a sum over UTF-8 bytes, so additive under concatenation."""
    return sum_bytes(text.encode("utf-8", "replace").translate(prices)) / 64


def estimate_image(data: str) -> float:
    """Tokens of a base64 image: width * height / 750, at most 1600 (Anthropic's rule)."""
    try:
        header = base64.b64decode(data[:44], validate=True)
    except ValueError:
        header = b""
    if len(header) < 24 or header[12:16] != b"IHDR":  # not a PNG
        return 1500.0
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    return min(1600.0, width * height / 750)


IMAGE_KEYS = ("data", "url", "image_url", "file_data")


def estimate_value(value: Any, prices: bytes = CLAUDE_PRICES, key_tokens: float = 1.5) -> float:
    """Tokens of any part of a request body; base64 images count by their size."""
    total = 0.0
    texts: list[str] = []
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        key, item = pending.pop()
        if isinstance(item, str):
            if len(item) <= 256 or key not in IMAGE_KEYS:
                texts.append(item)
            else:
                total += estimate_image(item.partition(",")[2] if item[:5] == "data:" else item)
        elif isinstance(item, dict):
            total += key_tokens * len(item)
            pending += item.items()
        elif isinstance(item, list):
            pending += [(key, child) for child in item]
        else:
            total += 1
    return total + estimate_text("".join(texts), prices)


def estimate_request(body: Json, model: str = "") -> int:
    """Approximate input tokens of a chat, messages or responses body, at least 2.

    What vendors add for tools, and what a key of a tool's schema costs, was measured in 2026-11:
    Claude gets JSON and some 500 tokens of instructions, OpenAI's models terser declarations.
    """
    prices = byte_prices(model or str(body.get("model") or ""))
    is_claude_like = prices is not OPENAI_PRICES
    turns = body.get("messages") or body.get("input")
    total = 3.0 + (4 * len(turns) if isinstance(turns, list) else 4)
    for key in ("system", "instructions", "messages", "input"):
        total += estimate_value(body[key], prices) if key in body else 0
    for key in ("tools", "functions"):
        if body.get(key):
            total += estimate_value(body[key], prices, 4.5 if is_claude_like else 1.5)
            total += 500 if is_claude_like else 16
    return max(2, int(total) + 1)


# ---- 8. Dialects -------------------------------------------------------------------------------
#
# 8.1 what all dialects share


@dataclass(slots=True)
class RequestInfo:
    """The facts that routing and billing need from a request body, read without converting it."""

    model: str
    stream: bool
    include_usage: bool
    initiator: str  #: X-Initiator: "user" when a person spoke last, "agent" in a tool loop
    session: str  #: a stable key of the conversation; "" if the client sends none
    opening: str  #: the opening text: identifies conversations that have no key
    size: int = 0  #: request body size in bytes


@dataclass
class ResponseContext:
    """What shapes one response besides the upstream's bytes."""

    id: str
    created: int  #: Unix seconds
    model: str  #: the model name the client used
    include_usage: bool = False
    names: dict[str, str] = field(default_factory=dict)  #: upstream tool name -> the client's
    legacy_functions: bool = False  #: respond in the `function_call` shape of 2023
    rewritten: bool = False  #: converted even to its own dialect: some tools are not the client's
    output: OutputFormat | None = None  #: structured output, if the upstream does not guarantee it
    invalid_output: bool = False  #: the text should have been JSON
    hide_thinking: bool = False  #: send thinking blocks without their text
    stop_strings: list[str] = field(default_factory=list)  #: stop sequences that are enforced here
    multiple_choices: bool = False  #: n > 1: choices must not be merged
    request_body: Json = field(default_factory=dict)  #: the client's request body, for estimates
    #: called with (call ids, reasoning text, signature) that the client's dialect cannot carry
    store_reasoning: Callable[[list[str], str, str], None] | None = None
    tools: dict[str, Tool] = field(default_factory=dict)  #: the offered ones, by the client's names
    provider: str = ""  #: name of the upstream's provider
    upstream_model: str = ""  #: what `model` stands for, if that is known
    #: upstream model id -> context window (0 = unknown), for an upstream that reports a percentage
    window: Callable[[str], int] | None = None
    tagged_thinking: bool = False  #: the prompt demands that thinking is put between tags
    secrets: Callable[[], Iterable[str]] = tuple  #: tokens that no error message may show

    @functools.cached_property
    def input_estimate(self) -> int:
        return estimate_request(self.request_body, self.upstream_model)

    @functools.cached_property
    def prices(self) -> bytes:
        return byte_prices(self.upstream_model or self.model)

    def keep_reasoning(self, call_ids: list[str], text: str, signature: str) -> None:
        """For the turn after these calls."""
        if call_ids and signature and self.store_reasoning:
            self.store_reasoning(call_ids, text, signature)

    def estimate(self, text: str) -> float:
        """Approximate tokens of a part of the response."""
        return estimate_text(text, self.prices) if text else 0.0


Delta = tuple[str, str]  # (text, thinking, arguments, input or refusal; what is appended to it)


class Framing(Protocol):
    """Upstream bytes -> server-sent events -> frames.  All methods raise UpstreamError.

    `complete` returns the events that `data` completes, unparsed; `frames` parses them, and one
    that cannot be parsed becomes an error frame and ends the list.  `last_frames`, called at EOF,
    returns what was buffered, and raises also if the stream was cut off.
    """

    def complete(self, data: bytes) -> bytes: ...
    def frames(self, blocks: bytes) -> list[Json]: ...
    def last_frames(self) -> list[Json]: ...


class Reader(Protocol):
    """Frames of a dialect in, events out; `end` returns those held back until EOF."""

    def read(self, frame: Json) -> list[Event]: ...
    def end(self) -> list[Event]: ...
    def track(self, kind: str, text: str) -> None:
        """Keeps the text of deltas that were copied, and so were not read."""
        return


class Writer(Protocol):
    """Events in, frames of a dialect out."""

    def write(self, event: Event) -> list[Json]: ...
    def track(self, kind: str, text: str) -> None:
        """Keeps the text of deltas that were copied, and so were not written."""
        return


class Relay(Protocol):
    """Native frames in, native frames out: repaired, and read for their usage.

    `repair` raises ApiError if the frame is an error; `end` returns the frames that close the
    response, and raises UpstreamError if it was incomplete.  `track` takes the text of deltas that
    were copied; it raises UpstreamError, and changes nothing, if they must not be.
    """

    usage: Usage
    output_estimate: float  #: estimated output tokens so far

    @property
    def finished(self) -> bool: ...
    def repair(self, frame: Json) -> list[Json]: ...
    def end(self) -> list[Json]: ...
    def track(self, kind: str, text: str) -> None: ...


class UpstreamDialect(Protocol):
    """The half of a dialect that writes requests to an upstream and reads its responses.

    `write_request` returns the body of a streaming request; `expand`, the frames equivalent to a
    non-streaming response; `read_delta`, (kind, text) of a frame that only extends a text, thinking
    or arguments.
    """

    name: str

    def write_request(self, chat: Conversation, model: Model) -> Json: ...
    def reader(self, context: ResponseContext) -> Reader: ...
    def expand(self, response: Json) -> list[Json]: ...
    def read_delta(self, frame: Json) -> Delta | None: ...
    def framing(self) -> Framing:
        return SseReader()


class Dialect(UpstreamDialect, Protocol):
    """One wire format, both ways.  Dialects never see each other.

    `request_info` and `read_request` raise InvalidRequest; `aggregate` returns the non-streaming
    response equivalent to a finished stream of frames.
    """

    id_prefix: str  #: prefix of its response ids
    tail: bytes = b""  #: ends every stream
    is_numbered: bool = False  #: its frames carry a `sequence_number`

    def request_info(self, body: Json) -> RequestInfo: ...
    def read_request(self, body: Json) -> Conversation: ...
    def writer(self, context: ResponseContext) -> Writer: ...
    def relay(self, context: ResponseContext) -> Relay: ...
    def aggregate(self, frames: list[Json]) -> Json: ...
    def error_body(self, error: ApiError, request_id: str) -> Json: ...
    def error_frames(
        self, error: ApiError, request_id: str, context: ResponseContext, has_output: bool
    ) -> list[Json]:
        """The frames that end a stream with an error; `has_output`: others were sent before."""
        return [self.error_body(error, request_id)]

    def error_status(self, error: ApiError) -> int:
        return error.status

    def encode(self, frame: Json) -> bytes:
        """One event on the wire; Anthropic's clients discard events without an `event:` line."""
        return write_sse(frame, frame["type"])

    def ping(self, has_output: bool) -> bytes:
        """A keep-alive in the form that its clients accept."""
        return SSE_COMMENT_PING

    def keepalive_frame(self, context: ResponseContext) -> Json | None:
        """A frame that serves as keep-alive, if its clients do not accept a ping."""
        return None


def dump_text(value: Any) -> str:
    return dump_json(value).decode()


def flag_field(body: Json, key: str) -> bool:
    return bool_field(body, key) or False


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part.get("text") for part in content if isinstance(part, dict))
    return "\n".join(text for text in parts if isinstance(text, str))


def need_dicts(items: Iterable[Any], path: str) -> Iterator[tuple[str, Json]]:
    """(path, object) for each item; raises InvalidRequest for an item of another type."""
    for index, item in enumerate(items):
        item_path = f"{path}.{index}"
        yield item_path, need_dict(item, item_path)


def dict_items(obj: Json, key: str, path: str = "") -> Iterator[tuple[str, Json]]:
    """As `need_dicts`, for the list at `key`."""
    return need_dicts(list_field(obj, key, path), join_path(path, key))


def object_list(body: Json, key: str) -> list[Json]:
    """Raises InvalidRequest unless the value at `key` is a non-empty list of objects."""
    objects = [item for _, item in dict_items(body, key)]
    if not objects:
        raise invalid(key, "is required." if body.get(key) is None else "must not be empty.")
    return objects


def message_list(body: Json) -> list[Json]:
    return object_list(body, "messages")


def opening_text(system: Any, messages: list[Json]) -> str:
    """System prompt and first user message: the same in every request of one conversation."""
    users = (message for message in messages if message.get("role") == "user")
    return text_of(system) + "\0" + text_of(next(users, {}).get("content"))


def has_content(content: Any) -> bool:
    """Whether anything is left of a message when blank texts are dropped."""
    if not isinstance(content, list):
        return bool(text_of(content).strip())
    return any(not isinstance(p, dict) or str(p.get("text", "-")).strip() for p in content)


def read_initiator(entries: list[Json]) -> str:
    """`user` if a person wrote the last message or item that goes up, otherwise `agent`.

    What a developer or a coding agent adds to a tool's result is no person's.
    """
    for entry in reversed(entries):
        role, content = entry.get("role"), entry.get("content")
        if role in ("system", "developer") or (role == "user" and not has_content(content)):
            continue
        if role != "user":
            return "agent"
        parts = get_dicts(entry, "content")
        if not any(part.get("type") == "tool_result" for part in parts):
            return "user"
        texts = (get_text(part, "text") for part in parts)
        return "agent" if all(map(is_reminder, filter(str.strip, texts))) else "user"
    return "user"


IMAGE_PARTS = ("image", "image_url", "input_image", "computer_screenshot")


def has_image(value: Any) -> bool:
    """Whether messages, items or parts hold an image, at any depth and in any vendor's shape."""
    if isinstance(value, list):
        return any(map(has_image, value))
    if not isinstance(value, dict):
        return False
    nested = (value.get(key) for key in ("content", "output", "source"))
    return value.get("type") in IMAGE_PARTS or any(map(has_image, nested))


def last_user_text(body: Json) -> str:
    """What the user said last, in any dialect; tool results and images are no text."""
    turns = body.get("messages", body.get("input"))
    if isinstance(turns, str):
        return turns
    users = (turn for turn in reversed(turns or ()) if turn.get("role") == "user")
    return next(filter(None, (text_of(turn.get("content")) for turn in users)), "")


CHOICE_MODES = ("auto", "none", "required")  # OpenAI's string forms, in both of its dialects
CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESPONSES_ROLES = CHAT_ROLES[:4]
MESSAGES_ROLES = ("user", "assistant", "system")


def read_role(message: Json, roles: Iterable[str], path: str) -> str:
    return word_field(message, "role", roles, path) or need_str(message, "role", path)


def read_stops(body: Json, key: str) -> list[str]:
    """The stop sequences at `key`, a list or one string; empty ones are ignored."""
    value = body.get(key)
    stops: list[Any] = [value] if isinstance(value, str) else list_field(body, key)
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise wrong_type(f"{key}.{index}", "a string")
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise invalid(key, f"must not exceed {MAX_STOP_CHARACTERS} characters in total.")
    return [stop for stop in stops if stop]


def function_of(entry: Json, path: str) -> Json:
    """The object that names the function of a tool, call or choice: nested, or the entry itself."""
    return dict_field(entry, "function", path) or dict_field(entry, "custom", path) or entry


def allowed_names(choice: Json, path: str) -> set[str]:
    """The names in an `allowed_tools` choice; a server-side tool has none."""
    items = dict_items(choice, "tools", path)
    entries = [(function_of(item, item_path), item_path) for item_path, item in items]
    return {str_field(entry, "name", item_path) or "" for entry, item_path in entries}


# Content parts.  Clients mix the vendors' shapes (Cursor and Zed send Anthropic's to OpenAI's
# endpoint, seen in 2026-07), so one table reads them all, for every dialect.


PartReader = Callable[[Json, str], list[Block]]  # (a part, its path in the request)


def text_reader(key: str, prefix: str = "") -> PartReader:
    return lambda part, path: [Text(prefix + need_str(part, key, path))]


def read_image_url_part(part: Json, path: str) -> list[Block]:
    value = part.get("image_url")
    url_path = f"{path}.image_url"
    url = need_str(value, "url", url_path) if isinstance(value, dict) else value
    if not isinstance(url, str):
        if part.get("file_id"):
            raise UnsupportedFeature(f"{path}.file_id: the gateway stores no files.", param=path)
        raise wrong_type(url_path, "an object with a url")
    image = read_image_url(url, url_path)
    detail = (value if isinstance(value, dict) else part).get("detail")
    image.detail = detail if detail in ("low", "high") else ""
    return [image]


def read_image_part(part: Json, path: str) -> list[Block]:
    source, source_path = dict_field(part, "source", path), f"{path}.source"
    if source.get("type") == "url":
        return [read_image_url(need_str(source, "url", source_path), f"{source_path}.url")]
    if source.get("type") != "base64":
        raise UnsupportedFeature(f"{source_path}: must be base64 or an https url.", param=path)
    data = need_str(source, "data", source_path)
    media_type = str_field(source, "media_type", source_path) or ""
    if data.startswith("data:"):  # a data URL in place of bare base64
        media_type, data = read_data_url(data, f"{source_path}.data")
    return [base64_image(data, media_type, path)]


def read_file_part(part: Json, path: str) -> list[Block]:
    entry = dict_field(part, "file", path) or part
    data = str_field(entry, "file_data", path)
    title = str_field(entry, "filename", path) or ""
    if not data:
        raise unsupported(path, "files must be sent as file_data; the gateway fetches none.")
    if not data.startswith("data:"):
        data = "data:application/pdf;base64," + data
    media_type, payload = read_data_url(data, path)
    if media_type.startswith("text/"):
        try:
            text = base64.b64decode(payload, validate=True).decode("utf-8", "replace")
        except ValueError:
            raise invalid(path, "is not valid base64.") from None
        return [Document(media_type, text=text, title=title, path=path)]
    if media_type != "application/pdf":
        raise unsupported(path, "files must be PDF or text.")
    return [Document(media_type, payload, title=title, path=path)]


def read_document_part(part: Json, path: str) -> list[Block]:
    source, source_path = dict_field(part, "source", path), f"{path}.source"
    title, kind = str_field(part, "title", path) or "", source.get("type")
    if kind == "content":
        blocks = read_parts(source.get("content"), f"{source_path}.content")
        return [Text(f"[{title}]"), *blocks] if title else blocks
    if kind not in ("base64", "text"):
        problem = "must be base64, text or content; the gateway fetches none."
        raise UnsupportedFeature(f"{source_path}: {problem}", param=path)
    data = need_str(source, "data", source_path)
    if kind == "text":
        return [Document("text/plain", text=data, title=title, path=path)]
    media_type = str_field(source, "media_type", path) or "application/pdf"
    return [Document(media_type, data, title=title, path=path)]


def read_search_result_part(part: Json, path: str) -> list[Block]:
    lines = [str_field(part, "title", path) or "", str_field(part, "source", path) or ""]
    return [Text("\n".join([*filter(None, lines), text_of(part.get("content"))]))]


def read_tool_use_part(part: Json, path: str) -> list[Block]:
    arguments = dump_text(part.get("input") if part.get("input") is not None else {})
    return [ToolCall(need_str(part, "id", path), need_str(part, "name", path), arguments)]


def read_tool_result_part(part: Json, path: str) -> list[Block]:
    blocks = read_parts(part.get("content"), f"{path}.content")
    is_error = bool_field(part, "is_error", path) or False
    return [ToolResult(need_str(part, "tool_use_id", path), blocks, is_error)]


def read_thinking_part(part: Json, path: str) -> list[Block]:
    values = (str_field(part, key, path) or "" for key in ("thinking", "signature", "data"))
    return [Thinking(*values)]


def read_server_tool_part(part: Json, path: str) -> list[Block]:
    """A server-side tool's block as one text line: other vendors cannot verify the original."""
    if part.get("type") == "server_tool_use":
        return [Text(f"[{part.get('name')}: {dump_text(part.get('input'))}]")]
    content, lines = part.get("content"), []
    for entry in content if isinstance(content, list) else [content]:
        if isinstance(entry, dict):
            values = (entry.get(key) for key in ("title", "url", "text", "error_code", "tool_name"))
            lines.append(" ".join(value for value in values if isinstance(value, str)))
    return [Text("[" + "\n".join(filter(None, lines)) + "]")]


def refuse_part(part: Json, path: str) -> list[Block]:
    raise UnsupportedFeature(f"{path}.type: {part['type']} is not supported here.", param=path)


read_text_part = text_reader("text")
# All tools are always sent, also those that a client's search has yet to find.
read_tool_reference_part = text_reader("tool_name", "Tool available: ")
PART_READERS: dict[str, PartReader] = {
    "text": read_text_part, "input_text": read_text_part, "output_text": read_text_part,
    "compaction": text_reader("content"),  # a summary of earlier turns
    "refusal": lambda part, path: [Refusal(need_str(part, "refusal", path))],
    "thinking": read_thinking_part, "redacted_thinking": read_thinking_part,
    "image": read_image_part, "image_url": read_image_url_part, "input_image": read_image_url_part,
    "document": read_document_part, "file": read_file_part, "input_file": read_file_part,
    "tool_use": read_tool_use_part, "tool_result": read_tool_result_part,
    "tool_reference": read_tool_reference_part, "server_tool_use": read_server_tool_part,
    "search_result": read_search_result_part, "fallback": lambda *_: [],
    "container_upload": refuse_part, "input_audio": refuse_part,
}  # fmt: skip


def part_reader(part: Json) -> PartReader | None:
    kind = get_text(part, "type")
    return read_server_tool_part if kind.endswith("_tool_result") else PART_READERS.get(kind)


def is_known_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part_reader(part) is not None)


def read_parts(content: Any, path: str) -> list[Block]:
    """The blocks of a message's content: null, a string, or a list of parts of any vendor."""
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise wrong_type(path, "a string or a list of parts")
    blocks: list[Block] = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            blocks.append(Text(part))
            continue
        part_path = f"{path}.{index}"
        reader = part_reader(need_dict(part, part_path))
        if reader is None and not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{part_path}.type: is not a known part type.", param=part_path)
        blocks += (reader or read_text_part)(part, part_path)
    return blocks


def join_texts(blocks: Iterable[Block]) -> str:
    return "\n\n".join(block.text for block in blocks if isinstance(block, (Text, Refusal)))


# Anthropic's client-side tools, which come without a schema (formats seen in 2026-09).
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
INTEGERS = {"type": "array", "items": INTEGER}
EDITING: Json = {
    "path": STRING, "file_text": STRING, "old_str": STRING, "new_str": STRING,
    "insert_line": INTEGER, "insert_text": STRING,
}  # fmt: skip
EDITOR_COMMAND = {**STRING, "enum": ["view", "create", "str_replace", "insert"]}
EDITOR: Json = {"command": EDITOR_COMMAND, **EDITING, "view_range": INTEGERS}
MEMORY: Json = {"command": STRING, **EDITING, "old_path": STRING, "new_path": STRING}
#: family of tools -> (required properties, all properties)
CLIENT_TOOLS: dict[str, tuple[list[str], Json]] = {
    "bash": ([], {"command": STRING, "restart": {"type": "boolean"}}),
    "text_editor": (["command", "path"], EDITOR),
    "memory": (["command"], MEMORY),
    "computer": (["action"], {"action": STRING, "coordinate": INTEGERS, "text": STRING}),
}


def client_tool_schema(kind: str) -> Json | None:
    """The schema of `bash_20250124` and the like; None for server-side tools."""
    for family, (required, properties) in CLIENT_TOOLS.items():
        if kind.startswith(family + "_2"):
            schema = {"type": "object", "properties": properties}
            return {**schema, "required": required} if required else schema
    return None


def drop_server_tools(
    names: list[str], tool_count: int, forced_name: str, dropped: list[str]
) -> None:
    """Drops server-side tools; raises UnsupportedFeature if one is forced or no other is left."""
    for name in names:
        if name == forced_name or not tool_count:
            raise UnsupportedFeature(f"{name} is not available on this model.", param="tools")
        dropped.append(f"tools.{name}")


def tool_names(body: Json, path: str = "") -> list[str]:
    names = []
    for item_path, item in dict_items(body, "tools", path):
        entry = function_of(item, item_path)
        if entry.get("type") == "namespace":
            names += tool_names(entry, item_path)
        name = str_field(entry, "name", item_path)
        names += [] if name is None else [name]
    return names


def read_figure(value: Any, low: float = -MAX_FIGURE, high: float = MAX_FIGURE) -> float | None:
    """An upstream's number if it is one from `low` to `high`; None for anything else.

    All numbers from upstreams are read here: NaN, infinity or 10**400 would raise in int() or
    round(), or give an absurd date.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and low <= value <= high else None


def positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and read_figure(value, 1) else None


def get_int(obj: Json, key: str, default: int) -> int:
    """The non-negative integer at `key`, or `default`."""
    value = obj.get(key)
    return value if isinstance(value, int) and read_figure(value, 0) is not None else default


def get_float(obj: Json, key: str, high: float) -> float:
    """The number at `key` from 0 to `high`; 0 for anything else."""
    return read_figure(obj.get(key), 0, high) or 0.0


def get_dict(obj: Json, key: str) -> Json:
    """The object at `key`, or an empty one."""
    value = obj.get(key)
    return value if isinstance(value, dict) else {}


def get_dicts(obj: Json, key: str) -> list[Json]:
    """The objects in the list at `key`; an empty list for anything else."""
    value = obj.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def inline_refs(schema: Json, tool_count: int = MAX_TOOLS) -> Any:
    """A tool's schema with its `$ref`s replaced by the definitions that they name.

    Cycles become open values, and so does what would grow or go deep without bounds:
    definitions that name one another several times, long ones that many name.  `tool_count`: how
    many schemas share what may be added.
    """
    definitions = {**get_dict(schema, "definitions"), **get_dict(schema, "$defs")}
    root = {key: schema[key] for key in schema if key not in ("definitions", "$defs")}
    bytes_left = MAX_INLINED_BYTES // max(tool_count, MAX_TOOLS)

    def inline(value: Any, ancestors: tuple[str, ...], depth: int) -> Any:
        nonlocal bytes_left
        if ancestors:
            strings = value if isinstance(value, dict) else (value,)
            bytes_left -= INLINED_VALUE_BYTES + sum(
                len(text) for text in strings if isinstance(text, str)
            )
        if isinstance(value, list):
            return [inline(item, ancestors, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        siblings = dict(value)
        is_reference = isinstance(value.get("$ref"), str)  # a property may have that name
        name = siblings.pop("$ref").rpartition("/")[2] if is_reference else ""
        siblings = {key: inline(item, ancestors, depth + 1) for key, item in siblings.items()}
        if not is_reference:
            return siblings
        definition = get_dict(definitions, name)
        if not definition:
            return {"type": "object", **siblings}
        if name in ancestors or bytes_left < 0 or depth > MAX_JSON_DEPTH:
            return {key: definition[key] for key in ("type",) if key in definition} | siblings
        return {**inline(definition, (*ancestors, name), depth + 1), **siblings}

    return inline(root, (), 0)


EMPTY_SCHEMA: Json = {"type": "object", "properties": {}}
SCHEMA_UNIONS = ("allOf", "anyOf", "oneOf")
# Refused at the top by Claude and by GPT, so VS Code removes them (seen in 2026-11).
CONDITIONS = ("not", "if", "then", "else", "$ref")
MAX_ALTERNATIVES = 16  # of one property; beyond that any value is allowed
# Keywords whose value is no schema, though it may be an object or a list.
DATA_KEYWORDS = (
    "const", "default", "description", "enum", "examples", "required", "title", "type",
)  # fmt: skip


class SchemaRules(NamedTuple):
    """What a vendor takes of JSON Schema in the schema of a tool."""

    refused: frozenset[str] = frozenset()
    keywords: frozenset[str] = frozenset()  #: all that it knows, if that is known
    has_references: bool = True
    has_type_lists: bool = True  #: otherwise `nullable`
    closed: bool = False  #: objects that name their properties must allow no others


#: vendor of the model, or dialect -> its rules; others have the first
SCHEMA_RULES = {
    "": SchemaRules(frozenset(("$schema", "$id"))),
    "output_config": SchemaRules(frozenset(("$schema", "$id")), closed=True),
    # Gemini (seen in 2026-08)
    "Google": SchemaRules(
        keywords=frozenset((
            "anyOf", "description", "enum", "format", "items", "maxItems", "maxLength", "maximum",
            "minItems", "minLength", "minimum", "nullable", "pattern", "properties", "required",
            "title", "type",
        )),
        has_references=False,
        has_type_lists=False,
    ),
    # kiro-gateway and opencodex list more than others, 2026-08.
    "kiro": SchemaRules(
        frozenset((
            "$anchor", "$comment", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$ref",
            "$schema", "$vocabulary", "additionalProperties", "contains", "contentEncoding",
            "contentMediaType", "definitions", "dependentRequired", "dependentSchemas", "else",
            "exclusiveMaximum", "exclusiveMinimum", "format", "if", "maxItems", "maxLength",
            "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum",
            "multipleOf", "pattern", "patternProperties", "propertyNames", "then",
            "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
        )),
        has_references=False,
    ),
}  # fmt: skip


def adapt_schema(schema: Json, vendor: str, tool_count: int = MAX_TOOLS) -> Json:
    """A tool's schema as a vendor takes it: an object without unions at the top.

    What is valid for the original is valid for the result, which may allow more.  Results are
    cached and shared: clients repeat their tools in each request.
    """
    packed = marshal.dumps(schema, 0)
    key = vendor if vendor in SCHEMA_RULES else ""
    is_small = len(packed) <= MAX_CACHED_SCHEMA_BYTES
    adapt = adapt_packed_schema if is_small else adapt_packed_schema.__wrapped__
    return adapt(packed, key, max(tool_count, MAX_TOOLS))


@functools.lru_cache(maxsize=MAX_CACHED_SCHEMAS)
def adapt_packed_schema(packed: bytes, vendor: str, tool_count: int) -> Json:
    rules, schema = SCHEMA_RULES[vendor], marshal.loads(packed)
    if not rules.has_references or not schema.keys().isdisjoint((*SCHEMA_UNIONS, "$ref")):
        schema = inline_refs(schema, tool_count)
    adapted: Json = map_schema(fold_unions(schema), functools.partial(adapt_keywords, rules=rules))
    return {**adapted, "type": "object", "properties": get_dict(adapted, "properties")}


def fold_unions(schema: Json) -> Json:
    """An object's schema with the unions at its top folded into `properties` and `required`."""
    folded = {k: v for k, v in schema.items() if k not in (*SCHEMA_UNIONS, *CONDITIONS)}
    properties, required = {**get_dict(schema, "properties")}, required_names(schema)
    for keyword in SCHEMA_UNIONS:
        branches = [fold_unions(branch) for branch in get_dicts(schema, keyword)]
        alternatives: defaultdict[str, list[Json]] = defaultdict(list)
        for branch in branches:
            for name, value in get_dict(branch, "properties").items():
                alternatives[name].append(value if isinstance(value, dict) else {})
        for name, values in alternatives.items():
            is_all = keyword == "allOf"
            value = functools.reduce(merge_schemas, values) if is_all else any_schema(values)
            known = properties.get(name)
            properties[name] = merge_schemas(known, value) if isinstance(known, dict) else value
        counts = Counter(name for branch in branches for name in required_names(branch))
        needed = len(schema[keyword]) if branches else 0
        required += [name for name in counts if counts[name] == needed or keyword == "allOf"]
    if properties or "properties" in schema:
        folded["properties"] = properties
    return {**folded, "required": list(dict.fromkeys(required))} if required else folded


def required_names(schema: Json) -> list[str]:
    names = schema.get("required")
    names = names if isinstance(names, list) else []
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def merge_schemas(first: Json, second: Json) -> Json:
    """What is valid for both is valid for the result."""
    merged = {**second, **first}
    if "properties" in first and "properties" in second:
        shared = {**get_dict(second, "properties")}
        for name, value in get_dict(first, "properties").items():
            both = isinstance(value, dict) and isinstance(shared.get(name), dict)
            shared[name] = merge_schemas(value, shared[name]) if both else value
        merged["properties"] = shared
        merged.pop("additionalProperties", None)
    return merged


def any_schema(schemas: list[Json]) -> Json:
    """What is valid for one of them is valid for the result."""
    kinds = {dump_json(schema.get("type")) for schema in schemas}
    if all("const" in schema or "enum" in schema for schema in schemas):
        rows = [s["enum"] if isinstance(s.get("enum"), list) else [s.get("const")] for s in schemas]
        values = {dump_json(value): value for row in rows for value in row}
        kind = {"type": schemas[0].get("type")} if len(kinds) == 1 else {}
        return without_nulls({**kind, "enum": [*values.values()]})
    unique: list[Json] = []
    for schema in schemas:
        if schema not in unique:
            unique.append(schema)
        if len(unique) > MAX_ALTERNATIVES:
            return {}
    return unique[0] if len(unique) == 1 else {"anyOf": unique}


def map_schema(schema: Any, adapt: Callable[[Json], Json]) -> Any:
    """`schema` with `adapt` applied to it and all schemas inside, the innermost first.

    A property may have a keyword's name.  Boolean schemas become open ones.
    """
    if isinstance(schema, list):
        return [map_schema(item, adapt) for item in schema]
    if not isinstance(schema, dict):
        return {} if isinstance(schema, bool) else schema
    mapped: Json = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "$defs", "definitions"):
            named = get_dict(schema, keyword)
            value = {name: map_schema(item, adapt) or {} for name, item in named.items()}
        elif keyword not in DATA_KEYWORDS and isinstance(value, (dict, list)):
            value = map_schema(value, adapt)
        if value is not None or keyword in ("const", "default"):
            mapped[keyword] = value
    return adapt(mapped)


def adapt_keywords(schema: Json, rules: SchemaRules) -> Json:
    """One schema, whose inner ones are adapted, in the keywords that the vendor takes."""
    if isinstance(schema.get("items"), list):  # a tuple, in older drafts
        schema["items"] = {"anyOf": schema["items"]} if schema["items"] else {}
    elif schema.get("type") == "array":
        schema.setdefault("items", {})
    if rules.closed and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    names = required_names(schema)
    if "properties" in schema or rules.keywords:
        names = [name for name in names if name in get_dict(schema, "properties")]
    schema.pop("required", None)
    schema.update({"required": names} if names else {})
    parts = get_dicts(schema, "allOf")
    if parts and (rules.keywords or len(parts) == 1):
        schema = functools.reduce(merge_schemas, parts, {**schema, "allOf": None})
        del schema["allOf"]
    if rules.keywords and "const" in schema:
        schema.setdefault("enum", [schema["const"]])
    if rules.keywords and "oneOf" in schema:
        schema.setdefault("anyOf", schema["oneOf"])
    kinds = schema.get("type")
    if isinstance(kinds, list) and not rules.has_type_lists:
        value_kinds = [kind for kind in kinds if kind != "null"]
        schema["type"] = value_kinds[0] if value_kinds else "string"
        if "null" in kinds:
            schema["nullable"] = True
        if len(value_kinds) > 1 or "anyOf" in schema:
            alternatives = [{"type": kind} for kind in value_kinds]
            schema.setdefault("anyOf", alternatives)
            del schema["type"]
        if isinstance(schema.get("enum"), list):
            schema["enum"] = [value for value in schema["enum"] if value is not None]
    if rules.keywords and schema.get("format") not in ("enum", "date-time"):
        schema.pop("format", None)
    allowed = rules.keywords or schema.keys() - rules.refused
    return {keyword: value for keyword, value in schema.items() if keyword in allowed}


def read_copilot_usage(frame: Json, usage: Usage) -> None:
    """Copilot's own billing fields beside the usage: the true split of the prompt, and the price.

    `{"total_nano_aiu": 120000, "token_details": [{"token_type": "input", "token_count": 9}]}`,
    1e9 nano-AIU = 1 AI credit = 0.01 USD (seen in gh-aw-firewall, 2026-08).
    """
    billing = get_dict(frame, "copilot_usage")
    if "total_nano_aiu" in billing:
        usage.nano_credits = get_int(billing, "total_nano_aiu", usage.nano_credits)
        usage.credits_source = "reported"
    rows = get_dicts(billing, "token_details")
    counts = {str(row.get("token_type")): get_int(row, "token_count", 0) for row in rows}
    if "input" in counts:
        usage.input = counts["input"]
        usage.cache_read = counts.get("cache_read", usage.cache_read)
        usage.cache_write = counts.get("cache_write", usage.cache_write)


# Usage: the paths of a dialect's usage object, in order -> the fields of Usage.

CHAT_USAGE = {
    "prompt_tokens": "prompt", "completion_tokens": "output", "total_tokens": "total",
    "prompt_tokens_details.cached_tokens": "cache_read",
    "prompt_tokens_details.cache_write_tokens": "cache_write",
    "completion_tokens_details.reasoning_tokens": "reasoning",
}  # fmt: skip
MESSAGES_USAGE = {
    "input_tokens": "input", "cache_creation_input_tokens": "cache_write",
    "cache_read_input_tokens": "cache_read", "output_tokens": "output",
    "output_tokens_details.thinking_tokens": "reasoning",
}  # fmt: skip
RESPONSES_USAGE = {
    "input_tokens": "prompt", "input_tokens_details.cached_tokens": "cache_read",
    "input_tokens_details.cache_write_tokens": "cache_write", "output_tokens": "output",
    "output_tokens_details.reasoning_tokens": "reasoning", "total_tokens": "total",
}  # fmt: skip


def read_usage(holder: Json, table: dict[str, str], usage: Usage) -> bool:
    """Updates `usage` from the usage in a frame; False if it has none.

    A missing figure keeps its value from an earlier frame.
    """
    counts = get_dict(holder, "usage")
    if counts:
        usage.source = "reported"
        for path, name in reversed(table.items()):  # the prompt after the caches that it includes
            group, _, key = path.rpartition(".")
            figure = get_int(get_dict(counts, group) if group else counts, key, -1)
            if figure >= 0 and name != "total":
                setattr(usage, name, figure)
    if "copilot_usage" in holder:
        read_copilot_usage(holder, usage)
    return bool(counts)


def write_usage(usage: Usage, table: dict[str, str]) -> Json:
    counts: Json = {}
    for path, name in table.items():
        group, _, key = path.rpartition(".")
        holder = counts.setdefault(group, {}) if group else counts
        holder[key] = getattr(usage, name)
    return counts


def finalize_usage(usage: Usage, context: ResponseContext, output_estimate: float) -> Usage:
    """The usage to report at the end of a response; `output_estimate`: its output tokens.

    If the context size after the response is known, it is taken as input plus output (seen in
    2026-08; some read it as the input alone).
    """
    if usage.source == "reported":
        return usage
    output = usage.output or max(1, int(output_estimate))
    if usage.context:
        return replace(usage, input=max(0, usage.context - output), output=output, source="derived")
    return replace(usage, input=context.input_estimate, output=output, source="estimated")


INVALID = "invalid_request_error"
#: an error's kind -> OpenAI's type and code, Anthropic's type
ERROR_NAMES: dict[str, tuple[str, str | None, str]] = {
    "invalid_request": (INVALID, None, INVALID),
    "context_too_long": (INVALID, "context_length_exceeded", INVALID),
    "invalid_key": (INVALID, "invalid_api_key", "authentication_error"),
    "forbidden": (INVALID, "forbidden", "permission_error"),
    "model_not_found": (INVALID, "model_not_found", "not_found_error"),
    "unknown_url": (INVALID, "unknown_url", "not_found_error"),
    "not_stored": (INVALID, "not_found", "not_found_error"),
    "upgrade_refused": (INVALID, "websocket_not_supported", INVALID),
    "method_not_allowed": (INVALID, "method_not_allowed", INVALID),
    "request_timeout": (INVALID, "request_timeout", "timeout_error"),
    "body_too_large": (INVALID, "request_too_large", "request_too_large"),
    "unsupported_media_type": (INVALID, "unsupported_media_type", INVALID),
    "unsupported_encoding": (INVALID, "unsupported_content_encoding", INVALID),
    "rate_limited": ("requests", "rate_limit_exceeded", "rate_limit_error"),
    "quota_exceeded": ("insufficient_quota", "insufficient_quota", "rate_limit_error"),
    "limit_reached": ("insufficient_quota", "insufficient_quota", "rate_limit_error"),
    "upstream_error": ("server_error", "upstream_error", "api_error"),
    "not_signed_in": ("server_error", "provider_not_authenticated", "api_error"),
    "overloaded": ("server_error", "server_is_overloaded", "overloaded_error"),
    "upstream_timeout": ("server_error", "upstream_timeout", "timeout_error"),
    "internal": ("server_error", "internal_error", "api_error"),
}
#: codes and types of errors inside a stream, of any vendor
STREAM_ERRORS: dict[str, type[ApiError]] = {
    **dict.fromkeys(("overloaded_error", "server_is_overloaded", "model_overloaded"), Overloaded),
    **dict.fromkeys(("rate_limit_error", "rate_limit_exceeded", "rate_limited"), RateLimited),
    **dict.fromkeys(("insufficient_quota", "quota_exceeded"), QuotaExceeded),
    **dict.fromkeys((INVALID, "invalid_prompt", "content_filter"), InvalidRequest),
    "timeout_error": UpstreamTimeout,
}


def read_stream_error(value: Any) -> ApiError:
    """The error in an error frame: an object with message, type and code, or a string."""
    error = value if isinstance(value, dict) else {"message": value}
    text = redact(get_text(error, "message"), MAX_REFUSAL_TEXT) or "no reason given"
    code = get_text(error, "code")
    context_error = read_context_error(f"{code}: {text}")
    if context_error:
        return context_error
    for key in (code, get_text(error, "type")):
        error_type = STREAM_ERRORS.get(key.partition(":")[0])
        if error_type:
            return error_type(text, code=key if key == "invalid_prompt" else None)
    policy = code if code == "cyber_policy" else None
    return UpstreamError(f"The upstream failed during the response: {text}", code=policy)


# 8.2 OpenAI chat completions


CallKey = tuple[int, ...] | str  # identifies a call within a response
MAX_FAILED_PARSES = 8  # of one call's growing arguments; bounds the work


@dataclass(slots=True)
class StreamedCall:
    """A tool call being streamed."""

    key: CallKey
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)  #: the arguments, as received
    is_blank: bool = True
    complete: bool = False  #: its last fragment was received
    closed: bool = False
    sent_count: int = 0  #: number of pieces passed on
    parsed_count: int = 0  #: number of pieces when they were last parsed
    is_object: bool = False  #: whether these were a JSON object
    failed_parses: int = 0
    index: int = 0
    guard: RunawayGuard = field(default_factory=RunawayGuard)

    def add(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.is_blank = self.is_blank and text.isspace()

    def is_object_complete(self) -> bool:
        """Whether the arguments are a complete JSON object."""
        if self.pieces and self.pieces[-1].rstrip()[-1:] not in ("}", ""):
            return False
        if self.parsed_count != len(self.pieces):
            self.parsed_count = len(self.pieces)
            self.is_object = load_object("".join(self.pieces)) is not None
            self.failed_parses += not self.is_object
        return self.is_object

    def can_close(self) -> bool:
        """Whether no arguments follow; after too many parses only `complete` tells."""
        return self.complete or (
            self.failed_parses < MAX_FAILED_PARSES and self.is_object_complete()
        )


@dataclass(slots=True)
class BlockAssembler:
    """Interleaved calls, text and thinking -> events, in which blocks never overlap.

    One block is live; what arrives inside a live call waits until that call is complete: other
    calls first, then text.
    """

    signature_prefix: str
    events: list[Event] = field(default_factory=list)
    kind: str = ""  #: of the live block
    call: StreamedCall | None = None  #: the live one
    calls: dict[CallKey, StreamedCall] = field(default_factory=dict)
    unopened: deque[StreamedCall] = field(default_factory=deque)  #: calls whose name is known
    waiting: list[tuple[str, str]] = field(default_factory=list)  #: (kind, text) inside a call
    thinking: list[str] = field(default_factory=list)  #: text of the live thinking block
    signature: list[str] = field(default_factory=list)  #: of the live thinking block or the next
    signed_thinking: tuple[str, str] = ("", "")  #: the last signed text, and its signature
    unsigned: str = ""  #: text of the last thinking block, if it was closed without a signature

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def add_text(self, kind: str, text: str) -> None:
        """Adds to a block of `kind`, now or once the live call is complete."""
        if self.call is not None:
            if not self.call.can_close():
                self.waiting.append((kind, text))
                return
            self.close()
            self.release_text()
        if kind == "redacted":
            self.close()
            data = self.signature_prefix + text
            self.events += [BlockStart(kind, raw={"data": data}), BlockStop()]
            return
        if self.kind != kind:
            self.open(kind)
        if kind == "thinking":
            self.thinking.append(text)
        self.events.append(BlockDelta("text", text))

    def add_call(self, key: CallKey, call_id: str, name: str, text: str, is_last: bool) -> None:
        """Adds a fragment; repeated ids and names are ignored, and so are repeats of a call."""
        call = self.calls.get(key) or self.calls.setdefault(key, StreamedCall(key))
        if call.closed:
            return
        call.id = call.id or call_id
        if name and not call.name:
            call.name = name
            self.unopened.append(call)
        # Kiro may repeat the complete arguments in the last fragment.
        if not (call.complete or (is_last and text and call.is_object_complete())):
            call.add(text)
        if call is self.call and not is_last:
            self.send_arguments(call)
            return
        call.complete = call.complete or is_last
        self.advance(call)

    def advance(self, latest: StreamedCall) -> None:
        """Passes on what is ready of calls and text; `latest` is the call that grew last."""
        while self.call is not None or self.unopened:
            live = self.call
            if live is None:
                self.open("tool", self.unopened.popleft())
                continue
            self.send_arguments(live)
            if not (live.complete or (latest is not live and live.can_close())):
                return
            self.close()
        self.release_text()

    def release_text(self) -> None:
        waiting, self.waiting = self.waiting, []
        for kind, text in waiting:
            self.add_text(kind, text)

    def send_arguments(self, call: StreamedCall) -> None:
        """A short run of leading blanks is held back: it may be all."""
        if call.sent_count < len(call.pieces) and not (
            call.is_blank and len(call.pieces) <= MAX_BLANK_RUN
        ):
            text = "".join(call.pieces[call.sent_count :])
            call.sent_count = len(call.pieces)
            self.events.append(BlockDelta("arguments", text))

    def track(self, kind: str, text: str) -> None:
        """Keeps the text of copied deltas of the live block."""
        if kind == "thinking":
            self.thinking.append(text)
        elif kind == "arguments" and self.call is not None:
            self.add_call(self.call.key, "", "", text, is_last=False)
            self.events.clear()

    def open(self, kind: str, call: StreamedCall | None = None) -> None:
        self.close()
        self.kind, self.call = kind, call
        if call is None:
            self.events.append(BlockStart(kind))
            return
        call.id = call.id or f"call_{short_hash(f'{call.name}{call.key}', 16)}"
        self.events.append(BlockStart(kind, call.id, call.name))

    def close(self) -> None:
        if not self.kind:
            return
        if self.call is not None:
            self.send_arguments(self.call)
            self.call.closed = True
        elif self.kind == "thinking":
            text, signature = "".join(self.thinking), "".join(self.signature)
            if signature:
                self.events.append(BlockDelta("signature", self.signature_prefix + signature))
                self.signed_thinking = text, signature
            self.unsigned = "" if signature else text
            self.thinking, self.signature = [], []
        self.events.append(BlockStop())
        self.kind, self.call = "", None

    def end(self) -> None:
        """Sends what is left: complete calls, then text."""
        self.close()
        for call in self.calls.values():
            if call.name and call.complete and not call.closed:
                self.open("tool", call)
                self.close()
        self.release_text()
        self.close()


@dataclass(slots=True)
class ChatCalls:
    """Tells which call of a chat response a fragment belongs to.

    Parallel calls may all have index 0, and ids that are empty or the same (Gemini at Copilot,
    seen in 2026-11); other services repeat id and name in each fragment of a call.
    """

    calls: dict[CallKey, StreamedCall]  #: the caller adds the call of each key that it gets
    keys: dict[tuple[int, int | str], CallKey] = field(default_factory=dict)  #: by index, or id
    ids: dict[CallKey, str] = field(default_factory=dict)  #: as the upstream sent them

    def read(self, choice: Json, fragment: Json, position: int) -> tuple[CallKey, str, str, str]:
        """(key, id, name, arguments) of a fragment, "" for what is missing or a repetition.

        The first call at an index has (index of the choice, index of the call) as its key.
        """
        function = get_dict(fragment, "function")
        call_id, name = get_text(fragment, "id"), get_text(function, "name")
        arguments, text = function.get("arguments"), get_text(function, "arguments")
        text = dump_text(arguments) if isinstance(arguments, dict) else text
        choice_index, index = choice.get("index"), fragment.get("index")
        choice_index = choice_index if isinstance(choice_index, int) else 0
        place = choice_index, index if isinstance(index, int) else position
        key, known = self.keys.get(place), self.keys.get((choice_index, call_id))
        if known and (known[:2] == place or not name or not isinstance(index, int)):
            key = known
        if key is None or self.begins_call(key, call_id, name, text):
            key = place if key is None else (*place, len(self.calls))
            call_id = "" if known else call_id
        elif call_id and name and self.is_whole(key, text):
            text = ""  # the arguments once more
        self.keys[place] = key
        if call_id:
            self.keys[choice_index, call_id] = key
            self.ids.setdefault(key, call_id)
        return key, call_id, name, text

    def is_whole(self, key: CallKey, text: str) -> bool:
        """Whether `text` begins an object although the arguments are complete."""
        return text.lstrip()[:1] == "{" and self.calls[key].can_close()

    def begins_call(self, key: CallKey, call_id: str, name: str, text: str) -> bool:
        """Whether a fragment at the place of the call `key` begins another call."""
        call, known_id = self.calls[key], self.ids.get(key, "")
        is_other = bool(call_id and known_id and call_id != known_id)
        if call.is_blank or (is_other and name):
            return bool(name) and (is_other or name != (call.name or name))
        if not name or not call_id or call_id != known_id:
            return (bool(name) or is_other) and call.can_close()
        if not self.is_whole(key, text):
            return False
        return name != call.name or load_object(text) != load_object("".join(call.pieces))


CHAT_STOP_REASONS = {
    "stop": "end", "length": "length", "tool_calls": "tool", "function_call": "tool",
    "content_filter": "filter",
}  # fmt: skip
CHAT_FINISH_REASONS = {
    "end": "stop", "stop": "stop", "tool": "tool_calls", "length": "length",
    "context": "length", "filter": "content_filter", "pause": "stop",
}  # fmt: skip
# Where readable reasoning is found in a delta: Copilot's name first, then what others use.
REASONING_FIELDS = ("reasoning_text", "reasoning_content", "reasoning", "cot_summary")
# Prefix of a chat upstream's signature while an Anthropic client carries it.
CHAT_ENVELOPE = "gw1.c."
# Key of a delta -> kind of what it extends.
CHAT_DELTAS = {"content": "text", "refusal": "refusal", "tool_calls": "arguments"}
CHAT_DELTAS |= dict.fromkeys(REASONING_FIELDS, "thinking")
FOREIGN_SIGNATURES = ("gw1.", "litellm_encrypted_reasoning:")
CHAT_FIELDS = field_table({
    ("keep", "keep"): "model messages tools tool_choice stream stream_options max_tokens "
    "max_completion_tokens temperature top_p stop reasoning_effort response_format",
    ("keep", "openai"): "parallel_tool_calls verbosity prompt_cache_key safety_identifier user",
    ("keep", "drop"): "functions function_call web_search_options thinking reasoning top_k",
    ("drop", "keep"): "* snippy intent thinking_budget",  # the named ones are Copilot's own
    ("drop", "openai"): "seed prediction frequency_penalty presence_penalty",
    ("refuse", "openai"): "n logit_bias logprobs top_logprobs",
    ("refuse", "refuse"): "audio modalities",
    ("drop", "drop"): "metadata store service_tier moderation prompt_cache_options "
    "prompt_cache_retention cache_control chat_template_kwargs context_management enable_thinking "
    "input max_output_tokens",
})  # fmt: skip


def write_openai_error(error: ApiError, conversation: str = "messages") -> Json:
    """`conversation` is the name of the field that holds the conversation."""
    error_type, code, _ = ERROR_NAMES[error.kind]
    message, param = error.text(), error.param
    if isinstance(error, ContextTooLong):
        message, param = error.openai_text, conversation
    return {"message": message, "type": error_type, "param": param, "code": error.code or code}


def get_reasoning(holder: Json) -> str:
    for key in REASONING_FIELDS:
        text = holder.get(key)
        if text and isinstance(text, str):
            return text
    return ""


def read_chat_request(body: Json) -> Conversation:
    """Raises UnsupportedFeature for what a converted response cannot express."""
    chat = Conversation(model=need_str(body, "model"))
    chat.dropped += split_fields(body, CHAT_FIELDS)[1]
    read_chat_messages(body, chat)
    chat.normalize()
    read_chat_tools(body, chat)
    read_chat_settings(body, chat)
    chat.name_tools()
    return chat


def read_chat_messages(body: Json, chat: Conversation) -> None:
    messages = message_list(body)
    user_names = {get_text(item, "name") for item in messages if item.get("role") == "user"}
    is_multi_user = len(user_names - {""}) > 1
    awaited: Counter[str] = Counter()  # call id -> results still to come, in order of the calls
    for index, message in enumerate(messages):
        path = f"messages.{index}"
        role = read_role(message, CHAT_ROLES, path)
        blocks = read_parts(message.get("content"), f"{path}.content")
        if role == "assistant":
            blocks = read_chat_assistant(message, blocks, path)
            awaited.update(block.id for block in blocks if isinstance(block, ToolCall))
        elif role in ("system", "developer"):
            texts = [block for block in blocks if isinstance(block, Text)]
            if not chat.turns:
                chat.system += texts
                continue
            role, blocks = "system", [*texts]
        elif role == "user":
            name = str_field(message, "name", path)
            if is_multi_user and name and blocks and isinstance(blocks[0], Text):
                blocks[0] = Text(f"{name}: {blocks[0].text}")
        else:  # a tool's result; the 2023 `function` role has no id
            call_id = str_field(message, "tool_call_id", path) or next(iter(awaited), "")
            awaited[call_id] -= 1
            if awaited[call_id] <= 0:
                del awaited[call_id]
            role, blocks = "user", [ToolResult(call_id, blocks)]
        chat.turns.append(Turn(role, blocks))


def read_chat_assistant(message: Json, content: list[Block], path: str) -> list[Block]:
    """`content` with the message's reasoning before it, its refusal and calls after it."""
    blocks = content
    reasoning, opaque = get_reasoning(message), str_field(message, "reasoning_opaque", path)
    if reasoning or opaque:
        blocks = [Thinking(reasoning, CHAT_ENVELOPE + opaque if opaque else ""), *content]
    refusal = str_field(message, "refusal", path)
    if refusal:
        blocks.append(Refusal(refusal))
    calls = list_field(message, "tool_calls", path)
    if message.get("function_call"):
        calls = [*calls, {"function": message["function_call"]}]
    for call_path, call in need_dicts(calls, f"{path}.tool_calls"):
        function = function_of(call, call_path)
        arguments = function.get("arguments", function.get("input", ""))
        if not isinstance(arguments, str):
            arguments = dump_text(arguments if arguments is not None else {})
        call_id = str_field(call, "id", call_path) or "call_" + short_hash(call_path, 16)
        name = need_str(function, "name", f"{call_path}.function")
        blocks.append(ToolCall(call_id, name, arguments))
    return blocks


def read_chat_tools(body: Json, chat: Conversation) -> None:
    server_tools = ["web_search"] if body.get("web_search_options") is not None else []
    tools = [*list_field(body, "tools"), *list_field(body, "functions")]
    for path, tool in need_dicts(tools, "tools"):
        function = function_of(tool, path)
        if "name" not in function and isinstance(tool.get("type"), str):
            server_tools.append(tool["type"])
            continue
        name = need_str(function, "name", f"{path}.function")
        schema = function.get("parameters", function.get("input_schema"))
        if "custom" in tool:
            schema = {"type": "object", "properties": {"input": STRING}, "required": ["input"]}
        description = str_field(function, "description", path) or ""
        strict = bool_field(function, "strict", path)
        schema = object_schema(schema, f"{path}.function.parameters")
        chat.tools.append(Tool(name, description, schema, strict))
    key = "tool_choice" if "tool_choice" in body else "function_call"
    choice = body.get(key)
    if not isinstance(choice, dict):
        mode = word_field(body, key, CHOICE_MODES)
        chat.choice = ToolChoice(mode) if mode else None
    elif choice.get("type") == "allowed_tools":
        path = f"{key}.allowed_tools"
        allowed = dict_field(choice, "allowed_tools", key)
        names = allowed_names(allowed, path)
        chat.tools = [tool for tool in chat.tools if tool.name in names]
        chat.choice = ToolChoice(word_field(allowed, "mode", ("auto", "required"), path) or "auto")
    else:
        name = need_str(function_of(choice, key), "name", f"{key}.function")
        chat.choice = ToolChoice("named", name)
    drop_server_tools(server_tools, len(chat.tools), "", chat.dropped)


def read_chat_settings(body: Json, chat: Conversation) -> None:
    chat.parallel = bool_field(body, "parallel_tool_calls")
    chat.max_tokens = int_field(body, "max_completion_tokens")
    if chat.max_tokens is None:
        chat.max_tokens = int_field(body, "max_tokens")
    chat.temperature = number_field(body, "temperature")
    chat.top_p = number_field(body, "top_p")
    chat.top_k = int_field(body, "top_k")
    chat.stop = read_stops(body, "stop")
    chat.verbosity = str_field(body, "verbosity")
    thinking, reasoning = dict_field(body, "thinking"), dict_field(body, "reasoning")
    chat.thinking_budget = int_field(thinking, "budget_tokens", "thinking")
    chat.effort = word_field(body, "reasoning_effort", EFFORTS)
    if chat.effort is None:
        chat.effort = word_field(reasoning, "effort", EFFORTS, "reasoning")
    if thinking.get("type") == "disabled":
        chat.effort = "none"
    chat.output = wanted_output(body, "chat")
    for key in ("prompt_cache_key", "safety_identifier", "user"):
        chat.session = chat.session or str_field(body, key) or ""


def without_nulls(obj: Json) -> Json:
    return {key: value for key, value in obj.items() if value is not None}


def write_chat_request(chat: Conversation, model: Model) -> Json:
    chat.refuse_prefill()
    messages: list[Json] = []
    if chat.system:
        messages.append({"role": "system", "content": join_texts(chat.system)})
    for turn in chat.turns:
        if turn.role == "system":
            messages.append({"role": "system", "content": join_texts(turn.blocks)})
        elif turn.role == "assistant":
            messages.append(write_chat_assistant(turn.blocks, chat))
        else:
            messages.extend(write_chat_user(turn.blocks, model))
    choice: str | Json | None = chat.choice.mode if chat.choice else None
    if chat.choice and chat.choice.mode == "named":
        choice = {"type": "function", "function": {"name": chat.wire_name(chat.choice.name)}}
    effort = chat.effort
    if effort is None and chat.thinking_budget:
        effort = effort_of_budget(chat.thinking_budget)
    chat.drop_settings("top_k")
    body = {
        "model": model.id,
        "messages": messages,
        "tools": [write_chat_tool(tool, chat) for tool in chat.tools] or None,
        "tool_choice": choice if chat.tools else None,
        "parallel_tool_calls": chat.parallel if chat.tools else None,
        "max_tokens": chat.max_tokens,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "stop": chat.stop or None,
        "reasoning_effort": effort,
        "verbosity": chat.verbosity,
        "response_format": write_response_format(chat.output) if chat.output else None,
        "prompt_cache_key": short_hash(chat.session, 32) if chat.session else None,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return without_nulls(body)


def write_chat_tool(tool: Tool, chat: Conversation) -> Json:
    function: Json = {"name": chat.wire_name(tool.name), "description": tool.description or None}
    function.update(parameters=tool.schema, strict=tool.strict)
    return {"type": "function", "function": without_nulls(function)}


def write_response_format(output: OutputFormat) -> Json:
    if output.schema is None:
        return {"type": "json_object"}
    strict = fits_strict(output.schema) if output.strict is None else output.strict
    entry: Json = {"name": output.name, "schema": output.schema}
    entry.update(description=output.description or None, strict=strict)
    return {"type": "json_schema", "json_schema": without_nulls(entry)}


def write_chat_assistant(blocks: list[Block], chat: Conversation) -> Json:
    message: Json = {"role": "assistant", "content": join_texts(blocks) or None}
    calls = []
    for block in blocks:
        if isinstance(block, Thinking):
            opaque = block.signature or block.redacted
            if opaque.startswith(CHAT_ENVELOPE):
                message.update({"reasoning_text": block.text} if block.text else {})
                message["reasoning_opaque"] = opaque.removeprefix(CHAT_ENVELOPE)
        elif isinstance(block, ToolCall):
            arguments = block.arguments.strip() or "{}"
            function = {"name": chat.wire_name(block.name), "arguments": arguments}
            calls.append({"id": wire_id(block.id), "type": "function", "function": function})
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = "(no content)"
    return message


def write_chat_user(blocks: list[Block], model: Model) -> list[Json]:
    """Tool messages first, then one user message with other blocks and the results' images."""
    parts: list[Json] = []
    results = [block for block in blocks if isinstance(block, ToolResult)]
    messages = [write_chat_result(result, model, parts) for result in results]
    own_parts = [block for block in blocks if isinstance(block, (Text, Refusal, Image, Document))]
    parts += [write_chat_part(block, model) for block in own_parts]
    if len(parts) == 1 and parts[0]["type"] == "text":
        messages.append({"role": "user", "content": parts[0]["text"]})
    elif parts:
        messages.append({"role": "user", "content": parts})
    return messages


def write_chat_part(block: Text | Refusal | Image | Document, model: Model) -> Json:
    """Raises UnsupportedFeature for a PDF if the model does not support it."""
    if isinstance(block, Image):
        url = block.url or f"data:{block.media_type};base64,{block.data}"
        image_url = without_nulls({"url": url, "detail": block.detail or None})
        return {"type": "image_url", "image_url": image_url}
    if isinstance(block, (Text, Refusal)):
        return {"type": "text", "text": block.text}
    if block.text:
        heading = f"[{block.title}]\n" if block.title else ""
        return {"type": "text", "text": heading + block.text}
    if not model.files:
        raise unsupported(block.path, f"{model.id} does not support PDF documents.")
    data = f"data:{block.media_type};base64,{block.data}"
    return {"type": "file", "file": {"filename": block.title or "document.pdf", "file_data": data}}


def write_chat_result(result: ToolResult, model: Model, user_parts: list[Json]) -> Json:
    """A tool message; its images go into `user_parts`, as tool messages accept none."""
    text = join_texts(result.blocks)
    attachments: list[Json] = []
    for block in result.blocks:
        if isinstance(block, (Image, Document)):
            part = write_chat_part(block, model)
            if part["type"] == "text":
                text = f"{text}\n\n{part['text']}".strip()
            else:
                attachments.append(part)
    call_id = wire_id(result.id)
    if attachments:
        label = "Image" if attachments[0]["type"] == "image_url" else "File"
        user_parts.append({"type": "text", "text": f"{label} from tool call {call_id}:"})
        user_parts.extend(attachments)
        text = text or f"[{label.lower()} in next message]"
    return {"role": "tool", "tool_call_id": call_id, "content": output_text(text, result.is_error)}


@dataclass(slots=True)
class ChatReader:
    """Chat chunks -> events; chunks may interleave calls and text."""

    context: ResponseContext
    blocks: BlockAssembler = field(default_factory=lambda: BlockAssembler(CHAT_ENVELOPE))
    calls: ChatCalls = field(init=False)
    usage: Usage = field(default_factory=Usage)
    reasoning: list[str] = field(default_factory=list)
    opaque: str = ""
    finish_reason: str = ""
    started: bool = False

    def __post_init__(self) -> None:
        self.calls = ChatCalls(self.blocks.calls)

    def read(self, frame: Json) -> list[Event]:
        if frame.get("error"):
            return [StreamError(read_stream_error(frame["error"]))]
        if frame.get("type") == "[DONE]":
            return self.end()
        choices = get_dicts(frame, "choices")
        if not self.started and (choices or frame.get("usage")):
            self.started = True
            start = MessageStart(str(frame.get("id") or ""), str(frame.get("model") or ""))
            self.blocks.events.append(start)
        for choice in choices:
            self.read_choice(choice)
        read_usage(frame, CHAT_USAGE, self.usage)
        return self.blocks.take()

    def read_choice(self, choice: Json) -> None:
        """Copilot's Claude spreads one response over several choices (seen in 2026-08)."""
        delta = get_dict(choice, "delta") or get_dict(choice, "message")
        reasoning = get_reasoning(delta)
        if reasoning:
            self.reasoning.append(reasoning)
            self.blocks.add_text("thinking", reasoning)
        if isinstance(delta.get("reasoning_opaque"), str):
            self.opaque = delta["reasoning_opaque"]
            self.blocks.signature = [self.opaque] if self.opaque else []
        for name, kind in (("content", "text"), ("refusal", "refusal")):
            text = delta.get(name)
            if text and isinstance(text, str):
                self.blocks.add_text(kind, text)
        fragments = get_dicts(delta, "tool_calls")
        if get_dict(delta, "function_call"):
            fragments = [{"function": delta["function_call"]}]
        for position, fragment in enumerate(fragments):
            self.blocks.add_call(*self.calls.read(choice, fragment, position), is_last=False)
        finish_reason = get_text(choice, "finish_reason")
        if finish_reason and self.finish_reason != "tool_calls":
            self.finish_reason = finish_reason

    def track(self, kind: str, text: str) -> None:
        self.blocks.track(kind, text)
        if kind == "thinking":
            self.reasoning.append(text)

    def end(self) -> list[Event]:
        blocks, calls = self.blocks, self.blocks.calls.values()
        if not self.finish_reason or not self.started:
            return []
        for call in calls:
            call.complete = True
        blocks.end()
        call_ids = [call.id for call in calls]
        self.context.keep_reasoning(call_ids, "".join(self.reasoning), self.opaque)
        if blocks.signature:  # it came after the thinking block, or without one
            blocks.add_text("redacted", "".join(blocks.signature))
            blocks.signature = []
        if self.usage.source:
            blocks.events.append(UsageUpdate(self.usage))
        finish_reason, self.finish_reason = self.finish_reason, ""
        stop_reason = CHAT_STOP_REASONS.get(finish_reason, "")
        if calls and stop_reason != "length":
            stop_reason = "tool"
        error = UpstreamError(f"The upstream ended with {finish_reason!r}.")
        blocks.events.append(MessageStop(stop_reason) if stop_reason else StreamError(error))
        return blocks.take()


def chunk_base(context: ResponseContext, chunk_id: str, created: int) -> Json:
    """The fields that all chunks of a response share."""
    chunk_type = "chat.completion.chunk"
    return {"id": chunk_id, "object": chunk_type, "created": created, "model": context.model}


def chunk_choice(delta: Json, finish_reason: str | None = None, index: int = 0) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class ChatWriter(Writer):
    #: block kind -> field of the delta
    FIELDS: ClassVar = {"text": "content", "thinking": "reasoning_content", "refusal": "refusal"}

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.base = chunk_base(context, context.id, context.created)
        self.call_index = -1
        self.block_kind = ""
        self.has_empty_call = False
        self.sent_kinds: set[str] = set()  # of blocks with text
        self.separator = ""  # before the text of the open block

    def write(self, event: Event) -> list[Json]:
        """Signatures and citations cannot be expressed in this dialect."""
        delta: Json = {}
        if isinstance(event, BlockDelta):
            if self.block_kind == "tool" and event.part == "arguments" and event.text:
                self.has_empty_call = False
                delta = self.call_delta({"arguments": event.text})
            elif self.block_kind in self.FIELDS and event.part == "text":
                delta = {self.FIELDS[self.block_kind]: self.separator + event.text}
                self.separator = ""
                self.sent_kinds.add(self.block_kind)
        elif isinstance(event, MessageStart):
            delta = {"role": "assistant", "content": ""}
        elif isinstance(event, BlockStart):
            self.block_kind = event.kind
            is_next = event.is_paragraph and event.kind in self.sent_kinds
            self.separator = "\n\n" if is_next else ""
            self.has_empty_call = event.kind == "tool"
            if self.has_empty_call:
                self.call_index += 1
                function = {"name": event.name, "arguments": ""}
                delta = self.call_delta(function, id=event.id, type="function")
        elif isinstance(event, BlockStop) and self.has_empty_call:
            self.has_empty_call = False
            delta = self.call_delta({"arguments": "{}"})
        elif isinstance(event, UsageUpdate):
            self.usage = event.usage
        elif isinstance(event, MessageStop):
            return self.write_stop(event)
        return [{**self.base, "choices": [chunk_choice(delta)]}] if delta else []

    def call_delta(self, function: Json, **first_fields: str) -> Json:
        """A fragment of the open call; only the first one has id, type and name."""
        if self.context.legacy_functions:
            return {"function_call": function}
        return {"tool_calls": [{"index": self.call_index, **first_fields, "function": function}]}

    def write_stop(self, event: MessageStop) -> list[Json]:
        finish_reason = CHAT_FINISH_REASONS[event.reason]
        if finish_reason == "tool_calls" and self.context.legacy_functions:
            finish_reason = "function_call"
        choices = [chunk_choice({}, finish_reason)]
        explanation = (event.details or {}).get("explanation")
        if event.reason == "filter" and isinstance(explanation, str) and explanation:
            choices.insert(0, chunk_choice({"refusal": explanation}))
        frames: list[Json] = [{**self.base, "choices": [choice]} for choice in choices]
        if self.context.include_usage:
            usage = write_usage(self.usage, CHAT_USAGE)
            frames.append({**self.base, "choices": [], "usage": usage})
        return frames


# Added by Azure and Copilot: random padding and content-filter results.  Clients echo a message
# with all its fields, and the upstream would refuse these.
VENDOR_CHAT_FIELDS = frozenset((
    "content_filter_offsets", "content_filter_results", "copilot_annotations", "obfuscation",
    "padding", "prompt_filter_results", "copilot_usage",
))  # fmt: skip


def drop_vendor_fields(holder: Json) -> None:
    if not VENDOR_CHAT_FIELDS.isdisjoint(holder):
        for key in VENDOR_CHAT_FIELDS:
            holder.pop(key, None)


def merge_deltas(deltas: Iterable[Json]) -> Json:
    """Joins strings and lists, merges calls by index; of other values the last one counts."""
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    for delta in deltas:
        for key, value in delta.items():
            columns[key] += [] if value is None else [value]
    merged: Json = {}
    for key, values in columns.items():
        kinds = set(map(type, values))
        if key == "tool_calls":
            fragments: defaultdict[int, list[Json]] = defaultdict(list)
            for fragment in (item for value in values for item in value):
                fragments[fragment["index"]].append(fragment)
            merged[key] = [merge_deltas(fragments[index]) for index in sorted(fragments)]
        elif kinds == {str} and key not in ("role", "type", "id"):
            merged[key] = "".join(values)
        elif kinds == {dict}:
            merged[key] = merge_deltas(values)
        elif kinds == {list}:
            merged[key] = [item for value in values for item in value]
        else:
            merged[key] = values[-1] if values else None
    return merged


@dataclass(slots=True)
class ChatRelay:
    """Native chat chunks, repaired.

    Copilot leaves out `object`, `created` or `id`, sends a first chunk without choices, spreads
    Claude's responses over several choices, and repeats or omits what belongs in the first fragment
    of a call (seen in 2026-08).  Finish and usage are held until the end, so that each is sent once
    and in its place.
    """

    context: ResponseContext
    usage: Usage = field(default_factory=Usage)
    output_estimate: float = 0.0
    finished: bool = False
    base: Json = field(default_factory=dict)  #: the fields that all chunks share
    opened: set[int] = field(default_factory=set)  #: choices whose role was sent
    finish_reasons: dict[int, str] = field(default_factory=dict)  #: per choice
    calls: ChatCalls = field(default_factory=lambda: ChatCalls({}))
    call: StreamedCall | None = None  #: the one that grew last
    usage_frame: Json | None = None
    reasoning: list[str] = field(default_factory=list)
    opaque: str = ""

    def repair(self, frame: Json) -> list[Json]:
        if self.finished:
            return []
        if frame.get("error"):
            raise read_stream_error(frame["error"])
        if frame.get("type") == "[DONE]":
            return self.end()
        has_usage = frame.get("usage") or "copilot_usage" in frame
        if has_usage and read_usage(frame, CHAT_USAGE, self.usage):
            self.usage_frame = frame["usage"]
        choices = get_dicts(frame, "choices")
        if not choices:
            return []  # prompt filter results, copilot_references, the usage chunk
        if not self.base:
            chunk_id = str(frame.get("id") or self.context.id)
            created = positive_int(frame.get("created")) or self.context.created
            self.base = chunk_base(self.context, chunk_id, created)
        choices = [repaired for choice in choices if (repaired := self.repair_choice(choice))]
        if not choices:
            return []
        if len(choices) > 1 and not self.context.multiple_choices:
            choices[0]["delta"] = merge_deltas(choice["delta"] for choice in choices)
            del choices[1:]
        frame.update(self.base, choices=choices)
        frame.pop("usage", None)
        drop_vendor_fields(frame)
        unopened = {choice["index"] for choice in choices} - self.opened
        return [*self.open_choices(frame, unopened), frame] if unopened else [frame]

    def open_choices(self, base: Json, indexes: set[int]) -> list[Json]:
        """A chunk with the role of choices that have none: strict clients need it."""
        self.opened |= indexes
        role = {"role": "assistant", "content": ""}
        choices = [chunk_choice(role, index=index) for index in sorted(indexes)]
        return [{**base, "choices": choices}] if choices else []

    def repair_choice(self, choice: Json) -> Json | None:
        """One choice as strict clients expect it; None if nothing is left of it."""
        index = choice.get("index")
        index = index if isinstance(index, int) and self.context.multiple_choices else 0
        delta = get_dict(choice, "delta")
        drop_vendor_fields(choice)
        drop_vendor_fields(delta)
        finish_reason = get_text(choice, "finish_reason")
        if finish_reason and self.finish_reasons.get(index) != "tool_calls":
            self.finish_reasons[index] = finish_reason
        if isinstance(delta.get("reasoning_text"), str):
            # Copilot's name for it; clients read `reasoning_content`.
            delta.setdefault("reasoning_content", delta["reasoning_text"])
        reasoning = get_reasoning(delta)
        self.reasoning.append(reasoning)
        if isinstance(delta.get("reasoning_opaque"), str):
            self.opaque = delta["reasoning_opaque"]
        if isinstance(delta.get("tool_calls"), list):
            fragments = enumerate(get_dicts(delta, "tool_calls"))
            delta["tool_calls"] = [
                self.repair_call(choice, fragment, position) for position, fragment in fragments
            ]
        else:
            delta.pop("tool_calls", None)
        text = get_text(delta, "content") + get_text(delta, "refusal") + reasoning
        self.output_estimate += self.context.estimate(text)
        if finish_reason and not any(value for key, value in delta.items() if key != "role"):
            return None
        if index in self.opened:
            delta.pop("role", None)
        elif "role" in delta:
            self.opened.add(index)
        return {**choice, "index": index, "delta": delta, "finish_reason": None}

    def repair_call(self, choice: Json, fragment: Json, position: int) -> Json:
        """A fragment with a dense index; id, type and name only in the first one of each call."""
        key, call_id, name, arguments = self.calls.read(choice, fragment, position)
        calls = self.calls.calls
        is_first = key not in calls
        if is_first:
            call_id = call_id or f"call_{short_hash(f'{self.context.id}{key}', 16)}"
            calls[key] = StreamedCall(key, call_id, name, index=len(calls))
        self.call = call = calls[key]
        call.guard.check(arguments)
        call.add(arguments)
        self.output_estimate += self.context.estimate(name + arguments if is_first else arguments)
        if not is_first:
            return {"index": call.index, "function": {"arguments": arguments}}
        function = {"name": self.context.names.get(name, name), "arguments": arguments}
        first_fields = {"index": call.index, "id": call.id, "type": "function"}
        first_fields["function"] = function
        extra = {key: value for key, value in fragment.items() if key not in first_fields}
        return {**extra, **first_fields}

    def track(self, kind: str, text: str) -> None:
        if kind == "arguments" and self.call:
            self.call.guard.check(text)
            self.call.add(text)
        elif kind == "thinking":
            self.reasoning.append(text)
        self.output_estimate += self.context.estimate(text)

    def end(self) -> list[Json]:
        if self.finished:
            return []
        if not self.finish_reasons:
            raise UpstreamError(TRUNCATED_RESPONSE)
        self.finished = True
        call_ids = [call.id for call in self.calls.calls.values()]
        self.context.keep_reasoning(call_ids, "".join(self.reasoning), self.opaque)
        frames = self.open_choices(self.base, self.finish_reasons.keys() - self.opened)
        for index, finish_reason in sorted(self.finish_reasons.items()):
            if finish_reason not in CHAT_STOP_REASONS:
                raise UpstreamError(f"The upstream ended with {finish_reason!r}.")
            if self.calls.calls and finish_reason == "stop":
                finish_reason = "tool_calls"
            frames.append({**self.base, "choices": [chunk_choice({}, finish_reason, index)]})
        if self.context.include_usage:
            usage = finalize_usage(self.usage, self.context, self.output_estimate)
            usage_fields = self.usage_frame or write_usage(usage, CHAT_USAGE)
            frames.append({**self.base, "choices": [], "usage": usage_fields})
        return frames


class ChatDialect(Dialect):
    name = "chat"
    tail = SSE_DONE
    id_prefix = "chatcmpl-"
    read_request = staticmethod(read_chat_request)
    write_request = staticmethod(write_chat_request)
    framing = SseReader
    reader = ChatReader
    writer = ChatWriter
    relay = ChatRelay
    encode = staticmethod(write_sse)

    def request_info(self, body: Json) -> RequestInfo:
        messages = message_list(body)
        session = body.get("prompt_cache_key") or body.get("safety_identifier") or body.get("user")
        systems = (item.get("content") for item in messages if item.get("role") == "system")
        options = dict_field(body, "stream_options")
        return RequestInfo(
            model=need_str(body, "model"),
            stream=flag_field(body, "stream"),
            include_usage=bool_field(options, "include_usage", "stream_options") or False,
            initiator=read_initiator(messages),
            session=session if isinstance(session, str) else "",
            opening=opening_text(next(systems, ""), messages),
        )

    def aggregate(self, frames: list[Json]) -> Json:
        response: Json = {"id": "", "object": "chat.completion", "created": 0, "model": ""}
        usage = None
        chunks: defaultdict[int, list[Json]] = defaultdict(list)  # per choice
        for frame in frames:
            usage = frame.get("usage") or usage
            response.update(frame)
            for choice in frame["choices"]:
                chunks[choice["index"]].append(choice)
        for key in ("choices", "usage"):  # they come last
            response.pop(key, None)
        response |= {"object": "chat.completion", "choices": []}
        for index, choices in sorted(chunks.items()):
            message = merge_deltas(choice["delta"] for choice in choices)
            for call in message.get("tool_calls", ()):
                call.pop("index", None)
            has_calls = "tool_calls" in message or "function_call" in message
            message["content"] = message.get("content") or (None if has_calls else "")
            message.setdefault("refusal", None)
            finish_reason = choices[-1].get("finish_reason")
            choice = {"index": index, "message": message, "finish_reason": finish_reason}
            logprobs = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
            response["choices"].append({**choice, "logprobs": merge_deltas(logprobs) or None})
        response["usage"] = usage
        return response

    def expand(self, response: Json) -> list[Json]:
        choices = [
            {"delta" if key == "message" else key: value for key, value in choice.items()}
            for choice in get_dicts(response, "choices")
        ]
        return [{**response, "choices": choices}]

    def read_delta(self, frame: Json) -> Delta | None:
        choices = get_dicts(frame, "choices")
        if len(choices) != 1 or len(frame["choices"]) != 1:
            return None
        choice, delta = choices[0], get_dict(choices[0], "delta")
        keys = delta.keys() - {"role", *VENDOR_CHAT_FIELDS}
        kinds = {CHAT_DELTAS.get(key) for key in keys if delta[key]}
        if len(kinds) != 1 or choice.get("finish_reason") or choice.get("logprobs"):
            return None
        kind = kinds.pop()
        text = get_text(delta, "content") or get_text(delta, "refusal") or get_reasoning(delta)
        if kind == "arguments" and len(calls := get_dicts(delta, "tool_calls")) == 1:
            function = get_dict(calls[0], "function")
            is_first = calls[0].get("id") or function.get("name")
            text = "" if is_first else get_text(function, "arguments")
        return (kind, text) if kind and text else None

    def error_body(self, error: ApiError, request_id: str) -> Json:
        return {"error": write_openai_error(error)}


# 8.3 Anthropic messages

# Anthropic's word -> ours, and back.
FROM_STOP_REASON = {
    "end_turn": "end", "stop_sequence": "stop", "tool_use": "tool", "max_tokens": "length",
    "model_context_window_exceeded": "context", "refusal": "filter", "compaction": "pause",
    "pause_turn": "pause",
}  # fmt: skip
TO_STOP_REASON = {ours: word for word, ours in FROM_STOP_REASON.items()}
FROM_TOOL_CHOICE = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
TO_TOOL_CHOICE = {ours: word for word, ours in FROM_TOOL_CHOICE.items()}
MESSAGES_FIELDS = field_table({
    ("keep", "keep"): "model messages system max_tokens stream stop_sequences temperature top_p "
    "top_k tools tool_choice thinking output_config",
    ("keep", "silent"): "metadata output_format",  # the user's device ids; see adapt_output
    ("silent", "keep"): "cache_control",
    ("drop", "keep"): "context_management",
    ("refuse", "drop"): "container mcp_servers",
    ("refuse", "refuse"): "compaction thread",  # they change what the messages mean
    # Copilot's endpoint refuses every unknown field.
    ("drop", "drop"): "* billing_policy diagnostics fallback_credit_token fallbacks inference_geo "
    "service_tier speed user_profile_id",
})  # fmt: skip


def is_billing_header(block: Any) -> bool:
    """Whether it is Claude Code's, which changes per request and so defeats prompt caching."""
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith("x-anthropic-billing-header:")


def without_billing_header(system: Any) -> Any:
    if not isinstance(system, list):
        return system
    return [block for block in system if not is_billing_header(block)]


SESSION_SUFFIX = re.compile(r"_session_([0-9a-fA-F-]{8,64})\Z")


def read_messages_session(body: Json) -> str:
    """The session in Claude Code's `metadata.user_id`: JSON today, underscore-joined before."""
    user_id = dict_field(body, "metadata").get("user_id")
    if not isinstance(user_id, str):
        return ""
    session = (load_object(user_id[:MAX_USER_ID_CHARS]) or {}).get("session_id")
    if isinstance(session, str):
        return session
    match = SESSION_SUFFIX.search(user_id)
    return match[1] if match else user_id


def read_messages_request(body: Json) -> Conversation:
    chat = Conversation(model=need_str(body, "model"))
    chat.dropped += split_fields(body, MESSAGES_FIELDS)[1]
    system = read_parts(without_billing_header(body.get("system")), "system")
    chat.system = [block for block in system if isinstance(block, Text) and block.text.strip()]
    for index, message in enumerate(message_list(body)):
        role = read_role(message, MESSAGES_ROLES, f"messages.{index}")
        blocks = read_parts(message.get("content"), f"messages.{index}.content")
        chat.turns.append(Turn(role, blocks))
    chat.normalize()
    chat.prefilled = bool(chat.turns) and chat.turns[-1].role == "assistant"
    read_messages_tools(body, chat)
    chat.max_tokens = int_field(body, "max_tokens")
    if chat.max_tokens is not None and chat.max_tokens < 1:
        raise UnsupportedFeature("max_tokens: must be at least 1.", param="max_tokens")
    chat.temperature = number_field(body, "temperature")
    chat.top_p = number_field(body, "top_p")
    chat.top_k = int_field(body, "top_k")
    chat.stop = read_stops(body, "stop_sequences")
    chat.session = read_messages_session(body)
    thinking, output_config = dict_field(body, "thinking"), dict_field(body, "output_config")
    chat.effort = word_field(output_config, "effort", EFFORTS, "output_config")
    if output_config.get("task_budget"):
        chat.dropped.append("output_config.task_budget")
    budget_tokens = int_field(thinking, "budget_tokens", "thinking") or 0
    if thinking.get("type") == "disabled":
        chat.effort = "none"
    elif thinking.get("type") == "enabled" and budget_tokens > 0:
        chat.thinking_budget = budget_tokens
        chat.effort = chat.effort or effort_of_budget(budget_tokens)
    chat.output = wanted_output(body, "messages")
    chat.name_tools()
    return chat


def messages_tools(body: Json, server_tools: list[str]) -> Iterator[tuple[str, Json, str, Json]]:
    """(path, tool, name, schema) of the tools that run on the client.

    Adds the names of the others to `server_tools`.
    """
    for path, tool in dict_items(body, "tools"):
        kind = str_field(tool, "type", path) or "custom"
        name = str_field(tool, "name", path) or kind
        schema = tool.get("input_schema") if kind == "custom" else client_tool_schema(kind)
        if schema is None and kind != "custom":
            server_tools.append(name)
        else:
            yield path, tool, name, object_schema(schema, f"{path}.input_schema")


def read_messages_tools(body: Json, chat: Conversation) -> None:
    server_tools: list[str] = []
    for path, tool, name, schema in messages_tools(body, server_tools):
        description = str_field(tool, "description", path) or ""
        chat.tools.append(Tool(name, description, schema, bool_field(tool, "strict", path)))
    choice = dict_field(body, "tool_choice")
    mode = word_field(choice, "type", FROM_TOOL_CHOICE, "tool_choice")
    name = str_field(choice, "name", "tool_choice") or ""
    drop_server_tools(server_tools, len(chat.tools), name, chat.dropped)
    if mode == "tool":
        need_str(choice, "name", "tool_choice")
    if mode is not None:
        chat.choice = ToolChoice(FROM_TOOL_CHOICE[mode], name)
    if bool_field(choice, "disable_parallel_tool_use", "tool_choice"):
        chat.parallel = False


def is_forced(choice: Json) -> bool:
    return choice.get("type") in ("any", "tool")


def needs_signed_turn(messages: list[Json]) -> bool:
    """Whether the last assistant message calls tools without a thinking block before them.

    Anthropic refuses that if there is a thinking budget; a model switch or an OpenAI client causes
    it.
    """
    for message in reversed(messages):
        if message.get("role") == "assistant":
            content = message.get("content")
            kinds = [part.get("type") for part in content] if isinstance(content, list) else []
            return "tool_use" in kinds and kinds[0] not in ("thinking", "redacted_thinking")
    return False


def write_thinking(effort: str | None, budget: int | None, model: Model, body: Json) -> Json:
    """`thinking` and `output_config` as the model accepts them; `body` is otherwise complete."""
    if effort is None and budget is None:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}} if model.adaptive else {}
    if is_forced(body.get("tool_choice") or {}):
        return {}
    if model.adaptive:
        settings: Json = {"thinking": {"type": "adaptive", "display": "summarized"}}
        level = clamp_effort(effort or effort_of_budget(budget or 0), model.efforts)
        return {**settings, "output_config": {"effort": level}} if level else settings
    if model.budget is None or needs_signed_turn(body["messages"]):
        return {}
    budget = budget or EFFORT_BUDGETS[effort or "high"]
    tokens = clamp_budget(budget, model.budget, body["max_tokens"])
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}} if tokens else {}


def is_multi_turn(body: Json) -> bool:
    """Whether the conversation will be sent again with more turns, as agents and chats do.

    Only then does caching pay: a cache write costs a quarter more than plain input.
    """
    roles = (message["role"] for message in body["messages"])
    return bool(body.get("tools")) or "assistant" in roles


def add_cache_breakpoints(body: Json) -> None:
    """Sets cache breakpoints on what the next request will begin with.

    Clients of OpenAI's dialects set none, and Claude caches nothing without them.  The breakpoint
    on the previous turn finds what the last request wrote.
    """
    if not is_multi_turn(body):
        return
    prefix = body.get("system") or body.get("tools") or []
    turns = [message["content"] for message in body["messages"] if message["role"] == "user"]
    for blocks in filter(None, (prefix, *turns[-2:])):
        blocks[-1]["cache_control"] = {"type": "ephemeral"}


def write_messages_request(chat: Conversation, model: Model) -> Json:
    messages = []
    for turn in downgrade_system_turns(chat.turns):
        content = write_messages_blocks(turn.blocks, chat)
        if content:
            messages.append({"role": turn.role, "content": content})
    if not messages:
        raise chat.refuse_empty()
    limit = model.max_output or DEFAULT_MAX_TOKENS
    max_tokens = min(chat.max_tokens or min(limit, DEFAULT_MAX_TOKENS), limit)
    body: Json = {"model": model.id, "max_tokens": max_tokens, "messages": messages}
    if chat.system:
        body["system"] = [{"type": "text", "text": block.text} for block in chat.system]
    stops = [stop for stop in chat.stop if stop.strip()]
    if stops:
        body["stop_sequences"] = stops
    if chat.tools:
        body.update(write_messages_tools(chat))
    if chat.session:
        body["metadata"] = {"user_id": short_hash(chat.session, 32)}
    body.update(write_thinking(chat.effort, chat.thinking_budget, model, body))
    if chat.output:
        kind = write_response_format(chat.output)["type"]
        output_format = without_nulls({"type": kind, "schema": chat.output.schema})
        body["output_config"] = {**body.get("output_config", {}), "format": output_format}
    if chat.temperature is not None:
        body["temperature"] = min(chat.temperature, 1)
    body.update(without_nulls({"top_p": chat.top_p, "top_k": chat.top_k}))
    chat.drop_settings("verbosity")
    body["stream"] = True
    return body


def write_messages_blocks(blocks: list[Block], chat: Conversation) -> list[Json]:
    return [part for block in blocks if (part := write_messages_block(block, chat))]


def write_messages_block(block: Block, chat: Conversation) -> Json | None:
    """None for thinking that Anthropic did not sign."""
    if isinstance(block, (Text, Refusal)):
        return {"type": "text", "text": block.text}
    if isinstance(block, (Image, Document)):
        source = {"type": "base64", "media_type": block.media_type, "data": block.data}
        if isinstance(block, Image):
            source = {"type": "url", "url": block.url} if block.url else source
            return {"type": "image", "source": source}
        if block.text:
            source = {"type": "text", "media_type": "text/plain", "data": block.text}
        title = {"title": block.title} if block.title else {}
        return {"type": "document", "source": source, **title}
    if isinstance(block, ToolCall):
        call = {"id": wire_id(block.id), "name": chat.wire_name(block.name)}
        return {"type": "tool_use", **call, "input": parse_arguments(block.arguments)}
    if isinstance(block, ToolResult):
        result: Json = {"type": "tool_result", "tool_use_id": wire_id(block.id)}
        content = write_messages_blocks(block.blocks, chat)
        if content:
            is_text = len(content) == 1 and content[0]["type"] == "text"
            result["content"] = content[0]["text"] if is_text else content
        if block.is_error:
            result = {"content": NO_OUTPUT, **result, "is_error": True}
        return result
    if not isinstance(block, Thinking):
        return None
    if block.redacted and not block.redacted.startswith(FOREIGN_SIGNATURES):
        return {"type": "redacted_thinking", "data": block.redacted}
    if block.signature and not block.signature.startswith(FOREIGN_SIGNATURES):
        return {"type": "thinking", "thinking": block.text, "signature": block.signature}
    return None


def write_messages_tools(chat: Conversation) -> Json:
    tools = []
    for tool in chat.tools:
        description = {"description": tool.description} if tool.description else {}
        schema = tool.schema
        tools.append({"name": chat.wire_name(tool.name), **description, "input_schema": schema})
    if not chat.choice and chat.parallel is not False:
        return {"tools": tools}
    mode = chat.choice.mode if chat.choice else "auto"
    choice: Json = {"type": TO_TOOL_CHOICE[mode]}
    if chat.choice and mode == "named":
        choice["name"] = chat.wire_name(chat.choice.name)
    if chat.parallel is False and mode != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": choice}


# What a delta extends -> (its type, the key of its text), and back; thinking is a block's text.
TO_DELTA = {
    "text": ("text_delta", "text"), "arguments": ("input_json_delta", "partial_json"),
    "thinking": ("thinking_delta", "thinking"), "signature": ("signature_delta", "signature"),
}  # fmt: skip
FROM_DELTA = {
    kind: ("text" if part == "thinking" else part, key) for part, (kind, key) in TO_DELTA.items()
}


def expand_message(message: Json) -> list[Json]:
    """The frames of a whole message but the last; those of its stop only if it has one.

    Text and tool input come as deltas: clients do not read them from the first frame.
    """
    empty = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    frames: list[Json] = [{"type": "message_start", "message": empty}]
    for index, block in enumerate(get_dicts(message, "content")):
        start, deltas = dict(block), []
        if block.get("type") == "tool_use":
            start["input"] = {}
            text = dump_text(block.get("input") or {})
            deltas = [{"type": "input_json_delta", "partial_json": text}]
        elif block.get("type") in ("text", "thinking"):
            for key in ("text", "thinking", "signature"):
                if isinstance(block.get(key), str):
                    start[key] = ""
                    deltas.append({"type": f"{key}_delta", key: block[key]})
        position = {"index": index}
        frames.append({"type": "content_block_start", **position, "content_block": start})
        frames += [{"type": "content_block_delta", **position, "delta": d} for d in deltas]
        frames.append({"type": "content_block_stop", **position})
    if message.get("stop_reason"):
        keys = ("stop_reason", "stop_sequence", "stop_details")
        delta = {key: message.get(key) for key in keys if key in message or key != keys[2]}
        usage: Json = {k: message[k] for k in ("usage", "copilot_usage") if k in message}
        frames.append({"type": "message_delta", "delta": delta, **usage})
    return frames


class MessagesFraming(SseReader):
    """Drops a repeated `message_start`, and expands one that already holds the message.

    The latter is sent where tools are called from code (seen in 2026-11).
    """

    message_id: str | None = None

    def frames(self, blocks: bytes) -> list[Json]:
        return [part for frame in super().frames(blocks) for part in self.expand_start(frame)]

    def expand_start(self, frame: Json) -> list[Json]:
        message = get_dict(frame, "message")
        if frame.get("type") == "message_start" and self.message_id is None:
            self.message_id = get_text(message, "id")
            is_whole = message.get("content") or message.get("stop_reason")
            return expand_message(message) if is_whole else [frame]
        is_repeated = frame.get("type") == "message_start" and message.get("id") == self.message_id
        return [] if is_repeated else [frame]


class MessagesReader(Reader):
    def __init__(self, context: ResponseContext) -> None:
        self.usage = Usage()
        self.message_stop: MessageStop | None = None

    def read(self, frame: Json) -> list[Event]:
        """Unknown types are ignored."""
        kind = frame.get("type")
        delta = get_dict(frame, "delta")
        if kind == "content_block_delta":
            part, key = FROM_DELTA.get(get_text(delta, "type"), ("citation", ""))
            if part == "citation":
                return [BlockDelta(part, "", delta)]
            return [BlockDelta(part, str(delta.get(key) or ""))]
        if kind == "content_block_start":
            return self.read_block(get_dict(frame, "content_block"))
        if kind == "content_block_stop":
            return [BlockStop()]
        if kind == "message_start":
            message = get_dict(frame, "message")
            read_usage(message, MESSAGES_USAGE, self.usage)
            return [MessageStart(str(message.get("id") or ""), str(message.get("model") or ""))]
        if kind == "message_stop":
            return self.end()
        if kind == "error" or "error" in frame:
            return [StreamError(read_stream_error(frame.get("error")))]
        if kind == "message_delta":
            read_usage(frame, MESSAGES_USAGE, self.usage)
            stop_reason = get_text(delta, "stop_reason")
            if stop_reason:
                reason = FROM_STOP_REASON.get(stop_reason, "end")
                stop_text = get_text(delta, "stop_sequence") or None
                details = get_dict(delta, "stop_details") or None
                self.message_stop = MessageStop(reason, stop_text, details)
        return []

    @staticmethod
    def read_block(block: Json) -> list[Event]:
        kind = get_text(block, "type")
        if kind in ("text", "thinking"):
            text = get_text(block, kind)
            return [BlockStart(kind), *([BlockDelta("text", text)] if text else [])]
        if kind == "tool_use":
            start = BlockStart("tool", str(block.get("id") or ""), str(block.get("name") or ""))
            text = dump_text(block["input"]) if block.get("input") else ""
            return [start, *([BlockDelta("arguments", text)] if text else [])]
        return [BlockStart("redacted" if kind == "redacted_thinking" else "opaque", raw=block)]

    def end(self) -> list[Event]:
        message_stop, self.message_stop = self.message_stop, None
        if message_stop is None:
            return []
        return [UsageUpdate(self.usage), message_stop] if self.usage.source else [message_stop]


def write_messages_usage(usage: Usage) -> Json:
    counts = write_usage(usage, MESSAGES_USAGE)
    if not usage.reasoning:
        del counts["output_tokens_details"]
    return counts


EMPTY_MESSAGE: Json = {
    "type": "message", "role": "assistant", "content": [], "stop_reason": None,
    "stop_sequence": None,
}  # fmt: skip


#: signature of thinking that came without one; typed clients refuse an empty one
UNSIGNED = "gw1.u."


def asks_for_thinking(body: Json) -> bool:
    """Whether a client wants to see thinking; its request may be in any dialect."""
    thinking = get_text(get_dict(body, "thinking"), "type") or get_text(body, "reasoning_effort")
    thinking = thinking or get_text(get_dict(body, "reasoning"), "effort")
    named = get_text(body, "model").lower().removesuffix("[1m]").endswith("-thinking")
    return thinking not in ("disabled", "none") if thinking else named


class MessagesWriter(Writer):
    """Events -> Anthropic stream events.

    Reasoning is sent only to clients that asked for thinking: others take `content[0]` for the
    text.  For them the gateway stores it, keyed by the calls that follow it.
    """

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.block_index = -1
        self.block_kind = ""
        self.has_refusal = False
        self.shows_thinking = asks_for_thinking(context.request_body)
        self.is_signed = False  # the open block
        self.held_frames: list[Json] = []  # of a late thinking block that has no text yet

    def write(self, event: Event) -> list[Json]:
        """The frames for one event.

        A bare signature after the final text is withheld: clients take the last block for the
        response (Claude Code, 2026-11).  After calls it is sent, as its vendor wants it back.
        """
        frames = self.write_event(event)
        is_start = isinstance(event, BlockStart)
        if not self.held_frames:
            is_late = is_start and self.block_kind == "thinking" and self.block_index > 0
            self.held_frames = frames if is_late else []
            return [] if is_late else frames
        if isinstance(event, MessageStop) and event.reason != "tool":
            return frames
        self.held_frames += frames
        has_text = isinstance(event, BlockDelta) and event.part != "signature"
        if not (has_text or is_start or isinstance(event, MessageStop)):
            return []
        frames, self.held_frames = self.held_frames, []
        return frames

    def write_event(self, event: Event) -> list[Json]:
        if isinstance(event, BlockStart):
            self.block_kind, self.is_signed = event.kind, False
        is_hidden = self.block_kind in ("thinking", "redacted") and not self.shows_thinking
        if is_hidden and isinstance(event, (BlockStart, BlockDelta, BlockStop)):
            return []
        if isinstance(event, BlockDelta):
            self.is_signed |= event.part == "signature" and event.text != ""
            delta = self.write_delta(event)
            return [self.block_frame("delta", delta=delta)] if delta else []
        if isinstance(event, BlockStart):
            self.block_index += 1
            self.has_refusal = self.has_refusal or event.kind == "refusal"
            block: Json = event.raw or {"type": "text", "text": ""}
            if event.kind == "tool":
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            elif event.kind == "thinking":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            elif event.kind == "redacted":
                block = {"type": "redacted_thinking", "data": block.get("data", "")}
            return [self.block_frame("start", content_block=block)]
        if isinstance(event, BlockStop):
            is_unsigned = self.block_kind == "thinking" and not self.is_signed
            mark = {"type": "signature_delta", "signature": UNSIGNED}
            frames = [self.block_frame("delta", delta=mark)] if is_unsigned else []
            return [*frames, self.block_frame("stop")]
        if isinstance(event, MessageStart):
            # Input tokens are estimated here; otherwise clients show the context as empty.
            usage = write_messages_usage(Usage(input=self.context.input_estimate))
            message = {"id": self.context.id, **EMPTY_MESSAGE, "model": self.context.model}
            return [{"type": "message_start", "message": {**message, "usage": usage}}]
        if isinstance(event, UsageUpdate):
            self.usage = event.usage
        return self.write_finish(event) if isinstance(event, MessageStop) else []

    def block_frame(self, step: str, **members: Any) -> Json:
        return {"type": f"content_block_{step}", "index": self.block_index, **members}

    def write_delta(self, event: BlockDelta) -> Json | None:
        part = event.part
        if part == "citation":
            return event.raw
        if part == "text" and self.block_kind == "thinking":
            part = "thinking"
        kind, key = TO_DELTA[part]
        is_hidden = part == "thinking" and self.context.hide_thinking
        return None if is_hidden else {"type": kind, key: event.text}

    def write_finish(self, event: MessageStop) -> list[Json]:
        reason = "filter" if self.has_refusal and event.reason == "end" else event.reason
        if reason == "stop" and event.stop_text is None:
            reason = "end"
        delta: Json = {"stop_reason": TO_STOP_REASON[reason], "stop_sequence": event.stop_text}
        if event.details:
            delta["stop_details"] = event.details
        usage = write_messages_usage(self.usage)
        return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


BLOCK_EVENTS = ("content_block_start", "content_block_delta", "content_block_stop")
MESSAGES_EVENTS = (*BLOCK_EVENTS, "message_start", "message_delta", "message_stop", "ping")


class MessagesRelay:
    """Native Anthropic frames, repaired: model name, unknown events, a missing end."""

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.output_estimate = 0.0
        self.finished = False
        self.started = False
        self.has_stop_reason = False
        self.has_tool_call = False
        self.block_count = 0
        self.in_block = False
        self.guard = RunawayGuard()  # of the open block

    def repair(self, frame: Json) -> list[Json]:
        kind = str(frame.get("type"))
        if self.finished:
            return []
        if kind == "error" or "error" in frame:
            raise read_stream_error(frame.get("error"))
        # AI SDK clients fail on unknown event types, so those are dropped.
        if kind not in MESSAGES_EVENTS or (kind == "ping" and not self.started):
            return []
        if self.started is (kind == "message_start"):
            raise UpstreamError(PROTOCOL_VIOLATION)
        if kind == "message_start":
            self.started = True
            message = get_dict(frame, "message")
            read_usage(message, MESSAGES_USAGE, self.usage)
            usage = {**get_dict(message, "usage"), "output_tokens": self.usage.output}
            usage["input_tokens"] = self.usage.input
            if not self.usage.prompt:  # clients would show the context as empty
                usage["input_tokens"] = self.context.input_estimate
            message = {**EMPTY_MESSAGE, **message, "model": self.context.model, "usage": usage}
            frame["message"] = message
        elif kind in BLOCK_EVENTS:
            self.repair_block(kind, frame)
        elif kind == "message_delta":
            frame["delta"] = delta = get_dict(frame, "delta")
            self.has_stop_reason = self.has_stop_reason or bool(delta.get("stop_reason"))
            if self.has_tool_call and delta.get("stop_reason") == "end_turn":
                delta["stop_reason"] = "tool_use"
            read_usage(frame, MESSAGES_USAGE, self.usage)
            frame["usage"] = {**get_dict(frame, "usage"), "output_tokens": self.usage.output}
            if "context_management" not in self.context.request_body:
                frame.pop("context_management", None)  # langchain fails on it unless requested
        elif kind == "message_stop":
            self.end()
        return [frame]

    def repair_block(self, kind: str, frame: Json) -> None:
        """Checks that indexes are dense and blocks do not overlap, or clients lose text or fail.

        The tokens of deltas are estimated, in case the upstream reports none.
        """
        is_start, is_stop = kind == "content_block_start", kind == "content_block_stop"
        self.block_count += is_start
        index = frame.get("index")
        content = get_dict(frame, "content_block" if is_start else "delta")
        is_misplaced = index != self.block_count - 1 or isinstance(index, bool)
        if is_start is self.in_block or is_misplaced or not (content or is_stop):
            raise UpstreamError(PROTOCOL_VIOLATION)
        self.in_block = not is_stop
        if is_start and content.get("type") == "tool_use":
            self.has_tool_call = True
            self.guard = RunawayGuard()
            name = get_text(content, "name")
            arguments = dump_text(content["input"]) if content.get("input") else ""
            self.output_estimate += self.context.estimate(name + arguments)
            content.update({"name": self.context.names[name]} if name in self.context.names else {})
        else:
            arguments = get_text(content, "partial_json")
            if arguments:
                self.guard.check(arguments)
            text = get_text(content, "text") or get_text(content, "thinking") or arguments
            self.output_estimate += self.context.estimate(text)

    def track(self, kind: str, text: str) -> None:
        if kind == "arguments":
            self.guard.check(text)
        self.output_estimate += self.context.estimate(text)

    def end(self) -> list[Json]:
        if self.finished:
            return []
        if not self.has_stop_reason or self.in_block:
            raise UpstreamError(TRUNCATED_RESPONSE)
        self.finished = True
        return [{"type": "message_stop"}]


def aggregate_messages(frames: list[Json]) -> Json:
    message: Json = {}
    #: (block, key) -> its text in pieces
    texts: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for frame in frames:
        kind, delta = frame["type"], get_dict(frame, "delta")
        if kind == "message_start":
            message = {**get_dict(frame, "message"), "content": []}
        elif kind == "content_block_start":
            message["content"].append(dict(get_dict(frame, "content_block")))
        elif kind == "content_block_delta" and delta.get("type") == "citations_delta":
            block = message["content"][frame["index"]]
            if not isinstance(block.get("citations"), list):
                block["citations"] = []
            block["citations"].append(delta.get("citation"))
        elif kind == "content_block_delta":
            for key, value in delta.items():
                if key != "type" and isinstance(value, str):
                    texts[frame["index"], key].append(value)
        elif kind == "message_delta":
            extra = {key: frame[key] for key in frame if key not in ("type", "delta", "usage")}
            counts = {key: count for key, count in frame["usage"].items() if count is not None}
            message.update({**extra, **delta, "usage": {**message["usage"], **counts}})
    for (index, key), pieces in texts.items():
        block, text = message["content"][index], "".join(pieces)
        if key != "partial_json":
            block[key] = get_text(block, key) + text
        elif text:
            block["input"] = parse_arguments(text)
    return message


class MessagesDialect(Dialect):
    name = "messages"
    id_prefix = "msg_"
    framing = MessagesFraming
    reader = MessagesReader
    writer = MessagesWriter
    relay = MessagesRelay
    read_request = staticmethod(read_messages_request)
    write_request = staticmethod(write_messages_request)
    aggregate = staticmethod(aggregate_messages)

    def request_info(self, body: Json) -> RequestInfo:
        messages = message_list(body)
        if int_field(body, "max_tokens") is None:
            raise invalid("max_tokens", "Field required.")  # as Anthropic says it
        return RequestInfo(
            model=need_str(body, "model"),
            stream=flag_field(body, "stream"),
            include_usage=True,
            initiator=read_initiator(messages),
            session=read_messages_session(body),
            opening=opening_text(without_billing_header(body.get("system")), messages),
        )

    def expand(self, response: Json) -> list[Json]:
        return [*expand_message(response), {"type": "message_stop"}]

    def read_delta(self, frame: Json) -> Delta | None:
        delta = get_dict(frame, "delta")
        part, key = FROM_DELTA.get(get_text(delta, "type"), ("signature", ""))
        if part == "signature" or delta.keys() != {"type", key}:
            return None
        kind, text = "thinking" if key == "thinking" else part, get_text(delta, key)
        return (kind, text) if text else None

    def error_body(self, error: ApiError, request_id: str) -> Json:
        payload = {"type": ERROR_NAMES[error.kind][2], "message": error.text()}
        return {"type": "error", "error": payload, "request_id": request_id}

    def error_status(self, error: ApiError) -> int:
        """529 for an overload, as in Anthropic's API."""
        return 529 if isinstance(error, Overloaded) else error.status

    def ping(self, has_output: bool) -> bytes:
        """`ping` inside a message, a comment before it."""
        return b'event: ping\ndata: {"type":"ping"}\n\n' if has_output else SSE_COMMENT_PING


# 8.4 OpenAI responses

# Prefixes of opaque text: another upstream's thinking that a responses client sends back, and a
# responses upstream's reasoning that a client of another dialect sends back.
THINKING_ENVELOPE = "gw1.a."
RESPONSES_ENVELOPE = "gw1.r."

RESPONSES_FIELDS = field_table({
    ("keep", "keep"): "model input instructions max_output_tokens parallel_tool_calls "
    "prompt_cache_key reasoning stream temperature text tool_choice tools top_p",
    ("keep", "drop"): "metadata",  # echoed in a converted response
    ("drop", "keep"): "* context_management truncation",
    ("silent", "silent"): "client_metadata store stream_options",
    ("refuse", "refuse"): "background conversation previous_response_id prompt",  # need a store
    ("drop", "drop"): "access_programs background_options image include max_tool_calls moderation "
    "prompt_cache_options prompt_cache_retention safety_identifier service_tier top_logprobs user",
})  # fmt: skip
# Request fields that the response echoes, and their defaults.
RESPONSES_ECHOED: Json = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
    "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_p": 1.0, "truncation": "disabled", "user": None,
}  # fmt: skip


def pack(prefix: str, value: Json) -> str:
    return prefix + base64.urlsafe_b64encode(dump_json(value)).decode()


def unpack(prefix: str, text: str) -> Json | None:
    """Decodes opaque text with that prefix; None for anything else."""
    if not text.startswith(prefix):
        return None
    try:
        data = base64.urlsafe_b64decode(text.removeprefix(prefix))
        return load_object(data, MAX_PACKED_VALUES)
    except ValueError:
        return None


def refuse_state(body: Json) -> None:
    """Raises InvalidRequest for fields that need stored responses."""
    for key in ("previous_response_id", "conversation"):
        if body.get(key):
            text = f"{key}: responses are not stored here; send the whole conversation as `input`."
            raise InvalidRequest(text, param=key, code="previous_response_not_found")
    for key in ("background", "prompt"):
        if body.get(key):
            raise UnsupportedFeature(f"{key}: is not supported here.", param=key)


def searches_tools(body: Json) -> bool:
    """Whether the client offers a client-side tool search, which Copilot does not know."""
    search = {"type": "tool_search", "execution": "client"}.items()
    return any(isinstance(tool, dict) and search <= tool.items() for tool in all_tools(body))


def all_tools(body: Json) -> list[Any]:
    """The tools of a body, including those declared inside its conversation."""
    tools = list_field(body, "tools")
    added = [
        tool
        for index, item in enumerate(input_items(body))
        if item_kind(item) == "additional_tools"
        for tool in list_field(item, "tools", f"input.{index}")
    ]
    return [*{dump_json(tool): tool for tool in (*tools, *added)}.values()] if added else tools


def item_kind(item: Json) -> str:
    kind = item.get("type")
    return kind if isinstance(kind, str) else "message" if "role" in item else ""


def input_items(body: Json) -> list[Json]:
    """The items of `input`, each an object; a string becomes a user message."""
    value = body.get("input")
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return object_list(body, "input")


CUSTOM_SCHEMA: Json = {
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
    "additionalProperties": False,
}  # fmt: skip
# Client-side tools defined by the vendor: item type of a call in the history -> tool name.
CLIENT_CALLS = {
    "local_shell_call": "local_shell", "shell_call": "shell", "apply_patch_call": "apply_patch",
    "computer_call": "computer", "tool_search_call": "tool_search",
}  # fmt: skip
# Calls of server-side tools: their results, if any, are converted to text.
SERVER_TOOL_ITEMS = (
    "code_interpreter_call", "file_search_call", "image_generation_call", "mcp_approval_request",
    "mcp_approval_response", "mcp_call", "mcp_list_tools", "web_search_call",
)  # fmt: skip


def server_tool_text(item: Json) -> str:
    texts: list[Any] = []
    for key in ("output", "results", "outputs"):
        output = item.get(key)
        for part in output if isinstance(output, list) else [output]:
            if isinstance(part, dict):
                part = part.get("text") or part.get("logs")
            texts.append(part)
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def flat_name(namespace: str, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


class AssistantTurn(NamedTuple):
    """An assistant turn being assembled from items in any order."""

    content: list[Block]  #: text and thinking before the calls, whose results must follow them
    calls: list[Block]  #: calls, and thinking between them
    results: list[Block]


class ResponsesRequestReader:
    def __init__(self, body: Json) -> None:
        self.body = body
        self.chat = Conversation(turns_field="input")
        self.turns: list[Turn | AssistantTurn] = []
        self.tools: dict[str, Tool] = {}  # by their names in the Conversation
        self.turn_by_call_id: dict[str, AssistantTurn] = {}
        self.ids_with_output: set[str] = set()  # of calls whose output is among the items
        #: those of them whose output is still to come
        self.awaiting_output: OrderedDict[str, AssistantTurn] = OrderedDict()

    def read(self) -> Conversation:
        body, chat = self.body, self.chat
        refuse_state(body)
        instructions = str_field(body, "instructions")
        if instructions:
            chat.system.append(Text(instructions))
        items = input_items(body)
        self.ids_with_output = {
            need_str(item, "call_id", f"input.{index}")
            for index, item in enumerate(items)
            if item_kind(item).endswith("_output")
        }
        for index, item in enumerate(items):
            self.read_item(item, f"input.{index}")
        for turn in self.turns:
            if isinstance(turn, AssistantTurn):
                chat.turns.append(Turn("assistant", [*turn.content, *turn.calls]))
                turn = Turn("user", turn.results)
            chat.turns.append(turn)
        chat.normalize()
        self.read_tools(body, "")
        chat.tools = [*self.tools.values()]
        self.read_choice()
        self.read_settings()
        chat.name_tools()
        return chat

    def read_item(self, item: Json, path: str) -> None:
        kind = item_kind(item)
        if kind == "message":
            self.read_message(item, path)
        elif kind in ("function_call", "custom_tool_call", *CLIENT_CALLS):
            call = self.read_call(item, kind, path)
            self.turn_by_call_id[call.id] = turn = self.open_turn()
            turn.calls.append(call)
            if call.id in self.ids_with_output:
                self.awaiting_output[call.id] = turn
        elif kind.endswith("_output"):
            self.read_output(item, kind, path)
        elif kind == "reasoning":
            # Only thinking that was packed here: the responses API's own is for its models alone.
            thinking = unpack(THINKING_ENVELOPE, get_str(item, "encrypted_content"))
            if thinking is not None:
                values = [get_text(thinking, key) for key in ("thinking", "signature", "data")]
                turn = self.open_turn()
                (turn.calls or turn.content).append(Thinking(*values))
        elif kind == "additional_tools":
            self.read_tools(item, path)
        elif kind in SERVER_TOOL_ITEMS:
            text = server_tool_text(item)
            if text:
                self.add_content([Text(f"[{kind.removesuffix('_call')}: {text}]")])
            else:
                self.chat.dropped.append(f"input.{kind}")
        elif kind == "item_reference":
            text = f"{path}: items are not stored here; send the item itself."
            raise InvalidRequest(text, param=path, code="invalid_item_reference")
        else:
            text = f"{path}.type: {kind[:100]!r} is not supported on this model."
            raise UnsupportedFeature(text, param=f"{path}.type")

    def read_message(self, item: Json, path: str) -> None:
        role = read_role(item, RESPONSES_ROLES, path)
        blocks = read_parts(item.get("content"), f"{path}.content")
        if role == "assistant":
            self.add_content(blocks)
        elif role == "user":
            self.turns.append(Turn("user", blocks))
        else:
            texts = [block for block in blocks if isinstance(block, Text)]
            if self.turns:
                self.turns.append(Turn("system", [*texts]))
            else:
                self.chat.system.extend(texts)

    def open_turn(self) -> AssistantTurn:
        turn = self.turns[-1] if self.turns else None
        if not isinstance(turn, AssistantTurn) or turn.results:
            turn = AssistantTurn([], [], [])
            self.turns.append(turn)
        return turn

    def add_content(self, blocks: list[Block]) -> None:
        """Adds assistant text to the turn whose calls await their output, if there is one."""
        turn = next(iter(self.awaiting_output.values()), None) or self.open_turn()
        turn.content.extend(blocks)

    @staticmethod
    def read_call(item: Json, kind: str, path: str) -> ToolCall:
        call_id = need_str(item, "call_id", path)
        if kind in CLIENT_CALLS:
            key = next((key for key in ("action", "operation", "arguments") if item.get(key)), "")
            return ToolCall(call_id, CLIENT_CALLS[kind], dump_text(item.get(key) or {}))
        name = flat_name(str_field(item, "namespace", path) or "", need_str(item, "name", path))
        if kind == "custom_tool_call":
            return ToolCall(call_id, name, dump_text({"input": need_str(item, "input", path)}))
        arguments = item.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = dump_text(arguments if arguments is not None else {})
        return ToolCall(call_id, name, arguments)

    def read_output(self, item: Json, kind: str, path: str) -> None:
        call_id = need_str(item, "call_id", path)
        output = item.get("output")
        if kind == "tool_search_output":
            output = f"Tools available now: {', '.join(self.read_tools(item, path)) or 'none'}"
        elif isinstance(output, dict) and output.get("type") == "computer_screenshot":
            output = [{**output, "type": "input_image"}]
        parts = output if isinstance(output, list) else []
        if isinstance(output, dict) or not all(map(is_known_part, parts)):
            output = dump_text(output)  # a shell's object, or parts of an unknown type
        result = ToolResult(call_id, read_parts(output, f"{path}.output"))
        self.awaiting_output.pop(call_id, None)
        if call_id in self.turn_by_call_id:  # right after its call, wherever the output came
            self.turn_by_call_id[call_id].results.append(result)
        else:
            self.turns.append(Turn("user", [result]))

    def read_tools(self, holder: Json, path: str, namespace: str = "") -> list[str]:
        """The flat names of the tools of the request, a namespace or a search result."""
        names: list[str] = []
        for index, item in enumerate(list_field(holder, "tools", path)):
            item_path = f"{join_path(path, 'tools')}.{index}"
            names += self.read_tool(need_dict(item, item_path), item_path, namespace)
        return names

    def read_tool(self, tool: Json, path: str, namespace: str) -> list[str]:
        kind = need_str(tool, "type", path)
        if kind == "namespace":
            return self.read_tools(tool, path, need_str(tool, "name", path))
        name = str_field(tool, "name", path) or ""
        description = str_field(tool, "description", path) or ""
        if kind == "custom":
            grammar = dict_field(tool, "format", path).get("definition")
            if isinstance(grammar, str):
                description = f"{description}\n\nThe input must follow this grammar:\n{grammar}"
            schema = CUSTOM_SCHEMA
        elif kind == "tool_search" and tool.get("execution") == "client":
            name, schema = "tool_search", object_schema(tool.get("parameters"), path)
        elif kind == "function":
            name = need_str(tool, "name", path)
            schema = object_schema(tool.get("parameters"), f"{path}.parameters")
        else:
            self.chat.server_tools.append(kind)
            return []
        flat = flat_name(namespace, name)
        if flat not in self.tools:
            strict = bool_field(tool, "strict", path)
            self.tools[flat] = Tool(flat, description, schema, strict, kind, namespace)
        elif self.tools[flat].namespace != namespace:
            text = f"{path}: two tools become {flat!r} when joined to their namespaces; rename one."
            raise InvalidRequest(text, param="tools")
        return [flat]

    def read_choice(self) -> None:
        chat, choice, path = self.chat, self.body.get("tool_choice"), "tool_choice"
        kind = (str_field(choice, "type", path) or "function") if isinstance(choice, dict) else ""
        if not isinstance(choice, dict):
            mode = word_field(self.body, path, CHOICE_MODES)
            chat.choice = ToolChoice(mode) if mode else None
        elif kind == "allowed_tools":
            names = allowed_names(choice, path)
            chat.tools = [
                tool
                for tool in chat.tools
                if {tool.name, tool.name.removeprefix(flat_name(tool.namespace, ""))} & names
            ]
            mode = word_field(choice, "mode", ("auto", "required"), path)
            chat.choice = ToolChoice(mode or "auto")
        elif kind in ("function", "custom"):
            namespace = str_field(choice, "namespace", path) or ""
            chat.choice = ToolChoice("named", flat_name(namespace, need_str(choice, "name", path)))
        else:
            raise UnsupportedFeature(f"{kind} is not available on this model.", param="tools")
        drop_server_tools(chat.server_tools, len(chat.tools), "", chat.dropped)

    def read_settings(self) -> None:
        body, chat = self.body, self.chat
        chat.max_tokens = int_field(body, "max_output_tokens")
        chat.temperature = number_field(body, "temperature")
        chat.top_p = number_field(body, "top_p")
        chat.parallel = bool_field(body, "parallel_tool_calls")
        chat.session = str_field(body, "prompt_cache_key") or ""
        chat.effort = word_field(dict_field(body, "reasoning"), "effort", EFFORTS, "reasoning")
        chat.verbosity = str_field(dict_field(body, "text"), "verbosity", "text")
        chat.output = wanted_output(body, "responses")
        chat.dropped += split_fields(body, RESPONSES_FIELDS)[1]


def write_responses_request(chat: Conversation, model: Model) -> Json:
    """The body of a streaming request; nothing is stored, so reasoning travels encrypted."""
    chat.refuse_prefill()
    items = write_input_items(chat)
    body: Json = {"model": model.id, "input": items}
    if chat.system and items:
        body["instructions"] = join_texts(chat.system)
    elif chat.system:
        items.append({"role": "developer", "content": join_texts(chat.system)})
    if not items:
        raise chat.refuse_empty()
    if chat.tools:
        body["tools"] = [write_responses_tool(tool, chat) for tool in chat.tools]
        if chat.choice and chat.choice.mode == "named":
            name = chat.wire_name(chat.choice.name)
            body["tool_choice"] = {"type": "function", "name": name}
        elif chat.choice:
            body["tool_choice"] = chat.choice.mode
        if chat.parallel is not None:
            body["parallel_tool_calls"] = chat.parallel
    effort = chat.effort
    if not effort and chat.thinking_budget:
        effort = effort_of_budget(chat.thinking_budget)
    level = clamp_effort(effort, model.efforts) if effort else None
    text: Json = {}
    if chat.output:
        text_format = write_response_format(chat.output)
        json_schema = text_format.pop("json_schema", {})
        text["format"] = {**text_format, **json_schema}
    if chat.verbosity is not None:
        text["verbosity"] = chat.verbosity
    settings = {
        "max_output_tokens": max(chat.max_tokens, 16) if chat.max_tokens else None,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "reasoning": {"effort": level, "summary": "auto"} if level else None,
        "text": text or None,
        "prompt_cache_key": short_hash(chat.session, 32) if chat.session else None,
    }
    body.update({key: value for key, value in settings.items() if value is not None})
    chat.drop_settings("top_k")
    body.update(store=False, include=[ENCRYPTED_REASONING], stream=True)
    return body


def write_input_items(chat: Conversation) -> list[Json]:
    items: list[Json] = []
    for turn in chat.turns:
        if turn.role == "system":
            items.append({"role": "developer", "content": join_texts(turn.blocks)})
        elif turn.role == "assistant":
            written = [write_assistant_item(block, chat) for block in turn.blocks]
            items += [item for item in written if item]
        else:
            parts: list[Json] = []
            for block in turn.blocks:
                if isinstance(block, ToolResult):
                    items.append(write_output_item(block, parts))
                else:
                    parts += write_input_parts(block)
            if parts:
                items.append({"type": "message", "role": "user", "content": parts})
    return items


def write_assistant_item(block: Block, chat: Conversation) -> Json | None:
    """None for images, documents and another vendor's thinking."""
    if isinstance(block, Thinking):
        return write_reasoning_item(block.text, block.signature or block.redacted)
    if isinstance(block, ToolCall):
        call = {"call_id": wire_id(block.id), "name": chat.wire_name(block.name)}
        return {"type": "function_call", **call, "arguments": complete_arguments(block.arguments)}
    if not isinstance(block, (Text, Refusal)):
        return None
    part: Json = {"type": "output_text", "text": block.text, "annotations": []}
    if isinstance(block, Refusal):
        part = {"type": "refusal", "refusal": block.text}
    return {"type": "message", "role": "assistant", "content": [part]}


def write_input_parts(block: Block) -> list[Json]:
    """The parts for one block of a user turn; none for what only an assistant sends."""
    if isinstance(block, (Text, Refusal)):
        return [{"type": "input_text", "text": block.text}]
    if isinstance(block, Image):
        url = block.url or f"data:{block.media_type};base64,{block.data}"
        return [{"type": "input_image", "image_url": url, "detail": block.detail or "auto"}]
    if not isinstance(block, Document):
        return []
    if block.text:
        heading = f"[{block.title}]\n" if block.title else ""
        return [{"type": "input_text", "text": heading + block.text}]
    data = f"data:{block.media_type};base64,{block.data}"
    return [{"type": "input_file", "filename": block.title or "document.pdf", "file_data": data}]


def write_output_item(result: ToolResult, next_parts: list[Json]) -> Json:
    """A tool's output; its images move to the next message, as Copilot accepts only text."""
    text = join_texts(result.blocks)
    blocks = [block for block in result.blocks if not isinstance(block, (Text, Refusal))]
    media = [part for block in blocks for part in write_input_parts(block)]
    call_id = wire_id(result.id)
    if media:
        next_parts += [{"type": "input_text", "text": f"From tool call {call_id}:"}, *media]
        text = text or "[in the next message]"
    output = output_text(text, result.is_error)
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def write_responses_tool(tool: Tool, chat: Conversation) -> Json:
    entry: Json = {"type": "function", "name": chat.wire_name(tool.name)}
    if tool.description:
        entry["description"] = tool.description
    return {**entry, "parameters": tool.schema, "strict": bool(tool.strict)}


def write_reasoning_item(text: str, signature: str) -> Json | None:
    """Reasoning from a responses upstream, as an item; None for another vendor's thinking."""
    encrypted = get_str(unpack(RESPONSES_ENVELOPE, signature) or {}, "enc")
    summary = [{"type": "summary_text", "text": text}] if text else []
    item = {"type": "reasoning", "summary": summary, "encrypted_content": encrypted}
    return item if encrypted else None


RESPONSES_FAILURES = ("response.failed", "response.cancelled", "error")
RESPONSES_ENDS = ("response.completed", "response.incomplete", *RESPONSES_FAILURES)


def responses_failure(frame: Json) -> ApiError | None:
    """The error in a terminal frame: the response's, or the frame's own, nested or flat."""
    kind = frame.get("type")
    if kind not in RESPONSES_FAILURES and (kind or "error" not in frame):
        return None
    response = get_dict(frame, "response")
    return read_stream_error(response.get("error") or frame.get("error") or frame)


# Type of a delta -> kind of the block that it extends.
ITEM_DELTAS = {
    "response.output_text.delta": "text", "response.reasoning_text.delta": "thinking",
    "response.refusal.delta": "refusal", "response.reasoning_summary_text.delta": "thinking",
    "response.function_call_arguments.delta": "tool",
}  # fmt: skip
CALL_DELTAS = {
    "response.custom_tool_call_input.delta": "input",
    "response.function_call_arguments.delta": "arguments",
}


@dataclass(slots=True)
class OutputItem:
    """An output item being streamed; its events wait until the items before it are complete."""

    kind: str = ""
    call_id: str = ""
    signature: str = ""  #: its encrypted reasoning, packed
    events: list[Event] = field(default_factory=list)
    open_block: str = ""  #: kind of the open block
    pieces: list[str] = field(default_factory=list)  #: the text of the item so far
    part_count: int = 0  #: number of complete content parts
    complete: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def read(self, kind: str, frame: Json) -> None:
        if kind in ITEM_DELTAS:
            self.add(ITEM_DELTAS[kind], get_text(frame, "delta"))
        elif kind == "response.output_item.added":
            self.open(get_dict(frame, "item"))
        elif kind == "response.output_item.done":
            self.close(get_dict(frame, "item"))
        elif kind == "response.reasoning_summary_part.added" and self.pieces:
            self.add("thinking", "\n\n")
        elif kind == "response.content_part.done":
            self.end_part(get_dict(frame, "part"))
        elif kind == "response.custom_tool_call_input.delta":
            self.pieces.append(get_text(frame, "delta"))

    def open(self, payload: Json) -> None:
        self.kind = str(payload.get("type") or "")
        if self.kind in ("function_call", "custom_tool_call") and payload.get("name"):
            self.open_block = "tool"
            self.call_id = str(payload.get("call_id") or payload.get("id") or "")
            name = flat_name(get_str(payload, "namespace"), str(payload["name"]))
            self.events.append(BlockStart("tool", self.call_id, name))

    def add(self, block_kind: str, text: str) -> None:
        """Adds text to a block, opened if need be; a call is opened by its name alone."""
        if not text or (block_kind == "tool" and not self.open_block):
            return
        if self.open_block != block_kind:
            self.end_text()
            self.open_block = block_kind
            self.events.append(BlockStart(block_kind, is_paragraph=not self.pieces))
        self.pieces.append(text)
        self.events.append(BlockDelta("arguments" if block_kind == "tool" else "text", text))

    def end_text(self) -> None:
        """Closes an open text block; calls and thinking end with their item."""
        if self.open_block in ("text", "refusal"):
            self.events.append(BlockStop())
            self.open_block = ""

    def end_part(self, part: Json) -> None:
        """Ends a content part; text that came only with it is added."""
        if not self.open_block:
            self.add("text", get_text(part, "text"))
            self.add("refusal", get_text(part, "refusal"))
        self.end_text()
        self.part_count += 1

    def close(self, payload: Json) -> None:
        """Ends the item; content that came only with it is added."""
        if not self.kind:
            self.open(payload)
        if self.kind == "message":
            content = payload.get("content")
            parts = content if isinstance(content, list) else []
            for part in parts[self.part_count :]:
                self.end_part(part if isinstance(part, dict) else {})
        elif self.kind == "function_call" and not self.pieces:
            self.add("tool", get_text(payload, "arguments"))
        elif self.kind == "custom_tool_call":
            call_input = get_text(payload, "input") or self.text
            self.add("tool", dump_text({"input": call_input}))
        elif self.kind == "reasoning":
            self.close_reasoning(payload)
        if self.open_block:
            self.events.append(BlockStop())
        self.open_block, self.complete = "", True

    def close_reasoning(self, payload: Json) -> None:
        """Encrypted reasoning is reliable only in the last frame of its item."""
        if not self.pieces:
            parts = get_dicts(payload, "summary") or get_dicts(payload, "content")
            texts = [get_text(part, "text") for part in parts]
            self.add("thinking", "\n\n".join(filter(None, texts)))
        encrypted = get_text(payload, "encrypted_content")
        if not encrypted:
            return
        self.signature = pack(RESPONSES_ENVELOPE, {"id": payload.get("id"), "enc": encrypted})
        if self.open_block == "thinking":
            self.events.append(BlockDelta("signature", self.signature))
        else:
            self.events += [BlockStart("redacted", raw={"data": self.signature}), BlockStop()]


class ResponsesReader:
    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.items: defaultdict[int, OutputItem] = defaultdict(OutputItem)
        self.current_index = 0  # index of the item whose events are passed on
        self.started = False

    def read(self, frame: Json) -> list[Event]:
        failure = responses_failure(frame)
        if failure:
            return [StreamError(failure)]
        kind, index = str(frame.get("type") or ""), frame.get("output_index")
        events: list[Event] = []
        is_start = kind in ("response.created", *RESPONSES_ENDS) or isinstance(index, int)
        if is_start and not self.started:
            self.started = True
            head = get_dict(frame, "response")
            events.append(MessageStart(str(head.get("id") or ""), str(head.get("model") or "")))
        if kind in RESPONSES_ENDS:
            return events + self.read_end(kind, frame)
        if isinstance(index, int) and not self.items[index].complete:
            self.items[index].read(kind, frame)
        while self.current_index in self.items:
            item = self.items[self.current_index]
            events += item.events
            item.events.clear()
            if not item.complete:
                break
            self.current_index += 1
        return events

    def track(self, kind: str, text: str) -> None:
        self.items[self.current_index].pieces.append(text)

    def read_end(self, kind: str, frame: Json) -> list[Event]:
        """The terminal frame: items that were never streamed, usage, finish."""
        events: list[Event] = []
        response = get_dict(frame, "response")
        payloads = dict(enumerate(get_dicts(response, "output")))
        for index in sorted(self.items.keys() | payloads):
            item = self.items[index]
            if not item.complete:
                item.close(payloads.get(index) or {"type": item.kind})
            if item.kind == "function_call" and item.pieces and load_object(item.text) is None:
                kind = "response.incomplete"  # a truncated call must not be run
            events += item.events
        read_usage(response, RESPONSES_USAGE, self.usage)
        read_copilot_usage(frame, self.usage)
        if self.usage.source:
            events.append(UsageUpdate(self.usage))
        items = self.items.values()
        calls = [item.call_id for item in items if item.call_id]
        signed = next((item for item in reversed(items) if item.signature), OutputItem())
        self.context.keep_reasoning(calls, signed.text, signed.signature)
        reason = "end"
        if kind == "response.incomplete":
            details = get_dict(response, "incomplete_details")
            reason = "filter" if details.get("reason") == "content_filter" else "length"
        return [*events, MessageStop(reason)]

    def end(self) -> list[Event]:
        """Nothing: a response without its terminal frame is incomplete."""
        return []


def response_frame(context: ResponseContext, step: str, **members: Any) -> Json:
    """`response.created`, `response.completed` and so on; `members` are those of the response."""
    response: Json = {"id": context.id, "object": "response", "created_at": context.created}
    response |= {"status": "in_progress" if step == "created" else step, "error": None}
    response |= {"incomplete_details": None, "model": context.model, "output": []}
    response |= {"store": False, "usage": None, **RESPONSES_ECHOED}
    request_body = context.request_body
    echoed = {
        key: request_body[key] for key in RESPONSES_ECHOED if request_body.get(key) is not None
    }
    return {"type": f"response.{step}", "response": {**response, **echoed, **members}}


ITEM_PREFIXES = {
    "custom_tool_call": "ctc_", "function_call": "fc_", "message": "msg_", "reasoning": "rs_",
    "tool_search_call": "tsc_", "web_search_call": "ws_",
}  # fmt: skip


def output_item_id(context: ResponseContext, index: int, kind: str) -> str:
    return ITEM_PREFIXES.get(kind, "item_") + short_hash(f"{context.id} {index}", 24)


def unwrap_input(arguments: str) -> str:
    """Unwraps a custom tool's input from its JSON object; other text is returned unchanged."""
    payload = load_object(arguments)
    values = [*payload.values()] if payload else []
    return values[0] if len(values) == 1 and isinstance(values[0], str) else arguments


# Kind of a block, or of the tool that is called -> type of its item.
ITEM_TYPES = {
    "text": "message", "refusal": "message", "thinking": "reasoning", "redacted": "reasoning",
    "function": "function_call", "custom": "custom_tool_call", "tool_search": "tool_search_call",
}  # fmt: skip
INCOMPLETE_REASONS = {
    "length": "max_output_tokens", "context": "max_output_tokens", "filter": "content_filter",
}  # fmt: skip
# Type of a part -> (names of the part's frames and of its text's, keys of its index and its text).
PART_FRAMES = {
    "output_text": ("content_part", "output_text", "content_index", "text"),
    "refusal": ("content_part", "refusal", "content_index", "refusal"),
    "summary_text": ("reasoning_summary_part", "reasoning_summary_text", "summary_index", "text"),
}


def write_text_part(block_kind: str, text: str) -> Json:
    if block_kind == "refusal":
        return {"type": "refusal", "refusal": text}
    if block_kind == "thinking":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def expand_part(position: Json, index: int, part: Json) -> list[Json]:
    """The four frames of one part: it is added, its text comes and is done, it is done."""
    names = PART_FRAMES.get(str(part.get("type")), PART_FRAMES["output_text"])
    part_name, text_name, index_key, key = names
    text = get_text(part, key)
    logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
    frames: list[Json] = [
        {"type": f"response.{part_name}.added", "part": {**part, key: ""}},
        {"type": f"response.{text_name}.delta", "delta": text, **logprobs},
        {"type": f"response.{text_name}.done", key: text, **logprobs},
        {"type": f"response.{part_name}.done", "part": part},
    ]
    return [{"type": frame["type"], **position, index_key: index, **frame} for frame in frames]


def mark_if_cut(item: Json, arguments: Any, is_last: bool) -> bool:
    """Gives an item that was cut its status; `is_last`: of a response that is incomplete."""
    is_cut = is_last or item.get("status") == "incomplete"
    if isinstance(arguments, str) and (is_last or arguments.lstrip()[:1] == "{"):
        is_cut = load_object(arguments) is None
    if is_cut:
        item["status"] = "incomplete"
    return is_cut


def expand_item(index: int, item: Json) -> list[Json]:
    """The frames of one item: clients read text and arguments from deltas only.

    Nothing says that the arguments of a call that was cut are done.
    """
    position = {"item_id": item.get("id"), "output_index": index}
    opened_item = {**item, "status": "in_progress"}
    frames: list[Json] = []
    if item.get("type") == "message":
        opened_item["content"] = []
        for part_index, part in enumerate(get_dicts(item, "content")):
            frames += expand_part(position, part_index, part)
    elif item.get("type") == "reasoning":
        opened_item = {"id": item.get("id"), "type": "reasoning", "summary": []}
        for part_index, part in enumerate(get_dicts(item, "summary")):
            frames += expand_part(position, part_index, {**part, "type": "summary_text"})
    for kind, key in (("function_call", "arguments"), ("custom_tool_call", "input")):
        if isinstance(item.get(key), str):
            opened_item[key] = ""
            name = {"name": item.get("name")} if key == "arguments" else {}
            frames += [
                {"type": f"response.{kind}_{key}.delta", **position, "delta": item[key]},
                {"type": f"response.{kind}_{key}.done", **position, **name, key: item[key]},
            ][: 1 if item.get("status") == "incomplete" else 2]
    return [
        {"type": "response.output_item.added", "output_index": index, "item": opened_item},
        *frames,
        {"type": "response.output_item.done", "output_index": index, "item": dict(item)},
    ]


class ResponsesWriter:
    """Events -> responses stream events.  `StreamTranslator` adds their sequence numbers.

    The frames of an item are those of `expand_item`, its delta in any number of pieces.
    """

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.output: list[Json] = []  # complete items
        self.item: Json = {}
        self.kind = ""  # of the open block
        self.pieces: list[str] = []
        self.signature: list[str] = []
        self.sent_count = 0  # how many frames of the item need not be sent when it is complete
        self.is_ended = False  # the item, but not yet sent: the response may end as incomplete

    def write(self, event: Event) -> list[Json]:
        if isinstance(event, BlockDelta):
            return self.write_delta(event)
        if isinstance(event, MessageStart):
            created = response_frame(self.context, "created")
            return [created, {**created, "type": "response.in_progress"}]
        if isinstance(event, BlockStart):
            frames = self.end_item()
            self.kind, self.pieces, self.signature = event.kind, [], []
            return frames + (self.open_item(event) if event.kind != "opaque" else [])
        if isinstance(event, BlockStop):
            self.is_ended = self.kind != "opaque"
        if isinstance(event, UsageUpdate):
            self.usage = event.usage
        return self.write_stop(event) if isinstance(event, MessageStop) else []

    def open_item(self, event: BlockStart) -> list[Json]:
        tool = self.context.tools.get(event.name)
        tool_kind = tool.kind if tool else "function"
        kind = ITEM_TYPES[tool_kind if event.kind == "tool" else event.kind]
        item_id = output_item_id(self.context, len(self.output), kind)
        self.item = item = dict[str, Any](id=item_id, type=kind)
        self.sent_count = 1
        if kind == "message":
            content = [write_text_part(self.kind, "")]
            item |= {"role": "assistant", "status": "in_progress", "content": content}
            self.sent_count = 3  # its part, and a delta even if there is no text
            return expand_item(len(self.output), item)[:2]
        if kind == "reasoning":
            item["summary"] = []
            self.signature = [str((event.raw or {}).get("data") or "")]
        elif kind == "tool_search_call":
            item |= {"execution": "client", "call_id": event.id, "status": "", "arguments": {}}
        else:
            item |= {"call_id": event.id, "status": "", "name": event.name}
            item["input" if kind == "custom_tool_call" else "arguments"] = ""
            if tool and tool.namespace:
                item["name"] = event.name.removeprefix(flat_name(tool.namespace, ""))
                item["namespace"] = tool.namespace
        return expand_item(len(self.output), item)[:1]

    def frame(self, kind: str, **members: Any) -> Json:
        position = {"item_id": self.item["id"], "output_index": len(self.output)}
        return {"type": f"response.{kind}", **position, **members}

    def write_delta(self, event: BlockDelta) -> list[Json]:
        text = event.text
        if event.part == "signature":
            self.signature.append(text)
        if event.part in ("signature", "citation") or self.kind == "opaque" or not text:
            return []
        self.pieces.append(text)
        if self.kind == "text":
            return [self.frame("output_text.delta", content_index=0, delta=text, logprobs=[])]
        if self.kind == "refusal":
            return [self.frame("refusal.delta", content_index=0, delta=text)]
        if self.item["type"] == "function_call":
            self.sent_count = 2
            return [self.frame("function_call_arguments.delta", delta=text)]
        if self.kind != "thinking" or self.context.hide_thinking:
            return []
        frames = [self.frame("reasoning_summary_text.delta", summary_index=0, delta=text)]
        if self.sent_count == 1:
            self.sent_count = 3
            part = write_text_part("thinking", "")
            frames.insert(0, self.frame("reasoning_summary_part.added", summary_index=0, part=part))
        return frames

    def track(self, kind: str, text: str) -> None:
        self.pieces.append(text)

    def end_item(self, reason: str | None = "") -> list[Json]:
        """The last frames of an item that has ended.

        `reason`: why its response is incomplete, None if it is complete, "" if it goes on.
        """
        if not self.is_ended:
            return []
        self.is_ended, text = False, "".join(self.pieces)
        self.complete_item(text)
        arguments = text if self.kind == "tool" else None
        is_cut = reason is not None and mark_if_cut(self.item, arguments, bool(reason))
        if is_cut and self.item["type"] == "function_call":
            self.item["arguments"] = text
        frames = expand_item(len(self.output), self.item)[self.sent_count :]
        self.output.append(self.item)
        return frames

    def complete_item(self, text: str) -> None:
        item, kind = self.item, self.item["type"]
        if kind == "reasoning":
            if self.sent_count > 1:
                item["summary"] = [write_text_part("thinking", text)]
            signature = "".join(self.signature)
            thinking = {"thinking": text, "signature": signature}
            if self.kind == "redacted":
                thinking = {"data": signature}
            if signature:
                item["encrypted_content"] = pack(THINKING_ENVELOPE, thinking)
            return
        item["status"] = "completed"
        if kind == "message":
            item["content"] = [write_text_part(self.kind, text)]
        elif kind == "tool_search_call":
            item["arguments"] = parse_arguments(text)
        elif kind == "custom_tool_call":
            item["input"] = unwrap_input(text)
        else:
            item["arguments"] = text or "{}"

    def write_stop(self, event: MessageStop) -> list[Json]:
        reason = INCOMPLETE_REASONS.get(event.reason)
        explanation = get_text(event.details or {}, "explanation")
        if event.reason == "filter" and explanation:
            reason = None
        frames = self.end_item(reason)
        if any(item.get("status") == "incomplete" for item in self.output):
            reason = reason or "max_output_tokens"
        if event.reason == "filter" and explanation:
            steps = (BlockStart("refusal"), BlockDelta("text", explanation), BlockStop())
            frames += [frame for step in steps for frame in self.write(step)] + self.end_item()
        members: Json = {"output": self.output, "usage": write_usage(self.usage, RESPONSES_USAGE)}
        if reason:
            members["incomplete_details"] = {"reason": reason}
        step = "incomplete" if reason else "completed"
        return [*frames, response_frame(self.context, step, **members)]


class ResponsesRelay:
    """Native responses frames, repaired.

    Copilot gives an item a different id of 400 characters in each event (seen in 2026-08).  Here
    each output index keeps one id, as clients match by it.
    """

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.usage = Usage()
        self.output_estimate = 0.0
        self.finished = False
        self.item_ids: dict[int, str] = {}
        self.summary_streamed: set[int] = set()  # reasoning items
        self.done_items: dict[int, Json] = {}  # complete items
        self.guards: defaultdict[int, RunawayGuard] = defaultdict(RunawayGuard)  # per item
        self.guard = RunawayGuard()  # of the item that grew last
        self.started = False
        self.held: list[Json] = []  # that end an item: the response may end as incomplete

    def repair(self, frame: Json) -> list[Json]:
        kind = str(frame.get("type") or "")
        if self.finished:
            return []
        failure = responses_failure(frame)
        if failure:
            raise failure
        if not kind.startswith("response."):
            return []
        frame.pop("copilot_quota_snapshots", None)
        needs_start = not self.started and kind != "response.created"
        frames = [response_frame(self.context, "created")] if needs_start else []
        self.started = True
        if isinstance(frame.get("delta"), str):
            self.output_estimate += self.context.estimate(frame["delta"])
        if isinstance(frame.get("output_index"), int):
            frames += self.repair_item_frame(kind, frame["output_index"], frame)
        self.finished = kind in RESPONSES_ENDS
        response = frame.get("response")
        if isinstance(response, dict):
            self.repair_response(response)
            if self.finished:
                if kind == "response.completed" and response.get("status") == "incomplete":
                    frame["type"] = "response.incomplete"
                read_usage(response, RESPONSES_USAGE, self.usage)
                read_copilot_usage(frame, self.usage)
        elif self.finished:
            raise UpstreamError(PROTOCOL_VIOLATION)
        if kind.endswith(".done"):
            self.held += [*frames, frame]
            return []
        return [*self.release(frame.get("type") == "response.incomplete"), *frames, frame]

    def release(self, is_incomplete: bool) -> list[Json]:
        """The held frames, without those that tell cut arguments as done."""
        frames, self.held = self.held, []
        items = [(str(frame.get("output_index")), get_dict(frame, "item")) for frame in frames]
        cut = {
            index
            for index, item in items
            if item and mark_if_cut(item, item.get("arguments"), is_incomplete)
        }
        done = {kind.replace(".delta", ".done") for kind in CALL_DELTAS}
        return [f for f in frames if f["type"] not in done or str(f.get("output_index")) not in cut]

    def repair_item_frame(self, kind: str, index: int, frame: Json) -> list[Json]:
        """Repairs ids and names; returns the deltas of a summary that came only with its item."""
        item = frame.get("item")
        if isinstance(item, dict):
            self.rename(item, "id", index)
        elif "item_id" in frame:
            self.rename(frame, "item_id", index)
        if kind == "response.function_call_arguments.delta":
            self.guard = self.guards[index]
            self.guard.check(get_text(frame, "delta"))
        elif kind == "response.reasoning_summary_part.added":
            self.summary_streamed.add(index)
        elif kind == "response.output_item.done" and isinstance(item, dict):
            self.done_items[index] = item
            unseen = "" if index in self.guards else get_text(item, "arguments")
            self.output_estimate += self.context.estimate(get_text(item, "name") + unseen)
            if item.get("type") == "reasoning" and index not in self.summary_streamed:
                return expand_item(index, item)[1:-1]
        return []

    def track(self, kind: str, text: str) -> None:
        if kind == "arguments":
            self.guard.check(text)
        self.output_estimate += self.context.estimate(text)

    def rename(self, holder: Json, id_key: str, index: int) -> None:
        """Sets the stable id of the item at `index`, and the client's tool names."""
        if index not in self.item_ids:
            kind = str(holder.get("type")) if id_key == "id" else ""
            self.item_ids[index] = output_item_id(self.context, index, kind)
        holder[id_key] = self.item_ids[index]
        for key in ("name", "namespace"):
            name = holder.get(key)
            if isinstance(name, str):
                holder[key] = self.context.names.get(name, name)

    def repair_response(self, response: Json) -> None:
        context = self.context
        response.update(id=context.id, model=context.model, created_at=context.created)
        response.setdefault("store", False)
        for key in ("metadata", "user"):  # Copilot does not take them
            if context.request_body.get(key) is not None:
                response[key] = context.request_body[key]
        response.pop("output_text", None)
        output = response.get("output")
        if self.finished and not output:  # its items may have been streamed before
            response["output"] = output = [item for _, item in sorted(self.done_items.items())]
        status, items = response.get("status"), output if isinstance(output, list) else []
        for index, item in enumerate(items):
            if isinstance(item, dict):
                self.rename(item, "id", index)
                is_last = status == "incomplete" and item is items[-1]
                is_cut = self.finished and mark_if_cut(item, item.get("arguments"), is_last)
                if is_cut and status == "completed":  # a call that was cut must not be run
                    response["status"] = "incomplete"
                    response["incomplete_details"] = {"reason": "max_output_tokens"}
                # Encrypted content is reliable only in the last frame of its item.
                encrypted = get_str(self.done_items.get(index, {}), "encrypted_content")
                item.update({"encrypted_content": encrypted} if encrypted else {})

    def end(self) -> list[Json]:
        if not self.finished:
            raise UpstreamError(TRUNCATED_RESPONSE)
        return []


class ResponsesDialect(Dialect):
    name = "responses"
    is_numbered = True
    id_prefix = "resp_"
    reader = ResponsesReader
    writer = ResponsesWriter
    relay = ResponsesRelay
    write_request = staticmethod(write_responses_request)

    def request_info(self, body: Json) -> RequestInfo:
        refuse_state(body)
        items = input_items(body)
        session = body.get("prompt_cache_key") or body.get("user")
        prompts = (item for item in items if item.get("role") in ("system", "developer"))
        system = body.get("instructions") or next(prompts, {}).get("content")
        return RequestInfo(
            model=need_str(body, "model"),
            stream=flag_field(body, "stream"),
            include_usage=True,
            initiator=read_initiator(items),
            session=session if isinstance(session, str) else "",
            opening=opening_text(system, items),
        )

    def read_request(self, body: Json) -> Conversation:
        return ResponsesRequestReader(body).read()

    def aggregate(self, frames: list[Json]) -> Json:
        response: Json = frames[-1]["response"]
        return response

    def expand(self, response: Json) -> list[Json]:
        output = response.get("output")
        if not isinstance(output, list):
            raise UpstreamError("The upstream's response has no output.")
        created = {**response, "status": "in_progress", "output": []}
        frames: list[Json] = [{"type": "response.created", "response": created}]
        for index, item in enumerate(output):
            frames += expand_item(index, item if isinstance(item, dict) else {})
        kind = f"response.{response.get('status')}"
        kind = kind if kind in RESPONSES_ENDS else "response.completed"
        return [*frames, {"type": kind, "response": response}]

    def read_delta(self, frame: Json) -> Delta | None:
        name, text = get_text(frame, "type"), get_text(frame, "delta")
        kind = CALL_DELTAS.get(name) or ITEM_DELTAS.get(name)
        has_item = isinstance(frame.get("output_index"), int)
        return (kind, text) if kind and text and has_item else None

    def error_body(self, error: ApiError, request_id: str) -> Json:
        """As for chat, but a missing sign-in is a client error, so that it is not retried."""
        payload = write_openai_error(error, "input")
        if isinstance(error, NotSignedIn):
            payload["type"] = "invalid_request_error"
        retry_after = error.retry_after or 0.0
        if isinstance(error, (QuotaExceeded, LimitReached)) or (
            isinstance(error, RateLimited) and retry_after > MAX_RETRY_AFTER_SECONDS
        ):
            payload["type"] = "usage_limit_reached"  # makes Codex stop instead of waiting
        return {"error": payload}

    def error_status(self, error: ApiError) -> int:
        """400 if not signed in: Codex retries a 5xx up to 30 times."""
        return 400 if isinstance(error, NotSignedIn) else error.status

    def error_frames(
        self, error: ApiError, request_id: str, context: ResponseContext, has_output: bool
    ) -> list[Json]:
        """`response.failed`, after `response.created` if nothing was sent before."""
        payload = write_openai_error(error, "input")
        code = payload["code"] or payload["type"]
        if code in ("upstream_error", "upstream_timeout", "internal_error"):
            code = "server_error"  # the only one that its clients know
        failure = {"code": code, "message": payload["message"]}
        failed = response_frame(context, "failed", error=failure)
        return [failed] if has_output else [response_frame(context, "created"), failed]

    def keepalive_frame(self, context: ResponseContext) -> Json | None:
        """`response.in_progress` again: Codex does not count comments as activity."""
        return response_frame(context, "in_progress")


CHAT = ChatDialect()
MESSAGES = MessagesDialect()
RESPONSES = ResponsesDialect()
DIALECTS: dict[str, Dialect] = {d.name: d for d in (CHAT, MESSAGES, RESPONSES)}
# The vendors' names, as used by `X-Output-Format` and `default_format`.
FORMATS: dict[str, Dialect] = {"openai": CHAT, "anthropic": MESSAGES}


# 8.5 Kiro, for upstreams only
#
# Undocumented: the facts are from the vendor's own clients and from public ones, 2025-10 to
# 2026-10.  A request is a JSON "conversation state", a response always an Amazon event stream.


def kiro_mark(provider: str) -> str:
    """Prefix of a Kiro signature at a client; only the account that received it may return it."""
    return f"gw1.k.{short_hash(provider, 6)}."


# Searched in "code reason: message", before any look at the status, which says little.
KIRO_FAULTS = (
    Fault(r"SUSPENDED|AccountSuspended|temporarily (?:is )?suspended",
        Forbidden, "Kiro has suspended this account", "cool_down",
        "Only Kiro's support can lift the suspension; the gateway does not retry."),
    Fault(r"MONTHLY_REQUEST_COUNT|OVERAGE_REQUEST_LIMIT|reached the limit", QuotaExceeded,
        "The Kiro credits of this month are used up", "cool_down",
        "They reset with the next billing period."),
    Fault(r"CONVERSATION_LIMIT_EXCEEDED", QuotaExceeded,
        "Kiro's limit for one conversation is reached", hint="Start a new conversation."),
    Fault(r"DAILY_REQUEST_COUNT", QuotaExceeded, "Kiro's daily limit is reached", "cool_down"),
    Fault(r"60-minute credit limit", RateLimited, "Kiro's hourly limit is reached", "cool_down"),
    Fault(r"INSUFFICIENT_MODEL_CAPACITY|MODEL_TEMPORARILY_UNAVAILABLE|unexpectedly high load"
        r"|[mM]odel(?:Temporarily)?Unavailable",
        Overloaded, "This model is overloaded at Kiro", "pause"),
    Fault(r"THINKING_SIGNATURE_INVALID", InvalidRequest,
        "Kiro does not accept the signature of earlier thinking", "forget"),
    Fault(r"INVALID_MODEL_ID", ModelNotFound,
        "Kiro does not offer this model to this account", "relist",
        "It depends on plan, region and organisation; GET /v1/models lists what is available."),
    Fault(r"profileArn is required|Invalid profileArn", NotSignedIn,
        "Kiro requires a different profile", "reroute"),
    Fault(r"bearer token included in the request is invalid|ExpiredToken", NotSignedIn,
        "Kiro does not accept the access token", "refresh"),
    Fault(r"Invalid token|User is not authorized", Forbidden,
        "Kiro does not allow this with the account's profile and region", "reroute"),
    Fault(r"IMAGE_[A-Z]+|DOCUMENT_[A-Z]+", InvalidRequest, "Kiro refused an image or document"),
    Fault(r"\bREQUEST_BODY_INVALID\b", InvalidRequest,
        "Kiro refused the format of the conversation", "reshape"),
    Fault(r"Improperly formed|REQUEST_BODY_INVALID|TOOL_[A-Z]+|Validation", InvalidRequest,
        "Kiro refused the format of the conversation"),
    Fault(r"UnknownOperation|[Uu]nknown operation", UpstreamError,
        "This Kiro host does not support the request", "reroute"),
    Fault(r"Throttling|[Tt]oo many requests", RateLimited, "Kiro's rate limit", "pause"),
    Fault(r"ServiceUnavailable", Overloaded, "Kiro is busy", "reroute"),
    Fault(r"AccessDenied", Forbidden, "Kiro does not allow this"),
)  # fmt: skip
LASTING_ACTIONS = ("cool_down", "pause", "refresh")  # they affect more than one request


def find_kiro_faults(text: str, phrases_only: bool = False) -> Iterator[Fault]:
    """The faults found in `text`; with `phrases_only` a single word gives no lasting action."""
    for fault in KIRO_FAULTS:
        match = re.search(fault.pattern, text)
        is_exempt = not phrases_only or fault.action not in LASTING_ACTIONS
        if match and (is_exempt or " " in match[0]):
            yield fault


def classify_kiro_message(code: str, reason: str, message: str) -> RetryDecision | None:
    """Classifies a refusal by Kiro's error text, in an error response or inside a stream."""
    context_error = read_context_error(f"{code} {reason} {message}")
    if context_error:
        return RetryDecision(context_error)
    code_fault = next(find_kiro_faults(f"{code} {reason}"), None)
    # The refusal of one request may quote the client's own names, such as a tool's.
    is_form_refused = code_fault is not None and code_fault.error is InvalidRequest
    message_fault = next(find_kiro_faults(message, is_form_refused), None)
    fault = min(filter(None, (code_fault, message_fault)), key=KIRO_FAULTS.index, default=None)
    if fault is None:
        return None
    text = ": ".join(filter(None, [fault.text, message.strip(" .")]))
    suffix = f" ({reason})" if reason and reason not in message else ""
    return RetryDecision(fault.error(f"{text}{suffix}.", hint=fault.hint), fault.action)


def read_kiro_error(payload: Json) -> tuple[str, str, str]:
    """(code, reason, message) of an error object, whichever names its members have; redacted."""
    error = get_dict(payload, "Output") or payload
    code = get_text(error, "code") or get_text(error, "__type")
    keys = ("message", "Message", "errorMessage", "error")
    message = next(filter(None, (get_text(error, key) for key in keys)), "")
    code = redact(code.rpartition("#")[2].partition(":")[0], MAX_CODE_TEXT)
    reason = redact(get_text(error, "reason"), MAX_CODE_TEXT)
    return code, reason, redact(message, MAX_REFUSAL_TEXT)


# The request.  Each rule adapts any conversation to what the service takes; the rules that changed
# something are logged when the service refuses.

KIRO_DESCRIPTION_BYTES = 9216  # of a tool; its own CLI cuts at 10,240
KIRO_NO_TEXT = "(see the attachment)"  # a turn without text or results needs some
KIRO_FIRST_TURN = "(the conversation goes on)"
KIRO_GO_ON = "Continue"
KIRO_TAG_BUDGETS = (1024, 50_000)  # (min, max) thinking tokens requested in the prompt
# GPT hides its reasoning and sends this in its place, with a signature (opencodex, 2026-08).
KIRO_HIDDEN_THINKING = "..."
KIRO_DOCUMENTS = {
    "application/pdf": "pdf", "text/plain": "txt", "text/markdown": "md", "text/csv": "csv",
    "text/html": "html",
}  # fmt: skip


@dataclass(slots=True)
class KiroDraft:
    """A request in the making; rules replace blocks, turns and tools, and change none in place."""

    chat: Conversation
    model: Model
    turns: list[Turn]
    tools: list[Tool]
    preface: list[str]  #: before the text of the first turn: thinking tags, system prompt
    notes: list[str] = field(default_factory=list)  #: after the text of the last turn
    extra: Json = field(default_factory=dict)  #: additionalModelRequestFields

    def apply(self, rule: Callable[[KiroDraft], None]) -> bool:
        """Applies a rule and returns whether it changed anything."""
        before = [*self.turns], [*self.tools], [*self.preface], [*self.notes], {**self.extra}
        rule(self)
        return before != (self.turns, self.tools, self.preface, self.notes, self.extra)


def inline_system_turns(draft: KiroDraft) -> None:
    """Turns a system message in mid-conversation into marked user text.

    That may join turns that hold results of the same call.
    """
    draft.turns = normalize_turns(downgrade_system_turns(draft.turns))


def adapt_assistant_turns(draft: KiroDraft) -> None:
    """Media and results in an assistant turn become text, as it cannot hold them.

    Thinking that this account did not sign is dropped: Kiro would refuse it.
    """
    prefix = kiro_mark(draft.model.provider)
    turns: list[Turn] = []
    for turn in draft.turns:
        blocks: list[Block] = []
        for block in turn.blocks:
            if isinstance(block, Thinking):
                signature = block.signature or block.redacted
                if signature == prefix or not signature.startswith(prefix):
                    continue
            elif turn.role == "assistant" and isinstance(block, ToolResult):
                block = Text(join_texts(block.blocks) or NO_OUTPUT)
            elif turn.role == "assistant" and isinstance(block, (Image, Document)):
                block = Text(f"({type(block).__name__.lower()})")
            blocks.append(block)
        if not all(isinstance(block, Thinking) for block in blocks):  # otherwise it is empty
            turns.append(turn if blocks == turn.blocks else Turn(turn.role, blocks))
    if turns != draft.turns:
        draft.turns = merge_turns(turns)


def begin_and_end_with_user(draft: KiroDraft) -> None:
    """Kiro wants the user's turn first and last; a prefilled response becomes history."""
    if not draft.turns or draft.turns[0].role != "user":
        draft.turns.insert(0, Turn("user", [Text(KIRO_FIRST_TURN)]))
    last = draft.turns[-1]
    if last.role == "user":
        return
    if join_texts(last.blocks).strip() == "{" and len(last.blocks) == 1:
        draft.turns.pop()  # a prefill that asks for JSON, which is asked for in the prompt here
        draft.notes.append("Reply with one JSON object and nothing else.")
    else:
        draft.turns.append(Turn("user", [Text(KIRO_GO_ON)]))


def adapt_user_turns(draft: KiroDraft) -> None:
    """Moves images and files out of tool results into their turn: results hold only text.

    A user turn with neither text nor results gets a placeholder, even beside an image.
    """
    for index, turn in enumerate(draft.turns):
        blocks: list[Block] = []
        media: list[Block] = []
        image_count = sum(isinstance(block, Image) for block in turn.blocks)
        for block in turn.blocks:
            if isinstance(block, ToolResult):
                parts = [*block.blocks]
                for position, part in enumerate(parts):
                    if isinstance(part, Image):
                        image_count += 1
                        parts[position] = Text(f"[image {image_count} below]")
                    elif isinstance(part, Document):
                        parts[position] = Text("[document below]")
                    else:
                        continue
                    media.append(part)
                block = ToolResult(block.id, parts, block.is_error)
            blocks.append(block)
        if turn.role == "user" and not any(isinstance(b, (Text, ToolResult)) for b in blocks):
            media.append(Text(KIRO_NO_TEXT))
        draft.turns[index] = Turn(turn.role, [*blocks, *media])


def inline_settings(draft: KiroDraft) -> None:
    """Puts settings that Kiro has no field for into the prompt; choice "none" drops the tools."""
    choice, chat = draft.chat.choice, draft.chat
    if choice and choice.mode == "none":
        draft.tools = []
    elif choice and choice.mode == "named":
        draft.notes.append(f"Answer with a call of the tool {chat.wire_name(choice.name)}.")
    elif choice and choice.mode == "required" and draft.tools:
        draft.notes.append("Answer with a call of one of the tools.")
    if chat.parallel is False and draft.tools:
        draft.notes.append("Call at most one tool at a time.")
    if chat.output:
        draft.preface.append(output_instruction(chat.output))


def adapt_kiro_tools(draft: KiroDraft) -> None:
    """Declares every tool that was ever called, whatever the client offers now.

    Names are adapted, and responses get the client's names back; of equal names the first counts.
    Every tool needs a short description; a longer one moves into the system prompt.
    """
    declared = {tool.name for tool in draft.tools}
    calls = [block for turn in draft.turns for block in turn.blocks if isinstance(block, ToolCall)]
    missing = dict.fromkeys(call.name for call in calls if call.name not in declared)
    by_name: dict[str, Tool] = {}
    for tool in (*draft.tools, *(Tool(name, "Tool", EMPTY_SCHEMA) for name in missing)):
        by_name.setdefault(draft.chat.wire_name(tool.name), tool)
    draft.tools = []
    for name, tool in by_name.items():
        description = tool.description if tool.description.strip() else name
        encoded = description.encode("utf-8", "replace")
        if len(encoded) > KIRO_DESCRIPTION_BYTES:
            draft.preface.append(f'<tool name="{name}">\n{description}\n</tool>')
            pointer = f'\n[All of it stands in the system prompt, under tool name="{name}".]'
            beginning = encoded[: KIRO_DESCRIPTION_BYTES - len(pointer)].decode("utf-8", "ignore")
            description = beginning + pointer
        schema = adapt_schema(tool.schema, "kiro", len(by_name))
        draft.tools.append(replace(tool, name=name, description=description, schema=schema))


def kiro_fields(model: Model) -> Json:
    """The extra request fields a model takes, as its own schema describes them."""
    return get_dict(get_dict(model.raw, "additionalModelRequestFieldsSchema"), "properties")


def kiro_efforts(schema: Json) -> list[str]:
    """The efforts listed in `{"properties": {"effort": {"enum": [...]}}}`."""
    efforts = get_dict(get_dict(schema, "properties"), "effort").get("enum")
    return [item for item in efforts if isinstance(item, str)] if isinstance(efforts, list) else []


def request_thinking(draft: KiroDraft) -> None:
    """Asks for thinking in the model's own fields, or in the prompt if it has none.

    In the prompt, `enabled` works with all of the older models, `adaptive` does not
    (CLIProxyAPI#3331, 2026-05).
    """
    chat, model, model_fields = draft.chat, draft.model, kiro_fields(draft.model)
    budget = chat.thinking_budget
    if chat.effort is None and budget is None:
        return
    effort = chat.effort or effort_of_budget(budget or 0)
    if "reasoning" in model_fields:
        level = clamp_effort(effort, kiro_efforts(model_fields["reasoning"]))
        draft.extra.update({"reasoning": {"effort": level}} if level else {})
    elif "thinking" in model_fields or "output_config" in model_fields:
        add_thinking_fields(draft, model_fields, effort)
    elif effort != "none" and (model.vendor == "Anthropic" or model.id == "auto"):
        low, high = KIRO_TAG_BUDGETS
        tokens = min(max(budget or EFFORT_BUDGETS[effort], low), high)
        tags = "<thinking_mode>enabled</thinking_mode>"
        tags += f"<max_thinking_length>{tokens}</max_thinking_length>"
        if not any("<thinking_mode>" in text for text in draft.preface):
            draft.preface.insert(0, tags)
        chat.tagged_thinking = True
    elif effort != "none":
        chat.dropped.append("thinking")


def add_thinking_fields(draft: KiroDraft, model_fields: Json, effort: str) -> None:
    """`thinking` and `output_config`; without `display` the text of thinking may be hidden."""
    properties = get_dict(get_dict(model_fields, "thinking"), "properties")
    modes = get_dict(properties, "type").get("enum")
    mode = "disabled" if effort == "none" else "adaptive"
    if "thinking" in model_fields and (not isinstance(modes, list) or mode in modes):
        draft.extra["thinking"] = {"type": mode}
        if mode == "adaptive" and (not properties or "display" in properties):
            draft.extra["thinking"]["display"] = "summarized"
    level = clamp_effort(effort, kiro_efforts(get_dict(model_fields, "output_config")))
    if level and effort != "none":
        draft.extra["output_config"] = {"effort": level}


def pass_settings(draft: KiroDraft) -> None:
    """`max_tokens`, if the model has a field for it; the other settings have none."""
    chat, limits = draft.chat, get_dict(kiro_fields(draft.model), "max_tokens")
    if chat.max_tokens and limits:
        low, high = limits.get("minimum", 1), limits.get("maximum", chat.max_tokens)
        if isinstance(low, int) and isinstance(high, int):
            draft.extra["max_tokens"] = min(max(chat.max_tokens, low), high)
    if chat.max_tokens and draft.extra.get("max_tokens", math.inf) > chat.max_tokens:
        chat.dropped.append("max_tokens")
    chat.drop_settings("temperature", "top_p", "top_k", "verbosity")


def insert_preface(draft: KiroDraft) -> None:
    """Prepends the system prompt to the first turn, as Kiro has no field for it.

    That beats a pair of turns of its own: the beginning stays the same for the cache, and no
    response is invented.
    """
    preface = "\n\n".join(filter(None, [text.strip("\n") for text in draft.preface]))
    if preface:
        draft.turns[0] = Turn("user", [Text(preface), *draft.turns[0].blocks])
    if draft.notes:
        note = Text(as_reminder("\n".join(draft.notes)))
        draft.turns[-1] = Turn("user", [*draft.turns[-1].blocks, note])


KIRO_RULES: tuple[Callable[[KiroDraft], None], ...] = (
    inline_system_turns, adapt_assistant_turns, begin_and_end_with_user, adapt_user_turns,
    inline_settings, adapt_kiro_tools, request_thinking, pass_settings, insert_preface,
)  # fmt: skip


SEARCHED_PIECES, PIECE_CHARS = 128, 4096  # pieces of a text too long to be searched whole


def check_context_window(draft: KiroDraft) -> None:
    """Refuses a conversation far above the model's window with an error that clients know.

    Kiro refuses some with just "Improperly formed request", after which clients do not compact.
    The estimate may be off by a third, hence the margin.
    """
    window = draft.model.max_prompt
    if not window:
        return
    texts = []
    for block in (block for turn in draft.turns for block in turn.blocks):
        if isinstance(block, ToolCall):
            texts.append(block.arguments)
        else:
            texts.append(join_texts(block.blocks if isinstance(block, ToolResult) else [block]))
    text = "".join(texts)
    tokens = estimate_text(text)
    if tokens > 1.5 * window:
        # One token covers many of a run's characters.  Finding runs takes 0.1 s per MiB.
        step = max(PIECE_CHARS, len(text) // SEARCHED_PIECES)
        starts = range(0, len(text), step)
        sample = "".join([text[start : start + PIECE_CHARS] for start in starts])
        tokens *= estimate_text(collapse_runs(sample)) / estimate_text(sample)
        if tokens > 1.5 * window:
            raise ContextTooLong(int(tokens), window)


def collapse_runs(text: str) -> str:
    """`text` with an eighth of each run of one character."""
    return re.sub(r"(.)\1{7,}", lambda run: run[0][: len(run[0]) // 8], text, flags=re.DOTALL)


def write_kiro_request(chat: Conversation, model: Model) -> Json:
    """Kiro's conversation state; the provider adds ids, `origin` and `profileArn`."""
    turns, preface = [*chat.turns], [block.text for block in chat.system]
    if not any(turn.blocks for turn in turns):
        turns, preface = [Turn("user", [*chat.system])], []
    draft = KiroDraft(chat, model, turns, [*chat.tools], preface)
    chat.touched += [rule.__name__ for rule in KIRO_RULES if draft.apply(rule)]
    check_context_window(draft)
    *history, current = [write_kiro_turn(turn, chat, model) for turn in draft.turns]
    if draft.tools:
        context = current["userInputMessage"].setdefault("userInputMessageContext", {})
        context["tools"] = []
        for tool in draft.tools:
            entry = {"name": tool.name, "description": tool.description}
            specification = {**entry, "inputSchema": {"json": tool.schema}}
            context["tools"].append({"toolSpecification": specification})
    state: Json = {"chatTriggerType": "MANUAL", "agentTaskType": "vibe"}
    if history:
        state["history"] = history
    state["currentMessage"] = current
    if not draft.extra:
        return {"conversationState": state}
    return {"conversationState": state, "additionalModelRequestFields": draft.extra}


def write_kiro_turn(turn: Turn, chat: Conversation, model: Model) -> Json:
    """A turn's message, without empty lists and objects, as Kiro refuses them."""
    is_assistant = turn.role == "assistant"
    message: Json = {"content": join_texts(turn.blocks)}
    if not is_assistant:
        message["modelId"] = model.id
    for block in turn.blocks:
        if isinstance(block, ToolCall) and is_assistant:
            name, arguments = chat.wire_name(block.name), parse_arguments(block.arguments)
            call = {"toolUseId": block.id, "name": name, "input": arguments}
            message.setdefault("toolUses", []).append(call)
        elif isinstance(block, Thinking) and is_assistant:
            signature = (block.signature or block.redacted).removeprefix(kiro_mark(model.provider))
            placeholder = KIRO_HIDDEN_THINKING if model.vendor == "OpenAI" else ""
            message["reasoningContent"] = write_kiro_thinking(block.text or placeholder, signature)
            if block.redacted:
                message["reasoningContent"] = {"redactedContent": signature}
        elif isinstance(block, ToolResult):
            content = [{"text": join_texts(block.blocks) or NO_OUTPUT}]
            status = "error" if block.is_error else "success"
            result = {"toolUseId": block.id, "status": status, "content": content}
            context = message.setdefault("userInputMessageContext", {})
            context.setdefault("toolResults", []).append(result)
        elif isinstance(block, Image):
            message.setdefault("images", []).append(write_kiro_image(block, model))
        elif isinstance(block, Document):
            documents = message.setdefault("documents", [])
            documents.append(write_kiro_document(len(documents) + 1, block))
    return {"assistantResponseMessage" if is_assistant else "userInputMessage": message}


def write_kiro_thinking(text: str, signature: str) -> Json:
    """Only this nested form is accepted."""
    return {"reasoningText": {"text": text, "signature": signature}}


def write_kiro_image(image: Image, model: Model) -> Json:
    input_types = model.raw.get("supportedInputTypes")
    refusal = "Kiro takes images only as base64 data; nothing is fetched here." if image.url else ""
    if isinstance(input_types, list) and input_types and "IMAGE" not in input_types:
        refusal = f"{model.id} does not accept images."
    if refusal:
        raise UnsupportedFeature(f"{image.path}: {refusal}", param=image.path)
    return {"format": image.media_type.partition("/")[2], "source": {"bytes": image.data}}


def write_kiro_document(number: int, document: Document) -> Json:
    """As the vendor's SDK describes it (1.0.45; not seen on the wire)."""
    kind = KIRO_DOCUMENTS.get(document.media_type)
    if kind is None:
        raise UnsupportedFeature(
            f"{document.path}: Kiro does not accept {document.media_type or 'such'} files.",
            param=document.path,
        )
    data = document.data or base64.b64encode(document.text.encode("utf-8", "replace")).decode()
    name = re.sub(r"[^A-Za-z0-9 ()\[\]-]+", "-", document.title).strip("-")[:200]
    return {"name": name or f"document-{number}", "format": kind, "source": {"bytes": data}}


# The response.

KIRO_FINISHES = {
    "END_TURN": "end", "STOP_SEQUENCE": "stop", "MAX_TOKENS": "length", "PAUSE_TURN": "pause",
    "TOOL_USE": "end",  # a completed call takes precedence
    "MODEL_CONTEXT_WINDOW_EXCEEDED": "context", "CONTENT_FILTERED": "filter",
    "GUARDRAIL_INTERVENED": "filter", "MALFORMED_TOOL_USE": "length",
    "MALFORMED_MODEL_OUTPUT": "length",
}  # fmt: skip


class ThinkingTags:
    """Thinking inside the text: `<thinking>...</thinking>`, a blank line, the response.

    The opening tag counts only at the very beginning; the closing one only before a blank line or
    the end, and not after a quote, as the thinking may mention the tags.
    """

    OPENING = "<thinking>"
    CLOSING = "</thinking>"
    #: the closing tag, or what the next characters may make one
    END = re.compile(r"(?<!['\"`\\])</thinking>(\n\n|\n?\Z)")

    def __init__(self, kind: str = "") -> None:
        self.kind = kind  # "" at the beginning, then thinking or text
        self.leading_space: list[str] = []  # whitespace before the first text
        self.buffer = ""
        self.previous = ""  # the character before `buffer`

    def feed(self, text: str) -> list[tuple[str, str]]:
        """(thinking or text, piece) for each piece; what could be a tag is held back."""
        if self.kind == "text":
            return [("text", text)]
        if not self.kind and not self.buffer and text.isspace():
            self.leading_space.append(text)
            return []
        self.buffer += text
        if not self.kind:
            stripped = self.buffer.lstrip()
            if self.OPENING.startswith(stripped[: len(self.OPENING)]) and len(stripped) < 11:
                return []  # one more character shows whether a line break follows
            if not stripped.startswith(self.OPENING):
                return self.flush()
            self.kind, self.leading_space = "thinking", []
            self.buffer = stripped.removeprefix(self.OPENING).removeprefix("\n")
        text, start = self.previous + self.buffer, len(self.previous)
        match = self.END.search(text, start)
        if match and match[1] == "\n\n":
            self.kind, self.buffer = "text", ""
            parts = (("thinking", text[start : match.start()]), ("text", text[match.end() :]))
            return [(kind, part) for kind, part in parts if part]
        end = match.start() if match else len(text) - StopCutter.overlap(text, self.CLOSING)
        thinking, self.buffer = text[start:end], text[end:]
        self.previous = thinking[-1:] or self.previous
        return [("thinking", thinking)] if thinking else []

    def flush(self) -> list[tuple[str, str]]:
        kind, rest = self.kind or "text", "".join([*self.leading_space, self.buffer])
        self.kind, self.buffer, self.leading_space = "text", "", []
        is_tag = (
            rest.startswith(self.CLOSING) if kind == "thinking" else rest.strip() == self.OPENING
        )
        return [(kind, rest)] if rest and not is_tag else []


class KiroReader:
    """Kiro's events -> events.  Dispatches on the event's name, never on its content."""

    def __init__(self, context: ResponseContext) -> None:
        self.context = context
        self.blocks = BlockAssembler(kiro_mark(context.provider))
        self.track = self.blocks.track
        self.tags = ThinkingTags("" if context.tagged_thinking else "text")
        self.usage = Usage()
        self.model = ""  # as the response names it: "auto" is resolved to another model
        self.context_used = 0.0  # percentage of the context that is used
        self.hidden: list[str] = []  # placeholder for hidden thinking, until real text follows
        self.thinking_source = ""  # of the thinking shown: tags or events
        self.hidden_blocks = BlockAssembler("")  # thinking in events, shown before as tags
        self.reason = ""
        self.started = False
        self.finished = False

    def read(self, frame: Json) -> list[Event]:
        """Unknown names are ignored: `followupPromptEvent` has `content` of another kind."""
        for name, value in frame.items():
            handler = self.HANDLERS.get(name)
            if handler is not None and not self.finished:
                handler(self, value if isinstance(value, dict) else {})
        return self.blocks.take()

    def start(self) -> None:
        if not self.started:
            self.started = True
            self.blocks.events.append(MessageStart("", self.model))

    def on_text(self, payload: Json) -> None:
        self.model = get_text(payload, "modelId") or self.model
        text = get_text(payload, "content")
        if text:
            self.start()
            self.add_tagged(self.tags.feed(text))

    def add_tagged(self, pieces: list[tuple[str, str]]) -> None:
        """Text, and thinking between tags; the same thinking may come in events as well."""
        for kind, piece in pieces:
            if kind == "thinking" and not self.thinking_source:
                self.thinking_source = "tags"
                self.hidden_blocks.signature, self.blocks.signature = self.blocks.signature, []
            if kind == "text" or self.thinking_source == "tags":
                self.blocks.add_text(kind, piece)

    def on_reasoning(self, payload: Json) -> None:
        """A thinking delta, or its signature, which may come in pieces and late."""
        self.start()
        redacted, text = get_text(payload, "redactedContent"), get_text(payload, "text")
        if redacted:
            self.blocks.add_text("redacted", redacted)
        blocks = self.hidden_blocks if self.thinking_source == "tags" else self.blocks
        if text:
            if blocks.signature and blocks.kind == "thinking":
                blocks.close()  # what follows a signature is not under it
            elif blocks.unsigned and not self.hidden:
                blocks.signature = []  # it came late, for the thinking before
            self.hidden.append(text)
            if text != KIRO_HIDDEN_THINKING or blocks.thinking:
                self.thinking_source = self.thinking_source or "events"
                blocks.add_text("thinking", "".join(self.hidden))
                self.hidden = []
        if isinstance(payload.get("signature"), str):
            blocks.signature.append(payload["signature"])

    def on_call(self, payload: Json) -> None:
        self.start()
        call_id, name = get_text(payload, "toolUseId"), get_text(payload, "name")
        if not call_id:  # the open call's, or a new one
            call_id = f"tooluse_{short_hash(f'{self.context.id} {len(self.blocks.calls)}', 22)}"
            last_call = next(reversed(self.blocks.calls.values()), None)
            if last_call is not None and not last_call.complete:
                has_its_name = payload.get("name") in (None, last_call.name)
                call_id = last_call.id if has_its_name else call_id
        piece = payload.get("input")
        if isinstance(piece, dict):
            piece = dump_text(piece) if piece else ""
        if name:
            self.add_tagged(self.tags.flush())
        arguments = piece if isinstance(piece, str) else ""
        self.blocks.add_call(call_id, call_id, name, arguments, payload.get("stop") is True)

    def on_context_usage(self, payload: Json) -> None:
        self.context_used = get_float(payload, "contextUsagePercentage", 1000) or self.context_used
        self.report_usage()

    def on_metering(self, payload: Json) -> None:
        """The cost of this response in credits; several events add up."""
        self.usage.nano_credits += round(get_float(payload, "usage", MAX_FIGURE / 1e9) * 1e9)
        self.usage.credits_source = "reported"
        self.report_usage()

    def on_metadata(self, payload: Json) -> None:
        if isinstance(payload.get("stopReason"), str):
            self.reason = payload["stopReason"]
        counts = get_dict(payload, "tokenUsage") or payload
        usage = self.usage
        usage.cache_read = get_int(counts, "cacheReadInputTokens", usage.cache_read)
        usage.cache_write = get_int(counts, "cacheWriteInputTokens", usage.cache_write)
        usage.input = get_int(counts, "inputTokens", usage.input)
        usage.input = get_int(counts, "uncachedInputTokens", usage.input)
        usage.output = get_int(counts, "outputTokens", usage.output)
        if usage.input or usage.cache_read or usage.cache_write:
            usage.source = "reported"
        self.report_usage()

    def report_usage(self) -> None:
        window = self.context.window(self.model) if self.context.window else 0
        self.usage.context = int(self.context_used / 100 * window)
        self.blocks.events.append(UsageUpdate(replace(self.usage)))

    def on_error(self, payload: Json) -> None:
        """An error in mid-stream; content sent before it still counts."""
        code, reason, message = read_kiro_error(payload)
        decision = classify_kiro_message(code, reason, message)
        if decision and isinstance(decision.error, ContextTooLong) and self.started:
            is_output = code.startswith("ContentLengthExceeded") and "too long" not in message
            self.reason = "MAX_TOKENS" if is_output else "MODEL_CONTEXT_WINDOW_EXCEEDED"
            self.finish()
        else:
            detail = message or code or "no reason given"
            failure = UpstreamError(f"Kiro failed during the response: {detail}")
            self.blocks.events.append(StreamError(decision.error if decision else failure))

    def on_overload(self, payload: Json) -> None:
        self.blocks.events.append(StreamError(Overloaded("This model is overloaded at Kiro.")))

    def end(self) -> list[Event]:
        """Only EOF marks the end."""
        if not self.finished:
            self.finish()
        return self.blocks.take()

    def finish(self) -> None:
        """Truncated calls are dropped: the client must not run them."""
        self.finished = True
        self.start()
        self.add_tagged(self.tags.flush())
        blocks, calls = self.blocks, self.blocks.calls.values()
        is_truncated = False
        for call in calls:
            is_object_complete = call.is_object_complete()
            call.complete = call.complete or is_object_complete
            is_truncated |= not (
                call.complete and call.name and (call.is_blank or is_object_complete)
            )
        blocks.end()
        thoughts = self.hidden_blocks if self.thinking_source == "tags" else blocks
        thoughts.close()
        if thoughts.signature and thoughts.unsigned and not self.hidden:  # it came late
            thoughts.signed_thinking = thoughts.unsigned, "".join(thoughts.signature)
        elif thoughts.signature:  # without any thinking text
            thoughts.thinking = self.hidden
            thoughts.open("thinking")
            thoughts.close()
        call_ids = [call.id for call in calls if call.closed]
        self.context.keep_reasoning(call_ids, *thoughts.signed_thinking)
        self.report_usage()
        stop_reason = KIRO_FINISHES.get(self.reason, "end")
        if is_truncated:
            stop_reason = "length"
        elif call_ids:
            stop_reason = "tool"
        elif not self.reason and self.context_used >= 100:
            stop_reason = "context"
        blocks.events.append(MessageStop(stop_reason))

    HANDLERS: ClassVar[dict[str, Callable[[KiroReader, Json], None]]] = {
        "assistantResponseEvent": on_text, "codeEvent": on_text,
        "reasoningContentEvent": on_reasoning, "toolUseEvent": on_call,
        "contextUsageEvent": on_context_usage, "meteringEvent": on_metering,
        "metadataEvent": on_metadata, "usageEvent": on_metadata, "metricsEvent": on_metadata,
        "modelTemporarilyUnavailableEvent": on_overload, "modelUnavailableEvent": on_overload,
        "invalidStateEvent": on_error, "error": on_error,
    }  # fmt: skip


# Event -> (kind of what it extends, key of the text).
KIRO_DELTAS = {
    "assistantResponseEvent": ("text", "content"), "reasoningContentEvent": ("thinking", "text"),
    "toolUseEvent": ("arguments", "input"),
}  # fmt: skip
# Events that carry content of the response itself.
KIRO_CONTENT_EVENTS = {*KIRO_DELTAS, "codeEvent"}


class KiroDialect(UpstreamDialect):
    name = "kiro"
    framing = EventStreamFraming
    reader = KiroReader
    write_request = staticmethod(write_kiro_request)

    def expand(self, response: Json) -> list[Json]:
        """Kiro always streams: a JSON object is an error."""
        return [{"error": response}]

    def read_delta(self, frame: Json) -> Delta | None:
        name = next(iter(frame), "")
        kind, key = KIRO_DELTAS.get(name, ("", ""))
        payload = get_dict(frame, name)
        is_plain = payload.keys() <= {key, "modelId", "name", "toolUseId"}
        text = get_text(payload, key) if is_plain else ""
        return (kind, text) if text else None


KIRO = KiroDialect()
UPSTREAM_DIALECTS: dict[str, UpstreamDialect] = {**DIALECTS, KIRO.name: KIRO}


# 8.6 translating one response


# What may surround structured output in text, or in a call: how it begins, with what, and its end.
FENCE = re.compile(r"```[\w-]*[ \t]*(?:\r?\n\s*|(?=[\[{\"]))"), "`", "```"
WRAPPER = re.compile(r'\{\s*"value"\s*:\s*'), "{", "}"


class OutputFilter:
    """Structured output: the input of OUTPUT_TOOL becomes text, and text loses its code fence.

    Text that begins like neither is held back, and is dropped if OUTPUT_TOOL is called after it.
    """

    def __init__(self, context: ResponseContext, output: OutputFormat) -> None:
        self.context = context
        self.is_wrapped = is_wrapped(output)
        client_tools = map(wire_name, tool_names(context.request_body))
        self.tool = "" if OUTPUT_TOOL in client_tools else OUTPUT_TOOL
        self.kind = ""  #: of the open block: text, prose, call (of OUTPUT_TOOL), skipped, or ""
        self.prose: list[str] = []  #: of a block that is still open for the client
        self.closing: str | None = None  #: None until it is known what surrounds the output
        self.held_text = ""
        self.sent: list[str] = []
        self.has_calls = False  #: of the client's tools

    def take(self, event: Event) -> list[Event]:
        if isinstance(event, BlockStart):
            return self.start_block(event)
        if isinstance(event, MessageStop):
            return [*self.flush(), self.finish(event)]
        if not self.kind or not isinstance(event, (BlockDelta, BlockStop)):
            return [event]
        if self.kind in ("prose", "skipped"):
            if self.prose and isinstance(event, BlockDelta):
                self.prose.append(event.text)
            return []
        if isinstance(event, BlockDelta):
            return self.send(self.held_text + event.text)
        events = self.send(self.held_text, is_last=True)
        return events if self.prose else [*events, event]

    def flush(self) -> list[Event]:
        text = "".join(self.prose)
        self.prose.clear()
        self.sent += [text] if text else []
        return [BlockDelta("text", text), BlockStop()] if text else []

    def start_block(self, event: BlockStart) -> list[Event]:
        is_call = event.kind == "tool" and event.name == self.tool
        is_open = is_call and bool(self.prose) and not self.sent
        if is_open:
            self.prose.clear()
        events = self.flush()
        self.held_text, self.closing = "", "" if is_call and not self.is_wrapped else None
        if is_call:
            self.kind = "skipped" if self.sent else "call"
            return events if self.sent or is_open else [BlockStart("text")]
        self.kind = "text" if event.kind == "text" else ""
        self.has_calls = self.has_calls or event.kind == "tool"
        return [*events, event]

    def send(self, text: str, is_last: bool = False) -> list[Event]:
        if self.closing is None:
            opening, mark, closing = FENCE if self.kind == "text" else WRAPPER
            text = text.lstrip()
            match = opening.match(text)
            is_open = mark.startswith(text[:1]) and len(text) < MAX_OPENING_CHARS
            if not match and is_open and not is_last:
                self.held_text = text
                return []
            self.closing, self.held_text = closing if match else "", ""
            text = text[match.end() :] if match else text
            if text and not match and self.kind == "text" and text[0] not in '{["':
                self.kind = "prose"
                self.prose.append(text)
                return []
        if self.closing:
            end = text.find("\n```") if self.kind == "text" else -1
            text = text[: end + 4] if end >= 0 else text  # no JSON has that inside
            kept = len(text.rstrip(self.closing + JSON_WHITESPACE))
            kept = max(kept, len(text) - MAX_HELD_CHARS)
            text, self.held_text = text[:kept], text[kept:]
            if is_last:
                text += self.held_text.rpartition(self.closing)[0].rstrip()
        self.sent += [text] if text else []
        return [BlockDelta("text", text)] if text else []

    def finish(self, event: MessageStop) -> MessageStop:
        if self.has_calls or event.reason not in ("end", "tool"):
            return event
        text = "".join(self.sent)
        try:
            if not has_too_many_values(text):
                load_json(text)
        except ValueError:
            self.context.invalid_output = True
        return replace(event, reason="end")


@dataclass(slots=True)
class Converter:
    """A Relay between two dialects: frames -> events -> checks and filters -> frames."""

    reader: Reader
    writer: Writer
    context: ResponseContext
    filters: list[OutputFilter | StopCutter] = field(default_factory=list)
    state: str = "new"  #: of EVENT_STATES
    guard: RunawayGuard = field(default_factory=RunawayGuard)  #: of the open call
    usage: Usage = field(default_factory=Usage)
    output_estimate: float = 0.0
    call_count: int = 0
    is_silent: bool = False  #: the last frame was a delta that is not sent, or only with its block

    @property
    def finished(self) -> bool:
        return self.state == "complete"

    def repair(self, frame: Json) -> list[Json]:
        events = self.reader.read(frame)
        frames = self.write(events)
        self.is_silent = not frames and [*map(type, events)] == [BlockDelta]
        return frames

    def end(self) -> list[Json]:
        frames = [] if self.finished else self.write(self.reader.end())
        if not self.finished:
            raise UpstreamError(TRUNCATED_RESPONSE)
        return frames

    def track(self, kind: str, text: str) -> None:
        if kind == "arguments":
            self.guard.check(text)
        self.output_estimate += self.context.estimate(text)
        self.reader.track(kind, text)
        self.writer.track(kind, text)

    def write(self, events: list[Event]) -> list[Json]:
        for event_filter in self.filters:
            events = [item for event in events for item in event_filter.take(event)]
        frames = []
        for event in events:
            if self.state != "complete":
                frames += self.write_event(event)
        return frames

    def write_event(self, event: Event) -> list[Json]:
        """Enforces EVENT_STATES, so that writers can rely on it; completes calls and usage."""
        if isinstance(event, StreamError):
            raise event.error
        state = EVENT_STATES[type(event)].get(self.state)
        if state is None:
            raise UpstreamError(PROTOCOL_VIOLATION)
        self.state = state
        if isinstance(event, BlockDelta):
            if event.part == "arguments":
                self.guard.check(event.text)
            if event.part != "signature":
                self.output_estimate += self.context.estimate(event.text)
        elif isinstance(event, BlockStart) and event.kind == "tool":
            if not event.name:
                raise UpstreamError(PROTOCOL_VIOLATION)
            self.guard = RunawayGuard()
            self.output_estimate += self.context.estimate(event.name)
            self.call_count += 1
            event.name = self.context.names.get(event.name, event.name)
            event.id = event.id or "call_" + short_hash(f"{self.context.id} {self.call_count}", 24)
        elif isinstance(event, UsageUpdate):
            self.usage = event.usage
        elif isinstance(event, MessageStop):
            # Copilot and others report "stop" after a tool call (seen in 2026-08).
            if self.call_count and event.reason in ("end", "stop"):
                event = MessageStop("tool")
            if self.usage.source != "reported":
                self.usage = finalize_usage(self.usage, self.context, self.output_estimate)
                return [*self.writer.write(UsageUpdate(self.usage)), *self.writer.write(event)]
        return self.writer.write(event)


# The inside of a JSON string (RFC 8259 section 7), without surrogate escapes.  Possessive, so that
# a mismatch is found in linear time.
JSON_TEXT = rb'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4})*+'
PLAIN_BYTES = bytes(byte for byte in range(32, 127) if byte not in b'"\\')
JSON_NUMBER = rb"(?:0|[1-9][0-9]{0,15})(?![\w.+-])"
NUMBERS = re.compile(b"%b(?:,%b)*+" % (JSON_NUMBER, JSON_NUMBER))
# What may differ between the deltas of a block: their text, under one of these keys, and members
# without meaning for a conversion: numbers, ids that change (Copilot), random padding (OpenAI).
NUMBER_MEMBERS = ("sequence_number", "check_offset", "start_offset", "end_offset")
IGNORED_MEMBERS = (*NUMBER_MEMBERS, "item_id", "obfuscation", "padding")
TEXT_MEMBERS = (
    *REASONING_FIELDS, "arguments", "content", "delta", "input", "partial_json", "refusal", "text",
    "thinking",
)  # fmt: skip
# Text cannot contain a key between unescaped quotes.
MEMBER = re.compile(
    b'"(%b)": ?(?:"(%b)"|(%b))'
    % ("|".join(IGNORED_MEMBERS + TEXT_MEMBERS).encode(), JSON_TEXT, JSON_NUMBER)
)


def find_members(event: bytes, text: str) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(name, value, span) of what may differ in an event; `text` is named "text"."""
    for match in MEMBER.finditer(event):
        name, group = match[1].decode(), 2 if match[3] is None else 3
        is_number = name in NUMBER_MEMBERS
        if is_number is (group == 2):
            continue
        value = match[group].decode() if is_number else read_json_text(match[group])
        if name not in TEXT_MEMBERS:
            yield name, value, match.span(group)
        elif value == text:
            yield "text", value, match.span(group)


def split_around(event: bytes, spans: list[tuple[int, int]]) -> tuple[list[bytes], bytes]:
    """The parts of an event around `spans`, and the same as a format, with `%b` for each span."""
    edges = [0, *(edge for span in spans for edge in span), len(event)]
    parts = [event[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return parts, b"%b".join(part.replace(b"%", b"%%") for part in parts)


def read_json_text(data: bytes) -> str:
    """The text of the inside of a JSON string; raises ValueError if it is not one."""
    text = data.decode()
    if not data.translate(None, PLAIN_BYTES):
        return text
    quoted = f'"{text}"'
    text, end = json_decoder.scan_once(quoted, 0)
    if end < len(quoted):
        raise ValueError("it has an unescaped quote")
    text.encode()  # fails for half of a surrogate pair
    return str(text)


def unescape_text(data: bytes) -> bytes:
    """The inside of a JSON string as the encoder writes it, which escapes only what it must."""
    return dump_json(read_json_text(data))[1:-1]


@dataclass(slots=True)
class Template:
    """The bytes that all deltas of one block share, in and out, around the members that differ.

    Text between the quotes of two JSON strings can be copied: matching deltas need no parsing, no
    events and no encoding.
    """

    kind: str
    prefix: bytes  #: of an event, before its first member
    suffix: bytes
    inner: list[bytes]  #: between its members
    text_column: int  #: index of the text among the members
    number_columns: list[int]
    event_format: bytes
    output_format: bytes
    output_columns: list[int]  #: indexes of members; -1 is the number of the frame

    @classmethod
    def build(cls, event: bytes, output: bytes, delta: Delta, is_numbered: bool) -> Template | None:
        """The template of a delta and of its output; None if it is ambiguous."""
        kind, text = delta
        members = [*find_members(event, text)]
        values = {name: value for name, value, _ in members}
        names, columns, spans = [*values], [], []
        if "text" not in names or len(names) < len(members):
            return None
        for name, value, span in find_members(output, text):
            is_counted = is_numbered and name == "sequence_number"
            if is_counted or values.get(name) == value:  # or is always rewritten to the same
                columns.append(-1 if is_counted else names.index(name))
                spans.append(span)
        text_column = names.index("text")
        if output and text_column not in columns:
            return None
        numbers = [names.index(name) for name in NUMBER_MEMBERS if name in names]
        (prefix, *inner, suffix), event_format = split_around(event, [span for *_, span in members])
        formats = event_format, split_around(output, spans)[1]
        return cls(kind, prefix, suffix, inner, text_column, numbers, *formats, columns)

    def copy(self, blocks: bytes, frame_number: int) -> tuple[int, int, str, bytes] | None:
        """Copies the deltas at the beginning of complete events; None if the first is another.

        Returns (their size in bytes, their number, their text, the output).
        """
        copied = self.copy_run(blocks, frame_number)
        if copied is None and blocks.startswith(self.prefix):
            run = self.leading_events(blocks)
            copied = self.copy_run(run, frame_number) if len(run) < len(blocks) else None
        return copied

    def leading_events(self, blocks: bytes) -> bytes:
        """The events up to the first that is not like the others around its members."""
        size, suffix = 0, self.suffix[:-2]
        for event in blocks.split(b"\n\n"):
            if not event.startswith(self.prefix) or not event.endswith(suffix):
                break
            size += len(event) + 2
        return blocks[:size]

    def copy_run(self, blocks: bytes, frame_number: int) -> tuple[int, int, str, bytes] | None:
        """As `copy`, for events that all match up to the last with the suffix."""
        prefix, suffix = self.prefix, self.suffix
        end = blocks.rfind(suffix)
        if end < len(prefix) or not blocks.startswith(prefix):
            return None
        inside, size = blocks[len(prefix) : end], end + len(suffix)
        width = len(self.inner) + 1
        if width == 1:
            values = texts = inside.split(suffix + prefix)
        else:
            for constant in (suffix + prefix, *self.inner):
                inside = b"\n".join(inside.split(constant))
            values = inside.split(b"\n")
            count, excess = divmod(len(values), width)
            if excess or self.event_format * count % tuple(values) != blocks[:size]:
                return None
            numbers = [b",".join(values[column::width]) for column in self.number_columns]
            if not all(map(NUMBERS.fullmatch, numbers)):
                return None
            texts = values[self.text_column :: width]
        # The blank between texts makes an escape that is split across two of them invalid.
        count, joined = len(texts), b" ".join(texts)
        odd_bytes = b"".join(values).translate(None, PLAIN_BYTES) if width > 1 else b""
        if b"" in texts or (odd_bytes and odd_bytes != joined.translate(None, PLAIN_BYTES)):
            return None  # all values but the texts must be plain
        try:
            text = read_json_text(joined)
            if count > 1:
                text = read_json_text(b"".join(texts))
        except ValueError:
            return None
        if b"\\" in joined and (b"\\u" in joined or b"\\/" in joined):
            texts = list(map(unescape_text, texts))
            values[self.text_column :: width] = texts
        output_values: list[Any] = texts
        columns = len(self.output_columns)
        if columns != 1:
            output_values = [b""] * (count * columns)
            numbers = [b"%d" % (frame_number + index) for index in range(count)]
            for index, column in enumerate(self.output_columns):
                output_values[index::columns] = numbers if column < 0 else values[column::width]
        return size, count, text, self.output_format * count % tuple(output_values)


@dataclass(slots=True)
class StreamTranslator:
    """One response in transit: upstream bytes in, client bytes out.

    Without `stream` frames are collected, and `response_body` returns the response at the end.
    An error before the first byte is only stored in `error`, so that it can become a status; later
    it is also sent as a frame.
    """

    upstream: UpstreamDialect
    client: Dialect
    context: ResponseContext
    stream: bool
    request_id: str
    framing: Framing = field(init=False)
    pairs: PairJoiner = field(init=False)
    relay: Relay = field(init=False)
    may_copy: bool = field(init=False)  #: text deltas, without parsing each
    frames: list[Json] = field(default_factory=list)  #: without `stream`
    collected_bytes: int = 0  #: upstream bytes that `frames` were parsed from
    #: matching deltas need no parsing; nothing else may change the response meanwhile
    template: Template | None = None
    unused_templates: int = 0  #: since one was used
    output: list[bytes] = field(default_factory=list)  #: not yet returned
    has_output: bool = False  #: a byte was sent, so an error can only be a frame
    frame_count: int = 0  #: frames sent
    error: ApiError | None = None

    def __post_init__(self) -> None:
        upstream, client, context = self.upstream, self.client, self.context
        self.framing, self.pairs = upstream.framing(), PairJoiner()
        filters: list[OutputFilter | StopCutter] = []
        if context.output:
            filters.append(OutputFilter(context, context.output))
        if context.stop_strings:
            filters.append(StopCutter(context.stop_strings))
        self.may_copy = self.stream and not filters
        if upstream is not client or filters or context.legacy_functions or context.rewritten:
            reader, writer = upstream.reader(context), client.writer(context)
            self.relay = Converter(reader, writer, context, filters)
        else:
            self.relay = client.relay(context)

    def rename_model(self, model_id: str) -> None:
        """To be called before the first byte of the response."""
        self.context.model = model_id
        self.__post_init__()

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.relay.finished

    @property
    def is_complete(self) -> bool:
        """Whether the upstream finished: it did not fail and was not cut short here."""
        return self.relay.finished and self.error is None and not self.context.stop_strings

    @property
    def usage(self) -> Usage:
        usage = self.relay.usage
        if usage.source or not (self.has_output or self.frames):
            return usage
        return finalize_usage(usage, self.context, self.relay.output_estimate)

    def feed(self, data: bytes) -> bytes:
        try:
            self.collected_bytes += 0 if self.stream else len(data)
            if self.collected_bytes > MAX_COLLECTED_BYTES:
                raise UpstreamError("The upstream's response is too large.")
            blocks = self.framing.complete(data)
            step = FIRST_PARSED_EVENTS if self.may_copy else len(blocks)
            while blocks and not self.is_finished:
                if self.template and (copied_size := self.copy_deltas(self.template, blocks)):
                    blocks = blocks[copied_size:]
                    continue
                # Parses a few, retries with the template they gave, then parses twice as many.
                parts = blocks.split(b"\n\n", step)
                remaining = parts[step] if len(parts) > step else b""
                self.feed_events(blocks[: len(blocks) - len(remaining)])
                blocks = remaining
                step *= 2
        except ApiError as error:
            self.fail(error)
        return self.take_output()

    def copy_deltas(self, template: Template, blocks: bytes) -> int:
        """Copies the deltas that the events begin with; returns their size in bytes."""
        copied = template.copy(blocks, self.frame_count)
        if copied is None:
            return 0
        size, count, text, output = copied
        try:
            self.relay.track(template.kind, text)
        except UpstreamError:
            return 0  # parsed instead, so that the deltas before the error are sent
        self.output.append(output)
        self.frame_count += count if output else 0
        self.unused_templates = 0
        return size

    def feed_events(self, blocks: bytes) -> None:
        """Parses and relays complete events; the last one may give a new template."""
        self.unused_templates += self.template is not None
        self.template = None
        frames = self.pairs.join(blocks, self.framing.frames(blocks))
        # Seldom where each event differs in more than its text.
        is_likely = self.unused_templates < 4 or not self.frame_count % 8
        may_copy = frames and self.may_copy and is_likely and not self.pairs.held
        delta = self.upstream.read_delta(frames[-1]) if may_copy else None
        frame = self.relay_frames(frames)
        if not delta or self.is_finished or self.frame_count < 2:
            return  # the first frame of a stream has fields of its own
        # Text that is not sent is thinking between tags, and searched for their end.
        is_silent = (
            isinstance(self.relay, Converter) and self.relay.is_silent and delta[0] != "text"
        )
        if is_silent or self.client.read_delta(frame) == delta:
            event = blocks[:-2].rpartition(b"\n\n")[2] + b"\n\n"
            output = b"" if is_silent else self.output[-1]
            self.template = Template.build(event, output, delta, self.client.is_numbered)

    def feed_buffered(self, data: bytes) -> bytes:
        """The client's bytes for a non-streaming upstream response."""
        try:
            payload = load_object(data)
            if payload is None:
                raise UpstreamError("The upstream's response is not JSON.")
            if payload.get("error"):
                raise read_stream_error(payload["error"])
            self.relay_frames(self.upstream.expand(payload))
        except ApiError as error:
            self.fail(error)
        return self.take_output() + self.end()

    def end(self, error: ApiError | None = None) -> bytes:
        if self.is_finished:
            return b""
        try:
            if error:
                raise error
            self.relay_frames(self.pairs.release() + self.framing.last_frames())
            if not self.is_finished:
                self.send(self.relay.end())
        except ApiError as failure:
            self.fail(failure)
        return self.take_output()

    def relay_frames(self, frames: list[Json]) -> Json:
        """Returns what the last frame became if that is one frame."""
        repaired: list[Json] = []
        for frame in frames:
            if self.relay.finished:
                break  # nothing may follow the end
            repaired = self.relay.repair(frame)
            self.send(repaired)
        return repaired[0] if len(repaired) == 1 else {}

    def send(self, frames: list[Json]) -> None:
        """Numbers are assigned here, as pings and errors come in between."""
        if not self.stream:
            self.frames += frames
            return
        for frame in frames:
            self.has_output = True
            if self.client.is_numbered:
                frame["sequence_number"] = self.frame_count
            self.frame_count += 1
            self.output.append(self.client.encode(frame))
        if self.relay.finished and self.error is None:
            self.output.append(self.client.tail)

    def take_output(self) -> bytes:
        output, self.output = self.output, []
        return b"".join(output)

    def ping(self) -> bytes:
        frame = self.client.keepalive_frame(self.context) if self.frame_count else None
        if frame is None:
            return self.client.ping(self.frame_count > 0)
        self.send([frame])
        return self.take_output()

    def fail(self, error: ApiError) -> None:
        """Ends the response: with a frame if a byte was sent, otherwise only in `self.error`."""
        error.message = mask_secrets(error.message[:MAX_ERROR_TEXT], self.context.secrets())
        self.error = error
        if self.has_output:
            has_frames = self.frame_count > 0
            self.send(self.client.error_frames(error, self.request_id, self.context, has_frames))

    def response_body(self) -> Json:
        """The non-streaming response; raises the error that ended it."""
        if self.error:
            raise self.error
        return self.client.aggregate(self.frames)


# ---- 9. Upstream rules -------------------------------------------------------------------------
#
# What the services refuse, add and mean, as plain functions.  Unless said otherwise the facts on
# Copilot were seen in VS Code, gh-aw-firewall and Floway between 2026-04 and 2026-09.

# 9.1 models

# Best upstream dialect first: the client's own, then the one that loses least of the request.
DIALECT_ORDER = {
    "chat": ("chat", "kiro", "responses", "messages"),
    "messages": ("messages", "kiro", "responses", "chat"),
    "responses": ("responses", "kiro", "messages", "chat"),
}
ENDPOINT_DIALECTS = {
    "/chat/completions": "chat",
    "/v1/messages": "messages",
    "/responses": "responses",
}
DIALECT_PATHS = {dialect: path for path, dialect in ENDPOINT_DIALECTS.items()}
# Headers a catalogue may add to a request: no HTTP fields, none that identify the client.
MODEL_HEADER = re.compile(r"(?:x|copilot|openai|anthropic)-[a-z0-9-]{1,60}", re.IGNORECASE)
HEADER_VALUE = re.compile(r"[ -~]{0,1000}")
REASONING_GPT = re.compile(r"(?:gpt-[5-9]|o[1-9](?:-|$))")


def read_copilot_model(entry: Json, provider: str) -> Model | None:
    """One catalogue entry; None if it is not a chat or embeddings model."""
    model_id = entry.get("id")
    capabilities = get_dict(entry, "capabilities")
    if not isinstance(model_id, str) or not MODEL_NAME.fullmatch(model_id):
        return None
    kind = capabilities.get("type", "chat")
    if kind not in ("chat", "embeddings"):
        return None
    limits, supports = get_dict(capabilities, "limits"), get_dict(capabilities, "supports")
    endpoints = entry.get("supported_endpoints")
    if not isinstance(endpoints, list):
        endpoints = ["/chat/completions"]  # absent on older models
    is_embedding = kind == "embeddings"
    dialects = [] if is_embedding else map(ENDPOINT_DIALECTS.get, map(str, endpoints))
    efforts = supports.get("reasoning_effort")
    min_budget = positive_int(supports.get("min_thinking_budget")) or MIN_THINKING_BUDGET
    max_budget = positive_int(supports.get("max_thinking_budget"))
    is_picked = is_embedding or entry.get("model_picker_enabled", True) is not False
    headers = list(get_dict(entry, "request_headers").items())[:MAX_MODEL_HEADERS]
    return Model(
        id=model_id,
        provider=provider,
        dialects=tuple(filter(None, dialects)),
        embeds=is_embedding,
        name=get_name(entry, "name") or model_id,
        family=get_name(capabilities, "family").lower(),
        vendor=get_name(entry, "vendor"),
        max_output=positive_int(limits.get("max_output_tokens")),
        max_prompt=positive_int(limits.get("max_prompt_tokens")),
        context=positive_int(limits.get("max_context_window_tokens")),
        efforts=tuple(e for e in efforts if e in EFFORTS) if isinstance(efforts, list) else (),
        adaptive=bool(supports.get("adaptive_thinking")),
        budget=(min_budget, max_budget) if max_budget else None,
        structured=supports.get("structured_outputs") is True,
        stops=0 if REASONING_GPT.match(model_id) else None,
        streaming=supports.get("streaming", True) is not False,
        listed=is_picked and get_dict(entry, "policy").get("state", "enabled") == "enabled",
        headers={
            key.lower(): value
            for key, value in headers
            if MODEL_HEADER.fullmatch(key)
            and isinstance(value, str)
            and HEADER_VALUE.fullmatch(value)
        },
        raw=entry,
    )


def read_copilot_models(body: Json, provider: str) -> dict[str, Model]:
    """The catalogue by id: malformed entries are skipped, the first of duplicate ids wins."""
    models: dict[str, Model] = {}
    entries = body.get("data")
    for entry in entries[:MAX_LISTED_MODELS] if isinstance(entries, list) else ():
        model = read_copilot_model(entry, provider) if isinstance(entry, dict) else None
        if model is not None:
            models.setdefault(model.id, model)
    if not any(model.listed and not model.embeds for model in models.values()):
        # The flags of some Individual, Free and Student plans are all false (2026-11).
        for model in models.values():
            model.listed = get_dict(model.raw, "policy").get("state", "enabled") == "enabled"
    return models


def price_nano_credits(model: Model, usage: Usage) -> int | None:
    """The cost of a response by the catalogue's prices, for upstreams that report no billed amount.

    `billing.token_prices`: credits per `batch_size` tokens in two tiers by prompt length, or flat,
    in billionths of a credit (both seen in 2026-07).
    """
    prices = get_dict(get_dict(model.raw, "billing"), "token_prices")
    batch_size = positive_int(prices.get("batch_size"))
    if not batch_size or not usage.source:
        return None
    tier, unit = get_dict(prices, "default"), 1e9
    if not tier:
        tier, unit = prices, 1.0
    elif usage.prompt > (positive_int(tier.get("max_prompt_tokens")) or math.inf):
        tier = get_dict(prices, "long_context") or tier
    if read_figure(tier.get("input_price")) is None:
        return None

    def price(*names: str) -> float:
        figures = (read_figure(tier.get(name)) for name in names)
        return next((figure for figure in figures if figure is not None), 0.0)

    total = (
        usage.input * price("input_price")
        + usage.cache_read * price("cache_read_price", "cache_price", "input_price")
        + usage.cache_write * price("cache_write_price", "input_price")
        + usage.output * price("output_price")
    )
    return round(min(max(total / batch_size * unit, 0.0), MAX_FIGURE))


# The families of 2026-11: vendor and dialects of models that the catalogue does not describe.
COPILOT_FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"claude-", "Anthropic", ("messages", "chat")),
    (r"gpt-(?:5\.[4-9]|6)", "OpenAI", ("responses",)),
    (r"grok-4\.[5-9]", "xAI", ("responses",)),
    (r"mai-", "Microsoft", ("responses",)),
    (r"gemini-", "Google", ("chat",)), (r"kimi-", "Moonshot AI", ("chat",)),
    (r"", "", ("chat",)),
)  # fmt: skip


def guess_copilot_model(model_id: str, provider: str) -> Model:
    """A model missing from the catalogue, which fluctuates: an exact name is still tried."""
    families = (row[1:] for row in COPILOT_FAMILIES if re.match(row[0], model_id))
    vendor, dialects = next(families)
    stops = 0 if REASONING_GPT.match(model_id) else None
    return Model(model_id, provider, dialects, vendor=vendor, stops=stops, guessed=True)


# Auto: the service chooses a model for each conversation; Free and Student plans have nothing else.
# The ways to ask for it and their API versions, best first: VS Code's (its public source, 2026-12),
# its older one, and a chat request without a model (reported in 2026-11).
AUTO_MODEL = "auto"
AUTO_UNNAMED = "/chat/completions"
AUTO_PATHS = {"/auto": "2026-08-01", "/models/session": "2026-06-01", AUTO_UNNAMED: ""}
SESSION_HEADER = "copilot-session-token"
# The choice is no longer valid, or a request without a model is not understood.
AUTO_REFUSED = re.compile(
    r"(?i)session|missing.{0,40}\bmodel\b|\bmodel\b.{0,40}(?:required|missing|empty|must)"
)
NAMED_MODEL = re.compile(rb'"model": ?"([\w.:/-]{1,128})"')


def auto_payload(path: str, prompt: str, has_image: bool, tier: str) -> Json:
    if path != "/auto":
        return {"auto_mode": {"model_hints": [AUTO_MODEL]}}
    options: Json = {"has_image": True} if has_image else {}
    return {"prompt": prompt, **options, **({"tier": tier} if tier else {})}


def read_auto_choice(body: Json, models: dict[str, Model], provider: str) -> Model:
    """The chosen model, whose requests carry the session token; raises UpstreamError.

    `selected_model` is an entry of a catalogue, but only its id is certain, or, in the older
    response, an id.  The catalogue may lack the model.
    """
    selected, offered = body.get("selected_model"), body.get("available_models")
    if not isinstance(selected, dict):
        ids = [selected, *(offered if isinstance(offered, list) else ())]
        selected = {"id": next(filter(None, ids), None)}
    entry = {key: value for key, value in selected.items() if value}
    guess = guess_copilot_model(str(entry.get("id")), provider)
    entry.setdefault("supported_endpoints", [DIALECT_PATHS[name] for name in guess.dialects])
    model = models.get(guess.id) or read_copilot_model({"vendor": guess.vendor, **entry}, provider)
    if model is None:
        raise UpstreamError("Copilot's Auto names no model.")
    token = get_token(body, "session_token")
    session = {SESSION_HEADER: token} if token else {}
    return replace(model, auto=True, headers={**model.headers, **session})


# How Anthropic's clients ask for a million tokens; Copilot lists separate models for that.
LONG_CONTEXT_BETA = "context-1m"
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,127}", re.ASCII)
DATED = re.compile(r"-(?:20\d{6}|20\d\d-\d\d-\d\d|latest)$")
DASHED_VERSION = re.compile(r"(?<=-)(\d)-(\d{1,2})(?=-|$)")
# Suffixes that clients append to a model name to choose an effort; used if no such model exists.
NAME_EFFORT = re.compile(r"-(thinking|low|medium|high|xhigh|max)$")


# Sellers put a vendor before a name (OpenRouter, LiteLLM, Vertex), and `.0` behind a version.
SELLER = re.compile(
    r"(?:~?(?:anthropic|openai|google|x-?ai|moonshotai|deepseek|qwen|minimax|z-ai|amazon|bedrock"
    r"|vertex_ai|github_copilot)/)+"
)
VERSION_ZERO = re.compile(r"(?<=-\d)[.-]0(?=-|$)")
FAMILY_LAST = re.compile(r"claude-(\d(?:[.-]\d)?)-(sonnet|opus|haiku)$")
RETIRED_CLAUDE = re.compile(r"claude-(sonnet|opus|haiku)-3(?:\.\d)?")


def model_spellings(name: str) -> list[str]:
    """Possible spellings of a model name, best first: as is, undated, with a dotted version.

    `anthropic/claude-opus-4-0` is `claude-opus-4`.

    Anthropic clients write `claude-sonnet-4-5-20250929`, Copilot and Kiro list `claude-sonnet-4.5`;
    the date is removed first, or `claude-sonnet-4-20250514` would become version 4.20.
    """
    name = name.lower()
    spellings = []
    if name.endswith("[1m]"):
        name = name[:-4]
        spellings = [spelling + "-1m" for spelling in model_spellings(name)]
    bare = SELLER.sub("", name, count=1)
    undated = DATED.sub("", bare).removeprefix("kiro-")
    for spelling in (name, bare, undated, FAMILY_LAST.sub(r"claude-\2-\1", undated)):
        spellings += [spelling, DASHED_VERSION.sub(r"\1.\2", spelling)]
    spellings += [VERSION_ZERO.sub("", spelling) for spelling in spellings]
    return list(dict.fromkeys(spellings))


def match_model(name: str, models: dict[str, Model]) -> Model | None:
    """In any usual spelling; for Claude 3, retired but still in use, the newest of its family."""
    if name in models:
        return models[name]
    by_lower = {model_id.lower(): model for model_id, model in models.items()}
    families = {model.family: model for model in reversed(models.values()) if model.family}
    spellings, lowered = model_spellings(name), name.lower()
    known = [t[spelling] for t in (by_lower, families) for spelling in spellings if spelling in t]
    if known:
        # An inexact name prefers models this account can use: terms may not be accepted yet.
        usable = (model for model in known if model.listed or model.id.lower() == lowered)
        return next(usable, known[0])
    base, long_suffix, _ = lowered.partition("[1m]")
    stripped = NAME_EFFORT.sub("", base) + long_suffix
    if stripped == lowered:
        stripped = base.removesuffix("-1m")
    if stripped != lowered:
        return match_model(stripped, models)
    retired = RETIRED_CLAUDE.fullmatch(spellings[-1])
    prefix = f"claude-{retired[1]}-" if retired else "\0"
    return max(
        (model for key, model in by_lower.items() if key.startswith(prefix) and model.listed),
        key=lambda model: (claude_version(model.id) or (0, 0), -len(model.id)),
        default=None,
    )


class ModelList(dict[str, Model]):
    """Models by id, never changed."""

    @functools.cached_property
    def find(self) -> Callable[[str], Model | None]:
        """`match_model`, once for each name."""
        return functools.lru_cache(MAX_LISTED_MODELS)(lambda name: match_model(name, self))


def find_model(name: str, models: dict[str, Model]) -> Model | None:
    return models.find(name) if isinstance(models, ModelList) else match_model(name, models)


def implied_effort(name: str, model: Model) -> str | None:
    """The effort a name asks for beyond the model's own, as in `claude-sonnet-4.5-thinking`."""
    match = NAME_EFFORT.search(name.lower().removesuffix("[1m]"))
    if match is None or model.id.lower().endswith(match[0]):
        return None
    return "high" if match[1] == "thinking" else match[1]


# 9.2 headers

COPILOT_HOSTS = {
    "individual": "https://api.individual.githubcopilot.com",
    "business": "https://api.business.githubcopilot.com",
    "enterprise": "https://api.enterprise.githubcopilot.com",
}
COPILOT_ANY_HOST = "https://api.githubcopilot.com"
# GitHub tokens that Copilot accepts directly (Copilot CLI and SDK, opencode, 2026-08).
DIRECT_TOKENS = ("gho_", "github_pat_", "ghs_")
# Fine-grained and server tokens, which GitHub documents for programs: the exchange answers 403.
PROGRAM_TOKENS = ("github_pat_", "ghs_")
# Where a token may be sent: a token response naming any other host is refused.
COPILOT_HOST_SUFFIXES = (".githubcopilot.com", ".ghe.com")
# The editor's three values are a set from a real build (seen in a public client, 2026-11, when any
# NAME/VERSION was accepted).  When GitHub retires an API version it responds with 466.  The newest,
# 2026-08-01, is sent only where it is demanded: public clients still use 2026-06-01 (2026-11).
EDITOR_VERSION = "vscode/1.134.0"
EDITOR_PLUGIN_VERSION = "copilot-chat/0.62.0"
COPILOT_USER_AGENT = "GitHubCopilotChat/0.62.0"
COPILOT_API_VERSION = "2026-06-01"
GITHUB_API_VERSION = "2025-04-01"
COPILOT_INTEGRATION_ID = "vscode-chat"
# With the editor's id tokens for programs are refused (public clients, 2026-11).
PROGRAM_INTEGRATION_ID = "copilot-developer-cli"


EDITOR_HEADERS = {
    "Accept-Encoding": "identity",
    "Editor-Version": EDITOR_VERSION,
    "Editor-Plugin-Version": EDITOR_PLUGIN_VERSION,
    "User-Agent": COPILOT_USER_AGENT,
    "X-VSCode-User-Agent-Library-Version": "electron-fetch",
}


def copilot_scheme(token: str, host: str) -> str:
    """The Authorization scheme to try first: plan hosts want `token` for an OAuth app's token.

    Otherwise they respond "Authorization header is badly formatted" (gh-aw-firewall, 2026-08).
    """
    has_plan = f"https://{host}" != COPILOT_ANY_HOST and not host.endswith(".ghe.com")
    return "token" if token.startswith("gho_") and has_plan else "Bearer"


def copilot_headers(
    token: CopilotToken, config: CopilotConfig, ids: Iterable[str], intent: str, request_id: str
) -> dict[str, str]:
    """`ids`: of the session, the machine and the device."""
    is_program = token.access_token.startswith(PROGRAM_TOKENS)
    own_id = PROGRAM_INTEGRATION_ID if is_program else COPILOT_INTEGRATION_ID
    return {
        "Authorization": f"{token.scheme} {token.access_token}",
        "Accept": "application/json",
        "Copilot-Integration-Id": config.integration_id or own_id,
        "X-GitHub-Api-Version": COPILOT_API_VERSION,
        **EDITOR_HEADERS,
        **dict(zip(("VScode-SessionId", "VScode-MachineId", "Editor-Device-Id"), ids, strict=True)),
        "OpenAI-Intent": intent,
        "X-Interaction-Type": intent,
        "X-Request-Id": request_id,
        "X-Agent-Task-Id": request_id,
    }


def exchange_headers(github_token: str) -> Json:
    """The headers of a token exchange; without the editor headers GitHub responds with 403."""
    scheme = "Bearer" if github_token.startswith(PROGRAM_TOKENS) else "token"
    return {
        "Authorization": f"{scheme} {github_token}",
        "Accept": "application/json",
        "X-GitHub-Api-Version": GITHUB_API_VERSION,
        **EDITOR_HEADERS,
    }


def hash_uuid(text: str) -> str:
    """A UUID derived from `text`: X-Interaction-Id is the prompt cache's key."""
    return format_uuid(short_hash(text, 32))


def format_uuid(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def allowed_api_host(url: str, config: CopilotConfig) -> bool:
    """Whether a token may be sent to the API host named in a token response."""
    if check_url(url):
        return False
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" and host.endswith(COPILOT_HOST_SUFFIXES):
        return True
    github_host = urllib.parse.urlsplit(config.github_api_url).hostname or ""
    return is_loopback(host) and is_loopback(github_host)  # an imitation on this machine


INTERLEAVED_BETA = "interleaved-thinking-2025-05-14"
CONTEXT_BETA = "context-management-2025-06-27"
BETA = re.compile(r"[A-Za-z0-9._-]{1,64}")


def messages_betas(body: Json, client_betas: str, refused: Collection[str], model: Model) -> str:
    """The client's betas, an open list, and those this body needs, without the refused ones."""
    betas = BETA.findall(client_betas)[:MAX_BETAS]
    betas = [beta for beta in betas if not beta.startswith(LONG_CONTEXT_BETA)]
    if get_dict(body, "thinking").get("type") == "enabled" and not model.adaptive:
        betas.append(INTERLEAVED_BETA)
    if "context_management" in body:
        betas.append(CONTEXT_BETA)  # without it the field is refused
    return ",".join(beta for beta in dict.fromkeys(betas) if beta not in refused)


# 9.3 request bodies as Copilot accepts them


def text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def as_parts(content: Any) -> list[Any]:
    return [text_part(content)] if isinstance(content, str) else [*(content or ())]


#: kind of rejection -> what one model refuses: "thinking" (a budget), "effort" (levels), "system"
#: (turns), "beta" (names), "field" (dotted paths, `*` for any list index), "output" (the
#: ways to structured output: "field", "tool")
Rejections = Mapping[str, Collection[str]]


class RejectionMemory:
    """What upstreams refused: left out for that model and dialect until it expires."""

    def __init__(self) -> None:
        #: (model, dialect) -> (kind, name) -> when it expires, monotonic
        self.scopes: dict[tuple[str, str], dict[tuple[str, str], float]] = {}

    def add(self, model: str, dialect: str, pairs: list[tuple[str, str]], now: float) -> None:
        """Remembers `(kind, name)` pairs; beyond the limits the oldest are forgotten."""
        if not pairs:
            return
        scope = self.scopes.setdefault((model, dialect), {})
        scope.update(dict.fromkeys(pairs, now + REJECTION_SECONDS))
        for table, limit in ((scope, MAX_REJECTIONS), (self.scopes, MAX_REJECTION_SCOPES)):
            while len(table) > limit:
                del table[next(iter(table))]

    def rejections(self, model: str, dialect: str, now: float) -> Rejections:
        rejected: dict[str, list[str]] = {}
        for (kind, name), expires_at in self.scopes.get((model, dialect), {}).items():
            if now < expires_at:
                rejected.setdefault(kind, []).append(name)
        return rejected


@dataclass(slots=True)
class BodyDraft:
    """A body while the rules are applied; they replace what the client's body shares with it."""

    body: Json
    model: Model
    rejections: Rejections
    dialect: str
    output: OutputFormat | None  #: structured output that needs more than the client's field
    #: names of the fields left out
    dropped: list[str] = field(default_factory=list)

    def drop(self, *names: str) -> None:
        """Removes fields, and reports those that ask for anything."""
        self.dropped += [name for name in names if not is_default(name, self.body.pop(name, None))]

    def drop_fields(self, table: FieldTable) -> None:
        """Removes what upstreams refuse natively; raises UnsupportedFeature."""
        self.body, missed = split_fields(
            self.body, table, native=True, openai=is_openai(self.model)
        )
        self.dropped += missed

    def set_tools(self, tools: list[Json]) -> None:
        if tools:
            self.body["tools"] = tools
        else:
            for key in ("tools", "tool_choice", "parallel_tool_calls"):
                self.body.pop(key, None)


#: part type -> the field of its signature
THINKING_PARTS = {"thinking": "signature", "redacted_thinking": "data"}


def is_native_signature(signature: Any) -> bool:
    """Whether encrypted reasoning is the upstream's own: it refuses all other."""
    is_text = isinstance(signature, str) and signature != ""
    return is_text and not signature.startswith(FOREIGN_SIGNATURES)


def read_native_parts(content: Any, path: str) -> Iterator[tuple[str, Json, str]]:
    """(path, part, type) for each part of a message's content."""
    if content is not None and not isinstance(content, list):
        raise wrong_type(path, "a string or a list of parts")
    for index, part in enumerate(content or ()):
        part_path = f"{path}.{index}"
        yield part_path, part, need_str(need_dict(part, part_path), "type", part_path)


# Of OpenAI's dialects; some clients send them to Anthropic's endpoint.
OPENAI_PARTS = (
    "image_url", "input_image", "file", "input_file", "input_text", "output_text", "refusal",
)  # fmt: skip


def read_native_content(content: Any, path: str) -> list[Block]:
    """A message's content as blocks, without the parts that Copilot refuses.

    Documents of text and tool references become text: only PDFs and text are known to work.
    """
    if isinstance(content, str):
        return [Text(content)]
    blocks: list[Block] = []
    for part_path, part, kind in read_native_parts(content, path):
        if kind == "text":
            blocks.append(Text(need_str(part, "text", part_path), part))
        elif kind == "tool_use":
            call_id, name = need_str(part, "id", part_path), need_str(part, "name", part_path)
            blocks.append(ToolCall(call_id, name, str(part.get("input")), part))
        elif kind == "tool_result":
            inner = read_native_content(part.get("content"), f"{part_path}.content")
            inner = [block for block in inner if not is_blank(block)]
            call_id = need_str(part, "tool_use_id", part_path)
            blocks.append(ToolResult(call_id, inner, part.get("is_error") is True, part))
        elif kind == "image" and get_dict(part, "source").get("type") == "base64":
            # Clients send wrong media types, and the vendor checks.
            source, source_path = part["source"], f"{part_path}.source"
            data = need_str(source, "data", source_path)
            declared = str_field(source, "media_type", source_path) or ""
            source = {**source, "media_type": image_type(data, declared, part_path)}
            blocks.append(Native({**part, "source": source}))
        elif kind == "tool_reference" or (
            kind == "document" and get_dict(part, "source").get("type") in ("text", "content")
        ):
            blocks += filter(None, map(native_text, PART_READERS[kind](part, part_path)))
        elif kind in OPENAI_PARTS:
            written = write_messages_blocks(PART_READERS[kind](part, part_path), Conversation())
            blocks += map(Native, written)
        elif kind not in THINKING_PARTS or is_native_signature(part.get(THINKING_PARTS[kind])):
            blocks.append(Native(part))
    return blocks


def native_text(block: Block) -> Text | None:
    """A text or text document; None for any other block inside a document."""
    if not isinstance(block, (Text, Document)):
        return None
    title = block.title if isinstance(block, Document) else ""
    text = f"[{title}]\n{block.text}" if title else block.text
    return Text(text, text_part(text))


def write_native_content(blocks: list[Any]) -> str | list[Json]:
    """The reverse of `read_native_content`, also for blocks that `normalize_turns` added."""
    if not blocks or (len(blocks) == 1 and type(blocks[0]) is Text and not blocks[0].source):
        return join_texts(blocks)
    parts = []
    for block in blocks:
        part = dict(block.source or {})
        if isinstance(block, ToolCall):
            part.update(id=block.id, name=wire_name(block.name))
        elif isinstance(block, ToolResult):
            content = write_native_content(block.blocks)
            part.update(type="tool_result", tool_use_id=block.id, content=content)
            if block.is_error:
                part.update(is_error=True, content=content or NO_OUTPUT)
        parts.append(part or text_part(block.text))
    return parts


def normalize_messages(draft: BodyDraft) -> None:
    """Makes roles alternate, gives each call its result in the next message, drops empty ones.

    Claude accepts system messages from version 4.8 on, between a user's and an assistant's
    message or at the end; others become reminders.
    """
    turns: list[Turn] = []
    for path, message in dict_items(draft.body, "messages"):
        blocks = read_native_content(message.get("content"), f"{path}.content")
        turns.append(Turn(need_str(message, "role", path), blocks))
    turns = normalize_turns(turns, MAX_NATIVE_ID_LENGTH)
    version = claude_version(draft.model.id) or (0, 0)
    takes_system = version >= (4, 8) and "system" not in draft.rejections
    roles = ["", *(turn.role for turn in turns), "assistant"]
    if "system" in roles:
        for index, turn in enumerate(turns):
            is_between = roles[index] == "user" and roles[index + 2] == "assistant"
            if turn.role == "system" and not (takes_system and is_between):
                texts = (block.text for block in turn.blocks if isinstance(block, Text))
                turns[index] = Turn("user", [Text(as_reminder(text)) for text in texts])
        turns = merge_turns(turns)
    draft.body["messages"] = [
        {"role": turn.role, "content": write_native_content(turn.blocks)} for turn in turns
    ]


def adapt_messages_fields(draft: BodyDraft) -> None:
    model = draft.model
    draft.drop_fields(MESSAGES_FIELDS)
    body = draft.body = without_nulls(draft.body)
    if "1m" in model.id.split("-"):  # the 1m window does not support context edits
        draft.drop("context_management")
    limit = model.max_output or DEFAULT_MAX_TOKENS
    max_tokens = int_field(body, "max_tokens")  # 0: only warms the cache
    body["max_tokens"] = limit if max_tokens is None else min(max_tokens, limit)
    if not isinstance(body.get("system"), str):
        blocks = [dict(part) for _, part, _ in read_native_parts(body.get("system"), "system")]
        blocks = [block for block in blocks if str(block.get("text") or "").strip()]
        body["system"] = [block for block in blocks if not is_billing_header(block)]
    if not text_of(body["system"]).strip():
        del body["system"]


def parts_of(messages: Iterable[Json]) -> Iterator[Json]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, dict))


TOOL_KEYS = ("name", "description", "input_schema", "cache_control")
PLACEHOLDER_TOOL = {"name": "none", "description": "Do not call."}  # history with calls needs one


def adapt_messages_tools(draft: BodyDraft) -> None:
    """Custom tools with the keys every backend accepts; server-side tools are not available."""
    body = draft.body
    choice = dict_field(body, "tool_choice")
    tools: list[Json] = []
    server_tools: list[str] = []
    for _, tool, name, schema in messages_tools(body, server_tools):
        adapted = {key: tool[key] for key in TOOL_KEYS if tool.get(key) is not None}
        schema = adapt_schema(schema, draft.model.vendor)
        tools.append({**adapted, "name": wire_name(name), "input_schema": schema})
    forced = str_field(choice, "name", "tool_choice") or ""
    drop_server_tools(server_tools, len(tools), forced, draft.dropped)
    if not tools and any(part.get("type") == "tool_use" for part in parts_of(body["messages"])):
        tools = [{**PLACEHOLDER_TOOL, "input_schema": EMPTY_SCHEMA}]
    if forced:
        body["tool_choice"] = {**choice, "name": wire_name(forced)}
    draft.set_tools(tools)


def adapt_thinking(draft: BodyDraft) -> None:
    """`thinking` in the form that the model takes: a budget within its limits, or adaptive."""
    body, model = draft.body, draft.model
    thinking, settings = dict_field(body, "thinking"), dict_field(body, "output_config")
    effort = str_field(settings, "effort", "output_config")
    is_allowed = not is_forced(dict_field(body, "tool_choice"))
    kind = str_field(thinking, "type", "thinking") if is_allowed else None
    budget_refused = "thinking" in draft.rejections
    adaptive = model.adaptive or budget_refused
    body.pop("thinking", None)
    budget = 0
    if kind == "enabled":
        budget = int_field(thinking, "budget_tokens", "thinking") or 0
    elif kind == "adaptive" and not adaptive and model.budget:
        budget = EFFORT_BUDGETS.get(effort or "high", EFFORT_BUDGETS["high"])
        thinking = {"type": "enabled"}
    if kind in ("adaptive", "disabled") and adaptive:
        body["thinking"] = thinking
    elif budget > 0 and adaptive and (model.budget is None or budget_refused):
        body["thinking"] = {"type": "adaptive", "display": thinking.get("display", "summarized")}
        body["output_config"] = {"effort": effort_of_budget(budget), **settings}
    elif budget > 0 and (model.budget or model.guessed) and not needs_signed_turn(body["messages"]):
        tokens = clamp_budget(budget, model.budget, body["max_tokens"])
        if tokens is not None:
            body["thinking"] = {**thinking, "budget_tokens": tokens}
    adapt_effort(draft)
    # No sampling parameters with thinking or on newer models; otherwise only one of the two.
    thinks = body.get("thinking", {}).get("type") in ("enabled", "adaptive")
    if thinks or adaptive or (claude_version(model.id) or (0, 0)) >= (4, 7):
        draft.drop("temperature", "top_p", "top_k")
    elif "temperature" in body:
        draft.drop("top_p")


def adapt_effort(draft: BodyDraft) -> None:
    """`output_config.effort` as the model lists it; no backend knows other keys (task_budget)."""
    body, efforts = draft.body, draft.model.efforts
    settings = body.pop("output_config", None) or {}
    effort = settings.get("effort")
    if body.get("thinking", {}).get("type") == "disabled":
        efforts = tuple(item for item in efforts if item not in ("xhigh", "max"))
    level = clamp_effort(effort, efforts) if effort in EFFORTS else None
    if level and level not in draft.rejections.get("effort", ()):
        body["output_config"] = {"effort": level}
    is_applied = "output_config" in body or "thinking" in body
    lost = [key for key in settings if key != "format" and not (key == "effort" and is_applied)]
    draft.dropped += [f"output_config.{key}" for key in lost if settings[key] is not None]


#: dialect -> the tool choices that force OUTPUT_TOOL, and any tool
OUTPUT_CHOICES: dict[str, tuple[Json, Any]] = {
    "chat": ({"type": "function", "function": {"name": OUTPUT_TOOL}}, "required"),
    "messages": ({"type": "tool", "name": OUTPUT_TOOL}, {"type": "any"}),
}


def output_tool(output: OutputFormat) -> Json:
    """A tool of the messages dialect, which `adapt_chat_tools` takes as well."""
    schema = output.schema or {"type": "object"}
    if is_wrapped(output):
        value = inline_refs(schema, MAX_TOOLS)
        schema = {"type": "object", "properties": {"value": value}, "required": ["value"]}
    description = "Gives your final answer to the user: the input of this tool is the answer."
    return {"name": OUTPUT_TOOL, "description": description, "input_schema": schema}


def can_force_output(draft: BodyDraft, output: OutputFormat) -> bool:
    """Whether the model can be made to call OUTPUT_TOOL, or a tool of the client before it.

    Claude refuses that beside thinking; Gemini sets only properties that the schema names.
    """
    body, vendor = draft.body, draft.model.vendor
    thinks = get_dict(body, "thinking").get("type", "disabled") != "disabled"
    thinks |= "thinking_budget" in body or body.get("reasoning_effort", "none") != "none"
    choice = get_dict(body, "tool_choice").get("type") or body.get("tool_choice")
    names = [wire_name(name) for name in tool_names(body)]
    return (
        not (thinks and vendor == "Anthropic")
        and not (vendor == "Google" and not output.schema)
        and "tool" not in draft.rejections.get("output", ())
        and choice in (None, "auto", "none")
        and OUTPUT_TOOL not in names
        and len(names) < MAX_TOOLS
    )


def adapt_output(draft: BodyDraft) -> None:
    """Structured output by the messages dialect's field, by a tool, or else in the prompt."""
    body, output = draft.body, draft.output
    if output is None:
        return
    is_chat, is_refused = draft.dialect == "chat", "field" in draft.rejections.get("output", ())
    schema = output.schema or {}
    if schema.get("properties") and draft.model.structured and not (is_chat or is_refused):
        output_format = {"type": "json_schema", "schema": adapt_schema(schema, "output_config")}
        body["output_config"] = {**body.get("output_config", {}), "format": output_format}
    elif can_force_output(draft, output):
        named, required = OUTPUT_CHOICES[draft.dialect]
        choice, tools = body.get("tool_choice"), body.get("tools") or []
        if isinstance(choice, dict):
            required = {**choice, **required}  # with disable_parallel_tool_use
        is_free = tools and choice not in ("none", {"type": "none"})
        body["tools"] = [*tools, output_tool(output)]
        body["tool_choice"] = required if is_free else named
    else:
        instruction = output_instruction(output)
        if is_chat:
            messages = [{"role": "system", "content": instruction}, *body["messages"]]
            body["messages"] = join_neighbours(messages)
        else:
            body["system"] = [*as_parts(body.get("system")), text_part(instruction)]
        draft.dropped.append("response_format" if is_chat else "output_config.format")


def limit_cache_breakpoints(draft: BodyDraft) -> None:
    """At most four plain cache breakpoints, none on thinking; the last ones are kept."""
    body = draft.body
    candidates = [*body.get("tools", ()), *as_parts(body.get("system"))]
    if body.pop("cache_control", None):
        last = body["messages"][-1]
        last["content"] = as_parts(last["content"])
        last["content"][-1].setdefault("cache_control", {"type": "ephemeral"})
    message_parts = list(parts_of(body["messages"]))
    for part in message_parts:
        candidates += parts_of([part] if part["type"] == "tool_result" else ())
        candidates.append(part)
    breakpoint_parts = []
    for candidate in candidates:
        is_breakpoint = candidate.pop("cache_control", None) is not None
        if is_breakpoint and candidate.get("type") not in THINKING_PARTS:
            breakpoint_parts.append(candidate)
    for candidate in breakpoint_parts[-MAX_CACHE_BREAKPOINTS:]:
        candidate["cache_control"] = {"type": "ephemeral"}


def end_with_user(draft: BodyDraft) -> None:
    """A trailing assistant message is refused: asks to continue, like the official client."""
    messages = draft.body["messages"]
    if not messages:
        raise InvalidRequest("messages: all messages are empty.", param="messages")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles and roles[-1] == "assistant":
        messages.append({"role": "user", "content": [text_part("Please continue.")]})


def strip_rejected_fields(draft: BodyDraft) -> None:
    for path in draft.rejections.get("field", ()):
        body = without_field(draft.body, path.split("."))
        if body != draft.body:
            draft.body = body
            draft.dropped.append(path)


def without_field(value: Any, steps: list[str]) -> Any:
    """A copy of `value` without the field at `steps`.

    Validators put an object's type into their paths, as in `tools.0.custom.strict`: such a step
    stays at the same object.  A tool without a type is a custom one.
    """
    step, *rest = steps
    if isinstance(value, list) and step == "*" and rest:
        return [without_field(item, rest) for item in value]
    if not isinstance(value, dict):
        return value
    if rest and step == value.get("type", "custom"):
        return without_field(value, rest)
    if step not in value:
        return value
    if rest:
        return {**value, step: without_field(value[step], rest)}
    return {key: item for key, item in value.items() if key != step}


MESSAGES_RULES: tuple[Callable[[BodyDraft], None], ...] = (
    adapt_messages_fields, normalize_messages, adapt_thinking, adapt_output, adapt_messages_tools,
    end_with_user, limit_cache_breakpoints, strip_rejected_fields,
)  # fmt: skip

# Clients echo fields of earlier responses; the upstream knows only these.
CHAT_MESSAGE_KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_text", "reasoning_opaque"
)  # fmt: skip


def is_openai(model: Model) -> bool:
    return "OpenAI" in model.vendor or (not model.vendor and not model.id.startswith("gemini"))


def guarantees_output(dialect: str, model: Model) -> bool:
    """Whether the dialect's field for structured output is enough."""
    return dialect == "responses" or (dialect == "chat" and is_openai(model))


def adapt_chat_fields(draft: BodyDraft) -> None:
    """Drops refused fields, caps the output, and asks for the usage of every stream."""
    model = draft.model
    if not is_openai(model) and (int_field(draft.body, "n") or 1) > 1:
        raise UnsupportedFeature("n: only one choice is offered on this model.", param="n")
    draft.drop_fields(CHAT_FIELDS)
    if not is_openai(model):
        draft.body.pop("response_format", None)  # see adapt_output
    body = draft.body = without_nulls(draft.body)
    max_tokens = int_field(body, "max_completion_tokens") or int_field(body, "max_tokens")
    for key in ("max_completion_tokens", "max_tokens", "stream_options"):
        body.pop(key, None)
    if model.max_output:
        max_tokens = min(max_tokens or model.max_output, model.max_output)
    if max_tokens:
        is_reasoning = REASONING_GPT.match(model.id)
        body["max_completion_tokens" if is_reasoning else "max_tokens"] = max_tokens
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    if not dict_field(body, "prediction").get("content"):
        body.pop("prediction", None)


def adapt_chat_messages(draft: BodyDraft) -> None:
    """Messages with known fields, calls and results in the order that every vendor demands.

    For GPT, too, whose service would refuse what is repaired here.
    """
    model = draft.model
    rows = dict_items(draft.body, "messages")
    turns: list[Turn] = []
    for path, message in rows:
        add_turn(turns, read_native_message(message, path, model))
    messages = write_native_messages(normalize_turns(turns))
    if not messages:
        raise InvalidRequest("messages: all messages are empty.", param="messages")
    if model.vendor == "Anthropic":
        set_chat_cache_breakpoints(messages, is_multi_turn(draft.body))
    draft.body["messages"] = join_neighbours(messages) if model.vendor == "Google" else messages


def add_turn(turns: list[Turn], turn: Turn) -> None:
    """Adds a turn, to the last one if that is of its role."""
    if turns and turns[-1].role == turn.role:
        turns[-1].blocks += turn.blocks
    elif turn.blocks:
        turns.append(turn)


def read_native_message(message: Json, path: str, model: Model) -> Turn:
    """A chat message as it is, but for its calls or its tool's output; nothing of a blank one."""
    role = read_role(message, CHAT_ROLES, path)
    adapted = {key: message[key] for key in CHAT_MESSAGE_KEYS if message.get(key) is not None}
    if role == "developer" and not REASONING_GPT.match(model.id):
        adapted["role"] = "system"
    if not adapted.get("content") and isinstance(message.get("refusal"), str):
        adapted["content"] = message["refusal"]
    # opencode marks messages and parts
    marked = (part.get("cache_control") for part in (message, *parts_of([message])))
    if model.vendor == "Anthropic" and any(marked):
        adapted["copilot_cache_control"] = {"type": "ephemeral"}
    images = adapt_chat_content(adapted, model, f"{path}.content")
    if role == "tool":
        call_id = str_field(message, "tool_call_id", path) or ""
        blocks: list[Block] = [ToolResult(call_id, [Text(adapted["content"])], source=adapted)]
        blocks += [Native({"role": "user", "content": images})] if images else []
        return Turn("user", blocks)
    adapted.pop("tool_calls", None)
    rows = dict_items(message, "tool_calls", path) if role == "assistant" else ()
    calls = [read_native_call(*row) for row in rows]
    has_content = bool(adapted.get("content") or calls)
    return Turn(role, [Native(adapted), *calls] if has_content else [])


def read_native_call(path: str, call: Json) -> ToolCall:
    """A call in the history, with its type and with arguments that are valid JSON text."""
    function = function_of(call, path)
    name = wire_name(need_str(function, "name", f"{path}.function"))
    value = function.get("arguments", function.get("input"))
    arguments = complete_arguments(value if isinstance(value, str) else dump_text(value or {}))
    call_id = str_field(call, "id", path) or "call_" + short_hash(path, 16)
    source = {"id": call_id, "index": call.get("index"), "type": "function"}
    source["function"] = {"name": name, "arguments": arguments}
    return ToolCall(call_id, name, arguments, without_nulls(source))


def write_native_messages(turns: list[Turn]) -> list[Json]:
    """The reverse of `read_native_message`, also for blocks that `normalize_turns` added."""
    messages: list[Json] = []
    results = {b.id: b for turn in turns for b in turn.blocks if isinstance(b, ToolResult)}
    calls: list[ToolCall] = []  # of the last message
    texts: list[Block] = []  # of a user message

    def flush() -> None:
        if calls:
            written = [{**(call.source or {}), "id": call.id} for call in calls]
            messages[-1] = {**messages[-1], "tool_calls": written}
        for result in [results[call.id] for call in calls]:
            message = {**(result.source or {"role": "tool"}), "tool_call_id": result.id}
            messages.append({**message, "content": join_texts(result.blocks)})
        if texts:
            messages.append({"role": "user", "content": join_texts(texts)})
        calls.clear()
        texts.clear()

    for turn in turns:
        flush()
        for block in turn.blocks:
            if isinstance(block, ToolCall):
                calls.append(block)
            elif isinstance(block, Text):
                texts.append(block)
            elif isinstance(block, Native):
                flush()
                messages.append(block.source)
    flush()
    return messages


def adapt_chat_content(message: Json, model: Model, path: str) -> list[Json]:
    """Drops blank parts of a message's content; returns the images of a tool result."""
    role, content = message["role"], message.get("content")
    tool_images: list[Json] = []
    if content is not None and not isinstance(content, str):
        parts = [
            {key: value for key, value in part.items() if key != "cache_control"}
            for part_path, part, kind in read_native_parts(content, path)
            if kind != "text" or need_str(part, "text", part_path).strip()
        ]
        images = [part for part in parts if part["type"] == "image_url"]
        if role == "tool" and images:
            heading = text_part(f"Image from tool call {message.get('tool_call_id')}:")
            tool_images = [heading, *images]
            parts = [part for part in parts if part["type"] != "image_url"]
            parts = parts or [text_part("[image in next message]")]
        # Claude responds to its own earlier turn again if that is a list (seen in pi, 2026).
        is_string = role == "tool" or (role == "assistant" and not is_openai(model))
        content = message["content"] = text_of(parts) if is_string else parts
    if not (content.strip() if isinstance(content, str) else content):
        if role == "tool":
            message["content"] = NO_OUTPUT
        elif message.get("tool_calls"):
            message["content"] = None
        else:
            message.pop("content", None)
    return tool_images


def set_chat_cache_breakpoints(messages: list[Json], is_multi_turn: bool) -> None:
    """At most four cache breakpoints; if the client set none, like `add_cache_breakpoints`.

    They are set on entire messages (as seen in other gateways, 2026-08).
    """
    marked = [message for message in messages if "copilot_cache_control" in message]
    for message in marked[:-MAX_CACHE_BREAKPOINTS]:
        del message["copilot_cache_control"]
    if not marked and is_multi_turn:
        roles = [message["role"] for message in messages]
        system_count = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
        turns = [message for message in messages if message["role"] in ("user", "tool")]
        for message in (*messages[:system_count][-1:], *turns[-2:]):
            message["copilot_cache_control"] = {"type": "ephemeral"}


def join_neighbours(messages: list[Json]) -> list[Json]:
    """Merges consecutive messages of one role: Gemini refuses them."""
    groups: list[list[Json]] = []
    for message in messages:
        previous = groups[-1][-1] if groups else {}
        is_joinable = previous.get("role") == message["role"] != "tool"
        if is_joinable and {*previous, *message} <= {"role", "content"}:
            groups[-1].append(message)
        else:
            groups.append([message])
    joined = []
    for first, *others in groups:
        if others:
            contents = [message["content"] for message in (first, *others)]
            first = {**first, "content": [part for item in contents for part in as_parts(item)]}
            if all(isinstance(content, str) for content in contents):
                first["content"] = "\n\n".join(contents)
        joined.append(first)
    return joined


def adapt_chat_tools(draft: BodyDraft) -> None:
    body = draft.body
    count = len(list_field(body, "tools"))
    if count > MAX_TOOLS:
        problem = f"{count} are more than the {MAX_TOOLS} that Copilot accepts; disable some."
        raise UnsupportedFeature(f"tools: {problem}", param="tools")
    tools = []
    for path, tool in dict_items(body, "tools"):
        function = dict_field(tool, "function", path) or tool
        name = wire_name(need_str(function, "name", f"{path}.function"))
        schema = function.get("parameters", function.get("input_schema"))
        schema = object_schema(schema, f"{path}.function.parameters")
        schema = adapt_schema(schema, draft.model.vendor)
        entry = {"name": name, "description": function.get("description"), "parameters": schema}
        entry = {key: value for key, value in entry.items() if value}
        if function.get("strict") is True and is_openai(draft.model):
            entry["strict"] = True
        tools.append({"type": "function", "function": entry})
    has_calls = any(message.get("tool_calls") for message in body["messages"])
    if not tools and has_calls and not is_openai(draft.model):
        placeholder = {**PLACEHOLDER_TOOL, "parameters": EMPTY_SCHEMA}
        tools = [{"type": "function", "function": placeholder}]
    choice = body.get("tool_choice")
    function = get_dict(choice, "function") if isinstance(choice, dict) else {}
    if function:
        name = wire_name(need_str(function, "name", "tool_choice.function"))
        body["tool_choice"] = {"type": "function", "function": {"name": name}}
    draft.set_tools(tools)


def adapt_chat_reasoning(draft: BodyDraft) -> None:
    """Effort or a thinking budget as the model takes it, and what is refused beside them."""
    body, model = draft.body, draft.model
    effort = body.pop("reasoning_effort", None)
    level = clamp_effort(effort, model.efforts) if effort in EFFORTS else None
    if level:
        if level not in draft.rejections.get("effort", ()):
            body["reasoning_effort"] = level
    elif model.budget and effort in EFFORTS and effort != "none":
        limit = body.get("max_tokens") or DEFAULT_MAX_TOKENS
        budget = clamp_budget(EFFORT_BUDGETS[effort], model.budget, limit)
        if budget:
            body["thinking_budget"] = budget
    elif effort is not None and effort != "none":
        draft.dropped.append("reasoning_effort")
    is_reasoning = REASONING_GPT.match(model.id) and body.get("reasoning_effort") != "none"
    version = claude_version(model.id)
    if is_reasoning or (version or (0, 0)) >= (4, 7):
        draft.drop("temperature", "top_p")
    elif version and "temperature" in body:
        draft.drop("top_p")
    if REASONING_GPT.match(model.id):
        body.pop("stop", None)  # the gateway cuts instead


CHAT_RULES: tuple[Callable[[BodyDraft], None], ...] = (
    adapt_chat_fields, adapt_chat_messages, adapt_chat_reasoning, adapt_output, adapt_chat_tools,
    strip_rejected_fields,
)  # fmt: skip
CALL_ITEMS = ("function_call", "custom_tool_call", "tool_search_call", *CLIENT_CALLS)


def adapt_responses_fields(draft: BodyDraft) -> None:
    """Drops keys that Copilot refuses; nothing is stored, so reasoning has to come encrypted.

    Tools that Codex declares inside the conversation (seen in 0.169 for GPT-5.6, 2026-11) become
    ordinary ones.
    """
    refuse_state(draft.body)
    draft.drop_fields(RESPONSES_FIELDS)
    body = draft.body
    for index, item in enumerate(input_items(body)):
        path = f"input.{index}"
        if item_kind(item) == "item_reference":
            problem = "items are not stored here; send the item itself."
            code = "invalid_item_reference"
            raise InvalidRequest(f"{path}: {problem}", param=path, code=code)
        if not item_kind(item):
            raise InvalidRequest(f"{path}.type: is required.", param=f"{path}.type")
    body.update(store=False, include=[ENCRYPTED_REASONING])
    cache_key = body.get("prompt_cache_key")
    if isinstance(cache_key, str) and len(cache_key) > 64:
        body["prompt_cache_key"] = short_hash(cache_key, 64)
    if isinstance(body["input"], list):
        body["tools"] = all_tools(body)


def adapt_items(draft: BodyDraft) -> None:
    """Items without the ids that Copilot issues and then refuses, each call with its output."""
    if not isinstance(draft.body["input"], list):
        return
    turns: list[Turn] = []
    for index, item in enumerate(draft.body["input"]):
        adapted = adapt_item(without_nulls(item), f"input.{index}", draft.dropped)
        if adapted:
            add_turn(turns, read_native_item(adapted))
    items = write_native_items(normalize_turns(turns, MAX_NATIVE_ID_LENGTH))
    if not items:
        raise InvalidRequest("input: the conversation says nothing.", param="input")
    draft.body["input"] = [
        item
        for item, next_item in zip(items, [*items[1:], {}])  # noqa: B905 - of one length
        if item_kind(item) != "reasoning" or is_model_output(next_item)
    ]


def read_native_item(item: Json) -> Turn:
    """An item as it is, but for a tool's output: its text, and other parts, which move."""
    kind = item_kind(item)
    if kind in CALL_ITEMS:
        arguments = item.get("arguments", item.get("input"))
        text = arguments if isinstance(arguments, str) else dump_text(item)
        return Turn("assistant", [ToolCall(item["call_id"], get_text(item, "name"), text, item)])
    if not kind.endswith("_output"):
        role = "assistant" if kind == "reasoning" else get_text(item, "role")
        return Turn(role if role in ("user", "assistant") else "system", [Native(item)])
    output = item.get("output")
    text = dump_text(output) if isinstance(output, dict) else text_of(output)
    blocks: list[Block] = [Text(text)] if text.strip() else []
    for part in get_dicts(item, "output"):
        if part.get("type") not in ("input_text", "output_text"):
            is_image = part.get("type") == "input_image"
            detail = {"detail": part.get("detail") or "auto"} if is_image else {}
            blocks.append(Native({**part, **detail}))
    return Turn("user", [ToolResult(item["call_id"], blocks, source=item)])


def write_native_items(turns: list[Turn]) -> list[Json]:
    """The reverse of `read_native_item`: a run of calls, their outputs, a message with images."""
    items: list[Json] = []
    results = {b.id: b for turn in turns for b in turn.blocks if isinstance(b, ToolResult)}
    calls: list[ToolCall] = []  # without their outputs so far
    parts: list[Json] = []  # of a user message

    def flush() -> None:
        items.extend(write_native_output(call, results[call.id], parts) for call in calls)
        calls.clear()
        if parts:
            items.append({"type": "message", "role": "user", "content": [*parts]})
            parts.clear()

    for turn in turns:
        flush()
        for block in turn.blocks:
            source = getattr(block, "source", None) or {}
            if isinstance(block, ToolCall):
                items.append({**source, "call_id": block.id})
                calls.append(block)
            elif isinstance(block, (Text, Native)) and "role" not in source and turn.role == "user":
                parts.append(source or {"type": "input_text", "text": join_texts([block])})
            elif isinstance(block, Native):
                if item_kind(source) != "reasoning":
                    flush()
                items.append(source)
    flush()
    return items


def write_native_output(call: ToolCall, result: ToolResult, parts: list[Json]) -> Json:
    """A call's output as text; its images, which an output may not hold, are added to `parts`."""
    images = [inner.source for inner in result.blocks if isinstance(inner, Native)]
    if images:
        parts += [{"type": "input_text", "text": f"From tool call {call.id}:"}, *images]
    text = join_texts(result.blocks) or ("[in the next message]" if images else NO_OUTPUT)
    is_custom = item_kind(call.source or {}) == "custom_tool_call"
    kind = "custom_tool_call_output" if is_custom else "function_call_output"
    return {"type": kind, "call_id": call.id, "output": text}


def adapt_item(item: Json, path: str, dropped: list[str]) -> Json | None:
    """An item of `input`; None if Copilot would refuse it or nothing is left of it."""
    kind = item_kind(item)
    if kind in SERVER_TOOL_ITEMS:
        summary = server_tool_text(item)
        if not summary:
            dropped.append(f"input.{kind}")
            return None
        return {"type": "message", "role": "assistant", "content": f"[{kind}: {summary}]"}
    item.pop("id", None)
    if kind in CALL_ITEMS or kind.endswith("_output"):
        need_str(item, "call_id", path)
    if kind in ("function_call", "custom_tool_call"):
        item["name"] = wire_name(need_str(item, "name", path))
    if isinstance(item.get("namespace"), str):
        item["namespace"] = wire_name(item["namespace"])
    if kind == "function_call":
        value = item.get("arguments", "")
        item["arguments"] = complete_arguments(
            value if isinstance(value, str) else dump_text(value)
        )
    elif kind == "reasoning":
        if not is_native_signature(item.get("encrypted_content")):
            return None
        item["summary"] = item.get("summary") or []
        for key in ("content", "status"):
            item.pop(key, None)
    elif kind == "message":
        return adapt_message(item, f"{path}.content")
    return None if kind == "additional_tools" else item


RESPONSES_PARTS = ("input_text", "output_text", "refusal", "input_image", "input_file")


def adapt_message(item: Json, path: str) -> Json | None:
    """Drops empty text and fills in the detail of images; None if nothing is left."""
    content = item.get("content")
    if isinstance(content, str):
        return item if content.strip() else None
    if content is not None and not isinstance(content, list):
        raise wrong_type(path, "a string or a list of parts")
    parts: list[Json] = []
    for index, part in enumerate(content or ()):
        if isinstance(part, dict):
            part = without_nulls(part)
            reader = None if part.get("type") in RESPONSES_PARTS else part_reader(part)
            if reader or isinstance(part.get("image_url"), dict):  # chat's or Anthropic's
                for block in (reader or read_image_url_part)(part, f"{path}.{index}"):
                    is_output = isinstance(block, Text) and item.get("role") == "assistant"
                    output = {"type": "output_text", "text": join_texts([block])}
                    parts += [output] if is_output else write_input_parts(block)
                continue
            if part.get("type") == "input_image" and part.get("detail") not in ("low", "high"):
                part["detail"] = "auto"
            text = part.get("text", part.get("refusal"))
            if isinstance(text, str) and not text.strip():
                continue
        parts.append(part)
    return {**item, "content": parts} if parts else None


def is_model_output(item: Json) -> bool:
    """Whether an item may follow reasoning: it is part of the same model turn."""
    kind = item_kind(item)
    return kind in (*CALL_ITEMS, "reasoning") or item.get("role") == "assistant"


def adapt_responses_tools(draft: BodyDraft) -> None:
    body = draft.body
    tools: list[Json] = []
    server_tools: list[str] = []
    for path, tool in dict_items(body, "tools"):
        kind = need_str(tool, "type", path)
        if kind in ("function", "custom", "namespace"):
            tools.append(adapt_responses_tool(tool, path))
        else:
            server_tools.append(kind)
    choice = body.get("tool_choice")
    forced = ""
    if isinstance(choice, dict):
        kind = need_str(choice, "type", "tool_choice")
        forced = "" if kind in ("function", "custom", "allowed_tools") else kind
        body["tool_choice"] = adapt_responses_choice(choice, set(server_tools), "tool_choice")
    drop_server_tools(server_tools, len(tools), forced, draft.dropped)
    if forced:
        raise UnsupportedFeature(f"{forced} is not available on this model.", param="tools")
    draft.set_tools(tools)


def adapt_responses_choice(choice: Json, server_tools: set[str], path: str) -> Json:
    adapted = {**choice}
    name = str_field(choice, "name", path)
    if name:
        adapted["name"] = wire_name(name)
    if "tools" in choice:
        adapted["tools"] = [
            adapt_responses_choice(tool, server_tools, tool_path)
            for tool_path, tool in dict_items(choice, "tools", path)
            if str_field(tool, "type", tool_path) not in server_tools
        ]
    return adapted


def adapt_responses_tool(tool: Json, path: str) -> Json:
    name, kind = need_str(tool, "name", path), need_str(tool, "type", path)
    adapted = {**without_nulls(tool), "name": wire_name(name)}
    for key in ("defer_loading", "output_schema"):
        adapted.pop(key, None)
    if kind == "namespace":
        adapted["description"] = str_field(tool, "description", path) or name
        nested = dict_items(tool, "tools", path)
        adapted["tools"] = [adapt_responses_tool(item, item_path) for item_path, item in nested]
    elif kind == "function":
        schema = object_schema(tool.get("parameters"), f"{path}.parameters")
        adapted["parameters"] = adapt_schema(schema, "")
        adapted.setdefault("strict", False)
    return adapted


def adapt_responses_settings(draft: BodyDraft) -> None:
    body, model = draft.body, draft.model
    limit = int_field(body, "max_output_tokens")
    if limit is not None:
        body["max_output_tokens"] = max(16, min(limit, model.max_output or limit))
    reasoning = dict_field(body, "reasoning")
    effort = str_field(reasoning, "effort", "reasoning")
    adapted: Json = {}
    if effort in EFFORTS and model.efforts:
        adapted["effort"] = clamp_effort(effort, model.efforts)
    summary = reasoning.get("summary")
    # Models named "spark" have no summaries and refuse the request for one.
    if summary in ("auto", "concise", "detailed") and "spark" not in model.id:
        adapted["summary"] = "detailed" if summary == "detailed" else "auto"
    body["reasoning"] = without_nulls(adapted) or None
    if body.get("text") is not None:
        body["text"] = without_nulls(dict_field(body, "text"))
    if REASONING_GPT.match(model.id):
        draft.drop("temperature", "top_p")
    draft.body = without_nulls(body)


RESPONSES_RULES: tuple[Callable[[BodyDraft], None], ...] = (
    adapt_responses_fields, adapt_items, adapt_responses_tools, adapt_responses_settings,
    strip_rejected_fields,
)  # fmt: skip
RULES = {"chat": CHAT_RULES, "messages": MESSAGES_RULES, "responses": RESPONSES_RULES}


def sanitize_body(
    dialect: str, body: Json, model: Model, rejections: Rejections, streaming: bool
) -> BodyDraft:
    """A body as Copilot accepts it; raises InvalidRequest for what cannot be left out."""
    output = None if guarantees_output(dialect, model) else wanted_output(body, dialect)
    draft = BodyDraft(
        {**body, "model": model.id, "stream": streaming}, model, rejections, dialect, output
    )
    for rule in RULES[dialect]:
        rule(draft)
    return draft


def strip_reasoning(body: Json) -> bool:
    """Removes all replayed reasoning from a body; returns whether there was any."""
    items = body.get("input")
    if isinstance(items, list):
        body["input"] = [item for item in items if item_kind(item) != "reasoning"]
        return len(body["input"]) < len(items)
    removed = False
    for message in body.get("messages", ()):
        for key in ("reasoning_text", "reasoning_opaque"):
            removed = message.pop(key, None) is not None or removed
        content = message.get("content")
        if isinstance(content, list):
            remaining = [part for part in content if part.get("type") not in THINKING_PARTS]
            removed = removed or len(remaining) < len(content)
            message["content"] = remaining or [text_part("(thinking)")]
    return removed


EMBEDDINGS_FIELDS = field_table(
    {("keep", "keep"): "model input dimensions encoding_format", ("drop", "drop"): "* user"}
)


def read_embeddings(body: Json) -> tuple[list[str], bool]:
    """(texts, whether vectors are wanted in base64) of an embeddings request."""
    value = body.get("input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        problem = "must be a string or a list of strings; token arrays are not supported."
        raise InvalidRequest(f"input: {problem}", param="input")
    int_field(body, "dimensions")
    return texts, word_field(body, "encoding_format", ("float", "base64")) == "base64"


def write_embeddings(entries: list[Json], usage: Usage, is_packed: bool) -> Json:
    """An embeddings response, complete with the members that Copilot sometimes leaves out."""
    data = []
    for index, entry in enumerate(entries):
        vector = entry.get("embedding")
        if not isinstance(vector, (list, str)):
            raise UpstreamError("The upstream's response lacks an embedding.")
        if is_packed and isinstance(vector, list):
            try:
                packed = struct.pack(f"<{len(vector)}f", *vector)
            except (struct.error, OverflowError):
                raise UpstreamError("The upstream's embeddings are not numbers.") from None
            vector = base64.b64encode(packed).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    token_counts = {"prompt_tokens": usage.input, "total_tokens": usage.input}
    return {"object": "list", "data": data, "model": "", "usage": token_counts}


def with_effort(body: Json, dialect: str, effort: str) -> Json:
    """A native body with this effort, unless it asks for one itself."""
    if dialect == "chat":
        return {"reasoning_effort": effort, **body}
    if dialect == "responses":
        reasoning = get_dict(body, "reasoning")
        return {**body, "reasoning": {"summary": "auto", "effort": effort, **reasoning}}
    settings = get_dict(body, "output_config")
    if "thinking" in body or settings.get("effort"):
        return body
    return {
        **body,
        "thinking": {"type": "adaptive"},
        "output_config": {**settings, "effort": effort},
    }


class ReasoningMemory:
    """Reasoning of the upstream, by tool call: clients of other dialects have no field for it.

    Gemini refuses the turn after a tool call whose signature is missing.
    """

    def __init__(self, limit: int = REASONING_MEMORY_ENTRIES) -> None:
        self.limit = limit
        self.entries: dict[str, tuple[str, str]] = {}  #: call id -> (text, signature)

    def store(self, call_ids: Iterable[str], text: str, signature: str) -> None:
        for call_id in map(wire_id, call_ids):
            self.entries.pop(call_id, None)
            self.entries[call_id] = (text, signature)
        while len(self.entries) > self.limit:
            del self.entries[next(iter(self.entries))]

    def attach_items(self, body: Json) -> None:
        """Puts reasoning items back before the calls of a responses body that lack them."""
        if not isinstance(body["input"], list):
            return
        items: list[Json] = []
        has_reasoning = False  # reasoning, in the current model turn
        for item in body["input"]:
            entry = self.entries.get(wire_id(str(item.get("call_id"))))
            if entry and not has_reasoning and item_kind(item) == "function_call":
                reasoning = write_reasoning_item(*entry)
                items += [reasoning] if reasoning else []
                has_reasoning = reasoning is not None
            has_reasoning |= item_kind(item) == "reasoning"
            has_reasoning &= is_model_output(item)
            items.append(item)
        body["input"] = items

    def attach(self, body: Json) -> None:
        """Puts signatures back into the assistant messages of a chat body that lack them."""
        for message in body["messages"]:
            call_ids = [wire_id(str(call.get("id"))) for call in message.get("tool_calls") or ()]
            entries = [self.entries[call_id] for call_id in call_ids if call_id in self.entries]
            text, signature = entries[-1] if entries else ("", RESPONSES_ENVELOPE)
            if not message.get("reasoning_opaque") and not signature.startswith(RESPONSES_ENVELOPE):
                message["reasoning_opaque"] = signature
                message.update({"reasoning_text": text} if text else {})


@dataclass(slots=True)
class Call:
    """A request to a provider: a body in a dialect that the model speaks."""

    model: Model
    dialect: str
    body: Json
    request_info: RequestInfo
    betas: str = ""  #: the client's anthropic-beta header, if this is in its dialect
    #: names of omitted and of adapted parts; the provider adds to them
    dropped: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    #: how often it was sent, and the kinds of errors received; the provider adds to them
    attempts: int = 0
    refusals: list[str] = field(default_factory=list)
    sent: Json | None = None  #: the body last sent, if the provider's rules made one of their own
    received: ReceivedBody | None = None  #: the client's own body, if `body` is in its dialect

    def dump(self, body: Json) -> bytes:
        """`body` as JSON, with the client's own bytes where the rules have changed nothing."""
        return dump_json(body) if self.received is None else self.received.dump(body)


# Field of a client -> the setting of a Conversation that it asks for.
FIELD_SETTINGS = {
    "max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens",
    "text": "verbosity", "output_config": "thinking", "reasoning": "thinking",
    "reasoning_effort": "thinking",
}  # fmt: skip
CHAT_PARTS = ("text", "image_url", "refusal")
FILE_PARTS = {"file", "document", "input_file"}


def foreign_parts(body: Json, dialect: str) -> set[str]:
    """The types of the parts of a checked chat body that no chat upstream knows."""
    if dialect != "chat":
        return set()
    kinds = {str(part.get("type")) for part in parts_of(body["messages"])}
    return kinds.difference(CHAT_PARTS)


def read_conversation(
    body: Json,
    client_dialect: Dialect,
    upstream_dialect: UpstreamDialect,
    context: ResponseContext,
) -> Conversation | None:
    """The request in the form of all dialects; None if it is sent in the client's own."""
    has_functions = "functions" in body and "tools" not in body
    context.legacy_functions = client_dialect is CHAT and has_functions
    context.rewritten = bool(foreign_parts(body, client_dialect.name)) or (
        client_dialect is RESPONSES and searches_tools(body)
    )
    if upstream_dialect is client_dialect and not (context.legacy_functions or context.rewritten):
        return None
    return client_dialect.read_request(body)


def write_call(
    body: Json,
    conversation: Conversation | None,
    upstream_dialect: UpstreamDialect,
    model: Model,
    context: ResponseContext,
    request_info: RequestInfo,
) -> Call:
    """The upstream's body: `conversation` written, or without one the client's own body."""
    effort = implied_effort(request_info.model, model)
    dialect = upstream_dialect.name
    if not guarantees_output(dialect, model):
        context.output = conversation.output if conversation else wanted_output(body, dialect)
    if conversation is None:
        received = body if isinstance(body, ReceivedBody) else None
        body = with_effort(body, upstream_dialect.name, effort) if effort else body
        names = wire_names(tool_names(body))
        context.names = {wire: name for wire, name in names.items() if wire != name}
        context.multiple_choices = upstream_dialect is CHAT and (int_field(body, "n") or 1) > 1
        key = STOP_FIELDS.get(upstream_dialect.name, "")
        if body.get(key):
            stops, context.stop_strings = split_stops(
                read_stops(body, key), upstream_dialect.name, model
            )
            if context.stop_strings:
                body = {**body, key: stops or None}
        return Call(model, upstream_dialect.name, body, request_info, received=received)
    if conversation.effort is None and conversation.thinking_budget is None:
        conversation.effort = effort
    conversation.stop, context.stop_strings = split_stops(
        conversation.stop, upstream_dialect.name, model
    )
    context.names = conversation.client_names()
    context.tools = {tool.name: tool for tool in conversation.tools}
    display = get_dict(body, "thinking").get("display")
    summary = get_dict(body, "reasoning").get("summary")
    context.hide_thinking = display == "omitted" or summary == "none"
    upstream_body = upstream_dialect.write_request(conversation, model)
    if upstream_dialect is MESSAGES:
        add_cache_breakpoints(upstream_body)
    wants_thinking = (conversation.effort or "none") != "none" or conversation.thinking_budget
    if upstream_dialect in (MESSAGES, RESPONSES) and wants_thinking:  # other rules report it
        is_written = upstream_body.keys() & {"thinking", "reasoning"}
        conversation.dropped += [] if is_written else ["thinking"]
    asked_as = {FIELD_SETTINGS[name]: name for name in FIELD_SETTINGS if body.get(name)}
    asked_as |= {name: name for name in conversation.dropped if name in body}
    context.tagged_thinking = conversation.tagged_thinking
    return Call(
        model,
        upstream_dialect.name,
        upstream_body,
        request_info,
        dropped=[asked_as.get(name, name) for name in conversation.dropped],
        touched=conversation.touched,
    )


# 9.4 error responses, tokens, quotas


def unwrap_error(value: Any, depth: int = 3) -> tuple[str, str]:
    """(message, code) of an error body in any shape; JSON nested in messages is unwrapped."""
    if isinstance(value, str):
        nested = load_object(value) if depth and value.lstrip().startswith("{") else None
        return unwrap_error(nested, depth - 1) if nested else (value, "")
    if not isinstance(value, dict):
        return "", ""
    message, code = "", value.get("code") or value.get("type")
    key = next((key for key in ("error", "message", "error_details") if value.get(key)), "")
    if key:
        message, nested_code = unwrap_error(value[key], depth)
        code = nested_code or code
    return message, code.partition(":")[0] if isinstance(code, str) else ""


def read_error_response(status: int, data: bytes) -> tuple[str, str]:
    """(message, code) of an error response of any type, redacted, and cut before any search."""
    text = data.decode("utf-8", "replace").strip()
    value = load_object(text) if text.startswith("{") else None
    if value is not None:
        message, code = unwrap_error(value)
        return redact(message, MAX_REFUSAL_TEXT), redact(code, MAX_CODE_TEXT)
    if "<html" in text[:2000].lower() or text[:9].lower() == "<!doctype":
        return f"the upstream returned HTML, status {status}", ""
    return redact(text, MAX_REFUSAL_TEXT), ""


def read_time(value: Any) -> float:
    """Unix seconds from seconds, milliseconds or ISO 8601 (UTC by default); otherwise 0."""
    if isinstance(value, str):
        try:
            moment = dt.datetime.fromisoformat(value)
        except ValueError:
            return 0.0
        moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)
        return read_figure(moment.timestamp(), 0, MAX_UNIX_SECONDS) or 0.0
    timestamp = read_figure(value, 0, MAX_UNIX_SECONDS * 1000) or 0.0
    return timestamp if timestamp < MAX_UNIX_SECONDS else timestamp / 1000


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds in a Retry-After field: a number or an HTTP date; `now` is Unix time."""
    if value is None:
        return None
    # RFC 9110 section 10.2.3 does not allow fractions; services send them.
    if re.fullmatch(r"[0-9]{1,19}(?:\.[0-9]{1,9})?", value):
        return min(float(value), MAX_RESET_SECONDS)
    try:
        retry_at = email.utils.parsedate_to_datetime(value[:100]).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return min(max(0.0, retry_at - now), MAX_RESET_SECONDS)


# "Please try again in 51 hours" (github/copilot-cli#2769), "resets in 2 hours and 5 minutes".
WAIT_TEXT = re.compile(
    r"(?:again|resets?|available)\s+(?:in|after)\s+(?:about\s+)?"
    r"((?:\d+(?:\.\d+)?\s*(?:s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?|d|days?)\b[\s,and]*)+)",
    re.IGNORECASE,
)
WAIT_PART = re.compile(r"(?<!\d)(\d+(?:\.\d+)?)\s*([smhd])", re.IGNORECASE)
WAIT_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# As in "resets at 2026-12-01T00:00:00Z" and "try again after 2026-12-01".
RESET_TEXT = re.compile(
    r"(?:again|resets?|available)\s+(?:at|on|after)\s+"
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?))?",
    re.IGNORECASE,
)


def read_wait(headers: Headers, message: str, now: float) -> float | None:
    """Seconds to wait, from the Retry-After field or the message, whose times are in UTC."""
    retry_after = parse_retry_after(headers.get("retry-after"), now)
    if retry_after is not None:
        return retry_after
    wait_match, reset_match = WAIT_TEXT.search(message), RESET_TEXT.search(message)
    if wait_match:
        parts = WAIT_PART.findall(wait_match[1])
        wait_s = sum(float(amount) * WAIT_UNITS[unit.lower()] for amount, unit in parts)
    elif reset_match and (reset_at := read_time("T".join(reset_match.groups("00:00")))):
        wait_s = reset_at - now
    else:
        return None
    return min(max(0.0, wait_s), MAX_RESET_SECONDS)


def classify(
    faults: Iterable[Fault], status: int, code: str, message: str, **facts: str
) -> RetryDecision:
    """Classifies an error response; the last row of each table fits everything.

    The texts may name the `facts`, {status}, {message}, {reason} and {detail}: ": message." or ".".
    """
    subject = f"{status} {code}: {message}"
    context_error = read_context_error(subject) if status in (400, 413) else None
    if context_error:
        return RetryDecision(context_error)
    fault = next(fault for fault in faults if re.search(fault.pattern, subject))
    text = fault.text.format(
        status=status,
        message=message,
        reason=message or code or "no reason given",
        detail=f": {message.strip(' .')}." if message else ".",
        **facts,
    )
    error = fault.error(text, hint=fault.hint, param=fault.param)
    if fault.text == "{message}":  # it is the upstream's own, and so are its code and field
        error.code, error.param = code or None, facts.get("param") or None
    return RetryDecision(error, fault.action)


def with_wait(decision: RetryDecision, wait_s: float | None, *actions: str) -> RetryDecision:
    """The decision with the wait that the service asks for, where its action is one of these."""
    if wait_s is not None and decision.action in actions:
        decision.wait_s = decision.error.retry_after = wait_s
    return decision


def request_note(headers: Headers, service: str, name: str) -> str:
    request_id = headers.get(name, "")
    is_plain = re.fullmatch(r"[A-Za-z0-9_:.-]{1,100}", request_id)
    return f" ({service} request {request_id})" if is_plain else ""


COPILOT_FAULTS = (
    Fault(r"(?is)^40[01] .*\b(?:authorization\b.{0,40}(?:format|malformed|invalid|scheme)"
          r"|(?:malformed|invalid|unsupported) (?:\w+ )?authorization)", NotSignedIn,
          "Copilot refused the token: {message}.", "switch"),
    Fault(r"(?is)^400 .*Personal Access Tokens? (?:is|are) not supported", Forbidden,
          "Copilot refused this kind of token: {message}.", "",
          "Set the provider's integration_id to an id that GitHub allows for such tokens."),
    Fault(r"(?s)^(?:401|403|421) .*Personal Access Token", NotSignedIn,
          "Copilot refused the token: {message}.", "",
          "It needs the permission Copilot Requests: github.com/settings/personal-access-tokens"),
    Fault(r"^401 ", NotSignedIn, "Copilot refused the token.{tail}", "refresh"),
    Fault(r"^(?:403|421) [^:]*: \Z", Forbidden,
          "Copilot does not allow this: {status}{tail}.", "refresh"),
    Fault(r"^(?:403|421) ", Forbidden, "Copilot does not allow this: {message}{tail}.", "refresh"),
    # Only the model cools down: on older plans the models without a price still work (facts, 8.4).
    Fault(r"^402 ", QuotaExceeded, "Your Copilot quota is used up: {reason}.{tail}", "cool_down"),
    Fault(r"^404 ", ModelNotFound, "Copilot does not serve {model}.", "",
          "Its policy may need to be accepted at github.com/settings/copilot."),
    Fault(r"^413 ", BodyTooLarge, "The request is too large for Copilot."),
    Fault(r"^422 ", InvalidRequest, "Refused by the upstream's content filter: {message}"),
    Fault(r"^429 ", RateLimited, "Copilot's rate limit: {reason}.{tail}", "pause"),
    Fault(r"^466 ", UpstreamError, "Copilot refused this client's version: {message}", "",
          "Update aiclient-api: its editor version is too old for GitHub."),
    Fault(r"^(?:503|529) ", Overloaded, "Copilot is busy.{tail}", "pause"),
    Fault(r"^(?:408|504) ", UpstreamTimeout, "Copilot timed out.{tail}", "retry_once"),
    Fault(r"^(?:499|[5-9]..) ", UpstreamError, "Copilot failed with status {status}.{tail}",
          "wait"),
    Fault(r"^(?!400 )", UpstreamError, "Copilot responded with status {status}: {message}{tail}"),
    Fault(r"^400 model_not_supported:|(?i:requested model is not supported)", ModelNotFound,
          "Copilot does not offer {model} to this account. Free and Student plans: {auto} only.",
          "relist",
          "It may need to be enabled at github.com/settings/copilot.", "model"),
    Fault(r"(?i)^400 (?:unsupported_api_for_model:|[^:]*: (?:The requested )?model "
          r'"?[\w.:/-]{1,200}"? is not accessible via the /)', InvalidRequest,
          "{model} is not served in a dialect this gateway speaks yet.", "reroute", "", "model"),
    Fault(r"^400 [^:]*: \Z", InvalidRequest,
          "The upstream refused the request without a reason.", "retry_once"),
    # Usually replayed reasoning, in the words of Anthropic, OpenAI, Gemini and Copilot.
    Fault(r"^400 (?:invalid_request_body|invalid_encrypted_content):"
          r"|(?i:(?:invalid|corrupted|missing an?) [`'\"]?(?:thought[ _])?signature\b"
          r"|\bthought[ _]signature (?:is )?(?:not valid|invalid|missing)"
          r"|`?thinking`? .{0,60}blocks.{0,60} cannot be modified"
          r"|encrypted[ _]content\b.{0,80} (?:could not be|cannot be) (?:verified|decrypted|parsed)"
          r"|(?:bound|belongs?) to a different conversation|does not belong to this connection)",
          InvalidRequest, "{message}", "forget"),
    Fault(r"(?i)copilot-vision-request", InvalidRequest, "{message}", "",
          "Images may be switched off by your organisation's editor preview features policy."),
    Fault(r"", InvalidRequest, "{message}"),
)  # fmt: skip


def classify_copilot_error(
    status: int,
    headers: Headers,
    data: bytes,
    model: Model,
    sent: Json,
    rejections: Rejections,
    now: float,
    sent_betas: Collection[str] = (),
) -> RetryDecision:
    """Classifies a response of the model service; `rejections` were applied to `sent`."""
    message, code = read_error_response(status, data)
    tail = request_note(headers, "GitHub", "x-github-request-id")
    if status in (401, 403, 421) and b'"authorize_url"' in data:  # for a third-party agent
        return RetryDecision(Forbidden(f"Copilot wants another authorization: {message}.{tail}"))
    param = get_text(get_dict(load_object(data) or {}, "error"), "param")[:MAX_CODE_TEXT]
    facts = {"model": model.id, "auto": f"{model.provider}/{AUTO_MODEL}", "tail": tail}
    decision = classify(COPILOT_FAULTS, status, code, message, param=param, **facts)
    is_plain_400 = status == 400 and type(decision.error) is InvalidRequest
    if is_plain_400 and decision.action in ("", "forget"):
        decision.rejections = read_rejections(message, code, sent, rejections, sent_betas)
        decision.action = "repair" if decision.rejections else decision.action
    account_limits = r"(?:user_global|user_weekly|integration)_rate_limited"
    decision.account_wide = status == 429 and re.fullmatch(account_limits, code) is not None
    return with_wait(decision, read_wait(headers, message, now), "pause", "cool_down")


BETA_REFUSED = re.compile(r"Unexpected value\(s\) (.{1,4000}?) for the `?anthropic-beta`? header")
# Matched at the start of a message only: what follows may quote the client.
REFUSAL_OPENING = r"(?:(?:invalid_\w{1,40}|messages\.\d{1,9}): )?"
EFFORT_REFUSED = re.compile(
    REFUSAL_OPENING + r"(?:Un(?:supported|known|recognized) [\w ]{1,40}: )?"
    r"[\"'`]?(?:reasoning_effort|output_config\.effort)\b"
)
THINKING_REFUSED = re.compile(REFUSAL_OPENING + r"[\"'`]?thinking\.type\.enabled\b")
SYSTEM_REFUSED = re.compile(
    REFUSAL_OPENING + r"""(?:Unexpected role "system"|role 'system' is not supported)"""
)
FORMAT_REFUSED = re.compile(REFUSAL_OPENING + r"(?:FAILED_PRECONDITION|output_config\.format)\b")
CHOICE_REFUSED = re.compile(r".{0,80}?\btool_choice\b")
EXTRA_FIELD = re.compile(r"(?<![^\s,;])([\w.-]{1,300}): Extra inputs are not permitted")
# OpenAI's words for the same, with paths like `tools[0].strict`.
UNKNOWN_FIELD = re.compile(
    REFUSAL_OPENING + r"(?:Unknown|Unsupported) parameter: '([\w.\[\]-]{1,300})'"
)
KNOWN_FIELDS = frozenset((*CHAT_FIELDS, *MESSAGES_FIELDS, *RESPONSES_FIELDS))
# Losing one of these would change what the client asked for: at the top level of a body, in an
# object of a type that has it, and in any other object.
BODY_KEYS = frozenset((
    "input", "instructions", "max_tokens", "messages", "model", "output_format",
    "response_format", "stream", "system", "tool_choice", "tools",
))  # fmt: skip
TYPED_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("text", "format"), "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",), "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id", "content", "is_error"), "image": ("source",),
    "document": ("source",), "custom": ("name", "description", "input_schema"),
    "function": ("name", "description", "parameters", "arguments", "function"),
}  # fmt: skip
NESTED_KEYS = frozenset(key for keys in TYPED_KEYS.values() for key in keys) | frozenset((
    "arguments", "budget_tokens", "call_id", "encrypted_content", "file", "format", "image_url",
    "json_schema", "media_type", "output", "role", "schema", "summary", "tool_call_id",
    "tool_calls", "type", "url", "*",
))  # fmt: skip
# Anything below one of these keys is the client's own data.
CLIENT_DATA = frozenset(("input_schema", "parameters", "arguments", "input", "schema"))


def read_rejections(
    message: str, code: str, sent: Json, known: Rejections, sent_betas: Collection[str] = ()
) -> list[tuple[str, str]]:
    """What a refusal rejects, as (kind, name): only what was sent, without what is known."""
    output_format = get_dict(get_dict(sent, "output_config"), "format")
    if output_format and (code == "FAILED_PRECONDITION" or FORMAT_REFUSED.match(message)):
        return [("output", "field")]
    if CHOICE_REFUSED.match(message) and OUTPUT_TOOL in tool_names(sent):
        return [("output", "tool")]
    paths = rejected_paths(message)
    if code == "invalid_request_body":  # names nothing: what the upstream may not know is suspect
        paths += [
            key for key in sorted(sent.keys() - KNOWN_FIELDS) if re.fullmatch(r"\w{1,64}", key)
        ]
    if paths:
        known_paths = known.get("field", ())
        return [("field", path) for path in paths if path not in known_paths]
    if THINKING_REFUSED.match(message) and get_dict(sent, "thinking").get("type") == "enabled":
        return [("thinking", "enabled")]
    if code == "invalid_reasoning_effort" or EFFORT_REFUSED.match(message):
        effort = get_dict(sent, "output_config").get("effort") or sent.get("reasoning_effort")
        return [("effort", effort)] if isinstance(effort, str) else []
    if SYSTEM_REFUSED.match(message):
        roles = [get_dict({"": turn}, "").get("role") for turn in sent.get("messages", ())]
        return [("system", "turns")] if "system" in roles else []
    betas = BETA_REFUSED.match(message)
    names = BETA.findall(betas[1]) if betas else []
    return [("beta", name) for name in names if name in sent_betas]


def rejected_paths(message: str) -> list[str]:
    """`tools.0.custom.strict` -> `tools.*.custom.strict`, for fields the request can do without."""
    paths = []
    unknown = UNKNOWN_FIELD.match(message)
    names = (
        [unknown[1].replace("[", ".").replace("]", "")] if unknown else EXTRA_FIELD.findall(message)
    )
    for name in names:
        steps = ["*" if step.isdecimal() else step for step in name.split(".")]
        *parents, last = steps
        needed = TYPED_KEYS.get(parents[-1], NESTED_KEYS) if parents else BODY_KEYS
        is_client_data = len(steps) > MAX_REJECTION_STEPS or CLIENT_DATA & set(parents[1:])
        if last not in needed and not is_client_data:
            paths.append(".".join(steps))
    return paths


FINAL_NOTICES = {
    "no_copilot_access": "this account has no Copilot",
    "not_signed_up": "this account has not signed up for Copilot",
    "subscription_ended": "the Copilot subscription has ended",
    "billing_locked": "billing is locked",
    "access_revoked": "access was revoked",
    "programmatic_token_generation": "GitHub has blocked automated use by this account",
}
EXCHANGE_FAULTS = (
    Fault(r"^401 ", NotSignedIn, "GitHub no longer accepts the token."),
    Fault(r"^403 ", RateLimited, "GitHub's rate limit for token exchanges.", "wait"),
    Fault(r"^404 ", NotSignedIn, "GitHub does not exchange this token for a Copilot token."),
    Fault(r"^(?:429|[5-9]..) ", Overloaded, "GitHub's token exchange failed, status {status}.",
          "wait"),
    Fault(r"", UpstreamError, "GitHub's token exchange responded with status {status}."),
)  # fmt: skip


def classify_exchange_error(
    status: int, headers: Headers, data: bytes, now: float
) -> RetryDecision:
    """Classifies a failed token exchange: `wait` if it is temporary."""
    message, code = read_error_response(status, data)
    if status != 403 or "rate limit" in message.lower():
        wait_s = parse_retry_after(headers.get("retry-after"), now)
        return with_wait(classify(EXCHANGE_FAULTS, status, code, message), wait_s, "wait")
    envelope = get_dict(load_object(data) or {}, "error_details")
    notice_id, detail, url = (envelope.get(k) for k in ("notification_id", "message", "url"))
    reason = FINAL_NOTICES.get(str(notice_id)) or (detail if isinstance(detail, str) else message)
    hint = "GitHub decides this: see https://github.com/settings/copilot."
    if isinstance(url, str) and url.startswith(f"{GITHUB_URL}/"):
        hint = f"See {redact(url, 300)}"
    error = NotEntitled(f"GitHub refuses Copilot: {redact(reason, 300) or 'no reason'}.", hint=hint)
    return RetryDecision(error, "wait" if notice_id == "server_error" else "")


def camel(name: str) -> str:
    """`refresh_token` -> `refreshToken`."""
    first, *following = name.split("_")
    return first + "".join(word.capitalize() for word in following)


def either(body: Json, name: str) -> Any:
    """The value at `name`, in snake_case as GitHub spells it or in camelCase as AWS does."""
    return body.get(name, body.get(camel(name)))


def get_token(body: Json, name: str) -> str:
    """The text at `name`, in either spelling, if it fits into a header; otherwise ""."""
    value = either(body, name)
    return value if isinstance(value, str) and TARGET.fullmatch(value) else ""


@dataclass(slots=True)
class CopilotToken:
    access_token: str = field(repr=False)
    api_url: str
    expires_at: float  #: Unix seconds
    refresh_in: float  #: seconds from now until it should be refreshed
    scheme: str = ""  #: of the Authorization field

    def __post_init__(self) -> None:
        host = urllib.parse.urlsplit(self.api_url).netloc
        self.scheme = self.scheme or copilot_scheme(self.access_token, host)

    @property
    def is_direct(self) -> bool:
        """Whether it is the GitHub token itself."""
        return self.access_token.startswith(DIRECT_TOKENS)

    @property
    def margin_s(self) -> float:
        """Seconds before expiry from which it is too old for a new request."""
        return min(COPILOT_REFRESH_MARGIN_SECONDS, COPILOT_REFRESH_MARGIN_SHARE * self.refresh_in)


def copilot_api_url(body: Json, config: CopilotConfig, default: str) -> str:
    """As configured, as named by `endpoints.api`, the tenant's, or `default`.

    Raises UpstreamError for a host that is not Copilot's.
    """
    named_url = get_dict(body, "endpoints").get("api")
    if config.api_url:
        return config.api_url.rstrip("/")
    if isinstance(named_url, str) and named_url:
        if not allowed_api_host(named_url, config):
            raise UpstreamError("GitHub's response names a host that is not Copilot's.")
        return named_url.rstrip("/")
    host = urllib.parse.urlsplit(config.github_api_url).hostname or ""
    is_tenant = host.endswith(".ghe.com")
    return f"https://copilot-api.{host.removeprefix('api.')}" if is_tenant else default


def read_token_response(body: Json, config: CopilotConfig, now: float) -> CopilotToken:
    """Parses a token response; only `token` is required.  Raises UpstreamError."""
    token = get_token(body, "token")
    if not token:
        raise UpstreamError("GitHub's token response contains no usable token.")
    named_life = positive_int(body.get("refresh_in")) or COPILOT_DEFAULT_LIFE_SECONDS
    lifetime = min(named_life, MAX_TOKEN_SECONDS)
    # As in VS Code: the response's `expires_at` is of little use if the local clock is wrong.
    expires_at = now + lifetime + COPILOT_REFRESH_EARLY_SECONDS
    url = copilot_api_url(body, config, COPILOT_HOSTS[config.account_type])
    return CopilotToken(token, url, expires_at, lifetime)


def direct_token(github_token: str, user: Json, config: CopilotConfig, now: float) -> CopilotToken:
    """`user`, GitHub's account response, names an organisation's host; raises UpstreamError."""
    url = copilot_api_url(user, config, COPILOT_ANY_HOST)
    return CopilotToken(github_token, url, now + COPILOT_DIRECT_SECONDS, COPILOT_DIRECT_SECONDS)


@dataclass(slots=True)
class Allowance:
    """The limit and use of one kind of request; None = unknown, `limit` inf = unlimited."""

    name: str
    used: float | None
    limit: float | None
    remaining: float | None
    unit: str = ""  #: the counted unit, in the plural; "" = unknown
    percent_left: float | None = None  #: as reported by the service
    resets_at: float = 0.0  #: Unix seconds; 0 = unknown, or the plan's date
    overage_permitted: bool | None = None  #: whether use beyond the limit is allowed, and billed
    overage_used: float | None = None
    overage_limit: float | None = None
    #: if there are several, such as a trial: `{"name", "used", "limit", "ends_at"}`
    parts: list[Json] = field(default_factory=list)

    @property
    def percent_used(self) -> float | None:
        """None if unlimited or unknown; may exceed 100.  A limit of 0 is never used up."""
        percent_left = self.percent_left
        if self.used is not None and self.limit:
            percent_left = 100 - 100 * self.used / self.limit
        if self.limit == math.inf or percent_left is None:
            return None
        return min(max(100 - percent_left, 0.0), MAX_PERCENT_USED)

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left, and use beyond the limit is not allowed."""
        return bool(self.limit and (self.used or 0.0) >= self.limit and not self.overage_permitted)

    def as_json(self, resets_at: float) -> Json:
        """`{"name", "used", "limit", ...}`; `resets_at` is the plan's."""
        percent, is_unlimited = self.percent_used, self.limit == math.inf
        row: Json = {
            "name": self.name,
            "used": self.used,
            "limit": None if is_unlimited else self.limit,
            "remaining": self.remaining,
            "unlimited": is_unlimited,
            "unit": self.unit or None,
            "percent_used": None if percent is None else round(percent, 2),
            "resets_at": self.resets_at or resets_at or None,
            "overage_permitted": self.overage_permitted,
            "overage_used": self.overage_used,
            "overage_limit": self.overage_limit,
        }
        return {**row, "parts": self.parts} if self.parts else row


@dataclass(slots=True)
class Quota:
    account: str
    plan: str
    allowances: list[Allowance]
    resets_at: float  #: Unix seconds; 0 = unknown
    as_of: float = 0.0  #: Unix seconds when the service reported it; 0 = unknown

    def as_json(self) -> Json:
        """`{"account", "plan", "resets_at", "allowances": [{"name", "used", ...}], "as_of"}`."""
        row: Json = {
            "account": self.account or None,
            "plan": self.plan or None,
            "resets_at": self.resets_at or None,
            "allowances": [allowance.as_json(self.resets_at) for allowance in self.allowances],
        }
        return {**row, "as_of": round(self.as_of, 3)} if self.as_of else row


#: "premium_models" is another name for the same allowance (VS Code, 2026-08)
ALLOWANCE_NAMES = {"premium_models": "premium_interactions"}
ALLOWANCE_UNITS = {"chat": "messages", "completions": "completions"}


def parse_number(value: Any) -> float | None:
    """Like `read_figure`, but also accepts a number in a string."""
    if isinstance(value, str):
        return float(value) if re.fullmatch(r"-?[0-9]{1,12}(?:\.[0-9]{1,20})?", value) else None
    return read_figure(value)


def read_flag(value: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower())


def read_allowance(name: str, row: Json, by_tokens: bool | None = None) -> Allowance | None:
    """None if the account has no such allowance.  `by_tokens`: its `token_based_billing`."""

    def number(key: str) -> float | None:
        return parse_number(row.get(key))

    limit, percent_left = number("entitlement"), number("percent_remaining")
    remaining = number("quota_remaining")
    if remaining is None:
        remaining = number("remaining")
    if row.get("unlimited") is True or limit == -1:
        limit, percent_left, remaining = math.inf, None, None
    elif limit is None:
        is_unknown = remaining is None and percent_left is None
        if is_unknown or row.get("has_quota") is False:
            return None
    elif limit <= 0:  # an empty bucket is not "used up"
        return None
    elif remaining is None and percent_left is not None:
        remaining = limit * percent_left / 100
    elif remaining is None and (credits_used := number("credits_used")) is not None:
        remaining = limit - credits_used
    # Business seats billed by tokens have no limit, but their use is counted (2026-11).
    used = number("credits_used") if limit == math.inf else None
    own_billing = read_flag(row.get("token_based_billing"))
    by_tokens = by_tokens if own_billing is None else own_billing
    unit = ALLOWANCE_UNITS.get(name, "")
    if by_tokens and used is not None:
        unit = "credits"
    elif name == "premium_interactions" and by_tokens is not None:
        # GitHub counts credits since June 2026, premium requests still in some contracts.
        unit = "credits" if by_tokens else "premium requests"
    return Allowance(
        name,
        used if remaining is None or limit is None else max(0.0, limit - remaining),
        limit,
        None if remaining is None else max(0.0, remaining),
        unit,
        percent_left,
        max(0.0, read_time(row.get("quota_reset_at") or row.get("reset_date"))),
        read_flag(row.get("overage_permitted")),
        number("overage_count"),
        number("overage_entitlement"),
    )


def read_copilot_quota(body: Json) -> Quota:
    """GitHub's `copilot_internal/user`; older free plans have a format of their own."""
    snapshots = [*get_dict(body, "quota_snapshots").items()][:MAX_ALLOWANCES]
    rows = {name: row for name, row in snapshots if isinstance(row, dict)}
    if not rows:
        monthly, remaining = get_dict(body, "monthly_quotas"), get_dict(body, "limited_user_quotas")
        rows = {
            name: {"entitlement": monthly.get(name), "remaining": remaining.get(name)}
            for name in [*dict.fromkeys([*monthly, *remaining])][:MAX_ALLOWANCES]
        }
    by_tokens = read_flag(body.get("token_based_billing"))
    allowances = {}
    for key, row in rows.items():
        name = ALLOWANCE_NAMES.get(key, key)[:MAX_NAME_CHARS]
        allowances[name] = read_allowance(name, row, by_tokens)
    date_keys = ("quota_reset_date_utc", "quota_reset_date", "limited_user_reset_date")
    is_free = "free_limited" in get_str(body, "access_type_sku")  # whatever `copilot_plan` is
    return Quota(
        get_name(body, "login"),
        "free" if is_free else get_name(body, "copilot_plan"),
        [allowance for allowance in allowances.values() if allowance is not None],
        next(filter(None, (read_time(body.get(key)) for key in date_keys)), 0.0),
    )


# Copilot's successful responses report the quota in header fields (seen in VS Code, gh-aw-firewall
# and Floway, 2026-08): `x-quota-snapshot-BUCKET: ent=1500&ov=0.0&ovPerm=true&rem=80.7&rst=...`.
SNAPSHOT_PREFIX, WINDOW_PREFIX = "x-quota-snapshot-", "x-usage-ratelimit-"
SNAPSHOT_KEYS = {
    "ent": "entitlement", "rem": "percent_remaining", "totRem": "quota_remaining",
    "ov": "overage_count", "ovPerm": "overage_permitted", "rst": "reset_date",
}  # fmt: skip


def quota_fields(headers: Headers) -> dict[str, str]:
    prefixes = (SNAPSHOT_PREFIX, WINDOW_PREFIX)
    return {name: text for name, text in headers.items() if name.startswith(prefixes)}


def read_snapshot(text: str) -> Json | None:
    """A quota field as a row for `read_allowance`; None if it has another format."""
    try:
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        return None
    row = {SNAPSHOT_KEYS[key]: value for key, value in pairs if key in SNAPSHOT_KEYS}
    others = ("overage_permitted", "reset_date")
    figures = {key: parse_number(value) for key, value in row.items() if key not in others}
    limit, remaining = figures.get("entitlement"), figures.get("quota_remaining")
    if None in figures.values() or "percent_remaining" not in row or limit is None or limit < -1:
        return None
    return {**row, "quota_remaining": None} if remaining is not None and remaining < 0 else row


def apply_quota_headers(known: Quota | None, headers: dict[str, str], now: float) -> Quota:
    """The quota updated from header fields: missing and malformed ones leave known values alone.

    The plan's reset date comes from its own buckets, not from a rolling window.
    """
    known = known or Quota("", "", [], 0.0)
    allowances = {allowance.name: allowance for allowance in known.allowances}
    plan_resets_at = 0.0
    for key, text in headers.items():
        name = key.removeprefix(SNAPSHOT_PREFIX).removeprefix(WINDOW_PREFIX)
        name, row = ALLOWANCE_NAMES.get(name, name), read_snapshot(text)
        if row is None:
            continue
        allowance, previous = read_allowance(name, row), allowances.get(name)
        if allowance is None:  # no longer part of the plan, unless it has no limit to tell
            if not (previous and previous.limit == math.inf and previous.used):
                allowances.pop(name, None)
            continue
        if WINDOW_PREFIX + name not in headers:
            plan_resets_at = max(plan_resets_at, allowance.resets_at)
        if previous is not None:
            previous_resets_at = previous.resets_at if previous.resets_at > now else 0.0
            allowance.unit = allowance.unit or previous.unit
            allowance.resets_at = allowance.resets_at or previous_resets_at
            allowance.overage_limit = previous.overage_limit
            allowance.used = previous.used if allowance.used is None else allowance.used
        if previous is not None or len(allowances) < MAX_ALLOWANCES:
            allowances[name] = allowance
    rows, resets_at = list(allowances.values()), plan_resets_at or known.resets_at
    return Quota(known.account, known.plan, rows, resets_at, as_of=now)


def reached_percent(allowance: Allowance) -> float:
    """The highest warning threshold reached, 100 if the allowance is used up; otherwise 0."""
    percent, thresholds = allowance.percent_used or 0.0, (*QUOTA_WARNING_PERCENTS, 100.0)
    return max((threshold for threshold in thresholds if percent >= threshold), default=0.0)


def format_figure(value: float) -> str:
    """`1,210.4`."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def iso_day(moment: float) -> str:
    """The day in UTC; "" if there is none, and for a date beyond the calendar's range."""
    if not 0 < moment < MAX_UNIX_SECONDS:
        return ""
    return dt.datetime.fromtimestamp(moment, dt.timezone.utc).date().isoformat()


def quota_warning(provider: str, allowance: Allowance, resets_at: float) -> str:
    """`copilot: 81 % of premium_interactions used, 285 of 1,500 credits left, resets on DAY`."""
    name, unit = allowance.name, f" {allowance.unit}" if allowance.unit else ""
    limit = f" of {format_figure(allowance.limit)}" if allowance.limit else ""
    day, left = iso_day(allowance.resets_at or resets_at), ""
    reset = f", resets on {day}" if day else ""
    if reached_percent(allowance) >= 100:
        left = f", nothing left{limit}{unit}" if limit else ""
        billing = "; further use is billed" if allowance.overage_permitted else ""
        return f"{provider}: {name}: used up{left}{reset}{billing}"
    if allowance.remaining is not None:
        left = f", {format_figure(allowance.remaining)}{limit}{unit} left"
    return f"{provider}: {int(allowance.percent_used or 0)} % of {name} used{left}{reset}"


def quota_warnings(provider: str, quota: Quota | None, now: float) -> list[str]:
    """Warnings for a provider's plan; none for a period that has ended since."""
    if quota is None:
        return []
    return [
        quota_warning(provider, row, quota.resets_at)
        for row in quota.allowances
        if reached_percent(row) and not quota.as_of < (row.resets_at or quota.resets_at) <= now
    ]


class QuotaAlarm:
    """Reports each threshold of each allowance once per period.

    A period is over once its date has passed and a later one is named; without a known date,
    falling below a threshold makes it reportable again.
    """

    def __init__(self) -> None:
        #: allowance -> (highest threshold reported, end of its period in Unix seconds; 0 = unknown)
        self.reported: dict[str, tuple[float, float]] = {}

    def new_warnings(self, quota: Quota, now: float) -> list[Allowance]:
        """The allowances to report now; they count as reported from then on."""
        new_warnings = []
        for row in quota.allowances:
            reached, resets_at = reached_percent(row), row.resets_at or quota.resets_at
            reported, ends_at = self.reported.get(row.name, (0.0, 0.0))
            if not ends_at:
                reported = min(reported, reached)
            elif now >= ends_at and (resets_at > ends_at or not resets_at):
                reported = 0.0
            if reached > reported:
                new_warnings.append(row)
            if not (reached or reported):
                self.reported.pop(row.name, None)
            elif reached > reported or not ends_at:
                self.reported[row.name] = max(reached, reported), resets_at
        return new_warnings


# 9.5 Kiro: sign-ins, hosts, models, limits
#
# Facts from the vendor's CLI and SDK (A) and from public clients that were run against the service
# (kiro.rs, opencodex, kiro-gateway, pi), 2026-04 to 2026-10.

# Kiro moved to hosts of its own in mid-2026; the older ones still work (opencodex, pi, 2026-08).
KIRO_RUNTIME_URL = "https://runtime.{region}.kiro.dev"
KIRO_MANAGEMENT_URL = "https://management.{region}.kiro.dev"
KIRO_Q_URL = "https://q.{region}.amazonaws.com"
KIRO_OLD_URL = "https://codewhisperer.us-east-1.amazonaws.com"
KIRO_OIDC_URL = "https://oidc.{region}.amazonaws.com"
KIRO_AUTH_URL = "https://prod.us-east-1.auth.desktop.kiro.dev"
KIRO_BUILDER_START_URL = "https://view.awsapps.com/start"
# Constants of the public IDE, not of an account.
KIRO_BUILDER_ARN = "arn:aws:codewhisperer:us-east-1:638616132270:profile/AAAACCCCXXXX"
KIRO_SOCIAL_ARN = "arn:aws:codewhisperer:us-east-1:699475941385:profile/EHGA3GRVQMUK"

KIRO_KINDS = {
    "apikey": "api_key", "awsidc": "idc", "builderid": "builder_id", "enterprise": "idc",
    "externalidp": "external_idp", "github": "social", "google": "social", "idc": "idc",
    "internal": "idc", "social": "social",
}  # fmt: skip
KIRO_REGIONS = ("us-east-1", "eu-central-1")  # only these have model hosts


@dataclass(slots=True)
class KiroLogin:
    """One sign-in, as stored in its token file.  `repr` shows no secrets."""

    #: seconds before expiry from which a token is too old for a new request
    margin_s: ClassVar[float] = KIRO_REFRESH_MARGIN_SECONDS

    kind: str  #: builder_id, idc, social, external_idp or api_key
    access_token: str = field(repr=False)
    refresh: str = field(default="", repr=False)
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    sso_region: str = "us-east-1"  #: the region of the sign-in, not of the models
    arn: str = ""
    expires_at: float = math.inf  #: Unix seconds; an API key never expires
    machine_id: str = ""  #: 64 hex digits, constant for the life of the sign-in
    token_url: str = ""  #: of an external identity provider
    scope: str = ""  #: likewise
    internal: bool = False  #: AWS staff


def read_kiro_login(credentials: Json) -> KiroLogin:
    """The sign-in in a token file; the ValueError it raises tells what is wrong."""
    texts = defaultdict(str, ((key, get_str(credentials, key)) for key in credentials))
    kind, access, arn = kiro_kind(credentials), texts["access_token"], texts["profile_arn"]
    refresh = "" if kind == "api_key" else texts["refresh_token"]
    region = texts["idc_region"] or texts["region"] or "us-east-1"
    has_client = texts["client_id"] and texts["client_secret"]
    lacks_client = kind in ("builder_id", "idc") and not has_client
    is_foreign = kind == "external_idp" and not is_own_endpoint(credentials)
    problems = (
        (kind == "api_key" and not access, "it has no access_token, which is the API key"),
        (kind != "api_key" and not refresh, "it has no refresh_token"),
        (access.endswith("..."), "its access_token is truncated: copy all of it"),
        (refresh.endswith("..."), "its refresh_token is truncated: copy all of it"),
        (access and not TARGET.fullmatch(access), "its access_token has invalid characters"),
        (refresh and not TARGET.fullmatch(refresh), "its refresh_token has invalid characters"),
        (not AWS_REGION.fullmatch(region), "its idc_region is not a region"),
        (lacks_client, "it has no client_id and client_secret, which its refresh needs"),
        (is_foreign, "its token_endpoint is not an https URL at the host of its issuer_url"),
        (arn and not KIRO_ARN.fullmatch(arn), "its profile_arn is not an ARN"),
    )
    for is_wrong, problem in problems:
        if is_wrong:
            raise ValueError(problem)
    seed = f"KiroAPIKey/{access}" if kind == "api_key" else f"KotlinNativeAPI/{refresh}"
    return KiroLogin(
        kind,
        access,
        refresh,
        texts["client_id"],
        texts["client_secret"],
        region,
        arn,
        math.inf if kind == "api_key" else read_time(credentials.get("expires_at")),
        kiro_machine_id(texts["machine_id"]) or short_hash(seed, 64),
        texts["token_endpoint"],
        texts["scope"],
        texts["provider"] == "Internal",
    )


def kiro_machine_id(text: str) -> str:
    """64 hex digits from such text or from a UUID; "" from anything else."""
    digits = text.replace("-", "").lower()
    digits = digits * 2 if len(digits) == 32 else digits
    return digits if re.fullmatch(r"[0-9a-f]{64}", digits) else ""


def kiro_kind(credentials: Json) -> str:
    """The kind of sign-in: as the file states it, otherwise inferred from its fields."""
    spelling = re.sub(r"[_-]", "", get_str(credentials, "auth_method").lower())
    kind, start_url = KIRO_KINDS.get(spelling, ""), get_str(credentials, "start_url")
    is_builder = start_url.rstrip("/") == KIRO_BUILDER_START_URL
    if kind == "idc" and (is_builder or get_str(credentials, "provider") == "BuilderId"):
        return "builder_id"
    if kind:
        return kind
    if get_str(credentials, "access_token").startswith("ksk_"):
        return "api_key"
    if get_str(credentials, "token_endpoint"):
        return "external_idp"
    if get_str(credentials, "client_id"):
        return "builder_id" if is_builder or not start_url.rstrip("/") else "idc"
    return "social"


def is_own_endpoint(credentials: Json) -> bool:
    """Whether the refresh token may be sent to `token_endpoint`: https, at the issuer's host."""
    url, issuer = get_str(credentials, "token_endpoint"), get_str(credentials, "issuer_url")
    if check_url(url) or (issuer and check_url(issuer)):
        return False
    host = urllib.parse.urlsplit(url).hostname
    return not issuer or urllib.parse.urlsplit(issuer).hostname == host


def kiro_refresh(login: KiroLogin, config: KiroConfig) -> tuple[str, dict[str, str], bytes]:
    """(URL, headers, body) of the request that refreshes a sign-in, by its kind."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    grant = {"grant_type": "refresh_token", "client_id": login.client_id}
    grant["refresh_token"] = login.refresh
    if login.kind == "external_idp":
        form = {**grant, "scope": login.scope} if login.scope else grant
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        return login.token_url, headers, urllib.parse.urlencode(form).encode()
    headers["Content-Type"] = "application/json"
    if login.kind == "social":
        headers["Accept"] = "application/json, text/plain, */*"
        headers["User-Agent"] = f"KiroIDE-{config.kiro_version}-{login.machine_id}"
        url = (config.auth_url or KIRO_AUTH_URL).rstrip("/") + "/refreshToken"
        return url, headers, dump_json({"refreshToken": login.refresh})
    grant["client_secret"] = login.client_secret
    base = config.oidc_url or KIRO_OIDC_URL.format(region=login.sso_region)
    body = {camel(name): value for name, value in grant.items()}
    return base.rstrip("/") + "/token", headers, dump_json(body)


def read_refresh_response(body: Json, now: float) -> Json:
    """Changes to the token file; a new refresh token invalidates the old.  Raises UpstreamError."""
    changes: Json = {"access_token": get_token(body, "access_token")}
    if not changes["access_token"]:
        raise UpstreamError("Kiro's token refresh response contains no usable token.")
    lifetime = read_figure(either(body, "expires_in"), 0) or KIRO_TOKEN_SECONDS
    changes["expires_at"] = int(now + min(lifetime, MAX_TOKEN_SECONDS))
    if refresh := get_token(body, "refresh_token"):
        changes["refresh_token"] = refresh
    if KIRO_ARN.fullmatch(arn := get_token(body, "profile_arn")):
        changes["profile_arn"] = arn
    return changes


REFRESH_FAULTS = (
    Fault(r"^40[013] ", NotSignedIn, "Kiro's sign-in is no longer valid: {message}.", "refresh"),
    Fault(r"^(?:408|429|[5-9]..) ", Overloaded, "Kiro's token refresh failed, status {status}.",
          "wait"),
    Fault(r"", UpstreamError, "Kiro's token refresh responded with status {status}."),
)  # fmt: skip


def classify_kiro_refresh(status: int, headers: Headers, data: bytes, now: float) -> RetryDecision:
    """Classifies a failed refresh: `wait` if it is temporary, `refresh` if the token is dead."""
    message, code = read_error_response(status, data)
    decision = classify(REFRESH_FAULTS, status, code, message or code or f"status {status}")
    return with_wait(decision, parse_retry_after(headers.get("retry-after"), now), "wait")


def kiro_region(login: KiroLogin, config: KiroConfig) -> str:
    """Only two regions have model hosts: the configured one, the profile's, or the closest."""
    match = KIRO_ARN.fullmatch(login.arn)
    if config.region:
        return config.region
    if match and AWS_REGION.fullmatch(match[1]):
        return match[1]
    return "eu-central-1" if login.sso_region.startswith("eu-") else "us-east-1"


class KiroEndpoint(NamedTuple):
    """A host, the client to imitate ("ide" or "cli") and a profile ARN ("" = none)."""

    url: str
    shape: str
    arn: str


# What each of the vendor's clients sends: the path, and the origin it names in the body.
KIRO_PATHS = {"ide": "/generateAssistantResponse", "cli": "/"}
KIRO_ORIGINS = {"ide": "AI_EDITOR", "cli": "KIRO_CLI"}


def kiro_endpoints(login: KiroLogin, config: KiroConfig) -> list[KiroEndpoint]:
    """The endpoints to try, best first.

    Sources disagree on which host wants which profile from which kind of sign-in (KRS #161, OCX
    #993, 9R #1868); all may be right at some time, so each is tried and the one that works is kept.
    """
    region, arn = kiro_region(login, config), login.arn
    runtime, q = KIRO_RUNTIME_URL.format(region=region), KIRO_Q_URL.format(region=region)
    old = KIRO_OLD_URL if region == "us-east-1" else q
    built_in_arns = {"builder_id": KIRO_BUILDER_ARN, "social": KIRO_SOCIAL_ARN}
    own = arn or built_in_arns.get(login.kind, "")
    if login.kind == "api_key":
        endpoints = [(runtime, "cli", ""), (old, "ide", ""), (q, "ide", "")]
    elif login.kind == "builder_id":
        endpoints = [(runtime, "ide", own), (runtime, "cli", ""), (q, "ide", ""), (old, "ide", "")]
    elif login.kind == "idc":
        endpoints = [(runtime, "ide", arn), (q, "ide", arn), (q, "ide", ""), (old, "ide", arn)]
    else:
        endpoints = [(runtime, "ide", own), (q, "ide", own), (old, "ide", own)]
    base = config.api_url.rstrip("/")
    unique = dict.fromkeys(KiroEndpoint(base or url, shape, key) for url, shape, key in endpoints)
    return list(unique)


def kiro_control_urls(login: KiroLogin, config: KiroConfig) -> list[str]:
    """The hosts of the model list, profiles and limits, best first."""
    configured_url = config.management_url or config.api_url
    if configured_url:
        return [configured_url.rstrip("/")]
    region = kiro_region(login, config)
    return [url.format(region=region) for url in (KIRO_MANAGEMENT_URL, KIRO_Q_URL)]


# What the vendor's CLI and IDE send: for a call, and for the model list, profiles and limits.
# Very long histories are refused unless the headers name an IDE version (pi, 2026-08).
RUST_AGENT = (
    "aws-sdk-rust/1.3.15 ua/2.1 api/codewhispererstreaming/0.1.17975 os/{os} lang/rust/1.92.0"
)
NODE_AGENT = "ua/2.1 os/{system} lang/js md/nodejs#22.22.0"
KIRO_HEADERS = {
    "cli": {
        "x-amzn-codewhisperer-optout": "true",  # no training on this user's code
        "Content-Type": "application/x-amz-json-1.0",
        "Accept": "*/*",
        "X-Amz-Target": "AmazonCodeWhispererStreamingService.GenerateAssistantResponse",
        "User-Agent": RUST_AGENT + " md/appVersion-2.14.2 m/F app/AmazonQ-For-CLI",
        "x-amz-user-agent": RUST_AGENT + " m/F app/AmazonQ-For-CLI",
    },
    "ide": {
        "x-amzn-codewhisperer-optout": "true",
        "Content-Type": "application/json",
        "Accept": "application/vnd.amazon.eventstream",
        "x-amzn-kiro-agent-mode": "vibe",
        "x-amz-user-agent": "aws-sdk-js/1.0.34 {client}",
        "User-Agent": f"aws-sdk-js/1.0.34 {NODE_AGENT}"
        " api/codewhispererstreaming#1.0.34 m/E {client}",
    },
    "control": {
        "Accept": "application/json",
        "x-amz-user-agent": "aws-sdk-js/1.0.0 {client}",
        "User-Agent": f"aws-sdk-js/1.0.0 {NODE_AGENT}"
        " api/codewhispererruntime#1.0.0 m/N,E {client}",
    },
}


def kiro_headers(login: KiroLogin, shape: str, version: str, system: str) -> dict[str, str]:
    """The headers of a request in one of the KIRO_HEADERS shapes."""
    headers = {"Authorization": f"Bearer {login.access_token}", "Accept-Encoding": "identity"}
    if login.kind == "api_key":
        headers["tokentype"] = "API_KEY"
    elif login.kind == "external_idp":
        headers["TokenType"] = "EXTERNAL_IDP"
    if login.internal:
        headers["redirect-for-internal"] = "true"
    client, os_name = f"KiroIDE-{version}-{login.machine_id}", system.partition("#")[0]
    return headers | {
        name: text.format(client=client, os=os_name, system=system)
        for name, text in KIRO_HEADERS[shape].items()
    }


def address_kiro_request(
    body: Json, endpoint: KiroEndpoint, conversation_id: str, run_id: str
) -> Json:
    """The body with its ids, and with the endpoint's profile and origin."""
    ids = {"conversationId": conversation_id, "agentContinuationId": run_id}
    state, origin = {**body["conversationState"], **ids}, KIRO_ORIGINS[endpoint.shape]

    def with_origin(turn: Json) -> Json:
        message = turn.get("userInputMessage")
        return turn if message is None else {"userInputMessage": {**message, "origin": origin}}

    if "history" in state:
        state["history"] = [with_origin(turn) for turn in state["history"]]
    state["currentMessage"] = with_origin(state["currentMessage"])
    profile = {"profileArn": endpoint.arn} if endpoint.arn else {}
    return {**body, "conversationState": state, **profile}


def assistant_messages(body: Json) -> list[Json]:
    rows = body["conversationState"].get("history", ())
    return [row["assistantResponseMessage"] for row in rows if "assistantResponseMessage" in row]


def attach_kiro_thinking(body: Json, memory: ReasoningMemory) -> None:
    """Puts reasoning back before calls whose client had no field for it, or not for its text."""
    for message in assistant_messages(body):
        call_ids = [tool_use["toolUseId"] for tool_use in message.get("toolUses", ())]
        entries = [memory.entries[call_id] for call_id in call_ids if call_id in memory.entries]
        thinking = write_kiro_thinking(*entries[-1]) if entries else {}
        known = get_dict(message.get("reasoningContent", thinking), "reasoningText")
        if entries and known.get("signature") == entries[-1][1]:
            message["reasoningContent"] = thinking


def strip_kiro_thinking(body: Json) -> bool:
    """Removes all replayed reasoning; returns whether there was any."""
    thoughts = [message.pop("reasoningContent", None) for message in assistant_messages(body)]
    return any(thoughts)


def summarize_kiro_body(body: Json) -> str:
    """The structure of a conversation without its content, for the log: roles, lengths, tools."""
    state, summaries = body["conversationState"], []
    for turn in [*state.get("history", ()), state["currentMessage"]][-60:]:
        user_message = turn.get("userInputMessage")
        message = user_message or turn["assistantResponseMessage"]
        context = get_dict(message, "userInputMessageContext")
        lists = (("r", context, "toolResults"), ("t", context, "tools"), ("c", message, "toolUses"))
        counts = {letter: len(owner.get(key, ())) for letter, owner, key in lists}
        counts |= {"i": len(message.get("images", ())), "k": int("reasoningContent" in message)}
        counters = "".join(f"{letter}{total}" for letter, total in counts.items() if total)
        summaries.append(f"{'u' if user_message else 'a'}{len(message['content'])}{counters}")
    return " ".join(summaries)


UUID_TEXT = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
KIRO_VENDORS = {
    "auto": "Kiro", "claude": "Anthropic", "deepseek": "DeepSeek", "glm": "Zhipu AI",
    "gpt": "OpenAI", "kimi": "Moonshot AI", "minimax": "MiniMax", "qwen3": "Alibaba",
}  # fmt: skip
# The models of 2026-11 (id, input window, output limit), if the list cannot be fetched.
KIRO_KNOWN_MODELS: tuple[tuple[str, int, int | None], ...] = (
    ("auto", 200_000, None),  # nominal: it routes to several models
    ("claude-sonnet-4.6", 1_000_000, 64_000), ("claude-sonnet-4.5", 200_000, 64_000),
    ("claude-sonnet-4", 200_000, 64_000), ("claude-opus-4.8", 1_000_000, 128_000),
    ("claude-opus-4.6", 1_000_000, 64_000), ("claude-opus-4.5", 200_000, 64_000),
    ("claude-haiku-4.5", 200_000, 64_000),
    # Their limits were not seen yet: those of the model before.
    ("claude-opus-5.5", 1_000_000, 128_000), ("claude-sonnet-5.5", 1_000_000, 64_000),
    ("claude-haiku-5.5", 200_000, 64_000), ("gpt-5.6-sol", 272_000, 128_000),
    ("gpt-5.6-terra", 272_000, 128_000), ("gpt-5.6-luna", 200_000, 128_000),
    ("kimi-k3", 200_000, None),
)  # fmt: skip


def read_kiro_model(entry: Json, provider: str) -> Model | None:
    """One entry of the model list; every member but the id may be missing."""
    model_id, limits = entry.get("modelId"), get_dict(entry, "tokenLimits")
    if not isinstance(model_id, str) or not MODEL_ID.fullmatch(model_id):
        return None
    window = positive_int(limits.get("maxInputTokens"))
    properties = get_dict(get_dict(entry, "additionalModelRequestFieldsSchema"), "properties")
    reasoning = get_dict(properties, "reasoning") or get_dict(properties, "output_config")
    return Model(
        id=model_id,
        provider=provider,
        dialects=(KIRO.name,),
        name=get_name(entry, "modelName") or model_id,
        vendor=KIRO_VENDORS.get(re.split(r"[-.]", model_id.lower())[0], ""),
        max_output=positive_int(limits.get("maxOutputTokens")),
        max_prompt=window,
        context=window,
        efforts=tuple(effort for effort in kiro_efforts(reasoning) if effort in EFFORTS),
        adaptive="thinking" in properties,
        stops=0,
        raw=entry,
    )


def read_kiro_models(entries: Iterable[Any], provider: str) -> dict[str, Model]:
    models = (read_kiro_model(entry, provider) for entry in entries if isinstance(entry, dict))
    return {model.id: model for model in filter(None, models)}


def known_kiro_models(provider: str) -> dict[str, Model]:
    limits = ("maxInputTokens", "maxOutputTokens")
    entries = (
        {"modelId": name, "tokenLimits": dict(zip(limits, figures, strict=True))}
        for name, *figures in KIRO_KNOWN_MODELS
    )
    models = read_kiro_models(entries, provider)
    return {name: replace(model, guessed=True) for name, model in models.items()}


def kiro_figure(row: Json, name: str) -> float | None:
    precise = row.get(f"{name}WithPrecision")
    return read_figure(row.get(name) if precise is None else precise, 0)


def kiro_credit_parts(row: Json, now: float) -> list[Json]:
    """The plan's own credits, an active trial's and those of bonuses that have not expired."""
    trial, bonuses = get_dict(row, "freeTrialInfo"), row.get("bonuses")
    entries = [("plan", row, 0.0)]
    if trial.get("freeTrialStatus") == "ACTIVE":
        entries.append(("free trial", trial, read_time(trial.get("freeTrialExpiry"))))
    for bonus in bonuses[:MAX_ALLOWANCES] if isinstance(bonuses, list) else ():
        if isinstance(bonus, dict) and bonus.get("status", "ACTIVE") == "ACTIVE":
            ends_at = read_time(bonus.get("expiresAt"))
            if not ends_at or ends_at > now:
                entries.append((get_name(bonus, "displayName") or "bonus", bonus, ends_at))
    return [
        {
            "name": name,
            "used": kiro_figure(entry, "currentUsage") or 0.0,
            "limit": kiro_figure(entry, "usageLimit") or 0.0,
            "ends_at": ends_at or None,
        }
        for name, entry, ends_at in entries
    ]


def read_kiro_quota(body: Json, now: float) -> Quota:
    """GetUsageLimits; the account is its e-mail address, "" unless that was requested.

    All credits are one allowance: they are spent from whichever part has some left.
    """
    rows = body.get("usageBreakdownList") or [body.get("usageBreakdown")]  # older responses
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    credit_rows = [row for row in rows if row.get("resourceType") == "CREDIT"]
    row: Json = next(iter(credit_rows or rows), {})
    parts = kiro_credit_parts(row, now)
    used, limit = (float(sum(part[key] for part in parts)) for key in ("used", "limit"))
    overage = get_dict(body, "overageConfiguration").get("overageStatus")
    allowance = Allowance(
        "credits",
        used,
        limit or None,
        max(0.0, limit - used) if limit else None,
        unit="credits",
        overage_permitted=overage == "ENABLED" if isinstance(overage, str) else None,
        overage_used=kiro_figure(row, "currentOverages"),
        overage_limit=kiro_figure(row, "overageCap"),
        parts=parts if len(parts) > 1 else [],
    )
    return Quota(
        get_name(get_dict(body, "userInfo"), "email"),
        get_name(get_dict(body, "subscriptionInfo"), "subscriptionTitle"),
        [allowance] if used or limit else [],
        read_time(row.get("nextDateReset") or body.get("nextDateReset")),
        as_of=now,
    )


KIRO_STATUS_FAULTS = (
    Fault(r"^401 ", NotSignedIn, "Kiro does not accept the token{detail}", "refresh"),
    Fault(r"^402 ", QuotaExceeded, "The Kiro credits are used up{detail}", "cool_down"),
    Fault(r"^(?:403|423) ", Forbidden, "Kiro does not allow this{detail}", "reroute"),
    Fault(r"^40[45] ", UpstreamError, "Kiro responded with status {status}{detail}", "reroute"),
    Fault(r"^413 ", BodyTooLarge, "The request is too large for Kiro."),
    Fault(r"^429 ", RateLimited, "Kiro's rate limit{detail}", "pause"),
    Fault(r"^(?:502|503|529) ", Overloaded, "Kiro is busy, status {status}{detail}", "reroute"),
    Fault(r"^(?:408|504) ", UpstreamTimeout, "Kiro timed out{detail}", "retry_once"),
    Fault(r"^524 ", UpstreamTimeout, "Kiro timed out{detail}"),  # after minutes: no retry
    Fault(r"^[5-9]..", UpstreamError, "Kiro failed with status {status}{detail}", "wait"),
    Fault(r"^200 ", UpstreamError, "Kiro responded without a stream{detail}", "retry_once"),
    Fault(r"", InvalidRequest, "Kiro refused the request, status {status}{detail}"),
)


def classify_kiro_error(status: int, headers: Headers, data: bytes, now: float) -> RetryDecision:
    """Classifies an error response, first by its message, then by status; `now` is Unix time."""
    text = data.decode("utf-8", "replace").strip()
    payload = load_object(text) or {"message": read_error_response(status, data)[0]}
    code, reason, message = read_kiro_error(payload)
    code = headers.get("x-amzn-errortype", "").partition(":")[0] or code
    decision = classify_kiro_message(code, reason, message)
    is_token_refused = status == 401 and decision and isinstance(decision.error, Forbidden)
    if decision is None or (is_token_refused and decision.action != "cool_down"):
        decision = classify(KIRO_STATUS_FAULTS, status, "", message)
    with_wait(decision, read_wait(headers, message, now), "pause", "wait", "cool_down")
    if isinstance(decision.error, QuotaExceeded):
        decision.error.retry_after = None  # spent credits do not come back in seconds
    decision.account_wide = isinstance(decision.error, (QuotaExceeded, RateLimited))
    decision.error.message += request_note(headers, "Kiro", "x-amzn-requestid")
    return decision


# 9.6 signing in: device codes, the browser's redirect, other programs' files
#
# Facts from the vendors' clients (VS Code, Amazon Q CLI) and from public clients that were run
# against the services (kiro.rs, opencodex, 9router, zed), 2025-10 to 2026-10.

KIRO_PORTAL_URL = "https://app.kiro.dev/signin"


@dataclass(slots=True)
class DeviceCode:
    """The code to type, the page to type it into, and its lifetime (RFC 8628 section 3.2)."""

    code: str = field(repr=False)
    user_code: str
    url: str
    url_complete: str  #: the same with the code in it; "" = none
    expires_in: float  #: seconds
    interval: float  #: seconds


def read_device_code(body: Json, service: str) -> DeviceCode:
    """Parses a device authorization response; raises SignInFailed."""

    def seconds(name: str, default: float) -> float:
        value = parse_number(either(body, name))  # strings in a form
        return default if value is None or not 1 <= value <= 86400 else value

    device = DeviceCode(
        get_token(body, "device_code"),
        get_token(body, "user_code"),
        get_token(body, "verification_uri"),
        get_token(body, "verification_uri_complete"),
        seconds("expires_in", DEVICE_LIFE_SECONDS),
        seconds("interval", DEVICE_INTERVAL_SECONDS),
    )
    if not device.code or not device.user_code or check_url(device.url):
        raise SignInFailed(f"{service}'s response contains no code to type")
    return device


# The states of a poll: RFC 8628 section 3.5, plus GitHub's alternative name and AWS's exceptions.
POLL_STATES = {
    "accessdenied": "denied", "authorizationpending": "pending", "expiredtoken": "expired",
    "slowdown": "slow_down", "tokenexpired": "expired",
}  # fmt: skip


class Poll(NamedTuple):
    """The result of one poll for the token."""

    state: str  #: done, pending, slow_down, expired, denied, unreachable or failed
    body: Json
    message: str = ""  #: why it failed, as shown to the user


def load_form_or_json(data: bytes) -> Json | None:
    """The object in a sign-in response: JSON, or a form, which is GitHub's default."""
    body = load_object(data)
    if body is None and re.fullmatch(rb"[a-z_]+=[ -~]*", data.strip()):
        return dict(urllib.parse.parse_qsl(data.decode().strip()))
    return body


def classify_poll(status: int, headers: Headers, data: bytes) -> Poll:
    """Classifies a poll's response by its content, not its status (GitHub's is always 200)."""
    body = load_form_or_json(data) or {}
    if status == 200 and isinstance(either(body, "access_token"), str):
        return Poll("done", body)
    error = body.get("error") or body.get("__type") or headers.get("x-amzn-errortype") or ""
    name = str(error).rpartition("#")[2].partition(":")[0]
    state = POLL_STATES.get(name.replace("_", "").lower().removesuffix("exception"))
    if state:
        return Poll(state, body)
    if status == 429 or status >= 500:
        return Poll("unreachable", body, f"status {status}")
    message = body.get("error_description") or body.get("message") or name or f"status {status}"
    return Poll("failed", body, redact(str(message), 300))


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def portal_url(state: str, verifier: str, port: int) -> str:
    """The URL of Kiro's sign-in page, which redirects to `port` on the browser's machine."""
    query = {
        "state": state,
        "code_challenge": b64url(hashlib.sha256(verifier.encode()).digest()),
        "code_challenge_method": "S256",
        "redirect_uri": f"http://localhost:{port}",
        "redirect_from": "KiroIDE",
    }
    return f"{KIRO_PORTAL_URL}?{urllib.parse.urlencode(query)}"


CALLBACK_PATHS = ("/oauth/callback", "/signin/callback")


class Callback(NamedTuple):
    code: str
    option: str  #: google, github, builderid, awsidc, ...
    issuer_url: str = ""  #: where to continue a sign-in that is not the portal's own
    region: str = ""
    path: str = CALLBACK_PATHS[0]


def read_callback(url: str, state: str, option: str) -> Callback:
    """Parses a complete callback URL, its path and query, or just the pasted code.

    Raises ValueError if it is none or belongs to another sign-in; SignInFailed if it reports a
    refusal.
    """
    if re.fullmatch(r"[\w.~-]{8,}", url):
        return Callback(url, option)  # just the code; it needs the verifier to be of use
    parts = urllib.parse.urlsplit(url)
    query = defaultdict(str, urllib.parse.parse_qsl(parts.query))
    if not hmac.compare_digest(query["state"].encode(), state.encode()):
        raise ValueError("it does not belong to this sign-in")
    if query["error"]:
        message = query["error_description"] or query["error"]
        raise SignInFailed(f"the sign-in page says: {redact(message, 300)}")
    option = query.get("login_option", option)
    if option in ("google", "github") and not query["code"]:
        raise ValueError("it contains no code")
    path = parts.path if parts.path in CALLBACK_PATHS else CALLBACK_PATHS[0]
    return Callback(query["code"], option, query["issuer_url"], query["idc_region"], path)


def parse_github_host(text: str) -> str:
    """A GitHub host as typed by a user, normalized; raises WrongUsage for one without Copilot."""
    host = re.sub(r"^[a-z]+://", "", text.strip().lower()).partition("/")[0]
    if host == "github.com" or re.fullmatch(r"[a-z0-9-]+\.ghe\.com", host):
        return host
    raise WrongUsage(f"--github-host {text}: must be github.com or TENANT.ghe.com")


def clean_token(text: str) -> str:
    """A pasted token without the quotes, spaces and scheme around it; raises SignInFailed."""
    surrounding = "\"' \t\r\n"
    token = re.sub(r"^(?i:bearer|token)(?:\s+|$)", "", text.strip(surrounding)).strip(surrounding)
    if not token or not TARGET.fullmatch(token):
        raise SignInFailed("the input contains no token: paste the token alone, on one line")
    if token.endswith("..."):
        raise SignInFailed("the token is truncated: copy all of it")
    return token


def read_plugin_logins(body: Json) -> list[tuple[str, str, str]]:
    """(host, user, GitHub token) from the editor plugins' apps.json and hosts.json."""
    logins = []
    for key, entry in body.items():
        token = get_str(entry, "oauth_token") if isinstance(entry, dict) else ""
        if token and TARGET.fullmatch(token):
            logins.append((key.partition(":")[0].lower(), get_str(entry, "user"), token))
    return logins


# The keys that the sign-ins of Kiro's own programs have in common with our token file.
SHARED_KEYS = (
    "access_token", "refresh_token", "client_id", "client_secret", "start_url", "profile_arn",
    "token_endpoint", "issuer_url", "provider",
)  # fmt: skip


def read_kiro_import(body: Json, registration: Json, profile: Json, kind: str = "") -> Json:
    """Our token file for a sign-in of the Kiro IDE (camelCase) or of the CLIs (snake_case).

    `registration` is the client registration, `profile` the chosen profile of the organisation,
    `kind` is implied by where the sign-in was found.  Raises ValueError if it is not usable.
    """
    credentials: Json = {"type": "kiro"}
    for name in SHARED_KEYS:
        value = either(body, name) or either(registration, name)
        if isinstance(value, str) and value.strip():
            credentials[name] = value.strip()
    if not credentials.get("refresh_token"):
        raise ValueError("it has no refresh token")
    credentials["idc_region"] = get_str(body, "region") or get_str(registration, "region")
    credentials["expires_at"] = int(read_time(either(body, "expires_at")))
    client_ends = either(registration, "client_secret_expires_at") or registration.get("expiresAt")
    credentials["sign_in_expires_at"] = int(read_time(client_ends))
    credentials.setdefault("profile_arn", get_str(profile, "arn"))
    method = credentials.get("provider") or kind or get_str(body, "authMethod")
    kind, scopes = kiro_kind({**credentials, "auth_method": method}), either(body, "scopes")
    is_named = kind == "social" and method.lower() in ("google", "github")
    credentials["auth_method"] = method.lower() if is_named else kind
    if kind == "external_idp" and isinstance(scopes, list):
        credentials["scope"] = " ".join(scope for scope in scopes if isinstance(scope, str))
    credentials = {name: value for name, value in credentials.items() if value}
    return {**credentials, "machine_id": read_kiro_login(credentials).machine_id}


def is_newer(shared: Json, credentials: Json) -> bool:
    """Whether another program has refreshed or replaced a sign-in since our copy."""
    keys = ("access_token", "refresh_token")
    has_changed = any(shared.get(key) != credentials.get(key) for key in keys)
    own_end = read_time(credentials.get("expires_at"))
    return has_changed and read_time(shared.get("expires_at")) >= own_end


def with_tokens(body: Json, changes: Json) -> Json:
    """Another program's sign-in with refreshed tokens, in its spelling and its format of times."""
    merged = dict(body)
    for name in ("access_token", "refresh_token", "profile_arn", "expires_at"):
        key = name if name in body else camel(name)
        if name not in changes or (name == "profile_arn" and key not in body):
            continue
        merged[key], old = changes[name], body.get(key)
        if name == "expires_at" and isinstance(old, (int, float)) and not isinstance(old, bool):
            merged[key] = int(changes[name] * (1000 if old >= 1e10 else 1))
        elif name == "expires_at":
            moment = dt.datetime.fromtimestamp(changes[name], dt.timezone.utc)
            merged[key] = moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return merged


# ---- 10. Accounting ----------------------------------------------------------------------------
# 10.1 routing


class Route(NamedTuple):
    """The target of a model name."""

    provider: str  #: "" = not known yet
    model: str  #: without the provider's prefix
    explicit: bool  #: the client named the provider

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}" if self.provider else self.model


class Router:
    """Model names -> providers: prefix, X-Provider header, alias, sole owner, default."""

    def __init__(self, config: Config, enabled: list[str]) -> None:
        self.enabled = enabled
        self.disabled = [name for name in config.providers if name not in enabled]
        self.aliases = {
            alias: [target] if isinstance(target, str) else list(dict.fromkeys(target))
            for alias, target in config.models.items()
        }
        self.default = config.default_provider

    def candidates(self, name: str, header: str | None) -> list[Route]:
        """The routes for a name, tried in order: several only if an alias has a list.

        A provider that was not named is "".  Raises InvalidRequest if this is not a model name,
        ModelNotFound if an alias leads to disabled providers only.
        """
        if not MODEL_NAME.fullmatch(name):
            raise InvalidRequest("model: must be a model name.", param="model")
        explicit_route = self.split(name, self.enabled)
        if explicit_route:
            return [explicit_route]
        if header and header not in self.enabled:
            state = "is disabled" if header in self.disabled else "is not a provider"
            known = ", ".join(self.enabled)
            raise InvalidRequest(f"X-Provider: {header[:64]!r} {state}; must be one of {known}.")
        disabled_route = self.split(name, self.disabled)
        if disabled_route and not header and name not in self.aliases:
            provider = disabled_route.provider
            hint = f"The verb `provider enable {provider}` enables it."
            raise ModelNotFound(f"The provider {provider!r} is disabled.", hint=hint, param="model")
        if header or name not in self.aliases:
            return [Route(header or "", name, bool(header))]
        targets = self.aliases[name]
        usable = [target for target in targets if not self.split(target, self.disabled)]
        if not usable:
            message = f"The alias {name!r} has only disabled providers: {', '.join(targets)}."
            hint = "The verb `provider enable NAME` enables one."
            raise ModelNotFound(message, hint=hint, param="model")
        return [self.split(target, self.enabled) or Route("", target, False) for target in usable]

    @staticmethod
    def split(name: str, providers: list[str]) -> Route | None:
        prefix, slash, model = name.partition("/")
        provider = prefix if prefix in providers else prefix.lower()
        return Route(provider, model, True) if slash and model and provider in providers else None

    def resolve(
        self, route: Route, catalogues: dict[str, dict[str, Model]]
    ) -> tuple[Route, Model | None]:
        """Adds the provider: the named one, the only one with the model, or the default.

        And the model, None if its catalogue does not list it.  Raises ModelNotFound.
        """
        name, provider = route.model, route.provider
        owners: dict[str, Model] = {}
        if not provider:
            lists = {owner: catalogues.get(owner, {}) for owner in self.enabled}
            owners = {owner: models[name] for owner, models in lists.items() if name in models}
            if len(owners) > 1:  # Copilot's Auto goes by its full name
                owners = {owner: model for owner, model in owners.items() if not model.auto}
            if not owners:
                found = ((owner, find_model(name, models)) for owner, models in lists.items())
                owners = {owner: model for owner, model in found if model}
            provider = next(iter(owners)) if len(owners) == 1 else self.default
            if provider not in self.enabled:
                raise self.not_found(name, catalogues)
        model = owners.get(provider) or find_model(name, catalogues.get(provider, {}))
        return Route(provider, name, route.explicit), model

    def not_found(self, name: str, catalogues: dict[str, dict[str, Model]]) -> ModelNotFound:
        message = f"The model {name!r} does not exist here"
        model_ids = [model for models in catalogues.values() for model in models]
        prefix, slash, model = name.partition("/")
        if slash and prefix not in self.enabled:
            message += f": there is no provider {prefix!r}"
            model_ids += [f"{provider}/{model}" for provider in nearest(prefix, self.enabled, 1)]
        elif self.default in self.disabled:
            message += f", and the default provider {self.default!r} is disabled"
        suggestions = ", ".join(nearest(model_spellings(name)[-1], model_ids))
        hint = f"Nearest: {suggestions}." if suggestions else "GET /v1/models lists them."
        return ModelNotFound(f"{message}.", hint=hint, param="model")


# Kinds of errors that are not the request's fault, so that another model may still serve it; the
# lower its rank, the more useful is an error to the client if all of them fail.
FALLBACK_RANKS = {
    "overloaded": 1, "rate_limited": 1, "upstream_error": 1, "upstream_timeout": 1,
    "limit_reached": 2, "quota_exceeded": 2, "forbidden": 3, "not_signed_in": 3,
    "model_not_found": 4,
}  # fmt: skip


def can_fall_back(error: ApiError) -> bool:
    """Whether to fall back to the next candidate after an error before the first byte."""
    is_temporary = error.kind in FALLBACK_RANKS and not isinstance(error, RequestRepeated)
    return is_temporary or isinstance(error, WrongDialect)


def summarize_errors(failures: list[tuple[str, ApiError]]) -> ApiError:
    """The most useful error, before all one that says when to retry."""

    def rank(error: ApiError) -> tuple[int, float]:
        wait_s = error.retry_after
        if error.retry is not False and wait_s is not None and wait_s <= MAX_RETRY_AFTER_SECONDS:
            return 0, wait_s
        return FALLBACK_RANKS.get(error.kind, 5), 0.0

    best = min((error for _, error in failures), key=rank)
    attempts = ", ".join(f"{name} ({error.kind})" for name, error in failures)
    hint = f"{best.hint} All of these were tried: {attempts}.".strip()
    return best.with_hint(hint, best.retry_after)


class RateLimiter:
    """A minimum interval between the requests of one client address."""

    MAX_CLIENTS = 10_000

    def __init__(self, gap_s: float) -> None:
        self.gap_s = gap_s
        self.next_at: dict[str, float] = {}

    def wait_for(self, client: str, now: float) -> float:
        """Seconds until a request is allowed, 0 = now; `now` is monotonic."""
        ready_at = self.next_at.get(client, 0.0)
        if ready_at > now or not self.gap_s:
            return max(0.0, ready_at - now)
        if len(self.next_at) >= self.MAX_CLIENTS:
            self.next_at = {address: at for address, at in self.next_at.items() if at > now}
        self.next_at[client] = now + self.gap_s
        return 0.0


# 10.2 usage

# The columns of the usage database are named like the fields of `/v1/usage`.
USAGE_NAMES = ("provider", "account", "model", "label")
USAGE_DETAILS = ("dialect", "streamed", "status", "kind")  # NULL in the sum of several requests
USAGE_TOKENS = (
    "input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
)  # fmt: skip
USAGE_COUNTS = ("request_count", "error_count", "cancelled_count", *USAGE_TOKENS)
USAGE_SOURCES = ("reported", "derived", "estimated")
# What adds up; times in milliseconds.
USAGE_FIGURES = (
    *USAGE_COUNTS, "nano_credits", *USAGE_SOURCES, *(f"credits_{name}" for name in USAGE_SOURCES),
    "duration_ms", "first_byte_count", "first_byte_ms",
)  # fmt: skip


@dataclass(slots=True)
class UsageRecord:
    """What one request that reached a provider has used.  Never content."""

    at: float  #: Unix seconds of the request
    provider: str
    account: str  #: the user name at the service, "" if unknown
    model: str  #: the upstream's model id
    label: str  #: the client: the name of its key, otherwise the family of its user agent
    dialect: str  #: the client's: chat, messages, responses or embeddings
    streamed: bool
    usage: Usage
    status: int = 200  #: HTTP; of a broken stream, its error's; 499: the client disconnected
    kind: str = ""  #: "" = success, otherwise the error's kind, or "cancelled"
    duration_s: float = 0.0
    first_byte_s: float | None = None
    costs: bool = True  #: False if no upstream was involved: it does not count towards limits

    def normalize(self) -> None:
        """Makes it fit for the database: names bounded and printable, figures in range."""
        texts = self.provider, self.account, self.model, self.label, self.dialect, self.kind
        joined = "".join(texts)
        if len(joined) > MAX_NAME_CHARS or one_line(joined) != joined:
            for name, text in zip((*USAGE_NAMES, "dialect", "kind"), texts, strict=True):
                setattr(self, name, one_line(text[:MAX_NAME_CHARS]))
        for name in ("input", "cache_read", "cache_write", "output", "reasoning", "nano_credits"):
            figure = getattr(self.usage, name)
            if not 0 <= figure <= MAX_FIGURE:
                self.usage = replace(self.usage, **{name: min(max(figure, 0), MAX_FIGURE)})

    def row(self) -> Json:
        """A row of the usage database; `input_tokens` includes both caches."""
        usage, first_byte_s = self.usage, self.first_byte_s
        row: Json = dict.fromkeys(USAGE_FIGURES, 0)
        row |= {name: getattr(self, name) for name in (*USAGE_NAMES, *USAGE_DETAILS)}
        row |= {
            "at": self.at,
            "shown": 1,
            "spent": int(self.costs),
            "request_count": 1,
            "error_count": int(self.kind not in ("", "cancelled")),
            "cancelled_count": int(self.kind == "cancelled"),
            "input_tokens": usage.prompt,
            "cache_read_tokens": usage.cache_read,
            "cache_write_tokens": usage.cache_write,
            "output_tokens": usage.output,
            "reasoning_tokens": usage.reasoning,
            "nano_credits": usage.nano_credits,
            "duration_ms": round(self.duration_s * 1000),
            "first_byte_count": int(first_byte_s is not None),
            "first_byte_ms": round((first_byte_s or 0.0) * 1000),
        }
        sources = {usage.source, f"credits_{usage.credits_source}"}
        return row | {name: 1 for name in sources if name in row}


def total_row(figures: Iterable[int]) -> Json:
    """Sums in the order of USAGE_FIGURES as a row of `/v1/usage`; times are means."""
    row = dict(zip(USAGE_FIGURES, figures, strict=True))
    first_bytes = row["first_byte_count"]
    return {
        **{name: row[name] for name in USAGE_COUNTS},
        "total_tokens": row["input_tokens"] + row["output_tokens"],
        "token_sources": {name: row[name] for name in USAGE_SOURCES if row[name]},
        "credits": row["nano_credits"] / 1e9,
        "credit_sources": {n: row[f"credits_{n}"] for n in USAGE_SOURCES if row[f"credits_{n}"]},
        "duration_ms": round(row["duration_ms"] / max(row["request_count"], 1)),
        "first_byte_ms": round(row["first_byte_ms"] / first_bytes) if first_bytes else None,
    }


def request_row(row: Json) -> Json:
    """A row of the usage database as one of `/v1/usage?recent=N`."""
    total = total_row(row[name] for name in USAGE_FIGURES)
    source = next(iter(total["token_sources"]), None)
    return {
        "at": round(row["at"], 3),
        **{name: row[name] for name in (*USAGE_NAMES, *USAGE_DETAILS)},
        "account": row["account"] or None,
        "streamed": bool(row["streamed"]),
        **{n: total[n] for n in ("duration_ms", "first_byte_ms", *USAGE_TOKENS, "credits")},
        "input_source": source,
        "output_source": source if source in (None, "reported") else "estimated",
        "credits_source": next(iter(total["credit_sources"]), None),
    }


OTHER = "other"  # replaces names beyond a limit
USER_AGENT = re.compile(r"([A-Za-z][\w.+-]{0,39})(?:/([A-Za-z]{1,20})\b)?", re.ASCII)


@functools.lru_cache(maxsize=256)
def client_label(user_agent: str) -> str:
    """`claude-cli/2.1 (external)` -> claude-cli; SDKs: `OpenAI/Python 2.1` -> openai-python."""
    match = USER_AGENT.match(user_agent)
    return "-".join(filter(None, match.groups())).lower() if match else "unknown"


class NameTable:
    """Keeps clients from growing tables without bounds: later names of a period become OTHER."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.period = ""
        self.names: set[str] = set()

    def admit(self, name: str, period: str = "") -> str:
        """`name` itself, or OTHER once its period has too many."""
        if period != self.period:
            self.period = period
            self.names.clear()
        if name not in self.names and len(self.names) >= self.limit:
            return OTHER
        self.names.add(name)
        return name


def local_day(moment: float) -> str:
    """The day in the local time zone: 2026-11-22."""
    return dt.date.fromtimestamp(moment).isoformat()


# ?by= -> (the columns to group by, which are also their names in a row)
USAGE_GROUPS: dict[str, tuple[str, ...]] = {
    "day": ("day", "provider"), "model": ("model", "provider"), "provider": ("provider",),
    "label": ("label", "provider"),
}  # fmt: skip

SINCE = re.compile(r"(\d{1,6})([mhdw])", re.ASCII)
SINCE_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def read_since(text: str, now: float) -> float:
    """`7d`, `24h`, `today`, `2026-11-01`, an ISO time or Unix seconds -> Unix seconds.

    Days begin at local midnight.  Raises InvalidRequest.
    """
    match = SINCE.fullmatch(text)
    if match:
        return now - int(match[1]) * SINCE_UNITS[match[2]]
    if re.fullmatch(r"\d{9,11}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    try:
        return dt.datetime.fromisoformat(local_day(now) if text == "today" else text).timestamp()
    except (ValueError, OverflowError, OSError):
        hint = "Write it like 7d, 24h, today, 2026-11-01 or Unix seconds."
        raise InvalidRequest("since: must be a time.", hint=hint, param="since") from None


def usage_report(rows: Iterable[tuple[Any, ...]]) -> Json:
    """`{"providers": {NAME: {..., "models": {ID: {...}}}}, "total": {...}}`.

    From sorted rows of (provider, model, *figures).
    """
    models: dict[str, Json] = {}
    zeros = [0] * len(USAGE_FIGURES)
    totals: dict[str | None, list[int]] = {None: zeros}
    for provider, model, *figures in rows:
        models.setdefault(provider, {})[model] = total_row(figures)
        for key in (provider, None):
            totals[key] = list(map(int.__add__, totals.get(key, zeros), figures))
    total = total_row(totals[None])
    del total["credits"]  # each provider has its own unit
    providers = {name: {**total_row(totals[name]), "models": models[name]} for name in models}
    return {"providers": providers, "total": total}


@dataclass(slots=True)
class UsageQuery:
    since: float | None = None  #: Unix seconds; None = all
    by: str = ""  #: a key of USAGE_GROUPS, or ""
    recent: int = 0  #: how many single records to list, newest first
    cache: bool = False  #: whether to report the prompt caches, by conversation


def read_usage_query(parameters: dict[str, str], now: float) -> UsageQuery:
    """Raises InvalidRequest."""
    query = UsageQuery()
    problems = {
        "by": f"must be one of {', '.join(USAGE_GROUPS)}",
        "recent": f"must be a number from 0 to {MAX_RECENT_REQUESTS}",
        "cache": "must be 0 or 1",
    }
    for name, text in parameters.items():
        number = int(text) if re.fullmatch(r"[0-9]{1,6}", text) else -1
        if name == "since":
            query.since = read_since(text, now)
        elif name == "by" and text in USAGE_GROUPS:
            query.by = text
        elif name == "recent" and 0 <= number <= MAX_RECENT_REQUESTS:
            query.recent = number
        elif name == "cache" and text in ("0", "1"):
            query.cache = text == "1"
        else:
            problem = problems.get(name, "unknown parameter; known are since, by, recent and cache")
            raise InvalidRequest(f"{name[:100]}: {problem}.", param=name[:100])
    return query


# 10.3 the user's own limits

# setting -> (period, unit)
CAPS = {
    "daily_credits": ("day", "credits"), "monthly_credits": ("month", "credits"),
    "daily_tokens": ("day", "tokens"), "monthly_tokens": ("month", "tokens"),
}  # fmt: skip


def month_start(now: float) -> float:
    """Local midnight, in Unix seconds."""
    first = dt.date.fromtimestamp(now).replace(day=1)
    return dt.datetime.combine(first, dt.time()).timestamp()


def period_end(period: str, now: float) -> float:
    """When the day or month of `now` ends in the local time zone; Unix seconds."""
    today = dt.date.fromtimestamp(now)
    end = today + dt.timedelta(1)
    if period == "month":
        end = (today.replace(day=1) + dt.timedelta(31)).replace(day=1)
    return dt.datetime.combine(end, dt.time()).timestamp()


class Spending:
    """This month's spending by day, provider and label, to compare the caps with.

    Other processes write to the same database: rows read from it replace all but `unwritten`.
    """

    def __init__(self) -> None:
        #: (day or month, "providers" or "labels", name) -> [tokens, nano-credits]
        self.tallies: dict[tuple[str, str, str], list[int]] = {}
        #: added since the last write began: (day, provider, label, tokens, nano-credits)
        self.unwritten: list[tuple[str, str, str, int, int]] = []

    def add(self, record: UsageRecord) -> None:
        usage = record.usage
        tokens = usage.prompt + usage.output
        row = (local_day(record.at), record.provider, record.label, tokens, usage.nano_credits)
        self.unwritten.append(row)
        self.count(*row)

    def count(self, day: str, provider: str, label: str, tokens: int, nano_credits: int) -> None:
        for period in (day, day[:7]):
            for key in ((period, "providers", provider), (period, "labels", label)):
                tally = self.tallies.setdefault(key, [0, 0])
                tally[0] += tokens
                tally[1] += nano_credits

    def replace(self, rows: Iterable[tuple[str, str, str, int, int]]) -> None:
        self.tallies.clear()
        for row in (*rows, *self.unwritten):
            self.count(*row)

    def rows(self, limits: LimitsConfig, now: float) -> Iterator[Json]:
        """The rows of `/v1/usage`'s limits: one for each configured cap."""
        day = local_day(now)
        configs = [("providers", *item) for item in limits.providers.items()]
        configs += [("labels", *item) for item in limits.labels.items()]
        for (scope, name, config), (setting, (period, unit)) in product(configs, CAPS.items()):
            if getattr(config, setting):
                key = (day if period == "day" else day[:7], scope, name)
                tokens, nano_credits = self.tallies.get(key, (0, 0))
                yield {
                    "name": f"{scope}.{name}.{setting}",
                    "used": nano_credits / 1e9 if unit == "credits" else float(tokens),
                    "limit": getattr(config, setting),
                    "unit": unit,
                    "period": period,
                    "resets_at": period_end(period, now),
                }

    def check(self, limits: LimitsConfig, provider: str, label: str, now: float) -> None:
        """Raises LimitReached if a cap of the provider or of the label is used up."""
        own = (f"providers.{provider}", f"labels.{label}")
        for row in self.rows(limits, now):
            used, limit, unit, ends_at = row["used"], row["limit"], row["unit"], row["resets_at"]
            if used >= limit and row["name"].rpartition(".")[0] in own:
                key = f"limits.{row['name']}"
                message = f"Your own limit {key} is reached: {used:,.10g} of {limit:,.10g} {unit}."
                hint = f"A new {row['period']} begins {format_minute(ends_at)}; or raise it: "
                hint += f"aiclient-api config set {key} N"
                raise LimitReached(message, hint=hint, retry_after=ends_at - now)


def format_minute(moment: float) -> str:
    """`2026-12-01 00:00` in the local time zone."""
    return f"{dt.datetime.fromtimestamp(moment):%Y-%m-%d %H:%M}"


class RepeatGuard:
    """Detects a client that repeats one request."""

    def __init__(self) -> None:
        #: hash of a request -> (monotonic time of the first, how many since)
        self.seen: dict[int, tuple[float, int]] = {}

    def check(self, limits: LimitsConfig, request_hash: int, now: float) -> None:
        """Counts a request by its hash; raises LimitReached.  `now` is monotonic."""
        limit, seconds = limits.runaway_requests, limits.runaway_seconds
        if not limit:
            return
        started_at, repeats = self.seen.pop(request_hash, (now, 0))
        if now - started_at >= seconds:
            started_at, repeats = now, 0
        if len(self.seen) >= MAX_RUNAWAYS:
            del self.seen[next(iter(self.seen))]  # the least recently seen
        self.seen[request_hash] = started_at, min(repeats + 1, limit)
        if repeats >= limit:
            message = f"The same request was sent {limit} times within {seconds:g} seconds: "
            message += "is a program caught in a loop?"
            hint = "If that is intended, raise limits.runaway_requests, or set it to 0."
            raise RequestRepeated(message, hint=hint, retry_after=started_at + seconds - now)


# 10.4 metrics

Labels = tuple[Any, ...]  # label values, in the order of the label names
Series = dict[Labels, float]

# The upper bounds of a histogram's buckets.  OpenTelemetry's end at 82 s (GenAI metrics, 2026), but
# an agent's turn takes 2 to 60 s, long reasoning minutes, and the first byte comes after it.
METRIC_BUCKETS = {
    "completion_duration_seconds": (
        0.5,
        1.0,
        2.0,
        5.0,
        10.0,
        20.0,
        40.0,
        80.0,
        160.0,
        320.0,
        640.0,
    ),
    "completion_first_byte_seconds": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0),
}


class Metric(NamedTuple):
    """One metric of GET /metrics; its type follows from its name by Prometheus's conventions."""

    name: str  #: without this program's prefix
    labels: str  #: label names, separated by spaces
    help: str
    status: str = ""  #: the field of `Daemon.status` that holds its current value

    @property
    def full_name(self) -> str:
        """The name as exposed; `process_*` names are shared by all programs."""
        return self.name if self.name.startswith("process_") else f"aiclient_api_{self.name}"

    @property
    def kind(self) -> str:
        if self.name in METRIC_BUCKETS:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"


METRICS = (
    Metric("http_requests_total", "route method status", "HTTP requests; 499: the client left."),
    Metric("http_connections", "", "Open connections of clients.", "connections"),
    Metric("http_requests_in_flight", "", "Requests without a response yet.", "requests_in_flight"),
    Metric("completions_total", "provider model dialect status", "Requests to a provider."),
    Metric("completion_errors_total", "provider kind", "Failed responses, without cancelled ones."),
    Metric("completion_duration_seconds", "provider model", "Until a good response's last byte."),
    Metric("completion_first_byte_seconds", "provider model", "Until the upstream's first byte."),
    Metric("tokens_total", "provider model type", "Tokens by type; types do not overlap."),
    Metric("reasoning_tokens_total", "provider model", "Part of the tokens of type output."),
    Metric("credits_total", "provider model", "Credits in the provider's unit; some are derived."),
    Metric("upstream_refusals_total", "provider kind", "Failed attempts, retried ones included."),
    Metric("upstream_retries_total", "provider", "Attempts after the first one of a request."),
    Metric("provider_ready", "provider", "0 while it cools down, fails or is not signed in."),
    Metric("cool_down_seconds", "provider model", "Cool-down left; model *: the whole provider."),
    Metric("usage_rows_waiting", "", "Rows not in the usage database yet.", "usage_rows_waiting"),
    Metric("usage_rows_lost_total", "", "Rows that were never written.", "usage_rows_lost"),
    Metric("log_lines_dropped_total", "", "Log lines that were not written.", "log_lines_dropped"),
    Metric("build_info", "version python", "1, with the versions as labels."),
    Metric("process_start_time_seconds", "", "Start of the process in Unix seconds.", "started_at"),
    Metric("process_cpu_seconds_total", "", "CPU time used, in user and system mode.", "cpu_s"),
    Metric("process_resident_memory_bytes", "", "Resident memory in bytes.", "memory_bytes"),
    Metric("process_open_fds", "", "Open files and sockets.", "open_files"),
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus's text format
HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def write_samples(metric: Metric, series: dict[Labels, Any]) -> Iterator[str]:
    """The lines of a metric; for a histogram, of the count of each bucket and then the sum."""
    name, names, bounds = metric.full_name, metric.labels.split(), METRIC_BUCKETS.get(metric.name)
    for values, value in sorted(series.items()):
        pairs = zip(names, map(str, values), strict=True)
        labels = ",".join(f'{key}="{text.translate(LABEL_ESCAPES)}"' for key, text in pairs)
        if bounds is None:
            yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"
            continue
        total = 0
        for bound, count in zip([*(f"{b:g}" for b in bounds), "+Inf"], value[:-1], strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {value[-1]}"
        yield f"{name}_count{{{labels}}} {total}"


def read_status(status: Json) -> dict[str, Series]:
    """The current values in a `Daemon.status` as series of METRICS; unknown ones are left out."""
    values = {metric.name: status.get(metric.status) for metric in METRICS if metric.status}
    series: dict[str, Series] = {
        name: {(): value} for name, value in values.items() if value is not None
    }
    python = ".".join(map(str, sys.version_info[:3]))
    series["build_info"] = {(status["version"], python): 1}
    ready, cooldowns = series["provider_ready"], series["cool_down_seconds"] = {}, {}
    for row in status["providers"]:
        by_model = {"*": 0, **{item["model"]: item["seconds"] for item in row["cooldowns"]}}
        ready[row["name"],] = int(row["health"] in ("ready", "cooling down") and not by_model["*"])
        cooldowns.update({(row["name"], model): seconds for model, seconds in by_model.items()})
    return series


class Metrics:
    """Counters and histograms since the start, in memory; METRICS describes them."""

    def __init__(self) -> None:
        #: for a histogram the count of each bucket, the count above the last bound, the sum
        self.series: dict[str, dict[Labels, Any]] = {
            metric.name: defaultdict(int) for metric in METRICS if metric.kind == "counter"
        }
        for name, bounds in METRIC_BUCKETS.items():
            self.series[name] = defaultdict(([0] * (len(bounds) + 2)).copy)
        #: the PROVIDER/MODEL names that have their own series
        self.models = NameTable(MAX_METRIC_SERIES)

    def count_request(self, route: str, method: str, status: int) -> None:
        method = method if method in HTTP_METHODS else OTHER
        self.series["http_requests_total"][route, method, status] += 1

    def count_attempts(self, provider: str, attempts: int, refusals: list[str]) -> None:
        self.series["upstream_retries_total"][provider,] += max(0, attempts - 1)
        for kind in refusals:
            self.series["upstream_refusals_total"][provider, kind] += 1

    def observe(self, record: UsageRecord) -> None:
        """Counts one record, in some 2 microseconds."""
        provider, model, usage = record.provider, record.model, record.usage
        name, series = f"{provider}/{model}", self.series
        # Clients can name any model: unknown names get no series of their own.
        is_unknown = record.kind == "model_not_found" and name not in self.models.names
        if is_unknown or self.models.admit(name) != name:
            model = OTHER
        key = (provider, model)
        series["completions_total"][provider, model, record.dialect, record.status] += 1
        tokens = series["tokens_total"]
        tokens[provider, model, "input"] += usage.input
        tokens[provider, model, "cache_read"] += usage.cache_read
        tokens[provider, model, "cache_write"] += usage.cache_write
        tokens[provider, model, "output"] += usage.output
        series["reasoning_tokens_total"][key] += usage.reasoning
        series["credits_total"][key] += usage.nano_credits / 1e9
        if not record.kind:
            self.add_seconds("completion_duration_seconds", key, record.duration_s)
        elif record.kind != "cancelled":
            series["completion_errors_total"][provider, record.kind] += 1
        if record.first_byte_s is not None:
            self.add_seconds("completion_first_byte_seconds", key, record.first_byte_s)

    def add_seconds(self, name: str, labels: Labels, seconds: float) -> None:
        """Counts one observation; a bucket includes its upper bound."""
        row = self.series[name][labels]
        row[bisect_left(METRIC_BUCKETS[name], seconds)] += 1
        row[-1] += seconds

    def render(self, measured: dict[str, Series]) -> str:
        """Everything in the text format 0.0.4; `measured` holds the values read at scrape time."""
        lines = []
        for metric in METRICS:
            name = metric.full_name
            series = measured.get(metric.name) or self.series.get(metric.name, {})
            if series:
                lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
                lines += write_samples(metric, series)
        return "\n".join(lines) + "\n"


# 10.5 the cache guard
#
# A prompt cache works by prefix: the tools, then the system prompt, then the messages in order.
# What changes early in a prompt from request to request is silently billed in full again.  So each
# conversation's last prompt is kept as salted hashes of its blocks, never as text.

# Cache breakpoints move to the newest block with every request; they are not part of the prompt.
CACHE_BREAKPOINT_KEYS = frozenset(
    ("cache_control", "copilot_cache_control", "prompt_cache_breakpoint", "cachePoint")
)
# Settings that the vendors put into the prompt, or that invalidate a cache (their docs, 2026).
PROMPT_SETTINGS = (
    "tool_choice", "thinking", "reasoning", "reasoning_effort", "output_config",
    "response_format", "text", "additionalModelRequestFields",
)  # fmt: skip
# Roles of a turn that are shown; a client's other ones could be anything.
TURN_ROLES = frozenset((
    "system", "developer", "user", "assistant", "reasoning", "tool", "function", "function_call",
    "function_call_output", "custom_tool_call", "custom_tool_call_output",
))  # fmt: skip
SYSTEM_HINT = "a date, a time or an id in the system prompt?"
# Part of a prompt -> what may have changed there.
CACHE_HINTS = {
    "tools": "the tools come in another order, or one of them differs?",
    "settings": "thinking, effort, tool choice or the output format differs from the last request?",
    "system": SYSTEM_HINT,
    "instructions": SYSTEM_HINT,
    "developer": SYSTEM_HINT,
}
TURN_HINT = (
    "an old message came back changed: another date, id or reminder in it, its thinking dropped, "
    "a call rewritten, a tool result cut?"
)


def normalize_block(value: Any) -> Any:
    """A block as a cache sees it: without breakpoints, its keys sorted, lone text unwrapped.

    Nested values keep their key order: a call's arguments are shown to the model as text.
    """
    if isinstance(value, list):
        blocks = [normalize_block(item) for item in value]
        return blocks[0] if len(blocks) == 1 and isinstance(blocks[0], str) else blocks
    if not isinstance(value, dict):
        return value
    if "text" in value and value.keys() - CACHE_BREAKPOINT_KEYS == {"type", "text"}:
        return value["text"]
    return [
        (key, normalize_block(item) if key == "content" else item)
        for key, item in sorted(value.items())
        if key not in CACHE_BREAKPOINT_KEYS
    ]


def hash_block(block: Any, salt: bytes) -> tuple[int, int]:
    """(64 bits that reveal nothing without the salt, size in bytes) of one block of a prompt.

    Equal values have equal bytes in marshal's version 0, which has no references between objects.
    It takes a third of the time of JSON, Python's keyed hash a fifth of BLAKE2's (in 2026-11).
    """
    data = marshal.dumps(normalize_block(block), 0)
    return hash((salt, data)) & 0xFFFF_FFFF_FFFF_FFFF, len(data)


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one; an empty value as an empty list."""
    return value if isinstance(value, list) else [value] if value else []


def kiro_sections(body: Json) -> Json:
    """The tools and history of a conversation state, without what depends on the account."""
    state = get_dict(body, "conversationState")
    tools: list[Any] = []
    turns: list[Any] = []
    for entry in [*as_list(state.get("history")), state.get("currentMessage")]:
        if not isinstance(entry, dict):
            continue
        message = get_dict(entry, "userInputMessage")
        if not message:
            turns.append({"role": "assistant", **get_dict(entry, "assistantResponseMessage")})
            continue
        context = get_dict(message, "userInputMessageContext")
        tools = as_list(context.get("tools")) or tools
        content = {key: message.get(key) for key in ("content", "images", "documents")}
        turns.append({"role": "user", **content, "results": context.get("toolResults")})
    return {"tools": tools, "history": turns}


class Prompt(NamedTuple):
    """The structure of a prompt, by blocks; none of its text."""

    hashes: array[int]
    sizes: array[int]  #: in bytes
    parts: list[str]  #: of each block: its section before the turns, or the role of a turn
    turns: str  #: the dialect's name of the turns

    def share(self, at: int) -> float:
        """The share of the prompt from block `at` on, by bytes."""
        return sum(self.sizes[at:]) / (sum(self.sizes) or 1)

    def name(self, at: int) -> str:
        """`tools[3]`, `system[0]`, `settings`, `messages[4] (user)`."""
        part, settings_at = self.parts[at], self.parts.index("settings")
        if at > settings_at:
            return f"{self.turns}[{at - settings_at - 1}] ({part})"
        return part if at == settings_at else f"{part}[{at - self.parts.index(part)}]"


def read_prompt(dialect: str, body: Json, salt: bytes) -> Prompt:
    """The prompt in a body of an upstream dialect; takes 2 ms per megabyte."""
    turns_name = {"responses": "input", "kiro": "history"}.get(dialect, "messages")
    system_name = {"responses": "instructions", "messages": "system"}.get(dialect, "")
    if dialect == "kiro":
        body = kiro_sections(body)
    tools, system = as_list(body.get("tools")), as_list(body.get(system_name))
    parts = ["tools"] * len(tools) + [system_name] * len(system) + ["settings"]
    turns = as_list(body.get(turns_name))[: max(0, MAX_WATCHED_BLOCKS - len(parts))]
    for turn in turns:
        entry = turn if isinstance(turn, dict) else {"role": "user"}
        role = str(entry.get("role") or entry.get("type"))
        parts.append(sys.intern(role) if role in TURN_ROLES else "other")
    settings = [body.get(key) for key in PROMPT_SETTINGS]
    blocks = [hash_block(block, salt) for block in (*tools, *system, settings, *turns)]
    hashes, sizes = zip(*blocks, strict=True)
    return Prompt(array("Q", hashes), array("I", sizes), parts, turns_name)


@dataclass(slots=True)
class TrackedConversation:
    row: Json  #: of `/v1/usage?cache=1`
    prompt: Prompt  #: the last one
    responded_at: float = 0.0  #: Unix seconds of the start of the last response
    cached: int = 0  #: tokens of the last prompt that should be cached
    #: part of a prompt -> a `changed` for the row: the last block that broke the cache there
    misses: dict[str, Json] = field(default_factory=dict)
    logged_at: dict[str, float] = field(default_factory=dict)  #: part of a prompt -> Unix seconds

    def compare(self, prompt: Prompt, record: UsageRecord, has_figures: bool) -> Json | None:
        """Counts a cache miss of the next request; returns its details if they are news."""
        pairs = enumerate(zip(self.prompt.hashes, prompt.hashes, strict=False))
        at = next((at for at, (old_hash, new_hash) in pairs if old_hash != new_hash), None)
        expires_at = self.row["last_at"] + CACHE_LIFE_SECONDS
        if at is None or not self.responded_at <= record.at <= expires_at:
            return None
        # A client that drops or summarizes its older messages does so on purpose.
        if at > prompt.parts.index("settings") and len(prompt.hashes) < len(self.prompt.hashes):
            return None
        tokens = record.usage.prompt
        cached = min(self.cached, tokens)
        lost = cached - record.usage.cache_read
        if not has_figures:
            lost = int(min(self.cached * self.prompt.share(at), tokens * prompt.share(at)))
        if lost <= max(MIN_CACHED_TOKENS, cached * CACHE_SLACK_SHARE):
            return None
        self.row["lost_tokens"] += lost
        # The last block of a section that has become shorter is the old prompt's.
        owner = max(prompt, self.prompt, key=lambda p: p.parts.index("settings"))
        part, block = owner.parts[at], owner.name(at)
        hint = CACHE_HINTS.get(part, TURN_HINT)
        if block == "history[0] (user)":
            hint += " (Kiro's first message includes the system prompt)"
        times = self.misses[part]["times"] + 1 if part in self.misses else 1
        self.misses[part] = {"block": block, "times": times, "hint": hint}
        self.row["changed"] = max(self.misses.values(), key=lambda miss: miss["times"])
        if record.at - self.logged_at.get(part, -math.inf) < CACHE_QUIET_SECONDS:
            return None
        self.logged_at[part] = record.at
        names = {name: self.row[name] for name in ("provider", "model", "conversation")}
        return {**names, "block": block, "tokens": lost, "hint": hint}

    def update(self, prompt: Prompt, record: UsageRecord, reports_writes: bool) -> None:
        """`reports_writes`: the service reports what it writes to the cache."""
        usage, row = record.usage, self.row
        row["calls"] += 1
        row["input_tokens"] += usage.prompt
        row["cache_read_tokens"] += usage.cache_read
        row["last_at"] = record.at
        first_byte_s = record.duration_s if record.first_byte_s is None else record.first_byte_s
        self.responded_at = record.at + first_byte_s
        self.prompt = prompt
        self.cached = usage.cache_read + usage.cache_write
        if not self.cached and not reports_writes:
            self.cached = usage.prompt  # a guess: all of it


class CacheGuard:
    """Finds the block that broke a prompt cache, from the last prompt of each conversation."""

    def __init__(self, salt: bytes) -> None:
        self.salt = salt
        #: (conversation, provider, model); least recently used first
        self.watched: dict[tuple[str, str, str], TrackedConversation] = {}
        #: (provider, model) of services that report cache reads -> whether they report writes too
        self.reporting: dict[tuple[str, str], bool] = {}

    def record(
        self, record: UsageRecord, session: str, opening: str, prompt: Prompt
    ) -> Json | None:
        """Compares with the previous request; returns the details of a miss that is news.

        A conversation is known by its session, otherwise by its client, and its first message.
        """
        pair, usage = (record.provider, record.model), record.usage
        is_reported = usage.source == "reported"
        if is_reported and (usage.cache_read or usage.cache_write):
            self.reporting[pair] = self.reporting.get(pair, False) or usage.cache_write > 0
        has_figures = is_reported and pair in self.reporting  # rather than none of them
        source = f"session {session}" if session else record.label
        name = f"{hash_block((source, opening), self.salt)[0] >> 32:08x}"
        tracked, miss = self.watched.pop((name, *pair), None), None
        if tracked is not None:
            miss = tracked.compare(prompt, record, has_figures)
        else:
            row: Json = {"conversation": name, "provider": pair[0], "model": pair[1]}
            row |= {"label": record.label, "calls": 0, "hit_ratio": None, "input_tokens": 0}
            row |= {"cache_read_tokens": 0, "lost_tokens": 0, "last_at": 0.0, "changed": None}
            tracked = TrackedConversation(row, prompt)
        self.watched[(name, *pair)] = tracked
        if len(self.watched) > MAX_WATCHED:
            del self.watched[next(iter(self.watched))]
        tracked.update(prompt, record, has_figures and self.reporting[pair])
        if pair in self.reporting:
            ratio = tracked.row["cache_read_tokens"] / tracked.row["input_tokens"]
            tracked.row["hit_ratio"] = round(ratio, 4)
        return miss

    def report(self) -> list[Json]:
        """The rows of `/v1/usage?cache=1`, latest first."""
        rows = (tracked.row for tracked in self.watched.values())
        return sorted(rows, key=lambda row: row["last_at"], reverse=True)


# ==== the I/O line ==============================================================================
#
# Above: pure functions of values.  Below: sockets, files, clocks, processes.

# ---- 11. Ticker --------------------------------------------------------------------------------

UNQUOTED_VALUE = re.compile(r"[!#-<>-~]+")
event_logger = functools.cache(lambda: logging.getLogger("aiclient-api"))


def log_event(level: str, event: str, **details: object) -> None:
    """Logs one line: `event key=value ...`.  Never pass content or a secret."""
    logger, level_number = event_logger(), LOG_LEVELS[level]
    if not logger.isEnabledFor(level_number):
        return
    texts = list(map(str, details.values()))
    if "" in texts or not UNQUOTED_VALUE.fullmatch("".join(texts)):
        texts = [text if UNQUOTED_VALUE.fullmatch(text) else json.dumps(text) for text in texts]
    pairs = map("=".join, zip(details, texts, strict=True))
    line = redact(" ".join([event, *pairs]), MAX_LOG_LINE)
    # As `Logger.log` does, less the search for the caller.
    logger.handle(logging.LogRecord(logger.name, level_number, "", 0, line, (), None))


class LogHandler:
    """Writes `2026-11-22T13:14:15.123Z INFO event key=value`, without secrets, to standard error.

    A traceback follows its line, indented, so that no line of it looks like an event.
    `logging` needs no more of a handler than this, and its own takes ten calls for a line.
    """

    level = 0  # everything
    #: returns the tokens and keys in use, whatever their form
    secrets: Callable[[], Iterable[str]] = tuple

    def handle(self, record: logging.LogRecord) -> None:
        # No report of a line that cannot be written: there is nowhere to write it.
        with contextlib.suppress(OSError, ValueError):
            self.write(self.format(record) + "\n")

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = one_line(record.getMessage())
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname} {message}"
        if record.exc_info:
            trace = redact(logging.Formatter().formatException(record.exc_info), MAX_LOG_LINE)
            line += "".join(f"\n  {one_line(row)}" for row in trace.split("\n"))
        return mask_secrets(line, self.secrets())


def restrict_to_owner(fd: int) -> bool:
    """Removes the access of others; returns whether there was any.  Raises OSError if not ours."""
    status = os.fstat(fd)
    has_owner = hasattr(os, "getuid") and stat.S_ISREG(status.st_mode)
    if not has_owner or not status.st_mode & 0o077:
        return False
    os.fchmod(fd, 0o600)
    return True


def make_private(fd: int, path: str, subject: str) -> None:
    """`restrict_to_owner` with a warning about `subject`, also if the mode cannot be changed."""
    try:
        if restrict_to_owner(fd):
            log_event("warning", f"{subject}_was_readable", path=path)
    except OSError as error:
        log_event("warning", f"{subject}_is_readable", path=path, reason=error.strerror)


def check_link(path: str) -> None:
    """Raises PermissionError if `path` is a symbolic link that another user created."""
    if not hasattr(os, "getuid") or not os.path.islink(path):
        return
    if os.lstat(path).st_uid not in (os.getuid(), 0):
        raise PermissionError(errno.EPERM, f"{path} is a symbolic link created by another user")


class LogFile(LogHandler):
    """Writes to a file instead, rotated by size and reopened after it was moved away.

    A line that cannot be written is dropped and counted: a full disk must not stop the gateway.
    With `is_stderr` standard error goes to the same file, which catches Python's own messages.
    """

    dropped = 0  #: lines
    fd = -1

    def __init__(self, path: str, is_stderr: bool = False, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.path, self.is_stderr, self.max_bytes = path, is_stderr, max_bytes
        self.open()

    def open(self) -> None:
        """Opens the file at `path`; raises OSError, with the old file still open."""
        check_link(self.path)
        # O_NONBLOCK: without waiting for a FIFO's reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self.path, flags, 0o600)
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd
        if self.is_stderr:
            os.dup2(fd, 2)
        status = os.fstat(fd)
        self.size = status.st_size
        self.identity = status.st_dev, status.st_ino
        make_private(fd, self.path, "log")

    def write(self, text: str) -> None:
        """Appends `text`, complete lines, in one write."""
        data = text.encode("utf-8", "backslashreplace")
        try:
            self.reopen_or_rotate(len(data))
            os.write(self.fd, data)
        except OSError:
            self.dropped += text.count("\n")

    def reopen_or_rotate(self, more_bytes: int) -> None:
        """Rotates `daemon.log` -> `daemon.log.1` -> `daemon.log.2`, which is overwritten."""
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            # Otherwise it was moved away, or rotated by the process that takes over.
            if (status.st_dev, status.st_ino) == self.identity:
                if not status.st_size or status.st_size + more_bytes <= self.max_bytes:
                    return
                for index in range(LOG_FILES - 1, 0, -1):
                    older = self.path if index == 1 else f"{self.path}.{index - 1}"
                    if os.path.exists(older):
                        os.replace(older, f"{self.path}.{index}")
        self.open()


def start_log(level: str, path: str = "", is_stderr: bool = False) -> LogFile | None:
    """Logs to a file, or to standard error: a line per event, times in UTC.  Raises OSError."""
    file = LogFile(path, is_stderr) if path else None
    handlers: list[Any] = logging.getLogger().handlers
    handlers[:] = [file or LogHandler()]
    set_log_level(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # The documented way to skip what no line shows (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    setattr(logging, "_srcfile", None)  # noqa: B010 - see the same page
    return file


def mask_in_log(secrets: Callable[[], Iterable[str]]) -> None:
    """Masks what `secrets` returns, called for each line."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogHandler):
            handler.secrets = secrets


def set_log_level(level: str) -> None:
    logging.getLogger().setLevel(LOG_LEVELS[level])


def internal_error(event: str) -> ApiError:
    """The error response to an unexpected exception; logs the traceback."""
    event_logger().exception(event)
    return ApiError("Internal error; see the log of the gateway.")


class Ticker:
    """One coarse clock for every deadline: a timer per read would cost more than the read.

    While there are watchers, they are called every TICK_SECONDS with the loop's monotonic time.
    """

    def __init__(self) -> None:
        self.watchers: set[Callable[[float], None]] = set()
        self.timer: asyncio.TimerHandle | None = None

    def add(self, watcher: Callable[[float], None]) -> None:
        self.watchers.add(watcher)
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self.tick)

    def discard(self, watcher: Callable[[float], None]) -> None:
        self.watchers.discard(watcher)

    def tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for watcher in list(self.watchers):
            try:
                watcher(now)
            except Exception:  # noqa: BLE001 - one bug must not disable every deadline
                self.watchers.discard(watcher)
                event_logger().exception("a ticker callback failed")
        self.timer = loop.call_later(TICK_SECONDS, self.tick) if self.watchers else None


if TYPE_CHECKING:
    ProtocolBase = asyncio.Protocol
else:
    ProtocolBase = object  # asyncio needs the methods, not the base class: see `lazy_module`


class StreamProtocol(ProtocolBase):
    """One connection: bytes are buffered, or with a `sink` passed to it as they arrive.

    Only one task at a time may wait for it.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()
        self.sink: Callable[[bytes], None] | None = None
        self.at_eof = False  #: the peer has sent EOF
        self.lost = False
        self.error: Exception | None = None  #: that broke the connection
        self.has_received = False  #: something, since this was last set to False
        self.is_held = self.reading_paused = self.writing_paused = False
        self.waiter: asyncio.Future[None] | None = None
        #: the proxy tunnel under this TLS connection, referenced to keep it alive
        self.tunnel: StreamProtocol | None = None

    @property
    def is_disconnected(self) -> bool:
        return self.at_eof or self.lost

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        # asyncio allocates 256 KiB for each recv, whose fresh pages cost more than the recv itself
        # (measured: 37 us against 11); its transports read the size from this attribute.
        setattr(transport, "max_size", RECV_BYTES)  # noqa: B010 - not in the declared interface

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        if self.sink is not None:
            self.sink(data)
            return
        self.buffer += data
        if len(self.buffer) > STREAM_BUFFER_BYTES:
            self.update_reading()
        self.notify()

    def eof_received(self) -> bool:
        """True keeps the connection open for writing, which TLS cannot."""
        self.at_eof = True
        self.notify()
        return self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.error = True, exc
        self.notify()

    def pause_writing(self, paused: bool = True) -> None:
        self.writing_paused = paused
        self.notify()

    def resume_writing(self) -> None:
        self.pause_writing(False)

    # For the task that owns the connection

    def notify(self) -> None:
        """Called after each change: bytes in the buffer, a disconnect, the flow of writing."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def next_change(self) -> asyncio.Future[None]:
        self.waiter = asyncio.Future(loop=self.loop)
        return self.waiter

    async def receive(self) -> None:
        """Waits for more bytes; raises EOFError, or the OSError that broke the connection."""
        if self.reading_paused:
            self.update_reading()
        size = len(self.buffer)
        while len(self.buffer) == size:
            if self.is_disconnected:
                raise self.error or EOFError
            await self.next_change()

    async def receive_head(self) -> bytes:
        """A message head; raises WireError, and as `receive`, also for an incomplete head."""
        buffer, scanned = self.buffer, 0
        while (end := head_end(buffer, scanned)) < 0 and len(buffer) <= MAX_HEAD_BYTES:
            self.check_partial_head(scanned)
            scanned = len(buffer)
            await self.receive()
        if not 0 < end <= MAX_HEAD_BYTES:
            raise WireError("head too long", 431)
        head = bytes(buffer[:end])
        del buffer[:end]
        return head

    def check_partial_head(self, scanned: int) -> None:
        """Raises WireError as soon as an incomplete head is invalid."""

    def read_buffer(self) -> bytes:
        """Empties the buffer."""
        data = bytes(self.buffer)
        self.buffer.clear()
        if self.reading_paused:
            self.update_reading()
        return data

    async def drain(self) -> None:
        while self.writing_paused and not self.lost:
            await self.next_change()

    async def wait_closed(self) -> None:
        while not self.lost:
            await self.next_change()

    def hold(self, paused: bool) -> None:
        """Pauses or resumes reading."""
        self.is_held = paused
        self.update_reading()

    def update_reading(self) -> None:
        self.reading_paused = self.is_held or len(self.buffer) > STREAM_BUFFER_BYTES
        if self.reading_paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


# ---- 12. HTTP client ---------------------------------------------------------------------------


class Origin(NamedTuple):
    """The key of the connection pool: only requests with the same origin share a connection."""

    scheme: str
    host: str
    port: int
    #: the proxy's URL, or ""
    proxy: str


def split_url(url: str) -> tuple[str, str, int, str]:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, parts.hostname or "", port, path


def format_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_excepted(host: str, port: int, entry: str) -> bool:
    """Whether an entry of NO_PROXY names a host: `*`, an address, a CIDR block, or a domain.

    A domain covers all names below it: for curl `.x` is `x`, for Go `*.x` is not x itself.
    """
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    name = split_host(entry.removeprefix("*").lstrip("."))
    if name is None or name[1] not in ("", str(port)):
        return entry == "*"
    domain = name[0].strip("[]").rstrip(".")
    return host.endswith(f".{domain}") or (host == domain and not entry.startswith("*"))


PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def read_proxy_variables(environ: Mapping[str, str]) -> Callable[[str, int], str]:
    """What gives the proxy's URL for a host and a port, or "": all upstreams are https.

    Raises ConfigError, which never contains the value.
    """
    variable = next((name for name in PROXY_VARIABLES if environ.get(name, "").strip()), "")
    if not variable and sys.platform in ("darwin", "win32"):
        return system_proxy
    url = proxy_url(environ.get(variable, ""))
    if variable and not url:
        raise ConfigError(f"environment: {variable}: {PROXY_FORM}")
    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY", "")
    entries = re.split(r"[,\s]+", exceptions.lower())

    def choose(host: str, port: int) -> str:
        host = host.rstrip(".").lower()
        return "" if any(is_excepted(host, port, entry) for entry in entries) else url

    return choose


def system_proxy(host: str, port: int) -> str:
    if urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    return proxy_url(proxies.get("https") or proxies.get("all") or "")


def count_unsent(connection: socket.socket) -> int:
    """Bytes that the peer has not acknowledged; 0 if the system does not report them."""
    if fcntl is None or termios is None:
        return 0
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except (OSError, ValueError):
        return 0  # closed
    return int.from_bytes(queued, sys.byteorder)


def is_readable(connection: socket.socket) -> bool:
    """Whether a socket has data, EOF or an error that the event loop has not seen yet."""
    if not hasattr(select, "poll"):
        return False  # Windows: the loop notices a moment later
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


class UpstreamResponse:
    """The head of a response, and its incoming body.  Its opener must `close` it.

    `read_some` returns the bytes received so far, otherwise the next ones; b"" at the end.
    `relay` passes all further bytes to `sink`; it returns at the end of the body or after `stop`,
    and raises ApiError, also one given to `fail`.  `hold` pauses or resumes reading.
    `close` returns the connection to the pool if the body was read to its end, otherwise drops it;
    `is_complete`: the response is complete, so that only the end of the body can be missing.
    """

    def __init__(
        self, client: HttpClient, connection: PooledConnection, head: ResponseHead, body: Body
    ) -> None:
        self.status, self.headers, self.body = head.status, head.headers, body
        self.client, self.connection, self.hold = client, connection, connection.hold
        self.keep_alive = head.minor == 1 and not head.headers.has_token("connection", "close")
        coding = head.headers.get("content-encoding", "identity").lower()
        # All requests ask for identity, but a middlebox may compress all the same.
        wbits = {"gzip": GZIP_WBITS, "x-gzip": GZIP_WBITS, "deflate": ZLIB_WBITS}.get(coding)
        self.decompressor = zlib.decompressobj(wbits) if wbits else None
        self.error: ApiError | None = None
        if wbits is None and coding != "identity":
            self.error = UpstreamError("The upstream's response has an unrequested coding.")
        #: no more is delivered: the body is complete, or was stopped
        self.finished = body.is_complete or self.error is not None
        self.returned = b""  # by `push_back`
        self.last_received_at = time.monotonic()
        self.linger_timer: asyncio.TimerHandle | None = None
        client.watchers.add(self.watch)

    def watch(self, now: float) -> None:
        limit_s = self.client.network.stream_idle_seconds
        if self.connection.has_received or self.connection.reading_paused:
            self.connection.has_received = False
            self.last_received_at = now
        elif now - self.last_received_at > limit_s:
            self.fail(UpstreamTimeout(f"The upstream was silent for {limit_s:g} s."))

    def decode(self, data: bytes, sink: Callable[[bytes], None]) -> None:
        """Passes the payload in `data` to `sink`."""
        try:
            payload = self.body.feed(data)
            if self.decompressor is not None:
                payload = decompress(self.decompressor, payload, MAX_INFLATED_BYTES)
                if len(payload) > MAX_INFLATED_BYTES:
                    raise WireError("excessive compression ratio")
            if payload:
                sink(payload)
        except WireError as error:
            self.fail(UpstreamError(f"The upstream's response is malformed: {error}."))
        except Exception:  # noqa: BLE001 - the sink's fault; asyncio would drop the connection
            self.fail(internal_error("a response could not be processed"))
        if self.body.is_complete:
            self.finish()

    async def wait(self) -> None:
        """Waits until something is received, or the body has ended."""
        if not self.connection.is_disconnected:
            await self.connection.next_change()
            return
        with contextlib.suppress(WireError):
            self.body.on_eof()
        self.finish(self.connection.closed_cleanly())

    def finish(self, cleanly: bool = True) -> None:
        """The body has ended: all of it, also of a compressed one, must be there."""
        is_decoded = self.decompressor is None or self.decompressor.eof
        if cleanly and self.body.is_complete and is_decoded:
            self.stop()
        else:
            self.fail(UpstreamError(TRUNCATED_RESPONSE))

    def fail(self, error: ApiError) -> None:
        if not self.finished:
            self.error = error
            self.stop()

    def stop(self) -> None:
        self.finished = True
        self.connection.sink = None
        self.connection.notify()

    async def read_some(self) -> bytes:
        payload, self.returned = bytearray(self.returned), b""
        while not payload and not self.finished:
            if self.connection.buffer:
                self.decode(self.connection.read_buffer(), payload.extend)
            else:
                await self.wait()
        if self.error and not payload:
            raise self.error
        return bytes(payload)

    def push_back(self, data: bytes) -> None:
        self.returned = data + self.returned

    async def read(self, limit: int) -> bytes:
        """The entire body; raises UpstreamError if it exceeds `limit` bytes."""
        body = bytearray()
        while data := await self.read_some():
            body += data
            if len(body) > limit:
                raise UpstreamError(f"The upstream's response is larger than {limit // KIB} KiB.")
        return bytes(body)

    async def relay(self, sink: Callable[[bytes], None]) -> None:
        connection = self.connection
        self.headers = Headers()  # read by now, and the stream may be long
        if self.returned:
            sink(self.returned)
        if not self.finished:
            connection.sink = functools.partial(self.decode, sink=sink)
            connection.sink(connection.read_buffer())
        while not self.finished:
            await self.wait()
        if self.error:
            raise self.error

    def close(self, is_complete: bool) -> None:
        self.client.watchers.discard(self.watch)
        connection = self.connection
        connection.sink = self.read_tail
        if connection.reading_paused:
            connection.hold(False)
        is_reusable = self.keep_alive and not self.error and not connection.is_disconnected
        if not is_reusable or not (is_complete or self.body.is_complete):
            self.release()
            return
        if not self.body.is_complete:
            # The last chunk is often a packet of its own, and a new TLS connection is expensive.
            self.linger_timer = connection.loop.call_later(LINGER_SECONDS, self.release)
        self.read_tail(connection.read_buffer())

    def read_tail(self, data: bytes) -> None:
        """Returns the connection to the pool at the end of the body, if nothing follows it."""
        try:
            self.body.feed(data)
        except WireError:
            self.release()
        else:
            if self.body.is_complete:
                self.release(reusable=not self.body.excess)

    def release(self, reusable: bool = False) -> None:
        if self.linger_timer is not None:
            self.linger_timer.cancel()
        self.connection.sink = None
        if reusable:
            self.client.pool.release(self.connection, time.monotonic())
        else:
            self.connection.transport.abort()


class PooledConnection(StreamProtocol):
    is_reused = False
    idle_since = 0.0

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin

    def is_dead(self, now: float) -> bool:
        # Whatever an idle peer sends, it is not a response.
        if self.is_disconnected or self.buffer or self.transport.is_closing():
            return True
        is_expired = now - self.idle_since > POOL_IDLE_SECONDS
        return is_expired or is_readable(self.transport.get_extra_info("socket"))

    def closed_cleanly(self) -> bool:
        """Whether the peer closed it on purpose: over TLS with a close_notify (RFC 9112, 9.8)."""
        tls = self.transport.get_extra_info("ssl_object")
        try:
            return self.at_eof if tls is None else tls.read(1) == b""
        except ssl.SSLError as error:
            return isinstance(error, ssl.SSLZeroReturnError)

    def left_unread(self, error: Exception, message: bytes, sent_at: float) -> bool:
        """Whether the peer, which then closed the connection, cannot have read `message`.

        Only then may a POST be sent again (RFC 9110 section 9.2.2).  A peer that closes normally
        acknowledges what it has read.  A reset acknowledges nothing: an immediate one means that
        the peer had already closed the connection.
        """
        if isinstance(error, EOFError):
            unsent = count_unsent(self.transport.get_extra_info("socket"))
            return unsent + self.transport.get_write_buffer_size() >= len(message)
        return time.monotonic() - sent_at < RESET_SECONDS


class Pool:
    """Idle connections by origin.  No method waits or opens anything."""

    def __init__(self) -> None:
        self.idle: dict[Origin, list[PooledConnection]] = {}

    def acquire(self, origin: Origin, now: float) -> PooledConnection | None:
        """The most recently used connection, so that the others can expire."""
        stack = self.idle.get(origin, [])
        while stack:
            connection = stack.pop()
            if not connection.is_dead(now):
                return connection
            connection.transport.abort()
        return None

    def release(self, connection: PooledConnection, now: float) -> None:
        connection.is_reused = True
        connection.idle_since = now
        stack = self.idle.setdefault(connection.origin, [])
        stack.append(connection)
        if len(stack) > POOL_IDLE_PER_HOST:
            stack.pop(0).transport.abort()

    def close_expired(self, now: float) -> None:
        """With `math.inf` all."""
        for origin, stack in list(self.idle.items()):
            for connection in [c for c in stack if c.is_dead(now)]:
                stack.remove(connection)
                connection.transport.abort()
            if not stack:
                del self.idle[origin]


class HttpClient:
    """HTTP/1.1 to upstreams: pooled, no redirects followed, no pipelining."""

    def __init__(self, network: NetworkConfig, ticker: Ticker) -> None:
        self.network = network
        own = {"https_proxy": network.proxy}  # no exceptions
        self.choose_proxy = read_proxy_variables(own if network.proxy else os.environ)
        self.ticker = ticker
        self.pool = Pool()
        self.plan = functools.lru_cache(maxsize=256)(self.plan_url)  # few, but queries vary
        self.clock_offset = time.time() - time.monotonic()
        ticker.add(self.watch)
        #: for the requests in flight: the client's own watcher keeps the ticker running
        self.watchers = ticker.watchers

    def close(self) -> None:
        self.ticker.discard(self.watch)
        self.pool.close_expired(math.inf)

    def watch(self, now: float) -> None:
        """Drops expired connections, and all after a sleep (Linux's monotonic clock stops then)."""
        offset = time.time() - time.monotonic()
        jumped_s = offset - self.clock_offset
        if abs(jumped_s) > CLOCK_JUMP_SECONDS:
            log_event("info", "clock_jumped", seconds=round(jumped_s))
            self.clock_offset, now = offset, math.inf
        self.pool.close_expired(now)

    @functools.cached_property
    def tls_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self.network.ca_file:
            context.load_verify_locations(self.network.ca_file)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def plan_url(self, url: str) -> tuple[Origin, str, str]:
        """(origin, Host field, path), cached by `plan`; loopback never goes through a proxy."""
        scheme, host, port, path = split_url(url)
        proxy = "" if is_loopback(host) else self.choose_proxy(host, port)
        is_default_port = (scheme, port) in (("https", 443), ("http", 80))
        suffix = "" if is_default_port else f":{port}"
        return Origin(scheme, host, port, proxy), format_host(host) + suffix, path

    async def open(
        self,
        method: str,
        url: str,
        headers: Callable[[], dict[str, str]],
        body: bytes = b"",
        first_byte_s: float | None = None,
    ) -> UpstreamResponse:
        """Sends a request, reads the response's head; raises UpstreamError or UpstreamTimeout.

        `headers` is called for each attempt: some values must never be sent twice.  A request that
        a stale pooled connection did not deliver is sent once more on a fresh one.
        """
        origin, host, path = self.plan(url)
        length_header = [("Content-Length", str(len(body)))] if body or method == "POST" else []
        limit_s = first_byte_s or self.network.first_byte_seconds
        connection = self.pool.acquire(origin, time.monotonic())
        while True:
            connection = connection or await self.connect(origin)
            all_headers = [("Host", host), *headers().items(), *length_header]
            message = write_head(f"{method} {path} HTTP/1.1", all_headers) + body
            response = await self.exchange(connection, method, message, limit_s)
            if response is not None:
                return response
            connection = None

    async def exchange(
        self, connection: PooledConnection, method: str, message: bytes, limit_s: float
    ) -> UpstreamResponse | None:
        """One request on one connection; None if it was stale and another may be tried."""
        host = connection.origin.host
        sent_at = time.monotonic()
        connection.has_received = False
        response: UpstreamResponse | None = None
        timer = connection.loop.call_later(limit_s, connection.transport.abort)
        try:
            connection.transport.write(message)
            head = await self.read_head(connection)
            response = UpstreamResponse(self, connection, head, response_body(head, method))
            return response
        except (EOFError, OSError) as error:
            if time.monotonic() - sent_at >= limit_s:
                raise UpstreamTimeout(f"{host} did not respond within {limit_s:g} s.") from None
            may_be_stale = connection.is_reused and not connection.has_received
            is_safe = method in ("GET", "HEAD")  # RFC 9110 section 9.2.1
            was_unread = is_safe or connection.left_unread(error, message, sent_at)
            if may_be_stale and was_unread:
                return None
            stage = "mid-response" if connection.has_received else "without a response"
            raise UpstreamError(f"{host} closed the connection {stage}.") from None
        except WireError as error:
            raise UpstreamError(f"{host} sent a malformed response: {error}.") from None
        finally:
            timer.cancel()
            if response is None:
                connection.transport.abort()

    @staticmethod
    async def read_head(connection: PooledConnection) -> ResponseHead:
        """The final head; raises WireError, EOFError, also within a head, and OSError."""
        for _ in range(16):  # servers send one or two, 100 and 103
            head = parse_response_head(await connection.receive_head())
            if head.status == 101:
                raise WireError("unexpected 101 Switching Protocols")
            if head.status >= 200:
                return head
        raise WireError("too many interim responses")

    async def connect(self, origin: Origin) -> PooledConnection:
        """A new connection, through the proxy if one is configured; raises Unreachable."""
        target = origin.host if not origin.proxy else f"{origin.host} through the proxy"
        seconds = self.network.connect_seconds
        open_connection = self.connect_via_proxy if origin.proxy else self.connect_directly
        try:
            async with asyncio.timeout(seconds):
                return await open_connection(origin)
        except TimeoutError:
            raise Unreachable(f"No connection to {target} within {seconds:g} s.") from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(
                f"The certificate of {target} is not trusted: {error.verify_message}.",
                hint="If a company proxy inspects TLS, set network.ca_file to its CA bundle.",
            ) from None
        except (OSError, EOFError) as error:
            reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else "EOF"
            raise Unreachable(f"No connection to {target}: {reason}.") from None
        except WireError as error:
            raise Unreachable(f"The proxy sent a malformed response: {error}.") from None

    async def connect_directly(self, origin: Origin) -> PooledConnection:
        loop = asyncio.get_running_loop()
        tls_options: Json = {}
        if origin.scheme == "https":
            tls_options = {"ssl": self.tls_context, "server_hostname": origin.host}
        _, connection = await loop.create_connection(
            lambda: PooledConnection(origin),
            origin.host,
            origin.port,
            # A race costs 0.3 ms and leaves cycles; loopback refuses at once.
            happy_eyeballs_delay=None if is_loopback(origin.host) else 0.25,
            **tls_options,
        )
        return connection

    async def connect_via_proxy(self, origin: Origin) -> PooledConnection:
        """A CONNECT tunnel (RFC 9110 section 9.3.6), with TLS inside for https."""
        scheme, host, port, _ = split_url(origin.proxy)
        proxy = urllib.parse.urlsplit(origin.proxy)
        target = f"{format_host(origin.host)}:{origin.port}"
        headers = [("Host", target)]
        if proxy.username is not None:
            credentials = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
            encoded = base64.b64encode(os.fsencode(credentials)).decode()
            headers.append(("Proxy-Authorization", f"Basic {encoded}"))
        tunnel = await self.connect_directly(Origin(scheme, host, port, ""))
        try:
            tunnel.transport.write(write_head(f"CONNECT {target} HTTP/1.1", headers))
            head = await self.read_head(tunnel)
            if not 200 <= head.status < 300:
                hint = "Put user:password@ into network.proxy." if head.status == 407 else ""
                raise Unreachable(f"The proxy refused the tunnel: {head.status}.", hint=hint)
            if origin.scheme == "http":
                tunnel.origin = origin
                return tunnel
            connection = PooledConnection(origin)
            transport = await asyncio.get_running_loop().start_tls(
                tunnel.transport, connection, self.tls_context, server_hostname=origin.host
            )
        except BaseException:
            tunnel.transport.abort()
            raise
        assert transport is not None
        connection.tunnel = tunnel
        connection.connection_made(transport)
        return connection

    async def fetch(
        self, method: str, url: str, headers: dict[str, str], limit_s: float, body: bytes = b""
    ) -> tuple[int, Headers, bytes]:
        """(status, headers, entire body) of a small response, all within `limit_s` seconds."""
        try:
            async with asyncio.timeout(limit_s):
                response = await self.open(method, url, lambda: headers, body, limit_s)
                try:
                    return response.status, response.headers, await response.read(8 * MIB)
                finally:
                    response.close(is_complete=False)
        except TimeoutError:
            host = split_url(url)[1]
            raise UpstreamTimeout(f"{host} did not respond within {limit_s:g} s.") from None


# ---- 13. HTTP server ---------------------------------------------------------------------------


@dataclass(slots=True)
class Response:
    """A response: either `body`, or `stream`, which writes to a ResponseWriter until it returns."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: Callable[[ResponseWriter], Awaitable[None]] | None = None
    content_type: str = "application/json"


class Request(RequestHead):
    """A request; its body is read only on demand."""

    reserved_bytes = 0  #: its share of `Server.body_bytes`
    # Set by the handler:
    id = ""
    started_at = 0.0  #: monotonic
    key_name = ""  #: the label of its API key, or ""
    label = ""  #: whose usage it is, once asked for
    usage_record: UsageRecord | None = None
    #: the model that it was last tried with, and how that failed
    route: Route | None = None
    failure: ApiError | None = None

    def __init__(self, connection: ServerConnection, head: RequestHead, body: Body) -> None:
        super().__init__(head.method, head.target, head.path, head.query, head.minor, head.headers)
        self.connection, self.client, self.body = connection, connection.peer, body

    async def read_body(self) -> bytes:
        """Decodes gzip and deflate; raises ApiError and WireError."""
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "gzip", "x-gzip", "deflate"):
            message = f"The content encoding {coding!r} is not supported; send gzip or plain JSON."
            hint = "In Codex, disable it with features.enable_request_compression=false "
            raise UnsupportedEncoding(message, hint=hint + "or use an API-key provider.")
        limit = self.connection.server.config.max_body_mib * MIB
        data = await self.connection.read_body(self, limit)
        if coding != "identity":
            data = inflate(data, coding.removeprefix("x-"), limit)
            self.reserve(len(data))
        return data

    def reserve(self, size: int) -> None:
        """Counts the body as `size` bytes; raises Busy if it makes all together too large."""
        server = self.connection.server
        others = server.body_bytes - self.reserved_bytes
        if size > self.reserved_bytes and others and others + size > MAX_BODIES_BYTES:
            raise Busy("The requests in progress use all memory for bodies.", retry_after=1)
        self.reserved_bytes = max(self.reserved_bytes, size)
        server.body_bytes = others + self.reserved_bytes

    def cancel_on_disconnect(self, watching: bool, patient: bool = False) -> None:
        """A half-close counts as a disconnect, unless `patient`: a local response costs nothing."""
        connection = self.connection
        connection.hangup_target = connection.task if watching else None
        connection.allows_half_close = patient
        if connection.is_disconnected:
            connection.notify()


class ResponseWriter:
    """The body of a streamed response; its head goes out with the first bytes, in one write."""

    tail = b""  #: the last bytes, sent together with the end of the body

    def __init__(self, connection: ServerConnection, head: bytes, chunked: bool) -> None:
        self.connection, self.head, self.chunked = connection, head, chunked
        self.last_at = time.monotonic()
        #: called when the client's reading lags (True: pause the source) or has caught up (False)
        self.on_flow: Callable[[bool], None] = lambda _paused: None
        #: called when the server has to stop
        self.on_stop: Callable[[], None] = lambda: None

    def write(self, data: bytes, is_last: bool = False) -> None:
        if is_last:
            self.tail += data
        elif data:
            self.send(write_chunk(data) if self.chunked else data)

    def finish(self) -> None:
        self.send(write_chunk(self.tail) + LAST_CHUNK if self.chunked else self.tail)

    def send(self, data: bytes) -> None:
        if not self.connection.response_started:
            self.connection.response_started = True
            data, self.head = self.head + data, b""
        self.last_at = time.monotonic()
        self.connection.transport.write(data)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """A Date field (RFC 9110 section 6.6.1), formatted once a second."""
    return email.utils.formatdate(second, usegmt=True)


class ServerConnection(StreamProtocol):
    """One client: its requests are read one at a time and served in order."""

    peer = "local"
    task: asyncio.Task[None] | None = None
    hangup_target: asyncio.Task[None] | None = None
    allows_half_close = closing = False
    writer: ResponseWriter | None = None
    #: the request in progress, and whether its response head has gone out: there is only one
    request: Request | None = None
    response_started = False
    #: when the client last accepted pending bytes, and how many were pending then
    progress_at = 0.0
    unsent = 0

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        #: idle, head, body or busy: what the deadline is for
        self.start_phase("head", server.config.head_seconds)

    # Called by asyncio and the ticker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        if isinstance(address, tuple):
            self.peer = address[0]
        self.server.accept(self)

    def notify(self) -> None:
        """A client that has half-closed may still be reading."""
        super().notify()
        target = self.hangup_target
        if target is not None and (self.lost or (self.at_eof and not self.allows_half_close)):
            self.hangup_target = None
            target.cancel()

    def pause_writing(self, paused: bool = True) -> None:
        super().pause_writing(paused)
        if self.writer is not None:
            self.writer.on_flow(paused)

    def start_phase(self, phase: str, seconds: float) -> None:
        """Starts a phase whose deadline later bytes do not extend."""
        self.phase = phase
        self.due_at = time.monotonic() + seconds

    def watch(self, now: float) -> None:
        if self.is_stalled(now):
            self.transport.abort()
        elif self.phase != "busy" and now > self.due_at:
            if self.phase != "idle" and (self.buffer or self.phase == "body"):
                self.send_error(RequestTimeout(f"The request's {self.phase} took too long."))
            self.phase = "busy"
            self.transport.close()

    def is_stalled(self, now: float) -> bool:
        """Whether the client has accepted no pending byte for WRITE_STALL_SECONDS."""
        pending = self.transport.get_write_buffer_size()
        if pending:
            pending += count_unsent(self.transport.get_extra_info("socket"))
        if not pending or pending < self.unsent or not self.progress_at:
            self.progress_at = now
        self.unsent = pending
        return now - self.progress_at > WRITE_STALL_SECONDS

    async def serve(self) -> None:
        try:
            while not (self.closing or self.server.draining or self.transport.is_closing()):
                await self.handle_request(await self.read_head())
                if self.buffer:  # a client that pipelines takes turns with the others
                    await asyncio.sleep(0)
        except WireError as error:
            refusal = InvalidRequest(f"Malformed HTTP: {error}.")
            refusal.status = error.status
            await self.close_with_error(refusal)
        except (EOFError, OSError):
            pass  # the client has disconnected
        except asyncio.CancelledError:
            if not self.is_disconnected:
                await self.close_with_error(Overloaded("The gateway is stopping."))
        except Exception:  # noqa: BLE001 - the last resort: a bug must not take the server down
            await self.close_with_error(internal_error("connection failed"))
        finally:
            self.transport.close()
        if self.transport.get_write_buffer_size():  # a slow client is still receiving
            await self.wait_closed()

    async def read_head(self) -> RequestHead:
        """Raises WireError; EOFError or OSError when the client disconnects."""
        buffer, config = self.buffer, self.server.config
        if not buffer:
            if self.phase != "head":  # a new connection's deadline runs since it was accepted
                self.start_phase("idle", config.idle_seconds)
            await self.receive()
        self.start_phase("head", config.head_seconds)
        for _ in range(8):  # empty lines before it: RFC 9112 section 2.2 says "at least one"
            while not buffer or buffer == b"\r":
                await self.receive()
            if not buffer.startswith(b"\r\n"):
                break
            del buffer[:2]
        head = parse_request_head(await self.receive_head())
        self.phase = "busy"
        return head

    def check_partial_head(self, scanned: int) -> None:
        data = self.buffer
        if b"\n" not in data and len(data) > MAX_REQUEST_LINE_BYTES:
            raise WireError("request line too long", 414)
        if data and data[0] <= 32:
            raise WireError("malformed request line")
        if re.search(rb"\r[^\n]|\0", data[max(0, scanned - 1) :]):
            raise WireError("bare CR or NUL in the head")

    async def read_body(self, request: Request, limit: int) -> bytes:
        """The body, still encoded; raises Busy, BodyTooLarge and WireError."""
        body, collected = request.body, bytearray()
        if body.is_complete:
            return b""
        expects_continue = "expect" in request.headers and request.minor > 0
        if expects_continue and not self.buffer and body.remaining <= limit:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.start_phase("body", self.server.config.body_seconds)
        received = [self.read_buffer()]

        def take(data: bytes) -> None:
            received.append(data)
            self.notify()

        self.sink = take  # a large body is copied once
        try:
            while not body.is_complete:
                collected += body.feed(b"".join(received))
                received.clear()
                if len(collected) + body.remaining > limit:
                    raise BodyTooLarge(f"The body is larger than {limit // MIB} MiB.")
                request.reserve(len(collected))
                while not (received or body.is_complete):
                    if self.is_disconnected:
                        raise self.error or EOFError
                    await self.next_change()
        finally:
            self.phase, self.sink = "busy", None
        self.buffer += body.excess
        return collected

    async def handle_request(self, head: RequestHead) -> None:
        body = request_body(head)
        request = self.request = Request(self, head, body)
        if head.headers.get("expect", "100-continue").lower() != "100-continue":
            raise WireError("unknown expectation", 417)
        try:
            response = await self.server.handler(request)
            if not body.is_complete:  # what has arrived of an unread body is discarded
                body.feed(self.read_buffer())
                self.buffer += body.excess
            keep_alive = head.minor > 0 or head.headers.has_token("connection", "keep-alive")
            wants_close = not keep_alive or head.headers.has_token("connection", "close")
            self.closing |= self.server.closing or not body.is_complete or wants_close
            await self.respond(request, response)
        finally:
            self.hangup_target = None
            self.server.body_bytes -= request.reserved_bytes
        if not body.is_complete:
            await self.linger()
        self.request, self.response_started = None, False

    async def respond(self, request: Request, response: Response) -> None:
        is_bodyless = request.method == "HEAD" or response.status in NO_BODY_STATUSES
        if response.stream is None or is_bodyless:
            self.send_buffered(response, is_bodyless)
        else:
            chunked = request.minor > 0
            self.closing |= not chunked
            framing = [("Transfer-Encoding", "chunked")] if chunked else []
            self.writer = ResponseWriter(self, self.encode_head(response, framing), chunked)
            await response.stream(self.writer)
            self.writer.finish()
            self.writer = None
        if self.writing_paused:
            await self.drain()

    def send_buffered(self, response: Response, is_bodyless: bool = False) -> None:
        self.response_started = True
        has_length = response.status not in NO_BODY_STATUSES
        framing = [("Content-Length", str(len(response.body)))] if has_length else []
        body = b"" if is_bodyless else response.body
        self.transport.write(self.encode_head(response, framing) + body)

    def encode_head(self, response: Response, framing: list[tuple[str, str]]) -> bytes:
        headers = [("Date", http_date(int(time.time()))), ("Content-Type", response.content_type)]
        headers += [*response.headers.items(), *framing]
        if self.closing:
            headers.append(("Connection", "close"))
        elif self.request is not None and self.request.minor == 0:
            headers.append(("Connection", "keep-alive"))
        return write_head(status_line(response.status), headers)

    def send_error(self, error: ApiError) -> None:
        self.phase = "busy"
        self.closing = True
        self.send_buffered(self.server.write_error(error, self.request))

    async def close_with_error(self, error: ApiError) -> None:
        """Sends an error response, or aborts if a response has started."""
        if self.response_started:
            self.transport.abort()  # an unfinished body must not look complete
            return
        self.send_error(error)
        await self.linger()
        self.transport.close()

    async def linger(self) -> None:
        """Lingering close, as in nginx: an RST would discard the response."""
        if self.transport.is_closing():
            return
        with contextlib.suppress(EOFError, OSError):  # or TimeoutError, an OSError
            async with asyncio.timeout(LINGER_SECONDS):
                self.transport.write_eof()
                while True:
                    self.read_buffer()
                    await self.receive()


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Every address of `host` that this machine has, at least one; port 0: any.  Raises OSError."""
    flags = socket.AI_PASSIVE
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    failure = errno.EADDRNOTAVAIL
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        for family, _, _, _, address in dict.fromkeys(addresses):
            place = (address[0], port, *address[2:])
            try:
                listener = socket.create_server(place, family=family, backlog=LISTEN_BACKLOG)
            except OSError as error:
                failure = error.errno or 0
                # That this machine does not have the address: asyncio skips these, too.
                if failure not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise OSError(failure, os.strerror(failure)) from None
                continue
            # Accepted sockets inherit it; asyncio sets it only where the socket names its protocol.
            # With Nagle's algorithm a response of several writes waits 40 ms for an ACK.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listeners.append(stack.enter_context(listener))
            port = listener.getsockname()[1]
        stack.pop_all()
    if not listeners:
        raise OSError(failure, os.strerror(failure))
    return listeners


@dataclass(eq=False)
class Server:
    """Accepts connections and passes requests to one handler.  It knows nothing of AI."""

    config: ServerConfig
    ticker: Ticker
    handler: Callable[[Request], Awaitable[Response]]
    write_error: Callable[[ApiError, Request | None], Response]
    connections: set[ServerConnection] = field(default_factory=set)
    body_bytes: int = 0  #: in memory, of all requests
    closing: bool = False  #: every response is the last one of its connection
    draining: bool = False
    listeners: list[asyncio.Server] = field(default_factory=list)

    async def listen(self, listeners: list[socket.socket]) -> None:
        """Takes ownership of the sockets."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(
                lambda: ServerConnection(self), sock=listener, backlog=LISTEN_BACKLOG
            )
            self.listeners.append(server)

    def accept(self, connection: ServerConnection) -> None:
        if self.draining or len(self.connections) >= self.config.max_connections:
            busy = Busy("Too many connections.", retry_after=1)
            connection.task = connection.loop.create_task(connection.close_with_error(busy))
            return

        def forget(_task: asyncio.Task[None]) -> None:
            self.connections.discard(connection)
            self.ticker.discard(connection.watch)

        self.connections.add(connection)
        self.ticker.add(connection.watch)
        connection.task = connection.loop.create_task(connection.serve())
        connection.task.add_done_callback(forget)

    def stop_accepting(self) -> None:
        """Closes the listening sockets; another process that has inherited them keeps them open."""
        self.closing = True
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()

    async def retire(self, seconds: float) -> None:
        """Stops accepting while another process listens on the same sockets: nothing is refused.

        Requests in transit on open connections get a response, which closes the connection.
        asyncio drops a connection that it has accepted but not yet set up when its server closes
        (Server._attach, seen in 3.11): so the sockets are unregistered, and closed a tick later.
        """
        self.closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        for listener in self.listeners:
            for listening_socket in listener.sockets:
                loop.remove_reader(listening_socket.fileno())
        await asyncio.sleep(TICK_SECONDS)
        self.stop_accepting()
        while loop.time() < deadline and any(c.phase != "busy" for c in self.connections):
            await asyncio.sleep(TICK_SECONDS)

    async def drain(self, seconds: float) -> None:
        """Stops accepting, lets responses finish for `seconds`, then ends the others in errors."""
        self.draining = True
        self.stop_accepting()
        for connection in self.connections:
            if connection.phase != "busy":
                connection.transport.close()
        await self.wait_for_connections(seconds)
        connections = list(self.connections)
        for connection in connections:
            if connection.writer is not None:
                connection.writer.on_stop()
        for task in await self.wait_for_connections(LINGER_SECONDS):
            task.cancel()
        await self.wait_for_connections(LINGER_SECONDS)
        for connection in connections:  # a client that does not read would keep it open
            connection.transport.abort()
        await self.wait_for_connections(None)

    async def wait_for_connections(self, seconds: float | None) -> set[asyncio.Task[None]]:
        """The tasks that do not end in time."""
        tasks = [c.task for c in self.connections if c.task is not None]
        return (await asyncio.wait(tasks, timeout=seconds))[1] if tasks else set()


# ---- 14. State on disk -------------------------------------------------------------------------
# 14.1 files


class Paths:
    """Where files live, by the XDG Base Directory specification."""

    def __init__(self, config_dir: str, state_dir: str) -> None:
        self.config_dir, self.state_dir = config_dir, state_dir
        self.config_file = os.path.join(config_dir, "config.toml")
        state = functools.partial(os.path.join, state_dir)
        self.machine_file = state("machine.json")
        self.pid_file = state("daemon.pid")  #: the lock: process id, then path of the socket
        self.socket_file = state("daemon.sock")  #: unless its path is too long
        self.log_file = state("daemon.log")
        self.usage_file = state("usage.db")

    def token_file(self, provider: str) -> str:
        return os.path.join(self.config_dir, provider, "token.json")


def user_folder(environ: Mapping[str, str], variable: str, fallback: str) -> str:
    """The folder that `variable` names, or `fallback` in the user's home; "" if there is none.

    Containers give users without an entry in passwd the home "/".
    """
    home = "" if environ.get("HOME") == "" else os.path.expanduser("~")
    in_home = os.path.join(home, fallback) if home.strip("/") else ""
    folder = environ.get(variable) or in_home
    return folder if os.path.isabs(folder) else ""


def find_paths(environ: dict[str, str]) -> Paths:
    """Raises ProgramError where a folder is not absolute: it is another in each directory."""

    def base(variable: str, fallback: str) -> str:
        folder = user_folder(environ, variable, fallback)
        if not folder:
            raise ProgramError(f"set HOME or {variable} to the absolute path of a folder of yours")
        return os.path.join(folder, "aiclient-api")

    return Paths(base("XDG_CONFIG_HOME", ".config"), base("XDG_STATE_HOME", ".local/state"))


def check_owner(path: str, status: os.stat_result) -> None:
    """Raises PermissionError if others may have written to `path`: a chmod would not undo that."""
    if not hasattr(os, "getuid"):
        return  # Windows has no such modes
    if status.st_uid not in (os.getuid(), 0):
        raise PermissionError(errno.EPERM, f"{path} belongs to another user")
    if status.st_mode & 0o022:
        hint = "check that all in it is yours, or move it away, and then run: chmod go-w"
        reason = f"other users can write to {path}; {hint} {shlex.quote(path)}"
        raise PermissionError(errno.EPERM, reason)


def check_parents(target: str) -> None:
    """Raises PermissionError if every user can replace a folder above `target`; also OSError.

    Checks the path as given and with its links resolved.  A group may write there: on systems
    where each user has a private group, `~/.local` is created like that.
    """
    for path in (os.path.abspath(target), os.path.realpath(target)):
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            mode = os.stat(path).st_mode
            if mode & 0o002 and not mode & stat.S_ISVTX and hasattr(os, "getuid"):
                hint = f"check that {target} is as you left it, and then run: chmod o-w"
                reason = f"every user can replace what is in {path}; {hint} {shlex.quote(path)}"
                raise PermissionError(errno.EPERM, reason)


def check_folder(folder: str) -> None:
    """`check_owner` and `check_parents` of a folder; raises OSError."""
    check_owner(folder, os.stat(folder))
    check_parents(folder)


@contextlib.contextmanager
def os_error_as(problem: str, error_class: type[ProgramError] = ProgramError) -> Iterator[None]:
    """Raises `error_class` for an OSError: the problem, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise error_class(f"{problem}: {error.strerror or error}") from None


def open_regular(path: str, *flags: str) -> int:
    """A descriptor of a regular file, without waiting for a FIFO's writer.  Raises OSError."""
    names = ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK", *flags)
    fd = os.open(path, sum(getattr(os, name, 0) for name in names), 0o600)  # 0: Windows lacks it
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory, not a plain file")
    raise PermissionError(errno.EPERM, "it is not a plain file")


def open_trusted(path: str, *flags: str) -> int:
    """`open_regular` for our own files: only this user and root can have written them.

    Symbolic links are followed unless `flags` has O_NOFOLLOW.  Raises OSError.
    """
    check_folder(os.path.dirname(path))
    fd = open_regular(path, *flags)
    try:
        check_owner(path, os.fstat(fd))
        if os.path.islink(path):
            check_link(path)
            check_parents(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def load_config_text(path: str) -> str:
    """The file with its line endings; "" if there is none.  Raises ConfigError."""
    with os_error_as(f"{path}: cannot be read", ConfigError):
        try:
            with os.fdopen(open_trusted(path), encoding="utf-8-sig", newline="") as file:
                return file.read()
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text") from None


@functools.cache
def warn_of_service(names: str) -> None:
    """Once per process, not at every reload."""
    log_event("warning", "service_variables_ignored", names=names)


def load_config(paths: Paths, environ: dict[str, str], flags: dict[str, str | None]) -> Config:
    """The environment overrides the file, flags override both; raises ConfigError."""
    path = paths.config_file
    config = read_config_text(load_config_text(path), path)
    if config.api_keys or any(map(is_secret_setting, config.origins)):
        with os.fdopen(open_trusted(path), "rb") as file:
            make_private(file.fileno(), path, "config_file_with_secrets")
    ignored = apply_environment(config, environ)
    if ignored:
        warn_of_service(",".join(ignored))
    apply_flags(config, flags)
    check_exposure(config)
    if not config.network.proxy:
        read_proxy_variables(environ)
    return config


def program_command() -> str:
    """What to type to run this program, as its user did: `python3 -m aiclient_api`."""
    typed, size = sys.orig_argv, len(sys.orig_argv) - len(sys.argv) + 1
    if size == 1:
        return typed[0]  # in the background: see main_detached
    if not sys.argv[0].endswith(".py") or os.path.basename(sys.argv[0]) == "__main__.py":
        return "aiclient-api"
    python = "python3" if "/" in typed[0] else typed[0]
    arguments = sys.argv[:1] if "-c" in typed[:size] else typed[1:size]  # see reexecute
    return shlex.join([python, *arguments])


def make_private_dir(path: str) -> None:
    """Mode 0700; raises OSError, also if others could write to it."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    check_folder(path)
    if hasattr(os, "getuid") and os.stat(path).st_mode & 0o077:
        with contextlib.suppress(OSError):  # others can only list it
            os.chmod(path, 0o700)


def is_in_place(path: str) -> bool:
    """Whether a file can only be written to, not replaced: containers mount single files."""
    if not os.path.isfile(path):
        return False
    if not os.access(os.path.dirname(path), os.W_OK):
        return True
    mounts: set[bytes] = set()
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:  # Linux only
        mounts = {line.split()[4] for line in file}
    name = os.fsencode(os.path.realpath(path))
    return re.sub(rb"[\\ \t\n]", lambda char: b"\\%03o" % ord(char[0]), name) in mounts


def write_in_place(path: str, data: bytes) -> None:
    """Overwrites a file that cannot be replaced; raises OSError.

    The data go to the end first, and then to the start: `read_private_object` finds the new line,
    or if that was never complete the old one, wherever this was interrupted.
    """
    with os.fdopen(open_regular(path, "O_RDWR", "O_NOFOLLOW"), "r+b") as file:
        check_owner(path, os.fstat(file.fileno()))
        restrict_to_owner(file.fileno())
        end = max(file.seek(0, os.SEEK_END), len(data))
        for offset, part in ((end, b"\n" + data), (0, data)):
            file.seek(offset)
            file.write(part)
            file.flush()
            os.fsync(file.fileno())
        file.truncate()
        os.fsync(file.fileno())


def replace_file(path: str, data: bytes) -> None:
    """Replaces a file atomically and durably, with mode 0600 from the first byte.

    A symbolic link planted at `path` is replaced, not followed; anything else that is not a
    regular file is left alone.  Raises OSError; the old file then remains.
    """
    if os.path.lexists(path) and not os.path.islink(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "something that is not a plain file is in its place")
    if is_in_place(path):
        write_in_place(path, data)
        return
    folder = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(prefix=".new-", dir=folder)  # 0600 whatever the umask
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows has no folder handles
        folder_fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)


def remove_file(path: str) -> None:
    """Empties it if it cannot be removed; raises OSError."""
    if is_in_place(path):
        os.truncate(path, 0)
    else:
        os.unlink(path)


def edit_config(
    paths: Paths, edit: Callable[[str], str], environ: dict[str, str] | None = None
) -> None:
    """Replaces the text by `edit(text)`, which with `environ` must be valid; raises ConfigError."""
    path = paths.config_file
    with os_error_as(f"{path}: cannot be written", ConfigError), contextlib.ExitStack() as stack:
        make_private_dir(paths.config_dir)
        folder_fd = os.open(paths.config_dir, os.O_RDONLY)
        stack.callback(os.close, folder_fd)
        if fcntl is not None:
            fcntl.flock(folder_fd, fcntl.LOCK_EX)
        text = edit(load_config_text(path))
        if environ is not None:
            config = read_config_text(text, path)
            apply_environment(config, environ)
            check_exposure(config)
        try:
            # Follows a symbolic link: dotfile managers make them.
            replace_file(os.path.realpath(path), text.encode())
        except UnicodeEncodeError:
            raise ConfigError(f"{path}: a setting must be valid UTF-8") from None


def change_config(paths: Paths, environ: dict[str, str], key: str, value: str | None) -> None:
    """Sets one key, or removes it; on ConfigError nothing has changed."""
    path = paths.config_file
    edit_config(paths, lambda text: change_setting(text, path, key, value), environ)


def no_provider(name: str, names: Iterable[str]) -> WrongUsage:
    return WrongUsage(f"providers.{name}: there is none; {suggest(name, names)}")


def change_provider(paths: Paths, environ: dict[str, str], name: str, enabled: str) -> None:
    """Sets `enabled`, "true" or "false", of a provider; raises WrongUsage and ConfigError."""
    names = list(load_config(paths, environ, {}).providers)
    if name not in names:
        raise no_provider(name, names)
    change_config(paths, environ, f"providers.{name}.enabled", enabled)


def open_state(paths: Paths, *, is_required: bool = True) -> bool:
    """Creates the state folder; False if it is not `is_required` and nothing can be written."""
    try:
        make_private_dir(paths.state_dir)
        return is_required or os.access(paths.state_dir, os.W_OK | os.X_OK)
    except OSError as error:
        if not is_required and error.errno in (errno.EACCES, errno.EROFS):
            return False
        reason = f"{error.strerror}; or set XDG_STATE_HOME to a folder of yours"
        raise ProgramError(f"{paths.state_dir}: cannot be used: {reason}") from None


def save_private_json(path: str, value: Json) -> None:
    make_private_dir(os.path.dirname(path))
    replace_file(path, dump_json(value) + b"\n")


def quarantine(path: str) -> None:
    """Renames a damaged file instead of overwriting it."""
    new_path = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    os.replace(path, new_path)
    log_event("warning", "damaged_file_renamed", path=new_path)


def read_private_object(data: bytes) -> Json | None:
    """The object in a private file; see `write_in_place` for the lines."""
    texts = (data, *reversed(data.split(b"\n")[:-1]))
    return next((value for value in map(load_object, texts) if value is not None), None)


def load_private_json(path: str, *, quarantines: bool = False) -> Json | None:
    """None if there is no file, or it was damaged and is set aside.  Raises ProgramError."""
    try:
        with os.fdopen(open_trusted(path, "O_NOFOLLOW"), "rb") as file:
            if restrict_to_owner(file.fileno()):
                log_event("warning", "token_file_was_readable", path=path)
            value = read_private_object(file.read(MIB))
        if value is None and not file_identity(path):
            return None
        if value is None and quarantines:
            if not is_in_place(path):
                quarantine(path)
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        reason = "it is a symbolic link, which is not followed" if is_link else error.strerror
        raise ProgramError(f"{path}: cannot be read: {reason}") from None
    if value is None:
        raise ProgramError(f"{path}: is damaged: it is not a JSON object")
    return value


def file_identity(path: str) -> tuple[int, ...]:
    """Device, inode, time and size; empty if there is no file, or as left by `remove_file`."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return ()
    if not status.st_size and is_in_place(path):
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def lock_file(path: str) -> int | None:
    """A descriptor that holds the lock until its last copy is closed; None if it is taken."""
    while True:
        fd = open_trusted(path, "O_RDWR", "O_CREAT", "O_NOFOLLOW")
        is_ours = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that has been removed or replaced meanwhile excludes no one.
            is_ours = os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
            if is_ours:
                return fd
        except BlockingIOError:
            return None
        except FileNotFoundError:
            continue
        finally:
            if not is_ours:
                os.close(fd)


# A GitHub token for the provider `copilot`, instead of a stored sign-in.
COPILOT_TOKEN_VARIABLE = "AICLIENT_COPILOT_TOKEN"


@dataclass(eq=False)
class TokenFile:
    """A provider's sign-in on disk; other processes may change it at any time."""

    path: str
    identity: tuple[int, ...] = ()  #: `file_identity` as of the last read or write
    #: takes the place of the file, which is neither read nor written
    memory: Json | None = None
    user: str = ""  #: the account's name, as of the last read
    refused: bool = False  #: by the service, as of the last read
    #: changes not written yet: they must not be lost, as a rotated token is issued only once
    unsaved: Json = field(default_factory=dict)
    retry_save_at: float = 0.0  #: monotonic

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[str]:
        """A lock between processes, where one is possible; yields its path.

        It is the sign-in itself where containers may share that file but not its folder.  Raises
        Overloaded after LOCK_SECONDS.
        """
        folder = os.path.dirname(self.path)
        path = self.path if is_in_place(self.path) else os.path.join(folder, "token.lock")
        fd, deadline = None, time.monotonic() + LOCK_SECONDS
        try:
            if self.memory is None:
                make_private_dir(folder)
            while fcntl and self.memory is None and (fd := lock_file(path)) is None:
                if time.monotonic() > deadline:
                    raise Overloaded(f"Another process has locked {path} for too long.")
                await asyncio.sleep(LOCK_POLL_SECONDS)
        except OSError as error:
            log_event("warning", "lock_unavailable", path=path, reason=error.strerror)
        try:
            yield path
        finally:
            if fd is not None:
                os.close(fd)

    def changed(self) -> bool:
        """Whether another process has replaced the file; if not, a failed save is retried."""
        previous, self.identity = self.identity, file_identity(self.path)
        if self.identity != previous:
            self.unsaved = {}  # a newer file wins
            return True
        if time.monotonic() >= self.retry_save_at:
            self.save({})
        return False

    def load(self) -> Json | None:
        """None if there is no file; raises ProgramError."""
        content = load_private_json(self.path) if self.memory is None else self.memory
        if content is None:
            return None
        content |= self.unsaved
        self.user = get_str(content, "user") or get_str(content, "login")
        self.refused = bool(content.get("refused"))
        return content

    def save(self, changes: Json) -> None:
        """None removes a key.  What cannot be written is logged, kept in memory, and retried."""
        if self.memory is not None:
            self.memory |= changes
            return
        self.unsaved = {**self.unsaved, **changes}
        if not self.unsaved:
            return
        if self.identity and not file_identity(self.path):
            self.unsaved = {}  # revoked meanwhile
            return
        try:
            content = load_private_json(self.path, quarantines=True) or {}
            merged = {k: v for k, v in {**content, **self.unsaved}.items() if v is not None}
            save_private_json(self.path, merged)
        except (OSError, ProgramError) as error:  # a file that cannot be trusted is left alone
            self.retry_save_at = time.monotonic() + SAVE_RETRY_SECONDS
            reason = getattr(error, "strerror", None) or str(error)
            log_event("error", "token_not_saved", path=self.path, reason=reason)
            return
        self.unsaved = {}
        self.identity = file_identity(self.path)

    def remove(self) -> list[str]:
        """Deletes the sign-in and its damaged copies; returns their paths.  Raises OSError."""
        folder = os.path.dirname(self.path)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        copies = ("token.json.damaged-", ".new-")
        names = [name for name in names if name == "token.json" or name.startswith(copies)]
        paths = [os.path.join(folder, name) for name in names]
        for path in paths:
            remove_file(path)
        return paths


def token_file(paths: Paths, name: str) -> TokenFile:
    """A provider's sign-in, maybe from the environment."""
    file, token = TokenFile(paths.token_file(name)), os.environ.get(COPILOT_TOKEN_VARIABLE, "")
    if name == "copilot" and token.strip():
        file.memory = {"github_token": token.strip(), "login": f"({COPILOT_TOKEN_VARIABLE})"}
    return file


def random_uuid() -> str:
    return format_uuid(os.urandom(16).hex())


def load_machine(paths: Paths) -> tuple[str, str]:
    """(machine id, device id): random, made once, or per process if they cannot be saved."""
    path = paths.machine_file
    try:
        saved = load_private_json(path) or {}
        machine, device = get_str(saved, "machine_id"), get_str(saved, "device_id")
        if machine and device:
            return machine, device
    except ProgramError as error:
        log_event("warning", "machine_file_unusable", reason=error)
    machine, device = os.urandom(32).hex(), random_uuid()
    try:
        save_private_json(path, {"machine_id": machine, "device_id": device})
    except OSError as error:
        log_event("warning", "machine_file_not_saved", reason=error.strerror)
    return machine, device


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ([A-Z]+) ")


class LogFilter:
    """Selects log lines of a level or above; continuation lines go with the line before."""

    def __init__(self, level: str) -> None:
        self.levels = LEVELS[LEVELS.index(level.upper()) :]
        self.accepting = True

    def takes(self, line: str) -> bool:
        line_match = LOG_LINE.match(line)
        if line_match:
            self.accepting = line_match[1] in self.levels or line_match[1] not in LEVELS
        return self.accepting


def open_log(path: str) -> TextIO:
    """Raises ProgramError."""
    try:
        return os.fdopen(open_regular(path), encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProgramError(f"{path}: no log yet") from None
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None


def read_log_tail(file: TextIO, path: str, lines: int, level: str) -> list[str]:
    """The last lines of a log: of rotated files, then of `file`, read to its end."""
    tail: deque[str] = deque(maxlen=min(max(lines, 0), MAX_LOG_LINES))
    for index in range(LOG_FILES - 1, 0, -1):
        with contextlib.suppress(ProgramError), open_log(f"{path}.{index}") as older:
            tail.extend(filter(LogFilter(level).takes, older.read().splitlines()))
    tail.extend(filter(LogFilter(level).takes, file.read().splitlines()))
    while tail and sum(map(len, tail)) > MAX_CONTROL_BYTES // 2:
        tail = deque(list(tail)[len(tail) // 2 :])
    return list(tail)


# 14.2 sign-ins shared with other programs


def read_json_file(path: str) -> Json:
    """The object in another program's file; raises OSError and ValueError."""
    with os.fdopen(open_regular(path), "rb") as file:
        body = load_object(file.read(MIB))
    if body is None:
        raise ValueError("it is not a JSON object")
    return body


def read_shared_login(source: Json) -> Json | None:
    """The sign-in of another program as our token file's content; None if gone or unusable.

    A refresh token can be used by only one of us, so it is read before a refresh, and the result is
    merged back.  `source`, from our token file: {"program": "kiro-ide", "path": "..."}, with the
    "key" of its row if the path is a database's.
    """
    path, key = get_str(source, "path"), get_str(source, "key")
    try:
        if not key:
            return read_ide_login(path)
        with contextlib.closing(open_database(path, "ro")) as database:
            return read_cli_login(database, key)
    except (OSError, ValueError, sqlite3.Error) as error:
        log_event("info", "shared_login_unusable", path=path, reason=error)
        return None


def write_shared_login(source: Json, changes: Json, used_token: str) -> None:
    """Stores refreshed tokens if `used_token` is still in place; a failure is logged.

    A symbolic link is followed, and the mode of the folder left alone.
    """
    path, key = get_str(source, "path"), get_str(source, "key")
    try:
        if not key:
            body = read_json_file(path)
            if either(body, "refresh_token") == used_token:
                data = json.dumps(with_tokens(body, changes), indent=2).encode()
                replace_file(os.path.realpath(path), data)
            return
        with contextlib.closing(open_database(path, "rw")) as database:
            database.execute("BEGIN IMMEDIATE")
            body = read_row(database, "auth_kv", key)
            if either(body, "refresh_token") == used_token:
                text = dump_json(with_tokens(body, changes)).decode()
                database.execute("UPDATE auth_kv SET value = ? WHERE key = ?", (text, key))
            database.execute("COMMIT")
    except (OSError, ValueError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        log_event("warning", "shared_login_not_updated", path=path, reason=reason)


def open_database(path: str, mode: str) -> sqlite3.Connection:
    """Another program's database, which must exist; raises sqlite3.Error and OSError."""
    os.close(open_regular(path))
    path = os.path.realpath(path)
    url = f"file:{urllib.parse.quote(path)}?mode={mode}"
    has_log = os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal")
    if mode == "ro" and not has_log and not os.access(os.path.dirname(path), os.W_OK):
        url += "&immutable=1"  # otherwise SQLite creates a file beside it
    return sqlite3.connect(url, uri=True, timeout=SHARED_WAIT_SECONDS, isolation_level=None)


def read_row(database: sqlite3.Connection, table: str, key: str) -> Json:
    row = database.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
    return load_object(row[0]) or {} if row and isinstance(row[0], (str, bytes)) else {}


def read_some_json(path: str) -> Json:
    """`read_json_file` of an optional file: {} if it is missing or unusable."""
    try:
        return read_json_file(path)
    except (OSError, ValueError):
        return {}


def read_ide_login(path: str) -> Json:
    """Our token file's content for the Kiro IDE's; raises OSError and ValueError."""
    body, folder = read_json_file(path), os.path.dirname(path)
    name, registration = get_str(body, "clientIdHash"), {}
    if re.fullmatch(r"[0-9a-f]{40}", name):
        registration = read_some_json(os.path.join(folder, f"{name}.json"))
    if not registration and get_str(body, "authMethod").lower() == "idc":
        files = [read_some_json(entry.path) for entry in os.scandir(folder) if entry.is_file()]
        files = [file for file in files if file.get("clientId") and file.get("clientSecret")]
        registration = max(files, key=lambda file: read_time(file.get("expiresAt")), default={})
    base = user_folder(os.environ, "XDG_CONFIG_HOME", ".config")
    if sys.platform == "darwin":
        base = user_folder({}, "", "Library/Application Support")
    profile = read_some_json(f"{base}/Kiro/User/globalStorage/kiro.kiroagent/profile.json")
    return read_kiro_import(body, registration, profile)


# Row of a sign-in -> its kind; "odic" is the actual spelling.
CLI_ROWS = {
    "kirocli:social:token": "social", "kirocli:external-idp:token": "external_idp",
    "kirocli:odic:token": "idc", "kirocli:oidc:token": "idc", "codewhisperer:odic:token": "idc",
}  # fmt: skip


def read_cli_login(database: sqlite3.Connection, key: str) -> Json:
    """Our token file's content for a row of kiro-cli or Amazon Q; raises ValueError and such."""
    body = read_row(database, "auth_kv", key)
    registration_key = key.rpartition(":")[0] + ":device-registration"
    registration = read_row(database, "auth_kv", registration_key)
    try:
        profile = read_row(database, "state", "api.codewhisperer.profile")
    except sqlite3.OperationalError:  # older versions have no such table
        profile = {}
    kind = CLI_ROWS.get(key, "")
    if kind == "idc" and get_str(body, "start_url") in ("", KIRO_BUILDER_START_URL):
        kind = "builder_id"
    return read_kiro_import(body, registration, profile, kind)


# 14.3 usage

USAGE_VERSION = 2
USAGE_KEYS = (*USAGE_NAMES, "shown", "spent")
USAGE_SUM_COLUMNS = ("at", *USAGE_KEYS, *USAGE_FIGURES)
USAGE_COLUMNS = (*USAGE_SUM_COLUMNS, *USAGE_DETAILS)
USAGE_SCHEMA = f"""
    BEGIN IMMEDIATE;
    -- a request, or the sum of a day's: shown in reports, spent as the caps see it
    CREATE TABLE IF NOT EXISTS requests (
        id INTEGER PRIMARY KEY, at, {", ".join((*USAGE_KEYS, *USAGE_DETAILS))},
        {", ".join(f"{name} DEFAULT 0" for name in USAGE_FIGURES)}
    );
    CREATE INDEX IF NOT EXISTS requests_at ON requests (at);
    PRAGMA user_version = {USAGE_VERSION};
    COMMIT
"""
INSERT_REQUEST = f"""
    INSERT INTO requests ({", ".join(USAGE_COLUMNS)}) VALUES (:{", :".join(USAGE_COLUMNS)})
"""
# `total` adds numbers of any size; `sum` fails beyond 2**63.
USAGE_TOTALS = ", ".join(f"CAST(total({name}) AS INTEGER)" for name in USAGE_FIGURES)
DAY_SQL = "date(at, 'unixepoch', 'localtime')"
SELECT_SPENDING = f"""
    SELECT {DAY_SQL}, provider, label, CAST(total(input_tokens + output_tokens) AS INTEGER),
        CAST(total(nano_credits) AS INTEGER)
    FROM requests WHERE spent AND at >= ? GROUP BY 1, 2, 3
"""
MIDDLE_ID = "SELECT id FROM requests ORDER BY id LIMIT 1 OFFSET (SELECT count(*) / 2 FROM requests)"
# How SQLite reports an unexpected schema.
OTHER_TABLES = re.compile(r"no such (?:table|column)|has no column")


IN_MEMORY = ":memory:"  # a path of SQLite's: usage that ends with the process


@dataclass(eq=False)
class UsageStore:
    """The usage database.  Several processes may share one; each writes in batches.

    What cannot be written now stays in memory, the latest MAX_PENDING_REQUESTS rows of it, and is
    retried: no request ever waits for it.  To be used by one thread at a time.
    """

    path: str
    busy_s: float = USAGE_BUSY_SECONDS
    max_pages: int = MAX_USAGE_PAGES
    connection: sqlite3.Connection | None = None
    identity: tuple[int, ...] = ()  #: device and inode: another process may replace the file
    pending: list[Json] = field(default_factory=list)  #: rows that are not written yet
    lost: int = 0  #: number of rows that were dropped
    trouble: str = ""  #: the last problem of a write, so that it is logged once
    prune_at: float = 0.0  #: monotonic
    #: (version of the database, month) as of the last read or write of the spending
    spending_version: tuple[int, float] | None = None

    def open(self) -> sqlite3.Connection:
        """The database, created if need be; raises sqlite3.Error and OSError."""
        if self.connection is not None and self.identity == file_identity(self.path)[:2]:
            return self.connection
        self.close()
        if self.path == IN_MEMORY:
            self.max_pages = MAX_MEMORY_PAGES
        else:
            make_private_dir(os.path.dirname(self.path))
            # SQLite gives its -wal and -shm files the same mode.
            os.close(open_trusted(self.path, "O_RDWR", "O_CREAT", "O_NOFOLLOW"))
        connection = self.connection = sqlite3.connect(
            self.path, timeout=self.busy_s, isolation_level=None, check_same_thread=False
        )
        self.identity, self.spending_version = file_identity(self.path)[:2], None
        connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; "
            f"PRAGMA max_page_count = {self.max_pages}; PRAGMA journal_size_limit = {4 * MIB}"
        )
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > USAGE_VERSION:
            raise sqlite3.NotSupportedError(f"it was made by a later version ({version})")
        if version < USAGE_VERSION:
            connection.executescript(USAGE_SCHEMA)
        return connection

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def run(
        self, work: Callable[[sqlite3.Connection], Result], mode: str = "IMMEDIATE"
    ) -> Result | None:
        """The result of `work` in a transaction; None if that failed and no rescue helped."""
        for can_rescue in (True, False):
            try:
                connection = self.open()
                connection.execute(f"BEGIN {mode}")
                with connection:  # commits, or rolls back
                    result = work(connection)
                break
            except (sqlite3.Error, OSError) as error:
                if not (can_rescue and self.rescue(error)):
                    self.log_problem(error)
                    return None
        if self.trouble and (mode == "IMMEDIATE" or not self.pending):
            log_event("info", "usage_writes_resumed", path=self.path)
            self.trouble = ""
        return result

    def rescue(self, error: sqlite3.Error | OSError) -> bool:
        """Makes room in a full database, renames a damaged one; returns whether to retry."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        is_foreign = code == sqlite3.SQLITE_ERROR and OTHER_TABLES.search(str(error))
        try:
            if code == sqlite3.SQLITE_FULL and self.connection is not None:
                (pages,) = self.connection.execute("PRAGMA page_count").fetchone()
                if pages * 4 > self.max_pages * 3:  # otherwise it is the disk that is full
                    log_event("warning", "usage_database_full", path=self.path)
                    self.connection.execute("BEGIN IMMEDIATE")
                    with self.connection:  # the models of the older half of the rows are dropped
                        self.merge(self.connection, f"id <= ({MIDDLE_ID})", f"'{OTHER}'")
                    return True
            self.close()
            if is_foreign or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                log_event("error", "usage_database_unusable", path=self.path, reason=error)
                for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
                    if os.path.lexists(path):
                        quarantine(path)
                return True
        except (sqlite3.Error, OSError) as rescue_error:
            self.log_problem(rescue_error)
        return False

    def log_problem(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        if reason != self.trouble:
            self.trouble = reason
            log_event("warning", "usage_not_written", path=self.path, reason=reason)

    def write(self, records: list[UsageRecord], month: float = 0.0) -> list[Any] | None:
        """Returns (day, provider, label, tokens, nano-credits) of all spent since `month`.

        None if that is 0, if writing failed, or if no other process has written in the meantime.
        """
        self.pending += [record.row() for record in records]
        surplus = max(0, len(self.pending) - MAX_PENDING_REQUESTS)
        self.lost += surplus
        del self.pending[:surplus]

        def work(connection: sqlite3.Connection) -> tuple[tuple[int, float], list[Any] | None]:
            connection.executemany(INSERT_REQUEST, self.pending)
            self.prune(connection)
            # data_version changes with what other connections write.
            version = (connection.execute("PRAGMA data_version").fetchone()[0], month)
            if not month or version == self.spending_version:
                return version, None
            return version, connection.execute(SELECT_SPENDING, (month,)).fetchall()

        result = self.run(work)
        if result is None:
            return None
        self.pending = []
        self.spending_version, spending = result
        return spending

    def prune(self, connection: sqlite3.Connection) -> None:
        """Deletes rows beyond their retention, and merges older ones by day."""
        if time.monotonic() < self.prune_at:
            return
        self.prune_at = time.monotonic() + USAGE_PRUNE_SECONDS
        today = dt.datetime.combine(dt.date.today(), dt.time()).timestamp()
        oldest, single = today - MAX_USAGE_DAYS * 86400, today - MAX_SINGLE_DAYS * 86400
        sql = "DELETE FROM requests WHERE at < ? AND (at < ? OR NOT shown)"
        connection.execute(sql, (single, oldest))
        self.merge(connection, f"at < {single} AND status IS NOT NULL")

    @staticmethod
    def merge(connection: sqlite3.Connection, condition: str, model: str = "model") -> None:
        """Replaces the rows that meet a condition by one for each day and name."""
        keys = ", ".join(USAGE_KEYS).replace("model", model)
        sums = f"SELECT min(at), {keys}, {USAGE_TOTALS} FROM requests WHERE {condition}"
        rows = connection.execute(f"{sums} GROUP BY {DAY_SQL}, {keys}").fetchall()
        connection.execute(f"DELETE FROM requests WHERE {condition}")
        places = ", ".join("?" * len(USAGE_SUM_COLUMNS))
        columns = ", ".join(USAGE_SUM_COLUMNS)
        connection.executemany(f"INSERT INTO requests ({columns}) VALUES ({places})", rows)

    def reset(self) -> bool:
        """Deletes all but what caps need; False if that failed and nothing was deleted."""

        def work(connection: sqlite3.Connection) -> bool:
            connection.executemany(INSERT_REQUEST, self.pending)
            connection.execute("DELETE FROM requests WHERE NOT spent")
            connection.execute("UPDATE requests SET account = '', shown = 0")
            self.merge(connection, "TRUE", f"'{OTHER}'")
            return True

        if not self.run(work):
            return False
        self.pending = []
        return True

    def report(self, query: UsageQuery, now: float) -> Json:
        """The response of `/v1/usage`, without what only a running gateway knows."""
        since = query.since or 0.0
        names = USAGE_GROUPS.get(query.by, ())
        shown = "FROM requests WHERE shown AND at >= ?"

        def work(connection: sqlite3.Connection) -> tuple[Any, ...]:
            sql = f"SELECT CAST(min(at) AS INTEGER) {shown}"
            (first,) = connection.execute(sql, (since,)).fetchone()
            totals = []
            for group in (("provider", "model"), names):
                keys = ", ".join(DAY_SQL if name == "day" else name for name in group)
                sql = f"SELECT {keys}, {USAGE_TOTALS} {shown} GROUP BY {keys} ORDER BY {keys}"
                totals.append(connection.execute(sql, (since,)).fetchall() if keys else [])
            sql = f"SELECT {', '.join(USAGE_COLUMNS)} {shown} AND status IS NOT NULL"
            rows = connection.execute(f"{sql} ORDER BY id DESC LIMIT ?", (since, query.recent))
            recent = [request_row(dict(zip(USAGE_COLUMNS, row, strict=True))) for row in rows]
            return first, *totals, recent

        # DEFERRED: it waits for no other process.
        first, models, groups, recent = self.run(work, "DEFERRED") or (None, [], [], [])
        report = {**usage_report(models), "since": first, "until": int(now)}
        if query.by:
            report["by"] = query.by
            report["rows"] = [
                {**dict(zip(names, row, strict=False)), **total_row(row[len(names) :])}
                for row in groups
            ]
        if query.recent:
            report["recent"] = recent
        if self.trouble:
            report["trouble"] = f"{self.path}: {self.trouble}"
        return report


class Ledger:
    """Usage and what follows from it.  Owned by the event loop; its database by its own thread."""

    def __init__(self, path: str, ticker: Ticker) -> None:
        self.store = UsageStore(path)
        self.ticker = ticker
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "usage")
        self.thread.submit(int)  # starts the thread now: later the system may refuse one
        self.pending: list[UsageRecord] = []
        self.writing: asyncio.Future[Any] | None = None
        self.due_at = math.inf  #: monotonic time of the next write
        self.labels = NameTable(MAX_LABELS)
        self.models = NameTable(MAX_MODELS)
        self.spending = Spending()
        #: set if there are caps: spending is read from the database, now and as it changes
        self.spending_read: asyncio.Future[None] | None = None
        self.guard = RepeatGuard()
        self.metrics = Metrics()
        self.cache = CacheGuard(os.urandom(16))

    def label(self, user_agent: str, limits: LimitsConfig) -> str:
        """`client_label`, limited to MAX_LABELS a day; a label that has a cap always counts."""
        label = client_label(user_agent)
        return label if label in limits.labels else self.labels.admit(label, local_day(time.time()))

    def record(self, record: UsageRecord) -> None:
        """Counts a response; it is in the database within USAGE_WRITE_SECONDS and a tick."""
        record.normalize()
        name = f"{record.provider}/{record.model}"
        if self.models.admit(name, local_day(record.at)) != name:
            record.model = OTHER
        self.pending.append(record)
        if record.costs:
            self.spending.add(record)
        self.metrics.observe(record)
        if self.due_at == math.inf:
            self.due_at = time.monotonic() + USAGE_WRITE_SECONDS
            self.ticker.add(self.tick)

    def count_waiting(self) -> int:
        return len(self.pending) + len(self.store.pending)

    def watch_cache(
        self, record: UsageRecord, request_info: RequestInfo, dialect: str, body: Json
    ) -> None:
        """`body`: as sent upstream, held until hashed.  Runs after the client has its response."""
        if record.usage.prompt < MIN_CACHED_TOKENS:
            return
        loop = asyncio.get_running_loop()
        hash_prompt = functools.partial(read_prompt, dialect, body, self.cache.salt)

        def record_prompt(hashing: asyncio.Future[Prompt] | None = None) -> None:
            if hashing is not None and hashing.cancelled():
                return
            prompt = hashing.result() if hashing is not None else hash_prompt()
            opening = request_info.opening.partition("\0")[2]  # without the system prompt
            miss = self.cache.record(record, request_info.session, opening, prompt)
            if miss is not None:
                log_event("warning", "cache_miss", **miss)

        if request_info.size > CACHE_INLINE_BYTES:
            loop.run_in_executor(None, hash_prompt).add_done_callback(record_prompt)
        else:
            loop.call_soon(record_prompt)

    def tick(self, now: float) -> None:
        if now >= self.due_at and self.writing is None:
            self.begin_write()

    def begin_write(self) -> asyncio.Future[Any]:
        batch, self.pending = self.pending, []
        self.spending.unwritten.clear()
        month = month_start(time.time()) if self.spending_read else 0.0
        loop = asyncio.get_running_loop()

        def finish(writing: asyncio.Future[Any]) -> None:
            self.writing = None
            if writing.result() is not None:
                self.spending.replace(writing.result())
            self.due_at = loop.time() + USAGE_WRITE_SECONDS
            if not self.count_waiting():
                self.due_at = math.inf
                self.ticker.discard(self.tick)

        self.writing = loop.run_in_executor(self.thread, self.store.write, batch, month)
        self.writing.add_done_callback(finish)
        return self.writing

    async def flush(self, always: bool = False) -> None:
        """Writes what is pending; with `always` even nothing, to read what others have spent."""
        while self.writing is not None:
            await asyncio.wait((self.writing,))
        if always or self.count_waiting():
            await asyncio.wait((self.begin_write(),))

    async def check(
        self, limits: LimitsConfig, provider: str, label: str, request: int | None
    ) -> None:
        """Raises LimitReached at a cap or in a loop; `request`: a hash, None if already checked."""
        if request is not None:
            self.guard.check(limits, request, time.monotonic())
        if limits.providers or limits.labels:
            await self.read_spending()
            self.spending.check(limits, provider, label, time.time())

    async def read_spending(self) -> None:
        """Reads it once; later writes keep it current."""
        if self.spending_read is None:
            self.spending_read = asyncio.ensure_future(self.flush(always=True))
        if not self.spending_read.done():
            await asyncio.wait((self.spending_read,))

    async def report(self, query: UsageQuery, limits: LimitsConfig) -> Json:
        if limits.providers or limits.labels:
            await self.read_spending()
        await self.flush()
        loop, now = asyncio.get_running_loop(), time.time()
        report: Json = await loop.run_in_executor(self.thread, self.store.report, query, now)
        report["limits"] = list(self.spending.rows(limits, now))
        if query.cache:
            report["cache"] = {"conversations": self.cache.report()}
        return report

    async def reset(self) -> None:
        """Deletes all but what caps need.  Raises Overloaded."""
        await self.flush()
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self.thread, self.store.reset):
            raise Overloaded(f"The usage database could not be emptied: {self.store.trouble}.")
        self.cache.watched.clear()

    async def close(self) -> None:
        await self.flush()
        self.ticker.discard(self.tick)
        await asyncio.get_running_loop().run_in_executor(self.thread, self.store.close)
        self.thread.shutdown(wait=False)


# ---- 15. Providers -----------------------------------------------------------------------------


# 15.1 what providers share


async def run_step(step: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a synchronous step; yields to other tasks after a long one."""
    started_at = time.monotonic()
    result = step(*arguments)
    if time.monotonic() - started_at > LONG_STEP_SECONDS:
        await asyncio.sleep(YIELD_SECONDS)
    return result


@dataclass(eq=False)
class Catalogue:
    """A provider's models: fetched when needed, cached while fresh; a stale list beats none."""

    provider: str
    fetch: Callable[[], Awaitable[dict[str, Model]]]
    #: stand in for a list that could never be had, for MODELS_RETRY_SECONDS
    built_in: dict[str, Model] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=lambda: asyncio.Lock())  # not at import
    models: dict[str, Model] = field(default_factory=dict)
    listed_at: dict[str, float] = field(default_factory=dict)  #: monotonic, by model
    fetched_at: float = -math.inf
    forced_at: float = -math.inf  #: when `refresh` last had an effect

    def listed(self) -> dict[str, Model] | None:
        is_fresh = time.monotonic() - self.fetched_at < MODELS_FRESH_SECONDS
        return self.models if is_fresh else None

    async def get(self, refresh: bool = False) -> dict[str, Model]:
        """Raises ApiError if there never was a list.  Refreshes once in MODELS_MISS_SECONDS."""
        now = time.monotonic()
        if refresh and now - self.forced_at >= MODELS_MISS_SECONDS:
            self.forced_at, self.fetched_at = now, -math.inf
        if self.listed() is None:
            async with self.lock:
                if self.listed() is None:  # another task may have been quicker
                    await self.update()
        return self.models

    async def update(self) -> None:
        """Keeps models missing from the new list for a while: even entitled ones may be missing."""
        try:
            fetched = await self.fetch()
        except Exception as error:  # other providers' models are still listed
            if not isinstance(error, ApiError):
                error = internal_error("a model list could not be read")
            if not self.models and (not self.built_in or isinstance(error, NotSignedIn)):
                raise error from None
            event = "models_not_refreshed" if self.models else "models_unavailable"
            log_event("warning", event, provider=self.provider, reason=error)
            self.fetched_at = time.monotonic()
            if not self.models:
                self.models = ModelList(self.built_in)
                self.fetched_at -= MODELS_FRESH_SECONDS - MODELS_RETRY_SECONDS
            return
        now = self.fetched_at = time.monotonic()
        listed_at = {k: at for k, at in self.listed_at.items() if now - at < MODELS_STALE_SECONDS}
        retained = {k: v for k, v in self.models.items() if k in listed_at}
        self.listed_at = listed_at | dict.fromkeys(fetched, now)
        self.models = ModelList(retained | fetched)


@dataclass(slots=True, eq=False)
class Cooldown:
    error: ApiError
    until: float  #: monotonic; after it one request probes
    recovers_at: float  #: monotonic time of recovery, as announced by the service; 0 = unknown
    length_s: float
    #: a probe is in flight: success ends this cool-down, a refusal starts another
    probing: bool = False

    def blocks(self, now: float) -> bool:
        return now < self.until or self.probing


@dataclass(eq=False)
class Breaker:
    """One circuit breaker per key: a model, "" for the whole account, or a sign-in's secret.

    After a cool-down one request probes (half-open); the others fail until it has finished.
    """

    provider: str = ""  #: for the log; "" logs nothing
    first_s: float = FIRST_COOLDOWN_SECONDS
    max_s: float = MAX_COOLDOWN_SECONDS
    cooldowns: dict[str, Cooldown] = field(default_factory=dict)

    def find(self, key: str, now: float) -> Cooldown | None:
        """The cool-down of `key`; one that ended long ago is forgotten."""
        cooldown = self.cooldowns.get(key)
        if cooldown is None or cooldown.blocks(now):
            return cooldown
        if now < max(cooldown.until + self.max_s, cooldown.recovers_at):
            return cooldown
        del self.cooldowns[key]
        return None

    def open(
        self, key: str, error: ApiError, wait_s: float | None = None, resets_in: float | None = None
    ) -> float:
        """Starts a cool-down of `wait_s`, or one that doubles up to `max_s`; returns its seconds.

        `resets_in`: seconds to the expected recovery, if known.
        """
        now, length_s, until = time.monotonic(), self.first_s, 0.0
        previous = self.find(key, now)
        if previous is not None:
            until = previous.until
            length_s = min(previous.length_s * (2 if until <= now else 1), self.max_s)
        length_s = max(wait_s or length_s, 1.0)
        resets_in = error.retry_after if resets_in is None else resets_in
        recovers_at = now + resets_in if resets_in else 0.0
        self.cooldowns.pop(key, None)
        if len(self.cooldowns) >= MAX_COOLDOWNS:
            del self.cooldowns[next(filter(None, self.cooldowns))]  # the oldest one of a model
        self.cooldowns[key] = Cooldown(error, max(now + length_s, until), recovers_at, length_s)
        if self.provider:
            facts = {"provider": self.provider, "model": key or "*", "kind": error.kind}
            log_event("info", "cooldown_started", **facts, seconds=math.ceil(length_s))
        return length_s

    def check(self, key: str) -> None:
        """Raises the error that started a cool-down of `key`, or of the whole account."""
        now = time.monotonic()
        for cooldown in (self.find(key, now), self.find("", now)):
            if cooldown is not None and cooldown.blocks(now):
                error, wait_s = cooldown.error, None
                if error.retry_after is not None:
                    ends_at = max(cooldown.recovers_at, cooldown.until)
                    wait_s = max(ends_at - now, OVERLOAD_BACKOFF_SECONDS[0])
                raise error.with_hint(error.hint, wait_s)

    def guarded(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Around one request: raises during a cool-down; success ends one."""
        return self.probing(key) if self.cooldowns else contextlib.nullcontext()

    @contextlib.contextmanager
    def probing(self, key: str) -> Iterator[None]:
        self.check(key)
        probed = [self.cooldowns[k] for k in (key, "") if k in self.cooldowns]
        for cooldown in probed:
            cooldown.probing = True
        try:
            yield
        finally:
            for cooldown in probed:
                cooldown.probing = False
        for name in [k for k, cooldown in self.cooldowns.items() if cooldown in probed]:
            del self.cooldowns[name]
            log_event("info", "cooldown_ended", provider=self.provider, model=name or "*")

    def rows(self) -> list[Json]:
        """`[{"model": ID or "*", "seconds", "kind", "reason", "recovers_at", "probing"}]`.

        `seconds` to the next probe, 0 during one; `recovers_at`: Unix seconds of the expected
        recovery, None if unknown.
        """
        now, rows = time.monotonic(), []
        for key, item in self.cooldowns.items():
            if item.blocks(now):
                at = int(time.time() + item.recovers_at - now) if item.recovers_at else None
                row: Json = {"model": key or "*", "seconds": max(0, math.ceil(item.until - now))}
                row |= {"kind": item.error.kind, "reason": item.error.text()}
                rows.append({**row, "recovers_at": at, "probing": item.probing})
        return rows


class QuotaWatch:
    """Polls in the background while the provider is used; warns when little is left."""

    def __init__(self, provider: str, fetch: Callable[[], Awaitable[Quota | None]]) -> None:
        self.provider = provider
        self.fetch = fetch  #: asks the service, and passes the result to `update`
        self.soon_s = QUOTA_FIRST_POLL_SECONDS
        #: sleeps until the monotonic time `poll_at`, 0 once it polls
        self.task: asyncio.Task[None] | None = None
        self.poll_at = 0.0
        self.reset()

    def reset(self) -> None:
        self.latest: Quota | None = None
        self.alarm = QuotaAlarm()
        self.headers: dict[str, str] = {}  #: the quota headers of the last response that had any
        #: whether a poll has succeeded: only then plan and units are known
        self.is_complete = False
        self.polled_at = -math.inf  #: monotonic time of the last poll, even a failed one
        self.close()

    def close(self) -> None:
        # A poll that finds a new sign-in calls `reset`, and may go on.
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
            self.task = None

    def update(self, quota: Quota) -> Quota:
        # No header tells the use of an allowance without a limit.
        self.is_complete = not any(row.limit == math.inf and row.used for row in quota.allowances)
        self.polled_at = time.monotonic()
        self.close()
        self.store(quota)
        return quota

    def store(self, quota: Quota) -> None:
        quota.as_of = time.time()
        self.latest = quota
        for row in self.alarm.new_warnings(quota, quota.as_of):
            log_event(
                "warning",
                "quota_used_up" if reached_percent(row) >= 100 else "quota_low",
                provider=self.provider,
                allowance=row.name,
                percent=int(row.percent_used or 0),
                left="unknown" if row.remaining is None else f"{row.remaining:g}",
                unit=row.unit or "unknown",
                resets=iso_day(row.resets_at or quota.resets_at) or "unknown",
            )

    def update_from_headers(self, headers: Headers) -> None:
        """Reads the headers of a good response; plans a poll if they are not enough."""
        quota_headers = quota_fields(headers)
        if not quota_headers or not self.is_complete:
            self.poll_soon()
        changed = {k: v for k, v in quota_headers.items() if self.headers.get(k) != v}
        if changed:
            self.headers = quota_headers
            self.store(apply_quota_headers(self.latest, changed, time.time()))
        elif quota_headers and self.latest is not None:
            self.latest.as_of = time.time()

    def on_error(self, error: ApiError) -> None:
        if isinstance(error, QuotaExceeded):
            self.poll_soon(QUOTA_RETRY_SECONDS)

    def poll_soon(self, gap_s: float = QUOTA_POLL_SECONDS) -> None:
        """Plans a poll `gap_s` after the last one, unless an earlier one is planned."""
        now = time.monotonic()
        poll_at = max(now + self.soon_s, self.polled_at + gap_s)
        if self.task is not None and not self.task.done() and self.poll_at <= poll_at:
            return
        self.close()
        self.poll_at = poll_at
        self.task = asyncio.get_running_loop().create_task(self.poll(poll_at - now))

    async def poll(self, delay_s: float = 0.0) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
            self.poll_at = 0.0
        self.polled_at = time.monotonic()
        try:
            await self.fetch()
        except ApiError as error:
            log_event("debug", "quota_poll_failed", provider=self.provider, reason=error)


class Provider:
    """One account of one upstream service.  It never sees the client's dialect."""

    local = False  #: responds on this machine, at no cost
    sign_in = ""  #: the command to type after a NotSignedIn

    def __init__(self, name: str) -> None:
        self.name = name
        self.quota_watch = QuotaWatch(name, self.quota)
        self.forget_account()

    def forget_account(self) -> None:
        """Clears all state of the account, at first and if another account has signed in."""
        self.catalogue = Catalogue(self.name, self.fetch_models)
        self.breaker = Breaker(self.name)
        #: reasoning that the client's dialect cannot carry
        self.reasoning = ReasoningMemory()
        self.quota_watch.reset()

    async def models(self, refresh: bool = False) -> dict[str, Model]:
        """The catalogue by id, cached while fresh; raises ApiError."""
        return await self.catalogue.get(refresh)

    async def fetch_models(self) -> dict[str, Model]:
        raise NotImplementedError

    def guess(self, model_id: str) -> Model | None:
        """A model that the catalogue does not list but that may still exist."""
        return None

    async def choose_model(self, model: Model, key: str, prompt: str, has_image: bool) -> Model:
        """What a model with `auto` stands for in the conversation of this key; raises ApiError."""
        return model

    async def open(self, call: Call) -> BodyStream:
        """A successful upstream response; retries are the provider's.  Raises ApiError."""
        raise NotImplementedError

    async def embed(self, body: Json, model: Model) -> tuple[Json, Usage]:
        """Embeddings in OpenAI's form, and their usage.  Raises ApiError."""
        raise UnsupportedFeature(f"{model.id} makes no embeddings.", param="model")

    def user(self) -> str:
        """The account's name at the service; "" if unknown."""
        return ""

    def secrets(self) -> tuple[str, ...]:
        """The tokens in use: no log line and no error message may show them."""
        return ()

    def status(self) -> Json:
        """The current state, without asking the service; times in Unix seconds.

        `health`: ready, cooling down, failing or not signed in.
        """
        rows = self.breaker.rows()
        health = "cooling down" if rows else "ready"
        return {"health": health, "reason": "", "token_expires_at": None, "cooldowns": rows}

    async def quota(self) -> Quota | None:
        """What is left of the plan, from the service; None if there is none.  Raises ApiError."""
        return None

    def refused(self, model_id: str, error: ApiError) -> None:
        """Starts a cool-down: an error came inside a 200 response."""

    async def wait_closed(self) -> None:
        """Waits for what must not be interrupted."""

    def close(self) -> None:
        """Stops what runs in the background."""
        self.quota_watch.close()


@contextlib.contextmanager
def advising(provider: Provider, model_id: str = "") -> Iterator[None]:
    """Adds the command to type to a NotSignedIn, and the nearest names to a ModelNotFound."""
    try:
        yield
    except NotSignedIn as error:
        error.hint = error.hint or f"To sign in, type: {provider.sign_in}"
        raise
    except ModelNotFound as error:
        models = provider.catalogue.listed() or {}
        similar = nearest(model_spellings(model_id)[-1], models) if model_id not in models else []
        if not model_id or not similar:
            raise
        raise error.with_hint(f"Nearest: {', '.join(similar)}. {error.hint}", None) from None


Token = TypeVar("Token", CopilotToken, KiroLogin)


class Account(Generic[Token]):
    """A sign-in: its token file, which other programs may change, and the token in use."""

    service: ClassVar[str]
    renewal_gap_s: ClassVar[float]  #: seconds between renewals of tokens that were refused

    def __init__(self, provider: AccountProvider[Token], paths: Paths) -> None:
        self.provider: AccountProvider[Token] = provider
        self.file = token_file(paths, provider.name)
        self.lock = asyncio.Lock()
        self.cached: Token | None = None
        self.stale_at = 0.0  #: monotonic: a wall clock set back must not make a token immortal
        self.renewed_at = -math.inf
        #: sign-in endpoints watch for storms, and a dead sign-in is never tried again
        self.breaker = Breaker(first_s=1.0, max_s=SIGN_IN_RETRY_MAX_SECONDS)
        #: what a new token is obtained with, as of the last `load`; "" if none can be
        self.refresh_secret = ""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.used = False  #: since the last refresh in the background

    def load(self) -> Token | None:
        """The token in the file, if it holds one that can be used; raises NotSignedIn."""
        raise NotImplementedError

    def read_file(self) -> Json:
        try:
            content = self.file.load()
        except ProgramError as error:
            raise NotSignedIn(f"{error}.") from None
        if content is None:
            name, service = self.provider.name, self.service
            raise NotSignedIn(f"Provider {name!r} has no {service} sign-in yet.")
        return content

    async def latest(self) -> Token | None:
        """The token in the file, or the newer one of a program that shares the sign-in."""
        return self.load()

    async def exchange(self, saved: Token | None) -> Token:
        """Obtains a new token and saves it.  Raises NotSignedIn if the sign-in is dead."""
        raise NotImplementedError

    def current(self, margin_s: float | None = None) -> Token | None:
        """The token in use, until `margin_s` before its expiry or the token file changes."""
        if self.file.changed():
            self.cached = None
            saved = self.load()
            if not self.file.refused:
                self.breaker.cooldowns.clear()
            if saved is not None:
                self.use(saved)
        token = self.cached
        if token is None or not token.access_token:
            return None
        left_s = min(token.expires_at - time.time(), self.stale_at - time.monotonic())
        return token if left_s > (token.margin_s if margin_s is None else margin_s) else None

    def use(self, token: Token) -> Token:
        self.cached = token
        left_s = token.expires_at - time.time()
        if left_s < math.inf:
            left_s = min(left_s, MAX_TOKEN_SECONDS)
        self.stale_at = time.monotonic() + left_s
        return token

    async def get(self) -> Token:
        """A token that will last; concurrent calls share one refresh.  Raises ApiError."""
        self.used = True
        token = self.current() or await self.finish(self.obtain())
        assert token is not None
        return token

    async def renew(self, refused: Token, action: str = "refresh") -> Token | None:
        """A token other than `refused`; None if one was obtained only a moment ago."""
        return await self.finish(self.obtain(refused.access_token))

    async def finish(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs `work` to its end even if we are cancelled: a rotated token is issued only once."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        # Retrieves the exception: it was for the tasks that still wait.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def obtain(self, refused: str = "", margin_s: float | None = None) -> Token | None:
        """The token in use, of another program, or a new one; None as with `renew`."""
        async with self.lock:
            current = self.current(margin_s)
            if current is not None and current.access_token != refused:
                return current  # another task was quicker
            async with self.file.lock():
                previous = refused or (self.cached.access_token if self.cached else "")
                saved = await self.latest()
                if saved is not None and saved.access_token != previous:
                    self.use(saved)
                    current = self.current(0.0 if refused else margin_s)
                    if current is not None:
                        return current  # another program was quicker
                if refused:
                    gap_s = time.monotonic() - self.renewed_at
                    if not self.refresh_secret or gap_s < self.renewal_gap_s:
                        return None
                    self.renewed_at = time.monotonic()
                    self.cached = None
                try:
                    return await self.refresh(saved)
                except ApiError:
                    current = self.current(0.0)
                    if current is None:
                        raise
                    return current  # still valid for some minutes

    async def refresh(self, saved: Token | None) -> Token:
        """A new token, unless the service has just refused this sign-in.  Raises ApiError."""
        secret = self.refresh_secret
        self.breaker.check(secret)
        try:
            token = await self.exchange(saved)
        except ApiError as error:
            wait_s = min(error.retry_after or 0.0, SIGN_IN_RETRY_AFTER_SECONDS)
            if isinstance(error, NotSignedIn):
                is_final = not isinstance(error, NotEntitled)
                wait_s = math.inf if is_final else max(wait_s, SIGN_IN_RETRY_MAX_SECONDS)
                self.file.save({"refused": error.message})
            self.breaker.open(secret, error, wait_s)
            log_event("warning", "token_refresh_failed", provider=self.provider.name, reason=error)
            raise
        self.breaker.cooldowns.clear()
        return self.use(token)

    def close(self) -> None:
        """A refresh in flight continues."""
        self.file.save({})


class AccountProvider(Provider, Generic[Token]):
    """A provider that needs a sign-in."""

    account_class: ClassVar[type[Account[Any]]]
    attempt_class: ClassVar[type[Attempt[Any]]]

    def __init__(self, name: str, config: Any, paths: Paths, client: HttpClient) -> None:
        super().__init__(name)
        name_option = "" if name == config.type else f" --name {name}"
        self.sign_in = f"{program_command()} auth {config.type}{name_option}"
        self.config = config
        self.client = client
        self.account: Account[Token] = self.account_class(self, paths)

    async def token(self) -> Token:
        """A valid token; subclasses may need more than that."""
        return await self.account.get()

    async def ask(
        self, send: Callable[..., Awaitable[Json | RetryDecision]], *arguments: Any
    ) -> Json | RetryDecision:
        """The result of `send(token, *arguments)`; a token that is refused is renewed once."""
        token = await self.token()
        result = await send(token, *arguments)
        if isinstance(result, RetryDecision) and result.action in ("refresh", "switch"):
            renewed = await self.account.renew(token, result.action)
            if renewed is not None:
                return await send(renewed, *arguments)
        return result

    async def open(self, call: Call) -> BodyStream:
        with self.breaker.guarded(call.model.id):
            return await self.attempt_class(self, call, await self.token()).run()

    def cool_down(self, model_id: str, decision: RetryDecision) -> None:
        """After a final refusal: starts a cool-down if only time helps."""
        error, requested_s, action = decision.error, decision.wait_s or 0.0, decision.action
        if action not in ("pause", "cool_down") and requested_s <= MAX_WAIT_SECONDS:
            return
        if isinstance(error, Overloaded) and not requested_s:
            return  # it may have room for the very next request
        wait_s = min(requested_s, MAX_COOLDOWN_SECONDS)
        if action == "cool_down" and not wait_s:
            wait_s = MAX_COOLDOWN_SECONDS
        key = "" if decision.account_wide else model_id
        length_s = self.breaker.open(key, error, wait_s, decision.resets_in or decision.wait_s)
        if not error.retry_after and isinstance(error, RateLimited):
            error.retry_after = length_s

    def refused(self, model_id: str, error: ApiError) -> None:
        self.cool_down(model_id, RetryDecision(error, "pause"))

    def user(self) -> str:
        return self.account.file.user

    def status(self) -> Json:
        status, account = super().status(), self.account
        try:
            with advising(self):
                account.load()
            for failure in account.breaker.cooldowns.values():
                status |= {"health": "failing", "reason": failure.error.text()}
        except NotSignedIn as error:
            status |= {"health": "not signed in", "reason": error.text()}
        if account.cached is not None and account.cached.expires_at != math.inf:
            status["token_expires_at"] = account.cached.expires_at
        return status

    async def wait_closed(self) -> None:
        if self.account.tasks:
            await asyncio.wait(self.account.tasks)

    def close(self) -> None:
        super().close()
        self.account.close()


#: action of a RetryDecision -> how often it is taken, and the method that prepares the resend
Remedies = dict[str, tuple[float, Callable[[Any, RetryDecision], Awaitable[None]] | None]]


def set_reset(decision: RetryDecision, resets_at: float) -> None:
    """Notes when spent credits come back; `resets_at` in Unix seconds."""
    left_s = resets_at - time.time()
    if left_s > 0:
        decision.resets_in = left_s
        decision.error.hint = f"They come back on {iso_day(resets_at)}."


@dataclass(eq=False)
class Attempt(Generic[Token]):
    """One call, sent until it succeeds or no remedy is left."""

    remedies: ClassVar[Remedies]
    max_count: ClassVar[float] = math.inf
    transport_action: ClassVar[str] = "wait"  #: the action if a host could not be reached

    provider: AccountProvider[Token]
    call: Call
    token: Token
    count: int = 0
    taken: dict[str, int] = field(default_factory=lambda: defaultdict(int))  #: pauses are waits

    async def send(self) -> UpstreamResponse:
        raise NotImplementedError

    async def classify(self, response: UpstreamResponse) -> RetryDecision | None:
        """What a refusal means; None if the response can be passed on."""
        raise NotImplementedError

    async def give_up(self, decision: RetryDecision) -> None:
        """Completes a decision whose error is final."""

    async def run(self) -> UpstreamResponse:
        call, window = self.call, self.call.model.max_prompt
        while True:
            self.count += 1
            call.attempts = self.count
            try:
                response = await self.send()
                decision = await self.classify(response)
            except UpstreamError as failure:
                # Only a request that was never sent is safe to send again.
                is_unsent = isinstance(failure, Unreachable)
                decision = RetryDecision(failure, self.transport_action if is_unsent else "")
            if decision is None:
                return response
            error = decision.error
            if isinstance(error, ContextTooLong) and not error.is_counted and window:
                # Clients look for the numbers: tokens, and their limit.
                tokens = max(int(estimate_value(call.body)), window + 1)
                error = decision.error = ContextTooLong(tokens, window)
            call.refusals.append(error.kind)
            facts = {"provider": self.provider.name, "model": call.model.id, "kind": error.kind}
            action = decision.action or "none"
            log_event("info", "upstream_refused", **facts, action=action, attempt=self.count)
            try:
                await self.repair(decision)
            except ApiError:
                self.provider.cool_down(call.model.id, decision)
                raise

    async def repair(self, decision: RetryDecision) -> None:
        """Takes the decision's action, or raises its error."""
        action = "wait" if decision.action == "pause" else decision.action
        self.taken[action] += 1
        limit, remedy = self.remedies.get(action, (0, Attempt.pause))
        if self.count >= self.max_count or self.taken[action] > limit:
            await self.give_up(decision)
            raise decision.error
        if remedy is not None:
            await remedy(self, decision)

    async def pause(self, decision: RetryDecision) -> None:
        wait_s = decision.wait_s
        if wait_s is None:
            is_pause = decision.action == "pause"
            steps = OVERLOAD_BACKOFF_SECONDS if is_pause else BACKOFF_SECONDS
            step = self.taken["wait" if is_pause else decision.action]
            wait_s = steps[min(step, len(steps)) - 1] * (1 + os.urandom(1)[0] / 1024)
        if wait_s > MAX_WAIT_SECONDS:
            raise decision.error
        await asyncio.sleep(wait_s)

    @staticmethod
    async def read_error_body(response: UpstreamResponse) -> bytes:
        """The body of an error response; b"" if it breaks off: then only the status counts."""
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                return await response.read(MAX_ERROR_BODY_BYTES)
        except (ApiError, TimeoutError):
            return b""
        finally:
            response.close(is_complete=False)


# 15.2 Echo

ECHO_LABEL = "[echo] "
ECHO_CALL_TRIGGER = "call the tool"
SAMPLES = {"integer": 1, "number": 1, "boolean": True, "array": [], "null": None}


def sample_value(schema: Any) -> Any:
    """The first of an `enum`, otherwise something of the right type; objects get what they need."""
    choices = schema.get("enum") if isinstance(schema, dict) else ["echo"]
    if isinstance(choices, list) and choices:
        return choices[0]
    if schema.get("type") == "object":
        properties, required = get_dict(schema, "properties"), schema.get("required")
        names = required if isinstance(required, list) else []
        return {name: sample_value(properties[name]) for name in names if name in properties}
    return SAMPLES.get(str(schema.get("type")), "echo")


def echo_events(conversation: Conversation, prompt_tokens: int) -> Iterator[Event]:
    """Repeats the last turn that is not the system's: Claude Code adds system text after it."""
    turns = conversation.turns
    blocks = next((turn.blocks for turn in reversed(turns) if turn.role != "system"), [])
    prompt = join_texts(blocks)
    calls_tool = bool(conversation.tools) and ECHO_CALL_TRIGGER in prompt.lower()
    yield MessageStart()
    if calls_tool:
        tool = conversation.tools[0]
        text = dump_text(sample_value(tool.schema))
        yield BlockStart("tool", "call_" + short_hash(prompt + tool.name, 16), tool.name)
        yield BlockDelta("arguments", text)
    else:
        results = [block for block in blocks if isinstance(block, ToolResult)]
        parts = [f"The tool said: {join_texts(result.blocks)}" for result in results]
        text = ECHO_LABEL + "\n\n".join(filter(None, [*parts, prompt]))
        images = sum(isinstance(block, Image) for turn in turns for block in turn.blocks)
        if images:
            text += f" (images seen: {images})"
        step = max(8, len(text) // 400)
        yield BlockStart("text")
        for start in range(0, len(text), step):
            yield BlockDelta("text", text[start : start + step])
    yield BlockStop()
    output = max(1, int(estimate_text(text)))
    yield UsageUpdate(Usage(prompt_tokens, output=output, source="reported"))
    yield MessageStop("tool" if calls_tool else "end")


class LocalResponse:
    """A response made on this machine, with the methods of UpstreamResponse."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.error: ApiError | None = None
        self.resumed = asyncio.Event()
        self.resumed.set()

    async def read_some(self) -> bytes:
        return next(self.pieces, b"")

    async def relay(self, sink: Callable[[bytes], None]) -> None:
        while piece := next(self.pieces, b""):
            sink(piece)
            await asyncio.sleep(0)
            await self.resumed.wait()
        if self.error:
            raise self.error

    def hold(self, paused: bool) -> None:
        if paused:
            self.resumed.clear()
        else:
            self.resumed.set()

    def fail(self, error: ApiError) -> None:
        self.error = error
        self.stop()

    def stop(self) -> None:
        self.pieces = iter(())
        self.resumed.set()

    def close(self, is_complete: bool) -> None: ...


BodyStream = UpstreamResponse | LocalResponse


class EchoProvider(Provider):
    """Responds locally; speaks OpenAI chat, so that every other dialect is really converted."""

    local = True

    async def fetch_models(self) -> dict[str, Model]:
        model = Model("echo", self.name, name="Echo (responds locally)", vendor="aiclient-api")
        model.max_output = model.max_prompt = model.context = 1_000_000
        model.files = True
        return {model.id: model}

    async def open(self, call: Call) -> BodyStream:
        conversation = CHAT.read_request(call.body)
        if not conversation.turns:
            raise InvalidRequest("messages: there is nothing to echo.", param="messages")
        response_id = CHAT.id_prefix + os.urandom(12).hex()
        writer = CHAT.writer(ResponseContext(response_id, int(time.time()), "echo", True))

        def pieces() -> Iterator[bytes]:
            for event in echo_events(conversation, estimate_request(call.body)):
                for frame in writer.write(event):
                    yield CHAT.encode(frame)
            yield CHAT.tail

        return LocalResponse(pieces())

    def status(self) -> Json:
        return {**super().status(), "reason": "responds locally, needs no account"}


# 15.3 Copilot


def saved_token(token: CopilotToken) -> Json:
    """What the token file holds of it."""
    return {
        "copilot_token": token.access_token,
        "expires_at": int(token.expires_at),
        "refresh_in": int(token.refresh_in),
        "api_url": token.api_url,
        "refused": None,
    }


class CopilotAccount(Account[CopilotToken]):
    """A GitHub sign-in and the short-lived Copilot token that it is exchanged for."""

    provider: CopilotProvider
    service = "Copilot"
    renewal_gap_s = FORCED_RENEWAL_GAP_SECONDS
    refresher: asyncio.Task[None] | None = None  #: runs from the first token on
    scheme = ""  #: the Authorization scheme of a direct token, once the other one was refused

    def load(self) -> CopilotToken | None:
        """Reads the sign-in; the token is that of an earlier run or of another process."""
        content = self.read_file()
        try:
            github_token = clean_token(get_str(content, "github_token"))
        except SignInFailed:
            where = COPILOT_TOKEN_VARIABLE if self.file.memory else self.file.path
            raise NotSignedIn(f"{where} holds no github_token.") from None
        if github_token != self.refresh_secret:
            if self.refresh_secret:
                self.provider.forget_account()
            self.refresh_secret, self.cached, self.scheme = github_token, None, ""
        token, url = content.get("copilot_token"), content.get("api_url")
        if not isinstance(token, str) or not isinstance(url, str):
            return None
        own_url = self.provider.config.api_url.rstrip("/")
        is_allowed = url == own_url if own_url else allowed_api_host(url, self.provider.config)
        expires_at = read_time(content.get("expires_at"))
        if not is_allowed or not 0 < expires_at - time.time() <= MAX_TOKEN_SECONDS:
            return None
        lifetime_s = positive_int(content.get("refresh_in")) or COPILOT_DEFAULT_LIFE_SECONDS
        return CopilotToken(token, url, expires_at, lifetime_s)

    async def ask_github(self, path: str) -> tuple[int, Headers, bytes]:
        """(status, headers, body) of a GET on GitHub's API; raises UpstreamError and the like."""
        url = self.provider.config.github_api_url.rstrip("/") + path
        headers = exchange_headers(self.refresh_secret)
        return await self.provider.client.fetch("GET", url, headers, EXCHANGE_SECONDS)

    async def fetch_token(self) -> CopilotToken:
        """Raises NotSignedIn, NotEntitled, temporary errors; DIRECT_TOKENS are used as they are."""
        config, github_token = self.provider.config, self.refresh_secret
        is_direct, status = github_token.startswith(PROGRAM_TOKENS), 404
        if not is_direct:
            status, headers, data = await self.ask_github("/copilot_internal/v2/token")
            is_direct = status == 404 and github_token.startswith(DIRECT_TOKENS)
        if is_direct:
            try:
                status, headers, data = await self.ask_github("/copilot_internal/user")
            except (UpstreamError, UpstreamTimeout) as error:
                log_event("info", "account_unavailable", reason=error)
                return direct_token(github_token, {}, config, time.time())
        body = load_object(data) if status == 200 else None
        if is_direct and status != 401:  # a fine-grained token may not ask this
            return direct_token(github_token, body or {}, config, time.time())
        if status != 200:
            decision = classify_exchange_error(status, headers, data, time.time())
            is_temporary = decision.action == "wait" and not is_direct
            if is_temporary and isinstance(decision.error, NotSignedIn):
                raise Overloaded(decision.error.message)
            raise decision.error
        if body is None:
            raise UpstreamError("GitHub's token response is not JSON.")
        return read_token_response(body, config, time.time())

    async def exchange(self, saved: CopilotToken | None) -> CopilotToken:
        try:
            token = await self.fetch_token()
        except NotSignedIn:
            self.cached = None
            self.file.save({"copilot_token": None})
            raise
        self.file.save(saved_token(token))
        host = split_url(token.api_url)[1]
        log_event("info", "token_refreshed", provider=self.provider.name, host=host)
        return token

    def use(self, token: CopilotToken) -> CopilotToken:
        if self.refresher is None or self.refresher.done():
            self.refresher = asyncio.get_running_loop().create_task(self.refresh_in_background())
        if self.scheme and token.is_direct:
            token.scheme = self.scheme
        return super().use(token)

    async def renew(self, refused: CopilotToken, action: str = "refresh") -> CopilotToken | None:
        """With the action `switch` the same token in the other scheme, which is kept."""
        if action != "switch" or not refused.is_direct:
            return await super().renew(refused)
        self.scheme = "Bearer" if refused.scheme == "token" else "token"
        return self.use(replace(refused, scheme=self.scheme))

    async def refresh_in_background(self) -> None:
        """Renews the token shortly before it is due, while it is in use."""
        while self.cached is not None:
            due_s = self.stale_at - time.monotonic() - 2 * COPILOT_REFRESH_EARLY_SECONDS
            await asyncio.sleep(max(due_s, COPILOT_REFRESH_EARLY_SECONDS))
            if not self.used:
                return  # the next request will ask
            self.used = False
            try:
                await self.obtain(margin_s=math.inf)
            except ApiError:
                return  # `refresh` has logged it, or the sign-in is gone

    def close(self) -> None:
        super().close()
        if self.refresher is not None:
            self.refresher.cancel()


class CopilotAttempt(Attempt[CopilotToken]):
    provider: CopilotProvider
    max_count = MAX_ATTEMPTS

    def __init__(self, provider: CopilotProvider, call: Call, token: CopilotToken) -> None:
        super().__init__(provider, call, token)
        self.without_reasoning = False
        request_info = call.request_info
        self.interaction = hash_uuid(request_info.session or call.model.id + request_info.opening)
        self.initial_dropped = list(call.dropped)
        self.rejections: Rejections = {}
        self.betas = ""  #: as last sent

    def body(self) -> Json:
        provider, call = self.provider, self.call
        model = call.model
        memory = provider.rejection_memory
        self.rejections = memory.rejections(model.id, call.dialect, time.monotonic())
        draft = sanitize_body(call.dialect, call.body, model, self.rejections, model.streaming)
        if self.without_reasoning:
            strip_reasoning(draft.body)
        elif call.dialect == "responses":
            provider.reasoning.attach_items(draft.body)
        elif call.dialect == "chat" and not is_openai(model):
            provider.reasoning.attach(draft.body)
        call.dropped[:] = list(dict.fromkeys([*self.initial_dropped, *draft.dropped]))
        if model.id == AUTO_MODEL:
            del draft.body["model"]
        return draft.body

    async def send(self) -> UpstreamResponse:
        self.call.sent = body = await run_step(self.body)
        url = self.token.api_url + DIALECT_PATHS[self.call.dialect]
        data = await run_step(self.call.dump, body)
        return await self.provider.client.open("POST", url, lambda: self.headers(body), data)

    def headers(self, body: Json) -> dict[str, str]:
        call = self.call
        headers = self.provider.headers(self.token, "conversation-agent")
        headers["Content-Type"] = "application/json"
        headers["Accept"] = "text/event-stream" if body["stream"] else "application/json"
        headers["X-Interaction-Id"] = self.interaction
        headers["X-Initiator"] = call.request_info.initiator if self.count == 1 else "agent"
        if has_image(body.get("messages", body.get("input"))):
            headers["Copilot-Vision-Request"] = "true"
        if call.dialect == "messages":
            headers["anthropic-version"] = "2023-06-01"
            refused = self.rejections.get("beta", ())
            self.betas = messages_betas(body, call.betas, refused, call.model)
            if self.betas:
                headers["anthropic-beta"] = self.betas
        own_names = {name.lower() for name in headers} if call.model.headers else ()
        headers |= {k: v for k, v in call.model.headers.items() if k not in own_names}
        return headers

    async def classify(self, response: UpstreamResponse) -> RetryDecision | None:
        provider, call = self.provider, self.call
        if response.status == 200:
            provider.quota_watch.update_from_headers(response.headers)
            return None
        refusal = (response.status, response.headers, await self.read_error_body(response))
        sent, betas = call.sent or {}, self.betas.split(",")
        facts = (*refusal, call.model, sent, self.rejections, time.time(), betas)
        decision = classify_copilot_error(*facts)
        learned = decision.rejections
        provider.rejection_memory.add(call.model.id, call.dialect, learned, time.monotonic())
        provider.quota_watch.on_error(decision.error)
        if call.model.auto and response.status in (400, 401, 403, 404, 422):
            words = " ".join(read_error_response(response.status, refusal[2]))
            if decision.action == "relist" or AUTO_REFUSED.search(words):
                decision.action = "choose"
        return decision

    async def give_up(self, decision: RetryDecision) -> None:
        is_refused = decision.action == "refresh" and isinstance(decision.error, NotSignedIn)
        if is_refused and not self.token.is_direct:
            message = "Copilot refuses the token that it has just issued."  # no new sign-in helps
            decision.error = Overloaded(message, retry_after=FORCED_RENEWAL_GAP_SECONDS)
        elif decision.action == "cool_down" and decision.wait_s is None:
            watch = self.provider.quota_watch
            if time.monotonic() - watch.polled_at >= QUOTA_RETRY_SECONDS:
                await watch.poll()
            if watch.latest and any(row.remaining == 0 for row in watch.latest.allowances):
                set_reset(decision, watch.latest.resets_at)

    # -- remedies

    async def renew(self, decision: RetryDecision) -> None:
        renewed = await self.provider.account.renew(self.token, decision.action)
        if renewed is None:
            await self.give_up(decision)
            raise decision.error
        self.token = renewed

    async def forget_reasoning(self, decision: RetryDecision) -> None:
        if not strip_reasoning(self.body()):
            raise decision.error
        self.without_reasoning = True

    async def await_list(self, decision: RetryDecision) -> None:
        model = self.call.model  # plans with nothing but Auto have no model to pick
        if model.guessed or model.raw.get("model_picker_enabled") is False:
            raise decision.error
        await asyncio.sleep(UNSUPPORTED_MODEL_WAITS[self.count - 1])

    async def choose_again(self, decision: RetryDecision) -> None:
        provider, model = self.provider, self.call.model
        if model.id == AUTO_MODEL:
            provider.rule_out(AUTO_UNNAMED)
        for key in [key for key, (choice, _) in provider.choices.items() if choice is model]:
            del provider.choices[key]
        raise WrongDialect(decision.error.message, hint=decision.error.hint, param="model")

    async def change_dialect(self, decision: RetryDecision) -> None:
        model = self.call.model
        others = tuple(dialect for dialect in model.dialects if dialect != self.call.dialect)
        if not others:
            raise decision.error
        model.dialects = others
        raise WrongDialect(decision.error.message, param="model")

    remedies: ClassVar[Remedies] = {
        "wait": (MAX_ATTEMPTS, Attempt.pause),
        "retry_once": (1, Attempt.pause),
        "refresh": (1, renew),
        "switch": (1, renew),
        "repair": (MAX_ATTEMPTS, None),  # `body` applies the rejections just learned
        "forget": (1, forget_reasoning),
        "relist": (MAX_ATTEMPTS, await_list),
        "reroute": (1, change_dialect),
        "choose": (1, choose_again),
    }


class CopilotProvider(AccountProvider[CopilotToken]):
    config: CopilotConfig
    account: CopilotAccount
    account_class = CopilotAccount
    attempt_class = CopilotAttempt

    def __init__(self, name: str, config: CopilotConfig, paths: Paths, client: HttpClient) -> None:
        super().__init__(name, config, paths, client)
        self.machine = load_machine(paths)
        self.session_id = f"{random_uuid()}{int(time.time() * 1000)}"

    def forget_account(self) -> None:
        super().forget_account()
        self.rejection_memory = RejectionMemory()
        self.auto_paths = list(AUTO_PATHS)  #: those that this account is not known to lack
        #: Auto's choices by conversation, the latest used last: (model, monotonic expiry)
        self.choices: OrderedDict[str, tuple[Model, float]] = OrderedDict()

    def secrets(self) -> tuple[str, ...]:
        token = self.account.cached
        sessions = [model.headers.get(SESSION_HEADER, "") for model, _ in self.choices.values()]
        return (self.account.refresh_secret, token.access_token if token else "", *sessions)

    def headers(self, token: CopilotToken, intent: str) -> dict[str, str]:
        ids = (self.session_id, *self.machine)
        return copilot_headers(token, self.config, ids, intent, random_uuid())

    def guess(self, model_id: str) -> Model | None:
        """Any exact name is tried, listed or not."""
        guess = guess_copilot_model(model_id, self.name)
        return replace(guess, auto=True) if model_id == AUTO_MODEL else guess

    async def choose_model(self, model: Model, key: str, prompt: str, has_image: bool) -> Model:
        """The model that Auto has chosen for the conversation, or chooses now."""
        choice, expires_at = self.choices.pop(key, (model, 0.0))
        if time.monotonic() < expires_at:
            self.choices[key] = choice, expires_at
            return choice
        failure: ApiError | None = None
        tier, prompt = self.config.auto_tier, prompt[:AUTO_PROMPT_CHARS]
        for path in list(self.auto_paths):
            if path == AUTO_UNNAMED:
                return replace(model, dialects=("chat",))
            try:
                payload = auto_payload(path, prompt, has_image, tier)
                body = await self.post(path, payload, model, "model-access", AUTO_SECONDS)
                if isinstance(body, RetryDecision):
                    raise body.error
                chosen = read_auto_choice(body, self.catalogue.models, self.name)
            except ApiError as error:
                failure = error
                log_event("info", "auto_failed", provider=self.name, path=path, reason=error)
                if isinstance(error, (ModelNotFound, Forbidden)):  # gated off for this account
                    self.rule_out(path)
                continue
            left_s = max(read_time(body.get("expires_at")) - time.time(), 0.0)
            margin_s = min(COPILOT_REFRESH_MARGIN_SECONDS, COPILOT_REFRESH_MARGIN_SHARE * left_s)
            self.choices[key] = chosen, time.monotonic() + left_s - margin_s
            if len(self.choices) > MAX_AUTO_CHOICES:
                self.choices.popitem(last=False)
            return chosen
        if failure is not None and self.auto_paths:
            raise failure
        message = "Copilot does not offer Auto to this account."
        raise ModelNotFound(message, hint="GET /v1/models lists models.", param="model")

    async def post(
        self, path: str, body: Json, model: Model, intent: str, seconds: float
    ) -> Json | RetryDecision:
        """The object that Copilot returns, or what its refusal means; raises ApiError."""
        data = dump_json(body)

        async def send(token: CopilotToken) -> Json | RetryDecision:
            headers = {**self.headers(token, intent), "Content-Type": "application/json"}
            if path in AUTO_PATHS:
                headers["X-GitHub-Api-Version"] = AUTO_PATHS[path]
            reply = await self.client.fetch("POST", token.api_url + path, headers, seconds, data)
            if reply[0] != 200:
                return classify_copilot_error(*reply, model, body, {}, time.time())
            payload = load_object(reply[2], MAX_EMBEDDING_VALUES)
            if payload is None:
                raise UpstreamError("Copilot's response is not JSON.")
            return payload

        return await self.ask(send)

    def rule_out(self, path: str) -> None:
        """This account lacks a way to ask for Auto, and without any it lacks the model."""
        if path in self.auto_paths:
            self.auto_paths.remove(path)
        if not self.auto_paths:
            self.catalogue.models.pop(AUTO_MODEL, None)

    async def fetch_models(self) -> dict[str, Model]:
        async def send(token: CopilotToken) -> Json | RetryDecision:
            url, headers = token.api_url + "/models", self.headers(token, "model-access")
            status, _, data = await self.client.fetch("GET", url, headers, MODELS_SECONDS)
            if status in (400, 401, 403, 421):
                code = read_error_response(status, data)[0]
                decision = classify(COPILOT_FAULTS, status, "", code, tail="")
                if type(decision.error) is not InvalidRequest:
                    return decision
            body = load_object(data) if status == 200 else None
            if body is None:
                raise UpstreamError(f"Copilot's model list came with status {status}.")
            return body

        body = await self.ask(send)
        if isinstance(body, RetryDecision):
            raise body.error
        models = read_copilot_models(body, self.name)
        model = Model(AUTO_MODEL, self.name, name="Auto", vendor="GitHub", auto=True)
        auto = {AUTO_MODEL: model} if self.auto_paths else {}
        flags = (m.raw.get("model_picker_enabled", True) for m in models.values() if not m.embeds)
        # Where nothing may be picked, it is the first that a client sees.
        return models | auto if any(flags) else auto | models | auto

    async def embed(self, body: Json, model: Model) -> tuple[Json, Usage]:
        texts, is_packed = read_embeddings(body)
        options = {key: body[key] for key in ("dimensions",) if body.get(key) is not None}
        rows: list[Json] = []
        usage = Usage(source="reported")
        with self.breaker.guarded(model.id):
            for start in range(0, len(texts), MAX_EMBEDDED):
                batch = texts[start : start + MAX_EMBEDDED]
                request = {"model": model.id, "input": batch, **options}
                response = await self.embed_batch(request, model)
                entries = get_dicts(response, "data")
                if len(entries) != len(batch):
                    raise UpstreamError("Copilot returned fewer or more embeddings than texts.")
                rows += sorted(entries, key=lambda entry: get_int(entry, "index", 0))
                usage.input += get_int(get_dict(response, "usage"), "prompt_tokens", 0)
        return write_embeddings(rows, usage, is_packed), usage

    async def embed_batch(self, body: Json, model: Model) -> Json:
        count, request = 0, ("/embeddings", body, model, "conversation-other", EMBEDDINGS_SECONDS)
        while isinstance(result := await self.post(*request), RetryDecision):
            count += 1
            self.quota_watch.on_error(result.error)
            wait_s = BACKOFF_SECONDS[0] if result.wait_s is None else result.wait_s
            is_transient = result.action in ("wait", "retry_once", "pause")
            if count == MAX_ATTEMPTS or not is_transient or wait_s > MAX_WAIT_SECONDS:
                self.cool_down(model.id, result)
                raise result.error
            await asyncio.sleep(wait_s)
        return result

    async def quota(self) -> Quota | None:
        self.account.load()
        reply = await self.account.ask_github("/copilot_internal/user")
        if reply[0] in (403, 404) and self.account.refresh_secret.startswith(PROGRAM_TOKENS):
            return None  # such tokens may not ask this
        if reply[0] != 200:
            raise classify_exchange_error(*reply, time.time()).error
        body = load_object(reply[2])
        if body is None:
            raise UpstreamError("GitHub's response about the account is not JSON.")
        return self.quota_watch.update(read_copilot_quota(body))


# 15.4 Kiro


def system_tag() -> str:
    """This system as the vendor's clients name it: `linux#6.8.0`."""
    if hasattr(os, "uname"):
        system = os.uname()
        return f"{system.sysname.lower()}#{system.release.partition('-')[0]}"
    return "win32#10.0.22631"


class KiroAccount(Account[KiroLogin]):
    """A Kiro sign-in: tokens that are refreshed here and maybe by other programs."""

    provider: KiroProvider
    service = "Kiro"
    renewal_gap_s = KIRO_FORCED_GAP_SECONDS
    machine_id = ""  #: other programs' files lack it

    def load(self) -> KiroLogin:
        content = self.read_file()
        try:
            login = read_kiro_login(content)
        except ValueError as error:
            raise NotSignedIn(f"{self.file.path} cannot be used: {error}.") from None
        login.arn = self.provider.config.profile_arn or login.arn
        saved_id = kiro_machine_id(get_str(content, "machine_id"))
        if saved_id and self.machine_id and saved_id != self.machine_id:
            self.provider.forget_account()
        login.machine_id = self.machine_id = saved_id or self.machine_id or login.machine_id
        self.refresh_secret = login.refresh
        return login

    async def get(self) -> KiroLogin:
        """An organisation's sign-in needs its profile, which is fetched once."""
        provider, login = self.provider, await super().get()
        if login.arn or login.kind not in ("idc", "external_idp"):
            return login
        profiles = provider.profiles
        if profiles is None:
            profiles = await provider.find_profiles(login)
        if len(profiles) > 1:
            choices = ", ".join(f"{arn} ({name})" for arn, name in profiles.items())
            hint = f"Set profile_arn in [providers.{provider.name}] to one of: {choices}."
            raise NotEntitled("This Kiro sign-in has several profiles.", hint=hint)
        for arn in profiles:
            return self.use(await self.save({"profile_arn": arn}, login))
        return login

    async def latest(self) -> KiroLogin:
        content = self.read_file()
        source = get_dict(content, "source")
        if source:
            shared = await asyncio.to_thread(read_shared_login, source)
            if shared is not None and is_newer(shared, content):
                if shared["auth_method"] != content.get("auth_method"):
                    self.provider.forget_account()
                machine_id = self.machine_id or None
                self.file.save({**shared, "machine_id": machine_id, "refused": None})
        return self.load()

    async def exchange(self, saved: KiroLogin | None) -> KiroLogin:
        assert saved is not None
        try:
            changes = await self.fetch_token(saved)
        except NotSignedIn:
            refused = (saved.refresh, saved.access_token)
            for wait_s in (0.0, 0.5, 1.0):  # another program may be about to write its new token
                await asyncio.sleep(wait_s)
                saved = await self.latest()
                if (saved.refresh, saved.access_token) != refused:
                    break
            else:
                raise
            self.use(saved)
            if self.current() is not None:
                return saved
            changes = await self.fetch_token(saved)
        log_event("info", "token_refreshed", provider=self.provider.name, kind=saved.kind)
        return await self.save({**changes, "refused": None}, saved)

    async def fetch_token(self, login: KiroLogin) -> Json:
        """One refresh; raises NotSignedIn if the refresh token is dead."""
        url, headers, body = kiro_refresh(login, self.provider.config)
        reply = await self.provider.client.fetch("POST", url, headers, KIRO_REFRESH_SECONDS, body)
        if reply[0] != 200:
            raise classify_kiro_refresh(*reply, time.time()).error
        payload = load_object(reply[2])
        if payload is None:
            raise UpstreamError("Kiro's response to the token refresh is not JSON.")
        return read_refresh_response(payload, time.time())

    async def save(self, changes: Json, login: KiroLogin) -> KiroLogin:
        """Saves changes of the token file, also for a program that shares the sign-in."""
        self.file.save({**changes, "machine_id": login.machine_id})
        source = get_dict(self.read_file(), "source")
        if source:
            await asyncio.to_thread(write_shared_login, source, changes, login.refresh)
        return self.load()


class KiroAttempt(Attempt[KiroLogin]):
    provider: KiroProvider
    transport_action = "reroute"

    def __init__(self, provider: KiroProvider, call: Call, token: KiroLogin) -> None:
        super().__init__(provider, call, token)
        endpoints, winner = kiro_endpoints(token, provider.config), provider.winner
        #: those left to try, the one that worked last first
        if winner and {winner._replace(shape=shape) for shape in KIRO_PATHS} & {*endpoints}:
            endpoints = list(dict.fromkeys((winner, *endpoints)))
        self.endpoints = endpoints
        session = UUID_TEXT.search(call.request_info.session)
        key = call.request_info.session or call.model.id + call.request_info.opening
        self.conversation = session[0].lower() if session else hash_uuid(key)
        self.run_id = random_uuid()
        attach_kiro_thinking(call.body, provider.reasoning)

    async def send(self) -> UpstreamResponse:
        endpoint, provider = self.endpoints[0], self.provider
        body = address_kiro_request(self.call.body, endpoint, self.conversation, self.run_id)
        version = provider.config.kiro_version
        static_headers = kiro_headers(self.token, endpoint.shape, version, system_tag())

        def headers() -> dict[str, str]:
            invocation = {"amz-sdk-invocation-id": random_uuid()}
            return {**static_headers, **invocation, "amz-sdk-request": "attempt=1; max=3"}

        url = endpoint.url + KIRO_PATHS[endpoint.shape]
        return await provider.client.open("POST", url, headers, dump_json(body))

    async def classify(self, response: UpstreamResponse) -> RetryDecision | None:
        """A 200 means nothing yet, so the first event is awaited."""
        content_type = response.headers.get("content-type", "").lower()
        decision: RetryDecision | None
        if response.status != 200 or "json" in content_type or "html" in content_type:
            data = await self.read_error_body(response)
            decision = classify_kiro_error(response.status, response.headers, data, time.time())
        else:
            with contextlib.ExitStack() as stack:
                stack.callback(response.close, is_complete=False)
                decision = await self.peek(response)
                if decision is None:
                    stack.pop_all()
                    self.provider.winner = self.endpoints[0]
                    self.provider.quota_watch.poll_soon()
                    return None
        self.provider.quota_watch.on_error(decision.error)
        return self.explain(decision)

    async def peek(self, response: UpstreamResponse) -> RetryDecision | None:
        """Reads until the response has content, and puts it all back; otherwise what is wrong.

        Nothing has gone to the client yet, so an exception, a broken stream or a response without
        any event can still be retried.
        """
        framing, chunks = KIRO.framing(), []
        try:
            while data := await response.read_some():
                chunks.append(data)
                if sum(map(len, chunks)) > KIRO_PEEK_BYTES:
                    break
                for frame in framing.frames(framing.complete(data)):
                    if "error" in frame or "invalidStateEvent" in frame:
                        payload = get_dict(frame, "error") or get_dict(frame, "invalidStateEvent")
                        return classify_kiro_error(500, Headers(), dump_json(payload), time.time())
                    content = get_dict(frame, "assistantResponseEvent").get("content")
                    is_whitespace = isinstance(content, str) and not content.strip()
                    if KIRO_CONTENT_EVENTS & frame.keys() and not is_whitespace:
                        response.push_back(b"".join(chunks))
                        return None
            if not data:
                framing.last_frames()
        except UpstreamError as error:
            return RetryDecision(error, "retry_once")
        if data or self.taken["empty"]:
            response.push_back(b"".join(chunks))
            return None  # it continues, or is empty for the second time
        return RetryDecision(UpstreamError("Kiro's response is empty."), "empty")

    def explain(self, decision: RetryDecision) -> RetryDecision:
        """Explains why a conversation's form was refused: the rules that changed it, its size."""
        if type(decision.error) is not InvalidRequest or decision.action not in ("", "reshape"):
            return decision
        call, window = self.call, self.call.model.max_prompt
        tokens = int(estimate_value(call.body))
        rules = ",".join(call.touched) or "none"
        facts = {"provider": self.provider.name, "model": call.model.id, "rules": rules}
        log_event("warning", "conversation_refused", **facts, tokens=tokens)
        log_event("debug", "conversation_form", form=summarize_kiro_body(call.body))
        if window and tokens > 0.9 * window:
            return RetryDecision(ContextTooLong(tokens, window))
        return decision

    async def give_up(self, decision: RetryDecision) -> None:
        """Finds out when spent credits come back; a lasting rate limit may mean the same."""
        error, provider = decision.error, self.provider
        if decision.action == "relist":
            provider.catalogue.fetched_at = -math.inf
        is_rate_limit = decision.action in ("wait", "pause") and isinstance(error, RateLimited)
        is_spent = decision.action == "cool_down" and isinstance(error, QuotaExceeded)
        decision.account_wide |= decision.action == "cool_down"
        if not (is_rate_limit or is_spent):
            return
        try:
            limits = await provider.limits()
        except ApiError as reason:
            log_event("info", "limits_unavailable", provider=provider.name, reason=reason)
            return
        rows = limits.allowances
        if is_rate_limit and rows and rows[0].is_spent:
            message = f"The Kiro credits are used up: {rows[0].used:g} of {rows[0].limit:g}."
            decision.error, decision.action = QuotaExceeded(message), "cool_down"
        elif is_rate_limit or not any(r.limit and (r.used or 0.0) >= r.limit for r in rows):
            return
        set_reset(decision, limits.resets_at)

    # -- remedies

    async def renew(self, decision: RetryDecision) -> None:
        account = self.provider.account
        renewed = await account.renew(self.token) if self.taken["refresh"] == 1 else None
        if renewed is None:  # the token may still be valid for another host or profile
            await self.next_endpoint(decision)
            return
        if renewed.arn != self.token.arn:  # the refresh has named the profile
            self.endpoints = kiro_endpoints(renewed, self.provider.config)
        self.token = renewed

    async def next_endpoint(self, decision: RetryDecision) -> None:
        """Another host if one is busy; waits for it if there is no other."""
        failed, *endpoints = self.endpoints
        is_busy = isinstance(decision.error, (Overloaded, Unreachable))
        if is_busy:
            endpoints = [endpoint for endpoint in endpoints if endpoint.url != failed.url]
        if endpoints:
            self.endpoints = endpoints
        elif is_busy:
            decision.action = "wait"
            await self.repair(decision)
        else:
            raise decision.error

    async def change_shape(self, decision: RetryDecision) -> None:
        """The other client's shape: hosts differ in the ones that they accept (2026-09)."""
        endpoint, *others = self.endpoints
        shape = next(name for name in KIRO_PATHS if name != endpoint.shape)
        self.endpoints = [endpoint._replace(shape=shape), *others]

    async def forget_thinking(self, decision: RetryDecision) -> None:
        if not strip_kiro_thinking(self.call.body):
            raise decision.error

    remedies: ClassVar[Remedies] = {
        "wait": (MAX_ATTEMPTS - 1, Attempt.pause),
        "retry_once": (1, Attempt.pause),
        "empty": (1, Attempt.pause),
        "refresh": (math.inf, renew),  # as long as there are endpoints
        "reroute": (math.inf, next_endpoint),
        "reshape": (1, change_shape),
        "forget": (1, forget_thinking),
    }


class KiroProvider(AccountProvider[KiroLogin]):
    """Kiro, formerly Amazon Q Developer and CodeWhisperer."""

    config: KiroConfig
    account: KiroAccount
    account_class = KiroAccount
    attempt_class = KiroAttempt

    def forget_account(self) -> None:
        super().forget_account()
        self.catalogue.built_in = known_kiro_models(self.name)
        #: of an organisation, by ARN; None until they could be fetched
        self.profiles: dict[str, str] | None = None
        self.winner: KiroEndpoint | None = None  #: the endpoint that worked last

    def secrets(self) -> tuple[str, ...]:
        login = self.account.cached
        return (login.access_token, login.refresh, login.client_secret) if login else ()

    def guess(self, model_id: str) -> Model | None:
        """Any exact name is tried, listed or not."""
        model = read_kiro_model({"modelId": model_spellings(model_id)[-1]}, self.name)
        if model is not None:
            model.guessed = True
        return model

    async def find_profiles(self, login: KiroLogin) -> dict[str, str]:
        """ARN -> name of the organisation's profiles, in both regions that have any."""
        profiles: dict[str, str] = {}
        is_final = True
        bases = kiro_control_urls(login, self.config)
        if not (self.config.management_url or self.config.api_url):
            bases = [KIRO_MANAGEMENT_URL.format(region=region) for region in KIRO_REGIONS]
        path, query = "/ListAvailableProfiles", dump_json({"maxResults": KIRO_PROFILES})
        for base in bases:
            body = await self.ask_control(login, path, query, base)
            if isinstance(body, RetryDecision):
                error = body.error
                log_event("info", "profiles_unavailable", provider=self.name, reason=error)
                is_final &= not isinstance(error, (UpstreamError, UpstreamTimeout, Overloaded))
                continue
            for row in get_dicts(body, "profiles")[:KIRO_PROFILES]:
                arn = row.get("arn")
                if isinstance(arn, str) and KIRO_ARN.fullmatch(arn):
                    profiles[arn] = get_name(row, "profileName") or "unnamed"
        self.profiles = profiles if is_final else None
        return profiles

    async def ask_control(
        self, login: KiroLogin, path: str, body: bytes = b"", base: str = ""
    ) -> Json | RetryDecision:
        """The response of one host of the control plane, or of each in turn; a body is posted.

        `/getUsageLimits?a=b` is `/Get-Usage-Limits?a=b` on some hosts (pi, 2026-08).
        """
        name, separator, query = path[1:].partition("?")
        kebab_name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name[:1].upper() + name[1:])
        headers = kiro_headers(login, "control", self.config.kiro_version, system_tag())
        headers["amz-sdk-request"] = "attempt=1; max=1"
        method, seconds = "POST" if body else "GET", KIRO_CONTROL_SECONDS
        if body:
            headers["Content-Type"] = "application/json"
        decision = RetryDecision(UpstreamError("Kiro has no host for this."))
        for host in [base] if base else kiro_control_urls(login, self.config):
            for spelling in (path, f"/{kebab_name}{separator}{query}"):
                headers["amz-sdk-invocation-id"] = random_uuid()
                try:
                    reply = await self.client.fetch(method, host + spelling, headers, seconds, body)
                except (UpstreamError, UpstreamTimeout) as error:
                    decision = RetryDecision(error, "wait")
                    break
                payload = load_object(reply[2])
                if reply[0] == 200 and payload is not None:
                    return payload
                decision = classify_kiro_error(*reply, time.time())
                if reply[0] not in (404, 405):
                    break
            if decision.action in ("", "refresh", "cool_down"):
                break  # another host would refuse it, too
        return decision

    async def control(self, path: str, query: dict[str, str]) -> Json:
        """A resource of the account; some sign-ins may not name a profile.  Raises ApiError."""
        login = await self.token()
        own_arn = login.arn or kiro_endpoints(login, self.config)[0].arn
        for arn in dict.fromkeys((own_arn, "")):
            parameters = {**query, "profileArn": arn} if arn else query
            url = f"{path}?{urllib.parse.urlencode(parameters)}"
            result = await self.ask(self.ask_control, url)
            if not isinstance(result, RetryDecision):
                return result
            error = result.error
            if result.action == "cool_down" or not isinstance(error, (NotSignedIn, Forbidden)):
                break
        raise error

    async def fetch_models(self) -> dict[str, Model]:
        await self.token()
        entries: list[Any] = []
        query = {"origin": KIRO_ORIGINS["ide"], "maxResults": "50"}
        for _ in range(KIRO_MODEL_PAGES):
            try:
                body = await self.control("/ListAvailableModels", query)
            except NotSignedIn as error:  # the hosts of the models may still accept it
                raise UpstreamError(f"Kiro refused its model list: {error.message}") from None
            rows = body.get("models")
            entries += rows[: MAX_LISTED_MODELS - len(entries)] if isinstance(rows, list) else []
            next_token = body.get("nextToken")
            if not isinstance(next_token, str) or not TARGET.fullmatch(next_token):
                break
            query["nextToken"] = next_token
        models = read_kiro_models(entries, self.name)
        if not models:
            raise UpstreamError("Kiro's model list is empty.")
        return models

    async def limits(self, with_user: bool = False) -> Quota:
        query = {"origin": KIRO_ORIGINS["ide"], "resourceType": "AGENTIC_REQUEST"}
        if with_user:
            query["isEmailRequired"] = "true"
        quota = read_kiro_quota(await self.control("/getUsageLimits", query), time.time())
        self.quota_watch.update(replace(quota, account=""))  # only a sign-in shows the user's name
        return quota

    async def quota(self) -> Quota | None:
        await self.limits()
        return self.quota_watch.latest

    def refused(self, model_id: str, error: ApiError) -> None:
        if isinstance(error, RateLimited):  # a spent quota may be one conversation's
            self.cool_down(model_id, RetryDecision(error, "pause", account_wide=True))


# 15.5 all providers


def make_providers(
    config: Config, paths: Paths, client: HttpClient, reusable: dict[str, Provider]
) -> dict[str, Provider]:
    """The enabled providers by name, in the order of the configuration; `reusable` ones stay."""
    providers: dict[str, Provider] = {}
    for name, entry in config.providers.items():
        if entry.enabled and name in reusable:
            providers[name] = reusable[name]
        elif entry.enabled and isinstance(entry, CopilotConfig):
            providers[name] = CopilotProvider(name, entry, paths, client)
        elif entry.enabled and isinstance(entry, KiroConfig):
            providers[name] = KiroProvider(name, entry, paths, client)
        elif entry.enabled:
            providers[name] = EchoProvider(name)
    return providers


def quotas(providers: dict[str, Provider]) -> Json:
    """`{NAME: Quota.as_json()}` of the known quotas, without asking the services."""
    latest = {name: provider.quota_watch.latest for name, provider in providers.items()}
    return {name: quota.as_json() for name, quota in latest.items() if quota is not None}


# ---- 16. Sign-in -------------------------------------------------------------------------------

TERMS = {
    "copilot": (
        "GitHub documents Copilot's interface for its own clients only, and this program\n"
        "presents itself to it as an editor does.  GitHub's terms apply to what you do with it;\n"
        "it may warn, limit or suspend accounts for excessive automated use:\n"
        "  https://docs.github.com/en/site-policy/acceptable-use-policies/"
        "github-acceptable-use-policies\n"
        "  https://docs.github.com/en/site-policy/github-terms/"
        "github-terms-for-additional-products-and-features"
    ),
    "kiro": (
        "Kiro's service is not documented for other programs, and this one presents itself to it\n"
        "as Kiro's own clients do.  Kiro says that using its subscription from third-party tools\n"
        "is not allowed, and has suspended accounts for unusual activity.  That risk is yours:\n"
        "  https://kiro.dev/faq/"
    ),
}
KIRO_METHODS = {
    "builder-id": "AWS Builder ID",
    "google": "Google",
    "github": "GitHub",
    "organisation": "your organisation (IAM Identity Center)",
}
REVOKE_AT = {
    "copilot": "https://github.com/settings/apps/authorizations",
    "builder_id": "https://profile.aws.amazon.com (Security)",
    "idc": "your organisation's AWS access portal",
    "external_idp": "your organisation's sign-in",
    "google": "https://app.kiro.dev and https://myaccount.google.com/connections",
    "github": "https://app.kiro.dev and https://github.com/settings/applications",
}


class Console:
    """The user, at a terminal or a pipe: messages go to standard error, results to output."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stderr.isatty()
        with contextlib.suppress(AttributeError, OSError):  # without job control
            # A background job that reads from its terminal would be stopped.
            self.interactive &= os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
        self.pending_input = b""

    def say(self, *lines: str) -> None:
        """Control characters, which could steer a terminal, are removed."""
        print("\n".join(map(one_line, lines)), file=sys.stderr, flush=True)

    async def read_line(self) -> str:
        """Raises EOFError.  Other tasks keep running, and Ctrl-C works."""
        while b"\n" not in self.pending_input:
            data = await self.read_some()
            if not data and not self.pending_input:
                raise EOFError
            self.pending_input += data or b"\n"
        line, _, self.pending_input = self.pending_input.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    async def read_some(self) -> bytes:
        """What standard input has, as soon as it has anything; b"" at EOF."""
        loop, fd, ready = asyncio.get_running_loop(), sys.stdin.fileno(), asyncio.Event()
        try:
            loop.add_reader(fd, ready.set)
        except (NotImplementedError, PermissionError):  # Windows; a plain file
            return await asyncio.to_thread(os.read, fd, 65536)
        try:
            await ready.wait()
            return os.read(fd, 65536)
        finally:
            loop.remove_reader(fd)

    async def ask(self, question: str, default: str = "") -> str:
        """Raises SignInFailed without a terminal."""
        if not self.interactive:
            raise SignInFailed(f"this needs a terminal to ask: {question}")
        prompt = f"{question} [{default}] " if default else f"{question} "
        print(one_line(prompt), end="", file=sys.stderr, flush=True)
        try:
            return await self.read_line() or default
        except EOFError:
            raise SignInFailed("the input ended before a reply") from None

    async def confirm(self, question: str, default: bool = True) -> bool:
        hint = "Y/n" if default else "y/N"
        choices = {"y/n": default, "y": True, "yes": True, "n": False, "no": False}
        while (choice := choices.get((await self.ask(question, hint)).lower())) is None:
            self.say("Please answer y or n.")
        return choice

    async def choose(self, question: str, options: dict[str, str]) -> str:
        """The name of an option, which is chosen by its name or number."""
        self.say(question)
        choices = dict(zip(options, options, strict=True))
        for number, (name, label) in enumerate(options.items(), 1):
            choices[str(number)] = name
            self.say(f"  {number}  {label}")
        while (choice := choices.get((await self.ask("Choice", "1")).lower())) is None:
            self.say(f"Please type a number from 1 to {len(options)}.")
        return choice


def open_browser(url: str) -> bool:
    """False without a graphical one: a browser in the terminal would take it over."""
    environ, command = os.environ, [sys.executable, "-I", "-m", "webbrowser", url]
    has_display = any(map(environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    has_window = sys.platform in ("darwin", "win32") or has_display
    is_local = has_window and not environ.get("SSH_CONNECTION")
    if not (is_local or environ.get("BROWSER")) or check_url(url.partition("?")[0]):
        return False
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):  # the link is on the terminal as well
        # In a process of its own, whose output does not reach this terminal.
        subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
        return True
    return False


def with_provider(where: str, name: str, settings: dict[str, str], text: str) -> str:
    """Adds what `[providers.NAME]` lacks; raises ConfigError if the file says otherwise."""
    table = get_dict(get_dict(tomllib.loads(text), "providers"), name)
    for key, value in settings.items():
        if key not in table:
            text = change_setting(text, where, f"providers.{name}.{key}", value)
        elif table[key] != value:
            reason = f"is {table[key]!r}, not {value!r}; change it there, or take another --name"
            raise ConfigError(f"{where}: providers.{name}.{key}: {reason}")
    return text


@dataclass(slots=True)
class SignInContext:
    """What every sign-in needs."""

    config: Config
    paths: Paths
    client: HttpClient
    console: Console
    browser: bool = True
    terms_shown: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def adding_provider(self, name: str, kind: str, settings: dict[str, Any]) -> Iterator[Any]:
        """Yields the configuration of a provider, which is added to the file after the body.

        What could fail at the end is checked before.
        """
        if not PROVIDER_NAME.fullmatch(name):
            raise WrongUsage(f"--name {name}: a name is letters, digits, '-' and '_'")
        config, path = self.config.providers.get(name), self.paths.config_file
        if config is not None and config.type != kind:
            raise WrongUsage(f"--name {name}: that provider's type is {config.type}, not {kind}")
        if config is not None and not config.enabled:
            self.console.say(f"Provider {name!r} is disabled: it will not be used.", "")
        edit = functools.partial(with_provider, path, name, {"type": kind, **settings})
        is_new = config is None or any(getattr(config, k) != v for k, v in settings.items())
        if is_new:
            edit(load_config_text(path))
        self.check_disk(name)
        self.show_terms(kind, name)
        try:
            yield replace(config or PROVIDER_CONFIGS[kind](), **settings)
        except ApiError as error:
            raise SignInFailed(error.text()) from None
        if is_new:  # the file may have been changed meanwhile
            edit_config(self.paths, edit)
            config = read_config_text(load_config_text(path), path).providers[name]
            self.config.providers[name] = config

    def check_disk(self, name: str) -> None:
        """Raises SignInFailed if a sign-in could not be saved: better before than after."""
        path = self.paths.token_file(name)
        with os_error_as(f"{path}: cannot be written", SignInFailed):
            make_private_dir(os.path.dirname(path))
            if not is_in_place(path):
                with tempfile.TemporaryFile(dir=os.path.dirname(path)) as file:
                    file.write(bytes(64 * KIB))

    async def save(self, name: str, content: Json) -> None:
        """Raises SignInFailed."""
        file = TokenFile(self.paths.token_file(name))
        with os_error_as(f"{file.path}: cannot be written", SignInFailed):
            async with file.lock():
                with contextlib.suppress(ProgramError):  # a link, or unreadable: it is replaced
                    load_private_json(file.path, quarantines=True)
                content = {key: v for key, v in content.items() if v not in ("", None)}
                save_private_json(file.path, content)

    def show_terms(self, kind: str, name: str) -> None:
        """Shows the vendor's terms before the first sign-in of a provider."""
        if kind not in self.terms_shown and not os.path.lexists(self.paths.token_file(name)):
            self.terms_shown.add(kind)
            self.console.say(*TERMS[kind].splitlines(), "")

    async def post(
        self, service: str, url: str, headers: dict[str, str], body: Json
    ) -> tuple[int, Headers, bytes]:
        """(status, headers, body) of a response; raises SignInFailed if there is none."""
        common = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers = {"Accept": "application/json", **common, **headers}
        try:
            return await self.client.fetch("POST", url, headers, SIGN_IN_SECONDS, dump_json(body))
        except ApiError as error:
            raise SignInFailed(f"{service} cannot be reached: {error.text()}") from None

    async def fetch_json(
        self, service: str, url: str, headers: dict[str, str], body: Json, problem: str
    ) -> Json:
        """As `post`; raises SignInFailed unless an object without an error comes back."""
        reply = await self.post(service, url, headers, body)
        payload = load_form_or_json(reply[2])
        if reply[0] != 200 or payload is None or "error" in payload:
            reason = classify_poll(*reply).message or f"status {reply[0]}"
            raise SignInFailed(f"{service} {problem}: {reason}")
        return payload

    async def run_device_flow(
        self,
        service: str,
        headers: dict[str, str],
        issuing: tuple[str, Json],
        polling: tuple[str, Json],
        code_key: str,
        problem: str = "issued no code",
    ) -> Json:
        """The token response after the user has entered a code (RFC 8628); raises SignInFailed.

        `issuing`, `polling`: (URL, body) of the requests; the latter gets the code as `code_key`.
        """
        say = self.console.say
        payload = await self.fetch_json(service, issuing[0], headers, issuing[1], problem)
        device = read_device_code(payload, service)
        say(f"Open    {device.url}", f"and type    {device.user_code}", "")
        if device.url_complete:
            say(f"or open    {device.url_complete}    and compare the code", "")
        if self.browser and open_browser(device.url_complete or device.url):
            say("A browser should open by itself; any other, on any machine, will do.", "")
        minutes = device.expires_in / 60
        say(f"Waiting for you; the code expires in {minutes:.0f} min, Ctrl-C cancels")
        url, body = polling[0], {**polling[1], code_key: device.code}
        expires_at = time.monotonic() + device.expires_in
        interval_s, trouble = device.interval + DEVICE_EXTRA_SECONDS, ""
        while True:
            await asyncio.sleep(min(interval_s, expires_at - time.monotonic()))
            poll = Poll("expired", {})
            try:
                if time.monotonic() < expires_at:
                    poll = classify_poll(*await self.post(service, url, headers, body))
            except SignInFailed as error:
                poll = Poll("unreachable", {}, str(error))
            if poll.state == "done":
                return poll.body
            if poll.state == "denied":
                raise SignInFailed(f"the sign-in was cancelled at {service}")
            if poll.state == "failed":
                raise SignInFailed(f"{service} refuses the sign-in: {poll.message}")
            if poll.state == "expired":
                raise SignInFailed("the code has expired; start again for a new one")
            if poll.state == "unreachable" and poll.message != trouble:
                trouble = poll.message
                say(f"{trouble}; trying again")
            if poll.state == "slow_down":
                new_interval_s = parse_number(poll.body.get("interval"))
                if new_interval_s is None or not 0 <= new_interval_s < 3600:
                    interval_s += DEVICE_SLOWER_SECONDS
                else:
                    interval_s = max(interval_s, new_interval_s + DEVICE_EXTRA_SECONDS)


# 16.1 Copilot

COPILOT_CLIENT_ID = "Iv1.b507a08c87ecfe98"  # the GitHub App of the editors' plugins
COPILOT_SCOPE = "read:user"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
TOKEN_VARIABLES = ("COPILOT_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN")  # in the Copilot CLI's order


async def sign_in_copilot(
    context: SignInContext, name: str, host: str = "", token: str = ""
) -> str:
    """Signs in at `host` ("" = as configured); returns a message for the user.

    `token`: "" = GitHub's device flow.  It is saved unless Copilot refuses it.
    """
    settings = {}
    if host:
        settings = {"github_url": f"https://{host}", "github_api_url": f"https://api.{host}"}
    with context.adding_provider(name, "copilot", settings) as config:
        token = token or await offer_environment_token(context.console)
        if not token:
            base, client_id = config.github_url.rstrip("/"), {"client_id": COPILOT_CLIENT_ID}
            payload = await context.run_device_flow(
                "GitHub",
                {"User-Agent": COPILOT_USER_AGENT},
                (base + "/login/device/code", {**client_id, "scope": COPILOT_SCOPE}),
                (base + "/login/oauth/access_token", {**client_id, "grant_type": DEVICE_GRANT}),
                code_key="device_code",
            )
            token = clean_token(str(payload["access_token"]))
        content, message = await check_copilot(context, name, config, token)
        await context.save(name, content)
    return message


async def offer_environment_token(console: Console) -> str:
    """A token for programs in the environment, which is used without asking if nobody can reply."""
    for name in TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if token.startswith(PROGRAM_TOKENS):
            console.say(f"{name} holds a token of the kind that GitHub documents for programs.")
            if not console.interactive or await console.confirm("Use it?"):
                return clean_token(token)
    return ""


async def check_copilot(
    context: SignInContext, name: str, config: CopilotConfig, token: str
) -> tuple[Json, str]:
    """(token file content, message for the user); raises NotSignedIn if it is refused."""
    provider = CopilotProvider(name, config, context.paths, context.client)
    account, trouble = provider.account, ""
    content = account.file.memory = {"type": "copilot", "github_token": token}
    try:
        if (await account.get()).is_direct:  # nothing has been asked of Copilot yet
            await provider.fetch_models()
    except (NotSignedIn, Forbidden):
        raise
    except ApiError as error:
        trouble = f".  It could not be checked now; the first request will try it: {error}"
    finally:
        provider.close()
    try:
        for path in ("/user", "/copilot_internal/user"):
            status, _, data = await account.ask_github(path)
            user = load_object(data) or {} if status == 200 else {}
            content["login"] = content.get("login") or get_str(user, "login")
            content["plan"] = get_str(user, "copilot_plan")
    except ApiError as error:
        trouble = trouble or f".  The account could not be read: {error}"
    who = f"{content.get('login') or '(unknown)'} at {split_url(config.github_url)[1]}"
    plan = f", plan {content['plan']}" if content.get("plan") else ""
    return content, f"Signed in to Copilot as {who}{plan}{trouble}"


# 16.2 Kiro

# The only ports that the portal redirects to.
KIRO_PORTAL_PORTS = (3128, 4649, 6588, 8008, 9091, 49153, 50153, 51153, 52153, 53153)
KIRO_SCOPES = (
    "codewhisperer:completions", "codewhisperer:analysis", "codewhisperer:conversations",
    "codewhisperer:transformations", "codewhisperer:taskassist",
)  # fmt: skip


async def sign_in_kiro(
    context: SignInContext,
    name: str,
    method: str = "",
    start_url: str = "",
    region: str = "",
    token: str = "",
) -> str:
    """By a method of KIRO_METHODS, "" = ask, or with an API key; returns a message for the user.

    `start_url` and `region` are an organisation's.  Raises SignInFailed.
    """
    console = context.console
    method = method or ("organisation" if start_url else "")
    check_organisation(start_url or KIRO_BUILDER_START_URL, region or "us-east-1")
    if not (method or token or console.interactive):
        raise WrongUsage(f"there is no terminal to ask on: use --method {'|'.join(KIRO_METHODS)}")
    with context.adding_provider(name, "kiro", {}) as config:
        if not (token or method):
            method = await console.choose("How do you sign in to Kiro?", KIRO_METHODS)
        if token:
            content = {"auth_method": "api_key", "access_token": token}
        elif method in ("google", "github"):
            content = await sign_in_by_portal(context, config, method)
        elif method == "builder-id":
            content = await sign_in_at_aws(context, config, KIRO_BUILDER_START_URL, "us-east-1")
        else:
            start_url = start_url or await console.ask("Your organisation's start URL:")
            if not region and console.interactive:
                region = await console.ask("Region of its IAM Identity Center:", "us-east-1")
            content = await sign_in_at_aws(context, config, start_url, region or "us-east-1")
        content["type"] = "kiro"
        try:
            content["machine_id"] = read_kiro_login(content).machine_id
        except ValueError as error:
            raise SignInFailed(f"Kiro's response is unusable: {error}") from None
        message = await check_kiro(context, name, config, content)
        await context.save(name, content)
    return message


async def check_kiro(context: SignInContext, name: str, config: KiroConfig, content: Json) -> str:
    """Tries and completes a new sign-in; returns a message for the user.

    Raises NotSignedIn if it is refused.
    """
    provider = KiroProvider(name, config, context.paths, context.client)
    provider.account.file.memory = content
    try:
        login = await Account.get(provider.account)
        if login.kind == "idc" and not login.arn and context.console.interactive:
            profiles = await provider.find_profiles(login)
            if len(profiles) > 1:
                arn = await context.console.choose("Which profile?", profiles)
                provider.account.use(await provider.account.save({"profile_arn": arn}, login))
        limits = await provider.limits(with_user=True)
    except ApiError as error:
        if isinstance(error, NotSignedIn) and not isinstance(error, NotEntitled):
            raise
        return f"Signed in to Kiro.  It could not be checked: {error.text()}"
    content |= {"user": limits.account, "plan": limits.plan}
    who = f" as {limits.account}" if limits.account else ""
    plan = f", plan {limits.plan}" if limits.plan else ""
    rows = (row for row in limits.allowances if row.limit)
    credit_text = "".join(f", {row.used:g} of {row.limit:g} credits used" for row in rows)
    return f"Signed in to Kiro{who}{plan}{credit_text}"


def check_organisation(start_url: str, region: str) -> None:
    if check_url(start_url) or not start_url.startswith("https://"):
        raise WrongUsage("--start-url: must be like https://d-1234567890.awsapps.com/start")
    if not AWS_REGION.fullmatch(region):
        raise WrongUsage(f"--region {region}: must be a region like us-east-1")


async def sign_in_at_aws(
    context: SignInContext, config: KiroConfig, start_url: str, region: str
) -> Json:
    """AWS's device flow: token file content without its type.  Raises SignInFailed."""
    check_organisation(start_url, region)
    base = (config.oidc_url or KIRO_OIDC_URL.format(region=region)).rstrip("/")
    registration = {
        "clientName": "Kiro IDE", "clientType": "public", "scopes": list(KIRO_SCOPES),
        "grantTypes": [DEVICE_GRANT, "refresh_token"], "issuerUrl": start_url,
    }  # fmt: skip
    url, problem = base + "/client/register", "refuses the sign-in"
    client = await context.fetch_json("AWS", url, {}, registration, problem)
    credentials = {name: get_str(client, name) for name in ("clientId", "clientSecret")}
    payload = await context.run_device_flow(
        "AWS",
        {},
        (base + "/device_authorization", {**credentials, "startUrl": start_url}),
        (base + "/token", {**credentials, "grantType": DEVICE_GRANT}),
        code_key="deviceCode",
        problem="issued no code (are the start URL and the region right?)",
    )
    is_builder = start_url.rstrip("/") == KIRO_BUILDER_START_URL
    return {
        "auth_method": "builder_id" if is_builder else "idc",
        **read_refresh_response(payload, time.time()),
        "client_id": credentials["clientId"],
        "client_secret": credentials["clientSecret"],
        "sign_in_expires_at": int(read_time(client.get("clientSecretExpiresAt"))),
        "idc_region": region,
        "start_url": start_url,
    }


async def sign_in_by_portal(context: SignInContext, config: KiroConfig, method: str) -> Json:
    """Kiro's own page in a browser (PKCE): token file content without its type."""
    state, verifier = b64url(os.urandom(24)), b64url(os.urandom(32))
    machine_id = os.urandom(32).hex()
    listener = CallbackListener(context.client.ticker, state, method)
    await listener.listen()
    url = portal_url(state, verifier, listener.port)
    context.console.say(f"Open    {url}", "")
    if context.browser and open_browser(url):
        context.console.say("A browser should open by itself.", "")
    context.console.say(
        "Where that browser cannot reach this machine, it will end at an address that begins with",
        f"http://localhost:{listener.port}/ and an error: copy that address and paste it here.",
        "",
    )
    callback = await listener.wait(context.console)
    option, issuer_url = callback.option, callback.issuer_url
    if option in ("builderid", "awsidc", "internal") and issuer_url:
        return await sign_in_at_aws(context, config, issuer_url, callback.region or "us-east-1")
    if option not in ("google", "github"):
        raise SignInFailed(f"a sign-in by {option} has to be imported: type auth import")
    redirect = f"http://localhost:{listener.port}{callback.path}?login_option={option}"
    body = {"code": callback.code, "code_verifier": verifier, "redirect_uri": redirect}
    agent = f"KiroIDE-{config.kiro_version}-{machine_id}"
    headers = {"User-Agent": agent, "Accept": "application/json, text/plain, */*"}
    url = (config.auth_url or KIRO_AUTH_URL).rstrip("/") + "/oauth/token"
    payload = await context.fetch_json("Kiro", url, headers, body, "refuses the sign-in")
    tokens = read_refresh_response(payload, time.time())
    return {"auth_method": option, "machine_id": machine_id, **tokens}


CALLBACK_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>aiclient-api</title>
<style>body{{font:1.1em system-ui;margin:20vh auto;max-width:30em;color-scheme:light dark}}</style>
<h1>{title}</h1><p>{text}</p></html>"""


class CallbackListener:
    """Waits on loopback for the browser's redirect, once, with the right state (RFC 8252)."""

    def __init__(self, ticker: Ticker, state: str, option: str) -> None:
        self.ticker, self.state, self.option = ticker, state, option
        self.callback: asyncio.Future[Callback] = asyncio.get_running_loop().create_future()
        self.servers: list[Server] = []
        self.port = KIRO_PORTAL_PORTS[0]

    async def listen(self) -> None:
        """Takes the first free one of the ports that the portal redirects to, if any is free."""
        for port in KIRO_PORTAL_PORTS:
            with contextlib.suppress(OSError):
                for host in ("127.0.0.1", "::1"):  # localhost may be either
                    config = ServerConfig(host=host, port=port, max_connections=16)
                    server = Server(config, self.ticker, self.handle, self.write_error)
                    await server.listen(open_listeners(host, port))
                    self.servers.append(server)
            if self.servers:
                self.port = port
                return

    async def handle(self, request: Request) -> Response:
        if request.headers.get("host") not in (f"localhost:{self.port}", f"127.0.0.1:{self.port}"):
            return self.page(421, "Not found", "This address is not served.")
        if request.path not in CALLBACK_PATHS or request.method != "GET":
            return self.page(404, "Not found", "Only the redirect of a sign-in is expected here.")
        if self.callback.done():
            return self.page(410, "Already done", "You can close this window.")
        try:
            self.accept(f"{request.path}?{request.query}")
        except ValueError:
            return self.page(400, "Another sign-in", "Start it again from the terminal.")
        if self.callback.exception():
            return self.page(200, "Not signed in", "The terminal shows why.")
        return self.page(200, "Almost done", "Close this window and go back to the terminal.")

    def write_error(self, error: ApiError, request: Request | None = None) -> Response:
        return self.page(error.status, "Error", "This request cannot be served.")

    @staticmethod
    def page(status: int, title: str, text: str) -> Response:
        """Fixed text, which repeats nothing from the request."""
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        headers |= {"Cache-Control": "no-store", "Connection": "close"}
        body = CALLBACK_PAGE.format(title=title, text=text).encode()
        return Response(status, body, headers, content_type="text/html; charset=utf-8")

    def accept(self, text: str) -> None:
        """Parses what was redirected or pasted; raises ValueError if it belongs elsewhere."""
        if self.callback.done():
            return  # the other way was quicker
        try:
            self.callback.set_result(read_callback(text, self.state, self.option))
        except SignInFailed as error:
            self.callback.set_exception(error)

    async def read_pasted(self, console: Console) -> None:
        with contextlib.suppress(EOFError):  # the redirect may still come
            while not self.callback.done():
                try:
                    self.accept(await console.read_line())
                except ValueError as error:
                    console.say(f"This does not fit: {error}.  Paste the whole address.")

    async def wait(self, console: Console) -> Callback:
        """Waits for the redirect or its pasted URL, then closes; raises SignInFailed."""
        pasting = asyncio.ensure_future(self.read_pasted(console))
        try:
            return await asyncio.wait_for(self.callback, CALLBACK_SECONDS)
        except TimeoutError:
            minutes = CALLBACK_SECONDS / 60
            raise SignInFailed(f"the browser did not return within {minutes:g} minutes") from None
        finally:
            pasting.cancel()
            for server in self.servers:  # the last page is still sent
                await server.drain(LINGER_SECONDS)


# 16.3 sign-ins of other programs on this machine


@dataclass(slots=True)
class FoundLogin:
    """A sign-in of another program."""

    program: str  #: as shown to the user
    path: str
    content: Json = field(repr=False)  #: of our token file
    host: str = ""  #: GitHub's; "" for Kiro
    problem: str = ""  #: why it cannot be used

    @property
    def kind(self) -> str:
        return str(self.content["type"])

    @property
    def account(self) -> str:
        """As shown to the user."""
        if self.host:
            return f"{self.content['login'] or 'an account'} at {self.host}"
        method, start_url = self.content["auth_method"], self.content.get("start_url")
        labels = {"idc": "organisation", "builder_id": "AWS Builder ID", "external_idp": "company"}
        where = f" at {start_url}" if method == "idc" and start_url else ""
        return f"{labels.get(method, method)}{where}"

    def __str__(self) -> str:
        if self.problem:
            return "  " + ": ".join(filter(None, (self.program, self.path, self.problem)))
        return f"  {self.kind}: {self.account} ({self.program}, {self.path})"

    def rank(self) -> tuple[Any, ...]:
        """Sorts usable ones first, and of a kind the living and then the newest."""
        content = self.content
        is_dead = 0 < read_time(content.get("sign_in_expires_at")) < time.time()
        age = -read_time(content.get("expires_at"))
        return bool(self.problem), get_str(content, "type"), is_dead, age


def copilot_login(path: str, token: str, host: str = "", user: str = "") -> FoundLogin:
    """Raises SignInFailed."""
    content = {"type": "copilot", "github_token": clean_token(token), "login": user}
    return FoundLogin("", path, content, host or "github.com")


def read_plugin_file(path: str) -> Iterator[FoundLogin]:
    for host, user, token in read_plugin_logins(read_json_file(path)):
        yield copilot_login(path, token, host, user)


def read_opencode_file(path: str) -> Iterator[FoundLogin]:
    body = read_json_file(path)
    for entry in (get_dict(body, "github-copilot"), get_dict(body, "github-copilot-enterprise")):
        if entry:
            host = get_str(entry, "enterpriseUrl").lower().rpartition("://")[2].partition("/")[0]
            yield copilot_login(path, get_str(entry, "refresh"), host)


def read_token_text(path: str) -> Iterator[FoundLogin]:
    with os.fdopen(open_regular(path), encoding="utf-8") as file:
        yield copilot_login(path, file.read(KIB))


def read_variable(name: str) -> list[FoundLogin]:
    return [copilot_login(name, os.environ[name])] if os.environ.get(name) else []


def read_gh(command: str) -> list[FoundLogin]:
    null = subprocess.DEVNULL
    output = subprocess.check_output(command.split(), stderr=null, timeout=10, text=True)
    return [copilot_login(command, output)]


def read_kiro_file(path: str) -> list[FoundLogin]:
    return [FoundLogin("", path, {**read_ide_login(path), "source": {"path": path}})]


def read_kiro_database(path: str) -> Iterator[FoundLogin]:
    """All rows: dead sign-ins stay beside the living one (seen in 2026-11)."""
    query = "SELECT key FROM auth_kv WHERE key LIKE '%:token'"
    with contextlib.closing(open_database(path, "ro")) as database:
        for (key,) in database.execute(query).fetchall():
            try:
                content = read_cli_login(database, key)
                content["source"] = {"key": key, "path": path}
                yield FoundLogin("", path, content)
            except ValueError as error:
                yield FoundLogin("", path, {}, problem=f"{key}: {error}")


# The values of `auth import --from`: the program as shown to the user; what reads a path, which may
# raise the errors of `find_logins`; the patterns of its paths.
# VS Code itself keeps its tokens in the system's secret store.  Of the environment, the Copilot CLI
# reads this variable first.
LITELLM, PLUGINS = "HOME/.config/litellm/github_copilot", "CONFIG/github-copilot"
IMPORTS: dict[str, tuple[str, Callable[[str], Iterable[FoundLogin]], tuple[str, ...]]] = {
    "copilot-plugin": ("an editor's plugin", read_plugin_file,
                       (f"{PLUGINS}/apps.json", f"{PLUGINS}/hosts.json")),
    "environment": ("the environment", read_variable, ("COPILOT_GITHUB_TOKEN",)),
    "gh": ("GitHub CLI", read_gh, ("gh auth token",)),
    "copilot-api": ("copilot-api", read_token_text, ("DATA/copilot-api/github_token",)),
    "litellm": ("LiteLLM", read_token_text,
                ("$GITHUB_COPILOT_TOKEN_DIR/$GITHUB_COPILOT_ACCESS_TOKEN_FILE",
                 "$GITHUB_COPILOT_TOKEN_DIR/access-token",
                 f"{LITELLM}/$GITHUB_COPILOT_ACCESS_TOKEN_FILE", f"{LITELLM}/access-token")),
    "opencode": ("opencode", read_opencode_file, ("DATA/opencode/auth.json",)),
    "kiro-ide": ("the Kiro IDE", read_kiro_file, ("HOME/.aws/sso/cache/kiro-auth-token.json",)),
    "kiro-cli": ("kiro-cli", read_kiro_database,
                 ("$KIROCLI_DB_PATH", "DATA/kiro-cli/data.sqlite3")),
    "amazon-q": ("Amazon Q", read_kiro_database, ("DATA/amazon-q/data.sqlite3",)),
}  # fmt: skip
OPT_IN_IMPORTS = ("gh",)  # its tokens can do more than Copilot


def login_paths(pattern: str) -> list[str]:
    """The system's own place first: programs may know Linux's only, wherever they run."""
    pattern = os.path.expandvars(pattern)
    name, _, rest = pattern.partition("/")
    local, unix = os.environ.get("LOCALAPPDATA", ""), user_folder({}, "", ".local/share")
    mac = user_folder({}, "", "Library/Application Support")
    folders = {
        "CONFIG": [local, user_folder(os.environ, "XDG_CONFIG_HOME", ".config")],
        "DATA": [local, mac, user_folder(os.environ, "XDG_DATA_HOME", ".local/share"), unix],
        "HOME": [user_folder({}, "", "")],
    }
    if "$" in pattern or name not in folders:
        return [] if "$" in pattern else [pattern]
    return [os.path.join(folder, rest) for folder in dict.fromkeys(folders[name]) if folder]


def find_logins(origins: Collection[str] = ()) -> list[FoundLogin]:
    """The sign-ins in `origins`, of IMPORTS; none = all but OPT_IN_IMPORTS.

    The best are first.  Where a source has none, that is a problem as well.
    """
    found: list[FoundLogin] = []
    errors = OSError, ValueError, ProgramError, sqlite3.Error, subprocess.SubprocessError
    for name in origins or [name for name in IMPORTS if name not in OPT_IN_IMPORTS]:
        program, read, patterns = IMPORTS[name]
        logins: list[FoundLogin] = []
        for path in (path for pattern in patterns for path in login_paths(pattern)):
            try:
                logins += read(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except errors as error:
                problem = getattr(error, "strerror", None) or str(error)
                logins.append(FoundLogin("", path, {}, problem=problem))
        for login in logins or [FoundLogin("", "", {}, problem="there is nothing")]:
            login.program = program
            if "source" in login.content:
                login.content["source"]["program"] = name
            found.append(login)
    unique: dict[Any, FoundLogin] = {}
    for login in sorted(found, key=FoundLogin.rank):
        unique.setdefault(login.content.get("github_token") or id(login), login)
    return list(unique.values())


def target_name(config: Config, login: FoundLogin) -> str:
    """The first provider of the sign-in's type and host, or the name for a new one."""
    for name, entry in config.providers.items():
        if isinstance(entry, CopilotConfig) and split_url(entry.github_url)[1] != login.host:
            continue
        if entry.type == login.kind:
            return name
    return f"{login.kind}-{login.host.partition('.')[0]}" if login.host else login.kind


async def import_logins(
    context: SignInContext, logins: list[FoundLogin], name: str, assume_yes: bool
) -> list[str]:
    """Imports what the user agrees to, or with `assume_yes` what replaces nothing.

    `name`: the provider's, "" for a matching one.  Returns messages; raises SignInFailed.
    """
    say = context.console.say
    messages: dict[str, str] = {}  # by provider
    failures = 0
    say("Found on this machine:", *map(str, logins))
    for login in logins:
        target = "" if login.problem else name or target_name(context.config, login)
        if not target or target in messages:
            continue
        is_signed_in = bool(file_identity(context.paths.token_file(target)))
        if not assume_yes:
            context.show_terms(login.kind, target)
            instead = " instead of its present sign-in" if is_signed_in else ""
            question = f"Use {login.account} of {login.program} as provider {target!r}{instead}?"
            if not await context.console.confirm(question, not is_signed_in):
                continue
        elif is_signed_in and not name:
            say(f"Provider {target!r} is signed in already; --name {target} replaces it.")
            continue
        try:
            messages[target] = await import_login(context, login, target)
        except SignInFailed as error:
            failures += 1
            say(f"{login.account} of {login.program}: {error}")
    if failures and not messages:
        raise SignInFailed("nothing was imported")
    return list(messages.values())


async def import_login(context: SignInContext, login: FoundLogin, name: str) -> str:
    if login.host:
        entry = context.config.providers.get(name) or CopilotConfig()
        fits = isinstance(entry, CopilotConfig) and split_url(entry.github_url)[1] == login.host
        host = "" if fits else login.host
        return await sign_in_copilot(context, name, host, login.content["github_token"])
    with context.adding_provider(name, "kiro", {}) as config:
        message = await check_kiro(context, name, config, login.content)
        await context.save(name, login.content)
    return f"{message}.  It stays shared with {login.program}: refreshed tokens are written back."


# 16.4 accounts


def account_row(name: str, entry: CopilotConfig | KiroConfig, file: TokenFile) -> Json:
    """Without secrets; times in Unix seconds, None for never or unknown."""
    kind = "" if isinstance(entry, KiroConfig) else split_url(entry.github_url)[1]
    row: Json = {"name": name, "type": entry.type, "enabled": entry.enabled, "kind": kind}
    row |= {"user": "", "plan": "", "expires_at": None, "token_expires_at": None}
    row["health"] = "not signed in"
    try:
        content = file.load()
        if content is None:
            return row
        if isinstance(entry, KiroConfig):
            row["kind"] = get_str(content, "auth_method") or kiro_kind(content)
            read_kiro_login(content)  # raises if it is unusable
            row["expires_at"] = int(read_time(content.get("sign_in_expires_at"))) or None
        else:
            clean_token(get_str(content, "github_token"))
    except (ProgramError, ValueError) as error:
        reason = str(error).removeprefix(f"{file.path}: ")
        return {**row, "health": f"unusable: {reason}"}
    row |= {"user": file.user, "plan": get_str(content, "plan"), "health": "ok"}
    row["token_expires_at"] = int(read_time(content.get("expires_at"))) or None
    if file.refused:
        row["health"] = f"needs sign-in: {content['refused']}"
    if row["expires_at"] and row["expires_at"] < time.time():
        row["health"] = "needs sign-in: it has expired"
    return row


def account_rows(config: Config, paths: Paths) -> list[Json]:
    return [
        account_row(name, entry, token_file(paths, name))
        for name, entry in config.providers.items()
        if isinstance(entry, (CopilotConfig, KiroConfig))
    ]


async def revoke_login(context: SignInContext, name: str) -> str:
    """Removes a sign-in; returns what is left to do.  Raises WrongUsage and ProgramError."""
    file, config = TokenFile(context.paths.token_file(name)), context.config
    folder, entry = os.path.dirname(file.path), config.providers.get(name)
    if isinstance(entry, EchoConfig):
        raise WrongUsage(f"{name}: responds locally and needs no sign-in")
    if entry is None and not (PROVIDER_NAME.fullmatch(name) and os.path.isdir(folder)):
        raise no_provider(name, [row["name"] for row in account_rows(config, context.paths)])
    kind = "copilot"
    with contextlib.suppress(ProgramError):  # a damaged file is removed as well
        content = load_private_json(file.path) or {}
        if get_str(content, "type") == "kiro":
            kind = get_str(content, "auth_method") or kiro_kind(content)
    with os_error_as(f"{file.path}: cannot be removed"):
        async with file.lock() as lock_path:
            removed = file.remove()
            with contextlib.suppress(OSError):  # a folder with other files in it stays
                os.unlink(lock_path)
                os.rmdir(folder)
    if not removed:
        raise ProgramError(f"{name}: there is no sign-in to remove")
    lines = [f"Removed {', '.join(removed)}.  A running gateway stops using it."]
    lines.append(f"To end it at the vendor as well: {REVOKE_AT.get(kind, 'https://app.kiro.dev')}")
    if entry is not None and name not in PROVIDER_CONFIGS:
        lines.append(f"To remove the provider as well: {program_command()} provider remove {name}")
    return "  ".join(lines)


async def offer_sign_in(context: SignInContext) -> None:
    """The first start on a terminal: offers what is on this machine, or a sign-in."""
    found, say = find_logins(), context.console.say
    origins = sorted({f"{login.kind} of {login.program}" for login in found if not login.problem})
    options = {"import": f"use what is on this machine: {', '.join(origins)}"} if origins else {}
    options |= {"copilot": "sign in to GitHub Copilot", "kiro": "sign in to Kiro"}
    options["later"] = "not now; only the model `echo` will work"
    try:
        choice = await context.console.choose("There is no account yet.", options)
        if choice == "import":
            for message in await import_logins(context, found, "", assume_yes=False):
                say(message)
        elif choice == "copilot":
            say(await sign_in_copilot(context, "copilot"))
        elif choice == "kiro":
            say(await sign_in_kiro(context, "kiro"))
    except ProgramError as error:
        say(f"{error}.  The gateway starts without an account.")
    say()


# ---- 17. Gateway -------------------------------------------------------------------------------

# 17.1 paths and the shield

Handler = Callable[[Request], Awaitable[Response]]


class Endpoint(NamedTuple):
    methods: Mapping[str, Handler]
    is_costly: bool = False  #: the rate limit applies
    is_polled: bool = False  #: logged at debug level
    is_open: bool = False  #: needs no key: clients probe it before they authenticate


SLASHES = re.compile(r"/{2,}")
API_PATH = re.compile(
    r"\A(?:/v1)*(?=/(?:chat|embeddings|messages|models|responses|status|usage)(?:/|\Z))"
)
ID_PATH = re.compile(r"(/v1/models/|/v1/responses/(?!(?:compact|input_tokens)\Z))(.+)", re.DOTALL)


@functools.lru_cache(maxsize=256)
def split_path(path: str) -> tuple[str, str]:
    """`//v1/models/gpt-5/` -> ("/v1/models/ID", "gpt-5"): an endpoint and the id after it.

    Clients send /v1 twice, no /v1, and extra slashes.
    """
    path = API_PATH.sub("/v1", SLASHES.sub("/", path).rstrip("/") or "/")
    found = ID_PATH.fullmatch(path)
    return (f"{found[1]}ID", found[2]) if found else (path, "")


def failure_status(failure: BaseException | None) -> tuple[int, str]:
    """(status, kind) to record; 499 is nginx's: the client has gone away."""
    if isinstance(failure, ApiError):
        return failure.status, failure.kind
    if isinstance(failure, WireError):
        return failure.status, InvalidRequest.kind
    if isinstance(failure, (asyncio.CancelledError, ConnectionError, EOFError)):
        return 499, "cancelled"
    return (200, "") if failure is None else (500, ApiError.kind)


JSON_TYPE = re.compile(r"application/(?:[!#$&^_.+a-z0-9-]+\+)?json")


def is_local_origin(origin: str) -> bool:
    scheme, _, authority = origin.partition("://")
    host = split_host(authority)
    return scheme in ("http", "https") and host is not None and is_loopback(host[0])


def foreign_origin() -> Forbidden:
    hint = "Add the origin to server.cors_origins if it is yours."
    return Forbidden("Web pages of this origin may not use the gateway.", hint=hint)


class Shield:
    """Guards against DNS rebinding and cross-site requests: web pages can reach loopback."""

    def __init__(self, config: ServerConfig) -> None:
        allowed = {name.lower() for name in config.allowed_hosts}
        self.hosts = allowed | {config.host.lower().strip("[]")}
        self.origins = set(config.cors_origins)

    def check(self, request: Request) -> None:
        """Raises Forbidden or UnsupportedMediaType."""
        headers = request.headers
        host = headers.get("host", "localhost").lower()
        name = (split_host(host) or ("",))[0]  # whole names are compared, never prefixes
        if not ({name.strip("[]"), host} & self.hosts or is_loopback(name)):
            hint = "Add it to server.allowed_hosts if it is yours."
            raise Forbidden("This Host is not served here.", hint=hint)
        origin = headers.get("origin")
        is_listed = origin is not None and self.is_listed(origin)
        if origin is not None and not is_listed and not is_local_origin(origin):
            raise foreign_origin()
        if headers.get("sec-fetch-site", "").lower() == "cross-site" and not is_listed:
            raise Forbidden("Cross-site requests of browsers are refused.")
        # Pages may send other content types, or none, without a CORS preflight.
        media_type = headers.get("content-type", "").partition(";")[0].strip(" \t").lower()
        is_empty = request.body.is_complete and not media_type
        has_body = request.method in ("POST", "PUT", "PATCH") and not is_empty
        if has_body and not JSON_TYPE.fullmatch(media_type):
            hint = "With curl: -H 'content-type: application/json'."
            raise UnsupportedMediaType("The body must be sent as application/json.", hint=hint)

    def is_listed(self, origin: str) -> bool:
        """`:*` in the list stands for any port."""
        if origin in self.origins:
            return True
        base, colon, port = origin.rpartition(":")
        return bool(colon) and port.isdigit() and f"{base}:*" in self.origins

    def cors_headers(self, request: Request) -> dict[str, str]:
        origin = request.headers.get("origin")
        if origin is None or not self.is_listed(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "request-id, x-request-id, retry-after, "
            "x-aiclient-provider, x-aiclient-model, x-aiclient-dropped, "
            "x-aiclient-credits, x-aiclient-fallback-from",
            "Vary": "Origin",
        }

    def preflight(self, request: Request) -> Response:
        headers = self.cors_headers(request)
        if not headers:
            raise foreign_origin()
        requested = request.headers.get("access-control-request-headers", "")
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        headers["Access-Control-Max-Age"] = "86400"
        if requested and re.fullmatch(r"[\w ,-]{1,2000}", requested, re.ASCII):
            headers["Access-Control-Allow-Headers"] = requested
        return Response(204, headers=headers)


# 17.2 the page

PAGE_STYLE = """\
:root {
  color-scheme: light dark;
  --ground: #f4f5f7; --card: #fff; --ink: #1a2027; --soft: #5b6570; --line: #dfe3e8;
  --accent: #1d64c8; --good: #1c7a47; --warn: #8f5a00; --bad: #b3261e; --amber: #b97f10;
  --s0: #3b78c9; --s1: #c26a14; --s2: #3f9a70; --s3: #8b68c4; --s4: #c2566b; --s5: #7b8794;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1317; --card: #171c22; --ink: #e3e8ed; --soft: #97a3af; --line: #2a323b;
    --accent: #7db1f7; --good: #5fc48d; --warn: #e3ad4d; --bad: #f28b82; --amber: #d9a441;
    --s0: #5b95e0; --s1: #e39a4f; --s2: #55b389; --s3: #a68add; --s4: #dc7b8e; --s5: #8f9ba8;
  }
}
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body {
  overflow-wrap: anywhere;
  max-width: 76rem; margin: auto; padding: 1.25rem 1rem 3rem; font: 0.875rem/1.5 system-ui,
  sans-serif; font-variant-numeric: tabular-nums; background: var(--ground); color: var(--ink);
}
header, h3, .line { display: flex; gap: 0.5rem; align-items: baseline; }
h1, h3 > :first-child, .line > :first-child { flex: 1; min-width: 0; }
h1 { font-size: 1.125rem; margin-bottom: 1rem; }
h1 small, dt, .soft, thead { color: var(--soft); font-weight: 400; }
h2, h3 { font-size: 1rem; }
h2 { margin: 1.5rem 0 0.5rem; }
small, dt, thead { font-size: 0.8125rem; }
#mark { width: 1.125rem; height: 1.125rem; fill: var(--accent); align-self: start; margin: 4px; }
button, input { font: inherit; color: inherit; }
button, #key, .card, #notice:not(:empty), #warnings li {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 4px 12px;
}
.card { padding: 0.875rem 1rem; min-width: 0; overflow-x: auto; }
:focus-visible, :focus-visible + span { outline: 2px solid var(--accent); outline-offset: 1px; }
dl { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); }
.grid {
  display: grid; gap: 0.75rem; --cell: 16.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--cell), 100%), 1fr));
}
.grid + .card, .across { grid-column: 1 / -1; margin-top: 0.75rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
ul { list-style: none; padding: 0; }
#notice:not(:empty), #warnings li {
  margin-bottom: 0.5rem; padding: 8px 16px; border-left: 4px solid var(--amber);
}
#notice:not(:empty) { border-left-color: var(--bad); }
#charts, #caps { --cell: 19rem; }
#caps { column-gap: 1.5rem; }
dl div { display: flex; flex-direction: column-reverse; }
dd { font-size: 1.25rem; font-weight: 600; }
form { max-width: 30rem; margin: 10vh auto; }
fieldset { border: 0; padding: 0; }
fieldset input, .unseen { position: absolute; opacity: 0; }
fieldset span { padding: 4px 12px; border-radius: 8px; cursor: pointer; color: var(--soft); }
:checked + span { background: var(--card); color: var(--ink); box-shadow: 0 0 0 1px var(--line); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; }
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); }
.s3 { --own: var(--s3); } .s4 { --own: var(--s4); } .s5 { --own: var(--s5); }
.key, .chart rect { background: var(--own); fill: var(--own); }
.bar { display: block; width: 100%; height: 6px; border-radius: 3px; }
.meter { margin-top: 4px; }
.bar rect { fill: var(--line); } .bar .used { fill: var(--s0); }
.bar .near { fill: var(--amber); } .bar .out { fill: var(--bad); }
.chart { display: block; width: 100%; height: 190px; padding: 10px 4px 22px 44px; }
.chart, figure.card { overflow: visible; }
.chart line { stroke: var(--line); }
.chart text { fill: var(--soft); font-size: 0.6875rem; }
.chart .day { fill: transparent; }
.chart g:hover .day { fill: var(--line); fill-opacity: 0.6; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; }
output { margin-left: auto; color: var(--soft); }
table { border-collapse: collapse; width: 100%; white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { text-align: left; font-weight: 400; padding: 4px 12px 4px 0; }
thead, tbody tr:not(:last-child) { border-bottom: 1px solid var(--line); }
tbody:empty::after { content: "Nothing yet."; color: var(--soft); }
tr > :nth-child(n + 6), .counts tr > :nth-child(n + 2) { text-align: right; }
tr > :last-child { padding-right: 0; }
.gone { opacity: 0.5; }
@media (prefers-reduced-motion: no-preference) { main { transition: opacity 0.3s; } }
"""

PAGE_BODY = """\
<header>
  <svg id="mark" viewBox="0 0 16 16" aria-hidden="true">
    <path d="M1 8h3v7H1zM6.5 1h3v14h-3zM12 5h3v10h-3z"/>
  </svg>
  <h1>aiclient-api <small id="version"></small></h1>
  <button id="forget" type="button" hidden>Forget key</button>
</header>
<p id="notice" role="status"></p>
<noscript>This page needs JavaScript; the verbs status, usage and quota show the same.</noscript>
<form id="ask" class="card" hidden>
  <h3>This gateway needs its key</h3>
  <p class="soft">It is the api_key of its configuration.  This tab keeps it until it is closed,
    and sends it to this gateway only.</p>
  <p><label for="key">Key</label></p>
  <p class="line"><input id="key" type="password" autocomplete="off" required>
    <button>Open</button></p>
  <p id="wrong" class="bad" role="alert"></p>
</form>
<main id="figures" hidden>
  <ul id="warnings" aria-label="Warnings"></ul>
  <dl id="tiles" class="card"></dl>
  <h2>Providers</h2>
  <div id="providers" class="grid"></div>
  <section id="limits" hidden>
    <h2>Limits</h2>
    <div id="caps" class="card grid"></div>
  </section>
  <div class="line">
    <h2>Usage</h2>
    <fieldset>
      <legend class="unseen">Days shown</legend>
      <label><input type="radio" name="days" value="7"><span>7 days</span></label>
      <label><input type="radio" name="days" value="30" checked><span>30 days</span></label>
      <label><input type="radio" name="days" value="90"><span>90 days</span></label>
    </fieldset>
  </div>
  <div id="charts" class="grid"></div>
  <div class="card" tabindex="0" role="region" aria-label="Usage by model">
    <table class="counts">
      <caption>By model</caption>
      <thead><tr><th>Model<th>Requests<th>Failed<th>Input<th>From cache<th>Output<th>Reasoning
        <th>Credits</thead>
      <tbody id="models"></tbody>
    </table>
  </div>
  <h2>Recent requests</h2>
  <div class="card" tabindex="0" role="region" aria-label="Recent requests">
    <table>
      <caption class="unseen">The last 50 requests, the newest first</caption>
      <thead><tr><th>Time<th>Model<th>Result<th>Client<th>Dialect<th>Duration<th>First byte<th>Input
        <th>Cached<th>Output<th>Credits</thead>
      <tbody id="recent"></tbody>
    </table>
    <p class="soft">~: derived or estimated.  Prompts and responses are never stored.</p>
  </div>
</main>
"""

PAGE_SCRIPT = """\
"use strict";
const EVERY_MS = 5000, PATIENCE_MS = 10000, PLOT_HEIGHT = 158, COLOURS = 6, KEPT = "gateway key";
const $ = id => document.getElementById(id);
const SVG = $("mark").namespaceURI;

// -- elements: what the gateway sends becomes text, never markup

function fill(node, fields, inside) {
  for (const [name, value] of Object.entries(fields)) node.setAttribute(name, value);
  node.append(...inside.filter(part => part !== null));
  return node;
}
const make = (tag, fields, ...inside) => fill(document.createElement(tag), fields, inside);
const draw = (tag, fields, ...inside) => fill(document.createElementNS(SVG, tag), fields, inside);
const row = (name, ...cells) => make("tr", {}, make("th", {scope: "row"}, name),
  ...cells.map(cell => typeof cell === "string" ? make("td", {}, cell) : cell));

// -- figures

const figures = options => {
  const format = new Intl.NumberFormat("en", options);
  return value => value === null || value === undefined ? "-" : format.format(value);
};
const whole = figures({maximumFractionDigits: 0});
const short = figures({notation: "compact", maximumSignificantDigits: 3});
const plain = figures({maximumFractionDigits: 2});
const money = figures({minimumFractionDigits: 2, maximumFractionDigits: 2});
const percent = figures({style: "percent", maximumFractionDigits: 0});
const iso = day => day.toLocaleDateString("sv-SE");  // 2026-11-22
const date = day => day.toLocaleDateString("en-GB", {day: "numeric", month: "short"});
const clock = moment => moment.toLocaleTimeString("en-GB");
const resets = at => at ? `, resets ${date(new Date(at * 1000))}` : "";
const guess = source => (typeof source === "string" ? [source] : Object.keys(source ?? {}))
  .some(one => one !== "reported") ? "~" : "";
const tenths = figures({minimumFractionDigits: 1, maximumFractionDigits: 1});
const took = ms =>
  ms === null ? "-" : ms < 1000 ? `${whole(ms)} ms` : `${tenths(ms / 1000)} s`;

function when(at) {
  const moment = new Date(at * 1000), day = date(moment);
  return (day === date(new Date()) ? "" : `${day} `) + clock(moment);
}

function span(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map(size => Math.floor(seconds / size));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// -- drawings

function bar(share, words) {
  const level = share >= 0.95 ? "out" : share >= 0.8 ? "near" : "used";
  const width = `${Math.min(100, Math.max(0, share * 100))}%`;
  return draw("svg", {class: "bar", role: "img", "aria-label": words},
    draw("rect", {width: "100%", height: "100%"}),
    draw("rect", {class: level, width, height: "100%"}));
}

function ticks(most) {
  const power = 10 ** Math.floor(Math.log10(most / 3));
  const step = [1, 2, 5, 10].find(count => count * power >= most / 3) * power;
  return Array.from({length: Math.ceil(most / step) + 1}, (_, i) => i * step);
}

// One bar for each day; `series` is [{name, colour, values}], stacked.
function chart(title, days, series, shown, labels) {
  const sums = days.map((_, i) => series.reduce((sum, one) => sum + one.values[i], 0));
  const marks = ticks(Math.max(...sums) || 1), top = marks[marks.length - 1];
  const total = `${shown(sums.reduce((sum, one) => sum + one, 0))} in ${days.length} days`;
  const caption = make("output", {}, total);
  const plot = draw("svg", {class: "chart", role: "img", "aria-label": `${title}: ${total}`});
  for (const mark of marks) {
    const y = PLOT_HEIGHT * (1 - mark / top);
    plot.append(draw("line", {x2: "100%", y1: y, y2: y}),
      draw("text", {x: -8, y: y + 4, "text-anchor": "end"}, short(mark)));
  }
  days.forEach((day, i) => {
    const place = (from, width) =>
      ({x: `${100 * (i + from) / days.length}%`, width: `${100 * width / days.length}%`});
    const group = draw("g", {}, draw("rect", {class: "day", height: PLOT_HEIGHT, ...place(0, 1)}));
    let y = PLOT_HEIGHT;
    for (const {colour, values} of series) {
      const height = PLOT_HEIGHT * values[i] / top;
      group.append(draw("rect", {class: colour, y: y -= height, height, ...place(0.14, 0.72)}));
    }
    const parts = series.filter(({values}) => values[i])
      .map(({name, values}) => `${name} ${shown(values[i])}`);
    const words = `${date(day)}: ${parts.join(", ") || "nothing"}`;
    group.addEventListener("pointerenter", () => { caption.textContent = words; });
    group.addEventListener("pointerleave", () => { caption.textContent = total; });
    plot.append(group);
    if ((days.length - 1 - i) % Math.ceil(days.length / labels) === 0) {
      const {x} = place(0.5, 0);
      plot.append(draw("text", {x, y: PLOT_HEIGHT + 17, "text-anchor": "middle"}, date(day)));
    }
  });
  const legend = series.map(one =>
    make("span", {}, make("span", {class: `key ${one.colour}`}), ` ${one.name}`));
  return make("figure", {class: "card"},
    make("figcaption", {}, make("strong", {}, title), ...legend, caption), plot);
}

// -- the parts of the page, each made of JSON

function tiles(status, total, days) {
  const memory = status.memory_bytes ? `${whole(status.memory_bytes / 2 ** 20)} MiB` : "-";
  const cached = total.input_tokens ? total.cache_read_tokens / total.input_tokens : null;
  const others = status.requests_in_flight - 1;  // one of them is this page's own question
  return Object.entries({
    Uptime: span(status.uptime_s), Connections: whole(status.connections),
    "In flight": whole(others), Memory: memory,
    [`Requests, ${days} d`]: short(total.request_count),
    [`Failed, ${days} d`]: short(total.error_count),
    [`Tokens, ${days} d`]: short(total.total_tokens), "From cache": percent(cached),
  }).map(([name, figure]) => make("div", {}, make("dt", {}, name), make("dd", {}, figure)));
}

function meter(name, share, words) {
  const known = share !== null, used = known ? `${percent(share)} used` : words;
  return make("div", {class: "meter"}, make("p", {class: "line"}, make("span", {}, name), used),
    ...known ? [bar(share, `${name}: ${used}`), make("small", {class: "soft"}, words)] : []);
}

function allowance(one) {
  const used = typeof one.used === "number" ? `${plain(one.used)} ${one.unit ?? ""} used, ` : "";
  if (one.unlimited) return meter(one.name, null, `${used}unlimited`);
  const share = typeof one.percent_used === "number" ? one.percent_used / 100 : null;
  const more = one.overage_used ? `, ${plain(one.overage_used)} beyond it` : "";
  const words = `${plain(one.remaining)} of ${plain(one.limit)} left${more}`;
  return meter(one.name, share, words + resets(one.resets_at));
}

const cap = one => meter(one.name, one.limit ? one.used / one.limit : 1,
  `${short(one.used)} of ${short(one.limit)} ${one.unit}${resets(one.resets_at)}`);

function provider(one, quota, colour) {
  const level = {ready: "good", "cooling down": "warn", disabled: "soft"}[one.health] ?? "bad";
  const left = one.token_expires_at && Math.max(0, one.token_expires_at - Date.now() / 1000);
  const facts = [one.type, one.account, one.plan, left && `token expires in ${span(left)}`];
  const cooldowns = (one.cooldowns ?? []).map(({model, seconds, reason}) =>
    `${model === "*" ? "all models" : model}, ${span(seconds)}: ${reason}`);
  const trouble = quota.error ? [`quota: ${quota.error}`] : [];
  return make("article", {class: "card"},
    make("h3", {}, make("span", {}, make("span", {class: `key ${colour}`}), ` ${one.name}`),
      make("small", {class: level}, one.health)),
    make("p", {class: "soft"}, facts.filter(Boolean).join(", ")),
    one.reason ? make("p", {class: level === "good" ? "soft" : level}, one.reason) : null,
    ...[...cooldowns, ...trouble].map(words => make("p", {class: "warn"}, words)),
    ...(quota.allowances ?? []).map(allowance),
    quota.as_of ? make("small", {class: "soft"}, `as of ${when(quota.as_of)}`) : null);
}

function model([name, one]) {
  const cached = one.input_tokens ? one.cache_read_tokens / one.input_tokens : null;
  const tokens = guess(one.token_sources), credits = guess(one.credit_sources);
  return row(name, whole(one.request_count), whole(one.error_count),
    tokens + whole(one.input_tokens), percent(cached), tokens + whole(one.output_tokens),
    whole(one.reasoning_tokens), credits + money(one.credits));
}

function request(one) {
  const level = {"": "good", cancelled: "soft"}[one.kind] ?? "bad";
  const dialect = one.dialect + (one.streamed ? ", streamed" : "");
  return row(when(one.at), `${one.provider}/${one.model}`,
    make("td", {class: level}, `${one.status} ${one.kind}`), one.label, dialect,
    took(one.duration_ms), took(one.first_byte_ms),
    guess(one.input_source) + whole(one.input_tokens), whole(one.cache_read_tokens),
    guess(one.output_source) + whole(one.output_tokens),
    one.credits_source ? guess(one.credits_source) + money(one.credits) : "-");
}

function charts(rows, days, colours) {
  const series = field => [...colours].map(([name, colour]) => {
    const own = new Map(rows.filter(one => one.provider === name).map(one => [one.day, one]));
    return {name, colour, values: days.map(day => own.get(iso(day))?.[field] ?? 0)};
  }).filter(one => one.values.some(Boolean));
  const tokens = chart("Tokens", days, series("total_tokens"), short, 7);
  tokens.classList.add("across");
  return [tokens, ...series("credits").map(one => chart("Credits", days, [one], money, 4))];
}

// -- the whole page

const shownDays = () => {
  const count = Number(document.querySelector(":checked").value), now = new Date();
  return Array.from({length: count}, (_, i) =>
    new Date(now.getFullYear(), now.getMonth(), now.getDate() - count + 1 + i));
};

const drawn = {};
function show(id, facts, parts) {
  const text = JSON.stringify(facts);
  if (drawn[id] === text) return;  // what has not changed keeps its selection
  drawn[id] = text;
  $(id).replaceChildren(...parts());
}

function showAll(status, usage, days) {
  const {quota = {}, limits = [], rows = [], recent = []} = usage;
  const warnings = [...status.warnings ?? [], usage.trouble].filter(Boolean);
  const named = [...status.providers.map(one => one.name), ...Object.keys(usage.providers)];
  const colours = new Map([...new Set(named)].sort().map((name, i) => [name, `s${i % COLOURS}`]));
  const models = Object.entries(usage.providers).flatMap(([name, {models}]) =>
    Object.entries(models).map(([id, one]) => [`${name}/${id}`, one]));
  models.sort(([, a], [, b]) => b.total_tokens - a.total_tokens);
  $("version").textContent = `${status.version}, ${status.state} at ${location.host}`;
  $("limits").hidden = !limits.length;
  show("warnings", warnings, () => warnings.map(words => make("li", {}, words)));
  show("tiles", [status, usage.total, days], () => tiles(status, usage.total, days.length));
  show("providers", [status.providers, quota, Math.floor(Date.now() / 60000)], () =>
    status.providers.map(one => provider(one, quota[one.name] ?? {}, colours.get(one.name))));
  show("caps", limits, () => limits.map(cap));
  show("charts", [rows, days], () => charts(rows, days, colours));
  show("models", models, () => models.map(model));
  show("recent", recent, () => recent.map(request));
}

// -- asking the gateway

class KeyWanted extends Error {}
let turn = 0, timer = 0, heard = null;

async function ask(path) {
  const key = sessionStorage.getItem(KEPT), headers = {};
  // a field holds bytes, and a key may be of any script
  if (key) headers["x-api-key"] = String.fromCharCode(...new TextEncoder().encode(key));
  const response = await fetch(path, {
    headers, cache: "no-store", credentials: "omit",
    redirect: "error", signal: AbortSignal.timeout(PATIENCE_MS),
  }).catch(() => { throw new Error("The gateway does not respond"); });
  const body = await response.json(), reason = body.error?.message ?? `status ${response.status}`;
  if (response.status === 401) throw new KeyWanted(key ? "This is not the gateway's key." : "");
  if (!response.ok) throw new Error(`This cannot be shown: ${reason}`);
  return body;
}

function askForKey(words) {
  clearTimeout(timer);
  turn++;
  sessionStorage.removeItem(KEPT);
  $("ask").hidden = false;
  $("figures").hidden = $("forget").hidden = true;
  $("notice").textContent = $("version").textContent = "";
  $("wrong").textContent = words;
  for (const id of Object.keys(drawn)) show(id, null, () => []);
  $("key").focus();
}

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn, days = shownDays();
  try {
    const usage = await ask(`v1/usage?by=day&since=${iso(days[0])}&recent=50`);
    const status = await ask("v1/status");
    if (mine !== turn) return;
    heard = new Date();
    $("ask").hidden = true;
    $("figures").hidden = false;
    $("forget").hidden = !sessionStorage.getItem(KEPT);
    $("figures").classList.remove("gone");
    $("notice").textContent = "";
    showAll(status, usage, days);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof KeyWanted) return askForKey(error.message);
    const of = heard ? ` The figures are of ${clock(heard)}.` : "";
    $("notice").textContent = `${error.message}; retrying every ${EVERY_MS / 1000} seconds.${of}`;
    $("figures").classList.add("gone");
  }
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem(KEPT, $("key").value.trim());
  $("key").value = "";
  refresh();
});
$("forget").addEventListener("click", () => askForKey(""));
document.querySelector("fieldset").addEventListener("change", refresh);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if ($("ask").hidden) refresh();
});
refresh();
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>aiclient-api</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}<script>{script}</script>
</body>
</html>
"""


def write_source(text: str) -> str:
    """The Content-Security-Policy source for an inline script or style: `'sha256-...'`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def write_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: the same for everybody, as it holds no figures and no names.

    The policy allows only this very script and style, and requests to this gateway only.
    """
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {write_source(PAGE_SCRIPT)}; style-src {write_source(PAGE_STYLE)}"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Vary": "Accept",
    }
    return PAGE.format(style=PAGE_STYLE, body=PAGE_BODY, script=PAGE_SCRIPT).encode(), headers


# 17.3 the gateway

#: the fields of `Daemon.status` in /v1/status: an allowlist, as it must not show paths or pids
PUBLIC_STATUS = (
    "version", "url", "state", "uptime_s", "connections", "requests_in_flight", "memory_bytes",
    "needs_key", "log_lines_dropped", "warnings", "providers",
)  # fmt: skip


KEY_HEADERS = ("authorization", "x-api-key", "api-key")


def error_headers(error: ApiError) -> dict[str, str]:
    """The error's own, and the `Retry-After` and `x-should-retry` that the vendors' SDKs obey."""
    headers = dict(error.headers)
    wait_s = error.retry_after
    if wait_s is not None or (error.status == 429 and error.retry is not False):
        headers["Retry-After"] = str(math.ceil(min(max(wait_s or 1, 1), MAX_RETRY_AFTER_SECONDS)))
    if error.retry is False or (wait_s or 0) > MAX_RETRY_AFTER_SECONDS:
        headers["x-should-retry"] = "false"
    return headers


DIALECT_PREFIXES: dict[str, Dialect] = {
    "/v1/chat": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
    "/v1/embeddings": CHAT,
}


def response_headers(provider: Provider, model: Model, dropped: Iterable[str]) -> dict[str, str]:
    headers = {"x-aiclient-provider": provider.name, "x-aiclient-model": model.id}
    names = [name for name in dict.fromkeys(dropped) if TOKEN.fullmatch(name)]
    return {**headers, "x-aiclient-dropped": ", ".join(names)} if names else headers


class Gateway:
    """What happens between a request and its response.  It owns nothing but references."""

    def __init__(
        self,
        config: Config,
        providers: dict[str, Provider],
        ticker: Ticker,
        ledger: Ledger,
        status: Callable[[], Json],
    ) -> None:
        self.config = config
        self.providers = providers
        self.ticker = ticker
        self.ledger = ledger
        #: `Daemon.status`
        self.status = status
        self.router = Router(config, list(providers))
        self.limiter = RateLimiter(config.server.rate_limit_seconds)
        self.shield = Shield(config.server)
        self.started_at = int(time.time())
        keys = {"": config.api_key} if config.api_key else {}
        self.keys = {name: key.encode() for name, key in {**keys, **config.api_keys}.items()}
        chat, messages, post_response = (
            functools.partial(self.converse, dialect) for dialect in (CHAT, MESSAGES, RESPONSES)
        )
        responses: dict[str, Handler] = {"POST": post_response, "GET": self.refuse_websocket}
        stored = dict.fromkeys(("GET", "POST", "DELETE"), self.refuse_stored)
        usage = {"GET": self.get_usage, "DELETE": self.delete_usage}
        self.endpoints = {
            "/": Endpoint({"GET": self.get_page}, is_open=True),
            "/healthz": Endpoint({"GET": self.get_health}, is_polled=True, is_open=True),
            "/metrics": Endpoint({"GET": self.get_metrics}, is_polled=True),
            "/v1/chat/completions": Endpoint({"POST": chat}, is_costly=True),
            "/v1/messages": Endpoint({"POST": messages}, is_costly=True),
            "/v1/messages/count_tokens": Endpoint({"POST": self.post_count_tokens}),
            "/v1/responses": Endpoint(responses, is_costly=True),
            "/v1/responses/input_tokens": Endpoint({"POST": self.post_input_tokens}),
            "/v1/responses/compact": Endpoint({"POST": self.refuse_compact}),
            "/v1/responses/ID": Endpoint(stored),
            "/v1/embeddings": Endpoint({"POST": self.post_embeddings}, is_costly=True),
            "/v1/models": Endpoint({"GET": self.get_models}),
            "/v1/models/ID": Endpoint({"GET": self.get_model}),
            "/v1/status": Endpoint({"GET": self.get_status}, is_polled=True),
            "/v1/usage": Endpoint(usage, is_polled=True),
            "/api/event_logging/batch": Endpoint({"POST": self.post_telemetry}),
        }

    # -- one request, from start to end

    async def handle(self, request: Request) -> Response:
        """Sets the request id; logs and counts the request once its response has been sent."""
        request.started_at = asyncio.get_running_loop().time()
        request.id = "req_" + os.urandom(12).hex()
        try:
            response = await self.respond(request)
        except BaseException as error:
            failure = request.failure or error
            stops = not request.connection.is_disconnected
            if isinstance(failure, asyncio.CancelledError) and stops:
                failure = Overloaded("The gateway is stopping.")
            self.log_access(request, *failure_status(failure))
            raise
        response.headers.update(self.id_headers(request.id))
        stream = response.stream
        if stream is None:
            self.log_access(request, response.status, failure_status(request.failure)[1])
            return response

        async def stream_with_log(writer: ResponseWriter) -> None:
            kind = "cancelled"
            try:
                await stream(writer)
                kind = failure_status(request.failure)[1]
            finally:
                self.log_access(request, response.status, kind)

        # Another object, or all of the request would be a cycle: garbage, but not freed at once.
        return replace(response, stream=stream_with_log)

    async def respond(self, request: Request) -> Response:
        """The response, or the error in the client's dialect, with CORS headers."""
        try:
            self.shield.check(request)
            if request.method == "OPTIONS":
                response = self.shield.preflight(request)
            else:
                response = await self.dispatch(request)
        except RecursionError:
            nested = InvalidRequest("The request is nested too deeply.")
            response = self.write_error(nested, request)
        except ApiError as error:
            response = self.write_error(error, request)
        response.headers.update(self.shield.cors_headers(request))
        return response

    async def dispatch(self, request: Request) -> Response:
        path, _ = split_path(request.path)
        endpoint = self.endpoints.get(path)
        method = "GET" if request.method == "HEAD" else request.method
        if self.keys and not (endpoint and endpoint.is_open and method == "GET"):
            request.key_name = self.check_key(request)
        if endpoint is None:
            hint = f"There are: {', '.join(self.endpoints)}."
            raise UnknownUrl(f"There is no {path[:200]} here.", hint=hint)
        if endpoint.is_costly and method == "POST":
            wait_s = self.limiter.wait_for(request.client, time.monotonic())
            if wait_s > 0:
                raise RateLimited("Too many requests from this address.", retry_after=wait_s)
        if method not in endpoint.methods:
            methods = endpoint.methods
            allowed = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)
            raise MethodNotAllowed(f"{path[:200]} takes {allowed}.", headers={"Allow": allowed})
        return await endpoint.methods[method](request)

    def check_key(self, request: Request) -> str:
        """The name of the request's key; raises InvalidKey, also if a header for it is repeated.

        Each header counts: Claude Desktop sends a token of its own in `Authorization` beside the
        gateway's key in `x-api-key` (seen in 2026-11).
        """
        headers = request.headers
        if not headers.repeated.isdisjoint(KEY_HEADERS):
            raise InvalidKey("More than one key was sent.")
        scheme, _, value = headers.get("authorization", "").partition(" ")
        keys = [value.strip(" ")] if scheme.lower() == "bearer" else []
        keys += [headers[name] for name in KEY_HEADERS[1:] if name in headers]
        for sent_key in keys:
            for name, key in self.keys.items():
                # latin-1 restores the bytes that were sent
                if hmac.compare_digest(sent_key.encode("latin-1"), key):
                    return name
        hint = "Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        challenge = {"WWW-Authenticate": "Bearer"}
        raise InvalidKey("The gateway's key is missing or wrong.", hint=hint, headers=challenge)

    @staticmethod
    def id_headers(request_id: str) -> dict[str, str]:
        ids = {"request-id": request_id, "x-request-id": request_id}
        return {**ids, "X-Content-Type-Options": "nosniff"}

    def log_access(self, request: Request, status: int, kind: str) -> None:
        """Metadata only; `kind` as in UsageRecord.  Ids, and unknown paths, share one metric."""
        path, _ = split_path(request.path)
        endpoint = self.endpoints.get(path)
        label = "other" if endpoint is None else path
        self.ledger.metrics.count_request(label, request.method, status)
        provider, model = request.route[:2] if request.route else ("", "-")
        details = {"provider": provider or "-", "model": model}
        if request.usage_record is not None:
            usage = request.usage_record.usage
            details |= {"input": str(usage.prompt), "output": str(usage.output)}
            if usage.credits_source:
                details["credits"] = f"{usage.nano_credits / 1e9:.6g}"
        if kind:
            details["kind"] = kind
        details["end"] = {"": "ok", "cancelled": "cancelled"}.get(kind, "error")
        is_quiet = endpoint is not None and endpoint.is_polled and not kind
        ms = f"{(asyncio.get_running_loop().time() - request.started_at) * 1000:.1f}"
        facts = {"id": request.id, "client": request.client, "method": request.method}
        facts |= {"path": request.path[:200], "status": str(status), "ms": ms}
        log_event("debug" if is_quiet else "info", "request", **facts, **details)

    # -- responses that need no upstream

    def dialect_of(self, request: Request | None) -> Dialect:
        default = FORMATS[self.config.default_format]
        if request is None:
            return default
        format_name = request.headers.get("x-output-format", "").lower()
        if format_name in FORMATS:
            return FORMATS[format_name]
        path, _ = split_path(request.path)
        for prefix, dialect in DIALECT_PREFIXES.items():
            if path.startswith(prefix):
                return dialect
        return MESSAGES if "anthropic-version" in request.headers else default

    def secrets(self) -> list[str]:
        """The tokens and keys in use."""
        keys = [self.config.api_key, *self.config.api_keys.values()]
        return keys + [item for provider in self.providers.values() for item in provider.secrets()]

    def write_error(self, error: ApiError, request: Request | None = None) -> Response:
        dialect = self.dialect_of(request)
        if request is not None:
            request.failure = error
        error.message = mask_secrets(error.message[:MAX_ERROR_TEXT], self.secrets())
        request_id = (request and request.id) or "req_" + os.urandom(12).hex()
        body = dump_json(dialect.error_body(error, request_id))
        # The dialect chooses the status: Codex, for one, retries a 401 or 503 for minutes.
        status = dialect.error_status(error)
        return Response(status, body, {**error_headers(error), **self.id_headers(request_id)})

    async def get_health(self, request: Request) -> Response:
        return Response(200, b'{"status":"ok"}')

    async def get_page(self, request: Request) -> Response:
        """The page for browsers, the health check for programs, which probe this path."""
        if not prefers_html(request.headers.get("accept", "")):
            return await self.get_health(request)
        page, headers = write_page()
        return Response(200, page, dict(headers), content_type="text/html; charset=utf-8")

    async def get_status(self, request: Request) -> Response:
        status = self.status()
        body = {name: status[name] for name in PUBLIC_STATUS if name in status}
        return Response(200, dump_json(body))

    async def post_telemetry(self, request: Request) -> Response:
        """Older Claude Code sends its telemetry here: read and discarded."""
        await request.read_body()
        return Response(200, b"{}")

    async def get_usage(self, request: Request) -> Response:
        params = dict(urllib.parse.parse_qsl(request.query, keep_blank_values=True))
        return Response(200, dump_json(await self.report_usage(params)))

    async def report_usage(self, params: dict[str, str]) -> Json:
        """`params` are the query parameters of `/v1/usage`; raises InvalidRequest."""
        query = read_usage_query(params, time.time())
        report = await self.ledger.report(query, self.config.limits)
        return {**report, "quota": quotas(self.providers)}

    async def get_metrics(self, request: Request) -> Response:
        text = self.ledger.metrics.render(read_status(self.status()))
        return Response(200, text.encode(), content_type=METRICS_TYPE)

    async def delete_usage(self, request: Request) -> Response:
        await self.ledger.reset()
        return Response(200, dump_json(await self.report_usage({})))

    def record(
        self,
        request: Request,
        provider: Provider,
        model: Model,
        dialect: str,
        usage: Usage,
        failure: BaseException | None,
        streamed: bool = False,
        first_byte_at: float | None = None,
    ) -> UsageRecord:
        """Records a completion, successful or not; `first_byte_at` is monotonic."""
        duration_s = time.monotonic() - request.started_at
        status, kind = failure_status(failure)
        price = None if usage.credits_source else price_nano_credits(model, usage)
        if price is not None:
            source = "derived" if usage.source == "reported" else "estimated"
            usage = replace(usage, nano_credits=price, credits_source=source)
        request.usage_record = record = UsageRecord(
            at=time.time() - duration_s,
            provider=provider.name,
            account=provider.user(),
            model=OTHER if model.guessed and kind else model.id,  # clients can make up any name
            label=request.label or self.label(request),
            dialect=dialect,
            streamed=streamed,
            usage=usage,
            status=status,
            kind=kind,
            duration_s=duration_s,
            first_byte_s=None if first_byte_at is None else first_byte_at - request.started_at,
            costs=not provider.local,
        )
        self.ledger.record(record)
        return record

    def label(self, request: Request) -> str:
        user_agent = request.headers.get("user-agent", "")
        return request.key_name or self.ledger.label(user_agent, self.config.limits)

    async def post_count_tokens(self, request: Request) -> Response:
        """Estimated locally, without an upstream call: Claude Code asks in bursts."""
        body = await run_step(load_body, await request.read_body())
        message_list(body)
        return Response(200, dump_json({"input_tokens": estimate_request(body)}))

    async def post_input_tokens(self, request: Request) -> Response:
        body = await run_step(load_body, await request.read_body())
        input_items(body)
        payload = {"object": "response.input_tokens", "input_tokens": estimate_request(body)}
        return Response(200, dump_json(payload))

    async def refuse_websocket(self, request: Request) -> Response:
        """Clients fall back to POST."""
        if "upgrade" not in request.headers:
            raise MethodNotAllowed("/v1/responses takes POST.", headers={"Allow": "POST"})
        raise UpgradeRefused("Websockets are not offered here; use POST.")

    async def refuse_stored(self, request: Request) -> Response:
        raise NotStored("Responses are not stored by this gateway.", param="response_id")

    async def refuse_compact(self, request: Request) -> Response:
        hint = "Ask the model for a summary with POST /v1/responses."
        raise UnsupportedFeature("Compaction is not offered here.", hint=hint)

    async def catalogues(self) -> dict[str, dict[str, Model]]:
        """The models of each provider; those whose list is unavailable are logged and left out."""
        listings = {name: provider.catalogue.listed() for name, provider in self.providers.items()}

        async def fetch(name: str) -> None:
            try:
                listings[name] = await self.providers[name].models()
            except ApiError as error:
                level = "debug" if isinstance(error, NotSignedIn) else "warning"
                log_event(level, "models_unavailable", provider=name, reason=error)

        missing = [name for name, models in listings.items() if models is None]
        if missing:
            await asyncio.gather(*map(fetch, missing))
        return {name: models for name, models in listings.items() if models is not None}

    def rows(self, catalogues: dict[str, dict[str, Model]], raw: bool) -> list[Json]:
        """Usable models by their shortest unambiguous names, and aliases, as in /v1/models."""
        entries: list[tuple[str, Model]] = []
        every_model = (model for models in catalogues.values() for model in models.values())
        ids = Counter(model.id for model in every_model if not model.auto)
        for name, models in catalogues.items():
            for model in models.values():
                if model.listed and (model.embeds or model.dialects):
                    is_ambiguous = ids[model.id] > 1 or model.id in self.router.aliases
                    has_prefix = is_ambiguous or model.auto
                    entries.append((f"{name}/{model.id}" if has_prefix else model.id, model))
        for alias in self.router.aliases:
            target = self.resolve_name(alias, catalogues)
            entries += [(alias, target)] if target else []
        return [self.row(public_name, model, raw) for public_name, model in entries]

    def resolve_name(self, name: str, catalogues: dict[str, dict[str, Model]]) -> Model | None:
        """The model for a name; for an alias, its first candidate that exists; otherwise None."""
        try:
            candidates = self.router.candidates(name, None)
            resolved = [self.router.resolve(route, catalogues) for route in candidates]
        except ApiError:
            return None
        for route, model in resolved:
            is_alias = route.explicit and name in self.router.aliases
            if model is None and is_alias and route.provider in catalogues:
                model = self.providers[route.provider].guess(route.model)  # it will be tried
            if model is not None:
                return model
        return None

    def row(self, name: str, model: Model, raw: bool) -> Json:
        """One model with the fields of both APIs: either SDK ignores what it does not know.

        `raw` adds the upstream's own entry.
        """
        row: Json = {
            "id": name,
            "object": "model",
            "created": self.started_at,
            "owned_by": model.vendor or model.provider,
            "type": "model",
            "display_name": model.name or model.id,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started_at)),
            "provider": model.provider,
        }
        limits = {"max_input_tokens": model.max_prompt, "max_tokens": model.max_output}
        limits["context_window"] = model.context
        row.update({key: value for key, value in limits.items() if value})
        if model.guessed:
            row["guessed"] = True  # from a built-in list: the service sent none
        if name in self.router.aliases:
            row["alias_of"] = self.router.aliases[name]
        if raw:
            row["raw"] = model.raw
        return row

    async def get_models(self, request: Request) -> Response:
        rows = self.rows(await self.catalogues(), "raw=1" in request.query.split("&"))
        ids = [row["id"] for row in rows] or [None]
        paging = {"first_id": ids[0], "last_id": ids[-1], "has_more": False}
        return Response(200, dump_json({"object": "list", "data": rows, **paging}))

    async def get_model(self, request: Request) -> Response:
        _, name = split_path(request.path)
        catalogues = await self.catalogues()
        self.router.candidates(name, None)  # raises if the name is malformed
        model = self.resolve_name(name, catalogues)
        if model is None:
            raise self.router.not_found(name, catalogues)
        return Response(200, dump_json(self.row(name, model, "raw=1" in request.query.split("&"))))

    # -- completions and embeddings

    async def post_embeddings(self, request: Request) -> Response:
        body = await run_step(load_body, await request.read_body())
        request.cancel_on_disconnect(True)
        name = need_str(body, "model")
        routes = self.router.candidates(name, request.headers.get("x-provider"))
        ask = functools.partial(self.embed, request, body)
        return await self.first_response(request, name, routes, hash(body.text), ask)

    async def embed(
        self, request: Request, body: Json, provider: Provider, model: Model
    ) -> Response:
        if not model.embeds:
            raise WrongDialect(f"{model.id} makes no embeddings.", param="model")
        try:
            with advising(provider):
                payload, usage = await provider.embed(body, model)
        except BaseException as error:
            self.record(request, provider, model, "embeddings", Usage(), error)
            raise
        self.record(request, provider, model, "embeddings", usage, None)
        payload["model"] = body["model"]
        _, dropped = split_fields(body, EMBEDDINGS_FIELDS)
        return Response(200, dump_json(payload), response_headers(provider, model, dropped))

    async def first_response(
        self,
        request: Request,
        name: str,
        routes: list[Route],
        body_hash: int | None,
        ask: Callable[[Provider, Model], Awaitable[Response]],
    ) -> Response:
        """The response of the first candidate that gives one; most names have only one candidate.

        Falls back only on errors that are not the request's fault, and only while nothing has been
        sent to the client: until a response is returned, its head has not gone out.
        """
        failures: list[tuple[str, ApiError]] = []
        for route in routes:
            request.route, request.failure = route, None
            try:
                provider, model = await self.find_model(request, name, route)
                request.route = Route(provider.name, model.id, True)
                if not provider.local:  # a local provider costs nothing
                    label = request.label = self.label(request)
                    uncounted, body_hash = body_hash, None  # counted once, even if refused
                    await self.ledger.check(self.config.limits, provider.name, label, uncounted)
                response = await ask(provider, model)
            except ApiError as error:
                if len(routes) == 1 or not can_fall_back(error):
                    raise
                facts = {"alias": name, "candidate": route, "kind": error.kind}
                log_event("info", "fallback", id=request.id, **facts, reason=error.message[:300])
                failures.append((str(route), error))
                request.cancel_on_disconnect(True, patient=True)
                continue
            if failures:
                fallbacks = ", ".join(f"{candidate} {error.kind}" for candidate, error in failures)
                response.headers["x-aiclient-fallback-from"] = fallbacks
            return response
        raise summarize_errors(failures)

    async def find_model(self, request: Request, name: str, route: Route) -> tuple[Provider, Model]:
        """The provider and the model that a route of a name leads to; raises ModelNotFound."""
        catalogues: dict[str, dict[str, Model]] = {}
        model = None
        if not route.provider:
            catalogues = await self.catalogues()
            route, model = self.router.resolve(route, catalogues)
        provider = self.providers[route.provider]
        model = model or find_model(route.model, provider.catalogue.listed() or {})
        try:
            for refresh in (False, True) if model is None else ():
                with advising(provider):
                    model = model or find_model(route.model, await provider.models(refresh))
        except (UpstreamError, UpstreamTimeout) as error:
            if not route.explicit:
                raise
            log_event("warning", "models_unavailable", provider=route.provider, reason=error)
        if model is None and route.explicit:
            model = provider.guess(route.model)
        if model is None:
            requested = name if len(self.router.aliases.get(name, ())) < 2 else route.model
            raise self.router.not_found(requested, catalogues or await self.catalogues())
        if LONG_CONTEXT_BETA in request.headers.get("anthropic-beta", ""):
            long_context = (provider.catalogue.listed() or {}).get(f"{model.id}-1m", model)
            model = long_context if long_context.listed else model
        return provider, model

    async def converse(self, client_dialect: Dialect, request: Request) -> Response:
        data = await request.read_body()
        body = await run_step(load_body, data)
        request_info = client_dialect.request_info(body)
        request_info.size = len(data)
        session = request_info.session or request.headers.get("x-claude-code-session-id", "")
        is_long = len(session) > MAX_NAME_CHARS
        request_info.session = short_hash(session, 32) if is_long else session
        initiator = request.headers.get("x-initiator", "").lower()
        if initiator in ("user", "agent"):
            request_info.initiator = initiator
        request.cancel_on_disconnect(True, patient=True)
        del data  # it may be large, and the response long
        routes = self.router.candidates(request_info.model, request.headers.get("x-provider"))
        hold_deadline = time.monotonic() + HOLD_LIST_SECONDS

        async def attempt(provider: Provider, model: Model) -> Response:
            left_s = max(0.0, hold_deadline - time.monotonic())
            hold_s = HOLD_STATUS_SECONDS if len(routes) == 1 else left_s

            async def exchange() -> Response:
                chosen = model
                if model.auto:
                    key = (self.label(request), request_info.session, request_info.opening)
                    conversation = short_hash("\0".join(key), 32)
                    has_images = has_image(body.get("messages", body.get("input")))
                    facts = conversation, last_user_text(body), has_images
                    chosen = await provider.choose_model(model, *facts)
                exchange = Exchange(
                    self, request, provider, chosen, client_dialect, body, request_info
                )
                return await exchange.run(hold_s)

            try:
                return await exchange()
            except WrongDialect:
                # The provider has just ruled that dialect, or that choice, out: asked again, once.
                return await exchange()

        name, body_hash = request_info.model, hash(body.text)
        response = await self.first_response(request, name, routes, body_hash, attempt)
        body.text, body.spans = "", {}  # the response may take long, and nothing is sent again
        return response


@dataclass(eq=False, repr=False)
class Exchange:
    """One attempt to get a response from one model; it is recorded once."""

    gateway: Gateway
    request: Request
    provider: Provider
    model: Model
    client_dialect: Dialect
    body: Json
    request_info: RequestInfo
    call: Call = field(init=False)
    translator: StreamTranslator = field(init=False)
    source: BodyStream | None = None
    first_byte_at: float | None = None  #: monotonic
    is_recorded: bool = False

    def upstream_dialect(self) -> UpstreamDialect:
        """The client's own dialect if the model speaks it, otherwise the least lossy one."""
        order = DIALECT_ORDER[self.client_dialect.name]
        has_choice = len(self.model.dialects) > 1 and not self.model.files
        if has_choice and FILE_PARTS & foreign_parts(self.body, self.client_dialect.name):
            order = (*order[1:], "chat")
        for name in order:
            if name in self.model.dialects:
                return UPSTREAM_DIALECTS[name]
        hint = "Choose another model; GET /v1/models lists them."
        raise WrongDialect(f"{self.model.id} is not a chat model.", hint=hint, param="model")

    async def prepare(self) -> None:
        """Writes the upstream's request; raises ApiError."""
        provider, model, info = self.provider, self.model, self.request_info
        upstream_dialect = self.upstream_dialect()
        response_dialect = self.gateway.dialect_of(self.request)

        def window(model_id: str) -> int:
            return ((provider.catalogue.listed() or {}).get(model_id) or model).context or 0

        context = ResponseContext(
            id=response_dialect.id_prefix + os.urandom(12).hex(),
            created=int(time.time()),
            model=model.id if model.auto else info.model,
            upstream_model="" if model.auto else model.id,
            include_usage=info.include_usage or not info.stream,
            request_body=self.body,
            store_reasoning=provider.reasoning.store,
            provider=provider.name,
            window=window,
            secrets=self.gateway.secrets,
        )
        conversation = await run_step(
            read_conversation, self.body, self.client_dialect, upstream_dialect, context
        )
        self.call = await run_step(
            write_call, self.body, conversation, upstream_dialect, model, context, info
        )
        betas = "" if conversation else self.request.headers.get("anthropic-beta", "")
        self.call.betas = betas
        self.translator = StreamTranslator(
            upstream_dialect, response_dialect, context, info.stream, self.request.id
        )

    async def run(self, hold_s: float) -> Response:
        """The response; its status waits up to `hold_s` for the upstream's first event.

        Once it is returned there is no fallback: its head names the provider and the model.
        """
        await self.prepare()
        self.request.cancel_on_disconnect(True, self.provider.local)
        if not self.translator.stream:
            return await self.run_buffered()
        loop, ticker = asyncio.get_running_loop(), self.gateway.ticker
        is_open, hold_until = loop.create_future(), time.monotonic() + hold_s

        def stop_waiting(now: float = math.inf) -> None:
            if now >= hold_until and not is_open.done():
                is_open.set_result(None)

        opening = loop.create_task(self.open())
        opening.add_done_callback(lambda _: stop_waiting())
        ticker.add(stop_waiting)
        try:
            await is_open
            if opening.done():
                opening.result()
                if self.translator.error and not self.translator.has_output:
                    raise self.translator.error
        except BaseException as error:
            await self.abandon(opening)
            self.finish(error)
            raise
        finally:
            ticker.discard(stop_waiting)
        return Response(
            200,
            headers={**self.headers(), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            stream=lambda writer: self.pump(writer, opening),
            content_type="text/event-stream; charset=utf-8",
        )

    @staticmethod
    async def abandon(opening: asyncio.Future[bytes]) -> None:
        if not opening.done():
            opening.cancel()
            await asyncio.wait((opening,))
        if not opening.cancelled():
            opening.exception()  # retrieved, or asyncio would log it

    async def open(self) -> bytes:
        """Returns the client's first bytes, or all of them if the upstream does not stream."""
        with advising(self.provider, self.call.model.id):
            self.source = await self.provider.open(self.call)
        piece = await self.source.read_some()
        self.first_byte_at = asyncio.get_running_loop().time()
        if self.call.model.id == AUTO_MODEL and self.call.model.auto:
            piece = await self.name_model(piece)
        translator = self.translator
        if piece.lstrip()[:1] == b"{":  # one JSON object instead of a stream
            body = bytearray(piece)
            while piece := await self.source.read_some():
                body += piece
                if len(body) > MAX_FRAME_BYTES:
                    raise UpstreamError("The upstream's response is too large.")
            return translator.feed_buffered(bytes(body))
        data = translator.feed(piece)
        while not translator.is_finished and not (data and translator.stream):
            piece = await self.source.read_some()
            data += translator.feed(piece) if piece else translator.end()
        return data

    async def name_model(self, piece: bytes) -> bytes:
        """Reads until the response tells which model Auto has chosen; returns what was read."""
        assert self.source is not None
        while not (named := NAMED_MODEL.search(piece)) and len(piece) < AUTO_PEEK_BYTES:
            more = await self.source.read_some()
            if not more:
                return piece
            piece += more
        if named:
            self.call.model = replace(self.call.model, id=named[1].decode())
            self.translator.rename_model(self.call.model.id)
        return piece

    async def run_buffered(self) -> Response:
        try:
            await self.open()
            body = self.translator.response_body()
        except BaseException as error:
            self.finish(error)
            raise
        self.finish(None)
        return Response(200, dump_json(body), self.headers())

    def headers(self) -> dict[str, str]:
        """No credits on a stream: what it costs is not known yet."""
        headers = response_headers(self.provider, self.call.model, self.call.dropped)
        record = self.request.usage_record
        if record is not None and record.usage.credits_source:
            headers["x-aiclient-credits"] = f"{record.usage.nano_credits / 1e9:.9g}"
        return headers

    async def pump(self, writer: ResponseWriter, opening: asyncio.Future[bytes]) -> None:
        """Relays the stream, pings during silences, and always ends it properly."""
        translator, ticker = self.translator, self.gateway.ticker
        failure: BaseException | None = None

        def ping(now: float) -> None:
            if now - writer.last_at >= PING_SECONDS and not translator.is_finished:
                writer.write(translator.ping())

        def on_data(data: bytes) -> None:
            output = translator.feed(data)
            writer.write(output, translator.is_finished)
            if translator.is_finished and self.source is not None:
                self.source.stop()

        ticker.add(ping)
        self.request.cancel_on_disconnect(True, self.provider.local)
        try:
            if not opening.done():
                translator.has_output = True  # the head goes out before the upstream's first event
                writer.write(translator.client.ping(False))
            first = await opening
            source = self.source
            assert source is not None
            writer.on_flow = source.hold
            writer.on_stop = lambda: source.fail(Overloaded("The gateway is stopping."))
            writer.write(first, translator.is_finished)
            if not translator.is_finished:
                await source.relay(on_data)
            writer.write(translator.end(), is_last=True)
            failure = translator.error
        except ApiError as error:
            failure = error
            writer.write(translator.end(error), is_last=True)
        except Exception:  # noqa: BLE001 - a bug: the client gets an error event
            failure = internal_error("a response could not be processed")
            writer.write(translator.end(failure), is_last=True)
        except BaseException as error:
            failure = error
            raise
        finally:
            ticker.discard(ping)
            await self.abandon(opening)
            self.finish(failure)

    def finish(self, failure: BaseException | None) -> None:
        self.request.cancel_on_disconnect(False)
        if isinstance(failure, ApiError):
            self.request.failure = failure
        if self.source is not None:
            self.source.close(self.translator.is_complete)
        if self.is_recorded:
            return
        self.is_recorded = True
        call, ledger = self.call, self.gateway.ledger
        ledger.metrics.count_attempts(self.provider.name, call.attempts, call.refusals)
        if isinstance(failure, WrongDialect):
            return  # will be asked again in another dialect
        if self.translator.context.invalid_output:
            call.dropped.append("structured_output_invalid")
            log_event("warning", call.dropped[-1], id=self.request.id, model=call.model.id)
        if self.source is not None and isinstance(failure, (QuotaExceeded, RateLimited)):
            self.provider.refused(call.model.id, failure)
        translator = self.translator
        usage = translator.usage
        is_cancelled = failure is not None and not isinstance(failure, ApiError)
        if is_cancelled and not usage.source:  # a client that left pays, too
            usage = finalize_usage(usage, translator.context, translator.relay.output_estimate)
        facts = self.client_dialect.name, usage, failure, translator.stream, self.first_byte_at
        record = self.gateway.record(self.request, self.provider, call.model, *facts)
        if not self.provider.local and (failure is None or translator.is_complete):
            body = call.body if call.sent is None else call.sent
            ledger.watch_cache(record, call.request_info, call.dialect, body)


# ---- 18. Daemon --------------------------------------------------------------------------------
#
# One gateway per state folder: the process that holds the lock on daemon.pid.  The kernel drops
# the lock when the last process that has it open exits, so a stale pid is never trusted.
# `start` takes the lock and opens the port, and passes both to a fresh process, which reads its
# Launch from a socket.  A restart does the same from inside the running process: the
# successor has the same lock and the same sockets before the old process lets go of them.


@dataclass(slots=True)
class Launch:
    """What a gateway process starts with, and passes to its successor."""

    #: from the command line; the key may be among them: never in argv or in a file
    flags: dict[str, str | None] = field(default_factory=dict, repr=False)
    program: str = "aiclient-api"  #: what its user types to run it, for hints
    log_file: str = ""  #: "" = standard error
    detached: bool = False
    host: str = ""  #: as configured when the sockets were opened
    port: int = 0
    activated: bool = False  #: a service manager opened the sockets: they are always used
    listeners: list[int] = field(default_factory=list)  #: descriptors of listening sockets
    lock: int = -1  #: descriptor

    def descriptors(self) -> list[int]:
        return [fd for fd in (*self.listeners, self.lock) if fd >= 0]


# 18.1 the lock


def take_lock(path: str) -> int | None:
    """The lock's descriptor, -1 without fcntl, None if it is taken; raises ProgramError."""
    deadline = time.monotonic() + LOCK_PROBE_SECONDS  # `is_locked` elsewhere holds it for a moment
    while fcntl is not None:
        with os_error_as(f"{path}: cannot be used as the lock"):
            fd = lock_file(path)
            if fd is not None:
                os.ftruncate(fd, 0)  # the last daemon's pid must not be taken for ours
                return fd
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)
    return -1


def is_locked(path: str) -> bool:
    """Whether a daemon is alive; raises ProgramError if the file cannot be trusted."""
    if fcntl is None:
        return False
    with os_error_as(f"{path}: cannot be used as the lock"):
        try:
            fd = open_trusted(path, "O_NOFOLLOW")
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            finally:
                os.close(fd)
        except BlockingIOError:
            return True
        except (FileNotFoundError, NotADirectoryError):
            pass
    return False


def read_pid_file(path: str) -> tuple[int, str]:
    """(process id, path of the control socket), or (0, "") if it names no other process.

    Raises ProgramError if the file cannot be trusted.
    """
    with os_error_as(f"{path}: cannot be read"):
        try:
            with os.fdopen(open_trusted(path, "O_NOFOLLOW"), "rb") as file:
                pid_text, _, socket_path = os.fsdecode(file.read(8 * KIB)).partition("\n")
        except (FileNotFoundError, NotADirectoryError):
            return 0, ""
    pid = int(pid_text) if re.fullmatch(r"[0-9]{1,10}", pid_text) else 0
    is_complete = pid > 0 and pid != os.getpid() and socket_path.endswith("\n")
    return (pid, socket_path[:-1]) if is_complete else (0, "")


def write_pid_file(lock: int, socket_path: str) -> None:
    """Written through the lock's descriptor; raises OSError."""
    if lock >= 0:
        data = os.fsencode(f"{os.getpid()}\n{socket_path}\n")
        os.pwrite(lock, data, 0)
        os.ftruncate(lock, len(data))


def signal_daemon(path: str, pid: int, signum: int) -> None:
    """Signals the process that the file names, if it is a live daemon's; raises ProgramError."""
    try:
        if is_locked(path) and read_pid_file(path)[0] == pid:
            os.kill(pid, signum)
    except ProcessLookupError:
        pass  # it has exited by itself
    except PermissionError:
        raise ProgramError(f"process {pid} belongs to another user") from None


# 18.2 the port


def activated_descriptors(environ: dict[str, str]) -> list[int]:
    """The sockets that a service manager opened for this process (sd_listen_fds(3))."""
    count, pid = environ.get("LISTEN_FDS", ""), environ.get("LISTEN_PID", "")
    if pid != str(os.getpid()) or not re.fullmatch(r"[0-9]{1,3}", count):
        return []
    return list(range(3, 3 + int(count)))


def launch_listeners(launch: Launch, config: Config) -> list[socket.socket]:
    """Inherited sockets if they fit the configuration, otherwise new ones; raises ProgramError."""
    server = config.server
    is_same_address = (launch.host, launch.port) == (server.host, server.port)
    listeners: list[socket.socket] = []
    for fd in launch.listeners:
        if not is_same_address and not launch.activated:
            os.close(fd)  # a port that is not served must not look open
            continue
        with os_error_as(f"descriptor {fd} is no socket"):
            os.set_inheritable(fd, False)
            listeners.append(socket.socket(fileno=fd))
        if listeners[-1].family not in (socket.AF_INET, socket.AF_INET6):
            raise ProgramError(f"descriptor {fd} is no TCP socket")
        listeners[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as `open_listeners`
    if launch.activated:
        server.host, server.port = listeners[0].getsockname()[:2]
        check_exposure(config)
    listeners = listeners or open_port(server.host, server.port)
    launch.host, launch.port = server.host, server.port
    launch.listeners = [listener.fileno() for listener in listeners]
    return listeners


def open_port(host: str, port: int) -> list[socket.socket]:
    try:
        return open_listeners(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason += f" (`ss -ltnp` or `lsof -i :{port}` shows the process)"
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        where = f"cannot listen on {format_host(host)}:{port}"
        raise ProgramError(f"{where}: {reason}; try {option}") from None


# 18.3 the process

# What serves runs from bytecode, in a process without the compiler's memory: compiling this file
# takes half a second, and 30 MiB that are never given back.  The arguments: a descriptor that has
# the bytecode, this file, the function to call, and what becomes sys.argv.
LAUNCHER = """\
import marshal, os, sys, types
fd, path, entry = sys.argv[1:4]
del sys.argv[:4]
if sys.argv[0] == "detach" and os.fork():
    os._exit(0)
module = sys.modules["aiclient_api"] = types.ModuleType("aiclient_api")
module.__file__ = path
with open(int(fd), "rb") as file:
    exec(marshal.loads(file.read()), module.__dict__)
sys.exit(getattr(module, entry)())
"""
COMPILER = """\
import marshal, sys
code = compile(sys.stdin.buffer.read(), sys.argv[1], "exec", dont_inherit=True)
sys.stdout.buffer.write(marshal.dumps(code))
"""


def system_message(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{where}the system refused: {error.strerror or error}"


def dump_message(message: Json) -> bytes:
    """JSON between processes of this program; file names that are not UTF-8 survive it."""
    return json.dumps(message).encode()


def program_file() -> str:
    return os.path.realpath(__file__)


def read_program() -> bytes:
    """This file as it is now; raises ProgramError."""
    path = program_file()
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read()
    except NotADirectoryError:
        raise ProgramError(f"{path}: take it out of the archive, to run as a plain file") from None
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None


def bare_code() -> CodeType | None:
    """What Python has just compiled, if this file runs as a script."""
    frame = sys._getframe()  # noqa: SLF001 - documented
    while frame.f_back is not None:
        frame = frame.f_back
    is_bare = frame.f_globals is globals() and os.path.isfile(sys.argv[0])
    return frame.f_code if is_bare else None


def load_bytecode() -> bytes:
    """This program's: as Python has it already, otherwise of the file as it is now.

    Compiles in a child process, so that its memory is given back; raises ProgramError and OSError.
    """
    path, spec = program_file(), globals()["__spec__"]
    code = bare_code()
    if code is None and spec is not None and os.path.isfile(path):
        code = spec.loader.get_code(spec.name)
    if code is not None:
        return marshal.dumps(code)
    command = [sys.executable, "-I", "-c", COMPILER, path]
    result = subprocess.run(command, input=read_program(), capture_output=True, check=False)
    if result.returncode:
        last_line = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        reason = last_line or f"exit status {result.returncode}"
        raise ProgramError(f"{path}: cannot be compiled: {reason}")
    return result.stdout


def start_process(
    launch: Launch, stderr: int | None = None, *, detach: bool = False
) -> Json | None:
    """Starts a gateway process; returns its report: its status or `{"error"}`.

    None if it exits or times out without one; raises ProgramError and OSError.  A detached process
    has forked once more, so that it can never acquire a terminal.  Launch and report go over a
    socket: the flags of `start` are not in the arguments, which every user can list.
    """
    bytecode = load_bytecode()
    starter, peer = socket.socketpair()
    with starter:
        with peer:
            starter.sendall(dump_message(asdict(launch)))
            starter.shutdown(socket.SHUT_WR)
            command = [sys.executable, "-I", "-c", LAUNCHER, "0", program_file(), "main_detached"]
            child = subprocess.Popen(
                [*command, "detach" if detach else "", str(peer.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[*launch.descriptors(), peer.fileno()],
                start_new_session=True,
                cwd="/",
            )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it has exited: no report comes
            child.stdin.write(bytecode)
        report = None
        starter.settimeout(START_SECONDS)
        with contextlib.suppress(OSError), starter.makefile("rb") as stream:
            report = load_object(stream.read(MAX_CONTROL_BYTES))
    if report is None or "error" in report:
        child.kill()
        child.wait()
    return report


def notify_manager(state: str) -> None:
    """Notifies systemd, if it started us: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), re.sub(r"^@", "\0", address))
    except OSError as error:
        log_event("warning", "sd_notify_failed", reason=error.strerror)


def raise_descriptor_limit() -> None:
    """Each request in flight needs two descriptors."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def process_usage() -> dict[str, int | None]:
    """Resident bytes and descriptors of this process; None without /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        open_files = len(os.listdir("/proc/self/fd")) - 1  # less the one used to list them
    except OSError:
        return {"memory_bytes": None, "open_files": None}
    return {"memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "open_files": open_files}


# 18.4 the daemon


class Daemon:
    """The running gateway: it owns all parts, and replaces them while it serves.

    Nothing here may be called from another thread than the event loop's.
    """

    def __init__(
        self, launch: Launch, paths: Paths, config: Config, log_file: LogFile | None
    ) -> None:
        self.launch = launch
        self.paths = paths
        self.environ = dict(os.environ)
        self.config = config
        #: `config` with the address in the file, which takes effect with the next process
        self.loaded_config = config
        self.log_file = log_file
        self.ticker = Ticker()
        self.client = HttpClient(config.network, self.ticker)
        self.ledger = Ledger(paths.usage_file, self.ticker)
        self.gateway = self.make_gateway({})
        handlers = self.gateway.handle, self.gateway.write_error
        self.server = Server(config.server, self.ticker, *handlers)
        self.started_at = time.time()
        self.port = 0
        self.retiring: set[asyncio.Task[None]] = set()  #: each closes what a reload has replaced
        #: serving, restarting, replaced (a successor has taken over) or stopping
        self.state = "serving"
        self.ending = asyncio.Event()
        self.stop_requested = False
        #: monotonic: until then a lack of descriptors is not logged again
        self.descriptor_quiet_until = 0.0

    def make_gateway(self, reused: dict[str, Provider]) -> Gateway:
        providers = make_providers(self.config, self.paths, self.client, reused)
        return Gateway(self.config, providers, self.ticker, self.ledger, self.status)

    async def listen(self, listeners: list[socket.socket]) -> None:
        self.port = listeners[0].getsockname()[1]
        await self.server.listen(listeners)

    async def run(self) -> None:
        """Serves until a signal or a successor ends it; then lets requests in flight finish."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.report_error)
        handlers = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            # With a terminal: it has been closed.
            signal.SIGHUP: self.stop if sys.stderr.isatty() else self.reload_at_signal,
            signal.SIGUSR1: self.reopen_log,
        }
        for signum, handler in handlers.items():
            loop.add_signal_handler(signum, handler)
        await self.ending.wait()
        log_event("info", "stopping", connections=len(self.server.connections))
        if self.state == "replaced":
            await self.server.retire(RETIRE_SECONDS)
        await self.server.drain(self.config.server.drain_seconds)
        self.retire(set(), list(self.gateway.providers.values()), self.client)
        retiring = set(self.retiring)
        await self.ledger.close()
        await asyncio.wait(retiring, timeout=REFRESH_DRAIN_SECONDS)
        for task in retiring:
            task.cancel()
        await asyncio.wait(retiring)

    # -- signals

    def stop(self) -> None:
        """Stops accepting and drains; a second call exits at once."""
        if self.stop_requested:
            os._exit(1)
        self.stop_requested = True
        if self.state != "restarting":  # otherwise once the successor can be stopped as well
            self.end()

    def end(self) -> None:
        if self.state != "replaced":
            self.state = "stopping"
            notify_manager("STOPPING=1")
        self.ending.set()

    def reload_at_signal(self) -> None:
        try:
            self.reload()
        except ProgramError as error:
            log_event("error", "configuration_not_reloaded", reason=error)

    def reopen_log(self) -> None:
        """For log rotation by other programs."""
        try:
            if self.log_file is not None:
                self.log_file.open()
        except OSError as error:
            log_event("error", "log_not_reopened", reason=error.strerror)

    def report_error(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        """asyncio reports EMFILE for every connection: logged once per FULL_SECONDS."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self.descriptor_quiet_until:
            self.descriptor_quiet_until = loop.time() + DESCRIPTOR_WARNING_SECONDS
            facts = {"reason": error.strerror, "connections": len(self.server.connections)}
            log_event("error", "too_many_open_files", **facts)

    # -- reload

    def reload(self) -> Json:
        """Applies the configuration file; on ConfigError the old one stays in effect.

        `{"changed": [KEY], "needs_restart": [KEY]}`.  Requests in flight finish with what they
        started with; a provider whose table is the same is reused, with its tokens and models.
        """
        loaded = load_config(self.paths, self.environ, self.launch.flags)
        changed = changed_settings(self.loaded_config, loaded)
        addresses = () if self.launch.activated else ("server.host", "server.port")
        pinned = [key for key in addresses if key in changed]
        host, port = self.config.server.host, self.config.server.port
        new = replace(loaded, server=replace(loaded.server, host=host, port=port))
        check_exposure(new)
        self.loaded_config = loaded
        old, self.config = self.config, new
        providers, client = self.gateway.providers, self.client
        reused: dict[str, Provider] = {}
        if old.network != new.network:
            self.client = HttpClient(new.network, self.ticker)
        else:
            same = [name for name in providers if old.providers[name] == new.providers.get(name)]
            reused = {name: providers[name] for name in same}
        self.gateway = self.make_gateway(reused)
        self.server.config = new.server
        self.server.handler = self.gateway.handle
        self.server.write_error = self.gateway.write_error
        self.retire(
            {c.request for c in self.server.connections if c.request is not None},
            [provider for name, provider in providers.items() if name not in reused],
            None if client is self.client else client,
        )
        set_log_level(new.logging.level)
        log_event("info", "configuration_reloaded", changed=",".join(changed) or "none")
        if pinned:
            log_event("warning", "restart_needed", keys=",".join(pinned))
        return {"changed": changed, "needs_restart": pinned}

    def retire(
        self, requests: set[Request], providers: list[Provider], client: HttpClient | None
    ) -> None:
        """Closes these once no request uses them any more and the providers have settled."""

        async def close_unused(requests: set[Request]) -> None:
            try:
                while requests := requests & {c.request for c in self.server.connections}:
                    await asyncio.sleep(TICK_SECONDS)
                await asyncio.gather(*(provider.wait_closed() for provider in providers))
            finally:
                for provider in providers:
                    provider.close()
                if client is not None:
                    client.close()

        task = asyncio.get_running_loop().create_task(close_unused(requests))
        self.retiring.add(task)
        task.add_done_callback(self.retiring.discard)

    # -- restart

    async def restart(self) -> Json:
        """Hands the port to a new process with the same flags; returns that one's `status`.

        Raises ProgramError if that one does not start: this process keeps serving.
        """
        if self.state != "serving":
            raise ProgramError(f"the gateway is {self.state} already")
        if not self.launch.detached and "NOTIFY_SOCKET" not in os.environ:
            raise ProgramError("it runs in the foreground: restart it where it was started")
        self.state = "restarting"
        try:
            report = await asyncio.to_thread(start_process, self.launch)
            report = report or {"error": "it exited or timed out without a report; see the log"}
        except (OSError, ProgramError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            report = {"error": f"no new process could be started: {reason}"}
        finally:
            self.state = "serving"
        if self.stop_requested:
            if "pid" in report:
                os.kill(report["pid"], signal.SIGTERM)  # our child: its pid is not reused
            self.end()
            raise ProgramError("the gateway was stopped during the restart")
        if "error" in report:
            raise ProgramError(f"restart failed, the old process keeps serving: {report['error']}")
        self.state = "replaced"
        os.close(self.launch.lock)  # the successor holds it now
        log_event("info", "replaced", by=report.get("pid"))
        self.ending.set()
        return report

    # -- status

    def status(self) -> Json:
        """`{"version", "pid", "url", "uptime_s", ..., "providers": [{"name", "type", ...}]}`."""
        config, now, providers = self.config, time.time(), self.gateway.providers.items()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "url": f"http://{format_host(config.server.host)}:{self.port}",
            "state": self.state,
            "started_at": self.started_at,
            "uptime_s": int(now - self.started_at),
            "connections": len(self.server.connections),
            "requests_in_flight": sum(c.request is not None for c in self.server.connections),
            "cpu_s": round(time.process_time(), 3),
            **process_usage(),
            "needs_key": config.needs_key,
            "detached": self.launch.detached,
            "config_file": self.paths.config_file,
            "log_file": self.launch.log_file or None,
            "log_lines_dropped": self.log_file.dropped if self.log_file else 0,
            "built_in_facts": BUILT_IN_FACTS,
            "quota": quotas(self.gateway.providers),
            "usage_rows_waiting": self.ledger.count_waiting(),
            "usage_rows_lost": self.ledger.store.lost,
            "providers": [
                self.provider_status(name, config.providers[name], provider)
                for name, provider in providers
            ],
            "disabled": [name for name in config.providers if name not in self.gateway.providers],
            "warnings": [
                text
                for name, provider in providers
                for text in quota_warnings(name, provider.quota_watch.latest, now)
            ],
        }

    def provider_status(self, name: str, entry: ProviderConfig, provider: Provider) -> Json:
        status = {"name": name, "type": entry.type, "account": None, "plan": None}
        status |= provider.status()
        if not isinstance(provider, (CopilotProvider, KiroProvider)):
            return status
        assert not isinstance(entry, EchoConfig)
        row = account_row(name, entry, provider.account.file)
        status |= {"account": row["user"] or None, "plan": row["plan"] or None}
        if row["health"].startswith("needs sign-in"):
            status |= {"health": "not signed in", "reason": row["health"]}
        return status


# ---- 19. Control channel -----------------------------------------------------------------------
#
# A Unix socket; each message is a 4-byte big-endian length and then JSON.  A request is
# {"method": "status", "params": {}}, a response {"ok": true, "data": {...}} or
# {"ok": false, "error": "..."}.  Threads of socketserver carry the bytes, one for each client; all
# the work is done by the event loop.  Secrets never travel over it.

# A socket is created under a name with this suffix and renamed once it listens: there is no moment
# without one, even if it replaces another.
SOCKET_SUFFIX = ".new"


def write_frame(peer: socket.socket, message: Json) -> None:
    """Sends one message; raises OSError if the peer does not accept it in time."""
    data = dump_message(message)
    peer.settimeout(CONTROL_SECONDS)
    peer.sendall(len(data).to_bytes(4, "big") + data)


def read_frame(peer: socket.socket, seconds: float, limit: float) -> bytes | None:
    """The next message, None at EOF; raises OSError on a timeout, ProgramError if it is too large.

    The deadline is for the whole message, so that a slow peer cannot keep its thread for long.
    """
    deadline, data, size = time.monotonic() + seconds, b"", 4
    while len(data) < size:
        peer.settimeout(max(0.001, deadline - time.monotonic()))
        piece = peer.recv(min(size - len(data), RECV_BYTES))
        if not piece:
            return None
        data += piece
        if size == len(data) == 4:
            size += int.from_bytes(data, "big")
            if size - 4 > limit:
                raise ProgramError(f"a message may have {limit} bytes, not {size - 4}")
    return data[4:]


def check_socket(path: str) -> None:
    """Raises OSError if `path` is anything but a socket of this user: it would be lost."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
            raise FileExistsError(
                errno.EEXIST, f"{path} is not a socket of this user; move it away"
            )


def choose_socket_path(paths: Paths, environ: dict[str, str]) -> str:
    """In the state folder, or in a new one if its path is too long; raises ProgramError."""

    def fits(path: str) -> bool:
        return len(os.fsencode(path)) + len(SOCKET_SUFFIX) <= MAX_SOCKET_PATH_BYTES

    if fits(paths.socket_file):
        return paths.socket_file
    for base in (environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if os.path.isabs(base) and os.path.isdir(base) and fits(f"{base}/aiclient-api-XXXXXXXX/s"):
            with os_error_as(f"{base}: cannot be used"):
                folder = tempfile.mkdtemp(prefix="aiclient-api-", dir=base)
                check_folder(folder)  # its parents, too
                return os.path.join(folder, "s")
    raise ProgramError(
        f"{paths.socket_file}: is too long for a socket; set XDG_RUNTIME_DIR to a shorter folder"
    )


class ControlServer:
    """Serves the control socket in threads; `handler` turns a request's bytes into the response."""

    def __init__(self, path: str, handler: Callable[[bytes], Json]) -> None:
        self.path = path
        slots = self.slots = threading.BoundedSemaphore(MAX_CONTROL_CLIENTS)

        class Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 4 * MAX_CONTROL_CLIENTS

            def get_request(self) -> tuple[Any, Any]:
                try:
                    return super().get_request()
                except OSError:  # still pending, and the socket still ready: do not spin
                    time.sleep(CONTROL_ACCEPT_SECONDS)
                    raise

            def verify_request(self, request: Any, client_address: Any) -> bool:
                return slots.acquire(blocking=False)

            def finish_request(self, request: Any, client_address: Any) -> None:
                with contextlib.suppress(OSError):  # it hung up or timed out
                    try:
                        limits = CONTROL_SECONDS, MAX_CONTROL_BYTES
                        while (data := read_frame(request, *limits)) is not None:
                            write_frame(request, handler(data))
                    except ProgramError as error:
                        write_frame(request, {"ok": False, "error": str(error)})
                slots.release()

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Also called if no thread could be started; `finish_request` has not returned."""
                slots.release()
                event_logger().exception("a control client failed")

        new_path = path + SOCKET_SUFFIX
        with os_error_as(f"{path}: cannot be created"):
            check_socket(path)
            check_socket(new_path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new_path)
            server = Listener(new_path, socketserver.BaseRequestHandler)
            os.chmod(new_path, 0o600)  # the umask and the folder have kept others away
            self.inode = os.stat(new_path).st_ino
            os.replace(new_path, path)
        # It ends with the process: `shutdown` would need a short poll_interval.
        serving = functools.partial(server.serve_forever, poll_interval=3600)
        threading.Thread(target=serving, daemon=True).start()

    def close(self) -> None:
        """Unlinks the socket, unless it is a successor's, and lets responses go out (blocks)."""
        try:
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)
                os.rmdir(os.path.dirname(self.path))
        except OSError:
            pass  # a successor's is there, or the folder is not the socket's own
        deadline = time.monotonic() + LINGER_SECONDS
        for _ in range(MAX_CONTROL_CLIENTS):
            self.slots.acquire(timeout=max(0.0, deadline - time.monotonic()))


# -- methods: each a function of (daemon, params), async if it waits, and a line in the table


async def list_models(daemon: Daemon, params: Json) -> Json:
    """`{"models": [...]}`, the rows of /v1/models."""
    return {"models": daemon.gateway.rows(await daemon.gateway.catalogues(), False)}


async def report_usage(daemon: Daemon, params: Json) -> Json:
    """As /v1/usage with the same parameters; with `reset`, after emptying it."""
    query = {name: str(value) for name, value in params.items() if name != "reset"}
    if params.get("reset"):
        await daemon.ledger.reset()
    return await daemon.gateway.report_usage(query)


async def fetch_quotas(daemon: Daemon, params: Json) -> Json:
    """`{"providers": {NAME: Quota.as_json() or {"error": TEXT}}}`, of those that have any.

    If a service fails, the error is added to what was last known of it.
    """

    async def fetch_quota(provider: Provider) -> Json | None:
        try:
            with advising(provider):
                quota = await provider.quota()
        except ApiError as error:
            last_known = provider.quota_watch.latest
            return {**(last_known.as_json() if last_known else {}), "error": error.text()}
        return None if quota is None else quota.as_json()

    providers = dict(daemon.gateway.providers)
    results = await asyncio.gather(*map(fetch_quota, providers.values()))
    rows = zip(providers, results, strict=True)
    return {"providers": {name: row for name, row in rows if row is not None}}


def apply_setting(daemon: Daemon, params: Json) -> Json:
    """`value` is text, as on the command line; secrets are rejected."""
    key, value = need_str(params, "key"), need_str(params, "value")
    if is_secret_setting(key):
        raise ProgramError(f"{key}: secrets do not travel here; set it in the file, then reload")
    change_config(daemon.paths, daemon.environ, key, value)
    return daemon.reload()


def switch_provider(daemon: Daemon, params: Json, enabled: str) -> Json:
    """Saves and applies it; enabling a provider also ends its cool-downs."""
    name = need_str(params, "name")
    change_provider(daemon.paths, daemon.environ, name, enabled)
    changes = daemon.reload()
    if name in daemon.gateway.providers:
        daemon.gateway.providers[name].breaker.cooldowns.clear()
    return changes


async def tail_log(daemon: Daemon, params: Json) -> Json:
    """`{"lines": [...]}`: the last `lines` of at least `level`."""
    path = daemon.launch.log_file
    if not path:
        raise ProgramError("the gateway logs to its terminal, not to a file")
    lines = int_field(params, "lines") or DEFAULT_LOG_LINES
    level = word_field(params, "level", LOG_LEVELS) or "debug"
    with open_log(path) as file:
        return {"lines": await asyncio.to_thread(read_log_tail, file, path, lines, level)}


CONTROL_METHODS: dict[str, Callable[[Daemon, Json], Json | Awaitable[Json]]] = {
    "config.reload": lambda daemon, _: daemon.reload(),
    "config.set": apply_setting,
    "config.show": lambda daemon, _: {"settings": describe_settings(daemon.config)},  # masked
    "logs.tail": tail_log,
    "models": list_models,
    "provider.disable": functools.partial(switch_provider, enabled="false"),
    "provider.enable": functools.partial(switch_provider, enabled="true"),
    "quota": fetch_quotas,
    "restart": lambda daemon, _: daemon.restart(),
    "status": lambda daemon, _: daemon.status(),
    "usage": report_usage,
}


async def run_control_method(daemon: Daemon, data: bytes) -> Json:
    """The response to one request."""
    try:
        message = load_object(data)
        method = message.get("method") if message is not None else None
        if message is None or not isinstance(method, str):
            raise ProgramError('a message is like {"method":"status","params":{}}')
        if method not in CONTROL_METHODS:
            raise ProgramError(f"no such method; there are: {', '.join(CONTROL_METHODS)}")
        async with asyncio.timeout(CONTROL_WORK_SECONDS):
            result = CONTROL_METHODS[method](daemon, dict_field(message, "params"))
            return {"ok": True, "data": result if isinstance(result, dict) else await result}
    except TimeoutError:
        problem = f"timed out after {CONTROL_WORK_SECONDS:g} s"
    except ProgramError as error:
        problem = str(error)
    except ApiError as error:
        problem = error.text()
    except Exception:  # noqa: BLE001 - silence would be taken for a gateway that is starting
        problem = internal_error("a control request failed").text()
    return {"ok": False, "error": problem}


# -- the client, which needs no event loop


def not_running() -> NotRunning:
    start = f"{program_command()} start"
    return NotRunning(f"the gateway is not running; start it with: {start}")


def ask_daemon(
    paths: Paths, method: str, params: Json | None = None, seconds: float = CONTROL_SECONDS
) -> Json:
    """The `data` of the running daemon's response; raises NotRunning and ProgramError.

    If the response may take longer than CONTROL_SECONDS, the status is asked for first: a frozen
    process raises NotResponding without waiting that long.
    """
    if fcntl is None:
        raise ProgramError("this platform has no Unix sockets, which this command needs")
    problem = "the gateway is just starting or stopping; try again in a moment"
    for _ in range(2):  # a daemon that is being replaced may drop one request
        pid, path = read_pid_file(paths.pid_file)
        if not path:
            break
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(CONTROL_SECONDS)
                peer.connect(path)
                if seconds > CONTROL_SECONDS:
                    write_frame(peer, {"method": "status"})
                    read_frame(peer, CONTROL_SECONDS, math.inf)
                write_frame(peer, {"method": method, "params": params or {}})
                data = read_frame(peer, seconds, math.inf)
        except TimeoutError:
            stop = f"{program_command()} stop"
            raise NotResponding(
                f"the gateway does not respond: process {pid} holds the lock but does not answer; "
                f"end it with: {stop}; or, if somebody has paused it: kill -CONT {pid}"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            problem = f"the gateway (process {pid}) does not respond: {reason}"
            break
        if data:
            response = load_object(data) or {}
            if response.get("ok") is not True:
                raise ProgramError(str(response.get("error")))
            return dict_field(response, "data")
    raise ProgramError(problem) if is_locked(paths.pid_file) else not_running()


# ---- 20. Command line --------------------------------------------------------------------------

# 20.1 what the verbs show: tables for people, JSON for programs


def tell(*lines: str) -> None:
    """Prints lines for a person, without control characters that could steer a terminal."""
    print("\n".join(map(one_line, lines)), flush=True)


def format_duration(seconds: float) -> str:
    """`2 d 3 h`, `5 min 10 s`: the two largest units that are not zero."""
    parts: list[str] = []
    remaining = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        amount, remaining = divmod(remaining, size)
        if amount or (unit == "s" and not parts):
            parts.append(f"{amount} {unit}")
    return " ".join(parts[:2])


def format_day(moment: float | None) -> str:
    """In UTC; `-` for none."""
    return iso_day(moment or 0.0) or "-"


def format_time_left(moment: float | None) -> str:
    return "-" if moment is None else format_duration(max(0, moment - time.time()))


def format_usage(row: Json, key: str, sources: Collection[str | None]) -> str:
    """With ~ unless the upstream reported all of it; `-` for credits that nobody counts."""
    value = row[key]
    if key == "credits" and not any(sources):
        return "-"
    text = format_figure(value)
    if 0 < value < 0.1:
        text = f"{value:.4f}" if value >= 0.0001 else "<0.0001"
    return text if {*sources} <= {"reported", None} else f"~{text}"


def format_ratio(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def format_bar(share: float) -> str:
    """Ten characters for 1.0, without padding; never empty unless `share` is 0."""
    bar = "\N{FULL BLOCK}" * math.ceil(10 * min(max(share, 0.0), 1.0))
    try:
        bar.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#" * len(bar)
    return bar


COLOURS = {"ready": "32", "cooling down": "33", "failing": "31", "not signed in": "33"}
STATES = re.compile("|".join(COLOURS))


def coloured(text: str) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return STATES.sub(lambda match: f"\x1b[{COLOURS[match[0]]}m{match[0]}\x1b[0m", text)


FIGURE = re.compile(r"-|(?:~?<?[\d,.]+(?: %| ms| s)?)?")
# Heads of columns, each with the key of its cells or a function that makes them.
Columns = dict[str, str | Callable[[Json], str]]
STATUS_COLUMNS: Columns = {
    "PROVIDER": "name", "TYPE": "type", "HEALTH": "health", "ACCOUNT": "account", "PLAN": "plan",
    "TOKEN EXPIRES IN": lambda row: format_time_left(row["token_expires_at"]),
    "COOL-DOWN": lambda row: ", ".join(f"{c['model']} {c['seconds']} s" for c in row["cooldowns"]),
}  # fmt: skip
ACCOUNT_COLUMNS: Columns = {
    "NAME": "name", "TYPE": "type", "KIND": "kind", "USER": "user", "PLAN": "plan",
    "EXPIRES": lambda row: format_day(row["expires_at"]),
    "HEALTH": lambda row: row["health"] if row["enabled"] else f"disabled; {row['health']}",
}  # fmt: skip
MODEL_COLUMNS: Columns = {
    "MODEL": "id", "PROVIDER": "provider", "CONTEXT": "context_window", "OUTPUT": "max_tokens",
}  # fmt: skip
SETTING_COLUMNS: Columns = {
    "KEY": "key", "VALUE": lambda row: write_toml(row["value"]), "FROM": "origin",
}  # fmt: skip
# Rows of `/v1/usage`, after the columns that they are grouped by.
REPORT_COLUMNS: Columns = {
    "REQUESTS": "request_count", "ERRORS": "error_count",
    "INPUT": lambda row: format_usage(row, "input_tokens", row["token_sources"]),
    "CACHED": lambda row: format_ratio(row["cache_read_tokens"], row["input_tokens"]),
    "OUTPUT": lambda row: format_usage(row, "output_tokens", row["token_sources"]),
    "CREDITS": lambda row: format_usage(row, "credits", row["credit_sources"]),
    "TIME": "duration_ms", "FIRST BYTE": "first_byte_ms",
}  # fmt: skip
RECENT_COLUMNS: Columns = {
    "WHEN": lambda row: f"{dt.datetime.fromtimestamp(row['at']):%m-%d %H:%M:%S}",
    "MODEL": lambda row: f"{row['provider']}/{row['model']}", "LABEL": "label",
    "END": lambda row: row["kind"] or str(row["status"]),
    "TIME": "duration_ms", "FIRST BYTE": "first_byte_ms",
    "INPUT": lambda row: format_usage(row, "input_tokens", [row["input_source"]]),
    "CACHED": "cache_read_tokens",
    "OUTPUT": lambda row: format_usage(row, "output_tokens", [row["input_source"]]),
    "CREDITS": lambda row: format_usage(row, "credits", [row["credits_source"]]),
}  # fmt: skip
CACHE_COLUMNS: Columns = {
    "CONVERSATION": "conversation", "MODEL": lambda row: f"{row['provider']}/{row['model']}",
    "LABEL": "label", "CALLS": "calls",
    "HITS": lambda row: "-" if row["hit_ratio"] is None else f"{row['hit_ratio']:.0%}",
    "INPUT": "input_tokens", "CACHED": "cache_read_tokens", "LOST": "lost_tokens",
}  # fmt: skip


def table_lines(rows: list[list[str]]) -> list[str]:
    """Columns are aligned, figures to the right; control characters are removed."""
    columns = list(zip(*(map(one_line, row) for row in rows), strict=True))
    for index, column in enumerate(columns):
        width = max(map(len, column))
        figures = all(map(FIGURE.fullmatch, column[1:])) and any(map(str.strip, column[1:]))
        align = str.rjust if figures else str.ljust
        columns[index] = tuple(align(cell, width) for cell in column)
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def format_cell(row: Json, column: str | Callable[[Json], str]) -> str:
    if not isinstance(column, str):
        return column(row)
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,} ms" if column.endswith("_ms") else format_figure(value)


def print_rows(table: list[list[str]], spare: tuple[str, ...] = ()) -> None:
    """The first row is the head; if too wide for the terminal, `spare` columns are dropped."""
    for name in spare:
        if max(map(len, table_lines(table))) > shutil.get_terminal_size().columns:
            at = table[0].index(name)
            table = [[*row[:at], *row[at + 1 :]] for row in table]
    print(coloured("\n".join(table_lines(table))))


def print_table(columns: Columns, rows: list[Json], spare: tuple[str, ...] = ()) -> None:
    cells = ([format_cell(row, column) for column in columns.values()] for row in rows)
    print_rows([list(columns), *cells], spare)


def print_ready(status: Json, key_name: str) -> None:
    """`key_name` is the setting with a key that its user may not know."""
    url = status["url"]
    tell(f"aiclient-api {status['version']} listening on {url} (process {status['pid']})")
    for row in status["providers"]:
        reason = f": {row['reason']}" if row["reason"] else ""
        print(coloured(one_line(f"  provider {row['name']}: {row['health']}{reason}")))
    key = " -H 'authorization: Bearer YOUR_KEY'" if status["needs_key"] else ""
    print("Try it:")
    print(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\")
    print("""    -d '{"model":"echo","messages":[{"role":"user","content":"hello"}]}'""")
    if key_name:
        show_key = f"{program_command()} config get {key_name} --reveal"
        tell(f"Clients must send your key; to see it: {show_key}")
    tell(f"In a browser, {url}/ shows accounts, usage and recent requests.")
    if status["detached"]:
        tell(f"It logs to {status['log_file']}; stop it with: {program_command()} stop")
    sys.stdout.flush()


def format_cooldown(cooldown: Json) -> str:
    """`gpt-5.4, 55 s: why  Expected to recover in 3 min.`"""
    subject = "all models" if cooldown["model"] == "*" else cooldown["model"]
    how_long = "one request is probing" if cooldown["probing"] else f"{cooldown['seconds']} s"
    recovery = ""
    if cooldown["recovers_at"]:
        recovery = f" Expected to recover in {format_time_left(cooldown['recovers_at'])}."
    return f"{subject}, {how_long}: {cooldown['reason']}{recovery}"


def print_status(status: Json) -> None:
    memory = status["memory_bytes"]
    tell(
        f"aiclient-api {status['version']}, process {status['pid']}",
        f"state        {status['state']}, up {format_duration(status['uptime_s'])}",
        f"address      {status['url']}",
        f"connections  {status['connections']}",
        f"in flight    {status['requests_in_flight']}",
        f"memory       {'-' if memory is None else f'{memory / MIB:.0f} MiB'}",
        f"config       {status['config_file']}",
        f"log          {status['log_file'] or 'standard error'}",
        f"facts        built in, of {max(BUILT_IN_FACTS.values())}",
    )
    if status["log_lines_dropped"]:
        tell(f"             {status['log_lines_dropped']} lines could not be written")
    print()
    print_table(STATUS_COLUMNS, status["providers"])
    if status["disabled"]:
        names = ", ".join(status["disabled"])
        tell(f"disabled: {names}; to use one: {program_command()} provider enable NAME")
    for row in status["providers"]:
        if row["health"] != "ready" and row["reason"]:
            tell(f"{row['name']}: {row['reason']}")
        for cooldown in row["cooldowns"]:
            tell(f"{row['name']}: {format_cooldown(cooldown)}")
        for allowance in status["quota"].get(row["name"], {}).get("allowances", ()):
            if allowance["unlimited"] and allowance["used"]:
                tell(f"{row['name']}: {allowance['name']}: {format_remaining(allowance)}")
    for text in status["warnings"]:
        tell(f"warning: {text}")


def usage_table(report: Json) -> tuple[list[str], list[Json]]:
    """(names of the group columns, rows) of a report; by model, unless grouped otherwise."""
    if "rows" in report:
        return list(USAGE_GROUPS[report["by"]]), report["rows"]
    rows = [
        {"model": model, "provider": name, **row}
        for name, provider in report["providers"].items()
        for model, row in provider["models"].items()
    ]
    return ["model", "provider"], rows


def print_usage(report: Json) -> None:
    names, rows = usage_table(report)
    most = max((row["total_tokens"] for row in rows), default=0)
    if len(rows) > 1:
        rows = [*rows, {**report["total"], names[0]: "total", "total_tokens": 0}]
    columns: Columns = {**{name.upper(): name for name in names}, **REPORT_COLUMNS}
    columns["TOKENS"] = lambda row: format_bar(row["total_tokens"] / most) if most else ""
    print_table(columns, rows, ("FIRST BYTE", "TIME", "ERRORS", "TOKENS", "CACHED"))
    if report["since"]:
        tell(f"since {format_minute(report['since'])}; ~ is derived or estimated")
    for row in report["limits"]:
        used, limit = format_figure(row["used"]), format_figure(row["limit"])
        share = format_bar(row["used"] / row["limit"])
        tell(f"limit {row['name']}: {used} of {limit} {row['unit']}  {share}")
    if "recent" in report:
        print()
        print_table(RECENT_COLUMNS, report["recent"], ("FIRST BYTE", "CACHED", "LABEL"))
    if "trouble" in report:
        tell(f"not written to disk now: {report['trouble']}")


def print_usage_csv(report: Json) -> None:
    names, rows = usage_table(report)
    rows = report["cache"]["conversations"] if "cache" in report else report.get("recent", rows)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(list(rows[0]) if rows else names)
    for row in rows:
        cells = (dump_text(cell) if isinstance(cell, dict) else cell for cell in row.values())
        writer.writerow(one_line(cell) if isinstance(cell, str) else cell for cell in cells)


def print_cache(report: Json) -> None:
    print_table(CACHE_COLUMNS, report["cache"]["conversations"])
    for row in report["cache"]["conversations"]:
        changed = row["changed"]
        if changed:
            times = "once" if changed["times"] == 1 else f"{changed['times']} times"
            tell(f"{row['conversation']}: {changed['block']} changed {times}: {changed['hint']}")


def format_share(percent: float | None) -> str:
    """` 42 %  ####`, `-` for none; 100 % only if all is used."""
    return "-" if percent is None else f"{int(percent):3d} %  {format_bar(percent / 100)}"


def format_reset(moment: float | None, now: float) -> str:
    """`2026-12-01, 9 days`: the day in UTC, and the time left; `-` for none."""
    if not moment or moment <= now:
        return format_day(moment)
    days = math.ceil((moment - now) / 86400)
    left = f"{days} days" if days > 1 else format_duration(moment - now)
    return f"{format_day(moment)}, {left}"


def format_remaining(row: Json) -> str:
    """`1,210.4 of 1,500 credits`, as much as is known."""
    unit = f" {row['unit']}" if row["unit"] else ""
    if row["unlimited"]:
        used = "" if row["used"] is None else f"{format_figure(row['used'])}{unit} used, "
        return f"{used}no limit"
    if row["remaining"] is row["limit"] is None:
        return "-"
    left = "?" if row["remaining"] is None else format_figure(row["remaining"])
    of = "" if row["limit"] is None else f" of {format_figure(row['limit'])}"
    return f"{left}{of}{unit}"


def quota_rows(name: str, quota: Json, now: float) -> Iterator[list[str]]:
    """A row for each allowance and, indented, for each of its parts."""
    plan = quota["plan"] or "-"
    for row in quota["allowances"]:
        used, left = format_share(row["percent_used"]), format_remaining(row)
        yield [name, plan, row["name"], used, left, format_reset(row["resets_at"], now)]
        for part in row.get("parts", ()):
            used = format_share(100 * part["used"] / part["limit"] if part["limit"] else None)
            left = format_figure(max(0.0, part["limit"] - part["used"]))
            left += f" of {format_figure(part['limit'])}"
            resets = format_reset(part["ends_at"], now) if part["ends_at"] else ""
            yield ["", "", f"  {part['name']}", used, left, resets]
    if not quota["allowances"]:
        yield [name, plan, "-", "-", "-", format_reset(quota["resets_at"], now)]


def print_quota(data: Json) -> None:
    """A table; below it overage, and the age of figures after an error."""
    now = time.time()
    rows = [["PROVIDER", "PLAN", "OF", "USED", "LEFT", "RESETS"]]
    notes: list[str] = []
    for name, quota in data["providers"].items():
        if "allowances" in quota:
            rows += quota_rows(name, quota, now)
        for row in quota.get("allowances", ()):
            if row["overage_used"]:
                overage = format_figure(row["overage_used"])
                notes.append(f"{name}: {row['name']}: {overage} beyond the limit")
        if "error" in quota:
            age = format_duration(now - quota["as_of"]) if "as_of" in quota else ""
            age = f"  The figures are {age} old." if age else ""
            notes.append(f"{name}: {quota['error']}{age}")
    print_rows(rows)
    for note in notes:
        tell(note)


def print_changes(changes: Json) -> None:
    tell("changed: " + (", ".join(changes["changed"]) or "nothing"))
    if changes["needs_restart"]:
        keys = ", ".join(changes["needs_restart"])
        tell(f"{keys}: takes effect after: {program_command()} restart")


class App:
    """What a verb works with: the parsed command line and the files of this user."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.environ = dict(os.environ)
        self.paths = find_paths(self.environ)
        self.ask = functools.partial(ask_daemon, self.paths)

    def load_config(self, flags: dict[str, str | None] | None = None) -> Config:
        if not logging.getLogger().handlers:
            start_log("warning")
        return load_config(self.paths, self.environ, flags or {})

    def show(self, data: Json, printer: Callable[[Json], None]) -> None:
        """A table on a terminal, JSON with --json or in a pipe."""
        if self.options.json or not sys.stdout.isatty():
            print(json.dumps(data, indent=2))
        else:
            printer(data)


Argument = tuple[str, Json]  # what `add_argument` takes


def argument(name: str, help_text: str, **settings: Any) -> Argument:
    return name, {"help": help_text, **settings}


def flag(name: str, help_text: str) -> Argument:
    return argument(name, help_text, action="store_true")


# Of several verbs.
AS_JSON = flag("--json", "JSON instead of a table, as in a pipe")
PROVIDER_ARGUMENT = argument("name", "the provider, as in [providers.NAME]", metavar="NAME")
NO_BROWSER = argument("--no-browser", "only show the link", dest="browser", action="store_false")
KEY_ARGUMENT = argument("key", "as config show prints it", metavar="KEY")
MANAGER_ARGUMENT = argument("--manager", "default: this machine's", choices=("launchd", "systemd"))


Run = Callable[[App], int | None]  # returns the exit status, None for 0


class Verb(NamedTuple):
    words: str
    run: Run
    summary: str
    arguments: tuple[Argument, ...]
    example: str  #: without the program's name


GROUPS = {
    "auth": "sign in to Copilot and Kiro; list and remove sign-ins",
    "config": "show and change settings",
    "provider": "switch providers on and off",
    "service": "run at login",
}
VERBS: list[Verb] = []


def verb(words: str, summary: str, *arguments: Argument, example: str = "") -> Callable[[Run], Run]:
    """Registers a function as the verb `words`."""

    def register(run: Run) -> Run:
        VERBS.append(Verb(words, run, summary, arguments, example or words))
        return run

    return register


# 20.2 start, stop, restart


async def serve(
    launch: Launch,
    paths: Paths,
    config: Config,
    listeners: list[socket.socket],
    report: Callable[[Json], bool],
) -> int:
    """Creates every object and runs the gateway until it is stopped; returns the exit status.

    `report` gets the status when all is ready, and returns whether it was read.
    """
    with os_error_as(f"{launch.log_file}: the log cannot be written"):
        log_file = start_log(config.logging.level, launch.log_file, launch.detached)
    raise_descriptor_limit()
    daemon = Daemon(launch, paths, config, log_file)
    mask_in_log(lambda: daemon.gateway.secrets())
    for path in (paths.config_file, *map(paths.token_file, config.providers)):
        if is_in_place(path):
            hint = "it is a mount, or its folder is read-only: mount the folder, writable"
            log_event("warning", "file_written_in_place", path=path, hint=hint)
    await daemon.listen(listeners)
    control = None
    if paths.usage_file == IN_MEMORY:
        log_event("warning", "state_not_writable", path=paths.state_dir, usage="in memory")
    elif fcntl is not None:
        loop = asyncio.get_running_loop()

        def handle(data: bytes) -> Json:
            return asyncio.run_coroutine_threadsafe(run_control_method(daemon, data), loop).result()

        control = ControlServer(choose_socket_path(paths, daemon.environ), handle)
        with os_error_as(f"{paths.pid_file}: cannot be written"):
            write_pid_file(launch.lock, control.path)
    gc.freeze()  # the program itself is no garbage
    gc.set_threshold(GARBAGE_OBJECTS)
    notify_manager(f"READY=1\nMAINPID={os.getpid()}")
    log_event("info", "listening", port=daemon.port, version=__version__)
    if not report(daemon.status()):
        daemon.stop()
    await daemon.run()
    if control is not None:
        await asyncio.to_thread(control.close)
    return 0


def main_detached() -> int:
    """The entry point of a background process; returns the exit status.  See `start_process`."""
    os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: 0, which brought the bytecode
    starter = int(sys.argv[1])
    os.set_inheritable(starter, False)
    with open(starter, "rb", closefd=False) as stream:
        values = json.loads(stream.read())
    names = {item.name for item in fields(Launch)}  # another version may have others
    launch = Launch(**{name: value for name, value in values.items() if name in names})
    for fd in launch.descriptors():
        os.set_inheritable(fd, False)
    sys.argv[:] = sys.orig_argv[:] = [launch.program]

    def report(message: Json) -> bool:
        """False if the process that waits for the start has gone."""
        try:
            os.write(starter, dump_message(message))
        except BrokenPipeError:
            log_event("error", "parent_gone")
            return False
        if "error" not in message:
            os.close(starter)  # after an error it ends with this process
        return True

    os.umask(0o077)
    start_log("info")  # standard error is the log
    try:
        environ = dict(os.environ)
        paths = find_paths(environ)
        config = load_config(paths, environ, launch.flags)
        listeners = launch_listeners(launch, config)
        return run_in_loop(serve(launch, paths, config, listeners, report))
    except ProgramError as error:
        report({"error": str(error)})
        return error.exit_status
    except OSError as error:
        report({"error": system_message(error)})
        return 1


def await_daemon(paths: Paths) -> Json | None:
    """The status of the daemon that has the lock, once it serves; None if it releases the lock."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            status = ask_daemon(paths, "status")
            if status.get("state") != "stopping":
                return status
            problem = ProgramError(f"process {status.get('pid')} is still stopping; see: status")
        except NotRunning:
            return None
        except NotResponding:
            raise
        except ProgramError as error:
            problem = error
        if time.monotonic() > deadline:
            raise problem
        time.sleep(POLL_SECONDS)


def ask_health(url: str, key: str = "") -> bool:
    """Whether the gateway responds; with `key`, whether it accepts it."""
    path = "/v1/status" if key else "/healthz"
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
    parts = urllib.parse.urlsplit(url)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "", parts.hostname)
    try:
        with socket.create_connection((host, parts.port), HEALTH_SECONDS) as peer:
            peer.sendall(f"{head}Connection: close\r\n\r\n".encode())
            with peer.makefile("rb") as stream:
                return stream.read(12).endswith(b" 200")
    except OSError:
        return False


def different_flags(options: argparse.Namespace, config: Config, status: Json) -> str:
    """The flags of `start` by which a running gateway differs from the one asked for."""
    server, url, key = config.server, urllib.parse.urlsplit(status["url"]), options.api_key
    has_key = key and status["needs_key"] and ask_health(status["url"], config.api_key)
    log_file = options.log_file and os.path.abspath(options.log_file)
    is_different = {
        "--foreground": options.foreground,
        "--host": options.host and url.hostname != server.host.lower(),
        "--port": options.port and server.port not in (0, url.port),
        "--api-key": key and not has_key,
        "--log-file": log_file and log_file != status["log_file"],
    }
    return ", ".join(flag for flag, differs in is_different.items() if differs)


def start_detached(launch: Launch, paths: Paths) -> Json:
    path = launch.log_file
    with os_error_as(f"{path}: the log cannot be written"):
        log_file = start_log("info", path)
    assert log_file is not None
    offset = log_file.size
    status = start_process(launch, log_file.fd, detach=True)
    for fd in launch.descriptors():
        os.close(fd)
    if status and "error" not in status:
        if ask_health(status["url"]):
            return status
        signal_daemon(paths.pid_file, status["pid"], signal.SIGTERM)
        problem = f"{status['url']} does not respond"
    else:
        timeout = f"it exited, or timed out after {START_SECONDS:g} s, without a message"
        problem = f"the gateway did not start: {status['error'] if status else timeout}"
    lines: list[str] = []
    with contextlib.suppress(ProgramError), open_log(path) as file:
        file.seek(offset)
        lines = file.read(MIB).splitlines()[-10:]
    raise ProgramError(problem, *(f"  {line}" for line in lines))


KEY_VARIABLE = "AICLIENT_START_KEY"


def reexecute(options: argparse.Namespace) -> None:
    """Runs the program anew in this process: without --api-key, or from bytecode.

    All users of a machine can read command lines; the key travels in the environment, which only
    its user can read, and is removed from there.
    """
    is_exposed = options.api_key is not None and any(options.api_key in word for word in sys.argv)
    if options.api_key is None:
        options.api_key = os.environ.pop(KEY_VARIABLE, None)
    bytecode = open_bytecode() if options.foreground else None
    if not is_exposed and bytecode is None:
        return
    values = {"host": options.host, "port": options.port, "log-file": options.log_file}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    arguments += ["--foreground"] if options.foreground else []
    *interpreter, script = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if bytecode is None:
        interpreter.append(script)
    else:
        launcher = LAUNCHER, str(bytecode), program_file(), "main", sys.argv[0]
        interpreter += ["-P", "-c", *launcher]
    key = {} if options.api_key is None else {KEY_VARIABLE: options.api_key}
    os.execve(sys.executable, [*interpreter, "start", *arguments], {**os.environ, **key})


def open_bytecode() -> int | None:
    """A nameless file of what Python has just compiled: nothing may be writable in a container."""
    code = bare_code()
    if code is None:
        return None
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("bytecode")
        else:
            fd, path = tempfile.mkstemp()
            os.unlink(path)
        os.set_inheritable(fd, True)
        with open(fd, "wb", closefd=False) as file:
            marshal.dump(code, file)
            file.seek(0)
    except OSError as error:  # it works as well, in 50 MB more
        log_event("warning", "bytecode_unusable", reason=error.strerror)
        return None
    return fd


@verb(
    "start",
    "start the gateway",
    flag("--foreground", "stay in this terminal and log to it"),
    argument("--host", "address to listen on (default 127.0.0.1)"),
    argument("--port", "port to listen on (default 9090; 0 = any free one)"),
    argument(
        "--api-key",
        "key that clients must send; the process list and your shell's history may show it: "
        "prefer AICLIENT_API_KEY or the config file",
    ),
    argument("--log-file", "log there instead of in the state folder", metavar="FILE"),
    example="start --port 8080",
)
def cmd_start(app: App) -> None:
    """Starts the gateway in the background, or with --foreground in this terminal.

    If it is already running, that is an error only if flags were given.
    """
    options, paths = app.options, app.paths
    if not options.foreground and not hasattr(os, "fork"):
        raise WrongUsage("this system cannot run it in the background; use: start --foreground")
    if hasattr(os, "fork"):
        reexecute(options)
    flags = {"server.host": options.host, "server.port": options.port, "api_key": options.api_key}
    config = app.load_config(flags)
    log_file = os.path.abspath(options.log_file) if options.log_file else ""
    detached = not options.foreground
    program = program_command()
    launch = Launch(flags, program, log_file or (paths.log_file if detached else ""), detached)
    has_state = open_state(paths, is_required=detached)
    if not has_state:
        paths.usage_file = IN_MEMORY
    while (lock := take_lock(paths.pid_file) if has_state else -1) is None:
        status = await_daemon(paths)
        if status is not None:
            tell(f"aiclient-api is already running: {status['url']} (process {status['pid']})")
            names = different_flags(options, config, status)
            if names:
                raise ProgramError(
                    f"the flags were not applied: {names}; first run: {program} stop"
                )
            return
    launch.lock = lock
    if not detached:
        launch.listeners = activated_descriptors(app.environ)
        launch.activated = bool(launch.listeners)
    listeners = launch_listeners(launch, config)
    # Everything is checked and nothing is forked yet: it can still ask at the terminal.
    accounts = [row for row in account_rows(config, paths) if row["enabled"]]
    is_first_start = accounts and all(row["health"] == "not signed in" for row in accounts)
    if is_first_start and Console().interactive:
        run_sign_in(app, offer_sign_in, config)
    key_names = ["api_key"] if config.api_key else [f"api_keys.{name}" for name in config.api_keys]
    key_name = "" if options.api_key or not key_names else key_names[0]
    if detached:
        print_ready(start_detached(launch, paths), key_name)
        return

    def report(status: Json) -> bool:
        print_ready(status, key_name)
        return True

    run_in_loop(serve(launch, paths, config, listeners, report))


def count_requests(count: int) -> str:
    return f"{count} request{'s' if count != 1 else ''}"


@verb("stop", "stop after in-flight requests finish")
def cmd_stop(app: App) -> None:
    """Stops the gateway; in-flight requests may finish, up to server.drain_seconds."""
    path = app.paths.pid_file
    if not is_locked(path):
        raise not_running()
    drain_s, in_flight = ServerConfig().drain_seconds, 0
    with contextlib.suppress(ConfigError):  # a broken configuration must not keep it running
        drain_s = app.load_config().server.drain_seconds
    try:
        in_flight = app.ask("status")["requests_in_flight"]
    except NotResponding:
        drain_s = 0.0
    except ProgramError:
        pass  # just starting or stopping
    if in_flight:
        waiting = f"waiting up to {drain_s:g} s (Ctrl-C: do not wait; it still stops)"
        print(f"{count_requests(in_flight)} in flight; {waiting}", file=sys.stderr)
    drained_at = time.monotonic() + drain_s
    deadline, signum, signalled = drained_at + KILL_AFTER_SECONDS, signal.SIGTERM, set()
    while is_locked(path):
        pid, _ = read_pid_file(path)
        if pid and (pid, signum) not in signalled:  # a successor may have taken over meanwhile
            signalled.add((pid, signum))
            signal_daemon(path, pid, signum)
        if time.monotonic() > deadline:
            if signum == signal.SIGKILL or not pid:
                raise ProgramError(f"the gateway (process {pid or 'unknown'}) did not exit")
            print(f"process {pid} did not exit in time; killing it", file=sys.stderr)
            signum, deadline = signal.SIGKILL, time.monotonic() + KILL_AFTER_SECONDS
        time.sleep(POLL_SECONDS)
    is_late = in_flight and time.monotonic() > drained_at
    print("stopped; requests that had not finished were cut off" if is_late else "stopped")


@verb("restart", "replace the process by a new one without dropping requests")
def cmd_restart(app: App) -> None:
    old = app.ask("status")
    new = app.ask("restart", seconds=START_SECONDS + CONTROL_SECONDS)
    where = f"{new['url']} (process {new['pid']})"
    tell(f"restarted: aiclient-api {new['version']} listening on {where}")
    if old["requests_in_flight"]:
        tell(f"process {old['pid']} finishes {count_requests(old['requests_in_flight'])} in flight")


verb("status", "show the running gateway and its providers", AS_JSON)(
    lambda app: app.show(app.ask("status"), print_status)
)


# 20.3 accounts


def run_sign_in(
    app: App, work: Callable[[SignInContext], Awaitable[Result]], config: Config | None = None
) -> Result:
    """Runs `work` with what a sign-in needs, or what ends one.

    A running gateway notices a new token file by itself; for a new provider it is reloaded.
    """
    config = config or app.load_config()
    old_providers = dict(config.providers)
    browser = getattr(app.options, "browser", True)

    async def run() -> Result:
        with contextlib.closing(HttpClient(config.network, Ticker())) as client:
            try:
                return await work(SignInContext(config, app.paths, client, Console(), browser))
            except ApiError as error:
                raise ProgramError(error.text()) from None

    try:
        result = run_in_loop(run())
    except KeyboardInterrupt:
        print("\naiclient-api: sign-in cancelled; nothing was changed", file=sys.stderr)
        raise
    if config.providers != old_providers and is_locked(app.paths.pid_file):
        reload_if_running(app)
    return result


def read_secret(prompt: str) -> str:
    """From standard input: typed without echo, or piped."""
    try:
        text = getpass.getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline()
    except (EOFError, UnicodeDecodeError):
        raise SignInFailed("no token was given") from None
    return clean_token(text)


@verb(
    "auth copilot",
    "sign in to GitHub Copilot",
    argument("--github-host", "TENANT.ghe.com (default github.com)", metavar="HOST", default=""),
    argument("--name", "of the provider (default copilot)", default="copilot"),
    flag("--token-stdin", "read a GitHub token from standard input"),
    NO_BROWSER,
    example="auth copilot --name work --github-host acme.ghe.com",
)
def cmd_auth_copilot(app: App) -> None:
    """Signs in to GitHub Copilot in a browser on any machine, or with a token.

    A token for programs in COPILOT_GITHUB_TOKEN, GH_TOKEN or GITHUB_TOKEN is offered first.
    A running gateway picks up the sign-in with the next request.
    """
    options = app.options
    host = parse_github_host(options.github_host) if options.github_host else ""
    token = read_secret("GitHub token: ") if options.token_stdin else ""
    tell(run_sign_in(app, lambda c: sign_in_copilot(c, options.name, host, token)))


@verb(
    "auth kiro",
    "sign in to Kiro",
    argument("--method", "skips the menu", choices=tuple(KIRO_METHODS), default=""),
    argument("--start-url", "of an organisation", metavar="URL", default=""),
    argument("--region", "of the organisation's IAM Identity Center", default=""),
    argument("--name", "of the provider (default kiro)", default="kiro"),
    flag("--token-stdin", "read a Kiro API key from standard input"),
    NO_BROWSER,
    example="auth kiro --start-url https://acme.awsapps.com/start",
)
def cmd_auth_kiro(app: App) -> None:
    """Signs in to Kiro with an AWS Builder ID, Google, GitHub, an organisation, or an API key."""
    options = app.options
    method, organisation = options.method, (options.start_url, options.region)
    if any(organisation):
        if method not in ("", "organisation"):
            raise WrongUsage("--start-url and --region go with --method organisation only")
        method = "organisation"
    token = read_secret("Kiro API key: ") if options.token_stdin else ""
    if token and not token.startswith("ksk_"):
        raise SignInFailed("that is not a Kiro API key: they begin with ksk_")
    tell(run_sign_in(app, lambda c: sign_in_kiro(c, options.name, method, *organisation, token)))


@verb(
    "auth import",
    "use a sign-in of another program on this machine",
    argument("--from", "only this one", dest="origins", action="append", choices=tuple(IMPORTS)),
    argument("--name", "of the provider; replaces its sign-in", default=""),
    flag("--yes", "do not ask; replace nothing"),
    example="auth import --from gh",
)
def cmd_auth_import(app: App) -> None:
    """Uses sign-ins that other programs have on this machine, like the Kiro IDE; asks first."""
    options = app.options
    app.load_config()  # a broken configuration is reported before anything is read
    logins = find_logins(options.origins or ())
    if all(login.problem for login in logins):
        raise ProgramError("no sign-in of another program was found:", *map(str, logins))
    messages = run_sign_in(app, lambda c: import_logins(c, logins, options.name, options.yes))
    tell(*(messages or ["Nothing was changed"]))


@verb("auth list", "list the sign-ins, without their tokens", AS_JSON)
def cmd_auth_list(app: App) -> None:
    accounts = account_rows(app.load_config(), app.paths)
    app.show({"accounts": accounts}, lambda data: print_table(ACCOUNT_COLUMNS, data["accounts"]))


@verb("auth revoke", "remove a sign-in", PROVIDER_ARGUMENT, example="auth revoke copilot")
def cmd_auth_revoke(app: App) -> None:
    tell(run_sign_in(app, lambda context: revoke_login(context, app.options.name)))


# 20.4 verbs that ask the daemon


@verb("models", "list the models that can be requested", AS_JSON)
def cmd_models(app: App) -> None:
    models = app.ask("models", seconds=CONTROL_WORK_SECONDS)
    app.show(models, lambda data: print_table(MODEL_COLUMNS, data["models"]))


verb("quota", "show what is left of your plans", AS_JSON)(
    lambda app: app.show(app.ask("quota", seconds=CONTROL_WORK_SECONDS), print_quota)
)


@verb(
    "usage",
    "show requests, tokens and credits",
    argument("--since", "7d, 24h, today, 2026-11-01 or Unix seconds", metavar="TIME"),
    argument("--by", "group rows by (default model)", choices=tuple(USAGE_GROUPS)),
    argument("--recent", "the last N requests, one by one", metavar="N"),
    flag("--cache", "which blocks broke prompt caches, by conversation"),
    flag("--csv", "comma-separated values"),
    AS_JSON,
    flag("--reset", "start counting anew; limits keep counting"),
    flag("--yes", "do not ask before a reset"),
    example="usage --since 7d --by day",
)
def cmd_usage(app: App) -> None:
    """Shows requests, tokens and credits by model or by another group, also of the past."""
    options, path = app.options, app.paths.usage_file
    settings = {"since": options.since, "by": options.by, "recent": options.recent}
    settings["cache"] = int(options.cache)
    params = {name: str(value) for name, value in settings.items() if value}
    try:
        query = read_usage_query(params, time.time())
    except ApiError as error:
        raise WrongUsage(error.text()) from None
    if options.reset and sys.stdin.isatty() and sys.stdout.isatty():
        total = app.ask("usage", seconds=CONTROL_WORK_SECONDS)["total"]["request_count"]
        counted = f"the usage of {count_requests(total)}"
        if not options.yes and not confirm(f"Forget {counted}?"):
            raise ProgramError("nothing was changed")
        app.ask("usage", {"reset": True}, CONTROL_WORK_SECONDS)
        tell(f"forgot {counted}; limits keep counting")
        return
    try:
        report = app.ask("usage", {**params, "reset": options.reset}, CONTROL_WORK_SECONDS)
    except NotRunning:
        if options.reset or options.cache or not os.path.exists(path):
            raise
        with contextlib.closing(UsageStore(path)) as store:
            report = {**store.report(query, time.time()), "limits": []}
    if options.csv:
        print_usage_csv(report)
    else:
        app.show(report, print_cache if options.cache else print_usage)


# 20.5 configuration


def reload_if_running(app: App) -> Json | None:
    """None if no gateway is running."""
    try:
        return app.ask("config.reload")
    except NotRunning:
        return None
    except ProgramError as error:
        problem = f"saved, but the running gateway keeps its old configuration: {error}"
        raise ProgramError(problem) from None


def report_override(app: App, key: str) -> None:
    for row in app.ask("config.show")["settings"]:
        if row["key"] == key and row["origin"] not in ("file", "default"):
            tell(f"{row['origin']} overrides the file until the gateway is restarted without it")


def report_saved(app: App, key: str = "") -> None:
    """Applies a changed file; reports what changed, and whether something overrides `key`."""
    changes = reload_if_running(app)
    tell(f"saved in {app.paths.config_file}")
    if changes is not None:
        print_changes(changes)
        report_override(app, key)


def ask_line(question: str, default: str) -> str:
    return input(f"{question} [{default}]: ").strip() or default


def confirm(question: str, default: str = "no") -> bool:
    return ask_line(f"{question} (yes, no)", default).lower() in ("y", "yes")


@verb(
    "config init",
    "write a first configuration",
    flag("--yes", "ask nothing and write the defaults"),
    flag("--force", "replace an existing file"),
)
def cmd_config_init(app: App) -> int:
    """Writes a first configuration file: asks three questions and shows the file first."""
    path = app.paths.config_file
    if os.path.lexists(path) and not app.options.force:
        raise ProgramError(f"{path} exists; change it with: config set KEY VALUE")
    interactive = not app.options.yes
    if interactive and not sys.stdin.isatty():
        raise WrongUsage("there is no terminal to ask at; --yes writes the defaults")
    settings = {"default_provider": "copilot", "server.port": "9090"}
    if interactive:
        print("Which service should serve models whose name does not tell?")
        settings["default_provider"] = ask_line("copilot, kiro or echo", "copilot")
        settings["server.port"] = ask_line("Port to listen on", "9090")
        if confirm("Should programs have to send a key?  Yes generates one"):
            settings["api_key"] = "sk-local-" + os.urandom(24).hex()
    text = "# aiclient-api; README.md lists every setting.\n"
    for key, value in settings.items():
        text = change_setting(text, path, key, value)
    print(f"\n{path}:\n\n{text}")
    if interactive and not confirm("Write it", "yes"):
        print("nothing was written")
        return 1
    edit_config(app.paths, lambda _: text)
    report_saved(app)
    return 0


@verb("config show", "show every setting and its origin, secrets masked", AS_JSON)
def cmd_config_show(app: App) -> None:
    try:
        settings = app.ask("config.show")
    except NotRunning:
        settings = {"settings": describe_settings(app.load_config())}
    app.show(settings, lambda data: print_table(SETTING_COLUMNS, data["settings"]))


@verb(
    "config get",
    "print one setting of the file and this shell",
    KEY_ARGUMENT,
    flag("--reveal", "also if it is secret"),
    example="config get server.port",
)
def cmd_config_get(app: App) -> None:
    key, settings = app.options.key, dict(effective_settings(app.load_config()))
    if key not in settings:
        raise WrongUsage(f"{key}: no such setting; {suggest(key, settings)}")
    value = settings[key]
    if is_secret_setting(key) and value and not app.options.reveal:
        value = "(set; --reveal shows it)"
    print(value if isinstance(value, str) else write_toml(value))


@verb(
    "config set",
    "change one setting",
    KEY_ARGUMENT,
    argument("value", "lists with commas; - reads it from standard input", metavar="VALUE"),
    example="config set server.drain_seconds 60",
)
@verb("config unset", "back to its default", KEY_ARGUMENT, example="config unset server.port")
def cmd_config_set(app: App) -> None:
    """Changes one setting, or removes it from the file, keeps everything else in it, applies it."""
    key, value = app.options.key, getattr(app.options, "value", None)
    needed_key = None
    with contextlib.suppress(ConfigError):  # which this may correct
        needed_key = app.load_config().needs_key
    if value == "-":
        value = sys.stdin.readline().rstrip("\r\n")
    if is_secret_setting(key) and value is not None and not value.strip():
        raise WrongUsage(f"{key}: the value is empty; to remove it: config unset {key}")
    change_config(app.paths, app.environ, key, value)
    report_saved(app, key)
    if needed_key not in (None, app.load_config().needs_key):
        need = "no key: there is none" if needed_key else "a key: api_key or one of api_keys"
        tell(f"From now on clients need {need}.")


@verb("config edit", "edit the file in $VISUAL or $EDITOR, check and apply it")
def cmd_config_edit(app: App) -> None:
    edit_config(app.paths, lambda text: text)  # creates it
    editor = app.environ.get("VISUAL") or app.environ.get("EDITOR") or "vi"
    try:
        subprocess.run([*shlex.split(editor), app.paths.config_file], check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ProgramError(f"{editor}: {error}") from None
    app.load_config()  # raises what is wrong with it
    report_saved(app)


verb("config reload", "make the gateway read its configuration again", AS_JSON)(
    lambda app: app.show(app.ask("config.reload"), print_changes)
)


@verb("provider enable", "use a provider", PROVIDER_ARGUMENT, example="provider enable kiro")
@verb("provider disable", "do not use it", PROVIDER_ARGUMENT, example="provider disable kiro")
def cmd_provider_switch(app: App) -> None:
    """Enables or disables a provider for good; `enable` also ends its cool-downs."""
    name, names, method = app.options.name, app.load_config().providers, app.options.verb
    if name not in names:
        raise no_provider(name, names)
    enabled = json.dumps(method == "enable")
    try:
        app.ask(f"provider.{method}", {"name": name})
        report_override(app, f"providers.{name}.enabled")
    except NotRunning:
        change_provider(app.paths, app.environ, name, enabled)
        tell(f"saved in {app.paths.config_file}")
    state = "on" if method == "enable" else "off"
    tell(f"{name} is {state} (providers.{name}.enabled = {enabled})")


@verb("provider list", "list all, with or without a sign-in", AS_JSON)
def cmd_provider_list(app: App) -> None:
    config = app.load_config()
    rows = {row["name"]: row for row in account_rows(config, app.paths)}
    for name, entry in config.providers.items():
        row = {"name": name, "type": entry.type, "enabled": entry.enabled, "health": "ok"}
        rows.setdefault(name, {**row, "expires_at": None})
    data = {"providers": list(rows.values())}
    app.show(data, lambda data: print_table(ACCOUNT_COLUMNS, data["providers"]))


@verb("provider remove", "forget it", PROVIDER_ARGUMENT, example="provider remove work")
def cmd_provider_remove(app: App) -> None:
    """Removes a provider from the configuration, with its limits and its sign-in."""
    name, config, path = app.options.name, app.load_config(), app.paths.config_file
    if name in PROVIDER_CONFIGS:
        raise WrongUsage(f"{name} is built in; see: provider disable")
    if name not in config.providers:
        raise no_provider(name, sorted(config.providers.keys() - PROVIDER_CONFIGS.keys()))

    def edit(text: str) -> str:
        if name in config.limits.providers:
            text = change_setting(text, path, f"limits.providers.{name}", None)
        return change_setting(text, path, f"providers.{name}", None)

    edit_config(app.paths, edit, app.environ)
    report_saved(app)
    if os.path.lexists(app.paths.token_file(name)):
        tell(run_sign_in(app, lambda context: revoke_login(context, name)))


# 20.6 the log


def follow_log(file: TextIO, path: str, level: str) -> None:
    """Prints new lines of a log, also once it is rotated or truncated, until interrupted."""
    log_filter = LogFilter(level)
    tail = ""
    while True:
        try:
            is_moved = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            is_moved = True
        piece = tail + file.read()  # after the check: all that the moved file will ever hold
        *lines, tail = piece.split("\n")
        for line in filter(log_filter.takes, lines):
            tell(line)
        if is_moved and os.path.exists(path):
            file.close()
            file, tail = open_log(path), ""
        elif os.fstat(file.fileno()).st_size < file.buffer.tell():
            file.seek(0)
            tail = ""
        elif not lines:
            time.sleep(POLL_SECONDS)


@verb(
    "logs",
    "show the last lines of the log",
    argument("-n --lines", f"default {DEFAULT_LOG_LINES}", type=int, default=DEFAULT_LOG_LINES),
    argument("--level", "this or above", type=log_level, choices=LOG_LEVELS, default="debug"),
    flag("-f --follow", "keep printing new lines, until Ctrl-C"),
    example="logs --level warning --follow",
)
def cmd_logs(app: App) -> None:
    options, path = app.options, app.paths.log_file
    with contextlib.suppress(ProgramError):
        path = app.ask("status")["log_file"]
    if path is None:
        raise ProgramError("the gateway logs to its terminal, or to the journal of its service")
    file = open_log(path)
    for line in read_log_tail(file, path, options.lines, options.level):
        tell(line)
    if options.follow:
        follow_log(file, path, options.level)


# 20.7 service managers

SERVICE_NAME = "aiclient-api"


def quote_unit(text: str) -> str:
    """A value in a systemd unit, where `%`, quotes and backslashes are special."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m[0]):02x}", text) + '"'


def unit_command(command: list[str]) -> str:
    """A command in a systemd unit (systemd.service(5), "Command lines").

    Variables are expanded in its arguments and in argv[0], but not in the path that is run.
    """
    arguments = [quote_unit(word).replace("$", "$$") for word in command]
    if "$" in command[0]:
        arguments.insert(0, "@" + quote_unit(command[0]))
    return " ".join(arguments)


def service_command(*arguments: str) -> list[str]:
    return [sys.executable, "-I", os.path.realpath(__file__), *arguments]


def service_environment(environ: dict[str, str]) -> dict[str, str]:
    """What decides where files are.  No secrets: service files are world-readable."""
    names = ("XDG_CONFIG_HOME", "XDG_STATE_HOME")
    return {name: environ[name] for name in names if environ.get(name)}


def systemd_unit(environ: dict[str, str]) -> str:
    """NotifyAccess=all, because `aiclient-api restart` changes the main process."""
    start = unit_command(service_command("start", "--foreground"))
    reload = unit_command(service_command("config", "reload"))
    settings = service_environment(environ).items()
    lines = [f"Environment={quote_unit(f'{name}={value}')}\n" for name, value in settings]
    return (
        "[Unit]\n"
        "Description=aiclient-api: GitHub Copilot and Kiro as the OpenAI and the Anthropic API\n"
        "After=network-online.target\n\n"
        "[Service]\nType=notify\nNotifyAccess=all\n"
        f"ExecStart={start}\nExecReload={reload}\n{''.join(lines)}"
        "Restart=on-failure\nRestartSec=2\nTimeoutStopSec=90\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def launchd_agent(environ: dict[str, str], log: str) -> str:
    agent = {
        "Label": SERVICE_NAME,
        "ProgramArguments": service_command("start", "--foreground", "--log-file", log),
        "EnvironmentVariables": service_environment(environ),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
    }
    try:
        return str(plistlib.dumps(agent).decode())
    except ValueError as error:  # control characters, or bytes that are not text
        raise ProgramError(f"launchd cannot represent a path of this gateway: {error}") from None


class ServiceManager(NamedTuple):
    path: str
    text: str
    install: list[list[str]]
    remove: list[list[str]]
    hint: str  #: printed after an installation


def find_manager(app: App) -> ServiceManager:
    if (app.options.manager or sys.platform) in ("launchd", "darwin"):
        path = os.path.expanduser(f"~/Library/LaunchAgents/{SERVICE_NAME}.plist")
        text = launchd_agent(app.environ, app.paths.log_file)
        domain = f"gui/{os.getuid()}"
        install = [["launchctl", "bootstrap", domain, path]]
        remove = [["launchctl", "bootout", f"{domain}/{SERVICE_NAME}"]]
        return ServiceManager(path, text, install, remove, "It starts whenever you log in.")
    control, unit = ("systemctl", "--user"), f"{SERVICE_NAME}.service"
    path = os.path.join(os.path.dirname(app.paths.config_dir), "systemd", "user", unit)
    install = [[*control, "daemon-reload"], [*control, "enable", "--now", unit]]
    remove = [[*control, "disable", "--now", unit]]
    hint = "So that it starts before you log in: loginctl enable-linger"
    return ServiceManager(path, systemd_unit(app.environ), install, remove, hint)


def run_manager(commands: list[list[str]]) -> None:
    """Raises ProgramError with the command's standard error."""
    for command in commands:
        with os_error_as(f"{command[0]} cannot be run"):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = redact(result.stderr.strip(), MAX_ERROR_TEXT)
            raise ProgramError(f"{' '.join(command)} failed: {reason or result.returncode}")


@verb("service install", "make it run at login, and start it", MANAGER_ARGUMENT)
def cmd_service_install(app: App) -> None:
    manager = find_manager(app)
    if is_locked(app.paths.pid_file):
        raise ProgramError("aiclient-api is already running; run `aiclient-api stop` first")
    if shutil.which(manager.install[0][0]) is None:
        raise ProgramError(f"there is no {manager.install[0][0]} here; see: service print")
    with os_error_as(f"{manager.path}: cannot be written"):
        path = os.path.realpath(manager.path)  # people link to where they keep such files
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, os.fsencode(manager.text))
    run_manager(manager.install)
    tell(f"installed {manager.path}", manager.hint)


@verb("service uninstall", "stop it and remove its file", MANAGER_ARGUMENT)
def cmd_service_uninstall(app: App) -> None:
    manager = find_manager(app)
    if not os.path.lexists(manager.path):
        raise ProgramError(f"{manager.path} does not exist: nothing is installed")
    run_manager(manager.remove)
    with os_error_as(f"{manager.path}: cannot be removed"):
        os.unlink(manager.path)
    tell(f"removed {manager.path}")


@verb("service print", "print its file, and where it would go", MANAGER_ARGUMENT)
def cmd_service_print(app: App) -> None:
    manager = find_manager(app)
    print(f"# {one_line(manager.path)}", file=sys.stderr)
    print(manager.text, end="")


# 20.8 completion

BASH_COMPLETION = """\
_aiclient_api() {
    local word path=""
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case " @GROUPS@ " in
            *" $path$word "*) path="$path$word/" ;;
        esac
    done
    case "$path" in
@CASES@
    esac
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _aiclient_api aiclient-api
"""


def completion_words() -> dict[str, dict[str, str]]:
    """The path of a verb, like `config/set/` -> the words that may follow it -> their help."""
    words = {"": {"--version": "show the version", **GROUPS}}
    for item in VERBS:
        group, _, name = item.words.rpartition(" ")
        path = f"{group}/" if group else ""
        words.setdefault(path, {})[name] = item.summary
        options = words[f"{path}{name}/"] = {"--help": "explain it"}
        for names, settings in item.arguments:
            if "--" in names:
                options[names.split()[-1]] = settings["help"]
    return words


def write_bash(words: dict[str, dict[str, str]]) -> str:
    groups = " ".join(path.rstrip("/") for path in words if path)
    cases = [f'        "{path}") local words="{" ".join(words[path])}" ;;' for path in words]
    return BASH_COMPLETION.replace("@GROUPS@", groups).replace("@CASES@", "\n".join(cases))


def write_fish(words: dict[str, dict[str, str]]) -> str:
    lines = ["complete -c aiclient-api -f"]
    for path, choices in words.items():
        steps = [f"__fish_seen_subcommand_from {step}" for step in path.split("/")[:-1]]
        condition = "; and ".join(steps) or "__fish_use_subcommand"
        for word, text in choices.items():
            name = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            text = text.replace("'", "\\'")
            lines.append(f"complete -c aiclient-api -n '{condition}' {name} -d '{text}'")
    return "\n".join(lines) + "\n"


@verb(
    "completion",
    "print a shell's completion of verbs and flags",
    argument("shell", "bash, fish or zsh", choices=("bash", "fish", "zsh")),
    example="completion bash > ~/.local/share/bash-completion/completions/aiclient-api",
)
def cmd_completion(app: App) -> None:
    words = completion_words()
    if app.options.shell == "zsh":
        print("autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit")
    print(write_fish(words) if app.options.shell == "fish" else write_bash(words), end="")


# 20.9 doctor

Finding = tuple[str, str, str]  # state: ok, note or fault; text; hint: what to do or to type


class DatedClient(HttpClient):
    """Compares this machine's clock with that of each host that responds."""

    skew_s = 0.0  #: the largest

    async def exchange(
        self, connection: PooledConnection, method: str, message: bytes, limit_s: float
    ) -> UpstreamResponse | None:
        response = await super().exchange(connection, method, message, limit_s)
        with contextlib.suppress(TypeError, ValueError):
            date = response.headers.get("date", "") if response else ""
            skew_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
            self.skew_s = max(self.skew_s, skew_s, key=abs)
        return response


def check_program() -> Iterator[Finding]:
    yield "ok", f"{__version__}, Python {sys.version.split()[0]}, {system_tag()}", ""
    oldest, now = min(BUILT_IN_FACTS.values()), time.gmtime()
    months = (now.tm_year - int(oldest[:4])) * 12 + now.tm_mon - int(oldest[5:])
    state, hint = ("note", "update this program") if months > MAX_FACTS_MONTHS else ("ok", "")
    yield state, f"what is built in about models and versions is {months} months old", hint


def check_folders(paths: Paths) -> Iterator[Finding]:
    for folder in (paths.config_dir, paths.state_dir):
        try:
            check_folder(folder)
            text = f"{folder}: mode {os.stat(folder).st_mode & 0o7777:04o}"
            is_writable = os.access(folder, os.W_OK)
            yield ("ok", text, "") if is_writable else ("note", f"{text}, not writable", "")
        except FileNotFoundError:
            yield "ok", f"{folder}: will be created", ""
        except OSError as error:
            reason, _, hint = str(error.strerror).partition("; ")
            yield "fault", f"{folder}: {reason}", hint or "correct its owner or its mode"


def check_port(server: ServerConfig) -> Finding:
    try:
        for listener in open_listeners(server.host, server.port):
            listener.close()
    except OSError as error:
        text = f"port {server.port} cannot be used: {error.strerror}"
        return "fault", text, f"type: {program_command()} config set server.port PORT"
    text = f"not running; port {server.port} is free"
    return "note", text, f"type: {program_command()} start"


def check_gateway(status: Json) -> Finding:
    hint = f"type: {program_command()} restart"
    if not ask_health(status["url"]):
        return "fault", f"{status['url']} does not respond", hint
    text = f"{status['version']} is {status['state']} at {status['url']}"
    return ("ok", text, "") if status["version"] == __version__ else ("note", text, hint)


def upstream_urls(provider: AccountProvider[Any]) -> list[str]:
    """Of the hosts that it contacts; none without a sign-in."""
    config = provider.config
    try:
        token: Any = provider.account.load()
    except NotSignedIn:
        return []
    if isinstance(config, CopilotConfig):
        return [config.github_api_url, *([token.api_url] if token else [])]
    urls = [kiro_endpoints(token, config)[0].url, kiro_control_urls(token, config)[0]]
    return urls if token.kind == "api_key" else [*urls, kiro_refresh(token, config)[0]]


async def check_host(client: HttpClient, origin: Origin) -> str:
    started_at = time.monotonic()
    (await client.connect(origin)).transport.abort()
    return f"connected in {(time.monotonic() - started_at) * 1000:.0f} ms"


async def check_account(provider: AccountProvider[Any]) -> str:
    with advising(provider):
        models, quota = await provider.models(), await provider.quota()
    return f"plan {(quota and quota.plan) or 'unknown'}, {len(models)} models"


async def check(subject: str, work: Awaitable[str], failure: str = "fault") -> Finding:
    """What `work` returns is well; `failure` is the state if it fails."""
    try:
        return "ok", f"{subject}: {await asyncio.wait_for(work, DOCTOR_SECONDS)}", ""
    except TimeoutError:
        message, hint = f"no response within {DOCTOR_SECONDS:g} s", ""
    except ApiError as error:
        message, hint = error.message, error.hint
    return failure, f"{subject}: {message}", hint or "check the network, or set network.proxy"


async def check_network(
    client: DatedClient, accounts: list[AccountProvider[Any]]
) -> tuple[list[Finding], list[Finding]]:
    """Hosts and accounts, all at once.  To have no sign-in is a fault only if none has any."""
    urls = [url for provider in accounts for url in upstream_urls(provider)]
    origins = dict.fromkeys(client.plan(url)[0] for url in urls)
    work = [check(origin.host, check_host(client, origin)) for origin in origins]
    unused = [p for p in accounts if not file_identity(p.account.file.path)]
    for provider in accounts:
        failure = "note" if provider in unused and unused != accounts else "fault"
        work.append(check(provider.name, check_account(provider), failure))
    found = await asyncio.gather(*work)
    if abs(client.skew_s) > MAX_SKEW_SECONDS:
        text = f"this machine's clock is {client.skew_s:+.0f} s from that of a service"
        found.append(("fault", text, "set the clock: the lifetime of tokens depends on it"))
    return found[: len(origins)], found[len(origins) :]


# Where clients name their server; see `login_paths`.
CLIENTS = {
    "$ANTHROPIC_BASE_URL": "Claude Code", "HOME/.claude/settings.json": "Claude Code",
    "$CODEX_HOME/config.toml": "Codex", "HOME/.codex/config.toml": "Codex",
    "CONFIG/opencode/opencode.json": "opencode", "CONFIG/opencode/opencode.jsonc": "opencode",
    "$OPENAI_BASE_URL": "OpenAI's libraries",
}  # fmt: skip
LOOPBACK_PORT = re.compile(r"https?://(?:localhost|127\.[\d.]+|\[::1\]):(\d{1,5})", re.IGNORECASE)


def check_clients(port: int) -> Iterator[Finding]:
    for pattern, client in CLIENTS.items():
        for text in login_paths(pattern):
            where = pattern if "://" in text else text
            with contextlib.suppress(OSError, ProgramError), open_log(text) as file:
                text = file.read(MIB)
            ports = set(map(int, LOOPBACK_PORT.findall(text)))
            if port in ports:
                yield "ok", f"{client} points here: {where}", ""
            elif ports:
                hint = f"the gateway's port is {port}"
                yield "note", f"{client} points to port {min(ports)}: {where}", hint


def anonymous(text: str, users: list[str]) -> str:
    """Without what must not be in a bug report: tokens, e-mail addresses, names of users."""
    home = user_folder({}, "", "").rstrip("/")
    text = redact(text, MAX_ERROR_TEXT).replace(home or "~", "~")
    text = re.sub(r"/(?:home|Users)/[^/\s]+", "~", text)
    text = re.sub(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", "(e-mail)", text)
    for user in filter(None, users):
        text = re.sub(rf"(?<!\w){re.escape(user)}(?!\w)", "(user)", text)
    return text


def print_findings(report: Json) -> None:
    print_table({"": "state", "CHECK": "check", "FINDING": "text"}, report["checks"])
    hints = [f"{row['check']}: {row['hint']}" for row in report["checks"] if row["hint"]]
    tell(*dict.fromkeys(hints))


@verb("doctor", "say what is wrong, and what to type", AS_JSON)
def cmd_doctor(app: App) -> int:
    """Checks this machine, the configuration, the network, the accounts and known clients.

    It shows no secrets and no names of users: the output can go into a bug report.
    """

    async def run() -> int:
        config, accounts = Config(), list[AccountProvider[Any]]()
        found: dict[str, Iterable[Finding]] = {
            "program": check_program(), "folders": check_folders(app.paths),
            "settings": [], "gateway": [], "hosts": [], "accounts": [],
        }  # fmt: skip
        try:
            config = app.load_config()
            client = DatedClient(config.network, Ticker())
            providers = make_providers(config, app.paths, client, {}).values()
            accounts = [row for row in providers if isinstance(row, AccountProvider)]
            start_log("error")
            found["hosts"], found["accounts"] = await check_network(client, accounts)
            settings = "ok", f"{app.paths.config_file}, {len(config.origins)} settings", ""
        except ProgramError as error:
            settings = "fault", str(error), "correct it: README.md lists every setting"
        # Never their values, which may contain a password.
        names = filter(os.environ.get, (*PROXY_VARIABLES, "no_proxy", "NO_PROXY"))
        proxy = "network.proxy" if config.network.proxy else ", ".join(names)
        found["settings"] = [settings, ("ok", f"proxy: {proxy or 'none'}", "")]
        port = config.server.port
        try:
            status = app.ask("status", seconds=DOCTOR_SECONDS / 3)
            port = split_url(status["url"])[2]
            found["gateway"] = [check_gateway(status)]
        except NotRunning:
            found["gateway"] = [check_port(config.server)]
        except ProgramError as error:
            found["gateway"] = [("fault", str(error), f"type: {program_command()} stop")]
        found["clients"] = check_clients(port)
        users = [provider.account.file.user for provider in accounts]
        checks = []
        for name, findings in found.items():
            for state, *texts in findings:
                text, hint = (anonymous(text, users) for text in texts)
                checks.append({"check": name, "state": state, "text": text, "hint": hint})
        is_healthy = all(row["state"] != "fault" for row in checks)
        app.show({"healthy": is_healthy, "checks": checks}, print_findings)
        sys.stdout.flush()
        closing = (provider.wait_closed() for provider in accounts)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closing), DOCTOR_SECONDS / 4)
        os._exit(not is_healthy)  # a name lookup that hangs would delay the end

    return run_in_loop(run())


# 20.10 the program


def print_version() -> None:
    """Also the path and the file's own SHA-256: a copied file can be checked."""
    digest = hashlib.sha256(read_program()).hexdigest()
    python = f"Python {sys.version.split()[0]}"
    tell(f"aiclient-api {__version__}", python, program_file(), f"sha256 {digest}")


@verb("help", "explain a verb", argument("verb", "VERB, or all", nargs="*"), example="help start")
def cmd_help(app: App) -> None:
    make_parser().parse_args([*app.options.verb, "--help"])


# What people type out of habit -> the verb here.
SYNONYMS = {
    "login": "auth copilot, auth kiro or auth import", "logout": "auth revoke", "serve": "start",
    "run": "start", "up": "start", "down": "stop", "ls": "models", "ps": "status",
    "version": "--version",
}  # fmt: skip


def parser_class() -> type[argparse.ArgumentParser]:
    """Made on first use, as argparse is imported lazily."""

    class Parser(argparse.ArgumentParser):
        """No abbreviations; suggests what was meant; an error is a WrongUsage."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(allow_abbrev=False, **settings)

        def parse_known_args(  # type: ignore[override]
            self, args: Any = None, namespace: Any = None
        ) -> tuple[argparse.Namespace, list[str]]:
            found, unknown = super().parse_known_args(args, namespace)
            if unknown:
                flags = [name for action in self._actions for name in action.option_strings]
                name = unknown[0].partition("=")[0]  # without its value, which may be a password
                self.error(f"unrecognized arguments: {name}; {suggest(name, flags)}")
            return found, unknown

        def _check_value(self, action: argparse.Action, value: Any) -> None:
            if action.choices is None or value in action.choices:
                return
            hint = suggest(str(value), action.choices)
            if action.dest != "verb":
                raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")
            if " " not in self.prog:  # not the second word of a verb
                elsewhere = [item.words for item in VERBS if item.words.endswith(f" {value}")]
                known = SYNONYMS.get(value) or " or ".join(elsewhere)
                hint = f"did you mean {known}?" if known else hint
            self.error(f"{value}: no such verb; {hint}")

        def error(self, message: str) -> Any:
            self.color = False  # of Python 3.14
            raise WrongUsage(message, *self.format_usage().splitlines())

    return Parser


def make_parser() -> argparse.ArgumentParser:
    parser = parser_class()(
        prog="aiclient-api",
        description="A local gateway: GitHub Copilot and Kiro as the OpenAI and Anthropic API.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 the gateway is not running.",
    )
    parser.add_argument("-V", "--version", action="store_true", help="version, path and SHA-256")
    parser.set_defaults(run=None, help_of=parser)
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")
    groups = {}
    for item in VERBS:
        group, _, name = item.words.rpartition(" ")
        if group and group not in groups:
            owner = verbs.add_parser(group, help=GROUPS[group])
            owner.set_defaults(help_of=owner)
            groups[group] = owner.add_subparsers(metavar="VERB", dest="verb")
        epilog = f"example: {program_command()} {item.example}"
        description = item.run.__doc__ or f"{item.summary[0].upper()}{item.summary[1:]}."
        subparser = groups.get(group, verbs).add_parser(
            name, help=item.summary, description=description, epilog=epilog
        )
        for names, settings in item.arguments:
            subparser.add_argument(*names.split(), **settings)
        subparser.set_defaults(run=item.run)
    return parser


def open_standard_streams() -> None:
    """Opens those that were closed: a socket must not become what others take for their input.

    What the terminal has no letters for is shown as escapes.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8"))
    if sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 3 the gateway is not running."""
    open_standard_streams()
    os.umask(0o077)  # for every file it creates
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = make_parser().parse_args(words)
        if options.version:
            print_version()
            return 0
        if options.run is None:
            options.help_of.print_help()
            return 2
        status: int = options.run(App(options)) or 0
        sys.stdout.flush()
        return status
    except ProgramError as error:
        lines = (f"aiclient-api: {mask_arguments(str(error), words)}", *error.log)
        print("\n".join(map(one_line, lines)), file=sys.stderr)
        return error.exit_status
    except OSError as error:
        # What was not written yet cannot be: `| head` has seen enough, or the disk is full.
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)  # the lowest free descriptor: this one
        if not isinstance(error, BrokenPipeError):
            print(one_line(f"aiclient-api: {system_message(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
