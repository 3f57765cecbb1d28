"""Multinomial logistic regression by L-BFGS: chunk by chunk over rows that are split over devices.

Minimises, as scikit-learn's `LogisticRegression(C=1 / penalty)` does, the cross-entropies' sum plus
penalty / 2 · ‖W‖²; the bias is free. The features are centred and scaled by one number first. As
the bias is free and W is scaled back, this changes no optimum, but the way there is much shorter:
CLIP's embeddings lie in a narrow cone.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hqclip_jax.sharding import BATCH_AXES

MAX_STEPS = 1000  # published (CLIP, appendix A.3)
TOLERANCE = 1e-5  # at 1e-4 and a small penalty, a tenth of the answers are not yet the optimum's
MOST_STALLED = 5  # steps in a row that leave the loss where it is: f32 says no more
CHUNK_ELEMENTS = 1 << 24  # logits at a time on a device: 64 MB

ROWS = PartitionSpec(None, BATCH_AXES)
Params = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Classifier:
    """What was fitted.

    Attributes:
        weight_DxC, bias_C: f32; logits are `z @ weight_DxC + bias_C`.
        gradient: its norm at the end, as a part of its norm where all parameters are 0; of the
            parameters in the units that the solver works in.
        steps: of L-BFGS.
    """

    weight_DxC: np.ndarray
    bias_C: np.ndarray
    gradient: float
    steps: int

    @property
    def converged(self) -> bool:
        """Within ten times the tolerance: at a large penalty f32 has no digits left before it."""
        return self.gradient <= 10 * TOLERANCE

    def logits(self, z_nxD: np.ndarray) -> np.ndarray:
        return z_nxD @ self.weight_DxC + self.bias_C


class Regression:
    """A training set on the devices, to be fitted for one penalty after another.

    A device holds its part of the features (1.28M × 1024 are 5.2 GB over all devices), three
    chunks of 64 MB, and about 25 times the parameters (1024 × 1000: 0.1 GB).

    Args:
        z_nxD: f32.
        label_n: int, from 0 to classes - 1.
        mesh: rows are split over its batch axes. All hosts of a pod give the same rows.
    """

    def __init__(self, z_nxD: np.ndarray, label_n: np.ndarray, classes: int, mesh: Mesh) -> None:
        self.classes, self.mesh, self.n = classes, mesh, len(z_nxD)
        self._mean_D = z_nxD.mean(axis=0, dtype=np.float64).astype(np.float32)
        # The mean of the squares, less the square of the mean: no centred copy of all rows.
        squares = np.einsum("nd,nd->", z_nxD, z_nxD, dtype=np.float64) / z_nxD.size
        variance = squares - np.mean(self._mean_D.astype(np.float64) ** 2)
        self._scale = np.float32(1 / np.sqrt(max(variance, 1e-12)))
        devices = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        own = min(-(-self.n // devices), max(1, CHUNK_ELEMENTS // classes))
        self._chunk = own * devices
        self._z, self._labels = self._place(z_nxD), self._place(label_n.astype(np.int32))
        # An argument, not a constant: with one, a product read memory that nothing had written
        # (XLA for CPUs, jax 0.10.2).
        zeros = np.zeros((z_nxD.shape[1], classes), np.float32), np.zeros(classes, np.float32)
        with jax.transfer_guard_host_to_device("allow"):
            _, grad = jax.device_get(_cross_entropy(zeros, self._z, self._labels, mesh))
        self._norms_at_0 = [float(np.linalg.norm(g)) / self.n for g in grad]

    def fit(
        self, penalty: float, start: Classifier | None = None, tolerance: float = TOLERANCE
    ) -> Classifier:
        """The optimum for one penalty.

        Args:
            start: of another penalty, from which the way is shorter.
            tolerance: of `Classifier.gradient`, at which to stop.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        width = len(self._mean_D)
        weight = np.zeros((width, self.classes), np.float32)
        bias = np.zeros(self.classes, np.float32)
        if start is not None:
            weight = start.weight_DxC / self._scale
            bias = start.bias_C + self._mean_D @ start.weight_DxC
        # In the scaled features' weights, ‖W‖² is scale² times as large.
        l2 = penalty * float(self._scale) ** 2 / self.n
        # The loss's curvature along the bias is about 1 / classes, and l2 comes to it along a
        # weight. In such units both have one, where a large penalty would make a narrow valley.
        unit = 1 / np.sqrt(1 + l2 * self.classes)
        norm_at_0 = np.hypot(unit * self._norms_at_0[0], self._norms_at_0[1])
        numbers = (l2, unit, self.n, tolerance * norm_at_0)
        with jax.transfer_guard_host_to_device("allow"):
            (weight, bias), norm, steps = jax.device_get(
                _fit(
                    self._z, self._labels, (weight / np.float32(unit), bias),
                    *map(np.float32, numbers), mesh=self.mesh,
                )
            )  # fmt: skip
        weight = weight * np.float32(unit * self._scale)
        gradient = float(norm / norm_at_0) if norm_at_0 else 0.0
        if not np.isfinite(gradient):
            raise FloatingPointError(f"the probe's gradient is {gradient} at penalty {penalty:g}")
        return Classifier(weight, bias - self._mean_D @ weight, gradient, int(steps))

    def _place(self, rows: np.ndarray) -> jax.Array:
        """[chunks, rows, ...]; rows that only fill up have the label -1."""
        chunk = self._chunk
        shape = -(-self.n // chunk), chunk, *rows.shape[1:]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[1].indices(chunk)
            fill = -1 if rows.ndim == 1 else 0
            out = np.full((shape[0], last - first, *shape[2:]), fill, rows.dtype)
            for i in range(shape[0]):
                own = rows[i * chunk + first : i * chunk + last]
                out[i, : len(own)] = own if rows.ndim == 1 else (own - self._mean_D) * self._scale
            return out

        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, ROWS), part)


