"""The page in a real browser: live values, a dropped connection, languages, themes, a phone."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from holdfast.monitor.run_view import RunView
from holdfast.monitor.web.report import write_report
from tests.browser import browser  # noqa: F401 - a fixture
from tests.monitor.web.runs import HOST, LiveRun, Server, finished_run, serving

NASTY = "<img src=x onerror=alert(1)>"
SAMPLE = "</script><script>document.title='owned'</script><b>fett</b>"
Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:  # noqa: F811 - the fixture
    """Opens pages; in the end no script of theirs has failed, and nothing came from elsewhere."""
    problems: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_(url: str, *, width: int = 1200, height: int = 900, **options: Any) -> Page:
            options.setdefault("locale", "en-US")
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
            page.on("request", lambda request: _only_from_here(request.url, problems))
            page.goto(url)
            return page

        yield open_
    assert not problems


def _only_from_here(url: str, problems: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")):
        problems.append(url)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one interrupted and continued, one with a name and a text that mean harm."""
    root = tmp_path_factory.mktemp("runs")
    with LiveRun(root / "first", total=300, training={"learning_rate": 0.001}) as run:
        run.steps(90)
        run.finish_epoch(4.0)
        run.steps(50)
        run.interrupt()
    with LiveRun(root / "first", total=300, training={"learning_rate": 0.001}) as run:
        run.records.event("resumed", 150)
        run.steps(40)
        run.finish_epoch(2.5)
    with LiveRun(
        root / NASTY.replace("/", ""), total=100, training={"learning_rate": 0.002}
    ) as run:
        run.steps(90)
        run.finish_epoch(3.0, sample=SAMPLE)
        run.records.event("finished", 100)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        yield server


def choose(page: Page, name: str) -> None:
    page.locator(".run button").filter(has_text=name).click()
    expect(page.locator("h1")).to_have_text(name)


def overflow(page: Page) -> int:
    """How far the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


class Line:
    """A wire between the page and the server that a test can cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._ends: list[socket.socket] = []
        self._down = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _address = self._listener.accept()
            except OSError:
                return
            if self._down:
                here.close()
                continue
            there = socket.create_connection((HOST, self._target))
            self._ends += [here, there]
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._down = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._down = False

    def close(self) -> None:
        self.cut()
        self._listener.close()


def test_a_training_that_starts_later_appears_and_a_dropped_line_loses_nothing(
    tmp_path: Path, open_page: Open
) -> None:
    with serving(tmp_path) as server:
        line = Line(server.port)
        page = open_page(server.url.replace(str(server.port), str(line.port), 1))
        live = page.locator(".live")
        expect(live).to_have_text("Live")
        expect(page.locator("nav")).to_contain_text("No runs here yet")
        assert "token" not in page.url
        with LiveRun(tmp_path / "later") as run:
            run.steps(60)
            expect(page.locator("h1")).to_have_text("later", timeout=10_000)
            expect(page.locator(".stats")).to_contain_text("step 60 of 400")
            expect(page.locator(".verdict")).to_contain_text("Nothing is on the disk yet")
            page.wait_for_selector(".plot .main-svg")
            line.cut()
            expect(live).to_contain_text("Disconnected")
            run.finish_epoch(2.3456)
            line.mend()
            expect(live).to_have_text("Live", timeout=10_000)
            expect(page.locator(".stats")).to_contain_text("2.3456")
            expect(page.locator(".verdict")).to_contain_text("A power cut now would cost")
            expect(page.locator(".points tbody tr")).to_have_count(1)
            points = page.evaluate("document.querySelector('.plot.tall').data.map(t => t.x.length)")
            assert points[0] == 10, "the curve has every point once, those of the outage too"
        expect(page.locator("h1 + .badge")).to_have_text("stopped")
        line.close()


