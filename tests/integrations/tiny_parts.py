"""Parts of the tiny pipelines: encoders, autoencoder, U-Net, scheduler, and inputs."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor, nn

TEXT_WIDTH = 16
"""Width of every text embedding."""
TEXT_LENGTH = 16
"""Tokens in every text embedding, except where a pipeline fixes another number."""
POOLED_WIDTH = 16
"""Width of the pooled text embedding, where there is one."""
TEXTS = ("a cat", "two dogs", "the sea", "an old map")
"""Short, because every character is a token."""


def liven(module: nn.Module) -> nn.Module:
    """Replaces parameters that are zero throughout by noise, in place.

    Without it a new model has parts without effect: gates, output layers and the convolutions of a ControlNet.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return module


def with_scheduler(pipe: Any, name: str) -> Any:
    """Replaces the scheduler by "ddim", "euler" or "dpmpp", configured alike; returns the pipeline."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    kinds = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp": DPMSolverMultistepScheduler}
    if pipe.scheduler.config.get("prediction_type", "flow") != "epsilon":
        raise ValueError(f"{type(pipe).__name__} does not predict noise")
    pipe.scheduler = kinds[name].from_config(pipe.scheduler.config)
    return pipe


def clip_tokenizer(length: int = TEXT_LENGTH) -> Any:
    """A tokenizer of CLIP whose tokens are single characters."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def texts(count: int) -> list[str]:
    """`count` prompts, all different."""
    return [TEXTS[index % len(TEXTS)] + "!" * (index // len(TEXTS)) for index in range(count)]


def noise(*shape: int, seed: int) -> Tensor:
    """Normal noise that depends on the seed alone."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def embeddings(count: int, *shape: int, seed: int = 100) -> Tensor:
    """`count` embeddings; the one at an index does not depend on how many there are."""
    # Larger than those of a text encoder: models with random weights barely heed their text.
    return 3 * torch.stack([noise(*shape, seed=seed + index) for index in range(count)])


def nothing(count: int, *shape: int) -> Tensor:
    """`count` times the embedding that stands for no prompt."""
    return 3 * noise(*shape, seed=99).expand(count, *shape)


def pictures(count: int, size: int, seed: int = 200) -> Tensor:
    """`count` smooth pictures with values between 0 and 1."""
    coarse = torch.stack([noise(3, 4, 4, seed=seed + index) for index in range(count)])
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").sigmoid()


def photos(count: int, size: int) -> list[Any]:
    """The same pictures as images of PIL."""
    from PIL import Image

    values = (pictures(count, size) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.frombuffer("RGB", (size, size), bytes(value.flatten().tolist())) for value in values]


def vae(levels: int = 2, channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    dim(model.decoder.conv_out)
    return model


def dim(layer: nn.Module) -> None:
    """Makes the pictures of a decoder grey, because pipelines clip them and what is clipped cannot be compared."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.3)


def text_encoder(length: int = TEXT_LENGTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        # Ten times the usual: embeddings of one token each must tell the prompts apart.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config)


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(crop_size=32, size=32)


def sd_unet(in_channels: int = 4) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def ddim_scheduler(**more: Any) -> Any:
    """The noise schedule of Stable Diffusion."""
    from diffusers import DDIMScheduler

    settings: dict[str, Any] = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DDIMScheduler(**settings | more)


def sd_parts(in_channels: int = 4) -> dict[str, Any]:
    return dict(
        unet=sd_unet(in_channels),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=clip_tokenizer(),
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
