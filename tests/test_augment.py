"""Augmentations against every possible outcome, and their draws against uniform laws. Images are not square on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from dememo_jax import augment

KEY = jax.random.key(5)
H, W = 4, 8  # sides with a common divisor: one key for both would tie rows to columns
IMAGE = (1 + np.arange(H * W * 2, dtype=np.float32)).reshape(H, W, 2)  # every pixel its own value, none zero
BATCH = np.repeat(IMAGE[None], 800, axis=0)


def outcomes(images, candidates):
    """For every image the key of the candidate that it equals; KeyError if none."""
    table = {np.asarray(candidate, np.float32).tobytes(): name for name, candidate in candidates.items()}
    return [table[np.asarray(image).tobytes()] for image in images]


def test_crop_cuts_uniform_windows_of_the_padded_image():
    wide = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    windows = {5 * top + left: wide[top : top + H, left : left + W] for top in range(5) for left in range(5)}
    crop = jax.jit(augment.crop(2))
    found = outcomes(crop(KEY, BATCH), windows)
    assert stats.chisquare(np.bincount(found, minlength=25)).pvalue > 1e-3  # each of 25 windows about 32 times
    assert outcomes(crop(KEY, BATCH), windows) == found
    assert outcomes(crop(jax.random.key(6), BATCH), windows) != found


def test_flip_mirrors_left_and_right_as_often_as_asked():
    choices = {0: IMAGE, 1: IMAGE[:, ::-1]}
    flip = jax.jit(lambda probability: augment.flip(probability)(KEY, BATCH))
    for probability in (0.0, 0.2, 0.5, 1.0):
        found = outcomes(flip(probability), choices)
        assert abs(np.mean(found) - probability) <= 4 * np.sqrt(probability * (1 - probability) / len(BATCH))


def test_cutout_zeroes_one_square_with_a_uniform_centre():
    cutout = jax.jit(lambda side: augment.cutout(side)(KEY, BATCH))
    holes = {}
    for row in range(H):
        for column in range(W):
            hole = IMAGE.copy()
            hole[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0
            holes[row * W + column] = hole
    found = outcomes(cutout(3), holes)
    assert stats.chisquare(np.bincount(found, minlength=H * W)).pvalue > 1e-3
    images = np.asarray(cutout(2))  # an even side covers as many pixels
    rows, columns = (images == 0).any(axis=(2, 3)).sum(axis=1), (images == 0).any(axis=(1, 3)).sum(axis=1)
    assert rows.max() == columns.max() == 2
    assert rows.min() == columns.min() == 1  # hangs over the edge


def test_compose_goes_in_order_with_a_key_for_each():
    seen = []

    def part(function):
        return lambda key, x: (seen.append(jax.random.key_data(key)), function(x))[1]

    found = augment.compose(part(lambda x: x + 1), part(lambda x: 10 * x))(KEY, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(found, [20.0, 30.0])
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(augment.compose()(KEY, IMAGE), IMAGE)
