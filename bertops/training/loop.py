"""The training loop: sums of losses over sums of counts, whatever the processes and the accumulation.

A step draws its micro-batches, adds up over all of them and all processes what each loss is over (tokens,
masked tokens, pairs), and only then runs them: the gradient is that of one big batch.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn

from bertops.training.checkpoint import read_checkpoint, write_checkpoint
from bertops.training.optimizer import linear
from bertops.training.plan import Batch, Objective, Outcome, Plan, Stream
from bertops.training.progress import Progress
from bertops.training.run import Run
from bertops.training.state import TrainingState, random_state

Evaluate = Callable[[Accelerator, nn.Module], dict[str, float]]


def train(
    run: Run,
    objective: Objective,
    stream: Stream,
    *,
    evaluate: Evaluate | None = None,
    save_model: Callable[[Path], None] | None = None,
    baselines: Mapping[str, float] | None = None,
    card: tuple[str, str] = ("A model trained with bertops", ""),
    quiet: bool = False,
) -> Outcome:
    """Trains ``objective`` in place, from the start or from the last checkpoint of ``run``.

    A step minimises the sum over k of weight_k · (sum of loss k) / (count of k), sums and counts over all its
    micro-batches in all processes. A run that was killed goes on from its last checkpoint to the same
    numbers; on a CPU, with the same number of threads, bit for bit. SIGINT and SIGTERM write a checkpoint and
    stop; a second one stops at once. The folder then holds ``config.json``, ``metrics.jsonl`` (a line a
    logging step and one an evaluation), ``curves.png``, ``checkpoints/step-N`` and, in the end, ``model/``
    and a model card, ``README.md``.

    Args:
        run: processes, plan and folder.
        objective: see :class:`Objective`. Where ``run`` shards, a copy is trained, whose parameters
            ``objective`` takes in the end.
        stream: see :class:`Stream`.
        evaluate: gives held-out numbers; called in every process, in evaluation mode and without gradients.
            It runs the module equally often in all of them. See :func:`measure`.
        save_model: fills a folder with the final model; called in the main process.
        baselines: what to draw beside a number of the same name, such as a loss that takes no learning.
        card: title and text of the model card.
        quiet: show no progress.

    Raises:
        ValueError: a checkpoint or the metrics before it are damaged; names the file.
        FloatingPointError: a loss is not finite; the last checkpoint is from before that.
    """
    accelerator, plan, folder = run.accelerator, run.plan, run.folder
    folder.baselines = dict(baselines or {})
    with stop_signal() as stop:
        module = run.prepare(objective)
        trained = accelerator.unwrap_model(module)  # the objective or its sharded copy
        state = TrainingState(trained, plan.optimizer.build(trained), stream, sharded=run.fsdp)
        set_seed(plan.seed + accelerator.process_index)
        if checkpoint := folder.last_checkpoint():
            state.load(read_checkpoint(checkpoint), accelerator.process_index)
        folder.rewind(state.lines)
        accelerator.wait_for_everyone()
        progress = Progress(state.step, plan.steps, shown=run.main and not quiet)

        stopping = False
        while state.step < plan.steps and not stopping:
            sums, counts = update(accelerator, module, state, plan)
            state.window.add(sums, counts)
            state.step += 1
            progress.advance()
            last = state.step == plan.steps

            if state.step % plan.log_every == 0 or last:
                numbers = state.window.means()
                folder.log({"step": state.step, **numbers, "learning_rate": highest_rate(state.optimizer)})
                progress.show(state.step, numbers)
            if state.step % plan.log_every == 0 or accelerator.num_processes == 1:
                stopping = any(gather_object([stop.is_set()]))
            if evaluate and (state.step % plan.evaluate_every == 0 or last):
                with state.window.paused():
                    held_out = run_evaluation(evaluate, accelerator, module, plan)
                    folder.log({"step": state.step, "evaluation": held_out})
                    if not last:
                        folder.draw()
                progress.show(state.step, held_out)
            if state.step % plan.checkpoint_every == 0 or last or stopping:
                state.lines = len(folder.metrics)
                parts = state.parts(gather_object([random_state()]), keep=run.main)
                with state.window.paused():
                    if run.main:
                        write_checkpoint(folder.checkpoints, state.step, parts, plan.keep)

        progress.close()
        run.finish(objective, trained)
        finished = state.step == plan.steps
        if finished and run.main:
            folder.draw()
            if save_model is not None:
                folder.save_model(save_model)
            folder.write_card(*card)
        accelerator.wait_for_everyone()
        stopped = any(gather_object([stop.is_set()]))
        return Outcome(state.step, finished, stopped, folder.metrics)


def update(
    accelerator: Accelerator, module: nn.Module, state: TrainingState, plan: Plan
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of the optimizer; returns the sums and counts of all its micro-batches in all processes."""
    objective, optimizer, processes = state.objective, state.optimizer, accelerator.num_processes
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * linear(state.step, plan.steps, plan.warmup)
    batches = [draw(state.stream, accelerator) for _ in range(plan.accumulation)]
    counts = add_up([objective.counts(batch) for batch in batches], accelerator)
    sums = []
    for micro, batch in enumerate(batches, start=1):
        # sharded gradients are reduced every time: until then each process holds all of them
        reduces = micro == plan.accumulation or state.sharded
        with nullcontext() if reduces else accelerator.no_sync(module):
            with autocast(accelerator, plan):
                found = module(send_to_device(batch, accelerator.device))
            means = [w * found[name] / counts[name].clamp(min=1) for name, w in objective.weights.items()]
            # DDP and FSDP average the gradients of the processes, and they are to be added
            accelerator.backward(torch.stack(means).sum() * processes)
        sums.append({name: value.detach() for name, value in found.items()})
    if plan.max_grad_norm is not None:
        accelerator.clip_grad_norm_(objective.parameters(), plan.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return add_up(sums, accelerator), counts


def draw(stream: Stream, accelerator: Accelerator) -> Batch:
    """This process's micro-batch of the next round, in which each process has one."""
    return [next(stream) for _ in range(accelerator.num_processes)][accelerator.process_index]


def add_up(numbers: Sequence[Mapping[str, Tensor | int]], accelerator: Accelerator) -> dict[str, Tensor]:
    """The sum over ``numbers`` and the processes, by name, in fp64 on the device."""
    names = list(numbers[0])
    rows = [[torch.as_tensor(row[name], dtype=torch.float64) for name in names] for row in numbers]
    sums = torch.stack([torch.stack(row) for row in rows]).sum(0).to(accelerator.device)
    return dict(zip(names, accelerator.reduce(sums, "sum").unbind(), strict=True))


def measure(accelerator: Accelerator, module: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The mean of every loss and measure of an objective over ``batches``: its sums over its counts.

    Args:
        accelerator, module: what ``evaluate`` is called with.
        batches: the same in all processes, which share them out.
    """
    objective = accelerator.unwrap_model(module)
    sums, counts = [], []
    processes, process = accelerator.num_processes, accelerator.process_index
    for first in range(0, len(batches), processes):
        # all processes run equally often; what is too much counts nothing
        share = int(first + process < len(batches))
        batch = batches[min(first + process, len(batches) - 1)]
        found = objective(send_to_device(batch, accelerator.device))
        sums.append({name: value * share for name, value in found.items()})
        counts.append({name: value * share for name, value in objective.counts(batch).items()})
    total, over = add_up(sums, accelerator), add_up(counts, accelerator)
    return {name: float(value / over[name].clamp(min=1)) for name, value in total.items()}


@torch.no_grad()
def run_evaluation(
    evaluate: Evaluate, accelerator: Accelerator, module: nn.Module, plan: Plan
) -> dict[str, float]:
    module.eval()
    with autocast(accelerator, plan):
        numbers = evaluate(accelerator, module)
    module.train()
    return numbers


def autocast(accelerator: Accelerator, plan: Plan) -> torch.autocast:
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=plan.bf16)


def highest_rate(optimizer: torch.optim.Optimizer) -> float:
    return max(group["lr"] for group in optimizer.param_groups)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal does what it did before. Main thread only."""
    event = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        event.set()
        restore()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        restore()
