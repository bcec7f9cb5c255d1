"""Routing: which provider a model name leads to, the rate limit, and what was used."""

from __future__ import annotations

import pytest

import aiclient_api as gw

CATALOGUES = {
    "copilot": {"gpt-4.1": gw.Model("gpt-4.1", "copilot"), "shared": gw.Model("shared", "copilot")},
    "work": {"shared": gw.Model("shared", "work"), "own-1.5": gw.Model("own-1.5", "work")},
    "echo": {"echo": gw.Model("echo", "echo")},
}
ALIASES: dict[str, str | list[str]] = {
    "fast": "work/own-1.5",
    "plain": "gpt-4.1",
    "gpt-4.1": "echo/echo",
    "odd": "nobody/x",
    "off": "kiro/auto",
    "list": ["copilot/gpt-4.1", "own-1.5", "kiro/auto", "copilot/gpt-4.1", "vendor/model"],
    "itself": ["itself", "echo/echo"],
}


def router(default: str = "copilot", enabled: tuple[str, ...] = tuple(CATALOGUES)) -> gw.Router:
    """A router over three providers; a fourth is configured and disabled."""
    return gw.Router(gw.Config(default_provider=default, models=ALIASES), list(enabled))


def placed(name: str, header: str | None = None) -> list[gw.Route]:
    """The routes of a name, each with its provider."""
    routes = router()
    return [routes.resolve(route, CATALOGUES)[0] for route in routes.candidates(name, header)]


def test_copilot_s_auto_takes_the_bare_name_from_nobody() -> None:
    auto = gw.Model("auto", "copilot", auto=True)
    route = gw.Route("", "auto", False)
    own = {**CATALOGUES, "work": {"auto": gw.Model("auto", "work")}, "copilot": {"auto": auto}}
    assert router().resolve(route, own)[0].provider == "work"
    del own["work"]
    assert router().resolve(route, own) == (route._replace(provider="copilot"), auto)
    own["work"] = {"auto": gw.Model("auto", "work", auto=True)}
    assert router().resolve(route, own)[0].provider == "copilot"


@pytest.mark.parametrize(
    ("name", "header", "provider", "model", "explicit"),
    [
        ("echo/gpt-4.1", "work", "echo", "gpt-4.1", True),  # a prefix before all
        ("copilot/gpt-4.1", None, "copilot", "gpt-4.1", True),
        ("work/vendor/model", None, "work", "vendor/model", True),
        ("fast", "copilot", "copilot", "fast", True),  # a header before an alias
        ("gpt-4.1", None, "echo", "echo", True),  # an alias before the catalogue
        ("fast", None, "work", "own-1.5", True),
        ("plain", None, "copilot", "gpt-4.1", False),
        ("own-1.5", None, "work", "own-1.5", False),  # the only one that has it
        ("own-1-5-20250101", None, "work", "own-1-5-20250101", False),
        ("OWN-1.5", None, "work", "OWN-1.5", False),
        ("shared", None, "copilot", "shared", False),  # several have it: the default
        ("unknown", None, "copilot", "unknown", False),
        ("vendor/unknown", None, "copilot", "vendor/unknown", False),
        ("copilot/", None, "copilot", "copilot/", False),
        ("odd", None, "copilot", "nobody/x", False),  # an alias with a provider that is off
    ],
)
def test_a_name_leads_to_one_provider(
    name: str, header: str | None, provider: str, model: str, explicit: bool
) -> None:
    (candidate,) = router().candidates(name, header)
    assert bool(candidate.provider) == explicit  # nobody's catalogue is needed for these
    (route,) = placed(name, header)
    assert (route.provider, route.model, route.explicit) == (provider, model, explicit)


def test_a_list_leads_to_its_names_in_order_without_repeats_and_disabled_providers() -> None:
    assert list(map(str, router().candidates("list", None))) == [
        "copilot/gpt-4.1", "own-1.5", "vendor/model",
    ]  # fmt: skip
    assert list(map(str, placed("list"))) == [
        "copilot/gpt-4.1", "work/own-1.5", "copilot/vendor/model",
    ]  # fmt: skip


def test_an_alias_in_a_list_is_a_model_s_own_name() -> None:
    """So that a list can stand in the place of the model that it begins with."""
    assert list(map(str, placed("itself"))) == ["copilot/itself", "echo/echo"]


def test_a_header_or_a_prefix_leaves_no_choice() -> None:
    assert list(map(str, placed("list", "work"))) == ["work/list"]
    assert list(map(str, placed("echo/list"))) == ["echo/list"]
    assert list(map(str, placed("ECHO/list"))) == ["echo/list"]


def test_an_alias_of_disabled_providers_says_how_to_enable_one() -> None:
    with pytest.raises(gw.ModelNotFound, match="kiro/auto") as caught:
        router().candidates("off", None)
    assert "provider enable" in caught.value.text()


@pytest.mark.parametrize("name", ["", " ", "a b", "a\nb", "\N{SNOWMAN}", "x" * 201, "a?b", "a\\b"])
def test_what_is_no_model_name_is_refused(name: str) -> None:
    with pytest.raises(gw.InvalidRequest):
        router().candidates(name, None)


