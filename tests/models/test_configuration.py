import pytest
import torch

from h3lm import H3Config, H3ForCausalLM

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
        with torch.device("meta"):
            model = H3ForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == expected


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
        ({"rotary_dim": 7}, "rotary_dim=7 must be even and at most 64"),
        ({"rotary_dim": 66}, "at most 64"),
        ({"vocab_size": 100, "tokenizer_vocab_size": 101}, "within vocab_size=100"),
    ],
)
def test_mistakes_are_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message):
        H3Config(**fields)


def test_unknown_presets_and_fields_are_refused():
    with pytest.raises(ValueError, match="no preset '7b', only 125m, 355m"):
        H3Config.from_preset("7b")
    with pytest.raises(ValueError, match="no field hiden_size"):
        H3Config.from_preset("125m", hiden_size=3)
