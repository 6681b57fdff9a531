import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from h3lm.data.labelled import Example, Labelled, LabelledIndex, RowKind, write_labelled
from h3lm.data.listops import evaluate
from h3lm.data.prepare_labelled import LabelledOptions, describe, prepare_labelled
from h3lm.errors import UserError


def prepare(source, out, form, **options):
    return prepare_labelled(source, out, form, LabelledOptions(**options))


# The form itself


class Given:
    classes = ("a", "b")

    def __init__(self, examples, kind=None):
        self.given = examples
        self.kind = kind or RowKind("float32", 2)
        self.splits = list(examples)

    def examples(self, split):
        yield from self.given[split]


def signals(n, channels=2):
    rng = np.random.default_rng(0)
    return [
        Example((rng.normal(size=(3 + i, channels)).astype(np.float32),), i % 2) for i in range(n)
    ]


def test_what_is_written_is_read(tmp_path):
    given = {"train": signals(5), "test": signals(2)}
    index = write_labelled(Given(given), tmp_path / "out", {"form": "test"})
    assert LabelledIndex.load(tmp_path / "out") == index
    index.verify(tmp_path / "out")
    for split, examples in given.items():
        found = Labelled(tmp_path / "out", split)
        again = pickle.loads(pickle.dumps(found))
        assert len(found) == len(examples)
        for i, example in enumerate(examples):
            for read in (found[i], again[i]):
                assert np.array_equal(read.rows[0], example.rows[0])
                assert read.label == example.label
    assert (index.splits["train"].shortest, index.splits["train"].longest) == (3, 7)


def test_pairs_and_scaled_integers(tmp_path):
    pairs = [Example((np.arange(3), np.arange(5)), 1), Example((np.arange(2), np.arange(1)), 0)]
    kind = RowKind("uint16", vocab_size=9, rows_per_example=2)
    write_labelled(Given({"train": pairs}, kind), tmp_path / "pairs", {})
    read = Labelled(tmp_path / "pairs")
    assert [row.tolist() for row in read[0].rows] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert read[1].rows[1].dtype == np.int64
    kind = RowKind("uint8", 1, scale=0.5, shift=-1.0)
    pixels = [Example((np.array([[0], [2]]),), 0)]
    write_labelled(Given({"train": pixels}, kind), tmp_path / "pixels", {})
    assert Labelled(tmp_path / "pixels")[0].rows[0].tolist() == [[-1.0], [0.0]]


def test_an_unfinished_folder_is_written_anew_and_a_finished_one_kept(tmp_path):
    out = tmp_path / "out"

    class Interrupted(Given):
        def examples(self, split):
            yield self.given[split][0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_labelled(Interrupted({"train": signals(3)}), out, {})
    with pytest.raises(UserError, match="no labelled data here"):
        Labelled(out)
    write_labelled(Given({"train": signals(3)}), out, {})
    assert len(Labelled(out)) == 3
    with pytest.raises(UserError, match="holds prepared data already"):
        write_labelled(Given({"train": signals(3)}), out, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        write_labelled(Given({"train": signals(3)}), tmp_path / "other", {})


def test_damage_is_found(tmp_path):
    out = tmp_path / "out"
    write_labelled(Given({"train": signals(3)}), out, {})
    with pytest.raises(UserError, match="no split 'test' here, only train"):
        Labelled(out, "test")
    data = (out / "train.rows.bin").read_bytes()
    (out / "train.rows.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match="truncated or altered"):
        Labelled(out)
    (out / "train.rows.bin").write_bytes(data[:-1] + b"x")
    with pytest.raises(UserError, match="altered"):
        LabelledIndex.load(out).verify(out)
    (out / "labelled.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Labelled(out)
    (out / "labelled.json").write_text('{"format_version": 9}')
    with pytest.raises(UserError, match="format version 9"):
        Labelled(out)


def test_an_empty_split_and_an_empty_row_are_refused(tmp_path):
    with pytest.raises(UserError, match="train split is empty"):
        write_labelled(Given({"train": []}), tmp_path / "a", {})
    with pytest.raises(UserError, match="train example 0: it is empty"):
        write_labelled(Given({"train": [Example((np.zeros((0, 2)),), 0)]}), tmp_path / "b", {})


# Tables

TS = """# a comment
@problemName tiny
@univariate false
@classLabel true left right
@data
1,2,3:4,5,6:left
-1,0,1:0.5,0,1:right
"""


def test_ts_files_with_channels(tmp_path):
    (tmp_path / "Tiny_TRAIN.ts").write_text(TS)
    (tmp_path / "Tiny_TEST.ts").write_text(TS.replace("1,2,3", "9,9,9"))
    index = prepare(tmp_path / "Tiny", tmp_path / "out", "table")
    assert index.classes == ("left", "right")
    train, test = (Labelled(tmp_path / "out", split) for split in ("train", "test"))
    assert train[0].rows[0].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert test[0].rows[0][0].tolist() == [9, 4]
    assert train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("1,2,3:4,5,6:left", "1,nan,3:4,5,6:left"), "row 1 holds a missing .* position 2"),
        (("-1,0,1:0.5", "-1,0,?:0.5"), "row 2 holds a missing or infinite value at position 3"),
        (("1:right", "1:up"), "row 2: unknown label 'up', not one of left, right"),
        (("1,2,3:4", "1,x,3:4"), "row 1: could not convert"),
        (("1,2,3:4,5,6:", ""), "row 1 has no label"),
        (("1,2,3:4,5,6:left", "1,2:4,5:left"), "give --pad"),
        (("-1,0,1:0.5,0,1:", "0.5,0,1:"), "row 2 has 1 channels, the first 2"),
    ],
)
def test_mistakes_in_a_ts_file(tmp_path, changed, words):
    (tmp_path / "bad.ts").write_text(TS.replace(*changed))
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "bad.ts", tmp_path / "out", "table")


