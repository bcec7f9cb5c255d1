"""Section 4: TOML tables as dataclasses; every error is `where: key: what is wrong`."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from aiclient_api import (
    CapConfig,
    Config,
    ConfigError,
    CopilotConfig,
    EchoConfig,
    apply_environment,
    apply_flags,
    check_exposure,
    describe_settings,
    is_loopback,
    iter_settings,
    load_config_text,
    read_config_text,
)

WHERE = "/home/u/config.toml"
SEED = 20261122
# The table of design.md 4.2, as far as this version has it.
FULL = """
default_format   = "openai"
default_provider = "copilot"
api_key          = ""
[server]
host = "127.0.0.1"
port = 9090
rate_limit_seconds = 0
allowed_hosts = []
cors_origins = []
max_body_mib = 32
max_connections = 1024
head_seconds = 10
body_seconds = 60
idle_seconds = 75
drain_seconds = 30
[network]
proxy = ""
ca_file = ""
connect_seconds = 10
first_byte_seconds = 120
stream_idle_seconds = 300
[providers.copilot]
type = "copilot"
enabled = true
account_type = "individual"
github_url = "https://github.com"
github_api_url = "https://api.github.com"
api_url = ""
[providers.echo]
type = "echo"
enabled = true
[models]
[logging]
level = "info"
"""


def read(text: str) -> Config:
    """The configuration in `text`."""
    return read_config_text(text, WHERE)


def problem(text: str) -> tuple[str, str]:
    """(key, what is wrong) of a refused file, whose words must have the one form."""
    with pytest.raises(ConfigError) as caught:
        read(text)
    where, key, words = str(caught.value).split(": ", 2)
    assert where == WHERE and words and "\n" not in words
    return key, words


def test_the_documented_file_is_what_no_file_means() -> None:
    """design.md 4.2 shows every default."""
    assert read(FULL) == Config() == read("")


def test_values_of_a_file_are_taken() -> None:
    """Whole numbers are welcome where fractions are allowed."""
    config = read('api_key = "k"\n[server]\nport = 1\nhead_seconds = 3\n[models]\n"a.b" = "echo/x"')
    assert (config.api_key, config.server.port) == ("k", 1)
    assert config.server.head_seconds == 3.0 and isinstance(config.server.head_seconds, float)
    assert config.models == {"a.b": "echo/x"}


def test_several_accounts_are_several_tables() -> None:
    """Provider names are free, and the built-in ones stay."""
    config = read('[providers.work]\ntype = "copilot"\naccount_type = "business"')
    work = config.providers["work"]
    assert isinstance(work, CopilotConfig) and work.account_type == "business"
    assert list(config.providers) == ["copilot", "kiro", "echo", "work"]


def test_a_built_in_provider_needs_no_type() -> None:
    """Its name says it."""
    config = read("[providers.echo]\nenabled = false")
    assert config.providers["echo"] == EchoConfig(enabled=False)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ('default_formt = "x"', "default_formt", "default_format"),
        ("[server]\nprot = 1", "server.prot", "port"),
        ("[server]\nPort = 1", "server.Port", "port"),
        ("[network]\nproxi = 1", "network.proxi", "proxy"),
        ("[providers.copilot]\nenable = true", "providers.copilot.enable", "enabled"),
        ("[providers.echo]\ntipe = true", "providers.echo.tipe", "type"),
        ("[loging]\nlevel = 1", "loging", "logging"),
        ("[logging]\nlvel = 1", "logging.lvel", "level"),
        ("sever = 1", "sever", "server"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, key: str, near: str) -> None:
    """design.md 4.2."""
    named, words = problem(text)
    assert named == key
    assert words == f"is not a known key; did you mean {near!r}?"


def test_an_unknown_key_like_none_is_told_what_there_is() -> None:
    """A wild guess gets the list."""
    key, words = problem("[logging]\nzzzzz = 1")
    assert key == "logging.zzzzz" and "level" in words


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("[server]\nport = '9090'", "server.port", "must be an integer"),
        ("[server]\nport = 90.5", "server.port", "must be an integer"),
        ("[server]\nport = true", "server.port", "must be an integer"),
        ("[server]\nport = 65536", "server.port", "must be between 0 and 65535"),
        ("[server]\nport = -1", "server.port", "must be between 0 and 65535"),
        ("[server]\nhead_seconds = nan", "server.head_seconds", "must be between"),
        ("[server]\nhead_seconds = inf", "server.head_seconds", "must be between"),
        ("[server]\nhead_seconds = 0", "server.head_seconds", "must be between"),
        ("[server]\nhead_seconds = false", "server.head_seconds", "must be a number"),
        ("[server]\nallowed_hosts = 'a'", "server.allowed_hosts", "must be a list of strings"),
        ("[server]\nallowed_hosts = [1]", "server.allowed_hosts", "must be a list of strings"),
        ("[server]\nhost = 1", "server.host", "must be a string"),
        ('[server]\nhost = "a\\nb"', "server.host", "must not contain control characters"),
        ("server = 1", "server", "must be a table"),
        ("providers = 1", "providers", "must be a table"),
        ("models = []", "models", "must be a table"),
        ("[providers]\ncopilot = 1", "providers.copilot", "must be a table"),
        ("[providers.copilot]\nenabled = 1", "providers.copilot.enabled", "must be true or false"),
        ("[providers.x]\nenabled = true", "providers.x.type", "must be one of copilot, echo"),
        ("[providers.x]\ntype = 1", "providers.x.type", "must be one of copilot, echo"),
        ("[providers.x]\ntype = 'gpt'", "providers.x.type", "must be one of copilot, echo"),
        ('[providers."a/b"]\ntype = "echo"', "providers.a/b", "a name is letters"),
        ('[providers.".."]\ntype = "echo"', "providers...", "a name is letters"),
        ("default_format = 'x'", "default_format", "must be one of openai, anthropic"),
        ("default_provider = 'x'", "default_provider", "no such provider"),
        ("[logging]\nlevel = 'loud'", "logging.level", "must be one of debug"),
        ("[models]\na = 1", 'models."a"', "must be like"),
        ("[models]\na = ''", 'models."a"', "must be like"),
        ("[models]\na = '/'", 'models."a"', "must be like"),
        ("[limits]\nrunaway_requests = -1", "limits.runaway_requests", "must be between"),
        ("[limits]\nproviders = 1", "limits.providers", "must be a table"),
        ("[limits.providers]\ncopilot = 1", "limits.providers.copilot", "must be a table"),
        ("[limits.providers.x]\ndaily_tokens = 1", "limits.providers.x", "no such provider"),
        (
            "[limits.labels.x]\ndaily_tokens = 1.5",
            "limits.labels.x.daily_tokens",
            "must be an integer",
        ),
        (
            "[limits.labels.x]\nmonthly_credits = -1",
            "limits.labels.x.monthly_credits",
            "must be between",
        ),
        ('[limits.labels."a b"]', "limits.labels.a b", "a name is letters"),
        ("[api_keys]\na = 1", "api_keys.a", "must be a key"),
        ("[api_keys]\na = ' '", "api_keys.a", "must be a key"),
        ('[api_keys]\n"a b" = "x"', "api_keys.a b", "a name is letters"),
        ("[api_keys]\na = 'x'\nb = 'x'", "api_keys.a", "has the same value as another key"),
    ],
)
def test_a_wrong_value_is_told_by_its_key(text: str, key: str, words: str) -> None:
    """`where: key: what is wrong`."""
    named, said = problem(text)
    assert named == key and said.startswith(words)


@pytest.mark.parametrize(
    "url",
    [
        "http://github.com",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.1:80",
        "ftp://host",
        "github.com",
        "https://",
        "https://[::1",
        "https://host:99999",
        "https://host:port",
        "https://user:pw@host",
        "https://:pw@host",
        "https://user@host",
        "https://host?q=1",
        "https://host/#f",
        "https://ho st",
        "javascript:alert(1)",
    ],
)
@pytest.mark.parametrize("key", ["github_url", "github_api_url", "api_url"])
def test_an_upstream_url_must_be_safe(key: str, url: str) -> None:
    """Plain http is for loopback only, and an account never stands in a URL."""
    named, words = problem(f'[providers.copilot]\n{key} = "{url}"')
    assert named == f"providers.copilot.{key}"
    assert "pw" not in words


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8", "http://localhost", "http://[::1]:8", "https://t.ghe.com"]
)
def test_loopback_and_https_urls_are_taken(url: str) -> None:
    """For tests and for data residency."""
    provider = read(f'[providers.copilot]\ngithub_api_url = "{url}"').providers["copilot"]
    assert isinstance(provider, CopilotConfig) and provider.github_api_url == url


@pytest.mark.parametrize(
    ("proxy", "good"),
    [
        ("http://proxy:3128", True),
        ("http://user:pw@proxy:3128", True),
        ("https://proxy", True),
        ("socks5://proxy:1", False),
        ("proxy:3128", False),
        ("http://user:hunter2@proxy:port", False),
        ("http://", False),
    ],
)
def test_a_proxy_is_checked_and_never_repeated(proxy: str, good: bool) -> None:
    """It may hold a password."""
    text = f'[network]\nproxy = "{proxy}"'
    if good:
        assert read(text).network.proxy == proxy
    else:
        key, words = problem(text)
        assert key == "network.proxy" and "hunter2" not in words


def test_toml_that_is_none_is_told_with_its_place() -> None:
    """The parser knows the line."""
    with pytest.raises(ConfigError, match=rf"^{WHERE}: is not valid TOML: .*line 2"):
        read('api_key = "a"\n[server\n')


def test_no_text_is_more_than_a_config_error() -> None:
    """Seeded mutations of the full file, and a few hostile ones."""
    rng = random.Random(SEED)
    letters = list('"[]{}=.,#\n\t\x00\u2028é0x_-')
    texts = ["a = " + "[" * 5000, "a = " + "{a=" * 5000, "[" + "a." * 5000 + "a]", "\ufeff"]
    for _ in range(400):
        at = rng.randrange(len(FULL))
        texts.append(FULL[:at] + rng.choice(letters) + FULL[at + rng.randint(0, 3) :])
    for text in texts:
        try:
            read(text)
        except ConfigError as error:
            assert str(error).startswith(f"{WHERE}: ")


# ---- precedence --------------------------------------------------------------------------------


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults() -> None:
    """design.md 4.2, and a flag that was not given overrides nothing."""
    config = read("[server]\nport = 1\nidle_seconds = 5\nmax_body_mib = 9")
    apply_environment(
        config, {"AICLIENT_API_SERVER_PORT": "2", "AICLIENT_API_SERVER_IDLE_SECONDS": "6"}
    )
    apply_flags(config, {"server.port": "3", "server.host": None, "api_key": None})
    server = config.server
    assert (server.port, server.idle_seconds, server.max_body_mib) == (3, 6.0, 9)
    assert (server.host, server.head_seconds, config.api_key) == ("127.0.0.1", 10.0, "")


def test_every_setting_can_be_given_in_the_environment() -> None:
    """One rule for all of them: dots become underscores."""
    examples = {"str": "x", "int": "7", "float": "7.5", "bool": "false", "list[str]": "a, b"}
    choices = {"default_format": "anthropic", "account_type": "business", "level": "debug"}
    choices["region"] = "eu-central-1"
    choices["profile_arn"] = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLE"
    for key, _, item in iter_settings(Config()):
        example = "https://h" if item.name.endswith("_url") else examples[str(item.type)]
        text = choices.get(item.name, example)
        if item.name == "proxy":
            text = "http://p:1"
        config = Config()
        apply_environment(config, {"AICLIENT_API_" + key.upper().replace(".", "_"): text})
        assert config != Config(), key


def test_short_variables_stand_for_long_ones() -> None:
    """HOST, PORT and KEY; variables of other programs do not count."""
    config = Config()
    short = {"HOST": "::1", "PORT": "8", "KEY": "k"}
    environ = {f"AICLIENT_API_{name}": value for name, value in short.items()}
    apply_environment(config, {**environ, "PORT": "9", "AICLIENT_PORT": "9"})
    assert (config.server.host, config.server.port, config.api_key) == ("::1", 8, "k")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("YES", True), ("1", True), ("false", False), ("0", False), (" no ", False)],
)
def test_a_switch_in_the_environment_has_six_words(text: str, expected: bool) -> None:
    """Everything else is refused, not guessed."""
    config = Config()
    apply_environment(config, {"AICLIENT_API_PROVIDERS_ECHO_ENABLED": text})
    assert config.providers["echo"].enabled is expected


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SERVER_PORT", "x", "must be an integer"),
        ("SERVER_PORT", "70000", "must be between 0 and 65535"),
        ("PORT", "x", "must be an integer"),
        ("SERVER_HEAD_SECONDS", "nan", "must be between"),
        ("PROVIDERS_ECHO_ENABLED", "maybe", "must be true or false"),
        ("LOGGING_LEVEL", "loud", "must be one of"),
        ("PROVIDERS_COPILOT_API_URL", "http://evil.example", "plain http"),
        ("SERVER_PROT", "1", "is not a known key; did you mean"),
    ],
)
def test_a_wrong_variable_is_told_by_its_name(variable: str, value: str, words: str) -> None:
    """The same form, with `environment` for the file."""
    with pytest.raises(ConfigError) as caught:
        apply_environment(Config(), {f"AICLIENT_API_{variable}": value})
    where, key, said = str(caught.value).split(": ", 2)
    assert (where, key) == ("environment", f"AICLIENT_API_{variable}")
    assert said.startswith(words)


def test_a_wrong_flag_is_told_by_its_name() -> None:
    """The same form, with `command line` for the file."""
    with pytest.raises(ConfigError, match=r"^command line: --port: must be an integer$"):
        apply_flags(Config(), {"server.port": "x"})


BLANKS = ["", " ", "  \t", "\n"]


@pytest.mark.parametrize("blank", BLANKS)
def test_an_empty_variable_is_one_that_is_not_set(blank: str) -> None:
    """Compose files pass `VARIABLE=` for what the host does not set; of every type."""
    text = 'api_key = "k"\n[server]\nhost = "::1"\nport = 1\nallowed_hosts = ["a"]'
    config, keys = read(text), [key for key, _, _ in iter_settings(Config())]
    names = [key.upper().replace(".", "_") for key in keys]
    environ = {f"AICLIENT_API_{name}": blank for name in (*names, "HOST", "PORT", "KEY", "X")}
    assert apply_environment(config, environ) == []
    apply_flags(config, dict.fromkeys(keys, blank))
    assert config == read(text) and config.origins == read(text).origins


def test_an_empty_short_variable_does_not_hide_the_long_one() -> None:
    """Nor the other way round."""
    for names in (("HOST", "SERVER_HOST"), ("SERVER_HOST", "HOST")):
        config = Config()
        values = zip(names, ("", "::1"), strict=True)
        apply_environment(config, {f"AICLIENT_API_{name}": value for name, value in values})
        assert config.server.host == "::1"


@pytest.mark.parametrize("blank", BLANKS[:2])
def test_an_empty_value_in_the_file_is_the_default(blank: str) -> None:
    """Templates leave them: never all addresses, and never a key that nobody can send."""
    keys = [key for key, _, item in iter_settings(Config()) if str(item.type) != "list[str]"]
    for key in keys:
        table, _, name = key.rpartition(".")
        config = read(f"[{table}]\n{name} = '{blank}'" if table else f"{name} = '{blank}'")
        assert config == Config(), key
    assert read("[providers.kiro]\ntype = ''") == Config()


def test_blanks_around_a_value_are_none_of_it() -> None:
    """A header cannot carry them."""
    config = Config()
    short = {"HOST": " ::1 ", "PORT": " 8 ", "KEY": " k "}
    apply_environment(config, {f"AICLIENT_API_{name}": text for name, text in short.items()})
    assert (config.server.host, config.server.port, config.api_key) == ("::1", 8, "k")
    assert read('api_key = " k "').api_key == "k"


@pytest.mark.parametrize("service", ["", "WEB_", "SERVER_", "1_"])
def test_the_variables_of_a_service_are_passed_over(service: str) -> None:
    """A Service, or a Docker link, called `aiclient-api` or `aiclient-api-web`."""
    family = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "9090",
        "SERVICE_PORT_HTTP": "9090",
        "PORT": "tcp://10.0.0.1:9090",
        "PORT_9090_TCP": "tcp://10.0.0.1:9090",
        "PORT_9090_TCP_PROTO": "tcp",
        "PORT_9090_TCP_PORT": "9090",
        "PORT_9090_TCP_ADDR": "10.0.0.1",
        "PORT_53_UDP": "udp://10.0.0.1:53",
        "NAME": "/web/aiclient-api",
        "ENV_PATH": "/bin",
    }
    environ = {f"AICLIENT_API_{service}{name}": value for name, value in family.items()}
    config = Config()
    assert apply_environment(config, environ) == sorted(environ)
    assert config == Config() and not config.origins


@pytest.mark.parametrize("name", ["SERVICE", "SERVICE_HOSTS", "PORTS", "PORT_NUMBER", "NAME"])
def test_what_only_looks_like_a_service_is_refused(name: str) -> None:
    """A misspelt setting must not be passed over."""
    with pytest.raises(ConfigError, match="is not a known key"):
        apply_environment(Config(), {f"AICLIENT_API_{name}": "x"})


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1:9999", "the port goes into server.port"),
        ("localhost:80", "the port goes into server.port"),
        ("[::1]:9999", "the port goes into server.port"),
        ("0.0.0.0:9999", "the port goes into server.port"),
        ("http://127.0.0.1", "not a URL"),
        ("https://gateway.example:9090/v1", "not a URL"),
        ("127.0.0.1/v1", "a host name or an IP address"),
        ("*", "a host name or an IP address"),
        ("a b", "a host name or an IP address"),
    ],
)
def test_a_host_that_is_more_than_a_host_is_told(host: str, words: str) -> None:
    """In the file, a variable and a flag; a key does not make it right."""
    key, said = problem(f'api_key = "k"\n[server]\nhost = "{host}"')
    assert key == "server.host" and words in said
    with pytest.raises(ConfigError, match=f"AICLIENT_API_HOST: .*{words}"):
        apply_environment(Config(), {"AICLIENT_API_HOST": host})
    with pytest.raises(ConfigError, match=f"--host: .*{words}"):
        apply_flags(Config(), {"server.host": host})


@pytest.mark.parametrize(
    ("host", "expected"),
    [("[::1]", "::1"), ("[::]", "::"), ("fe80::1%eth0", "fe80::1%eth0"), ("a-b.c.", "a-b.c.")],
)
def test_a_host_may_be_written_with_brackets(host: str, expected: str) -> None:
    """As in URLs."""
    assert read(f'[server]\nhost = "{host}"').server.host == expected


@pytest.mark.parametrize("level", ["warn", "WARN", "Warning", "warning"])
def test_a_level_may_be_written_as_other_programs_do(level: str) -> None:
    """One word in any case; `warn` is short for it."""
    assert read(f'[logging]\nlevel = "{level}"').logging.level == "warning"


def test_a_number_in_the_environment_may_be_long() -> None:
    """Python refuses to read more than 4300 digits: that is an error of the same form."""
    with pytest.raises(ConfigError, match=r"^environment: AICLIENT_API_PORT: "):
        apply_environment(Config(), {"AICLIENT_API_PORT": "9" * 5000})


# ---- secrets and exposure ----------------------------------------------------------------------

SECRET = "hunter2-hunter2"


def shown_by(config: Config) -> str:
    """What a log line or a traceback would show of a configuration."""
    return f"{config!r} {config} {config.server!r} {config.network!r} {config.providers!r}"


def test_the_key_is_not_shown() -> None:
    """`repr` ends up in logs."""
    assert SECRET not in shown_by(read(f'api_key = "{SECRET}"'))


def test_named_keys_are_not_shown() -> None:
    """Neither by `repr` nor by `config show`."""
    config = read(f'[api_keys]\nlaptop = "{SECRET}"')
    assert SECRET not in shown_by(config)
    rows = {row["key"]: row for row in describe_settings(config)}
    assert rows["api_keys.laptop"]["value"] == "(set, not shown)"
    assert rows["api_keys.laptop"]["origin"] == "file"


def test_a_named_key_is_enough_beyond_loopback() -> None:
    """It is asked for as well."""
    config = read('[server]\nhost = "0.0.0.0"\n[api_keys]\na = "x"')
    check_exposure(config)


def test_limits_are_read() -> None:
    """A cap that is not named is none."""
    config = read("[limits.providers.copilot]\ndaily_credits = 5\n[limits.labels.ci]\n")
    assert config.limits.providers == {"copilot": CapConfig(daily_credits=5.0)}
    assert config.limits.labels == {"ci": CapConfig()}
    assert config.limits.runaway_requests > 0


def test_the_password_of_a_proxy_is_not_shown() -> None:
    """The proxy URL holds one as often as not."""
    assert SECRET not in shown_by(read(f'[network]\nproxy = "http://user:{SECRET}@proxy:1"'))


@pytest.mark.parametrize(
    "text",
    [
        'api_key = "{}\\n"',
        'api_key = ["{}"]',
        'api_key = "{}',
        "api_key = {}",
        'api_key = "{}" "x"',
        'api_key = "x"\napi_key = "{}"',
        '[api_keys]\na = "{}\\n"',
        '[api_keys]\na = "{0}"\nb = "{0}"',
        '[network]\nproxy = "socks5://u:{}@h:1"',
        '[providers.copilot]\napi_url = "https://u:{}@h"',
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    """Neither our words nor the TOML parser's."""
    with pytest.raises(ConfigError) as caught:
        read(text.format(SECRET))
    assert SECRET not in str(caught.value)
    cause: Any = caught.value.__cause__
    assert cause is None


