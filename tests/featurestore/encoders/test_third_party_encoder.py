"""Another package offers an encoder by an entry point: found, listed and used without a change of ours."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from install_package import install

from featurestore.encoders.loading import ENCODERS, load_encoder, takes_weights
from featurestore.encoders.protocol import EncoderOptions
from featurestore.errors import EncoderError

CODE = """
import numpy as np
from featurestore.encoders.protocol import EncoderExtension, EncoderIdentity


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


RECORD = EncoderExtension("declared", "mean and largest byte", 2, load, takes_weights=False)
"""
POINTS = """[histosge.encoders]
brightness = brightness_encoder:load
declared = brightness_encoder:RECORD
misnamed = brightness_encoder:load_misnamed
broken = brightness_encoder:load_broken
number = brightness_encoder:__doc__
absent = no_such_module:load
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(tmp_path, "brightness-encoder", POINTS, brightness_encoder=CODE)
    monkeypatch.syspath_prepend(tmp_path)
    ENCODERS.refresh()
    yield
    ENCODERS.refresh()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("key", ["brightness", "declared"], ids=["plain callable", "record"])
def test_an_encoder_of_another_package_is_found_and_used(key: str) -> None:
    assert key in ENCODERS.names()
    encoder = load_encoder(key, EncoderOptions())
    patches = np.full((3, 5, 5, 3), 7, np.uint8)
    assert np.array_equal(encoder.encode(patches), np.full((3, 2), 7, np.float32))


@pytest.mark.usefixtures("package")
def test_a_record_tells_its_width_and_a_plain_callable_where_it_is_from() -> None:
    declared, plain = ENCODERS.get("declared"), ENCODERS.get("brightness")
    assert (declared.dim, declared.help) == (2, "mean and largest byte")
    assert (plain.dim, plain.help) == (None, "an encoder of brightness_encoder")
    weighted = {key for key in ("declared", "brightness", "uni", "colour", "timm:x") if takes_weights(key)}
    assert weighted == {"brightness", "uni", "timm:x"}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("misnamed", "'another'"),
        ("broken", "a bug of theirs"),
        ("absent", "no_such_module"),
        ("number", "it is a NoneType, not a EncoderExtension"),
    ],
)
def test_one_that_does_not_work_is_refused_and_named(key: str, named: str) -> None:
    with pytest.raises(EncoderError, match=named) as refused:
        load_encoder(key)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("package")
def test_a_slip_of_the_pen_suggests_it_too() -> None:
    with pytest.raises(EncoderError, match="did you mean brightness"):
        load_encoder("brightnes")


def test_all_keys_are_in_one_registry() -> None:
    names = ENCODERS.names()
    assert names[:2] == ("colour", "morphology")
    assert {"uni", "virchow2", "virchow2@cls"} < set(names)
    for key in ("morphology", "colour"):
        assert ENCODERS.get(key).dim == load_encoder(key, EncoderOptions(device="cpu")).identity.dim
