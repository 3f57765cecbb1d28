import jax
import numpy as np
import pytest

from hqclip_jax.config import MeshConfig
from hqclip_jax.evals import logistic
from hqclip_jax.evals.logistic import Regression
from hqclip_jax.sharding import make_mesh

CLASSES, WIDTH = 81, 512


def mixture(n, classes=CLASSES, width=WIDTH, seed=0):
    """Unit vectors in a narrow cone, as CLIP's are, about one centre for each class."""
    rng = np.random.default_rng(seed)
    centres = 3 + rng.normal(size=(classes, width))
    labels = np.arange(n) % classes
    z = centres[labels] + 5 * rng.normal(size=(n, width))
    z = z.astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels


def gradient_at(classifier, z, labels, penalty, classes):
    """In f64, of the sum over rows, by numpy: what the solver's own figure does not decide."""
    logits = z.astype(np.float64) @ classifier.weight_DxC + classifier.bias_C
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(z)), labels] -= 1
    return z.T @ error + penalty * classifier.weight_DxC, error.sum(axis=0)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_equals_scikit_learn(mesh, penalty):
    sklearn = pytest.importorskip("sklearn.linear_model")
    threads = pytest.importorskip("threadpoolctl")
    z, labels = mixture(1600)
    z, labels, z_test, labels_test = z[:800], labels[:800], z[800:], labels[800:]
    found = Regression(z, labels, CLASSES, mesh).fit(penalty)
    with threads.threadpool_limits(1):  # more of them would wait for one another on busy cores
        peer = sklearn.LogisticRegression(C=1 / penalty, tol=1e-7, max_iter=1000).fit(z, labels)
    accuracy = (found.logits(z_test).argmax(axis=1) == labels_test).mean()
    assert 0.2 < accuracy < 0.98
    assert accuracy == pytest.approx(peer.score(z_test, labels_test), abs=0.002)
    np.testing.assert_allclose(found.weight_DxC, peer.coef_.T, atol=0.02 * abs(peer.coef_).max())


def test_gradient_at_the_optimum_vanishes(mesh):
    z, labels = mixture(203, 7, 32)
    found = Regression(z, labels, 7, mesh).fit(0.1)
    assert found.converged
    assert 0 < found.steps < logistic.MAX_STEPS
    weight, bias = gradient_at(found, z, labels, 0.1, 7)
    none = logistic.Classifier(np.zeros((32, 7)), np.zeros(7), 1.0, 0)
    # Of the centred features: a common part of all rows is the bias's, which the centring frees.
    weight_0, bias_0 = gradient_at(none, z - z.mean(axis=0), labels, 0.1, 7)
    assert np.linalg.norm(weight) < 2e-3 * np.linalg.norm(weight_0)
    assert np.linalg.norm(bias) < 2e-3 * max(np.linalg.norm(bias_0), np.linalg.norm(weight_0))
    loose = Regression(z, labels, 7, mesh).fit(0.1, tolerance=0.1)
    assert loose.steps < found.steps
    assert not loose.converged


def test_devices_chunks_and_the_start_change_nothing(mesh, monkeypatch):
    """203 rows are a multiple of nothing: the rows that fill up must not count."""
    z, labels = mixture(203, 7, 32)
    one = make_mesh(MeshConfig(), 1, jax.devices()[:1])
    whole = Regression(z, labels, 7, one).fit(0.1)
    far = Regression(z, labels, 7, one).fit(10.0)
    monkeypatch.setattr(logistic, "CHUNK_ELEMENTS", 7 * 5)
    chunked = Regression(z, labels, 7, mesh)
    assert chunked._z.shape[0] > 1
    expected = whole.logits(z)
    for found in (chunked.fit(0.1), chunked.fit(0.1, start=far), chunked.fit(0.1, start=whole)):
        np.testing.assert_allclose(found.logits(z), expected, atol=0.02 * abs(expected).max())
    assert chunked.fit(0.1, start=whole).steps <= 2


@pytest.mark.parametrize("penalty", [1e6, 1e3, 1e-6])
def test_no_penalty_of_the_search_takes_long(mesh, penalty):
    """Without units of its own for the weight, L-BFGS does not reach the end at 10⁶ in 1,000."""
    z, labels = mixture(203, 7, 32)
    regression = Regression(z, labels[::-1] // 2, 7, mesh)
    found = regression.fit(penalty)
    assert found.converged
    assert found.steps < 100


def test_ends_where_f32_says_no_more(mesh):
    """Two points that are two classes: the loss has no digits left before the gradient is small."""
    z, labels = np.eye(2, 3, dtype=np.float32)[np.arange(18) % 2], np.arange(18) % 2
    found = Regression(z, labels, 2, mesh).fit(1e-6)
    assert found.steps < 60
    assert (found.logits(z).argmax(axis=1) == labels).all()


def test_features_of_a_model_that_maps_all_to_one_point(mesh):
    labels = np.array([0, 1, 1, 2, 1, 0])
    for own in (labels, np.arange(6) % 3):
        found = Regression(np.ones((6, 4), np.float32) / 2, own, 3, mesh).fit(1.0)
        logits = found.logits(np.ones((1, 4), np.float32) / 2)
        np.testing.assert_allclose(jax.nn.softmax(logits)[0], np.bincount(own) / 6, atol=1e-3)


def test_values_that_are_not_finite_are_refused(mesh):
    z, labels = mixture(40, 3, 8)
    z[3, 3] = np.nan
    with pytest.raises(FloatingPointError, match="gradient is nan at penalty 1"):
        Regression(z, labels, 3, mesh).fit(1.0)


def test_steps_end(mesh, monkeypatch):
    monkeypatch.setattr(logistic, "MAX_STEPS", 3)
    z, labels = mixture(101, 3, 16)
    found = Regression(z, labels, 3, mesh).fit(1e-6)
    assert (found.steps, found.converged) == (3, False)
