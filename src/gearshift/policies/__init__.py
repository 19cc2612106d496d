"""What a step computes. A policy never changes; what it learns in a run is the state it hands back."""

from gearshift.policies.adaptive_skip import AdaptiveSkip
from gearshift.policies.attention_reuse import AttentionReuse
from gearshift.policies.base import Policy, RunInfo
from gearshift.policies.bypass_schedule import BypassSchedule
from gearshift.policies.compose import Compose
from gearshift.policies.deep_features import DeepFeatureReuse
from gearshift.policies.exit_schedule import ExitSchedule
from gearshift.policies.from_file import FromFile
from gearshift.policies.network_switch import NetworkSwitch
from gearshift.policies.planned import Planned
from gearshift.policies.saturation import SaturationExit
from gearshift.policies.schedule import FixedDepth, Full, SkipEvery
from gearshift.policies.uncertainty import LearnedExit, UncertaintyExit

__all__ = [
    "AdaptiveSkip",
    "AttentionReuse",
    "BypassSchedule",
    "Compose",
    "DeepFeatureReuse",
    "ExitSchedule",
    "FixedDepth",
    "FromFile",
    "Full",
    "LearnedExit",
    "NetworkSwitch",
    "Planned",
    "Policy",
    "RunInfo",
    "SaturationExit",
    "SkipEvery",
    "UncertaintyExit",
]
