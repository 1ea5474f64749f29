"""distill --text: objectives on packed text against plain PyTorch, runs from end to end, resumed, refused."""

import copy
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import small_task
from bertops import models
from bertops.distill.losses import combine
from bertops.distill.recipes import distilbert, minilm, mobilebert, tinybert
from bertops.distill.text import TextWork
from bertops.models import BertForMaskedLM, BertModel, MobileBertForMaskedLM, MobileBertForPreTraining
from bertops.models.checkpoint import read_tensors
from bertops.pretraining.batches import Batches
from errors import assert_close_to_oracle
from small_task import (
    CONFIG,
    IB_BERT,
    OFTEN,
    assert_same_metrics,
    far_from_zero,
    metrics,
    run,
    run_on_two_processes,
    same_model,
    write_model,
)

transformers = pytest.importorskip("transformers")

NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_p", "attention_dropout_p", "attention_output_dropout_p", "classifier_dropout_p"), 0.0
)
ROBERTA = replace(
    CONFIG, family="roberta", type_vocab_size=1, position_offset=1, layer_norm_eps=1e-5, pooler=False
)
SHORT = ["--cpu", "--quiet", "--max-length", "16", "--batch-size", "8", "--steps", "4"]
SYSTEMS = {
    "distilbert": ["--layers", "2"],
    "tinybert": ["--layers", "2"],
    "minilm": ["--layers", "2", "--version", "2", "--relation-heads", "6", "--assistant-layers", "3"],
    "mobilebert": ["--layer-steps", "2", "--bottleneck", "12", "--feed-forward", "16", "--stacked", "2"],
}
STAGES = {"minilm": {"assistant"}, "mobilebert": {"layer-1", "layer-2"}}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """text, and teachers: bert, roberta and ib (an IB-BERT) with a head for words, bare without one; of two
    heads one is for the next sentence."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    return {
        "text": write_text(folder / "text.txt"),
        "bert": write_model(folder / "bert", BertForMaskedLM(replace(CONFIG, **NO_DROPOUT))),
        "roberta": write_model(folder / "roberta", BertForMaskedLM(ROBERTA)),
        "ib": write_model(folder / "ib", MobileBertForMaskedLM(replace(IB_BERT, pooler=False))),
        "ib, two heads": write_model(folder / "two-heads", MobileBertForPreTraining(IB_BERT)),
        "bare": write_model(folder / "bare", BertModel(CONFIG)),
    }


def write_text(path: Path, documents: int = 40) -> Path:
    generator = np.random.default_rng(0)
    words = small_task.OTHERS[:10] + small_task.GOOD + small_task.BAD
    path.write_text(
        "\n\n".join(
            "\n".join(" ".join(generator.choice(words, generator.integers(3, 9))) for _ in range(lines))
            for lines in generator.integers(1, 5, documents)
        )
    )
    return path


@pytest.fixture(autouse=True)
def one_thread_and_no_curves(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("bertops.training.curves.draw", lambda *anything: b"")
    yield
    torch.set_num_threads(threads)


def distill(places, system, out, *options, teacher="bert"):
    teacher = "ib" if system == "mobilebert" else teacher
    given = ["--teacher", places[teacher], "--text", places["text"], "--out", out]
    return run("distill", system, *given, *SHORT, *OFTEN, *SYSTEMS[system], *options)


# Objectives

LENGTHS = [7, 4, 1, 9]
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


def padded():
    """input_ids, mask and labels (B, N): two masked words in the first row, one in the last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, CONFIG.vocab_size, MASK.shape, generator=generator) * MASK
    labels = torch.full(MASK.shape, -100)
    labels[0, 2], labels[0, 5], labels[3, 8] = 7, 11, 6
    return {"input_ids": ids, "mask": MASK, "labels": labels}


def packed(rows=slice(None)):
    """The same without padding."""
    given = {name: x[rows] for name, x in padded().items()}
    real = given.pop("mask")
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return {name: x[real][None] for name, x in given.items()} | {"cu_seqlens": cu_seqlens}


