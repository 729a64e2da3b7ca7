"""A page as one HTML file, which opens by a double click: no server, no other file, nothing from the network.

Browsers load neither modules nor data from files, so the scripts are joined into one, and everything that the page would
request lies in the page by its name: documents as they are, arrays as base64, pictures as data URLs.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from histosge.viewer.assets import SCRIPTS, assets

MAX_BYTES = 50_000_000
"""Of the file: mail and chats refuse more, and browsers take seconds to open it."""
_IMPORT = re.compile(r"^import \{([^}]*)\} from \"\./([^\"]+)\";\n", re.MULTILINE)
_EXPORT = re.compile(
    r"^export ((?:async )?(?:function|class|const|let) ([A-Za-z_][A-Za-z0-9_]*))", re.MULTILINE
)
_MEDIA = {"jpg": "image/jpeg", "png": "image/png"}


@dataclass
class EmbeddedData:
    """What a page requests, by name; a writer of pages as `static_page` has one for folders.

    Parameters
    ----------
    sizes
        Kind of content (``tiles``, ``genes``, ``other``) -> bytes in the file.
    """

    found: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, content: bytes) -> None:
        """Keep a file's bytes."""
        text = base64.b64encode(content).decode()
        media = _MEDIA.get(name.rpartition(".")[2])
        self._keep(name, f"data:{media};base64,{text}" if media else text, len(text))

    def json(self, name: str, value: dict[str, Any]) -> None:
        """Keep a document."""
        self._keep(name, value, len(json.dumps(value)))

    def _keep(self, name: str, value: Any, n_bytes: int) -> None:
        kind = "tiles" if "/tiles/" in name else "genes" if name.endswith(".f16") else "other"
        self.sizes[kind] = self.sizes.get(kind, 0) + n_bytes
        self.found[name] = value

    @property
    def n_bytes(self) -> int:
        """Bytes that they take in the file."""
        return sum(self.sizes.values())


def one_html_file(data: EmbeddedData) -> bytes:
    """Return the page with all of its data."""
    page = assets()["index.html"].content.decode()
    viewer = assets()["static/vendor/openseadragon.min.js"].content.decode()
    licence = assets()["static/vendor/openseadragon.LICENSE.txt"].content.decode()
    script = joined_scripts()
    inline = [_closed(viewer), _closed(script)]
    # Only these two scripts run, and nothing is fetched, whatever the data holds.
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in inline)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src blob: data:"
    style = assets()["static/viewer.css"].content.decode()
    # Markup in a name of the data must not end the element that holds it.
    embedded = json.dumps(data.found, separators=(",", ":")).replace("<", "\\u003c")
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}" />\n    <style>{style}</style>\n'
        f"    <!-- OpenSeadragon: {licence.strip()} -->"
    )
    body = (
        f'<script type="application/json" id="embedded">{embedded}</script>\n'
        f"<script>{inline[0]}</script>\n<script>{inline[1]}</script>\n  </body>"
    )
    page = page.replace('<link rel="stylesheet" href="static/viewer.css" />', "").replace("</body>", "@body@")
    page = re.sub(r'    <script (?:defer|type="module") src="[^"]*"></script>\n', "", page)
    page = page.replace('<meta charset="utf-8" />', f'<meta charset="utf-8" />\n    {head}', 1)
    return page.replace("@body@", body).encode()


def joined_scripts() -> str:
    """Return the page's modules as one script: each is a function whose result is what it exports."""
    parts = []
    for name in SCRIPTS:
        text = assets()[f"static/{name}"].content.decode()
        text = _IMPORT.sub(_as_constants, text)
        exported = [match[2] for match in _EXPORT.finditer(text)]
        text = _EXPORT.sub(r"\1", text)
        parts.append(f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {", ".join(exported)} }};\n}})();')
    return '"use strict";\nconst modules = {};\n' + "\n".join(parts) + "\n"


def _as_constants(found: re.Match[str]) -> str:
    names = ", ".join(name.strip().replace(" as ", ": ") for name in found[1].split(",") if name.strip())
    return f'const {{ {names} }} = modules["{found[2]}"];\n'


def _closed(script: str) -> str:
    # In a string or a pattern this ends the element, too.
    return script.replace("</script", "<\\/script")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
