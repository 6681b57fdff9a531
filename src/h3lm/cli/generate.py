"""`h3lm generate`."""

from contextlib import closing
from typing import Annotated

from typer import Argument, Option


def generate(
    model: Annotated[str, Argument(help="Model folder, or a name on the Hugging Face hub.")],
    prompt: Annotated[str | None, Option(help="Text to continue.")] = None,
    requests: Annotated[
        str | None,
        Option(
            help='File of prompts in place of --prompt: a JSON object in each line, {"prompt": '
            '"Once", "max_new_tokens": 20, "seed": 1}; all but the prompt may be left out. Prints '
            "a JSON line for each as it ends."
        ),
    ] = None,
    slots: Annotated[int, Option(min=1, help="Requests that run at a time.")] = 16,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to generate at most.")] = 200,
    temperature: Annotated[
        float, Option(min=0.0, help="Of the sampling distribution; 0 is greedy.")
    ] = 1.0,
    top_p: Annotated[
        float, Option(min=0.0, max=1.0, help="Sample within this probability mass.")
    ] = 1.0,
    top_k: Annotated[int, Option(min=0, help="Sample among so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Continue a text, streaming it as it is made, or many texts at once."""
    from h3lm.models.generation import answer

    pieces = answer(
        model,
        prompt,
        requests,
        slots=slots,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        device=device,
    )
    with closing(pieces):  # Ctrl-C may come while a piece is printed
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
