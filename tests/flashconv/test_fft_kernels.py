"""The block FFT against float64: in Triton's interpreter on a CPU, compiled on a GPU."""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from h3lm.flashconv import KeptFilter, fft, fft_conv, fft_library, measured
from h3lm.flashconv.dispatch import Problem, choose, conv_algorithm
from h3lm.flashconv.filters import Filter, FilterGradients
from h3lm.flashconv.kernels import conv_plan, fft_size

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

# the result is rounded once, 1.7e-3; inside, float16 is rounded 7 times on the way, 2e-4 each
ALLOWED = {torch.bfloat16: 2.6e-3}
# Toeplitz blocks round what is under a gate, the filter and the result to the dtype of the rows
ALLOWED_TOEPLITZ = {torch.bfloat16: 4e-3}
# one product of float16 where the interpreter has no bfloat16: the roundings inside are seen
ALLOWED_HALF = {torch.float16: 1e-3}
# others may be twice as wrong as plain PyTorch, or as a few roundings of float32 are
TWICE, FLOAT32 = 2.0, 2.0**-22

Case = tuple[int, int, int, int, int, str]


def _leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    B, D, L, taps, reverse, options = case
    leaves = {"u": torch.randn(B, D, L).to(DEVICE, dtype)}
    leaves["f"] = (torch.randn(D, taps) / taps**0.5).to(DEVICE)
    if reverse:
        leaves["f_reverse"] = (torch.randn(D, reverse) / reverse**0.5).to(DEVICE)
    if "s" in options:
        leaves["skip"] = torch.randn(D).to(DEVICE)
    if "a" in options:
        leaves["pre_gate"] = torch.randn(B, D, L).to(DEVICE, dtype)
    if "b" in options:
        leaves["post_gate"] = torch.randn(B, D, L).to(DEVICE, dtype)
    return leaves


def _everything(run, leaves: dict[str, Tensor], mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and all gradients, for a gradient of the output that is rounded to a dtype."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    y = run(
        leaves["u"], leaves["f"], **{n: x for n, x in leaves.items() if n not in "uf"}, mode=mode
    )
    random = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=random).to(y.device, dtype).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


@pytest.fixture
def _transforms(monkeypatch):
    """Keep short filters away from the Toeplitz blocks."""

    def transforms(dtype: torch.dtype, problem: Problem, backward: bool) -> str:
        return conv_algorithm(dtype, replace(problem, lags=1 << 30), backward)

    monkeypatch.setattr(measured, "ALGORITHMS", {})
    monkeypatch.setattr(fft_library, "conv_algorithm", transforms)


@pytest.fixture
def _toeplitz(monkeypatch):
    monkeypatch.setattr(fft_library, "conv_algorithm", lambda *problem: "Toeplitz blocks")


def _check(
    case: Case, dtype: torch.dtype, run=fft_library.fft_conv, leaves=None, allowed=ALLOWED
) -> None:
    leaves = leaves or _leaves(case, dtype)
    mode = "circular" if "c" in case[-1] else "causal"
    exact = _everything(fft.fft_conv, {n: x.double() for n, x in leaves.items()}, mode, dtype)
    plain = _everything(fft.fft_conv, leaves, mode, dtype)
    found = _everything(run, leaves, mode, dtype)
    for name, expected in exact.items():
        error, rounding = (
            float((x[name].double() - expected).norm() / expected.norm()) for x in (found, plain)
        )
        if name == "dskip":  # df at lag 0, of few channels: it may be as small as its rounding
            far = float(exact["df"].norm() / expected.norm()) / exact["df"].shape[1] ** 0.5
        else:
            far = 1.0
        if dtype in allowed:
            limit = allowed[dtype] * max(1.0, far)
        else:
            limit = TWICE * max(rounding, FLOAT32 * max(1.0, far))
        assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.1e}"


INTERPRETED: list[tuple[Case, torch.dtype]] = [
    # B, D, L, taps, reverse taps, options: skip, gates a and b, circular
    ((3, 2, 100, 100, 0, "sab"), torch.float16),
    ((2, 1, 512, 40, 512, "s"), torch.float32),
    ((1, 1, 77, 77, 5, "ac"), torch.float16),
    ((1, 1, 1, 1, 1, ""), torch.float32),
    ((2, 1, 600, 600, 0, "b"), torch.float16),
    ((1, 1, 4096, 4096, 0, ""), torch.float16),
    ((1, 1, 8001, 8001, 77, "sab"), torch.float16),
]


