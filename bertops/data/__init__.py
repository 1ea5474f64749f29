"""Host side of the data path: files and numpy in, lists and numpy out, no torch."""

from bertops.data.packing import PackedBatch, Unpadded, pack, unpad
from bertops.data.tsv import LabelledTexts, read_tsv

__all__ = ["LabelledTexts", "PackedBatch", "Unpadded", "pack", "read_tsv", "unpad"]
