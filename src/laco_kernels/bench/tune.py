"""``laco tune``: the selection table, made from measured rows.

A bucket is one operator, direction, form (layout, kind of norm, activation) and dtype up to a number of output tokens. In it an
implementation is chosen only where it is at least 3 % faster than every simpler one over the bucket's cases (geometric mean,
graphs replayed), and in no case, whatever its width, slower than the best eager row: neither by the paired ratio nor by a time,
warm or cold. Every case must have passed its check; its rows must come from one run of at least ten rounds, at a commit without
changes.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from laco_kernels.bench.gpu_timing import COLD, GRAPH, ROUNDS
from laco_kernels.bench.op_variants import CONVOLUTION, EAGER, OURS
from laco_kernels.geometry import Windows
from laco_kernels.kernels import select

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from laco_kernels.bench.results import Results, Row

LEAD = 1.03
REFERENCE = "reference"
SUITES = ("ops", "sweep", "tower")
PARTS = ("op", "direction", *dict.fromkeys(select.FORMS.values()), "dtype")  # of what a bucket is for
Times = dict[str, dict[str, float]]  # microseconds by variant and kind of time, of those that passed


def table(devices: Iterable[Results]) -> dict[str, Any]:
    """Return the selection table of all GPUs among ``devices``, as ``winners.json`` has it."""
    found: dict[str, Any] = {}
    for results in devices:
        rows = [row for row in results.latest() if row.suite in SUITES]
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            block = results.environments[row.environment]
            if block.get("capability"):
                by_name.setdefault(block["device"], []).append(row)
                found[block["device"]] = {"capability": block["capability"], "rows": []}
        for name, mine in by_name.items():
            found[name]["rows"] = winners(mine)
    return {name: found[name] for name in sorted(found) if found[name]["rows"]}


def winners(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one device's buckets, by what they are for and growing number of tokens; equal neighbours as one."""
    cases: dict[tuple[str, str, str, str, int], dict[str, Times]] = {}
    runs: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row.variant != EAGER):
        case, name = row.case, json.dumps(row.case, sort_keys=True)
        if case["direction"] == "both" or str(row.commit).endswith("*"):
            continue
        key = (case["op"], case["direction"], select.form_of(case) or "", case["dtype"], output_tokens(case))
        times = cases.setdefault(key, {}).setdefault(name, {})
        if runs.setdefault(name, row.environment) != row.environment or not row.values["ok"]:
            continue
        if row.variant in OURS and (row.values.get("ratio_eager") or {}).get("median", 1) < 1:
            continue  # and what has no time in one of the cases is not chosen
        spreads = row.values["timings"]
        if GRAPH in spreads and spreads[GRAPH]["rounds"] >= ROUNDS:
            times[row.variant] = {kind: spreads[kind]["median"] for kind in (GRAPH, COLD) if kind in spreads}
    buckets = [(key[:4], key[4], best(list(cases[key].values()))) for key in sorted(cases)]
    merged: list[dict[str, Any]] = []
    for ((op, direction, form, dtype), impl), group in groupby(buckets, key=lambda bucket: (bucket[0], bucket[2])):
        what = {"op": op, "direction": direction, **({select.FORMS[op]: form} if form else {}), "dtype": dtype}
        merged.append({**what, "up_to": max(tokens for _, tokens, _ in group), "impl": impl})
    return merged


def best(cases: Sequence[Times]) -> str:
    """Return the implementation of one bucket, by the module's rule."""
    simpler, chosen = [EAGER], REFERENCE
    for impl in OURS:
        if not all(impl in times and EAGER in times for times in cases):
            continue
        leads = [math.prod(times[rival][GRAPH] / times[impl][GRAPH] for times in cases) for rival in simpler]
        if min(leads) >= LEAD ** len(cases) and not any(_is_slower(times, impl) for times in cases):
            chosen = impl
        simpler.append(impl)
    return chosen


def _is_slower(times: Times, impl: str) -> bool:
    """Whether ``impl`` takes longer than the best eager row in any kind of time that both have."""
    rivals = [times[name] for name in (EAGER, CONVOLUTION) if name in times]
    return any(kind in rival and time > rival[kind] for kind, time in times[impl].items() for rival in rivals)


def output_tokens(case: dict[str, Any]) -> int:
    """Return what the selection sizes a call by: the patch tokens coming out, over the batch; inside an encoder all tokens."""
    if "tokens" in case:
        return int(case["batch"] * case["tokens"])
    windows = Windows(case["grid"], 2, 0, pad=True)
    tokens = windows.num_patches if case["op"] == "multi_block_linear_gelu" else windows.num_windows
    return int(case["batch"]) * tokens


def dumps(found: dict[str, Any]) -> str:
    """Return the table as the text of its file, one bucket a line."""
    parts = []
    for name, entry in found.items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in entry["rows"])
        parts.append(f'  {json.dumps(name)}: {{"capability": {json.dumps(entry["capability"])}, "rows": [\n{rows}\n  ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two tables, a line a bucket."""

    def buckets(found: dict[str, Any]) -> dict[tuple[str, ...], str]:
        return {
            (name, " ".join(str(row[part]) for part in PARTS if part in row), str(row["up_to"])): row["impl"]
            for name, entry in found.items()
            for row in entry["rows"]
        }

    before, after = buckets(old), buckets(new)
    lines = []
    for key in [*after, *[key for key in before if key not in after]]:
        if before.get(key) != after.get(key):
            name, what, up_to = key
            change = f"{before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
            lines.append(f"{name}: {what} up to {up_to} tokens: {change}")
    return lines


def write(found: dict[str, Any], file: Path) -> None:
    """Put the table in place."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(dumps(found), encoding="utf-8")
    part.replace(file)
