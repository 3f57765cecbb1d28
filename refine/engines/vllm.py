"""vLLM in this process: one engine, kept full, read after every step.

`LLM.generate` returns when its last answer is there; here requests are added while others run, and
an answer leaves as soon as it is whole. What vLLM serves with a chat template works: the template
is the model's own.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from refine.engines.backend import Reply, Request, Sampling
from refine.errors import RefineError

MARKS = 8
"""Tokens around a picture's own, such as those that say where it begins and ends, at most."""

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

    from refine.prompts import Prompt


@dataclass(frozen=True)
class Vllm:
    """A model for vLLM, and how it is loaded.

    Attributes:
        path: a folder in Hugging Face's layout, or a name on its hub.
        slots: sequences that the engine runs at a time.
        context: tokens of question and answer, or None for what `max_pixels` and the prompt take.
        memory: share of the GPU's memory that the engine takes.
        options: more arguments of `vllm.LLM`, by name.
        trust_remote_code: runs code that comes with the model; only where the user says so.
    """

    engine: ClassVar[str] = "vllm"
    max_cost: ClassVar[None] = None

    path: str
    slots: int = 256
    context: int | None = None
    memory: float = 0.9
    options: Mapping[str, object] = field(default_factory=dict)
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        return Path(self.path).name

    def identity(self) -> dict:
        """The name; of a folder, its files' names and sizes too."""
        folder = Path(self.path)
        if not folder.is_dir():
            return {"engine": self.engine, "name": self.path}
        files = sorted(p for p in folder.iterdir() if p.is_file())
        return {
            "engine": self.engine,
            "name": self.name,
            "files": {p.name: p.stat().st_size for p in files},
        }

    def open(self, prompt: "Prompt", sampling: Sampling, max_pixels: int) -> "VllmBackend":
        return VllmBackend(self, prompt, sampling, max_pixels)


