"""Records q, k, v and lse of chosen attention layers while a model runs."""

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bertops.distill.layer_map import layer_number

# An attention module and its encoder hold their recorders under this name while they are captured.
ATTRIBUTE = "bertops_taps"


@dataclass(frozen=True)
class Tap:
    """What one layer's attention took and found, in the last forward.

    The tensors are the layer's own: views of a packed projection where it has one, part of the autograd graph
    where the forward was. ``lse`` is over the keys that the layer saw: real tokens of the same sequence, and
    with ``window`` only those with ``|i - j| <= window``. No loss takes a window: give the losses ``lse`` of
    layers whose ``window`` is None alone, and expect them to compare all pairs of any other layer.
    """

    layer: int  # counted from 1
    q: Tensor  # (B, H, N, D), packed (1, H, T, D)
    k: Tensor
    v: Tensor
    lse: Tensor  # (B, H, N) fp32 (fp64 for fp64), -inf in masked rows
    mask: Tensor | None  # (B, N), true for a real token
    cu_seqlens: Tensor | None  # (number of sequences + 1,) int32
    window: int | None
    scale: float


class Taps:
    """What :func:`capture` recorded: ``taps[-1]`` by number, or a loop over ``layers`` in the order asked."""

    def __init__(self, layers: tuple[int, ...], places: "dict[int, tuple[int, _Recorder, int]]") -> None:
        self.layers = layers
        self._places = places

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tap]:
        return (self[layer] for layer in self.layers)

    def __getitem__(self, layer: int) -> Tap:
        """The :class:`Tap` of the last forward inside the block; also once the block is left.

        Raises:
            KeyError: this layer was not asked for.
            RuntimeError: no whole forward of this layer was recorded; says why.
        """
        if layer not in self._places:
            raise KeyError(f"layer {layer!r} was not asked for: capture(model, layers={list(self.layers)})")
        number, recorder, use = self._places[layer]
        calls, expected = len(recorder.calls), len(recorder.wanted)
        if calls < recorder.least:
            raise RuntimeError(
                f"layer {layer} recorded nothing: the model's forward has not come to it inside the capture "
                "block, in the thread that entered the block, with attn_implementation='bertops' (read taps "
                "before backward where a checkpoint recomputes a compiled model)"
            )
        if calls > expected:
            raise RuntimeError(
                f"layer {layer} ran {calls} times instead of {expected} since a forward of the model began: "
                "run the whole model, not its layers, and read taps before backward where a checkpoint "
                "recomputes compiled layers"
            )
        q, k, v, lse, mask, cu_seqlens, window, scale = recorder.calls[use]
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
        return Tap(number, q, k, v, lse, mask, cu_seqlens, window, scale)


