from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from hqclip_jax.config import ConfigError, MeshConfig
from hqclip_jax.hardware import topology_devices
from hqclip_jax.sharding import (
    P,
    bytes_per_device,
    gathered,
    make_mesh,
    reader,
    replicated,
    rows_split,
    tree_shardings,
)


def test_replica_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), batch=8)
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}


def test_bad_factorisation_is_refused_with_sizes_that_work():
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=3.*make 8 devices.*fsdp=4 tensor=1"):
        make_mesh(MeshConfig(fsdp=3), batch=24)
    with pytest.raises(ConfigError, match="make 8 devices"):
        make_mesh(MeshConfig(replica=2, fsdp=2), batch=24)


def test_batch_that_does_not_split_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"optim\.batch=12 is not divisible.*= 8: try 8 or 16"):
        make_mesh(MeshConfig(), batch=12)
    with pytest.raises(ConfigError, match=r"try 8$"):
        make_mesh(MeshConfig(), batch=3)


@dataclass(frozen=True)
class Device:
    """Of another process, perhaps; what a mesh needs of one."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = ""


@pytest.mark.parametrize(
    ("per_process", "tensor", "expected"),
    [(1, 1, (0, 8)), (4, 2, (0, 2)), (4, 4, (0, 2)), (1, 2, (0, 4)), (2, 8, (0, 1))],
)
def test_processes_that_share_layers_read_the_same_rows(per_process, tensor, expected, monkeypatch):
    devices = [Device(i, i // per_process) for i in range(8)]
    mesh = make_mesh(MeshConfig(tensor=tensor), 8, devices)
    assert reader(mesh) == expected
    monkeypatch.setattr(jax, "process_index", lambda: 7 // per_process)
    assert reader(mesh) == (expected[1] - 1, expected[1])


def test_a_mesh_that_splits_rows_unevenly_among_processes_is_refused():
    devices = [Device(i, i // 3) for i in range(6)]
    with pytest.raises(ConfigError, match=r"mesh\.tensor=2 shares the rows .* among 2 processes"):
        reader(make_mesh(MeshConfig(tensor=2), 6, devices))


def test_on_gpus_a_copy_may_span_nodes():
    devices = [Device(i, i // 4, slice_index=i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(fsdp=8), 8, devices)
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_rules_split_parameters_and_their_moments_alike():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), batch=8)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {
        "visual": {"transformer": {"blocks": {
            "qkv": {"kernel": shape(4, 8, 3, 8), "bias": shape(4, 3, 8)},
            "ln_1": {"scale": shape(4, 8)},
        }}},
        "text": {"token_embedding": shape(50, 8)},
        "tag_head": {"kernel": shape(8, 7)},
        "logit_scale": shape(),
    }  # fmt: skip
    found = tree_shardings({"params": params, "mu": params}, mesh)
    for part in found.values():
        blocks = part["visual"]["transformer"]["blocks"]
        assert blocks["qkv"]["kernel"].spec == P(None, "fsdp", None, "tensor")
        assert blocks["qkv"]["bias"].spec == P(None, None, "tensor")
        assert blocks["ln_1"]["scale"].spec == P()
        assert part["text"]["token_embedding"].spec == P("tensor", "fsdp")
        assert part["tag_head"]["kernel"].spec == P("fsdp", None)  # 7 classes don't split in two
        assert part["logit_scale"].spec == P()
    # 768·4 bytes of kernel in four parts, 96·4 of bias in two, the rest by hand likewise.
    expected = 4 * (768 // 4 + 96 // 2 + 32 + 400 // 4 + 56 // 2 + 1)
    assert bytes_per_device(params, mesh) == expected


def test_micro_batches_must_divide_each_device_s_share():
    with pytest.raises(ConfigError, match=r"optim\.micro_batches = 24: try 24 or 48"):
        make_mesh(MeshConfig(), batch=40, parts=3)
    assert make_mesh(MeshConfig(), batch=48, parts=3).size == 8


def test_each_slice_holds_whole_copies_of_the_model():
    devices = topology_devices("v5e:4x4", slices=2)
    mesh = make_mesh(MeshConfig(fsdp=8), 64, devices)
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 8, "tensor": 1}
    for copy in mesh.devices:
        assert len({device.slice_index for device in copy.flat}) == 1
    assert [copy.flat[0].slice_index for copy in mesh.devices] == [0, 0, 1, 1]


def test_a_copy_that_would_span_slices_is_refused():
    with pytest.raises(ConfigError, match=r"not divisible by the 2 slices.*16 devices of one"):
        make_mesh(MeshConfig(fsdp=32), 64, topology_devices("v5e:4x4", slices=2))


def test_any_factors_find_a_place_on_a_torus():
    mesh = make_mesh(MeshConfig(fsdp=16, tensor=2), 128, topology_devices("v5p:4x4x8"))
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 16, "tensor": 2}


def test_parameters_are_gathered_over_fsdp_and_stay_split_over_tensor():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), 8)
    kernel = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16)
    tree = {"mlp_in": {"kernel": kernel, "bias": jnp.ones(16)}}

    @jax.jit
    def use(tree):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gathered(tree, jnp.bfloat16, stack="blocks"), rows_split(
                tree["mlp_in"]["kernel"]
            )

    found, rows = use(jax.device_put(tree, replicated(mesh)))
    assert found["mlp_in"]["kernel"].sharding.spec == P(None, "tensor")
    assert found["mlp_in"]["kernel"].dtype == jnp.bfloat16
    assert found["mlp_in"]["bias"].dtype == jnp.float32  # never split over fsdp: as it was
    assert rows.sharding.spec == P(("replica", "fsdp"))
    assert (found["mlp_in"]["kernel"] == kernel).all()


def test_gradients_of_gathered_parameters_are_scattered_at_once():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), 8)

    @jax.jit
    def gradient(kernel, whole):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            use = lambda x: gathered({"mlp_in": {"kernel": x}}, jnp.bfloat16, stack="blocks")
            return jax.vjp(use, kernel)[1]({"mlp_in": {"kernel": whole}})[0]

    whole = jnp.arange(8 * 16, dtype=jnp.bfloat16).reshape(8, 16)
    found = gradient(*jax.device_put((jnp.ones((8, 16)), whole), replicated(mesh)))
    assert found.sharding.spec == P("fsdp", "tensor")
    assert found.dtype == jnp.float32
    assert (found == whole).all()


def test_without_a_mesh_nothing_is_constrained():
    tree = {"tag_head": {"kernel": jnp.ones((4, 4))}}
    assert gathered(tree, jnp.bfloat16) is tree
    assert rows_split(tree["tag_head"]["kernel"]) is tree["tag_head"]["kernel"]
