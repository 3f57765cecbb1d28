"""The configuration: one frozen, typed tree, and the only place that knows defaults.

A file under `configs/` has `get_config(arg=None) -> Config`; `--config=configs/x.py:arg` names it
and `--config.optim.lr=1e-3` overrides a field. Everything is validated once, before any compile.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hqclip_jax.data.text import LIST_FORMS
from hqclip_jax.models.zoo import ARCHITECTURES

DTYPES = ("bfloat16", "float32")


class ConfigError(ValueError):
    """A configuration that can't run; the message names the fields and a value that would."""


def item(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    """A field with its default, its line in `--help`, and its allowed values."""
    return field(default=default, metadata={"doc": doc, "choices": tuple(choices)})


@dataclass(frozen=True)
class ModelConfig:
    arch: str = item("ViT-B/32", "named architecture", tuple(ARCHITECTURES))
    image_size: int = item(0, "pixels of the square input; 0 takes the architecture's own")
    context_length: int = item(
        0, "text tokens, start and end included; 0 takes the architecture's own"
    )
    act: str = item("gelu", "activation; OpenAI's weights want quick_gelu", ("gelu", "quick_gelu"))
    dtype: str = item("bfloat16", "compute type; parameters are float32", DTYPES)
    remat: str = item(
        "none",
        "what a layer recomputes in the backward pass: nothing; all but matrix products, which "
        "are kept (dots) or wait in the host's memory (offload); all (full)",
        ("none", "dots", "offload", "full"),
    )
    patch_dropout: float = item(
        0.0, "share of patches that training leaves out, as in FLIP: a shorter sequence"
    )
    unroll: int = item(
        1, "layers compiled at a time; XLA runs a loop's body on one CPU core, so there take all"
    )


@dataclass(frozen=True)
class DataConfig:
    path: str = item(
        "",
        "dataset directory that `python -m refine run` wrote, local, gs:// or s3://; a mixture as "
        "NAME:WEIGHT=DIR,NAME:WEIGHT=DIR",
    )
    p_desc: float = item(0.5, "probability that the positive text is the description [inferred]")
    p_neg_desc: float = item(
        0.5, "probability that the negative is the negative description [inferred]"
    )
    vocab: str = item(
        "",
        "vocab.txt of the WordPiece that CLIPA's models read texts with; empty takes CLIP's byte "
        "pairs, or the vocabulary of the run that this one begins with",
    )
    list_form: str = item("join", "how sentences or tags become one text [inferred]", LIST_FORMS)
    tag_vocabulary: int = item(10_000, "most frequent tags that the tag head knows [inferred]")
    max_tags: int = item(32, "tags kept per image")
    crop_scale: tuple[float, float] = item((0.9, 1.0), "area share of the random crop")
    threads: int = item(8, "decoding threads per host, or per process where there are some")
    processes: int = item(0, "decoding processes per host; 0 decodes in the trainer's own threads")
    prefetch: int = item(2, "batches made at a time per host, or per process where there are some")
    max_pixels: int = item(89_478_485, "pictures with more are refused before they are decoded")
    max_replaced: float = item(0.01, "share of unreadable records above which the run stops")
    cache: str = item("~/.cache/hqclip_jax/shards", "where shards from s3:// are kept")
    cache_gb: float = item(200.0, "the cache's size; the shards unused for longest go first")


@dataclass(frozen=True)
class LossConfig:
    contrastive: float = item(1.0, "weight of the image-text contrastive loss")
    contrastive_form: str = item(
        "softmax", "CLIP's softmax or SigLIP's sigmoid, which adds a bias", ("softmax", "sigmoid")
    )
    hni: float = item(1.0, "weight of hard negative identification [inferred]; 0 leaves it out")
    hni_form: str = item(
        "pair",
        "what competes with the positive [inferred]: the image's own negative; that and the "
        "batch's positives; all negatives and positives of the batch",
        ("pair", "own", "all"),
    )
    hni_scale: str = item(
        "shared", "temperature: the contrastive one or one of its own [inferred]", ("shared", "own")
    )
    tag: float = item(1.0, "weight of short tag classification [inferred]; 0 leaves it out")
    tag_form: str = item("softmax", "tag loss [inferred]", ("softmax", "bce"))
    tag_idf: bool = item(False, "weigh tags by inverse document frequency in the softmax target")
    tag_input: str = item(
        "pooled",
        "what the tag head reads: the image feature before the projection or after [inferred]",
        ("pooled", "projected"),
    )


@dataclass(frozen=True)
class OptimConfig:
    batch: int = item(4096, "global batch, in images")
    duration: str = item("12.8M samples", "length of the run: steps, samples or epochs")
    warmup: str = item("500 steps", "linear warm-up")
    lr: float = item(5e-4, "peak learning rate")
    beta1: float = item(0.9, "AdamW")
    beta2: float = item(0.98, "AdamW")
    eps: float = item(1e-6, "AdamW")
    weight_decay: float = item(0.2, "not on norms, biases, class token and logit_scale")
    clip_norm: float = item(0.0, "global gradient norm to clip at; 0 does not clip")
    mu_dtype: str = item(
        "float32", "AdamW's first moment; bfloat16 saves two bytes a parameter", DTYPES
    )
    micro_batches: int = item(
        1, "parts that the batch passes the towers in; the losses see it whole, so no value changes"
    )
    ema: float = item(0.0, "decay per step of an average of the parameters; 0 keeps none")
    max_skipped: int = item(
        10, "updates in a row that may be skipped for a gradient that is no number"
    )


@dataclass(frozen=True)
class MeshConfig:
    replica: int = item(-1, "copies of the model; -1 takes the devices that are left")
    fsdp: int = item(1, "devices that share one copy's parameters and split the batch")
    tensor: int = item(1, "devices that share one copy's layers and see the same batch")


@dataclass(frozen=True)
class CheckpointConfig:
    every: str = item("1000 steps", "between checkpoints; one is always written at the end")
    minutes: float = item(30.0, "between checkpoints too, whichever comes first; 0 counts none")
    keep: int = item(3, "latest checkpoints that stay on disk")
    keep_every: str = item("", "between checkpoints that stay for good, such as '10K steps'")
    best: str = item("", "reported metric whose best checkpoint stays too, such as loss")
    best_mode: str = item("min", "whether the lowest or the highest is best", ("min", "max"))


@dataclass(frozen=True)
class EvalConfig:
    suites: str = item(
        "", "what is scored while training, as `evaluate --suite` names it; several with commas"
    )
    data: str = item("", "folder under which the suites' sets lie")
    every: str = item("5000 steps", "between evaluations; one is always made at the end")
    batch: int = item(256, "images or texts a step of an evaluation, over all devices")


@dataclass(frozen=True)
class LogConfig:
    every: str = item("50 steps", "between reports")
    wandb: str = item("", "Weights & Biases project; the key comes from WANDB_API_KEY")
    mlflow: str = item("", "MLflow experiment; its server comes from MLFLOW_TRACKING_URI")


@dataclass(frozen=True)
class WatchdogConfig:
    warn: float = item(300.0, "seconds without a step, after which the late host is named")
    abort: float = item(3600.0, "seconds without a step, after which the process ends itself")


@dataclass(frozen=True)
class ProfileConfig:
    steps: str = item("", "steps to trace, as FIRST:LAST; or touch WORKDIR/profile for the next 5")


@dataclass(frozen=True)
class Config:
    """A whole run. `validate` has passed on every instance that leaves this module."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
    resume_from: str = item(
        "", "another run's workdir to go on from, with its optimizer and data position"
    )
    init_from: str = item(
        "", "another run's workdir, its parameters only; sizes that differ are resampled"
    )
    seed: int = item(0, "of initialisation, order, crops and text choices")

    def steps(self, duration: str, records: int, name: str = "duration") -> int:
        """Optimizer steps in a duration such as "500 steps", "12.8M samples" or "3 epochs".

        Args:
            duration: number, optional K/M/B, unit.
            records: size of the data set, for epochs.
            name: the field, for the error message.
        """
        count, unit = parse_duration(duration, name)
        if unit == "steps":
            return round(count)
        samples = count * records if unit == "epochs" else count
        return math.ceil(samples / self.optim.batch)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


_DURATION = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMB]?)\s*(steps?|samples?|epochs?)\s*")
_SUFFIX = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


def parse_duration(text: str, name: str) -> tuple[float, str]:
    """Splits "12.8M samples" into (12.8e6, "samples")."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise ConfigError(
            f"{name}={text!r} is no duration: write a number and steps, samples or epochs, such as "
            "'500 steps', '12.8M samples' or '3 epochs'"
        )
    number, suffix, unit = match.groups()
    return float(number) * _SUFFIX[suffix], unit.rstrip("s") + "s"


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf as (dotted name, field, value)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, value


