"""ALBERT: parameter counts, groups, sharing, its two pretraining heads, taps and exits of shared layers."""

from dataclasses import replace

import pytest
import torch

import bertops
from bertops.models import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForSequenceClassification,
    AlbertModel,
    BertConfig,
    BertModel,
    FastBert,
)
from bertops.models.checkpoint import source_names
from bertops.models.config import SHARES
from small_models import PADDINGS, assert_same, batch, both, our_class, our_config, token_types

GROUPS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]  # (num_hidden_groups, inner_group_num) of three layers
SMALL = our_config("albert", num_hidden_layers=4, initializer_range=0.3)

# (layers, H): millions of parameters by sharing
PAPER_SIZES = {
    (12, 768): {"none": "89.65", "ffn": "37.69", "attention": "63.65", "all": "11.68"},
    (24, 1024): {"none": "307.4", "ffn": "114.3", "attention": "210.8", "all": "17.68"},
    (24, 2048): {"none": "1217", "ffn": "444.9", "attention": "830.8", "all": "58.72"},
    (12, 4096): {"none": "2438", "ffn": "961", "attention": "1699", "all": "222.6"},
}


def count(config) -> int:
    with torch.device("meta"):
        model = (AlbertModel if isinstance(config, AlbertConfig) else BertModel)(config)
    return sum(parameter.numel() for parameter in model.parameters())


def expected_count(words, width, hidden, attentions, feed_forwards, projects) -> int:
    embedding = (words + 512 + 2) * width + 2 * width + projects * (width + 1) * hidden
    attention = 4 * (hidden + 1) * hidden + 2 * hidden
    feed_forward = (hidden + 1) * 4 * hidden + (4 * hidden + 1) * hidden + 2 * hidden
    return embedding + attentions * attention + feed_forwards * feed_forward + (hidden + 1) * hidden


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("layers", "hidden"), PAPER_SIZES)
def test_parameter_counts(layers, hidden, share):
    heads = 16 if hidden == 2048 else hidden // 64
    config = AlbertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        share=share,
    )
    attentions = 1 if share in ("all", "attention") else layers
    feed_forwards = 1 if share in ("all", "ffn") else layers
    found = count(config)
    assert found == expected_count(30000, 128, hidden, attentions, feed_forwards, True)
    millions = PAPER_SIZES[layers, hidden][share]
    assert f"{found / 1e6:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize(
    ("width", "millions"), [(64, "9.68"), (128, "11.68"), (256, "15.69"), (768, "31.11")]
)
def test_parameter_counts_by_embedding_size(width, millions):
    found = count(AlbertConfig(embedding_size=width))
    assert found == expected_count(30000, width, 768, 1, 1, width != 768)
    assert f"{found / 1e6:.2f}" == millions


