"""Keeps credentials out of what is written: error texts, logs, manifests, command lines."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

from spotspeed.errors import ConfigError

REDACTED = "***"
_SECRET_NAME = re.compile(
    r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY|CONNECTION_STRING|CREDENTIAL)"
)
_PLACE_NAME = re.compile(r"(FILE|PATH|DIR|APPLICATION_CREDENTIALS)$")
"""Variables of this kind say where a secret is; the place itself is none."""
_SHORTEST = 8
"""Shorter values of environment variables are no secrets, and common in other words."""
_PARAMETERS = (
    r"sig|signature|token|secret|password|credential|accountkey|sharedaccesskey|access_token|"
    r"x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|aws_secret_access_key|client_secret|private_key"
)
# A secret may contain slashes, as those of AWS do, or an @; a port is followed by its path.
_USER, _USER_SECRET = r"://[^/\s:@]*", r":(?!\d{1,5}/)[^\s\"']+@"
_PATTERNS = (
    (re.compile(rf"({_USER}){_USER_SECRET}"), rf"\1:{REDACTED}@"),
    (re.compile(rf"(?i)\b({_PARAMETERS})(\"?\s*[=:]\s*\"?)[^&;,\s\"']+"), rf"\1\2{REDACTED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}"), rf"\1 {REDACTED}"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), REDACTED),
)
_URL_SECRETS = re.compile(rf"(?i){_USER}{_USER_SECRET}|[?&;#,]({_PARAMETERS})=")


def redact(text: str) -> str:
    """`text` without passwords, signatures and keys, and without this process's own secrets.

    The latter are the values of environment variables whose names say that they are secret.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not _is_place(name, value):
            text = text.replace(value, REDACTED).replace(quote(value, safe=""), REDACTED)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _is_place(name: str, value: str) -> bool:
    """Whether a variable says where a secret is to be found: a path, in errors of some use."""
    return value.startswith("/") and (bool(_PLACE_NAME.search(name)) or os.path.lexists(value))


def refuse_credentials(url: str) -> None:
    """Raise ConfigError for a URL that carries a password or a signature.

    It would stand in process lists, markers, events and manifests.
    """
    if _URL_SECRETS.search(url):
        raise ConfigError(
            f"path {redact(url)!r} carries credentials: write the URL without them, and give them "
            f"by the store's usual chain (environment variables, a profile, the machine's role)"
        )


def harmless(error: BaseException) -> BaseException | None:
    """`error`, to be shown as a cause, or None when it or what caused it names a secret."""
    link: BaseException | None = error
    for _ in range(16):
        if link is None:
            return error
        text = str(link)
        if redact(text) != text:
            return None
        link = link.__cause__ or link.__context__
    return None
