"""CLIP scores of a data set by a checkpoint of ours."""

import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from hqclip_jax import score
from hqclip_jax.checkpoint import Checkpoints, RunInfo
from hqclip_jax.config import Config, MeshConfig, ModelConfig, OptimConfig
from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.restore import restore_model
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import init_state
from refine.errors import RefineError
from refine.judging.clip import Clip
from refine.judging.outputs import Output
from refine.judging.scores import TEXTS, Scores, texts_of
from tests.refine.outputs import make_record, write_output

SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained run with two checkpoints, at steps 3 and 5; it keeps an average."""
    model = ModelConfig("ViT-Pico/8", SIZE, context_length=12, dtype="float32")
    config = Config(model=model, optim=OptimConfig(ema=0.5))
    mesh = make_mesh(MeshConfig(), len(jax.devices()))
    workdir = tmp_path_factory.mktemp("run")
    _, abstract, _, _ = init_state(config, 49408, 0, optax.sgd(0.1), mesh)
    checkpoints = Checkpoints(workdir)
    for step in (3, 5):
        draw = partial(_drawn, np.random.default_rng(step))
        state = jax.tree.map(draw, abstract)
        checkpoints.save(step, state, RunInfo(config, {"main": 96}, None))
    checkpoints.close()
    return workdir


def _drawn(rng, x):
    return jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding)


@pytest.fixture
def data(tmp_path):
    records = [make_record(i) for i in range(10)]
    records[3] = make_record(3, image=b"no picture")
    records[4] = make_record(4, caption="", neg_desc=(), neg_tags=())
    records[5] = make_record(5, desc=("word " * 30,))
    return write_output(tmp_path / "out", [records[:4], records[4:]])


def run(checkpoint, data, *more) -> int:
    return score.main([f"--checkpoint={checkpoint}", f"--data={data}", "--batch=4", *more])


def by_hand(checkpoint, data, **options) -> dict[str, np.ndarray]:
    """The cosines, from the towers."""
    restored = restore_model(checkpoint, **options)
    model = nnx.merge(restored.model, restored.params)
    output = Output.open(data)
    records = [output.record(number) for number in range(len(output))]
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    seen = [r.image != b"no picture" for r in records]
    images = [
        eval_transform(open_rgb(r.image), SIZE) if s else blank for r, s in zip(records, seen)
    ]
    zimg = np.asarray(model.encode_image(np.stack(images)))
    texts = [texts_of(record).get(name, "") for name in TEXTS for record in records]
    ztxt = np.asarray(model.encode_text(restored.tokenizer(texts))).reshape(5, len(records), -1)
    cosines = 100 * np.sum(zimg * ztxt, axis=2)
    there = np.array([bool(text) for text in texts]).reshape(5, -1) & np.array(seen)
    return dict(zip(TEXTS, np.where(there, cosines, np.nan)))


def scores_of(data, printed: str) -> np.ndarray:
    about = json.loads(printed.splitlines()[-1])
    scores = Scores(Output.open(data), score.About(**about))
    assert scores.count_missing() == 0
    return scores.rows(np.arange(10))


def test_scores_are_the_cosines_of_the_towers(checkpoint, data, capsys):
    assert run(checkpoint, data) == 0
    rows = scores_of(data, capsys.readouterr().out)
    for name, cosines in by_hand(checkpoint, data).items():
        np.testing.assert_allclose(rows[name], cosines, atol=1e-3)
    assert rows["desc_tokens"][5] == 32  # more than the context of 12
    assert rows["caption_tokens"][0] == 6


def test_a_second_run_restores_nothing(checkpoint, data, capsys, monkeypatch):
    assert run(checkpoint, data) == 0
    first = scores_of(data, capsys.readouterr().out)
    monkeypatch.setattr(score, "restore_model", lambda *_, **__: pytest.fail("restored again"))
    assert run(checkpoint, data) == 0
    printed = capsys.readouterr().out
    assert "0 records scored now" in printed
    assert scores_of(data, printed).tobytes() == first.tobytes()


def test_steps_and_averages_have_scores_of_their_own(checkpoint, data, capsys):
    for options in ({"step": 3}, {"step": 5}, {"step": 5, "weights": "ema"}):
        arguments = [f"--{name}={value}" for name, value in options.items()]
        assert run(checkpoint, data, *arguments) == 0
        rows = scores_of(data, capsys.readouterr().out)
        expected = by_hand(checkpoint, data, **options)
        np.testing.assert_allclose(rows["desc"], expected["desc"], atol=1e-3)
    assert len([*(data / "scores").iterdir()]) == 3


def test_shares_of_a_job_array_make_the_whole(checkpoint, data, capsys):
    for shard in range(3):
        assert run(checkpoint, data, f"--shard={shard}", "--num-shards=3") == 0
        printed = capsys.readouterr().out
        assert f"{(4, 6, 0)[shard]} records scored now" in printed
    np.testing.assert_allclose(
        scores_of(data, printed)["desc"], by_hand(checkpoint, data)["desc"], atol=1e-3
    )


def test_from_the_refinement_by_a_process_of_its_own(checkpoint, data, capsys):
    clip = Clip(checkpoint / "checkpoints" / "5", batch=4)
    numbers = np.array([1, 3, 7])
    output = Output.open(data)
    scores = clip.scores(output, numbers)
    assert scores.about.name.startswith(f"clip-{checkpoint.name}-5-")
    assert scores.about.facts == {"context": 12, "step": 5}
    assert scores.count_missing() == 7
    rows = scores.rows(numbers)
    np.testing.assert_allclose(rows["desc"], by_hand(checkpoint, data)["desc"][numbers], atol=1e-3)


def test_an_interpreter_without_jax_is_told(checkpoint, data, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(RefineError, match="--clip-python"):
        Clip(checkpoint, str(bare)).scores(Output.open(data))
    with pytest.raises(RefineError, match="No such file"):
        Clip(checkpoint, str(tmp_path / "gone")).scores(Output.open(data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=gone"], "holds no checkpoint"),
        (["--data=gone"], "is not a directory"),
        (["--step=4"], "has no step 4"),
    ],
)
def test_errors_say_what_is_wrong(checkpoint, data, capsys, arguments, message):
    assert run(checkpoint, data, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_costs_only_what_was_under_way(checkpoint, data, tmp_path):
    """Killed once some rows are there, the same command scores the others."""
    many = write_output(tmp_path / "many", [[make_record(i) for i in range(600)]])
    command = [
        sys.executable, "-m", "hqclip_jax.score", f"--checkpoint={checkpoint}", f"--data={many}",
        "--batch=8",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output = Output.open(many)
    try:
        about = None
        while process.poll() is None:
            for stored in many.glob("scores/*/scorer.json"):
                facts = json.loads(stored.read_text())
                about = score.About(stored.parent.name, facts["kind"], tuple(facts["columns"]), {})
            if about and Scores(output, about).count_missing() < 590:
                process.kill()
                break
    finally:
        process.kill()
        process.wait()
    left = Scores(output, about).count_missing()
    assert 0 < left < 590
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"{left} records scored now" in done.stdout
    assert Scores(output, about).count_missing() == 0


def test_shutil_copies_of_a_step_have_the_same_name(checkpoint, data, tmp_path, capsys):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    for folder in (checkpoint, copy):
        assert run(folder, data) == 0
    assert len([*(data / "scores").iterdir()]) == 1
