"""The page in a real browser: what a person sees, and what of it reaches the server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Page, expect

from tests.browser import browser  # noqa: F401 - a fixture
from tests.serving.stand_in import PIECES, StandIn, problem, running

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


# --------------------------------------------------------------------------------------- texts


def test_a_text_appears_piece_by_piece_after_its_prompt(
    server: StandIn, open_page: OpenPage
) -> None:
    server.delay = 0.04
    page = open_page()
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const made = document.querySelector(".answer .made");
            if (made && made.textContent !== window.seen.at(-1)) window.seen.push(made.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""")
    ask(page, "今日")
    done(page)
    expect(page.locator(".answer .text")).to_have_text("今日" + TEXT)
    seen = [text for text in page.evaluate("window.seen") if text]
    assert len(seen) >= 5  # of 9 pieces; two may come together
    assert all(TEXT.startswith(text) for text in seen)
    assert server.requests[0]["prompt"] == "今日"
    assert server.requests[0]["model"] == "best"
    figures = page.locator(".answer-foot .facts")
    expect(figures).to_contain_text(
        re.compile(r"[\d.]+ tokens/s · first token 0\.\d\d s · 27 tokens")
    )


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_has_come(
    server: StandIn, open_page: OpenPage, way: str
) -> None:
    server.pieces, server.delay = ["字"] * 1000, 0.02
    page = open_page()
    ask(page, "今日")
    expect(made(page)).to_contain_text("字字")
    expect(page.locator("#send-button")).to_have_text("Stop")
    if way == "button":
        page.click("#send-button")
    else:
        page.keyboard.press("Escape")
    done(page)
    assert 2 <= len(made(page).inner_text()) < 500
    expect(page.locator(".answer-foot")).to_contain_text("stopped")
    page.wait_for_timeout(150)
    assert server.cancelled == 1
    expect(page.locator("#send-button")).to_have_text("Send")


