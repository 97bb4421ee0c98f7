"""Augmentations against every possible outcome, and their draws against uniform laws. Images are not square on purpose."""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import some
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats
from sklearn.datasets import load_digits

from dememo_jax import augment
from dememo_jax.augment import colour, compression, geometry, plasma, recipes
from dememo_jax.errors import BadInput

KEY = jax.random.key(5, impl="rbg")  # compiles several times faster
H, W = 4, 8  # sides with a common divisor: one key for both would tie rows to columns
IMAGE = (1 + np.arange(H * W * 2, dtype=np.float32)).reshape(H, W, 2)  # every pixel its own value, none zero
BATCH = np.repeat(IMAGE[None], 800, axis=0)


def outcomes(images, candidates):
    """For every image the key of the candidate that it equals; KeyError if none."""
    table = {np.asarray(candidate, np.float32).tobytes(): name for name, candidate in candidates.items()}
    return [table[np.asarray(image).tobytes()] for image in images]


@pytest.mark.slow
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


# --- geometry ----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 7, 10, 3)).astype(np.uint8)
RGB = np.asarray(BYTES / 255, np.float32)
GREY = RGB[..., :1]


def read(image, rows, columns):
    """Bilinear reading by SciPy at places [2 grids]; zeros outside, fading over one pixel."""
    wide = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    places = np.stack([np.clip(rows, -2, image.shape[0] + 1), np.clip(columns, -2, image.shape[1] + 1)]) + 3
    return np.stack([ndimage.map_coordinates(wide[..., c], places, order=1) for c in range(image.shape[-1])], -1)


def test_affine_reads_as_scipy_does():
    matrix = RNG.normal(size=(6, 2, 2)).astype(np.float32)
    offset = RNG.normal(0, 3, (6, 2)).astype(np.float32)
    found = jax.jit(geometry.affine)(RGB, matrix, offset)
    grid = np.stack(np.meshgrid(np.arange(7) - 3.0, np.arange(10) - 4.5, indexing="ij"))
    for i in range(6):
        rows, columns = np.einsum("ij,jhw->ihw", matrix[i], grid) + offset[i][:, None, None]
        np.testing.assert_allclose(found[i], read(RGB[i], rows + 3, columns + 4.5), atol=2e-5)


def test_rotation_turns_counter_clockwise_by_uniform_angles():
    quarter = geometry.affine(RGB[:, :, :7], *geometry.turn(jnp.full(6, jnp.pi / 2)))
    np.testing.assert_allclose(quarter, np.rot90(RGB[:, :, :7], axes=(1, 2)), atol=1e-5)
    # the centre of mass of a blob to the right of the centre tells the angle
    across, down = np.meshgrid(np.arange(41) - 20.0, np.arange(41) - 20.0)
    blob = np.exp(-((across - 10) ** 2 + down**2) / 8).astype(np.float32)
    turned = np.asarray(jax.jit(augment.rotation(30))(KEY, np.repeat(blob[None, ..., None], 300, 0)))[..., 0]
    angle = np.rad2deg(np.arctan2(-(turned * down).sum((1, 2)), (turned * across).sum((1, 2))))
    assert stats.kstest(angle, stats.uniform(-30, 60).cdf).pvalue > 1e-3
    assert 29 < np.abs(angle).max() < 30.1


