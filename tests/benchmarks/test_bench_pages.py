"""Charts, the page, the blocks in the documents, instruction counts, and the command around them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from modeprobe.benchmarks import callgrind, charts, cli, page, registry, results, runner
from typer.testing import CliRunner

pytestmark = pytest.mark.rung("reference")


def fabricated(gpu=None):
    """Results of every work of the CPU: torch takes 4 ms, modeprobe 1, the floors 0.5."""
    found = results.empty()
    found["machine"].update(name="made-up", cpu="Made Up", gpu=gpu)
    found["runs"]["one"] = {
        "date": "2026-01-01T00:00:00Z",
        "commit": "abc",
        "versions": results.versions(),
        "rivals": {"apex": "not installed"},
        "load": [0.1, 0.2],
        "left_out": [],
    }
    costs = {"torch": 4e-3, "torch.compile": 2e-3, "modeprobe": 1e-3, "x * 2": 5e-4, "x.clone()": 5e-4}
    rows = []
    for work in registry.select(registry.all_works("cpu")):
        for provider, cost in costs.items():
            floor = provider.startswith("x")
            rows.append(
                {
                    "work": work.name,
                    "provider": provider,
                    "device": "cpu",
                    "status": "ok",
                    "reason": "",
                    "note": "",
                    "floor": floor,
                    "family": work.family,
                    "mode": work.mode,
                    "shape": list(work.shape),
                    "dtype": work.dtype,
                    "layout": work.layout,
                    "groups": list(work.groups),
                    "count": work.count,
                    "elements": work.elements,
                    "bytes": work.bytes,
                    "seconds": [0.9 * cost, cost, 1.1 * cost],
                    "fastest": cost,
                    "rounds": 5,
                    "ratios": {
                        other: [their / cost] * 3 for other, their in costs.items() if other != provider
                    },
                    "of_copy": [0.25 * work.passes / cost * 1e-3] * 3 if work.passes else None,
                    "saved_bytes": None if floor else 16,
                    "peak_bytes": None,
                }
            )
    results.upsert(found, "results", rows, "one")
    return cli.refreshed(found)


@pytest.fixture(scope="module")
def made():
    return fabricated()


@pytest.fixture(scope="module")
def drawn(made, tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("charts")
    return charts.write(made, folder), folder


def test_every_chart_is_drawn_as_png_and_svg(drawn):
    written, folder = drawn
    assert set(written) == {
        "summary-cpu",
        "dropout-sizes-cpu-float32",
        "batch_norm-sizes-cpu-float32",
        "resnet-50-layers-batch-8-float32-contiguous",
        "resnet-50-layers-batch-8-float32-channels_last",
        "memory",
        "models",
    }
    for name, (_, svg) in written.items():
        assert svg.startswith("<svg")
        assert (folder / f"{name}.svg").read_text() == svg
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_equal_results_give_equal_charts(made, drawn, tmp_path):
    again = charts.write(made, tmp_path)
    assert {name: svg for name, (_, svg) in again.items()} == {
        name: svg for name, (_, svg) in drawn[0].items()
    }


def test_charts_of_a_run_that_stopped_early(tmp_path):
    pytest.importorskip("matplotlib")
    found = fabricated()
    found["results"] = [row for row in found["results"] if row["family"] == "dropout"][:5]
    found["results"][0].update(status="wrong", seconds=None, of_copy=None, ratios={})
    assert charts.write(found, tmp_path)
    found["results"] = []
    assert charts.write(found, tmp_path) == {}


def test_the_page_is_one_file_with_everything(made, drawn):
    text = page.html(made, drawn[0])
    assert text.count("<svg") == len(drawn[0])
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.findall(r"url\((?!#)", text)
    for wanted in ("Made Up", "commit abc", "apex (not installed)", "Whole models", "Targets for a GPU"):
        assert wanted in text
    assert '<span class="badge missed">missed</span>' in text
    left_out = page.html(made, {}, "matplotlib is not installed")
    assert "Charts left out: matplotlib is not installed" in left_out


def test_the_page_escapes_what_providers_say(made):
    row = dict(made["results"][0], status="wrong", reason="<b>3</b>", seconds=None, provider="<i>rival</i>")
    text = page.html({**made, "results": [*made["results"], row]}, {})
    assert "<b>3</b>" not in text
    assert "<i>rival" not in text


def test_blocks_of_this_kind_of_machine_are_refreshed(made):
    text = (
        "a\n<!-- bench: cpu headline -->\nold\n<!-- /bench -->\nb\n"
        "<!-- bench: gpu headline -->\nnot yet run on a GPU\n<!-- /bench -->\n"
    )
    fresh = page.refresh(text, made)
    assert "old" not in fresh
    assert "| Dropout: forward, 2^20 float32 | 4 ms | 2 ms | 1 ms | 4x | 2x |" in fresh
    assert "not yet run on a GPU" in fresh
    assert page.refresh(fresh, made) == fresh
    with pytest.raises(ValueError, match="no such block: nothing"):
        page.refresh("<!-- bench: cpu nothing -->\n<!-- /bench -->", made)
    gpu = fabricated({"name": "G", "memory_gib": 1, "multiprocessors": 1})
    assert "old" in page.refresh(text, gpu)
    for name in page.blocks(made):
        assert page.blocks(made)[name].endswith("\n")


def test_publishing_refreshes_documents_and_the_picture(made, drawn, tmp_path):
    (tmp_path / "README.md").write_text("<!-- bench: cpu machine -->\n<!-- /bench -->\n")
    changed = page.publish(made, drawn[1], tmp_path)
    assert [path.name for path in changed] == ["README.md", "benchmarks-cpu.png"]
    assert "Made Up" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs/images/benchmarks-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_this_projects_documents_only_name_blocks_that_exist(made):
    root = results.checkout()
    if root is None:
        pytest.skip("not a source tree")
    for name in page.DOCUMENTS:
        if (root / name).is_file():
            text = (root / name).read_text()
            assert text.count("<!-- bench:") == len(page.BLOCK.findall(text)), name
            page.refresh(text, made)


def test_callgrind_totals_become_counts_per_element(tmp_path):
    (tmp_path / "out.1").write_text(
        "desc: Trigger: Client Request\nevents: Ir\nsummary: 8000\ntotals: 8000\n"
    )
    row = callgrind.finished({"elements": 1000}, callgrind.total(tmp_path / "out.1"))
    assert row == {"elements": 1000, "instructions": 8000 // callgrind.CALLS, "per_element": 2.0}
    (tmp_path / "out.2").write_text("nothing")
    with pytest.raises(ValueError, match=r"out\.2 holds no total"):
        callgrind.total(tmp_path / "out.2")


def test_without_valgrind_counting_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="valgrind is not installed"):
        callgrind.count(1.0)


def test_what_is_counted_runs():
    """The child's works and providers exist; valgrind itself is slow and stays out of the tests."""
    for work in callgrind.counted_works():
        candidates = work.setup(work, "cpu").candidates
        assert set(callgrind.PROVIDERS) <= set(candidates)


