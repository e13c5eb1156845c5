"""The tour as a whole: terminal, HTML page, missing packages, failures."""

import html
import importlib.util
import io
import re
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from modeprobe import tour
from modeprobe.cli import app
from modeprobe.tour import batch_norm, dropout

pytestmark = pytest.mark.rung("reference")

SETTINGS = {
    "dropout": dropout.Settings(elements=2**14, speed_elements=(2**10, 2**12), speed_seconds=0.0),
    "batchnorm": batch_norm.Settings(epochs=1, early=(5,), watch_all=3, watch_every=10),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other, for minutes where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def take(path, **options):
    console = Console(file=io.StringIO(), width=100)
    taken = tour.run(path, console=console, settings={**SETTINGS, **options.pop("settings", {})}, **options)
    return taken, console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    for package in ("sklearn", "transformers", "matplotlib"):
        pytest.importorskip(
            package, reason="the tour's packages are missing; run: pip install 'modeprobe[tour]'"
        )
    from modeprobe.tour import language_models

    path = tmp_path_factory.mktemp("tour") / "tour.html"
    models = language_models.Settings(("LLaMA", "OPT"))
    taken, printed = take(path, settings={"models": models})
    return taken, printed, path.read_text()


def test_it_answers_three_questions(whole):
    taken, printed, page = whole
    assert taken.exit_code == 0
    assert list(taken.outcomes) == list(tour.QUESTIONS)
    flat = " ".join(printed.replace("│", " ").split())
    text = html.unescape(page)
    for name, outcome in taken.outcomes.items():
        assert tour.QUESTIONS[name] in printed
        assert tour.QUESTIONS[name] in text
        assert outcome.answer in flat
        assert outcome.answer in text


def test_the_page_is_self_contained(whole):
    page = whole[2]
    assert page.count("<svg") == 3
    assert "<script" not in page
    links = set(re.findall(r'(?:src|href|action)="([^"]*)"', page))
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    # Drawings must not refer to each other's clip paths and glyphs.
    clashing = {i for i in ids if ids.count(i) > 1 and f"#{i}" in page}
    assert not clashing


def browser_path(playwright):
    from pathlib import Path

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


def test_a_browser_shows_the_charts_without_an_error(whole, tmp_path):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; run: pip install playwright"
    )
    path = tmp_path / "tour.html"
    path.write_text(whole[2])
    with sync_api.sync_playwright() as playwright:
        executable = browser_path(playwright)
        if executable is None:
            pytest.skip("no Chromium or Chrome found; run: playwright install chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong, requests = [], []
        view.on("console", lambda message: wrong.append(message.text))
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.on("requestfailed", lambda request: wrong.append(request.url))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(path.as_uri())
        charts = view.locator("figure svg")
        assert charts.count() == 3
        for index in range(charts.count()):
            charts.nth(index).scroll_into_view_if_needed()
            assert charts.nth(index).is_visible()
            box = charts.nth(index).bounding_box()
            assert box["width"] > 600
            assert box["height"] > 200
            # More than axes and glyphs: lines or bars in the colours of the data.
            assert charts.nth(index).locator('path[style*="#4f46e5"]').count() > 0
        view.set_viewport_size({"width": 380, "height": 800})
        assert view.evaluate("document.documentElement.scrollWidth") <= 380
        browser.close()
    assert wrong == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture
def without(monkeypatch):
    find = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    return hide


def test_missing_packages_leave_out_their_part_only(without, tmp_path):
    without("sklearn", "transformers", "matplotlib")
    path = tmp_path / "tour.html"
    taken, printed = take(path)
    assert taken.exit_code == 0
    assert taken.outcomes["dropout"].answer
    for name, package in (("batchnorm", "scikit-learn"), ("models", "transformers")):
        message = f"{package} is not installed. Run: pip install 'modeprobe[tour]'"
        assert taken.outcomes[name].message == message
        assert message in printed
        assert message in html.unescape(path.read_text())
    assert "matplotlib is not installed" in printed
    assert "<svg" not in path.read_text()


def test_a_failing_part_is_told_and_the_rest_runs(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise ArithmeticError("<planted>")

    monkeypatch.setattr(batch_norm, "compute", fail)
    path = tmp_path / "tour.html"
    taken, printed = take(path, only=["batchnorm", "dropout"])
    assert taken.exit_code == 1
    assert taken.failures == {"batchnorm": "ArithmeticError: <planted>"}
    assert taken.outcomes["dropout"].answer
    assert "ArithmeticError: <planted>" in printed
    assert "ArithmeticError: &lt;planted&gt;" in path.read_text()
    assert "Traceback" in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dropout.Settings, "__init__", lambda self: self.__dict__.update(vars(SETTINGS["dropout"]))
    )
    path = tmp_path / "here.html"
    result = CliRunner().invoke(app, ["tour", "--only", "dropout", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "Answer" in result.output
    assert "here.html" in result.output.replace("\n", "")
    assert "Dropout" in path.read_text()
    assert "BatchNorm: which" not in path.read_text()


def test_bad_arguments_are_found_before_anything_runs(tmp_path):
    result = CliRunner().invoke(app, ["tour", "-o", str(tmp_path / "no" / "such" / "folder.html")])
    assert result.exit_code == 2
    assert "No such file" in result.output
    assert "Answer" not in result.output
    assert CliRunner().invoke(app, ["tour", "--only", "x"]).exit_code == 2
    with pytest.raises(ValueError, match="must name sections among dropout, batchnorm, models, got 'x'"):
        tour.run(tmp_path / "a.html", only=["x"])
