"""The file: it is a ZIP that every tool reads, and no byte of it can change unnoticed."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import random
import resource
import struct
import sys
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load, verify
from holdfast.checkpoint.format import container, layout, reading
from holdfast.checkpoint.format import image as images
from holdfast.checkpoint.format.container import Reader
from holdfast.checkpoint.format.layout import Record, local_header, place, plan, tail
from holdfast.checkpoint.format.reading import CHUNK, OWN_PAGES
from holdfast.checkpoint.state import codec
from holdfast.checkpoint.state.tree import normalise
from holdfast.checkpoint.system.pages import PAGE
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    UnsupportedValue,
)
from tests.support import assert_same, craft, flip, image_of, python, write_image, write_state


def small_state() -> dict[str, Any]:
    """Every kind of record in few bytes: small, empty, page-sized and odd-sized storages."""
    return {
        "odd": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0),
        "page": torch.arange(1024, dtype=torch.float32),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "values": {"text": "汉字", 3: (1, 2.5, None), "bytes": b"\0\xff"},
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_state(tmp_path / "small.pt", small_state())


# ------------------------------------------------------------------------------------------ layout


def test_payloads_are_aligned_in_order_and_do_not_overlap() -> None:
    sizes = [0, 1, 63, 64, PAGE - 1, PAGE, PAGE + 1, 7, 3 * PAGE]
    records = plan((f"checkpoint/data/{i}", size) for i, size in enumerate(sizes))
    cursor = 0
    for record, size in zip(records, sizes, strict=True):
        assert record.header == cursor
        assert record.offset % (PAGE if size >= PAGE else 64) == 0
        assert len(local_header(record)) == record.offset - record.header
        cursor = record.end


def test_same_names_and_sizes_give_the_same_offsets() -> None:
    sizes = [(f"checkpoint/data/{i}", 1000 * i) for i in range(20)]
    assert plan(sizes) == plan(sizes)


def test_the_pieces_of_an_image_follow_each_other_without_a_gap() -> None:
    image = image_of(small_state())
    cursor = 0
    for offset, piece in image.pieces:
        assert offset == cursor
        cursor += memoryview(piece).nbytes
    assert cursor == image.size
    assert image.size % PAGE == 0


def test_the_size_is_known_without_hashing() -> None:
    tree = normalise(small_state())
    payloads = tree.payloads()
    sizes = [(name, memoryview(payload).nbytes) for name, payload in payloads]
    designed = images.design(sizes, codec.to_json(tree), reserve=50_000)
    assert designed.size == images.build(payloads, codec.to_json(tree), reserve=50_000).size


def test_the_size_does_not_change_while_the_reserve_lasts() -> None:
    weights = torch.randn(5000)
    sizes = {
        image_of({"w": weights, "history": [0.1] * n, "step": n**9}, reserve=64 << 10).size
        for n in range(0, 1000, 111)
    }
    assert len(sizes) == 1
    assert image_of({"w": weights, "history": [0.1] * 10_000}, reserve=64 << 10).size > max(sizes)


def test_tensors_stay_where_they_are_from_save_to_save() -> None:
    def offsets(step: int) -> list[int]:
        torch.manual_seed(step)
        state = {"w": torch.randn(100, 50), "b": torch.randn(3), "note": "x" * step, "n": [step]}
        records = image_of(state).manifest["records"]
        return [r["offset"] for r in records if r["name"].startswith("checkpoint/data/")]

    assert offsets(1) == offsets(500)


def test_every_zip_tool_reads_it(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        names = archive.namelist()
        assert names[-1] == "checkpoint/holdfast.json"
        assert {"checkpoint/data.pkl", "checkpoint/byteorder", "checkpoint/version"} < set(names)
    with Reader(small) as reader, zipfile.ZipFile(small) as archive:
        for record in reader.records:
            assert reader.read(record) == archive.read(record.name)
        assert reader.record("checkpoint/version") in reader.records
        with pytest.raises(DamagedCheckpoint, match="missing"):
            reader.record("checkpoint/data/99")


def test_the_pieces_of_an_image_are_the_whole_file(small: Path) -> None:
    sink = io.BytesIO()
    sink.writelines(piece for _offset, piece in image_of(small_state()).pieces)
    assert sink.getvalue() == small.read_bytes()


def test_the_same_state_gives_the_same_bytes(tmp_path: Path, small: Path) -> None:
    assert write_state(tmp_path / "again.pt", small_state()).read_bytes() == small.read_bytes()


def test_more_records_than_zip_can_count(tmp_path: Path) -> None:
    payloads: list[tuple[str, container.Buffer]] = [
        (f"checkpoint/data/{i}", struct.pack("<I", i)) for i in range(65_540)
    ]
    path = write_image(tmp_path / "many.pt", images.build(payloads, {}))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 65_541
        assert archive.read("checkpoint/data/65539") == struct.pack("<I", 65_539)
    with Reader(path) as reader:
        reader.check_structure()
        assert reader.read(reader.record("checkpoint/data/65539")) == struct.pack("<I", 65_539)


def test_records_and_offsets_beyond_four_gibibytes(tmp_path: Path) -> None:
    """A sparse file: only headers and small payloads are written, the rest are holes."""
    payload = b"behind"
    crc, xxh3 = images.checksums(payload)
    large = place(0, "checkpoint/data/0", (4 << 30) + 5)
    exact = place(large.end, "checkpoint/data/1", 0xFFFFFFFF)
    last = place(exact.end, layout.MANIFEST, len(payload), crc, xxh3)
    records = [large, exact, last]
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        for record in records:
            file.seek(record.header)
            file.write(local_header(record))
        file.write(payload)
        assert file.tell() == last.end
        file.write(tail(records))
    assert path.stat().st_blocks * 512 < 1 << 20
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [info.file_size for info in infos] == [record.size for record in records]
        assert [info.header_offset for info in infos] == [record.header for record in records]
        assert archive.read(layout.MANIFEST) == payload
        with archive.open("checkpoint/data/0") as opened:
            assert opened.read(10) == bytes(10)


def test_torch_opens_a_file_of_more_than_four_gibibytes(tmp_path: Path) -> None:
    """Headers of a real large state; its first tensor is a hole in the file and in memory."""
    state = {"large": torch.empty((4 << 30) + 64, dtype=torch.uint8), "small": torch.arange(10)}
    tree = normalise(state)
    image = images.build(tree.payloads(), codec.to_json(tree))
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        for offset, piece in image.pieces:
            if memoryview(piece).nbytes < 1 << 20:
                file.seek(offset)
                file.write(piece)
    assert path.stat().st_size == image.size > 4 << 30
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded["small"], torch.arange(10))
    assert loaded["large"].shape == ((4 << 30) + 64,)
    assert loaded["large"][-1] == 0
    with Reader(path) as reader:
        reader.check_structure()


def test_plain_torch_load_opens_it_where_nobody_has_heard_of_holdfast(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", small_state())
    said = python(
        """
        import sys, zipfile, torch
        path = sys.argv[1]
        try:
            import holdfast
            raise SystemExit("holdfast is here")
        except ImportError:
            pass
        for mmap in (False, True):
            state = torch.load(path, weights_only=True, mmap=mmap)
            assert state["page"].tolist() == list(range(1024))
            assert state["half"].dtype == torch.bfloat16
            assert state["values"][3] == (1, 2.5, None)
            assert state["values"]["bytes"] == bytes([0, 255])
        assert zipfile.ZipFile(path).testzip() is None
        print("opened")
        """,
        path,
        hide_holdfast=True,
    )
    assert said == "opened\n"


# ----------------------------------------------------------------------------------- every damage


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(path)


def test_a_flip_in_any_byte_is_found(small: Path) -> None:
    """Every byte of the file, one bit each: headers, padding, payloads, pickle, manifest, ends."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    good = small.read_bytes()
    with small.open("r+b", buffering=0) as file:
        for offset in range(len(good)):
            bad = good[offset] ^ (1 << rng.randrange(8))
            os.pwrite(file.fileno(), bytes([bad]), offset)
            try:
                load(small)
            except CheckpointError:
                pass
            else:
                pytest.fail(f"byte {offset} changed to {bad}: loaded")
            if offset % 16 == 0:
                assert verify(small) is not None, offset
            os.pwrite(file.fileno(), good[offset : offset + 1], offset)
    assert verify(small) is None


