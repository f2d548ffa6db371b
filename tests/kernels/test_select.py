"""The choice of an implementation: explicit, by environment, by table, by verdict."""

from types import SimpleNamespace

import pytest
import torch

import laco_kernels as lk
from laco_kernels.kernels import select

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ROWS = [
    {"op": "patch_merge", "direction": "forward", "layout": "raster", "dtype": "bfloat16", "up_to": 1000, "impl": "composite"},
    {"op": "patch_merge", "direction": "forward", "layout": "raster", "dtype": "bfloat16", "up_to": 10_000, "impl": "triton"},
    {
        "op": "patch_merge",
        "direction": "backward",
        "layout": "raster",
        "dtype": "bfloat16",
        "up_to": 10_000,
        "impl": "composite",
    },
]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU that the table may or may not know, and an empty cache."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    select._verdicts.cache_clear()
    select._CHOICES.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))

    def install(name, table):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: name)
        monkeypatch.setattr(select, "winners", lambda: table)
        select._CHOICES.clear()

    yield install
    select._verdicts.cache_clear()
    select._CHOICES.clear()


def choose(rows=2000, dtype=torch.bfloat16, direction="forward", layout="raster"):
    return select.choose("patch_merge", direction, CUDA, dtype, rows, layout)


def test_what_was_never_measured_is_never_chosen(gpu):
    gpu("H", {})
    assert choose() == ("reference", "no kernel has been measured on a GPU yet")


def test_the_table_decides_by_size(gpu):
    gpu("H", {"H": {"capability": "9.0", "rows": ROWS}})
    assert choose(rows=1000).impl == "composite"
    assert choose(rows=1001) == ("triton", "measured fastest on H up to 10000 output tokens")
    assert choose(rows=10_001) == (
        "reference",
        "not measured on H for patch_merge forward with layout='raster' in torch.bfloat16 above 10000 output tokens",
    )
    assert choose(dtype=torch.float32).impl == "reference"
    assert choose(direction="backward").impl == "composite"


def test_layouts_are_chosen_apart_and_an_operator_without_one_matches_rows_without_one(gpu):
    block = {**ROWS[0], "layout": "block", "impl": "triton"}
    conv = {**{name: value for name, value in ROWS[0].items() if name != "layout"}, "op": "strided_conv_gelu"}
    gpu("H", {"H": {"capability": "9.0", "rows": [ROWS[0], block, conv]}})
    assert (choose(500).impl, choose(500, layout="block").impl) == ("composite", "triton")
    assert choose(500, layout=None) == ("reference", "not measured on H for patch_merge forward in torch.bfloat16")
    assert select.choose("strided_conv_gelu", "forward", CUDA, torch.bfloat16, 500).impl == "composite"


