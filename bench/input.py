"""How fast does the data path feed a trainer, and does it stay so from 1k to 1M records?

    python -m bench.input [--quick] [--repeats=5] [--seconds=8]

Pictures of 500x375 in JPEG at quality 85 become batches of 224 pixels, with texts, negatives and
tags. Beside whole batches of `Pipeline` stand the bare decoding and cropping of the same bytes from
memory, and OpenCLIP's WebDataset loader. That one needs `pip install 'webdataset<=0.2.86' pandas`
(it can't use later ones) beside requirements-peers.txt. The bare loop on two threads is what the
machine's second core is worth. The million records are tiny pictures, so that all that is not
decoding shows; they are one shard of a thousand under a thousand names, so that the index is a
million's and the bytes come from the same memory. Every measurement is a process of its own, the
sides take turns, and figures are medians over the turns; rates per CPU second are of that process
alone, and OpenCLIP decodes in another. Prints, last, one JSON object:

    ratio_to_decode      whole batches on one thread, over the bare loop
    two_thread_speedup   whole batches on two threads, over one
    two_thread_limit     the bare loop on two threads, over one
    ratio_to_openclip    whole batches on one thread, over OpenCLIP's with one worker
    flat_1k_to_1m        examples/s from 1M records, over those from 1k
    resident_mib_1k/_1m  memory of the reading process
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from hqclip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from hqclip_jax.data import record
from hqclip_jax.data.image import load_crop
from hqclip_jax.data.pipeline import Pipeline
from hqclip_jax.data.record import Record
from hqclip_jax.data.shards import open_source
from hqclip_jax.data.tags import TagVocabulary, write_counts
from hqclip_jax.data.tokenizer import ClipTokenizer

SIZE, BATCH, PHOTOS = 224, 64, 1000
WORDS = (
    "red",
    "small",
    "wooden",
    "round",
    "old",
    "shiny",
    "table",
    "bottle",
    "fruit",
    "shelf",
    "box",
)


def sources() -> list[Image.Image]:
    """Photos of 112 pixels where HQCLIP_TEST_DATA names them, else drawn noise of all scales."""
    named = os.environ.get("HQCLIP_TEST_DATA")
    if named:
        with tarfile.open(Path(named) / "grocery/pairs/train/00000.tar") as tar:
            files = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
        return [Image.open(io.BytesIO(f)).convert("RGB") for f in files[:300]]
    rng = np.random.default_rng(0)
    return [
        sum(
            np.array(Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize((112, 112)))
            * np.float32(0.8 / n**0.5)
            for n in (2, 4, 8, 16, 32, 64)
        )
        for _ in range(50)
    ]


def photos(count: int) -> Iterator[bytes]:
    """JPEGs of 500x375, quality 85, about 55 kB: 112-pixel photos at 1.5 times their size, side by
    side, because one photo enlarged to all of it has no detail left and decodes too fast."""
    rng = np.random.default_rng(1)
    tiles = [
        p if isinstance(p, Image.Image) else Image.fromarray(p.clip(0, 255).astype(np.uint8))
        for p in sources()
    ]
    for _ in range(count):
        canvas = Image.new("RGB", (500, 375))
        for left in range(0, 500, 165):
            for top in range(0, 375, 165):
                tile = tiles[rng.integers(len(tiles))].resize((165, 165), Image.Resampling.BICUBIC)
                canvas.paste(tile, (left, top))
        yield encoded(canvas)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def records(pictures: Iterable[bytes]) -> Iterator[Record]:
    """Four sentences and eight tags of each sign, as the published annotations have."""
    for i, picture in enumerate(pictures):
        words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 9)]
        said = [f"the picture shows a {a} {b} on the left side." for a, b in zip(words, words[4:])]
        yield Record(
            hashlib.sha256(str(i).encode()).hexdigest()[:32], picture, f"photo {i} of a {words[0]}",
            tuple(said), tuple(s.replace("left", "right") for s in said), tuple(words),
            tuple(w + "s" for w in words),
        )  # fmt: skip


def write(directory: Path, source: Iterator[Record], count: int, times: int = 1) -> Path:
    """A complete data set directory of a shard of `count` records, or of as many names of it."""
    directory.mkdir()
    counts: Counter[str] = Counter()
    names = [record.shard_name("bench", "train", index, times) for index in range(times)]
    first = directory / names[0]
    writer = ArrayRecordWriter(str(first), record.WRITER_OPTIONS)
    for _, r in zip(range(count), source):
        writer.write(record.encode(r))
        counts.update(r.tags)
    writer.close()
    for name in names[1:]:
        (directory / name).hardlink_to(first)
    write_counts(directory, counts, count)
    shards = [record.Shard(name, count, first.stat().st_size, "") for name in names]
    record.write_metadata(directory, "bench", "train", shards, {"engine": "bench"})
    return directory


def config_of(directory: str, threads: int, tiny: bool) -> Config:
    model = ModelConfig(arch="ViT-B/16", image_size=SIZE, context_length=77)
    if tiny:
        model = ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=77)
    data = DataConfig(path=directory, threads=threads)
    return Config(model=model, data=data, optim=OptimConfig(batch=BATCH))


def batches(directory: str, threads: int, tiny: bool = False) -> Iterator[dict]:
    """The data path as the trainer opens it."""
    config = config_of(directory, threads, tiny)
    tags = TagVocabulary.from_datasets([directory], config.data.tag_vocabulary)
    return Pipeline(config, ClipTokenizer(77), tags).batches()


def decoded(directory: str, threads: int = 1) -> Iterator[list[np.ndarray]]:
    """The bare loop over the pictures, which lie in memory."""
    source = open_source(directory)
    files = [record.decode(source[i]).image for i in range(len(source))]

    def crops(batch: int) -> list[np.ndarray]:
        rng, first = np.random.default_rng(batch), batch * BATCH
        return [load_crop(files[i % len(files)], SIZE, DataConfig().crop_scale, rng)
                for i in range(first, first + BATCH)]  # fmt: skip

    if threads == 1:
        yield from map(crops, count())
    pool = ThreadPoolExecutor(threads)
    ahead = deque(pool.submit(crops, batch) for batch in range(2 * threads))
    for batch in count(len(ahead)):
        ahead.append(pool.submit(crops, batch))
        yield ahead.popleft().result()


def open_clip_batches(directory: str) -> Iterator:
    """OpenCLIP's own loader and transform, one worker, over the same pictures and captions."""
    import torch

    # As in tests/models/torch_peers.py: a torchvision without its operators can't be imported.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip_train.data import get_wds_dataset

    preprocess = open_clip.transform.image_transform(SIZE, is_train=True)
    args = SimpleNamespace(
        train_data=str(Path(directory) / "openclip.tar"), train_num_samples=10**7, seed=0,
        train_data_upsampling_factors=None, dataset_resampled=True, batch_size=BATCH, workers=1,
        world_size=1,
    )  # fmt: skip
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    return iter(get_wds_dataset(args, preprocess, True, tokenizer=tokenizer).dataloader)


