import json

import pytest
import yaml

from h3lm.errors import UserError
from h3lm.train.side_by_side import side_by_side, table, write


def run(folder, seed, val, *, name="toy", **settings):
    folder.mkdir()
    recipe = {"name": name, "seed": seed, "task": "language", "batch_size": 4, "block_length": 8}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"output_dir": str(folder)} | settings)
    )
    summary = {"parameters": 1000, "tokens_seen": 640, "val_loss": val}
    (folder / "summary.json").write_text(json.dumps(summary))
    entries = [
        {"step": 10, "eval_loss": val + 1},
        {"step": 10, "loss": 3.0},
        {"step": 20, "eval_loss": val},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in entries))
    return folder


def test_seeds_of_a_recipe_are_one_row_with_their_spread(tmp_path):
    folders = [
        run(tmp_path / "a", 1, 3.0),
        run(tmp_path / "b", 0, 3.2),
        run(tmp_path / "c", 0, 4.0, name="other"),
    ]
    toy, other = side_by_side(folders)
    assert [r.recipe["seed"] for r in toy.runs] == [0, 1]
    assert toy.mean("val_loss") == pytest.approx((3.1, 0.1414), abs=1e-4)
    assert other.mean("val_loss") == (4.0, None)
    assert toy.mean("test_loss") is None
    assert toy.runs[1].curve == [(320, 4.0), (640, 3.0)]
    assert [row["seeds"] for row in table([toy, other])] == ["0, 1", "0"]


def test_recipes_of_one_name_are_told_apart_by_what_differs(tmp_path):
    a = run(tmp_path / "a", 0, 3.0, learning_rate=1e-3, model={"d": 1})
    b = run(tmp_path / "b", 0, 3.0, learning_rate=2e-3, model={"d": 2})
    names = [group.name for group in side_by_side([a, b])]
    assert names == ["toy (d=1, learning_rate=0.001)", "toy (d=2, learning_rate=0.002)"]


def test_table_and_picture_are_written(tmp_path):
    folders = [run(tmp_path / "a", 0, 3.0), run(tmp_path / "b", 1, 3.2)]
    shown = write(side_by_side(folders), tmp_path / "out")
    assert "3.1 ± 0.14" in shown
    assert (tmp_path / "out" / "runs.md").read_text() == shown
    (group,) = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert [r["val_loss"] for r in group["runs"]] == [3.0, 3.2]
    assert (tmp_path / "out" / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_counts_once(tmp_path):
    folder = run(tmp_path / "a", 0, 3.0)
    with pytest.raises(UserError, match="named twice"):
        side_by_side([folder, tmp_path / "b" / ".." / "a"])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished training run"):
        side_by_side([tmp_path])
    broken = run(tmp_path / "a", 0, 3.0)
    (broken / "summary.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        side_by_side([broken])


def test_what_a_run_does_not_depend_on_tells_no_recipes_apart(tmp_path):
    old = run(tmp_path / "a", 0, 3.0)  # of before there was data_workers
    new = run(tmp_path / "b", 1, 3.2, data_workers=2, data="elsewhere", micro_batch_size=2)
    assert len(side_by_side([old, new])) == 1


def test_other_data_are_another_row(tmp_path):
    folders = [run(tmp_path / "a", 0, 3.0), run(tmp_path / "b", 1, 3.2)]
    for folder, data in zip(folders, ("one", "two"), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"data": data}))
    assert len(side_by_side(folders)) == 2


def test_a_run_without_evaluations_draws_nothing(tmp_path):
    folders = [run(tmp_path / "a", 0, 3.0), run(tmp_path / "b", 0, 3.0, name="bare")]
    (folders[1] / "log.jsonl").unlink()
    write(side_by_side(folders), tmp_path / "out")
    assert (tmp_path / "out" / "runs.png").is_file()


def test_the_command_compares_runs(tmp_path, capsys):
    from h3lm.cli.compare import compare

    folders = [run(tmp_path / "a", 0, 3.0), run(tmp_path / "b", 1, 3.2)]
    compare(folders, tmp_path / "out")
    assert "3.1 ± 0.14" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"no such run: {tmp_path}$"):
        compare([*folders, tmp_path])
