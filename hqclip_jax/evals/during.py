"""Evaluation of a run while it trains, between two of its steps and on the same devices.

The data path goes on meanwhile, as it lies in threads and processes of its own. A set that can't be
scored is told and left out, and never ends the run. A stop breaks an evaluation off at its next
batch, on all hosts at the same one; it is made up for when the run is started again.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from hqclip_jax.config import Config, ConfigError
from hqclip_jax.data.tokenizer import Tokenizer
from hqclip_jax.evals.embed import Embedder, Stopped
from hqclip_jax.evals.outcome import Outcome, Result
from hqclip_jax.evals.results import JSON, RUN_FOLDER, named_scores, scores_of, write_results
from hqclip_jax.evals.suite import Evaluator, SuiteError, load_suite, unreadable
from hqclip_jax.evaluate import failed, run_suite
from hqclip_jax.step import TrainState

log = logging.getLogger(__name__)


def evaluators_of(config: Config) -> list[Evaluator]:
    """Those of `evals.suites`, without the sets that a host lacks, which are told.

    Raises:
        ConfigError: a suite that there is not, or two sets of one name.
    """
    names = [name.strip() for name in config.evals.suites.split(",") if name.strip()]
    try:
        found = [e for name in names for e in load_suite(name, config.evals.data or None)]
    except SuiteError as e:
        told = str(e).replace("--suite", "evals.suites").replace("--data", "evals.data")
        raise ConfigError(told) from e
    twice = {e.name for e in found if [f.name for f in found].count(e.name) > 1}
    if twice:
        raise ConfigError(f"evals.suites has two sets named {', '.join(sorted(twice))}")
    why = unreadable(found)
    for name, reason in why.items():
        log.error("%s will not be evaluated: %s", name, reason)
    return [e for e in found if e.name not in why]


class Evaluations:
    """What is scored now and then, and where it is written: `evals/STEP`, as `evaluate` would.

    Args:
        every: steps between two.
        total: steps of the run; the last one is evaluated too.
    """

    def __init__(
        self,
        config: Config,
        evaluators: list[Evaluator],
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        mesh: Mesh,
        workdir: Path,
        every: int,
        total: int,
    ) -> None:
        self.config, self.evaluators, self.workdir = config, evaluators, workdir
        self.every, self.total = every, total
        self._model = graphdef, tokenizer, mesh

    def due(self, step: int) -> bool:
        """Whether this step's parameters are to be scored."""
        return bool(self.evaluators) and (step % self.every == 0 or step == self.total)

    def missing(self, step: int) -> bool:
        """Whether that was to be done and is not: for the step that a run goes on from or ends at.
        The first process, which writes the results, answers for all."""
        if not step or not self.due(step):
            return False
        missing = np.array(not (self._folder(step) / JSON).exists())
        return bool(missing if jax.process_count() == 1 else broadcast_one_to_all(missing))

    def run(
        self, step: int, state: TrainState, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Scores all sets and writes the results; None where a stop broke it off.

        Args:
            stop: asked before each batch.

        Returns:
            `eval/SET/SCORE`, for the metrics.
        """
        graphdef, tokenizer, mesh = self._model
        params = state.params if state.ema is None else state.ema
        image_size = self.config.model.image_size
        embedder = Embedder(graphdef, params, tokenizer, image_size, mesh, self.config.evals.batch)
        embedder.stop = stop
        try:
            results = run_suite(embedder, self.evaluators)
        except Stopped:
            log.info("the evaluation of step %d was broken off; the next start makes it up", step)
            return None
        if jax.process_index() == 0:
            self._write(step, "params" if state.ema is None else "ema", results)
        self._tell(step, results)
        return {
            f"eval/{name}/{score}": result.scores[score]
            for name, result in results.items()
            if isinstance(result, Outcome)
            for score in named_scores(result.scores)
        }

    def _folder(self, step: int) -> Path:
        return self.workdir / RUN_FOLDER / str(step)

    def _write(self, step: int, weights: str, results: dict[str, Result]) -> None:
        about = {
            "checkpoint": str(self.workdir),
            "step": step,
            "samples": step * self.config.optim.batch,
            "weights": weights,
            "suite": self.config.evals.suites,
            "data": self.config.evals.data,
            "model": dataclasses.asdict(self.config.model),
            "tokenizer": self._model[1].name,
        }
        scores = {n: scores_of(r) for n, r in results.items() if isinstance(r, Outcome)}
        write_results(self._folder(step), about, results, scores)

    def _tell(self, step: int, results: dict[str, Result]) -> None:
        scores = [
            f"{name} {result.main} {100 * result.scores[result.main]:.1f}"
            for name, result in results.items()
            if isinstance(result, Outcome)
        ]
        log.info("step %d: %s", step, ", ".join(scores) or "nothing could be scored")
        if names := failed(results):
            log.error("step %d: could not score %s", step, ", ".join(names))
