"""The selection table is made of measured rows, and what is shipped is made of those on record."""

import json
from pathlib import Path

import pytest

from laco_kernels.bench import tune
from laco_kernels.bench.results import Results, Row, device_folders
from laco_kernels.kernels import select
from tests.bench.rows import GPU, op_row, spread

ROOT = Path(__file__).parents[2]


def table(rows, block=GPU):
    results = Results(None)
    name = results.begin(block)
    results.add([op_row(environment=name, **row) for row in rows])
    return tune.table([results])


def times(batch=1, **medians):
    return [{"variant": variant.replace("_", "-"), "median": median, "batch": batch} for variant, median in medians.items()]


def chosen(rows):
    (entry,) = table(rows).values()
    return [(row["up_to"], row["impl"]) for row in entry["rows"]]


@pytest.mark.parametrize(
    ("medians", "impl"),
    [
        ({"eager": 100, "composite": 90, "triton": 80}, "triton"),
        ({"eager": 100, "composite": 90, "triton": 88}, "composite"),  # 2.3 % faster than something simpler
        ({"eager": 100, "composite": 98, "triton": 101}, "reference"),
        ({"eager": 100, "composite": 120, "triton": 90, "cuda": 70}, "cuda"),
        ({"eager": 100, "composite": 98, "triton": 96.5}, "reference"),  # each little faster than the one before
        ({"eager": 100, "eager-conv": 60, "triton": 90}, "reference"),
        ({"eager": 100, "eager-conv": 50, "compile": 40, "products": 30}, "reference"),
        ({"triton": 10}, "reference"),
    ],
)
def test_the_fastest_is_chosen_where_it_leads_by_three_per_cent(medians, impl):
    assert chosen(times(**medians)) == [(144, impl)]


def test_a_variant_that_failed_its_check_is_never_chosen():
    rows = [*times(eager=100, composite=80), {"variant": "triton", "median": 10, "ok": False}]
    assert chosen(rows) == [(144, "composite")]


def test_one_case_of_a_bucket_that_is_slower_than_eager_forbids_it():
    narrow = [{**row, "hidden": 1024} for row in times(eager=50, triton=51, composite=45)]
    assert chosen([*times(eager=100, triton=60, composite=90), *narrow]) == [(144, "composite")]


def test_buckets_grow_with_the_tokens_and_equal_neighbours_are_one():
    rows = [*times(1, eager=9, triton=10), *times(4, eager=20, triton=18), *times(16, eager=50, triton=40)]
    assert chosen(rows) == [(144, "reference"), (2304, "triton")]


def test_layouts_are_apart_and_operators_without_one_have_none():
    rows = [{**row, "layout": "block"} for row in times(eager=100, triton=50)]
    rows += [{**row, "op": "strided_conv_gelu"} for row in times(eager=100, triton=50)]
    results = Results(None)
    name = results.begin(GPU)
    results.add([op_row(environment=name, **row) for row in [*rows, *times(eager=100, composite=50)]])
    for row in results.rows.values():
        if row.case["op"] == "strided_conv_gelu":
            del row.case["layout"]
    found = tune.winners(results.latest())
    assert [(row["op"], row.get("layout"), row["impl"]) for row in found] == [
        ("patch_merge", "block", "triton"),
        ("patch_merge", "raster", "composite"),
        ("strided_conv_gelu", None, "triton"),
    ]


def test_what_is_slower_than_eager_in_one_case_is_not_chosen_there_and_splits_the_bucket():
    def pairs(batch, eager, triton):  # the paired ratio of the helper is 100 over the median
        return [{**row, "batch": batch} for row in times(eager=eager, triton=triton)]

    rows = [*pairs(1, 100, 50), *pairs(4, 120, 101), *pairs(16, 100, 50)]
    assert chosen(rows) == [(144, "triton"), (576, "reference"), (2304, "triton")], "the median ratio of the second is 0.99"
    sweep = op_row("triton", 101, environment="", sweep="batch", encoder="-", hidden=1024)
    results = Results(None)
    name = results.begin(GPU)
    results.add([op_row(environment=name, **row) for row in pairs(1, 100, 50)])
    results.add(
        [
            Row("sweep", sweep.case, variant, row.values, name, "c")
            for variant, row in (("eager", op_row("eager", 100, environment=name)), ("triton", sweep))
        ]
    )
    assert [row["impl"] for row in tune.table([results])["NVIDIA H200"]["rows"]] == ["reference"]


def test_directions_are_apart_and_both_together_is_no_bucket():
    rows = [{**row, "direction": direction} for direction in ("backward", "both") for row in times(eager=100, triton=50)]
    (entry,) = table([*rows, *times(eager=100, composite=50)]).values()
    assert {(row["direction"], row["impl"]) for row in entry["rows"]} == {("forward", "composite"), ("backward", "triton")}


def test_a_processor_s_rows_choose_nothing():
    assert table(times(eager=100, triton=10), {**GPU, "capability": None}) == {}


def test_tokens_are_counted_as_the_selection_counts_them():
    case = {"op": "patch_merge", "grid": [27, 27], "batch": 2}
    assert tune.output_tokens(case) == 2 * 14 * 14
    assert tune.output_tokens({**case, "op": "multi_block_linear_gelu"}) == 2 * 729


def test_the_file_reads_back_and_changes_are_told(tmp_path):
    old, new = table(times(eager=100, triton=101)), table(times(eager=100, triton=50))
    file = tmp_path / "winners.json"
    tune.write(new, file)
    assert json.loads(file.read_text()) == new
    assert tune.changes(old, new) == ["NVIDIA H200: patch_merge forward raster bfloat16 up to 144 tokens: reference -> triton"]
    assert tune.changes(new, {}) == ["NVIDIA H200: patch_merge forward raster bfloat16 up to 144 tokens: triton -> nothing"]
    assert tune.changes(new, new) == []
    assert json.loads(tune.dumps({})) == {}


def test_the_shipped_table_is_made_of_the_rows_on_record():
    folders = device_folders(ROOT / "benchmarks" / "results")
    expected = tune.table(Results.open(folder) for folder in folders)
    assert select.TABLE.read_text() == tune.dumps(expected), "run `laco tune`"


def test_a_choice_that_is_slower_cold_is_none():
    rows = times(eager=100, triton=50)
    results = Results(None)
    name = results.begin(GPU)
    for row in rows:
        found = op_row(environment=name, **row)
        found.values["timings"]["cold"] = spread({"eager": 120, "triton": 121}[row["variant"]], 1)
        results.add([found])
    assert tune.winners(results.latest())[0]["impl"] == "reference"


@pytest.mark.parametrize(("commit", "rounds", "impl"), [("c", 10, "triton"), ("c", 9, "reference"), ("c*", 10, "reference")])
def test_few_rounds_and_changed_checkouts_choose_nothing(commit, rounds, impl):
    results = Results(None)
    name = results.begin(GPU)
    for row in times(eager=100, triton=50):
        found = op_row(environment=name, commit=commit, **row)
        found.values["timings"]["graph"]["rounds"] = rounds
        results.add([found])
    assert [bucket["impl"] for bucket in tune.winners(results.latest())] == ([impl] if commit == "c" else [])


def test_rows_of_different_runs_are_not_compared():
    results = Results(None)
    first, second = (results.begin({**GPU, "date": date}) for date in ("2026-01-01", "2026-01-02"))
    results.add([op_row("eager", 100, environment=first), op_row("triton", 50, environment=second)])
    assert tune.winners(results.latest())[0]["impl"] == "reference"
