"""Files, encodings, formats and the split: what gets in, what is refused and with which words."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from holdfast.errors import DataError
from holdfast.training import corpus
from holdfast.training.formats import decode, documents_in

SENTENCE = "今天早上我去市场买菜，卖菜的阿姨告诉我，昨天下了一场大雨，所以青菜比平时贵了一些。"
STORY = "".join(f"{number}。{SENTENCE}" for number in range(300))
TRADITIONAL = "今天早上我去市場買菜，賣菜的阿姨告訴我，昨天下了一場大雨，所以青菜比平時貴了一些。"
KOREAN = "오늘 아침 나는 시장에 가서 채소를 샀다. 집에 오는 길에 강가에서 아이들을 보았다."
JAPANESE = "今日の朝、私は市場へ野菜を買いに行きました。帰り道、川辺で子供たちを見ました。"


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: Path, **options: str) -> list[str]:
    return corpus.read_documents(corpus.discover(path), **options)


def refusal(path: Path, **options: str) -> str:
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16"])
@pytest.mark.parametrize("sentence", [SENTENCE, TRADITIONAL])
def test_every_encoding_of_chinese_that_we_promise_is_detected(
    tmp_path: Path, encoding: str, sentence: str
) -> None:
    lines = [f"{number}。{sentence}" for number in range(6)]
    assert read(write(tmp_path / "data.txt", "\n".join(lines).encode(encoding))) == lines


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Müller trägt größere Straßenschuhe, élève, café crème à l'été. " * 9, "latin-1"),
        ("Das Mädchen hört fröhlich Öl" * 20, "latin-1"),
        (TRADITIONAL * 9, "big5"),
        (KOREAN * 9, "euc_kr"),
        (JAPANESE * 9, "euc_jp"),
        (JAPANESE * 9, "shift_jis"),
    ],
)
def test_other_encodings_are_refused_even_where_they_are_valid_gb18030(
    tmp_path: Path, text: str, encoding: str
) -> None:
    message = refusal(write(tmp_path / "data.txt", text.encode(encoding)))
    assert "neither UTF-8 nor GB18030" in message
    assert "line 1" in message


def test_a_broken_utf8_file_says_at_which_line_and_byte(tmp_path: Path) -> None:
    good = (SENTENCE + "\n") * 10
    data = good.encode()
    message = refusal(write(tmp_path / "data.txt", data + b"\xe4\xbb\n" + data))
    assert f"byte {len(data)} (line 11)" in message


def test_binary_files_are_refused(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4
    assert "byte 8 is zero" in refusal(write(tmp_path / "picture.txt", png))
    noise = bytes(value for value in bytes(range(255, 0, -1)) * 4)
    assert "neither" in refusal(write(tmp_path / "noise.jsonl", noise))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff")))
def test_any_utf8_text_comes_back_with_unix_line_ends(text: str) -> None:
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert decode(text.encode(), Path("x.txt")) == expected
    assert decode(text.encode("utf-8-sig"), Path("x.txt")) == expected


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


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=2, max_size=40),
    st.sampled_from([0.01, 0.05, 0.5, 0.95]),
    st.integers(),
)
def test_the_split_is_a_partition_with_both_sides_and_depends_on_content_only(
    documents: list[str], fraction: float, seed: int
) -> None:
    train, val = corpus.split_documents(documents, fraction, seed)
    assert sorted(train + val) == list(range(len(documents)))
    assert train and val
    assert (train, val) == corpus.split_documents(documents, fraction, seed)


def test_a_document_keeps_its_side_when_others_come_and_the_order_changes() -> None:
    documents = [f"{number}。{SENTENCE}" for number in range(2000)]
    val = {documents[i] for i in corpus.split_documents(documents, 0.05, 1)[1]}
    assert 60 <= len(val) <= 140
    more = [f"新{number}" for number in range(500)] + documents[::-1]
    val_of_more = {more[i] for i in corpus.split_documents(more, 0.05, 1)[1]}
    assert val == val_of_more & set(documents)
    assert val != {documents[i] for i in corpus.split_documents(documents, 0.05, 2)[1]}
    assert corpus.split_documents(documents, 0.0, 1) == (list(range(2000)), [])


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
    documents: list[str], fraction: float
) -> None:
    pieces = corpus.cut_long_documents(documents, fraction)
    assert "".join(pieces) == "".join(documents), "nothing is lost"
    train, val = corpus.split_documents(pieces, fraction, 0)
    assert train and val
    total = sum(map(len, documents))
    if total > 5000:
        assert fraction / 2 <= sum(len(pieces[i]) for i in val) / total <= fraction * 2


def test_long_texts_are_cut_at_sentence_ends_and_short_ones_stay_whole() -> None:
    pieces = corpus.cut_long_documents([STORY, SENTENCE], 0.05)
    assert pieces[-1] == SENTENCE
    assert all(piece.endswith("。") for piece in pieces)
    many = [f"{number}。{SENTENCE}" for number in range(50)]
    assert corpus.cut_long_documents(many, 0.05) == many
    assert corpus.cut_long_documents([STORY], 0.0) == [STORY]


def test_documents_in_is_lazy_enough_to_read_one_file_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", json.dumps({"text": SENTENCE}) + "\nbroken")
    documents = documents_in(path)
    assert next(documents) == SENTENCE
    with pytest.raises(DataError):
        next(documents)
