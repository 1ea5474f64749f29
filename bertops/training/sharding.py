"""Fully sharded data parallelism: every process holds its share of what is trained, not all of it.

Built on ``torch.distributed.fsdp.fully_shard``, the second FSDP. It shards parameter by parameter, so that
matrices and vectors keep weight decays of their own, frozen and trained parameters mix, and a checkpoint is
that of an unsharded run; and it runs on CPUs. The first FSDP lays a unit's parameters end to end in one.
"""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from bertops.models.encoder import Encoder
from bertops.training.plan import Objective


def shard(objective: Objective, device: torch.device, *, reshard_after_forward: bool = True) -> Objective:
    """A copy of ``objective`` whose trained parameters are shared out over all processes.

    A layer of an :class:`~bertops.models.encoder.Encoder` is a unit: its parameters are gathered when it runs
    and its gradients are averaged and shared out when they are there. All else that is trained is one more
    unit, gathered as long as the objective runs: word tables that are a decoder too, heads, and layers that
    share parameters, as ALBERT's do. What is frozen, such as a teacher, needs neither gradients nor an
    optimizer's state: each process keeps the whole of it, and the copy has it in common with ``objective``.

    All processes take the first one's parameters and buffers, as replicas do.

    Args:
        objective: each parameter in one piece.
        device: of this process.
        reshard_after_forward: give the parameters of a layer back between its forward and its backward.

    Raises:
        ValueError: a recurrent layer is to be trained: it holds on to its parameters. Names it.
    """
    frozen = [parameter for parameter in objective.parameters() if not parameter.requires_grad]
    for name, module in objective.named_modules():
        if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"FSDP does not go with {type(module).__name__} at {name}: leave the model whole"
            )
    for tensor in (*objective.parameters(), *objective.buffers()):
        first = tensor.detach().to(device)
        broadcast(first, 0)
        tensor.data.copy_(first)
    copy = deepcopy(objective, {id(parameter): parameter for parameter in frozen})
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (get_world_size(),)),
        "ignored_params": set(frozen),
    }
    for layer in list(units(copy)):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
        layer.attention.bertops_taps = (_Gather(layer),)
    fully_shard(copy, **options)
    for parameter in frozen:
        parameter.data = parameter.data.to(device)
    return copy


def units(objective: Objective) -> Iterator[Any]:
    """The layers that train parameters and share none with any other place."""
    places = Counter(id(p) for _, p in objective.named_parameters(remove_duplicate=False))
    for encoder in objective.modules():
        for layer in encoder.layers if isinstance(encoder, Encoder) else ():
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            if trained and all(places[id(parameter)] == 1 for parameter in trained):
                yield layer


class _Gather:
    """Listens where :func:`bertops.capture` does, for losses on q, k and v of a layer.

    A layer is gathered for its backward when a gradient comes to its output, and such a loss need not send
    one there. Where capture stops the forward inside a layer, the layer stays gathered.
    """

    def __init__(self, layer: FSDPModule) -> None:
        self.layer = layer

    def record(self, q: Tensor, k: Tensor, v: Tensor, *others: object) -> None:
        for x in (q, k, v):
            if x.requires_grad:
                x.register_hook(self.gather)

    def gather(self, gradient: Tensor) -> None:
        self.layer.unshard()


def unshard(objective: Objective, sharded: Objective) -> None:
    """Gives ``objective`` the parameters and buffers of its copy; in all processes at once."""
    state = objective.state_dict()
    for name, value in sharded.state_dict().items():
        state[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def whole(tree: Any, keep: bool, seen: dict[int, Tensor | None] | None = None) -> Any:
    """``tree`` of dicts and lists with its sharded tensors in one piece on the CPU; in all processes at once.

    Args:
        keep: false in a process that has no use for the pieces: None stands in their places.
        seen: what was put together before, so that a parameter with several names stays one tensor.
    """
    seen = {} if seen is None else seen
    if isinstance(tree, dict):
        return {name: whole(value, keep, seen) for name, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep, seen) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    if id(tree) not in seen:
        full: Tensor = tree.full_tensor().detach()
        seen[id(tree)] = full.cpu() if keep else None
    return seen[id(tree)]


def shares(
    model: dict[str, Tensor], moments: dict[str, Any], objective: Objective, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's shares of the state dicts of ``objective`` and ``optimizer`` that :func:`whole` gave."""
    state = objective.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {name: _share(value, state[name]) for name, value in model.items()}, {
        **moments,
        "state": {
            number: {name: _share(value, parameters[number]) for name, value in values.items()}
            for number, values in moments["state"].items()
        },
    }


def _share(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or value.dim() == 0:  # a buffer, or the optimizer's number of steps
        return value
    given = value.to(like.device)
    # a copy, because a share is a view of the whole
    return distribute_tensor(given, like.device_mesh, like.placements, src_data_rank=None).clone()
