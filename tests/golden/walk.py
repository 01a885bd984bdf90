"""Walk through everything that can happen to a run, and print what was written and said.

    python -m tests.golden.walk loop|zh|en|old
    python -m tests.golden.walk pack FOLDER     # with the version whose files are to be kept

Each start of a training, and each command of the desk, is a forked process of its own: imports are
paid for once. `tests.golden` calls this with everything frozen.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.golden import frozen
from tests.golden.record import Recorder

RUN = Path("run")
OLD = Path(__file__).parent / "files" / "runs.tar.xz"

Main = Callable[[list[str]], int]


def _main() -> Main:
    """`holdfast` as a shell finds it."""
    # More than one where an older checkout was installed under the distribution's earlier name.
    script, *_same = importlib.metadata.entry_points(group="console_scripts", name="holdfast")
    main: Main = script.load()
    return main


class Walk:
    def __init__(self, lang: str, *, words_only: bool = False) -> None:
        self.top = Path.cwd()
        self.record = Recorder(self.top)
        self.lang, self.main, self.words_only = lang, _main(), words_only

    def start(self, title: str, work: Callable[[], Any]) -> None:
        """Do `work` in a process of its own, and record what it says and how it ends."""
        frozen.clock.new_start()
        self.record.title(title)
        status = self._fork(work)
        self.record.lines.append(f"ended {status}")

    def command(self, *words: str, script: bool = False) -> None:
        """Run a command as a person would; with `script` the same for a script."""
        if script and self.words_only:
            return
        words = (words[0], "--lang", self.lang, *words[1:], *(["--json"] if script else []))
        self.record.title("$ holdfast " + " ".join(words))
        before = len(self.record.lines)
        status = self._fork(lambda: self.main(list(words)))
        if script:
            text = "\n".join(self.record.lines[before:])
            del self.record.lines[before:]
            self.record.json_text(words[0], text)
        self.record.lines.append(f"ended {status}")

    def state(self, run: Path = RUN) -> None:
        """Record what is new on the disk and what lies in memory."""
        if self.words_only:
            return
        self.record.directory(run)
        self.record.memory(run)

    def _fork(self, work: Callable[[], Any]) -> int:
        sys.stdout.flush()
        with tempfile.TemporaryFile() as said:
            pid = os.fork()
            if pid == 0:
                _child(work, said.fileno())
            _pid, status = os.waitpid(pid, 0)
            said.seek(0)
            self.record.say(said.read().decode("utf-8"))
        return os.waitstatus_to_exitcode(status)


def _child(work: Callable[[], Any], said: int) -> None:
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        result = work()
        status = result if isinstance(result, int) else 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - the record has it, without lines of files
        print("".join(traceback.format_exception_only(error)).strip())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file may become larger than a checkpoint's half: every save fails, the history goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = min(path.stat().st_size for path in RUN.rglob("*.pt"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def buffers_are_made() -> None:
    """Wait for the three buffers in shared memory, which are made in the background: what lies
    there at a kill, and what a full disk refuses, must not depend on how busy the machine is."""
    stat = RUN.stat()
    mine = f"holdfast-{os.getuid()}-{stat.st_dev}-{stat.st_ino}-*/slot-*.pt"
    for _look in range(1000):
        if sum(path.stat().st_size > 0 for path in Path("/dev/shm").glob(mine)) == 3:
            return
        time.sleep(0.02)


def flip(path: Path) -> None:
    """Damage a file under all of its names: one bit in the middle of its first record."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(4200)
        byte = file.read(1)[0]
        file.seek(4200)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)


# ------------------------------------------------------------------------------- a stranger's loop


def loop(walk: Walk) -> None:
    from tests.golden.loop import Exact, train

    def fail(exact: Exact, manager: Any) -> None:
        buffers_are_made()
        with _full_disk():
            print("saved", manager.save(step=exact.now, epoch=2))
        print("failing", manager.failing)

    def later(_exact: Any, _manager: Any) -> None:
        frozen.clock.elapsed += 600

    def pinned(exact: Exact, manager: Any) -> None:
        saved = manager.save(step=exact.now, epoch=4, kind="step", reason="by hand", strict=True)
        print("saved", saved.path, saved.entry.step, saved.is_best)

    def broken(_exact: Any, _manager: Any) -> None:
        raise RuntimeError("the loop is broken")

    def epochs() -> None:
        train(RUN, 10, kill=True, at={10: lambda *_: buffers_are_made()})

    def retried() -> None:
        train(RUN, 21, at={11: fail, 12: later, 14: pinned})

    walk.start("epochs, temps and best; killed", epochs)
    walk.state()
    walk.start("rescue from memory; a save fails, and is tried again; pruned", retried)
    walk.state()
    for command in ("list", "show", "history"):
        walk.command(command, str(RUN))
        walk.command(command, str(RUN), script=True)
    flip(RUN / "latest.pt")
    walk.start("the newest is damaged: quarantine", lambda: train(RUN, 24))
    walk.state()
    walk.command("rollback", "20", str(RUN), "--yes")
    walk.state()
    walk.start("gone on after a roll-back; an exception", lambda: train(RUN, 26, at={25: broken}))
    walk.state()
    walk.command("pin", "25", str(RUN))
    source = str(RUN / "best_model.pt")
    walk.start("back to the best", lambda: train(RUN, 20, source=source, an_epoch=100))
    walk.state()
    walk.command("verify", str(RUN), "--all")
    walk.command("compare", str(RUN / "latest.pt"), source, "--tensors", "--sections", "all")
    walk.command("compare", str(RUN / "latest.pt"), source, "--tensors", script=True)
    walk.command("history", str(RUN), "--events")
    walk.command("list", str(RUN), script=True)
    walk.command("clean", str(RUN), "--keep", "1", "--temp", "--quarantine", "--archive", "--yes")
    walk.state()


