"""`h3lm convert`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def convert(
    checkpoint: Annotated[Path, Argument(help="The release's checkpoint, a .pt file.")],
    out_dir: Annotated[Path, Argument(help="Folder to write the model to.")],
    num_attention_heads: Annotated[
        int | None, Option(help="Heads of the attention layers; a checkpoint does not tell.")
    ] = None,
    rotary_dim: Annotated[
        int | None, Option(help="Rotated features of an attention head, to check.")
    ] = None,
    h3_head_dim: Annotated[int | None, Option(help="Channels of an H3 head, to check.")] = None,
    channel_order: Annotated[
        str, Option(help="Training code's channel order: plain (PyTorch) or fused (CUDA).")
    ] = "plain",
    tokenizer: Annotated[
        str | None, Option(help="Tokenizer to put beside the model: a folder or a name.")
    ] = None,
) -> None:
    """Convert a checkpoint of the authors' release into a model folder."""
    from h3lm.models.convert import convert_checkpoint

    model = convert_checkpoint(
        checkpoint,
        out_dir,
        num_attention_heads=num_attention_heads,
        rotary_dim=rotary_dim,
        h3_head_dim=h3_head_dim,
        channel_order=channel_order,
        tokenizer=tokenizer,
    )
    print(f"{out_dir}: {model.num_parameters():,} parameters, {', '.join(model.config.mixers)}")
