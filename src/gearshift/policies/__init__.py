"""What a step computes. A policy never changes; what it learns in a run is the state it hands back."""

from gearshift.policies.base import Policy, RunInfo
from gearshift.policies.bypass_schedule import BypassSchedule
from gearshift.policies.compose import Compose
from gearshift.policies.exit_schedule import ExitSchedule
from gearshift.policies.schedule import FixedDepth, Full, SkipEvery
from gearshift.policies.uncertainty import UncertaintyExit

__all__ = [
    "BypassSchedule",
    "Compose",
    "ExitSchedule",
    "FixedDepth",
    "Full",
    "Policy",
    "RunInfo",
    "SkipEvery",
    "UncertaintyExit",
]
