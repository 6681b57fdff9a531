"""What the lab runs by name: tasks with their sizes, their recipe and the paper's figures."""

from dataclasses import dataclass, field

from h3lm.synthetics.ensemble import Recipe
from h3lm.synthetics.tasks import Task, make_task

MIXERS_BY_DEFAULT = ("h3", "s4d", "gss", "attention", "linear_attention", "s4")


@dataclass(frozen=True)
class Setting:
    """A task with its sizes and its recipe.

    Attributes:
        task: The task.
        recipe: How models are trained on it.
        width: Width of the models.
        num_train: Training rows.
        num_test: Test rows.
        test_lengths: Further lengths to test at.
        paper: The paper's accuracy in per cent, by mixer.
    """

    task: Task
    recipe: Recipe
    width: int = 32
    num_train: int = 5000
    num_test: int = 500
    test_lengths: tuple[int, ...] = ()
    paper: dict[str, float] = field(default_factory=dict)


def _mqar(num_pairs: int, length: int) -> Setting:
    # The published comparison has 8192 ids, 100,000 rows, batches of 512 and more rates: hours.
    # With 512 ids there are still more keys than a row's, and 64 pairs are more than a width.
    task = make_task("mqar", vocab_size=512, length=length, num_pairs=num_pairs)
    recipe = Recipe(epochs=32, schedule="cosine", learning_rate=2e-3, batch_size=64, stop_at=0.99)
    return Setting(task, recipe, width=64, num_train=10_000, num_test=500)


SETTINGS: dict[str, Setting] = {
    "induction": Setting(
        make_task("induction", vocab_size=20, length=30),
        Recipe(epochs=400, schedule="cosine"),
        paper={"s4d": 35.6, "gss": 6.8, "h3": 100.0, "attention": 100.0},
    ),
    "recall": Setting(
        make_task("recall", vocab_size=10, length=20),
        Recipe(epochs=200),
        test_lengths=(20, 40, 80, 160),
        paper={"s4d": 86.0, "gss": 78.0, "h3": 99.8, "attention": 100.0},
    ),
    "recall-v20": Setting(
        make_task("recall", vocab_size=20, length=40),
        Recipe(epochs=400),
        test_lengths=(40, 80, 160),
    ),
    "mqar-4": _mqar(4, 64),
    "mqar-8": _mqar(8, 64),
    "mqar-16": _mqar(16, 64),
    "mqar-64": _mqar(64, 256),
}
TO_THE_END = "-to-the-end"  # behind the name of a setting whose models do not stop early
PAPER_LONGER = {("recall", "h3", 40): 98.4}


def known_setting(name: str) -> Setting | None:
    """The setting of a name, also where its models were trained to the end; None if unknown."""
    return SETTINGS.get(name.removesuffix(TO_THE_END))
