"""What a hostile checkpoint says of itself is refused in one line before it is built or run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from holdfast.errors import HoldfastError
from holdfast.exchange.export_formats import write_state
from holdfast.training import continuing
from holdfast.training.inference import load_for_inference
from holdfast.training.models import SHAPES, build_model, plain_config
from holdfast.training.options.config import ModelConfig
from holdfast.training.plausible import check_configuration
from tests.exchange.strangers import make_run

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = load(make_run(tmp_path_factory.mktemp("run")) / "latest.pt")
    return {name: found[name] for name in found if name not in ("optimizer", "scheduler", "rng")}


def model(**values: Any) -> Change:
    return lambda state: state["model_config"].update(values)


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(state: dict[str, Any]) -> None:
        said = json.loads(state["tokenizer"]["tokenizer.json"])
        edit(said)
        state["tokenizer"]["tokenizer.json"] = json.dumps(said)

    return change


def eos(token: int) -> Change:
    return lambda state: state["tokenizer"].update(eos_id=token)


def replacing(content: str, times: int) -> Change:
    one = {"type": "Replace", "pattern": {"Regex": "."}, "content": content}
    return tokenizer(lambda said: said.update(
        normalizer={"type": "Sequence", "normalizers": [one] * times}
    ))  # fmt: skip


def extra_word(token: int) -> Change:
    return tokenizer(lambda said: said["model"]["vocab"].update(zzzz=token))


def empty(said: dict[str, Any]) -> None:
    said["model"] = {**said["model"], "vocab": {}, "merges": []}
    said["added_tokens"] = []


ABSURD: dict[str, tuple[Change, str]] = {
    "ten million layers": (model(num_hidden_layers=10**7), "num_hidden_layers = 10000000"),
    "a vast vocabulary": (model(vocab_size=10**12), "vocab_size"),
    "a vast width": (model(hidden_size=10**7), "hidden_size"),
    "a vast head": (model(head_dim=2 * 10**9), "head_dim"),
    "no heads": (model(num_attention_heads=0), "does not know"),
    "no context": (model(max_position_embeddings=-5), "max_position_embeddings = -5"),
    "a huge context": (model(max_position_embeddings=10**13), "max_position_embeddings"),
    "code": (model(model_type="clip", auto_map={"AutoModelForCausalLM": "m.Evil"}), "never runs"),
    "an unknown activation": (model(hidden_act="__import__"), "does not know"),
    "a vast token": (extra_word(4_000_000_000), "another model's"),
    "an end that is no token": (eos(10**9), "has no token 1000000000"),
    "an end below zero": (eos(-1), "has no token -1"),
    "no tokens": (tokenizer(empty), "has no token"),
    "words that grow": (replacing("xx", 30), "times as long"),
    "a charsmap that is none": (tokenizer(lambda said: said.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})), "damaged or of an"),
}  # fmt: skip


def written(state: dict[str, Any], change: Change, path: Path) -> Path:
    changed = {**state, "model_config": {**state["model_config"]},
               "tokenizer": {**state["tokenizer"]}}  # fmt: skip
    change(changed)
    write_state(changed, path, None)
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_checkpoint_is_refused_in_one_line(
    state: dict[str, Any], name: str, tmp_path: Path
) -> None:
    change, words = ABSURD[name]
    path = written(state, change, tmp_path / "x.pt")
    with pytest.raises(HoldfastError, match=words) as error:
        load_for_inference(path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ten million layers", "a vast vocabulary"])
def test_so_is_one_that_training_would_go_on_from(
    state: dict[str, Any], name: str, tmp_path: Path
) -> None:
    change, words = ABSURD[name]
    with pytest.raises(HoldfastError, match=words):
        continuing.read_saved(written(state, change, tmp_path / "x.pt"))


def test_what_a_tokenizer_cannot_do_is_said_when_it_is_asked(
    state: dict[str, Any], tmp_path: Path
) -> None:
    explodes = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                "invert": False}  # fmt: skip
    for change in (
        tokenizer(lambda said: said.update(pre_tokenizer=explodes)),
        tokenizer(lambda said: said.update(model={"type": "Unigram", "unk_id": None,
                                                  "vocab": [["a", 0.0]]})),
    ):  # fmt: skip
        loaded = load_for_inference(written(state, change, tmp_path / "x.pt"), device="cpu")
        began = time.process_time()
        with pytest.raises(HoldfastError, match="The tokenizer cannot do this"):
            loaded.tokenizer.encode("x" * 60)
        assert time.process_time() - began < 30
        (tmp_path / "x.pt").unlink()


@pytest.mark.parametrize("name", SHAPES)
def test_our_own_shapes_are_plausible(name: str) -> None:
    import torch

    with torch.device("meta"):
        built = build_model(ModelConfig(model=name), vocab_size=300, eos_id=0)
    shapes = [list(tensor.shape) for tensor in built.state_dict().values()]
    check_configuration(plain_config(built), shapes, Path(name))
