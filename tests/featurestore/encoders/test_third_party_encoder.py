"""Another package offers an encoder by an entry point: found, listed and used without a change of ours."""

from pathlib import Path

import numpy as np
import pytest

from featurestore.encoders.loading import load_encoder, third_party
from featurestore.encoders.protocol import EncoderOptions
from featurestore.errors import EncoderError

CODE = """
import numpy as np
from featurestore.encoders.protocol import EncoderIdentity


class Brightness:
    def __init__(self, key):
        self.identity = EncoderIdentity(key, 2, {"algorithm": "mean and largest byte", "version": 1})

    def encode(self, patches):
        flat = patches.reshape(len(patches), -1).astype(np.float32)
        return np.stack([flat.mean(1), flat.max(1, initial=0)], axis=1)


def load(key, options):
    return Brightness(key)


def load_misnamed(key, options):
    return Brightness("another")


def load_broken(key, options):
    raise KeyError("a bug of theirs")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brightness_encoder.py").write_text(CODE)
    info = tmp_path / "brightness_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[histosge.encoders]\n"
        "brightness = brightness_encoder:load\n"
        "misnamed = brightness_encoder:load_misnamed\n"
        "broken = brightness_encoder:load_broken\n"
        "absent = no_such_module:load\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("package")
def test_an_encoder_of_another_package_is_found_and_used() -> None:
    assert "brightness" in third_party()
    encoder = load_encoder("brightness", EncoderOptions())
    patches = np.full((3, 5, 5, 3), 7, np.uint8)
    assert np.array_equal(encoder.encode(patches), np.full((3, 2), 7, np.float32))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("key", "named"), [("misnamed", "'another'"), ("broken", "a bug of theirs"), ("absent", "no_such_module")]
)
def test_one_that_does_not_work_is_refused_and_named(key: str, named: str) -> None:
    with pytest.raises(EncoderError, match=named):
        load_encoder(key)


@pytest.mark.usefixtures("package")
def test_a_slip_of_the_pen_suggests_it_too() -> None:
    with pytest.raises(EncoderError, match="did you mean brightness"):
        load_encoder("brightnes")
