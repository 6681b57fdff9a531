"""The kernels against plain PyTorch: in Triton's interpreter on a CPU, compiled on a GPU.

Every result and every gradient is compared with float64 by Frobenius norm, and may be twice as
wrong as plain PyTorch in the same dtype on the same inputs: as `stepwise` in half precision, as
the plain path in float32, where nothing is rounded between steps.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from h3lm.bench.accuracy import (
    HARDLY,
    Run,
    as_a_whole,
    by_kernel,
    by_steps,
    everything,
    random_problem,
    random_system,
    widened,
)
from h3lm.flashconv import (
    chunked,
    dispatch,
    h3_core,
    h3_core_qkv,
    h3_end_state,
    library,
    ssm_conv,
    stepwise,
)  # fmt: skip
from h3lm.flashconv.dispatch import Problem, choose, segments
from h3lm.flashconv.kernels import self_test
from h3lm.flashconv.kernels.launch import Operators, multiprocessors, segment_length
from h3lm.flashconv.state import H3State
from h3lm.ssm.operators import ChunkOperators, DiagonalSystem

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

# of numbers, at most: what is a few sums has an error by luck. With luck a few draws would pass,
# too: before all are taken, an error must be within EARLY times plain PyTorch's, and then within 2
DRAWS, EARLY = 12, 1.5
OF_ROWS = ("o", "dq", "dk", "dv", "end x", "dx", "dshift")  # by row of the batch

_system = partial(random_system, device=DEVICE, decay=None)
_leaves = partial(random_problem, device=DEVICE)


def _check(
    run: Run, leaves: dict[str, Tensor], final: bool, head_dim: int = 1,
    bounds: Tensor | None = None, by_row: bool = False, gated_conv: bool = False,
) -> None:  # fmt: skip
    exactly, plain = as_a_whole(head_dim, bounds), by_steps(head_dim, bounds)
    if gated_conv:
        exactly, plain = _ssm_conv(chunked.ssm_conv), _ssm_conv(stepwise.ssm_conv)
    if leaves["q"].dtype == torch.float32:
        plain = exactly

    def squares(wrong: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
        assert wrong.keys() == exact.keys()
        parts = {name: (wrong[name].double() - exact[name]).square() for name in exact}
        return {
            name: x.flatten(1).sum(1) if by_row and name in OF_ROWS else x.sum()[None]
            for name, x in parts.items()
        }

    draws: list[tuple[dict[str, Tensor], ...]] = []
    while len(draws) < DRAWS:
        problem = _with_other_signs(leaves) if draws else leaves
        exact = everything(exactly, widened(problem), final)
        draws.append(tuple(squares(everything(x, problem, final), exact) for x in (run, plain)))
        found, allowed = (
            {n: sum(x[n] for x in side) for n in exact} for side in zip(*draws, strict=True)
        )
        limit = 2 if len(draws) == DRAWS else EARLY
        too_wrong = [n for n in exact if not (found[n] <= limit**2 * allowed[n]).all()]
        assert all(x.isfinite().all() for x in (*found.values(), *allowed.values()))
        if not too_wrong:
            return
    times = {name: float((found[name] / allowed[name]).sqrt().max()) for name in too_wrong}
    raise AssertionError(f"times plain PyTorch's error: {times}")


def _ssm_conv(op: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    """`ssm_conv` of k between the gates v and q."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, operators: ChunkOperators, state: H3State | None
    ) -> tuple[Tensor, H3State | None]:
        assert state is not None
        system = operators.system  # operators of the filter as well have a gradient of taps, 0
        if op is not stepwise.ssm_conv:
            system = system.chunk_operators()
        y, x = op(k, system, pre_gate=v, post_gate=q, initial_state=state.diagonal)
        return y, H3State(state.shift, x)

    return run


