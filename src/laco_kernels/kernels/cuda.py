"""``impl="cuda"``: every product of the operators, forward and backward, in a kernel that does everything else on the way.

bfloat16 and float16 on compute capability 8.0 and newer; ``csrc/`` has the kernels. Windows are gathered where they lie, odd
grids are completed with zeros, prefix tokens are dropped; bias, GELU, saved pre-activation, GELU's derivative with the
recomputed activation and the bias's gradient, the residual and its gradient, and the way back to tokens are the products'
epilogues.
The activation of an operator that ends in one is gone back through in a pass of Triton's, as is done everywhere else.

What the kernels cannot address, or were not written for, is an :class:`~laco_kernels.errors.UnsupportedError`:
an explicit ``impl="cuda"`` raises it, the automatic choice takes the composite instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laco_kernels.kernels import pointwise
from laco_kernels.kernels.common import activated, column_sum
from laco_kernels.kernels.cuda_products import (
    ACTIVATIONS,
    MOST_SIDE,
    MOST_SOURCES,
    addressable,
    forward,
    layer,
    of_weight,
    plain,
    residual_of,
    rows_of,
    strides,
    through_activation,
    to_tokens,
    unsupported,
    windows_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from laco_kernels.geometry import Windows
    from laco_kernels.kernels.cuda_products import Tokens


def patch_merge_forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    *,
    windows: Windows,
    residual_kind: str,
    approximate: str,
    layout: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.patch_merge_forward`; without ``save`` the pre-activation is empty."""
    batch, prefix, rows = x.shape[0], windows.prefix_tokens, windows.num_windows
    hidden, out = weight1.shape[0], weight2.shape[0]
    _check_side("ratio", windows)
    if approximate not in ACTIVATIONS:
        raise unsupported("approximate", repr(approximate), "'none' or 'tanh'")
    tokens = strides("x", x, batch * rows)
    weight1, bias1 = layer("1", weight1, bias1)
    weight2, bias2 = layer("2", weight2, bias2)

    pre = x.new_empty((batch, rows, hidden) if save else (0,))
    act = x.new_empty(batch, rows, hidden)
    patches = x[:, prefix:]
    source = windows_of(tokens, batch, windows, layout)
    forward([patches], source, act, weight1, bias1, approximate=approximate, pre=pre if save else None)

    y = x.new_empty(batch, prefix + rows, out)
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    if residual_kind != "none":
        residual = residual_of(tokens, batch, windows, layout, residual_kind)
        forward([act, patches], plain(act), y, weight2, bias2, out_prefix=prefix, **residual)
    elif prefix and batch > 1:  # images that do not follow each other
        merged = x.new_empty(batch, rows, out)
        forward([act], plain(act), merged, weight2, bias2)
        y[:, prefix:] = merged
    else:
        forward([act], plain(act), y[:, prefix:], weight2, bias2)
    return y, pre


def patch_merge_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    residual_kind: str,
    approximate: str,
    layout: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.patch_merge_backward`."""
    prefix = windows.prefix_tokens
    # Another implementation may have gone forward, and hooks bring back what was saved in strides of their choice.
    weight1, weight2 = layer("1", weight1.contiguous(), None)[0], layer("2", weight2.contiguous(), None)[0]
    _check_side("ratio", windows)
    g = addressable(grad[:, prefix:])
    dx = dweight1 = dbias1 = dweight2 = dbias2 = act = None
    if any(needs[:3]):
        dpre, dbias1, act = through_activation(g, weight2, pre, approximate, with_sums=needs[2], with_act=needs[3])
        if needs[1]:
            dweight1 = _of_window_weight(dpre, x, windows, layout)
        if needs[0]:
            dx = x.new_empty(x.shape)
            if prefix:
                dx[:, :prefix] = grad[:, :prefix]
            to_tokens(dpre, weight1, dx, windows, layout, residual_kind, g)
    elif needs[3]:
        act = activated(pre, approximate)
    if act is not None:
        dweight2 = of_weight(g, [act], plain(act), act.shape[2])
    if needs[4]:
        dbias2 = column_sum(g)
    return [dx, dweight1, dbias1, dweight2, dbias2]


gelu_mlp_forward, gelu_mlp_backward = patch_merge_forward, patch_merge_backward  # one token a window, without a residual


def strided_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, windows: Windows, layout: str, **epilogue: Any
) -> torch.Tensor:
    """See :func:`laco_kernels.reference.strided_conv_forward`; ``epilogue`` is what the product does besides."""
    _check_side("kernel_size", windows)
    batch, rows = x.shape[0], windows.num_windows
    tokens = strides("x", x, batch * rows)
    weight, bias = layer("", weight, bias)
    y = x.new_empty(batch, rows, weight.shape[0])
    forward([x[:, windows.prefix_tokens :]], windows_of(tokens, batch, windows, layout), y, weight, bias, **epilogue)
    return y


def strided_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.strided_conv_backward`."""
    weight, _ = layer("", weight.contiguous(), None)  # as for the patch merge
    _check_side("kernel_size", windows)
    g = addressable(grad)
    dx = None
    if needs[0]:
        dx = x.new_empty(x.shape)
        dx[:, : windows.prefix_tokens].zero_()
        to_tokens(g, weight, dx, windows, layout, "none", g)
    dweight = _of_window_weight(g, x, windows, layout) if needs[1] else None
    return [dx, dweight, column_sum(grad) if needs[2] else None]


def strided_conv_gelu_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    windows: Windows,
    layout: str,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.strided_conv_gelu_forward`; without ``save`` the pre-activation is empty."""
    pre = x.new_empty((x.shape[0], windows.num_windows, weight.shape[0]) if save else (0,))
    epilogue = {"approximate": approximate, "pre": pre if save else None}
    return strided_conv_forward(x, weight, bias, windows=windows, layout=layout, **epilogue), pre


