import dataclasses

import pytest

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig, validate
from hqclip_jax.cost import device_memory, image_tokens, recomputed_flops, step_flops
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import init_state


def of(arch: str, **model) -> Config:
    loss = LossConfig(hni=0, tag=0)
    return validate(Config(model=ModelConfig(arch=arch, **model), loss=loss, optim=OptimConfig(1)))


# OpenCLIP's profile of its models: GFLOPs of the forward pass of one image and of one text.
@pytest.mark.parametrize(
    ("arch", "image", "text"),
    [("ViT-B/32", 8.82, 5.96), ("ViT-B/16", 35.13, 5.96), ("ViT-L/14", 162.03, 13.30),
     ("ViT-H/14", 334.59, 46.51)],
)  # fmt: skip
def test_forward_flops_are_the_published_ones(arch, image, text):
    flops = step_flops(of(arch), 0)
    assert flops["image"] / 3e9 == pytest.approx(image, rel=0.02)
    assert flops["text"] / 3e9 == pytest.approx(text, rel=0.02)
    assert flops["negative text"] == 0


def test_a_step_is_linear_in_the_batch_but_for_the_logit_matrix():
    small = validate(dataclasses.replace(of("ViT-B/32"), loss=LossConfig()))
    large = dataclasses.replace(small, optim=OptimConfig(batch=1000))
    one, many = step_flops(small, 100), step_flops(large, 100)
    assert many["image"] == 1000 * one["image"]
    assert many["negative text"] == many["text"] > 0
    assert many["loss"] == 1000**2 * one["loss"]
    assert many["heads"] == 1000 * 3 * 2 * (512 * (768 + 2 * 512) + 768 * 100)


@pytest.mark.parametrize(
    ("weights", "matrices"),
    [
        ({"contrastive": 1, "hni_form": "pair"}, 1), ({"contrastive": 0, "hni_form": "pair"}, 0),
        ({"contrastive": 0, "hni_form": "own"}, 1), ({"contrastive": 0, "hni_form": "all"}, 2),
        ({"contrastive": 1, "hni_form": "all"}, 2),
    ],
)  # fmt: skip
def test_logit_matrices_count_where_they_are_made(weights, matrices):
    loss = LossConfig(**weights)
    config = dataclasses.replace(of("ViT-B/32"), loss=loss, optim=OptimConfig(batch=10))
    assert step_flops(config, 100)["loss"] == matrices * 3 * 2 * 10**2 * 512


def test_dropped_patches_shorten_the_sequence():
    assert image_tokens(of("ViT-L/14")) == 257
    assert image_tokens(of("ViT-L/14", patch_dropout=0.5)) == 129
    assert (
        step_flops(of("ViT-L/14", patch_dropout=0.5), 0)["image"]
        < 0.51 * (step_flops(of("ViT-L/14"), 0)["image"])
    )


def test_full_remat_repeats_the_towers_and_micro_batches_once_more():
    config = of("ViT-B/32", remat="full")
    flops = step_flops(config, 0)
    towers = (flops["image"] + flops["text"]) / 3
    assert recomputed_flops(config, flops) == pytest.approx(towers + flops["loss"] / 3)
    parts = dataclasses.replace(config, optim=OptimConfig(batch=4, micro_batches=2))
    flops = step_flops(parts, 0)
    assert recomputed_flops(parts, flops) == pytest.approx(8 * towers + flops["loss"] / 3)


def test_memory_falls_with_fsdp_micro_batches_and_remat():
    def total(remat="none", fsdp=1, parts=1) -> tuple[int, int]:
        config = config_lib.load(
            "configs/small.py",
            {"model.remat": remat, "mesh.fsdp": str(fsdp), "optim.micro_batches": str(parts)},
        )
        mesh = make_mesh(MeshConfig(fsdp=fsdp), 4096)
        _, abstract, _, _ = init_state(config, 49408, 100, make_tx(config.optim, 1, 2), mesh)
        memory = device_memory(config, abstract, mesh)
        return memory["parameters"] + memory["optimizer"], memory["activations"]

    whole, activations = total()
    assert total(fsdp=8)[0] < whole / 7
    assert total(parts=4)[1] == pytest.approx(activations / 4)
    assert total("full")[1] < total("dots")[1] < activations
