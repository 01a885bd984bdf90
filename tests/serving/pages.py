"""The page of the server opened in a browser, for the tests of what a person sees there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Page, expect

from tests.browser import browser  # noqa: F401 - a fixture
from tests.serving.stand_in import PIECES, StandIn, running

TEXT = "".join(PIECES)
OpenPage = Callable[..., Page]

expect.set_options(timeout=5000)


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[StandIn, str]]:
    server = StandIn()
    with running(server) as address:
        yield server, address


@pytest.fixture
def server(started: tuple[StandIn, str]) -> StandIn:
    started[0].reset()
    return started[0]


@pytest.fixture
def open_page(
    browser: Any,  # noqa: F811
    server: StandIn,
    started: tuple[StandIn, str],
) -> Iterator[OpenPage]:
    """Opens the page in a fresh profile; whatever the browser complains about fails the test."""
    contexts, complaints = [], []

    def open_page(
        width: int = 1280, height: int = 800, *, ready: bool = True, **options: Any
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, **{"locale": "en-US", **options}
        )
        contexts.append(context)
        page: Page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda said: complaints.append(said.text) if "Policy" in said.text else 0
        )
        page.goto(started[1])
        if ready:
            expect(page.locator(".lane").first).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")


def made(page: Page, n: int = 0) -> Any:
    """The text that the model has made, in the n-th answer on the page."""
    return page.locator(".answer .made").nth(n)


def done(page: Page) -> None:
    expect(page.locator("body.busy")).to_have_count(0)


def choose(page: Page, lane: int, model: str) -> None:
    page.locator(".lane select").nth(lane).select_option(model)
