"""Long convolution by a block FFT on the matrix units, in plain Triton: rows that fit a program.

A real row x of at most n positions needs no 2n points against wrap-around, nor a second row beside
it. With t^n = i instead of 1, a polynomial of degree below 2n has the coefficients j and n + j as
the two parts of one complex number: the product of two real rows comes out with positions 0 .. n-1
in its real part and what reaches beyond the row in the imaginary one. t^n = i for

    t = exp(-2 pi i (k - 1/4) / n),   k = 0 .. n-1

so it is the DFT at frequencies shifted by a quarter, of n points for a row of n. Row and filter
are seen as matrices Z[l1, l2], l = N2 l1 + l2. With unitary factors W and the turns
t = exp(-2 pi i (k1 - 1/4) l2 / n), W_N1 at frequencies k1 - 1/4,

    S = ((W_N1 Z) t) W_N2                   the spectrum of index k1 + N1 k2 stays at S[k1, k2]
    y = Re conj(W_N1) (((S H) conj(W_N2)) conj(t))

and the row comes back in place: nothing is ever transposed. H, the spectrum of the filter, is kept
in the same order.

Four real matrix products do this for a row. `F` is W_N1 on l1 with rows (part, k1), part being
real or imaginary; `W` is W_N2 on (l2, part). Their columns are orthonormal: the way back takes
their transposes. The parts of a point alternate in groups of 8 columns

    column 16 j + 8 part + i  holds that part of point 8 j + i

so that the thread that holds one part in the layout of the matrix units holds the other one too.

That way a table of W holds each number twice, and an operand of F both parts of a row. Where
shared memory decides, parts stand APART: F and W are two matrices each, those of W symmetric, and
a product of complex matrices is four real ones. A program of 8,192 points of pairs takes 192 KB,
where it took 256, one of 4,096 80, of which a multiprocessor of Hopper holds two.

For half inputs the operands are float16: a row is scaled by a power of two to a maximum in [1, 2),
a spectrum's largest part to [2^h, 2^(h+1)). All transforms are unitary: no value inside exceeds
|x|_2 max|H| <= 2 sqrt(n) sqrt(2) 2^(h+1), and h keeps that below 65504. Nothing overflows.

PRECISION says what a product is made of (`fft_size.precision_of`):

    half     one product of float16: the dozen roundings of 2e-4 each that a row meets are below the
             one of a bfloat16 result
    pairs    operands are float16 and 2^11 times what is left of them, also float16: 22 bits. Three
             products of four, so that float16 results are rounded once, and sums are float32's
    tf32x3   the same with tf32, for float32 rows

The same kernels run complex rows with the ordinary DFT, K = 2 N1, F on (part, l1). Longer rows need
that, see `fft_long`.

Source: Fu et al. 2023 (arXiv 2212.14052v3), section 4.1 (block FFT); Crandall and Fagin 1994,
Discrete weighted transforms (the right-angle convolution).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import current_target


@triton.constexpr_function
def shrinks(precision):
    """The part of itself that a sum loses with each instruction of the matrix units.

    Fitted to errors of all sizes on an H200; of other GPUs, which were not measured, and in the
    interpreter, which rounds, 0. Asked while a kernel is compiled, for the GPU that will run it.
    """
    target = None if triton.knobs.runtime.interpret else current_target()
    if target is None or (target.backend, target.arch) != ("cuda", 90):
        return 0.0
    return 2.65e-8 if precision == "pairs" else 2.85e-8


@triton.jit
def load_rows(base, offsets, mask, EVEN: tl.constexpr):
    """A tile of rows; 0 where masked. EVEN: nothing is."""
    if EVEN:
        return tl.load(base + offsets)
    else:
        return tl.load(base + offsets, mask, 0.0)


@triton.jit
def load_first(base, stride, first, position, inside, EVEN: tl.constexpr, AHEAD: tl.constexpr):
    """The first row, if rows are loaded a turn ahead."""
    if AHEAD:
        return load_rows(base + first.to(tl.int64) * stride, position, inside, EVEN)
    else:
        return 0


@triton.jit
def load_next(
    held, base, stride, row, last, position, inside, EVEN: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """This row, and what is held for the next turn."""
    if AHEAD:
        after = tl.minimum(row + 1, last - 1)
        return held, load_rows(base + after * stride, position, inside, EVEN)
    else:
        return load_rows(base + row * stride, position, inside, EVEN), held


@triton.jit
def store_rows(base, offsets, x, mask, EVEN: tl.constexpr):
    """The inverse of `load_rows`."""
    if EVEN:
        tl.store(base + offsets, x)
    else:
        tl.store(base + offsets, x, mask)


@triton.jit
def split_stacked(x, N1: tl.constexpr, N2: tl.constexpr):
    """Rows (part, k1) -> both parts, [N1, N2]."""
    return tl.split(tl.permute(tl.reshape(x, (2, N1, N2)), (1, 2, 0)))


@triton.jit
def join_stacked(re, im, N1: tl.constexpr, N2: tl.constexpr):
    """The inverse of `split_stacked`."""
    return tl.reshape(tl.permute(tl.join(re, im), (2, 0, 1)), (2 * N1, N2))


@triton.jit
def split_columns(x, N1: tl.constexpr, N2: tl.constexpr):
    """Columns (j, part, i) -> both parts, [N1, N2]."""
    x = tl.permute(tl.reshape(x, (N1, N2 // 8, 2, 8)), (0, 1, 3, 2))
    re, im = tl.split(x)
    return tl.reshape(re, (N1, N2)), tl.reshape(im, (N1, N2))


@triton.jit
def join_columns(re, im, N1: tl.constexpr, N2: tl.constexpr):
    """The inverse of `split_columns`."""
    x = tl.reshape(tl.join(re, im), (N1, N2 // 8, 8, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2)), (N1, 2 * N2))


@triton.jit
def pack(re, im):
    """Two float32 as one word of two float16: half the registers of two tiles."""
    low = re.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = im.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return low | high


@triton.jit
def unpack(words):
    """The inverse of `pack`."""
    re = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    im = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return re, im


@triton.jit
def operand(x, like, PRECISION: tl.constexpr):
    """A tile as an operand beside a factor, followed by the second half of pairs, else by itself.

    What is of a factor's dtype has no second half.
    """
    high = x.to(like.dtype)
    if PRECISION == "pairs" and x.dtype != like.dtype:
        return high, ((x - high.to(tl.float32)) * 2048.0).to(like.dtype)
    else:
        return high, high


@triton.jit
def as_loaded(x, source, gate, like):
    """A tile in an operand's dtype, if `source` has that, too, and no gate was multiplied."""
    if gate is None and source.dtype.element_ty == like.dtype:
        return x.to(like.dtype)
    else:
        return x


