"""The memory and the time that preparing texts of several sizes takes.

    python benchmarks/prepare_memory.py TEXT [--megabytes 4 40 400] [--whole]

The texts are made of TEXT (UTF-8, documents separated by blank lines): its documents in another
order in every round, each seventh character replaced by one of another place, so that they do not
repeat. Each is prepared in a process of its own (`prepare_data` with an empty cache, vocabulary
8192), whose highest resident memory is shown, beside the figures of the tokenizer. With `--whole`
the tokenizer is trained on all of the text instead of a sample: what that costs, and what it gains.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ONE = """
import resource, sys, time
from holdfast.training.text import prepare
from holdfast.training.text.batches import unigram_bits_per_byte
path, cache, whole = sys.argv[1:]
if whole == "True":
    prepare.SAMPLE = 10**18
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
data = prepare.prepare_data(path, vocab_size=8192, val_fraction=0.05, seed=0, cache_dir=cache)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bits = unigram_bits_per_byte(data.train, data.val, data.val_bytes, data.tokenizer.vocab_size)
print(f"at most {peak / 1e3:.0f} MB in memory ({before / 1e3:.0f} MB before), {seconds:.1f} s; "
      f"{data.documents:,} documents, {data.tokens:,} tokens, {data.characters_per_token:.4f} "
      f"characters per token, unigram {bits:.4f} bits per byte")
"""


def write(text: str, path: Path, size: int) -> None:
    """A text of `size` bytes like `text`."""
    draw, written = np.random.default_rng(0), 0
    documents = text.split("\n\n")
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            shuffled = "\n\n".join(documents[i] for i in draw.permutation(len(documents)))
            codes = np.frombuffer(shuffled.encode("utf-32-le"), dtype="<u4").copy()
            letters = np.flatnonzero(codes > 0x4E00)
            letters = letters[codes[letters] < 0xA000]
            changed = draw.choice(letters, len(letters) // 7, replace=False)
            codes[changed] = codes[draw.choice(letters, len(changed))]
            data = codes.tobytes().decode("utf-32-le").encode()[: size - written]
            written += file.write(data.decode(errors="ignore") + "\n\n") and len(data)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 40, 400])
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    print(f"# {datetime.date.today()}, {processor()}: python benchmarks/prepare_memory.py "
          + " ".join(sys.argv[1:]), flush=True)  # fmt: skip
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text.txt")
            write(text, path, megabytes * 1_000_000)
            command = [sys.executable, "-c", ONE, str(path), folder, str(options.whole)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"{megabytes} MB: {found.stdout.strip()}", flush=True)


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


if __name__ == "__main__":
    main()
