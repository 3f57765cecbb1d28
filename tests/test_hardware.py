import re

import jax
import pytest

from hqclip_jax.config import ConfigError
from hqclip_jax.hardware import CHIPS, chip_of, topology_devices
from hqclip_jax.progress import utilisation


@pytest.mark.parametrize(
    ("name", "chips"),
    [("v5e:16x16", 256), ("v4:4x4x4", 64), ("v5p:2x4x4", 32), ("v6e:2x2", 4)],
)
def test_a_device_of_a_topology_is_a_chip_of_the_table(name, chips):
    devices = topology_devices(name)
    assert len(devices) == chips
    assert chip_of(devices[0]).name == name.partition(":")[0]


def test_slices_multiply_and_are_told_apart():
    devices = topology_devices("v5e:4x4", slices=2)
    assert len(devices) == 32
    assert {device.slice_index for device in devices} == {0, 1}


def test_a_trace_can_be_taken_where_the_compiler_for_tpus_is_loaded(tmp_path):
    topology_devices("v5e:2x2")
    with jax.profiler.trace(tmp_path):  # a libtpu that is not this JAX's own ends the process here
        jax.block_until_ready(jax.numpy.zeros(1))
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:3x5", "8xH100"])
def test_an_unknown_topology_is_refused_with_what_is_known(name):
    with pytest.raises(ConfigError, match=re.escape(f"--topology={name}")):
        topology_devices(name)


def test_a_gpu_is_known_by_what_its_name_holds_and_a_cpu_has_no_peak():
    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H200"

    assert chip_of(Gpu()).name == "H200"
    assert chip_of(jax.devices()[0]) is None
    assert len({chip.kind for chip in CHIPS}) == len(CHIPS)


def test_utilisation_is_the_share_of_the_peak_of_all_chips():
    chips = topology_devices("v5e:2x2")
    found = utilisation(4 * 197e12, 2.0, chips)
    assert found == pytest.approx({"tflops_per_chip": 98.5, "mfu": 0.5})
    assert "mfu" not in utilisation(1e9, 1.0, jax.devices())
