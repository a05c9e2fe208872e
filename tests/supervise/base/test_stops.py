from __future__ import annotations

import signal

from autoglm_resume.supervise.base.stops import Stops


def test_the_first_stop_is_the_one_that_counts_and_only_a_second_ctrl_c_hurries() -> None:
    stops = Stops()
    assert (bool(stops), stops.asked(), stops.first) == (False, False, None)
    assert stops.add(signal.SIGTERM)
    assert not stops.add(signal.SIGTERM), "schedulers send it over and over"
    assert not stops.add(signal.SIGINT)
    assert (stops.asked(), stops.first, stops.hurried()) == (True, signal.SIGTERM, False)
    stops.add(signal.SIGINT)
    assert stops.hurried()
    assert [number.name for number in stops] == ["SIGTERM", "SIGTERM", "SIGINT", "SIGINT"]
