"""Chips: published peaks, and TPU topologies to compile for without having them."""

import os
from dataclasses import dataclass

import jax

from hqclip_jax.config import ConfigError


@dataclass(frozen=True)
class Chip:
    """One accelerator as its maker publishes it.

    Attributes:
        name: as people say it.
        kind: as JAX's `device_kind` says it: equal for TPUs, contained for GPUs.
        peak: dense bf16 FLOP/s.
        hbm: GiB that a program may use: where a TPU's compiler refuses, of GPUs as sold.
        link: bytes/s that it sends to its neighbours (ICI or NVLink), all links together, one way.
        network: bytes/s that it sends to other slices or nodes: of TPUs their share of a pod's
            published rate (v4's is not; v5p's), of GPUs what NVIDIA's own servers have.
        source: where the figures are published.
        clock: Hz of a TPU's cores, by which its peak is what its matrix units do in a cycle (our
            inference); 0 where nothing needs it.
    """

    name: str
    kind: str
    peak: float
    hbm: float
    link: float
    network: float
    source: str
    clock: float = 0.0


_TPU = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 30.75, 300e9, 6.25e9, _TPU + "v4", 1.05e9),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75, 200e9, 3.125e9, _TPU + "v5e", 1.5e9),
    Chip("v5p", "TPU v5", 459e12, 95.74, 600e9, 6.25e9, _TPU + "v5p", 1.75e9),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25, 400e9, 12.5e9, _TPU + "v6e", 1.75e9),
    Chip("A100", "A100", 312e12, 80, 300e9, 25e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    Chip("H100", "H100", 989e12, 80, 450e9, 50e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip(
        "H200", "H200", 989e12, 141, 450e9, 50e9, "https://www.nvidia.com/en-us/data-center/h200/"
    ),
    Chip(
        "B200", "B200", 2250e12, 180, 900e9, 50e9, "https://www.nvidia.com/en-us/data-center/hgx/"
    ),
)


_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a JAX device is, or None where its peak is not in the table, as for a CPU."""
    if device.platform == "tpu":
        return next((chip for chip in CHIPS if chip.kind == device.device_kind), None)
    return next((chip for chip in CHIPS if chip.kind in device.device_kind), None)


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU topology such as `v5e:16x16`, to compile for; none of it need exist.

    One device is one chip, on v4 too, where the two cores of a chip work as one (megacore).

    Args:
        name: generation and shape in chips.
        slices: how many of them, joined by the data-centre network.

    Raises:
        ConfigError: no such topology, or libtpu is not installed.
    """
    # Where there is no TPU, libtpu looks for one, complains, and locks itself against others.
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    known = [chip.name for chip in CHIPS if chip.kind.startswith("TPU")]
    generation, _, shape = name.partition(":")
    if generation not in known or not shape:
        raise ConfigError(
            f"--topology={name}: write a generation ({', '.join(known)}) and a shape in chips, "
            "such as v5e:16x16 or v4:4x4x4"
        )
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices, **options
        ).devices
    except ModuleNotFoundError as e:
        raise ConfigError(f"--topology={name} needs libtpu: pip install 'jax[tpu]'") from e
    except Exception as e:  # jaxlib's error type is no public name
        raise ConfigError(f"--topology={name}: {str(e).splitlines()[0]}") from e
