from pathlib import Path

import numpy as np

from hqclip_jax.data.record import Record, Shard
from refine.finish import Piece, collect_seen, find_losers, gather, pack, write_shards
from refine.inputs.pairs import Skip
from refine.ledger import Ledger
from refine.sink import SEEN_FILE, Part, PartWriter, part_directory


def record(make, uid: int, tag: str = "a") -> Record:
    return Record(uid=make.uid(uid), image=make.image(uid), tags=(tag, tag.upper(), "all"))


def write_parts(make, parts: Path, rows: list[list[int]], shard_bytes: int = 10**9) -> list[Path]:
    """Parts of the uids given; a negative one came and was skipped."""
    parts.mkdir(parents=True)
    for number, uids in enumerate(rows):
        with PartWriter(parts, number, shard_bytes) as part:
            for uid in uids:
                if uid < 0:
                    part.skip(Skip("corrupt_image", str(number), uid=make.uid(-uid)))
                else:
                    part.add(record(make, uid, f"Tag {number}"))
            part.seal(len(uids))
    return [part_directory(parts, n) for n in range(len(rows))]


def test_a_part_holds_what_was_written(tmp_path, make):
    (directory,) = write_parts(make, tmp_path / "p", [[1, -2, 3, 4]], shard_bytes=1500)
    part = Part.load(directory)
    assert [s.records for s in part.shards] == [2, 1]  # two images are more than 1,500 bytes
    assert part.counts == {"pairs": 4, "joined": 3, "corrupt_image": 1}
    assert part.tags == {"all": 3, "tag 0": 3}  # each once per record, lower-cased
    assert sorted(p.name for p in directory.iterdir()) == [
        "0.array_record", "1.array_record", "part.json", "seen.bin", "skipped.jsonl",
    ]  # fmt: skip


def test_an_unsealed_part_leaves_nothing(tmp_path, make):
    with PartWriter(tmp_path, 0, 10**9) as part:
        part.add(record(make, 1))
    assert list(tmp_path.iterdir()) == []


def test_the_first_record_of_a_uid_stays(tmp_path, make, records):
    # 1 comes three times, 2 first as a corrupt image, 9 never as a record.
    rows = [[-2, 1, 3, 1], [4, 2, 1], [2, -1, -9, 5]]
    parts = write_parts(make, tmp_path / "p", rows)
    seen = collect_seen([p / SEEN_FILE for p in parts], tmp_path / "seen", 4, 1)
    losers = find_losers(seen)
    found = list(zip(losers.part.tolist(), losers.record.tolist(), losers.winner.tolist()))
    assert found == [(0, 2, 0), (1, 2, 0), (2, 0, 1)]
    assert losers.distinct == 6
    with Ledger(tmp_path / "s.jsonl") as ledger:
        names = ["a.tar", "b.tar", "c.tar"]
        found = gather(map(Part.load, parts), names, losers, ledger, tmp_path / "quarantine.jsonl")
    pieces, tags = found.pieces, found.tags
    assert ledger.counts == {"pairs": 11, "joined": 5, "corrupt_image": 3, "duplicate_uid": 3}
    assert tags == {"all": 5, "tag 0": 2, "tag 1": 2, "tag 2": 1}
    shards = write_shards(pieces, tmp_path, tmp_path, "x", "train", 10**9, 1)
    assert [(s.file, s.records) for s in shards] == [("x-train.array_record-00000-of-00001", 5)]
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [make.uid(u) in line for u, line in zip((2, 1, 1, 1, 9, 2), lines)] == [True] * 6
    assert "kept the first, in b.tar" in lines[-1]


def piece(records: int, size: int, drop: tuple[int, ...] = ()) -> Piece:
    return Piece(Path("0"), Shard("0", records, size, ""), drop)


def test_neighbours_share_a_shard_up_to_the_size():
    pieces = [piece(1, size) for size in (40, 60, 1, 200, 30, 30, 30)]
    assert [[p.shard.bytes for p in group] for group in pack(pieces, 100)] == [
        [40, 60], [1], [200], [30, 30, 30],
    ]  # fmt: skip
    assert pack([piece(2, 40, (0, 1)), piece(0, 10)], 100) == []


def test_shards_are_renamed_where_they_can_be_and_found_again(tmp_path, make):
    parts = write_parts(make, tmp_path / "p", [[1, 2], [3, 1], [4]])
    losers = find_losers(collect_seen([p / SEEN_FILE for p in parts], tmp_path / "seen", 1, 1))
    with Ledger(tmp_path / "s.jsonl") as ledger:
        pieces = gather(map(Part.load, parts), "abc", losers, ledger, tmp_path / "q").pieces
    node = pieces[0].path.stat().st_ino
    arguments = (pieces, tmp_path, tmp_path, "x", "train", 1, 1)
    shards = write_shards(*arguments)
    assert [s.records for s in shards] == [2, 1, 1]
    assert (tmp_path / shards[0].file).stat().st_ino == node  # moved, not copied
    assert not pieces[0].path.exists()
    assert pieces[1].path.exists()  # copied without its second record: needed after a kill
    assert write_shards(*arguments) == shards


def test_all_parts_may_be_empty(tmp_path, make):
    parts = write_parts(make, tmp_path / "p", [[], [-1]])
    losers = find_losers(collect_seen([p / SEEN_FILE for p in parts], tmp_path / "seen", 2, 1))
    assert (len(losers.part), losers.distinct) == (0, 1)
    assert losers.part.dtype == np.int64
