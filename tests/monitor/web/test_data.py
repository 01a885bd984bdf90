"""What a page gets to see: thinned curves, checkpoints that are there and that were, logs, risk."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from holdfast.checkpoint.rundir.history import now
from holdfast.manage.cleaning import clean
from holdfast.monitor.measured import Point
from holdfast.monitor.run_view import RunView
from holdfast.monitor.web import data as web_data
from holdfast.monitor.web.checkpoints import checkpoint_rows
from holdfast.monitor.web.files import SCRIPTS, WEB
from tests.manage.runs import flip
from tests.monitor.web.runs import LiveRun, finished_run


def point(step: int, loss: float | None, *, rate: float = 0.1, speed: float = 5.0) -> Point:
    return Point(step, "2026-03-01T10:00:00+08:00", 1, loss, loss, rate, speed, None, None)


def view_of(directory: Path) -> RunView:
    view = RunView(directory)
    view.refresh()
    return view


def test_thinning_keeps_both_ends_and_every_spike() -> None:
    points = [point(i, 5.0 + math.sin(i / 900)) for i in range(50_000)]
    points[12_345] = point(12_345, 99.0)
    points[33_333] = point(33_333, 0.001)
    points[44_444] = point(44_444, 5.0, speed=0.5)
    points[20_000] = point(20_000, math.nan)
    thinned = web_data.thin(points)
    assert len(thinned) <= web_data.CURVE_POINTS
    steps = [each.step for each in thinned]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 49_999
    assert {12_345, 33_333, 44_444} <= set(steps)
    assert web_data.thin(points[:2000]) == points[:2000]


def test_curves_are_strict_json_with_null_for_what_is_no_number() -> None:
    found = web_data.curves([point(1, math.nan), point(2, None), point(3, math.inf)])
    assert json.loads(json.dumps(found, allow_nan=False))["loss"] == [None, None, None]
    assert found["time"] == [1772330400000] * 3


def test_the_timeline_tells_what_is_there_and_what_was_and_why(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", (4.0, 2.0, 3.0, 2.5))
    clean.execute(clean.plan(run, clean.Wish(1, False, False)))
    rows, left_out = checkpoint_rows(view_of(run))
    assert left_out == 0
    assert [row["step"] for row in rows] == [400, 300, 200, 100]
    newest, _second, best, removed = rows
    assert newest["newest"] and newest["verified"] and newest["reason"] == "epoch"
    assert best["best"] and best["val_loss"] == 2.0 and best["fate"] == "kept"
    assert (removed["fate"], removed["why"]) == ("removed", "clean")
    assert removed["size"] > 0 and removed["names"][0] == "model_epoch_1.pt"


def test_a_damaged_file_is_shown_as_such(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", (4.0, 2.0))
    path = run / "model_epoch_1.pt"
    flip(path, path.stat().st_size - 30)  # the end of the directory: its manifest is not found
    view = view_of(run)
    rows, _left_out = checkpoint_rows(view)
    assert {row["step"]: row["fate"] for row in rows} == {200: "kept", 100: "damaged"}
    assert web_data.summary(view, "i", "n")["damaged"] == 1


def test_a_reason_names_its_file_below_the_run_and_not_the_way_there(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", (4.0, 2.0))
    told = f"{run / 'model_epoch_2.pt'} is damaged: as an earlier version has recorded it"
    event = {"time": now(), "event": "quarantined", "step": 200, "reason": told}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    marks = web_data.detail(view_of(run), "i", "n")["marks"]
    (reason,) = [m["fields"]["reason"] for m in marks if m["kind"] == "quarantined"]
    assert reason.startswith("model_epoch_2.pt is damaged")
    assert str(tmp_path) not in json.dumps(marks)


def test_risk_grows_while_training_and_is_nothing_after_the_end(tmp_path: Path) -> None:
    with LiveRun(tmp_path / "live") as run:
        run.steps(50)
        row = web_data.summary(view_of(run.directory), "i", "n")
        assert row["state"] == "training"
        assert row["risk"]["ticking"] and row["risk"]["disk_step"] is None
        run.finish_epoch(3.0)
        run.steps(30)
        risk = web_data.summary(view_of(run.directory), "i", "n")["risk"]
        assert (risk["disk_step"], risk["disk_steps"], risk["seconds"]) == (
            100,
            30,
            risk["seconds"],
        )
        assert 0 <= risk["seconds"] < 60 and risk["as_of"] is not None
    done = web_data.detail(view_of(finished_run(tmp_path / "done")), "i", "n")
    assert done["state"] == "finished" and done["risk"]["seconds"] == 0.0
    assert not done["risk"]["ticking"] and done["risk"]["verified_step"] == 300
    assert done["best"] == {"step": 200, "val_loss": 2.0, "perplexity": 100.0}
    assert [mark["kind"] for mark in done["marks"]] == ["finished"]
    json.dumps(done, allow_nan=False)


def test_losses_that_are_no_number_are_named_and_the_run_that_broke_off_says_so(
    tmp_path: Path,
) -> None:
    with LiveRun(tmp_path / "run") as run:
        run.steps(20)
        run.steps(20, loss=math.nan)
        run.steps(10)
        found = web_data.detail(view_of(run.directory), "i", "n")
        assert (found["nan"], found["nan_since"]) == ([30, 40], None)
        run.steps(10, loss=math.inf)
        found = web_data.detail(view_of(run.directory), "i", "n")
        assert (found["nan"], found["nan_since"], found["marks"]) == ([30, 60], 60, [])
    found = web_data.detail(view_of(run.directory), "i", "n")
    assert [(mark["kind"], mark["step"]) for mark in found["marks"]] == [("broke_off", 60)]
    assert found["marks"][0]["time"] == found["updated"]
    json.dumps(found, allow_nan=False)


def test_commands_are_for_the_state_and_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "my run; rm -rf"
    with LiveRun(directory) as run:
        run.steps(20)
        run.interrupt()
    (directory / "config.json").write_text("{}")
    found = {
        each["key"]: each["command"]
        for each in web_data.detail(view_of(directory), "i", "n")["commands"]
    }
    assert found["resume"] == f"holdfast train --checkpoint-dir '{directory}' --resume"
    assert found["verify"] == f"holdfast verify '{directory}'"
    assert "monitor" not in found and "serve" in found


def test_a_strangers_checkpoints_are_not_proposed_for_writing_text(tmp_path: Path) -> None:
    with LiveRun(tmp_path / "run") as run:
        run.finish_epoch(3.0)
        found = web_data.detail(view_of(run.directory), "i", "n")
    keys = [each["key"] for each in found["commands"]]
    assert keys == ["monitor", "verify", "clean", "report"]


def test_a_history_that_anybody_has_written_into_is_shown(tmp_path: Path) -> None:
    directory = finished_run(tmp_path / "run")
    with (directory / "events.jsonl").open("a") as file:
        for event in ("durable", "removed", "quarantined", "unheard of"):
            file.write(json.dumps({"event": event, "step": 1, "names": 5, "reason": "retention"}))
            file.write("\n")
    assert web_data.detail(view_of(directory), "i", "n")["checkpoint_count"] == 3


def test_the_log_is_its_end_in_whole_lines_and_never_a_link(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    assert web_data.log_tail(tmp_path) == {"name": None, "text": "", "cut": False}
    secret = tmp_path / "secret"
    secret.write_text("password")
    (logs / "z.log").symlink_to(secret)
    assert web_data.log_tail(tmp_path)["name"] is None
    (logs / "a.log").write_text("".join(f"第 {i} 行\n" for i in range(1000)), "utf-8")
    tail = web_data.log_tail(tmp_path, limit=200)
    assert tail["name"] == "a.log" and tail["cut"]
    assert tail["text"].startswith("第 9") and tail["text"].endswith("第 999 行\n")
    assert len(tail["text"].encode()) <= 200
    logs.rename(tmp_path / "elsewhere")
    (tmp_path / "logs").symlink_to(tmp_path / "elsewhere")
    assert web_data.log_tail(tmp_path)["name"] is None


def test_runs_without_checkpoints_do_not_spoil_a_comparison(tmp_path: Path) -> None:
    a, b = finished_run(tmp_path / "a", (4.0,), lr=1), finished_run(tmp_path / "b", (2.0,), lr=2)
    empty = tmp_path / "c"
    with LiveRun(empty) as run:
        run.steps(10)
    found = web_data.comparison([("1", "a", a), ("2", "c", empty), ("3", "b", b)])
    assert [(each["name"], each["label"]) for each in found["runs"]] == [("a", "A"), ("b", "B")]
    assert found["metrics"]["val_loss"]["better"] == "B"
    assert found["config"] == {"lr": {"A": 1, "B": 2}}
    assert [each["name"] for each in found["problems"]] == ["c"]


def test_every_word_of_the_page_is_there_in_both_languages() -> None:
    text = (WEB / "strings.js").read_text("utf-8")
    strings = json.loads(text[text.index("= {") + 2 :].rstrip().removesuffix(";"))
    for key, pair in strings.items():
        english, chinese = pair
        assert english and chinese, key
        holes = [sorted(_holes(sentence)) for sentence in pair]
        assert holes[0] == holes[1], key
    code = "".join((WEB / name).read_text("utf-8") for name in SCRIPTS if name != "strings.js")
    used = set(re.findall(r'\bt\("([\w.]*\w)"', code))
    assert used <= set(strings), used - set(strings)
    for key in strings:
        made = f'"{key.split(".")[0]}.'  # put together from its kind: "state." + ...
        assert f'"{key}"' in code or made + '"' in code or made in code, f"{key} is not used"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_of_wcag_aa_in_both_themes() -> None:
    """4.5 to 1 for text, 3 to 1 for lines and signs (WCAG 2.1, 1.4.3 and 1.4.11)."""
    light, dark = re.findall(
        r"^:root[^{]*\{([^}]*--bg[^}]*)\}", (WEB / "style.css").read_text(), re.M
    )
    for theme in (light, dark):
        of = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        pairs = [("text", "bg"), ("text", "surface"), ("muted", "bg"), ("muted", "surface"),
                 ("accent", "surface"), ("muted", "none-soft"), ("bad", "surface")]  # fmt: skip
        pairs += [(name, f"{name}-soft") for name in ("accent", "good", "fair", "bad")]
        pairs += [("muted", f"{name}-soft") for name in ("good", "fair", "bad")]
        lines = [(f"series-{i}", "surface") for i in range(8)] + [("fill", "surface")]
        for least, group in ((4.5, pairs), (3.0, lines)):
            for front, back in group:
                a, b = sorted((_luminance(of[front]), _luminance(of[back])), reverse=True)
                assert (a + 0.05) / (b + 0.05) >= least, (front, back, (a + 0.05) / (b + 0.05))


def _holes(text: str) -> list[str]:
    return [part.split("}")[0] for part in text.split("{")[1:]]
