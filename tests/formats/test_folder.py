import pytest

from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.folder import new_folder, read_json


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(out) as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as partial:
        (partial / "whole").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["whole"]


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for name in ("full", "full/x"):
        with pytest.raises(FormatError, match=r"--out=.* exists"), new_folder(tmp_path / name):
            raise AssertionError("not reached")
    assert (tmp_path / "full" / "x").read_text() == "x"


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "a.json"
    for content, says in (("[1]", "holds no JSON object"), ("{", "can't be read as JSON")):
        path.write_text(content)
        with pytest.raises(FormatError, match=rf"a\.json {says}"):
            read_json(path)
    with pytest.raises(FormatError, match="can't be read"):
        read_json(tmp_path / "none")
