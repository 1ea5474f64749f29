"""``python -m bench.exit_speed``: what early exit saves of what it promises, who exits being scripted.

A FastBERT of BERT-base's size with random weights; half of the samples leave after layers 1 to 4, the others
after layers 5 to 12. Measured are the full model, ``infer`` and the pool at every batch size, and at small
ones ``infer`` with capacities replayed as a CUDA graph. ``promised``: FLOPs of the full model over those of
the layers and classifiers that run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import paired
from bertops._files import write_whole
from bertops.cli import machine
from bertops.early_exit import Criterion, ExitPool, exit_flops, full_flops
from bertops.models import BertConfig, BertModel, FastBert
from bertops.ops.exit_decision import ExitDecision, exit_decision

BATCHES = (64, 128, 256, 512)
GRAPH_BATCHES = (1, 4, 8)
POOL_BATCHES = 8  # of requests
WORDS = (1000, 30000)
CERTAIN = 1e4


class Scripted(Criterion):
    """Exits every sample after the layer that ``start`` gave it; remembers that layer and how many ran."""

    state_size = 2

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.known: dict[int, Tensor] = {}  # a graph takes nothing from the host

    def layers(self, rows: int) -> Tensor:
        """Half of the samples spread over the first third of the layers, the others over the rest."""
        early = self.num_layers // 3
        places = torch.arange(rows)
        late = early + 1 + places // 2 % (self.num_layers - early)
        return torch.where(places % 2 == 0, 1 + places // 2 % early, late)

    def start(self, rows: int, device: torch.device) -> Tensor:
        if rows not in self.known:
            layers = self.layers(rows).to(device)
            self.known[rows] = torch.stack([layers, torch.zeros_like(layers)], 1)
        return self.known[rows]

    def decide(
        self, logits: Tensor, state: Tensor, alive: Tensor | None = None
    ) -> tuple[ExitDecision, Tensor]:
        state = torch.stack([state[:, 0], state[:, 1] + 1], 1)
        leaves = state[:, 0] <= state[:, 1]
        if alive is not None:
            leaves = leaves | ~alive
        scripted = torch.zeros_like(logits)
        scripted[:, 0] = leaves * CERTAIN
        return exit_decision(scripted, 0.5), state


def bert_base(device: torch.device, dtype: torch.dtype, num_layers: int) -> FastBert:
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=num_layers)
    return FastBert(BertModel(config), 2).to(device, dtype).eval()


def compare(
    model: FastBert, contestants: dict[str, Callable[[], Any]], device: torch.device, budget_s: float
) -> dict[str, Any]:
    rows = [paired.Contestant(name, lambda _, call=call: call()) for name, call in contestants.items()]
    for call in contestants.values():
        call()
    seconds = paired.run_rounds(rows, paired.WallClock(device), budget_s=budget_s)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: paired.paired_ratio(seconds, "full", name).median for name in contestants}
    return {"seconds": times, "speedup": ratios}


def promised(model: FastBert, criterion: Scripted, rows: int, length: int) -> float:
    spent = sum(exit_flops(model, layer, length) for layer in criterion.layers(rows).tolist())
    return rows * full_flops(model, length) / spent


def graph_of(call: Callable[[], Any]) -> Callable[[], Any]:
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_batch(model: FastBert, batch: int, length: int, device: torch.device, budget_s: float) -> dict:
    ids = torch.randint(*WORDS, (batch, length), device=device)
    criterion = Scripted(model.num_layers)
    contestants: dict[str, Callable[[], Any]] = {
        "full": lambda: model.infer(ids, speed=0.0),
        "infer": lambda: model.infer(ids, criterion=criterion),
    }
    if device.type == "cuda" and batch in GRAPH_BATCHES:
        staying = [int((criterion.layers(batch) > layer).sum()) for layer in range(1, model.num_layers)]
        with torch.no_grad():
            contestants["full, graph"] = graph_of(
                lambda: model.classify(model.num_layers, model.encoder(ids).last_hidden_state)
            )
            contestants["infer, graph"] = graph_of(
                lambda: model.infer(ids, criterion=criterion, capacities=staying)
            )
    found = compare(model, contestants, device, budget_s)
    return {"batch": batch, "promised": promised(model, criterion, batch, length), **found}


def measure_pool(model: FastBert, batch: int, length: int, device: torch.device) -> dict[str, float]:
    """Requests a second through the pool, over the full model's in batches of the same size."""
    criterion = Scripted(model.num_layers)
    requests = list(torch.randint(*WORDS, (POOL_BATCHES * batch, length)).numpy())
    pending = 4 * batch * model.num_layers
    rates = []
    with ExitPool(model, criterion=criterion, max_batch=batch, max_wait_s=1.0, max_pending=pending) as pool:
        for _ in range(3):
            start = time.perf_counter()
            for future in [pool.submit(ids) for ids in requests]:
                future.result()
            rates.append(len(requests) / (time.perf_counter() - start))
    ids = torch.randint(*WORDS, (batch, length), device=device)
    full = compare(model, {"full": lambda: model.infer(ids, speed=0.0)}, device, 0.3)["seconds"]["full"]
    return {"batch": batch, "per_s": max(rates), "full_per_s": batch / full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="*", default=[*GRAPH_BATCHES, *BATCHES])
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of timing a batch size")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    model = bert_base(device, torch.bfloat16, options.layers)

    data: dict[str, Any] = {"machine": machine(device), "length": options.length, "batches": [], "pool": []}
    print(
        "  batch  promised  " + "  ".join(f"{name:>14}" for name in ("infer", "infer, graph / full, graph"))
    )
    for batch in options.batches:
        row = measure_batch(model, batch, options.length, device, options.budget)
        data["batches"].append(row)
        times = row["seconds"]
        graph = ""
        if "infer, graph" in times:
            graph = f"{times['full, graph'] / times['infer, graph']:.2f}"
        share = row["speedup"]["infer"] / row["promised"]
        print(
            f"  {batch:5}  {row['promised']:8.2f}  {row['speedup']['infer']:5.2f} ({share:4.0%})  {graph:>14}"
            f"   full {times['full'] * 1e3:.2f} ms",
            flush=True,
        )
    for batch in (32, 64, 128):
        if batch <= max(options.batches):
            row = measure_pool(model, batch, options.length, device)
            goal = promised(model, Scripted(model.num_layers), POOL_BATCHES * batch, options.length)
            data["pool"].append({**row, "promised": goal})
            share = row["per_s"] / row["full_per_s"] / goal
            print(
                f"  pool of {batch}: {row['per_s']:.0f} requests/s, {share:.0%} of what is promised",
                flush=True,
            )
    if options.out:
        write_whole(options.out, json.dumps(data, indent=1).encode())


if __name__ == "__main__":
    main()
