"""The smaller image, compared with what PIL makes of it."""

import numpy as np
import pytest
import torch
from PIL import Image

import laco_kernels as lk


@pytest.mark.parametrize(
    ("grid", "ratio", "out_grid"), [((4, 6), 2, (2, 3)), ((5, 7), 2, (3, 4)), ((6, 9), 3, (2, 3)), ((4, 4), 1, (4, 4))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_downsample_is_pils_bicubic(grid, ratio, out_grid, dtype):
    compressor = lk.nn.build_compressor("downsample", in_dim=8, ratio=ratio, prefix_tokens=1)
    pixels = torch.randn(2, 3, grid[0] * 7, grid[1] * 7).to(dtype)
    small, found = compressor(pixels, grid)
    size = (out_grid[1] * 7, out_grid[0] * 7)
    flat = [Image.fromarray(plane.numpy()).resize(size, Image.Resampling.BICUBIC) for plane in pixels.float().flatten(0, 1)]
    expected = torch.from_numpy(np.stack(flat)).unflatten(0, (2, 3))
    assert found == compressor.out_grid(grid) == out_grid
    assert compressor.num_output_tokens(grid) == out_grid[0] * out_grid[1]
    assert small.dtype == dtype
    rounding = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 5e-6}  # PIL's float32
    torch.testing.assert_close(small.float(), expected, **rounding)


def test_downsample_compiles_and_keeps_gradients():
    compressor = lk.nn.build_compressor("downsample", in_dim=8)
    pixels = torch.randn(1, 3, 28, 42, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(compressor, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels, (4, 6)), compressor(pixels, (4, 6)))
    compressor(pixels, (4, 6))[0].sum().backward()
    torch.testing.assert_close(pixels.grad.sum(), torch.tensor(14.0 * 21 * 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("pixels", "grid", "error", "message"),
    [
        (torch.randn(1, 24, 8), (4, 6), ValueError, "pixels: got 3 dimensions .*pixel_values, not tokens"),
        (torch.zeros(1, 3, 28, 42, dtype=torch.uint8), (4, 6), TypeError, r"pixels: got torch\.uint8"),
        (torch.randn(1, 3, 28, 28), (4, 6), ValueError, "pixels: got 28 x 28, expected square patches on a grid of 4 x 6"),
        (torch.randn(1, 3, 29, 42), (4, 6), ValueError, "pixels: got 29 x 42"),
        (torch.randn(1, 3, 2, 3), (4, 6), ValueError, "pixels: got 2 x 3"),
        (torch.randn(1, 3, 28, 42), 4, TypeError, "grid: got 4"),
    ],
)
def test_downsample_refuses(pixels, grid, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor("downsample", in_dim=8)(pixels, grid)


def test_downsample_has_no_residual():
    with pytest.raises(ValueError, match="residual: got True, expected False"):
        lk.nn.build_compressor("downsample", in_dim=8, residual=True)
