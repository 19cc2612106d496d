"""Policies on pipelines of `diffusers`: `attach(pipe, policy)`."""

from gearshift.integrations.diffusers.attach import Attached, attach
from gearshift.integrations.diffusers.record import Generation

__all__ = ["Attached", "Generation", "attach"]
