"""No password, token or signature gets into a text that is printed, logged or stored."""

import pytest

from featurestore.credentials import redact, strip_credentials
from featurestore.errors import AccessError, SlideError, StoreError, first_line

KEY = "s3cr3t+/=42"


@pytest.mark.parametrize(
    "text",
    [
        f"403, message='Forbidden', url='https://host/a.tif?sig={KEY}&x=1'",
        f"Cannot connect to host https://user:{KEY}@host/a.tif",
        f"Cannot connect to host https://user:p@{KEY.replace('/', '')}@host/a.tif",
        f"URL('https://host/a b/c.tif?X-Amz-Signature={KEY}')",
        f'"GET /a.tif?X-Amz-Credential=x&X-Amz-Signature={KEY} HTTP/1.1" 403',
        f"GET /a.tif?token={KEY}",
        f"GET /a.tif?x=1&sig={KEY}",
        f"headers {{'Authorization': 'AWS4-HMAC-SHA256 Credential=x, Signature={KEY}'}}",
        f"Authorization: Bearer {KEY}",
    ],
)
def test_a_message_loses_what_opens_a_door(text: str) -> None:
    for safe in (redact(text), str(StoreError(text)), str(AccessError(text)), repr(SlideError(text))):
        assert "s3cr3t" not in safe
        assert "host" in safe or "a.tif" in safe or "[removed]" in safe
    assert "s3cr3t" not in first_line(RuntimeError(text))


def test_the_keys_of_this_process_are_never_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "long-enough-to-be-real")
    assert redact("the key long-enough-to-be-real is wrong") == "the key [removed] is wrong"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    assert redact("the key is wrong") == "the key is wrong"


@pytest.mark.parametrize(
    "text",
    [
        "is it a.tif? no",
        "s3://bucket/a b.tif cannot be read: what?",
        "mail@host.org",
        "/data/a?b=c.tif",
        "3 = 3",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_url_without_credentials_is_the_place() -> None:
    assert strip_credentials(f"https://u:p@ss@host/a b.tif?sig={KEY}") == "https://host/a b.tif"
    assert strip_credentials("a?b.tif") == "a?b.tif"
