"""`holdfast unpack`: what was packed comes back; what was changed or is hostile does not."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from holdfast.checkpoint.system import filesystem
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    HoldfastError,
    ResourceError,
)
from holdfast.manage.listing import listing_of
from holdfast.manage.packing.archive import MANIFEST, SUMS, Contents, Item
from holdfast.manage.packing.pack import Writer, encode, encode_sums, pack
from holdfast.manage.packing.unpack import checked, contents_of, unpack
from holdfast.manage.progress import Progress
from holdfast.manage.rundir import disk_use, look
from holdfast.table import Screen
from tests.manage.runs import Training, make_run
from tests.support import die, in_child


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its archives; tests copy what they change."""
    place = tmp_path_factory.mktemp("made")
    run = make_run(place / "run")
    (run / "logs").mkdir()
    (run / "logs" / "训练.log").write_text("三步\n", "utf-8")
    pack(run, place / "a.tar")
    pack(run, place / "a.tar.zst")
    return place


def records(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = listing_of(look(directory)).to_json()["checkpoints"]
    return found


def left_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst"])
def test_what_was_packed_comes_back_with_its_links(made: Path, tmp_path: Path, name: str) -> None:
    target, found = unpack(made / name, str(tmp_path / "deep" / "b"))
    run = made / "run"
    assert target == tmp_path / "deep" / "b" and found.contents.step == 400
    assert records(target) == records(run)
    for path in run.rglob("*"):
        relative = path.relative_to(run)
        if path.is_file() and relative.name not in (".run.lock", ".catalog.lock", "metadata.json"):
            assert (target / relative).read_bytes() == path.read_bytes(), relative
    files = list(target.rglob("*.pt"))
    assert disk_use(files) == disk_use(run.rglob("*.pt")), "links are links again"
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in files)
    assert (target / "events.jsonl").stat().st_mode & 0o777 == 0o644
    assert left_in(tmp_path) == ["deep"] and left_in(tmp_path / "deep") == ["b"]
    with Training(target) as training:
        assert training.resumed is not None and training.resumed.step == 400
        training.epoch(5, 1.0)


