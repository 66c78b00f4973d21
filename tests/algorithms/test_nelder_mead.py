"""The search without gradients."""

import json

import pytest

from alignment.algorithms.nelder_mead import nelder_mead

CORNERS = [(0, 0), (1, 0), (0, 1)]


def bowl(point):
    return (point[0] - 0.3) ** 2 + (point[1] - 0.7) ** 2


def test_golden_bowl():
    found = nelder_mead(bowl, CORNERS, iterations=60, tolerance=0.0, near=0.0)
    assert found.point == pytest.approx([0.3, 0.7], abs=1e-6)
    assert found.iterations == 60 and found.evaluations == pytest.approx(111, abs=4)


def test_it_stops_when_the_corners_are_alike():
    found = nelder_mead(bowl, CORNERS, iterations=60)
    assert 0 < found.iterations < 20 and bowl(found.point) < 0.05
    assert nelder_mead(lambda point: 3.0, CORNERS, iterations=60).evaluations == 3


def test_what_is_close_to_a_known_point_is_not_judged_again():
    seen = []

    def judge(point):
        seen.append(point)
        return bowl(point)

    cache = [([0.0, 0.004], 1.0)]
    nelder_mead(judge, CORNERS, iterations=0, cache=cache)
    assert seen == [[1.0, 0.0], [0.0, 1.0]]
    for i, point in enumerate(seen):
        assert not any(all(abs(a - b) < 5e-3 for a, b in zip(point, other, strict=True)) for other in seen[:i])


def test_a_search_that_was_cut_off_goes_on_from_its_cache():
    class CutOff(Exception):
        pass

    def judge(point):
        if len(cache) == 9:
            raise CutOff
        return bowl(point)

    cache = []
    with pytest.raises(CutOff):
        nelder_mead(judge, CORNERS, iterations=12, tolerance=0.0, cache=cache)
    again = json.loads(json.dumps(cache))
    whole = nelder_mead(bowl, CORNERS, iterations=12, tolerance=0.0)
    rest = nelder_mead(bowl, CORNERS, iterations=12, tolerance=0.0, cache=again)
    assert (rest.point, rest.value) == (whole.point, whole.value)
    assert rest.evaluations == whole.evaluations - 9
