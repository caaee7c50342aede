"""Client of Kubeflow Pipelines: upload, start and follow runs. Every error says what to fix."""

from __future__ import annotations

import io
import json
import os
import ssl
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.core.errors import ConfigError, UserError
from distilldsm.pipeline.definition import NAME

TIMEOUT_S = 8.0
"""Time limit for the server's first answer."""
END_STATES = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "ERROR"}
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")


class ServerAwayError(UserError):
    """The server does not answer now. A later attempt may succeed."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Address and credentials of Kubeflow Pipelines. Secrets come from the environment, never from a command line."""

    host: str
    """e.g. `https://kubeflow.example.org/pipeline`."""
    namespace: str | None = None
    """The user's namespace, in a multi-user installation."""
    token: str | None = None
    cookies: str | None = None
    """As a browser sends them: `name=value; name=value`."""
    ca_file: str | None = None
    """Certificates of the authority that signed the server's certificate."""

    @classmethod
    def from_environment(
        cls, host: str | None = None, namespace: str | None = None, ca_file: str | None = None
    ) -> Connection:
        """Host: the argument or KF_PIPELINES_ENDPOINT. Token: KF_PIPELINES_TOKEN, or the token of this pod. Cookies:
        KF_PIPELINES_COOKIES.

        Raises:
            ConfigError: the host is missing or not an address.
        """
        host = host or os.environ.get("KF_PIPELINES_ENDPOINT", "")
        if not host and SERVICE_ACCOUNT_TOKEN.is_file():
            host = "http://ml-pipeline.kubeflow.svc:8888"
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
        token = os.environ.get("KF_PIPELINES_TOKEN") or (token_file.read_text().strip() if token_file.is_file() else "")
        return cls(
            host=host.rstrip("/"),
            namespace=namespace or os.environ.get("KF_PIPELINES_NAMESPACE") or None,
            token=token or None,
            cookies=os.environ.get("KF_PIPELINES_COOKIES") or None,
            ca_file=ca_file,
        )

    @property
    def credentials(self) -> str:
        """The kind of credentials that are sent, in words."""
        return "a token" if self.token else "cookies" if self.cookies else "no token and no cookies"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run or recurring run that was started."""

    pipeline_id: str
    version_id: str
    run_id: str
    """Id of the run or of the recurring run."""
    recurring: bool
    run_url: str


def connect(connection: Connection) -> Any:
    """kfp's client, after the server has answered.

    Raises:
        UserError: the server is unreachable, refuses access, or is not Kubeflow Pipelines v2.
    """
    probe(connection)
    import kfp

    with warnings.catch_warnings(), _own_context(connection):
        warnings.simplefilter("ignore")
        return kfp.Client(
            host=connection.host,
            namespace=connection.namespace or "",
            existing_token=connection.token,
            cookies=connection.cookies,
            ssl_ca_cert=connection.ca_file,
        )


@contextmanager
def _own_context(connection: Connection) -> Iterator[None]:
    """Keep kfp from reading a saved context of another cluster in the home folder: `connection` is complete."""
    import kfp

    before = kfp.Client._LOCAL_KFP_CONTEXT
    kfp.Client._LOCAL_KFP_CONTEXT = os.path.join(os.devnull, "none")
    try:
        yield
    finally:
        kfp.Client._LOCAL_KFP_CONTEXT = before


def probe(connection: Connection, timeout_s: float = TIMEOUT_S) -> None:
    """Check the server's health endpoint.

    Raises:
        UserError: the server is unreachable, refuses access, or is not Kubeflow Pipelines v2.
    """
    url = f"{connection.host}/apis/v2beta1/healthz"
    headers = {"Accept": "application/json"}
    if connection.token:
        headers["Authorization"] = f"Bearer {connection.token}"
    if connection.cookies:
        headers["Cookie"] = connection.cookies
    context = ssl.create_default_context(cafile=connection.ca_file) if url.startswith("https") else None
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:  # noqa: S310
            body = answer.read(100_000)
            final = answer.url
    except urllib.error.HTTPError as error:
        raise _refusal(error.code, connection, url) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            "Kubeflow Pipelines does not answer",
            where=connection.host,
            seen=str(reason),
            hint="is the address right, the port forwarded, the VPN on? For a private certificate authority: --ca-file",
        ) from None
    try:
        json.loads(body)
    except ValueError:
        login = any(word in final for word in ("auth", "login", "dex", "oauth"))
        raise UserError(
            "asks for a log-in" if login else "answers, but not as Kubeflow Pipelines",
            where=connection.host,
            seen=final,
            rule=f"JSON at {url}",
            hint="set KF_PIPELINES_COOKIES or KF_PIPELINES_TOKEN" if login else "give the address of ml-pipeline",
        ) from None


def _refusal(status: int, connection: Connection, what: str) -> UserError:
    if status in (401, 403):
        return UserError(
            "access is refused: the token or cookies are missing, expired, or not allowed to do this",
            where=connection.host,
            seen=f"HTTP {status} with {connection.credentials}",
            hint="set a new KF_PIPELINES_TOKEN or KF_PIPELINES_COOKIES; in a multi-user installation --namespace too",
        )
    if status == 404:
        return UserError(
            "is not Kubeflow Pipelines version 2",
            where=connection.host,
            seen=f"HTTP 404 for {what}",
            rule="the v2beta1 API (Kubeflow Pipelines 2.0 or newer)",
            hint="give the address of ml-pipeline, often ending in /pipeline",
        )
    return UserError("Kubeflow Pipelines failed", where=connection.host, seen=f"HTTP {status} for {what}")


@contextmanager
def explained(connection: Connection) -> Iterator[None]:
    """Turn exceptions of kfp's client into errors that say what to fix."""
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        if error.status in (401, 403):
            raise _refusal(error.status, connection, "the API") from None
        kind = ServerAwayError if (error.status or 0) >= 500 else UserError
        raise kind(
            "Kubeflow Pipelines refused the request",
            where=connection.host,
            seen=f"HTTP {error.status}: {_server_message(error.body)}",
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise ServerAwayError("the connection broke", where=connection.host, seen=str(error)[:300]) from None


def _server_message(body: Any) -> str:
    try:
        answer = json.loads(body)
        return str(answer.get("error_message") or answer.get("message") or answer.get("error") or answer)[:400]
    except (TypeError, ValueError, AttributeError):
        return str(body)[:400]


def submit(
    client: Any,
    connection: Connection,
    package: Path,
    *,
    version_name: str,
    run_name: str,
    experiment: str,
    arguments: Mapping[str, Any],
    enable_caching: bool = True,
    service_account: str | None = None,
    pipeline_root: str | None = None,
    cron: str | None = None,
) -> Submitted:
    """Upload a version of the pipeline, and start a run, or with `cron` a recurring run.

    Raises:
        UserError: the server refused a request. Earlier uploads stay, and a later call uses the version again.
    """
    # kfp's client prints addresses, which must not end up in `--json` output.
    with explained(connection), redirect_stdout(io.StringIO()):
        pipeline_id = client.get_pipeline_id(NAME)
        if pipeline_id is None:
            pipeline_id = client.upload_pipeline(
                str(package), NAME, "Distill DSM, from volumes to model", connection.namespace
            ).pipeline_id
        version_id = _version(client, pipeline_id, version_name)
        if version_id is None:
            version_id = client.upload_pipeline_version(
                str(package), version_name, pipeline_id=pipeline_id
            ).pipeline_version_id
        experiment_id = client.create_experiment(experiment, namespace=connection.namespace).experiment_id
        common = {
            "params": dict(arguments),
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "enable_caching": None if enable_caching else False,
            "service_account": service_account,
            "pipeline_root": pipeline_root,
        }
        if cron is not None:
            run_id = client.create_recurring_run(
                experiment_id, run_name, cron_expression=cron, no_catchup=True, **common
            ).recurring_run_id
        else:
            run_id = client.run_pipeline(experiment_id, run_name, **common).run_id
    kind = "recurringrun" if cron is not None else "runs"
    return Submitted(
        pipeline_id=pipeline_id,
        version_id=version_id,
        run_id=run_id,
        recurring=cron is not None,
        run_url=f"{connection.host}/#/{kind}/details/{run_id}",
    )


def _version(client: Any, pipeline_id: str, name: str) -> str | None:
    """The id of an uploaded version with that name; None: there is no such version."""
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100)
        for version in page.pipeline_versions or []:
            if name in (version.display_name, getattr(version, "name", None)):
                return str(version.pipeline_version_id)
        token = page.next_page_token or ""
        if not token:
            return None


