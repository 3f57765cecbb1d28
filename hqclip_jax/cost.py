"""What a step costs, by formula: floating-point operations and memory of a device.

A compiler's own count sees the body of a loop once, so operations are counted here. They are
*model* operations: what the mathematics needs, two per multiply-add, the backward pass twice the
forward, nothing of what a remat policy computes again (Chowdhery et al. 2022, appendix B).
"""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from hqclip_jax.config import Config
from hqclip_jax.models.attention import SCORES_BYTES, is_fused
from hqclip_jax.models.vision import patches_kept
from hqclip_jax.models.zoo import ARCHITECTURES, Tower
from hqclip_jax.sharding import bytes_per_device

BACKWARD = 2  # times the forward pass: gradients of the input and of the weights


def _tower_flops(tower: Tower, tokens: int) -> float:
    """One sequence through the blocks. Attention counts all pairs, under a causal mask too: a
    kernel may save half of those, and at CLIP's lengths they hardly matter."""
    linear = 2 * tokens * (4 * tower.width**2 + 2 * tower.width * tower.mlp)
    attention = 2 * 2 * tokens**2 * tower.width
    return tower.layers * (linear + attention)


def image_tokens(config: Config) -> int:
    """Length of the image sequence in training, class token included."""
    arch = ARCHITECTURES[config.model.arch]
    return patches_kept(arch, config.model.image_size, config.model.patch_dropout) + 1


def step_flops(config: Config, num_tags: int) -> dict[str, float]:
    """Model FLOPs of one training step of the global batch, forward and backward.

    Returns:
        by part: `image`, `text`, `negative text`, `heads` (both projections and the tag head) and
        `loss` (the logit matrices). Their sum is the step.
    """
    arch, loss, batch = ARCHITECTURES[config.model.arch], config.loss, config.optim.batch
    tokens = image_tokens(config)
    patches = 2 * (tokens - 1) * 3 * arch.patch**2 * arch.vision.width
    text = _tower_flops(arch.text, config.model.context_length)
    texts = 2 if loss.hni else 1
    tag_width = arch.embed_dim if loss.tag_input == "projected" else arch.vision.width
    shared = loss.hni and loss.hni_form != "pair"  # with the softmax over the batch's texts
    matrices = bool(loss.contrastive or shared) + bool(shared and loss.hni_form == "all")
    forward = {
        "image": _tower_flops(arch.vision, tokens) + patches,
        "text": text,
        "negative text": text if loss.hni else 0,
        "heads": 2 * arch.embed_dim * (arch.vision.width + texts * arch.text.width)
        + (2 * tag_width * num_tags if loss.tag else 0),
        "loss": 2 * batch * arch.embed_dim * matrices,
    }
    return {part: float(batch * (1 + BACKWARD) * flops) for part, flops in forward.items()}


def recomputed_flops(config: Config, flops: dict[str, float]) -> float:
    """What the remat policy and micro-batches compute again in a step, beside `step_flops`.

    `dots` and `offload` keep the large products and repeat the rest, about a tenth of the forward
    pass; the loss computes its blocks of logits again always.
    """
    towers = (flops["image"] + flops["text"] + flops["negative text"]) / (1 + BACKWARD)
    repeats = {"none": 0.0, "dots": 0.1, "offload": 0.1, "full": 1.0}[config.model.remat]
    repeats += config.optim.micro_batches > 1
    return towers * repeats + flops["loss"] / (1 + BACKWARD)


def _layer_bytes(tower: Tower, tokens: int, itemsize: int) -> dict[str, float]:
    """What one layer leaves on the device for the backward pass of one sequence, by policy, but for
    attention's scores. In units of tokens × width: residuals 2, norms 2, qkv 3, heads 1; and the
    hidden layer before and after its activation. `dots` keeps the products alone."""
    row, mlp = tokens * tower.width * itemsize, tokens * tower.mlp * itemsize
    return {"full": row, "offload": row, "dots": 6 * row + mlp, "none": 8 * row + 2 * mlp}


def device_memory(config: Config, abstract: Any, mesh: Mesh) -> dict[str, int]:
    """Bytes that a device holds at the height of a step; for pruning, not for the last GiB.

    Args:
        abstract: the `TrainState`, as shapes.
        mesh: of any devices, also ones that only a topology has; it depends on their platform
            whether attention writes its scores.

    Returns:
        by part: `parameters`, `optimizer`, `gradients`, `activations`, `workspace`, `inputs`.
    """
    arch, model = ARCHITECTURES[config.model.arch], config.model
    platform = mesh.abstract_mesh.abstract_device.platform
    itemsize = 2 if model.dtype == "bfloat16" else 4
    rows = config.optim.batch // (mesh.shape["replica"] * mesh.shape["fsdp"])
    part = rows // config.optim.micro_batches
    towers = (
        (arch.vision, image_tokens(config), part),
        (arch.text, model.context_length, part * (2 if config.loss.hni else 1)),
    )
    activations = workspace = 0.0
    for tower, tokens, sequences in towers:
        layer = _layer_bytes(tower, tokens, itemsize)
        activations += tower.layers * sequences * layer[model.remat]
        scores = 0.0
        heads, width = (n // mesh.shape["tensor"] for n in (tower.heads, tower.width))
        if not is_fused(platform, tokens, width, heads, jnp.dtype(model.dtype)):
            scores = 4.0 * sequences * tower.heads * tokens**2
            if model.remat == "none" and scores <= SCORES_BYTES:
                activations += tower.layers * scores
        # The layer under way is whole, with its gradients; heads and mlp are split over `tensor`.
        under_way = 2 * sequences * layer["none"] + 4 * min(scores, SCORES_BYTES)
        workspace = max(workspace, under_way / mesh.shape["tensor"])
    tags = len(abstract.params["tag_head"]["bias"]) if "tag_head" in abstract.params else 0
    workspace = max(workspace, 3 * part * tags * 4 / mesh.shape["tensor"])
    parameters = bytes_per_device(abstract.params, mesh)
    if model.remat == "none" and mesh.shape["fsdp"] > 1:
        # What a layer gathered it keeps for its backward pass.
        activations += parameters * mesh.shape["fsdp"] * itemsize / 4
    moments = bytes_per_device(abstract._replace(params=None), mesh)
    image = rows * model.image_size**2 * 3
    return {
        "parameters": parameters,
        "optimizer": moments,
        "gradients": parameters,
        "activations": int(activations),
        "workspace": int(workspace),
        "inputs": image + rows * 4 * 3 * model.context_length,
    }
