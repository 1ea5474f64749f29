"""A student that starts from layers of its teacher."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from bertops.distill.layer_map import layer_number
from bertops.models.encoder import Encoder

# Teacher layers of DistilBERT's six, counted from 1; its code counts from 0 and lists 0, 2, 4, 7, 9, 11.
DISTILBERT_LAYERS = (1, 3, 5, 8, 10, 12)


@torch.no_grad()
def init_student_from_teacher(
    student: nn.Module, teacher: nn.Module, layers: Sequence[int], *, heads: bool = False
) -> None:
    """Copies the teacher's embeddings and chosen layers into the student.

    ::

        student = BertForMaskedLM(sizes.DISTILBERT)
        init_student_from_teacher(student, teacher, DISTILBERT_LAYERS, heads=True)
        init_student_from_teacher(student, teacher, layer_map.bottom(6, 12))  # BERT-PKD

    Args:
        student, teacher: models of :mod:`bertops.models`, bare or with a head, with layers of one width.
        layers: for every student layer the teacher's, counted from 1, or from the end, -1 being the last.
        heads: also copy what stands behind the layers: a pooler, and the head's modules.

    Each tensor is cast to the student's dtype and device. A student without a token type table (DistilBERT)
    leaves the teacher's out, as DistilBERT's code does.

    Raises:
        TypeError: a model is none of :mod:`bertops.models`, or ``layers`` are no integers.
        ValueError: ``layers`` do not fit the models, head counts or shapes differ, a tensor of the student
            has no counterpart, or student layers share their parameters; names all of them. Nothing is copied
            then.

    Source: Sanh et al. 2019 (DistilBERT), section 3 and its code; Sun et al. 2019 (PKD), section 4.2.
    """
    ours, theirs = find("student", student), find("teacher", teacher)
    count = len(ours.layers)
    if len(layers) != count:
        raise ValueError(
            f"layers must have an entry for each of {count} student layers, got {len(layers)}: {list(layers)}"
        )
    numbers = [layer_number("layers", layer, len(theirs.layers)) for layer in layers]
    if ours.config.num_attention_heads != theirs.config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads of student and teacher must be equal, got {ours.config.num_attention_heads} "
            f"and {theirs.config.num_attention_heads}"
        )
    pairs: Iterator[tuple[str, nn.Module, nn.Module | None]] = iter(
        [("embeddings", ours.embeddings, theirs.embeddings)]
        + [(f"layers.{i}", ours.layers[i], theirs.layers[n - 1]) for i, n in enumerate(numbers)]
    )
    if heads:
        pairs = chain(pairs, head_modules(student, ours, teacher, theirs))
    copies = [copy for pair in pairs for copy in matching_tensors(*pair)]
    problems = []
    targets: dict[int, str] = {}
    for name, target, source in copies:
        if source is None:
            problems.append(f"the teacher has no {name}")
        elif source.shape != target.shape:
            problems.append(f"{name} is {tuple(target.shape)} and the teacher's {tuple(source.shape)}")
        shared = targets.setdefault(id(target), name)
        if shared != name:
            problems.append(f"{name} is shared with {shared}")
    if problems:
        raise ValueError("the student cannot start from the teacher: " + "; ".join(problems))
    for _, target, source in copies:
        target.copy_(source)
