"""Take file names and paths out of a text, so that it may stand in a store made with ``--private``.

A reason why a slide failed quotes its file, and other libraries quote parts of it. What could be part of a name is taken
out: a reason that says less is better than one that names a patient.
"""

import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

MARK = "<...>"
SHORTEST_WORD = 3
"""Letters of a part of a path that is taken out wherever it stands: shorter ones are in every text."""
_WORDS = re.compile(r"[^\W_]+")
# Of what else looks like a path: another file that belongs to the slide, a copy in the user's own folders.
_PATHS = re.compile(
    r"(?:[A-Za-z][\w+.-]*://|[A-Za-z]:\\|~?/|\.\.?/)[^\s'\"<>:;,()]*|[^\s'\"<>:;,()/]+/[^\s'\"<>:;,()]+"
)
_FILES = re.compile(r"[^\s'\"<>:;,()/]+\.[A-Za-z][A-Za-z0-9]{1,7}(?![\w.])")
_END = re.compile(r"[\s'\"<>:;,()]")


def remove_names(text: str, paths: Sequence[str], keep: Sequence[str] = ()) -> str:
    """Return a text without paths, names of files, and words that stand in some paths.

    Parameters
    ----------
    paths
        Paths or URLs of the files that the text may be about.
    keep
        Words that stay, such as the slide's id.
    """
    for path in sorted(paths, key=len, reverse=True):
        text = _remove_path(text, path)
    text = _FILES.sub(MARK, _PATHS.sub(MARK, text))
    kept = {word.casefold() for name in keep for word in (name, *_WORDS.findall(name))}
    forms = {form for path in paths for form in (path, unquote(path), quote(path))}
    words = {word for form in forms for word in _WORDS.findall(form)}
    for word in sorted(words, key=len, reverse=True):
        if len(word) >= SHORTEST_WORD and word.casefold() not in kept:
            text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", MARK, text, flags=re.IGNORECASE)
    return re.sub(rf"(?:{re.escape(MARK)}[\s/._-]*)+", f"{MARK} ", text).strip()


def _remove_path(text: str, path: str) -> str:
    """Take out a path, also where a message cut its end off: names with spaces end nowhere else."""
    head = path[: max(2, path.find("/", 1) + 1)]
    at = text.find(head) if path else -1
    while at >= 0:
        length = len(head)
        while length < len(path) and text[at + length : at + length + 1] == path[length]:
            length += 1
        end = at + length
        if length < len(path):  # another file beside it, or one that was cut
            rest = _END.search(text, end)
            end = rest.start() if rest else len(text)
        text = f"{text[:at]}{MARK}{text[end:]}"
        at = text.find(head, at + len(MARK))
    return text
