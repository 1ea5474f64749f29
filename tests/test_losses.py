"""The losses of the papers against their formulas in fp64, and against the official codes' factors."""

import math

import pytest
import torch
from torch.nn import functional as F

import bertops
from bertops.distill import losses
from bertops.distill.capture import Tap
from bertops.distill.losses import Term, combine
from bertops.distill.losses.distilbert import Decoder

BATCH, LENGTH, HEADS, CLASSES, VOCAB = 3, 7, 2, 4, 19
MASK = torch.arange(LENGTH) < torch.tensor([7, 4, 1])[:, None]
TOKENS = 12


def randn(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def tap(head_dim, grad=False, mask=MASK):
    q, k, v = (randn(BATCH, HEADS, LENGTH, head_dim, grad=grad) for _ in range(3))
    lse = bertops.attention(q, k, v, mask, return_lse=True)[1]
    return Tap(1, q, k, v, lse.detach(), mask, None, None, 1 / math.sqrt(head_dim))


def close(term: Term, expected):
    torch.testing.assert_close(term.mean(), torch.as_tensor(expected), rtol=1e-9, atol=1e-12)


def soft_kl(z_s, z_t, temperature=1.0):
    """T² KL(teacher || student) (B,)."""
    log_s, log_t = (z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


def distributions(q, k):
    """(B, H, N, N) log-probabilities over real keys."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~MASK[:, None, None], -1e9).log_softmax(-1)


def rows_kl(q_s, k_s, q_t, k_t):
    """The mean over real rows and heads."""
    log_s, log_t = distributions(q_s, k_s), distributions(q_t, k_t)
    rows = (log_t.exp() * (log_t - log_s)).sum(-1)  # (B, H, N)
    return (rows * MASK[:, None]).sum() / (HEADS * TOKENS)


# What every loss does


def test_terms_of_two_halves_join_to_those_of_the_whole():
    hidden_s, hidden_t = randn(BATCH, LENGTH, 6), randn(BATCH, LENGTH, 6)
    loss = losses.DistilBertLoss()
    labels = torch.randint(VOCAB, (BATCH, LENGTH)).masked_fill(torch.rand(BATCH, LENGTH) < 0.5, -100)
    weight_s, weight_t = randn(VOCAB, 6), randn(VOCAB, 6)

    def run(part):
        student, teacher = Decoder(hidden_s[part], weight_s), Decoder(hidden_t[part], weight_t)
        return loss(student, teacher, hidden_s[part], hidden_t[part], labels[part], MASK[part])

    whole, first, rest = run(slice(0, 3)), run(slice(0, 1)), run(slice(1, 3))
    for name, term in whole.items():
        parts = first[name], rest[name]
        together = Term(parts[0].total + parts[1].total, parts[0].count + parts[1].count, term.weight)
        close(together, term.mean())


def test_combine_weighs_means_and_nothing_counted_is_zero():
    terms = {
        "a": Term(torch.tensor(6.0), 3, 2.0),
        "b": Term(torch.tensor(5.0), torch.tensor(2), 1.0),
        "nothing": Term(torch.tensor(0.0), torch.tensor(0), 7.0),
    }
    assert combine(terms) == 2 * 2 + 2.5
    with pytest.raises(ValueError, match="terms must not be empty"):
        combine({})


# Distilled BiLSTM, PKD


def test_distilled_bilstm():
    z_s, z_t, labels = randn(BATCH, CLASSES, grad=True), randn(BATCH, CLASSES), torch.tensor([0, 3, 1])
    terms = losses.DistilledBiLSTMLoss()(z_s, z_t)
    assert list(terms) == ["logits"]
    close(terms["logits"], (z_s - z_t).square().sum(1).mean())
    terms = losses.DistilledBiLSTMLoss(0.25)(z_s, z_t, labels)
    expected = 0.25 * F.cross_entropy(z_s, labels) + 0.75 * (z_s - z_t).square().sum(1).mean()
    torch.testing.assert_close(combine(terms), expected)
    # the official code: MSE over B * C, weight 1
    torch.testing.assert_close(terms["logits"].mean() / CLASSES, F.mse_loss(z_s, z_t))
    (grad,) = torch.autograd.grad(combine(losses.DistilledBiLSTMLoss()(z_s, z_t)), z_s)
    torch.testing.assert_close(grad, 2 * (z_s - z_t) / BATCH)


@pytest.mark.parametrize("normalize", [True, False])
def test_pkd(normalize):
    z_s, z_t, labels = randn(BATCH, CLASSES), randn(BATCH, CLASSES), torch.tensor([0, 3, 1])
    first_s, first_t = [randn(BATCH, 6) for _ in range(5)], [randn(BATCH, 6) for _ in range(5)]
    terms = losses.PKDLoss(0.2, 500.0, 5.0, normalize=normalize)(z_s, z_t, labels, first_s, first_t)
    s, t = torch.stack(first_s, 1), torch.stack(first_t, 1)
    if normalize:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    close(terms["hidden"], F.mse_loss(s, t))
    close(terms["logits"], soft_kl(z_s, z_t, 5.0).mean())
    close(terms["labels"], F.cross_entropy(z_s, labels))
    official = F.kl_div((z_s / 5).log_softmax(-1), (z_t / 5).softmax(-1), reduction="mean") * 25
    torch.testing.assert_close(terms["logits"].mean() / CLASSES, official)
    expected = 0.8 * terms["labels"].mean() + 0.2 * terms["logits"].mean() + 500 * terms["hidden"].mean()
    torch.testing.assert_close(combine(terms), expected)


# DistilBERT


def test_distilbert():
    hidden_s, hidden_t = randn(BATCH, LENGTH, 6, grad=True), randn(BATCH, LENGTH, 6)
    student = Decoder(randn(BATCH, LENGTH, 5, grad=True), randn(VOCAB, 5, grad=True), randn(VOCAB, grad=True))
    teacher = Decoder(randn(BATCH, LENGTH, 8), randn(VOCAB, 8), randn(VOCAB))
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 2], labels[1, 3], labels[2, 0] = 4, 0, 18
    terms = losses.DistilBertLoss()(student, teacher, hidden_s, hidden_t, labels, MASK)
    z_s, z_t = F.linear(*student)[MASK], F.linear(*teacher)[MASK]
    close(terms["kl"], soft_kl(z_s, z_t, 2.0).mean())
    close(terms["mlm"], F.cross_entropy(F.linear(*student).flatten(0, 1), labels.flatten()))
    close(terms["cosine"], (1 - F.cosine_similarity(hidden_s, hidden_t, dim=-1))[MASK].mean())
    total = combine(terms)
    torch.testing.assert_close(
        total, 5 * terms["kl"].mean() + 2 * terms["mlm"].mean() + terms["cosine"].mean()
    )
    total.backward()
    assert all(x.grad is not None for x in (*student, hidden_s))


def test_distilbert_at_the_masked_words_alone():
    """The official code's ``restrict_ce_to_mask``; without a weight for them hidden states may differ."""
    hidden_s, hidden_t, labels = randn(BATCH, LENGTH, 6), randn(BATCH, LENGTH, 5), torch.tensor([4, 0])
    student = Decoder(randn(2, 6, grad=True), randn(VOCAB, 6, grad=True), randn(VOCAB, grad=True))
    teacher = Decoder(randn(2, 5), randn(VOCAB, 5))
    loss = losses.DistilBertLoss(alpha_cosine=0.0)
    terms = loss(student, teacher, hidden_s, hidden_t, labels, MASK)
    assert list(terms) == ["kl", "mlm"]
    z_s, z_t = F.linear(*student), F.linear(*teacher)
    close(terms["kl"], soft_kl(z_s, z_t, 2.0).mean())
    close(terms["mlm"], F.cross_entropy(z_s, labels))
    combine(terms).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)


def test_distilbert_without_a_masked_word():
    hidden = randn(BATCH, LENGTH, 6, grad=True)
    decoder = Decoder(hidden, randn(VOCAB, 6))
    labels = torch.full((BATCH, LENGTH), -100)
    teacher = Decoder(hidden.detach(), decoder.weight)
    total = combine(losses.DistilBertLoss()(decoder, teacher, hidden, hidden.detach(), labels, MASK))
    total.backward()
    torch.testing.assert_close(total, torch.zeros_like(total))
    assert hidden.grad.isfinite().all()


# TinyBERT


@pytest.mark.parametrize("shared", [False, True])
def test_tinybert(shared):
    loss = losses.TinyBertLoss(6, 10, shared=shared, bias=True).double()
    assert (loss.hidden is loss.embedding) == shared
    hidden_s = [randn(BATCH, LENGTH, 6, grad=True) for _ in range(3)]
    hidden_t = [randn(BATCH, LENGTH, 10) for _ in range(3)]
    taps_s, taps_t = [tap(3, grad=True) for _ in range(2)], [tap(5) for _ in range(2)]
    terms = loss(hidden_s, hidden_t, taps_s, taps_t, MASK)
    close(terms["embedding"], F.mse_loss(loss.embedding(hidden_s[0])[MASK], hidden_t[0][MASK]))
    layers = [
        F.mse_loss(loss.hidden(s)[MASK], t[MASK]) for s, t in zip(hidden_s[1:], hidden_t[1:], strict=True)
    ]
    close(terms["hidden"], sum(layers))
    pairs = (MASK[:, None, :, None] & MASK[:, None, None, :]).expand(-1, HEADS, -1, -1)
    scores = [
        F.mse_loss(
            (s.q @ s.k.transpose(-1, -2) * s.scale)[pairs], (t.q @ t.k.transpose(-1, -2) * t.scale)[pairs]
        )
        for s, t in zip(taps_s, taps_t, strict=True)
    ]
    close(terms["attention"], sum(scores))
    combine(terms).backward()
    assert loss.hidden.weight.grad.abs().sum() > 0 and taps_s[1].k.grad.abs().sum() > 0


def test_tinybert_of_full_rows_is_the_official_loss():
    full = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    loss = losses.TinyBertLoss(6, 6, shared=True, bias=True).double()
    hidden_s, hidden_t = ([randn(BATCH, LENGTH, 6) for _ in range(2)] for _ in range(2))
    taps_s, taps_t = [tap(3, mask=full)], [tap(3, mask=full)]
    official = sum(F.mse_loss(loss.hidden(s), t) for s, t in zip(hidden_s, hidden_t, strict=True))
    s, t = taps_s[0], taps_t[0]
    official += F.mse_loss(s.q @ s.k.transpose(-1, -2) * s.scale, t.q @ t.k.transpose(-1, -2) * t.scale)
    torch.testing.assert_close(combine(loss(hidden_s, hidden_t, taps_s, taps_t, full)), official)


def test_tinybert_prediction():
    z_s, z_t = randn(BATCH, CLASSES, grad=True), randn(BATCH, CLASSES)
    total = combine(losses.TinyBertPredictionLoss()(z_s, z_t))
    torch.testing.assert_close(total, soft_kl(z_s, z_t).mean())
    # the official code: soft cross entropy over B * C; the same gradient but for C
    official = (-z_t.softmax(-1) * z_s.log_softmax(-1)).mean() * CLASSES
    torch.testing.assert_close(torch.autograd.grad(total, z_s), torch.autograd.grad(official, z_s))


# MobileBERT


def test_mobilebert_layer():
    hidden_s, hidden_t = randn(BATCH, LENGTH, 8, grad=True), randn(BATCH, LENGTH, 8)
    tap_s, tap_t = tap(3, grad=True), tap(5)
    loss = losses.MobileBertLayerLoss(feature_map=100.0, mean=5000.0, variance=5.0)
    terms = loss(hidden_s, hidden_t, tap_s, tap_t, MASK)
    s, t = hidden_s[MASK], hidden_t[MASK]
    close(
        terms["feature_map"], F.mse_loss(F.layer_norm(s, (8,), eps=1e-12), F.layer_norm(t, (8,), eps=1e-12))
    )
    close(terms["mean"], (s.mean(-1) - t.mean(-1)).square().mean())
    close(terms["variance"], (s.var(-1, correction=0) - t.var(-1, correction=0)).abs().mean())
    close(terms["attention"], rows_kl(tap_s.q, tap_s.k, tap_t.q, tap_t.k))
    assert [term.weight for term in terms.values()] == [100.0, 5000.0, 5.0, 1.0]
    combine(terms).backward()
    assert hidden_s.grad[~MASK].abs().sum() == 0 and hidden_s.grad[MASK].abs().sum() > 0


def test_mobilebert_pretraining_is_cross_entropy_with_the_mixed_target():
    hidden = randn(BATCH, LENGTH, 6, grad=True)
    student, teacher = Decoder(hidden, randn(VOCAB, 6)), Decoder(randn(BATCH, LENGTH, 9), randn(VOCAB, 9))
    labels = torch.full((BATCH, LENGTH), -100)
    labels[0, 2], labels[1, 3] = 4, 0
    next_logits, next_labels = randn(BATCH, 2, grad=True), torch.tensor([0, 1, 1])
    terms = losses.MobileBertPretrainingLoss()(student, teacher, labels, next_logits, next_labels)
    assert list(terms) == ["mlm", "kd", "nsp"]
    masked = labels != -100
    z_s, z_t = F.linear(*student)[masked], F.linear(*teacher)[masked]
    target = 0.5 * z_t.softmax(-1) + 0.5 * F.one_hot(labels[masked], VOCAB)
    official = -(target * z_s.log_softmax(-1)).sum(-1).mean() + F.cross_entropy(next_logits, next_labels)
    ours = torch.autograd.grad(combine(terms), (hidden, next_logits))
    torch.testing.assert_close(ours, torch.autograd.grad(official, (hidden, next_logits)))
    with pytest.raises(ValueError, match="both or neither"):
        losses.MobileBertPretrainingLoss()(student, teacher, labels, next_logits)


def test_progressive_transfer():
    schedule = losses.ProgressiveTransfer(3, 10)
    assert schedule.num_steps == 30
    assert schedule.at(0) == (1, [3.0, 0.0, 0.0], 0.0)
    assert schedule.at(9).layer == 1 and schedule.at(10) == (2, [0.3, 3.0, 0.0], 0.0)
    assert schedule.at(29) == (3, [0.3, 0.3, 3.0], 0.0)
    assert schedule.at(30) == (None, [1.0, 1.0, 1.0], 1.0)
    assert losses.ProgressiveTransfer(2, 1, earlier=0.0).at(1).factors == [0.0, 3.0]
    with pytest.raises(ValueError, match="step must be from 0 on, got -1"):
        schedule.at(-1)
    with pytest.raises(ValueError, match="num_layers and steps_per_layer"):
        losses.ProgressiveTransfer(0)


# MiniLM


def test_minilm():
    tap_s, tap_t = tap(3, grad=True), tap(5)
    terms = losses.MiniLMLoss()(tap_s, tap_t)
    close(terms["attention"], rows_kl(tap_s.q, tap_s.k, tap_t.q, tap_t.k))
    close(terms["value"], rows_kl(tap_s.v, tap_s.v, tap_t.v, tap_t.v))
    combine(terms).backward()
    assert all(x.grad.abs().sum() > 0 for x in (tap_s.q, tap_s.k, tap_s.v))


def test_minilmv2_splits_heads_anew():
    tap_s, tap_t = tap(3), tap(6)
    terms = losses.MiniLMv2Loss(3, weights=[1.0, 2.0, 3.0])(tap_s, tap_t)
    total = 0
    for name, weight in zip("qkv", (1.0, 2.0, 3.0), strict=True):
        x_s, x_t = (
            getattr(x, name).transpose(1, 2).flatten(2).unflatten(-1, (3, -1)).transpose(1, 2)
            for x in (tap_s, tap_t)
        )
        log_s, log_t = distributions(x_s, x_s), distributions(x_t, x_t)
        rows = (log_t.exp() * (log_t - log_s)).sum(-1) * MASK[:, None]
        close(terms[name], rows.sum() / (3 * TOKENS))
        total += weight * terms[name].mean()
    torch.testing.assert_close(combine(terms), total)
    assert list(losses.MiniLMv2Loss(2, ("v",))(tap_s, tap_t)) == ["v"]


# Refusals


def test_refusals_name_the_argument():
    z, other = randn(BATCH, CLASSES), randn(BATCH, CLASSES + 1)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        losses.DistilledBiLSTMLoss(2)
    with pytest.raises(ValueError, match="labels must be given with alpha"):
        losses.DistilledBiLSTMLoss(0.5)(z, z)
    with pytest.raises(ValueError, match=r"one shape \(B, C\)"):
        losses.DistilledBiLSTMLoss()(z, other)
    with pytest.raises(ValueError, match="logits_t belongs to the teacher"):
        losses.TinyBertPredictionLoss()(z, randn(BATCH, CLASSES, grad=True))
    with pytest.raises(ValueError, match="one tensor a mapped layer"):
        losses.PKDLoss()(z, z, torch.tensor([0, 1, 2]), [randn(BATCH, 6)], [])
    with pytest.raises(ValueError, match="the embedding and every mapped layer"):
        losses.TinyBertLoss(6, 6)([randn(BATCH, LENGTH, 6)], [randn(BATCH, LENGTH, 6)], [], [])
    with pytest.raises(ValueError, match="relations must be some of q, k, v"):
        losses.MiniLMv2Loss(relations=("q", "x"))
    with pytest.raises(ValueError, match="weights must have one a relation"):
        losses.MiniLMv2Loss(weights=[1.0])
