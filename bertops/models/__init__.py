"""Reference models that run on the package's ops and load Hugging Face checkpoints.

model = BertModel.from_pretrained("path/to/folder")
output = model(input_ids, mask)                # padded (B, N)
output = model(input_ids, mask, unpad=True)    # the same numbers, at the cost of the real tokens
output = model(packed_ids, cu_seqlens=cu_seqlens)  # rows packed by bertops.data.pack
model.save_pretrained("folder")                # for transformers, and for us
"""

from bertops.models.albert import (
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForSequenceClassification,
    AlbertModel,
    PreTrainingOutput,
)
from bertops.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from bertops.models.bilstm import BiLSTMClassifier, BiLSTMConfig, BiLSTMOutput
from bertops.models.config import AlbertConfig, BertConfig, MobileBertConfig
from bertops.models.encoder import EncoderOutput
from bertops.models.fastbert import ExitClassifier, FastBert, FastBertOutput
from bertops.models.heads import HeadOutput
from bertops.models.mobilebert import (
    MobileBertForMaskedLM,
    MobileBertForNextSentencePrediction,
    MobileBertForPreTraining,
    MobileBertForSequenceClassification,
    MobileBertModel,
    MobileBertPreTrainingOutput,
)

__all__ = [
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForPreTraining",
    "AlbertForSequenceClassification",
    "AlbertModel",
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertModel",
    "BiLSTMClassifier",
    "BiLSTMConfig",
    "BiLSTMOutput",
    "EncoderOutput",
    "ExitClassifier",
    "FastBert",
    "FastBertOutput",
    "HeadOutput",
    "MobileBertConfig",
    "MobileBertForMaskedLM",
    "MobileBertForNextSentencePrediction",
    "MobileBertForPreTraining",
    "MobileBertForSequenceClassification",
    "MobileBertModel",
    "MobileBertPreTrainingOutput",
    "PreTrainingOutput",
]
