"""What every test gets: no network, poisoned memory, a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    # Fills what torch.empty returns with NaN, so that reading unwritten memory shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
