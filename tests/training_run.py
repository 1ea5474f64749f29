"""A small run of the training loop for test_training.py; also what its subprocesses run."""

import json
import os
import random
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertops.training import AdamW, Objective, Outcome, Plan, Run, curves, measure, train

VOCABULARY, WIDTH, ROWS, LENGTH = 13, 8, 4, 6
PLAN = Plan(
    steps=12,
    optimizer=AdamW(learning_rate=0.02),
    warmup=3,
    log_every=3,
    evaluate_every=6,
    checkpoint_every=5,
)

PLAIN = replace(PLAN, checkpoint_every=100)
DROPOUT = 0.3  # so that every random generator matters


class Toy(Objective):
    """Predicts a token from its predecessor, and the parity of a row's first token."""

    weights = {"token": 1.0, "parity": 0.5}  # noqa: RUF012

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.parity = nn.Linear(WIDTH, 2)
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.dropout = dropout
        self.dtypes: set[torch.dtype] = set()

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        real, rows = int(batch["real"].sum()), len(batch["ids"])
        return {"token": real, "parity": rows, "right": rows, "tokens": real}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, real = batch["ids"], batch["real"]
        hidden = F.dropout(self.norm(self.embedding(ids)), self.dropout, self.training)
        if self.dropout and self.training:  # two more generators that a checkpoint has to hold
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * np.random.random())
        logits = self.decoder(hidden + self.teacher(hidden))
        self.dtypes.add(logits.dtype)
        errors = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
        parity = self.parity(hidden[:, 0]).float()
        return {
            "token": (errors * real[:, 1:]).sum(),
            "parity": F.cross_entropy(parity, ids[:, 0] % 2, reduction="sum"),
            "right": (parity.argmax(1) == ids[:, 0] % 2).sum(),
        }


class Rows:
    """Batch ``i`` is the same whoever draws it; ``act`` may do something before batch ``i``."""

    def __init__(self, rows: int = ROWS, act=lambda i: None) -> None:
        self.rows, self.act, self.drawn = rows, act, 0

    def __next__(self) -> dict[str, Tensor]:
        self.act(self.drawn)
        first = self.drawn * self.rows
        rows = [self.row(i) for i in range(first, first + self.rows)]
        self.drawn += 1
        return {"ids": torch.stack([r[0] for r in rows]), "real": torch.stack([r[1] for r in rows])}

    @staticmethod
    def row(index: int) -> tuple[Tensor, Tensor]:
        ids = (torch.arange(LENGTH) * (1 + index % 3) + index * index) % VOCABULARY
        return ids, torch.arange(LENGTH) < 1 + index % LENGTH  # lengths differ: so do the counts of batches

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def held_out() -> list[dict[str, Tensor]]:
    rows = Rows()
    rows.drawn = 1000
    return [next(rows) for _ in range(3)]


def evaluate(accelerator, module) -> dict[str, float]:
    return measure(accelerator, module, held_out())


def run(
    out,
    plan: Plan = PLAN,
    *,
    dropout: float = 0.0,
    rows: int = ROWS,
    act=lambda i: None,
    objective: Toy | None = None,
    **options,
) -> Outcome:
    options = {"evaluate": evaluate, "quiet": True} | options
    with Run(out, plan, {"dropout": dropout}, cpu=True) as opened:
        return train(opened, objective or Toy(dropout), Rows(rows, act), **options)


def killed(out: Path) -> None:
    def kill(drawn: int) -> None:
        if drawn == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    run(out, dropout=DROPOUT, act=kill)


def one_of_two(out: Path, rank: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    run(out, PLAIN, rows=ROWS // 2)


def main(folder: str, port: str) -> None:
    """Forks the processes that test_training.py wants, after one import; prints their statuses."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as under test
    curves.draw = lambda *arguments: b""
    out = Path(folder)
    works = [
        partial(killed, out / "killed"),
        partial(one_of_two, out / "two", 0, port),
        partial(one_of_two, out / "two", 1, port),
    ]
    children = []
    for work in works:
        child = os.fork()
        if not child:
            work()
            os._exit(0)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


def metrics(out) -> list[dict]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same(found, expected, where: str = "") -> None:
    """Equal to the last bit, and nothing on either side alone."""
    assert type(found) is type(expected), where
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert found == expected, where


if __name__ == "__main__":
    main(*sys.argv[1:])
