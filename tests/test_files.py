"""Files are whole or not there, and what is wrong with one is a sentence."""

import os

import numpy as np
import pytest

from dememo_jax import files
from dememo_jax.errors import BadInput


def test_a_file_is_the_old_one_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    files.write(path, "ä first")
    assert path.read_text(encoding="utf-8") == "ä first"
    files.write(path, b"second")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]  # no .part is left

    def full_disk(number):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            files.write(path, b"a third, longer than the disk")
    assert path.read_bytes() == b"second"  # the old file is whole
    files.write(path, b"third")
    assert path.read_bytes() == b"third"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]  # what the failure left behind is gone too


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, sync = tmp_path / "config.json", os.fsync
    seen = []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(path.exists()) or sync(number))
    files.write(path, "{}")
    assert seen == [False]


@pytest.mark.parametrize("name", ["scores.npz", "scores.npz.part"])
def test_links_are_replaced_and_never_written_through(name, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(outside)
    files.write_arrays(folder / "scores.npz", x=np.arange(3))
    assert outside.read_text() == "mine"
    assert not (folder / "scores.npz").is_symlink()
    np.testing.assert_array_equal(files.read_arrays(folder / "scores.npz", ["x"])["x"], np.arange(3))


def test_arrays_are_read_as_written_or_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(BadInput, match=r"a\.npz is missing"):
        files.read_arrays(path, ["x"])
    files.write_arrays(path, x=np.arange(50), y=np.ones((3, 2), bool))
    content, known = path.read_bytes(), files.digest(path)
    with pytest.raises(BadInput, match="holds x, y; expected x, z"):
        files.read_arrays(path, ["x", "z"])
    for place in range(0, len(content), 7):  # the directory of the archive too
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert files.digest(path) != known
        try:
            found = files.read_arrays(path, ["x", "y"])
        except BadInput:
            continue
        np.testing.assert_array_equal(found["x"], np.arange(50))  # a byte that says nothing
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(BadInput, match=r"a\.npz is damaged"):
            files.read_arrays(path, ["x", "y"])


def test_one_array_is_read_as_written_or_refused(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(BadInput, match=r"a\.npy is missing"):
        files.read_array(path)
    files.write_array(path, np.arange(5))
    np.testing.assert_array_equal(files.read_array(path), np.arange(5))
    content = path.read_bytes()
    for damaged in (content[:-3], b"", b"\0" * 200, content.replace(b"<i8", b"|O8")):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"a\.npy is damaged"):
            files.read_array(path)
    files.write_arrays(path, x=np.arange(3))
    with pytest.raises(BadInput, match="no single array"):
        files.read_array(path)
