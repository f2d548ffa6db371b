"""The harness of ``laco bench ops`` itself: known times, a wrong variant, the same variant twice."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laco_kernels import testing
from laco_kernels.bench import op_cases, op_variants, operators
from laco_kernels.bench.memory import LiveTensors
from laco_kernels.bench.operators import measure_case
from laco_kernels.bench.timing import spread
from laco_kernels.geometry import Windows
from laco_kernels.hf.points import route_of
from laco_kernels.kernels import select
from laco_kernels.nn import build_compressor

CPU = torch.device("cpu")
CASES = {(case.op, case.direction): case for case in op_cases.tiny(op_cases.op_cases("float32")) if case.grid == (6, 6)}
INSIDE = {(case.grid, case.direction): case for case in op_cases.tiny(op_cases.encoder_cases("float32"))}
MERGE, BLOCK = CASES["patch_merge", "forward"], INSIDE[(6, 6), "forward"]
BLOCKS = [case for case in op_cases.tiny(op_cases.mlp_cases("float32")) if case.batch == 4]
every_case = pytest.mark.parametrize("case", [*CASES.values(), *INSIDE.values(), *BLOCKS], ids=str)


def eager(case, delay=0.0, factor=1.0):
    plain = op_variants.function(case, "eager")

    def call(tensors):
        time.sleep(delay)
        return plain(tensors) * factor

    return call


def test_a_known_time_is_measured_and_so_is_its_ratio(monkeypatch):
    now = [0.0]  # what sleeps takes no time, but moves the clock
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rivals = {"eager": eager(MERGE, 0.02), "triton": eager(MERGE, 0.005)}
    found = measure_case(MERGE, CPU, rivals, rounds=9)
    slow, fast = (found[name]["timings"]["wall"] for name in rivals)
    for times, microseconds in ((slow, 20_000), (fast, 5_000)):
        assert [times[name] for name in ("low", "p20", "median", "p80", "high")] == pytest.approx([microseconds] * 5)
        assert times["rounds"] == 9
    assert found["triton"]["ratio_eager"]["median"] == pytest.approx(4)
    assert found["eager"]["ratio_eager"]["median"] == 1
    assert found["triton"]["ratio_compile"] is None, "nothing compiled took part"


def test_a_wrong_variant_has_no_time():
    found = measure_case(MERGE, CPU, {"eager": eager(MERGE), "triton": eager(MERGE, factor=1.0001)}, rounds=2)
    assert found["triton"]["ok"] is False
    assert found["triton"]["error"] > found["triton"]["budget"]
    assert found["triton"]["timings"] == {}
    assert found["triton"]["ratio_eager"] is None
    assert found["triton"]["roofline"] is None
    assert found["triton"]["reason"] == "wrong: further from float64 than twice eager"
    assert found["eager"]["ok"] is True
    assert found["eager"]["timings"]


def test_wrong_gradients_are_wrong():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    case = CASES["strided_conv_gelu", "both"]
    plain = op_variants.function(case, "eager")
    found = measure_case(case, CPU, {"eager": lambda t: plain(t), "triton": lambda t: Doubled.apply(plain(t))}, rounds=1)
    assert (found["eager"]["ok"], found["triton"]["ok"]) == (True, False)


def test_the_same_variant_twice_is_as_fast_as_itself():
    call = eager(MERGE, 0.002)
    ratio = measure_case(MERGE, CPU, {"eager": call, "triton": call}, rounds=25)["triton"]["ratio_eager"]
    assert ratio["low"] <= 1.02
    assert ratio["high"] >= 0.98


def test_a_variant_that_breaks_or_needs_too_much_memory_leaves_the_others_their_times():
    def broken(tensors):
        raise ValueError("no such kernel\nand more")

    def huge(tensors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rivals = {"eager": eager(MERGE), "composite": huge, "triton": broken, "products": None}
    found = measure_case(MERGE, CPU, rivals, rounds=1)
    assert found["composite"]["reason"] == "out of memory"
    assert found["triton"]["reason"] == "ValueError: no such kernel"
    assert found["eager"]["timings"]
    assert found["products"]["timings"]
    assert measure_case(MERGE, CPU, {"triton": broken}, rounds=1)["triton"]["timings"] == {}


def test_a_goal_is_one_of_the_gpu_that_it_was_set_for(monkeypatch):
    (case, *_) = op_cases.op_cases("bfloat16")
    assert case.goal is not None
    assert operators._goal(case, CPU) is None
    names = iter(["NVIDIA H200", "NVIDIA A100"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    assert [operators._goal(case, torch.device("cuda")) for _ in range(2)] == [case.goal, None]


@pytest.mark.parametrize(("flops", "share"), [(50_000_000, 0.5), (10_000_000, 0.8)], ids=["by compute", "by memory"])
def test_what_memory_bounds_is_held_against_its_cold_time(flops, share):
    samples = {"triton": {"graph": [100.0], "cold": [50.0]}}
    timings = {kind: {"median": sample[0]} for kind, sample in samples["triton"].items()}
    found = {"triton": {"ratio_kind": "graph", "timings": timings, "flops": flops, "least_bytes": 40_000}}
    operators._compare(found, samples, {"tflops": 1.0, "gbs": 1.0})  # 40 us by memory, 50 or 10 us by compute
    assert found["triton"]["roofline"] == pytest.approx(share)


def test_a_case_whose_reference_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(operators, "_reference", full)
    found = measure_case(MERGE, CPU, {"eager": eager(MERGE), "products": None})
    assert {values["reason"] for values in found.values()} == {"out of memory for inputs and reference"}


@every_case
def test_every_eager_way_of_computing_is_right(case):
    names = operators.names(case, CPU, ["eager", "eager-conv"])
    assert len(names) == (1 if case.layout == "block" or case.op == "gelu_mlp" else 2)
    rivals = {name: op_variants.function(case, name) for name in names}
    found = measure_case(case, CPU, {**rivals, "products": None}, rounds=1, ceilings={"tflops": 1.0, "gbs": 1.0})
    for name in rivals:
        assert found[name]["ok"], name
        assert found[name]["roofline"] > 0
        assert found[name]["peak_bytes"] > 0
    assert found["products"]["ok"] is None
    assert found["eager"]["bytes"] > found["eager"]["least_bytes"]


@pytest.mark.parametrize("op", ["patch_merge", "strided_conv_gelu", "multi_block_linear_gelu"])
def test_operations_are_those_that_torch_counts(op):
    from torch.utils.flop_counter import FlopCounterMode

    for direction in op_cases.DIRECTIONS:
        case = CASES[op, direction]
        tensors = operators._inputs(case, CPU, torch.float32)
        with FlopCounterMode(display=False) as forward:
            y = op_variants.function(case, "eager")(tensors)
        total = forward.get_total_flops()
        if direction != "forward":
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
            total = backward.get_total_flops() + (total if direction == "both" else 0)
        shapes = op_variants.product_shapes(case)
        assert sum(2 * m * n * k for m, n, k, _ in shapes) == total


def test_a_compiled_rival_takes_part_and_max_autotune_only_where_asked_for():
    assert set(operators.contenders(MERGE, CPU)) == {"eager", "eager-conv", "compile", "products"}
    assert "compile-max-autotune" in operators.contenders(MERGE, CPU, autotune=True)
    case = CASES["strided_conv_gelu", "forward"]
    found = measure_case(case, CPU, operators.contenders(case, CPU, ["eager", "compile"]), rounds=2)
    assert found["compile"]["ok"]
    assert found["eager"]["ratio_compile"]["median"] > 0


def test_the_interpreter_is_not_timed():
    assert "interpreter" in op_variants.unavailable("triton", MERGE, CPU)
    assert op_variants.unavailable("eager", MERGE, CPU) is None


def test_a_variant_that_refuses_a_case_has_its_reason_and_no_time(monkeypatch):
    case = replace(CASES["strided_conv_gelu", "forward"], channels=12, dtype="bfloat16")
    monkeypatch.setattr(select, "_no_cuda_kernels", lambda *_: None)
    found = measure_case(case, CPU, {name: op_variants.function(case, name) for name in ("eager", "cuda")}, rounds=2)
    assert found["eager"]["timings"]
    assert found["cuda"]["timings"] == {}
    assert found["cuda"]["reason"].startswith("UnsupportedError: x: got 12 channels, expected a multiple of 8 for impl='cuda'")
    monkeypatch.setattr(select, "interpreted", lambda: False)
    assert op_variants.unavailable("cuda", case, CPU).startswith("x: got 12 channels")
    assert op_variants.unavailable("cuda", replace(case, channels=16), CPU) is None


def test_a_convolution_has_no_part_in_block_order():
    assert "are no image" in op_variants.unavailable("eager-conv", BLOCK, CPU)
    assert op_variants.unavailable("eager-conv", MERGE, CPU) is None
    assert op_variants.unavailable("eager", BLOCK, CPU) is None


def test_eager_in_block_order_copies_no_tokens():
    case = replace(BLOCK, prefix=0)
    tensors = operators._inputs(case, CPU, torch.float32)
    with LiveTensors() as live:
        op_variants.function(case, "eager")(tensors)
    # Two products, GELU and the mean and its sum; a copy of the tokens would be as large as four of the outputs.
    out, hidden = (4 * case.rows * width for width in (case.channels, case.hidden))
    assert live.peak <= 3 * out + 2 * hidden
    raster = op_variants.function(replace(case, layout="raster"), "eager")
    with torch.no_grad():
        moved = {**tensors, "x": case.windows.to_raster_order(tensors["x"])}
        assert torch.equal(raster(moved), op_variants.function(case, "eager")(tensors))


def test_the_cases_are_those_of_the_papers_and_the_telling_ones_come_first():
    cases = op_cases.op_cases("bfloat16")
    assert len(cases) == len(set(cases)) == 3 * (6 * 4 * 2 + 2 * 4)
    assert [case.goal is not None for case in cases].index(False) == len(op_cases.GOALS)
    inside = op_cases.encoder_cases("bfloat16")
    assert len(inside) == len(set(inside)) == 3 * (4 * 2 + 2)
    for case in inside:
        config = SimpleNamespace(compression={"layout": "block"}, patch_size=1, prefix_tokens=case.windows.prefix_tokens)
        merge = build_compressor("laco", in_dim=case.channels, pad=True)
        assert case.facts["layout"] == route_of(config, [merge], *case.windows.grid).layout(0), (
            "as in an encoder of hf.compress"
        )
    assert {case.facts.get("layout") for case in cases if case.op != "patch_merge"} == {None}
    assert {case.batch for case in cases} == {1, 4, 16, 64}
    by_name = {case.encoder: case for case in cases if case.op == "patch_merge"}
    assert by_name["siglip-so400m-384"].rows == by_name["siglip-so400m-384"].batch * 14 * 14
    assert by_name["internvit-300m-448"].windows == Windows((32, 32), 2, 1, pad=True)
    sweep = op_cases.sweep_cases("bfloat16")
    assert {case.windows.num_patches for case in sweep if case.sweep == "tokens"} >= {196, 4096}
    assert {case.batch for case in sweep if case.sweep == "batch"} >= {1, 64}


def test_the_interval_of_a_median_is_that_of_its_ranks():
    # n = 15: ranks 4 to 12 of the binomial at 95 %, one further out by the rounding; n = 24: ranks 2 to 8 of 8 blocks of 3.
    found = spread([float(i) for i in range(1, 16)])
    assert (found.low, found.median, found.high) == (4.0, 8.0, 13.0)
    found = spread([float(i) for i in range(1, 25)])
    assert (found.low, found.median, found.high) == (5.0, 12.5, 23.0)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("rounds", [18, 36, 200])
def test_an_interval_covers_the_median_although_rounds_resemble_each_other(rounds, kept):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, rounds + 20, generator=generator, dtype=torch.float64)
    state, rows = torch.zeros(1000, dtype=torch.float64), []
    for step in noise.unbind(1):  # autoregressive: of each round a part is kept in the next
        state = kept * state + step
        rows.append(state)
    samples = torch.stack(rows[20:], dim=1).tolist()
    found = [spread(sample) for sample in samples]
    assert 0.93 <= sum(f.low <= 0 <= f.high for f in found) / 1000 <= 0.99
    assert all(f.low <= f.median <= f.high for f in found)


def test_what_one_tensor_may_err_is_what_the_promise_says():
    case = CASES["patch_merge", "both"]
    *_, truth, plain = operators._reference(case, CPU, torch.float32)
    verdict = operators._verdict(plain, plain, truth)
    assert verdict["ok"]
    alone = [testing.compare(p, p, t, []) for p, t in zip(plain, truth, strict=True)]
    assert (verdict["error"], verdict["budget"]) in [row[:2] for row in alone]
