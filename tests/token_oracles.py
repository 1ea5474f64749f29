"""Masking, packing and pairing in plain Python, drawing the same Philox words as the compiled code."""

import math
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np

from bertops.data import SpecialTokens, TokenCorpus

MASKING, SENTENCE_ORDER, PERMUTATION, NEXT_SENTENCE = 1, 2, 3, 4
WORD = 2**32
SPECIAL = SpecialTokens(cls_token_id=2, sep_token_id=3, pad_token_id=0, mask_token_id=4, unk_token_id=1)


def philox(seed, counter):
    """Philox4x32-10 of four counter words."""
    keys = [seed % WORD, seed >> 32]
    words = list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ keys[0],
            second % WORD,
            (first >> 32) ^ words[3] ^ keys[1],
            first % WORD,
        ]
        keys = [(keys[0] + 0x9E3779B9) % WORD, (keys[1] + 0xBB67AE85) % WORD]
    return words


class Draws:
    """The words of one example, one after the other."""

    def __init__(self, seed, purpose, epoch, index):
        self.seed, self.tail = seed, [index % WORD, index // WORD + purpose * 2**24, epoch]
        self.block, self.words = 0, []

    def next(self):
        if not self.words:
            self.words = philox(self.seed, [self.block, *self.tail])
            self.block += 1
        return self.words.pop(0)

    def below(self, limit):
        return math.floor(Fraction(self.next(), WORD) * limit)

    def chance(self, probability):
        return self.next() < round(probability * WORD)


def permutation(count, seed, epoch):
    draws, order = Draws(seed, PERMUTATION, epoch, 0), list(range(count))
    for i in range(count):
        j = i + draws.below(count - i)
        order[i], order[j] = order[j], order[i]
    return order


def words_of(ids, special, starts, real, mask_special):
    """Positions of every word that may be masked; runs of words without a gap, as numbers of words."""
    words, runs = [], []
    gap, after_special = True, True
    for i, token in enumerate(ids):
        if not real[i] or (token in special and not mask_special):
            gap = after_special = True
            continue
        if starts is None or starts[token] or token in special or after_special:
            if gap:
                runs.append([])
            runs[-1].append(len(words))
            words.append([i])
        else:
            words[-1].append(i)
        gap, after_special = False, token in special
    return words, runs


def mask_tokens(
    ids,
    index,
    epoch,
    *,
    vocab_size,
    mask_token_id,
    special,
    mask_prob=0.15,
    seed=0,
    ngram=1,
    starts=None,
    max_predictions=None,
    mask_special=False,
    replace=(0.8, 0.1),
    real=None,
):
    """One sequence: ids and labels."""
    draws = Draws(seed, MASKING, epoch, index)
    words, runs = words_of(ids, special, starts, real or [True] * len(ids), mask_special)
    end_of_run = {word: run[-1] + 1 for run in runs for word in run}
    replacements = [token for token in range(vocab_size) if token not in special]
    share = Fraction(round(mask_prob * WORD), WORD)
    wanted = math.floor(share * sum(map(len, words)) + Fraction(draws.next(), WORD))
    if max_predictions is not None:
        wanted = min(wanted, max_predictions)
    ids, labels = list(ids), [-100] * len(ids)
    order = list(range(len(words)))
    masked = 0
    for i in range(len(order)):
        if masked >= wanted:
            break
        j = i + draws.below(len(order) - i)
        order[i], order[j] = order[j], order[i]
        word = order[i]
        n = 1
        if ngram > 1:
            longest = min(ngram, end_of_run[word] - word)
            multiple = math.lcm(*range(1, ngram + 1))
            tickets = [size for size in range(1, longest + 1) for _ in range(multiple // size)]
            n = tickets[draws.below(len(tickets))]
        while n and masked + sum(map(len, words[word : word + n])) > wanted:
            n -= 1
        chosen = [position for w in words[word : word + n] for position in w]
        if any(labels[position] != -100 for position in chosen):
            continue
        for position in chosen:
            labels[position] = ids[position]
            action = draws.next()
            if action < round(replace[0] * WORD):
                ids[position] = mask_token_id
            elif action < round(replace[0] * WORD) + round(replace[1] * WORD):
                ids[position] = replacements[draws.below(len(replacements))]
        masked += len(chosen)
    return ids, labels


def documents_of(corpus):
    """The corpus as a list of documents of lines of ids."""
    lines = [corpus.tokens[a:b].tolist() for a, b in pairwise(corpus.line_offsets)]
    return [lines[a:b] for a, b in pairwise(corpus.document_offsets)]


def corpus_of(documents):
    lines = [line for document in documents for line in document]
    return TokenCorpus(
        np.array([token for line in lines for token in line], np.int32),
        np.cumsum([0, *map(len, lines)], dtype=np.int64),
        np.cumsum([0, *map(len, documents)], dtype=np.int64),
    )


def drawn_corpus(seed, documents, most_lines=8, most_tokens=12, vocab_size=50):
    """Lines of random ids from 5 on."""
    rng = np.random.default_rng(seed)
    return corpus_of(
        [
            [
                rng.integers(5, vocab_size, rng.integers(1, most_tokens + 1)).tolist()
                for _ in range(rng.integers(1, most_lines + 1))
            ]
            for _ in range(documents)
        ]
    )


def render(parts, separate_lines):
    """A block of (document, tokens) pieces with its special tokens."""
    row, before = [SPECIAL.cls_token_id], None
    for document, tokens in parts:
        if before is not None and before != document:
            row.append(SPECIAL.sep_token_id)
        row += tokens
        if separate_lines:
            row.append(SPECIAL.sep_token_id)
        before = document
    return row if separate_lines else [*row, SPECIAL.sep_token_id]


def pack_blocks(documents, length, separate_lines, within_documents):
    """Every block as ids: lines go to the last block where the block with them is not too long."""
    blocks = []
    for number, document in enumerate(documents):
        for i, line in enumerate(document):
            fresh = not blocks or (within_documents and i == 0)
            if not fresh and len(render([*blocks[-1], (number, line)], separate_lines)) <= length:
                blocks[-1].append((number, line))
                continue
            rest = line
            while rest:
                most = length - len(render([(number, [])], separate_lines))
                blocks.append([(number, rest[:most])])
                rest = rest[most:]
    return [render(parts, separate_lines) for parts in blocks]


def sentence_pairs(documents, length, *, seed, epoch, short_prob=0.1, random_segments=False):
    """(A, B, label) of every pair, as ids."""
    most, pairs = length - 3, []
    for number, document in enumerate(documents):
        draws = Draws(seed, SENTENCE_ORDER, epoch, number)
        chunk = []
        for i, line in enumerate(document):
            if not chunk:
                target = 2 + draws.below(most - 1) if draws.chance(short_prob) else most
            chunk.append(line)
            enough = sum(map(len, chunk)) >= target and (len(chunk) > 1 or random_segments)
            if not enough and i < len(document) - 1:
                continue
            if len(chunk) > 1:
                cut = 1 + draws.below(len(chunk) - 1)
                a, b = list(chain(*chunk[:cut])), list(chain(*chunk[cut:]))
                label = int(draws.chance(0.5))
                if label:
                    a, b = b, a
                pairs.append((*truncate(a, b, most, draws), label))
            elif random_segments:
                a = list(line)
                b = random_segment(documents, number, target - len(a), draws)
                pairs.append((*truncate(a, b, most, draws), 1))
            chunk = []
    return pairs


def next_sentence_pairs(documents, length, *, seed, epoch, short_prob=0.1):
    """The same for the next sentence, after the loop of BERT's code, which goes back by what was not used."""
    most, pairs = length - 3, []
    for number, document in enumerate(documents):
        draws = Draws(seed, NEXT_SENTENCE, epoch, number)
        i, chunk = 0, []
        while i < len(document):
            if not chunk:
                target = 2 + draws.below(most - 1) if draws.chance(short_prob) else most
            chunk.append(document[i])
            if i == len(document) - 1 or sum(map(len, chunk)) >= target:
                cut = 1 if len(chunk) == 1 else 1 + draws.below(len(chunk) - 1)
                a, b, label = list(chain(*chunk[:cut])), list(chain(*chunk[cut:])), 0
                if len(chunk) == 1 or draws.chance(0.5):
                    b, label = random_segment(documents, number, target - len(a), draws), 1
                    i -= len(chunk) - cut
                pairs.append((*truncate(a, b, most, draws), label))
                chunk = []
            i += 1
    return pairs


def random_segment(documents, number, wanted, draws):
    """Lines of another document, from one drawn on."""
    others = [other for n, other in enumerate(documents) if n != number]
    other, segment = others[draws.below(len(others))], []
    for line in other[draws.below(len(other)) :]:
        segment += line
        if len(segment) >= wanted:
            break
    return segment


def truncate(a, b, most, draws):
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if draws.chance(0.5) else -1)
    return a, b
