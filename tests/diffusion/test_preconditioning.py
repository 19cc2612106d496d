"""The denoiser around a preconditioned process: the network sees c_in x, everything else sees eps and never F."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.edm import EDM, VE, EDMConfig, VEConfig
from gearshift.diffusion.process import VPSDE, Discrete, DiscreteConfig, Process, VPSDEConfig
from gearshift.execution.plan import StepPlan
from gearshift.execution.stream import Stream

from ..contract import build
from ..toys import Isotropic

B = 4
PRECONDITIONED = {"edm": EDM(EDMConfig()), "ve": VE(VEConfig())}
PLAIN = {"vp": VPSDE(VPSDEConfig()), "cosine": Discrete(DiscreteConfig("cosine"))}
each = pytest.mark.parametrize("process", PRECONDITIONED.values(), ids=PRECONDITIONED.keys())


def inputs(d: Denoiser, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    size = d.network.image_size
    x = torch.randn(B, d.network.in_channels, size, size, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0, 2, 1, 0]) if d.network.cond_kind == "class" else None


def raw(d: Denoiser, x: Tensor, time: float | Tensor, cond: Tensor | None, depth: int | None = None) -> Tensor:
    """What the network says of its own input, block by block."""
    fed = d.process.network_time(time).expand(len(x))
    stream = d.network.embed(x, fed, cond)
    hidden, skips = stream.hidden, []
    depth = d.network.num_blocks() if depth is None else depth
    for block in range(depth):
        hidden = d.network.blocks[block](hidden, stream.cond, skips.pop() if block in d.network.pops else None)
        if block in d.network.pushes:
            skips.append(hidden)
    return d.network.readout(hidden, stream.cond, depth)


@each
def test_prediction_and_taps_are_eps(process: Process) -> None:
    d = Denoiser(build("isotropic"), process)
    x, cond = inputs(d)
    times = torch.tensor([0.05, 0.5, 3.0, 50.0], dtype=torch.float64)
    for time in (0.7, times):
        out = d.rows(x, time, cond, StepPlan(taps=frozenset({1, 3})))
        seen = process.precondition(x, time)
        for depth, got in ((None, out.prediction), (1, out.taps[1]), (3, out.taps[3])):
            assert torch.equal(got, process.to_eps(raw(d, seen, time, cond, depth), x, time))
        assert out.prediction.dtype == torch.float32


def test_edm_by_hand_from_the_table() -> None:
    """D = c_skip x_e + c_out F(c_in x_e; ln(s)/4), written in EDM's frame; x0 of the prediction is D."""
    d = Denoiser(build("isotropic"), PRECONDITIONED["edm"])
    x, cond = inputs(d)
    for s in (0.02, 0.5, 5.0):
        x_e = x * math.sqrt(1 + s**2)
        network = raw(d, x_e / math.sqrt(s**2 + 0.25), s, cond)
        denoised = 0.25 / (s**2 + 0.25) * x_e + s * 0.5 / math.sqrt(s**2 + 0.25) * network
        torch.testing.assert_close(d.predict(x, s, cond).x0, denoised, rtol=1e-5, atol=1e-5)


@each
def test_variance_channels_stay_as_the_network_gives_them(process: Process) -> None:
    d = Denoiser(build("long-skips"), process)
    x, _ = inputs(d)
    p = d.predict(x, 0.6, None)
    both = raw(d, process.precondition(x, 0.6), 0.6, None)
    assert p.variance is not None and torch.equal(p.variance, both[:, 1:])
    assert torch.equal(p.eps, process.to_eps(both[:, :1], x, 0.6))


@each
def test_guidance_mixes_eps(process: Process) -> None:
    d = Denoiser(build("isotropic"), process)
    x, cond = inputs(d)
    seen = process.precondition(x, 0.6)
    null = torch.full((B,), 3)
    a, b = (process.to_eps(raw(d, seen, 0.6, c), x, 0.6) for c in (cond, null))
    torch.testing.assert_close(d.predict(x, 0.6, cond, guidance=2.5).eps, b + 2.5 * (a - b), rtol=1e-5, atol=1e-5)


