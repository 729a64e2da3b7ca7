from pathlib import Path

import numpy as np

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.samples import read_samples
from histosge.reencoding import encode_anew, store_encoder
from histosge.synthetic import SyntheticSpec, make_section
from histosge.training import Selection, load_sections


def test_encoding_anew_gives_the_stored_vectors_and_changed_pixels_give_others(tmp_path: Path) -> None:
    made = make_section(tmp_path, SyntheticSpec(size_px=(1200, 1200)))
    sheet, store = tmp_path / "samples.csv", str(tmp_path / "store.zarr")
    sheet.write_text(f"slide,expression\n{made.slide.name},{made.expression.name}\n")
    embed(str(sheet), store, EmbedSettings(spec=GridSpec(mpp=0.5, patch_px=112, stride_px=112)))
    (loaded,), (sample,) = load_sections(str(sheet), store, Selection()), read_samples(str(sheet))
    encoder, stored = store_encoder(loaded), loaded.section.patches.embedding
    same = encode_anew(loaded, sample, encoder, bgr=False, fixed_pixel_crop=False)
    np.testing.assert_allclose(same.patches.embedding, stored, rtol=1e-2, atol=1e-3)
    swapped = encode_anew(loaded, sample, encoder, bgr=True, fixed_pixel_crop=False).patches.embedding
    cropped = encode_anew(loaded, sample, encoder, bgr=False, fixed_pixel_crop=True).patches.embedding
    both = encode_anew(loaded, sample, encoder, bgr=True, fixed_pixel_crop=True).patches.embedding
    for first, second in ((swapped, stored), (cropped, stored), (both, swapped), (both, cropped)):
        assert np.abs(first - second).mean() > 0.01
