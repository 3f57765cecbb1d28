"""The mesh, and the one table that says which parameter is split over which axis."""

import math
import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hqclip_jax.config import ConfigError, MeshConfig

P = PartitionSpec

BATCH_AXES = ("replica", "fsdp")  # the batch is split over both, and the same along `tensor`

# First match on the parameter's path wins; the leading None of the stacked blocks is the layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks/qkv/kernel", P(None, "fsdp", None, "tensor")),
    (r"blocks/qkv/bias", P(None, None, "tensor")),
    (r"blocks/out/kernel", P(None, "tensor", "fsdp")),
    (r"blocks/mlp_in/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/mlp_in/bias", P(None, "tensor")),
    (r"blocks/mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r"token_embedding", P("tensor", "fsdp")),
    (r"tag_head/kernel", P("fsdp", "tensor")),
    (r"tag_head/bias", P("tensor")),
    (r"(patch_embed|projection)/kernel", P("fsdp", None)),
    (r".*", P()),
)


def make_mesh(
    config: MeshConfig, batch: int, devices: list[jax.Device] | None = None, parts: int = 1
) -> Mesh:
    """The `replica × fsdp × tensor` mesh over `devices` (all of them by default).

    Args:
        batch: the global batch, split over replica × fsdp.
        parts: micro-batches, into which each device's share is split.

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
    split = replica * config.fsdp * parts
    if batch % split:
        lower, upper = batch // split * split, -(-batch // split) * split
        near = " or ".join(str(b) for b in (lower, upper) if b)
        micro = " × optim.micro_batches" if parts > 1 else ""
        raise ConfigError(
            f"optim.batch={batch} is not divisible by mesh.replica × mesh.fsdp{micro} = {split}: "
            f"try {near}"
        )
    shape = (replica, config.fsdp, config.tensor)
    # Auto axes: jax.make_mesh would make Explicit ones, which the towers are not written for.
    return Mesh(_arrange(shape, devices), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)


def _arrange(shape: tuple[int, int, int], devices: list[jax.Device]) -> np.ndarray:
    """Neighbours in the mesh are neighbours in the machine; of several slices, joined by a slower
    network, each holds whole copies of the model.

    Raises:
        ConfigError: the slices can't share the copies evenly.
    """
    slices = slices_among(devices)
    replica, fsdp, tensor = shape
    # JAX may call every GPU node a slice. Their devices come node by node, so that a copy of the
    # model stays within one where it fits, and where it does not it may span some.
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if replica % slices:
        raise ConfigError(
            f"mesh.replica={replica} is not divisible by the {slices} slices: a copy of the model "
            f"would span the network between them. Lower mesh.fsdp × mesh.tensor = {fsdp * tensor} "
            f"to a divisor of the {len(devices) // slices} devices of one slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (replica // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def slices_among(devices: list[jax.Device]) -> int:
    """How many TPU slices, or GPU nodes, which JAX may call so."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def reader(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process reads, and into how many it is shared.

    Processes whose devices stand beside each other along `tensor` see the same rows, and so have to
    read the same.

    Raises:
        ConfigError: the mesh gives some processes more rows than others, or a part of another's.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owned: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            owned.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(part)) for part in owned.values()})
    if sum(map(len, shares)) != len(rows) or len({len(share) for share in shares}) != 1:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']} shares the rows of a batch unevenly among "
            f"{len(owned)} processes: take a divisor or a multiple of each one's devices"
        )
    return shares.index(tuple(sorted(owned[jax.process_index()]))), len(shares)


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


def rows_split(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation split over the batch axes; without a mesh, does nothing.

    Told nothing, the compiler may split an activation like the parameters it meets, by features,
    and then every device holds all rows: 96 GiB instead of 16 for `xlarge` on 256 chips.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def rows_per_device(rows: int) -> int:
    """Of an array of so many rows, under the mesh at hand; all where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return rows if mesh.empty else rows // (mesh.shape["replica"] * mesh.shape["fsdp"])


def target() -> tuple[str, int]:
    """What the program at hand is for: "tpu", "gpu" or "cpu", and how many devices share a layer
    over `tensor`, under the mesh at hand or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend(), 1
    return mesh.abstract_device.platform, mesh.shape["tensor"]


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[parts, rows / parts, ...]. Each part takes its rows from all devices alike, so that none has
    to move."""
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(None, BATCH_AXES))


def join_rows(x: jax.Array) -> jax.Array:
    """What `split_rows` took apart, in the same order again."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def gathered(params: Any, dtype: Any, stack: str = "") -> Any:
    """Parameters as a device computes with them: whole over `fsdp`, split over `tensor`.

    Gathered in the compute type, which halves the traffic of bf16, and called where they are used,
    a layer at a time; their gradients are scattered again. Without a mesh, does nothing.

    Args:
        params: a tree of arrays by their names.
        dtype: of the arrays that are gathered.
        stack: name of the stack that this is one layer of; with none, stacks stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def of(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/blocks/" in name:
            return x
        if stack:
            split = P(*_spec(f"{stack}/{name}", (1, *x.shape), mesh)[1:])
        else:
            split = _spec(name, x.shape, mesh)
        if "fsdp" not in split:
            return x
        whole = P(*(None if axis == "fsdp" else axis for axis in split))
        return _gather(x.astype(dtype), whole, split)

    return jax.tree_util.tree_map_with_path(of, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: PartitionSpec, split: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


# JAX's own gradient of a constraint has the same constraint: whole, on every device, and only then
# would it be split.
_gather.defvjp(
    lambda x, whole, split: (_gather(x, whole, split), None),
    lambda whole, split, _, dx: (jax.lax.with_sharding_constraint(dx, split),),
)


def bytes_per_device(tree: Any, mesh: Mesh) -> int:
    """Bytes that one device holds of a tree of arrays or shapes, under `tree_shardings`."""
    shardings = tree_shardings(tree, mesh)
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
