"""Loads bertops._C under whichever torch runs this, prints the ops it brought and runs one on the CPU.

``make cuda-check`` runs it twice under a CUDA build of torch 2.11: on a ``_C`` built there with nvcc, and on
the ``_C`` that the development torch built, which the stable ABI promises to load as it is.
"""

import argparse

import torch

import bertops
from bertops import _backend


def registered(key: str) -> list[str]:
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bertops::"))
    return [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="fail unless the extension was built with CUDA")
    arguments = parser.parse_args()
    if _backend.extension_error is not None:
        raise SystemExit(_backend.extension_error)
    if arguments.cuda and not _backend.extension_has_cuda:
        raise SystemExit(f"{_backend.extension_path} was built without CUDA")
    print(f"torch {torch.__version__}: loaded {_backend.extension_path}")
    for key in ("CPU", "CUDA"):
        print(f"  {key}: {' '.join(registered(key)) or 'none'}")
    for op, implementations in _backend.IMPLEMENTATIONS.items():
        for impl in ("cpu", *(["cuda"] if arguments.cuda else [])):
            if impl in implementations and not any(op in name for name in registered(impl.upper())):
                raise SystemExit(f"bertops._C has no {impl} kernel of {op}")

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 37, 24).unbind()
    mask = torch.arange(37) < torch.tensor([[37], [20]])
    actual = bertops.attention(q, k, v, mask, impl="cpu")
    expected = bertops.attention(q, k, v, mask, impl="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    print("  attention on the CPU agrees with the reference")


if __name__ == "__main__":
    main()
