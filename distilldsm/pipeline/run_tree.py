"""Turns what Kubeflow Pipelines says of a run into one entry a step and fold, in the pipeline's order.

The server lists Argo's nodes, in no order, without their places in the tree. Argo computes a node's id from its full
name: the workflow's name and the 32-bit FNV-1a hash of the name. So the tree is found by trying names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from distilldsm.components.registry import STAGES
from distilldsm.pipeline.cluster import STEPS

State = Literal[
    "waiting", "starting", "running", "done", "from cache", "skipped", "failed", "stopped", "not started", "unknown"
]
Ending = Literal["SUCCEEDED", "SUCCEEDED, gate closed", "FAILED", "CANCELED"]
RunState = Literal["waiting", "running", "stopping", "done", "gate closed", "failed", "stopped"]
_AFTER_GATE = tuple(stage.name for stage in STAGES if stage.scope == "model")
_PER_FOLD = tuple(stage.name for stage in STAGES if stage.per_fold)
_FAILED = ("FAILED", "ERROR")
_STATES: Mapping[str, State] = {
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "ERROR": "failed",
    "RUNNING": "running",
    "PENDING": "starting",
}
_SHOWN = 12
"""Lines of an error; the log has all of them."""
_ITERATION = re.compile(r"iteration-iterations\((\d+):[^)]*\)")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a run; a step of the loop over folds has one entry a fold."""

    step: str
    fold: int | None = None
    state: State
    seconds: float | None = None
    """Time from the start of its pod to its end, or to now."""
    attempts: int = 0
    """How many pods were started for it."""
    error: str | None = None
    """Why it failed, was skipped or does not start."""
    node: str | None = None
    """Id of the Argo node whose pod has the log: the last attempt, or the driver that failed."""
    is_driver: bool = False
    """KFP's driver of the step failed, before the step itself started."""

    @property
    def name(self) -> str:
        """e.g. `train fold 1`."""
        return self.step if self.fold is None else f"{self.step} fold {self.fold}"

    @property
    def has_begun(self) -> bool:
        """Whether it ran, runs, or its result came from the cache."""
        return self.state not in ("waiting", "starting", "skipped", "not started")


@dataclass(kw_only=True)
class _Node:
    """One Argo node: its place in the tree, and what the server says of it."""

    name: str
    id: str
    task: Mapping[str, Any] = field(default_factory=dict)
    """Empty if the server's entry for it could not be identified."""

    @property
    def state(self) -> str:
        return str(self.task.get("state") or "")

    @property
    def start(self) -> datetime | None:
        return _time(self.task.get("start_time"))

    @property
    def end(self) -> datetime | None:
        return _time(self.task.get("end_time"))


def node_id(workflow: str, name: str) -> str:
    """Argo's id of a node: the workflow's name and the FNV-1a hash (32 bits) of the node's full name."""
    if name == workflow:
        return workflow
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"{workflow}-{value}"


