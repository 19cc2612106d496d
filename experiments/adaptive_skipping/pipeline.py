"""Stable Diffusion, SDXL or any other pipeline of diffusers, from a folder or the hub, under a policy.

python experiments/adaptive_skipping/pipeline.py stabilityai/stable-diffusion-xl-base-1.0 "a lighthouse at dawn"
"""

import sys

from diffusers import DiffusionPipeline

from gearshift.integrations.diffusers import attach
from gearshift.policies import AdaptiveSkip


def main(pipeline: str, prompt: str, *overrides: str) -> None:
    more = {name: int(value) for name, _, value in (override.partition("=") for override in overrides)}
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    with attach(pipe, AdaptiveSkip(threshold=0.01)) as handle:
        pipe(prompt, **more).images[0].save("image.png")
    print(handle.ledger.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
