"""Is every fast path right on this machine? Compared with the definition, here and now."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from h3lm import flashconv
from h3lm.flashconv import stepwise
from h3lm.flashconv.dispatch import BACKENDS, capability
from h3lm.flashconv.kernels.conv_plan import checks, fault
from h3lm.flashconv.kernels.self_test import hopper_fault, segments_fault
from h3lm.layers import border
from h3lm.layers.self_test import step_fault
from h3lm.models.generation import pick_device
from h3lm.ssm import DiagonalSSM, DiagonalSystem, ShiftSSM, fused_filters
from h3lm.ssm.fused_operators import operators_fault
from h3lm.ssm.fused_parameters import parameters_fault

PACKAGES = ("h3lm", "torch", "triton", "transformers", "accelerate", "safetensors", "datasets")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A fast path may be twice as wrong as plain PyTorch in the same dtype: in half precision as the
# steps that round, in float32 as the plain path, or as what matrix units lose
MAX_RATIO = 2.0
STEPS = "steps"  # runs `stepwise`
LOST = 2e-6
DRAWS = 4  # of numbers; the error of few sums is luck
HEADS = {"h3_core, head_dim 2": 2, "h3_core, head_dim 8": 8}
PACKED = "h3_core, packed"
CHUNKS = "ssm_conv, fft_chunks"
# kernels of long convolution round the result alone, and are held to the plain path in these dtypes
# and to a few roundings of float32, where it is known what the matrix units' sums lose
EXACT = {("fft_conv", dtype): 2.0**-22 for dtype in (torch.float32, torch.float16)}


@dataclass(frozen=True)
class Check:
    """One comparison with the float64 definition.

    Attributes:
        name: What was run.
        error: Largest relative error of the output and all gradients.
        allowed: What it may be.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the path may be trusted; a NaN never passes."""
        return self.error <= self.allowed


def examine(device: str, say: Callable[[str], None]) -> bool:
    """Print what is here and check it; returns whether everything passed."""
    where = pick_device(device)
    say(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        say(f"{package} {_version_of(package)}")
    say(_describe(where))
    good = True
    for op, dtype, backend in _paths():
        try:
            check = run_check(op, dtype, backend, where)
        except ValueError as reason:  # the backend's own word that it does not do this
            say(f"  --    {op} {backend} {_short(dtype)}: not here ({reason})")
            continue
        good &= check.passed
        mark = "ok  " if check.passed else "FAIL"
        say(f"  {mark}  {check.name}: error {check.error:.1e}, allowed {check.allowed:.1e}")
    for algorithm, dtype, length in checks(where) if where.type == "cuda" else ():
        name = f"fft_conv by {algorithm}, rows of {length} of {_short(dtype)}"
        if wrong := fault(algorithm, where, dtype, length):
            good = False
            say(f"  FAIL  {name}: {wrong}; torch.fft runs in its place")
        else:
            say(f"  ok    {name}: agrees with torch.fft")
    for name, agrees, wrong in _self_tests(where) if where.type == "cuda" else ():
        good &= not wrong
        say(f"  FAIL  {name}: {wrong}" if wrong else f"  ok    {name}: {agrees}")
    choice = flashconv.choose("h3_core", where, torch.bfloat16)
    say(f"h3_core in bfloat16 on {where} runs by {choice.backend}: {choice.reason}")
    say("all paths agree with their definition" if good else "a path is wrong: do not use it")
    return good


def run_check(op: str, dtype: torch.dtype, backend: str, device: torch.device) -> Check:
    """Compare one path of one op with the definition in float64, forward and gradients.

    Raises:
        ValueError: if the backend is not here or does not take this.
    """
    exact = _exact(op)
    fast = _run(op, dtype, backend, device)
    known = backend != "torch" and capability(device) == (9, 0) and (op, dtype) in EXACT
    floor = EXACT[op, dtype] if known else LOST if dtype == torch.float32 else 0.0
    beside = "torch" if floor else STEPS
    plain = fast if backend == beside else _run(op, dtype, beside, device)
    errors, allowed = [], []
    for a, b, c in zip(fast, plain, exact, strict=True):
        errors.append(_relative(a, c))
        allowed.append(MAX_RATIO * max(floor, _relative(b, c) if b is not a else 0.0))
    worst = max(range(len(errors)), key=lambda i: _excess(errors[i], allowed[i]))
    return Check(f"{op} {backend} {_short(dtype)}", errors[worst], allowed[worst])


def _self_tests(device: torch.device) -> Iterator[tuple[str, str, str]]:
    """What is checked before its first use: name, what it agrees with, what is wrong with it."""
    if torch.cuda.get_device_capability(device)[0] == 9:
        yield "Hopper kernels", "as the Triton kernels", hopper_fault(device, False)
        yield "Hopper kernels of heads", "as the Triton kernels", hopper_fault(device, True)
    yield "few channels in segments", "as whole rows", segments_fault(device)
    yield "making of operators", "as in PyTorch", operators_fault(device)
    yield "parameters of SSMs", "as in PyTorch", parameters_fault(device)
    yield "decoding step", "as its modules", step_fault(device)
    for kind, modes in fused_filters.checks():
        name = f"filters of S4, {kind}, up to {modes} modes"
        yield name, "as in PyTorch", fused_filters.fault(device, kind, modes)
    yield "batch norm and gate", "as in PyTorch", border.fault(device)
    if find_spec("triton") is not None:
        from h3lm.models import loss_triton

        yield "loss of the head", "as in PyTorch", loss_triton.fault(device)


@cache
def _exact(op: str) -> list[Tensor]:
    return _run(op, torch.float64, "reference", torch.device("cpu"))


def _excess(error: float, allowed: float) -> float:
    return float("inf") if error != error else error / allowed


def _paths() -> Iterator[tuple[str, torch.dtype, str]]:
    for op in ("h3_core", *HEADS, PACKED, "ssm_conv", CHUNKS, "fft_conv"):
        for backend in BACKENDS:
            if backend not in ("auto", "reference"):
                for dtype in DTYPES:
                    yield op, dtype, backend


def _run(op: str, dtype: torch.dtype, backend: str, device: torch.device) -> list[Tensor]:
    """Output and gradients of one op, of a few draws that are the same for every call."""
    draws = [_draw(op, dtype, backend, device, seed) for seed in range(DRAWS)]
    return [torch.stack(results) for results in zip(*draws, strict=True)]


def _draw(
    op: str, dtype: torch.dtype, backend: str, device: torch.device, seed: int
) -> list[Tensor]:
    B, D, L = 1 if op == PACKED else 2, 32, 304
    head_dim = HEADS.get(op, 1)
    torch.manual_seed(seed)
    with torch.no_grad():
        taps, made = ShiftSSM(D).taps(), DiagonalSSM(D // head_dim).system()
        f = made.filter(L)
    # drawn in bfloat16, so that every dtype is given the same numbers
    q, k, v, grad = (x.to(device, dtype) for x in torch.randn(4, B, D, L).to(torch.bfloat16))
    wide = dtype == torch.float64

    def leaf(x: Tensor) -> Tensor:
        x = x.to(device)
        return x.to(torch.complex128 if x.is_complex() else torch.float64) if wide else x

    taps, f, a, b, c, skip = map(leaf, (taps, f, made.a, made.b, made.c, made.skip))
    system = DiagonalSystem(a, b, c, skip)
    used = {op: [a, b, c, skip] for op in ("ssm_conv", CHUNKS)} | {"fft_conv": [f, skip]}
    inputs = [q, k, v, *used.get(op, [taps, a, b, c, skip])]
    for x in inputs:
        x.requires_grad_()
    if op not in used:
        bounds = torch.tensor([0, 100, L], device=device) if op == PACKED else None
        steps = backend == STEPS
        run = stepwise.h3_core if steps else partial(flashconv.h3_core, backend=backend)
        y, _ = run(q, k, v, taps, system, head_dim=head_dim, cu_seqlens=bounds)
    elif backend == STEPS:
        gates = {"pre_gate": v, "post_gate": q}
        if op == "fft_conv":
            y = stepwise.fft_conv(k, f, skip=skip, **gates)
        else:
            y, _ = stepwise.ssm_conv(k, system, **gates)
    elif op != "fft_conv":
        # chunks that are joined by a state, the last one unfinished
        chunked = op == CHUNKS
        y, _ = flashconv.ssm_conv(
            k, flashconv.fft_operators(system, L, 128) if chunked else system,
            pre_gate=v, post_gate=q, method="fft_chunks" if chunked else "scan", backend=backend,
        )  # fmt: skip
    else:
        y = flashconv.fft_conv(k, f, skip=skip, pre_gate=v, post_gate=q, backend=backend)
    results = [y, *torch.autograd.grad(y, inputs, grad)]
    return [torch.view_as_real(x) if x.is_complex() else x for x in _detached(results)]


def _detached(tensors: list[Tensor]) -> Iterator[Tensor]:
    for x in tensors:
        yield x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"device {device}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"device {properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )
