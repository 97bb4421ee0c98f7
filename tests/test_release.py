"""Releases: 8 bits, the budget to the exact grey level, and a folder that others read without this library."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dememo_jax import data as sets
from dememo_jax import release, sources
from dememo_jax.errors import BadInput
from dememo_jax.types import Perturbation

RADIUS = 0.2


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits")


@pytest.fixture(scope="module")
def protected(digits):
    """Class-wise random signs on four fifths of the images."""
    train = digits[0]
    delta = RADIUS * np.random.default_rng(0).choice([-1.0, 1.0], (10, 8, 8, 1))
    return Perturbation(jnp.asarray(delta, jnp.float32), train.y, jnp.arange(len(train.y)) % 5 > 0)


def toy(levels, delta, mask=None):
    """A set of images on the 8-bit grid, and its noise."""
    data = sets.make(np.asarray(levels, np.uint8), np.arange(len(levels)) % 2)
    mask = np.ones(len(levels), bool) if mask is None else np.asarray(mask)
    return data, Perturbation(jnp.asarray(delta, jnp.float32), jnp.arange(len(levels)), jnp.asarray(mask))


def random_toy(seed, colours=3):
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (23, 4, 5, colours))
    delta = rng.integers(-25, 26, levels.shape) + rng.choice([-0.3, 0.0, 0.3], levels.shape)  # nothing half-way
    return levels, *toy(levels, delta / 255, rng.random(23) < 0.7)


def test_quantise_rounds_what_perturb_joins():
    levels, data, noise = random_toy(0)
    expected = np.round(255 * np.asarray(sets.perturb(data, noise).x, np.float64))
    for batch in (1, 7, 100):
        np.testing.assert_array_equal(release.quantise(data, noise, batch=batch), expected)
    outside = ~np.asarray(noise.mask)
    np.testing.assert_array_equal(release.quantise(data, noise)[outside], levels[outside])
    part = sets.take(data, jnp.asarray([4, 2]))
    np.testing.assert_array_equal(release.quantise(part, noise), expected[[4, 2]])


def test_positive_part_drops_negative_noise_and_truncates():
    levels, data, noise = random_toy(1)
    scaled = np.asarray(noise.delta) * np.float32(255)
    expected = levels.copy()
    for i in np.flatnonzero(noise.mask):
        expected[i] = np.minimum(levels[i] + np.maximum(scaled[i], 0), 255).astype(np.uint8)
    found = release.quantise(data, noise, form="positive_part")
    np.testing.assert_array_equal(found, expected)
    assert (found < release.quantise(data, noise)).any()
    with pytest.raises(BadInput, match="form"):
        release.quantise(data, noise, form="negative")


@pytest.mark.parametrize(("radius", "allowed"), [(8 / 255, 8), (8.4 / 255, 8), (8.5 / 255, 9), (0.1, 26)])
def test_budget_holds_to_the_exact_grey_level(radius, allowed):
    levels = np.full((3, 2, 2, 1), 100, np.uint8)
    for change in (allowed, -allowed):
        moved = levels.copy()
        moved[1, 0, 0, 0] = 100 + change
        found = release.measure(levels, moved, np.ones(3, bool), norm="linf", radius=radius, batch=2)
        assert (found.linf, found.allowed, found.pixels, found.holds) == (allowed, allowed, 1, True)
        release.verify(found)
        moved[1, 0, 0, 0] = 100 + change + np.sign(change)
        found = release.measure(levels, moved, np.ones(3, bool), norm="linf", radius=radius, batch=2)
        assert not found.holds
        with pytest.raises(BadInput, match=f"by {allowed + 1} grey levels, 1 more than the {allowed} "):
            release.verify(found)


def test_full_noise_keeps_its_budget_on_and_off_the_grid(digits):
    train = digits[0]  # sixteenths: not on the 8-bit grid
    for radius in (1 / 255, 8 / 255, 7.3 / 255, 0.1):
        signs = np.random.default_rng(1).choice([-1.0, 1.0], train.x.shape)
        noise = Perturbation(jnp.asarray(radius * signs, jnp.float32), train.index, jnp.ones(len(train.y), bool))
        found = release.measure(train.x, release.quantise(train, noise), noise.mask, norm="linf", radius=radius)
        assert found.holds, found
        assert found.linf >= np.floor(255 * radius)
        levels, data, noise = random_toy(2)
        noise = noise._replace(delta=radius * jnp.sign(noise.delta))
        assert release.measure(
            levels.astype(np.uint8), release.quantise(data, noise), noise.mask, norm="linf", radius=radius
        ).holds


def test_other_norms_and_the_outside():
    levels = np.full((4, 3, 3, 3), 100, np.uint8)
    moved = levels.copy()
    moved[2, 0, 0] = (110, 100, 90)
    moved[2, 1, 1, 0] = 120
    every = np.ones(4, bool)
    found = release.measure(levels, moved, every)
    assert (found.linf, found.pixels, found.allowed, found.holds) == (20, 2, None, True)
    assert found.l2 == pytest.approx(np.sqrt(100 + 100 + 400) / 255)
    slack = 0.5 * np.sqrt(27) / 255
    for norm, fits, short in (("l0", 2, 1), ("l2", found.l2 - 0.99 * slack, found.l2 - 1.01 * slack)):
        release.verify(release.measure(levels, moved, every, norm=norm, radius=fits))
        with pytest.raises(BadInput, match="more than"):
            release.verify(release.measure(levels, moved, every, norm=norm, radius=short))
    found = release.measure(levels, moved, np.arange(4) != 2)
    assert (found.outside, found.holds) == (1, False)
    with pytest.raises(BadInput, match="1 images outside the mask changed, by up to 20"):
        release.verify(found)
    for wrong in ({"norm": "l7"}, {"norm": "linf"}, {"norm": "l2", "radius": 0.0}):
        with pytest.raises(BadInput):
            release.measure(levels, moved, every, **wrong)
    with pytest.raises(BadInput, match="shape"):
        release.measure(levels[:3], moved, every)


def test_round_trip_and_manifest(digits, protected, tmp_path):
    train, test = digits
    manifest = {"method": "random signs", "seed": np.int64(3), "configuration": {"data": "digits"}}
    kept = release.write(tmp_path / "a", train, test, protected, manifest=manifest, norm="linf", radius=RADIUS)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["manifest.json", "released.npz"]
    assert kept == json.loads((tmp_path / "a" / "manifest.json").read_text())
    read, read_test = sources.load(str(tmp_path / "a" / "released.npz"))
    np.testing.assert_array_equal(np.round(255 * read.x), release.quantise(train, protected))
    np.testing.assert_array_equal(read.y, train.y)
    np.testing.assert_allclose(read_test.x, test.x, atol=0.51 / 255)
    np.testing.assert_array_equal(read_test.y, test.y)
    assert kept["seed"] == 3
    assert kept["method"] == "random signs"
    assert kept["counts"] == {"train": 1347, "protected": int(protected.mask.sum()), "test": 450}
    assert kept["shape"] == [8, 8, 1]
    assert kept["measured"]["holds"] is True
    assert kept["measured"]["linf"] == kept["measured"]["allowed"] == 51
    assert all(len(text) == 32 for text in kept["hash"].values())
    other = train._replace(x=train.x.at[5, 2, 2, 0].add(1e-4))  # too little for a grey level
    again = release.write(tmp_path / "b", other, test, protected, manifest={}, batch=50)
    assert again["hash"]["clean"] != kept["hash"]["clean"]
    same = release.write(tmp_path / "b", train, test, protected, manifest={}, batch=50)
    assert same["hash"] == kept["hash"]
    with pytest.raises(BadInput, match="grey levels"):
        release.write(tmp_path / "c", train, test, protected, manifest={}, norm="linf", radius=RADIUS / 2)
    assert not (tmp_path / "c").exists()


def test_a_plain_learner_reads_the_images(digits, protected, tmp_path):
    from sklearn.linear_model import LogisticRegression

    train, test = digits
    release.write(tmp_path, train, test, protected, manifest={}, images=True)
    files = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.stem)
    assert [path.stem for path in files[:2]] == ["00000", "00001"]
    pixels = np.stack([np.asarray(Image.open(path)) for path in files])
    labels = np.asarray([int(path.parent.name) for path in files])
    with np.load(tmp_path / "released.npz") as kept:
        np.testing.assert_array_equal(pixels, kept["x_train"][..., 0])
        np.testing.assert_array_equal(labels, kept["y_train"])
        seen, truth = kept["x_test"].reshape(450, -1) / 255, kept["y_test"]
    learner = LogisticRegression(max_iter=200).fit(pixels.reshape(len(pixels), -1) / 255, labels)
    assert learner.score(pixels.reshape(len(pixels), -1) / 255, labels) > 0.95
    assert 0.1 < learner.score(seen, truth) < 1.0


def test_colour_images_and_names_that_sort_as_numbers(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (24, 4, 5, 3), np.uint8)
    data = sets.make(levels, np.arange(24) % 12)
    noise = Perturbation(jnp.zeros((24, 4, 5, 3)), data.index, jnp.ones(24, bool))
    release.write(tmp_path, data, data, noise, manifest={}, images=True)
    folders = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert [int(name) for name in folders] == list(range(12))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "03" / "00015.png")), levels[15])
    with pytest.raises(BadInput, match="channels"):
        release.write(tmp_path, data._replace(x=data.x[..., :2]), data, noise, manifest={}, images=True)


@pytest.mark.parametrize("breaks", ["numpy.savez", "PIL.Image.Image.save"])
def test_a_write_that_was_killed_leaves_no_manifest_and_can_be_repeated(breaks, tmp_path, monkeypatch):
    _, data, noise = random_toy(3)
    first = release.write(tmp_path, data, data, noise, manifest={}, images=True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(breaks, full)
        with pytest.raises(OSError, match="space"):
            release.write(tmp_path, data, data, noise, manifest={}, images=True)
    assert not (tmp_path / "manifest.json").exists()
    assert release.write(tmp_path, data, data, noise, manifest={}, images=True) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "manifest.json", "released.npz"]
    assert len(list((tmp_path / "images").rglob("*.png"))) == 23


def test_what_would_harm_the_owner_is_refused(tmp_path):
    _, data, noise = random_toy(4)
    with pytest.raises(BadInput, match=r"configuration\.data is an absolute path"):
        release.write(tmp_path, data, data, noise, manifest={"configuration": {"data": "/home/me/secret.npz"}})
    with pytest.raises(BadInput, match="hash"):
        release.write(tmp_path, data, data, noise, manifest={"hash": "mine"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(BadInput, match="not of a release"):
        release.write(tmp_path, data, data, noise, manifest={})
    assert (tmp_path / "images" / "holiday.png").exists()
