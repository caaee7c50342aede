"""Runs the expectation suite over the case table with Great Expectations, and turns what fails into findings."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distilldsm.data.dataset import DatasetIndex
from distilldsm.errors import ConfigError
from distilldsm.params import from_mapping, load_yaml

Severity = Literal["error", "warning"]
_LABEL_COLUMNS = ("label_", "undeclared", "missing", "foreground")
"""Prefixes of the columns that speak of the label file."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One expectation on one column."""

    rule: str
    """Its name in findings."""
    column: str
    expectation: str
    """A column expectation of Great Expectations, e.g. expect_column_values_to_be_between."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments; `$CHANNELS` stands for the data set's number of channels."""
    severity: Severity = "error"
    message: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    schema_version: int = 1
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        names = [rule.rule for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("a rule appears twice", seen=name)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with one case."""

    case: str
    file: str
    rule: str
    severity: Severity
    message: str
    seen: str
    allowed: str
    mend: str

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.message}\n    seen: {self.seen}; rule {self.rule}: {self.allowed}; mend: {self.mend}"
        )


def load_suite(path: str | os.PathLike[str]) -> Suite:
    """Read a suite.

    Raises:
        ConfigError: unknown keys or missing parts, by file and key.
    """
    return from_mapping(Suite, load_yaml(path), where=os.fspath(path))


def bound_rules(bounds: Mapping[str, tuple[float | None, float | None]]) -> list[Rule]:
    """Rules of a data set's own bounds: column to [low, high]."""
    return [
        Rule(
            rule=f"bounds.{column}",
            column=column,
            expectation="expect_column_values_to_be_between",
            arguments={"min_value": low, "max_value": high},
            message=f"{column} is outside the data set's bounds",
            mend="correct the case, leave it out, or widen validate.bounds",
        )
        for column, (low, high) in bounds.items()
    ]


def check(
    rows: Sequence[Mapping[str, Any]], suite: Suite, bounds: Mapping, index: DatasetIndex, where: str
) -> list[Finding]:
    """Findings of all cases against all rules, by case.

    A value that is missing because the file could not be read is no finding of other rules than the one on reading.

    Raises:
        ConfigError: a rule names an unknown column or expectation, or its arguments are refused.
    """
    rules = [*suite.rules, *bound_rules(bounds)]
    for rule in rules:
        if rule.column not in rows[0]:
            raise ConfigError(
                f"rule '{rule.rule}' names an unknown column",
                where=where,
                seen=rule.column,
                rule="one of " + ", ".join(rows[0]),
            )
    results = _run_great_expectations(rows, rules, index, where)
    findings = []
    for rule, failed in zip(rules, results, strict=True):
        for position in failed:
            row = rows[position]
            file = row["label"] if rule.column.startswith(_LABEL_COLUMNS) else row["image"]
            findings.append(
                Finding(
                    case=row["case"],
                    file=str(file),
                    rule=rule.rule,
                    severity=rule.severity,
                    message=rule.message,
                    seen=_show(row[rule.column]),
                    allowed=_allowed(rule, index),
                    mend=rule.mend,
                )
            )
    return sorted(findings, key=lambda f: (f.case, f.severity, f.rule))


def _run_great_expectations(
    rows: Sequence[Mapping[str, Any]], rules: Sequence[Rule], index: DatasetIndex, where: str
) -> list[list[int]]:
    """For each rule the positions of the rows that break it."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    import pandas as pd

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    frame = pd.DataFrame(list(rows)).assign(_position=range(len(rows)))
    asset = context.data_sources.add_pandas("cases").add_dataframe_asset("cases")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(name="cases"))
    for number, rule in enumerate(rules):
        suite.add_expectation(_expectation(gx, rule, number, index, where))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="cases", data=batch, suite=suite))
    result = definition.run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["_position"]},
    )
    failed: list[list[int]] = [[] for _ in rules]
    for one in result.results:
        number = one.expectation_config.meta["number"]
        if one.exception_info and one.exception_info.get("raised_exception"):
            raise ConfigError(
                f"rule '{rules[number].rule}' cannot be evaluated",
                where=where,
                seen=str(one.exception_info.get("exception_message"))[:300],
            )
        indices = (one.result or {}).get("unexpected_index_list") or []
        failed[number] = [int(entry["_position"]) for entry in indices]
    return failed


def _expectation(gx: Any, rule: Rule, number: int, index: DatasetIndex, where: str) -> Any:
    name = "".join(part.capitalize() for part in rule.expectation.split("_"))
    kind = getattr(gx.expectations, name, None)
    if kind is None:
        raise ConfigError(
            f"rule '{rule.rule}' names an unknown expectation",
            where=where,
            seen=rule.expectation,
            rule="a column expectation of Great Expectations, e.g. expect_column_values_to_be_between",
        )
    try:
        return kind(column=rule.column, meta={"number": number}, **_filled(rule.arguments, index))
    except Exception as error:  # pydantic's own error class depends on the version
        raise ConfigError(
            f"rule '{rule.rule}' has impossible arguments",
            where=where,
            seen=f"{dict(rule.arguments)}: {str(error)[:200]}",
        ) from None


def _filled(value: Any, index: DatasetIndex) -> Any:
    if isinstance(value, Mapping):
        return {k: _filled(v, index) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(v, index) for v in value]
    return len(index.channels) if value == "$CHANNELS" else value


def _allowed(rule: Rule, index: DatasetIndex) -> str:
    arguments = _filled(rule.arguments, index)
    if "value_set" in arguments:
        return " or ".join(repr(v) if v == "" else str(v) for v in arguments["value_set"]).replace("''", "none")
    low, high = arguments.get("min_value"), arguments.get("max_value")
    parts = []
    if low is not None:
        parts.append(f"{'above' if arguments.get('strict_min') else 'at least'} {low}")
    if high is not None:
        parts.append(f"{'below' if arguments.get('strict_max') else 'at most'} {high}")
    return ", ".join(parts) or rule.expectation.removeprefix("expect_column_values_to_").replace("_", " ")


def _show(value: Any) -> str:
    if isinstance(value, float):
        return "undefined" if math.isnan(value) else f"{value:.6g}"
    return str(value)
