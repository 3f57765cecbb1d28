"""DataComp's xlarge scale: 12.8B samples, the paper's VLM-1B setting.

As it is for 256 chips of v5e or 32 of v5p; where a chip's share of the batch leaves it less memory,
add `optim.micro_batches`, such as 2 on v4:4x4x4. `python -m hqclip_jax.plan` tells.
"""

from hqclip_jax.config import Config, MeshConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(arch="ViT-L/14", remat="full"),
        optim=OptimConfig(
            batch=90_112, duration="12.8B samples", warmup="10000 steps", lr=1e-3, beta2=0.95
        ),
        mesh=MeshConfig(fsdp=16),
    )
