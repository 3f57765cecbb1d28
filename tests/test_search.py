import json
import os
import re
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from hqclip_jax import search
from hqclip_jax.checkpoint import Checkpoints, RunInfo
from hqclip_jax.config import Config, MeshConfig, ModelConfig
from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.index.store import Index
from hqclip_jax.restore import restore_model
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import init_state
from tests.evals.colours import COLOURS, picture, write_tar

SIZE = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two untrained runs, `a` and `b`, each with a checkpoint at step 3."""
    config = Config(model=ModelConfig("ViT-Pico/8", SIZE, context_length=12, dtype="float32"))
    mesh = make_mesh(MeshConfig(), len(jax.devices()))
    _, abstract, _, _ = init_state(config, 49408, 0, optax.sgd(0.1), mesh)
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)  # in place of the initialisation, which compiles long
        state = jax.tree.map(
            lambda x, rng=rng: rng.normal(0, 0.1, x.shape).astype(x.dtype), abstract
        )
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
        checkpoints = Checkpoints(folder / name)
        checkpoints.save(3, state, RunInfo(config, {"main": 96}, None))
        checkpoints.close()
    return folder


@pytest.fixture
def photos(tmp_path):
    """Ten pictures, one in a tar and one under a name that is no UTF-8, and what is no picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour, "red", size=(20, 16)))
    for i, colour in enumerate(["green", "blue", "cyan"]):
        (folder / f"{i}.jpg").write_bytes(picture(colour, "yellow", format="JPEG"))
    write_tar(folder / "in.tar", {"a.png": picture("red", "cyan", "blue")})
    (folder / os.fsdecode(b"<b>\xff.png")).write_bytes(picture("yellow", "blue"))
    (folder / "broken.png").write_bytes(picture("red")[:50])
    (folder / "notes.txt").write_text("x")
    return folder


def run(*arguments) -> int:
    return search.main([str(argument) for argument in arguments])


def say(capsys) -> tuple[str, str]:
    """What was printed, with its white space folded: to stdout and to stderr."""
    printed = capsys.readouterr()
    return " ".join(printed.out.split()), " ".join(printed.err.split())


def build(runs, photos, index, *more) -> int:
    return run("build", f"--checkpoint={runs / 'a'}", f"--images={photos}", f"--index={index}",
               "--batch=4", *more)  # fmt: skip


def test_end_to_end_equals_the_towers_by_hand(runs, photos, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(runs, photos, index) == 0
    out, _ = say(capsys)
    assert "10 pictures by" in out
    assert "left out: 1 × picture does not decode" in out
    about = json.loads((index / "index.json").read_text())
    assert (about["count"], about["others"], about["model"]["step"]) == (10, 1, 3)

    page = tmp_path / "found.html"
    texts = ["a red wall", "yellow"]
    asked = ["--image", photos / "cyan.png", "--not", "people", "-n", "4", "--out", page]
    assert run("query", index, texts[0], *asked, texts[1]) == 0
    out, _ = say(capsys)
    assert f"The nearest of 10 pictures in {photos}, by {runs / 'a'}, step 3" in out

    restored = restore_model(runs / "a")
    model = nnx.merge(restored.model, restored.params)
    opened = Index.open(index)
    pixels = [eval_transform(open_rgb(p.read(photos)), SIZE) for p in opened.pictures()]
    zimg = np.asarray(model.encode_image(np.stack(pixels)))
    ztxt = np.asarray(model.encode_text(restored.tokenizer([*texts, "people"])))
    cyan = [p.name for p in opened.pictures()].index("cyan.png")
    z = np.stack([ztxt[0], ztxt[1], zimg[cyan]]) - ztxt[2] / 2
    cosine = z / np.linalg.norm(z, axis=1, keepdims=True) @ zimg.T
    tables = re.findall(r"│ (\d+) │ (-?[\d.]+) │", out)
    assert [rank for rank, _ in tables] == ["1", "2", "3", "4"] * 3
    shown = np.array([float(similarity) for _, similarity in tables]).reshape(3, 4)
    np.testing.assert_allclose(shown, -np.sort(-cosine, axis=1)[:, :4], atol=2e-3)
    assert page.read_text().count('class="hit"') == 12
    assert "<b>U" not in page.read_text()


def test_run_again_from_another_place_and_without_the_checkpoint(runs, photos, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(runs, photos, index) == 0
    (photos / "red.png").unlink()
    (photos / "new.png").write_bytes(picture("red", "blue", "green"))
    assert build(runs, photos, index) == 0
    assert "11 pictures, 9 of them known" in say(capsys)[0]  # one of them broken
    names = [p.name for p in Index.open(index).pictures()]
    assert ("new.png" in names, "red.png" in names, len(names)) == (True, False, 10)

    shutil.copytree(runs / "a", tmp_path / "moved")
    assert run("query", index, "red", f"--checkpoint={tmp_path / 'moved'}") == 0
    assert (index / "query.html").exists()
    assert run("query", index, "red", f"--checkpoint={runs / 'b'}") == 2
    _, err = say(capsys)
    assert f"{runs / 'b'}, step 3" in err
    assert "is another model: search with the index's" in err
    about = json.loads((index / "index.json").read_text())
    about["model"]["checkpoint"] = "gone"
    (index / "index.json").write_text(json.dumps(about))
    assert run("query", index, "red") == 2
    assert "gone holds no checkpoint" in (err := say(capsys)[1])
    assert "name its new place with --checkpoint" in err

    assert run("duplicates", index, "--above", "-1") == 0
    out, _ = say(capsys)
    assert "1 groups with cosines of -1.0 and more among 10 pictures" in out
    assert "10 pictures" in (index / "duplicates.html").read_text()


def test_errors_come_before_the_checkpoint_is_read(runs, photos, tmp_path, capsys):
    empty, index = tmp_path / "empty", tmp_path / "index"
    empty.mkdir()
    (empty / "a.txt").write_text("x")
    for arguments, message in (
        (["build", "--checkpoint=nowhere", f"--images={photos / 'x'}"], "is no folder"),
        (["build", "--checkpoint=nowhere", f"--images={photos}"], "nowhere holds no checkpoint"),
        (["build", f"--checkpoint={runs / 'a'}", f"--images={empty}", f"--index={index}"],
         "holds no pictures and no tars of pictures, only 1 other files"),
        (["query", tmp_path / "none", "x"], "holds no index: make one with"),
        (["duplicates", tmp_path / "none"], "holds no index: make one with"),
    ):  # fmt: skip
        assert run(*arguments) == 2
        assert message in say(capsys)[1]
    assert not index.exists()


def test_queries_of_nothing_are_refused(runs, photos, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(runs, photos, index) == 0
    for arguments, message in (
        ([], "nothing to search for: give a text, or --image FILE"),
        (["..."], "no letter, number or symbol"),
        (["red", "--not", "!"], "no letter, number or symbol"),
        (["--image", photos / "notes.txt"], "notes.txt: picture does not decode"),
    ):
        assert run("query", index, *arguments) == 2
        assert message in say(capsys)[1]
    assert run("query", index, "red " * 30) == 0
    assert "sees only the beginning of" in say(capsys)[0]


@pytest.mark.parametrize("command", [[], ["build"], ["query"], ["duplicates"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit):
        search.main([*command, "--help"])
    assert f"python -m hqclip_jax.search {''.join(command) or 'build'} " in capsys.readouterr().out


def test_unknown_options_are_told(capsys):
    with pytest.raises(SystemExit):
        search.main(["query", "index", "red", "--nto", "people"])
    assert "unknown: --nto people; see `query --help`" in capsys.readouterr().err
