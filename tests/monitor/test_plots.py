"""The picture and the page: there, whole, labelled, and without a network."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import i18n
from holdfast.errors import HoldfastError
from holdfast.monitor import plots
from holdfast.monitor.curves import INTERRUPTED, Curves
from tests.manage.runs import Training
from tests.monitor.views import curves, run_with_metrics


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    i18n.set_language("en")
    yield
    i18n.set_language("en")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    found = curves(run_with_metrics(tmp_path_factory.mktemp("plots") / "run"), "a<b>")
    found.marks[INTERRUPTED].append(250)
    return found


def figure_in(page: str) -> tuple[list[dict], dict]:
    found = re.search(r"const \[traces, layout\] = (.*);\n", page)
    assert found is not None
    traces, layout = json.loads(found[1])
    return traces, layout


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_picture_is_a_png_of_some_size(run: Curves, tmp_path: Path, language: str) -> None:
    i18n.set_language(language)
    path = tmp_path / "losses.png"
    plots.write_png([run, run], path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1200 and height >= 1000
    assert i18n.language() == language


def test_a_page_is_one_file_that_asks_nobody(run: Curves, tmp_path: Path) -> None:
    path = tmp_path / "losses.html"
    plots.write_html([run], path)
    page = path.read_text("utf-8")
    outside = page.replace(page[page.index("<script>") : page.index("</script>")], "")
    assert "http" not in outside and "src=" not in outside and "Plotly.react" in outside
    assert "<title>a&lt;b&gt;</title>" in page
    traces, layout = figure_in(page)
    names = [trace["name"] for trace in traces]
    assert names[:2] == ["training loss", "validation loss"] and "interrupted" in names
    titles = [note["text"] for note in layout["annotations"]]
    assert titles == ["loss (nats a token)", "learning rate", "tokens per second",
                      "stall for a checkpoint (ms)"]  # fmt: skip
    assert layout["xaxis"]["title"]["text"] == "step"
    domains = [layout[f"yaxis{n}"]["domain"] for n in ("", 2, 3, 4)]
    assert all(low < high for low, high in domains)
    assert all(above[0] > below[1] for above, below in itertools.pairwise(domains))
    assert {shape["x0"] for shape in layout["shapes"]} == {100, 200, 250, 300, 400}
    assert layout["yaxis2"]["exponentformat"] == "e", "3e-4, not 300 µ"


def test_several_runs_have_colours_and_dashes_of_their_own(run: Curves, tmp_path: Path) -> None:
    traces, layout = figure_in(_page([run, run, run], tmp_path))
    lines = [trace["line"] for trace in traces if "training loss" in trace["name"]]
    assert len({line["color"] for line in lines}) == len({line["dash"] for line in lines}) == 3
    assert traces[0]["name"] == "a&lt;b&gt;: training loss" and layout["shapes"] == []


def _page(runs: list[Curves], directory: Path) -> str:
    plots.write_html(runs, directory / "x.html")
    return (directory / "x.html").read_text("utf-8")


def test_a_name_cannot_run_a_script(run: Curves, tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    fields = {field: getattr(run, field) for field in run.__slots__ if field != "label"}
    page = _page([Curves(name, **fields), run], tmp_path)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_nothing_to_draw_is_an_error_that_says_so(tmp_path: Path) -> None:
    with Training(tmp_path / "run"):
        pass
    empty = curves(tmp_path / "run")
    for write in (plots.write_png, plots.write_html):
        with pytest.raises(HoldfastError, match="nothing to plot"):
            write([empty], tmp_path / "x")
    assert not (tmp_path / "x").exists()