def validate(config: Config) -> Config:
    """Returns the configuration, or says which fields disagree.

    Raises:
        ConfigError: an unknown choice, a number out of range, fields that exclude each other.
    """
    for name, f, value in walk(config):
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{name}={value!r} is not one of: {', '.join(choices)}")
    arch = ARCHITECTURES[config.model.arch]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            image_size=config.model.image_size or arch.image_size,
            context_length=config.model.context_length or arch.context_length,
        ),
    )
    model, data, optim, loss = config.model, config.data, config.optim, config.loss
    patch = arch.patch
    if model.image_size < patch or model.image_size % patch:
        near = max(1, round(model.image_size / patch)) * patch
        raise ConfigError(
            f"model.image_size={model.image_size} is not a multiple of the patch size {patch} of "
            f"model.arch={model.arch!r}: try {near}"
        )
    for name, value in (("data.p_desc", data.p_desc), ("data.p_neg_desc", data.p_neg_desc)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} is not a probability: give a number from 0 to 1")
    shares = {
        "model.patch_dropout": model.patch_dropout, "optim.ema": optim.ema,
        "optim.beta1": optim.beta1, "optim.beta2": optim.beta2,
    }  # fmt: skip
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name}={value} is not a share: give a number from 0 to below 1")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"data.crop_scale={data.crop_scale} is not 0 < low <= high <= 1")
    positive = {
        "model.unroll": model.unroll, "optim.batch": optim.batch, "optim.lr": optim.lr,
        "data.threads": data.threads, "data.prefetch": data.prefetch,
        "data.max_tags": data.max_tags, "checkpoint.keep": config.checkpoint.keep,
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.tensor": config.mesh.tensor,
        "optim.micro_batches": optim.micro_batches, "optim.max_skipped": optim.max_skipped,
        "evals.batch": config.evals.batch, "optim.eps": optim.eps,
        "data.max_pixels": data.max_pixels, "data.cache_gb": data.cache_gb,
        "watchdog.warn": config.watchdog.warn, "watchdog.abort": config.watchdog.abort,
    }  # fmt: skip
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name}={value} must be above 0")
    not_negative = {
        "loss.contrastive": loss.contrastive, "loss.hni": loss.hni, "loss.tag": loss.tag,
        "optim.weight_decay": optim.weight_decay, "optim.clip_norm": optim.clip_norm,
        "data.processes": data.processes, "checkpoint.minutes": config.checkpoint.minutes,
    }  # fmt: skip
    for name, value in not_negative.items():
        if not value >= 0:
            raise ConfigError(f"{name}={value} must not be below 0")
    _check_split("mesh.tensor", config.mesh.tensor, "attention heads", model.arch,
                 arch.vision.heads, arch.text.heads)  # fmt: skip
    _check_split("mesh.fsdp", config.mesh.fsdp, "features", model.arch,
                 arch.vision.width, arch.text.width)  # fmt: skip
    if model.context_length < 3:
        raise ConfigError(f"model.context_length={model.context_length} leaves no room for a word")
    if not (loss.contrastive or loss.hni or loss.tag):
        raise ConfigError("loss.contrastive, loss.hni and loss.tag are all 0: nothing to train")
    if loss.hni and loss.hni_form != "pair":
        if loss.contrastive_form == "sigmoid":
            raise ConfigError(
                f"loss.hni_form={loss.hni_form!r} adds negatives to a softmax, and "
                "loss.contrastive_form='sigmoid' has none: take loss.hni_form='pair'"
            )
        if loss.hni_scale == "own":
            raise ConfigError(
                f"loss.hni_scale='own' goes with loss.hni_form='pair': {loss.hni_form!r} shares "
                "the softmax of the contrastive loss"
            )
    if data.vocab and not arch.clipa:
        raise ConfigError(
            f"data.vocab={data.vocab!r} is a WordPiece vocabulary, whose end no token marks, and "
            f"model.arch={model.arch!r} pools where the text ends: take an architecture of CLIPA's"
        )
    if loss.tag and data.tag_vocabulary <= 0:
        raise ConfigError(f"loss.tag={loss.tag} needs data.tag_vocabulary above 0")
    durations = ["optim.duration", "optim.warmup", "checkpoint.every", "log.every", "evals.every"]
    for name in durations + ["checkpoint.keep_every"] * bool(config.checkpoint.keep_every):
        section, key = name.split(".")
        if parse_duration(getattr(getattr(config, section), key), name)[0] <= 0 and key != "warmup":
            raise ConfigError(f"{name} must be above 0")
    if data.path:
        sources(data.path)
    profile_range(config.profile.steps)
    if config.resume_from and config.init_from:
        raise ConfigError(
            f"resume_from={config.resume_from!r} goes on with another run and init_from="
            f"{config.init_from!r} begins anew with its parameters: name one of the two"
        )
    return config