@pytest.fixture
def _one_product(monkeypatch):
    """Float16 as bfloat16 is computed, which the interpreter has not."""
    _compute_by(monkeypatch, "half")


def _compute_by(monkeypatch, precision: str) -> dict[torch.dtype, float]:
    """Have float16 computed so, also where a first use would find it off; what errors may be."""
    monkeypatch.setitem(fft_size._PRECISION, torch.float16, precision)
    monkeypatch.setattr(conv_plan, "works", lambda *place: True)
    return ALLOWED_HALF if precision == "half" else ALLOWED


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter
@pytest.mark.parametrize(("case", "dtype"), INTERPRETED, ids=str)
def test_kernels_equal_float64_on_small_problems(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@needs_triton
@pytest.mark.usefixtures("_transforms", "_one_product")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", [INTERPRETED[0][0], INTERPRETED[2][0]], ids=str)
def test_one_product_equals_float64_on_small_problems(case: Case) -> None:
    _check(case, torch.float16, allowed=ALLOWED_HALF)


def _gated(case: Case) -> bool:
    """Whether it has gates, under which blocks round float16 and are not taken."""
    return "a" in case[-1] or "b" in case[-1]


SHORT: list[Case] = [
    (3, 2, 100, 100, 0, "sab"),
    (5, 1, 77, 20, 30, "b"),
    (2, 1, 300, 300, 300, ""),
    (1, 1, 1, 1, 1, "s"),
    (20, 1, 130, 70, 0, "c"),
    (1, 1, 1000, 3, 0, "a"),
]


@needs_triton
@pytest.mark.usefixtures("_toeplitz")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_toeplitz_blocks_equal_float64(case: Case) -> None:
    _check(case, torch.float16, allowed=ALLOWED_HALF if _gated(case) else ALLOWED)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["Toeplitz blocks", "block FFT", "torch.fft"])
def test_a_kept_filter_does_what_the_filter_does(algorithm: str, monkeypatch) -> None:
    monkeypatch.setattr(fft_library, "conv_algorithm", lambda *problem: algorithm)
    leaves = _leaves((2, 2, 90, 50, 30, "s"), torch.float16)
    u = leaves.pop("u")
    kept = KeptFilter(**leaves)
    with torch.no_grad():
        found = [fft_library.fft_conv_kept(u, kept, backend="triton") for _ in range(2)]
        expected = fft_library.fft_conv(u, **leaves)
    (made,) = kept.prepared.values()
    assert made.algorithm == algorithm
    assert all(torch.equal(y, expected) for y in found)


def test_kernels_that_fail_their_check_are_not_used(monkeypatch) -> None:
    leaves = _leaves((2, 2, 90, 50, 30, "ab"), torch.float16)
    monkeypatch.setattr(conv_plan, "works", lambda *place: False)
    exact = _everything(fft.fft_conv, leaves, "causal", torch.float16)
    found = _everything(fft_library.fft_conv, leaves, "causal", torch.float16)
    for name, expected in exact.items():
        torch.testing.assert_close(found[name], expected, rtol=2e-3, atol=2e-3)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["Toeplitz blocks", "block FFT", "torch.fft"])
def test_what_is_kept_until_backward_changes_nothing(algorithm: str, monkeypatch) -> None:
    monkeypatch.setattr(fft_library, "conv_algorithm", lambda *problem: algorithm)
    leaves = _leaves((2, 2, 150, 150, 9, "sab"), torch.float16)
    found = []
    for share in (0, 1 << 30):
        monkeypatch.setattr(fft_library, "KEPT_SHARE", share)
        found.append(_everything(fft_library.fft_conv, leaves, "causal", torch.float16))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@needs_triton