def test_regenerate_draws_another_seed_unless_one_is_chosen(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    ask(page, "今日")
    done(page)
    server.pieces = ["另一段"]
    page.click(".regenerate")
    expect(made(page)).to_have_text("另一段")
    done(page)
    expect(page.locator(".turn")).to_have_count(1)
    first, second = (request["seed"] for request in server.requests)
    assert first != second
    page.fill("#param-seed", "42")
    page.click(".regenerate")
    expect(page.locator("#toast")).to_contain_text("seed is fixed")
    done(page)
    assert server.requests[2]["seed"] == 42
    expect(page.locator(".answer-foot")).to_contain_text("seed 42")


def test_the_last_message_can_be_edited_and_replaces_what_followed(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    page.click("#mode-chat")
    for message in ("一", "二"):
        ask(page, message)
        done(page)
    page.click(".edit")
    expect(page.locator("#prompt")).to_have_value("二")
    expect(page.locator("#editing")).to_be_visible()
    page.keyboard.press("Escape")  # not after all
    expect(page.locator("#editing")).to_be_hidden()
    page.click(".edit")
    ask(page, "三")
    done(page)
    expect(page.locator(".given")).to_have_text([re.compile("一"), re.compile("三")])
    said = [message["content"] for message in server.requests[-1]["messages"]]
    assert said == ["一", TEXT, "三"]


def test_continue_goes_on_where_the_text_ended(server: StandIn, open_page: OpenPage) -> None:
    server.finish = "length"
    page = open_page()
    ask(page, "今日")
    done(page)
    expect(page.locator(".answer-foot")).to_contain_text("length limit")
    page.click(".continue")
    expect(made(page)).to_have_text(TEXT * 2)
    done(page)
    assert server.requests[1]["prompt"] == "今日" + TEXT


def test_what_the_model_cannot_see_any_more_is_left_out_and_said(
    server: StandIn, open_page: OpenPage
) -> None:
    def too_long() -> Any:
        return problem(400, "This model's maximum context length is 9 tokens.",
                       "context_length_exceeded")  # fmt: skip

    page = open_page()
    server.refuse = [too_long()]
    ask(page, "今日")  # written just now: refused in the server's words, not cut behind one's back
    expect(page.locator(".answer .error")).to_contain_text("maximum context length")
    page.click(".regenerate")
    done(page)
    server.refuse = [too_long(), too_long()]
    page.click(".continue")
    expect(made(page)).to_have_text(TEXT * 2)
    done(page)
    whole = "今日" + TEXT
    assert server.requests[-1]["prompt"] == whole[-5:]  # a quarter of 20
    expect(page.locator(".answer-foot")).to_contain_text("the model read only the end")
    page.click("#mode-chat")
    for message in ("一", "二", "三"):
        server.refuse = [too_long()] if message == "三" else []
        ask(page, message)
        done(page)
    said = [message["content"] for message in server.requests[-1]["messages"]]
    assert said == ["二", TEXT, "三"]


def test_copy_takes_the_whole_text(open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "今日")
    done(page)
    page.click(".copy")
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "今日" + TEXT


def test_history_stays_in_the_tab_and_nowhere_else(
    open_page: OpenPage, started: tuple[StandIn, str]
) -> None:
    page = open_page()
    ask(page, "今日")
    done(page)
    page.click("#new-button")
    expect(page.locator("#empty")).to_be_visible()
    ask(page, "明日")
    done(page)
    page.reload()
    expect(made(page)).to_have_text(TEXT)
    page.click("#history-button")
    expect(page.locator("#history-list li")).to_have_text([re.compile("明日"), re.compile("今日")])
    page.locator("#history-list button").last.click()
    expect(page.locator(".answer .before")).to_have_text("今日")
    other = page.context.new_page()
    other.goto(started[1])
    expect(other.locator("#empty")).to_be_visible()
    page.click("#clear-button")
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


# ---------------------------------------------------------------------------------- parameters


def test_every_parameter_reaches_the_server_in_both_modes(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    wanted = {
        "temperature": 1.25, "top_p": 0.5, "top_k": 7, "max_tokens": 33, "seed": 5,
        "presence_penalty": 0.4, "frequency_penalty": -0.5,
    }  # fmt: skip
    for name, value in wanted.items():
        page.fill(f"#param-{name}", str(value))
    page.fill("#param-stop", "。\n\\n\\n")
    ask(page, "今日")
    done(page)
    page.click("#mode-chat")
    ask(page, "你好")
    done(page)
    paths = ["/v1/completions", "/v1/chat/completions"]
    assert [request["path"] for request in server.requests] == paths
    for request in server.requests:
        assert {name: request[name] for name in wanted} == wanted
        assert request["stop"] == ["。", "\n\n"]
        assert request["stream_options"] == {"include_usage": True}
    page.reload()  # they are remembered
    expect(page.locator("#param-top_k")).to_have_value("7")
    page.click("#reset-button")
    expect(page.locator("#param-top_k")).to_have_value("50")
    expect(page.locator("#param-seed")).to_have_value("")
    page.click("#mode-completion")
    ask(page, "今日")
    done(page)
    assert server.requests[-1]["temperature"] == 0.8
    assert "stop" not in server.requests[-1]


def test_values_out_of_range_and_a_slider_stay_within_it(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    for name, typed, kept in (
        ("temperature", "9", "2"), ("top_p", "-1", "0.01"), ("max_tokens", "99999", "256"),
        ("top_k", "2.6", "3"), ("presence_penalty", "", "0"),
    ):  # fmt: skip
        page.fill(f"#param-{name}", typed)
        page.keyboard.press("Tab")
        expect(page.locator(f"#param-{name}")).to_have_value(kept)
    page.locator("#param-temperature + input").fill("0.35")
    expect(page.locator("#param-temperature")).to_have_value("0.35")
    ask(page, "今日")
    done(page)
    assert server.requests[0]["temperature"] == 0.35


# -------------------------------------------------------------------------------- side by side


def test_two_checkpoints_stream_at_once_with_one_seed(server: StandIn, open_page: OpenPage) -> None:
    server.delay = 0.05
    page = open_page()
    page.click("#compare-button")
    expect(page.locator(".lane-name")).to_have_text(["best", "latest"])
    choose(page, 0, "model_epoch_1")
    choose(page, 1, "model_epoch_3")
    expect(page.locator(".lane .facts").first).to_contain_text(
        "step 620 · epoch 1 · val loss 3.9022"
    )
    ask(page, "今日")
    expect(page.locator(".answer.active")).to_have_count(2)
    expect(made(page, 0)).not_to_have_text("")
    expect(made(page, 1)).not_to_have_text("")
    assert page.locator(".answer.active").count() == 2  # both while both were running
    done(page)
    expect(page.locator(".answer strong")).to_have_text(["model_epoch_1", "model_epoch_3"])
    for lane in (0, 1):
        foot = page.locator(".answer-foot").nth(lane)
        expect(foot).to_contain_text(re.compile(r"tokens/s · first token \d\.\d\d s"))
    one, other = sorted(server.requests, key=lambda request: str(request["model"]))
    assert (one.pop("model"), other.pop("model")) == ("model_epoch_1", "model_epoch_3")
    assert one == other
    left, right = (page.locator(".answer").nth(lane).bounding_box() for lane in (0, 1))
    assert left and right
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]


def test_stop_ends_both(server: StandIn, open_page: OpenPage) -> None:
    server.pieces, server.delay = ["字"] * 1000, 0.02
    page = open_page()
    page.click("#compare-button")
    ask(page, "今日")
    expect(made(page, 1)).to_contain_text("字字")
    page.keyboard.press("Escape")
    done(page)
    page.wait_for_timeout(150)
    assert server.cancelled == 2


def test_in_a_chat_each_checkpoint_remembers_its_own_answers(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    page.click("#mode-chat")
    page.click("#compare-button")
    ask(page, "一")
    done(page)
    server.refuse = [problem(400, "too long")]  # one of the two does not answer
    ask(page, "二")
    done(page)
    ask(page, "三")
    done(page)
    lengths = sorted(len(request["messages"]) for request in server.requests[-2:])
    assert lengths == [3, 5]


# ---------------------------------------------------------------------------- what the model is


def test_the_bar_tells_the_checkpoint_and_when_a_better_one_has_come(
    server: StandIn, open_page: OpenPage
) -> None:
    page = open_page()
    page.clock.install()
    page.reload()
    expect(page.locator(".lane .facts")).to_have_text("step 1,240 · epoch 2 · val loss 3.2145")
    server.models[0] |= {"step": 2480, "val_loss": 3.1}
    page.clock.run_for(16_000)
    expect(page.locator(".lane .facts")).to_have_text("step 2,480 · epoch 2 · val loss 3.1000")
    expect(page.locator("#toast")).to_have_text("best is now step 2480.")


def test_a_server_that_tells_only_names_is_served_too(server: StandIn, open_page: OpenPage) -> None:
    server.models = [{"id": "model", "object": "model"}]
    page = open_page()
    expect(page.locator(".lane-name")).to_have_text("model")
    expect(page.locator("#compare-button")).to_be_hidden()
    ask(page, "今日")
    expect(made(page)).to_have_text(TEXT)


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
    page.click("#theme-button")
    assert background(page) > 200
    page.reload()
    assert background(page) > 200


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