def masked_lm(layers=4):
    config = replace(CONFIG, num_hidden_layers=layers, pooler=False, **NO_DROPOUT)
    return far_from_zero(BertForMaskedLM(config))


def objectives():
    torch.manual_seed(0)
    small, teacher = masked_lm(2), masked_lm()
    two = minilm.TextOptions(version=2, relation_heads=6)
    narrow = mobilebert.TextOptions(bottleneck=12, feed_forward=16, stacked=2)
    ib = far_from_zero(MobileBertForMaskedLM(replace(IB_BERT, **NO_DROPOUT)))
    mobile = [mobilebert.narrow_student(ib, narrow, MobileBertForMaskedLM) for _ in range(2)]
    return {
        "distilbert": distilbert.TextTripleLoss(small, teacher, distilbert.TextOptions()),
        "tinybert": tinybert.Intermediate(small.encoder, teacher.encoder),
        "minilm-1": minilm.Relations(small.encoder, teacher.encoder, minilm.TextOptions()),
        "minilm-2": minilm.Relations(small.encoder, teacher.encoder, two),
        "mobilebert-1": mobilebert.LayerTransfer(mobile[0], ib, 2),
        "mobilebert-2": mobilebert.PretrainingDistillation(mobile[1], ib, 0.3),
    }


def triple_loss(student, teacher, dtype, temperature=2.0):
    """The loss's terms and their weighted sum, from padded models with all logits."""
    given = padded()
    student, teacher = (copy.deepcopy(model).to(dtype).eval() for model in (student, teacher))
    s, t = (model(given["input_ids"], given["mask"]) for model in (student, teacher))
    masked = given["labels"] != -100
    log_s, log_t = ((x.logits[masked] / temperature).log_softmax(-1) for x in (s, t))
    terms = {
        "kl": F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2,
        "mlm": F.cross_entropy(s.logits[masked], given["labels"][masked]),
        "cosine": (1 - F.cosine_similarity(s.last_hidden_state, t.last_hidden_state, dim=-1))[MASK].mean(),
    }
    total = 5 * terms["kl"] + 2 * terms["mlm"] + terms["cosine"]
    return terms, flat_grads(total, student)


def flat_grads(total, model):
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_distilbert_and_its_gradients_are_those_of_all_logits():
    objective = objectives()["distilbert"].eval()
    terms = objective.terms(packed())
    expected, grads = triple_loss(objective.student, objective.teacher, torch.float64)
    eager, eager_grads = triple_loss(objective.student, objective.teacher, torch.float32)
    for name, value in expected.items():
        assert_close_to_oracle(name, terms[name].mean(), [eager[name]], value.detach())
    logits = objective.student(padded()["input_ids"], MASK).logits
    labels = padded()["labels"]
    right = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    assert terms.pop("mlm_accuracy").mean() == right
    found = flat_grads(combine(terms), objective.student)
    assert_close_to_oracle("gradients", found, [eager_grads], grads)


def test_mobilebert_is_the_mean_of_both_losses_of_all_logits():
    objective = objectives()["mobilebert-2"].eval()
    given = padded()
    with torch.no_grad():  # the row of [PAD], which a padded text's last trigram reads
        for model in (objective.student, objective.teacher):
            model.encoder.embeddings.word.weight[0] = 0
    s, t = (model(given["input_ids"], MASK).logits for model in (objective.student, objective.teacher))
    masked = given["labels"] != -100
    log_s, log_t = s[masked].log_softmax(-1), t[masked].log_softmax(-1)
    terms = objective.terms(packed())
    expected = {
        "mlm": F.nll_loss(log_s, given["labels"][masked]),
        "kd": (log_t.exp() * (log_t - log_s)).sum(-1).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].mean(), value, rtol=1e-4, atol=1e-6)
    assert {name: term.weight for name, term in terms.items()} == {"mlm": 0.3, "kd": 0.7, "mlm_accuracy": 0.0}


