"""What a failed request means: whether it may pass, what the user lacks, and how to say it without a secret."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator

PASSING_STATUS = {408, 425, 429}  # with these and 5xx, HTTP asks to come again
PASSING = {
    "HTTPClientError", "ResponseParserError", "FlexibleChecksumError",  # botocore
    "ClientConnectionError", "ClientPayloadError",  # aiohttp
    "TransportError", "ChecksumError",  # httpx, gcsfs
}  # fmt: skip
"""Errors of connections that are no OSError, by name: their packages may not be installed."""
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
EXTRAS = {"s3": "megakor[s3]", "s3a": "megakor[s3]", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_S3 = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a role of the machine"
_GS = "GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine"
CREDENTIALS = {"s3": _S3, "s3a": _S3, "gs": _GS, "gcs": _GS, "hf": "HF_TOKEN, or `hf auth login`"}
# A secret may itself hold a slash, so where a colon opens a password everything up to the last @ goes.
USERINFO = re.compile(r"(?<=://)(?:[^/@:\s]*:\S*|[^/@\s]*)@")
QUERY = re.compile(r"(://[^?\s]*)\?\S+")


def explained(error: Exception, url: str, name: str = "", writes: bool = False) -> Exception:
    """One error for the user: address, what is missing, and what the file system said, without secrets.

    Args:
        writes: whether the request was to change something there.
    """
    where = without_secrets(url) + (f"/{name}" if name else "")
    protocol = url.split("://", 1)[0]
    said = without_secrets(str(error).replace(url, without_secrets(url)))
    detail = f"{type(error).__name__}: {said}"
    status = status_of(error)
    verb, done = ("write", "written") if writes else ("read", "read")
    if isinstance(error, ImportError):
        package = EXTRAS.get(protocol, f"it ({said})")
        return ValueError(f"{where}: {protocol}:// needs a package that is not there: install {package}")
    if "rotocol not known" in said:
        return ValueError(f"{where}: protocol={protocol!r} must be one that fsspec knows")
    if "Credential" in type(error).__name__ or status == 401:
        needed = CREDENTIALS.get(protocol, "those of its fsspec package")
        return ValueError(f"{where}: needs credentials: {needed} ({detail})")
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(f"{where}: not there ({detail})")
    if isinstance(error, PermissionError) or status == 403:
        return PermissionError(f"{where}: the credentials in use must be allowed to {verb} it ({detail})")
    return OSError(f"{where}: cannot be {done} ({detail})")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the file systems' packages stands for."""
    for cause in _chain(error):
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):  # botocore
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        values = (getattr(cause, "status", None), getattr(cause, "code", None), getattr(answer, "status_code", None))
        for value in values:
            if isinstance(value, int) and 100 <= value < 600:  # aiohttp, gcsfs, requests and httpx
                return value
    return None


def may_pass(error: BaseException) -> bool:
    # First: aiohttp calls a body that breaks off a status 400.
    if any(kind.__name__ in PASSING for cause in _chain(error) for kind in type(cause).__mro__):
        return True
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in PASSING_STATUS
    passing = isinstance(error, (OSError, EOFError, asyncio.TimeoutError))
    return passing and not isinstance(error, PERMANENT)


def without_secrets(text: str) -> str:
    """Text without passwords and queries of URLs in it, and without the secrets of the environment."""
    for key, value in os.environ.items():
        if re.search("SECRET|TOKEN|PASSWORD", key) and len(value.strip()) >= 8:
            text = text.replace(value.strip(), "***")
    return QUERY.sub(r"\1?***", USERINFO.sub("***@", text))
