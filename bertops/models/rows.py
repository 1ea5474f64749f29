"""Which rows of a batch are which: positions, first tokens, and the way from padded to packed and back."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops.models.config import EncoderConfig
from bertops.ops import _checks
from bertops.reference import sequence_positions


def positions_of(input_ids: Tensor, config: EncoderConfig, cu_seqlens: Tensor | None) -> Tensor | None:
    """The default position ids, None for columns, which the embedding counts itself.

    Off the CPU an id without a row stops the kernel; where the shapes say that there may be one, the
    positions are read back, so that it is an error instead.
    """
    if config.position_offset == 0:
        return None
    position_ids = count_positions(input_ids, config, cu_seqlens)
    rows = config.max_position_embeddings
    suspect = cu_seqlens is None and input_ids.shape[1] + config.position_offset > rows
    if suspect and input_ids.device.type != "cpu" and not torch.compiler.is_compiling():
        last = int(position_ids.max())
        if last >= rows:
            raise ValueError(f"position_ids must be from 0 to {rows - 1}, the rows of position, got {last}")
    return position_ids


def count_positions(input_ids: Tensor, config: EncoderConfig, cu_seqlens: Tensor | None) -> Tensor:
    """(1, N) or (B, N): position ids as the config counts them, from the start of every packed sequence."""
    length = input_ids.shape[1]
    start = None
    position = torch.arange(length, device=input_ids.device)
    if cu_seqlens is not None:
        _, position = sequence_positions(length, cu_seqlens)
        start = torch.arange(length, device=input_ids.device) - position
    if config.position_offset == 0:
        return position[None]
    assert config.pad_token_id is not None
    real = input_ids.ne(config.pad_token_id)
    count = real.cumsum(1)
    if start is not None:
        count = count - (count - real.long())[:, start]
    return count * real + (config.position_offset - 1)


def first_tokens(hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """(number of sequences, C): the first real token of every sequence in ``hidden`` (B, N, C).

    0 for a sequence without a token.
    """
    batch, length, width = hidden.shape
    if length == 0:
        return hidden.new_zeros(batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, width)
    if cu_seqlens is not None:
        start, filled = cu_seqlens[:-1].clamp(max=length - 1), cu_seqlens[1:] > cu_seqlens[:-1]
    elif mask is not None:
        real = mask != 0
        start = real.long().argmax(1) + length * torch.arange(batch, device=hidden.device)
        filled = real.any(1)
    else:
        return hidden[:, 0]
    return hidden.flatten(0, 1).index_select(0, start).masked_fill(~filled[:, None], 0)


class PackedIds(NamedTuple):
    """The real tokens of a padded batch laid end to end: ids (1, T), offsets (B + 1,)."""

    input_ids: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    indices: Tensor  # (T,): where they stood in the flattened batch


def pack_ids(
    config: EncoderConfig,
    input_ids: Tensor,
    mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> PackedIds:
    """Checks and packs a padded batch; reads the number of tokens back from the device."""
    _checks.check_ids(input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
    batch, length = input_ids.shape
    mask = _checks.check_rows(mask, None, input_ids[:, None, :, None])
    if mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    if position_ids is None:
        position_ids = count_positions(input_ids, config, None)
    indices = mask.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    def pack(ids: Tensor) -> Tensor:
        return ids.expand(batch, length).flatten().index_select(0, indices)[None]

    token_types = None if token_type_ids is None else pack(token_type_ids)
    return PackedIds(pack(input_ids), token_types, pack(position_ids), cu_seqlens, indices)


def run_unpadded(
    model: Callable[..., Any],
    config: EncoderConfig,
    input_ids: Tensor,
    mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    **outputs: bool,
) -> Any:
    """``model`` on the real tokens of a padded batch alone; outputs go back to their places, 0 elsewhere.

    ``model`` is called with ids (1, T) and ``cu_seqlens`` and returns a dataclass. Of its tensors, (1, T, C)
    become (B, N, C); those that have a row for every sequence stay as they are.
    """
    if outputs.get("output_scores"):
        raise ValueError(
            "output_scores does not go with unpad: maps of packed rows span the whole batch; leave unpad out"
        )
    packed = pack_ids(config, input_ids, mask, token_type_ids, position_ids)
    batch, length = input_ids.shape
    if len(packed.indices) == batch * length:  # no padding
        return model(input_ids, None, token_type_ids, position_ids, **outputs)

    def unpack(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(unpack(item) for item in x)
        if not isinstance(x, Tensor) or x.dim() != 3:
            return x
        padded = x.new_zeros(batch * length, x.shape[2]).index_copy(0, packed.indices, x[0])
        return padded.unflatten(0, (batch, length))

    output = model(
        packed.input_ids,
        token_type_ids=packed.token_type_ids,
        position_ids=packed.position_ids,
        cu_seqlens=packed.cu_seqlens,
        **outputs,
    )
    return replace(output, **{field.name: unpack(getattr(output, field.name)) for field in fields(output)})
