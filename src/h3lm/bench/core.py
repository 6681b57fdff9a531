"""`h3lm bench core`: the H3 core against the memory roof and what one would pick instead."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from h3lm.bench import accuracy, measure, report, scaling
from h3lm.bench.doctor import run_check
from h3lm.bench.registry import Shape, core_shapes, length_shapes, small_shapes, width_shapes
from h3lm.bench.roofline import both_roof_ms, forward_roof_ms
from h3lm.errors import UserError
from h3lm.flashconv import h3_core, library
from h3lm.flashconv.dispatch import HOPPER_HEAD_DIMS
from h3lm.ssm import DiagonalSSM, ShiftSSM
from h3lm.ssm.operators import ChunkOperators

NOTES = (
    "bfloat16, 64 taps, 32 modes, head_dim 1 unless named, random data, medians of CUDA events in "
    "ms, of calls that the host has queued while the GPU waits; in a graph: one of ten calls that "
    "are captured and replayed together. "
    "Roof: a kernel with 3 reads and 1 write of the same tensors in this process; forward and "
    "backward against 22 bytes per element. Operators were made beforehand, in bfloat16; forward "
    "saves tile states; backward makes every gradient. Memory: what forward and backward allocate "
    "over the bytes of q, k, v, o and their gradients."
)
EXPONENTS = (
    "Powers of length L (4 rows, 768 channels, the four longest) and of width D (4 rows of 16,384) "
    "that the time and the extra memory of forward and backward grow with: the paper's Proposition "
    "1, linear in L for H3, beside attention, quadratic in L."
)
HEAD_WIDTH = 64  # of the attention peer
MAX_ELEMENTS = 2**27  # of a path that makes float32 copies
MAX_ATTENTION_LENGTH = 2**16
CAPTURED = 10  # calls in a graph

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(folder: Path, say: Callable[[str], None], shapes: list[Shape] | None = None) -> Path:
    """Check the kernels, measure, and write a report into a folder.

    Args:
        folder: Where the report goes.
        say: Called with a line for each result.
        shapes: What to measure; if None, one size in five shapes, and then how wrong the kernels
            are, and the growth with length and width, with a picture.

    Raises:
        UserError: without a CUDA device.
        RuntimeError: if a kernel is wrong: a fast wrong one is not timed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench core times a GPU, and there is no CUDA device here")
    backends = list(checked_backends(say))
    name, environment = "core_" + measure.gpu_name(), measure.environment("h3lm bench core")
    rows = _measure_all(shapes or core_shapes(), partial(measure_shape, backends=backends), say)
    if shapes is None:
        rows += _measure_all(core_shapes()[:1], partial(measure_heads, backends=backends), say)
        rows += _measure_all(core_shapes()[:1], measure_retention, say)
        rows += _measure_all(small_shapes(), partial(measure_captured, backends=backends), say)
    path = report.write(name, folder, environment, NOTES, rows)
    if shapes is None:
        accuracy.write(folder, backends, say)
        _write_growth(f"{name}_growth", folder, environment, backends[:1], say)
    return path


def _measure_all(
    shapes: list[Shape],
    measure_one: Callable[[Shape], Iterable[report.Row]],
    say: Callable[[str], None],
) -> list[report.Row]:
    rows: list[report.Row] = []
    for shape in shapes:
        for row in measure_one(shape):
            rows.append(row)
            say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
    return rows


def _write_growth(
    name: str,
    folder: Path,
    environment: dict[str, str],
    backends: list[str],
    say: Callable[[str], None],
) -> None:
    lengths, widths = length_shapes(), width_shapes()
    rows = _measure_all(lengths + widths, partial(measure_shape, backends=backends), say)
    report.write(name, folder, environment, NOTES, rows)
    scaling.plot(
        folder / f"{name}.png", lengths, rows, lambda row: both_roof_ms(float(row["roof ms"]))
    )
    powers = scaling.exponents(lengths, widths, rows)
    report.write(f"{name}_exponents", folder, environment, EXPONENTS, powers)
    for row in powers:
        say("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.2f}'}" for k, v in row.items()))


def checked_backends(say: Callable[[str], None]) -> Iterator[str]:
    """The kernels that run here, each compared with the definition first.

    Raises:
        RuntimeError: if one is wrong.
    """
    for backend in ("gluon", "triton"):
        try:
            check = run_check("h3_core", torch.bfloat16, backend, torch.device("cuda"))
        except ValueError as reason:
            say(f"{backend}: not here ({reason})")
            continue
        say(f"{backend}: error {check.error:.1e}, allowed {check.allowed:.1e}")
        if not check.passed:
            raise RuntimeError(f"the {backend} kernels are wrong on this machine: nothing is timed")
        yield backend


