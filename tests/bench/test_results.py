"""Measurements as data: nothing lost, nothing half written, damage named."""

import json

import pytest

from laco_kernels.bench import compare as comparing
from laco_kernels.bench.results import FILE, Results, Row, folder_name
from tests.bench.rows import spread

NEGATIVE = '{"low": -1, "median": 1, "high": 2}'


def row(variant="eager", commit="a", batch=1, environment="e", **values):
    return Row("ops", {"op": "x", "batch": batch}, variant, {"ok": True, "timings": {}, **values}, environment, commit)


def filled(folder):
    results = Results.open(folder)
    name = results.begin({"date": "2026-01-01", "device": "cpu"})
    results.add([row(environment=name), row("triton", environment=name)])
    return results, name


def test_rows_come_back_as_they_were(tmp_path):
    results, name = filled(tmp_path / "new" / "folder")
    again = Results.open(tmp_path / "new" / "folder")
    assert again.rows == results.rows
    assert again.environments == {name: {"date": "2026-01-01", "device": "cpu"}}
    assert {path.name for path in results.file.parent.iterdir()} == {FILE, ".lock"}, "nothing else is left lying there"


def test_the_same_row_replaces_itself_and_another_commit_stays_beside_it(tmp_path):
    results, name = filled(tmp_path)
    results.add([row(environment=name, error=1.0), row(commit="b", environment=name)])
    rows = list(Results.open(tmp_path).rows.values())
    assert [(r.variant, r.commit, r.values.get("error")) for r in rows] == [
        ("eager", "a", 1.0),
        ("triton", "a", None),
        ("eager", "b", None),
    ]


def test_rows_from_before_there_was_a_layout_are_in_raster_order(tmp_path):
    results = Results.open(tmp_path)
    name = results.begin({"date": "2026-01-01"})
    results.add([Row("ops", {"op": op}, "eager", {"timings": {}}, name, "a") for op in ("patch_merge", "strided_conv_gelu")])
    (merge, conv) = Results.open(tmp_path).rows.values()
    assert merge.case == {"op": "patch_merge", "layout": "raster"}
    assert conv.case == {"op": "strided_conv_gelu"}


def test_the_latest_row_of_a_case_is_the_one_measured_last(tmp_path):
    results, name = filled(tmp_path)
    later = results.begin({"date": "2026-02-01"})
    results.add([row(commit="b", environment=later)])
    results.add([row(commit="c", environment=name)])
    assert {(r.variant, r.commit) for r in results.latest()} == {("eager", "b"), ("triton", "a")}


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:20]], 3),
        (lambda lines: [lines[0], "", *lines[1:]], 2),
        (lambda lines: [*lines, "[1, 2]"], 4),
        (lambda lines: [*lines, '{"suite": "ops"}'], 4),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[1].replace('"ops"', "7"), lines[2]], 2),
        (lambda lines: [lines[0], lines[1].replace('"timings": {}', '"timings": 3')], 2),
        (lambda lines: [lines[0], lines[1].replace('"timings": {}', '"timings": {"wall": {"median": 1}}')], 2),
        (lambda lines: [lines[0], lines[1].replace('"timings": {}', f'"timings": {{"wall": {NEGATIVE}}}')], 2),
        (lambda lines: [*lines, '"\udcff"'], 4),
    ],
    ids=[
        "truncated",
        "empty line",
        "no object",
        "no row",
        "no environment",
        "no suite",
        "no timings",
        "no median",
        "negative",
        "no text",
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, damage, number):
    filled(tmp_path)
    file = tmp_path / FILE
    file.write_text("\n".join(damage(file.read_text().splitlines())), errors="surrogateescape")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"results: got .* in line {number} of .*{FILE}.*nothing was changed"):
        Results.open(tmp_path)
    assert file.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    results, name = filled(tmp_path)
    before = results.file.read_bytes()
    for value in (object(), float("inf")):
        with pytest.raises((TypeError, ValueError)):
            results.add([row(environment=name, error=value)])
    assert results.file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {FILE, ".lock"}


