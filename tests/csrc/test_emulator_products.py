"""The emulated tensor cores against numpy, operands and results placed as the PTX manual draws them."""

import numpy as np
import pytest
import torch

from tests.csrc.emulator import build

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to build the emulated GPU"),
]
DTYPES = {False: torch.bfloat16, True: torch.float16}
DEPTH, B = 64, 16384  # B's place in shared memory


@pytest.fixture(scope="module")
def emulator():
    emulator = build.load().emulator
    emulator.choose()
    return emulator


def bits(tensor):
    return tensor.view(torch.int16).numpy()


def swizzled(address):
    return address ^ (address >> 7 & 7) << 4


def place(memory, start, matrix, mn):
    """Lay out ``[rows, 64]``: lines of 128 bytes along the depth, or across it, 64 rows a chunk of 8 KB."""
    for row, k in np.ndindex(matrix.shape):
        offset = row // 64 * 8192 + k * 128 + row % 64 * 2 if mn else row * 128 + k * 2
        memory[swizzled(start + offset) // 2] = matrix[row, k]


def fragments(n):
    """By thread and register, row and column of ``[64, n]``."""
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


@pytest.mark.parametrize("n", range(64, 257, 16))
@pytest.mark.parametrize("a_mn", [False, True])
@pytest.mark.parametrize("b_mn", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_warpgroup_products(emulator, half, a_mn, b_mn, n):
    torch.manual_seed(n)
    a, b = (torch.randn(rows, DEPTH).to(DTYPES[half]) for rows in (64, n))
    a[8:16], b[16:40] = 0, 0  # passed over
    memory = np.zeros((B + -(-n // 64) * 8192) // 2, np.int16)
    place(memory, 0, bits(a), a_mn)
    place(memory, B, bits(b), b_mn)
    before = np.random.default_rng(0).standard_normal((64, n)).astype(np.float32)
    row, column = fragments(n)
    for accumulate in (False, True):
        d = np.ascontiguousarray(before[row, column])
        options = {"operands": memory.ctypes.data, "d": d.ctypes.data, "accumulate": accumulate}
        assert not emulator.product(half=half, a_mn=a_mn, b_mn=b_mn, n=n, **options)
        want = (a.double() @ b.double().T).numpy() + accumulate * before
        np.testing.assert_allclose(d, want[row, column], rtol=1e-5, atol=1e-4)


def test_nan_and_infinity_meet_zeros(emulator):
    """Rows of zeros are passed over only where zero times the other operand is zero."""
    a, b = torch.zeros(64, DEPTH).bfloat16(), torch.zeros(128, DEPTH).bfloat16()
    a[3, 5], b[100, 60] = float("nan"), float("inf")
    memory = np.zeros((B + 128 * 128) // 2, np.int16)
    place(memory, 0, bits(a), mn=False)
    place(memory, B, bits(b), mn=True)
    d = np.zeros((128, 64), np.float32)
    options = {"operands": memory.ctypes.data, "d": d.ctypes.data, "accumulate": False}
    assert not emulator.product(half=False, a_mn=False, b_mn=True, n=128, **options)
    row, column = fragments(128)
    assert (np.isnan(d) == ((row == 3) | (column == 100))).all()


@pytest.mark.parametrize("half", [False, True])
def test_a_warp_product(emulator, half):
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(DTYPES[half]), torch.randn(16, 8).to(DTYPES[half]), torch.randn(16, 8)
    lane, register, half_of = np.meshgrid(np.arange(32), np.arange(4), np.arange(2), indexing="ij")
    row, k = lane // 4 + register % 2 * 8, lane % 4 * 2 + half_of + register // 2 * 8
    of_a = np.ascontiguousarray(bits(a)[row, k])
    lane, register, half_of = np.meshgrid(np.arange(32), np.arange(2), np.arange(2), indexing="ij")
    of_b = np.ascontiguousarray(bits(b)[lane % 4 * 2 + half_of + register * 8, lane // 4])
    lane, i = np.meshgrid(np.arange(32), np.arange(4), indexing="ij")
    row, column = lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2
    d = np.ascontiguousarray(c.numpy()[row, column])
    assert not emulator.warp_product(half, of_a.ctypes.data, of_b.ctypes.data, d.ctypes.data)
    want = (a.double() @ b.double() + c.double()).numpy()
    np.testing.assert_allclose(d, want[row, column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_between_memory_and_registers(emulator, transposed):
    source = np.arange(256, dtype=np.int16)
    registers, stored = np.zeros((32, 4, 2), np.int16), np.zeros(256, np.int16)
    assert not emulator.matrices(source.ctypes.data, registers.ctypes.data, stored.ctypes.data, transposed)
    matrices = source.reshape(4, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if transposed else matrices
    # Lane 4 r + i has elements 2 i and 2 i + 1 of row r of each matrix.
    assert (registers == matrices.reshape(4, 32, 2).transpose(1, 0, 2)).all()
    assert (stored.reshape(4, 8, 8) == matrices).all()
