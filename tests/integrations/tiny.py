"""Tiny pipelines of diffusers with random weights, built offline, for the tests of what attaches to a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from .tiny_parts import (  # noqa: F401  # tests name some of them, too
    POOLED_WIDTH,
    TEXT_LENGTH,
    TEXT_WIDTH,
    TEXTS,
    clip_tokenizer,
    ddim_scheduler,
    dim,
    embeddings,
    image_encoder,
    image_processor,
    liven,
    noise,
    nothing,
    photos,
    pictures,
    sd_parts,
    sd_unet,
    text_encoder,
    texts,
    vae,
    with_scheduler,
)

# Builders mix parts that no published pipeline mixes, and diffusers says so at length.
logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Case:
    """One pipeline: how to build it, and how to call it."""

    name: str
    make: Callable[[], Any]
    """Makes the pipeline, with the weights as initialised. Use `build`."""
    inputs: Callable[[Any, int, int, float], dict[str, Any]]
    """The arguments of a call, from the pipeline, the number of prompts, the size in pixels and the guidance scale."""
    denoisers: tuple[str, ...] = ("unet",)
    """Names of the components that are called once, or twice, a step."""
    sequential: bool = False
    """Whether guidance calls the denoiser twice a step; otherwise once, with a doubled batch."""
    helpers: tuple[str, ...] = ()
    """Names of components that are called every step besides."""
    sizes: tuple[int, int] = (16, 24)
    """Two sizes in pixels that work; the first is the default."""
    output: str = "latent"
    """The `output_type`; latents where the pipeline can return them."""
    guided: bool = True
    """Whether the guidance scale changes how often, or with how large a batch, the denoiser is called."""
    callback: bool = True
    """Whether the pipeline accepts `callback_on_step_end`."""
    epsilon: bool = True
    """Whether `with_scheduler` applies."""
    global_noise: bool = False
    """Whether the pipeline draws noise that its generator does not govern."""

    def build(self) -> Any:
        """A pipeline in evaluation mode, the same weights every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Importing or constructing a deprecated pipeline warns; the tests turn warnings into errors.
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            pipe = self.make()
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    liven(component).eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(
        self,
        pipe: Any,
        steps: int = 6,
        seed: int = 0,
        prompts: int = 1,
        size: int | None = None,
        guidance: float | None = None,
        **more: Any,
    ) -> Tensor:
        """Calls the pipeline and returns what it generates; `more` goes to the call and overrides what is set here."""
        arguments = self.inputs(pipe, prompts, size or self.sizes[0], 5.0 if guidance is None else guidance)
        arguments |= {
            "num_inference_steps": steps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": self.output,
        }
        arguments |= more
        with torch.random.fork_rng(devices=[], enabled=self.global_noise):
            if self.global_noise:
                torch.manual_seed(seed)
            result = pipe(**arguments)[0]
        return result if isinstance(result, Tensor) else torch.as_tensor(result)


def text_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return dict(prompt=texts(prompts), height=size, width=size, guidance_scale=guidance)


def embedded_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return dict(
        prompt_embeds=embeddings(prompts, TEXT_LENGTH, TEXT_WIDTH),
        negative_prompt_embeds=nothing(prompts, TEXT_LENGTH, TEXT_WIDTH) if guidance > 1 else None,
        height=size,
        width=size,
        guidance_scale=guidance,
    )


def pooled_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return embedded_inputs(pipe, prompts, size, guidance) | dict(
        pooled_prompt_embeds=embeddings(prompts, POOLED_WIDTH, seed=300),
        negative_pooled_prompt_embeds=nothing(prompts, POOLED_WIDTH) if guidance > 1 else None,
    )


def make_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts())


def make_sd_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**sd_parts())


def img2img_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    # The size is that of the picture. With this strength 6 steps become 4.
    return dict(prompt=texts(prompts), image=pictures(prompts, size), strength=0.8, guidance_scale=guidance)


def make_sd_inpaint() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd_parts(in_channels=9))


def make_sd_inpaint4() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd_parts())


def inpaint_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    mask = torch.zeros(prompts, 1, size, size)
    mask[..., : size // 2] = 1
    return text_inputs(pipe, prompts, size, guidance) | dict(image=pictures(prompts, size), mask_image=mask)


def controlnet(unet: Any) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))


def make_sd_controlnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    parts = sd_parts()
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))


def make_sd_multicontrolnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    parts = sd_parts()
    return StableDiffusionControlNetPipeline(**parts, controlnet=[controlnet(parts["unet"]) for _ in range(2)])


def controlnet_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return text_inputs(pipe, prompts, size, guidance) | dict(image=pictures(prompts, size))


def multicontrolnet_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    controls = [pictures(prompts, size), pictures(prompts, size, seed=400)]
    return text_inputs(pipe, prompts, size, guidance) | dict(image=controls)


def make_sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # The six numbers that describe sizes and crops, 8 channels each, and the pooled text embedding.
        projection_class_embeddings_input_dim=6 * 8 + POOLED_WIDTH,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=scheduler,
        add_watermarker=False,
    )


def make_dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim_scheduler(beta_schedule="linear"))