def profile_range(steps: str) -> tuple[int, int] | None:
    """The first and last step of `profile.steps`, None where it is empty."""
    if not steps:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if not match or not 0 < int(match[1]) <= int(match[2]):
        raise ConfigError(f"profile.steps={steps!r} is not FIRST:LAST, such as 100:105")
    return int(match[1]), int(match[2])


class Source(NamedTuple):
    """A data set of a mixture; without a weight it counts by its size."""

    name: str
    weight: float | None
    path: str


def sources(path: str) -> tuple[Source, ...]:
    """Reads `data.path`: one directory, whose source is called "train", or NAME:WEIGHT=DIR,… with
    or without weights. A source keeps its place in the data by its name.

    Raises:
        ConfigError: nothing named, a name twice, weights for some only or not above 0.
    """
    form = "write DIR, or NAME:WEIGHT=DIR,NAME:WEIGHT=DIR"
    if not path:
        raise ConfigError("data.path is not set: --config.data.path=DIR that `refine run` wrote")
    if not re.match(r"[\w.-]+(:[^=/,]*)?=", path):
        return (Source("train", None, path),)
    found = []
    for part in path.split(","):
        match = re.fullmatch(r"\s*([\w.-]+)(?::([^=/,]*))?=(.+)", part)
        if not match:
            raise ConfigError(f"data.path: {part!r} is no source: {form}")
        name, weight, directory = match.groups()
        try:
            found.append(Source(name, None if weight is None else float(weight), directory.strip()))
        except ValueError as e:
            raise ConfigError(f"data.path: the weight {weight!r} of {name!r} is no number") from e
    names, weights = [s.name for s in found], [s.weight for s in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.path names a source twice: {', '.join(names)}")
    if None in weights and any(w is not None for w in weights):
        raise ConfigError("data.path gives weights to some sources only: give all of them, or none")
    if any(w is not None and not 0 < w < math.inf for w in weights):
        raise ConfigError(f"data.path: weights must be above 0, not {weights}; {form}")
    return tuple(found)


def _check_split(name: str, parts: int, what: str, arch: str, image: int, text: int) -> None:
    """What an axis does not divide would be left whole, and nothing be won."""
    if image % parts or text % parts:
        common = math.gcd(image, text)
        sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ConfigError(
            f"{name}={parts} does not divide the {image} and {text} {what} of the image and text "
            f"tower of model.arch={arch!r}: take one of {sizes}"
        )


def from_json(stored: dict) -> Config:
    """Rebuilds a stored configuration; a key this version does not know is an error."""
    config = Config()
    for section, value in stored.items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for key, leaf in pairs:
            config = _replace(config, section if key is None else f"{section}.{key}", leaf)
    return validate(config)


def load(spec: str, overrides: dict[str, str]) -> Config:
    """The configuration of `PATH.py[:ARG]` with `{"optim.lr": "1e-3"}` laid over it.

    Raises:
        ConfigError: no such file, no `get_config` in it, unknown key, value of another type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.py"))) or "none there"
        raise ConfigError(f"--config={path}: no such file; known: {known}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg=None) that returns a Config")
    config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not a Config")
    for name, text in overrides.items():
        config = _replace(config, name, text)
    return validate(config)


def _replace(config: Any, name: str, value: Any) -> Any:
    """A copy with the dotted field set; strings are read as the field's type."""
    head, _, rest = name.partition(".")
    return _replace_at(config, head, rest, name, value)


def _replace_at(node: Any, head: str, rest: str, name: str, value: Any) -> Any:
    known = {f.name for f in dataclasses.fields(node)}
    if head not in known:
        every = [n for n, _, _ in walk(Config())]
        near = difflib.get_close_matches(name, every, 1, 0.5) or difflib.get_close_matches(
            head, known, 1, 0.3
        )
        hint = f"did you mean {near[0]!r}?" if near else f"fields here: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown config field {name!r}: {hint}")
    current = getattr(node, head)
    if dataclasses.is_dataclass(current) != bool(rest):
        what = "is a section, name a field in it" if not rest else "is no section"
        raise ConfigError(f"config field {name!r}: {head!r} {what}")
    if rest:
        key, _, deeper = rest.partition(".")
        return dataclasses.replace(node, **{head: _replace_at(current, key, deeper, name, value)})
    annotation = typing.get_type_hints(type(node))[head]
    return dataclasses.replace(node, **{head: _read(value, annotation, name)})