def _with_other_signs(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """A problem like this one: of the same parameters, and of numbers of the same sizes."""
    return {
        name: x * (2 * torch.randint(0, 2, x.shape) - 1).to(x.device, x.dtype)
        if name in ("q", "k", "v", "shift", "x") else x
        for name, x in leaves.items()
    }  # fmt: skip


INTERPRETED = [
    # B, D, L, modes, taps, state
    (2, 2, 100, 8, 64, True),
    (1, 1, 30, 8, 65, True),
    (1, 1, 2200, 8, 64, True),
    (5, 1, 1024, 8, 64, True),
    (1, 2, 64, 12, 3, False),
    (2, 1, 65, 8, 128, True),
    (1, 1, 1, 8, 64, True),
]


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton_kernels_equal_float64_on_small_problems(case: tuple) -> None:
    *shape, state = case
    leaves = _leaves(*shape, torch.float32, state)
    _check(by_kernel("triton", True), leaves, True)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("rows", "head_dim", "L", "n_taps"),
    [(3, 2, 100, 64), (5, 4, 128, 65), (2, 8, 100, 3), (1, 8, 192, 128)],
)
def test_triton_kernels_with_heads_of_several_channels(
    rows: int, head_dim: int, L: int, n_taps: int
) -> None:
    leaves = _leaves(rows, head_dim, L, 8, n_taps, torch.float32, True, head_dim)
    run = by_kernel("triton", True, head_dim)
    _check(run, leaves, True, head_dim)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    ("head_dim", "L", "decay"),
    [(1, 2048, None), (8, 2048, None), (8, 2048, HARDLY), (1, 32768, 0.999999)]
    + [
        pytest.param(head_dim, 8192, decay, marks=pytest.mark.gpu)
        for head_dim in (1, 2, 8)
        for decay in (None, HARDLY)
    ],
)
def test_float32_states_of_long_rows(head_dim: int, L: int, decay: float | None) -> None:
    # one rounding of the decay would count once for each chunk
    D = 16 if GPU else 1
    leaves = _leaves(1, D * head_dim, L, 32, 64, torch.float32, True, head_dim, decay=decay)
    _check(by_kernel("triton", True, head_dim), leaves, True, head_dim)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(("L", "modes", "n_taps"), [(128, 8, 17), (200, 32, 64)])
def test_triton_kernels_in_half_precision(L: int, modes: int, n_taps: int) -> None:
    leaves = _leaves(2, 1, L, modes, n_taps, torch.float16, True)
    _check(by_kernel("triton", True), leaves, True)


