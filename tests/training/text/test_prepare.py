"""Preparing and caching: the same data once, never half, and never another's."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from holdfast.errors import DataError
from holdfast.training.text import corpus, prepare
from holdfast.training.text.cache import default_cache_dir, read_sealed, write_sealed
from holdfast.training.text.formats import documents_in
from holdfast.training.text.prepare import PreparedData, prepare_data, reopen_data
from holdfast.training.text.tokenizer import train_tokenizer
from tests.training.runs import SAMPLE

WORDS = ["春天", "河边", "孩子", "风筝", "母亲", "写信", "下雨", "菜园", "老师", "月亮", "故事"]


def corpus_text(documents: int = 400, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n".join("，".join(draw.choices(WORDS, k=12)) + "。" for _ in range(documents))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "text.txt"
    path.parent.mkdir()
    path.write_text(corpus_text(), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepared(data: Path, cache: Path, **options: Any) -> PreparedData:
    settings = {"vocab_size": 300, "val_fraction": 0.1, "seed": 1, "cache_dir": cache, **options}
    return prepare_data(data, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_streams_hold_every_document_once_with_the_end_of_text_after_it(
    data: Path, cache: Path
) -> None:
    result = prepared(data, cache)
    documents = []
    for stream in (result.train, result.val):
        starts = [0, *stream.ends[:-1]]
        for start, end in zip(starts, stream.ends, strict=True):
            assert stream.tokens[end - 1] == stream.eos_id == result.tokenizer.eos_id
            documents.append(result.tokenizer.decode(stream.tokens[start : end - 1].tolist()))
    text = corpus_text()
    assert sorted(documents) == sorted(text.split("\n"))
    assert 20 <= result.val.documents <= 60
    assert result.documents == 400
    assert result.characters == len(text) - 399
    assert result.train_bytes + result.val_bytes == len(text.encode()) - 399
    assert result.tokens == len(result.train) + len(result.val)
    assert result.characters_per_token == pytest.approx(result.characters / (result.tokens - 400))
    assert not result.train.tokens.flags.writeable


def test_a_second_start_neither_reads_nor_tokenizes(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(data, cache)
    before = contents(cache)

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("the cache is complete")

    monkeypatch.setattr(corpus.Corpus, "scan", never)
    monkeypatch.setattr(prepare, "train_tokenizer", never)
    moved = data.parent.parent / "elsewhere" / "renamed.txt"
    shutil.move(data.parent, moved.parent)
    (moved.parent / "text.txt").rename(moved)
    again = prepared(moved, cache)
    assert again.from_cache and not first.from_cache
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name in ("train", "val"):
        theirs, ours = getattr(first, name), getattr(again, name)
        assert np.array_equal(theirs.tokens, ours.tokens)
        assert np.array_equal(theirs.ends, ours.ends)
        assert (theirs.text_bytes, theirs.characters) == (ours.text_bytes, ours.characters)
    assert (again.documents, again.content_hash) == (first.documents, first.content_hash)
    assert contents(cache) == before
    moved.unlink()
    options: Any = {"val_fraction": 0.1, "seed": 1, "cache_dir": cache}
    found = reopen_data(first.content_hash, first.tokenizer, **options)
    assert found is not None and np.array_equal(found.train.tokens, first.train.tokens)
    assert reopen_data("0" * 32, first.tokenizer, **options) is None


def test_two_caches_of_the_same_data_are_the_same_bytes(data: Path, tmp_path: Path) -> None:
    prepared(data, tmp_path / "one")
    prepared(data, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_text_or_settings_get_an_entry_of_their_own(data: Path, cache: Path) -> None:
    prepared(data, cache)
    for options in ({"vocab_size": 305}, {"val_fraction": 0.2}, {"seed": 2}):
        assert not prepared(data, cache, **options).from_cache
    data.write_text(corpus_text(seed=5), encoding="utf-8")
    assert not prepared(data, cache).from_cache
    assert len(list((cache / "tokens").iterdir())) == 5


def test_a_given_tokenizer_is_used_and_none_is_trained(data: Path, cache: Path) -> None:
    first = prepared(data, cache)
    other = prepared(data, cache, seed=2, tokenizer=first.tokenizer, vocab_size=99)
    assert other.tokenizer is first.tokenizer
    assert len(list((cache / "tokenizers").iterdir())) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "about.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_cache_is_noticed_and_built_again(
    data: Path, cache: Path, name: str, damage: str
) -> None:
    prepared(data, cache)
    good = contents(cache)
    path = next(cache.glob(f"tokens/*/{name}"))
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]
        path.write_bytes({"flip": flipped, "cut": raw[:-2], "empty": b""}[damage])
    assert not prepared(data, cache).from_cache
    assert contents(cache) == good


def test_a_damaged_tokenizer_in_the_cache_is_trained_again(data: Path, cache: Path) -> None:
    first = prepared(data, cache)
    path = next(cache.glob("tokenizers/*.json"))
    good = path.read_bytes()
    path.write_bytes(good.replace(b"endoftext", b"endOftext"))
    again = prepared(data, cache)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.from_cache, "the tokens still belong to it"
    assert path.read_bytes() == good


@pytest.mark.parametrize("stop_at", ["Training the tokenizer", "Encoding the text"])
def test_an_interrupt_leaves_nothing_half_written(data: Path, cache: Path, stop_at: str) -> None:
    def stop(label: str, _done: int, _total: int) -> None:
        if label == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(data, cache, progress=stop)
    assert not [name for name in contents(cache) if not name.startswith("tokenizers/")]
    assert not list(cache.rglob("building-*"))
    assert len(prepared(data, cache).train) > 0


def test_a_killed_build_leaves_the_cache_usable_and_is_tidied_up_later(
    data: Path, cache: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        "from holdfast.training.text.prepare import prepare_data\n"
        "def die(label, done, total):\n"
        "    if label.startswith('Encoding'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare_data(sys.argv[1], vocab_size=300, val_fraction=0.1, seed=1,"
        " cache_dir=sys.argv[2], progress=die)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, data, cache], check=False)
    assert result.returncode == -signal.SIGKILL
    [left] = cache.glob("tokens/building-*")
    assert not prepared(data, cache).from_cache, "half an entry is none"
    assert left.exists(), "it might be the work of a process that still runs"
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    prepared(data, cache, seed=3)
    assert not left.exists()


def test_processes_that_prepare_the_same_data_at_once_agree(data: Path, cache: Path) -> None:
    script = (
        "import sys\n"
        "from holdfast.training.text.prepare import prepare_data\n"
        "p = prepare_data(sys.argv[1], vocab_size=300, val_fraction=0.1, seed=1,"
        " cache_dir=sys.argv[2])\n"
        "print(len(p.train), int(p.train.tokens.astype('int64').sum()), p.notes)\n"
    )
    command = [sys.executable, "-c", script, str(data), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert len(outputs) == 1 and outputs.pop().endswith("[]\n")
    assert len(list((cache / "tokens").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one_with_a_note(
    data: Path, tmp_path: Path
) -> None:
    usable = prepared(data, tmp_path / "usable")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    result = prepared(data, blocked / "cache")
    assert np.array_equal(result.train.tokens, usable.train.tokens)
    assert "cannot be written (Not a directory)" in result.notes[0]
    assert "HOLDFAST_CACHE" in result.notes[0]
    assert blocked.read_text() == "in the way"


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_full_disk_everywhere_is_one_clear_error_and_leaves_nothing(
    data: Path, cache: Path
) -> None:
    script = (
        "import resource, sys\n"
        "from holdfast.errors import ResourceError\n"
        "from holdfast.training.text.prepare import prepare_data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: prepare_data(sys.argv[1], vocab_size=300, val_fraction=0.1, seed=1,"
        " cache_dir=sys.argv[2])\n"
        "except ResourceError as error: print(error)\n"
    )
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", script, data, cache],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert "no room for the tokens" in result.stdout and "File too large" in result.stdout
    assert result.stdout.count("\n") == 1
    assert contents(cache) == contents(temporary) == {}


def test_data_that_changes_while_it_is_read_is_not_cached(data: Path, cache: Path) -> None:
    def grow(label: str, _done: int, _total: int) -> None:
        if label.startswith("Reading"):
            with data.open("a", encoding="utf-8") as file:
                file.write("\n又来了一行。")

    with pytest.raises(DataError, match="changed while it was read"):
        prepared(data, cache, progress=grow)
    assert contents(cache) == {}


def test_without_validation_everything_is_for_training(data: Path, cache: Path) -> None:
    result = prepared(data, cache, val_fraction=0.0)
    assert (len(result.val), result.val_bytes, result.val.documents) == (0, 0, 0)
    assert result.train.documents == 400


def test_one_long_document_gets_a_validation_part(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "novel.jsonl"
    path.write_text(json.dumps({"text": corpus_text()}), encoding="utf-8")
    result = prepared(path, cache)
    assert result.documents == 1
    assert 0.05 <= result.val_bytes / result.train_bytes <= 0.25


def test_a_small_text_warns_also_when_it_comes_from_the_cache(data: Path, cache: Path) -> None:
    for _ in range(2):
        result = prepared(data, cache, vocab_size=8192)
        assert "tokens instead of 8,192" in result.notes[0] and len(result.notes) == 1


def test_folders_mix_formats_and_file_names_do_not_matter(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text(corpus_text(50, seed=1), encoding="gb18030")
    line = json.dumps({"text": corpus_text(9, seed=2)})
    (folder / "b.jsonl").write_text(line, encoding="utf-8")
    first = prepared(folder, cache)
    (folder / "a.txt").rename(folder / "z.txt")
    again = prepared(folder, cache)
    assert again.from_cache and again.content_hash == first.content_hash
    assert np.array_equal(again.train.tokens, first.train.tokens)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "holdfast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/holdfast")
    monkeypatch.setenv("HOLDFAST_CACHE", "/y")
    assert default_cache_dir() == Path("/y")


def test_a_sealed_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sealed.json"
    write_sealed(path, {"文": [1, None, "x\n\u2028"]})
    assert read_sealed(path) == {"文": [1, None, "x\n\u2028"]}
    raw = path.read_bytes()
    for position in range(len(raw) - 1):  # the last byte is the line end
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 4]) + raw[position + 1 :])
        assert read_sealed(path) is None
        path.write_bytes(raw[:position])
        assert read_sealed(path) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["sealed.json"]


def test_the_tokens_of_the_sample_text_are_those_of_the_first_version(cache: Path) -> None:
    """A run that began then reads its text by these rules when it goes on."""
    prepared(SAMPLE, cache, val_fraction=0.05, seed=42)
    about = read_sealed(next(cache.glob("tokens/*/about.json")))
    assert about == {
        "documents": 370,
        "dtype": "<u2",
        "eos_id": 0,
        "files": {
            "ends.bin": "ed0076db700fbb9add689a1ed8faae2b",
            "tokens.bin": "ae4f1e4544303a691c8795fc36031f22",
        },
        "splits": {
            "train": {
                "characters": 55978,
                "documents": 352,
                "text_bytes": 166531,
                "tokens": 122981,
            },
            "val": {"characters": 3043, "documents": 18, "text_bytes": 9045, "tokens": 6692},
        },
    }


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "damaged" / "text.txt"
    path.parent.mkdir()
    path.write_bytes(corpus_text().encode() + b"\n\xe6\x98\n")
    return path


def test_damage_is_told_at_every_start_and_gives_the_same_tokens(
    damaged: Path, data: Path, cache: Path
) -> None:
    first = prepared(damaged, cache)
    assert "text.txt, line 401" in first.notes[0]
    moved = damaged.rename(damaged.parent / "moved.txt")
    again = prepared(moved, cache)
    assert again.from_cache and "moved.txt, line 401" in again.notes[0]
    shutil.rmtree(cache)
    anew = prepared(moved, cache, tokenizer=first.tokenizer)  # as a run that goes on does it
    assert np.array_equal(anew.train.tokens, again.train.tokens)
    whole = prepared(data, cache, tokenizer=first.tokenizer)
    assert np.array_equal(anew.train.tokens, whole.train.tokens)
    assert anew.content_hash != whole.content_hash
    assert not whole.notes


def test_strictly_damage_is_refused_even_where_its_tokens_are_cached(
    damaged: Path, data: Path, cache: Path
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="line 401"):
            prepared(damaged, cache, strict=True)
        prepared(damaged, cache)
    assert prepared(data, cache, strict=True).notes == []


def test_a_text_above_the_sample_trains_its_tokenizer_on_a_sample(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def watched(documents: list[str], *arguments: Any, **options: Any) -> Any:
        given.append(documents)
        return train_tokenizer(documents, *arguments, **options)

    monkeypatch.setattr(prepare, "train_tokenizer", watched)
    whole = prepared(data, cache)
    monkeypatch.setattr(prepare, "SAMPLE", data.stat().st_size // 4)
    first, second = (prepared(data, cache, seed=2, vocab_size=290 + n) for n in (0, 1))
    assert [len(documents) for documents in given[1:]] == [len(given[1])] * 2
    assert given[1] == given[2] and set(given[1]) <= set(corpus_text().split("\n"))
    assert 40 < len(given[1]) < 160 < len(given[0])
    assert first.tokenizer.vocab_size == 290 and second.tokenizer.vocab_size == 291
    assert first.characters == whole.characters, "all of the text is encoded"


LINE = "今天早上我去市场买菜，卖菜的阿姨告诉我，昨天下了一场大雨，所以青菜比平时贵了。"
NUMBERED = [f"{number}。{LINE}" for number in range(40_000)]
BLOCKS = ["\n".join(NUMBERED[start : start + 20]) for start in range(0, 40_000, 20)]
RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in BLOCKS)
CONTENTS = {
    "lines.txt": "\n".join(NUMBERED).encode(),
    "blocks.txt": "\n\n".join(BLOCKS).encode("gb18030"),
    "single.txt": ("标题\n\n" + "\n".join(NUMBERED)).encode(),
    "data.jsonl.gz": gzip.compress(RECORDS.encode(), 1),
    "data.jsonl.zst": zstandard.compress(RECORDS.encode()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_reading_takes_memory_that_does_not_grow_with_the_text(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 MB of text, in less memory than that; a .txt may be one document but for its title."""
    if name == "single.txt":
        monkeypatch.setattr("holdfast.training.text.formats.PART", 50_000)
        monkeypatch.setattr(corpus, "LONGEST", 200_000)
    path = tmp_path / name
    path.write_bytes(CONTENTS[name])
    text = corpus.Corpus(corpus.files_by_content([path]), val_fraction=0.05, seed=0)
    tracemalloc.start()
    try:
        text.scan()
        characters = sum(len(piece) for _for_validation, piece in text.pieces())
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert characters > 1_700_000
    assert peak < 5_000_000


def songci() -> Path:
    """The larger corpus, which is not part of the repository."""
    named = os.environ.get("HOLDFAST_SONGCI")
    beside = Path(__file__).parents[4] / "shared" / "data" / "songci.txt"
    return Path(named) if named else beside


@pytest.mark.skipif(not songci().is_file(), reason="needs songci.txt (see HOLDFAST_SONGCI)")
def test_a_real_corpus_of_5_megabytes_is_prepared(cache: Path) -> None:
    documents = list(documents_in(songci()))
    assert len(documents) == 19_651
    tokenizer = train_tokenizer(documents[:1000], 1000)  # all of them take many seconds
    result = prepared(songci(), cache, val_fraction=0.05, tokenizer=tokenizer)
    assert result.documents == 19_651
    assert 0.045 <= result.val_bytes / songci().stat().st_size <= 0.055
    end = int(result.val.ends[0])
    assert tokenizer.decode(result.val.tokens[: end - 1].tolist()) in set(documents)
