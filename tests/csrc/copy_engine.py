"""Hopper's kernels as index arithmetic in NumPy: what the copy engine brings, multiplies and writes, by what the host says.

It consumes ``<product>_plan``, ``schedule`` and ``<product>_operands`` of the extension and touches no memory: an operand is
the addresses of its elements, -1 where zeros arrive. The same steps on the device are ``csrc/hopper_producer.cuh`` and
``csrc/hopper_gemm.cuh``; that those take them is seen on the emulated GPU.
"""

import numpy as np

NOWHERE = -1
STEP = CHUNK = 64


def box(tensor_map, *at):
    """Addresses of a box of a tiled map that starts ``at`` (channels first), in the shape of the box turned around."""
    found, inside = np.zeros((), np.int64), np.ones((), bool)
    strides = [1, *tensor_map["strides"]]
    dimensions = list(zip(at, tensor_map["box"], tensor_map["sizes"], strides, strict=True))
    for first, length, size, stride in reversed(dimensions):
        index = first + np.arange(length)
        found = found[..., None] + index * stride
        inside = inside[..., None] & (index >= 0) & (index < size)
    return np.where(inside, tensor_map["base"] + 2 * found, NOWHERE)


def im2col(tensor_map, c, x, y, b, dx, dy):
    """Addresses of 64 channels of successive windows' pixel (dx, dy), the first window at (x, y) of image b: [rows, 64]."""
    (channels, width, height, images), (stride_x, stride_y, stride_b) = tensor_map["sizes"], tensor_map["strides"]
    side, (_, rows) = tensor_map["side"], tensor_map["box"]
    across, down = -(-width // side), -(-height // side)
    number = (b * down + y // side) * across + x // side + np.arange(rows)
    b, q = np.divmod(number, across * down)
    y, x = q // across * side + dy, q % across * side + dx
    index = c + np.arange(CHUNK)
    pixel = b * stride_b + y * stride_y + x * stride_x
    inside = ((x < width) & (y < height) & (b < images))[:, None] & (index < channels)
    return np.where(inside, tensor_map["base"] + 2 * (pixel[:, None] + index), NOWHERE)


def rows_box(tensor_map, rows, c, m, dx=0, dy=0):
    if not rows["im2col"]:
        return box(tensor_map, c, m)
    b, q = divmod(m, rows["per_image"])
    y, x = divmod(q, rows["out_width"])
    return im2col(tensor_map, c, x * rows["side"], y * rows["side"], b, dx, dy)


def chunk(told, column):
    """Tap and first channel of 64 columns of a gradient."""
    tap, number = divmod(column // CHUNK, told["chunks_a_tap"])
    return tap, number * CHUNK


def share(told, rank):
    """Steps of a block of a cluster."""
    part = -(-told["steps"] // told["splits"])
    return range(min(part * rank, told["steps"]), min(part * (rank + 1), told["steps"]))


def forward_slot(told, m0, n0, step):
    """Addresses of A [bm, 64] and B [bn, 64] of a step along the depth."""
    tap, number = divmod(step, told["channel_steps"])
    side = told["rows"]["side"]
    source, of_source = divmod(tap, side**2)
    dy, dx = divmod(of_source, side)
    a = rows_box(told["sources"][source], told["rows"], number * STEP, m0, dx, dy)
    return a, box(told["other"], number * STEP, tap, n0)[:, 0]


def input_gradient_slot(told, m0, n0, step, width):
    a = rows_box(told["sources"][0], told["rows"], step * STEP, m0)
    chunks = [chunk(told, n0 + j) for j in range(0, width, CHUNK)]
    return a, np.concatenate([box(told["other"], c, tap, step * STEP)[:, 0] for tap, c in chunks], 1).T


def weight_gradient_slot(told, m0, n0, step, height, width):
    a = [rows_box(told["other"], told["other_rows"], m0 + j, step * STEP) for j in range(0, height, CHUNK)]
    side, b = told["rows"]["side"], []
    for j in range(0, width, CHUNK):
        tap, c = chunk(told, n0 + j)
        source, of_source = divmod(tap, side**2)
        dy, dx = divmod(of_source, side)
        if source >= len(told["sources"]):
            source, c = 0, told["chunks_a_tap"] * CHUNK
        b.append(rows_box(told["sources"][source], told["rows"], c, step * STEP, dx, dy))
    return np.concatenate(a, 1).T, np.concatenate(b, 1).T


def added(told, m0, column):
    """Addresses of what is added to 64 columns: [taps, bm, 64]."""
    rows, found = told["added_rows"], []
    for tap in range(rows["side"] ** 2):
        dy, dx = divmod(tap, rows["side"])
        c = column if rows["im2col"] else tap * told["n"] + column
        found.append(rows_box(told["added"], rows, c, m0, dx, dy))
    return np.stack(found)


def residual_tokens(image, m, tap):
    """Addresses of windows' pixel, or of windows themselves where they are single tokens: [rows, channels]."""
    b, at = token(image, m, tap)
    places = image["base"] + 2 * ((b * image["stride_b"] + at * image["stride_t"])[:, None] + np.arange(image["channels"]))
    return np.where((at != NOWHERE)[:, None], places, NOWHERE)


def pieces(told, bn, rank):
    """First columns, in a tile, of the pieces that a block of a cluster writes."""
    starts = [min(first, bn - CHUNK) for first in range(0, bn, CHUNK)]
    return [first for i, first in enumerate(starts) if i % told["splits"] == rank]


def token(image, m, tap):
    """Image and token of window m's pixel; NOWHERE where the grid has none."""
    b, q = np.divmod(m, image["per_image"])
    dy, dx = divmod(tap, image["side"])
    y, x = q // image["out_width"] * image["side"] + dy, q % image["out_width"] * image["side"] + dx
    return b, np.where((y < image["height"]) & (x < image["width"]), y * image["width"] + x, NOWHERE)


def written(told, product, m0, column):
    """Addresses that a piece of 16 rows and 64 columns is written to: [16, 64]."""
    rows, columns = m0 + np.arange(16), np.arange(CHUNK)
    if "out" in told and not (product == "forward" and told["out_prefix"]):
        if product != "weight_gradient":
            return box(told["out"], column, m0)
        tap, c = chunk(told, column)
        there = column < told["columns"]  # what lies behind is not sent
        return box(told["out"], c, tap, m0)[:, 0] if there else np.full((16, CHUNK), NOWHERE)
    if product == "forward":
        b, c = rows // told["residual"]["per_image"], column
        line, there = rows + (b + 1) * told["out_prefix"], rows < told["m"]
    else:
        tap, c = chunk(told, column)
        b, at = token(told["grid"], rows, tap)
        of_image = told["out_prefix"] + told["grid"]["height"] * told["grid"]["width"]
        line, there = b * of_image + told["out_prefix"] + at, (rows < told["m"]) & (at != NOWHERE) & (tap < told["taps"])
    inside = there[:, None] & (c + columns < told["n"])
    return np.where(inside, told["out_tokens"] + 2 * (line[:, None] * told["n"] + c + columns), NOWHERE)
