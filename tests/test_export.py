"""The command line, both ways: what is refused, what is written, what comes back."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from hqclip_jax import evaluate, export, train
from hqclip_jax.checkpoint import FOLDER, CheckpointError, Checkpoints, RunInfo
from hqclip_jax.config import OptimConfig
from hqclip_jax.evals.outcome import Failure, Outcome
from hqclip_jax.evals.results import write_results
from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.model import Model
from hqclip_jax.formats.open_clip import WEIGHTS
from hqclip_jax.models.convert import flatten, read_safetensors
from hqclip_jax.restore import find, restore_model
from hqclip_jax.start import find_origin
from tests.evals.colours import COLOURS, write_classification
from tests.formats import models


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "large"
    models.write_checkpoint(workdir, models.make_config())
    return workdir


def command(*arguments) -> int:
    return export.main([str(a) for a in arguments])


def assert_same_bits(got: dict, want: dict) -> None:
    got, want = flatten(got), flatten(want)
    assert set(got) == set(want)
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_out_and_in_again_keeps_every_bit(run, tmp_path, to, capsys):
    assert command(f"--checkpoint={run}", f"--to={to}", f"--out={tmp_path}/out") == 0
    shown = capsys.readouterr().out
    for part in ("weights are equal to the bit", "README.md", "7,774,081"):
        assert part in shown
    assert command(f"--from={tmp_path}/out", f"--out={tmp_path}/back") == 0
    here, there = restore_model(run), restore_model(tmp_path / "back")
    assert_same_bits(jax.device_get(there.params), jax.device_get(here.params))
    assert there.step == 0 and there.tokenizer == here.tokenizer
    assert there.config.model == here.config.model
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "out"]


def test_wordpiece_goes_out_and_in_again(tmp_path):
    config = models.make_config(models.CLIPA, context_length=8)
    models.write_checkpoint(tmp_path / "run", config, models.WORDPIECE)
    assert restore_model(tmp_path / "run").tokenizer == models.WORDPIECE
    assert command(f"--checkpoint={tmp_path}/run", "--to=open_clip", f"--out={tmp_path}/out") == 0
    assert command(f"--from={tmp_path}/out", f"--out={tmp_path}/back") == 0
    assert restore_model(tmp_path / "back").tokenizer == models.WORDPIECE


def test_an_imported_model_is_evaluated_and_begun_from_but_not_gone_on_with(run, tmp_path):
    command(f"--checkpoint={run}", "--to=open_clip", f"--out={tmp_path}/out")
    command(f"--from={tmp_path}/out", f"--out={tmp_path}/back")
    write_classification(tmp_path / "zs", {c: i for i, c in enumerate(COLOURS)})
    told = f"--checkpoint={tmp_path}/back", f"--suite={tmp_path}/zs", f"--out={tmp_path}/scores"
    assert evaluate.main([*told, "--batch=8"]) == 0

    config = models.make_config(act="quick_gelu", image_size=40, context_length=9)
    config = dataclasses.replace(config, init_from=str(tmp_path / "back"))
    origin = find_origin(config, tmp_path / "new")
    assert origin.how == "init" and origin.tokenizer(config).context_length == 9
    own = find_origin(config, tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"was imported.* --config\.init_from=.*/back"):
        own.found.checkpoints.restore(0, None)


def test_it_may_be_exported_again_and_says_where_it_is_from(run, tmp_path):
    command(f"--checkpoint={run}", "--to=transformers", f"--out={tmp_path}/out")
    command(f"--from={tmp_path}/out", f"--out={tmp_path}/back")
    command(f"--checkpoint={tmp_path}/back", "--to=open_clip", f"--out={tmp_path}/again")
    said = (tmp_path / "again" / "README.md").read_text()
    assert f"imported from `{tmp_path}/out` (transformers)" in said
    assert "samples seen" not in said


def test_the_card_tells_what_is_known(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    rows = [{"step": s, "time": 1.0, "loss": 1 / s, "lr": 1.0} for s in (2, 4, 9)]
    rows.insert(2, {"step": 4, "time": 1.0, "eval/set/top1": 0.1})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = {"top1": 0.5, "top1_chance": 0.2, "n": 5}
    sets = {n: Outcome(scores, "top1") for n in ("a|b", "<script>")} | {"broken": Failure("x")}
    written = write_results(workdir / "evals" / "5", {"step": 5}, sets, {n: [] for n in sets})
    stored = json.loads(written.read_text())
    (tmp_path / "more.json").write_text(json.dumps(stored | {"step": 3}))
    out = tmp_path / "out"
    assert command(f"--checkpoint={workdir}", "--to=open_clip", f"--out={out}",
                   f"--results={tmp_path}/more.json") == 0  # fmt: skip
    said = (out / "README.md").read_text()
    for line in (
        "| architecture | ViT-Pico/8 |", "| data | `data/dfn` |", "| samples seen | 640 |",
        "| loss, last reported | 0.25 |", "| a\\|b | top1 | 50.0 | 20.0 |",
        "| &lt;script&gt; | top1 |",
        "| a\\|b (step 3) | top1 | 50.0 | 20.0 |", "library_name: open_clip",
        'open_clip.get_tokenizer("local-dir:out")',
    ):  # fmt: skip
        assert line in said
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(FormatError, match=r"more\.json is no results\.json"):
        export.export_checkpoint(
            find(workdir), "open_clip", tmp_path / "o", results=[tmp_path / "more.json"]
        )
    assert not (tmp_path / "o").exists()


def test_the_average_is_what_was_asked_for(tmp_path):
    config = models.make_config()
    config = dataclasses.replace(config, optim=OptimConfig(ema=0.9))
    params, ema = (models.random_params(config, 49408, seed=seed) for seed in (1, 2))
    checkpoints = Checkpoints(tmp_path / "run")

    class State:
        def _asdict(self):
            return {"params": params, "ema": ema, "step": np.int32(1)}

    checkpoints._write(1, State(), RunInfo(config, {}, None).to_json(), None)
    checkpoints.close()
    for weights, want in (("params", params), ("ema", ema)):
        out = tmp_path / weights
        export.export_checkpoint(find(tmp_path / "run"), "open_clip", out, weights)
        got = read_safetensors(out / WEIGHTS)["ln_final.weight"]
        np.testing.assert_array_equal(got, want["text"]["ln_final"]["scale"])


def test_a_value_beyond_sixteen_bits_is_refused_by_name(tmp_path):
    model = Model(models.make_config(), None, {}, "float16")
    with pytest.raises(FormatError, match=r"text\.bias: values that are not finite as float16"):
        model.save(tmp_path / "w", {"text.bias": np.float32([1, 70_000]), "b": np.float32([1])})
    model = dataclasses.replace(model, dtype="bfloat16")
    model.save(tmp_path / "w", {"text.bias": np.float32([1, 70_000])})


def test_a_file_that_came_out_otherwise_is_never_left(run, tmp_path, monkeypatch):
    def damaged(self, path, weights):
        weights = dict(weights) | {"ln_final.weight": weights["ln_final.weight"] + 1}
        return Model.save(dataclasses.replace(self), path, weights)

    class Damaged(Model):
        save = damaged

    monkeypatch.setattr(export, "Model", Damaged)
    assert command(f"--checkpoint={run}", "--to=open_clip", f"--out={tmp_path}/out") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "says"), [
    (["--checkpoint=none", "--to=open_clip"], "none holds no checkpoint"),
    (["--checkpoint={run}", "--to=open_clip", "--step=9"], "has no step 9; it has [5]"),
    (["--checkpoint={run}", "--to=open_clip", "--weights=ema"], "has no average"),
    (["--from={run}"], "has neither open_clip_config.json"),
    (["--from=none"], "no such file or folder"),
])  # fmt: skip
def test_wrong_arguments_say_what_is_wrong(run, tmp_path, capsys, arguments, says):
    arguments = [a.format(run=run) for a in arguments]
    assert command(*arguments, f"--out={tmp_path}/out") == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_into(run, capsys):
    assert command(f"--checkpoint={run}", "--to=open_clip", f"--out={run}") == 2
    assert "exists: name a new folder" in capsys.readouterr().err
    assert [p.name for p in run.iterdir()] == [FOLDER]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        export.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for part in ("local-dir:exported/large", "--from=clip-vit-large-patch14", "CLIPVisionModel"):
        assert part in shown
    for wrong in (["--checkpoint=x", "--out=y"], ["--from=x", "--to=open_clip", "--out=y"], []):
        with pytest.raises(SystemExit) as end:
            export.main(wrong)
        assert end.value.code == 2


@pytest.mark.slow
def test_a_trained_run_goes_out_and_in_and_on(dataset, tmp_path):
    """WordPiece from a file, two steps, OpenCLIP's folder, back, two more at another size."""
    (tmp_path / "vocab.txt").write_text("\n".join(models.WORDPIECE.vocabulary), encoding="utf-8")
    common = [
        "--config=configs/demo.py", f"--config.data.path={dataset}", "--config.optim.batch=8",
        "--config.optim.duration=2 steps", f"--config.model.arch={models.CLIPA}",
        "--config.data.threads=1",
    ]  # fmt: skip
    first = ["--config.model.image_size=16", f"--config.data.vocab={tmp_path}/vocab.txt"]
    assert train.main([*common, *first, f"--workdir={tmp_path}/first"]) == 0
    assert command(f"--checkpoint={tmp_path}/first", "--to=open_clip", f"--out={tmp_path}/out") == 0
    assert command(f"--from={tmp_path}/out", f"--out={tmp_path}/back") == 0
    then = ["--config.model.image_size=24", f"--config.init_from={tmp_path}/back"]
    assert train.main([*common, *then, f"--workdir={tmp_path}/then"]) == 0
    restored = restore_model(tmp_path / "then")
    assert restored.tokenizer.vocabulary == models.WORDPIECE.vocabulary
    assert restored.config.model.image_size == 24
    assert train.main([*common, *then, f"--workdir={tmp_path}/back"]) == 2
