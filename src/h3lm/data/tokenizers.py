"""Tokenizers: characters, bytes, GPT-2, a BPE of one's own, or any of Hugging Face.

All are stock `PreTrainedTokenizerFast`, so `save_pretrained` writes what
`AutoTokenizer.from_pretrained` reads, without any code of ours.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from h3lm.errors import UserError

if TYPE_CHECKING:  # imported where used: transformers brings torch, which reading text needs not
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def character_tokenizer(
    text: str | Iterable[str], *, end_of_text: bool = False, unknown: bool = False
) -> "PreTrainedTokenizerFast":
    """Give every distinct character of a text an id, in sorted order from 0.

    Decoding restores any text of these characters exactly. A character that is not among them is
    an error when it is encoded, so that no text changes silently, unless `unknown` is set.

    Args:
        text: The text, or its parts, whose characters make the vocabulary.
        end_of_text: Whether to add `<|endoftext|>`, after the characters.
        unknown: Whether to add `<unk>`, which then stands for every other character, last of all.

    Returns:
        A tokenizer of as many ids as there are characters, plus the tokens asked for.

    Raises:
        UserError: if the text is empty.

    Example:
        >>> tokenizer = character_tokenizer("abracadabra")
        >>> encode(tokenizer, "bad").tolist()
        [1, 0, 3]
        >>> tokenizer.decode([1, 0, 3])
        'bad'
    """
    from tokenizers import Tokenizer, decoders, models

    characters: set[str] = set()
    for part in [text] if isinstance(text, str) else text:
        characters.update(part)
    if not characters:
        raise UserError("the text is empty: a character tokenizer needs some characters")
    special = [END_OF_TEXT] * end_of_text + [UNKNOWN] * unknown
    vocabulary = {token: i for i, token in enumerate([*sorted(characters), *special])}
    # A BPE without merges splits into characters by itself, faster than a pattern would. It is
    # given an unknown token even where the vocabulary has none: only so does it raise instead of
    # dropping the character.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, end_of_text=end_of_text, unknown=unknown)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Give the bytes of UTF-8 the ids 0 to 255, and `<|endoftext|>` the id 256.

    Decoding restores any text exactly; bytes that are no UTF-8 decode to U+FFFD.

    Example:
        >>> encode(byte_tokenizer(), "né").tolist()
        [110, 195, 169]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, end_of_text=True)


def gpt2_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """Load GPT-2's tokenizer from its two files, as OpenAI or Hugging Face name them.

    Args:
        folder: Where `encoder.json` and `vocab.bpe`, or `vocab.json` and `merges.txt`, lie.

    Returns:
        50,257 ids for GPT-2's own files; `<|endoftext|>` is the last.

    Raises:
        UserError: if neither pair is there or the files cannot be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pair = _gpt2_files(Path(folder))
    if pair is None:
        names = " or ".join(" and ".join(names) for names in _GPT2_FILES)
        raise UserError(f"{folder}: no GPT-2 tokenizer here, which is the two files {names}")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, pair)))
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(
            f"{folder}: {pair[0].name} and {pair[1].name} do not fit: {error}"
        ) from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, end_of_text=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE: GPT-2's kind of tokenizer, with merges learned from these texts.

    Deterministic: the same texts and size give the same tokenizer. Any text round-trips exactly.

    Args:
        texts: The corpus, in parts of any length; read once.
        vocab_size: Number of ids wanted, `<|endoftext|>` included, at least 257. A small corpus
            may give fewer.

    Returns:
        A tokenizer whose last id is `<|endoftext|>`.

    Raises:
        UserError: if `vocab_size` is below 257 or the corpus is empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {END_OF_TEXT} at least"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    seen = False

    def nonempty() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text)
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one is left for the end of text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(nonempty(), trainer)
    if not seen:
        raise UserError("the corpus is empty: a BPE cannot be trained on it")
    return _wrap(tokenizer, end_of_text=True)


def load_tokenizer(
    spec: str | Path, *, corpus: str | Iterable[str] | None = None
) -> "PreTrainedTokenizerFast":
    """Load a tokenizer by its name.

    Args:
        spec: `characters`, `bytes`, a folder with a Hugging Face tokenizer, a folder with the two
            files of GPT-2, or a name on the Hugging Face hub.
        corpus: What `characters` takes its vocabulary from; it gets `<|endoftext|>` as well.

    Raises:
        UserError: if there is no such tokenizer, or it is not a fast one.
    """
    if str(spec) == "bytes":
        return byte_tokenizer()
    if str(spec) == "characters":
        if corpus is None:
            raise UserError(
                "the tokenizer 'characters' takes its vocabulary from a corpus: prepare one, or "
                "load the folder of a character tokenizer"
            )
        return character_tokenizer(corpus, end_of_text=True)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        if not own and _gpt2_files(folder) is not None:
            return gpt2_tokenizer(folder)
        return _from_hugging_face(str(folder), f"{spec}: this folder holds no tokenizer")
    if folder.exists() or str(spec).startswith((".", "/", "~")) or str(spec).count("/") > 1:
        raise UserError(f"{spec}: no such tokenizer folder")
    return _from_hugging_face(
        str(spec),
        f"{spec}: neither 'characters', 'bytes', a folder, nor a tokenizer that the Hugging Face "
        "hub gives",
    )


def encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> NDArray[np.int32]:
    """Turn a text into ids: those of `tokenizer(text, add_special_tokens=False)`, as an array.

    For many texts make one `Encoder`, which looks at the tokenizer only once.

    Returns:
        (number of tokens,), int32.

    Raises:
        UserError: if the tokenizer has no token for a character, naming it and its place.
    """
    return Encoder(tokenizer)(text)


class Encoder:
    """Text to ids, the same as the tokenizer gives, and as fast as numpy where it can be.

    Characters and bytes are looked up in a table, tens of times faster than the general way, which
    makes an object of every token. Truncation and padding that a tokenizer was saved with are off.

    Args:
        tokenizer: Any fast tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        text = backend.to_str()
        state = json.loads(text)
        if state["truncation"] or state["padding"]:
            backend = Tokenizer.from_str(text)
            backend.no_truncation()
            backend.no_padding()
        self._backend: Tokenizer = backend
        self._added: dict[str, int] = {
            token["content"]: token["id"] for token in state["added_tokens"]
        }
        self._is_bytes = False
        self._table = self._lookup_table(state)
        self._unknown = (
            state["model"].get("vocab", {}).get(UNKNOWN) if self._table is not None else None
        )
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = (
            re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self._added else None
        )

    def _lookup_table(self, state: dict) -> NDArray[np.int32] | None:
        """Return the id of every byte or code point (-1: none), or None if merges are needed."""
        model = state["model"]
        plain = all(
            not (token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"])
            for token in state["added_tokens"]
        )
        if model["type"] != "BPE" or model["merges"] or state["normalizer"] or not plain:
            return None
        ids = {token: i for token, i in model["vocab"].items() if token not in self._added}
        cutter = state["pre_tokenizer"]
        if cutter is None:
            if model["unk_token"] != UNKNOWN or any(len(token) != 1 for token in ids):
                return None
            table = np.full(max(map(ord, ids)) + 1, -1, np.int32)
            table[[ord(token) for token in ids]] = list(ids.values())
            return table
        bytewise = (
            cutter["type"] == "ByteLevel"
            and not cutter["add_prefix_space"]
            and not cutter["use_regex"]
            and set(ids) == set(_byte_symbols())
        )
        self._is_bytes = bytewise
        return np.array([ids[s] for s in _byte_symbols()], np.int32) if bytewise else None

    def __call__(self, text: str) -> NDArray[np.int32]:
        """Encode one text.

        Returns:
            (number of tokens,), int32.

        Raises:
            UserError: if the tokenizer has no token for a character, naming it and its place.
        """
        try:
            if self._table is None:
                found = self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
                return np.array(found.ids, np.int32)
            parts = self._split.split(text) if self._split else [text]
            arrays = []
            place = 0
            for part in parts:
                added = self._added.get(part)
                arrays.append(
                    np.array([added], np.int32) if added is not None else self._look_up(part, place)
                )
                place += len(part)
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        except (UnicodeEncodeError, TypeError):
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise UserError(
                f"character {at:,} is half a surrogate pair, {text[at]!a}, which is no text in any "
                "encoding: mend the source"
            ) from None

    def _look_up(self, text: str, place: int) -> NDArray[np.int32]:
        assert self._table is not None
        if self._is_bytes:
            return self._table[np.frombuffer(text.encode("utf-8"), np.uint8)]
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        ids[points >= len(self._table)] = -1
        if ids.size and ids.min() < 0:
            if self._unknown is None:
                at = int(np.argmax(ids < 0))
                raise UserError(
                    f"character {place + at:,}, {text[at]!r}, is not in the vocabulary of "
                    f"{len(self._backend.get_vocab()):,}: leave it out, or make the tokenizer with "
                    "unknown=True"
                )
            ids[ids < 0] = self._unknown
        return ids


def _wrap(
    tokenizer: "Tokenizer", *, end_of_text: bool, unknown: bool = False
) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    names = {}
    if end_of_text:
        names["eos_token"] = END_OF_TEXT
        names["bos_token"] = END_OF_TEXT
    if unknown:
        names["unk_token"] = UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


def _from_hugging_face(name: str, failure: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, KeyError, or plain Exception from Rust
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{failure} ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{name}: {type(tokenizer).__name__} is a slow tokenizer; only fast ones work"
        )
    return tokenizer


def _gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    for vocabulary, merges in _GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return folder / vocabulary, folder / merges
    return None


def _byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE.

    Source: GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, the others, in
    order, for the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
