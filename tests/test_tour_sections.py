"""The tour's measurements, at sizes that take seconds."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn

import modeprobe as mp
from modeprobe.tour import batch_norm, dropout
from modeprobe.tour.section import Missing, interleaved, listed, missing

pytestmark = pytest.mark.rung("reference")

SMALL = dropout.Settings(elements=2**16, speed_elements=(2**10,), speed_seconds=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other, for minutes where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dropout_result():
    torch.manual_seed(0)
    return dropout.compute(SMALL)


@pytest.mark.parametrize("p", SMALL.p)
def test_both_conventions_keep_the_mean(dropout_result, p):
    by = {row.scaling: row for row in dropout_result.means if row.p == p}
    sigma = math.sqrt(p * (1 - p) / SMALL.elements)
    assert by["inverted"].evaluation == 1
    assert by["classic"].evaluation == pytest.approx(1 - p, abs=1e-6)
    assert by["inverted"].training == pytest.approx(1, abs=5 * sigma / (1 - p))
    assert by["classic"].training == pytest.approx(1 - p, abs=5 * sigma)


def test_the_contract_holds_on_every_backend_that_works_here(dropout_result):
    usable = {b.name for b in mp.info().backends if b.device == "cpu" and b.usable and b.name != "triton"}
    on_cpu = {check.backend for check in dropout_result.checks if " on " not in check.backend}
    assert on_cpu == usable
    assert all(check.passed for check in dropout_result.checks)
    assert f"All {len(dropout_result.checks)} checks" in dropout_result.answer


def test_a_broken_kernel_would_be_seen(monkeypatch):
    honest = dropout.functional.dropout

    def one_lane_late(x, p, *, key, offset):
        return honest(x, p, key=key, offset=offset + 1)

    monkeypatch.setattr(dropout.functional, "dropout", one_lane_late)
    failed = [check.what for check in dropout.check_contract() if not check.passed]
    assert any("mask of key" in what for what in failed)
    assert any("2^35" in what for what in failed)


def test_every_work_is_timed(dropout_result):
    (speed,) = dropout_result.speeds
    assert speed.elements == 2**10
    assert set(speed.seconds) == set(dropout.WORKS)
    assert all(seconds > 0 for seconds in speed.seconds.values())


def test_works_take_turns_and_change_neighbours():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, 2, at_least=3)
    assert calls == ["b", "b", "a", "a", "a", "a", "b", "b"] * 2  # the first of the four warms up
    assert set(times) == {"a", "b"}


def test_words():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert missing({"torch": "torch"}) is None
    absent = missing({"not_there": "not-there", "torch": "torch"})
    assert absent == Missing(("not-there",))
    assert absent.message == "not-there is not installed. Run: pip install 'modeprobe[tour]'"


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; run: pip install scikit-learn")
    return batch_norm.digits(0.8)


@pytest.fixture(scope="module")
def digits_result(data):
    return batch_norm.compute(batch_norm.Settings(epochs=2, early=(5,)))


def test_digits_are_split_once_and_for_all(data):
    images, labels, test_images, test_labels = data
    assert images.shape == (1438, 1, 8, 8)
    assert test_images.shape == (359, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert set(test_labels.tolist()) == set(labels.tolist()) == set(range(10))


def test_a_full_pass_is_the_population(data):
    """The first layer's input depends on no other BatchNorm: its statistics can be had by hand."""
    model = batch_norm.network()
    mp.swap(model)
    images = data[0]
    before = copy.deepcopy(model.state_dict())
    full = batch_norm.with_full_pass(model, images)
    variance, mean = torch.var_mean(model[0].double()(images.double()), dim=(0, 2, 3))
    torch.testing.assert_close(full[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full[1].running_var.double(), variance, rtol=1e-5, atol=0)
    assert not any(module.training for module in full.modules())
    assert all(torch.equal(model.float().state_dict()[key], value) for key, value in before.items())
    assert model.training


def test_evaluation_changes_no_statistics(data):
    model = batch_norm.network()
    before = copy.deepcopy(model.state_dict())
    found = batch_norm.accuracies(model, data, 64)
    assert list(found) == list(batch_norm.SOURCES)
    assert all(0 <= value <= 1 for value in found.values())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_the_average_forgets_its_start_as_the_formula_says(data, digits_result):
    approach = digits_result.approach
    assert approach.momentum == 0.1
    assert len(approach.frozen) == digits_result.steps
    for step in (2, 5, 10):
        assert approach.frozen[step - 1] / approach.frozen[0] == pytest.approx(0.9 ** (step - 1), rel=0.15)
    assert approach.frozen[-1] < 0.05 * approach.frozen[0]


def test_every_source_is_tried_at_every_step(digits_result):
    assert digits_result.steps == 46
    for run in digits_result.runs.values():
        assert sorted(run.accuracy) == [5, 46]
        assert all(set(row) == set(batch_norm.SOURCES) for row in run.accuracy.values())
        assert run.seconds > 0
    late = digits_result.runs["modeprobe"].accuracy[46]
    early = digits_result.runs["modeprobe"].accuracy[5]
    assert late["full pass"] > 0.8
    # After five steps the average still is 59 percent its start: worse than what the weights can do.
    assert early["full pass"] - early["moving average"] > 0.1
    assert "moving average" in digits_result.answer


def test_both_networks_start_from_the_same_weights(data):
    seen = []
    settings = batch_norm.Settings(epochs=1, batch=1438, early=())
    runs, steps = batch_norm.train_both(settings, data, lambda step, model: seen.append(step), lambda: None)
    assert (steps, seen) == (1, [1])
    torchs, ours = (run.model for run in runs.values())
    assert type(torchs[1]) is nn.BatchNorm2d
    # One full-batch step of Adam from the same start, up to the dropout in front of the last layer.
    torch.testing.assert_close(torchs[1].running_mean, ours[1].running_mean, rtol=1e-4, atol=1e-6)


def test_the_swapped_network_is_as_accurate_as_torchs(data):
    accuracy = {name: [] for name in batch_norm.VERSIONS}
    for seed in range(5):
        runs, steps = batch_norm.train_both(
            batch_norm.Settings(epochs=6, seed=seed, early=()), data, lambda *_: None, lambda: None
        )
        for name, run in runs.items():
            accuracy[name].append(run.accuracy[steps]["moving average"])
    means = {name: statistics.mean(values) for name, values in accuracy.items()}
    assert min(means.values()) > 0.95, accuracy
    assert abs(means["modeprobe"] - means["torch"]) <= 0.01, accuracy


MODELS = {
    "LLaMA": ("none", True),
    "LLaMA with attention_dropout=0.1": ("differs", False),
    "Mistral": ("none", True),
    "GPT-2": ("differs", True),
    "OPT": ("differs", False),
    "BERT": ("differs", True),
}


@pytest.fixture(scope="module")
def models_result():
    pytest.importorskip("transformers", reason="transformers is not installed; run: pip install transformers")
    from modeprobe.tour import language_models

    return language_models.compute()


@pytest.mark.parametrize("name", list(MODELS))
def test_what_eval_changes_and_what_counting_says(models_result, name):
    effect, shortcut_is_right = MODELS[name]
    (row,) = [row for row in models_result.rows if row.name == name]
    assert (row.effect, row.shortcut_is_right) == (effect, shortcut_is_right)
    assert row.verdict.endswith(".")
    assert row.verdict.count("\n") == 0
    if row.active:
        assert row.shortcut == f"{row.active} nn.Dropout modules with p > 0: eval() changes the outputs"
    else:
        assert row.shortcut == "no nn.Dropout module: eval() changes nothing"


def test_the_answer_names_where_counting_is_wrong(models_result):
    assert models_result.answer.endswith("wrong for LLaMA with attention_dropout=0.1 and OPT.")
    assert "nothing in LLaMA and Mistral;" in models_result.answer
