"""Zero- and few-shot tasks: the harness's definitions and metrics, our log-likelihoods."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from h3lm.errors import UserError
from h3lm.evals.local_sets import SETS, read_set
from h3lm.evals.squad import where_the_harness_looks

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

# In the paper's column order
SUPERGLUE = ("wsc", "wic", "sglue_rte", "cb", "multirc", "record", "boolq", "copa")
GROUPS = {"superglue": SUPERGLUE}
FEWSHOT_SEED = 1234  # the harness's own
BOOTSTRAPS = 200  # for errors of what is no mean of documents


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of the harness, ready to run.

    Attributes:
        tasks: By name, in the order asked for.
        notes: By name, what a reader has to know.
        files: SHA-256 of each local file.
        left_out: Tasks of a group that could not be loaded, and why.
    """

    tasks: "dict[str, Task]"
    notes: dict[str, list[str]]
    files: dict[str, str]
    left_out: dict[str, str]


@dataclass
class TaskResult:
    """One task's figures.

    Attributes:
        metrics: Figure and standard error (None where there is none) by the harness's names.
        documents: For each scored document its metrics, in the harness's order.
        majority: Share of the most frequent label, None where there are no labels.
        notes: What a reader has to know.
    """

    metrics: dict[str, tuple[float, float | None]]
    documents: list[dict[str, Any]]
    majority: float | None
    notes: list[str] = field(default_factory=list)


def require_harness() -> None:
    """Check that lm-eval is there.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            "evaluation tasks need lm-eval: install it with: pip install 'h3lm[eval]'"
        ) from None


def expand(names: Sequence[str]) -> list[str]:
    """Task names with our groups resolved, each once."""
    every = [task for name in names for task in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(every))


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: Path | None = None,
    num_fewshot: int = 0,
    fixed_fewshot: bool = False,
) -> LoadedTasks:
    """Load tasks of the harness; with `data_dir` only the source of their documents differs.

    Args:
        names: The harness's names, or `superglue`.
        data_dir: Folder of local files; the Hugging Face hub if None.
        num_fewshot: Examples in front of each document.
        fixed_fewshot: The same examples, the first there are, for all documents of a task.

    Raises:
        UserError: if a task is unknown, its files are missing or damaged, or there is nothing to
            take examples from.
    """
    require_harness()
    wanted = expand(names)
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder of evaluation sets")
    configs, broken = _configs(wanted, only_local=data_dir is not None)
    for name in set(broken) & set(names):
        raise UserError(f"{name}: {broken[name]}")
    loaded = LoadedTasks({}, {}, {}, broken)
    for name, config in configs.items():
        notes: list[str] = []
        if fixed_fewshot:
            config["fewshot_config"] = {
                **(config.get("fewshot_config") or {}),
                "sampler": "first_n",
            }
        if name == "lambada_openai":
            config["num_fewshot"] = 0
        if data_dir is not None:
            local = read_set(name, data_dir, num_fewshot=num_fewshot)
            config |= _local_source(local.documents)
            notes += local.notes
            loaded.files.update(local.files)
        elif name == "lambada_openai" and num_fewshot:
            notes.append(f"zero-shot, though {num_fewshot} examples were asked for")
        loaded.tasks[name] = _build(name, config, num_fewshot)
        loaded.notes[name] = notes
    return loaded


def run_tasks(lm: "LM", loaded: LoadedTasks, *, limit: int | None = None) -> dict[str, TaskResult]:
    """Score tasks with a model of the harness's interface.

    Args:
        lm: `TreeLM`, or the harness's own model.
        loaded: Tasks.
        limit: First documents of each task only.
    """
    from lm_eval.evaluator import evaluate

    with quiet():
        # the harness's bootstrap forks processes; errors are worked out below
        results = evaluate(
            lm, {"tasks": loaded.tasks}, limit=limit, bootstrap_iters=0, log_samples=True
        )
        assert results is not None
        return {name: _result(name, results, loaded, limit) for name in loaded.tasks}


def _result(
    name: str, results: Mapping[str, Any], loaded: LoadedTasks, limit: int | None
) -> TaskResult:
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    result = TaskResult(
        _metrics(results["results"][name], samples, loaded.tasks[name]),
        [_document(s) for s in samples],
        _majority(samples),
        list(loaded.notes[name]),
    )
    count = len(loaded.tasks[name].task_docs)
    if limit is not None and limit < count:
        result.notes.append(f"the first {limit:,} of {count:,} documents only")
    if name == "multirc":
        _mend_multirc(result, samples)
    return result


def _configs(
    names: Sequence[str], *, only_local: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Each task's definition as the harness has it, and what is wrong with those that fail."""
    from copy import deepcopy

    from lm_eval import tasks as harness_tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    unknown = [name for name in names if name not in SETS]
    if only_local and unknown:
        raise UserError(_no_task(unknown[0], [*SETS, *GROUPS], "to be read from --data-dir"))
    # All of the harness's definitions take seconds to read, so only where others are asked for
    root = Path(harness_tasks.__file__).parent
    if unknown:
        manager = harness_tasks.TaskManager()
    else:
        folders = sorted({root / SETS[name].harness_folder for name in names})
        manager = harness_tasks.TaskManager(include_defaults=False, include_path=folders)
    configs: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            raise UserError(_no_task(name, [*manager.all_tasks, *GROUPS], "in the harness"))
        if entry.yaml_path is None or name not in manager.all_subtasks:
            raise UserError(f"{name!r} is a group of the harness: name its tasks")
        try:
            with where_the_harness_looks():
                config = deepcopy(load_yaml(entry.yaml_path, resolve_func=True))
        except ImportError as error:
            broken[name] = f"the harness's definition does not load here ({error})"
            continue
        configs[name] = {k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}
    return configs, broken


