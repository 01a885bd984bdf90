"""The state that is saved, and what a checkpoint says of it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from holdfast.checkpoint import calls
from holdfast.checkpoint.records import Run, Save
from holdfast.checkpoint.rundir import now
from holdfast.checkpoint.save.manifest import environment, plain_metrics, score_of
from holdfast.checkpoint.save.options import Options
from holdfast.checkpoint.state import (
    Configured,
    OptimizerNames,
    RandomState,
    Tree,
    gradients,
    normalise,
)
from holdfast.checkpoint.system import project
from holdfast.errors import UnsupportedValue
from holdfast.i18n import _

log = logging.getLogger("holdfast")


class Source:
    """The live state of a training."""

    def __init__(self, state: MutableMapping[str, Any], options: Options) -> None:
        """Raises `UnsupportedValue` where `state` holds something that a checkpoint cannot."""
        self.state, self._options = state, options
        self.random = RandomState() if options.rng else None
        self.kept: dict[str, Any] = {}  # saved in place of what is there at this moment
        self.configured = Configured(state)
        self._optimizer_names = OptimizerNames()
        project.state()  # git is asked here, where no training step waits for it
        if options.rng and "rng" in state:
            raise UnsupportedValue(
                "A state has no key 'rng' of its own: the random streams are saved under that "
                "name. Call it otherwise, or use rng=False."
            )
        if gradients.KEY in state:
            raise UnsupportedValue(
                "A state has no key 'gradients' of its own: gradients in progress are saved "
                "under that name. Call it otherwise."
            )
        self._said: set[str] = set()  # keys of the state and metrics of which a warning was given
        self._once_given = {k: v for k, v in state.items() if calls.is_state_once_given(v)}
        self.tree()  # what cannot be saved is said now

    def configured_now(self, *, settled: bool) -> Configured:
        """Return what the user has configured, which may change until the run is `settled`."""
        if not settled:
            self.configured = Configured(self.state)
        self.configured.look(self.state)
        return self.configured

    def tree(self, step: int = 0, epoch: int | None = None) -> Tree:
        """Return the state as it is now; its tensors are the live ones."""
        payload = {"epoch": epoch, "global_step": step, **self.state}
        if self.random is not None:
            payload["rng"] = self.random
        payload.update(self.kept)
        left = gradients.in_progress(self.state, used=self._options.grads)
        if left:
            payload[gradients.KEY] = left
        return normalise(payload)

    def keep(self) -> dict[str, Any]:
        """Return what moves on between steps as it is now: random streams and places in data."""
        moving = {
            key: value.state_at_step()
            for key, value in self.state.items()
            if callable(getattr(value, "state_at_step", None))
        }
        return moving if self.random is None else {**moving, "rng": self.random.frozen()}

    def manifest(self, save: Save, run: Run) -> dict[str, Any]:
        """Return what the checkpoint of `save` says of itself, besides its state."""
        metrics, options = plain_metrics(save.metrics), self._options
        return {
            "identity": {
                "id": uuid.uuid4().hex,
                "run_id": run.run_id,
                "generation": run.generation,
                "step": save.step,
                "sequence": run.sequence,
                "parent": run.parent,
            },
            "kind": save.kind,
            "reason": save.reason,
            "epoch": save.epoch,
            "created": now(),
            "metrics": metrics,
            "score": score_of(metrics, options.metric, lower_is_better=options.lower_is_better),
            "environment": environment(),
            "configured": self.configured.look(self.state),
            "parameters": self._optimizer_names(self.state),
        }

    def score(self, metrics: Mapping[str, float] | None) -> float | None:
        """Return the metric that decides which checkpoint is best, as lower is better."""
        lower = self._options.lower_is_better
        found = score_of(plain_metrics(metrics), self._options.metric, lower_is_better=lower)
        value: float | None = found["value"]
        return value if value is None or lower else -value

    def look(self, save: Save) -> None:
        """Warn, once each, of what the user has probably not meant."""
        self._compare_own(save)
        self._look_for_stale()
        self._look_for_metric(save)

    def _compare_own(self, save: Save) -> None:
        """Say once where the state's own `global_step` or `epoch`, which the file will have, is not
        the one that was given to the save: a loop may count in a variable of another name."""
        for key, given in (("global_step", save.step), ("epoch", save.epoch)):
            own = self.state.get(key)
            if given is None or type(own) is not int or own == given or key in self._said:
                continue
            self._said.add(key)
            log.warning(
                _(
                    "The state's own {key} is {own}, and the save was given {given}. The file has "
                    "the state's: if your loop counts in another variable, take {key} out of the "
                    "state.",
                    key=key,
                    own=own,
                    given=given,
                )
            )

    def _look_for_stale(self) -> None:
        """Say once where a `state_dict()` was called when the state was made, and never since."""
        for key, value in self._once_given.items():
            if self.state.get(key) is value and key not in self._said:
                self._said.add(key)
                log.warning(
                    _(
                        "{key} in the state is what state_dict() gave when the state was made: it "
                        "does not follow the training. Put the object itself there.",
                        key=key,
                    )
                )

    def _look_for_metric(self, save: Save) -> None:
        """Say once that the metric which is to decide what is best is not among those given."""
        metric, metrics = self._options.metric, save.metrics
        if save.kind == "temp" or not metrics or metric in self._said:
            return
        value = plain_metrics(metrics).get(metric)
        if isinstance(value, str) and not isinstance(metrics[metric], float):
            self._said.add(metric)
            log.warning(
                _(
                    "{metric}, which decides what is best, is no number: {value}.",
                    metric=metric,
                    value=value,
                )
            )
        if metric in metrics:
            return
        self._said.add(metric)
        log.warning(
            _(
                "The metrics of this save are {names}; {metric}, which decides what is best, is "
                "not among them (metric=...).",
                names=", ".join(map(str, metrics)),
                metric=metric,
            )
        )
