"""Token compression inside the vision encoders of Hugging Face transformers, and faster connectors behind them.

Importing this package registers the compressed encoders with ``AutoConfig`` and ``AutoModel``, so that checkpoints saved
from them load by ``AutoModel.from_pretrained``. Needs the ``hf`` extra.
"""

from __future__ import annotations

INSTALL = "Run: pip install 'laco_kernels[hf]'"

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        f"laco_kernels.hf needs transformers, which is not installed. {INSTALL}", name=error.name
    ) from None

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(f"laco_kernels.hf: got transformers {transformers.__version__}, expected 5.17 or newer. {INSTALL}")

from laco_kernels.hf.build_llava import build_llava
from laco_kernels.hf.compress import compress
from laco_kernels.hf.encoders import (
    LacoAimv2VisionConfig,
    LacoAimv2VisionModel,
    LacoCLIPVisionConfig,
    LacoCLIPVisionModel,
    LacoInternVLVisionConfig,
    LacoInternVLVisionModel,
    LacoSiglipVisionConfig,
    LacoSiglipVisionModel,
)
from laco_kernels.hf.llava import LacoLlavaConfig, LacoLlavaForConditionalGeneration, LacoLlavaModel
from laco_kernels.hf.optimize import optimize, restore
from laco_kernels.hf.patch import patch, unpatch
from laco_kernels.hf.processor import build_processor, check_processor

__all__ = [
    "LacoAimv2VisionConfig",
    "LacoAimv2VisionModel",
    "LacoCLIPVisionConfig",
    "LacoCLIPVisionModel",
    "LacoInternVLVisionConfig",
    "LacoInternVLVisionModel",
    "LacoLlavaConfig",
    "LacoLlavaForConditionalGeneration",
    "LacoLlavaModel",
    "LacoSiglipVisionConfig",
    "LacoSiglipVisionModel",
    "build_llava",
    "build_processor",
    "check_processor",
    "compress",
    "optimize",
    "patch",
    "restore",
    "unpatch",
]
