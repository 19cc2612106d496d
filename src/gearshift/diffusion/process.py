"""Noise processes: how an image turns into noise, and on which axis times are named.

A process gives the marginals ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``alpha^2 + sigma^2 = 1``.
Log-SNR, ``log(alpha^2 / sigma^2)``, is the axis all processes share: each one only says how its own time maps to
log-SNR and back, and everything else follows from that. The kinds of this file feed the network x as it is and read
its output F as eps. In the terms of Karras et al. 2022 (arXiv 2206.00364, table 1), where x_e = x / alpha, s = sigma /
alpha and D(x_e; s) = c_skip x_e + c_out F(c_in x_e; c_noise), that is c_skip = 1, c_out = -s, c_in = 1 / sqrt(1 + s^2):
its column "VP" for ``VPSDE``, "iDDPM" for ``Discrete`` with the cosine table. The other two are in ``edm``. Here:

* ``VPSDE``: continuous time t in (0, 1] (Song et al. 2021, arXiv 2011.13456, eq. 32-33), as in pixel U-ViT.
* ``Discrete``: a table of noise levels whose time is an index, starting at 0 (Ho et al. 2020, arXiv 2006.11239; DiT)
  or at 1 (latent U-ViT); beta linear, sqrt(beta) linear, or cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17).

Times are float64: log-SNR is steep near the data, and solvers take differences of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError

TRAINING_INDEX_MAX = 999.0
"""Upper end of the training-index axis: published schedules speak of 1000 indices, whatever the process."""

LEAST_PROBABILITY = 2.0**-53
"""Quantiles are taken at least this far from the ends of [0, 1] where those would have no noise or no signal."""

INDEX_ROUNDING = 1e-9
"""What counts as rounding in an index that was derived from a log-SNR or a probability."""

SCHEDULES = ("linear", "scaled_linear", "cosine")


def as_time(t: Tensor | float) -> Tensor:
    """``t`` as float64, on its own device; a Python number becomes a 0-d host tensor."""
    return t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)


class Process(ABC):
    """A variance-preserving noise process. All methods map elementwise and never make the host wait for a device.

    Attributes:
        name: what messages and tables call it.
        continuous: whether every real time in ``[t_min, t_max]`` is meant, or only the integers among them.
        num_steps: size of the table of noise levels (for a continuous process: of the table made for table-based
            solvers).
        t_min, t_max: least and most noisy time that solvers visit by default.
        preconditioned: whether the network sees ``precondition(x, t)`` and its output becomes eps by ``to_eps``; else
            it sees x and gives eps.
        evenly_timed: whether solvers space calls evenly in time; else evenly in index (``time_of_index``).
    """

    name: str
    continuous: bool
    num_steps: int
    t_min: float
    t_max: float
    preconditioned: bool = False
    evenly_timed: bool = True

    @abstractmethod
    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2) at ``t``, float64, strictly decreasing in ``t``."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """Inverse of :meth:`log_snr`, float64."""

    @abstractmethod
    def time_of_index(self, index: Tensor | float) -> Tensor:
        """Time of entry ``index`` (fractions allowed) of a table of ``num_steps`` levels; 0 is next to the data."""

    @abstractmethod
    def index_of_time(self, t: Tensor | float) -> Tensor:
        """Inverse of :meth:`time_of_index`, held within ``[0, num_steps - 1]``."""

    @abstractmethod
    def network_time(self, t: Tensor | float) -> Tensor:
        """What the network is fed for time ``t``, float32."""

    @abstractmethod
    def times_from_uniform(self, u: Tensor) -> Tensor:
        """Training times, float64 [B], from ``u`` [B] uniform in [0, 1)."""

    @abstractmethod
    def cdf(self, t: Tensor | float) -> Tensor:
        """Probability that a training time is at most ``t``, float64 in [0, 1]; any ``t``, infinity included."""

    @abstractmethod
    def quantile(self, p: Tensor | float) -> Tensor:
        """Least time whose :meth:`cdf` reaches ``p`` in [0, 1], float64; always a time with noise and signal left.

        A draw from the training times in (a, b] is ``quantile(p)`` with p uniform in (cdf(a), cdf(b)].
        """

    def precondition(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the network sees of ``x`` [n, ...] (``alpha x_0 + sigma eps``) at ``t``, a number or [n]."""
        return x

    def to_eps(self, output: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The noise prediction [n, ...] that ``output`` of the network means, for ``x`` and ``t`` as it saw them."""
        return output

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """Fraction of signal variance, alpha(t)^2, float64 in (0, 1]."""
        return torch.sigmoid(self.log_snr(t))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal amplitude, float64."""
        return self.alpha_bar(t).sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise amplitude, float64; from log-SNR, so that it keeps its digits where alpha is almost 1."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def training_index(self, t: Tensor | float) -> Tensor:
        """Where ``t`` lies on the common axis [0, 999] of published schedules (0 is next to the data), float64."""
        return self.index_of_time(t) * (TRAINING_INDEX_MAX / (self.num_steps - 1))

    def time_of_training_index(self, index: Tensor | float) -> Tensor:
        """Inverse of :meth:`training_index`, float64."""
        return self.time_of_index(as_time(index) * ((self.num_steps - 1) / TRAINING_INDEX_MAX))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared noise error at ``t`` [B], float32: ones (L_simple; Ho et al. 2020, eq. 14)."""
        return torch.ones_like(t, dtype=torch.float32)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """``alpha(t) x0 + sigma(t) noise``, fp32; ``x0``, ``noise`` [B, ...]; ``t`` [B] beside them, or a number."""
        log_snr = self.log_snr(t)
        alpha = torch.sigmoid(log_snr).sqrt().to(torch.float32)
        sigma = torch.sigmoid(-log_snr).sqrt().to(torch.float32)
        if alpha.ndim:
            shape = (-1, *([1] * (x0.ndim - 1)))
            alpha, sigma = alpha.view(shape), sigma.view(shape)
        return alpha * x0.float() + sigma * noise.float()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


@dataclass
class VPSDEConfig:
    """beta(t) = beta_min + (beta_max - beta_min) t; ``t_min`` is where solvers stop unless they have their own end."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            got = f"beta_min={self.beta_min} beta_max={self.beta_max}"
            raise UsageError(f"VPSDE needs 0 < beta_min <= beta_max, got {got}")
        if not 0 < self.t_min < 1:
            raise UsageError(f"VPSDE needs t_min between 0 and 1, got t_min={self.t_min}")


class VPSDE(Process):
    """Continuous VP-SDE: log alpha_bar(t) = -(beta_min t + (beta_max - beta_min) t^2 / 2); the network is fed 999 t.

    Table entry i of 1000 is t = (i + 1) / 1000, so integer-time solvers run on it nearly as on the DDPM table.
    """

    Config: ClassVar[type[Any]] = VPSDEConfig
    continuous = True
    num_steps = 1000
    t_max = 1.0

    def __init__(self, config: VPSDEConfig) -> None:
        self.config = config
        self.name = "vp_sde"
        self.t_min = config.t_min

    def beta(self, t: Tensor | float) -> Tensor:
        """Rate of the forward SDE dx = -beta x / 2 dt + sqrt(beta) dw, float64."""
        return self.config.beta_min + (self.config.beta_max - self.config.beta_min) * as_time(t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        log_alpha_bar = -t * (self.config.beta_min + 0.5 * (self.config.beta_max - self.config.beta_min) * t)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def time_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # The positive root of  slope/2 t^2 + beta_min t - decay = 0, in the form that loses no digits for small t.
        decay = torch.nn.functional.softplus(-as_time(log_snr))
        slope = self.config.beta_max - self.config.beta_min
        return 2 * decay / (self.config.beta_min + torch.sqrt(self.config.beta_min**2 + 2 * slope * decay))

    def time_of_index(self, index: Tensor | float) -> Tensor:
        return (as_time(index) + 1) / self.num_steps

    def index_of_time(self, t: Tensor | float) -> Tensor:
        return (as_time(t) * self.num_steps - 1).clamp(0, self.num_steps - 1)

    def network_time(self, t: Tensor | float) -> Tensor:
        return (as_time(t) * 999.0).to(torch.float32)

    def times_from_uniform(self, u: Tensor) -> Tensor:
        # 1 - u, not u: the same distribution, but on (0, 1], where log-SNR is finite.
        return 1.0 - u.to(torch.float64)

    def cdf(self, t: Tensor | float) -> Tensor:
        return as_time(t).clamp(0, 1)

    def quantile(self, p: Tensor | float) -> Tensor:
        return as_time(p).clamp(LEAST_PROBABILITY, 1)


@dataclass
class DiscreteConfig:
    """A table of ``num_steps`` levels.

    ``schedule`` is linear, scaled_linear (sqrt(beta) linear) or cosine, which ignores the two betas. ``first_index`` is
    the time of the least noisy level: 0 (DDPM, DiT) or 1 (latent U-ViT).
    """

    schedule: str = "linear"
    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    first_index: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {self.schedule!r} of a discrete process; known: {', '.join(SCHEDULES)}")
        if self.num_steps < 2:
            raise UsageError(f"a discrete process needs at least 2 steps, got num_steps={self.num_steps}")
        if self.first_index not in (0, 1):
            raise UsageError(f"first_index of a discrete process is 0 or 1, got {self.first_index}")
        if self.schedule != "cosine" and not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"schedule {self.schedule!r} needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start} beta_end={self.beta_end}"
            )


def betas(config: DiscreteConfig) -> Tensor:
    """The table of betas, float64 [num_steps]."""
    n = config.num_steps
    if config.schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float64)
    if config.schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n, dtype=torch.float64) ** 2
    f = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # the cap keeps the last level from having no signal at all


