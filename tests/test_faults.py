"""The list of deliberate faults keeps up with the code; ``make faults`` runs them."""

from pathlib import Path

import pytest

import laco_kernels
from tests.faults import FAULTS, FILES

SOURCE = Path(laco_kernels.__file__).parent


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_finds_what_it_breaks(fault):
    text = (SOURCE / FILES[fault.where]).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
