"""The harness's model interface on top of the prefix tree. Importing it loads lm-eval."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from h3lm.errors import UserError
from h3lm.evals.encoding import encode_all, splits_at_newlines, stands_alone
from h3lm.evals.journal import Journal
from h3lm.evals.prefix_tree import Ints, Request
from h3lm.evals.scorer import Answer, Limits, TreeScorer, Work

Progress = Callable[[int, int, Work], None]


class TreeLM(HFLM):
    """The harness's `hf` model, with log-likelihoods from a prefix tree.

    What a request is made of (tokens, begin of text, truncation from the left) is the harness's;
    only how its log-likelihood is computed differs.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        max_length: Longest input in tokens; the harness's own choice if None: what the model's
            configuration or the tokenizer says, else 2048.
        limits: Memory of the tree.
        journal: Answers that are known already, and where new ones go.
        progress: Called with the number of requests answered, of all, and the work so far.
        state_cost_tokens: See `PrefixTree`; as the limits say if None.

    Raises:
        UserError: if the tokenizer has no token to begin with, or the cache of the model cannot
            be branched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int | None = None,
        limits: Limits | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
        state_cost_tokens: int | None = None,
    ) -> None:
        check_begin_token(tokenizer)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length
        )
        self.scorer = TreeScorer(model, limits=limits, state_cost_tokens=state_cost_tokens)
        self.journal, self.progress = journal, progress
        self.truncated = 0

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Answer the harness's (context, continuation) requests."""
        with _little_to_collect():
            return self.answer(self.encode([request.args for request in requests]))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # what the harness's rolling log-likelihood calls
        return self.answer([Request(context, asked) for _, context, asked in requests])

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Tokens of (context, continuation) pairs, as the harness's `_encode_pair` makes them.

        The harness tokenises one text at a time, and a context once for each of its
        continuations; here equal texts are tokenised once and all of them together, continuations
        by themselves where that makes the same tokens.
        """
        moved = [_spaces_to_continuation(*pair) for pair in pairs]
        alone = splits_at_newlines(self.tokenizer)
        texts = dict.fromkeys(context for context, _ in moved if context)
        behind = dict[str, Ints]()
        if alone:
            behind = encode_all(self.tokenizer, (x for c, x in moved if c and stands_alone(x)))
        texts |= dict.fromkeys(c + x for c, x in moved if c and x not in behind)
        ids = self._encode_all(texts)
        requests = []
        for context, asked in moved:
            if context:
                known = ids[context]
                own = behind.get(asked)
                rest = ids[context + asked][len(known) :] if own is None else own
                requests.append(Request(known, rest))
                continue
            first = self.tok_encode(asked, add_special_tokens=False)
            begin = self.prefix_token_id
            split = ([begin], first) if first[:1] != [begin] else (first[:1], first[1:])
            requests.append(Request(*split))
        return requests

    def answer(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Answer tokenised requests, those that the journal knows without running them."""
        fitting = self._fit(requests)
        if self.journal is None:
            keys, known = list[str](), dict[str, Answer]()
            places = list(range(len(fitting)))
        else:
            keys, known = [Journal.key(request) for request in fitting], self.journal.known
            places = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        done = len(fitting) - len(places)

        def finished(numbers: Sequence[int], answers: Sequence[Answer]) -> None:
            nonlocal done
            done += len(numbers)
            if self.journal is not None:
                self.journal.add([keys[places[i]] for i in numbers], answers)
            if self.progress is not None:
                self.progress(done, len(fitting), self.scorer.work)

        answers = self.scorer.score(
            [fitting[i] for i in places],
            finished=None if self.journal is None and self.progress is None else finished,
        )
        if self.journal is not None:
            answers = [known[key] for key in keys]
        return [(answer.log_likelihood, answer.is_greedy) for answer in answers]

    def _fit(self, requests: Sequence[Request]) -> list[Request]:
        """Cut contexts from the left to what the model takes, as the harness does."""
        learned, longest = _learned_positions(self.config), int(self.max_length)
        if 0 < (self._max_length or 0) <= learned:
            learned = 0  # asked for: contexts are cut
        return [self._cut(request, longest, learned) for request in requests]

    def _cut(self, request: Request, longest: int, learned: int) -> Request:
        inputs = len(request.context) + len(request.continuation) - 1
        if learned and inputs > learned:
            raise UserError(
                f"a request has {inputs:,} tokens, the model {learned:,} learned positions: ask "
                f"for fewer few-shot examples, or cut contexts from the left with --max-length "
                f"{learned}"
            )
        too_long = inputs - longest
        if too_long <= 0:
            return request
        if len(request.context) <= too_long:
            raise UserError(
                f"a continuation of {len(request.continuation):,} tokens does not fit into the "
                f"{longest:,} that the model is given: see --max-length"
            )
        self.truncated += 1
        return Request(request.context[too_long:], request.continuation)

    def _encode_all(self, texts: Iterable[str]) -> dict[str, Ints]:
        begin = self.tokenizer.decode(self.prefix_token_id)
        encoded: dict[str, Ints] = {}
        for with_begin in (False, True):
            group = [text for text in texts if text.startswith(begin) == with_begin]
            special = {}
            if with_begin:
                special["add_special_tokens"] = False
            elif self.add_bos_token is not None:
                special["add_special_tokens"] = self.add_bos_token
            encoded |= encode_all(self.tokenizer, group, **special)
        return encoded


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """Leave what is there out of garbage collections: many requests cause many of them.

    With the harness loaded each takes a few tenths of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_begin_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """The harness needs a token in front of an empty context.

    Raises:
        UserError: if there is none.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has neither a begin nor an end of text, which the harness puts in "
            "front of an empty context: train with a tokenizer that has one"
        )


def _learned_positions(config: Any) -> int:
    for name in ("num_learned_positions", "n_positions"):
        if getattr(config, name, 0):
            return int(getattr(config, name))
    return 0


def _spaces_to_continuation(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to the first token behind it."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