class RunTree:
    """A run as `GET /apis/v2beta1/runs/ID` describes it.

    Args:
        now: for tests; the time until which a running step is counted.
    """

    def __init__(self, run: Mapping[str, Any], now: datetime | None = None) -> None:
        self.run, self.nodes, self._now = run, _tree(run), now or datetime.now(UTC)

    @property
    def state(self) -> RunState:
        """One word. A terminated run ends as FAILED at the server; its history shows that it was terminated."""
        state = self.run.get("state")
        history = {entry.get("state") for entry in self.run.get("state_history") or ()}
        if state == "SUCCEEDED":
            return "gate closed" if self.is_gate_closed else "done"
        if state in ("FAILED", "ERROR"):
            return "stopped" if history & {"CANCELING", "CANCELED"} else "failed"
        ends: dict[Any, RunState] = {"CANCELED": "stopped", "CANCELING": "stopping", "RUNNING": "running"}
        return ends.get(state, "waiting")

    def ending(self) -> Ending | None:
        """How the run ended, asked by its own last step, while the run is RUNNING. None: steps have no end yet."""
        before = [step for step in self.steps() if step.step != "finish"]
        if self.state in ("stopped", "stopping"):
            return "CANCELED"
        if self.failed_driver() or any(step.state == "failed" for step in before):
            return "FAILED"
        if not before or any(step.state not in ("done", "from cache", "skipped", "not started") for step in before):
            return None
        return "SUCCEEDED, gate closed" if self.is_gate_closed else "SUCCEEDED"

    @property
    def is_over(self) -> bool:
        """Whether nothing of the run changes any more."""
        return self.state in ("done", "gate closed", "failed", "stopped")

    @property
    def is_gate_closed(self) -> bool:
        """Whether the gate kept the models from their export."""
        return any(
            re.search(r"\.condition-\d+$", node.name) and node.state == "SKIPPED" for node in self.nodes.values()
        )

    @property
    def seconds(self) -> float | None:
        """Duration of the run so far."""
        begun, ended = _time(self.run.get("created_at")), _time(self.run.get("finished_at"))
        return None if begun is None else ((ended or self._now) - begun).total_seconds()

    @property
    def folds(self) -> list[int]:
        """The run's input `folds`."""
        parameters = (self.run.get("runtime_config") or {}).get("parameters") or {}
        return [int(fold) for fold in parameters.get("folds") or ()]

    def steps(self) -> list[Step]:
        """The steps in the pipeline's order.

        A step without a node is listed if it may still come, or did not come because the run failed. (The pipeline of
        an older version may lack it.)
        """
        places: dict[str, dict[int | None, str]] = defaultdict(dict)
        for name in sorted(self.nodes, key=_attempts):  # of a loop that was tried again the last attempt counts
            step, index = _step_of(name)
            if step is not None:
                places[step][index] = name.removesuffix("-driver")
        found: dict[str, list[Step]] = {}
        for step, names in places.items():
            found[step] = []
            for index in sorted(names, key=lambda index: -1 if index is None else index):
                fold = self.folds[index] if index is not None and index < len(self.folds) else index
                found[step].append(replace(self._step(names[index]), step=step, fold=fold))
        begun = [STEPS.index(step) for step, all_of in found.items() if any(one.has_begun for one in all_of)]
        begun += [STEPS.index(step) for step in _AFTER_GATE if self.is_gate_closed]
        last = max((number for number in begun if STEPS[number] != "finish"), default=-1)
        for number, step in enumerate(STEPS):
            if step not in found and step in _AFTER_GATE and self.is_gate_closed:
                found[step] = [Step(step=step, state="skipped")]
            elif step not in found and number > last and self.state not in ("done", "gate closed"):
                found[step] = [Step(step=step, state="not started" if self.is_over else "waiting")]
        listed = [one for step in STEPS for one in found.get(step, ())]
        if self.state in ("stopped", "stopping"):
            return [replace(one, state="stopped") if one.state == "failed" else one for one in listed]
        return listed

    def failed_driver(self) -> tuple[str, str] | None:
        """Name of a task and the node of its driver, if a driver outside of all steps failed, as a run's first one."""
        for node in sorted(self.nodes.values(), key=lambda node: -len(node.name)):
            task = node.name.rpartition(".")[2]
            if node.state in _FAILED and task.endswith("-driver") and _step_of(node.name)[0] is None:
                return task.removesuffix("-driver"), self.nodes[self._last(node.name)[0]].id
        return None

    def _step(self, name: str) -> Step:
        """The state of the step with this full name: of its last attempt, and of its last pod."""
        step, driver = self.nodes.get(name), self.nodes.get(f"{name}-driver")
        executor = self.nodes.get(f"{self._last(name)[0]}.executor")
        if driver is not None and driver.state in _FAILED:
            last, count = self._last(driver.name)
            return Step(step="", state="failed", attempts=count, node=self.nodes[last].id, is_driver=True)
        if step is None:
            return Step(step="", state="starting")
        if executor is None:
            waiting: State = "not started" if self.is_over or step.state == "OMITTED" else "waiting"
            return Step(step="", state="skipped" if step.state == "SKIPPED" else waiting)
        if executor.state == "SKIPPED":
            return Step(step="", state="from cache")
        last, count = self._last(executor.name)
        begun, ended = executor.start or step.start, self.nodes[last].end or executor.end
        seconds = None if begun is None else ((ended or self._now) - begun).total_seconds()
        state = _STATES.get(executor.state or step.state, "unknown")
        if state == "running" and self.nodes[last].state == "PENDING":
            state = "starting"
        return Step(step="", state=state, seconds=seconds, attempts=count, node=self.nodes[last].id)

    def _last(self, name: str) -> tuple[str, int]:
        """The full name of a node's last attempt, or its own if it has none, and the number of attempts."""
        count = 0
        while f"{name}({count})" in self.nodes:
            count += 1
        return (f"{name}({count - 1})", count) if count else (name, 1)


def _time(text: Any) -> datetime | None:
    """A time of the server; None for a missing one, which the server gives as the year 1 or 1970."""
    if not text:
        return None
    value = datetime.fromisoformat(str(text))
    return value if value.year > 1970 else None


