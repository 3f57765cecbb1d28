"""The trainer with a record of what every step was given, and data that can be made to hang.

python -m tests.recorded --record=FILE [--hold=STEP] ARGUMENTS OF THE TRAINER
"""

import argparse
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import numpy as np
from jax._src import compiler

from hqclip_jax import train
from hqclip_jax.data.feed import Fed
from hqclip_jax.data.pipeline import NumpyBatch, Pipeline
from hqclip_jax.signals import end


def rows_of(fed: Fed) -> list[tuple[str, str]]:
    """Uid of each row of this process, and a hash of all that the device holds of it."""
    own = [np.asarray(fed.arrays[name].addressable_data(0)) for name in sorted(fed.arrays)]
    hashes = [hashlib.sha256(b"".join(array[i].tobytes() for array in own)).hexdigest()[:16]
              for i in range(len(fed.uids))]  # fmt: skip
    return [(uid.decode(), found) for uid, found in zip(fed.uids.tolist(), hashes)]


def record_steps(path: str) -> None:
    real = train.Loop._step
    step, last = 0, None

    def _step(loop, state, fed, first):
        nonlocal step, last
        step = int(state.step) + 1 if first else step + 1
        # Who stops while it waits for data hands in the batch before, in a step that is not made.
        if fed is not last:
            line = json.dumps({"step": step, "rows": rows_of(fed)}) + "\n"
            # One write: a line is there as a whole or not at all, whenever the process is killed.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, line.encode())
            os.close(file)
        last = fed
        return real(loop, state, fed, first)

    train.Loop._step = _step


def hold_data(before: int) -> None:
    """Step `before` gets no batch, nor does any after it."""
    real = Pipeline.batches

    def batches(pipeline, *share) -> Iterator[NumpyBatch]:
        done = pipeline.mixture.start // pipeline.config.optim.batch
        yield from islice(real(pipeline, *share), before - done - 1)
        threading.Event().wait()

    Pipeline.batches = batches


def fill_cache_from_all() -> None:
    """JAX lets the first process alone write to the compile cache, and on a CPU the others have no
    use for what it wrote: they would compile at every start."""
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--record", required=True)
    parser.add_argument("--hold", type=int)
    args, rest = parser.parse_known_args()
    fill_cache_from_all()
    record_steps(args.record)
    if args.hold:
        hold_data(args.hold)
    end(train.main(rest))
