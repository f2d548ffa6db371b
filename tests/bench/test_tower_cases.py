"""The operators inside an encoder in measuring, in the selection table and in the report."""

import pickle
from collections import Counter

import pytest
import torch

from laco_kernels.bench import op_cases, op_variants, operators, page, plan, tune
from laco_kernels.bench.page import default, devices, losses, views
from laco_kernels.bench.results import Results, Row
from laco_kernels.bench.tower_cases import tower_cases
from laco_kernels.kernels import select
from tests.bench.rows import GPU, spread

CPU, META = torch.device("cpu"), torch.device("meta")
CASES = tower_cases("float32")
TINY = op_cases.tiny(CASES)
every_case = pytest.mark.parametrize("case", TINY, ids=str)


def named(case, call):
    """A variant in the name of ours, which is given what ours is."""
    return {"eager": op_variants.function(case, "eager"), "triton": call}


def test_every_form_is_measured_in_both_directions_on_shapes_before_and_after_a_merge():
    assert len(CASES) == len(set(CASES)) == len(set(map(str, CASES))) == 44
    forms = Counter((case.op, case.form, case.direction) for case in CASES)
    ways = [("add_norm", "rms"), ("add_norm", "layer"), ("gated_silu", "")]
    ways += [("activate", name) for name in ("gelu", "gelu_tanh", "quick_gelu")]
    assert set(forms) == {(*way, direction) for way in ways for direction in ("forward", "backward")}
    assert all(forms[(*way, "forward")] == forms[(*way, "backward")] for way in ways)
    assert {case.tokens for case in CASES} == {144, 196, 576, 577, 729, 1025}
    assert {case.batch for case in CASES} == {1, 16, 64}
    assert {case.terms for case in CASES if case.op == "add_norm"} == {"x", "x+delta", "x+scale*delta"}


@every_case
def test_what_the_layers_of_transformers_do_is_what_the_operator_does(case):
    variants = named(case, lambda tensors: tuple(case.case(tensors, "reference").values()))
    found = operators.measure_case(case, CPU, variants, rounds=1, ceilings={"tflops": 1.0, "gbs": 1.0})
    for name, values in found.items():
        assert values["ok"], (name, values)
        assert values["roofline"] > 0
        assert values["peak_bytes"] > 0
        assert values["flops"] == 0
    assert found["eager"]["bytes"] >= found["eager"]["least_bytes"]


@every_case
def test_the_kernels_pass_the_check_behind_which_they_are_timed(case):
    _, verdict = operators.prepare(case, CPU, "triton", op_variants.function(case, "triton"))
    assert verdict["ok"], verdict


def test_the_kernels_move_little_more_than_they_must():
    for case in tower_cases("bfloat16"):
        costs = operators._costs(case, "triton", torch.bfloat16)
        share = costs["bytes"] / costs["least_bytes"]
        # The gradients of a norm's weights are summed in parts, of which few rows have many.
        is_summed = case.op == "add_norm" and case.direction == "backward"
        assert 1 <= share < (1.1 if is_summed else 1.01) or (is_summed and case.batch == 1), case


@every_case
def test_compiled_and_without_what_has_no_part_in_it(case):
    assert operators.names(case, CPU) == ["eager", "compile"]
    assert "is no product" in op_variants.unavailable("products", case, CPU)
    assert "no implementation of that name" in op_variants.unavailable("composite", case, CPU)
    if case.batch == 1 and case.tokens < 20:
        found = operators.measure_case(case, CPU, operators.contenders(case, CPU), rounds=1)
        assert found["compile"]["ok"]
        assert found["compile"]["timings"]


@pytest.mark.parametrize("op", ["add_norm", "gated_silu"])
def test_what_is_compiled_ahead_can_be_sent_to_another_process(op):
    case = next(case for case in TINY if (case.op, case.direction) == (op, "backward"))
    unit = plan.op_unit(case, CPU, rounds=1)
    assert unit.variants == ("eager", "compile")
    pickle.loads(pickle.dumps(unit.compile))()
    assert [(facts, name) for facts, name, _ in unit.measure()] == [(case.facts, name) for name in unit.variants]


def test_one_wrong_output_or_gradient_of_several_is_wrong():
    case = next(case for case in TINY if case.op == "add_norm" and case.terms == "x+delta")
    wrong = operators.measure_case(case, CPU, named(case, lambda t: (t["x"] + t["delta"], t["x"])), rounds=1)
    assert (wrong["eager"]["ok"], wrong["triton"]["ok"]) == (True, False)
    gate = next(case for case in TINY if case.op == "gated_silu" and case.direction == "backward")

    def call(tensors):  # the gradient of up alone
        first, second = tensors["h"].chunk(2, dim=-1)
        return torch.nn.functional.silu(first).detach() * second

    assert operators.measure_case(gate, CPU, named(gate, call), rounds=1)["triton"]["ok"] is False


def test_eager_has_gate_and_up_in_tensors_of_their_own():
    case = next(case for case in TINY if case.op == "gated_silu" and case.direction == "backward")
    tensors = operators._inputs(case, CPU, torch.float32)
    given = op_variants.given(case, "eager", tensors)
    assert list(given) == ["gate", "up"]
    assert all(tensor.is_contiguous() and tensor.is_leaf and tensor.requires_grad for tensor in given.values())
    assert torch.equal(torch.cat(list(given.values()), dim=-1), tensors["h"])
    assert op_variants.given(case, "triton", tensors) is tensors


