"""Section 9.5 and model names: Kiro's sign-ins, hosts, headers, models, limits and refusals.

The numbers are those of sections, traps and tables of the project's sheet about Kiro. Nothing here
goes over a network; every secret and account is made up.
"""

from __future__ import annotations

import copy
import datetime as dt
import json
import math
import re
import urllib.parse
from typing import Any

import pytest
from fake_kiro import BUILDER_ARN, SOCIAL_ARN, default_models, default_usage
from fakes import Seen
from kiro_rules import CONTENT_TYPES, find_host, header_notes

import aiclient_api as gw

Json = dict[str, Any]

NOW = 1_785_000_000.0
ARN = "arn:aws:codewhisperer:us-east-1:000000000000:profile/EXAMPLE"
EU_ARN = ARN.replace("us-east-1", "eu-central-1")
ACCESS = "aoaEXAMPLEaccess0123456789"
REFRESH = "aorEXAMPLErefresh0123456789"
SECRET = "EXAMPLEsecret0123456789"
KEY = "ksk_EXAMPLEkey0123456789"
ORGANISATION = "https://d-example000.awsapps.com/start"
BUILDER = "https://view.awsapps.com/start"

RUNTIME = "https://runtime.{}.kiro.dev"
Q = "https://q.{}.amazonaws.com"
OLD = "https://codewhisperer.us-east-1.amazonaws.com"
MANAGEMENT = "https://management.{}.kiro.dev"


def kept(method: str = "google", **more: Any) -> Json:
    """A token file; None leaves a key out."""
    content: Json = {"type": "kiro", "auth_method": method, "access_token": ACCESS}
    content |= {"refresh_token": REFRESH, "region": "us-east-1", "expires_at": NOW + 3600}
    if method in ("builder_id", "idc"):
        content |= {"client_id": "EXAMPLEclient", "client_secret": SECRET}
        content["start_url"] = ORGANISATION if method == "idc" else BUILDER
    if method == "external_idp":
        content |= {
            "client_id": "EXAMPLEclient",
            "token_endpoint": "https://idp.example.com/oauth/token",
            "issuer_url": "https://idp.example.com",
            "scope": "openid offline_access",
        }
    if method == "api_key":
        content |= {"access_token": KEY, "refresh_token": None, "expires_at": None}
    return {key: value for key, value in (content | more).items() if value is not None}


def login(method: str = "google", **more: Any) -> gw.KiroLogin:
    """A sign-in of some kind."""
    return gw.read_kiro_login(kept(method, **more))


EVERY_KIND = pytest.mark.parametrize(
    "method", ["builder_id", "idc", "google", "github", "external_idp", "api_key"]
)


# ---- the token file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"auth_method": "builder_id"}, "builder_id"),
        ({"auth_method": "idc"}, "idc"),
        ({"auth_method": "google"}, "social"),
        ({"auth_method": "github"}, "social"),
        ({"auth_method": "social"}, "social"),
        ({"auth_method": "external_idp"}, "external_idp"),
        ({"auth_method": "api_key"}, "api_key"),
        # as the IDE writes it
        ({"auth_method": "IdC", "provider": "BuilderId"}, "builder_id"),
        ({"auth_method": "IdC", "provider": "Enterprise"}, "idc"),
        ({"auth_method": "IdC", "provider": "Internal"}, "idc"),
        ({"auth_method": "IdC", "start_url": BUILDER}, "builder_id"),
        ({"auth_method": "IdC", "start_url": BUILDER + "/"}, "builder_id"),
        ({"auth_method": "IdC", "start_url": ORGANISATION}, "idc"),
        ({"auth_method": "ExternalIdp"}, "external_idp"),
        # where nothing is said
        ({"access_token": KEY}, "api_key"),
        ({"token_endpoint": "https://idp.example.com/token"}, "external_idp"),
        ({"client_id": "EXAMPLE"}, "builder_id"),
        ({"client_id": "EXAMPLE", "start_url": ORGANISATION}, "idc"),
        ({"access_token": ACCESS}, "social"),
        ({"auth_method": None, "access_token": ACCESS}, "social"),
        ({"auth_method": "something new", "client_id": "EXAMPLE"}, "builder_id"),
    ],
)
def test_the_kind_of_a_sign_in_is_read_from_what_is_there(said: Json, kind: str) -> None:
    """1.1 and 2.1."""
    assert gw.kiro_kind(said) == kind


@EVERY_KIND
def test_a_token_file_of_every_kind_is_read(method: str) -> None:
    """And only an API key lives for ever."""
    read = login(method)
    assert read.access_token == (KEY if method == "api_key" else ACCESS)
    assert read.refresh == ("" if method == "api_key" else REFRESH)
    assert read.expires_at == (math.inf if method == "api_key" else NOW + 3600)
    assert re.fullmatch(r"[0-9a-f]{64}", read.machine_id)


def test_a_file_with_a_refresh_token_alone_is_importable() -> None:
    """2.1: it is refreshed at once."""
    read = gw.read_kiro_login({"refresh_token": REFRESH})
    assert (read.kind, read.access_token, read.expires_at) == ("social", "", 0.0)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (kept(refresh_token=None), "refresh_token"),
        (kept(refresh_token=""), "refresh_token"),
        (kept(refresh_token=5), "refresh_token"),
        (kept(refresh_token="aorEXAMPLE..."), "truncated"),
        (kept(access_token="aoaEXAMPLE..."), "truncated"),
        (kept(refresh_token="aorEXAMPLE\u2026"), "characters"),
        (kept(access_token="aoaEXAMPLE\r\nx: y"), "characters"),
        (kept("api_key", access_token=None), "API key"),
        (kept("builder_id", client_secret=None), "client_secret"),
        (kept("idc", client_id=None), "client_id"),
        (kept("idc", idc_region="eu-west-1.attacker.example/"), "region"),
        (kept(region="US EAST"), "region"),
        (kept(profile_arn="arn:EXAMPLE"), "profile_arn"),
        (kept(profile_arn=ARN.replace("codewhisperer", "iam")), "profile_arn"),
        (kept("external_idp", token_endpoint=None), "token_endpoint"),
        (kept("external_idp", token_endpoint="http://idp.example.com/t"), "token_endpoint"),
        (kept("external_idp", token_endpoint="https://other.example/t"), "token_endpoint"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_without_its_secrets(odd: Json, why: str) -> None:
    """1.1, 1.6 and trap 25."""
    with pytest.raises(ValueError, match=why) as caught:
        gw.read_kiro_login(odd)
    assert "EXAMPLE" not in str(caught.value)


def test_the_endpoint_of_an_identity_provider_may_stand_alone() -> None:
    """1.6: without an issuer there is nothing to compare."""
    assert login("external_idp", issuer_url=None).token_url.startswith("https://idp.")


@EVERY_KIND
def test_a_sign_in_shows_no_secret(method: str) -> None:
    """Trap 25."""
    shown = repr(login(method))
    assert not any(secret in shown for secret in (ACCESS, REFRESH, SECRET, KEY))


def test_the_machine_id_is_that_of_other_clients() -> None:
    """4.2: from the token at the first sight, kept from then on (trap 17)."""
    assert login().machine_id == gw.short_hash(f"KotlinNativeAPI/{REFRESH}", 64)
    assert login("api_key").machine_id == gw.short_hash(f"KiroAPIKey/{KEY}", 64)
    assert login(machine_id="a" * 64, refresh_token="aorEXAMPLEother").machine_id == "a" * 64


@pytest.mark.parametrize(
    "said", ["5d7c2f0e-8f0b-4c39-9a1e-0d1f5b1f6a11", "", "EXAMPLE\r\nx: y", "host EXAMPLE", 5]
)
def test_a_machine_id_is_always_64_hex_digits(said: Any) -> None:
    """4.2: it is a part of headers; a UUID is doubled."""
    machine = login(machine_id=said).machine_id
    assert re.fullmatch(r"[0-9a-f]{64}", machine)
    if said and isinstance(said, str) and len(said) == 36:
        assert machine == said.replace("-", "") * 2


@pytest.mark.parametrize(
    ("said", "region"),
    [
        ({}, "us-east-1"),
        ({"region": "eu-west-1"}, "eu-west-1"),
        ({"region": "us-east-1", "idc_region": "eu-west-1"}, "eu-west-1"),
    ],
)
def test_the_region_of_a_sign_in_is_its_own(said: Json, region: str) -> None:
    """2.1: it is not that of the models."""
    assert login("idc", **{"region": None, **said}).sso_region == region


AUGUST = dt.datetime(2026, 8, 1, 12, tzinfo=dt.UTC).timestamp()


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("2026-08-01T12:00:00.000Z", AUGUST),
        ("2026-08-01T12:00:00Z", AUGUST),
        ("2026-08-01T12:00:00.123456789Z", AUGUST + 0.123456),
        ("2026-08-01T14:00:00+02:00", AUGUST),
        ("2026-08-01T12:00:00.000", AUGUST),  # no zone is UTC
        ("2026-08-01T12:00:00", AUGUST),
        ("2026-08-01 12:00:00", AUGUST),
        (AUGUST, AUGUST),
        (int(AUGUST), AUGUST),
        (AUGUST + 0.5, AUGUST + 0.5),
        (int(AUGUST * 1000), AUGUST),  # milliseconds
        (AUGUST * 1000, AUGUST),
        (9_999_999_999, 9_999_999_999),
        (10_000_000_000, 10_000_000),
        (0, 0),
    ],
)
def test_a_time_is_read_in_every_form(said: Any, seconds: float) -> None:
    """Trap 24 and 1.6: values from 1e10 on are milliseconds."""
    assert gw.read_time(said) == pytest.approx(seconds, abs=1e-5)


