"""``python -m laco_kernels.cli`` is ``laco``."""

from laco_kernels.cli import main

main()
