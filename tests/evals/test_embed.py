import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.embed import Embedder, EmbeddingError, Stopped
from hqclip_jax.evals.outcome import Skips

from .colours import COLOURS, ColourModel, ColourTokenizer, picture

UNIT = {name: np.array(c) / np.linalg.norm(c) for name, c in COLOURS.items()}


def examples(n):
    names = [[*COLOURS][i % len(COLOURS)] for i in range(n)]
    return names, (Example(f"tar:{i}", picture(name)) for i, name in enumerate(names))


@pytest.mark.parametrize("n", [1, 4, 9])  # batch 4: padded, whole, ragged
def test_images_come_in_order_with_their_embeddings(embedder, n):
    names, stream = examples(n)
    seen, rows = [], []
    for batch, z in embedder.images(stream):
        assert len(batch) == len(z) <= embedder.batch
        seen.extend(e.source for e in batch)
        rows.append(z)
    z = np.concatenate(rows)
    assert seen == [f"tar:{i}" for i in range(n)]
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, [UNIT[name] for name in names], atol=1e-6)


def test_texts_are_cleaned_and_equal_tokens_get_equal_bits(embedder):
    texts = ["red", "a  green&nbsp;thing", "red blue", "red blue yellow", "red"]
    z = embedder.texts(texts)
    both = np.array([1, 0, 1]) / np.sqrt(2)
    np.testing.assert_allclose(z, [UNIT["red"], UNIT["green"], both, both, UNIT["red"]], atol=1e-6)
    assert np.array_equal(z[2], z[3])
    assert np.array_equal(z[0], z[4])


def test_batch_is_rounded_up_to_the_mesh_and_compiled_once(mesh):
    graphdef, state = nnx.split(ColourModel(), nnx.Param)
    params = nnx.to_pure_dict(state)
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    embedder = Embedder(graphdef, params, ColourTokenizer(), 8, mesh, batch=rows + 1)
    assert embedder.batch == 2 * rows
    again = Embedder(graphdef, params, ColourTokenizer(), 8, mesh, batch=rows + 1)
    assert again._encode_image is embedder._encode_image
    before = embedder._encode_image._cache_size()
    for _, stream in (examples(3), examples(2 * embedder.batch + 1)):
        list(again.images(stream))
    assert embedder._encode_image._cache_size() == before + 1


def test_parameters_on_the_mesh_stay_where_they_are(mesh):
    graphdef, state = nnx.split(ColourModel(), nnx.Param)
    params = nnx.to_pure_dict(state)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    on_mesh = jax.device_put(params, sharding)
    embedder = Embedder(graphdef, on_mesh, ColourTokenizer(), 8, mesh)
    assert embedder._params["table"] is on_mesh["table"]
    host = Embedder(graphdef, {"table": np.asarray(params["table"])}, ColourTokenizer(), 8, mesh)
    assert host._params["table"].sharding.is_fully_replicated


def test_nothing_moves_implicitly(embedder):
    """Training runs under this guard, and evaluates in its loop."""
    _, stream = examples(5)
    with jax.transfer_guard("disallow"):
        assert sum(len(z) for _, z in embedder.images(stream)) == 5
        assert embedder.texts(["red", "blue"]).shape == (2, 3)


def test_progress_counts_rows_not_padding(embedder):
    counts = []
    embedder.on_embedded = counts.append
    list(embedder.images(examples(embedder.batch + 1)[1]))
    assert counts == [embedder.batch, 1]


def test_images_stream(embedder):
    """Never more than a few batches of images are held."""
    taken = 0

    def stream():
        nonlocal taken
        for example in examples(20 * embedder.batch)[1]:
            taken += 1
            yield example

    for done, _ in enumerate(embedder.images(stream()), start=1):
        assert taken <= (done + 4) * embedder.batch
        if done == 3:
            break
    assert done == 3


def test_broken_image_is_named_and_left_out(embedder):
    stream = [
        Example(f"a.tar:{name}", picture(colour)[:cut])
        for name, colour, cut in (("a", "red", None), ("bad", "red", 40), ("b", "blue", None))
    ] * 2  # more than a batch
    skips = Skips()
    found = [pair for batch in embedder.images(stream, skips) for pair in zip(*batch)]
    assert [e.source for e, _ in found] == ["a.tar:a", "a.tar:b"] * 2
    np.testing.assert_allclose([z for _, z in found], [UNIT["red"], UNIT["blue"]] * 2, atol=1e-6)
    assert skips.counts == {"image does not decode": 2}
    assert skips.names == {"image does not decode": ["a.tar:bad"] * 2}
    with pytest.raises(EvalDataError, match=r"a\.tar:bad does not decode"):
        list(embedder.images(stream))


