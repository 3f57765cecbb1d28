import jax
import pytest
from flax import nnx

from hqclip_jax.config import MeshConfig
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.sharding import make_mesh

from .colours import ColourModel, ColourTokenizer


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    n = len(jax.devices())
    return make_mesh(MeshConfig(fsdp=2 if n % 2 == 0 else 1), batch=n)


@pytest.fixture
def embedder(mesh: jax.sharding.Mesh) -> Embedder:
    graphdef, state = nnx.split(ColourModel(), nnx.Param)
    params = nnx.to_pure_dict(state)
    return Embedder(graphdef, params, ColourTokenizer(), 16, mesh, batch=4, threads=2)
