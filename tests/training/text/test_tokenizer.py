"""The tokenizer: exact round trips, the same ids as transformers, the same bytes every time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.training.text import tokenizer as tokenizers
from holdfast.training.text.tokenizer import END_OF_TEXT, TextTokenizer, train_tokenizer

WORDS = [
    "春天",
    "河边",
    "孩子",
    "风筝",
    "母亲",
    "写信",
    "下雨",
    "菜园",
    "老师",
    "月亮",
    "故事",
    "火车",
    "远方",
    "朋友",
    "读书",
    "笑着",
]
DIFFICULT = (
    "今天，天气！？ 很好…“你好”　ｆｕｌｌ  double\n\n\tcafe\u0301 😀 國 don't 12345 ,. 龘\u200d"
)


def stories(count: int, seed: int = 0) -> list[str]:
    """Made-up sentences of common words: enough repetition for merges to be learned."""
    draw = random.Random(seed)
    return [
        "，".join("".join(draw.choices(WORDS, k=4)) for _ in range(draw.randint(2, 6))) + "。\n又。"
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(stories(300), 400)


@given(text=st.text(st.characters(codec="utf-8")))
def test_every_text_comes_back_as_its_nfc_form(tokenizer: TextTokenizer, text: str) -> None:
    assume(END_OF_TEXT not in text)  # hypothesis finds it in the source; it is a token of its own
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_full_width_punctuation_survives_because_it_is_not_nfkc(tokenizer: TextTokenizer) -> None:
    for text in ("，！？：；（）", "ｆｕｌｌ１２３", "㈱①²"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_text_gives_the_same_bytes_in_another_process(
    tokenizer: TextTokenizer,
) -> None:
    script = (
        "import sys, json; from holdfast.training.text.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.load(sys.stdin), 400).fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(stories(300)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == tokenizer.fingerprint


def test_the_end_of_text_token_is_id_0_and_in_a_text_it_is_itself(tokenizer: TextTokenizer) -> None:
    assert tokenizer.eos_id == 0
    assert tokenizer.encode(END_OF_TEXT) == [0]
    assert 0 not in tokenizer.encode("".join(stories(5)))


def test_the_vocabulary_has_the_size_asked_for_or_what_the_text_has() -> None:
    full = train_tokenizer(stories(300), 350)
    assert full.vocab_size == 350
    small = train_tokenizer(stories(20), 8192)
    assert 257 < small.vocab_size < 1000
    none = train_tokenizer(["abc" * 3], 8192, min_frequency=99)
    assert none.vocab_size == 257, "256 bytes and the end of text: nothing recurs often enough"


def test_documents_are_encoded_as_each_alone_with_the_end_of_text_after_it(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*stories(40, seed=7), DIFFICULT, "一"]
    expected = [token for text in documents for token in [*tokenizer.encode(text), 0]]
    assert tokenizer.encode_batch(documents)[0].tolist() == expected
    assert tokenizer.encode_batch(documents)[0].dtype == np.dtype("<u2")
    assert len(tokenizer.encode_batch([])[0]) == 0
    monkeypatch.setattr("holdfast.training.text.tokenizer.CHUNK", 100)
    chunks = list(tokenizer.encode_chunks(documents))
    assert len(chunks) > 5
    assert [token for tokens, _lengths in chunks for token in tokens] == expected
    ends = np.cumsum(np.concatenate([lengths for _tokens, lengths in chunks]))
    assert all(expected[end - 1] == 0 for end in ends)
    assert len(ends) == len(documents)


LONG = st.lists(
    st.sampled_from([*WORDS, "\n", "。", "！", "。\n", " ", "\u3000", "a ", "é", "e\u0301", "12"])
)


@given(parts=LONG, chunk=st.integers(2, 40))
def test_a_long_document_has_the_same_tokens_in_parts(
    tokenizer: TextTokenizer, parts: list[str], chunk: int
) -> None:
    text = "".join(parts) * 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.training.text.tokenizer.CHUNK", chunk)
        tokens, lengths = tokenizer.encode_batch([text, "一", text])
    whole = [*tokenizer.encode(text), tokenizer.eos_id]
    assert tokens.tolist() == [*whole, *tokenizer.encode("一"), tokenizer.eos_id, *whole]
    assert lengths.tolist() == [len(whole), len(tokenizer.encode("一")) + 1, len(whole)]


def test_a_long_document_stays_whole_for_a_tokenizer_that_marks_the_beginning_of_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SentencePiece's way: a space before every text, so that parts would have other tokens."""
    state = train_tokenizer(stories(300), 400).to_state()
    description = json.loads(str(state["tokenizer.json"]))
    description["normalizer"] = {"type": "Prepend", "prepend": "▁"}
    marked = TextTokenizer.from_state({**state, "tokenizer.json": json.dumps(description)})
    text = "\n".join(stories(50))
    expected = [*marked.encode(text), 0]
    monkeypatch.setattr("holdfast.training.text.tokenizer.CHUNK", 50)
    assert marked.encode_batch([text])[0].tolist() == expected


