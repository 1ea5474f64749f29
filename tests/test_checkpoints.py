"""Checkpoint folders: names, shards, heads, dtypes, and what is wrong with a broken one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertops.models import BertForMaskedLM, BertModel
from small_models import FAMILIES, assert_same, batch, both, hf_config, hf_model, our_class, transformers

safetensors_torch = pytest.importorskip("safetensors.torch")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors_torch.load_file(folder / "model.safetensors")


def rewrite(folder: Path, change) -> None:
    """Saves the tensors again under the names and with the contents that ``change`` gives."""
    safetensors_torch.save_file(change(tensors_of(folder)), folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_prefix_buffers_and_other_heads(family, tmp_path):
    _, ours = both(family, tmp_path)

    def change(tensors):
        prefixed = {f"{family}.{name}": tensor for name, tensor in tensors.items()}
        prefixed[f"{family}.embeddings.position_ids"] = torch.arange(32)[None]
        return prefixed | {"cls.predictions.bias": torch.zeros(3), "classifier.weight": torch.zeros(3)}

    rewrite(tmp_path, change)
    again = our_class(family).from_pretrained(tmp_path)
    for (name, a), b in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(list(again.parameters())) == len(list(ours.parameters()))


def test_old_layer_norm_names(tmp_path):
    _, ours = both("bert", tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(tensors):
        for new_name, old_name in old.items():
            tensors = {name.replace(new_name, old_name): tensor for name, tensor in tensors.items()}
        assert sum("LayerNorm.gamma" in name for name in tensors) == 7
        return tensors

    rewrite(tmp_path, change)
    for a, b in zip(BertModel.from_pretrained(tmp_path).parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sharded_checkpoint(tmp_path):
    theirs, ours = both("bert", tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded = BertModel.from_pretrained(tmp_path / "sharded")
    for a, b in zip(sharded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_xlm_roberta_is_roberta(tmp_path):
    config = hf_config("roberta").to_dict() | {"model_type": "xlm-roberta"}
    theirs = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**config)).eval()
    theirs.save_pretrained(tmp_path)
    input_ids, mask = batch("roberta", "right")
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long()).last_hidden_state
        assert_same(
            "hidden",
            BertModel.from_pretrained(tmp_path)(input_ids, mask).last_hidden_state[mask],
            expected[mask],
        )


def test_checkpoint_without_pooler_gives_a_model_without(tmp_path):
    both("roberta", tmp_path, "ForMaskedLM")
    model = BertModel.from_pretrained(tmp_path)
    assert model.pooler is None and model(torch.full((1, 3), 7)).pooler_output is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_ownership(dtype, tmp_path):
    both("bert", tmp_path)
    model = BertModel.from_pretrained(tmp_path, dtype=dtype)
    before = [p.clone() for p in model.parameters()]
    assert all(p.dtype == dtype for p in before)
    with open(tmp_path / "model.safetensors", "r+b") as file:  # the same file, in case it is mapped
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert model(torch.full((1, 3), 7)).last_hidden_state.dtype == dtype


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    both("bert", tmp_path)

    def change(tensors):
        del tensors["encoder.layer.1.attention.self.key.bias"]
        tensors["embeddings.LayerNorm.weight"] = torch.ones(7)
        return tensors | {"adapter.weight": torch.zeros(1)}

    rewrite(tmp_path, change)
    with pytest.raises(ValueError) as error:
        BertModel.from_pretrained(tmp_path)
    text = str(error.value)
    assert "missing encoder.layer.1.attention.self.key.bias" in text
    assert "unexpected adapter.weight" in text
    assert "embeddings.LayerNorm.weight of shape (7,), expected (24,)" in text


def test_more_layers_than_the_config_says(tmp_path):
    both("distilbert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected transformer\.layer\.2\.attention\.k_lin\.bias"):
        BertModel.from_pretrained(tmp_path)


def test_a_name_with_and_without_prefix_is_ambiguous(tmp_path):
    both("bert", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"bert.pooler.dense.bias": torch.zeros(24)})
    with pytest.raises(ValueError, match=r"holds pooler\.dense\.bias twice"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_head_on_a_bare_checkpoint(family, tmp_path):
    _, bare = both(family, tmp_path)
    with pytest.raises(ValueError, match=r"missing classifier\."):
        our_class(family, "ForSequenceClassification").from_pretrained(tmp_path)
    model = our_class(family, "ForSequenceClassification").from_pretrained(
        tmp_path, new_head=True, num_labels=5
    )
    assert model.classifier.weight.shape == (5, 24)
    assert 0.01 < model.classifier.weight.std() < 0.03 and (model.classifier.bias == 0).all()
    assert torch.equal(model.encoder.layers[2].up.weight, bare.layers[2].up.weight)
    assert (family in ("bert", "albert")) == (
        bare.pooler is not None and torch.equal(model.dense.weight, bare.pooler.weight)
    )
    language_model = our_class(family, "ForMaskedLM").from_pretrained(tmp_path, new_head=True)
    assert language_model(torch.full((1, 3), 7)).logits.isfinite().all()


def test_untied_decoder_is_refused(tmp_path):
    hf_model("bert", "ForMaskedLM", tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        BertForMaskedLM.from_pretrained(tmp_path)
    BertModel.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        BertModel.from_pretrained(tmp_path)
    hf_config("bert").save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        BertModel.from_pretrained(tmp_path)
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            BertModel.from_pretrained(path)


def test_hub_id_goes_to_the_hub_client(tmp_path, monkeypatch):
    both("bert", tmp_path)
    asked = []

    def snapshot_download(model_id, allow_patterns):
        asked.append((model_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    BertModel.from_pretrained("someone/some-model")
    assert asked[0][0] == "someone/some-model" and "config.json" in asked[0][1]


@pytest.mark.parametrize(("module", "name"), [("huggingface_hub", "someone/model"), ("safetensors", None)])
def test_missing_packages_say_what_to_install(module, name, tmp_path, monkeypatch):
    both("bert", tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install bertops\[hf\]"):
        BertModel.from_pretrained(name or tmp_path)
