"""What a compressor is compared with: a function of the same inputs and the same parameters, forward and backward."""

import torch

EXACT = {"rtol": 0, "atol": 1e-10}


def tokens_of(compressor, grid, dtype=torch.float64, batch=2):
    """Random tokens for ``compressor``: a tensor, or a list of them where it reads several blocks."""
    shape = (batch, compressor.prefix_tokens + grid[0] * grid[1], compressor.in_dim)
    xs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(compressor.num_blocks)]
    return xs if compressor.num_blocks > 1 else xs[0]


def assert_agrees(compressor, grid, expected, *, layout="raster"):
    """Compare output and gradients with those of ``expected(x)``, which uses the compressor's own parameters, in float64."""
    compressor.double()
    for parameter in compressor.parameters():  # no bias at zero and no norm at one, where a mistake would not show
        torch.nn.init.normal_(parameter, std=0.5)
    x = tokens_of(compressor, grid)
    inputs = [*(x if isinstance(x, list) else [x]), *compressor.parameters()]
    ours, theirs = compressor(x, grid, layout=layout)[0], expected(x)
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert ours.shape[1] == compressor.num_output_tokens(grid)
    seed = torch.randn_like(ours)
    gradients = zip(torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(theirs, inputs, seed), strict=True)
    for i, (mine, reference) in enumerate(gradients):
        torch.testing.assert_close(mine, reference, **EXACT, msg=lambda text, i=i: f"gradient {i}: {text}")


def assert_runs_in_low_precision(compressor, grid):
    """Compare bfloat16, as parameters and by autocast, with float32."""
    x = tokens_of(compressor, grid, torch.float32)
    with torch.no_grad():
        exact, _ = compressor.float()(x, grid)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, _ = compressor(x, grid)
        low = [block.bfloat16() for block in x] if isinstance(x, list) else x.bfloat16()
        pure, _ = compressor.bfloat16()(low, grid)
    compressor.float()
    assert pure.dtype == mixed.dtype == torch.bfloat16
    for y in (pure, mixed):
        assert (y.float() - exact).norm() < 0.05 * exact.norm()


def assert_compiles(compressor, grids):
    """Compile ``compressor`` for changing shapes without a graph break."""
    torch.compiler.reset()  # the recompilations of one forward are counted over all modules
    compiled = torch.compile(compressor, fullgraph=True, dynamic=True, backend="eager")
    for grid in grids:
        x = tokens_of(compressor, grid, torch.float32)
        (ours, ours_grid), (theirs, theirs_grid) = compiled(x, grid), compressor(x, grid)
        torch.testing.assert_close(ours, theirs)
        assert ours_grid == theirs_grid


def assert_resets(compressor):
    """Draw every parameter anew, also where memory holds what it held before."""
    for parameter in compressor.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    compressor.reset_parameters()
    assert all(p.isfinite().all() for p in compressor.parameters())
    assert all(p.unique().numel() > 1 for p in compressor.parameters() if p.dim() > 1)
