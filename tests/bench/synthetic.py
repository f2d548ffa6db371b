"""Made-up measurements of two devices: numbers that look real, and every kind of row that a report must cope with."""

import math

from laco_kernels.bench.cases import PAPER_MS
from laco_kernels.bench.results import Results, Row

ENVIRONMENT = {
    "laco_kernels": "0.1.0",
    "commit": "0123456789ab",
    "date": "2026-11-20 09:53 UTC",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.17.0",
    "numpy": "2.4.6",
    "system": "Linux x86_64",
    "cpu": "Example CPU 9000",
    "cpu_threads": 2,
    "cuda": None,
    "gpus": [],
    "device": "Example CPU 9000",
    "driver": None,
    "clocks_before": None,
    "clocks_after": None,
    "ceilings": None,
}
GPU = {
    **ENVIRONMENT,
    "cpu_threads": 16,
    "cuda": "13.0",
    "gpus": ["Example H900"],
    "device": "Example H900",
    "driver": "580.95.05",
    "clocks_before": {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 41.0, "watts": 121.44},
    "clocks_after": {"sm_mhz": 1935.0, "memory_mhz": 3201.0, "celsius": 63.0, "watts": 655.2},
    "ceilings": {"tflops": 732.4567, "gbs": 4123.9},
}
ENCODERS = {"aimv2-l-336": (24, 1024), "siglip-so400m-384": (27, 1152), "internvit-300m-448": (32, 1024)}
SPEED = {"eager": 1, "eager-conv": 0.9, "compile": 1.25, "compile-max-autotune": 1.35, "composite": 1.36, "triton": 1.6}
SPEED |= {"products": 2.2}
OUT_OF_MEMORY = "out of memory: 151.2 GiB of activations do not fit into 139.8 GiB"


def spread(median, width=0.01):
    return {
        "median": median,
        "p20": median * (1 - 2 * width),
        "p80": median * (1 + 2 * width),
        "low": median * (1 - width),
        "high": median * (1 + width),
        "rounds": 41,
    }


def interval(median, width=0.015):
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def case(op="patch_merge", encoder="aimv2-l-336", batch=16, direction="forward", **more):
    side, channels = ENCODERS.get(encoder, (16, 1024))
    base = {"op": op, "encoder": encoder, "batch": batch, "channels": channels, "hidden": 4 * channels}
    base |= {"direction": direction, "dtype": "bfloat16", "grid": [side, side]}
    return {**base, **({"layout": "raster"} if op == "patch_merge" else {}), **more}


def operator_row(case, variant, environment, *, gpu, speed=None, suite="ops", goal=None, **values):
    tokens = case["grid"][0] * case["grid"][1] * case["batch"]
    passes = {"forward": 1, "backward": 2, "both": 3}[case["direction"]]
    flops = passes * 2 * tokens * case["channels"] ** 2 * 5 // 4
    grown = 0.06 * math.log(tokens / 9216) if variant in ("composite", "triton") else 0
    speed = speed or SPEED[variant] * (1 + grown)
    median = (14 + flops / (3.1e8 if gpu else 5e4)) / speed
    kinds = ("graph", "cold") if gpu else ("wall",)
    timed = {
        "ok": None if variant == "products" else True,
        "error": None if variant == "products" else 1.4e-3,
        "budget": None if variant == "products" else 4.2e-3,
        "reason": None,
        "timings": {kind: spread(median * (1.3 if kind == "cold" else 1)) for kind in kinds},
        "ratio_eager": interval(speed),
        "ratio_compile": interval(speed / 1.35),
        "roofline": 0.42 * speed if gpu else None,
        "flops": flops,
        "bytes": tokens * case["channels"] * 6 if gpu else None,
        "peak_bytes": int(tokens * case["channels"] * 8 / speed),
        "goal": goal,
    }
    return Row(suite, case, variant, {**timed, **values}, environment, "0123456789ab")


def untimed(reason, **more):
    nothing = {"timings": {}, "ratio_eager": None, "ratio_compile": None, "roofline": None, "peak_bytes": None}
    return {"ok": None, "error": None, "budget": None, "reason": reason, **nothing, **more}


