"""Every small case by ``impl="cuda"``, forward and backward: what compute-sanitizer watches.

Arguments: a tile and the number of blocks that share its depth, or ``""`` and 0 for the plan.
"""

import sys

import torch

from laco_kernels import testing
from laco_kernels.kernels import cuda_products
from tests.csrc.problems import tiles_of

# Depths that two blocks can share, of a product and of its weight's gradient.
DEEP = {"batch": 2, "channels": 128, "hidden": 512}
CASES = [testing.Case("patch_merge", DEEP, {"grid": (46, 24), "residual": kind}) for kind in ("mean", "channel_group")]


def telling(call, tile="", splits=0, *, dependent=False, shared=None):
    """Return ``call`` of a product with the tile and the splits, where it is one of the tile's and its depth suffices.

    ``shared`` is a list that gets the products whose depth was shared.
    """

    def told(extension, product, **problem):
        if tile and tile not in tiles_of(product):  # its gradients are other tiles'
            return call(extension, product, **problem, dependent=dependent)
        able = splits
        if splits > 1:
            able = splits if has_steps(extension, product, problem, tile, 4 * splits) else 1
            if shared is not None and able > 1:
                shared.append(product)
        return call(extension, product, **problem, splits=able, tile=tile, dependent=dependent)

    return told


def has_steps(extension, product, problem, tile, fewest):
    """Whether the product's depth, which is no input gradient's, has so many steps."""
    if product == "input_gradient":
        return False
    told = {name: of for name, of in problem.items() if name not in ("device", "stream")}
    return getattr(extension, f"{product}_operands")(**cuda_products.arguments(extension, told), tile=tile)["steps"] >= fewest


def main(tile: str, splits: int) -> None:
    shared: list[str] = []
    cuda_products.call = telling(cuda_products.call, tile, splits, shared=shared)
    count = 0
    for case in CASES if splits > 1 else testing.CASES:
        for dtype in (torch.bfloat16, torch.float16):
            if testing.refusal(case, "cuda", dtype, "cuda") is None:
                inputs = case.inputs(dtype, "cuda")
                with torch.no_grad():
                    grad = torch.randn_like(case(inputs, "cuda"))
                testing.gradients(case, inputs, "cuda", grad)
                count += 1
    torch.cuda.synchronize()
    print(f"{len(shared)} depths shared")
    print(f"{count} cases done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