def test_a_flip_in_any_payload_is_found_by_zip_tools(small: Path) -> None:
    with Reader(small) as reader:
        records = [record for record in reader.records if record.size]
    for record in records:
        for at in {record.offset, record.offset + record.size // 2, record.end - 1}:
            flip(small, at)
            with zipfile.ZipFile(small) as archive:
                assert archive.testzip() == record.name
            flip(small, at)
    with zipfile.ZipFile(small) as archive:
        assert archive.testzip() is None


def test_truncation_at_any_length_is_found(small: Path) -> None:
    good = small.read_bytes()
    for size in [*range(0, len(good), 97), *range(len(good) - 130, len(good))]:
        small.chmod(0o644)
        small.write_bytes(good[:size])
        refused(small)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 200, bytes(PAGE)])
def test_appended_bytes_are_found(small: Path, extra: bytes) -> None:
    small.write_bytes(small.read_bytes() + extra)
    refused(small)


def test_bytes_in_front_are_found(small: Path) -> None:
    small.write_bytes(bytes(PAGE) + small.read_bytes())
    refused(small)


def test_zeroed_pages_are_found(small: Path) -> None:
    good = small.read_bytes()
    for start in range(0, len(good), PAGE):
        small.write_bytes(good[:start] + bytes(PAGE) + good[start + PAGE :])
        refused(small)
    small.write_bytes(bytes(len(good)))
    refused(small)
    assert "zeros" in str(verify(small))


