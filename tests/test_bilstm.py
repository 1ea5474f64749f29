"""The BiLSTM classifier against the plain loop over words, sentence by sentence."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from bertops.models import BertConfig, BertModel, BiLSTMClassifier, BiLSTMConfig

CONFIG = BiLSTMConfig(
    vocab_size=30, embedding_size=6, hidden_size=5, dense_size=7, num_labels=3, channels="single"
)
CHANNELS = pytest.mark.parametrize("channels", ["single", "multi"])


def model_of(**changes):
    model = BiLSTMClassifier(replace(CONFIG, **changes)).eval()
    if model.static_word is not None:
        model.static_word.normal_()
    return model


def batch(lengths=(7, 0, 3, 7, 1), columns=9, padding="right"):
    """input_ids and mask (B, N); ids of padding are any."""
    mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = {"right": range(length), "left": range(columns - length, columns)}
        mask[row, list(places.get(padding, sorted(torch.randperm(columns)[:length].tolist())))] = True
    return torch.randint(1, 30, mask.shape), mask


def cell(x, hidden, state, lstm, suffix):
    weights = (
        getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (w_ih @ x + b_ih + w_hh @ hidden + b_hh).chunk(4)
    state = f.sigmoid() * state + i.sigmoid() * g.tanh()
    return o.sigmoid() * state.tanh(), state


def sentence(model, ids):
    """[forward, backward] of one sentence (2 h), word by word."""
    vectors = model.word(ids)
    if model.static_word is not None:
        vectors = torch.cat([model.static_word[ids], vectors], dim=1)
    last = []
    for suffix, words in (("", vectors), ("_reverse", vectors.flip(0))):
        hidden = state = torch.zeros(model.config.hidden_size)
        for word in words:
            hidden, state = cell(word, hidden, state, model.lstm, suffix)
        last.append(hidden)
    return torch.cat(last)


def expected_logits(model, features):
    dense = (features @ model.dense.weight.T + model.dense.bias).clamp(min=0)
    return dense @ model.classifier.weight.T + model.classifier.bias


def sentences(model, input_ids, mask):
    return torch.stack([sentence(model, ids[row]) for ids, row in zip(input_ids, mask, strict=True)])


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@CHANNELS
def test_single_sentences(channels, padding):
    model = model_of(channels=channels)
    input_ids, mask = batch(padding=padding)
    output = model(input_ids, mask)
    features = sentences(model, input_ids, mask)
    assert (output.features[1] == 0).all()
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.logits, expected_logits(model, features))


@CHANNELS
def test_pairs(channels):
    model = model_of(channels=channels, pair=True)
    first, second = batch(), batch((2, 4, 0, 6, 1), columns=6)
    output = model(*first, *second)
    a, b = sentences(model, *first), sentences(model, *second)
    torch.testing.assert_close(output.features, torch.cat([a, b, (a - b).abs(), a * b], dim=1))
    torch.testing.assert_close(output.logits, expected_logits(model, output.features))


def test_no_mask_means_all_tokens_are_real():
    model = model_of()
    input_ids, mask = batch()
    assert torch.equal(model(input_ids).logits, model(input_ids, torch.ones_like(mask)).logits)


def test_packed_rows_equal_padded_ones():
    model = model_of(pair=True)
    (input_ids, mask), (pair_ids, pair_mask) = batch(), batch((2, 4, 0, 6, 1), columns=6)
    packed = [F.pad(m.sum(1).cumsum(0), (1, 0)).int() for m in (mask, pair_mask)]
    output = model(
        input_ids[mask][None],
        None,
        pair_ids[pair_mask][None],
        cu_seqlens=packed[0],
        pair_cu_seqlens=packed[1],
    )
    assert torch.equal(output.logits, model(input_ids, mask, pair_ids, pair_mask).logits)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (3, 0), (2, 4)])
def test_batches_without_a_word(rows, columns):
    model = model_of()
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    output = model(torch.ones(rows, columns, dtype=torch.int64), mask)
    assert (output.features == 0).all() and output.logits.shape == (rows, 3)
    output.logits.sum().backward()


@CHANNELS
def test_gradients(channels):
    model = model_of(channels=channels, pair=True).double()
    first, second = batch(), batch((2, 4, 0, 6, 1), columns=6)
    model(*first, *second).logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    assert "static_word" not in parameters
    expected = BiLSTMClassifier(model.config).double()
    expected.load_state_dict(model.state_dict())
    a, b = (torch.stack([alone(expected, i, m) for i, m in zip(*x, strict=True)]) for x in (first, second))
    features = torch.cat([a, b, (a - b).abs(), a * b], dim=1)
    expected_logits(expected, features).square().sum().backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, msg=name)


def alone(model, input_ids, mask):
    return model.encode(input_ids[mask], mask.sum()[None])[0]


def test_padding_gets_no_gradient():
    model = model_of()
    ids = torch.tensor([[3, 0, 4]])
    model(ids).logits.sum().backward()
    assert (model.word.weight[0] == 0).all() and (model.word.weight.grad[0] == 0).all()
    assert (model.word.weight.grad[3] != 0).any()


def test_starts_from_given_vectors():
    vectors = torch.randn(30, 6, requires_grad=True)
    model = BiLSTMClassifier(replace(CONFIG, channels="multi"), vectors=vectors)
    for table in (model.word.weight, model.static_word):
        assert torch.equal(table[1:], vectors[1:]) and (table[0] == 0).all()
        assert table.data_ptr() != vectors.data_ptr()
    assert model.word.weight.data_ptr() != model.static_word.data_ptr()
    assert model.word.weight.is_leaf and model.word.weight.requires_grad
    assert not model.static_word.requires_grad


def test_starts_from_the_word_table_of_a_teacher():
    sizes = {"vocab_size": 30, "hidden_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    teacher = BertModel(BertConfig(**sizes, intermediate_size=8))
    model = BiLSTMClassifier(CONFIG, vectors=teacher.embeddings.word.weight)
    assert torch.equal(model.word.weight, teacher.embeddings.word.weight)


def test_learns_only_what_it_should():
    model = model_of(channels="multi", dropout_p=0.0).train()
    static = model.static_word.clone()
    input_ids, mask = batch((9, 5, 3, 7, 1))
    labels = torch.tensor([0, 1, 2, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(input_ids, mask).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.static_word, static) and (model.word.weight[0] == 0).all()


def test_dropout_while_training_only():
    model = model_of(dropout_p=0.5)
    input_ids, mask = batch()
    assert torch.equal(model(input_ids, mask).logits, model(input_ids, mask).logits)
    model.train()
    assert not torch.equal(model(input_ids, mask).logits, model(input_ids, mask).logits)
    assert torch.equal(model(input_ids, mask).features, model(input_ids, mask).features)


@CHANNELS
def test_saved_and_read(channels, tmp_path):
    model = model_of(channels=channels, pair=True)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = BiLSTMClassifier.from_pretrained(tmp_path / "new" / "folder", dropout_p=0.3)
    assert again.config == replace(model.config, dropout_p=0.3) and not again.training
    first, second = batch(), batch((2, 4, 0, 6, 1), columns=6)
    assert torch.equal(again(*first, *second).logits, model(*first, *second).logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    half = BiLSTMClassifier.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in half.state_dict().values())
    again(*first, *second).logits.sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_folders_that_do_not_fit(tmp_path):
    model_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"word\.weight of shape \(30, 6\), expected \(31, 6\)"):
        BiLSTMClassifier.from_pretrained(tmp_path, vocab_size=31)
    with pytest.raises(ValueError, match=r"static_word of shape None, expected \(30, 6\)"):
        BiLSTMClassifier.from_pretrained(tmp_path, channels="multi")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="does not hold a BiLSTMClassifier"):
        BiLSTMClassifier.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        BiLSTMClassifier.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": "static"}, "channels must be one of single, multi"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"pad_token_id": 30}, "pad_token_id must be below vocab_size = 30"),
    ],
)
def test_refused_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"vectors must be .* = \(30, 6\), got .* \(30, 5\)"):
        BiLSTMClassifier(CONFIG, vectors=torch.randn(30, 5))
    with pytest.raises(ValueError, match="vectors must be floating-point"):
        BiLSTMClassifier(CONFIG, vectors=torch.ones(30, 6, dtype=torch.int64))
    single, pair = model_of(), model_of(pair=True)
    ids, mask = batch()
    with pytest.raises(ValueError, match="pair_ids must be None"):
        single(ids, mask, ids, mask)
    with pytest.raises(ValueError, match="pair_ids must be given"):
        pair(ids, mask)
    with pytest.raises(ValueError, match="pair_ids must hold as many sequences as input_ids, 5, got 4"):
        pair(ids, mask, ids[:4], mask[:4])
    with pytest.raises(ValueError, match="input_ids must be from 0 to 29, the rows of word, got 30 at"):
        single(ids.clamp(min=30))
    with pytest.raises(ValueError, match=r"of pair_ids, .*: input_ids must be from 0 to 29"):
        pair(ids, mask, -ids, mask)
    with pytest.raises(ValueError, match=r"mask must have shape"):
        single(ids, mask[:, :3])
    with pytest.raises(ValueError, match="mask and cu_seqlens exclude each other"):
        single(ids[:1], mask[:1], cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))
