"""Shortest paths of algos/vin.py against networkx."""

import math

import pytest
import torch
from helpers import module

networkx = pytest.importorskip("networkx")
vin = module("vin")


@pytest.mark.parametrize("n", [8, 16, 28])
def test_distances_and_moves_are_networkxs(n):
    torch.manual_seed(0)
    mazes = vin.label(*vin.make_env(vin.Args(env_id=f"Maze{n}-v0")).unwrapped.sample(10, test=False), 7)
    for m in range(10):
        walls, goal = mazes.images[m, 0], mazes.distance[m].argmin().item()
        free = [tuple(cell) for cell in (walls == 0).nonzero().tolist()]
        graph = networkx.Graph()
        graph.add_nodes_from(free)
        for row, col in free:
            for i, j in vin.MOVES:
                if (row + i, col + j) in graph:
                    graph.add_edge((row, col), (row + i, col + j), weight=math.hypot(i, j))
        lengths = networkx.single_source_dijkstra_path_length(graph, divmod(goal, n))
        distance, expert = mazes.distance[m].view(n, n), mazes.expert[m].view(n, n)
        assert {tuple(cell) for cell in distance.isfinite().nonzero().tolist()} == lengths.keys()
        for (row, col), length in lengths.items():
            assert distance[row, col].item() == pytest.approx(length, abs=1e-4)
            if length > 0:
                i, j = vin.MOVES[expert[row, col]]
                assert lengths[row + i, col + j] + math.hypot(i, j) == pytest.approx(length)
