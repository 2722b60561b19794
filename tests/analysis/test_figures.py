"""What drawing imports, and the files of figures."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import dgnet
from dgnet.analysis._adjacency import GraphRow, draw_graphs
from dgnet.analysis._figures import save_figure


@pytest.mark.slow
def test_importing_dgnet_does_not_import_matplotlib_nor_drawing_what_trains():
    code = "import dgnet, sys; assert 'matplotlib' not in sys.modules; dgnet.plot_graph; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        dgnet.plot_nothing  # noqa: B018


def test_files_are_whole_png_and_svg_with_edges_by_name(record, tmp_path):
    figure = dgnet.plot_graph(record)
    (tmp_path / "graph.png").write_bytes(b"older")
    paths = save_figure(figure, tmp_path, "graph")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.png", "graph.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] > 700
    tree = ElementTree.parse(paths[1])
    names = [element.get("id", "") for element in tree.iter()]
    assert len([name for name in names if name.startswith("image0-stage1-edge")]) == 10
    assert "stage 1" in {element.text for element in tree.iter()}  # text stays text
    again = tmp_path / "again"
    again.mkdir()
    assert save_figure(figure, again, "graph")[1].read_bytes() == paths[1].read_bytes()


def test_dollars_in_a_name_are_no_formula(record, tmp_path):
    row = GraphRow([matrix[0] for matrix in record.adjacency], caption=r"a $\frac$ b")
    _, path = save_figure(draw_graphs([row], [topology.mask for topology in record.topology]), tmp_path, "graph")
    assert r"a $\frac$ b" in path.read_text(encoding="utf-8")
