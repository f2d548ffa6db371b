"""What every test gets: no network, poisoned memory, a fixed seed, and Triton's interpreter where there is no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS warns that it is not deterministic
# torch 2.11 finds compiled backward graphs by their forward graph alone: those of an older version of an operator too.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # several processes share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

SLOW = [HealthCheck.too_slow]  # on a busy machine
settings.register_profile("quick", deadline=None, max_examples=2, suppress_health_check=SLOW)
# On a GPU each shape compiles anew: few of them, and none more to find a smaller one that fails.
FOUND = [Phase.explicit, Phase.reuse, Phase.generate]
settings.register_profile("gpu", deadline=None, max_examples=25, suppress_health_check=SLOW, phases=FOUND)
settings.register_profile("brief", deadline=None, max_examples=25, suppress_health_check=SLOW)
settings.register_profile("default", deadline=None, max_examples=84, suppress_health_check=SLOW)
settings.register_profile(
    "fuzz", deadline=None, max_examples=1700, suppress_health_check=SLOW
)  # six kernel tests: 10,000 cases
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _deterministic():
    # Fills what torch.empty returns with NaN, so that reading unwritten memory shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
