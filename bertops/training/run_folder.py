"""The folder of one run: its configuration, metrics, curves, checkpoints, final model and model card."""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bertops._files import whole_folder, write_whole
from bertops.training import curves
from bertops.training.checkpoint import checkpoint_steps

CONFIG, METRICS, CURVES, CARD, MODEL, LOCK = (
    "config.json",
    "metrics.jsonl",
    "curves.png",
    "README.md",
    "model",
    ".lock",
)
PACKAGES = ("bertops", "torch", "accelerate", "numpy")


class RunFolder:
    """Opens ``path`` for one run and holds it until :meth:`close`; makes it where it is missing.

    Args:
        path: a new or empty folder, or that of a run with the same ``config``, which then goes on.
        config: what JSON can hold; everything that decides the result.
        writes: false in all processes of a run but one: they read the same files and write none.

    Raises:
        FileExistsError: ``path`` is a file, or a folder with other things in it.
        FileNotFoundError: the process that writes has written elsewhere, such as on another machine.
        ValueError: the folder holds a run of another configuration; names what differs.
        BlockingIOError: another process is running in it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.metrics: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.baselines: dict[str, float] = {}  # by the name of a metric
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file, expected a folder for the run")
        strangers = sorted(file.name for file in path.glob("*")) if path.exists() else []
        if strangers and CONFIG not in strangers:
            raise FileExistsError(
                f"{path} holds {', '.join(strangers[:3])} but no {CONFIG}: "
                "give a new folder, or that of a run to go on with"
            )
        if writes:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("w")
            self._take_lock()
        try:
            self._settle_config(json.loads(json.dumps(config)))
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise BlockingIOError(f"another process is running in {self.path}") from None

    def _settle_config(self, config: dict[str, Any]) -> None:
        file = self.path / CONFIG
        if not file.exists() and not self.writes:
            raise FileNotFoundError(
                f"{self.path} has no {CONFIG}, which the main process has written: give a folder that the "
                "processes of all machines see"
            )
        if not file.exists():
            write_whole(file, (json.dumps(config, indent=2) + "\n").encode())
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        if found == config:
            return
        differing = _differences("", found, config)
        raise ValueError(f"{self.path} holds a run of another configuration: {'; '.join(differing)}")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def rewind(self, count: int) -> None:
        """Keeps the first ``count`` lines of ``metrics.jsonl``: the steps of the others will come again.

        Raises:
            ValueError: one of them is missing or damaged; names it.
        """
        file = self.path / METRICS
        texts = file.read_bytes().splitlines() if file.exists() else []
        self.metrics = []
        for number in range(1, count + 1):
            try:
                self.metrics.append(json.loads(texts[number - 1]))
            except (IndexError, ValueError):
                raise ValueError(
                    f"{file}: line {number} is missing or damaged; the checkpoint was written after {count}"
                ) from None
        if self.writes:
            write_whole(file, "".join(map(_json_line, self.metrics)).encode())

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        self.metrics.append(line)
        if not self.writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_json_line(line))
            file.flush()
            os.fsync(file.fileno())

    def draw(self) -> None:
        if self.writes:
            write_whole(self.path / CURVES, curves.draw(self.metrics, self.baselines))

    def save_model(self, save: Callable[[Path], None]) -> None:
        """``save`` fills a folder, which then becomes ``model``, whole."""
        shutil.rmtree(self.path / MODEL, ignore_errors=True)
        with whole_folder(self.path / MODEL) as temporary:
            save(temporary)

    def write_card(self, title: str, text: str) -> None:
        """``README.md``: what the run is, its last metrics, its configuration and what it ran on."""
        config = (self.path / CONFIG).read_text(encoding="utf-8")
        trained = [line for line in self.metrics if "evaluation" not in line]
        evaluated = [line for line in self.metrics if "evaluation" in line]
        rows = [(f"training {name}", value) for name, value in (trained[-1:] or [{}])[0].items()]
        rows += [(f"held-out {name}", value) for name, value in _last_evaluation(evaluated).items()]
        rows += [(f"baseline {name}", value) for name, value in self.baselines.items()]
        table = "\n".join(f"| {name} | {_rounded(value)} |" for name, value in rows)
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name))
        card = (
            f"# {title}\n\n{text}\n\n![curves]({CURVES})\n\n| metric | last value |\n|---|---|\n{table}\n\n"
            f"`{METRICS}` has them over the steps, `{MODEL}/` is the model in Hugging Face's format.\n\n"
            f"Trained with {versions}, Python {platform.python_version()}. Configuration:\n\n"
            f"```json\n{config}```\n"
        )
        write_whole(self.path / CARD, card.encode())

    def last_checkpoint(self) -> Path | None:
        steps = checkpoint_steps(self.checkpoints)
        return self.checkpoints / f"step-{steps[-1]}" if steps else None

    def close(self) -> None:
        if self.writes:
            self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _last_evaluation(evaluated: list[dict[str, Any]]) -> dict[str, float]:
    return evaluated[-1]["evaluation"] if evaluated else {}


def _rounded(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _differences(name: str, found: Any, asked: Any) -> list[str]:
    """``key is <found> there, <asked> here`` for every leaf that differs."""
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = [*found, *(key for key in asked if key not in found)]
        nested = (_differences(f"{name}.{key}".strip("."), found.get(key), asked.get(key)) for key in keys)
        return [line for lines in nested for line in lines]
    return [] if found == asked else [f"{name} is {found!r} there, {asked!r} here"]