def measure_shape(shape: Shape, backends: list[str]) -> Iterator[report.Row]:
    """One row for each path: kernels, plain PyTorch, torch.fft, attention, retention."""
    size = (shape.rows, shape.channels, shape.length)
    q, k, v, do = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    roof = forward_roof_ms(q, k, v)
    operators = _operators(shape.channels)
    for backend in backends:
        yield _kernel_row(shape, backend, operators, (q, k, v, do), roof)
    if shape.elements <= MAX_ELEMENTS:
        yield _row(shape, "torch", _torch_path(operators), (q, k, v, do), roof, repeats=3)
        yield _row(shape, "torch.fft", _fft(operators, shape.length), (q, k, v, do), roof)
    if shape.length <= MAX_ATTENTION_LENGTH:
        for name, peer in (
            ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa flash", SDPBackend.FLASH_ATTENTION),
        ):
            heads = [_to_heads(x) for x in (q, k, v, do)]
            yield _row(shape, name, _attention(peer), heads, roof, repeats=9)
    if find_spec("fla") is not None and shape.length <= MAX_ATTENTION_LENGTH:
        # positions before heads is what it takes
        rows = [_to_heads(x).transpose(1, 2).contiguous() for x in (q, k, v, do)]
        yield _row(shape, "retention (fla)", _retention, rows, roof, repeats=9)


def measure_retention(shape: Shape) -> Iterator[report.Row]:
    """Retention in plain PyTorch, compiled: for one shape, since each takes a minute to compile."""
    size = (shape.rows, shape.channels, shape.length)
    q, k, v, do = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    heads = [_to_heads(x) for x in (q, k, v, do)]
    compiled = torch.compile(chunked_retention, dynamic=False)
    yield _row(shape, "retention (compiled)", compiled, heads, forward_roof_ms(q, k, v), repeats=9)


def measure_heads(shape: Shape, backends: list[str]) -> Iterator[report.Row]:
    """Heads of several channels by their kernels, and one size of them by plain PyTorch."""
    size = (shape.rows, shape.channels, shape.length)
    q, k, v, do = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    roof = forward_roof_ms(q, k, v)
    for head_dim in (2, 4, 8):
        operators = _operators(shape.channels, head_dim)
        for backend in backends:
            if backend == "gluon" and head_dim not in HOPPER_HEAD_DIMS:
                continue
            row = _kernel_row(shape, backend, operators, (q, k, v, do), roof)
            yield row | {"path": f"{backend}, head_dim {head_dim}"}
    path = _torch_path(operators, head_dim)
    with suppress(torch.cuda.OutOfMemoryError):  # it holds every pair of channels in float32
        yield _row(shape, f"torch, head_dim {head_dim}", path, (q, k, v, do), roof, repeats=1)


