"""What can be said of `h3lm bench generate` without a GPU."""

from importlib.util import find_spec

import pytest
import torch

from h3lm.bench import generate
from h3lm.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        generate.run(tmp_path, print)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_committed_sizes_are_among_those_that_are_timed():
    from h3lm.bench import generate_tune as tune
    from h3lm.flashconv.kernels import step_triton as core
    from h3lm.layers import step_triton as step

    assert core.SIZE in tune.core_sizes(64)
    assert step.ATTEND in tune.attend_sizes()
    for rows, few in ((64, False), (1, True)):
        for name, kind in (("qkv", "whole"), ("up", "whole"), ("out", "square"), ("down", "deep")):
            assert step.SIZES[few, kind] in tune.product_sizes(rows, name)
    names = [case.name for case in tune.cases({"core", "product", "attend"})]
    assert len(names) == len(set(names)) == 15
