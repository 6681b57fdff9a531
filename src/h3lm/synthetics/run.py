"""The expressivity lab: train any mixer on any task, and write down what came out."""

import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from h3lm import __version__
from h3lm.errors import UserError
from h3lm.layers import MIXERS
from h3lm.models.configuration_h3 import HYBRID, H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.synthetics import unfinished
from h3lm.synthetics.ensemble import TURN, Ensemble, Look, Member, Recipe
from h3lm.synthetics.prepare import prepared
from h3lm.synthetics.report import Report, Run, merit
from h3lm.synthetics.settings import SETTINGS, TO_THE_END, Setting
from h3lm.synthetics.tasks import Baseline, Dataset, Task, check_known, make_task

NUM_LAYERS = 2
SEARCH_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SEARCH_LENGTH = 2  # times the recipe's epochs
STANDS = "lab.json"  # beside a saved model: how good it is
_ROWS = ("num_train", "num_test")
SIDE_BY_SIDE = 8  # jobs on one GPU: their kernels are too small to fill it
_GIVEN_UP = threading.Event()  # set where a person stops jobs that are threads
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        settings: Names of `SETTINGS`, or settings of one's own.
        mixers: Mixer of the models: a name, "hybrid", "NAME-hybrid", "h3:2" for H3 with heads of
            two channels, "h3:1:8" for heads of one channel and 8 taps, or one for each layer
            joined by "+".
        seeds: Seeds of data and start.
        search: Whether to run the small search over rates, at twice the steps, as well.
        learning_rate: Rate in place of the recipe's.
        max_steps: Steps in place of the recipe's, its schedule squeezed.
        device: Where to train.
    """

    settings: dict[str, Setting]
    mixers: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search: bool = False
    learning_rate: float | None = None
    max_steps: int | None = None
    device: str = "cpu"


def plan(
    tasks: Iterable[str],
    mixers: Iterable[str],
    *,
    seeds: int = 5,
    search: bool = False,
    learning_rate: float | None = None,
    max_steps: int | None = None,
    device: str = "cpu",
    early_stop: bool = True,
    **options: int | None,
) -> Plan:
    """Check what a person asks for, before anything is trained.

    Args:
        tasks: Names of `SETTINGS`.
        mixers: See `Plan`.
        seeds: How many.
        search: See `Plan`.
        learning_rate: See `Plan`.
        max_steps: See `Plan`.
        device: "cpu", "cuda" or another of torch's.
        early_stop: Whether a model that has solved its task stops, see `Recipe.stop_at`. Without,
            the setting has a name of its own, and so its table in the report.
        options: In place of the setting's: vocab_size, length, num_pairs, num_train, num_test.

    Raises:
        UserError: if a name is unknown, or the task or the model cannot be made so.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds} must be positive")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError(f"learning_rate={learning_rate} must be positive and finite")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps={max_steps} must be positive")
    settings = {}
    given = {name: value for name, value in options.items() if value is not None}
    for name in _ROWS:
        if given.get(name, 1) < 1:
            raise UserError(f"{name}={given[name]} must be positive")
    for name in tasks:
        check_known("task", name, SETTINGS)
        setting = SETTINGS[name]
        if given:
            name, setting = _label(name, given), _altered(setting, given)
        if not early_stop:
            name += TO_THE_END
            setting = replace(setting, recipe=replace(setting.recipe, stop_at=None))
        settings[name] = setting
    chosen = tuple(mixers)
    for mixer in chosen:
        for setting in settings.values():
            model_config(mixer, setting)
    return Plan(
        settings,
        chosen,
        tuple(range(seeds)),
        search=search,
        learning_rate=learning_rate,
        max_steps=max_steps,
        device=device,
    )