def strided_conv_gelu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    windows: Windows,
    layout: str,
    approximate: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.strided_conv_gelu_backward`."""
    dpre, dbias = _back_through_last_activation(grad, pre, approximate, needs[2])
    dx, dweight, _ = strided_conv_backward(dpre, x, weight, [*needs[:2], False], windows=windows, layout=layout)
    return [dx, dweight, dbias]


def multi_block_linear_gelu_forward(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    prefix_tokens: int,
    approximate: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_forward`; without ``save`` the pre-activation is empty."""
    blocks = _blocks(xs, prefix_tokens)
    weight, bias = layer("", weight, bias)
    shape = (blocks.batch, blocks.width, weight.shape[0])
    y, pre = xs[0].new_empty(shape), xs[0].new_empty(shape if save else (0,))
    reads = [x[:, prefix_tokens:] for x in xs]
    forward(reads, blocks, y, weight, bias, approximate=approximate, pre=pre if save else None)
    return y, pre


def multi_block_linear_gelu_backward(
    grad: torch.Tensor,
    xs: Sequence[torch.Tensor],
    pre: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    *,
    prefix_tokens: int,
    approximate: str,
) -> list[torch.Tensor | None]:
    """See :func:`laco_kernels.reference.multi_block_linear_gelu_backward`.

    A gradient of the blocks, which frozen encoders never ask for, is a product of torch's for each.
    """
    weight, _ = layer("", weight.contiguous(), None)
    dpre, dbias = _back_through_last_activation(grad, pre, approximate, needs[-1])
    channels = xs[0].shape[2]
    dxs: list[torch.Tensor | None] = []
    for i, x in enumerate(xs):
        dx = None
        if needs[i]:
            dx = x.new_empty(x.shape)
            dx[:, :prefix_tokens].zero_()
            dx[:, prefix_tokens:] = dpre @ weight[:, i * channels : (i + 1) * channels]
        dxs.append(dx)
    dweight = None
    if needs[-2]:
        reads = [x[:, prefix_tokens:] for x in xs]
        dweight = of_weight(dpre, reads, _blocks(xs, prefix_tokens), len(xs) * channels)
    return [*dxs, dweight, dbias]


def _check_side(argument: str, windows: Windows) -> None:
    if windows.ratio > MOST_SIDE:
        raise unsupported(argument, windows.ratio, f"at most {MOST_SIDE}")


def _blocks(xs: Sequence[torch.Tensor], prefix_tokens: int) -> Tokens:
    """Rows of blocks, which follow each other along the depth."""
    batch, rows = xs[0].shape[0], xs[0].shape[1] - prefix_tokens
    if len(xs) > MOST_SOURCES:
        raise unsupported("xs", f"{len(xs)} blocks", f"at most {MOST_SOURCES}")
    blocks = [strides(f"xs[{i}]", x, batch * rows) for i, x in enumerate(xs)]
    first = blocks[0]
    for i, block in enumerate(blocks):
        if block[1:] != first[1:]:
            raise unsupported(
                f"xs[{i}]", f"strides {xs[i].stride()}", f"{xs[0].stride()}, those of xs[0],", "Copy those that differ"
            )
    sources = [block.behind(prefix_tokens) for block in blocks]
    return rows_of(batch, rows, first.channels, first.stride_t, first.stride_b, *sources)


def _of_window_weight(grad: torch.Tensor, x: torch.Tensor, windows: Windows, layout: str) -> torch.Tensor:
    tokens = strides("x", x, x.shape[0] * windows.num_windows)
    rows = windows_of(tokens, x.shape[0], windows, layout)
    return of_weight(grad, [x[:, windows.prefix_tokens :]], rows, windows.ratio**2 * x.shape[2])


def _back_through_last_activation(
    grad: torch.Tensor, pre: torch.Tensor, approximate: str, with_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dpre, dbias, _ = pointwise.gelu_backward(grad, pre, approximate, with_sums=with_sums)
    return dpre, dbias
