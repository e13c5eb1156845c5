"""The results file, verdicts on targets, and two files side by side."""

from __future__ import annotations

import json

import pytest
from modeprobe.benchmarks import check, compare, provenance, registry, results, tables

pytestmark = pytest.mark.rung("reference")


def row(work="dropout/forward/2^20/float32", provider="modeprobe", **fields):
    return {
        "work": work,
        "provider": provider,
        "device": "cpu",
        "status": "ok",
        "reason": "",
        "floor": False,
        "family": work.split("/")[0],
        "groups": [],
        "count": 1,
        "seconds": [0.9e-3, 1e-3, 1.1e-3],
        "ratios": {},
        "of_copy": None,
        "saved_bytes": None,
        **fields,
    }


def made(*rows):
    found = results.empty()
    found["runs"]["first"] = {"date": "2026-01-01", "commit": None}
    results.upsert(found, "results", rows, "first")
    return found


def test_a_later_run_of_a_work_replaces_all_its_rows():
    found = made(row(), row(provider="torch"), row(provider="old rival"), row("other/forward/16/float32"))
    found["runs"]["second"] = {"date": "2026-01-02"}
    results.upsert(found, "results", [row(seconds=[2, 2, 2]), row(provider="torch")], "second")
    assert [(item["work"][:5], item["provider"], item["run"]) for item in found["results"]] == [
        ("dropo", "modeprobe", "second"),
        ("dropo", "torch", "second"),
        ("other", "modeprobe", "first"),
    ]
    assert set(found["runs"]) == {"first", "second"}
    results.upsert(found, "results", [row("other/forward/16/float32")], "second")
    assert set(found["runs"]) == {"second"}


def test_saved_is_loaded(tmp_path):
    found = made(row())
    results.save(found, tmp_path / "a" / "results.json")
    assert results.load(tmp_path / "a") == found
    assert results.load(tmp_path / "a" / "results.json") == found
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]
    for key in ("name", "cpu", "generation", "cores", "threads", "simd", "gpu", "system"):
        assert key in found["machine"]


def test_load_says_what_is_wrong(tmp_path):
    results.save(made(row()), tmp_path / "there" / "results.json")
    with pytest.raises(FileNotFoundError, match="there are there"):
        results.load(tmp_path / "absent")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        results.load(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="schema"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz 4 cores", "intel-xeon"),
        ("AMD EPYC 2 cores", "amd-epyc-2-cores"),
        ("", "machine"),
    ],
)
def test_machine_names_make_folders(name, expected):
    assert results.slug(name) == expected


EPYC = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "gpu": None}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"generation": "family 23 model 1", "simd": "AVX2"}, "amd-epyc-family-23-model-1-avx2-2-cores"),
        (
            {"generation": "family 25 model 17", "simd": "AVX512"},
            "amd-epyc-family-25-model-17-avx512-2-cores",
        ),
        ({"generation": "", "simd": "AVX512", "threads": 1}, "amd-epyc-avx512-2-cores-1-threads"),
        ({"generation": "", "simd": "AVX2", "gpu": {"name": "NVIDIA H200"}}, "nvidia-h200"),
    ],
)
def test_another_generation_or_instruction_set_is_another_machine(fields, name):
    assert results.machine_name({**EPYC, **fields}) == name


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"cpu family": "23", "model": "1", "model name": "AMD EPYC"}, "family 23 model 1"),
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "implementer 0x41 part 0xd40"),
        ({}, ""),
    ],
)
def test_the_generation_comes_from_the_processor(facts, words):
    assert results.generation(facts) == words


def test_rows_of_two_machines_do_not_share_a_file(tmp_path):
    from modeprobe.benchmarks import runner

    found = made(row())
    found["machine"]["simd"] = "another"
    with pytest.raises(ValueError, match=r"simd 'another', here .*; give this machine a folder of its own"):
        runner.run([], "cpu", found, tmp_path / "results.json")
    older = made(row())
    del older["machine"]["generation"]  # a file that does not say cannot be known to be this machine's
    with pytest.raises(ValueError, match="generation None, here"):
        runner.run([], "cpu", older, tmp_path / "results.json")
    assert runner.run([], "cpu", made(row()), tmp_path / "results.json") == []


def test_tables_name_their_runs_and_whether_the_kernels_have_changed_since(monkeypatch):
    found = made(row(), row("other/forward/16/float32"))
    found["runs"]["second"] = {"date": "2026-02-02T00:00:00Z", "commit": "new"}
    found["runs"]["first"]["commit"] = "old"
    results.upsert(found, "results", [row("other/forward/16/float32")], "second")
    monkeypatch.setattr(provenance, "older_kernels", lambda commit: commit == "old")
    note = tables.work_table(found, "dropout").notes[-1]
    assert note == (
        "Measured at new on 2026-02-02, 1 works; "
        "at old on 2026-01-01 (kernels older than this source tree's), 1 works."
    )


def test_kernels_of_a_commit_are_compared_with_this_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "checkout", lambda: tmp_path)
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.parent.mkdir()
    kernel.write_text("// adds\nint f(int x) {\n  return x + 1;\n}\n")
    (tmp_path / "README.md").write_text("one")
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        assert results.git(*arguments) is not None
    measured = results.git("rev-parse", "HEAD")
    assert not results.older_kernels(measured)
    assert not results.older_kernels(None)
    assert results.older_kernels(f"{measured}+")
    assert results.older_kernels("1234567")  # no such commit

    (tmp_path / "README.md").write_text("two")
    kernel.write_text("// adds one\nint f(int x) {\n  return x + 1;\n}\n")
    assert not results.older_kernels(measured)
    kernel.write_text("// adds\nint f(int x) {\n  return x + 2;\n}\n")
    assert results.older_kernels(measured)


TARGET = {
    "family": "dropout",
    "device": "cpu",
    "text": "forward",
    "work": "dropout/forward/2^20/float32",
    "bounds": [{"against": "torch", "at_least": 30}, {"against": "x * 2", "at_most": 3}],
    "why": "the random numbers",
}


def verdicts(target, *rows, **options):
    return [(item.verdict, item.why) for item in check.check(made(*rows), [target], **options)]


@pytest.mark.parametrize(
    ("torch", "multiply", "expected"),
    [
        (31.0, 0.5, ["met", "met"]),
        (29.9, 0.5, ["missed", "met"]),
        (30.0, 1 / 3, ["met", "met"]),
        (31.0, 0.3, ["met", "missed"]),
    ],
)
def test_verdicts_follow_the_median(torch, multiply, expected):
    ratios = {"torch": [1.0, torch, 99.0], "x * 2": [0.01, multiply, 0.99]}
    found = verdicts(TARGET, row(ratios=ratios))
    assert [word for word, _ in found] == expected
    assert all(why == ("the random numbers" if word == "missed" else "") for word, why in found)


def test_a_miss_without_a_reason_says_so_and_a_bound_may_have_its_own():
    slow = row(ratios={"torch": [1.0, 1.0, 1.0], "x * 2": [0.1, 0.1, 0.1]})
    bare = {key: value for key, value in TARGET.items() if key != "why"}
    assert verdicts(bare, slow) == [("missed", check.NO_REASON)] * 2
    own = {**TARGET, "bounds": [{**TARGET["bounds"][0], "why": "two passes"}, TARGET["bounds"][1]]}
    assert verdicts(own, slow) == [("missed", "two passes"), ("missed", "the random numbers")]
    found = made(slow)
    found["targets"] = [item.as_dict() for item in check.check(found, [own])]
    (table,) = tables.target_tables(found)
    assert table.notes[:2] == [
        "Dropout: forward (at least 30x torch): two passes",
        "Dropout: forward (at most 3x x * 2's time): the random numbers",
    ]


def test_machines_stand_side_by_side(monkeypatch):
    ours, theirs = made(row(ratios={"torch": [1, 40.0, 50]})), made(row(ratios={"torch": [1, 20.0, 50]}))
    for one, name in ((ours, "ours"), (theirs, "theirs")):
        one["machine"]["name"] = name
        one["targets"] = [item.as_dict() for item in check.check(one, [TARGET])]
    table = tables.targets_by_machine([ours, theirs])
    assert table.columns == ["work", "target", "ours on 2026-01-01", "theirs on 2026-01-01"]
    assert table.rows[0] == ["Dropout: forward", "at least 30x torch", "40 met", "20 **missed**"]
    assert table.notes[-1] == "Dropout: forward (at least 30x torch): the random numbers"
    monkeypatch.setattr(tables, "is_older", lambda one: True)
    notes = tables.targets_by_machine([ours, theirs]).notes
    assert notes[-1] == "theirs: measured with older kernels, whose misses are not explained here."
    assert not any(note.startswith("ours") for note in notes)
    alone = tables.targets_by_machine([ours])
    assert alone.rows[0] == ["Dropout: forward", "at least 30x torch", "40", "1 to 50", "met"]


def test_a_cost_is_the_inverse_of_a_speed_up_with_its_ends_swapped():
    (_, cost) = check.check(made(row(ratios={"torch": [1, 1, 1], "x * 2": [0.25, 0.5, 1.0]})), [TARGET])
    assert cost.measured == [1.0, 2.0, 4.0]
    assert cost.bound == "at most 3x x * 2's time"


def test_targets_without_a_time_say_so():
    assert verdicts(TARGET) == [("not measured", "")] * 2
    assert verdicts({**TARGET, "device": "cuda"}) == [("needs a GPU", "")] * 2
    assert (
        verdicts(TARGET, row(status="wrong", reason="off by 3", seconds=None)) == [("wrong", "off by 3")] * 2
    )
    assert verdicts(TARGET, row()) == [
        ("not measured", "torch has no time"),
        ("not measured", "x * 2 has no time"),
    ]


