import itertools
import json
import math
import multiprocessing
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from h3lm.errors import UserError
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.synthetics import plots, unfinished
from h3lm.synthetics.ensemble import (
    Ensemble,
    Member,
    Recipe,
    Standing,
    _Trainer,
    sizes_on_a_gpu,
)
from h3lm.synthetics.fused_step import fuse
from h3lm.synthetics.fused_step import trace as trace_step
from h3lm.synthetics.prepare import prepared
from h3lm.synthetics.report import CURVE_POINTS, Report, Run
from h3lm.synthetics.run import (
    Job,
    Plan,
    _assemble,
    _place,
    live_line,
    model_config,
    plan,
    run,
    state_floats,
)
from h3lm.synthetics.settings import MIXERS_BY_DEFAULT, SETTINGS, Setting
from h3lm.synthetics.tasks import AssociativeRecall, MultiQueryRecall
from h3lm.synthetics.trace import trace

CPU = torch.device("cpu")
TASK = AssociativeRecall(vocab_size=10, length=8)
SMALL = Setting(
    TASK, Recipe(epochs=3), width=8, num_train=70, num_test=20, test_lengths=(8, 12),
    paper={"h3": 99.8},
)  # fmt: skip


def maker(mixer="h3", dropout=0.0, vocab_size=10):
    def make(seed):
        torch.manual_seed(seed)
        return H3ForCausalLM(
            H3Config(
                vocab_size=vocab_size,
                hidden_size=8,
                num_hidden_layers=2,
                num_attention_heads=1,
                mixers=mixer,
                d_state=8,
                embedding_dropout=dropout,
                initializer_range=0.2,
            )
        )

    return make


def member(seed=0, epochs=2, rate=4e-3, task=TASK, num_train=70, **options):
    data = task.dataset(seed, num_train=num_train, num_test=20)
    return Member(seed, Recipe(epochs=epochs, learning_rate=rate, **options), data)


def numbers(curve):
    return [number for look in curve for number in look]


def test_cosine_warms_up_from_1e_6_and_ends_at_a_tenth():
    rates = Recipe(schedule="cosine").rates(62_800, 5e-4)
    assert rates[0] == 1e-6
    assert rates[3140] == pytest.approx((1e-6 + 5e-4) / 2)
    # counted from step 0: after the warm-up the cosine has gone a tenth of its way
    assert rates[6280] == pytest.approx(5e-5 + 0.225e-3 * (1 + np.cos(0.1 * np.pi)))
    assert rates[31_400] == pytest.approx(2.75e-4)
    assert rates[-1] == pytest.approx(5e-5, rel=1e-6)


def test_linear_warms_up_from_0_and_ends_at_0():
    rates = Recipe(schedule="linear").rates(31_400, 5e-4)
    assert rates[0] == 0
    assert rates[1570] == pytest.approx(2.5e-4)
    assert rates.argmax() == 3140
    assert rates[17_270] == pytest.approx(2.5e-4)
    assert rates[-1] == pytest.approx(5e-4 / 28_260)


@pytest.mark.parametrize("mixer", ["h3", "s4d", "gss", "s4", "linear_attention", "attention"])
def test_models_side_by_side_train_as_each_alone(mixer):
    def members():
        return [member(seed, epochs=1, rate=r, num_train=40) for seed, r in ((0, 4e-3), (1, 1e-3))]

    together = members()
    Ensemble(maker(mixer), together, CPU).train()
    for one, other in zip(together, members(), strict=True):
        Ensemble(maker(mixer), [other], CPU).train()
        assert one.steps == other.steps == 2
        losses = [loss for _, loss, _ in one.curve]
        assert losses == pytest.approx([loss for _, loss, _ in other.curve], rel=1e-4)
        # outputs, not parameters: attention's key bias has no gradient but rounding, and Adam
        # makes a step of it
        inputs = torch.from_numpy(one.data.test.inputs)
        with torch.no_grad():
            assert torch.allclose(one.model(inputs).logits, other.model(inputs).logits, atol=1e-3)


