"""Rules of signing in that need no socket: device codes, callbacks, other programs' files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import aiclient_api as gw

Json = dict[str, Any]
NOW = 1_790_000_000.0
NO_HEADERS = gw.Headers([])


def data(value: Any) -> bytes:
    """JSON as a service sends it."""
    return json.dumps(value).encode()


# ---- device codes --------------------------------------------------------------------------------

GITHUB_CODE: Json = {
    "device_code": "0123456789abcdef", "user_code": "ABCD-1234", "expires_in": 900, "interval": 5,
    "verification_uri": "https://github.com/login/device",
}  # fmt: skip
AWS_CODE: Json = {
    "deviceCode": "dc", "userCode": "ABCD-EFGH", "expiresIn": 600, "interval": 1,
    "verificationUri": "https://device.sso.us-east-1.amazonaws.com/",
    "verificationUriComplete": "https://device.sso.us-east-1.amazonaws.com/?user_code=ABCD-EFGH",
}  # fmt: skip


def test_a_device_code_in_both_spellings() -> None:
    github = gw.read_device_code(GITHUB_CODE, "GitHub")
    assert (github.code, github.user_code) == ("0123456789abcdef", "ABCD-1234")
    assert (github.url, github.url_complete) == ("https://github.com/login/device", "")
    assert (github.expires_in, github.interval) == (900.0, 5.0)
    aws = gw.read_device_code(AWS_CODE, "AWS")
    assert aws.url_complete.endswith("?user_code=ABCD-EFGH")
    assert (aws.expires_in, aws.interval) == (600.0, 1.0)
    assert "0123456789abcdef" not in repr(github)


@pytest.mark.parametrize("odd", [None, 0, -1, 0.5, True, "x", 1e9, float("nan"), [], {}])
def test_times_that_make_no_sense_are_the_usual_ones(odd: Any) -> None:
    code = gw.read_device_code({**GITHUB_CODE, "interval": odd, "expires_in": odd}, "GitHub")
    assert (code.expires_in, code.interval) == (600.0, 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"device_code": ""}, {"device_code": 1}, {"user_code": None}, {"user_code": "A\x1b[2JB"},
        {"verification_uri": "javascript:alert(1)"}, {"verification_uri": "http://evil.example/"},
        {"verification_uri": "https://a b/"}, {"verification_uri": ""},
        {"verification_uri": "https://user:pw@github.com/"},
    ],
)  # fmt: skip
def test_a_device_code_that_cannot_be_shown(change: Json) -> None:
    with pytest.raises(gw.SignInFailed, match="GitHub's response"):
        gw.read_device_code({**GITHUB_CODE, **change}, "GitHub")


STATES = {
    "authorization_pending": "pending", "AuthorizationPendingException": "pending",
    "slow_down": "slow_down", "SlowDownException": "slow_down",
    "expired_token": "expired", "token_expired": "expired", "ExpiredTokenException": "expired",
    "access_denied": "denied", "AccessDeniedException": "denied",
    "incorrect_device_code": "failed", "invalid_grant": "failed", "InvalidGrantException": "failed",
    "incorrect_client_credentials": "failed", "unsupported_grant_type": "failed",
    "device_flow_disabled": "failed", "invalid_client": "failed", "brand_new": "failed",
}  # fmt: skip


@pytest.mark.parametrize(("name", "state"), STATES.items())
def test_a_poll_is_judged_by_its_words(name: str, state: str) -> None:
    answers = [
        (status, NO_HEADERS, data(body))
        for status in (200, 400, 401)
        for body in ({"error": name}, {"__type": name}, {"__type": f"com.amazonaws.sso#{name}"})
    ]
    for value in (name, f"{name}:http://internal.amazon.com/"):
        answers.append((400, gw.Headers([("x-amzn-errortype", value)]), b"{}"))
        answers.append((400, gw.Headers([("x-amzn-errortype", value)]), b""))
    for answer in answers:
        assert gw.classify_poll(*answer).state == state, answer


def test_a_poll_that_nobody_answered_properly() -> None:
    for status in (429, 500, 502, 503):
        for body in (b"", b"<html>Unicorn!</html>", data({"message": "x"})):
            assert gw.classify_poll(status, NO_HEADERS, body).state == "unreachable"
    for body in (b"", b"<html></html>", b"[]", b'{"access_token":1}', b"\xff"):
        assert gw.classify_poll(200, NO_HEADERS, body).state == "failed", body
    # A token in an answer that failed is none.
    assert gw.classify_poll(500, NO_HEADERS, data({"access_token": "ghu_EXAMPLE"})).state != "done"
    for token in ({"access_token": "ghu_EXAMPLE"}, {"accessToken": "aoaEXAMPLE"}):
        assert gw.classify_poll(200, NO_HEADERS, data(token)).state == "done"


def test_words_of_a_failed_poll_show_no_secret() -> None:
    said = {"error": "x", "error_description": "token ghu_EXAMPLE0000000000 " + "long " * 200}
    poll = gw.classify_poll(400, NO_HEADERS, data(said))
    assert "ghu_" not in poll.message
    assert len(poll.message) <= 300


# ---- the way back --------------------------------------------------------------------------------

STATE = "EXAMPLEstate0123456789"


def test_the_portals_url() -> None:
    url = gw.portal_url(STATE, "verifier", 3128)
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.path) == ("https", "app.kiro.dev", "/signin")
    asked = {name: value for name, [value] in parse_qs(parts.query).items()}
    digest = hashlib.sha256(b"verifier").digest()
    proof = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert asked == {
        "state": STATE, "code_challenge": proof, "code_challenge_method": "S256",
        "redirect_uri": "http://localhost:3128", "redirect_from": "KiroIDE",
    }  # fmt: skip
    assert "verifier" not in url


@pytest.mark.parametrize(
    "start", ["http://localhost:3128", "http://127.0.0.1:3128", "", "https://localhost"]
)
@pytest.mark.parametrize("path", ["/oauth/callback", "/signin/callback"])
def test_a_callback_in_every_form(start: str, path: str) -> None:
    back = gw.read_callback(f"{start}{path}?code=c0de&state={STATE}&login_option=github",
                            STATE, "google")  # fmt: skip
    assert (back.code, back.option, back.path) == ("c0de", "github", path)


def test_a_callback_of_an_organisation() -> None:
    query = f"login_option=awsidc&issuer_url=https%3A%2F%2Fx.awsapps.com%2Fstart&idc_region=eu-west-1&state={STATE}"  # noqa: E501 - as it comes
    back = gw.read_callback(f"/signin/callback?{query}", STATE, "google")
    assert (back.option, back.issuer_url, back.region) == (
        "awsidc", "https://x.awsapps.com/start", "eu-west-1",
    )  # fmt: skip


def test_a_bare_code() -> None:
    back = gw.read_callback("EXAMPLEcode0123-_.~", STATE, "google")
    assert (back.code, back.option) == ("EXAMPLEcode0123-_.~", "google")


@pytest.mark.parametrize(
    "url",
    [
        "", "short", "two words", "http://localhost:3128/oauth/callback",
        "http://localhost:3128/oauth/callback?code=c", f"/oauth/callback?state={STATE}",
        "/oauth/callback?code=c&state=wrong", f"/oauth/callback?code=c&state={STATE}x",
        "/oauth/callback?code=c&state=", f"/oauth/callback?code=c&state={STATE[:-1]}",
        "/oauth/callback?error=access_denied&state=wrong", "/oauth/callback?error=access_denied",
        "http://[::1", "http://[broken]/?state=x", f"/oauth/callback?code=&state={STATE}",
        "/oauth/callback?code=c&state=\u00e4", "/oauth/callback?code=c&state=%ff",
    ],
)  # fmt: skip
def test_a_callback_that_is_not_ours(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        gw.read_callback(url, STATE, "google")


def test_a_callback_that_tells_a_refusal() -> None:
    url = f"/oauth/callback?error=access_denied&error_description=You%20said%20no&state={STATE}"
    with pytest.raises(gw.SignInFailed, match="You said no"):
        gw.read_callback(url, STATE, "google")
    with pytest.raises(gw.SignInFailed, match="access_denied"):
        gw.read_callback(f"/oauth/callback?error=access_denied&state={STATE}", STATE, "google")


# ---- what people type ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "host"),
    [
        ("acme.ghe.com", "acme.ghe.com"), ("https://acme.ghe.com/", "acme.ghe.com"),
        ("  HTTPS://Acme.GHE.com/login?x=y ", "acme.ghe.com"), ("github.com", "github.com"),
        ("https://github.com", "github.com"), ("a-b-1.ghe.com", "a-b-1.ghe.com"),
    ],
)  # fmt: skip
def test_a_github_host(typed: str, host: str) -> None:
    assert gw.parse_github_host(typed) == host


@pytest.mark.parametrize(
    "typed",
    ["", "ghe.com", ".ghe.com", "a.b.ghe.com", "evil.com", "acme.ghe.com.evil.com",
     "acme.ghe.com@x",
     "user@acme.ghe.com", "acme.ghe.com:8443", "acme ghe.com", "xghe.com", "\u00e4.ghe.com",
     "acme.ghe.com\n", "api.github.com"],
)  # fmt: skip
def test_a_host_without_copilot(typed: str) -> None:
    if typed.strip() != typed:
        assert gw.parse_github_host(typed) == typed.strip()
        return
    with pytest.raises(gw.WrongUsage):
        gw.parse_github_host(typed)


@pytest.mark.parametrize(
    "given",
    ["T", " T\n", "Bearer T", "bearer  T", "Token T", "token T\r\n", '"T"', "'T'", '"Bearer T"',
     "Bearer 'T'", "Bearer Bearer T"],
)  # fmt: skip
def test_a_pasted_token(given: str) -> None:
    token = "ghu_EXAMPLE00000000"
    if given.count("Bearer") > 1:
        with pytest.raises(gw.SignInFailed):
            gw.clean_token(re.sub(r"T\b", token, given))
        return
    assert gw.clean_token(re.sub(r"T\b", token, given)) == token


@pytest.mark.parametrize(
    "given",
    ["", " ", "Bearer", "Bearer ", "''", "a b", "ghu_EXAMPLE...", "ghu_EXAMPLE\u2026", "ghu_\x00",
     "ghu_\x7f", "gh\u00fc_"],
)  # fmt: skip
def test_what_is_no_token(given: str) -> None:
    with pytest.raises(gw.SignInFailed):
        gw.clean_token(given)


# ---- other programs' files -----------------------------------------------------------------------

SOCIAL: Json = {
    "accessToken": "aoaEXAMPLE", "refreshToken": "aorEXAMPLE", "provider": "Google",
    "profileArn": "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLE",
    "expiresAt": "2026-08-01T12:00:00.000Z", "authMethod": "social",
}  # fmt: skip
IDC: Json = {
    "accessToken": "aoaEXAMPLE", "refreshToken": "aorEXAMPLE", "authMethod": "IdC",
    "expiresAt": "2026-08-01T12:00:00.000Z", "region": "eu-west-1", "provider": "Enterprise",
    "startUrl": "https://d-example.awsapps.com/start",
}  # fmt: skip
CLIENT: Json = {"clientId": "id", "clientSecret": "s3cret", "expiresAt": "2026-10-30T12:00:00.000"}


def test_a_social_sign_in_of_the_ide() -> None:
    kept = gw.read_kiro_import(SOCIAL, {}, {})
    assert kept["auth_method"] == "google"
    assert kept["profile_arn"] == SOCIAL["profileArn"]
    assert kept["expires_at"] == 1785585600
    assert len(kept["machine_id"]) == 64


def test_an_organisations_sign_in_of_the_ide() -> None:
    arn = "arn:aws:codewhisperer:eu-central-1:000000000000:profile/CHOSEN"
    kept = gw.read_kiro_import(IDC, CLIENT, {"arn": arn, "name": "x"})
    assert (kept["auth_method"], kept["idc_region"]) == ("idc", "eu-west-1")
    assert (kept["client_id"], kept["client_secret"]) == ("id", "s3cret")
    assert kept["sign_in_expires_at"] == 1793361600
    assert kept["profile_arn"] == arn
    builder = {**IDC, "provider": "BuilderId", "startUrl": None}
    assert gw.read_kiro_import(builder, CLIENT, {})["auth_method"] == "builder_id"


def test_a_sign_in_that_only_holds_a_refresh_token() -> None:
    kept = gw.read_kiro_import({"refreshToken": "aorEXAMPLE"}, {}, {})
    assert kept["refresh_token"] == "aorEXAMPLE"
    assert "access_token" not in kept
    assert kept.get("expires_at", 0) == 0


@pytest.mark.parametrize(
    "body",
    [{}, {"accessToken": "aoa"}, {"refreshToken": ""}, {"refreshToken": 1},
     {"refreshToken": "aorEX..."}, {"refreshToken": "two words"}, {**IDC, "clientId": None}],
)  # fmt: skip
def test_what_cannot_be_imported(body: Json) -> None:
    with pytest.raises(ValueError, match=r"."):
        gw.read_kiro_import(body, {}, {})


def test_the_editors_files() -> None:
    body = {
        "github.com:Iv1.x": {"user": "a", "oauth_token": "ghu_1"},
        "GitHub.com": {"user": "b", "oauth_token": "ghu_2"},
        "acme.ghe.com:Iv1.x": {"oauth_token": "ghu_3", "user": 7},
        "x": None, "y": {"oauth_token": 1}, "z": {"oauth_token": "a b"}, "w": "ghu_4",
    }  # fmt: skip
    assert gw.read_plugin_logins(body) == [
        ("github.com", "a", "ghu_1"), ("github.com", "b", "ghu_2"), ("acme.ghe.com", "", "ghu_3"),
    ]  # fmt: skip


def test_an_import_that_fits_no_provider_names_a_new_one() -> None:
    echo_only = gw.Config(providers={"echo": gw.EchoConfig()})
    logins = {
        "kiro": gw.FoundLogin("kiro-cli", "/x", {"type": "kiro"}),
        "copilot-acme": gw.FoundLogin("gh", "/x", {"type": "copilot"}, "acme.ghe.com"),
    }
    for name, login in logins.items():
        assert gw.PROVIDER_NAME.fullmatch(name) and gw.target_name(echo_only, login) == name
    others = gw.Config(providers={"work": gw.CopilotConfig(), "mine": gw.KiroConfig()})
    assert gw.target_name(others, logins["kiro"]) == "mine"
    assert gw.target_name(others, logins["copilot-acme"]) == "copilot-acme"


def test_refreshed_tokens_go_back_in_the_files_own_words() -> None:
    changes = {"access_token": "a2", "refresh_token": "r2", "expires_at": 1785585600,
               "profile_arn": "arn"}  # fmt: skip
    ide = gw.with_tokens({**IDC, "unknown": [1]}, changes)
    assert ide == {**IDC, "unknown": [1], "accessToken": "a2", "refreshToken": "r2",
                   "expiresAt": "2026-08-01T12:00:00.000Z"}  # fmt: skip
    cli = {"access_token": "a", "refresh_token": "r", "expires_at": "2026-01-01T00:00:00Z", "x": 1}
    assert gw.with_tokens(cli, changes) == {
        **cli, "access_token": "a2", "refresh_token": "r2",
        "expires_at": "2026-08-01T12:00:00.000Z",
    }  # fmt: skip
    assert gw.with_tokens({**IDC, "expiresAt": 5}, changes)["expiresAt"] == 1785585600
    millis = gw.with_tokens({**IDC, "expiresAt": 1785000000000}, changes)
    assert millis["expiresAt"] == 1785585600000
    # No new refresh token: the old one stays.
    kept = gw.with_tokens(IDC, {"access_token": "a2", "expires_at": 1785585600})
    assert kept["refreshToken"] == "aorEXAMPLE"


def test_whose_sign_in_is_newer() -> None:
    own = {"access_token": "a", "refresh_token": "r", "expires_at": 1000}
    assert not gw.is_newer(dict(own), own)
    assert gw.is_newer({**own, "access_token": "b", "expires_at": 2000}, own)
    assert not gw.is_newer({**own, "access_token": "b", "expires_at": 500}, own)
    assert gw.is_newer({**own, "refresh_token": "s"}, own)


@pytest.mark.parametrize(
    ("text", "method"),
    [("Google", "google"), ("Github", "github"), ("social", "social"), ("IdC", "idc"),
     ("BuilderId", "builder_id"), ("builder-id", "builder_id"), ("external_idp", "external_idp"),
     ("x", "builder_id"), ("", "builder_id")],
)  # fmt: skip
def test_the_names_of_methods(text: str, method: str) -> None:
    body = {"refreshToken": "aorEXAMPLE", "authMethod": text, **CLIENT}
    if method == "external_idp":
        body["tokenEndpoint"] = "https://idp.example/token"
    assert gw.read_kiro_import(body, {}, {})["auth_method"] == method


# ---- tokens that are used themselves -------------------------------------------------------------


def test_a_direct_token_goes_to_the_host_of_its_account() -> None:
    config = gw.CopilotConfig()
    named = {"endpoints": {"api": "https://api.business.githubcopilot.com"}}
    token = gw.direct_token("gho_EXAMPLE", named, config, NOW)
    assert token.api_url == "https://api.business.githubcopilot.com"
    assert token.expires_at > NOW
    assert "gho_" not in repr(token)
    plain = gw.direct_token("gho_EXAMPLE", {}, config, NOW)
    assert plain.api_url == "https://api.githubcopilot.com"
    tenant = gw.CopilotConfig(github_api_url="https://api.acme.ghe.com")
    assert gw.direct_token("gho_EXAMPLE", {}, tenant, NOW).api_url == (
        "https://copilot-api.acme.ghe.com"
    )
    evil = {"endpoints": {"api": "https://githubcopilot.com.evil.example"}}
    with pytest.raises(gw.UpstreamError):
        gw.direct_token("gho_EXAMPLE", evil, config, NOW)


@pytest.mark.parametrize(
    ("token", "host", "shown"),
    [
        ("tid=x", "api.business.githubcopilot.com", "Bearer"),
        ("gho_EXAMPLE", "api.githubcopilot.com", "Bearer"),
        ("github_pat_EXAMPLE", "api.githubcopilot.com", "Bearer"),
        ("gho_EXAMPLE", "api.business.githubcopilot.com", "token"),
        ("gho_EXAMPLE", "copilot-api.acme.ghe.com", "Bearer"),
        ("github_pat_EXAMPLE", "api.business.githubcopilot.com", "Bearer"),
        ("ghs_EXAMPLE", "api.enterprise.githubcopilot.com", "Bearer"),
        ("ghs_EXAMPLE", "copilot-api.acme.ghe.com", "Bearer"),
    ],
)
def test_how_a_token_is_shown(token: str, host: str, shown: str) -> None:
    held = gw.CopilotToken(token, f"https://{host}", NOW, 3600.0)
    headers = gw.copilot_headers(held, gw.CopilotConfig(), ("s", "m", "d"), "i", "r")
    assert headers["Authorization"] == f"{shown} {token}"


def test_a_refused_exchange() -> None:
    def judged(status: int, body: Any) -> gw.RetryDecision:
        return gw.classify_exchange_error(status, NO_HEADERS, data(body), NOW)

    assert type(judged(401, {"message": "Bad credentials"}).error) is gw.NotSignedIn
    assert type(judged(404, {"message": "Not Found"}).error) is gw.NotSignedIn
    for notice in ("no_copilot_access", "subscription_ended", "billing_locked", "spammy_user"):
        envelope = {"error_details": {"notification_id": notice, "message": "m",
                                      "url": "https://github.com/x"}}  # fmt: skip
        verdict = judged(403, envelope)
        assert isinstance(verdict.error, gw.NotEntitled)
        assert verdict.action != "wait"
        assert verdict.error.hint == "See https://github.com/x"
    evil = {"error_details": {"notification_id": "x", "url": "https://github.com.evil.example/"}}
    assert "evil" not in (judged(403, evil).error.hint or "")
    assert judged(403, {"error_details": {"notification_id": "server_error"}}).action == "wait"
    assert judged(403, {"message": "API rate limit exceeded for user ID 1."}).action == "wait"
    for status in (429, 500, 503):
        assert judged(status, {}).action == "wait"
