"""The screen of the monitor, driven as a person would, at the sizes that matter."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from textual.pilot import Pilot

from holdfast.checkpoint.system.lock import FileLock
from holdfast.i18n import language, set_language
from holdfast.monitor.terminal import watcher
from holdfast.monitor.terminal.screen import Help, Monitor, Panel
from tests.manage.runs import Training, make_run
from tests.monitor.recorded import Recorded, ago

SMALL, LARGE = (80, 24), (120, 40)


@pytest.fixture(autouse=True)
def search_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "SEARCH_EVERY", 0.0)
    monkeypatch.setattr(watcher, "SHARE", 0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run with four checkpoints, a failed save, and 480 of 1000 steps."""
    directory = make_run(tmp_path / "runs" / "run")
    run = Recorded(directory)
    run.started(0, ago(400))
    run.steps(10, 400, ago(390), pace=0.5)
    run.metric("evaluation", 400, ago(200), val_loss=2.25)
    run.event("failed", ago(-15), step=250, reason="No space left on device")
    run.event("recovered", ago(-16), step=260, failures=1)
    run.started(400, ago(-20))
    run.steps(410, 480, ago(-30))
    return directory


def screen(pilot: Pilot[Any]) -> list[str]:
    """The lines that a person sees."""
    width, height = pilot.app.size
    return [strip.text for strip in pilot.app.screen._compositor.render_strips(pilot.app.size)][
        :height
    ] or [""] * width


def shown(pilot: Pilot[Any]) -> str:
    return "\n".join(screen(pilot))


async def until(pilot: Pilot[Any], text: str, *, gone: bool = False) -> str:
    """The screen as soon as it shows `text`, or no longer does."""
    for _time in range(400):
        await pilot.pause(0.05)
        if (text in shown(pilot)) != gone:
            return shown(pilot)
    raise AssertionError(f"{text!r} {'is still' if gone else 'is not'} on\n{shown(pilot)}")


Story = Callable[[Pilot[Any]], Awaitable[None]]


def play(root: Path, story: Story, size: tuple[int, int] = SMALL, interval: float = 0.1) -> Monitor:
    """Run the monitor on `root` at `size`, and the `story` with it."""
    app = Monitor(root, interval)

    async def act() -> None:
        async with app.run_test(size=size) as pilot:
            await story(pilot)

    run(act())
    return app


def run(act: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(act, 60))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_everything_that_matters_is_on_the_screen(directory: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        text = await until(pilot, "step 480/1000")
        for part in (
            str(directory)[-20:], "training", "epoch 5/10", "48.0 %", " left", "5,000 tokens/s",
            "train 0.2041", "smoothed 0.2041", "validation 2.2500",
            "power cut  80 steps", "kill       80 steps", "disk loss  all, no remote copy",
            "durable    step 400", "disk free", "disk full", "machine", "GPU",
            "model_epoch_4.pt", "model_epoch_3.pt", "model_epoch_2.pt", "latest", "best",
            "saving worked again at step 260", "? help", "q quit",
        ):  # fmt: skip
            assert part in text, part + "\n" + text
        assert any("\u2800" <= c <= "\u28ff" for c in text), "the curve"

    with FileLock(directory / ".run.lock"):
        play(directory, story, size)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 16), (40, 10), (20, 5), (200, 60)])
def test_it_can_be_drawn_at_any_size(directory: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await pilot.pause(0.5)
        lines = screen(pilot)
        assert len(lines) == size[1]
        assert all(cell_len(line) <= size[0] for line in lines)
        await pilot.resize_terminal(80, 24)
        assert "model_epoch_4.pt" in await until(pilot, "step 480/1000")

    play(directory, story, size)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_in_chinese_no_line_is_wider_than_the_screen(
    directory: Path, size: tuple[int, int]
) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        lines = screen(pilot)
        assert all(cell_len(line) == size[0] for line in lines), lines
        assert "训练" in "".join(lines)
        assert "80 " in "".join(lines)

    set_language("zh")
    play(directory, story, size)


def test_the_language_is_switched_by_a_key(directory: Path) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "What happened")
        await pilot.press("l")
        text = await until(pilot, "训练经历")
        assert "What happened" not in text
        assert language() == "zh"
        await pilot.press("l")
        await until(pilot, "What happened")

    play(directory, story)


def test_a_training_that_comes_grows_stops_and_goes_on_is_followed(tmp_path: Path) -> None:
    directory = tmp_path / "run"

    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "Waiting for a training")
        run = Recorded(directory)
        with Training(directory) as training:
            run.started(0, ago(0))
            run.step(10, ago(0), loss=4.5)
            text = await until(pilot, "train 4.5000")
            assert "none is durable yet" in text
            training.epoch(1, 3.25)
            run.metric("evaluation", 100, ago(0), val_loss=3.25)
            run.step(110, ago(-1), loss=3.5)
            await until(pilot, "model_epoch_1.pt")
            text = await until(pilot, "validation 3.2500")
            assert "training " in text
        await until(pilot, "stopped before the end")
        with Training(directory):  # resumes
            run.started(100, ago(-2))
            run.step(120, ago(-3), loss=3.125)
            text = await until(pilot, "train 3.1250")
            assert "training went on from step 100" in text
        run.metric("finished", 120, ago(-4))
        assert "training was finished at step 120" in await until(pilot, "finished")
        shutil.rmtree(directory)
        assert "waiting for a training in" in await until(pilot, "The directory is gone")
        Recorded(directory).started(0, ago(-5))
        Recorded(directory).step(10, ago(-6), loss=9.125)
        assert "is gone" not in await until(pilot, "train 9.1250")

    play(directory, story)