@functools.partial(jax.jit, static_argnames="mesh")
def _fit(
    z: jax.Array, labels: jax.Array, start: Params, l2: jax.Array, unit: jax.Array,
    n: jax.Array, enough: jax.Array, mesh: Mesh,
) -> tuple[Params, jax.Array, jax.Array]:  # fmt: skip
    """The parameters, the weight in `unit`s, the gradient's norm there, and the number of steps."""

    def value_and_grad(params: Params) -> tuple[jax.Array, Params]:
        weight, bias = params[0] * unit, params[1]
        loss, grad = _cross_entropy((weight, bias), z, labels, mesh)
        value = loss / n + l2 / 2 * jnp.vdot(weight, weight)
        return value, ((grad[0] / n + l2 * weight) * unit, grad[1] / n)

    @jax.custom_vjp
    def value(params: Params) -> jax.Array:
        return value_and_grad(params)[0]

    # One pass gives both: differentiating the scan would read all rows twice.
    value.defvjp(value_and_grad, lambda grad, ct: (jax.tree.map(lambda g: g * ct, grad),))

    optimizer = optax.lbfgs()
    known = optax.value_and_grad_from_state(value)

    def step(carry: tuple) -> tuple:
        params, state, _, stalled, steps = carry
        loss, grad = known(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=loss, grad=grad, value_fn=value
        )
        params = optax.apply_updates(params, updates)
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        stalled = jnp.where(optax.tree.get(state, "value") < loss, 0, stalled + 1)
        return params, state, norm, stalled, steps + 1

    def goes_on(carry: tuple) -> jax.Array:
        _, _, norm, stalled, steps = carry
        return (norm > enough) & (stalled < MOST_STALLED) & (steps < MAX_STEPS)

    first = optax.tree.norm(value_and_grad(start)[1])
    carry = start, optimizer.init(start), first, 0, 0
    params, _, norm, _, steps = jax.lax.while_loop(goes_on, step, carry)
    return params, norm, steps


@functools.partial(jax.jit, static_argnames="mesh")
def _cross_entropy(
    params: Params, z: jax.Array, labels: jax.Array, mesh: Mesh
) -> tuple[jax.Array, Params]:
    """The sum over all rows and its gradient; of the logits only a chunk exists at a time."""

    def own_rows(params: Params, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, Params]:
        weight_DxC, bias_C = params

        def chunk(sums: tuple, rows: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            z_cxD, label_c = rows
            # In bf16 passes, a TPU's default, the line search would see noise.
            logits_cxC = jnp.dot(z_cxD, weight_DxC, precision="highest") + bias_C
            counts_cx1 = (label_c >= 0).astype(jnp.float32)[:, None]
            own_cxC = jax.nn.one_hot(label_c, len(bias_C))
            logp_cxC = jax.nn.log_softmax(logits_cxC)
            error_cxC = jnp.exp(logp_cxC) * counts_cx1 - own_cxC
            weight = jnp.dot(z_cxD.T, error_cxC, precision="highest")
            found = -jnp.vdot(own_cxC, logp_cxC), (weight, error_cxC.sum(axis=0))
            return jax.tree.map(jnp.add, sums, found), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.psum(jax.lax.scan(chunk, zeros, (z, labels))[0], BATCH_AXES)

    return jax.shard_map(
        own_rows, mesh=mesh, in_specs=(PartitionSpec(), ROWS, ROWS), out_specs=PartitionSpec(),
        check_vma=False,
    )(params, z, labels)  # fmt: skip
