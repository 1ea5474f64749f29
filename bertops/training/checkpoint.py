"""Checkpoints that are whole or not there: a folder ``step-N`` each, with a digest of every file."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"


def write_checkpoint(folder: Path, step: int, parts: dict[str, Any], keep: int) -> Path:
    """Writes ``folder/step-N`` with a file ``<part>.pt`` for each of ``parts``, and removes old checkpoints.

    The files are written to a hidden folder that is renamed when all of them are on disk, so that a process
    that dies leaves the last checkpoint as it was.

    Args:
        folder: of the checkpoints; made where it is missing.
        step: number of updates done.
        parts: what ``torch.save`` takes, by name.
        keep: checkpoints that stay, the newest ones.
    """
    final, temporary = folder / f"step-{step}", folder / f".step-{step}"
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    digests = {}
    for name, part in parts.items():
        path = temporary / f"{name}.pt"
        torch.save(part, path)
        digests[path.name] = _digest(path)
        _to_disk(path)
    (temporary / MANIFEST).write_text(json.dumps(digests, indent=1))
    _to_disk(temporary / MANIFEST)
    _to_disk(temporary)
    os.rename(temporary, final)
    _to_disk(folder)
    for old in checkpoint_steps(folder)[:-keep]:
        # hidden first: what a broken removal leaves must not look like a checkpoint
        hidden = folder / f".step-{old}"
        os.rename(folder / f"step-{old}", hidden)
        shutil.rmtree(hidden)
    return final


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The parts of one checkpoint, on the CPU.

    Raises:
        ValueError: a file is missing or is not as it was written; names the file.
    """
    try:
        digests = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, MANIFEST, f"cannot be read ({error})") from None
    parts = {}
    for name, digest in digests.items():
        if not (path / name).is_file():
            raise _damaged(path, name, "is missing")
        if _digest(path / name) != digest:
            raise _damaged(path, name, "is not as it was written: its SHA-256 differs")
        parts[name.removesuffix(".pt")] = torch.load(path / name, map_location="cpu", weights_only=True)
    return parts


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, ascending; it need not exist."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def remove_leftovers(folder: Path) -> None:
    """What a process that died while writing or removing has left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _damaged(path: Path, name: str, what: str) -> ValueError:
    return ValueError(
        f"{path / name} {what}. Remove the folder {path} to go on from the checkpoint before it, "
        "or from the start if there is none"
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
