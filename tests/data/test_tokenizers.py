import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from h3lm.data.tokenizers import (
    Encoder,
    byte_tokenizer,
    character_tokenizer,
    encode,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)
from h3lm.errors import UserError

AWKWARD = (
    "First Citizen:\r\n\n  Before we proceed any further , hear me speak .\t n't \x00 "
    "né e\u0301 ☃ \U0001f600 \u2028 ▁ Ġ <unk> \ufeff\u200b  \n"
)


def write_small_gpt2(folder: Path, names: tuple[str, str]) -> Path:
    """Two files in GPT-2's form, with three merges."""
    trained = json.loads(train_bpe(["the thin thing " * 9], 260).backend_tokenizer.to_str())
    folder.mkdir()
    vocabulary = trained["model"]["vocab"] | {"<|endoftext|>": len(trained["model"]["vocab"])}
    (folder / names[0]).write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in trained["model"]["merges"])
    (folder / names[1]).write_text(f"#version: 0.2\n{merges}\n")
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    small = write_small_gpt2(
        tmp_path_factory.mktemp("gpt2") / "small", ("encoder.json", "vocab.bpe")
    )
    return {
        "characters": character_tokenizer(AWKWARD),
        "characters with end": character_tokenizer(AWKWARD, end_of_text=True),
        "characters with unknown": character_tokenizer(AWKWARD, unknown=True),
        "bytes": byte_tokenizer(),
        "bpe": train_bpe([AWKWARD * 3], 300),
        "gpt2": gpt2_tokenizer(small),
    }


KINDS = ["characters", "characters with end", "characters with unknown", "bytes", "bpe", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_saving_loading_encoding_and_decoding(kind, tokenizers, tmp_path):
    tokenizers[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == tokenizers[kind].get_vocab()
    assert loaded.eos_token == tokenizers[kind].eos_token
    text = AWKWARD.replace("<unk>", "") + "<|endoftext|>" * (loaded.eos_token is not None)
    ids = encode(loaded, text)
    assert ids.dtype == np.int32
    assert loaded.decode(ids) == text
    assert ids.tolist() == loaded(text, add_special_tokens=False)["input_ids"]
    assert len(encode(loaded, "")) == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.sampled_from([*AWKWARD, "<|endoftext|>", "<unk>"]), max_size=40))
def test_encoder_equals_the_tokenizer(kind, tokenizers, parts):
    text = "".join(parts)
    if "end" not in kind and "characters" in kind:
        text = text.replace("<|endoftext|>", "")
    tokenizer = tokenizers[kind]
    assert (
        encode(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_bytes_are_utf8_and_round_trip(text):
    text = text.replace("<|endoftext|>", "")  # has an id of its own
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, text)
    assert bytes(ids.astype(np.uint8)) == text.encode()
    assert tokenizer.decode(ids) == text


def test_characters_have_ids_in_sorted_order():
    tokenizer = character_tokenizer(iter(["cab", "b\n"]))
    assert tokenizer.get_vocab() == {"\n": 0, "a": 1, "b": 2, "c": 3}
    assert tokenizer.eos_token is None
    assert character_tokenizer("ab", end_of_text=True).eos_token_id == 2


@pytest.mark.parametrize("seen", ["ab", "az"])  # the unseen one lies beyond the table, or within
def test_an_unseen_character_is_an_error_that_names_it(seen):
    tokenizer = character_tokenizer(seen, end_of_text=True)
    with pytest.raises(UserError, match=r"character 14, 'q', is not in the vocabulary of 3"):
        encode(tokenizer, "a<|endoftext|>qa")
    with pytest.raises(Exception, match="Unk token"):  # not dropped by the tokenizer itself either
        tokenizer("aqa")


def test_unknown_characters_have_their_own_id_on_request():
    tokenizer = character_tokenizer("ab", unknown=True)
    assert encode(tokenizer, "aqqzb").tolist() == [0, 2, 2, 2, 1]
    assert tokenizer.unk_token_id == 2


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_an_error(kind, tokenizers):
    with pytest.raises(UserError, match=r"character 1 is half a surrogate pair, '\\ud800'"):
        encode(tokenizers[kind], "a\ud800")


def test_encoder_leaves_truncation_padding_and_normalizers_to_the_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert encode(tokenizer, "abcde").tolist() == list(b"abcde")
    assert tokenizer.backend_tokenizer.truncation is not None
    lower = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    lower.normalizer = normalizers.Lowercase()
    assert encode(PreTrainedTokenizerFast(tokenizer_object=lower), "ABa").tolist() == [0, 1, 0]


def test_trained_bpe_is_deterministic_and_has_the_size_asked_for():
    texts = [AWKWARD, "the cat sat on the mat and the rat sat on the cat " * 5]
    first, second = (train_bpe(iter(texts), 290) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 290
    assert first.eos_token_id == 289
    assert len(encode(first, "the cat")) < 7


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_loads_from_its_two_files(names, tmp_path):
    folder = write_small_gpt2(tmp_path / "gpt2", names)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 260
    assert tokenizer.eos_token_id == 259
    assert len(encode(tokenizer, "the")) < 3


def test_gpt2_is_the_published_one(shared):
    tokenizer = gpt2_tokenizer(shared / "data" / "gpt2-bpe")
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    assert encode(tokenizer, "Hello world").tolist() == [15496, 995]
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()
    ids = encode(tokenizer, text)
    assert len(ids) == 338_025
    assert tokenizer.decode(ids) == text


def test_load_tokenizer_knows_the_builtin_names_and_folders(tmp_path):
    assert len(load_tokenizer("bytes")) == 257
    assert len(load_tokenizer("characters", corpus="abc")) == 4
    character_tokenizer("abc").save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 3


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "encoder.json").write_text("{")
    (tmp_path / "broken" / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "missing"): "no such tokenizer folder",
        str(tmp_path / "empty"): "this folder holds no tokenizer",
        str(tmp_path / "broken"): "encoder.json and vocab.bpe do not fit",
        "characters": "takes its vocabulary from a corpus",
        "no-such-tokenizer": "neither 'characters', 'bytes', a folder",
    }
    for spec, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no GPT-2 tokenizer here"):
        gpt2_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        train_bpe(["a"], 256)
    for make in (character_tokenizer, lambda texts: train_bpe(texts, 300)):
        with pytest.raises(UserError, match="is empty"):
            make([""])


def test_one_encoder_serves_many_texts():
    encoder = Encoder(byte_tokenizer())
    assert [encoder(text).tolist() for text in ("a", "", "b")] == [[97], [], [98]]
