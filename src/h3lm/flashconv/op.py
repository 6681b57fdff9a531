"""The public ops: tensors in, tensors out, channel first.

They check what they are given, choose an implementation, and handle what all implementations
share: direction, the empty sequence, chunk operators made from a system.
"""

from itertools import pairwise

import torch
from jaxtyping import Complex, Float, Integer
from torch import Tensor
from torch.distributed import ProcessGroup

from h3lm.flashconv import chunked, fft, fft_chunks, fft_library, library, reference
from h3lm.flashconv.checks import (
    AnySystem,
    check_complex,
    check_h3_state,
    check_heads,
    check_like,
    check_sequences,
    check_slice,
    check_system,
    check_taps,
    check_tensor,
    system_of,
)
from h3lm.flashconv.dispatch import (
    KERNELS,
    Choice,
    Problem,
    announce,
    capability,
    choose,
    choose_method,
    is_aligned,
)
from h3lm.flashconv.fft_chunks import FFTOperators
from h3lm.flashconv.fft_library import KeptFilter
from h3lm.flashconv.state import H3State, diagonal_shape
from h3lm.ssm.dplr import DPLRSystem
from h3lm.ssm.operators import DEFAULT_CHUNK_LENGTH, ChunkOperators, DiagonalSystem


def h3_core(
    q: Float[Tensor, "B D L"],
    k: Float[Tensor, "B D L"],
    v: Float[Tensor, "B D L"],
    taps: Float[Tensor, "D n_taps"],
    system: DiagonalSystem | ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    reverse: bool = False,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, "B D L"], H3State | None]:
    """Run everything of an H3 layer between its projections.

        s_t = sum_j taps_j k_{t-j};        w_t[i, j] = s_t[i] v_t[j]          (within a head)
        x_t[i, j] = a x_{t-1}[i, j] + b w_t[i, j];   y_t = 2 Re(sum_n c_n x_t) + skip w_t
        o_t[j] = sum_i q_t[i] y_t[i, j]

    For `head_dim` 1: o = q * diagonal_ssm(shift_ssm(k) * v). Channel c is member c % head_dim of
    head c // head_dim, in q, k, v and o alike.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1.

    Forward and backward, any device. State and accumulation are float32 for half inputs.
    L may be 0, 1, odd, prime or millions; memory grows linearly with it.
    On a GPU the kernels round operands of products to the dtype of q: in float16 s = taps * k, the
    products s v and q do, and the states, must stay below 65504; bfloat16 has no such limit.

    Args:
        q, k, v: (B, D, L), float32, bfloat16, float16 or float64, one dtype; L contiguous is
            fastest, B and D may have any stride.
        taps: Short filter on k, skip included, (D, n_taps), float32 (`ShiftSSM.taps()`).
        system: The diagonal SSM of each head, H = D / head_dim, or its chunk operators made with
            these taps.
        head_dim: Channels of a head.
        initial_state: State before position 0; zero if None. With `cu_seqlens`, one per sequence.
        return_final_state: Whether to return the state after the last position.
        cu_seqlens: Boundaries 0 = c_0 < c_1 < ... < c_S = L of sequences packed in one row
            (B = 1), integers. None of them sees another.
        reverse: Run from right to left; the initial state then stands behind position L - 1.
        backend: "auto", "reference", "torch", "triton" or "gluon" (Hopper).
        process_group: Processes that hold one slice of each row each, in the order of their ranks.
            The slices may differ in length. All of them call, and all call backward. Only rank 0
            gives an `initial_state`; `cu_seqlens` are those of the slice, as
            `sequence_parallel.slice_boundaries` makes them.

    Returns:
        `o`, (B, D, L) in the dtype of q, and the final state or None. Differentiable in every
        tensor argument, both states included.

    Raises:
        ValueError: if shapes, dtypes or devices do not belong together, an argument is no tensor
            or system, `cu_seqlens` does not increase from 0 to L, operators were made without
            these taps, no backend can do it, or a slice of a process group is reversed or shorter
            than the short filter reaches back.

    Example:
        >>> import torch
        >>> from h3lm.ssm import DiagonalSSM, ShiftSSM
        >>> q, k, v = torch.randn(3, 2, 8, 100).unbind()
        >>> o, state = h3_core(q, k, v, ShiftSSM(8).taps(), DiagonalSSM(8).system(),
        ...                    return_final_state=True)
        >>> o.shape, state.shift.shape, state.diagonal.shape
        (torch.Size([2, 8, 100]), torch.Size([2, 8, 63]), torch.Size([2, 8, 32]))
    """
    return _h3_core(
        q, k, v, taps, system, head_dim=head_dim, initial_state=initial_state,
        return_final_state=return_final_state, cu_seqlens=cu_seqlens, reverse=reverse,
        backend=backend, process_group=process_group,
    )  # fmt: skip


