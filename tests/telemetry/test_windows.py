from __future__ import annotations

import msgspec
import numpy as np
import pytest

from server.telemetry.windows import WINDOWS, Slot, WindowedSketch, combined


def counts(*sketches: WindowedSketch, now: float) -> dict[str, int]:
    slots = [slot for sketch in sketches for slot in sketch.slots("a", "ttft", now)]
    found = combined(slots, now)
    return {window.name: found[key].count for window in WINDOWS if (key := ("a", "ttft", window.name)) in found}


def test_values_leave_each_window_when_they_are_too_old() -> None:
    sketch = WindowedSketch()
    sketch.add(1003.0, np.array([0.5, 0.6]))
    assert counts(sketch, now=1003.0) == {"1m": 2, "10m": 2, "1h": 2}
    sketch.add(1031.0, np.array([0.5]))
    assert counts(sketch, now=1060.0) == {"1m": 3, "10m": 3, "1h": 3}
    assert counts(sketch, now=1069.0) == {"1m": 1, "10m": 3, "1h": 3}
    assert counts(sketch, now=1096.0) == {"10m": 3, "1h": 3}
    assert counts(sketch, now=1700.0) == {"1h": 3}
    assert counts(sketch, now=5000.0) == {}


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: w.name)
def test_a_window_covers_its_span_and_at_most_a_slot_more(window: object) -> None:
    w = next(w for w in WINDOWS if w is window)
    rng = np.random.default_rng(1)
    times = np.sort(rng.uniform(0, 8000, 4000))
    sketch = WindowedSketch()
    for at in times:
        sketch.add(at, np.array([0.1]))
    now = float(times[-1])
    found = counts(sketch, now=now)[w.name]
    assert (times > now - w.span_s).sum() <= found <= (times > now - w.span_s - w.slot_s).sum()


def test_slots_of_several_processes_add_up_after_being_sent() -> None:
    first, second = WindowedSketch(), WindowedSketch()
    first.add(100.0, np.array([0.1] * 60))
    second.add(102.0, np.array([1.0] * 40))
    slots = [*first.slots("a", "e2e", 104.0), *second.slots("a", "e2e", 104.0), *second.slots("b", "e2e", 104.0)]
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(slots), type=list[Slot])
    sketch = combined(sent, 104.0)["a", "e2e", "1m"]
    assert sketch.count == 100
    assert sketch.quantiles((0.5, 0.95)) == pytest.approx([0.1, 1.0], rel=0.01)
    assert combined(sent, 104.0)["b", "e2e", "1h"].count == 40
