"""The training behind `python -m refine sft`: TRL's trainer, held to one course."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from refine.errors import RefineError
from refine.progress import progress
from refine.teaching.sft import Course, is_first

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
    from trl import SFTConfig, SFTTrainer

CHECKPOINT = "checkpoint-"
STATE = "trainer_state.json"
LORA_LAYERS = r".*language_model.*_proj"
"""The linear layers of the language model, as the families of Qwen, LLaVA and InternVL name them;
the vision tower stays as it is."""
LOG_STEPS = 10


def train(
    course: Course,
    lessons: "Dataset",
    held_out: "Dataset",
    checkpoints: Path,
    metrics: Path,
    every: int,
) -> "SFTTrainer":
    """Trains to the end, from the last whole checkpoint if there is one.

    Args:
        course: what and how.
        lessons: columns of TRL's conversational prompt-completion form with `images`.
        held_out: the same, for the loss at the end.
        checkpoints: folder for them.
        metrics: gets a line of JSON every few steps; lines that a resumed training will write
            again are taken out.
        every: steps from checkpoint to checkpoint.
    """
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    from trl import SFTTrainer

    disable_progress_bar()  # one for each file that is written
    set_verbosity_error()
    last = last_checkpoint(checkpoints)
    model, processor = load(course, last)
    trainer = SFTTrainer(
        model=model,
        args=_settings(course, checkpoints, every),
        train_dataset=lessons,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=processor,
        peft_config=_lora(course) if course.method == "lora" else None,
        callbacks=[_diary(metrics)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer


def load(course: Course, last: Path | None) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """The model to begin with or to go on with, and its processor.

    The trainer restores a checkpoint's weights by their names in the module. Saving changes those
    of vision-language models, and what it then does not find it leaves as it is, in silence: so all
    weights come from the checkpoint before the trainer sees the model.

    Raises:
        RefineError: there is none, or it is of no family that transformers knows.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    weights = last if last and course.method == "full" else course.model
    try:
        processor = AutoProcessor.from_pretrained(course.model)
        model = AutoModelForImageTextToText.from_pretrained(weights, dtype=course.dtype)
    except (OSError, ValueError) as e:
        raise RefineError(
            f"--model {course.model} can't be loaded: {e}; name a folder or a model of the hub "
            "that takes pictures and texts"
        ) from e
    if not getattr(processor, "chat_template", None):
        raise RefineError(f"--model {course.model} has no chat template: use an instruct model")
    return model, processor


def _settings(course: Course, checkpoints: Path, every: int) -> "SFTConfig":
    import torch
    from trl import SFTConfig

    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=course.micro_batch,
        per_device_eval_batch_size=course.micro_batch,
        gradient_accumulation_steps=course.accumulation,
        num_train_epochs=course.epochs,
        learning_rate=course.lr,
        lr_scheduler_type="cosine",
        warmup_steps=course.warmup,
        completion_only_loss=True,
        max_length=None,  # to cut an answer would teach to stop in the middle
        use_cpu=not gpu,  # without it processes on CPUs train apart
        bf16=gpu,
        gradient_checkpointing=gpu,  # without a GPU the model is small, and time is what is short
        save_steps=every,
        save_total_limit=2,
        logging_steps=LOG_STEPS,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,  # every example has a picture
        seed=course.seed,
        report_to="none",
        disable_tqdm=True,
    )


def _lora(course: Course) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=course.lora_rank,
        lora_alpha=2 * course.lora_rank,
        target_modules=LORA_LAYERS,
        task_type="CAUSAL_LM",
    )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The last one that is whole: the trainer's state is what is written last."""
    whole = {}
    for path in checkpoints.glob(CHECKPOINT + "*"):
        try:
            whole[json.loads((path / STATE).read_text())["global_step"]] = path
        except (OSError, ValueError):
            continue
    return whole[max(whole)] if whole else None


def save(trainer: "SFTTrainer", base: str, output: Path) -> "PreTrainedModel":
    """Writes a folder that engines take as it is: additions merged, in the base model's precision.

    Returns:
        What was written.
    """
    from transformers import AutoConfig

    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model = model.to(AutoConfig.from_pretrained(base).dtype or model.dtype)
    if is_first():
        model.save_pretrained(output)
        trainer.processing_class.save_pretrained(output)
    return model


def _diary(path: Path) -> "TrainerCallback":
    """Shows the progress, and keeps the figures."""
    from transformers import TrainerCallback

    class Diary(TrainerCallback):
        def __init__(self) -> None:
            self.shown, self.bar, self.done = ExitStack(), None, 0
            self.started = time.monotonic()

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.done, self.started = state.global_step, time.monotonic()
            if is_first():
                forget(path, state.global_step)
                self.bar = self.shown.enter_context(
                    progress("fine-tuning", state.max_steps, "steps")
                )
                self.bar.advance(self.done)

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if self.bar:
                loss = state.log_history[-1].get("loss") if state.log_history else None
                self.bar.advance(1, f"loss {loss:.3f}" if loss is not None else "")

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if is_first():
                row = {
                    "step": state.global_step,
                    "seconds": time.monotonic() - self.started,
                    **logs,
                }
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

        def on_train_end(self, args, state, control, **kwargs) -> None:
            self.shown.close()

    return Diary()


def forget(metrics: Path, step: int) -> None:
    """Takes out of the figures the rows after a step, and a torn one."""
    kept = []
    for line in metrics.read_text("utf-8").splitlines() if metrics.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    metrics.write_text("".join(kept), "utf-8")