def vec_row(encoder, depth, variant, environment, *, gpu, batch, ratio, **values):
    base = 58e3 if gpu else 2256e3
    paper = PAPER_MS.get(encoder, {})
    of_paper = {str(at): paper[max(paper)] / ms for at, ms in paper.items()}.get(depth)
    measured = {
        "ok": True,
        "error": 6e-7,
        "budget": 1.4e-6,
        "reason": None,
        "timings": {"wall": spread(base / ratio)},
        "ratio": interval(ratio, 0.004),
        "paper_ratio": of_paper,
        "tokens": 144,
        "layer": 6,
        "gflops": 390 / ratio,
        "added_parameters": 5244928,
        "peak_bytes": 31 << 20,
        "overhead": 0.0017,
        "tokens_in": 576,
    }
    what = {"encoder": encoder, "batch": batch, "dtype": "bfloat16" if gpu else "float32", "depth": depth}
    return Row("vec", what, variant, {**measured, **values}, environment, "0123456789ab")


def vec_rows(environment, *, gpu, batch=1, encoders=("aimv2-l-336", "siglip-so400m-384", "our own encoder")):
    ratios = {"1/12": 2.67, "1/6": 2.34, "1/4": 2.06, "1/2": 1.52, "1": 1.0}
    for i, encoder in enumerate(encoders):
        for depth, ratio in ratios.items():
            yield vec_row(encoder, depth, "eager", environment, gpu=gpu, batch=batch, ratio=1 + (ratio - 1) * (1 + i / 9))
            if gpu:
                yield vec_row(encoder, depth, "compile", environment, gpu=gpu, batch=batch, ratio=1.2 * ratio)


def sweep_rows(environment, *, gpu):
    for side in (14, 24, 27, 32, 48, 64) if gpu else (14, 24, 32):
        for variant in SPEED:
            yield operator_row(
                case(encoder="-", grid=[side, side], batch=4, sweep="tokens"), variant, environment, gpu=gpu, suite="sweep"
            )
    for batch in (1, 2, 4, 8, 16, 32, 64) if gpu else (1, 4):
        for variant in SPEED:
            yield operator_row(
                case(encoder="-", grid=[24, 24], batch=batch, sweep="batch"), variant, environment, gpu=gpu, suite="sweep"
            )


def gpu_results(folder):
    """Everything, with a losing row, a goal met and one missed, a failed tick and a row that ran out of memory."""
    results = Results.open(folder)
    name = results.begin(GPU)
    rows = [*vec_rows(name, gpu=True, batch=16), *sweep_rows(name, gpu=True)]
    for op in ("patch_merge", "strided_conv_gelu", "multi_block_linear_gelu"):
        for encoder in ENCODERS:
            for direction in ("forward", "both"):
                goal = {"ratio": 1.12, "against": "compile"} if encoder == "aimv2-l-336" else None
                rows += [
                    operator_row(
                        case(op, encoder, direction=direction),
                        variant,
                        name,
                        gpu=True,
                        goal=goal if variant == "triton" else None,
                    )
                    for variant in SPEED
                ]
    rows += [
        operator_row(case(direction=direction, layout="block"), variant, name, gpu=True)
        for direction in ("forward", "both")
        for variant in SPEED
        if variant != "eager-conv"
    ]
    rows.append(operator_row(case("strided_conv_gelu"), "triton", name, gpu=True, speed=0.8))  # loses against both
    goal = {"ratio": 2.5, "against": "eager"}
    rows.append(operator_row(case("multi_block_linear_gelu"), "triton", name, gpu=True, speed=1.9, goal=goal))  # short of it
    failed = {"ok": False, "error": 0.31, "budget": 4.2e-3}  # and yet it has a time, which nobody may see
    rows.append(operator_row(case(encoder="siglip-so400m-384"), "triton", name, gpu=True, speed=1.777, **failed))
    for variant in ("eager", "triton"):
        rows.append(operator_row(case(batch=512), variant, name, gpu=True, **untimed(OUT_OF_MEMORY)))
    results.add(rows)
    return folder


def cpu_results(folder, *more):
    """A CPU with encoders and a sweep, from two commits."""
    results = Results.open(folder)
    name = results.begin(ENVIRONMENT)
    later = results.begin({**ENVIRONMENT, "date": "2026-11-21 10:00 UTC", "commit": "ba9876543210"})
    rows = [*vec_rows(name, gpu=False, encoders=("aimv2-l-336",)), *sweep_rows(later, gpu=False)]
    rows += [operator_row(case(batch=1), variant, later, gpu=False) for variant in ("eager", "compile", "composite")]
    results.add([*rows, *more])
    return folder