def test_mobilebert_learns_the_next_sentence_of_pairs():
    torch.manual_seed(0)
    narrow = mobilebert.TextOptions(bottleneck=12, feed_forward=16, stacked=2)
    teacher = far_from_zero(MobileBertForPreTraining(replace(IB_BERT, **NO_DROPOUT)))
    student = far_from_zero(mobilebert.narrow_student(teacher, narrow, MobileBertForPreTraining))
    objective = mobilebert.PretrainingDistillation(student, teacher, 0.3)
    random = torch.tensor([1, 0, 0, 1])
    given = {**packed(), "next_sentence_label": random}
    logits = student(given["input_ids"], cu_seqlens=given["cu_seqlens"]).next_sentence_logits
    terms = objective.train().terms(given)
    right = terms.pop("nsp_accuracy")
    assert terms.keys() == {"mlm", "kd", "nsp"} and terms["nsp"].weight == 1.0
    torch.testing.assert_close(terms["nsp"].mean(), F.cross_entropy(logits, random))
    assert (right.mean(), right.weight) == ((logits.argmax(1) == random).float().mean(), 0.0)
    assert objective.counts(given)["nsp"] == objective.counts(given)["nsp_accuracy"] == 4
    combine(terms).backward()
    assert student.next_sentence.weight.grad.any() and teacher.next_sentence.weight.grad is None


@pytest.mark.parametrize("name", ["tinybert", "minilm-1", "minilm-2", "mobilebert-1"])
def test_packed_text_gives_the_terms_of_padded_text(name):
    objective = objectives()[name].eval()
    found, expected = objective.terms(packed()), objective.terms(padded())
    assert found.keys() == expected.keys()
    for key, term in expected.items():
        torch.testing.assert_close(found[key].mean(), term.mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", list(objectives()))
def test_words_weigh_the_same_in_whatever_batch(name):
    """As the loop adds them up; the second batch has no masked word."""
    objective = objectives()[name].train()
    whole = objective.terms(packed())
    expected = combine({key: term for key, term in whole.items() if term.weight})
    parts = [packed(slice(0, 1)), packed(slice(1, 3)), packed(slice(3, 4))]
    found, counts = [objective(part) for part in parts], [objective.counts(part) for part in parts]
    total = sum(
        weight * sum(sums[key] for sums in found) / sum(count[key] for count in counts)
        for key, weight in objective.weights.items()
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)
    assert objective.counts(packed())["tokens"] == sum(LENGTHS)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.student.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_distilbert_without_a_weight_for_the_hidden_states_takes_another_width():
    narrow = replace(CONFIG, hidden_size=12, intermediate_size=16, pooler=False)
    options = distilbert.TextOptions(alpha_cosine=0.0)
    objective = distilbert.TextTripleLoss(BertForMaskedLM(narrow), masked_lm(), options).train()
    assert objective(packed()).keys() == {"kl", "mlm"}


# From end to end


@pytest.mark.parametrize("system", SYSTEMS)
def test_recipe_with_kernels_and_with_plain_pytorch(places, tmp_path, system):
    assert distill(places, system, tmp_path / "out") == 0
    assert distill(places, system, tmp_path / "plain", "--impl", "reference") == 0
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 3, 4, 4]
    assert_same_metrics(tmp_path / "plain", tmp_path / "out", rel=1e-3, abs=1e-5)
    stages = {path.parent.name for path in tmp_path.glob("out/stages/*/model")}
    assert stages == STAGES.get(system, set())


