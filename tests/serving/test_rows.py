"""The batch in the model: the same numbers as the model alone, whoever joins and leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.serving.engine.rows import Batch, Rows, Single, batch_for
from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import POEM, poet

LENGTH = 24
CLOSE = 1e-3  # of logits that spread over more than 10; far less than what decides a token


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest, tokenizer: TextTokenizer) -> Any:
    return poet(tokenizer, request.param, steps=40)


def prompts(tokenizer: TextTokenizer) -> list[list[int]]:
    starts = [POEM[:1], POEM[7:19], POEM[20:22], POEM[3:9]]
    return [tokenizer.encode(start) for start in starts]


def generated(model: Any, prompt: list[int]) -> list[int]:
    """What transformers itself generates, greedily."""
    given = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    output = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                            max_new_tokens=LENGTH, use_cache=True, pad_token_id=0)  # fmt: skip
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def test_rows_that_join_and_leave_say_what_generate_says(
    model: Any, tokenizer: TextTokenizer
) -> None:
    given = prompts(tokenizer)
    expected = [generated(model, prompt) for prompt in given]
    batch = batch_for(model, 4, 128)
    assert isinstance(batch, Rows)
    said: list[list[int]] = [[] for _ in given]
    rows: list[int] = []  # whose text is in which row
    joins = {0: [0, 1], 3: [2], 7: [3]}  # at which step who comes

    def take(logits: torch.Tensor, who: list[int]) -> None:
        best = logits.topk(2)
        for row, one in enumerate(who):
            token = expected[one][len(said[one])]
            margin = float(best.values[row, 0] - best.values[row, 1])
            # Where two tokens are as likely, rounding decides, and both are right.
            assert int(best.indices[row, 0]) == token or margin < CLOSE, (one, len(said[one]))
            said[one].append(token)

    for step in range(100):
        if new := joins.get(step):
            take(batch.add([given[one] for one in new]), new)
            rows += new
        for row in reversed(range(len(rows))):
            if len(said[rows[row]]) == LENGTH:
                batch.remove(row)
                rows[row] = rows[-1]
                rows.pop()
        if not rows:
            break
        take(batch.step([said[one][-1] for one in rows]), rows)
    assert said == expected and batch.count == 0


@torch.inference_mode()
@pytest.mark.parametrize("chooses", [True, False])
def test_prompts_of_every_length_that_begin_together_see_only_themselves(
    model: Any, monkeypatch: pytest.MonkeyPatch, chooses: bool
) -> None:
    """`chooses`: whether the model can be asked for the logits of some places only."""
    if not chooses:
        forward = model.forward

        def whole(input_ids: Any, attention_mask: Any = None, position_ids: Any = None,
                  past_key_values: Any = None, use_cache: Any = None) -> Any:  # fmt: skip
            return forward(input_ids=input_ids, attention_mask=attention_mask,
                           position_ids=position_ids, past_key_values=past_key_values,
                           use_cache=use_cache)  # fmt: skip

        monkeypatch.setattr(model, "forward", whole)
    context = 128  # of the smallest of the models; all prompts together are longer
    dice = torch.Generator().manual_seed(5)

    def some(count: int) -> list[int]:
        return torch.randint(1, 256, (count,), generator=dice).tolist()

    def same(logits: torch.Tensor, texts: list[list[int]]) -> None:
        truth = [model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts]
        torch.testing.assert_close(logits, torch.stack(truth), rtol=0, atol=CLOSE)

    def go_on(texts: list[list[int]]) -> None:
        for text in texts:
            text.extend(some(1))
        same(batch.step([text[-1] for text in texts]), texts)

    batch = Rows(model, 32)
    texts = [some(count) for count in (1, context - 1, 40, 1, 70, 2)]
    same(batch.add(texts), texts)
    go_on(texts)  # one of them to the last token that the model can see
    batch.remove(1)
    texts[1] = texts.pop()
    new = [some(context), some(1)]  # longer than all that are there
    same(batch.add(new), new)
    batch.remove(len(texts))
    texts += new[1:]
    go_on(texts)
    alone = some(33)
    everywhere = batch.add_with_all(alone)
    truth = model(input_ids=torch.tensor([alone])).logits[0]
    torch.testing.assert_close(everywhere, truth, rtol=0, atol=CLOSE)
    texts.append(alone)
    go_on(texts)


@torch.inference_mode()
def test_the_logits_of_a_prompts_tokens_are_the_models_own(
    model: Any, tokenizer: TextTokenizer
) -> None:
    prompt = tokenizer.encode(POEM[:12])
    truth = model(input_ids=torch.tensor([prompt])).logits[0]
    batch: Batch
    for batch in (Rows(model, 2), Single(model)):
        torch.testing.assert_close(batch.add_with_all(prompt), truth, rtol=0, atol=CLOSE)
        batch.clear()
        assert batch.count == 0
        torch.testing.assert_close(batch.add([prompt])[0], truth[-1], rtol=0, atol=CLOSE)


def test_a_model_that_forgets_is_served_one_text_at_a_time_and_says_the_same(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = poet(tokenizer, "mistral", steps=20, sliding_window=8)
    batch = batch_for(model, 4, 128)
    assert isinstance(batch, Single) and batch.limit == 1
    assert "mistral answer one request at a time" in caplog.text
    (prompt, *_others) = prompts(tokenizer)
    with torch.inference_mode():
        said = [int(batch.add([prompt]).argmax())]
        while len(said) < LENGTH:
            said.append(int(batch.step(said[-1:]).argmax()))
    assert said == generated(model, prompt)


def test_a_model_whose_positions_turn_with_the_longest_text_is_served_one_text_at_a_time(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    turning = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
               "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
               "original_max_position_embeddings": 32}  # fmt: skip
    model = poet(tokenizer, "phi3", steps=0, rope_parameters=turning, sliding_window=None)
    assert isinstance(batch_for(model, 4, 128), Single)
    assert "phi3 answer one request at a time" in caplog.text


@torch.inference_mode()
def test_memory_for_the_cache_is_what_the_rows_of_now_need(
    model: Any, tokenizer: TextTokenizer
) -> None:
    batch = batch_for(model, 32, 128)
    assert isinstance(batch, Rows) and 0 < batch.capacity < 1 << 40

    made: list[int] = []  # rows x length of what is made for keys or values, in order

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **kwargs or {})
            if func is torch.ops.aten.new_zeros.default and result.dim() == 4:
                made.append(result.shape[0] * result.shape[2])
            return result

    with Watch():
        batch.add([[5]] * 20)
        assert set(made) == {24 * 64}
        for _row in range(19):
            batch.remove(0)
        made.clear()
        batch.add([[5] * 100])
        assert set(made) == {8 * 128}, "not 24 rows of 128"
    truth = model(input_ids=torch.tensor([[5] * 101])).logits[0, -1]
    torch.testing.assert_close(batch.step([5, 5])[1], truth, rtol=0, atol=CLOSE)


def test_a_model_whose_answers_change_in_rows_is_not_put_into_rows(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = poet(tokenizer, steps=0)
    forward = model.forward

    def without_positions(*args: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(*args, **more)

    assert isinstance(batch_for(model, 4, 128), Rows)
    monkeypatch.setattr(model, "forward", without_positions)
    assert isinstance(batch_for(model, 4, 128), Single)