def test_the_worst_row_of_a_pattern_or_group_decides():
    target = {
        "family": "f",
        "device": "cpu",
        "text": "t",
        "work": "dropout/forward/2^2[68]/*",
        "bounds": [{"against": "copy bandwidth", "at_least": 0.9}],
    }
    good = row("dropout/forward/2^26/float32", of_copy=[0.9, 0.95, 0.99], groups=["layers, batch 8"])
    bad = row("dropout/forward/2^28/float32", of_copy=[0.8, 0.85, 0.9], groups=["layers, batch 8"])
    other = row("dropout/forward/2^20/float32", of_copy=[0.1, 0.1, 0.1])
    (verdict,) = check.check(made(good, bad, other), [target])
    assert (verdict.verdict, verdict.row) == ("missed", "dropout/forward/2^28/float32")
    by_group = {**target, "group": "layers, *"}
    (verdict,) = check.check(made(good, other), [by_group])
    assert verdict.verdict == "met"


def test_instruction_targets():
    target = {
        "family": "f",
        "device": "sass",
        "text": "t",
        "work": "dropout bfloat16 sm_90",
        "bounds": [{"against": "instructions per element", "at_most": 18}],
    }
    assert verdicts(target)[0][0] == "not measured"
    assert verdicts(target, instructions={"dropout bfloat16 sm_90": 17.5})[0][0] == "met"
    assert verdicts(target, instructions={"dropout bfloat16 sm_90": 18.5})[0][0] == "missed"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_target_has_its_work(device):
    """A target without a work would stay unmeasured for ever."""
    from fnmatch import fnmatchcase

    works = [way for work in registry.select(registry.all_works(device)) for way in work.ways]
    for target in check.targets():
        if target["device"] != device:
            continue
        if "group" in target:
            assert any(fnmatchcase(group, target["group"]) for work in works for group in work.groups), target
        else:
            names = [work.name for work in works]
            assert target["work"] in names or any(fnmatchcase(name, target["work"]) for name in names), target
        assert all(len({"at_least", "at_most"} & set(bound)) == 1 for bound in target["bounds"])
        for bound in target["bounds"]:
            peers = {"torch", "torch.compile", "x * 2", "x.clone()", "y.copy_(x)", check.COPY}
            assert bound["against"] in peers


@pytest.mark.parametrize(
    ("b", "mark"),
    [
        ([0.5e-3, 0.6e-3, 0.7e-3], "faster"),
        ([1.5e-3, 1.6e-3, 1.7e-3], "slower"),
        ([0.95e-3, 1.2e-3, 1.7e-3], ""),
        ([0.5e-3, 0.6e-3, 0.95e-3], ""),
        ([1.0e-3, 1.0e-3, 1.0e-3], ""),
    ],
)
def test_compare_marks_what_is_beyond_noise(b, mark):
    (change,) = compare.compare(made(row()), made(row(seconds=b)))
    assert change.mark == mark
    assert change.speedup == pytest.approx(1e-3 / b[1])


def test_compare_ignores_tiny_changes_and_shows_changed_statuses():
    quiet = [1e-3, 1e-3, 1e-3]
    almost = [1.01e-3, 1.01e-3, 1.01e-3]
    (change,) = compare.compare(made(row(seconds=quiet)), made(row(seconds=almost)))
    assert change.mark == ""
    broken = row(seconds=None, status="wrong")
    (change,) = compare.compare(made(row()), made(broken))
    assert (change.mark, change.speedup) == ("ok -> wrong", None)
    assert "ok -> wrong" in tables.compare_table([change], "a", "b").markdown()


def test_losses_list_what_is_slower_beyond_the_spread():
    found = made(
        row("a/forward/16/float32", ratios={"torch": [0.8, 0.9, 0.95], "x * 2": [0.1, 0.1, 0.1]}),
        row("b/forward/16/float32", ratios={"torch": [0.8, 0.9, 1.1]}),
    )
    assert [cells[:2] for cells in tables.losses(found).rows] == [["a/forward/16/float32", "torch"]]


def test_layer_totals_weigh_layers_by_their_count():
    group = ["ResNet-50 layers, batch 8, float32, contiguous"]

    def layer(work, count, mine, theirs):
        fields = {"groups": group, "count": count}
        return [
            row(work, seconds=[mine] * 3, ratios={"torch": [theirs / mine] * 3}, **fields),
            row(work, "torch", seconds=[theirs] * 3, **fields),
        ]

    found = made(*layer("batch_norm/a", 1, 1e-3, 2e-3), *layer("batch_norm/b", 4, 2e-3, 1e-3))
    (cells,) = tables.layer_totals(found).rows
    assert cells == [group[0], "6 ms", "-", "9 ms", "0.667x", "0.5x"]


def test_names():
    work = registry.Work("dropout", "forward", (1 << 20,), "float32", 2, lambda work, device: None)  # type: ignore
    assert work.name == "dropout/forward/2^20/float32"
    assert work.bytes == 2 * 4 * (1 << 20)
    assert registry.shape_name((16,)) == "16"
    assert registry.shape_name((3000,)) == "3000"
    assert registry.shape_name((4, 16)) == "4x16"
    with pytest.raises(ValueError, match="no work matches 'nothing'"):
        registry.select([work], "nothing")
    assert registry.select([work, work], "2^20") == [work]