class Discrete(Process):
    """A table of noise levels; time is the index the network is fed.

    Between entries log-SNR is interpolated linearly (as sigma-based solvers do with log sigma); times and log-SNRs
    beyond the table are held at its ends.
    """

    Config: ClassVar[type[Any]] = DiscreteConfig
    continuous = False

    def __init__(self, config: DiscreteConfig) -> None:
        self.config = config
        self.name = config.schedule
        self.num_steps = config.num_steps
        self.t_min = float(config.first_index)
        self.t_max = float(config.first_index + config.num_steps - 1)
        log_alpha_bar = torch.cumsum(torch.log1p(-betas(config)), dim=0)
        self._log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        self._on_device: dict[torch.device, Tensor] = {self._log_snr.device: self._log_snr}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            # Copied once, and without waiting, so that a first use inside a loop does not stall it.
            self._on_device[device] = self._log_snr.to(device, non_blocking=True)
        return self._on_device[device]

    def log_snr(self, t: Tensor | float) -> Tensor:
        index = self.index_of_time(t)
        table = self._table(index.device)
        low = index.floor().clamp(max=self.num_steps - 2).long()
        return torch.lerp(table[low], table[low + 1], index - low)

    def time_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        wanted = as_time(log_snr)
        table = self._table(wanted.device)
        wanted = wanted.clamp(self._log_snr[-1].item(), self._log_snr[0].item())
        low = torch.searchsorted(-table, -wanted, right=True).clamp(1, self.num_steps - 1) - 1
        return self.time_of_index(low + (table[low] - wanted) / (table[low] - table[low + 1]))

    def time_of_index(self, index: Tensor | float) -> Tensor:
        return as_time(index) + self.config.first_index

    def index_of_time(self, t: Tensor | float) -> Tensor:
        return (as_time(t) - self.config.first_index).clamp(0, self.num_steps - 1)

    def network_time(self, t: Tensor | float) -> Tensor:
        return as_time(t).to(torch.float32)

    def times_from_uniform(self, u: Tensor) -> Tensor:
        return self.time_of_index((u.to(torch.float64) * self.num_steps).floor())

    def cdf(self, t: Tensor | float) -> Tensor:
        # A time that falls short of an entry by rounding only has reached it.
        reached = (as_time(t) - self.config.first_index + INDEX_ROUNDING).floor() + 1
        return reached.clamp(0, self.num_steps) / self.num_steps

    def quantile(self, p: Tensor | float) -> Tensor:
        index = (as_time(p) * self.num_steps - INDEX_ROUNDING).ceil() - 1
        return self.time_of_index(index.clamp(0, self.num_steps - 1))
