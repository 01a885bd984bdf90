"""What is started again and what is not; real processes, signals and a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigError, GaveUp, RunLocked
from holdfast.manage.supervising.supervisor import (
    ASKED,
    FINAL,
    HEALTHY,
    LONGEST_BACKOFF,
    Decision,
    End,
    Limits,
    Restarts,
    Supervisor,
    await_free,
    durable,
    ending,
    shell_status,
)
from tests.support import identity, write_state

PROGRAM = [sys.executable, "-c", "import sys; from holdfast.cli.main import main; sys.exit(main())"]
CRASH = -int(signal.SIGKILL)


def crashed(step: int | None = None, lived: float = 1.0) -> End:
    return End(CRASH, lived, step)


def ends_after(restarts: Restarts, ends: Sequence[End]) -> Decision:
    for end in ends[:-1]:
        assert restarts.after(end).delay is not None, end
    return restarts.after(ends[-1])


# ---------------------------------------------------------------------------------- the decision


@given(
    st.integers(1, 5), st.lists(st.integers(0, 12), min_size=70, max_size=70), st.integers(0, 12)
)
def test_a_training_of_n_steps_is_not_started_for_ever(
    patience: int, steps: list[int], first: int
) -> None:
    """Whatever durable steps the crashes leave, forwards and backwards."""
    restarts = Restarts(Limits(give_up_after=patience), step=first)
    starts = 0
    for step in steps:
        starts += 1
        if restarts.after(crashed(step)).delay is None:
            break
    assert starts <= patience * 13


@given(st.floats(0, 1e4), st.integers(1, 40), st.floats(0, 1, exclude_max=True))
def test_the_pause_doubles_and_stays_between_its_limits(
    backoff: float, crashes: int, chance: float
) -> None:
    restarts = Restarts(Limits(give_up_after=100, backoff=backoff), chance=lambda: chance)
    for number in range(crashes):
        delay = restarts.after(crashed(0)).delay
        whole = min(backoff * 2**number, LONGEST_BACKOFF)
        assert delay is not None
        assert whole / 2 <= delay <= whole


def test_progress_sets_the_pause_back() -> None:
    restarts = Restarts(Limits(backoff=10, give_up_after=9), chance=lambda: 1.0)
    delays = [restarts.after(crashed(step)).delay for step in (0, 0, 0, 5, 5, 6)]
    assert delays == [10, 20, 40, 10, 20, 10]


def test_a_crash_that_repeats_at_one_step_is_given_up() -> None:
    decision = ends_after(Restarts(Limits(), step=100), [crashed(100)] * 3)
    assert (decision.gave_up, decision.delay) == (True, None)
    assert "3" in decision.why


def test_crashes_at_other_steps_are_not_given_up() -> None:
    restarts = Restarts(Limits(), step=100)
    assert ends_after(restarts, [crashed(step) for step in range(101, 150)]).delay is not None


def test_steps_that_were_lost_and_made_again_are_no_progress() -> None:
    """A loop of rolling back and training up to the same fault ends."""
    decision = ends_after(Restarts(Limits(), step=500), [crashed(s) for s in (420, 470, 499)])
    assert decision.gave_up


def test_steps_that_are_counted_anew_in_another_epoch_are_progress() -> None:
    ends = [End(CRASH, 1.0, step, epoch) for epoch in (1, 2, 3) for step in (20, 60, 90)]
    assert ends_after(Restarts(Limits(), 0, 1), ends).delay is not None
    assert ends_after(Restarts(Limits(), 90, 3), [End(CRASH, 1.0, 60, 3)] * 3).gave_up
    mixed = [End(CRASH, 1.0, 100, 1), *(End(CRASH, 1.0, step) for step in (120, 140, 160))]
    assert ends_after(Restarts(Limits()), mixed).delay is not None, "some saves name no epoch"


def test_without_a_run_of_ours_the_time_counts() -> None:
    long, short = crashed(lived=HEALTHY), crashed(lived=HEALTHY - 1)
    assert ends_after(Restarts(Limits()), [long] * 20).delay is not None
    assert ends_after(Restarts(Limits()), [short] * 3).gave_up
    # A run of ours that has saved nothing has made no progress, however long it lived.
    assert ends_after(Restarts(Limits()), [crashed(0, HEALTHY * 10)] * 3).gave_up


@pytest.mark.parametrize("status", [0, *sorted(FINAL)])
def test_what_would_end_the_same_way_is_not_started_again(status: int) -> None:
    decision = Restarts(Limits()).after(End(status, 1.0))
    assert (decision.delay, decision.gave_up) == (None, False)


@pytest.mark.parametrize("number", sorted(ASKED))
def test_what_somebody_asked_to_stop_is_not_started_again(number: int) -> None:
    for status in (-number, 128 + number):
        decision = Restarts(Limits()).after(End(status, 1.0))
        assert (decision.delay, decision.gave_up) == (None, False)


@pytest.mark.parametrize("status", [1, 4, 6, 137, 139, -9, -11, -6, -7, 255])
def test_a_crash_is_started_again(status: int) -> None:
    assert Restarts(Limits()).after(End(status, 1.0)).delay is not None


def test_an_end_in_words() -> None:
    assert "SIGKILL" in ending(-9)
    assert "memory" in ending(-9)
    assert ending(-11) == "killed by SIGSEGV"
    assert ending(1) == "exit status 1"
    assert ending(143) == "exit status 143 (SIGTERM)"
    assert ending(255) == "exit status 255"
    assert [shell_status(status) for status in (0, 7, -9)] == [0, 7, 137]


# ------------------------------------------------------------------------------ real processes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory in which nothing is durable yet."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".run.lock").touch()
    return directory


def supervise(run: Path, script: str, **limits: float) -> tuple[int, list[str]]:
    """Run a shell script under a supervisor in this process; what was said."""
    said: list[str] = []
    chosen = Limits(**{"backoff": 0.0, **limits})  # type: ignore[arg-type]
    return Supervisor(["sh", "-c", script], run, chosen, said.append).run(), said


def log_of(run: Path) -> list[str]:
    return (run / "logs" / "supervisor.log").read_text("utf-8").splitlines()


def starts_in(run: Path) -> int:
    return sum("started process" in line for line in log_of(run))


def test_two_crashes_and_then_success(run: Path) -> None:
    status, said = supervise(run, f"cd {run}; echo x >> n; [ $(wc -l < n) = 3 ]")
    assert status == 0
    assert starts_in(run) == 3
    assert sum("exit status 1" in line for line in said) == 2
    assert "exit status 0" in said[-1]
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+[+-]\d\d:\d\d \w", line) for line in log_of(run))


def test_a_crash_at_the_same_step_is_given_up(run: Path) -> None:
    write_state(run / "checkpoint_step_7.pt", {"a": 1}, **identity(7))
    with pytest.raises(GaveUp, match="exit status 9"):
        supervise(run, "exit 9")
    assert starts_in(run) == 3
    assert "newest durable step 7" in log_of(run)[1]
    assert "gave up" in log_of(run)[-1]
    assert GaveUp.exit_code in FINAL


def test_a_training_that_gets_further_is_not_given_up(run: Path, tmp_path: Path) -> None:
    for step in range(1, 6):
        write_state(tmp_path / f"{step}.pt", {"a": step}, **identity(step))
    script = (f"cd {run}; echo x >> n; s=$(wc -l < n); [ $s = 6 ] && exit 0; "
              "cp ../$s.pt checkpoint_step_$s.pt; kill -9 $$")  # fmt: skip
    status, said = supervise(run, script, give_up_after=2)
    assert status == 0
    assert durable(run)[0] == 5
    assert sum("SIGKILL" in line for line in said) == 5


def test_the_cause_is_taken_from_the_history_of_this_start(run: Path) -> None:
    old = '{"time": "2020-01-01T00:00:00.000+00:00", "event": "failed", "step": 1, "reason": "old"}'
    (run / "events.jsonl").write_text(old + "\n")
    event = r"{\"time\": \"$(date -Ins | tr , .)\", \"event\": \"failed\", \"step\": 3, "
    event += r"\"reason\": \"the disk is full\"}"
    script = f'cd {run}; echo x >> n; [ $(wc -l < n) = 2 ] && exit 0; echo "{event}" '
    status, said = supervise(run, script + ">> events.jsonl; exit 1")
    assert status == 0
    assert "step 3 could not be saved: the disk is full" in said[1]
    assert not any("old" in line for line in said)


def test_a_final_status_is_passed_on(run: Path) -> None:
    status, said = supervise(run, "exit 3")
    assert status == 3
    assert starts_in(run) == 1
    assert "not started again" in said[-1]


def test_a_command_that_is_not_there(run: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-program"):
        Supervisor(["no-such-program"], run, Limits(), print).run()


def test_without_a_run_directory_none_is_made(tmp_path: Path) -> None:
    assert supervise(tmp_path / "none", "exit 0")[0] == 0
    assert not (tmp_path / "none").exists()


def test_the_log_begins_when_the_command_has_made_the_directory(tmp_path: Path) -> None:
    run = tmp_path / "later"
    assert supervise(run, f"mkdir {run}")[0] == 0
    assert starts_in(run) == 1


def test_a_directory_that_was_named_is_made_for_the_log(tmp_path: Path) -> None:
    run = tmp_path / "named"
    Supervisor(["true"], run, Limits(), print, create=True).run()
    assert starts_in(run) == 1


def test_a_restart_is_told_what_was_there_before(run: Path) -> None:
    write_state(run / "checkpoint_step_1.pt", {"a": 1}, **identity(1, id="before"))
    script = f"cd {run}; echo ${{HOLDFAST_RESTART-first}} >> told; [ $(wc -l < told) = 2 ]"
    assert supervise(run, script)[0] == 0
    assert (run / "told").read_text().split() == ["first", "before"]


def test_what_a_dead_wrapper_leaves_is_ended_before_the_next_start(run: Path) -> None:
    """Two trainings never run at once, also where a script was the command and died alone."""
    script = (f"cd {run}; echo x >> n; [ $(wc -l < n) = 2 ] && exit 0; "
              "sh -c 'trap \"echo saved > saved; exit\" TERM; echo > up; "
              "while :; do sleep 0.01; done' & "
              "while [ ! -e up ]; do sleep 0.01; done; kill -9 $$")  # fmt: skip
    assert supervise(run, script)[0] == 0
    assert (run / "saved").read_text() == "saved\n"


# ------------------------------------------------------------------------------------- signals

# A training in small: counts the signals it gets, and ends a while after the first one.
LISTENER = """
import os, signal, sys, time
got = []
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
def note(name, text):
    with open(name + ".new", "w") as file:
        file.write(text)
    os.rename(name + ".new", name)
