"""The logic of GPU timing on a GPU that is only pretended: how often what is called, and what is counted."""

import contextlib
import time

import pytest
import torch

from laco_kernels.bench import gpu_timing
from laco_kernels.bench.gpu_timing import Clock, Replay

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch):
    """CUDA's streams, events and graphs on the processor: a graph replays the calls made while it captured."""

    class Stream:
        def wait_stream(self, _):
            pass

        def synchronize(self):
            pass

    class Event:
        def __init__(self, **_):
            self.time = None

        def record(self, _=None):
            self.time = Graph.clock

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    class Graph:
        capturing, clock = None, 0.0

        def __init__(self):
            self.calls = []

        def replay(self):
            for call in self.calls:
                call()

    @contextlib.contextmanager
    def graph(captured, stream):
        assert isinstance(stream, Stream)
        Graph.capturing = captured
        yield
        Graph.capturing = None

    Stream.current = Stream()
    for name, fake in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "current_stream": lambda: Stream.current,
        "set_stream": lambda stream: setattr(Stream, "current", stream),
        "_sleep": lambda _: None,
        "empty_cache": lambda: None,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Graph


def worker(graph, seconds, made):
    def make():
        made.append(1)

        def work():
            graph.clock += seconds

        def call():
            work() if graph.capturing is None else graph.capturing.calls.append(work)

        return call

    return make


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.004, 1, 1), (0.0003, 3, 3), (0.0, 50, 50)])
def test_a_graph_holds_as_many_calls_as_fill_a_millisecond(pretended, seconds, least, most):
    replay = Replay(worker(pretended, seconds, []), CUDA)
    assert least <= replay.calls <= most
    assert len(replay.graph.calls) == replay.calls


def test_graph_and_cold_times_are_those_of_one_call(pretended):
    made = []
    clock = Clock(worker(pretended, 0.0004, made), CUDA)
    assert len(made) == 2, "one for the capturing stream, one for the current one"
    flush = torch.ones(10)
    taken = clock.round(flush)
    assert set(taken) == {"graph", "cold"}
    assert list(taken.values()) == pytest.approx([400, 400])
    assert not flush.any(), "the cache was flushed"


def test_what_cannot_be_captured_has_cold_times_only(pretended, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    clock = Clock(worker(pretended, 0.0, []), CUDA)
    assert clock.reason == "operation not permitted when stream is capturing"
    assert set(clock.round(torch.ones(1))) == {"cold"}


def test_out_of_memory_while_capturing_is_not_hidden(pretended, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        Clock(worker(pretended, 0.0, []), CUDA)


def test_rounds_go_forth_and_back():
    order = []
    clocks = {name: Clock(lambda name=name: lambda: order.append(name), CPU) for name in "abc"}
    order.clear()
    samples = gpu_timing.rounds_of(clocks, CPU, rounds=2, seconds=0)
    assert "".join(order) == "abccba"
    assert all(len(sample["wall"]) == 2 for sample in samples.values())


def test_rounds_are_at_least_ten_and_end_with_the_time():
    clocks = {"a": Clock(lambda: lambda: time.sleep(0.01), CPU)}
    assert len(gpu_timing.rounds_of(clocks, CPU, rounds=None, seconds=0)["a"]["wall"]) == 10
    assert 10 <= len(gpu_timing.rounds_of(clocks, CPU, rounds=None, seconds=0.2)["a"]["wall"]) <= 21


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(gpu_timing, "_best", lambda call, device: 2.0)
    found = gpu_timing.ceilings(CPU, torch.float32)
    assert found == {"tflops": 2 * 1024**3 / 2e9, "gbs": 2 * 2**25 / 2e6}
