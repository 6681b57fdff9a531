"""The head's cross-entropy on a GPU: logits of a part of the positions, read twice, written once.

Eager PyTorch passes over the logits a dozen times (to float32, their softmax, its gradient, each
read and written) and makes them twice, forward and backward. Here the product makes them in the
dtype of autocast, and one kernel turns them in place into the gradient by which the two products
of the backward pass begin; these follow at once. So nothing of the size of logits is kept, and
the products are three, as with whole logits, not four.
"""

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from h3lm.models.loss import IGNORED
from h3lm.ssm.first_use import first_use

logger = logging.getLogger("h3lm.models")
TOLERANCE = 1e-2  # products of bfloat16 are off by 3e-3 themselves

UNIT = 8  # 16 bytes of half numbers; vocabularies are padded to a multiple
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_kernel(
    logits_ptr, targets_ptr, losses_ptr, units, units_apart,
    UNIT: tl.constexpr, IGNORED: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: loss = log sum exp(x) - x[target]; then x <- softmax(x) - onehot(target).

    Sizes are told in units, which are loaded at once.
    """
    V = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * units_apart * UNIT
    target = tl.load(targets_ptr + row)
    kept = target != IGNORED
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # a lane that has seen nothing finite keeps a sum of 0, not of NaN
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2((largest - safe) * LOG2_E)
        total += tl.exp2((x - safe) * LOG2_E)
        largest = new
    top = tl.max(largest, 0)
    sum_ = tl.sum(total * tl.exp2((largest - top) * LOG2_E), 0)
    log_sum = top + tl.log(sum_)
    chosen = tl.load(x_ptr + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(kept, log_sum - chosen, 0.0))
    if WITH_GRAD:
        tl.debug_barrier()  # the chosen logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp2((x - log_sum) * LOG2_E)
            g = tl.where(start + columns == target, p - 1.0, p)
            g = tl.where(kept, g, 0.0)
            tl.store(x_ptr + start + columns, g.to(logits_ptr.dtype.element_ty), mask=inside)


def losses_in_place(logits: Tensor, targets: Tensor, *, with_grad: bool) -> Tensor:
    """Loss of each row of logits; with `with_grad` they become the gradient of the losses' sum.

    Args:
        logits: (rows, V), contiguous, any floating dtype. Overwritten if `with_grad`.
        targets: (rows,) ids, -100 where there is none.

    Returns:
        (rows,) float32, 0 where there is no target.
    """
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(V))
    unit = UNIT if V % UNIT == 0 and logits.data_ptr() % 16 == 0 else 1
    _rows_kernel[(rows,)](
        logits, targets, losses, V // unit, logits.stride(0) // unit,
        UNIT=unit, IGNORED=IGNORED, WITH_GRAD=with_grad, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return losses


@torch.library.custom_op("h3lm::head_loss", mutates_args=())
def head_loss_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden weight^T), and its gradients.

    Args:
        hidden: (rows, D), the dtype of the products.
        weight: (V, D), rounded to that dtype here: its gradient is not.
        targets: (rows,) ids, -100 where there is none.
        chunk_bytes: What the logits of one part take, at most, but for those of one row.
        with_grad: Whether gradients are wanted; they are empty otherwise.

    Returns:
        Scalar in float32; its gradients by `hidden`, in its dtype, and by `weight`, in float32.
    """
    rows, (V, D) = len(hidden), weight.shape
    weight = weight.to(hidden.dtype)
    size = max(1, chunk_bytes // (V * weight.element_size()))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_grad else hidden.new_empty(0)
    grad_weight = torch.zeros(V if with_grad else 0, D, dtype=torch.float32, device=hidden.device)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        logits = hidden[part] @ weight.mT
        total += losses_in_place(logits, targets[part], with_grad=with_grad).sum()
        if with_grad:
            torch.mm(logits, weight, out=grad_hidden[part])
            _add_product(grad_weight, logits.mT, hidden[part])
    return total, grad_hidden, grad_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 matrix without rounding the product, where the library can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


@head_loss_sum.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    V, D = weight.shape
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden) if with_grad else hidden.new_empty(0),
        weight.new_empty((V if with_grad else 0, D), dtype=torch.float32),
    )


def _keep(ctx, inputs, output) -> None:
    _, weight, *_ = inputs
    _, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.weight_dtype = weight.dtype


def _scale(ctx, grad, *_) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    by_hidden = grad_hidden * grad.to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None
    by_weight = (grad_weight * grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
    return by_hidden, by_weight, None, None, None


head_loss_sum.register_autograd(_scale, setup_context=_keep)


def works(device: torch.device) -> bool:
    """Whether the kernel may be used; where it cannot be tried, an earlier test can say no."""
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return not _found.get(device)
    return not fault(device)


_found: dict[torch.device, str] = {}


@first_use(logger, "the kernel of the head's loss is off, PyTorch takes over", _found)
def fault(device: torch.device) -> str:
    """What is wrong with the kernel on this machine; empty if it works."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return _compare(device)


def _compare(device: torch.device) -> str:
    random = torch.Generator(device).manual_seed(0)
    rows, V, D = 70, 9000, 64  # two blocks of columns, the last one not full

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    hidden, weight = normal(rows, D), normal(V, D) / 4
    targets = torch.randint(V, (rows,), generator=random, device=device)
    targets[3] = IGNORED
    found = head_loss_sum(hidden, weight, targets, 2 * V * 32, True)
    h, w = (x.float().requires_grad_() for x in (hidden, weight))
    with torch.enable_grad():
        loss = F.cross_entropy(h @ w.mT, targets, ignore_index=IGNORED, reduction="sum")
    expected = loss.detach(), *torch.autograd.grad(loss, (h, w))
    for name, a, b in zip(("loss", "hidden", "weight"), found, expected, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""
