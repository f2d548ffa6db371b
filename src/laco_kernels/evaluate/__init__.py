"""The papers' benchmarks: models of this package in lmms-eval, by its entry point, as ``--model laco``.

Nothing here is imported before lmms-eval asks for it, and nothing else of the package needs it.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return what lmms-eval's registry is to know: where the classes are, as a ``ModelManifest`` of its own."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = "laco_kernels.evaluate.lmms"
    return ModelManifest(model_id="laco", simple_class_path=f"{classes}.LacoLmms", chat_class_path=f"{classes}.LacoLmmsChat")
