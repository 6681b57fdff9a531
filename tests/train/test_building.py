import pytest
import torch

from h3lm.errors import UserError
from h3lm.layers.mixers import MIXERS
from h3lm.models import H3Config, H3ForCausalLM
from h3lm.models.folders import save_model
from h3lm.train.building import build_model, read_weights


def config(**changes) -> H3Config:
    given = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    given["mixers"] = "h3"
    return H3Config(**given | changes)


@pytest.mark.parametrize("mixers", [*MIXERS, "hybrid"])
def test_weights_are_drawn_from_the_distributions_of_the_model(mixers):
    torch.manual_seed(0)
    usual = H3ForCausalLM(config(mixers=mixers))
    torch.manual_seed(0)
    built = build_model(config(mixers=mixers))
    assert built.lm_head.weight is built.model.embed_tokens.weight
    expected, found = usual.state_dict(), built.state_dict()
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        other = found[name]
        assert (other.dtype, other.shape, other.device) == (one.dtype, one.shape, one.device)
        spread = 5 * float(one.std()) / one.numel() ** 0.5
        assert float(other.mean()) == pytest.approx(float(one.mean()), abs=spread + 1e-6), name
        # few numbers are common to all channels of S4D's C
        assert float(other.std()) == pytest.approx(float(one.std()), rel=0.7, abs=1e-6), name
    again = built.state_dict()
    torch.manual_seed(0)
    same = build_model(config(mixers=mixers)).state_dict()
    assert all(torch.equal(same[name], again[name]) for name in again)


def test_a_module_that_nothing_initialises_is_named(monkeypatch):
    monkeypatch.setattr(H3ForCausalLM, "_init_weights", lambda self, module: None)
    with pytest.raises(NotImplementedError, match=r"does not initialise model.embed_tokens.weight"):
        build_model(config())


def test_weights_that_are_not_the_models_are_named(tmp_path):
    save_model(build_model(config()), tmp_path / "model")
    again = build_model(config())
    read_weights(again, tmp_path / "model")
    usual = H3ForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(p, usual[n]) for n, p in again.state_dict().items())
    with pytest.raises(UserError, match=r"it lacks model\.layers\.3\.") as error:
        read_weights(build_model(config(num_hidden_layers=4)), tmp_path / "model")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"has model\.layers\.2\.\S+, which the model lacks"):
        read_weights(build_model(config(num_hidden_layers=2)), tmp_path / "model")
    with pytest.raises(UserError, match=r"of shape \[64, 64\], not \[72, 64\]"):
        read_weights(build_model(config(vocab_size=72)), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        read_weights(again, tmp_path / "model")