def test_shift_translates_by_uniform_real_amounts():
    ramp = np.stack(np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij"), -1).astype(np.float32)
    moved = np.asarray(augment.shift(2.5)(KEY, np.repeat(ramp[None], 400, 0)))
    amount = moved[:, 10, 15] - ramp[10, 15]
    for axis in range(2):
        assert stats.kstest(amount[:, axis], stats.uniform(-2.5, 5).cdf).pvalue > 1e-3
        assert stats.kstest(amount[:, axis], stats.uniform(-2, 4).cdf).pvalue < 1e-3
    assert abs(np.corrcoef(amount.T)[0, 1]) < 0.2
    rows, columns = np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij")
    for i in range(5):
        np.testing.assert_allclose(moved[i], read(ramp, rows + amount[i, 0], columns + amount[i, 1]), atol=2e-3)


def test_resized_crop_stays_inside_with_the_area_and_ratio_drawn():
    ramp = np.stack(np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij"), -1).astype(np.float32)
    found = np.asarray(jax.jit(augment.resized_crop((0.1, 0.4)))(KEY, np.repeat(ramp[None], 400, 0)))
    height, width = 20 * (found[:, 11, 15, 0] - found[:, 10, 15, 0]), 30 * (found[:, 10, 16, 1] - found[:, 10, 15, 1])
    assert stats.kstest(height * width / 600, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(np.log(width / height), stats.uniform(np.log(3 / 4), np.log(16 / 9)).cdf).pvalue > 1e-3
    top, left = found[:, 10, 15, 0] - 10.5 * height / 20 + 0.5, found[:, 10, 15, 1] - 15.5 * width / 30 + 0.5
    for start, size, count in ((top, height, 20), (left, width, 30)):
        assert stats.kstest(start / (count - size), stats.uniform().cdf).pvalue > 1e-3
    np.testing.assert_allclose(augment.resized_crop((1, 1))(KEY, RGB), RGB, atol=1e-5)  # all of it, whatever the ratio


# --- colour ------------------------------------------------------------------------------------------------------


def column(*values):
    return jnp.array(values, jnp.float32)[:, None, None, None]


def test_brightness_contrast_saturation_and_sharpness_are_those_of_pil():
    enhancers = {
        colour.brighten: ImageEnhance.Brightness,
        colour.spread: ImageEnhance.Contrast,
        colour.saturate: ImageEnhance.Color,
        colour.sharpen: ImageEnhance.Sharpness,
    }
    factors = (0.0, 0.3, 1.0, 1.4, 1.9, 0.8)
    for change, enhancer in enhancers.items():
        expected = [np.asarray(enhancer(Image.fromarray(image)).enhance(f)) for image, f in zip(BYTES, factors)]
        np.testing.assert_allclose(255 * change(RGB, column(*factors)), expected, atol=2.1)  # PIL rounds on its way


def test_hue_is_that_of_colorsys():
    shares = (-0.5, -0.2, 0.0, 0.1, 0.33, 0.5)
    found = np.asarray(colour.turn_hue(RGB, column(*shares)))
    for image, share, result in zip(RGB, shares, found):
        for pixel, new in zip(image.reshape(-1, 3), result.reshape(-1, 3)):
            hue, saturation, value = colorsys.rgb_to_hsv(*map(float, pixel))
            np.testing.assert_allclose(new, colorsys.hsv_to_rgb((hue + share) % 1, saturation, value), atol=1e-5)


def test_jitter_draws_factors_in_its_ranges_as_often_as_asked():
    x = np.full((600, 1, 1, 3), 0.25, np.float32)
    factor = np.asarray(augment.jitter(brightness=0.4)(KEY, x))[:, 0, 0, 0] / 0.25
    assert stats.kstest(factor, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert stats.kstest(factor, stats.uniform(0.5, 1.0).cdf).pvalue < 1e-3
    assert np.asarray(augment.jitter(brightness=2.0)(KEY, x)).min() >= 0  # the factor is never negative
    some = np.asarray(augment.jitter(brightness=0.4, probability=0.3)(KEY, x))
    assert abs(np.mean(some[:, 0, 0, 0] != 0.25) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 600)
    pair = jnp.array([[[[0.2, 0.4, 0.6]]]]).repeat(600, 0)
    hue = [colorsys.rgb_to_hsv(*map(float, p))[0] for p in np.asarray(jax.jit(augment.jitter(hue=0.1))(KEY, pair))[:, 0, 0]]
    assert stats.kstest(hue, stats.uniform(7 / 12 - 0.1, 0.2).cdf).pvalue > 1e-3


def test_grayscale_is_luma():
    found = np.asarray(augment.grayscale()(KEY, RGB))
    np.testing.assert_allclose(found, np.repeat((RGB @ [0.299, 0.587, 0.114])[..., None], 3, -1), atol=1e-6)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in BYTES]
    assert np.abs(255 * found[..., 0] - expected).max() <= 0.51


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_is_posterize(bits):
    x = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    expected = np.asarray(ImageOps.posterize(Image.fromarray(x), bits))
    found = augment.bit_depth(bits)(KEY, jnp.asarray(x[None] / 255, jnp.float32))
    np.testing.assert_array_equal(np.rint(255 * np.asarray(found[0])), expected)


def test_solarize_and_stretch_are_those_of_pil():
    expected = [np.asarray(ImageOps.solarize(Image.fromarray(image), 100)) for image in BYTES]
    np.testing.assert_allclose(255 * colour.solarize(RGB, jnp.full((6, 1, 1, 1), 99.5 / 255)), expected, atol=1e-3)
    expected = [np.asarray(ImageOps.autocontrast(Image.fromarray(image // 2 + 20))) for image in BYTES]
    np.testing.assert_allclose(255 * colour.stretch(jnp.asarray(BYTES // 2 + 20, jnp.float32)), expected, atol=1.01)
    np.testing.assert_array_equal(colour.stretch(jnp.full((1, 3, 3, 1), 0.3)), np.full((1, 3, 3, 1), np.float32(0.3)))


def test_gaussian_adds_noise_of_its_scale():
    noise = np.asarray(augment.gaussian(0.05)(KEY, jnp.full((10, 20, 20, 1), 0.5))).ravel() - 0.5
    assert stats.kstest(noise, stats.norm(0, 0.05).cdf).pvalue > 1e-3
    assert stats.kstest(noise, stats.norm(0, 0.06).cdf).pvalue < 1e-3
    assert np.asarray(augment.gaussian(3.0)(KEY, RGB)).min() == 0
    assert np.asarray(augment.gaussian(3.0)(KEY, RGB)).max() == 1


def test_channel_shuffle_draws_every_order_alike():
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    choices = {i: RGB[0][..., list(order)] for i, order in enumerate(orders)}
    batch = np.repeat(RGB[:1], 600, axis=0)
    shuffle = jax.jit(lambda probability: augment.channel_shuffle(probability)(KEY, batch))
    found = outcomes(shuffle(1.0), choices)
    assert stats.chisquare(np.bincount(found, minlength=6)).pvalue > 1e-3
    kept = np.mean(np.array(outcomes(shuffle(0.5), choices)) == 0)
    assert abs(kept - (0.5 + 0.5 / 6)) < 4 * np.sqrt(0.58 * 0.42 / 600)


# --- JPEG --------------------------------------------------------------------------------------------------------


def by_pil(images, quality):
    def one(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return np.stack([one(image) for image in images])


def photographs(height, width):
    """Smooth random colours with a little noise, bytes [12, H, W, 3]."""
    small = RNG.integers(0, 256, (12, 5, 5, 3)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small])
    return np.clip(large + RNG.normal(0, 12, large.shape), 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32), (37, 53)])
@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_that_of_pil(shape, quality):
    images = photographs(*shape)
    code = jax.jit(augment.jpeg(quality))
    for part in (images, images[..., :1]):
        found = 255 * np.asarray(code(KEY, jnp.asarray(part / 255, jnp.float32)))
        np.testing.assert_allclose(found, np.rint(found), atol=1e-3)
        error = np.abs(found - by_pil(part.squeeze(), quality).reshape(part.shape))
        assert error.mean() < 0.4  # grey levels; 0.02 to 0.27 measured
    wrong = np.abs(found - by_pil(part.squeeze(), quality + 5).reshape(part.shape))
    assert wrong.mean() > 2 * error.mean()


def test_jpeg_of_digits_is_that_of_pil():
    digits = np.stack(
        [
            np.asarray(Image.fromarray((16 * d).clip(0, 255).astype(np.uint8)).resize((28, 28)))
            for d in load_digits().images[:20]
        ]
    )
    for quality in (10, 50, 90):
        found = 255 * np.asarray(jax.jit(augment.jpeg(quality))(KEY, jnp.asarray(digits[..., None] / 255, jnp.float32)))
        assert np.abs(found[..., 0] - by_pil(digits, quality)).mean() < 0.4


def test_jpeg_steps_are_those_that_pil_writes():
    for quality in (1, 10, 49, 50, 75, 100):
        file = io.BytesIO()
        Image.fromarray(BYTES[0]).save(file, "JPEG", quality=quality)
        written = Image.open(file).quantization
        for i, table in enumerate((compression.LUMINANCE, compression.CHROMINANCE)):
            steps = compression.quantizer(table, jnp.full((1, 1, 1), quality))
            np.testing.assert_array_equal(np.ravel(steps), written[i])


@pytest.mark.slow
def test_jpeg_draws_quality_for_every_image_and_passes_gradients_only_when_asked():
    x = jnp.asarray(np.repeat(photographs(16, 16)[:1] / 255, 300, 0), jnp.float32)
    choices = {q: jax.jit(augment.jpeg(q))(KEY, x[:1])[0] for q in (10, 11)}
    found = outcomes(jax.jit(augment.jpeg((10, 11)))(KEY, x), choices)
    assert stats.chisquare([found.count(q) for q in choices]).pvalue > 1e-3

    def slope(differentiable, quality):
        weights = jnp.asarray(RNG.normal(size=x[:2].shape), jnp.float32)
        code = augment.jpeg(quality, differentiable)
        return weights, jax.jit(jax.grad(lambda x: jnp.sum(weights * code(KEY, x))))(x[:2] * 0.5 + 0.25)

    assert not np.any(slope(False, 50)[1])
    weights, gradient = slope(True, 50)  # chroma is averaged, luma is not: its part of the gradient passes whole
    grey = np.asarray(weights).sum(-1)
    np.testing.assert_allclose(np.asarray(gradient).sum(-1).mean(), grey.mean(), atol=1e-3)
    assert np.corrcoef(np.asarray(gradient).sum(-1).ravel(), grey.ravel())[0, 1] > 0.99
    straight, rounded = (jax.jit(augment.jpeg(30, how))(KEY, x[:2]) for how in (True, False))
    np.testing.assert_array_equal(straight, rounded)


# --- mixing ------------------------------------------------------------------------------------------------------

SOLID = jnp.broadcast_to(jnp.arange(400.0)[:, None, None, None], (400, 8, 12, 1))  # every image its own value


def beta(alpha):
    return stats.beta(alpha, alpha).cdf


@pytest.mark.slow
@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_partners_are_a_permutation_and_some_images_stay(mix):
    mixed, partner, weight = jax.jit(mix(probability=0.5))(KEY, SOLID)
    assert (partner.dtype, weight.dtype, mixed.dtype) == (jnp.int32, jnp.float32, SOLID.dtype)
    np.testing.assert_array_equal(np.sort(partner), np.arange(400))
    assert np.mean(partner != np.arange(400)) > 0.9
    stays = np.asarray(weight) == 1
    np.testing.assert_array_equal(np.asarray(mixed)[stays], SOLID[stays])
    assert abs(stats.binomtest(int(stays.sum()), 400, 0.52).proportion_estimate - 0.52) < 0.1
    # the mean of a mixed image is that of its two parts by weight
    expected = weight * SOLID[:, 0, 0, 0] + (1 - weight) * SOLID[partner, 0, 0, 0]
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_mixup_mixes_pixels_with_beta_weights():
    x = RNG.random((600, 3, 4, 2)).astype(np.float32)
    mixup = jax.jit(lambda alpha: augment.mixup(alpha)(KEY, jnp.asarray(x)))
    for alpha in (0.4, 1.0):
        mixed, partner, weight = map(np.asarray, mixup(alpha))
        w = weight[:, None, None, None]
        np.testing.assert_allclose(mixed, w * x + (1 - w) * x[partner], atol=1e-6)
        assert stats.kstest(weight, beta(alpha)).pvalue > 1e-3
        assert stats.kstest(weight, beta(2 * alpha)).pvalue < 1e-3


@pytest.mark.slow
def test_cutmix_pastes_one_box_and_weighs_by_its_pixels():
    mixed, partner, weight = map(np.asarray, jax.jit(augment.cutmix())(KEY, SOLID))
    pasted = (mixed != np.asarray(SOLID))[..., 0]
    for i in np.flatnonzero(partner != np.arange(400)):
        assert pasted[i].sum() == round(96 * (1 - float(weight[i])))
        rows, columns = pasted[i].any(1), pasted[i].any(0)
        np.testing.assert_array_equal(pasted[i], rows[:, None] & columns[None, :])  # one box, no holes
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2
        assert set(np.unique(mixed[i])) <= {float(i), float(partner[i])}
    assert pasted.mean((1, 2)).max() > 0.6
    # lambda is uniform and boxes are clipped: the pasted share by direct simulation
    lam, draws = RNG.random(20000), []
    for count in (8, 12):
        length = np.floor(np.sqrt(1 - lam) * count).astype(int)
        start = RNG.integers(0, count, len(lam)) - length // 2
        draws.append(np.minimum(start + length, count) - np.maximum(start, 0))
    share = draws[0] * draws[1] / 96
    assert abs((1 - np.asarray(weight)).mean() - share.mean()) < 4 * share.std() / 20


# --- plasma, UEraser, projection, strong -------------------------------------------------------------------------


@pytest.mark.slow
def test_cloud_is_stretched_keyed_and_finer_when_rougher():
    x = jnp.zeros((40, 17, 24, 2))
    fine, coarse = (np.asarray(jax.jit(plasma.cloud, static_argnums=2)(KEY, x, (r, r))) for r in (0.9, 0.2))
    for field in (fine, coarse):
        np.testing.assert_allclose(field.min((1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(field.max((1, 2)), 1, atol=1e-6)
        assert np.abs(field[0] - field[1]).max() > 0.1
        assert np.abs(field[..., 0] - field[..., 1]).max() > 0.1
    grain = [np.abs(np.diff(field, axis=2)).mean() for field in (fine, coarse)]
    assert grain[0] > 1.5 * grain[1]


@pytest.mark.slow
def test_plasma_changes_brightness_and_contrast_by_the_cloud():
    half = jnp.full((50, 8, 9, 3), 0.5)
    bright = np.asarray(jax.jit(augment.plasma_brightness(intensity=(0.2, 0.4)))(KEY, half)) - 0.5
    reach = bright.max((1, 2, 3))  # the cloud reaches 0 and 1, so the change reaches +-intensity
    np.testing.assert_allclose(-bright.min((1, 2, 3)), reach, atol=1e-5)
    assert stats.kstest(reach, stats.uniform(0.2, 0.2).cdf).pvalue > 1e-3
    contrast = jax.jit(augment.plasma_contrast())
    np.testing.assert_array_equal(contrast(KEY, half), half)
    spread = np.asarray(contrast(KEY, half + 0.1)) - 0.5
    np.testing.assert_allclose(spread.max((1, 2)), 0.4, atol=1e-5)
    np.testing.assert_allclose(spread.min((1, 2)), 0.0, atol=1e-5)
    for part in (augment.plasma_brightness, augment.plasma_contrast):
        kept = np.all(np.asarray(jax.jit(part(probability=0.3))(KEY, BATCH[:400] / 65) == BATCH[:400] / 65), axis=(1, 2, 3))
        assert abs(kept.mean() - 0.7) < 0.1


@pytest.mark.slow
def test_trivial_draws_every_operation_alike():
    count = 1300
    x = jnp.asarray(np.repeat(photographs(12, 12)[:1] / 256, count, 0), jnp.float32)
    found = np.asarray(jax.jit(augment.trivial())(KEY, x))
    assert found.shape == x.shape
    assert found.min() >= 0
    assert found.max() <= 1
    _, to_warp, to_change = jax.random.split(KEY, 3)
    warped = jax.jit(recipes._warped)
    options = [x] + [warped(to_warp, x, jnp.full(count, 1 + i)) for i in range(recipes.WARPS)]
    options += jax.jit(recipes._changed)(to_change, x)
    apart = np.stack([np.abs(found - np.asarray(option)).max((1, 2, 3)) for option in options])
    assert apart.min(0).max() < 1e-5  # every image is one of them
    assert stats.chisquare(np.bincount(apart.argmin(0), minlength=len(options))).pvalue > 1e-4
    mean = np.asarray(options[-7]).mean((1, 2, 3))[:, None] / np.asarray(x).mean((1, 2, 3))[:, None]
    assert mean.min() < 0.2


def test_orthogonal_removes_the_span_and_nothing_else():
    basis = np.linalg.qr(RNG.normal(size=(210, 4)))[0].astype(np.float32)
    project = jax.jit(augment.orthogonal(basis))
    once = project(KEY, RGB)
    flat = RGB.reshape(6, -1).astype(np.float64)
    np.testing.assert_allclose(np.reshape(once, (6, -1)), flat - flat @ basis @ basis.T, atol=1e-5)
    np.testing.assert_allclose(np.reshape(once, (6, -1)) @ basis, 0, atol=1e-5)
    np.testing.assert_allclose(project(KEY, once), once, atol=1e-5)
    assert np.asarray(augment.orthogonal(jnp.eye(210)[:, :1])(KEY, RGB - 0.5)).min() < 0  # not clipped
    with pytest.raises(BadInput, match="orthonormal"):
        augment.orthogonal(1.01 * basis)
    with pytest.raises(BadInput, match="210 rows"):
        augment.orthogonal(basis)(KEY, GREY)


@pytest.mark.slow
def test_strong_is_grey_as_often_as_asked_and_mild_at_zero():
    found = np.asarray(jax.jit(augment.strong(1.0))(KEY, jnp.asarray(np.repeat(RGB[:1], 400, 0))))
    grey = np.abs(found - found[..., :1]).max((1, 2, 3)) < 1e-6
    assert abs(grey.mean() - 0.2) < 4 * np.sqrt(0.16 / 400)
    mild = jax.jit(augment.strong(0.0))(KEY, RGB)
    np.testing.assert_allclose(
        np.minimum(abs(mild - RGB).max((1, 2, 3)), abs(mild - RGB[:, :, ::-1]).max((1, 2, 3))), 0, atol=1e-5
    )


# --- all of them -------------------------------------------------------------------------------------------------

EVERY = {
    "crop": augment.crop(2),
    "rotation": augment.rotation(20),
    "shift": augment.shift(2),
    "resized_crop": augment.resized_crop(),
    "jitter": augment.jitter(0.4, 0.4, 0.4, 0.1),
    "grayscale": augment.grayscale(0.5),
    "gaussian": augment.gaussian(0.1),
    "channel_shuffle": augment.channel_shuffle(),
    "ueraser": augment.ueraser(compressed=True),
    "strong": augment.strong(0.6),
}


@pytest.mark.parametrize("name", some(EVERY, set(EVERY) - {"strong", "ueraser"}))
def test_contract(name):
    @jax.jit
    def run(key, x):
        found, back = jax.vjp(lambda x: EVERY[name](key, x), x)
        return found, back(jnp.cos(jnp.arange(x.size)).reshape(x.shape))[0]

    for x in (RGB, GREY):
        found, slope = run(KEY, x)
        assert (found.shape, found.dtype, slope.dtype) == (x.shape, x.dtype, x.dtype)
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1 + 1e-6
        assert np.any(slope != 0)
        np.testing.assert_array_equal(run(KEY, x)[0], found)
    assert np.any(run(jax.random.key(6, impl="rbg"), RGB)[0] != run(KEY, RGB)[0])
    flat = np.zeros_like(RGB)  # no colour, no contrast: where careless gradients are NaN
    flat[1] = 0.5
    assert np.all(np.isfinite(run(KEY, flat)[1]))


@pytest.mark.slow
def test_gradients_do_not_hang_on_equal_roundings():
    """Extremes of values that a compiler may compute twice: its gradients are those of the operations one by one."""
    x, factor = jax.random.uniform(KEY, (16, 16, 16, 3)), jnp.full((16, 1, 1, 1), 1.1)
    before = (colour.brighten, colour.spread, colour.saturate)
    for last in (lambda x: colour.turn_hue(x, factor / 10), colour.stretch):

        def total(x, last=last):
            for change in before:
                x = change(x, factor)
            return jnp.square(last(x)).sum()

        found, expected = jax.jit(jax.grad(total))(x), jax.grad(total)(x)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_grey_images_know_no_colour():
    np.testing.assert_array_equal(augment.jitter(saturation=0.9, hue=0.5)(KEY, GREY), GREY)
    for part in (augment.grayscale(), augment.channel_shuffle(1.0)):
        np.testing.assert_array_equal(part(KEY, GREY), GREY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: augment.crop(-1),
        lambda: augment.flip(1.1),
        lambda: augment.cutout(-2),
        lambda: augment.rotation(-1),
        lambda: augment.shift(float("nan")),
        lambda: augment.resized_crop((0, 1)),
        lambda: augment.resized_crop((0.5, 0.2)),
        lambda: augment.resized_crop((0.5, 1), (0, 1)),
        lambda: augment.jitter(-0.1),
        lambda: augment.jitter(hue=0.6),
        lambda: augment.jitter(probability=2),
        lambda: augment.grayscale(-0.1),
        lambda: augment.bit_depth(0),
        lambda: augment.bit_depth(9),
        lambda: augment.bit_depth(2.5),
        lambda: augment.gaussian(-1),
        lambda: augment.channel_shuffle(7),
        lambda: augment.jpeg(0),
        lambda: augment.jpeg(101),
        lambda: augment.jpeg((50, 10)),
        lambda: augment.mixup(0),
        lambda: augment.mixup(1, 1.5),
        lambda: augment.cutmix(-1),
        lambda: augment.plasma_brightness((0.3, 1.7)),
        lambda: augment.plasma_contrast(probability=-1),
        lambda: augment.orthogonal(jnp.ones(3)),
        lambda: augment.strong(1.5),
        lambda: augment.jpeg(50)(KEY, BATCH[:1]),
        lambda: augment.grayscale()(KEY, BATCH[:1]),
    ],
)
def test_bad_input_is_refused(make):
    with pytest.raises(BadInput):
        make()