@pytest.mark.parametrize(
    ("algorithm", "forward", "backward"), [("Toeplitz blocks", 2, 5), ("block FFT", 2, 5)]
)
@pytest.mark.parametrize("many", [False, True])
def test_short_rows_take_few_launches_and_no_eager_pass(
    algorithm: str, forward: int, backward: int, many: bool, monkeypatch
) -> None:
    from h3lm.flashconv.kernels import fft_filter, fft_triton, skip_gradient, toeplitz_triton

    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *inputs, **constants: launched.append(self.name)

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for module in (fft_filter, fft_triton, skip_gradient, toeplitz_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(fft_library, "conv_algorithm", lambda *problem: algorithm)
    leaves = _leaves((200 if many else 3, 2, 300, 300, 20, "sab"), torch.float16)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    seen: set[str] = set()
    fft_library.fft_conv(**leaves)  # makes the factors
    launched.clear()
    with Ops():  # operators one by one, as a compiler sees them
        y = fft_library.fft_conv(**leaves)
        assert len(launched) == forward
        launched.clear()
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y.detach()))
    assert len(launched) == backward
    launched.clear()
    y = fft_library.fft_conv(**leaves)
    torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y.detach()))
    assert len(launched) == forward + backward - many  # what was made of the filter is kept
    allocations = {"empty", "empty_like", "new_empty", "ones_like", "detach"}
    assert seen <= allocations | {"fft_conv_fwd", "fft_conv_bwd"}


@pytest.mark.gpu
def test_every_check_passes_here() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for algorithm, dtype, length in conv_plan.checks(device):
        assert conv_plan.fault(algorithm, device, dtype, length) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["Toeplitz blocks", "block FFT", "block FFT through memory"])
def test_the_check_finds_a_wrong_kernel(algorithm, dtype, monkeypatch, caplog) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    made = conv_plan.plan(algorithm, device, dtype, 304, 200, None).kernels
    right = made.forward
    monkeypatch.setattr(made, "forward", lambda *inputs: right(*inputs) * 1.02)
    lengths = [n for *what, n in conv_plan.checks(device) if what == [algorithm, dtype]]
    place = (algorithm, device, dtype, lengths[0])
    monkeypatch.delitem(conv_plan._found, place, raising=False)
    assert "y differs" in conv_plan.fault(*place)
    assert "torch.fft takes over: y differs" in caplog.text
    assert not conv_plan.works(*place)


def test_what_a_check_found_is_said_once(monkeypatch, caplog) -> None:
    place = ("block FFT", torch.device("cpu"), torch.float16, 512)
    monkeypatch.delitem(conv_plan._found, place, raising=False)
    monkeypatch.setattr(conv_plan, "_compare", lambda *place: "y differs by 1.0e-01")
    found = [conv_plan.fault(*place) for _ in range(2)]
    assert found == ["y differs by 1.0e-01"] * 2
    (said,) = caplog.records
    assert said.name == "h3lm.flashconv"
    assert said.getMessage() == (
        "block FFT for rows of 512 of torch.float16 is off, torch.fft takes over: "
        "y differs by 1.0e-01"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["dskip", "df_reverse"])
def test_the_check_looks_at_every_part_of_a_filter(part: str, monkeypatch) -> None:
    from h3lm.flashconv.kernels import toeplitz_triton

    right = toeplitz_triton.filter_gradients

    def wrong(u: Tensor, sums: Tensor, filter: Filter, size: object) -> FilterGradients:
        made = right(u, sums, filter, size)
        name = part[1:]
        kept = getattr(made, name)
        return made if kept is None else made._replace(**{name: kept * 1.02})

    monkeypatch.setattr(toeplitz_triton, "filter_gradients", wrong)
    found = conv_plan._compare("Toeplitz blocks", DEVICE, torch.bfloat16, conv_plan.TOEPLITZ_CHECK)
    assert found.startswith(f"{part} differs by 2.")


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("precision", ["half", "pairs"])
def test_long_rows_in_the_interpreter(precision: str, monkeypatch) -> None:
    allowed = _compute_by(monkeypatch, precision)
    _check((1, 1, 2100, 2100, 3, "ab"), torch.float16, allowed=allowed)


@needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_long_rows_of_parts_that_are_apart(monkeypatch) -> None:
    from h3lm.flashconv.kernels import fft_long

    right = fft_long.size_for

    def apart(length: int, large: bool, precision: str) -> fft_long.LongSize:
        size = right(length, large, precision)
        return replace(size, inner=replace(size.inner, apart=not size.inner.apart))

    monkeypatch.setattr(fft_long, "size_for", apart)
    _check((2, 1, 2100, 2100, 3, "ab"), torch.float16)


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("precision", ["half", "pairs"])
def test_turns_that_are_kept_and_gradients_apart(precision: str, monkeypatch) -> None:
    size = fft_size.SIZES[512]
    changed = replace(size, keep=not size.keep, together=not size.together, ahead=not size.ahead)
    allowed = _compute_by(monkeypatch, precision)
    monkeypatch.setattr(
        conv_plan, "size_for", lambda length, precision: replace(changed, precision=precision)
    )
    _check((3, 2, 100, 100, 0, "ab"), torch.float16, allowed=allowed)


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["Toeplitz blocks", "block FFT"])
def test_the_check_passes_and_sees_products_that_are_not_of_pairs(algorithm, monkeypatch) -> None:
    where = (algorithm, DEVICE, torch.float16, conv_plan.TOEPLITZ_CHECK)
    assert conv_plan._compare(*where) == ""
    if algorithm == "block FFT":
        monkeypatch.setitem(fft_size._PRECISION, torch.float16, "half")
        assert "y differs by" in conv_plan._compare(*where)


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_rows_of_very_different_size_keep_their_own_precision() -> None:
    leaves = _leaves((4, 1, 200, 200, 0, ""), torch.float16)
    leaves["u"] = leaves["u"] * torch.tensor([1.0, 1e-3, 0.0, 1.0])[:, None, None].to(leaves["u"])
    exact = fft.fft_conv(leaves["u"].double(), leaves["f"].double())
    found = fft_library.fft_conv(leaves["u"], leaves["f"]).double()
    for row in (0, 1, 3):
        assert (found[row] - exact[row]).norm() < 4e-4 * exact[row].norm()
    assert not found[2].any()


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("L", [512, 2100])  # in one program, and through memory
def test_filters_of_any_scale_and_shape(L: int) -> None:
    u = torch.randn(2, 4, L, device=DEVICE).half()
    f = torch.ones(4, L, device=DEVICE)  # all in one frequency
    f[1] = 0
    f[2], f[2, 7] = 1e-6, 3e3  # far above the rest
    f[3] = 1e-30 * torch.randn(L, device=DEVICE)
    u[:, 3] = 0
    found, expected = fft_library.fft_conv(u, f).double(), fft.fft_conv(u.double(), f.double())
    assert not found[:, 1].any()
    assert not found[:, 3].any()
    for channel in (0, 2):
        error = (found[:, channel] - expected[:, channel]).norm() / expected[:, channel].norm()
        assert error < 4e-4


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_nothing_overflows_in_float16_at_its_worst() -> None:
    # a constant row and a constant filter put everything into one frequency
    u = torch.full((2, 1, 512), 60000.0, dtype=torch.float16, device=DEVICE)
    f = torch.full((1, 512), 1e-4 / 512, device=DEVICE)
    found = fft_library.fft_conv(u, f)
    expected = fft.fft_conv(u.double(), f.double())
    assert (found.double() - expected).norm() < 4e-4 * expected.norm()


@needs_triton
@pytest.mark.usefixtures("_transforms")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of the result
def test_float16_may_overflow_under_a_gate_but_not_behind_it() -> None:
    u = torch.full((2, 1, 512), 60000.0, dtype=torch.float16, device=DEVICE)
    f = torch.full((1, 512), 1e-4 / 512, device=DEVICE)
    gates = {"pre_gate": u, "post_gate": torch.full_like(u, 1e-3)}
    gates["post_gate"][1] = 1.0
    found = fft_library.fft_conv(u, f, **gates)
    expected = fft.fft_conv(u.double(), f.double(), **{n: x.double() for n, x in gates.items()})
    assert (found[0].double() - expected[0]).norm() < 4e-4 * expected[0].norm()
    assert torch.equal(found[1].isinf(), expected[1] > 65520)
    assert found[1].isinf().any()


