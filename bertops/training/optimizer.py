"""The optimizer and the learning rate's schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW as BERT and RoBERTa use it: biases and LayerNorms do not decay.

    Args:
        learning_rate: the schedule's peak.
        weight_decay: of every parameter with two or more dimensions; vectors do not decay.
        betas, eps: RoBERTa's by default.
        rates: factors of the learning rate by the beginning of a parameter's name; the longest that fits
            counts, and a parameter that none fits has 1.

    Source: Loshchilov and Hutter 2019; Liu et al. 2019 (RoBERTa), appendix B.
    """

    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    rates: Mapping[str, float] = field(default_factory=dict)

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """Over the parameters of ``module`` that require grad.

        Raises:
            ValueError: no parameter requires grad, or a key of ``rates`` begins no name.
        """
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not names:
            raise ValueError("module has no parameter that requires grad")
        unused = [prefix for prefix in self.rates if not any(name.startswith(prefix) for name in names)]
        if unused:
            raise ValueError(f"rates: no parameter that requires grad has a name from {', '.join(unused)} on")
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name in names:
            parameter = module.get_parameter(name)
            groups.setdefault((self._rate(name), parameter.dim() > 1), []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "peak": self.learning_rate * rate,
                    "weight_decay": self.weight_decay if decays else 0.0,
                }
                for (rate, decays), parameters in groups.items()
            ],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )

    def _rate(self, name: str) -> float:
        fitting = [prefix for prefix in self.rates if name.startswith(prefix)]
        return self.rates[max(fitting, key=len)] if fitting else 1.0


def linear(step: int, steps: int, warmup: int) -> float:
    """The share of the peak rate in step 0, 1, ..., ``steps`` - 1: up over ``warmup`` steps, then down to 0.

    No step is wasted on a rate of 0: the first has 1 / warmup, the last 1 / (steps - warmup).
    """
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
