"""Small pipelines over rendered data sets, and what they yield."""

from itertools import islice
from pathlib import Path

import numpy as np

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from hqclip_jax.data.pipeline import NumpyBatch, Pipeline
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import ClipTokenizer


def pipeline(
    path: Path | str,
    batch: int = 8,
    position: dict[str, int] | None = None,
    log: Path | None = None,
    context: int = 12,
    **data,
) -> Pipeline:
    config = Config(
        model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=context),
        data=DataConfig(path=str(path), **{"threads": 2, "prefetch": 2} | data),
        optim=OptimConfig(batch=batch),
    )
    tags = TagVocabulary.from_datasets([s.path for s in config_lib.sources(str(path))], 100)
    return Pipeline(config, ClipTokenizer(context), tags, position, log)


def take(p: Pipeline, count: int, host: int = 0, hosts: int = 1) -> list[NumpyBatch]:
    batches = p.batches(host, hosts)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def join(batches: list[NumpyBatch]) -> NumpyBatch:
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def on_hosts(p: Pipeline, count: int, hosts: int) -> list[NumpyBatch]:
    """The global batches that so many hosts make together."""
    parts = [take(p, count, host, hosts) for host in range(hosts)]
    return [join(batch) for batch in zip(*parts)]


def same(a: NumpyBatch, b: NumpyBatch) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


def uids(batches: list[NumpyBatch]) -> list[str]:
    return [uid.decode() for uid in join(batches)["uid"]]
