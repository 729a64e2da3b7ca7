"""The registry: every record builds what it says, without weights; keys mean one thing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featurestore.encoders.architecture import build, check_against, check_config, pool
from featurestore.encoders.loading import canonical_key, load_encoder
from featurestore.encoders.protocol import EncoderIdentity, EncoderOptions
from featurestore.encoders.records import EncoderRecord, find, records
from featurestore.encoders.vision import identity_facts
from featurestore.errors import EncoderError

BUILT_BY_TIMM = [record for record in records().values() if record.package == "timm"]
ASKED_FOR = [
    "uni",
    "uni2-h",
    "virchow",
    "virchow2",
    "virchow2@cls",
    "gigapath",
    "h-optimus-0",
    "h-optimus-1",
    "h0-mini",
    "h0-mini@cls+mean",
    "phikon",
    "phikon-v2",
    "hibou-b",
    "hibou-l",
    "kaiko-s8",
    "kaiko-s16",
    "kaiko-b8",
    "kaiko-b16",
    "kaiko-l14",
    "midnight-12k",
    "midnight-12k@cls",
    "conch",
    "conch-v1.5",
    "ctranspath",
    "lunit-s8",
    "lunit-s16",
    "gpfm",
    "plip",
    "quiltnet-b32",
    "biomedclip",
    "keep",
]
TOKENS = {32: 49, 16: 196, 14: 256, 8: 784}
"""Patch tokens of 224 px, by the side of a token's patch."""


@pytest.mark.parametrize("key", ASKED_FOR)
def test_the_field_s_encoders_are_known(key: str) -> None:
    record = find(key)
    assert record is not None
    assert record.key == key
    assert record.published is not None
    assert record.licence
    assert record.source


def test_the_encoders_are_listed_without_torch() -> None:
    code = (
        "import sys; from featurestore.encoders.loading import ENCODERS; n = len(ENCODERS.records())\n"
        "print(n > 20, sorted({'torch', 'timm', 'dask', 'zarr', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


@pytest.mark.parametrize("record", BUILT_BY_TIMM, ids=lambda record: record.key)
def test_a_record_builds_what_it_says(record: EncoderRecord) -> None:
    with torch.device("meta"):
        model = build(record)
    check_against(record, model)
    side = record.preprocessing.input_px
    images = torch.empty(3, 3, side, side, device="meta")
    forward, maps = model.forward_features, list[torch.Tensor]()

    def kept(batch: torch.Tensor) -> torch.Tensor:
        maps.append(forward(batch))
        return maps[-1]

    model.forward_features = kept
    assert pool(model, images, record.pooling, record.prefix_tokens).shape == (3, record.dim)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if record.prefix_tokens is not None:
        token_px = model.patch_embed.patch_size[0]
        assert maps[0].shape[1] == record.prefix_tokens + TOKENS[token_px]


def test_pins_are_commits_and_digests() -> None:
    for record in records().values():
        published = record.published
        assert published is not None
        assert published.revision is None or re.fullmatch("[0-9a-f]{40}", published.revision)
        assert published.sha256 is None or re.fullmatch("[0-9a-f]{16}", published.sha256)


def test_a_plain_name_is_its_default_variant() -> None:
    assert find("uni@cls") is find("uni")
    assert canonical_key("virchow2@cls+mean") == "virchow2"
    assert canonical_key("virchow2@cls") == "virchow2@cls"
    assert canonical_key("timm:test_vit") == "timm:test_vit"
    assert find("uni@mean") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("uni2h", "uni2-h"), ("UNI", "uni"), ("virchow3", "virchow2"), ("hoptimus-1", "h-optimus-1")],
)
def test_an_unknown_key_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(EncoderError, match=re.escape(meant)):
        load_encoder(typed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parameters": 21_665_665}, "parameters = 21665665.*21665664"),
        ({"prefix_tokens": 5}, "prefix tokens = 5.* 1"),
        ({"dim": 385}, "dim = 385.*384"),
    ],
)
def test_a_record_that_disagrees_with_its_network_is_refused_with_both_values(
    change: dict[str, int], named: str
) -> None:
    record = find("lunit-s16")
    assert record is not None
    wrong = EncoderRecord(**{**vars(record), **change})
    with torch.device("meta"):
        model = build(record)
    with pytest.raises(EncoderError, match=named):
        check_against(wrong, model)


