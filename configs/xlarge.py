"""DataComp's xlarge scale: 12.8B samples, the paper's VLM-1B setting."""

from hqclip_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(arch="ViT-L/14", remat="full"),
        optim=OptimConfig(
            batch=90_112, duration="12.8B samples", warmup="10000 steps", lr=1e-3, beta2=0.95
        ),
    )
