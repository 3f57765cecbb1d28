"""A teacher for a small student: the generator's annotations, told so that they can be learned.

The order of telling and what is falsified follow from the picture, where `hqclip_jax.scenes` draws
them: a model of three million parameters learns a rule in minutes, and of a draw only that anything
may come.
"""

from dataclasses import replace

from hqclip_jax import scenes
from hqclip_jax.scenes import OPPOSITE
from hqclip_jax.shapes import ANNOTATION, Scene, alterations, pick


def in_order(scene: Scene) -> Scene:
    """The same picture with the left or upper group told first."""
    if scene.relation not in ("right of", "below"):
        return scene
    return replace(scene, groups=scene.groups[::-1], relation=OPPOSITE[scene.relation])


def contradict(scene: Scene) -> Scene:
    """A scene of which every sentence of `hqclip_jax.scenes.describe` is false here.

    Of the group that is told first another colour (another shape, where it is several), texture and
    size; and another background.
    """
    rng = scene.rng(ANNOTATION)
    several = scene.groups[0].count > 1
    for fact in ("shape" if several else "color", "texture", "size", "background"):
        altered = alterations(scene, fact)
        scene = pick(rng, [s for s in altered if s.groups[1:] == scene.groups[1:]])
    return scene


def annotation(scene: Scene) -> dict[str, list[str]]:
    """The four lists, as `hqclip_jax.scenes.annotation` has them."""
    told = in_order(scene)
    return scenes.annotation(told, contradict(told))