def test_without_hard_links_the_names_are_copies(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    target, _found = unpack(made / "a.tar", str(tmp_path / "b"))
    assert (target / "latest.pt").stat().st_nlink == 1
    assert load(target / "latest.pt")["epoch"] == 4 and records(target) == records(made / "run")


def test_any_tar_unpacks_it_too(made: Path, tmp_path: Path) -> None:
    with tarfile.open(made / "a.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert records(tmp_path / "run") == records(made / "run")
    again = pack(tmp_path / "run", tmp_path / "again.tar")
    names = {item.name for item in again.contents.items}
    assert MANIFEST not in names and SUMS not in names


def test_the_name_of_the_run_is_where_it_goes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()  # empty: nothing is in the way
    assert unpack(made / "a.tar")[0] == Path("run")
    assert load(tmp_path / "run" / "latest.pt")["epoch"] == 4
    with pytest.raises(HoldfastError, match="run exists and is not empty"):
        unpack(made / "a.tar")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(HoldfastError, match="is no directory"):
            unpack(made / "a.tar", name)


def test_what_is_in_it_is_told_from_its_first_member(made: Path, tmp_path: Path) -> None:
    shown = contents_of(made / "a.tar")
    text = "\n".join(shown.lines(Screen()))
    assert "model_epoch_4.pt" in text and "latest.pt, model.pt" in text
    assert text.endswith("4 of them checkpoints; the newest is step 400 (epoch 4)")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((made / "a.tar").read_bytes()[:10_000])
    assert contents_of(cut).contents == shown.contents
    form = shown.to_json()
    assert (form["step"], form["checkpoints"], form["run"]) == (400, 4, "run")
    assert {"name": "latest.pt", "size": form["members"][-1]["size"], "step": 400,
            "link": "model_epoch_4.pt"} in form["members"]  # fmt: skip
    json.dumps(form)


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst"])
def test_every_flip_in_what_counts_is_found_and_nothing_is_left(
    made: Path, tmp_path: Path, name: str
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    good = (made / name).read_bytes()
    unharmed = 0
    for _attempt in range(40):
        damaged = bytearray(good)
        offset = dice.randrange(len(good))
        damaged[offset] ^= 1 << dice.randrange(8)
        path = tmp_path / name
        path.write_bytes(damaged)
        try:
            target, _found = unpack(path, str(tmp_path / "b"))
        except CheckpointError as error:
            assert str(path) in str(error)
            assert left_in(tmp_path) == [name]
        else:  # padding between members, or what follows the last one: no file's byte
            unharmed += 1
            assert records(target) == records(made / "run")
            shutil.rmtree(target)
    assert unharmed < 12


def test_the_damaged_member_is_named(made: Path, tmp_path: Path) -> None:
    data = bytearray((made / "a.tar").read_bytes())
    with tarfile.open(made / "a.tar") as tar:
        at = {member.name: member.offset_data for member in tar.getmembers()}
    data[at["run/model_epoch_2.pt"] + 5000] ^= 1
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    for work in (checked, lambda found: unpack(found, str(tmp_path / "b"))):
        with pytest.raises(DamagedCheckpoint, match=r"the content of model_epoch_2\.pt has chang"):
            work(path)
    for cut, words in (
        (at["run/model_epoch_3.pt"] + 100, r"it ends.* in model_epoch_3\.pt"),
        (at["run/model_epoch_3.pt"] - 512, r"before model_epoch_3\.pt"),
        (at[f"run/{SUMS}"] - 512, r"before holdfast-pack\.xxh128"),
        (300, "no run that holdfast has packed"),
        (0, "no run that holdfast has packed"),
    ):
        path.write_bytes((made / "a.tar").read_bytes()[:cut])
        with pytest.raises(CheckpointError, match=words):
            checked(path)
    assert checked(made / "a.tar").contents.step == 400


def test_a_compressed_one_that_is_cut_or_broken_is_damaged(made: Path, tmp_path: Path) -> None:
    data = (made / "a.tar.zst").read_bytes()
    path = tmp_path / "a.tar.zst"
    for half in (data[: len(data) // 2], data[: len(data) // 2] + b"\0" * 5000, data[:20]):
        path.write_bytes(half)
        with pytest.raises(CheckpointError, match=r"a\.tar\.zst is (damaged|no run)"):
            checked(path)


def test_what_is_no_packed_run_is_said(tmp_path: Path, made: Path) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar:
        tar.add(made / "run" / "events.jsonl", "run/events.jsonl")
    for path in (other, made / "run" / "latest.pt"):
        with pytest.raises(ForeignCheckpoint, match="no run that holdfast has packed"):
            contents_of(path)
    with pytest.raises(FileNotFoundError):
        contents_of(tmp_path / "gone.tar")


def test_what_the_disk_makes_of_it_is_read_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = filesystem.sync_file
    changed: list[int] = []

    def rot(fd: int) -> None:
        if os.fstat(fd).st_size > 20_000 and not changed:
            changed.append(fd)
            os.pwrite(fd, b"\xff\xff", 9_000)
        sync(fd)

    monkeypatch.setattr(filesystem, "sync_file", rot)
    with pytest.raises(DamagedCheckpoint, match=r"model_epoch_4\.pt is damaged"):
        unpack(made / "a.tar", str(tmp_path / "b"))
    assert changed and left_in(tmp_path) == []


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_an_interrupt_leaves_nothing(made: Path, tmp_path: Path, share: float) -> None:
    def show(progress: Progress) -> None:
        if progress.done >= share * progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(made / "a.tar", str(tmp_path / "b"), show)
    assert left_in(tmp_path) == []


def test_what_does_not_fit_is_said_before_anything_is_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 1000)
    with pytest.raises(ResourceError, match="1000 B free"):
        unpack(made / "a.tar", str(tmp_path / "b"))
    assert left_in(tmp_path) == []


# ----------------------------------------------------------------------------------------- hostile


Members = Iterator[tuple[tarfile.TarInfo, bytes]]


def plain(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def craft(path: Path, items: list[Item], members: Members, **fields: Any) -> Path:
    """An archive that says `items` are in it, and holds `members`."""
    contents = Contents("run", "2026-01-01T00:00:00+00:00", "0", "r", 1, 1, tuple(items))
    contents = replace(contents, **fields)
    first = encode(contents)
    with tarfile.open(path, "w") as tar:
        for info, content in [plain(f"{contents.top}/{MANIFEST}", first), *members]:
            tar.addfile(info, io.BytesIO(content))
        info, content = plain(f"run/{SUMS}", encode_sums({}))
        tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, linkname: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info, b""


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "./x", "a\\b", "", "a\nb",
                                  "d/" * 1000 + "x"])  # fmt: skip
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    path = craft(tmp_path / "a.tar", [Item(name, 1)], iter([plain(f"run/{name}", b"x")]))
    with pytest.raises(DamagedCheckpoint, match=r"holdfast-pack\.json is not what it should be"):
        unpack(path, str(tmp_path / "b"))
    assert left_in(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("top", ["..", "/", "a/b", "", "."])
def test_nor_does_the_name_of_the_run(tmp_path: Path, top: str) -> None:
    path = craft(tmp_path / "a.tar", [], iter([]), top=top)
    with pytest.raises(CheckpointError):
        unpack(path)


@pytest.mark.parametrize(
    "member",
    [
        special("run/x", tarfile.SYMTYPE, "/etc/passwd"),
        special("run/x", tarfile.SYMTYPE, "y"),
        special("run/x", tarfile.LNKTYPE, "/etc/passwd"),
        special("run/x", tarfile.LNKTYPE, "../../x"),
        special("run/x", tarfile.CHRTYPE),
        special("run/x", tarfile.FIFOTYPE),
        special("run/x", tarfile.DIRTYPE),
        plain("run/../x", b""),
        plain("/x", b""),
        plain("run/y", b""),
        plain("run/x", b"longer than it said"),
    ],
    ids=lambda member: f"{member[0].name}-{member[0].type!r}-{member[0].linkname}",
)
def test_a_member_that_is_not_the_one_that_was_announced_is_refused(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]
) -> None:
    path = craft(tmp_path / "a.tar", [Item("x", 0)], iter([member]))
    with pytest.raises(DamagedCheckpoint, match=r"x is not what it should be"):
        unpack(path, str(tmp_path / "b"))
    assert left_in(tmp_path) == ["a.tar"]


def test_a_link_means_a_file_that_came_before(tmp_path: Path) -> None:
    for link in ("later.pt", "../../etc/passwd", "/etc/passwd", "a"):
        items = [Item("a", 0, link=link), Item("later.pt", 0)]
        path = craft(tmp_path / "a.tar", items, iter([]))
        with pytest.raises(DamagedCheckpoint, match=r"holdfast-pack\.json"):
            unpack(path, str(tmp_path / "b"))


def test_more_than_was_announced_is_refused(tmp_path: Path, made: Path) -> None:
    path = tmp_path / "a.tar"
    shutil.copy(made / "a.tar", path)
    with tarfile.open(path, "a") as tar:
        info, content = plain("run/more", b"x")
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DamagedCheckpoint, match=r"more follows after holdfast-pack\.xxh128"):
        unpack(path, str(tmp_path / "b"))
    path = craft(tmp_path / "b.tar", [Item("x", 1)], iter([plain("run/x", b"x")]))
    with pytest.raises(DamagedCheckpoint, match="the content of"):
        checked(path)  # no checksum is no checksum


def test_a_bomb_takes_neither_memory_nor_disk(tmp_path: Path) -> None:
    endless, _nothing = special("run/x", tarfile.XHDTYPE)  # a header of 64 MiB, as it says
    endless.size = 64 << 20
    path = craft(tmp_path / "a.tar", [Item("x", 0)], iter([]))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        behind_the_first = tar.getmembers()[1].offset
    header = endless.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data[:behind_the_first] + header + b"1" * (64 << 20))
    tracemalloc.start()
    with pytest.raises(DamagedCheckpoint, match="x is not what it should be"):
        unpack(path, str(tmp_path / "b"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20
    vast = craft(tmp_path / "v.tar", [Item("x", 1 << 60)], iter([]))
    with pytest.raises(HoldfastError, match="no run can be packed so small"):
        unpack(vast, str(tmp_path / "b"))
    assert left_in(tmp_path) == ["a.tar", "v.tar"]


@pytest.mark.parametrize("top", [".ssh", "-rf", ".git"])
def test_a_name_that_is_no_run_directory_must_be_chosen_by_the_user(
    tmp_path: Path, top: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = craft(tmp_path / "a.tar", [], iter([]), top=top)
    with pytest.raises(HoldfastError, match=f"calls its run {top}, .* name the one to unpack into"):
        unpack(path)
    assert left_in(tmp_path) == ["a.tar"]


def test_zeros_that_were_packed_small_do_not_fill_the_disk(tmp_path: Path) -> None:
    import zstandard

    size = 1 << 30
    path = craft(tmp_path / "a.tar", [Item("x", size)], iter([]))
    packed = tmp_path / "a.tar.zst"
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    with pytest.raises(HoldfastError, match=r"would take 1\.00 GiB: no run can be packed so small"):
        unpack(packed, str(tmp_path / "b"))
    assert left_in(tmp_path) == ["a.tar", "a.tar.zst"]


def test_a_manifest_that_makes_no_sense_is_damage_and_a_newer_one_is_not(
    tmp_path: Path, made: Path
) -> None:
    good = contents_of(made / "a.tar").contents.to_json()
    spoilt: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.update(items=[{**m["items"][0], "size": -1}]),
        lambda m: m.update(items=[{**m["items"][0], "size": 1.5}]),
        lambda m: m.update(items=[m["items"][0], m["items"][0]]),
        lambda m: m.update(items=[{**m["items"][0], "link": {}}]),
        lambda m: m.update(items=[dict(m["items"][0], name=name) for name in ("a", "a/b")]),
        lambda m: m.update(items=[dict(m["items"][0], name=name) for name in ("a/b/c", "a/b")]),
        lambda m: m.update(step="1"),
        lambda m: m.update(format="tar"),
        lambda m: m.pop("items"),
        lambda m: m.update(items=7),
    ]
    path = tmp_path / "a.tar"
    for spoil in spoilt:
        manifest = json.loads(json.dumps(good))
        spoil(manifest)
        _write_alone(path, json.dumps(manifest).encode())
        with pytest.raises(DamagedCheckpoint, match=r"holdfast-pack\.json"):
            contents_of(path)
    for text in (b"[" * 100_000, b"\xff\xfe", b"[]"):
        _write_alone(path, text)
        with pytest.raises(DamagedCheckpoint, match=r"holdfast-pack\.json"):
            contents_of(path)
    _write_alone(path, json.dumps({**good, "format_version": 2}).encode())
    with pytest.raises(CheckpointError, match="newer holdfast"):
        contents_of(path)


def test_what_is_called_a_checkpoint_must_be_one(tmp_path: Path) -> None:
    content = b"no checkpoint"
    contents = Contents("run", "2026-01-01T00:00:00+00:00", "0", "r", 1, 1,
                        (Item("latest.pt", len(content), step=1),))  # fmt: skip
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        writer = Writer(file, contents)
        writer.file(contents.items[0], io.BytesIO(content))
        writer.close()
    checked(path)
    with pytest.raises(CheckpointError, match=r"latest\.pt was not written by holdfast"):
        unpack(path, str(tmp_path / "b"))
    assert left_in(tmp_path) == ["a.tar"]


def test_a_size_below_zero_is_no_size(tmp_path: Path, made: Path) -> None:
    """tarfile of older Python versions reads it as a number like any other."""
    data = bytearray((made / "a.tar").read_bytes())
    data[124:136] = (-512 + (1 << 96)).to_bytes(12, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(CheckpointError):
        contents_of(tmp_path / "a.tar")


def _write_alone(path: Path, manifest: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        info, content = plain(f"run/{MANIFEST}", manifest)
        tar.addfile(info, io.BytesIO(content))


def test_a_python_without_the_filter_refuses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older patch releases have none; our own rules do not lean on it."""
    monkeypatch.delattr(tarfile, "data_filter")
    member = special("run/x", tarfile.SYMTYPE, "/etc/passwd")
    path = craft(tmp_path / "a.tar", [Item("x", 0)], iter([member]))
    with pytest.raises(DamagedCheckpoint):
        unpack(path, str(tmp_path / "b"))


def test_what_a_killed_one_has_left_goes_with_the_next(made: Path, tmp_path: Path) -> None:
    def killed() -> None:
        Path.rename = die  # type: ignore[assignment]
        unpack(made / "a.tar", str(tmp_path / "b"))

    assert in_child(killed) == -signal.SIGKILL
    assert [name.startswith(".unpacking-") for name in left_in(tmp_path)] == [True]
    unpack(made / "a.tar", str(tmp_path / "b"))
    assert left_in(tmp_path) == ["b"]
