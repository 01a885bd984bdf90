"""The dashboard as a server: what it answers, what it refuses, what it tells of what is new."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from holdfast.monitor.run_view import RunView
from holdfast.monitor.web import hub as web_hub
from holdfast.monitor.web.app import create_app, guarded
from holdfast.monitor.web.data import run_id
from holdfast.monitor.web.files import plotting_script
from holdfast.monitor.web.hub import Hub
from tests.monitor.web.runs import TOKEN, LiveRun, Server, finished_run, serving

LOCAL = "http://127.0.0.1:8765"


def client_of(*roots: Path) -> TestClient:
    app = guarded(create_app(Hub(roots)), host="127.0.0.1", port=8765, token=TOKEN)
    return TestClient(app, base_url=LOCAL, headers={"authorization": f"Bearer {TOKEN}"})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    finished_run(root / "a")
    finished_run(root / "deep" / "b", (5.0,))
    return root


def test_all_runs_below_the_directories_are_listed_and_shown_by_their_ids(runs: Path) -> None:
    with client_of(runs) as client:
        rows = client.get("/api/runs").json()["runs"]
        assert {row["name"]: row["state"] for row in rows} == {
            "a": "finished",
            "deep/b": "finished",
        }
        row = next(row for row in rows if row["name"] == "a")
        assert row["best"]["val_loss"] == 2.0 and row["risk"]["seconds"] == 0.0
        run = client.get(f"/api/runs/{row['id']}").json()
        assert run["curves"]["step"] == list(range(10, 310, 10))
        assert [sample["epoch"] for sample in run["samples"]] == [1, 2, 3]
        assert len(run["checkpoints"]) == 3 and run["disk"]["free"] > 0


def test_a_directory_that_is_itself_a_run_and_one_that_is_empty(tmp_path: Path) -> None:
    run, empty = finished_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    with client_of(run, empty) as client:
        answer = client.get("/api/runs").json()
    assert [row["name"] for row in answer["runs"]] == ["run"] and answer["problems"] == {}


def test_nothing_outside_the_directories_is_read(runs: Path, tmp_path: Path) -> None:
    outside = finished_run(tmp_path / "outside")
    (runs / "link").symlink_to(outside)
    with client_of(runs) as client:
        names = {row["name"] for row in client.get("/api/runs").json()["runs"]}
        assert names == {"a", "deep/b"}
        for path in (run_id(outside), str(outside), "..%2f..%2foutside", "../outside", "a", "%00"):
            assert client.get(f"/api/runs/{path}").status_code == 404, path
            assert client.get(f"/api/runs/{path}/log").status_code == 404, path
        assert client.get("/api/compare", params={"run": [str(outside)]}).json()["runs"] == []
        for name in ("..%2fapp.py", "index.html", "../app.py", "x.js"):
            assert client.get(f"/static/{name}").status_code == 404, name


def test_nothing_is_answered_without_the_token(runs: Path) -> None:
    with client_of(runs) as client:
        del client.headers["authorization"]
        for path in ("/", "/api/runs", "/static/app.js", "/docs", "/openapi.json"):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert "holdfast dashboard" in answer.text and "终端" in answer.text
        page = client.get("/", params={"token": TOKEN})
        assert page.status_code == 200 and "static/app.js" in page.text
        assert client.get("/api/runs").status_code == 200  # by the cookie, from now on
        assert client.post("/api/runs").status_code == 405
        assert client.get("/docs").status_code == 404


def test_the_plotting_script_comes_from_the_installed_package_packed_and_kept(runs: Path) -> None:
    version, script = plotting_script()
    with client_of(runs) as client:
        assert f"plotly-{version}.js" in client.get("/").text
        answer = client.get(f"/static/plotly-{version}.js", headers={"accept-encoding": "gzip"})
        assert answer.content == script
        assert answer.headers["content-encoding"] == "gzip"
        assert int(answer.headers["content-length"]) < len(script) / 2
        assert "immutable" in answer.headers["cache-control"]
        plain = client.get(f"/static/plotly-{version}.js", headers={"accept-encoding": "identity"})
        assert plain.content == script and "content-encoding" not in plain.headers
        assert client.get("/static/plotly-0.js").status_code == 404


def test_the_log_and_the_comparison(runs: Path) -> None:
    (runs / "a" / "logs").mkdir()
    (runs / "a" / "logs" / "x.log").write_text("hello\n")
    with client_of(runs) as client:
        ids = {row["name"]: row["id"] for row in client.get("/api/runs").json()["runs"]}
        assert client.get(f"/api/runs/{ids['a']}/log").json()["text"] == "hello\n"
        found = client.get("/api/compare", params={"run": [ids["a"], ids["deep/b"]]}).json()
        assert found["metrics"]["val_loss"]["better"] == found["runs"][0]["label"] == "A"


# -------------------------------------------------------------------------------------- following


class Page:
    """Asks as the page does, again and again: the rows, and one run with what it has of it."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.asked: list[dict[str, Any]] = []  # the answers that said more than "same"
        self._id = run_id(directory)
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{server.port}",
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=20,
        )

    def rows(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get("/api/runs").json()
        return found

    def until_rows(self, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        return self._until(self.rows, check)

    def until_run(self, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        return self._until(self._run, check)

    def _run(self) -> dict[str, Any]:
        have = self.asked[-1]["version"] if self.asked else ""
        answer = self._client.get(f"/api/runs/{self._id}", params={"have": have})
        if answer.status_code != 200:
            return {}
        told: dict[str, Any] = answer.json()
        self.asked += [] if "same" in told else [told]
        return self.asked[-1]

    def _until(
        self, ask: Callable[[], dict[str, Any]], check: Callable[[dict[str, Any]], object]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = ask()
            if found and check(found):
                return found
            time.sleep(0.02)
        raise AssertionError(f"it did not come; last: {found}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(web_hub, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(web_hub, "SEARCH_EVERY", 0.1)
    yield


@pytest.mark.usefixtures("quick")
def test_a_page_is_told_of_new_runs_new_points_and_points_taken_back(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        page = Page(server, tmp_path / "new")
        assert page.rows()["runs"] == []
        with LiveRun(tmp_path / "new") as run:
            run.steps(50)
            page.until_rows(lambda told: [row["step"] for row in told["runs"]] == [50])
            first = page.until_run(lambda told: told["step"] == 50)
            assert "more" not in first and len(first["curves"]["step"]) == 5
            run.finish_epoch(3.0)
            page.until_run(lambda told: told["step"] == 100 and told["checkpoint_count"] == 1)
            assert all(told["more"] for told in page.asked[1:])
            steps = [step for told in page.asked for step in told["curves"]["step"]]
            assert steps == list(range(10, 110, 10)), "each point once"
            run.steps(50)
            page.until_run(lambda told: told["step"] == 150)
            run.records.event("resumed", 100)  # a crash has undone what came after step 100
            run.step = 100
            run.steps(10, loss=1.0)
            again = page.until_run(lambda told: told["step"] == 110)
            if "more" in again:  # the points were taken back in an answer of its own
                again = page.asked[-2]
            assert "more" not in again and again["curves"]["step"][-1] in (100, 110)
        page.until_rows(lambda told: told["runs"][0]["state"] != "training")


@pytest.mark.usefixtures("quick")
def test_a_snapshot_in_memory_is_told_before_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int | None] = [3]
    monkeypatch.setattr(RunView, "memory_step", property(lambda _view: held[0]))
    with serving(tmp_path) as server, LiveRun(tmp_path / "run") as run:
        run.steps(10)
        page = Page(server, run.directory)
        assert page.until_run(bool)["risk"]["memory_step"] == 3
        held[0] = 8
        page.until_rows(lambda told: told["runs"][0]["risk"]["memory_step"] == 8)
        fresh = Page(server, run.directory)
        assert fresh.until_run(bool)["risk"]["memory_step"] == 8


@pytest.mark.usefixtures("quick")
def test_one_look_serves_all_pages_and_nobody_looks_when_all_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    real = RunView.refresh
    monkeypatch.setattr(RunView, "refresh", lambda view: looks.append(1) or real(view))
    monkeypatch.setattr(web_hub, "LOOK_EVERY", 5.0)
    finished_run(tmp_path / "a", (3.0,))
    with serving(tmp_path) as server:
        pages = [Page(server, tmp_path / "a") for _i in range(3)]
        assert [page.until_run(bool)["step"] for page in pages] == [100] * 3
        time.sleep(0.3)
        assert len(looks) == 1


@pytest.mark.usefixtures("quick")
def test_a_directory_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path / "good" / "a", (3.0,))
    (tmp_path / "bad").mkdir()
    release, real = threading.Event(), web_hub.find_runs

    def find(root: Path) -> list[Path]:
        if root.name == "bad":
            release.wait(30)
        return real(root)

    monkeypatch.setattr(web_hub, "find_runs", find)
    monkeypatch.setattr(web_hub, "PATIENCE", 0.2)
    with serving(tmp_path / "good", tmp_path / "bad") as server:
        began = time.monotonic()
        assert Page(server, tmp_path / "good" / "a").until_run(bool)["step"] == 100
        assert time.monotonic() - began < 5
        looking = [thread for thread in threading.enumerate() if thread.name == "look"]
        assert looking and all(thread.daemon for thread in looking), "it would hold up Ctrl-C"
    release.set()


@pytest.mark.usefixtures("quick")
def test_a_run_that_is_deleted_disappears_and_a_lost_directory_is_named(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    finished_run(root / "a", (3.0,))
    with serving(root) as server:
        page = Page(server, root / "a")
        page.until_rows(lambda told: len(told["runs"]) == 1)
        shutil.rmtree(root)
        page.until_rows(lambda told: not told["runs"] and str(root) in told["problems"])


def test_thousands_of_new_points_are_sent_thinned(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "a", (3.0,))
    feed = web_hub.Feed(tmp_path, run)
    feed.look()
    assert feed.picture is not None
    have = feed.picture.version
    assert feed.picture.news(have) == {"same": True}
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(110, 60_110, 10):
            file.write(json.dumps({"event": "step", "step": step, "loss": 1.0}) + "\n")
    feed.look()
    told = feed.picture.news(have)
    assert "more" not in told and len(told["curves"]["step"]) <= 2000
    assert told["curves"]["step"][-1] == 60_100
    for nonsense in ("x", "1.2", "9.9.9", "0.0.-5", "..", "1.1.1.1"):
        assert "more" not in feed.picture.news(nonsense), nonsense
