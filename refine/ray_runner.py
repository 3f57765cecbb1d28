"""Parts made on a Ray cluster: engines as actors, one per GPU; parts sealed by tasks on any CPU.

Ray Data hands inputs to actors, adds and replaces actors, and gives the inputs of one that is lost
to another; that one reads the journal first and asks only for what is missing. Output and inputs
must be where every node sees them.
"""

import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refine.asking import Finished, ask
from refine.engines.backend import Backend
from refine.errors import RefineError
from refine.parallel import Workers
from refine.parts import Job, PartMaker
from refine.progress import progress
from refine.sink import Part, part_directory

OURS = f"{RefineError.__module__}.{RefineError.__name__}"
LAPS = 8
"""How many rounds of inputs each engine gets: few enough that the pause between two does not count,
many enough that a lost engine's work and the last round are small."""


@dataclass(frozen=True)
class OnRay:
    """The engines of a cluster: the one that RAY_ADDRESS names, or this machine.

    Attributes:
        engines: at most so many; None for as many as there are GPUs.
        gpus: of each; 0 where the model runs on CPUs or behind a server.
        workers: CPUs of each that prepare pictures.
    """

    engines: int | None
    gpus: int
    workers: int

    def make_parts(self, job: Job, missing: Sequence[int]) -> int:
        """Makes the parts that are missing; returns the pairs in them.

        Raises:
            RefineError: Ray is not installed, the cluster has no GPU, or an engine can't start.
        """
        if not missing:
            return 0
        try:
            import ray
        except ImportError as e:
            raise RefineError("--runner ray: install ray[data] (requirements-refine.txt)") from e
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="warning")
        engines = self._engines(ray.cluster_resources())
        size = max(1, len(missing) // (LAPS * engines))
        rounds = [missing[i : i + size] for i in range(0, len(missing), size)]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=engines)
        answered = ray.data.from_items(
            [{"parts": list(numbers)} for numbers in rounds], override_num_blocks=len(rounds)
        ).map_batches(
            Asker,
            fn_constructor_args=(job, self.workers),
            batch_size=1,
            compute=pool,
            num_gpus=self.gpus or None,
            num_cpus=self.workers if self.gpus else 0.5,
        )
        sealed = answered.map_batches(
            Sealer, fn_constructor_args=(job,), batch_size=1, compute=pool, num_cpus=0.5
        )
        return self._follow(sealed, len(missing))

    def _engines(self, resources: dict[str, float]) -> int:
        if not self.gpus:
            return self.engines or 1
        there = int(resources.get("GPU", 0)) // self.gpus
        if not there:
            raise RefineError(
                f"the Ray cluster has no {self.gpus} GPUs: see `ray status`, and RAY_ADDRESS"
            )
        return min(self.engines or there, there)

    def _follow(self, sealed: Any, parts: int) -> int:
        pairs, started = 0, time.monotonic()
        try:
            with progress("refining", parts, "parts") as bar:
                for row in sealed.iter_rows():
                    pairs += row["pairs"]
                    rate = pairs / (time.monotonic() - started)
                    bar.advance(1, f"{pairs:,} pairs, {rate:,.1f}/s")
        except Exception as e:
            raise RefineError(
                f"Ray stopped: {_cause(e)}; what is answered is kept, and the same command goes on"
            ) from e
        return pairs


class Asker:
    """An actor with an engine. The engine starts with the first batch, so that its failure is told
    as any other and does not keep the actor from coming up."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        _check_visible(job)
        self._maker: PartMaker = job.open()
        self._workers = Workers(workers, job.open)
        self._backend: Backend | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list]]:
        """Asks about the parts of a batch, and gives each as soon as it is finished."""
        numbers = [int(n) for n in batch["parts"][0]]
        for event in ask(self._maker, self._opened, self._workers, numbers):
            if isinstance(event, Finished):
                yield {"part": [event.number]}

    def _opened(self) -> Backend:
        if self._backend is None:
            self._backend = self._job.engine.backend()
        return self._backend


class Sealer:
    """An actor that writes parts whose answers are all there."""

    def __init__(self, job: Job) -> None:
        self._maker = job.open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        (number,) = map(int, batch["part"])
        directory = part_directory(self._maker.job.parts, number)
        if not directory.exists():  # else sealed by one that was lost right after
            self._maker.make(number)
        return {"pairs": [Part.load(directory).counts["pairs"]]}


def _check_visible(job: Job) -> None:
    if not job.parts.is_dir():
        raise RefineError(
            f"{job.parts} is not there on node {socket.gethostname()}: put --output on a file "
            "system that all nodes share"
        )


def _cause(e: BaseException) -> str:
    """Our own error among what Ray tells, which passes it on as the text of a traceback; or the
    whole of it."""
    ours = re.search(rf"^{re.escape(OURS)}: (.*)$", str(e), re.MULTILINE)
    return ours[1] if ours else str(e)