@triton.jit
def product(a, a_low, b, b_low, PRECISION: tl.constexpr, WHOLE: tl.constexpr = False):
    """The matrix product a b, float32; see `operand`. WHOLE: b has no second half.

    Hopper's matrix units truncate sums. All values shrink alike, transform after transform, three
    times as much as rounding moves them at random; but for "half" it is put back here. Sums grow
    with the root of what was summed: s instructions, 16 products of float16 deep or 8 of tf32,
    take sqrt(1 / s) + .. + sqrt(s / s), some 2 s / 3 + 1 / 2, times as much as the last one.
    """
    DEPTH: tl.constexpr = a.shape[1]
    SHRINKS: tl.constexpr = shrinks(PRECISION)
    if PRECISION == "pairs":
        out = tl.dot(a_low, b)
        if not WHOLE:
            out = tl.dot(a, b_low, out)
        out = tl.dot(a, b, out * (1.0 / 2048.0))
        return out + out * (SHRINKS * (DEPTH / 24 + 0.5))
    elif PRECISION == "half":
        return tl.dot(a, b)
    else:
        out = tl.dot(a, b, input_precision=PRECISION)
        return out + out * (SHRINKS * (DEPTH / 12 + 0.5))


@triton.jit
def sum_of_products(a, a_low, b, b_low, c, c_low, d, d_low):
    """Two products in one sum, a b + c d, of pairs; see `product`."""
    DEPTH: tl.constexpr = a.shape[1] + c.shape[1]
    SHRINKS: tl.constexpr = shrinks("pairs")
    out = tl.dot(a_low, b)
    out = tl.dot(a, b_low, out)
    out = tl.dot(c_low, d, out)
    out = tl.dot(c, d_low, out)
    out = tl.dot(a, b, out * (1.0 / 2048.0))
    out = tl.dot(c, d, out)
    return out + out * (SHRINKS * (DEPTH / 24 + 0.5))


@triton.jit
def cosine_and_sine(rows, columns, points, FAST: tl.constexpr):
    """Of rows columns / points turns, up to one; rows of quarters, columns of integers; tiles."""
    if FAST:  # absolute error 1e-6, operands are rounded to 2^-11 behind it
        angle = rows * (columns * (6.283185307179586 / points))
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        # what is left of quarter turns is exact, at most an eighth: Taylor's series to 3e-8
        turn = rows * (columns * (1.0 / points))
        quarters = tl.floor(turn * 4.0 + 0.5)
        x = (turn - quarters * 0.25) * 6.283185307179586
        y = x * x
        cos = 1.0 - y * (0.5 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320))))
        sin = x - x * y * (1 / 6 - y * (1 / 120 - y * (1 / 5040 - y * (1 / 362880))))
        quarter = quarters.to(tl.int32)
        odd = (quarter & 1) != 0
        first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
        # cos is negative in quarters 1 and 2, sin in 2 and 3
        first = tl.where(((quarter + 1) & 2) != 0, -first, first)
        return first, tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def make_turns(zero, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr, FAST: tl.constexpr):
    """Cosine and sine of 2 pi k1 l2 / n, or of k1 - 1/4 for real rows.

    `zero` is 0 in a way that the compiler cannot see: it would keep them all in registers from one
    use to the next.
    """
    k1 = (tl.arange(0, N1) + zero).to(tl.float32)
    if REAL:
        k1 -= 0.25
    l2 = tl.arange(0, N2)[None, :].to(tl.float32)
    return cosine_and_sine(k1[:, None], l2, N1 * N2, FAST)


