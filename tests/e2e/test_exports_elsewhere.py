"""Exports where nobody has heard of holdfast: a Python in which it cannot be imported, and in which
nothing else can that such a person would not have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.exchange.export import export
from holdfast.exchange.importing import import_model
from holdfast.training.inference import load_for_inference
from tests.exchange.strangers import Stranger, make_run

TEXT = "今天。\n  We <|endoftext|>"  # short: one of the models sees 32 tokens

_ALONE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name + " is not here", name=name)

sys.meta_path.insert(0, Blocker())
for name in {blocked!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " could be imported")
folder, text = sys.argv[1:]
"""

_HF = (
    _ALONE.format(blocked=["holdfast"])
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
ids = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(**ids).logits.float()
new = model.generate(**ids, max_new_tokens=8, do_sample=False)
print(json.dumps({"ids": ids["input_ids"][0].tolist(), "logits": logits[0].tolist(),
                  "new": new[0].tolist(), "dtype": str(model.dtype)}))
"""
)

_ONNX = (
    _ALONE.format(blocked=["holdfast", "torch", "transformers", "onnx", "onnxscript"])
    + """
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
session = onnxruntime.InferenceSession(folder + "/model.onnx",
                                       providers=["CPUExecutionProvider"])
past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type]) for i in past}
ids = tokenizer.encode(text, add_special_tokens=False).ids
given, new, first = ids, list(ids), None
for _ in range(8):
    logits, *present = session.run(None, {
        "input_ids": np.array([given]), "attention_mask": np.ones((1, len(new)), np.int64), **cache,
    })
    first = logits[0].astype(float).tolist() if first is None else first
    cache = dict(zip(cache, present))
    given = [int(logits[0, -1].argmax())]
    new += given
    if given == [0]:
        break
print(json.dumps({"ids": ids, "logits": first, "new": new}))
"""
)


def alone(program: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(folder), TEXT],
        capture_output=True, text=True, encoding="utf-8", timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ours(source: Path) -> dict[str, Any]:
    """What holdfast itself makes of the text: logits, and eight tokens, the likeliest each time."""
    loaded = load_for_inference(source, device="cpu")
    ids = loaded.tokenizer.encode(TEXT)
    new = list(ids)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits[0]
        for _token in range(8):
            new.append(int(loaded.model(torch.tensor([new])).logits[0, -1].argmax()))
            if new[-1] == loaded.tokenizer.eos_id:
                break
    return {"ids": ids, "logits": logits, "new": new}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["ids"] == expected["ids"]
    difference = (torch.tensor(found["logits"]) - expected["logits"]).abs().max().item()
    assert difference <= tolerance * expected["logits"].abs().max().item()


def test_exports_open_with_transformers_alone_and_with_onnxruntime_alone(tmp_path: Path) -> None:
    torch.save(Stranger("gpt2").train(30).state("model"), tmp_path / "theirs.pt")
    run = tmp_path / "run"
    import_model(str(tmp_path / "theirs.pt"), str(run))
    expected = ours(run)
    for form, program in (("hf", _HF), ("onnx", _ONNX)):
        export(str(run), form, out=str(tmp_path / form))
        found = alone(program, tmp_path / form)
        assert_same(found, expected, 1e-4)
        assert found["new"] == expected["new"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("model", ["tiny", "gpt2-small"])
def test_trained_models_of_both_kinds_in_every_dtype(
    tmp_path: Path, model: str, dtype: str
) -> None:
    run = make_run(tmp_path, model=model, epochs="none", num_steps=4, context_length=64)
    expected = ours(run)
    tolerance = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}[dtype]
    for form, program in (("hf", _HF), ("onnx", _ONNX)):
        if (form, dtype) == ("onnx", "bf16"):
            continue
        export(str(run), form, out=str(tmp_path / form), dtype=dtype)
        found = alone(program, tmp_path / form)
        assert_same(found, expected, tolerance)
        if dtype == "fp32":
            assert found["new"] == expected["new"]
