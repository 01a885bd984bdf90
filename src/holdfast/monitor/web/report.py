"""`holdfast report`: a run as one HTML file that needs no server and no network.

The page is the dashboard's, its parts and its data inlined. A policy in the file lets run exactly
the scripts that were put in, by their hashes: a text of the run is never one of them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from pathlib import Path
from typing import Any

from holdfast.checkpoint.system import filesystem
from holdfast.errors import HoldfastError
from holdfast.guarding import EMPTY_STYLE
from holdfast.monitor.run_view import EMPTY, RunView
from holdfast.monitor.web import data as web_data
from holdfast.monitor.web.files import SCRIPTS, WEB, plotting_script
from holdfast.version import __version__

_PRIVATE = ("path", "commands")  # of the machine that made it: not for the reader


def report_data(directory: Path) -> dict[str, Any]:
    """Return what a report holds: {"run", "log", "made"}, the run as in `/api/runs/ID`.

    Raises HoldfastError where the directory is none, or holds no run.
    """
    view = RunView(directory)
    view.refresh()
    if view.state == EMPTY and not view.events:
        raise HoldfastError(
            "{directory} is no run directory: name the one that --checkpoint-dir named for the "
            "training.",
            directory=directory,
        )
    name = directory.resolve().name
    run = web_data.detail(view, web_data.run_id(directory), name)
    run["curves"] = web_data.curves(web_data.thin(view.points))
    run["risk"]["ticking"] = False  # a report stands still
    for private in _PRIVATE:
        run.pop(private, None)
    return {"run": run, "log": web_data.log_tail(directory), "made": round(time.time() * 1000)}


def report_html(data: dict[str, Any], *, lang: str) -> str:
    """Return the page of a report; `lang` is its language until the reader chooses another."""
    scripts = [(WEB / "theme.js").read_text("utf-8"), plotting_script()[1].decode("utf-8")]
    scripts += [(WEB / name).read_text("utf-8") for name in SCRIPTS]
    style = (WEB / "style.css").read_text("utf-8")
    hashes = " ".join(map(_hash, scripts))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)} {EMPTY_STYLE}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    theme, *others = (f"<script>{_whole(text)}</script>\n" for text in scripts)
    title = html.escape(str(data["run"]["name"]))
    return (
        f'<!doctype html>\n<html lang="en" data-lang="{html.escape(lang)}">\n<head>\n'
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="content-security-policy" content="{html.escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f'<meta name="generator" content="holdfast {__version__}">\n'
        f'<title>{title} · Holdfast</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n{theme}</head>\n<body>\n"
        f'<noscript>{title}</noscript>\n<div id="page"></div>\n'
        f'<script type="application/json" id="data">{_inline_json(data)}</script>\n'
        f"{''.join(others)}</body>\n</html>\n"
    )


def write_report(directory: Path, out: Path, *, lang: str) -> int:
    """Write the report of a run, in one piece or not at all; returns its size in bytes.

    Raises HoldfastError, OSError.
    """
    text = report_html(report_data(directory), lang=lang).encode("utf-8")
    filesystem.write_file(out, [(0, text)], len(text), mode=0o644)
    return len(text)


def _inline_json(data: Any) -> str:
    """Return JSON that no text in it can end: in HTML only `<` begins the end of a script."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _whole(script: str) -> str:
    assert "</script" not in script.lower(), "a script of ours would end in its middle"
    return script


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
