"""Tokens to text as they come: whole characters, and no part of a stop string."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as bpe
from tokenizers.pre_tokenizers import BertPreTokenizer

from holdfast.serving.engine.streaming import BROKEN, StopFilter, TextStream, Vocabulary
from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
from tests.serving.models import POEM


@pytest.fixture(scope="module")
def letters() -> TextTokenizer:
    """A vocabulary of bytes and little more: every Chinese character is two or three tokens."""
    return train_tokenizer(["ab"], 258)


def pieces(tokenizer: TextTokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(Vocabulary(tokenizer))
    return [stream.push(token) for token in tokens]


@pytest.mark.parametrize("text", [POEM, "naïve 🌕🌑 𠮷野家 a\u0301", "<|endoftext|>明", ""])
def test_the_pieces_are_whole_characters_and_together_the_text(
    letters: TextTokenizer, text: str
) -> None:
    tokens = letters.encode(text)
    found = pieces(letters, tokens)
    assert "".join(found) == letters.decode(tokens)
    assert not any(BROKEN in piece for piece in found)


def test_bytes_that_are_no_text_are_told_as_soon_as_that_is_sure(letters: TextTokenizer) -> None:
    first = letters.encode("明")[0]
    found = pieces(letters, [first, first, *letters.encode("b"), first])
    assert found == ["", BROKEN, BROKEN + "b", ""], "the last may still become a character"


def test_every_token_knows_its_bytes(letters: TextTokenizer) -> None:
    vocabulary = Vocabulary(letters)
    text = "几时 🌕\n"
    assert b"".join(map(vocabulary.bytes_of, letters.encode(text))).decode() == text
    assert vocabulary.longest == len(b"<|endoftext|>")


def test_tokenizers_of_another_kind_stream_whole_characters_too() -> None:
    names = ["<unk>", "</s>", "▁a", "b", *(f"<0x{byte:02X}>" for byte in "月".encode())]
    made: Any = Tokenizer(bpe.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    files = {"tokenizer.json": made.to_str()}
    tokenizer = TextTokenizer(files, 1)
    assert json.loads(files["tokenizer.json"])["decoder"]["type"] == "Sequence"
    assert pieces(tokenizer, [2, 3, 4, 5, 6, 2]) == ["a", "b", "", "", "月", " a"]
    stream = TextStream(Vocabulary(tokenizer), before=[2])
    assert stream.push(2) == " a", "a word behind a prompt keeps its space"
    assert Vocabulary(tokenizer).bytes_of(4) == "月".encode()[:1]


def test_chinese_of_a_bert_tokenizer_has_no_spaces_streamed_or_whole() -> None:
    names = ["[UNK]", "[SEP]", *"今天气好，“”", "hello", "##s", "world"]
    made: Any = Tokenizer(
        bpe.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    made.pre_tokenizer, made.decoder = BertPreTokenizer(), decoders.WordPiece()
    made.normalizer = normalizers.BertNormalizer()
    tokenizer = TextTokenizer({"tokenizer.json": made.to_str()}, 1)
    for text in ("今天，“好天气”", "hellos world hello", "今天 hellos world 天"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == "".join(pieces(tokenizer, ids))
    stream = TextStream(Vocabulary(tokenizer), before=tokenizer.encode("今"))
    assert stream.push(3) == "天", "nor behind a prompt"


def test_a_stop_string_is_found_across_pieces_and_never_shown_in_part() -> None:
    for size in range(1, len("一二三四五六七") + 1):
        stop = StopFilter(["五六", "四五七"])
        text = "一二三四五六七"
        cut = [text[i : i + size] for i in range(0, len(text), size)]
        shown = [stop.push(piece) for piece in cut]
        assert "".join(shown) == "一二三四" and stop.stopped


def test_what_only_began_like_a_stop_string_is_shown_at_the_end() -> None:
    stop = StopFilter(["abcd"])
    assert [stop.push("xab"), stop.push("c"), stop.push("ab")] == ["x", "", "abc"]
    assert stop.finish() == "ab" and not stop.stopped