@pytest.mark.parametrize(("layers", "hidden", "millions"), [(12, 768, "109.48"), (24, 1024, "335.14")])
def test_parameter_counts_of_bert(layers, hidden, millions):
    sizes = {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    found = count(BertConfig(hidden_size=hidden, num_hidden_layers=layers, **sizes))
    assert found == expected_count(30522, hidden, hidden, layers, layers, False)
    assert f"{found / 1e6:.2f}" == millions


# ---- against transformers


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("groups", "inner"), GROUPS)
def test_groups_equal_transformers(groups, inner, padding, tmp_path):
    theirs, ours = both("albert", tmp_path, num_hidden_groups=groups, inner_group_num=inner)
    input_ids, mask = batch("albert", padding)
    types = token_types("albert", mask)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), output_hidden_states=True, **types)
        output = ours(input_ids, mask, output_hidden_states=True, **types)
    assert len(output.hidden_states) == 3 * inner + 1
    for i, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_same(f"hidden state {i}", a[mask], b[mask])
    if padding == "right":
        assert_same("pooler", output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("width", [8, 24])
def test_transformers_projects_whatever_the_widths(width, tmp_path):
    theirs, ours = both("albert", tmp_path, embedding_size=width)
    assert ours.embeddings.projection is not None and ours.config.always_project == (width == 24)
    input_ids, _ = batch("albert", "none")
    with torch.no_grad():
        assert_same("hidden", ours(input_ids).last_hidden_state, theirs(input_ids).last_hidden_state)


@pytest.mark.parametrize("unpad", [False, True])
def test_pretraining_logits_equal_transformers(unpad, tmp_path):
    theirs, ours = both("albert", tmp_path, "ForPreTraining", num_hidden_groups=2, num_labels=2)
    input_ids, mask = batch("albert", "right")
    types = token_types("albert", mask)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), **types)
        output = ours(input_ids, mask, unpad=unpad, **types)
    assert_same("logits", output.logits[mask], expected.prediction_logits[mask])
    assert_same("sop_logits", output.sop_logits, expected.sop_logits)
    assert output.sop_logits.shape == (3, 2) and output.pooler_output.shape == (3, 24)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_shared_parameters_equal_transformers(dtype, groups, tmp_path):
    theirs, _ = both("albert", tmp_path, "ForPreTraining", num_hidden_groups=groups, num_labels=2)
    theirs = theirs.to(dtype)
    ours = AlbertForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    input_ids, mask = batch("albert", "left")
    input_ids[0, 2] = 0  # a real token whose embedding gets no gradient but the decoder's
    expected = theirs(input_ids, attention_mask=mask.long()).prediction_logits[mask]
    expected.sin().sum().backward()
    output = ours(input_ids, mask)
    output.logits[mask].sin().sum().backward()
    found = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    names = dict(theirs.named_parameters())
    assert len(found) == 12 * groups + 5 + 2 + 5 and names["albert.pooler.weight"].grad is None
    for name, gradient in found.items():
        inside = "albert." if name.startswith("encoder.") else ""
        wanted = torch.cat([names[inside + source].grad for source in source_names(name, ours.config)])
        if name.endswith("qkv.bias"):  # the keys' gradient is 0, or what rounding leaves of it
            width = len(wanted) // 3
            gradient, wanted = (torch.cat((x[:width], x[2 * width :])) for x in (gradient, wanted))
        error = (gradient - wanted).norm() / wanted.norm()
        assert error <= (1e-12 if dtype == torch.float64 else 1e-5), (name, error)