def _of_two_sizes(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two rows of a batch, of which the second is 2^-8 of the first in k and in v."""
    sizes = torch.tensor([2.0**3, 2.0**-5], device=DEVICE)
    of = {"k": 1, "v": 1, "shift": 1, "x": 2}
    return {
        name: x * (sizes ** of[name]).view(2, *[1] * (x.dim() - 1)).to(x.dtype) if name in of else x
        for name, x in leaves.items()
    }


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("head_dim", [1, 8])
def test_triton_kernels_in_half_precision_of_hard_problems(head_dim: int) -> None:
    sizes = (2, 4 * head_dim, 100, 8, 64, torch.float16, True, head_dim)
    run = by_kernel("triton", True, head_dim)
    _check(run, _leaves(*sizes, decay=HARDLY), True, head_dim)
    _check(run, _of_two_sizes(_leaves(*sizes)), True, head_dim, by_row=True)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("L", [70, pytest.param(4160, marks=pytest.mark.gpu)])
def test_gated_ssm_conv_in_half_precision(L: int) -> None:
    # products of bfloat16 are wrong in the interpreter
    leaves = _leaves(2, 4, L, 16, 3, torch.bfloat16 if GPU else torch.float16, True)
    _check(_ssm_conv(partial(library.ssm_conv, backend="triton")), leaves, True, gated_conv=True)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_ssm_conv_and_end_state_run_by_the_same_kernels() -> None:
    leaves = _leaves(2, 2, 200, 8, 64, torch.float32, True)
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    operators, plain = system.chunk_operators(leaves["taps"]), system.chunk_operators()
    q, k, v = (leaves[name].requires_grad_() for name in "qkv")
    state = H3State(leaves["shift"], leaves["x"])
    end = library.h3_end_state(k, v, operators, backend="triton", initial_state=state)
    expected = chunked.h3_end_state(k, v, operators, initial_state=state)
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-5)
    inputs = [k, v]
    grads, right = (torch.autograd.grad(x.diagonal.abs().sum(), inputs) for x in (end, expected))
    torch.testing.assert_close(grads, right, rtol=1e-3, atol=1e-4)
    bounds = torch.tensor([0, 70, 200], device=DEVICE)
    one = {"initial_state": leaves["x"], "cu_seqlens": bounds}
    found = library.ssm_conv(k[:1], plain, backend="triton", pre_gate=v[:1], **one)
    right = chunked.ssm_conv(k[:1], plain, pre_gate=v[:1], **one)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    for gates in ({}, {"pre_gate": q}, {"post_gate": v}, {"pre_gate": q, "post_gate": v}):
        y, x = library.ssm_conv(k, plain, backend="triton", initial_state=leaves["x"], **gates)
        z, e = chunked.ssm_conv(k, plain, initial_state=leaves["x"], **gates)
        torch.testing.assert_close((y, x), (z, e), rtol=1e-4, atol=1e-5)
        inputs = [k, *gates.values()]
        found, right = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, z))
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "backend", "word"),
    [
        ({}, "gluon", "Hopper"),
        ({"length": 1000}, "triton", "multiples of 16"),
        ({"aligned": False}, "triton", "multiples of 16"),
        ({"capability": (8, 9)}, "triton", "Hopper GPUs"),
        ({"capability": (8, 9), "num_modes": 64}, "torch", "160 KB"),
        ({"capability": (8, 9), "n_taps": 65}, "torch", "over 64 taps"),
        ({"capability": (8, 9), "n_taps": 65, "head_dim": 2}, "triton", "Hopper GPUs"),
        ({"capability": (7, 5)}, "torch", "8.0"),
        ({"capability": None}, "torch", "NVIDIA"),
        ({"num_modes": 16}, "triton", "d_state 64"),
        ({"n_taps": 128}, "triton", "64 taps"),
        ({"n_taps": 129}, "torch", "128 taps"),
        ({"head_dim": 8, "n_taps": 128}, "gluon", "Hopper"),
        ({"head_dim": 8, "length": 4080}, "triton", "multiples of 64"),
        ({"head_dim": 4}, "triton", "head_dim 1 and 8"),
        ({"head_dim": 3}, "torch", "head_dim"),
        ({"packed": True}, "triton", "cu_seqlens"),
        ({"chunk_length": 32}, "torch", "chunks of 64"),
        ({"has_triton": False}, "torch", "pip install triton"),
    ],
    ids=str,
)
def test_choice_follows_from_the_problem_and_says_why(
    change: dict, backend: str, word: str
) -> None:
    problem = Problem(**{"length": 4096, "has_triton": True} | change)
    choice = choose("h3_core", torch.device("cuda"), torch.bfloat16, "auto", problem)
    assert choice.backend == backend
    assert word in choice.reason


@pytest.mark.parametrize(
    ("L", "row", "first", "aligned"),
    [
        (4096, 2**28, 0, True),
        (2048, 2**28, 0, False),
        (2048, 4096, 0, True),
        (4096, 4104, 0, False),
        (4096, 8192, 8, False),
    ],
)
def test_rows_that_the_hopper_kernels_can_copy(L: int, row: int, first: int, aligned: bool) -> None:
    x = torch.empty(0, device="meta").as_strided((2, 1, L), (row, L, 1), first)
    assert dispatch.is_aligned(x) is aligned


def test_asking_for_what_a_backend_cannot_do_is_an_error() -> None:
    for backend in ("triton", "gluon"):
        with pytest.raises(ValueError, match=r"cannot run h3_core here: kernels need a CUDA"):
            choose("h3_core", torch.device("cpu"), torch.bfloat16, backend, Problem(64))
    problem = Problem(64, head_dim=3, has_triton=True)
    with pytest.raises(ValueError, match="head_dim 1"):
        choose("h3_core", torch.device("cuda"), torch.bfloat16, "triton", problem)


COMPILED = [
    # B, D, L, modes, taps, dtype, state
    (1, 4, 8192, 32, 64, torch.bfloat16, False),
    (4, 4, 2048, 32, 64, torch.bfloat16, True),
    (3, 4, 1008, 32, 64, torch.bfloat16, True),
    (2, 3, 4096 + 64 * 3 + 16, 32, 64, torch.bfloat16, True),
    (5, 3, 512, 32, 64, torch.float16, True),
    (1, 2, 16, 32, 64, torch.bfloat16, True),
    (9, 2, 64, 32, 5, torch.bfloat16, True),
    # more channels than multiprocessors: programs of one tile take several
    (2, 300, 4096 + 64 * 3 + 16, 32, 64, torch.bfloat16, True),
    (8, 300, 512, 32, 64, torch.float16, True),
    (1, 300, 1008, 32, 64, torch.bfloat16, True),
]
COMPILED_TRITON = [
    (2, 4, 4097, 32, 64, torch.bfloat16, True),
    (1, 4, 63, 32, 64, torch.bfloat16, True),
    (3, 2, 300, 32, 128, torch.bfloat16, True),
    (2, 2, 100, 64, 17, torch.float16, True),
    (1, 2, 1, 32, 64, torch.bfloat16, True),
    (2, 3, 2100, 8, 64, torch.bfloat16, False),
    (2, 2, 2049, 32, 64, torch.float32, True),
]
CASES = [("triton", case) for case in COMPILED + COMPILED_TRITON]
CASES += [pytest.param("gluon", case, marks=needs_hopper) for case in COMPILED]


@pytest.fixture
def _poisoned():
    """Fill what is allocated with NaN, so that an unwritten output fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore")  # cuBLAS under deterministic mode
@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_kernel_equals_float64_in_every_gradient(backend: str, case: tuple) -> None:
    *shape, dtype, state = case
    leaves = _leaves(*shape, dtype, state)
    _check(by_kernel(backend, True), leaves, True)
    first, second = (everything(by_kernel(backend, True), leaves, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "not deterministic"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("heads", [False, True])
def test_operators_may_be_rounded_before(heads: bool) -> None:
    kernels = self_test.hopper_kernels(DEVICE, heads)
    assert kernels is not None
    tensors, operators = self_test._problem(DEVICE, 4096, 8 if heads else 1, 2)
    rounded = operators.rounded(torch.bfloat16)
    found, expected = (self_test._everything(kernels, tensors, x) for x in (rounded, operators))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@needs_hopper
def test_a_program_copies_the_rounded_operators_of_several_channels() -> None:
    kernels = self_test.hopper_kernels(DEVICE)
    assert kernels is not None
    taps = torch.randn(700, 64, device=DEVICE) / 8
    made = library.kernel_operators(_system(700, 32).chunk_operators(taps))
    operators = Operators(*(x.detach() for x in made))
    for B, L in ((8, 512), (1, 2048), (3, 1040)):
        tensors = tuple(torch.randn(B, 700, L, device=DEVICE).bfloat16() for _ in range(4))
        rounded = operators.rounded(torch.bfloat16)
        found, expected = (self_test._everything(kernels, tensors, x) for x in (rounded, operators))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


HEADS = [
    # B, D, L, modes, taps, dtype, state, head_dim
    (2, 4, 1040, 32, 64, torch.bfloat16, True, 2),
    (5, 8, 1024, 32, 64, torch.bfloat16, True, 4),
    (2, 16, 1040, 32, 64, torch.bfloat16, True, 8),
    (3, 16, 256, 32, 64, torch.bfloat16, False, 8),
    (3, 8, 130, 64, 128, torch.float16, True, 8),
    (2, 8, 300, 8, 3, torch.float32, True, 8),
]


HEADS_HOPPER = [
    (3, 16, 256, 32, 64, torch.bfloat16, False, 8),
    (9, 8, 64, 32, 128, torch.bfloat16, True, 8),
    (2, 24, 2048, 32, 5, torch.float16, True, 8),
    (1, 24, 2048, 32, 5, torch.bfloat16, True, 8),
    (1100, 8, 128, 32, 64, torch.bfloat16, True, 8),
]
HEADS_CASES = [("triton", case) for case in HEADS]
HEADS_CASES += [pytest.param("gluon", case, marks=needs_hopper) for case in HEADS_HOPPER]


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "case"), HEADS_CASES, ids=str)
def test_heads_of_several_channels_in_every_gradient(backend: str, case: tuple) -> None:
    *shape, dtype, state, head_dim = case
    leaves = _leaves(*shape, dtype, state, head_dim)
    run = by_kernel(backend, True, head_dim)
    _check(run, leaves, True, head_dim)
    first, second = (everything(run, leaves, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "not deterministic"


HARD = [  # backend, L, dtype, head_dim
    (backend, *case)
    for backend in ("triton", "gluon")
    for case in [
        (8192, torch.bfloat16, 1),
        (1024, torch.bfloat16, 1),
        (1024, torch.float16, 1),
        (1024, torch.bfloat16, 8),
        (1024, torch.float16, 8),
    ]
] + [("triton", 1000, torch.bfloat16, 2)]
HARD = [pytest.param(*case, marks=needs_hopper if case[0] == "gluon" else ()) for case in HARD]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "L", "dtype", "head_dim"), HARD)
def test_systems_that_hardly_decay(backend: str, L: int, dtype: torch.dtype, head_dim: int) -> None:
    leaves = _leaves(2, 16, L, 32, 64, dtype, True, head_dim, decay=HARDLY)
    _check(by_kernel(backend, True, head_dim), leaves, True, head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "L", "dtype", "head_dim"), HARD)
