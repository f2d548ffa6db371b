"""``laco bench ops``, ``laco bench all`` and ``laco bench compare``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laco_kernels.cli.common import (
    Device,
    Json,
    bench,
    complain,
    err_console,
    out_console,
    parse_device,
    parse_dtype,
    print_json,
    progress_bar,
    quiet_transformers,
    usage_errors,
)
from laco_kernels.errors import complaint
from laco_kernels.ops.checks import LAYOUTS

if TYPE_CHECKING:
    import torch

    from laco_kernels.bench.campaign import Report, Unit
    from laco_kernels.bench.results import Results

ROOT = Path("benchmarks/results")
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on a GPU.")]
Filter = Annotated[str | None, typer.Option("--filter", help="Only names with all these words, and none behind a minus.")]
Small = Annotated[bool, typer.Option("--tiny", help="Shrunken cases, to try the command.")]
Autotune = Annotated[bool, typer.Option("--autotune", help="torch.compile's max-autotune in every case; slow.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds to time; default: as many as --seconds allow.")]
Seconds = Annotated[
    float | None,
    typer.Option(min=0, help="Time for the rounds of a case, of which 10 to 200 are run; default: 1, on a GPU 0.5."),
]
Busy = Annotated[bool, typer.Option("--allow-busy", help="Measure although other processes compute on the GPU.")]
Commit = Annotated[str | None, typer.Option(help="What to call this version; default: the checkout's commit.")]


@bench.command()
def ops(
    only: Filter = None,
    variants: Annotated[str | None, typer.Option(help="Who competes, e.g. eager,compile,triton; default: all.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    tiny: Small = False,
    autotune: Autotune = False,
    rounds: Rounds = None,
    seconds: Seconds = None,
    allow_busy: Busy = False,
    commit: Commit = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results to keep the rows in, a folder for each device.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the operators against eager, channels-last convolution and torch.compile on the papers' shapes.

    Those inside an encoder (--filter add_norm, gated_silu, activate, gelu_mlp) against what transformers' layers do there.

    Ratios are to the best eager row and the best torch.compile row, paired round by round in one interleaved run. A row that
    fails its check against float64 has no time.
    """
    with usage_errors():
        from laco_kernels.bench import op_cases, op_table, op_variants, plan, tower_cases

        others = _others(allow_busy, device)
        place, precision = parse_device(device), _precision(dtype, device)
        every = (op_cases.op_cases, op_cases.encoder_cases, op_cases.sweep_cases, op_cases.mlp_cases, tower_cases.tower_cases)
        cases: list[tower_cases.AnyCase] = list(dict.fromkeys(case for part in every for case in part(precision)))
        cases = op_cases.tiny(cases) if tiny else cases
        chosen = [case for case in cases if matches(str(case), only or "")]
        if not chosen:
            raise ValueError(complaint("filter", repr(only), "words of a case's name", f"For instance {cases[0]}"))
        names = variants.split(",") if variants else None
        for name in names or []:
            if name not in op_variants.VARIANTS:
                known = ", ".join(op_variants.VARIANTS)
                raise ValueError(complaint("variants", repr(name), f"names among {known}", "Separate them with commas"))
        results, block, limits = _open(out, place, precision, commit, others)
    options: dict[str, Any] = {"variants": names, "autotune": autotune, "limits": limits, "rounds": rounds}
    units = [plan.op_unit(case, place, seconds=_seconds(seconds, place), **options) for case in chosen]
    report = _run(units, results, block, place, None)
    if as_json:
        print_json(_as_json(report, results))
    else:
        for text in op_table.tables(report.rows):
            out_console.print(text)
        _summarise(report, results)
    _finish(report)


