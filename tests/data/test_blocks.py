import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h3lm.data.blocks import Blocks, Index, Shard, TokenStream
from h3lm.data.shards import write_array
from h3lm.errors import UserError


def write_folder(folder, documents, shard_tokens, *, block_length=4, dtype=np.uint16):
    """A prepared folder of these documents (lists of ids), by the format's description alone."""
    stream = [token for document in documents for token in document]
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    shards = []
    for i, start in enumerate(range(0, len(stream), shard_tokens)):
        tokens = np.array(stream[start : start + shard_tokens], dtype)
        inside = ends[(ends > start) & (ends <= start + len(tokens))] - start
        shards.append(
            Shard(
                num_tokens=len(tokens),
                num_documents=len(inside),
                max_token=int(tokens.max()),
                tokens=write_array(folder / f"train-{i:05d}.tokens.npy", tokens),
                documents=write_array(
                    folder / f"train-{i:05d}.documents.npy", inside.astype(np.uint32)
                ),
            )
        )
    vocab_size = max(stream) + 1
    index = Index({}, block_length, np.dtype(dtype).name, vocab_size, (), {"train": tuple(shards)})
    (folder / "index.json").write_text(index.to_json())
    return np.array(stream), ends


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, [[1, 2, 0], [3, 0], [4, 5, 6, 7, 8, 9, 0], [2, 0]], 5)
    return tmp_path


collections = st.lists(
    st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), min_size=1, max_size=9
)


@settings(max_examples=40, deadline=None)
@given(documents=collections, shard_tokens=st.integers(1, 12), length=st.integers(1, 9))
def test_blocks_cover_every_token_once_and_overlap_by_one(
    tmp_path_factory, documents, shard_tokens, length
):
    folder = tmp_path_factory.mktemp("blocks")
    stream, ends = write_folder(folder, documents, shard_tokens)
    whole = (len(stream) - 1) // length
    if whole == 0:
        with pytest.raises(UserError, match="shorter than a block"):
            Blocks(folder, block_length=length)
        return
    blocks = Blocks(folder, block_length=length)
    assert len(blocks) == whole == len(list(blocks))
    covered = np.concatenate([block.tokens[:-1] for block in blocks])
    np.testing.assert_array_equal(covered, stream[: whole * length])
    targets = np.concatenate([block.tokens[1:] for block in blocks])
    np.testing.assert_array_equal(targets, stream[1 : whole * length + 1])
    # Positions restart exactly where a document begins, and at a block's beginning.
    positions = np.concatenate([block.position_ids() for block in blocks])
    expected = []
    for i in range(whole * length):
        begins = i % length == 0 or i in ends
        expected.append(0 if begins else expected[-1] + 1)
    assert positions.tolist() == expected
    shutil.rmtree(folder)


@settings(max_examples=40, deadline=None)
@given(documents=collections, shard_tokens=st.integers(1, 12), data=st.data())
def test_stream_reads_any_stretch(tmp_path_factory, documents, shard_tokens, data):
    folder = tmp_path_factory.mktemp("stream")
    expected, ends = write_folder(folder, documents, shard_tokens, dtype=np.uint32)
    stream = TokenStream(folder)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert len(stream) == len(expected)
    assert stream[start:stop].dtype == np.int64
    assert stream[start:stop].tolist() == expected[start:stop].tolist()
    assert stream[stop:start].tolist() == expected[stop:start].tolist()
    assert stream[-1] == expected[-1]
    inside = ends[(ends > start) & (ends <= stop)]
    assert stream.document_ends(start, stop).tolist() == inside.tolist()
    assert stream.max_token == expected.max()
    shutil.rmtree(folder)


def test_indexing_is_that_of_a_sequence(folder):
    blocks = Blocks(folder)  # 14 tokens, blocks of 4
    assert len(blocks) == 3
    assert blocks[-1].tokens.tolist() == blocks[2].tokens.tolist() == [7, 8, 9, 0, 2]
    for i in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            blocks[i]
    with pytest.raises(IndexError, match="of 14"):
        blocks.stream[14]
    with pytest.raises(ValueError, match="step 1, not 2"):
        blocks.stream[0:4:2]


def test_blocks_pickle_without_their_tokens(folder):
    blocks = Blocks(folder)
    before = blocks[1].tokens
    pickled = pickle.dumps(blocks)
    assert not len(pickle.loads(pickled).stream.maps)
    assert pickle.loads(pickled)[1].tokens.tolist() == before.tolist()


def test_few_files_stay_open(folder, monkeypatch):
    monkeypatch.setattr("h3lm.data.blocks._MAPS_KEPT_OPEN", 2)
    stream = TokenStream(folder)
    assert stream[:].tolist() == stream[:].tolist() == [1, 2, 0, 3, 0, *range(4, 10), 0, 2, 0]
    assert len(stream.maps) == 2


def test_reading_needs_no_datasets_library(folder):
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        "from h3lm.data.blocks import Blocks\n"
        f"print(Blocks({str(folder)!r})[0].tokens.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[1, 2, 0, 3, 0]\n", done.stderr


def test_a_truncated_shard_is_found_on_opening(folder):
    path = folder / "train-00001.tokens.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"train-00001\.tokens\.npy: truncated or altered: 137 bytes instead of 138"
    ):
        Blocks(folder)


@pytest.mark.parametrize("name", ["train-00001.tokens.npy", "train-00000.documents.npy"])
def test_an_altered_shard_is_found_by_its_checksum(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    stream = TokenStream(folder)
    for verify in (stream.verify, lambda: stream.index.verify(folder)):
        with pytest.raises(UserError, match=rf"{name}: altered: its sha256 is"):
            verify()


def test_an_untouched_folder_verifies(folder):
    TokenStream(folder).verify()
    Index.load(folder).verify(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "train-00002.tokens.npy").unlink()
    with pytest.raises(UserError, match=r"train-00002\.tokens\.npy: cannot be read"):
        Blocks(folder)


def test_a_shard_of_another_type_is_refused_when_read(folder):
    path = folder / "train-00000.tokens.npy"
    header = path.read_bytes().replace(b"'<u2'", b"'<i2'")
    path.write_bytes(header)
    with pytest.raises(UserError, match="holds int16 of shape"):
        Blocks(folder)[0]


def test_a_smaller_vocabulary_is_refused(folder):
    stream = TokenStream(folder)
    stream.check_vocabulary(10)
    with pytest.raises(UserError, match="go up to id 9, but the model's vocab_size is 9"):
        stream.check_vocabulary(9)


def test_what_is_not_prepared_is_one_clear_line(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    cases = [
        (empty, "no prepared data here"),
        (empty / "missing", "no prepared data here"),
        (folder / "index.json", "no prepared data here"),
    ]
    for place, message in cases:
        with pytest.raises(UserError, match=message):
            Blocks(place)
    (empty / "unfinished.jsonl").touch()
    with pytest.raises(UserError, match="was not finished: run the same h3lm prepare again"):
        Blocks(empty)
    with pytest.raises(UserError, match="no split 'valid' here, only train"):
        Blocks(folder, "valid")
    with pytest.raises(UserError, match="14 tokens, and a block of block_length=14 needs 15"):
        Blocks(folder, block_length=14)
    with pytest.raises(UserError, match="block_length=0 must be at least 1"):
        Blocks(folder, block_length=0)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_index_is_one_clear_line(folder, damage):
    (folder / "index.json").write_text(damage)
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        Blocks(folder)


def test_another_format_version_is_refused(folder):
    fields = {"format_version": 2} | asdict(Index.load(folder))
    (folder / "index.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="format version 2, and this h3lm reads version 1"):
        Blocks(folder)
