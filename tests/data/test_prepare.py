import errno
import gzip
import importlib
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from h3lm.data import shards, splits
from h3lm.data.blocks import Blocks, Index, TokenStream
from h3lm.data.lock import LOCK_FILE
from h3lm.data.sources import PIECE_CHARACTERS, Document, open_source, pieces
from h3lm.data.tokenizers import encode, train_bpe
from h3lm.errors import UserError

needs_extra = "needs the extra h3lm[data]"
datasets = pytest.importorskip("datasets", reason=needs_extra)
pyarrow = pytest.importorskip("pyarrow", reason=needs_extra)
parquet = pytest.importorskip("pyarrow.parquet", reason=needs_extra)
zstandard = pytest.importorskip("zstandard", reason=needs_extra)

# `h3lm.data.prepare` as an attribute is the function.
module = importlib.import_module("h3lm.data.prepare")

WORDS = ["the", "quick", "said:", "'I'm", "not", "née", "42", "today',", "wasn't", "☃", "."]
PACK = {".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}


def prepare(source, out, **settings):
    return module.prepare(source, out, **({"block_length": 8, "progress": False} | settings))


def some_text(seed: int, words: int) -> str:
    generator = np.random.default_rng(seed)
    gaps = generator.choice([" ", "\n\n", "  ", "\r\n"], words, p=[0.9, 0.05, 0.03, 0.02])
    return "".join(
        word + gap for word, gap in zip(generator.choice(WORDS, words), gaps, strict=True)
    )


def json_lines(texts, field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded, without their ends of text."""
    stream = TokenStream(folder, split)
    tokenizer = AutoTokenizer.from_pretrained(stream.tokenizer_folder)
    ends = stream.document_ends(0, len(stream)).tolist()
    assert ends[-1] == len(stream)
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        assert stream[end - 1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(stream[start : end - 1]))
    return found


@pytest.fixture
def novels(tmp_path) -> Path:
    path = tmp_path / "novels.jsonl"
    path.write_bytes(json_lines([some_text(i, 40 + i) for i in range(12)]))
    return path


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet"])
def test_every_form_and_packing_gives_back_its_text(form, packing, tmp_path):
    texts = {split: [some_text(i, 30) for i in range(5)] for split in ("train", "dev", "test")}
    source = tmp_path / "source"
    source.mkdir()
    for split, documents in texts.items():
        if form == "jsonl":
            raw = {"": json_lines(documents)}
        elif form == "txt":
            raw = {f"-{i}": document.encode() for i, document in enumerate(documents)}
        else:
            table = pyarrow.Table.from_pylist([{"text": text, "n": 1} for text in documents])
            sink = pyarrow.BufferOutputStream()
            parquet.write_table(table, sink, row_group_size=2)
            raw = {"": sink.getvalue().to_pybytes()}
        for name, data in raw.items():
            (source / f"{split}{name}.{form}{packing}").write_bytes(PACK[packing](data))
    (source / "README.md").write_text("not a text of the collection")
    index = prepare(source, tmp_path / "out")
    assert list(index.splits) == ["train", "valid", "test"]
    for split, theirs in (("train", "train"), ("valid", "dev"), ("test", "test")):
        assert texts_of(tmp_path / "out", split) == texts[theirs]
        assert index.num_documents(split) == 5
    index.verify(tmp_path / "out")


def test_a_hugging_face_dataset_in_a_folder_gives_back_its_text(tmp_path):
    texts = {"train": ["one", "two ☃", ""], "validation": ["three"]}
    saved = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"story": rows}) for split, rows in texts.items()}
    )
    saved.save_to_disk(tmp_path / "saved")
    prepare(tmp_path / "saved", tmp_path / "out", text_field="story", block_length=4)
    assert texts_of(tmp_path / "out", "train") == ["one", "two ☃"]
    assert texts_of(tmp_path / "out", "valid") == ["three"]
    saved["train"].save_to_disk(tmp_path / "single")
    index = prepare(
        tmp_path / "single", tmp_path / "out2", text_field="story", block_length=2, seed=1
    )
    assert sorted(texts_of(tmp_path / "out2", "train") + texts_of(tmp_path / "out2", "valid")) == [
        "one",
        "two ☃",
    ]
    assert index.num_documents("valid") == 1


def test_a_dataset_card_decides_the_splits_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(json_lines(["first text"]))
    (source / "b.jsonl").write_bytes(json_lines(["second text"]))
    (source / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: b.jsonl\n  - split: validation\n    path: a.jsonl\n---\n# A card\n"
    )
    prepare(source, tmp_path / "out")
    assert texts_of(tmp_path / "out", "train") == ["second text"]
    assert texts_of(tmp_path / "out", "valid") == ["first text"]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "bpe", "folder"])
def test_the_tokenizer_travels_and_gives_the_same_tokens(tokenizer, novels, tmp_path):
    if tokenizer == "folder":
        tokenizer = tmp_path / "tokenizer"
        train_bpe([some_text(0, 300)], 300).save_pretrained(tokenizer)
    more = {"vocab_size": 280} if tokenizer == "bpe" else {}
    index = prepare(novels, tmp_path / "out", tokenizer=tokenizer, valid_fraction=0, **more)
    expected = [json.loads(line)["text"] for line in novels.read_text().splitlines()]
    assert texts_of(tmp_path / "out", "train") == expected
    stream = TokenStream(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(stream.tokenizer_folder)
    tokens = [[*encode(loaded, text), loaded.eos_token_id] for text in expected]
    assert stream[:].tolist() == [token for document in tokens for token in document]
    assert index.vocab_size == len(loaded)
    assert stream.max_token == loaded.eos_token_id
    assert index.dtype == "uint16"


def test_a_large_vocabulary_is_stored_in_32_bits(novels, tmp_path):
    vocabulary = {chr(i): i for i in range(2**16 + 1) if not 0xD800 <= i < 0xE000}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))
    index = prepare(novels, tmp_path / "out", tokenizer=tokenizer, valid_fraction=0)
    assert index.dtype == "uint32"
    assert index.vocab_size == 2**16 + 1
    lines = [json.loads(line)["text"] for line in novels.read_text().splitlines()]
    stream = TokenStream(tmp_path / "out")
    assert "".join(map(chr, stream[:])) == "".join(lines)  # no end of text in this vocabulary
    assert stream.document_ends(0, len(stream)).tolist() == np.cumsum([*map(len, lines)]).tolist()


def test_a_text_alone_gives_its_last_tenth_for_validation(tmp_path):
    text = some_text(3, 500)
    (tmp_path / "text.txt").write_bytes(text.encode())
    prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer="characters")
    cut = int(len(text) * 0.9)
    assert texts_of(tmp_path / "out", "train") == [text[:cut]]
    assert texts_of(tmp_path / "out", "valid") == [text[cut:]]
    index = prepare(tmp_path / "text.txt", tmp_path / "none", valid_fraction=0)
    assert list(index.splits) == ["train"]


def test_a_long_text_alone_is_still_two_documents(tmp_path):
    text = some_text(3, PIECE_CHARACTERS // 2)  # three pieces, cut in the second
    (tmp_path / "text.txt").write_bytes(text.encode())
    prepare(tmp_path / "text.txt", tmp_path / "out", valid_fraction=0.5)
    cut = len(text) // 2
    assert texts_of(tmp_path / "out", "train") == [text[:cut]]
    assert texts_of(tmp_path / "out", "valid") == [text[cut:]]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_left_out_and_nothing_else(name, tmp_path):
    text = "\r\n no\ufeffbreak\x85\u2028\x00 \t\n"
    raw = json_lines([text]) if name == "a.jsonl" else text.encode()
    (tmp_path / name).write_bytes("\ufeff".encode() + raw)
    prepare(tmp_path / name, tmp_path / "out", valid_fraction=0)
    assert texts_of(tmp_path / "out", "train") == [text]


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"),
    [
        (2, None, 1),
        (100, None, 10),
        (3_000, None, 50),
        (200_000, None, 100),
        (10, 0.3, 3),
        (9, 0.01, 1),
    ],
)
def test_held_out_documents_are_random_and_as_many_as_meant(documents, fraction, held_out):
    number = splits._held_out(documents, fraction)
    assert number == held_out
    chosen = splits._choose(documents, number, 2357)
    assert len(chosen) == held_out
    assert chosen <= set(range(documents))
    if documents == 200_000:
        assert chosen != splits._choose(documents, number, 2358)
        assert 0.4 < np.mean(list(chosen)) / documents < 0.6  # 100 uniform numbers: sd 0.029


def test_validation_and_training_documents_are_all_documents(novels, tmp_path):
    prepare(novels, tmp_path / "out", valid_fraction=0.25)
    train, valid = (texts_of(tmp_path / "out", split) for split in ("train", "valid"))
    expected = [json.loads(line)["text"] for line in novels.read_text().splitlines()]
    assert len(valid) == 3
    assert Counter(train + valid) == Counter(expected)
    assert train == [text for text in expected if text not in valid]


def test_the_end_of_text_within_a_text_separates_documents(tmp_path):
    (tmp_path / "stories.txt").write_text(
        "Once.<|endoftext|>\nTwice upon.<|endoftext|><|endoftext|>Thrice.<|endoftext|>"
    )
    prepare(tmp_path / "stories.txt", tmp_path / "out", valid_fraction=0)
    assert texts_of(tmp_path / "out", "train") == ["Once.", "\nTwice upon.", "Thrice."]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pieces_do_not_depend_on_how_a_text_came(data):
    words = data.draw(
        st.lists(st.sampled_from(["a", "bé", " ", "\n", "1", "|", "<END>"]), max_size=60)
    )
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("h3lm.data.sources.PIECE_CHARACTERS", 8)
        whole = list(pieces([Document("here", [text])], "<END>"))
        assert list(pieces([Document("here", parts)], "<END>")) == whole
        assert all(len(piece.text) <= 8 for piece in whole)
    documents = "".join(piece.text + "<END>" * piece.ends_document for piece in whole)
    expected = [document for document in text.split("<END>") if document]
    assert documents == "".join(document + "<END>" for document in expected)


def test_pieces_of_a_long_text_give_the_tokens_of_the_whole(tmp_path):
    text = some_text(5, PIECE_CHARACTERS // 2)
    tokenizer = train_bpe([text[:10_000]], 400)
    (tmp_path / "long.txt").write_bytes(text.encode())
    source = open_source(tmp_path / "long.txt")
    assert len(list(pieces(source.documents("train"), "<|endoftext|>"))) == 3
    prepare(tmp_path / "long.txt", tmp_path / "out", tokenizer=tokenizer, valid_fraction=0)
    whole = encode(tokenizer, text)
    np.testing.assert_array_equal(TokenStream(tmp_path / "out")[:-1], whole)


def test_the_same_bytes_for_any_number_of_workers_and_any_packing(tmp_path):
    texts = [some_text(i, 4000) for i in range(6)]
    one = {"tokenizer": "bpe", "vocab_size": 300, "shard_tokens": 7_001}
    results = []
    for workers, packing in ((1, ""), (2, ".xz"), (5, ".zst")):
        source = tmp_path / f"novels{workers}.jsonl{packing}"
        source.write_bytes(PACK[packing](json_lines(texts)))
        out = tmp_path / f"out{workers}"
        index = prepare(source, out, workers=workers, **one)
        assert len(index.splits["train"]) > 3
        assert {shard.num_tokens for shard in index.splits["train"][:-1]} == {7_001}
        results.append(contents(out))
    assert results[0] == results[1] == results[2]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    source = tmp_path / "novels.jsonl.gz"
    source.write_bytes(gzip.compress(json_lines([some_text(i, 30_000) for i in range(4)])))
    kind = {"tokenizer": "bpe", "vocab_size": 270, "shard_tokens": 10_000, "workers": 2}
    prepare(source, tmp_path / "undisturbed", **kind)
    out = tmp_path / "out"
    code = (
        "import sys\nfrom h3lm.data.prepare import prepare\n"
        f"prepare({str(source)!r}, {str(out)!r}, block_length=8, progress=False, **{kind!r})"
    )
    number = len(Index.load(tmp_path / "undisturbed").splits["train"])
    kept: dict[Path, int] = {}
    for share in (0.3, 0.7):
        process = subprocess.Popen([sys.executable, "-c", code])
        wanted = out / f"train-{int(number * share):05d}.tokens.npy"
        deadline = time.monotonic() + 60
        while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "index.json").exists()
        with pytest.raises(UserError, match="was not finished"):
            Blocks(out)
        for path, modified in kept.items():
            assert path.stat().st_mtime_ns == modified  # not made again
        kept = {path: path.stat().st_mtime_ns for path in sorted(out.glob("train-*.npy"))[:-2]}
    assert len(kept) > number  # two files a shard
    prepare(source, out, **kind)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_two_at_once_in_one_folder_is_one_line_and_a_killed_ones_lock_holds_nobody(
    novels, tmp_path
):
    out = tmp_path / "out"
    code = (
        "import sys\nfrom pathlib import Path\nfrom h3lm.data.lock import only_writer\n"
        f"with only_writer(Path({str(out)!r}), 'another h3lm prepare'):\n"
        "    print('locked', flush=True)\n    sys.stdin.read()"
    )
    out.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"another h3lm prepare .process {other.pid} on") as e:
            prepare(novels, out)
        assert "writes here: wait for it or take another folder" in str(e.value)
        assert "\n" not in str(e.value)
        other.kill()
    assert (out / LOCK_FILE).exists()
    prepare(novels, out)
    prepare(novels, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")  # and no lock is left behind


def test_interrupted_between_any_two_writes_it_goes_on_to_the_same_bytes(
    novels, tmp_path, monkeypatch
):
    kind = {"tokenizer": "characters", "shard_tokens": 300, "valid_fraction": 0.2, "workers": 1}
    prepare(novels, tmp_path / "undisturbed", **kind)
    out = tmp_path / "out"
    replace, left = Path.replace, [0]

    def replace_or_stop(self, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_stop)
    stops = 0
    while True:
        # Each run renames the journal, then at most one file, two (a shard) or three.
        left[0] = 2 + stops % 3
        try:
            prepare(novels, out, **kind)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 100
        if stops % 3 == 0:  # and a crash of the machine may leave the journal's last line torn
            with (out / "unfinished.jsonl").open("a") as journal:
                journal.write('{"split": "tra')
    assert stops > 5
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_damaged_shards_are_made_again_on_resuming(novels, tmp_path, monkeypatch):
    kind = {"shard_tokens": 300, "workers": 1, "valid_fraction": 0}
    prepare(novels, tmp_path / "undisturbed", **kind)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="shorter than a block"):
        prepare(novels, out, **kind | {"block_length": 10**6})
    paths = sorted(out.glob("train-*.tokens.npy"))
    assert len(paths) > 5
    for path in (paths[2], paths[4]):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    # Stopped once more after the first repair, so that old and new notes stand in one journal.
    note, calls = shards.Journal.note, []

    def note_once(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        note(self, *arguments)

    monkeypatch.setattr(shards.Journal, "note", note_once)
    with pytest.raises(KeyboardInterrupt):
        prepare(novels, out, **kind)
    monkeypatch.undo()
    prepare(novels, out, **kind)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_finished_folder_is_left_alone_and_a_damaged_one_mended(novels, tmp_path):
    out = tmp_path / "out"
    first = prepare(novels, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "unfinished.jsonl").write_text("{}\n")  # as a crash at the very end leaves it
    assert prepare(novels, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    good = contents(out)
    for name in ("train-00000.tokens.npy", "tokenizer/tokenizer.json"):
        (out / name).write_bytes(good[name][:-1])
        prepare(novels, out)
        assert contents(out) == good
    longer = prepare(novels, out, block_length=16)  # decides no bytes but the index's
    assert longer.block_length == 16
    assert Blocks(out).block_length == 16
    assert contents(out) | {"index.json": b""} == good | {"index.json": b""}


def test_memory_does_not_grow_with_the_collection(tmp_path):
    code = (
        "import resource, sys\nfrom h3lm.data.prepare import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], progress=False, workers=2, shard_tokens=2**18)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    document = some_text(0, 40_000)
    for number in (5, 60):
        source = tmp_path / f"{number}.jsonl.gz"
        source.write_bytes(gzip.compress(json_lines([document] * number), 1))
        done = subprocess.run(
            [sys.executable, "-c", code, str(source), str(tmp_path / f"out{number}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    # The larger holds 10 MB of text more.
    assert peaks[1] < peaks[0] + 8, peaks


def bad(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


HEX = np.random.default_rng(0).bytes(999).hex().encode()  # hardly to be compressed
GOOD_LINE = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ab\xc3", "byte 2, 0xc3, is not UTF-8"),
        ("a.txt", b"x" * 2**20 + b"\xe2\x98" + b"y", "byte 1,048,576, 0xe2, is not UTF-8"),
        ("a.txt", b"x" * (2**20 - 1) + b"\xe2\x98" + b"y", "byte 1,048,575, 0xe2"),
        ("a.txt.gz", gzip.compress(b"ab\xff", mtime=0), r"byte 2 \(of the unpacked text\), 0xff"),
        ("a.jsonl", GOOD_LINE + b'{"text": "\xff"}', "byte 27, 0xff, is not UTF-8"),
        ("a.jsonl", GOOD_LINE + b'{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1: JSON lines hold one object a line, and this is a list"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "line 1: no field 'text', only 'body', 'id'"),
        ("a.jsonl", b'{"text": null}', "line 1: the field 'text' is a NoneType, not a text"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "line 1: holds half a surrogate pair"),
        ("a.txt.xz", lzma.compress(HEX)[:500], "damaged or truncated .xz file"),
        ("a.txt.gz", gzip.compress(HEX, mtime=0)[:500], "damaged or truncated .gz file"),
        ("a.txt.zst", zstandard.compress(HEX)[:500], "damaged or truncated .zst file"),
        ("a.txt.xz", b"plain text", "damaged or truncated .xz file"),
        ("a.txt.gz", b"plain text", "damaged or truncated .gz file"),
        ("a.txt.zst", b"plain text", "damaged or truncated .zst file"),
        ("a.parquet", b"plain text", "no Parquet file, or damaged"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.jsonl", b'\n{"text": ""}\n', "the corpus is empty"),
        ("a.txt", b"eight by", "the train text is shorter than a block: 8 tokens"),
        ("a.txt", b"x" * 30, "the valid text is shorter than a block: 4 tokens.*--valid-fraction"),
    ],
)
def test_bad_text_is_one_clear_line(name, data, message, tmp_path):
    source = bad(tmp_path, name, data)
    with pytest.raises(UserError, match=message) as caught:
        prepare(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "shorter" in message or "empty" in message or str(source) in str(caught.value)
    assert not (tmp_path / "out" / "index.json").exists()


def test_bad_parquet_is_one_clear_line(tmp_path):
    source = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), source)
    with pytest.raises(UserError, match=r"a\.parquet: no field 'text', only 'body'"):
        prepare(source, tmp_path / "out")
    damaged = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff")
    )
    parquet.write_table(pyarrow.table({"text": damaged}), source)
    with pytest.raises(UserError, match=r"a\.parquet, rows 1 to 16: text that is not UTF-8"):
        prepare(source, tmp_path / "out")


def test_characters_that_a_tokenizer_lacks_are_named_with_their_place(novels, tmp_path):
    from h3lm.data.tokenizers import character_tokenizer

    with pytest.raises(UserError, match=r"novels\.jsonl, line 1: character 0, '.', is not in"):
        prepare(novels, tmp_path / "out", tokenizer=character_tokenizer("\0"))


def test_bad_sources_are_one_clear_line(novels, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train-test.txt").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    prepare(novels, tmp_path / "prepared")
    cases = {
        "missing.txt": "no such file or folder",
        str(tmp_path / "missing"): "no such file or folder",
        str(tmp_path / "empty"): "no text in this folder",
        str(tmp_path / "both"): "its name tells of several splits, test and train",
        str(tmp_path / "saved"): "this saved dataset cannot be read",
        str(tmp_path / "prepared"): "is prepared data already",
        "no-such-dataset": "neither a file, a folder, nor a dataset",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            prepare(source, tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_missing_libraries_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    sources = {
        "datasets": "some-dataset",
        "zstandard": bad(tmp_path, "a.txt.zst", zstandard.compress(b"text")),
        "pyarrow": bad(tmp_path, "a.parquet", b""),
    }
    for name, source in sources.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf"needs {name}: .*pip install 'h3lm\[data\]'"):
                prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokenizer": "bpe"}, "the tokenizer 'bpe' needs a vocab_size"),
        ({"vocab_size": 300}, "vocab_size is for the tokenizer 'bpe'"),
        ({"tokenizer": "bpe", "vocab_size": 9}, "vocab_size=9 is too small"),
        ({"tokenizer": "./missing"}, "no such tokenizer folder"),
        ({"valid_fraction": 1.0}, r"valid_fraction=1\.0 must be"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be"),
        ({"workers": 0}, "workers=0 must be"),
        ({"block_length": 0}, "block_length=0 must be"),
    ],
)
def test_bad_settings_are_one_clear_line(wrong, message, novels, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(novels, tmp_path / "out", **wrong)


def test_a_folder_of_other_settings_is_refused_with_what_differs(novels, tmp_path):
    out = tmp_path / "out"
    prepare(novels, out)
    before = contents(out)
    with pytest.raises(UserError, match="shard_tokens is 4194304 there and 99 now: take"):
        prepare(novels, out, shard_tokens=99)
    with pytest.raises(UserError, match=r"valid_fraction is not set there and 0\.5 now"):
        prepare(novels, out, valid_fraction=0.5)
    with pytest.raises(UserError, match="tokenizer name is not set there and characters now"):
        prepare(novels, out, tokenizer="characters")
    novels.write_bytes(novels.read_bytes() + json_lines(["one more"]))
    with pytest.raises(UserError, match="source train documents is 12 there and 13 now"):
        prepare(novels, out)
    assert contents(out) == before


def test_an_unfinished_folder_of_other_settings_is_refused_as_well(novels, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="shorter than a block"):
        prepare(novels, out, block_length=10**6)
    with pytest.raises(UserError, match="seed is 2357 there and 1 now"):
        prepare(novels, out, seed=1)


def test_a_folder_in_which_nothing_was_finished_takes_other_settings(novels, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="vocab_size=3 is too small"):
        prepare(novels, out, tokenizer="bpe", vocab_size=3)
    assert prepare(novels, out, tokenizer="bpe", vocab_size=270).vocab_size == 270
    assert contents(out) == contents_of_new(novels, tmp_path, tokenizer="bpe", vocab_size=270)


def contents_of_new(source, tmp_path, **settings):
    prepare(source, tmp_path / "new", **settings)
    return contents(tmp_path / "new")


def test_places_that_cannot_be_written_are_refused_before_reading(novels, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    cases = {
        novels / "below": "cannot be written as a folder",
        novels: "cannot be written as a folder",
        tmp_path / "full": "is not empty and holds no prepared data",
    }
    for out, message in cases.items():
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / "never-read.txt", out)
    with pytest.raises(UserError, match="lies in the source"):
        prepare(tmp_path, tmp_path / "out")


def test_a_full_disk_is_one_line_and_costs_nothing_finished(novels, tmp_path, monkeypatch):
    kind = {"shard_tokens": 500, "valid_fraction": 0}
    prepare(novels, tmp_path / "undisturbed", **kind)
    out = tmp_path / "out"
    write, calls = shards.write_array, []

    def write_until_full(path, array):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, array)

    monkeypatch.setattr(shards, "write_array", write_until_full)
    with pytest.raises(UserError, match=r"no space left.*the finished shards are kept"):
        prepare(novels, out, **kind)
    monkeypatch.setattr(shards, "write_array", write)
    kept = {path: path.stat().st_mtime_ns for path in sorted(out.glob("train-*.npy"))[:4]}
    prepare(novels, out, **kind)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_file_size_limit_leaves_no_half_written_shard(novels, tmp_path):
    limit = 40_000
    code = (
        "import resource, sys\nfrom h3lm.data.prepare import prepare\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "prepare(sys.argv[1], sys.argv[2], block_length=8, progress=False, shard_tokens=2**16)"
    )
    big = tmp_path / "big.txt"
    big.write_text(some_text(1, 10_000))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(big), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no space left (File too large); the finished shards are kept" in done.stderr
    assert not list(out.glob("*.npy*"))
    prepare(big, out, shard_tokens=2**16)
    TokenStream(out).verify()


def test_a_limit_that_the_tokenizer_meets_is_one_line(novels, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            prepare(novels, tmp_path / "out", tokenizer="characters")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare(novels, tmp_path / "out", tokenizer="characters")
    TokenStream(tmp_path / "out").verify()
