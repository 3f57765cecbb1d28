"""Shares made apart and joined: as if they had been one run."""

import json
import shutil

import pytest

from refine.__main__ import main


@pytest.fixture
def shares(tmp_path, make, refine):
    """Three tars of pairs in shares of one; 5 and 12 come twice."""
    for i, numbers in enumerate([range(10), [5, *range(10, 20)], [*range(20, 25), 12]]):
        make.pairs(tmp_path / f"in/{i}.tar", numbers)
    outputs = [tmp_path / f"share-{i}" for i in range(3)]
    for i, output in enumerate(outputs):
        arguments = ("--engine", "rules", "--input", tmp_path / "in", "--output", output)
        assert refine(*arguments, "--shard", i, "--num-shards", 3) == 0
    return outputs


def merge(*arguments) -> int:
    return main(["merge", *map(str, arguments), "--workers", "1"])


def test_shares_merge_to_what_one_run_makes(tmp_path, shares, refine, records, counts):
    one, joined = tmp_path / "one", tmp_path / "joined"
    assert refine("--engine", "rules", "--input", tmp_path / "in", "--output", one) == 0
    assert merge(*reversed(shares), "--output", joined) == 0
    strip = lambda found: [vars(r) | {"source": ""} for r in found]
    assert strip(records(joined)) == strip(records(one))
    assert counts(joined) == counts(one)
    assert counts(joined)["duplicate_uid"] == 2
    tags = [json.loads((d / "tag_counts.json").read_text()) for d in (joined, one)]
    assert tags[0] == tags[1]
    manifest = json.loads((joined / "manifest.json").read_text())
    assert [m["plan"]["share"] for m in manifest["merged"]] == ["0/3", "1/3", "2/3"]
    assert not (joined / ".merge").exists()
    assert all((d / "manifest.json").exists() for d in shares)


def test_no_bytes_are_copied_where_nothing_is_dropped(tmp_path, shares):
    assert merge(*shares, "--output", tmp_path / "out", "--shard-mb", "0.0001") == 0
    nodes = [
        {f.stat().st_ino for f in d.glob("*.array_record-*")} for d in (*shares, tmp_path / "out")
    ]
    assert len(nodes[3] & nodes[0]) == 1 and not nodes[3] & nodes[2]  # 12 was in the second first


def test_a_missing_share_is_named(tmp_path, shares, capfd):
    assert merge(shares[0], shares[2], "--output", tmp_path / "out") == 2
    assert "1 of 3 shares are missing (1)" in capfd.readouterr().err
    assert merge(shares[0], shares[2], "--output", tmp_path / "out", "--partial") == 0


def test_an_unfinished_share_is_refused(tmp_path, shares, capfd):
    (shares[1] / "manifest.json").unlink()
    assert merge(*shares, "--output", tmp_path / "out") == 2
    assert "share-1 is not complete" in capfd.readouterr().err


def test_what_was_made_otherwise_is_refused(tmp_path, shares, refine, capfd):
    other = tmp_path / "other"
    assert refine("--engine", "rules", "--input", tmp_path / "in/0.tar", "--output", other,
                  "--skip-pixels", 1000) == 0  # fmt: skip
    assert merge(shares[0], other, "--output", tmp_path / "out", "--partial") == 2
    assert "other arguments" in capfd.readouterr().err
    assert merge(shares[0], other, "--output", tmp_path / "out", "--partial", "--mixed") == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_found(tmp_path, shares, capfd, harm):
    (shard,) = shares[2].glob("*.array_record-*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if harm == "flip" else data[:-1])
    assert merge(*shares, "--output", tmp_path / "out") == 2
    assert "is not what its manifest says" in capfd.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_killed_merge_starts_anew(tmp_path, shares, records, monkeypatch):
    from refine import joining

    out = tmp_path / "out"

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(joining, "write_metadata", stop)
    assert merge(*shares, "--output", out) == 130
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    assert merge(*shares, "--output", out) == 0
    assert len(records(out)) == 25
    assert merge(*shares, "--output", out) == 2  # complete


def test_a_folder_with_something_else_is_refused(tmp_path, shares, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    assert merge(*shares, "--output", tmp_path / "out") == 2
    assert "holds other files (thesis.tex)" in capfd.readouterr().err
    assert (tmp_path / "out/thesis.tex").exists()
    shutil.rmtree(tmp_path / "out")


def test_a_share_without_work_is_told(tmp_path, shares, refine, capfd):
    arguments = ("--engine", "rules", "--input", tmp_path / "in", "--output", tmp_path / "x")
    assert refine(*arguments, "--shard", 7, "--num-shards", 8) == 2
    assert "there are 3 inputs" in capfd.readouterr().err
