"""Images and texts to embeddings: decoding ahead in threads, fixed shapes, the whole mesh."""

import functools
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hqclip_jax.data.image import eval_transform
from hqclip_jax.data.text import clean
from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.sharding import BATCH_AXES, batch_sharding, replicated

log = logging.getLogger("hqclip_jax.evals")

AHEAD = 2  # batches that are decoded while the device works on another
_GO, _STOP, _FAIL = range(3)  # what a host tells the others with each batch

E = TypeVar("E", bound=Example)
T = TypeVar("T")


class _Ready(NamedTuple):
    """A batch on its way to the devices, and what this host tells the others with it."""

    items: list
    rows: np.ndarray  # [n, ...]
    used_b: np.ndarray | None = None  # bool [batch]: False where an item of ours is of no use
    signal: int = _GO
    digest: int = 0  # of the items' names


class EmbeddingError(RuntimeError):
    """The model's embeddings are of no use; the message says why."""


class Stopped(RuntimeError):
    """`Embedder.stop` asked for it; raised on all hosts at the same batch."""


@functools.lru_cache(maxsize=8)
def _encoders(graphdef: nnx.GraphDef, mesh: Mesh) -> tuple[Callable, Callable]:
    """Jitted once per architecture and mesh, however many embedders training makes.

    The result is replicated, so that every host of a pod can read all of it: the embeddings, and
    what each host told with the batch.
    """

    def encode(method: str) -> Callable:
        def apply(params: Any, batch: jax.Array, told: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return getattr(nnx.merge(graphdef, params), method)(batch), told

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
        # A row of what is told for each device, as in `signals.send`: hosts beside each other along
        # `tensor` hold the same images, and may have different things to tell.
        self._told_sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        rows_of = self._sharding.devices_indices_map((self.batch,))
        self._rows = np.array([np.arange(self.batch)[rows_of[d]] for d in mesh.devices.flat])
        here = [d.process_index == jax.process_index() for d in mesh.devices.flat]
        self._own = set(self._rows[here].flat)
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
                decoded = self._decoded(examples, pool)
                for batch, z_nxD, used_n in self._stream(decoded, self._encode_image):
                    for example in (e for e, used in zip(batch, used_n) if not used):
                        if skips is None:
                            raise EvalDataError(f"{example.source} does not decode: fetch it again")
                        skips.add("image does not decode", example.source)
                    if used_n.any():
                        yield [e for e, used in zip(batch, used_n) if used], z_nxD[used_n]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """f32 [n, D]. Texts of equal token ids, cut ends included, get equal embeddings to the bit.

        Raises:
            EmbeddingError: an embedding is not finite.
        """
        tokens = np.asarray(self.tokenizer([clean(text) for text in texts]))
        unique, index = np.unique(tokens, axis=0, return_inverse=True)
        rows = (_Ready(batch, np.stack(batch)) for batch in _batched(unique, self.batch))
        z = np.concatenate([z for _, z, _ in self._stream(rows, self._encode_text)])
        return z[index.reshape(-1)]

    def _decoded(self, examples: Iterable[E], pool: ThreadPoolExecutor) -> Iterator["_Ready"]:
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
            for _ in range(2):
                last = self._collected([], [], [])
                yield last._replace(signal=_FAIL if failure else _GO)
        if failure:
            raise failure

    def _collected(self, batch: list[E], own: list[int], futures: list[Future]) -> "_Ready":
        pixels = np.zeros((len(batch), self.image_size, self.image_size, 3), np.uint8)
        used_b = np.ones(self.batch, bool)
        for row, future in zip(own, futures):
            decoded = future.result()
            if decoded is None:
                used_b[row] = False
            else:
                pixels[row] = decoded
        names = "\n".join(example.source for example in batch).encode("utf-8", "surrogateescape")
        return _Ready(batch, pixels, used_b, digest=zlib.crc32(names) >> 1)

    def _decode(self, example: Example) -> np.ndarray | None:
        try:
            return eval_transform(example.rgb(), self.image_size)
        except Exception as e:  # Pillow's own too: what one picture has must not end a host alone
            log.warning("%s: %s", example.source, e)
            return None

    def _stream(
        self, batches: Iterable["_Ready"], encode: Callable
    ) -> Iterator[tuple[list, np.ndarray, np.ndarray]]:
        """Encodes each batch while the one before it is fetched, so that the device never waits.

        Yields:
            the items, their embeddings f32 [n, D], and which were whole, bool [n].
        """
        before = None
        for ready in batches:
            ready = ready._replace(signal=_STOP) if self.stop() else ready
            rows = np.zeros((self.batch, *ready.rows.shape[1:]), ready.rows.dtype)
            rows[: len(ready.rows)] = ready.rows
            sent = (
                self._put(rows, self._sharding),
                self._put(self._tell(ready), self._told_sharding),
            )
            now = ready, *encode(self._params, *sent)
            if before:
                yield self._fetch(*before)
            before = now
        if before:
            yield self._fetch(*before)

    def _tell(self, ready: "_Ready") -> np.ndarray:
        """int32 [devices, 2 + rows of a device]: the signal, which batch it is, what was whole."""
        told = np.ones((len(self._rows), 2 + self._rows.shape[1]), np.int32)
        told[:, 0], told[:, 1] = ready.signal, ready.digest
        if ready.used_b is not None:
            told[:, 2:] = ready.used_b[self._rows]
        return told

    def _put(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):  # JAX counts this form as implicit
            return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    def _fetch(
        self, ready: "_Ready", z_bxD: jax.Array, told: jax.Array
    ) -> tuple[list, np.ndarray, np.ndarray]:
        """What it raises it raises on all hosts, but a failure's own on the host that failed."""
        z_bxD, told = jax.device_get((z_bxD, told))
        if (told[:, 0] == _STOP).any():
            raise Stopped("the evaluation was asked to stop")
        if (told[:, 0] == _FAIL).any() and ready.signal != _FAIL:
            raise EvalDataError("another host could not read the set, and says why")
        if (told[:, 0] == _GO).all() and len({*told[:, 1].tolist()}) > 1:
            raise EvalDataError(
                "the hosts read different pictures: give all of them the same files (the first "
                f"here is {ready.items[0].source if ready.items else 'none, it has ended'})"
            )
        used_b = np.ones(self.batch, bool)
        for rows, used in zip(self._rows, told[:, 2:]):
            used_b[rows] &= used.astype(bool)
        count = len(ready.items)
        z_nxD, used_n = z_bxD[:count], used_b[:count]
        if not np.isfinite(z_nxD[used_n]).all():
            # NaN compares as smaller than anything: it would score, and score well.
            raise EmbeddingError("embeddings are not finite: the checkpoint has diverged")
        if self.on_embedded:
            self.on_embedded(count)
        return ready.items, z_nxD, used_n


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`itertools.batched`, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