def test_a_header_must_name_an_enabled_provider() -> None:
    with pytest.raises(gw.InvalidRequest, match="copilot, work"):
        router(enabled=("copilot", "work")).candidates("gpt-4o", "echo")


def test_a_name_nobody_has_is_answered_with_the_nearest_when_there_is_no_default() -> None:
    with pytest.raises(gw.ModelNotFound) as caught:
        router("copilot", ("work", "echo")).resolve(gw.Route("", "own-1.6", False), CATALOGUES)
    assert "own-1.5" in caught.value.hint


def test_a_provider_that_could_not_list_its_models_is_still_the_default() -> None:
    route, model = router().resolve(gw.Route("", "gpt-4o", False), {"echo": CATALOGUES["echo"]})
    assert (route.provider, route.explicit, model) == ("copilot", False, None)


@pytest.mark.parametrize(
    ("name", "found"),
    [("shared", "copilot/shared"), ("OWN-1-5", "work/own-1.5"), ("gpt-4.2", "")],
)
def test_a_name_is_resolved_to_the_model_of_its_provider(name: str, found: str) -> None:
    _, model = router().resolve(gw.Route("", name, False), CATALOGUES)
    assert (f"{model.provider}/{model.id}" if model else "") == found


# ---- which error moves a request on, and which is told when all fail -----------------------------


@pytest.mark.parametrize(
    ("error", "moves"),
    [
        (gw.RateLimited("x"), True),
        (gw.QuotaExceeded("x"), True),
        (gw.Overloaded("x"), True),
        (gw.Unreachable("x"), True),
        (gw.UpstreamError("x"), True),
        (gw.UpstreamTimeout("x"), True),
        (gw.NotSignedIn("x"), True),
        (gw.NotEntitled("x"), True),
        (gw.Forbidden("x"), True),
        (gw.ModelNotFound("x"), True),
        (gw.WrongDialect("x"), True),
        (gw.InvalidRequest("x"), False),
        (gw.UnsupportedFeature("x"), False),
        (gw.ContextTooLong(), False),
        (gw.BodyTooLarge("x"), False),
        (gw.RequestTimeout("x"), False),
        (gw.ApiError("x"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, gw.ApiError) else str(value),
)
def test_only_what_is_not_the_request_s_own_fault_moves_it_on(
    error: gw.ApiError, moves: bool
) -> None:
    assert gw.can_fall_back(error) is moves


USEFUL = [
    gw.RateLimited("soon", retry_after=3.0),
    gw.Overloaded("later", retry_after=40.0),
    gw.UpstreamTimeout("some time"),
    gw.QuotaExceeded("next month"),
    gw.NotSignedIn("a person must act"),
    gw.ModelNotFound("never"),
]


def test_when_all_fail_the_error_is_told_that_says_when_to_come_back() -> None:
    """In the order above; one that lasts for hours is no help."""
    asked = [(f"m{at}", error) for at, error in enumerate(USEFUL)]
    for at in range(len(asked)):
        told = gw.summarize_errors(asked[at:][::-1])
        assert (type(told), told.message) == (type(USEFUL[at]), USEFUL[at].message)
    hours = gw.RateLimited("in hours", retry_after=7200.0)
    assert gw.summarize_errors([("a", hours), ("b", USEFUL[1])]).message == "later"


def test_the_sum_names_all_who_were_asked_and_changes_nobody_s_error() -> None:
    first = gw.RateLimited("slow down", hint="Wait.", retry_after=9.0)
    told = gw.summarize_errors([("copilot/a", first), ("kiro/b", gw.NotSignedIn("who?"))])
    assert told.text() == (
        "slow down Wait. All of these were tried: copilot/a (rate_limited), kiro/b (not_signed_in)."
    )
    assert (told.retry_after, first.hint) == (9.0, "Wait.")


# ---- the rate limit ------------------------------------------------------------------------------


def test_requests_of_one_address_keep_their_gap_and_others_are_free() -> None:
    limiter = gw.RateLimiter(2.0)
    assert limiter.wait_for("a", 10.0) == 0
    assert limiter.wait_for("a", 10.5) == 1.5
    assert limiter.wait_for("b", 10.5) == 0
    assert limiter.wait_for("a", 12.0) == 0
    assert limiter.wait_for("a", 12.1) == pytest.approx(1.9)


def test_a_refused_request_does_not_push_the_next_one_further_away() -> None:
    limiter = gw.RateLimiter(1.0)
    limiter.wait_for("a", 0.0)
    waits = [limiter.wait_for("a", at) for at in (0.25, 0.5, 0.75)]
    assert waits == [0.75, 0.5, 0.25]
    assert limiter.wait_for("a", 1.0) == 0


def test_no_gap_means_no_limit_and_no_memory() -> None:
    limiter = gw.RateLimiter(0.0)
    assert {limiter.wait_for("a", 1.0) for _ in range(5)} == {0.0}
    assert limiter.next_at == {}


def test_the_limiter_forgets_addresses_that_may_come_again() -> None:
    limiter = gw.RateLimiter(1.0)
    for number in range(limiter.MAX_CLIENTS):
        limiter.wait_for(str(number), 0.0)
    assert limiter.wait_for("new", 5.0) == 0
    assert len(limiter.next_at) == 1