@pytest.mark.parametrize(
    "said",
    [
        None,
        True,
        "",
        "soon",
        [],
        {},
        10**400,
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
    ],
    ids=lambda said: repr(said)[:28],
)
def test_a_time_that_is_none_is_a_number_all_the_same(said: Any) -> None:
    """JSON has numbers of any size; a token of no known expiry is renewed at once."""
    assert math.isfinite(gw.read_time(said))


@pytest.mark.parametrize("said", [None, True, "", "soon", [], {}])
def test_no_time_is_zero(said: Any) -> None:
    assert gw.read_time(said) == 0.0


# ---- refresh -------------------------------------------------------------------------------------

JSON = "application/json"


@pytest.mark.parametrize(
    ("method", "region", "host"),
    [
        ("builder_id", "us-east-1", "https://oidc.us-east-1.amazonaws.com/token"),
        ("idc", "eu-west-1", "https://oidc.eu-west-1.amazonaws.com/token"),
    ],
)
def test_aws_sign_ins_are_renewed_with_json_in_camel_case(
    method: str, region: str, host: str
) -> None:
    """1.6 and trap 14: in the region of the sign-in."""
    url, headers, body = gw.kiro_refresh(login(method, idc_region=region), gw.KiroConfig())
    assert url == host and headers["Content-Type"] == JSON
    assert json.loads(body) == {
        "clientId": "EXAMPLEclient",
        "clientSecret": SECRET,
        "refreshToken": REFRESH,
        "grantType": "refresh_token",
    }


@pytest.mark.parametrize("method", ["google", "github"])
def test_social_sign_ins_are_renewed_at_the_desktop_service(method: str) -> None:
    """1.4 and 1.6: with the IDE's agent, wherever the models are."""
    read = login(method, region="eu-central-1", profile_arn=EU_ARN)
    url, headers, body = gw.kiro_refresh(read, gw.KiroConfig())
    assert url == "https://prod.us-east-1.auth.desktop.kiro.dev/refreshToken"
    assert json.loads(body) == {"refreshToken": REFRESH}
    lowered = {name.lower(): value for name, value in headers.items()}
    notes, machines = header_notes(Seen("POST", "/refreshToken", lowered, None, b"", 0), "desktop")
    assert notes == [] and machines == {read.machine_id}


def test_an_identity_provider_gets_a_form() -> None:
    """1.6: at its own endpoint, with the scope where there is one."""
    url, headers, body = gw.kiro_refresh(login("external_idp"), gw.KiroConfig())
    assert url == "https://idp.example.com/oauth/token"
    assert headers["Content-Type"] == "application/x-www-form-urlencoded"
    form = {
        "grant_type": "refresh_token",
        "client_id": "EXAMPLEclient",
        "refresh_token": REFRESH,
        "scope": "openid offline_access",
    }
    assert dict(urllib.parse.parse_qsl(body.decode(), strict_parsing=True)) == form
    _, _, body = gw.kiro_refresh(login("external_idp", scope=None), gw.KiroConfig())
    assert b"scope" not in body


def test_the_places_of_renewal_can_be_set() -> None:
    """Keep the hosts in configuration; a slash at the end does no harm."""
    config = gw.KiroConfig(oidc_url="http://127.0.0.1:1/", auth_url="http://127.0.0.1:2/")
    assert gw.kiro_refresh(login("idc"), config)[0] == "http://127.0.0.1:1/token"
    assert gw.kiro_refresh(login(), config)[0] == "http://127.0.0.1:2/refreshToken"
    assert gw.kiro_refresh(login("external_idp"), config)[0].startswith("https://idp.")


@EVERY_KIND
def test_no_refresh_carries_a_bearer(method: str) -> None:
    """1.2: nor a compressed answer, which the client cannot read."""
    _, headers, _ = gw.kiro_refresh(login(method), gw.KiroConfig())
    assert "authorization" not in {name.lower() for name in headers}
    assert headers["Accept-Encoding"] == "identity"


NEW = {"accessToken": "aoaEXAMPLEnew", "expiresIn": 1800, "refreshToken": "aorEXAMPLEnew"}


@pytest.mark.parametrize(
    ("answer", "changes"),
    [
        (
            NEW,
            {
                "access_token": "aoaEXAMPLEnew",
                "refresh_token": "aorEXAMPLEnew",
                "expires_at": int(NOW) + 1800,
            },
        ),
        (
            {"access_token": "aoaEXAMPLEnew", "expires_in": 60, "refresh_token": "aorEXAMPLEnew"},
            {
                "access_token": "aoaEXAMPLEnew",
                "refresh_token": "aorEXAMPLEnew",
                "expires_at": int(NOW) + 60,
            },
        ),
        (
            {**NEW, "profileArn": ARN, "csrfToken": "EXAMPLE", "idToken": "EXAMPLE"},
            {
                "access_token": "aoaEXAMPLEnew",
                "refresh_token": "aorEXAMPLEnew",
                "expires_at": int(NOW) + 1800,
                "profile_arn": ARN,
            },
        ),
    ],
)
def test_a_refresh_changes_what_it_names(answer: Json, changes: Json) -> None:
    """1.6: camelCase of AWS and of the desktop service, snake_case of identity providers."""
    assert gw.read_refresh_response(answer, NOW) == changes


@pytest.mark.parametrize("refresh", [None, "", 5, "aorEXAMPLE\n"])
@pytest.mark.parametrize("arn", [None, "", 5, "arn:EXAMPLE"])
def test_a_refresh_erases_nothing_it_does_not_name(refresh: Any, arn: Any) -> None:
    """Traps 13 and 15: null is not a new token, and no profile is not a new one."""
    before = kept(profile_arn=ARN)
    for answer in (
        {**NEW, "refreshToken": refresh, "profileArn": arn},
        {"accessToken": "aoaEXAMPLEnew"},
    ):
        after = {**before, **gw.read_refresh_response(answer, NOW)}
        assert (after["refresh_token"], after["profile_arn"]) == (REFRESH, ARN)
        assert after["access_token"] == "aoaEXAMPLEnew"


@pytest.mark.parametrize(
    "life",
    [None, 0, -5, "3600", True, [], 10**400],
    ids=lambda life: repr(life)[:9],
)
def test_a_life_that_is_none_is_an_hour(life: Any) -> None:
    """1.6: if `expiresIn` is missing assume 3600."""
    changes = gw.read_refresh_response({**NEW, "expiresIn": life}, NOW)
    assert changes["expires_at"] == int(NOW) + 3600


