"""One trained run and one server for all tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import Training, learn, make_tokenizer, poet, serving


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    """Two epochs: the first knows nothing yet, the second the poem by heart."""
    directory = tmp_path_factory.mktemp("serving") / "run"
    training = Training(directory, poet(tokenizer, steps=2), tokenizer)
    training.epoch(5.0)
    learn(training.model, tokenizer, 150)
    training.epoch(0.5)
    training.close()
    return directory


@pytest.fixture(scope="session")
def url(run: Path) -> Iterator[str]:
    with serving(run, batch=8, queue=64) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
