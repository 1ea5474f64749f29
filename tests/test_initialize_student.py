"""Students that start from layers of their teacher."""

from dataclasses import replace

import pytest
import torch

from bertops.distill import layer_map
from bertops.distill.initialize import DISTILBERT_LAYERS, init_student_from_teacher
from bertops.models import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MobileBertConfig,
    MobileBertModel,
    sizes,
)

SMALL = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "max_position_embeddings": 8}
TEACHER = BertConfig(num_hidden_layers=12, num_attention_heads=3, **SMALL)
STUDENT = replace(TEACHER, num_hidden_layers=6)


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_starts_from(student, teacher, layers):
    for name, parameter in student.embeddings.named_parameters():
        assert torch.equal(parameter, teacher.embeddings.get_parameter(name)), name
    for layer, number in zip(student.layers, layers, strict=True):
        for name, parameter in layer.named_parameters():
            source = teacher.layers[number - 1].get_parameter(name)
            assert torch.equal(parameter, source), (number, name)
            assert parameter.data_ptr() != source.data_ptr() and parameter.requires_grad


@pytest.mark.parametrize(
    "layers", [DISTILBERT_LAYERS, layer_map.bottom(6, 12), layer_map.uniform(6, 12), [12, 1, 1, 7, 3, 2]]
)
def test_embeddings_and_layers(layers):
    teacher, student = randomized(BertModel(TEACHER)), BertModel(STUDENT)
    pooler = student.pooler.weight.clone()
    init_student_from_teacher(student, teacher, layers)
    assert_starts_from(student, teacher, layers)
    assert torch.equal(student.pooler.weight, pooler)


def test_distilbert_counts_from_0_in_its_code():
    assert [layer - 1 for layer in DISTILBERT_LAYERS] == [0, 2, 4, 7, 9, 11]


def test_layers_count_from_the_end_too():
    teacher, student = randomized(BertModel(TEACHER)), BertModel(replace(STUDENT, num_hidden_layers=2))
    init_student_from_teacher(student, teacher, [-12, -1])
    assert_starts_from(student, teacher, [1, 12])


def test_distilbert_leaves_token_types_out():
    small = {**SMALL, "num_attention_heads": 3}
    student = BertForMaskedLM(replace(sizes.DISTILBERT, **small))
    teacher = randomized(BertForMaskedLM(TEACHER))
    init_student_from_teacher(student, teacher, DISTILBERT_LAYERS, heads=True)
    assert student.encoder.embeddings.token_type is None
    assert_starts_from(student.encoder, teacher.encoder, DISTILBERT_LAYERS)
    for name, parameter in student.head.named_parameters():
        assert torch.equal(parameter, teacher.head.get_parameter(name)), name


def test_heads_only_where_asked():
    teacher = randomized(BertForSequenceClassification(TEACHER))
    student = BertForSequenceClassification(STUDENT)
    dense = student.dense.weight.clone()
    init_student_from_teacher(student, teacher, DISTILBERT_LAYERS)
    assert torch.equal(student.dense.weight, dense)
    init_student_from_teacher(student, teacher, DISTILBERT_LAYERS, heads=True)
    assert torch.equal(student.dense.weight, teacher.dense.weight)
    assert torch.equal(student.classifier.bias, teacher.classifier.bias)


def test_a_bare_student_of_a_teacher_with_a_head():
    teacher, student = randomized(BertForMaskedLM(TEACHER)), BertModel(STUDENT)
    init_student_from_teacher(student, teacher, DISTILBERT_LAYERS)
    assert_starts_from(student, teacher.encoder, DISTILBERT_LAYERS)
    with pytest.raises(
        ValueError, match=r"the teacher has no pooler\.weight; the teacher has no pooler\.bias"
    ):
        init_student_from_teacher(student, teacher, DISTILBERT_LAYERS, heads=True)


def test_pooler_of_bare_models():
    teacher, student = randomized(BertModel(TEACHER)), BertModel(STUDENT)
    init_student_from_teacher(student, teacher, layer_map.bottom(6, 12), heads=True)
    assert torch.equal(student.pooler.weight, teacher.pooler.weight)


def test_casts_to_the_dtype_of_the_student():
    teacher, student = randomized(BertModel(TEACHER)), BertModel(STUDENT).to(torch.bfloat16)
    init_student_from_teacher(student, teacher, DISTILBERT_LAYERS)
    expected = teacher.layers[11].up.weight.to(torch.bfloat16)
    assert student.layers[5].up.weight.dtype == torch.bfloat16
    assert torch.equal(student.layers[5].up.weight, expected)


def test_mobilebert():
    config = MobileBertConfig(
        **{**SMALL, "embedding_size": 4, "intra_bottleneck_size": 8}, num_hidden_layers=4
    )
    teacher = randomized(MobileBertModel(config))
    student = MobileBertModel(replace(config, num_hidden_layers=2))
    init_student_from_teacher(student, teacher, [2, 4])
    assert_starts_from(student, teacher, [2, 4])


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({}, [1, 2, 3], r"layers must have an entry for each of 6 student layers, got 3"),
        ({}, [0, 2, 4, 7, 9, 11], "layers must not hold 0: layers count from 1"),
        ({}, [1, 3, 5, 8, 10, 13], "layers must be from 1 to 12"),
        ({"num_attention_heads": 4}, DISTILBERT_LAYERS, "num_attention_heads must be that of the teacher, 3"),
        (
            {"hidden_size": 9},
            DISTILBERT_LAYERS,
            r"embeddings\.word\.weight is \(20, 9\), the teacher's \(20, 12\)",
        ),
        ({"intermediate_size": 8}, DISTILBERT_LAYERS, r"layers\.5\.down\.weight is \(12, 8\)"),
        ({"vocab_size": 21}, DISTILBERT_LAYERS, r"embeddings\.word\.weight is \(21, 12\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_copied(changes, layers, message):
    student = BertModel(replace(STUDENT, **changes))
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ValueError, match=message):
        init_student_from_teacher(student, randomized(BertModel(TEACHER)), layers)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))


def test_a_student_that_shares_its_layers_is_refused():
    config = AlbertConfig(num_hidden_layers=2, num_attention_heads=3, embedding_size=12, **SMALL)
    teacher, student = AlbertModel(replace(config, share="none")), AlbertModel(replace(config, share="all"))
    with pytest.raises(ValueError, match=r"layers\.1\.up\.weight is shared with layers\.0\.up\.weight"):
        init_student_from_teacher(student, teacher, [1, 2])
    init_student_from_teacher(teacher, student, [1, 2])


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"teacher must be a model of bertops\.models, got Linear"):
        init_student_from_teacher(BertModel(STUDENT), torch.nn.Linear(2, 2), DISTILBERT_LAYERS)
    with pytest.raises(TypeError, match=r"layers must be integers, got 1\.5"):
        init_student_from_teacher(BertModel(STUDENT), BertModel(TEACHER), [1.5, 3, 5, 8, 10, 12])
