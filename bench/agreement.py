"""Does CLIP_benchmark, with OpenCLIP's model, score an exported checkpoint as `evaluate` does?

    python -m bench.agreement --checkpoint=runs/grocery --data=DIR

DIR holds `grocery/zeroshot` in CLIP_benchmark's layout, `coco_ccby/00000.tar` (photos with several
captions) and `coco_ccby/sugarcrepe_ccby.json`. The checkpoint is exported to OpenCLIP's format, and
scored by OpenCLIP's loader, preprocessing and tokenizer with CLIP_benchmark's data sets and metrics
(1.6.2, torch on the CPU) beside ours: how many pictures get another answer, how far are recalls?
Prints, last, one JSON object.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from hqclip_jax.evals.datasets import read_captioned
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.retrieval import Retrieval, retrieval_ranks
from hqclip_jax.evals.sugarcrepe import HardNegatives
from hqclip_jax.evals.zeroshot import ZeroShot
from hqclip_jax.export import export_checkpoint
from hqclip_jax.restore import find, restore_model
from tests.models import torch_peers  # makes torchvision importable beside a torch for CPUs

BATCH = 64


class Theirs:
    """OpenCLIP's model of an exported folder, and CLIP_benchmark's ways with it."""

    def __init__(self, exported: Path) -> None:
        import open_clip

        name = f"local-dir:{exported}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def zero_shot(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Logits [n, C] and labels [n]."""
        from clip_benchmark.datasets.builder import build_dataset
        from clip_benchmark.metrics.zeroshot_classification import (
            run_classification,
            zero_shot_classifier,
        )

        data = build_dataset("wds/ours", root=str(folder), transform=self.transform, split="test")
        classifier = zero_shot_classifier(
            self.model, self.tokenizer, data.classes, data.templates, "cpu", amp=False
        )
        loader = torch_peers.torch.utils.data.DataLoader(data.batched(BATCH), batch_size=None)
        logits, labels = run_classification(self.model, classifier, loader, "cpu", amp=False)
        return logits.numpy(), labels.numpy()

    def retrieval(self, folder: Path, ks: list[int]) -> dict[str, float]:
        from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
        from clip_benchmark.metrics.zeroshot_retrieval import evaluate

        data = build_dataset(
            "wds/ours", root=str(folder), transform=self.transform, split="test",
            task="zeroshot_retrieval",
        )  # fmt: skip
        batches = data.batched(BATCH, collation_fn=image_captions_collate_fn)
        loader = torch_peers.torch.utils.data.DataLoader(batches, batch_size=None)
        return evaluate(self.model, loader, self.tokenizer, "cpu", False, ks)

    def sugarcrepe(self, images: Path, items: Path) -> float:
        """Accuracy over the items of a file."""
        from clip_benchmark.datasets.builder import image_captions_collate_fn
        from clip_benchmark.datasets.sugar_crepe import SugarCrepe
        from clip_benchmark.metrics.image_caption_selection import evaluate

        data = SugarCrepe(str(images), str(items), self.transform)
        loader = torch_peers.torch.utils.data.DataLoader(
            data, BATCH, collate_fn=image_captions_collate_fn
        )
        return evaluate(self.model, loader, self.tokenizer, "cpu", amp=False)["text_acc"]


def compare_zero_shot(ours: Embedder, theirs: Theirs, folder: Path) -> dict[str, float]:
    outcome = ZeroShot("grocery", folder).run(ours)
    logits, labels = theirs.zero_shot(folder)
    order = np.argsort(-logits, axis=1, kind="stable")
    figures = {"images": len(labels), "top1": outcome.scores["top1"]}
    for k in (1, 5):
        right = (order[:, :k] == labels[:, None]).any(axis=1)
        other = right != outcome.items[f"top{k}"].values.astype(bool)
        figures[f"top{k}_other_answers"] = int(other.sum())
    return figures


def compare_retrieval(ours: Embedder, theirs: Theirs, tar: Path, scratch: Path) -> dict[str, float]:
    """Recalls at every k, which say as much as all ranks."""
    examples = [*read_captioned(tar, Skips())]
    _as_webdataset(scratch, [(e.image, "\n".join(e.captions)) for e in examples])
    zimg = np.concatenate([z for _, z in ours.images(examples)])
    captions = [e.captions for e in examples]
    ztxt = ours.texts([c for each in captions for c in each])
    owner = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
    ways = retrieval_ranks(zimg, ztxt, owner)
    ks = [*range(1, len(zimg) + 1)]
    found = theirs.retrieval(scratch, ks)
    gaps = [
        abs(found[f"{way}_recall@{k}"] - (ranks < k).mean())
        for way, (ranks, _) in ways.items()
        for k in ks
    ]
    scores = Retrieval("coco", tar).run(ours).scores
    return {
        "recalls_compared": len(gaps),
        "largest_recall_gap": float(max(gaps)),
        "image_retrieval_recall_at_1": scores["image_retrieval_recall_at_1"],
    }


def _as_webdataset(folder: Path, samples: list[tuple[bytes, str]]) -> None:
    from tests.evals.colours import write_tar

    members: dict[str, bytes | str] = {}
    for i, (image, text) in enumerate(samples):
        members |= {f"{i:05}.jpg": image, f"{i:05}.txt": text}
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")


def compare_sugarcrepe(ours: Embedder, theirs: Theirs, data: Path, scratch: Path) -> dict:
    items, images = data / "sugarcrepe_ccby.json", data / "00000.tar"
    crepe = HardNegatives("crepe", items, images)
    scores = crepe.run(ours).scores
    by_category = defaultdict(dict)
    for i, item in enumerate(json.loads(items.read_text())):
        by_category[item["category"]][str(i)] = item
    scratch.mkdir()
    for example in crepe.examples(Skips()):
        stem = example.source.rpartition(":")[2]
        (scratch / stem).with_suffix(".jpg").write_bytes(example.image)
    gaps = []
    for category, own in by_category.items():
        file = scratch / f"{category}.json"
        file.write_text(json.dumps(own))
        gaps.append(abs(theirs.sugarcrepe(scratch, file) - scores[f"accuracy/{category}"]))
    return {"items": scores["n"], "accuracy": scores["accuracy"], "largest_gap": max(gaps)}


def agreement(checkpoint: str | Path, data: Path) -> dict[str, dict[str, float]]:
    """Ours beside theirs on the three sets."""
    jax.config.update("jax_default_matmul_precision", "highest")
    restored = restore_model(checkpoint)
    ours = Embedder(
        restored.model, restored.params, restored.tokenizer, restored.config.model.image_size,
        restored.mesh, BATCH,
    )  # fmt: skip
    with TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        export_checkpoint(find(checkpoint), "open_clip", scratch / "exported")
        theirs = Theirs(scratch / "exported")
        return {
            "zero_shot": compare_zero_shot(ours, theirs, data / "grocery" / "zeroshot"),
            "retrieval": compare_retrieval(
                ours, theirs, data / "coco_ccby" / "00000.tar", scratch / "retrieval"
            ),
            "sugarcrepe": compare_sugarcrepe(
                ours, theirs, data / "coco_ccby", scratch / "sugarcrepe"
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=Path)
    args = parser.parse_args()
    print(json.dumps(agreement(args.checkpoint, args.data)))


if __name__ == "__main__":
    main()
