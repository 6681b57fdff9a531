"""SQuAD's exact match and F1 of an answer, where lm-eval's task definitions look for them.

They import these from a module of transformers that its version 5 has no more; ReCoRD's definition
does not load without.
Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1; in version 2 (arXiv 1806.03822) an
empty answer matches an empty one only.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

_PACKAGE = "transformers.data.metrics"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def compute_exact(a_gold: str, a_pred: str) -> int:
    """1 if two answers are the same after `normalize_answer`."""
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Harmonic mean of precision and recall of the words that two answers share."""
    gold, predicted = (normalize_answer(x).split() for x in (a_gold, a_pred))
    if not gold or not predicted:
        return float(gold == predicted)
    shared = (Counter(gold) & Counter(predicted)).total()
    return 2 * shared / (len(gold) + len(predicted))


@contextmanager
def where_the_harness_looks() -> Iterator[None]:
    """Let `transformers.data.metrics.squad_metrics` be found meanwhile, as it was in version 4."""
    if find_spec(_PACKAGE) is not None:
        yield
        return
    package, module = ModuleType(_PACKAGE), sys.modules[__name__]
    package.__dict__["squad_metrics"] = module
    made = {_PACKAGE: package, f"{_PACKAGE}.squad_metrics": module}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
