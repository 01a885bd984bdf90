"""The command line of `train`: every flag of the issue, all problems at once, help that fits."""

from __future__ import annotations

import argparse
import inspect
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from rich.cells import cell_len

from holdfast import i18n
from holdfast.cli.options import TrainCommand, build_train_parser, parse_train
from holdfast.cli.parsing import ARGPARSE_WORDS, Parser, language_of
from holdfast.errors import ConfigError
from holdfast.formatting import wrap_cells
from holdfast.training.options.config import OPTIONS
from tests.support import processor_seconds

# As spelled in "The commands" of the issue, with a value where one belongs.
FLAGS_OF_THE_ISSUE = """--preset quick|--list-presets|--data-file a.txt|--epochs 2|--batch-size 2
--learning-rate 1e-4|--checkpoint a.pt|--resume|--resume a.pt|--resume ck/*.pt|--resume-from a.pt
--resume-from|--fresh|--keep-last-n 0|--no-save-every-epoch|--checkpoint-dir ck|--save-config o.json
--dry-run|--no-log|--seed 7|--model mini|--context-length 128|--gradient-accumulation 3
--warmup-ratio 0.1|--schedule linear|--precision bf16|--compile|--val-fraction 0.1|--eval-every 50
--patience 3|--vocab-size 4096|--lang zh|--quiet|--num-steps 10|--tensorboard|--price-per-hour 2.5
--threads 2|--yes|--debug""".replace("\n", "|").split("|")


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LANGUAGE", "en")
    i18n.set_language("en")
    yield
    i18n.set_language("en")


def lines_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_train(argv)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# ------------------------------------------------------------------ what is understood


@pytest.mark.parametrize("flag", FLAGS_OF_THE_ISSUE)
def test_every_flag_of_the_issue_exists_with_that_spelling(flag: str) -> None:
    assert isinstance(parse_train(flag.split(" ")), TrainCommand)


def test_every_option_of_the_configuration_has_its_flag() -> None:
    text = build_train_parser().format_help()
    for option in OPTIONS.values():
        assert option.flag in text


def test_no_arguments_at_all_are_a_command_with_all_defaults() -> None:
    command = parse_train([])
    assert set(command.config.sources.values()) == {"default"}
    assert (command.preset, command.config_file, command.lang) == (None, None, None)
    assert not any((command.list_presets, command.dry_run, command.no_log, command.quiet))


def test_values_reach_the_configuration_typed_and_marked_as_flags(tmp_path: Path) -> None:
    command = parse_train(
        ["--preset", "standard", "-e", "5", "--learning-rate=2e-5", "--no-save-every-epoch",
         "--keep-last-n", "0", "--save-config", str(tmp_path / "o.json"), "-q"]
    )  # fmt: skip
    training, checkpoint = command.config.training, command.config.checkpoint
    assert (training.epochs, training.learning_rate, training.batch_size) == (5, 2e-5, 4)
    assert (checkpoint.save_every_epoch, checkpoint.keep_last_n) == (False, 0)
    assert command.config.sources["save_every_epoch"] == "flag"
    assert command.config.sources["batch_size"] == "preset"
    assert command.save_config == tmp_path / "o.json"
    assert command.quiet
    assert command.preset == "standard"


@pytest.mark.parametrize(
    ("argv", "resume"),
    [
        ([], None),
        (["--resume"], "auto"),
        (["--resume-from"], "auto"),
        (["--resume", "--quiet"], "auto"),
        (["--resume", "a.pt"], "a.pt"),
        (["--resume=ck/*.pt"], "ck/*.pt"),
        (["--resume-from", "dir"], "dir"),
        (["--resume", "a", "--resume-from", "b"], "b"),
        (["--resume-from", "a", "--resume", "b"], "b"),
    ],
)
def test_resume_takes_a_value_or_none_under_both_names(argv: list[str], resume: str | None) -> None:
    assert parse_train(argv).config.checkpoint.resume == resume


