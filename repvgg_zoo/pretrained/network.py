"""Errors of the network: which of them another try may cure, and what to say about them."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import TypeVar
from urllib.error import HTTPError

__all__ = ['is_http_error', 'is_transient', 'is_unreachable', 'retrying', 'short_message']

_logger = logging.getLogger(__name__)
T = TypeVar('T')

_WAITS_S = (1, 2, 4, 8)
"""Seconds to wait before each new try."""
_MAX_WAIT_S = 300
"""Longest wait that a server may ask for."""
_HTTP_LIBRARIES = {'requests', 'urllib3', 'httpx', 'httpx2', 'httpcore', 'httpcore2'}
_TRANSIENT_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
"""Answers that may change: the server is busy, or the repository has just changed."""
_NO_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT}
_MESSAGES = {
    401: 'the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN',
    403: 'your token has no right to that; use another one',
    429: 'you have sent too many requests to the Hub; wait some minutes',
}


def retrying(action: Callable[[], T], *, retry: Callable[[Exception], bool]) -> T:
    """Call a function; if it fails, wait and call it again, five times in all.

    Args:
        action: The function.
        retry: Tells whether another try may help. `is_transient` answers it for errors of the Hub.

    Returns:
        What the function returns.

    Raises:
        Exception: The error of the last try, or the first one that `retry` turns down.

    Example:
        >>> retrying(lambda: 'done', retry=is_transient)
        'done'
    """
    for wait_s in _WAITS_S:
        try:
            return action()
        except Exception as error:
            if not retry(error):
                raise
            wait_s = max(wait_s, min(_retry_after_s(error), _MAX_WAIT_S))
            _logger.warning('the server failed (%s); next try in %d s', short_message(error), wait_s)
            time.sleep(wait_s)
    return action()


def is_http_error(error: BaseException) -> bool:
    """Tell whether an exception, or one of its causes, comes from the network.

    Args:
        error: The exception. huggingface_hub lets exceptions of its HTTP library through (requests or httpx).

    Returns:
        Whether it comes from the network.

    Example:
        >>> is_http_error(ConnectionError()), is_http_error(KeyError())
        (True, False)
    """
    return _status(error) is not None or any(
        isinstance(e, (ConnectionError, HTTPException)) or type(e).__module__.split('.')[0] in _HTTP_LIBRARIES
        for e in _causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Tell whether another try may succeed after an error of the Hub.

    Args:
        error: An exception for which `is_http_error` is true.

    Returns:
        Whether the server was busy or cut the connection. False if no server was reached, and in huggingface_hub's
        offline mode.

    Example:
        >>> is_transient(ConnectionError())
        True
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) or is_unreachable(error):
        return False
    status = _status(error)
    return status is None or status in _TRANSIENT_STATUS


def is_unreachable(error: BaseException) -> bool:
    """Tell whether there was no network, or no server: another try soon is of no use.

    Args:
        error: The exception.

    Returns:
        Whether the name of the server was not found, or no connection came about.

    Example:
        >>> is_unreachable(ConnectionRefusedError()), is_unreachable(ConnectionResetError())
        (True, False)
    """
    return any(
        isinstance(e, (ConnectionRefusedError, socket.gaierror))
        or (isinstance(e, OSError) and e.errno in _NO_NETWORK)
        or type(e).__name__ == 'ConnectTimeout'  # of each of the HTTP libraries
        for e in _causes(error)
    )


def short_message(error: BaseException) -> str:
    """Say in one line what is wrong, and what to do about it if that is known.

    Args:
        error: The exception. Its first cause speaks.

    Returns:
        The message.

    Example:
        >>> short_message(ConnectionError('no route to host'))
        'no route to host'
    """
    root = list(_causes(error))[-1]
    if isinstance(root, HTTPError):  # of urllib, so not of the Hub
        return str(root)
    return _MESSAGES.get(_status(error) or 0) or str(root).strip().split('\n', 1)[0] or type(root).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its cause, the cause of that, and so on. Some wrap their cause as an argument instead."""
    while error is not None:
        yield error
        error = error.__cause__ or next((arg for arg in error.args if isinstance(arg, BaseException)), None)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an exception or of one of its causes."""
    statuses = (
        e.code if isinstance(e, HTTPError) else getattr(getattr(e, 'response', None), 'status_code', None)
        for e in _causes(error)
    )
    return next((status for status in statuses if status is not None), None)


def _retry_after_s(error: BaseException) -> int:
    """The seconds that the server asked to wait, or 0."""
    headers = (getattr(getattr(e, 'response', e), 'headers', None) for e in _causes(error))
    asked = next((h['retry-after'] for h in headers if h and 'retry-after' in h), '')
    return int(asked) if asked.isdigit() else 0