# The command


def command(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def flat(text):
    return re.sub(r"[\s│]+", " ", text)


@pytest.fixture
def folder(tmp_path):
    results.save(fabricated(), tmp_path / "made-up" / "results.json")
    return tmp_path


def test_check_prints_verdicts_and_fails_on_a_miss(folder):
    ran = command("--check", "--output", str(folder), "--machine", "made-up")
    assert ran.exit_code == 1
    assert "at least 30x torch" in ran.output
    assert "missed" in ran.output
    assert "not yet run on a GPU" in ran.output


def test_report_renders_without_measuring(folder):
    ran = command("--report", "--output", str(folder), "--machine", "made-up")
    assert ran.exit_code == 0, ran.output
    assert (folder / "made-up" / "index.html").read_text().startswith("<!doctype html>")


def test_compare_prints_both(folder):
    other = fabricated()
    for row in other["results"]:
        row["seconds"] = [value / 2 for value in row["seconds"]]
    results.save(other, folder / "other" / "results.json")
    ran = command("--compare", "made-up", "other", "--output", str(folder))
    assert ran.exit_code == 0
    assert "faster" in ran.output
    assert "2x" in ran.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--works", "nothing"], "no work matches 'nothing'"),
        (["--check", "--machine", "absent"], "no results at"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["--compare", "absent", "absent"], "no results at"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path):
    ran = command(*arguments, "--output", str(tmp_path))
    assert ran.exit_code == 2
    assert message in flat(ran.output)


def test_list_names_works_and_quick_lists_the_targets():
    every = command("--list", "--device", "cpu").output.split("\n")
    quick = command("--list", "--quick", "--device", "cpu").output.split("\n")
    assert set(quick) < set(every)
    assert len(quick) < len(every) / 2


def test_a_small_run_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "FULL", runner.Limits(seconds=0.0, least_rounds=2, sample_seconds=0.0))
    pattern = "dropout/forward/64/float32"
    ran = command("--works", pattern, "--output", str(tmp_path), "--machine", "here", "--device", "cpu")
    assert ran.exit_code == 0, ran.output
    saved = json.loads((tmp_path / "here" / "results.json").read_text())
    rows = {row["provider"]: row for row in saved["results"]}
    assert rows["torch"]["status"] == rows["modeprobe"]["status"] == "ok"
    assert rows["modeprobe"]["ratios"]["torch"][1] > 0
    assert (tmp_path / "here" / "index.html").is_file()


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "modeprobe.benchmarks", "--list", "--works", "dropout/forward/16/"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "dropout/forward/16/float32\n"
