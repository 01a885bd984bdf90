"""A chat template at work: in a process of its own, with limits of time and memory.

A template is a program that comes with a model. One that loops or asks for gigabytes cannot be
stopped within a process. The parent's half needs the standard library alone; the child imports what
it needs in `serve`, and never torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.i18n import _

SECONDS = 5.0  # that a conversation may take; most take a thousandth of one
_START = 60.0  # seconds that the process may take until it is ready
_MEMORY = 512 << 20  # bytes beside what the process needs by itself
_LARGEST = 8 << 20  # characters of a prompt: more than any request makes

Messages = Sequence[Mapping[str, str]]


class Refused(Exception):
    """The template raises an error over these messages."""


class Failed(Exception):
    """The template did not come to an end within its limits."""


class Renderer:
    """Renders with one template, one call at a time; may be called from any thread."""

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        """`special`: what the template may know of the tokenizer's special tokens, by name."""
        self._work = {"template": template, "special": dict(special)}
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process without waiting for it: the first call then need not."""
        with self._lock, contextlib.suppress(Failed):  # told where it is needed
            self._running()

    def render(self, conversations: Sequence[Messages]) -> list[str | Refused]:
        """Return the prompt of each conversation, or why the template refuses it. Raises Failed."""
        with self._lock:
            process = self._running()
            if not self._ready:
                self._line_of(process, _START)
                self._ready = True
            return [
                Refused(answer["refused"]) if "refused" in answer else str(answer["text"])
                for answer in (self._asked(process, messages) for messages in conversations)
            ]

    def close(self) -> None:
        """End the process; a call under way raises Failed."""
        process = self._process
        if process is not None:
            process.kill()  # a call that waits for it with the lock is told so at once
        with self._lock:
            self._forget()

    # ------------------------------------------------------------------------------ the process

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and process.poll() is None:
            return process
        self._forget()
        code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        code += "from holdfast.serving.api.rendering import serve; serve()"
        quiet = {
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-c", code, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **quiet},
            )
        except OSError as error:
            reason = error.strerror or error
            raise Failed(_("its process cannot start: {reason}", reason=reason)) from error
        self._ready = False
        self._send(process, self._work)
        return process

    def _asked(self, process: subprocess.Popen[bytes], messages: Messages) -> dict[str, Any]:
        self._send(process, {"messages": list(messages)})
        answer = self._line_of(process, SECONDS)
        if "failed" in answer:
            self._forget()
            raise Failed(_told_of(answer["failed"]))
        return answer

    def _send(self, process: subprocess.Popen[bytes], value: object) -> None:
        assert process.stdin is not None, "it was opened with pipes"
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # it has ended: that is seen where its answer is read

    def _line_of(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None, "it was opened with pipes"
        expired = threading.Event()

        def end() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self._forget()
            raise Failed(_told_of("time" if expired.is_set() else "end"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None, "it was opened with pipes"
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self) -> None:
        self._forget()


def _told_of(failure: str) -> str:
    return {
        "time": _("it took longer than {seconds:g} s", seconds=SECONDS),
        "memory": _("it needs more than {size} MiB of memory", size=_MEMORY >> 20),
        "size": _("what it makes is larger than {size} MiB", size=_LARGEST >> 20),
    }.get(failure, _("its process ended"))


# ------------------------------------------------------------------------------------- the child


def serve() -> None:
    """Answer conversations from stdin on stdout, a line of JSON each, until stdin ends."""
    with contextlib.suppress(ValueError, AttributeError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the server
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def say(value: dict[str, str]) -> None:
        target.write(json.dumps(value).encode() + b"\n")
        target.flush()

    work = json.loads(source.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    say({})  # ready
    for line in source:
        _limit_time()
        say(_answer(render_jinja_template, work, json.loads(line)["messages"]))


def _answer(render: Any, work: Mapping[str, Any], messages: list[Any]) -> dict[str, str]:
    try:
        (text,), _places = render(
            conversations=[messages],
            chat_template=work["template"],
            add_generation_prompt=True,
            **work["special"],
        )
    except MemoryError:
        return {"failed": "memory"}
    except Exception as error:  # noqa: BLE001 - a template is a program: it raises what it likes
        return {"refused": (str(error) or type(error).__name__).strip().partition("\n")[0][:500]}
    return {"text": text} if len(text) <= _LARGEST else {"failed": "size"}


def _limit_memory() -> None:
    """Limit the address space beside what there is now, where the system has such a limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_time() -> None:
    """Limit the processor seconds: a loop must not outlive a server that was killed."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + SECONDS) + 2
        _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