def test_the_operators_say_how_their_tokens_lie(gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(select, "choose", lambda *args: asked.append(args[-1]) or select.Choice("reference", ""))
    x = torch.randn(1, 4, 16, requires_grad=True)
    for layout in ("raster", "block"):
        merge(x=x, layout=layout).sum().backward()
    assert asked == ["raster", "raster", "block", "block"]
    asked.clear()
    for operator in (lk.strided_conv, lk.strided_conv_gelu):
        for layout in ("raster", "block"):
            operator(x, torch.randn(16, 64), None, grid=(2, 2), layout=layout).sum().backward()
    assert asked == [None, None, "block", "block"] * 2, "raster order goes without saying"


def test_what_has_no_rows_says_so_plainly(gpu):
    gpu("H", {"H": {"capability": "9.0", "rows": ROWS}})
    for form, said in ((None, ""), ("block", " with layout='block'")):
        assert select.choose("strided_conv", "forward", CUDA, torch.bfloat16, 1, form) == (
            "reference",
            f"not measured on H for strided_conv forward{said} in torch.bfloat16",
        )


def test_a_choice_is_looked_up_once(gpu, monkeypatch):
    gpu("H", {"H": {"capability": "9.0", "rows": ROWS}})
    choose(1)
    monkeypatch.setattr(select, "winners", lambda: pytest.fail("read again"))
    assert [choose(rows).impl for rows in (1, 1001, 10_001)] == ["composite", "triton", "reference"]


def test_a_relative_of_a_measured_gpu_needs_a_verdict_of_its_own(gpu):
    gpu("H lite", {"H": {"capability": "9.0", "rows": ROWS}})
    assert choose() == ("reference", "`laco check` has not passed for patch_merge in torch.bfloat16 on this H lite")
    select.record("H lite", "patch_merge", "torch.bfloat16", ok=True)
    assert choose() == ("triton", "measured fastest on H up to 10000 output tokens")
    select.record("H lite", "patch_merge", "torch.bfloat16", ok=False)
    assert choose().impl == "reference"


def test_the_nearest_architecture_is_followed(gpu):
    other = [{**row, "impl": "composite"} for row in ROWS]
    table = {"A": {"capability": "8.0", "rows": ROWS}, "B": {"capability": "10.0", "rows": ROWS}}
    gpu("H lite", {**table, "H": {"capability": "9.0", "rows": other}})
    select.record("H lite", "patch_merge", "torch.bfloat16", ok=True)
    assert choose() == ("composite", "measured fastest on H up to 10000 output tokens")
    gpu("H lite", table)
    assert choose().impl == "triton"


def test_a_table_need_not_be_sorted_and_old_gpus_are_refused(gpu, monkeypatch):
    gpu("H", {"H": {"capability": "9.0", "rows": ROWS[::-1]}})
    assert choose(rows=1000).impl == "composite"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    select._CHOICES.clear()
    assert choose() == ("reference", "the kernels need compute capability 8.0 (Ampere) or newer")


def test_where_the_cuda_kernels_cannot_run_the_composite_does(gpu, monkeypatch):
    gpu("H", {"H": {"capability": "9.0", "rows": [{**ROWS[0], "impl": "cuda"}]}})
    monkeypatch.setattr(select, "_EXTENSION", [None, None])
    assert choose(1) == ("cuda", "measured fastest on H up to 1000 output tokens")
    monkeypatch.setattr(select, "_EXTENSION", [None, "the CUDA extension is not built"])
    select._CHOICES.clear()
    assert choose(1) == ("composite", "the CUDA extension is not built")
    monkeypatch.setattr(select, "HAS_TRITON", False)
    select._CHOICES.clear()
    assert choose(1).impl == "reference"


def test_verdicts_of_several_checks_are_kept_and_a_damaged_file_is_none(gpu):
    gpu("H", {})
    select.record("H", "patch_merge", "torch.float16", ok=True)
    select.record("H", "patch_merge", "torch.float32", ok=False)
    assert select.passed("H", "patch_merge", "torch.float16")
    assert not select.passed("H", "patch_merge", "torch.float32")
    assert not select.passed("other", "patch_merge", "torch.float16")
    select.verdict_file().write_text("{")
    select._verdicts.cache_clear()
    assert not select.passed("H", "patch_merge", "torch.float16")


def test_a_cache_that_cannot_be_written_is_no_error(gpu, monkeypatch):
    gpu("H", {})
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    select.record("H", "patch_merge", "torch.float16", ok=True)
    assert not select.passed("H", "patch_merge", "torch.float16")


def test_on_a_cpu_the_reference_is_chosen():
    assert select.choose("patch_merge", "forward", CPU, torch.float32, 100) == (
        "reference",
        "kernels run on NVIDIA GPUs, not on cpu",
    )


def test_the_shipped_table_is_readable_and_names_what_exists():
    for entry in select.winners().values():
        assert all(row["impl"] in select.implementations(row["op"]) for row in entry["rows"])
        assert {row["op"] for row in entry["rows"]} <= {*select.OPERATORS, *select.TOWER_OPERATORS}


def merge(x=None, **options):
    x, weight = torch.randn(1, 4, 16) if x is None else x, torch.randn(16, 64)
    return lk.patch_merge(x, weight, None, torch.randn(16, 16), None, grid=(2, 2), **options)


def test_forward_and_backward_are_chosen_apart(gpu, monkeypatch):
    gpu("H", {"H": {"capability": "9.0", "rows": ROWS}})
    asked = []
    monkeypatch.setattr(select, "choose", lambda *args: asked.append(args[:2]) or select.Choice("reference", ""))
    x = torch.randn(1, 4, 16, requires_grad=True)
    lk.patch_merge(x, torch.randn(16, 64), None, torch.randn(16, 16), None, grid=(2, 2)).sum().backward()
    assert asked == [("patch_merge", "forward"), ("patch_merge", "backward")]


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("LACO_IMPL", "magic")
    with pytest.raises(ValueError, match="LACO_IMPL: got 'magic', expected None or one of 'reference', 'composite'"):
        merge()
    assert merge(impl="reference").shape == (1, 1, 16)
    monkeypatch.setenv("LACO_IMPL", "cuda")
    with pytest.raises(
        RuntimeError, match="LACO_IMPL: got 'cuda', expected an implementation that can run, but the CUDA kernels"
    ):
        merge()


@pytest.mark.parametrize("impl", ["triton", "composite"])
def test_a_kernel_on_the_cpu_without_the_interpreter_is_refused(monkeypatch, impl):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=rf"impl: got '{impl}'.*need an NVIDIA GPU \(or TRITON_INTERPRET=1"):
        merge(impl=impl)


