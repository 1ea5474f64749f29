"""Labelled text from files, as they are written and as they are not."""

import pytest

from bertops.data import read_tsv


@pytest.fixture
def write(tmp_path):
    def to_file(content: str | bytes):
        path = tmp_path / "some.tsv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines(write, end, last):
    lines = ["text\tlabel", 'a "quoted" word\t1', " spaces stay \t0", "déjà vu \\n\t12"]
    found = read_tsv(write(end.join(lines) + end * last))
    assert found.texts == ['a "quoted" word', " spaces stay ", "déjà vu \\n"]
    assert found.labels == [1, 0, 12]


def test_a_path_as_a_string(write):
    assert read_tsv(str(write("text\tlabel\na\t0\n"))) == (["a"], [0])


def test_other_line_ends_of_unicode_are_text(write):
    assert read_tsv(write("text\tlabel\none\u2028two\x85three\x0cfour\rfive\t1\n")).texts == [
        "one\u2028two\x85three\x0cfour\rfive"
    ]


def test_byte_order_mark(write):
    assert read_tsv(write(b"\xef\xbb\xbftext\tlabel\na\t0\n")).texts == ["a"]


def test_header_alone(write):
    assert read_tsv(write("text\tlabel\n")) == ([], [])


def test_empty_text(write):
    assert read_tsv(write("text\tlabel\n\t1\n")) == ([""], [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"some\.tsv must begin with the header 'text\\tlabel', got ''"),
        ("sentence\tlabel\na\t0\n", r"header 'text\\tlabel', got 'sentence\\tlabel'"),
        ("text\tlabel\na\t0\n\nb\t1\n", "line 3: expected a text, a tab and a label, got ''"),
        ("text\tlabel\na\t0\nb 1\n", "line 3: expected a text, a tab and a label, got 'b 1'"),
        ("text\tlabel\na\tb\t0\n", "line 2: expected a text"),
        ("text\tlabel\na\t1.0\n", r"line 2: the label must be an integer from 0 on, got '1\.0'"),
        ("text\tlabel\na\t-1\n", "got '-1'"),
        ("text\tlabel\na\t\n", "got ''"),
        ("text\tlabel\na\t\u0663\n", "the label must be an integer"),
        (b"text\tlabel\nna\xefve\t0\n", "is not UTF-8: invalid continuation byte at byte 13"),
    ],
)
def test_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_tsv(write(content))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tsv(tmp_path / "missing.tsv")
