"""A teacher for small students: the generator's annotations, told so that they can be learned."""

from dataclasses import replace

from hqclip_jax import scenes
from hqclip_jax.scenes import OPPOSITE
from hqclip_jax.shapes import Scene

FALSIFIED = (("color", "shape"), ("texture",), ("size",), ("background",))
"""What is changed in each sentence, as `hqclip_jax.scenes.FALSIFIED`."""


def in_order(scene: Scene) -> Scene:
    """The same picture with the left or upper group told first."""
    if scene.relation not in ("right of", "below"):
        return scene
    return replace(scene, groups=scene.groups[::-1], relation=OPPOSITE[scene.relation])


def annotation(scene: Scene) -> dict[str, list[str]]:
    """The four lists as `hqclip_jax.scenes.annotation` has them, in one order and with fewer kinds
    of falsehoods: a model of three million parameters learns these in minutes."""
    return scenes.annotation(in_order(scene), FALSIFIED)
