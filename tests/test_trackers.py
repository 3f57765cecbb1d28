import dataclasses
import json
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hqclip_jax import trackers
from hqclip_jax.config import Config, ConfigError, LogConfig
from hqclip_jax.telemetry import MetricWriter, read_metrics
from hqclip_jax.trackers import Background, check_trackers

WANDB = Config(log=LogConfig(wandb="project"))
MLFLOW = Config(log=LogConfig(mlflow="experiment"))
LOWER = dataclasses.replace(MLFLOW, optim=dataclasses.replace(MLFLOW.optim, lr=1e-4))


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A package that records what is asked of it: `calls`, and the `rows` of each run."""
    told = SimpleNamespace(inits=[], rows={}, config={}, finished=[])

    class Run:
        def __init__(self, id: str) -> None:
            self.id, self.config = id, SimpleNamespace(update=self.update)

        def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
            assert allow_val_change  # a restart may come with another learning rate
            told.config.update(values)

        def log(self, metrics: dict[str, float], step: int) -> None:
            told.rows.setdefault(self.id, []).append((step, metrics))

        def finish(self, exit_code: int) -> None:
            told.finished.append((self.id, exit_code))

    def init(**kwargs: Any) -> Run:
        told.inits.append(kwargs)
        return Run(kwargs["id"])

    module = ModuleType("wandb")
    module.init, module.Settings, module.teardown = init, SimpleNamespace, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "a-key")
    told.module = module
    return told


@pytest.fixture
def mlflow(monkeypatch) -> SimpleNamespace:
    """A server with one store for all clients."""
    told = SimpleNamespace(experiments={}, runs={}, status=[], tags={})

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            found = told.experiments.get(name)
            return found and SimpleNamespace(experiment_id=found)

        def create_experiment(self, name: str) -> str:
            assert name not in told.experiments
            told.experiments[name] = "7"
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            assert experiment == "7"
            run = f"run-{len(told.runs)}"
            told.runs[run] = SimpleNamespace(params={}, metrics=[], name=run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id=run))

        def get_run(self, run: str) -> Any:
            return SimpleNamespace(data=SimpleNamespace(params=dict(told.runs[run].params)))

        def update_run(self, run: str, status: str) -> None:
            told.status.append(status)

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            for p in params:
                assert p.key not in told.runs[run].params  # they can't be changed
                told.runs[run].params[p.key] = p.value
            told.runs[run].metrics += [(m.key, m.value, m.step) for m in metrics]

        def set_tag(self, run: str, name: str, value: str) -> None:
            told.tags[name] = value

        def set_terminated(self, run: str, status: str) -> None:
            told.status.append(status)

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, module.entities = MlflowClient, entities
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(
        key=key, value=value, timestamp=timestamp, step=step
    )
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")
    return told


def start(workdir: Path, config: Config, step: int, reports: list[int]) -> None:
    """One start of a run, from a checkpoint at `step`."""
    workdir.mkdir(exist_ok=True)
    writer = MetricWriter(workdir, step, config)
    for report in reports:
        writer.write(report, {"loss": 1 / report})
    writer.close()


def test_wandb_sees_one_run_with_growing_steps_over_all_starts(tmp_path, wandb):
    workdir = tmp_path / "mine"
    start(workdir, WANDB, 0, [10, 20, 30])
    start(workdir, WANDB, 20, [30, 40])  # killed after 30, whose checkpoint is that of 20
    start(workdir, WANDB, 20, [30])
    start(workdir, WANDB, 20, [30, 40, 50])
    ((run, rows),) = wandb.rows.items()
    assert rows == [(step, {"loss": 1 / step}) for step in (10, 20, 30, 40, 50)]
    assert {(i["id"], i["resume"], i["project"], i["name"]) for i in wandb.inits} == {
        (run, "allow", "project", "mine")
    }
    assert wandb.finished == [(run, 0)] * 4
    assert wandb.config["optim.lr"] == WANDB.optim.lr and wandb.config["log.wandb"] == "project"


def test_wandb_forgets_an_id_that_it_could_not_open(tmp_path, wandb, monkeypatch):
    """Without that it says ever after that the id is in use."""
    init, calls = wandb.module.init, []

    def once_unreachable(**kwargs: Any) -> Any:
        calls.append("init")
        if calls == ["init"]:
            raise OSError("no network")
        return init(**kwargs)

    monkeypatch.setattr(wandb.module, "init", once_unreachable)
    monkeypatch.setattr(wandb.module, "teardown", lambda: calls.append("teardown"))
    start(tmp_path, WANDB, 0, [10])
    assert calls == ["init", "teardown", "init"]
    assert list(wandb.rows.values()) == [[(10, {"loss": 0.1})]]


def test_two_runs_have_two_ids(tmp_path, wandb):
    start(tmp_path / "a", WANDB, 0, [10])
    start(tmp_path / "b", WANDB, 0, [10])
    assert len(wandb.rows) == 2


def test_mlflow_sees_one_run_and_what_its_restart_changed(tmp_path, mlflow):
    start(tmp_path / "mine", MLFLOW, 0, [10, 20, 30])
    start(tmp_path / "mine", LOWER, 20, [30, 40])
    ((run, stored),) = mlflow.runs.items()
    assert stored.metrics == [("loss", 1 / s, s) for s in (10, 20, 30, 40)]
    assert stored.params["optim.lr"] == "0.0005" and stored.params["data.p_desc"] == "0.5"
    assert mlflow.tags == {"changed.optim.lr": "0.0001"}
    assert mlflow.status == ["RUNNING", "FINISHED"] * 2 and stored.name == "mine"
    assert json.loads((tmp_path / "mine" / "mlflow.json").read_text()) == {"run": run, "step": 40}


def test_a_run_that_an_error_ends_is_marked_so(tmp_path, wandb, mlflow):
    config = Config(log=LogConfig(wandb="project", mlflow="experiment"))
    with pytest.raises(KeyError), MetricWriter(tmp_path, 0, config) as writer:
        writer.write(10, {"loss": 0.1})
        raise KeyError
    assert [code for _, code in wandb.finished] == [1]
    assert mlflow.status == ["RUNNING", "FAILED"]


def test_a_note_that_is_damaged_costs_a_new_run_and_no_more(tmp_path, wandb, caplog):
    (tmp_path / "wandb.json").write_text('{"run": "x"')
    start(tmp_path, WANDB, 0, [10])
    assert len(wandb.rows) == 1 and "x" not in wandb.rows
    assert "wandb.json says nothing" in caplog.text


@pytest.mark.parametrize(
    ("config", "package", "variable"),
    [(WANDB, "wandb", "WANDB_API_KEY"), (MLFLOW, "mlflow", "MLFLOW_TRACKING_URI")],
)
def test_what_is_missing_is_said_before_anything_is_touched(
    tmp_path, monkeypatch, config, package, variable
):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"log\.{package}=.*pip install {package}"):
        MetricWriter(tmp_path, 0, config)
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=rf"log\.{package}=.*{variable}"):
        MetricWriter(tmp_path, 0, config)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path) == [{"step": 9}]


def test_an_offline_run_needs_no_key(wandb, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(WANDB.log)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        check_trackers(WANDB.log)


class Broken:
    """Fails as it is told to: `faults` by call, one after the other, None for a success."""

    def __init__(self, **faults: list[Exception | None]) -> None:
        self.faults, self.rows, self.runs = faults, [], 0

    def _fail(self, call: str) -> None:
        queue = self.faults.get(call)
        if queue and (fault := queue.pop(0)):
            raise fault

    def create(self) -> str:
        self.runs += 1
        self._fail("create")
        return f"run-{self.runs}"

    def open(self, run: str) -> None:
        self._fail("open")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._fail("write")
        self.rows.append(step)

    def close(self, failed: bool) -> None:
        self._fail("close")


def test_errors_are_counted_and_each_kind_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    tracker = Broken(
        open=[OSError("no route to https://me:hunter2@host"), OSError("again"), None],
        write=[None, ValueError("too large"), OSError("away"), None],
        close=[OSError("still away")],
    )
    sink = Background("server", tracker, tmp_path)
    for step in (1, 2, 3, 4, 5):
        sink.write(step, {"loss": 1.0})
    sink.close(failed=False)
    # The thread's own attempt and report 1 find no server; 3 and 4 are refused.
    assert tracker.rows == [2, 5] and tracker.runs == 1
    assert sink.errors == {"OSError": 4, "ValueError": 1}
    assert len(caplog.messages) == 3 and "hunter2" not in caplog.text
    assert caplog.messages[-1].endswith("OSError 4, ValueError 1; metrics.jsonl has every report")


def test_a_server_that_does_not_answer_holds_up_nobody(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "LONGEST_QUEUE", 3)
    answer = threading.Event()
    tracker = Broken()
    tracker.open = lambda run: answer.wait(60)
    sink = Background("server", tracker, tmp_path)
    for step in range(1, 6):
        sink.write(step, {})
    sink.close(failed=False)
    assert sink.errors == {"Full": 2}
    assert sink._thread.daemon  # the process may end
    assert "did not end within" in caplog.text
    answer.set()
    sink._thread.join(60)
    assert tracker.rows == [1, 2, 3]


def test_a_secret_stays_out_of_the_log(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123abcd")
    text = "https://api.wandb.ai refused 0123abcd"
    assert trackers._redacted(text) == "https://api.wandb.ai refused $WANDB_API_KEY"
