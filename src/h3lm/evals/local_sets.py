"""Evaluation sets from local files, in the schema that the harness's task definitions expect.

The files are those of the sets' makers: SuperGLUE's JSON lines in a folder for each task, others
as one file for each split, plain or packed (.xz, .gz).
"""

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from h3lm.errors import UserError

Row = dict[str, Any]

# Where a set has no train split: so many of its first documents are few-shot examples
FEWSHOT_POOL = 32

_ANSWERS = {"entailment": 0, "contradiction": 1, "neutral": 2}
_TWO_WAY = {"entailment": 0, "not_entailment": 1}


@dataclass(frozen=True)
class LocalSet:
    """How a task's files become the harness's documents.

    Attributes:
        harness_folder: Folder of the task's definition in the harness.
        splits: For each split of the Hub the file names to look for, best first.
        scored: The split that the harness scores.
        to_documents: Documents of one row.
        notes: What to say where a certain file is what was found.
        zero_shot_only: Why no few-shot examples can be given, if so.
    """

    harness_folder: str
    splits: dict[str, tuple[str, ...]]
    scored: str
    to_documents: Callable[[Row], Iterable[Row]]
    notes: dict[str, str] = field(default_factory=dict)
    zero_shot_only: str = ""


@dataclass(frozen=True)
class LoadedSet:
    """A set as read.

    Attributes:
        documents: Documents of each split of the Hub.
        notes: What a reader of results has to know.
        files: SHA-256 of each file read, as it is on the disk.
    """

    documents: dict[str, list[Row]]
    notes: list[str]
    files: dict[str, str]


def _same(row: Row) -> Iterator[Row]:
    yield row


def _with_number(numbers: dict[str, int]) -> Callable[[Row], Iterator[Row]]:
    def convert(row: Row) -> Iterator[Row]:
        yield row | {"label": numbers[row["label"]]}

    return convert


def _truth(row: Row) -> Iterator[Row]:
    yield row | {"label": int(row["label"])}


def _multirc(row: Row) -> Iterator[Row]:
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            place = (row["idx"], question["idx"], answer["idx"])
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": dict(zip(("paragraph", "question", "answer"), place, strict=True)),
                "label": int(answer["label"]),
            }


def _wsc(row: Row) -> Iterator[Row]:
    yield {"text": row["text"], **row["target"], "idx": row["idx"], "label": int(row["label"])}


def _record(row: Row) -> Iterator[Row]:
    text = row["passage"]["text"]
    entities = [text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]]
    for question in row["qas"]:
        yield {
            "passage": text,
            "query": question["query"],
            "entities": list(dict.fromkeys(entities)),
            "answers": list(dict.fromkeys(a["text"] for a in question["answers"])),
        }


def _arc(row: Row) -> Iterator[Row]:
    choices = row["question"]["choices"]
    yield {
        "id": row["id"],
        "question": row["question"]["stem"],
        "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
        "answerKey": row["answerKey"],
    }


def _hellaswag(row: Row) -> Iterator[Row]:
    yield row | {"label": str(row["label"])}


def _superglue(folder: str, to_documents: Callable[[Row], Iterable[Row]], **notes: str) -> LocalSet:
    return LocalSet(
        "super_glue",
        {
            "train": (f"superglue/{folder}/train", f"superglue/{folder}/fewglue_train"),
            "validation": (f"superglue/{folder}/val", f"superglue/{folder}/fewglue_dev32"),
        },
        "validation",
        to_documents,
        {f"superglue/{folder}/{name}": note for name, note in notes.items()},
    )


_FEWGLUE = "few-shot examples are FewGLUE's 32 of the train split, which is not among the files"