def _read(value: Any, annotation: Any, name: str) -> Any:
    """`value`, a string from the command line or a value from JSON, as the annotated type."""
    if typing.get_origin(annotation) is tuple:
        parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
        kinds = typing.get_args(annotation)
        if len(parts) != len(kinds):
            raise ConfigError(f"{name}={value!r}: {len(kinds)} numbers, separated by commas")
        return tuple(_read(p, k, name) for p, k in zip(parts, kinds))
    if annotation is bool:
        truth = {"true": True, "false": False, "1": True, "0": False}
        if str(value).lower() not in truth:
            raise ConfigError(f"{name}={value!r} is not true or false")
        return truth[str(value).lower()]
    try:
        # "4_096" and "1e3" are both how people write a batch size.
        if annotation is int and isinstance(value, str) and "e" in value.lower():
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        return annotation(value)
    except ValueError as e:
        raise ConfigError(f"{name}={value!r} is not of type {annotation.__name__}") from e


def describe(config: Config = Config()) -> str:
    """Every field with its value and meaning, for `--help`."""
    rows = []
    for name, f, value in walk(config):
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        rows.append(f"  --config.{name}={value}\n      {f.metadata['doc']}{choices}")
    return "\n".join(rows)


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separates `--config.a.b=value` (or `--config.a.b value`) from the other arguments."""
    overrides: dict[str, str] = {}
    others: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise ConfigError(f"--config.{name} has no value")
        overrides[name] = value
    return overrides, others
