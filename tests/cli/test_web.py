"""`holdfast dashboard` and `holdfast report` as a user starts and stops them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from holdfast.errors import ConfigError
from holdfast.listening import listen
from tests.manage.runs import desk, desk_json, make_run


@contextmanager
def dashboard(
    *words: str | Path, command: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A dashboard in a process of its own, and what it said with --json."""
    command = command or [sys.executable, "-m", "holdfast", "dashboard", *map(str, words), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HOLDFAST_LANG": "en"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        text = ""
        for line in process.stdout:
            text += line
            if line.startswith("}"):
                break
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_it_answers_at_the_printed_address_and_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", (3.0,))
    with dashboard(tmp_path, "--port", "0") as (process, said):
        assert said["host"] == "127.0.0.1" and said["token"] in said["url"]
        client = httpx.Client(base_url=f"http://127.0.0.1:{said['port']}")
        assert client.get("/").status_code == 401
        assert client.get("/", params={"token": said["token"]}).status_code == 200
        assert [row["name"] for row in client.get("/api/runs").json()["runs"]] == ["a"]
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 3, "an open page must not hold it up"
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_another_port_where_the_usual_one_is_taken_unless_one_was_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with listen("127.0.0.1", [port, 0]) as listener:
            assert listener.getsockname()[1] != port
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            listen("127.0.0.1", [port])
    for port in (-1, 70000):
        with pytest.raises(ConfigError, match="not between 0 and 65535"):
            listen("127.0.0.1", [port])
    with pytest.raises(ConfigError, match="--host"):
        listen("no.such.host.invalid", [0])


def test_connections_on_which_nothing_is_asked_make_room_for_others(tmp_path: Path) -> None:
    make_run(tmp_path / "a", (3.0,))
    code = (
        "import sys; from holdfast import listening; listening.most_connections = lambda: 4\n"
        "from holdfast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "dashboard", str(tmp_path), "--port", "0", "--json"]
    with dashboard(command=command) as (_process, said):
        address = ("127.0.0.1", said["port"])
        held = [socket.create_connection(address, timeout=20) for _ in range(12)]
        assert httpx.get(said["url"], timeout=20).status_code == 200
        assert held[0].recv(100) == b"", "it was closed"
        for connection in held:
            connection.close()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for argv, status, words in (
        (["dashboard", tmp_path / "missing"], 1, "There is no directory"),
        (["dashboard", tmp_path, "--port", "x"], 2, "--port"),
        (["report", tmp_path], 1, "is no run directory"),
        (["report", tmp_path / "missing"], 1, "There is no directory"),
        (["report", make_run(tmp_path / "run", (3.0,)), "--out", tmp_path], 2, "name a file"),
        (["report", tmp_path / "run", "--out", tmp_path / "x" / "y.html"], 2, "no directory"),
    ):
        done = desk(*argv)
        assert done.returncode == status, done.stderr
        assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_report_is_written_where_it_was_asked_for_and_said_as_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", (3.0, 2.0))
    done = desk("report", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report-my-run.html").exists() and "report-my-run.html" in done.stdout
    said = desk_json("report", run, "--out", tmp_path / "x.html")
    assert said == {"file": str(tmp_path / "x.html"), "bytes": (tmp_path / "x.html").stat().st_size}


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from holdfast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "dashboard", str(tmp_path)], capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "HOLDFAST_LANG": "en"},
    )  # fmt: skip
    assert done.returncode == 2 and "holdfast-train[web]" in done.stderr


def test_help_has_an_example_in_both_languages() -> None:
    for command in ("dashboard", "report"):
        shown = desk(command, "--help")
        assert shown.returncode == 0 and f"holdfast {command} runs" in shown.stdout
