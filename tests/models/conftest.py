import pytest
import torch

from h3lm import H3Config, H3ForCausalLM

FAMILIES = {
    "hybrid": {"mixers": "hybrid"},
    "hybrid-head_dim-4": {"mixers": "hybrid", "h3_head_dim": 4},
    "h3": {"mixers": "h3", "h3_head_dim": 2},
    "attention": {"mixers": "attention", "rotary_dim": 8},
    "learned-positions": {"mixers": "hybrid", "num_learned_positions": 256},
}


def small_config(**fields):
    sizes = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 4, "d_state": 16}
    return H3Config(**(sizes | {"num_attention_heads": 4} | fields))


def small_model(**fields):
    torch.manual_seed(0)
    model = H3ForCausalLM(small_config(**fields))
    with torch.no_grad():  # the usual start is so small that every mistake hides behind the head
        for name, parameter in model.named_parameters():
            if "_ssm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return small_model(**FAMILIES[request.param])


@pytest.fixture
def ids():
    return torch.randint(0, 72, (2, 37))
