"""What inputs have to draw from."""

import pytest

from refine.inputs.find import find
from refine.inputs.pairs import ImageError
from refine.teaching.sampling import KINDS
from refine.teaching.survey import header_size, survey


@pytest.fixture
def inputs(tmp_path, make):
    """Four tars of pairs of three shapes, with things that are no pairs between them."""
    for tar in range(4):
        members = []
        for n in range(20 * tar, 20 * tar + 20):
            image, *rest = make.pair(n)
            size = [(24, 16), (16, 24), (20, 20)][n % 3]
            members += [(image[0], make.image(n, size=size)), *rest]
        members += make.pair(900 + tar)[1:]  # without its image
        members += [("bad.jpg", b"no picture"), *make.pair(800 + tar, "bad")[1:]]
        make.tar(tmp_path / f"pairs/{tar}.tar", members)
    return find([str(tmp_path / "pairs")])


def test_everything_is_counted_once(inputs, tmp_path):
    found = survey(inputs, 0, 1000, tmp_path, 1)
    assert dict(found.skips) == {"missing_image": 4, "corrupt_image": 4}
    counted = {KINDS[n][1]: int(count) for n, count in enumerate(found.counts) if count}
    assert counted == {"wide": 27, "tall": 27, "about square": 26}
    assert len(found.rows) == 80
    assert sorted(set(found.rows["source"].tolist())) == [0, 1, 2, 3]


def test_workers_change_nothing(inputs, tmp_path):
    one, two = (survey(inputs, 0, 1000, tmp_path, workers) for workers in (1, 2))
    assert one.rows.tobytes() == two.rows.tobytes()
    assert (one.counts == two.counts).all() and one.skips == two.skips


def test_the_order_of_the_inputs_changes_no_sample(inputs, tmp_path):
    samples = [
        survey(order, 0, 12, tmp_path, 1).choose(12)["uid"].tolist()
        for order in (inputs, inputs[::-1], [inputs[i] for i in (2, 0, 3, 1)])
    ]
    assert samples[0] == samples[1] == samples[2]
    assert survey(inputs, 1, 12, tmp_path, 1).choose(12)["uid"].tolist() != samples[0]


def test_a_pair_is_drawn_from_every_input_before_a_second_from_one(inputs, tmp_path):
    chosen = survey(inputs, 0, 12, tmp_path, 1).choose(12)
    assert len(chosen) == 12
    for kind in set(chosen["kind"].tolist()):
        assert sorted(chosen["source"][chosen["kind"] == kind].tolist()) == [0, 1, 2, 3]


def test_sizes_from_headers(make):
    assert header_size(make.image(0, size=(40, 30))) == (40, 30)
    assert header_size(make.image(0, size=(40, 30))[:-50]) == (40, 30)  # decoding would fail
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for data in (b"GIF89a", b"", postscript):  # the last one's decoder would start a program
        with pytest.raises(ImageError) as caught:
            header_size(data)
        assert caught.value.reason == "corrupt_image"
    png = bytearray(make.image(0, "PNG"))
    png[16:24] = (50_000).to_bytes(4, "big") * 2
    with pytest.raises(ImageError) as caught:
        header_size(bytes(png))
    assert caught.value.reason in ("image_too_large", "corrupt_image")
