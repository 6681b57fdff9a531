"""The linear baseline: what it is given, what it reports, what it refuses."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from h3lm.data.prepare_labelled import LabelledOptions, prepare_labelled
from h3lm.errors import UserError
from h3lm.evals import rocket


class ByMean:
    """In aeon's place: the class with the nearest mean."""

    seeds: list[int] = []  # noqa: RUF012

    def __init__(self, random_state, n_jobs):
        self.seeds.append(random_state)

    def fit(self, x, labels):
        assert x.ndim == 3  # series, channels, positions
        assert x.shape[1:] == (2, 12)
        self.means = [x[labels == c].mean() for c in range(2)]
        return self

    def predict(self, x):
        return np.abs(x.mean((1, 2))[:, None] - self.means).argmin(1)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    values = rng.normal(size=(20, 12, 2)) + 3 * labels[:, None, None]
    np.savez(tmp_path / "t.npz", train_values=values, train_labels=labels,
             test_values=values[:8], test_labels=1 - labels[:8])  # fmt: skip
    prepare_labelled(tmp_path / "t.npz", tmp_path / "t", "table")
    return tmp_path / "t"


@pytest.fixture
def _library(monkeypatch):
    package = ModuleType("aeon")
    package.__version__ = "9"  # type: ignore[attr-defined]
    inner = ModuleType("aeon.classification.convolution_based")
    inner.MiniRocketClassifier = ByMean  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aeon", package)
    monkeypatch.setitem(sys.modules, "aeon.classification", ModuleType("aeon.classification"))
    monkeypatch.setitem(sys.modules, inner.__name__, inner)


@pytest.mark.usefixtures("_library")
def test_it_is_fitted_on_train_and_scored_on_test_with_every_seed(data, tmp_path):
    ByMean.seeds.clear()
    lines = []
    summary = rocket.run(data, 3, lines.append)
    assert ByMean.seeds == [0, 1, 2]
    assert summary["accuracies"] == [0.0] * 3  # the labels of the test are turned round
    assert (summary["split"], summary["examples"], summary["accuracy_sd"]) == ("test", 8, 0.0)
    assert len(lines) == 4
    rocket.write(summary, tmp_path / "new" / "s.json")
    assert json.loads((tmp_path / "new" / "s.json").read_text()) == summary


@pytest.mark.usefixtures("_library")
def test_what_it_does_not_take(data, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        rocket.run(data, 0)
    prepare_labelled("0", tmp_path / "l", "listops", LabelledOptions(examples=10))
    with pytest.raises(UserError, match="takes signals"):
        rocket.run(tmp_path / "l")
    rows = ["1,2,3,4,5,6,7,8,9,1:a", "1,2,3,4,5,6,7,8,9:b"]
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"u_{split}.ts").write_text("@classLabel true a b\n@data\n" + "\n".join(rows))
    prepare_labelled(tmp_path / "u", tmp_path / "out", "table", LabelledOptions(pad=True))
    with pytest.raises(UserError, match="train has 9 to 10"):
        rocket.run(tmp_path / "out")


def test_without_the_library_it_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon", None)
    with pytest.raises(UserError, match=r"pip install 'h3lm\[baseline\]'"):
        rocket.run(data)
