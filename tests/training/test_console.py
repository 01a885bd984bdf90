"""The console: the bar covers nothing that was said, pipes get plain lines, dead ends are quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path

import pyte
import pytest

from holdfast.checkpoint.manager import Resumed, Saved
from holdfast.checkpoint.rundir.entries import Entry
from holdfast.i18n import set_language
from holdfast.training.console import Console
from holdfast.training.telling import tell_event


def saved(kind: str = "epoch", loss: float | None = 4.0, before: float | None = 5.0) -> Saved:
    entry = Entry(
        id="x", run_id="r", generation=1, step=7, sequence=1, kind=kind, reason="epoch", epoch=1,
        created="", size=1_523_000_000, loss=loss,
    )  # fmt: skip
    names = {"model_epoch_1.pt": "file", "latest.pt": "link", "model.pt": "link"}
    if before is not None or loss is not None:
        names["best_model.pt"] = "link"
    return Saved(entry, Path("model_epoch_1.pt"), 1.25, names, True, before)


def on_a_terminal(columns: int, talk: object) -> list[str]:
    """The lines, scrolled-off ones included, that a person sees on a terminal of that width."""
    screen = pyte.HistoryScreen(columns, 24, history=1000)
    stream = pyte.Stream(screen)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        console = Console(stream=said, terminal=True)
    with console:
        talk(console)  # type: ignore[operator]
    stream.feed(said.getvalue().replace("\n", "\r\n"))
    past = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*past, *screen.display]]


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_scroll_above_the_bar_and_stay(columns: int) -> None:
    def talk(console: Console) -> None:
        console.status.total_steps = 300
        console.start_bar()
        for step in range(300):
            console.status.step = step
            console.progress()
            if step % 3 == 0:
                console.say(f"line {step} of a hundred")
        console.stop_bar()

    lines = on_a_terminal(columns, talk)
    seen = [int(m[1]) for line in lines if (m := re.fullmatch(r"line (\d+) of a hundred", line))]
    assert seen == list(range(0, 300, 3))
    bars = [line for line in lines if "step" in line and "/300" in line]
    assert len(bars) == 1  # one bar, at the end; no remains of it between the lines


def test_the_bar_tells_the_last_durable_step_and_its_age() -> None:
    def talk(console: Console) -> None:
        console.start_bar()
        tell_event(console, "durable", {"saved": saved("temp")})
        console.progress()
        console.stop_bar()

    text = "\n".join(on_a_terminal(120, talk))
    assert "durable: step 7" in text
    assert "ago" in text
    assert "nothing durable yet" not in text.split("step 7 is durable")[1]


def test_a_pipe_gets_plain_timestamped_lines_that_are_never_cut() -> None:
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        console.status.total_steps = 10
        console.start_bar()
        console.say("x" * 500)
        console.progress(force=True)
    lines = said.getvalue().splitlines()
    assert "\x1b" not in said.getvalue()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert lines[0].endswith("x" * 500)
    assert "nothing durable yet" in lines[1]


def test_each_name_is_told_with_its_size_purpose_and_improvement() -> None:
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        tell_event(console, "durable", {"saved": saved()})
    text = said.getvalue()
    assert "model_epoch_1.pt (1.42 GiB)" in text
    assert "best_model.pt (the same data, no extra space) [improved by 1.0000 (20.0 %)]" in text
    assert "latest.pt [to resume training]" in text
    assert text.index("model_epoch_1.pt") < text.index("best_model.pt") < text.index("latest.pt")


def test_quiet_says_only_what_matters() -> None:
    said = io.StringIO()
    with Console(stream=said, terminal=False, quiet=True) as console:
        console.say("chatter")
        console.warn("watch out")
        tell_event(console, "durable", {"saved": saved()})
        console.progress(force=True)
    assert "chatter" not in said.getvalue()
    assert "watch out" in said.getvalue()
    assert "model_epoch_1.pt" in said.getvalue()
    assert "nothing durable" not in said.getvalue()


def test_a_closed_pipe_silences_but_does_not_raise(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1)
    with Console(stream=stream, terminal=False, log_file=tmp_path / "logs" / "x.log") as console:
        console.say("one")
        console.say("two")
        console.warn("three")
        console.table([["a", "b"]], header=["A", "B"])
        console.progress(force=True)
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    log = (tmp_path / "logs" / "x.log").read_text("utf-8")
    assert [line.split(" ", 2)[2] for line in log.splitlines()][:2] == ["one", "two"]


def test_a_dead_terminal_does_not_end_the_bar_with_an_error(tmp_path: Path) -> None:
    parent, child = os.openpty()
    stream = os.fdopen(child, "w", buffering=1)
    log = tmp_path / "x.log"
    with Console(stream=stream, terminal=True, log_file=log) as console:
        console.start_bar()
        os.close(parent)  # the window is closed
        for _ in range(20):
            console.progress()
            console.say("still training")
        console.stop_bar()
    assert log.read_text("utf-8").count("still training") == 20


def test_the_log_holds_what_was_said_and_no_bar(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with Console(stream=io.StringIO(), terminal=True, log_file=log) as console:
        console.start_bar()
        console.say("first\nsecond")
        console.status.step = 5
        console.progress()
    text = log.read_text("utf-8")
    assert [line[20:] for line in text.splitlines()] == ["first", "second"]


def test_a_resume_tells_where_from_and_what_was_lost() -> None:
    said = io.StringIO()
    entry = saved().entry
    with Console(stream=said, terminal=False) as console:
        resumed = Resumed(entry, Path("a/model_epoch_1.pt"), 2, [("x.pt", "bad")], 40, 2.5)
        tell_event(console, "resumed", {"resumed": resumed})
    assert "Going on from model_epoch_1.pt (epoch 1, step 7)" in said.getvalue()
    assert "40 steps (2 min 30 s of work)" in said.getvalue()


def test_a_checkpoint_from_the_future_is_no_time_ago() -> None:
    """A battery is empty: the clock says 1970, and the checkpoint 2026."""
    entry = dataclasses.replace(saved().entry, created="2999-01-01T00:00:00.000+00:00")
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        tell_event(console, "resumed", {"resumed": Resumed(entry, Path("a.pt"), 1)})
        console.progress(force=True)
    assert "durable: step 7, 0 s ago" in said.getvalue()


# ------------------------------------------------------------------------------------------ trouble


def failed(step: int, *, repeated: bool) -> dict[str, object]:
    return {"step": step, "reason": "full", "attempts": 1, "repeated": repeated, "durable": 7}


def test_a_failure_is_said_once_logged_always_and_seen_in_the_bar(tmp_path: Path) -> None:
    said, log = io.StringIO(), tmp_path / "train.log"
    with Console(stream=said, terminal=False, log_file=log) as console:
        tell_event(console, "durable", {"saved": saved()})
        tell_event(console, "failed", failed(8, repeated=False))
        tell_event(console, "failed", failed(9, repeated=True))
        console.status.failing = True
        console.progress(force=True)
        tell_event(console, "recovered", {"step": 10, "failures": 2, "minutes": 3.0})
        console.status.failing = False
        console.progress(force=True)
    lines = said.getvalue().splitlines()
    assert sum("could not be saved" in line for line in lines) == 1
    assert "the last durable step is 7. The reason: full" in said.getvalue()
    assert log.read_text("utf-8").count("could not be saved") == 2
    assert "saving fails · durable: step 7" in lines[-3]
    assert "Saving works again: step 10" in lines[-2]
    assert "saving fails" not in lines[-1]


@pytest.mark.parametrize("reason", ["full", ""])
def test_unsafe_is_loud(reason: str) -> None:
    said = io.StringIO()
    with Console(stream=said, terminal=True, quiet=True) as console:
        fields = {"minutes": 61.4, "step": 7, "reason": reason, "first": True}
        tell_event(console, "unsafe", fields)
    assert "UNSAFE" in said.getvalue()
    assert "61 minutes" in said.getvalue()
    assert (reason or "a save is under way") in said.getvalue()
    assert "\a" in said.getvalue()


def test_after_a_lost_directory_nothing_is_durable_any_more() -> None:
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        tell_event(console, "durable", {"saved": saved()})
        tell_event(console, "failed", {"step": 9, "reason": "renamed", "durable": None})
        console.progress(force=True)
    assert "the last durable step is -. The reason: renamed" in said.getvalue()
    assert "nothing durable yet" in said.getvalue()


def test_chinese_speaks_chinese() -> None:
    set_language("zh")
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        tell_event(console, "durable", {"saved": saved(before=None)})
    assert "Epoch检查点: model_epoch_1.pt (1.42 GiB)" in said.getvalue()
    assert "同一份数据，不占额外空间" in said.getvalue()
    assert "[首个最佳]" in said.getvalue()
    assert "[用于恢复训练]" in said.getvalue()


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii"])
def test_a_console_of_another_encoding_gets_every_line(encoding: str) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(stream=narrow, terminal=False)
    console.warn("检查点")
    tell_event(console, "durable", {"saved": saved()})
    narrow.flush()
    lines = narrow.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    assert ("检查点" if encoding == "gbk" else "???") in lines[0]
    assert any("model_epoch_1.pt" in line for line in lines[1:])


def test_the_log_takes_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with Console(stream=io.StringIO(), terminal=False, log_file=log) as console:
        console.say("caf\udce9.txt")
        console.say("after")
    assert "caf\\udce9.txt" in log.read_text("utf-8") and "after" in log.read_text("utf-8")


def test_a_line_on_a_narrow_terminal_is_copied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal breaks it, which a copy does not see; a line feed would make two commands."""
    command = "holdfast train --checkpoint-dir a-directory --resume --num-steps 24 --epochs none"
    said = io.StringIO()
    monkeypatch.setenv("COLUMNS", "40")
    with Console(stream=said, terminal=True) as console:
        console.start_bar()
        console.say(f"   To train further: {command}", important=True)
        console.warn(f"It was saved. Go on: {command}")
        console.stop_bar()
    assert said.getvalue().count(command) == 2