def test_a_batch_of_broken_images_is_no_batch(embedder):
    stream = [Example("bad", b"")] * embedder.batch + [Example("good", picture("red"))]
    assert [len(z) for _, z in embedder.images(stream, Skips())] == [1]


def test_asked_to_stop_between_batches(embedder):
    embedder.stop = lambda: seen >= 2
    seen = 0
    with pytest.raises(Stopped):
        for _ in embedder.images(examples(9 * embedder.batch)[1]):
            seen += 1
    assert 2 <= seen <= 3
    with pytest.raises(Stopped):
        embedder.texts(["red"])


def test_diverged_model_is_refused(mesh):
    graphdef, state = nnx.split(ColourModel(), nnx.Param)
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), nnx.to_pure_dict(state))
    embedder = Embedder(graphdef, params, ColourTokenizer(), 8, mesh)
    with pytest.raises(EmbeddingError, match="not finite"):
        embedder.texts(["red"])


HOST = """
import sys
import jax
from flax import nnx
from evals.colours import ColourModel, ColourTokenizer, picture
from hqclip_jax.config import MeshConfig
from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.embed import Embedder, Stopped
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.sharding import make_mesh

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
graphdef, state = nnx.split(ColourModel(), nnx.Param)
mesh = make_mesh(MeshConfig(**{sys.argv[3]: int(sys.argv[4])}), 4)
embedder = Embedder(graphdef, nnx.to_pure_dict(state), ColourTokenizer(), 8, mesh, batch=4)
names = ["red", "green", "blue", "yellow", "cyan"]
decoded, decode = [], embedder._decode
embedder._decode = lambda e: decoded.append(e.source) or decode(e)
skips = Skips()
stream = [Example(n, picture(n)) for n in names]
stream[1:1] = [Example("bad", b"")]
z = [row for _, z in embedder.images(stream, skips) for row in z.tolist()]
assert len(z) == 5, z
assert skips.names == {"image does not decode": ["bad"]}
error = abs(embedder.texts(names) - z).max()
embedder._decode = decode
first = int(sys.argv[2]) == 0
for readable in (0, 1, 4, 6, 8):  # at each place relative to the batches
    def cut():
        for i in range(8):
            if first and i == readable:
                raise OSError("gone")
            yield stream[2]
        if first and readable == 8:
            raise OSError("gone")
    try:
        list(embedder.images(cut(), skips))
    except (OSError, EvalDataError) as e:
        print("after", readable, e)
    assert abs(embedder.texts(names) - z).max() < 1e-6  # hosts are at one place again
try:
    list(embedder.images(stream[first:], skips))
except EvalDataError as e:
    print(str(e)[:36])
try:
    list(embedder.images(stream[2:] + [stream[2]] * first, skips))  # a batch more on one host
except EvalDataError as e:
    print("more:", str(e)[:36])
embedder.stop = lambda: first  # one host alone
try:
    embedder.texts(names)
except Stopped:
    print("stopped")
print("decoded", sorted(decoded))
print("devices", jax.device_count(), "error below 1e-6:", error < 1e-6)
"""


EVERY = ["bad", "blue", "cyan", "green", "red", "yellow"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, size, decoded",
    [
        ("fsdp", 2, (["bad", "cyan", "red", "yellow"], ["blue", "green"])),  # two rows a host
        ("tensor", 4, (EVERY, EVERY)),  # hosts that hold the same rows
    ],
)
def test_two_hosts_get_all_rows(axis, size, decoded):
    """Each of two processes, with two devices each, decodes its own rows and reads every embedding,
    and leaves out and stops at what one of them meets."""
    tests = Path(__file__).parents[1]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(i), axis, str(size)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    failures = "gone", "another host could not read the set"
    for host, own, failure in zip(hosts, decoded, failures):
        out, err = host.communicate(timeout=100)
        assert host.returncode == 0, err
        assert "devices 4 error below 1e-6: True" in out
        assert f"decoded {own}" in out
        for readable in (0, 1, 4, 6, 8):
            assert f"after {readable} {failure}" in out
        assert "stopped" in out
        assert "\nthe hosts read different pictures: " in out
        assert "\nmore: the hosts read different pictures: " in out
