"""`gearshift export`: one safetensors file with the run's configuration in its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gearshift.assembly import build_denoiser, dtype_of
from gearshift.backbones.weights import export_safetensors, load_strict
from gearshift.runtime.run import RunFolder


def run(cfg: DictConfig) -> dict[str, Any]:
    from gearshift.training.checkpoint import load_weights

    dtype = dtype_of(cfg.dtype)
    folder = RunFolder.open(cfg.run)
    state = load_weights(folder, ema=cfg.ema)
    load_strict(build_denoiser(folder.config).network, state, folder.checkpoints)
    out = Path(cfg.out) if cfg.out is not None else folder.path / "model.safetensors"
    stored = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    text = OmegaConf.to_yaml(folder.config)
    export_safetensors(out, stored, text, {"weights": "ema" if cfg.ema else "trained", "dtype": cfg.dtype})
    return {
        "run": str(folder.path),
        "file": str(out),
        "tensors": len(stored),
        "params": sum(v.numel() for v in stored.values()),
    }
