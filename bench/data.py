"""``python -m bench.data``: tokens a second of the pretraining data path, on one core.

The corpus is drawn: Zipf-distributed ids, sentences of about 25 tokens, documents of about 20 sentences.
Masking alone counts all tokens of its rows, special ones and padding included, the rest those of the corpus.
The peer draws every token on its own (Bernoulli), from one generator for the whole batch.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from bench import paired
from bertops._files import write_whole
from bertops.cli import machine, positive
from bertops.data import (
    DynamicMasker,
    PretrainingStream,
    SentenceBlocks,
    SentenceOrderPairs,
    SpecialTokens,
    TokenCorpus,
)

OUT = Path(__file__).resolve().parent / "out" / "data"
CPU = torch.device("cpu")
VOCAB_SIZE, BATCH, LENGTH = 30_000, 64, 512
SPECIAL = SpecialTokens(cls_token_id=2, sep_token_id=3, pad_token_id=0, mask_token_id=4, unk_token_id=1)
SHARE_OF_STARTS = 0.75
PEER = "transformers"


@dataclass(frozen=True)
class Case:
    """One line of the table: what is timed, and the tokens of one call."""

    name: str
    tokens: int
    run: Callable[[], object]
    peer: Callable[[], object] | None = None


def drawn_corpus(num_tokens: int) -> TokenCorpus:
    rng = np.random.default_rng(0)
    lengths = 1 + rng.poisson(24, size=num_tokens // 20)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), num_tokens)]
    cuts = np.flatnonzero(rng.random(len(lengths) - 1) < 1 / 20) + 1
    words = np.minimum(rng.zipf(1.2, size=lengths.sum()), VOCAB_SIZE - len(SPECIAL))
    return TokenCorpus(
        (words + len(SPECIAL) - 1).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([[0], cuts, [len(lengths)]]).astype(np.int64),
    )


def transformers_masking() -> Callable[[torch.Tensor, torch.Tensor], object]:
    vocabulary = {f"token{i}": i for i in range(VOCAB_SIZE - 1)} | {"[MASK]": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="token1"))
    collator = DataCollatorForLanguageModeling(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]"), mlm_probability=0.15
    )
    return collator.torch_mask_tokens


def cases(corpus: TokenCorpus) -> Iterator[Case]:
    blocks = SentenceBlocks(corpus, LENGTH, SPECIAL)
    pairs = SentenceOrderPairs(corpus, LENGTH, SPECIAL)
    starts = np.random.default_rng(1).random(VOCAB_SIZE) < SHARE_OF_STARTS
    tokens = DynamicMasker(VOCAB_SIZE, SPECIAL.mask_token_id, SPECIAL)
    words = DynamicMasker(VOCAB_SIZE, SPECIAL.mask_token_id, SPECIAL, word_starts=starts)
    ngrams = DynamicMasker(VOCAB_SIZE, SPECIAL.mask_token_id, SPECIAL, word_starts=starts, ngram=3)

    indices = np.arange(BATCH)
    ids = blocks.gather(indices).input_ids
    as_tensor = torch.from_numpy(ids)
    special = (as_tensor < len(SPECIAL)).bool()
    theirs = transformers_masking()
    yield Case(
        "mask tokens",
        ids.size,
        lambda: tokens(ids, indices),
        lambda: theirs(as_tensor.clone(), special_tokens_mask=special),
    )
    yield Case("mask whole words", ids.size, lambda: words(ids, indices))
    yield Case("mask n-grams of words", ids.size, lambda: ngrams(ids, indices))

    def block_offsets() -> object:
        return SentenceBlocks(corpus, LENGTH, SPECIAL).offsets

    yield Case("find FULL-SENTENCES", corpus.num_tokens, block_offsets)
    order = np.random.default_rng(2).permutation(blocks.count())
    yield Case("gather FULL-SENTENCES", corpus.num_tokens, lambda: in_batches(blocks.gather, order))
    spans, _ = pairs.pairs(0)
    paired_tokens = int((spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]).sum())
    yield Case(
        "find sentence pairs",
        paired_tokens,
        lambda: SentenceOrderPairs(corpus, LENGTH, SPECIAL).pairs(0),
    )
    order_of_pairs = np.random.default_rng(2).permutation(pairs.count())
    yield Case("gather sentence pairs", paired_tokens, lambda: in_batches(pairs.gather, order_of_pairs))

    for name, examples, masker in (("RoBERTa", blocks, tokens), ("ALBERT", pairs, ngrams)):
        for layout in ("padded", "packed"):
            stream = PretrainingStream(
                examples, masker, BATCH, drop_last=False, packed=layout == "packed", static=True
            )
            real = corpus.num_tokens if examples is blocks else paired_tokens
            yield Case(f"{name} stream, {layout}", real, lambda stream=stream: exhaust(stream))


def in_batches(gather: Callable[[np.ndarray], object], order: np.ndarray) -> None:
    for first in range(0, len(order), BATCH):
        gather(order[first : first + BATCH])


def exhaust(stream: PretrainingStream) -> None:
    """An epoch, with its order and the pairs found anew."""
    if isinstance(stream.examples, SentenceOrderPairs):
        stream.examples = SentenceOrderPairs(stream.examples.corpus, LENGTH, SPECIAL)
    for _ in stream:
        pass


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    contestants = [paired.Contestant("bertops", lambda _: case.run())]
    if case.peer is not None:
        peer = case.peer
        contestants.append(paired.Contestant(PEER, lambda _: peer()))
    seconds = paired.run_rounds(contestants, paired.WallClock(CPU), budget_s=budget_s)
    rates = {name: case.tokens / paired.Spread.of(times).median for name, times in seconds.items()}
    ratio = paired.paired_ratio(seconds, PEER, "bertops").median if case.peer is not None else None
    return {"name": case.name, "tokens": case.tokens, "tokens_per_s": rates, "ratio": ratio}


def report(results: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':28}{'M tokens/s':>12}{PEER:>16}{'ratio':>8}"]
    for result in results:
        mine, theirs = result["tokens_per_s"]["bertops"], result["tokens_per_s"].get(PEER)
        others = f"{theirs / 1e6:16.1f}{result['ratio']:8.1f}" if theirs else ""
        lines.append(f"{result['name']:28}{mine / 1e6:12.1f}{others}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", type=positive, default=4_000_000, help="of the corpus (default %(default)s)"
    )
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds for each line (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where data.json goes (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(case, options.budget) for case in cases(drawn_corpus(options.tokens))]
    run = {
        "machine": machine(CPU),
        "batch": BATCH,
        "length": LENGTH,
        "vocab_size": VOCAB_SIZE,
        "results": results,
    }
    print(report(results))
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "data.json", json.dumps(run, indent=1).encode())
    print(f"wrote {options.out / 'data.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