def test_optimiser_is_adamw_with_the_hints_of_the_modules():
    one = member(0, epochs=2, rate=4e-3)
    ensemble = Ensemble(maker(), [one], CPU)
    reference = maker()(0).train()
    hints = {
        id(getattr(module, name)): hint
        for module in reference.modules()
        for name, hint in getattr(module, "training_hints", {}).items()
    }
    gentle = [p for p in reference.parameters() if id(p) in hints]
    common = [p for p in reference.parameters() if id(p) not in hints]
    assert len(gentle) == 2 * 5
    optimiser = torch.optim.AdamW(
        [{"params": common, "weight_decay": 0.1}, {"params": gentle, "weight_decay": 0.0}]
    )
    ensemble.train()
    train, shuffle = one.data.train, np.random.default_rng([0, 1])
    step, rates = 0, [one.recipe.rates(6, peak) for peak in (4e-3, 1e-3)]
    for _ in range(2):
        order = shuffle.permutation(70)
        for rows in (order[:32], order[32:64], order[64:]):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate[step]
            inputs, targets = (torch.from_numpy(x[rows]) for x in (train.inputs, train.targets))
            logits = reference(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    for a, b in zip(one.model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_model_stops_once_it_has_solved_the_task_while_others_go_on():
    # solved at the first look, after step 3; a tenth of 30 steps is left to it
    easy, hard = member(0, epochs=10, stop_at=0.0), member(1, epochs=3, stop_at=None)
    Ensemble(maker(), [easy, hard], CPU).train()
    assert (easy.steps, hard.steps) == (6, 9)
    assert [step for step, _, _ in easy.curve] == [3, 6]
    assert easy.solved
    assert not hard.solved
    alone = member(0, epochs=10, stop_at=0.0)
    Ensemble(maker(), [alone], CPU).train()
    for a, b in zip(easy.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_those_that_stop_leave_the_others_as_they_would_train_alone():
    def members():
        return [member(seed, epochs=epochs) for seed, epochs in ((0, 4), (1, 2), (2, 3))]

    together, looks = members(), []
    Ensemble(maker(), together, CPU).train(looks.append)
    assert [m.steps for m in together] == [12, 6, 9]
    assert all(m.finished for m in together)
    # who has left keeps what it had
    assert [len(look.accuracies) for look in looks] == [3] * 4
    assert len({look.losses[1] for look in looks[1:]}) == 1
    for one, other in zip(together, members(), strict=True):
        Ensemble(maker(), [other], CPU).train()
        assert one.test_loss == pytest.approx(other.test_loss, rel=1e-4)
        assert [a for _, _, a in one.curve] == [a for _, _, a in other.curve]
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_training_given_up_leaves_its_models_and_says_which_were_done():
    short, long = member(0, epochs=2), member(1, epochs=9)
    looks = iter([False] * 3 + [True])
    assert Ensemble(maker(), [short, long], CPU).train(stop=lambda: next(looks))
    assert (short.steps, short.finished) == (6, True)
    assert (long.steps, long.finished) == (9, False)
    assert long.model is not None
    assert long.test_loss > 0
    nothing = member(0)
    assert not Ensemble(maker(), [nothing], CPU).train(stop=lambda: True)
    assert nothing.model is None


def test_what_was_given_up_goes_on_as_if_it_had_not_been():
    def members():
        return [member(0, epochs=2), member(1, epochs=6), member(2, epochs=5, stop_at=0.05)]

    through, cut = members(), members()
    Ensemble(maker(), through, CPU).train()
    assert through[2].steps == 4  # solved at once, its rate falls for a step
    ensemble = Ensemble(maker(), cut, CPU)
    looks = iter([False] * 3 + [True])
    ensemble.train(stop=lambda: next(looks), looks_per_epoch=1)
    assert ensemble.unfinished == [1]
    assert ensemble.standing.step == 9
    rest = members()[1:2]
    again = Ensemble(maker(), rest, CPU)
    assert not again.train(stop=lambda: True, start=ensemble.standing)
    assert again.train(start=ensemble.standing)
    assert (rest[0].steps, rest[0].finished) == (18, True)
    assert numbers(rest[0].curve) == pytest.approx(numbers(through[1].curve), rel=1e-5)
    assert len(rest[0].curve) == 6
    assert again.standing is None
    for a, b in zip(rest[0].model.parameters(), through[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_fall_that_had_begun_and_half_an_epoch_are_gone_on_with():
    def one(**options):
        return [member(0, epochs=20, stop_at=0.05, **options)]

    through, cut, rest = one(), one(), one()
    Ensemble(maker(), through, CPU).train(looks_per_epoch=3)
    ensemble = Ensemble(maker(), cut, CPU)
    looks = iter([False] * 4 + [True])
    ensemble.train(stop=lambda: next(looks), looks_per_epoch=3)
    assert ensemble.standing.step == 4
    assert ensemble.standing.falls.isfinite().all()
    Ensemble(maker(), rest, CPU).train(looks_per_epoch=3, start=ensemble.standing)
    assert rest[0].steps == through[0].steps < 60
    assert numbers(rest[0].curve) == pytest.approx(numbers(through[0].curve), rel=1e-5)


@pytest.mark.parametrize("mixer", MIXERS_BY_DEFAULT)
def test_rows_far_longer_than_those_of_training_are_scored(mixer):
    ensemble = Ensemble(maker(mixer), [member(0), member(1)], CPU)
    tests = [TASK.dataset(i, num_train=70, num_test=20, test_length=80).test for i in (0, 1)]
    _, losses = ensemble.score(tests)
    for i, test in enumerate(tests):
        with torch.no_grad():
            logits = maker(mixer)(i).eval()(torch.from_numpy(test.inputs)).logits[:, -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.targets[:, -1]))
        assert losses[i] == pytest.approx(expected.item(), rel=1e-5)


def test_multi_query_loss_and_score_count_the_queries_only():
    task = MultiQueryRecall(vocab_size=40, length=32, num_pairs=4)
    one = member(0, epochs=1, task=task)
    ensemble = Ensemble(maker(vocab_size=40), [one], CPU)
    accuracies, losses = ensemble.score([one.data.test])
    test = one.data.test
    with torch.no_grad():
        logits = maker(vocab_size=40)(0).eval()(torch.from_numpy(test.inputs)).logits
    targets = torch.from_numpy(test.targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(-1) == targets)[targets != -100]
    assert accuracies[0] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("mixer", MIXERS_BY_DEFAULT)
def test_the_step_that_is_compiled_is_the_step(mixer):
    ensemble = Ensemble(maker(mixer, dropout=0.1), [member(0), member(1, rate=1e-3)], CPU)
    trainer = _Trainer(ensemble)
    trainer.run(1)
    given = (*trainer._tensors(), *trainer._dropout().values())
    traced, plain = ([x.clone() for x in given] for _ in range(2))
    step = trace_step(trainer._update, given)
    with torch.no_grad():
        for _ in range(3):
            step(*traced)
            trainer._update(*plain)
    assert not torch.equal(plain[0], given[0])
    for a, b in zip(traced[1:], plain[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    # attention's key bias has no gradient but rounding, and Adam makes a step of it
    told = plain[1].abs() > 1e-7
    assert told.float().mean() > 0.5
    assert torch.allclose(traced[0][told], plain[0][told], rtol=1e-4, atol=1e-5)


def test_a_step_that_does_not_compile_runs_as_it_is(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch._inductor, "standalone_compile", broken)
    x = torch.zeros(2)
    work = fuse(lambda x: x.add_(1), [x])
    assert "steps are not compiled: RuntimeError: no compiler" in caplog.text
    assert x.tolist() == [0, 0]
    work(x)
    assert x.tolist() == [1, 1]


@pytest.mark.slow
def test_steps_are_compiled_ahead_by_processes_and_one_that_fails_is_said(tmp_path, caplog):
    assert sizes_on_a_gpu(25) == [25, 13, 7]
    assert sizes_on_a_gpu(3) == [3]
    wanted = tuple(("recipe", seed, SMALL.recipe) for seed in range(9))
    fine, broken = (Job("recall", SMALL, m, wanted, "cpu", tmp_path) for m in ("h3", "h4"))
    assert len(_assemble(fine, 5)) == 5
    others = set(multiprocessing.active_children())
    with prepared([fine, broken], lambda job: len(job.wanted), _assemble) as ready:
        assert not ready(fine, 0.0)
        assert ready(fine, 60.0)
        assert not caplog.text
        assert ready(broken, 60.0)
        assert ready(replace(fine), 0.0)
    assert "not compiled ahead: UserError: unknown mixer 'h4'" in caplog.text
    started = set(multiprocessing.active_children()) - others
    end = time.monotonic() + 60
    # the pool waits for them, too: to the second who asks, one may seem alive for a moment
    while any(process.is_alive() for process in started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(process.is_alive() for process in started)


def test_several_steps_at_once_are_the_same_training(monkeypatch):
    monkeypatch.setattr("h3lm.synthetics.ensemble._AT_ONCE", 2)
    one, other = (_Trainer(Ensemble(maker(dropout=0.1), [member(0)], CPU)) for _ in range(2))
    taken = []

    def advance_many():
        taken.append(one.step)
        one._advance()
        one._advance()

    one.advance_many = advance_many
    for count in (3, 1, 4):  # three steps are an epoch
        assert one.run(count) == other.run(count)
    assert taken == [0, 4]
    assert one.run(5) == 0
    assert torch.equal(one.flat, other.flat)


def test_places_of_a_gpu_are_filled_by_models_that_have_stopped_and_stay(monkeypatch):
    # six of twelve stop after two epochs
    members = [member(i % 2, epochs=2 + i % 4 // 2) for i in range(12)]
    trainer = _Trainer(Ensemble(maker(), members, CPU))
    trainer.ensemble.stream = object()  # as on a GPU
    assert trainer._places() == 12
    monkeypatch.setattr(trainer, "_going_on", lambda: [True] * 6 + [False] * 6)
    assert trainer._places() == 6
    monkeypatch.undo()
    trainer.ensemble.stream = None
    trainer._places = lambda: 7  # a place more than is needed
    for _ in range(2):
        trainer.record(trainer.run(3))
    assert trainer.idle
    trainer.shrink()
    assert trainer.live == [0, 2, 3, 6, 7, 10, 11]
    before = trainer.flat.clone()
    trainer.record(trainer.run(3))
    assert trainer.done
    assert torch.equal(trainer.flat[0], before[0])
    assert all((m.steps, m.finished) == (3 * m.recipe.epochs, True) for m in members)
    assert not (trainer.flat[1:] == before[1:]).all(1).any()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    said = []
    chosen = Plan({"recall": SMALL}, ("h3", "attention"), seeds=(0, 1), search=True)
    run(chosen, folder, said.append, said.append)
    return folder, chosen, said


def test_report_holds_every_run_its_baselines_and_sizes(finished):
    folder, _, said = finished
    report = Report.open(folder)
    assert len(report.runs) == 2 * 2 * (1 + 4)
    assert {r.planned_steps for r in report.runs if r.kind == "recipe"} == {9}
    assert {r.planned_steps for r in report.runs if r.kind == "search"} == {18}
    assert all(len(r.curve) == r.planned_steps // 3 for r in report.runs)
    h3, attention = (next(r for r in report.runs if r.mixer == m) for m in ("h3", "attention"))
    assert set(h3.longer) == {"8", "12"}
    assert set(attention.longer) == {"8"}
    text = (folder / "report.md").read_text()
    assert re.search(r"^- \d{4}-\d\d-\d\d: recall by h3, attention on CPU, torch ", text, re.M)
    assert "| h3 | 99.8 |" in text
    assert "most frequent value of the row, by keys" in text
    assert "no positions there" in text
    assert text.count("most frequent value of the row, by keys") == 2  # under both tables
    assert any("step 9/18" in line for line in said)
    for name in ("accuracy", "curves", "lengths", "trace-recall"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_saved_model_is_an_ordinary_one_and_scores_what_the_report_says(finished):
    folder, _, _ = finished
    report = Report.open(folder)
    for mixer in ("h3", "attention"):
        model = H3ForCausalLM.from_pretrained(folder / "models" / f"recall-{mixer}").eval()
        scores = {}
        for seed in (0, 1):
            test = TASK.dataset(seed, num_train=70, num_test=20).test
            with torch.no_grad():
                logits = model(torch.from_numpy(test.inputs)).logits[:, -1]
            scores[seed] = (logits.argmax(-1).numpy() == test.targets[:, -1]).mean()
        runs = [r for r in report.runs if r.mixer == mixer]
        best = max(runs, key=lambda r: (r.accuracy, -r.test_loss))
        assert scores[best.seed] == pytest.approx(best.accuracy)


def test_what_was_run_is_not_run_again_and_more_seeds_are_added(finished):
    folder, chosen, _ = finished
    before = (folder / "report.json").read_text()
    said = []
    run(replace(chosen, seeds=(0,)), folder, said.append)
    assert (folder / "report.json").read_text() == before
    assert sum("already in" in line for line in said) == 2


def test_another_task_and_another_seed_are_added_to_the_folders_report(finished, tmp_path):
    _, chosen, _ = finished
    first = replace(chosen, mixers=("attention",), seeds=(0,), search=False)
    longer = replace(SMALL, task=AssociativeRecall(vocab_size=10, length=10), test_lengths=())
    run(first, tmp_path, lambda line: None)
    alone = Report.open(tmp_path).baselines["recall"]
    both = {"recall": SMALL, "longer": longer}
    run(replace(first, settings=both, seeds=(0, 1)), tmp_path, lambda line: None)
    report = Report.open(tmp_path)
    found = {(r.setting, r.seed) for r in report.runs}
    assert found == {("recall", 0), ("recall", 1), ("longer", 0), ("longer", 1)}
    assert len(report.runs) == 4
    assert report.settings() == ["recall", "longer"]
    text = (tmp_path / "report.md").read_text()
    assert "## recall\n" in text
    assert "## longer\n" in text
    # the rules that learn nothing are scored on the rows of both seeds now
    rules = [TASK.baselines(TASK.dataset(seed, num_train=70, num_test=20)) for seed in (0, 1)]
    for found, before, *same in zip(report.baselines["recall"], alone, *rules, strict=True):
        assert before["accuracy"] == same[0].accuracy
        assert found["accuracy"] == pytest.approx(np.mean([b.accuracy for b in same]))


def test_few_taps_are_a_mixer_of_their_own_in_report_and_picture(tmp_path):
    run(Plan({"recall": SMALL}, ("h3:1:3",), seeds=(0,)), tmp_path, lambda line: None)
    model = H3ForCausalLM.from_pretrained(tmp_path / "models" / "recall-h3-1-3")
    assert model.config.h3_num_taps == 3
    assert model.model.layers[0].mixer.shift_ssm.taps().shape == (8, 3)
    assert (tmp_path / "trace-recall-h3-1-3.png").exists()
    assert "| h3:1:3 | - |" in (tmp_path / "report.md").read_text()  # not the paper's model


def test_reports_of_several_folders_become_one_without_training(finished, tmp_path):
    folder, chosen, _ = finished
    one = replace(chosen, mixers=("attention",), seeds=(2,), search=False)
    run(one, tmp_path / "one", lambda line: None)
    said = []
    run(chosen, tmp_path / "all", said.append, minutes=0, others=[folder, tmp_path / "one", folder])
    merged, parts = (
        Report.open(tmp_path / "all"),
        [Report.open(folder), Report.open(tmp_path / "one")],
    )
    assert merged.runs == [run for part in parts for run in part.runs]
    assert (tmp_path / "all" / "accuracy.png").exists()
    assert set(merged.sizes) == {"recall h3", "recall attention"}
    with pytest.raises(UserError, match=r"cannot read .*none.report.json"):
        run(chosen, tmp_path / "all", others=[tmp_path / "none"])


@pytest.mark.slow
def test_what_the_time_cut_short_is_kept_and_marked_until_it_is_finished(tmp_path, monkeypatch):
    clock = itertools.count()  # a second for each look at it: five and a bit
    monkeypatch.setattr("h3lm.synthetics.run.time", SimpleNamespace(time=lambda: next(clock)))
    chosen = Plan({"recall": SMALL}, ("h3",), seeds=(0,), search=True)
    said = []
    run(chosen, tmp_path, said.append, minutes=0.09)
    assert any(line.startswith("not finished in 0.09 minutes: recall h3;") for line in said)
    report = Report.open(tmp_path)
    recipe, search = (report.select("recall", "h3", kind) for kind in ("recipe", "search"))
    assert all(r.finished and r.steps == r.planned_steps == 9 for r in recipe)
    assert all(not r.finished and r.steps == 12 < r.planned_steps for r in search)
    text = report.path.with_suffix(".md").read_text()
    (row,) = re.findall(r"^\| h3 \| 99.8 .*", text, re.M)
    assert "†" not in row.split("|")[3]
    assert "†" in row.split("|")[5]
    assert "† h3: 4 of 5 trainings were cut short by the time allowed, at step 12 of 18" in text

    assert "the same call goes on from there" in next(x for x in said if x.startswith("not fin"))
    (file,) = (tmp_path / "unfinished").iterdir()

    said.clear()
    more = replace(chosen, seeds=(0, 1))
    run(more, tmp_path, said.append, minutes=0.09)  # one look for seed 1
    assert "recall h3: 4 model(s) on cpu from step 12" in said
    assert "recall h3: 5 model(s) on cpu" in said
    (other,) = (tmp_path / "unfinished").iterdir()
    assert other != file

    said.clear()
    run(more, tmp_path, said.append)
    assert "recall h3: 5 model(s) on cpu from step 3" in said
    assert not any((tmp_path / "unfinished").iterdir())
    again = Report.open(tmp_path)
    assert len(again.runs) == 10
    assert all(r.finished for r in again.runs)
    assert "†" not in report.path.with_suffix(".md").read_text()
    again.merge(report)  # what was cut short does not replace what was finished
    assert all(r.finished for r in again.runs)
    report.merge(again)
    assert all(r.finished for r in report.runs)


def given_up_at_the_first_look(monkeypatch):
    clock = itertools.count()  # the fourth look at it, behind an epoch, is too late
    monkeypatch.setattr("h3lm.synthetics.run.time", SimpleNamespace(time=lambda: next(clock)))


QUICK = replace(SMALL, num_train=32, test_lengths=(), recipe=Recipe(epochs=4))


def test_a_call_for_fewer_models_leaves_the_others_where_they_stand(tmp_path, monkeypatch):
    chosen = Plan({"recall": QUICK}, ("s4d",), seeds=(0, 1, 2))
    given_up_at_the_first_look(monkeypatch)
    run(chosen, tmp_path, lambda line: None, minutes=0.04)
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    given_up_at_the_first_look(monkeypatch)
    run(replace(chosen, seeds=(0,)), tmp_path, lambda line: None, minutes=0.04)
    files = sorted((tmp_path / "unfinished").iterdir())
    assert [unfinished.step_of(file) for file in files] == [2, 1]
    monkeypatch.undo()
    run(replace(chosen, seeds=(2,)), tmp_path, lambda line: None)
    said = []
    run(chosen, tmp_path, said.append)
    assert said[:2] == [
        "recall s4d: 1 model(s) on cpu from step 2",
        "recall s4d: 1 model(s) on cpu from step 1",
    ]
    assert all(r.finished for r in Report.open(tmp_path).runs)
    assert not any((tmp_path / "unfinished").iterdir())


def test_what_fails_behind_a_training_leaves_it_where_it_stood(tmp_path, monkeypatch):
    chosen = Plan({"recall": QUICK}, ("s4d",), seeds=(0, 1))
    given_up_at_the_first_look(monkeypatch)
    run(chosen, tmp_path, lambda line: None, minutes=0.04)
    monkeypatch.undo()

    def fail(*_):
        raise MemoryError("no room")

    for place in ("run._score_longer", "run._outcome", "run.Report.write"):
        monkeypatch.setattr(f"h3lm.synthetics.{place}", fail)
        with pytest.raises(MemoryError):
            run(chosen, tmp_path, lambda line: None)
        monkeypatch.undo()
    said = []
    run(chosen, tmp_path, said.append)
    assert said[0] == "recall s4d: 2 model(s) on cpu from step 1"
    assert not any((tmp_path / "unfinished").iterdir())


def test_the_best_model_of_all_jobs_of_a_mixer_is_kept(tmp_path):
    job = Job("recall", SMALL, "h3", (), "cpu", tmp_path)
    told = [("good", True, 0.9), ("bad", True, 0.2), ("cut", False, 1.0), ("again", True, 0.9)]
    for (name, finished, accuracy), expected in zip(
        told, ("good", "good", "good", "again"), strict=True
    ):
        found = tmp_path / "models" / f".{name}"
        (found / "model").mkdir(parents=True)
        (found / "model" / "weights").write_text(name)
        stands = {"finished": finished, "accuracy": accuracy, "test_loss": 1.0}
        (found / "model" / "lab.json").write_text(json.dumps(stands))
        (found / "trace.png").write_text(name)
        _place(job, found)
        (left,) = (tmp_path / "models").iterdir()
        assert (left / "weights").read_text() == expected
        assert (tmp_path / "trace-recall.png").read_text() == expected
    (left / "lab.json").unlink()  # of an older version, or another's
    found = tmp_path / "models" / ".new"
    (found / "model").mkdir(parents=True)
    (found / "model" / "lab.json").write_text(json.dumps(stands | {"accuracy": 0.1}))
    _place(job, found)
    assert not (left / "weights").exists()


def test_a_file_that_trainings_cannot_go_on_from_is_refused(tmp_path):
    chosen = Plan({"recall": SMALL}, ("h3",), seeds=(0,))
    recipe = SMALL.recipe
    standing = Standing(3, [9], [[(3, 1.0, 0.0)]], *torch.zeros(3, 1, 5), torch.zeros(1, 1))
    models = [("recipe", 0, recipe)]
    written = unfinished.write(tmp_path, "recall", "h3", models, models, standing, None)
    assert not list((tmp_path / "unfinished").glob("*.pt"))
    unfinished.settle(written)
    with pytest.raises(UserError, match=r"recall-h3-recipe-0-0.0005-3.pt holds models of another"):
        run(chosen, tmp_path, lambda line: None)
    (file,) = (tmp_path / "unfinished").iterdir()
    for broken in (b"", b"nothing", file.read_bytes()[:-200]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"0.0005-3.pt is not of this lab: move it away"):
            run(chosen, tmp_path, lambda line: None)


def test_tables_say_where_seeds_are_fewer_and_stand_beside_the_papers(finished, tmp_path):
    report = Report.open(finished[0])
    report.runs = [r for r in report.runs if (r.mixer, r.kind, r.seed) != ("h3", "search", 1)]
    assert "Beside the paper" not in report.markdown()  # one task alone is a table already
    assert re.search(r"^\| h3 \| 99.8 \| .* \(1 of 2 seeds\) \|", report.markdown(), re.M)
    for found in [r for r in report.runs if r.mixer == "attention"]:
        report.add("induction", "attention", [replace(found, setting="induction")], {})
    (row,) = re.findall(r"^\| h3 \|.*", "\n".join(report._beside_the_paper()), re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "h3"
    assert cells[1] == "99.8"
    assert cells[3].endswith("(1 of 2 seeds)")
    assert cells[4:] == ["100.0", "-", "-"]


def test_a_rate_whose_accuracy_is_no_number_is_never_the_best(finished):
    report = Report.open(finished[0])
    for one in report.runs:
        one.accuracy = math.nan if one.learning_rate == 4e-3 else 0.5
    assert report.select("recall", "h3", "search")[0].learning_rate != 4e-3
    for one in report.runs:
        one.accuracy = math.nan
    assert len(report.select("recall", "h3", "search")) == 2


def test_a_model_that_diverged_is_said_and_never_the_best(finished, tmp_path):
    report = Report.open(finished[0])
    report.path = tmp_path / "report.json"
    for found in report.runs:
        found.accuracy = 0.5
        if (found.mixer, found.kind, found.learning_rate) == ("h3", "search", 1e-3):
            found.test_loss, found.curve = math.nan, [(3, math.nan, 0.5)]
        if (found.mixer, found.kind) == ("attention", "recipe"):
            found.test_loss = math.nan
    report.write()
    assert "NaN" not in report.path.read_text()
    again = Report.open(tmp_path)
    assert again.select("recall", "h3", "search")[0].learning_rate != 1e-3
    assert sum(math.isnan(r.test_loss) for r in again.runs) == 4
    again.runs = [r for r in again.runs if r.kind == "recipe"]
    assert "some diverged" in again.markdown()


def test_long_curves_are_thinned_where_they_are_written(finished):
    one = Report.open(finished[0]).runs[0]
    one.curve = [(step, 1 / step, 0.5) for step in range(1, 400)]
    again = Run.from_json(json.loads(one.to_json()))
    assert 20 <= len(again.curve) <= CURVE_POINTS
    assert again.curve[-1] == (399, 0.0025, 0.5)
    assert Run.from_json(json.loads(again.to_json())) == again


@pytest.mark.slow
def test_processes_side_by_side_train_the_same(finished, tmp_path):
    _, chosen, _ = finished
    two = replace(chosen, seeds=(0,), search=False)
    for folder, workers in (("one", 1), ("two", 2)):
        run(two, tmp_path / folder, lambda line: None, workers=workers)
    one, other = (Report.open(tmp_path / folder).runs for folder in ("one", "two"))
    assert sorted(map(repr, one)) == sorted(map(repr, other))


def test_rates_a_row_apart_are_told_apart_by_their_loss(finished):
    report = Report.open(finished[0])
    found = {5e-4: (0.990, 0.01), 1e-3: (0.998, 0.05), 2e-3: (0.9965, 0.03), 4e-3: (0.997, 0.02)}
    for one in report.runs:
        one.accuracy, one.test_loss = found[one.learning_rate]
    assert report.select("recall", "h3", "search")[0].learning_rate == 4e-3
    for one in report.runs:
        one.finished = one.learning_rate != 4e-3
    assert report.select("recall", "h3", "search")[0].learning_rate == 2e-3


def test_best_of_the_search_is_one_rate_for_all_seeds(finished):
    report = Report.open(finished[0])
    runs = report.select("recall", "h3", "search")
    assert [r.seed for r in runs] == [0, 1]
    assert len({r.learning_rate for r in runs}) == 1
    means = {
        rate: np.mean([r.accuracy for r in report.runs
                       if (r.mixer, r.kind, r.learning_rate) == ("h3", "search", rate)])
        for rate in (5e-4, 1e-3, 2e-3, 4e-3)
    }  # fmt: skip
    assert np.mean([r.accuracy for r in runs]) >= max(means.values()) - 0.0021


def test_trace_is_what_the_layers_compute():
    model, data = maker()(0).eval(), TASK.dataset(0, num_train=70, num_test=20)
    found = trace(model, data, row=3)
    assert found.tokens == [TASK.tokens[i] for i in data.test.inputs[3]]
    assert found.probabilities.sum().item() == pytest.approx(1)
    assert len(found.layers) == 2
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        core = model.model
        u = core.layers[0].norm1(core.embed_tokens(torch.from_numpy(data.test.inputs[3:4])))
        expected, _ = mixer(u)
        assert torch.allclose(mixer.output_proj(found.layers[0].o.T), expected[0], atol=1e-5)
    # a channel's worth is what the answer loses where the output projection does not read it
    answer = data.test.targets[3, -1]

    def log_odds():
        with torch.no_grad():
            p = model(torch.from_numpy(data.test.inputs[3:4])).logits[0, -1].softmax(-1)[answer]
        return torch.log(p / (1 - p)).item()

    whole, weight = log_odds(), mixer.output_proj.weight
    for channel in range(8):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, channel] = 0
        assert found.layers[0].worth[channel].item() == pytest.approx(whole - log_odds(), abs=1e-4)
        with torch.no_grad():
            weight.copy_(kept)
    with pytest.raises(UserError, match="only H3 layers"):
        trace(maker("s4d")(0), data)


def test_state_sizes_are_the_formulas():
    for mixer, floats in {
        "h3": 2 * (32 * 63 + 64 * 32),
        "h3:2": 2 * (32 * 63 + 64 * 32 * 2),
        "h3:1:8": 2 * (32 * 7 + 64 * 32),
        "s4d": 2 * 64 * 32,
        "s4": 2 * 64 * 32,
        "gss": 2 * 2 * 64 * 8,
        "linear_attention": 2 * 32 * 33,
        "attention": 2 * 2 * 20 * 32,
        "hybrid": (32 * 63 + 64 * 32) + 2 * 20 * 32,
    }.items():
        model = H3ForCausalLM(model_config(mixer, SETTINGS["recall"]))
        assert state_floats(model, 20) == floats, mixer


def test_paper_settings():
    assert SETTINGS["induction"].recipe.epochs * 157 == 62_800
    assert SETTINGS["recall"].recipe.epochs * 157 == 31_400
    assert SETTINGS["recall-v20"].recipe.epochs * 157 == 62_800
    config = model_config("attention", SETTINGS["recall"])
    assert (config.num_learned_positions, config.num_attention_heads) == (22, 1)
    assert model_config("h3+attention", SETTINGS["recall"]).mixers == ["h3", "attention"]
    assert model_config("gss-hybrid", SETTINGS["recall"]).mixers == ["gss", "attention"]
    for mixer in ("h3:4:8+s4d", "h3:4:8+h3:4:8"):
        config = model_config(mixer, SETTINGS["recall"])
        assert (config.h3_head_dim, config.h3_num_taps) == (4, 8)


@pytest.mark.parametrize(
    ("tasks", "mixers", "options", "words"),
    [
        (["recal"], ["h3"], {}, "unknown task 'recal': did you mean 'recall'?"),
        (["recall"], ["attenton"], {}, "unknown mixer 'attenton': did you mean 'attention'?"),
        (["recall"], ["h3+s4d+h3"], {}, "mixers names 3 layers, num_hidden_layers is 2"),
        (["recall"], ["h3:5"], {}, "h3_head_dim=5 must divide hidden_size=32"),
        (["recall"], ["s4d:2"], {}, "a number of channels goes with h3"),
        (["recall"], ["h3:1:8:2"], {}, "channels of a head and taps are all there is"),
        (["recall"], ["h3:1:0"], {}, "h3_num_taps=0 must be positive"),
        (["recall"], ["h3:0"], {}, "h3_head_dim=0 must divide hidden_size=32"),
        (["recall"], ["h3+h3:2"], {}, "the H3 layers of a model share their sizes"),
        (["recall"], ["s4d-bidirectional"], {}, "does not fit a causal model"),
        (["recall"], ["h3"], {"vocab_size": 3}, "too small for recall"),
        (["recall"], ["h3"], {"length": 1}, "cannot hold a pair"),
        (["recall"], ["h3"], {"num_pairs": 4}, "unknown option of recall 'num_pairs'"),
        (["mqar-4"], ["h3"], {"num_pairs": 5000}, "5000 pairs need as many keys"),
        (["mqar-4"], ["h3"], {"num_pairs": 17}, "cannot hold 17 pairs"),
        (["recall"], ["h3"], {"num_train": 0}, "num_train=0 must be positive"),
        (["recall"], ["h3"], {"seeds": 0}, "seeds=0"),
        (["recall"], ["h3"], {"learning_rate": 0.0}, "learning_rate=0.0"),
        (["recall"], ["h3"], {"learning_rate": math.inf}, "learning_rate=inf"),
        (["recall"], ["h3"], {"max_steps": 0}, "max_steps=0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_in_one_line(tasks, mixers, options, words):
    with pytest.raises(UserError) as caught:
        plan(tasks, mixers, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_task_options_make_a_setting_of_their_own():
    chosen = plan(["mqar-4"], ["h3:2"], vocab_size=64, length=32, num_pairs=8, max_steps=100)
    ((name, setting),) = chosen.settings.items()
    assert name == "mqar-4-v64-l32-k8"
    assert plots._pairs_of(name) == 8
    assert plots._pairs_of("mqar-16-rows100") == 16
    assert setting.task == MultiQueryRecall(vocab_size=64, length=32, num_pairs=8)
    ((name, setting),) = plan(["recall"], ["h3"], num_train=100, num_test=20).settings.items()
    assert name == "recall-rows100-tests20"
    assert (setting.num_train, setting.num_test) == (100, 20)
    assert replace(SETTINGS["recall"], num_train=100, num_test=20, paper={}) == setting
    assert plan(["recall"], ["h3"], length=30).settings["recall-l30"].test_lengths == (30, 60, 120)


def test_models_that_do_not_stop_early_have_a_setting_of_their_own(tmp_path):
    chosen = plan(["recall"], ["h3"], early_stop=False)
    ((name, setting),) = chosen.settings.items()
    assert name == "recall-to-the-end"
    assert setting.recipe.stop_at is None
    assert replace(setting, recipe=replace(setting.recipe, stop_at=1.0)) == SETTINGS["recall"]
    small = replace(SMALL, recipe=Recipe(epochs=1, stop_at=None))
    run(Plan({name: small}, ("h3",), seeds=(0,)), tmp_path, lambda line: None)
    assert "| h3 | 99.8 |" in (tmp_path / "report.md").read_text()  # the paper's figure


def test_folder_and_device_are_checked(tmp_path):
    chosen = Plan({"recall": SMALL}, ("h3",))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run(chosen, tmp_path / "file" / "below")
    (tmp_path / "report.json").write_text(json.dumps({"runs": 3}))
    with pytest.raises(UserError, match="not a report of this lab"):
        run(chosen, tmp_path)
    with pytest.raises(UserError, match="there is no device 'abacus'"):
        run(replace(chosen, device="abacus"), tmp_path / "other")


def test_live_line_prints_seldom_where_there_is_no_terminal(capsys):
    say, progress = live_line(interval_s=1000)
    progress("one")
    progress("two")
    say("three")
    assert capsys.readouterr().out == "one\nthree\n"


@pytest.fixture
def not_compiled(monkeypatch):
    """Steps are captured as they are: to compile takes half a minute."""
    monkeypatch.setattr("h3lm.synthetics.ensemble.fuse", lambda work, tensors: work)
    monkeypatch.setattr(
        "h3lm.synthetics.run.prepared", lambda *_: nullcontext(lambda job, seconds: True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["h3", "s4d", "gss", "s4", "linear_attention", "attention"])
def test_captured_steps_on_a_gpu_train_as_steps_on_the_cpu(mixer, not_compiled):
    def members():
        # the first leaves, and what is left is captured anew
        return [member(seed, epochs=2 + seed, rate=r) for seed, r in ((0, 4e-3), (1, 1e-3))]

    captured, plain = members(), members()
    Ensemble(maker(mixer), captured, torch.device("cuda")).train()
    Ensemble(maker(mixer), plain, CPU).train()
    for one, other in zip(captured, plain, strict=True):
        assert [step for step, _, _ in one.curve] == [step for step, _, _ in other.curve]
        losses = [loss for _, loss, _ in one.curve]
        assert losses == pytest.approx([loss for _, loss, _ in other.curve], rel=1e-3)


@pytest.mark.gpu
def test_what_was_given_up_goes_on_on_a_gpu(not_compiled):
    def members():
        return [member(seed, epochs=6, stop_at=None) for seed in (0, 1)]

    cuda, through, cut, rest = torch.device("cuda"), members(), members(), members()
    Ensemble(maker(), through, cuda).train()
    ensemble = Ensemble(maker(), cut, cuda)
    looks = iter([False] * 2 + [True])
    ensemble.train(stop=lambda: next(looks))
    assert ensemble.standing.step == 6
    Ensemble(maker(), rest, cuda).train(start=ensemble.standing)
    for one, other in zip(rest, through, strict=True):
        assert numbers(one.curve) == pytest.approx(numbers(other.curve), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["h3", "s4"])
def test_compiled_steps_are_the_plain_ones_on_a_gpu(mixer):
    ensemble = Ensemble(maker(mixer, dropout=0.1), [member(0), member(1)], torch.device("cuda"))
    with ensemble.on_stream(), torch.no_grad():
        trainer = _Trainer(ensemble)
        assert trainer.update != trainer._update
        given = (*trainer._tensors(), *trainer._dropout().values())
        fused, plain = ([x.clone() for x in given] for _ in range(2))
        for _ in range(3):
            trainer.update(*fused)
            trainer._update(*plain)
        for a, b in zip(fused[1:], plain[1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_dropout_differs_between_captured_steps_and_between_models(not_compiled):
    # the same rows and start for both models: only their dropout can part them
    same = [member(0, epochs=2), member(0, epochs=2)]
    Ensemble(maker(dropout=0.5), same, torch.device("cuda")).train()
    first, second = ([loss for _, loss, _ in m.curve] for m in same)
    assert first != second


@pytest.mark.gpu
def test_jobs_side_by_side_on_gpus_train_as_each_alone(tmp_path, not_compiled):
    setting = replace(SMALL, recipe=Recipe(epochs=6))
    mixers = ("h3", "s4d", "attention", "gss")
    together = Plan({"recall": setting}, mixers, seeds=(0, 1), search=True, device="cuda")
    run(together, tmp_path / "together", lambda line: None, workers=len(mixers))
    for mixer in mixers:
        run(replace(together, mixers=(mixer,), device="cuda:0"), tmp_path / "alone", workers=1)
    one, other = (Report.open(tmp_path / folder).runs for folder in ("together", "alone"))
    assert sorted(map(repr, one)) == sorted(map(repr, other))