def measure_captured(shape: Shape, backends: list[str]) -> Iterator[report.Row]:
    """Small work in a CUDA graph, where the host does not count: kernels, attention by cuDNN."""
    size = (shape.rows, shape.channels, shape.length)
    tensors = tuple(torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    roof, operators = forward_roof_ms(*tensors[:3]), _operators(shape.channels)
    for backend in backends:
        row = _kernel_row(shape, backend, operators, tensors, roof, captured=True)
        yield row | {"path": f"{backend}, in a graph"}
    attend, heads = _attention(SDPBackend.CUDNN_ATTENTION), [_to_heads(x) for x in tensors]
    yield _row(shape, "sdpa cudnn, in a graph", attend, heads, roof, captured=True)


def _operators(channels: int, head_dim: int = 1) -> ChunkOperators:
    torch.manual_seed(0)
    with torch.no_grad():
        taps = ShiftSSM(channels).taps().cuda()
        made = DiagonalSSM(channels // head_dim).cuda().system().chunk_operators(taps)
    assert made.F is not None
    half = {name: getattr(made, name).bfloat16().contiguous() for name in "MKPF"}
    return replace(made, **half)


def _kernel_row(
    shape: Shape,
    backend: str,
    operators: ChunkOperators,
    tensors: tuple[Tensor, ...],
    roof: float,
    captured: bool = False,
) -> report.Row:
    q, k, v, do = tensors
    matrices = [x.detach() for x in library.kernel_operators(operators)]
    inputs = (q, k, v, *matrices, None, None, None)

    def forward() -> list[Tensor]:
        return torch.ops.h3lm.h3_core_fwd(*inputs, True, False, True, backend)

    def both() -> None:
        saved = forward()
        torch.ops.h3lm.h3_core_bwd(do, None, *inputs, saved[2], backend)

    forward_ms, both_ms = (_time(call, captured=captured) for call in (forward, both))
    return _as_row(shape, backend, roof, forward_ms, both_ms, both, do)


def _time(call: Callable[[], object], repeats: int = 25, *, captured: bool = False) -> float:
    """Milliseconds of a call, NaN if it cannot be captured."""
    if not captured:
        return measure.median_ms(call, repeats, ahead=True)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        call()
    torch.cuda.synchronize()
    return measure.replayed_ms(lambda: [call() for _ in range(CAPTURED)], repeats)[0] / CAPTURED


def _as_row(
    shape: Shape,
    name: str,
    roof: float,
    forward_ms: float,
    both_ms: float,
    both: Callable[[], None],
    like: Tensor,
) -> report.Row:
    extra = float(measure.extra_bytes(both))
    return {
        "shape": str(shape), "path": name, "roof ms": roof, "forward ms": forward_ms,
        "% of roof": 100 * roof / forward_ms, scaling.TIME: both_ms,
        "% of its roof": 100 * both_roof_ms(roof) / both_ms,
        "memory": extra / (8 * like.numel() * like.element_size()), scaling.MEMORY: extra,
    }  # fmt: skip


def _row(
    shape: Shape,
    name: str,
    forward: Forward,
    tensors: list[Tensor] | tuple[Tensor, ...],
    roof: float,
    repeats: int = 25,
    captured: bool = False,
) -> report.Row:
    *inputs, do = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]

    def both() -> None:
        torch.autograd.grad(forward(*inputs), inputs, do)

    forward_ms = _time(lambda: forward(*inputs), repeats, captured=captured)
    both_ms = _time(both, repeats, captured=captured)
    return _as_row(shape, name, roof, forward_ms, both_ms, both, do)


def _torch_path(operators: ChunkOperators, head_dim: int = 1) -> Forward:
    whole = replace(operators, **{n: getattr(operators, n).detach().float() for n in "MKPF"})
    assert whole.taps is not None
    taps = whole.taps
    return lambda q, k, v: h3_core(q, k, v, taps, whole, head_dim=head_dim, backend="torch")[0]


def _fft(operators: ChunkOperators, length: int) -> Forward:
    """Both convolutions by `torch.fft` in float32, gates in bfloat16, filters made beforehand."""
    assert operators.taps is not None
    filters = operators.taps, operators.system.filter(length).detach()
    spectra = [torch.fft.rfft(f, n=2 * length) for f in filters]

    def convolve(x: Tensor, spectrum: Tensor) -> Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x.float(), n=2 * length) * spectrum, n=2 * length)
        return y[..., :length].to(x.dtype)

    return lambda q, k, v: q * convolve(convolve(k, spectra[0]) * v, spectra[1])


def _to_heads(x: Tensor) -> Tensor:
    heads = x.unflatten(1, (-1, HEAD_WIDTH)).transpose(2, 3)
    return heads.contiguous()


def _retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with a fixed decay for each head, by flash-linear-attention."""
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v)[0]


def chunked_retention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Retention by chunks (Sun et al. 2023, arXiv 2307.08621, eq. 7), all products in one dtype.

    o_t = sum over s <= t of decay^(t - s) (q_t k_s) v_s, with the decays 1 - 2^(-5 - head). States
    of chunks are summed by one product with powers of the decay, in float32.

    Args:
        q, k, v: (B, heads, L, d), L a multiple of `chunk`.

    Returns:
        (B, heads, L, d).
    """
    n = q.shape[2] // chunk
    q, k, v = (x.unflatten(2, (n, chunk)) for x in (q * q.shape[-1] ** -0.5, k, v))
    rate = torch.log1p(-(2.0 ** (-5.0 - torch.arange(q.shape[1], device=q.device))))[:, None, None]
    at = torch.arange(chunk, device=q.device)
    ago = at[:, None] - at
    within = torch.where(ago >= 0, torch.exp(rate * ago.clamp(min=0)), 0.0).to(q.dtype)
    o = ((q @ k.mT) * within[:, None]) @ v
    into = torch.exp(rate * (chunk - 1 - at)[:, None]).to(q.dtype)
    added = (k * into[:, None]).mT @ v  # [B, heads, n, d, d]
    number = torch.arange(n, device=q.device)
    apart = number[:, None] - number - 1
    passed = torch.where(apart >= 0, torch.exp(rate * chunk * apart.clamp(min=0)), 0.0)
    states = torch.einsum("hnm,bhmde->bhnde", passed, added.float()).to(q.dtype)
    out_of = torch.exp(rate * (at + 1)[:, None]).to(q.dtype)
    return (o + (q * out_of[:, None]) @ states).flatten(2, 3)


def _attention(backend: SDPBackend) -> Forward:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend
