"""The commands as a user types them: real processes, exit codes, both languages, signals, pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import load
from holdfast.checkpoint.rundir import shared_memory
from holdfast.training.options.config_files import save_config
from tests import processes
from tests.support import processor_seconds
from tests.training.runs import ROOT, config_for, difference, final_state, write_corpus

# A locale must not decide what the tests read.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("LANGUAGE", "HOLDFAST_LANG")},
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
}


def run(*words: str, lang: str = "en", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return processes.run(*words, "--lang", lang, cwd=cwd, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """A config file of a small run in tmp_path/run."""
    file = tmp_path / "config.json"
    save_config(config_for(tmp_path / "run", corpus, epochs=1, temp_every_steps=5), file)
    return file


def start(config: Path, *words: str) -> subprocess.Popen[str]:
    return processes.start(
        "train", "--config", config, *words, "--lang", "en", environment=ENVIRONMENT
    )


def read_until(process: subprocess.Popen[str], words: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} was not said: {lines} {process.stderr.read()}")  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------- help, version


@pytest.mark.parametrize("words", [(), ("--help",), ("--version",), ("list", "--help")])
def test_help_needs_no_torch(words: tuple[str, ...]) -> None:
    code = (
        "import sys; from holdfast.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(("lang", "word"), [("en", "usage"), ("zh", "用法")])
def test_help_speaks_the_language(lang: str, word: str) -> None:
    assert word in run("--help", lang=lang).stdout
    text = run("train", "--help", lang=lang).stdout
    assert word in text
    for flag in (
        "--preset", "--list-presets", "--data-file", "--epochs", "--batch-size", "--learning-rate",
        "--checkpoint ", "--resume", "--resume-from", "--fresh", "--keep-last-n",
        "--no-save-every-epoch", "--checkpoint-dir", "--config", "--save-config", "--dry-run",
        "--no-log", "--seed", "--model", "--context-length", "--gradient-accumulation",
        "--warmup-ratio", "--schedule", "--precision", "--compile", "--val-fraction",
        "--eval-every", "--patience", "--vocab-size", "--memory-every", "--io-limit",
        "--lang", "--quiet", "--tensorboard", "--price-per-hour", "--debug",
    ):  # fmt: skip
        assert flag in text, flag


def test_the_language_of_the_environment() -> None:
    for value, word in [("zh_CN.UTF-8", "用法"), ("de_DE.UTF-8", "usage"), ("", "usage")]:
        environment = {**ENVIRONMENT, "LC_ALL": value}
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", "--help"], capture_output=True, text=True,
            env=environment, cwd=ROOT, check=False, encoding="utf-8",
        )  # fmt: skip
        assert word in done.stdout


def test_an_unknown_command_is_helped() -> None:
    done = run("trian")
    assert done.returncode == 2
    assert "did you mean train" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_without_the_extra_training_says_what_to_install(tmp_path: Path, package: str) -> None:
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from holdfast.cli.main import main\n"
        "sys.exit(main(['train', '--preset', 'quick', '--checkpoint-dir', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, package, tmp_path / "run"], capture_output=True, text=True,
        env={**ENVIRONMENT, "HOLDFAST_CACHE": str(tmp_path / "cache")}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "holdfast-train[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_presets_are_listed_and_a_config_is_saved(tmp_path: Path) -> None:
    for name in ("quick", "standard", "extended", "precision"):
        assert name in run("train", "--list-presets").stdout
    file = tmp_path / "mine.json"
    done = run("train", "--preset", "standard", "--epochs", "7", "--save-config", str(file))
    assert done.returncode == 0
    assert '"epochs": 7' in file.read_text()


def test_scripts_get_json_of_a_dry_run_and_of_the_presets(config: Path) -> None:
    done = run("train", "--config", str(config), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] > 0 and found["configuration"]["epochs"] == {"value": 1, "from": "file"}
    presets = json.loads(run("train", "--list-presets", "--json").stdout)["presets"]
    assert [preset["name"] for preset in presets] == ["quick", "standard", "extended", "precision"]
    assert presets[0]["configuration"]["batch_size"] == 2


# -------------------------------------------------------------------------------------- bad input


def bad_empty(path: Path) -> None:
    path.write_bytes(b"")


def bad_short(path: Path) -> None:
    path.write_text("只有十个字的文本啊。")


def bad_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def bad_missing(path: Path) -> None:
    pass


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("make", [bad_empty, bad_short, bad_binary, bad_missing])
def test_bad_data_is_one_line_and_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], None], lang: str
) -> None:
    make(tmp_path / "data.txt")
    words = ["train", "--data-file", str(tmp_path / "data.txt")]
    done = run(*words, "--checkpoint-dir", str(tmp_path / "run"), lang=lang)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("holdfast: ")
    chinese = re.search(r"[\u4e00-\u9fff]", done.stderr.replace(str(tmp_path), ""))
    assert bool(chinese) == (lang == "zh")
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("train", "--data-file", str(tmp_path / "none.txt"), "--debug",
               "--checkpoint-dir", str(tmp_path / "run"))  # fmt: skip
    assert "Traceback" in done.stderr


def test_bad_options_are_all_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"learning_rte": 1e-4, "batch_size": "4"}')
    done = run("train", "--config", str(file), "--epochs", "-1", "--learning-rate", "abc")
    assert done.returncode == 2
    assert "learning_rate" in done.stderr  # the near one
    for word in ("learning_rte", "batch_size", "--epochs", "abc"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_read_only_directory_is_said(tmp_path: Path, config: Path) -> None:
    """Root may write anywhere, so the directory stands where a file is."""
    (tmp_path / "file").write_text("")
    done = run("train", "--config", str(config), "--checkpoint-dir", str(tmp_path / "file" / "x"))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------- signals and pipes


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(
    tmp_path: Path, config: Path, number: int, status: int
) -> None:
    process = start(config)
    read_until(process, "step 5 is durable")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status
    told = re.search(r"Stopped at step (\d+); step (\d+) is durable", err)
    assert told, (out, err)
    assert told[1] == told[2]
    assert load(tmp_path / "run" / "latest.pt", only="global_step") == int(told[1])
    done = run("train", "--config", str(config))
    assert done.returncode == 0
    assert f"step {told[1]})" in done.stdout
    assert "Finished" in done.stdout


def ignore_hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_sighup_that_nohup_ignores_is_left_alone(config: Path) -> None:
    words = ["train", "--config", config, "--lang", "en"]
    process = processes.start(*words, environment=ENVIRONMENT, first=ignore_hang_up)
    read_until(process, "step 5 is durable")
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Finished" in out


def test_a_closed_pipe_does_not_end_the_training(tmp_path: Path, config: Path) -> None:
    """`holdfast train | head -3`: the reader leaves, the training finishes."""
    process = start(config)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert load(tmp_path / "run" / "latest.pt", only="history")["epochs"] == [1]
    process.stderr.close()  # type: ignore[union-attr]


def test_a_reader_that_leaves_before_anything_is_written_ends_a_command_quietly() -> None:
    process = processes.start("train", "--list-presets", environment=ENVIRONMENT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_second_process_on_the_run_is_refused_and_the_first_goes_on(config: Path) -> None:
    first = start(config)
    read_until(first, "step 5 is durable")
    first.send_signal(signal.SIGSTOP)  # however fast it is, it is still there
    try:
        second = run("train", "--config", str(config))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 5
    assert f"process {first.pid}" in second.stderr
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert "Finished" in out


def test_a_lock_dies_with_its_owner(config: Path) -> None:
    first = start(config)
    read_until(first, "step 5 is durable")
    first.kill()
    first.communicate(timeout=60)
    assert run("train", "--config", str(config)).returncode == 0


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_a_killed_training_goes_on_from_memory_and_ends_as_if_nothing_had_been(
    tmp_path: Path, corpus: Path
) -> None:
    """kill -9 with nothing on the disk yet: at the end the weights are those of a straight run."""
    files = {name: tmp_path / f"{name}.json" for name in ("killed", "straight")}
    for name, file in files.items():
        save_config(config_for(tmp_path / name, corpus, epochs=1, memory_every=1), file)
    process = start(files["killed"])
    head = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (head.exists() and '"step": 8' in head.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not list((tmp_path / "killed").rglob("*.pt"))
    again = run("train", "--config", str(files["killed"]))
    assert again.returncode == 0, again.stderr
    found = re.search(r"Step (\d+) was found in memory", again.stdout)
    assert found is not None, again.stdout
    assert int(found[1]) >= 7
    assert f"step {found[1]})" in again.stdout
    straight = run("train", "--config", str(files["straight"]))
    assert straight.returncode == 0, straight.stderr
    ends = [final_state(tmp_path / name) for name in files]
    assert difference(*ends) is None


# ------------------------------------------------------------------------------ the other doors


def test_the_scripts_of_the_original_guides(tmp_path: Path, config: Path) -> None:
    def script(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
            check=False, timeout=200,
        )  # fmt: skip

    done = script("train_chinese.py", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "训练损失" in done.stdout
    assert "最佳模型: best_model.pt" in done.stdout
    again = script("train_cli.py", "--config", str(config), "--lang", "en")
    assert re.search(r"python\S* train_cli\.py --checkpoint-dir \S+ --resume", again.stdout)
    listed = script("train_manager.py", "list", str(tmp_path / "run"), "--lang", "en")
    assert listed.returncode == 0, listed.stderr
    assert "model_epoch_1.pt" in listed.stdout


def test_quiet_and_no_log(tmp_path: Path, config: Path) -> None:
    done = run("train", "--config", str(config), "--quiet", "--no-log")
    assert done.returncode == 0
    assert "Device" not in done.stdout
    assert "model_epoch_1.pt" in done.stdout
    assert not (tmp_path / "run" / "logs").exists()


def test_the_log_file_is_plain_text(tmp_path: Path, config: Path) -> None:
    done = run("train", "--config", str(config))
    (log,) = (tmp_path / "run" / "logs").glob("training_*.log")
    assert re.fullmatch(r"training_\d{8}_\d{6}\.log", log.name)
    assert log.read_text("utf-8").count("\x1b") == 0
    assert set(log.read_text("utf-8").splitlines()) >= {
        line for line in done.stdout.splitlines() if "best_model.pt" in line
    }


def test_list_answers_fast(tmp_path: Path, config: Path) -> None:
    """Not a benchmark: it catches an import of torch (0.8 s), nothing finer."""
    run("train", "--config", str(config), "--quiet")
    command = [sys.executable, "-m", "holdfast", "list", str(tmp_path / "run")]
    times = [
        processor_seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        for _attempt in range(3)
    ]
    assert min(times) < 0.7
