"""Records agree with their published networks, and a record that does not is found."""

from dataclasses import replace

import pytest

from featurestore.encoders.records import EncoderRecord, Positions, records
from featurestore.encoders.verification.check import MIN_COSINE, check_records, compare
from featurestore.encoders.verification.oracles import ORACLES, StandIn, make_stand_in

RECORDS = records()


def test_every_record_has_the_published_figures_with_their_source() -> None:
    for record in RECORDS.values():
        assert record.config is not None
        assert record.config.source
        assert record.oracle in {"", *ORACLES}
    assert len({record.name for record in RECORDS.values() if record.oracle}) >= 20


@pytest.mark.parametrize(
    "key", ["lunit-s16", "phikon", "hibou-b", "ctranspath", "plip", "quiltnet-b32", "biomedclip", "keep"]
)
def test_a_record_agrees_with_another_implementation_of_its_network(key: str) -> None:
    (row,) = check_records([RECORDS[key]])
    assert row.misfit == ""
    assert row.cosine is not None
    assert row.cosine >= MIN_COSINE
    assert row.agrees


def test_what_has_no_other_implementation_is_said_to_be_facts_only() -> None:
    (row,) = check_records([RECORDS["conch"]])
    assert (row.oracle, row.cosine, row.tensors) == ("facts only", None, None)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StandIn]:
    return {
        key: make_stand_in(RECORDS[key], tmp_path_factory.mktemp(key))
        for key in ("lunit-s16", "hibou-b", "kaiko-l14")
    }


def _prepared(key: str, **changes: object) -> EncoderRecord:
    record = RECORDS[key]
    return replace(record, preprocessing=replace(record.preprocessing, **changes))


@pytest.mark.parametrize(
    "wrong",
    [
        _prepared("lunit-s16", interpolation="bilinear"),
        _prepared("lunit-s16", resize_px=224, crop_px=None),
        _prepared("lunit-s16", mean=(0.5, 0.5, 0.5)),
        replace(RECORDS["kaiko-l14"], positions=Positions(37, antialias=False)),
    ],
    ids=["interpolation", "resizing", "mean", "positions"],
)
def test_another_preparation_or_resampling_of_positions_is_found(
    stand_ins: dict[str, StandIn], wrong: EncoderRecord
) -> None:
    row = compare(wrong, stand_ins[wrong.key])
    assert row.misfit == ""
    assert row.cosine is not None
    assert row.cosine < 0.99
    assert not row.agrees


def test_another_mlp_is_found_with_both_shapes(stand_ins: dict[str, StandIn]) -> None:
    row = compare(replace(RECORDS["hibou-b"], arguments={"img_size": 224}), stand_ins["hibou-b"])
    assert row.misfit == "blocks.0.mlp.fc1.bias: (3072,) by the record, (4096,) published"
    assert not row.agrees


def test_another_table_of_positions_is_found_with_both_shapes(stand_ins: dict[str, StandIn]) -> None:
    row = compare(replace(RECORDS["kaiko-l14"], positions=None), stand_ins["kaiko-l14"])
    assert row.misfit == "pos_embed: (1, 256, 1024) by the record, (1, 1369, 1024) published"


@pytest.mark.slow
def test_all_records_agree() -> None:
    rows = list(check_records(RECORDS.values()))
    assert [row.key for row in rows] == list(RECORDS)
    assert [row for row in rows if not row.agrees] == []
    compared = {
        row.key.partition("@")[0] for row in rows if row.cosine is not None and row.cosine >= MIN_COSINE
    }
    assert len(compared) >= 20
