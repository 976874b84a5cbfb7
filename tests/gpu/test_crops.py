"""A batch of crops on its way to the step: host syncs, pageable copies and launches."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("views, launches", [
    ("cpu", 10 + 1),  # copies of the crops and the labels
    ("device", 90)])
def test_a_batch_of_crops(measure, views, launches):
    counts = measure("count_crops", flags=f"--views {views}")
    assert counts["syncs"] == counts["pageable"] == 0
    assert counts["launches"] <= launches, counts
