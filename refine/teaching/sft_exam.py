"""What a student answers to questions that it was not taught."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from refine.parse import Rejected, parse
from refine.progress import progress
from refine.teaching.lessons import Lessons

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

BATCH = 8


def examine(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    lessons: Lessons,
    numbers: Sequence[int],
    max_tokens: int,
) -> dict:
    """Has the student answer as a run would, once each, and judges the answers.

    Args:
        model: the student.
        processor: its.
        lessons: the data set.
        numbers: of the records to ask about.
        max_tokens: of an answer.

    Returns:
        `asked`, `valid`, `share` (of the asked that are valid; None if none was asked), `repaired`
        (valid after mending), `rejected` (count by reason of `refine.parse`), and `sample`, the
        first raw answers.
    """
    rejected: Counter[str] = Counter()
    repaired = 0
    answers: list[str] = []
    with progress("asking", len(numbers), "questions") as bar:
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            answers += answer(model, processor, lessons, batch, max_tokens)
            bar.advance(len(batch))
    for text in answers:
        try:
            repaired += parse(text).repaired
        except Rejected as e:
            rejected[e.reason] += 1
    valid = len(answers) - rejected.total()
    return {
        "asked": len(answers),
        "valid": valid,
        "share": valid / len(answers) if answers else None,
        "repaired": repaired,
        "rejected": dict(rejected.most_common()),
        "sample": answers[:4],
    }


def answer(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    lessons: Lessons,
    numbers: Sequence[int],
    max_tokens: int,
) -> list[str]:
    """The likeliest answers to the questions about some records."""
    import torch

    records = [lessons.record(number) for number in numbers]
    questions = processor.apply_chat_template(
        [lessons.question(r) for r in records], add_generation_prompt=True
    )
    inputs = processor(
        text=questions,
        images=[[lessons.picture(r)] for r in records],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    model.eval()
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, temperature=None, top_p=None,
            top_k=None,
        )  # fmt: skip
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)