@pytest.mark.parametrize(
    "answer",
    [{}, {"accessToken": None}, {"accessToken": 5}, {"accessToken": ""}, {"accessToken": "a\nb"}],
)
def test_a_refresh_without_a_token_is_an_error(answer: Json) -> None:
    with pytest.raises(gw.UpstreamError, match="no usable token"):
        gw.read_refresh_response({**answer, "refreshToken": REFRESH}, NOW)


def refused_refresh(status: int, body: Any = None, **headers: str) -> gw.RetryDecision:
    """What a refused refresh means."""
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    fields = gw.Headers({name.replace("_", "-"): value for name, value in headers.items()})
    return gw.classify_kiro_refresh(status, fields, data, NOW)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "invalid_grant", "error_description": "Invalid refresh token provided"}),
        (400, {"error": "invalid_grant", "error_description": "Invalid grant provided"}),
        (400, {"__type": "com.amazon#ExpiredTokenException", "message": "expired"}),
        (400, {"__type": "InvalidTokenException", "message": "no"}),
        (401, {"error": "invalid_client", "error_description": "Client is expired"}),
        (401, {"message": "Unauthorized"}),
    ],
)
def test_a_dead_refresh_token_needs_a_sign_in(status: int, body: Json) -> None:
    """1.6, permanent failures; what to type is said by whoever knows the provider's name."""
    verdict = refused_refresh(status, body)
    assert type(verdict.error) is gw.NotSignedIn and verdict.action == "refresh"
    assert "no longer valid" in verdict.error.message


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_refresh_that_fails_for_now_marks_nothing_dead(status: int) -> None:
    """1.6, transient failures."""
    verdict = refused_refresh(status, b"<html>busy</html>", retry_after="7")
    assert not isinstance(verdict.error, gw.NotSignedIn)
    assert (verdict.action, verdict.wait_s, verdict.error.retry_after) == ("wait", 7.0, 7.0)


@pytest.mark.parametrize(
    "secret", [ACCESS, REFRESH, KEY, f"Bearer {KEY}", "eyJEXAMPLE0.eyJEXAMPLE0.x"]
)
@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_a_refused_refresh_repeats_no_secret(status: int, secret: str) -> None:
    """Trap 25."""
    for body in (
        {"error": "invalid_grant", "error_description": f"bad {secret}"},
        {"error": f"bad {secret}"},
        {"message": f"bad {secret}"},
        f"bad {secret}".encode(),
    ):
        error = refused_refresh(status, body).error
        assert secret.removeprefix("Bearer ") not in error.text() + str(error)


# ---- regions and hosts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "arn", "sso", "region"),
    [
        ("eu-central-1", ARN, "us-east-1", "eu-central-1"),  # the setting
        ("", EU_ARN, "us-east-1", "eu-central-1"),  # field 4 of the ARN
        ("", ARN, "eu-west-1", "us-east-1"),
        ("", "", "us-east-1", "us-east-1"),  # what is near the sign-in
        ("", "", "us-west-2", "us-east-1"),
        ("", "", "ap-southeast-2", "us-east-1"),
        ("", "", "eu-west-1", "eu-central-1"),
        ("", "", "eu-north-1", "eu-central-1"),
        ("", "", "eu-central-1", "eu-central-1"),
    ],
)
def test_the_region_of_the_models(setting: str, arn: str, sso: str, region: str) -> None:
    """Trap 12 and section 3: never the region of the sign-in itself."""
    read = login("idc", idc_region=sso, profile_arn=arn or None)
    config = gw.KiroConfig(region=setting)
    assert gw.kiro_region(read, config) == region
    for way in gw.kiro_endpoints(read, config):
        found = find_host(way.url.removeprefix("https://"))
        assert found is not None and found[1] == region and way.shape in found[0]
    for base in gw.kiro_control_urls(read, config):
        found = find_host(base.removeprefix("https://"))
        assert found is not None and found[1] == region and "control" in found[0]


def ways(method: str, **more: Any) -> list[tuple[str, str, str]]:
    """How a sign-in may ask, best first."""
    found = gw.kiro_endpoints(login(method, **more), gw.KiroConfig())
    return [(way.url, way.shape, way.arn) for way in found]


US = "us-east-1"
EU = "eu-central-1"


@pytest.mark.parametrize(("arn", "own"), [(ARN, ARN), (None, SOCIAL_ARN)])
@pytest.mark.parametrize("method", ["google", "github"])
def test_social_sign_ins_send_their_own_profile_or_the_constant(
    method: str, arn: str | None, own: str
) -> None:
    """Section 3, and 4.1 (a): the three hosts, best first."""
    wanted = [(RUNTIME.format(US), "ide", own), (Q.format(US), "ide", own), (OLD, "ide", own)]
    assert ways(method, profile_arn=arn) == wanted


@pytest.mark.parametrize(("arn", "own"), [(ARN, ARN), (None, BUILDER_ARN)])
def test_builder_id_goes_on_without_a_profile(arn: str | None, own: str) -> None:
    """Section 3: IDE shape with it, CLI shape without, the q host without."""
    first, second, third, *_ = ways("builder_id", profile_arn=arn)
    assert first == (RUNTIME.format(US), "ide", own)
    assert second == (RUNTIME.format(US), "cli", "")
    assert third == (Q.format(US), "ide", "")


def test_an_organisation_sends_its_profile_first_and_none_in_the_end() -> None:
    """Section 3."""
    found = ways("idc", profile_arn=ARN)
    assert found[0] == (RUNTIME.format(US), "ide", ARN)
    assert (Q.format(US), "ide", "") in found
    assert {arn for _, _, arn in found} == {ARN, ""}


@pytest.mark.parametrize("arn", [ARN, None])
def test_an_identity_provider_sends_a_real_profile_only(arn: str | None) -> None:
    """Section 3: no constant."""
    found = ways("external_idp", profile_arn=arn)
    assert found[0] == (RUNTIME.format(US), "ide", arn or "")
    assert {way[2] for way in found} == {arn or ""}


@pytest.mark.parametrize("arn", [ARN, None])
def test_an_api_key_never_sends_a_profile(arn: str | None) -> None:
    """Trap 18: and asks the runtime host in the CLI shape, the older ones in the IDE's."""
    found = ways("api_key", profile_arn=arn)
    assert {way[2] for way in found} == {""}
    assert found[0] == (RUNTIME.format(US), "cli", "")
    assert set(found[1:]) == {(OLD, "ide", ""), (Q.format(US), "ide", "")}


@EVERY_KIND
def test_in_europe_every_host_is_there(method: str) -> None:
    """Section 3: the oldest host is in one region only."""
    read = login(method)
    config = gw.KiroConfig(region=EU)
    hosts = [way.url for way in gw.kiro_endpoints(read, config)]
    assert set(hosts) == {RUNTIME.format(EU), Q.format(EU)}
    assert hosts[0] == RUNTIME.format(EU)
    assert gw.kiro_control_urls(read, config) == [MANAGEMENT.format(EU), Q.format(EU)]


@EVERY_KIND
def test_no_way_is_tried_twice_and_a_set_host_is_the_only_one(method: str) -> None:
    """Keep the host list in configuration."""
    read = login(method, profile_arn=None if method == "api_key" else ARN)
    config = gw.KiroConfig(api_url="http://127.0.0.1:1/")
    for settings in (gw.KiroConfig(), gw.KiroConfig(region=EU), config):
        found = gw.kiro_endpoints(read, settings)
        assert found and len(set(found)) == len(found)
    assert {way.url for way in gw.kiro_endpoints(read, config)} == {"http://127.0.0.1:1"}
    shapes = [way.shape for way in gw.kiro_endpoints(read, config)]
    assert shapes[0] == gw.kiro_endpoints(read, gw.KiroConfig())[0].shape


