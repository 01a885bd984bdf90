"""The page in a real browser: languages, themes, phones, keyboards, safety, and what goes wrong."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Page, expect

from tests.serving import pages
from tests.serving.pages import TEXT, OpenPage, ask, choose, done, made
from tests.serving.stand_in import PIECES, StandIn, problem

browser, started = pages.browser, pages.started  # fixtures
server, open_page = pages.server, pages.open_page

# -------------------------------------------------------------------------- languages and looks


def test_the_browser_chooses_the_language_until_a_person_does(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    expect(page.locator("#mode-completion")).to_have_text("续写")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    ask(page, "今日")
    done(page)
    expect(page.locator(".answer-foot")).to_contain_text("首个 token")
    page.click("#language-button")
    expect(page.locator("#mode-completion")).to_have_text("Completion")
    expect(page.locator(".answer-foot")).to_contain_text("first token")
    page.reload()
    expect(page.locator("#mode-completion")).to_have_text("Completion")
    english = open_page(locale="fr-FR")
    expect(english.locator("#mode-completion")).to_have_text("Completion")


def test_every_word_is_there_in_both_languages(open_page: OpenPage) -> None:
    page = open_page()
    words = page.evaluate("async () => (await import('./static/strings.js')).STRINGS")
    fields = re.compile(r"\{\w+\}")
    assert list(words["en"]) == list(words["zh"])
    for name, english in words["en"].items():
        assert sorted(fields.findall(english)) == sorted(fields.findall(words["zh"][name])), name
    same = {name for name, text in words["en"].items() if text == words["zh"][name]}
    assert same == {"top_p", "top_k"}
    assert "{" not in page.locator("body").inner_text()


def test_dark_follows_the_system_and_the_switch(open_page: OpenPage) -> None:
    def background(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3

    assert background(open_page(color_scheme="light")) > 200
    page = open_page(color_scheme="dark")
    assert background(page) < 50
    for scheme, low, high in (("light", 200, 255), ("dark", 0, 50)):  # while the page is open
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("html")).to_have_attribute("data-theme", scheme)
        assert low <= background(page) <= high
    page.click("#theme-button")
    assert background(page) > 200
    page.reload()
    assert background(page) > 200
    page.emulate_media(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert background(page) > 200, "what was chosen stays"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_background(open_page: OpenPage, scheme: str) -> None:
    """WCAG 2.2, contrast AA: 4.5 to 1 for text, 3 to 1 for the edge of a control."""
    page = open_page(color_scheme=scheme)

    colours = page.evaluate("""() => { const style = getComputedStyle(document.body);
        const names = ["paper", "surface", "raised", "edge", "ink", "muted", "accent", "on-accent",
            "second", "on-second", "danger", "danger-paper"].map((name) => `--${name}`);
        return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name)])); }""")

    def light(name: str) -> float:
        parts = [int(colours[name].strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    for ink in ("--ink", "--muted", "--accent", "--second"):
        for paper in ("--paper", "--surface", "--raised"):
            assert contrast(ink, paper) >= 4.5, (ink, paper)
    pairs = [("on-accent", "accent"), ("on-second", "second"), ("danger", "danger-paper")]
    for ink, paper in [(f"--{one}", f"--{other}") for one, other in pairs]:
        assert contrast(ink, paper) >= 4.5, (ink, paper)
    assert contrast("--edge", "--surface") >= 3


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_a_phone_never_scrolls_sideways(
    server: StandIn, open_page: OpenPage, language: str
) -> None:
    server.pieces = ["a" * 300, "，一段很长的文字" * 20]
    server.models[1]["id"] = "a_checkpoint_with_a_very_long_name_of_step_12345678"
    page = open_page(360, 740, locale=language)

    def fits() -> None:
        inner = page.evaluate("""() => [...document.querySelectorAll("body *")]
            .filter((one) => one.getBoundingClientRect().right > 360.5 && one.checkVisibility()
                && !one.closest(".hidden, .skip")).map((one) => one.outerHTML.slice(0, 80))""")
        assert inner == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

    fits()
    ask(page, "b" * 200)
    done(page)
    fits()
    page.click("#mode-chat")
    page.click("#compare-button")
    ask(page, "b" * 200)
    done(page)
    fits()
    for panel in ("settings", "history"):
        page.click(f"#{panel}-button")
        expect(page.locator(f"#{panel}")).to_be_visible()
        fits()
        page.keyboard.press("Escape")
        expect(page.locator(f"#{panel}")).to_be_hidden()


def test_everything_that_can_be_pressed_or_filled_has_a_name(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    page.click("#compare-button")
    page.click("#history-button")
    ask(page, "今日")
    done(page)
    nameless = page.evaluate("""() => [
        ...document.querySelectorAll("button, input, select, textarea")
    ].filter((one) => !one.closest("[aria-hidden]") && !(one.ariaLabel || one.textContent.trim()
        || one.labels?.[0]?.textContent.trim())).map((one) => one.outerHTML)""")
    assert [one for one in nameless if "aria-hidden" not in one] == []
    assert page.locator("#turns").get_attribute("aria-live") == "polite"
    assert page.locator(".answer").first.get_attribute("aria-busy") == "false"


# -------------------------------------------------------------------------------------- safety


def test_what_anybody_wrote_is_text_and_never_html(server: StandIn, open_page: OpenPage) -> None:
    evil = '<img src=x onerror="window.hit = 1"><script>window.hit = 2</script><b>粗</b>'
    server.pieces = [evil[i : i + 5] for i in range(0, len(evil), 5)]
    server.models[0]["id"] = server.models[1]["id"] = evil
    page = open_page()
    choose(page, 0, evil)
    ask(page, evil)
    done(page)
    expect(made(page)).to_have_text(evil)
    page.click("#compare-button")
    page.click("#mode-chat")
    server.refuse = [problem(400, evil)]
    ask(page, evil)
    done(page)
    expect(page.locator(".error").filter(visible=True)).to_contain_text(evil)
    page.click("#history-button")
    page.reload()
    done(page)
    assert page.locator("#turns img, #turns script, #turns b, #history b, .lanes img").count() == 0
    assert page.evaluate("window.hit") is None


# ------------------------------------------------------------------------------------ keyboard


def test_shift_enter_breaks_the_line_and_enter_sends(server: StandIn, open_page: OpenPage) -> None:
    page = open_page()
    page.fill("#prompt", "一")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert server.requests == []
    page.keyboard.press("Enter")
    done(page)
    assert server.requests[0]["prompt"] == "一\ntwo"
    expect(page.locator("#prompt")).to_have_value("")
    page.fill("#prompt", "  ")
    page.keyboard.press("Enter")
    assert len(server.requests) == 1


def test_enter_that_ends_a_composition_of_chinese_sends_nothing(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    page.focus("#prompt")
    devtools = page.context.new_cdp_session(page)
    devtools.send(
        "Input.imeSetComposition", {"text": "jintian", "selectionStart": 7, "selectionEnd": 7}
    )
    page.evaluate("""() => document.addEventListener("keydown", (event) => {
        window.composing = event.isComposing;
    }, {capture: true, once: true})""")
    page.keyboard.press("Enter")
    assert (
        page.evaluate("window.composing") is True
    )  # the browser does what it does with a real one
    page.locator("#prompt").dispatch_event("keydown", {"key": "Enter", "keyCode": 229})  # Safari
    page.wait_for_timeout(100)
    assert server.requests == []
    devtools.send("Input.insertText", {"text": "今天"})
    page.keyboard.press("Enter")
    done(page)
    # (a driven key is typed as well: a real input method would have eaten the line break)
    assert [request["prompt"].strip() for request in server.requests] == ["今天"]


# -------------------------------------------------------------------------------------- errors


def test_a_key_is_asked_for_kept_in_the_tab_and_used(server: StandIn, open_page: OpenPage) -> None:
    server.key = "geheim"
    page = open_page(ready=False)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key-input", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-title")).to_have_text("The server did not accept the key.")
    page.fill("#key-input", "geheim")
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#notice")).to_be_hidden()
    ask(page, "今日")
    expect(made(page)).to_have_text(TEXT)
    done(page)
    stored = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "geheim" not in stored[0]
    assert "geheim" in stored[1]
    server.key = "another"  # the server was started again
    page.click(".regenerate")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key-input", "another")
    page.keyboard.press("Enter")
    expect(made(page)).to_have_text(TEXT)  # asked again by itself


def test_a_busy_server_says_when_to_try_again(server: StandIn, open_page: OpenPage) -> None:
    page = open_page()
    server.refuse = [problem(429, "Too many requests.", **{"Retry-After": "2"})]
    ask(page, "今日")
    error = page.locator(".answer .error")
    expect(error).to_contain_text("Try again in 2 s.")
    expect(error).to_contain_text("You can try again now.")
    error.get_by_role("button").click()
    expect(made(page)).to_have_text(TEXT)
    expect(error).to_be_hidden()


def test_a_connection_that_breaks_keeps_the_text_and_offers_another_try(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    server.break_after = 3
    ask(page, "今日")
    error = page.locator(".answer .error")
    expect(error).to_contain_text("connection was lost")
    expect(made(page)).to_have_text("".join(PIECES[:3]))
    server.break_after = None
    error.get_by_role("button").click()
    expect(made(page)).to_have_text(TEXT)  # anew, with the same seed
    assert server.requests[0]["seed"] == server.requests[1]["seed"]


def test_what_the_server_objects_to_is_told_in_its_words(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    server.refuse = [problem(400, "The prompt has 300 tokens, the model sees 256.")]
    ask(page, "今日")
    expect(page.locator(".answer .error")).to_contain_text("The prompt has 300 tokens")


def test_a_server_that_is_gone_is_told_and_asked_again(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#notice")).to_contain_text("cannot be reached")
    expect(page.locator("#send-button")).to_be_disabled()
    page.unroute("**/v1/models")
    page.locator("#notice button").click()
    expect(page.locator(".lane-name")).to_have_text("best")
    expect(page.locator("#notice")).to_be_hidden()


def test_the_page_works_where_the_browser_keeps_nothing(
    open_page: OpenPage, server: StandIn
) -> None:
    page = open_page()
    page.add_init_script("""for (const name of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, name, {get() { throw new DOMException("denied"); }});""")
    page.reload()
    ask(page, "今日")
    expect(made(page)).to_have_text(TEXT)
    assert json.dumps(server.requests[0])
