"""The loss of a language model's head, without its logits ever being whole.

Logits of a vocabulary are the largest tensor of a training step: at 8 x 2048 positions and 50 264
tokens they take 3.3 GB in float32, and as much again for their gradient. Here they are made for
a part of the positions at a time; on a GPU a kernel takes their gradient at once, elsewhere they
are made again in the backward pass.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from h3lm.layers.projection import dtype_of_products

IGNORED = -100
CHUNK_LOGITS = 1 << 27  # of one part: 512 MiB in float32


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    *,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Cross-entropy of softmax(hidden weight^T), in float32.

    The products are in the dtype of autocast, as a linear layer's are. On a GPU, Liger-Kernel's
    fused loss is taken where it is installed; else torch's `linear_cross_entropy`, from 2.13 on,
    for float32 products; else the kernel of `loss_triton` on a GPU; else parts of the positions
    are computed one after the other.

    Args:
        hidden: (B, L, D).
        weight: (V, D), the head's.
        targets: (B, L) token ids, already shifted; -100 where there is none.
        num_items: What the sum is divided by; the number of targets here if None.
        chunk_logits: Logits that are held at once, at least those of one position.

    Returns:
        A scalar, float32. Differentiable in `hidden` and `weight`.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        total = _liger(hidden, weight, targets)
    elif hasattr(F, "linear_cross_entropy") and dtype_of_products(hidden) == torch.float32:
        # in bfloat16 its loss is off by 1e-2 where that of whole logits is off by 6e-6 (torch 2.13)
        total = _torch(hidden, weight, targets)
    elif _has_kernel(hidden.device):
        total = _by_kernel(hidden, weight, targets, chunk_logits)
    else:
        total = _in_chunks(hidden, weight, targets, max(1, chunk_logits // len(weight)))
    if num_items is None:
        return total / (targets != IGNORED).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = dtype_of_products(hidden)  # its kernels do not know of autocast
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )


def _has_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    from h3lm.models import loss_triton

    return loss_triton.works(device)


def _by_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_logits: int) -> Tensor:
    from h3lm.models.loss_triton import head_loss_sum

    dtype = dtype_of_products(hidden)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        size = torch.finfo(torch.float32).bits // 8 * chunk_logits
        return head_loss_sum(hidden.to(dtype).contiguous(), weight, targets, size, with_grad)[0]


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate")
    return F.linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, reduction="sum", options=options
    )


def _in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
    if len(hidden) <= size:
        return _chunk_loss(hidden, weight, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        part = checkpoint(_chunk_loss, h, weight, t, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
