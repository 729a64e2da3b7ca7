import os
from pathlib import Path

import pytest

from featurestore.earlier_results import (
    SHOWN_DIFFERENCES,
    content_fingerprint,
    has_same_content,
    is_same_result,
    staged_result,
)
from featurestore.errors import EarlierResultError


def test_equal_records_are_the_same_whatever_their_order_and_tuples() -> None:
    wanted = {"genes": ("A", "B"), "sections": {"S1": {"donor": "D"}, "S2": {}}}
    assert is_same_result(
        "r", {"sections": {"S2": {}, "S1": {"donor": "D"}}, "genes": ["A", "B"]}, wanted, overwrite=False
    )
    assert not is_same_result("r", None, wanted, overwrite=True)


@pytest.mark.parametrize(
    ("earlier", "shown"),
    [
        ({"a": 1, "b": 2}, "a 1 (now 3)"),
        ({"a": 3}, "no b (now 2)"),
        ({"a": 3, "b": 2, "c": {"d": "e"}}, "c d e (now none)"),
        ({"a": 3, "b": {"x": 1}}, "no b (now 2), b x 1 (now none)"),
        (None, "does not record what it was made with"),
    ],
)
def test_what_differs_is_shown_with_both_values(earlier: dict[str, object] | None, shown: str) -> None:
    with pytest.raises(EarlierResultError) as refused:
        is_same_result("r", earlier, {"a": 3, "b": 2}, overwrite=False)
    assert shown in str(refused.value)


def test_many_and_long_differences_stay_one_short_line() -> None:
    names = [f"gene {i}" for i in range(5000)]
    earlier = {str(i): [*names, i] for i in range(SHOWN_DIFFERENCES + 2)} | {"text": "two\nlines"}
    with pytest.raises(EarlierResultError) as refused:
        is_same_result("r", earlier, {str(i): names for i in range(SHOWN_DIFFERENCES + 2)}, overwrite=False)
    message = str(refused.value)
    assert "and 3 more" in message
    assert "\n" not in message
    assert len(message) < 900
    # Equal beginnings are told apart.
    old, new = message.split("(now ")[0], message.split("(now ")[1]
    assert old.split("... (")[1][:8] != new.split("... (")[1][:8]


def test_a_folders_fingerprint_is_of_names_and_content_not_of_times(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("1")
    first = content_fingerprint(tmp_path / "a")
    os.utime(tmp_path / "a" / "b" / "x", (0, 0))
    (tmp_path / "a" / ".DS_Store").write_text("mac")
    os.mkfifo(tmp_path / "a" / ".pipe")
    assert content_fingerprint(tmp_path / "a") == first
    (tmp_path / "a" / "b" / "x").write_text("2")
    assert content_fingerprint(tmp_path / "a") != first
    (tmp_path / "a" / "b" / "x").write_text("1")
    (tmp_path / "a" / "b" / "x").rename(tmp_path / "a" / "b" / "y")
    assert content_fingerprint(tmp_path / "a") != first


def test_content_is_compared_byte_by_byte_below_folders_but_for_identifiers_of_ome_tiff(
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").write_text("1")
    assert has_same_content(one, other)
    (other / "deep" / "x").write_text("2")
    assert not has_same_content(one, other)
    (other / "deep" / "x").write_text("1")
    (other / "more").write_text("1")
    assert not has_same_content(one, other)
    assert not has_same_content(one, other / "more")
    for name, same in (("a.ome.tif", True), ("a.txt", False)):
        for folder, digit in ((one, "0"), (other, "1")):
            (folder / name).write_text(f"urn:uuid:{digit * 36} and pixels")
        assert has_same_content(one / name, other / name) == same


def test_a_staged_result_takes_its_place_only_if_it_may(tmp_path: Path) -> None:
    target = tmp_path / "t.csv"

    def write(text: str, *, overwrite: bool = False) -> bool:
        with staged_result(target, overwrite=overwrite) as staged:
            assert staged.path.name == "t.csv"
            staged.path.write_text(text)
        return staged.was_there

    assert not write("1")
    assert write("1")
    with pytest.raises(EarlierResultError):
        write("2")
    assert target.read_text() == "1"
    assert not write("2", overwrite=True)
    assert target.read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
