"""What providers share: how a refused sign-in is left alone, what a look at a sign-in costs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

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


def test_a_built_in_list_stands_in_for_a_minute_but_not_for_a_sign_in() -> None:
    error: gw.ApiError = gw.Overloaded("busy")

    async def fetch() -> dict[str, gw.Model]:
        raise error

    async def ask() -> float:
        catalogue = gw.Catalogue("p", fetch)
        catalogue.built_in = {"m": gw.Model(id="m", provider="p")}
        assert set(await catalogue.get()) == {"m"} == set(catalogue.listed() or ())
        return catalogue.fetched_at + gw.MODELS_FRESH_SECONDS - time.monotonic()

    assert 0 < asyncio.run(ask()) <= gw.MODELS_RETRY_SECONDS
    error = gw.NotSignedIn("gone")
    with pytest.raises(gw.NotSignedIn):
        asyncio.run(ask())


class SlowAccount(gw.CopilotAccount):
    """An account whose service answers when it is told to."""

    exchanges = 0
    may_answer: asyncio.Event

    async def exchange(self, saved: gw.CopilotToken | None) -> gw.CopilotToken:
        """A new token."""
        self.exchanges += 1
        await self.may_answer.wait()
        token = f"token-{self.exchanges}"
        return gw.CopilotToken(token, gw.COPILOT_ANY_HOST, time.time() + 1500, 1200)


def test_one_refresh_serves_all_and_outlives_the_request_that_began_it(tmp_path: Path) -> None:
    async def story() -> None:
        paths = gw.Paths(str(tmp_path), str(tmp_path))
        gw.save_private_json(paths.token_file("c"), {"github_token": "gho_" + "a" * 36})
        client = gw.HttpClient(gw.NetworkConfig(), gw.Ticker())
        account = SlowAccount(gw.CopilotProvider("c", gw.CopilotConfig(), paths, client), paths)
        account.may_answer = asyncio.Event()
        first, second = (asyncio.ensure_future(account.get()) for _ in range(2))
        while not account.exchanges:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        account.may_answer.set()
        token = await second
        assert (first.cancelled(), token.access_token, account.exchanges) == (True, "token-1", 1)
        renewed = await account.renew(token)
        assert renewed is not None and renewed.access_token == "token-2"
        assert await account.renew(token) is renewed  # another task was quicker
        assert await account.renew(renewed) is None  # no storm of exchanges
        assert account.exchanges == 2
        account.close()
        client.close()

    asyncio.run(story())
