"""Runs for the tests of pages, written by the real engine and the real records, and a real server.

What a training of minutes writes is there in a fraction of a second, and grows when a test says so.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from holdfast.guarding import Guard
from holdfast.monitor.web.app import create_app, guarded
from holdfast.monitor.web.hub import Hub
from holdfast.training.records import Records
from tests.manage.runs import Training
from tests.support import end_epoch

TOKEN = "a-token-for-the-tests"
HOST = "127.0.0.1"


class LiveRun(Training):
    """A run that a test lets go on: `steps` writes metrics, `epoch` evaluates, samples and saves.

    It holds the lock of the run until it is closed, as a training does.
    """

    def __init__(self, directory: Path, *, total: int = 400, **config: object) -> None:
        super().__init__(directory, **config)
        self.directory = directory
        self.records = Records(directory, tensorboard=False, resumed_step=0)
        self.step = self.resumed.step if self.resumed is not None else 0
        self.records.event(
            "started", self.step, total_steps=total, steps_per_epoch=100, epochs=total // 100,
            model="tiny", parameters=36, context_length=16, device="cpu", precision="fp32",
        )  # fmt: skip

    def steps(self, count: int, *, loss: float = 5.0) -> None:
        """`count` steps, a line of metrics every tenth."""
        for _i in range(count // 10):
            self.step += 10
            self.records.step(
                self.step, epoch=self.step // 100 + 1, loss=loss, smoothed_loss=loss,
                learning_rate=1e-3, tokens_per_second=1234.0, durable_step=None, memory_step=None,
            )  # fmt: skip

    def finish_epoch(self, val_loss: float, *, sample: str = "今天天气很好") -> None:
        """The rest of the epoch, what is measured at its end, and its checkpoint."""
        number = self.step // 100 + 1
        self.steps(100 * number - self.step)
        self.records.event("evaluation", self.step, val_loss=val_loss, perplexity=100.0)
        self.records.event("sample", self.step, epoch=number, text=sample)
        self.model.weight.data += 0.01
        end_epoch(self.manager, number, step=self.step, metrics={"val_loss": val_loss})

    def interrupt(self) -> None:
        """A signal: the state is saved, the run ends."""
        self.manager.save(step=self.step, epoch=self.step // 100 + 1, kind="temp", reason="signal",
                          strict=True)  # fmt: skip
        self.manager.close()


def finished_run(
    directory: Path, losses: Sequence[float] = (4.0, 2.0, 3.0), **config: object
) -> Path:
    """A run with one epoch a loss that has come to its end."""
    with LiveRun(directory, total=100 * len(losses), **config) as run:
        for loss in losses:
            run.steps(90, loss=loss + 0.5)
            run.finish_epoch(loss)
        run.records.event("finished", run.step)
    return directory


class Server:
    """The dashboard over `roots`, in a thread, at a port of its own."""

    def __init__(self, roots: Sequence[Path], *, port: int = 0, lang: str | None = None) -> None:
        self.hub = Hub(roots)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, port))
        self.port = int(self._socket.getsockname()[1])
        app: Guard = guarded(
            create_app(self.hub, lang=lang), host=HOST, port=self.port, token=TOKEN
        )
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/?token={TOKEN}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serving(*roots: Path, port: int = 0, lang: str | None = None) -> Iterator[Server]:
    server = Server(roots, port=port, lang=lang)
    try:
        yield server
    finally:
        server.stop()