def model_config(mixer: str, setting: Setting) -> H3Config:
    """Configuration of the paper's two-layer model around a mixer.

    Raises:
        UserError: if there is no such mixer, or it does not fit two layers.
    """
    names: list[str] = []
    asked: set[tuple[int, ...]] = set()
    for part in mixer.split("+"):
        name, *sizes = part.split(":")
        if "bidirectional" in name:
            raise UserError(
                f"{name!r}: a bidirectional layer sees what it is asked to predict; it does not "
                "fit a causal model"
            )
        known = [*MIXERS, "hybrid", *(f"{m}{HYBRID}" for m in MIXERS if m != "attention")]
        check_known("mixer", name, known)
        if sizes:
            if not all(size.isdigit() for size in sizes) or name not in ("h3", "hybrid"):
                raise UserError(f"{part!r}: a number of channels goes with h3 or hybrid, as h3:2")
            if len(sizes) > 2:
                raise UserError(f"{part!r}: channels of a head and taps are all there is: h3:1:8")
        if name in ("h3", "hybrid"):
            asked.add(tuple(map(int, sizes)))
        names.append(name)
    if len(asked) > 1:
        raise UserError(f"mixer {mixer!r}: the H3 layers of a model share their sizes")
    chosen = asked.pop() if asked else ()
    attention_only = names == ["attention"] or set(names) == {"attention"}
    length = setting.task.length + 2  # the recall rows hold two more inputs than the pairs
    try:
        return H3Config(
            vocab_size=setting.task.vocab_size,
            hidden_size=setting.width,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=1,
            mixers=names[0] if len(names) == 1 else names,
            num_learned_positions=length if attention_only else 0,
            h3_head_dim=chosen[0] if chosen else 1,
            h3_num_taps=chosen[1] if len(chosen) > 1 else None,
            embedding_dropout=0.1,
            attention_dropout=0.1,
        )
    except ValueError as error:
        raise UserError(f"mixer {mixer!r}: {error}") from None


