"""The CUDA extension without a GPU: built, imported, refusing, its schedule, and what the compiler made of the kernels."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laco_kernels.bench import cuda_resources
from laco_kernels.kernels import cuda_products
from tests.csrc.problems import HOPPER, tiles_of
from tests.csrc.test_build import NVCC, ROOT

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc to build the CUDA extension"),
]


def setup(folder, **env):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, and what the compiler says of each kernel; objects that an installation has compiled are used again."""
    folder = tmp_path_factory.mktemp("extension")
    done = setup(folder, LACO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "laco_kernels: built" in done.stderr
    assert "for sm_80 and sm_90a" in done.stderr
    (library,) = folder.rglob("_cuda*.so")
    return library, "".join(
        (ROOT / "build" / "cuda" / f"{source.name}.log").read_text() for source in sorted((ROOT / "csrc").glob("*.cu"))
    )


@pytest.fixture(scope="module")
def extension(built):
    spec = spec_from_file_location("laco_kernels._cuda", built[0])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_says_what_it_did_not_do(tmp_path):
    done = setup(tmp_path, LACO_BUILD_CUDA="0")
    assert done.returncode == 0
    assert "no CUDA extension: LACO_BUILD_CUDA=0" in done.stderr
    done = setup(tmp_path, LACO_BUILD_CUDA="yes")
    assert done.returncode == 1
    assert "LACO_BUILD_CUDA: got 'yes', expected one of auto, 0, 1. Leave it out for 'auto'." in done.stderr
    assert "LACO_CUDA_ARCHS: got '75', expected one of 80, 90a, 80;90a" in setup(tmp_path, LACO_CUDA_ARCHS="75").stderr
    assert not list(tmp_path.rglob("_cuda*"))


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_kernels_of_one_architecture_import_without_the_others(built, tmp_path, arch):  # built: so that theirs are reused
    done = setup(tmp_path, LACO_BUILD_CUDA="1", LACO_CUDA_ARCHS=arch)
    assert done.returncode == 0, done.stderr
    (library,) = tmp_path.rglob("_cuda*")
    code = "import _cuda; print(*_cuda.ARCHITECTURES)"
    done = subprocess.run([sys.executable, "-c", code], cwd=library.parent, capture_output=True, text=True, check=False)
    assert done.stdout == f"{arch}\n", done.stderr


def test_a_broken_compiler_stops_only_who_asked_for_the_extension(tmp_path):
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho it is broken; exit 1\n")
    broken.chmod(0o755)
    path = f"{broken.parent}:{os.environ['PATH']}"
    earlier = tmp_path / "laco_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.parent.mkdir()
    earlier.touch()
    done = setup(tmp_path, LACO_BUILD_CUDA="auto", PATH=path)
    assert done.returncode == 0, done.stderr
    assert not earlier.exists()  # it would be installed
    assert "it is broken" in done.stderr
    assert "Installing without impl='cuda'" in done.stderr
    done = setup(tmp_path, LACO_BUILD_CUDA="1", PATH=path)
    assert done.returncode == 1
    assert "LACO_BUILD_CUDA: got '1', expected the CUDA extension to build" in done.stderr


def test_it_links_neither_torch_nor_cublas_nor_the_driver(extension):
    needed = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search("torch|cublas|libcuda|cudart", needed), needed


def tokens(extension, **change):
    sizes = {"sources": [64], "batch": 2, "height": 4, "width": 4, "stride_b": 1024, "stride_t": 64, "channels": 64}
    return extension.Tokens(**{**sizes, **change})


def problem(extension, product, change):
    """A problem that would be launched, changed; changes of tokens are dictionaries."""
    change = dict(change)

    def of(name, **sizes):
        return tokens(extension, **{**sizes, **change.pop(name, {})})

    rows = {"height": 1, "width": 16}
    passing = {"element": 0, "out": 64}
    if product == "forward":
        passing |= {"x": of("x"), "weight": 64, "n": 64}
        if "residual" in change:
            passing |= {"residual_kind": 1, "residual": of("residual", height=8, width=8, side=2, stride_b=4096)}
    elif product == "input_gradient":
        passing |= {"gradient": of("gradient", **rows), "weight": 64, "channels": 64, "width": 16}
        if "residual_gradient" in change:
            passing |= {"residual_kind": 1, "residual_gradient": of("residual_gradient", **rows)}
    else:
        passing |= {"gradient": of("gradient", **rows), "x": of("x")}
    return {**passing, **change}


LONG, FAR = "a row is too long for 32-bit numbers", "strides must be shorter than 2^39 elements"
NULL = "a pointer is null that must not be"
OVERLAP, ROWS = "tokens or images overlap", "the windows must be the gradient's rows"
UNITS, ALIGNED = "channels, n and strides must be multiples of 8", "pointers must be 16-byte aligned"
REFUSALS = [
    ("forward", {"x": {"sources": []}}, "there must be 1 to 8 sources"),
    ("forward", {"x": {"sources": [64] * 9}}, "there must be 1 to 8 sources"),
    ("forward", {"x": {"batch": -1}}, "sizes must be positive"),
    ("forward", {"x": {"height": 0}}, "sizes must be positive"),
    ("forward", {"n": -8}, "sizes must be positive"),
    ("forward", {"element": 2}, "element must be 0 or 1"),
    ("forward", {"x": {"side": 0}}, "windows must be 1 to 8 tokens wide"),
    ("forward", {"x": {"side": 9}}, "windows must be 1 to 8 tokens wide"),
    ("forward", {"residual": {"side": 9}}, "windows must be 1 to 8 tokens wide"),
    ("forward", {"x": {"batch": 2**26, "stride_b": 2048}}, "too many rows for 32-bit row numbers"),
    ("forward", {"x": {"channels": 2**30, "stride_t": 2**30, "stride_b": 2**36}}, LONG),
    ("forward", {"n": 2**30}, LONG),
    ("input_gradient", {"channels": 2**28, "side": 2}, LONG),
    ("forward", {"x": {"stride_b": 2**39}}, FAR),
    ("forward", {"x": {"batch": 1, "height": 2**31 - 1, "width": 1, "side": 1}}, "too many rows"),
    ("forward", {"x": {"batch": 1, "height": 2**31 - 1, "width": 1, "side": 2}}, "too many rows"),
    ("forward", {"x": {"batch": 1, "height": 1, "width": 2**31 - 1, "side": 2}}, "too many rows"),
    ("forward", {"x": {"batch": 2**31 - 1, "height": 2**31 - 1, "width": 2**31 - 1}}, "too many tokens"),
    ("input_gradient", {"height": 2**31 - 1, "width": 2**31 - 1, "side": 2}, "too many tokens"),
    ("weight_gradient", {"x": {"stride_t": 2**36, "stride_b": 2**40}}, FAR),
    ("forward", {"residual": {}, "out_prefix": -1}, "sizes must be positive"),
    ("forward", {"x": {"channels": 60}}, UNITS),
    ("forward", {"n": 60}, UNITS),
    ("forward", {"x": {"sources": [0]}}, NULL),
    ("forward", {"weight": 0}, NULL),
    ("forward", {"out": 0}, NULL),
    ("input_gradient", {"weight": 0}, NULL),
    ("input_gradient", {"out": 0}, NULL),
    ("weight_gradient", {"out": 0}, NULL),
    ("forward", {"x": {"stride_t": 68}}, UNITS),
    ("forward", {"x": {"stride_b": 0}}, OVERLAP),
    ("forward", {"x": {"stride_t": 32}}, OVERLAP),
    ("forward", {"activation": 3}, "activation must be 0, 1 or 2"),
    ("forward", {"residual_kind": 3}, "residual_kind must be 0, 1 or 2"),
    ("input_gradient", {"residual_kind": -1}, "residual_kind must be 0, 1 or 2"),
    ("forward", {"pre": 64}, "there is nothing to save"),
    ("forward", {"bias": 66}, ALIGNED),
    ("forward", {"x": {"sources": [72]}}, ALIGNED),
    ("forward", {"out_prefix": 1}, "an output with prefix tokens needs a residual"),
    ("forward", {"residual": {}, "activation": 1}, "the residual comes without an activation"),
    ("forward", {"residual": {"side": 3}}, "the residual's windows must be the output's rows"),
    ("forward", {"residual": {"height": 9, "stride_b": 8192}}, "the residual's windows must be the output's rows"),
    ("forward", {"residual": {"stride_b": 64}}, OVERLAP),
    ("forward", {"residual": {"channels": 56}}, "the residual must be one source as wide as the output"),
    ("forward", {"residual": {"stride_b": 8192}, "residual_block": True}, "a residual in block order must be contiguous"),
    ("input_gradient", {"gradient": {"side": 2}}, "a gradient must be one source of single tokens"),
    ("input_gradient", {"gradient": {"sources": [64, 64]}}, "a gradient must be one source of single tokens"),
    ("input_gradient", {"side": 9}, "windows must be 1 to 8 tokens wide"),
    ("input_gradient", {"channels": 60}, UNITS),
    ("input_gradient", {"channels": 0}, "sizes must be positive"),
    ("input_gradient", {"out_prefix": -1}, "sizes must be positive"),
    ("input_gradient", {"out": 72}, ALIGNED),
    ("input_gradient", {"sums": 72, "pre": 64, "activation": 1}, ALIGNED),
    ("input_gradient", {"width": 15}, ROWS),
    ("input_gradient", {"pre": 64}, "there is no activation to go back through"),
    ("input_gradient", {"pre": 64, "activation": 1, "out_prefix": 1}, "an activation's rows are plain"),
    ("input_gradient", {"activation": 1}, "an activation's gradient needs what it was applied to"),
    ("input_gradient", {"act": 64}, "an activation's gradient needs what it was applied to"),
    ("input_gradient", {"residual_gradient": {"channels": 56}}, "the residual must be one source as wide as the output"),
    ("input_gradient", {"residual_gradient": {"width": 15}}, ROWS),
    ("weight_gradient", {"gradient": {"side": 2}}, "a gradient must be one source of single tokens"),
    ("weight_gradient", {"x": {"side": 2}}, ROWS),
    ("weight_gradient", {"x": {"batch": 1}}, ROWS),
    ("weight_gradient", {"out": 66}, ALIGNED),
    ("weight_gradient", {"element": -1}, "element must be 0 or 1"),
]


@pytest.mark.parametrize(("product", "change", "message"), REFUSALS)
def test_bad_problems_are_refused_before_anything_is_launched(extension, product, change, message):
    assert getattr(extension, product)(**problem(extension, product, change)).startswith(message)


PRODUCTS = ("forward", "input_gradient", "weight_gradient")


@pytest.mark.parametrize("product", PRODUCTS)
def test_tiles_do_what_they_are_for_and_say_what_not(extension, product):
    def told(tile, splits):
        return getattr(extension, f"{product}_operands")(**problem(extension, product, {}), tile=tile, splits=splits)

    if product == "forward":
        assert told("192x96", 1)["columns"] == 64
    else:
        with pytest.raises(ValueError, match="this tile is of forward products alone"):
            told("192x96", 1)
    for tile, splits in (("128x256", 2), ("192x128", 3)):
        with pytest.raises(ValueError, match="this tile's depth cannot be shared so"):
            told(tile, splits)
    with pytest.raises(ValueError, match=r"depth .*cannot be shared"):
        told("192x128", 2)
    with pytest.raises(ValueError, match="no tile of that name"):
        told("1x1", 1)


@pytest.mark.parametrize("product", PRODUCTS)
def test_without_a_gpu_it_says_so(extension, product):
    import torch

    if torch.cuda.is_available():
        assert extension.problem() is None
    else:
        assert "CUDA" in extension.problem()
        assert "CUDA" in getattr(extension, product)(**problem(extension, product, {}))


def plan(extension, product, m, columns, steps, multiprocessors=132, pairs=66, quads=32):
    """Of a product whose result has m rows and so many columns, and whose depth is ``steps`` times 64."""
    rows = {"sources": [64], "height": 1, "side": 1}
    if product == "weight_gradient":
        width, n, channels = 64 * steps, m, columns
    else:
        width, n, channels = m, *((columns, 64 * steps) if product == "forward" else (64 * steps, columns))
    sizes = {"batch": 1, "width": width, "stride_b": 64}
    x = extension.Tokens(**rows, **sizes, stride_t=channels, channels=channels)
    gradient = extension.Tokens(**rows, **sizes, stride_t=n, channels=n)
    options = {"element": 0, "out": 64, "multiprocessors": multiprocessors, "pairs": pairs, "quads": quads}
    if product == "forward":
        return extension.forward_plan(x=x, weight=64, n=n, **options)
    if product == "input_gradient":
        return extension.input_gradient_plan(gradient=gradient, weight=64, channels=channels, width=width, **options)
    return extension.weight_gradient_plan(gradient=gradient, x=x, **options)


def test_host_logic_refuses_what_is_no_problem(extension):
    shapeless = tokens(extension, side=0)
    for name in ("rows", "depth"):
        with pytest.raises(ValueError, match="windows must be 1 to 8 tokens wide"):
            getattr(shapeless, name)
    machine = {"pairs": 66, "quads": 32}
    for product in PRODUCTS:
        planned = getattr(extension, f"{product}_plan")
        with pytest.raises(ValueError, match="a GPU has multiprocessors"):
            planned(**problem(extension, product, {}), multiprocessors=0, **machine)
        with pytest.raises(ValueError, match="element must be 0 or 1"):
            planned(**problem(extension, product, {"element": 3}), multiprocessors=132, **machine)
    for block, blocks in ((0, 0), (-5, 3), (3, 3)):
        with pytest.raises(ValueError, match="more blocks than the number of one"):
            extension.schedule("128x128", 100, 100, block, blocks)
    with pytest.raises(ValueError, match="too many tiles"):
        extension.schedule("64x64", 2**23, 2**23, 5, 2**30)
    with pytest.raises(ValueError, match="sizes must be positive"):
        extension.schedule("128x128", -1, 100, 0, 1)


def test_tiles_are_chosen_by_waves(extension):
    assert {name: tile[:3] for name, tile in extension.TILES.items()} == HOPPER
    chosen = {
        (9216, 4096): "128x256", (2304, 4096): "192x128", (36864, 1024): "128x256",
        (2304, 1024): "192x96", (1568, 4608): "128x256", (1568, 4096): "192x144",
    }  # fmt: skip
    plans = {shape: plan(extension, "forward", *shape, 64) for shape in chosen}
    assert {shape: plan["tile"] for shape, plan in plans.items()} == chosen
    assert {plan["splits"] for plan in plans.values()} == {1}
    assert plans[9216, 4096]["waves"] == 9
    assert plans[2304, 1024]["tiles"] == 132


def test_where_tiles_are_few_blocks_share_their_depth(extension):
    """One image: 144 rows of 4096 columns are 32 tiles for 132 multiprocessors."""
    shared = plan(extension, "forward", 144, 4096, 64)
    assert (shared["tile"], shared["splits"], shared["tiles"], shared["waves"]) == ("192x128", 4, 32, 1)
    alone = plan(extension, "input_gradient", 144, 4096, 64)
    assert alone["splits"] == 1
    assert shared["microseconds"] < alone["microseconds"]
    assert plan(extension, "forward", 144, 4096, 7)["splits"] == 1  # too short a depth
    assert plan(extension, "forward", 144, 4096, 64, quads=31)["splits"] == 2  # 32 clusters would come in two waves
    assert plan(extension, "forward", 64, 0, 64, pairs=0, quads=0)["waves"] == 0  # nothing to do, and nowhere to share it
    few = plan(extension, "forward", 64, 4096, 144)  # a window of three tokens each way, one image
    assert (few["tile"], few["splits"]) == ("64x128", 4)


SIZES = st.integers(1, 640).map(lambda n: 8 * n)


@given(
    st.sampled_from(["forward", "input_gradient", "weight_gradient"]),
    SIZES,
    SIZES,
    st.integers(1, 400),
    st.integers(1, 140),
    st.data(),
)
def test_plans_are_consistent(extension, product, m, columns, steps, multiprocessors, data):
    at_once = {n: data.draw(st.integers(0, multiprocessors // n)) for n in (2, 4)}
    found = plan(extension, product, m, columns, steps, multiprocessors, *at_once.values())
    assert found["tile"] in tiles_of(product)
    bm, bn, shares = HOPPER[found["tile"]]
    assert found["tiles"] == -(-m // bm) * -(-columns // bn)
    assert found["waves"] == -(-found["tiles"] // (at_once | {1: multiprocessors})[found["splits"]])
    if found["splits"] > 1:
        assert product != "input_gradient"
        assert shares
        assert found["waves"] == 1
        assert steps >= 4 * found["splits"]


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_column_sums_have_a_line_for_every_sixteen_rows(extension, rows, channels):
    assert extension.sums_bytes(rows, channels) == -(-rows // extension.SUM_ROWS) * channels * 4
    assert extension.SUM_ROWS == cuda_products.SUM_ROWS


@given(st.integers(1, 3000), st.integers(1, 5000), st.integers(1, 140))
def test_the_blocks_work_on_every_tile_once(extension, m, columns, blocks):
    for name, (bm, bn, _) in HOPPER.items():
        found = [tile for block in range(blocks) for tile in extension.schedule(name, m, columns, block, blocks)]
        assert Counter(found) == Counter((row, column) for row in range(0, m, bm) for column in range(0, columns, bn))


@pytest.fixture(scope="module")
def kernels(built):
    """By name, each kernel's machine code and its line of resources."""
    return cuda_resources.kernels(built[0])


def test_nothing_spills_and_nothing_is_serialised(built, kernels):
    log = built[1]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(spills) == {("0", "0")}
    assert len(spills) == len(kernels)
    assert not re.search(r"C75\d\d|Potential Performance Loss", log), log
    for name, kernel in kernels.items():
        assert not re.search(r"\b(STL|LDL)\b", kernel.code), name


def test_registers_are_those_that_warpgroups_share_out(kernels):
    """Three warpgroups of 168 registers, or four of 128, are all there are; roles then shift them among themselves."""
    for kernel in kernels.values():
        rows = HOPPER.get(kernel.tile, (None,))[0]
        if rows in (128, 192):
            assert kernel.registers == {128: 168, 192: 128}[rows]
        else:
            assert kernel.registers <= 255


def test_the_matrix_units_and_the_copy_engine_do_the_work(kernels):
    of_hopper = [kernel for kernel in kernels.values() if kernel.tile in HOPPER]
    found = Counter()
    for kernel in of_hopper:
        width = kernel.tile.split("x")[1]
        products = {"bfloat16": f"HGMMA.64x{width}x16.F32.BF16", "float16": f"HGMMA.64x{width}x16.F32 "}
        for element, product in products.items():
            assert kernel.code.count(product) == (4 if element == kernel.element else 0)  # a slot is 64 deep
        assert "UTMALDG.4D.IM2COL" in kernel.code
        assert ("UTMASTG" in kernel.code) == (kernel.product != "input_gradient" or kernel.activation != "none")
        assert ("UCGABAR" in kernel.code) == kernel.split
        found[kernel.tile, kernel.element] += 1
    # Forward without and with an activation and with a copied residual, the gradients, and those that share the depth.
    counts = {
        name: 4 + (3 if shares else 0) + ((4 + shares) if bn % 64 == 0 else 0) for name, (_, bn, shares) in HOPPER.items()
    }
    assert found == {(tile, element): count for tile, count in counts.items() for element in ("bfloat16", "float16")}


WIDTHS = range(64, 257, 16)
MULTIPLY = """
#include "wgmma.cuh"
template <int N, laco::Element ELEMENT> __global__ void multiply(uint64_t a, uint64_t b, float* d) {
  float acc[N / 2] = {};
  laco::wgmma::fence();
  laco::wgmma::multiply<ELEMENT, false, false>(acc, a, b, 1);
  laco::wgmma::commit();
  laco::wgmma::wait_all();
  laco::wgmma::keep(acc);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = acc[i];
}
"""


def test_every_width_is_an_instruction(tmp_path):
    source, binary = tmp_path / "widths.cu", tmp_path / "widths.cubin"
    elements = {"bfloat16": ".BF16", "float16": " "}
    kernels = [f"multiply<{n}, laco::Element::{element}>(uint64_t, uint64_t, float*);" for n in WIDTHS for element in elements]
    source.write_text(MULTIPLY + "\n".join(f"template __global__ void {kernel}" for kernel in kernels))
    command = [NVCC, "-std=c++17", "-arch=sm_90a", "-cubin", f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)]
    subprocess.run(command, check=True)
    code = cuda_resources.disassembled(binary)
    for n in WIDTHS:
        for suffix in elements.values():
            assert code.count(f"HGMMA.64x{n}x16.F32{suffix}") == 1


def test_the_tensor_cores_do_amperes_work(kernels):
    of_ampere = [kernel for kernel in kernels.values() if kernel.tile == "ampere"]
    transposed = {"forward": 0, "input_gradient": 8, "weight_gradient": 16}  # operands that lie across the depth
    for kernel in of_ampere:
        for element, product in {"bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32 "}.items():
            assert kernel.code.count(product) == (64 if element == kernel.element else 0)
        assert kernel.code.count("LDSM.16.MT88.4") == transposed[kernel.product]
        assert kernel.code.count("LDSM.16.M88.4") == 16 - transposed[kernel.product]
        assert "LDGSTS.E.BYPASS.128" in kernel.code
        assert re.findall(r"\bSTG\.E\.(\d+)", kernel.code).count("128") >= 16
        assert 2 * kernel.shared_bytes <= 98 * 1024  # two blocks on a multiprocessor of 8.6
    assert Counter(kernel.element for kernel in of_ampere) == {"bfloat16": 7, "float16": 7}


def test_the_recorded_table_is_of_these_kernels(kernels):
    """Registers differ between compilers, names and shared memory do not."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "cuda-kernel-resources.json").read_text())
    assert {row["kernel"]: row["shared_bytes"] for row in recorded["kernels"]} == {
        name: kernel.shared_bytes for name, kernel in kernels.items()
    }
