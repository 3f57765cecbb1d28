"""Models of other libraries, read into ours: what fits, what is carried, what is refused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hqclip_jax.config import Config, LossConfig, ModelConfig, validate
from hqclip_jax.data.tokenizer import (
    ClipTokenizer,
    Tokenizer,
    TokenizerError,
    WordPieceTokenizer,
)
from hqclip_jax.formats import open_clip, transformers
from hqclip_jax.formats.described import Described, FormatError, Resize
from hqclip_jax.formats.folder import read_json
from hqclip_jax.formats.tokenizer_files import check_clip, read_wordpiece
from hqclip_jax.models.convert import from_open_clip, from_transformers, read_safetensors
from hqclip_jax.models.vision import CLIP_MEAN, CLIP_STD
from hqclip_jax.models.zoo import ARCHITECTURES, name_of

OPEN_CLIP_WEIGHTS = (open_clip.WEIGHTS, "open_clip_pytorch_model.safetensors")
READERS: dict[str, Callable[[Mapping, str], dict]] = {
    "OpenCLIP": from_open_clip,
    "transformers": from_transformers,
}

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE = """{path} is a pickle, and reading one can run any code in it, so that is not done here.
Where you trust it, write it as safetensors, in a Python that has torch:
    import torch; from safetensors.torch import save_file
    w = torch.load({name!r}, map_location="cpu", weights_only=True); w = w.get("state_dict", w)
    save_file({{k.removeprefix("module."): x.clone() for k, x in w.items()}}, {safe!r})
