"""The expectation suite: readable rules, checked by Great Expectations. Each finding says how to fix the data."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distilldsm.core.errors import ConfigError, did_you_mean
from distilldsm.core.mapping import from_mapping, load_yaml
from distilldsm.data.dataset import INDEX
from distilldsm.validation.case_table import CaseTable, Column, show

Severity = Literal["error", "warning"]
BETWEEN = "expect_column_values_to_be_between"
SCHEMA_VERSION = 1
_RESERVED = frozenset(
    {
        "id", "meta", "notes", "result_format", "description", "catch_exceptions", "rendered_content", "severity",
        "windows", "batch_id", "column",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of the suite."""

    rule: str
    """Name, unique in the suite."""
    expectation: str
    """A core expectation of Great Expectations 1.x, e.g. `expect_column_values_to_be_between`."""
    column: str | None = None
    """Column of the case table. Omitted for expectations on the whole table or on several columns."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the expectation, e.g. `min_value: 0`."""
    severity: Severity
    """`error`: the case cannot be used. `warning`: the case can be used, but somebody should look at it."""
    message: str
    """What is wrong if the rule is broken."""
    hint: str
    """How to fix it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns the rule reads."""
        named = [self.column, self.kwargs.get("column_A"), self.kwargs.get("column_B")]
        return tuple(str(c) for c in (*named, *self.kwargs.get("column_list", ())) if c is not None)

    @property
    def allowed(self) -> str:
        """What the rule allows, in words."""
        k = self.kwargs
        if self.expectation.endswith("_to_be_between"):
            what = self.expectation.removeprefix("expect_").removesuffix("_to_be_between")
            subject = "" if self.expectation == BETWEEN else what.replace("_", " ") + " "
            low = f"{'above' if k.get('strict_min') else 'at least'} {k.get('min_value')}"
            high = f"{'below' if k.get('strict_max') else 'at most'} {k.get('max_value')}"
            parts = [text for key, text in (("min_value", low), ("max_value", high)) if k.get(key) is not None]
            if len(parts) == 2 and k["min_value"] == k["max_value"]:
                return f"{subject}exactly {k['min_value']}"
            return subject + ", ".join(parts)
        if self.expectation == "expect_column_values_to_be_null":
            return "none"
        if self.expectation == "expect_column_values_to_be_in_set":
            return "one of " + ", ".join(str(v) for v in k.get("value_set", ()))
        words = self.expectation.removeprefix("expect_").replace("_", " ")
        return words + (f" ({', '.join(f'{key}: {value}' for key, value in k.items())})" if k else "")


@dataclass(frozen=True, kw_only=True)
class _SuiteFile:
    schema_version: int
    rules: tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Checked rules: they fit the case table's columns, and Great Expectations accepts them."""

    path: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One broken rule in one file."""

    case: str | None
    """None if the rule is about the whole data set."""
    file: str
    """Relative to the data set's root, with forward slashes."""
    rule: str
    severity: Severity
    seen: str
    allowed: str
    message: str
    hint: str


def load_suite(
    path: str | os.PathLike[str],
    columns: Sequence[Column],
    bounds: Mapping[str, tuple[float | None, float | None]],
) -> Suite:
    """Read a suite, add the data set's own bounds, and check that every rule can run.

    Args:
        path: the suite's YAML file.
        columns: the case table's columns.
        bounds: column to [low, high]; None: no limit. They replace the suite's between-expectations on that column;
            [None, None] removes these and sets no limit.

    Raises:
        ConfigError: unknown key, column or expectation, arguments that the expectation does not accept, a rule name
            that is used twice, or impossible bounds.
    """
    where = os.fspath(path)
    loaded = load_yaml(Path(path), hint="correct validate.suite; conf/expectations.yaml is the shipped one")
    parsed = from_mapping(_SuiteFile, loaded, where=where)
    if parsed.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            "unknown schema version", where=where, seen=parsed.schema_version, rule=f"schema_version: {SCHEMA_VERSION}"
        )
    kinds = {c.name: c.kind for c in columns}
    rules = [r for r in parsed.rules if not (r.expectation == BETWEEN and r.column in bounds)]
    rules += [
        _bounds_rule(column, low, high, kinds) for column, (low, high) in bounds.items() if (low, high) != (None, None)
    ]
    names: set[str] = set()
    demands: dict[str, str] = {}
    for rule in rules:
        _check_rule(rule, kinds, f"{where}: rule '{rule.rule}'")
        if rule.rule in names:
            raise ConfigError("two rules have the same name", where=where, seen=rule.rule, hint="rename one")
        demand = repr((rule.expectation, rule.column, sorted(rule.kwargs.items(), key=lambda item: item[0])))
        if demand in demands:
            raise ConfigError(
                "two rules demand the same", where=where, seen=f"{demands[demand]}, {rule.rule}", hint="remove one"
            )
        names.add(rule.rule)
        demands[demand] = rule.rule
    suite = Suite(path=where, rules=tuple(rules))
    _expectations(suite)
    return suite


