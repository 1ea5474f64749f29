"""From a recipe's terms to the training loop's sums and counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from bertops.distill.capture import capture
from bertops.distill.losses import combine
from bertops.distill.objective import Classification
from bertops.distill.recipes import bilstm, distilbert, fastbert, minilm, mobilebert, pkd, tinybert
from bertops.models import (
    BertForSequenceClassification,
    BertModel,
    BiLSTMClassifier,
    BiLSTMConfig,
    FastBert,
    MobileBertForSequenceClassification,
)
from small_task import CONFIG, IB_BERT, far_from_zero

LENGTHS = torch.tensor([7, 4, 1, 9])
MASK = torch.arange(9) < LENGTHS[:, None]


def batch(rows=slice(None)):
    """Cut to its longest row, as those of the stream are."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, CONFIG.vocab_size, MASK.shape, generator=generator)
    longest = int(LENGTHS[rows].max())
    given = {"input_ids": (ids * MASK)[:, :longest], "mask": MASK[:, :longest]}
    return {name: x[rows] for name, x in {**given, "labels": torch.tensor([0, 1, 1, 0])}.items()}


def bert(layers=4):
    return far_from_zero(BertForSequenceClassification(replace(CONFIG, num_hidden_layers=layers)))


def objectives():
    teacher, ib, small = bert(), far_from_zero(MobileBertForSequenceClassification(IB_BERT)), bert(2)
    narrow = mobilebert.narrow_student(ib, mobilebert.Options(bottleneck=12, feed_forward=16, stacked=2))
    words = BiLSTMClassifier(BiLSTMConfig(vocab_size=CONFIG.vocab_size, embedding_size=6, hidden_size=4))
    exits = FastBert(BertModel(CONFIG), 2, head_size=8)
    two = minilm.Options(version=2, relation_heads=6)
    return {
        "classification": Classification(small),
        "tinybert-1": tinybert.Intermediate(small, teacher),
        "tinybert-2": tinybert.Prediction(small, teacher, 1.0),
        "minilm-1": minilm.Relations(small, teacher, minilm.Options()),
        "minilm-2": minilm.Relations(small, teacher, two),
        "pkd": pkd.PatientDistillation(small, teacher, pkd.Options()),
        "distilbert": distilbert.TripleLoss(small, teacher, distilbert.Options()),
        "bilstm": bilstm.Logits(words, teacher, 0.3),
        "fastbert-1": fastbert.Backbone(exits),
        "fastbert-2": fastbert.SelfDistillation(FastBert(BertModel(CONFIG), 2, head_size=8).freeze()),
        "mobilebert-1": mobilebert.LayerTransfer(narrow, ib, 2),
        "mobilebert-2": mobilebert.TaskDistillation(narrow, ib, 0.3),
    }


NAMES = list(objectives())


