"""State passing in plain PyTorch: matrix products within chunks, a short scan over them.

Time and memory grow linearly with the length. This is the path of every device that has no
kernel, and the baseline of those that have one. All arithmetic is real and in float32 (float64
for float64 inputs), whatever the autocast.

Shapes inside: channels lead and positions are cut into chunks, (D, rows, chunks, T), so that
every product is one batched product over channels. Behind the gate a head has head_dim^2
products of channels, (H, pairs, rows, chunks, T). States are two real tensors, (re, im).

Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2 and Proposition 2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from h3lm.flashconv.chunks import Cut, DenseCut, PackedCut
from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm.operators import ChunkOperators
from h3lm.ssm.state_blocks import per_head

_SCAN_GROUP = 16
Pair = tuple[Tensor, Tensor]


def h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, H3State]:
    """`flashconv.h3_core`, left to right; the final state is always made."""
    with _full_precision(q):
        cut = _cut(k, operators, cu_seqlens)
        w = _gated_input(k, v, operators, cut, head_dim, initial_state)
        start = _to_pair(initial_state.diagonal, operators, cut) if initial_state else None
        y, end = _diagonal(w, operators, cut, start)
        gate = _to_heads(cut.split(q.to(y.dtype)), head_dim)[:, :, None]
        o = (gate * y.unflatten(1, (head_dim, head_dim))).sum(1).flatten(0, 1)
        shift = cut.last_inputs(k, operators.n_taps - 1, initial_state and initial_state.shift)
        return cut.merge(o).to(q.dtype), H3State(shift, _from_pair(end, head_dim))


def h3_end_state(
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    cu_seqlens: Tensor | None = None,
) -> H3State:
    """`flashconv.h3_end_state`: the state that `h3_core` leaves, without its outputs."""
    with _full_precision(k):
        cut = _cut(k, operators, cu_seqlens)
        w = _gated_input(k, v, operators, cut, head_dim, initial_state)
        start = _to_pair(initial_state.diagonal, operators, cut) if initial_state else None
        into = per_head(w, operators.K)
        before = _scan_chunks(into.chunk(2, -1), operators, cut, start)
        end = _final_state(w, before, operators, cut)
        shift = cut.last_inputs(k, operators.n_taps - 1, initial_state and initial_state.shift)
        return H3State(shift, _from_pair(end, head_dim))


def ssm_conv(
    u: Tensor,
    operators: ChunkOperators,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashconv.ssm_conv`, left to right; the final state is always made."""
    with _full_precision(u):
        cut = _cut(u, operators, cu_seqlens)
        w = cut.split(u.to(operators.M.dtype))
        if pre_gate is not None:
            w = w * cut.split(pre_gate.to(w.dtype))
        start = None if initial_state is None else _to_pair(initial_state, operators, cut)
        y, end = _diagonal(w[:, None], operators, cut, start)
        y = y[:, 0]
        if post_gate is not None:
            y = y * cut.split(post_gate.to(y.dtype))
        return cut.merge(y).to(u.dtype), _from_pair(end, 1)


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _cut(like: Tensor, operators: ChunkOperators, cu_seqlens: Tensor | None) -> Cut:
    if cu_seqlens is None:
        return DenseCut(like.shape[0], like.shape[2], operators.chunk_length)
    return PackedCut(cu_seqlens, operators.chunk_length)


def _to_heads(x: Tensor, head_dim: int) -> Tensor:
    """(D, rows, ...) -> (H, head_dim, rows, ...): the head is the slow index of a channel."""
    return x.unflatten(0, (-1, head_dim))


def _gated_input(
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    cut: Cut,
    head_dim: int,
    initial_state: H3State | None,
) -> Tensor:
    """W = (taps * k) v for every pair of channels of a head, (H, pairs, rows, chunks, T)."""
    s = _short_filter(k, operators, cut, initial_state and initial_state.shift)
    value = cut.split(v.to(s.dtype))
    w = _to_heads(s, head_dim)[:, :, None] * _to_heads(value, head_dim)[:, None]
    return w.flatten(1, 2)