@pytest.mark.parametrize(
    ("op", "form", "terms", "large", "vectors"),
    [
        ("add_norm", "layer", "x", 3, 4),
        ("add_norm", "layer", "x+delta", 4, 4),  # the sum, two gradients of it in, one out for both of its terms
        ("add_norm", "layer", "x+scale*delta", 6, 6),
        ("add_norm", "rms", "x+delta", 4, 2),
        ("gated_silu", "", "", 5, 0),
        ("activate", "gelu", "", 3, 0),
    ],
)
def test_least_bytes_of_a_backward_pass(op, form, terms, large, vectors):
    wanted = (op, form, terms, "backward")
    case = next(case for case in TINY if (case.op, case.form, case.terms, case.direction) == wanted)
    rows = case.batch * case.tokens
    assert operators.least_bytes(case, torch.float32) == 4 * case.channels * (large * rows + vectors)


def measured(speeds, environment):
    """Rows of every case, ours so many times faster than eager as ``speeds`` says of its operator and form."""
    for case in tower_cases("bfloat16"):
        ours = 100 / speeds.get(case.form or case.op, 2.0)
        for variant, median in (("eager", 100), ("compile", 90), ("triton", ours)):
            values = {
                "ok": True,
                "reason": None,
                "timings": {"graph": spread(median, 0.1), "cold": spread(1.5 * median, 0.1)},
                "ratio_kind": "graph",
                "ratio_eager": dict.fromkeys(("median", "low", "high"), 100 / median),
                "ratio_compile": dict.fromkeys(("median", "low", "high"), 90 / median),
                "goal": None,
            }
            yield Row("tower", case.facts, variant, values, environment, "c")


@pytest.fixture
def folder(tmp_path):
    results = Results.open(tmp_path / "h200")
    results.add(measured({"gelu": 0.9, "gelu_tanh": 1.01}, results.begin(GPU)))
    return tmp_path / "h200"


def test_the_table_has_a_form_of_each_and_the_selection_finds_it(folder, monkeypatch):
    table = tune.table([Results.open(folder)])
    rows = table[GPU["device"]]["rows"]
    found = {(row["op"], select.form_of(row), row["direction"]): (row["up_to"], row["impl"]) for row in rows}
    assert found["add_norm", "rms", "forward"] == (36864, "triton")
    assert found["add_norm", "layer", "backward"] == (16400, "triton")
    assert found["gated_silu", None, "forward"] == (36864, "triton")
    assert found["activate", "quick_gelu", "forward"] == (9232, "triton")
    assert found["activate", "gelu", "forward"] == (16400, "reference")
    assert found["activate", "gelu_tanh", "forward"] == (11664, "reference")
    assert {name for row in rows for name in row} == {"op", "direction", "kind", "activation", "dtype", "up_to", "impl"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: GPU["device"])
    monkeypatch.setattr(select, "winners", lambda: table)
    select._CHOICES.clear()
    try:
        cuda = torch.device("cuda")
        chosen = select.choose("add_norm", "forward", cuda, torch.bfloat16, 576, "rms")
        assert chosen == ("triton", "measured fastest on NVIDIA H200 up to 36864 output tokens")
        assert select.choose("gated_silu", "backward", cuda, torch.bfloat16, 1).impl == "triton"
        assert select.choose("activate", "forward", cuda, torch.bfloat16, 576, "gelu").impl == "reference"
        assert "with kind='rms'" in select.choose("add_norm", "forward", cuda, torch.bfloat16, 10**6, "rms").reason
    finally:
        select._CHOICES.clear()
    changed = tune.changes({}, table)
    assert "NVIDIA H200: add_norm forward rms bfloat16 up to 36864 tokens: nothing -> triton" in changed


def test_one_case_that_is_slower_than_eager_keeps_its_bucket_from_being_chosen(folder):
    results = Results.open(folder)
    lost = next(row for row in results.rows.values() if row.variant == "triton" and row.case.get("terms") == "x+scale*delta")
    lost.values["timings"]["cold"] = spread(151, 0.1)
    rows = tune.table([results])[GPU["device"]]["rows"]
    layer = [(row["up_to"], row["impl"]) for row in rows if (row.get("kind"), row["direction"]) == ("layer", "forward")]
    assert layer == [(729, "triton"), (1025, "reference"), (16400, "triton")]


def test_the_report_has_a_place_of_their_own_and_what_loses_is_listed(folder, monkeypatch):
    table = tune.table([Results.open(folder)])
    monkeypatch.setattr(select, "winners", lambda: table)
    (device,) = devices.read([folder])
    assert not views.operators(device)
    groups = views.operators(device, "tower")
    assert list(groups) == list(select.TOWER_OPERATORS)
    assert default.implementations(device, groups["gated_silu"][0].case) == ("triton",)
    lines = {tuple(cell.text for cell in line.cells[1:4]) for line in views.overview(device, "tower").lines}
    assert ("default", "5", "2.00x") in lines, "RMSNorm, five shapes a direction"
    lost = losses.losing(device)
    assert {line.cells[0].text for line in lost.lines} == {"activate"}
    assert len(lost) == 8, "two GELUs on two shapes in two directions: one slower than eager, one than compiled"
    text = page.markdown([folder])
    assert "### Inside the encoder" in text
    assert "aimv2-l-336 (rms, x+delta, tokens 576, batch 16)" in text
    assert "against the layers of transformers" in page.readme_section([folder])
    assert "Inside the encoder" in page.html([folder])
