"""Masking of tokens for masked language modelling, as a function of (seed, epoch, index) alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertops.data._host import MAX_TOKENS, check_epoch, check_range, check_seed, host, integers, rate

IGNORED = -100  # label of a token that is not predicted


class Masked(NamedTuple):
    """What a masker returns; both have the shape of the input."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]  # the token that stood there, or -100


class DynamicMasker:
    """Chooses the tokens to predict, anew in every epoch, and replaces them.

    Of a sequence with n tokens that may be masked, ``int(mask_prob * n + u)`` are, u uniform in [0, 1):
    without bias at any length. They are drawn without replacement; of those drawn, 80 % become the mask
    token, 10 % any token that is not special, 10 % stay. With ``word_starts`` whole words are drawn, with
    ``ngram`` also up to that many words in a row, p(n) proportional to 1/n among those that follow without
    a special token or padding between; the rates hold for each token. A word or n-gram that would exceed
    the number wanted is shortened by words, or left out: then some fewer tokens are masked. An n-gram that
    meets a masked word is left out.

    The masks are a function of (seed, epoch, index of the sequence) and of the sequence: neither the batch,
    nor the order, nor the number of workers shows in them. Masks that never change (static masking) are
    those of a fixed epoch.

    RoBERTa: the defaults; the official code also masks ``<s>`` and ``</s>`` (``mask_special=True``).
    ALBERT: ``ngram=3`` with ``word_starts``, and ``max_predictions=20`` as the official code, which counts
    special tokens into n, rounds instead of drawing, masks one token at least, and lets an n-gram reach
    over a separator.

    Sources: Liu et al. 2019 (RoBERTa), section 4.1, and fairseq; Lan et al. 2020 (ALBERT), section 4.1, and
    its code.

    Args:
        vocab_size: ids are in [0, vocab_size).
        mask_token_id: what replaces a token.
        special_ids: ids that are never masked and never a replacement; padding and the mask token are among
            them.
        mask_prob: share of the tokens to predict, in [0, 1].
        seed: 64 bits.
        ngram: longest run of words (of tokens without ``word_starts``) masked together, 1 to 10.
        word_starts: (vocab_size,) bool, true for a token that starts a word, as
            ``bertops.data.word_starts`` makes it; None masks single tokens. The first token after a special
            one always starts a word.
        max_predictions: most tokens to predict in a sequence; None for any number.
        mask_special: special tokens may be masked too (not padding: give ``mask``), each a word of its own.
        mask_replace_prob, random_replace_prob: of a token drawn, to become the mask token or a random one.

    Raises:
        ValueError, TypeError: an argument outside what is said above.
        ImportError: the compiled module is missing; says how to build it.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int,
        special_ids: Sequence[int],
        mask_prob: float = 0.15,
        seed: int = 0,
        *,
        ngram: int = 1,
        word_starts: ArrayLike | None = None,
        max_predictions: int | None = None,
        mask_special: bool = False,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> None:
        check_range("vocab_size", vocab_size, 1, MAX_TOKENS)
        check_range("mask_token_id", mask_token_id, 0, vocab_size - 1)
        special = np.zeros(vocab_size, bool)
        for token_id in special_ids:
            special[check_range("special_ids", token_id, 0, vocab_size - 1)] = True
        if special.all():
            raise ValueError("special_ids must leave some of the vocabulary, got all of it")
        starts = np.empty(0, bool) if word_starts is None else np.asarray(word_starts)
        if word_starts is not None and (starts.shape != (vocab_size,) or starts.dtype != np.bool_):
            raise ValueError(
                f"word_starts must be bool of shape ({vocab_size},), got {starts.dtype} of {starts.shape}"
            )
        rates = [
            rate("mask_replace_prob", mask_replace_prob),
            rate("random_replace_prob", random_replace_prob),
        ]
        if sum(rates) > 2**32:
            raise ValueError(
                "mask_replace_prob and random_replace_prob must add up to at most 1, got "
                f"{mask_replace_prob} and {random_replace_prob}"
            )
        if max_predictions is not None:
            check_range("max_predictions", max_predictions, 0, MAX_TOKENS)
        self._settings = {
            "mask_token_id": mask_token_id,
            "special": special,
            "word_starts": starts,
            "seed": check_seed(seed),
            "mask_rate": rate("mask_prob", mask_prob),
            "mask_replace_rate": rates[0],
            "random_replace_rate": rates[1],
            "mask_special": mask_special,
            "ngram": check_range("ngram", ngram, 1, host().MAX_NGRAM),
            "max_predictions": -1 if max_predictions is None else max_predictions,
        }
        self._masker = host().Masker(**self._settings)

    def __getstate__(self) -> dict[str, Any]:  # for data loaders that send it to their workers
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._masker = host().Masker(**settings)

    def __call__(
        self,
        input_ids: ArrayLike,
        indices: ArrayLike,
        epoch: int = 0,
        *,
        mask: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
    ) -> Masked:
        """Masks a batch: one call of compiled code, without the interpreter's lock.

        Args:
            input_ids: (B, N), or (T,) with ``cu_seqlens``; integers; left as they are.
            indices: (B,), the number of each sequence in its data set, from 0 to 2^56 - 1.
            epoch: from 0 to 2^32 - 1; a fixed one gives static masking.
            mask: (B, N), true for a real token; others are never masked. May be left out where padding is
                among the special ids and those are not masked.
            cu_seqlens: (B + 1,), the offset of every sequence of a packed batch, from 0 to T.

        Raises:
            ValueError: another shape, ids outside the vocabulary, or an index or epoch outside its range.
            TypeError: not integers.
        """
        ids = np.asarray(input_ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"input_ids must hold integers, got {ids.dtype}")
        if ids.ndim != (2 if cu_seqlens is None else 1):
            raise ValueError(
                f"input_ids must have shape (B, N), or (T,) with cu_seqlens, got {ids.shape} "
                f"{'without' if cu_seqlens is None else 'with'} cu_seqlens"
            )
        offsets = _row_offsets(ids.shape, cu_seqlens)
        index = integers("indices", indices)
        if len(index) != len(offsets) - 1:
            raise ValueError(
                f"indices must number the {len(offsets) - 1} sequences of input_ids, got {len(index)}"
            )
        if index.size and not (index.min() >= 0 and index.max() < host().INDEX_LIMIT):
            raise ValueError(f"indices must lie in [0, 2^56), got {index.min()} to {index.max()}")
        real = None
        if mask is not None:
            real = np.asarray(mask)
            if real.shape != ids.shape or cu_seqlens is not None:
                raise ValueError(
                    f"mask must have the shape {ids.shape} of input_ids, without cu_seqlens, got {real.shape}"
                )
            real = real != 0
        flat = np.array(ids, np.int64, order="C").reshape(-1)  # a copy, masked in place
        labels = self._masker.mask(flat, real, offsets, index, check_epoch(epoch))
        return Masked(flat.reshape(ids.shape), labels.reshape(ids.shape))


def _row_offsets(shape: tuple[int, ...], cu_seqlens: ArrayLike | None) -> NDArray[np.int64]:
    if cu_seqlens is None:
        rows, length = shape
        check_range("the length of input_ids", length, 0, MAX_TOKENS)
        return np.arange(rows + 1, dtype=np.int64) * length
    offsets = integers("cu_seqlens", cu_seqlens)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != shape[0] or (np.diff(offsets) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens of input_ids, got {offsets}")
    return offsets
