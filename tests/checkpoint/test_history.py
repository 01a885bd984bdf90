"""What the history says is read once, whoever appends to it, and stays small and right."""

from __future__ import annotations

import json
import os
import random
import threading
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.rundir.history import History, Known
from tests.support import Toy, in_child


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "events.jsonl")


def durable(id_: str, step: int, name: str, generation: int = 1) -> dict[str, Any]:
    return {
        "time": "2026-01-01T00:00:00.000+00:00", "event": "durable", "id": id_, "run_id": "run",
        "generation": generation, "step": step, "names": [name, "latest.pt"],
    }  # fmt: skip


def lives(count: int) -> str:
    """The history of `count` saves of which each is removed again."""
    lines = []
    for n in range(count):
        lines += [
            durable(f"old{n}", n, f"temp/temp_step{n}.pt"),
            {"event": "verified", "id": f"old{n}", "step": n},
            {"event": "removed", "id": f"old{n}", "names": [f"temp/temp_step{n}.pt"]},
        ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def append(history: History, *events: dict[str, Any]) -> None:
    with history.path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def anew(history: History) -> Known:
    """What a reader knows that begins at the beginning."""
    return History(history.path).known


# ------------------------------------------------------------------------------------ what it costs


def bytes_read() -> int:
    """Bytes that this process has read from files until now."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what Linux says is read")
def test_a_save_reads_no_more_after_thirty_thousand_events_than_after_ten(tmp_path: Path) -> None:
    def three_saves() -> int:
        toy = Toy(seed=5)
        with toy.manager(tmp_path) as manager:
            manager.resume()
            manager.save(step=toy.now, kind="temp", strict=True)
            before = bytes_read()
            for _n in range(3):
                toy.step()
                manager.save(step=toy.now, kind="temp", strict=True)
            return bytes_read() - before

    first = three_saves()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(lives(10_000))
    assert three_saves() < first + 500_000 < (tmp_path / "events.jsonl").stat().st_size


def test_what_is_kept_of_removed_checkpoints_takes_no_memory(history: History) -> None:
    history.path.write_text(lives(10))
    assert history.known.verified == set() and history.known.announced == {}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with history.path.open("a") as file:
            file.write(lives(10_000))
        assert history.known.generation == 1
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()
    assert history.known == anew(history)


# ----------------------------------------------------------------------------------- what it says


def test_each_event_counts_whoever_appends_it(history: History, tmp_path: Path) -> None:
    ours, theirs = Catalog(tmp_path), Catalog(tmp_path)
    ours.record("began", run_id="run", generation=3)
    append(history, durable("a", 1, "a.pt"), {"event": "verified", "id": "a"})
    assert theirs.history.known.verified == ours.history.known.verified == {"a"}

    def in_another_process() -> None:
        theirs.record("pinned", id="a")
        theirs.record("damaged", id="a")

    assert in_child(in_another_process) == 0
    known = ours.history.known
    assert (known.pinned, known.verified, known.damaged) == ({"a"}, set(), {"a"})
    ours.record("verified", id="a")
    theirs.record("unpinned", id="a")
    for known in (ours.history.known, theirs.history.known, anew(history)):
        assert (known.pinned, known.verified, known.damaged) == (set(), {"a"}, set())
        assert (known.run, known.generation) == (("run", 1), 3)


def test_a_line_counts_when_its_end_is_there(history: History) -> None:
    line = json.dumps({"event": "verified", "id": "a"}).encode() + b"\n"
    for i in range(len(line)):
        history.path.write_bytes(line[:i])
        assert history.known.verified == set(), f"after {i} bytes"
    history.path.write_bytes(line)
    assert history.known.verified == {"a"}


def test_what_a_crash_tore_is_passed_over_and_what_follows_counts(history: History) -> None:
    history.record("verified", id="a")
    assert history.known.verified == {"a"}
    with history.path.open("ab") as file:
        file.write(b'{"time": "x", "event": "verified", "id": "b"')
    assert history.known.verified == {"a"}
    history.record("verified", id="c")
    assert history.known.verified == anew(history).verified == {"a", "c"}


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_another_history_in_its_place_is_read_anew(
    history: History, in_place: bool, longer: bool
) -> None:
    """A backup that was brought back, over the file or as a file of its own."""
    for id_ in "abc":
        history.record("verified", id=id_)
    assert history.known.verified == {"a", "b", "c"}
    lines = history.path.read_text().splitlines(keepends=True)
    text = "".join([lines[0], *(['{"event": "verified", "id": "d"}\n'] * (9 if longer else 1))])
    if in_place:
        history.path.write_text(text)
    else:
        other = history.path.with_name("other")
        other.write_text(text)
        other.replace(history.path)
    assert history.known.verified == {"a", "d"}
    history.path.unlink()
    assert history.known == Known()
    history.record("verified", id="e")
    assert history.known.verified == {"e"}


def test_an_interrupted_look_forgets_nothing(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id_ in "abc":
        history.record("pinned", id=id_)
    real, left = Known.take, 2

    def interrupted(known: Known, event: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        real(known, event)

    monkeypatch.setattr(Known, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _known = history.known
    monkeypatch.undo()
    assert history.known.pinned == {"a", "b", "c"}


def test_threads_may_ask_and_append_at_once(history: History) -> None:
    def work(who: int) -> None:
        for n in range(20):
            history.record("verified", id=f"{who}-{n}")
            assert f"{who}-{n}" in history.known.verified

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.known.verified) == 80


def test_read_as_it_grows_it_says_what_it_says_read_at_once(history: History) -> None:
    """Random events, random pieces of lines, tears and nonsense."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    chance = random.Random(seed)
    fields: dict[str, list[Any]] = {
        "id": ["a", "b", "c", None, ["x"], {"y": 1}],
        "generation": [1, 2, "x", None],
        "step": [1, 2, None],
        "run_id": ["run", "other", 7],
        "time": ["2026-01-01T00:00:00+00:00", 3],
        "names": [["a.pt"], ["b.pt", "latest.pt"], 7, [], [[]], None],
        "order": [[1, 2, 3], [1], "x"],
        "source": [None, "archive/x.pt", "../x.pt", 3],
    }
    kinds = ["began", "resumed", "durable", "verified", "removed", "archived", "pinned", "unpinned",
             "damaged", "rolled_back", "other", None, ["durable"]]  # fmt: skip
    for _n in range(300):
        event = {"event": chance.choice(kinds)}
        event |= {name: chance.choice(values) for name, values in fields.items()}
        line = json.dumps(event).encode() + b"\n"
        if chance.random() < 0.1:
            line = line[: chance.randrange(len(line))]
        with history.path.open("ab") as file:
            file.write(line)
        if chance.random() < 0.5:
            assert history.known == anew(history)
    assert history.known == anew(history)


def test_what_was_saved_and_removed_between_two_looks_leaves_nothing_else_behind(
    history: History,
) -> None:
    """As a run writes it; with torn lines, and checkpoints that come back after their removal."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    chance = random.Random(seed)
    seen = History(history.path)

    def write(event: str, id_: str, **fields: Any) -> None:
        history.record(event, id=id_, step=1, **fields)
        if chance.random() < 0.1:
            with history.path.open("ab") as file:
                file.write(b'{"time": "2026-11-30", "event": "removed", "id": "')
        _look = seen.known

    here: list[str] = []
    for sequence in range(1, 80):
        id_ = chance.choice(here) if here and chance.random() < 0.1 else uuid.uuid4().hex
        here = [*(each for each in here if each != id_), id_]
        write("durable", id_, run_id="run", generation=1 + sequence // 40, sequence=sequence,
              names=[f"checkpoint_step_{id_[:2]}.pt", "latest.pt"])  # fmt: skip
        if chance.random() < 0.9:
            write("verified", id_)
        if chance.random() < 0.1:
            write(chance.choice(["pinned", "damaged", "archived"]), chance.choice(here))
        while len(here) > 3:
            id_ = here.pop(0)
            names = [f"checkpoint_step_{id_[:2]}.pt"]
            write("removed", id_, names=names, reason="retention")
    assert History(history.path).known == seen.known


# ------------------------------------------------------------------------------------ rotten lines


def saved(history: History, id_: str, step: int) -> None:
    fields = durable(id_, step, f"{id_}.pt")
    history.record("durable", **{k: v for k, v in fields.items() if k not in ("time", "event")})


def test_no_flipped_bit_of_its_line_loses_a_pin(history: History) -> None:
    saved(history, "first", 1)
    saved(history, "pinned", 2)
    before = history.path.stat().st_size
    history.record("pinned", id="pinned", step=2)
    data = history.path.read_bytes()
    for offset in range(before, len(data)):
        for bit in range(8):
            rotten = bytearray(data)
            rotten[offset] ^= 1 << bit
            history.path.write_bytes(rotten)
            saved(history, "later", 3)
            known = anew(history)
            assert "pinned" in known.pinned, f"bit {bit} of byte {offset}"
            assert "later" not in known.pinned, f"bit {bit} of byte {offset}"


def test_where_a_line_feed_rots_both_lines_are_cared_for(history: History) -> None:
    saved(history, "pinned", 1)
    history.record("pinned", id="pinned", step=1)
    end = history.path.stat().st_size
    saved(history, "later", 2)
    data = bytearray(history.path.read_bytes())
    data[end - 1] ^= 1
    history.path.write_bytes(data)
    known = anew(history)
    assert (known.pinned, list(known.announced)) == ({"pinned"}, ["pinned.pt", "later.pt"])


@pytest.mark.parametrize("kind", ["removed", "unpinned", "rolled_back", "durable"])
def test_a_rotten_line_that_can_be_parsed_is_not_believed(history: History, kind: str) -> None:
    saved(history, "a", 1)
    history.record("verified", id="a", step=1)
    history.record(kind, id="b", step=1, names=["b.pt"], generation=7, run_id="run")
    text = history.path.read_text()
    line = text.splitlines()[-1]
    other = line.replace('"id": "b"', '"id": "a"').replace('"b.pt"', '"a.pt"')
    history.path.write_text(text.replace(line, other))
    known = anew(history)
    assert (known.verified, known.generation, list(known.announced)) == ({"a"}, 1, ["a.pt"])
    assert known.pinned == {"a"}, "what was there counts as kept"
    history.record("unpinned", id="a", step=1)
    assert anew(history).pinned == set()


def test_a_checkpoint_that_may_have_been_pinned_is_not_pruned_and_it_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=1) as manager:
        manager.save(step=1, strict=True)
        Catalog(tmp_path).record("pinned", id=manager.list()[0].id, step=1)
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"event": "pinned"', b'"event": "rinned"'))
    with toy.manager(tmp_path, keep_last=1) as manager:
        manager.resume()
        for step in range(2, 6):
            manager.save(step=step, strict=True)
        assert [entry.step for entry in manager.list()] == [5, 4, 1]
    (warning,) = (each.message for each in caplog.records if "damaged lines" in each.message)
    assert warning.startswith(f"{path}: damaged lines: 1.")


def test_lines_of_earlier_versions_and_torn_ones_read_as_before(history: History) -> None:
    append(history, durable("a", 1, "a.pt"), {"event": "verified", "id": "a"})
    history.record("verified", id="b")
    whole = history.path.read_bytes()
    line = whole.splitlines()[-1]
    for end in range(len(line) - len(', "crc": "00000000"}')):
        history.path.write_bytes(whole + line[:end])
        history.record("verified", id="c")
        known = anew(history)
        assert (known.verified, known.pinned) == ({"a", "b", "c"}, set()), line[:end]


def test_the_checksum_is_shown_to_no_reader(history: History) -> None:
    history.record("verified", id="a", step=1)
    assert history.path.read_bytes().rstrip().endswith(b'"}')
    (event,) = history.events()
    assert list(event) == ["time", "event", "id", "step"]