@each
def test_what_is_held_is_eps(process: Process) -> None:
    """A skipped row keeps its eps where F would mean another eps at another level; the other rows are computed."""
    d = Denoiser(build("isotropic"), process)
    x, cond = inputs(d)
    first = d.predict(x, 3.0, cond)
    call = torch.tensor([True, False, True, False])
    second = d.predict(0.9 * x, 0.4, cond, plan=StepPlan(call=call), held=first.held)
    fresh = d.predict(0.9 * x, 0.4, cond)
    assert torch.equal(second.eps[1], first.eps[1]) and torch.equal(second.eps[3], first.eps[3])
    torch.testing.assert_close(second.eps[::2], fresh.eps[::2])
    alpha, sigma = 1 / math.hypot(1, 0.4), 0.4 / math.hypot(1, 0.4)
    torch.testing.assert_close(second.x0, (0.9 * x - sigma * second.eps) / alpha)


@each
def test_paths_are_chosen_by_the_ratio(process: Process) -> None:
    d = Denoiser(build("two-decoders"), process)  # its route: path 1 where log-SNR < 0, that is ratio > 1
    x, _ = inputs(d)
    times = torch.tensor([0.3, 1.0, 1.001, 30.0], dtype=torch.float64)
    out = d.rows(x, times, None)
    assert out.depth.tolist() == [6, 6, 7, 7]
    for i, t in enumerate(times.tolist()):
        alone = d.rows(x[i : i + 1], t, None).prediction
        torch.testing.assert_close(out.prediction[i : i + 1], alone, rtol=1e-4, atol=1e-5 * max(t, 10))


@each
def test_under_autocast_both_ends_are_fp32(process: Process) -> None:
    d = Denoiser(build("isotropic"), process)
    x, cond = inputs(d)
    with torch.autocast("cpu", torch.bfloat16):
        out = d.rows(x, 2.0, cond, StepPlan(taps=frozenset({2})))
    assert out.prediction.dtype == out.taps[2].dtype == torch.float32
    torch.testing.assert_close(out.prediction, d.rows(x, 2.0, cond).prediction, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("process", PLAIN.values(), ids=PLAIN.keys())
def test_other_processes_run_what_they_always_ran(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    d = Denoiser(build("isotropic"), process)
    x, cond = inputs(d)
    t = process.time_of_index(torch.tensor([3.0, 200.0, 600.0, 999.0]))
    for forbidden in ("precondition", "to_eps"):
        monkeypatch.setattr(type(process), forbidden, None)
    out = d.rows(x, t, cond, StepPlan(taps=frozenset({2})))
    assert torch.equal(out.prediction, raw(d, x, t, cond)) and torch.equal(out.taps[2], raw(d, x, t, cond, 2))


class Augmented(Isotropic):
    """Adds the augmentation label to its conditioning vector."""

    augment_dim = 9

    def embed_augmented(self, x: Tensor, time: Tensor, cond: Tensor | None, augment: Tensor) -> Stream:
        stream = self.embed(x, time, cond)
        stream.cond["vector"] = stream.cond["vector"] + augment.sum(1, keepdim=True)
        return stream


def test_augmentation_labels_reach_the_embedding_only_when_given() -> None:
    torch.manual_seed(0)
    d = Denoiser(Augmented(), PRECONDITIONED["edm"])
    x, cond = inputs(d)
    plain = d.rows(x, 1.0, cond).prediction
    assert torch.equal(d.rows(x, 1.0, cond, augment=torch.zeros(B, 9)).prediction, plain)
    moved = d.rows(x, 1.0, cond, augment=torch.tensor([[0.0] * 9] * 3 + [[1.0] * 9])).prediction
    assert torch.equal(moved[:3], plain[:3]) and not torch.allclose(moved[3], plain[3])
