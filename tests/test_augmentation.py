"""TinyBERT's and Tang's variants of a text: rates, candidates, and what they are a function of."""

from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bertops.data.augmentation import NearestWords, TangAugmentation, TinyBertAugmentation
from bertops.distill.masked_words import MaskedWords
from bertops.models import BertForMaskedLM
from small_task import CONFIG, VOCABULARY, write_tokenizer

TEXT = " ".join(f"w{i}" for i in range(50))


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_variants_are_a_function_of_seed_and_number():
    for make in (
        lambda seed: TinyBertAugmentation(lambda words: [["x", "y"]] * len(words), seed=seed),
        lambda seed: TangAugmentation([TEXT], "[MASK]", seed=seed),
    ):
        first, again, other = make(0), make(0), make(1)
        assert [again(TEXT, i) for i in (2, 1, 0)] == [first(TEXT, i) for i in (2, 1, 0)]
        assert len({first(TEXT, i) for i in range(9)}) > 5 and first(TEXT, 0) != other(TEXT, 0)


def test_tinybert_replaces_four_words_in_ten_by_their_own_candidates():
    candidates = [[f"{i}a", f"{i}b"] for i in range(49)] + [[]]
    augment = TinyBertAugmentation(lambda words: candidates)
    count = Counter()
    for number in range(400):
        for i, word in enumerate(augment(TEXT, number).split()):
            assert word in (f"w{i}", *candidates[i])
            count[word[-1] if word != f"w{i}" else "kept", i == 49] += 1
    replaced = count["a", False] + count["b", False]
    assert abs(replaced / (49 * 400) - 0.4) < 0.02 and abs(count["a", False] / replaced - 0.5) < 0.03
    assert count["kept", True] == 400


def test_tang_masks_replaces_and_keeps_n_grams():
    augment = TangAugmentation(["common common common rare"], "[MASK]", seed=1)
    count, lengths = Counter(), Counter()
    for number in range(400):
        words = augment(TEXT, number).split()
        lengths[len(words)] += 1
        if len(words) == 50:
            count.update(word if word[0] != "w" else "kept" for word in words)
    total = sum(count.values())
    assert abs(lengths[50] / 400 - 0.75) < 0.06 and set(lengths) == {1, 2, 3, 4, 5, 50}
    assert abs(count["[MASK]"] / total - 0.1) < 0.02
    assert abs((count["common"] + count["rare"]) / total - 0.1) < 0.02
    assert abs(count["common"] / (count["common"] + count["rare"]) - 0.75) < 0.06


def test_tang_with_a_tagger_keeps_parts_of_speech():
    def tagger(words):
        return ["short" if len(word) < 4 else "long" for word in words]

    augment = TangAugmentation([TEXT, "longer words"], "[MASK]", p_mask=0, p_pos=1, p_ngram=0, tagger=tagger)
    assert {word for i in range(9) for word in augment("other than w3", i).split()[:1]} == {"longer", "words"}
    assert augment("w1 w2 w3", 0) != "w1 w2 w3" and "longer" not in augment("w1 w2 w3", 0)


def test_nearest_words_by_cosine(tokenizer):
    vectors = np.random.default_rng(0).normal(size=(len(VOCABULARY), 8)).astype(np.float32)
    film, good, cold = (VOCABULARY.index(word) for word in ("film", "good", "cold"))
    vectors[good] = 3 * vectors[film] + 0.01
    vectors[cold] = vectors[film] + 0.2 * vectors[cold]
    nearest = NearestWords(vectors, tokenizer, 3)
    assert nearest.nearest("film")[:2] == ["good", "cold"] and len(nearest.nearest("film")) == 3
    words = {word for word in VOCABULARY if word.isalpha()}
    assert words.issuperset(nearest.nearest("warmly")) and nearest(["3.5", "."]) == [[], []]


def test_masked_words_are_the_models_own(tokenizer):
    model = BertForMaskedLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    nearest = NearestWords(model.encoder.embeddings.word.weight.detach().numpy(), tokenizer, 9)
    proposed = MaskedWords(model, tokenizer, nearest, 9)(["warmly", "film", "."])
    tokens = [VOCABULARY.index(word) for word in ("warm", "##ly", "film")]
    unknown = VOCABULARY.index("[UNK]")
    row = torch.tensor([[2, *tokens, unknown, 3, *tokens, unknown, 3]])
    row[0, 3] = VOCABULARY.index("[MASK]")
    types = torch.tensor([[0] * 6 + [1] * 5])
    logits = model(row, token_type_ids=types).logits[0, 3]
    order = [VOCABULARY[i] for i in logits.argsort(descending=True).tolist()]
    expected = [word for word in order if word.isalpha() and word != "film"][:9]
    assert proposed == [nearest.nearest("warmly"), expected, []]
