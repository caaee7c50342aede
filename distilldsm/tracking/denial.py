"""A server that answers, knows whom it talks to, and says no: in words that tell what to do about it.

Unlike what it will never take, such a record is kept: it goes through once the password or the rights are fixed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_CODES = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}


class DeniedError(Exception):
    """The server does not let this user do it."""


def denial(error: BaseException) -> str | None:
    """What a denial says and how to fix it; None where the error is another one.

    MLflow's API fails with an `MlflowException`, files sent through the server with an `HTTPError` of requests.
    """
    code = _CODES.get(str(getattr(error, "error_code", None)))
    status = code or getattr(getattr(error, "response", None), "status_code", None)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    who = f"user '{user}'" if user else "a client without a user's name"
    if status == 401:
        return (
            f"the MLflow server does not let {who} in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "(or MLFLOW_TRACKING_TOKEN) to what it knows"
        )
    if status == 403:
        return (
            f"the MLflow server does not let {who} do this: ask who administers it for the permission EDIT on the "
            f"experiment, and on the registered model ({error})"
        )
    return None


@contextmanager
def denials() -> Iterator[None]:
    """Turn a denial into a `DeniedError`; any other error passes.

    Raises:
        DeniedError: the server said no.
    """
    try:
        yield
    except Exception as error:
        said = denial(error)
        if said is None:
            raise
        raise DeniedError(said) from error
