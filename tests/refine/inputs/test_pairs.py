import hashlib
import json

import pytest

from refine.inputs.pairs import ImageError, Pair, Skip, image_size, read_pairs, uid_of


def read(path) -> list[Pair | Skip]:
    return list(read_pairs(path, "00000.tar"))


def test_pairs_come_in_order_with_the_bytes_received(tmp_path, make):
    path = make.pairs(tmp_path / "a.tar", [3, 1])
    assert read(path) == [
        Pair(make.uid(3), make.image(3), "A red apple no 3", "00000.tar", "000000003"),
        Pair(make.uid(1), make.image(1), "A red apple no 1", "00000.tar", "000000001"),
    ]


def test_caption_from_text_else_from_json_and_cleaned(tmp_path, make):
    image, meta = make.image(0), {"uid": make.uid(0).upper(), "caption": "cafÃ©"}
    members = [
        ("d/0.png", image),
        ("d/0.json", json.dumps(meta).encode()),
        ("d/1.WEBP", image),
        ("d/1.txt", b"a &amp;amp;\n b \xff"),
        ("d/1.json", json.dumps(meta).encode()),
        ("d/2.jpeg", image),
        ("d/2.txt", b" \n"),
        ("d/2.json", json.dumps(meta | {"caption": None}).encode()),
    ]
    found = read(make.tar(tmp_path / "a.tar", members))
    assert [(p.key, p.caption) for p in found] == [
        ("d/0", "café"),
        ("d/1", "a & b \ufffd"),
        ("d/2", ""),
    ]
    assert {p.uid for p in found} == {make.uid(0)}


@pytest.mark.parametrize(
    ("meta", "reason", "detail"),
    [
        (None, "no_uid", "no .json file"),
        (b"{", "malformed_json", "Expecting property name"),
        (b"\xff\xfe\xfd", "malformed_json", "decode"),
        (b"[" * 100_000, "malformed_json", "recursion"),
        (b"[1]", "malformed_json", "a list, no object"),
        (b"{}", "no_uid", "uid is None"),
        (b'{"uid": 7}', "no_uid", "uid is 7"),
        (b'{"uid": "xyz"}', "no_uid", "'xyz'"),
        (b'{"uid": "%s", "caption": 1}' % (b"a" * 32), "malformed_json", "caption is a int"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, make, meta, reason, detail):
    members = [("0.jpg", make.image(0))] + ([("0.json", meta)] if meta is not None else [])
    bad, good = read(make.tar(tmp_path / "a.tar", [*members, *make.pair(1)]))
    assert (bad.reason, bad.source, bad.key) == (reason, "00000.tar", "0")
    assert detail in bad.detail
    assert good.uid == make.uid(1)


def test_a_pair_without_an_image_says_what_the_download_said(tmp_path, make):
    members = [m for m in make.pair(1, status="failed_to_download") if not m[0].endswith("jpg")]
    (skip,) = read(make.tar(tmp_path / "a.tar", members))
    assert (skip.reason, skip.uid) == ("missing_image", make.uid(1))
    assert skip.detail == "download status 'failed_to_download'"


def test_a_broken_tar_gives_what_it_holds(tmp_path, make):
    path = make.pairs(tmp_path / "a.tar", [1, 2])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"000000002.json") + 520])
    first, second, broken = read(path)
    assert first.uid == make.uid(1)
    assert (second.reason, second.key) == ("no_uid", "000000002")
    assert (broken.reason, broken.source) == ("broken_tar", "00000.tar")
    assert "inside '000000002.json'" in broken.detail


def test_equal_keys_behind_one_another_stay_apart(tmp_path, make):
    members = make.pair(1, key="0") + make.pair(2, key="0")
    assert [p.uid for p in read(make.tar(tmp_path / "a.tar", members))] == [
        make.uid(1),
        make.uid(2),
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_image_size_and_truncation(make, kind):
    data = make.image(1, kind, (40, 30))
    assert image_size(data, 1200) == (40, 30)
    with pytest.raises(ImageError) as e:
        image_size(data[: len(data) // 2], 1200)
    assert e.value.reason == "corrupt_image"


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_corrupt(data):
    with pytest.raises(ImageError) as e:
        image_size(data, 1200)
    assert e.value.reason == "corrupt_image"


def test_a_bomb_is_refused_before_it_is_decoded(make):
    # The header claims 60,000 x 60,000; the data behind it would not decode.
    small = bytearray(make.image(1, "PNG", (40, 30)))
    import struct
    import zlib

    small[16:24] = struct.pack(">II", 60_000, 60_000)
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    for limit in (1200, 89_478_485):
        with pytest.raises(ImageError) as e:
            image_size(bytes(small), limit)
        assert e.value.reason == "image_too_large"
    with pytest.raises(ImageError, match="40x30 pixels, more than 1,199"):
        image_size(make.image(1, "PNG", (40, 30)), 1199)


@pytest.mark.parametrize(
    ("given", "content"),
    [
        ("0123456789ABCDEF" * 2, None),
        (" seven\n", b"seven"),
        (b"seven", b"seven"),
        (7, b"7"),
        ("a" * 31, b"a" * 31),
        ("g" * 32, b"g" * 32),
        (b"\xff", b"\xed\xb3\xbf"),
    ],
)
def test_an_id_gives_the_uid_whatever_the_image(given, content):
    expected = hashlib.sha256(content).hexdigest()[:32] if content else given.lower()
    assert {uid_of(given, image, "a") for image in (b"1", b"2", None)} == {expected}


@pytest.mark.parametrize("given", [None, "", " ", b"", [7], {"a": 1}, 0.5])
def test_without_an_id_image_and_caption_give_the_uid(given):
    assert uid_of(given, None, "a") == ""
    content = hashlib.sha256(b"image").digest() + "café".encode()
    assert uid_of(given, b"image", "café") == hashlib.sha256(content).hexdigest()[:32]
    assert uid_of(given, b"a", "\ud800") == uid_of(None, b"a", "\ud800")


def test_a_skip_line_leaves_out_what_is_empty():
    assert json.loads(Skip("no_uid", key="0").line()) == {"reason": "no_uid", "key": "0"}
