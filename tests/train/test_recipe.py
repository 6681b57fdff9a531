from dataclasses import asdict, fields

import pytest
import torch

from h3lm.errors import UserError
from h3lm.models import H3ForCausalLM
from h3lm.train.recipe import Recipe, explain, load_recipe, make_recipe, shipped_recipes
from h3lm.train.run import build_config


def test_unknown_keys_are_errors_that_name_the_nearest():
    with pytest.raises(UserError, match=r"unknown recipe key 'learningrate'.*'learning_rate'"):
        make_recipe({"steps": 1, "learningrate": 1e-3})
    with pytest.raises(UserError, match="no recipe 'demon'; did you mean 'demo'"):
        load_recipe("demon")
    with pytest.raises(UserError, match="unknown recipe key 'stepps'; did you mean 'steps'"):
        explain("stepps")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "epochs": 1.0}, "one way, .*: it has steps and epochs"),
        ({}, "it has none of them"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"steps": 1, "batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 must divide"),
        ({"steps": 1, "schedule": "sine"}, "'sine' is not one of cosine, linear, constant"),
        ({"steps": 1, "parallel": "tensor"}, "'tensor' is not one of ddp, fsdp"),
        ({"steps": 1, "compile": "all"}, "'all' is not one of blocks, model"),
        ({"steps": 1, "compile": True}, "compile=True must be str"),
        ({"steps": 1, "profile_steps": 0}, "profile_steps=0 must be positive"),
        ({"steps": 1, "learning_rate": "fast"}, "learning_rate='fast' must be float"),
        ({"steps": True}, "steps=True must be int"),
        ({"steps": 1, "name": None}, "name=None must be str"),
        ({"steps": 1, "model": "large"}, "model='large' must be dict"),
        ({"steps": 1, "eval_stride": 9, "block_length": 8}, "eval_stride=9 exceeds"),
        ({"steps": 1, "warmup_fraction": 1.5}, "warmup_fraction=1.5 must be from 0 to 1"),
        ({"steps": 1, "task": "classification", "keep_best": True}, "keep_best is for language"),
        ({"steps": 1, "save_every": 0}, "save_every=0 must be positive"),
        ({"steps": 1.5}, "steps=1.5 must be int"),
        ({"steps": "1e400"}, "steps=inf must be int"),
        ({"steps": 1, "learning_rate": float("inf")}, "learning_rate=inf must be a finite"),
        ({"steps": 1, "learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"steps": 1, "warmup_start": float("nan")}, "warmup_start=nan must be a finite"),
        ({"steps": 1, "beta2": 1.0}, "beta2=1.0 must be at least 0 and below 1"),
        ({"steps": 1, "beta1": -0.1}, "beta1=-0.1 must be at least 0 and below 1"),
        ({"steps": 1, "weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"steps": 1, "max_grad_norm": -1}, "max_grad_norm=-1.0 must not be negative"),
        ({"steps": 1, "seed": -1}, "seed=-1 must not be negative"),
        ({"steps": 1, "seed": 2**32}, "seed=4294967296 must be below"),
        (
            {"steps": 1, "warmup_fraction": 0.5, "decay_fraction": 0.4},
            "decay_fraction=0.4 ends the schedule before the warm-up does",
        ),
        ({"steps": 1, "init_from": "m", "preset": "125m"}, "no preset and no model"),
    ],
)
def test_contradictions_and_wrong_types_are_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        make_recipe(values)
    assert "\n" not in str(error.value)


def test_overrides_replace_values_and_fields_of_the_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 10\nlearning_rate: 6e-4\nmodel: {hidden_size: 32, d_state: 16}\n")
    recipe = load_recipe(str(path), ["learning_rate=3e-4", "model.d_state=8", "mixers=[h3, h3]"])
    assert recipe.name == "mine"
    assert recipe.learning_rate == 3e-4
    assert recipe.model == {"hidden_size": 32, "d_state": 8}
    assert recipe.mixers == ["h3", "h3"]
    assert load_recipe(str(path), ["epochs=2"]).steps is None
    text = load_recipe(str(path), ["sample=", "name=2024", "output_dir=no", 'task="language"'])
    assert (text.sample, text.name, text.output_dir, text.task) == ("", "2024", "no", "language")
    assert load_recipe(str(path), ["sample=Tell me: why"]).sample == "Tell me: why"
    assert load_recipe(str(path), ['sample="\\n"']).sample == "\n"
    assert load_recipe(str(path), ["sample=Item #1: "]).sample == "Item #1: "
    assert load_recipe(str(path), ["sample=&a hi"]).sample == "&a hi"
    path.write_text("steps: 10\n")
    assert load_recipe(str(path), ["init_from=2024"]).init_from == "2024"
    assert load_recipe(str(path), ["init_from=null"]).init_from is None
    assert load_recipe(str(path), ["steps=1e5"]).steps == 100_000
    with pytest.raises(UserError, match="it has steps and epochs"):
        load_recipe(str(path), ["epochs=2", "steps=3"])
    with pytest.raises(UserError, match="write an override as key=value"):
        load_recipe(str(path), ["steps"])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"steps: [1", "not YAML"),
        (b"- steps", "a recipe is a list of `key: value`"),
        (b"name: caf\xe9", "byte 9 is not UTF-8"),
    ],
)
def test_files_that_are_no_recipes_are_one_line(tmp_path, contents, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(str(tmp_path / "missing.yaml"))


def test_a_written_recipe_is_read_back_the_same(tmp_path):
    recipe = load_recipe("demo", ["seed=3", "eval_every=5"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe


def test_every_key_is_explained_with_type_default_and_meaning():
    lines = explain().splitlines()
    assert len(lines) == len(fields(Recipe))
    for line, field in zip(lines, fields(Recipe), strict=True):
        assert line.startswith(f"{field.name} (")
        assert line.endswith(field.metadata["meaning"])
    assert explain("block_length") == (
        "block_length (int, default 1024 tokens): length of a training example"
    )


FAMILIES = {"": "hybrid", "-h3": "h3", "-transformer": "attention"}
SMALL = ("wikitext2", "eltec", "eltec-bytes")
PAPERS = {  # paper: table of section 4, and the parameter counts of the release
    "125m": (6e-4, 256, 800_000),
    "355m": (3e-4, 256, 800_000),
    "1.3b": (2e-4, 512, 400_000),
    "2.7b": (1.6e-4, 512, 400_000),
}


def config_of(name):
    return build_config(load_recipe(name), 257 if "bytes" in name else 50257)


def parameters_of(name):
    with torch.device("meta"):
        return H3ForCausalLM(config_of(name)).num_parameters()


def test_recipes_are_shipped_for_each_text_and_size_in_three_families():
    expected = {name + end for name in (*SMALL, *PAPERS) for end in FAMILIES} | {"demo"}
    language = {n for n in shipped_recipes() if load_recipe(n).task == "language"}
    assert language == expected
    assert all(shipped_recipes().values())


@pytest.mark.parametrize("end", FAMILIES)
@pytest.mark.parametrize("name", [*SMALL, *PAPERS])
def test_shipped_recipes_differ_by_their_mixers_and_small_ones_by_their_rate(name, end):
    recipe, hybrid = load_recipe(name + end), load_recipe(name)
    assert recipe.mixers == FAMILIES[end]
    mixers = set(config_of(name + end).mixers)
    assert mixers == {"h3", "attention"} if not end else mixers == {FAMILIES[end]}
    differing = {k for k, v in asdict(recipe).items() if v != asdict(hybrid)[k]}
    searched = {"learning_rate"} if name in SMALL else set()
    assert differing <= {"name", "description", "mixers", "model"} | searched


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("end", FAMILIES)
def test_small_recipes_have_about_30_million_parameters(name, end):
    assert parameters_of(name + end) == pytest.approx(30e6, rel=0.05)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_have_the_papers_hyperparameters(name):
    recipe = load_recipe(name)
    rate, batch, steps = PAPERS[name]
    assert (recipe.learning_rate, recipe.batch_size, recipe.steps) == (rate, batch, steps)
    assert recipe.block_length == 2048
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay) == (0.9, 0.999, 0.1)
    assert (recipe.warmup_fraction, recipe.decay_fraction) == (0.01, 0.75)
    assert (recipe.floor_fraction, recipe.max_grad_norm, recipe.seed) == (0.1, 1.0, 2222)
    config = config_of(name)
    assert (config.embedding_dropout, config.residual_dropout) == (0.1, 0.0)
    assert config.attention_dropout == 0.1


@pytest.mark.parametrize("end", FAMILIES)
@pytest.mark.parametrize("name", [*SMALL, *PAPERS, "demo"])
def test_every_shipped_recipe_builds_its_model(name, end):
    if name != "demo":
        assert parameters_of(name + end) > 25e6
    assert load_recipe(name).description


def test_a_recipe_can_say_only_what_differs_from_its_base(tmp_path):
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("steps: 10\nbatch_size: 8\nmodel: {hidden_size: 32, d_state: 16}\n")
    mine.write_text(f"base: {base}\nepochs: 2\nmodel: {{d_state: 8}}\n")
    recipe = load_recipe(str(mine))
    assert (recipe.name, recipe.steps, recipe.epochs, recipe.batch_size) == ("mine", None, 2.0, 8)
    assert recipe.model == {"hidden_size": 32, "d_state": 8}
    base.write_text(f"base: {mine}\n")
    with pytest.raises(UserError, match="its base is itself"):
        load_recipe(str(mine))


def test_fields_of_the_model_that_do_not_exist_or_fit_are_one_line():
    with pytest.raises(UserError, match="H3Config has no field hiden_size"):
        build_config(make_recipe({"steps": 1, "model": {"hiden_size": 8}}), 100)
    with pytest.raises(UserError, match="no preset '3b'"):
        build_config(make_recipe({"steps": 1, "preset": "3b"}), 100)
    with pytest.raises(UserError, match="must divide"):
        build_config(make_recipe({"steps": 1, "model": {"num_attention_heads": 5}}), 100)
    config = build_config(make_recipe({"steps": 1}), 100)
    assert config.vocab_size == 104  # a multiple of 8


def test_data_in_place_of_sources_takes_their_weights_along(tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "steps: 1\nsources: {a: x, b: y}\nmixing: {a: 2.0, b: 1.0}\n"
    )
    recipe = load_recipe(str(tmp_path / "mix.yaml"), ["data=z"])
    assert (recipe.data, recipe.sources, recipe.mixing) == ("z", {}, {})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("hidden_size=x", "model.hidden_size='x' must be int"),
        ("hidden_size=32.5", r"model.hidden_size=32\.5 must be int"),
        ("vocab_size=null", "model.vocab_size=None must be int"),
        ("layer_norm_eps=abc", "model.layer_norm_eps='abc' must be float"),
        ("mixers=h3", "mixers: they are a key of the recipe, beside model"),
    ],
)
def test_fields_of_the_model_have_types(field, message):
    with pytest.raises(UserError, match=message):
        build_config(load_recipe("demo", [f"model.{field}"]), 64)


def test_fields_of_the_model_are_read_as_keys_are():
    config = build_config(load_recipe("demo", ["model.layer_norm_eps=1e-6"]), 64)
    assert config.layer_norm_eps == 1e-6  # of which YAML makes a string
