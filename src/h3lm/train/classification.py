"""A recipe with `task: classification`, from labelled data to a trained folder."""

import hashlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import AutoConfig, TrainerCallback, set_seed
from transformers.utils import logging as library_logging

from h3lm.data.labelled import INDEX_FILE, Labelled, LabelledIndex
from h3lm.errors import UserError
from h3lm.evals.classification import Classified, classify
from h3lm.models import H3ClassificationConfig, H3Config, H3ForSequenceClassification
from h3lm.models.folders import save_model
from h3lm.train import run as running
from h3lm.train.arguments import precision_of, training_arguments
from h3lm.train.checkpoints import RunPoint
from h3lm.train.classification_plots import plot_confusion, plot_curves
from h3lm.train.examples import (
    ClassificationSettings,
    ExampleCollator,
    ExampleDataset,
    ExampleOrder,
)
from h3lm.train.interrupt import StopOnSignal
from h3lm.train.memory import short_of_memory
from h3lm.train.outcome import Result
from h3lm.train.processes import is_first, rank, wait_for_all, world_size
from h3lm.train.progress import Clock, ProgressLine, Speed
from h3lm.train.recipe import Recipe, model_fields
from h3lm.train.trainer import H3Trainer

SUMMARY = "summary.json"
LOADERS = 4  # processes that make batches beside a GPU