def test_npz_tables(tmp_path):
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(12, 5)), np.arange(12) % 3
    np.savez(tmp_path / "both.npz", train_values=values, train_labels=labels,
             test_values=values[:3], test_labels=labels[:3])  # fmt: skip
    index = prepare(tmp_path / "both.npz", tmp_path / "out", "table", valid_fraction=0.3)
    assert list(index.splits) == ["train", "test", "valid"]
    counts = {name: split.num_examples for name, split in index.splits.items()}
    assert counts["test"] == 3
    assert counts["train"] + counts["valid"] == 12
    assert 0 < counts["valid"] < 8
    values[7, 2] = np.nan
    np.savez(tmp_path / "nan.npz", values=values, labels=labels)
    with pytest.raises(UserError, match=r"nan.npz, values: row 8 holds nan"):
        prepare(tmp_path / "nan.npz", tmp_path / "no", "table")
    np.savez(tmp_path / "none.npz", values=values)
    with pytest.raises(UserError, match="has values but no labels"):
        prepare(tmp_path / "none.npz", tmp_path / "no", "table")
    np.savez(tmp_path / "x.npz", x=values)
    with pytest.raises(UserError, match="holds x; wanted are values and labels"):
        prepare(tmp_path / "x.npz", tmp_path / "no", "table")
    np.savez(tmp_path / "new.npz", train_values=np.ones((2, 4)), train_labels=["a", "b"],
             test_values=np.ones((1, 4)), test_labels=["c"])  # fmt: skip
    with pytest.raises(UserError, match="row 1: unknown label 'c', not one of a, b"):
        prepare(tmp_path / "new.npz", tmp_path / "no", "table")


