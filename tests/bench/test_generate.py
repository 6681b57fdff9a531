"""What can be said of `h3lm bench generate` without a GPU."""

import json
from dataclasses import replace
from importlib.util import find_spec

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
    from h3lm.flashconv.kernels import step_triton as core
    from h3lm.layers import step_triton as step

    assert all(size in tune.core_sizes(rows) for rows, size in core.SIZES.items() if rows > 1)
    assert step.ATTEND in tune.attend_sizes()
    for (rows, kind), size in step.SIZES.items():
        plain = size and replace(size, ahead=step.ProductSize.ahead)
        assert size is None or plain in tune.product_sizes(rows, kind)
        assert size is None or size.ahead in (*tune.AHEAD, step.ProductSize.ahead)
    names = [case.name for case in tune.cases({"core", "product", "attend"})]
    assert len(names) == len(set(names)) == 22


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_search_leaves_the_fastest_sizes_in_the_tables(monkeypatch):
    from h3lm.bench import generate_tune as tune

    def cost(rows):
        """Sizes with few warps are fast here, those of one wrong kernel fastest."""
        sizes = [size for key, size in tune.step.SIZES.items() if key[0] == rows]
        return tune.core.SIZES[rows].warps + sum(
            50 if size is None else size.warps + size.ahead / 1e5 for size in sizes
        )

    class Decoder:
        def __init__(self, rows):
            self.rows = rows

        def record(self):
            return self

        def replay(self):
            return cost(self.rows)

    monkeypatch.setattr(tune, "make_model", lambda *a, **k: None)
    monkeypatch.setattr(tune, "filled_decoder", lambda model, rows, context: Decoder(rows))
    monkeypatch.setattr(tune, "median_ms", lambda call, repeats: call())
    monkeypatch.setattr(tune.step, "SIZES", dict(tune.step.SIZES))
    monkeypatch.setattr(tune.core, "SIZES", dict(tune.core.SIZES))
    monkeypatch.setattr(tune.step, "ATTEND", tune.step.ATTEND)
    monkeypatch.setattr(tune, "_us", lambda case, size: case.bytes / size.keys)
    wrong = next(s for s in tune.product_sizes(1, "out") if s.warps == 1)
    chosen = tune.search({("out 1", wrong)})
    assert chosen["core 64"].warps == 1
    assert chosen["core 64"] == tune.core.SIZES[64]
    assert chosen["out 1"] == tune.step.SIZES[1, "out"] != wrong
    assert (chosen["out 1"].warps, chosen["out 1"].ahead) == (2, 0)
    assert chosen["attend"].keys == tune.step.ATTEND.keys == 64
    names = {f"core {rows}" for rows in tune.core.SIZES}
    assert set(chosen) == {"attend", *names, *(f"{kind} {rows}" for rows, kind in tune.step.SIZES)}
    lines = "\n".join(tune.table_lines())
    table = lines[lines.index("{", lines.index("layers")) : lines.rindex("}") + 1]
    assert eval(table, {"ProductSize": tune.ProductSize}) == tune.step.SIZES
    tune.step.SIZES[1, "out"] = before = tune.ProductSize(8, 64)
    assert tune.search(set(), deadline=0.0) == {}
    assert tune.step.SIZES[1, "out"] is before