class ClassificationTrainer(H3Trainer):
    """`H3Trainer` over labelled examples.

    Args:
        recipe: The run.
        watched: The split whose loss and accuracy are followed, if there is one.
        settings: The recipe's `classification`.
        arguments: As for `H3Trainer`.
    """

    model: H3ForSequenceClassification
    train_dataset: ExampleDataset  # type: ignore[assignment]

    def __init__(
        self,
        recipe: Recipe,
        watched: ExampleDataset | None,
        settings: ClassificationSettings,
        **arguments: Any,
    ) -> None:
        self.watched, self.settings = watched, settings
        super().__init__(recipe, [], **arguments)

    def wants_graphs(self) -> bool:
        """As for language models, unless the recipe's `classification` says no."""
        return self.settings.graphs and super().wants_graphs()

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        total = self.args.max_steps * self.recipe.batch_size
        return ExampleOrder(len(self.train_dataset), total, self.recipe.seed)

    def compute_loss(  # noqa: D102 (the library's)
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        total = F.cross_entropy(
            outputs.logits.float(), labels,
            label_smoothing=self.settings.label_smoothing, reduction="sum",
        )  # fmt: skip
        # of the whole step, which may be several parts of a batch on several processes
        examples = self.recipe.batch_size / world_size()
        loss = total / (len(labels) if not model.training else examples)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and accuracy of the split that is watched; every process takes all of it."""
        self.control.should_evaluate = False  # or the library asks again when the run ends
        if self.watched is None:
            return {}
        if self.evaluated[0] == self.state.global_step:
            return self.evaluated[1]
        with self.speed.aside():
            found = self.classify(self.watched)
        metrics = {"eval_loss": found.loss, "eval_accuracy": found.accuracy}
        self.evaluated = self.state.global_step, metrics
        self.log(metrics)
        return metrics

    def classify(self, dataset: ExampleDataset) -> Classified:
        """What the model says of a split."""
        with torch.compiler.set_stance("force_eager"):
            return classify(self.model, self._batches(dataset), self.accelerator.autocast())

    def _batches(self, dataset: ExampleDataset) -> Iterator[dict[str, Tensor]]:
        size = max(1, self.args.per_device_train_batch_size)
        for start in range(0, len(dataset), size):
            stop = min(start + size, len(dataset))
            yield self.data_collator([dataset[i] for i in range(start, stop)])

    def point(self, step: int) -> RunPoint:
        """Where the run is."""
        config = self.model.config.to_dict()
        # not the library's fields, which saving changes
        ours = H3Config.__annotations__ | H3ClassificationConfig.__annotations__
        model = {name: config[name] for name in (*ours, "id2label") if name in config}
        model = json.loads(json.dumps(model))
        return replace(super().point(step), model=model, order=ExampleOrder.NAME)


def train_classifier(recipe: Recipe, console: Console) -> Result:
    """Train a classifier, or one for each seed; finished seeds are not trained again.

    Raises:
        UserError: if the recipe, its data or its folder cannot be used.
    """
    settings = ClassificationSettings.read(recipe.classification)
    index = _open_data(recipe)
    if settings.seeds == 1:
        return _train_one(recipe, settings, index, console)
    results = []
    for seed in range(recipe.seed, recipe.seed + settings.seeds):
        one = replace(
            recipe, seed=seed, name=f"{recipe.name}-seed-{seed}",
            output_dir=str(recipe.folder / f"seed-{seed}"),
            classification=recipe.classification | {"seeds": 1},
        )  # fmt: skip
        one.folder.mkdir(parents=True, exist_ok=True)
        done = _finished(one)
        if done is None:
            done = _train_one(one, replace(settings, seeds=1), index, console).summary
        else:
            console.print(f"{one.name}: done before", highlight=False)
        results.append((one.folder, done))
    return _summarise(recipe, results, console)


def build_config(recipe: Recipe, index: LabelledIndex) -> H3ClassificationConfig:
    """The model that a recipe describes, for a set of labelled data.

    Raises:
        UserError: if its fields are unknown or do not fit together.
    """
    kind = index.kind
    chosen: dict[str, Any] = {
        "num_channels": kind.num_channels,
        "two_documents": kind.rows_per_example == 2,
        "id2label": dict(enumerate(index.classes)),
        "label2id": {name: i for i, name in enumerate(index.classes)},
    }
    if kind.vocab_size is not None:
        chosen["vocab_size"] = kind.vocab_size
    chosen |= model_fields(recipe.model, H3ClassificationConfig, H3Config)
    if recipe.preset is not None:
        raise UserError("presets are language models: a classifier is described by `model`")
    try:
        unknown = sorted(set(recipe.model) - set(H3ClassificationConfig().to_dict()))
        if unknown:
            raise ValueError(f"H3ClassificationConfig has no field {', '.join(unknown)}")
        return H3ClassificationConfig(mixers=recipe.mixers, **chosen)
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's model: {' '.join(str(error).split())}") from None


def _open_data(recipe: Recipe) -> LabelledIndex:
    if not recipe.data:
        raise UserError(
            "the recipe has no data: give data=FOLDER, made by h3lm prepare ... --labelled FORM"
        )
    index = LabelledIndex.load(recipe.data)
    if "train" not in index.splits:
        raise UserError(f"{recipe.data}: no training split here, only {', '.join(index.splits)}")
    if recipe.verify_data and is_first():
        index.verify(recipe.data)
    return index


def _make_model(recipe: Recipe, index: LabelledIndex) -> H3ForSequenceClassification:
    if recipe.init_from is None:
        return H3ForSequenceClassification(build_config(recipe, index))
    try:
        config = AutoConfig.from_pretrained(recipe.init_from)
        own = isinstance(config, H3ClassificationConfig)
        names = {} if own else {
            "id2label": dict(enumerate(index.classes)),
            "label2id": {name: i for i, name in enumerate(index.classes)},
        }  # fmt: skip
        for name, value in names.items():
            setattr(config, name, value)
        return H3ForSequenceClassification.from_pretrained(
            recipe.init_from, config=config, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{recipe.init_from}: cannot load this model: {first}") from None


def _labels_of(model: H3ForSequenceClassification, index: LabelledIndex) -> NDArray[np.int64]:
    """The model's class of each class of the data."""
    known = {str(name): i for i, name in model.config.id2label.items()}
    for name in index.classes:
        if name not in known:
            raise UserError(
                f"the model does not know the label {name!r}, only {', '.join(sorted(known))}"
            )
    return np.array([known[name] for name in index.classes])


def _train_one(
    recipe: Recipe, settings: ClassificationSettings, index: LabelledIndex, console: Console
) -> Result:
    if recipe.deterministic:
        running.compute_the_same_bits()
    checkpoint = running.find_checkpoint(recipe, console)
    arguments = training_arguments(recipe, checkpoint.point.precision if checkpoint else "")
    if torch.cuda.is_available() and recipe.data_workers == 0:
        arguments.dataloader_num_workers = LOADERS
    library_logging.disable_progress_bar()
    set_seed(recipe.seed)
    model = _make_model(recipe, index)
    labels = _labels_of(model, index)
    if world_size() > 1:
        set_seed(recipe.seed + rank())
    splits = {
        split: ExampleDataset(
            Labelled(recipe.data, split),
            settings,
            labels,
            recipe.seed if split == "train" else None,
        )
        for split in index.splits
    }
    watched = splits.get("valid") or splits.get("test")
    training = splits["train"]
    clock = Clock(recipe.time_limit_s, checkpoint.point.elapsed_s if checkpoint else 0.0)
    arguments.max_steps = running.number_of_steps(recipe, len(training), clock, checkpoint)
    longest = min(index.splits["train"].longest, settings.max_length or 10**9)
    positions = recipe.batch_size * longest * index.kind.rows_per_example
    speed = Speed(clock, positions)
    line, stop = ProgressLine(speed, console), StopOnSignal()
    callbacks: list[TrainerCallback] = [clock, speed, stop]
    if is_first():
        callbacks += [line, *running.logs(recipe.folder)]
    trainer = ClassificationTrainer(
        recipe, watched, settings,
        clock=clock, speed=speed, data=_fingerprint(recipe), model=model, args=arguments,
        train_dataset=training, eval_dataset=[], data_collator=ExampleCollator(index.kind),
        processing_class=_tokenizer(training.labelled), callbacks=callbacks,
    )  # fmt: skip
    if checkpoint is not None:
        checkpoint.point.check_same_run(trainer.point(checkpoint.point.step), checkpoint.folder)
        running.say_resumed(checkpoint, precision_of(arguments), console)
    running.write_recipe(recipe)
    console.print(
        f"{recipe.name}: {model.num_parameters():,} parameters on {arguments.device}, "
        f"{len(training):,} examples of {len(index.classes)} classes, up to {longest:,} positions",
        highlight=False,
    )
    try:
        with short_of_memory(recipe, arguments.per_device_train_batch_size):
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    finally:
        stop.close()
        line.close()
    if stop.agreed:
        raise running.stopped(trainer, stop.agreed)
    return _finish(trainer, splits, console)


def _finish(
    trainer: ClassificationTrainer,
    splits: dict[str, ExampleDataset],
    console: Console,
) -> Result:
    """Score the last weights on the test split, or on what there is; save and draw."""
    recipe, folder = trainer.recipe, trainer.recipe.folder
    trainer.evaluate()
    split = next((name for name in ("test", "valid") if name in splits), "train")
    found = trainer.classify(splits[split])
    summary: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.global_step * recipe.batch_size / len(trainer.train_dataset),
        "train_seconds": round(trainer.trained_s, 2),
        "precision": precision_of(trainer.args),
        "split": split,
        "examples": len(found.labels),
        "accuracy": found.accuracy,
        "loss": found.loss,
        "macro_f1": found.macro_f1,
        "chance": float(np.bincount(found.labels).max() / len(found.labels)),
        "data": trainer.data,
        "recipe": recipe.decisive(),
    }
    if found.roc_auc is not None:
        summary["roc_auc"] = found.roc_auc
    wait_for_all()
    if not is_first():
        return Result(folder, summary)
    save_model(trainer.model, folder / "model", trainer.processing_class)
    names = [str(trainer.model.config.id2label[i]) for i in range(found.logits.shape[1])]
    plot_confusion(found.confusion(), names, folder / "confusion.png", f"{recipe.name}, {split}")
    plot_curves([trainer.state.log_history], folder / "curves.png", recipe.name)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    area = f", ROC-AUC {found.roc_auc:.4f}" if found.roc_auc is not None else ""
    console.print(
        f"{split} accuracy {found.accuracy:.4f} of {len(found.labels):,}, loss {found.loss:.4f}"
        f"{area} (largest class {summary['chance']:.4f})\nmodel {folder / 'model'}\n"
        f"curves {folder / 'curves.png'}\nconfusion {folder / 'confusion.png'}\n"
        f"summary {folder / SUMMARY}",
        highlight=False,
    )
    return Result(folder, summary)