@pytest.mark.parametrize(
    ("api", "management", "bases"),
    [
        ("", "", [MANAGEMENT.format(US), Q.format(US)]),
        ("http://127.0.0.1:1/", "", ["http://127.0.0.1:1"]),
        ("http://127.0.0.1:1", "http://127.0.0.1:2/", ["http://127.0.0.1:2"]),
    ],
)
def test_the_control_plane_has_hosts_of_its_own(
    api: str, management: str, bases: list[str]
) -> None:
    """6.1: `runtime` does not serve it."""
    config = gw.KiroConfig(api_url=api, management_url=management)
    assert gw.kiro_control_urls(login(), config) == bases


# ---- headers -------------------------------------------------------------------------------------

SYSTEM = "linux#6.8.0"


def call_headers(read: gw.KiroLogin, shape: str) -> dict[str, str]:
    """The headers of a model call, in lower case, with those that change with every attempt."""
    way = gw.KiroEndpoint("https://host.example", shape, "")
    headers = gw.kiro_headers(read, way.shape, "1.1.14", SYSTEM)
    lowered = {name.lower(): value for name, value in headers.items()}
    assert len(lowered) == len(headers)
    return lowered


def notes_of(headers: dict[str, str], plane: str) -> tuple[list[str], set[str]]:
    """What the imitation dislikes about headers, and the machine ids in them."""
    headers = {"amz-sdk-request": "attempt=1; max=3", **headers}
    return header_notes(Seen("POST", "/", headers, None, b"", 0), plane)


@EVERY_KIND
@pytest.mark.parametrize("shape", ["ide", "cli"])
def test_a_model_call_has_the_headers_of_its_shape(shape: str, method: str) -> None:
    """4.2."""
    read = login(method)
    headers = call_headers(read, shape)
    notes, machines = notes_of(headers, shape)
    assert notes == []
    assert machines == ({read.machine_id} if shape == "ide" else set())
    assert headers["authorization"] == f"Bearer {read.access_token}"
    assert headers["content-type"] == CONTENT_TYPES[shape]
    assert headers["accept-encoding"] == "identity"
    assert headers["x-amzn-codewhisperer-optout"] == "true"
    assert ("x-amz-target" in headers) is (shape == "cli")
    assert ("x-amzn-kiro-agent-mode" in headers) is (shape == "ide")


def test_the_target_and_path_of_a_shape_belong_together() -> None:
    """4.1: do not mix."""
    target = "AmazonCodeWhispererStreamingService.GenerateAssistantResponse"
    assert call_headers(login(), "cli")["x-amz-target"] == target
    assert gw.KIRO_PATHS == {"ide": "/generateAssistantResponse", "cli": "/"}
    assert gw.KIRO_ORIGINS == {"ide": "AI_EDITOR", "cli": "KIRO_CLI"}


def test_the_ide_says_its_version_and_machine_and_system() -> None:
    """4.2, verbatim forms."""
    read = login(machine_id="0" * 64)
    headers = call_headers(read, "ide")
    client = "KiroIDE-1.1.14-" + "0" * 64
    assert headers["x-amz-user-agent"] == f"aws-sdk-js/1.0.34 {client}"
    assert headers["user-agent"] == (
        "aws-sdk-js/1.0.34 ua/2.1 os/linux#6.8.0 lang/js md/nodejs#22.22.0 "
        f"api/codewhispererstreaming#1.0.34 m/E {client}"
    )


def test_the_cli_says_what_the_cli_says() -> None:
    """4.2: `x-amz-user-agent` is the same without the version of the program."""
    headers = call_headers(login(), "cli")
    assert headers["user-agent"] == (
        "aws-sdk-rust/1.3.15 ua/2.1 api/codewhispererstreaming/0.1.17975 os/linux "
        "lang/rust/1.92.0 md/appVersion-2.14.2 m/F app/AmazonQ-For-CLI"
    )
    short = headers["user-agent"].replace("md/appVersion-2.14.2 ", "")
    assert headers["x-amz-user-agent"] == short


@EVERY_KIND
def test_some_kinds_are_marked_on_every_call(method: str) -> None:
    """Trap 18: also on those of the control plane."""
    read = login(method)
    control = gw.kiro_headers(read, "control", "1.1.14", SYSTEM)
    for headers in (
        call_headers(read, "ide"),
        call_headers(read, "cli"),
        {name.lower(): value for name, value in control.items()},
    ):
        marks = {"api_key": "API_KEY", "external_idp": "EXTERNAL_IDP"}
        assert headers.get("tokentype") == marks.get(method)
        assert "redirect-for-internal" not in headers


def test_staff_is_redirected() -> None:
    """4.2."""
    read = login("idc", provider="Internal")
    assert call_headers(read, "ide")["redirect-for-internal"] == "true"
    assert gw.kiro_headers(read, "control", "1", SYSTEM)["redirect-for-internal"] == "true"


@EVERY_KIND
def test_the_control_plane_is_asked_as_the_ide_asks_it(method: str) -> None:
    """6.1."""
    read = login(method)
    headers = gw.kiro_headers(read, "control", "1.1.14", SYSTEM)
    notes, machines = notes_of({k.lower(): v for k, v in headers.items()}, "control")
    assert notes == [] and machines == {read.machine_id}
    assert headers["Authorization"] == f"Bearer {read.access_token}"


# ---- a call in its place -------------------------------------------------------------------------


def written() -> Json:
    """A conversation state as the dialect writes it."""
    uses = [{"toolUseId": "t1", "name": "f", "input": {}}]
    results = [{"toolUseId": "t1", "status": "success", "content": [{"text": "secret words"}]}]
    tools = [{"toolSpecification": {"name": "f"}}]
    context = {"toolResults": results, "tools": tools}
    return {
        "conversationState": {
            "chatTriggerType": "MANUAL",
            "history": [
                {
                    "userInputMessage": {
                        "content": "secret question",
                        "modelId": "m",
                        "images": [{}],
                    }
                },
                {"assistantResponseMessage": {"content": "", "toolUses": uses}},
            ],
            "currentMessage": {
                "userInputMessage": {
                    "content": "",
                    "modelId": "m",
                    "userInputMessageContext": context,
                }
            },
        },
        "additionalModelRequestFields": {"max_tokens": 5},
    }


@pytest.mark.parametrize(("shape", "origin"), [("ide", "AI_EDITOR"), ("cli", "KIRO_CLI")])
@pytest.mark.parametrize("arn", [ARN, ""])
def test_a_call_is_placed_without_changing_what_was_written(
    shape: str, origin: str, arn: str
) -> None:
    """4.1: the same body goes to the next host in another shape."""
    body = written()
    placed = gw.address_kiro_request(body, gw.KiroEndpoint("https://h", shape, arn), "C", "R")
    assert body == written()
    state = placed["conversationState"]
    assert (state["conversationId"], state["agentContinuationId"]) == ("C", "R")
    asked = [state["history"][0], state["currentMessage"]]
    assert [turn["userInputMessage"]["origin"] for turn in asked] == [origin, origin]
    assert state["history"][1] == body["conversationState"]["history"][1]
    assert placed.get("profileArn", "") == arn
    assert placed["additionalModelRequestFields"] == {"max_tokens": 5}


def thought(text: str, signature: str) -> Json:
    """A thought in its only form."""
    return {"reasoningText": {"text": text, "signature": signature}}


def test_a_remembered_thought_comes_back_before_its_call() -> None:
    """4.11: for callers whose dialect has no field for it."""
    body, memory = written(), gw.ReasoningMemory()
    memory.store(["t1"], "hm", "EXAMPLEsignature")
    gw.attach_kiro_thinking(body, memory)
    answer = body["conversationState"]["history"][1]["assistantResponseMessage"]
    assert answer["reasoningContent"] == thought("hm", "EXAMPLEsignature")


def test_a_thought_that_the_caller_sent_is_kept() -> None:
    """It is newer than anybody's memory, and calls of others have none."""
    body, memory = written(), gw.ReasoningMemory()
    memory.store(["t1"], "other", "EXAMPLEother")
    answer = body["conversationState"]["history"][1]["assistantResponseMessage"]
    answer["reasoningContent"] = thought("hm", "EXAMPLE")
    gw.attach_kiro_thinking(body, memory)
    assert answer["reasoningContent"] == thought("hm", "EXAMPLE")
    body = written()
    gw.attach_kiro_thinking(body, gw.ReasoningMemory())
    assert body == written()