def test_a_run_among_several_is_chosen_by_arrow_and_number(tmp_path: Path) -> None:
    for name in ("alpha", "beta", "gamma"):
        Recorded(tmp_path / name).started(0, ago(10))
        Recorded(tmp_path / name).step(10, ago(9))
    os.utime(tmp_path / "alpha" / "metrics.jsonl", (time.time() + 9,) * 2)  # the newest is shown

    async def story(pilot: Pilot[Any]) -> None:
        assert "other run" in await until(pilot, "[1/3] ")
        await pilot.press("right")
        assert "beta" in (await until(pilot, "[2/3] ")).splitlines()[0]
        await pilot.press("left", "left")
        await pilot.press("3")
        assert "gamma" in (await until(pilot, "[3/3] ")).splitlines()[0]
        await pilot.press("right")
        assert "alpha" in (await until(pilot, "[1/3] ")).splitlines()[0]
        await pilot.press("9")
        await pilot.pause(0.3)
        assert "[1/3] " in shown(pilot)

    play(tmp_path, story)


def test_tab_and_arrows_go_from_panel_to_panel(directory: Path) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        been = [pilot.app.focused.id if pilot.app.focused else None]
        for key in ("tab", "down", "tab", "down"):
            await pilot.press(key)
            been.append(pilot.app.focused.id if pilot.app.focused else None)
        assert been == ["loss", "safety", "machine", "checkpoints", "events"]
        await pilot.press("up", "shift+tab")
        assert pilot.app.focused is not None
        assert pilot.app.focused.id == "machine"

    play(directory, story)


def test_a_panel_is_enlarged_and_scrolled(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", [4.0 - i / 20 for i in range(40)])

    async def story(pilot: Pilot[Any]) -> None:
        text = await until(pilot, "model_epoch_40.pt")
        assert "model_epoch_35.pt" not in text
        pilot.app.query_one("#checkpoints", Panel).focus()
        await pilot.press("enter")
        text = await until(pilot, "model_epoch_25.pt")
        assert "Loss" not in text
        await pilot.press("pagedown", "pagedown", "pagedown")
        text = await until(pilot, "model_epoch_1.pt")
        assert "model_epoch_40.pt" not in text
        await pilot.press("pageup", "pageup", "pageup", "escape")
        text = await until(pilot, "Loss")
        assert "model_epoch_40.pt" in text

    play(directory, story)


@pytest.mark.parametrize("name", ["loss", "safety", "machine", "checkpoints", "events"])
def test_each_panel_can_be_enlarged(directory: Path, name: str) -> None:
    first = {"loss": "train 0.2041", "safety": "power cut", "machine": "disk free",
             "checkpoints": "model_epoch_4.pt", "events": "the run began"}  # fmt: skip

    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        pilot.app.query_one(f"#{name}", Panel).focus()
        await pilot.press("enter")
        other = "Loss" if name != "loss" else "Checkpoints"
        text = await until(pilot, other, gone=True)
        assert first[name] in text
        await pilot.press("enter")
        await until(pilot, other)

    play(directory, story)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_help_fits_the_smallest_screen_and_goes_with_any_key(
    directory: Path, lang: str
) -> None:
    set_language(lang)

    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        await pilot.press("question_mark")
        text = await until(pilot, "PgUp, PgDn")
        assert isinstance(pilot.app.screen, Help)
        for key in ("q, Ctrl+C", "Tab", "Enter, Esc", "1-9"):
            assert key in text
        lines = text.splitlines()
        assert any("╭" in line for line in lines)
        assert any("╰" in line for line in lines)
        await pilot.pause(0.3)  # it goes on looking behind the help
        await pilot.press("x")
        await until(pilot, "PgUp, PgDn", gone=True)

    play(directory, story)


def test_the_help_is_scrolled_where_the_screen_is_smaller(directory: Path) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await pilot.press("question_mark")
        assert "disk full" not in await until(pilot, "more, another key")
        await pilot.press("down", "pagedown", "pagedown", "pagedown")
        await until(pilot, "disk full")
        await pilot.press("up")
        assert isinstance(pilot.app.screen, Help)
        await pilot.press("x")
        await until(pilot, "another key", gone=True)

    play(directory, story, (40, 10))


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_it_ends_with_a_key_and_leaves_no_thread_behind(directory: Path, key: str) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        await pilot.press(key)

    app = play(directory, story)
    assert app.return_value == 0
    for thread in threading.enumerate():
        if thread.name == "watcher":
            thread.join(20)
            assert not thread.is_alive()


def test_what_has_not_changed_is_not_drawn_again(directory: Path) -> None:
    async def story(pilot: Pilot[Any]) -> None:
        await until(pilot, "480/1000")
        await pilot.pause(0.5)
        drawn: list[str] = []
        for panel in pilot.app.query(Panel):
            real = panel.update

            def update(*args: Any, panel: Panel = panel, real: Any = real, **more: Any) -> None:
                drawn.append(str(panel.id))
                real(*args, **more)

            panel.update = update  # type: ignore[method-assign]
        began = time.monotonic()
        await pilot.pause(1.0)  # some ten looks
        seconds = math.ceil(time.monotonic() - began)  # a busy machine sleeps longer
        assert "loss" not in drawn
        assert "events" not in drawn
        assert drawn.count("checkpoints") <= 2 * seconds, "an age may have changed"

    play(directory, story)
