"""The emulated GPU's barriers, memory and order of events: what is right passes, what hardware would not forgive does not."""

import re

import numpy as np
import pytest

from tests.csrc.emulator import build

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
SEEDS = 12
FULL = [("init", 0, 1), ("init_fence", 0, 0)]


@pytest.fixture(scope="module")
def emulator():
    emulator = build.load().emulator
    emulator.choose()
    return emulator


def run(emulator, *programs, times=1, blocks=1, memory=None):
    """Each of ``programs`` by ``times`` threads; what they noted and the first error under several seeds."""
    found = []
    for seed in range(SEEDS):
        emulator.choose(seed=seed)
        steps = [program for program in programs for _ in range(times)]
        error, log = emulator.run(steps, blocks, 0 if memory is None else memory.ctypes.data)
        if error:
            return None, error
        found.append(sorted(log))
    assert all(log == found[0] for log in found)
    return found[0], ""


def test_a_phase_ends_with_its_last_arrival(emulator):
    """Two arrivals a phase; parity 1 has passed at the start, and passes again behind the second phase."""
    begin, phases = ("sync_block", 0, 0), [("arrive", 0, 0), ("wait", 0, 0), ("arrive", 0, 0), ("wait", 0, 1)]
    first, second = [("init", 0, 2), ("wait", 0, 1), begin, *phases], [begin, *phases, ("note", 3, 0)]
    assert run(emulator, first, second) == ([(1, 3)], "")
    log, error = run(emulator, [*first[:5], ("wait", 0, 1)], second[:3])
    assert log is None
    assert re.search("deadlock: block 0, thread 0 waits for its barrier, iteration 7, barrier at shared address", error)


BARRIER_ERRORS = [
    ([("init", 0, 0)], "a barrier of 0 arrivals"),
    ([("init", 4, 1)], "which 8 does not divide"),
    ([("init", 0, 1), ("init", 0, 1)], "initialised twice"),
    ([("arrive", 0, 0)], "there is no barrier"),
    ([("init", 0, 1), ("expect", 0, 64), ("arrive", 0, 0)], "arrives once too often"),
    ([("init", 0, 1), ("wait", 0, 2)], "a parity of 2"),
    ([("init", 0, 1), ("store", 0, 1)], "a store over a barrier"),
    ([("init", 200000, 1)], "outside of the block's"),
    ([("load", 2, 0)], "which 4 does not divide"),
    ([("named", 16, 32)], "there is no named barrier 16"),
    ([("named", 1, 24)], "are not whole warps"),
    ([("registers", 20, 1)], "20 registers a thread"),
]


@pytest.mark.parametrize(("program", "message"), BARRIER_ERRORS)
def test_what_no_thread_may_do(emulator, program, message):
    assert message in run(emulator, program)[1]


def test_a_named_barrier_lets_its_threads_pass_and_no_others(emulator):
    store = [("store", 0, 5), ("named", 3, 64)]
    load = [("named", 3, 64), ("load", 0, 0)]
    log, error = run(emulator, store, load, times=32)
    assert (log, error) == ([(thread, 5) for thread in range(32, 64)], "")
    error = run(emulator, store, load[1:], times=32)[1]
    assert "thread 0 and 31 more wait for named barrier 3" in error
    assert "barrier" in run(emulator, store, [("named", 3, 32)], times=32)[1]  # which of both counts depends on who comes first


def test_lanes_meet_at_the_same_instruction(emulator):
    log, error = run(emulator, [("shuffle", 8, 0)], times=32)
    assert (log, error) == ([(lane, lane ^ 8) for lane in range(32)], "")
    steps = [[("shuffle", 1, 0)]] * 31 + [[("sync_warp", 0, 0)]]
    assert re.search("is at .*, when other lanes are at", run(emulator, *steps)[1])
    assert "wait for __shfl_xor_sync" in run(emulator, *[[("shuffle", 1, 0)]] * 31, [])[1]


def test_a_cluster_reads_its_blocks_memory(emulator):
    program = [("store", 64, 7), ("sync_cluster", 0, 0), ("load_cluster", 64, 1), ("sync_cluster", 0, 0)]
    assert run(emulator, program, program, blocks=2) == ([(0, 7), (1, 7)], "")
    leaves = program[:2]
    results = [emulator_run(emulator, seed, program[:3], leaves) for seed in range(40)]
    assert any("which has ended" in error for error in results)


def emulator_run(emulator, seed, *programs):
    emulator.choose(seed=seed)
    return emulator.run(list(programs), 2, 0)[0]


