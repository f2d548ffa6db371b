"""The emulated copy engine against torch and numpy: where a box's elements lie, and what an encoder refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc.emulator import build

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the emulated GPU"),
]


@pytest.fixture(scope="module")
def emulator():
    emulator = build.load().emulator
    emulator.choose()
    return emulator


def unswizzled(lines):
    """``[lines, 64]`` as they lie in shared memory from an address that 1024 divides: sixteenths of a line change places."""
    out = np.empty_like(lines)
    for i, line in enumerate(lines.reshape(len(lines), 8, 8)):
        for chunk in range(8):
            out.reshape(len(lines), 8, 8)[i, chunk] = line[chunk ^ (i % 8)]
    return out


def numbers(*shape):
    """Different integers, as int16: the copy engine does not look at what it moves."""
    return (torch.arange(int(np.prod(shape))) % 30011 + 1).to(torch.int16).reshape(shape)


def encode(emulator, tensor, box, corners=(), steps=None):
    """A map of a tensor whose dimensions come last first, as the driver counts them."""
    sizes, strides = list(tensor.shape)[::-1], [2 * stride for stride in tensor.stride()][::-1][1:]
    steps = steps or [1] * len(sizes)
    return emulator.encode(address=tensor.data_ptr(), sizes=sizes, strides=strides, box=box, steps=steps, corners=list(corners))


def load(emulator, tensor_map, at, lines, offsets=()):
    out = np.zeros((lines, 64), np.int16)
    error = emulator.move_box(map=tensor_map, at=at, offsets=list(offsets), bytes=out.nbytes, memory=out.ctypes.data)
    assert not error
    return torch.from_numpy(unswizzled(out))


@given(st.data())
def test_im2col_is_unfold(emulator, data):
    """Windows of an image, tap by tap: a strided convolution's, corners as a library for convolutions sets them."""
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)) * 8
    kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    height, width = (data.draw(st.integers(max(1, kernel - before - after), 9)) for _ in range(2))
    image = numbers(batch, height, width, channels)
    # [B, C * kernel², windows]; int16 fits in float
    columns = F.unfold(F.pad(image.permute(0, 3, 1, 2).float(), [before, after] * 2), kernel, stride=stride)
    columns = columns.reshape(batch, channels, kernel, kernel, -1).permute(0, 4, 2, 3, 1).flatten(0, 1)  # [M, ky, kx, C]

    lower, upper = -before, after - (kernel - 1)
    corners = [lower, lower, upper, upper]
    tensor_map = encode(emulator, image, [64, 32], corners, [1, stride, stride, 1])
    assert tensor_map
    per_line = (width + before + after - kernel) // stride + 1
    per_image = per_line * ((height + before + after - kernel) // stride + 1)
    first = data.draw(st.integers(0, batch * per_image - 1))
    b, y, x = first // per_image, first % per_image // per_line, first % per_line
    dx, dy, c = (data.draw(st.integers(0, most - 1)) for most in (kernel, kernel, channels))
    got = load(emulator, tensor_map, [c, lower + x * stride, lower + y * stride, b], 32, [dx, dy])
    want = F.pad(columns[first : first + 32, dy, dx, c : c + 64], [0, 64, 0, 32])[:32, :64]
    assert torch.equal(got.float(), want)


@given(st.data())
def test_tiles_are_slices_of_a_padded_tensor(emulator, data):
    rank = data.draw(st.integers(2, 3))
    shape = [data.draw(st.integers(1, 40)) for _ in range(rank - 1)] + [8 * data.draw(st.integers(1, 20))]
    box = [64, *(data.draw(st.integers(1, 12)) for _ in range(rank - 1))]
    at = [data.draw(st.integers(-70, 180)), *(data.draw(st.integers(-14, 45)) for _ in range(rank - 1))]
    whole = numbers(*shape[:-1], shape[-1] + 8)
    tensor = whole[..., : shape[-1]]
    lines = int(np.prod(box[1:]))
    padded = F.pad(tensor, [300, 300] + [60, 60] * (rank - 1))
    place = tuple(
        slice(a + edge, a + edge + size) for a, size, edge in zip(at[::-1], box[::-1], [60] * (rank - 1) + [300], strict=True)
    )
    tensor_map = encode(emulator, tensor, box)
    assert torch.equal(load(emulator, tensor_map, at, lines), padded[place].reshape(lines, 64))

    # A store writes what lies in the tensor and nothing else.
    source = -numbers(lines, 64)
    memory = unswizzled(source.numpy())
    padded[place] = source.reshape(padded[place].shape)
    rest = whole[..., shape[-1] :].clone()
    error = emulator.move_box(map=tensor_map, at=at, bytes=memory.nbytes, memory=memory.ctypes.data, store=True)
    assert not error
    middle = tuple(slice(edge, edge + size) for size, edge in zip(shape, [60] * (rank - 1) + [300], strict=True))
    assert torch.equal(tensor, padded[middle])
    assert torch.equal(whole[..., shape[-1] :], rest)


def test_steps_leave_lines_out(emulator):
    tensor = numbers(9, 64)
    got = load(emulator, encode(emulator, tensor, [64, 7], steps=[1, 3]), [0, 1], 3)
    assert torch.equal(got, tensor[1:8:3])


PASSING = {"address": 4096, "sizes": [64, 8, 8, 4], "strides": [128, 1024, 8192], "box": [64, 32], "steps": [1, 2, 2, 1]}
IM2COL = {"corners": [0, 0, 0, 0]}
TILES = {"box": [64, 8, 2, 1], "steps": [1, 1, 1, 1]}


@pytest.mark.parametrize("kind", [IM2COL, TILES])
@pytest.mark.parametrize(
    "change",
    [
        {"address": 4104}, {"address": 0}, {"sizes": [64, 0, 8, 4]}, {"sizes": [64, 2**32 + 1, 8, 4]},
        {"strides": [136, 1024, 8192]}, {"strides": [128, 1024, 2**40]}, {"steps": [1, 9, 1, 1]},
        {"steps": [1, 0, 1, 1]}, {"box": [128, 8, 2, 1]}, {"box": [60, 8, 2, 1]},
        {"box": [0, 8, 2, 1]}, {"sizes": [64], "strides": [], "box": [60]},
    ],
)  # fmt: skip
def test_what_the_driver_refuses_is_refused(emulator, kind, change):
    assert emulator.encode(**{**PASSING, **kind})
    assert not emulator.encode(**{**PASSING, **kind, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"box": [64, 1025]}, {"corners": [-129, 0, 0, 0]}, {"corners": [0, 0, 0, 128]}, {"strides": [128, 1008, 8192]},
        {"strides": [112, 1024, 8192]},
    ],
)  # fmt: skip
def test_what_the_driver_refuses_of_im2col_alone(emulator, change):
    assert not emulator.encode(**{**PASSING, **IM2COL, **change})


def test_tiles_are_at_most_256_long(emulator):
    assert not emulator.encode(**{**PASSING, **TILES, "box": [64, 257, 1, 1]})


def test_a_map_of_another_kind_or_rank_is_an_error(emulator):
    tensor, out = numbers(8, 64), np.zeros((8, 64), np.int16)
    options = {"bytes": out.nbytes, "memory": out.ctypes.data}
    tensor_map = encode(emulator, tensor, [64, 8])
    assert "rank 3 with a map of tiles, rank 2" in emulator.move_box(map=tensor_map, at=[0, 0, 0], **options)
    assert "im2col tensors" in emulator.move_box(map=tensor_map, at=[0, 0], offsets=[0], **options)
    assert "never encoded" in emulator.move_box(map=bytes(128), at=[0, 0], **options)
    assert "more bytes arrive" in emulator.move_box(map=tensor_map, at=[0, 0], **{**options, "bytes": 512})
    assert "wait for the box" in emulator.move_box(map=tensor_map, at=[0, 0], **{**options, "bytes": 2048})
