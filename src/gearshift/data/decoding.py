"""What a network samples as images that can be looked at: rounded to uint8, or decoded first where they are latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gearshift.data.autoencoder import Autoencoder, decode
from gearshift.data.pixels import to_u8


@dataclass(frozen=True)
class ToPixels:
    """Samples fp32 [N, c, h, w] to uint8 images [N, C, H, W] on their device.

    Attributes:
        decoder: of the latents that the network samples; None where it samples pixels.
    """

    decoder: Autoencoder | None = None

    @property
    def samples_pixels(self) -> bool:
        """Whether samples are images themselves, within [-1, 1]."""
        return self.decoder is None

    def __call__(self, samples: Tensor) -> Tensor:
        return to_u8(samples) if self.decoder is None else decode(samples, self.decoder)

    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """(C, H, W) of the images of a network with so many channels at this size."""
        if self.decoder is None:
            return channels, size, size
        return self.decoder.channels, size * self.decoder.factor, size * self.decoder.factor

    def macs(self, size: int) -> int:
        """Multiply-accumulates per image of decoding, which are no part of the network's; 0 for pixels."""
        return 0 if self.decoder is None else self.decoder.decode_macs(size)

    def describe(self) -> str | None:
        """For protocols; None for pixels."""
        return None if self.decoder is None else self.decoder.describe()
