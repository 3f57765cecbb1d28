"""Will this configuration run on that pod, and what will it cost? Answered without the pod.

    python -m hqclip_jax.plan --config=configs/xlarge.py --topology=v5e:16x16

Compiles the very step that training runs for a TPU topology, on any machine with libtpu, and prints
whether it fits, what fills the memory, the operations of a step by part, what crosses the network,
and the time and chip-hours at a stated utilisation. `--search` looks for the configuration to use.
All figures of the compiler are plans, not readings from a chip.
"""

import argparse
import dataclasses
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, ConfigError, MeshConfig
from hqclip_jax.cost import device_memory, recomputed_flops, step_flops
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.hardware import CHIPS, Chip, chip_of, topology_devices
from hqclip_jax.hlo import collectives, estimated_cycles
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import TrainState, batch_shapes, init_state, make_train_step

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What is known of one configuration on one set of chips.

    Attributes:
        fits: None where nothing was compiled.
        hbm_gib: the compiler's count for one chip, arguments, results that don't take the place of
            one, and temporaries; or what it wanted where it refused; None where nothing was
            compiled.
        memory_gib: the compiler's parts.
        formula_gib: `cost.device_memory`.
        flops: model FLOPs of a step, by part.
        sends: collectives of a step and chip by kind: how many, and bytes.
        step_s: seconds at the stated utilisation.
        compiler_s: seconds by the compiler's cost model, without attention's kernels and without
            waiting for other chips: a lower bound; None where nothing was compiled.
    """

    topology: str
    chip: Chip
    chips: int
    config: Config
    mesh: dict[str, int]
    fits: bool | None
    hbm_gib: float | None
    memory_gib: dict[str, float]
    formula_gib: dict[str, float]
    flops: dict[str, float]
    sends: dict[str, tuple[int, int]]
    mfu: float
    step_s: float
    compiler_s: float | None
    steps: int
    compile_s: float | None
    note: str = ""

    @property
    def chip_hours(self) -> float:
        return self.steps * self.step_s * self.chips / 3600

    @property
    def estimate_s(self) -> float:
        """What `--search` ranks by: seconds of operations, repeated ones too, and then of traffic,
        as if nothing overlapped. By the compiler's count of both, where there is one; otherwise at
        the stated utilisation, with the weights gathered in bf16 for each pass of each part and the
        gradients reduced."""
        if self.compiler_s is not None:
            return self.compiler_s + sum(size for _, size in self.sends.values()) / self.chip.link
        parts, fsdp = self.config.optim.micro_batches, self.mesh["fsdp"]
        gathers = 2 + (parts > 1) + (self.config.model.remat == "full") if fsdp > 1 else 0
        weights = self.formula_gib["parameters"] * GIB / 2 * fsdp
        flops = sum(self.flops.values()) + recomputed_flops(self.config, self.flops)
        computing = flops / (self.chips * self.chip.peak * self.mfu)
        return computing + weights * parts * (gathers + 2) / self.chip.link

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"chip": self.chip.name, "hbm_available_gib": self.chip.hbm}
        model, optim = self.config.model, self.config.optim
        fields["config"] = {
            "arch": model.arch, "image_size": model.image_size,
            "context_length": model.context_length, "remat": model.remat, "batch": optim.batch,
            "micro_batches": optim.micro_batches,
        }  # fmt: skip
        fields["sends"] = {k: {"count": c, "bytes": b} for k, (c, b) in self.sends.items()}
        return fields | {
            "flops_per_step": sum(self.flops.values()),
            "estimate_s": self.estimate_s,
            "chip_hours": self.chip_hours,
        }


def tags_of(config: Config) -> int:
    """Classes of the tag head, taken to fill the vocabulary."""
    return config.data.tag_vocabulary if config.loss.tag else 0


def init_shapes(config: Config, mesh: Mesh) -> tuple[Any, TrainState, TrainState, Any]:
    """Graph, abstract state, shardings and optimizer of a configuration; nothing is allocated."""
    tx = make_tx(config.optim, 1, 2)
    return *init_state(config, ClipTokenizer.vocab_size, tags_of(config), tx, mesh)[:3], tx


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The step of training, for the devices of `mesh`, which need not exist.

    Raises:
        jax.errors.JaxRuntimeError: it does not fit.
    """
    graphdef, abstract, shardings, tx = init_shapes(config, mesh)
    step = make_train_step(graphdef, tx, config, mesh, shardings)
    return step.lower(abstract, batch_shapes(config, mesh)).compile()


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
        compile_it: without, everything is by formula.
        abstract: the state's shapes, where they are known from a configuration of the same model.

    Raises:
        ConfigError: an unknown topology, or a mesh that it does not allow.
    """
    chip, devices, note = _chips(topology, slices)
    if note:
        compile_it = False
    mesh = make_mesh(config.mesh, config.optim.batch, devices, config.optim.micro_batches)
    abstract = abstract or init_shapes(config, mesh)[1]
    formula = device_memory(config, abstract, mesh)
    flops = step_flops(config, tags_of(config))
    fits = hbm = compile_s = compiler_s = None
    memory: dict[str, float] = {}
    sends: dict[str, tuple[int, int]] = {}
    if compile_it:
        began = time.monotonic()
        try:
            compiled = compile_step(config, mesh)
            compile_s = time.monotonic() - began
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            fits, hbm, note = False, _wanted(str(e)), f"compiler: {str(e).splitlines()[0]}"
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
        topology if slices == 1 else f"{slices} × {topology}", chip, len(devices), config,
        dict(mesh.shape), fits, hbm, memory, {k: v / GIB for k, v in formula.items()}, flops, sends,
        mfu, sum(flops.values()) / (len(devices) * chip.peak * mfu), compiler_s,
        # Epochs need a data set; the published schedules are in samples.
        config.steps(config.optim.duration, 1_000_000, "optim.duration"), compile_s, note,
    )  # fmt: skip


def _chips(topology: str, slices: int) -> tuple[Chip, list[Any], str]:
    """The chip, its devices, and why nothing can be compiled, if so."""
    match = re.fullmatch(r"(\d+)x(\w+)", topology)
    gpus = {chip.name: chip for chip in CHIPS if not chip.kind.startswith("TPU")}
    if match and match[2] in gpus:
        note = "by formula: XLA can't compile for a GPU that is not there"
        # Only their number matters; a mesh takes any objects for devices.
        return gpus[match[2]], [_Counted(i) for i in range(int(match[1]) * slices)], note
    devices = topology_devices(topology, slices)
    return chip_of(devices[0]), devices, ""


@dataclass(frozen=True)
class _Counted:
    """Stands for a GPU in a mesh that is only counted."""

    id: int
    platform: str = "gpu"
    device_kind: str = ""
    process_index: int = 0
    slice_index: int = 0


def _wanted(message: str) -> float | None:
    """GiB that a refused program wanted, from the compiler's message."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([GTM])", message)
    return float(match[1]) * {"M": 1 / 1024, "G": 1, "T": 1024}[match[2]] if match else None


