"""A Qwen2-VL of the smallest kind, with random weights: the folder of a real model in seconds.

It has every part of the family (vision tower, merger, multimodal rotary positions, processor, chat
template) and one or two million parameters, so that vLLM and transformers take it for what it says
it is, on a CPU. Tests drive the engine with it; `make demo-lvlm` trains one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLProcessor

HEAD = 32  # of what CPU attention takes, the smallest
MERGE = 2
NAMES = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
SPECIAL = {name: f"<|{name}|>" for name in NAMES.split()}
TURN = "{{ '<|im_start|>' + message.role + '\\n' }}"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + TURN
    + "{% if message.content is string %}{{ message.content }}{% else %}"
    + "{% for part in message.content %}"
    + "{% if part.type == 'text' %}{{ part.text }}{% else %}" + PICTURE + "{% endif %}"
    + "{% endfor %}{% endif %}"
    + "{{ '<|im_end|>\\n' }}"
    + "{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # fmt: skip


def make_tiny(
    directory: Path,
    *,
    hidden: int = 128,
    layers: int = 2,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    image_size: int = 112,
    patch: int = 14,
    vocabulary: int = 512,
    texts: Iterable[str] | None = None,
    context: int = 2048,
    seed: int = 0,
) -> None:
    """Writes a model's folder: weights (f32, safetensors), configuration, tokenizer, processor.

    Args:
        directory: is made; files of those names are replaced.
        hidden: width of the language model, a multiple of 64.
        layers: of the language model.
        vision_hidden: width of the vision tower, a multiple of 32.
        vision_layers: of the vision tower.
        image_size: pixels; every picture is resized to about the square of it.
        patch: pixels; a picture costs (image_size / patch / 2)² tokens.
        vocabulary: entries of the tokenizer at most; bytes and special tokens take 263.
        texts: what the tokenizer learns its entries from; by default texts of rendered scenes.
        context: tokens of question and answer at most.
        seed: of the weights.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(scene_texts() if texts is None else texts, vocabulary)
    config = make_config(tokenizer, hidden, layers, vision_hidden, vision_layers, patch, context)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    make_processor(tokenizer, image_size, patch).save_pretrained(directory)


def scene_texts(count: int = 500) -> Iterable[str]:
    """What a model of rendered scenes reads and writes."""
    import json

    from hqclip_jax import scenes
    from hqclip_jax.shapes import sample

    for index in range(count):
        scene = sample(0, index)
        yield scenes.alt_text(scene, scene.rng(scenes.ALT_TEXT))
        yield json.dumps(scenes.annotation(scene), separators=(",", ":"))


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> "Qwen2Tokenizer":
    """A byte-level BPE as the family's: any text goes in and comes out as it was.

    Raises:
        ValueError: `vocabulary` does not hold the bytes and the special tokens.
    """
    import json

    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(SPECIAL):
        raise ValueError(f"a vocabulary of {vocabulary} does not hold the bytes: 263 or more")
    blank = Qwen2Tokenizer().backend_tokenizer
    blank.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    learned = json.loads(blank.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=SPECIAL["im_end"],
        pad_token=SPECIAL["endoftext"],
        additional_special_tokens=list(SPECIAL.values()),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(
    tokenizer: "Qwen2Tokenizer",
    hidden: int,
    layers: int,
    vision_hidden: int,
    vision_layers: int,
    patch: int,
    context: int,
) -> "Qwen2VLConfig":
    from transformers import Qwen2VLConfig

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    heads = hidden // HEAD
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        # Of each head's 16 frequencies, those that turn with time, height and width.
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6],
        },
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
    }  # fmt: skip
    vision = {
        "depth": vision_layers,
        "embed_dim": vision_hidden,
        "hidden_size": hidden,
        "num_heads": vision_hidden // HEAD,
        "patch_size": patch,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def make_processor(tokenizer: "Qwen2Tokenizer", image_size: int, patch: int) -> "Qwen2VLProcessor":
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    patches = {"patch_size": patch, "merge_size": MERGE}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, **patches),
        chat_template=CHAT_TEMPLATE,
    )
