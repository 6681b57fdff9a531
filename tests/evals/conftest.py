from pathlib import Path

import pytest
import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.data.prepare import prepare
from h3lm.models.folders import save_model
from h3lm.models.generation import load_tokenizer_of

TEXT = "It was the best of times,\nit was the worst of times. Émile was there, it was cold. " * 3


def make_model(folder: Path, tokenizer_folder: Path, vocab_size: int, **fields) -> Path:
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        d_state=8, initializer_range=0.4, **fields,
    )  # fmt: skip
    save_model(H3ForCausalLM(config), folder, load_tokenizer_of(str(tokenizer_folder)))
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A text file, two prepared folders and a model for one of them, and one of bytes."""
    place = tmp_path_factory.mktemp("eval")
    (place / "times.txt").write_text(TEXT, encoding="utf-8")
    for name in ("characters", "bytes"):
        prepare(
            place / "times.txt", place / name, tokenizer=name, block_length=16,
            valid_fraction=0.0, progress=False, workers=1,
        )  # fmt: skip
        make_model(place / f"model-{name}", place / name / "tokenizer", 264)
    return place
