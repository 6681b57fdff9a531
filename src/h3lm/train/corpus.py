"""The training data of a recipe, as torch sees them."""

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

from h3lm.data.blocks import Block, Blocks, TokenStream
from h3lm.data.prepare import prepare
from h3lm.data.tokenizers import encode
from h3lm.errors import UserError
from h3lm.evals.perplexity import Tokens
from h3lm.models.slices import slice_bounds
from h3lm.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY_SHAKESPEARE = "tinyshakespeare"


@dataclass(frozen=True)
class HeldOut:
    """Text to validate on.

    Attributes:
        tokens: The text.
        first: First position to predict; what stands before it is context only.
        characters: Whether a token is a character.
    """

    tokens: Tokens
    first: int = 1
    characters: bool = False


def blocks_folder(recipe: Recipe) -> Path:
    """The folder of a recipe's blocks."""
    if recipe.data == TINY_SHAKESPEARE:
        return recipe.folder / "data"
    if not recipe.data:
        raise UserError("the recipe has no data: give data=FOLDER, made by `h3lm prepare`")
    return Path(recipe.data)


def prepare_shipped_text(recipe: Recipe) -> None:
    """Prepare the text that we ship, if the recipe trains on it."""
    if recipe.data == TINY_SHAKESPEARE:
        with as_file(_shipped_text()) as path:
            prepare(
                path, blocks_folder(recipe), tokenizer="characters", valid_fraction=0.1,
                block_length=recipe.block_length, progress=False,
            )  # fmt: skip


def held_out(
    recipe: Recipe, blocks: Blocks, tokenizer: "PreTrainedTokenizerFast"
) -> HeldOut | None:
    """What a recipe validates on: the data's validation text, if there is any.

    Of the text that we ship it is the last tenth, each of its characters predicted once, the
    first ones with the end of the training text in front of them.
    """
    if recipe.data == TINY_SHAKESPEARE:
        ids = encode(tokenizer, _shipped_text().read_text(encoding="utf-8")).astype(np.int64)
        valid = TokenStream(blocks.stream.folder, "valid")
        length = len(valid) - int(valid[len(valid) - 1] == tokenizer.eos_token_id)
        return HeldOut(ids, len(ids) - length, characters=True)
    if "valid" not in blocks.stream.index.splits:
        return None
    return HeldOut(TokenStream(blocks.stream.folder, "valid"))


def test_text(recipe: Recipe, blocks: Blocks) -> HeldOut | None:
    """What a recipe's last weights are tested on, if it says so.

    Raises:
        UserError: if it says so and the data have no test split.
    """
    return HeldOut(TokenStream(blocks.stream.folder, "test")) if recipe.test else None


def _shipped_text() -> Traversable:
    return files("h3lm.data") / "texts" / "tinyshakespeare.txt"


def tokenizer_of(blocks: Blocks) -> "PreTrainedTokenizerFast":
    """The tokenizer that the blocks were made with."""
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(blocks.stream.tokenizer_folder)
    return found


class BlockOrder(Sampler[int]):
    """Which block comes when, over the whole run: one permutation after the other.

    It depends on the seed alone, not on the number of processes or on how a batch is divided;
    every pass takes every block once, and a batch may hold the end of one and the beginning of
    the next.

    Args:
        num_blocks: Blocks there are.
        total: Blocks that the run takes.
        seed: Seed of the permutations.
        batch: Blocks that a process takes at once.
        readers: How many processes take the same ones, one after the other.
    """

    def __init__(
        self, num_blocks: int, total: int, seed: int, *, batch: int = 1, readers: int = 1
    ) -> None:
        self.num_blocks, self.total, self.seed = num_blocks, total, seed
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
        for number in range(-(-self.total // self.num_blocks)):
            left = self.total - number * self.num_blocks
            order = np.random.default_rng([self.seed, number]).permutation(self.num_blocks)[:left]
            for start in range(0, len(order), 2**16):  # a whole list would take GBs for The Pile
                yield from order[start : start + 2**16].tolist()


class BlockDataset(Dataset[Block]):
    """Blocks for a data loader."""

    def __init__(self, blocks: Blocks) -> None:
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
