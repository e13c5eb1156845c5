"""Charts, the page, the blocks in the documents, instruction counts, and the command around them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from modeprobe.benchmarks import callgrind, charts, check, cli, page, publication, registry, results, runner
from typer.testing import CliRunner

pytestmark = pytest.mark.rung("reference")


@pytest.fixture(scope="module", autouse=True)
def machine_code_is_not_read():
    """It takes many seconds; tests/compiler reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "sass_instructions", dict)
        yield


def fabricated(gpu=None):
    """Results of every work of the CPU, or of the GPU: torch takes 4 ms, modeprobe 1, the floors 0.5."""
    found, device = results.empty(), "cuda" if gpu else "cpu"
    found["machine"].update(name="made-up", cpu="Made Up", gpu=gpu)
    found["runs"]["one"] = {
        "date": "2026-01-01T00:00:00Z",
        "commit": None,
        "versions": results.versions(),
        "rivals": {"apex": "not installed"},
        "load": [0.1, 0.2],
        "left_out": [],
    }
    costs = {"torch": 4e-3, "torch.compile": 2e-3, "modeprobe": 1e-3, "x * 2": 5e-4, "x.clone()": 5e-4}
    rows = []
    for work in [way for both in registry.select(registry.all_works(device)) for way in both.ways]:
        for provider, cost in costs.items():
            floor = provider.startswith("x")
            rows.append(
                {
                    "work": work.name,
                    "provider": provider,
                    "device": device,
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
        "headline-cpu",
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
    for wanted in (
        "Made Up",
        "Measured on 2026-01-01",
        "apex (not installed)",
        "Whole models",
        "Targets for a GPU",
    ):
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
        "<!-- bench: gpu state -->\nold\n<!-- /bench -->\n"
        "<!-- bench: gpu headline -->\nold\n<!-- /bench -->\n"
    )
    fresh = publication.refresh(text, [made])
    assert "old" not in fresh
    assert "| Dropout, 2^20 (in cache) | 4 ms | 2 ms | 1 ms | 4x |" in fresh
    assert fresh.count("Not yet run on a GPU") == 1
    assert publication.refresh(fresh, [made]) == fresh
    with pytest.raises(ValueError, match="no such block: nothing"):
        publication.refresh("<!-- bench: cpu nothing -->\n<!-- /bench -->", [made])


def test_what_a_gpu_has_shown_stands_beside_the_cpu(made):
    """Whichever machine publishes; "not yet" goes with the first results."""
    gpu = fabricated({"name": "G9", "memory_gib": 80, "multiprocessors": 132})
    text = "".join(
        f"<!-- bench: {name} -->\n<!-- /bench -->\n"
        for name in ("cpu targets", "gpu state", "gpu headline", "gpu report")
    )
    fresh = publication.refresh(text, [made, gpu])
    assert fresh == publication.refresh(text, [gpu, made])
    assert "Not yet" not in fresh
    cpu, state, headline, report = fresh.split("<!-- /bench -->")[:4]
    assert "needs a GPU" not in fresh
    assert "Measured on G9 (80 GiB, 132 multiprocessors)" in state
    met = sum(item["verdict"] == "met" for item in gpu["targets"] if item["device"] == "cuda")
    assert f" {met} met" in state
    assert "BatchNorm2d training forward" in headline
    assert "256 MB and 1 GB float32" in report
    assert "256 MB and 1 GB float32" not in cpu
    assert "(32,64,56,56)" not in report.partition("### Targets")[2].partition("###")[0]
    for text in publication.blocks(made).values():
        assert text.endswith("\n")


def test_the_headline_is_short_and_holds_what_is_lost(made):
    """The README's table: few rows, of both families, and not only those that are won."""
    chosen = [row["headline"] for row in check.targets() if row["device"] == "cpu" and "headline" in row]
    assert 8 <= len(chosen) <= 13
    assert [words for words, _ in check.named(made)] == chosen
    families = {row["family"] for row in check.targets() if "headline" in row}
    assert families == {"dropout", "batch_norm"}
    assert any("evaluation" in words for words in chosen)
    assert any("16 elements" in words for words in chosen)


def test_other_machines_get_a_column_the_latest_first(made, tmp_path):
    def save(name, date, **changes):
        other = fabricated()
        other["machine"].update(name=name, **changes)
        other["runs"]["one"]["date"] = date
        results.save(other, tmp_path / name / "results.json")

    save("here", "2026-01-01T00:00:00Z")
    save("older", "2024-01-01T00:00:00Z")
    save("newer", "2025-01-01T00:00:00Z")
    save("here-quick", "2026-01-01T00:00:00Z")
    save("a-gpu", "2026-01-01T00:00:00Z", gpu={"name": "G"})
    path = tmp_path / "here" / "results.json"
    found = results.others(path)
    assert [one["machine"]["name"] for one in found] == ["a-gpu", "newer", "older"]
    blocks = publication.blocks(*publication.by_kind([made, *found])["cpu"])
    heading = blocks["targets"].splitlines()[0]
    assert heading == "| work | target | made-up on 2026-01-01 | newer on 2025-01-01 | older on 2024-01-01 |"
    assert [line.split("]")[0] for line in blocks["machines"].splitlines()] == [
        "* [made-up",
        "* [newer",
        "* [older",
    ]


def test_publishing_refreshes_documents_and_pictures(made, drawn, tmp_path):
    (tmp_path / "README.md").write_text("<!-- bench: cpu machine -->\n<!-- /bench -->\n")
    folder = tmp_path / "results"
    shutil.copytree(drawn[1], folder / made["machine"]["name"] / "charts")
    changed = publication.publish([made], folder, tmp_path)
    assert [path.name for path in changed] == ["README.md", "headline-cpu.png", "benchmarks-cpu.png"]
    assert "Made Up" in (tmp_path / "README.md").read_text()
    for path in changed[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_this_projects_documents_only_name_blocks_that_exist(made):
    root = results.checkout()
    if root is None:
        pytest.skip("not a source tree")
    for name in publication.DOCUMENTS:
        if (root / name).is_file():
            text = (root / name).read_text()
            assert text.count("<!-- bench:") == len(publication.BLOCK.findall(text)), name
            publication.refresh(text, [made])


def test_every_saved_machine_has_a_folder_of_its_own_name():
    root = results.checkout()
    if root is None:
        pytest.skip("not a source tree")
    for path in (root / "benchmarks" / "results").glob("*/results.json"):
        machine = results.load(path)["machine"]
        if not machine["gpu"] and not path.parent.name.startswith(("rehearsal", "made-up")):
            assert machine["name"] == path.parent.name
            assert machine["simd"].lower() in path.parent.name


def test_callgrind_totals_become_counts_per_element(tmp_path):
    (tmp_path / "out.1").write_text(
        "desc: Trigger: Client Request\nevents: Ir\nsummary: 8000\ntotals: 8000\n"
    )
    row = callgrind.finished({"elements": 1000}, callgrind.total(tmp_path / "out.1"))
    assert row == {"elements": 1000, "instructions": 8000 // callgrind.CALLS, "per_element": 2.0}
    (tmp_path / "out.2").write_text("nothing")
    with pytest.raises(ValueError, match=r"out\.2 holds no total"):
        callgrind.total(tmp_path / "out.2")


def test_counts_of_a_child_that_was_stopped_are_kept(tmp_path, monkeypatch):
    """Lines end when their dump is written: half a line is a count that was under way."""
    assert callgrind.completed(tmp_path / "absent") == []
    (tmp_path / "rows").write_text('{"name": "a", "elements": 10}\n{"name": "b", "ele')
    assert callgrind.completed(tmp_path / "rows") == [{"name": "a", "elements": 10}]

    def stopped(command, **options):
        out = next(part for part in command if part.startswith("--callgrind-out-file=")).partition("=")[2]
        (tmp_path / "rows").replace(command[-1])
        with open(f"{out}.1", "w") as file:
            file.write("totals: 400\n")
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(callgrind, "why_not", lambda: None)
    monkeypatch.setattr(callgrind.subprocess, "run", stopped)
    assert callgrind.count(1.0) == [
        {"name": "a", "elements": 10, "instructions": 100, "per_element": 10.0},
    ]


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
    assert "needs a GPU" in ran.output
    assert "no reason given; add a why" in flat(ran.output)
    assert re.search(r"\d+ missed without a reason", ran.output)


def test_progress_tells_the_time_gone_and_left():
    from rich.console import Console

    times = iter([0.0, 10.0, 20.0])
    console = Console(width=200, record=True)
    with cli.Progress(console, 4, 45.0, now=lambda: next(times)) as progress:
        work = registry.Work("double", "forward", (8,), "float32", 2, lambda work, device: None)
        progress.done(work, [])
        progress.done(work, [])
    lines = console.export_text().splitlines()
    assert lines[0].startswith("  1/4   10 s,  30 s left  double/forward/8/float32")
    assert lines[1].startswith("  2/4   20 s,  20 s left  ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--within", "500"], 0.8 * 500 - 75), (["--quick"], 85), (["--within", "500", "--budget", "7"], 7)],
)
def test_the_time_of_a_run_is_shared_out(arguments, expected, tmp_path, monkeypatch):
    """What is measured leaves room for the counts of instructions and for the charts."""
    asked = {}
    monkeypatch.setattr(cli, "measure_all", lambda *given: asked.update(budget=given[-1]))
    monkeypatch.setattr(cli, "count_instructions", lambda console, path, left: asked.update(left=left))
    monkeypatch.setattr(cli, "render", lambda *given: None)
    ran = command("--device", "cpu", "--output", str(tmp_path), *arguments)
    assert ran.exit_code == 0, ran.output
    assert asked["budget"] == pytest.approx(expected, abs=1.0)
    assert ("left" in asked) == (arguments == ["--within", "500"])


def test_report_renders_without_measuring(folder, monkeypatch):
    monkeypatch.setattr(cli, "drawn", lambda *given: ({}, "drawn in other tests"))
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
