"""EDM and VE: processes whose time is the noise-to-signal ratio, and whose networks are preconditioned.

With s the ratio, x_e = x_0 + s eps, F the network and d = ``sigma_data``, the denoiser of Karras et al. 2022 (arXiv
2206.00364, table 1) is D(x_e; s) = c_skip x_e + c_out F(c_in x_e; c_noise):

    |         | EDM                      | VE                     |
    |---------|--------------------------|------------------------|
    | c_skip  | d^2 / (s^2 + d^2)        | 1                      |
    | c_out   | s d / sqrt(s^2 + d^2)    | s                      |
    | c_in    | 1 / sqrt(s^2 + d^2)      | 1                      |
    | c_noise | ln(s) / 4                | ln(s / 2)              |
    | s       | ln s ~ N(P_mean, P_std^2) | ln s ~ U(0.02 .. 100) |
    | weight  | (s^2 + d^2) / (s d)^2    | 1 / s^2                |

The weight is that of |D - y|^2. The rest of the project lives in the frame x = alpha x_0 + sigma eps = alpha x_e with
alpha = 1 / sqrt(1 + s^2), and speaks of eps = (x_e - D) / s. Written out, with no difference of nearly equal numbers,

    EDM: eps = s sqrt(1 + s^2) / (s^2 + d^2) x - d / sqrt(s^2 + d^2) F,    c_in x_e = sqrt((1 + s^2) / (s^2 + d^2)) x,
    VE:  eps = -F,                                                         c_in x_e = sqrt(1 + s^2) x,

and the weights of |eps_hat - eps|^2 are s^2 times those of the table: (s^2 + d^2) / d^2, and 1. The network sees fp32,
eps is fp32, and the coefficients are float64 until they meet an image.

``VPSDE`` and ``Discrete`` (cosine) are the other two columns of that table, see ``process``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gearshift.diffusion.process import LEAST_PROBABILITY, Process, as_time
from gearshift.runtime.errors import UsageError


class RatioProcess(Process):
    """What EDM and VE share: time is s = sigma / alpha; any s > 0 is meant, solvers visit ``t_min`` to ``t_max``."""

    continuous = True
    preconditioned = True
    evenly_timed = False

    def log_snr(self, t: Tensor | float) -> Tensor:
        return -2 * torch.log(as_time(t))

    def time_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * as_time(log_snr))


@dataclass
class EDMConfig:
    """Settings of the process.

    Attributes:
        sigma_data: standard deviation of the data that the preconditioning assumes; images in [-1, 1] have about 0.5.
        P_mean, P_std: of ln(sigma) in training.
        sigma_min, sigma_max: ratios at which solvers end and begin; training reaches beyond both.
        rho: the index axis (0 to 999) is linear in sigma^(1 / rho).
    """

    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        for option in ("sigma_data", "P_std", "rho"):
            if not getattr(self, option) > 0:
                raise UsageError(f"process 'edm' needs {option} above 0, got {option}={getattr(self, option)}")
        _check_range("edm", self.sigma_min, self.sigma_max)


class EDM(RatioProcess):
    """The EDM process: log-normal training levels, and a preconditioned network of unit-variance input and target.

    Entry i of 1000 is ``(sigma_min^(1/rho) + i / 999 (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`` (eq. 5 there,
    counted from the data), and solvers space their calls on that axis.
    """

    Config: ClassVar[type[Any]] = EDMConfig
    num_steps = 1000

    def __init__(self, config: EDMConfig) -> None:
        self.config = config
        self.name = "edm"
        self.t_min, self.t_max = config.sigma_min, config.sigma_max
        self._ends = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)

    def time_of_index(self, index: Tensor | float) -> Tensor:
        low, high = self._ends
        return (low + as_time(index) / (self.num_steps - 1) * (high - low)) ** self.config.rho

    def index_of_time(self, t: Tensor | float) -> Tensor:
        low, high = self._ends
        index = (as_time(t) ** (1 / self.config.rho) - low) / (high - low) * (self.num_steps - 1)
        return index.clamp(0, self.num_steps - 1)

    def network_time(self, t: Tensor | float) -> Tensor:
        return (0.25 * torch.log(as_time(t))).to(torch.float32)

    def times_from_uniform(self, u: Tensor) -> Tensor:
        return self.quantile(u)

    def cdf(self, t: Tensor | float) -> Tensor:
        return torch.special.ndtr((torch.log(as_time(t)) - self.config.P_mean) / self.config.P_std)

    def quantile(self, p: Tensor | float) -> Tensor:
        # At p = 0 and 1 there would be no noise or no signal: a level 8.2 standard deviations out stands for them.
        held = as_time(p).clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return torch.exp(self.config.P_mean + self.config.P_std * torch.special.ndtri(held))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared noise error: (s^2 + d^2) / d^2, which makes it the unweighted error of F."""
        return (1 + (as_time(t) / self.config.sigma_data) ** 2).to(torch.float32)

    def precondition(self, x: Tensor, t: Tensor | float) -> Tensor:
        return _scaled(x, t, self._input_scale)

    def to_eps(self, output: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        return _scaled(x, t, self._skip_scale).add_(_scaled(output, t, self._output_scale))

    def _input_scale(self, s: Tensor) -> Tensor:
        return torch.hypot(torch.ones_like(s), s) / self._spread(s)

    def _skip_scale(self, s: Tensor) -> Tensor:
        return self._input_scale(s) * (s / self._spread(s))

    def _output_scale(self, s: Tensor) -> Tensor:
        return -self.config.sigma_data / self._spread(s)

    def _spread(self, s: Tensor) -> Tensor:
        """sqrt(s^2 + sigma_data^2): standard deviation of x_0 + s eps."""
        return torch.hypot(s, torch.full_like(s, self.config.sigma_data))


@dataclass
class VEConfig:
    """``sigma_min`` and ``sigma_max``: ends of the training levels, and where solvers end and begin."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        _check_range("ve", self.sigma_min, self.sigma_max)


class VE(RatioProcess):
    """The VE process of Song et al. 2021 (arXiv 2011.13456) in EDM's terms: log-uniform levels, x_e fed as it is.

    Entry i of 1000 is ``sigma_min (sigma_max / sigma_min)^(i / 999)``, their geometric grid, so equal parts of the
    index axis are equally frequent in training, as on ``VPSDE`` and ``Discrete``.
    """

    Config: ClassVar[type[Any]] = VEConfig
    num_steps = 1000

    def __init__(self, config: VEConfig) -> None:
        self.config = config
        self.name = "ve"
        self.t_min, self.t_max = config.sigma_min, config.sigma_max
        self._octaves = math.log(config.sigma_max / config.sigma_min)

    def time_of_index(self, index: Tensor | float) -> Tensor:
        return self.config.sigma_min * torch.exp(as_time(index) * (self._octaves / (self.num_steps - 1)))

    def index_of_time(self, t: Tensor | float) -> Tensor:
        index = torch.log(as_time(t) / self.config.sigma_min) * ((self.num_steps - 1) / self._octaves)
        return index.clamp(0, self.num_steps - 1)

    def network_time(self, t: Tensor | float) -> Tensor:
        return torch.log(0.5 * as_time(t)).to(torch.float32)

    def times_from_uniform(self, u: Tensor) -> Tensor:
        return self.quantile(u)

    def cdf(self, t: Tensor | float) -> Tensor:
        return (torch.log(as_time(t) / self.config.sigma_min) / self._octaves).clamp(0, 1)

    def quantile(self, p: Tensor | float) -> Tensor:
        return self.config.sigma_min * torch.exp(as_time(p) * self._octaves)

    def precondition(self, x: Tensor, t: Tensor | float) -> Tensor:
        return _scaled(x, t, lambda s: torch.hypot(torch.ones_like(s), s))

    def to_eps(self, output: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        return -output.float()


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise UsageError(f"process {name!r} needs 0 < sigma_min < sigma_max, got sigma_min={low} sigma_max={high}")


def _scaled(x: Tensor, t: Tensor | float, of: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` [n, ...] in fp32 times a function of the ratio; the host does not wait for the device."""
    value = of(as_time(t)).to(torch.float32)
    return x.float() * (value.to(x.device).view(-1, *([1] * (x.ndim - 1))) if value.ndim else value)
