"""One call of ``finetune`` or of a recipe: its task, its model to start from, its folder and its stages."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import bertops
from bertops.data.augmentation import NearestWords
from bertops.data.task import Task, read_task
from bertops.data.text import special_tokens
from bertops.distill import classifiers
from bertops.distill.classifiers import LayerMap
from bertops.distill.data import AugmentedTexts, Batch, ClassificationStream, EncodedTexts, Rows, encode
from bertops.distill.masked_words import MaskedWords
from bertops.distill.objective import Distillation
from bertops.distill.settings import Settings, StudentSettings
from bertops.distill.stopped import Stopped
from bertops.models.checkpoint import resolve_folder
from bertops.training import Outcome, Plan, Run, measure, train

STAGES = "stages"  # folder of the stages before the last one, inside that of the run


class Work:
    """Reads the task and the tokenizer, runs stages, and holds the run's folder; a context manager.

    ``out`` is the folder of the last stage's run, as :func:`bertops.training.train` describes it, with the
    final model in ``out/model``; those of the stages before it are in ``out/stages``. A finished stage is
    read and not run again.

    Args:
        recipe: its name.
        model: folder or hub id of the teacher, or of what is fine-tuned, with ``tokenizer.json``.
        data: as :func:`bertops.data.read_task` takes it.
        out: a new or empty folder, or that of the same run, which goes on.
        settings: see :class:`bertops.distill.settings.Settings`.
        cpu, fsdp, quiet: as in :class:`bertops.training.Run` and :func:`bertops.training.train`.
    """

    def __init__(
        self,
        recipe: str,
        model: str | Path,
        data: str | Path,
        out: str | Path,
        settings: Settings,
        *,
        cpu: bool = False,
        fsdp: bool = False,
        quiet: bool = False,
    ) -> None:
        self.recipe, self.model, self.out, self.settings = recipe, model, Path(out), settings
        self.folder = resolve_folder(model)
        task = read_task(data)
        count = settings.train_texts or len(task.train)
        self.task = Task(task.name, task.labels, task.train.first(count), task.dev)
        self.quiet = quiet
        self._processes = {"cpu": cpu, "fsdp": fsdp}
        self._stack = ExitStack()
        self._run: Run | None = None

    def __enter__(self) -> "Work":
        self._stack.enter_context(bertops.use_impl(self.settings.impl))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # Models

    def teacher(self) -> Any:
        return classifiers.load_classifier(self.model, self.task.labels)

    def student(self, teacher: Any, start: LayerMap) -> Any:
        """See :func:`bertops.distill.classifiers.new_student`."""
        assert isinstance(self.settings, StudentSettings)
        if self.settings.student:
            classifiers.same_tokens(resolve_folder(self.settings.student), self.folder)
        return classifiers.new_student(teacher, self.settings, self.task.labels, start)

    def masked_words(self, model: str, others: NearestWords) -> MaskedWords:
        """What the masked language model proposes, which reads the teacher's tokens."""
        folder = resolve_folder(model)
        classifiers.same_tokens(folder, self.folder)
        return MaskedWords(classifiers.load_masked_lm(folder), self.tokenizer, others)

    # Data

    @cached_property
    def tokenizer(self) -> Any:
        config = classifiers.encoder_config(self.folder)
        return classifiers.read_tokenizer(self.folder, config, self.settings.max_length)

    @cached_property
    def texts(self) -> EncodedTexts:
        """To train on."""
        return encode(self.tokenizer, self.task.train)

    @property
    def mask_token(self) -> str:
        return self.tokenizer.id_to_token(special_tokens(self.tokenizer).mask_token_id)

    def augmented(self, augment: Callable[[str, int], str], copies: int) -> Rows:
        """The texts and variants of them, see :class:`bertops.distill.data.AugmentedTexts`."""
        if not copies:
            return self.texts
        return AugmentedTexts(self.task.train, augment, copies, self.tokenizer)

    @cached_property
    def dev_batches(self) -> Sequence[Batch]:
        return encode(self.tokenizer, self.task.dev).batches(self.settings.batch_size)

    # Stages

    def plan(self, rows: Rows | None = None, **stage: Any) -> Plan:
        """Of a stage over ``rows``, the task's texts by default; see :meth:`Settings.plan`."""
        return self.settings.plan(len(self.texts if rows is None else rows), **stage)

    def open(self, plan: Plan) -> None:
        """Takes the folder for this call; ``plan`` is the last stage's.

        Raises:
            FileExistsError, BlockingIOError, ValueError: it holds other things or another run, or is in use.
        """
        self._run = self._stack.enter_context(Run(self.out, plan, self._config("last"), **self._processes))

    def stage(self, name: str, objective: Distillation, plan: Plan, rows: Rows | None = None) -> None:
        """Trains ``objective`` in ``out/stages/name`` on ``rows``, or reads what it came to."""
        with Run(self.out / STAGES / name, plan, self._config(name), **self._processes) as run:
            self._train(run, objective, rows, f"{self.recipe}, {name}")

    def last_stage(self, objective: Distillation, rows: Rows | None = None) -> Outcome:
        """The same in ``out``, with the plan that it was opened with."""
        assert self._run is not None
        return self._train(self._run, objective, rows, self.recipe)

    def _train(self, run: Run, objective: Distillation, rows: Rows | None, title: str) -> Outcome:
        student, rows = objective.student, self.texts if rows is None else rows
        labels = self.task.labels
        outcome = train(
            run,
            objective.train(),
            ClassificationStream(rows, self.settings.batch_size, self.settings.seed),
            evaluate=lambda accelerator, module: measure(accelerator, module, self.dev_batches),
            save_model=lambda folder: classifiers.save_classifier(student, folder, labels, self.folder),
            card=(f"{self.task.name}: {title}", self._describe(student, rows)),
            quiet=self.quiet,
        )
        if not outcome.finished:
            raise Stopped(f"{title} stopped after step {outcome.step}: the same command goes on from there")
        return outcome

    def _config(self, stage: str) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "stage": stage,
            "model": classifiers.weights_digest(self.folder),
            "data": self.task.fingerprint(),
            **asdict(self.settings),
        }

    def _describe(self, model: nn.Module, rows: Rows) -> str:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return (
            f"{parameters:,} parameters, trained by `{self.recipe}` from `{Path(self.model).name}` on "
            f"{len(rows):,} texts of {self.task.name}, measured on {len(self.task.dev):,} others. "
            f"Classes: {', '.join(self.task.labels)}."
        )
