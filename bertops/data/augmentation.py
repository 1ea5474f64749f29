"""Variants of a text for distillation: TinyBERT's and Tang's, each a function of (seed, number) alone."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bertops.data._host import check_seed
from bertops.data.text import word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Candidates = Callable[[list[str]], list[list[str]]]  # for each word of a text, what may stand in its place
Tagger = Callable[[list[str]], list[str]]  # the part of speech of each word of a text

NUM_CANDIDATES = 15


class TinyBertAugmentation:
    """Every word is replaced with probability p by one of its candidates, all equally likely.

    The paper takes the candidates of a word that is one token from BERT's masked language model
    (:class:`bertops.distill.masked_words.MaskedWords`) and those of other words from GloVe; without them the
    teacher's word vectors serve for both (:class:`NearestWords`). The official code leaves out stop words and
    variants that it has already made.

    Args:
        candidates: gives up to 15 words for each word of a text; a word with none stays.
        p: the paper's p_t.
        seed: 64 bits.

    Source: Jiao et al. 2020 (TinyBERT), section 3.2 and algorithm 1.
    """

    def __init__(self, candidates: Candidates, *, p: float = 0.4, seed: int = 0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.candidates, self.p, self.seed = candidates, p, check_seed(seed)

    def __call__(self, text: str, number: int) -> str:
        """The variant ``number`` of a text, words apart by a space."""
        generator = np.random.default_rng((self.seed, number))
        words = text.split()
        replaced = generator.random(len(words)) < self.p
        chosen = generator.random(len(words))
        for i, found in enumerate(self.candidates(words)):
            if replaced[i] and found:
                words[i] = found[int(chosen[i] * len(found))]
        return " ".join(words)


class TangAugmentation:
    """Words are masked or replaced, then perhaps only an n-gram of them is kept.

    Of every word, with u uniform in [0, 1): u < p_mask makes it the mask token; otherwise u < p_mask + p_pos
    makes it a word of the same part of speech, drawn by its frequency in the texts. Then, with probability
    p_ngram, n words in a row are kept, n uniform from 1 to 5. Without a tagger all words are of one part of
    speech.

    Args:
        texts: what frequencies are counted in.
        mask_token: such as ``[MASK]``.
        p_mask, p_pos, p_ngram: the paper's.
        tagger: gives the part of speech of each word of a text.
        seed: 64 bits.

    Source: Tang et al. 2019 (Distilling Task-Specific Knowledge from BERT), section 3.3.
    """

    def __init__(
        self,
        texts: Iterable[str],
        mask_token: str,
        *,
        p_mask: float = 0.1,
        p_pos: float = 0.1,
        p_ngram: float = 0.25,
        tagger: Tagger | None = None,
        seed: int = 0,
    ) -> None:
        for name, p in (("p_mask", p_mask), ("p_pos", p_pos), ("p_ngram", p_ngram), ("sum", p_mask + p_pos)):
            if not 0 <= p <= 1:
                raise ValueError(f"{name} of the probabilities must be in [0, 1], got {p}")
        self.mask_token, self.p_mask, self.p_pos, self.p_ngram = mask_token, p_mask, p_pos, p_ngram
        self.tagger: Tagger = tagger or (lambda words: [""] * len(words))
        self.seed = check_seed(seed)
        counts: dict[str, Counter[str]] = {}
        for text in texts:
            words = text.split()
            for word, tag in zip(words, self.tagger(words), strict=True):
                counts.setdefault(tag, Counter())[word] += 1
        self.words = {tag: list(count) for tag, count in counts.items()}
        self.cumulative = {tag: np.cumsum(list(count.values())) for tag, count in counts.items()}

    def __call__(self, text: str, number: int) -> str:
        """The variant ``number`` of a text, words apart by a space."""
        generator = np.random.default_rng((self.seed, number))
        words = text.split()
        actions, chosen = generator.random((2, len(words)))
        for i, tag in enumerate(self.tagger(words)):
            if actions[i] < self.p_mask:
                words[i] = self.mask_token
            elif actions[i] < self.p_mask + self.p_pos and tag in self.words:
                total = self.cumulative[tag]
                words[i] = self.words[tag][int(np.searchsorted(total, chosen[i] * total[-1], side="right"))]
        if words and generator.random() < self.p_ngram:
            length = min(int(generator.integers(1, 6)), len(words))
            first = int(generator.integers(len(words) - length + 1))
            words = words[first : first + length]
        return " ".join(words)


class NearestWords:
    """The words whose vectors have the highest cosine with a word's: GloVe's part in TinyBERT's augmentation.

    Args:
        vectors: (vocab_size, E), such as a teacher's word table.
        tokenizer: of its rows. A word's vector is the mean of its tokens'; candidates are the tokens that
            are whole words of letters.
        count: candidates of a word.
    """

    def __init__(
        self, vectors: NDArray[np.float32], tokenizer: "Tokenizer", count: int = NUM_CANDIDATES
    ) -> None:
        self.vectors, self.tokenizer, self.count = vectors, tokenizer, count
        self.ids, self.words = whole_words(tokenizer)
        self.table = _unit(vectors[self.ids])
        self._found: dict[str, list[str]] = {}

    def __call__(self, words: list[str]) -> list[list[str]]:
        return [self.nearest(word) for word in words]

    def nearest(self, word: str) -> list[str]:
        """From the nearest on, the word itself left out; none for what is not made of letters."""
        if word not in self._found:
            ids = self.tokenizer.encode(word, add_special_tokens=False).ids
            cosine = self.table @ _unit(self.vectors[ids].mean(0)) if word.isalpha() and ids else np.empty(0)
            order = np.argsort(-cosine, kind="stable")[: self.count + 1]
            nearest = [self.words[i] for i in order if self.words[i].lower() != word.lower()]
            self._found[word] = nearest[: self.count]
        return self._found[word]


def whole_words(tokenizer: "Tokenizer") -> tuple[list[int], list[str]]:
    """The tokens that are words of letters: their ids, and the words."""
    starts = word_starts(tokenizer)
    found = [(i, (tokenizer.id_to_token(i) or "").lstrip("Ġ▁")) for i in range(len(starts)) if starts[i]]
    words = [(i, word) for i, word in found if word.isalpha()]
    return [i for i, _ in words], [word for _, word in words]


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
