"""DataComp's small scale: 12.8M samples."""

from hqclip_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(arch="ViT-B/32", remat="none"),
        optim=OptimConfig(
            batch=4096, duration="12.8M samples", warmup="500 steps", lr=5e-4, beta2=0.98
        ),
    )
