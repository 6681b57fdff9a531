# ruff: noqa: RUF005  (tuples do not unpack in kernels)
# mypy: disable-error-code=assignment
"""A tile of chunks: the column order, and the scan over chunks in registers.

A tile is C chunks of T = 64 positions, stored [time or state, chunk]. Its columns are ordered so
that the thread that holds a column after a matrix product holds the other chunks of its group too:

    column 32 g + 8 j + 2 p + e   holds chunk   8 (4 g + p) + 2 j + e,     j, p < 4;  e < 2

A group is 8 consecutive chunks; group 4 g + p lies in lane p of every quad. States are ordered so
that both parts of a mode lie in one thread: row 16 w + 8 h + i holds the real (h = 0) or the
imaginary (h = 1) part of mode 8 w + i. The scan x_{c+1} = decay x_c + z_c then runs in three steps,
none of which moves a tile:

    the total of each group, started from zero        serial, in a thread
    the start of each group, from the totals          C / 8 values per mode are exchanged
    the states of each group, from its start          serial, in a thread

The functions serve plain Triton and Gluon. A `layout` is None in plain Triton; in Gluon it names
where a value must lie, and that it gets there without a move is asserted.
"""

import triton
import triton.language as tl

try:
    from triton.experimental.gluon import language as gl
except ImportError:  # an older or trimmed Triton: then only `layout=None` is used
    gl = None

T = tl.constexpr(64)


@triton.jit
def chunk_of_column(column):
    """Chunk of a tile that a column holds."""
    return column // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2


@triton.jit
def mode_of_row(row):
    """Mode whose real or imaginary part a state row holds."""
    return row // 16 * 8 + row % 8


@triton.jit
def part_of_row(row):
    """0 where a state row holds a real part, 1 where it holds an imaginary one."""
    return row // 8 % 2


@triton.jit
def add_product(sum_, a, b, PRECISION: tl.constexpr):
    """sum_ + a b, of plain Triton.

    In float32 ("ieee") the product is summed by itself: in one chain of additions behind what is
    there, each rounds to the last place of the whole.
    """
    if PRECISION == "ieee":
        # the last argument means nothing here, but that Triton leaves both sums apart
        return sum_ + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, sum_, input_precision=PRECISION)


@triton.jit
def multiply_add(x_re, x_im, f_re, f_im, z_re, z_im):
    """Complex f x + z."""
    return (
        tl.fma(f_re, x_re, tl.fma(-f_im, x_im, z_re)),
        tl.fma(f_re, x_im, tl.fma(f_im, x_re, z_im)),
    )


@triton.jit
def segment_of(row, L, total, segments, SEGMENTED: tl.constexpr):
    """Row of the tensors, position in it where a row of the walk begins, and its length.

    Either they are the same, or a row of the tensors, `total` long, is cut into `segments` rows
    of length L, of which the last may be shorter.
    """
    if SEGMENTED:
        begin = row % segments * L
        return row // segments, begin, tl.minimum(L, total - begin)
    else:
        return row, 0, L


@triton.jit
def span_of(row, B, L, total, segments, bounds, SEGMENTED: tl.constexpr):
    """Where a row of the walk lies: a row, a segment of one, or a packed sequence of the only one.

    Returns:
        Its row in the tensors, its row among the states and carries that are given, where it
        begins, how much of that belongs to the same sequence, and its length.
    """
    if bounds is None:
        source, begin, length = segment_of(row, L, total, segments, SEGMENTED)
        return source, source, begin, begin, length
    else:
        row = tl.where(row < B, row, 0)
        begin = tl.load(bounds + row)
        return row * 0, row, begin, begin * 0, tl.load(bounds + row + 1) - begin


@triton.jit
def power8(re, im):
    """The eighth power, complex: the decay over a group."""
    for _ in tl.static_range(3):
        re, im = re * re - im * im, 2.0 * re * im
    return re, im


@triton.jit
def load_complex(pointer, modes, mask):
    """Complex numbers that lie as pairs (re, im); 0 where masked."""
    if mask is None:
        return tl.load(pointer + 2 * modes), tl.load(pointer + 2 * modes + 1)
    else:
        return (
            tl.load(pointer + 2 * modes, mask, 0.0),
            tl.load(pointer + 2 * modes + 1, mask, 0.0),
        )


@triton.jit
def store_complex(pointer, modes, re, im, mask):
    """The inverse of `load_complex`."""
    tl.store(pointer + 2 * modes, re, mask)
    tl.store(pointer + 2 * modes + 1, im, mask)


