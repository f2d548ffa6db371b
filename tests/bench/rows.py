"""Rows as a GPU would have measured them."""

from laco_kernels.bench.results import Row

GPU = {"device": "NVIDIA H200", "gpus": ["NVIDIA H200"], "capability": "9.0", "date": "2026-01-01 00:00 UTC", "commit": "c"}


def spread(median, reach):
    return {
        "median": median,
        "p20": median - reach / 2,
        "p80": median + reach / 2,
        "low": median - reach,
        "high": median + reach,
        "rounds": 20,
    }


def op_row(variant, median, *, environment, ok=True, batch=1, hidden=4096, direction="forward", commit="c", goal=None, **case):
    """A row of ``laco bench ops`` whose graph-replayed time is known."""
    facts = {
        "op": "patch_merge",
        "encoder": "aimv2-l-336",
        "batch": batch,
        "channels": 1024,
        "hidden": hidden,
        "direction": direction,
        "dtype": "bfloat16",
        "grid": [24, 24],
        "layout": "raster",
        **case,
    }
    ratio = dict.fromkeys(("median", "low", "high"), 100.0 / median)
    values = {
        "ok": ok,
        "reason": None if ok else "wrong",
        "timings": {"graph": spread(median, 1)} if ok else {},
        "ratio_eager": ratio if ok else None,
        "ratio_compile": ratio if ok else None,
        "goal": goal,
    }
    return Row("ops", facts, variant, values, environment, commit)
