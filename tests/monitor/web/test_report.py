"""A report is one file: nothing in it comes from elsewhere, and no text of a run breaks out."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError
from holdfast.monitor.web.files import plotting_script
from holdfast.monitor.web.report import report_data, report_html, write_report
from tests.monitor.web.runs import LiveRun, finished_run

EVIL = "</script><script>alert(1)</script><!-- \u2028 ]]>"


class Tags(HTMLParser):
    """The tags of a document with their attributes, as a browser finds them; plotly's script, which
    is nine tenths of it, is passed over."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text.replace(plotting_script()[1].decode("utf-8"), "", 1))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_of_a_run_ends_the_script_that_holds_it(tmp_path: Path) -> None:
    directory = tmp_path / "<script>alert(2)<script>"
    with LiveRun(directory) as run:
        run.steps(90)
        run.finish_epoch(3.0, sample=EVIL)
    (directory / "logs").mkdir()
    (directory / "logs" / "a.log").write_text(EVIL, "utf-8")
    text = report_html(report_data(directory), lang="en")
    scripts = [attributes for tag, attributes in Tags(text).found if tag == "script"]
    assert len(scripts) == 9 and not any("src" in each for each in scripts)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    found = json.loads(data[1])
    assert found["run"]["samples"][0]["text"] == EVIL and found["log"]["text"] == EVIL
    assert found["run"]["name"] == directory.name


def test_nothing_in_it_is_fetched_and_paths_of_the_machine_stay_out(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    size = write_report(finished_run(tmp_path / "run"), out, lang="zh")
    text = out.read_text("utf-8")
    assert size == out.stat().st_size and out.stat().st_mode & 0o777 == 0o644
    assert not [tag for tag, a in Tags(text).found if a.get("src") or tag in ("img", "iframe")]
    links = [a["href"] for tag, a in Tags(text).found if tag in ("link", "a")]
    assert links == ["data:,"]
    assert "default-src 'none'" in text or "default-src &#x27;none&#x27;" in text
    assert str(tmp_path) not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert not {"commands", "path"} & set(data["run"])


def test_what_is_no_run_is_said_and_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (empty, tmp_path / "missing"):
        with pytest.raises(HoldfastError):
            write_report(wrong, out, lang="en")
    assert out.read_text() == "old"
