"""FastBERT: classifiers, the two stages of training, and inference that lets samples go early."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bertops.distill.losses.fastbert import self_distillation_loss
from bertops.early_exit import Entropy, NormalizedEntropy, Patience
from bertops.models import BertConfig, BertModel, ExitClassifier, FastBert, FastBertOutput

LAYERS, LABELS, WIDTH = 4, 3, 32
LENGTHS = (9, 4, 1, 12, 6, 12, 2)


def make_model(family="bert", labels=LABELS, layers=LAYERS, **changes):
    config = BertConfig(
        family=family,
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        pad_token_id=1 if family == "roberta" else 0,
        position_offset=2 if family == "roberta" else 0,
        type_vocab_size=0 if family == "distilbert" else 2,
        **changes,
    )
    model = FastBert(BertModel(config), labels, head_size=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make_batch(lengths=LENGTHS, pad=0, padding="right"):
    """input_ids and mask (B, N)."""
    columns = max(lengths, default=0)
    mask = torch.arange(columns) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    if padding == "left":
        mask = mask.flip(1)
    ids = torch.randint(4, 40, mask.shape)
    return ids.masked_fill(~mask, pad), mask


def pack(ids, mask):
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return ids[mask][None], offsets


def middle_speed(model, ids, mask):
    """A speed at which half of all student answers are certain enough: between two of their entropies."""
    logits = torch.cat(model(ids, mask).student_logits)
    entropies = torch.distributions.Categorical(logits=logits).entropy().sort().values
    middle = len(entropies) // 2
    return float(entropies[middle - 1 : middle + 1].mean().detach()) / math.log(logits.shape[1])


def expected_exits(model, ids, mask, exits):
    """The layer and the logits that a loop over single samples finds; ``exits(logits, past)`` decides."""
    layers, answers = [], []
    for row in range(len(ids)):
        output = model(ids[row : row + 1], mask[row : row + 1])
        all_logits = [*output.student_logits, output.logits]
        past = []
        for layer, logits in enumerate(all_logits, 1):
            past.append(logits[0])
            if layer == len(all_logits) or exits(past):
                break
        layers.append(layer)
        answers.append(logits[0])
    return torch.tensor(layers), torch.stack(answers)


def entropy_exits(threshold, normalize=True):
    def exits(past):
        nats = torch.distributions.Categorical(logits=past[-1]).entropy()
        return nats <= threshold * (torch.tensor(float(len(past[-1]))).log() if normalize else 1.0)

    return exits


def patience_exits(patience):
    def exits(past):
        predictions = [int(x.argmax()) for x in past]
        return len(past) > patience and len(set(predictions[-patience - 1 :])) == 1

    return exits


# ---- the classifier


def multi_head_classifier(classifier):
    """The same weights in ``torch.nn.MultiheadAttention``, which forms keys and values of all tokens."""
    size = classifier.query.weight.shape[0]
    attention = torch.nn.MultiheadAttention(size, classifier.num_heads, batch_first=True).to(
        classifier.query.weight
    )
    with torch.no_grad():
        parts = classifier.query, classifier.key, classifier.value
        attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        biases = (
            classifier.query.bias,
            torch.randn(size),
            classifier.value.bias,
        )  # the keys' is without effect
        attention.in_proj_bias.copy_(torch.cat(biases))
        attention.out_proj.load_state_dict(classifier.proj.state_dict())

    def call(hidden, mask):
        narrow = classifier.narrow(hidden).tanh()
        attended = attention(narrow, narrow, narrow, key_padding_mask=~mask, need_weights=False)[0]
        return classifier.classifier(classifier.dense(attended[:, 0]).tanh())

    return call


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_classifier_is_attention_of_the_first_token(heads):
    classifier = ExitClassifier(WIDTH, LABELS, head_size=16, num_heads=heads).double()
    _, mask = make_batch()
    hidden = torch.randn(*mask.shape, WIDTH, dtype=torch.float64)
    expected = multi_head_classifier(classifier)(hidden, mask)
    hidden[~mask] = float("nan")
    torch.testing.assert_close(classifier(hidden, mask), expected)
    packed, offsets = pack(hidden, mask)
    torch.testing.assert_close(classifier(packed, cu_seqlens=offsets), expected)
    torch.testing.assert_close(classifier(packed, cu_seqlens=offsets, longest=15), expected)
    whole = hidden[3:4, :12]
    torch.testing.assert_close(classifier(whole), expected[3:4])


def test_classifier_of_sequences_without_a_token_is_a_number():
    classifier = ExitClassifier(WIDTH, LABELS, head_size=16)
    hidden = torch.randn(2, 3, WIDTH)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert classifier(hidden, mask).isfinite().all()
    offsets = torch.tensor([0, 0, 2], dtype=torch.int32)
    assert classifier(hidden[:1, :2], cu_seqlens=offsets).isfinite().all()
    assert classifier(hidden[:0], mask[:0]).shape == (0, LABELS)
    assert classifier(hidden[:1, :0], cu_seqlens=offsets[:1]).shape == (0, LABELS)


def test_head_size_must_fit_the_heads():
    with pytest.raises(ValueError, match="head_size 16 is not a multiple of num_heads 3"):
        ExitClassifier(WIDTH, LABELS, head_size=16, num_heads=3)


# ---- training


def test_first_stage_reaches_every_parameter_of_encoder_and_teacher():
    model = make_model().train()
    output = model(*make_batch())
    F.cross_entropy(output.logits, torch.randint(LABELS, (len(LENGTHS),))).backward()
    trained = [*model.encoder.layers.parameters(), *model.teacher.parameters()]
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    assert all(parameter.grad is None for parameter in model.students.parameters())


def test_second_stage_trains_the_students_alone_without_dropout():
    model = make_model().freeze().train()
    assert model.students.training and not model.encoder.training and not model.teacher.training
    ids, mask = make_batch()
    output = model(ids, mask)
    assert torch.equal(output.logits, model(ids, mask).logits)
    self_distillation_loss(output).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.students.parameters())
    assert all(p.grad is None for p in [*model.encoder.parameters(), *model.teacher.parameters()])


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_self_distillation_loss_and_gradient(direction):
    teacher = torch.randn(5, LABELS, dtype=torch.float64)
    students = [torch.randn(5, LABELS, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = 0.0
    for student in students:
        p, q = teacher.softmax(-1), student.softmax(-1)
        if direction == "student_teacher":
            p, q = q, p
        expected = expected + (p * (p.log() - q.log())).sum(-1).mean()
    loss = self_distillation_loss(FastBertOutput(teacher, tuple(students)), direction=direction)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, students)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, students))


def test_self_distillation_in_half_precision_and_of_equal_answers():
    logits = torch.randn(4, LABELS, dtype=torch.bfloat16)
    loss = self_distillation_loss(FastBertOutput(logits, (logits, logits)))
    assert loss.dtype == torch.float32 and loss == 0


def test_self_distillation_refuses():
    logits = torch.randn(4, LABELS)
    with pytest.raises(ValueError, match=r"direction must be one of .*, got 'both'"):
        self_distillation_loss(FastBertOutput(logits, (logits,)), direction="both")
    with pytest.raises(ValueError, match=r"output\.logits requires grad: call model\.freeze"):
        self_distillation_loss(make_model()(*make_batch()))
    with pytest.raises(ValueError, match="no student"):
        self_distillation_loss(FastBertOutput(logits, ()))


def test_the_students_learn_what_the_teacher_says():
    model = make_model(hidden_dropout_p=0.0).freeze().train()
    optimizer = torch.optim.AdamW(model.students.parameters(), lr=1e-2)
    ids, mask = make_batch(tuple(torch.randint(3, 16, (64,)).tolist()))
    losses = []
    for _ in range(60):
        loss = self_distillation_loss(model(ids, mask))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], losses[::10]


# ---- inference


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("layout", ["right", "left", "packed", "capacities"])
def test_every_sample_leaves_where_it_would_alone(family, layout):
    model = make_model(family)
    pad = 1 if family == "roberta" else 0
    ids, mask = make_batch(pad=pad, padding="left" if layout == "left" and family == "roberta" else "right")
    speed = middle_speed(model, ids, mask)
    layers, logits = expected_exits(model, ids, mask, entropy_exits(speed))
    assert layers.unique().numel() > 1
    if layout == "packed":
        packed, offsets = pack(ids, mask)
        output = model.infer(packed, cu_seqlens=offsets, speed=speed)
    elif layout == "capacities":
        output = model.infer(ids, mask, speed=speed, capacities=len(ids))
    else:
        output = model.infer(ids, mask, speed=speed)
    assert torch.equal(output.exit_layer, layers)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.prediction, logits.argmax(-1))
    entropy = torch.distributions.Categorical(logits=logits).entropy() / torch.tensor(float(LABELS)).log()
    torch.testing.assert_close(output.uncertainty, entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "capacities"])
@pytest.mark.parametrize(
    "criterion, exits",
    [
        (Entropy(0.7), entropy_exits(0.7, normalize=False)),
        (Patience(1), patience_exits(1)),
        (Patience(2), patience_exits(2)),
    ],
    ids=["nats", "patience 1", "patience 2"],
)
def test_other_criteria(criterion, exits, layout):
    model = make_model()
    ids, mask = make_batch()
    layers, logits = expected_exits(model, ids, mask, exits)
    capacities = len(ids) if layout == "capacities" else None
    output = model.infer(ids, mask, criterion=criterion, capacities=capacities)
    assert torch.equal(output.exit_layer, layers)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)


def test_speed_0_is_the_full_model_exactly():
    model = make_model()
    for classifier in [*model.students, model.teacher]:  # nothing is less uncertain than this: entropy 0
        torch.nn.init.constant_(classifier.classifier.bias, 0.0)
        classifier.classifier.bias.data[1] = 1e4
    ids, mask = make_batch()
    output = model.infer(ids, mask, speed=0)
    assert (output.exit_layer == LAYERS).all() and (output.uncertainty == 0).all()
    packed, offsets = pack(ids, mask)
    full = model(packed, cu_seqlens=offsets).logits
    assert torch.equal(output.logits, full)
    assert torch.equal(model.infer(ids, mask, speed=0, capacities=1).logits, model(ids, mask).logits)


def test_speed_0_runs_no_student():
    model = make_model()
    model.students = None
    assert (model.infer(*make_batch(), speed=0).exit_layer == LAYERS).all()


def test_speed_1_lets_everybody_go_after_the_first_layer():
    model = make_model()
    torch.nn.init.zeros_(model.students[0].classifier.weight)  # the largest entropy there is
    torch.nn.init.zeros_(model.students[0].classifier.bias)
    ids, mask = make_batch()
    assert (model.infer(ids, mask, speed=1, capacities=3).exit_layer == 1).all()
    for layer in range(1, LAYERS):
        model.encoder.layers[layer] = torch.nn.Identity()  # cannot be called as a layer
    assert (model.infer(ids, mask, speed=1).exit_layer == 1).all()


def test_exit_layers_fall_with_the_speed():
    model = make_model()
    ids, mask = make_batch()
    layers = [model.infer(ids, mask, speed=speed / 20).exit_layer for speed in range(21)]
    assert all((later <= sooner).all() for sooner, later in pairwise(layers))


def test_a_sample_with_nan_goes_to_the_end_and_harms_nobody():
    model = make_model()
    ids, mask = make_batch()
    speed = middle_speed(model, ids, mask)
    expected = model.infer(ids, mask, speed=speed)
    bad = 2
    model.encoder.embeddings.word.weight.data[39] = float("nan")
    ids[ids == 39] = 38
    expected = model.infer(ids, mask, speed=speed)
    ids[bad, 0] = 39
    for layout in ({}, {"capacities": len(ids)}):
        for criterion in (NormalizedEntropy(speed), Patience(1)):
            output = model.infer(ids, mask, criterion=criterion, **layout)
            assert output.exit_layer[bad] == LAYERS and output.uncertainty[bad].isnan()
        output = model.infer(ids, mask, speed=speed, **layout)
        others = torch.arange(len(ids)) != bad
        assert torch.equal(output.exit_layer[others], expected.exit_layer[others])
        torch.testing.assert_close(output.logits[others], expected.logits[others], rtol=1e-4, atol=1e-5)


def test_capacities_send_the_last_samples_away():
    model = make_model()
    ids, mask = make_batch()
    never_sure = 1e-9
    output = model.infer(ids, mask, speed=never_sure, capacities=[5, 5, 2])
    assert output.exit_layer.tolist() == [4, 4, 3, 3, 3, 1, 1]
    full = model(ids, mask)
    torch.testing.assert_close(output.logits[5:], full.student_logits[0][5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[:2], full.logits[:2], rtol=1e-4, atol=1e-5)
    assert (model.infer(ids, mask, speed=never_sure, capacities=0).exit_layer == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("capacities", [7, [5, 5, 2]])
def test_capacities_replay_as_a_cuda_graph(capacities):
    model = make_model().cuda()
    ids, mask = (x.cuda() for x in make_batch())
    speed = middle_speed(model, ids, mask)
    replayed = {"ids": torch.zeros_like(ids), "mask": torch.ones_like(mask)}

    def infer(ids, mask):
        return model.infer(ids, mask, speed=speed, capacities=capacities)

    with torch.cuda.stream(torch.cuda.Stream()):  # warms up: compiles the kernels
        infer(**replayed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = infer(**replayed)
    for shift in range(3):
        replayed["ids"].copy_(ids.roll(shift, 0))
        replayed["mask"].copy_(mask.roll(shift, 0))
        graph.replay()
        expected = infer(**replayed)
        assert torch.equal(output.exit_layer, expected.exit_layer)
        assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", [{}, {"capacities": 2}])
def test_empty_batch_and_single_samples(speed, layout):
    model = make_model()
    output = model.infer(torch.zeros(0, 5, dtype=torch.int64), speed=speed, **layout)
    assert output.prediction.shape == (0,) and output.logits.shape == (0, LABELS)
    ids, mask = make_batch((1,))
    assert model.infer(ids, mask, speed=speed, **layout).prediction.shape == (1,)


def test_a_single_class_and_a_single_layer():
    model = make_model(labels=1)
    assert (model.infer(*make_batch(), speed=0.5).exit_layer == 1).all()
    model = make_model(layers=1)
    ids, mask = make_batch()
    for layout in ({}, {"capacities": []}):
        assert (model.infer(ids, mask, speed=0.5, **layout).exit_layer == 1).all()


def test_bad_arguments():
    model = make_model()
    ids, mask = make_batch()
    packed, offsets = pack(ids, mask)
    with pytest.raises(ValueError, match=r"speed must be in \[0, 1\], got 1\.5"):
        model.infer(ids, mask, speed=1.5)
    with pytest.raises(ValueError, match=r"speed must be in \[0, 1\], got nan"):
        model.infer(ids, mask, speed=float("nan"))
    with pytest.raises(ValueError, match="either speed or criterion"):
        model.infer(ids, mask)
    with pytest.raises(ValueError, match="either speed or criterion"):
        model.infer(ids, mask, speed=0.5, criterion=Patience(1))
    with pytest.raises(TypeError, match="criterion must be"):
        model.infer(ids, mask, criterion="entropy")
    with pytest.raises(ValueError, match="patience must be an integer >= 1, got 0"):
        Patience(0)
    with pytest.raises(ValueError, match="nats must be a finite number >= 0, got -1"):
        Entropy(-1)
    with pytest.raises(ValueError, match="cu_seqlens does not go with capacities"):
        model.infer(packed, cu_seqlens=offsets, speed=0.5, capacities=3)
    for capacities in (-1, [1, 2], [1, 2, "3"]):
        with pytest.raises(ValueError, match="capacities must be an integer >= 0, or one for each of layers"):
            model.infer(ids, mask, speed=0.5, capacities=capacities)
    with pytest.raises(ValueError, match="position_ids must be from 0 to 15"):
        model.infer(torch.full((1, 17), 5), speed=0.5)
    with pytest.raises(ValueError, match="input_ids must be from 0 to 39"):
        model.infer(torch.full((1, 3), 40), speed=0.5)
    with pytest.raises(RuntimeError, match="training mode"):
        model.train().infer(ids, mask, speed=0.5)