def test_blocks_of_two_files_swapped_are_found(tmp_path: Path) -> None:
    def make(seed: int) -> Path:
        torch.manual_seed(seed)
        return write_state(tmp_path / f"{seed}.pt", {"w": torch.randn(4096), "step": seed})

    a, b = make(1), make(2)
    one, other = a.read_bytes(), b.read_bytes()
    assert len(one) == len(other)
    for start in range(0, len(one), PAGE):
        end = start + PAGE
        if one[start:end] != other[start:end]:
            a.write_bytes(one[:start] + other[start:end] + one[end:])
            b.write_bytes(other[:start] + one[start:end] + other[end:])
            refused(a)
            refused(b)


def test_a_change_that_crc32_cannot_see_is_found(tmp_path: Path) -> None:
    """A CRC-32 is linear: adding its own polynomial to the data does not change it."""
    polynomial = int(f"{0x104C11DB7:b}"[::-1], 2)
    path = write_state(tmp_path / "a.pt", {"w": torch.zeros(4096)})
    data = bytearray(path.read_bytes())
    with Reader(path) as reader:
        at = reader.records[0].offset
    data[at + 100 : at + 105] = polynomial.to_bytes(5, "little")
    path.chmod(0o644)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    refused(path)


def test_an_older_manifest_in_a_newer_file_is_found(tmp_path: Path) -> None:
    """What a lost write leaves: the whole tail of an earlier save of the same layout."""
    a = write_state(tmp_path / "a.pt", {"w": torch.zeros(4096), "step": 1}).read_bytes()
    path = write_state(tmp_path / "b.pt", {"w": torch.ones(4096), "step": 2})
    b = path.read_bytes()
    with Reader(path) as reader:
        cut = reader.records[0].end
    path.write_bytes(b[:cut] + a[cut:])
    refused(path)


def test_what_is_wrong_is_said(tmp_path: Path, small: Path) -> None:
    good = small.read_bytes()

    def said(data: bytes) -> str:
        small.write_bytes(data)
        return str(verify(small))

    assert "empty" in said(b"")
    assert "its end is missing" in said(good[:-200])
    assert "was not written by holdfast" in said(b"something else" * 100)
    assert "record checkpoint/data/0" in said(good[:64] + bytes([good[64] ^ 1]) + good[65:])
    assert small.name in said(good[:100])
    assert "No such file" in str(verify(tmp_path / "missing.pt"))