def _short_filter(k: Tensor, operators: ChunkOperators, cut: Cut, history: Tensor | None) -> Tensor:
    """s_c = sum_m F_m k_{c-m}, the chunks before the first one taken from the history."""
    assert operators.F is not None
    reach = operators.F.shape[1] - 1
    toeplitz = operators.F.flatten(1, 2).mT  # [D, T, (reach + 1) T]: one product for all m

    def respond(chunks: Tensor) -> Tensor:
        product = chunks.flatten(1, 2) @ toeplitz
        return product.unflatten(1, chunks.shape[1:3]).unflatten(-1, (reach + 1, -1))

    parts = respond(cut.split(k.to(toeplitz.dtype)))  # [D, rows, chunks, m, T]
    if history is None:
        past = parts.new_zeros(1).expand(parts.shape[0], cut.sequences, reach, *parts.shape[3:])
    else:
        T = operators.chunk_length
        early = F.pad(history.to(toeplitz.dtype), (reach * T - history.shape[-1], 0))
        past = respond(early.transpose(0, 1).unflatten(-1, (reach, T)))
    s = parts[..., 0, :]
    for m in range(1, reach + 1):
        s = s + cut.delay(parts[..., m, :], past[:, :, reach - m :, m], m)
    return s


def _diagonal(
    w: Tensor, operators: ChunkOperators, cut: Cut, start: Pair | None
) -> tuple[Tensor, Pair]:
    """y_c = M w_c + P x_c for (H, pairs, rows, chunks, T), and the final state."""
    N = operators.K.shape[1]
    product = per_head(w, torch.cat([operators.K, operators.M], 1))
    into, local = product[..., :N], product[..., N:]
    before = _scan_chunks(into.chunk(2, -1), operators, cut, start)
    y = local + per_head(torch.cat(before, -1), operators.P)
    return y, _final_state(w, before, operators, cut)


def _scan_chunks(
    into: tuple[Tensor, ...], operators: ChunkOperators, cut: Cut, start: Pair | None
) -> Pair:
    """State before each chunk, from what each chunk adds: (H, pairs, rows, chunks, N/2)."""
    re, im = into
    if start is None:
        start = (torch.zeros_like(re[..., 0, :]), torch.zeros_like(im[..., 0, :]))
        if isinstance(cut, PackedCut):
            start = tuple(x.expand(-1, -1, cut.sequences, -1) for x in start)  # type: ignore[assignment]
    first, (re, im), keep = cut.seed(start, (re, im))
    return _scan((re, im), first, keep, operators, 1)


