"""The four presets: the figures of the issue, one source for clone and package, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import ConfigError
from holdfast.table import PIPE
from holdfast.training.options.presets import (
    PRESET_DIR,
    PRESETS,
    load_preset,
    preset_file,
    presets_table,
    resolve,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "learning_rate", "model"),
    [
        ("quick", 2, 1, None, "tiny"),
        ("standard", 4, 3, 1e-4, "gpt2-small"),
        ("extended", 8, 10, 5e-5, "gpt2-small"),
        ("precision", 16, 20, 1e-5, "gpt2-small"),
    ],
)
def test_each_preset_has_the_figures_of_the_table(
    name: str, batch: int, epochs: int, learning_rate: float | None, model: str
) -> None:
    config = resolve(preset=name)
    assert (config.training.batch_size, config.training.epochs) == (batch, epochs)
    assert config.model.model == model
    if learning_rate is not None:  # that of "quick" is chosen so that the sample visibly learns
        assert config.training.learning_rate == learning_rate
    assert {config.sources[key] for key in ("model", "batch_size", "epochs", "learning_rate")} == {
        "preset"
    }


def test_the_files_in_config_and_in_the_package_are_the_same() -> None:
    names = sorted(f"training_{name}.json" for name in PRESETS)
    assert sorted(path.name for path in (ROOT / "config").glob("*.json")) == names
    assert sorted(path.name for path in PRESET_DIR.glob("*.json")) == names
    for name in names:
        assert (ROOT / "config" / name).read_bytes() == (PRESET_DIR / name).read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_an_ordinary_config_file(name: str) -> None:
    as_file = resolve(file=ROOT / "config" / f"training_{name}.json")
    assert as_file == resolve(preset=name)
    assert load_preset(name)["epochs"] == as_file.training.epochs


def test_an_unknown_preset_is_refused_with_the_near_one_and_with_all_other_problems() -> None:
    with pytest.raises(ConfigError, match=r"--preset standart: .*; did you mean standard\?"):
        preset_file("standart")
    with pytest.raises(ConfigError) as caught:
        resolve(preset="", flags={"epochs": 0}, problems=["first"])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["first", "--epochs 0", "--preset ''"]
    with pytest.raises(ConfigError):
        preset_file("../training_quick")


def test_the_table_has_a_row_for_each_preset_with_its_values() -> None:
    lines = presets_table(PIPE)
    assert [" ".join(cell.split()) for cell in lines[0].split("  ") if cell] == [
        "preset",
        "batch",
        "epochs",
        "learning rate",
        "default model",
        "for",
    ]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == list(PRESETS)
    assert rows["extended"].split()[1:5] == ["8", "10", "5e-5", "gpt2-small"]
    assert "long training" in rows["extended"]
