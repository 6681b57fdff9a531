"""Seeds, shared data, and what needs a device."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # before anything imports Triton, if it is there at all
    os.environ["TRITON_INTERPRET"] = "1"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Golden files that travel with the project."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared data; a clone outside of the project's workplace has none."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return SHARED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "multi_gpu": None if torch.cuda.device_count() > 1 else "needs several CUDA devices",
        "hub": None if os.environ.get("H3LM_TEST_HUB") else "needs the network: H3LM_TEST_HUB=1",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
