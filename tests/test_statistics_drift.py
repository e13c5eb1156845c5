"""Drift's figures against the same computed by hand in float64, and its causes against made-up faults."""

import copy
import html
import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import modeprobe as mp
from modeprobe.statistics import DriftReport, LayerDrift, drift, recalibrate
from modeprobe.statistics.drift import initial_weight

pytestmark = pytest.mark.rung("reference")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_and_data(updates=200, size=32, spread=1.0):
    """Two layers, trained statistics on batches like those given back."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.BatchNorm1d(3))
    data = (torch.randn(updates, size, 5) * spread).unbind()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return model, list(data[:20])


def population(parts):
    values = torch.cat([part.detach().double().transpose(0, 1).flatten(1) for part in parts], 1)
    return values.mean(1), values.var(1)


def figures(layer, parts):
    mean, variance = population(parts)
    variance = variance + layer.eps
    running = layer.running_mean.double(), layer.running_var.double() + layer.eps
    shift, ratio = (running[0] - mean) / variance.sqrt(), (running[1] / variance).log()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(running[0], running[1].sqrt()),
    )
    return shift, ratio, kl


def near(a, b, **options):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **options)


def test_figures_by_hand():
    model, batches = model_and_data(updates=13)
    before = copy.deepcopy(model.state_dict())
    report = drift(model, batches, lower="running")
    evaluated = copy.deepcopy(model).eval()
    inputs = [[evaluated[:at](batch) for batch in batches] for at in (1, 4)]
    for row, layer, parts in zip(report.layers, (model[1], model[4]), inputs, strict=True):
        shift, ratio, kl = figures(layer, parts)
        near(row.shift, shift, rtol=1e-5, atol=1e-6)
        near(row.ratio, ratio, rtol=1e-5, atol=1e-6)
        near(row.divergence, kl, rtol=1e-4, atol=1e-7)
        near(row.mean_shift, shift.square().mean().sqrt(), rtol=1e-5, atol=0)
        near(row.mean_shift_max, shift.abs().max(), rtol=1e-5, atol=0)
        near(row.log_variance_ratio, ratio.square().mean().sqrt(), rtol=1e-5, atol=0)
        near(row.kl, kl.mean(), rtol=1e-4, atol=0)
        near(row.kl_max, kl.max(), rtol=1e-4, atol=0)
        near(row.size, (shift.square() + ratio.square() / 2).mean().sqrt(), rtol=1e-5, atol=0)
        assert row.worst[0] == int(kl.argmax())
        assert row.source == "moving average, 0.1"
        assert (row.updates, row.calls, row.values) == (13, 13, 416)
        near(row.initial_weight, 0.9**13)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(module.training for module in model.modules())


def test_batch_population_is_that_of_training():
    model, batches = model_and_data()
    report = drift(model, batches)
    inputs, trained = [], copy.deepcopy(model)
    trained[4].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        trained(batch)
    near(report.layers[1].shift, figures(model[4], inputs)[0], rtol=1e-4, atol=1e-5)


def test_parts_by_hand():
    """Initial, not representative and stale from their definitions: one channel, sorted uneven batches."""
    layer = nn.BatchNorm1d(1, momentum=0.2)
    for _ in range(6):
        layer(torch.randn(50, 1) * 3 + 7)
    batches = list((torch.randn(90, 1).sort(0).values + 5).split(40))
    row = drift(layer, batches).layers[0]
    mean, variance = (value.item() for value in population(batches))
    weight, eps = 0.8**6, layer.eps
    trained = layer.running_mean.item() / (1 - weight), (layer.running_var.item() - weight) / (1 - weight)
    weights = [0.2 * 0.8**age for age in (2, 1, 0)]
    moving = [
        sum(w * value(batch.double()).item() for w, batch in zip(weights, batches, strict=True))
        / sum(weights)
        for value in (torch.mean, torch.var)
    ]

    def size(a, b):
        return math.sqrt(
            (a[0] - b[0]) ** 2 / (variance + eps) + math.log((a[1] + eps) / (b[1] + eps)) ** 2 / 2
        )

    running = layer.running_mean.item(), layer.running_var.item()
    near(row.initial, size(running, trained), rtol=1e-4, atol=0)
    near(row.not_representative, size(moving, (mean, variance)), rtol=1e-4, atol=0)
    near(row.stale, size(trained, moving), rtol=1e-4, atol=0)
    means = torch.stack([batch.double().mean() for batch in batches])
    variances = torch.stack([batch.double().var() for batch in batches])
    noise = means.var() / (variance + eps) + variances.var() / (variance + eps) ** 2 / 2
    near(row.noise, (0.2 / 1.8 * noise).sqrt(), rtol=1e-4, atol=0)
    within = sum((batch.double() - batch.double().mean()).square().sum() for batch in batches)
    total = variance * 89
    near(row.between_ratio, (1 - within / total) * 89 / 2, rtol=1e-4, atol=0)


def test_representative_and_fresh_statistics_fit():
    model, batches = model_and_data(size=256)
    report = drift(model, batches)
    assert [row.cause for row in report.layers] == ["fits", "fits"]
    assert "fit the data" in report.verdict
    assert report.signs == []


def test_stale_when_weights_move():
    model, batches = model_and_data()
    with torch.no_grad():
        model[0].weight *= 3
        model[0].bias += 2
    rows = drift(model, batches).layers
    assert rows[0].cause == "stale"
    assert rows[0].stale > 5 * rows[0].not_representative


def test_not_representative_when_sorted():
    """Statistics made of these very batches, in this order, at these weights: only the order is at fault."""
    layer = nn.BatchNorm1d(4)
    batches = list((torch.randn(40, 32, 4) * 0.3 + torch.arange(40.0).view(40, 1, 1) / 10).unbind())
    for batch in batches * 3:
        layer(batch)
    report = drift(layer, batches)
    row = report.layers[0]
    assert row.cause == "not representative"
    assert row.stale < 0.05 * row.size
    assert any("sorted" in sign for sign in report.signs)


def test_small_batches_are_chance_not_stale():
    layer = nn.BatchNorm1d(16, momentum=0.5)
    for _ in range(50):
        layer(torch.randn(4, 16))
    report = drift(layer, list(torch.randn(100, 4, 16)))
    assert report.layers[0].cause == "not representative"
    assert any("tiny" in sign for sign in report.signs)
    assert report.layers[0].between_ratio is not None
    alone = drift(layer, list(torch.randn(9, 1, 16)))  # batches without a variance of their own
    twice = drift(nn.Sequential(layer, layer), list(torch.randn(9, 4, 16)))
    assert {row.between_ratio for row in (*alone.layers, *twice.layers)} == {None}


def test_initial_value_and_sources():
    data = list(torch.randn(30, 16, 4) * 5 + 3)

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(
                (
                    nn.BatchNorm1d(4),
                    nn.BatchNorm1d(4, momentum=None),
                    nn.BatchNorm1d(4, track_running_stats=False),
                    nn.BatchNorm1d(4),
                    nn.BatchNorm1d(4, momentum=0.01),
                )
            )

        def forward(self, x):
            return torch.cat([norm(x) for norm in self.norms], 1)

    model = Beside()
    model.norms[3].eval()
    for batch in data[:5]:
        model(batch)
    rows = drift(model, data).layers
    assert [row.source.split(":")[0] for row in rows] == [
        "moving average, 0.1",
        "cumulative",
        "batch",
        "frozen",
        "moving average, 0.01",
    ]
    near(rows[0].initial_weight, 0.9**5)
    assert rows[0].cause == "initial value"
    assert rows[1].initial_weight == 0
    assert rows[2].size is None
    values = torch.cat(data)
    standard = ((values - values.mean(0)) / values.std(0)).split(16)
    for untouched in (data, standard):  # the initial values may happen to fit
        assert drift(nn.BatchNorm1d(4), untouched).layers[0].source == "never updated"
    assert initial_weight(0.01, 100) == pytest.approx(0.366, abs=1e-3)
    recalibrate(model, data)
    rows = drift(model, data).layers
    assert [row.source for row in rows if row.source == "full pass"] == ["full pass"] * 3
    assert rows[0].initial_weight == 0


def test_layerwise_recalibration_leaves_no_drift_in_evaluation():
    model, batches = model_and_data(size=3, updates=40)
    recalibrate(model, batches, layerwise=True)
    assert max(row.size for row in drift(model, batches, lower="running").layers) < 1e-5


def test_signs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.once = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.once(self.norm(self.norm(x) * 2))

    model = Twice()
    data = [*torch.randn(10, 64, 4), torch.randn(2, 4)]
    for batch in data:
        model(batch)
    text = "\n".join(drift(model, data).signs)
    assert "norm is called 2 times per forward" in text
    assert "last batch has 2 samples" in text
    assert "as often as" not in text  # twice per forward is what two calls make
    text = "\n".join(drift(model, data, steps=5).signs)
    assert "2.2 times as often as the 5 steps" in text

    def again(x):
        return torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=False)

    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    for batch in data[:10]:
        model[1](again(batch)).sum().backward()
    assert model[0].num_batches_tracked == 20
    text = "\n".join(drift(model, data[:10]).signs)
    assert "0 was updated 2 times as often as 1 (10 updates)" in text
    poisoned = [*data[:10], torch.randn(64, 4) * 1000]
    assert any("One batch (number 10) alone makes" in sign for sign in drift(model, poisoned).signs)
    dead = nn.BatchNorm1d(4)
    report = drift(dead, [batch * torch.tensor([1, 0, 1, 1.0]) for batch in data])
    assert report.layers[0].dead == [1]
    assert all(map(math.isfinite, report.layers[0].ratio))


def test_not_finite():
    layer = nn.BatchNorm1d(4)
    layer.running_mean[2] = torch.nan
    data = list(torch.randn(10, 8, 4))
    data[3][0, 1] = torch.inf
    report = drift(layer, data)
    row = report.layers[0]
    assert (row.cause, row.nonfinite_buffers, row.nonfinite_batches) == ("not finite", 1, 1)
    assert json.loads(report.to_json())["layers"][0]["size"] is None
    assert "NaN" in str(report)


def test_effect_by_hand():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    data = list((torch.randn(6, 16, 5) + 1).unbind())
    for batch in data[:2]:
        model(batch)

    def metric(output, batch):
        return (output.argmax(1) == 0).float().mean()

    def outputs(kind):
        other = copy.deepcopy(model).train(kind == "batch")
        if kind == "full":
            recalibrate(other, data)
            other.eval()
        return torch.cat([other(batch) for batch in data]).double()

    running, full, batch = map(outputs, ("running", "full", "batch"))
    for loader in (data, iter(data)):
        effect = drift(model, loader, metric=metric).effect
        for change, a, b in (
            (effect.running_vs_full, running, full),
            (effect.running_vs_batch, running, batch),
            (effect.batch_vs_full, batch, full),
        ):
            near(change.relative, (a - b).norm() / b.norm(), rtol=1e-4, atol=0)
            near(change.decisions, (a.argmax(1) != b.argmax(1)).double().mean())
        for name, output in (("running", running), ("full", full), ("batch", batch)):
            near(effect.metric[name], (output.argmax(1) == 0).double().mean(), rtol=1e-6, atol=0)


def test_one_shot_loader_keeps_few_batches():
    report = drift(nn.BatchNorm1d(3), (torch.randn(4, 3) for _ in range(50)))
    assert report.batches == 50
    assert report.effect.batches == 16


def test_report_faces():
    model, batches = model_and_data(updates=3)
    report = drift(model, batches)
    text = str(report)
    assert repr(report) == text
    assert text.startswith(report.verdict)
    assert "initial value" in text
    assert len(json.loads(report.to_json())["layers"][0]["shift"]) == 7
    assert drift(nn.Linear(2, 2), [torch.randn(3, 2)]).verdict == "The model has no BatchNorm layers."
    assert drift(nn.BatchNorm1d(2), []).signs == ["The loader gave no batch."]
    with pytest.raises(ValueError, match="lower must be"):
        drift(model, batches, lower="moving")


def test_page_and_chart(tmp_path):
    """Well-formed, complete, and loading nothing."""
    model, batches = model_and_data(updates=3)
    model[1].running_mean[0] = torch.nan
    report = drift(model, batches, metric=lambda output, _: 0.5)
    ElementTree.fromstring(report.chart())
    page = report.to_html()
    assert html.escape(report.verdict, quote=True).replace("&#x27;", "&#39;") in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for layer in report.layers:
        assert layer.cause in page
    empty = DriftReport([]).to_html()
    assert "no BatchNorm layers" in empty
    ElementTree.fromstring(drift(nn.Sequential(), []).chart())
    many = DriftReport(
        [LayerDrift(f"<{i}>", "BatchNorm1d", "", shift=[0.1], ratio=[20.0]) for i in range(90)]
    )
    ElementTree.fromstring(many.chart())


def test_in_the_probes_report():
    model, batches = model_and_data(updates=3)
    report = mp.probe(model, batches[0], loader=batches)
    assert report.drift.layers[0].cause == "initial value"
    assert " ".join(report.drift.verdict.split()) in " ".join(str(report).split())
    assert json.loads(report.to_json())["drift"]["layers"][0]["name"] == "1"
    assert mp.probe(model, batches[0]).drift is None
