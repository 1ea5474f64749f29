"""Loads ``bertops._C`` once, keeps the reason it failed, and picks the implementation of a call."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bertops import _library  # noqa: F401  (schemas before the kernels that register against them)

CHOICES = ("auto", "triton", "cuda", "cpu", "reference")

# What exists for each op; auto takes the first that fits the device.
IMPLEMENTATIONS = {
    "attention": ("cpu", "triton", "reference"),
    "attention_with_scores": ("cpu", "triton", "reference"),
    "attention_score_mse": ("cpu", "triton", "reference"),
    "attention_kl": ("cpu", "triton", "reference"),
    "relation_kl": ("cpu", "triton", "reference"),
    "entropy": ("cpu", "cuda", "reference"),
    "exit_decision": ("cpu", "cuda", "reference"),
    "compact": ("cpu", "cuda", "reference"),
    "compact_packed": ("cpu", "cuda", "reference"),
    "factorized_embedding": ("cpu", "triton", "reference"),
    "cosine_loss": ("cpu", "triton", "reference"),
    "normalized_mse": ("cpu", "triton", "reference"),
    "feature_map_transfer": ("cpu", "triton", "reference"),
    "kl_div_logits": ("cpu", "triton", "reference"),
    "linear_kl_div": ("cpu", "triton", "reference"),
    "projected_mse": ("cpu", "triton", "reference"),
}

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

extension_error: str | None = None
extension_path: str | None = None
extension_has_cuda = False
try:
    from bertops import _C  # type: ignore[attr-defined]
except ImportError as error:
    extension_error = (
        f"bertops._C could not be loaded ({error}); build it with "
        "'pip install --no-build-isolation -e .' in the source tree"
    )
else:
    extension_path = _C.__file__
    extension_has_cuda = bool(_C.with_cuda)

_preferred = "auto"


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run every call inside that says ``impl="auto"`` on ``impl`` instead, in all threads.

    Args:
        impl: one of ``auto``, ``triton``, ``cuda``, ``cpu``, ``reference``.

    Raises:
        ValueError: ``impl`` is none of these.
    """
    global _preferred
    _check_choice(impl)
    previous, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = previous


def resolve(op: str, impl: str, device: torch.device) -> str:
    """What runs ``op`` on ``device``: ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Triton on CPU tensors is ``interpreter``: those kernels are called without the dispatcher, in which ``_C``
    owns the CPU.

    Raises:
        ValueError: ``impl`` is not a known choice.
        RuntimeError: the choice, or every kernel that ``auto`` could take, is not available; says why.
    """
    if impl != "auto":
        _check_choice(impl)
    if impl == "auto":
        impl = _preferred
    if impl == "auto":
        found = _AUTOMATIC.get((op, device.type))
        if found is not None:
            return found
        kernels = [kernel for kernel in IMPLEMENTATIONS[op] if kernel != "reference"]
        reasons = "; ".join(f"{kernel}: {unavailable(op, kernel, device.type)}" for kernel in kernels)
        raise RuntimeError(
            f"{op} has no kernel for device {device.type!r} ({reasons}). "
            "Pass impl='reference' to run the plain PyTorch version."
        )
    reason = unavailable(op, impl, device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} is not available here: {reason}")
    return "interpreter" if impl == "triton" and device.type == "cpu" else impl


def unavailable(op: str, impl: str, device_type: str) -> str | None:
    """Why ``impl`` cannot run ``op`` on ``device_type``, or None where it can."""
    if impl not in IMPLEMENTATIONS[op]:
        return f"{op} has no {impl} kernel"
    if impl == "reference":
        return None
    if impl == "triton":
        if not HAS_TRITON:
            return "Triton is not installed"
        if device_type == "cpu" and not TRITON_INTERPRET:
            return "the tensors are on the CPU (set TRITON_INTERPRET=1 before importing to interpret)"
        return None if device_type in ("cuda", "cpu") else f"Triton kernels do not run on {device_type!r}"
    if device_type != impl:
        return f"the tensors are on {device_type!r}"
    if extension_error is not None:
        return extension_error
    if impl == "cuda" and not extension_has_cuda:
        return "bertops._C was built without CUDA"
    return None


def _check_choice(impl: str) -> None:
    if impl not in CHOICES:
        raise ValueError(f"impl must be one of {', '.join(CHOICES)}, got {impl!r}")


# (op, device type) -> the first kernel that can run there; what is missing has no entry.
_AUTOMATIC: dict[tuple[str, str], str] = {
    (op, device_type): kernel
    for op, kernels in IMPLEMENTATIONS.items()
    for device_type in ("cpu", "cuda")
    for kernel in reversed(kernels)
    if kernel == device_type or (kernel == "triton" and device_type == "cuda")
    if unavailable(op, kernel, device_type) is None
}
