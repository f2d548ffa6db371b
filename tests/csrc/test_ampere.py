"""Ampere's kernels: where in shared memory they put things."""

import shutil
import subprocess

import pytest
import torch

from tests.csrc.emulator import build

pytestmark = [
    pytest.mark.skipif(build.GCC is None, reason="needs g++ to compile for the CPU"),
]

PLACES = """
#include <cstdio>
#include "ampere_products.cuh"
using namespace laco::ampere;

int main() {
  for (int row = 0; row < 128; ++row) for (int chunk = 0; chunk < 4; ++chunk) printf("%u ", AlongDepth::at(row, chunk));
  printf("\\n");
  for (int k = 0; k < 32; ++k) for (int chunk = 0; chunk < 16; ++chunk) printf("%u ", AcrossDepth::at(k, chunk));
  printf("\\n");
  for (int i = 0; i < 16; ++i) for (int lane = 0; lane < 32; ++lane) printf("%u ", Piece{0, lane}.pair(i / 2, i % 2));
  printf("\\n");
  for (int i = 0; i < 4; ++i) for (int lane = 0; lane < 32; ++lane) printf("%u ", Piece{0, lane}.chunk(i));
  printf("\\n");
  for (int i = 0; i < 4; ++i) {
    for (int thread = 0; thread < THREADS; ++thread) {
      const LineChunks chunks(thread);
      printf("%u ", AcrossDepth::at(chunks.line, 8 * (i / 2) + (chunks.first ^ (i % 2 * 4))));
    }
  }
}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where in shared memory things are put: by (row, chunk), (k, chunk), (pair, lane), (i, lane) and (i, thread)."""
    folder = tmp_path_factory.mktemp("places") / "csrc"
    shutil.copytree(build.CSRC, folder)
    shutil.copytree(build.HERE / "overlay", folder, dirs_exist_ok=True)
    (folder / "places.cpp").write_text(PLACES)
    includes = [f"-I{build.HERE / name}" for name in ("include", "engine")]
    subprocess.run([build.GCC, *build.FLAGS, *includes, "places.cpp", "-o", "places"], cwd=folder, check=True)
    lines = subprocess.run([folder / "places"], capture_output=True, text=True, check=True).stdout.splitlines()
    shapes = [(128, 4), (32, 16), (16, 32), (4, 32), (4, 128)]
    return [torch.tensor([*map(int, line.split())]).view(shape) for line, shape in zip(lines, shapes, strict=True)]


def test_no_bank_is_wanted_twice(places):
    """Of 16 bytes each, shared memory serves eight threads at a time; of 4 bytes, 32."""
    along, across, pairs, chunks, copied = places
    for table in (along, across):
        assert sorted(table.flatten().tolist()) == list(range(0, 8192, 16))
        for eight in table.view(-1, 8, table.shape[1]):  # rows or lines that ldmatrix reads
            assert all(len(set(column)) == 8 for column in (eight // 16 % 8).T.tolist())
    assert all(sorted(lanes) == list(range(32)) for lanes in (pairs // 4 % 32).tolist())
    assert all(len(set(lanes)) == 8 for lanes in (chunks // 16 % 8).view(-1, 8).tolist())
    assert sorted(pairs.flatten().tolist()) == list(range(0, 2048, 4))
    assert sorted(copied.flatten().tolist()) == list(range(0, 8192, 16))
    copied = [along.flatten(), *copied]  # threads copy rows' chunks in their order
    assert all(len(set(eight)) == 8 for turn in copied for eight in (turn // 16 % 8).view(-1, 8).tolist())