@dataclass(frozen=True)
class Job:
    """Models of one mixer on one setting, to be trained together.

    Attributes:
        name: Name of the setting.
        setting: The setting.
        mixer: The mixer, as it was asked for.
        wanted: Kind, seed and recipe of each model.
        device: Where to train.
        out: Folder to write the best model and its picture to.
        deadline: Time (`time.time`) at which to give up.
        given_up: File of an earlier call that says where these trainings stand.
    """

    name: str
    setting: Setting
    mixer: str
    wanted: tuple[tuple[str, int, Recipe], ...]
    device: str
    out: Path
    deadline: float = math.inf
    given_up: Path | None = None

    @property
    def steps(self) -> int:
        """Steps of its longest training."""
        per_epoch = -(-self.setting.num_train // self.setting.recipe.batch_size)
        return per_epoch * max(recipe.epochs for _, _, recipe in self.wanted)


@dataclass(frozen=True)
class Outcome:
    """What a job leaves for the report, and files to be put in place once that is written.

    Attributes:
        runs: Its models.
        size: Parameters of one, floats of its state.
        standing: Where those stand that were given up.
        best: Folder with the best model and its picture.
    """

    runs: list[Run]
    size: dict[str, int]
    standing: unfinished.Pending
    best: Path


def run(
    plan: Plan,
    out: Path,
    say: Say = print,
    progress: Say | None = None,
    *,
    workers: int = 1,
    minutes: float = math.inf,
    others: Iterable[Path] = (),
) -> None:
    """Train everything of a plan and write report.json, report.md, the pictures and the models.

    Runs that the folder's report already holds are not run again. The report is written after
    each job, so that whatever stops this leaves a whole report, which another call completes.
    Trainings that an earlier call gave up go on where they stood.

    Args:
        plan: What to run.
        out: Folder to write to; made if missing.
        say: Prints a line.
        progress: Shows a line that the next one replaces.
        workers: Jobs side by side: processes on a CPU, 0 for one on each core; threads with a
            stream each on a GPU, 0 for `SIDE_BY_SIDE` of them. With more than one process each
            shows its own progress.
        minutes: Time after which what is not finished is given up, and said; the report keeps
            where it stood, marked. 0 only writes anew what there is.
        others: Folders of further reports, of other machines perhaps, to take up first. Their
            models and traces stay where they are.

    Raises:
        UserError: if the folder cannot be written, a report cannot be read, or the device is
            missing.
    """
    from h3lm.synthetics import plots

    deadline = time.time() + 60 * minutes
    devices = _devices(plan.device)
    report = Report.open(out)
    for folder in others:
        report.merge(Report.of(folder))
    for name, setting in plan.settings.items():
        _measure_baselines(report, name, setting)
    jobs = []
    for name, setting in plan.settings.items():
        for mixer in plan.mixers:
            wanted = _wanted(plan, name, setting, mixer, report)
            if not wanted:
                say(f"{name} {mixer}: already in {report.path}")
                continue
            for file, some in unfinished.split(out, name, mixer, wanted):
                where = f" from step {unfinished.step_of(file):,}" if file else ""
                say(f"{name} {mixer}: {len(some)} model(s) on {', '.join(devices)}{where}")
                jobs.append(Job(name, setting, mixer, some, devices[0], out, deadline, file))
    jobs.sort(key=lambda job: -job.steps)  # stable: the longest first
    cut, came, calls = [], [], list(report.calls)
    for job, outcome in _outcomes(jobs, devices, workers, progress):
        if outcome is None or not all(run.finished for run in outcome.runs):
            cut.append(f"{job.name} {job.mixer}")
        if outcome is None:
            continue
        report.add(job.name, job.mixer, outcome.runs, outcome.size)
        came.append(job)
        call = _describe_call(came, devices)
        report.calls = calls if call in calls else [*calls, call]
        _measure_baselines(report, job.name, job.setting)
        report.write()
        unfinished.settle(outcome.standing)
        _place(job, outcome.best)
        say(f"{job.name} {job.mixer}: {report.summary(job.name, job.mixer)}")
    if report.runs:
        report.write()
        for path in plots.plot_report(report, out):
            say(f"written: {path}")
        say(report.markdown())
        say(f"written: {out / 'report.md'}, {out / 'report.json'}")
    if cut:
        say(
            f"not finished in {minutes:g} minutes: {', '.join(dict.fromkeys(cut))}; where they "
            "stood is in the report, marked; the same call goes on from there"
        )


def _outcomes(
    jobs: list[Job], devices: list[str], workers: int, progress: Say | None
) -> Iterator[tuple[Job, Outcome | None]]:
    """What came of each job, as it comes; None if its time was over."""
    _GIVEN_UP.clear()
    cpu = devices == ["cpu"]
    workers = workers or ((os.cpu_count() or 1) if cpu else SIDE_BY_SIDE * len(devices))
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, _do(job, progress)
        return
    failures = []
    pool: Executor
    context = ExitStack()
    if cpu:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        do: Callable[[Job], Outcome | None] = _do_in_process
    else:
        jobs = [replace(job, device=devices[i % len(devices)]) for i, job in enumerate(jobs)]
        compiled = jobs if devices[0].startswith("cuda") else []
        ready = context.enter_context(prepared(compiled, lambda job: len(job.wanted), _assemble))

        def do(job: Job) -> Outcome | None:
            while not ready(job, 1.0) and not _over(job):
                pass
            return _do(job, progress)

        pool = ThreadPoolExecutor(workers)
    with context, pool:
        futures = {pool.submit(do, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except Exception as error:  # the others may still come to an end
                    failures.append(error)
                    continue
                yield futures[future], outcome
        except BaseException:
            _GIVEN_UP.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise failures[0]


def _describe_call(jobs: list[Job], devices: list[str]) -> str:
    settings = dict.fromkeys(job.name for job in jobs)
    mixers = dict.fromkeys(job.mixer for job in jobs)
    device = torch.device(devices[0])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return (
        f"{date.today()}: {', '.join(settings)} by {', '.join(mixers)} on {name}, "
        f"torch {torch.__version__}, h3lm {__version__}"
    )


def _do_in_process(job: Job) -> Outcome | None:
    return _do(job, live_line()[1])


def live_line(interval_s: float = 30.0) -> tuple[Say, Say]:
    """Functions that print a line, and show one that the next replaces.

    Where the output is no terminal, the second prints at most every `interval_s` seconds.
    """
    terminal, shown = sys.stdout.isatty(), [-math.inf]

    def say(line: str) -> None:
        sys.stdout.write(f"\r\x1b[K{line}\n" if terminal else f"{line}\n")
        sys.stdout.flush()

    def progress(line: str) -> None:
        now = time.monotonic()
        if terminal:
            sys.stdout.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            sys.stdout.flush()
        elif now - shown[0] >= interval_s:
            shown[0] = now
            say(line)

    return say, progress


def _do(job: Job, progress: Say | None) -> Outcome | None:
    """Train a job's models, and keep the best of them with a picture of what it does."""
    if _over(job):
        return None

    def show(look: Look) -> None:
        if progress is not None:
            progress(f"{job.name} {job.mixer}: {_describe(look)}")

    threads = torch.get_num_threads()
    if job.device == "cpu":
        torch.set_num_threads(1)  # the models are so small that sharing an operation costs more
    try:
        with TURN:
            ensemble = _assemble(job, len(job.wanted))
            start = None
            if job.given_up:
                start = unfinished.load(job.given_up, job.wanted, ensemble.flat.shape[1])
        if not ensemble.train(show, stop=lambda: _over(job), start=start):
            return None
        with TURN:
            left = [job.wanted[i] for i in ensemble.unfinished]
            standing = unfinished.write(
                job.out, job.name, job.mixer, job.wanted, left, ensemble.standing, job.given_up
            )
            longer = _score_longer(ensemble, job.setting)
            return _outcome(job, ensemble.members, longer, standing)
    finally:
        torch.set_num_threads(threads)


def _over(job: Job) -> bool:
    return time.time() >= job.deadline or _GIVEN_UP.is_set()


def _assemble(job: Job, places: int) -> Ensemble:
    """The models of a job, or its last ones, which train longest."""
    config = model_config(job.mixer, job.setting)

    def make(seed: int) -> H3ForCausalLM:
        torch.manual_seed(seed)
        return H3ForCausalLM(config)

    members = [
        Member(seed, recipe, _dataset(job.setting, seed))
        for _, seed, recipe in job.wanted[len(job.wanted) - places :]
    ]
    return Ensemble(make, members, torch.device(job.device))


def _outcome(
    job: Job,
    members: list[Member],
    longer: dict[int, list[float]],
    standing: unfinished.Pending,
) -> Outcome:
    from h3lm.synthetics import plots
    from h3lm.synthetics.trace import trace

    best = max(members, key=lambda m: merit(m.finished, m.last, m.test_loss))
    assert best.model is not None
    kind, seed, recipe = job.wanted[0]
    folder = _model_folder(job).with_name(
        f".{_model_folder(job).name}-{kind}-{seed}-{recipe.learning_rate:g}-{recipe.epochs}"
    )
    _save(best.model, folder / "model")
    stands = {"finished": best.finished, "accuracy": best.last, "test_loss": best.test_loss}
    (folder / "model" / STANDS).write_text(json.dumps(stands))
    config = best.model.config
    one_channel = set(config.mixers) == {"h3"} and config.h3_head_dim == 1
    if one_channel and not job.name.startswith("mqar"):
        plots.plot_trace(trace(best.model, best.data), folder / "trace.png")
    steps = -(-job.setting.num_train // job.setting.recipe.batch_size)
    runs = [
        Run(
            setting=job.name,
            mixer=job.mixer,
            kind=kind,
            seed=member.seed,
            learning_rate=member.recipe.learning_rate,
            planned_steps=member.recipe.epochs * steps,
            steps=member.steps,
            accuracy=member.last,
            best_accuracy=member.best,
            test_loss=member.test_loss,
            longer={str(length): scores[i] for length, scores in longer.items()},
            curve=member.curve,
            finished=member.finished,
        )
        for i, ((kind, _, _), member) in enumerate(zip(job.wanted, members, strict=True))
    ]
    size = {
        "parameters": sum(p.numel() for p in best.model.parameters()),
        "state_floats": state_floats(best.model, job.setting.task.length),
    }
    return Outcome(runs, size, standing, folder)


def _model_folder(job: Job) -> Path:
    return job.out / "models" / f"{job.name}-{_file_name(job.mixer)}"


def _merit_of(model: Path) -> tuple[bool, float, float]:
    """Of a saved model; the least of one that does not say it."""
    try:
        return merit(**json.loads((model / STANDS).read_text()))
    except (OSError, ValueError, TypeError):
        return merit(False, -math.inf, math.inf)


def _place(job: Job, found: Path) -> None:
    """Put a job's best model in place, and its picture, unless the one that is there is better."""
    model, picture = _model_folder(job), found / "trace.png"
    if _merit_of(found / "model") >= _merit_of(model):
        shutil.rmtree(model, ignore_errors=True)
        (found / "model").replace(model)
        if picture.exists():
            which = "" if job.mixer == "h3" else f"-{_file_name(job.mixer)}"
            picture.replace(job.out / f"trace-{job.name}{which}.png")
    shutil.rmtree(found, ignore_errors=True)


@lru_cache(maxsize=64)
def _dataset_of(
    task: Task, seed: int, num_train: int, num_test: int, test_length: int | None
) -> Dataset:
    return task.dataset(seed, num_train=num_train, num_test=num_test, test_length=test_length)


def _dataset(setting: Setting, seed: int, test_length: int | None = None) -> Dataset:
    """Rows of a seed; jobs of one setting share them."""
    if test_length == setting.task.length:
        test_length = None
    return _dataset_of(setting.task, seed, setting.num_train, setting.num_test, test_length)


def _describe(look: Look) -> str:
    per_step = look.elapsed_s / look.taken
    return (
        f"step {look.step:,}/{look.total:,}, loss {fmean(look.losses):.3f}, "
        f"accuracy {100 * fmean(look.accuracies):.1f} (best {100 * max(look.accuracies):.1f}) %, "
        f"{1000 * per_step:.1f} ms/step, {per_step * (look.total - look.step):.0f} s left at most"
    )


def _wanted(
    plan: Plan, name: str, setting: Setting, mixer: str, report: Report
) -> tuple[tuple[str, int, Recipe], ...]:
    """The models that the report does not hold yet; both kinds go into one ensemble."""
    recipe, steps = setting.recipe, -(-setting.num_train // setting.recipe.batch_size)
    if plan.max_steps is not None:
        recipe = replace(recipe, epochs=max(1, plan.max_steps // steps))
    if plan.learning_rate is not None:
        recipe = replace(recipe, learning_rate=plan.learning_rate)
    kinds = [("recipe", recipe)]
    if plan.search:
        kinds += [
            ("search", replace(recipe, learning_rate=rate, epochs=SEARCH_LENGTH * recipe.epochs))
            for rate in SEARCH_RATES
        ]
    return tuple(
        (kind, seed, how)
        for kind, how in kinds
        for seed in plan.seeds
        if (name, mixer, kind, seed, how.learning_rate, how.epochs * steps) not in report
    )


def _score_longer(ensemble: Ensemble, setting: Setting) -> dict[int, list[float]]:
    """Accuracy of each model at other lengths than its own."""
    found = {}
    for length in setting.test_lengths:
        if ensemble.config.num_learned_positions and length > setting.task.length:
            continue  # there are no positions beyond those that were learned
        tests = [_dataset(setting, m.seed, length).test for m in ensemble.members]
        found[length] = ensemble.score(tests)[0]
    return found


def state_floats(model: H3ForCausalLM, length: int) -> int:
    """Floats that a model keeps of one sequence of this length between positions."""
    total = 0
    u = torch.zeros(1, length, model.config.hidden_size)
    with torch.no_grad():
        for layer in model.model.layers:
            _, state = layer.mixer(u)
            packed = getattr(layer.mixer, "pack_state", lambda s: (s.keys, s.values))(state)
            total += sum(part.numel() for part in packed if part is not None)
    return total


def _measure_baselines(report: Report, name: str, setting: Setting) -> None:
    """Score the trivial rules on the test rows of every seed that the report holds."""
    seeds = sorted({run.seed for run in report.runs if run.setting == name})
    if seeds:
        report.baselines[name] = _mean_baselines(setting, seeds, setting.task.length)
        report.longer_baselines[name] = {
            str(length): _mean_baselines(setting, seeds, length) for length in setting.test_lengths
        }


def _mean_baselines(setting: Setting, seeds: list[int], length: int) -> list[dict[str, Any]]:
    data = [_dataset(setting, seed, length) for seed in seeds]
    means = []
    for same in zip(*(d.task.baselines(d) for d in data), strict=True):
        losses = [b.loss for b in same if b.loss is not None]
        loss = fmean(losses) if losses else None
        means.append(asdict(Baseline(same[0].rule, fmean(b.accuracy for b in same), loss)))
    return means


def _altered(setting: Setting, options: dict[str, int]) -> Setting:
    old = setting.task
    fields = {f.name: getattr(old, f.name) for f in dataclasses.fields(old)}  # type: ignore[arg-type]
    chosen = {option: value for option, value in options.items() if option not in _ROWS}
    for option in chosen:
        check_known(f"option of {old.name}", option, fields)
    task = make_task(old.name, **{**fields, **chosen})
    longer = setting.test_lengths
    if longer and task != old:
        longer = tuple(task.length * i for i in (1, 2, 4))
    return replace(
        setting,
        task=task,
        test_lengths=longer,
        paper={},
        num_train=options.get("num_train", setting.num_train),
        num_test=options.get("num_test", setting.num_test),
    )


def _label(name: str, options: dict[str, int]) -> str:
    short = {
        "vocab_size": "v", "length": "l", "num_pairs": "k",
        "num_train": "rows", "num_test": "tests",
    }  # fmt: skip
    return "-".join([name, *(f"{short.get(o, o)}{value}" for o, value in options.items())])


def _save(model: H3ForCausalLM, folder: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _file_name(mixer: str) -> str:
    return mixer.replace(":", "-").replace("+", "-")


def _devices(name: str) -> list[str]:
    """The devices that a name stands for: "cuda" is all of them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name!r} here: use cpu") from None
    if name == "cuda":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [name]
