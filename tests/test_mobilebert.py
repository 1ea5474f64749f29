"""MobileBERT against transformers' on random small models, and what transformers' cannot do."""

from dataclasses import replace

import pytest
import torch

import bertops
from bertops.models import (
    MobileBertConfig,
    MobileBertForMaskedLM,
    MobileBertForNextSentencePrediction,
    MobileBertForPreTraining,
    MobileBertForSequenceClassification,
    MobileBertModel,
)
from bertops.models.mobilebert import NoNorm, trigrams
from small_models import PADDINGS, TOKENS, assert_same, batch, transformers

HEADS = {
    "": MobileBertModel,
    "ForMaskedLM": MobileBertForMaskedLM,
    "ForPreTraining": MobileBertForPreTraining,
    "ForSequenceClassification": MobileBertForSequenceClassification,
    "ForNextSentencePrediction": MobileBertForNextSentencePrediction,
}
WORDS = ("ForMaskedLM", "ForPreTraining")  # whose logits are (B, N, vocab_size)
TINY = {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False, "num_feedforward_networks": 2}
VARIANTS = {
    "released": {"classifier_activation": False},
    "tiny": {**TINY, "classifier_activation": False},
    "pooler": {},
    "one FFN, LayerNorm, GELU": {
        "num_feedforward_networks": 1,
        "normalization_type": "layer_norm",
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
}
SMALL = {
    "vocab_size": TOKENS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "embedding_size": 10,
    "intra_bottleneck_size": 16,
    "max_position_embeddings": 32,
}
TEACHER = MobileBertConfig(
    **{**SMALL, "intra_bottleneck_size": 48},
    key_query_shared_bottleneck=False,
    num_feedforward_networks=1,
    normalization_type="layer_norm",
    hidden_act="gelu_new",
)


def hf_model(head="", **changes):
    """A transformers model with every parameter random, the row of [PAD] too."""
    config = transformers.MobileBertConfig(**{**SMALL, "num_labels": 3, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"MobileBert{head or 'Model'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def both(folder, head="", **changes):
    """The transformers model and ours, loaded from what it saved."""
    theirs = hf_model(head, **changes)
    theirs.save_pretrained(folder)
    return theirs, HEADS[head].from_pretrained(folder)


def logits_of(expected):
    return expected.prediction_logits if "prediction_logits" in expected else expected.logits


def random_model(config, cls=MobileBertModel):
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def types_of(mask):
    return {"token_type_ids": torch.randint(0, 2, mask.shape)}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_equal_transformers(variant, padding, tmp_path):
    theirs, ours = both(tmp_path, **VARIANTS[variant])
    input_ids, mask = batch("mobilebert", padding)
    types = types_of(mask)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), output_hidden_states=True, **types)
        output = ours(input_ids, mask, output_hidden_states=True, **types)
    assert len(output.hidden_states) == 4
    for i, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_same(f"hidden state {i}", a[mask], b[mask])
    if variant in ("released", "tiny"):
        assert output.pooler_output is None
    elif padding in ("none", "right"):
        assert_same("pooler", output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("variant", ["released", "pooler"])
@pytest.mark.parametrize("head", [head for head in HEADS if head])
def test_logits_equal_transformers(head, variant, tmp_path):
    theirs, ours = both(tmp_path, head, **VARIANTS[variant])
    input_ids, mask = batch("mobilebert", "right")
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long())
        output = ours(input_ids, mask)
    rows = mask if head in WORDS else slice(None)
    assert_same("logits", output.logits[rows], logits_of(expected)[rows])
    if head == "ForPreTraining":
        assert_same("next sentence", output.next_sentence_logits, expected.seq_relationship_logits)
    if head != "ForMaskedLM":
        assert output.pooler_output.shape == (3, 24)


@pytest.mark.parametrize(
    ("head", "variant"),
    [("", v) for v in VARIANTS] + [(h, v) for h in HEADS if h for v in ("released", "pooler")],
)
def test_saved_for_transformers(head, variant, tmp_path):
    _, ours = both(tmp_path / "theirs", head, **VARIANTS[variant])
    ours.save_pretrained(tmp_path / "ours")
    cls = getattr(transformers, f"MobileBert{head or 'Model'}")
    theirs, report = cls.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    again = HEADS[head].from_pretrained(tmp_path / "ours")
    assert not report["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.config == ours.config
    assert (
        ours.config.pooler
        == theirs.config.classifier_activation
        == ("classifier_activation" not in VARIANTS[variant])
    )
    input_ids, mask = batch("mobilebert", "right")
    with torch.no_grad():
        output, same = ours(input_ids, mask), again(input_ids, mask)
        expected = theirs.eval()(input_ids, attention_mask=mask.long())
    if head:
        rows = mask if head in WORDS else slice(None)
        assert_same("logits", output.logits[rows], logits_of(expected)[rows])
        assert torch.equal(output.logits, same.logits)
    if head == "ForPreTraining":
        assert_same("next sentence", output.next_sentence_logits, expected.seq_relationship_logits)
    assert torch.equal(output.last_hidden_state, same.last_hidden_state)
    if not head:
        assert_same("hidden", output.last_hidden_state[mask], expected.last_hidden_state[mask])


def test_a_head_of_another_checkpoint_starts_new(tmp_path):
    _, ours = both(tmp_path, "ForMaskedLM")
    with pytest.raises(ValueError, match=r"missing classifier\.weight"):
        MobileBertForSequenceClassification.from_pretrained(tmp_path)
    model = MobileBertForSequenceClassification.from_pretrained(tmp_path, new_head=True, num_labels=5)
    assert model.classifier.weight.shape == (5, 24) and not any(p.is_meta for p in model.parameters())
    for name, parameter in ours.encoder.named_parameters():
        assert torch.equal(model.encoder.get_parameter(name), parameter), name
    assert all(p.isfinite().all() for p in model.parameters())


def test_teacher_reads_what_it_saved(tmp_path):
    model = random_model(TEACHER)
    model.save_pretrained(tmp_path)
    again = MobileBertModel.from_pretrained(tmp_path)
    input_ids, mask = batch("mobilebert", "right")
    with torch.no_grad():
        assert torch.equal(again(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    with pytest.raises(RuntimeError):
        transformers.MobileBertModel.from_pretrained(tmp_path)


def test_teacher_is_its_definition():
    """Queries, keys and values from the layer's input; one wide feed-forward; LayerNorms."""
    model = random_model(replace(TEACHER, num_hidden_layers=1))
    input_ids, _ = batch("mobilebert", "none")
    (layer,) = model.layers
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True)
        x = output.hidden_states[0]
        q, k = (y.unflatten(2, (2, 24)).transpose(1, 2) for y in layer.attention.qk(x).chunk(2, -1))
        v = layer.attention.value(x).unflatten(2, (2, 24)).transpose(1, 2)
        attended = (q @ k.mT / 24**0.5).softmax(-1) @ v
        inner = layer.bottleneck.norm(layer.bottleneck.dense(x))
        inner = layer.attention_norm(inner + layer.attention.proj(attended.transpose(1, 2).flatten(2)))
        up = torch.nn.functional.gelu(layer.last_ffn.up(inner), approximate="tanh")
        inner = layer.last_ffn.norm(inner + layer.last_ffn.down(up))
        expected = layer.output_norm(x + layer.output(inner))
    assert_same("hidden", output.last_hidden_state, expected)
    assert not layer.ffn and isinstance(layer.output_norm, torch.nn.LayerNorm)


def test_no_norm():
    norm = NoNorm(4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(norm(x), x)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
        norm.bias.copy_(torch.tensor([0.5, 0, 0, -1]))
    torch.testing.assert_close(norm(x), x * norm.weight + norm.bias)


def test_trigrams_are_next_current_previous():
    words = torch.arange(1.0, 6.0).view(1, 5, 1)
    expected = [[2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3], [0, 5, 4]]
    assert trigrams(words).tolist() == [expected]
    cu_seqlens = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    expected = [[2, 1, 0], [0, 2, 1], [0, 3, 0], [5, 4, 0], [0, 5, 4]]
    assert trigrams(words, cu_seqlens).tolist() == [expected]


@pytest.mark.parametrize("head", HEADS)
def test_packed_rows_are_separate_sequences(head):
    model = random_model(MobileBertConfig(**SMALL), HEADS[head])
    sequences = [torch.randint(0, TOKENS, (n,)) for n in (5, 1, 0, 7)]
    cu_seqlens = torch.tensor([0, 5, 6, 6, 13], dtype=torch.int32)
    with torch.no_grad():
        output = model(torch.cat(sequences)[None], cu_seqlens=cu_seqlens, output_scores=True)
        expected = [model(ids[None]) for ids in sequences if len(ids)]
    assert output.scores[0].shape == (1, 2, 13, 13)
    assert_same("hidden", output.last_hidden_state[0], torch.cat([x.last_hidden_state[0] for x in expected]))
    if head in WORDS:
        assert_same("logits", output.logits[0], torch.cat([x.logits[0] for x in expected]))
    elif head:
        assert_same("logits", output.logits[[0, 1, 3]], torch.cat([x.logits for x in expected]))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("head", HEADS)
def test_unpadded_gives_what_a_row_of_zeros_for_padding_gives(head, padding):
    model = random_model(MobileBertConfig(**SMALL), HEADS[head])
    input_ids, mask = batch("mobilebert", padding, lengths=(9, 0, 4, 1))
    # the row of [PAD] is that of the decoder too, whose column 0 is left out
    rows = (mask, slice(1, None)) if head in WORDS else slice(None)
    encoder = model.encoder if head else model
    with torch.no_grad():
        unpadded = model(input_ids, mask, unpad=True, output_hidden_states=True)
        leaking = model(input_ids, mask)
        encoder.embeddings.word.weight[0] = 0
        padded = model(input_ids, mask, output_hidden_states=True)
    for a, b in zip(unpadded.hidden_states, padded.hidden_states, strict=True):
        assert_same("hidden state", a[mask], b[mask])
        assert (a[~mask] == 0).all()
    if head:
        assert_same("logits", unpadded.logits[rows], padded.logits[rows])
    assert not torch.allclose(leaking.last_hidden_state[mask], padded.last_hidden_state[mask], atol=1e-3)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(shape, unpad):
    input_ids, mask = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
    for cls in HEADS.values():
        model = cls(MobileBertConfig(**SMALL)).eval()
        assert model(input_ids, mask, unpad=unpad).last_hidden_state.shape == (*shape, 24)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    packed = model(torch.empty(1, 0, dtype=torch.int64), cu_seqlens=cu_seqlens)
    assert packed.logits.shape == (2, 2)


@pytest.mark.parametrize("variant", ["released", "tiny"])
@pytest.mark.parametrize("unpad", [False, True])
def test_capture(variant, unpad, tmp_path):
    _, model = both(tmp_path, **VARIANTS[variant])
    input_ids, mask = batch("mobilebert", "right")
    with torch.no_grad():
        model.embeddings.word.weight[0] = 0
        with bertops.capture(model, [1, -1]) as taps:
            output = model(input_ids, mask, output_hidden_states=True, unpad=unpad)
    tap, hidden, layer = taps[-1], output.hidden_states[2], model.layers[2]
    assert tap.layer == 3 and (tap.cu_seqlens is None) == (not unpad)
    with torch.no_grad():
        inner = layer.bottleneck(hidden)
        source = inner if variant == "tiny" else layer.qk_bottleneck(hidden)
        q, k = layer.attention.qk(source).chunk(2, -1)
        v = layer.attention.value(inner if variant == "tiny" else hidden)
    for name, x, expected in (("q", tap.q, q), ("k", tap.k, k), ("v", tap.v, v)):
        rows = x.transpose(1, 2).flatten(2)
        assert_same(name, rows[0] if unpad else rows[mask], expected[mask])
    if not unpad:
        scores = (tap.q @ tap.k.mT * tap.scale).masked_fill(~mask[:, None, None, :], -torch.inf)
        assert_same("lse", tap.lse.transpose(1, 2)[mask], scores.logsumexp(-1).transpose(1, 2)[mask])


@pytest.mark.parametrize("padding", ["right", "holes"])
def test_scores_are_the_map_before_softmax(padding, tmp_path):
    _, model = both(tmp_path)
    input_ids, mask = batch("mobilebert", padding)
    with torch.no_grad(), bertops.capture(model, [1, 2, 3]) as taps:
        output = model(input_ids, mask, output_scores=True)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    for scores, tap in zip(output.scores, taps, strict=True):
        assert_same("scores", scores, (tap.q @ tap.k.mT / 8**0.5).where(pairs, 0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_transformers(variant, tmp_path):
    head = "ForSequenceClassification"
    theirs, ours = both(tmp_path, head, **VARIANTS[variant])
    input_ids, mask = batch("mobilebert", "right")
    labels = torch.tensor([2, 0, 1])
    for model, options in ((theirs, {"attention_mask": mask.long()}), (ours, {"mask": mask})):
        torch.nn.functional.cross_entropy(model(input_ids, **options).logits, labels).backward()
    assert all(p.grad is not None for p in ours.parameters())
    base, layer = theirs.mobilebert, ours.encoder.layers[1]
    their_layer = base.encoder.layer[1]
    word = ours.encoder.embeddings.word.weight.grad
    assert_same("word", word, base.embeddings.word_embeddings.weight.grad)
    assert (word[0] == 0).all()
    self_attention = their_layer.attention.self
    qk = torch.cat([self_attention.query.weight.grad, self_attention.key.weight.grad])
    assert_same("qk", layer.attention.qk.weight.grad, qk)
    assert_same("value", layer.attention.value.weight.grad, self_attention.value.weight.grad)
    last = layer.last_ffn.norm.weight.grad
    assert_same("norm of the last FFN", last, their_layer.output.LayerNorm.weight.grad)
    assert_same("output", layer.output.weight.grad, their_layer.output.bottleneck.dense.weight.grad)


def test_masked_lm_gradient_reaches_both_parts_of_the_decoder(tmp_path):
    theirs, ours = both(tmp_path, "ForMaskedLM")
    input_ids, _ = batch("mobilebert", "none")
    labels = torch.randint(0, TOKENS, (input_ids.numel(),))
    for model in (theirs, ours):
        torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), labels).backward()
    assert_same("extra", ours.extra.weight.grad, theirs.cls.predictions.dense.weight.grad)
    expected = theirs.mobilebert.embeddings.word_embeddings.weight.grad
    assert_same("word", ours.encoder.embeddings.word.weight.grad, expected)


def test_compiled_whole():
    model = random_model(MobileBertConfig(**{**SMALL, "num_hidden_layers": 1}))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for columns in (9, 6):
        input_ids, mask = batch("mobilebert", "right", columns=columns, lengths=(6, 3))
        expected = model(input_ids, mask).last_hidden_state
        torch.testing.assert_close(compiled(input_ids, mask).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = random_model(MobileBertConfig(**SMALL), MobileBertForSequenceClassification)
    input_ids, mask = batch("mobilebert", "right")
    expected = model(input_ids, mask).logits
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            under_autocast = model(input_ids, mask).logits
        torch.testing.assert_close(under_autocast.float(), expected, rtol=0.1, atol=0.1)
        under_autocast.sum().backward()
    logits = model.to(dtype)(input_ids, mask).logits
    assert logits.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)


def test_dropout_while_training_only():
    config = replace(TEACHER, hidden_dropout_p=0.5, attention_dropout_p=0.0)
    model = random_model(config)
    input_ids, mask = batch("mobilebert", "right")
    assert torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {"embeddings.dropout": 0.5, **{f"layers.{i}.output_dropout": 0.5 for i in range(3)}}
    model.train()
    assert not torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    model = random_model(replace(TEACHER, hidden_dropout_p=0.0, attention_dropout_p=0.5))
    assert torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    model.train()
    assert not torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_type": "batch_norm"}, "normalization_type must be one of"),
        ({"use_bottleneck_attention": True}, "key_query_shared_bottleneck must be False"),
        ({"intra_bottleneck_size": 17}, "intra_bottleneck_size 17 is not a multiple"),
        ({"embedding_size": 25}, "embedding_size must be at most hidden_size = 24"),
        ({"num_feedforward_networks": 0}, "num_feedforward_networks must be at least 1"),
        ({"attention_output_dropout_p": 0.1}, "attention_output_dropout_p must be 0"),
        ({"hidden_act": "swish"}, "hidden_act must be one of"),
        ({"family": "bert"}, "family must be one of mobilebert"),
    ],
)
def test_refused_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        MobileBertConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("key", ["use_bottleneck", "trigram_input"])
def test_layouts_of_transformers_that_are_refused(key):
    config = transformers.MobileBertConfig(**SMALL, **{key: False}).to_dict()
    with pytest.raises(ValueError, match=f"{key} must be true"):
        MobileBertConfig.from_hf(config)


def test_refused_arguments():
    model = MobileBertModel(MobileBertConfig(**SMALL)).eval()
    ids = torch.zeros(1, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids must have at most 32 columns, got 33"):
        model(ids)
    ids = ids[:, :4]
    with pytest.raises(ValueError, match=f"input_ids must be from 0 to {TOKENS - 1}"):
        model(ids + TOKENS)
    with pytest.raises(ValueError, match="position_ids must be from 0 to 31"):
        model(ids, position_ids=ids + 32)
    with pytest.raises(ValueError, match="token_type_ids must be from 0 to 1"):
        model(ids, token_type_ids=ids - 1)
    with pytest.raises(ValueError, match="position_ids must be from 0 to 31"):
        model(ids.expand(10, 4).reshape(1, 40), cu_seqlens=torch.tensor([0, 40], dtype=torch.int32))
