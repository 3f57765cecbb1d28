"""What do the TPU's attention kernels save, next to XLA's own form of attention?

    python -m bench.attention [--topology=v5e:2x2]

Compiles two layers of a tower, forward and backward under full remat, for a TPU that need not be
there, once with the kernels and once without, with the images and texts that a chip of 256 has of
`configs/xlarge.py`. Figures are the compiler's: milliseconds a layer by its cost model, which does
not count kernels (a lower bound, therefore), and MiB of temporaries. Prints, last, one JSON object.
"""

import argparse
import json
import time
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hqclip_jax.config import MeshConfig, ModelConfig
from hqclip_jax.hardware import chip_of, topology_devices
from hqclip_jax.hlo import estimated_cycles
from hqclip_jax.models import tpu_attention
from hqclip_jax.models.transformer import Transformer
from hqclip_jax.models.zoo import ARCHITECTURES, Tower
from hqclip_jax.sharding import batch_sharding, make_mesh, replicated

LAYERS = 2
ARCH = ARCHITECTURES["ViT-L/14"]
# Sequences a chip, tokens of each, causal.
TOWERS = {"image": (ARCH.vision, 352, 257, False), "text": (ARCH.text, 704, 77, True)}


def compiled(tower: Tower, sequences: int, tokens: int, causal: bool, mesh: Mesh):
    """Gradients of the layers and of what goes in."""
    config = ModelConfig(remat="full")
    tower = Tower(tower.width, LAYERS, tower.heads, tower.mlp)
    model = nnx.eval_shape(lambda: Transformer(tower, config, causal=causal, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, x_BxLxD):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(nnx.merge(graphdef, params)(x_BxLxD)[:, 0].astype(jnp.float32) ** 2)

    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        nnx.to_pure_dict(params),
    )
    x = jax.ShapeDtypeStruct(
        (sequences * mesh.size, tokens, tower.width), jnp.bfloat16, sharding=batch_sharding(mesh)
    )
    out_shardings = (replicated(mesh), batch_sharding(mesh))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=out_shardings)
    return gradients.lower(params, x).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="as of hqclip_jax.plan [v5e:2x2]")
    args = parser.parse_args()
    devices = topology_devices(args.topology)
    mesh, chip = make_mesh(MeshConfig(), len(devices), devices), chip_of(devices[0])
    figures = {}
    print(f"{'':16}{'ms a layer':>12}{'MiB':>8}{'s to compile':>14}")
    for name, shape in TOWERS.items():
        for form in ("kernels", "xla"):
            supports = tpu_attention.supports if form == "kernels" else lambda *_: False
            began = time.monotonic()
            with mock.patch.object(tpu_attention, "supports", supports):
                program = compiled(*shape, mesh)
            seconds = time.monotonic() - began
            text = program.as_text()
            assert ("attention_forward" in text) == (form == "kernels")
            ms = 1e3 * estimated_cycles(text) / chip.clock / LAYERS
            mib = program.memory_analysis().temp_size_in_bytes / 2**20
            figures |= {f"{name}_{form}_ms": round(ms, 1), f"{name}_{form}_mib": round(mib)}
            print(f"{name + ', ' + form:16}{ms:12.1f}{mib:8.0f}{seconds:14.0f}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