def _no_task(name: str, known: Sequence[str], where: str) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return f"there is no task {name!r} {where}{hint}"


def _local_source(documents: dict[str, list[Any]]) -> dict[str, Any]:
    """What of a task's definition is replaced: where documents come from, and splits' names."""
    from datasets import Dataset

    made = {split: Dataset.from_list(rows) for split, rows in documents.items()}
    names = {
        f"{kind}_split": split if split in made else None
        for kind, split in (("training", "train"), ("validation", "validation"), ("test", "test"))
    }
    return {
        "custom_dataset": lambda **_: made,
        "dataset_kwargs": None,
        "fewshot_split": None,
    } | names


def _build(name: str, config: dict[str, Any], num_fewshot: int) -> "Task":
    from lm_eval.api.task import ConfigurableTask

    with quiet():
        try:
            task = ConfigurableTask(config=config)
        except (OSError, ConnectionError, ValueError) as error:
            raise UserError(
                f"{name}: cannot load its data ({str(error).splitlines()[0]}); without a network, "
                "name a folder of local files with --data-dir"
            ) from None
    if task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _metrics(
    figures: dict[str, Any], samples: Sequence[dict[str, Any]], task: "Task"
) -> dict[str, tuple[float, float | None]]:
    """The harness's figures, {"acc,none": x}, each with its standard error."""
    found = {}
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            items = [s[metric] for s in samples]
            found[metric] = (float(value), _standard_error(metric, float(value), items, task))
    return found


def _standard_error(metric: str, value: float, items: Sequence[Any], task: "Task") -> float | None:
    """Of a mean over documents, of a perplexity, or by bootstrap of whatever else it is."""
    if len(items) < 2:
        return None
    if all(isinstance(x, int | float) for x in items):
        error = float(np.std(items, ddof=1)) / len(items) ** 0.5
        if metric == "perplexity":  # exp(-mean log-likelihood): to first order
            return value * error
        if abs(value - float(np.mean(items))) < 1e-9:
            return error
    draw = np.random.default_rng(FEWSHOT_SEED)
    aggregate = task.aggregation()[metric]
    repeated = [
        aggregate([items[i] for i in draw.integers(0, len(items), len(items))])
        for _ in range(BOOTSTRAPS)
    ]
    return float(np.std(repeated, ddof=1))


def _document(sample: dict[str, Any]) -> dict[str, Any]:
    figures = {m: sample[m] for m in sample["metrics"] if isinstance(sample[m], int | float)}
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "log_likelihoods": [x[0] for x in sample["filtered_resps"] if isinstance(x, list | tuple)],
        "metrics": {k: float(v) for k, v in figures.items()},
    }


def _majority(samples: Sequence[dict[str, Any]]) -> float | None:
    """Share of the most frequent label."""
    for name in ("label", "answerKey", "answer"):
        if all(name in s["doc"] for s in samples):
            labels = [str(s["doc"][name]) for s in samples]
            return max(map(labels.count, set(labels))) / len(labels)
    return None


def _mend_multirc(result: TaskResult, samples: Sequence[dict[str, Any]]) -> None:
    """Where the harness takes "yes" for label 0, whose meaning is false, add the right figure.

    So in lm-eval 0.4.13: the choices are yes and no in this order, and the target is the label.
    """
    first_choice = samples[0]["arguments"][0][1]
    if not first_choice.rstrip().endswith("yes"):
        return
    for sample, document in zip(samples, result.documents, strict=True):
        yes, no = (x[0] for x in sample["filtered_resps"])
        document["metrics"]["acc_right"] = float((yes > no) == (sample["doc"]["label"] == 1))
    values = [d["metrics"]["acc_right"] for d in result.documents]
    mean = sum(values) / len(values)
    error = (mean * (1 - mean) / max(1, len(values) - 1)) ** 0.5
    result.metrics["acc_right"] = (mean, error)
    result.notes.append(
        "acc is the harness's, which takes the answer yes for label 0 (false) and no for 1 (true): "
        "acc_right has them the right way round, and is what tables show"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's bars and its warnings about what we asked for."""
    import datasets
    from lm_eval.api import task as task_module

    logger, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task_module.tqdm = partial(bar, disable=True)
    try:
        with warnings.catch_warnings():
            # CB's: where a class is neither there nor predicted, as in a resample
            warnings.filterwarnings("ignore", "F-score is ill-defined")
            yield
    finally:
        task_module.tqdm = bar
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
