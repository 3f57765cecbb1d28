"""A small model on 2,640 photos of groceries: minutes on two CPU cores, no GPU needed."""

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
    arg: length of the run, such as "8 epochs" (the default).
    """
    return Config(
        model=ModelConfig(
            arch="ViT-Pico/8", image_size=64, context_length=32, dtype="float32", unroll=4
        ),
        # Few photos, seen often: stronger crops than on the web, one sentence at a time.
        data=DataConfig(crop_scale=(0.5, 1.0), list_form="sample", threads=2, tag_vocabulary=200),
        optim=OptimConfig(
            batch=128, duration=arg or "8 epochs", warmup="50 steps", lr=1e-3, beta2=0.98
        ),
        checkpoint=CheckpointConfig(every="100 steps"),
        log=LogConfig(every="20 steps"),
    )
