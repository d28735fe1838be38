"""How long a load is borne with. What it loads is tested in test_tier.py."""

from __future__ import annotations

from typing import cast

import pytest

from router.engine.restore import patience_s
from router.state.loader import _Load
from router.state.restore import RestorePlan


def test_the_bounds_move_on_while_values_come_and_no_further_than_the_deadline() -> None:
    plan = cast(RestorePlan, None)  # bearing with a load does not look at what it loads
    load = _Load(plan, lambda _: None, cut_s=10.0, latest_cut_s=14.0, grace_s=1.0)
    load.bear_with(9.9, stall_s=0.25)
    assert (load.cut_s, load.end_s) == (10.0, 11.0)  # nothing has come
    load.num_bytes = 5
    load.bear_with(9.0, stall_s=0.25)
    assert (load.cut_s, load.end_s) == (10.0, 11.0)  # early: the bounds stay
    load.num_bytes = 6
    load.bear_with(10.0, stall_s=0.25)
    assert (load.cut_s, load.end_s) == (10.25, 11.25)
    load.bear_with(10.2, stall_s=0.25)
    assert load.cut_s == 10.25  # stalled since
    load.num_bytes = 7
    load.bear_with(20.0, stall_s=0.25)
    assert (load.cut_s, load.end_s) == (14.0, 15.0)


def test_a_load_that_was_cut_gets_no_more_time() -> None:
    plan = cast(RestorePlan, None)
    load = _Load(plan, lambda _: None, cut_s=10.0, latest_cut_s=14.0, grace_s=1.0)
    load.is_cut = True
    load.num_bytes = 5
    load.bear_with(10.0, stall_s=0.25)
    assert (load.cut_s, load.end_s) == (10.0, 11.0)


@pytest.mark.parametrize(
    ("load_s", "prefill_s", "expected_s"),
    [
        (0.2, float("inf"), 4.0),  # nothing is known of prefills: twenty times
        (0.2, 300.0, 4.0),
        (0.2, 2.0, 1.0),  # half of the prefill
        (0.2, 0.3, 0.6),  # but three times at least
    ],
)
def test_a_dear_prefill_makes_a_load_patient(
    load_s: float, prefill_s: float, expected_s: float
) -> None:
    assert patience_s(load_s, prefill_s) == pytest.approx(expected_s)
