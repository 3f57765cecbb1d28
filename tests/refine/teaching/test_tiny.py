import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lvlm

ROOT = Path(__file__).parents[3]
HARD = 'naïve 漢字 "quoted" \\ <|im_end> 🙂\n\ttabs'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from refine.teaching.tiny import make_tiny

    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def processor(tiny):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny)


def question(text: str) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_the_tokenizer_takes_any_text(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(HARD)["input_ids"]) == HARD
    assert len(tokenizer) <= 512
    assert len(tokenizer("a large red circle")["input_ids"]) == 4


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    from refine.teaching.tiny import make_tiny

    with pytest.raises(ValueError, match="263 or more"):
        make_tiny(tmp_path, vocabulary=256)


def test_a_picture_takes_the_tokens_that_its_size_says(processor):
    from PIL import Image

    text = processor.apply_chat_template(question("hi"), add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|vision_start|>")
    assert text.endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    for size, tokens in (((64, 64), 16), ((2000, 2000), 16), ((300, 100), 12)):
        inputs = processor(text=[text], images=[Image.new("RGB", size)], return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens


def test_the_same_seed_makes_the_same_weights(tiny, tmp_path):
    from refine.teaching.tiny import make_tiny

    for seed, same in ((0, True), (1, False)):
        make_tiny(tmp_path / str(seed), seed=seed)
        weights = tmp_path / str(seed) / "model.safetensors"
        assert (weights.read_bytes() == (tiny / "model.safetensors").read_bytes()) is same


ANSWER = """
import json, sys
import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

llm = LLM(
    model=sys.argv[1], dtype="float32", max_model_len=256, kv_cache_memory_bytes=64 << 20,
    max_num_seqs=4, enforce_eager=True, limit_mm_per_prompt={"image": 1, "video": 0},
    mm_processor_cache_gb=0,
)
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
content = [
    {"type": "image_pil", "image_pil": Image.fromarray(pixels)}, {"type": "text", "text": "hi"}
]
params = SamplingParams(max_tokens=12, temperature=0)
(output,) = llm.chat([{"role": "user", "content": content}], params)
print(json.dumps([list(output.prompt_token_ids), list(output.outputs[0].token_ids)]))
"""


def test_vllm_and_transformers_answer_alike(tiny, processor, tmp_path):
    """The same tokens from both: of the picture, of its positions, and of the question."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(tiny)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    prompt, answer = json.loads(done.stdout.splitlines()[-1])

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    text = processor.apply_chat_template(question("hi"), add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokens[0, len(prompt) :].tolist() == answer