def test_a_killed_run_says_so_and_what_is_left_of_it(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int | None] = [None]
    monkeypatch.setattr(RunView, "memory_step", property(lambda _view: held[0]))
    with serving(tmp_path) as server:
        with LiveRun(tmp_path / "run") as run:
            run.steps(50)
            held[0] = 44
            page = open_page(server.url)
            process = page.locator(".tier").first
            expect(process).to_contain_text("lose 6 steps")
            held[0] = 49  # a snapshot writes no line
            expect(process).to_contain_text("lose 1 step", timeout=10_000)
            expect(page.locator(".pairs")).not_to_contain_text("Not filling")
        expect(page.locator(".verdict")).to_contain_text("step 49 waits in memory")
        expect(page.locator(".marks")).to_contain_text("Broke off at step 50")
        held[0] = None  # the machine was started anew
        with LiveRun(tmp_path / "run") as run:
            run.steps(20)
        expect(page.locator(".verdict")).to_contain_text("Nothing was saved:", timeout=10_000)
        expect(page.locator(".tiers")).not_to_contain_text("every byte checked")


def test_a_loss_that_is_no_number_is_not_just_a_curve_that_ends(
    tmp_path: Path, open_page: Open
) -> None:
    with serving(tmp_path) as server, LiveRun(tmp_path / "run") as run:
        run.steps(50)
        run.steps(50, loss=float("nan"))
        page = open_page(server.url)
        expect(page.locator(".warning")).to_contain_text("NaN or infinite since step 60")
        expect(page.locator(".stats")).to_contain_text("NaN")
        run.steps(10, loss=4.0)
        said = page.get_by_text("between steps 60 and 100")
        expect(said).to_be_visible(timeout=10_000)
        expect(page.locator(".warning")).to_have_count(0)


def test_a_comparison_speaks_the_language_of_its_reader(tmp_path: Path, open_page: Open) -> None:
    with LiveRun(tmp_path / "unsaved") as run:
        run.steps(50)
    with LiveRun(tmp_path / "saved") as run:
        run.steps(90)
        run.finish_epoch(3.0)
    with serving(tmp_path) as server:
        page = open_page(server.url, locale="zh-CN")
        for name in ("unsaved", "saved"):
            box = page.locator(".run").filter(has_text=name).locator("input").last
            box.check() if not box.is_checked() else None
        expect(page.locator("main")).to_contain_text("unsaved 还没有检查点")
        expect(page.locator("main")).not_to_contain_text("There are no checkpoints")


def test_a_wrong_token_is_refused_and_a_new_start_is_explained(
    root: Path, server: Server, open_page: Open
) -> None:
    page = open_page(f"http://{HOST}:{server.port}/?token=wrong")
    expect(page.locator("h1")).to_have_text("401 Unauthorized")
    expect(page.locator("body")).to_contain_text("holdfast dashboard")
    page.goto(server.url)
    expect(page.locator(".live")).to_have_text("Live")
    page.context.clear_cookies()  # what another token at the next start comes to
    page.evaluate("window.dispatchEvent(new Event('x'))")
    page.locator(".run input").first.check()
    page.locator(".run input").nth(1).check()
    expect(page.locator(".live")).to_contain_text("started anew")


def test_nothing_that_a_run_contains_becomes_part_of_the_page(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url)
    name = NASTY.replace("/", "")
    choose(page, name)
    expect(page.locator("blockquote")).to_have_text(SAMPLE)
    page.wait_for_selector(".plot .main-svg")
    assert page.locator("img").count() == 0 and page.locator("blockquote b").count() == 0
    assert page.title() == f"{name} · Holdfast"
    for box in range(2):
        page.locator(".run input").nth(box).check()
    expect(page.locator(".series li")).to_have_count(2)
    expect(page.get_by_role("heading", name="Configuration that differs")).to_be_visible()
    assert page.locator("img").count() == 0
    rows = page.locator("section", has_text="Configuration that differs").locator("tbody tr")
    expect(rows).to_contain_text(["training.learning_rate"])


