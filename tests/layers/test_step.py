"""The kernels of a step: in Triton's interpreter or on a GPU, beside plain PyTorch in float64."""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from h3lm.flashconv.step import RingState, roll_in_place
from h3lm.layers import H3, CausalAttention
from h3lm.layers import step as steps
from h3lm.layers.block import Block
from h3lm.layers.mixers import MixerSizes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
HALF = torch.bfloat16 if GPU else torch.float16  # numpy, and so the interpreter, has no bfloat16
ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def triton_step():
    from h3lm.layers import step_triton

    return step_triton


def draw(*shape, dtype=HALF):
    return torch.randn(shape, device=DEVICE).to(dtype)


def close(found, expected, dtype):
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= ERROR[dtype], error


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("shape", [(96, 64), (50, 300)])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_whole_product(triton_step, rows, shape, gelu):
    x, weight, bias = draw(rows, shape[1]), draw(*shape) / shape[1] ** 0.5, draw(shape[0])
    size = triton_step.ProductSize(32, 64)
    y = triton_step.product(x, weight, bias, gelu, False, steps_early(), size)
    expected = F.linear(x.double(), weight.double(), bias.double())
    close(y, F.gelu(expected, approximate="tanh") if gelu else expected, HALF)
    assert y.dtype == HALF


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("depth", [64, 300])
def test_a_product_in_parts(triton_step, parts, depth):
    x, weight = draw(4, depth), draw(40, depth)
    size = triton_step.ProductSize(32, 64, parts)
    y = triton_step.product(x, weight, None, False, True, steps_early(), size)
    assert y.dtype == torch.float32
    assert len(y) <= parts
    close(y.sum(0), x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("depth", [64, 300])
def test_without_tma_there_is_another_way(triton_step, depth):
    x, weight = draw(4, depth), draw(40, depth)
    size = triton_step.ProductSize(64, 64, 2, 12, tma=True, x_stages=12)
    y = triton_step.product(x, weight, None, False, True, steps_early(), size)
    close(y.sum(0), x.double() @ weight.double().T, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [(64, 64, 4, 4, 7), (128, 128, 3, 8, 2), (32, 128, 2, 4, 2), (64, 64, 9, 4, 5)], ids=str
)
@pytest.mark.parametrize("rows", [2, 16, 50, 64])
@pytest.mark.parametrize("shape", [(96, 64), (520, 2048), (200, 1000)], ids=str)
def test_products_by_tma(triton_step, rows, shape, size):
    """More tiles than stages and fewer, outputs and inputs that do not fill the last one."""
    if not steps_early():
        pytest.skip("needs a Hopper GPU")
    columns, depth, *rest = size
    x, weight, bias = draw(rows, shape[1]), draw(*shape) / shape[1] ** 0.5, draw(shape[0])
    wide = F.linear(x.double(), weight.double())
    size = partial(sized, triton_step, columns, depth, *rest)
    y = triton_step.product(x, weight, bias, True, False, True, size(1))
    close(y, F.gelu(wide + bias.double(), approximate="tanh"), HALF)
    for parts in (1, 3):
        y = triton_step.product(x, weight, None, False, True, True, size(parts))
        # matrix units cut off what they add in float32: 2e-6 was seen for 2048 inputs
        assert float((y.sum(0).double() - wide).norm() / wide.norm()) < 4e-6


def sized(triton_step, columns, depth, stages, warps, x_stages, parts):
    return triton_step.ProductSize(
        columns, depth, parts, stages, warps, ahead=64, first=True, tma=True, x_stages=x_stages
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_sum_and_norm(triton_step, dtype, parts):
    r, bias, gain, offset = draw(5, 96, dtype=dtype), *draw(3, 96, dtype=dtype).unbind()
    pending = draw(parts, 5, 96, dtype=torch.float32) if parts else None
    bias = bias if parts == 3 else None
    summed, normed = triton_step.add_norm(r, pending, bias, gain, offset, 1e-5, steps_early())
    total = r.double()
    if pending is not None:
        total = total + pending.double().sum(0)
    if bias is not None:
        total = total + bias.double()
    close(summed, total, dtype)
    close(normed, F.layer_norm(summed.double(), (96,), gain.double(), offset.double()), dtype)


@pytest.mark.parametrize("programs", [1, 100], ids=["together", "split"])
@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("head_dim", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_attention_of_rows_of_different_length(triton_step, programs, rotary, head_dim, dtype):
    layer = CausalAttention(2 * head_dim, 2, rotary_dim=rotary).to(DEVICE)
    lengths = torch.tensor([0, 1, 77, 190], device=DEVICE)
    slots = draw(2, 4, 2, 192, head_dim, dtype=dtype)
    qkv = draw(4, 6 * head_dim, dtype=dtype)
    rotation = layer.rotation(lengths[:, None])
    keys, values = slots.clone().unbind()
    # a number that no key of these rows may touch
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:], values[row, :, length:] = float("nan"), float("nan")
    size = triton_step.AttendSize(keys=16, programs_per_sm=programs)
    y = triton_step.attend_step(qkv, keys, values, lengths, rotation, 1, steps_early(), size)
    layer.qkv_proj = layer.output_proj = torch.nn.Identity()  # the plain step, without projections
    known = slots.double().clone().unbind()
    wide = None if rotation is None else tuple(x.double() for x in rotation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("h3lm.layers.attention.has_kernels", lambda x: False)
        expected = layer.step(qkv.double()[:, None], *known, lengths, 190, wide)[:, 0]
    close(y, expected, dtype)
    for found, wanted in ((keys, known[0]), (values, known[1])):
        for row, length in enumerate(lengths.tolist()):
            close(found[row, :, : length + 1], wanted[row, :, : length + 1], dtype)


def steps_early():
    from h3lm.flashconv.kernels.overlap import can_overlap

    return can_overlap(DEVICE)


@pytest.mark.parametrize("name", ["h3", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("d_inner", [96, None])
def test_a_block_advances_as_its_modules_do(monkeypatch, name, dtype, d_inner):
    """`advance` beside `forward` in float64, at most twice as wrong as `forward` in the dtype."""
    monkeypatch.setattr(steps, "has_kernels", lambda x: True)
    torch.manual_seed(0)
    block = Block(name, MixerSizes(d_model=32, d_state=16, num_heads=2), d_inner).eval().to(DEVICE)
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]
    for module in linears:
        module.to(dtype)
    text = draw(3, 20, 32, dtype=dtype)
    with torch.no_grad():
        _, state = block(text[:, :-1])
        plain, _ = block(text[:, -1:], state)
        stream, core = steps.Stream(text[:, -1].contiguous()), core_of(block, state)
        assert steps.can_advance(block, stream.r)
        stream = block.advance(stream, core)
        found, _ = steps.add_norm(stream, block.norm1)
        for module in linears:
            module.double()
        wide = block(text.double())[0][:, -1]
    error, of_plain = (
        float((x.double() - wide).norm() / wide.norm()) for x in (found, plain[:, 0])
    )
    assert error <= 2 * max(of_plain, ERROR[dtype] / 2)


def core_of(block, state):
    mixer = block.mixer
    if isinstance(mixer, H3):
        conv, diagonal = mixer.pack_state(state)
        ring = torch.zeros(*conv.shape[:2], conv.shape[2] + 1, dtype=conv.dtype, device=DEVICE)
        position = torch.tensor([0, 3, 9], device=DEVICE)
        roll_in_place(ring, position, conv)
        return partial(mixer.step_core, state=RingState(ring, position, diagonal.contiguous()))
    room = torch.zeros(2, 3, 2, 5, 16, dtype=state.keys.dtype, device=DEVICE)
    keys, values = torch.cat([torch.stack([state.keys, state.values]), room], 3).unbind()
    seen = torch.full((3,), state.keys.shape[2], device=DEVICE)
    rotation = mixer.rotation(seen[:, None])

    def attend(qkv):
        from h3lm.layers import step_triton

        return step_triton.attend_step(
            qkv, keys.contiguous(), values.contiguous(), seen, rotation, 1, steps_early()
        )

    return attend


def test_what_is_not_plain_does_not_advance(monkeypatch):
    monkeypatch.setattr(steps, "has_kernels", lambda x: True)
    block = Block("h3", MixerSizes(d_model=32, d_state=16), 96).eval()
    r = torch.randn(1, 32)
    with torch.no_grad():
        assert steps.can_advance(block, r)
        assert not steps.can_advance(block, r.half())
        assert not steps.can_advance(block.train(), r)
        block.eval()
        handle = block.mlp.up_proj.register_forward_hook(lambda *a: None)
        assert not steps.can_advance(block, r)
        handle.remove()
        for module in (block, block.mixer, block.norm2):
            handle = module.register_forward_hook(lambda *a: None)
            assert not steps.can_advance(block, r)
            handle.remove()
        assert steps.can_advance(block, r)
        assert steps.can_norm(block.norm1, r)
        assert not steps.can_norm(block.norm1, r.half())
        block.mixer = torch.nn.Identity()
        assert not steps.can_advance(block, r)
    assert not steps.can_advance(block, r)


def test_the_self_test_passes_and_finds_a_wrong_kernel(monkeypatch, triton_step):
    from h3lm.layers import self_test

    if not GPU:  # without bfloat16 in the interpreter
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)
        monkeypatch.setattr(torch.nn.Module, "bfloat16", torch.nn.Module.half)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())
        monkeypatch.setattr(self_test, "ROWS", {1: 1, 64: 2})  # many rows take long there
        monkeypatch.setattr(self_test, "STEPS", 2)
    self_test._known.clear()
    assert self_test.step_fault(DEVICE) == ""
    assert [key[1] for key in self_test._known] == list(self_test.ROWS)
    assert self_test.known_fault(DEVICE, 40) == ""
    right = triton_step.product
    monkeypatch.setattr(triton_step, "product", lambda *a: 1.2 * right(*a))
    self_test._known.clear()
    assert "a step of h3 differs" in self_test.step_fault(DEVICE)
    monkeypatch.setattr(triton_step, "product", lambda *a: 1 / 0)
    self_test._known.clear()
    assert "ZeroDivisionError" in self_test.step_fault(DEVICE)
    self_test._known.clear()
