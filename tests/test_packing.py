"""Packing of token streams: numpy in, numpy out."""

import sys

import numpy as np
import pytest

from bertops.data import pack, unpad


def expected_unpad(mask):
    """Row by row, in plain Python."""
    indices, positions, offsets = [], [], [0]
    for i, row in enumerate(mask):
        columns = [j for j, real in enumerate(row) if real]
        indices += [i * len(row) + j for j in columns]
        positions += range(len(columns))
        offsets.append(len(indices))
    return indices, positions, offsets


MASKS = {
    "right": [[1, 1, 1], [1, 0, 0]],
    "left": [[0, 0, 1], [0, 1, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1]],
    "empty row": [[1, 1], [0, 0], [0, 1]],
    "all masked": [[0, 0], [0, 0]],
    "one token": [[1]],
}


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8])
@pytest.mark.parametrize("name", MASKS)
def test_unpad(name, dtype):
    mask = np.array(MASKS[name], dtype=dtype)
    result = unpad(mask)
    assert [x.tolist() for x in result] == list(expected_unpad(MASKS[name]))
    assert [x.dtype for x in result] == [np.int64, np.int64, np.int32]


def test_unpad_counts_any_nonzero_as_real():
    assert unpad(np.array([[0, 256, -1]])).indices.tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_unpad_empty_batch(shape):
    result = unpad(np.ones(shape, dtype=bool))
    assert result.indices.shape == (0,) and result.position_ids.shape == (0,)
    assert result.cu_seqlens.tolist() == [0] * (shape[0] + 1)


def test_unpad_reads_strided_masks_and_lists():
    mask = np.random.default_rng(0).random((7, 22)) < 0.5
    for view in (mask[::2, ::3], mask.T, mask[:, ::-1]):
        assert unpad(view).indices.tolist() == expected_unpad(view)[0]
    assert unpad([[True, False]]).indices.tolist() == [0]


def test_unpad_there_and_back():
    rng = np.random.default_rng(0)
    mask, rows = rng.random((5, 11)) < 0.6, rng.random((5, 11, 3))
    indices = unpad(mask).indices
    packed = rows.reshape(-1, 3)[indices]
    assert np.array_equal(packed, rows[mask])
    restored = np.zeros_like(rows)
    restored.reshape(-1, 3)[indices] = packed
    assert np.array_equal(restored, rows * mask[..., None])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones(3, bool), ValueError, r"mask must have shape \(B, N\), got \(3,\)"),
        (np.ones((1, 2, 3), bool), ValueError, r"got \(1, 2, 3\)"),
        (np.ones((2, 3)), TypeError, "mask must be bool or integer, .* got float64"),
        (np.broadcast_to(np.True_, (2**16, 2**16)), ValueError, "mask must hold at most 2147483647"),
    ],
)
def test_unpad_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        unpad(mask)


def test_pack():
    batch = pack([[5, 6, 7], np.array([], dtype=np.int64), (8,), np.array([9, 10], dtype=np.int32)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4, 6]
    assert batch.lengths.tolist() == [3, 0, 1, 2]
    dtypes = [batch.input_ids.dtype, batch.position_ids.dtype, batch.cu_seqlens.dtype]
    assert dtypes == [np.int64, np.int64, np.int32]
    rows = np.arange(12).reshape(6, 2)
    assert [x.tolist() for x in batch.split(rows)] == [
        [[0, 1], [2, 3], [4, 5]],
        [],
        [[6, 7]],
        [[8, 9], [10, 11]],
    ]


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_pack_nothing(sequences):
    batch = pack(sequences)
    assert batch.input_ids.shape == (0,) and batch.input_ids.dtype == np.int64
    assert batch.cu_seqlens.tolist() == [0] * (len(sequences) + 1)
    assert len(batch.split(np.empty((0, 4)))) == len(sequences)


def test_pack_agrees_with_unpad():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 100, n) for n in (4, 0, 7, 1)]
    padded = np.zeros((4, 7), dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    indices, position_ids, cu_seqlens = unpad(padded > 0)
    batch = pack(sequences)
    assert np.array_equal(batch.input_ids, padded.ravel()[indices])
    assert np.array_equal(batch.position_ids, position_ids)
    assert np.array_equal(batch.cu_seqlens, cu_seqlens)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([[1], [[2]]], ValueError, r"sequences\[1\] must be 1-D, got shape \(1, 1\)"),
        ([[1.5]], TypeError, r"sequences\[0\] must hold integers, got float64"),
    ],
)
def test_pack_refuses(sequences, error, message):
    with pytest.raises(error, match=message):
        pack(sequences)


def test_split_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"rows must have shape \(2, \.\.\.\), got \(3,\)"):
        pack([[1, 2]]).split(np.zeros(3))


def test_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bertops._host", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation"):
        unpad([[1]])
