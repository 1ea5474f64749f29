"""Reference models that run on the package's ops and load Hugging Face checkpoints.

model = BertModel.from_pretrained("path/to/folder")
output = model(input_ids, mask)                # padded (B, N)
output = model(input_ids, mask, unpad=True)    # the same numbers, at the cost of the real tokens
output = model(packed_ids, cu_seqlens=cu_seqlens)  # rows packed by bertops.data.pack
"""

from bertops.models.bert import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EncoderOutput,
    HeadOutput,
)
from bertops.models.config import BertConfig
from bertops.models.fastbert import ExitClassifier, FastBert, FastBertOutput

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertModel",
    "EncoderOutput",
    "ExitClassifier",
    "FastBert",
    "FastBertOutput",
    "HeadOutput",
]
