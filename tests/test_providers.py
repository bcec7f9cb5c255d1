"""What providers share: how a refused sign-in is left alone, what a look at a sign-in costs."""

from __future__ import annotations

import asyncio

import pytest

import aiclient_api as gw


def test_a_sign_in_that_fails_for_days_is_still_left_alone_for_minutes() -> None:
    async def fail() -> list[int]:
        breaker = gw.Breaker(first_s=1.0, max_s=gw.SIGN_IN_RETRY_MAX_SECONDS)
        waits = []
        for _ in range(2000):
            waits.append(round(breaker.open("secret", gw.Overloaded("busy"))))
            breaker.cooldowns["secret"].until = asyncio.get_running_loop().time()  # it is over
        return waits

    waits = asyncio.run(fail())
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-1] == gw.SIGN_IN_RETRY_MAX_SECONDS


def test_models_that_clients_make_up_rest_in_a_bounded_table() -> None:
    async def refuse() -> list[str]:
        rests = gw.Breaker("p")
        rests.open("", gw.RateLimited("all"), 60)
        for number in range(gw.MAX_COOLDOWNS * 3):
            rests.open(f"made-up-{number}", gw.RateLimited("busy"), 60)
        return [row["model"] for row in rests.rows()]

    models = asyncio.run(refuse())
    assert len(models) == gw.MAX_COOLDOWNS
    assert {"*", f"made-up-{gw.MAX_COOLDOWNS * 3 - 1}"} <= set(models)


def test_a_list_that_no_code_can_read_is_an_error_of_its_provider_alone() -> None:
    async def fetch() -> dict[str, gw.Model]:
        raise TypeError

    async def ask() -> None:
        await gw.Catalogue("p", fetch).get()

    with pytest.raises(gw.ApiError, match="log"):
        asyncio.run(ask())
