"""Fine-tuning: a pretrained encoder, or some of its layers, learns a task from its labels."""

from functools import partial

from bertops.distill import classifiers, layer_map, students
from bertops.distill.objective import Classification
from bertops.distill.settings import FinetuneSettings
from bertops.distill.work import Work
from bertops.training import Outcome


def finetune(work: Work, options: FinetuneSettings) -> Outcome:
    """Trains ``work.model`` with a new head; what distilled students are measured against.

    Source: Devlin et al. 2019 (BERT), section 4.1.
    """
    labels = work.task.labels
    model = classifiers.load_encoder(work.model, labels, options.seed)
    build = partial(classifiers.new_classifier, labels=labels)
    if options.size:
        model = students.sized(options.size, model.config, build)
    elif options.layers:
        model = students.cut(model, options.layers, options.start, build, layer_map.uniform)
    work.open(work.plan())
    return work.last_stage(Classification(model))
