import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.flashconv import KeptFilter, fft_conv
from h3lm.flashconv.fft import _fast_length
from h3lm.flashconv.fft_library import MAX_KEPT


@settings(max_examples=30, deadline=None)
@given(
    L=st.integers(1, 130),
    part=st.floats(0.01, 1.0),
    reverse=st.booleans(),
    gated=st.booleans(),
    skip=st.booleans(),
    mode=st.sampled_from(["causal", "circular"]),
)
def test_torch_equals_reference_with_gradients(L, part, reverse, gated, skip, mode):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    taps = max(1, int(part * L))
    options = {}
    if reverse:
        options["f_reverse"] = normal(3, max(1, taps // 2))
    if gated:
        options |= {"pre_gate": normal(2, 3, L), "post_gate": normal(2, 3, L)}
    if skip:
        options["skip"] = normal(3)
    u, f = normal(2, 3, L), normal(3, taps)
    results = []
    for backend in ("reference", "torch"):
        y = fft_conv(u, f, **options, mode=mode, backend=backend)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        grads = torch.autograd.grad((y * weight).sum(), [u, f, *options.values()])
        results.append([y, *grads])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual - expected).norm() <= 1e-10 * expected.norm() + 1e-12


def test_the_present_of_the_reverse_filter():
    u = torch.randn(1, 1, 5)
    f, back = torch.tensor([[1.0]]), torch.tensor([[10.0, 100.0]])
    y = fft_conv(u, f, f_reverse=back)
    later = torch.nn.functional.pad(u, (0, 1))[..., 1:]
    assert torch.allclose(y, 11 * u + 100 * later, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    u = torch.randn(2, 3, 100).to(dtype)
    f = torch.randn(3, 100)
    y = fft_conv(u, f)
    assert y.dtype == dtype
    assert torch.equal(y, fft_conv(u.float(), f).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filters_of_a_narrowed_module_are_widened(dtype):
    """As in `model.bfloat16()`, which narrows a filter that is a plain parameter."""
    u, f, skip = (torch.randn(shape).to(dtype) for shape in ((2, 3, 100), (3, 50), (3,)))
    y = fft_conv(u, f, skip=skip, f_reverse=f)
    wide = fft_conv(u.float(), f.float(), skip=skip.float(), f_reverse=f.float())
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("mode", ["causal", "circular"])
def test_a_kept_filter_serves_rows_of_any_length(mode):
    kept = KeptFilter(torch.randn(3, 50), torch.randn(3), torch.randn(3, 20), mode)
    for L in (70, 30, 1, 0, *range(2, 12)):
        u = torch.randn(2, 3, L)
        gates = {"pre_gate": torch.randn(2, 3, L)} if L % 2 else {}
        f, back = kept.cut(L)
        expected = fft_conv(u, f, skip=kept.skip, f_reverse=back, mode=mode, **gates)
        assert torch.equal(fft_conv(u, kept, **gates), expected)  # with gradients on
        with torch.no_grad():
            found = [fft_conv(u, kept, **gates) for _ in range(2)]
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert len(kept.prepared) <= MAX_KEPT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f": torch.zeros(3, 11)}, "f has 11 taps for rows of length 10: cut it to 1..10"),
        ({"f": torch.zeros(2, 4)}, r"f is \(2, 4\), u needs \(3, length\)"),
        ({"f_reverse": torch.zeros(3, 12)}, "f_reverse has 12 taps"),
        (
            {"f": torch.zeros(3, 4).cfloat()},
            "f is torch.complex64 on cpu; u, on cpu, needs float32",
        ),
        ({"f_reverse": torch.zeros(3, 4).long()}, "f_reverse is torch.int64"),
        ({"backend": "triton"}, "cannot run fft_conv here: kernels need a CUDA device"),
        ({"skip": torch.zeros(4)}, r"skip is \(4,\), u needs \(3,\)"),
        ({"skip": torch.zeros(3).cfloat()}, "skip is torch.complex64 on cpu; u, on cpu, needs"),
        ({"skip": torch.zeros(3, device="meta")}, "skip is torch.float32 on meta; u, on cpu"),
        (
            {"f": KeptFilter(torch.zeros(3, 4)), "skip": torch.zeros(3)},
            "belong into the KeptFilter",
        ),
        ({"mode": "linear"}, "mode='linear' is not one of causal, circular"),
        ({"f": [1.0]}, "f must be a tensor, not list"),
        ({"skip": 1.0}, "skip must be a tensor, not float"),
        ({"u": torch.zeros(1, 3, 10).cfloat()}, "complex64; use float32"),
        ({"u": torch.zeros(1, 3, 10).long()}, "int64; use float32"),
        ({"post_gate": torch.zeros(2, 3, 10)}, "post_gate is"),
    ],
)
def test_mistakes_are_one_clear_line(changes, message):
    arguments = {"u": torch.zeros(1, 3, 10), "f": torch.zeros(3, 4)} | changes
    with pytest.raises(ValueError, match=message):
        fft_conv(**arguments)


def test_a_kept_filter_has_channels():
    with pytest.raises(ValueError, match=r"f is \(4,\), a KeptFilter needs \(D, length\)"):
        KeptFilter(torch.zeros(4))


@given(st.integers(1, 10**6))
def test_fast_length_is_even_smooth_and_near(n):
    found = _fast_length(n)
    assert found >= n
    assert found % 2 == 0
    rest = found
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1
    assert found <= max(4, 1.25 * n)
