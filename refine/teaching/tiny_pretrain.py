"""python -m refine.teaching.tiny_pretrain: a base model, which sees and does not yet speak.

It stands for the published weights that a student begins with, which no laptop can make: a tiny
Qwen2-VL whose vision tower has learned, on rendered scenes of its own, what there is in each part
of a picture; its language model is random. Without this a student of its size learns the form of an
answer in minutes, and guesses the facts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hqclip_jax import shapes
from hqclip_jax.scene_teacher import in_order
from hqclip_jax.shapes import BACKGROUNDS, COLORS, SHAPES, SIDE, SIZES, TEXTURES, Scene
from refine.arguments import positive
from refine.parallel import ordered_map
from refine.progress import progress
from refine.prompts import Prompt, load_prompt
from refine.teaching.tiny import MERGE, make_tiny, scene_texts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

PATCH = 8
GRID = SIDE // (PATCH * MERGE)
CELL = SIDE / GRID
REACH = 12.0  # pixels: the four cells around a shape's centre are its group's
QUESTIONS = {
    "color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": len(SIZES) + 1,
    "texture": len(TEXTURES) + 1, "count": 4, "place": 3, "background": len(BACKGROUNDS),
}  # fmt: skip
"""What is asked about each cell, and the number of answers: 0 where nothing is, except of the
background. The place is whether the cell's group is the first (left or upper) or the second."""
RATE, WARMUP = 2e-3, 50


def answers(scene: Scene) -> np.ndarray:
    """int64 [GRID * GRID, questions], cells in rows from the top."""
    scene = in_order(scene)
    found = np.zeros((GRID, GRID, len(QUESTIONS)), np.int64)
    found[..., -1] = list(BACKGROUNDS).index(scene.background)
    y, x = (np.mgrid[:GRID, :GRID] + 0.5) * CELL
    for group, across, down in shapes.centers(scene):
        told = (
            list(COLORS).index(group.color) + 1,
            list(SHAPES).index(group.shape) + 1,
            list(SIZES).index(group.size) + 1,
            list(TEXTURES).index(group.texture) + 1,
            group.count,
            scene.groups.index(group) + 1,
        )
        found[np.hypot(x - across, y - down) < REACH, :-1] = told
    return found.reshape(GRID * GRID, -1)


def _example(_: None, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    scene = shapes.sample(*key)
    return shapes.render(scene), answers(scene)


def make_base(
    directory: Path, prompt: Prompt, scenes: int, steps: int, batch: int, seed: int
) -> None:
    """Writes the base model's folder.

    Args:
        directory: is made.
        prompt: the student's; its tokenizer learns the words of it, and those of scenes.
        scenes: rendered for it; from the training split, so that no held-out pair is among them.
        steps: of the vision tower's training.
        batch: pictures a step.
        seed: of scenes, weights and order.
    """
    import torch
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    often = [prompt.text, "user\n", "assistant\n"] * 500
    make_tiny(
        directory, hidden=192, layers=4, vision_hidden=128, vision_layers=4, image_size=SIDE,
        patch=PATCH, texts=[*scene_texts(), *often], seed=seed,
    )  # fmt: skip
    rendered = ordered_map(_example, [(seed, index) for index in range(scenes)], workers=2)
    pictures, labels = (np.stack(column) for column in zip(*rendered))
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory)
    look = AutoProcessor.from_pretrained(directory).image_processor
    torch.manual_seed(seed)
    train(model, look, pictures, torch.from_numpy(labels), steps, batch, seed)
    model.save_pretrained(directory)


def train(
    model: "Qwen2VLForConditionalGeneration",
    look: "Qwen2VLImageProcessor",
    pictures: np.ndarray,
    labels: "Tensor",
    steps: int,
    batch: int,
    seed: int,
) -> list[float]:
    """Trains the vision tower to answer about each cell, by linear heads that are dropped then.

    Args:
        model: changed in place.
        look: makes a tower's input of pictures.
        pictures: uint8 [scenes, SIDE, SIDE, 3].
        labels: int64 [scenes, GRID * GRID, questions].
        steps: of AdamW, its rate falling to 0.
        batch: pictures a step.
        seed: of the order.

    Returns:
        The share of answers about cells with something in them that are right in the last step, by
        question.
    """
    import torch
    from torch.nn.functional import cross_entropy

    tower = model.model.visual.train()
    width = model.config.text_config.hidden_size
    heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in QUESTIONS.values())
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1) * (1 - step / steps)
    )
    order = np.random.default_rng(seed)
    right: list[float] = []
    with progress("learning to see", steps, "steps") as bar:
        for _ in range(steps):
            chosen = order.integers(0, len(pictures), batch)
            inputs = look(images=list(pictures[chosen]), return_tensors="pt")
            cells = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            told, true = [head(cells) for head in heads], labels[chosen].flatten(0, 1).unbind(1)
            loss = sum(cross_entropy(t, a) for t, a in zip(told, true))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            filled = true[0] > 0
            right = [(t.argmax(1) == a)[filled].float().mean().item() for t, a in zip(told, true)]
            bar.advance(1, f"{min(right):.0%} or more")
    return right


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m refine.teaching.tiny_pretrain", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--prompt", required=True, metavar="NAME|FILE", help="whose words its tokenizer is to know"
    )
    parser.add_argument("--scenes", type=positive, default=20_000, help="default: 20,000")
    parser.add_argument("--steps", type=positive, default=1200, help="default: 1,200")
    parser.add_argument("--batch", type=positive, default=32, help="default: 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one for each file that is read or written
    make_base(args.output, load_prompt(args.prompt), args.scenes, args.steps, args.batch, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
