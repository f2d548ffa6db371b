"""Everything static is in pyproject.toml; this file exists for the optional CUDA extension, which has no source yet."""

from setuptools import setup

setup()
