"""The compose file keeps the project's rules for containers and secrets, and fits the other files it speaks of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from distilldsm.core.privacy import SWITCHES
from distilldsm.core.redaction import is_secret_name
from distilldsm.core.version import __version__
from tests.services.compose import FILE, ROOT, interpolated, services, variables

SERVICES = services()
TEXT = FILE.read_text(encoding="utf-8")
PAGE = (ROOT / "docs/services.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_more_rights_than_it_needs(name):
    service = SERVICES[name]
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in yaml.safe_load(TEXT)["volumes"], "a volume, no folder of the host"
    for port in service.get("ports", []):
        assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:"), "reached from this machine only, if not asked for more"


def test_no_container_reports_its_use():
    """Every image that we build stems from `runtime`, whose environment holds all switches; compose resets none."""
    stages = re.split(r"^FROM ", (ROOT / "docker/Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (runtime,) = (stage for stage in stages if re.match(r"\S+ AS runtime\n", stage))
    environment = dict(re.findall(r"\b(\w+)=(\S+)", runtime))
    assert environment.items() >= SWITCHES.items()
    assert {stage.split()[2] for stage in stages if stage.startswith("runtime AS ")} >= {
        "data",
        "train",
        "export",
        "mlflow",
    }
    for name, service in SERVICES.items():
        assert not service["environment"].keys() & SWITCHES.keys(), name
    assert "-master.telemetry=false" in SERVICES["s3"]["command"]


@pytest.mark.parametrize("name", SERVICES)
def test_versions_are_pinned_and_health_is_checked(name):
    service = SERVICES[name]
    image = interpolated(service["image"], {})
    assert re.search(r":v?\d+(\.\d+)+$", image), image
    runs_once = service["restart"] == "no"
    assert runs_once or service["healthcheck"]["test"][0] == "CMD"
    for other, on in service.get("depends_on", {}).items():
        ends = SERVICES[other]["restart"] == "no"
        assert on["condition"] == ("service_completed_successfully" if ends else "service_healthy")


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_the_environment_and_must_be_given(name):
    for variable, value in SERVICES[name]["environment"].items():
        if is_secret_name(variable):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{variable}: {value}"
    told = " ".join([*SERVICES[name].get("command", []), *SERVICES[name].get("entrypoint", [])])
    assert "$" not in told, "a command is in the list of processes"
    assert "@" not in told
    with pytest.raises(KeyError, match=r"see docs/services\.md"):
        services({})


def test_the_example_asks_for_every_secret_and_gives_none():
    lines = (ROOT / "docker/.env.example").read_text().splitlines()
    given = dict(line.lstrip("# ").split("=", 1) for line in lines if re.fullmatch(r"(# )?[A-Z_0-9]+=\S*", line))
    required = {name for name, default in variables().items() if default is None}
    assert {name for name, value in given.items() if not value} == required
    assert set(given) <= set(variables())
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_server_image_is_the_one_that_is_built():
    assert interpolated(SERVICES["mlflow"]["image"], {}) == f"distilldsm/mlflow:{__version__}"
    assert SERVICES["prepare"]["image"] == SERVICES["mlflow"]["image"]
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    target = dockerfile[dockerfile.index("FROM runtime AS mlflow") :]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in ("docker/prepare_services.py", "docker/mlflow-auth.ini"):
        assert re.search(rf"^COPY .*{name}.* /opt/distilldsm/$", target, flags=re.MULTILINE)
        assert f"!{name}" in ignored
    assert SERVICES["prepare"]["command"][1] == "/opt/distilldsm/prepare_services.py"
    for path in (volume.split(":")[1] for volume in SERVICES["mlflow"]["volumes"]):
        assert f"-o 10001 -g 10001 {path}" in target, "a new volume takes the folder's owner"
        assert f"TMPDIR={path}" in target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command):
    words = shlex.split(command)
    if words[:3] == ["docker", "compose", "-f"]:
        assert words[3] == "docker/compose.yaml"
        action, *rest = words[4:]
        if action in ("stop", "exec", "run"):
            name = next(word for word in rest if not word.startswith("-"))
            assert name in SERVICES
        else:
            assert (action, rest) == ("up", ["--detach", "--wait"])
    elif words[0] == "make":
        assert words == ["make", "images", "ROLES=mlflow"]
    elif words[0] in ("cp", "python"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "mlflow":
        served = SERVICES["mlflow"]["command"]
        assert set(words) <= set(served)
    elif words[:2] == ["docker", "run"]:
        assert f"{yaml.safe_load(TEXT)['name']}_s3:/data:ro" in words
        assert SERVICES["postgres"]["image"] in words
    else:  # the rest is run by test_services.py
        assert words[0] in ("export", "dvc", "pip"), f"no check for: {command}"


def test_what_the_page_exports_is_what_the_tests_set():
    exported = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", "\n".join(one for one in COMMANDS if one.startswith("export"))))
    source = "".join((Path(__file__).parent / name).read_text() for name in ("servers.py", "test_services.py"))
    assert {name for name in exported if name not in source} == set()
