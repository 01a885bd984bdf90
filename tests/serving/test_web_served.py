"""The page on the real server, with models that a training has made a moment ago."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

from playwright.sync_api import Page, expect

from tests.browser import browser  # noqa: F401 - a fixture
from tests.training.runs import config_for, train, write_corpus

KEY = "open-sesame"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    train(config_for(folder / "run", write_corpus(folder), context_length=128))
    command = [sys.executable, "-m", "holdfast", "--lang", "en", "serve", str(folder / "run")]
    with subprocess.Popen(
        [*command, "--port", "0", "--api-key", KEY], stdout=subprocess.PIPE,
        text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdout
        said = process.stdout.readline()
        found = re.search(r"http://[\d.:]+", said)
        assert found, said
        yield found[0] + "/"
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:  # noqa: F811
    context = browser.new_context(locale="en-US")
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if "Policy" in said.text else None)
    page.goto(address)
    page.fill("#key-input", KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".lane-name")).to_have_text("best")
    page.fill("#param-temperature", "1.5")
    yield page
    context.close()
    assert complaints == []


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    expect(page.locator("body.busy")).to_have_count(0, timeout=30_000)


def metric(address: str, name: str) -> float:
    request = urllib.request.Request(
        f"{address}metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}\S* (\S+)$", text, re.MULTILINE))


def test_two_checkpoints_of_a_run_continue_a_text_and_chat(page: Page) -> None:
    expect(page.locator(".lane .facts")).to_have_text(
        re.compile(r"step \d+ · epoch 2 · val loss \d\.\d{4}")
    )
    page.click("#compare-button")
    expect(page.locator(".lane-name")).to_have_text(["best", "model_epoch_1"])  # not itself again
    for mode in ("completion", "chat"):
        page.click(f"#mode-{mode}")
        ask(page, "今天天气")
        done(page)
        expect(page.locator(".answer")).to_have_count(2)
        expect(page.locator(".error").filter(visible=True)).to_have_count(0)
        for n in (0, 1):
            figures = page.locator(".answer-foot .facts").nth(n)
            expect(figures).to_contain_text(
                re.compile(r"seed \d+ · (ended by itself|length limit)")
            )


def test_the_same_seed_makes_the_same_text_and_a_long_text_goes_on(page: Page) -> None:
    page.fill("#param-seed", "7")
    page.fill("#param-max_tokens", "60")
    ask(page, "今天天气")
    done(page)
    first = page.locator(".answer .made").inner_text()
    assert first
    page.click(".regenerate")
    done(page)
    assert page.locator(".answer .made").inner_text() == first
    for _ in range(4):  # past the 128 tokens that the model sees
        page.click(".continue")
        done(page)
        expect(page.locator(".error").filter(visible=True)).to_have_count(0)
    assert len(page.locator(".answer .made").inner_text()) > len(first)


def test_stop_frees_the_server(page: Page, address: str) -> None:
    before = metric(address, "holdfast_cancelled_requests_total")
    page.fill("#param-frequency_penalty", "-2")  # rewards what was said: it runs in a circle
    page.fill("#param-max_tokens", "128")
    for seed in range(8):  # one of them is stopped before its end
        page.fill("#param-seed", str(seed))
        ask(page, "今")
        page.wait_for_selector("body.busy")
        page.keyboard.press("Escape")
        done(page)
        if metric(address, "holdfast_cancelled_requests_total") > before:
            break
    assert metric(address, "holdfast_cancelled_requests_total") > before


def test_a_prompt_that_is_too_long_is_told_in_the_servers_words(page: Page) -> None:
    ask(page, "今天天气" * 100)
    expect(page.locator(".answer .error")).to_contain_text("maximum context length is 128 tokens")
