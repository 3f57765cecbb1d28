"""DataComp's medium scale: 128M samples."""

from hqclip_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(arch="ViT-B/32", remat="none"),
        optim=OptimConfig(
            batch=4096, duration="128M samples", warmup="500 steps", lr=5e-4, beta2=0.98
        ),
    )
