"""The kernels as operators of PyTorch, and what stands around them.

`h3_core`, `h3_end_state` and `ssm_conv` have the signatures of `chunked`, and its meaning. Around
the kernels they make, in plain PyTorch, what is small: the part of the short filter that a state
brings into the first chunk, and the final state after a last chunk that is not full.
Packed sequences are rows of a walk for the kernels, which read on the device where each begins.

Complex tensors cross the border as real pairs. The states before tiles, which the backward pass
needs, are an output without a gradient. The kernels themselves are imported at their first use.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from h3lm.flashconv import chunked, dispatch
from h3lm.flashconv.chunks import last_inputs
from h3lm.flashconv.dispatch import CHUNK_LENGTH, is_aligned
from h3lm.flashconv.state import H3State, as_real_pairs, diagonal_shape
from h3lm.ssm.operators import ChunkOperators

if TYPE_CHECKING:
    from h3lm.flashconv.kernels.launch import Gradients

MIN_STATES = 16
PAIRS = 64  # of channels of heads, that a program walks with


def h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    *,
    backend: str,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    with_state: bool = True,
    cu_seqlens: Tensor | None = None,
    qkv: Tensor | None = None,
) -> tuple[Tensor, H3State | None]:
    """`flashconv.h3_core`, left to right, by the kernels of a backend.

    Of q, k and v that are the thirds of `qkv`, the gradient is made as one tensor.
    """
    q, k, v = (_positions_last(x) for x in (q, k, v))
    o, end = _run(
        q, k, v, operators, initial_state, backend,
        with_output=True, with_end=with_state, cu_seqlens=cu_seqlens, qkv=qkv,
    )  # fmt: skip
    if not with_state:
        return o, None
    return o, _final_h3_state(k, v, operators, initial_state, end, head_dim, cu_seqlens)


def h3_end_state(
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    *,
    backend: str,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    cu_seqlens: Tensor | None = None,
) -> H3State:
    """`flashconv.h3_end_state`, by the kernels of a backend."""
    k, v = _positions_last(k), _positions_last(v)
    _, end = _run(
        None, k, v, operators, initial_state, backend, with_output=False,
        with_end=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return _final_h3_state(k, v, operators, initial_state, end, head_dim, cu_seqlens)


def ssm_conv(
    u: Tensor,
    operators: ChunkOperators,
    *,
    backend: str,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    with_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`flashconv.ssm_conv`, left to right, by the kernels of a backend."""
    u = _positions_last(u)
    pre, post = (None if x is None else _positions_last(x) for x in (pre_gate, post_gate))
    state = None if initial_state is None else H3State(u[..., :0], initial_state)
    y, end = _run(
        post, u, pre, operators, state, backend,
        with_output=True, with_end=with_state, filtered=False, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if not with_state:
        return y, None
    if cu_seqlens is not None:
        w = last_inputs(u, cu_seqlens.long(), CHUNK_LENGTH, None).to(end.dtype)
        if pre is not None:
            w = w * last_inputs(pre, cu_seqlens.long(), CHUNK_LENGTH, None)
        diagonal = torch.view_as_complex(end)[:, :, None]
        return y, _behind_last_chunks(w[:, :, None], diagonal, operators, cu_seqlens)[:, :, 0]
    full = u.shape[-1] // CHUNK_LENGTH * CHUNK_LENGTH
    diagonal = torch.view_as_complex(end)
    if full < u.shape[-1]:
        tail = u[..., full:]
        gate = None if pre is None else pre[..., full:]
        _, diagonal = chunked.ssm_conv(tail, operators, pre_gate=gate, initial_state=diagonal)
    return y, diagonal


def _run(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    operators: ChunkOperators,
    state: H3State | None,
    backend: str,
    *,
    with_output: bool,
    with_end: bool,
    filtered: bool = True,
    cu_seqlens: Tensor | None = None,
    qkv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(k.device.type, enabled=False):
        filters = _filter_blocks(operators) if filtered else None
        carry = None
        if state is not None and filters is not None and state.shift.shape[-1] > 0:
            carry = _filter_carry(state.shift, filters)
        start = None
        if state is not None:
            start = as_real_pairs(state.diagonal.to(torch.complex64)).contiguous()
            start = start.flatten(1, -3)
        matrices = _kernel_matrices(operators, start, k.dtype)
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        others = (filters, *matrices[:4], carry, matrices[4], bounds)
        inputs = (q, k, v, *others)
        needs = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        if qkv is not None and qkv.stride(-1) == 1:
            run = torch.ops.h3lm.h3_core_qkv_fwd
            o, end, _ = run(qkv, *others, with_end, needs, backend)
        else:
            run = torch.ops.h3lm.h3_core_fwd
            o, end, _ = run(*inputs, with_output, with_end, needs, backend)
        return o, end[:, :, : operators.num_modes] if with_end else end


def kernel_operators(operators: ChunkOperators) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """F, M, K, P and decay as `h3_core_fwd` takes them for half inputs."""
    M, K, P, decay, _ = _kernel_matrices(operators, None, torch.bfloat16)
    return _filter_blocks(operators), M, K, P, decay


def _positions_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _filter_blocks(operators: ChunkOperators) -> Tensor:
    """The short filter's operator in 2 blocks for up to 64 taps, else in 3."""
    assert operators.F is not None
    blocks = 2 if operators.n_taps <= CHUNK_LENGTH else 3
    missing = blocks - operators.F.shape[1]
    filters = F.pad(operators.F, (0, 0, 0, 0, 0, missing)) if missing else operators.F
    return filters.contiguous()


def _filter_carry(history: Tensor, filters: Tensor) -> Tensor:
    """What the inputs before position 0 add to s in the first chunks, (B, D, reach T)."""
    reach, T = filters.shape[1] - 1, filters.shape[2]
    early = F.pad(history.to(filters.dtype), (reach * T - history.shape[-1], 0))
    chunks = early.transpose(0, 1).unflatten(-1, (reach, T))  # [D, B, reach, T]
    carry = [
        sum(chunks[:, :, reach + c - m] @ filters[:, m].mT for m in range(c + 1, reach + 1))
        for c in range(reach)
    ]
    return torch.cat(carry, -1).transpose(0, 1).contiguous()


def _kernel_matrices(
    operators: ChunkOperators, start: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """M, K, P, decay and the start state, with modes filled up to a power of two.

    For float32 inputs the decay is float64: rounded, it would be wrong by as much in every chunk.
    """
    modes = operators.num_modes
    M, K, P = (x.contiguous() for x in (operators.M, operators.K, operators.P))
    if dtype == torch.float32:
        chunk = torch.full((1,), operators.chunk_length, device=M.device)
        decay = as_real_pairs(operators.system.powers(chunk)[..., 0]).contiguous()
    else:
        decay = as_real_pairs(operators.decay.to(torch.complex64)).contiguous()
    target = max(MIN_STATES, 1 << (2 * modes - 1).bit_length()) // 2
    if missing := target - modes:
        K = F.pad(K.unflatten(1, (2, modes)), (0, 0, 0, missing)).flatten(1, 2)
        P = F.pad(P.unflatten(2, (2, modes)), (0, missing)).flatten(2, 3)
        decay = F.pad(decay, (0, 0, 0, missing))
        start = None if start is None else F.pad(start, (0, 0, 0, missing))
    return M, K, P, decay, start


def _final_h3_state(
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    initial: H3State | None,
    end: Tensor,
    head_dim: int,
    cu_seqlens: Tensor | None,
) -> H3State:
    """Carry the state after the last full chunk over the positions behind it."""
    if cu_seqlens is not None:
        return _final_packed_state(k, v, operators, initial, end, head_dim, cu_seqlens.long())
    full = k.shape[-1] // CHUNK_LENGTH * CHUNK_LENGTH
    count = operators.n_taps - 1
    if initial is None:
        window = F.pad(k[..., max(0, full - count) : full], (max(0, count - full), 0))
    elif full >= count:
        window = k[..., full - count : full]
    else:
        window = torch.cat([initial.shift.to(k.dtype), k[..., :full]], -1)[..., full:]
    heads, modes = k.shape[1] // head_dim, operators.num_modes
    diagonal = torch.view_as_complex(end.contiguous())
    shape = diagonal_shape(k.shape[0], heads, head_dim, modes)
    state = H3State(window, diagonal.reshape(shape))
    if full == k.shape[-1]:
        return state
    return chunked.h3_end_state(
        k[..., full:], v[..., full:], operators, head_dim=head_dim, initial_state=state
    )


def _final_packed_state(
    k: Tensor,
    v: Tensor,
    operators: ChunkOperators,
    initial: H3State | None,
    end: Tensor,
    head_dim: int,
    bounds: Tensor,
) -> H3State:
    """`_final_h3_state` for packed sequences, whatever their lengths."""
    T, count = CHUNK_LENGTH, operators.n_taps - 1
    filters = _filter_blocks(operators)
    blocks, shift = filters.shape[1], None if initial is None else initial.shift
    window = last_inputs(k, bounds, blocks * T, shift)  # [S, D, blocks T], the last at the end
    chunks = window.to(filters.dtype).transpose(0, 1).unflatten(-1, (blocks, T))
    s = sum(chunks[:, :, blocks - 1 - m] @ filters[:, m].mT for m in range(blocks))  # [D, S, T]
    s = s.transpose(0, 1).unflatten(1, (-1, head_dim))
    value = last_inputs(v, bounds, T, None).to(s.dtype).unflatten(1, (-1, head_dim))
    w = (s[:, :, :, None] * value[:, :, None]).flatten(2, 3)  # [S, H, pairs, T]
    diagonal = torch.view_as_complex(end.contiguous()).unflatten(1, w.shape[1:3])
    diagonal = _behind_last_chunks(w, diagonal, operators, bounds)
    shape = diagonal_shape(len(w), w.shape[1], head_dim, operators.num_modes)
    return H3State(last_inputs(k, bounds, count, shift), diagonal.reshape(shape))


def _behind_last_chunks(
    w: Tensor, diagonal: Tensor, operators: ChunkOperators, bounds: Tensor
) -> Tensor:
    """States after the last full chunk of each sequence, carried over the positions behind it.

    Args:
        w: The last T inputs of each sequence, (S, H, pairs, T); those of full chunks do not count.
        diagonal: (S, H, pairs, N/2).
    """
    T = w.shape[-1]
    rest = bounds.diff() % T
    counts = torch.arange(T, device=w.device) >= T - rest[:, None]
    w = torch.where(counts[:, None, None], w, 0.0)
    into = (w.transpose(0, 1).flatten(1, 2) @ operators.K.to(w.dtype).mT).unflatten(1, (len(w), -1))
    re, im = into.transpose(0, 1).chunk(2, -1)
    decay = operators.powers(rest).permute(2, 0, 1)[:, :, None]  # [S, H, 1, N/2]
    return decay * diagonal + torch.complex(re, im)


def _kernels(backend: str, M: Tensor, *tensors: Tensor | None) -> ModuleType:
    """The kernels that run: Triton's wherever Hopper's fail their test or cannot copy a tensor.

    Both save the same states, so that each takes over from the other.
    """
    from h3lm.flashconv.kernels import chunk_triton, heads_triton

    given = [x for x in tensors if x is not None]
    heads = len(M) != given[0].shape[1]
    triton = heads_triton if heads else chunk_triton
    if backend == "gluon" and all(is_aligned(x) for x in given):
        from h3lm.flashconv.kernels.self_test import hopper_kernels

        return hopper_kernels(given[0].device, heads) or triton
    return triton


def _segments(k: Tensor, M: Tensor, bounds: Tensor | None) -> int:
    """Segments that a row is cut into, the same in both directions."""
    from h3lm.flashconv.kernels.launch import multiprocessors
    from h3lm.flashconv.kernels.self_test import segments_work

    B, D, L = k.shape
    if bounds is not None:
        return 1
    programs = B * D if len(M) == D else -(-B * D * (D // len(M)) // PAIRS)
    cut = dispatch.segments(programs, L, multiprocessors(k.device))
    return cut if cut == 1 or segments_work(k.device) else 1


@torch.library.custom_op("h3lm::h3_core_fwd", mutates_args=())
def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    with_output: bool,
    with_end: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(
        q, k, v, filters, M, K, P, decay, carry, start, bounds,
        with_output, with_end, save_states, backend,
    )  # fmt: skip


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    with_output: bool,
    with_end: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from h3lm.flashconv.kernels import segments as in_segments
    from h3lm.flashconv.kernels.launch import Operators

    operators = Operators(filters, M, K, P, decay)
    kernels, cut = _kernels(backend, M, q, k, v), _segments(k, M, bounds)
    wanted = {"with_output": with_output, "with_end": with_end, "save_states": save_states}
    if cut > 1:
        return in_segments.forward(
            kernels, q, k, v, operators, carry, start, segments=cut, **wanted
        )
    if bounds is not None:
        return kernels.forward(q, k, v, operators, carry, start, bounds=bounds, **wanted)
    return kernels.forward(q, k, v, operators, carry, start, **wanted)


@_forward.register_fake
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    with_output: bool,
    with_end: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(k, M, decay, bounds, with_output, with_end, save_states)


def _fake_forward(
    k: Tensor,
    M: Tensor,
    decay: Tensor,
    bounds: Tensor | None,
    with_output: bool,
    with_end: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from h3lm.flashconv.kernels.launch import empty_rows, rows_of_walk, saved_states_shape

    D = k.shape[1]
    H, modes, _ = decay.shape
    o = k.new_empty(0)
    if with_output:
        o = empty_rows(k) if H == D else k.new_empty(k.shape)
    rows = rows_of_walk(k, 1, bounds)
    end = k.new_empty((rows, D * (D // H), modes, 2) if with_end else (0,), dtype=torch.float32)
    cut = _segments(k, M, bounds)
    shape = saved_states_shape(k, H, modes, cut, bounds) if save_states else (0,)
    return o, end, k.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("h3lm::h3_core_bwd", mutates_args=())
def _backward(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    grads = _gradients(
        do, dend, q, k, v, filters, M, K, P, decay, carry, start, bounds, states, backend
    )
    return [x for x in grads.in_order() if x is not None]


def _gradients(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    states: Tensor,
    backend: str,
    **options: Any,
) -> "Gradients":
    from h3lm.flashconv.kernels import segments as in_segments
    from h3lm.flashconv.kernels.launch import Operators

    operators = Operators(filters, M, K, P, decay)
    do = _positions_last(do)
    if q is None:  # of an end state; Hopper's backward pass has outputs
        backend = "triton"
    kernels, cut = _kernels(backend, M, q, k, v, do), _segments(k, M, bounds)
    given = (do, dend, q, k, v, operators, carry, start, states)
    if cut > 1:
        return in_segments.backward(kernels, *given, segments=cut, **options)
    if bounds is not None:
        return kernels.backward(*given, bounds=bounds, **options)
    return kernels.backward(*given, **options)


@_backward.register_fake
def _(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    filters: Tensor | None,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    from h3lm.flashconv.kernels.launch import empty_rows

    alone = len(decay) == k.shape[1]
    data = [empty_rows(k) if alone else k.new_empty(k.shape) for x in (q, k, v) if x is not None]
    others = (filters, M, K, P, decay, carry, start)
    return data + [k.new_empty(x.shape, dtype=torch.float32) for x in others if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, with_end, _, ctx.backend = inputs
    states = output[2]
    ctx.mark_non_differentiable(*output[2 if with_end else 1 :])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states)


def _differentiate(
    ctx: Any, do: Tensor | None, dend: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    q, k, v, filters, M, K, P, decay, carry, start, bounds = tensors
    if do is None:
        do = torch.zeros_like(k)
    dend = None if dend is None or not dend.numel() else dend.contiguous()
    grads = iter(
        torch.ops.h3lm.h3_core_bwd(
            do,
            dend,
            q,
            k,
            v,
            filters,
            M,
            K,
            P,
            decay,
            carry,
            start,
            bounds,
            states,
            ctx.backend,
        )
    )
    given = [None if x is None else next(grads).to(x.dtype) for x in tensors[:-1]]
    return (*given, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("h3lm::h3_core_qkv_fwd", mutates_args=())
def _forward_qkv(
    qkv: Tensor,
    filters: Tensor,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    with_end: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`h3_core_fwd` of the thirds of a tensor, (B, 3 D, L)."""
    q, k, v = qkv.chunk(3, 1)
    return _launch(
        q, k, v, filters, M, K, P, decay, carry, start, bounds, True, with_end, save_states, backend
    )


@_forward_qkv.register_fake
def _(
    qkv: Tensor,
    filters: Tensor,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    with_end: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    k = qkv.chunk(3, 1)[1]
    return _fake_forward(k, M, decay, bounds, True, with_end, save_states)


@torch.library.custom_op("h3lm::h3_core_qkv_bwd", mutates_args=())
def _backward_qkv(
    do: Tensor,
    dend: Tensor | None,
    qkv: Tensor,
    filters: Tensor,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    from h3lm.flashconv.kernels.launch import empty_rows

    q, k, v = qkv.chunk(3, 1)
    whole = empty_rows(qkv)
    thirds = whole.chunk(3, 1)
    options = {"into": thirds} if len(M) == k.shape[1] else {}  # heads make tensors of their own
    grads = _gradients(
        do, dend, q, k, v, filters, M, K, P, decay, carry, start, bounds, states, backend, **options
    )
    made, others = grads.in_order()[:3], grads.in_order()[3:]
    for third, grad in zip(thirds, made, strict=True):
        if grad is not None and grad is not third:
            third.copy_(grad)
    return [whole, *(x for x in others if x is not None)]


@_backward_qkv.register_fake
def _(
    do: Tensor,
    dend: Tensor | None,
    qkv: Tensor,
    filters: Tensor,
    M: Tensor,
    K: Tensor,
    P: Tensor,
    decay: Tensor,
    carry: Tensor | None,
    start: Tensor | None,
    bounds: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    from h3lm.flashconv.kernels.launch import empty_rows

    others = (filters, M, K, P, decay, carry, start)
    made = [qkv.new_empty(x.shape, dtype=torch.float32) for x in others if x is not None]
    return [empty_rows(qkv), *made]


def _setup_context_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, with_end, save_states, backend = inputs
    _setup_context(ctx, (*tensors, True, with_end, save_states, backend), output)


def _differentiate_qkv(
    ctx: Any, do: Tensor | None, dend: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(tensors[0].chunk(3, 1)[1])
    dend = None if dend is None or not dend.numel() else dend.contiguous()
    grads = iter(torch.ops.h3lm.h3_core_qkv_bwd(do, dend, *tensors, states, ctx.backend))
    given = [None if x is None else next(grads).to(x.dtype) for x in tensors[:-1]]
    return (*given, None, None, None, None)


_forward_qkv.register_autograd(_differentiate_qkv, setup_context=_setup_context_qkv)


@torch.library.custom_op("h3lm::h3_step", mutates_args=("ring", "diagonal"))
def h3_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    ring: Tensor,
    position: Tensor,
    diagonal: Tensor,
    head_dim: int,
    early: bool,
) -> Tensor:
    """`flashconv.h3_step_in_place` by its kernel, which all GPUs share."""
    from h3lm.flashconv.kernels import step_triton
    from h3lm.flashconv.kernels.overlap import can_overlap

    early = early and can_overlap(q.device)
    return step_triton.step(
        q, k, v, taps, a, b, c, skip, ring, position, diagonal, head_dim=head_dim, early=early
    )


@h3_step.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("h3lm::h3_step_lagging", mutates_args=("ring", "diagonal", "recent"))
def h3_step_lagging(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    response: Tensor,
    ring: Tensor,
    position: Tensor,
    diagonal: Tensor,
    recent: Tensor,
    early: bool,
) -> Tensor:
    """`h3_step` for a state that lags behind; the response holds the skip."""
    from h3lm.flashconv.kernels import step_lagging
    from h3lm.flashconv.kernels.overlap import can_overlap

    early = early and can_overlap(q.device)
    return step_lagging.step(
        q, k, v, taps, a, b, c, response, ring, position, diagonal, recent, early=early
    )


@h3_step_lagging.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
