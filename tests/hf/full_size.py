"""How far real encoders, optimised, are from float64, beside eager: ``python -m tests.hf.full_size [name ...]`` on a processor.

Each is compressed, at full depth and width, on one image with random weights; the final features and every gradient count.
"""

import copy
import sys

import torch
from transformers import AutoConfig, AutoModel

import laco_kernels as lk
from laco_kernels.bench import cases

REAL = ["aimv2-l-336", "siglip-so400m-384", "internvit-300m-448", "clip-l-336"]


def errors(name, device, dtype, impl):
    """Return by name the relative errors of ours and of eager, and whether :func:`lk.hf.restore` gives eager's numbers back."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(AutoConfig.from_pretrained(cases.FOLDER / name)).to(device)
    model = lk.hf.compress(encoder, zero_init_last=False)
    size = encoder.config.image_size
    x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size), device=device)
    names = [name for name, _ in model.named_parameters()]

    def everything(model, x):
        y = model(x).last_hidden_state
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        gradients = torch.autograd.grad(y, list(model.parameters()), grad, allow_unused=True)
        return {"y": y.detach(), **{n: g for n, g in zip(names, gradients, strict=True) if g is not None}}

    truth = everything(copy.deepcopy(model).double(), x.double())
    model, x = model.to(dtype), x.to(dtype)
    eager = everything(model, x)
    lk.hf.optimize(model, impl=impl)
    ours = everything(model, x)
    scale = {n: t.norm() for n, t in truth.items()}
    found = {n: [float((r[n].double() - truth[n]).norm() / scale[n]) for r in (ours, eager)] for n in truth if scale[n] > 0}
    lk.hf.restore(model)
    return found, torch.equal(everything(model, x)["y"], eager["y"])


def beyond_the_promise(found, dtype):
    """Return what errs more than twice as much as eager, plus one rounding step."""
    return {n: (ours, eager) for n, (ours, eager) in found.items() if ours > 2 * eager + torch.finfo(dtype).eps}


if __name__ == "__main__":
    broken = False
    for name in sys.argv[1:] or REAL:
        found, restored = errors(name, "cpu", torch.float32, "reference")
        (ours, eager), worst = found["y"], max(found, key=lambda n: found[n][0] / (2 * found[n][1] + 1e-12))
        wrong = beyond_the_promise(found, torch.float32)
        print(
            f"{name}: features {ours:.2e} (eager {eager:.2e}); {len(found)} tensors, {len(wrong)} beyond the promise; ", end=""
        )
        print(f"nearest to it {worst}: {found[worst][0]:.2e} (eager {found[worst][1]:.2e}); restored {restored}", flush=True)
        broken |= bool(wrong) or not restored
    sys.exit(broken)
