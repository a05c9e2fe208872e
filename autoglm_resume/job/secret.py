"""What of an address may be shown: whoever knows the whole one may post there. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit


def mask(url: str) -> str:
    """`https://hooks.slack.com/…`; of an address that is to come from a variable, the variable."""
    if url.startswith("$"):
        return url
    try:
        parts = urlsplit(url)
        host = parts.hostname or "…"
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "…"
    return f"{parts.scheme or '…'}://{host}{port}/…"
