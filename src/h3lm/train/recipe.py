"""A recipe: everything that decides a training run, as one typed model."""

# ruff: noqa: RUF009 (`key` makes a dataclass field, anew for each)

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import yaml

from h3lm.errors import UserError

SHIPPED = files("h3lm.train") / "recipes"
SCHEDULES = ("cosine", "linear", "constant")
TASKS = ("language", "classification")
PRECISIONS = ("auto", "bf16", "fp32")
PARALLEL = ("ddp", "fsdp")
COMPILE = ("blocks", "model")
NESTED = ("model", "classification", "mesh", "sources", "mixing")  # keys with fields of their own
MESH = ("replicate", "seq")
DURATIONS = ("steps", "epochs", "time_limit_s")  # of which a recipe has one
DATA = ("data", "sources")
POSITIVE = (
    "block_length", "batch_size", "learning_rate", "ssm_max_learning_rate", "log_every",
    "eval_every", "eval_stride", "save_every", "keep_checkpoints", "sample_tokens",
    "profile_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_start",
)  # fmt: skip


def key(default: Any, meaning: str, unit: str = "", *, free: bool = False) -> Any:
    """A recipe key with its meaning and unit; a free one may change when a run is resumed."""
    metadata = {"meaning": meaning, "unit": unit, "free": free}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; `explain` gives each key's meaning."""

    name: str = key("", "what the run is called", free=True)
    description: str = key("", "one line for `h3lm recipes`", free=True)
    task: str = key("language", "language, or classification of labelled sequences")
    data: str = key(
        "",
        "folder of prepared blocks or labelled rows, or `tinyshakespeare` for the text we ship",
        free=True,
    )
    sources: dict[str, str] = key(
        {}, "folders of prepared blocks by names of your choice, in place of data", free=True
    )
    mixing: dict[str, float] = key(
        {},
        "share of each of the sources in what is read, in any unit, whatever their sizes; every "
        "block once before any twice if it is empty",
    )
    output_dir: str = key("", "where checkpoints and results go; runs/NAME if empty", free=True)
    seed: int = key(0, "seed of the weights, the order of blocks, and dropout")

    preset: str | None = key(None, "size of the model: 125m, 355m, 1.3b, 2.7b")
    mixers: str | list[str] = key("hybrid", "mixer of each layer, or one word for all")
    model: dict[str, Any] = key(
        {},
        "fields of H3Config, over those of the preset; of H3ClassificationConfig for classifiers",
    )
    classification: dict[str, Any] = key(
        {},
        "classifiers only: seeds, max_length, standardise, label_smoothing, and how signals vary "
        "in training: shift, gain_db, noise, stretch",
    )
    init_from: str | None = key(None, "model folder whose weights to start from")

    steps: int | None = key(None, "optimiser steps in all", "steps")
    epochs: float | None = key(None, "passes over the training blocks", "epochs")
    time_limit_s: float | None = key(
        None, "train for so long; the schedule then follows the clock", "s"
    )
    block_length: int = key(1024, "length of a training example", "tokens")
    batch_size: int = key(32, "blocks of one optimiser step, over all processes", "blocks")
    micro_batch_size: int | None = key(
        None,
        "blocks that a process takes through the model at once; all if null",
        "blocks",
        free=True,
    )

    learning_rate: float = key(6e-4, "peak learning rate")
    ssm_max_learning_rate: float = key(1e-3, "upper bound of it for shift B, diagonal B, A and dt")
    weight_decay: float = key(0.1, "weight decay; 0 for shift B, diagonal B, A and dt")
    beta1: float = key(0.9, "AdamW's first decay rate")
    beta2: float = key(0.999, "AdamW's second decay rate")
    adam_epsilon: float = key(1e-8, "AdamW's epsilon")
    max_grad_norm: float = key(1.0, "norm at which gradients are clipped; 0 for never")
    schedule: str = key("cosine", "cosine, linear or constant, after the warm-up")
    warmup_fraction: float = key(0.01, "part of the run in which the rate rises linearly")
    warmup_start: float = key(1e-6, "learning rate at step 0")
    decay_fraction: float = key(1.0, "part of the run after which the rate stays at its floor")
    floor_fraction: float = key(0.1, "the floor, as a part of the peak")

    precision: str = key("auto", "bf16 (autocast, fp32 weights), fp32, or auto: what is fast here")
    gradient_checkpointing: bool | None = key(
        None,
        "recompute blocks in the backward pass; null: as many as the memory estimate (of language "
        "models) asks for",
        free=True,
    )
    compile: str | None = key(
        None,
        "torch.compile each block (blocks: quick to start) or the whole model (model)",
        free=True,
    )
    graphs: bool | None = key(
        None,
        "replay forward and backward pass as CUDA graphs, on one GPU; null: unless blocks are "
        "recomputed, states reset at documents or steps profiled; classifiers need "
        "classification.graphs too",
        free=True,
    )
    parallel: str = key(
        "ddp",
        "how the processes of torchrun share a model: ddp, each holds it whole, or fsdp (FSDP2), "
        "each holds a part of weights, gradients and optimiser",
        free=True,
    )
    mesh: dict[str, int] = key(
        {},
        "how torchrun's processes are arranged: seq, so many share each row, a slice for each, "
        "and pass states on; replicate, so many copies of a model sharded by fsdp",
        free=True,
    )
    deterministic: bool = key(
        False, "the same bits in every run, also on a GPU; attention is then slower", free=True
    )
    reset_state_at_documents: bool = key(
        False, "start every document of a block from an empty state; the paper does not"
    )

    profile_steps: int | None = key(
        None,
        "profile so many steps behind the first five, into profile.txt and profile.json",
        "steps",
        free=True,
    )
    log_every: int = key(10, "how often the loss is logged", "steps", free=True)
    eval_every: int | None = key(None, "how often the validation loss is taken", "steps", free=True)
    eval_stride: int | None = key(
        None,
        "new tokens of each evaluation window of block_length; all if null",
        "tokens",
        free=True,
    )
    data_workers: int = key(
        0,
        "processes that read ahead, beside each that trains; 0 for classifiers on a GPU is 4",
        "processes",
        free=True,
    )
    test: bool = key(
        False,
        "score the data's test text too, once, by the weights that a run ends with",
        free=True,
    )
    verify_data: bool = key(True, "compare the data's checksums at the start", free=True)
    save_every: int | None = key(None, "how often a checkpoint is written", "steps", free=True)
    keep_checkpoints: int = key(2, "how many of them are kept", "checkpoints", free=True)
    keep_best: bool = key(
        False, "keep the weights of the lowest validation loss too, in best/", free=True
    )
    sample: str = key("", "prompt to continue when the run is done; no sample if empty", free=True)
    sample_tokens: int = key(300, "length of that sample", "tokens", free=True)

    def __post_init__(self) -> None:
        """Check what contradicts itself."""
        given = [n for n in DURATIONS if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise UserError(
                f"a recipe says how long in one way, steps, epochs or time_limit_s: it has {found}"
            )
        for name in (*given, *POSITIVE):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be positive")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name}={value} must be a finite number")
        for name in ("warmup_fraction", "decay_fraction", "floor_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.seed >= 2**32:
            raise UserError(f"seed={self.seed} must be below 2**32")
        if self.schedule != "constant" and self.decay_fraction < self.warmup_fraction:
            raise UserError(
                f"decay_fraction={self.decay_fraction} ends the schedule before the warm-up does, "
                f"warmup_fraction={self.warmup_fraction}"
            )
        if self.eval_stride is not None and self.eval_stride > self.block_length:
            raise UserError(
                f"eval_stride={self.eval_stride} exceeds the context of an evaluation, "
                f"block_length={self.block_length}"
            )
        if self.init_from is not None and (self.preset is not None or self.model):
            raise UserError(
                "init_from brings its own model: a recipe that has it gives no preset and no model"
            )
        for name in ("test", "keep_best"):
            if self.task == "classification" and getattr(self, name):
                raise UserError(
                    f"{name} is for language models: classifiers are always tested, by their last "
                    "weights"
                )
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise UserError(f"micro_batch_size={micro} must divide batch_size={self.batch_size}")
        if self.data_workers < 0:
            raise UserError(f"data_workers={self.data_workers} must not be negative")
        self._check_mesh()
        self._check_sources()
        for name, allowed in (
            ("schedule", SCHEDULES), ("precision", PRECISIONS), ("parallel", PARALLEL),
            ("compile", COMPILE), ("task", TASKS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    def _check_mesh(self) -> None:
        for name, size in self.mesh.items():
            if name not in MESH:
                raise UserError(f"the mesh has no {name!r}, only {', '.join(MESH)}")
            if not isinstance(size, int) or size < 1:
                raise UserError(f"mesh.{name}={size!r} must be a number of processes")
        if self.task == "classification" and self.mesh.get("seq", 1) > 1:
            raise UserError("mesh.seq shares the rows of language models, not of classifiers")
        if self.mesh.get("replicate", 1) > 1 and self.parallel != "fsdp":
            raise UserError("mesh.replicate copies a sharded model: it needs parallel=fsdp")

    def _check_sources(self) -> None:
        if self.sources and self.data:
            raise UserError("a recipe has data or sources, not both")
        if self.sources and self.task == "classification":
            raise UserError("sources are texts for language models, not rows for classifiers")
        for name, folder in self.sources.items():
            if not isinstance(folder, str) or not folder:
                raise UserError(f"sources.{name}={folder!r} must be a folder of prepared blocks")
        for name, weight in self.mixing.items():
            if name not in self.sources:
                there = f"only {', '.join(self.sources)}" if self.sources else "none"
                near = _nearest(name, self.sources)
                raise UserError(f"mixing.{name} names no source: there are {there}{near}")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise UserError(f"mixing.{name}={weight!r} must be a positive number")
        missing = [name for name in self.sources if self.mixing and name not in self.mixing]
        if missing:
            raise UserError(
                f"mixing gives no weight to {', '.join(missing)}: leave it out, or add it"
            )

    @property
    def folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.output_dir or f"runs/{self.name or 'unnamed'}")

    def decisive(self) -> dict[str, Any]:
        """The keys that decide what a run computes.

        Where the data lie is not among them; what they are is told by their index.
        """
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if not f.metadata["free"]}

    def to_yaml(self) -> str:
        """The whole recipe, resolved."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that is shipped, by its name.

    A file that says `base: OTHER` (a file or a shipped recipe) holds only what differs from it.

    Args:
        source: Path of a YAML file, or the name of a shipped recipe.
        overrides: `key=value` each; `model.FIELD=value` for a field of the model, and
            `classification.FIELD=value`.

    Raises:
        UserError: if there is no such recipe, a key is unknown (names the nearest), a value has
            the wrong type, or values contradict each other.
    """
    values = _read_values(source)
    changes = [_read_override(override) for override in overrides]
    values = _without_rivals(values, {key.partition(".")[0]: value for key, value in changes})
    for key_, value in changes:
        outer, dot, inner = key_.partition(".")
        if dot and outer in NESTED:
            fields_ = values.get(outer) or {}
            if not isinstance(fields_, dict):
                raise UserError(f"{outer}={fields_!r} must be dict")
            values[outer] = fields_ | {inner: value}
        else:
            values[key_] = value
    return make_recipe(values)


def _read_values(source: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a file says, over what its `base` says if it has one; fields of the model one by one."""
    if source in inside:
        raise UserError(f"{source}: its base is itself, by {' -> '.join((*inside, source))}")
    text, name = _read_source(source)
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{source}: a recipe is a list of `key: value`, not {type(values).__name__}"
        )
    values = dict[str, Any]({"name": name} | values)
    base = values.pop("base", None)
    if base is None:
        return values
    values_of_base = _without_rivals(_read_values(str(base), (*inside, source)), values)
    merged = values_of_base | values
    for name in NESTED:
        parts = [v[name] for v in (values_of_base, values) if isinstance(v.get(name), dict)]
        if len(parts) == 2:
            merged[name] = parts[0] | parts[1]
    return merged


def _without_rivals(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values but for those that changes replace by a key of another name."""
    kept = dict(values)
    for rivals in (DURATIONS, DATA):
        if any(changes.get(name) not in (None, "", {}) for name in rivals):
            kept = {n: v for n, v in kept.items() if n not in rivals or n in changes}
    if values.get("sources") and not kept.get("sources") and "mixing" not in changes:
        kept.pop("mixing", None)
    return kept


def _read_source(source: str) -> tuple[str, str]:
    """Text and name of a recipe file or a shipped recipe."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{source}: no such recipe file")
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: byte {error.start} is not UTF-8") from None
    shipped = SHIPPED / f"{source}.yaml"
    if not shipped.is_file():
        near = _nearest(source, shipped_recipes())
        raise UserError(f"there is no recipe {source!r}{near}; `h3lm recipes` lists them")
    return shipped.read_text(encoding="utf-8"), source


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Check keys and types, and build the recipe."""
    known = {f.name for f in fields(Recipe)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown recipe key {name!r}{_nearest(name, known)}")
    hints = get_type_hints(Recipe)
    return Recipe(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def shipped_recipes() -> dict[str, str]:
    """Names and descriptions of the recipes in the package."""
    found = {}
    for entry in SHIPPED.iterdir():
        if entry.name.endswith(".yaml"):
            text = yaml.safe_load(entry.read_text(encoding="utf-8"))
            found[entry.name.removesuffix(".yaml")] = str(text.get("description", ""))
    return dict(sorted(found.items()))


def explain(name: str | None = None) -> str:
    """One key's type, default, unit and meaning in a line; all keys if None.

    Raises:
        UserError: if there is no such key.
    """
    by_name = {f.name: f for f in fields(Recipe)}
    if name is None:
        return "\n".join(_explain_field(f) for f in by_name.values())
    if name not in by_name:
        raise UserError(f"unknown recipe key {name!r}{_nearest(name, by_name)}")
    return _explain_field(by_name[name])


def _explain_field(f: Field) -> str:
    default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[operator]
    shown = "null" if default is None else repr(default)
    kind = str(get_type_hints(Recipe)[f.name]).replace("<class '", "").replace("'>", "")
    unit = f" {f.metadata['unit']}" if f.metadata["unit"] else ""
    return f"{f.name} ({kind}, default {shown}{unit}): {f.metadata['meaning']}"


def _read_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r}: write an override as key=value")
    hint = get_type_hints(Recipe).get(name)
    is_text = hint == str | None
    if hint is str:
        if not text.startswith(('"', "'")):
            return name, text  # `sample=` is no sample, `name=2024` no number
        is_text = True
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        if is_text:
            return name, text
        raise UserError(f"{override!r}: cannot read the value") from None
    if is_text and not isinstance(value, str | None):
        return name, text
    return name, value


def model_fields(given: Mapping[str, Any], *configs: type) -> dict[str, Any]:
    """A recipe's fields of the model, in the types of the configuration.

    Args:
        given: The recipe's `model`.
        configs: The configuration's class, and those that it inherits fields from.

    Raises:
        UserError: if a value is of another type, or mixers are among the fields.
    """
    if "mixers" in given:
        raise UserError("the recipe's model has mixers: they are a key of the recipe, beside model")
    hints: dict[str, Any] = {}
    for config in reversed(configs):
        hints |= config.__annotations__
    return {
        name: _convert(f"model.{name}", value, hints[name]) if name in hints else value
        for name, value in given.items()
    }


def _convert(name: str, value: Any, hint: Any) -> Any:
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if isinstance(value, str) and (float in allowed or int in allowed):
        with contextlib.suppress(ValueError):  # YAML reads 6e-4 and 1e5 as strings
            value = float(value)
    if isinstance(value, float) and float not in allowed and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        return float(value)
    plain = tuple(t if isinstance(t, type) else t.__origin__ for t in allowed)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        kinds = " or ".join(t.__name__ for t in plain if t is not type(None))
        raise UserError(f"{name}={value!r} must be {kinds}")
    return value


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
