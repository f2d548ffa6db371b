"""The operators, timed; each variant must pass its check first."""

import pytest

from benchmarks.conftest import synchronised


@pytest.mark.benchmark(timer=synchronised, warmup=True, warmup_iterations=3)
def test_operator(benchmark, case, variant, timed):
    call, verdict = timed
    assert verdict["ok"] is not False, f"error {verdict['error']:.1e} of at most {verdict['budget']:.1e}"
    benchmark.group = str(case)
    benchmark.extra_info.update(case.facts, variant=variant, **verdict)
    benchmark(call)
