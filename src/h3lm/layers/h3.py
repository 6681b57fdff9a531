"""The H3 layer."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from h3lm import flashconv
from h3lm.flashconv import H3State, RingState, StepOperators, sequence_parallel
from h3lm.flashconv.state import as_real_pairs, from_real_pairs
from h3lm.layers.both_ways import (
    BackwardReadout,
    NoState,
    convolve_both_ways,
    hide_padding,
    refuse_state,
)
from h3lm.layers.prepared import Prepared, PreparingModule
from h3lm.layers.projection import project_channel_first, project_channel_last
from h3lm.layers.recurrence import spans_of
from h3lm.layers.unpad import Unpadded
from h3lm.ssm import ChunkOperators, DiagonalSSM, ShiftSSM
from h3lm.ssm.operators import DEFAULT_CHUNK_LENGTH


class H3(PreparingModule):
    """Hungry Hungry Hippos: two state space models with gates between them.

        q, k, v = u W_q, u W_k, u W_v
        y = (q * diagonal_ssm(shift_ssm(k) v)) W_o

    With head_dim > 1 the product shift_ssm(k) v is an outer product within each head, and q
    contracts the index that came from k. Channel c is member c % head_dim of head c // head_dim,
    before and behind the core.
    Source: Fu et al. 2023 (arXiv 2212.14052v3), Algorithm 1.

    A bidirectional layer runs its diagonal SSM both ways, backward with a C of its own and from
    the next position on; the shift SSM stays causal. It takes and returns no state.

    Args:
        d_model: Width D.
        d_state: State size of the diagonal SSM, 2 * modes.
        head_dim: Channels of a head; divides d_model.
        num_taps: State size of the shift SSM, which is the taps of its filter; d_state if None.
        bidirectional: Whether a position sees what comes after it.
        bias: Whether the projections have a bias.
        init: Start of the diagonal SSM's A: "lin", "inv" or "legs".
        discretization: "bilinear" or "zoh".
        dt_min, dt_max: Range of the step sizes at the start.
        chunk_length: Inputs of a chunk of state passing; rows that are always shorter run faster
            with a shorter one.
        backend: Implementation of the core, see `flashconv.h3_core`.
        device: Where the parameters are made.
        dtype: Dtype of the projections; the SSMs are float32 always.

    Raises:
        ValueError: if head_dim does not divide d_model, d_state is odd or num_taps not positive.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        *,
        num_taps: int | None = None,
        bidirectional: bool = False,
        bias: bool = True,
        init: str = "lin",
        discretization: str = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk_length: int = DEFAULT_CHUNK_LENGTH,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"head_dim={head_dim} must divide d_model={d_model}")
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.chunk_length, self.backend = chunk_length, backend
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.shift_ssm = ShiftSSM(d_model, d_state if num_taps is None else num_taps, device=device)
        self.diagonal_ssm = DiagonalSSM(
            d_model // head_dim,
            d_state,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            device=device,
        )
        self.backward_readout = (
            BackwardReadout(d_model // head_dim, d_state // 2) if bidirectional else None
        )
        self.output_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)
        self._prepared: Prepared[tuple[Tensor, ChunkOperators]] = Prepared()

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: H3State | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        lengths: Integer[Tensor, " B"] | None = None,
        process_group: ProcessGroup | None = None,
        with_state: bool = True,
    ) -> tuple[Float[Tensor, "B L D"], H3State | None]:
        """Mix positions.

        Args:
            u: Input, (B, L, D).
            state: State before position 0, as an earlier call returned it; None for zero.
            mask: 0 or False at positions that are as if they were not there: they move no state
                and no other output. Their own output means nothing.
            cu_seqlens: Boundaries of sequences packed in one row (B = 1).
            lengths: Positions of each row that count, from its beginning; what stands behind
                them is padding. For bidirectional layers; it never reaches back in a causal one.
            process_group: Processes that hold a slice of each row each, see `flashconv.h3_core`;
                for causal layers without a mask.
            with_state: Whether the state after the last position is wanted; training does without
                and saves a pass over the end of each row.

        Returns:
            The output, (B, L, D), and the state after the last position; None if bidirectional or
            not wanted.

        Raises:
            ValueError: if both `mask` and `cu_seqlens` are given, or a bidirectional layer is
                given a state.
        """
        qkv = project_channel_first(self.qkv_proj, u)
        q, k, v = qkv.chunk(3, dim=1)
        if self.backward_readout is not None:
            refuse_state(state)
            o = self._both_ways(q, k, v, mask, cu_seqlens, lengths)
            return project_channel_last(self.output_proj, o), None
        if u.shape[1] == 1 and cu_seqlens is None and process_group is None:
            o, state = self.step(q, k, v, state, mask=mask)
        else:
            o, state = self.core(
                qkv, state,
                mask=mask, cu_seqlens=cu_seqlens, process_group=process_group,
                with_state=with_state,
            )  # fmt: skip
        return project_channel_last(self.output_proj, o), state if with_state else None

    def core(
        self,
        qkv: Float[Tensor, "B D_times_3 L"],
        state: H3State | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        process_group: ProcessGroup | None = None,
        with_state: bool = True,
    ) -> tuple[Float[Tensor, "B D L"], H3State | None]:
        """Everything between the projections, channel first; arguments as in `forward`.

        Raises:
            ValueError: if `mask` is given beside `cu_seqlens` or `process_group`.
        """
        if mask is None and process_group is not None:
            return self.core_of_slice(
                qkv, state,
                process_group=process_group, cu_seqlens=cu_seqlens, with_state=with_state,
            )  # fmt: skip
        taps, operators = self.operators()
        how: dict[str, Any] = {"head_dim": self.head_dim, "backend": self.backend}
        if mask is None:
            return flashconv.h3_core_qkv(
                qkv, taps, operators, initial_state=state, return_final_state=with_state,
                cu_seqlens=cu_seqlens, **how,
            )  # fmt: skip
        if cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both")
        if process_group is not None:
            raise ValueError("slices of a process group take no mask: pack the rows")
        q, k, v = qkv.chunk(3, dim=1)
        if state is None:
            state = flashconv.zero_state(len(k), k, taps, operators, self.head_dim)

        def run(
            state: H3State, cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor
        ) -> tuple[Tensor, H3State]:
            o, new = flashconv.h3_core(
                q, k, v, taps, operators, initial_state=state, return_final_state=True,
                cu_seqlens=cu_seqlens, **how,
            )  # fmt: skip
            assert new is not None
            return o, new

        return Unpadded(mask).run(run, state, (q, k, v))

    @torch.compiler.disable  # no graph holds what others send, nor a decay new in each step
    def core_of_slice(
        self,
        qkv: Float[Tensor, "B D_times_3 L"],
        state: H3State | None = None,
        *,
        process_group: ProcessGroup,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        with_state: bool = True,
        received: sequence_parallel.Received | None = None,
    ) -> tuple[Float[Tensor, "B D L"], H3State | None]:
        """`core` of a slice of rows that several processes share.

        Args:
            qkv: (B, 3 D, L), this process's positions.
            state: Of the first slice.
            process_group: The processes, in the order of their slices.
            cu_seqlens, with_state: As in `core`.
            received: What others sent to the layers of a model, for the same calls done again.

        Raises:
            ValueError: as `flashconv.h3_core` with a `process_group`.
        """
        taps, operators = self.operators()
        q, k, v = qkv.chunk(3, dim=1)
        return sequence_parallel.h3_core(
            q, k, v, taps, operators,
            process_group=process_group, head_dim=self.head_dim, initial_state=state,
            cu_seqlens=cu_seqlens, backend=self.backend, with_state=with_state,
            qkv=qkv,
            received=None if received is None else received.of(self),
        )  # fmt: skip

    def _both_ways(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """The core of a bidirectional layer, (B, D, L)."""
        assert self.backward_readout is not None
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give mask or cu_seqlens, not both")
            return Unpadded(mask).run(
                lambda state, cu, q, k, v: (self._both_ways(q, k, v, None, cu, None), state),
                NoState(),
                (q, k, v),
            )[0]
        if cu_seqlens is not None:
            spans = spans_of(cu_seqlens, q.shape[-1])
            return torch.cat(
                [self._run_both_ways(*(x[..., at] for x in (q, k, v))) for at in spans], -1
            )
        return self._run_both_ways(q, hide_padding(k, lengths), hide_padding(v, lengths))

    def _run_both_ways(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.backward_readout is not None
        taps, operators = self.operators()
        s = flashconv.fft_conv(k, taps[:, : k.shape[-1]])
        d = self.head_dim
        q, s, v = (x.unflatten(1, (-1, d)) for x in (q, s, v))
        # each pair of members of a head is a row of its own, with the head's system
        pairs = (s[:, :, :, None] * v[:, :, None]).permute(0, 2, 3, 1, 4).flatten(0, 2)
        y = convolve_both_ways(pairs, operators, self.backward_readout, backend=self.backend)
        y = y.unflatten(0, (-1, d, d)).permute(0, 3, 1, 2, 4)  # [B, H, i, j, L]
        return (q[:, :, :, None] * y).sum(2).flatten(1, 2)

    def step(
        self,
        q: Float[Tensor, "B D 1"],
        k: Float[Tensor, "B D 1"],
        v: Float[Tensor, "B D 1"],
        state: H3State | None = None,
        *,
        mask: Bool[Tensor, "B 1"] | Integer[Tensor, "B 1"] | None = None,
    ) -> tuple[Float[Tensor, "B D 1"], H3State]:
        """`core` for a single position, by the recurrence: no chunk, no synchronisation."""
        taps, operators = self.operators()
        if state is None:
            state = flashconv.zero_state(q.shape[0], k, taps, operators, self.head_dim)
        o, new = flashconv.h3_step(
            q[..., 0], k[..., 0], v[..., 0], taps, operators.system, state, head_dim=self.head_dim
        )
        if mask is not None:
            here = mask.bool()[:, 0]
            new = H3State(*(_where_row(here, n, s) for n, s in zip(new, state, strict=True)))
        return o[..., None], new

    def step_in_place(
        self,
        u: Float[Tensor, "B 1 D"],
        state: RingState,
        operators: StepOperators | None = None,
    ) -> Float[Tensor, "B 1 D"]:
        """`forward` for a single position of each row, over the state where it lies.

        Args:
            u: Input.
            state: Changed in place but for its position. Without gradients.
            operators: What `step_operators` made earlier, for a graph that needs its addresses.
        """
        o = self.step_core(self.qkv_proj(u)[:, 0], state, operators)
        return self.output_proj(o[:, None])

    def step_core(
        self,
        qkv: Float[Tensor, "B D_times_3"],
        state: RingState,
        operators: StepOperators | None = None,
        *,
        early: bool = False,
    ) -> Float[Tensor, "B D"]:
        """What `step_in_place` does between the projections; `early` as in `h3_step_in_place`."""
        q, k, v = qkv.chunk(3, dim=-1)
        return flashconv.h3_step_in_place(
            q, k, v, operators or self.step_operators(lags=state.recent is not None), state,
            head_dim=self.head_dim,
            backend="torch" if self.backend == "torch" else "auto", early=early,
        )  # fmt: skip

    def step_operators(self, *, lags: bool = False) -> StepOperators:
        """The parameters as `step_in_place` takes them, for states that lag behind or not."""
        taps, operators = self.operators()
        return StepOperators.of(taps, operators.system, lags=lags)

    def operators(self) -> tuple[Float[Tensor, "D n_taps"], ChunkOperators]:
        """Taps of the shift SSM and chunk operators of both SSMs, float32.

        Made anew where gradients or training may need them; reused in eval mode.
        """
        return self._prepared.get(self, self._make_operators)

    def _make_operators(self) -> tuple[Tensor, ChunkOperators]:
        with torch.autocast(self.shift_ssm.B.device.type, enabled=False):
            taps = self.shift_ssm.taps()
            return taps, self.diagonal_ssm.system().chunk_operators(taps, self.chunk_length)

    @staticmethod
    def pack_state(state: H3State) -> tuple[Tensor, Tensor]:
        """State as the two tensors that a cache stores, rows first: real pairs for complex."""
        return state.shift, as_real_pairs(state.diagonal)

    @staticmethod
    def unpack_state(conv: Tensor, recurrent: Tensor) -> H3State:
        """Inverse of `pack_state`."""
        return H3State(conv, from_real_pairs(recurrent))

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, head_dim={self.head_dim}, "
            f"num_taps={self.shift_ssm.d_state}"
        )


def _where_row(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *([1] * (new.dim() - 1))), new, old)