def _finished(recipe: Recipe) -> dict[str, Any] | None:
    """What an earlier run of the same recipe and data left, if it was finished."""
    path = recipe.folder / SUMMARY
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(recipe.decisive()))
    if summary["data"] != _fingerprint(recipe):
        raise UserError(f"{recipe.folder} is of other data: give another output_dir, or remove it")
    different = [
        f"{name}={summary['recipe'][name]} there, {mine[name]} now"
        for name in sorted(mine.keys() & summary["recipe"].keys())
        if mine[name] != summary["recipe"][name]
    ]
    if different:
        raise UserError(
            f"{recipe.folder} is of another run: {'; '.join(different)}. Give another output_dir, "
            "or remove it"
        )
    return summary


def _summarise(
    recipe: Recipe, results: list[tuple[Path, dict[str, Any]]], console: Console
) -> Result:
    """Mean and spread over seeds, and all curves in one picture."""
    accuracies = [summary["accuracy"] for _, summary in results]
    mean, spread = statistics.fmean(accuracies), statistics.stdev(accuracies)
    first = results[0][1]
    kept = ("parameters", "steps", "epochs", "precision", "split", "examples", "chance")
    summary: dict[str, Any] = {"name": recipe.name} | {name: first[name] for name in kept}
    summary |= {"seeds": len(results), "accuracy": mean, "accuracy_sd": spread}
    summary["accuracies"] = accuracies
    summary["train_seconds"] = sum(one["train_seconds"] for _, one in results)
    areas = [one["roc_auc"] for _, one in results if "roc_auc" in one]
    if areas:
        summary |= {"roc_auc": statistics.fmean(areas), "roc_auc_sd": statistics.stdev(areas)}
    if not is_first():
        return Result(recipe.folder, summary)
    histories = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder, _ in results
    ]
    plot_curves(histories, recipe.folder / "curves.png", recipe.name)
    text = json.dumps(summary, indent=2) + "\n"
    (recipe.folder / SUMMARY).write_text(text, encoding="utf-8")
    console.print(
        f"{recipe.name}: {summary['split']} accuracy {mean:.4f} ± {spread:.4f} (standard deviation "
        f"of {len(results)} seeds: {', '.join(f'{a:.4f}' for a in accuracies)})\n"
        f"curves {recipe.folder / 'curves.png'}\nsummary {recipe.folder / SUMMARY}",
        highlight=False,
    )
    return Result(recipe.folder, summary)


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256((Path(recipe.data) / INDEX_FILE).read_bytes()).hexdigest()


def _tokenizer(labelled: Labelled) -> Any:
    if labelled.tokenizer_folder is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(labelled.tokenizer_folder)
