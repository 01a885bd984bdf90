"""`clean`, `verify`, `list` and `pack` against a live training that saves as fast as it can.

A stranger's loop in a process of its own announces what is durable; it is killed now and then and
goes on. What was announced is there at any moment, or retention has let it go as it promised to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from holdfast.checkpoint.format.container import Reader
from holdfast.checkpoint.policy.keep import KeepBest
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.manage.packing.unpack import unpack
from holdfast.manage.rundir import look
from tests.manage.runs import desk
from tests.support import bits

LOOP = """
import hashlib, json, random, sys, threading
import torch
from holdfast import CheckpointManager

torch.set_num_threads(1)
directory, seed = sys.argv[1], int(sys.argv[2])
torch.manual_seed(seed)
dice = random.Random(seed)
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
state = {"model": model, "optimizer": optimizer, "digest": ""}

def digest():
    found = hashlib.sha256()
    for value in (*model.state_dict().values(), optimizer.state_dict()["state"][0]["exp_avg"]):
        found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

def tell(event, fields):
    if event == "durable":
        entry = fields["saved"].entry
        say("durable", id=entry.id, step=entry.step, loss=entry.loss)
    elif event in ("failed", "quarantined", "unsafe"):
        say("trouble", event=event, words=str(fields))

def say(what, **fields):
    print(json.dumps({"what": what, **fields}), flush=True)

manager = CheckpointManager(directory, state, keep_last=2, on_event=tell)
resumed = manager.resume()
if resumed is not None and state["digest"] != digest():
    say("trouble", event="resume", words="what came back is not what was saved")
step = resumed.step if resumed else 0
say("began", step=step, digest=state["digest"])
asked = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), asked.set()), daemon=True).start()
while not asked.is_set():
    step += 1
    optimizer.zero_grad()
    model(torch.randn(8, 256)).pow(2).mean().backward()
    optimizer.step()
    state["digest"] = digest()
    loss = {"val_loss": 5.0 - 0.001 * step + dice.random()}
    kind = ("temp", "step", "temp", "epoch")[step % 4]
    if kind == "temp":
        manager.save_async(step=step, kind="temp", reason="scheduled")
    else:
        manager.save(step=step, epoch=step // 4 if kind == "epoch" else None, kind=kind,
                     metrics=loss)