def test_a_signature_that_comes_back_without_its_text_gets_it_back() -> None:
    """A client that omits thinking never saw the text, and only both are accepted."""
    body, memory = written(), gw.ReasoningMemory()
    memory.store(["t1"], "hm", "EXAMPLE")
    answer = body["conversationState"]["history"][1]["assistantResponseMessage"]
    answer["reasoningContent"] = thought("", "EXAMPLE")
    gw.attach_kiro_thinking(body, memory)
    assert answer["reasoningContent"] == thought("hm", "EXAMPLE")
    answer["reasoningContent"] = {"redactedContent": "EXAMPLE"}
    gw.attach_kiro_thinking(body, memory)
    assert answer["reasoningContent"] == {"redactedContent": "EXAMPLE"}


def test_all_thoughts_are_stripped_at_once() -> None:
    """Trap 22: when one signature is refused; the rest stays as it is."""
    body = written()
    answers = body["conversationState"]["history"]
    answers[1]["assistantResponseMessage"]["reasoningContent"] = thought("hm", "EXAMPLE")
    more = {"content": "T", "reasoningContent": {"redactedContent": "EXAMPLE"}}
    answers.append({"assistantResponseMessage": more})
    assert gw.strip_kiro_thinking(body) is True
    assert answers.pop() == {"assistantResponseMessage": {"content": "T"}}
    assert body == written()
    assert gw.strip_kiro_thinking(body) is False
    del body["conversationState"]["history"]
    assert gw.strip_kiro_thinking(body) is False


def test_the_form_of_a_conversation_tells_none_of_its_words() -> None:
    """8.3: roles and lengths, for the log."""
    form = gw.summarize_kiro_body(written())
    assert form.split() == ["u15i1", "a0c1", "u0r1t1"]
    assert "secret" not in form


def test_the_form_of_a_huge_conversation_is_short() -> None:
    """A log line has an end; the last turns count."""
    body = written()
    body["conversationState"]["history"] *= 2000
    assert len(gw.summarize_kiro_body(body)) < 2000 and gw.summarize_kiro_body(body).endswith(
        "u0r1t1"
    )


# ---- models --------------------------------------------------------------------------------------

LISTED = """
    auto claude-sonnet-5 claude-opus-5 claude-opus-4.8 claude-opus-4.6 claude-opus-4.5
    claude-sonnet-4.6 claude-sonnet-4.5 claude-sonnet-4 claude-haiku-4.5 gpt-5.6-sol gpt-5.6-terra
    deepseek-3.2 minimax-m2.5 glm-5 qwen3-coder-next
"""
MODELS = gw.read_kiro_models([{"modelId": name} for name in LISTED.split()], "kiro")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4.5"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),  # trap 19
        ("claude-opus-4-6", "claude-opus-4.6"),
        ("claude-haiku-4-5", "claude-haiku-4.5"),
        ("claude-sonnet-5", "claude-sonnet-5"),
        ("claude-opus-4-8[1m]", "claude-opus-4.8"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-5"),  # not offered: the newest sonnet
        ("kiro-auto", "auto"),
        ("gpt-5.6-sol", "gpt-5.6-sol"),
        ("qwen3-coder-next", "qwen3-coder-next"),
        ("auto", "auto"),
        ("Claude-Sonnet-4.5", "claude-sonnet-4.5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4.5"),
        ("claude-sonnet-4-5-latest", "claude-sonnet-4.5"),
        ("claude-4-5-sonnet", "claude-sonnet-4.5"),
        ("claude-4.5-sonnet", "claude-sonnet-4.5"),
        ("kiro-claude-sonnet-4-5", "claude-sonnet-4.5"),
        ("claude-sonnet-4-5-20250929[1m]", "claude-sonnet-4.5"),
        # background calls of Claude Code
        ("claude-3-5-haiku-20241022", "claude-haiku-4.5"),
        ("claude-3-haiku-20240307", "claude-haiku-4.5"),
        ("claude-3-7-sonnet-latest", "claude-sonnet-5"),
        ("claude-3-opus-20240229", "claude-opus-5"),
    ],
)
def test_a_model_is_found_by_its_usual_names(name: str, model: str) -> None:
    """6.3 and the table of (c); `kiro/` is cut by the router."""
    found = gw.find_model(name, MODELS)
    assert found is not None and found.id == model


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("claude-opus-4.6-1m", "claude-opus-4.6"),
        ("claude-sonnet-4-5-1m", "claude-sonnet-4.5"),
        ("claude-sonnet-4-5-thinking", "claude-sonnet-4.5"),
        ("claude-sonnet-4-5-20250929-thinking", "claude-sonnet-4.5"),
        ("claude-opus-4.8-high", "claude-opus-4.8"),
    ],
)
def test_a_suffix_that_no_listed_model_has_is_cut(name: str, model: str) -> None:
    """6.3."""
    found = gw.find_model(name, MODELS)
    assert found is not None and found.id == model


@pytest.mark.parametrize("name", ["claude-sonnet-4.5-1m", "claude-sonnet-4-5-20250929[1m]"])
def test_a_long_window_that_is_listed_is_meant(name: str) -> None:
    """6.3: `-1m` is cut only if it is absent."""
    models = gw.read_kiro_models(
        [{"modelId": "claude-sonnet-4.5"}, {"modelId": "claude-sonnet-4.5-1m"}], "kiro"
    )
    found = gw.find_model(name, models)
    assert found is not None and found.id == "claude-sonnet-4.5-1m"


@pytest.mark.parametrize("name", ["claude-opus-9", "unknown", "gpt-5.6", "", "claude-", "kiro-"])
def test_an_unknown_name_finds_nothing(name: str) -> None:
    """6.3: it is passed on as it is, the service says what it thinks of it."""
    assert gw.find_model(name, MODELS) is None
    assert name in gw.model_spellings(name)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4.5"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("claude-opus-4-10", "claude-opus-4.10"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-3.5"),
        ("kiro-auto", "auto"),
        ("gpt-5.6-sol", "gpt-5.6-sol"),
        ("qwen3-coder-next", "qwen3-coder-next"),
        ("minimax-m2.5", "minimax-m2.5"),
    ],
)
def test_the_last_spelling_is_the_one_of_the_wire(name: str, best: str) -> None:
    """6.3: dots, no date, the family first: what an unlisted model is asked by."""
    assert gw.model_spellings(name)[-1] == best
    assert not any("4.20" in spelling for spelling in gw.model_spellings(name))


def test_a_model_is_read_as_it_is_described() -> None:
    """6.1."""
    raw = next(row for row in default_models() if row["modelId"] == "claude-opus-4.8")
    model = gw.read_kiro_model(raw, "kiro")
    assert model is not None
    assert (model.id, model.provider, model.dialects) == ("claude-opus-4.8", "kiro", ("kiro",))
    assert (model.max_prompt, model.context, model.max_output) == (1_000_000, 1_000_000, 128_000)
    assert model.efforts == ("low", "medium", "high", "xhigh", "max") and model.adaptive
    assert model.vendor == "Anthropic" and model.raw is raw and not model.guessed


def test_the_efforts_of_gpt_stand_elsewhere() -> None:
    """4.11."""
    model = gw.read_kiro_models(default_models(), "kiro")["gpt-5.6-sol"]
    assert model.efforts == ("none", "low", "medium", "high", "xhigh", "max")
    assert not model.adaptive and model.vendor == "OpenAI"


