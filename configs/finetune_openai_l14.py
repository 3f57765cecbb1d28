"""OpenAI's ViT-L/14, trained further on refined pairs.

The paper reports such a model; how it was trained is not published. All numbers here are our
inference: one pass over VLM-150M at a fiftieth of the rate that trains from scratch, so that what
the weights know is refined and not unlearned.

    python -m hqclip_jax.export --from=clip-vit-large-patch14 --out=runs/openai-l14
    python -m hqclip_jax.train --config=configs/finetune_openai_l14.py --workdir=runs/finetuned \
        --config.data.path=data/dfn-vlm150m

With --config=configs/finetune_openai_l14.py:DIR it begins with the checkpoint in DIR, such as that
of clip-vit-large-patch14-336 with --config.model.image_size=336. The negatives' texts and the tags'
head come with the losses; the head begins fresh.
"""

from hqclip_jax.config import Config, ModelConfig, OptimConfig


def get_config(arg: str = "runs/openai-l14") -> Config:
    """Args:
    arg: workdir of the imported checkpoint.
    """
    return Config(
        model=ModelConfig(arch="ViT-L/14", act="quick_gelu", remat="full"),
        optim=OptimConfig(
            batch=8192, duration="147M samples", warmup="500 steps", lr=1e-5, beta2=0.98
        ),
        init_from=arg,
    )
