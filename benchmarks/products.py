"""Every tile of the CUDA kernels on the papers' products, beside a bare product of torch's: ``benchmarks/products.py``.

A row a tile: median of rounds in which all take turns, as replayed CUDA graphs, with its spread, its rate, and whether the
result is within the tolerance of a product that rounds once. ``csrc/plan.h`` takes its times from here. ``--check`` times
nothing and also runs small shapes, on the emulated GPU where there is no other.
"""

import argparse
import functools
import gc
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from laco_kernels.bench.environment import environment
from laco_kernels.bench.gpu_timing import Replay
from laco_kernels.bench.timing import between, spread, stamp
from laco_kernels.kernels import select

ROUNDS = 15
HOPELESS = 2  # times as slow as the fastest


@dataclass(frozen=True)
class Shape:
    """A product of a patch merge: ``batch`` images of ``grid`` tokens of ``channels``, merged by ``side``, to ``n`` columns."""

    product: str
    batch: int
    grid: int
    side: int
    channels: int
    n: int

    @property
    def rows(self) -> int:
        return self.batch * (self.grid // self.side) ** 2

    @property
    def depth(self) -> int:
        return self.side**2 * self.channels

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.n


PRODUCTS = ("forward", "input_gradient", "weight_gradient")
# What is most telling first.
SIZES = [(batch, 24, 2, 1024, n) for batch in (64, 1, 16) for n in (4096, 1024)]
SHAPES = [Shape(product, *size) for size in [*SIZES, (16, 24, 1, 1024, 4096)] for product in PRODUCTS]
SMALL = [Shape(product, 2, 6, 2, 72, 136) for product in PRODUCTS] + [Shape("forward", 1, 12, 2, 1024, 256)]


class Problem:
    """One shape's tensors, the call of the extension and the bare product."""

    def __init__(self, shape: Shape, extension, device: torch.device) -> None:
        self.shape, self.extension, self.device = shape, extension, device
        tokens = shape.batch, shape.grid**2, shape.channels

        def random(*size):
            return torch.randn(*size, device=device).bfloat16()

        self.x, self.weight = random(*tokens), random(shape.n, shape.depth) / shape.depth**0.5
        self.gradient = random(shape.batch, shape.rows // shape.batch, shape.n)
        of_rows = (shape.batch, shape.rows // shape.batch, shape.n)
        sizes = {"forward": of_rows, "input_gradient": tokens, "weight_gradient": (shape.n, shape.depth)}
        self.out = torch.full(sizes[shape.product], float("nan"), device=device, dtype=torch.bfloat16)
        self.windows = self._windows().contiguous()

    def _windows(self) -> torch.Tensor:
        s, cells = self.shape, self.shape.grid // self.shape.side
        image = self.x.view(s.batch, cells, s.side, cells, s.side, s.channels)
        return image.transpose(2, 3).reshape(s.rows, s.depth)

    def launch(self, tile: str, splits: int) -> str | None:
        s, e = self.shape, self.extension
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        told = {"element": 0, "out": self.out.data_ptr(), "tile": tile, "stream": stream}
        x = e.Tokens(
            sources=[self.x.data_ptr()], batch=s.batch, height=s.grid, width=s.grid, side=s.side, channels=s.channels,
            stride_t=s.channels, stride_b=s.grid**2 * s.channels,
        )  # fmt: skip
        rows = s.rows // s.batch
        gradient = e.Tokens(
            sources=[self.gradient.data_ptr()], batch=s.batch, width=rows, channels=s.n, stride_t=s.n, stride_b=rows * s.n
        )
        if s.product == "forward":
            return e.forward(**told, x=x, weight=self.weight.data_ptr(), n=s.n, splits=splits)
        if s.product == "weight_gradient":
            return e.weight_gradient(**told, x=x, gradient=gradient, splits=splits)
        sizes = {"side": s.side, "channels": s.channels, "height": s.grid, "width": s.grid}
        return e.input_gradient(**told, gradient=gradient, weight=self.weight.data_ptr(), **sizes)

    def fill(self, tile: str, splits: int) -> None:
        """Launch what :func:`plans` found that there is."""
        if error := self.launch(tile, splits):
            raise RuntimeError(f"{self.shape}, {tile}, {splits}: {error}")

    def bare(self) -> torch.Tensor:
        """The product of torch's, from windows that are gathered already."""
        gradient = self.gradient.flatten(0, 1)
        if self.shape.product == "forward":
            return self.windows @ self.weight.t()
        return gradient @ self.weight if self.shape.product == "input_gradient" else gradient.t() @ self.windows

    @functools.cached_property
    def truth(self) -> tuple[torch.Tensor, float]:
        """The product in float64, and how far torch's is from it."""
        windows, weight, gradient = (t.double() for t in (self.windows, self.weight, self.gradient.flatten(0, 1)))
        if self.shape.product == "forward":
            exact = windows @ weight.t()
        else:
            exact = gradient @ weight if self.shape.product == "input_gradient" else gradient.t() @ windows
        return exact, (self.bare().double() - exact).norm().item()

    def is_right(self) -> bool:
        """Whether what was launched last is no further from float64 than a product of torch's, twice."""
        exact, allowed = self.truth
        found = self.out
        if self.shape.product == "input_gradient":
            s, cells = self.shape, self.shape.grid // self.shape.side
            found = found.view(s.batch, cells, s.side, cells, s.side, s.channels).transpose(2, 3)
        return (found.reshape(exact.shape).double() - exact).norm().item() <= 2 * allowed


def plans(problem: Problem) -> list[tuple[str, int]]:
    """Tiles that this GPU has kernels of for the product, and the numbers of blocks that share their depth."""
    product, able = problem.shape.product, []
    for tile, (_, bn, shares, *_) in {**problem.extension.TILES, "ampere": (0, 0, False)}.items():
        if product != "forward" and bn % 64:
            continue
        for splits in (1, 2, 4) if shares and product != "input_gradient" else (1,):
            problem.out.fill_(float("nan"))
            error = problem.launch(tile, splits)
            if error is None:
                able.append((tile, splits))
            elif not any(words in error for words in ("depth this short", "needs a GPU", "not built")):
                raise RuntimeError(f"{problem.shape}, {tile}, {splits}: {error}")
    return able


def measure(problem: Problem) -> bool:
    """Print a line a tile, the fastest first; return whether all were right. The slow ones are captured in no graph."""
    device = problem.device

    def alone(tile: str, splits: int) -> float:
        start = stamp(device)
        problem.fill(tile, splits)
        return 1e3 * between(start, stamp(device))

    # The best of a few: the first ones may wait for clocks that rise, all for the host where they are short.
    once = {(tile, splits): min(alone(tile, splits) for _ in range(5)) for tile, splits in plans(problem)}
    clocks = {"torch": Replay(lambda: problem.bare, device)}
    rights, slow = {}, {}
    for (tile, splits), microseconds in once.items():
        name = f"{tile} split {splits}" if splits > 1 else tile
        problem.out.fill_(float("nan"))
        if microseconds > HOPELESS * min(once.values()):
            slow[name] = microseconds
            problem.fill(tile, splits)
        else:
            clocks[name] = Replay(lambda tile=tile, splits=splits: lambda: problem.fill(tile, splits), device)
            problem.out.fill_(float("nan"))  # what it wrote before it was captured
            clocks[name].graph.replay()
        rights[name] = problem.is_right()
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(ROUNDS):
        for name, clock in clocks.items():
            samples[name].append(1e3 * clock.milliseconds(device))
    print(f"\n{problem.shape}")
    ticks = {name: "right" if right else "WRONG" for name, right in rights.items()}
    for name, sample in sorted(samples.items(), key=lambda item: statistics.median(item[1])):
        found, rate = spread(sample), problem.shape.flops / statistics.median(sample) / 1e6
        times = f"{found.median:9.2f} us  ({found.p20:.2f} to {found.p80:.2f})"
        print(f"  {name:16} {times}  {rate:6.1f} TFLOP/s  {ticks.get(name, '')}")
    for name, microseconds in sorted(slow.items(), key=lambda item: item[1]):
        print(f"  {name:16} {microseconds:9.2f} us  alone, not from a graph  {ticks[name]}")
    sys.stdout.flush()
    return all(rights.values())


def main() -> int:
    """Measure, or check; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="small shapes, no times; on the emulated GPU where there is no other"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape after so long")
    options, begin = parser.parse_args(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        extension = select.extension()
    elif options.check:
        from tests.csrc.emulator import build

        extension = build.load().cuda
    else:
        parser.error("there is no GPU to measure on; --check runs small shapes on an emulated one")
    if options.check:
        wrong = 0
        for shape in SMALL:
            problem = Problem(shape, extension, device)
            for tile, splits in plans(problem):
                problem.out.fill_(float("nan"))
                problem.fill(tile, splits)
                right = problem.is_right()
                wrong += not right
                print(f"{shape} {tile} {splits}: {'right' if right else 'WRONG'}")
        return 1 if wrong else 0
    print(environment(device))
    gc.collect()
    gc.freeze()  # every capture collects, and has little to look through now
    right = True
    for shape in SHAPES:
        if time.monotonic() - begin > options.seconds:
            print(f"\nno time for {shape} and what follows")
            break
        right &= measure(Problem(shape, extension, device))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