def test_every_member_but_the_id_may_be_missing_or_null() -> None:
    """6.1."""
    whole = default_models()[4]
    for empty in ({}, dict.fromkeys(whole)):
        model = gw.read_kiro_model({**empty, "modelId": "m-1"}, "kiro")
        assert model is not None
        assert (model.name, model.max_prompt, model.max_output) == ("m-1", None, None)
        assert model.efforts == () and not model.adaptive
    limits = {"tokenLimits": {"maxInputTokens": "200k", "maxOutputTokens": None}}
    model = gw.read_kiro_model({"modelId": "m-1", **limits}, "kiro")
    assert model is not None and (model.max_prompt, model.max_output) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        "x",
        {"properties": []},
        {"properties": {"output_config": True, "thinking": None}},
        {"properties": {"output_config": {"properties": {"effort": {"enum": "high"}}}}},
        {"properties": {"output_config": {"properties": {"effort": {"enum": [1, "huge"]}}}}},
    ],
)
def test_an_odd_schema_of_a_model_is_no_accident(fields: Any) -> None:
    """6.1: the model can still be asked."""
    model = gw.read_kiro_model(
        {"modelId": "claude-x", "additionalModelRequestFieldsSchema": fields}, "kiro"
    )
    assert model is not None and model.efforts == ()
    chat = gw.MESSAGES.read_request(
        {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}],
         "output_config": {"effort": "high"}}
    )  # fmt: skip
    assert gw.KIRO.write_request(chat, model)["conversationState"]


def test_odd_entries_of_a_list_are_passed_over() -> None:
    """6.1."""
    odd: list[Any] = [None, 5, "x", [], {}, {"modelId": None}, {"modelId": 5}, {"modelId": ""}]
    odd += [{"modelId": "a b"}, {"modelId": "a\nb"}, {"modelId": "x" * 200}]
    assert list(gw.read_kiro_models([*odd, {"modelId": "m-1"}], "kiro")) == ["m-1"]


def test_the_built_in_list_is_marked_as_a_guess() -> None:
    """6.1: for when the list cannot be had; the windows are those of 6.2."""
    models = gw.known_kiro_models("work")
    assert all(model.guessed and model.provider == "work" for model in models.values())
    assert models["auto"].max_prompt == 200_000
    assert models["claude-sonnet-4.5"].max_prompt == 200_000
    assert models["claude-opus-4.8"].max_prompt == 1_000_000
    assert models["claude-opus-4.8"].max_output == 128_000
    assert {"claude-sonnet-4.6", "claude-haiku-4.5", "claude-opus-4.5"} <= set(models)


# ---- limits --------------------------------------------------------------------------------------


def credits_of(body: Json) -> gw.Allowance:
    """The only allowance that there is."""
    [row] = gw.read_kiro_quota(body, NOW).allowances
    return row


def limits(change: Any = None) -> gw.Allowance:
    """The credits of a paying account, after a change to the answer's only row."""
    body = default_usage(NOW)
    if change:
        change(body, body["usageBreakdownList"][0])
    return credits_of(body)


def test_limits_are_the_plan_a_trial_and_bonuses() -> None:
    """7.1."""
    quota, read = gw.read_kiro_quota(default_usage(NOW), NOW), limits()
    assert quota.plan == "KIRO PRO" and quota.resets_at == NOW + 12 * 86400
    assert read.used == pytest.approx(125.37 + 50.2 + 0.0)
    assert read.limit == 1000 + 500 + 100
    assert read.overage_permitted is False and not read.is_spent


def test_what_is_over_does_not_count() -> None:
    """7.1: a trial that ended, a bonus that expired or is not active."""

    def end_trial(body: Json, row: Json) -> None:
        row["freeTrialInfo"]["freeTrialStatus"] = "EXPIRED"

    def expire_bonus(body: Json, row: Json) -> None:
        row["bonuses"][0]["expiresAt"] = NOW - 1

    def end_bonus(body: Json, row: Json) -> None:
        row["bonuses"][0]["status"] = "EXPIRED"

    assert limits(end_trial).limit == 1100
    assert limits(expire_bonus).limit == limits(end_bonus).limit == 1500


def test_limits_come_in_older_forms_too() -> None:
    """7.1: a single object; whole numbers; dates in words; the reset beside the row."""
    row = {"resourceType": "CREDIT", "currentUsage": 50, "usageLimit": 50}
    reset = "2026-08-01T12:00:00Z"
    quota = gw.read_kiro_quota({"usageBreakdown": row, "nextDateReset": reset}, NOW)
    [read] = quota.allowances
    assert (read.used, read.limit, quota.resets_at) == (50, 50, AUGUST)
    assert read.is_spent and quota.plan == ""


def test_a_precise_figure_that_is_null_is_replaced_by_the_plain_one() -> None:
    """7.1: prefer the precise ones; members are null now and then."""

    def blank(body: Json, row: Json) -> None:
        row["usageLimitWithPrecision"] = row["currentUsageWithPrecision"] = None

    assert limits(blank).limit == 1600
    assert limits(blank).used == pytest.approx(125 + 50.2)


def test_the_row_of_credits_counts_among_several() -> None:
    """7.1."""

    def put_before(body: Json, row: Json) -> None:
        other = {"resourceType": "SPEC", "usageLimit": 7, "currentUsage": 7}
        body["usageBreakdownList"].insert(0, other)

    assert limits(put_before).limit == 1600


def test_an_account_that_may_go_over_is_never_spent() -> None:
    """7.1, `overageStatus`."""

    def spend(body: Json, row: Json) -> None:
        row["currentUsageWithPrecision"] = 2000.0

    def allow(body: Json, row: Json) -> None:
        spend(body, row)
        body["overageConfiguration"]["overageStatus"] = "ENABLED"

    assert limits(spend).is_spent and not limits(allow).is_spent


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"usageBreakdownList": None},
        {"usageBreakdownList": []},
        {"usageBreakdownList": "x"},
        {"usageBreakdownList": [None, 5]},
        {"usageBreakdownList": [{"bonuses": "x", "freeTrialInfo": []}]},
        {"usageBreakdownList": [{"bonuses": [None, 5], "usageLimit": "many"}]},
        {"subscriptionInfo": [], "overageConfiguration": "x", "nextDateReset": []},
        {"subscriptionInfo": {"subscriptionTitle": 5}},
    ],
)
def test_odd_limits_are_none(body: Json) -> None:
    """And an account of which nothing is known is not spent."""
    assert gw.read_kiro_quota(body, NOW) == gw.Quota("", "", [], 0.0, NOW)


# ---- refusals ------------------------------------------------------------------------------------


def judge(
    status: int, kind: str = "", message: str = "", reason: str | None = None
) -> gw.RetryDecision:
    """What an error answer of the REST form means."""
    headers = gw.Headers({"x-amzn-errortype": f"{kind}:http://internal.example/"} if kind else {})
    data = json.dumps({"message": message, "reason": reason}).encode()
    return gw.classify_kiro_error(status, headers, data, NOW)


@pytest.mark.parametrize(
    "name",
    ["MONTHLY_REQUEST_COUNT", "SUSPENDED", "Throttling", "DAILY_REQUEST_COUNT", "ExpiredToken"],
)
def test_a_clients_own_words_in_a_refusal_concern_no_other_request(name: str) -> None:
    """A tool may be named like an account's limit, and the refusal repeats the name."""
    for reason in (None, "TOOL_SCHEMA_INVALID"):
        verdict = judge(400, "ValidationException", f"Invalid tool: {name}", reason)
        assert type(verdict.error) is gw.InvalidRequest
        assert verdict.action == "" and not verdict.account_wide