def write_tar(directory: Path) -> None:
    """The data set's pictures and captions as OpenCLIP reads them."""
    source = open_source(directory)
    with tarfile.open(directory / "openclip.tar", "w") as tar:
        for i in range(len(source)):
            r = record.decode(source[i])
            for ending, data in (("jpg", r.image), ("txt", r.caption.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


SIDES: dict[str, Callable[[str], Iterator]] = {
    "decode": decoded,
    "decode_two": lambda d: decoded(d, 2),
    "one_thread": lambda d: batches(d, 1),
    "two_threads": lambda d: batches(d, 2),
    "openclip": open_clip_batches,
    "tiny": lambda d: batches(d, 1, tiny=True),
}


def measure(side: str, directory: str, seconds: float) -> dict[str, float]:
    """Examples per second of wall and of CPU time once all shards are open, and the resident memory
    in MiB."""
    iterator = SIDES[side](directory)
    warm = time.monotonic() + seconds / 2
    while time.monotonic() < warm:
        next(iterator)
    made, begun, cpu = 0, time.monotonic(), time.process_time()
    while (spent := time.monotonic() - begun) < seconds:
        next(iterator)
        made += BATCH
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rate": made / spent,
        "cpu_rate": made / (time.process_time() - cpu),
        "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def apart(side: str, directory: Path, seconds: float) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "bench.input", f"--side={side}", f"--data={directory}"]
    done = subprocess.run(
        [*command, f"--seconds={seconds}"], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(
    jobs: dict[str, tuple[str, Path]], repeats: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Medians over turns in which every job runs once."""
    found: dict[str, list[dict]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (side, directory) in jobs.items():
            found[name].append(apart(side, directory, seconds))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def missing_peers() -> str:
    needed = ("torch", "open_clip", "open_clip_train", "torchvision", "webdataset", "pandas")
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100k records for 1M, shorter turns")
    parser.add_argument("--repeats", type=int, default=5, help="turns that each side has")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.data, args.seconds)))
        sys.stdout.flush()
        os._exit(0)  # loaders that read ahead take long to stop
    repeats, seconds = (2, 3.0) if args.quick else (args.repeats, args.seconds)
    many = 100_000 if args.quick else 1_000_000
    missing = missing_peers()
    if missing:
        print(f"OpenCLIP's loader is left out, for want of {missing}: install "
              "requirements-peers.txt with --no-deps, 'webdataset<=0.2.86' and pandas")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        photo = write(Path(folder) / "photo", records(photos(PHOTOS)), PHOTOS)
        write_tar(photo)
        tiny = encoded(Image.new("L", (16, 16), 128))
        few = write(Path(folder) / "1k", records(repeat(tiny)), 1000)
        lots = write(Path(folder) / "1m", records(repeat(tiny)), 1000, many // 1000)
        jobs = {
            side: (side, photo) for side in ("decode", "decode_two", "one_thread", "two_threads")
        }
        if not missing:
            jobs["openclip"] = ("openclip", photo)
        found = in_turn(jobs, repeats, seconds)
        found |= in_turn({"1k": ("tiny", few), "1m": ("tiny", lots)}, repeats, seconds)
    print(f"pictures from {os.environ.get('HQCLIP_TEST_DATA') or 'drawn noise'}; 1m: {many:,} "
          f"records; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    print(f"{'':14}{'examples/s':>12}{'per CPU s':>12}{'MiB':>8}")
    for name, row in found.items():
        print(f"{name:14}{row['rate']:12.0f}{row['cpu_rate']:12.0f}{row['mib']:8.0f}")
    rate = {name: row["rate"] for name, row in found.items()}
    figures = {
        "ratio_to_decode": rate["one_thread"] / rate["decode"],
        "ratio_to_decode_cpu": found["one_thread"]["cpu_rate"] / found["decode"]["cpu_rate"],
        "two_thread_speedup": rate["two_threads"] / rate["one_thread"],
        "two_thread_limit": rate["decode_two"] / rate["decode"],
        "ratio_to_openclip": None if missing else rate["one_thread"] / rate["openclip"],
        "flat_1k_to_1m": rate["1m"] / rate["1k"],
        "resident_mib_1k": found["1k"]["mib"],
        "resident_mib_1m": found["1m"]["mib"],
        **{f"rate_{name}": value for name, value in rate.items()},
    }
    print(json.dumps({k: v and round(v, 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
