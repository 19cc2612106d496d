"""Over what an average over noise levels runs: a share in [0, 1] of an axis, 0 next to the data.

* ``time``: uniform in the process's own time. The paper's choice for VP; on a table, uniform in the index.
* ``training``: uniform in the probability of the training times; VP and tables: the same as ``time``.
* ``log_snr``: uniform in log-SNR.
* ``vp_time``: uniform in the time of the VP-SDE with beta 0.1 to 20 that has the same noise-to-signal ratio, which is
  the paper's axis for any process. The published EDM boundaries are VP boundaries carried over in this way.
* ``auto``: ``time`` where time is spaced evenly (VP, tables), ``vp_time`` where time is sigma (EDM, VE). Most of the
  training levels of EDM lie near the data, so an average over them never falls below 0.9: ``training`` is no default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gearshift.diffusion.process import VPSDE, Process, VPSDEConfig
from gearshift.runtime.errors import UsageError

AXES = ("auto", "time", "training", "log_snr", "vp_time")


@dataclass(frozen=True)
class Axis:
    """Shares to noise levels. Both directions are float64 and elementwise.

    Attributes:
        name: one of `AXES` but auto.
        process: whose times are meant.
        t_min, t_max: process times of share 0 and 1.
    """

    name: str
    process: Process
    t_min: float
    t_max: float
    _log_snr: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, process: Process, name: str = "auto", t_min: float | None = None, t_max: float | None = None) -> Axis:
        """The axis between two process times; None is the process's own end (where time is sigma, `vp_time` has the
        ends of the VP-SDE, 0.001 and 1).

        Raises:
            UsageError: an unknown name, or ends that are no times in order.
        """
        if name not in AXES:
            raise UsageError(f"axis={name} is not one of {', '.join(AXES)}")
        if name == "auto":
            name = "time" if process.evenly_timed else "vp_time"
        vp = VPSDE(VPSDEConfig())
        own = process.t_min, process.t_max
        if name == "vp_time" and not process.evenly_timed:  # any ratio is a time of such a process
            own = (
                float(process.time_of_log_snr(vp.log_snr(vp.t_min))),
                float(process.time_of_log_snr(vp.log_snr(vp.t_max))),
            )
        low, high = own[0] if t_min is None else float(t_min), own[1] if t_max is None else float(t_max)
        ends = [float(process.log_snr(end)) if end >= 0 else math.nan for end in (low, high)]
        if not (low < high and ends[0] > ends[1] and all(map(math.isfinite, ends))):
            raise UsageError(
                f"t_min={low:g} and t_max={high:g} must be two times of {process.name} with t_min below t_max "
                f"(its own are {process.t_min:g} and {process.t_max:g})"
            )

        def level(share: Tensor) -> Tensor:
            if name == "log_snr":
                return ends[0] + (ends[1] - ends[0]) * share
            if name == "vp_time":
                first, last = (float(vp.time_of_log_snr(end)) for end in ends)
                return vp.log_snr(first + (last - first) * share)
            if name == "training":
                first, last = float(process.cdf(low)), float(process.cdf(high))
                return process.log_snr(process.quantile(first + (last - first) * share))
            return process.log_snr(low + (high - low) * share)

        return cls(name, process, low, high, level)

    def log_snr(self, share: Tensor) -> Tensor:
        """log-SNR of shares, float64."""
        return self._log_snr(share.double())

    def sigma(self, share: Tensor) -> Tensor:
        """Noise-to-signal ratio of shares, float64."""
        return torch.exp(-0.5 * self.log_snr(share))

    def time(self, share: Tensor) -> Tensor:
        """Process time of shares, float64."""
        return self.process.time_of_log_snr(self.log_snr(share))

    def describe(self) -> str:
        """For people: the axis and its ends."""
        kind = {
            "time": "time",
            "training": "training probability",
            "log_snr": "log-SNR",
            "vp_time": "VP-SDE time (beta 0.1 to 20) of the same sigma",
        }[self.name]
        return f"uniform in {kind} between t={self.t_min:g} and t={self.t_max:g} of {self.process.name}"