@contextmanager
def capture(model: nn.Module, layers: Iterable[int] = (-1,), *, stop: bool = False) -> Iterator[Taps]:
    """Records q, k, v and lse of ``layers`` in every forward of ``model`` inside the block.

    ::

        with bertops.capture(teacher) as t, torch.no_grad():
            teacher(**batch)
        with bertops.capture(student) as s:
            student(**batch)
        s, t = s[-1], t[-1]
        rows = {"mask": s.mask, "cu_seqlens": s.cu_seqlens}
        scales = {"scale_s": s.scale, "scale_t": t.scale}
        loss = bertops.attention_kl(s.q, s.k, t.q, t.k, lse_s=s.lse, lse_t=t.lse, **rows, **scales)
        loss = loss + bertops.relation_kl(s.v, t.v, **rows)

    No score map is built and nothing is copied, computed twice or detached: gradients flow into the student,
    and a teacher is run under ``torch.no_grad()``. Each forward replaces what the former recorded; what the
    last one recorded stays readable, and alive, as long as the taps. When the block is left, also by an
    exception, the model is as it was before.

    Args:
        model: one of :mod:`bertops.models`, or one of transformers with ``attn_implementation="bertops"``;
            also inside DistributedDataParallel, ``torch.compile`` or another module, if it is the only one
            there.
        layers: counted from 1, as in the papers, or from the end, -1 being the last. A shared layer (ALBERT)
            counts every time it runs.
        stop: end the forward, and with it the block, once the last of ``layers`` has attended: for a loss on
            taps alone. The forward returns nothing, and is the last thing in the block. A compiled model
            runs to its end.

    Returns:
        Entering gives :class:`Taps`: ``taps[layer]`` is a :class:`Tap`.

    Raises:
        TypeError: ``model`` is no such model, or ``layers`` are no integers.
        ValueError: there is no such layer, or the model's attention is another; says what to do.

    What else happens to run:

    * Captures nest, of one model or several. Other threads that run the model meanwhile record nothing.
    * ``torch.compile``: the model, a function that calls it and reads the taps, or single layers, compiled
      before or inside the block. A model has one more graph for being captured. With a block inside the
      compiled function, that function itself runs uncompiled.
    * Gradient checkpointing with ``use_reentrant=False``: what backward recomputes is not recorded; where it
      recomputes compiled code, read the taps before backward. Reentrant checkpoints run layers without
      gradients and raise RuntimeError.
    * ``unpad=True`` of :mod:`bertops.models`: the taps are packed, with ``cu_seqlens``.
    * DistributedDataParallel waits for the gradient of every parameter that the model's output depends on,
      and a loss on taps leaves those behind the last tap without one: compute the loss inside the wrapped
      module and return it, with ``find_unused_parameters=True``, or use a loss on the output beside it.
    * ``fully_shard`` gathers a layer for its backward when a gradient comes to the layer's output, and a loss
      on taps need not send one there. :class:`bertops.training.Run` with ``fsdp`` sees to that; in a loop of
      your own, use a loss on the output beside it, or shard the model with ``reshard_after_forward=False``.
    """
    encoder = find_encoder(model)
    order = attention_order(encoder)
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers must be a list of integers, got {layers!r}")
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers must not be empty")
    numbers = {layer: layer_number("layers", layer, len(order)) for layer in layers}
    last = max(numbers.values()) if stop else len(order)
    owner = _Owner()
    recorders: dict[nn.Module, _Recorder] = {}
    places = {}
    for layer, number in numbers.items():
        module = order[number - 1]
        uses = [i + 1 for i, other in enumerate(order) if other is module]
        if module not in recorders:
            wanted = tuple(i in numbers.values() for i in uses)
            least = sum(i <= last for i in uses)
            recorders[module] = _Recorder(owner, wanted, least, stop and last in uses)
        places[layer] = (number, recorders[module], uses.index(number))

    owner.here = True
    with ExitStack() as stack:
        stack.callback(setattr, owner, "here", False)
        for module, recorder in recorders.items():
            for holder in (encoder, module):
                _attach(holder, recorder)
                stack.callback(_detach, holder, recorder)
        stack.callback(encoder.register_forward_pre_hook(_begin).remove)
        try:
            yield Taps(layers, places)
        except _Stop as reached:
            if reached.owner is not owner:
                raise


class _Owner(threading.local):
    """Whether this is the thread that entered the block, in a form that compiled graphs are guarded by."""

    def __init__(self) -> None:
        self.here = False


class _Stop(BaseException):
    """Ends a forward of which no more is wanted."""

    def __init__(self, owner: _Owner) -> None:
        super().__init__()
        self.owner = owner


