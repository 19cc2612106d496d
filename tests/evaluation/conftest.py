"""Evaluations over a small network in memory, and what of them is really sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.evaluation.evaluate import Evaluator
from gearshift.evaluation.instruments import Instruments
from gearshift.evaluation.observe import Observer
from gearshift.evaluation.settings import EvaluationConfig
from gearshift.policies import Policy
from gearshift.sampling.loop import Sampler, sample_chunk

from .evaluations import POLICIES, Make, Stub, dataset, ddim, network


@pytest.fixture
def evaluator(tmp_path: Path) -> Make:
    def make(
        classifier: Stub | None = None, *, classes: bool = False, inert_end: bool = False, **settings: Any
    ) -> Evaluator:
        denoiser = Denoiser(network(classes, inert_end), VPSDE(VPSDEConfig()))

        def sampler(policy: Policy, solver: Any, **options: Any) -> Sampler:
            made = Sampler(denoiser, solver, policy, **options)
            made.check()
            return made

        chosen: dict[str, Any] = dict(
            policies=POLICIES,
            solvers={"ddim": ddim(4)},
            num_images=6,
            chunk=6,
            metrics=[],
            timing_images=0,
            equal_macs=False,
        )
        config = EvaluationConfig(**{**chosen, **settings})
        data = dataset(classes)
        instruments = Instruments.prepare(config, data, None, torch.device("cpu"))
        instruments.observer = Observer.of(instruments.metrics, classifier, {})
        return Evaluator(config, sampler, instruments, data, torch.device("cpu"), tmp_path / "evaluation")

    return make


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(policy, first index) of every chunk that is really sampled."""
    found: list[tuple[str, int]] = []

    def counting(sampler: Sampler, index: Tensor, table: Any, **options: Any) -> Any:
        found.append((sampler.policy.name, int(index[0])))
        return sample_chunk(sampler, index, table, **options)

    monkeypatch.setattr(Sampler, "generate", counting)
    return found
