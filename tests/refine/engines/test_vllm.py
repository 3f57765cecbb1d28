"""A real vLLM on the CPU, with a tiny Qwen2-VL of random weights."""

import os

import pytest
from PIL import Image

from refine.engines.backend import Request, Sampling
from refine.errors import RefineError
from refine.parse import parse
from refine.prompts import load_prompt
from tests.refine.real_engine import ENVIRONMENT, OPTIONS, Held, tiny

pytestmark = pytest.mark.lvlm

PIXELS = 112 * 112


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return str(tiny(tmp_path_factory.mktemp("tiny")))


def opened(model: str, sampling: Sampling, max_pixels: int = PIXELS, **more):
    chosen = Held(model, slots=4, options=OPTIONS | more)
    return chosen.open(load_prompt("student-v1"), sampling, max_pixels)


@pytest.fixture(scope="module")
def backend(model):
    backend = opened(model, Sampling(max_tokens=150, structured=True))
    yield backend
    backend.close()


def collect(backend, count: int) -> list:
    found = []
    while len(found) < count:
        found += backend.replies()
    return found


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def test_answers_come_under_their_keys_as_they_finish(backend):
    for i in range(9):
        backend.submit(Request(f"key {i}", f"caption {i}", picture()))
    replies = collect(backend, 9)
    assert sorted(r.key for r in replies) == [f"key {i}" for i in range(9)]
    assert all(parse(r.text).texts.desc for r in replies)
    assert all(r.prompt_tokens > 16 and 0 < r.output_tokens <= 150 for r in replies)
    assert not any(r.truncated or r.failure for r in replies)


def test_a_request_joins_others_under_way(backend):
    backend.submit(Request("a", "", picture()))
    found = backend.replies()
    backend.submit(Request("b", "", picture()))
    found += collect(backend, 2 - len(found))
    assert sorted(r.key for r in found) == ["a", "b"]


def test_a_retry_differs_and_the_first_try_does_not(backend):
    same = picture()
    for i, attempt in enumerate([0, 0, 1, 2, 3, 4]):
        backend.submit(Request(str(i), "text", same, attempt))
    texts = {r.key: r.text for r in collect(backend, 6)}
    assert texts["0"] == texts["1"]
    assert len({texts[str(i)] for i in range(2, 6)}) > 1


def test_a_picture_that_the_processor_refuses_is_told_and_the_others_go_on(backend):
    backend.submit(Request("strip", "", Image.new("RGB", (2000, 2))))
    backend.submit(Request("good", "", picture()))
    replies = {r.key: r for r in collect(backend, 2)}
    assert replies["strip"].failure == "refused_by_engine" and replies["strip"].detail
    assert parse(replies["good"].text)


def test_the_note_says_what_a_picture_costs(backend):
    assert "at most 12,544 pixels takes 18 tokens" in backend.note  # 16, and two marks


def test_an_answer_that_is_cut_off_says_so(model):
    backend = opened(model, Sampling(max_tokens=5))
    backend.submit(Request("a", "", picture()))
    (reply,) = collect(backend, 1)
    assert reply.truncated and reply.output_tokens == 5
    backend.close()


def test_max_pixels_that_is_not_in_force_is_found(model):
    # The tiny model makes 16 tokens of any picture, and 56 x 56 pixels are 4.
    with pytest.raises(RefineError, match=r"--max-pixels 3,136 is not in force: .* 18 tokens"):
        opened(model, Sampling(max_tokens=5), max_pixels=56 * 56)


def test_what_does_not_fit_is_told_before_anything_is_asked(model):
    with pytest.raises(RefineError, match="larger --context"):
        opened(model, Sampling(max_tokens=2000))


def test_a_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RefineError, match=r"--model .*nothing: vLLM can't load it"):
        opened(str(tmp_path / "nothing"), Sampling())
