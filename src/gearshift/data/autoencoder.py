"""The autoencoder of latent diffusion: images to a Gaussian over latents or to latents, and latents back to images.

Weights are those of `diffusers`' AutoencoderKL, which encodes to a Gaussian, or VQModel, which encodes to the latent
itself: diffusion models are trained on what the encoder says before it is quantised (arXiv 2112.10752, VQ-regularised
first stages), and decoding begins with the nearest entries of the codebook.

Weights are looked for in a folder that was named, in the folder that $GEARSHIFT_AUTOENCODER names, or in the cache of
the Hugging Face hub, and never fetched: what is missing is said with the line that fetches it. The fine-tuned decoders
of Stable Diffusion share one encoder, so encoder and decoder have fingerprints of their own: latents may be decoded by
either, and which one is part of a FID.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.data.pixels import to_pm1, to_u8
from gearshift.runtime.errors import RunError, UsageError

VARIABLE = "GEARSHIFT_AUTOENCODER"
CHOICES = {"sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema", "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}
DEFAULT = "sd-vae-ft-ema"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# Latents decoded at a time. Fixed, so that the bits of an image depend on its place in a chunk of sampling and on
# nothing else; 8 images of 512 px take about 5 GB.
DECODE_CHUNK = 8


def locate_autoencoder(named: str | None = None) -> tuple[str, Path]:
    """What to call it and the folder with its two files. `named` is one of `CHOICES` (looked up in the hub's cache), a
    folder, or None for $GEARSHIFT_AUTOENCODER and then the default choice.

    Raises UsageError saying what is missing and how to fetch it.
    """
    variable = os.environ.get(VARIABLE)
    said = f"autoencoder={named}"
    if named is None and variable:
        named, said = variable, f"{VARIABLE}={variable}"
    elif named is None:
        named, said = DEFAULT, f"autoencoder=null (no {VARIABLE}, so {DEFAULT})"
    choice = next((name for name, hub in CHOICES.items() if named in (name, hub)), None)
    if choice is not None:
        found = _cached(CHOICES[choice])
        if found is None:
            raise UsageError(
                f"{said} is not in the cache of the hub; fetch it with `{_fetch(choice)}`, or name a folder with "
                f"{CONFIG} and {WEIGHTS} (autoencoder=FOLDER or {VARIABLE}=FOLDER)"
            )
        return choice, found
    folder = Path(named).expanduser()
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        state = f"has no {' and no '.join(missing)}" if folder.is_dir() else "is not a folder"
        raise UsageError(
            f"{said} {state}; name a folder with {CONFIG} and {WEIGHTS}, or one of {', '.join(CHOICES)} "
            f"(fetched with `{_fetch(DEFAULT)}`)"
        )
    return str(folder.resolve()), folder


def _fetch(choice: str) -> str:
    return f"hf download {CHOICES[choice]} {CONFIG} {WEIGHTS}"


def _cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    places = [try_to_load_from_cache(repository, name) for name in (CONFIG, WEIGHTS)]
    # A file known to be absent is a marker object and one never asked for is None.
    return Path(places[0]).parent if all(isinstance(place, str) for place in places) else None  # type: ignore[arg-type]


class Autoencoder:
    """AutoencoderKL or VQModel with its scale: latents are scaled by `scale` for the diffusion model, and divided by it
    to decode.

    Attributes:
        name: a choice or a folder.
        channels: of images (taken and given back).
        latent_channels: of latents.
        factor: image pixels per latent pixel, along one side.
        scale: 0.18215 for the autoencoders of Stable Diffusion, 1 for VQModel.
        gaussian: encodes to a Gaussian; else to a latent, and there is nothing to draw.
        encoder, decoder: 16 hex digits over the weights of either half and how it is built.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        scale: float | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`network` is an AutoencoderKL or VQModel in float32; `scale` replaces its own; it computes in `dtype`.

        The `scaling_factor` in a VQModel's configuration is not looked at: latent diffusion does not scale these, and
        files say 0.18215 where nobody set it.

        Raises UsageError for an autoencoder whose latents are not mean times scale, or that decodes indices.
        """
        config: Any = network.config
        self.gaussian = type(network).__name__ != "VQModel"
        if not self.gaussian and config.lookup_from_codebook:
            raise UsageError(f"autoencoder {name} decodes indices (lookup_from_codebook), not latents; use another")
        if self.gaussian and (config.shift_factor is not None or config.latents_mean is not None):
            raise UsageError(
                f"autoencoder {name} shifts its latents and not only scales them; use {' or '.join(CHOICES)}"
            )
        self.name = name
        own = config.scaling_factor if self.gaussian else 1.0
        self.scale = float(own if scale is None else scale)
        self.channels = int(config.in_channels)
        self.latent_channels = int(config.get("vq_embed_dim") or config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = _fingerprint(network, ("encoder.", "quant_conv."))
        self.decoder = _fingerprint(network, ("decoder.", "post_quant_conv.", "quantize."))
        self._dtype = dtype
        # In full precision whatever the rest computes in: the nearest entry should not depend on it.
        codebook = None if self.gaussian else network.get_parameter("quantize.embedding.weight").detach()
        self._codebook = None if codebook is None else codebook.to(device, torch.float32, copy=True)
        # torch's own method: that of diffusers warns of a casting that leaves nothing out here.
        self._network: Any = nn.Module.to(network, device=device, dtype=dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, named: str | None = None, **settings: Any) -> Autoencoder:
        """The autoencoder `named` as in `locate_autoencoder`; `settings` as of the class.

        Raises UsageError when it cannot be found and RunError when its files do not make one.
        """
        name, folder = locate_autoencoder(named)
        return cls(_read(folder), name, **settings)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self._network.parameters()).device
        return found

    def latent_size(self, image_size: int) -> int:
        """Side of the latents of images of this side. Raises UsageError where it is not whole."""
        if image_size % self.factor:
            raise UsageError(
                f"images of {image_size} pixels do not divide into latents of {self.factor} pixels each; "
                f"choose a size that is a multiple of {self.factor}"
            )
        return image_size // self.factor

    @property
    def stored_channels(self) -> int:
        """Channels of `encode`: 2c where it is a Gaussian, else c."""
        return (2 if self.gaussian else 1) * self.latent_channels

    def encode(self, images_u8: Tensor) -> Tensor:
        """uint8 [N, C or 1, H, W] -> float32 [N, stored_channels, h, w], not scaled: mean, then log-variance within
        [-30, 20]; or the latent, before it is quantised.

        Grey images are given to all channels.
        """
        images = to_pm1(images_u8.to(self.device)).expand(-1, self.channels, -1, -1)
        with torch.no_grad():
            found = self._network.encode(images.to(self._dtype))
        if not self.gaussian:
            return torch.as_tensor(found.latents).float()
        return torch.cat([found.latent_dist.mean, found.latent_dist.logvar], dim=1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [N, c, h, w] -> images float32 [N, C, H, W], about [-1, 1] and not clipped to it."""
        plain = latents.to(self.device) / self.scale
        with torch.no_grad():
            if self._codebook is None:
                found = self._network.decode(plain.to(self._dtype))
            else:
                codes = torch.stack([_nearest(latent, self._codebook) for latent in plain.float()])
                found = self._network.decode(codes.to(self._dtype), force_not_quantize=True)
        images: Tensor = found.sample
        return images.float()

    def decode_macs(self, latent_size: int) -> int:
        """Multiply-accumulates of decoding one latent: convolutions, linear layers, attention products, and products
        with the entries of a codebook.

        They are the autoencoder's, are spent once per image under any policy, and are listed apart from the network's.
        """
        from torch.utils.flop_counter import FlopCounterMode

        options = {} if self.gaussian else {"force_not_quantize": True}
        with torch.device("meta"), torch.no_grad():
            twin: Any = type(self._network).from_config(self._network.config)
            with FlopCounterMode(display=False) as counter:
                twin.decode(torch.empty(1, self.latent_channels, latent_size, latent_size), **options)
        entries = 0 if self._codebook is None else self._codebook.numel()
        return int(counter.get_total_flops()) // 2 + entries * latent_size**2

    def describe(self) -> str:
        """For protocols."""
        return f"{Path(self.name).name}[decoder {self.decoder[:8]}], latents / {self.scale:g}"


def decode(latents: Tensor, autoencoder: Autoencoder, chunk: int = DECODE_CHUNK) -> Tensor:
    """Scaled latents [N, c, h, w] -> uint8 images [N, C, H, W] on the device of the latents, `chunk` at a time."""
    parts = [to_u8(autoencoder.decode(part)).to(latents.device) for part in latents.split(chunk)]
    return torch.cat(parts)


def _nearest(latent: Tensor, codebook: Tensor) -> Tensor:
    """A latent [c, h, w] with every place replaced by the nearest entry of the codebook [K, c]. One latent at a time:
    the distances of 64 x 64 places to 8192 entries take 128 MB, and no other latent changes the bits."""
    places = latent.flatten(1).T
    return codebook[torch.cdist(places, codebook).argmin(1)].T.reshape(latent.shape)


def _read(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL, VQModel
    from diffusers.utils import logging

    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / CONFIG} is not readable ({error}); fetch it again") from error
    kinds: dict[Any, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    if kind not in kinds:
        raise UsageError(
            f"{folder / CONFIG} describes {kind}, not an AutoencoderKL or a VQModel; use {' or '.join(CHOICES)}"
        )
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would say of missing weights is refused below, in one line
    try:
        network, found = kinds[kind].from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, diffusers and torch have no common base for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{folder / WEIGHTS} does not fit {CONFIG} or is damaged ({reason}); fetch it again") from error
    finally:
        logging.set_verbosity(before)
    odd = [*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])]
    if odd:
        raise RunError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {len(odd)} weights are missing or foreign, e.g. {odd[0]}; "
            "fetch both again"
        )
    made: nn.Module = network
    return made


def _fingerprint(network: nn.Module, prefixes: tuple[str, ...]) -> str:
    config: Any = network.config
    # Whatever changes the function besides the weights; not what it was saved by or recommended for.
    ignored = ("sample_size", "scaling_factor", "force_upcast", "latents_mean", "latents_std")
    built = {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
    digest = hashlib.sha256(json.dumps(built, sort_keys=True, default=str).encode())
    for name, value in sorted(network.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name}|{tuple(value.shape)}|".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
