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
import math
import sys
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, ConfigError
from hqclip_jax.data.tokenizer import TokenizerError
from hqclip_jax.hardware import CHIPS
from hqclip_jax.planner import Plan, candidates, make_plan


def search(
    config: Config,
    topology: str,
    mfu: float,
    slices: int,
    compile_them: bool,
    finalists: int,
    console: Console,
) -> list[Plan]:
    """Configurations that fit, fastest first: of `planner.candidates` the best are compiled until
    `finalists` fit, and ranked once more by the compiler's figures.

    What by formula takes as much as one that the compiler refused is not tried. An interrupt
    (Ctrl-C) ends the search with what it has.
    """
    possible = candidates(config, topology, mfu, slices, compile_them)
    fitting: list[Plan] = []
    limit = math.inf
    with console.status("") as status:
        try:
            for i, plan in enumerate(possible):
                if len(fitting) == finalists:
                    break
                if plan.by_formula >= limit:
                    continue
                status.update(
                    f"{_flags(plan)}: candidate {i + 1} of {len(possible)}, "
                    f"{len(fitting)} of {finalists} found"
                )
                tried = make_plan(plan.config, topology, mfu, slices, compile_them)
                console.print(f"{_flags(tried)}: {_verdict(tried)}", soft_wrap=True)
                if tried.compiled and not tried.fits:
                    limit = plan.by_formula
                else:
                    fitting.append(tried)
        except KeyboardInterrupt:
            console.print("interrupted")
    return sorted(fitting, key=lambda plan: plan.estimate_s)


def _flags(plan: Plan) -> str:
    """What a search varies, as train and plan take it."""
    config, mesh = plan.config, plan.mesh
    return (
        f"--config.mesh.fsdp={mesh['fsdp']} --config.mesh.tensor={mesh['tensor']} "
        f"--config.model.remat={config.model.remat} "
        f"--config.optim.micro_batches={config.optim.micro_batches}"
    )


def _verdict(plan: Plan) -> str:
    size = plan.hbm_gib or plan.by_formula
    fits = {True: "[green]fits[/]", False: "[red]does not fit[/]", None: "too close to tell"}
    by = "" if plan.compiled else " by formula"
    return f"{fits[plan.fits]}{by}, {size:.2f} of {plan.chip.hbm:g} GiB"


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
        size = plan.hbm_gib or plan.by_formula
        table.add_row(mesh, plan.config.model.remat, parts, f"{size:.2f}", *seconds)
    console.print(table)


def show(plan: Plan, console: Console) -> None:
    """The plan as tables for people."""
    config = plan.config
    console.print(
        f"[bold]{config.model.arch}[/], {config.model.image_size} px, "
        f"{config.model.context_length} tokens, batch {config.optim.batch:,} on {plan.chips} chips "
        f"({plan.topology}): {_verdict(plan)}"
    )
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"mesh {mesh}; to run it so:\n{_flags(plan)}", soft_wrap=True)
    if plan.note:
        console.print(plan.note)
    table = Table("memory of a chip", title="GiB", title_justify="left")
    table.add_column("", justify="right")
    if plan.hbm_gib is not None:
        of = f"{plan.hbm_gib:.2f} of {plan.chip.hbm:g}"
        table.add_row("[bold]compiler: in all[/]", of)
    for name, size in plan.memory_gib.items():
        table.add_row(f"compiler: {name}", f"{size:.2f}")
    for name, size in plan.formula_gib.items():
        table.add_row(f"formula: {name}", f"{size:.2f}")
    table.add_row("formula: sum", f"{plan.by_formula:.2f}")
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
        console.print(f"the compiler took {plan.compile_s:.0f} s")
    share = total / (plan.chips * plan.chip.peak * plan.step_s)
    if plan.compiler_s:
        bound = total / (plan.chips * plan.chip.peak * plan.compiler_s)
        beyond = f", so the stated {plan.mfu:.0%} is out of reach"
        console.print(
            f"by the compiler's cost model, attention's kernels and waiting for other chips apart: "
            f"{plan.compiler_s:.2f} s a step, {bound:.0%} of the peak"
            + (beyond if bound < plan.mfu else "")
        )
    images = config.optim.batch / plan.step_s
    console.print(
        f"at {share:.0%} of the peak: {plan.step_s:.2f} s a step, {images:,.0f} images/s, "
        f"{images / plan.chips:,.0f} a chip; {plan.steps:,} steps take "
        f"{plan.steps * plan.step_s / 86400:.1f} days, {plan.chip_hours:,.0f} chip-hours"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hqclip_jax.plan",
        description=__doc__,
        epilog="chips: "
        + ", ".join(chip.name for chip in CHIPS)
        + "\nexit status: 0 fits, or may by formula; 1 does not fit; 2 wrong configuration",
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
    parser.add_argument("--slices", type=_count, default=1, help="such topologies, joined [1]")
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="share of the peak to reckon time with [0.4]"
    )
    parser.add_argument(
        "--records", type=_count, help="in the data set, where optim.duration is in epochs"
    )
    parser.add_argument(
        "--search", type=_count, nargs="?", const=3, metavar="N",
        help="try remat policies, meshes and micro-batches until N [3] fit",
    )  # fmt: skip
    parser.add_argument(
        "--formula", action="store_true", help="compile nothing: seconds instead of minutes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, up to 1, such as 0.4")
    return share


def _in_samples(config: Config, records: int | None) -> Config:
    """The configuration with a duration that needs no data set."""
    duration = config.optim.duration
    count, unit = config_lib.parse_duration(duration, "optim.duration")
    if unit != "epochs":
        return config
    if records is None:
        raise ConfigError(f"optim.duration={duration!r} depends on the data set: add --records=N")
    optim = dataclasses.replace(config.optim, duration=f"{round(count * records)} samples")
    return dataclasses.replace(config, optim=optim)


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
        config = _in_samples(config_lib.load(args.config, overrides), args.records)
        question = (config, args.topology, args.mfu, args.slices, not args.formula)
        plans = search(*question, args.search, console) if args.search else [make_plan(*question)]
    except (ConfigError, TokenizerError) as e:
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