@triton.jit
def keep_turns(
    zero, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr, FAST: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Turns as words for the whole life of a program, if there are registers for it."""
    if KEEP:
        cos, sin = make_turns(zero, N1, N2, REAL, FAST)
        return pack(cos, sin)
    else:
        return 0


@triton.jit
def turns(
    kept, zero, N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr, FAST: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Turns from what is kept, else made where they are used, which is cheaper than loading."""
    if KEEP:
        return unpack(kept ^ zero)
    else:
        return make_turns(zero, N1, N2, REAL, FAST)


@triton.jit
def to_spectrum(
    x, factors, kept, zero,
    N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr, FAST: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform a tile of a row, (part, l1) by l2; both parts of the spectrum, float32."""
    WHOLE: tl.constexpr = x.dtype == factors[0].dtype
    if len(factors) == 8:
        F_re, F_re_low, F_im, F_im_low, W_re, W_re_low, W_im, W_im_low = factors
        if REAL:
            x, x_low = operand(x, F_re, PRECISION)
            re = product(F_re, F_re_low, x, x_low, PRECISION, WHOLE)
            im = product(F_im, F_im_low, x, x_low, PRECISION, WHOLE)
        else:
            x_re, x_im = split_stacked(x, N1, N2)
            x_re, x_re_low = operand(x_re, F_re, PRECISION)
            x_im, x_im_low = operand(x_im, F_re, PRECISION)
            re = product(F_re, F_re_low, x_re, x_re_low, PRECISION)
            re -= product(F_im, F_im_low, x_im, x_im_low, PRECISION)
            im = sum_of_products(F_im, F_im_low, x_re, x_re_low, F_re, F_re_low, x_im, x_im_low)
        cos, sin = turns(kept, zero, N1, N2, REAL, FAST, KEEP)
        re, im = re * cos + im * sin, im * cos - re * sin
        re, re_low = operand(re, W_re, PRECISION)
        im, im_low = operand(im, W_re, PRECISION)
        return (
            sum_of_products(re, re_low, W_re, W_re_low, -im, -im_low, W_im, W_im_low),
            sum_of_products(re, re_low, W_im, W_im_low, im, im_low, W_re, W_re_low),
        )
    else:
        F, F_low, W, W_low = factors
        x, x_low = operand(x, F, PRECISION)
        re, im = split_stacked(product(F, F_low, x, x_low, PRECISION, WHOLE), N1, N2)
        cos, sin = turns(kept, zero, N1, N2, REAL, FAST, KEEP)
        turned = join_columns(re * cos + im * sin, im * cos - re * sin, N1, N2)
        turned, turned_low = operand(turned, W, PRECISION)
        return split_columns(product(turned, turned_low, W, W_low, PRECISION), N1, N2)


@triton.jit
def from_spectrum(
    re, im, factors, kept, zero,
    N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr, FAST: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of `to_spectrum`, float32."""
    if len(factors) == 8:
        F_re, F_re_low, F_im, F_im_low, W_re, W_re_low, W_im, W_im_low = factors
        re, re_low = operand(re, W_re, PRECISION)
        im, im_low = operand(im, W_re, PRECISION)
        # W is symmetric
        out_re = sum_of_products(re, re_low, W_re, W_re_low, im, im_low, W_im, W_im_low)
        out_im = sum_of_products(im, im_low, W_re, W_re_low, -re, -re_low, W_im, W_im_low)
        cos, sin = turns(kept, zero, N1, N2, REAL, FAST, KEEP)
        F_re, F_re_low = tl.trans(F_re), tl.trans(F_re_low)
        F_im, F_im_low = tl.trans(F_im), tl.trans(F_im_low)
        re, re_low = operand(out_re * cos - out_im * sin, F_re, PRECISION)
        row = product(F_re, F_re_low, re, re_low, PRECISION)
        im, im_low = operand(out_re * sin + out_im * cos, F_re, PRECISION)
        row += product(F_im, F_im_low, im, im_low, PRECISION)
        if REAL:
            return row
        else:
            other = product(F_re, F_re_low, im, im_low, PRECISION)
            other -= product(F_im, F_im_low, re, re_low, PRECISION)
            return join_stacked(row, other, N1, N2)
    else:
        F, F_low, W, W_low = factors
        columns, columns_low = operand(join_columns(re, im, N1, N2), W, PRECISION)
        out = product(columns, columns_low, tl.trans(W), tl.trans(W_low), PRECISION)
        re, im = split_columns(out, N1, N2)
        cos, sin = turns(kept, zero, N1, N2, REAL, FAST, KEEP)
        turned = join_stacked(re * cos - im * sin, re * sin + im * cos, N1, N2)
        turned, turned_low = operand(turned, F, PRECISION)
        return product(tl.trans(F), tl.trans(F_low), turned, turned_low, PRECISION)


@triton.jit
def load_spectrum(pointer, channel, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr):
    """A filter's spectrum as words of two float16 of "half", else as two tiles of float32."""
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    if PRECISION == "half":
        return tl.load(pointer + channel.to(tl.int64) * (N1 * N2) + points), 0
    else:
        base = pointer + channel.to(tl.int64) * (2 * N1 * N2) + points
        return tl.load(base), tl.load(base + N1 * N2)


@triton.jit
def as_parts(first, second, zero, PRECISION: tl.constexpr):
    """Both parts of what `load_spectrum` gave; `zero` as in `turns`, keeps words packed."""
    if PRECISION == "half":
        return unpack(first ^ zero)
    else:
        return first, second


@triton.jit
def keep_parts(re, im, PRECISION: tl.constexpr):
    """Both parts for `as_parts`, in as few registers as their precision allows."""
    if PRECISION == "half":
        return pack(re, im), 0
    else:
        return re, im


@triton.jit
def exponent_of(x):
    """Biased exponent of the largest magnitude in a tile."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    return (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF


@triton.jit
def power_of_two(exponent):
    """2 to a biased exponent; 0 for exponent 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_unit(exponent):
    """The power of two that brings a number of that biased exponent into [1, 2); 0 for zero."""
    return tl.where(exponent > 0, power_of_two(tl.maximum(254 - exponent, 1)), 0.0)


@triton.jit
def load_factors(
    F_table, W_table, N1: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """F and W, see above, each followed by the second halves of pairs; else by itself.

    APART: their real and imaginary parts, each of pairs.
    """
    if APART:
        k1, l2 = tl.arange(0, N1), tl.arange(0, N2)
        of_F = F_table + k1[:, None] * K + k1[None, :]
        of_W = W_table + l2[:, None] * N2 + l2[None, :]
        return (
            tl.load(of_F), tl.load(of_F + 2 * N1 * K),
            tl.load(of_F + N1 * K), tl.load(of_F + 3 * N1 * K),
            tl.load(of_W), tl.load(of_W + 2 * N2 * N2),
            tl.load(of_W + N2 * N2), tl.load(of_W + 3 * N2 * N2),
        )  # fmt: skip
    else:
        part_k1, row, column = tl.arange(0, 2 * N1), tl.arange(0, K), tl.arange(0, 2 * N2)
        of_F = F_table + part_k1[:, None] * K + row[None, :]
        of_W = W_table + column[:, None] * (2 * N2) + column[None, :]
        F, W = tl.load(of_F), tl.load(of_W)
        if PRECISION == "pairs":
            return F, tl.load(of_F + 2 * N1 * K), W, tl.load(of_W + 4 * N2 * N2)
        else:
            return F, F, W, W


@triton.jit(do_not_specialize=["B", "rows_per_program"])
def forward_kernel(
    u, pre, post, y, other, by, spectrum, unscale, F_table, W_table,
    u_row, u_channel, pre_row, pre_channel, post_row, post_channel, y_row, y_channel,
    by_row, by_channel, B, channels, L, rows_per_program, CONJUGATE: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, APART: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Convolve one channel of some rows: y = post out, and other = by out if wanted.

    CONJUGATE: with the reversed filter, as gradients are. `other` has the strides of y.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0) % channels
    first_row = tl.program_id(0) // channels * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, B)

    if PRECISION == "half":
        first, second = load_spectrum(spectrum, channel, N1, N2, PRECISION)
    factors = load_factors(F_table, W_table, N1, N2, K, PRECISION, APART)
    kept = keep_turns(first_row >> 31, N1, N2, REAL, FAST, KEEP)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    inside = position < L
    u += channel.to(tl.int64) * u_channel
    y += channel.to(tl.int64) * y_channel
    if pre is not None:
        pre += channel.to(tl.int64) * pre_channel
    if post is not None:
        post += channel.to(tl.int64) * post_channel
    if other is not None:
        other += channel.to(tl.int64) * y_channel
        by += channel.to(tl.int64) * by_channel
    shrink = tl.load(unscale + channel)

    held = load_first(u, u_row, first_row, position, inside, EVEN, AHEAD)
    for step in tl.range(0, last_row - first_row, num_stages=1):
        b = first_row + step
        row = b.to(tl.int64)
        x, held = load_next(held, u, u_row, row, last_row, position, inside, EVEN, AHEAD)
        if pre is not None:
            gate = load_rows(pre + row * pre_row, position, inside, EVEN)
            x = x.to(tl.float32) * gate.to(tl.float32)
        scale = shrink
        if SCALED:
            x = x.to(tl.float32)
            exponent = exponent_of(x)
            x = x * to_unit(exponent)
            scale *= power_of_two(exponent)
        re, im = to_spectrum(
            as_loaded(x, u, pre, factors[0]), factors, kept, b >> 31, N1, N2,
            REAL, FAST, KEEP, PRECISION,
        )  # fmt: skip
        if PRECISION != "half":  # no registers are left to keep it in
            first, second = load_spectrum(spectrum, channel + (b >> 31), N1, N2, PRECISION)
        h_re, h_im = as_parts(first, second, b >> 31, PRECISION)
        if CONJUGATE:
            h_im = -h_im
        out = from_spectrum(
            re * h_re - im * h_im, re * h_im + im * h_re,
            factors, kept, (b + 2) >> 31, N1, N2, REAL, FAST, KEEP, PRECISION,
        )  # fmt: skip
        out = out * scale
        if other is not None:
            factor = load_rows(by + row * by_row, position, inside, EVEN)
            product = (out * factor.to(tl.float32)).to(y.dtype.element_ty)
            store_rows(other + row * y_row, position, product, inside, EVEN)
        if post is not None:
            gate = load_rows(post + row * post_row, position, inside, EVEN)
            out = out * gate.to(tl.float32)
        store_rows(y + row * y_row, position, out.to(y.dtype.element_ty), inside, EVEN)


@triton.jit(do_not_specialize=["B", "rows_per_program"])
def backward_kernel(
    dy, u, pre, post, du, dpre, dspectrum, dplanes, dexponents,
    spectrum, unscale, dy_exponents, u_exponents, F_table, W_table,
    dy_row, dy_channel, u_row, u_channel, pre_row, pre_channel, post_row, post_channel,
    grad_row, grad_channel, B, channels, L, rows_per_program,
    DATA: tl.constexpr, OUTER: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, REAL: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, APART: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradient of the filter from one channel of some rows, a partial sum; DATA: others, too.

        G = spectrum of post dy;   dx = inverse of conj(H) G;   du = pre dx;   dpre = u dx
        dH = sum over rows of conj(Z) G, whose time domain has the filter's gradient as real part

    With the first line, which alone is a forward pass, a transform is saved; apart, registers. The
    gradient of `post` is a forward pass with dy in its place. Complex rows, OUTER of them from one
    row, were scaled before: by `dy_exponents` and `u_exponents`. Of them, dH is transformed back
    and leaves as planes, scaled by `dexponents`.
    """
    K: tl.constexpr = N1 if REAL else 2 * N1
    channel = tl.program_id(0) % channels
    group = tl.program_id(0) // channels
    first_row = group * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, B)

    factors = load_factors(F_table, W_table, N1, N2, K, PRECISION, APART)
    kept = keep_turns(first_row >> 31, N1, N2, REAL, FAST, KEEP)
    position = tl.arange(0, K)[:, None] * N2 + tl.arange(0, N2)[None, :]
    inside = position < L
    u += channel.to(tl.int64) * u_channel
    dy += channel.to(tl.int64) * dy_channel
    if DATA:
        du += channel.to(tl.int64) * grad_channel
    if pre is not None:
        pre += channel.to(tl.int64) * pre_channel
        if DATA:
            dpre += channel.to(tl.int64) * grad_channel
    if post is not None:
        post += channel.to(tl.int64) * post_channel
    shrink = tl.load(unscale + channel)
    sum_re = tl.zeros((N1, N2), tl.float32)
    sum_im = tl.zeros((N1, N2), tl.float32)

    held_g = load_first(dy, dy_row, first_row, position, inside, EVEN, AHEAD)
    held_x = load_first(u, u_row, first_row, position, inside, EVEN, AHEAD)
    for step in tl.range(0, last_row - first_row, num_stages=1):
        b = first_row + step
        row = b.to(tl.int64)
        to = row * grad_row
        g, held_g = load_next(held_g, dy, dy_row, row, last_row, position, inside, EVEN, AHEAD)
        if post is not None:
            gate = load_rows(post + row * post_row, position, inside, EVEN)
            g = g.to(tl.float32) * gate.to(tl.float32)
        if SCALED:
            g = g.to(tl.float32)
            g_exponent = exponent_of(g)
            g = g * to_unit(g_exponent)
        g_re, g_im = to_spectrum(
            as_loaded(g, dy, post, factors[0]), factors, kept, b >> 31, N1, N2,
            REAL, FAST, KEEP, PRECISION,
        )  # fmt: skip
        g_first, g_second = keep_parts(g_re, g_im, PRECISION)
        x, held_x = load_next(held_x, u, u_row, row, last_row, position, inside, EVEN, AHEAD)
        if DATA:
            # words are made into numbers anew at each use: two float32 each would not fit
            first, second = load_spectrum(spectrum, channel + (b >> 31), N1, N2, PRECISION)
            h_re, h_im = as_parts(first, second, b >> 31, PRECISION)
            g_re, g_im = as_parts(g_first, g_second, b >> 31, PRECISION)
            dx = from_spectrum(
                g_re * h_re + g_im * h_im, g_im * h_re - g_re * h_im,
                factors, kept, (b + 1) >> 31, N1, N2, REAL, FAST, KEEP, PRECISION,
            )  # fmt: skip
            scale = shrink
            if SCALED:
                scale *= power_of_two(g_exponent)
            dx = dx * scale
            if pre is not None:
                store_rows(dpre + to, position, (dx * x).to(du.dtype.element_ty), inside, EVEN)
                gate = load_rows(pre + row * pre_row, position, inside, EVEN)
                dx = dx * gate.to(tl.float32)
            store_rows(du + to, position, dx.to(du.dtype.element_ty), inside, EVEN)
        if pre is not None:
            gate = load_rows(pre + row * pre_row, position, inside, EVEN)
            x = x.to(tl.float32) * gate.to(tl.float32)
        if SCALED:
            x = x.to(tl.float32)
            x_exponent = exponent_of(x)
            x = x * to_unit(x_exponent)
        z_re, z_im = to_spectrum(
            as_loaded(x, u, pre, factors[0]), factors, kept, (b + 2) >> 31, N1, N2,
            REAL, FAST, KEEP, PRECISION,
        )  # fmt: skip
        g_re, g_im = as_parts(g_first, g_second, (b + 1) >> 31, PRECISION)
        if dy_exponents is not None:
            whose = row * (channels // OUTER) + channel // OUTER
            g_exponent = tl.load(dy_exponents + whose)
            x_exponent = tl.load(u_exponents + whose)
        if SCALED or dy_exponents is not None:
            # one after the other: the product of both powers may leave float32
            g_re, g_im = g_re * power_of_two(g_exponent), g_im * power_of_two(g_exponent)
            g_re, g_im = g_re * power_of_two(x_exponent), g_im * power_of_two(x_exponent)
        sum_re += z_re * g_re + z_im * g_im
        sum_im += z_re * g_im - z_im * g_re

    at = group.to(tl.int64) * channels + channel
    points = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    if REAL:
        dspectrum += at * (2 * N1 * N2)
        tl.store(dspectrum + points, sum_re)
        tl.store(dspectrum + N1 * N2 + points, sum_im)
    else:
        exponent = exponent_of(tl.maximum(tl.abs(sum_re), tl.abs(sum_im)))
        scale = to_unit(exponent)
        # once, but in a loop: else W's memory is given to an operand of the second product, and
        # ptxas of CUDA 12.8 makes that one's address of a register that holds another (N2 = 32)
        for _ in tl.range(0, tl.minimum(last_row - first_row, 1), num_stages=1):
            planes = from_spectrum(
                sum_re * scale, sum_im * scale,
                factors, kept, last_row >> 31, N1, N2, REAL, FAST, KEEP, PRECISION,
            )  # fmt: skip
            tl.store(dplanes + at * (2 * N1 * N2) + position, planes.to(dplanes.dtype.element_ty))
        tl.store(dexponents + at, exponent)