def search(
    config: Config,
    topology: str,
    mfu: float,
    slices: int,
    compile_them: bool,
    finalists: int,
    console: Console,
) -> list[Plan]:
    """Configurations that fit, fastest first.

    Remat policies, sizes of fsdp and micro-batches are ranked by `Plan.estimate_s`, those that by
    formula don't fit are dropped, and the best are compiled until `finalists` fit and ranked once
    more. `mesh.tensor` stays as configured: for towers of CLIP's size fsdp saves the same memory
    for less traffic.
    """
    chip, devices, note = _chips(topology, slices)
    # The formula is within a third of the compiler, which has the last word where it is asked.
    limit = chip.hbm * (1.3 if compile_them and not note else 1)
    candidates = []
    abstract = init_shapes(config, make_mesh(MeshConfig(), len(devices), devices))[1]
    for variant in _variants(config, len(devices) // slices):
        try:
            plan = make_plan(variant, topology, mfu, slices, False, abstract)
        except ConfigError:
            continue
        if sum(plan.formula_gib.values()) < limit:
            candidates.append(plan)
    candidates.sort(key=lambda plan: plan.estimate_s)
    fitting: list[Plan] = []
    with console.status("") as status:
        for i, plan in enumerate(candidates):
            if len(fitting) == finalists:
                break
            status.update(
                f"{_name(plan)}: candidate {i + 1} of {len(candidates)}, "
                f"{len(fitting)} of {finalists} found"
            )
            tried = make_plan(plan.config, topology, mfu, slices, compile_them)
            said = {True: "fits", False: "does not fit", None: "by formula"}[tried.fits]
            size = tried.hbm_gib or sum(tried.formula_gib.values())
            console.print(f"{_name(tried)}: {said}, {size:.1f} of {chip.hbm:g} GiB", soft_wrap=True)
            if tried.fits is not False:
                fitting.append(tried)
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


def _name(plan: Plan) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    parts = plan.config.optim.micro_batches
    return f"{mesh} remat={plan.config.model.remat} micro_batches={parts}"


def show_ranking(plans: Sequence[Plan], console: Console) -> None:
    """What `search` found, a line each."""
    table = Table("replica × fsdp × tensor", "remat", title="fastest first", title_justify="left")
    for column in ("micro-batches", "GiB", "computing", "sending", "both"):
        table.add_column(column, justify="right")
    for plan in plans:
        seconds = ["", "", f"{plan.estimate_s:.2f} s"]
        if plan.compiler_s is not None:
            sending = plan.estimate_s - plan.compiler_s
            seconds[:2] = f"{plan.compiler_s:.2f} s", f"{sending:.2f} s"
        mesh = " × ".join(str(n) for n in plan.mesh.values())
        parts = str(plan.config.optim.micro_batches)
        size = plan.hbm_gib or sum(plan.formula_gib.values())
        table.add_row(mesh, plan.config.model.remat, parts, f"{size:.2f}", *seconds)
    console.print(table)


def show(plan: Plan, console: Console) -> None:
    """The plan as tables for people."""
    config, verdict = plan.config, {True: "[green]fits[/]", False: "[red]does not fit[/]"}
    console.print(
        f"[bold]{config.model.arch}[/], {config.model.image_size} px, "
        f"{config.model.context_length} tokens, batch {config.optim.batch:,} on {plan.chips} chips "
        f"({plan.topology}): {verdict.get(plan.fits, 'not compiled')}"
    )
    console.print(f"{_name(plan)}" + (f"\n{plan.note}" if plan.note else ""))
    table = Table("memory of a chip", title="GiB", title_justify="left")
    table.add_column("", justify="right")
    if plan.hbm_gib is not None:
        of = f"{plan.hbm_gib:.2f} of {plan.chip.hbm:g}"
        table.add_row("[bold]compiler: in all[/]", of)
    for name, size in plan.memory_gib.items():
        table.add_row(f"compiler: {name}", f"{size:.2f}")
    for name, size in plan.formula_gib.items():
        table.add_row(f"formula: {name}", f"{size:.2f}")
    table.add_row("formula: sum", f"{sum(plan.formula_gib.values()):.2f}")
    console.print(table)
    table = Table("operations of a step", title="model PFLOP", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("share", justify="right")
    total = sum(plan.flops.values())
    for name, flops in plan.flops.items():
        table.add_row(name, f"{flops / 1e15:.3f}", f"{flops / total:.1%}")
    table.add_row("[bold]sum[/]", f"{total / 1e15:.3f}", "")
    console.print(table)
    if plan.sends:
        table = Table("a chip's collectives", title="of a step", title_justify="left")
        table.add_column("count", justify="right")
        table.add_column("MiB", justify="right")
        for kind, (count, size) in sorted(plan.sends.items()):
            table.add_row(kind, f"{count:,}", f"{size / 2**20:,.1f}")
        console.print(table)
    if plan.compile_s is not None:
        console.print(f"compiled in {plan.compile_s:.0f} s")
    if plan.compiler_s:
        bound = plan.mfu * plan.step_s / plan.compiler_s
        console.print(
            f"by the compiler's cost model, attention and waiting for other chips apart: "
            f"{plan.compiler_s:.2f} s a step, {bound:.0%} of the peak"
        )
    console.print(
        f"at {plan.mfu:.0%} of the peak: {plan.step_s:.2f} s a step, "
        f"{config.optim.batch / plan.step_s:,.0f} images/s; {plan.steps:,} steps take "
        f"{plan.steps * plan.step_s / 86400:.1f} days, {plan.chip_hours:,.0f} chip-hours"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hqclip_jax.plan",
        description=__doc__,
        epilog="chips: "
        + ", ".join(chip.name for chip in CHIPS)
        + "\nexit status: 0 fits (or by formula), 1 does not fit, 2 wrong configuration",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]",
        help="as for training; override a field with --config.FIELD=VALUE",
    )  # fmt: skip
    parser.add_argument(
        "--topology", required=True,
        help="generation and shape in chips, such as v5e:16x16, v4:4x4x4 or v5p:2x4x4; GPUs as "
        "8xH200, by formula",
    )  # fmt: skip
    parser.add_argument("--slices", type=int, default=1, help="such topologies, joined [1]")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak to reckon time with [0.4]"
    )
    parser.add_argument(
        "--search", type=int, nargs="?", const=3, metavar="N",
        help="try remat policies, meshes and micro-batches until N [3] fit",
    )  # fmt: skip
    parser.add_argument(
        "--formula", action="store_true", help="compile nothing: seconds instead of minutes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # Planning needs no accelerator, and must not take the one that a training run holds.
    jax.config.update("jax_platforms", "cpu")
    logging.basicConfig(level=logging.WARNING)
    # Tables are for people, and go where they don't spoil the JSON.
    console = Console(stderr=True) if "--json" in argv else Console()
    try:
        overrides, rest = config_lib.split_overrides(argv)
        args = _parser().parse_args(rest)
        config = config_lib.load(args.config, overrides)
        question = (config, args.topology, args.mfu, args.slices, not args.formula)
        plans = search(*question, args.search, console) if args.search else [make_plan(*question)]
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.json:
        found = [plan.to_json() for plan in plans]
        print(json.dumps({"plans": found} if args.search else found[0]))
    elif plans:
        if args.search:
            show_ranking(plans, console)
        show(plans[0], console)
    if not plans:
        print("nothing fits: take more chips or a smaller batch", file=sys.stderr)
    return 0 if plans and all(plan.fits is not False for plan in plans) else 1


if __name__ == "__main__":
    sys.exit(main())
