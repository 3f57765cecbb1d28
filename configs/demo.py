"""The tiny model of `make demo`: rendered scenes at 64 pixels, minutes on two CPU cores."""

from hqclip_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
)


def get_config(arg: str | None = None) -> Config:
    """Args:
    arg: length of the run, such as "20K samples" (the default).
    """
    return Config(
        model=ModelConfig(
            arch="ViT-Pico/8", image_size=64, context_length=64, dtype="float32", unroll=4
        ),
        data=DataConfig(crop_scale=(0.9, 1.0), threads=2, tag_vocabulary=500),
        optim=OptimConfig(
            batch=128, duration=arg or "20K samples", warmup="20 steps", lr=1e-3, beta2=0.98
        ),
        checkpoint=CheckpointConfig(every="100 steps"),
        log=LogConfig(every="10 steps"),
    )
