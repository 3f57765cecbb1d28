"""Where metrics go: JSON lines and TensorBoard always, and the trackers that the run names."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboardX import SummaryWriter

from hqclip_jax.config import Config
from hqclip_jax.trackers import Background, Mlflow, Wandb

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes the scalars of each report, and at last whether an error ended the run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def json_line(row: Mapping[str, float | None]) -> str:
    """`row` as a line of JSON, which knows neither nan nor infinity: both become null."""
    sound = {k: None if v is None or not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(sound, allow_nan=False) + "\n"


class JsonLines:
    """`metrics.jsonl`: a row per report, with six significant digits of every fraction.

    Args:
        workdir: where it lies.
        resumed_from: noted in the first row, where a run goes on after this step; None for none.
    """

    def __init__(self, workdir: Path, resumed_from: int | None) -> None:
        self._file = (workdir / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
        self._mark = {} if resumed_from is None else {"resumed_from": resumed_from}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        # Counts stay exact: 12.8B samples have more digits.
        exact = {name: value for name, value in metrics.items() if float(value).is_integer()}
        row = {"step": step, "time": round(time.time(), 3), **self._mark, **rounded, **exact}
        self._mark = {}
        self._file.write(json_line(row))

    def close(self, failed: bool) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`; what a killed run wrote after `step` is purged."""

    def __init__(self, workdir: Path, step: int) -> None:
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._board.close()


def open_sinks(workdir: Path, step: int, resumed: bool, config: Config | None) -> list[Sink]:
    """All that the configuration asks for; `step` is the one that the run goes on from."""
    sinks: list[Sink] = [JsonLines(workdir, step if resumed else None), TensorBoard(workdir, step)]
    if config and config.log.wandb:
        sinks.append(Background("wandb", Wandb(workdir, config), workdir))
    if config and config.log.mlflow:
        sinks.append(Background("mlflow", Mlflow(workdir, config), workdir))
    return sinks
