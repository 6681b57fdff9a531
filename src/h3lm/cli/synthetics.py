"""`h3lm synthetics`."""

import math
from pathlib import Path
from typing import Annotated

from typer import Option

SHORT = "recall, H3 and S4D, one seed, 10,000 steps at rate 2e-3: minutes on a CPU"


def synthetics(
    task: Annotated[
        list[str] | None,
        Option(help="induction, recall, recall-v20, mqar-4, mqar-8, mqar-16, mqar-64; repeatable."),
    ] = None,
    mixer: Annotated[
        list[str] | None,
        Option(help="h3, h3:HEAD_DIM[:TAPS], s4d, gss, s4, attention, hybrid, ...; repeatable."),
    ] = None,
    seeds: Annotated[int, Option(help="Models of each kind, with seeds 0, 1, ...")] = 5,
    search: Annotated[
        bool, Option("--search", help="Also four learning rates, at twice the steps.")
    ] = False,
    learning_rate: Annotated[float | None, Option(help="In place of the recipe's.")] = None,
    max_steps: Annotated[
        int | None, Option(help="In place of the recipe's; whole passes over the training rows.")
    ] = None,
    early_stop: Annotated[
        bool, Option(help="A model that has solved its task lowers its rate and stops.")
    ] = True,
    vocab_size: Annotated[int | None, Option(help="Of the task, in place of its own.")] = None,
    length: Annotated[int | None, Option(help="Of the task, in place of its own.")] = None,
    num_pairs: Annotated[int | None, Option(help="Of mqar, in place of its own.")] = None,
    num_train: Annotated[int | None, Option(help="Training rows, in place of the task's.")] = None,
    num_test: Annotated[int | None, Option(help="Test rows, in place of the task's.")] = None,
    short: Annotated[bool, Option("--short", help=f"The short version: {SHORT}.")] = False,
    out: Annotated[
        Path | None,
        Option(
            help="Folder of the report; what it holds is not run again, the rest is added. "
            "By default runs/synthetics, or runs/synthetics-short."
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        Option(help="Folder of another report to take up first; repeatable."),
    ] = None,
    workers: Annotated[
        int,
        Option(min=0, help="Trainings side by side; 0: one on each core, or eight on each GPU."),
    ] = 0,
    minutes: Annotated[
        float,
        Option(
            min=0.0,
            help="Give up what is not finished by then; the report keeps where it stood, marked, "
            "and the same call goes on from there. With 0 only tables and pictures are made.",
        ),
    ] = math.inf,
    device: Annotated[str, Option(help="auto, cpu, cuda (all of them), cuda:0 or mps.")] = "auto",
) -> None:
    """Train mixers on tasks that tell them apart, and report what they can recall."""
    from h3lm.synthetics.run import live_line, plan, run
    from h3lm.synthetics.settings import MIXERS_BY_DEFAULT

    if short:
        seeds, learning_rate, max_steps = 1, learning_rate or 2e-3, max_steps or 10_000
    chosen = plan(
        task or (["recall"] if short else ["induction", "recall"]),
        mixer or (["h3", "s4d"] if short else MIXERS_BY_DEFAULT),
        seeds=seeds,
        search=search,
        learning_rate=learning_rate,
        max_steps=max_steps,
        early_stop=early_stop,
        device=device,
        vocab_size=vocab_size,
        length=length,
        num_pairs=num_pairs,
        num_train=num_train,
        num_test=num_test,
    )
    say, progress = live_line()
    folder = out or Path("runs/synthetics-short" if short else "runs/synthetics")
    run(chosen, folder, say, progress, workers=workers, minutes=minutes, others=add or ())