# ---- sharing


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("share", SHARES)
def test_which_layers_share_what(share, groups, inner):
    config = replace(SMALL, share=share, num_hidden_groups=groups, inner_group_num=inner)
    model = AlbertModel(config)
    count = 4 * inner
    places = [(i // inner * groups // 4, i % inner) for i in range(count)]
    assert config.places() == places and len(model.layers) == count
    attention = places if share in ("all", "attention") else range(count)
    feed_forward = places if share in ("all", "ffn") else range(count)
    for i, a in enumerate(model.layers):
        for j, b in enumerate(model.layers):
            same = attention[i] == attention[j], feed_forward[i] == feed_forward[j]
            assert (a.attention is b.attention, a.up is b.up) == same
            assert (a.attention_norm is b.attention_norm, a.output_norm is b.output_norm) == same
            assert (a.down is b.down) == same[1]


@pytest.mark.parametrize("share", SHARES)
def test_sharing_is_the_model_with_equal_copies(share):
    """Outputs are the same, and a shared gradient is the sum of those of the copies."""
    shared = AlbertModel(replace(SMALL, share=share)).double().eval()
    copies = AlbertModel(replace(SMALL, share="none")).double().eval()
    copies.load_state_dict(shared.state_dict())
    input_ids, mask = batch("albert", "right")
    outputs = []
    for model in (shared, copies):
        output = model(input_ids, mask)
        outputs.append(output.last_hidden_state.detach()[mask])
        (output.last_hidden_state[mask].sin().sum() + output.pooler_output.sum()).backward()
    assert torch.equal(*outputs)
    parameters = shared.state_dict(keep_vars=True)
    sums: dict = {}
    for name, parameter in copies.named_parameters():
        sums[parameters[name]] = sums.get(parameters[name], 0) + parameter.grad
    assert len(sums) == len(list(shared.parameters()))
    for parameter, wanted in sums.items():
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_packed_and_unpadded_rows_equal_padded_ones(padding, share):
    model = AlbertForPreTraining(replace(SMALL, share=share)).eval()
    input_ids, mask = batch("albert", padding)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    with torch.no_grad():
        padded = model(input_ids, mask, position_ids=position_ids)
        unpadded = model(input_ids, mask, position_ids=position_ids, unpad=True)
        packed = model(input_ids[mask][None], cu_seqlens=cu_seqlens)
    assert_same("unpadded", unpadded.logits[mask], padded.logits[mask])
    assert_same("packed", packed.logits[0], padded.logits[mask])
    for output in (unpadded, packed):
        assert_same("sop_logits", output.sop_logits, padded.sop_logits)


@pytest.mark.parametrize("share", SHARES)
def test_taps_count_every_run_of_a_shared_layer(share):
    model = AlbertModel(replace(SMALL, share=share, num_hidden_groups=2)).eval()
    input_ids, mask = batch("albert", "left")
    with bertops.capture(model, [1, 2, 3, -1]) as taps:
        states = model(input_ids, mask, output_hidden_states=True).hidden_states
    for number, (tap, state) in enumerate(zip(taps, states[:-1], strict=True), 1):
        assert tap.layer == number
        qkv = model.layers[number - 1].attention.qkv(state).unflatten(-1, (3, 3, -1))
        for i, x in enumerate((tap.q, tap.k, tap.v)):
            assert torch.equal(x.transpose(1, 2)[mask], qkv[:, :, i][mask])
    sum(tap.lse.cos()[:, 0][mask].sum() for tap in taps).backward()
    assert model.layers[0].attention.qkv.weight.grad.any()


@pytest.mark.parametrize("share", ["all", "attention"])
def test_compiled_and_captured(share):
    torch._dynamo.reset()
    model = AlbertModel(replace(SMALL, share=share)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    input_ids, mask = batch("albert", "right")
    with torch.no_grad():
        plain = compiled(input_ids, mask).last_hidden_state
        with bertops.capture(model, [2, 4]) as taps:
            assert torch.equal(compiled(input_ids, mask).last_hidden_state, plain)
            captured = list(taps)
            model(input_ids, mask)
    assert_same("hidden", plain, model(input_ids, mask).last_hidden_state.detach())
    for tap, expected in zip(captured, taps, strict=True):
        assert tap.layer == expected.layer
        assert_same("q", tap.q, expected.q)
    assert not torch.equal(captured[0].q, captured[1].q)


def test_dropout_while_training_only():
    config = replace(SMALL, hidden_dropout_p=0.2, attention_dropout_p=0.1, attention_output_dropout_p=0.1)
    model = AlbertForSequenceClassification(config)
    input_ids, mask = batch("albert", "right")
    embed = model.encoder.embed
    assert model.training and not torch.equal(embed(input_ids), embed(input_ids))
    assert not torch.equal(model(input_ids, mask).logits, model(input_ids, mask).logits)
    model.eval()
    assert torch.equal(model(input_ids, mask).logits, model(input_ids, mask).logits)


def test_exits_of_shared_layers():
    """FastBERT over ALBERT: a classifier after every run, exits as in the whole model."""
    model = FastBert(AlbertModel(replace(SMALL, num_hidden_groups=2)), 3, head_size=16).eval()
    input_ids, mask = batch("albert", "right", lengths=(9, 4, 1, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        output = model(input_ids, mask)
        full = model.infer(input_ids, mask, speed=0.0)
        some = model.infer(input_ids, mask, speed=0.5)
    assert model.num_layers == 4 and len(output.student_logits) == 3
    assert_same("logits", full.logits, output.logits)
    every = torch.stack([*output.student_logits, output.logits])
    assert_same("exited", some.logits, every[some.exit_layer - 1, torch.arange(4)])
    assert some.exit_layer.min() < 4


def test_masked_rows_alone_through_the_head():
    model = AlbertForMaskedLM(SMALL).eval()
    input_ids, mask = batch("albert", "right")
    with torch.no_grad():
        output = model(input_ids, mask)
        hidden = model.encoder(input_ids, mask).last_hidden_state
        some = model.head(hidden[:, 2], model.encoder.embeddings.word.weight)
    assert model.head.dense.weight.shape == (16, 24)
    assert_same("logits", some, output.logits[:, 2])


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "some"}, "share must be one of none, ffn, attention, all, got 'some'"),
        ({"num_hidden_groups": 5}, "num_hidden_groups must be from 1 to num_hidden_layers = 4, got 5"),
        ({"num_hidden_groups": 0}, "num_hidden_groups must be from 1 to"),
        ({"inner_group_num": 0}, "inner_group_num must be at least 1, got 0"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
    ],
)
def test_configs_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(("family", "other"), [("albert", "bert"), ("bert", "albert"), ("roberta", "albert")])
def test_a_checkpoint_of_another_family(family, other, tmp_path):
    both(family, tmp_path)
    with pytest.raises(ValueError, match=f"must hold a model of one of the types .*, got {family}"):
        our_class(other).from_pretrained(tmp_path)
