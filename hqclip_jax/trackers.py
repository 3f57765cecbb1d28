"""Weights & Biases and MLflow, each fed by a thread of its own.

However slow or broken they are, training neither waits nor ends; what they did not get is in
`metrics.jsonl`. Credentials come from the environment alone.
"""

import importlib
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from hqclip_jax.config import Config, ConfigError, LogConfig, walk

log = logging.getLogger(__name__)

LONGEST_QUEUE = 10_000
CLOSE_SECONDS = 30.0
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class Tracker(Protocol):
    """A service that keeps runs under ids of its own. Every method may raise whatever it likes."""

    def create(self) -> str:
        """The id of a new run."""

    def open(self, run: str) -> None:
        """Goes on with the run of that id; called before the first `write`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def parameters(config: Config) -> dict[str, Any]:
    """Every field by its dotted name."""
    return {name: value for name, _, value in walk(config)}


class Wandb:
    """A Weights & Biases run; its own files lie in `workdir/wandb`."""

    def __init__(self, workdir: Path, config: Config) -> None:
        self._workdir, self._config = workdir, config

    def create(self) -> str:
        return uuid.uuid4().hex

    def open(self, run: str) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=self._config.log.wandb,
                id=run,
                resume="allow",
                name=self._workdir.resolve().name,
                dir=str(self._workdir),
                # Its capture of the terminal would break the progress bar.
                settings=wandb.Settings(console="off", quiet=True),
            )
        except Exception:
            wandb.teardown()  # it would refuse the same id ever after
            raise
        self._run.config.update(parameters(self._config), allow_val_change=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """An MLflow run. Its parameters can't change: where a restart came with others, tags say so."""

    BATCH = 100  # parameters in a request, at most

    def __init__(self, workdir: Path, config: Config) -> None:
        self._workdir, self._config = workdir, config

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient()

    def create(self) -> str:
        name = self._config.log.mlflow
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=self._workdir.resolve().name)
        return run.info.run_id

    def open(self, run: str) -> None:
        from mlflow.entities import Param

        self._run = run
        self._client.update_run(run, status="RUNNING")
        known = self._client.get_run(run).data.params
        values = {name: str(value) for name, value in parameters(self._config).items()}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(new), self.BATCH):
            self._client.log_batch(run, params=new[first : first + self.BATCH])
        for name, value in values.items():
            if known.get(name, value) != value:
                self._client.set_tag(run, f"changed.{name}", value)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        rows = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=rows)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Background:
    """Feeds a tracker from a thread of its own, so that nothing it does reaches the caller.

    Its run's id and the last step that it was given are kept in `workdir/NAME.json`: after a
    restart the same run goes on, and what it has already is not sent again, though computed anew.
    An error is counted, logged the first time that its kind occurs, and costs the row.
    """

    def __init__(self, name: str, tracker: Tracker, workdir: Path) -> None:
        self.errors: Counter[str] = Counter()
        self._name, self._tracker, self._memo = name, tracker, workdir / f"{name}.json"
        self._run, self._sent = self._recall()
        self._open = self._run_failed = False
        self._rows: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        # A daemon: the process must be able to end while a server keeps it waiting.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._rows.qsize() >= LONGEST_QUEUE:
            self._failed(queue.Full(f"{LONGEST_QUEUE} reports wait to be sent"))
        else:
            self._rows.put((step, dict(metrics)))

    def close(self, failed: bool) -> None:
        self._run_failed = failed
        self._rows.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s did not end within %.0f s: about %d reports are left out there",
                        self._name, CLOSE_SECONDS, self._rows.qsize())  # fmt: skip
        if self.errors:
            counts = ", ".join(f"{kind} {count}" for kind, count in self.errors.items())
            log.warning("%s: errors in all: %s; metrics.jsonl has every report", self._name, counts)

    def _work(self) -> None:
        self._try(self._ensure_open)
        while (row := self._rows.get()) is not None:
            self._try(self._send, *row)
        if self._open:
            self._try(self._tracker.close, self._run_failed)

    def _try(self, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as e:  # a client library may raise anything
            self._failed(e)

    def _ensure_open(self) -> None:
        if self._open:
            return
        if not self._run:
            self._run = self._tracker.create()
            self._remember()
        self._tracker.open(self._run)
        self._open = True

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        if step <= self._sent:
            return
        self._ensure_open()
        self._tracker.write(step, metrics)
        self._sent = step
        self._remember()

    def _recall(self) -> tuple[str, int]:
        try:
            stored = json.loads(self._memo.read_text())
            run, step = stored["run"], stored["step"]
        except FileNotFoundError:
            return "", -1
        except (ValueError, KeyError, TypeError) as e:
            log.warning("%s says nothing (%s): %s gets a new run", self._memo, e, self._name)
            return "", -1
        log.info("%s goes on with run %s, which has the steps up to %d", self._name, run, step)
        return run, step

    def _remember(self) -> None:
        partial = self._memo.with_suffix(".tmp")
        partial.write_text(json.dumps({"run": self._run, "step": self._sent}))
        partial.replace(self._memo)

    def _failed(self, error: Exception) -> None:
        kind = type(error).__name__
        self.errors[kind] += 1
        if self.errors[kind] == 1:
            log.warning("%s: %s: %s; training goes on, and more of this kind is only counted",
                        self._name, kind, _redacted(str(error)))  # fmt: skip


def _redacted(text: str) -> str:
    """A server's address may hold a password."""
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"${name}")
    return re.sub(r"://[^/@\s]+@", "://…@", text)


def check_trackers(config: LogConfig) -> None:
    """To be called before anything long.

    Raises:
        ConfigError: a tracker is asked for whose package or credential is missing.
    """
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared", "run")
    if config.wandb:
        _importable("log.wandb", config.wandb, "wandb")
        if online and not os.environ.get("WANDB_API_KEY"):
            raise ConfigError(
                f"log.wandb={config.wandb!r} needs the environment variable WANDB_API_KEY; or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            )
    if config.mlflow:
        _importable("log.mlflow", config.mlflow, "mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                f"log.mlflow={config.mlflow!r} needs the environment variable MLFLOW_TRACKING_URI: "
                "the server's address, or sqlite:///FILE for none"
            )


def _importable(field: str, value: str, package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as e:
        raise ConfigError(
            f"{field}={value!r} needs the package {package} ({e}): pip install {package}"
        ) from e
