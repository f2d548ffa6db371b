"""The operators inside an encoder as cases, and the numerical promise checked on each of their outputs and gradients."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from laco_kernels import ops, testing

NORM_ARGUMENTS = ("x", "delta", "weight", "bias", "scale")


@dataclass(frozen=True)
class TowerCase:
    """One operator on ``shape``, the shape of its result; ``without`` names the arguments that are ``None``."""

    op: str
    shape: tuple
    options: dict = field(default_factory=dict)
    without: tuple = ()

    def __str__(self):
        given = [f"{name}={value}" for name, value in self.options.items()] + [f"no {name}" for name in self.without]
        return " ".join([self.op, "x".join(map(str, self.shape)), *given])

    def inputs(self, dtype, device, seed=0):
        """Draw the operator's tensors by name."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        if self.op != "add_norm":
            return {"h": draw(*self.shape[:-1], self.shape[-1] * (2 if self.op == "gated_silu" else 1))}
        shapes = (self.shape, self.shape, *[self.shape[-1:]] * 3)
        drawn = {name: draw(*shape) for name, shape in zip(NORM_ARGUMENTS, shapes, strict=True)}
        return {name: tensor for name, tensor in drawn.items() if name not in self.without}

    def __call__(self, inputs, impl):
        """Run the operator; return its new tensors by name."""
        if self.op != "add_norm":
            return {"y": getattr(ops, self.op)(inputs["h"], **self.options, impl=impl)}
        x, delta, weight, bias, scale = (inputs.get(name) for name in NORM_ARGUMENTS)
        total, normed = ops.add_norm(x, delta, weight, bias, scale=scale, **self.options, impl=impl)
        return {"normed": normed} if delta is None else {"total": total, "normed": normed}


def grads_like(outputs, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(y.shape, generator=generator).to(device, dtype) for name, y in outputs.items()}


def everything(case, inputs, impl, grads):
    """Return outputs by name, and the gradients of all inputs as ``"d<name>"``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = case(leaves, impl)
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [grads[name] for name in outputs])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {**{name: y.detach() for name, y in outputs.items()}, **named}


def broken_promises(case, impl, dtype, device, inputs=None, grads=None):
    """Return error and budget of every output and gradient that errs more than :mod:`laco_kernels.testing` allows."""
    inputs = case.inputs(dtype, device) if inputs is None else inputs
    if grads is None:
        with torch.no_grad():
            grads = grads_like(case(inputs, "reference"), dtype, device)
    exact, exact_grads = ({name: tensor.double() for name, tensor in tensors.items()} for tensors in (inputs, grads))
    truth = everything(case, exact, "reference", exact_grads)
    shaken = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        near, near_grads = (
            {name: testing._round_once(tensor, dtype, generator) for name, tensor in tensors.items()}
            for tensors in (exact, exact_grads)
        )
        shaken.append(everything(case, near, "reference", near_grads))
    eager, actual = (everything(case, inputs, which, grads) for which in ("reference", impl))
    verdicts = {n: testing.compare(actual[n], eager[n], truth[n], [draw[n] for draw in shaken]) for n in truth}
    return {name: (error, budget) for name, (error, budget, ok) in verdicts.items() if not ok}


def norm(*shape, without=(), **options):
    return TowerCase("add_norm", shape, options, without)


# Small enough for Triton's interpreter; no width is a power of two, and most counts of rows end inside a tile.
CASES = (
    norm(2, 7, 40),
    norm(2, 5, 24, kind="rms", without=("bias", "scale")),
    norm(3, 9, 130, kind="layer", eps=1e-5, without=("scale",)),
    norm(2, 17, 72, kind="rms", eps=1e-3),
    norm(1, 33, 20, without=("delta", "scale")),
    norm(5, 56, kind="rms", without=("delta", "bias", "scale")),
    norm(2, 3, 2, 12, without=("bias",)),
    norm(21, without=("scale",)),
    norm(0, 4, 16),
    TowerCase("gated_silu", (2, 7, 40)),
    TowerCase("gated_silu", (9, 300)),
    TowerCase("gated_silu", (0, 3, 8)),
    TowerCase("activate", (2, 7, 40), {"activation": "gelu"}),
    TowerCase("activate", (11, 260), {"activation": "gelu_tanh"}),
    TowerCase("activate", (2, 3, 5, 24), {"activation": "quick_gelu"}),
    TowerCase("activate", (13,), {"activation": "quick_gelu"}),
)

# The encoders of the papers, for a GPU.
LARGE_CASES = (
    norm(4, 576, 1024, kind="rms", eps=1e-5, without=("bias", "scale")),
    norm(4, 576, 1024, kind="rms", eps=1e-5, without=("delta", "bias", "scale")),
    norm(2, 729, 1152, without=("scale",)),
    norm(2, 1025, 1024),
    norm(1, 1025, 3200, kind="rms", without=("bias",)),
    norm(1, 9, 8192),
    TowerCase("gated_silu", (4, 576, 2816)),
    TowerCase("activate", (2, 729, 4304), {"activation": "gelu_tanh"}),
    TowerCase("activate", (2, 1025, 4096), {"activation": "gelu"}),
    TowerCase("activate", (2, 577, 4096), {"activation": "quick_gelu"}),
)


@st.composite
def layouts(draw, tensor):
    """The same values elsewhere in memory: transposed, a slice of something larger, behind a class token, expanded."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "behind", "expanded"]))
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        around = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        return around[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)
    if kind == "behind" and tensor.dim() > 1:
        around = tensor.new_full((*tensor.shape[:-2], tensor.shape[-2] + 2, tensor.shape[-1] + 8), float("nan"))
        return around[..., 1:-1, 8:].copy_(tensor)
    if kind == "expanded" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor
