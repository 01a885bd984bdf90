"""Preparing a text for training beside the bare `tokenizers` calls, interleaved in one run.

Bare: read the file, split it at blank lines, train byte-level BPE, encode_batch, write the ids.
Ours: `prepare_data` with an empty cache, which also looks for the files, hashes them, detects the
encoding, splits, counts, checks what it wrote and maps it. Same training documents, same settings.

    python benchmarks/prepare_speed.py TEXT [--vocab-size 8192] [--repeat 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from holdfast.training.text import corpus
from holdfast.training.text.batches import unigram_bits_per_byte
from holdfast.training.text.prepare import prepare_data
from holdfast.training.text.tokenizer import END_OF_TEXT, MIN_FREQUENCY

VAL_FRACTION, SEED = 0.05, 0


def bare(path: Path, folder: Path, vocab_size: int, for_training: list[int]) -> float:
    """Seconds that the calls take which nobody can leave out."""
    start = time.perf_counter()
    text = path.read_text(encoding="utf-8")
    documents = [block.strip() for block in text.split("\n\n") if block.strip()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([documents[index] for index in for_training], trainer)
    encodings = tokenizer.encode_batch(documents)
    ids = [token for encoding in encodings for token in (*encoding.ids, 0)]
    np.array(ids, dtype=np.uint16).tofile(folder / "tokens.bin")
    return time.perf_counter() - start


def ours(path: Path, folder: Path, vocab_size: int) -> tuple[float, float]:
    """Seconds with an empty cache, and seconds of the second start."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        prepare_data(
            path, vocab_size=vocab_size, val_fraction=VAL_FRACTION, seed=SEED, cache_dir=folder
        )
        times.append(time.perf_counter() - start)
    return times[0], times[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path, help="UTF-8 text, documents separated by blank lines")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    files = corpus.files_by_content([options.text])
    text = corpus.Corpus(files, val_fraction=VAL_FRACTION, seed=SEED)
    text.scan()
    for_training = [n for n, (for_val, _text) in enumerate(text.pieces()) if not for_val]
    rows = []
    for number in range(options.repeat):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = bare(options.text, folder, options.vocab_size, for_training)
            first, second = ours(options.text, folder, options.vocab_size)
        rows.append((base, first, second))
        print(
            f"run {number + 1}: bare {base:.2f} s, prepare_data {first:.2f} s, "
            f"ratio {first / base:.2f}, from the cache {second:.3f} s"
        )
    ratio = statistics.median(first / base for base, first, _second in rows)
    print(f"median ratio: {ratio:.2f} (wanted: at most 1.3)")

    with tempfile.TemporaryDirectory() as name:
        data = prepare_data(
            options.text,
            vocab_size=options.vocab_size,
            val_fraction=VAL_FRACTION,
            seed=SEED,
            cache_dir=name,
        )
        size = data.tokenizer.vocab_size
        baseline = unigram_bits_per_byte(data.train, data.val, data.val_bytes, size)
        print(
            f"{data.documents:,} documents, {data.characters:,} characters, "
            f"{data.tokens:,} tokens, {data.characters_per_token:.3f} characters per token "
            f"at a vocabulary of {size:,}; unigram {baseline:.3f} bits per byte"
        )


if __name__ == "__main__":
    main()
