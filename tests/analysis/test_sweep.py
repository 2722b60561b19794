from __future__ import annotations

import pytest
import torch

from dgnet.analysis._sweep import draw_sweep, save_sweep, sweep_thresholds
from dgnet.errors import UsageError
from dgnet.evaluation import evaluate
from dgnet.inference import set_threshold_offset
from tests.helpers.data import Images


@pytest.mark.slow
def test_each_point_is_an_evaluation_at_its_offset(tiny, tmp_path):
    network = tiny(node_gate="hard", node_gate_bias=0.3).eval()
    data = Images(torch.randn(7, 3, 12, 8), [0, 1, 2, 3, 4, 0, 1])
    points = sweep_thresholds(network, data, [-0.5, 0.0, 0.1, 0.5], batch_size=3)
    assert [point.threshold_offset for point in points] == [-0.5, 0.0, 0.1, 0.5]
    for point in points:
        alone = evaluate(set_threshold_offset(network, point.threshold_offset), data, batch_size=7)
        assert point.top1 == pytest.approx(alone.top1)
        assert point.loss == pytest.approx(alone.loss, rel=1e-4)
        assert point.executed_multiply_adds == pytest.approx(alone.executed_multiply_adds)
        assert point.distinct_wirings == alone.distinct_wirings
        assert point.milliseconds > 0
    assert points[0].skippable_nodes == 0 < points[1].skippable_nodes < points[3].skippable_nodes == 1
    paths = save_sweep(points, tmp_path / "new")
    assert [path.name for path in paths] == ["threshold_sweep.csv", "threshold_sweep.png", "threshold_sweep.svg"]
    assert len(paths[0].read_text().splitlines()) == 1 + len(points)
    (line,) = draw_sweep(points).axes[0].lines
    assert line.get_xdata() == pytest.approx([point.executed_multiply_adds / 1e6 for point in points])


def test_what_cannot_be_swept(tiny, tmp_path):
    data = Images(torch.randn(2, 3, 12, 8), [0, 1])
    with pytest.raises(UsageError, match="no edge or block that can close"):
        sweep_thresholds(tiny(weighting="fixed"), data)
    with pytest.raises(UsageError, match="--offsets needs one number or more"):
        sweep_thresholds(tiny(), data, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        save_sweep(sweep_thresholds(tiny(), data, [0.0]), tmp_path / "file")
