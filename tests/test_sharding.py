import jax
import jax.numpy as jnp
import pytest

from hqclip_jax.config import ConfigError, MeshConfig
from hqclip_jax.sharding import P, bytes_per_device, make_mesh, tree_shardings


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


def test_rules_split_parameters_and_their_moments_alike():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), batch=8)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {
        "visual": {"transformer": {"blocks": {
            "qkv": {"kernel": shape(4, 8, 3, 2, 4), "bias": shape(4, 3, 2, 4)},
            "ln_1": {"scale": shape(4, 8)},
        }}},
        "text": {"token_embedding": shape(50, 8)},
        "tag_head": {"kernel": shape(8, 7)},
        "logit_scale": shape(),
    }  # fmt: skip
    found = tree_shardings({"params": params, "mu": params}, mesh)
    for part in found.values():
        blocks = part["visual"]["transformer"]["blocks"]
        assert blocks["qkv"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
        assert blocks["qkv"]["bias"].spec == P(None, None, "tensor", None)
        assert blocks["ln_1"]["scale"].spec == P()
        assert part["text"]["token_embedding"].spec == P("tensor", "fsdp")
        assert part["tag_head"]["kernel"].spec == P("fsdp", None)  # 7 classes don't split in two
        assert part["logit_scale"].spec == P()
    # 768·4 bytes of kernel in four parts, 96·4 of bias in two, the rest by hand likewise.
    expected = 4 * (768 // 4 + 96 // 2 + 32 + 400 // 4 + 56 // 2 + 1)
    assert bytes_per_device(params, mesh) == expected
