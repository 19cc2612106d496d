"""gearshift: diffusion models that do not spend the same compute at every step."""

__version__ = "0.1.0"