note("up", f"{os.getpid()} {os.isatty(1)} {os.isatty(0)}")
deadline = time.monotonic() + 60
while not got and not os.path.exists("stop") and time.monotonic() < deadline:
    time.sleep(0.005)
if got:
    time.sleep(0.5)
note("got", " ".join(map(str, got)))
sys.exit(128 + got[0] if got else 0)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def listening(
    run: Path, command: Sequence[str] = (sys.executable, "-c", LISTENER), **options: object
) -> subprocess.Popen[str]:
    """A supervisor in a process of its own over the listener, which is up."""
    words = ["run", "--checkpoint-dir", ".", "--backoff", "0", "--", *command]
    process = subprocess.Popen(
        [*PROGRAM, *words], cwd=run, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )  # fmt: skip
    wait_for((run / "up").exists)
    return process


def pid_of(run: Path) -> int:
    return int((run / "up").read_text().split()[0])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_passed_on_once_and_ends_it(run: Path, name: str) -> None:
    number = getattr(signal, name)
    process = listening(run)
    process.send_signal(number)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert (run / "got").read_text() == str(int(number))
    assert starts_in(run) == 1


def test_a_training_that_cannot_save_when_asked_to_stop_is_not_started_again(run: Path) -> None:
    script = "trap 'exit 1' TERM; : > up; while :; do sleep 0.01; done"
    process = listening(run, ["sh", "-c", script])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert starts_in(run) == 1