def dit_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    # The pipeline takes no size but reads that of the model, which accepts others.
    pipe.transformer.register_to_config(sample_size=size // 2)
    return dict(class_labels=[(1 + 207 * index) % 1000 for index in range(prompts)], guidance_scale=guidance)


def make_pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    return PixArtAlphaPipeline(
        transformer=transformer, vae=vae(), text_encoder=None, tokenizer=None, scheduler=scheduler
    )


def pixart_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    mask = torch.ones(prompts, TEXT_LENGTH)
    return embedded_inputs(pipe, prompts, size, guidance) | dict(
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_attention_mask=mask,
        # Otherwise only the published sizes are accepted.
        use_resolution_binning=False,
    )


def make_ldm() -> Any:
    from diffusers import LDMTextToImagePipeline

    return LDMTextToImagePipeline(
        # The pipeline divides sizes by 8, whatever the autoencoder does.
        vqvae=vae(levels=4),
        # The length that the pipeline fixes for its prompts.
        bert=text_encoder(length=77),
        tokenizer=clip_tokenizer(),
        unet=sd_unet(),
        scheduler=ddim_scheduler(),
    )


def make_ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    # A model that has learnt nothing removes no noise: with the usual schedule almost every pixel would be clipped.
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler(beta_end=0.001, clip_sample=False))


def ddim_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    # As in `dit_inputs`.
    pipe.unet.register_to_config(sample_size=size)
    return dict(batch_size=prompts)


def make_text_to_video() -> Any:
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return TextToVideoSDPipeline(unet=unet, vae=vae(), text_encoder=None, tokenizer=None, scheduler=ddim_scheduler())


def video_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return embedded_inputs(pipe, prompts, size, guidance) | dict(num_frames=3)


def make_animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=2,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return AnimateDiffPipeline(
        unet=sd_unet(),
        motion_adapter=adapter,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=ddim_scheduler(beta_schedule="linear"),
    )


def make_image_to_video() -> Any:
    from diffusers import I2VGenXLPipeline
    from diffusers.models.unets import I2VGenXLUNet

    unet = I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return I2VGenXLPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        image_encoder=image_encoder(),
        feature_extractor=image_processor(),
        scheduler=ddim_scheduler(),
    )


def image_to_video_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return video_inputs(pipe, prompts, size, guidance) | dict(image=photos(prompts, size))


def make_svd() -> Any:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    # Both models fix 32 groups in their norms: 32 channels are the least.
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        # Frame rate, motion and the strength of the added noise.
        projection_class_embeddings_input_dim=3 * 8,
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    autoencoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return StableVideoDiffusionPipeline(
        unet=unet,
        vae=autoencoder,
        image_encoder=image_encoder(),
        feature_extractor=image_processor(),
        scheduler=scheduler,
    )


def svd_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    # A tensor goes to the image encoder as it is, which takes 32 pixels; for the autoencoder it is resized.
    return dict(image=pictures(prompts, 32), height=size, width=size, max_guidance_scale=guidance)


def wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        # Split into three for time, height and width: 4 channels each.
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )


def make_wan(boundary: float | None = None) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        transformer=wan_transformer(),
        transformer_2=None if boundary is None else wan_transformer(),
        boundary_ratio=boundary,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=None,
        tokenizer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def make_wan2() -> Any:
    # Half of 6 steps lie above.
    return make_wan(boundary=0.8)


def wan_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return embedded_inputs(pipe, prompts, size, guidance) | dict(num_frames=5)


def make_sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def make_flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        # The latents arrive packed, 2 by 2.
        in_channels=4 * 4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    # The scale is an input of the model, which is called once a step.
    return pooled_inputs(pipe, prompts, size, guidance) | dict(
        negative_prompt_embeds=None, negative_pooled_prompt_embeds=None
    )


def flux_cfg_inputs(pipe: Any, prompts: int, size: int, guidance: float) -> dict[str, Any]:
    return pooled_inputs(pipe, prompts, size, guidance) | dict(true_cfg_scale=guidance, guidance_scale=3.5)


TRANSFORMER = ("transformer",)
CASES = {
    case.name: case
    for case in (
        Case("sd", make_sd, text_inputs),
        Case("sd_img2img", make_sd_img2img, img2img_inputs),
        Case("sd_inpaint", make_sd_inpaint, inpaint_inputs),
        Case("sd_inpaint4", make_sd_inpaint4, inpaint_inputs),
        Case("sd_controlnet", make_sd_controlnet, controlnet_inputs, helpers=("controlnet",)),
        Case("sd_multicontrolnet", make_sd_multicontrolnet, multicontrolnet_inputs, helpers=("controlnet",)),
        Case("sdxl", make_sdxl, pooled_inputs),
        Case("ldm", make_ldm, text_inputs, sizes=(64, 96), output="pt", callback=False),
        Case("ddim", make_ddim, ddim_inputs, output="np", guided=False, callback=False, epsilon=False),
        Case("dit", make_dit, dit_inputs, TRANSFORMER, output="pt", callback=False),
        Case("pixart", make_pixart, pixart_inputs, TRANSFORMER, callback=False),
        Case("text_to_video", make_text_to_video, video_inputs, callback=False),
        Case("animatediff", make_animatediff, video_inputs),
        Case("image_to_video", make_image_to_video, image_to_video_inputs, callback=False, global_noise=True),
        Case("svd", make_svd, svd_inputs, epsilon=False),
        Case("wan", make_wan, wan_inputs, TRANSFORMER, sequential=True, sizes=(64, 32), epsilon=False),
        Case("wan2", make_wan2, wan_inputs, (*TRANSFORMER, "transformer_2"), True, sizes=(64, 32), epsilon=False),
        Case("sd3", make_sd3, pooled_inputs, TRANSFORMER, epsilon=False),
        Case("flux", make_flux, flux_inputs, TRANSFORMER, guided=False, epsilon=False),
        Case("flux_cfg", make_flux, flux_cfg_inputs, TRANSFORMER, sequential=True, epsilon=False),
    )
}
"""The pipelines by name."""
