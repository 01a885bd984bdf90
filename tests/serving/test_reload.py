"""Training goes on while the server answers: better checkpoints, damaged ones, full memory."""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from holdfast.errors import CheckpointError
from holdfast.serving import library
from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import CONTEXT, POEM, Training, learn, poet, serving


@pytest.fixture
def training(tmp_path: Path, tokenizer: TextTokenizer) -> Iterator[Training]:
    """A training under way, with one epoch behind it."""
    training = Training(tmp_path / "run", poet(tokenizer, steps=2), tokenizer)
    training.epoch(5.0)
    yield training
    training.close()


def step(url: str, name: str = "best") -> int:
    return int(httpx.get(f"{url}/v1/models/{name}").json()["step"])


def ask(url: str, model: str = "best", **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": POEM[:6], "max_tokens": 20, "temperature": 0, **more}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def test_a_better_checkpoint_is_served_while_a_stream_ends_with_the_old_one(
    training: Training, tokenizer: TextTokenizer
) -> None:
    learned = copy.deepcopy(training.model)
    learn(learned, tokenizer, 150)
    with serving(training.directory, batch=4) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model="best", prompt=POEM[:6], max_tokens=CONTEXT, stream=True, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        first = next(stream)
        answered: list[str] = []
        failed: list[BaseException] = []
        done = threading.Event()

        def keep_asking() -> None:
            try:
                while not done.is_set():
                    answered.append(ask(url)["system_fingerprint"])
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                failed.append(error)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        training.model.load_state_dict(learned.state_dict())
        training.epoch(0.5)
        wait_for(lambda: step(url) == 200)
        wait_for(lambda: bool(answered) and answered[-1].startswith("step_200_"))
        done.set()
        asking.join()
        assert not failed, "no request is dropped"
        assert POEM[6:].startswith(ask(url)["choices"][0]["text"]), "it has learned"
        assert "holdfast_running_texts 1.0" in httpx.get(f"{url}/metrics").text, "it streams on"
        rest = list(itertools.islice(stream, 500))
        stream.close()
        assert {chunk.system_fingerprint for chunk in rest} == {first.system_fingerprint}
        assert str(first.system_fingerprint).startswith("step_100_")
        metrics = httpx.get(f"{url}/metrics").text
        assert 'holdfast_reloads_total{outcome="loaded"} 1.0' in metrics
        assert 'holdfast_model_step{model="best"} 200.0' in metrics
        client.close()


def test_what_is_not_better_is_the_latest_only(training: Training) -> None:
    with serving(training.directory) as url:
        assert step(url, "latest") == 100
        training.epoch(6.0)
        wait_for(lambda: step(url, "latest") == 200)
        assert step(url, "best") == 100
        assert ask(url, "latest")["system_fingerprint"].startswith("step_200_")
        assert ask(url)["system_fingerprint"].startswith("step_100_")


