"""FastBERT: an encoder with a classifier after every layer, so that easy samples leave early."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertops._files import write_whole
from bertops.early_exit.criteria import Criterion, criterion_of
from bertops.early_exit.runtime import (
    ExitOutput,
    check_capacities,
    check_evaluating,
    run_packed,
    run_with_capacities,
)
from bertops.models.albert import AlbertModel
from bertops.models.bert import BertModel
from bertops.models.checkpoint import CONFIG, open_tensors, read_json, resolve_folder
from bertops.models.config import config_from_hf
from bertops.models.encoder import Encoder, initialize
from bertops.models.mobilebert import MobileBertModel
from bertops.models.rows import first_tokens, pack_ids
from bertops.reference import sequence_positions

EXITS = "exits.safetensors"  # the classifiers, beside the encoder
ENCODERS: tuple[type[Encoder], ...] = (BertModel, AlbertModel, MobileBertModel)


@dataclass
class FastBertOutput:
    """Logits (number of sequences, C) of the teacher, and of the student after each layer but the last."""

    logits: Tensor
    student_logits: tuple[Tensor, ...]


class ExitClassifier(nn.Module):
    """FastBERT's classifier: narrow, attend, take the first token, classify.

    Args:
        hidden_size: width H of the encoder.
        num_labels: classes C.
        head_size: width S inside, a multiple of ``num_heads``.
        num_heads: attention heads.

    Linear H to S and tanh over all tokens; attention of the first token over all of them; linear and tanh;
    linear to C. As only the first token asks, keys and values are never formed: with its query :math:`q` of a
    head, :math:`q \\cdot (W_k x_j)` is :math:`(W_k^\\top q) \\cdot x_j`, and :math:`\\sum_j p_j W_v x_j` is
    :math:`W_v \\sum_j p_j x_j`. A bias of the keys would change nothing, and there is none.

    Source: Liu et al. 2020 (FastBERT), section 3.1; the sizes are those of its code.
    """

    def __init__(self, hidden_size: int, num_labels: int, head_size: int = 128, num_heads: int = 2) -> None:
        super().__init__()
        if head_size % num_heads:
            raise ValueError(f"head_size {head_size} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.narrow = nn.Linear(hidden_size, head_size)
        self.query = nn.Linear(head_size, head_size)
        self.key = nn.Linear(head_size, head_size, bias=False)
        self.value = nn.Linear(head_size, head_size)
        self.proj = nn.Linear(head_size, head_size)
        self.dense = nn.Linear(head_size, head_size)
        self.classifier = nn.Linear(head_size, num_labels)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """(B, N, H) and ``mask`` (B, N), or packed (1, T, H) and ``cu_seqlens``, to (sequences, C).

        ``longest``: the length of the longest packed sequence, read back from the device if None.
        """
        narrow = self.narrow(hidden).tanh()
        if cu_seqlens is not None:
            narrow, mask = pad_packed(narrow, cu_seqlens, longest)
        elif mask is not None:
            narrow = narrow.masked_fill((mask == 0)[..., None], 0.0)
        first = first_tokens(narrow, mask)
        query = self.query(first).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, B, head_dim)
        probe = query @ self.key.weight.unflatten(0, (self.num_heads, -1))  # (heads, B, S)
        scores = narrow @ probe.permute(1, 2, 0) * query.shape[2] ** -0.5  # (B, N, heads)
        if mask is not None:
            scores = scores.masked_fill((mask == 0)[..., None], torch.finfo(scores.dtype).min)
        mixed = scores.softmax(1).transpose(1, 2) @ narrow  # (B, heads, S)
        weight = self.value.weight.unflatten(0, (self.num_heads, -1))
        attended = mixed.transpose(0, 1) @ weight.transpose(1, 2)  # (heads, B, head_dim)
        attended = attended.transpose(0, 1).flatten(1) + self.value.bias
        return self.classifier(self.dense(self.proj(attended)).tanh())


def pad_packed(rows: Tensor, cu_seqlens: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
    """(1, T, S) to (sequences, longest, S), 0 at padding, and its mask."""
    lengths = cu_seqlens.diff()
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    sequence, position = sequence_positions(rows.shape[1], cu_seqlens)
    padded = rows.new_zeros(len(lengths) * longest, rows.shape[2])
    padded = padded.index_copy(0, sequence * longest + position, rows[0])
    mask = torch.arange(longest, device=rows.device) < lengths[:, None]
    return padded.unflatten(0, (len(lengths), longest)), mask


class FastBert(nn.Module):
    """An encoder, a student classifier after each of its layers but the last, and the teacher after that.

    Args:
        encoder: any encoder of ``bertops.models``; its pooler is not used.
        num_labels: classes C.
        head_size, num_heads: of the classifiers, see :class:`ExitClassifier`.

    Training has two stages. First encoder and teacher learn the task: cross entropy of ``output.logits``.
    Then ``freeze()``, and the students learn from the teacher without labels, on any text of the domain:
    :func:`bertops.distill.losses.self_distillation_loss`.

    Source: Liu et al. 2020 (FastBERT).
    """

    def __init__(
        self, encoder: Encoder, num_labels: int, *, head_size: int = 128, num_heads: int = 2
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.num_labels = num_labels
        self.frozen = False

        def classifier() -> ExitClassifier:
            new = ExitClassifier(self.config.hidden_size, num_labels, head_size, num_heads)
            initialize(new, self.config)
            return new

        self.students = nn.ModuleList(classifier() for _ in range(self.num_layers - 1))
        self.teacher = classifier()

    @property
    def num_layers(self) -> int:
        return len(self.encoder.layers)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self.config.max_position_embeddings - self.config.position_offset

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the encoder, which transformers loads, and ``exits.safetensors`` with the classifiers."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        exits = {
            name: x.cpu().contiguous()
            for name, x in self.state_dict().items()
            if not name.startswith("encoder.")
        }
        write_whole(folder / EXITS, save(exits, {"num_heads": str(self.teacher.num_heads)}))
        self.encoder.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> "FastBert":
        """What :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError, ValueError: files are missing or do not fit; says which.
        """
        folder = resolve_folder(folder_or_hub_id)
        if not (folder / EXITS).exists():
            raise FileNotFoundError(f"{folder} has no {EXITS}")
        config = config_from_hf(read_json(folder / CONFIG))
        encoder_class = next(cls for cls in ENCODERS if isinstance(config, cls.config_class))
        encoder = encoder_class.from_pretrained(folder)
        with open_tensors(folder / EXITS) as file:
            exits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            num_heads = int(file.metadata()["num_heads"])
        labels, head_size = exits["teacher.classifier.weight"].shape
        model = cls(encoder, labels, head_size=head_size, num_heads=num_heads)
        missing, unexpected = model.load_state_dict(exits, strict=False)
        missing = [name for name in missing if not name.startswith("encoder.")]
        if missing or unexpected:
            raise ValueError(f"{folder / EXITS} lacks {missing} and has {unexpected}: not of this encoder")
        return model.eval()

    def freeze(self) -> "FastBert":
        """The second stage: encoder and teacher get no gradient and stay in evaluation mode whatever
        ``train()`` says, so that the students learn from what inference computes."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        self.teacher.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "FastBert":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.teacher.eval()
        return self

    def embed(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Checks the arguments, as :meth:`Encoder.embed` does; what the first layer takes."""
        return self.encoder.embed(input_ids, mask, token_type_ids, position_ids, cu_seqlens)

    def run_layer(
        self, layer: int, hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The output of ``layer``, counted from 1."""
        return self.encoder.layers[layer - 1](hidden, mask, cu_seqlens, False)[0]

    def classify(
        self,
        layer: int,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Logits (number of sequences, C) after ``layer``: of its student, after the last of the teacher.

        ``longest``: the length of the longest packed sequence, read back from the device if None.
        """
        classifier = self.teacher if layer == self.num_layers else self.students[layer - 1]
        return classifier(hidden, mask, cu_seqlens, longest)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> FastBertOutput:
        """All layers and all classifiers; takes what :meth:`Encoder.forward` takes."""
        rows: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens}
        states = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.embed(input_ids, mask, token_type_ids, position_ids, cu_seqlens)
            for layer in range(1, self.num_layers + 1):
                hidden = self.run_layer(layer, hidden, **rows)
                states.append(hidden)
            logits = self.classify(self.num_layers, hidden, **rows)
        students = (self.classify(layer, state, **rows) for layer, state in enumerate(states[:-1], 1))
        return FastBertOutput(logits, tuple(students))

    @torch.no_grad()
    def infer(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        speed: float | None = None,
        criterion: Criterion | None = None,
        capacities: int | Sequence[int] | None = None,
    ) -> ExitOutput:
        """Every sample goes as far as it must.

        Args:
            input_ids, mask, token_type_ids, position_ids, cu_seqlens: as in :meth:`Encoder.forward`. Of a
                padded batch the real tokens are packed first; what exited costs nothing from there on.
            speed: in [0, 1]: a sample exits where its normalized entropy is at most this. 0 gives the answers
                of the full model, at its cost; 1 lets everybody go after the first layer.
            criterion: another rule, of :mod:`bertops.early_exit`, in place of ``speed``.
            capacities: rows of each of layers 2 to L, or one number for all of them, where nothing may be
                read back from the device (CUDA graphs); 0 ends the model there. Shapes are fixed: the batch
                stays padded, and a sample for whom the next layer has no room leaves with the answer it has.

        Returns:
            :class:`ExitOutput`, in the order of the input. The last layer always answers; logits with a NaN
            never exit before it. Without ``capacities`` the host waits for the device once to learn the
            lengths, and once a layer.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
            RuntimeError: the model is in training mode.
        """
        check_evaluating(self)
        rule = criterion_of(speed, criterion)
        if capacities is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens does not go with capacities: packed rows have no fixed shape")
            rows = check_capacities(capacities, input_ids.shape[0], self.num_layers)
            hidden = self.embed(input_ids, mask, token_type_ids, position_ids)
            real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
            return run_with_capacities(self, hidden, real, rule, rows)
        if cu_seqlens is None:
            packed = pack_ids(self.config, input_ids, mask, token_type_ids, position_ids)
            input_ids, token_type_ids, position_ids, cu_seqlens, _ = packed
        hidden = self.embed(input_ids, None, token_type_ids, position_ids, cu_seqlens)
        return run_packed(self, hidden, cu_seqlens, rule)