def _bounds_rule(column: str, low: float | None, high: float | None, kinds: Mapping[str, str]) -> Rule:
    where = f"validate.bounds.{column}"
    if column not in kinds:
        raise _unknown_column(column, kinds, where)
    if kinds[column] != "number":
        raise ConfigError("bounds are for numbers only", where=where, seen=f"{column} holds text")
    if low is not None and high is not None and low > high:
        raise ConfigError("has an impossible value", where=where, seen=[low, high], rule="[low, high]")
    limits = {key: value for key, value in (("min_value", low), ("max_value", high)) if value is not None}
    return Rule(
        rule=f"bounds_{column}",
        expectation=BETWEEN,
        column=column,
        kwargs=limits,
        severity="error",
        message=f"{column} lies outside the bounds set for this data set",
        hint=f"check the case, or correct {where}",
    )


def _unknown_column(column: str, kinds: Mapping[str, str], where: str) -> ConfigError:
    return ConfigError(
        "unknown column of the case table",
        where=where,
        seen=column,
        rule="one of " + ", ".join(kinds),
        hint=did_you_mean(column, kinds),
    )


def _check_rule(rule: Rule, kinds: Mapping[str, str], where: str) -> None:
    for column in rule.columns:
        if column not in kinds:
            raise _unknown_column(column, kinds, where)
    reserved = sorted(_RESERVED & set(rule.kwargs))
    if reserved:
        raise ConfigError(
            f"'{reserved[0]}' is no argument of an expectation",
            where=where,
            hint="'column' and 'severity' stand beside 'kwargs'; leave the others out",
        )


@contextmanager
def _great_expectations() -> Iterator[Any]:
    """Import the library (only here, because it takes seconds), without its log lines."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import great_expectations

            yield great_expectations
    finally:
        logger.setLevel(level)


def _expectations(suite: Suite) -> list[Any]:
    """One expectation object per rule, in order."""
    with _great_expectations():
        from great_expectations.exceptions import ExpectationNotFoundError
        from great_expectations.expectations.registry import (
            get_expectation_impl,
            list_registered_expectation_implementations,
        )

        built = []
        for rule in suite.rules:
            where = f"{suite.path}: rule '{rule.rule}'"
            try:
                kind = get_expectation_impl(rule.expectation)
            except ExpectationNotFoundError:
                raise _unknown_expectation(
                    rule.expectation, list_registered_expectation_implementations(), where
                ) from None
            column = {} if rule.column is None else {"column": rule.column}
            try:
                notes = f"{rule.rule} ({rule.severity}): {rule.message}. Hint: {rule.hint}"
                built.append(kind(**column, **rule.kwargs, meta={"rule": rule.rule}, notes=notes))
            except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
                raise ConfigError(
                    f"{rule.expectation} does not take these arguments",
                    where=where,
                    seen=f"column {rule.column}, kwargs {dict(rule.kwargs)}",
                    rule=" ".join(str(error).split())[:300],
                ) from None
        return built


def _unknown_expectation(name: str, known: Sequence[str], where: str) -> ConfigError:
    return ConfigError(
        "unknown expectation",
        where=where,
        seen=name,
        rule="a core expectation of Great Expectations 1.x, e.g. " + BETWEEN,
        hint=did_you_mean(name, known),
    )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of running the suite on a case table."""

    findings: tuple[Finding, ...]
    """One per rule, case and file. Errors come first, then the order of the suite and of the cases."""
    outcome: Any
    """Great Expectations' ExpectationSuiteValidationResult."""
    expectations: Any
    """Great Expectations' ExpectationSuite."""

    def write_data_docs(self, folder: Path, *, name: str) -> None:
        """Write Great Expectations' own pages into a new folder; see data_docs.py."""
        from distilldsm.validation.data_docs import write_data_docs

        with _great_expectations():
            write_data_docs(folder, self.outcome, self.expectations, name=name)


