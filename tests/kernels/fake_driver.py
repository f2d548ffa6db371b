"""Run as a program: the kernels inside an encoder, compiled for sm_90 and launched on a driver that only takes notes."""

import sys
from importlib.util import find_spec

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from laco_kernels.kernels import select

NOTES, LOOKUPS = [], []


class Utils:
    def load_binary(self, *_):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        plain = [(t.shape, t.dtype, t.stride()) if isinstance(t, torch.Tensor) else t for t in arguments]
        NOTES.append((self.name, (x, y, z), plain))


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def calls_of(function):
    """Return how many functions in Python a call enters."""
    seen = []
    sys.setprofile(lambda _, event, __: seen.append(event) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(seen) - 1


# The most functions that an optimised layer of an encoder may enter more than a stock one, without gradients and with.
LAYERS = {"aimv2": (155, 190), "siglip": (75, 130), "internvl": (75, 130), "clip": (105, 145)}


def check_layers():
    from laco_kernels import hf
    from tests.hf.optimised import made

    for family, bounds in LAYERS.items():
        x, mask = torch.zeros(2, 16, 32), () if family == "internvl" else (None,)
        for grad, bound in zip((False, True), bounds, strict=True):
            counts = []
            for optimised in (False, True):
                model = made(family).float()
                if optimised:
                    hf.optimize(model, impl="triton")
                layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]
                with torch.set_grad_enabled(grad):
                    layer(x, *mask)
                    counts.append(calls_of(lambda layer=layer, x=x, mask=mask: layer(x, *mask)))
            print(family, "with gradients" if grad else "without", *counts)
            assert counts[1] - counts[0] <= bound, f"{family} enters {counts} functions in Python, {bound} more at most"


def main():
    driver.set_active(Driver())
    select.unavailable = lambda *_: None
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: LOOKUPS.append(self) or run(self, *args, **kwargs)
    from laco_kernels.ops.activation import run_activate, run_gated_silu
    from laco_kernels.ops.add_norm import run_add_norm
    from laco_kernels.ops.gelu_mlp import run_gelu_mlp
    from laco_kernels.ops.packed_linear import run_packed_linear

    x, delta, h = torch.zeros(2, 3, 64), torch.zeros(2, 3, 64), torch.zeros(2, 3, 128)
    weight, bias, scale = (torch.zeros(64) for _ in range(3))
    rows = [torch.zeros(64, 64) for _ in range(2)]
    whole = torch.zeros(128, 64)
    block = [torch.zeros(shape) for shape in ((128, 64), (128,), (64, 128), (64,))]
    operators = {  # and the most functions that forward without gradients, and forward with backward, may enter
        "add_norm": (lambda *t: run_add_norm(*t, "layer", 1e-6, "triton")[1], (x, delta, weight, bias, scale), (40, 95)),
        "rms_norm": (lambda x, w: run_add_norm(x, None, w, None, None, "rms", 1e-6, "triton")[1], (x, weight), (40, 95)),
        "gated_silu": (lambda h: run_gated_silu(h, "triton"), (h,), (40, 80)),
        "activate": (lambda x: run_activate(x, "gelu", "triton"), (x,), (40, 80)),
        "gelu_mlp": (lambda *t: run_gelu_mlp(*t, "none", "composite"), (x, *block), (38, 115)),
        "packed_linear": (lambda x, *w: run_packed_linear(x, whole, None, w, []), (x, *rows), (18, 45)),
    }
    for name, (call, tensors, bounds) in operators.items():
        leaves = [t.requires_grad_() for t in tensors]

        def forward(call=call, leaves=leaves):
            with torch.no_grad():
                call(*leaves)

        def both(call=call, leaves=leaves):
            y = call(*leaves)
            y.backward(torch.zeros_like(y))

        for function, bound in zip((forward, both), bounds, strict=True):
            NOTES.clear(), LOOKUPS.clear()
            function()
            first, looked = list(NOTES), len(LOOKUPS)
            NOTES.clear()
            function()
            assert first == NOTES, (name, NOTES, first)
            assert len(LOOKUPS) == looked, f"{name} was looked up again"
            calls = calls_of(function)
            print(name, function.__name__, calls)
            assert calls <= bound, f"{name} {function.__name__} enters {calls} functions in Python, more than {bound}"

    # Another address, dtype, stride or option is another kernel to Triton.
    memory = torch.zeros(2 * 3 * 64 + 1)
    with torch.no_grad():
        for other in (memory[1:].view(2, 3, 64), memory[1:].view(2, 3, 64), x.double(), x[:, 1:], x[:1]):
            NOTES.clear(), LOOKUPS.clear()
            run_activate(other, "gelu", "triton")
            assert (len(NOTES), len(LOOKUPS)) == (1, 1)
        LOOKUPS.clear()
        run_activate(x, "quick_gelu", "triton")
        assert len(LOOKUPS) == 1
    if find_spec("transformers"):  # which `make test-oldest` is without
        check_layers()
    print("passed")


if __name__ == "__main__":
    main()