INVALID_BEARER = "The bearer token included in the request is invalid."
SUSPENDED = (
    "Your User ID EXAMPLE temporarily is suspended. We detected unusual user activity and locked it"
    " as a security precaution. To restore access, please contact our support team."
)
HIGH_LOAD = "Encountered unexpectedly high load when processing the request, please try again."
Row = tuple[int, str, str, str | None, type[gw.ApiError], str]
VALIDATION = "ValidationException"
THROTTLING = "ThrottlingException"
DENIED = "AccessDeniedException"
QUOTA = "ServiceQuotaExceededException"
BROKEN = "InternalServerException"
ROWS: list[Row] = [
    # token
    (401, "", "", None, gw.NotSignedIn, "refresh"),
    (401, "UnrecognizedClientException", "The token has expired", None, gw.NotSignedIn, "refresh"),
    (401, DENIED, "Unauthorized", None, gw.NotSignedIn, "refresh"),
    (401, DENIED, "Invalid token", None, gw.NotSignedIn, "refresh"),
    (403, DENIED, INVALID_BEARER, None, gw.NotSignedIn, "refresh"),
    (403, "ExpiredTokenException", "expired", None, gw.NotSignedIn, "refresh"),
    # wrong region or ARN
    (403, DENIED, "Invalid token", None, gw.Forbidden, "reroute"),
    (403, DENIED, "User is not authorized to make this call.", None, gw.Forbidden, "reroute"),
    # suspension
    (403, DENIED, SUSPENDED, "TEMPORARILY_SUSPENDED", gw.Forbidden, "cool_down"),
    (423, "AccountSuspendedException", "locked", None, gw.Forbidden, "cool_down"),
    (403, DENIED, SUSPENDED, None, gw.Forbidden, "cool_down"),
    # the month's credits
    (
        402,
        QUOTA,
        "You have reached the limit.",
        "MONTHLY_REQUEST_COUNT",
        gw.QuotaExceeded,
        "cool_down",
    ),
    (402, QUOTA, "x", None, gw.QuotaExceeded, "cool_down"),
    (402, "", "", None, gw.QuotaExceeded, "cool_down"),
    (400, VALIDATION, "x", "MONTHLY_REQUEST_COUNT", gw.QuotaExceeded, "cool_down"),
    (429, THROTTLING, "x", "MONTHLY_REQUEST_COUNT", gw.QuotaExceeded, "cool_down"),
    (429, THROTTLING, "You have reached the limit.", None, gw.QuotaExceeded, "cool_down"),
    (402, QUOTA, "x", "OVERAGE_REQUEST_LIMIT_EXCEEDED", gw.QuotaExceeded, "cool_down"),
    # rates
    (429, THROTTLING, "Too many requests", None, gw.RateLimited, "pause"),
    (429, "", "", None, gw.RateLimited, "pause"),
    (429, THROTTLING, "60-minute credit limit exceeded", None, gw.RateLimited, "cool_down"),
    (429, THROTTLING, "x", "DAILY_REQUEST_COUNT", gw.QuotaExceeded, "cool_down"),
    # the model is overloaded
    (429, THROTTLING, "x", "INSUFFICIENT_MODEL_CAPACITY", gw.Overloaded, "pause"),
    (500, BROKEN, "x", "INSUFFICIENT_MODEL_CAPACITY", gw.Overloaded, "pause"),
    (500, BROKEN, HIGH_LOAD, None, gw.Overloaded, "pause"),
    (500, BROKEN, "x", "MODEL_TEMPORARILY_UNAVAILABLE", gw.Overloaded, "pause"),
    # the conversation
    (400, VALIDATION, "Improperly formed request.", None, gw.InvalidRequest, ""),
    (
        400,
        VALIDATION,
        "Improperly formed request.",
        "REQUEST_BODY_INVALID",
        gw.InvalidRequest,
        "reshape",
    ),
    (
        400,
        VALIDATION,
        "Improperly formed request.",
        "REQUEST_BODY_INVALID_JSON",
        gw.InvalidRequest,
        "",
    ),
    (400, "", "Improperly formed request.", None, gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "CONTENT_LENGTH_EXCEEDS_THRESHOLD", gw.ContextTooLong, ""),
    (400, VALIDATION, "x", "PROMPT_TOO_LONG", gw.ContextTooLong, ""),
    (400, VALIDATION, "Input is too long.", None, gw.ContextTooLong, ""),
    (400, VALIDATION, "Invalid model.", "INVALID_MODEL_ID", gw.ModelNotFound, "relist"),
    (400, VALIDATION, "x", "THINKING_SIGNATURE_INVALID", gw.InvalidRequest, "forget"),
    (400, VALIDATION, "x", "TOOL_USE_RESULT_MISMATCH", gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "TOOL_DUPLICATE", gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "TOOL_SCHEMA_INVALID", gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "TOOL_CONFIG_MISSING", gw.InvalidRequest, ""),
    (500, BROKEN, "x", "TOOL_USE_RESULT_MISMATCH", gw.InvalidRequest, ""),
    (503, "", "x", "TOOL_SCHEMA_INVALID", gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "IMAGE_COUNT_EXCEEDED", gw.InvalidRequest, ""),
    (400, VALIDATION, "x", "IMAGE_SIZE_EXCEEDED", gw.InvalidRequest, ""),
    # profile
    (400, VALIDATION, "profileArn is required for this request.", None, gw.NotSignedIn, "reroute"),
    (400, VALIDATION, "Invalid profileArn.", None, gw.NotSignedIn, "reroute"),
    # host
    (404, "", "", None, gw.UpstreamError, "reroute"),
    (405, "", "", None, gw.UpstreamError, "reroute"),
    (404, "UnknownOperationException", "x", None, gw.UpstreamError, "reroute"),
    (400, "UnknownOperationException", "x", None, gw.UpstreamError, "reroute"),
    # passing trouble
    (408, "", "", None, gw.UpstreamTimeout, "retry_once"),
    (500, BROKEN, "x", None, gw.UpstreamError, "wait"),
    (500, "", "", None, gw.UpstreamError, "wait"),
    (502, "", "", None, gw.Overloaded, "reroute"),
    (503, "ServiceUnavailableException", "x", None, gw.Overloaded, "reroute"),
    (504, "", "", None, gw.UpstreamTimeout, "retry_once"),
    (524, "", "", None, gw.UpstreamTimeout, ""),
]


@pytest.mark.parametrize(("status", "kind", "message", "reason", "error", "remedy"), ROWS)
def test_a_refusal_means_what_was_seen_in_the_field(
    status: int,
    kind: str,
    message: str,
    reason: str | None,
    error: type[gw.ApiError],
    remedy: str,
) -> None:
    """8.3, every row: the words before the status."""
    verdict = judge(status, kind, message, reason)
    assert (type(verdict.error), verdict.action) == (error, remedy)


@pytest.mark.parametrize(
    ("reason", "account_wide"),
    [("MONTHLY_REQUEST_COUNT", True), (None, True), ("INSUFFICIENT_MODEL_CAPACITY", False)],
)
def test_a_limit_concerns_the_account_and_a_load_the_model(
    reason: str | None, account_wide: bool
) -> None:
    """8.3: a cool-down is shared by all requests of the account."""
    assert judge(429, THROTTLING, "x", reason).account_wide is account_wide


def test_a_suspension_gives_the_words_and_a_hint() -> None:
    """8.3: show text and where to turn."""
    error = judge(403, DENIED, SUSPENDED, "TEMPORARILY_SUSPENDED").error
    assert "unusual user activity" in error.text() and "support" in error.text()
    assert error.status == 403


def test_an_overlong_input_is_said_in_words_clients_know() -> None:
    """8.3: so that they compact."""
    error = judge(400, VALIDATION, "Input is too long.").error
    assert "prompt is too long" in str(error) and error.kind == "context_too_long"


def test_a_reason_is_told_with_the_refusal() -> None:
    """8.3: 400 with reason; also for images, which are called so."""
    assert "TOOL_DUPLICATE" in judge(400, VALIDATION, "x", "TOOL_DUPLICATE").error.text()
    text = judge(400, VALIDATION, "x", "IMAGE_COUNT_EXCEEDED").error.text()
    assert "IMAGE_COUNT_EXCEEDED" in text and "image" in text


def test_the_request_id_is_in_the_message() -> None:
    """4.2: unless it is none."""
    headers = gw.Headers({"x-amzn-requestid": "5d7c2f0e-EXAMPLE"})
    error = gw.classify_kiro_error(500, headers, b"", NOW).error
    assert "5d7c2f0e-EXAMPLE" in error.text()
    headers = gw.Headers({"x-amzn-requestid": "EXAMPLE <b>"})
    assert "EXAMPLE" not in gw.classify_kiro_error(500, headers, b"", NOW).error.text()


