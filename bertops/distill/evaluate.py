"""How good and how fast a classifier is: accuracy, each class, latency of one text, texts a second."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bertops.data.task import read_task
from bertops.distill import classifiers
from bertops.distill.data import Batch, encode, inputs
from bertops.models import FastBert
from bertops.models.checkpoint import resolve_folder

WARMUP_TEXTS = 5


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    batch_size: int = 32,
    max_length: int = 128,
    latency_texts: int = 100,
    speed: float | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measures a classifier on the held-out texts of a task.

    Args:
        model: folder or hub id of a classifier of the task's labels, with ``tokenizer.json``.
        data: as :func:`bertops.data.read_task` takes it.
        batch_size: of accuracy and throughput; texts of like length together.
        max_length: longer texts are cut.
        latency_texts: so many of the first texts run alone, for the median.
        speed: of a FastBERT, in [0, 1]; see :meth:`bertops.models.FastBert.infer`.
        device: where it runs.

    Returns:
        ``accuracy``, ``texts``, ``parameters``; ``classes``: for each ``precision``, ``recall``, ``f1`` and
        the number of ``texts``; ``latency_ms``, the median over texts of a batch of one; and
        ``texts_per_second``. Times are of the model alone, texts tokenised.

    Raises:
        FileNotFoundError, ValueError: model or data are missing or damaged, or their labels differ.
    """
    folder, task = resolve_folder(model), read_task(data)
    classifier = classifiers.load_classifier(folder, task.labels).to(device).eval()
    if speed is not None and not isinstance(classifier, FastBert):
        raise ValueError(f"speed is for a FastBERT, and {folder} holds a {type(classifier).__name__}")
    tokenizer = classifiers.read_tokenizer(folder, classifier.config, max_length)
    dev = encode(tokenizer, task.dev)
    count = len(task.labels)
    confusion = torch.zeros(count, count, dtype=torch.long)  # (true, answered)
    seconds = 0.0
    for batch in dev.batches(batch_size):
        found, taken = run(classifier, batch, speed, device)
        seconds += taken
        confusion.index_put_((batch["labels"], found), torch.tensor(1), accumulate=True)
    times = [run(classifier, dev.batch([i % len(dev)]), speed, device)[1] for i in range(WARMUP_TEXTS)]
    times = [run(classifier, dev.batch([i]), speed, device)[1] for i in range(min(latency_texts, len(dev)))]
    right, true, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return {
        "accuracy": float(right.sum() / true.sum()),
        "texts": len(dev),
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "classes": {
            label: {
                "precision": _share(right[i], answered[i]),
                "recall": _share(right[i], true[i]),
                "f1": _share(2 * right[i], answered[i] + true[i]),
                "texts": int(true[i]),
            }
            for i, label in enumerate(task.labels)
        },
        "latency_ms": 1e3 * median(times),
        "texts_per_second": len(dev) / seconds,
    }


@torch.inference_mode()
def run(
    model: nn.Module, batch: Batch, speed: float | None, device: str | torch.device
) -> tuple[Tensor, float]:
    """The answers (B,) on the CPU, and the seconds until they are there."""
    given = inputs(model, {name: x.to(device) for name, x in batch.items()})
    start = time.perf_counter()
    output = model(**given) if speed is None else model.infer(**given, speed=speed)  # type: ignore[operator]
    found = output.logits.argmax(1).cpu()
    return found, time.perf_counter() - start


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole else 0.0
