"""The four starts, with small models whose every parameter differs."""

import dataclasses
import logging
import math
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from hqclip_jax.checkpoint import CheckpointError, Checkpoints, RunInfo
from hqclip_jax.config import Config, MeshConfig, ModelConfig, OptimConfig
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import SPECIAL_PIECES, ClipTokenizer, WordPieceTokenizer
from hqclip_jax.models.resample import resample_positions
from hqclip_jax.optim import make_tx
from hqclip_jax.restore import restore_model
from hqclip_jax.sharding import make_mesh, tree_shardings
from hqclip_jax.start import Start, begin, find_origin
from hqclip_jax.step import TrainState, init_state

VOCAB = 49408
CONFIG = Config(
    model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=12, dtype="float32"),
    optim=OptimConfig(batch=8),
)
TAGS = TagVocabulary(("cup", "red"), (3, 1), 4)
RECORDS = {"train": 40}


def change(config: Config = CONFIG, **sections) -> Config:
    """With fields replaced, as `change(model={"image_size": 24}, resume_from="x")`."""
    new = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in sections.items()
    }
    return dataclasses.replace(config, **new)


@lru_cache
def abstract_state(config: Config, num_tags: int) -> TrainState:
    mesh = make_mesh(MeshConfig(fsdp=2), 8)
    return init_state(config, VOCAB, num_tags, make_tx(config.optim, 1, 10), mesh)[1]


def filled(abstract: TrainState, seed: int) -> TrainState:
    """In place of an initialisation, which takes long to compile."""

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.arange(seed, seed + math.prod(x.shape), dtype=x.dtype).reshape(x.shape)
        return jax.device_put(values, x.sharding)

    return jax.tree.map(fill, abstract)


def save(workdir: Path, config: Config, step: int, tags: TagVocabulary | None = TAGS) -> TrainState:
    """A run's one checkpoint, and the state in it."""
    state = filled(abstract_state(config, len(tags) if tags else 0), step)
    expected = jax.device_get(state)
    checkpoints = Checkpoints(workdir)
    info = RunInfo(config, {"train": step * 8}, tags, timers={"step": 1.5}, records=RECORDS)
    checkpoints.save(step, state, info)
    checkpoints.close()
    return expected


def start(
    config: Config, workdir: Path, tags: TagVocabulary | None = TAGS, records: dict = RECORDS
) -> Start:
    origin = find_origin(config, workdir)
    tags = origin.stored.tags if origin.stored else tags
    abstract = abstract_state(config, len(tags) if tags else 0)
    return begin(origin, config, abstract, lambda: filled(abstract, 99), tags, records)


