"""A small DQN, protected with four lines: those that name `holdfast` or `run`.

    python examples/dqn_replay.py out

Kill it however you like (Ctrl-C, kill, kill -9) and start it again: it goes on with the step after
the last one, and ends with the very weights of a run that was never disturbed. An agent has more
state than its network: the replay memory (NumPy arrays, put back in place), the target network, the
generator that explores, and the world in the middle of an episode.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import holdfast

out_dir = sys.argv[1]
total_steps, warmup, capacity, batch_size, discount = 400, 64, 256, 32, 0.9
target_every, decay_steps, episode = 25, 200, 30
torch.manual_seed(7)
dice = np.random.default_rng(7)


@dataclass
class World:
    """A cart on a line that is pushed left, not at all, or right; best at rest on its goal."""

    place: float = 0.0
    speed: float = 0.0
    goal: float = 0.5
    age: int = 0

    @property
    def seen(self) -> np.ndarray:
        return np.array([self.place, self.speed, self.goal], np.float32)

    def act(self, action: int) -> tuple[float, bool]:
        """Push once; return the reward, and True at the end of the episode."""
        self.speed = 0.9 * self.speed + 0.1 * (action - 1)
        self.place += self.speed
        self.age += 1
        return -abs(self.place - self.goal), self.age >= episode


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def greedy(seen: np.ndarray) -> int:
    with torch.no_grad():
        return int(online(torch.from_numpy(seen)).argmax())


def learn() -> float:
    rows = dice.integers(min(step, capacity), size=batch_size)
    before, action, reward, after, done = (torch.from_numpy(memory[key][rows]) for key in memory)
    with torch.no_grad():
        wanted = reward + discount * (1 - done) * target(after).max(1).values
    loss = functional.smooth_l1_loss(online(before).gather(1, action[:, None])[:, 0], wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate() -> float:
    """Return the mean reward of a step in three episodes without chance."""
    rewards = []
    for goal in (-0.5, 0.2, 0.8):
        trial = World(goal=goal)
        rewards += [trial.act(greedy(trial.seen))[0] for _ in range(episode)]
    return float(np.mean(rewards))


online, target = network(), network()
target.load_state_dict(online.state_dict())
optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)
memory = {
    "before": np.zeros((capacity, 3), np.float32),
    "action": np.zeros(capacity, np.int64),
    "reward": np.zeros(capacity, np.float32),
    "after": np.zeros((capacity, 3), np.float32),
    "done": np.zeros(capacity, np.float32),
}

step, world = 0, World()
run = holdfast.protect(
    out_dir, online=online, target=target, optimizer=optimizer, memory=memory, dice=dice
)
step, world = run.resume(step, world)
while step < total_steps:
    epsilon = max(0.05, 1 - step / decay_steps)
    seen = world.seen
    action = int(dice.integers(3)) if dice.random() < epsilon else greedy(seen)
    reward, done = world.act(action)
    for array, value in zip(memory.values(), (seen, action, reward, world.seen, done), strict=True):
        array[step % capacity] = value
    if done:
        world = World(goal=float(dice.uniform(-1, 1)))
    step += 1
    loss = learn() if step >= warmup else 0.0
    if step % target_every == 0:
        target.load_state_dict(online.state_dict())
    print(f"{step} {loss!r}", flush=True)
    run.step(step, world)
print(f"mean reward of a step: {evaluate():.3f}")
