import re
from pathlib import Path

import pytest

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config, ConfigError, DataConfig, LossConfig, ModelConfig, OptimConfig

CONFIGS = Path(__file__).parent.parent / "configs"
# DESIGN: the scales of DataComp that the paper follows.
PUBLISHED = {
    "small": ("ViT-B/32", 4096, 5e-4, "500 steps", "12.8M samples", 0.98),
    "medium": ("ViT-B/32", 4096, 5e-4, "500 steps", "128M samples", 0.98),
    "large": ("ViT-B/16", 8192, 5e-4, "500 steps", "1.28B samples", 0.98),
    "xlarge": ("ViT-L/14", 90112, 1e-3, "10000 steps", "12.8B samples", 0.95),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_file_gives_a_valid_config(path):
    config = config_lib.load(str(path), {})
    assert config_lib.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scales(name):
    config = config_lib.load(str(CONFIGS / f"{name}.py"), {})
    optim = config.optim
    found = (config.model.arch, optim.batch, optim.lr, optim.warmup, optim.duration, optim.beta2)
    assert found == PUBLISHED[name]
    assert (config.model.image_size, config.model.context_length) == (224, 77)
    assert (optim.beta1, optim.eps, optim.weight_decay) == (0.9, 1e-6, 0.2)
    assert config.data.crop_scale == (0.9, 1.0)
    assert config.loss == LossConfig(contrastive=1, hni=1, tag=1, tag_form="softmax", tag_idf=False)
    assert (config.data.p_desc, config.data.p_neg_desc) == (0.5, 0.5)


def test_overrides_are_read_as_the_fields_type():
    config = config_lib.load(
        str(CONFIGS / "demo.py"),
        {
            "optim.lr": "1e-4",
            "optim.batch": "1e3",
            "loss.tag_idf": "true",
            "data.crop_scale": "0.5,1",
            "data.path": "x/y",
            "seed": "7",
        },
    )
    assert config.optim.lr == 1e-4
    assert config.optim.batch == 1000 and isinstance(config.optim.batch, int)
    assert config.loss.tag_idf is True
    assert config.data.crop_scale == (0.5, 1.0)
    assert (config.data.path, config.seed) == ("x/y", 7)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("optim.learning_rate", "1", "unknown config field 'optim.learning_rate'"),
        ("optim.lrr", "1", "did you mean 'optim.lr'"),
        ("optm.lr", "1", "did you mean 'optim.lr'"),
        ("optim", "1", "is a section"),
        ("seed.x", "1", "is no section"),
        ("optim.batch", "many", "optim.batch='many' is not of type int"),
        ("optim.batch", "1.5e0", "optim.batch='1.5e0' is not of type int"),
        ("loss.tag_idf", "maybe", "not true or false"),
        ("data.crop_scale", "0.5", "2 numbers"),
        ("data.crop_scale", "0.9,0.5", "low <= high"),
        ("model.arch", "ViT-X/1", "is not one of: "),
        ("model.image_size", "100", "try 96"),
        ("data.p_desc", "1.5", "data.p_desc=1.5 is not a probability"),
        ("optim.duration", "long", "write a number and steps, samples or epochs"),
        ("optim.batch", "0", "must be above 0"),
        ("model.context_length", "2", "no room for a word"),
        ("data.tag_vocabulary", "0", "loss.tag=1.0 needs data.tag_vocabulary"),
    ],
)
def test_wrong_values_are_refused_by_name(name, value, says):
    with pytest.raises(ConfigError, match=r".*") as error:
        config_lib.load(str(CONFIGS / "demo.py"), {name: value})
    assert says in str(error.value)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        config_lib.validate(Config(loss=LossConfig(contrastive=0, hni=0, tag=0)))


def test_missing_file_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"demo\.py"):
        config_lib.load(str(CONFIGS / "deno.py"), {})


def test_file_without_get_config(tmp_path):
    (tmp_path / "x.py").write_text("a = 1")
    with pytest.raises(ConfigError, match=r"no get_config"):
        config_lib.load(str(tmp_path / "x.py"), {})


def test_argument_of_the_file():
    config = config_lib.load(f"{CONFIGS / 'demo.py'}:3 epochs", {})
    assert config.optim.duration == "3 epochs"


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("7 steps", 7), ("1 step", 1), ("1K samples", 10), ("1001 samples", 11), ("2 epochs", 5),
     ("0.5 epochs", 2), ("1.28B samples", 12_800_000)],
)  # fmt: skip
def test_durations(duration, steps):
    config = Config(optim=OptimConfig(batch=100))
    assert config.steps(duration, records=250) == steps


def test_stored_config_with_an_unknown_key_is_refused():
    stored = Config().to_json()
    stored["loss"]["other"] = 1.0
    with pytest.raises(ConfigError, match=r"loss\.other"):
        config_lib.from_json(stored)


def test_overrides_are_split_from_other_arguments():
    overrides, rest = config_lib.split_overrides(
        ["--config=a.py", "--config.optim.lr=1", "--workdir", "w", "--config.seed", "3"]
    )
    assert overrides == {"optim.lr": "1", "seed": "3"}
    assert rest == ["--config=a.py", "--workdir", "w"]
    with pytest.raises(ConfigError, match="no value"):
        config_lib.split_overrides(["--config.seed"])


def test_help_names_every_field():
    text = config_lib.describe()
    for name, _, _ in config_lib.walk(Config(ModelConfig(), DataConfig())):
        assert f"--config.{name}=" in text


def test_sizes_of_zero_are_the_architecture_s_own():
    config = config_lib.validate(Config(model=ModelConfig(arch="ViT-L/14-336")))
    assert (config.model.image_size, config.model.context_length) == (336, 77)
    config = config_lib.validate(Config(model=ModelConfig(arch="ViT-L/14-CLIPA", image_size=84)))
    assert (config.model.image_size, config.model.context_length) == (84, 32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss.hni_form", "all", "has none: take loss.hni_form='pair'"),
        ("model.patch_dropout", "1.0", "model.patch_dropout=1.0 is not a share"),
        ("optim.ema", "-0.1", "optim.ema=-0.1 is not a share"),
        ("optim.micro_batches", "0", "optim.micro_batches=0 must be above 0"),
        ("optim.clip_norm", "-1", "optim.clip_norm=-1.0 must not be below 0"),
        ("loss.tag", "nan", "loss.tag=nan must not be below 0"),
        ("optim.beta2", "1", "optim.beta2=1.0 is not a share"),
        (
            "mesh.tensor",
            "8",
            "mesh.tensor=8 does not divide the 12 and 8 attention heads of the "
            "image and text tower of model.arch='ViT-B/32': take one of 1, 2, 4",
        ),
        ("mesh.fsdp", "3", "mesh.fsdp=3 does not divide the 768 and 512 features"),
    ],
)
def test_new_fields_are_checked(field, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_lib.load(f"{CONFIGS}/small.py", {"loss.contrastive_form": "sigmoid", field: value})


def test_a_softmax_shared_by_both_losses_has_one_temperature():
    with pytest.raises(ConfigError, match=r"loss\.hni_scale='own' goes with"):
        config_lib.load(f"{CONFIGS}/small.py", {"loss.hni_form": "own", "loss.hni_scale": "own"})


def test_both_stages_of_clipa_and_no_third():
    assert config_lib.load(f"{CONFIGS}/xlarge_clipa.py", {}).model.image_size == 84
    assert config_lib.load(f"{CONFIGS}/xlarge_clipa.py:finetune", {}).model.context_length == 32
    with pytest.raises(ConfigError, match="the stages are"):
        config_lib.load(f"{CONFIGS}/xlarge_clipa.py:third", {})