@pytest.mark.parametrize(
    ("teacher", "options", "architecture"),
    [
        ("bert", [], "DistilBertForMaskedLM"),
        ("bert", ["--token-types"], "BertForMaskedLM"),
        ("roberta", [], "RobertaForMaskedLM"),
        ("ib", [], "MobileBertForMaskedLM"),
    ],
)
def test_masked_language_model_for_transformers(places, tmp_path, teacher, options, architecture):
    system = "mobilebert" if teacher == "ib" else "distilbert"
    assert distill(places, system, tmp_path, *options, teacher=teacher) == 0
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = (MobileBertForMaskedLM if teacher == "ib" else BertForMaskedLM).from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == architecture and len(ours.encoder.layers) == 2
    ids = tokenizer("a good [MASK] was dull", return_tensors="pt").input_ids
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_mobilebert_with_both_heads_for_transformers(places, tmp_path):
    teacher = ["--teacher", places["ib, two heads"]]
    assert distill(places, "mobilebert", tmp_path / "out", *teacher) == 0
    evaluation = [line["evaluation"] for line in metrics(tmp_path / "out") if "evaluation" in line][-1]
    assert {"mlm", "kd", "nsp", "nsp_accuracy"} <= evaluation.keys()
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out/model").eval()
    ours = MobileBertForPreTraining.from_pretrained(tmp_path / "out/model")
    ids = torch.tensor([[2, 7, 8, 3, 9, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1]])
    expected = theirs(ids, token_type_ids=types).seq_relationship_logits
    found = ours(ids, token_type_ids=types).next_sentence_logits
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-5)

    still = ["--learning-rate", "0", "--layer-rate", "0"]
    assert distill(places, "mobilebert", tmp_path / "still", *teacher, *still) == 0
    start, end, teachers = (
        read_tensors(folder)["cls.seq_relationship.weight"]
        for folder in (tmp_path / "still/model", tmp_path / "out/model", places["ib, two heads"])
    )
    assert torch.equal(start, teachers) and not torch.equal(end, teachers)


def test_mobilebert_packs_no_pairs(places, tmp_path, capsys):
    options = ["--teacher", places["ib, two heads"], "--packing", "doc"]
    assert distill(places, "mobilebert", tmp_path / "out", *options) == 2
    assert "packing cannot be chosen" in (error := capsys.readouterr().err) and "'doc'" in error
    assert not (tmp_path / "out").exists()


def test_distilbert_starts_from_layers_and_head_of_its_teacher(places, tmp_path):
    nothing = ["--learning-rate", "0", "--start", "1,4", "--token-types"]
    assert distill(places, "distilbert", tmp_path, *nothing) == 0
    teacher, student = read_tensors(places["bert"]), read_tensors(tmp_path / "model")
    for name, tensor in student.items():
        source = name.replace("encoder.layer.1.", "encoder.layer.3.")
        assert torch.equal(tensor, teacher[source]), name


def test_losses_fall(places, tmp_path):
    longer = [
        "--steps",
        "40",
        "--learning-rate",
        "5e-3",
        "--evaluate-every",
        "40",
        "--checkpoint-every",
        "40",
    ]
    assert distill(places, "distilbert", tmp_path, *longer) == 0
    lines = [line for line in metrics(tmp_path) if "kl" in line]
    for name in ("kl", "mlm", "cosine"):
        assert lines[-1][name] < 0.8 * lines[0][name], name


@pytest.mark.parametrize("system", ["tinybert", "minilm"])
def test_general_student_starts_a_task(places, tmp_path, system):
    """The teacher has no head either."""
    data = small_task.write_task(tmp_path / "data")
    assert distill(places, system, tmp_path / "general", teacher="bare") == 0
    student = tmp_path / "general/model"
    assert type(transformers.AutoModel.from_pretrained(student)).__name__ == "BertModel"
    assert len(BertModel.from_pretrained(student).layers) == 2
    task = ["--data", data, *small_task.SHORT, *OFTEN, "--steps", "2"]
    teacher = small_task.write_teacher(tmp_path / "teacher")
    given = ["--teacher", teacher, "--student", student, *task, "--out", tmp_path / "task"]
    assert run("distill", "pkd", *given) == 0
    assert run("finetune", "--model", student, *task, "--out", tmp_path / "finetuned") == 0
    models.BertForSequenceClassification.from_pretrained(tmp_path / "task/model")


