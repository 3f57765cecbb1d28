"""DataComp's large scale: 1.28B samples, the paper's VLM-150M setting."""

from hqclip_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(arch="ViT-B/16", remat="dots"),
        optim=OptimConfig(
            batch=8192, duration="1.28B samples", warmup="500 steps", lr=5e-4, beta2=0.98
        ),
    )
