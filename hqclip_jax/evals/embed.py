"""Images and texts to embeddings: decoding ahead in threads, fixed shapes, the whole mesh."""

import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hqclip_jax.data.image import ImageError, eval_transform
from hqclip_jax.data.text import clean
from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.sharding import BATCH_AXES, batch_sharding, replicated

log = logging.getLogger("hqclip_jax.evals")

AHEAD = 2  # batches that are decoded while the device works on another
_DROP, _USE, _STOP, _FAIL = range(4)  # what a host says of each of its rows

E = TypeVar("E", bound=Example)
T = TypeVar("T")


class EmbeddingError(RuntimeError):
    """The model's embeddings are of no use; the message says why."""


class Stopped(RuntimeError):
    """`Embedder.stop` asked for it; raised on all hosts at the same batch."""


@functools.lru_cache(maxsize=8)
def _encoders(graphdef: nnx.GraphDef, mesh: Mesh) -> tuple[Callable, Callable]:
    """Jitted once per architecture and mesh, however many embedders training makes.

    The result is replicated, so that every host of a pod can read all of it: the embeddings, and
    what each host said of its rows.
    """

    def encode(method: str) -> Callable:
        def apply(params: Any, batch: jax.Array, said_b: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return getattr(nnx.merge(graphdef, params), method)(batch), said_b

        return jax.jit(apply, out_shardings=replicated(mesh))

    return encode("encode_image"), encode("encode_text")


class Embedder:
    """A model's two towers as functions from encoded images and strings to numpy arrays.

    On a pod every host must call the same methods with the same data: each decodes the rows of its
    own devices, and all get all embeddings.

    Args:
        graphdef: of a module with `encode_image` (uint8 [b, s, s, 3]) and `encode_text`
            (int32 [b, L]), both to unit vectors f32 [b, D].
        params: pure dict; arrays that lie on the mesh stay as they are, others are replicated.
        tokenizer: cleaned texts to int32 [n, L].
        image_size: s, pixels.
        mesh: with the axes of `hqclip_jax.sharding`.
        batch: images or texts per step over the whole mesh, rounded up to what divides it.
        threads: decoding threads; by default one per core.

    Attributes:
        on_embedded: called with the number of images or texts that were just embedded.
        stop: asked before each batch, on each host; `Stopped` follows where one says yes.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Callable[[Sequence[str]], np.ndarray],
        image_size: int,
        mesh: Mesh,
        batch: int = 256,
        threads: int | None = None,
    ) -> None:
        rows = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        self.batch = -(-batch // rows) * rows
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.mesh = mesh
        self.threads = threads or os.cpu_count()
        self.on_embedded: Callable[[int], None] | None = None
        self.stop: Callable[[], bool] = lambda: False
        self._sharding = batch_sharding(mesh)
        own = self._sharding.addressable_devices_indices_map((self.batch,)).values()
        self._own = {row for (rows,) in own for row in range(self.batch)[rows]}
        self._encode_image, self._encode_text = _encoders(graphdef, mesh)
        on_mesh = set(mesh.devices.flat)
        self._params = jax.tree.map(
            lambda x: (
                x
                if isinstance(x, jax.Array) and x.sharding.device_set == on_mesh
                else jax.device_put(x, replicated(mesh))
            ),
            params,
        )

    def images(
        self, examples: Iterable[E], skips: Skips | None = None
    ) -> Iterator[tuple[list[E], np.ndarray]]:
        """Yields the examples in order, batch by batch, each batch with its f32 [n, D].

        Args:
            skips: counts images that do not decode, which are left out on all hosts.

        Raises:
            EvalDataError: an image does not decode, and no `skips` are given.
            EmbeddingError: an embedding is not finite.
            Stopped: a host was asked to stop.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for batch, z_nxD, said_n in self._stream(
                    self._decoded(examples, pool), self._encode_image
                ):
                    for example in (e for e, said in zip(batch, said_n) if said == _DROP):
                        if skips is None:
                            raise EvalDataError(f"{example.source} does not decode: fetch it again")
                        skips.add("image does not decode", example.source)
                    used = [e for e, said in zip(batch, said_n) if said == _USE]
                    if used:
                        yield used, z_nxD[said_n == _USE]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """f32 [n, D]. Texts of equal token ids, cut ends included, get equal embeddings to the bit.

        Raises:
            EmbeddingError: an embedding is not finite.
        """
        tokens = np.asarray(self.tokenizer([clean(text) for text in texts]))
        unique, index = np.unique(tokens, axis=0, return_inverse=True)
        rows = (
            (batch, np.stack(batch), np.full(len(batch), _USE, np.int8))
            for batch in _batched(unique, self.batch)
        )
        z = np.concatenate([z for _, z, _ in self._stream(rows, self._encode_text)])
        return z[index.reshape(-1)]

    def _decoded(
        self, examples: Iterable[E], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[E], np.ndarray, np.ndarray]]:
        waiting: deque = deque()
        batches, failure = _batched(examples, self.batch), None
        while not failure:
            try:
                batch = next(batches, None)
            except Exception as e:
                failure = e
                continue
            if batch is None:
                break
            own = [i for i in range(len(batch)) if i in self._own]
            waiting.append((batch, own, [pool.submit(self._decode, batch[i]) for i in own]))
            if len(waiting) > AHEAD:
                yield self._collected(*waiting.popleft())
        for each in waiting:
            yield self._collected(*each)
        if jax.process_count() > 1:
            # A host that fails alone has to tell the others, which would wait for its rows. They
            # hear of it one batch late, so that everywhere two more follow the last one.
            said = np.full(self.batch, _FAIL if failure else _DROP, np.int8)
            for _ in range(2):
                yield [], self._collected([], [], [])[1], said
        if failure:
            raise failure

    def _collected(
        self, batch: list[E], own: list[int], futures: list[Future]
    ) -> tuple[list[E], np.ndarray, np.ndarray]:
        pixels = np.zeros((len(batch), self.image_size, self.image_size, 3), np.uint8)
        said_n = np.full(len(batch), _USE, np.int8)
        for row, future in zip(own, futures):
            decoded = future.result()
            if decoded is None:
                said_n[row] = _DROP
            else:
                pixels[row] = decoded
        return batch, pixels, said_n

    def _decode(self, example: Example) -> np.ndarray | None:
        try:
            return eval_transform(example.rgb(), self.image_size)
        except ImageError as e:
            log.warning("%s: %s", example.source, e)
            return None

    def _stream(
        self, batches: Iterable[tuple[list[T], np.ndarray, np.ndarray]], encode: Callable
    ) -> Iterator[tuple[list[T], np.ndarray, np.ndarray]]:
        """Encodes each batch while the one before it is fetched, so that the device never waits."""
        before = None
        for items, rows, said_n in batches:
            said_n = np.full(self.batch, _STOP, np.int8) if self.stop() else said_n
            now = items, *encode(self._params, self._put(rows), self._put(said_n))
            if before:
                yield self._fetch(*before)
            before = now
        if before:
            yield self._fetch(*before)

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Pads with zeros to the one shape that was compiled, and splits over the mesh."""
        padded = np.zeros((self.batch, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        with jax.transfer_guard_host_to_device("allow"):  # JAX counts this form as implicit
            return jax.make_array_from_callback(padded.shape, self._sharding, lambda i: padded[i])

    def _fetch(
        self, items: list[T], z_bxD: jax.Array, said_b: jax.Array
    ) -> tuple[list[T], np.ndarray, np.ndarray]:
        z_bxD, said_b = jax.device_get((z_bxD, said_b))
        if (said_b == _STOP).any():
            raise Stopped("the evaluation was asked to stop")
        if (said_b == _FAIL).any() and not (said_b[sorted(self._own)] == _FAIL).any():
            raise EvalDataError("another host could not read the set, and says why")
        z_nxD, said_n = z_bxD[: len(items)], said_b[: len(items)]
        if not np.isfinite(z_nxD[said_n == _USE]).all():
            # NaN compares as smaller than anything: it would score, and score well.
            raise EmbeddingError("embeddings are not finite: the checkpoint has diverged")
        if self.on_embedded:
            self.on_embedded(len(items))
        return items, z_nxD, said_n


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`itertools.batched`, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