@pytest.mark.parametrize(
    ("change", "dtype", "backend", "word"),
    [
        ({}, torch.bfloat16, "triton", "block FFT"),
        ({"length": 8193}, torch.bfloat16, "triton", "through memory"),
        ({"length": 8192}, torch.bfloat16, "triton", "kernel: block FFT"),
        ({"length": 8193}, torch.float16, "triton", "through memory"),
        ({"length": 8192}, torch.float16, "triton", "kernel: block FFT"),
        ({"length": 128}, torch.bfloat16, "triton", "Toeplitz"),
        ({"length": 128, "gated": True}, torch.float16, "triton", "block FFT"),
        ({"capability": (8, 6), "lags": 256}, torch.bfloat16, "triton", "Toeplitz"),
        ({"capability": (8, 6), "length": 257}, torch.bfloat16, "triton", "block FFT"),
        ({"length": 256}, torch.float32, "triton", "block FFT"),
        ({"capability": (8, 6), "length": 2**19 + 1}, torch.float16, "torch", "up to 524288"),
        ({"length": 2**22}, torch.bfloat16, "triton", "Triton"),
        ({"length": 2**19}, torch.float16, "triton", "Triton"),
        ({"length": 2**19 + 1}, torch.float16, "torch", "torch.fft is faster"),
        ({"length": 2**20, "lags": 64}, torch.float16, "triton", "Toeplitz"),
        ({"length": 2**20, "lags": 64, "gated": True}, torch.float16, "torch", "torch.fft"),
        ({"length": 2**22 + 1}, torch.float16, "torch", "up to 4194304"),
        ({"capability": (8, 6)}, torch.float32, "torch", "224 KB"),
        ({"length": 2048}, torch.float32, "triton", "Triton"),
        ({"length": 2049}, torch.float32, "torch", "rows of up to 2048"),
        ({}, torch.float64, "torch", "bfloat16"),
        ({"capability": (7, 5)}, torch.float16, "torch", "8.0"),
        ({"has_triton": False}, torch.float16, "torch", "pip install triton"),
    ],
    ids=str,
)
def test_choice_follows_from_the_problem_and_says_why(
    change: dict, dtype: torch.dtype, backend: str, word: str
) -> None:
    problem = Problem(**{"length": 4096, "has_triton": True} | change)
    choice = choose("fft_conv", torch.device("cuda"), dtype, "auto", problem)
    assert choice.backend == backend
    assert word in choice.reason


HALF_CASES: list[Case] = [
    (2, 3, 4096, 4096, 0, ""),
    (3, 4, 2048, 2048, 0, "sab"),
    (5, 2, 1024, 1024, 1024, "s"),
    (64, 2, 256, 256, 0, "ab"),
    (1, 300, 1, 1, 0, "s"),
    (8, 16, 17, 17, 17, "abc"),
    (7, 2, 509, 300, 0, "a"),
    (3, 2, 1021, 1021, 4, "bc"),
    (2, 2, 3001, 3001, 3001, "sab"),
    (33, 5, 63, 20, 0, ""),
    (3, 3, 8192, 8192, 0, ""),
    (3, 2, 5001, 5001, 17, "sab"),
    (2, 3, 16384, 16384, 0, "b"),
    (1, 2, 20011, 20011, 20011, "abc"),
    (3, 1, 131072, 131072, 0, "ab"),
    (1, 1, 1048576, 1048576, 0, ""),
]
ON_A_GPU = [(case, dtype) for case in HALF_CASES for dtype in (torch.bfloat16, torch.float16)]
ON_A_GPU += [
    pytest.param(case, torch.float32, marks=needs_hopper) for case in HALF_CASES if case[2] <= 2048
]


