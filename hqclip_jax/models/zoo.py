"""Named architectures, with the published widths (OpenAI CLIP and OpenCLIP's model configs)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tower:
    """A transformer's shape; `mlp` is the hidden width of its feed-forward layers."""

    width: int
    layers: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class Architecture:
    """An image tower over square patches of `patch` pixels, a text tower, a shared space.

    Attributes:
        image_size: pixels that the published model takes; a configuration may ask for others.
        context_length: text tokens, likewise.
        clipa: CLIPA's form as OpenCLIP has it: no ln_pre, patches averaged and then normed instead
            of the class token, no causal mask, text pooled at the last position. The class token
            takes part in attention all the same.
    """

    vision: Tower
    patch: int
    text: Tower
    embed_dim: int
    image_size: int = 224
    context_length: int = 77
    clipa: bool = False


def _tower(width: int, layers: int, heads: int, mlp_ratio: float = 4.0) -> Tower:
    return Tower(width, layers, heads, int(width * mlp_ratio))


def _clipa(openai: Architecture) -> Architecture:
    return replace(openai, clipa=True, context_length=32)


_PICO = Architecture(_tower(128, 4, 2), 8, _tower(128, 3, 2), 128)
_B_VISION, _B_TEXT = _tower(768, 12, 12), _tower(512, 12, 8)
_L14 = Architecture(_tower(1024, 24, 16), 14, _tower(768, 12, 12), 768)
_H14 = Architecture(_tower(1280, 32, 16), 14, _tower(1024, 24, 16), 1024)
_BIG_G14 = Architecture(_tower(1664, 48, 16, 4.9231), 14, _tower(1280, 32, 20), 1280)

ARCHITECTURES = {
    # Ours, for demonstrations and small data: head width 64 like OpenCLIP's default.
    "ViT-Pico/8": _PICO,
    "ViT-Pico/8-CLIPA": _clipa(_PICO),
    "ViT-Nano/8": Architecture(_tower(192, 6, 3), 8, _tower(192, 4, 3), 192),
    "ViT-S/32": Architecture(_tower(384, 12, 6), 32, _tower(384, 12, 6), 384),
    "ViT-S/16": Architecture(_tower(384, 12, 6), 16, _tower(384, 12, 6), 384),
    "ViT-B/32": Architecture(_B_VISION, 32, _B_TEXT, 512),
    "ViT-B/16": Architecture(_B_VISION, 16, _B_TEXT, 512),
    "ViT-L/14": _L14,
    "ViT-L/14-336": replace(_L14, image_size=336),
    "ViT-H/14": _H14,
    "ViT-g/14": Architecture(_tower(1408, 40, 16, 4.3637), 14, _tower(1024, 24, 16), 1024),
    "ViT-bigG/14": _BIG_G14,
    "ViT-L/14-CLIPA": _clipa(_L14),
    "ViT-H/14-CLIPA": _clipa(_H14),
    "ViT-bigG/14-CLIPA": _clipa(_BIG_G14),
}


def differences(shape: Architecture, other: Architecture) -> list[str]:
    """What makes two architectures' parameters others, as "vision.width 768, not 1024"; how large
    pictures and how long texts are is not part of it."""
    pairs = {
        f"{tower}.{size}": (getattr(getattr(a, tower), size), getattr(getattr(b, tower), size))
        for a, b in [(shape, other)]
        for tower in ("vision", "text")
        for size in ("width", "layers", "heads", "mlp")
    }
    pairs |= {n: (getattr(shape, n), getattr(other, n)) for n in ("patch", "embed_dim", "clipa")}
    return [f"{name} {a}, not {b}" for name, (a, b) in pairs.items() if a != b]


def name_of(shape: Architecture) -> str:
    """The named architecture that has this shape; of several, the one for its image size.

    Raises:
        ValueError: none has; says which comes closest and what differs.
    """
    far = {name: differences(shape, arch) for name, arch in ARCHITECTURES.items()}

    def order(name: str) -> tuple[int, bool]:
        return len(far[name]), ARCHITECTURES[name].image_size != shape.image_size

    closest = min(ARCHITECTURES, key=order)
    if far[closest]:
        raise ValueError(
            f"no architecture here has this shape; closest is {closest}: {', '.join(far[closest])}"
        )
    return closest
