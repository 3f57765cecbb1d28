"""Weights that travel: `python -m hqclip_jax.export` writes a checkpoint so that OpenCLIP or
transformers load it, and reads their models into a checkpoint."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hqclip_jax.checkpoint import WEIGHTS, CheckpointError, Checkpoints, RunInfo
from hqclip_jax.config import ConfigError, MeshConfig
from hqclip_jax.evals.results import JSON, RUN_FOLDER
from hqclip_jax.formats import open_clip, transformers
from hqclip_jax.formats.card import IMPORTED, card
from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.folder import new_folder
from hqclip_jax.formats.foreign import Foreign, read_foreign
from hqclip_jax.formats.model import DTYPES, Model
from hqclip_jax.models.convert import TRAINING_ONLY, ConvertError, flatten, read_safetensors
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.restore import Found, find
from hqclip_jax.sharding import make_mesh
from hqclip_jax.telemetry import setup_logging

log = logging.getLogger("hqclip_jax.export")

WRITERS: dict[str, Callable[[Path, Model], list[str]]] = {
    "open_clip": open_clip.write,
    "transformers": transformers.write,
    "vision_tower": transformers.write_vision_tower,
}

EXAMPLES = """
out: a folder that others load without any code of ours
  python -m hqclip_jax.export --checkpoint=runs/large --to=open_clip --out=exported/large
      open_clip.create_model_and_transforms("local-dir:exported/large")
  python -m hqclip_jax.export --checkpoint=runs/large --to=transformers --out=exported/large-hf
      CLIPModel.from_pretrained("exported/large-hf")
  python -m hqclip_jax.export --checkpoint=runs/large --to=vision_tower --dtype=bfloat16 --out=eye
      CLIPVisionModel.from_pretrained("eye"): the eye of LLaVA and its kin

in: a workdir with a checkpoint of ours, at step 0
  python -m hqclip_jax.export --from=clip-vit-large-patch14 --out=runs/openai-l14
  python -m hqclip_jax.evaluate --checkpoint=runs/openai-l14 --suite=imagenet --data=/data/wds
  python -m hqclip_jax.train --config=configs/finetune_openai_l14.py --workdir=runs/finetuned ...
  python -m hqclip_jax.export --from=ViT-L-14.safetensors --arch=ViT-L/14 --act=quick_gelu --out=...

Folders are those of the Hugging Face Hub: OpenCLIP's (open_clip_config.json), HQ-CLIP's among them,
and transformers' CLIPModel (config.json). docs/export.md says what travels, and what is refused.

