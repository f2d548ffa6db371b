"""What an encoder's forward pass keeps for its backward pass, fused over eager: ``benchmarks/activations.py [name ...]``.

Full depth and width, one image, bfloat16, random weights. Bytes are counted, not timed, so that a processor serves: every
storage that autograd saves, once, without the parameters'.
"""

import sys

import torch
from transformers import AutoConfig, AutoModel

import laco_kernels as lk
from laco_kernels.bench import cases

NAMES = ("aimv2-l-336", "siglip-so400m-384", "internvit-300m-448", "clip-l-336")


def kept(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that ``model(x)`` keeps."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x).last_hidden_state
    assert y.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def main() -> None:
    """Print a line an encoder."""
    for name in sys.argv[1:] or NAMES:
        torch.manual_seed(0)
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(cases.FOLDER / name)).bfloat16().train()
        size = encoder.config.image_size
        x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size)).bfloat16()
        eager = kept(encoder, x)
        lk.hf.optimize(encoder, impl="reference")
        fused = kept(encoder, x)
        print(f"{name:20} eager {eager:13,} bytes, fused {fused:13,} bytes: {fused / eager:6.1%}", flush=True)


if __name__ == "__main__":
    main()