def assert_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, TrainState]]:
    """Two runs of one checkpoint: `long` at step 7, `own` at step 3."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {
        "long": save(folder / "long", CONFIG, 7),
        "own": save(folder / "own", CONFIG, 3),
    }


def test_the_order_of_the_four_starts(runs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, states = runs
    resume = change(resume_from=str(folder / "long"))
    begun = start(resume, folder / "own")
    assert (begun.how, begun.step, begun.info.position) == ("own", 3, {"train": 24})
    assert begun.info.timers == {"step": 1.5}
    assert_equal(begun.state, states["own"])
    assert "long is not read again: the workdir has a checkpoint of its own" in caplog.text

    begun = start(resume, tmp_path / "new")
    assert (begun.how, begun.step, begun.info.position) == ("resume", 7, {"train": 56})
    assert_equal(begun.state, states["long"])
    assert f"continuing from step 7 of {folder / 'long'}" in caplog.text

    begun = start(change(init_from=str(folder / "long")), tmp_path / "new")
    assert (begun.how, begun.step, begun.info) == ("init", 0, None)
    assert_equal(begun.state.params, states["long"].params)
    fresh = filled(abstract_state(CONFIG, 2), 99)
    assert_equal(begun.state.opt_state, fresh.opt_state)
    assert f"starting with the parameters of step 7 of {folder / 'long'}" in caplog.text

    begun = start(CONFIG, tmp_path / "new")
    assert (begun.how, begun.step, begun.info) == ("scratch", 0, None)
    assert_equal(begun.state, fresh)
    assert "starting from scratch" in caplog.text
    assert not (tmp_path / "new").exists()  # a start only reads


def test_a_run_that_goes_on_keeps_its_vocabulary_and_one_that_begins_has_its_own(runs, tmp_path):
    folder, _ = runs
    for config in (CONFIG, change(resume_from=str(folder / "long"))):
        assert find_origin(config, folder / "own").stored.tags == TAGS
    assert find_origin(change(init_from=str(folder / "long")), tmp_path).stored is None


def test_another_run_is_not_continued(runs, tmp_path):
    folder, _ = runs
    config = change(resume_from=str(folder / "long"), model={"image_size": 24})
    with pytest.raises(CheckpointError, match=r"image_size is 16 there, 24 here.*Use init_from"):
        start(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"image_size is 16 there.*Use another --workdir"):
        start(config, folder / "own")


@pytest.mark.parametrize("name", ["resume_from", "init_from"])
def test_a_workdir_without_a_checkpoint_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        start(change(**{name: str(tmp_path / "none")}), tmp_path)


def test_a_source_of_another_size_is_refused_and_a_new_one_is_not(runs):
    own = runs[0] / "own"
    says = r"'train' had 40 records and has 41.*another name in data\.path"
    with pytest.raises(CheckpointError, match=says):
        start(CONFIG, own, records={"train": 41})
    assert start(CONFIG, own, records={"train": 40, "more": 5}).step == 3
    assert start(CONFIG, own, records={"more": 5}).step == 3


@pytest.mark.parametrize(("size", "length"), [(24, 16), (24, 12), (16, 8)])
def test_other_sizes_are_resampled_and_all_else_is_taken(runs, tmp_path, caplog, size, length):
    caplog.set_level(logging.INFO)
    folder, states = runs
    model = {"image_size": size, "context_length": length}
    begun = start(change(model=model, init_from=str(folder / "long")), tmp_path)
    expected = resample_positions(states["long"].params, "ViT-Pico/8", size, length)
    assert_equal(begun.state.params, expected)
    assert begun.state.params["text"]["positional_embedding"].shape[0] == length
    assert ("visual/positional_embedding" in caplog.text) == (size != 16)
    assert ("text/positional_embedding" in caplog.text) == (length != 12)
    shardings = tree_shardings(begun.state, make_mesh(MeshConfig(fsdp=2), 8))
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} {s}"), begun.state,
                 shardings)  # fmt: skip


OTHER = TagVocabulary(("cup", "blue"), (3, 1), 4)


@pytest.mark.parametrize(("tags", "loss", "fresh"), [
    (TAGS, {}, []),
    (TagVocabulary(TAGS.tags, (9, 8), 10), {}, []),  # other counts of the same tags
    (OTHER, {}, ["tag_head"]),
    (TAGS, {"tag_input": "projected"}, ["tag_head"]),  # of the same shape in this architecture
    (None, {"tag": 0.0}, []),
    (TAGS, {"hni_scale": "own"}, ["hni_logit_scale"]),
    (OTHER, {"contrastive_form": "sigmoid"}, ["logit_bias", "tag_head"]),
])  # fmt: skip
def test_what_the_losses_add_is_fresh_where_it_is_another(
    runs, tmp_path, caplog, tags, loss, fresh
):
    caplog.set_level(logging.INFO)
    folder, states = runs
    begun = start(change(loss=loss, init_from=str(folder / "long")), tmp_path, tags)
    initial = filled(abstract_state(change(loss=loss), len(tags) if tags else 0), 99).params
    for name, found in begun.state.params.items():
        assert_equal(found, initial[name] if name in fresh else states["long"].params[name])
    assert ("fresh:" in caplog.text) == bool(fresh) and all(n in caplog.text for n in fresh)


def test_a_run_without_head_and_with_its_own_scale_is_begun_from(tmp_path):
    there = change(loss={"tag": 0.0, "hni_scale": "own"}, optim={"ema": 0.9})
    state = save(tmp_path / "there", there, 2, None)
    assert_equal(restore_model(tmp_path / "there", weights="ema").params, state.ema)
    begun = start(change(init_from=str(tmp_path / "there"), optim={"ema": 0.5}), tmp_path / "new")
    initial = filled(abstract_state(CONFIG, 2), 99).params
    taken = {k: v for k, v in state.ema.items() if k != "hni_logit_scale"}
    assert_equal(begun.state.params, taken | {"tag_head": initial["tag_head"]})
    assert_equal(begun.state.ema, begun.state.params)
    leaves = jax.tree.leaves((begun.state.params, begun.state.ema))
    # The step donates both.
    assert len({x.addressable_data(0).unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_another_architecture_is_refused_with_what_differs(runs, tmp_path):
    config = change(init_from=str(runs[0] / "long"), model={"arch": "ViT-Nano/8"})
    with pytest.raises(CheckpointError) as refused:
        start(config, tmp_path)
    said = str(refused.value)
    assert "is a ViT-Pico/8, which does not fit model.arch='ViT-Nano/8'" in said
    assert "ln_1/bias is (3, 128) there, (4, 192) here" in said
    assert "more. Only image size, text length and tags may be others" in said
    config = change(init_from=str(runs[0] / "long"), model={"act": "quick_gelu"})
    with pytest.raises(CheckpointError, match=r"model\.act is 'gelu' there, 'quick_gelu' here"):
        start(config, tmp_path)


def test_the_tokenizer_is_that_of_the_run_one_begins_with(tmp_path):
    clipa = change(model={"arch": "ViT-Pico/8-CLIPA"})
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(SPECIAL_PIECES))
    with_vocab = change(clipa, data={"vocab": str(vocab)})
    assert find_origin(CONFIG, tmp_path).tokenizer(CONFIG) == ClipTokenizer(12)
    wordpiece = find_origin(with_vocab, tmp_path).tokenizer(with_vocab)
    assert wordpiece == WordPieceTokenizer(SPECIAL_PIECES, 12)

    checkpoints = Checkpoints(tmp_path / "there")
    checkpoints.save_params(1, {"x": np.zeros(1)}, RunInfo(clipa, {}, None, wordpiece.to_json()))
    checkpoints.close()
    for how in ("init_from", "resume_from"):
        begun = change(clipa, **{how: str(tmp_path / "there")}, model={"context_length": 5})
        assert find_origin(begun, tmp_path).tokenizer(begun).context_length == 5
        assert find_origin(begun, tmp_path).tokenizer(begun).vocabulary == SPECIAL_PIECES
        same = change(begun, data={"vocab": str(vocab)})
        assert find_origin(same, tmp_path).tokenizer(same).vocabulary == SPECIAL_PIECES
    vocab.write_text("\n".join([*SPECIAL_PIECES, "cup"]))
    with pytest.raises(CheckpointError, match=r"data\.vocab=.* is not the vocabulary that .*there"):
        find_origin(same, tmp_path).tokenizer(same)
