import math

import numpy as np
import pytest

from h3lm.errors import UserError
from h3lm.evals.perplexity import score_tokens
from h3lm.evals.text import Prefixed, evaluate_text
from h3lm.models.folders import load_model
from h3lm.models.generation import load_tokenizer_of

from .conftest import TEXT, make_model


def test_a_file_is_scored_with_the_models_tokenizer(place):
    model = place / "model-bytes"
    report = evaluate_text(str(model), place / "times.txt", context=32, stride=8)
    ids = list(TEXT.encode())
    end = load_tokenizer_of(str(model)).eos_token_id
    expected = score_tokens(load_model(model), np.array([end, *ids]), context=32, stride=8)
    assert report.tokens == len(ids) == report.bytes
    assert report.words == len(TEXT.split())
    assert report.nats_per_token == pytest.approx(expected.loss, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(expected.loss), rel=1e-6)
    assert report.bits_per_byte == pytest.approx(expected.loss / math.log(2), rel=1e-6)
    assert math.log(report.perplexity_per_word) == pytest.approx(
        expected.nats / len(TEXT.split()), rel=1e-6
    )
    assert (report.context, report.stride, report.split) == (32, 8, None)


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_prepared_blocks_count_the_words_and_bytes_of_their_text(place, kind):
    model = str(place / f"model-{kind}")
    folder = evaluate_text(model, place / kind, split="train")
    file = evaluate_text(model, place / "times.txt", context=16)
    assert (folder.words, folder.bytes) == (file.words, file.bytes)
    assert folder.bytes == len(TEXT.encode())
    ends = int(load_tokenizer_of(model).eos_token_id is not None)
    assert folder.tokens == file.tokens + ends  # the document's end is predicted too
    assert folder.context == folder.stride == 16  # that of the blocks


def test_units_are_of_the_text_not_of_the_tokens(place):
    characters = evaluate_text(str(place / "model-characters"), place / "times.txt")
    assert characters.tokens < characters.bytes  # É is two bytes
    nats = characters.nats_per_token * characters.tokens
    assert characters.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()))


@pytest.mark.parametrize("start", [0, 1, 2, 5])
@pytest.mark.parametrize("stop", [0, 1, 2, 6])
def test_a_prefixed_sequence_is_the_joined_one(start, stop):
    tokens = np.arange(10, 15)
    joined = np.array([7, *tokens])
    assert Prefixed(7, tokens)[start:stop].tolist() == joined[start:stop].tolist()
    assert len(Prefixed(7, tokens)) == 6


def test_bf16_is_near_fp32(place):
    model = str(place / "model-bytes")
    full, half = (
        evaluate_text(model, place / "times.txt", precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert half.nats_per_token == pytest.approx(full.nats_per_token, rel=0.01)
    assert half.nats_per_token != full.nats_per_token


def test_progress_ends_at_the_total(place):
    seen = []
    report = evaluate_text(
        str(place / "model-bytes"), place / "times.txt", context=16,
        progress=lambda _, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (report.tokens, report.tokens)


def test_what_cannot_be_scored_is_one_line(place, tmp_path):
    model = str(place / "model-bytes")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    learned = make_model(
        tmp_path / "learned", place / "bytes" / "tokenizer", 264, num_learned_positions=8
    )
    cases = [
        ((model, tmp_path / "missing.txt"), {}, "no such text file or prepared folder"),
        ((model, tmp_path / "empty.txt"), {}, "there is no text to predict"),
        ((model, tmp_path / "latin.txt"), {}, "byte 3, 0xe9, is not UTF-8"),
        ((model, place / "bytes"), {"split": "test"}, "no split 'test' here"),
        ((model, place / "characters"), {"split": "train"}, "prepared with another tokenizer"),
        ((model, place / "characters"), {"limit": 1}, "a prepared folder is scored whole"),
        ((model, place / "times.txt"), {"context": 8, "stride": 9}, "stride=9 must be"),
        ((model, place / "times.txt"), {"precision": "fp8"}, "not one of fp32, bf16"),
        ((str(learned), place / "times.txt"), {"context": 9}, "exceeds the model's 8 learned"),
        ((str(tmp_path / "nowhere"), place / "times.txt"), {}, "no such model folder"),
    ]
    for arguments, named, message in cases:
        with pytest.raises(UserError, match=message) as error:
            evaluate_text(*arguments, **named)
        assert "\n" not in str(error.value)
