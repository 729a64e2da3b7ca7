import pytest

from featurestore.wording import counted


@pytest.mark.parametrize(
    ("n", "noun", "text"),
    [
        (0, "slide", "0 slides"),
        (1, "slide", "1 slide"),
        (2, "slide", "2 slides"),
        (1, "tissue patch", "1 tissue patch"),
        (3, "tissue patch", "3 tissue patches"),
        (5, "class", "5 classes"),
        (6, "epoch", "6 epochs"),
    ],
)
def test_a_number_agrees_with_its_noun(n: int, noun: str, text: str) -> None:
    assert counted(n, noun) == text