def test_parquet_tables_of_unequal_lengths(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = {
        "x": [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]], "y": ["a", "b", "a"],
        "part": ["train", "train", "test"],
    }  # fmt: skip
    write_table(pa.table(rows), tmp_path / "t.parquet")
    names = {"values_field": "x", "label_field": "y", "split_field": "part"}
    with pytest.raises(UserError, match="train example 1: 1 positions, the ones before have 2"):
        prepare(tmp_path / "t.parquet", tmp_path / "no", "table", **names)
    prepare(tmp_path / "t.parquet", tmp_path / "out", "table", pad=True, **names)
    assert Labelled(tmp_path / "out", "test")[0].rows[0].tolist() == [[4], [5], [6]]
    with pytest.raises(UserError, match="no column 'values', only 'x', 'y', 'part'"):
        prepare(tmp_path / "t.parquet", tmp_path / "no", "table")
    write_table(pa.table({"x": [[1.0, None]], "y": ["a"]}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match="row 1 holds nan"):
        prepare(tmp_path / "n.parquet", tmp_path / "no", "table", values_field="x", label_field="y")


# Sound


@pytest.fixture
def sounds(tmp_path):
    soundfile = pytest.importorskip("soundfile")

    def write(name, rate=8000, channels=1, n=80, subtype=None, value=None):
        path = tmp_path / "sounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(n) / rate
        wave = 0.5 * np.sin(2 * np.pi * 440 * time)[:, None].repeat(channels, 1)
        if value is not None:
            wave[3] = value
        soundfile.write(path, wave, rate, subtype=subtype)
        return path

    write("yes/one.wav")
    write("yes/two.flac")
    write("no/one.wav")
    return write


def test_a_folder_of_sounds(sounds, tmp_path):
    index = prepare(tmp_path / "sounds", tmp_path / "out", "audio")
    assert index.classes == ("no", "yes")
    assert index.kind.sample_rate == 8000
    data = Labelled(tmp_path / "out")
    assert data.labels.tolist() == [0, 1, 1]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(80) / 8000)
    for i in range(3):
        assert np.abs(data[i].rows[0][:, 0] - expected).max() < 1e-4


def test_another_sample_rate_is_refused_or_converted(sounds, tmp_path):
    sounds("yes/three.wav", rate=16000, n=1600)
    with pytest.raises(UserError, match=r"three.wav: 16,000 Hz instead of 8,000: give --resample"):
        prepare(tmp_path / "sounds", tmp_path / "no", "audio", pad=True)
    prepare(tmp_path / "sounds", tmp_path / "out", "audio", pad=True, resample=True)
    wave = Labelled(tmp_path / "out")[2].rows[0][:, 0]
    assert len(wave) == 800
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(800) / 8000)
    assert np.abs(wave - expected)[80:-80].max() < 5e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda write: write("yes/b.wav", channels=2), r"b.wav: 2 channels instead of 1"),
        (
            lambda write: write("yes/b.wav", subtype="FLOAT", value=np.nan),
            r"b.wav: sample 4 is not a finite number",
        ),
        (
            lambda write: write("up/a.wav").unlink(),
            r"up: an empty class: no .wav or .flac file in it",
        ),
        (lambda write: write("no/x.wav").write_bytes(b"noise"), r"x.wav: cannot be read as sound"),
        (lambda write: write("no/x.wav", n=70), r"70 positions, the ones before have 80"),
    ],
)
def test_mistakes_in_a_folder_of_sounds(sounds, tmp_path, make, words):
    make(sounds)
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "sounds", tmp_path / "out", "audio")


def test_splits_by_folder_share_their_classes(sounds, tmp_path):
    for name in ("split/train/a/1.wav", "split/train/b/1.wav", "split/test/a/1.wav"):
        sounds(name)
    with pytest.raises(UserError, match="test: no folder for the class 'b'"):
        prepare(tmp_path / "sounds" / "split", tmp_path / "no", "audio")
    sounds("split/test/b/1.wav")
    index = prepare(tmp_path / "sounds" / "split", tmp_path / "out", "audio")
    assert list(index.splits) == ["train", "test"]
    sounds("split/test/c/1.wav")
    with pytest.raises(UserError, match="c: an unknown label, not in the training split"):
        prepare(tmp_path / "sounds" / "split", tmp_path / "no2", "audio")


def test_speech_commands_by_its_lists(sounds, tmp_path):
    from h3lm.data.signals import SC10

    root = tmp_path / "sounds" / "commands"
    for word in (*SC10, "bed"):
        for i in range(3):
            sounds(f"commands/{word}/{i}.wav", rate=16000)
    with pytest.raises(UserError, match=r"validation_list.txt: missing .*speech_commands_v0.02"):
        prepare(root, tmp_path / "no", "sc10")
    (root / "validation_list.txt").write_text("".join(f"{w}/1.wav\n" for w in SC10))
    (root / "testing_list.txt").write_text("".join(f"{w}/2.wav\n" for w in SC10))
    index = prepare(root, tmp_path / "out", "sc10")
    assert index.classes == SC10
    assert {name: s.num_examples for name, s in index.splits.items()} == {
        "train": 10, "valid": 10, "test": 10,
    }  # fmt: skip


