import json
import logging

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from hqclip_jax import evaluate
from hqclip_jax.checkpoint import Checkpoints, RunInfo
from hqclip_jax.config import Config, MeshConfig, ModelConfig
from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.evals.outcome import Failure, Outcome
from hqclip_jax.restore import restore_model
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import init_state
from tests.evals.colours import COLOURS, picture, write_classification, write_tar

SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained run with one checkpoint, at step 3."""
    model = ModelConfig("ViT-Pico/8", SIZE, context_length=12, dtype="float32")
    config = Config(model=model)
    mesh = make_mesh(MeshConfig(), len(jax.devices()))
    workdir = tmp_path_factory.mktemp("run")
    _, abstract, _, _ = init_state(config, 49408, 0, optax.sgd(0.1), mesh)
    rng = np.random.default_rng(0)  # in place of the initialisation, which takes long to compile
    state = jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding), abstract
    )
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, state, RunInfo(config, {"main": 96}, None))
    checkpoints.close()
    return workdir


@pytest.fixture
def data(tmp_path):
    """A set of each kind over the colours, and the suite file that lists them."""
    write_classification(tmp_path / "zs", {c: i for i, c in enumerate(COLOURS)})
    members = {}
    for colour in COLOURS:
        members[f"{colour}.png"] = picture(colour)
        stored = {"captions": [f"a {colour} wall", colour], "negative_caption": "a grey wall"}
        members[f"{colour}.json"] = json.dumps(stored)
    write_tar(tmp_path / "pairs.tar", members)
    sets = [
        {"task": "zeroshot", "name": "colours", "path": "zs"},
        {"task": "retrieval", "name": "walls", "path": "pairs.tar"},
        {"task": "hard_negatives", "name": "grey", "path": "pairs.tar"},
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"sets": sets}))
    return tmp_path


def run(checkpoint, suite, out, *more):
    return evaluate.main(
        [f"--checkpoint={checkpoint}", f"--suite={suite}", f"--out={out}", "--batch=4", *more]
    )


def test_end_to_end_equals_the_towers_by_hand(checkpoint, data, capsys):
    assert run(checkpoint, data / "suite.json", data / "out") == 0
    stored = json.loads((data / "out" / "results.json").read_text())
    assert (stored["step"], stored["model"]["image_size"], stored["tokenizer"]) == (3, SIZE, "clip")
    assert [*stored["results"]] == ["colours", "walls", "grey"]

    restored = restore_model(checkpoint)
    model = nnx.merge(restored.model, restored.params)
    images = np.stack([eval_transform(open_rgb(picture(c)), SIZE) for c in COLOURS])
    zimg = np.asarray(model.encode_image(images))

    templates = "a %s thing", "some %s", "a %s wall", "%s"
    texts = [t % c for t in templates for c in COLOURS] + ["a grey wall"]
    ztxt = np.asarray(model.encode_text(restored.tokenizer(texts)))
    things, some, walls, names, grey = np.split(ztxt, [5, 10, 15, 20])

    classifier = things + some
    classifier /= np.linalg.norm(classifier, axis=1, keepdims=True)
    right = (zimg @ classifier.T).argmax(axis=1) == np.arange(5)
    assert stored["results"]["colours"]["scores"]["top1"] == pytest.approx(right.mean())

    captions, owner = np.concatenate([walls, names]), np.tile(np.arange(5), 2)
    scores = stored["results"]["walls"]["scores"]
    found = (captions @ zimg.T).argmax(axis=1) == owner
    assert scores["image_retrieval_recall_at_1"] == pytest.approx(found.mean())
    found = owner[(zimg @ captions.T).argmax(axis=1)] == np.arange(5)
    assert scores["text_retrieval_recall_at_1"] == pytest.approx(found.mean())

    margins = np.sum(zimg * (walls - grey), axis=1)
    assert stored["results"]["grey"]["scores"]["accuracy"] == pytest.approx((margins > 0).mean())
    assert "top1" in capsys.readouterr().out


def test_results_say_nan_never_and_are_replaced_whole(checkpoint, data):
    out = data / "out"
    out.mkdir()
    (out / "results.json").write_text("old")
    assert run(checkpoint, data / "zs", out) == 0
    assert json.loads((out / "results.json").read_text())["results"]["zs"]["scores"]["n"] == 5
    assert not [p.name for p in out.rglob("*.tmp")]


def test_missing_set_is_listed_and_the_others_run(checkpoint, data, capsys):
    (data / "zs" / "classnames.txt").unlink()
    assert run(checkpoint, data / "suite.json", data / "out") == 1
    assert "1 of 3 sets can't be read" in capsys.readouterr().out
    results = json.loads((data / "out" / "results.json").read_text())["results"]
    assert results["colours"] == {"error": f"{data / 'zs' / 'classnames.txt'} is missing"}
    assert results["walls"]["scores"]["n"] == 5


def test_nothing_to_run_is_said_before_the_checkpoint_is_read(data, capsys):
    assert run("nowhere", "imagenet", data / "out", f"--data={data}") == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 sets can't be read" in printed
    assert "wds_imagenet1k is missing" in printed
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite=imagnet"], "did you mean 'imagenet'?"),
        (["--checkpoint=nowhere"], "nowhere holds no checkpoint"),
        (["--step=4"], "has no step 4; it has [3]"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(checkpoint, data, capsys, arguments, message):
    assert run(checkpoint, data / "zs", data / "out", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.main(["--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    for part in ("--suite=imagenet --data=", '"task": "hard_negatives"', "imagenet_shifts", "{c}"):
        assert part in shown
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint=x", "--suite=y", "--batch=0"])


class Fixed:
    """An evaluator that returns, or raises, what it was given."""

    def __init__(self, name, outcome):
        self.name, self.outcome = name, outcome

    def run(self, embedder):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Embedder:
    on_embedded = None


def test_run_suite_goes_on_after_a_failure(caplog):
    found = Outcome({"top1": 1.0, "n": 1}, "top1")
    found.skips.add("image does not decode", "0.tar:7")
    evaluators = [Fixed("a", KeyError("x")), Fixed("b", found)]
    embedder = Embedder()
    with caplog.at_level(logging.INFO, "hqclip_jax.evaluate"):
        results = evaluate.run_suite(embedder, evaluators)
    assert results == {"a": Failure("KeyError: 'x'"), "b": found}
    assert "b: left out 1: image does not decode: 0.tar:7" in caplog.text
    assert evaluate.failed(results) == ["a"]
    assert "Traceback" in caplog.text  # an error of ours, not of the data
    assert embedder.on_embedded is None


def test_progress_bar_only_on_a_terminal(capsys):
    class Counting(Fixed):
        def run(self, embedder):
            embedder.on_embedded(1234)
            return super().run(embedder)

    terminal = Console(force_terminal=True)
    evaluate.run_suite(Embedder(), [Counting("set", Outcome({}, ""))], terminal)
    assert "set" in capsys.readouterr().out
    evaluate.run_suite(
        Embedder(), [Counting("set", Outcome({}, ""))], Console(force_terminal=False)
    )
    assert capsys.readouterr().out == ""


def test_table_shows_chance_and_n_beside_each_score(capsys):
    results = {
        "walls": Outcome({
            "image_retrieval_recall_at_1": 0.25, "image_retrieval_recall_at_1_chance": 0.02,
            "text_retrieval_recall_at_1": 0.5, "text_retrieval_recall_at_1_chance": 0.03,
            "n": 4700, "captions": 23500,
        }, "recall_at_1"),
        "hard": Outcome({
            "accuracy": 0.6, "accuracy_chance": 0.5, "tie_rate": 0.1, "n": 44,
            "accuracy/add[att]": 1.0, "accuracy/add[att]_chance": 0.5, "n/add[att]": 3,
        }, "accuracy"),
        "gone": Failure("[x] is missing"),
    }  # fmt: skip
    Console(width=100).print(evaluate.results_table(results))
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    for row in (
        ["walls", "image_retrieval_recall_at_1", "25.0", "2.0", "23,500"],
        ["walls", "text_retrieval_recall_at_1", "50.0", "3.0", "4,700"],
        ["hard", "accuracy", "60.0", "50.0", "44"],
        ["hard", "tie_rate", "10.0", "-", "44"],
        ["hard", "accuracy/add[att]", "100.0", "50.0", "3"],
        ["gone", "[x]", "is", "missing", "-", "-", "-"],
    ):
        assert row in rows