def test_a_signal_to_the_whole_group_comes_once(run: Path) -> None:
    process = listening(run, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert (run / "got").read_text() == str(int(signal.SIGINT))


def test_ctrl_c_in_a_terminal_comes_once_and_stdout_is_the_terminal(run: Path) -> None:
    words = ["run", "--checkpoint-dir", ".", "--", sys.executable, "-c", LISTENER]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(run)
        os.execv(sys.executable, [*PROGRAM, *words])
    try:
        wait_for((run / "up").exists)
        assert (run / "up").read_text().split()[1:] == ["True", "False"]
        os.write(terminal, b"\x03")
        wait_for((run / "got").exists)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(terminal)
    assert (run / "got").read_text() == str(int(signal.SIGINT))


def test_ctrl_z_stops_both_and_both_go_on(run: Path) -> None:
    process = listening(run)

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc on this system")
    both = (process.pid, pid_of(run))
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: [state(pid) for pid in both] == ["T", "T"])
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: "T" not in [state(pid) for pid in both])
    (run / "stop").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_hang_up_that_nohup_ignores_ends_nothing(run: Path) -> None:
    process = listening(run, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    os.kill(pid_of(run), signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    (run / "stop").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_killed_training_is_started_again(run: Path) -> None:
    process = listening(run)
    first = pid_of(run)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: pid_of(run) != first)
    (run / "stop").touch()
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert starts_in(run) == 2
    assert "SIGKILL" in err


def test_a_signal_between_two_starts_ends_it(run: Path) -> None:
    words = ["run", "--checkpoint-dir", ".", "--backoff", "300", "--", "false"]
    process = subprocess.Popen([*PROGRAM, *words], cwd=run, text=True, stderr=subprocess.PIPE)
    wait_for(lambda: (run / "logs/supervisor.log").exists() and "again in" in log_of(run)[-1])
    process.send_signal(signal.SIGTERM)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Stopped between two starts" in err


@pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's own")
def test_a_killed_supervisor_leaves_no_training_alone(run: Path) -> None:
    process = listening(run)
    process.kill()
    wait_for((run / "got").exists)
    process.communicate(timeout=30)
    assert (run / "got").read_text() == str(int(signal.SIGTERM))


# -------------------------------------------------------------------------------- the run lock

HOLD = """
import sys, time
from pathlib import Path
from holdfast.checkpoint.system.lock import FileLock
with FileLock(Path(sys.argv[1]) / ".run.lock"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(run: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(run), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_training_that_is_still_saving_is_waited_for(run: Path) -> None:
    said: list[str] = []
    with holder(run, 0.3) as other:
        await_free(run, said.append, patience=30.0)
        other.wait(0.2)  # it is over: nothing else had opened the door
    assert len(said) == 1
    assert "waiting" in said[0]


def test_a_run_that_stays_in_use_is_refused(run: Path) -> None:
    said: list[str] = []
    with holder(run, 60.0) as other:
        with pytest.raises(RunLocked, match=f"process {other.pid}"):
            await_free(run, said.append, patience=0.05)
        other.kill()


def test_a_free_run_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    await_free(run, pytest.fail)
    await_free(tmp_path / "none", pytest.fail)
    assert not (tmp_path / "none").exists()
