"""The house convolution and its derivatives of first and second order against `lax`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import convolution
from dememo_jax.errors import BadInput

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 7, 6, 3)).astype(np.float32)
KERNEL = RANDOM.normal(size=(3, 2, 3, 4)).astype(np.float32)
TANGENTS = tuple(RANDOM.normal(size=a.shape).astype(np.float32) for a in (X, KERNEL))
NHWC = ("NHWC", "HWIO", "NHWC")


def reference(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strides", "padding"),
    [
        ((1, 1), "SAME"),
        ((2, 2), "SAME"),
        ((1, 1), "VALID"),
        ((2, 2), "VALID"),
        ((2, 1), ((1, 1), (2, 0))),
    ],
)
def test_values_and_derivatives(strides, padding):
    assert jax.default_backend() == "cpu"  # else this compares lax with itself

    def everything(conv):
        def energy(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, strides, padding)))

        def of(x, kernel, tangents):
            value, turned = jax.jvp(lambda a, b: conv(a, b, strides, padding), (x, kernel), tangents)
            # forward over reverse: gradient and Hessian-vector product
            gradient, product = jax.jvp(jax.grad(energy, argnums=(0, 1)), (x, kernel), tangents)
            return value, turned, gradient, product

        return jax.jit(of)(X, KERNEL, TANGENTS)

    close(everything(convolution.conv), everything(reference))


def test_value_by_hand():
    x, kernel = X.astype(np.float64), KERNEL.astype(np.float64)
    expected = np.zeros((2, 3, 3, 4))
    for i in range(3):  # a window of 3 x 2, strides 2, no padding
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2]
            expected[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    close(convolution.conv(X, KERNEL, (2, 2), "VALID"), expected)


def test_under_vmap_over_kernels_and_images_and_inside_scan():
    def each(conv):
        def energy(kernel, x):
            return jnp.sum(conv(x, kernel, (2, 2), "SAME") ** 2)

        def descend(kernel, x):
            return kernel - 1e-3 * jax.grad(energy)(kernel, x), energy(kernel, x)

        def of(kernels, images):
            both = jax.vmap(jax.grad(energy))(kernels, images)
            shared = jax.vmap(jax.grad(energy), in_axes=(0, None))(kernels, images[0])
            return both, shared, jax.lax.scan(descend, kernels[0], images)

        return jax.jit(of)(np.stack([KERNEL, -0.5 * KERNEL, KERNEL + 1]), np.stack([X, 2 * X, X - 1]))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-2), each(convolution.conv), each(reference))


def test_only_the_cpu_gets_the_derivative_of_patches(monkeypatch):
    def program():
        return str(jax.make_jaxpr(lambda x: convolution.conv(x, KERNEL, (1, 1), "SAME"))(X))

    assert "image_convolution" in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "image_convolution" not in program()


# --- Winograd -----------------------------------------------------------------------------------------------------


def images(count, height, width, channels, features):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, height, width, channels)).astype(np.float32)
    return x, (random.normal(size=(3, 3, channels, features)) / np.sqrt(9 * channels)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "height", "width", "channels", "features"),
    [
        (1, 8, 8, 32, 32),  # less than a block
        (9, 32, 32, 32, 48),  # a block of eight images and one over
        (8, 32, 32, 64, 32),
        (5, 64, 64, 3, 5),  # blocks of two
        (2, 128, 96, 4, 2),  # an image is more than a block
        (3, 2, 4, 40, 33),
    ],
)
def test_winograd_is_the_convolution(count, height, width, channels, features):
    x, kernel = images(count, height, width, channels, features)
    found, expected = jax.jit(convolution.winograd)(x, kernel), reference(x, kernel, (1, 1), "SAME")
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_winograd_by_hand():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    kernel = np.float32([[0, 1, 0], [0, 0, 2], [0, 0, 0]]).reshape(3, 3, 1, 1)
    padded = np.pad(x[0, :, :, 0], 1)
    expected = padded[:4, 1:5] + 2 * padded[1:5, 2:6]  # the pixel above, and twice the one to the right
    np.testing.assert_allclose(convolution.winograd(x, kernel)[0, :, :, 0], expected, atol=1e-5)


def watched(monkeypatch):
    calls = []
    true = convolution.winograd
    monkeypatch.setattr(convolution, "winograd", lambda x, *rest: calls.append(x.shape) or true(x, *rest))
    return calls


@pytest.mark.slow
def test_derivatives_through_winograd(monkeypatch):
    calls = watched(monkeypatch)
    x, kernel = images(9, 32, 32, 32, 40)

    def everything(conv):
        def energy(x, kernel):
            return jnp.mean(jnp.sin(conv(x, kernel, (1, 1), "SAME")))

        slopes = jax.grad(energy, argnums=(0, 1))
        turned = jax.jvp(lambda kernel: slopes(x, kernel)[1], (kernel,), (kernel[::-1],))[1]
        return *slopes(x, kernel), turned

    found, expected = everything(convolution.conv), everything(reference)
    assert calls
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


DISPATCH = [
    ("yes", (8, 32, 32, 32), (3, 3, 32, 32), (1, 1), "SAME"),
    ("yes", (8, 32, 32, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1))),
    ("yes", (32, 16, 16, 48), (3, 3, 48, 32), (1, 1), "SAME"),
    ("few images", (7, 32, 32, 32), (3, 3, 32, 32), (1, 1), "SAME"),
    ("odd sides", (9, 31, 32, 32), (3, 3, 32, 32), (1, 1), "SAME"),
    ("odd sides", (9, 32, 31, 32), (3, 3, 32, 32), (1, 1), "SAME"),
    ("three channels", (8, 32, 32, 3), (3, 3, 3, 32), (1, 1), "SAME"),
    ("many channels", (8, 32, 32, 65), (3, 3, 65, 32), (1, 1), "SAME"),
    ("few features", (8, 32, 32, 32), (3, 3, 32, 31), (1, 1), "SAME"),
    ("many features", (8, 32, 32, 32), (3, 3, 32, 128), (1, 1), "SAME"),
    ("strides", (8, 32, 32, 32), (3, 3, 32, 32), (2, 2), "SAME"),
    ("strides", (8, 32, 32, 32), (3, 3, 32, 32), (1, 2), ((1, 1), (1, 1))),
    ("no padding", (8, 34, 34, 32), (3, 3, 32, 32), (1, 1), "VALID"),
    ("padding", (8, 32, 32, 32), (3, 3, 32, 32), (1, 1), ((2, 0), (1, 1))),
    ("window", (8, 32, 32, 32), (1, 1, 32, 32), (1, 1), "SAME"),
    ("window", (8, 32, 32, 32), (3, 2, 32, 32), (1, 1), ((1, 1), (1, 1))),
]


@pytest.mark.parametrize(("why", "x", "kernel", "strides", "padding"), DISPATCH)
def test_winograd_only_where_it_pays(monkeypatch, why, x, kernel, strides, padding):
    calls = watched(monkeypatch)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel)]
    shapes = [jax.eval_shape(lambda *a, of=of: of(*a, strides, padding), *given).shape for of in (convolution.conv, reference)]
    assert shapes[0] == shapes[1]
    jax.jit(lambda *a: convolution.conv(*a, strides, padding)).lower(*given)  # what is lowered is what runs
    assert bool(calls) == (why == "yes")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls.clear()
    jax.jit(lambda *a: convolution.conv(*a, strides, padding)).lower(*given)
    assert not calls


def test_as_a_layer_of_flax():
    arguments = {"features": 4, "kernel_size": (3, 2), "strides": 2}
    ours, theirs = nn.Conv(**arguments, conv_general_dilated=convolution.conv), nn.Conv(**arguments)
    variables = {"params": {"kernel": KERNEL, "bias": np.arange(4, dtype=np.float32)}}
    close(*jax.jit(lambda *given: (ours.apply(*given), theirs.apply(*given)))(variables, X))


@pytest.mark.parametrize("how", [{"lhs_dilation": (2, 1)}, {"rhs_dilation": (1, 2)}, {"feature_group_count": 3}])
def test_dilation_and_groups_are_refused(how):
    with pytest.raises(BadInput, match="dilation nor groups"):
        convolution.conv(X, KERNEL, (1, 1), "SAME", **how)


def test_images_without_a_batch_are_refused():
    with pytest.raises(BadInput, match="B, H, W, C"):
        convolution.conv(X[0], KERNEL, (1, 1), "SAME")
