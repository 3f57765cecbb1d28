"""CLIP scores of a data set: `python -m hqclip_jax.score --checkpoint=DIR --data=OUT`.

For every record the cosine of the picture with each of its texts, written beside the data set,
where `python -m refine compare` and `python -m refine filter` take them from. This is how a trained
model chooses what the next one is trained on.
"""

import argparse
import json
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.checkpoint import WEIGHTS, CheckpointError
from hqclip_jax.config import ConfigError
from hqclip_jax.data.record import Record
from hqclip_jax.evals.datasets import Example
from hqclip_jax.evals.embed import Embedder, EmbeddingError
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.restore import Found, find, restore_model
from hqclip_jax.telemetry import setup_logging
from refine.errors import RefineError
from refine.judging.outputs import Output
from refine.judging.scores import CLIP_COLUMNS, About, Scores, clip_rows, digest_of, fill, slug

log = logging.getLogger("hqclip_jax.score")

EPILOG = """\
examples
  python -m hqclip_jax.score --checkpoint=runs/large --data=data/refined
  python -m hqclip_jax.score --checkpoint=runs/large --data=data/refined --shard=3 --num-shards=16

What has scores by this checkpoint is not scored again; a killed run goes on with the same command.
Scores lie in OUT/scores. The last line of the output is a JSON object that names their folder.
"""


@dataclass(frozen=True)
class _Numbered(Example):
    number: int
    record: Record


class CheckpointScorer:
    """A checkpoint of ours as a `refine.judging.scores.Scorer`.

    Args:
        found: the checkpoint; its weights are restored when the first record comes.
        weights: `params`, or `ema` for their average.
        batch: pictures or texts a step.
    """

    def __init__(self, found: Found, weights: str, batch: int) -> None:
        self.found, self.weights, self.batch = found, weights, batch
        run = found.checkpoints.directory.parent.name
        mark = "" if weights == WEIGHTS[0] else f"-{weights}"
        name = f"clip-{slug(run)}-{found.step}{mark}-{digest_of(found.path)}"
        context = found.info.config.model.context_length
        self.about = About(name, "clip", CLIP_COLUMNS, {"context": context, "step": found.step})

    def score(
        self, records: Iterable[tuple[int, Record]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields the rows in order, without cosines where a picture does not decode."""
        restored = restore_model(self.found.path, weights=self.weights)
        embedder = Embedder(
            restored.model,
            restored.params,
            restored.tokenizer,
            restored.config.model.image_size,
            restored.mesh,
            self.batch,
        )
        passed: deque[_Numbered] = deque()

        def examples() -> Iterator[_Numbered]:
            for number, record in records:
                passed.append(_Numbered(f"record {number:,}", record.image, number, record))
                yield passed[-1]

        def rows(batch: Sequence[_Numbered], zimg: Sequence[np.ndarray]) -> Iterator:
            items = [(example.number, example.record) for example in batch]
            return clip_rows(items, zimg, embedder.texts, restored.tokenizer.length)

        blank = np.full(ARCHITECTURES[restored.config.model.arch].embed_dim, np.nan, np.float32)
        for batch, z_nxD in embedder.images(examples(), Skips()):
            whole = {example.number: z for example, z in zip(batch, z_nxD)}
            count = 1 + next(i for i, example in enumerate(passed) if example is batch[-1])
            taken = [passed.popleft() for _ in range(count)]
            yield from rows(taken, [whole.get(example.number, blank) for example in taken])
        yield from rows(passed, [blank] * len(passed))


def chosen(output: Output, shard: int, num_shards: int) -> np.ndarray | None:
    """The numbers of the records of every `num_shards`-th shard file, int64 [n]; None for all."""
    if num_shards == 1:
        return None
    source = output.source
    mine = range(shard, len(source.shards), num_shards)
    ranges = [np.arange(source.ends[i] - source.shards[i].records, source.ends[i]) for i in mine]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error told."""
    args = _parse(argv)
    setup_logging()
    try:
        output = Output.open(args.data)
        if args.numbers:
            numbers = np.load(args.numbers, allow_pickle=False)
        else:
            numbers = chosen(output, args.shard, args.num_shards)
        found = find(args.checkpoint, args.step)
        try:
            scorer = CheckpointScorer(found, args.weights, args.batch)
            missing = Scores(output, scorer.about).count_missing(numbers)
            fill(output, scorer, numbers)
        finally:
            found.checkpoints.close()
    except (RefineError, CheckpointError, ConfigError, EmbeddingError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    log.info("%d records scored now; scores are in %s", missing, output.directory / "scores")
    print(json.dumps(asdict(scorer.about)))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.score",
        description="Scores the texts of a data set against its pictures by a checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder that training wrote")
    add("--data", required=True, type=Path, help="data set that `python -m refine run` wrote")
    add("--step", type=int, help="step to score with [the latest]")
    add("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="[%(default)s]")
    add("--batch", type=int, default=256, help="pictures or texts a step [256]")
    add("--numbers", type=Path, help="an .npy of the records to score, int64, ascending [all]")
    add("--shard", type=int, default=0, help="score only share I of the shards, from 0 on, of ...")
    add("--num-shards", type=int, default=1, help="... N shares, for a job array [1]")
    args = parser.parse_args(argv)
    if args.batch < 1 or not 0 <= args.shard < args.num_shards:
        parser.error("--batch must be above 0, and --shard from 0 to below --num-shards")
    return args


if __name__ == "__main__":
    sys.exit(main())