def test_registers_are_a_blocks_to_share_out(emulator):
    """Of 384 threads each has 168 at first."""
    less, more = [("registers", 40, 0)], [("registers", 232, 1)]
    assert run(emulator, *[less] * 128, *[more] * 256) == ([], "")
    assert "wait" in run(emulator, *[[("registers", 56, 0)]] * 128, *[more] * 256)[1]
    assert "setmaxnreg from 168 to 176" in run(emulator, *[[("registers", 176, 0)]] * 384)[1]


MATRIX = 1024  # bytes of the map's box
LOAD = [*FULL, ("expect", 0, MATRIX), ("load_box", 1024, 0), ("wait", 0, 0), ("load", 1024 + 4 * 33, 0)]


def matrix():
    return np.arange(256, dtype=np.float32)


def test_a_load_arrives_as_late_as_its_barrier_allows(emulator):
    memory = matrix()
    assert run(emulator, LOAD, memory=memory) == ([(0, 33)], "")
    assert "barrier_init_fence" in run(emulator, [step for step in LOAD if step[0] != "init_fence"], memory=memory)[1]
    emulator.choose(copies="late")
    early = [step for step in LOAD if step[0] != "wait"]
    error, log = emulator.run([early], 1, memory.ctypes.data)
    assert "still wrote its shared memory" in error
    assert log != [(0, 33)]
    emulator.choose(copies="early")
    assert emulator.run([early], 1, memory.ctypes.data) == ("", [(0, 33)])


STORE = [("store", 4 * i, 7) for i in range(256)]
SEND = [("store_box", 0, 0), ("store_commit", 0, 0), ("store_wait", 0, 0)]


def test_stores_need_a_fence_and_their_memory_until_they_are_done(emulator):
    memory = matrix()
    assert run(emulator, [*STORE, ("fence", 0, 0), *SEND], memory=memory) == ([], "")
    assert (memory == 7).all()
    assert "wrote without fence_async" in run(emulator, [*STORE, *SEND], memory=memory)[1]
    assert "still reads what it stores" in run(emulator, [*STORE, ("fence", 0, 0), *SEND[:2]], memory=memory)[1]
    for stores, expected in (("early", 7), ("late", 8)):
        emulator.choose(stores=stores)
        steps = [*STORE, ("fence", 0, 0), *SEND[:2], ("store", 0, 8), SEND[2]]
        assert not emulator.run([steps], 1, memory.ctypes.data)[0]
        assert memory[0] == expected


@pytest.mark.parametrize("fence_behind", [False, True])
def test_a_fence_covers_what_its_thread_knows_of(emulator, fence_behind):
    """Each writer fences and all meet, or all meet and one fences; to meet alone is not enough."""
    memory, half = matrix(), len(STORE) // 2
    fence, meet = ("fence", 0, 0), ("sync_block", 0, 0)
    middle = [meet, fence] if fence_behind else [fence, meet]
    first, second = [*STORE[:half], *middle, *SEND], [*STORE[half:], *middle]
    assert run(emulator, first, second, memory=memory) == ([], "")
    without = [step for step in second if step != fence]
    assert bool(run(emulator, first, without, memory=memory)[1]) == (not fence_behind)
    late = [*STORE[half:], meet, fence] if not fence_behind else second
    assert bool(run(emulator, first, late, memory=memory)[1]) == (not fence_behind)


def test_cp_async_arrives_when_it_is_waited_for(emulator):
    memory = matrix()
    copies = [("copy", 0, 1), ("copy_commit", 0, 0), ("copy", 16, 1), ("copy", 32, 0), ("copy_commit", 0, 0)]
    loads = [("load", 12, 0), ("copy_wait", 0, 0), ("load", 20, 0), ("load", 32, 0)]
    assert run(emulator, [*copies, ("copy_wait", 1, 0), *loads], memory=memory) == ([(0, 0), (0, 1), (0, 3)], "")
    assert "ends while copies still come" in run(emulator, copies, memory=memory)[1]
    emulator.choose(copies="late")
    _, log = emulator.run([[*copies, ("copy_wait", 1, 0), ("load", 16, 0), ("copy_wait", 0, 0)]], 1, memory.ctypes.data)
    assert log != [(0, 0)]


def test_a_launch_that_failed_can_be_seen_again(emulator):
    memory = matrix()
    error = run(emulator, [*STORE, *SEND], memory=memory)[1]
    seed = int(re.search(r"\(seed (\d+): copies \w+, products \w+, stores \w+, order \w+\)", error)[1])
    emulator.choose(seed=seed)
    assert emulator.run([[*STORE, *SEND]], 1, memory.ctypes.data)[0] == error
    assert emulator.statistics()["launches"] == 1
