"""The stages of one call and its folder, whatever they read: a task or plain text."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import bertops
from bertops.distill import classifiers
from bertops.distill.data import Batch
from bertops.distill.objective import Distillation
from bertops.distill.settings import Settings
from bertops.distill.stopped import Stopped
from bertops.models.checkpoint import resolve_folder
from bertops.training import Outcome, Plan, Run, Stream, measure, train

STAGES = "stages"  # folder of the stages before the last one, inside that of the run

Self = TypeVar("Self", bound="Stages")


class Stages:
    """Runs stages and holds the run's folder; a context manager.

    :class:`bertops.distill.work.Work` reads a task, :class:`bertops.distill.text.TextWork` plain text.

    ``out`` is the folder of the last stage's run, as :func:`bertops.training.train` describes it, with the
    final model in ``out/model``; those of the stages before it are in ``out/stages``. A finished stage is
    read and not run again.

    Args:
        recipe: its name.
        model: folder or hub id of the teacher, or of what is fine-tuned, with ``tokenizer.json``.
        out: a new or empty folder, or that of the same run, which goes on.
        settings: see :class:`bertops.distill.settings.Settings`.
        cpu, fsdp, quiet: as in :class:`bertops.training.Run` and :func:`bertops.training.train`.
    """

    def __init__(
        self,
        recipe: str,
        model: str | Path,
        out: str | Path,
        settings: Settings,
        *,
        cpu: bool = False,
        fsdp: bool = False,
        quiet: bool = False,
    ) -> None:
        self.recipe, self.model, self.out, self.settings = recipe, model, Path(out), settings
        self.folder = resolve_folder(model)
        self.quiet = quiet
        self._processes = {"cpu": cpu, "fsdp": fsdp}
        self._stack = ExitStack()
        self._run: Run | None = None

    def __enter__(self: Self) -> Self:
        self._stack.enter_context(bertops.use_impl(self.settings.impl))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def tokenizer(self) -> Any:
        config = classifiers.encoder_config(self.folder)
        return classifiers.read_tokenizer(self.folder, config, self.settings.max_length)

    # What is read

    def source(self) -> dict[str, Any]:
        """What decides, beside the settings and the model, whether a run may go on."""
        raise NotImplementedError

    def stream(self) -> Stream:
        """What a stage draws its batches from."""
        raise NotImplementedError

    def held_out(self) -> Sequence[Batch]:
        """What it is measured on."""
        raise NotImplementedError

    def baselines(self) -> dict[str, float]:
        """What to draw beside measures of these names."""
        return {}

    def save(self, student: Any, folder: Path) -> None:
        raise NotImplementedError

    def describe(self, stream: Stream) -> tuple[str, str]:
        """Of the model card: the name of what is read, and how much there is."""
        raise NotImplementedError

    # Stages

    def open(self, plan: Plan) -> None:
        """Takes the folder for this call; ``plan`` is the last stage's.

        Raises:
            FileExistsError, BlockingIOError, ValueError: it holds other things or another run, or is in use.
        """
        self._run = self._stack.enter_context(Run(self.out, plan, self._config("last"), **self._processes))

    @property
    def run(self) -> Run:
        """That of the last stage, once :meth:`open` has taken its folder."""
        assert self._run is not None
        return self._run

    def stage(self, name: str, objective: Distillation, plan: Plan, stream: Stream | None = None) -> None:
        """Trains ``objective`` in ``out/stages/name``, or reads what it came to."""
        with Run(self.out / STAGES / name, plan, self._config(name), **self._processes) as run:
            self._train(run, objective, stream, f"{self.recipe}, {name}")

    def last_stage(self, objective: Distillation, stream: Stream | None = None) -> Outcome:
        """The same in ``out``, with the plan that it was opened with."""
        return self._train(self.run, objective, stream, self.recipe)

    def _train(self, run: Run, objective: Distillation, stream: Stream | None, title: str) -> Outcome:
        student, stream = objective.student, self.stream() if stream is None else stream
        name, amount = self.describe(stream)
        parameters = sum(parameter.numel() for parameter in student.parameters())
        outcome = train(
            run,
            objective.train(),
            stream,
            evaluate=lambda accelerator, module: measure(accelerator, module, self.held_out()),
            save_model=lambda folder: self.save(student, folder),
            baselines={key: x for key, x in self.baselines().items() if key in objective.over},
            card=(
                f"{name}: {title}",
                f"{parameters:,} parameters, trained by `{self.recipe}` from `{Path(self.model).name}` on "
                f"{amount}",
            ),
            quiet=self.quiet,
        )
        if outcome.stopped:
            end = "was complete" if outcome.finished else f"stopped after step {outcome.step}"
            raise Stopped(f"{title} {end} when a signal came: the same command goes on from there")
        return outcome

    def _config(self, stage: str) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "stage": stage,
            "model": classifiers.weights_digest(self.folder),
            **self.source(),
            **asdict(self.settings),
        }
