import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from h3lm.evals.encoding import encode_all, splits_at_newlines, stands_alone

CORPUS = ["the cat sat.\n\nIt's 12 o'clock,\nthe dog said:\n nothing \n"] * 20


def byte_level(before=None, behind=None, added=("<|end|>",)):
    """A BPE tokenizer with GPT-2's pattern, learned from a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if behind is not None:
        tokenizer.post_processor = behind
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def texts(count):
    draw = random.Random(0)
    bits = [
        "the", " cat", " ", "\n", "\n\n", "\t", "\r", "\u00a0", "\x1c", "\u2028", "12", ".", ":",
        "'s", "é", "日", "<|end|>", " \n", " \n\n",
    ]  # fmt: skip
    return ["".join(draw.choices(bits, k=draw.randrange(1, 12))) for _ in range(count)]


def test_lines_tokenised_by_themselves_are_the_text():
    tokenizer = byte_level()
    assert splits_at_newlines(tokenizer)
    some = texts(4000)
    found = encode_all(tokenizer, some)
    assert set(found) == set(some)
    expected = tokenizer(list(found))["input_ids"]
    assert [ids.tolist() for ids in found.values()] == expected


def test_each_distinct_line_is_tokenised_once():
    tokenizer = byte_level()
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer.backend_tokenizer, name)

        def encode_batch_fast(self, lines):
            seen.extend(lines)
            return tokenizer.backend_tokenizer.encode_batch_fast(lines)

    class Outer:
        backend_tokenizer, added_tokens_decoder = Counting(), tokenizer.added_tokens_decoder

    encode_all(Outer(), [f"the cat sat.\nthe dog said: {i}" for i in range(10)])
    assert len(seen) == 11
    # white space in front of a line that begins with a word
    encode_all(Outer(), [f"the cat sat. \nthe dog said: {i}" for i in range(10)])
    assert len(seen) == 2 * 11


def test_what_stands_alone_has_the_same_tokens_behind_any_text():
    tokenizer = byte_level()
    some = [x for x in texts(1500) if x and not x[-1].isspace()]
    behind = [x for x in (" " + x for x in texts(1500)) if stands_alone(x)]
    pairs = list(zip(some, behind, strict=False))
    assert len(pairs) > 500
    ids = encode_all(tokenizer, [x for pair in pairs for x in (*pair, "".join(pair))])
    for before, after in pairs:
        assert ids[before + after].tolist() == [*ids[before], *ids[after]]
    assert not any(map(stands_alone, ("", " ", "  a", "a", "\na", " \n")))


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(before=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(before=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        byte_level(
            behind=processors.TemplateProcessing(
                single="<|end|> $A", special_tokens=[("<|end|>", 0)]
            )
        ),
        byte_level(added=("<|end|>", "the")),
    ],
    ids=["a space in front", "no pattern", "begin of text", "an added word"],
)
def test_tokenizers_that_see_across_lines_get_whole_texts(tokenizer):
    assert not splits_at_newlines(tokenizer)
    some = texts(200)
    found = encode_all(tokenizer, some)
    assert [ids.tolist() for ids in found.values()] == tokenizer(list(found))["input_ids"]


def test_special_tokens_are_left_to_the_caller():
    behind = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer = byte_level(behind=behind)
    with_begin = encode_all(tokenizer, ["the cat"])["the cat"].tolist()
    without = encode_all(tokenizer, ["the cat"], add_special_tokens=False)["the cat"].tolist()
    assert with_begin == [0, *without]
