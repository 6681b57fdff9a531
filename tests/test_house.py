"""Imports go down the house, and importing costs what it should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "h3lm"
# a room and the rooms that it may import
BELOW = {
    "ssm": set(),
    "flashconv": {"ssm"},
    "layers": {"flashconv", "ssm"},
    "data": set(),
    "models": {"layers", "flashconv", "ssm", "data"},
    "evals": {"models", "layers", "flashconv", "ssm", "data"},
    "synthetics": {"models", "layers", "flashconv", "ssm", "data"},
    "train": {"evals", "models", "layers", "flashconv", "ssm", "data"},
    # times what the other rooms do
    "bench": {"train", "evals", "models", "layers", "flashconv", "ssm", "data"},
    "cli": {"train", "evals", "synthetics", "bench", "models", "data"},
}
TOP = {"errors", "registration", "__init__", "__main__"}  # beside the rooms


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "h3lm":
                yield from (f"h3lm.{alias.name}" for alias in node.names)


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(SOURCE)) for f in FILES])
def test_imports_go_down(path):
    room = path.relative_to(SOURCE).parts[0]
    if room not in BELOW:
        assert path.stem in TOP, f"{path} is in no room"
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "h3lm" and len(parts) > 1 and parts[1] in BELOW:
            assert parts[1] == room or parts[1] in BELOW[room], f"{room} imports {name}"
        if parts[0] in ("transformers", "accelerate", "peft") and room in (
            "ssm", "flashconv", "layers",
        ):  # fmt: skip
            pytest.fail(f"{room} imports {name}: Hugging Face is for models and above")


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_ops_load_neither_transformers_nor_triton():
    run(
        "import sys, h3lm, h3lm.flashconv, h3lm.ssm, h3lm.layers\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "assert not loaded & {'transformers', 'triton', 'datasets'}, loaded\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )


def test_the_command_line_answers_without_torch():
    run(
        "import sys, h3lm.cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )


@pytest.mark.parametrize("first", ["import h3lm", "from transformers import AutoConfig"])
def test_auto_classes_know_h3_whichever_is_imported_first(first):
    out = run(
        f"{first}\nimport h3lm\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('h3', hidden_size=8, num_attention_heads=2, vocab_size=8,"
        " num_hidden_layers=2)\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    assert out.strip() == "H3ForCausalLM"
