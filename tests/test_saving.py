"""Models written as Hugging Face folders: transformers and we read the same model back."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bertops import _files
from bertops.models import AlbertForMaskedLM, AlbertModel, BertModel
from bertops.models.config import SHARES, config_from_hf
from small_models import FAMILIES, HEADS, assert_same, batch, our_class, our_config, our_model, transformers

safetensors_torch = pytest.importorskip("safetensors.torch")


def randomize(model):
    """Every parameter random, far enough from 0 to tell them apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def read_theirs(folder, **changes):
    """What transformers makes of the folder; nothing may be missing or left over."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"attn_implementation": "eager", "output_loading_info": True, **changes}
    model, info = getattr(transformers, name).from_pretrained(folder, **options)
    assert not any(info.values()), info
    return model.eval()


def assert_reads_back(model, folder):
    again = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    assert again.config == model.config
    pairs = zip(again.named_parameters(), model.named_parameters(), strict=True)
    for (name, a), (other_name, b) in pairs:
        assert name == other_name and torch.equal(a, b), name
    return again


@pytest.mark.parametrize(
    ("family", "head"),
    [*((family, head) for family in FAMILIES for head in HEADS), ("albert", "ForPreTraining")],
)
def test_round_trip(family, head, tmp_path):
    labels = 2 if head == "ForPreTraining" else 5
    act = {"activation" if family == "distilbert" else "hidden_act": "relu"}
    model = randomize(our_model(family, head, num_labels=labels, **act))
    model.save_pretrained(tmp_path / "new" / "folder")
    theirs = read_theirs(tmp_path / "new" / "folder")
    input_ids, mask = batch(family, "right")
    with torch.no_grad():
        ours = model(input_ids, mask)
        output = theirs(input_ids, attention_mask=mask.long())
    if not head:
        assert_same("hidden", ours.last_hidden_state[mask], output.last_hidden_state[mask])
        if model.pooler is not None:
            assert_same("pooler", ours.pooler_output, output.pooler_output)
    elif head == "ForSequenceClassification":
        assert_same("logits", ours.logits, output.logits)
    else:
        logits = output.prediction_logits if head == "ForPreTraining" else output.logits
        assert_same("logits", ours.logits[mask], logits[mask])
        if head == "ForPreTraining":
            assert_same("sop_logits", ours.sop_logits, output.sop_logits)
    assert_reads_back(model, tmp_path / "new" / "folder")
    theirs.save_pretrained(tmp_path / "theirs")
    written = [
        safetensors_torch.load_file(folder / "model.safetensors").keys()
        for folder in (tmp_path / "new" / "folder", tmp_path / "theirs")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rate_and_size_of_the_config_survives(family):
    changes = {"attention_output_dropout_p": 0.35, "hidden_dropout_p": 0.15, "attention_dropout_p": 0.25}
    changes |= {"classifier_dropout_p": 0.45, "num_labels": 7, "initializer_range": 0.07}
    sizes = {"vocab_size": 50, "hidden_size": 36, "num_hidden_layers": 5, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 41, "max_position_embeddings": 21, "hidden_act": "silu"}
    config = replace(our_config(family), **changes, **sizes)
    if family != "distilbert":
        config = replace(config, layer_norm_eps=1e-3, type_vocab_size=4)
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("share", SHARES)
def test_every_sharing_of_albert(share, groups, inner, tmp_path):
    config = replace(our_config("albert"), share=share, num_hidden_groups=groups, inner_group_num=inner)
    model = randomize(AlbertForMaskedLM(config)).eval()
    model.save_pretrained(tmp_path)
    input_ids, mask = batch("albert", "right")
    with torch.no_grad():
        expected = read_theirs(tmp_path)(input_ids, attention_mask=mask.long()).logits
        assert_same("logits", model(input_ids, mask).logits[mask], expected[mask])
    again = assert_reads_back(model, tmp_path)
    layers = again.encoder.layers
    assert (layers[0].attention is layers[inner].attention) == (
        share in ("all", "attention") and model.config.places()[inner][0] == 0
    )


def test_copies_that_differ_cannot_be_shared(tmp_path):
    config = replace(our_config("albert"), share="attention")
    AlbertModel(config).save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    tensors["encoder.albert_layer_groups.1.albert_layers.0.attention.dense.bias"] += 1
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"groups\.1\.albert_layers\.0\.attention\.dense\.bias differs from"):
        AlbertModel.from_pretrained(tmp_path)


def test_equal_widths_are_written_with_the_identity(tmp_path):
    """transformers always projects; read back, the model projects by the identity."""
    config = replace(our_config("albert"), embedding_size=24, always_project=False)
    model = randomize(AlbertForMaskedLM(config)).eval()
    assert model.encoder.embeddings.projection is None
    model.save_pretrained(tmp_path)
    input_ids, _ = batch("albert", "none")
    again = AlbertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again.encoder.embeddings.projection.weight, torch.eye(24))
    with torch.no_grad():
        logits = model(input_ids).logits
        assert_same("logits", read_theirs(tmp_path)(input_ids).logits, logits)
        assert_same("logits", again(input_ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype, tmp_path):
    model = randomize(our_model("bert")).to(dtype)
    model.save_pretrained(tmp_path)
    assert next(read_theirs(tmp_path, dtype="auto").parameters()).dtype == dtype
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("distilbert", {"layer_norm_eps": 1e-5}, "layer_norm_eps must be 1e-12 in transformers' models"),
        ("distilbert", {"type_vocab_size": 2}, "type_vocab_size must be 0 .* distilbert, got 2"),
        ("bert", {"position_offset": 1}, "position_offset must be 0"),
        ("roberta", {"position_offset": 0}, "position_offset must be 2"),
    ],
)
def test_what_transformers_lacks_is_refused_before_anything_is_written(family, changes, message, tmp_path):
    model = our_class(family)(replace(our_config(family), **changes))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = our_model("bert")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(_files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        randomize(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert_reads_back(model, tmp_path)


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ImportError, match=r"writing a checkpoint needs safetensors: pip install bertops\[hf\]"
    ):
        our_model("bert").save_pretrained(tmp_path)


def test_no_pooler_stays_no_pooler(tmp_path):
    config = replace(our_config("bert"), pooler=False)
    model = BertModel(config)
    model.save_pretrained(tmp_path)
    assert_reads_back(model, tmp_path)
