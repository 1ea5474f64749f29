"""The student of Tang et al. 2019: a bidirectional LSTM over word vectors, for one sentence or a pair."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bertops.models.checkpoint import CONFIG, read_json, read_tensors, resolve_folder, write_folder
from bertops.ops import _checks
from bertops.reference import sequence_positions

CHANNELS = ("single", "multi")
MODEL_TYPE = "bertops-bilstm"
LABEL_NAMES = ("id2label", "label2id")


@dataclass(frozen=True)
class BiLSTMConfig:
    """Sizes of a :class:`BiLSTMClassifier`; the defaults are those of the paper's 300-d word vectors.

    Args:
        vocab_size: rows of the word table.
        embedding_size: width E of the word vectors.
        hidden_size: width h of the LSTM in each direction: 150 or 300 in the paper.
        dense_size: width of the layer between the sentence and the logits.
        num_labels: outputs; 1 for a regression.
        pair: the input is two sentences, each read by the same LSTM.
        channels: ``single``: one word table, which learns. ``multi``: a second one beside it, which does not;
            the LSTM reads both, 2 E wide.
        dropout_p: dropout before the logits.
        pad_token_id: id whose vector is 0 and stays so, None for none.

    Raises:
        ValueError: ``channels`` is unknown, a size is below 1, or ``pad_token_id`` is no row of the table.
    """

    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 150
    dense_size: int = 200
    num_labels: int = 2
    pair: bool = False
    channels: str = "multi"
    dropout_p: float = 0.1
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        if self.channels not in CHANNELS:
            raise ValueError(f"channels must be one of {', '.join(CHANNELS)}, got {self.channels!r}")
        for name in ("vocab_size", "embedding_size", "hidden_size", "dense_size", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size = {self.vocab_size}, got {self.pad_token_id}"
            )


@dataclass
class BiLSTMOutput:
    """What a :class:`BiLSTMClassifier` returns."""

    logits: Tensor  # (number of sequences, num_labels)
    features: Tensor  # what the dense layer takes: (number of sequences, 2 h), 8 h for a pair


class BiLSTMClassifier(nn.Module):
    """Word vectors, one bidirectional LSTM, a dense layer with ReLU, dropout, logits.

    A sentence is the last hidden state of both directions, [forward, backward] (2 h): that behind its last
    word, and that before its first, wherever padding stands. A sentence without a word is 0. A pair is
    ``[a, b, |a - b|, a * b]`` (8 h) of its two sentences.

    Args:
        config: sizes.
        vectors: (vocab_size, embedding_size), where the word tables start: word2vec's or GloVe's, or a
            teacher's ``encoder.embeddings.word.weight`` for a student that reads the teacher's tokens. They
            are copied. Without them a table starts from N(0, 0.1).

    The word table that learns is ``word``; with ``channels="multi"`` the other is ``static_word``, a buffer.

    Raises:
        ValueError: ``vectors`` is of another shape or no floating-point tensor.

    Source: Tang et al. 2019 (Distilling Task-Specific Knowledge from BERT into Simple Neural Networks),
    section 3.1; two channels of word vectors come from Kim 2014.
    """

    static_word: Tensor | None

    def __init__(self, config: BiLSTMConfig, *, vectors: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.embedding_size)
        if vectors is None:
            vectors = torch.randn(shape) * 0.1
        if tuple(vectors.shape) != shape or not vectors.is_floating_point():
            raise ValueError(
                f"vectors must be floating-point of shape (vocab_size, embedding_size) = {shape}, "
                f"got {_checks.describe(vectors)}"
            )
        # on the default device, which is meta while a checkpoint is read
        table = torch.empty(shape).copy_(vectors.detach())
        if config.pad_token_id is not None:
            table[config.pad_token_id] = 0
        self.word = nn.Embedding(*shape, padding_idx=config.pad_token_id, _weight=table)
        several = config.channels == "multi"
        self.register_buffer("static_word", table.clone() if several else None)
        width = config.embedding_size * (2 if several else 1)
        self.lstm = nn.LSTM(width, config.hidden_size, bidirectional=True)
        self.dense = nn.Linear(config.hidden_size * (8 if config.pair else 2), config.dense_size)
        self.dropout = nn.Dropout(config.dropout_p)
        self.classifier = nn.Linear(config.dense_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        pair_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pair_cu_seqlens: Tensor | None = None,
    ) -> BiLSTMOutput:
        """Classifies a padded batch or packed rows; only real tokens cost anything.

        Args:
            input_ids: (B, N), int64 or int32.
            mask: (B, N), bool or integer, true for a real token, in any pattern; all are real without it.
            pair_ids, pair_mask: the second sentences (B, N2) of a model with ``config.pair``.
            cu_seqlens: int32 (number of sequences + 1): the sequences stand end to end in B = 1. Excludes
                ``mask``.
            pair_cu_seqlens: the same of ``pair_ids``.

        Raises:
            ValueError, TypeError: an argument does not fit, or an id has no row in the word table (looked at
                on the CPU). Names the argument.

        Reads the lengths back from the device, as ``torch.nn.LSTM`` wants them on the host.
        """
        if self.config.pair != (pair_ids is not None):
            expected = "given" if self.config.pair else "None"
            raise ValueError(f"pair_ids must be {expected} where config.pair is {self.config.pair}")
        ids, lengths = self._real_tokens(input_ids, mask, cu_seqlens)
        if pair_ids is None:
            features = self.encode(ids, lengths)
        else:
            try:
                second_ids, second_lengths = self._real_tokens(pair_ids, pair_mask, pair_cu_seqlens)
            except (TypeError, ValueError) as error:
                raise type(error)(f"of pair_ids, pair_mask and pair_cu_seqlens: {error}") from None
            if len(second_lengths) != len(lengths):
                raise ValueError(
                    f"pair_ids must hold as many sequences as input_ids, {len(lengths)}, "
                    f"got {len(second_lengths)}"
                )
            both = self.encode(torch.cat([ids, second_ids]), torch.cat([lengths, second_lengths]))
            first, second = both.chunk(2)
            features = torch.cat([first, second, (first - second).abs(), first * second], dim=1)
        logits = self.classifier(self.dropout(self.dense(features).relu()))
        return BiLSTMOutput(logits=logits, features=features)

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Sentences of ``lengths`` (S,), their ``ids`` (T,) laid end to end, to (S, 2 h)."""
        sentences = self.word.weight.new_zeros(len(lengths), 2 * self.config.hidden_size)
        filled = lengths.nonzero().squeeze(1)
        if len(filled) == 0:
            return sentences
        vectors = self.word(ids)
        if self.static_word is not None:
            vectors = torch.cat([F.embedding(ids, self.static_word), vectors], dim=1)
        _, (last, _) = self.lstm(pack_vectors(vectors, lengths[filled]))
        last = last.transpose(0, 1).flatten(1)  # (filled sentences, 2 h)
        return sentences.to(last.dtype).index_copy(0, filled, last)

    def _real_tokens(
        self, input_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checks the arguments; returns the ids of all real tokens (T,) and the sentences' lengths (S,)."""
        _checks.check_ids(input_ids)
        _checks.check_rows(mask, cu_seqlens, input_ids[:, None, :, None])
        _checks.check_in_table("input_ids", input_ids, "word", self.word.weight)
        if cu_seqlens is not None:
            return input_ids[0], cu_seqlens.diff().long()
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
        return input_ids[real], real.sum(1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` for :meth:`from_pretrained`; the tensors first.

        The format is this package's: transformers has no such model. Both word tables are in it.

        Args:
            folder: made where it does not exist.

        Raises:
            ImportError: ``safetensors`` is missing.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_folder(Path(folder), tensors, {"model_type": MODEL_TYPE, **asdict(self.config)})

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> "BiLSTMClassifier":
        """What :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder_or_hub_id: a folder with ``config.json`` and ``model.safetensors``, or the id of one on the
                Hugging Face hub.
            dtype: of the parameters.
            changes: fields of :class:`BiLSTMConfig` to replace, such as ``dropout_p=0.0``.

        Raises:
            FileNotFoundError, ImportError: the files, or a package to read them, are missing; says which.
            ValueError: the folder holds another model, or its tensors do not fit; names them.
        """
        folder = resolve_folder(folder_or_hub_id)
        config = read_json(folder / CONFIG)
        if config.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"{folder} does not hold a {cls.__name__}: model_type must be {MODEL_TYPE!r}")
        for name in LABEL_NAMES:  # what the classes are called; the model need not know
            config.pop(name, None)
        with torch.device("meta"):
            model = cls(replace(BiLSTMConfig(**config), **changes))
        state = {name: tensor.to(dtype) for name, tensor in read_tensors(folder).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        came = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if came != expected:
            names = sorted(x for x in came | expected if came.get(x) != expected.get(x))
            problems = [f"{x} of shape {came.get(x)}, expected {expected.get(x)}" for x in names]
            raise ValueError(f"{folder} does not fit {cls.__name__}: " + "; ".join(problems))
        model.load_state_dict(state, assign=True)
        return model.eval()


def pack_vectors(vectors: Tensor, lengths: Tensor) -> PackedSequence:
    """``vectors`` (T, E), sequences of ``lengths`` (all above 0) laid end to end, as an LSTM reads them.

    An LSTM runs through the words in step, so the first words of all sequences come first, the longest
    sequence's at the head.
    """
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    sequence, position = sequence_positions(len(vectors), F.pad(lengths.cumsum(0), (1, 0)))
    place = (position * len(lengths) + rank[sequence]).argsort()
    steps = torch.arange(int(sorted_lengths[0]), device=lengths.device)
    batch_sizes = (sorted_lengths > steps[:, None]).sum(1).cpu()
    return PackedSequence(vectors[place], batch_sizes, order, rank)
