"""The H3 layer as a citizen of PyTorch: compiled, checkpointed, under autocast, its operators."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from h3lm.layers.h3 import H3


def _layer() -> H3:
    torch.manual_seed(0)
    return H3(8, 16, 2)


def _results(layer: H3, run) -> list[torch.Tensor]:
    u = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = run(u)
    return [y, *torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])]


def test_a_state_is_made_only_where_it_is_wanted() -> None:
    layer, u = _layer(), torch.randn(2, 70, 8)
    expected, state = layer(u)
    found, none = layer(u, with_state=False)
    assert torch.equal(found, expected)
    assert state is not None
    assert none is None


def test_evaluation_between_training_steps_uses_the_parameters_of_now() -> None:
    # fused optimisers write without counting a version
    layer, u = _layer(), torch.randn(2, 70, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        layer.train()
        layer(u)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.eval()
        fresh = _layer()
        fresh.load_state_dict(layer.state_dict())
        with torch.no_grad():
            kept = layer(u)[0]
            assert torch.equal(kept, layer(u)[0])
            assert torch.equal(kept, fresh.train()(u)[0])


def test_recomputing_under_a_checkpoint_changes_nothing() -> None:
    layer = _layer()
    plain = _results(layer, lambda u: layer(u)[0])
    again = _results(layer, lambda u: checkpoint(lambda x: layer(x)[0], u, use_reentrant=False))
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


def test_autocast_reaches_the_projections_and_not_the_operators() -> None:
    layer, u = _layer(), torch.randn(2, 90, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(u)
        _, operators = layer.operators()
    assert y.dtype == torch.bfloat16
    assert state.diagonal.dtype == torch.complex64
    assert operators.M.dtype == operators.K.dtype == operators.P.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(u)[0], rtol=5e-2, atol=5e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_with_every_gradient(dynamic: bool, pytestconfig) -> None:
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the compiler does not look through the type checker")
    layer = _layer()

    def run(u: torch.Tensor) -> torch.Tensor:
        return layer(u, with_state=False)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (90, 130) if dynamic else (90,):
        u = torch.randn(2, length, 8)
        results = []
        for way in (compiled, run):
            y = way(u)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def _alone(tmp_path):
    """A process group of one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore")  # sharding on a CPU warns
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_data_parallel_engines_train_the_layer(engine: str) -> None:
    u = torch.randn(2, 70, 8)
    plain, layer = _layer(), _layer()
    wrapped: torch.nn.Module = layer
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    else:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(layer, mesh=mesh)
    for module in (plain, wrapped):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(2):
            module.train()
            module(u)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            module.eval()
            with torch.no_grad():
                y = module(u)[0]
        if module is plain:
            expected = y
    torch.testing.assert_close(y, expected)
