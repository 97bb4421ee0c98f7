"""Files that mean something else than their numbers say: understood, or refused with what to do."""

import json
import os
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from dememo_jax import sources
from dememo_jax.errors import BadInput

# --- pictures ----------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def folder(path, pictures, names=("a", "b"), test="test"):
    """A folder of images; `pictures[k]` writes the images of class k to a path without suffix."""
    for part in ("train", test):
        for name, save in zip(names, pictures):
            (path / part / name).mkdir(parents=True, exist_ok=True)
            save(path / part / name / "0")
    return str(path)


def png(image, **how):
    return lambda path: image.save(path.with_suffix(".png"), **how)


def plain(level):
    return png(Image.fromarray(np.full((4, 4), level, np.uint8)))


def test_grey_of_sixteen_bits_is_scaled(tmp_path):
    levels = np.array([[0, 257, 20_000], [45_000, 65_407, 65_535]], np.uint16)
    train, _ = sources.load(folder(tmp_path, [png(Image.fromarray(levels)), png(Image.fromarray(levels[::-1].copy()))]))
    np.testing.assert_allclose(train.x[0, ..., 1], levels / 65_535, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(train.x[1, ..., 2], levels[::-1] / 65_535, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.fromarray(RGB)
    train, _ = sources.load(folder(tmp_path, [png(image, exif=exif)] * 2))
    shown = image if turn == 1 else image.transpose(
        [Image.Transpose(t) for t in (0, 3, 1, 5, 4, 6, 2)][turn - 2]
    )  # fmt: skip
    np.testing.assert_array_equal(np.round(255 * np.asarray(train.x[0])), np.asarray(shown))


def transparent(mode):
    image = Image.fromarray(RGB).convert("RGBA" if mode != "LA" else "L")
    image = image.convert(mode)
    image.putalpha(Image.fromarray(np.where(np.arange(35).reshape(5, 7) == 3, 100, 255).astype(np.uint8)))
    return image


def palette():
    image = Image.fromarray(RGB).quantize(8)
    return png(image, transparency=int(np.asarray(image)[0, 0]))


def animation(path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    frames[0].save(path.with_suffix(".png"), save_all=True, append_images=frames[1:])


def disguised(kind):
    return lambda path: Image.fromarray(RGB).save(path.with_suffix(".png"), format=kind)


def postscript(path):
    path.with_suffix(".png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n%%EndComments\nshowpage\n%%EOF\n")


@pytest.mark.parametrize(
    ("save", "says"),
    [
        (png(transparent("RGBA")), "transparent"),
        (png(transparent("LA")), "transparent"),
        (palette(), "transparent"),
        (animation, "several frames"),
        (disguised("GIF"), "not a readable image"),
        (disguised("TIFF"), "not a readable image"),
        (disguised("BMP"), "not a readable image"),
        (postscript, "not a readable image"),
        (lambda path: os.mkfifo(path.with_suffix(".png")), "no file"),
        (lambda path: path.with_suffix(".png").symlink_to("nowhere.png"), "no file"),
        (lambda path: path.with_suffix(".png").mkdir(), "no file"),
    ],
)
def test_pictures_that_are_refused(tmp_path, save, says):
    with pytest.raises(BadInput, match=says) as refused:
        sources.load(folder(tmp_path, [plain(9), save]))
    assert "b/0.png" in str(refused.value)


def test_opaque_alpha_grey_palettes_and_cmyk_are_what_they_show(tmp_path):
    image = Image.fromarray(RGB)
    quantised = image.quantize(8)
    writers = [
        png(image.convert("RGBA")), png(image.convert("L")), png(quantised), png(image.convert("1")),
        lambda path: image.convert("CMYK").save(path.with_suffix(".jpg"), quality=95, subsampling=0),
    ]  # fmt: skip
    shown = [RGB, ImageOps.grayscale(image).convert("RGB"), quantised.convert("RGB"), image.convert("1").convert("RGB")]
    train, _ = sources.load(folder(tmp_path, writers, names="abcde"))
    for got, expected in zip(train.x, shown):
        np.testing.assert_array_equal(np.round(255 * np.asarray(got)), np.asarray(expected))
    assert np.abs(255 * np.asarray(train.x[4]) - RGB).mean() < 30  # a JPEG of noise, not its negative


# --- classes -----------------------------------------------------------------------------------------------------


def test_folders_of_numbers_are_in_the_order_of_numbers(tmp_path):
    names = [str(k) for k in range(12)]
    where = folder(tmp_path, [plain(20 * k) for k in range(12)], names)
    train, _ = sources.load(where)
    np.testing.assert_array_equal(train.y, np.arange(12))
    np.testing.assert_allclose(train.x[:, 0, 0, 0], 20 * np.arange(12) / 255, rtol=1e-6)
    assert sources.class_names(where) == tuple(names)


def test_names_of_classes(tmp_path):
    assert sources.class_names("digits") == ()
    where = folder(tmp_path / "f", [plain(9), plain(90)], ("zebra", "ant"), test="val")
    assert sources.class_names(where) == ("ant", "zebra")
    np.testing.assert_allclose(sources.load(where)[0].x[:, 0, 0, 0], [90 / 255, 9 / 255], rtol=1e-6)
    assert sources.class_names(stored(tmp_path)) == ()
    assert sources.class_names(stored(tmp_path, class_names=np.array(["two", "one", "none"]))) == ("two", "one", "none")
    for wrong, says in ((np.array(["a", "a"]), "twice"), (np.arange(3), "list of strings")):
        with pytest.raises(BadInput, match=says):
            sources.class_names(stored(tmp_path, class_names=wrong))


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    name = unicodedata.normalize("NFC", "cafe\u0301")
    folder(tmp_path, [plain(9), plain(90)], ("bar", name))
    (tmp_path / "test" / name).rename(tmp_path / "test" / unicodedata.normalize("NFD", name))
    train, test = sources.load(str(tmp_path))
    np.testing.assert_array_equal(train.y, test.y)
    assert sources.class_names(str(tmp_path)) == ("bar", name)
    (tmp_path / "train" / unicodedata.normalize("NFD", name)).mkdir()
    with pytest.raises(BadInput, match="two Unicode forms"):
        sources.load(str(tmp_path))


def test_one_number_written_in_two_ways_is_refused(tmp_path):
    with pytest.raises(BadInput, match="are one number"):
        sources.load(folder(tmp_path, [plain(9), plain(90)], ("01", "1")))


# --- arrays ------------------------------------------------------------------------------------------------------

X, Y = np.random.default_rng(1).integers(0, 256, (12, 6, 6, 3), np.uint8), np.arange(12) % 3


def stored(tmp_path, names=sources.KEYS, x=X, y=Y, **more):
    arrays = dict(zip(names, (x, y, x[:6], y[:6])))
    np.savez(tmp_path / "set.npz", **arrays, **more)
    return str(tmp_path / "set.npz")


@pytest.mark.parametrize("kind", [">f4", ">f8", ">f2", np.longdouble, np.float16])
def test_floats_of_every_kind(tmp_path, kind):
    where = stored(tmp_path, x=(X / 255).astype(kind), y=Y.astype(">i8"))
    train, _ = sources.load(where)
    assert train.x.dtype == np.float32
    np.testing.assert_allclose(train.x, X / 255, atol=2e-3 if np.dtype(kind).itemsize == 2 else 1e-6)
    batch = next(sources.stream(where, batch=4).batches())
    assert batch.x.dtype.isnative
    assert batch.x.dtype.itemsize <= 8


OTHERS = (("train_images", "train_labels", "test_images", "test_labels"), ("X_train", "y_train", "X_test", "y_test"))


@pytest.mark.parametrize("names", OTHERS)
def test_greys_without_a_channel_and_keys_of_other_collections(tmp_path, names):
    train, test = sources.load(stored(tmp_path, names, x=X[..., 0]))
    np.testing.assert_allclose(train.x[..., 0], X[..., 0] / 255, rtol=1e-6)
    assert test.x.shape == (6, 6, 6, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": X.transpose(0, 3, 1, 2)}, r"looks like \[N, C, H, W\]"),
        ({"x": X[:, :0]}, "without pixels"),
        ({"x": X[..., :0]}, "without pixels"),
        ({"x": (X > 99).astype(np.uint8)}, "no byte above 1"),
        ({"x": X / 255 / 255}, "divided by 255 twice"),
        ({"y": np.eye(3, dtype=int)[Y]}, r"one-hot rows, pass .*argmax\(1\)"),
        ({"y": Y[:, None]}, r"\[:, 0\]"),
        ({"y": np.array(["a", "b", "c"])[Y]}, "np.unique"),
        ({"y": Y + 2**40}, "out of range"),
    ],
)
def test_arrays_that_are_refused(tmp_path, changes, says):
    with pytest.raises(BadInput, match=says):
        sources.load(stored(tmp_path, **changes))


def test_odd_numbers_of_channels_are_taken(tmp_path):
    for channels in (2, 5):
        x = np.resize(X, (12, 6, 6, channels))
        assert sources.load(stored(tmp_path, x=x))[0].x.shape[-1] == channels


def huge(path):
    """A header that declares 596 GiB."""
    with zipfile.ZipFile(path, "a") as archive, archive.open("x_train.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (8 * 10**10, 1, 1, 1)})


def member(path, at, value):
    """Two bytes of the zip's central directory and of the local header, of the first member."""
    whole = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x01\x02", at + 2), (b"PK\x03\x04", at)):
        start = whole.find(magic) + place
        whole[start : start + 2] = value
    path.write_bytes(whole)


def compressed(path, method):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def damaged(path):
    compressed(path, zipfile.ZIP_LZMA)
    whole = bytearray(path.read_bytes())
    whole[60:90] = bytes(30)
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: member(path, 6, b"\x01\x00"),  # encrypted
        lambda path: member(path, 8, b"\x63\x00"),  # a compression that nobody knows
        damaged,
    ],
    ids=["encrypted", "unknown compression", "damaged LZMA"],
)
def test_archives_that_are_refused(tmp_path, damage):
    path = tmp_path / "set.npz"
    stored(tmp_path)
    damage(path)
    with pytest.raises(BadInput, match="not a readable"):
        sources.load(str(path))


def test_an_array_that_no_memory_holds(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, y_train=Y, x_test=X[:6], y_test=Y[:6])
    huge(path)
    with pytest.raises(BadInput, match="not a readable"):
        sources.load(str(path))


def test_a_pipe_is_no_data_set(tmp_path):
    for name in ("set.npz", "train.tsv"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadInput, match="no such file"):
            (sources.load if name == "set.npz" else sources.texts)(str(tmp_path / name))


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("header", ["text\tlabel\n", ""])
def test_a_byte_order_mark_is_no_text(tmp_path, mark, header):
    path = tmp_path / "train.tsv"
    path.write_text(header + "good film\tpos\nbad film\tneg\n", encoding=mark)
    found = sources.texts(path)
    assert (found.texts, found.names) == (("good film", "bad film"), ("neg", "pos"))
    assert sources.rewritten(path, ["a", "b"]) == header + "a\tpos\nb\tneg\n"
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n', encoding=mark)
    assert sources.texts(lines).texts == ("a", "b")


def jsonl(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "label": "neg"}\n' + line + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r'{"text": "so good \ud83d", "label": "pos"}', "half of a character"),
        (r'{"text": "so good", "label": "\udc00"}', "half of a character"),
        ('{"text": "b", "label": ""}', "label is empty"),
        ('{"text": "b", "label": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 5000 + "]" * 5000, "not JSON|expected an object"),
        ('{"text": "b", "label": {"a":' + "[" * 5000 + "]" * 5000 + "}}", "not JSON|under 'label'"),
    ],
    ids=["surrogate", "surrogate label", "empty label", "digits", "deep", "deep label"],
)
def test_lines_that_are_refused(tmp_path, line, says):
    with pytest.raises(BadInput, match=says) as refused:
        sources.texts(jsonl(tmp_path, line))
    assert "line 2" in str(refused.value)


