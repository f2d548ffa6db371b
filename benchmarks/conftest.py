"""``pytest benchmarks/``: the cases of ``laco bench ops`` under pytest-benchmark, to compare runs in a CI of your own."""

import time

import pytest
import torch

from laco_kernels.bench import op_cases, operators, tower_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="three shrunken cases, to try the suite")
    parser.addoption("--every", action="store_true", help="every case; default: those with a goal, and B = 1 without a GPU")


def _cases(config):
    cases = op_cases.op_cases(DTYPE)
    if config.getoption("--tiny"):
        return op_cases.tiny(cases)[:3]
    if config.getoption("--every"):
        return list(dict.fromkeys([*cases, *op_cases.encoder_cases(DTYPE), *tower_cases.tower_cases(DTYPE)]))
    telling = cases[: len(op_cases.GOALS)]
    return telling if DEVICE.type == "cuda" else [case for case in telling if case.batch == 1]


def pytest_generate_tests(metafunc):
    pairs = [(case, name) for case in _cases(metafunc.config) for name in operators.names(case, DEVICE)]
    metafunc.parametrize(("case", "variant"), pairs, ids=lambda value: str(value).replace(" ", "-"))


def synchronised():
    """The clock, once the device has done what it was asked to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def timed(case, variant):
    """The variant ready to be timed, after its check against float64."""
    rivals = operators.contenders(case, DEVICE, [variant])
    return operators.prepare(case, DEVICE, variant, rivals[variant])