def test_a_config_that_disagrees_is_refused_with_both_values_unless_it_is_known_to_be_wrong() -> None:
    uni, kaiko = find("uni"), find("kaiko-l14")
    assert uni is not None
    assert kaiko is not None
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    check_config(uni, {"pretrained_cfg": imagenet})
    check_config(kaiko, {"pretrained_cfg": imagenet})
    check_config(uni, {})
    with pytest.raises(EncoderError, match=r"std = \[0.229, 0.224, 0.225\].*\[0.5, 0.5, 0.5\]"):
        check_config(uni, {"pretrained_cfg": {**imagenet, "std": [0.5, 0.5, 0.5]}})
    with pytest.raises(EncoderError, match="mean"):
        check_config(kaiko, {"image_mean": [0.7, 0.5, 0.5]})


def test_the_variants_of_an_encoder_have_fingerprints_of_their_own() -> None:
    options = EncoderOptions(random_weights=True, device="cpu")
    one, other = (load_encoder(key, options).identity for key in ("h0-mini", "h0-mini@cls+mean"))
    assert (one.dim, other.dim) == (768, 1536)
    assert one.fingerprint != other.fingerprint


def test_a_file_of_another_variant_names_the_record_that_it_fits(tmp_path: Path) -> None:
    hibou = find("hibou-b")
    assert hibou is not None
    with torch.device("meta"):
        shapes = build(hibou).state_dict()
    # Zeros of one element each, stretched: a file of the published shapes without their bytes in memory.
    path = tmp_path / "hibou.pth"
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}, path)
    with pytest.raises(EncoderError) as refused:
        load_encoder("phikon", EncoderOptions(weights=str(path), device="cpu"))
    message = str(refused.value)
    assert "\n" not in message
    assert re.search(r"blocks\.0\.ls1\.gamma is absent here and \(768,\) in the file", message), message
    assert "hibou-b" in message.partition("the file fits --encoder ")[2]
    assert "h0-mini" in message.partition("the file fits --encoder ")[2]  # the same shapes, named alike
    assert "phikon" not in message.partition("the file fits --encoder ")[2]


STORED = {
    "uni": "883b873bc48d335b",
    "uni2-h": "cde36d94cbac43a8",
    "virchow": "21100a0a5b6fc53a",
    "virchow@cls": "1403c33aa02c28e6",
    "virchow2": "aa8dc67c5b703f93",
    "virchow2@cls": "fe67c1feb43aed0f",
    "gigapath": "e6c0fa21146a59ed",
    "h-optimus-0": "e119c70e76cfefc6",
    "h-optimus-1": "e119c70e76cfefc6",
    "h0-mini": "476318712d618551",
    "h0-mini@cls+mean": "1957228625c7b6f8",
    "phikon": "0c3bfddf339b60d6",
    "phikon-v2": "4755a25e536dac89",
    "kaiko-s8": "10184cda742169d6",
    "kaiko-s16": "afffe1951cbe22c2",
    "kaiko-b8": "a118aca94088de28",
    "kaiko-b16": "a55a7b21103bea1b",
    "conch": "4f994e61a64cd97f",
    "conch-v1.5": "9ffe7bc624bc149b",
    "gpfm": "ea870c487d254cb5",
}
"""Beginnings of the fingerprints that stores of the first records hold, for weights called "w" in fp32."""


def test_the_fingerprints_in_stores_stay_what_they_are() -> None:
    for key, beginning in STORED.items():
        record = records()[key]
        identity = EncoderIdentity(key, record.dim, identity_facts(record, "w", "fp32"))
        assert identity.fingerprint.startswith(beginning), key
