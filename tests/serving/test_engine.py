"""The engine alone: who waits for memory, and what a failing model leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from holdfast.serving.engine.engine import PREFILL, Engine, Inbox, QueueFull, Text
from holdfast.serving.engine.sampling import Sampling


class Counting:
    """A batch that has room for 20 tokens; token 9 makes it fail."""

    limit, capacity = 8, 20

    def __init__(self) -> None:
        self.count = self.most = 0
        self.passes: list[int] = []  # tokens of the prompts that began together; 0: a step

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        if any(9 in prompt for prompt in prompts):
            raise RuntimeError("out of memory")
        self.passes.append(sum(map(len, prompts)))
        self.count += len(prompts)
        self.most = max(self.most, self.count)
        return torch.eye(10)[[1] * len(prompts)]

    def add_with_all(self, prompt: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        self.passes.append(0)
        return torch.eye(10)[[1] * len(tokens)]

    def remove(self, row: int) -> None:
        self.count -= 1

    def clear(self) -> None:
        self.count = 0


class Nobody:
    def stepped(self, rows: int, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...


async def finishes(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> list[str]:
    inbox = Inbox()
    sampling = Sampling(max_tokens=tokens, temperature=0)
    texts = [Text(i, prompt, sampling, inbox) for i, prompt in enumerate(prompts)]
    engine.submit(texts)
    ends: dict[Text, str] = {}
    while len(ends) < len(texts):
        for text, step in await asyncio.wait_for(inbox.get(), 10):
            if step.finish:
                ends[text] = step.finish
    return [ends[text] for text in texts]


def started(batch: Counting, queue: int = 20) -> Engine:
    return Engine(batch, end_ids=[0], queue=queue, loop=asyncio.get_running_loop(),
                  observer=Nobody())  # fmt: skip


def test_texts_wait_for_memory_and_all_come_to_their_end() -> None:
    async def run() -> tuple[list[str], int]:
        batch = Counting()
        engine = started(batch)
        ends = await finishes(engine, [[1, 2]] * 9, tokens=4)  # 6 tokens each: three have room
        engine.close()
        assert engine.join(5)
        return ends, batch.most

    assert asyncio.run(run()) == (["length"] * 9, 3)


def test_one_text_that_is_larger_than_the_memory_is_tried_alone() -> None:
    async def run() -> tuple[list[str], int]:
        batch = Counting()
        return await finishes(started(batch), [[1] * 30] * 2, tokens=1), batch.most

    assert asyncio.run(run()) == (["length"] * 2, 1)


def test_who_is_under_way_gets_a_token_between_two_passes_of_new_prompts() -> None:
    async def run() -> tuple[list[str], list[int]]:
        batch = Counting()
        batch.capacity = 1 << 20
        half, all_of_it = [1] * (PREFILL // 2), [1] * (3 * PREFILL)
        prompts = [[1], half, half, all_of_it, half, [1]]
        return await finishes(started(batch), prompts, tokens=9), batch.passes

    ends, passes = asyncio.run(run())
    assert ends == ["length"] * 6
    begun = [tokens for tokens in passes if tokens]
    # In the order they came, none left behind; one that is longer than a pass goes in alone.
    assert begun == [1 + PREFILL // 2, PREFILL // 2, 3 * PREFILL, 1 + PREFILL // 2]
    assert passes[:8] == [begun[0], 0, begun[1], 0, begun[2], 0, begun[3], 0]


def test_a_step_that_fails_ends_its_texts_and_the_next_are_answered() -> None:
    async def run() -> list[list[str]]:
        engine = started(Counting())
        bad = await finishes(engine, [[1], [9]], tokens=2)
        return [bad, await finishes(engine, [[1]], tokens=2)]

    assert asyncio.run(run()) == [["error", "error"], ["length"]]


def test_what_has_no_room_is_refused_whole() -> None:
    async def run() -> None:
        engine = started(Counting(), queue=0)
        texts = [Text(i, [1], Sampling(max_tokens=1), Inbox()) for i in range(9)]
        with pytest.raises(QueueFull) as error:
            engine.submit(texts)
        assert error.value.retry_after >= 1 and engine.waiting == 0
        engine.close()
        with pytest.raises(QueueFull):
            engine.submit(texts[:1])

    asyncio.run(run())
