import json
import math
import zipfile

import pytest

from h3lm.errors import UserError
from h3lm.evals import corpora
from h3lm.evals.compare import compare
from h3lm.evals.corpora import CORPORA, articles, last_twentieth, open_corpus
from h3lm.evals.text import evaluate_text, evaluate_texts


@pytest.fixture(scope="module")
def texts(request):
    return request.path.parents[1] / "data" / "eval" / "texts"


@pytest.fixture(scope="module")
def reports(place, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named") / "report"
    options = {"data_dir": texts, "context": 32, "output": folder}
    found = evaluate_texts(str(place / "model-bytes"), list(CORPORA), **options)
    return {r.data: r for r in found}, folder


def whole(texts, name):
    return "".join(s.text for s in open_corpus(name, texts).stretches)


def test_wikitext_counts_words_and_line_ends_of_one_stream(reports, texts):
    text = (texts / "wikitext-103" / "wiki.test.raw").read_text()
    report = reports[0]["wikitext103"]
    assert whole(texts, "wikitext103") == text
    # the 245,569 words of WikiText-103's test set are counted like this
    assert report.words == len(text.replace("\n", " <eos> ").split())
    assert report.tokens == report.bytes == len(text.encode())  # no ends of text between
    assert report.metric == "perplexity_per_word"
    nats = report.nats_per_token * report.tokens
    assert report.perplexity_per_word == pytest.approx(math.exp(nats / report.words))


def test_articles_begin_at_titles_of_the_first_level():
    text = " \n = One = \n \n a b \n = = Part = = \n \n c \n = Two three = \n d = e = f \n"
    parts = articles(text)
    assert "".join(parts) == text
    assert [p.split(" \n")[0] for p in parts] == ["", " = One =", " = Two three ="]


@pytest.mark.parametrize("name", ["pile", "openwebtext"])
def test_documents_are_told_apart_by_ends_of_text_that_are_predicted(reports, name):
    report = reports[0][name]
    count = len(report.documents)
    assert count == {"pile": 5, "openwebtext": 4}[name]
    assert report.tokens == report.bytes + count - 1
    assert sum(d["tokens"] for d in report.documents) == report.tokens
    assert sum(d["nats"] for d in report.documents) == pytest.approx(
        report.tokens * report.nats_per_token
    )


def test_the_last_twentieth_of_bytes_is_scored_in_bits(reports, texts):
    for name, metric in (("enwik8", "bits_per_byte"), ("text8", "bits_per_character")):
        report = reports[0][name]
        size = (texts / name).stat().st_size
        assert size // 20 - 3 <= report.bytes <= size // 20
        bits = report.nats_per_token * report.tokens / math.log(2)
        assert report.metric == metric
        assert report.figure(metric) == pytest.approx(bits / report.bytes)
    assert last_twentieth("é" * 30) == ["é"]  # 3 bytes of 60, of which the first is half of one


def test_the_report_says_the_convention_and_chance_of_every_figure(reports):
    found, folder = reports
    written = json.loads((folder / "report.json").read_text())
    assert set(written["tasks"]) == set(CORPORA)
    for name, task in written["tasks"].items():
        assert (task["context"], task["stride"]) == (32, 32)
        assert task["metric"] in task["metrics"]
        assert all(m["stderr"] > 0 for m in task["metrics"].values())
        assert CORPORA[name].convention in task["notes"]
        assert len(found[name].notes) > 1
    text = (folder / "report.md").read_text()
    assert "one stream" in text.lower()
    assert f"**{found['enwik8'].bits_per_byte:.4f}**" in text


def test_another_runs_folder_is_refused_and_ones_own_written_again(reports, place, texts):
    _, folder = reports
    options = {"data_dir": texts, "context": 32, "output": folder}
    before = json.loads((folder / "report.json").read_text())["tasks"]
    evaluate_texts(str(place / "model-bytes"), list(CORPORA), **options)
    assert json.loads((folder / "report.json").read_text())["tasks"] == before
    with pytest.raises(UserError, match=r"another run \(its context differs\)"):
        evaluate_texts(str(place / "model-bytes"), list(CORPORA), **(options | {"context": 16}))
    with pytest.raises(UserError, match=r"another run \(its texts, data differs\)"):
        evaluate_texts(str(place / "model-bytes"), ["pile"], **options)


def test_two_models_are_paired_by_document(place, texts, tmp_path):
    """Against a bootstrap over documents of the difference."""
    import numpy as np

    from .conftest import make_model

    other = make_model(tmp_path / "other", place / "bytes" / "tokenizer", 264, mixers="attention")
    folders = []
    for model in (place / "model-bytes", other):
        folders.append(tmp_path / f"report-{model.name}")
        evaluate_texts(str(model), ["pile"], data_dir=texts, context=16, output=folders[-1])
    found = {d.metric: d for d in compare(*folders)}
    assert {d.paired for d in found.values()} == {5}
    sides = []
    for folder in folders:
        rows = map(json.loads, (folder / "documents.jsonl").read_text().splitlines())
        sides.append([(r["metrics"]["nats"], r["metrics"]["bytes"]) for r in rows])
    a, b = np.array(sides)
    draws = np.random.default_rng(0).integers(0, 5, (4000, 5))
    bits = [(x[draws, 0].sum(1) / x[draws, 1].sum(1)) / math.log(2) for x in (a, b)]
    spread = (bits[1] - bits[0]).std() * (5 / 4) ** 0.5
    assert found["bits_per_byte"].error == pytest.approx(spread, rel=0.1)
    alone = max(np.std(x) for x in bits)
    assert found["bits_per_byte"].error < 2 * alone


def test_a_folder_of_text_is_its_files_in_order(place, tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("one two")
    (folder / "b" / "c.jsonl").write_text('{"text": "three"}\n{"text": "four five"}\n')
    (folder / "notes.md").write_text("not text")
    report = evaluate_text(str(place / "model-bytes"), folder, context=8)
    assert [d["bytes"] for d in report.documents] == [7, 5, 9]
    assert report.tokens == 7 + 5 + 9 + 2
    assert report.words == 5


def test_a_zip_of_the_makers_reads_like_the_file(texts, tmp_path):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.write(texts / "enwik8", "enwik8")
    assert whole(tmp_path, "enwik8") == whole(texts, "enwik8")


def test_named_texts_from_the_hub_are_asked_for_by_their_names(monkeypatch, texts):
    asked = []
    lines = (texts / "wikitext-103" / "wiki.test.raw").read_text().splitlines(keepends=True)

    def rows(name, subset=None, **options):
        asked.append((name, subset, options))
        yield from ("" if line == " \n" else line for line in lines)

    monkeypatch.setattr(corpora, "_hub_rows", rows)
    assert whole(None, "wikitext103") == "".join(lines)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", {"split": "test"})]


def test_what_cannot_be_scored_by_name_is_one_line(place, texts, tmp_path, monkeypatch):
    model = str(place / "model-bytes")
    (tmp_path / "text8").write_text("naïve")
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "test.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "enwik8.zip").write_bytes(b"no archive")
    (tmp_path / "none").mkdir()

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(corpora, "_hub_rows", offline)
    cases = [
        (["wikitext"], {"data_dir": texts}, "no corpus 'wikitext'.*nearest are wikitext2"),
        (["pile"], {"data_dir": tmp_path / "none"}, "has no files for pile: looked for pile/test"),
        (["pile"], {"data_dir": tmp_path / "missing"}, "no such folder of texts"),
        (["pile"], {"data_dir": tmp_path}, "test.jsonl, line 2: not JSON"),
        (["pile"], {}, "cannot be had from.*no route.*--data-dir"),
        (["text8"], {"data_dir": tmp_path}, "not text8"),
        (["enwik8"], {"data_dir": tmp_path}, "enwik8.zip: is damaged"),
        (["text8"], {"data_dir": texts, "lengths": [10**6]}, "fewer than the test length"),
        (["text8"], {"data_dir": texts, "lengths": [0]}, "give positive ones"),
    ]
    for names, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            evaluate_texts(model, names, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no text in this folder"):
        evaluate_text(model, tmp_path / "none")


def test_a_character_that_the_tokenizer_lacks_is_one_line(place, tmp_path):
    (tmp_path / "greek.txt").write_text("cold Ω")
    with pytest.raises(UserError, match=r"greek.txt: character 5, 'Ω', is not in the vocab") as e:
        evaluate_text(str(place / "model-characters"), tmp_path / "greek.txt")
    assert "\n" not in str(e.value)


def test_a_limit_counts_articles_too(texts):
    text = open_corpus("wikitext103", texts, limit=2)
    assert [s.text.split(" \n")[0] for s in text.stretches] == [
        "",
        articles(whole(texts, "wikitext103"))[1].split(" \n")[0],
    ]
    assert "the first 2 documents only" in text.notes