def _tree(run: Mapping[str, Any]) -> dict[str, _Node]:
    """Full name to node, found from the ids that the server lists as children."""
    tasks = [t for t in (run.get("run_details") or {}).get("task_details") or () if t.get("display_name")]
    children = {id(task): [c["pod_name"] for c in task.get("child_tasks") or () if c.get("pod_name")] for task in tasks}
    ids = {child for listed in children.values() for child in listed}
    if not ids:
        return {}
    workflow = next(iter(ids)).rpartition("-")[0]
    displayed = {str(task["display_name"]) for task in tasks}
    suffixes = {match[0] for name in displayed if (match := re.search(r"\([\d:]+\)$", name))}
    nodes = {workflow: _Node(name=workflow, id=workflow)}
    todo = [workflow]
    while todo:
        parent = todo.pop()
        for name in (*(f"{parent}.{one}" for one in displayed), *(parent + suffix for suffix in suffixes)):
            if name not in nodes and (key := node_id(workflow, name)) in ids:
                nodes[name] = _Node(name=name, id=key)
                todo.append(name)
    _identify(nodes, tasks, children)
    return nodes


def _identify(
    nodes: Mapping[str, _Node], tasks: Sequence[Mapping[str, Any]], children: Mapping[int, list[str]]
) -> None:
    """Find the server's entry of each node: by its children; an entry without children by name and time."""
    by_id = {node.id: node.name for node in nodes.values()}
    by_display: dict[str, list[_Node]] = defaultdict(list)
    for node in nodes.values():
        by_display[_display(node.name)].append(node)
    leaves = []
    for task in tasks:
        below = [by_id[child] for child in children[id(task)] if child in by_id]
        owners = [
            node
            for node in by_display[str(task["display_name"])]
            if any(name.startswith((f"{node.name}.", f"{node.name}(")) for name in below)
            or any(_scope(name) == _scope(node.name) for name in below)
        ]
        if owners:
            owners[0].task = task
        else:
            leaves.append(task)
    for must_fit in (True, False):
        for task in list(leaves):
            free = [node for node in by_display[str(task["display_name"])] if not node.task]
            match = next((node for node in free if not must_fit or _fits(task, nodes.get(_parent(node.name)))), None)
            if match is not None:
                match.task = task
                leaves.remove(task)


def _fits(task: Mapping[str, Any], parent: _Node | None) -> bool:
    """Whether an entry without children may be the only attempt, or the executor, of a node."""
    if parent is None or not parent.task:
        return False
    same_time = task.get("start_time") == parent.task.get("start_time")
    return same_time and (task.get("state") == parent.state or task.get("state") in ("SKIPPED", "PENDING"))


def _display(name: str) -> str:
    """The last part of a full name, as Argo shows it. An exit handler is shown with the task that it follows."""
    *_, task, last = name.split(".") if "." in name else ("", name)
    return f"{task}.{last}" if last.startswith("onExit") else last


def _parent(name: str) -> str:
    """The node above: of an attempt the node that is tried, of another node the attempt that contains it."""
    return name[: name.rindex("(")] if name.endswith(")") else name.rpartition(".")[0]


def _scope(name: str) -> str:
    """The node that contains a node and its siblings."""
    while name.endswith(")"):
        name = name[: name.rindex("(")]
    return name.rpartition(".")[0]


def _attempts(name: str) -> list[int]:
    """The numbers of the attempts in a full name, the outermost first."""
    return [int(number) for number in re.findall(r"\((\d+)\)", name)]


def _step_of(name: str) -> tuple[str | None, int | None]:
    """The step whose node or driver has this full name, and the index of its fold in the loop; None: no step's."""
    last = name.rpartition(".")[2].removesuffix("-driver").replace("-", "_")
    if last not in STEPS:
        return None, None
    loops = _ITERATION.findall(name)
    return last, int(loops[-1]) if loops and last in _PER_FOLD else None


def clock(seconds: float | None) -> str:
    """`3:12` or `1:03:12`; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def lines_of(steps: Sequence[Step], more: str) -> Iterator[str]:
    """One line a step, errors indented below it. `more`: the command that prints a whole log."""
    width = max((len(one.name) for one in steps), default=0)
    for one in steps:
        tries = f", attempt {one.attempts}" if one.attempts > 1 else ""
        is_error = one.state == "failed"
        reason = f": {one.error}" if one.error and not is_error else ""
        yield f"  {one.name:{width}}  {one.state}{reason} {clock(one.seconds)}{tries}".rstrip()
        if one.error and is_error:
            yield from (f"      {line}" for line in _shortened(one.error, more))


def _shortened(text: str, more: str) -> list[str]:
    """At most 12 lines of an error; the last two hold the rule and the hint."""
    lines = text.splitlines()
    if len(lines) <= _SHOWN:
        return lines
    return [*lines[: _SHOWN - 3], f"  ... {len(lines) - _SHOWN + 1} more lines: {more}", *lines[-2:]]
