"""Every small case by ``impl="cuda"``, forward and backward: what compute-sanitizer watches. Argument: a tile, or ""."""

import sys

import torch

from laco_kernels import testing
from laco_kernels.kernels import cuda_products


def main(tile: str) -> None:
    call = cuda_products.call
    cuda_products.call = lambda extension, product, **problem: call(extension, product, **problem, tile=tile)
    count = 0
    for case in testing.CASES:
        for dtype in (torch.bfloat16, torch.float16):
            if testing.refusal(case, "cuda", dtype, "cuda") is None:
                inputs = case.inputs(dtype, "cuda")
                with torch.no_grad():
                    grad = torch.randn_like(case(inputs, "cuda"))
                testing.gradients(case, inputs, "cuda", grad)
                count += 1
    torch.cuda.synchronize()
    print(f"{count} cases done")


if __name__ == "__main__":
    main(sys.argv[1])
