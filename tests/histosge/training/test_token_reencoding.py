"""What stain augmentation encodes again on a grid of tokens: the patch that a position lies in, and of it that position."""

from pathlib import Path

import numpy as np
from make_slides import painted, write_pyramid

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.encoders.tokens import TokenMap, group_tokens
from featurestore.grid import PatchGrid, TokenGridSpec
from featurestore.slides.open_slide import open_slide
from histosge.data.sections import Patches
from histosge.training.reencoding import encode_positions, options_of, read_patches


class Squares:
    """Mean colours of 6 x 6 squares."""

    identity = EncoderIdentity("squares", 3, {"algorithm": "mean colour of squares"})
    token_map = TokenMap(6)

    def encode(self, patches: np.ndarray) -> np.ndarray:
        return patches.mean((1, 2), dtype=np.float32)

    def encode_tokens(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, side = patches.shape[:2]
        side = side // 6 * 6
        squares = patches[:, :side, :side].reshape(n, 6, side // 6, 6, side // 6, 3)
        return self.encode(patches), squares.mean((2, 4), dtype=np.float32)


def test_a_position_is_encoded_with_the_patch_that_it_lies_in(tmp_path: Path) -> None:
    picture = painted(331, 269)
    slide = open_slide(str(write_pyramid(tmp_path / "p.tif", picture, 0.5, levels=1)))
    spec = TokenGridSpec.from_patches(0.5, 48, 2, overlap_px=16)
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec)
    rows, cols = (index.ravel() for index in np.indices(grid.shape))
    patches = Patches.on_grid("p", grid, rows, cols, np.zeros((len(rows), 3), np.float32))
    chosen = np.array([3, 17, 60, len(rows) - 1])
    encoder = group_tokens(Squares(), spec)
    found = encode_positions(encoder, read_patches(slide, grid, patches, chosen), grid, patches, chosen)
    slide.close()
    for vector, (x, y) in zip(found, (patches.xy_um[chosen] / 0.5).round().astype(int), strict=True):
        assert np.abs(vector - picture[y - 8 : y + 8, x - 8 : x + 8].mean((0, 1))).max() < 0.01
    assert options_of(grid).tokens == spec
    assert options_of(grid.encoded).tokens is None
