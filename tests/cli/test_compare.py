import json

import pytest

from h3lm.errors import UserError
from h3lm.evals.compare import compare, lines


def write(folder, values, *, shots=0, stderr=0.1):
    folder.mkdir()
    mean = sum(values) / len(values)
    report = {
        "num_fewshot": shots,
        "tasks": {"copa": {"metrics": {"acc": {"value": mean, "stderr": stderr}}}},
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "documents.jsonl").write_text(
        "".join(
            json.dumps({"task": "copa", "doc_id": i, "doc_hash": f"h{i}", "metrics": {"acc": v}})
            + "\n"
            for i, v in enumerate(values)
        )
    )
    return folder


def test_documents_are_paired_so_that_small_differences_show(tmp_path):
    a = write(tmp_path / "a", [0.0, 1.0] * 50)
    b = write(tmp_path / "b", [1.0, 1.0] * 10 + [0.0, 1.0] * 40)
    (found,) = compare(a, b)
    assert found.paired == 100
    assert found.difference == pytest.approx(0.1)
    apart = [1.0] * 10 + [0.0] * 90
    spread = (sum((x - 0.1) ** 2 for x in apart) / 99) ** 0.5
    assert found.error == pytest.approx(spread / 10)
    assert found.is_clear
    assert "*" in lines([found], ("a", "b")).splitlines()[1]


def test_other_documents_are_not_paired(tmp_path):
    a = write(tmp_path / "a", [0.0, 1.0] * 5, stderr=0.3)
    b = write(tmp_path / "b", [0.0, 1.0, 1.0], stderr=0.4)
    (found,) = compare(a, b)
    assert found.paired == 0
    assert found.error == pytest.approx(0.5)
    assert not found.is_clear


def test_what_cannot_be_compared_is_one_line(tmp_path):
    a = write(tmp_path / "a", [0.0, 1.0])
    b = write(tmp_path / "b", [0.0, 1.0], shots=3)
    for pair, message in (((a, tmp_path), "no report here"), ((a, b), "0-shot.*3-shot")):
        with pytest.raises(UserError, match=message):
            compare(*pair)