# The Long Range Arena's files


def test_listops_release(tmp_path):
    lines = "Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t9\n( [SM 5 ) 7 ]\t2\n"
    for name in ("basic_train", "basic_val", "basic_test"):
        (tmp_path / f"{name}.tsv").write_text(lines)
    prepare(tmp_path, tmp_path / "out", "lra-listops")
    data = Labelled(tmp_path / "out", "valid")
    assert [(data[i].rows[0].tolist(), data[i].label) for i in range(2)] == [
        ([11, 2, 9, 14, 15], 9), ([13, 5, 7, 14, 15], 2),
    ]  # fmt: skip
    for text, words in (
        ("( [MAX 2 9\t9", "line 2: no ListOps expression: it ends at symbol 3"),
        ("[MAX 2 ]\t3", "line 2: the expression is 2, its label 3"),
        ("[MAX 2 ]\t12", "line 2: unknown label '12'"),
        ("[MAX 2 ] 2", "line 2: no tab"),
    ):
        (tmp_path / "basic_train.tsv").write_text(f"Source\tTarget\n{text}\n")
        with pytest.raises(UserError, match=words):
            prepare(tmp_path, tmp_path / "no", "lra-listops")
    (tmp_path / "basic_train.tsv").unlink()
    with pytest.raises(UserError, match=r"basic_train.tsv: missing .* get it from https.*lra_rel"):
        prepare(tmp_path, tmp_path / "no", "lra-listops")


def test_generated_listops(tmp_path):
    index = prepare("3", tmp_path / "out", "listops", examples=30, min_length=20, max_length=60)
    assert {n: s.num_examples for n, s in index.splits.items()} == {
        "train": 30, "valid": 3, "test": 3,
    }  # fmt: skip
    data = Labelled(tmp_path / "out", "test")
    for i in range(3):
        assert evaluate(data[i].rows[0][:-1].astype(np.uint8)) == data[i].label
    with pytest.raises(UserError, match="SOURCE is a seed"):
        prepare("somewhere", tmp_path / "no", "listops")