# ------------------------------------------------------------------------------------- the trainer

WORDS = [
    "--data-file", "text.txt", "--checkpoint-dir", str(RUN), "--context-length", "16",
    "--vocab-size", "280", "--batch-size", "2", "--learning-rate", "0.01", "--dropout", "0.1",
    "--precision", "fp32", "--threads", "1", "--val-fraction", "0.1", "--log-every", "1",
    "--temp-every-steps", "3", "--save-every", "5", "--memory-every", "1", "--keep-last-n", "2",
    "--sample-tokens", "4",
]  # fmt: skip


def small_model() -> None:
    """Let the trainer's smallest model be smaller still, by transformers' own configuration."""
    import transformers

    real = transformers.LlamaConfig.__init__

    def small(self: Any, **settings: Any) -> None:
        if "hidden_size" in settings:
            settings |= {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
                         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
        real(self, **settings)

    transformers.LlamaConfig.__init__ = small


def write_text() -> None:
    """Some documents of which the words have an order that can be learned."""
    words = ["今天", "天气", "很好", "我们", "去", "公园", "散步", "看见", "小鸟", "和", "花"]
    documents = []
    for number in range(24):
        order = [words[(number * step + step) % len(words)] for step in range(1, 10)]
        documents.append("".join(order) + "。")
    Path("text.txt").write_text("\n\n".join(documents), "utf-8")


def train_words(
    walk: Walk, *more: str, at: dict[int, Callable[[], Any]] | None = None
) -> Callable[[], int]:
    """A start of the trainer; `at` are things that happen during its n-th step, counted from 1."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def work() -> int:
        steps = 0

        def stepped(*_args: Any) -> None:
            nonlocal steps
            steps += 1
            if at and steps in at:
                at[steps]()

        register_optimizer_step_post_hook(stepped)
        return walk.main(["train", "--lang", walk.lang, *WORDS, *more])

    return work


def _kill() -> None:
    buffers_are_made()
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def trainer(walk: Walk) -> None:
    def train(*more: str, **at: Any) -> Callable[[], int]:
        return train_words(walk, *more, **at)

    def full() -> None:
        buffers_are_made()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    def room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        frozen.clock.elapsed += 600

    walk.start("a new run; killed in its first steps", train("--epochs", "2", at={8: _kill}))
    walk.state()
    walk.start("rescue from memory; the disk is full for a while; a signal",
               train("--epochs", "2", at={2: full, 5: room, 20: _interrupt}))  # fmt: skip
    walk.state()
    walk.start("resumed to the end", train("--resume", "--epochs", "2"))
    walk.state()
    flip(RUN / "latest.pt")
    walk.start("quarantine; a third epoch", train("--resume", "--epochs", "3"))
    walk.state()
    walk.start("back to the second epoch",
               train("--checkpoint", str(RUN / "model_epoch_2.pt"), "--epochs", "1"))  # fmt: skip
    walk.state()
    walk.start("already finished", train("--resume", "--epochs", "1"))
    for command in ("list", "show", "history"):
        walk.command(command, str(RUN))
        walk.command(command, str(RUN), script=True)
    walk.command("compare", str(RUN / "latest.pt"), str(RUN / "model_epoch_1.pt"))
    walk.command("compare", str(RUN / "latest.pt"), str(RUN / "model_epoch_1.pt"), script=True)
    walk.command("verify", str(RUN), "--all")
    walk.command("history", str(RUN), "--events")
    if walk.words_only:
        return
    for name in ("training_history.json", "metrics.jsonl", "config.json"):
        text = (RUN / name).read_text("utf-8")
        rows = text.splitlines() if name == "metrics.jsonl" else [text]
        for row in rows:
            walk.record.json(name, json.loads(row))


# -------------------------------------------------------------------------------- of old versions

KEPT = (Path("loop"), Path("trained"))
MEMORY = Path("memory")  # of the loop, which was killed


def _in_memory(run: Path) -> str:
    """How a run's directory in shared memory is called, up to the run (docs/en/format.md)."""
    stat = run.stat()
    return f"holdfast-{os.getuid()}-{stat.st_dev}-{stat.st_ino}"


def _tell_kept(walk: Walk) -> None:
    """What the desk says of the two runs, in words and for scripts."""
    frozen.clock.elapsed = 10 * 3600.0
    walk.record = Recorder(walk.top)
    for run in KEPT:
        for command in ("list", "show", "history"):
            walk.command(command, str(run))
            walk.command(command, str(run), script=True)
        walk.command("compare", str(run / "latest.pt"), str(run / "best_model.pt"), script=True)
        walk.command("verify", str(run))


def pack(walk: Walk) -> None:
    """Write the files of `files/`, with the version that is installed."""
    from tests.golden.loop import train
    from tests.golden.states import STATES

    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)

    def states() -> None:
        from holdfast import CheckpointManager

        for name, make in STATES.items():
            with CheckpointManager(Path("state") / name, make(), rng=False) as manager:
                manager.save(step=1, metrics={"val_loss": 1.5, "bad": float("nan")}, strict=True)

    walk.start("states", states)
    walk.start("loop", lambda: train(KEPT[0], 14, kill=True))
    (memory,) = Path("/dev/shm").glob(f"{_in_memory(KEPT[0])}-*")
    shutil.copytree(memory, MEMORY)
    words = ["--checkpoint-dir", str(KEPT[1]), "--epochs", "2"]
    walk.start("trained", train_words(walk, *words, at={23: _interrupt}))
    _tell_kept(walk)
    told = walk.record.lines
    walk.record = Recorder(walk.top)
    walk.start("straight on", lambda: train("straight", 24))
    losses = [line for line in walk.record.lines if line.startswith("step ")][-24:]
    (target / "losses.txt").write_text("\n".join([*losses, ""]))
    (target / "told.txt").write_text("\n".join([*told, ""]), "utf-8")
    for name in STATES:
        data = (Path("state") / name / "latest.pt").read_bytes()
        (target / f"{name}.pt.golden").write_bytes(data)
    with tarfile.open(target / OLD.name, "w:xz") as archive:
        for path in (*KEPT, MEMORY):
            archive.add(path)