def test_a_switch_can_be_turned_both_ways_over_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"compile": true, "save_every_epoch": false}')
    argv = ["--config", str(path), "--no-compile", "--save-every-epoch"]
    config = parse_train(argv).config
    assert (config.model.compile, config.checkpoint.save_every_epoch) == (False, True)
    assert parse_train(["--compile", "--no-compile"]).config.model.compile is False
    assert parse_train(argv).config_file == path


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--learning-rate", "abc"],
            "--learning-rate abc: expected a number, more than 0 and at most 1",
        ),
        (
            ["--batch-size", "-1"],
            "--batch-size -1: expected a whole number, at least 1 and at most 1000000",
        ),
        (
            ["--learning-rate", "-1e-4"],
            "--learning-rate -1e-4: expected a number, more than 0 and at most 1",
        ),
        (["--keep-last-n", "-.5"], "--keep-last-n -.5: expected a whole number, at least 0"),
        (["--model", ""], "--model '': expected text that is not empty"),
        (
            ["--schedule", "cosin"],
            "--schedule cosin: expected one of cosine, linear, constant; did you mean cosine?",
        ),
        (["--bacth-size", "4"], "unknown option --bacth-size; did you mean --batch-size?"),
        (["--batch_size=4"], "unknown option --batch_size; did you mean --batch-size?"),
        (["—epochs", "3"], "unknown option —epochs; did you mean --epochs?"),
        (["--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (
            ["--json"],
            "--json goes with --dry-run or --list-presets; what a training says for scripts is in "
            "its metrics.jsonl",
        ),
        (
            ["--no-save-every-epochs"],
            "unknown option --no-save-every-epochs; did you mean --no-save-every-epoch?",
        ),
        (["--lr", "1"], "unknown option --lr; did you mean --learning-rate?"),
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--zzz"], "unknown option --zzz"),
        (["a.txt"], '"a.txt" belongs to no option; a text is named with --data-file'),
        (["--lang", "fr"], "--lang fr: expected one of en, zh"),
        (
            ["--batch-size"],
            "argument -b/--batch-size: expected one argument; see holdfast train --help",
        ),
        (
            ["--fresh=yes"],
            "argument --fresh/--no-fresh: ignored explicit argument 'yes'; "
            "see holdfast train --help",
        ),
        (
            ["--fresh", "--resume-from"],
            "--fresh and --resume-from exclude each other; give only one of them",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(argv: list[str], line: str) -> None:
    assert lines_of(*argv) == [line]


def test_problems_of_flags_file_and_preset_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"training": {"epohcs": 1, "seed": "1"}}')
    lines = lines_of(
        "--bacth-size", "2", "--epochs", "x", "--config", str(path), "--preset", "quik"
    )  # fmt: skip
    assert lines == [
        "unknown option --bacth-size; did you mean --batch-size?",
        "--epochs x: expected a whole number, at least 1 and at most 1000000",
        f'{path}: unknown key "training.epohcs"; did you mean "epochs"?',
        f'{path}: training.seed "1": expected a whole number, at least 0 and at most 4294967295; '
        "write it without quotes: 1",
        "--preset quik: expected one of quick, standard, extended, precision; did you mean quick?",
    ]


def test_a_long_or_strange_value_stays_on_one_line() -> None:
    (line,) = lines_of("--epochs", "a\nb\x1b[31m" + "x" * 500)
    assert "\x1b" not in line
    assert len(line) < 200


# ------------------------------------------------------------------ help and language


def test_help_is_grouped_ends_with_an_example_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_train(["--help"], "python train_cli.py")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n{title}:\n") for title in
                 ("Command", "Model", "Data", "Training", "Checkpoints and resuming")]  # fmt: skip
    assert positions == sorted(positions)
    assert text.startswith("usage: python train_cli.py [options]\n")
    assert "  python train_cli.py --preset quick\n" in text[positions[-1] :]
    assert "(default: 3e-4)" in text


