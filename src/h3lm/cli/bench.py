"""`h3lm bench`: speed on this machine, correctness first."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option, Typer

bench = Typer(name="bench", help="Measure speed on this machine; wrong kernels are not timed.")
Folder = Annotated[Path, Option("--out", help="Folder of the report: JSON, Markdown and pictures.")]
DEFAULT_FOLDER = Path("benchmarks")


@bench.callback(invoke_without_command=True)
def _no_command(context: Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
def core(out: Folder = DEFAULT_FOLDER) -> None:
    """The H3 core against the memory roof, attention and torch.fft, and how it grows."""
    from h3lm.bench.core import run

    print(run(out, print))


@bench.command()
def conv(
    out: Folder = DEFAULT_FOLDER,
    minutes: Annotated[float, Option(help="What is not measured by then is left out.")] = 20.0,
) -> None:
    """Long convolution from 256 to a million positions, beside torch.fft and FlashFFTConv."""
    from h3lm.bench.conv import run

    print(run(out, print, minutes=minutes))


@bench.command()
def train(
    out: Folder = DEFAULT_FOLDER,
    preset: Annotated[str, Option(help="125m, 355m, 1.3b or 2.7b.")] = "125m",
    world: Annotated[int, Option(help="GPUs; of several, one is measured too.")] = 1,
    parallel: Annotated[
        str, Option(help="How several share the work: fsdp, ddp, or seq, slices of each row.")
    ] = "fsdp",
    length: Annotated[
        list[int] | None, Option(help="Length of rows; give it again for more. All if none.")
    ] = None,
    tokens: Annotated[int | None, Option(help="Tokens of a step on each GPU.")] = None,
    compiled: Annotated[bool, Option("--compile/--no-compile", help="By torch.compile.")] = True,
    graphs: Annotated[
        bool, Option(help="Replay the steps of one GPU as CUDA graphs, unless it recomputes.")
    ] = True,
    recompute: Annotated[
        bool | None,
        Option(
            "--recompute/--keep",
            help="Recompute blocks in the backward pass; else where the memory asks for it.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None, Option(help="transformer, hybrid or h3; give it again for more.")
    ] = None,
    memory: Annotated[
        bool, Option("--memory", help="The memory of a single step alone; nothing is timed.")
    ] = False,
) -> None:
    """Training steps of a preset: H3 and the hybrid beside the Transformer."""
    from h3lm.bench.train import contenders_of, run

    print(
        run(
            out, print, preset=preset, world=world, way=parallel, lengths=length, tokens=tokens,
            compiled=compiled, recomputed=recompute, graphs=graphs,
            contenders=contenders_of(model), timed=not memory,
        )
    )  # fmt: skip


@bench.command()
def lra(out: Folder = DEFAULT_FOLDER) -> None:
    """Training steps on the Long Range Arena's shapes: S4 by torch.fft and by our kernel."""
    from h3lm.bench.lra import run

    print(run(out, print))


@bench.command()
def generate(
    out: Folder = DEFAULT_FOLDER,
    preset: Annotated[str, Option(help="125m, 355m, 1.3b or 2.7b.")] = "1.3b",
    minutes: Annotated[float, Option(help="What is not measured by then is left out.")] = 10.0,
    cpu: Annotated[
        bool, Option("--cpu", help="Models of the demo's size on this processor, up to 100K.")
    ] = False,
) -> None:
    """Tokens per second of `generate`: H3, the hybrid and Transformers at several prompts."""
    if cpu:
        from h3lm.bench.generate_cpu import run as run_on_cpu

        print(run_on_cpu(out, print))
        return
    from h3lm.bench.generate import run

    print(run(out, print, preset=preset, minutes=minutes))
