"""The dataclasses are the one definition: what they accept, how layers win, what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError
from holdfast.training.options.config import BY_NAME, OPTIONS, SECTIONS, Config, suggest
from holdfast.training.options.config_files import from_mapping, read_config_file, save_config
from holdfast.training.options.fields import Option, format_value
from holdfast.training.options.presets import resolve

# The two forms that the issue shows, character by character.
FLAT = """{"batch_size": 4, "epochs": 3, "learning_rate": 1e-4, "save_every_epoch": true,
 "keep_last_n": 3}"""
SECTIONED = """{"model": {}, "training": {"batch_size": 4, "num_steps": 1000,
 "checkpoint_dir": "./checkpoints", "save_every": 100, "resume_from": null}}"""


def problems_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_mapping(data)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ------------------------------------------------------------------ the definition itself


def test_every_default_is_a_value_that_its_own_option_accepts() -> None:
    for option in OPTIONS.values():
        assert option.accepts(option.default), option.name


def test_no_name_alias_or_hint_is_claimed_by_two_options() -> None:
    assert len(BY_NAME) == sum(len(option.names) for option in OPTIONS.values())
    near = [word for option in OPTIONS.values() for word in option.meta.near]
    assert len(near) == len(set(near))
    assert not set(near) & set(BY_NAME)
    shorts = [option.meta.short for option in OPTIONS.values() if option.meta.short]
    assert len(shorts) == len(set(shorts))


def test_every_option_explains_itself_in_one_line() -> None:
    for option in OPTIONS.values():
        assert 10 < len(option.meta.help) < 100, option.name
        assert "\n" not in option.meta.help


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(AttributeError):
        Config().training.batch_size = 8  # type: ignore[misc]


def test_the_defaults_alone_are_a_valid_configuration() -> None:
    assert Config() == resolve() == from_mapping({})
    assert set(resolve().sources.values()) == {"default"}


# ------------------------------------------------------------------ forms of a config file


def test_the_flat_form_of_the_issue_is_read(tmp_path: Path) -> None:
    config = resolve(file=written(tmp_path / "flat.json", FLAT))
    assert (config.training.batch_size, config.training.epochs) == (4, 3)
    assert config.training.learning_rate == 1e-4
    assert config.checkpoint.save_every_epoch is True
    assert config.checkpoint.keep_last_n == 3


def test_the_sectioned_form_of_the_issue_is_read_and_counts_in_steps(tmp_path: Path) -> None:
    config = resolve(file=written(tmp_path / "sectioned.json", SECTIONED))
    assert (config.training.num_steps, config.training.epochs) == (1000, None)
    assert config.checkpoint.checkpoint_dir == "./checkpoints"
    assert (config.checkpoint.save_every, config.checkpoint.resume) == (100, None)


@pytest.mark.parametrize(
    "data",
    [
        {"model": "mini", "context_length": 128},
        {"model": {"model": "mini", "context_length": 128}},
        {"model": {"name": "mini", "context_length": 128}},
        {"model": {"name": "mini"}, "training": {"context_length": 128}},
        {"model": "mini", "data": {"context_length": 128}},
    ],
)
def test_a_known_key_may_stand_flat_or_under_any_section(data: dict[str, Any]) -> None:
    model = from_mapping(data).model
    assert (model.model, model.context_length) == ("mini", 128)


def test_a_key_given_twice_is_refused_wherever_the_two_stand(tmp_path: Path) -> None:
    assert problems_of({"epochs": 1, "training": {"epochs": 2}}) == [
        "epochs and training.epochs say the same; keep one"
    ]
    assert problems_of({"resume": "auto", "resume_from": "auto"}) == [
        "resume and resume_from say the same; keep one"
    ]
    with pytest.raises(ConfigError, match='"epochs" stands there twice'):
        resolve(file=written(tmp_path / "twice.json", '{"epochs": 1, "epochs": 2}'))


def test_checkpoint_is_a_file_flat_and_a_section_when_it_is_an_object() -> None:
    assert from_mapping({"checkpoint": "a.pt"}).checkpoint.checkpoint == "a.pt"
    assert from_mapping({"checkpoint": {"keep_last_n": 1}}).checkpoint.keep_last_n == 1


def test_a_whole_number_is_fine_where_a_number_is_wanted_and_becomes_one() -> None:
    value = from_mapping({"grad_clip": 1}).training.grad_clip
    assert (value, type(value)) == (1.0, float)


# ------------------------------------------------------------------ what is refused, and how


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"bacth_size": 4}, 'unknown key "bacth_size"; did you mean "batch_size"?'),
        ({"training": {"lr": 1}}, 'unknown key "training.lr"; did you mean "learning_rate"?'),
        ({"learning-rate": 1}, 'unknown key "learning-rate"; did you mean "learning_rate"?'),
        ({"trainning": {}}, 'unknown key "trainning"; did you mean "training"?'),
        ({"zzz": 4}, 'unknown key "zzz"'),
        (
            {"data": "a.txt"},
            '"data" is a section and takes {"name": value, ...}; did you mean "data_file"?',
        ),
        (
            {"training": {"batch_size": -1}},
            "training.batch_size -1: expected a whole number, at least 1 and at most 1000000",
        ),
        (
            {"batch_size": "4"},
            'batch_size "4": expected a whole number, at least 1 and at most 1000000; '
            "write it without quotes: 4",
        ),
        (
            {"batch_size": 4.0},
            "batch_size 4.0: expected a whole number, at least 1 and at most 1000000; write 4",
        ),
        (
            {"batch_size": True},
            "batch_size true: expected a whole number, at least 1 and at most 1000000",
        ),
        (
            {"batch_size": None},
            "batch_size null: expected a whole number, at least 1 and at most 1000000",
        ),
        (
            {"learning_rate": "1e-4"},
            'learning_rate "1e-4": expected a number, more than 0 and at most 1; '
            "write it without quotes: 1e-4",
        ),
        (
            {"learning_rate": 0},
            "learning_rate 0: expected a number, more than 0 and at most 1",
        ),
        ({"compile": 1}, "compile 1: expected true or false"),
        (
            {"compile": "true"},
            'compile "true": expected true or false; write it without quotes: true',
        ),
        (
            {"precision": "fp16"},
            'precision "fp16": expected one of auto, fp32, bf16; did you mean bf16?',
        ),
        ({"patience": 0}, "patience 0: expected a whole number, at least 1, or null"),
        ({"data_file": "  "}, 'data_file "  ": expected text that is not empty'),
        ({"data_file": ["a", "b"]}, 'data_file ["a", "b"]: expected text that is not empty'),
        ({"resume": True}, 'resume true: expected text (a path or "auto")'),
        ({"log_every": 2**70}, "log_every 1180591620717411303424: expected a whole number, "
         "at least 1; this one is too large"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(
    data: dict[str, Any], line: str
) -> None:
    assert problems_of(data) == [line]


def test_all_problems_are_reported_at_once() -> None:
    data = {"epochs": 0, "training": {"seed": -1, "foo": 1}, "schedule": "cosin", "fresh": 1}
    lines = problems_of(data)
    assert [line.split()[0] for line in lines] == [
        "epochs",
        "training.seed",
        "unknown",
        "schedule",
        "fresh",
    ]


def test_text_may_be_empty_only_where_that_means_something() -> None:
    assert from_mapping({"sample_prompt": ""}).training.sample_prompt == ""
    assert problems_of({"sample_prompt": 1}) == ["sample_prompt 1: expected text"]
    assert problems_of({"data_file": "a\0b"})


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, word: str) -> None:
    path = written(tmp_path / "c.json", f'{{"learning_rate": {word}}}')
    with pytest.raises(ConfigError, match=f"{word} is not a number"):
        resolve(file=path)
    for flag in ("nan", "inf", "1e999"):
        with pytest.raises(ConfigError, match="expected a number"):
            resolve(flags={"grad_clip": flag})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"epochs": 3,\n "seed" 4}', r"line 2, column 9: this is not JSON: Expecting ':'"),
        ("", "line 1, column 1: this is not JSON"),
        ('{"epochs": 3} x', "line 1, column 15: this is not JSON: Extra data"),
        ("[1]", "expected an object such as"),
        ('{"data_file": "中文"}'.encode("gb18030"), "is not UTF-8 text"),
        (b"\0" * 100, "this is not JSON"),
        ("[" * 100_000, "no config file looks like this"),
        ('{"seed": ' + "9" * 5000 + "}", "c.json"),
        (b" " * (2 << 20), "too large to be a config file"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_name_and_place(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    path = written(tmp_path / "c.json", content)
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(file=path)
    assert "c.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", b"\xef\xbb\xbf" + FLAT.encode())
    assert resolve(file=path).training.batch_size == 4


def test_a_missing_file_is_named_with_the_near_one(tmp_path: Path) -> None:
    written(tmp_path / "my_run.json", "{}")
    with pytest.raises(ConfigError, match=r"there is no config file .*; did you mean .*my_run"):
        resolve(file=tmp_path / "my_rum.json")
    with pytest.raises(ConfigError, match="is a folder"):
        resolve(file=tmp_path)
    with pytest.raises(ConfigError, match="there is no config file"):
        resolve(file=tmp_path / "no" / "such.json")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_said_to_be_so(tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", "{}")
    path.chmod(0)
    with pytest.raises(ConfigError, match="may not be read"):
        resolve(file=path)


# ------------------------------------------------------------------ which layer wins


def test_flag_wins_over_file_over_preset_over_default(tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", '{"epochs": 7, "learning_rate": 2e-4}')
    config = resolve("standard", path, {"epochs": 9})
    training, sources = config.training, config.sources
    assert (training.epochs, sources["epochs"]) == (9, "flag")
    assert (training.learning_rate, sources["learning_rate"]) == (2e-4, "file")
    assert (config.model.model, sources["model"]) == ("gpt2-small", "preset")
    assert (training.seed, sources["seed"]) == (42, "default")
    assert set(sources) == set(OPTIONS)


def test_null_in_a_file_is_a_value_and_undoes_the_preset(tmp_path: Path) -> None:
    assert resolve("quick").checkpoint.temp_every_steps == 100
    path = written(tmp_path / "c.json", '{"temp_every_steps": null}')
    assert resolve("quick", path).checkpoint.temp_every_steps is None
    assert resolve("quick", None, {"temp_every_steps": "none"}).checkpoint.temp_every_steps is None


def test_flags_are_texts_or_typed_values_and_paths_are_texts() -> None:
    config = resolve(flags={"batch_size": "8", "seed": 1, "data_file": Path("a/b.txt")})
    assert (config.training.batch_size, config.training.seed) == (8, 1)
    assert config.data.data_file == str(Path("a/b.txt"))


def test_steps_take_the_place_of_epochs_from_a_weaker_layer_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    by_steps = resolve("standard", None, {"num_steps": 10})
    assert (by_steps.training.num_steps, by_steps.training.epochs) == (10, None)
    assert by_steps.sources["epochs"] == "flag"
    path = written(tmp_path / "c.json", '{"num_steps": 1000}')
    by_epochs = resolve("quick", path, {"epochs": 2})
    assert (by_epochs.training.num_steps, by_epochs.training.epochs) == (None, 2)
    fresh = resolve(None, written(path, '{"resume_from": "auto"}'), {"fresh": True})
    assert (fresh.checkpoint.fresh, fresh.checkpoint.resume) == (True, None)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"epochs": 2, "num_steps": 5}, "--num-steps and --epochs exclude each other"),
        ({"fresh": True, "resume_from": "auto"}, "--fresh and --resume-from exclude each other"),
        ({"fresh": True, "checkpoint": "a.pt"}, "--fresh and --checkpoint exclude each other"),
        ({"resume": "a.pt", "checkpoint": "b.pt"}, "--resume and --checkpoint exclude each other"),
        ({"patience": 3, "val_fraction": 0}, "--patience needs an evaluation"),
        ({"eval_every": 3, "val_fraction": 0}, "--eval-every needs an evaluation"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(flags=flags)
    assert str(caught.value).startswith(line)


def test_options_that_only_look_contradictory_are_fine() -> None:
    assert resolve(flags={"resume": "auto", "checkpoint": "a.pt"}).checkpoint.checkpoint == "a.pt"
    assert from_mapping({"epochs": 2, "num_steps": None}).training.epochs == 2
    assert from_mapping({"fresh": False, "resume_from": "auto"}).checkpoint.resume == "auto"


# ------------------------------------------------------------------ saving


def values_of(option: Option) -> st.SearchStrategy[Any]:
    meta = option.meta
    low, high = meta.ge if meta.ge is not None else meta.gt, meta.le or meta.lt
    some: st.SearchStrategy[Any]
    if meta.count_or is not None:
        some = st.integers(0, 2**40).map(str) | st.just(meta.count_or)
    elif option.choices:
        some = st.sampled_from(option.choices)
    elif option.kind is bool:
        some = st.booleans()
    elif option.kind is int:
        some = st.integers(int(low or 0), int(high or 2**40))
    elif option.kind is float:
        some = st.floats(
            low, high, exclude_min=meta.gt is not None, exclude_max=meta.lt is not None
        )
        some = some.filter(option.accepts)
    else:
        some = st.text(min_size=1).filter(option.accepts)
    return st.none() | some if option.optional else some


def all_values() -> st.SearchStrategy[dict[str, Any]]:
    kept = {n: values_of(o) for n, o in OPTIONS.items() if not o.meta.of_this_start}
    return st.fixed_dictionaries({}, optional=kept)


@settings(deadline=None, max_examples=60)  # each example waits for a real fsync
@given(all_values())
def test_what_is_saved_reads_back_as_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    try:
        config = from_mapping(values)
    except ConfigError as error:
        assert "exclude each other" in str(error) or "needs an evaluation" in str(error)
        return
    assert from_mapping(config.to_dict()) == config
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    save_config(config, path)
    assert resolve("precision", path) == config


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*BY_NAME, *SECTIONS, "x"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*BY_NAME, "x"]), inner),
    max_leaves=4)))  # fmt: skip
def test_no_json_at_all_brings_anything_but_a_config_or_a_config_error(
    data: dict[str, Any],
) -> None:
    try:
        config = from_mapping(data)
    except ConfigError as error:
        assert all(line.strip() for line in str(error).splitlines())
    else:
        assert all(o.accepts(config.to_dict()[o.section][n]) for n, o in OPTIONS.items())


def test_the_saved_file_is_sectioned_readable_and_for_others_to_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.json"
    old_umask = os.umask(0o022)
    try:
        save_config(resolve("quick"), path)
    finally:
        os.umask(old_umask)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data) == list(SECTIONS)
    assert data["training"]["sample_prompt"] == "今天"
    assert "今天" in path.read_text(encoding="utf-8")
    assert path.read_bytes().endswith(b"}\n")
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_what_belongs_to_one_start_is_not_saved_into_the_recipe(tmp_path: Path) -> None:
    save_config(resolve(flags={"fresh": True, "epochs": 2}), tmp_path / "c.json")
    again = resolve(file=tmp_path / "c.json")
    assert again.checkpoint.fresh is False
    assert again.training.epochs == 2


def test_a_file_name_that_is_not_utf8_survives_saving(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.txt") if os.name != "nt" else "\udcff.txt"
    save_config(resolve(flags={"data_file": name}), tmp_path / "c.json")
    assert resolve(file=tmp_path / "c.json").data.data_file == name


def test_saving_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    real = written(tmp_path / "real.json", "{}")
    link = tmp_path / "link.json"
    link.symlink_to(real.name)
    save_config(resolve("quick"), link)
    assert link.is_symlink()
    assert read_config_file(real)["training"]["epochs"] == 1


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = written(tmp_path / "file", "kept")
    with pytest.raises(ConfigError, match="cannot be written to"):
        save_config(Config(), blocked / "c.json")
    with pytest.raises(ConfigError, match="cannot be written to"):
        save_config(Config(), tmp_path)
    assert list(tmp_path.iterdir()) == [blocked]
    assert blocked.read_text() == "kept"


# ------------------------------------------------------------------ small things


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "1e-4"), (5e-05, "5e-5"), (3e-4, "3e-4"), (1e-3, "1e-3"), (0.05, "0.05"),
        (10.0, "10"), (0.0, "0"), (1.5e-7, "1.5e-7"), (1e9, "1e9"), (True, "true"), (None, "–"),
        (8192, "8192"), ("tiny", "tiny"),
    ],
)  # fmt: skip
def test_values_are_shown_as_people_write_them(value: object, text: str) -> None:
    assert format_value(value) == text


def test_suggestions_know_what_other_tools_call_it() -> None:
    assert suggest("lr") == "learning_rate"
    assert suggest("max_steps") == "num_steps"
    assert suggest("qqqq") is None


def test_configuring_imports_neither_torch_nor_its_friends() -> None:
    code = (
        "import sys; from holdfast.cli.options import parse_train; parse_train(['--preset=quick']);"
        "print([m for m in ('torch', 'numpy', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