def test_damage_is_found_while_several_threads_read(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", {str(i): torch.randn(1000) for i in range(50)})
    with Reader(path) as reader:
        flip(path, reader.records[37].offset + 5)
        for threads in (1, 2, 8):
            with pytest.raises(DamagedCheckpoint, match="data/37"):
                reader.verify(threads=threads)


def test_large_records_are_hashed_in_chunks(tmp_path: Path) -> None:
    state = {"w": torch.arange(CHUNK // 4 + 77, dtype=torch.float32)}
    path = write_state(tmp_path / "a.pt", state)
    assert torch.equal(load(path)["w"], state["w"])
    with Reader(path) as reader:
        end = reader.records[0].end
    flip(path, end - 1)
    refused(path)


def test_a_crc_that_its_writer_computed_wrong_is_found_by_a_full_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours believe in xxh3; everybody else's `unzip -t` has the CRC-32 and would call it broken."""
    real = images.checksums

    def wrong(payload: container.Buffer) -> tuple[int, str]:
        crc32, xxh3 = real(payload)
        return (crc32 ^ 1 if bytes(payload) == b"x" * 70_000 else crc32), xxh3

    monkeypatch.setattr(images, "checksums", wrong)
    manifest = {"tensors": [], "tree": {"dict": []}}
    path = craft(tmp_path / "a.pt", manifest, [("checkpoint/data/0", b"x" * 70_000)])
    assert load(path) == {}
    with Reader(path) as reader:
        reader.verify(crc=False)
        with pytest.raises(DamagedCheckpoint, match="data/0"):
            reader.verify()
    assert "data/0" in str(verify(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "checkpoint/data/0"


def large_state() -> dict[str, Any]:
    """Storages around every size at which reading changes its way, small ones between them."""
    generator = torch.Generator().manual_seed(5)
    sizes = [1, 100, PAGE, PAGE + 1, OWN_PAGES - 1, OWN_PAGES, OWN_PAGES + 5, CHUNK, CHUNK + 1]
    sizes += [7, 2 * CHUNK + PAGE, 3]
    return {
        str(i): torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
        for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("disable", ["", "direct"])
@pytest.mark.parametrize("cold", [False, True])
def test_a_flip_is_found_however_the_record_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disable: str, cold: bool
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", disable)
    path = write_state(tmp_path / "a.pt", large_state())
    with Reader(path) as reader:
        records = reader.records
    places = [at for r in records for at in (r.header + 3, r.offset, r.end - 1) if r.size]
    places += [at for r in records for at in range(r.offset, r.end, CHUNK // 2)]
    rng = random.Random(11)
    for at in rng.sample(places, 30):
        flip(path, at)
        for crc in (True, False):
            if cold:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            refused(path)
            with pytest.raises(DamagedCheckpoint), Reader(path) as reader:
                reader.verify(crc=crc)
        flip(path, at)
    assert_same(load(path), large_state())


def test_the_first_damage_in_the_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", {str(i): torch.randn(30_000) for i in range(60)})
    with Reader(path) as reader:
        for i in (59, 31, 30, 17):
            flip(path, reader.records[i].offset + 5)
            for _again in range(5):
                with pytest.raises(DamagedCheckpoint, match=f"data/{i} "):
                    load(path)
                with pytest.raises(DamagedCheckpoint, match=f"data/{i} "):
                    reader.verify(threads=4)


def test_a_file_that_shrinks_while_it_is_open_is_damaged(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", large_state())
    with Reader(path) as reader:
        path.chmod(0o644)
        os.truncate(path, CHUNK + 100)
        with pytest.raises(DamagedCheckpoint, match=f"ends at byte {CHUNK + 100}"):
            codec.read(reader)
        with pytest.raises(DamagedCheckpoint, match="ends at byte"):
            reader.verify()


def test_no_descriptor_is_left_open_whatever_ends_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_state(tmp_path / "a.pt", large_state())
    before = len(list(Path("/proc/self/fd").iterdir()))
    load(path)
    assert verify(path) is None
    real = reading.File.read

    def interrupted(file: reading.File, offset: int, *args: Any, **kwargs: Any) -> int:
        if offset > CHUNK:
            raise KeyboardInterrupt
        return real(file, offset, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(reading.File, "read", interrupted)
        for read in (load, verify):
            with pytest.raises(KeyboardInterrupt):
                read(path)
    flip(path, CHUNK)
    refused(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_memory_is_given_back_without_waiting_for_the_garbage_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """After a failed load recovery reads the next one: two states must not lie in memory then."""
    path = write_state(tmp_path / "a.pt", large_state())
    if damaged:
        with Reader(path) as reader:
            flip(path, reader.records[len(large_state()) - 2].end - 1)
    made: list[weakref.ref[Any]] = []
    real = reading.own_pages

    def own_pages(size: int) -> Any:
        pages = real(size)
        if pages is not None:
            made.append(weakref.ref(pages))
        return pages

    monkeypatch.setattr(reading, "own_pages", own_pages)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(DamagedCheckpoint):
            load(path)
        assert made
        assert [ref() for ref in made] == [None] * len(made)
    finally:
        gc.enable()


def test_loading_takes_little_more_memory_than_the_tensors(tmp_path: Path) -> None:
    mib = 256
    state = {str(i): torch.ones(16 << 18) for i in range(mib // 16)}
    path = write_state(tmp_path / "a.pt", state)
    said = python(
        """
        import sys, torch
        from pathlib import Path
        from holdfast import load

        def peak():
            Path("/proc/self/clear_refs").write_text("5")
            def now(): return {
                line.split()[0]: int(line.split()[1])
                for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line
            }
            before = now()["VmRSS:"]
            state = load(sys.argv[1])
            return (now()["VmHWM:"] - before) / 1024

        torch.empty(1)
        print(peak())
        """,
        path,
    )
    assert mib <= float(said) <= 1.1 * mib


# ---------------------------------------------------------------------------------------- hostile


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps(_Bomb(marker), protocol=2)
    bare, zipped = tmp_path / "bare.pt", tmp_path / "zipped.pt"
    bare.write_bytes(evil)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
    for path in (bare, zipped):
        with pytest.raises(ForeignCheckpoint):
            load(path)
    # Even where everything else is right: our reader builds objects from the manifest alone.
    image = images.build([("checkpoint/data.pkl", evil)], {"tensors": [], "tree": {"dict": []}})
    assert load(write_image(tmp_path / "ours.pt", image)) == {}
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists(), "the pickle was harmless, and the test proved nothing"


def tensor(**changes: Any) -> dict[str, Any]:
    """A manifest with one tensor of four floats, of which something is not as it should be."""
    entry = {"path": "w", "storage": 0, "dtype": "float32", "shape": [4], "stride": [1],
             "offset": 0}  # fmt: skip
    return {"tensors": [entry | changes], "tree": {"dict": [["w", {"tensor": 0}]]}}


def tree(node: Any) -> dict[str, Any]:
    return {"tensors": [], "tree": node}


HOSTILE: dict[str, Any] = {
    "negative size": tensor(shape=[-4]),
    "negative stride": tensor(stride=[-1]),
    "negative offset": tensor(offset=-1),
    "shape too large": tensor(shape=[5]),
    "stride too large": tensor(shape=[2], stride=[4]),
    "offset too large": tensor(offset=1),
    "offset of an empty tensor too large": tensor(shape=[0], offset=5),
    "more elements than can be counted": tensor(shape=[1 << 40, 1 << 40], stride=[0, 0]),
    "empty and uncountable": tensor(shape=[1 << 62, 1 << 62, 0], stride=[0, 0, 0]),
    "shape beyond 64 bits": tensor(shape=[1 << 70], stride=[0]),
    "stride beyond 64 bits": tensor(shape=[1], stride=[1 << 70]),
    "shape and stride of different length": tensor(stride=[1, 1]),
    "shape is text": tensor(shape="4"),
    "shape of floats": tensor(shape=[4.0]),
    "shape of booleans": tensor(shape=[True]),
    "unknown dtype": tensor(dtype="float31"),
    "quantised dtype": tensor(dtype="quint8"),
    "dtype is a list": tensor(dtype=["float32"]),
    "unknown storage": tensor(storage=1),
    "storage by text": tensor(storage="0"),
    "storage is a path": tensor(storage="../data.pkl"),
    "storage is a list": tensor(storage=[0]),
    "no dtype": {"tensors": [{"path": "w"}], "tree": {"tensor": 0}},
    "tensors is a number": {"tensors": 7, "tree": {"tensor": 0}},
    "tensor is a number": {"tensors": [7], "tree": {"tensor": 0}},
    "tensor index out of range": {"tensors": [], "tree": {"tensor": 0}},
    "tensor index negative": tensor() | {"tree": {"tensor": -1}},
    "tensor index boolean": tensor() | {"tree": {"tensor": False}},
    "tensor index is a list": tensor() | {"tree": {"tensor": [0]}},
    "no tree": {"tensors": []},
    "no tensors": {"tree": None},
    "unknown kind": tree({"object": 1}),
    "two kinds": tree({"int": "1", "float": "2"}),
    "no kind": tree({}),
    "reference to nothing": tree({"ref": 3}),
    "reference to itself": tree({"shared": 0, "value": [{"ref": 0}]}),
    "reference is a list": tree({"ref": []}),
    "shared without a value": tree({"shared": 0}),
    "integer is a number": tree({"int": 1.5}),
    "integer is text": tree({"int": "x"}),
    "integer of too many digits": tree({"int": "9" * 5000}),
    "float of wrong length": tree({"float": "00"}),
    "float is no hex": tree({"float": "zz"}),
    "complex of wrong length": tree({"complex": "00"}),
    "bytes are no base64": tree({"bytes": "!"}),
    "bytes are a number": tree({"bytes": 3}),
    "unknown dtype value": tree({"dtype": "os"}),
    "unknown device": tree({"device": "rm -rf"}),
    "device is a number": tree({"device": 0}),
    "size of text": tree({"size": "ab"}),
    "size beyond 64 bits": tree({"size": [1 << 80]}),
    "tuple of nothing": tree({"tuple": None}),
    "unhashable key": tree({"dict": [[[1], 2]]}),
    "unhashable member": tree({"set": [[1]]}),
    "pairs of three": tree({"dict": [[1, 2, 3]]}),
    "pairs are numbers": tree({"dict": [1, 2]}),
    "method as attribute": tree({"odict": [], "attributes": {"items": 3}}),
    "class as attribute": tree({"odict": [], "attributes": {"__class__": 3}}),
    "attributes are a list": tree({"odict": [], "attributes": [1]}),
    "deep nesting": tree("@deep"),
    "deep pairs": {"tensors": "@deep", "tree": {"dict": [["w", {"tensor": 0}]]}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_senseless_manifest_with_a_right_hash_is_refused(tmp_path: Path, name: str) -> None:
    path = craft(tmp_path / "x.pt", HOSTILE[name], [("checkpoint/data/0", bytes(16))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_a_view_that_claims_the_world_takes_no_memory(tmp_path: Path) -> None:
    """Stride 0: four bytes that pass for 32 GiB. Legal, and small until somebody copies it."""
    manifest = tensor(shape=[1 << 33], stride=[0])
    state = load(craft(tmp_path / "x.pt", manifest, [("checkpoint/data/0", bytes(16))]))
    assert state["w"].untyped_storage().nbytes() == 16


RECORD = {"name": "checkpoint/data.pkl", "offset": 64, "size": 2, "crc32": "0" * 8,
          "xxh3_128": "0" * 32}  # fmt: skip


@pytest.mark.parametrize(
    "records",
    [
        None,
        7,
        [],
        [7],
        ["text"],
        [{}],
        [RECORD | {"size": -1}],
        [RECORD | {"size": "2"}],
        [RECORD | {"size": 1 << 60}],
        [RECORD | {"size": 2.0}],
        [RECORD | {"size": True}],
        [RECORD | {"offset": 0}],
        [RECORD | {"offset": -64}],
        [RECORD | {"offset": 1 << 60}],
        [RECORD | {"crc32": "x"}],
        [RECORD | {"crc32": 5}],
        [RECORD | {"crc32": "-1"}],
        [RECORD | {"crc32": "f" * 40}],
        [RECORD | {"xxh3_128": None}],
        [RECORD | {"name": 5}],
        [RECORD | {"name": ""}],
        [RECORD | {"name": "x" * 70_000}],
        [RECORD | {"name": "\ud800"}],
        [RECORD | {"name": "checkpoint/holdfast.json"}],
        [RECORD, RECORD],
        [RECORD, RECORD | {"name": "checkpoint/b"}],
    ],
    ids=lambda records: str(records)[:60].encode("ascii", "replace").decode(),
)
def test_senseless_records_are_refused(tmp_path: Path, records: Any) -> None:
    path = craft(tmp_path / "x.pt", {"tensors": [], "tree": None, "records": records})
    with pytest.raises(CheckpointError):
        load(path)
    assert verify(path) is not None


@pytest.mark.parametrize("text", ["", "7", "null", "[]", "{}", "{", '"x"', '{"format_version":0}',
                                  '{"format_version":"1"}', '{"format_version":null}',
                                  '{"format_version":1}', "[" * 100_000, "NaN", '{"a":1e999999}',
                                  '{"format_version":1,"records":' + "9" * 5000 + "}"])  # fmt: skip
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError):
        load(craft(tmp_path / "x.pt", text))


def test_invalid_utf8_in_the_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(craft(tmp_path / "x.pt", b'{"format_version":1,"tree":"\xff\xfe"}'))


def test_a_later_format_is_said_to_be_one(tmp_path: Path) -> None:
    path = craft(tmp_path / "x.pt", '{"format_version":99}')
    with pytest.raises(container.NewerFormat, match="format version 99"):
        load(path)


@pytest.mark.parametrize("claim", [(0, 1 << 40), (1 << 63, 10), (10**19, 10**19), (0, 10**19)])
def test_a_comment_that_points_outside_is_refused(tmp_path: Path, claim: tuple[int, int]) -> None:
    path = write_state(tmp_path / "x.pt", {})
    data = path.read_bytes()
    comment = layout.COMMENT.format(offset=claim[0], size=claim[1], digest="0" * 32).encode()
    path.write_bytes(data[: -len(comment)] + comment)
    with pytest.raises(DamagedCheckpoint):
        load(path)


def test_zip_bombs_are_refused_without_inflating(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"checkpoint/data/{i}", bytes(16 << 20))
        archive.writestr("checkpoint/data.pkl", b"N.")
        archive.comment = layout.COMMENT.format(offset=0, size=10, digest="0" * 32).encode()
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_random_junk_is_refused(tmp_path: Path) -> None:
    seed = int(time.time())
    print("seed", seed)
    rng = random.Random(seed)
    path = tmp_path / "junk.pt"
    for size in [1, 2, 50, 100, 4096, 10_000]:
        path.write_bytes(rng.randbytes(size))
        refused(path)


def test_other_peoples_files_are_foreign_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ForeignCheckpoint):
        load(path)


def test_a_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        load(tmp_path)
    assert verify(tmp_path) is not None


def test_values_that_no_reader_would_take_are_refused_when_saving() -> None:
    with pytest.raises(UnsupportedValue, match="tensors"):
        images.build([("checkpoint/data.pkl", b"N.")], {}, reserve=1 << 31)


def test_records_describe_themselves() -> None:
    record = Record("a", 0, 64, 3, 0xAB, "f" * 32)
    assert record.end == 67
    assert record.to_json()["crc32"] == "000000ab"
    assert sys.getsizeof(record) < 200
