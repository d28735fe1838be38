"""Some hundred random load traces; `tests/benchmarks/autoscale_simulation.py` runs 10,000."""

from __future__ import annotations

import pytest

from tests.benchmarks.autoscale_simulation import simulate


@pytest.mark.parametrize("first_seed", range(0, 60, 20))
def test_decisions_stay_in_bounds_react_and_come_to_rest(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        assert not simulate(seed).violations, f"seed {seed}"
