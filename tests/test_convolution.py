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

    assert "custom_jvp" in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "custom_jvp" not in program()


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