def _scan(
    e: Pair, first: Pair, keep: Tensor | None, operators: ChunkOperators, stride: int
) -> Pair:
    """x_0 = first;  x_{c+1} = keep_c decay^stride x_c + e_c.  Returns x_0 .. x_{last}.

    Groups of 16 are scanned side by side from zero, then their totals by the same function,
    then each group receives what came before it.
    """
    count = e[0].shape[-2]
    if count <= _SCAN_GROUP:
        return _scan_serial(e, first, keep, _decay(operators, stride))
    groups = -(-count // _SCAN_GROUP)
    fill = groups * _SCAN_GROUP - count
    grouped = tuple(F.pad(x, (0, 0, 0, fill)).unflatten(-2, (groups, _SCAN_GROUP)) for x in e)
    kept = None if keep is None else F.pad(keep, (0, fill), value=1.0).view(groups, _SCAN_GROUP)
    zero = torch.zeros_like(grouped[0][..., 0, :])
    one_more = tuple(F.pad(x, (0, 0, 0, 1)) for x in grouped)
    kept_more = None if kept is None else F.pad(kept, (0, 1))
    re, im = _scan_serial(
        (one_more[0], one_more[1]), (zero, zero), kept_more, _decay(operators, stride)
    )
    through = None if kept is None else kept.prod(-1)
    totals = (re[..., -1, :], im[..., -1, :])
    start_re, start_im = _scan(totals, first, through, operators, stride * _SCAN_GROUP)
    steps = torch.arange(_SCAN_GROUP, device=re.device) * stride
    table = operators.decay_powers(steps).mT[:, None, None, None]  # [H, 1, 1, 1, 16, N/2]
    if kept is not None:
        reaches = F.pad(kept[:, :-1], (1, 0), value=1.0).cumprod(-1)[..., None]
        table = table * reaches
    t_re, t_im = table.real, table.imag
    start_re, start_im = start_re[..., None, :], start_im[..., None, :]
    re = re[..., :-1, :] + t_re * start_re - t_im * start_im
    im = im[..., :-1, :] + t_re * start_im + t_im * start_re
    return re.flatten(-3, -2)[..., :count, :], im.flatten(-3, -2)[..., :count, :]


def _scan_serial(e: Pair, first: Pair, keep: Tensor | None, decay: Pair) -> Pair:
    re, im = first
    shape = (decay[0].shape[0], *([1] * (re.dim() - 2)), decay[0].shape[1])
    d_re, d_im = decay[0].view(shape), decay[1].view(shape)
    all_re, all_im = [re], [im]
    for c in range(e[0].shape[-2] - 1):
        r, i = (d_re, d_im) if keep is None else (_kept(d_re, keep, c), _kept(d_im, keep, c))
        re, im = (
            r * re - i * im + e[0][..., c, :],
            r * im + i * re + e[1][..., c, :],
        )
        all_re.append(re)
        all_im.append(im)
    return torch.stack(all_re, -2), torch.stack(all_im, -2)


def _kept(decay: Tensor, keep: Tensor, chunk: int) -> Tensor:
    # keep is [chunks] in a serial scan and [groups, chunks] in a grouped one
    return decay * keep[..., chunk, None]


def _decay(operators: ChunkOperators, stride: int) -> Pair:
    if stride == 1:
        decay = operators.decay
    else:
        count = torch.full((1,), stride, device=operators.decay.device)
        decay = operators.decay_powers(count)[..., 0]
    return decay.real, decay.imag


def _final_state(w: Tensor, before: Pair, operators: ChunkOperators, cut: Cut) -> Pair:
    """State after the last input of each sequence.

    A short last chunk is carried over by its own number of steps: the state at the end of its
    padding has decayed too far, and dividing by a power of the decay would not bring it back.
    """
    lengths = cut.last_lengths(w.device)  # [sequences]
    T = operators.chunk_length
    last = cut.last(w)  # [H, pairs, sequences, T]
    source = torch.arange(T, device=w.device) - (T - lengths)[:, None]
    aligned = torch.where(
        source >= 0, last.gather(-1, source.clamp(min=0).expand_as(last)), last.new_zeros(())
    )
    into_re, into_im = per_head(aligned, operators.K).chunk(2, -1)
    left = operators.powers(lengths).movedim(-1, 1)[:, None]  # [H, 1, sequences, N/2]
    re, im = (cut.last(x) for x in before)
    return (
        left.real * re - left.imag * im + into_re,
        left.real * im + left.imag * re + into_im,
    )


def _to_pair(state: Tensor, operators: ChunkOperators, cut: Cut) -> Pair:
    """(sequences, H, [i, j,] N/2) complex -> (H, pairs, sequences, N/2) real and imaginary."""
    heads, modes = operators.K.shape[0], operators.num_modes
    flat = state.reshape(cut.sequences, heads, -1, modes).permute(1, 2, 0, 3)
    flat = flat.to(operators.decay.dtype)
    return flat.real, flat.imag


def _from_pair(state: Pair, head_dim: int) -> Tensor:
    both = torch.complex(*state).permute(2, 0, 1, 3)  # [sequences, H, pairs, N/2]
    sequences, heads, _, modes = both.shape
    return both.reshape(diagonal_shape(sequences, heads, head_dim, modes))
