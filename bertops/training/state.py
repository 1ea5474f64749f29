"""What a checkpoint holds: everything that the rest of a run depends on."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertops.training.plan import Objective, Stream
from bertops.training.window import Window


@dataclass
class TrainingState:
    """A run between two steps."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    stream: Stream
    window: Window = field(default_factory=Window)
    step: int = 0  # updates done
    lines: int = 0  # of metrics.jsonl
    sharded: bool = False  # by bertops.training.sharding

    def parts(self, random_states: list[dict[str, Any]], *, keep: bool = True) -> dict[str, Any]:
        """By file; tensors are in one piece. Called in all processes at once.

        Args:
            random_states: one for every process.
            keep: false in a process that does not write what comes back.
        """
        model, optimizer = self._trained(), self.optimizer.state_dict()
        if self.sharded:
            from bertops.training.sharding import whole  # slow to import

            model, optimizer = whole([model, optimizer], keep)
        return {
            "model": model,
            "optimizer": optimizer,
            "loop": {
                "step": self.step,
                "lines": self.lines,
                "window": self.window.state_dict(),
                "stream": self.stream.state_dict(),
                "random": random_states,
            },
        }

    def load(self, parts: dict[str, Any], process: int) -> None:
        model, optimizer = parts["model"], parts["optimizer"]
        if self.sharded:
            from bertops.training.sharding import shares  # slow to import

            model, optimizer = shares(model, optimizer, self.objective, self.optimizer)
        self.objective.load_state_dict(model, strict=False)
        self.optimizer.load_state_dict(optimizer)
        loop = parts["loop"]
        self.step, self.lines = loop["step"], loop["lines"]
        self.window.load_state_dict(loop["window"])
        self.stream.load_state_dict(loop["stream"])
        set_random_state(loop["random"][process])

    def _trained(self) -> dict[str, Tensor]:
        """Parameters and buffers without the frozen parameters."""
        frozen = {
            name for name, parameter in self.objective.named_parameters() if not parameter.requires_grad
        }
        state = self.objective.state_dict(
            keep_vars=self.sharded
        )  # whose names of one parameter give one object
        return {name: x for name, x in state.items() if name not in frozen}


def random_state() -> dict[str, Any]:
    """Of the generators of Python, NumPy and PyTorch, the current GPU's included."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
