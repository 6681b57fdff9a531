import math

import pytest

from h3lm import H3ClassificationConfig, H3Config, H3ForCausalLM
from h3lm.models.presets import PRESETS, count_parameters

# paper.md 1.6, each confirmed on the authors' model class or by its formula
COUNTS = {
    "125m": (126_139_392, 124_835_712, 126_635_520, 125_071_104, 123_658_752),
    "355m": (361_058_304, 357_234_176, 361_719_808, 357_548_032, 353_781_760),
    "1.3b": (1_326_096_384, 1_318_448_128, 1_327_419_392, 1_319_075_840, 1_311_543_296),
    "2.7b": (2_671_134_720, 2_658_097_920, 2_672_788_480, 2_658_882_560, 2_646_328_320),
}


@pytest.mark.parametrize("size", COUNTS)
def test_presets_have_the_papers_parameter_counts(size):
    configs = (
        H3Config.from_preset(size, "hybrid"),
        H3Config.from_preset(size, "hybrid", h3_head_dim=8),
        H3Config.from_preset(size, "h3", h3_head_dim=1),
        H3Config.from_preset(size, "h3"),
        H3Config.from_preset(size, "attention"),
    )
    for config, expected in zip(configs, COUNTS[size], strict=True):
        assert count_parameters(config) == expected


def formula(size, mixers):
    """Parameters of the baselines in Table 3, by paper.md 1.6 and mixers.md 2.1 and 4."""
    d, n = PRESETS[size]["hidden_size"], PRESETS[size]["num_hidden_layers"]
    mlp, attention = 8 * d**2 + 7 * d, 4 * d**2 + 4 * d  # with the norm in front of the MLP
    h, f, modes = d // 4, 4 * d, 64
    gss = 9.25 * d**2 + (2 * f + h + d) + 2 * h + 2 * modes + 2 * h * modes + h
    s4d = d**2 + d + 2 * 32 + 2 * d * 32 + 2 * d  # one A, C and dt and a skip of each channel
    layers = {
        "s4d": n * (s4d + mlp),
        "gss": n * gss,
        "gss-hybrid": (n - 2) * gss + 2 * (attention + mlp),
    }
    return 50264 * d + 2 * d + n * 2 * d + layers[mixers]


@pytest.mark.parametrize("mixers", ["s4d", "gss", "gss-hybrid"])
def test_baselines_have_the_parameters_of_their_formulas(mixers):
    for size in PRESETS:
        assert count_parameters(H3Config.from_preset(size, mixers)) == formula(size, mixers)


def test_gss_layers_of_presets_have_no_mlp_and_attention_keeps_its_own():
    few = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}
    model = H3ForCausalLM(H3Config.from_preset("125m", "gss-hybrid", **few))
    assert [layer.mlp is None for layer in model.model.layers] == [True, False, True, False]
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mixer.gate_proj.weight" in names
    assert not any(
        name.startswith(("model.layers.0.mlp", "model.layers.0.norm2")) for name in names
    )
    with_mlp = H3Config.from_preset("125m", "gss-hybrid", gss_mlp=True, **few)
    assert all(layer.mlp is not None for layer in H3ForCausalLM(with_mlp).model.layers)
    bare = H3Config(intermediate_size=0, **few)
    assert all(layer.mlp is None for layer in H3ForCausalLM(bare).model.layers)


def test_without_an_mlp_the_mixers_output_starts_smaller_in_its_place():
    config = H3Config(
        hidden_size=64, num_hidden_layers=2, mixers="gss", gss_mlp=False, vocab_size=8
    )
    mixer = H3ForCausalLM(config).model.layers[0].mixer
    small, usual = (p.weight.std().item() for p in (mixer.output_proj, mixer.up_proj))
    assert small == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    assert usual == pytest.approx(0.02, rel=0.1)


def test_preset_details():
    assert H3Config.from_preset("2.7b").attention_layers == [10, 21]
    assert H3Config.from_preset("125m").attention_layers == [1, 7]
    assert H3Config.from_preset("355m").attention_layers == [1, 13]
    assert H3Config.from_preset("125m", "h3").h3_head_dim == 8
    assert H3Config.from_preset("125m", "attention").rotary_dim == 64
    hybrid = H3Config.from_preset("125m")
    assert (hybrid.rotary_dim, hybrid.vocab_size, hybrid.tokenizer_vocab_size) == (0, 50264, 50257)
    assert H3Config.from_preset("2.7b").initializer_range == pytest.approx(0.0125)
    other = H3Config.from_preset("125m", vocab_size=256)
    assert other.tokenizer_vocab_size is None
    assert other.eos_token_id is None


def test_words_become_lists_and_survive_saving(tmp_path):
    config = H3Config(num_hidden_layers=4, mixers="hybrid")
    assert config.mixers == ["h3", "attention", "h3", "attention"]
    assert config.layer_types == ["linear_attention", "full_attention"] * 2
    config.save_pretrained(tmp_path)
    assert H3Config.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert H3Config(num_hidden_layers=4, mixers="s4d-hybrid").mixers[:2] == ["s4d", "attention"]
    assert H3Config(num_hidden_layers=3, mixers="h3").attention_layers == []
    assert H3Config(num_hidden_layers=3, attention_layers=[2]).mixers == ["h3", "h3", "attention"]


def test_vocabulary_is_never_altered():
    assert H3Config(vocab_size=61).vocab_size == 61


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": "atention"}, "no mixer 'atention'.*did you mean 'attention'"),
        ({"h3_head_dim": 5}, "h3_head_dim=5 must divide hidden_size=768"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 must divide"),
        ({"attention_layers": [12]}, "attention_layers has 12, the model has layers 0 to 11"),
        ({"attention_layers": [-1]}, "attention_layers has -1"),
        ({"mixers": ["h3"] * 11}, "mixers names 11 layers, num_hidden_layers is 12"),
        ({"mixers": ["h3"] * 12, "attention_layers": [3]}, "contradicts mixers"),
        ({"mixers": "h3", "attention_layers": [3]}, "contradicts mixers"),
        ({"num_hidden_layers": 1}, "a hybrid needs at least 2 layers"),
        ({"d_state": 63}, "d_state=63 must be even"),
        ({"h3_num_taps": 0}, "h3_num_taps=0 must be positive"),
        ({"h3_head_dim": 0}, "h3_head_dim=0 must divide"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"hidden_size": -8}, "hidden_size=-8 must be positive"),
        ({"intermediate_size": -1}, "intermediate_size=-1 must not be negative"),
        ({"rotary_dim": 7}, "rotary_dim=7 must be even and at most 64"),
        ({"rotary_dim": 66}, "at most 64"),
        ({"bidirectional": True}, "does not fit a causal model"),
        ({"vocab_size": 100, "tokenizer_vocab_size": 101}, "within vocab_size=100"),
    ],
)
def test_mistakes_are_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message):
        H3Config(**fields)


def test_a_folder_may_say_null_for_no_learned_positions():
    assert not H3Config(num_learned_positions=None).num_learned_positions


def test_a_causal_model_refuses_a_classifiers_bidirectional_layers():
    config = H3ClassificationConfig(bidirectional=True, num_hidden_layers=2, mixers="s4d")
    with pytest.raises(ValueError, match="does not fit a causal model"):
        H3ForCausalLM(config)


def test_unknown_presets_and_fields_are_refused():
    with pytest.raises(ValueError, match="no preset '7b', only 125m, 355m"):
        H3Config.from_preset("7b")
    with pytest.raises(ValueError, match="no field hiden_size"):
        H3Config.from_preset("125m", hiden_size=3)
