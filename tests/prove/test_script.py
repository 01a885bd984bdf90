"""`holdfast prove` on scripts that are right, and on scripts with planted bugs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import holdfast.prove.script
from holdfast.errors import ConfigError
from holdfast.prove import Order, ScriptProof, prove_script

SCRIPTS = Path(__file__).parent / "scripts"
BUGS = {  # of plain.py: the words that the answer must have
    "epoch": "an epoch's end",
    "rng": "SIGKILL",
    "half": "float16",
    "sampler": "batch",
    "scheduler": "schedule",
    "torn": "not whole",
    "anew": "it began anew",
    "latest": "power cut",
    "moments": "moments",
    "tokens": "batch",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the scripts, and nothing left behind by a proof."""
    shutil.copytree(SCRIPTS, tmp_path / "work")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def prove(*words: str, **options: Any) -> ScriptProof:
    return prove_script(Order([sys.executable, *words], **options), lambda _step: None)


def told(proof: ScriptProof) -> str:
    moments = [each.name for each in proof.moments[-1:]]
    return " ".join([*moments, str(proof.difference), *proof.also, *proof.advice])


def test_a_right_script_is_found_right_at_every_moment_and_nothing_is_left_behind(
    place: Path,
) -> None:
    before = sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts)
    proof = prove("arrays.py")
    assert proof.equal, told(proof)
    names = " ".join(each.name for each in proof.moments)
    for kind in ("between saves", "in the middle of writing", "SIGTERM", "power cut"):
        assert kind in names
    assert proof.tensors == 3
    assert proof.losses > 100
    assert not proof.left_out
    after = sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts)
    assert after == before


@pytest.mark.parametrize(
    ("bug", "cause", "words"),
    [
        ("rng", "different", "step 13"),
        ("anew", "began anew", "3 saves were complete"),
        ("unsynced", "failed", "power cut"),
        ("unseeded", "not repeatable", "Seed every generator"),
    ],
)
def test_a_planted_bug_is_found_with_its_cause(
    place: Path, bug: str, cause: str, words: str
) -> None:
    proof = prove("arrays.py", bug)
    assert proof.cause == cause
    assert words in told(proof)


def test_without_a_compiler_processes_are_really_killed_and_what_is_left_out_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfast.prove.script, "compile_shim", lambda _library: False)
    proof = prove("arrays.py")
    assert proof.equal, told(proof)
    assert len(proof.moments) >= 5
    assert "C compiler" in proof.left_out[0]
    assert prove("arrays.py", "rng").cause == "different"


def test_the_command_line_tells_equality_and_the_first_difference_with_its_exit_status(
    place: Path,
) -> None:
    command = [sys.executable, "-m", "holdfast", "doctor", "--prove-resume", "--json", "--time"]
    done = subprocess.run(
        [*command, "300", "--", sys.executable, "plain.py", "rng"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    answer = json.loads(done.stdout)
    assert answer["equal"] is False
    assert answer["cause"] == "different"
    assert "model." in " ".join(answer["also"])


def test_ctrl_c_ends_the_training_and_leaves_nothing(place: Path) -> None:
    (place / "work" / "slow.py").write_text(
        "import time\nprint('here', flush=True)\ntime.sleep(99)"
    )
    words = [sys.executable, "-m", "holdfast", "prove", "--", sys.executable, "slow.py"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        child.stderr.readline()  # the first run begins
        deadline = time.monotonic() + 20
        while not list((place / "tmp").glob(".holdfast-prove-*/run/work/slow.py")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    assert not list((place / "tmp").iterdir())
    time.sleep(0.1)
    own = Path("/proc") / str(os.getpid()) / "cwd"
    links = [link for link in Path("/proc").glob("[0-9]*/cwd") if place in _target(link).parents]
    assert links == [own]


def _target(link: Path) -> Path:
    try:
        return link.readlink()
    except OSError:  # a process that is gone, or not ours
        return link


def test_an_output_directory_elsewhere_is_replaced_in_the_command_and_never_touched(
    place: Path,
) -> None:
    (place / "work" / "elsewhere.py").write_text(
        (SCRIPTS / "arrays.py").read_text().replace('Path("out")', "Path(sys.argv[2])")
    )
    real = place / "real"
    real.mkdir()
    (real / "step_99.npz").write_bytes(b"precious")
    assert prove("elsewhere.py", "", str(real / "a"), output=real, power=False).equal
    assert [path.name for path in real.iterdir()] == ["step_99.npz"]
    with pytest.raises(ConfigError, match="does not name it"):
        prove("arrays.py", output=real)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise SystemExit('no data here')", "no data here"),
        ("print('nothing')", "can be opened"),
        ("import numpy as np; np.save('a.npy', np.zeros(3))", "nothing to resume from"),
        ("import time; time.sleep(99)", "has not ended"),
    ],
)
def test_a_command_that_proves_nothing_is_refused_in_words(
    place: Path, source: str, words: str
) -> None:
    (place / "work" / "wrong.py").write_text(source)
    with pytest.raises(ConfigError, match=words):
        prove("wrong.py", seconds=5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_of_a_torch_script_is_found(place: Path, bug: str) -> None:
    proof = prove("plain.py", bug)
    assert not proof.equal
    assert BUGS[bug] in told(proof)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["plain.py", "ours.py", "distributed.py"])
def test_right_scripts_are_found_right(place: Path, script: str) -> None:
    proof = prove(script, seconds=800)
    assert proof.equal, told(proof)
    assert len(proof.moments) >= 8
