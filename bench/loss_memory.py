"""How much memory do the contrastive loss, HNI and their gradients take on a pod?

    python -m bench.loss_memory [--topology=v5e:8x8]

Compiles `losses.image_text`, which training calls, with its gradients for a TPU topology, on any
machine. Embeddings are bf16, and once f32, as the step's own normalisation leaves them. These are
the compiler's plans, not readings from a chip. Prints, last, one JSON object.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from hqclip_jax.config import LossConfig, MeshConfig
from hqclip_jax.hardware import topology_devices
from hqclip_jax.losses import contrastive_reference, hni_reference, image_text
from hqclip_jax.sharding import batch_sharding, make_mesh, replicated

D = 768
MIB = 2**20


def compile_losses(
    topology: str, batch: int, plain: bool = False, dtype: jnp.dtype = jnp.bfloat16
) -> jax.stages.Compiled:
    """Loss, metrics and gradients of embeddings [batch, D] over all chips.

    Args:
        plain: the reference under a plain jit, to compare with.
    """
    mesh = make_mesh(MeshConfig(), batch, topology_devices(topology))
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def loss(zimg_BxD, ztxt_BxD, zneg_BxD, scale, mask_B):
        if plain:
            total = contrastive_reference(zimg_BxD, ztxt_BxD, scale)[0]
            return total + hni_reference(zimg_BxD, ztxt_BxD, zneg_BxD, mask_B, scale), {}
        metrics = image_text(
            zimg_BxD, ztxt_BxD, scale, LossConfig(), mesh, zneg_BxD=zneg_BxD, neg_mask_B=mask_B
        )
        return metrics["loss/contrastive"] + metrics["loss/hni"], metrics

    z_BxD = jax.ShapeDtypeStruct((batch, D), dtype, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    mask_B = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=rows)
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    shardings = ((whole, whole), (rows, rows, rows, whole))
    return jax.jit(gradients, out_shardings=shardings).lower(
        z_BxD, z_BxD, z_BxD, scale, mask_B
    ).compile()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:8x8")
    args = parser.parse_args()
    figures: dict = {"topology": args.topology}
    for batch, suffix in ((90_112, ""), (524_288, "_524288")):
        compiled = compile_losses(args.topology, batch)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        figures |= {
            f"mib_per_chip{suffix}": round(memory.temp_size_in_bytes / MIB, 2),
            f"peak_mib_per_chip{suffix}": round(memory.peak_memory_in_bytes / MIB, 2),
            f"all_to_all{suffix}": text.count("all-to-all"),
        }
        print(f"batch {batch:,}: {figures[f'mib_per_chip{suffix}']} MiB of temporaries per chip")
    plain = compile_losses(args.topology, 32_768, plain=True).memory_analysis()
    figures["mib_per_chip_plain_jit_32768"] = round(plain.temp_size_in_bytes / MIB, 2)
    ours = compile_losses(args.topology, 32_768).memory_analysis()
    figures["mib_per_chip_32768"] = round(ours.temp_size_in_bytes / MIB, 2)
    exact = compile_losses(args.topology, 90_112, dtype=jnp.float32).memory_analysis()
    figures["mib_per_chip_f32"] = round(exact.temp_size_in_bytes / MIB, 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
