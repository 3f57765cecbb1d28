"""CLIPA-v2's two stages for ViT-L/14 (Li et al. 2023), which the paper's released model is named
after: nearly all samples as 84-pixel images and 8 tokens, the last ones in full size. Batch, rates
and samples are CLIPA-v2's; warm-up, and that HQ-CLIP was trained so, are our inference. Tokens are
CLIP's byte pairs, not BERT's.

    --config=configs/xlarge_clipa.py            84 px, 8 tokens, 12.8B samples
    --config=configs/xlarge_clipa.py:finetune   224 px, 32 tokens, 512M samples
"""

from hqclip_jax.config import Config, ConfigError, MeshConfig, ModelConfig, OptimConfig


def get_config(arg: str = "pretrain") -> Config:
    """Args:
    arg: the stage, `pretrain` or `finetune`.
    """
    if arg == "pretrain":
        return Config(
            model=ModelConfig(
                arch="ViT-L/14-CLIPA", image_size=84, context_length=8, remat="dots"
            ),
            optim=OptimConfig(
                batch=65_536, duration="12.8B samples", warmup="3200 steps",
                lr=8e-6 * 65_536 / 256, beta2=0.95,
            ),
            mesh=MeshConfig(fsdp=16),
        )  # fmt: skip
    if arg == "finetune":
        return Config(
            model=ModelConfig(
                arch="ViT-L/14-CLIPA", image_size=224, context_length=32, remat="full"
            ),
            optim=OptimConfig(
                batch=32_768, duration="512M samples", warmup="1600 steps",
                lr=8e-7 * 32_768 / 256, beta2=0.95,
            ),
            mesh=MeshConfig(fsdp=16),
        )  # fmt: skip
    raise ConfigError(f"configs/xlarge_clipa.py:{arg}: the stages are pretrain and finetune")
