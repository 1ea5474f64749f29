"""Host side of the data path: files and numpy in, lists and numpy out, no torch."""

from bertops.data.blocks import SentenceBlocks
from bertops.data.corpus import TokenCorpus, encode_corpus, load_corpus
from bertops.data.examples import Sequences
from bertops.data.masking import DynamicMasker, Masked
from bertops.data.packing import PackedBatch, Unpadded, pack, unpad
from bertops.data.segment_pairs import NextSentencePairs, SentenceOrderPairs, SentencePairs
from bertops.data.stream import PretrainingStream
from bertops.data.task import Task, TaskTexts, read_task
from bertops.data.text import (
    SpecialTokens,
    read_documents,
    special_tokens,
    train_tokenizer,
    word_starts,
)
from bertops.data.tsv import LabelledTexts, read_tsv

__all__ = [
    "DynamicMasker",
    "LabelledTexts",
    "Masked",
    "NextSentencePairs",
    "PackedBatch",
    "PretrainingStream",
    "SentenceBlocks",
    "SentenceOrderPairs",
    "SentencePairs",
    "Sequences",
    "SpecialTokens",
    "Task",
    "TaskTexts",
    "TokenCorpus",
    "Unpadded",
    "encode_corpus",
    "load_corpus",
    "pack",
    "read_documents",
    "read_task",
    "read_tsv",
    "special_tokens",
    "train_tokenizer",
    "unpad",
    "word_starts",
]