def test_without_a_file_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Results(None)
    results.add([row(environment=results.begin({}))])
    assert len(results.rows) == 1
    assert not list(tmp_path.iterdir())


def test_two_runs_into_one_folder_lose_nothing(tmp_path):
    one, two = Results.open(tmp_path), Results.open(tmp_path)
    names = [results.begin({"date": f"run {i}"}) for i, results in enumerate((one, two))]
    one.add([row("eager", environment=names[0])])
    two.add([row("triton", environment=names[1])])
    one.add([row("compile", environment=names[0])])
    found = Results.open(tmp_path)
    assert {entry.variant for entry in found.rows.values()} == {"eager", "triton", "compile"}
    assert set(found.environments) == set(names)


def test_a_row_without_rivals_replaces_none_with_a_ratio(tmp_path):
    results, name = filled(tmp_path)
    results.add([row(environment=name, ratio_eager={"median": 2.0})])
    results.add([row(environment=name, timings={"wall": spread(3, 1)})])
    assert Results.open(tmp_path).rows[row(environment=name).key].values["ratio_eager"] == {"median": 2.0}
    results.add([row(environment=name, ok=False)])
    assert Results.open(tmp_path).rows[row(environment=name).key].values["ok"] is False, "a failed check is not hidden"


def test_unused_environments_are_not_kept(tmp_path):
    results, _ = filled(tmp_path)
    results.begin({"date": "later"})
    results.write()
    assert len(Results.open(tmp_path).environments) == 1


def test_folders_are_named_after_the_device():
    gpu = {"device": "NVIDIA H200", "gpus": ["NVIDIA H200"], "cpu": "AMD EPYC", "cpu_threads": 2}
    assert folder_name(gpu) == "nvidia-h200"
    assert folder_name({**gpu, "device": "AMD EPYC"}) == "cpu-amd-epyc-2-threads"


def two(tmp_path, old, new):
    sides = []
    for side, rows in (("old", old), ("new", new)):
        results = Results.open(tmp_path / side)
        name = results.begin({"date": side})
        results.add([row(variant, environment=name, timings=timings) for variant, timings in rows.items()])
        sides.append(results)
    return comparing.compare(*sides)


def test_comparing_pairs_rows_and_finds_what_is_slower_beyond_both_intervals(tmp_path):
    changes = two(
        tmp_path,
        {
            "eager": {"wall": spread(100, 2)},
            "triton": {"wall": spread(100, 2)},
            "compile": {"wall": spread(100, 30)},
            "cuda": {"wall": spread(1, 0)},
            "gone": {"wall": spread(1, 0)},
        },
        {
            "eager": {"wall": spread(101, 2)},
            "triton": {"wall": spread(110, 2)},
            "compile": {"wall": spread(120, 30)},
            "cuda": {},
            "fresh": {"wall": spread(1, 0)},
        },
    )
    assert [(change.variant, change.is_slower(0.03)) for change in changes] == [
        ("cuda", True),
        ("compile", False),
        ("triton", True),
        ("eager", False),
    ]
    assert changes[2].ratio == pytest.approx(100 / 110)
    assert (changes[2].low, changes[2].high) == pytest.approx((98 / 112, 102 / 108))
    assert comparing.overall(changes) == pytest.approx((100 / 120 * 100 / 110 * 100 / 101) ** (1 / 3))


def test_comparing_takes_the_same_kind_of_time_on_both_sides(tmp_path):
    old = {"eager": {"cold": spread(50, 1), "graph": spread(10, 1)}, "triton": {"cold": spread(9, 1)}}
    new = {"eager": {"cold": spread(50, 1), "graph": spread(20, 1)}, "triton": {"graph": spread(9, 1)}}
    (change,) = two(tmp_path, old, new)
    assert (change.variant, change.kind, change.ratio) == ("eager", "graph", 0.5)


def test_rows_are_json_a_line(tmp_path):
    results, _ = filled(tmp_path)
    first, *rest = [json.loads(line) for line in results.file.read_text().splitlines()]
    assert set(first) == {"id", "environment"}
    assert all(set(entry) == {"suite", "case", "variant", "values", "environment", "commit"} for entry in rest)