class VllmBackend:
    """A running engine.

    Raises:
        RefineError: vLLM is not installed, the model can't be loaded, or `max_pixels` is not in
            force.
    """

    def __init__(self, model: Vllm, prompt: "Prompt", sampling: Sampling, max_pixels: int) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # one warning a sequence on CPUs
        try:
            from vllm import LLM
        except ImportError as e:
            raise RefineError(
                f"--engine vllm: vLLM can't be imported ({e}): install requirements-refine.txt, or "
                "name a server with --engine openai --base-url URL"
            ) from e
        self.slots = model.slots
        self._prompt, self._sampling = prompt, sampling
        self._names: dict[str, Request] = {}
        self._failed: list[Reply] = []
        try:
            self._llm = LLM(**_arguments(model, sampling, max_pixels))
        except Exception as e:  # whatever its layers raise: OSError, ValueError, RuntimeError
            raise RefineError(f"--model {model.path}: vLLM can't load it: {e}") from e
        tokens = self._probe(max_pixels)
        self.note = (
            f"{model.name}: a picture of at most {max_pixels:,} pixels takes {tokens:,} tokens"
        )

    def submit(self, request: Request) -> None:
        try:
            (name,) = self._llm.enqueue_chat(
                [self._messages(request)], self._params(request.attempt), use_tqdm=False
            )
        except (ValueError, RuntimeError) as e:
            # The picture is not for this processor (an extreme shape), or the question is too long.
            self._failed.append(Reply(request.key, failure="refused_by_engine", detail=str(e)))
            return
        self._names[_number(name)] = request

    def replies(self) -> list[Reply]:
        failed, self._failed = self._failed, []
        if not self._names:
            return failed
        try:
            outputs = self._llm.llm_engine.step()
        except Exception as e:
            raise RefineError(
                f"the engine stopped: {e}; the same command goes on where it did"
            ) from e
        return failed + [self._reply(output) for output in outputs if output.finished]

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._names.clear()
        del self._llm  # ends the engine, and its process where it has one

    def _reply(self, output: "RequestOutput") -> Reply:
        request = self._names.pop(_number(output.request_id))
        completion = output.outputs[0]
        return Reply(
            request.key,
            completion.text,
            truncated=completion.finish_reason == "length",
            prompt_tokens=len(output.prompt_token_ids or ()),
            output_tokens=len(completion.token_ids),
        )

    def _messages(self, request: Request) -> list[dict]:
        """The prompt with the picture in its place, as vLLM's chat takes it."""
        messages = self._prompt.messages(request.caption)
        for message in messages:
            message["content"] = [
                {"type": "image_pil", "image_pil": request.image}
                if part["type"] == "image" else part
                for part in message["content"]
            ]  # fmt: skip
        return messages

    def _params(self, attempt: int, max_tokens: int | None = None) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        from refine.parse import SCHEMA

        how = self._sampling.at(attempt)
        return SamplingParams(
            max_tokens=max_tokens or how.max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            # Without a seed of their own requests share the engine's generator, and are faster.
            seed=how.seed if how.temperature else None,
            structured_outputs=StructuredOutputsParams(json=SCHEMA) if how.structured else None,
        )

    def _probe(self, max_pixels: int) -> int:
        """How many tokens the largest picture takes of a prompt, square or wide.

        Raises:
            RefineError: more than its pixels can be, so something enlarges pictures again; or they
                leave no room for an answer.
        """
        width = math.isqrt(max_pixels)
        shapes = (width, max_pixels // width), (2 * width, max_pixels // (2 * width))
        whole = max(self._tokens(_blank(*shape)) for shape in shapes)
        context = self._llm.model_config.max_model_len
        if whole + self._sampling.max_tokens > context:
            raise RefineError(
                f"a question with a picture takes {whole:,} tokens and its answer "
                f"{self._sampling.max_tokens:,}, more than the engine's {context:,}: use a smaller "
                "--max-pixels or --max-tokens, or a larger --context"
            )
        picture = whole - self._tokens(None)
        unit = _token_pixels(self._llm.model_config.model)
        if unit and picture > max_pixels / unit + MARKS:
            raise RefineError(
                f"--max-pixels {max_pixels:,} is not in force: the model makes {picture:,} tokens "
                f"of such a picture, and {max_pixels // unit:,} of {unit} pixels are all that it "
                "can hold: see `size` in the model's preprocessor_config.json"
            )
        return picture

    def _tokens(self, picture: Image.Image | None) -> int:
        """Of a question with a picture, or with none, and no alt-text."""
        messages = self._messages(Request("probe", "", picture))
        if picture is None:
            for message in messages:
                message["content"] = [p for p in message["content"] if p["type"] == "text"]
        try:
            self._llm.enqueue_chat([messages], self._params(0, max_tokens=1), use_tqdm=False)
            (output,) = self._llm.wait_for_completion(use_tqdm=False)
        except ValueError as e:
            raise RefineError(
                f"the prompt and the largest picture do not fit the engine: {e}; use a smaller "
                "--max-pixels, or a larger --context"
            ) from e
        return len(output.prompt_token_ids)


def _number(name: str) -> str:
    """vLLM's own number of a request; inside, it has random letters behind it."""
    return name.partition("-")[0]


def _arguments(model: Vllm, sampling: Sampling, max_pixels: int) -> dict:
    """What `vllm.LLM` is made with."""
    side = math.isqrt(max_pixels)
    chosen = {
        "model": model.path,
        "max_num_seqs": model.slots,
        "max_model_len": model.context,
        "gpu_memory_utilization": model.memory,
        "trust_remote_code": model.trust_remote_code,
        # What is reserved for a picture is what one may take, not what the model could.
        "limit_mm_per_prompt": {"image": {"count": 1, "width": side, "height": side}, "video": 0},
        # No picture comes twice, and what is kept of each adds up.
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": True,
    }
    if sampling.structured:
        # White space without end is JSON too.
        chosen["structured_outputs_config"] = {
            "backend": "xgrammar", "disable_any_whitespace": True
        }  # fmt: skip
    return chosen | dict(model.options)


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (max(1, width), max(1, height)), "gray")


def _token_pixels(model: str) -> int | None:
    """Pixels that a picture's token stands for, where the processor says so (Qwen's families)."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    patch, merge = (getattr(processor, name, None) for name in ("patch_size", "merge_size"))
    return (patch * merge) ** 2 if isinstance(patch, int) and isinstance(merge, int) else None