# The stream


def real(batch, special):
    """The tokens of a batch that are not special, masked ones included."""
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    return original[~torch.isin(original, torch.tensor([special.cls_token_id, special.sep_token_id]))]


def first_batch(places, out, options, teacher="bert"):
    """Its sequences without masks, and the batch."""
    options = replace(options, max_length=24, batch_size=8)
    with TextWork("any", places[teacher], places["text"], out, options, cpu=True, quiet=True) as work:
        work.open(work.plan())
        stream, special = work.stream(), work.corpus.special
        batch = next(stream)
        assert stream.stream.static == (options.masking == "static")
        held_out = sum(len(real(row, special)) for row in work.held_out())
        assert held_out == work.corpus.held_out.num_tokens
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    original = torch.where(labels == -100, ids, labels)
    sequences = [original[a:b] for a, b in pairwise(batch["cu_seqlens"].tolist())]
    assert all(row[0] == special.cls_token_id and row[-1] == special.sep_token_id for row in sequences)
    return special, [int((row == special.sep_token_id).sum()) for row in sequences], batch


def test_minilm_student_learns_from_the_assistant(places, tmp_path, monkeypatch):
    made = []

    class Seen(minilm.Relations):
        def __init__(self, student, teacher, options):
            made.append(self)
            super().__init__(student, teacher, options)

    monkeypatch.setattr(minilm, "Relations", Seen)
    assert distill(places, "minilm", tmp_path / "out", "--teacher-layer", "2") == 0
    of_assistant, of_student = made
    assert (of_assistant.layer, of_assistant.student.config.num_hidden_layers) == (2, 3)
    assert of_student.teacher is of_assistant.student
    assert (of_student.layer, of_student.student.config.num_hidden_layers) == (-1, 2)


def test_separators(places, tmp_path):
    """Of a BERT between documents and at the end, of a RoBERTa after every line."""
    within, over = (tinybert.TextOptions(packing=packing) for packing in ("doc", "full"))
    assert set(first_batch(places, tmp_path / "1", within)[1]) == {1}
    assert max(first_batch(places, tmp_path / "2", over)[1]) > 1
    assert max(first_batch(places, tmp_path / "3", within, "roberta")[1]) > 1


def test_masked_words(places, tmp_path):
    special, _, batch = first_batch(places, tmp_path / "masked", tinybert.TextOptions(masking="static"))
    predicted = batch["labels"] != -100
    assert (batch["input_ids"] == special.mask_token_id).any() and 0.1 < predicted.float().mean() < 0.2
    special, _, batch = first_batch(places, tmp_path / "whole", minilm.TextOptions())
    assert (batch["labels"] == -100).all() and not (batch["input_ids"] == special.mask_token_id).any()


# Resumed, and on two processes


def test_stopped_by_a_signal_and_resumed_equals_straight(places, tmp_path, monkeypatch, capsys):
    draw, drawn = Batches.__next__, []

    def act(stream):
        drawn.append(1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(stream)

    assert distill(places, "distilbert", tmp_path / "straight", teacher="roberta") == 0  # with dropout
    monkeypatch.setattr(Batches, "__next__", act)
    assert distill(places, "distilbert", tmp_path / "halves", teacher="roberta") == 1
    assert "stopped after step 3 when a signal came: the same command goes on" in capsys.readouterr().err
    assert distill(places, "distilbert", tmp_path / "halves", teacher="roberta") == 0
    assert len(drawn) == 4
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "straight")
    assert same_model(tmp_path / "halves", tmp_path / "straight")


