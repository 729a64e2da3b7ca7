from featurestore.errors import first_line


def test_another_librarys_message_is_cut_to_its_first_line() -> None:
    assert first_line(ValueError("\n  no codec 'zstd'\ntried: a, b\n")) == "no codec 'zstd'"


def test_an_error_without_a_message_is_named_by_its_class() -> None:
    assert first_line(TimeoutError()) == "TimeoutError"
    assert first_line(OSError("\n")) == "OSError"
