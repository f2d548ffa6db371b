"""What ``benchmarks/gpu.py`` and ``benchmarks/products.py`` call a failure, without a GPU."""

import importlib.util
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
PASSED = {"gpu": "passed", "kernels": "passed", "random": "passed"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # as dataclasses look their module up
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Run ``gpu.py`` with commands that only note that they were called; return exit code and calls."""
    gpu = script("gpu")

    def run(tests, **codes):
        calls = []

        def noted(arguments, log, deadline, meanwhile=None, **env):
            log.touch()
            names = {Path(argument).name for argument in arguments}
            (name,) = names & {"setup.py", "products.py", "bench", "tune"}
            calls.append((name, arguments, env))
            return codes.get(name.removesuffix(".py"), 0)

        monkeypatch.setattr(gpu, "run", noted)
        monkeypatch.setattr(gpu, "run_tests", lambda *_: {**PASSED, **tests})
        monkeypatch.setattr(gpu.shutil, "which", lambda _: "/usr/bin/nvcc")
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--copy-to", str(tmp_path)])
        return gpu.main(), calls

    return run


def test_a_run_in_which_everything_passes(go, capsys):
    code, calls = go({})
    assert code == 0
    assert [name for name, *_ in calls] == ["setup.py", "bench", "tune", "bench", "tune", "products.py"]
    assert "extension: built" in capsys.readouterr().out
    asked = calls[-1][1]
    assert float(asked[asked.index("--seconds") + 1]) > 0


def test_an_extension_that_does_not_build_is_a_failure_and_the_rest_goes_on(go, capsys):
    code, calls = go({}, setup=1)
    assert code == 1
    assert calls[0][2] == {"LACO_BUILD_CUDA": "1"}  # else setup.py ends well without it
    assert [name for name, *_ in calls[1:]] == ["bench", "tune", "bench", "tune", "products.py"]
    assert "extension: failed" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["not done in time", "failed"])
@pytest.mark.parametrize("group", PASSED)
def test_tests_that_did_not_end_are_a_failure_and_the_measurements_go_on(go, capsys, group, state):
    code, calls = go({group: state})
    assert code == 1
    assert [name for name, *_ in calls][-1] == "products.py"
    assert f"{group}: {state}" in capsys.readouterr().out


def test_what_is_added_to_the_environment_reaches_the_command(tmp_path):
    command = [sys.executable, "-c", "import os; print(os.environ['LACO_BUILD_CUDA'], 'PATH' in os.environ)"]
    assert script("gpu").run(command, tmp_path / "log", time.monotonic() + 60, LACO_BUILD_CUDA="1") == 0
    assert (tmp_path / "log").read_text() == "1 True\n"


def test_tests_without_time_are_stopped_and_said_to_be_late(monkeypatch, tmp_path):
    gpu = script("gpu")
    start = gpu.start
    monkeypatch.setattr(gpu, "start", lambda _, log: start([sys.executable, "-c", "import time; time.sleep(99)"], log))
    assert gpu.run_tests(tmp_path, time.monotonic() + 0.2, "quick") == dict.fromkeys(gpu.TESTS, "not done in time")


class Capture:
    """A replayed graph's stand-in: it calls what was captured."""

    capturing, made = False, 0

    def __init__(self, make, device):
        Capture.made += 1
        self.graph, self.replay = self, make()
        Capture.capturing = True
        try:
            self.replay()
        finally:
            Capture.capturing = False

    def milliseconds(self, device):
        return 1e-3


@pytest.fixture
def measure(monkeypatch):
    """Measure tiles that are functions: each fills ``out``, or returns what is wrong."""
    products = script("products")
    monkeypatch.setattr(products, "Replay", Capture)
    monkeypatch.setattr(Capture, "made", 0)

    now = [0.0]
    monkeypatch.setattr(products, "stamp", lambda _: now[0])

    def run(tiles, seconds=()):
        def launch(tile, splits):
            now[0] += dict(seconds).get(tile, 1e-5)
            return tiles[tile](problem.out)

        problem = products.Problem.__new__(products.Problem)
        problem.shape, problem.device, problem.out = products.SMALL[0], torch.device("cpu"), torch.zeros(4)
        problem.extension = SimpleNamespace(TILES={})
        problem.bare = lambda: None
        problem.launch = launch
        problem.is_right = lambda: bool((problem.out == 1).all())
        monkeypatch.setattr(products, "plans", lambda _: [(tile, 1) for tile in tiles])
        return products.measure(problem)

    return run


def right(out):
    out.fill_(1)


def test_tiles_that_are_right_are_measured(measure, capsys):
    assert measure({"64x64": right, "64x128": right})
    assert capsys.readouterr().out.count("right") == 2


def test_a_tile_that_writes_nothing_is_wrong(measure, capsys):
    """What an earlier launch wrote does not make it right."""
    assert not measure({"64x64": right, "64x128": lambda out: None})
    assert "WRONG" in capsys.readouterr().out


def test_a_launch_that_fails_under_capture_alone_ends_it(measure):
    with pytest.raises(RuntimeError, match="64x64, 1: only then"):
        measure({"64x64": lambda out: "only then" if Capture.capturing else right(out)})


def test_a_hopeless_tile_is_not_captured(measure, capsys):
    assert measure({"64x64": right, "128x128": right, "64x128": right}, {"128x128": 2.1e-5, "64x128": 1.9e-5})
    assert Capture.made == 3  # torch's product and the two others
    assert "alone, not from a graph  right" in capsys.readouterr().out


def test_a_hopeless_tile_is_looked_at_too(measure, capsys):
    assert not measure({"64x64": right, "128x128": lambda out: None}, {"128x128": 2.1e-5})
    assert "alone, not from a graph  WRONG" in capsys.readouterr().out
