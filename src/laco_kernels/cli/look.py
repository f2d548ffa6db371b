"""``laco env`` and ``laco check``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
import typer

from laco_kernels.cli.common import (
    DTYPES,
    Device,
    Json,
    app,
    out_console,
    parse_device,
    parse_dtype,
    print_json,
    progress_bar,
    usage_errors,
)
from laco_kernels.errors import complaint


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions, devices, and which implementations are available."""
    from laco_kernels.bench.environment import automatic_choices, environment, implementations

    report = environment()
    if as_json:
        choices = {name: choice._asdict() for name, choice in automatic_choices().items()}
        print_json({**report, "implementations": implementations(), "automatic_choice": choices})
        return
    for name, value in report.items():
        text = ", ".join(value) if isinstance(value, list) else value
        out_console.print(f"{name:<14} {text or 'none'}", markup=False, highlight=False, soft_wrap=True)
    out_console.print("\nimplementations")
    for name, reason in implementations().items():
        text = "available" if reason is None else f"not available: {reason}"
        out_console.print(f"  {name:<12} {text}", markup=False, highlight=False, soft_wrap=True)
    out_console.print("\nautomatic choice")
    for name, (impl, reason) in automatic_choices().items():
        out_console.print(f"  {name:<24} {impl}: {reason}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def check(
    op: Annotated[str | None, typer.Option(help="One operator, such as patch_merge or add_norm; default: all.")] = None,
    impl: Annotated[str | None, typer.Option(help="composite, triton or cuda; default: all that can run.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: all three.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Check output and gradients of every implementation that can run here against float64, on a spread of shapes.

    Exit code 1 where a row failed, or nothing could be checked. Without a GPU set TRITON_INTERPRET=1 to check the Triton
    kernels in the interpreter. On a GPU the verdict is kept for the automatic choice.
    """
    with usage_errors():
        from laco_kernels import testing, testing_tower
        from laco_kernels.kernels import select

        place = parse_device(device)
        dtypes = [parse_dtype(dtype, device)] if dtype is not None else list(DTYPES.values())
        operators = (*select.OPERATORS, *select.TOWER_OPERATORS)
        named = select.IMPLEMENTATIONS if op not in operators else select.implementations(op)
        for name, value, known in (("op", op, operators), ("impl", impl, named)):
            if value is not None and value not in known:
                raise ValueError(complaint(name, repr(value), f"one of {', '.join(known)}", f"Drop --{name} to check all"))
        if impl is not None:
            reasons = [reason for precision in dtypes if (reason := select.unavailable(impl, place, precision))]
            if len(reasons) == len(dtypes):
                raise RuntimeError(complaint("impl", repr(impl), f"one that can run, but {reasons[0]}", "Drop --impl"))
    impls = [impl] if impl is not None else [name for name in named if name != "reference"]
    every: list[testing.Case | testing_tower.TowerCase] = [*testing.CASES, *testing_tower.CASES]
    if place.type == "cuda":
        every += [*testing.LARGE_CASES, *testing_tower.LARGE_CASES]
    cases = [case for case in every if op in (None, case.op) and impl in (None, *select.implementations(case.op))]
    rows: list[testing.Row] = []
    with progress_bar() as step:
        for i, case in enumerate(cases):
            step(f"checking {case.op}", i / len(cases))
            rows += testing.check([case], impls, dtypes, place)
    if place.type == "cuda" and impl is None:
        for name in {case.op for case in cases}:
            for precision in dtypes:
                mine = [row.ok for row in rows if row.op == name and row.dtype == str(precision).removeprefix("torch.")]
                select.record(torch.cuda.get_device_name(place), name, str(precision), ok=bool(mine) and all(mine))
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        out_console.print("     impl      dtype    tensor    error of budget  case", style="bold", highlight=False)
        for row in rows:
            tick = "ok  " if row.ok else "FAIL"
            text = f"{tick} {row.impl:<9} {row.dtype:<8} {row.tensor:<8} {row.error:8.1e} of {row.budget:.1e}  {row.case}"
            out_console.print(text, style=None if row.ok else "red", markup=False, highlight=False, soft_wrap=True)
        failed = sum(not row.ok for row in rows)
        for name in impls:
            for precision in dtypes:
                if reason := select.unavailable(name, place, precision):
                    text = f"not checked: {name} in {str(precision).removeprefix('torch.')}: {reason}"
                    out_console.print(text, markup=False, highlight=False, soft_wrap=True)
                    continue
                refused = [reason for case in cases if (reason := testing.refusal(case, name, precision, place))]
                if refused:
                    text = (
                        f"not checked: {name} in {str(precision).removeprefix('torch.')} on {len(refused)} shapes: {refused[0]}"
                    )
                    out_console.print(text, markup=False, highlight=False, soft_wrap=True)
        out_console.print(f"{len(rows) - failed} passed, {failed} failed", style="bold", highlight=False)
    if not rows or not all(row.ok for row in rows):  # having checked nothing is no success
        raise typer.Exit(1)
