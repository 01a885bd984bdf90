"""ONNX: the graph runs in onnxruntime for any batch and length, and its cache saves the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from holdfast.errors import HoldfastError
from holdfast.exchange.export import Exported, export
from holdfast.exchange.importing import import_model
from holdfast.training.inference import load_for_inference
from tests.exchange.strangers import Stranger, batches


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tied GPT-2 and an untied Llama whose queries share keys."""
    place = tmp_path_factory.mktemp(request.param)
    torch.save(Stranger(request.param).train(2).state("model"), place / "theirs.pt")
    import_model(str(place / "theirs.pt"), str(place / "run"))
    return export(str(place / "run"), "onnx", out=str(place / "onnx"))


class Graph:
    """The graph as a stranger runs it."""

    def __init__(self, done: Exported) -> None:
        self.session = onnxruntime.InferenceSession(
            str(done.target / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        self.model = load_for_inference(done.source, device="cpu").model

    def empty(self, rows: int) -> dict[str, Any]:
        return {
            i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs() if i.name.startswith("past_")
        }  # fmt: skip

    def run(self, ids: torch.Tensor, mask: torch.Tensor, cache: dict[str, Any]) -> Any:
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **cache}
        logits, *present = self.session.run(None, feed)
        return torch.from_numpy(logits), dict(zip(cache, present, strict=True))


@pytest.fixture(scope="module")
def graph(exported: Exported) -> Graph:
    return Graph(exported)


def test_it_was_compared_within_what_is_stated(exported: Exported) -> None:
    assert exported.check is not None
    assert exported.check.difference <= 1e-4 * exported.check.largest
    assert not exported.notes


def test_the_file_is_plain_onnx_without_paths_of_this_machine(exported: Exported) -> None:
    path = exported.target / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version >= 17
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert (exported.target / "tokenizer.json").is_file()


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (3, 32), (5, 2)])
def test_any_batch_and_any_length(graph: Graph, rows: int, length: int) -> None:
    ids = torch.cat(batches(4), 1)[:1, :length].repeat(rows, 1)
    ids[0] = ids[0].flip(0)
    logits, _cache = graph.run(ids, torch.ones_like(ids), graph.empty(rows))
    with torch.no_grad():
        assert torch.allclose(logits, graph.model(ids).logits, atol=1e-5)


def test_token_by_token_with_the_cache_is_the_whole_text_at_once(graph: Graph) -> None:
    ids = batches(1)[0][:2, :9]
    cache, found = graph.empty(2), []
    for end in range(1, 10):
        mask = torch.ones(2, end, dtype=torch.long)
        logits, cache = graph.run(ids[:, end - 1 : end], mask, cache)
        found.append(logits)
    with torch.no_grad():
        assert torch.allclose(torch.cat(found, 1), graph.model(ids).logits, atol=1e-5)


def test_padding_at_the_left_changes_nothing(graph: Graph) -> None:
    ids = batches(1)[0][:1, :6]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    logits, _cache = graph.run(padded, mask, graph.empty(1))
    with torch.no_grad():
        assert torch.allclose(logits[:, 3:], graph.model(ids).logits, atol=1e-5)


def test_without_a_cache_where_the_model_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's keeps the newest keys only, which no graph here can hold."""
    torch.save(Stranger("mistral").state("model"), tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), str(tmp_path / "run"))
    done = export(str(tmp_path / "run"), "onnx", out=str(tmp_path / "onnx"), dtype="fp16")
    assert "no cache" in done.notes[0]
    assert done.check is not None
    assert done.check.passed
    session = onnxruntime.InferenceSession(str(done.target / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]

    def fails(*_args: Any, **_named: Any) -> None:
        raise RuntimeError("no graph\nof it")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(HoldfastError, match=r"MistralForCausalLM\): no graph$"):
        export(str(tmp_path / "run"), "onnx", out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
