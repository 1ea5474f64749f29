"""Host side of the data path: numpy in, numpy out, no torch."""

from bertops.data.packing import PackedBatch, Unpadded, pack, unpad

__all__ = ["PackedBatch", "Unpadded", "pack", "unpad"]
