"""Everything a newly available GPU should do, in one go: ``make gpu``.

First the CUDA extension, where there is nvcc; the tests that only a GPU can run; then ``laco bench all`` with the time that is
left, again where a kernel took the GPU away from it: the operators, ``laco tune``, the encoders on what that chose, ``laco
tune`` again; and the products of the CUDA kernels tile by tile. What failed and which rows are furthest from their goal comes
last. A folder gets rows, first and as they come, selection table and logs: it is what to take from a machine that is given
back. Rows of the same ``--commit`` that lie in ``benchmarks/results`` already are not measured again, so that a later call goes
on where an earlier one ended.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = [f"tests/kernels/test_{name}.py" for name in ("kernels", "cuda_anywhere", "tower_kernels")]
# What is most telling first; random shapes last, for each compiles kernels of its own.
TESTS = {
    "gpu": ["tests/gpu"],
    "kernels": ["tests/kernels", "-k", "not anywhere and not resources"],
    "random": [*KERNELS, "-k", "anywhere"],
}
OPERATORS = 0.6  # of the time for measuring
RESERVE = 30  # seconds for the selection table and the summary
BUILD, TILES = 120, 45  # seconds, at most: for compiling the CUDA extension, and for its tiles
LACO = (sys.executable, "-m", "laco_kernels.cli")
LATE = "not done in time"
BUSY, AGAIN = 2, 3  # exit codes of `laco bench all`: something forbids it; the GPU no longer answers it


def main() -> int:
    """Run it all; 1 where a test or a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--test-minutes", type=float, default=3.0, help="time for the tests, at most")
    parser.add_argument("--commit", default="", help="what to call this version where git cannot tell")
    parser.add_argument("--copy-to", type=Path, default=ROOT / "gpu", help="folder for rows, selection table, logs, summary")
    parser.add_argument("--only", choices=("tests", "bench"), help="leave the measurements out, or the tests")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a processor")
    options = parser.parse_args()
    begin, folder = time.monotonic(), options.copy_to.resolve()
    deadline = begin + 60 * options.minutes - RESERVE
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("build.log", "tune.log", "products.txt"):  # the other logs begin anew by themselves
        (folder / name).unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp())
    results = scratch / "results" if options.tiny else ROOT / "benchmarks" / "results"
    table = scratch / "winners.json" if options.tiny else ROOT / "src" / "laco_kernels" / "kernels" / "winners.json"

    outcome: dict[str, str] = {}
    code: int | None
    if not options.tiny and (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        # Else it would be left out where it fails, and whatever was built before with it.
        built = run(build, folder / "build.log", begin + BUILD, LACO_BUILD_CUDA="1")
        outcome["extension"] = {0: "built", None: LATE}.get(built, "failed")
    code = 0
    tuned: int | None = 0
    if options.only != "bench":
        outcome |= run_tests(
            scratch, min(time.monotonic() + 60 * options.test_minutes, deadline), "quick" if options.tiny else "gpu"
        )
        gather(sorted(scratch.glob("*.log")), folder / "tests.log")
    if options.only != "tests":
        (folder / "bench.log").write_text("")
        tune = [*LACO, "tune", str(results), "--out", str(table)]
        deadline -= 0 if options.tiny else TILES
        # Encoders run what the operators' rows choose, so these come first.
        measure(options, results, folder, time.monotonic() + OPERATORS * (deadline - time.monotonic()), "--filter=-vec")
        run(tune, folder / "tune.log", time.monotonic() + RESERVE)
        code = measure(options, results, folder, deadline)
        tuned = run(tune, folder / "tune.log", time.monotonic() + RESERVE)
        left = max(deadline + TILES - time.monotonic() - 15, 0)  # for starting, and for the shape that was begun last
        products = [sys.executable, "benchmarks/products.py", *(["--check"] if options.tiny else ["--seconds", f"{left:.0f}"])]
        measured = run(products, folder / "products.txt", deadline + TILES)
        outcome["products"] = {0: "measured", None: LATE}.get(measured, "failed")
        keep(results, folder)
        if table.exists():
            shutil.copy(table, folder / "winners.json")
        print((folder / "bench.log").read_text()[-6000:])
        print((folder / "tune.log").read_text()[-2000:])
        print(f"bench all: exit code {code}; tune: {tuned}")
    if options.only != "bench":
        for line in (folder / "tests.log").read_text().splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(line)
    for name, state in outcome.items():
        print(f"{name}: {state}")
    print(f"{time.monotonic() - begin:.0f} s")
    # A rehearsal has less time than it takes.
    bad = {"failed"} if options.tiny else {"failed", LATE}
    return 1 if code or tuned or bad & {*outcome.values()} else 0


def run_tests(scratch: Path, deadline: float, profile: str) -> dict[str, str]:
    """Run the groups of tests beside each other; return for each whether it passed, failed or had no time to end."""
    spread = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    running = {}
    for name, arguments in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-rfE", "-v", "-p", "no:cacheprovider", *spread, *arguments]
        with (scratch / f"{name}.log").open("w") as log:
            running[name] = start([*command, "--hypothesis-profile", profile], log)
    return {name: {0: "passed", None: LATE}.get(wait(p, deadline), "failed") for name, p in running.items()}


def measure(options: argparse.Namespace, results: Path, folder: Path, deadline: float, *only: str) -> int | None:
    """Run ``laco bench all`` until nothing is left or the time is; keep the rows as they come."""
    code: int | None = AGAIN
    extra = list(only)
    while code in (AGAIN, BUSY) and time.monotonic() < deadline:
        command = [*LACO, "bench", "all", "--out", str(results), "--budget", f"{max(deadline - time.monotonic() - 15, 0):.0f}s"]
        command += ["--commit", options.commit] if options.commit else []
        command += ["--tiny", "--seconds", "0"] if options.tiny else []
        code = run([*command, *extra], folder / "bench.log", deadline, meanwhile=lambda: keep(results, folder))
        if code == BUSY and "--allow-busy" in extra:
            break
        if code == BUSY:  # or wrong use; tests that had to be stopped may be dying still
            extra.append("--allow-busy")
    return code


def run(arguments: list[str], log: Path, deadline: float, meanwhile=lambda: None, **env: str) -> int | None:
    """Run one command and return its exit code, ``None`` where it had to be stopped."""
    with log.open("a") as stream:
        process = start(arguments, stream, **env)
    while process.poll() is None and time.monotonic() < deadline - 5:
        time.sleep(1)
        meanwhile()
    return wait(process, deadline)


def start(command: list[str], stream, **env: str) -> subprocess.Popen:
    """Start a process that writes both its outputs to ``stream``; ``env`` is added to the environment."""
    env = {**os.environ, **env}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def wait(process: subprocess.Popen, deadline: float) -> int | None:
    """Return the exit code, or ``None`` after ``deadline``: interrupted, so that what is known is reported, at last killed."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def keep(results: Path, folder: Path) -> None:
    """Copy the rows of every device, under its name."""
    for file in results.glob("*/measurements.jsonl"):
        shutil.copy(file, folder / f"{file.parent.name}.jsonl")


def gather(logs: list[Path], target: Path) -> None:
    """Put several logs into one."""
    target.write_text("\n".join(f"=== {log.stem}\n{log.read_text()}" for log in logs))


if __name__ == "__main__":
    sys.exit(main())
