"""What is done now and then: after how many steps, or minutes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hqclip_jax.checkpoint import Checkpoints, RunInfo
from hqclip_jax.config import Config, ConfigError
from hqclip_jax.step import TrainState


@dataclass(frozen=True)
class Every:
    """Steps: of the whole run, and between what is done now and then."""

    total: int
    warmup: int
    report: int
    save: int
    keep: int
    evaluate: int

    @classmethod
    def of(cls, config: Config, records: int) -> "Every":
        def steps(name: str) -> int:
            section, key = name.split(".")
            return config.steps(getattr(getattr(config, section), key), records, name)

        save = max(1, steps("checkpoint.every"))
        keep = steps("checkpoint.keep_every") if config.checkpoint.keep_every else 0
        if keep % save:
            raise ConfigError(
                f"checkpoint.keep_every={config.checkpoint.keep_every!r} is {keep} steps, no "
                f"multiple of the {save} of checkpoint.every={config.checkpoint.every!r}"
            )
        report = max(1, steps("log.every"))
        evaluate = max(1, steps("evals.every"))
        return cls(steps("optim.duration"), steps("optim.warmup"), report, save, keep, evaluate)


class Saver:
    """Decides when to save, and says what a checkpoint holds beside the state."""

    def __init__(
        self,
        minutes: float,
        checkpoints: Checkpoints,
        info: Callable[[int], RunInfo],
        start: int,
    ) -> None:
        """Args:
        minutes: between two saves that this host asks for; 0 asks for none.
        info: makes the `RunInfo` of a step.
        start: the step that the run goes on from; it is not saved again.
        """
        self.minutes, self.checkpoints, self.info = minutes, checkpoints, info
        self.saved, self._at, self._asked = start, time.monotonic(), False

    def asks(self) -> bool:
        """Whether all hosts shall save because time has passed: one clock decides for all."""
        if not self.minutes or self._asked or time.monotonic() - self._at < 60 * self.minutes:
            return False
        self._asked = True
        return True

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        if step > self.saved:
            self.checkpoints.save(step, state, self.info(step), metrics)
        self.saved, self._at, self._asked = step, time.monotonic(), False
