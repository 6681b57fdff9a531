"""Long convolution with a filter that is learned tap by tap."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from h3lm import flashconv
from h3lm.flashconv import KeptFilter
from h3lm.layers.both_ways import NoState, hide_padding, refuse_state
from h3lm.layers.prepared import Prepared, PreparingModule
from h3lm.layers.projection import dtype_of_products
from h3lm.layers.recurrence import spans_of
from h3lm.layers.s4d import check_output, finish
from h3lm.layers.unpad import Unpadded
from h3lm.ssm.hints import SSM_HINT, ParameterHint, SSMModule

DEFAULT_FILTER_LENGTH = 1024


class LongConvState(NamedTuple):
    """What a filter of n taps remembers.

    Attributes:
        inputs: The last n - 1 inputs, (B, D, n - 1), newest last.
    """

    inputs: Tensor


class LongFilter(SSMModule):
    """D filters of n taps; small taps count as zero.

        f = sign(w) max(|w| - threshold, 0)

    They start as noise under an exponential decay, from slow (channel 0) to fast, each with unit
    energy.
    Source: Fu et al. 2023 ("Simple Hardware-Efficient Long Convolutions"); the unit energy is
    ours: it makes the output's size independent of the length.

    Args:
        d_model: D.
        length: n.
        threshold: Below it a tap is zero.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = {"w": SSM_HINT}

    def __init__(self, d_model: int, length: int, threshold: float = 1e-3) -> None:
        super().__init__()
        self.threshold = threshold
        self.w = nn.Parameter(torch.empty(d_model, length))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw anew, from torch's generator."""
        D, n = self.w.shape
        channel = torch.arange(D, device=self.w.device)[:, None]
        position = torch.arange(n, device=self.w.device)
        decay = torch.exp(-position / n * max(D / 2, 1.0) ** (channel / D))
        nn.init.normal_(self.w)
        self.w.copy_(F.normalize(self.w * decay, dim=1))

    def taps(self) -> Float[Tensor, "D n"]:
        """The filters, (D, n)."""
        self.check_precision()
        return F.softshrink(self.w, self.threshold)


class LongConv(PreparingModule):
    """Convolution of each channel with a learned filter, GELU, and a gated or linear map.

        y = W gelu(conv(u) + skip u) + b                             output="linear"
        y = a * sigmoid(g),  (a, g) = W gelu(conv(u) + skip u) + b   output="glu"

    Source: Fu et al. 2023 ("Simple Hardware-Efficient Long Convolutions"). GELU in its exact form.

    Args:
        d_model: Width D.
        filter_length: Taps n: how far back a position sees.
        output: "linear" or "glu".
        bidirectional: Whether a position sees as far ahead too, by a second filter that starts
            at the next position. Such a layer takes and returns no state.
        bias: Whether the output map has a bias.

    Attributes:
        backend: Implementation of the convolution, see `flashconv.fft_conv`.

    Raises:
        ValueError: if `output` is unknown or there is no tap.
    """

    backend: str = "auto"
    reads_positions_last = True  # of its input: no copy where they are contiguous

    def __init__(
        self,
        d_model: int,
        filter_length: int = DEFAULT_FILTER_LENGTH,
        *,
        output: str = "glu",
        bidirectional: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_output(output)
        if filter_length < 1:
            raise ValueError(f"filter_length={filter_length} must be at least 1")
        self.d_model, self.filter_length = d_model, filter_length
        self.output: str = output
        self.long_filter = LongFilter(d_model, filter_length)
        self.backward_filter = LongFilter(d_model, filter_length) if bidirectional else None
        self.skip = nn.Parameter(torch.ones(d_model))
        self.output_proj = nn.Linear(d_model, d_model * (1 + (output == "glu")), bias=bias)
        self._prepared: Prepared[KeptFilter] = Prepared()

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        state: LongConvState | None = None,
        *,
        mask: Bool[Tensor, "B L"] | Integer[Tensor, "B L"] | None = None,
        cu_seqlens: Integer[Tensor, " S_plus_1"] | None = None,
        lengths: Integer[Tensor, " B"] | None = None,
        residual: Float[Tensor, "B L D"] | None = None,
        with_state: bool = True,
    ) -> tuple[Float[Tensor, "B L D"], LongConvState | None]:
        """Mix positions; arguments as in `H3.forward`, and a residual that the output is added to.

        Raises:
            ValueError: if both `mask` and `cu_seqlens` are given, or a bidirectional layer is
                given a state.
        """
        if mask is not None and cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both")
        x = u.to(dtype_of_products(u)).transpose(1, 2)
        y: Tensor
        end: LongConvState | None = None
        if self.backward_filter is not None:
            refuse_state(state)
            if mask is not None:
                y, _ = Unpadded(mask).run(
                    lambda state, cu, x: (self._both_ways(x, cu), state), NoState(), (x,)
                )
            else:
                y = self._both_ways(hide_padding(x, lengths), cu_seqlens)
        elif mask is not None:

            def run(state: LongConvState, cu: Tensor, x: Tensor) -> tuple[Tensor, LongConvState]:
                y, end = self._ahead(x, cu, state)
                assert end is not None
                return y, end

            y, end = Unpadded(mask).run(run, state or self.zero_state(x), (x,))
            end = end if with_state else None
        else:
            y, end = self._ahead(x, cu_seqlens, state, with_state)
        return finish(self.output_proj, y, self.output, residual), end

    def zero_state(self, x: Float[Tensor, "B D L"]) -> LongConvState:
        """The state before anything was seen, for inputs like `x`."""
        return LongConvState(x.new_zeros(x.shape[0], self.d_model, self.filter_length - 1))

    def _ahead(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        state: LongConvState | None,
        with_state: bool = True,
    ) -> tuple[Tensor, LongConvState | None]:
        kept, n = self._filter(), self.filter_length
        outputs, ends = [], []
        for i, span in enumerate(spans_of(cu_seqlens, x.shape[-1])):
            part = x[..., span]
            L = part.shape[-1]
            if state is not None:
                before = state.inputs if cu_seqlens is None else state.inputs[i : i + 1]
                part = torch.cat([before.to(part.dtype), part], -1)
            y = flashconv.fft_conv(part, kept, backend=self.backend)
            outputs.append(y[..., part.shape[-1] - L :])
            if with_state:
                seen = F.pad(part, (n - 1, 0)) if state is None else part
                ends.append(seen[..., seen.shape[-1] - (n - 1) :])
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y, LongConvState(torch.cat(ends)) if with_state else None

    def _both_ways(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        kept = self._filter()
        spans = spans_of(cu_seqlens, x.shape[-1])
        outputs = [flashconv.fft_conv(x[..., span], kept, backend=self.backend) for span in spans]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _filter(self) -> KeptFilter:
        """Filters and skip; in eval mode with what was made of them."""
        return self._prepared.get(self, self._make_filter)

    def _make_filter(self) -> KeptFilter:
        taps, behind = self.long_filter.taps(), None
        if self.backward_filter is not None:
            # lag 0 belongs to the forward filter
            behind = F.pad(self.backward_filter.taps(), (1, 0))
        return KeptFilter(taps, self.skip.to(taps.dtype), behind)

    @staticmethod
    def pack_state(state: LongConvState) -> tuple[Tensor, None]:
        """State as the two tensors that a cache stores; there is no recurrent part."""
        return state.inputs, None

    @staticmethod
    def unpack_state(conv: Tensor, recurrent: Tensor | None) -> LongConvState:
        """Inverse of `pack_state`."""
        return LongConvState(conv)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"d_model={self.d_model}, filter_length={self.filter_length}"
