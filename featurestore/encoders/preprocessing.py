"""A record's preprocessing, batched in torch on the device: uint8 patches in, normalised patches out.

The reference is what the authors run: PIL resizes bytes and rounds to bytes again, then the rest follows in
floats. So the resampling here ends in whole grey levels too. On a CPU torch resamples bytes as PIL does; on a GPU
it does so in floats, and is rounded.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featurestore.encoders.records import Preprocessing
from featurestore.errors import EncoderError


class Preprocess:
    """Apply `Preprocessing` on a device.

    Parameters
    ----------
    how
        The steps.
    device
        Where.
    """

    def __init__(self, how: Preprocessing, device: torch.device) -> None:
        self._how = how
        # (x / 255 - mean) / std as one multiplication and one addition.
        mean, std = torch.tensor(how.mean), torch.tensor(how.std)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1).to(device)
        self._shift = (-mean / std).view(1, 3, 1, 1).to(device)

    def __call__(self, patches: Tensor) -> Tensor:
        """Prepare a batch.

        Parameters
        ----------
        patches
            uint8 RGB on the device, shape ``(n, side, side, 3)``.

        Returns
        -------
        torch.Tensor
            float32, shape ``(n, 3, input_px, input_px)``, channels first.

        Raises
        ------
        EncoderError
            If the patches are not square.
        """
        if patches.shape[1] != patches.shape[2]:
            raise EncoderError(f"patches must be square, not {patches.shape[2]} x {patches.shape[1]} px")
        pixels = self._resize(patches.permute(0, 3, 1, 2))
        side, wanted = pixels.shape[-1], self._how.input_px
        if side != wanted:
            # As the usual transforms do: an odd margin is rounded half to even.
            edge = round((side - wanted) / 2)
            pixels = pixels[..., edge : edge + wanted, edge : edge + wanted]
        return self._normalise(pixels)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Return ``pixels * scale + shift`` per channel, channels last in memory, as the bytes are."""
        n, channels, height, width = pixels.shape
        last = pixels.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
        # A row of pixels as one dimension, and in place: three numbers per pixel are too few for vector instructions
        # (290 us a patch of 224 px on a CPU, against 65), and a second array of floats leaves the caches.
        rows = last.view(n, height, width * channels)
        torch.addcmul(self._shift.view(-1).repeat(width), rows, self._scale.view(-1).repeat(width), out=rows)
        return last.permute(0, 3, 1, 2)

    def _resize(self, pixels: Tensor) -> Tensor:
        side = self._how.resize_px
        if pixels.shape[-1] == side:
            return pixels
        size, mode = (side, side), self._how.interpolation
        if pixels.device.type == "cpu":
            return interpolate(pixels, size, mode=mode, antialias=True)
        return resize_in_floats(pixels, size, mode)


def resize_in_floats(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resample bytes in floats, rounding after each direction as PIL does: the way on a GPU."""
    across = interpolate(pixels.float(), (pixels.shape[-2], size[1]), mode=mode, antialias=True)
    return _to_levels(interpolate(_to_levels(across), size, mode=mode, antialias=True))


def _to_levels(pixels: Tensor) -> Tensor:
    # Halves upwards, as integer arithmetic does; and what falls short of a half by a float's last bit, too.
    return pixels.add_(0.5 + 1e-4).floor_().clamp_(0, 255)