class _Recorder:
    """The calls of one attention module in one forward of its model.

    Plain attributes and a module-level hook, so that graphs of ``torch.compile`` are guarded by what is here
    and not by who: every block after the first runs the graph of the first.
    """

    def __init__(self, owner: _Owner, wanted: tuple[bool, ...], least: int, stops: bool) -> None:
        self.owner = owner
        self.wanted = wanted  # of the module's calls in one forward
        self.least = least  # calls after which everything wanted is there
        self.stops = stops  # the forward, with the last of them
        self.calls: list[Any] = []  # the arguments of record where wanted, else None
        self.with_gradients = False

    def begin(self) -> None:
        """A forward of the model begins."""
        if self.owner.here and not _recomputing():
            self.calls = []
            self.with_gradients = torch.is_grad_enabled()

    def record(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        window: int | None,
        scale: float | None,
    ) -> None:
        """One call of the attention module, as :func:`bertops.attention` was called."""
        if not self.owner.here or _recomputing():
            return
        if self.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "a captured layer runs without gradients in a model that runs with them: checkpoint it with "
                "use_reentrant=False"
            )
        call = len(self.calls)
        wanted = call < len(self.wanted) and self.wanted[call]
        self.calls.append((q, k, v, lse, mask, cu_seqlens, window, scale) if wanted else None)
        if self.stops and len(self.calls) == self.least and not torch.compiler.is_compiling():
            raise _Stop(self.owner)

    def __reduce__(self) -> Any:
        raise TypeError("a model cannot be copied or pickled while it is captured: leave the block first")


def _begin(encoder: nn.Module, inputs: Any) -> None:
    for recorder in getattr(encoder, ATTRIBUTE, ()):  # gone where another thread just left its block
        recorder.begin()


def _recomputing() -> bool:
    """Inside backward, where only a checkpoint runs layers; a compiled graph does not ask."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_lock = threading.Lock()


def _attach(module: nn.Module, recorder: _Recorder) -> None:
    with _lock:
        setattr(module, ATTRIBUTE, (*getattr(module, ATTRIBUTE, ()), recorder))


def _detach(module: nn.Module, recorder: _Recorder) -> None:
    with _lock:
        others = tuple(other for other in getattr(module, ATTRIBUTE) if other is not recorder)
        if others:
            setattr(module, ATTRIBUTE, others)
        else:
            delattr(module, ATTRIBUTE)


def find_encoder(model: nn.Module) -> nn.Module:
    """The one encoder in ``model``: one of :mod:`bertops.models` or a transformers base model."""
    from bertops.models.encoder import Encoder

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    transformers = sys.modules.get("transformers")
    pretrained = () if transformers is None else transformers.PreTrainedModel
    encoders: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Encoder):
            encoders.setdefault(module, name)
        elif isinstance(module, pretrained):
            base = module.base_model
            encoders.setdefault(getattr(base, "_orig_mod", base), name)
    if not encoders:
        raise TypeError(
            "model must be one of bertops.models or of transformers, or hold one, got " + type(model).__name__
        )
    if len(encoders) > 1:
        found = ", ".join(f"{type(encoder).__name__} at {name!r}" for encoder, name in encoders.items())
        raise ValueError(f"model holds {len(encoders)} encoders ({found}): capture one of them")
    (encoder,) = encoders
    if isinstance(encoder, Encoder):
        return encoder
    config: Any = encoder.config
    implementation = config._attn_implementation
    if implementation != "bertops":
        raise ValueError(
            f"model runs with attn_implementation={implementation!r}, which cannot be captured: import "
            "bertops.integrations.transformers, then call model.set_attn_implementation('bertops')"
        )
    return encoder


def attention_order(encoder: nn.Module) -> list[nn.Module]:
    """The attention modules as they run in one forward; a shared one comes more than once."""
    from bertops.models.encoder import Encoder

    if isinstance(encoder, Encoder):
        layers: Any = encoder.layers
        return [layer.attention for layer in layers]
    config: Any = encoder.config
    count = config.num_hidden_layers
    # every module that calls transformers' attention interface says whether it is causal
    modules = [module for module in encoder.modules() if "is_causal" in vars(module)]
    groups = getattr(config, "num_hidden_groups", None)
    if groups is not None:  # ALBERT runs each group of layers count / groups times in a row
        inner = config.inner_group_num
        return [modules[int(i / (count / groups)) * inner + j] for i in range(count) for j in range(inner)]
    if len(modules) != count:
        raise ValueError(
            f"model has {count} layers and {len(modules)} attention modules ({type(encoder).__name__}): "
            "they cannot be numbered"
        )
    return modules
