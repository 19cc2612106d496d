"""Cuts of a row of nodes: the dynamic programme against enumeration, and the splits that others published."""

import itertools
import math

import pytest
import torch

from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, VPSDEConfig
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.stages import baselines
from gearshift.stages.axis import Axis
from gearshift.stages.grid import any_stages
from gearshift.stages.partition import best_partition, log_snr_affinity, mean_similarity, sizes, to_middle


def matrix(nodes, seed):
    drawn = keys.uniform(seed, "matrix", torch.arange(nodes), 0, (nodes,)).double()
    return (drawn + drawn.T) / 2


def segments(nodes, stages):
    for cuts in itertools.combinations(range(1, nodes), stages - 1):
        yield cuts, list(itertools.pairwise([0, *cuts, nodes]))


def by_similarity(matrix, first, last):
    return float(matrix[first:last, first:last].mean(1).sum())


def by_middle(matrix, first, last):
    return float(matrix[first:last, (first + last - 1) // 2].sum())


@pytest.mark.parametrize(("values", "slow"), [(mean_similarity, by_similarity), (to_middle, by_middle)])
@pytest.mark.parametrize(("nodes", "stages"), [(6, 2), (9, 3), (10, 4), (11, 5)])
def test_the_best_cut_of_all(values, slow, nodes, stages):
    for seed in range(5):
        one = matrix(nodes, seed)
        smallest, largest = sizes(nodes, stages)
        allowed = {
            cuts: sum(slow(one, *pair) for pair in parts)
            for cuts, parts in segments(nodes, stages)
            if all(smallest <= last - first <= largest for first, last in parts)
        }
        assert len(allowed) > 1
        found = best_partition(values(one), stages, smallest, largest)
        assert allowed[found] == pytest.approx(max(allowed.values()), abs=1e-12)


def test_values_of_segments():
    one = matrix(7, 0)
    for values, slow in ((mean_similarity, by_similarity), (to_middle, by_middle)):
        table = values(one)
        for first, last in itertools.combinations(range(8), 2):
            assert float(table[first, last]) == pytest.approx(slow(one, first, last), abs=1e-12)


def test_sizes_are_those_of_the_published_baselines_and_are_kept():
    assert sizes(1000, 3) == (166, 500)
    assert sizes(21, 3) == (3, 11)
    assert sizes(10, 2, 0.3, 0.7) == (3, 7)
    # Without a least size the node that is like no other would stand alone.
    one = torch.ones(12, 12, dtype=torch.float64)
    one[0, 1:] = one[1:, 0] = 0
    assert best_partition(mean_similarity(one), 2, 1, 12) == (1,)
    assert best_partition(mean_similarity(one), 2, *sizes(12, 2)) == (3,)
    for least, most in ((0.4, 0.5), (None, 0.2)):
        with pytest.raises(UsageError, match="10 nodes cannot be cut into stages=3"):
            sizes(10, 3, least, most)
    with pytest.raises(UsageError, match="2 nodes cannot be cut into stages=3"):
        sizes(2, 3)


def test_blocks_of_alike_levels_are_found():
    stage = torch.tensor([0] * 5 + [1] * 7 + [2] * 4 + [3] * 4)
    pairs = (stage[:, None] == stage).float().expand(6, 20, 20)
    found = any_stages(pairs, 4, seed=0, replicates=5)
    assert found.share == (5 / 20, 12 / 20, 16 / 20)
    assert (
        found.replicates.shape == (5, 3) and (found.replicates == torch.tensor(found.share, dtype=torch.float64)).all()
    )


def test_replicates_differ_where_pairs_do():
    pairs = torch.stack([matrix(20, seed) for seed in range(6)]).float()
    found = any_stages(pairs, 3, seed=0, replicates=20)
    assert found.replicates.std(0).max() > 0


def test_the_log_snr_split_is_the_published_one():
    """0.348 / 0.709 (Table 4), as the first of 1000 times i / 1000 of a stage."""
    whole = Axis.of(VPSDE(VPSDEConfig()), "time", 1e-12, 1.0)
    times = whole.time(torch.tensor(baselines.log_snr(whole, 3), dtype=torch.float64))
    assert times.tolist() == pytest.approx([0.348, 0.709], abs=1e-6)
    # The DDPM table is nearly the same process.
    table = Axis.of(Discrete(DiscreteConfig()))
    assert baselines.log_snr(table, 3) == pytest.approx((0.348, 0.709), abs=0.0015)


def test_the_log_snr_split_is_optimal_on_a_small_grid():
    level = VPSDE(VPSDEConfig()).log_snr((torch.arange(12) + 1) / 12)
    smallest, largest = sizes(12, 3)

    def cost(first, last):
        return sum(abs(2 * float(level[k] - level[(first + last - 1) // 2])) for k in range(first, last))

    costs = {
        cuts: sum(cost(*pair) for pair in parts)
        for cuts, parts in segments(12, 3)
        if all(smallest <= last - first <= largest for first, last in parts)
    }
    found = best_partition(to_middle(log_snr_affinity(level)), 3, smallest, largest)
    assert costs[found] == pytest.approx(min(costs.values()))


def test_uniform_time():
    """Published as 0.330 / 0.670: 1/3 and 2/3 to two digits."""
    axis = Axis.of(VPSDE(VPSDEConfig(t_min=1e-5)))
    times = axis.time(torch.tensor(baselines.uniform_time(axis, 3), dtype=torch.float64))
    assert times.tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-5)
    assert [math.floor(100 * t + 0.5) / 100 for t in times.tolist()] == [0.33, 0.67]
    assert baselines.uniform_time(axis, 5) == pytest.approx((0.2, 0.4, 0.6, 0.8))


def test_affinity_cuts_between_nodes():
    stage = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    assert baselines.by_affinity((stage[:, None] == stage).double(), 3) == (4 / 12, 7 / 12)