def dressed(kind: str, message: str, reason: str | None, shape: str) -> tuple[gw.Headers, bytes]:
    """An error in one of the shapes of 8.1."""
    with_kind = gw.Headers({"x-amzn-errortype": kind})
    plain = gw.Headers()
    spaced = f"com.amazon.aws.codewhisperer#{kind}"
    table: dict[str, tuple[gw.Headers, Any]] = {
        "rest": (with_kind, {"message": message, "reason": reason}),
        "rest url": (
            gw.Headers({"x-amzn-errortype": f"{kind}:http://internal.example/"}),
            {"message": message, "reason": reason},
        ),
        "json": (plain, {"__type": spaced, "message": message, "reason": reason}),
        "json bare": (plain, {"__type": kind, "message": message, "reason": reason}),
        "code": (plain, {"code": kind, "message": message, "reason": reason}),
        "capital": (with_kind, {"Message": message, "reason": reason}),
        "errorMessage": (with_kind, {"errorMessage": message, "reason": reason}),
        "error": (with_kind, {"error": message, "reason": reason}),
        "output": (plain, {"Output": {"__type": spaced, "message": message, "reason": reason}}),
    }
    headers, body = table[shape]
    return headers, json.dumps(body).encode()


SHAPES = [
    "rest", "rest url", "json", "json bare", "code", "capital", "errorMessage", "error", "output",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_is_read_in_all_its_shapes(shape: str) -> None:
    """8.1: by its type, its reason and its words alike."""
    for kind, message, reason, error, remedy in (
        (THROTTLING, "slow down", None, gw.RateLimited, "pause"),
        ("SomeException", "x", "INVALID_MODEL_ID", gw.ModelNotFound, "relist"),
        ("SomeException", INVALID_BEARER, None, gw.NotSignedIn, "refresh"),
    ):
        headers, data = dressed(kind, message, reason, shape)
        verdict = gw.classify_kiro_error(400, headers, data, NOW)
        assert (type(verdict.error), verdict.action) == (error, remedy)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_words_of_an_error_reach_the_caller(shape: str) -> None:
    """8.1."""
    headers, data = dressed("SomeException", "the EXAMPLE words", None, shape)
    for status in (400, 403, 404, 429, 500):
        assert (
            "the EXAMPLE words" in gw.classify_kiro_error(status, headers, data, NOW).error.text()
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"plain words", "plain words"),
        (b"<html><body>Bad gateway EXAMPLE</body></html>", "HTML"),
        (b"<!DOCTYPE html><p>EXAMPLE", "HTML"),
        (b'"a string"', "a string"),
        (b"[1]", ""),
        (b"", ""),
        (b"\xff\xfe", ""),
        (b'{"message": null, "reason": 5, "__type": []}', ""),
        (b'{"message": {"deep": 1}, "Output": 5}', ""),
        (b'{"message": ', ""),
    ],
)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 418, 429, 500, 502, 503])
def test_an_error_of_any_bytes_has_a_meaning(status: int, data: bytes, words: str) -> None:
    """8.1: plain text, HTML of a proxy, rubbish; the status decides then."""
    verdict = gw.classify_kiro_error(status, gw.Headers(), data, NOW)
    assert words in verdict.error.text() and "EXAMPLE" not in verdict.error.text()
    bare = gw.classify_kiro_error(status, gw.Headers(), b"", NOW)
    assert (type(verdict.error), verdict.action) == (type(bare.error), bare.action)


@pytest.mark.parametrize("kind", ["__type", "message"])
def test_an_error_with_a_good_status_is_an_error(kind: str) -> None:
    """5.2: seen; words first, else it is tried again."""
    data = json.dumps({kind: "ThrottlingException"}).encode()
    assert isinstance(gw.classify_kiro_error(200, gw.Headers(), data, NOW).error, gw.RateLimited)
    verdict = gw.classify_kiro_error(200, gw.Headers(), b"{}", NOW)
    assert (type(verdict.error), verdict.action) == (gw.UpstreamError, "retry_once")


@pytest.mark.parametrize(
    ("said", "wait_s"),
    [("7", 7.0), ("0", 0.0), (None, None), ("soon", None)],
)
def test_a_rate_limit_tells_how_long(said: str | None, wait_s: float | None) -> None:
    """8.3: Retry-After if present."""
    headers = gw.Headers({"retry-after": said} if said else {})
    verdict = gw.classify_kiro_error(429, headers, b"", NOW)
    assert (verdict.wait_s, verdict.error.retry_after) == (wait_s, wait_s)


def test_a_rate_limit_may_name_a_date() -> None:
    """8.3: seconds or HTTP date."""
    date = dt.datetime.fromtimestamp(NOW + 30, dt.UTC)
    headers = gw.Headers({"retry-after": date.strftime("%a, %d %b %Y %H:%M:%S GMT")})
    assert gw.classify_kiro_error(429, headers, b"", NOW).wait_s == 30.0


@pytest.mark.parametrize("status", [402, 429])
def test_spent_credits_do_not_come_back_in_seconds(status: int) -> None:
    """8.3: no Retry-After of seconds for the client."""
    data = json.dumps({"message": "x", "reason": "MONTHLY_REQUEST_COUNT"}).encode()
    verdict = gw.classify_kiro_error(status, gw.Headers({"retry-after": "3"}), data, NOW)
    assert isinstance(verdict.error, gw.QuotaExceeded)
    assert verdict.error.retry_after is None


SECRETS = [
    ACCESS,
    REFRESH,
    KEY,
    "aoaEXAMPLE:MGUCEXAMPLE/0123456789+EXAMPLE==",
    "eyJEXAMPLE0.eyJEXAMPLE0.EXAMPLE",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 429, 500, 503])
def test_no_secret_is_repeated(status: int, secret: str) -> None:
    """Trap 25: whatever the service or a proxy says."""
    for message in (f"bad {secret} here", f"Bearer {secret}", f"Improperly formed {secret}"):
        for data in (
            json.dumps({"message": message, "reason": None}).encode(),
            json.dumps({"Output": {"__type": "x#y", "Message": message}}).encode(),
            message.encode(),
        ):
            verdict = gw.classify_kiro_error(status, gw.Headers(), data, NOW)
            assert secret not in verdict.error.text() + str(verdict.error)
            tail = secret[-8:]
            assert tail not in verdict.error.text()


def test_words_about_a_token_are_no_secret() -> None:
    """8.3: the service's own words are told as they are."""
    assert "bearer token included in the request" in judge(403, DENIED, INVALID_BEARER).error.text()


@pytest.mark.parametrize(
    ("code", "reason", "message", "error"),
    [
        (THROTTLING, "", "x", gw.RateLimited),
        (THROTTLING, "INSUFFICIENT_MODEL_CAPACITY", "x", gw.Overloaded),
        ("ContentLengthExceededException", "", "x", gw.ContextTooLong),
        ("modelTemporarilyUnavailableEvent", "", "x", gw.Overloaded),
        (VALIDATION, "", "x", gw.InvalidRequest),
    ],
)
def test_an_exception_inside_a_stream_is_judged_by_its_words(
    code: str, reason: str, message: str, error: type[gw.ApiError]
) -> None:
    """5.2."""
    verdict = gw.classify_kiro_message(code, reason, message)
    assert verdict is not None and type(verdict.error) is error


def test_an_exception_of_unknown_words_is_left_to_the_status() -> None:
    """8.3: the last rows."""
    assert gw.classify_kiro_message("InternalServerException", "", "boom") is None


@pytest.mark.parametrize("status", range(200, 600))
def test_every_status_has_a_verdict(status: int) -> None:
    """Nothing falls through, and no wording is left empty."""
    verdict = gw.classify_kiro_error(status, gw.Headers(), b"", NOW)
    assert verdict.error.text().endswith(".") and "  " not in verdict.error.text()


def test_reading_changes_no_answer() -> None:
    """What was read may be kept: the model's own entry is."""
    usage, models, answer = default_usage(NOW), default_models(), {**NEW, "profileArn": ARN}
    before = copy.deepcopy((usage, models, answer))
    gw.read_kiro_quota(usage, NOW)
    gw.read_kiro_models(models, "kiro")
    gw.read_refresh_response(answer, NOW)
    assert (usage, models, answer) == before
