"""The border between (B, L, D) and (B, D, L)."""

import torch
from torch import Tensor, nn


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
    contiguous, and nothing is transposed. Anything else (LoRA, quantised, tensor-parallel, with
    hooks) is called as the module that it is, at the price of one transpose.
    """
    B, L, d_in = u.shape
    if not is_plain(linear):
        return linear(u).permute(2, 0, 1).contiguous().transpose(0, 1)
    assert isinstance(linear, nn.Linear)
    y = linear.weight @ u.reshape(B * L, d_in).T
    if linear.bias is not None:
        y = y + linear.bias.to(y.dtype)[:, None]
    return y.view(-1, B, L).transpose(0, 1)


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
