"""Routing by the noise level: where stages end, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from gearshift.backbones.staging import StageRouter
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.runtime.errors import UsageError

PUBLISHED = (2.51027, 7.40458)


def levels(*ratios: float) -> torch.Tensor:
    return -2 * torch.tensor(ratios, dtype=torch.float64).log()


def test_a_stage_ends_at_its_boundary_inclusive() -> None:
    router = StageRouter(PUBLISHED)
    below, above = 1 - 1e-9, 1 + 1e-9
    for stage, boundary in enumerate(PUBLISHED):
        ratios = levels(boundary * below, boundary, boundary * (1 + 1e-14), boundary * above)
        assert router.route(ratios).tolist() == [stage, stage, stage, stage + 1]
        assert [router.stage_of_sigma(boundary * f) for f in (below, 1.0, above)] == [stage, stage, stage + 1]
    assert router.num_stages == 3
    torch.testing.assert_close(router.log_snr, levels(*PUBLISHED), rtol=0, atol=0)


def test_both_ends_belong_to_a_stage() -> None:
    router = StageRouter(PUBLISHED)
    assert router.route(levels(0.0, math.inf)).tolist() == [0, 2]
    assert (router.stage_of_sigma(0.0), router.stage_of_sigma(math.inf)) == (0, 2)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="no noise-to-signal ratio"):
            router.stage_of_sigma(wrong)


def test_rows_are_routed_each_by_itself() -> None:
    router = StageRouter(PUBLISHED)
    mixed = levels(9.0, 0.1, 3.0, 2.0, 80.0)
    assert router.route(mixed).tolist() == [2, 0, 1, 0, 2]
    assert router.route(mixed).dtype == torch.int64
    assert router.route(mixed.flip(0)).tolist() == [2, 0, 1, 0, 2][::-1]


def test_no_boundary_is_one_stage() -> None:
    router = StageRouter(())
    assert router.num_stages == 1
    assert router.route(levels(0.0, 1.0, math.inf)).tolist() == [0, 0, 0]


def test_published_times_of_vp() -> None:
    """t = 0.4420 and 0.6308 are the ends of stages 0 and 1, seen through the process's own log-SNR."""
    process, router = VPSDE(VPSDEConfig()), StageRouter(PUBLISHED)
    stages = [
        int(router.route(torch.as_tensor(process.log_snr(time)).double().reshape(1)))
        for time in (1e-5, 0.4420, 0.4421, 0.6308, 0.6309, 1.0)
    ]
    assert stages == [0, 0, 1, 1, 2, 2]


def test_levels_need_no_device_context() -> None:
    with torch.device("meta"):
        router = StageRouter(PUBLISHED)
    assert router.route(levels(1.0)).tolist() == [0]


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0.0], "0.0 is no noise-to-signal ratio"),
        ([-1.0, 2.0], "-1.0 is no noise-to-signal ratio"),
        ([1.0, math.inf], "inf is no noise-to-signal ratio"),
        ([math.nan], "nan is no noise-to-signal ratio"),
        ([2.0, 1.0], r"boundaries=\[2.0, 1.0\]: 2.0 stands before 1.0"),
        ([1.0, 1.0], "strictly ascending"),
    ],
)
def test_bad_boundaries(boundaries: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StageRouter(boundaries)
