"""Solvers: each one a file, all behind ``base.Solver``; ``diffusers`` adapts the library of that name."""

from gearshift.diffusion.solvers.base import Call, Solver, State
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.diffusion.solvers.ddpm import DDPM, DDPMConfig
from gearshift.diffusion.solvers.diffusers import DiffusersSolver
from gearshift.diffusion.solvers.dpm_singlestep import DPMSinglestep, DPMSinglestepConfig
from gearshift.diffusion.solvers.dpmpp_2m import DPMpp2M, DPMpp2MConfig
from gearshift.diffusion.solvers.edm_heun import EDMHeun, EDMHeunConfig
from gearshift.diffusion.solvers.euler_maruyama import EulerMaruyama, EulerMaruyamaConfig
from gearshift.diffusion.solvers.scheduler_build import DiffusersConfig

__all__ = [
    "DDIM",
    "DDPM",
    "Call",
    "DDIMConfig",
    "DDPMConfig",
    "DPMSinglestep",
    "DPMSinglestepConfig",
    "DPMpp2M",
    "DPMpp2MConfig",
    "DiffusersConfig",
    "DiffusersSolver",
    "EDMHeun",
    "EDMHeunConfig",
    "EulerMaruyama",
    "EulerMaruyamaConfig",
    "Solver",
    "State",
]
