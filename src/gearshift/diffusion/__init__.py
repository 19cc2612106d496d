"""Diffusion: noise processes, the denoiser that ties a backbone to one, and solvers."""