def h3_core_qkv(
    qkv: Float[Tensor, "B D_times_3 L"],
    taps: Float[Tensor, "D n_taps"],
    system: DiagonalSystem | ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    reverse: bool = False,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, "B D L"], H3State | None]:
    """`h3_core` of q, k and v that lie one behind the other in a tensor, as a projection makes it.

    Kernels make its gradient as one tensor, too: nothing is copied around the core.

    Args:
        qkv: (B, 3 D, L); else as there.
        taps, system, head_dim, initial_state, return_final_state, cu_seqlens, reverse, backend,
            process_group: As in `h3_core`.

    Raises:
        ValueError: as there, or if the channels of qkv are no three times those of the taps.
    """
    check_like("qkv", qkv, {})
    check_taps(taps, qkv)
    if qkv.shape[1] != 3 * len(taps):
        raise ValueError(
            f"qkv has {qkv.shape[1]} channels, not 3 times the {len(taps)} of the taps"
        )
    q, k, v = qkv.chunk(3, 1)
    return _h3_core(
        q, k, v, taps, system, head_dim=head_dim, initial_state=initial_state,
        return_final_state=return_final_state, cu_seqlens=cu_seqlens, reverse=reverse,
        backend=backend, process_group=process_group, qkv=qkv,
    )  # fmt: skip