def test_rows_of_very_different_size(
    backend: str, L: int, dtype: torch.dtype, head_dim: int
) -> None:
    leaves = _of_two_sizes(_leaves(2, 16, L, 32, 64, dtype, True, head_dim))
    _check(by_kernel(backend, True, head_dim), leaves, True, head_dim, by_row=True)


def _check_packed(
    lengths: tuple[int, ...], D: int, sizes: tuple, head_dim: int, repeat: bool = False
) -> None:
    modes, n_taps, dtype, state = sizes
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    L = sum(lengths)
    leaves = _leaves(1, D, L, modes, n_taps, dtype, state, head_dim, sequences=len(lengths))
    run = by_kernel("triton", True, head_dim, bounds)
    _check(run, leaves, True, head_dim, bounds)
    if repeat:
        first, second = (everything(run, leaves, True) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), "not deterministic"


PACKED = [  # lengths, channels, (modes, taps, dtype, state), head_dim
    ((70, 1, 64, 130), 1, (8, 64, torch.float32, True), 1),
    ((2100, 5, 64), 1, (8, 65, torch.float32, True), 1),
    ((3, 200), 2, (8, 3, torch.float32, False), 1),
    ((70, 1, 64, 130, 2), 2, (8, 64, torch.float32, True), 2),
    ((70, 128), 8, (8, 128, torch.float32, True), 8),
]


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_equal_float64(case: tuple) -> None:
    _check_packed(*case)


