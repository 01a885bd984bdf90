"""How often to save so that the least is lost: `RiskAware`, a policy that learns what saving costs.

A run that saves every T seconds, each save costing C seconds of training, and that fails every M
seconds on average, loses a share C/T of its time to saving and T/2M to work done twice. The sum is
least at

    T = sqrt(2 C M)

(J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
the ACM 17 (9), 1974; J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", Future Generation Computer Systems 22 (3), 2006, whose further terms vanish while C
is far below M, as it is here). The loss is convex in T: where a budget forbids that T, the nearest
one that it permits is the best one.

Snapshots in shared memory cover a killed process; what is weighed here is the end of the machine.
"""

from __future__ import annotations

import math

from holdfast.checkpoint.calls import check_number, check_positive
from holdfast.checkpoint.policy.when import Choice, Cost, Measured, Moment

FAILS_EVERY = 4 * 3600.0  # seconds: M of a PC that people also use, or of a spot instance
TIME_SHARE = 0.01  # of training that saving may cost
WRITE_BUDGET = 200e9  # bytes a day: a consumer SSD rated for 300 TB is worn out by it in 4 years
LONGEST = 30 * 60.0  # seconds: never rarer, whatever it costs
SHORTEST = 60.0  # never more often: half a minute of work is not worth a new file
TOLD_AGAIN = 2.0  # a choice is news when the interval has changed by more than this factor
_DAY = 24 * 3600.0
_MOST_SAVES = 4  # whose cost is taken together where the disk is never idle

# Which consideration has decided (`Choice.bound`).
BALANCE = "balance"  # Young's T itself
TIME_BUDGET = "time"
WRITES = "writes"
WRITE_TIME = "write_time"  # a write takes that long
MOST_OFTEN, RAREST = "shortest", "longest"


class RiskAware:
    """When as much time has passed since the last save, of whatever kind, as loses the least.

    The cost C of a save is what it makes training stand still and how much slower the steps are
    while it is written, both measured. The interval is `sqrt(2 C fails_every)`, but

    - at least C / `time_share`, and at least so long that `write_budget` bytes a day (0: any
      number) are not exceeded; epochs' and other checkpoints count as well, since the interval
      begins anew with each of them;
    - never under a minute, never over 30 minutes: these win over the budgets;
    - never shorter than a write takes.

    Until the first save has taught what one costs, the interval is the shortest. `fails_every` is
    in seconds; the default says that the machine goes down once in four hours of training. An
    interval is best in a wide valley: with twice the true value it loses 6 % more than the best.
    """

    def __init__(
        self,
        *,
        fails_every: float = FAILS_EVERY,
        time_share: float = TIME_SHARE,
        write_budget: float = WRITE_BUDGET,
    ) -> None:
        check_positive("fails_every", fails_every)
        check_positive("time_share", time_share)
        check_number("write_budget", write_budget, 0)
        self._fails_every, self._time_share = fails_every, time_share
        self._write_budget = write_budget
        self._quiet: float | None = None  # seconds of a step while nothing is written
        self._excess = 0.0  # seconds that steps have taken more than that during this write
        self._saves: list[Cost] = []  # of this write; several where the disk is never idle
        self._cost: float | None = None
        self._last: Cost | None = None
        self._told: float | None = None

    def __call__(self, moment: Moment) -> bool:
        since = moment.now - moment.last_saved_at
        return moment.step > moment.last_saved_step and since >= self.choice.interval

    def learn(self, measured: Measured) -> Choice | None:
        """Take in what a step has taken; the choice where it is new, or has changed by much."""
        if not measured.saving:
            self._quiet = _smoothed(self._quiet, measured.step, 0.2)
        elif self._quiet is not None:
            self._excess += measured.step - self._quiet
        self._saves += measured.saves
        if measured.saves:
            self._last = measured.saves[-1]
        if self._saves and (not measured.saving or len(self._saves) >= _MOST_SAVES):
            self._weigh()
        elif not measured.saving:
            self._excess = 0.0  # of a save that has failed
        if self._cost is None:
            return None
        choice = self.choice
        if self._told is not None and _near(choice.interval, self._told):
            return None
        self._told = choice.interval
        return choice

    def _weigh(self) -> None:
        """What the writing that is over has cost training, a save."""
        stall, seconds = (sum(c.stall for c in self._saves), sum(c.seconds for c in self._saves))
        # Not less than what was seen to be lost, and not more than there was to lose: an evaluation
        # that falls into a write makes a step long without any fault of the disk's.
        cost = min(max(self._excess, stall), stall + seconds) / len(self._saves)
        self._cost = _smoothed(self._cost, cost, 0.5)
        self._saves, self._excess = [], 0.0

    @property
    def choice(self) -> Choice:
        """The interval as far as is known now, and the numbers behind it."""
        cost, last = self._cost or 0.0, self._last or Cost(0.0, 0.0, 0)
        interval, bound = math.sqrt(2 * cost * self._fails_every), BALANCE
        budgets = [(cost / self._time_share, TIME_BUDGET), (SHORTEST, MOST_OFTEN)]
        if self._write_budget:
            budgets.append((last.size * _DAY / self._write_budget, WRITES))
        for at_least, why in budgets:
            if at_least > interval:
                interval, bound = at_least, why
        if interval > LONGEST:
            interval, bound = LONGEST, RAREST
        if interval < last.seconds:
            interval, bound = last.seconds, WRITE_TIME
        # What is on its way to the disk when the power goes is lost as well.
        loss = interval / 2 + last.seconds
        return Choice(interval, bound, cost, loss, last.size * _DAY / interval)


def _smoothed(before: float | None, now: float, weight: float) -> float:
    return now if before is None else before + weight * (now - before)


def _near(a: float, b: float) -> bool:
    return max(a, b) <= TOLD_AGAIN * min(a, b)
