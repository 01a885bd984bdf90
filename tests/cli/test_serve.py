"""`holdfast serve` as a user starts and ends it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.main import main
from holdfast.errors import ConfigError
from holdfast.listening import listen
from holdfast.training.text.tokenizer import TextTokenizer
from tests import processes
from tests.serving.models import CONTEXT, Training, make_tokenizer, poet

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer: TextTokenizer = make_tokenizer()
    training = Training(
        tmp_path_factory.mktemp("serve") / "run", poet(tokenizer, steps=1), tokenizer
    )
    training.epoch(5.0)
    training.close()
    return training.directory


class Server:
    """A server in a process of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        environment = {**os.environ, **environment}
        self.process = processes.start("serve", "--port", "0", *words, environment=environment)
        assert self.process.stdout is not None
        self.said = ""
        while "Ctrl-C" not in self.said and (line := self.process.stdout.readline()):
            self.said += line
        found = re.search(r"http://\S+", self.said)
        assert found, self.said + self.process.communicate(timeout=30)[1]
        self.url = found[0]

    def ask(self, tokens: int) -> Any:
        body = {"prompt": "春", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=60)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    server = Server(**{"LLM_CHECKPOINT": str(run)})
    yield server
    server.process.kill()
    server.process.wait()


def test_a_signal_lets_the_answers_under_way_end(server: Server) -> None:
    assert "best (step 100" in server.said
    with server.ask(500) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGTERM)
        lines = answer.read().decode().splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    status, _out, err = server.end()
    assert status == 0 and "requests under way are answered" in err
    assert f"{server.url}/v1" in server.said and "Traceback" not in err


def test_a_script_learns_the_address_and_the_models(run: Path) -> None:
    process = processes.start("serve", run, "--port", "0", "--json")
    assert process.stdout is not None
    said = ""
    while not said.endswith("\n}\n") and (line := process.stdout.readline()):
        said += line
    told = json.loads(said)
    with urllib.request.urlopen(f"{told['api']}/models", timeout=60) as answer:
        served = json.load(answer)["data"]
    process.send_signal(signal.SIGTERM)
    rest, _err = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")
    assert [one["id"] for one in told["models"]] == [one["id"] for one in served]
    best = {"id": "best", "step": 100, "path": str(run / "model_epoch_1.pt")}
    assert told["models"][0] == best


def test_a_second_ctrl_c_ends_at_once(server: Server) -> None:
    with server.ask(CONTEXT) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGINT)
        timer = threading.Timer(0.5, server.process.send_signal, [signal.SIGINT])
        timer.start()
        status, _out, err = server.end()
        assert status == 130 and "Ended at once" in err and "Traceback" not in err


def test_a_port_in_use_is_told_in_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"port {port} is in use" in told and len(told.splitlines()) == 1


def test_a_port_is_taken_before_the_model_is_loaded() -> None:
    with listen("127.0.0.1", [0]) as first, pytest.raises(ConfigError, match="is in use"):
        listen("127.0.0.1", [first.getsockname()[1]])


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["nowhere"], 4, "There is no checkpoint at nowhere yet: train first"),
        (["{run}", "--host", "0.0.0.0"], 2, "needs an --api-key"),
        (["{run}", "--port", "70000"], 2, "'70000' is not a whole number from 0 to 65535"),
        (["{run}", "--device", "cuda:99"], 2, "--device cuda:99 is not there"),
        (["{run}", "--api-key", "a b"], 2, "no header can carry"),
        (["{run}", "--precision", "int3"], 2, "--precision"),
        (["{run}", "--host", "no.such.host.invalid"], 2, "needs an --api-key"),
        (["{run}", "--allowed-host", "*"], 2, "is not the name of a host"),
        (["{run}", "--allowed-origin", "llm.example.com"], 2, "is not the address of a site"),
        (["{foreign}"], 4, "was not written by holdfast"),
    ],
)
def test_what_is_wrong_is_one_line(  # noqa: PLR0917 - fixtures
    words: list[str], status: int, told: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a checkpoint")
    monkeypatch.delenv("HOLDFAST_API_KEY", raising=False)
    filled = [word.format(run=run, foreign=foreign) for word in words]
    assert main(["serve", "--port", "0", *filled]) == status
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1, err
    logging.getLogger("holdfast").warning("afterwards")
    assert "afterwards" not in capsys.readouterr().err, "the server speaks no more"


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "holdfast serve checkpoints/best_model.pt" in capsys.readouterr().out