def minimised(objective, batches):
    """As the loop does it: sums over sums of counts."""
    found, counts = [objective(part) for part in batches], [objective.counts(part) for part in batches]
    return sum(
        weight * sum(sums[name] for sums in found) / sum(count[name] for count in counts)
        for name, weight in objective.weights.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_loop_minimises_the_papers_means_whatever_the_batches(name):
    objective = objectives()[name].eval()
    expected = combine({key: term for key, term in objective.terms(batch()).items() if term.weight})
    torch.testing.assert_close(minimised(objective, [batch()]), expected, rtol=1e-5, atol=1e-7)
    halves = [batch(slice(0, 1)), batch(slice(1, None))]
    torch.testing.assert_close(minimised(objective, halves), expected, rtol=1e-5, atol=1e-7)
    assert objective.counts(batch())["tokens"] == int(LENGTHS.sum())
    assert objective.weights.keys() <= objective(batch()).keys() <= objective.counts(batch()).keys()


@pytest.mark.parametrize("name", NAMES)
def test_teacher_stands_still_and_the_student_learns(name):
    objective = objectives()[name].train()
    objective(batch())
    minimised(objective, [batch()]).backward()
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    if objective.teacher is not None:
        assert not any(module.training for module in objective.teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert objective.student.training


def run_all(model):
    given = batch()
    return model(given["input_ids"], given["mask"], output_hidden_states=True, output_scores=True)


def over_tokens(x):
    return x[MASK].mean()


def test_tinybert_maps_two_of_four_layers_to_the_second_and_the_last():
    objective = objectives()["tinybert-1"].eval()
    s, t = run_all(objective.student), run_all(objective.teacher)
    terms, loss = objective.terms(batch()), objective.loss
    embedding = (loss.embedding(s.hidden_states[0]) - t.hidden_states[0]).square()
    pairs = [(1, 2), (2, 4)]
    hidden = [(loss.hidden(s.hidden_states[m]) - t.hidden_states[g]).square() for m, g in pairs]
    real = (MASK[:, None, :, None] & MASK[:, None, None]).expand_as(s.scores[0])
    attention = [(s.scores[m - 1] - t.scores[g - 1]).square()[real].mean() for m, g in pairs]
    for name, expected in {
        "embedding": over_tokens(embedding),
        "hidden": sum(map(over_tokens, hidden)),
        "attention": sum(attention),
    }.items():
        torch.testing.assert_close(terms[name].mean(), expected, rtol=1e-4, atol=1e-7)


def test_pkd_compares_first_tokens_of_the_mapped_layers():
    for name, layer in (("skip", 2), ("last", 3)):
        teacher, student = bert(), bert(2)
        objective = pkd.PatientDistillation(student, teacher, pkd.Options(map=name)).eval()
        first_s, first_t = (
            run_all(student).hidden_states[1][:, 0],
            run_all(teacher).hidden_states[layer][:, 0],
        )
        expected = F.mse_loss(F.normalize(first_s, dim=1), F.normalize(first_t, dim=1))
        torch.testing.assert_close(objective.terms(batch())["hidden"].mean(), expected, rtol=1e-4, atol=1e-7)


def test_minilm_takes_the_teachers_layer_and_the_students_last():
    def value_relations(model, layer):
        given = batch()
        with capture(model, [layer]) as taps:
            model(given["input_ids"], given["mask"])
        v = taps[layer].v
        scores = v @ v.transpose(-1, -2) / v.shape[-1] ** 0.5
        return scores.masked_fill(~MASK[:, None, None], -1e9).log_softmax(-1)

    teacher, student = bert(), bert(2)
    objective = minilm.Relations(student, teacher, minilm.Options(teacher_layer=3)).eval()
    log_s, log_t = value_relations(student, 2), value_relations(teacher, 3)
    rows = (log_t.exp() * (log_t - log_s)).sum(-1).transpose(1, 2)  # (B, N, heads)
    torch.testing.assert_close(
        objective.terms(batch())["value"].mean(), over_tokens(rows), rtol=1e-4, atol=1e-7
    )


def test_mobilebert_transfers_the_layer_of_its_stage():
    both = objectives()["mobilebert-2"]
    objective = mobilebert.LayerTransfer(both.student, both.teacher, 2).eval()
    given = batch()
    states = [
        model.encoder(given["input_ids"], given["mask"], unpad=True, output_hidden_states=True).hidden_states
        for model in (objective.student, objective.teacher)
    ]
    s, t = (F.layer_norm(state[2], state[2].shape[-1:], eps=1e-12) for state in states)
    found = objective.terms(given)["feature_map"].mean()
    torch.testing.assert_close(found, over_tokens((s - t).square()), rtol=1e-4, atol=1e-7)
    first = mobilebert.LayerTransfer(both.student, both.teacher, 1).student
    names = {name for name, p in first.named_parameters() if p.requires_grad}
    assert names and all(name.startswith("encoder.layers.0.") for name in names)


def test_accuracy_and_cross_entropy():
    objective = objectives()["classification"].eval()
    given = batch()
    logits = objective.student(given["input_ids"], given["mask"]).logits
    found, counts = objective(given), objective.counts(given)
    expected = F.cross_entropy(logits, given["labels"])
    torch.testing.assert_close(found["loss"] / counts["loss"], expected, rtol=1e-5, atol=1e-7)
    assert found["accuracy"] / counts["accuracy"] == (logits.argmax(1) == given["labels"]).float().mean()
    assert objective.weights == {"loss": 1.0}
