"""What a configuration takes on a pod that is not there: memory, operations, traffic, time."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hqclip_jax.config import Config, ConfigError, MeshConfig
from hqclip_jax.cost import device_memory, recomputed_flops, step_flops
from hqclip_jax.data.tokenizer import make_tokenizer
from hqclip_jax.hardware import CHIPS, Chip, chip_of, topology_devices
from hqclip_jax.hlo import BETWEEN_SLICES, collectives, estimated_cycles
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import make_mesh, slices_among
from hqclip_jax.step import TrainState, batch_shapes, init_state, make_train_step, signal_shapes

GIB = 2**30
GPUS_A_NODE = 8  # as NVIDIA's servers have them


@dataclass(frozen=True)
class Plan:
    """What is known of one configuration on one set of chips.

    Attributes:
        slices: parts of the machine that only the slower network joins: TPU slices, GPU nodes.
        fits: the compiler's word; where nothing was compiled the formula's, and None where that is
            too close to the limit to tell.
        hbm_gib: the compiler's count for one chip, arguments, results that don't take the place of
            one, and temporaries; or what it wanted where it refused; None where nothing was
            compiled.
        memory_gib: the compiler's parts.
        formula_gib: `cost.device_memory`.
        flops: model FLOPs of a step, by part.
        sends: collectives of a step and chip by kind: how many, and bytes.
        mfu: the stated utilisation.
        compiler_s: seconds by the compiler's cost model, without attention's kernels and without
            waiting for other chips: a lower bound; None where nothing was compiled.
    """

    topology: str
    chip: Chip
    chips: int
    slices: int
    config: Config
    mesh: dict[str, int]
    fits: bool | None
    hbm_gib: float | None
    memory_gib: dict[str, float]
    formula_gib: dict[str, float]
    flops: dict[str, float]
    sends: dict[str, tuple[int, int]]
    mfu: float
    compiler_s: float | None
    steps: int
    compile_s: float | None
    note: str = ""

    @property
    def compiled(self) -> bool:
        """Or refused by the compiler."""
        return self.compile_s is not None

    @property
    def by_formula(self) -> float:
        """GiB of a chip."""
        return sum(self.formula_gib.values())

    @property
    def step_s(self) -> float:
        """Seconds at the stated utilisation, or by the compiler's bound where that is beyond it."""
        ideal = sum(self.flops.values()) / (self.chips * self.chip.peak)
        return max(ideal / self.mfu, self.compiler_s or 0)

    @property
    def chip_hours(self) -> float:
        return self.steps * self.step_s * self.chips / 3600

    @property
    def estimate_s(self) -> float:
        """What `--search` ranks by: seconds of operations, repeated ones too, and then of traffic,
        as if nothing overlapped. By the compiler's count of both, where there is one; otherwise at
        the stated utilisation, with the weights gathered in bf16 for each pass of each part and the
        gradients reduced."""
        chip = self.chip
        if self.compiler_s is not None:
            rates = {BETWEEN_SLICES: chip.network}
            sending = (n / rates.get(kind, chip.link) for kind, (_, n) in self.sends.items())
            return self.compiler_s + sum(sending)
        parts, fsdp = self.config.optim.micro_batches, self.mesh["fsdp"]
        # Without remat, a layer's weights stay for the backward pass as they were gathered.
        gathers = 1 + (self.config.model.remat != "none") + (parts > 1) if fsdp > 1 else 0
        share = self.formula_gib["parameters"] * GIB / 2
        flops = sum(self.flops.values()) + recomputed_flops(self.config, self.flops)
        seconds = flops / (self.chips * chip.peak * self.mfu)
        # Of the model in a slice; none where one spans two of them.
        copies = 0 if self.mesh["replica"] % self.slices else self.mesh["replica"] // self.slices
        seconds += share * fsdp * parts * (gathers + 2) / (chip.link if copies else chip.network)
        if copies and self.slices > 1:  # what is left of the sums, there and back
            seconds += 2 * share * parts / copies / chip.network
        return seconds

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"chip": self.chip.name, "hbm_available_gib": self.chip.hbm}
        fields["config"] = self.config.to_json()
        fields["sends"] = {k: {"count": c, "bytes": b} for k, (c, b) in self.sends.items()}
        return fields | {
            "flops_per_step": sum(self.flops.values()),
            "step_s": self.step_s,
            "estimate_s": self.estimate_s,
            "chip_hours": self.chip_hours,
        }


