"""python refine/cpu_env.py: lets torchvision be imported beside a torch that was built for CPUs.

torchvision's wheel is linked to CUDA. Beside a CPU build of torch its operators do not load, and
its import fails where it refers to two of them, though no model here uses either. This declares
the two by name before torchvision loads. The script puts a copy of itself into the environment,
where a .pth file arms it at the start of every process, those that an engine spawns among them; in
an environment whose torchvision works it changes nothing.
"""

import sys

NAME = "torchvision_on_cpu"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare:
    """Finds nothing: declares the operators when torchvision is first asked for. Lazy, because it
    takes torch, and most processes need neither."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


def arm() -> None:
    sys.meta_path.insert(0, Declare())


def declare() -> None:
    """Declares the operators, unless torch was built for a GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        declare.library = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as we do
        for schema in SCHEMAS:
            declare.library.define(schema)


def needed() -> bool:
    """Whether torchvision is installed here and fails for want of its operators."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True
    )
    return "operator torchvision::nms does not exist" in done.stderr


def main() -> int:
    import shutil
    import sysconfig
    from pathlib import Path

    if not needed():
        print("torchvision needs no help in this environment")
        return 0
    site = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site / f"{NAME}.py")
    (site / f"{NAME}.pth").write_text(f"import {NAME}; {NAME}.arm()\n")
    if needed():
        print(f"torchvision still fails to import with {site / NAME}.pth", file=sys.stderr)
        return 1
    print(f"torchvision works on the CPU by {site / NAME}.pth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