def test_a_better_one_that_is_damaged_is_refused_and_the_next_one_taken(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A copy that the test grows by hand: the run's own writer leaves no time to damage anything.
    place = tmp_path / "copy"
    shutil.copytree(training.directory, place)
    training.epoch(0.5)
    training.epoch(0.4)
    bad, good = (training.directory / f"model_epoch_{epoch}.pt" for epoch in (2, 3))
    shutil.copy(bad, tmp_path / "bad.pt")
    flip(tmp_path / "bad.pt")
    with serving(place) as url:
        (tmp_path / "bad.pt").rename(place / "model_epoch_2.pt")
        wait_for(lambda: "step 100 goes on" in caplog.text)
        assert "of step 200 is not served" in caplog.text
        assert ask(url)["system_fingerprint"].startswith("step_100_") and step(url) == 100
        assert 'holdfast_reloads_total{outcome="refused"} 1.0' in httpx.get(f"{url}/metrics").text
        shutil.copy(good, tmp_path / "good.pt")
        (tmp_path / "good.pt").rename(place / "model_epoch_3.pt")
        wait_for(lambda: step(url) == 300)
        assert caplog.text.count("is not served") == 1, "it is said once"


def test_a_better_one_that_did_not_fit_into_memory_is_tried_again(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load, failed = library.load_for_inference, [0]

    def full_at_first(path: Path, **options: Any) -> Any:
        if failed[0] < 2 and "epoch_2" in str(path):
            failed[0] += 1
            raise RuntimeError("CUDA out of memory")
        return load(path, **options)

    monkeypatch.setattr(library, "load_for_inference", full_at_first)
    monkeypatch.setattr(library, "AGAIN", 0.2)
    with serving(training.directory) as url:
        training.epoch(0.5)
        wait_for(lambda: step(url) == 200)  # nothing else has come meanwhile
        assert failed == [2] and caplog.text.count("of step 200 is not served") == 2


def test_what_comes_while_the_first_model_is_loaded_is_not_missed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, came = library.load_for_inference, threading.Event()

    def slowly(path: Path, **options: Any) -> Any:
        loaded = load(path, **options)
        if not came.is_set():
            came.set()
            training.epoch(0.5)
        return loaded

    monkeypatch.setattr(library, "load_for_inference", slowly)
    with serving(training.directory) as url:
        wait_for(lambda: step(url) == 200)


def test_a_name_whose_file_the_trainer_has_just_replaced_stands_for_the_new_one(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.epoch(6.0)
    load, looked = library.load_for_inference, [0]

    def one_look_late(path: Path, **options: Any) -> Any:
        if "epoch_2" in str(path):
            looked[0] += 1
            if looked[0] == 1:
                return load(path.with_name("model_epoch_1.pt"), **options)  # another one by now
            if looked[0] == 2:
                path.unlink()  # pruned; its other names are there
        return load(path, **options)

    monkeypatch.setattr(library, "load_for_inference", one_look_late)
    with serving(training.directory) as url:
        assert ask(url, "latest")["system_fingerprint"].startswith("step_200_")
        assert looked[0] > 1


def test_models_asked_for_at_one_moment_are_loaded_one_after_the_other(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in (4.0, 3.0):
        training.epoch(loss)
    load, most, now = library.load_for_inference, [0], [0]

    def counted(path: Path, **options: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.2)
        try:
            return load(path, **options)
        finally:
            now[0] -= 1

    monkeypatch.setattr(library, "load_for_inference", counted)
    with serving(training.directory, loaded=2) as url, ThreadPoolExecutor(4) as pool:
        names = ["model_epoch_1", "model_epoch_2", "model_epoch_3", "model_epoch_1"]
        answers = list(pool.map(lambda name: ask(url, name), names))
        steps = [answer["system_fingerprint"].split("_")[1] for answer in answers]
    assert steps == ["100", "200", "300", "100"] and most == [1]


def test_the_best_that_is_intact_is_served_from_the_start(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    training.epoch(0.5)
    training.close()
    flip(training.directory / "model_epoch_2.pt")
    with serving(training.directory) as url:
        assert step(url) == 100
        assert caplog.text.count("cannot be served") == 1, "a file of several names is read once"
        assert ask(url)["system_fingerprint"].startswith("step_100_")


def test_a_run_of_nothing_but_damage_is_an_error_that_says_so(training: Training) -> None:
    training.close()
    flip(training.directory / "model_epoch_1.pt")
    with pytest.raises(CheckpointError), serving(training.directory):
        pass


def test_an_empty_directory_says_that_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* yet"), serving(tmp_path):
        pass


def test_sources_with_one_name_are_told_apart_by_the_directory_above(
    training: Training, tmp_path: Path
) -> None:
    training.close()
    runs = [tmp_path / name / "checkpoints" for name in ("a", "b")]
    for place in runs:
        shutil.copytree(training.directory, place)
    files = [place / "best_model.pt" for place in runs]
    with serving(*runs, training.directory, *files) as url:
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        last = training.directory.name
        assert [name for name in names if "epoch" not in name and "latest" not in name] == [
            "a/checkpoints/best", "b/checkpoints/best", f"{last}/best",
            "a/checkpoints/best_model", "b/checkpoints/best_model",
        ]  # fmt: skip
        assert ask(url, "b/checkpoints/best")["model"] == "b/checkpoints/best"


def test_the_model_that_nobody_asked_for_longest_leaves_memory(training: Training) -> None:
    for loss in (4.0, 3.0, 2.0):
        training.epoch(loss)

    def loaded(url: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("holdfast_models_loaded "))

    with serving(training.directory, loaded=2) as url:
        assert loaded(url) == 1
        for name, expected in (("model_epoch_1", 100), ("model_epoch_2", 200),
                               ("model_epoch_3", 300), ("model_epoch_1", 100),
                               ("best", 400), ("model_epoch_4", 400)):  # fmt: skip
            answer = ask(url, name)
            assert answer["system_fingerprint"].startswith(f"step_{expected}_")
            assert loaded(url) <= 2
        with httpx.stream(
            "POST", f"{url}/v1/completions",
            json={"model": "model_epoch_1", "prompt": "春", "max_tokens": 800, "stream": True,
                  "ignore_eos": True},
        ) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            ask(url, "model_epoch_2")  # the streaming one has to leave, but not before its end
            assert list(lines)[-2:] == ["data: [DONE]", ""]
