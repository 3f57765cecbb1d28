"""What a model would be asked, shown and not asked."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from refine.engines.lvlm import Lvlm
from refine.errors import RefineError
from refine.inputs.find import Input
from refine.inputs.pairs import ImageError, Pair
from refine.inputs.pictures import prepared
from refine.progress import console
from refine.prompts import fence

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SHOWN = 3


def show(engine: Lvlm, inputs: Sequence[Input], skip_pixels: int) -> None:
    """Prints the first finished prompts, in the model's own chat template where its files are here.

    Raises:
        RefineError: no pair has a picture that can be shown.
    """
    shown = 0
    for pair in _pairs(inputs):
        try:
            image = prepared(pair.image, skip_pixels, engine.max_pixels)
        except ImageError as e:
            console.print(f"{pair.source} {pair.key}: {e.reason}: {e}", markup=False)
            continue
        text = rendered(engine, fence(pair.caption))
        title = f"{pair.source} {pair.key} · picture {image.width}x{image.height}"
        console.print(Panel(Text(text), title=Text(title)))
        shown += 1
        if shown == SHOWN:
            return
    if not shown:
        raise RefineError("--input holds no pair with a picture that a model can be shown")


def rendered(engine: Lvlm, caption: str) -> str:
    """The prompt as one text; the picture is a mark."""
    messages = engine.prompt.messages(caption)
    template = _template(engine)
    if template is not None:
        return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "\n".join(
        part["text"] if part["type"] == "text" else f"<{part['type']}>"
        for message in messages
        for part in message["content"]
    )


def _template(engine: Lvlm) -> "ProcessorMixin | None":
    if engine.model.engine != "vllm":
        return None  # the server has the template
    try:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(engine.model.path)
    except Exception as e:  # no transformers, no such folder, no network
        console.print(f"without the model's chat template: {e}", style="yellow", markup=False)
        return None


def _pairs(inputs: Sequence[Input]) -> Iterator[Pair]:
    for each in inputs:
        yield from (item for item in each.pairs() if isinstance(item, Pair))