def tags_of(config: Config) -> int:
    """Classes of the tag head, taken to fill the vocabulary."""
    return config.data.tag_vocabulary if config.loss.tag else 0


def init_shapes(config: Config, mesh: Mesh) -> tuple[Any, TrainState, TrainState, Any]:
    """Graph, abstract state, shardings and optimizer of a configuration; nothing is allocated."""
    tx = make_tx(config.optim, 1, 2)
    rows = make_tokenizer(config.data.vocab, config.model.context_length).vocab_size
    return *init_state(config, rows, tags_of(config), tx, mesh)[:3], tx


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The step of training, for the devices of `mesh`, which need not exist.

    Raises:
        jax.errors.JaxRuntimeError: it does not fit.
    """
    graphdef, abstract, shardings, tx = init_shapes(config, mesh)
    weights = jnp.ones(tags_of(config)) if tags_of(config) and config.loss.tag_idf else None
    step = make_train_step(graphdef, tx, config, mesh, shardings, weights)
    return step.lower(abstract, batch_shapes(config, mesh), signal_shapes(mesh)).compile()


def make_plan(
    config: Config,
    topology: str,
    mfu: float,
    slices: int = 1,
    compile_it: bool = True,
    abstract: TrainState | None = None,
) -> Plan:
    """Plans one configuration.

    Args:
        topology: a TPU topology, or a number of GPUs such as `8xH200`, which are only counted: XLA
            can't compile for a GPU that is not there.
        mfu: share of the peak to reckon time with.
        compile_it: without, everything is by formula, which lies within 9% of the compiler's count
            in bench/RESULTS.md, but for one of 19% less, without remat and fsdp.
        abstract: the state's shapes, where they are known from a configuration of the same model.

    Raises:
        ConfigError: an unknown topology, or a mesh that it does not allow.
    """
    chip, devices, note = _chips(topology, slices)
    compile_it = compile_it and not note
    mesh = make_mesh(config.mesh, config.optim.batch, devices, config.optim.micro_batches)
    abstract = abstract or init_shapes(config, mesh)[1]
    formula = device_memory(config, abstract, mesh)
    flops = step_flops(config, tags_of(config))
    hbm = compile_s = compiler_s = None
    guess = sum(formula.values()) / GIB / chip.hbm
    fits = True if guess < 0.8 else False if guess > 1.1 else None
    memory: dict[str, float] = {}
    sends: dict[str, tuple[int, int]] = {}
    if compile_it:
        began, refusal = time.monotonic(), ""
        try:
            compiled = compile_step(config, mesh)
        except jax.errors.JaxRuntimeError as e:
            refusal = str(e)
            # Of the chip's own small memory a kernel takes too much, which no setting mends.
            if "RESOURCE_EXHAUSTED" not in refusal or "memory space vmem" in refusal:
                raise
        compile_s = time.monotonic() - began
        if refusal:
            fits, hbm, note = False, _wanted(refusal), f"compiler: {refusal.splitlines()[0]}"
        else:
            stats = compiled.memory_analysis()
            memory = {
                "arguments": stats.argument_size_in_bytes / GIB,
                "results": (stats.output_size_in_bytes - stats.alias_size_in_bytes) / GIB,
                "temporaries": stats.temp_size_in_bytes / GIB,
            }
            hbm = sum(memory.values())
            memory["peak"] = stats.peak_memory_in_bytes / GIB
            # The compiler refuses for temporaries alone.
            fits = hbm <= chip.hbm
            text = compiled.as_text()
            sends, compiler_s = collectives(text), estimated_cycles(text) / chip.clock
    return Plan(
        topology if slices == 1 else f"{slices} × {topology}", chip, len(devices),
        slices_among(devices), config, dict(mesh.shape), fits, hbm, memory,
        {k: v / GIB for k, v in formula.items()}, flops, sends, mfu,
        compiler_s, config.steps(config.optim.duration, 0, "optim.duration"), compile_s, note,
    )  # fmt: skip


def _chips(topology: str, slices: int) -> tuple[Chip, list[Any], str]:
    """The chip, its devices, and why nothing can be compiled, if so."""
    match = re.fullmatch(r"(\d+)x(\w+)", topology)
    gpus = {chip.name: chip for chip in CHIPS if not chip.kind.startswith("TPU")}
    if match and match[2] in gpus:
        note = (
            "by formula: XLA can't compile for a GPU that is not there. JAX takes three quarters "
            "of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 says otherwise"
        )
        # Only their number and nodes matter; a mesh takes any objects for devices.
        count, nodes = int(match[1]), -(-int(match[1]) // GPUS_A_NODE)
        node = [i // count * nodes + i % count // GPUS_A_NODE for i in range(count * slices)]
        counted = [_Counted(i, n) for i, n in enumerate(node)]
        return gpus[match[2]], counted, note
    devices = topology_devices(topology, slices)
    return chip_of(devices[0]), devices, ""


@dataclass(frozen=True)
class _Counted:
    """Stands for a GPU in a mesh that is only counted."""

    id: int
    slice_index: int  # its node
    platform: str = "gpu"
    device_kind: str = ""
    process_index: int = 0


def _wanted(message: str) -> float | None:
    """GiB that a refused program wanted, from the compiler's message."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([GTM])", message)
    return float(match[1]) * {"M": 1 / 1024, "G": 1, "T": 1024}[match[2]] if match else None


