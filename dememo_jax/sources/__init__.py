"""Data sets from disk: digits, an `.npz`, a folder of images, TensorFlow Datasets; in memory, or as a stream of batches.

Nothing is unpickled, nothing is downloaded.
"""

from dememo_jax.sources.arrays import KEYS, check
from dememo_jax.sources.named import classes, is_path, load, load_split
from dememo_jax.sources.streams import Stream, stream

__all__ = ["KEYS", "Stream", "check", "classes", "is_path", "load", "load_split", "stream"]