def test_text_without_punctuation_is_learned_from_in_reasonable_time() -> None:
    """What the trainer takes for one word is walked through for every merge: a long one takes
    minutes."""
    text = "".join(random.Random(1).choices(WORDS, k=60_000))
    began = time.monotonic()
    trained = train_tokenizer([text], 600)
    assert time.monotonic() - began < 20
    assert len(trained.encode("春天河边孩子风筝")) <= 8


def test_progress_can_stop_the_training(tokenizer: TextTokenizer) -> None:
    def stop(_label: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(stories(50), 300, progress=stop)


def test_a_signal_is_heard_while_the_library_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merges of a large text take minutes in one call."""
    began, may_end = threading.Event(), threading.Event()

    class Slow:
        def train_from_iterator(self, documents: Iterator[list[str]], _trainer: Any) -> None:
            list(documents)
            began.set()
            may_end.wait(20)

    def stop(_label: str, _done: int, _total: int) -> None:
        if began.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", lambda _model: Slow())
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(stories(5), 300, progress=stop)
    may_end.set()


def test_what_goes_wrong_in_the_library_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def train_from_iterator(self, _documents: Iterator[list[str]], _trainer: Any) -> None:
            raise ValueError("merges")

    monkeypatch.setattr(tokenizers, "Tokenizer", lambda _model: Broken())
    with pytest.raises(ValueError, match="merges"):
        train_tokenizer(stories(5), 300)


def test_the_state_is_plain_and_brings_the_same_tokenizer_back(tokenizer: TextTokenizer) -> None:
    state = tokenizer.to_state()
    assert all(isinstance(value, str | int) for value in state.values())
    again = TextTokenizer.from_state(json.loads(json.dumps(state)))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(DIFFICULT) == tokenizer.encode(DIFFICULT)
    assert again.to_state() == state


def test_a_state_from_elsewhere_cannot_name_files_to_write(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    state = {**tokenizer.to_state(), "../evil.txt": "x", "evil.txt": "x"}
    TextTokenizer.from_state(state).save(tmp_path / "tokenizer")
    assert not list(tmp_path.rglob("evil.txt"))
    with pytest.raises(DataError, match="no complete tokenizer"):
        TextTokenizer.from_state({"eos_id": 0})
    with pytest.raises(DataError, match="damaged"):
        TextTokenizer.from_state({"tokenizer.json": "{}", "eos_id": 0})


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama"])
def test_transformers_reads_the_saved_folder_with_the_same_ids_and_text(
    tokenizer: TextTokenizer, tmp_path: Path, model_type: str | None
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if model_type:  # with a model's config.json beside it transformers chooses another class
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [DIFFICULT, f"前{END_OF_TEXT}后", *stories(20, seed=3)]:
        ids = theirs.encode(text)
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == unicodedata.normalize("NFC", text)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == tokenizer.eos_id
    theirs.save_pretrained(tmp_path / "again")
    assert TextTokenizer.from_directory(tmp_path / "again").encode(text) == ids


def test_a_hugging_face_folder_is_taken_as_it_is(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"eos_token": {"content": "河", "lstrip": False}}
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["model"]["vocab"]["河"] = description["model"]["vocab"].popitem()[1]
    description["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = TextTokenizer.from_directory(tmp_path)
    assert found.eos_id == description["model"]["vocab"]["河"]
    assert len(found.encode(DIFFICULT)) > 4, "a model's truncation would lose text"
    found.save(tmp_path / "copy")
    assert TextTokenizer.from_directory(tmp_path / "copy").fingerprint == found.fingerprint
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            TextTokenizer.from_directory(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no tokenizer" in refusal()
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    assert "end-of-text" in refusal()
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    assert "damaged" in refusal()