@pytest.fixture
def _poisoned():
    """Fill what is allocated with NaN, so that an unwritten output fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned", "_transforms")
@pytest.mark.filterwarnings("ignore")  # cuBLAS under deterministic mode
@pytest.mark.parametrize(("case", "dtype"), ON_A_GPU, ids=str)
def test_kernel_equals_float64_in_every_gradient(case: Case, dtype: torch.dtype) -> None:
    _check_twice(case, dtype, ALLOWED)


@needs_triton
@pytest.mark.usefixtures("_toeplitz")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("case", [(66, 1, 250, 250, 0, "s"), (64, 1, 200, 7, 0, "")], ids=str)
def test_blocks_that_stay_equal_float64(case: Case, monkeypatch) -> None:
    from h3lm.flashconv.kernels import toeplitz_rows, toeplitz_size

    monkeypatch.setattr(
        toeplitz_size, "SMALL", toeplitz_size.LARGE
    )  # no GPU is taken for a small one
    run = []
    for name in ("forward", "backward"):
        right = getattr(toeplitz_rows, name)
        monkeypatch.setattr(
            toeplitz_rows, name, lambda *inputs, r=right, n=name: (run.append(n), r(*inputs))[1]
        )
    _check(case, torch.float16)
    assert run == ["forward", "backward"]


SHORT_ON_A_GPU = SHORT + [case for case in HALF_CASES if case[2] <= 4096]
SHORT_ON_A_GPU += [(8, 3, 512, 512, 0, "sab"), (2, 3, 65536, 100, 64, "ab")]
SHORT_ON_A_GPU += [(200, 3, 256, 256, 0, "s"), (64, 300, 129, 50, 0, ""), (65, 2, 201, 201, 0, "")]


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned", "_toeplitz")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHORT_ON_A_GPU, ids=str)
def test_toeplitz_kernel_equals_float64_in_every_gradient(case: Case, dtype: torch.dtype) -> None:
    rounded = ALLOWED_HALF if _gated(case) else {}
    _check_twice(case, dtype, ALLOWED_TOEPLITZ | rounded)


def _check_twice(case: Case, dtype: torch.dtype, allowed: dict[torch.dtype, float]) -> None:
    leaves = _leaves(case, dtype)
    _check(case, dtype, leaves=leaves, allowed=allowed)
    mode = "circular" if "c" in case[-1] else "causal"
    first, second = (_everything(fft_library.fft_conv, leaves, mode, dtype) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "not deterministic"


CHOSEN: list[Case] = [
    (1, 3, 100, 100, 0, "s"),
    (8, 16, 256, 256, 0, ""),
    (8, 16, 512, 512, 0, ""),
    (8, 16, 512, 512, 100, "sab"),
    (70, 16, 1000, 1000, 0, "ab"),
    (64, 16, 1024, 1024, 0, ""),
    (2, 16, 5000, 64, 0, ""),
    (8, 16, 300, 300, 300, "c"),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_what_is_chosen_here_equals_float64(case: Case) -> None:
    _check_twice(case, torch.bfloat16, ALLOWED_TOEPLITZ)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "L"), [(64, 256), (64, 1024), (16, 8192), (4, 32768)])
def test_at_most_half_of_the_memory_of_torch_fft(rows: int, L: int, dtype: torch.dtype) -> None:
    u = torch.randn(rows, 64, L, device="cuda").to(dtype).requires_grad_()
    f = torch.randn(64, L, device="cuda").requires_grad_()
    peaks = []
    for backend in ("triton", "torch"):
        for _ in range(2):  # factors are made in the first call
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(fft_conv(u, f, backend=backend).sum(), [u, f])
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert 2 * peaks[0] <= peaks[1]


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["Toeplitz blocks", "block FFT through memory"])
def test_the_longest_rows_and_offsets_beyond_32_bits(algorithm: str, monkeypatch) -> None:
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free memory")
    monkeypatch.setattr(fft_library, "conv_algorithm", lambda *problem: algorithm)
    u = torch.randn(1, 513, 2**22, device="cuda", dtype=torch.bfloat16)
    f = torch.zeros(513, 4, device="cuda")
    f[:, 3] = 1.0  # a delay by three
    y = fft_conv(u, f)
    error = (y[..., 3:].float() - u[..., :-3].float()).norm() / u.float().norm()
    assert error < ALLOWED[torch.bfloat16]
    assert y[..., :3].float().norm() < 0.1  # 1539 values of 6e-4


@pytest.mark.gpu
def test_any_strides_of_rows_and_channels() -> None:
    case: Case = (3, 4, 500, 500, 0, "ab")
    leaves = _leaves(case, torch.bfloat16)
    for name in ("u", "pre_gate"):  # (D, B, L) in memory, beside each other
        leaves[name] = leaves[name].transpose(0, 1).contiguous().transpose(0, 1)
    leaves["post_gate"] = leaves["post_gate"].mT.contiguous().mT
    _check(case, torch.bfloat16, leaves=leaves, allowed=ALLOWED_TOEPLITZ)


@pytest.mark.parametrize(("gated", "circular"), [(False, True), (True, False)])
def test_opcheck_where_torch_fft_takes_over(gated: bool, circular: bool, monkeypatch) -> None:
    monkeypatch.setattr(conv_plan, "works", lambda *place: False)
    leaves = _leaves((2, 3, 100, 100, 7, "sab"), torch.float32)
    gates = (leaves["pre_gate"], leaves["post_gate"]) if gated else (None, None)
    inputs = (leaves["u"], leaves["f"], leaves["f_reverse"], leaves["skip"], *gates)
    inputs = tuple(None if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.h3lm.fft_conv_fwd.default, (*inputs, circular))


def test_opcheck_of_a_kept_filter() -> None:
    leaves = _leaves((2, 3, 100, 100, 7, "ab"), torch.float32)
    made = fft_library._prepare(
        leaves["u"], Filter(leaves["f"], leaves["f_reverse"]), "torch", True
    )
    inputs = (leaves["u"], made.tensors, made.algorithm, made.taps, made.taps_reverse)
    torch.library.opcheck(
        torch.ops.h3lm.fft_conv_prepared.default, (*inputs, leaves["pre_gate"], None)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("gated", "circular"), [(False, True), (True, False)])
def test_opcheck(gated: bool, circular: bool) -> None:
    leaves = _leaves((2, 3, 100, 100, 7, "sab"), torch.bfloat16)
    gates = (leaves["pre_gate"], leaves["post_gate"]) if gated else (None, None)
    inputs = (leaves["u"], leaves["f"], leaves["f_reverse"], leaves["skip"], *gates)
    inputs = tuple(None if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.h3lm.fft_conv_fwd.default, (*inputs, circular))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    def run(u: Tensor, f: Tensor) -> Tensor:
        return fft_conv(u, f).sin()

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for L in (256, 320, 384) if dynamic else (256,):
        leaves = _leaves((2, 3, L, L, 0, ""), torch.bfloat16)
        u, f = (leaves[name].requires_grad_() for name in "uf")
        found, expected = compiled(u, f), run(u, f)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(y.float().sum(), [u, f]) for y in (found, expected))
        for actual, right in zip(*grads, strict=True):
            torch.testing.assert_close(actual, right, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_runs_under_a_cuda_graph_and_autocast() -> None:
    leaves = _leaves((2, 3, 300, 300, 0, ""), torch.bfloat16)
    u, f = leaves["u"], leaves["f"]
    with torch.autocast("cuda", torch.float16):
        expected = fft_conv(u, f)
    assert expected.dtype == torch.bfloat16
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fft_conv(u, f)
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    kept = KeptFilter(f)
    with torch.no_grad():
        torch.testing.assert_close(fft_conv(u, kept), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(8, 3, 512, 512, 9, "sab"), (2, 3, 9000, 9000, 0, "")], ids=str)
def test_gradients_under_a_cuda_graph(case: Case) -> None:
    leaves = {name: x.requires_grad_() for name, x in _leaves(case, torch.bfloat16).items()}
    dy = torch.randn_like(leaves["u"])

    def run() -> list[Tensor]:
        y = fft_conv(**leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]

    with torch.cuda.stream(torch.cuda.Stream()):
        expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_rows_on_another_than_the_current_device() -> None:
    u, f = torch.randn(2, 3, 300).bfloat16(), torch.randn(3, 300)
    leaves = [x.to("cuda:1").requires_grad_() for x in (u, f)]
    y = fft_conv(*leaves, backend="triton")
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.device == grads[0].device == torch.device("cuda", 1)
    expected = fft.fft_conv(u.double(), f.double())
    assert (y.cpu().double() - expected).norm() < 4e-3 * expected.norm()
