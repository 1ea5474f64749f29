"""Task data: folders and the hub, batches, and the order in which training draws them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from bertops.data import TaskTexts, read_task
from bertops.distill.data import AugmentedTexts, ClassificationStream, encode
from small_task import VOCABULARY, write_task, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def texts(count=10):
    rows = [" ".join(["film"] * (1 + i % 4)) for i in range(count)]
    return TaskTexts(rows, [i % 2 for i in range(count)])


# Folders


def test_folder(tmp_path):
    task = read_task(write_task(tmp_path / "words", rows=6))
    assert task.name == "words" and task.labels == ["negative", "positive"]
    assert len(task.train) == 6 and len(task.dev) == 16 and task.train.labels == [0, 1, 0, 1, 0, 1]


def test_without_names_classes_are_counted(tmp_path):
    folder = write_task(tmp_path / "task")
    (folder / "labels.txt").unlink()
    (folder / "dev.tsv").write_text("text\tlabel\na film\t2\n")
    assert read_task(folder).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.tsv", "text\tlabel\na film\t0\nno tab\n", "train.tsv, line 3: expected a text"),
        ("train.tsv", "text\tlabel\n", "train.tsv holds no text"),
        ("dev.tsv", "text\tlabel\na film\t2\n", "dev.tsv, line 2: label 2 has no name, labels.txt has 2"),
        ("dev.tsv", None, "has no dev.tsv"),
    ],
)
def test_bad_file_is_named(tmp_path, file, content, message):
    folder = write_task(tmp_path / "task")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_task(folder)


def test_fingerprint_follows_every_text_and_label(tmp_path):
    folder = write_task(tmp_path / "task")
    before = read_task(folder).fingerprint()
    assert read_task(folder).fingerprint() == before
    (folder / "dev.tsv").write_text((folder / "dev.tsv").read_text()[:-2] + "0\n")
    assert read_task(folder).fingerprint() != before


# The hub


def fake_datasets(splits, asked):
    class Column(dict):
        def __init__(self, rows, features):
            super().__init__(rows)
            self.features = features

    text, label = SimpleNamespace(dtype="string"), SimpleNamespace(dtype="int64", names=["no", "yes"])
    index = SimpleNamespace(dtype="int32")
    features = {"first": text, "second": text, "label": label, "idx": index}
    rows = {"first": ["a", "b"], "second": ["c", "d"], "label": [1, 0], "idx": [0, 1]}

    def load_dataset(*name):
        asked.append(name)
        if name[0] == "owner":
            raise FileNotFoundError("no data set owner")
        return {split: Column(rows, features) for split in splits}

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    return module


def test_hub_name_with_configuration_and_pairs(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(["train", "validation_matched"], asked))
    task = read_task("glue/mnli")
    assert asked == [("glue", "mnli")] and task.labels == ["no", "yes"]
    assert task.train == TaskTexts(["a", "b"], [1, 0], ["c", "d"])


def test_hub_name_with_an_owner(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(["train", "test"], asked))
    assert len(read_task("owner/words").dev) == 2 and asked == [("owner", "words"), ("owner/words",)]
    read_task("words")
    assert asked[2:] == [("words",)]


def test_hub_data_without_a_split_to_measure_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(["train"], []))
    with pytest.raises(ValueError, match="must have splits train and one of validation"):
        read_task("glue/none")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no folder glue/sst2; .* pip install datasets"):
        read_task("glue/sst2")


def test_neither_folder_nor_name():
    with pytest.raises(FileNotFoundError, match="no folder /no/such"):
        read_task("/no/such")


# Batches


def test_batches_are_cut_to_their_longest_row(tokenizer):
    batch = encode(tokenizer, TaskTexts(["film", "good film"], [1, 0])).batch([0, 1])
    film, good, end = VOCABULARY.index("film"), VOCABULARY.index("good"), VOCABULARY.index("[SEP]")
    assert batch["input_ids"].tolist() == [[2, film, end, 0], [2, good, film, end]]
    assert batch["mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert batch["labels"].tolist() == [1, 0] and "token_type_ids" not in batch


def test_pairs_have_token_types(tokenizer):
    batch = encode(tokenizer, TaskTexts(["film", "a"], [1, 0], ["good story", "a"])).batch([0, 1])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_stream_draws_every_row_once_an_epoch_whatever_the_batch(tokenizer):
    class Numbers:
        def __len__(self):
            return 10

        def batch(self, numbers):
            return list(numbers)

    def drawn(batch_size, count, seed=3):
        stream = ClassificationStream(Numbers(), batch_size, seed)
        return [number for _ in range(count) for number in next(stream)]

    twenty = drawn(4, 5)
    assert sorted(twenty[:10]) == sorted(twenty[10:]) == list(range(10)) and twenty[:10] != twenty[10:]
    assert drawn(2, 10) == twenty and drawn(4, 5, seed=4) != twenty
    stream = ClassificationStream(Numbers(), 4, 3)
    [next(stream) for _ in range(3)]
    again = ClassificationStream(Numbers(), 4, 3)
    again.load_state_dict(stream.state_dict())
    assert [*next(again), *next(again)] == twenty[12:]


def test_stream_refuses_the_state_of_another(tokenizer):
    stream = ClassificationStream(encode(tokenizer, texts(10)), 4)
    with pytest.raises(ValueError, match="over 10 rows, this one has 9"):
        ClassificationStream(encode(tokenizer, texts(9)), 4).load_state_dict(stream.state_dict())


def test_augmented_rows_are_the_texts_and_then_variants_by_number(tokenizer):
    rows = AugmentedTexts(texts(3), lambda text, number: ["good", "bad"][number % 2], 2, tokenizer)
    assert len(rows) == 9
    batch = rows.batch([1, 4, 8])
    first = batch["input_ids"][:, 1].tolist()
    assert first == [VOCABULARY.index(word) for word in ("film", "good", "good")]
    assert batch["labels"].tolist() == [1, 1, 0]
    assert torch.equal(rows.batch([1])["input_ids"], encode(tokenizer, texts(3)).batch([1])["input_ids"])
