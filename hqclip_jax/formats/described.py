"""What a model of another library says of itself, in our terms, and what is refused of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hqclip_jax.models.vision import CLIP_MEAN, CLIP_STD
from hqclip_jax.models.zoo import Architecture

# With the digits that OpenAI published: an f32's own would be others.
MEAN, STD = (tuple(float(str(x)) for x in constant) for constant in (CLIP_MEAN, CLIP_STD))


class FormatError(ValueError):
    """A model that can't be read or written in this form; the message names the field or file."""


@dataclass(frozen=True)
class Resize:
    """How a picture becomes a square: OpenCLIP's terms. This code does the first of each."""

    mode: str = "shortest"
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Described:
    """A model by its files other than the weights.

    Attributes:
        shape: towers, image size, text length.
        act: "gelu" or "quick_gelu".
        vocab_size: rows of its token embedding.
        wordpiece: its texts are read by BERT's WordPiece, else by CLIP's byte pairs.
        mean, std: of the three colours, from 0 to 1.
        resize: its rule for pictures.
    """

    shape: Architecture
    act: str
    vocab_size: int
    wordpiece: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    resize: Resize = Resize()


def check_inert(
    given: Mapping[str, Any], known: set[str], inert: Mapping[str, Any], where: str
) -> None:
    """Refuses what this code would ignore though it changes the outputs.

    Args:
        given: a section of a config file.
        known: fields that are read.
        inert: fields that may have this value, which changes nothing; any may be empty or off.
        where: the section's name, for the message.

    Raises:
        FormatError: names the fields and their values.
    """
    faults = [
        f"{where}.{name}={value!r}"
        for name, value in given.items()
        if name not in known and value and value != inert.get(name)
    ]
    if faults:
        raise FormatError(f"the towers here do not compute {', '.join(faults)}")


def field(given: Mapping[str, Any], name: str, where: str, kind: type = int) -> Any:
    """Raises:
    FormatError: the field is missing, or of another type.
    """
    value = given.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{where}.{name}={value!r} is no {kind.__name__}")
    return value


def section(given: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Raises:
    FormatError: it is missing.
    """
    return field(given, name, where, dict)
