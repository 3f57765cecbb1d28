"""Questions and answers as they go over the wire."""

import base64
import io
import json

import pytest
from PIL import Image

from refine.engines.backend import Reply, Request, Sampling
from refine.engines.wire import Fault, data_uri, question, read_reply, redacted
from refine.parse import FIELDS
from refine.prompts import load_prompt

IMAGE = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
PROMPT = load_prompt("student-v1")


def asked(request=None, limit="max_tokens", **sampling) -> dict:
    request = request or Request("k", "a red apple", IMAGE)
    return question("m", PROMPT, request, "data:x", Sampling(**sampling), limit)


def test_a_picture_travels_as_a_jpeg_of_good_quality():
    head, _, data = data_uri(IMAGE).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", IMAGE.size)
        assert max(max(table) for table in image.quantization.values()) < 40  # at 75 it is 50
        pairs = zip(image.convert("L").tobytes(), IMAGE.convert("L").tobytes())
        assert max(abs(a - b) for a, b in pairs) < 8


def test_the_prompt_is_asked_with_the_picture_in_its_place():
    (message,) = asked()["messages"]
    before, picture, after = message["content"]
    assert message["role"] == "user"
    assert picture == {"type": "image_url", "image_url": {"url": "data:x"}}
    assert PROMPT.text.startswith(before["text"]) and '"a red apple"' in after["text"]


def test_settings_are_sent_and_no_others():
    body = asked(max_tokens=99, temperature=0.5, seed=3)
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "seed"}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 99, 0.5)
    assert asked(top_p=0.9)["top_p"] == 0.9
    renamed = asked(limit="max_completion_tokens")
    assert renamed["max_completion_tokens"] == 512 and "max_tokens" not in renamed


def test_every_request_and_every_attempt_has_a_seed_of_its_own():
    requests = [Request(f"uid-{n}", "", IMAGE, attempt) for n in range(50) for attempt in range(3)]
    seeds = [asked(request)["seed"] for request in requests]
    assert len(set(seeds)) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [asked(request)["seed"] for request in requests]
    assert asked(requests[0], seed=1)["seed"] != seeds[0]
    assert [asked(request)["temperature"] for request in requests[:3]] == [0, 0.7, 0.7]


def test_the_schema_is_asked_for_only_where_it_is_wanted():
    form = asked(structured=True)["response_format"]
    assert form["type"] == "json_schema"
    assert set(form["json_schema"]["schema"]["required"]) == set(FIELDS)
    assert "response_format" not in asked()


def body(content="text", ending="stop", usage=(11, 7), **message) -> bytes:
    choice = {"message": {"content": content} | message, "finish_reason": ending}
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if usage else None
    return json.dumps({"choices": [choice], "usage": counts}).encode()


def test_what_an_answer_says():
    counted = {"prompt_tokens": 11, "output_tokens": 7}
    assert read_reply("k", body()) == Reply("k", "text", **counted)
    assert read_reply("k", body("")) == Reply("k", "", **counted)
    assert read_reply("k", body(ending="length")) == Reply("k", "text", truncated=True, **counted)
    assert read_reply("k", body(None, "length")) == Reply("k", "", truncated=True, **counted)
    assert read_reply("k", body(None, refusal="no")) == Reply("k", "no", **counted)
    assert read_reply("k", body(usage=None)) == Reply("k", "text")
    filtered = read_reply("k", body("te", "content_filter"))
    assert (filtered.text, filtered.failure, filtered.output_tokens) == ("", "refused_by_server", 7)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": {}}',
        b'{"choices": ["text"]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": "text"}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"choices": [{"message": {"content": "text"}}], "usage": "much"}',
        b'{"choices": [{"message": {"content": "text"}}], "usage": {"prompt_tokens": "x"}}',
        b"[" * 100_000,
        b"\xff\xfe",
        body(None),
        body()[:-5],
    ],
)
def test_half_an_answer_is_a_fault(data):
    with pytest.raises(Fault) as caught:
        read_reply("k", data)
    assert caught.value.kind == "half_answers"
    assert len(str(caught.value)) < 400


def test_the_key_is_in_nothing_that_is_told():
    assert redacted("Bearer sk-1 is no key: sk-1", "sk-1") == "Bearer [key] is no key: [key]"
    assert redacted("none", "") == "none"
    assert redacted("x" * 298 + "sk-1", "sk-1") == "x" * 298 + "[k"  # never the key's beginning
