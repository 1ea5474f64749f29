"""What the tiled attention kernels share: finding a block's rows, the keys it can see, loads and dropout.

Positions are local to the sequence: a row of the batch, or one of the sequences that ``cu_seqlens`` packs.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # nine bits of ln 2: its product with a small integer is exact
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_SEARCH = tl.constexpr(256)
_SCAN = tl.constexpr(1024)


@triton.jit
def find_block(
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    BLOCK: tl.constexpr,
):
    """Which rows this program owns.

    Returns batch, head, sequence (the dropout counter's), origin (the sequence's first row on the N axis),
    length of the sequence and first (the block's first row in it); within bounds whatever cu_seqlens says.
    """
    program = tl.program_id(0)
    if cu_seqlens is None:
        blocks = tl.cdiv(N, BLOCK)
        sequence = program // blocks // H
        batch = sequence
        head = program // blocks % H
        origin = 0
        length = N
        first = program % blocks * BLOCK
    else:
        blocks = N // BLOCK + num_sequences
        block = program % blocks
        # Sequence s owns the blocks from cu_seqlens[s] // BLOCK + s on: no fewer than it has rows for.
        reached = tl.zeros([_SEARCH], tl.int32)
        for start in range(0, num_sequences, _SEARCH):
            s = start + tl.arange(0, _SEARCH)
            inside = s < num_sequences
            row = tl.load(cu_seqlens + s, mask=inside, other=0)
            reached += (inside & (row // BLOCK + s <= block)).to(tl.int32)
        sequence = tl.maximum(tl.sum(reached, 0) - 1, 0)
        batch = 0
        head = program // blocks
        origin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), N)
        length = tl.minimum(tl.load(cu_seqlens + sequence + 1), N) - origin
        first = tl.maximum(block - origin // BLOCK - sequence, 0) * BLOCK
    return batch, head, sequence, origin, length, first


@triton.jit
def load_real(
    mask,  # the sequence's row of (B, N) bool, or None
    rows,  # (BLOCK,)
    length,
):
    """(BLOCK,) bool: the rows that are real tokens."""
    real = rows < length
    if mask is not None:
        real = real & (tl.load(mask + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def visible_range(
    mask,  # the sequence's row of (B, N) bool, or None
    length,
    first,  # of the block on the other axis
    real,  # (OTHER,) bool: its real rows
    window,
    OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The positions that a block has to visit, in steps of BLOCK: begin, dense, end.

    Every step in [begin, dense) is real tokens only and needs no check; those in [dense, end) need one.
    begin and dense are multiples of BLOCK. A block without a real row visits nothing.
    """
    if mask is None:
        begin = 0
        end = length
        count = length
    else:
        begins = tl.full([_SCAN], 2**31 - 1, tl.int32)
        ends = tl.zeros([_SCAN], tl.int32)
        counts = tl.zeros([_SCAN], tl.int32)
        for start in range(0, length, _SCAN):
            rows = start + tl.arange(0, _SCAN)
            token = load_real(mask, rows, length)
            begins = tl.where(token, tl.minimum(begins, rows), begins)
            ends = tl.where(token, rows + 1, ends)
            counts += token.to(tl.int32)
        begin = tl.min(begins, 0)
        end = tl.max(ends, 0)
        count = tl.sum(counts, 0)
    if HAS_WINDOW:
        begin = tl.maximum(begin, first - window)
        end = tl.minimum(end, first + OTHER + window)
    any_real = tl.max(real.to(tl.int32), 0) > 0
    begin = tl.where(any_real, begin // BLOCK * BLOCK, 0)
    end = tl.where(any_real, end, 0)
    if HAS_WINDOW:
        count = -1
    dense = tl.where(count == end - begin, end // BLOCK * BLOCK, begin)
    return begin, dense, end


@triton.jit
def first_row(
    x,  # (B, H, N, D), last stride 1
    strides,  # of B, H, N
    batch,
    head,
    row,
):
    """Pointer to a row; products of strides are 64 bits wide here, and those inside a tile fit into 32."""
    return (
        x
        + tl.cast(batch, tl.int64) * strides[0]
        + tl.cast(head, tl.int64) * strides[1]
        + tl.cast(row, tl.int64) * strides[2]
    )


@triton.jit
def first_packed_row(
    x,  # (B, H, N, D) over contiguous (B, N, H, D) memory
    N,
    H,
    batch,
    head,
    row,
    HEAD_DIM: tl.constexpr,
):
    """Pointer to a row of a tensor of the layout that the launchers allocate."""
    return x + ((tl.cast(batch, tl.int64) * N + row) * H + head) * HEAD_DIM


@triton.jit
def load_rows(
    x,  # pointer to the first row
    stride,  # of a row
    real,  # (BLOCK,) bool, not looked at unless CHECK
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(BLOCK, BLOCK_D): rows that are not real, and dims from HEAD_DIM on, come as 0 and are not read."""
    dims = tl.arange(0, BLOCK_D)
    pointers = x + tl.arange(0, BLOCK)[:, None] * stride + dims[None, :]
    if CHECK:
        if HEAD_DIM == BLOCK_D:
            rows = tl.load(pointers, mask=real[:, None], other=0.0)
        else:
            rows = tl.load(pointers, mask=real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(
    x,  # pointer to the first row
    stride,  # of a row
    values,  # (BLOCK, BLOCK_D) fp32
    inside,  # (BLOCK,) bool
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    stored = inside[:, None]
    if HEAD_DIM != BLOCK_D:
        stored = stored & (dims < HEAD_DIM)[None, :]
    pointers = x + tl.arange(0, BLOCK)[:, None] * stride + dims[None, :]
    tl.store(pointers, values.to(x.dtype.element_ty), mask=stored)


@triton.jit
def exact_exp(x):
    x = tl.where(x < -150.0, -150.0, x)  # exp is 0 from there, and -inf - -inf would be NaN below
    n = tl.floor(x * _LOG2E + 0.5)
    rest = x - n * _LN2_HIGH - n * _LN2_LOW
    return tl.exp2(rest * _LOG2E) * tl.exp2(n)


@triton.jit
def exp_scaled(
    s,  # fp32
    scale,
    shift,  # fp32
    EXACT: tl.constexpr,
):
    """exp(scale * s - shift): to about 1 ulp of fp32 with EXACT, to what bf16 and fp16 can tell without."""
    if EXACT:
        return exact_exp(s * scale - shift)
    return tl.exp2(s * (scale * _LOG2E) - shift * _LOG2E)


@triton.jit
def words_kept(
    w0,
    w1,
    w2,
    w3,
    threshold,  # int32 bits
):
    """(..., 2, 2) bool, which reshapes to the order of the words: those at least ``threshold``."""
    least = tl.cast(threshold, tl.int32).to(tl.uint32, bitcast=True)
    return tl.join(tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least))


@triton.jit
def dropout_keep(
    seed,  # int64 scalar
    sequence,
    head,
    query,  # first of the tile
    key,  # first of the tile, a multiple of 4
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool, or its transpose with KEYS_FIRST: which probabilities survive.

    Word j % 4 of Philox4x32-10 at the counter (j // 4, i, head, sequence): one call for four keys.
    """
    groups = key // 4 + tl.arange(0, BLOCK_N // 4)
    queries = query + tl.arange(0, BLOCK_M)
    if KEYS_FIRST:
        w0, w1, w2, w3 = tl.philox(seed, groups[:, None], queries[None, :], head, sequence)
    else:
        w0, w1, w2, w3 = tl.philox(seed, groups[None, :], queries[:, None], head, sequence)
    keep = words_kept(w0, w1, w2, w3, threshold)
    if KEYS_FIRST:
        keep = tl.permute(keep, (0, 2, 3, 1)).reshape(BLOCK_N, BLOCK_M)
    else:
        keep = keep.reshape(BLOCK_M, BLOCK_N)
    return keep