def test_help_answers_in_under_three_tenths_of_a_second_without_torch() -> None:
    code = (
        "import sys; from holdfast.cli.options import build_train_parser as b;"
        "b().format_help(); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    took = [processor_seconds(lambda: subprocess.run(command, check=True)) for _attempt in range(3)]
    assert min(took) < 0.3


@pytest.mark.parametrize(
    ("argv", "lang"),
    [
        (["--lang", "zh"], "zh"),
        (["--quiet", "--lang=en"], "en"),
        (["--lang", "en", "--lang", "zh"], "zh"),
        (["--lang"], None),
        (["--lang", "fr"], None),
        (["zh"], None),
    ],
)
def test_the_language_is_found_before_the_parser_exists(argv: list[str], lang: str | None) -> None:
    assert language_of(argv) == lang


CHINESE = {
    "usage: ": "用法：",
    "Model": "模型",
    "expected one argument": "需要一个值",
    "argument %(argument_name)s: %(message)s": "选项 %(argument_name)s：%(message)s",
    "{problem}; see {prog} --help": "{problem}；请看 {prog} --help",
    "{name} {value}: expected {allowed}{hint}": "{name} {value}：应为{allowed}{hint}",
    "a whole number": "整数",
    OPTIONS["data_file"].meta.help: "用来学习的文本文件，百分之百（100%）由你决定：" + "很长" * 60,
}


@pytest.fixture
def chinese_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    catalogue = Catalog(locale="zh")
    for english_text, chinese_text in CHINESE.items():
        catalogue.add(english_text, chinese_text)
    target = tmp_path / "zh" / "LC_MESSAGES" / f"{i18n.DOMAIN}.mo"
    target.parent.mkdir(parents=True)
    buffer = io.BytesIO()
    write_mo(buffer, catalogue)
    target.write_bytes(buffer.getvalue())
    with monkeypatch.context() as patch:
        patch.setattr(i18n, "LOCALE_DIR", tmp_path)
        yield
    i18n.set_language("en")


@pytest.mark.usefixtures("chinese_catalogue")
def test_help_and_errors_speak_chinese_argparse_included(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_train(["--lang", "zh", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("用法：holdfast train")
    assert "\n模型:\n" in text
    assert "（100%）由你决定" in text
    assert max(map(cell_len, text.split("Examples")[0].splitlines())) <= 80
    assert lines_of("--lang", "zh", "--batch-size") == [
        "选项 -b/--batch-size：需要一个值；请看 holdfast train --help"
    ]
    assert lines_of("--lang=zh", "--epochs", "x")[0].startswith("--epochs x：应为整数")


def test_the_words_marked_for_the_catalogue_are_argparse_s_own() -> None:
    source = inspect.getsource(argparse)
    for word in ARGPARSE_WORDS:
        assert word in source, word


@pytest.mark.parametrize("width", [10, 24, 50])
def test_wrapping_counts_cells_and_loses_nothing(width: int) -> None:
    text = "训练 a language model，从一个文本文件开始。检查点：一步都不丢！（see docs）"
    lines = wrap_cells(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(cell_len(line) <= width for line in lines)
    assert not any(line[0] in "，。：！）" for line in lines)


def test_other_commands_get_the_same_manners_from_the_parser() -> None:
    parser = Parser(prog="holdfast clean")
    parser.add_argument("--keep", type=int, required=True)
    assert parser.parse_args(["--keep", "3"]).keep == 3
    for argv in ([], ["--kee", "3"], ["--keep", "x"]):
        with pytest.raises(ConfigError, match="see holdfast clean --help"):
            parser.parse_args(argv)
    assert os.environ["LANGUAGE"] == "en"


@pytest.mark.parametrize(("busy", "given", "policy"), [
    (95.0, {}, "PASSIVE"), (3.0, {}, None), (95.0, {"GOMP_SPINCOUNT": "7"}, None),
    (95.0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
])  # fmt: skip
def test_threads_sleep_while_they_wait_only_where_others_are_at_work(
    busy: float, given: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    from holdfast.cli.common import before_torch

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _interval: busy)
    before_torch()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
