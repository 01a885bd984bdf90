"""Names of parameters: wrappers in them, and whose the slots of an optimizer are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from holdfast import CheckpointManager, load
from holdfast.checkpoint.state.names import matched, plain_names
from holdfast.checkpoint.state.restore import plan_restore
from holdfast.errors import StateMismatch
from tests.support import assert_same

# ---------------------------------------------------------------------------------------- wrappers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)  # a user may call it that
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.module(x))


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), Block(), nn.Linear(3, 1))


class Own(nn.Module):
    """A user's class that names its only child as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x)


class Forward(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward_module(x)


class Sharded(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self._fsdp_wrapped_module(x)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def inside(wrap: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        model[1].module = wrap(model[1].module)
        return model

    return apply


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "plain": lambda m: m,
    "compiled": compiled,
    "in parallel": nn.DataParallel,
    "compiled in parallel": lambda m: nn.DataParallel(compiled(m)),
    "of its own class": Own,
    "fabric": lambda m: Forward(nn.DataParallel(m)),
    "sharded": Sharded,
    "compiled layer": inside(compiled),
    "checkpointed layer": inside(checkpoint_wrapper),
    "sharded layer": inside(Sharded),
    "compiled in a checkpointed layer": inside(lambda m: checkpoint_wrapper(compiled(m))),
}


def train(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("then", WRAPS)
@pytest.mark.parametrize("first", WRAPS)
def test_a_run_goes_on_under_any_other_wrapper(first: str, then: str, tmp_path: Path) -> None:
    """Weights, buffers and the moments of each are where they belong."""
    bare = build()
    model = WRAPS[first](bare)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}) as manager:
        manager.save(step=1, strict=True)
    again = build(seed=5)
    wrapped = WRAPS[then](again)
    second = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    with CheckpointManager(tmp_path, {"model": wrapped, "optimizer": second}) as manager:
        manager.resume()
    for mine, theirs in zip(again.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert_same(second.state[mine], optimizer.state[theirs])
    assert torch.equal(again[1].norm.running_var, bare[1].norm.running_var)


@pytest.mark.parametrize("name", [name for name in WRAPS if name != "of its own class"])
def test_a_checkpoint_has_the_names_of_the_bare_model(name: str, tmp_path: Path) -> None:
    """Whoever opens it with torch loads it into the model, versions of modules included."""
    model = WRAPS[name](build())
    with CheckpointManager(tmp_path, {"model": model}) as manager:
        manager.save(step=1, strict=True)
    state = torch.load(tmp_path / "latest.pt", weights_only=True)["model"]
    assert list(state) == list(build().state_dict())
    assert state._metadata["1.norm"] == {"version": 2}
    build().load_state_dict(state)
    assert list(load(tmp_path / "latest.pt")["model"]) == list(state)


def test_a_users_own_class_keeps_its_names(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"model": Own(build())}) as manager:
        manager.save(step=1, strict=True)
    Own(build()).load_state_dict(torch.load(tmp_path / "latest.pt", weights_only=True)["model"])


class Twins(nn.Module):
    """One of its two weights has the other's name behind a wrapper's word."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.module = nn.LayerNorm(2, bias=False)


@pytest.mark.parametrize("first", [lambda m: m, compiled, nn.DataParallel, Own])
@pytest.mark.parametrize("then", [lambda m: m, compiled, nn.DataParallel, Own])
def test_a_word_that_tells_two_weights_apart_is_part_of_their_names(
    first: Any, then: Any, tmp_path: Path
) -> None:
    with CheckpointManager(tmp_path, {"model": first(Twins())}) as manager:
        manager.save(step=1, strict=True)
    twins = Twins()
    nn.init.constant_(twins.weight, 5)
    nn.init.constant_(twins.module.weight, 7)
    with CheckpointManager(tmp_path, {"model": then(twins)}) as manager:
        manager.resume()
    assert twins.weight.tolist() == [0, 0]
    assert twins.module.weight.tolist() == [1, 1]


@pytest.mark.parametrize(("here", "there"), [
    (["a"], ["b"]),
    (["module.a", "a"], ["a"]),
    (["a"], ["module.a", "a"]),
    (["module.a", "a"], ["_orig_mod.a", "x.a"]),
    ([], ["a"]),
])  # fmt: skip
def test_names_that_mean_other_parameters_are_not_matched(
    here: Sequence[str], there: Sequence[str]
) -> None:
    assert matched(here, there) is None


def test_a_file_with_the_names_of_wrappers_is_restored() -> None:
    """As older versions, and others, have written them."""
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_forward_module.module."):
        model, saved = build(), build(seed=3).state_dict()
        plan_restore({"m": model}, {"m": {prefix + k: v for k, v in saved.items()}}).commit()
        assert_same(dict(model.state_dict()), dict(build(seed=3).state_dict()))


# -------------------------------------------------------------------------- slots of an optimizer


class Registered(nn.Module):
    """Layers of one shape, registered in the order that is asked for."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in order:
            self.add_module(name, nn.Linear(3, 3, bias=False))

    def forward(self, x: torch.Tensor) -> Any:
        return sum((i + 1) * getattr(self, name)(x) for i, name in enumerate(sorted(self._modules)))


class Strange(torch.optim.AdamW):
    """Loads itself, as some optimizers of other libraries do."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


def all_of(model: nn.Module) -> Any:
    return model.parameters()


def named(model: nn.Module) -> Any:
    return model.named_parameters()


def in_two(model: Any) -> Any:
    """Two groups that stand in the order in which the layers are registered."""
    layers = [[*layer.parameters()] for layer in model.children()]
    first = model.a.weight
    small = [p for layer in layers for p in layer if p is first]
    large = [p for layer in layers for p in layer if p is not first]
    groups = [{"params": small, "weight_decay": 0.5}, {"params": large}]
    return groups if next(iter(model._modules)) == "a" else groups[::-1]


@pytest.mark.parametrize("held", ["model", "its state_dict", "its parameters"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Strange])
@pytest.mark.parametrize("given", [all_of, named, in_two])
@pytest.mark.parametrize("order", ["cba", "bca"])
def test_moments_find_their_parameters_in_another_order(
    order: str, given: Any, kind: Any, held: str, tmp_path: Path
) -> None:
    def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        weights: Any = model if held == "model" else model.state_dict()
        weights = dict(model.named_parameters()) if held == "its parameters" else weights
        return {"model": weights, "optimizer": optimizer}

    model = Registered("abc")
    optimizer = kind(given(model), lr=0.1)
    train(model, optimizer)
    with CheckpointManager(tmp_path, state_of(model, optimizer)) as manager:
        manager.save(step=1, strict=True)
    other = Registered(order)
    second = kind(given(other), lr=0.1)
    with CheckpointManager(tmp_path, state_of(other, second)) as manager:
        manager.resume()
    for name in "abc":
        mine, theirs = getattr(other, name).weight, getattr(model, name).weight
        assert_same(second.state[mine], optimizer.state[theirs])
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for group in second.param_groups:
        for tensor in group["params"]:
            name = next(n for n in "abc" if getattr(other, n).weight is tensor)
            assert group["weight_decay"] == decays[id(getattr(model, name).weight)]
    if given is named:
        assert second.param_groups[0]["param_names"] == [f"{name}.weight" for name in order]


def test_the_optimizers_part_of_the_file_is_what_torch_writes(tmp_path: Path) -> None:
    model = Registered("ab")
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}) as manager:
        manager.save(step=1, strict=True)
    state = torch.load(tmp_path / "latest.pt", weights_only=True)["optimizer"]
    assert_same(state, optimizer.state_dict())


def test_tied_weights_are_found_under_either_name(tmp_path: Path) -> None:
    def tied(order: str) -> tuple[Registered, Any]:
        model = Registered(order)
        model.b.weight = model.a.weight
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = tied("abc")
    train(model, optimizer)
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}) as manager:
        manager.save(step=1, strict=True)
    other, second = tied("cba")
    with CheckpointManager(tmp_path, {"model": other, "optimizer": second}) as manager:
        manager.resume()
    for name in "ac":
        mine, theirs = getattr(other, name).weight, getattr(model, name).weight
        assert_same(second.state[mine], optimizer.state[theirs])


def without_names(directory: Path, state: dict[str, Any]) -> Any:
    """What an older file gives: its state, and no names in its manifest."""
    with CheckpointManager(directory, state) as manager:
        manager.save(step=1, strict=True)
    return load(directory / "latest.pt")


def test_a_file_without_names_goes_by_position_and_shape(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = without_names(tmp_path, {"optimizer": optimizer})
    plan_restore({"optimizer": optimizer}, saved).commit()
    turned = torch.optim.AdamW([*model.parameters()][::-1])
    with pytest.raises(StateMismatch, match=r"exp_avg is float32\[3, 2\] in the checkpoint"):
        plan_restore({"optimizer": turned}, saved)


def test_a_module_under_another_key_of_the_state(tmp_path: Path) -> None:
    model = Registered("abc")
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with CheckpointManager(tmp_path, {"net": model, "optimizer": optimizer}) as manager:
        manager.save(step=1, strict=True)
    other = Registered("cab")
    second = torch.optim.AdamW(other.parameters())
    with CheckpointManager(tmp_path, {"model": other, "optimizer": second}) as manager:
        manager.resume(strict=False)
    for name in "abc":
        mine, theirs = getattr(other, name).weight, getattr(model, name).weight
        assert_same(second.state[mine], optimizer.state[theirs])


GROUPS = [
    ([[0, 1]], [[0, 1, 2, 3]], ["of 2 ", "of 4 ", "only here", "model/b.weight"]),
    ([[0, 1, 2, 3]], [[0, 1]], ["of 4 ", "of 2 ", "only there", "model/b.weight"]),
    ([[0, 1, 2]], [[0, 1], [2]], ["of 3 ", "of 2 + 1 "]),
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]], ["of 2 + 2 ", "in another group", "model/b.weight"]),
    ([[0, 1]], [[0, 2]], ["only there", "only here", "model/b.weight"]),
]


@pytest.mark.parametrize(("before", "now", "words"), GROUPS)
def test_other_groups_are_refused_and_told_how_they_differ(
    before: list[list[int]], now: list[list[int]], words: list[str], tmp_path: Path
) -> None:
    def grouped(split: list[list[int]]) -> dict[str, Any]:
        model = Registered("abcd")
        tensors = [getattr(model, name).weight for name in "acbd"]
        groups = [{"params": [tensors[i] for i in group]} for group in split]
        return {"model": model, "optimizer": torch.optim.AdamW(groups)}

    with CheckpointManager(tmp_path, grouped(before)) as manager:
        manager.save(step=1, strict=True)
    with (
        CheckpointManager(tmp_path, grouped(now)) as manager,
        pytest.raises(StateMismatch) as error,
    ):
        manager.resume()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("junk", [7, {"o": 7}, {"o": [7]}, {"o": [["x"]]}, {"o": [[1, 2, 3, 4]]}])
def test_senseless_names_in_a_manifest_do_not_matter_or_are_refused(junk: Any) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    live = {"m": model, "o": torch.optim.AdamW(model.parameters())}
    saved = {"m": dict(model.state_dict()), "o": live["o"].state_dict()}
    plan_restore(live, saved, manifest={"parameters": junk}).commit()


# -------------------------------------------------------------------------------------------- PEFT


def small_lm(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config)


def with_lora(seed: int) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], r=2)
    return peft.get_peft_model(small_lm(seed), config)


def with_prompt(seed: int) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(small_lm(seed), config)


@pytest.mark.parametrize("make", [with_lora, with_prompt])
@pytest.mark.parametrize("wrap", [lambda m: m, compiled, nn.DataParallel])
def test_adapters_of_peft_lie_beside_the_plain_names_of_the_model(
    make: Any, wrap: Any, tmp_path: Path
) -> None:
    """The model without PEFT loads its part; the same model goes on under another wrapper."""
    model = make(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.square().mean().backward()
    optimizer.step()
    with CheckpointManager(tmp_path, {"model": wrap(model), "optimizer": optimizer}) as manager:
        manager.save(step=1, strict=True)
    saved = torch.load(tmp_path / "latest.pt", weights_only=True)["model"]
    bare_model = small_lm(5)
    missing = bare_model.load_state_dict(saved, strict=False).missing_keys
    assert missing == []
    assert_same(dict(bare_model.state_dict()), dict(small_lm(0).state_dict()))
    again = make(5)
    second = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.1)
    with CheckpointManager(tmp_path, {"model": again, "optimizer": second}) as manager:
        manager.resume()
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert_same(second.state_dict(), optimizer.state_dict())


def test_a_file_with_the_names_of_peft_is_restored() -> None:
    """As older versions have written them, an optimizer's parameters too."""
    model, saved = with_lora(0), with_lora(3).state_dict()
    plan_restore({"m": model}, {"m": {k: v.clone() for k, v in saved.items()}}).commit()
    assert_same(dict(model.state_dict()), dict(saved))
    raw = [f"m/{name}" for name, _p in model.named_parameters()]
    plain = [
        f"m/{name}" for name in plain_names(model, [n.removeprefix("m/") for n in raw]).values()
    ]
    assert raw != plain
    assert matched(plain, raw) == dict(zip(plain, raw, strict=True))