(OpenAI's own .pt are TorchScript: w = torch.jit.load({name!r}, "cpu").state_dict())"""


@dataclass(frozen=True)
class Foreign:
    """A model that was read.

    Attributes:
        library: whose format, a key of `READERS`.
        config: its architecture, and defaults for what only training knows.
        tokenizer: its own, at its length.
        params: nested, f32, as `CLIP` has them without what only training uses.
        notes: what was carried over or left out, a sentence each.
    """

    library: str
    config: Config
    tokenizer: Tokenizer
    params: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_foreign(
    path: str | Path,
    arch: str = "",
    act: str = "",
    vocab: str = "",
    our_resize: bool = False,
) -> Foreign:
    """Reads a folder of OpenCLIP's or transformers', or a weight file alone.

    Args:
        path: the folder, a `.safetensors` file, or the `.json` index of several.
        arch: name of the architecture, for a file alone.
        act: its activation, likewise: no weight shows it.
        vocab: `vocab.txt` of a WordPiece, where none lies beside the weights.
        our_resize: take a model although its pictures were resized by another rule.

    Raises:
        FormatError: nothing there that is known, or what this code would not compute alike.
        ConvertError: the weights are not those of the architecture.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickle(path, path.with_suffix(".safetensors").name)
        if arch not in ARCHITECTURES or act not in ("gelu", "quick_gelu"):
            raise FormatError(
                f"{path} is weights alone: add --arch, one of {', '.join(ARCHITECTURES)}, and "
                "--act, quick_gelu for OpenAI's weights and what was trained from them or as they "
                "were (DFN, MetaCLIP), else gelu"
            )
        weights = _read(path)
        hugging_face = any(name.startswith("vision_model.") for name in weights)
        library = "transformers" if hugging_face else "OpenCLIP"
        return _bare(library, weights, arch, act, vocab)
    if not path.is_dir():
        raise FormatError(
            f"{path}: no such file or folder; one of the Hub's is fetched by "
            "`hf download NAME --local-dir FOLDER`"
        )
    if arch or act:
        raise FormatError(f"--arch and --act are for a weight file alone: {path} says them itself")
    library, described, weights_path = _folder(path)
    notes = _check_resize(described, our_resize)
    try:
        arch = name_of(described.shape)
    except ValueError as e:
        raise FormatError(f"{path}: {e}") from e
    params = READERS[library](_read(weights_path), arch)
    foreign = Foreign(library, _config(described, arch, params), ClipTokenizer(), params, notes)
    foreign = replace(foreign, tokenizer=_tokenizer(path, described, vocab))
    return _with_our_colours(foreign, described)


def _folder(path: Path) -> tuple[str, Described, Path]:
    """Whose it is, what it says of itself, and where the weights are. Folders on the Hub often hold
    both libraries' files, and timm's too."""
    config = path / transformers.CONFIG
    stored = read_json(config) if config.is_file() else {}
    if (path / open_clip.CONFIG).is_file():
        weights = _find(path, OPEN_CLIP_WEIGHTS)
        if weights or stored.get("model_type") != "clip":
            described = _described(path, open_clip.describe, read_json(path / open_clip.CONFIG))
            return "OpenCLIP", described, weights or _weights(path, open_clip.WEIGHTS)
    if not config.is_file():
        raise FormatError(
            f"{path} has neither {open_clip.CONFIG} (OpenCLIP) nor {transformers.CONFIG} "
            "(transformers); for weights alone name the file"
        )
    names = (transformers.PREPROCESSOR, "processor_config.json")
    images = next((read_json(path / n) for n in names if (path / n).is_file()), None)
    described = _described(path, transformers.describe, stored, images)
    return "transformers", described, _weights(path, transformers.WEIGHTS)


def _described(path: Path, describe: Callable[..., Described], *stored: Any) -> Described:
    try:
        return describe(*stored)
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
        raise FormatError(f"{path}: a field of its configuration is not understood: {e}") from e


def _find(path: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files, or the index of one that is in parts."""
    files = (path / f for name in names for f in (name, f"{name}.index.json"))
    return next((f for f in files if f.is_file()), None)


def _weights(path: Path, name: str) -> Path:
    """The file, or any library's by its common name.

    Raises:
        FormatError: there is none, or a pickle in its place.
    """
    if found := _find(path, (name, transformers.WEIGHTS)):
        return found
    if pickles := [f for f in sorted(path.iterdir()) if f.suffix in PICKLES]:
        raise _pickle(pickles[0], name)
    raise FormatError(f"{path} has no {name}")


def _pickle(path: Path, safe: str) -> FormatError:
    return FormatError(PICKLE.format(path=path, name=path.name, safe=safe))


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in (".safetensors", ".json"):
        raise FormatError(f"{path}: weights are .safetensors, or the .json index of several")
    try:
        return read_safetensors(path)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise FormatError(f"{path} is no index of weight files: {e!r}") from e


def _bare(library: str, weights: dict, arch: str, act: str, vocab: str) -> Foreign:
    params = READERS[library](weights, arch)
    rows = len(params["text"]["token_embedding"])
    grid = round((len(params["visual"]["positional_embedding"]) - 1) ** 0.5)
    shape = replace(
        ARCHITECTURES[arch],
        image_size=grid * ARCHITECTURES[arch].patch,
        context_length=len(params["text"]["positional_embedding"]),
    )
    wordpiece = bool(vocab) or (shape.clipa and rows != ClipTokenizer.vocab_size)
    described = Described(shape, act, rows, wordpiece)
    tokenizer = _tokenizer(Path(), described, vocab)
    note = "mean, deviation and resize rule are taken to be CLIP's: a weight file does not say them"
    return Foreign(library, _config(described, arch, params), tokenizer, params, (note,))


def _config(described: Described, arch: str, params: Mapping[str, Any]) -> Config:
    """Raises:
    FormatError: the positional embeddings are another image size's or text length's.
    """
    sizes = {
        "image_size": described.shape.image_size, "context_length": described.shape.context_length
    }  # fmt: skip
    patches = len(params["visual"]["positional_embedding"]) - 1
    positions = len(params["text"]["positional_embedding"])
    if (sizes["image_size"] // described.shape.patch) ** 2 != patches:
        raise FormatError(
            f"image_size={sizes['image_size']} in the configuration, and weights for {patches} "
            "patches"
        )
    if sizes["context_length"] != positions:
        raise FormatError(
            f"texts of {sizes['context_length']} tokens in the configuration, and weights for "
            f"{positions}"
        )
    form = "sigmoid" if "logit_bias" in params else "softmax"
    return validate(Config(
        # Evaluated as it was stored; a run that begins with it has its own dtype.
        model=ModelConfig(arch=arch, act=described.act, dtype="float32", **sizes),
        loss=LossConfig(contrastive_form=form, hni=0.0, tag=0.0),
    ))  # fmt: skip


def _tokenizer(folder: Path, described: Described, vocab: str) -> Tokenizer:
    length, rows = described.shape.context_length, described.vocab_size
    if described.wordpiece and vocab:
        try:
            found = WordPieceTokenizer.of_file(vocab, length)
            return WordPieceTokenizer(found.vocabulary, length, rows)
        except TokenizerError as e:
            raise FormatError(str(e)) from e
    if vocab:
        raise FormatError(f"--vocab={vocab}: this model's texts are read by CLIP's byte pairs")
    if described.wordpiece:
        if folder == Path():
            raise FormatError(
                f"{rows:,} rows of token embedding are a WordPiece's: name its vocab.txt by --vocab"
            )
        return read_wordpiece(folder, length, rows)
    if rows != ClipTokenizer.vocab_size:
        raise FormatError(
            f"a vocabulary of {rows:,}, and CLIP's byte pairs are {ClipTokenizer.vocab_size:,}"
        )
    check_clip(folder)
    return ClipTokenizer(length)


def _check_resize(described: Described, our_resize: bool) -> tuple[str, ...]:
    theirs, ours = described.resize, Resize()
    if theirs == ours:
        return ()
    said = (
        f"its pictures were resized otherwise (mode {theirs.mode}, {theirs.interpolation}) than "
        f"here (mode {ours.mode}, {ours.interpolation}: shorter side, then the middle)"
    )
    if not our_resize:
        raise FormatError(
            f"{said}, so scores would differ a little: --our-resize imports it all the same"
        )
    return (f"{said}; imported all the same",)


def _with_our_colours(foreign: Foreign, described: Described) -> Foreign:
    """The same model for pictures normalised by CLIP's mean and deviation.

    Both normalisations are linear in a pixel, and so is the patch embedding: their ratio goes into
    its kernel, their difference into the position of every patch. Exact but for rounding.
    """
    mean, std = np.float64(described.mean), np.float64(described.std)
    if mean.shape != (3,) or std.shape != (3,) or not np.all(std > 0):
        raise FormatError(f"mean {mean} and deviation {std} are not those of three colours")
    if np.allclose(mean, CLIP_MEAN, atol=1e-6) and np.allclose(std, CLIP_STD, atol=1e-6):
        return foreign
    visual = foreign.params["visual"]
    kernel = visual["patch_embed"]["kernel"]
    by_colour = kernel.astype(np.float64).reshape(-1, 3, kernel.shape[-1])
    scaled = (by_colour * (CLIP_STD / std)[:, None]).reshape(kernel.shape)
    constant = np.einsum("pcd,c->d", by_colour, (CLIP_MEAN - mean) / std)
    positions = visual["positional_embedding"].astype(np.float64)
    positions[1:] += constant  # the first is the class token's
    changed = {
        "patch_embed": {"kernel": scaled.astype(np.float32)},
        "positional_embedding": positions.astype(np.float32),
    }
    note = (
        f"its mean {_rounded(mean)} and deviation {_rounded(std)} are carried by the patch "
        "embedding, which now takes CLIP's"
    )
    params = foreign.params | {"visual": visual | changed}
    return replace(foreign, params=params, notes=(*foreign.notes, note))


def _rounded(x: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in x]
