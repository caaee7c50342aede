"""The server of Kubeflow Pipelines: its address, credentials and requests. Every error says what to fix.

The requests use Python's own HTTP client: kfp's needs packages that the pods do not have, keeps an expired token, and
knows neither logs nor plugins.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from distilldsm.core.errors import ConfigError, UserError

TIMEOUT_S = 8.0
"""Time limit for the server's first answer."""
_REQUEST_S = 60.0
API = "/apis/v2beta1"
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")


class ServerAwayError(UserError):
    """The server does not answer now. A later attempt may succeed."""


class RefusedError(UserError):
    """The server refused a request. `status` is the HTTP status."""

    status = 0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it usually leads to a page to log in, and the credentials are not for another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Server:
    """Address and credentials of Kubeflow Pipelines. Secrets come from the environment, never from a command line."""

    host: str
    """e.g. `https://kubeflow.example.org/pipeline`."""
    namespace: str | None = None
    """The user's namespace, in a multi-user installation."""
    fixed_token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    """The token of this pod. Kubernetes replaces it from time to time, so it is read for each request."""
    cookies: str | None = field(default=None, repr=False)
    """As a browser sends them: `name=value; name=value`."""
    ca_file: str | None = None
    """Certificates of the authority that signed the server's certificate."""

    @classmethod
    def from_environment(
        cls, host: str | None = None, namespace: str | None = None, ca_file: str | None = None
    ) -> Server:
        """Host: the argument or KF_PIPELINES_ENDPOINT. Token: KF_PIPELINES_TOKEN, or the token of this pod. Cookies:
        KF_PIPELINES_COOKIES.

        Raises:
            ConfigError: the host is missing or not an address.
        """
        host = host or os.environ.get("KF_PIPELINES_ENDPOINT", "")
        if not host and SERVICE_ACCOUNT_TOKEN.is_file():
            return cls.in_cluster(namespace, ca_file)
        if not host.startswith(("http://", "https://")):
            raise ConfigError(
                "the address of Kubeflow Pipelines is missing or not valid",
                seen=host or "nothing",
                rule="http://... or https://...",
                hint="give --host, or set KF_PIPELINES_ENDPOINT",
            )
        if "@" in host.split("/")[2]:
            raise ConfigError("the host contains a user or password", hint="set KF_PIPELINES_TOKEN or _COOKIES instead")
        token_file = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or SERVICE_ACCOUNT_TOKEN)
        return cls(
            host=host.rstrip("/"),
            namespace=namespace or os.environ.get("KF_PIPELINES_NAMESPACE") or None,
            fixed_token=os.environ.get("KF_PIPELINES_TOKEN") or None,
            token_file=token_file if token_file.is_file() else None,
            cookies=os.environ.get("KF_PIPELINES_COOKIES") or None,
            ca_file=ca_file,
        )

    @classmethod
    def in_cluster(cls, namespace: str | None = None, ca_file: str | None = None) -> Server:
        """The server as a pod sees it: KF_PIPELINES_ENDPOINT, or the service of its own or of Kubeflow's namespace."""
        service = os.environ.get("ML_PIPELINE_SERVICE_HOST", "ml-pipeline.kubeflow.svc")  # set by Kubernetes
        port = os.environ.get("ML_PIPELINE_SERVICE_PORT", "8888")
        host = os.environ.get("KF_PIPELINES_ENDPOINT") or f"http://{service}:{port}"
        return cls.from_environment(host, namespace, ca_file)

    @property
    def token(self) -> str | None:
        """The token that is sent now."""
        if self.fixed_token or self.token_file is None:
            return self.fixed_token
        try:
            return self.token_file.read_text().strip() or None
        except OSError as error:
            raise UserError("cannot read the pod's token", where=self.token_file, seen=error.strerror) from None

    @property
    def credentials(self) -> str:
        """The kind of credentials that are sent, in words."""
        return "a token" if self.token else "cookies" if self.cookies else "no token and no cookies"

    def check(self, timeout_s: float = TIMEOUT_S) -> None:
        """Check the server's health endpoint.

        Raises:
            UserError: the server is unreachable, refuses access, or is not Kubeflow Pipelines v2.
        """
        try:
            self.get("/healthz", timeout_s=timeout_s)
        except RefusedError as error:
            if error.status != 404:
                raise
            raise UserError(
                "is not Kubeflow Pipelines version 2",
                where=self.host,
                seen=f"HTTP 404 for {self.host}{API}/healthz",
                rule="the v2beta1 API (Kubeflow Pipelines 2.0 or newer)",
                hint="give the address of ml-pipeline, often ending in /pipeline",
            ) from None

    def get(self, path: str, *, timeout_s: float = _REQUEST_S, **query: Any) -> Any:
        """The answer to GET, as JSON. Query values None are left out."""
        return self._json(self._send("GET", API + path, query, timeout_s=timeout_s))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to POST of a JSON object."""
        content = json.dumps(body or {}).encode()
        return self._json(self._send("POST", API + path, {}, content, "application/json"))

    def upload(self, path: str, file: Path, **query: Any) -> Any:
        """The answer to the upload of a file, as a form in a browser sends it."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="uploadfile"; filename="{file.name}"\r\n\r\n'
        content = head.encode() + file.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return self._json(self._send("POST", API + path, query, content, f"multipart/form-data; boundary={mark}"))

    def text(self, path: str) -> str:
        """The answer to GET outside of the v2 API, as text."""
        return self._send("GET", path, {}).decode(errors="replace")

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        content: bytes | None = None,
        kind: str | None = None,
        timeout_s: float = _REQUEST_S,
    ) -> bytes:
        known = urlencode({key: value for key, value in query.items() if value is not None})
        url = f"{self.host}{quote(path, safe='/:')}" + (f"?{known}" if known else "")
        headers = {"Accept": "application/json", "Content-Type": kind, "Cookie": self.cookies}
        headers["Authorization"] = f"Bearer {token}" if (token := self.token) else None
        sent = {key: value for key, value in headers.items() if value}
        request = urllib.request.Request(url, content, sent, method=method)  # noqa: S310 - http(s), checked
        context = ssl.create_default_context(cafile=self.ca_file) if url.startswith("https") else None
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerAwayError(
                "Kubeflow Pipelines does not answer",
                where=self.host,
                seen=str(getattr(error, "reason", error))[:300],
                hint="is the address right, the port forwarded, the VPN on? For a private certificate authority: "
                "--ca-file",
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> UserError:
        target = error.headers.get("Location") if 300 <= error.code < 400 else None
        if target:
            if urlsplit(target)[1:3] == urlsplit(error.url)[1:3]:
                return UserError("has moved", where=self.host, seen=target, hint="give the new address")
            return UserError(
                "asks for a log-in",
                where=self.host,
                seen=target.partition("?")[0],
                hint="set KF_PIPELINES_COOKIES or KF_PIPELINES_TOKEN",
            )
        if error.code in (401, 403):
            return UserError(
                "access is refused: the token or cookies are missing, expired, or not allowed to do this",
                where=self.host,
                seen=f"HTTP {error.code} with {self.credentials}",
                hint="set a new KF_PIPELINES_TOKEN or KF_PIPELINES_COOKIES; in a multi-user installation --namespace "
                "too",
            )
        kind = ServerAwayError if error.code >= 500 else RefusedError
        refusal = kind(
            "Kubeflow Pipelines refused the request",
            where=self.host,
            seen=f"HTTP {error.code}: {server_message(error.read().decode(errors='replace'))}",
        )
        if isinstance(refusal, RefusedError):
            refusal.status = error.code
        return refusal

    def _json(self, body: bytes) -> Any:
        try:
            return json.loads(body or b"{}")
        except ValueError:
            raise UserError(
                "answers, but not as Kubeflow Pipelines",
                where=self.host,
                seen=body[:60].decode(errors="replace"),
                rule="JSON",
                hint="give the address of ml-pipeline; a page to log in needs KF_PIPELINES_COOKIES or _TOKEN",
            ) from None


def server_message(body: str) -> str:
    """The message in an error of the server, without its stack."""
    try:
        answer = json.loads(body)
        return str(answer.get("error_message") or answer.get("message") or answer.get("error") or answer)[:400]
    except (ValueError, AttributeError):
        return body[:400]
