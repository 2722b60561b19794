"""The loader of evaluation passes."""

from __future__ import annotations

import pytest
import torch

from dgnet.data import EvaluationLoader, EvaluationOrder
from dgnet.data._loading import allow_open_files, ignore_signals_except_from
from dgnet.errors import UsageError
from tests.helpers.data import Counted


def count_up(count: int) -> Counted:
    """Image i holds the number i and has the label i."""
    return Counted(torch.arange(count).float()[:, None], list(range(count)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_comes_once_over_all_processes(ranks, workers):
    seen = []
    for rank in range(ranks):
        loader = EvaluationLoader(count_up(7), 2, workers, rank=rank, ranks=ranks)
        batches = list(loader)
        assert len(batches) == len(loader)
        for indices, (images, labels) in batches:
            assert images[:, 0].tolist() == labels.tolist() == indices
            seen += indices
    assert sorted(seen) == list(range(7))  # nothing fills up


def test_a_process_without_images_has_no_batch():
    loader = EvaluationLoader(count_up(1), 2, rank=1, ranks=2)
    assert loader.peek() is None
    assert list(loader) == []


def test_the_first_batch_is_known_beforehand_and_loaded_once():
    dataset = count_up(5)
    loader = EvaluationLoader(dataset, 2)
    for _ in range(2):
        assert loader.peek()[1].tolist() == [0, 1]
    assert dataset.loaded == [0, 1]
    for _ in range(2):
        assert [indices for indices, _ in loader] == [[0, 1], [2, 3], [4]]
    assert dataset.loaded == [*range(5), *range(5)]


def test_an_order_evens_processes_out_where_they_take_steps_together():
    assert [len(list(EvaluationOrder(3, 1, rank, 2))) for rank in range(2)] == [2, 2]
    assert [len(list(EvaluationOrder(3, 1, rank, 2, even=False))) for rank in range(2)] == [2, 1]


def test_launchers_do_not_end_the_processes_that_load():
    batches = EvaluationLoader(count_up(3), 2, workers=1)._batches
    assert batches.worker_init_fn.func is ignore_signals_except_from
    assert batches.pin_memory == torch.cuda.is_available()


def test_counts_that_make_no_sense():
    with pytest.raises(UsageError, match="--batch-size must be at least 1, got 0"):
        EvaluationLoader(count_up(1), 0)
    with pytest.raises(UsageError, match="--workers must be 0 to 1024, got -1"):
        EvaluationLoader(count_up(1), 1, -1)


@pytest.mark.parametrize(
    ("limits", "workers", "asked"),
    [((256, 1024), 2, [1024]), ((256, -1), 2, [4096]), ((256, -1), 1024, [10272]), ((8192, 10000), 2, []), ((-1, -1), 9, [])],
)
def test_workers_may_open_files(limits, workers, asked, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = [resource.RLIM_INFINITY if limit == -1 else limit for limit in limits]
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: set_to.append(pair[0]))
    allow_open_files(workers)
    assert set_to == asked


@pytest.mark.parametrize(("soft", "hard"), [(30, 30), (20, 40)])
def test_workers_that_may_not_open_files_are_refused(soft, hard, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: None)
    with pytest.raises(UsageError, match=r"--workers 2 may need 52 open files, and the limit is [34]0; raise it with"):
        EvaluationLoader(count_up(3), 2, workers=2)
    EvaluationLoader(count_up(3), 2, workers=0)
