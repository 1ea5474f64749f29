"""A student that starts from layers of its teacher."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bertops.distill.layer_map import layer_number
from bertops.models.encoder import Encoder

# Teacher layers of DistilBERT's six, counted from 1; its code counts from 0 and lists 0, 2, 4, 7, 9, 11.
DISTILBERT_LAYERS = (1, 3, 5, 8, 10, 12)

Copy = tuple[str, Tensor, Tensor | None]  # name in the student, its tensor, the teacher's


@torch.no_grad()
def init_student_from_teacher(
    student: nn.Module, teacher: nn.Module, layers: Sequence[int], *, heads: bool = False
) -> None:
    """Copies the teacher's embeddings and chosen layers into the student.

    ::

        student = BertForMaskedLM(sizes.DISTILBERT)
        init_student_from_teacher(student, teacher, DISTILBERT_LAYERS)
        init_student_from_teacher(student, teacher, layer_map.bottom(6, 12))  # BERT-PKD's

    Args:
        student, teacher: models of :mod:`bertops.models`, bare or with a head, with layers of one width.
        layers: for every student layer the teacher's, counted from 1, or from the end, -1 being the last.
        heads: also copy what stands behind the layers: the pooler and the head's modules. Then both models
            have the same ones.

    Every tensor is cast to the student's dtype and device. A student without a token type table (DistilBERT)
    leaves the teacher's out, as DistilBERT's code does.

    Raises:
        TypeError: a model is none of :mod:`bertops.models`, or ``layers`` are no integers.
        ValueError: ``layers`` do not fit the models, head counts differ, tensors of the student are of
            another shape, shared, or not in the teacher; names them all. Then nothing is copied.

    Source: Sanh et al. 2019 (DistilBERT), section 3, and its code; Sun et al. 2019 (PKD).
    """
    ours, theirs = encoder_of("student", student), encoder_of("teacher", teacher)
    if len(layers) != len(ours.layers):
        raise ValueError(
            f"layers must have an entry for each of {len(ours.layers)} student layers, "
            f"got {len(layers)}: {list(layers)}"
        )
    numbers = [layer_number("layers", layer, len(theirs.layers)) for layer in layers]
    counts = ours.config.num_attention_heads, theirs.config.num_attention_heads
    if counts[0] != counts[1]:
        raise ValueError(f"num_attention_heads must be that of the teacher, {counts[1]}, got {counts[0]}")

    copies = list(matched("embeddings", ours.embeddings, theirs.embeddings))
    for i, number in enumerate(numbers):
        copies += matched(f"layers.{i}", ours.layers[i], theirs.layers[number - 1])
    if heads:
        copies += matched_heads(student, teacher)
    copy_all(copies)


@torch.no_grad()
def init_ends_from_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Copies the teacher's embeddings and all that stands behind the layers: MobileBERT's start.

    Raises:
        ValueError: tensors of the student are of another shape, or not in the teacher; names them all.

    Source: Sun et al. 2020 (MobileBERT), section 3.5.
    """
    ours, theirs = encoder_of("student", student), encoder_of("teacher", teacher)
    embeddings = matched("embeddings", ours.embeddings, theirs.embeddings)
    copy_all([*embeddings, *matched_heads(student, teacher)])


def encoder_of(name: str, model: nn.Module) -> Encoder:
    encoder = model if isinstance(model, Encoder) else getattr(model, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise TypeError(f"{name} must be a model of bertops.models, got {type(model).__name__}")
    return encoder


def matched(prefix: str, target: nn.Module, source: nn.Module) -> Iterator[Copy]:
    """The parameters of ``target``, each with that of the same name in ``source``."""
    found = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        yield f"{prefix}.{name}", parameter, found.get(name)


def matched_heads(student: nn.Module, teacher: nn.Module) -> Iterator[Copy]:
    """The same of everything that is neither embedding nor layer."""
    inside = ("encoder.", "embeddings.", "layers.")
    found = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name.startswith("encoder.pooler.") or not name.startswith(inside):
            yield name, parameter, found.get(name)


def copy_all(copies: list[Copy]) -> None:
    refuse_unfit(copies)
    for _, target, source in copies:
        assert source is not None
        target.copy_(source)


def refuse_unfit(copies: list[Copy]) -> None:
    problems = []
    first: dict[int, str] = {}  # of a shared tensor, the name under which it came first
    for name, target, source in copies:
        if source is None:
            problems.append(f"the teacher has no {name}")
        elif source.shape != target.shape:
            problems.append(f"{name} is {tuple(target.shape)}, the teacher's {tuple(source.shape)}")
        elif first.setdefault(id(target), name) != name:
            problems.append(f"{name} is shared with {first[id(target)]}")
    if problems:
        raise ValueError("the student cannot start from this teacher: " + "; ".join(problems))
