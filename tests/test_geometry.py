import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laco_kernels.geometry import Cuts, Windows, check_grid, find_cuts, integer

from .strategies import windows


@given(windows())
def test_counts_agree_with_an_enumeration(w):
    height, width = w.grid
    cells = {(y // w.ratio, x // w.ratio) for y in range(height) for x in range(width)}
    assert w.num_windows == len(cells)
    assert w.out_grid == (1 + max(y for y, _ in cells), 1 + max(x for _, x in cells))
    assert w.num_tokens == w.prefix_tokens + height * width
    assert w.num_output_tokens == w.prefix_tokens + len(cells)
    assert w.is_even == (w.padding == (0, 0))


@given(windows())
def test_split_puts_every_patch_into_its_window(w):
    height, width = w.grid
    patches = torch.arange(1, height * width + 1).reshape(1, -1, 1)
    split = w.split(patches)[0, :, :, 0]
    for i, window in enumerate(split):
        for j, value in enumerate(window):
            y = i // w.out_grid[1] * w.ratio + j // w.ratio
            x = i % w.out_grid[1] * w.ratio + j % w.ratio
            assert value == (y * width + x + 1 if y < height and x < width else 0)


@given(windows(pad=False))
def test_tiles_are_the_windows_without_a_copy(w):
    patches = torch.randn(2, w.num_patches, 3)
    tiles = w.tiles(patches)
    assert tiles.data_ptr() == patches.data_ptr()
    assert torch.equal(tiles.transpose(2, 3).reshape(2, w.num_windows, -1, 3), w.split(patches))


@given(windows(pad=False), st.integers(0, 2))
def test_block_order_is_undone_by_raster_order(w, dim):
    shape = [2, 3, 4]
    shape[dim] = w.num_tokens
    tokens = torch.randn(shape)
    block = w.to_block_order(tokens, dim)
    assert torch.equal(w.to_raster_order(block, dim), tokens)
    assert torch.equal(block.narrow(dim, 0, w.prefix_tokens), tokens.narrow(dim, 0, w.prefix_tokens))


@given(windows(pad=False))
def test_windows_of_block_order_are_views(w):
    tokens = torch.randn(2, w.num_tokens, 3)
    block = w.to_block_order(tokens)[:, w.prefix_tokens :]
    assert torch.equal(block.unflatten(1, (w.num_windows, -1)), w.split(tokens[:, w.prefix_tokens :]))


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_integer_refuses_what_is_none(value):
    with pytest.raises(TypeError, match=r"ratio: got .*, expected an integer of at least 2\. Pass ratio as an int"):
        integer("ratio", value, 2)


def test_integer_takes_anything_with_an_index():
    assert integer("ratio", torch.tensor(3), 2) == 3
    with pytest.raises(ValueError, match="ratio: got 1, expected an integer of at least 2"):
        integer("ratio", 1, 2)


@pytest.mark.parametrize("grid", [24, (24,), (1, 2, 3), "24x24", None])
def test_grid_refuses_what_is_no_pair(grid):
    with pytest.raises(TypeError, match=r"grid: got .*, expected \(height, width\) in patches"):
        check_grid(grid)


def test_a_grid_that_does_not_divide_says_how_to_pad():
    with pytest.raises(ValueError, match=r"grid: got 27 x 27, expected both sides divisible by 2\. Pass pad=True"):
        Windows((27, 27), 2)
    with pytest.raises(ValueError, match="grid height: got 0"):
        Windows((0, 4), 2)
    with pytest.raises(ValueError, match="prefix_tokens: got -1"):
        Windows((4, 4), 2, -1)


@given(windows(pad=False), st.integers(1, 3))
def test_block_order_is_cuts_of_rows_and_columns(w, nested):
    height, width = (side * nested for side in w.grid)
    numbers = torch.arange(height * width).view(height, width)
    # Windows of windows: the grid is that of whole windows, each of nested x nested patches.
    outer = Windows(w.grid, w.ratio)
    inside = numbers.view(w.grid[0], nested, w.grid[1], nested).transpose(1, 2).reshape(1, -1, nested**2)
    order = outer.to_block_order(inside).flatten()
    cuts = find_cuts(order.tolist(), (height, width))
    assert cuts is not None
    assert torch.equal(numbers.view((*cuts.rows, *cuts.columns)).permute(cuts.order).flatten(), order)


def test_cuts_of_windows():
    order = Windows((4, 6), 2).to_block_order(torch.arange(24), 0)
    assert find_cuts(order.tolist(), (4, 6)) == Cuts((2, 2), (3, 2), (0, 2, 1, 3))
    assert find_cuts(range(24), (4, 6)) == Cuts((4,), (6,), (0, 1))
    assert find_cuts([0], (1, 1)) == Cuts((), (), ())


@pytest.mark.parametrize(
    ("grid", "patches"),
    [((2, 2), p) for p in ([0, 1, 3, 2], [3, 2, 1, 0], [0, 3, 1, 2], [0, 0, 0, 0], [0, 1, 0, 1], [0, 2, 0, 2], [1, 0, 3, 2])]
    + [((2, 4), [0, 1, 2, 3, 4, 6, 5, 7]), ((2, 4), [0, 1, 4, 5, 2, 3, 7, 6]), ((2, 3), [0, 1, 3, 4, 2, 5])],
)
def test_what_is_no_order_by_cuts(grid, patches):
    assert find_cuts(patches, grid) is None


@given(st.permutations(range(12)))
def test_cuts_are_right_or_none(patches):
    cuts = find_cuts(patches, (3, 4))
    if cuts is not None:
        assert torch.arange(12).view((*cuts.rows, *cuts.columns)).permute(cuts.order).flatten().tolist() == patches
