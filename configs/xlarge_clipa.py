"""CLIPA-v2's two stages for ViT-L/14 (Li et al. 2023), which the paper's released model is named
after: nearly all samples as 84-pixel images and 8 tokens, the last ones in full size. Batch, rates
and samples are CLIPA-v2's; warm-up, and that HQ-CLIP was trained so, are our inference. Tokens are
CLIP's byte pairs; --config.data.vocab=vocab.txt takes BERT's, as CLIPA-v2 did.

    --config=configs/xlarge_clipa.py            84 px, 8 tokens, 12.8B samples
    --config=configs/xlarge_clipa.py:finetune   224 px, 32 tokens, 512M samples
"""

from hqclip_jax.config import Config, ConfigError, MeshConfig, ModelConfig, OptimConfig

# Pixels, tokens, remat, batch, samples, warm-up, learning rate of 256 images.
STAGES = {
    "pretrain": (84, 8, "dots", 65_536, "12.8B samples", "3200 steps", 8e-6),
    "finetune": (224, 32, "full", 32_768, "512M samples", "1600 steps", 8e-7),
}


def get_config(arg: str = "pretrain") -> Config:
    """Args:
    arg: the stage, `pretrain` or `finetune`.
    """
    if arg not in STAGES:
        raise ConfigError(f"configs/xlarge_clipa.py:{arg}: the stages are {', '.join(STAGES)}")
    pixels, tokens, remat, batch, duration, warmup, lr = STAGES[arg]
    return Config(
        model=ModelConfig(
            arch="ViT-L/14-CLIPA", image_size=pixels, context_length=tokens, remat=remat
        ),
        optim=OptimConfig(
            batch=batch, duration=duration, warmup=warmup, lr=lr * batch / 256, beta2=0.95
        ),
        mesh=MeshConfig(fsdp=16),
    )