@bench.command("all")
def everything(
    budget: Annotated[str | None, typer.Option(help="Time to spend, e.g. 8m, 90s or 1h; default: until all is done.")] = None,
    only: Filter = None,
    dtype: Dtype = None,
    device: Device = None,
    tiny: Small = False,
    autotune: Autotune = False,
    rounds: Rounds = None,
    seconds: Seconds = None,
    warm: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that compile before measuring begins; default: on a GPU one a core, at most 14."),
    ] = None,
    allow_busy: Busy = False,
    commit: Commit = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; default: benchmarks/results, none with --tiny.")] = None,
    as_json: Json = False,
) -> None:
    """Measure everything, the most telling first, until the budget ends; what this commit measured here before is skipped.

    On a GPU other processes first compile what will be measured, in at most a fifth of the budget. Nothing is timed meanwhile.
    Exit code 3 says that the GPU no longer answers this process: the same command again goes on behind what broke it.
    """
    out = out if out is not None or tiny else ROOT
    with usage_errors():
        from laco_kernels.bench import plan

        seconds_left = parse_budget(budget)
        others = _others(allow_busy, device)
        place, precision = parse_device(device), _precision(dtype, device)
        results, block, limits = _open(out, place, precision, commit, others)
        quiet_transformers()
        options: dict[str, Any] = {"small": tiny, "autotune": autotune, "rounds": rounds, "seconds": _seconds(seconds, place)}
        units = [unit for unit in plan.plan(place, precision, limits=limits, **options) if matches(unit.name, only or "")]
        if not units:
            raise ValueError(complaint("filter", repr(only), "words of a unit's name", "Leave it out to measure everything"))
    seconds_left = _compile_ahead(units, results, block, place, warm, seconds_left)
    report = _run(units, results, block, place, seconds_left)
    if as_json:
        print_json(_as_json(report, results))
    else:
        _summarise(report, results)
    _finish(report)


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A device's folder of results, or its file.")],
    new: Annotated[Path, typer.Argument(help="Another, measured later.")],
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="How much slower is no regression, as a fraction.")] = 0.03,
    any_device: Annotated[bool, typer.Option("--any-device", help="Compare results of different devices.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two results row by row; exit code 1 where a row is slower beyond the intervals of both, or gone.

    Rows of PyTorch itself and of the bare products are compared and do not count.
    """
    with usage_errors():
        from laco_kernels.bench import compare as comparing

        before, after = (_stored(path) for path in (old, new))
        devices = [{str(block.get("device")) for block in side.environments.values()} for side in (before, after)]
        if devices[0] != devices[1] and not any_device:
            given = f"{', '.join(sorted(devices[1]))} against {', '.join(sorted(devices[0]))}"
            raise ValueError(complaint("new", given, "results of one device", "Pass --any-device to compare them nevertheless"))
        changes, missing = comparing.compare(before, after), comparing.missing(before, after)
        if not changes:
            raise ValueError(complaint("new", str(new), "rows that stand in both results", "Measure the same cases"))
    slower = [change for change in changes if change.counts and change.is_slower(tolerance)]
    if as_json:
        print_json([{**vars(change), "slower": change.is_slower(tolerance)} for change in changes])
    else:
        for change in changes:
            mark = "SLOWER" if change in slower else "      "
            case = " ".join(f"{name}={value}" for name, value in change.case.items())
            spread = "lost its time" if change.broke else f"{change.ratio:.3f}x ({change.low:.3f}-{change.high:.3f})"
            text = f"{mark} {spread} {change.variant} {case}"
            out_console.print(text, style="red" if change in slower else None, markup=False, highlight=False, soft_wrap=True)
        for row in missing:
            facts = " ".join(f"{name}={value}" for name, value in row.case.items())
            out_console.print(f"MISSING {row.variant} {facts}", style="red", markup=False, highlight=False, soft_wrap=True)
        text = f"{len(changes)} rows, {len(slower)} slower, {len(missing)} missing; "
        out_console.print(f"{text}geometric mean {comparing.overall(changes):.3f}x", style="bold", highlight=False)
    if slower or missing:
        raise typer.Exit(1)


def matches(name: str, words: str) -> bool:
    """Return whether a case's name has all the words, and none of those behind a minus.

    ``batch=1`` and ``block`` are looked for as they are, others as a part of a word.
    """
    parts = name.split()

    def has(word: str) -> bool:
        return any(word == part if "=" in word or word in LAYOUTS else word in part for part in parts)

    return all(not has(word[1:]) if word.startswith("-") else has(word) for word in words.split())


def parse_budget(text: str | None) -> float | None:
    """Return ``"8m"``, ``"90s"``, ``"1h"`` or plain seconds as seconds; ValueError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found:
        raise ValueError(complaint("budget", repr(text), "a time such as 8m, 90s or 1h", "Pass --budget 8m"))
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _others(allow_busy: bool, device: str | None) -> list[int]:
    """Return other processes that compute on a GPU, and refuse to measure beside them."""
    from laco_kernels.bench.environment import other_processes

    # Asked before this process uses the GPU and is one of them itself.
    busy = other_processes()
    if busy and not allow_busy and parse_device(device).type == "cuda":
        given = f"a GPU on which other processes compute (pid {', '.join(map(str, busy))})"
        raise RuntimeError(complaint("device", given, "a GPU of our own, for times to mean something", "Pass --allow-busy"))
    return busy


def _precision(dtype: str | None, device: str | None) -> str:
    return str(parse_dtype(dtype, device)).removeprefix("torch.")


def _open(
    out: Path | None, place: torch.device, precision: str, commit: str | None, others: list[int]
) -> tuple[Results, str, dict[str, float]]:
    """Open a device's results, which are kept where ``out`` is given, and look at the machine."""
    from laco_kernels.bench import campaign, report
    from laco_kernels.bench.environment import environment
    from laco_kernels.bench.results import Results, folder_name

    if out is None:
        results = Results(None)
    else:
        folder = out / folder_name(environment(place))
        report.check_folder(folder)
        results = Results.open(folder)
    return results, *campaign.begin(results, place, precision, commit, others)


def _seconds(given: float | None, place: torch.device) -> float:
    return given if given is not None else 0.5 if place.type == "cuda" else 1.0


def _compile_ahead(
    units: list[Unit], results: Results, block: str, place: torch.device, count: int | None, budget: float | None
) -> float | None:
    """Let ``count`` processes compile what is to be measured; return what is left of the budget."""
    from laco_kernels.bench import campaign, warm

    begin = time.monotonic()
    jobs = [unit.compile for unit in campaign.pending(units, results, block) if unit.compile is not None]
    count, seconds = warm.processes(place) if count is None else count, warm.time_for(budget)
    if not (jobs and count and seconds):
        return budget
    with progress_bar() as step:
        if not err_console.is_terminal:
            print(f"compiling {len(jobs)} units in {count} processes, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        done, broken = warm.warm(jobs, count, place, seconds, lambda n: step("compiling", n / len(jobs)))
    spent = time.monotonic() - begin
    broke = f", {broken} broke" if broken else ""
    print(f"compiled {done} of {len(jobs)} units{broke} in {spent:.0f} s", file=sys.stderr, flush=True)
    return None if budget is None else max(budget - spent, 0.0)


def _run(units: list[Unit], results: Results, block: str, place: torch.device, budget: float | None) -> Report:
    from laco_kernels.bench import campaign

    with progress_bar() as step:

        def begin(name: str, done: float) -> None:
            step(name, done)
            if not err_console.is_terminal:
                print(f"measuring {name}", file=sys.stderr, flush=True)

        return campaign.run(units, results, block, place, budget=budget, on_unit=begin)


def _summarise(report: Report, results: Results) -> None:
    from laco_kernels.bench.campaign import furthest

    counts = f"{len(report.measured)} measured, {len(report.skipped)} measured before, {len(report.left)} left for lack of time"
    out_console.print(f"{counts}, {len(report.failed)} failed", style="bold", highlight=False)
    for row in report.rows:
        if row.values["reason"]:
            case = " ".join(map(str, row.case.values()))
            out_console.print(f"no time: {row.variant} {case}: {row.values['reason']}", markup=False, highlight=False)
    far = furthest(results.latest())
    if far:
        out_console.print("\nfurthest from their goal", highlight=False)
    for row, share in far:
        goal, facts = row.values["goal"], row.case
        have = share * goal["ratio"]
        text = f"{have:.2f}x of {goal['ratio']:.2f}x over {goal['against']}: {row.variant} {facts['op']} {facts['encoder']}"
        text += f" batch={facts['batch']} hidden={facts['hidden']} {facts['direction']}"
        out_console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
    if results.file is not None and report.rows:
        err_console.print(f"wrote {results.file}", markup=False, highlight=False, soft_wrap=True)


def _as_json(report: Report, results: Results) -> dict[str, Any]:
    rows = [vars(row) for row in report.rows]
    names = ("measured", "skipped", "left", "failed")
    blocks = {row.environment: results.environments[row.environment] for row in report.rows}
    file = None if results.file is None else str(results.file)
    return {**{name: getattr(report, name) for name in names}, "rows": rows, "environments": blocks, "file": file}


def _finish(report: Report) -> None:
    for name, reason in report.failed.items():
        complain(f"{name}: {reason}")
    if report.lost:
        complain("The GPU no longer answers this process; the same command again goes on with the next unit.")
        raise typer.Exit(3)
    if report.failed or any(row.values["ok"] is False for row in report.rows):
        raise typer.Exit(1)


def _stored(path: Path) -> Results:
    from laco_kernels.bench.results import FILE, Results

    folder = path.parent if path.is_file() else path
    if not (folder / FILE).is_file():
        raise ValueError(complaint("results", str(path), f"a folder with {FILE}", "Pass one below benchmarks/results"))
    return Results.open(folder)