@triton.jit
def load_row_states(pointer, first_row, channel, B, D, modes, ROWS: tl.constexpr):
    """States of a tile's rows from (B, D, N/2, 2), as tuples of vectors; 0 without a pointer."""
    re = ()
    im = ()
    for r in tl.static_range(ROWS):
        if pointer is None:
            row_re = modes.to(tl.float32) * 0.0
            row_im = row_re
        else:
            at = pointer + ((first_row + r).to(tl.int64) * D + channel) * (2 * modes.shape[0])
            row_re = tl.load(at + 2 * modes, first_row + r < B, 0.0)
            row_im = tl.load(at + 2 * modes + 1, first_row + r < B, 0.0)
        re = re + (row_re,)
        im = im + (row_im,)
    return re, im


@triton.jit
def place(x, layout: tl.constexpr):
    """The value under `layout`, where it must lie already."""
    if layout is None:
        return x
    else:
        return gl.convert_layout(x, layout, assert_trivial=True)


@triton.jit
def place_all(parts, layout: tl.constexpr):
    """Eight parts under `layout`, where they must lie already."""
    placed = (place(parts[0], layout),)
    for n in tl.static_range(1, 8):
        placed = placed + (place(parts[n], layout),)
    return placed


@triton.jit
def split8(x):
    """[R, groups, j low bit, j high bit, e] -> the 8 chunks of a group in order, [R, groups]."""
    even, odd = tl.split(x)
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x2 = tl.split(even_low)
    x4, x6 = tl.split(even_high)
    x1, x3 = tl.split(odd_low)
    x5, x7 = tl.split(odd_high)
    return (x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def join8(x):
    """The inverse of `split8`."""
    even = tl.join(tl.join(x[0], x[2]), tl.join(x[4], x[6]))
    odd = tl.join(tl.join(x[1], x[3]), tl.join(x[5], x[7]))
    return tl.join(even, odd)


@triton.jit
def split_chunks(x, C: tl.constexpr, layout: tl.constexpr):
    """A tile [T, C] -> 8 parts [T, groups]: chunk 0 of every group, chunk 1 of every group, ..."""
    x = tl.permute(tl.reshape(x, [T, C // 32, 2, 2, 4, 2]), (0, 1, 4, 3, 2, 5))
    return place_all(split8(tl.reshape(x, [T, C // 8, 2, 2, 2])), layout)


@triton.jit
def join_chunks(parts, C: tl.constexpr, layout: tl.constexpr):
    """The inverse of `split_chunks`."""
    x = tl.reshape(join8(parts), [T, C // 32, 4, 2, 2, 2])
    return place(tl.reshape(tl.permute(x, (0, 1, 4, 3, 2, 5)), [T, C]), layout)


@triton.jit
def split_states(z, N: tl.constexpr, C: tl.constexpr, layout: tl.constexpr):
    """A tile of states [N, C] -> real and imaginary parts, 8 each, [N/2, groups]."""
    z = tl.permute(tl.reshape(z, [N // 16, 2, 8, C // 32, 2, 2, 4, 2]), (0, 2, 3, 6, 5, 4, 7, 1))
    z_re, z_im = tl.split(tl.reshape(z, [N // 2, C // 8, 2, 2, 2, 2]))
    return place_all(split8(z_re), layout), place_all(split8(z_im), layout)


@triton.jit
def join_states(x_re, x_im, N: tl.constexpr, C: tl.constexpr, layout: tl.constexpr):
    """The inverse of `split_states`."""
    x = tl.reshape(tl.join(join8(x_re), join8(x_im)), [N // 16, 8, C // 32, 4, 2, 2, 2, 2])
    return place(tl.reshape(tl.permute(x, (0, 7, 1, 2, 5, 4, 3, 6)), [N, C]), layout)


@triton.jit
def group_totals(z_re, z_im, decay_re, decay_im, REVERSE: tl.constexpr):
    """What a group leaves if it starts from zero, [N/2, groups]."""
    re = z_re[7 if REVERSE else 0]
    im = z_im[7 if REVERSE else 0]
    for n in tl.static_range(1, 8):
        re, im = multiply_add(
            re, im, decay_re, decay_im, z_re[7 - n if REVERSE else n], z_im[7 - n if REVERSE else n]
        )
    return re, im


@triton.jit
def split_groups(x, C: tl.constexpr):
    """[N/2, groups] -> one vector [N/2] for each group."""
    if C == 32:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return (x0, x1, x2, x3)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2, 2]))
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
        return (x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def group_starts(
    total_re, total_im, first_re, first_im, decay_re, decay_im, group, zero,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """State before each group, and after the last group of each row.

    Args:
        total_re, total_im: What each group leaves, tuples of GROUPS vectors [N/2].
        first_re, first_im: State before each row of the tile, tuples of ROWS vectors.
        decay_re, decay_im: Decay over a group, [N/2]. If it is float64, what rounding leaves of it
            counts too: it would be missing from every group of a row.
        group: Group of each column of the result, [1, groups].
        zero: Zeros of the result's shape and layout, [N/2, groups].
    """
    start_re = zero
    start_im = zero
    last_re = ()
    last_im = ()
    per_row: tl.constexpr = GROUPS // ROWS
    re = first_re[ROWS - 1 if REVERSE else 0]
    im = first_im[ROWS - 1 if REVERSE else 0]
    for n in tl.static_range(GROUPS):
        if n % per_row == 0 and n > 0:
            re = first_re[ROWS - 1 - n // per_row if REVERSE else n // per_row]
            im = first_im[ROWS - 1 - n // per_row if REVERSE else n // per_row]
        here = group == (GROUPS - 1 - n if REVERSE else n)
        start_re = tl.where(here, re[:, None], start_re)
        start_im = tl.where(here, im[:, None], start_im)
        left_re = total_re[GROUPS - 1 - n if REVERSE else n]
        left_im = total_im[GROUPS - 1 - n if REVERSE else n]
        if decay_re.dtype == tl.float64:
            rest_re = (decay_re - decay_re.to(tl.float32)).to(tl.float32)
            rest_im = (decay_im - decay_im.to(tl.float32)).to(tl.float32)
            left_re, left_im = multiply_add(re, im, rest_re, rest_im, left_re, left_im)
        re, im = multiply_add(
            re, im, decay_re.to(tl.float32), decay_im.to(tl.float32), left_re, left_im
        )
        if n % per_row == per_row - 1:
            if REVERSE:
                last_re = (re,) + last_re
                last_im = (im,) + last_im
            else:
                last_re = last_re + (re,)
                last_im = last_im + (im,)
    return start_re, start_im, last_re, last_im


@triton.jit
def group_states(start_re, start_im, z_re, z_im, decay_re, decay_im):
    """State before each chunk, left to right, from the state before its group."""
    re = (start_re,)
    im = (start_im,)
    for n in tl.static_range(7):
        start_re, start_im = multiply_add(start_re, start_im, decay_re, decay_im, z_re[n], z_im[n])
        re = re + (start_re,)
        im = im + (start_im,)
    return re, im


@triton.jit
def group_states_reversed(start_re, start_im, z_re, z_im, decay_re, decay_im):
    """State behind each chunk, right to left, from the state behind its group."""
    re = (start_re,)
    im = (start_im,)
    for n in tl.static_range(7):
        start_re, start_im = multiply_add(
            start_re, start_im, decay_re, decay_im, z_re[7 - n], z_im[7 - n]
        )
        re = (start_re,) + re
        im = (start_im,) + im
    return re, im


@triton.jit
def add_conjugate_products(sum_re, sum_im, x_re, x_im, g_re, g_im):
    """Add the sum over the chunks of a group of g conj(x)."""
    for n in tl.static_range(8):
        sum_re, sum_im = multiply_add(g_re[n], g_im[n], x_re[n], -x_im[n], sum_re, sum_im)
    return sum_re, sum_im


@triton.jit
def shift_left(
    x, carry, group, C: tl.constexpr, ROWS: tl.constexpr,
    parts_layout: tl.constexpr, tile_layout: tl.constexpr,
):  # fmt: skip
    """Give the column of chunk c what chunk c + 1 has in x [T, C].

    The last chunk of the tile gets the carry's last group, the last chunk of another row 0.

    Args:
        carry: [T, groups], as the call for the next tile returned it.
        group: Group of each column of the carry, [T, groups].

    Returns:
        The shifted tile, and the carry for the tile before.
    """
    GROUPS: tl.constexpr = C // 8
    parts = split_chunks(x, C, parts_layout)
    following = tl.gather(parts[0], (group + 1) % GROUPS, axis=1)
    new = tl.where(group == GROUPS - 1, carry, following)
    if ROWS > 1:
        new = tl.where(group % (GROUPS // ROWS) == GROUPS // ROWS - 1, 0.0, new)
    shifted = (
        parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7], new,
    )  # fmt: skip
    return join_chunks(shifted, C, tile_layout), following