def test_two_processes_equal_one(places, tmp_path):
    assert distill(places, "distilbert", tmp_path / "one") == 0
    half = ["--teacher", places["bert"], "--text", places["text"], *SHORT, *OFTEN, *SYSTEMS["distilbert"]]
    run_on_two_processes("distill", "distilbert", *half, "--batch-size", "4", "--out", tmp_path / "two")
    assert_same_metrics(tmp_path / "one", tmp_path / "two", rel=1e-5, abs=1e-7)


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "task"], "give --data, a task, or --text, plain text: one of them, got both"),
        (["--text", "/no/such"], "/no/such does not exist"),
        (["--max-length", "33"], "max_length must be at most the model's 32 positions, got 33"),
        (["--packing", "pages"], "packing must be one of full, doc, got 'pages'"),
        (["--masking", "never"], "masking must be dynamic or static, got 'never'"),
        (["--held-out", "1"], "held_out must be from 0 to below 1, got 1.0"),
        (["--size", "TINY"], "size must be one of BERT_BASE"),
    ],
)
def test_bad_option_is_named(places, tmp_path, capsys, options, message):
    assert distill(places, "distilbert", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neither_task_nor_text_and_recipes_without_text(places, tmp_path, capsys):
    given = ["--teacher", places["bert"], "--out", tmp_path / "out"]
    assert run("distill", "distilbert", *given) == 2
    assert "one of them, got neither" in capsys.readouterr().err
    assert run("distill", "pkd", *given, "--text", places["text"]) == 2
    assert "pkd learns a task, not plain text: give --data in place of --text" in capsys.readouterr().err


def test_text_from_a_file_of_options(places, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"text: {places['text']}\nlayers: 2\nsteps: 2\nmax_length: 16\nbatch_size: 8\n")
    given = ["--teacher", places["bert"], "--out", tmp_path / "out", "--cpu", "--quiet"]
    assert run("distill", "distilbert", "--config", file, *given) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n\n", "holds no text"), ("one document\nof two lines\n", "one document, expected two or more")],
)
def test_too_little_text(places, tmp_path, capsys, text, message):
    (tmp_path / "text.txt").write_text(text)
    assert distill(places, "distilbert", tmp_path / "out", "--text", tmp_path / "text.txt") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_teacher_without_a_masked_language_models_head(places, tmp_path, capsys):
    assert distill(places, "distilbert", tmp_path / "out", teacher="bare") == 2
    error = capsys.readouterr().err
    assert "has no masked language model's head: it lacks cls.predictions.transform.dense.weight" in error
    assert not (tmp_path / "out").exists()


def test_mobilebert_refuses_a_teacher_of_another_architecture(places, tmp_path, capsys):
    assert distill(places, "mobilebert", tmp_path / "out", "--teacher", places["bert"]) == 2
    assert "mobilebert needs a teacher with a MobileBERT's" in capsys.readouterr().err
    assert distill(places, "mobilebert", tmp_path / "out", "--max-length", "33") == 2
    assert "max_length must be at most the model's 32 positions, got 33" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vocabularies_that_differ(places, tmp_path, capsys):
    student = write_model(tmp_path / "student", BertForMaskedLM(replace(CONFIG, num_hidden_layers=2)))
    small_task.write_tokenizer(student, sorted(small_task.VOCABULARY))
    assert distill(places, "distilbert", tmp_path / "out", "--student", student) == 2
    assert "the vocabularies of" in capsys.readouterr().err
    config = replace(CONFIG, num_hidden_layers=2, vocab_size=CONFIG.vocab_size + 7)
    write_model(student, BertForMaskedLM(config))
    assert distill(places, "distilbert", tmp_path / "out", "--student", student) == 2
    assert "the vocabulary of the student has 32 words, the teacher's 25" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_teacher_of_which_transformers_has_no_distilbert(places, tmp_path, capsys):
    teacher = write_model(tmp_path / "teacher", BertForMaskedLM(replace(CONFIG, layer_norm_eps=1e-6)))
    assert distill(places, "distilbert", tmp_path / "out", "--teacher", teacher) == 2
    assert "layer_norm_eps must be 1e-12 in transformers' models of the family" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