SETS: dict[str, LocalSet] = {
    "boolq": _superglue("BoolQ", _truth, fewglue_train=_FEWGLUE),
    "cb": _superglue("CB", _with_number(_ANSWERS)),
    "copa": _superglue("COPA", _truth),
    "multirc": _superglue("MultiRC", _multirc),
    "record": _superglue(
        "ReCoRD",
        _record,
        fewglue_train=_FEWGLUE,
        fewglue_dev32="NO ReCoRD RESULT: its validation split is not among the files; scored are "
        "32 examples of its train split (FewGLUE's dev32), and they are left out of averages",
    ),
    "sglue_rte": _superglue("RTE", _with_number(_TWO_WAY)),
    "wic": _superglue("WiC", _truth),
    "wsc": _superglue("WSC", _wsc),
    "lambada_openai": LocalSet(
        "lambada",
        {"test": ("other/lambada_test",)},
        "test",
        _same,
        zero_shot_only="its contexts are whole passages and there is no other split",
    ),
    "hellaswag": LocalSet(
        "hellaswag", {"validation": ("other/hellaswag_val",)}, "validation", _hellaswag
    ),
    "piqa": LocalSet("piqa", {"validation": ("other/piqa_valid",)}, "validation", _truth),
    "arc_easy": LocalSet(
        "arc",
        {"validation": ("other/arc_easy_dev",), "test": ("other/arc_easy_test",)},
        "test",
        _arc,
    ),
    "arc_challenge": LocalSet(
        "arc",
        {"validation": ("other/arc_challenge_dev",), "test": ("other/arc_challenge_test",)},
        "test",
        _arc,
    ),
    "winogrande": LocalSet(
        "winogrande", {"validation": ("other/winogrande_xl_dev",)}, "validation", _same
    ),
    "openbookqa": LocalSet(
        "openbookqa",
        {"validation": ("other/openbookqa_dev",)},
        "validation",
        _same,
        {"other/openbookqa_dev": "scored on its dev split; the harness scores the test split"},
    ),
}


def read_set(name: str, folder: Path, *, num_fewshot: int = 0) -> LoadedSet:
    """Read a set's files.

    Where a set has no split to take examples from, the first documents of the scored split are
    its train split if few-shot examples are asked for, and are not scored.

    Args:
        name: A task of `SETS`.
        folder: Where the files are.
        num_fewshot: How many examples a document will be given.

    Raises:
        UserError: if files are missing or damaged, or no labelled document is left for examples.
    """
    local = SETS[name]
    notes, files, documents = [], dict[str, str](), dict[str, list[Row]]()
    for split, names in local.splits.items():
        found = next(filter(None, (_find(folder, n) for n in names)), None)
        if found is None:
            if split == local.scored:
                raise UserError(
                    f"{folder}: has no files for {name}: looked for "
                    f"{' and '.join(f'{n}.jsonl' for n in names)} (also .xz, .gz)"
                )
            continue
        stem, path = found
        if split == local.scored or num_fewshot:
            documents[split] = _documents(path, local.to_documents)
            files[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
            notes += [local.notes[stem]] if stem in local.notes else []
    scored = documents[local.scored]
    if num_fewshot and local.zero_shot_only:
        notes.append(f"zero-shot, though {num_fewshot} examples were asked for: {name} is "
                     f"zero-shot only, {local.zero_shot_only}")  # fmt: skip
    elif num_fewshot and set(documents) == {local.scored}:
        pool = max(FEWSHOT_POOL, num_fewshot + 1)
        if len(scored) <= pool:
            raise UserError(
                f"{name}: no labelled document is left for {num_fewshot} few-shot examples: there "
                f"is no train split, and {len(scored)} documents are not more than the {pool} "
                "that would be examples"
            )
        documents["train"], documents[local.scored] = scored[:pool], scored[pool:]
        notes.append(
            f"few-shot examples are drawn from the first {pool} documents of the {local.scored} "
            "split, which are not scored: the train split is not among the files"
        )
    elif num_fewshot:
        examples = next(x for split, x in documents.items() if split != local.scored)
        if len(examples) <= num_fewshot:
            raise UserError(
                f"{name}: no labelled document is left for {num_fewshot} few-shot examples: there "
                f"are {len(examples)}, and one more than asked for is needed"
            )
    return LoadedSet(documents, notes, files)


def _find(folder: Path, stem: str) -> tuple[str, Path] | None:
    for suffix in (".jsonl", ".jsonl.xz", ".jsonl.gz"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return stem, path
    return None


def _documents(path: Path, to_documents: Callable[[Row], Iterable[Row]]) -> list[Row]:
    documents: list[Row] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    documents += to_documents(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number:,}: is not JSON ({error.msg})") from None
                except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                    raise UserError(
                        f"{path}, line {number:,}: is not a document of this set "
                        f"({type(error).__name__}: {error})"
                    ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not documents:
        raise UserError(f"{path}: holds no document")
    return documents


def _open(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    if path.suffix == ".xz":
        return lzma.open(path)
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