def check_table(table: CaseTable, suite: Suite) -> tuple[Finding, ...]:
    """The findings of `run_suite`."""
    return run_suite(table, suite).findings


def run_suite(table: CaseTable, suite: Suite) -> Checked:
    """Run the suite on the case table.

    Raises:
        ConfigError: a rule cannot be evaluated on its column, e.g. numeric limits on text.
    """
    expectations = _expectations(suite)
    with _great_expectations() as gx:
        from great_expectations.data_context.types.base import ProgressBarsConfig

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        batches = context.data_sources.add_pandas("cases").add_dataframe_asset("cases")
        batch = batches.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table.frame()})
        expectation_suite = gx.ExpectationSuite(name="suite", expectations=expectations)
        outcome = batch.validate(
            expectation_suite,
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["case"]},
        )
    results = {result.expectation_config.meta["rule"]: result for result in outcome.results}
    order = {case: k for k, case in enumerate(table.by_case)}
    findings: list[Finding] = []
    for rule in suite.rules:
        of_rule = list(_findings(rule, results[rule.rule], table, suite.path))
        findings += sorted(of_rule, key=lambda f: order.get(f.case or "", -1))
    ordered = tuple(sorted(findings, key=lambda f: f.severity != "error"))
    return Checked(findings=ordered, outcome=outcome, expectations=expectation_suite)


def _findings(rule: Rule, result: Any, table: CaseTable, path: str) -> Iterator[Finding]:
    if result.success:
        return
    raised = [
        info["exception_message"] for info in _exceptions(result.exception_info or {}) if info.get("raised_exception")
    ]
    if raised:
        raise ConfigError(
            "cannot be evaluated",
            where=f"{path}: rule '{rule.rule}'",
            seen=f"{rule.expectation} on {', '.join(rule.columns) or 'the table'}",
            rule=" ".join(str(raised[0]).split())[:300],
        )
    common: dict[str, Any] = {
        "rule": rule.rule,
        "severity": rule.severity,
        "allowed": rule.allowed,
        "message": rule.message,
        "hint": rule.hint,
    }
    unexpected = result.result.get("unexpected_index_list")
    if unexpected and {c.source for c in table.columns if c.name in rule.columns} == {"dataset"}:
        values = table.by_case[str(unexpected[0]["case"])].values  # the same for all cases
        yield Finding(case=None, file=INDEX, seen=", ".join(show(values.get(c)) for c in rule.columns), **common)
        return
    if not unexpected:  # an expectation on the whole column or table
        observed = result.result.get("observed_value")
        yield Finding(case=None, file=INDEX, seen=f"{', '.join(rule.columns) or 'table'}: {observed}", **common)
        return
    for row in unexpected:
        case = str(row["case"])
        if len(rule.columns) == 1:
            for detail in table.details(case, rule.columns[0]):
                yield Finding(case=case, file=detail.file, seen=detail.seen, **common)
        else:
            values = table.by_case[case].values
            seen = ", ".join(f"{c} {show(values.get(c))}" for c in rule.columns)
            yield Finding(case=case, file=table.details(case, rule.columns[0])[0].file, seen=seen, **common)


def _exceptions(info: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Great Expectations reports one exception as a mapping, and several as a mapping of mappings."""
    if "raised_exception" in info:
        yield info
        return
    yield from (inner for inner in info.values() if isinstance(inner, Mapping))
