"""The list of deliberate faults keeps up with the code; ``make faults`` runs them."""

import pytest

from tests.faults import FAULTS, FILES, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_finds_what_it_breaks(fault):
    text = (ROOT / FILES[fault.where]).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
