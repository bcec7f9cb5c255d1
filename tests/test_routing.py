"""Routing: which provider a model name leads to, the rate limit, and what was used."""

from __future__ import annotations

import pytest

import aiclient_api as gw

CATALOGUES = {
    "copilot": {"gpt-4.1": gw.Model("gpt-4.1", "copilot"), "shared": gw.Model("shared", "copilot")},
    "work": {"shared": gw.Model("shared", "work"), "own-1.5": gw.Model("own-1.5", "work")},
    "echo": {"echo": gw.Model("echo", "echo")},
}
ALIASES = {"fast": "work/own-1.5", "plain": "gpt-4.1", "gpt-4.1": "echo/echo", "odd": "nobody/x"}


def router(default: str = "copilot", enabled: tuple[str, ...] = tuple(CATALOGUES)) -> gw.Router:
    """A router over three providers."""
    return gw.Router(gw.Config(default_provider=default, models=ALIASES), list(enabled))


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
    routes = router()
    named = routes.named(name, header)
    assert (named is not None) == explicit  # nobody's catalogue is needed for these
    route = named or routes.route(name, CATALOGUES)
    assert (route.provider, route.model, route.explicit) == (provider, model, explicit)


@pytest.mark.parametrize("name", ["", " ", "a b", "a\nb", "\N{SNOWMAN}", "x" * 201, "a?b", "a\\b"])
def test_what_is_no_model_name_is_refused(name: str) -> None:
    with pytest.raises(gw.InvalidRequest):
        router().named(name, None)


def test_a_header_must_name_an_enabled_provider() -> None:
    with pytest.raises(gw.InvalidRequest, match="copilot, work"):
        router(enabled=("copilot", "work")).named("gpt-4o", "echo")


def test_a_name_nobody_has_is_answered_with_the_nearest_when_there_is_no_default() -> None:
    with pytest.raises(gw.ModelNotFound) as caught:
        router("copilot", ("work", "echo")).route("own-1.6", CATALOGUES)
    assert "own-1.5" in caught.value.hint


def test_a_provider_that_could_not_list_its_models_is_still_the_default() -> None:
    route = router().route("gpt-4o", {"echo": CATALOGUES["echo"]})
    assert (route.provider, route.explicit) == ("copilot", False)


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