def status(client: Any, connection: Connection, run_id: str) -> dict[str, Any]:
    """State of a run and of its steps, with their errors.

    Raises:
        UserError: there is no such run, or the server refuses.
    """
    with explained(connection):
        run = client.get_run(run_id)
    tasks = [
        {"name": t.display_name, "state": t.state, "error": t.error.message if t.error else None}
        for t in (run.run_details.task_details if run.run_details else None) or []
    ]
    return {
        "run_id": run.run_id,
        "name": run.display_name,
        "state": run.state,
        "error": run.error.message if run.error else None,
        "url": f"{connection.host}/#/runs/details/{run.run_id}",
        "tasks": tasks,
    }


def wait(
    client: Any,
    connection: Connection,
    run_id: str,
    *,
    say: Callable[[str], None] = print,
    poll_s: float = 10.0,
    timeout_s: float = 0.0,
) -> dict[str, Any]:
    """Follow a run to its end. Print a line for each change of a step, and wait for a server that is briefly away.

    (kfp's own wait does not handle cancelled runs.)

    Raises:
        UserError: access is refused, the server stays away for six polls, or `timeout_s` is over. The run
            itself continues.
    """
    states: dict[str, str] = {}
    begun, misses = time.monotonic(), 0
    while True:
        try:
            current = status(client, connection, run_id)
            misses = 0
        except ServerAwayError:
            misses += 1
            if misses > 6:
                raise
            current = None
        if current is not None:
            for task in current["tasks"]:
                if states.get(task["name"]) != task["state"]:
                    states[task["name"]] = task["state"]
                    say(f"{task['name']}: {task['state']}" + (f"  {task['error']}" if task["error"] else ""))
            if current["state"] in END_STATES:
                return current
        if timeout_s and time.monotonic() - begun > timeout_s:
            raise UserError("the time limit is over; the run continues", seen=run_id, hint="distilldsm pipeline status")
        time.sleep(poll_s)
