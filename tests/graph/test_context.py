"""Recording and imposing hold in one thread or task, and for the model itself, not for its copies."""

from __future__ import annotations

import asyncio
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from dgnet.graph import Wiring, observe, record_connectivity, use_connectivity
from dgnet.graph._context import ContextStack
from dgnet.inference import set_mode


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_four_threads_neither_see_nor_change_each_others_passes(tiny, mode):
    network = set_mode(tiny(node_gate="hard", node_gate_bias=0.3).eval(), mode)
    images = [torch.randn(2 + number, 3, 12, 10) for number in range(4)]
    alone, matrices = [], []
    for number, batch in enumerate(images):
        adjacency = [torch.rand(stage.topology.mask.shape).mul(stage.topology.mask) for stage in network.stages]
        matrices.append(adjacency if number % 2 else None)  # two threads impose, all four record
        with use_connectivity(network, matrices[-1] or [None] * 3), record_connectivity(network) as record:
            alone.append((network(batch), record.adjacency))
    barrier = threading.Barrier(4)

    def run(number: int) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        found = []
        with torch.no_grad(), use_connectivity(network, matrices[number] or [None] * 3):
            for _ in range(5):
                barrier.wait()  # all blocks are entered at once, and left at different times
                with record_connectivity(network) as record:
                    output = network(images[number])
                found.append((output, record.adjacency))
        return found

    with ThreadPoolExecutor(4) as pool:
        for (expected, adjacency), passes in zip(alone, pool.map(run, range(4)), strict=True):
            for output, recorded in passes:
                torch.testing.assert_close(output, expected)
                for one, other in zip(recorded, adjacency, strict=True):
                    torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(network(images[0]), alone[0][0])  # nothing stays imposed


@torch.no_grad()
def test_tasks_of_one_event_loop_do_not_see_each_other(tiny):
    network = tiny().eval()

    async def count(passes: int) -> int:
        with record_connectivity(network) as record:
            for _ in range(passes):
                network(torch.randn(1, 3, 8, 8))
                await asyncio.sleep(0)
        return len(record.adjacency[0])

    async def both() -> list[int]:
        return await asyncio.gather(count(2), count(3))

    assert asyncio.run(both()) == [2, 3]


@torch.no_grad()
def test_a_copy_made_inside_a_block_is_free(tiny):
    network = tiny().eval()
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    zeros = [torch.zeros_like(stage.topology.mask, dtype=torch.float32) for stage in network.stages]
    with use_connectivity(network, zeros), record_connectivity(network) as record:
        for copied in (deepcopy(network), pickle.loads(pickle.dumps(network))):
            torch.testing.assert_close(copied(images), expected)
        assert not torch.allclose(network(images), expected)
    assert len(record.adjacency[0]) == 2  # of the network alone


@torch.no_grad()
def test_an_observer_gets_a_wiring_for_each_stage_of_those_observed(tiny):
    network = tiny().eval()
    seen = []

    class Watcher:
        def observe(self, index: int, wiring: Wiring) -> None:
            seen.append((index, wiring.adjacency, wiring.alpha, wiring.ran))

    images = torch.randn(2, 3, 8, 8)
    with observe(network.stages[1:], Watcher()), record_connectivity(network) as record:
        network(images)
    assert [index for index, *_ in seen] == [0, 1]
    for (_, adjacency, alpha, ran), *recorded in zip(seen, record.adjacency[1:], record.alpha[1:], record.ran[1:], strict=True):
        for one, other in zip((adjacency, alpha, ran), recorded, strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_blocks_may_be_left_in_any_order_and_from_another_thread(tiny):
    network = tiny().eval()
    images = torch.randn(1, 3, 8, 8)
    first, second = record_connectivity(network), record_connectivity(network)
    outer, inner = first.__enter__(), second.__enter__()
    network(images)
    first.__exit__(None, None, None)
    network(images)
    assert (len(outer.adjacency[0]), len(inner.adjacency[0])) == (1, 2)
    thread = threading.Thread(target=second.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    network(images)
    assert (len(outer.adjacency[0]), len(inner.adjacency[0])) == (1, 2)


def test_compiled_code_of_an_older_torch_sees_no_block_that_was_left(monkeypatch):
    monkeypatch.setattr("dgnet.graph._context.DYNAMO_READS_CONTEXT_VARS", False)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    stack: ContextStack[int] = ContextStack("test")
    one, two = stack.hold(1), stack.hold(2)
    one.__enter__()
    two.__enter__()
    assert stack.values() == [1, 2]
    one.__exit__(None, None, None)
    assert stack.values() == [2]
    two.__exit__(None, None, None)
    assert stack.values() == []