def test_light_and_dark_follow_the_system_and_the_switch_is_remembered(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    choose(page, "first")
    page.wait_for_selector(".plot .main-svg")
    assert page.evaluate(background) == "rgb(18, 22, 26)"
    tick = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    dark = page.evaluate(tick)
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.emulate_media(color_scheme="dark")
    page.locator("#theme").click()
    assert page.evaluate(background) == "rgb(246, 247, 248)"
    assert page.evaluate(tick) != dark, "the curves follow"
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_both_languages_from_the_browser_and_by_the_switch(server: Server, open_page: Open) -> None:
    page = open_page(server.url, locale="zh-CN")
    choose(page, "first")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator(".marks")).to_contain_text("在第 150 步中断，状态已保存")
    expect(page.locator(".live")).to_have_text("实时")
    page.locator("#lang").click()
    expect(page.locator(".marks")).to_contain_text("Interrupted at step 150")
    page.reload()
    expect(page.locator(".live")).to_have_text("Live")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url, width=360, height=740, has_touch=True, locale="zh-CN")
    choose(page, "first")
    page.wait_for_selector(".plot .main-svg")
    page.locator("summary").click()
    assert overflow(page) <= 0
    for box in range(2):
        page.locator(".run input").nth(box).check()
    expect(page.get_by_role("heading", name="不同的配置")).to_be_visible()
    page.wait_for_selector(".plot .main-svg")
    assert overflow(page) <= 0


def test_the_keyboard_reaches_everything_and_what_is_shown_has_a_name(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url)
    choose(page, "first")
    page.wait_for_selector(".plot .main-svg")
    page.reload()
    page.wait_for_selector(".plot .main-svg")
    reached = []
    for _i in range(8):
        page.keyboard.press("Tab")
        here = "document.activeElement"
        reached.append(page.evaluate(f"{here}.ariaLabel || {here}.textContent || {here}.name"))
    assert reached[0] == "To the content"
    assert "Compare first" in reached and any(text.startswith("firststopped") for text in reached)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button,input,[role=img],[role=progressbar]')].filter("
        "e => !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent)).length"
    )
    assert nameless == 0
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy: Check every byte").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("holdfast verify ")


def test_the_keyboard_stays_where_it_is_when_its_key_draws_the_page_anew(
    server: Server, open_page: Open
) -> None:
    page = open_page(server.url)
    choose(page, "first")
    for name in ("#theme", "#lang"):
        page.locator(name).focus()
        page.keyboard.press("Enter")
        expect(page.locator(name)).to_be_focused()
    page.locator("input[name=axis]").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("input[name=axis][value=time]")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("input[name=axis][value=step]")).to_be_focused()


def test_a_run_that_is_deleted_leaves_the_comparison(tmp_path: Path, open_page: Open) -> None:
    for name in ("one", "two", "three"):
        finished_run(tmp_path / name, (3.0,))
    with serving(tmp_path) as server:
        page = open_page(server.url)
        for name in ("one", "two", "three"):
            box = page.get_by_label(f"Compare {name}", exact=True)
            if not box.is_checked():
                box.check()
        table = page.get_by_role("table", name="Metrics of the best checkpoints")
        expect(table).to_contain_text("three")
        shutil.rmtree(tmp_path / "three")
        expect(table).not_to_contain_text("three", timeout=10_000)
        expect(page.locator("h1")).to_have_text("Comparison")


def test_a_report_opens_from_a_file_without_any_server(
    root: Path, tmp_path: Path, open_page: Open
) -> None:
    file = tmp_path / "report.html"
    write_report(root / NASTY.replace("/", ""), file, lang="zh")
    page = open_page(file.as_uri(), width=360, height=740)
    expect(page.locator(".live")).to_contain_text("报告生成于")
    page.wait_for_selector(".plot .main-svg")
    expect(page.locator("blockquote")).to_have_text(SAMPLE)
    assert page.locator("img").count() == 0 and "owned" not in page.title()
    assert overflow(page) <= 0
    page.locator("#lang").click()
    expect(page.locator(".verdict")).to_contain_text("Everything is on the disk")
