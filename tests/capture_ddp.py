"""Distillation on two processes, for test_capture.py: what a process runs, light to import."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bertops
from bertops.models import BertConfig, BertModel

PROCESSES, STEPS, SEQUENCES, LENGTH, TOKENS = 2, 3, 4, 9, 40


class Distiller(nn.Module):
    """MiniLM's loss on the last layers, which leaves most of the last layer without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = model(24, seed=1), model(32, seed=2).requires_grad_(False)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        with bertops.capture(self.student) as s, bertops.capture(self.teacher) as t:
            self.student(input_ids, mask)
            self.teacher(input_ids, mask)
        return minilm(s[-1], t[-1])


def model(width: int, seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
        initializer_range=0.4,
        max_position_embeddings=LENGTH,
        pooler=False,
    )
    return BertModel(config).eval()


def minilm(s, t) -> Tensor:
    options = {"cu_seqlens": s.cu_seqlens, "reduction": "sum"}
    attention = bertops.attention_kl(s.q, s.k, t.q, t.k, s.mask, lse_s=s.lse, lse_t=t.lse, **options)
    return attention + bertops.relation_kl(s.v, t.v, s.mask, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, TOKENS, (SEQUENCES, LENGTH), generator=generator)
    return ids, torch.arange(LENGTH) < torch.tensor([9, 3, 6, 1])[:, None]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of the student, whatever wraps it."""
    return {
        name.rpartition("student.")[2].removeprefix("module."): parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def loss_inside(distiller: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return distiller(ids, mask)


def loss_outside(student: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Beside a loss on the output, which gives every parameter a gradient."""
    with bertops.capture(student, layers=[1]) as taps:
        out = student(ids, mask).last_hidden_state
    return (out.square().sum(-1) * mask).sum() + (taps[1].lse * mask[:, None]).nan_to_num(neginf=0).sum()


def run(process: int, folder: str) -> None:
    """Trains on this process's half of every batch; the first process saves the gradients."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=process, world_size=PROCESSES
    )
    half = slice(process * SEQUENCES // PROCESSES, (process + 1) * SEQUENCES // PROCESSES)
    found = {}
    inside = DistributedDataParallel(Distiller(), find_unused_parameters=True)
    outside = DistributedDataParallel(model(24, seed=1))
    for name, module, loss in (("inside", inside, loss_inside), ("outside", outside, loss_outside)):
        for step in range(STEPS):
            ids, mask = batch(step)
            module.zero_grad()
            loss(module, ids[half], mask[half]).backward()
            # the processes' gradients are averaged, the losses are sums
            found[name, step] = {key: PROCESSES * grad for key, grad in gradients(module).items()}
    if process == 0:
        torch.save(found, Path(folder) / "gradients")
    dist.destroy_process_group()
