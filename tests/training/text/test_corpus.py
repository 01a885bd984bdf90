"""Files, encodings, formats and the split: what gets in, what is refused and with which words."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from holdfast.errors import DataError
from holdfast.training.text import corpus
from holdfast.training.text.corpus import Corpus
from holdfast.training.text.formats import documents_in

SENTENCE = "今天早上我去市场买菜，卖菜的阿姨告诉我，昨天下了一场大雨，所以青菜比平时贵了一些。"
STORY = "".join(f"{number}。{SENTENCE}" for number in range(300))
TRADITIONAL = "今天早上我去市場買菜，賣菜的阿姨告訴我，昨天下了一場大雨，所以青菜比平時貴了一些。"
KOREAN = "오늘 아침 나는 시장에 가서 채소를 샀다. 집에 오는 길에 강가에서 아이들을 보았다."
JAPANESE = "今日の朝、私は市場へ野菜を買いに行きました。帰り道、川辺で子供たちを見ました。"


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def corpus_of(path: Path, **options: Any) -> Corpus:
    files = corpus.files_by_content(corpus.discover(path))
    found = Corpus(files, **{"val_fraction": 0.0, "seed": 0, **options})
    found.scan()
    return found


def read(path: Path, **options: Any) -> list[str]:
    return [text for _for_validation, text in corpus_of(path, **options).pieces()]


def split(
    documents: list[str], fraction: float, seed: int, folder: Path
) -> tuple[list[str], list[str]]:
    """(training, validation) pieces of some documents."""
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    pieces = list(
        corpus_of(write(folder / "data.jsonl", lines), val_fraction=fraction, seed=seed).pieces()
    )
    train = [text for for_validation, text in pieces if not for_validation]
    return train, [text for for_validation, text in pieces if for_validation]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    assert path.name in message or str(path.parent) in message, "it says where"
    return message


# -- which files -------------------------------------------------------------------------------


def test_a_folder_gives_its_known_files_sorted_and_recursively(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl.gz", "a/c.parquet", "notes.md", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / name, SENTENCE)
    found = [path.relative_to(tmp_path).as_posix() for path in corpus.discover(tmp_path)]
    assert found == ["a/c.parquet", "a/z.jsonl.gz", "b.txt"]


def test_a_glob_gives_what_matches_and_a_file_with_brackets_is_itself(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.TXT.ZST", "x/y/3.json", "novel[1].txt"):
        write(tmp_path / name, SENTENCE)
    found = [path.name for path in corpus.discover(f"{tmp_path}/x/**/*")]
    assert found == ["1.txt", "2.TXT.ZST"]
    assert corpus.discover(tmp_path / "novel[1].txt") == [tmp_path / "novel[1].txt"]


def test_a_missing_file_is_named_with_its_near_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "songci.txt", SENTENCE)
    assert "songci.txt?" in refusal(tmp_path / "songcii.txt")
    assert "does not exist" in refusal(tmp_path / "other.parquet")
    assert "no folder" in refusal(tmp_path / "nowhere" / "songci.txt")
    with pytest.raises(DataError, match="Cannot read"):
        corpus.discover("a text instead of its name " * 99)


def test_an_empty_folder_an_empty_glob_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    assert ".jsonl" in refusal(tmp_path)
    assert ".jsonl" in refusal(tmp_path / "*.txt")
    assert "unknown suffix" in refusal(write(tmp_path / "novel.docx", "x"))


# -- what is in them ---------------------------------------------------------------------------


def test_a_document_a_line_without_blank_lines_and_blank_line_separated_with_them(
    tmp_path: Path,
) -> None:
    lines = [f"{number}。{SENTENCE}" for number in range(6)]
    assert read(write(tmp_path / "lines.txt", "\n".join(lines) + "\n\n")) == lines
    blocks = ["\n".join(lines[:3]), "\n".join(lines[3:])]
    text = "\n\n" + blocks[0] + "\n \u3000\n\n" + blocks[1] + "\n"
    assert read(write(tmp_path / "blocks.txt", text)) == blocks
    windows = text.replace("\n", "\r\n")
    assert read(write(tmp_path / "windows.txt", windows)) == blocks


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb18030", "gbk", "big5", "utf-16", "utf-16-le", "utf-16-be"]
)
@pytest.mark.parametrize("sentence", [SENTENCE, TRADITIONAL])
def test_every_encoding_of_chinese_that_we_promise_is_detected(
    tmp_path: Path, encoding: str, sentence: str
) -> None:
    if encoding == "big5" and sentence == SENTENCE:
        pytest.skip("it has no simplified characters")
    lines = [f"{number}。{sentence}" for number in range(6)]
    assert read(write(tmp_path / "data.txt", "\n".join(lines).encode(encoding))) == lines


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Müller trägt größere Straßenschuhe, élève, café crème à l'été. " * 9, "latin-1"),
        ("Das Mädchen hört fröhlich Öl" * 20, "latin-1"),
        (KOREAN * 9, "euc_kr"),
        (JAPANESE * 9, "euc_jp"),
        (JAPANESE * 9, "shift_jis"),
    ],
)
def test_other_encodings_are_refused_even_where_they_are_valid_gb18030(
    tmp_path: Path, text: str, encoding: str
) -> None:
    message = refusal(write(tmp_path / "data.txt", text.encode(encoding)))
    assert "neither UTF-8 nor GB18030 nor Big5" in message
    assert "line 1" in message


def test_binary_files_are_refused(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4
    assert "byte 8 is zero" in refusal(write(tmp_path / "picture.txt", png))
    noise = bytes(range(250, 0, -1)) * 4
    assert "neither" in refusal(write(tmp_path / "noise.jsonl", noise))


ANY_TEXT = st.text(
    st.one_of(st.sampled_from("\n\r \u3000\x0c中é😀"), st.characters(codec="utf-8")), max_size=40
).map(lambda text: text.replace("\0", "").lstrip("\ufeff"))


@given(ANY_TEXT, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.integers(1, 9))
def test_a_text_gives_the_same_documents_whatever_the_size_of_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str, block: int
) -> None:
    """Against the rule in a few lines, which has the whole text at once."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    documents = re.split(r"\n\s*\n", lines)
    expected = documents if len(documents) > 1 else lines.split("\n")
    path = write(tmp_path_factory.mktemp("any") / "x.txt", text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.training.text.formats.BLOCK", block)
        patch.setattr("holdfast.training.text.formats.PART", 3 * block)
        assert list(documents_in(path)) == [d.strip() for d in expected if d.strip()]


def test_jsonl_gives_the_text_field_or_the_one_that_is_named(tmp_path: Path) -> None:
    records = [
        {"text": f"  {SENTENCE}\u2028{number} ", "body": TRADITIONAL * 2} for number in range(9)
    ]
    text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path = write(tmp_path / "data.jsonl", text)
    assert read(path) == [record["text"].strip() for record in records]
    assert read(path, text_field="body") == [record["body"] for record in records]


def test_a_lone_surrogate_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    line = '{"text": "' + SENTENCE * 9 + ' \\ud83d\\ude00 \\uD83D"}'
    [document] = read(write(tmp_path / "data.jsonl", line))
    assert document == SENTENCE * 9 + " 😀 \ufffd"


def test_a_bad_jsonl_line_is_named_with_what_it_holds(tmp_path: Path) -> None:
    good = json.dumps({"text": SENTENCE, "id": 1})

    def message(line: str) -> str:
        return refusal(write(tmp_path / "data.jsonl", f"{good}\n\n{line}\n{good}\n"))

    assert "line 3" in message('{"content": "x", "id": 2}')
    assert 'no field "text"; it has: content, id' in message('{"content": "x", "id": 2}')
    assert "not a string" in message('{"text": 5}')
    assert "object was expected" in message('["text"]')
    assert "line 3: this is not JSON" in message('{"text": "cut of')
    assert "line 3: this is not JSON" in message("[" * 100_000)


def test_parquet_gives_the_column_without_nulls(tmp_path: Path) -> None:
    texts = [f"{number}。{SENTENCE}" for number in range(8)]
    table = pa.table({"text": [*texts, None, " "], "id": range(10)})
    parquet.write_table(table, tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == texts
    packed = gzip.compress((tmp_path / "data.parquet").read_bytes())
    assert read(write(tmp_path / "data.parquet.gz", packed)) == texts
    assert 'no column "body"; it has: text, id' in refusal(
        tmp_path / "data.parquet", text_field="body"
    )
    assert "holds int64, not text" in refusal(tmp_path / "data.parquet", text_field="id")
    assert "not a Parquet file" in refusal(write(tmp_path / "fake.parquet", SENTENCE * 9))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),  # Polars, DataFusion
        pa.dictionary(pa.int32(), pa.string()),  # pandas' categories
        pa.dictionary(pa.int32(), pa.large_string()),
        pa.binary(),  # Spark and Hive, where they do not annotate strings
        pa.binary_view(),
    ],
    ids=str,
)
def test_every_type_that_writers_give_a_parquet_text_column_is_text(
    tmp_path: Path, kind: pa.DataType
) -> None:
    texts = [f"{number}。{SENTENCE}" for number in range(8)]
    values = pa.array([*texts, None, "", texts[0]])
    if pa.types.is_dictionary(kind):
        values = values.dictionary_encode()
    parquet.write_table(pa.table({"text": values.cast(kind)}), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == [*texts, texts[0]]


def test_a_parquet_file_of_nulls_among_others_has_no_documents(tmp_path: Path) -> None:
    texts = [f"{number}。{SENTENCE}" for number in range(8)]
    parquet.write_table(pa.table({"text": pa.nulls(9)}), tmp_path / "empty.parquet")
    assert "empty" in refusal(tmp_path / "empty.parquet")
    parquet.write_table(pa.table({"text": texts}), tmp_path / "full.parquet")
    assert read(tmp_path) == texts


def test_gz_and_zst_read_the_same_and_damage_in_them_is_noticed(tmp_path: Path) -> None:
    lines = [f"{number}。{SENTENCE}" for number in range(200)]
    data = "\n".join(lines).encode()
    half = len(data) // 2
    packed = {
        "data.txt.gz": gzip.compress(data),
        "data.txt.zst": zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
    }
    for name, raw in packed.items():
        assert read(write(tmp_path / name, raw)) == lines
        assert "damaged" in refusal(write(tmp_path / ("cut" + name), raw[:-9]))
        flipped = raw[:99] + bytes([raw[99] ^ 16]) + raw[100:]
        if name.endswith("gz"):  # zstandard.compress writes no checksum: the text may still decode
            assert "damaged" in refusal(write(tmp_path / ("flip" + name), flipped))
        assert "damaged" in refusal(write(tmp_path / ("no" + name), data))


def test_empty_and_tiny_texts_are_refused(tmp_path: Path) -> None:
    for name in ("data.txt", "data.jsonl", "data.parquet", "data.txt.gz", "data.jsonl.zst"):
        assert "empty" in refusal(write(tmp_path / name, b""))
    assert "empty" in refusal(write(tmp_path / "blank.txt", " \n\u3000\n"))
    assert "10 characters" in refusal(write(tmp_path / "ten.txt", "今天天气很好我们去玩"))


# -- damage ------------------------------------------------------------------------------------

LINES = [f"{number}。{SENTENCE}" for number in range(600)]
CHINESE = ["utf-8", "utf-8-sig", "gb18030", "gbk", "big5", "utf-16"]


def in_encoding(encoding: str, lines: list[str] = LINES) -> tuple[bytes, list[str]]:
    if encoding == "big5":
        lines = [line.replace(SENTENCE, TRADITIONAL) for line in lines]
    return "\n".join(lines).encode(encoding), lines


@pytest.mark.parametrize("encoding", CHINESE)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_an_end_in_mid_character_is_left_out_and_shown(
    tmp_path: Path, encoding: str, packed: str
) -> None:
    data, lines = in_encoding(encoding)
    data = data[:-1]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    found = corpus_of(write(tmp_path / f"data.txt{packed}", pack(data)))
    assert [text for _val, text in found.pieces()] == [*lines[:-1], lines[-1][:-1]]
    [note] = found.damage.notes()
    place = len(data) - found.damage.left_out
    assert f"data.txt{packed}, line 600, byte {place} (no character of its encoding)" in note
    assert "\n" not in note


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5"])
def test_a_broken_byte_is_left_out_and_strictly_refused_at_its_place(
    tmp_path: Path, encoding: str
) -> None:
    data, lines = in_encoding(encoding)
    end = data.index(b"\n", 20_000)
    line = data.count(b"\n", 0, end) + 1
    path = write(tmp_path / "data.txt", data[:end] + lines[0].encode(encoding)[1:2] + data[end:])
    found = corpus_of(path)
    assert [text for _val, text in found.pieces()] == lines
    assert (found.damage.places, found.damage.left_out) == (1, 1)
    assert f"byte {end} (line {line})" in refusal(path, strict=True)
    note = found.damage.notes()[0]
    assert f"line {line}, byte {end}" in note and "places: 1, bytes: 1" in note


def test_more_than_a_thousandth_of_damage_is_refused_with_the_first_place(tmp_path: Path) -> None:
    for encoding in ("utf-8", "gb18030"):
        data, _lines = in_encoding(encoding)
        rows = data.split(b"\n")
        for number in range(100, 400):
            rows[number] += b"\xff\xff"
        first = len(b"\n".join(rows[:101])) - 2
        message = refusal(write(tmp_path / f"{encoding}.txt", b"\n".join(rows)))
        assert f"byte {first} (line 101)" in message and "up to 0.1 %" in message


@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
@pytest.mark.parametrize("first", [True, False])
def test_utf_8_among_another_encoding_is_never_read_as_other_characters(
    encoding: str, first: bool, tmp_path: Path
) -> None:
    """Files put together: what is UTF-8 decodes as GB18030, into nonsense, nearly without error."""
    prose = TRADITIONAL if encoding == "big5" else SENTENCE
    lines = [f"{number}。{prose}" for number in range(2000)]
    others = "\n".join(lines).encode(encoding)
    for share in (1, 50):
        utf8 = "\n".join(f"{number}。{SENTENCE}" for number in range(share)).encode()
        at = 0 if first else len(others) + 1
        data = b"\n".join([utf8, others] if first else [others, utf8])
        path = write(tmp_path / f"{share}.txt", data)
        if share == 1:
            found = corpus_of(path)
            texts = [text for _for_validation, text in found.pieces()]
            assert [text for text in texts if len(text) > 5] == lines
            assert f"byte {at + 1}" in found.damage.notes()[0]
        else:
            message = refusal(path)
            assert f"from byte {at + 1} (line {1 if first else 2001}) on there is UTF-8" in message


def test_byte_order_marks_of_files_put_together_are_no_text(tmp_path: Path) -> None:
    for codec in ("utf-8-sig", "utf-16-le", "gb18030"):
        mark = "" if codec == "utf-8-sig" else "\ufeff"
        data = (mark + f"{SENTENCE}\n").encode(codec) * 40
        assert read(write(tmp_path / f"{codec}.txt", data)) == [SENTENCE] * 40


def test_utf_16_that_lost_a_byte_is_refused_near_that_place(tmp_path: Path) -> None:
    """All behind it is read askew: nothing that could be left out."""
    data, _lines = in_encoding("utf-16")
    message = refusal(write(tmp_path / "data.txt", data[:20_001] + data[20_002:]))
    found = re.search(r"is UTF-16 text, but byte (\d+)", message)
    assert found and 20_000 <= int(found[1]) < 21_000


def test_the_euro_of_windows_is_a_euro(tmp_path: Path) -> None:
    data, lines = in_encoding("gbk")
    found = corpus_of(write(tmp_path / "data.txt", data + b"\n\xbc\xdb\x80 12.50\n"))
    assert [text for _val, text in found.pieces()] == [*lines, "价€ 12.50"]
    assert not found.damage.notes()


def test_zero_bytes_that_a_power_cut_left_are_left_out(tmp_path: Path) -> None:
    data, lines = in_encoding("utf-8")
    found = corpus_of(write(tmp_path / "data.txt", data + bytes(40)))
    assert [text for _val, text in found.pieces()] == lines
    assert f"byte {len(data)} (a zero byte)" in found.damage.notes()[0]
    assert f"byte {len(data)} is zero" in refusal(write(tmp_path / "data.txt", data + bytes(4000)))


def test_english_with_one_latin_letter_is_read_without_it(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog.\n" * 100
    found = corpus_of(write(tmp_path / "data.txt", text.encode() + b"In the caf\xe9 again.\n"))
    assert [t for _val, t in found.pieces()][-1] == "In the caf again."


def test_jsonl_as_it_is_found_loses_nothing_but_the_odd_line(tmp_path: Path) -> None:
    good = [json.dumps({"text": line}, ensure_ascii=False) for line in LINES]
    nothing = ['{"text": null, "id": 7}', "{}", '{"text": ""}', "  "]
    path = write(tmp_path / "none.jsonl", "\n".join([*good[:300], *nothing, *good[300:]]))
    found = corpus_of(path, strict=True)
    assert [t for _val, t in found.pieces()] == LINES, "a null is no damage"
    for glue in ("\n\ufeff", "\ufeff", "", "\n\n"):  # what `cat` makes of files
        text = "\ufeff" + "\n".join(good[:300]) + glue + "\n".join(good[300:])
        assert read(write(tmp_path / "cat.jsonl", text), strict=True) == LINES
    for odd, reason in (('{"text": "cut', "no JSON"), ('{"id": 7}', "without the text field"),
                        ('{"text": 5}', "no text in"), ("[1]", "no JSON object")):  # fmt: skip
        text = "\n".join([*good[:300], odd, *good[300:]])
        found = corpus_of(write(tmp_path / "odd.jsonl", text))
        assert [t for _val, t in found.pieces()] == LINES
        place = len("\n".join(good[:300]).encode()) + 1
        assert f"line 301, byte {place} ({reason}" in found.damage.notes()[0]
        assert "line 301" in refusal(tmp_path / "odd.jsonl", strict=True)


def test_a_field_that_no_line_has_is_refused_before_the_whole_file_was_read(tmp_path: Path) -> None:
    line = json.dumps({"content": SENTENCE * 100}) + "\n"
    path = write(tmp_path / "data.jsonl", line * 2000)
    seen: list[int] = []
    with pytest.raises(DataError, match='line 1 has no field "text"; it has: content'):
        corpus_of(path, progress=lambda _label, done, _total: seen.append(done))
    assert path.stat().st_size > 10 * 2**20
    assert seen[-1] < path.stat().st_size / 2


def test_broken_text_in_parquet_is_left_out_by_its_row(tmp_path: Path) -> None:
    values = [line.encode() for line in LINES]
    values[7] += b"\xe4\xbb"
    for kind in (pa.string(), pa.binary()):
        column = pa.array(values, pa.binary()).view(kind)
        parquet.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
        found = corpus_of(tmp_path / "data.parquet")
        assert [t for _val, t in found.pieces()] == LINES
        assert "data.parquet, row 8 (not UTF-8)" in found.damage.notes()[0]
        assert "row 8" in refusal(tmp_path / "data.parquet", strict=True)


def test_damage_is_weighed_over_all_files_and_a_file_that_is_no_text_is_refused(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.txt", in_encoding("gb18030")[0])
    write(tmp_path / "b.txt", (LINES[0] * 2).encode() + b"\xff")
    found = corpus_of(tmp_path)
    assert sorted(t for _val, t in found.pieces()) == sorted([*LINES, LINES[0] * 2])
    assert "b.txt, line 1" in found.damage.notes()[0]
    write(tmp_path / "c.txt", (JAPANESE * 9).encode("euc_jp"))
    assert "c.txt is neither" in refusal(tmp_path)


# -- identity and split ------------------------------------------------------------------------


def test_the_content_hash_knows_the_content_and_not_names_or_places(tmp_path: Path) -> None:
    first = [write(tmp_path / "a/1.txt", SENTENCE), write(tmp_path / "a/2.txt", TRADITIONAL)]
    moved = [write(tmp_path / "b/x/9.txt", SENTENCE), write(tmp_path / "b/0.txt", TRADITIONAL)]
    assert corpus.content_hash(first) == corpus.content_hash(moved)
    assert corpus.content_hash(first) == corpus.content_hash(reversed(first))
    changed = [first[0], write(tmp_path / "c/2.txt", TRADITIONAL + "。")]
    assert corpus.content_hash(first) != corpus.content_hash(changed)
    other_kind = [first[0], write(tmp_path / "c/2.jsonl", TRADITIONAL)]
    assert corpus.content_hash(first) != corpus.content_hash(other_kind)


def reference_split(
    documents: list[str], fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """The rule of the split with everything in memory, as it has been since the first version:
    runs that began with it go on."""
    total = sum(map(len, documents))
    share = total * fraction
    if any(len(text) > share for text in documents):
        size = max(int(share / 4), min(corpus.MIN_CHARACTERS, total // 4))
        cut: list[str] = []
        for text in documents:
            cut += reference_pieces(text, size) if len(text) > share else [text]
        documents = cut
    scores = [xxhash.xxh3_64_intdigest(t.encode(), seed % 2**64) / 2**64 for t in documents]
    order = sorted(range(len(documents)), key=lambda index: (scores[index], index))
    size = sum(score < fraction for score in scores)
    share = fraction * sum(map(len, documents))
    taken = sum(len(documents[index]) for index in order[:size])
    while size < 1 or (size < len(order) - 1 and taken < share / 2):
        taken += len(documents[order[size]])
        size += 1
    while size == len(order) or (size > 1 and taken > share * 2):
        size -= 1
        taken -= len(documents[order[size]])
    return [documents[i] for i in sorted(order[size:])], [
        documents[i] for i in sorted(order[:size])
    ]


def reference_pieces(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > size * 3 // 2:
        end = corpus.SENTENCE_END.search(text, start + size, start + size * 3 // 2)
        cut = end.end() if end else start + size
        pieces.append(text[start:cut].strip())
        start = cut
    return [piece for piece in [*pieces, text[start:].strip()] if piece]


DOCUMENTS = st.lists(
    st.one_of(
        st.text(st.sampled_from("一二三。\n !”"), max_size=6),
        st.integers(1, 900).map(lambda size: STORY[:size]),
        st.integers(1, 900).map(lambda size: "字" * size),
    ),
    max_size=40,
).map(lambda documents: [*(t.strip() for t in documents if t.strip()), STORY[:300]])


@given(DOCUMENTS, st.sampled_from([1e-9, 0.01, 0.05, 0.5, 0.95]), st.integers(0, 2**32))
def test_the_split_is_the_one_of_the_first_version_with_both_sides(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    train, val = split(documents, fraction, seed, folder)
    assert train and val
    assert (train, val) == reference_split(documents, fraction, seed)


@given(DOCUMENTS, st.sampled_from([0.01, 0.3]), st.integers(1, 50), st.integers(1, 200))
def test_long_documents_that_come_in_parts_are_cut_at_the_same_places(
    documents: list[str], fraction: float, part: int, size: int
) -> None:
    text = "\n".join(documents)
    parts = [(text[i : i + part], i + part >= len(text)) for i in range(0, len(text), part)]
    assert list(corpus.Cut(0, size).applied(parts)) == reference_pieces(text, size)
    assert list(corpus.Cut(len(text), size).applied(parts)) == [text]


def test_a_document_keeps_its_side_when_others_come_and_the_order_changes(tmp_path: Path) -> None:
    documents = [f"{number}。{SENTENCE}" for number in range(2000)]
    val = set(split(documents, 0.05, 1, tmp_path)[1])
    assert 60 <= len(val) <= 140
    more = [f"新{number}" for number in range(500)] + documents[::-1]
    assert val == set(split(more, 0.05, 1, tmp_path)[1]) & set(documents)
    assert val != set(split(documents, 0.05, 2, tmp_path)[1])
    assert split(documents, 0.0, 1, tmp_path) == (documents, [])


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3, 0.9])
@pytest.mark.parametrize(
    "documents",
    [
        [STORY],
        ["标题", STORY],
        [re.sub(r"\W", "", STORY), "短。"],
        [STORY[:5000], STORY[5000:]],
        [STORY[i : i + 900] for i in range(0, 9000, 900)],
        [STORY[:200]],
    ],
)
def test_validation_gets_about_its_share_of_few_and_of_very_unequal_texts(
    tmp_path: Path, documents: list[str], fraction: float
) -> None:
    train, val = split(documents, fraction, 0, tmp_path)
    total = sum(map(len, documents))
    assert train and val
    assert sum(map(len, train + val)) == total, "nothing is lost"
    if total > 5000:
        assert fraction / 2 <= sum(map(len, val)) / total <= fraction * 2


def test_long_texts_are_cut_at_sentence_ends_and_short_ones_stay_whole(tmp_path: Path) -> None:
    train, val = split([STORY, SENTENCE], 0.05, 0, tmp_path)
    assert SENTENCE in train + val
    assert all(piece.endswith("。") for piece in train + val)
    many = [f"{number}。{SENTENCE}" for number in range(50)]
    train, val = split(many, 0.05, 0, tmp_path)
    assert sorted(train + val) == sorted(many)
    assert split([STORY], 0.0, 0, tmp_path) == ([STORY], [])


def test_a_sample_is_seeded_bounded_and_from_the_training_documents_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number}。{SENTENCE}"}) for number in range(2000)]
    path = write(tmp_path / "data.jsonl", "\n".join([*lines, json.dumps({"text": STORY})]))
    text = corpus_of(path, val_fraction=0.1, seed=3)
    train = [piece for for_validation, piece in text.pieces() if not for_validation]
    assert text.sample(10**9) == train, "a small text is its own sample"
    few = text.sample(30_000)
    assert few == corpus_of(path, val_fraction=0.1, seed=3).sample(30_000)
    assert set(few) != set(corpus_of(path, val_fraction=0.1, seed=4).sample(30_000))
    assert 15_000 < sum(len(piece.encode()) for piece in few) < 45_000
    assert all(any(piece in document for document in train) for piece in few)


def test_documents_in_is_lazy_enough_to_read_one_file_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", json.dumps({"text": SENTENCE}) + "\nbroken")
    documents = documents_in(path)
    assert next(documents) == SENTENCE
    with pytest.raises(DataError):
        next(documents)
