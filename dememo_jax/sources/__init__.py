"""Data sets from disk: digits, an `.npz`, a folder of images, TensorFlow Datasets; in memory, or as a stream of
batches. Labelled texts from `.tsv` and `.jsonl`; released language models.

Nothing is unpickled, nothing is downloaded.
"""

from dememo_jax.sources.arrays import KEYS, check
from dememo_jax.sources.labelled import Texts, texts
from dememo_jax.sources.named import classes, is_path, load, load_split
from dememo_jax.sources.pretrained import decoder
from dememo_jax.sources.streams import Stream, stream

__all__ = ["KEYS", "Stream", "Texts", "check", "classes", "decoder", "is_path", "load", "load_split", "stream", "texts"]
