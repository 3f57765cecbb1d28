"""The README.md beside exported weights, which model hubs show."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqclip_jax.config import Config
from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.folder import read_json
from hqclip_jax.formats.model import Model
from hqclip_jax.restore import Found
from hqclip_jax.sinks import METRICS_FILE
from hqclip_jax.telemetry import read_metrics

IMPORTED = "imported.json"  # beside the checkpoints of a model that was read from elsewhere
TASKS = {
    "open_clip": ("open_clip", "zero-shot-image-classification"),
    "transformers": ("transformers", "zero-shot-image-classification"),
    "vision_tower": ("transformers", "image-feature-extraction"),
}


def card(
    name: str, to: str, model: Model, found: Found, weights: str, parameters: int,
    code: Sequence[str], results: Sequence[Path],
) -> str:  # fmt: skip
    """Markdown with the front matter of the Hugging Face Hub.

    Args:
        name: of the folder, the title.
        to: the format, a key of `TASKS`.
        weights: "params" or "ema".
        code: three lines that load it.
        results: `results.json` files of `python -m hqclip_jax.evaluate`.

    Raises:
        FormatError: one of the results can't be read.
    """
    library, task = TASKS[to]
    config = model.config
    about = {
        "architecture": config.model.arch,
        "pictures": f"{config.model.image_size} × {config.model.image_size} pixels",
        "texts": f"{config.model.context_length} tokens, {model.tokenizer.name}",
        "activation": config.model.act,
        "parameters": f"{parameters:,}, {model.dtype}",
        "weights": f"{'average of the parameters' if weights == 'ema' else 'parameters'}, "
        f"step {found.step:,}",
    }
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- clip\n---",
        f"# {_cell(name)}",
        "A CLIP model, exported by hqclip_jax."
        + (" Its image tower alone, without projection." if to == "vision_tower" else ""),
        _table(("", ""), about.items()),
        "## Use",
        "```python\n" + "\n".join(code).format(here=name) + "\n```",
        _preprocessing(to, config),
        "## Training",
        _training(found),
        *_results(results, found.step),
        "## Licence",
        "None is given here: choose one that the licences of the data and of the weights that "
        "training began with allow, and name it as `license:` in the head of this file."
        + (" The byte-pair vocabulary is OpenAI CLIP's (MIT)." if to == "transformers" else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _preprocessing(to: str, config: Config) -> str:
    size = config.model.image_size
    said = (
        f"Pictures: shorter side to {size} pixels, bicubic, the middle cut out, CLIP's mean and "
        "deviation."
    )
    if to == "vision_tower":
        return said
    said += " Texts were cleaned before training (ftfy, HTML unescaped twice, white space folded), "
    if to == "open_clip":
        return said + "as OpenCLIP's tokenizer does by itself."
    return said + (
        "which transformers' tokenizer leaves to you; pass `padding=True, truncation=True`. "
        '`backend="pil"` (`use_fast=False` before transformers 5) resizes as evaluation did here; '
        "torchvision's tensors differ by a grey level now and then. Where long side minus short "
        "side, resized, leaves 3 when divided by 4, transformers cuts a pixel beside OpenCLIP."
    )


def _training(found: Found) -> str:
    workdir, info = found.checkpoints.directory.parent, found.info
    if (workdir / IMPORTED).is_file():
        origin = read_json(workdir / IMPORTED)
        notes = "".join(f"\n- {_cell(note)}" for note in origin["notes"])
        return f"Elsewhere: imported from {_code(origin['source'])} ({origin['library']}).{notes}"
    config, samples = info.config, sum(info.position.values())
    loss = config.loss
    losses = {
        "contrastive": (loss.contrastive, loss.contrastive_form),
        "hard negative identification": (loss.hni, loss.hni_form),
        "tag classification": (loss.tag, loss.tag_form),
    }
    about = {
        "data": _code(config.data.path),
        "samples seen": f"{samples:,}",
        "batch": f"{config.optim.batch:,}",
        "peak learning rate": f"{config.optim.lr:g}, warm-up {config.optim.warmup}",
        "weight decay": f"{config.optim.weight_decay:g}",
        "losses": ", ".join(f"{n} × {w:g} ({form})" for n, (w, form) in losses.items() if w),
        "descriptions": f"{config.data.p_desc:g} of the positive texts",
        "tag vocabulary": f"{len(info.tags):,}" if info.tags else "none",
        "began with": _code(config.init_from) if config.init_from else "random parameters",
    } | _last_metrics(workdir, found.step)
    return _table(("", ""), about.items())


def _last_metrics(workdir: Path, step: int) -> dict[str, str]:
    if not (workdir / METRICS_FILE).is_file():
        return {}
    # An evaluation's rows have only scores of their own.
    rows = [row for row in read_metrics(workdir) if row["step"] <= step and "loss" in row]
    last = rows[-1] if rows else {}
    return {
        f"{name}, last reported": f"{last[name]:.4g}"
        for name in sorted(last)
        if name.startswith("loss") or name.endswith("accuracy")
        if math.isfinite(last[name])
    }


def _results(paths: Sequence[Path], step: int) -> list[str]:
    rows = []
    for path in paths:
        stored = read_json(path)
        try:
            of = "" if stored["step"] == step else f" (step {stored['step']:,})"
            for name, result in stored["results"].items():
                scores = {} if "error" in result else result["scores"]
                rows += [
                    (f"{name}{of}", score, f"{100 * value:.1f}", f"{100 * chance:.1f}")
                    for score, value in scores.items()
                    if (chance := scores.get(f"{score}_chance")) is not None
                ]
        except (KeyError, TypeError, AttributeError) as e:
            raise FormatError(f"{path} is no results.json of hqclip_jax.evaluate: {e}") from e
    if not rows:
        return []
    return ["## Results", _table(("set", "score", "%", "chance"), rows)]


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(str(x)) for x in line) + " |" for line in lines)


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _cell(text: str) -> str:
    """Names of sets and folders, and whatever stands in a file from elsewhere, as plain text."""
    text = " ".join(text.split()).replace("|", "\\|")
    code = text.startswith("`") and text.endswith("`") and text.count("`") == 2
    return text if code else html.escape(text, quote=False)
