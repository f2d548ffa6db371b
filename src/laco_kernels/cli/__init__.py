"""The command line, ``laco``. Exit codes: 0 done, 1 a check failed, 2 wrong use."""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as missing:
    raise SystemExit(f"laco needs {missing.name}, which is not installed. Run: pip install 'laco_kernels[bench]'") from None

from laco_kernels.cli import (  # noqa: F401 - register their commands
    chat,
    compressors,
    demo,
    kept,
    llava,
    look,
    measure,
    publish,
    study,
    train,
    vec,
)
from laco_kernels.cli.common import app


def main() -> None:
    """Run the command line."""
    app()