def test_why_an_implementation_is_unavailable(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.unavailable("triton", CPU, torch.float64) is None
    assert "cannot compute in bfloat16" in select.unavailable("triton", CPU, torch.bfloat16)
    assert "on the CPU only" in select.unavailable("triton", CUDA, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select.unavailable("triton", CUDA, torch.bfloat16) is None
    assert "no float64 on a GPU" in select.unavailable("triton", CUDA, torch.float64)
    monkeypatch.setattr(select, "HAS_TRITON", False)
    assert "Triton is not installed" in select.unavailable("triton", CUDA, torch.float32)


def test_why_the_cuda_kernels_are_unavailable(monkeypatch):
    assert "compute capability 8.0 (Ampere) or newer, not cpu" in select.unavailable("cuda", CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert "not 7.5" in select.unavailable("cuda", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    for capability, built, able in (((9, 0), "90a", True), ((9, 0), "80", True), ((8, 6), "80", True), ((8, 6), "90a", False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None, found=capability: found)
        monkeypatch.setattr(select, "_EXTENSION", [SimpleNamespace(ARCHITECTURES=[built]), None])
        assert (select.unavailable("cuda", CUDA, torch.bfloat16) is None) == able, (capability, built)
    assert "built for Hopper GPUs alone; install again with LACO_CUDA_ARCHS" in select.unavailable("cuda", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    assert "in bfloat16 and float16, not float32" in select.unavailable("cuda", CUDA, torch.float32)

    def load(error, problem=None):
        def import_module(name):
            if error is not None:
                raise error
            return SimpleNamespace(problem=lambda: problem)

        select._EXTENSION.clear()
        monkeypatch.setattr(select.importlib, "import_module", import_module)
        return select.unavailable("cuda", CUDA, torch.bfloat16)

    assert "the CUDA extension is not built; install with nvcc" in load(ModuleNotFoundError())
    assert "the CUDA extension does not load: no libstdc++" in load(ImportError("no libstdc++"))
    assert "cannot use this machine's driver: too old" in load(None, "too old")
    with pytest.raises(RuntimeError, match=r"laco_kernels\._cuda: the CUDA extension cannot use"):
        select.extension()
    assert load(None) is None


def test_a_compiler_traces_the_question_without_importing_the_extension(monkeypatch):
    monkeypatch.setattr(select, "_EXTENSION", [])

    def ask(x):
        return x + 1 if select.unavailable("cuda", CUDA, torch.bfloat16) is None else x - 1

    # Where there is no GPU nothing else speaks against it; the operator's body finds out.
    expected = 1 if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0) else -1
    assert torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(1)) == expected
    assert select._EXTENSION == []