def test_labels_of_digits_of_any_length(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(f"a\t10\nb\t9\nc\t{'9' * 5000}\n")
    assert sources.texts(path).names == ("9", "10", "9" * 5000)
    path.write_text("a\t01\nb\t1\n")
    with pytest.raises(BadInput, match="01"):
        sources.texts(path)
    names = [unicodedata.normalize(form, "cafe\u0301") for form in ("NFC", "NFD")]
    path.write_text(f"a\t{names[0]}\nb\t{names[1]}\nc\tbar\n", encoding="utf-8")
    assert sources.texts(path).names == ("bar", names[0])


def test_special_tokens_written_out_are_text(tmp_path):
    tokenizer = sources.make_tokenizer(["the cat", "a dog"], vocab=260)
    found = sources.encode(tokenizer, ["the <pad> token", "<pad>"], length=20)
    assert tokenizer.decode(found.x[0][found.x[0] != 0].tolist()) == "the <pad> token"
    assert 0 not in sources.label_tokens(tokenizer, ["<pad>"])[0]
    assert tokenizer.encode("<pad>").ids == [0]  # the tokenizer is left as it was
    with pytest.raises(BadInput, match="text 1, 'c'"):
        sources.encode(tokenizer, ["a", "c"], length=20, pad=tokenizer.encode("c").ids[0])


def model(**changes):
    return {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"} | changes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": model(unk_token="nothing")}, "unk_token"),
        ({"model": model(vocab={"a": 4 * 10**9, "[UNK]": 1})}, "4000000000"),
        ({"model": model(), "added_tokens": [{"id": 4 * 10**9, "content": "b"}]}, "4000000000"),
        ({"model": model(vocab={"a": -1, "[UNK]": 1})}, "-1"),
        ({"model": model(vocab={"a": "0", "[UNK]": 1})}, "number"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "unk_id"),
        ({"model": []}, "model"),
        ([], "model"),
        ({"model": model(vocab=7)}, "not a tokenizer"),
        ({"model": model(), "added_tokens": 3}, "not a tokenizer"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=says):
        sources.read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 5000, b"{}"], ids=["not UTF-8", "deep", "empty"])
def test_tokenizer_files_that_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BadInput, match="not a tokenizer"):
        sources.read_tokenizer(tmp_path)
