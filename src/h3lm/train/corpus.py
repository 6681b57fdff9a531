"""The training data of a recipe, as torch sees them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from h3lm.data.blocks import Block, TokenStream
from h3lm.data.joined import JoinedBlocks
from h3lm.data.order import Order
from h3lm.data.prepare import prepare
from h3lm.data.tokenizers import encode
from h3lm.errors import UserError
from h3lm.evals.perplexity import Tokens
from h3lm.models.slices import slice_bounds
from h3lm.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY_SHAKESPEARE = "tinyshakespeare"
STRETCH = 1 << 14  # of an order, worked out at once


@dataclass(frozen=True)
class HeldOut:
    """Text to validate on.

    Attributes:
        tokens: The text.
        first: First position to predict; what stands before it is context only.
        characters: Whether a token is a character.
        source: The recipe's name of where it comes from; empty if there is only one.
    """

    tokens: Tokens
    first: int = 1
    characters: bool = False
    source: str = ""

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return len(self.tokens) - self.first


def folders(recipe: Recipe) -> dict[str, Path]:
    """Folders of a recipe's prepared data by the names of their sources.

    Raises:
        UserError: if it has none.
    """
    if recipe.sources:
        return {name: Path(folder) for name, folder in recipe.sources.items()}
    if recipe.data == TINY_SHAKESPEARE:
        return {"": recipe.folder / "data"}
    if not recipe.data:
        raise UserError("the recipe has no data: give data=FOLDER, made by `h3lm prepare`")
    return {"": Path(recipe.data)}


def fingerprint(blocks: JoinedBlocks) -> str:
    """What tells training data apart, wherever they lie."""
    found = {name: part.stream.index.fingerprint("train") for name, part in blocks.parts.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def order_of(recipe: Recipe, blocks: JoinedBlocks) -> Order:
    """Which block of a recipe's data comes when.

    Its sources stand in the order of their names, so that it is the same however they are listed.
    """
    weights = [recipe.mixing[name] for name in blocks.parts] if recipe.mixing else None
    return Order(list(blocks.sizes.values()), recipe.seed, weights)


def prepare_shipped_text(recipe: Recipe) -> None:
    """Prepare the text that we ship, if the recipe trains on it."""
    if recipe.data == TINY_SHAKESPEARE:
        with as_file(_shipped_text()) as path:
            prepare(
                path, folders(recipe)[""], tokenizer="characters", valid_fraction=0.1,
                block_length=recipe.block_length, progress=False,
            )  # fmt: skip


def held_out(
    recipe: Recipe, blocks: JoinedBlocks, tokenizer: "PreTrainedTokenizerFast"
) -> list[HeldOut]:
    """What a recipe validates on: the validation text of each of its sources that has any.

    Of the text that we ship it is the last tenth, each of its characters predicted once, the
    first ones with the end of the training text in front of them.
    """
    found = []
    for source, part in blocks.parts.items():
        if "valid" not in part.stream.index.splits:
            continue
        valid = TokenStream(part.stream.folder, "valid")
        if recipe.data == TINY_SHAKESPEARE:
            ids = encode(tokenizer, _shipped_text().read_text(encoding="utf-8")).astype(np.int64)
            length = len(valid) - int(valid[len(valid) - 1] == tokenizer.eos_token_id)
            found.append(HeldOut(ids, len(ids) - length, characters=True))
        else:
            found.append(HeldOut(valid, source=source))
    return found


def test_texts(recipe: Recipe, blocks: JoinedBlocks) -> list[HeldOut]:
    """What a recipe's last weights are tested on, if it says so.

    Raises:
        UserError: if it says so and a source has no test split.
    """
    if not recipe.test:
        return []
    return [
        HeldOut(TokenStream(part.stream.folder, "test"), source=source)
        for source, part in blocks.parts.items()
    ]


def _shipped_text() -> Traversable:
    return files("h3lm.data") / "texts" / "tinyshakespeare.txt"


def tokenizer_of(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder of prepared data."""
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(folder)
    return found


class BlockOrder(Sampler[int]):
    """Which block comes when, over the whole run.

    It depends on the seed alone, not on the number of processes or on how a batch is divided;
    a batch may hold the end of one pass and the beginning of the next.

    Args:
        order: The order.
        total: Blocks that the run takes.
        batch: Blocks that a process takes at once.
        readers: How many processes take the same ones, one after the other.
    """

    def __init__(self, order: Order, total: int, *, batch: int = 1, readers: int = 1) -> None:
        self.order, self.total = order, total
        self.batch, self.readers = batch, readers

    def __len__(self) -> int:
        return self.total * self.readers

    def __iter__(self) -> Iterator[int]:
        if self.readers == 1:
            yield from self._blocks()
            return
        blocks = self._blocks()
        while taken := list(islice(blocks, self.batch)):
            yield from taken * self.readers

    def _blocks(self) -> Iterator[int]:
        for first in range(0, self.total, STRETCH):
            yield from self.order.blocks(first, min(first + STRETCH, self.total)).tolist()


class BlockDataset(Dataset[Block]):
    """Blocks for a data loader."""

    def __init__(self, blocks: JoinedBlocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> Block:
        return self.blocks[i]


class BlockCollator:
    """Blocks to a batch for `H3ForCausalLM`.

    Args:
        reset_state_at_documents: Whether documents in a block are kept apart, by positions that
            start anew.
        row_slice: Which slice of its rows a process takes, from 0, and of how many.
    """

    def __init__(
        self, reset_state_at_documents: bool = False, row_slice: tuple[int, int] = (0, 1)
    ) -> None:
        self.reset_state_at_documents = reset_state_at_documents
        self.row_slice = row_slice

    def __call__(self, blocks: list[Block]) -> dict[str, Any]:
        """Inputs and already shifted labels, (B, L) each."""
        tokens = torch.stack([torch.from_numpy(block.tokens) for block in blocks])
        targets = tokens[:, 1:].contiguous()
        batch: dict[str, Tensor] = {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": targets,  # counted by the trainer
            "shift_labels": targets,
        }
        if self.reset_state_at_documents:
            positions = [torch.from_numpy(block.position_ids()) for block in blocks]
            batch["position_ids"] = torch.stack(positions)
        # behind the shift: a slice's last label is the next one's first token
        start, stop = slice_bounds(targets.shape[1], *self.row_slice)
        return {name: x[:, start:stop].contiguous() for name, x in batch.items()}
