"""The mesh, and the one table that says which parameter is split over which axis."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hqclip_jax.config import ConfigError, MeshConfig

P = PartitionSpec

BATCH_AXES = ("replica", "fsdp")  # the batch is split over both, and the same along `tensor`

# First match on the parameter's path wins; the leading None of the stacked blocks is the layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/qkv/bias", P(None, None, "tensor", None)),
    (r"blocks/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/mlp_in/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/mlp_in/bias", P(None, "tensor")),
    (r"blocks/mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r"token_embedding", P("tensor", "fsdp")),
    (r"tag_head/kernel", P("fsdp", "tensor")),
    (r"tag_head/bias", P("tensor")),
    (r"(patch_embed|projection)/kernel", P("fsdp", None)),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, batch: int, devices: list[jax.Device] | None = None) -> Mesh:
    """The `replica × fsdp × tensor` mesh over `devices` (all of them by default).

    Raises:
        ConfigError: the factors don't multiply to the number of devices, or don't divide the batch.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    replica = config.replica
    if replica == -1:
        replica = n // (config.fsdp * config.tensor)
    if replica * config.fsdp * config.tensor != n or replica < 1:
        fits = [
            f"fsdp={f} tensor={config.tensor}"
            for f in range(1, n + 1)
            if n % (f * config.tensor) == 0
        ] or [f"fsdp={f} tensor=1" for f in range(1, n + 1) if n % f == 0]
        raise ConfigError(
            f"mesh.replica={config.replica} × mesh.fsdp={config.fsdp} × mesh.tensor="
            f"{config.tensor} does not make {n} devices; with mesh.replica=-1 these do: "
            + "; ".join(fits)
        )
    split = replica * config.fsdp
    if batch % split:
        lower, upper = batch // split * split, -(-batch // split) * split
        near = " or ".join(str(b) for b in (lower, upper) if b)
        raise ConfigError(
            f"optim.batch={batch} is not divisible by mesh.replica × mesh.fsdp = {split}: "
            f"try {near}"
        )
    shape = (replica, config.fsdp, config.tensor)
    # jax.make_mesh would make Explicit axes, which the towers are not written for.
    return jax.make_mesh(
        shape, ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=np.asarray(devices)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    if len(spec) > len(shape):  # a scalar of the optimizer beside a parameter of that name
        return P()
    # An axis that does not divide its dimension is left whole rather than padded.
    axes = (
        axis if axis is None or shape[i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(spec)
    )
    return P(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of `tree`, by the path of its leaf.

    Optimizer moments lie under the names of their parameters and so get the same shardings.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def bytes_per_device(tree: Any, mesh: Mesh) -> int:
    """Bytes that one device holds of a tree of arrays or shapes, under `tree_shardings`."""
    shardings = tree_shardings(tree, mesh)
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