def old(walk: Walk) -> None:
    """Go on with the runs that an earlier version has begun."""
    from tests.golden.loop import train

    with tarfile.open(OLD) as archive:
        archive.extractall(filter="tar")
    _tell_kept(walk)
    (first, *_others) = (KEPT[0] / "events.jsonl").read_text("utf-8").splitlines()
    run_id = json.loads(first)["run_id"][:8]
    shutil.copytree(MEMORY, Path("/dev/shm") / f"{_in_memory(KEPT[0])}-{run_id}-g1")
    walk.start("gone on with a loop", lambda: train(KEPT[0], 24))
    walk.state(KEPT[0])
    words = ["--checkpoint-dir", str(KEPT[1]), "--epochs", "2", "--resume"]
    walk.start("gone on with a training", train_words(walk, *words))
    walk.state(KEPT[1])


def arithmetic() -> str:
    """A digest of what this processor computes: where it is another one, other bits are right."""
    import hashlib

    import torch
    from torch.nn import functional

    torch.manual_seed(5)
    layer, x = torch.nn.Linear(64, 48), torch.randn(30, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    seen = [x]
    for _step in range(3):
        y = layer(x).reshape(1, 2, 30, 24)
        y = functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        y = functional.dropout(functional.silu(functional.rms_norm(y, [24])), 0.1)
        loss = functional.cross_entropy(y.reshape(60, 24), torch.arange(60) % 24)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), torch.cos(y.detach()), torch.exp(y.detach()), layer.weight.detach()]
    digest = hashlib.sha256()
    for tensor in seen:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


WALKS = {"loop": loop, "zh": trainer, "en": trainer, "old": old, "pack": pack}


def main() -> int:
    what, top = sys.argv[1], Path(tempfile.mkdtemp(prefix="holdfast-golden-"))
    os.chdir(top)
    frozen.freeze()
    if what != "loop":
        small_model()
        write_text()
    import torch

    torch.set_num_threads(1)
    head = ["made with torch " + ".".join(torch.__version__.split(".")[:2])]
    if what != "loop":
        for name in ("transformers", "tokenizers"):
            head.append(f"{name} {importlib.metadata.version(name)}")
    computes = f"arithmetic {arithmetic()}"
    frozen.one_at_a_time()
    frozen.freeze_versions()
    # What is written does not depend on the language: in English the words are enough.
    walk = Walk("zh" if what == "zh" else "en", words_only=what == "en")
    try:
        WALKS[what](walk)
    finally:
        _forget_memory()
        os.chdir("/")
        shutil.rmtree(top)
    lines = [", ".join(head), computes, *walk.record.lines, ""]
    sys.stdout.buffer.write("\n".join(lines).encode("utf-8"))
    return 0


def _forget_memory() -> None:
    """Remove what killed trainings of this walk have left in shared memory."""
    for stat in [path.stat() for path in Path.cwd().glob("*") if path.is_dir()]:
        for place in Path("/dev/shm").glob(f"holdfast-*-{stat.st_dev}-{stat.st_ino}-*"):
            shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
