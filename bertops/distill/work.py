"""One call of ``finetune`` or of a recipe on a task: its task, its model to start from, and its stages."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bertops.data.augmentation import NearestWords
from bertops.data.task import Task, read_task
from bertops.data.text import special_tokens
from bertops.distill import classifiers, students
from bertops.distill.data import AugmentedTexts, Batch, ClassificationStream, EncodedTexts, Rows, encode
from bertops.distill.masked_words import MaskedWords
from bertops.distill.settings import StudentSettings, TaskSettings
from bertops.distill.stages import Stages
from bertops.models.checkpoint import resolve_folder
from bertops.training import Plan, Stream


class Work(Stages):
    """Reads the task and the tokenizer, and runs stages on them; a context manager.

    Args:
        data: as :func:`bertops.data.read_task` takes it.
        recipe, model, out, settings, cpu, fsdp, quiet: as :class:`bertops.distill.stages.Stages` takes them.
    """

    settings: TaskSettings

    def __init__(
        self,
        recipe: str,
        model: str | Path,
        data: str | Path,
        out: str | Path,
        settings: TaskSettings,
        **shown: bool,
    ) -> None:
        super().__init__(recipe, model, out, settings, **shown)
        task = read_task(data)
        count = settings.train_texts or len(task.train)
        self.task = Task(task.name, task.labels, task.train.first(count), task.dev)

    # Models

    def teacher(self) -> Any:
        return classifiers.load_classifier(self.model, self.task.labels)

    def student(self, teacher: Any, start: students.LayerMap) -> Any:
        """See :func:`bertops.distill.students.new_student`."""
        settings, labels = self.settings, self.task.labels
        assert isinstance(settings, StudentSettings)
        if settings.student:
            classifiers.same_tokens(resolve_folder(settings.student), self.folder)
        build = partial(classifiers.new_classifier, labels=labels)
        load = partial(classifiers.load_student, labels=labels, seed=settings.seed)
        return students.new_student(teacher, settings, build, load, start)

    def masked_words(self, model: str, others: NearestWords) -> MaskedWords:
        """What the masked language model proposes, which reads the teacher's tokens."""
        folder = resolve_folder(model)
        classifiers.same_tokens(folder, self.folder)
        return MaskedWords(classifiers.load_masked_lm(folder), self.tokenizer, others)

    # Data

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

    def plan(
        self, rows: Rows | None = None, *, epochs: float | None = None, steps: int | None = None, **stage: Any
    ) -> Plan:
        """Of a stage over ``rows``, the task's texts by default; see :meth:`Settings.plan`."""
        count = len(self.texts if rows is None else rows)
        return self.settings.plan(self.settings.steps_of(count, epochs, steps), **stage)

    def source(self) -> dict[str, Any]:
        return {"data": self.task.fingerprint()}

    def stream(self, rows: Rows | None = None) -> ClassificationStream:
        """Of ``rows``, the task's texts by default."""
        rows = self.texts if rows is None else rows
        return ClassificationStream(rows, self.settings.batch_size, self.settings.seed)

    def held_out(self) -> Sequence[Batch]:
        return self.dev_batches

    def save(self, student: Any, folder: Path) -> None:
        classifiers.save_classifier(student, folder, self.task.labels, self.folder)

    def describe(self, stream: Stream) -> tuple[str, str]:
        assert isinstance(stream, ClassificationStream)
        return self.task.name, (
            f"{len(stream.rows):,} texts of {self.task.name}, measured on {len(self.task.dev):,} others. "
            f"Classes: {', '.join(self.task.labels)}."
        )