manager.close()
say("ended", step=step, digest=state["digest"])
"""


class Loop:
    """The training, and what it has announced."""

    def __init__(self, script: Path, run: Path, seed: int) -> None:
        self.run = run
        self.announced: list[dict[str, Any]] = []
        self.troubles: list[str] = []
        self.ended: dict[str, Any] | None = None
        self.began: dict[str, Any] | None = None
        self._first = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, script, run, str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()
        assert self._first.wait(60), "the loop has not begun to save"

    @property
    def newest(self) -> int:
        """The newest step that was announced; what is asked afterwards may know a later one."""
        return max((line["step"] for line in list(self.announced)), default=0)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = json.loads(text)
            if line["what"] == "durable":
                self.announced.append(line)
                if len(self.announced) > 8:
                    self._first.set()
            elif line["what"] == "began":
                self.began = line
            elif line["what"] == "ended":
                self.ended = line
            else:
                self.troubles.append(text)
        self._first.set()

    def kill(self) -> None:
        self.process.kill()
        assert self._wait() == -signal.SIGKILL

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self._wait() == 0

    def _wait(self) -> int:
        code = self.process.wait(60)
        self._reader.join()
        assert self.process.stdout is not None and self.process.stdin is not None
        self.process.stdout.close()
        self.process.stdin.close()
        return code


@dataclass
class Race:
    """Everybody who works on the directory beside the loop, what they found, and how often."""

    run: Path
    rounds: int
    loop: Loop
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def disturbers(self) -> list[threading.Thread]:
        works: list[Callable[[int], None]] = [self.clean, self.verify, self.list, self.look]
        return [threading.Thread(target=self._repeat, args=(work,)) for work in works]

    def _repeat(self, work: Callable[[int], None]) -> None:
        for number in range(self.rounds):
            try:
                work(number)
            except Exception as error:  # noqa: BLE001 - told by the test, in its own thread
                self.wrong.append(f"{work.__name__} {number}: {error!r}")
                return

    def clean(self, number: int) -> None:
        told = self._desk("clean", "--keep", "1", "--temp", "--yes")
        self.done["removed by clean"] += len(told["removed"])
        if number % 5 == 1:
            before = self.loop.newest
            told = self._desk("pack", str(self.run.parent / "race.tar"), "--force")
            assert told["step"] >= before and not told["left_out"], told

    def verify(self, _number: int) -> None:
        told = self._desk("verify")
        assert told["damaged"] == told["quarantined"] == 0, told
        self.done["files verified"] += len(told["files"])

    def list(self, _number: int) -> None:
        before = self.loop.newest
        told = self._desk("list")["directories"][0]
        assert not told["damaged"] and not told["unreadable"], told
        steps = [each["step"] for each in told["checkpoints"]]
        assert steps and max(steps) >= before, (before, steps)

    def look(self, _number: int) -> None:
        """The moving names can be loaded at any moment and hold whole states."""
        for _again in range(4):
            for name in ("latest.pt", "model.pt", "best_model.pt"):
                before = self.loop.newest
                state = load(self.run / name)
                assert state["digest"] == digest_of(state), name
                assert name == "best_model.pt" or state["global_step"] >= before, name
                self.done["loads"] += 1

    def _desk(self, command: str, *argv: str) -> Any:
        done = desk(command, str(self.run), *argv, "--json")
        assert (done.returncode, done.stderr) == (0, ""), (command, done.stdout, done.stderr)
        self.done[command] += 1
        return json.loads(done.stdout)


def digest_of(state: Any) -> str:
    """What the loop has computed of its own state when it saved."""
    found = hashlib.sha256()
    moments = state["optimizer"]["state"][0]["exp_avg"]
    for value in (*state["model"].values(), moments):
        found.update(bits(value))
    return found.hexdigest()


def check_history(run: Path, losses: dict[str, float | None]) -> Counter[str]:
    """Replay what happened: nothing went that retention has to keep, nothing was called damaged.

    `losses` of all that was ever seen. Returns how often which event happened.
    """
    present: dict[str, tuple[int, int]] = {}
    verified: set[str] = set()
    gone: set[str] = set()
    counted: Counter[str] = Counter()
    for event in Catalog(run).events():
        kind, id_ = event["event"], event.get("id", "")
        counted[kind] += 1
        assert kind not in ("quarantined", "damaged", "failed"), event
        if kind == "durable":
            present[id_] = (event["generation"], event["step"])
        elif kind == "verified":
            verified.add(id_)
        elif kind == "removed" and id_:
            counted[f"removed: {event['reason']}"] += 1
            order = present.pop(id_, None)
            gone.add(id_)
            steps = {present[i] for i in verified & present.keys()}
            assert len(steps) >= 2, f"below two verified: {event}"
            if order is not None:
                assert max(present.values()) > order, f"the newest: {event}"
            others = [losses.get(i) for i in losses if i not in gone]
            best = min((x for x in others if x is not None), default=math.inf)
            loss = losses.get(id_)
            assert loss is None or loss >= best, f"the best: {event}"
    entries = {entry.id for entry in Catalog(run).scan().entries}
    assert present.keys() <= entries, f"lost: {present.keys() - entries}"
    return counted


def race(place: Path, rounds: int, lives: int) -> Counter[str]:
    """Let everybody work `rounds` times in each of `lives` lives of the loop; all but the last end
    by SIGKILL. Returns the figures."""
    seed = random.randrange(10**6)
    print("seed", seed)
    script, run = place / "loop.py", place / "run"
    script.write_text(textwrap.dedent(LOOP), "utf-8")
    figures: Counter[str] = Counter()
    losses: dict[str, float | None] = {}
    reached = 0
    for life in range(lives):
        loop = Loop(script, run, seed + life)
        assert loop.began is not None and loop.began["step"] >= reached
        match = Race(run, rounds, loop)
        threads = match.disturbers()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (loop.kill if life + 1 < lives else loop.stop)()
        assert not match.wrong, match.wrong
        assert not loop.troubles, loop.troubles
        reached = loop.newest
        losses |= {line["id"]: line["loss"] for line in loop.announced}
        losses |= {entry.id: entry.loss for entry in look(run).entries}
        figures += match.done
        figures["announced"] += len(loop.announced)
    figures += check_history(run, losses)
    _check_end(run, loop, place)
    return figures


def _check_end(run: Path, loop: Loop, place: Path) -> None:
    """What is there at the end is whole, and the newest is what the loop had in its hands."""
    found = look(run)
    assert found.contents.newest is not None and loop.ended is not None
    assert not (run / "quarantine").exists() and not found.contents.damaged
    assert found.contents.newest.step == loop.ended["step"]
    state = load(run / "latest.pt")
    assert state["digest"] == loop.ended["digest"] == digest_of(state)
    for entry in found.entries:
        with Reader(run / entry.names[0]) as reader:
            reader.verify()
    mask = KeepBest(1)([entry.candidate() for entry in found.entries])
    best = next(e for e, chosen in zip(found.entries, mask, strict=True) if chosen)
    assert "best_model.pt" in best.names
    target, packed = unpack(place / "race.tar", str(place / "unpacked"))
    state = load(target / "latest.pt")
    assert state["digest"] == digest_of(state)
    newest = look(target).contents.newest
    assert newest is not None and newest.step == packed.contents.step


def test_clean_verify_list_and_pack_beside_a_training_lose_nothing(tmp_path: Path) -> None:
    figures = race(tmp_path, rounds=2, lives=2)
    assert figures["removed: clean"] > 0 and figures["announced"] > 30, "nobody was disturbed"
    assert figures["pack"] == 2 and figures["clean"] == figures["verify"] == 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_times(tmp_path: Path) -> None:
    began = time.monotonic()
    figures = race(tmp_path, rounds=25, lives=4)
    figures["seconds"] = round(time.monotonic() - began)
    print(json.dumps(figures, indent=1), os.uname().sysname)
    assert figures["clean"] == figures["verify"] == figures["list"] == 100
    assert figures["pack"] == 20 and figures["removed: clean"] > 50
