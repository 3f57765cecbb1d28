"""Traces of the profiler, on demand and while a run goes on."""

import logging
from pathlib import Path

import jax

from hqclip_jax.config import ProfileConfig, profile_range

log = logging.getLogger(__name__)

ASKED_BY_FILE = 5  # steps that are traced after WORKDIR/profile was touched
_FAILURES = (RuntimeError, OSError)  # another profiler is at work; the disk is full


class Tracer:
    """Traces the steps that `profile.steps` names, and the next ones when a file appears.

    Where both are under way, one trace holds both. A run that goes on in the midst of the range
    traces what is left of it. That a trace could not be begun or written is logged, and no more.

    Args:
        config: which steps.
        workdir: `profile` in it asks for a trace and is taken away; `traces` receives it, for
            TensorBoard or Perfetto.
    """

    def __init__(self, config: ProfileConfig, workdir: Path) -> None:
        self.file = workdir / "profile"
        self.folder = workdir / "traces"
        self.range = profile_range(config.steps)
        self._until = 0  # last step of the trace under way

    def before(self, step: int) -> None:
        """Called before step number `step` is made: starts a trace where one is asked for."""
        if not self.range or step < self.range[0]:
            return
        (first, last), self.range = self.range, None
        if step <= last:
            self._trace(step, last)
        else:
            log.info("profile.steps=%d:%d is not traced: step %d comes next", first, last, step)

    def asked(self, step: int) -> None:
        """Looks for the file; called at reports, as a look costs more than a step may."""
        if self.file.exists():
            self.file.unlink(missing_ok=True)
            self._trace(step, step + ASKED_BY_FILE - 1)

    def after(self, step: int, metrics: object) -> None:
        """Called when step number `step` is under way: ends its trace once it is done."""
        if self._until and step >= self._until:
            jax.block_until_ready(metrics)
            self._stop()

    def close(self) -> None:
        """Ends a trace under way: what it holds so far is written."""
        if self._until:
            self._stop()
        if self.range:
            log.info("profile.steps=%d:%d is not traced: the run ended before", *self.range)

    def _trace(self, first: int, last: int) -> None:
        if not self._until:
            try:
                options = jax.profiler.ProfileOptions()
                # A hook at every call of Python's slows down what is traced, and what the host
                # does is in the trace without.
                options.python_tracer_level = 0
                jax.profiler.start_trace(self.folder, profiler_options=options)
            except _FAILURES as e:
                log.error("no trace of steps %d to %d: %s", first, last, e)
                return
        self._until = max(self._until, last)
        log.info("tracing steps %d to %d", first, self._until)

    def _stop(self) -> None:
        self._until = 0
        try:
            jax.profiler.stop_trace()
            log.info("the trace is in %s", self.folder)
        except _FAILURES as e:
            log.error("the trace was not written: %s", e)
