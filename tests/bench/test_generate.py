"""What can be said of `h3lm bench generate` without a GPU."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from h3lm.bench import generate, generate_cpu
from h3lm.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        generate.run(tmp_path, print)


def test_the_picture_of_a_cpu(tmp_path):
    said = []
    path = generate_cpu.run(tmp_path, said.append, contexts=(5, 60), steps=4)
    assert path.with_suffix(".png").stat().st_size > 0
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert len(rows) == len(said) == 2 * len(generate_cpu.MODELS) + 2
    assert all(row["ms"] > 0 and row["CPU ms"] > 0 for row in rows)
    memory = {(row["model"], row["context"]): row.get("KiB of cache") for row in rows}
    assert memory["pure H3", 5] == memory["pure H3", 60]
    for name in ("hybrid", "Transformer"):
        assert memory[name, 5] < memory[name, 60]


def test_its_steps_are_those_of_generate():
    """What is timed goes on where a prompt of that length ends."""
    model = generate_cpu.demo_model(mixers="h3")
    torch.manual_seed(3)
    decoder = generate_cpu.ready(model, 40, 8)
    torch.manual_seed(3)
    ids = torch.randint(0, generate_cpu.VOCABULARY, (1, 40))
    decoder.choose()
    tokens = [int(x) for x in decoder.tokens(5)]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    assert tokens == out[0, 40:].tolist()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_committed_sizes_are_among_those_that_are_timed():
    from h3lm.bench import generate_tune as tune
    from h3lm.flashconv.kernels import step_lagging
    from h3lm.flashconv.kernels import step_triton as core
    from h3lm.layers import step_triton as step

    for rows, size in {1: core.SIZES[1], **step_lagging.SIZES}.items():
        assert replace(size, first=False) in tune.core_sizes(rows)
    assert replace(step.ATTEND, first=False) in tune.attend_sizes()
    for (rows, name), size in step.SIZES.items():
        plain = size and replace(size, ahead=0, first=False)
        assert size is None or plain in tune.product_sizes(rows, name)
        assert size is None or size.ahead in tune.AHEAD
    for name, size in tune.ROOMY.items():
        assert size in tune.product_sizes(64, name)
    names = [case.name for case in tune.cases({"core", "product", "attend"})]
    assert len(names) == len(set(names)) == 22


@pytest.fixture
def tune(monkeypatch):
    """The search, its tables put back afterwards, over steps that a test gives the time of."""
    from h3lm.bench import generate_tune as tune

    class Decoder:
        def __init__(self, rows):
            self.rows = rows

            self.cache = SimpleNamespace(start_steps=lambda length: None)

        def record(self):
            return self

        def replay(self):
            return tune.cost(self.rows)

    monkeypatch.setattr(tune, "make_model", lambda *a, **k: None)
    monkeypatch.setattr(tune, "filled_decoder", lambda model, rows, positions: Decoder(rows))
    monkeypatch.setattr(tune, "median_ms", lambda call, repeats: call())
    monkeypatch.setattr(tune, "_us", lambda case, size: case.bytes / size.keys)
    for module in (tune.step, tune.core, tune.step_lagging):
        monkeypatch.setattr(module, "SIZES", dict(module.SIZES))
    monkeypatch.setattr(tune.step, "NORM_FIRST", dict(tune.step.NORM_FIRST))
    monkeypatch.setattr(tune.step, "ATTEND", tune.step.ATTEND)
    return tune


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_search_leaves_the_fastest_sizes_in_the_tables(tune, monkeypatch):
    def cores(rows):
        return (tune.core if rows == 1 else tune.step_lagging).SIZES[rows]

    def cost(rows):
        """Few warps, nothing ahead, an early norm: fast; fastest are those of a wrong kernel."""
        sizes = [size for key, size in tune.step.SIZES.items() if key[0] == rows]
        sizes = [50 if size is None else size.warps + size.ahead / 1e5 for size in sizes]
        early = 0.1 * (tune.step.NORM_FIRST[rows] + tune.step.ATTEND.first)
        return cores(rows).warps + sum(sizes) - early

    monkeypatch.setattr(tune, "cost", cost, raising=False)
    wrong = {("out 1", s) for s in tune.product_sizes(1, "out") if s.warps == 2}
    tune.search(wrong)
    assert [cores(rows).warps for rows in (1, 16, 64)] == [1, 2, 2]
    assert tune.step.SIZES[1, "out"].warps == 4
    assert tune.step.SIZES[1, "down"].warps == 2
    assert all(size is not None and size.ahead == 0 for size in tune.step.SIZES.values())
    assert tune.step.NORM_FIRST == {1: True, 16: True, 64: True}
    assert (tune.step.ATTEND.keys, tune.step.ATTEND.first) == (64, True)
    before = dict(tune.step.SIZES)
    tune.search(set(), deadline=0.0)
    assert before == tune.step.SIZES


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_search_finds_sizes_that_are_good_only_together(tune, monkeypatch):
    def cost(rows):
        small = [tune.step.SIZES[rows, name] == tune.ROOMY[name] for name in tune.ROOMY]
        return 1 if all(small) and tune.step.NORM_FIRST[rows] else 2 + sum(small)

    monkeypatch.setattr(tune, "cost", cost, raising=False)
    tune.search(set(), batches=(64,))
    assert all(tune.step.SIZES[64, name] == size for name, size in tune.ROOMY.items())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_tables_are_printed_as_they_are_written(tune):
    tune.step.SIZES[1, "out"] = tune.ProductSize(8, 64, 2, first=True)
    lines = "\n".join(tune.table_lines())
    kinds = (tune.ProductSize, tune.StepSize, tune.LaggingSize)
    names = {kind.__name__: kind for kind in kinds}
    for place, table in (
        ("kernels/step_triton", tune.core.SIZES),
        ("kernels/step_lagging", tune.step_lagging.SIZES),
        ("layers/step_triton", tune.step.SIZES),
    ):
        begin = lines.index("SIZES = {", lines.index(f"{place}.py")) + len("SIZES = ")
        assert eval(lines[begin : lines.index("\n}", begin) + 2], names) == table
