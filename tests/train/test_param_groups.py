import torch

from h3lm import H3Config, H3ForCausalLM
from h3lm.train.param_groups import describe_groups, parameter_groups

OWN_RATE = {"shift_ssm.B", "diagonal_ssm.B", "diagonal_ssm.log_dt"} | {
    f"diagonal_ssm.{name}" for name in ("log_neg_A_real", "A_imag")
}


def model(mixers="hybrid"):
    config = H3Config(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, d_state=8,
        mixers=mixers,
    )  # fmt: skip
    return H3ForCausalLM(config)


def groups_of(model, **changes):
    rates = {"learning_rate": 3e-3, "weight_decay": 0.1, "ssm_max_learning_rate": 1e-3}
    return parameter_groups(model, **(rates | changes))


def test_shift_b_diagonal_b_a_and_dt_have_their_own_rate_and_no_decay():
    common, own = groups_of(model())
    assert (common["lr"], common["weight_decay"]) == (3e-3, 0.1)
    assert (own["lr"], own["weight_decay"]) == (1e-3, 0.0)
    assert {".".join(name.split(".")[-2:]) for name in own["names"]} == OWN_RATE
    rest = " ".join(common["names"])
    for name in ("shift_ssm.C", "shift_ssm.D", "diagonal_ssm.C", "diagonal_ssm.D"):
        assert name in rest  # as in the paper's runs, with biases, norms and embeddings
    assert "bias" in rest


def test_the_ssm_rate_never_exceeds_the_common_one():
    common, own = groups_of(model(), learning_rate=2e-4)
    assert common["lr"] == own["lr"] == 2e-4


def test_every_trainable_parameter_is_in_one_group():
    h3 = model()
    h3.model.norm.weight.requires_grad_(False)
    found = [id(p) for group in groups_of(h3) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in h3.parameters() if p.requires_grad}
    (only,) = groups_of(model("attention"))
    assert torch.is_tensor(only["params"][0])


def test_the_table_names_what_is_treated_apart():
    table = describe_groups(groups_of(model())).splitlines()
    assert len(table) == 3
    assert table[1].endswith("all others")
    assert all(name in table[2] for name in OWN_RATE)
    assert "1.0e-03   0.00" in table[2]
