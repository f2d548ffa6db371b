"""Everything a newly available GPU should do, in one go: ``make gpu``.

The tests that only a GPU can run, several processes of them at once; then ``laco bench all`` with the time that is left; then
``laco tune``. What failed and which rows are furthest from their goal comes last. Logs, rows and the selection table are also
copied to a folder, to be taken from a machine that is given back.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = "tests/kernels/test_kernels.py"
# Each compiles kernels of its own, which is what takes the time.
TESTS = {
    "gpu": ["tests/gpu"],
    "kernels": ["tests/kernels", "-k", "not anywhere and not resources"],
    **{
        f"{name}-{impl}": [KERNELS, "-k", f"{name}_anywhere and {impl}"]
        for name in ("patch_merge", "strided_conv_gelu", "multi_block_linear_gelu")
        for impl in ("triton", "composite")
    },
}
RESERVE = 30  # seconds for the selection table and the summary


def main() -> int:
    """Run it all; 1 where a test or a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.7, help="time for everything")
    parser.add_argument("--test-minutes", type=float, default=3.0, help="time for the tests, at most")
    parser.add_argument("--commit", default="", help="what to call this version where git cannot tell")
    parser.add_argument("--copy-to", type=Path, default=ROOT / "gpu", help="folder for logs, rows and the selection table")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a processor")
    options = parser.parse_args()
    begin = time.monotonic()
    folder = options.copy_to.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results" if options.tiny else ROOT / "benchmarks" / "results"
    table = folder / "winners.json" if options.tiny else ROOT / "src" / "laco_kernels" / "kernels" / "winners.json"

    failures = run_tests(folder, 60 * options.test_minutes, "quick" if options.tiny else "gpu")
    left = 60 * options.minutes - (time.monotonic() - begin) - RESERVE
    measure = ["bench", "all", "--allow-busy", "--budget", f"{max(left, 0):.0f}s", "--out", str(results)]
    measure += ["--commit", options.commit] if options.commit else []
    measure += ["--tiny", "--seconds", "0"] if options.tiny else []
    bench = laco(*measure, log=folder / "bench.log")
    laco("tune", str(results), "--out", str(table), log=folder / "tune.log")
    for file in [*results.glob("*/measurements.jsonl"), table]:
        if file.parent != folder and file.exists():
            shutil.copy(file, folder / f"{file.parent.name}-{file.name}")

    print(f"\n{time.monotonic() - begin:.0f} s\n")
    print((folder / "bench.log").read_text())
    print((folder / "tune.log").read_text())
    for name in failures:
        print(f"FAILED tests: {name}, see {folder / f'{name}.log'}")
        print(
            "\n".join(
                line for line in (folder / f"{name}.log").read_text().splitlines() if line.startswith(("FAILED", "ERROR"))
            )
        )
    print("all tests passed" if not failures else f"{len(failures)} of {len(TESTS)} groups of tests failed")
    return 1 if failures or bench else 0


def run_tests(folder: Path, seconds: float, profile: str) -> list[str]:
    """Run all groups of tests at once; return those that failed or did not end in time."""
    running = {}
    for name, arguments in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", profile, *arguments]
        with (folder / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + seconds
    failed = []
    for name, process in running.items():
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            with (folder / f"{name}.log").open("a") as log:
                log.write(f"\nERROR not done after {seconds:.0f} s\n")
            code = 1
        failed += [name] if code else []
    return failed


def laco(*arguments: str, log: Path) -> int:
    """Run one command of ``laco``, keep what it prints, and return its exit code."""
    with log.open("w") as stream:
        command = [sys.executable, "-m", "laco_kernels.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