def _h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem | ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
    qkv: Tensor | None = None,
) -> tuple[Tensor, H3State | None]:
    check_like("q", q, {"k": k, "v": v})
    check_heads(k, taps, system, head_dim)
    if process_group is not None:
        from h3lm.flashconv import sequence_parallel  # it runs this op on each slice

        check_slice(reverse)
        return sequence_parallel.h3_core(
            q, k, v, taps, system, process_group=process_group, head_dim=head_dim,
            initial_state=initial_state, cu_seqlens=cu_seqlens, backend=backend,
            with_state=return_final_state, qkv=qkv,
        )  # fmt: skip
    sequences = check_sequences(q, cu_seqlens)
    check_h3_state(initial_state, sequences, k, taps, system, head_dim)
    problem = _problem(system, taps.shape[1], head_dim, cu_seqlens, q, k, v)
    choice = choose("h3_core", q.device, q.dtype, backend, problem)
    announce("h3_core", choice)
    if q.shape[-1] == 0:
        unseen = initial_state or zero_state(sequences, k, taps, system, head_dim)
        return torch.zeros_like(q), unseen if return_final_state else None
    if reverse:
        q, k, v, initial_state, cu_seqlens = _reversed(q, k, v, initial_state, cu_seqlens)
    state: H3State | None
    if choice.backend == "reference":
        o, state = _reference_h3_core(
            q, k, v, taps, system_of(system), head_dim, initial_state, cu_seqlens
        )
    elif choice.backend in KERNELS:
        o, state = library.h3_core(
            q, k, v, _operators(system, taps), backend=choice.backend, head_dim=head_dim,
            initial_state=initial_state, with_state=return_final_state, cu_seqlens=cu_seqlens,
            qkv=None if reverse else qkv,
        )  # fmt: skip
    else:
        operators = _operators(system, taps)
        o, state = chunked.h3_core(
            q, k, v, operators,
            head_dim=head_dim, initial_state=initial_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if reverse:
        o = o.flip(-1)
        state = None if state is None else _reversed_state(state, cu_seqlens)
    return o, state if return_final_state else None


def h3_end_state(
    k: Float[Tensor, "B D L"],
    v: Float[Tensor, "B D L"],
    taps: Float[Tensor, "D n_taps"],
    system: DiagonalSystem | ChunkOperators,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    backend: str = "auto",
) -> H3State:
    """The state that `h3_core` leaves behind, without its outputs.

    It needs no q and about half of the work. Arguments, errors and differentiability as there.

    Returns:
        The state after the last position of each row, or of each sequence of `cu_seqlens`.
    """
    check_like("k", k, {"v": v})
    check_heads(k, taps, system, head_dim)
    sequences = check_sequences(k, cu_seqlens)
    check_h3_state(initial_state, sequences, k, taps, system, head_dim)
    problem = _problem(system, taps.shape[1], head_dim, cu_seqlens, k, v)
    choice = choose("h3_end_state", k.device, k.dtype, backend, problem)
    announce("h3_end_state", choice)
    if k.shape[-1] == 0:
        return initial_state or zero_state(sequences, k, taps, system, head_dim)
    if choice.backend == "reference":
        return _reference_h3_core(
            torch.zeros_like(k), k, v, taps, system_of(system), head_dim, initial_state, cu_seqlens
        )[1]
    if choice.backend in KERNELS:
        return library.h3_end_state(
            k, v, _operators(system, taps), backend=choice.backend, head_dim=head_dim,
            initial_state=initial_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return chunked.h3_end_state(
        k, v, _operators(system, taps),
        head_dim=head_dim, initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def ssm_conv(
    u: Float[Tensor, "B H L"],
    system: AnySystem,
    *,
    pre_gate: Float[Tensor, "B H L"] | None = None,
    post_gate: Float[Tensor, "B H L"] | None = None,
    initial_state: Complex[Tensor, "S H half"] | None = None,
    return_final_state: bool = False,
    cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
    reverse: bool = False,
    method: str = "auto",
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, "B H L"], Complex[Tensor, "S H half"] | None]:
    """Run one SSM for each channel, with optional gates before and after.

        w = pre_gate * u;   x_t = a x_{t-1} + b w_t;   y_t = post_gate (2 Re(c x_t) + skip w_t)

    Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 2. Forward and backward, any device;
    state and accumulation are float32 for half inputs. Any L.

    Args:
        u: Input, (B, H, L), float32, bfloat16, float16 or float64.
        system: The SSM of each channel, diagonal or S4's, or what one of the methods makes of it:
            `system.chunk_operators()` for "scan", `fft_operators(system, L)` for "fft_chunks".
        pre_gate, post_gate: As `u`.
        initial_state: State before position 0, (B, H, N/2) complex; (S, ...) with `cu_seqlens`.
        return_final_state: Whether to return the state after the last position.
        cu_seqlens: Boundaries of packed sequences, as in `h3_core`.
        reverse: Run from right to left.
        method: "scan" passes states along chunks of 64 (diagonal systems), "fft_chunks" convolves
            chunks of up to 8192 by FFT and joins them by the state, the paper's Algorithm 2;
            "auto" takes the faster one of the nearest measurement, see `dispatch.choose_method`.
        backend: "auto", "reference", "torch" or "triton".
        process_group: As in `h3_core`; for diagonal systems.

    Returns:
        `y`, (B, H, L) in the dtype of u, and the final state or None. Differentiable in every
        tensor argument.

    Raises:
        ValueError: if shapes, dtypes or devices do not belong together or no backend can do it.
    """
    if process_group is not None:
        from h3lm.flashconv import sequence_parallel  # it runs this op on each slice

        check_slice(reverse)
        y, end = sequence_parallel.ssm_conv(
            u, system, process_group=process_group, pre_gate=pre_gate, post_gate=post_gate,
            initial_state=initial_state, cu_seqlens=cu_seqlens, method=method, backend=backend,
        )  # fmt: skip
        return y, end if return_final_state else None
    gates = {"pre_gate": pre_gate, "post_gate": post_gate}
    check_like("u", u, {name: gate for name, gate in gates.items() if gate is not None})
    check_system(system, u)
    whole = system_of(system)
    if whole.num_systems != u.shape[1]:
        raise ValueError(f"system has {whole.num_systems} systems, u has {u.shape[1]} channels")
    sequences = check_sequences(u, cu_seqlens)
    shape = (sequences, u.shape[1], whole.num_modes)
    check_complex("initial_state", initial_state, u)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, this call needs {shape}")
    present = [x for x in (u, pre_gate, post_gate) if x is not None]
    problem = _problem(
        system, 0, 1, cu_seqlens, *present, gated=len(present) > 1,
        states=initial_state is not None or return_final_state,
        backward=_needs_gradients(*present, initial_state, whole),
    )  # fmt: skip
    way = _method(method, system, u, problem)
    announce("ssm_conv method", way)
    if way.backend == "fft_chunks":
        problem = Problem(
            length=min(u.shape[-1], fft_chunks.CHUNK_LENGTH),
            capability=problem.capability,
            gated=len(present) > 1,
            rows=u.shape[0] * max(1, u.shape[-1] // fft_chunks.CHUNK_LENGTH),
        )
        choice = choose("fft_conv", u.device, u.dtype, backend, problem)
    else:
        choice = choose("ssm_conv", u.device, u.dtype, backend, problem)
    announce("ssm_conv", choice)
    if u.numel() == 0:
        unseen = initial_state if initial_state is not None else whole.c.new_zeros(shape)
        return torch.zeros_like(u), unseen if return_final_state else None
    if reverse:
        u = u.flip(-1)
        pre_gate, post_gate = (None if x is None else x.flip(-1) for x in (pre_gate, post_gate))
        initial_state, cu_seqlens = _reversed_sequences(initial_state, cu_seqlens, u.shape[-1])
    state: Tensor | None
    if choice.backend == "reference":
        y, state = _reference_ssm_conv(u, whole, pre_gate, post_gate, initial_state, cu_seqlens)
    elif way.backend == "fft_chunks":
        y, state = _fft_chunks(
            u, system, pre_gate, post_gate, initial_state, cu_seqlens,
            backend=choice.backend, with_state=return_final_state,
        )  # fmt: skip
    elif choice.backend in KERNELS:
        y, state = library.ssm_conv(
            u, _operators(_scannable(system), None), backend=choice.backend, pre_gate=pre_gate,
            post_gate=post_gate, initial_state=initial_state, with_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    else:
        y, state = chunked.ssm_conv(
            u, _operators(_scannable(system), None), pre_gate=pre_gate, post_gate=post_gate,
            initial_state=initial_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if reverse:
        y = y.flip(-1)
        state = state if cu_seqlens is None or state is None else state.flip(0)
    return y, state if return_final_state else None


def fft_conv(
    u: Float[Tensor, "B D L"],
    f: Float[Tensor, "D Lf"] | KeptFilter,
    *,
    skip: Float[Tensor, " D"] | None = None,
    pre_gate: Float[Tensor, "B D L"] | None = None,
    post_gate: Float[Tensor, "B D L"] | None = None,
    f_reverse: Float[Tensor, "D Lr"] | None = None,
    mode: str = "causal",
    backend: str = "auto",
) -> Float[Tensor, "B D L"]:
    """Convolve each channel with a filter of its own, with optional gates and skip.

        x = pre_gate * u
        y_t = post_gate_t (sum_{s>=0} f_s x_{t-s} + sum_{s>=0} f_reverse_s x_{t+s} + skip x_t)

    Positions outside of the row are zero ("causal") or wrap around ("circular"). Tap 0 of
    `f_reverse` acts on the present, as in the release: pass 0 there where the backward filter
    starts at the next position.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), section 4.1.

    Forward and backward, any device, whatever the autocast. On a GPU from compute capability 8.0
    on, half inputs go through a block FFT on the matrix units, with float16 operands under a scale
    of their own for each row, and float32 sums: one kernel up to 8,192 positions (without Hopper's
    shared memory 2,048, of float16, whose operands are pairs, 1,024), more of them beyond. On
    Hopper float32 does too, up to 2,048. Elsewhere, and for float16 over 524,288, where it is
    faster, `torch.fft` computes in float32.

    Args:
        u: Input, (B, D, L), float32, bfloat16, float16 or float64.
        f: Filter, (D, Lf), float32 (what is narrower is widened), 1 <= Lf <= L; or a `KeptFilter`
            of any length, with skip, f_reverse and mode of its own.
        skip: Direct term, (D,).
        pre_gate, post_gate: As `u`.
        f_reverse: Anti-causal filter, (D, Lr), 1 <= Lr <= L.
        mode: "causal" or "circular".
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        (B, D, L), dtype of `u`. Differentiable in every tensor argument.

    Raises:
        ValueError: if a filter is longer than the row, shapes, dtypes or devices do not belong
            together, the mode is unknown, or no backend can do it.
    """
    names = {"pre_gate": pre_gate, "post_gate": post_gate}
    gates = {name: gate for name, gate in names.items() if gate is not None}
    check_like("u", u, gates)
    kept = None
    if isinstance(f, KeptFilter):
        if skip is not None or f_reverse is not None or mode != "causal":
            raise ValueError("skip, f_reverse and mode belong into the KeptFilter, not beside it")
        kept, skip, mode = f, f.skip, f.mode
        f, f_reverse = kept.cut(u.shape[-1])
    choice = _fft_choice(u, f, skip, f_reverse, mode, backend, bool(gates))
    announce("fft_conv", choice)
    if u.numel() == 0:
        return torch.zeros_like(u)
    if kept is not None and choice.backend != "reference":
        return fft_library.fft_conv_kept(
            u, kept, backend=choice.backend, pre_gate=pre_gate, post_gate=post_gate
        )
    run = {"reference": reference.fft_conv, "torch": fft.fft_conv}.get(
        choice.backend, fft_library.fft_conv
    )
    return run(
        u, f, skip=skip, pre_gate=pre_gate, post_gate=post_gate, f_reverse=f_reverse, mode=mode
    )


def _fft_choice(
    u: Tensor,
    f: Tensor,
    skip: Tensor | None,
    f_reverse: Tensor | None,
    mode: str,
    backend: str,
    gated: bool,
) -> Choice:
    """Check what belongs to a filter, and choose the implementation."""
    _, D, L = u.shape
    for name, given in (("f", f), ("f_reverse", f_reverse), ("skip", skip)):
        if given is None:
            continue
        check_tensor(name, given)
        if not (given.dtype.is_floating_point and given.device == u.device):
            raise ValueError(
                f"{name} is {given.dtype} on {given.device}; u, on {u.device}, needs float32 there"
            )
    for name, taps in (("f", f), ("f_reverse", f_reverse)):
        if taps is None:
            continue
        if taps.dim() != 2 or taps.shape[0] != D:
            raise ValueError(f"{name} is {tuple(taps.shape)}, u needs ({D}, length)")
        if L and not 1 <= taps.shape[1] <= L:
            raise ValueError(
                f"{name} has {taps.shape[1]} taps for rows of length {L}: cut it to 1..{L}"
            )
    if skip is not None and skip.shape != (D,):
        raise ValueError(f"skip is {tuple(skip.shape)}, u needs ({D},)")
    if mode not in ("causal", "circular"):
        raise ValueError(f"mode={mode!r} is not one of causal, circular")
    lags = f.shape[1] + (0 if f_reverse is None else f_reverse.shape[1] - 1)
    circular = mode == "circular"
    problem = Problem(
        length=L,
        capability=capability(u.device),
        lags=2 * L - 1 if circular else lags,
        gated=gated,
        rows=u.shape[0],
    )
    return choose("fft_conv", u.device, u.dtype, backend, problem)


def zero_state(
    rows: int,
    k: Tensor,
    taps: Tensor,
    system: DiagonalSystem | ChunkOperators,
    head_dim: int = 1,
) -> H3State:
    """The state before anything was seen, for inputs like `k`."""
    diagonal = system_of(system)
    shape = diagonal_shape(rows, k.shape[1] // head_dim, head_dim, diagonal.num_modes)
    return H3State(k.new_zeros(rows, k.shape[1], taps.shape[1] - 1), diagonal.a.new_zeros(shape))


def _scannable(system: AnySystem) -> DiagonalSystem | ChunkOperators:
    system = system.system if isinstance(system, FFTOperators) else system
    assert not isinstance(system, DPLRSystem)  # refused by `choose_method`
    return system


def _method(method: str, system: AnySystem, u: Tensor, problem: Problem) -> Choice:
    """The algorithm; what was made for one of them asks for it."""
    diagonal = isinstance(system_of(system), DiagonalSystem)
    if method == "auto" and isinstance(system, FFTOperators):
        return Choice("fft_chunks", "the operators are for it")
    if method == "auto" and isinstance(system, ChunkOperators):
        return Choice("scan", "the operators are for it")
    return choose_method(method, diagonal, u.device, problem, u.dtype)


def _fft_chunks(
    u: Tensor,
    system: AnySystem,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    backend: str,
    with_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Each sequence by itself, with one set of operators."""
    spans = [slice(0, u.shape[-1])] if cu_seqlens is None else _slices(cu_seqlens)
    longest = max(span.stop - span.start for span in spans)
    if isinstance(system, FFTOperators):
        operators = system
    else:
        operators = fft_chunks.fft_operators(system_of(system), longest)
    done = []
    for i, span in enumerate(spans):
        pre, post = (None if x is None else x[..., span] for x in (pre_gate, post_gate))
        start = initial_state
        if start is not None and cu_seqlens is not None:
            start = start[i : i + 1]
        done.append(
            fft_chunks.ssm_conv(
                u[..., span], operators, backend=backend, pre_gate=pre, post_gate=post,
                initial_state=start, with_state=with_state,
            )
        )  # fmt: skip
    if len(done) == 1:
        return done[0]
    states = [state for _, state in done if state is not None]
    return torch.cat([y for y, _ in done], -1), torch.cat(states) if states else None


def _problem(
    system: AnySystem,
    n_taps: int,
    head_dim: int,
    cu_seqlens: Tensor | None,
    *tensors: Tensor,
    gated: bool = False,
    states: bool = False,
    backward: bool = False,
) -> Problem:
    """What `choose` needs to know of a call."""
    diagonal = system_of(system)
    T = system.chunk_length if isinstance(system, ChunkOperators) else DEFAULT_CHUNK_LENGTH
    return Problem(
        length=tensors[0].shape[2],
        capability=capability(tensors[0].device),
        head_dim=head_dim,
        num_modes=diagonal.num_modes,
        n_taps=n_taps,
        chunk_length=T,
        packed=cu_seqlens is not None,
        aligned=all(is_aligned(x) for x in tensors),
        complex64=diagonal.c.dtype == torch.complex64,
        gated=gated,
        rows=tensors[0].shape[0],
        states=states,
        backward=backward,
    )


def _needs_gradients(*given: Tensor | DiagonalSystem | DPLRSystem | None) -> bool:
    """Whether a backward pass may follow; not asked under a compiler, which needs no answer."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    inside = (
        vars(x).values() if isinstance(x, DiagonalSystem | DPLRSystem) else [x] for x in given
    )
    return any(isinstance(x, Tensor) and x.requires_grad for xs in inside for x in xs)


def _operators(system: DiagonalSystem | ChunkOperators, taps: Tensor | None) -> ChunkOperators:
    if isinstance(system, DiagonalSystem):
        return system.chunk_operators(taps)
    if taps is not None and (system.taps is None or system.taps.shape != taps.shape):
        made = "no taps" if system.taps is None else f"taps {tuple(system.taps.shape)}"
        raise ValueError(
            f"the operators were made with {made}, the call has taps {tuple(taps.shape)}: "
            "make them by system.chunk_operators(taps)"
        )
    return system


def _reference_h3_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    system: DiagonalSystem,
    head_dim: int,
    initial_state: H3State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, H3State]:
    def run(at: slice, state: H3State | None) -> tuple[Tensor, H3State]:
        return reference.h3_core(
            q[..., at], k[..., at], v[..., at], taps, system,
            head_dim=head_dim, initial_state=state,
        )  # fmt: skip

    if cu_seqlens is None:
        return run(slice(None), initial_state)
    done = [
        run(at, initial_state and H3State(*(x[s : s + 1] for x in initial_state)))
        for s, at in enumerate(_slices(cu_seqlens))
    ]
    states = H3State(*(torch.cat(parts) for parts in zip(*(s for _, s in done), strict=True)))
    return torch.cat([o for o, _ in done], -1), states


def _reference_ssm_conv(
    u: Tensor,
    system: DiagonalSystem | DPLRSystem,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    def run(at: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        pre, post = (None if gate is None else gate[..., at] for gate in (pre_gate, post_gate))
        return reference.ssm_conv(
            u[..., at], system, pre_gate=pre, post_gate=post, initial_state=state
        )

    if cu_seqlens is None:
        return run(slice(None), initial_state)
    done = [
        run(at, None if initial_state is None else initial_state[s : s + 1])
        for s, at in enumerate(_slices(cu_seqlens))
    ]
    return torch.cat([y for y, _ in done], -1), torch.cat([state for _, state in done])


def _slices(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def _reversed(
    q: Tensor, k: Tensor, v: Tensor, state: H3State | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, H3State | None, Tensor | None]:
    if state is not None and cu_seqlens is not None:
        state = H3State(*(x.flip(0) for x in state))
    if cu_seqlens is not None:
        cu_seqlens = q.shape[-1] - cu_seqlens.flip(0)
    return q.flip(-1), k.flip(-1), v.flip(-1), state, cu_seqlens


def _reversed_sequences(
    state: Tensor | None, cu_seqlens: Tensor | None, length: int
) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        return state, None
    return None if state is None else state.flip(0), length - cu_seqlens.flip(0)


def _reversed_state(state: H3State, cu_seqlens: Tensor | None) -> H3State:
    return state if cu_seqlens is None else H3State(*(x.flip(0) for x in state))
