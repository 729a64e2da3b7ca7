"""Take passwords, tokens and signatures out of URLs and of other libraries' messages.

Messages of HTTP clients hold the whole URL that failed, so text that is printed, logged or stored passes `redact`;
errors of this package do so when they are made.
"""

import os
import re

# Everything up to the last "@" before the host's end: a password may hold an "@" itself. Or a "/", which is no URL any
# more, but what a user pastes: then whatever does not begin with a host and port.
_USER = re.compile(r"(?<=://)(?:[^/\s'\"<>?#]*@|(?![^/\s@:]*(?::\d+)?/)[^\s'\"<>?#]*@)")
_URL_QUERY = re.compile(r"\?.*$", re.DOTALL)
# A URL in the middle of a text ends at a space or a quote. The path is not matched: it may hold spaces.
_ANY_QUERY = re.compile(r"\?[\w.%+\-\[\]~]+=[^\s'\"<>]*")
_NAMES_OF_KEYS = (
    r"(?:x-(?:amz|goog)-[\w-]+|aws_?\w*(?:key|token|secret)\w*|googleaccessid|sig(?:nature)?|(?:\w+[_-])?token"
    r"|\w*secret\w*|password|passwd|pwd|api[_-]?key|credentials?|policy|key-pair-id)"
)
# Where only the path of a URL is quoted, such as a server's log line in a message.
_NAMED_SECRET = re.compile(rf"([?&]{_NAMES_OF_KEYS})=[^\s&'\"<>]*", re.IGNORECASE)
_HEADER = re.compile(
    r"(\b(?:authorization|x-amz-security-token)['\"]?\s*[:=]\s*)[^\r\n]*"
    r"|\b(?:Bearer|Basic)\s+[\w+/=.~-]{8,}|AWS4-HMAC-SHA256[^\r\n]*",
    re.IGNORECASE,
)
# Parts of a connection string of Azure.
_CONNECTION = re.compile(r"\b(AccountKey|SharedAccessSignature)=[^;\s'\"]*", re.IGNORECASE)
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
# Shorter values are placeholders ("x", "test"), which would be cut out of ordinary words.
_SHORTEST_SECRET = 8


def strip_credentials(url: str) -> str:
    """Return a URL without user, password or signed query: safe to store and to print."""
    return _URL_QUERY.sub("", _USER.sub("", url)) if "://" in url else url


def redact(text: str) -> str:
    """Return a text without what opens a door: users, passwords, queries and headers, and this process's own keys."""
    if "://" in text:
        text = _ANY_QUERY.sub("", _USER.sub("", text))
    text = _HEADER.sub(lambda match: f"{match[1] or ''}[removed]", _NAMED_SECRET.sub(r"\1=[removed]", text))
    text = _CONNECTION.sub(r"\1=[removed]", text)
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "[removed]")
    return text
