"""The published sizes: parameters and FLOPs are those of the papers' models."""

import pytest
import torch

from bertops.early_exit.flops import encoder_flops
from bertops.models import (
    BertModel,
    BiLSTMClassifier,
    BiLSTMConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    MobileBertModel,
    sizes,
)

PARAMETERS = {
    "BERT_BASE": 109_482_240,
    "BERT_LARGE": 335_141_888,
    "DISTILBERT": 66_362_880,
    "PKD_6": 66_955_008,
    "PKD_3": 45_691_392,
    "TINYBERT_6": 66_955_008,
    "TINYBERT_4": 14_350_248,
    "MINILM_12X384": 33_360_000,
    "MINILM_6X384": 22_713_216,
    "MINILM_6X768": 66_955_008,
    "MOBILEBERT": 24_581_888,
    "MOBILEBERT_TINY": 15_485_696,
    "IB_BERT": 294_467_840,
}
GFLOP = {
    "BERT_BASE": 22.35,
    "DISTILBERT": 11.17,
    "PKD_3": 5.59,
    "TINYBERT_4": 1.25,
    "MINILM_12X384": 5.74,
    "MINILM_6X384": 2.87,
    "MOBILEBERT": 5.39,
    "MOBILEBERT_TINY": 3.07,
}


def built(name):
    config = getattr(sizes, name)
    with torch.device("meta"):
        return (MobileBertModel if isinstance(config, MobileBertConfig) else BertModel)(config)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert count(built(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", GFLOP)
def test_flops_of_128_tokens(name):
    assert round(encoder_flops(built(name), 128) / 1e9, 2) == GFLOP[name]


def test_all_sizes_are_tested():
    assert {name for name in vars(sizes) if name.isupper()} == PARAMETERS.keys()


def test_head_dims():
    dims = {name: c.hidden_size // c.num_attention_heads for name, c in vars(sizes).items() if name.isupper()}
    assert (dims["TINYBERT_4"], dims["MINILM_6X384"], dims["BERT_LARGE"]) == (26, 32, 64)
    layers = [built(name).layers[0].attention for name in ("MOBILEBERT", "IB_BERT")]
    assert [x.proj.in_features // x.num_heads for x in layers] == [32, 256]


def test_mobilebert_decoder_has_columns_of_its_own():
    with torch.device("meta"):
        model = MobileBertForMaskedLM(sizes.MOBILEBERT)
    assert model.decoder_weight().shape == (30522, 512)
    assert count(model.extra) == 30522 * 384


@pytest.mark.parametrize(("channels", "expected"), [("single", 603_002), ("multi", 963_002)])
def test_bilstm_without_its_word_tables(channels, expected):
    model = BiLSTMClassifier(BiLSTMConfig(vocab_size=10, channels=channels))
    assert count(model) - count(model.word) == expected
