"""The page in a real browser: texts, parameters, two checkpoints; what of it reaches the server."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

from tests.serving import pages
from tests.serving.pages import TEXT, OpenPage, ask, choose, done, made
from tests.serving.stand_in import StandIn, problem

browser, started = pages.browser, pages.started  # fixtures
server, open_page = pages.server, pages.open_page

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


def test_no_default_is_more_than_the_model_can_see(server: StandIn, open_page: OpenPage) -> None:
    server.models = [{**one, "context_length": 64} for one in server.models]
    page = open_page()
    expect(page.locator("#param-max_tokens")).to_have_value("64")
    expect(page.locator("#param-max_tokens-help")).to_contain_text("(default 64)")
    page.click("#reset-button")
    expect(page.locator("#param-max_tokens")).to_have_value("64")
    ask(page, "今日")
    done(page)
    assert server.requests[0]["max_tokens"] == 64


def test_one_token_is_not_several(server: StandIn, open_page: OpenPage) -> None:
    server.pieces, server.each = ["，"], 1
    page = open_page()
    ask(page, "今日")
    done(page)
    expect(page.locator(".answer")).to_contain_text(re.compile(r"· 1 token ·"))


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