PACKED_COMPILED = [
    ((1000, 4096, 1, 63, 64, 65, 5000), 2, (32, 64, torch.bfloat16, True), 1),
    ((4097, 300, 12), 3, (32, 128, torch.bfloat16, True), 1),
    ((17, 4200, 2), 2, (8, 64, torch.float32, True), 1),
    ((1000, 4096, 1, 63, 64, 65), 16, (32, 64, torch.bfloat16, True), 8),
    ((300, 64, 5, 128, 1), 4, (32, 64, torch.float16, True), 2),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PACKED_COMPILED, ids=str)
def test_packed_sequences_in_every_gradient(case: tuple) -> None:
    _check_packed(*case, repeat=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=needs_hopper)])
def test_any_strides_of_rows_and_channels(backend: str) -> None:
    leaves = _leaves(3, 4, 512, 32, 64, torch.bfloat16, False)
    for name in "qkv":  # (D, B, L) in memory, beside each other
        leaves[name] = leaves[name].transpose(0, 1).contiguous().transpose(0, 1)
    _check(by_kernel(backend, False), leaves, False)


def _thirds(backend: str, outermost: bool, head_dim: int = 1) -> Run:
    """The core of one tensor that holds q, k and v; channels may be outermost in memory."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, operators: ChunkOperators, state: H3State | None
    ) -> tuple[Tensor, H3State | None]:
        qkv = torch.cat([q, k, v], 1)
        if outermost:
            qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
        o, end = library.h3_core(
            *qkv.chunk(3, 1), operators, backend=backend, head_dim=head_dim, initial_state=state,
            with_state=True, qkv=qkv,
        )  # fmt: skip
        if head_dim == 1 and len(qkv) > 1:  # what follows a projection needs no copy
            assert o.transpose(0, 1).is_contiguous() == outermost
        return o, end

    return run


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("outermost", [False, True])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_q_k_and_v_in_one_tensor(outermost: bool, head_dim: int) -> None:
    leaves = _leaves(2, 2, 100, 8, 64, torch.float32, True, head_dim)
    _check(_thirds("triton", outermost, head_dim), leaves, True, head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("outermost", [False, True])
@pytest.mark.parametrize("case", [(3, 4, 512), (16, 4, 64), (2, 4, 4672), (1, 4, 256)], ids=str)
@pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=needs_hopper)])
def test_q_k_and_v_in_one_tensor_by_each_kernel(backend: str, case: tuple, outermost: bool) -> None:
    leaves = _leaves(*case, 32, 64, torch.bfloat16, True)
    _check(_thirds(backend, outermost), leaves, True)


def test_q_k_and_v_in_one_tensor_are_the_call_with_three() -> None:
    (q, k, v), taps, system = _public_call(70, torch.float32)
    qkv = torch.cat([q, k, v], 1).detach().requires_grad_()
    for options in ({}, {"reverse": True}, {"backend": "torch"}):
        found, end = h3_core_qkv(qkv, taps, system, return_final_state=True, **options)
        expected, last = h3_core(q, k, v, taps, system, return_final_state=True, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(tuple(end), tuple(last))
        (whole,) = torch.autograd.grad(found.square().sum(), qkv)
        parts = torch.autograd.grad(expected.square().sum(), (q, k, v))
        torch.testing.assert_close(whole, torch.cat(parts, 1))
    with pytest.raises(ValueError, match="qkv has 8 channels, not 3 times the 4 of the taps"):
        h3_core_qkv(qkv[:, :8], taps, system)


def _public_call(L: int, dtype: torch.dtype = torch.bfloat16):
    leaves = _leaves(2, 4, L, 32, 64, dtype, False)
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    return [leaves[name].requires_grad_() for name in "qkv"], leaves["taps"], system


@pytest.mark.gpu
@needs_triton
def test_two_halves_with_a_state_equal_one_run() -> None:
    (q, k, v), taps, system = _public_call(1024)
    whole, end = h3_core(q, k, v, taps, system, return_final_state=True)
    state = h3_end_state(k[..., :400], v[..., :400], taps, system)
    rest, last = h3_core(
        q[..., 400:], k[..., 400:], v[..., 400:], taps, system,
        initial_state=state, return_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(rest, whole[..., 400:], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(last.diagonal, end.diagonal, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(end.diagonal.abs())
    _, of_whole = h3_core(q[..., :400], k[..., :400], v[..., :400], taps, system,
                          return_final_state=True)  # fmt: skip
    ways = [
        torch.autograd.grad((x.diagonal.real * weight).sum(), (k, v), retain_graph=True)
        for x in (state, of_whole)
    ]
    for found, expected in zip(*ways, strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@needs_triton
def test_reversed_run_equals_plain_pytorch() -> None:
    (q, k, v), taps, system = _public_call(500)
    found, _ = h3_core(q, k, v, taps, system, reverse=True)
    expected, _ = h3_core(q, k, v, taps, system, reverse=True, backend="torch")
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@needs_triton
@pytest.mark.filterwarnings("ignore")  # of the interpreter and the checker
@pytest.mark.parametrize("cut", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_opcheck_in_the_interpreter(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "segments", lambda *problem: cut)
    leaves = _leaves(1, 1, 70 if cut == 1 else 4160, 8, 3, torch.float32, False)
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    operators = system.chunk_operators(leaves["taps"])
    M, K, P, decay, _ = library._kernel_matrices(operators, None, torch.float32)
    matrices = (library._filter_blocks(operators), M, K, P, decay)
    given = [x.detach().requires_grad_() for x in (*(leaves[n] for n in "qkv"), *matrices)]
    inputs = (*given, None, None, None, True, True, True, "triton")
    torch.library.opcheck(torch.ops.h3lm.h3_core_fwd.default, inputs)
    if cut == 1:
        qkv = torch.cat(given[:3], 1).detach().requires_grad_()
        inputs = (qkv, *given[3:], None, None, None, True, True, "triton")
        torch.library.opcheck(torch.ops.h3lm.h3_core_qkv_fwd.default, inputs)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=needs_hopper)])
def test_opcheck(backend: str) -> None:
    (q, k, v), taps, system = _public_call(256)
    operators: ChunkOperators = system.chunk_operators(taps)
    matrices = library.kernel_operators(operators)
    inputs = (q, k, v, *matrices, None, None, None, True, True, True, backend)
    torch.library.opcheck(torch.ops.h3lm.h3_core_fwd.default, inputs)
    for outermost in (False, True):  # in memory, as a projection leaves it
        qkv = torch.cat([q, k, v], 1).detach()
        if outermost:
            qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
        inputs = (qkv.requires_grad_(), *matrices, None, None, None, True, True, backend)
        torch.library.opcheck(torch.ops.h3lm.h3_core_qkv_fwd.default, inputs)


@pytest.mark.gpu
@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore:Torchinductor does not support:UserWarning")  # complex decays
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, taps: Tensor, system: DiagonalSystem) -> Tensor:
        return h3_core(q, k, v, taps, system)[0].sin()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for L in (256, 320, 384) if dynamic else (256,):
        (q, k, v), taps, system = _public_call(L)
        found, expected = compiled(q, k, v, taps, system), run(q, k, v, taps, system)
        torch.testing.assert_close(found, expected)
        grad = torch.autograd.grad(found.float().sum(), [q, k, v])
        right = torch.autograd.grad(expected.float().sum(), [q, k, v])
        torch.testing.assert_close(grad, right, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@needs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_packed_rows_compile_in_one_graph() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, taps: Tensor, system: DiagonalSystem, at: Tensor):
        o, end = h3_core(q, k, v, taps, system, cu_seqlens=at, return_final_state=True)
        return o, torch.view_as_real(end.diagonal), end.shift

    (q, k, v), taps, system = _public_call(384)
    q, k, v = (x[:1].detach().requires_grad_() for x in (q, k, v))
    at = torch.tensor([0, 100, 101, 384], device=DEVICE)
    compiled = torch.compile(run, fullgraph=True)
    found, expected = (f(q, k, v, taps, system, at) for f in (compiled, run))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # products in another order
    grad = torch.autograd.grad(found[0].float().sum(), [q, k, v])
    right = torch.autograd.grad(expected[0].float().sum(), [q, k, v])
    torch.testing.assert_close(grad, right, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("packed", [False, True])
def test_runs_under_a_cuda_graph(packed: bool) -> None:
    (q, k, v), taps, system = _public_call(512)
    operators = system.chunk_operators(taps)
    q, k, v = (x[:1].detach() for x in (q, k, v))
    at = torch.tensor([0, 100, 101, 512], device=DEVICE) if packed else None
    expected, _ = h3_core(q, k, v, taps, operators, cu_seqlens=at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = h3_core(q, k, v, taps, operators, cu_seqlens=at)
    if at is not None:  # one graph serves all boundaries of so many sequences
        at.copy_(torch.tensor([0, 64, 300, 512]))
        expected, _ = h3_core(q, k, v, taps, operators, cu_seqlens=at)
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@needs_triton
def test_float16_products_up_to_its_range() -> None:
    # |s|, |s v| and the states must stay below 65504: the stated range, here up to 3e4
    leaves = _leaves(1, 2, 256, 32, 1, torch.float16, False)
    leaves["taps"] = torch.ones_like(leaves["taps"])
    leaves["k"] = leaves["k"].clamp(-1, 1) * 170
    leaves["v"] = leaves["v"].clamp(-1, 1) * 170
    leaves["q"] = leaves["q"] * 1e-3
    leaves["c"], leaves["skip"] = leaves["c"] * 0, torch.ones_like(leaves["skip"])
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    o, _ = h3_core(*(leaves[name] for name in "qkv"), leaves["taps"], system)
    expected = leaves["q"].float() * leaves["k"].float() * leaves["v"].float()
    torch.testing.assert_close(o.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("method", ["auto", "scan", "fft_chunks"])
def test_ssm_conv_chooses_a_kernel(method: str) -> None:
    (q, k, v), _, system = _public_call(500)
    found, _ = ssm_conv(k, system, pre_gate=v, post_gate=q, method=method)
    expected, _ = ssm_conv(k, system, pre_gate=v, post_gate=q, backend="torch")
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("programs", "L", "expected"),
    [
        (768, 1 << 20, 1),
        (8, 1 << 20, 32),
        (16, 1 << 20, 16),
        (8, 4096, 1),
        (133, 1 << 22, 1),
        (132, 1 << 22, 2),
        (1, 1_000_003, 28),
    ],
)
def test_rows_are_cut_where_channels_do_not_fill_the_gpu(
    programs: int, L: int, expected: int
) -> None:
    found = segments(programs, L, 132)
    assert found == expected
    if found > 1:
        assert L - (found - 1) * segment_length(L, found) > 0


SEGMENTED = [
    # B, D, L, taps, state, segments
    (1, 1, 4096 + 70, 64, True, 2),
    pytest.param((2, 1, 2 * 4096, 65, True, 2), marks=pytest.mark.slow),
    pytest.param((1, 1, 2 * 4096 + 2001, 3, False, 3), marks=pytest.mark.slow),
]


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments_side_by_side_equal_float64(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    B, D, L, n_taps, state, cut = case
    monkeypatch.setattr(dispatch, "segments", lambda *problem: cut)
    leaves = _leaves(B, D, L, 8, n_taps, torch.float32, state)
    _check(by_kernel("triton", True), leaves, True)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_end_state_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "segments", lambda *problem: 2)
    leaves = _leaves(1, 1, 4096 + 150, 8, 64, torch.float32, True)
    system = DiagonalSystem(*(leaves[name] for name in ("a", "b", "c", "skip")))
    operators = system.chunk_operators(leaves["taps"])
    k, v, state = leaves["k"], leaves["v"], H3State(leaves["shift"], leaves["x"])
    end = library.h3_end_state(k, v, operators, backend="triton", initial_state=state)
    expected = chunked.h3_end_state(k, v, operators, initial_state=state)
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_segments_are_checked_before_they_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from h3lm.flashconv.kernels import segments as in_segments  # loads Triton

    device = torch.device("cuda:0" if GPU else "cpu")
    self_test.segments_fault.cache_clear()
    assert self_test.segments_fault(device) == ""
    right = in_segments._scan

    def wrong(*given, **named):
        states, end = right(*given, **named)
        return 1.1 * states, end

    monkeypatch.setattr(in_segments, "_scan", wrong)
    self_test.segments_fault.cache_clear()
    assert "differs by" in self_test.segments_fault(device)
    assert "as a whole" in caplog.text
    self_test.segments_fault.cache_clear()


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_segments_of_heads_with_several_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "segments", lambda *problem: 2)
    leaves = _leaves(1, 2, 4096 + 100, 8, 64, torch.float32, True, 2)
    _check(by_kernel("triton", True, 2), leaves, True, 2)


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=needs_hopper)])
@pytest.mark.parametrize("L", [1 << 17, 100_000])
def test_few_channels_in_segments(backend: str, L: int) -> None:
    leaves = _leaves(1, 3, L, 32, 64, torch.bfloat16, True)
    assert segments(3, L, multiprocessors(DEVICE)) > 1
    _check(by_kernel(backend, True), leaves, True)
    first, second = (everything(by_kernel(backend, True), leaves, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "not deterministic"
