"""CLIP scores by a checkpoint in transformers' layout."""

import json
import math
import shutil

import numpy as np
import pytest

from refine import cpu_env
from refine.errors import RefineError
from refine.inputs.pictures import prepared
from refine.judging.clip import Clip, TransformersClip
from refine.judging.outputs import Output
from refine.judging.scores import TEXTS, texts_of
from tests.refine.outputs import make_record, write_output

SIZE, CONTEXT = 16, 40


def bytes_to_letters() -> list[str]:
    """The letter that stands for each byte in CLIP's vocabulary, in its order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i, _ in enumerate(others)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny CLIPModel with random weights, and a tokenizer that knows letters alone."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.ops.torchvision, "nms"):
        cpu_env.declare()
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("models") / "Tiny CLIP"
    letters = bytes_to_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = path.parent / "vocab.json"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = path.parent / "merges.txt"
    merges.write_text("#version: 0.2\n")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "projection_dim": 24}
    text = {"vocab_size": len(tokens), "max_position_embeddings": CONTEXT, "pad_token_id": 1}
    text |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": SIZE, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    CLIPTokenizer(vocab=str(vocabulary), merges=str(merges)).save_pretrained(path)
    size = {"shortest_edge": SIZE}
    CLIPImageProcessorPil(size=size, crop_size=SIZE).save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path):
    records = [make_record(i) for i in range(7)]
    records[2] = make_record(2, image=b"no picture")
    records[3] = make_record(3, caption="", neg_desc=(), tags=())
    records[4] = make_record(4, caption="an <|endoftext|> inside")
    return Output.open(write_output(tmp_path / "out", [records[:3], records[3:]]))


def by_hand(folder, record) -> dict[str, float]:
    """The cosines by transformers' own joint forward pass."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = {}
    for name, text in texts_of(record).items():
        image = prepared(record.image, 10**6, 10**6)
        inputs = tokenizer([text], return_tensors="pt", truncation=True, max_length=CONTEXT)
        inputs["pixel_values"] = processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(**inputs)
        found[name] = 100 * float((out.image_embeds * out.text_embeds).sum())
    return found


def test_scores_are_those_of_the_model(folder, data):
    clip = Clip(folder, batch=3)
    scores = clip.scores(data)
    rows = scores.rows(np.arange(7))
    for number in (0, 1, 3, 5, 6):
        expected = by_hand(folder, data.record(number))
        row = {name: rows[name][number] for name in TEXTS if not math.isnan(rows[name][number])}
        assert row == pytest.approx(expected, abs=1e-3)
    assert np.std(rows["desc"][[0, 1, 4, 5, 6]]) > 1e-3
    assert all(np.isnan(rows[name][2]) for name in TEXTS)
    assert rows["caption_tokens"][0] == len("redpicturenumber0") + 2
    assert rows["desc_tokens"][0] == len("thepictureisred.,itisplain.") + 2
    assert scores.about.facts == {"context": CONTEXT}
    assert scores.about.name.startswith("clip-Tiny-CLIP-")


def test_text_that_names_the_end_token_does_not_end_the_text(folder, data):
    scorer = TransformersClip(folder)
    plain, other, cut = scorer._texts(["an <|endoftext|> inside", "an <|endoftext|> other", "an"])
    assert plain @ other < 0.9999 and plain @ cut < 0.9999
    assert Clip(folder).scores(data).rows(np.array([4]))["caption_tokens"] == 23


def test_a_text_longer_than_the_context_is_cut_and_its_length_told(folder, data):
    scorer = TransformersClip(folder)
    one, other = scorer._texts(["a" * 100, "a" * 101 + " and more"])
    assert one @ other == pytest.approx(1)
    assert scorer._length("a" * 100) == 102


def test_batches_make_no_difference(folder, data, tmp_path):
    one = Clip(folder, batch=1).scores(data).rows(np.arange(7))
    shutil.rmtree(data.directory / "scores")
    many = Clip(folder, batch=64).scores(data).rows(np.arange(7))
    for name in TEXTS:
        np.testing.assert_allclose(one[name], many[name], atol=1e-4)


def test_other_weights_have_scores_of_their_own(folder, data, tmp_path):
    import torch
    from transformers import CLIPModel

    other = tmp_path / folder.name
    shutil.copytree(folder, other)
    model = CLIPModel.from_pretrained(other)
    with torch.no_grad():
        model.text_projection.weight.mul_(-1)
    model.save_pretrained(other)
    one, two = (Clip(path).scores(data, np.array([0])) for path in (folder, other))
    assert one.about.name != two.about.name
    assert one.rows(np.array([0]))["desc"] == pytest.approx(-two.rows(np.array([0]))["desc"])


def test_what_is_no_checkpoint_is_told(tmp_path, data, folder):
    with pytest.raises(RefineError, match="is no checkpoint"):
        Clip(tmp_path / "gone").scores(data)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(RefineError, match="can't be loaded as a CLIPModel"):
        Clip(empty).scores(data)
