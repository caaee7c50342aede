"""The sources themselves: no call that could carry out what a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("distilldsm", "docker", "benchmarks", ".ci")
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
_STEPS = "kfp copies the source of functions; this source is made of the stages' records, of no file's text"
EXCEPTIONS = dict.fromkeys(
    [("distilldsm/pipeline/definition.py", "exec"), ("distilldsm/pipeline/definition.py", "compile")], _STEPS
)
"""(file, finding) that were looked at, with the reason."""


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a call's function; `?.c` where it is an attribute of something computed."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return "?"


def constant(call: ast.Call, keyword: str) -> object:
    """The constant given as a keyword; None where it is not given, or not a constant."""
    found = [k.value for k in call.keywords if k.arg == keyword]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def findings(source: str) -> list[str]:
    """What is forbidden in a module, each as `line: finding`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            if module.split(".")[0] in FORBIDDEN_MODULES or module.startswith(("monai.bundle", "yaml.unsafe")):
                found.append(f"{node.lineno}: import {module}")
        if isinstance(node, ast.Call) and (problem := _of_call(node)):
            found.append(f"{node.lineno}: {problem}")
    return found


def _of_call(call: ast.Call) -> str | None:
    name = name_of(call.func)
    last = name.rpartition(".")[2]
    arguments = [a.value for a in call.args if isinstance(a, ast.Constant)]
    checks = {
        name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec"): name,
        name == "__import__" or (last == "import_module" and arguments[:1] == ["pickle"]): name,
        name in SHELLS: name,
        constant(call, "shell") not in (None, False): "shell=True",
        constant(call, "allow_pickle") not in (None, False): "allow_pickle=True",
        name in ("torch.load", "torch.hub.load") and constant(call, "weights_only") is not True: name,
        name in ("np.load", "numpy.load") and constant(call, "allow_pickle") is not False: f"{name} may unpickle",
        name.endswith(("read_pickle", "to_pickle", "unsafe_load", "unsafe_load_all", "full_load")): name,
        name in ("yaml.load", "yaml.load_all"): f"{name}: safe_load is the one to use",
        last == "unpack_archive" or (last == "extractall" and constant(call, "filter") != "data"): name,
        last in ("loads", "load") and name.partition(".")[0] in FORBIDDEN_MODULES: name,
        last in ("load_model", "load_pyfunc") and "mlflow" in name: f"{name} may unpickle",
    }
    return next((problem for is_so, problem in checks.items() if is_so), None)


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_no_source_could_carry_out_what_a_file_says():
    paths = sources()
    assert len(paths) > 100
    seen = [
        f"{name}:{problem}"
        for path in paths
        for name in [path.relative_to(ROOT).as_posix()]
        for problem in findings(path.read_text(encoding="utf-8"))
        if (name, problem.partition(": ")[2]) not in EXCEPTIONS
    ]
    assert not seen, "\n".join(seen)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import joblib",
        "from dill import loads",
        "import shelve as s",
        "from monai.bundle import ConfigParser",
        "from monai import bundle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "f(allow_pickle=1)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "subprocess.run('x', shell=True)",
        "os.system('x')",
        "archive.extractall(target)",
        "archive.extractall(target, filter='fully_trusted')",
        "tarfile.open(x).extractall(target)",
        "shutil.unpack_archive(x)",
        "pd.read_pickle(x)",
        "mlflow.pyfunc.load_model(x)",
    ],
)
def test_it_finds_what_is_forbidden(line):
    assert findings(line), line


@pytest.mark.parametrize(
    "line",
    [
        "f(x).eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "network.eval()",
        "re.compile(x)",
        "archive.extractall(target, filter='data')",
        "subprocess.run(['x'])",
        "json.load(stream)",
        "from distilldsm.data.archive import extract",
        "extract(archive, target)",
    ],
)
def test_it_leaves_the_rest_alone(line):
    assert not findings(line)


def test_shell_scripts_evaluate_nothing():
    for path in [*(ROOT / "docker").glob("*.sh"), ROOT / ".ci/run"]:
        assert "eval " not in path.read_text(encoding="utf-8"), path
