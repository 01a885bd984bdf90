"""How much a model has learned beyond the frequency of its tokens, on text that it has not seen.

    python benchmarks/against_unigram.py [--data FILE] [--run DIR]

Trains `--preset quick` (model tiny, one epoch) on a text, the sample of this repository where none
is named, unless the run is there already, and prints bits per byte of the validation text: the
model's, and a unigram model's over the same tokens. Three samples follow. Exit status 1 unless the
model needs at least 25 % fewer bits, which takes a text of some megabytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("《浣溪沙》", "明月", "春风")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/zh_sample.txt")
    parser.add_argument("--run", type=Path, default=Path("runs/unigram"))
    arguments = parser.parse_args()

    import transformers

    from holdfast import load
    from holdfast.cli.main import train_main
    from holdfast.training.inference import sample_text
    from holdfast.training.text.batches import unigram_bits_per_byte
    from holdfast.training.text.prepare import prepare_data
    from holdfast.training.text.tokenizer import TextTokenizer

    words = ["--preset", "quick", "--data-file", str(arguments.data), "--yes", "--lang", "en"]
    status = train_main([*words, "--checkpoint-dir", str(arguments.run)])
    if status:
        return status
    state = load(arguments.run / "best_model.pt")
    tokenizer = TextTokenizer.from_state(state["tokenizer"])
    config = state["config"]
    data = prepare_data(
        arguments.data, vocab_size=0, tokenizer=tokenizer,
        val_fraction=config["data"]["val_fraction"], seed=config["training"]["seed"],
        cache_dir=config["data"]["cache_dir"],
    )  # fmt: skip
    unigram = unigram_bits_per_byte(data.train, data.val, data.val_bytes, tokenizer.vocab_size)
    model_bits = bits(arguments.run)
    print(f"\nunigram model  {unigram:.4f} bits per byte (vocabulary {tokenizer.vocab_size})")
    fewer = 100 * (1 - model_bits / unigram)
    print(f"trained model  {model_bits:.4f} bits per byte, {fewer:.1f} % fewer")
    settings = transformers.AutoConfig.for_model(**state["model_config"])
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(state["model"])
    for seed, prompt in enumerate(PROMPTS):
        text = sample_text(model, tokenizer, prompt, 100, context_length=128, seed=seed)
        print(f"\n--- {prompt}\n{text}")
    return 0 if model_bits <= 0.75 * unigram else 1


def bits(run: Path) -> float:
    """Validation bits per byte of the best checkpoint, from its manifest."""
    from holdfast.checkpoint.rundir.catalog import Catalog

    best = Catalog(run).scan().best
    assert best is not None
    return float(best.metrics["bits_per_byte"])


if __name__ == "__main__":
    sys.exit(main())
