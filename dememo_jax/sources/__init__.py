"""Data sets from disk: digits, an `.npz`, a folder of images, TensorFlow Datasets; in memory, or as a stream of
batches. Labelled texts from `.tsv` and `.jsonl`; released language models.

Nothing is unpickled, nothing is downloaded.
"""

from dememo_jax.sources.arrays import KEYS, check
from dememo_jax.sources.labelled import Texts, is_texts, rewritten, texts
from dememo_jax.sources.named import class_names, classes, is_path, load, load_split
from dememo_jax.sources.pretrained import decoder, decoder_net
from dememo_jax.sources.streams import Stream, stream
from dememo_jax.sources.tokens import Rows, encode, label_tokens, make_tokenizer, read_tokenizer
from dememo_jax.sources.words import composed

__all__ = [
    "KEYS", "Rows", "Stream", "Texts", "check", "class_names", "classes", "composed", "decoder", "decoder_net", "encode",
    "is_path", "is_texts", "label_tokens", "load", "load_split", "make_tokenizer", "read_tokenizer", "rewritten", "stream",
    "texts",
]  # fmt: skip
