import math

import pytest

from sdft_ds.report.scales import averages, log_ticks, number, step_axis, thin, tick, ticks, value_axis


def test_ticks_are_round_and_within():
    assert ticks(0, 9.7) == [0, 2, 4, 6, 8]
    assert ticks(-1.2, 1.3) == [-1, -0.5, 0, 0.5, 1]
    assert ticks(0.00012, 0.00047) == [0.0002, 0.0003, 0.0004]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert len(ticks(1, 123456)) <= 7


def test_log_ticks_are_powers_of_ten_with_steps_between_where_they_are_few():
    assert log_ticks(0.003, 200) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert log_ticks(0.3, 12) == pytest.approx([0.5, 1, 2, 5, 10])
    assert len(log_ticks(1e-12, 1e9)) <= 8


def test_ticks_are_written_short():
    assert [tick(v) for v in (0, 0.25, 5000, 20000, 1500000, 3e-4, 2.5e-5, -1e-3)] == [
        "0", "0.25", "5000", "20k", "1.5M", "3e-4", "2.5e-5", "-0.001"]  # fmt: skip
    assert [number(v) for v in (0.012345, 1234.4, 2.5e-6, float("nan"))] == ["0.01235", "1,234", "2.5e-06", "nan"]


def test_a_value_axis_has_room_for_all_and_starts_at_zero_where_that_is_near():
    def limits(*values, **how):
        axis = value_axis(values, 200, 0, **how)
        assert all(0 <= axis(v) <= 200 for v in values if math.isfinite(v))
        return axis

    assert limits(0.2, 1.0).low == 0 and limits(0.94, 0.98).low > 0.9
    assert limits(3e-4, 3e-4).low == 0 and limits(0.0, 0.0).high == 1 and limits(-2.0, -2.0).high == 0
    assert limits(-1.0, 5.0).low < -1
    assert limits(float("nan"), float("inf")).high == 1  # nothing to see, but an axis
    log = limits(0.01, 1.0, may_log=True)
    assert log.log and log(0.1) == pytest.approx(100, abs=0.2)  # in the middle of its decades
    assert not limits(0.1, 1.0, may_log=True).log and not limits(0.0, 100.0, may_log=True).log


def test_a_step_axis_of_one_step_has_a_width():
    axis = step_axis([7, 7], 50, 450)
    assert axis(7) == 50 and axis(8) == 450


def test_thinning_keeps_every_extreme_a_screen_can_show():
    steps = list(range(10_000))
    values = [math.sin(s / 50) for s in steps]
    values[4321], values[7777], values[500] = 9.0, -9.0, float("nan")
    x, y = thin(steps, values, columns=400)
    assert len(x) <= 5 * 401 and x == sorted(x)
    assert (x[0], x[-1]) == (0, 9_999)
    kept = dict(zip(x, y, strict=True))
    assert kept[4321] == 9.0 and kept[7777] == -9.0 and math.isnan(kept[500])
    for column in range(400):  # the extremes of each column, which are what the line covers
        inside = [s for s in steps if int(s / 9_999 * 400) == column and s != 500]
        ends = [f(values[s] for s in inside) for f in (min, max)]
        assert ends == [f(kept[s] for s in inside if s in kept) for f in (min, max)]
    assert thin([1, 2], [3, 4], columns=400) == ([1, 2], [3, 4])


def test_averages_are_centred_and_leave_out_what_is_not_finite():
    assert averages([5.0] * 100) == [5.0] * 100
    line = averages([float(i) for i in range(200)])
    assert line[100] == pytest.approx(100) and line[0] == pytest.approx(2)  # of 0 to 4
    assert averages([1.0, float("inf"), 3.0]) == [1.0, 2.0, 3.0]
    assert averages([1e20, *[1.0] * 199])[50:] == [1.0] * 150
    assert all(map(math.isnan, averages([float("nan")] * 3)))
