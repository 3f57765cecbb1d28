"""A real vLLM whose model knows nothing: random weights, held by a grammar to answers that pass.

`python -m tests.refine.real_engine run --engine vllm --structured …` is `python -m refine` with
that grammar in place of the schema, here and in the processes of its engines.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from refine import command, parse
from refine.__main__ import main
from refine.engines.backend import Backend, Reply, Sampling
from refine.engines.vllm import Vllm, VllmBackend
from refine.prompts import Prompt

OPTIONS = {
    "kv_cache_memory_bytes": 256 << 20,
    "enforce_eager": True,
    "dtype": "float32",
    "mm_processor_cache_gb": 0,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CACHE_ROOT": "/tmp/hqclip-vllm-cache",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # starts in 2 s and not in 20
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
WORDS = {
    "desc": ["a box of milk stands on a shelf.", "red apples lie in a crate.",
             "there are some leeks in a basket.", "a carton with a blue label."],
    "neg_desc": ["a dog sleeps on a sofa.", "two cars wait at a crossing.",
                 "the moon rises over a lake.", "a man rides a grey horse."],
    "tags": ["milk", "apples", "shelf", "leek"],
    "neg_tags": ["dog", "car", "moon", "horse"],
}  # fmt: skip


def grammar() -> dict:
    """The schema with one of a few texts for each field: a model can say nothing else."""
    lists = {
        name: {"type": "array", "items": {"enum": words}, "minItems": 1, "maxItems": 1}
        for name, words in WORDS.items()
    }
    return parse.SCHEMA | {"properties": lists}


class Noted(VllmBackend):
    """Writes the keys of answers to the file that HQCLIP_TEST_ANSWERS names before it gives them
    away: in it twice is what was generated twice."""

    def replies(self) -> list[Reply]:
        replies = super().replies()
        noted = os.environ.get("HQCLIP_TEST_ANSWERS")
        if noted and replies:
            with open(noted, "a") as file:
                file.write("".join(f"{reply.key}\n" for reply in replies))
        return replies


@dataclass(frozen=True)
class Held(Vllm):
    """A model whose processes know the grammar."""

    def open(self, prompt: Prompt, sampling: Sampling, max_pixels: int) -> Backend:
        parse.SCHEMA = grammar()
        return Noted(self, prompt, sampling, max_pixels)


def arguments() -> list[str]:
    """What a run on a CPU is started with."""
    return [f"--vllm-option={name}={json.dumps(value)}" for name, value in OPTIONS.items()]


def tiny(folder: Path) -> Path:
    """The model's folder, made where it is missing."""
    from refine.teaching.tiny import make_tiny

    if not (folder / "model.safetensors").exists():
        make_tiny(folder)
    return folder


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    original = command._vllm
    command._vllm = lambda args: Held(**vars(original(args)))
    sys.exit(main())