def candidates(
    config: Config, topology: str, mfu: float, slices: int, compiler_decides: bool
) -> list[Plan]:
    """Configurations that may fit by formula, the fastest by `Plan.estimate_s` first.

    Remat policies, sizes of fsdp and micro-batches vary. `mesh.tensor` stays as configured: for
    towers of CLIP's size fsdp saves the same memory for less traffic; and `remat=offload` is left
    out, as it hangs on the hosts' memory.

    Args:
        compiler_decides: keep also those that are up to a third above the limit.

    Raises:
        ConfigError: none is possible, for a reason that has nothing to do with memory.
    """
    chip, devices, note = _chips(topology, slices)
    limit = chip.hbm * (1.3 if compiler_decides and not note else 1)
    abstract = init_shapes(config, make_mesh(MeshConfig(), len(devices), devices))[1]
    plans: list[Plan] = []
    refusal = ConfigError(
        f"mesh.tensor={config.mesh.tensor} is more than the {len(devices) // slices} chips of "
        f"--topology={topology}"
    )
    for variant in _variants(config, len(devices) // slices):
        try:
            plans.append(make_plan(variant, topology, mfu, slices, False, abstract))
        except ConfigError as e:
            refusal = e
    if not plans:
        raise refusal
    fitting = [plan for plan in plans if plan.by_formula < limit]
    return sorted(fitting, key=lambda plan: plan.estimate_s)


def _variants(config: Config, devices: int) -> list[Config]:
    """All combinations worth a thought."""
    powers = [2**i for i in range(11)]
    return [
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            mesh=dataclasses.replace(config.mesh, replica=-1, fsdp=fsdp),
            optim=dataclasses.replace(config.optim, micro_batches=parts),
        )
        for remat in ("none", "dots", "full")
        for fsdp in powers
        for parts in powers[:6]
        if fsdp * config.mesh.tensor <= min(devices, 64)
    ]
