"""Random small models of transformers, what they save loaded by ours, and batches for both."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertops import models
from bertops.models.config import EncoderConfig, config_from_hf

transformers = pytest.importorskip("transformers")

RELATIVE_NORM = 1e-5
FAMILIES = ("bert", "roberta", "distilbert", "albert")
HEADS = ("", "ForSequenceClassification", "ForMaskedLM")
TOKENS = 40  # of the vocabulary; ids below 4 are left to special tokens
PADDINGS = ("none", "right", "left", "holes")


def hf_config(family: str, **changes):
    sizes = {"vocab_size": TOKENS, "max_position_embeddings": 32, "num_labels": 3, **changes}
    if family == "distilbert":
        return transformers.DistilBertConfig(dim=24, hidden_dim=40, n_layers=3, n_heads=3, **sizes)
    layers = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    types = {"type_vocab_size": 1 if family == "roberta" else 2}
    if family == "albert":
        return transformers.AlbertConfig(**{"embedding_size": 16, **layers, **types, **sizes})
    cls = transformers.RobertaConfig if family == "roberta" else transformers.BertConfig
    return cls(**{**layers, **types, **sizes})


def hf_model(family: str, head: str = "", **changes):
    """A transformers model with every parameter random, far enough from 0 to tell them apart."""
    name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "albert": "Albert"}[family]
    config = hf_config(family, **changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}{head or 'Model'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def our_class(family: str, head: str = ""):
    return getattr(models, f"{'Albert' if family == 'albert' else 'Bert'}{head or 'Model'}")


def our_config(family: str, **changes) -> EncoderConfig:
    return config_from_hf(hf_config(family, **changes).to_dict())


def our_model(family: str, head: str = "", **changes):
    """Ours with random parameters of its own."""
    return our_class(family, head)(our_config(family, **changes)).eval()


def both(family: str, folder: Path, head: str = "", **changes):
    """The transformers model and ours, loaded from what it saved."""
    theirs = hf_model(family, head, **changes)
    theirs.save_pretrained(folder)
    return theirs, our_class(family, head).from_pretrained(folder)


def batch(family: str, padding: str, lengths=(9, 4, 1), columns: int = 9) -> tuple[Tensor, Tensor]:
    """input_ids and mask (B, N)."""
    pad = 1 if family == "roberta" else 0
    mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
    for row, length in enumerate(lengths):
        if padding == "none":
            mask[row] = True
        elif padding == "left":
            mask[row, columns - length :] = True
        elif padding == "holes":
            mask[row, torch.randperm(columns)[:length]] = True
        else:
            mask[row, :length] = True
    ids = torch.randint(4, TOKENS, mask.shape)
    return ids.masked_fill(~mask, pad), mask


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= RELATIVE_NORM, f"{name}: relative error {error:.2e}"


def token_types(family: str, mask: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.randint(0, 2, mask.shape)} if family in ("bert", "albert") else {}
