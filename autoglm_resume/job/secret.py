"""What of a job may be shown, journaled, and told: not what lets others in. Pure.

A value is a secret by its name (`WANDB_API_KEY`, `--api-key=…`, `password`), by its place (the path
of a webhook), or by its form (`https://user:password@…`). Whatever is said in a run is cleaned of
the secrets that the run knows, too: an exception may repeat the key that was refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "…"
SHORTEST = 6
"""Characters of a value that is looked for in texts: what is shorter stands there by chance."""

_WORDS = frozenset(
    {
        *("key", "apikey", "accesskey", "secretkey", "privatekey", "token", "secret", "secrets"),
        *("password", "passwd", "pass", "passphrase", "credential", "credentials", "creds"),
        *("auth", "authorization", "bearer", "cookie", "dsn", "webhook", "sas", "pat"),
    }
)
_ENDINGS = ("token", "secret", "password", "passwd", "apikey", "accesskey", "credentials")
"""Of names that are written in one word: `PGPASSWORD`."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ORDINARY = re.compile(r"-?\d{1,5}|[+-]?\d*\.\d+|true|false|yes|no|on|off|none|null|", re.I)
"""Values that are settings and no secrets, whatever the name: `--pad-token-id=0`."""
_LOGIN = re.compile(r"(?P<begin>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.I)
_ADDRESS = re.compile(r"https?://[^\s'\"]+", re.I)
_HEADER = re.compile(r"(?P<begin>\b(?:authorization|x-[\w-]*(?:key|token))\s*:\s*)[^'\"\n]+", re.I)
_NAMED = re.compile(r"(?P<name>[\w.-]+)(?P<is>=|:\s*)(?P<value>[^\s'\"&;,]+)")


def is_secret(name: str, value: str) -> bool:
    """Whether the value of a variable or argument of that name is to be hidden."""
    words = {word.lower() for word in _WORD.findall(name)}
    named = bool(words & _WORDS) or any(word.endswith(_ENDINGS) for word in words)
    return named and not _ORDINARY.fullmatch(value)


def mask(url: str) -> str:
    """`https://hooks.slack.com/…`; of an address that is to come from a variable, the variable."""
    if url.startswith("$"):
        return url
    try:
        parts = urlsplit(url)
        host = parts.hostname or HIDDEN
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return HIDDEN
    return f"{parts.scheme or HIDDEN}://{host}{port}/{HIDDEN}"


def without_logins(text: str) -> str:
    """Addresses without who logs in there: `https://…@host/path`."""
    return _LOGIN.sub(rf"\g<begin>{HIDDEN}@", text)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment as it may be shown."""
    return {
        name: HIDDEN if is_secret(name, value) else without_logins(value)
        for name, value in environment.items()
    }


def arguments(words: Sequence[str]) -> list[str]:
    """A command line as it may be shown: `--api-key=…`, `--api-key …`, `wandb.api_key=…`."""
    shown, hide = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if hide and not word.startswith("-") and not _ORDINARY.fullmatch(word):
            shown.append(HIDDEN)
        elif equals and is_secret(name, value):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_logins(word))
        hide = word.startswith("-") and not equals and is_secret(word, HIDDEN)
    return shown


def command(written: str | Sequence[str]) -> Any:
    """A command that tells people, as it may be shown: addresses as those of webhooks."""

    def one(word: str) -> str:
        word = _ADDRESS.sub(lambda found: mask(found[0]), _HEADER.sub(rf"\g<begin>{HIDDEN}", word))
        return _NAMED.sub(
            lambda m: f"{m['name']}{m['is']}{HIDDEN}" if is_secret(m["name"], m["value"]) else m[0],
            word,
        )

    if isinstance(written, str):
        return " ".join(arguments([one(word) for word in written.split(" ")]))
    return [one(word) for word in arguments(written)]


def shown(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped job as it may be shown and journaled."""
    notices = [
        {
            **notice,
            **({"webhook": mask(notice["webhook"])} if notice.get("webhook") else {}),
            **({"command": command(notice["command"])} if notice.get("command") else {}),
        }
        for notice in dumped["notify"]
    ]
    secret = {
        "env": variables(dumped["env"]),
        "args": arguments(dumped["args"]),
        "notify": notices,
    }
    return {name: secret.get(name, _without_logins(value)) for name, value in dumped.items()}


def _without_logins(value: Any) -> Any:
    if isinstance(value, str):
        return without_logins(value)
    if isinstance(value, list | tuple):
        return [_without_logins(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_logins(each) for key, each in value.items()}
    return value


class Secrets:
    """Those that a run knows: what it says of anything is said without them."""

    def __init__(self, dumped: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """`environment` is what the job's processes have, its own `env` included."""
        found = {value for name, value in environment.items() if is_secret(name, value)}
        found.update(_hidden(dumped["args"], arguments(dumped["args"])))
        for notice in dumped["notify"]:
            if address := notice.get("webhook"):
                variable = address.strip("${}") if address.startswith("$") else None
                found.add(environment.get(variable, "") if variable else address)
            if isinstance(words := notice.get("command"), list):
                found.update(_hidden(words, [*command(words)]))
        # The longest first: one may be a piece of another.
        known = sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def out_of(self, text: str) -> str:
        """The text without them, and without logins in addresses."""
        return without_logins(self._known.sub(HIDDEN, text) if self._known else text)


def _hidden(words: Iterable[str], shown: Iterable[str]) -> Iterator[str]:
    """What of the words is not shown, without the name that an argument has."""
    for word, seen in zip(words, shown, strict=True):
        if word != seen:
            yield word.partition("=")[2] if seen.endswith(f"={HIDDEN}") else word