exit status: 0 written and read back, 2 refused
"""


def export_checkpoint(
    found: Found, to: str, out: str | Path, weights: str = "params", dtype: str = "float32",
    results: Sequence[str | Path] = (),
) -> int:  # fmt: skip
    """Writes a checkpoint as another library loads it, and reads it back.

    Args:
        found: the checkpoint; it is closed.
        to: a key of `WRITERS`.
        out: a new folder, which appears when it is whole and was read back.
        weights: "params", or "ema" for their average.
        dtype: of the weights in the file.
        results: `results.json` files for the card, besides those in the workdir.

    Returns:
        the number of parameters.

    Raises:
        CheckpointError: no average in it.
        ConvertError, FormatError: the format can't hold the model, or `out` is not new.
    """
    out = Path(out).absolute()
    with new_folder(out) as partial:
        mesh = make_mesh(MeshConfig(), len(jax.devices()))
        log.info("reading the %s of %s", weights, found.path)
        params = jax.device_get(found.weights(found.model(mesh)[1], weights))
        model = Model(found.info.config, found.tokenizer(), params, dtype)
        log.info("writing %s as %s", model.config.model.arch, to)
        code = WRITERS[to](partial, model)
        count = _check_read_back(partial, to, model)
        workdir = found.checkpoints.directory.parent
        inside = sorted([*workdir.glob("results.json"), *workdir.glob("*/results.json")])
        inside += workdir.glob(f"{RUN_FOLDER}/{found.step}/{JSON}")
        known = dict.fromkeys([*inside, *(Path(r) for r in results)])
        text = card(out.name, to, model, found, weights, count, code, list(known))
        (partial / "README.md").write_text(text, encoding="utf-8")
    return count


def _check_read_back(folder: Path, to: str, model: Model) -> int:
    """Reads the folder as an import would and compares: bits of the weights, fields of the
    configuration, the tokenizer. Returns the number of parameters.

    Raises:
        FormatError: something came back otherwise.
    """
    flat = flatten(model.params)
    want = {k: x for k, x in flat.items() if not k.startswith(TRAINING_ONLY)}
    if to == "vision_tower":
        theirs = transformers.vision_weights(model.params)
        got, want = read_safetensors(folder / transformers.WEIGHTS), theirs
    else:
        foreign = read_foreign(folder)
        got = flatten(foreign.params)
        _check_same_config(foreign, model)
    other = sorted(set(got) ^ set(want)) or [
        k for k, x in want.items() if not _same_bits(got[k], model.cast(x).astype(np.float32))
    ]
    if other:
        raise FormatError(f"read back, these are others than written: {', '.join(other[:5])}")
    log.info("read back: %d weights are equal to the bit", len(want))
    return sum(x.size for x in want.values())


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _check_same_config(foreign: Foreign, model: Model) -> None:
    there, here = foreign.config.model, model.config.model
    fields = "image_size", "context_length", "act"
    pairs = {k: (getattr(there, k), getattr(here, k)) for k in fields}
    # Two names may be one shape, for another image size.
    pairs["architecture"] = (ARCHITECTURES[there.arch].vision, model.arch.vision)
    pairs["tokenizer"] = (foreign.tokenizer, model.tokenizer)
    if other := [name for name, (a, b) in pairs.items() if a != b]:
        raise FormatError(f"read back, these are others than written: {', '.join(other)}")


def import_model(foreign: Foreign, source: str | Path, out: str | Path) -> int:
    """Writes a model that was read as a workdir with one checkpoint, at step 0.

    Returns:
        the number of parameters.

    Raises:
        FormatError: `out` is not new.
    """
    with new_folder(out) as partial:
        checkpoints = Checkpoints(partial)
        info = RunInfo(foreign.config, {}, None, foreign.tokenizer.to_json())
        params = jax.tree.map(jax.numpy.asarray, foreign.params)
        checkpoints.save_params(0, params, info)
        checkpoints.close()
        about = {"library": foreign.library, "source": str(source), "notes": foreign.notes}
        (partial / IMPORTED).write_text(json.dumps(about, indent=1) + "\n")
        found = find(partial)
        mesh = make_mesh(MeshConfig(), len(jax.devices()))
        got = flatten(jax.device_get(found.weights(found.model(mesh)[1], "params")))
        want = flatten(foreign.params)
        if not all(_same_bits(got[k], x) for k, x in want.items()):
            raise FormatError("read back, the checkpoint's parameters are others than written")
        log.info("read back: %d parameters are equal to the bit", len(want))
    return sum(x.size for x in want.values())


def _summary(out: Path, parameters: int, console: Console) -> None:
    console.print(f"[bold]{escape(str(out))}[/]", soft_wrap=True)
    table = Table("in it")
    table.add_column("bytes", justify="right")
    total = 0
    for path in sorted(out.iterdir()):
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(p.stat().st_size for p in files if p.is_file())
        table.add_row(escape(path.name) + "/" * path.is_dir(), f"{size:,}")
        total += size
    table.add_section()
    table.add_row("in all", f"{total:,}")
    table.add_row("parameters", f"{parameters:,}")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.export",
        description="Writes a checkpoint for OpenCLIP or transformers, or reads theirs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", help="folder that training wrote, to export")
    which.add_argument("--from", dest="source", help="folder or weight file to import")
    parser.add_argument("--out", required=True, help="a new folder")
    out = parser.add_argument_group("with --checkpoint")
    out.add_argument("--to", choices=WRITERS, help="who shall load it")
    out.add_argument("--step", type=int, help="step to export [the latest]")
    out.add_argument(
        "--weights", choices=WEIGHTS, default=WEIGHTS[0],
        help="the parameters, or the average that a run with optim.ema keeps of them [%(default)s]",
    )  # fmt: skip
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="[%(default)s]")
    out.add_argument(
        "--results", action="append", default=[], metavar="FILE",
        help="a results.json of evaluate's, for the model card; may be given again; those in the "
        "run's folder are found",
    )  # fmt: skip
    into = parser.add_argument_group("with --from")
    into.add_argument("--arch", default="", help="architecture of a weight file alone")
    into.add_argument("--act", default="", help="its activation: gelu or quick_gelu")
    into.add_argument("--vocab", default="", help="vocab.txt, where a WordPiece's lies elsewhere")
    into.add_argument(
        "--our-resize", action="store_true",
        help="import a model although its pictures were resized by another rule",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error told."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.checkpoint and not args.to:
        parser.error(f"--checkpoint needs --to: {', '.join(WRITERS)}")
    if args.source and args.to:
        parser.error("--from reads and --to writes: import first, then export the checkpoint")
    console = setup_logging()
    try:
        if args.checkpoint:
            found = find(args.checkpoint, args.step)
            count = export_checkpoint(
                found, args.to, args.out, args.weights, args.dtype, args.results
            )
        else:
            foreign = read_foreign(args.source, args.arch, args.act, args.vocab, args.our_resize)
            model, texts = foreign.config.model, foreign.tokenizer.name
            log.info("a %s in the form of %s: %d pixels, %d tokens (%s), %s", model.arch,
                     foreign.library, model.image_size, model.context_length, texts,
                     model.act)  # fmt: skip
            for note in foreign.notes:
                log.warning("%s", note)
            count = import_model(foreign, args.source, args.out)
    except (FormatError, ConvertError, CheckpointError, ConfigError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    _summary(Path(args.out), count, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
