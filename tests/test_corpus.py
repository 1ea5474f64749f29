"""From text files to a tokenized corpus and its cache."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import bertops.data.corpus
from bertops.data import (
    DynamicMasker,
    PretrainingStream,
    SentenceBlocks,
    SpecialTokens,
    TokenCorpus,
    encode_corpus,
    load_corpus,
    read_documents,
    special_tokens,
    train_tokenizer,
    word_starts,
)
from token_oracles import documents_of

DOCUMENTS = [
    ["The walls stood.", "The unwalled garden, unstanding, grew!"],
    ["Gardens grow; walls fall."],
    ["It's the gardener's wall.", "Standing walls grew old", "and older."],
]
KINDS = ["wordpiece", "bpe", "unigram"]


def write(path, documents=DOCUMENTS):
    path.write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer of every kind."""
    path = write(tmp_path_factory.mktemp("text") / "text.txt", DOCUMENTS * 5)
    sizes = {"wordpiece": 80, "bpe": 300, "unigram": 60}
    return {kind: train_tokenizer(path, sizes[kind], kind) for kind in KINDS}


@pytest.fixture
def letters():
    """A tokenizer that knows the words a, b, c and d, and drops full stops."""
    tokenizer = Tokenizer(models.WordLevel({"a": 5, "b": 6, "c": 7, "d": 8}, unk_token="none"))
    tokenizer.normalizer = normalizers.Replace(".", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_read_documents(tmp_path):
    text = "\ufeffone\n two \r\n\n\n\nthree\x0bé\u2028four\n\t\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_documents(tmp_path / "a.txt")) == [["one", "two"], ["three\x0bé\u2028four"]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("five\nsix")
    (tmp_path / "b" / "empty.txt").write_text("")
    (tmp_path / "b" / "d.md").write_text("not read")
    everything = [["one", "two"], ["three\x0bé\u2028four"], ["five", "six"]]
    assert list(read_documents(str(tmp_path))) == everything
    assert list(read_documents([tmp_path / "b", tmp_path / "a.txt"])) == everything[2:] + everything[:2]


def test_read_documents_is_lazy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\n\xff\n")
    documents = read_documents(tmp_path)
    assert next(documents) == ["one"]
    assert next(documents) == ["two"]
    with pytest.raises(ValueError, match=r"a\.txt, line 5: not UTF-8: invalid start byte at byte 0"):
        next(documents)


def test_read_documents_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        list(read_documents(tmp_path / "nothing.txt"))
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.txt"):
        list(read_documents(tmp_path))


def test_encode(letters):
    documents = [["a b", "", "c"], ["."], [], ["d d d"], iter(["a"])]
    corpus = encode_corpus(letters, documents)
    assert documents_of(corpus) == [[[5, 6], [7]], [[8, 8, 8]], [[5]]]
    assert [x.dtype for x in (corpus.tokens, corpus.line_offsets, corpus.document_offsets)] == [
        np.int32,
        np.int64,
        np.int64,
    ]
    assert (corpus.num_tokens, corpus.num_lines, corpus.num_documents) == (7, 4, 3)


def test_encode_in_chunks_with_a_tokenizer_that_cuts_and_pads(letters, monkeypatch, tmp_path):
    documents = [["a b c", "d"], ["c c", "b", "a"]]
    expected = [[[5, 6, 7], [8]], [[7, 7], [6], [5]]]
    letters.enable_truncation(2)
    letters.enable_padding(length=9, pad_token="d", pad_id=8)
    for size in (1, 2, 3, 5, 100):
        monkeypatch.setattr(bertops.data.corpus, "LINES_AT_ONCE", size)
        assert documents_of(encode_corpus(letters, documents)) == expected
        assert documents_of(encode_corpus(letters, documents, cache=tmp_path / str(size))) == expected
    assert letters.truncation and letters.padding


def test_cache(letters, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "cache"
    first = encode_corpus(letters, [["a b"], ["c", "d"]], cache=folder)
    assert isinstance(first.tokens, np.memmap) and not first.tokens.flags.writeable
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["corpus.json", "document_offsets.npy", "line_offsets.npy", "tokens.npy"]
    assert [path.name for path in folder.parent.iterdir()] == ["cache"]

    def refuse(*arguments):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(bertops.data.corpus, "_encode", refuse)
    for again in (encode_corpus(letters, [["a b"], ["c", "d"]], cache=folder), load_corpus(folder)):
        assert documents_of(again) == documents_of(first) == [[[5, 6]], [[7], [8]]]


@pytest.mark.parametrize(
    "documents", [[["a b"], ["c"], ["d"]], [["a b", "c", "d"]], [["a", "b"], ["c", "d"]]]
)
def test_cache_of_another_text(letters, tmp_path, documents):
    encode_corpus(letters, [["a b"], ["c", "d"]], cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"cache .* was made from another text or with another tokenizer"):
        encode_corpus(letters, documents, cache=tmp_path / "cache")


def test_cache_of_another_tokenizer(letters, tmp_path):
    encode_corpus(letters, [["a b"]], cache=tmp_path / "cache")
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="another tokenizer: delete the folder, or name another"):
        encode_corpus(letters, [["a b"]], cache=tmp_path / "cache")


def test_cache_is_whole_or_not_there(letters, tmp_path):
    def documents():
        yield ["a b"]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encode_corpus(letters, documents(), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="there is no text in the corpus"):
        encode_corpus(letters, [["."]], cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_cache_refuses_what_is_no_cache(letters, tmp_path):
    for content in (None, "", "[]", json.dumps({"format": 0, "digest": ""})):
        if content is not None:
            (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(ValueError, match="holds no corpus of format 1"):
            encode_corpus(letters, [["a"]], cache=tmp_path)
        with pytest.raises(ValueError, match="holds no corpus of format 1"):
            load_corpus(tmp_path)


@pytest.mark.parametrize("documents", [[], [[]], [["", "."]]])
def test_no_text(letters, documents):
    with pytest.raises(ValueError, match="there is no text in the corpus"):
        encode_corpus(letters, documents)


@pytest.mark.parametrize(
    ("lines", "documents", "message"),
    [
        ([0, 2, 3], [0, 2], r"line_offsets must go from 0 to the 4 tokens, got ends \[0, 3\]"),
        ([1, 4], [0, 1], "line_offsets must go from 0"),
        ([], [0, 1], r"line_offsets .* got ends \[\]"),
        ([0, 2, 2, 4], [0, 3], r"line_offsets must rise .* got \[2, 2\]"),
        ([0, 2, 4], [0, 3], "document_offsets must go from 0 to the 2 lines"),
        ([0, 2, 4], [0, 0, 2], r"document_offsets must rise .* got \[0, 0\]"),
    ],
)
def test_corpus_refuses_offsets(lines, documents, message):
    with pytest.raises(ValueError, match=message):
        TokenCorpus(np.zeros(4, np.int32), np.array(lines, np.int64), np.array(documents, np.int64))


def test_corpus_refuses_arrays():
    offsets = np.array([0, 1])
    with pytest.raises(TypeError, match="tokens must be int32, got int64"):
        TokenCorpus(np.zeros(1, np.int64), offsets, offsets)
    with pytest.raises(ValueError, match="tokens must be 1-D"):
        TokenCorpus(np.zeros((1, 1), np.int32), offsets, offsets)
    with pytest.raises(TypeError, match="line_offsets must be int64"):
        TokenCorpus(np.zeros(1, np.int32), offsets.astype(np.int32), offsets)
    with pytest.raises(ValueError, match="tokens must hold at least one token"):
        TokenCorpus(np.zeros(0, np.int32), offsets[:1], offsets[:1])


def test_special_tokens(trained, letters):
    assert special_tokens(trained["wordpiece"]) == SpecialTokens(2, 3, 0, 4, 1)
    assert special_tokens(trained["bpe"]) == SpecialTokens(0, 2, 1, 4, 3)
    assert special_tokens(trained["unigram"]) == SpecialTokens(2, 3, 0, 4, 1)
    with pytest.raises(ValueError, match=r"no classifier token: none of \[CLS\], <s> is in its vocabulary"):
        special_tokens(letters)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokenizers(trained, kind):
    tokenizer = trained[kind]
    ids = tokenizer.encode("The walls stood.", add_special_tokens=False).ids
    assert len(ids) > 3 and not set(ids) & set(special_tokens(tokenizer))
    text = tokenizer.decode(ids).strip()
    assert (
        text
        == {"wordpiece": "the walls stood.", "bpe": "The walls stood.", "unigram": "the walls stood."}[kind]
    )
    upper = tokenizer.encode("GARDEN", add_special_tokens=False).ids
    lower = tokenizer.encode("garden", add_special_tokens=False).ids
    assert (upper == lower) == (kind != "bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_word_starts(trained, kind):
    tokenizer = trained[kind]
    starts = word_starts(tokenizer)
    assert starts.shape == (tokenizer.get_vocab_size(),) and starts.dtype == np.bool_
    assert starts[list(special_tokens(tokenizer))].all()
    text = "gardener unwalled, grow"
    encoding = tokenizer.encode(text, add_special_tokens=False)
    found = [i for i, token_id in enumerate(encoding.ids) if starts[token_id]]
    spans = [text[a:b].strip() for a, b in encoding.offsets]
    begins = [i for i, (a, b) in enumerate(encoding.offsets) if a == 0 or not text[a - 1 : b].isalpha()]
    if kind != "wordpiece":  # a comma belongs to the word before it
        begins = [i for i in begins if spans[i] != ","]
    assert found == begins
    assert len(found) == (4 if kind == "wordpiece" else 3) < len(encoding.ids)


def test_word_starts_refuses_a_vocabulary_without_words(letters):
    with pytest.raises(ValueError, match="marks no words"):
        word_starts(letters)


def test_train_tokenizer_options(tmp_path):
    path = write(tmp_path / "text.txt")
    cased = train_tokenizer(path, 80, "wordpiece", lowercase=False)
    assert cased.encode("The").ids != cased.encode("the").ids
    own = train_tokenizer([path], 300, "bpe", special_tokens=["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"])
    assert special_tokens(own) == SpecialTokens(0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="kind must be one of wordpiece, bpe, unigram, got 'char'"):
        train_tokenizer(path, 80, "char")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xe9\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: not UTF-8"):
        train_tokenizer(tmp_path, 80)


def test_says_that_tokenizers_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the package tokenizers .*pip install tokenizers"):
        train_tokenizer(write(tmp_path / "text.txt"), 80)


@pytest.mark.parametrize("kind", KINDS)
def test_from_text_to_batches(trained, kind, tmp_path):
    tokenizer = trained[kind]
    special = special_tokens(tokenizer)
    path = write(tmp_path / "text.txt")
    corpus = encode_corpus(tokenizer, read_documents(path), cache=tmp_path / "cache")
    assert corpus.num_documents == 3 and corpus.num_lines == 6
    masker = DynamicMasker(
        tokenizer.get_vocab_size(),
        special.mask_token_id,
        special,
        ngram=3,
        word_starts=word_starts(tokenizer),
    )
    stream = PretrainingStream(SentenceBlocks(corpus, 16, special), masker, 2, drop_last=False)
    for batch in stream:
        original = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        assert (original[:, 0] == special.cls_token_id).all()
        assert (batch["labels"][~batch["mask"]] == -100).all()