def test_byte_imdb(tmp_path):
    for split in ("train", "test"):
        for name, text in (("neg", "bad"), ("pos", "né" * 4000)):
            folder = tmp_path / "imdb" / split / name
            folder.mkdir(parents=True)
            (folder / "0_1.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "imdb", tmp_path / "out", "lra-text")
    data = Labelled(tmp_path / "out", "test")
    assert data[0].rows[0].tolist() == [*b"bad", 256]
    assert len(data[1].rows[0]) == 4096


def test_retrieval_pairs(tmp_path):
    for name in ("train", "eval", "test"):
        path = tmp_path / f"new_aan_pairs.{name}.tsv"
        path.write_text("1.0\tA1\tB2\tsome text\tother\n0.0\tA\tB\tx\ty\n")
    prepare(tmp_path, tmp_path / "out", "lra-retrieval")
    first = Labelled(tmp_path / "out", "valid")[0]
    assert first.rows[0].tolist() == [*b"some text", 256]
    assert (first.rows[1].tolist(), first.label) == ([*b"other", 256], 1)
    (tmp_path / "new_aan_pairs.test.tsv").write_text("1\tonly three\tfields\n")
    with pytest.raises(UserError, match=r"test.tsv, line 1: 3 fields instead of 5"):
        prepare(tmp_path, tmp_path / "no", "lra-retrieval")


def test_grey_images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    record = np.concatenate([[7], picture.transpose(2, 0, 1).ravel()]).astype(np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        record.tofile(tmp_path / f"{name}.bin")
    prepare(tmp_path, tmp_path / "out", "lra-image")
    data = Labelled(tmp_path / "out", "train")
    assert len(data) == 5
    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32).ravel()
    assert np.allclose(data[0].rows[0][:, 0], (grey - 122.6) / 61.0, atol=1e-5)
    assert data[0].label == 7
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3.bin: missing .*cifar-10-binary"):
        prepare(tmp_path, tmp_path / "no", "lra-image")


def test_pathfinder(tmp_path):
    from PIL import Image

    place = tmp_path / "curv_contour_length_14"
    (place / "metadata").mkdir(parents=True)
    (place / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(20):
        name = f"sample_{i}.png"
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(place / "imgs" / "0" / name)
        lines.append(f"imgs/0 {name} 0 {i % 2} 1.8 6 2.0")
    (place / "imgs" / "0" / "sample_5.png").write_bytes(b"")  # the release has one such
    (place / "metadata" / "0.npy").write_text("\n".join(lines))
    index = prepare(tmp_path, tmp_path / "out", "lra-pathfinder")
    assert sum(s.num_examples for s in index.splits.values()) == 19
    seen = set()
    for split in index.splits:
        data = Labelled(tmp_path / "out", split)
        for i in range(len(data)):
            values, label = data[i].rows[0], data[i].label
            number = round(float((values[0, 0] + 1) * 127.5))
            assert label == number % 2
            seen.add(number)
    assert seen == set(range(20)) - {5}
    (place / "imgs" / "0" / "sample_7.png").unlink()
    with pytest.raises(UserError, match=r"sample_7.png: missing from the released set"):
        prepare(tmp_path, tmp_path / "no", "lra-pathfinder")


# Labelled text


def test_labelled_text(tmp_path):
    rows = [{"t": f"word {i}", "l": "pos" if i % 2 else "neg", "f": i % 5} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    names = {"text_field": "t", "label_field": "l", "split_field": "f", "test_value": "4"}
    index = prepare(path, tmp_path / "out", "text", **names)
    assert index.classes == ("neg", "pos")
    test = Labelled(tmp_path / "out", "test")
    assert [test[i].rows[0].tolist() for i in range(2)] == [[*b"word 4", 256], [*b"word 9", 256]]
    assert test.tokenizer_folder is not None
    with pytest.raises(UserError, match="line 1: no field 'text', only 't', 'l', 'f'"):
        prepare(path, tmp_path / "no", "text")
    with pytest.raises(UserError, match="split '0' is not train, valid or test"):
        prepare(path, tmp_path / "no", "text", **(names | {"test_value": None}))
    path.write_text('{"t": "x", "l": "a"}\nnot json\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        prepare(path, tmp_path / "no", "text", text_field="t", label_field="l")


def test_unknown_forms_and_places(tmp_path):
    with pytest.raises(UserError, match=r"no form 'tabel'.*did you mean 'table'"):
        prepare(tmp_path, tmp_path / "no", "tabel")
    for form in ("table", "audio", "text"):
        with pytest.raises(UserError, match="no such"):
            prepare(tmp_path / "nowhere", tmp_path / "no", form)
    with pytest.raises(UserError, match="missing from the released set"):
        prepare(tmp_path / "nowhere", tmp_path / "no", "lra-image")


# The sets of this project


@pytest.mark.parametrize(
    ("name", "form", "options", "sizes"),
    [
        ("fsdd", "fsdd", {"pad": True, "length": 8000}, (1200, 300, 8000)),
        ("fsdd", "fsdd", {"pad": True, "speaker": "theo"}, (1250, 250, None)),
        ("mnist-small", "mnist", {}, (5000, 10000, 784)),
        ("ucr-small/ACSF1", "table", {}, (100, 100, 1460)),
        ("ucr-small/OSULeaf", "table", {}, (200, 242, 427)),
        (
            "movie-reviews/polarity_v2.jsonl.xz", "text",
            {"split_field": "fold", "test_value": "9"}, (1800, 200, None),
        ),
    ],
)  # fmt: skip
def test_the_real_sets(shared: Path, tmp_path, name, form, options, sizes):
    index = prepare(shared / "data" / name, tmp_path / "out", form, **options)
    counts = tuple(index.splits[split].num_examples for split in ("train", "test"))
    assert counts == sizes[:2]
    if sizes[2]:
        assert index.splits["train"].longest == sizes[2]
    data = Labelled(tmp_path / "out", "test")
    assert np.bincount(data.labels).min() > 0
    row = data[len(data) - 1].rows[0]
    assert np.isfinite(row).all()
    assert describe(index)


def test_no_held_out_speaker_of_that_name(shared: Path, tmp_path):
    with pytest.raises(UserError, match="no speaker 'nobody', only"):
        prepare(shared / "data" / "fsdd", tmp_path / "out", "fsdd", speaker="nobody")
