"""The border between (B, L, D) and (B, D, L)."""

import torch
from torch import Tensor, nn

COLUMNS = 8  # that a bias takes: rows of half numbers then still begin at multiples of 16 bytes


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype that a linear map of x computes in: autocast's where it is on, else that of x.

    Autocast knows no convolutions of ours, and would leave them in float32.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def project_channel_first(linear: nn.Module, u: Tensor) -> Tensor:
    """Apply a linear map to (B, L, d_in) and return it channel first, (B, d_out, L).

    For a plain `nn.Linear` this is the product W u^T: it comes out channel first, with L
    contiguous, and nothing is transposed; in training on a GPU in half precision its bias is in the
    product (`bias_as_input`). Anything else (LoRA, quantised, tensor-parallel, with
    hooks) is called as the module that it is, at the price of one transpose.
    """
    B, L, d_in = u.shape
    if not is_plain(linear):
        return linear(u).permute(2, 0, 1).contiguous().transpose(0, 1)
    assert isinstance(linear, nn.Linear)
    rows = u.reshape(B * L, d_in)
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if bias is not None and _adds_in_product(u, weight):
        rows, weight, bias = *bias_as_input(rows, weight, bias, dtype_of_products(u)), None
    y = weight @ rows.T
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    return y.view(len(y), B, L).transpose(0, 1)


def bias_as_input(
    rows: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows and weight with a bias as the weight of one more input, which is 1.

    A library's product that comes out channel first knows no bias along channels. Added behind it,
    and summed up for its gradient, the bias costs as much as the product; as an input a tenth.
    """
    ones = torch.ones(len(rows), COLUMNS, dtype=dtype, device=rows.device)
    zeros = weight.new_zeros(len(weight), COLUMNS - 1)
    rows = torch.cat([rows.to(dtype), ones], 1)  # rounded first, or the copy would be wider
    return rows, torch.cat([weight, bias[:, None], zeros], 1).to(dtype)


def _adds_in_product(u: Tensor, weight: Tensor) -> bool:
    """Whether a bias is worth it as an input: in training on a GPU, in half precision."""
    if not (u.is_cuda and torch.is_grad_enabled()) or dtype_of_products(u).itemsize != 2:
        return False
    # without autocast a weight of another dtype is a mistake, which the product tells
    return torch.is_autocast_enabled(u.device.type) or weight.dtype == u.dtype


def project_channel_last(linear: nn.Module, o: Tensor) -> Tensor:
    """Apply a linear map to (B, d_in, L) and return (B, L, d_out).

    The module is always called; where channels are the outermost axis in memory, as
    `project_channel_first` leaves them, it sees a transposed view and nothing is copied.
    """
    B, d_in, L = o.shape
    rows = o.transpose(0, 1).reshape(d_in, B * L).T
    return linear(rows).unflatten(0, (B, L))


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is nothing but its weight and bias, so that these may be used by hand."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    return not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    )