def test_no_error_of_the_environment_repeats_a_secret() -> None:
    """Keys come this way most of all."""
    with pytest.raises(ConfigError) as caught:
        apply_environment(Config(), {"AICLIENT_API_KEY": SECRET + "\n"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"],
)
def test_loopback_needs_no_key(host: str) -> None:
    """Only this machine can come."""
    config = Config()
    config.server.host = host
    check_exposure(config)
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "192.168.1.2", "gateway.example", "127.0.0.1.evil.example"]
)
def test_beyond_loopback_a_key_is_a_must(host: str) -> None:
    """Anyone on the network could spend the subscription."""
    config = Config()
    config.server.host = host
    with pytest.raises(ConfigError, match="api_key"):
        check_exposure(config)
    config.api_key = "k"
    check_exposure(config)


def test_the_refused_exposure_has_the_form_of_every_error() -> None:
    """`where: key: what is wrong`, also where file, environment and flags are merged."""
    config = Config()
    config.server.host = "0.0.0.0"
    with pytest.raises(ConfigError) as caught:
        check_exposure(config)
    assert re.fullmatch(r"[^:]+: server\.host: [^:].*", str(caught.value))


def test_a_blank_key_is_no_key() -> None:
    """`api_key = " "` would let anybody in beyond loopback who sends a blank."""
    config = read('api_key = "  "\n[server]\nhost = "0.0.0.0"')
    with pytest.raises(ConfigError):
        check_exposure(config)


def test_a_byte_order_mark_before_the_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf[server]\r\nport = 7777\r\n")
    text = load_config_text(str(path))
    assert text == "[server]\r\nport = 7777\r\n"
    assert read_config_text(text, str(path)).server.port == 7777
