"""Parts of an evaluation's page that say something in words and tables: what is good, what fails, on what data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import Postprocessing
from distilldsm.evaluation.statistics import METHOD, bland_altman
from distilldsm.report.old_page import facts_table, number, table

LOW_DICE = 0.7
"""Below it a structure is counted as failed."""
TIMES = " \u00d7 "
NAMED = 5
"""So many cases are named in a sentence."""

_ASKED_FOR = "Not in the scores above; <code>distilldsm predict --postprocess</code> does what is kept here"

Rows = Sequence[Mapping[str, Any]]


def mean_dice(rows: Rows) -> dict[str, float]:
    """Mean Dice over the labels of each case, the worst case first."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.mean(values)) for case, values in cases.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def overview(rows: Rows, summary: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    """One sentence, a few large numbers, and what stands out."""
    labels, mean = summary["labels"], summary["mean"]
    ranked, low = mean_dice(rows), _low_cases(rows)
    weakest = min(labels, key=lambda label: labels[label]["dice"]["mean"])
    worst = next(iter(ranked))
    sentence = f"On {_count(len(ranked), 'held-out case')}, mean Dice is <b>{number(mean['dice'], 3)}</b>"
    if intervals["mean"]["dice"]:
        sentence += f" (95 % interval {_between(intervals['mean']['dice'], 3)})"
    if len(labels) > 1:
        best = max(labels, key=lambda label: labels[label]["dice"]["mean"])
        sentence += (
            f"; it is highest for {escape(best)} ({number(labels[best]['dice']['mean'], 3)}) and lowest for "
            f"<b>{escape(weakest)}</b> ({number(labels[weakest]['dice']['mean'], 3)})"
        )
    sentence += (
        f". The worst case is <b>{escape(worst)}</b> (Dice {number(ranked[worst], 3)}). In {len(low)} of {len(ranked)} "
        f"cases a structure is below Dice {LOW_DICE:g}."
    )
    cards = [
        ("mean Dice", number(mean["dice"], 3), _interval_text(intervals["mean"]["dice"], 3)),
        ("mean HD95", f"{number(mean['hd95_mm'], 2)} mm", _interval_text(intervals["mean"]["hd95_mm"], 2)),
        ("mean NSD", number(mean["nsd"], 3), _interval_text(intervals["mean"]["nsd"], 3)),
        (
            f"lowest label: {weakest}",
            number(labels[weakest]["dice"]["mean"], 3),
            _interval_text(intervals["labels"][weakest]["dice"], 3),
        ),
        (f"cases below Dice {LOW_DICE:g}", f"{len(low)} of {len(ranked)}", _named(low)),
    ]
    tiles = "".join(
        f"<div class='card'><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(extra)}</span></div>"
        for name, value, extra in cards
    )
    points = "".join(f"<li class='{kind}'>{escape(text)}</li>" for kind, text in observations(rows, summary))
    return f"<p class='lead'>{sentence}</p><div class='cards'>{tiles}</div><ul class='findings'>{points}</ul>"


def observations(rows: Rows, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands out, as plain sentences; the first of each pair is "good" or "bad"."""
    found: list[tuple[str, str]] = []
    missed = [row for row in rows if row["volume_truth_ml"] > 0 and row["volume_predicted_ml"] == 0]
    invented = [row for row in rows if row["volume_truth_ml"] == 0 and row["volume_predicted_ml"] > 0]
    for what, of in (("Missed altogether", missed), ("Found where there is none", invented)):
        if of:
            names = [f"{row['label']} in {row['case']}" for row in of]
            found.append(("bad", f"{what}: {_named(names)}."))
    if not missed and not invented:
        found.append(("good", "No structure is missed altogether, and none is found where there is none."))
    farthest = max(rows, key=lambda row: row["hd95_mm"])
    found.append(
        (
            "bad" if farthest["dice"] < LOW_DICE else "",
            f"Largest HD95: {farthest['hd95_mm']:.1f} mm, {farthest['label']} in {farthest['case']}.",
        )
    )
    nowhere = [
        label
        for label in summary["labels"]
        if not any(r["volume_truth_ml"] or r["volume_predicted_ml"] for r in rows if r["label"] == label)
    ]
    if nowhere:
        text = "In no held-out case, neither in truth nor in prediction: "
        found.append(("bad", f"{text}{_named(nowhere)}. By the convention its Dice is 1, and counts in the mean."))
    biases = _relative_biases(rows, list(summary["labels"]))
    if biases:
        label, (share, agreement) = max(biases.items(), key=lambda item: abs(item[1][0]))
        how = "larger" if agreement.bias > 0 else "smaller"
        text = (
            f"Volumes: {label} is on average predicted {abs(share):.1%} {how} than it is ({agreement.bias:+.2f} ml); "
            f"95 % of the errors are expected within {agreement.low:+.2f} to {agreement.high:+.2f} ml."
        )
        found.append(("bad" if abs(share) > 0.1 else "", text))
    found += [("bad", text) for text in _small_is_worse(rows, list(summary["labels"]))]
    return found


def _small_is_worse(rows: Rows, labels: Sequence[str]) -> list[str]:
    """Labels of which small structures score clearly lower: Spearman's rank correlation of Dice and volume."""
    from scipy.stats import spearmanr

    texts = []
    for label in labels:
        of = [row for row in rows if row["label"] == label and row["volume_truth_ml"] > 0]
        volumes, scores = [row["volume_truth_ml"] for row in of], [row["dice"] for row in of]
        if len(of) < 10 or len(set(volumes)) < 2 or len(set(scores)) < 2:
            continue
        correlation, p = spearmanr(volumes, scores)
        if correlation > 0.4 and p < 0.05 / len(labels):
            texts.append(
                f"Small structures score lower: {label}, rank correlation of Dice and volume {correlation:.2f}."
            )
    return texts


def _relative_biases(rows: Rows, labels: Sequence[str]) -> dict[str, Any]:
    found = {}
    for label in labels:
        truth, predicted = _volumes(rows, label)
        agreement = bland_altman(truth, predicted)
        if agreement is not None and sum(truth) > 0:
            found[label] = (agreement.bias / float(np.mean(truth)), agreement)
    return found


def scores(summary: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    """Every label's scores with their intervals, and the mean of the labels."""
    names = [metric.heading for metric in METRICS.values()]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("label", *names, "sd of Dice", "median", "worst", "cases"))

    def cells(means: Mapping[str, Any], of: Mapping[str, Any]) -> str:
        text = ""
        for name, metric in METRICS.items():
            interval = f"<i>{_between(of[name], min(metric.digits, 3))}</i>" if of[name] else ""
            text += f"<td>{metric.text(means[name])}{interval}</td>"
        return text

    body = ""
    for label, s in summary["labels"].items():
        dice = s["dice"]
        body += (
            f"<tr><td>{escape(label)}</td>{cells({m: s[m]['mean'] for m in s}, intervals['labels'][label])}"
            f"<td>{number(dice['sd'], 3)}</td><td>{number(dice['median'])}</td>"
            f"<td>{number(dice['worst'])}<i>{escape(str(dice['worst_case']))}</i></td><td>{dice['cases']}</td></tr>"
        )
    foot = f"<tr><th>mean</th>{cells(summary['mean'], intervals['mean'])}<td></td><td></td><td></td><td></td></tr>"
    return (
        f"<div class='scroll'><table class='scores'><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        f"<tfoot>{foot}</tfoot></table></div><p class='small'>Below each mean its 95 % interval: {METHOD}, "
        f"{intervals['resamples']} draws, seed {intervals['seed']}. It tells how far the mean would "
        "move with other cases of the same kind; with few cases it is too narrow, and of other scanners or hospitals "
        "it says nothing.</p>"
    )


def largest_component(found: Postprocessing | None) -> str:
    """What keeping only the largest connected component would change; the scores above are without it."""
    if found is None:
        return ""
    lines = [
        (name, "yes" if one.keep_largest else "no", one.reason, f"{one.cases_changed} of {found.cases}")
        for name, one in found.labels.items()
    ]
    told = table(("of", "kept", "why", "cases changed"), lines, text_columns=(0, 1, 2)) if lines else ""
    note = escape(found.not_tried).capitalize() or _ASKED_FOR
    return f"<h3>Largest component only</h3>{told}<p class='small'>{note}.</p>"


def agreement(rows: Rows, labels: Sequence[str]) -> str:
    """Bias and limits of agreement of the volumes, a line per label."""
    lines = []
    for label in labels:
        truth, predicted = _volumes(rows, label)
        found = bland_altman(truth, predicted)
        if found is None:
            continue
        share = f"{found.bias / np.mean(truth):+.1%}" if sum(truth) > 0 else "-"
        mean_ml = f"{np.mean(truth):.2f}"
        lines.append(
            (label, mean_ml, f"{found.bias:+.3f}", share, f"{found.low:+.3f}", f"{found.high:+.3f}", found.cases)
        )
    if not lines:
        return ""
    head = ("label", "mean true ml", "bias ml", "bias", "lower limit ml", "upper limit ml", "cases")
    return (
        f"{table(head, lines)}<p class='small'>Bias: mean of predicted minus true (full line). 95 % limits of "
        "agreement: bias ± 1.96 standard deviations of the differences (dashed lines).</p>"
    )


def fingerprint_section(fingerprint: Mapping[str, Any] | None, plan: Mapping[str, Any]) -> str:
    """What the data are, all cases of the data set, and what the plan made of it."""
    parts = []
    if fingerprint:
        lines: list[tuple[Any, ...]] = []
        for key, name, digits in (("shape", "shape, voxels", 0), ("spacing_mm", "spacing, mm", 3)):
            spread = fingerprint[key]
            lines.append((name, *(TIMES.join(f"{v:.{digits}f}" for v in spread[k]) for k in ("min", "median", "max"))))
        share = fingerprint["nonzero_fraction"]
        lines.append(("voxels that are not zero", *(f"{share[k][0]:.1%}" for k in ("min", "median", "max"))))
        for label, spread in fingerprint["label_volumes_ml"].items():
            lines.append((f"volume of {label}, ml", *(f"{spread[k][0]:.4g}" for k in ("min", "median", "max"))))
        parts.append(f"<p>All {fingerprint['cases']} cases, not only the held-out ones; axes x, y, z in RAS+.</p>")
        parts.append(table(("", "smallest", "median", "largest"), lines))
        percentiles = [f"{p:g} %" for p in fingerprint["percentiles"]]
        rows = [
            (channel, *(_short(v) for v in (one["mean"], one["sd"], *one["percentiles"])))
            for channel, one in fingerprint["foreground_intensity"].items()
        ]
        parts.append("<h3>Intensity within the structures</h3>")
        parts.append(table(("channel", "mean", "sd", *percentiles), rows))
        parts.append("<p class='small'>Percentiles: the median over cases.</p>")
    schemes = zip(plan["channels"], plan["normalisation"], strict=False)
    facts = {
        "depth axis": plan["depth_axis"],
        "spacing of the network (depth, height, width)": TIMES.join(f"{v:.3g}" for v in plan["target_spacing_mm"])
        + " mm",
        "patch (depth, height, width)": TIMES.join(str(v) for v in plan["patch_size"]),
        "batch": plan["batch_size"],
        "normalisation": ", ".join(f"{channel['name']}: {rule['scheme']}" for channel, rule in schemes),
    }
    return "".join(parts) + f"<h3>Plan</h3>{facts_table(facts)}"


def validation_section(validation: Mapping[str, Any] | None) -> str:
    """How many cases were checked, and what was found."""
    if validation is None:
        return "<p class='small'>No validation report was given to this evaluation.</p>"
    counts, excluded = validation["counts"], validation["excluded"]
    found = Counter((f["severity"], f["rule"]) for f in validation["findings"])
    cases: dict[str, list[str]] = {}
    for finding in validation["findings"]:
        names = cases.setdefault(finding["rule"], [])
        if finding["case"] and finding["case"] not in names:
            names.append(finding["case"])
    messages = {rule["rule"]: rule["message"] for rule in validation["suite"]}
    text = (
        f"<p>{_count(counts['cases'], 'case')} of {_count(counts['patients'], 'patient')} checked against "
        f"{len(validation['suite'])} rules: {counts['accepted']} accepted, {counts['excluded']} excluded, "
        f"{_count(counts['errors'], 'error')}, {_count(counts['warnings'], 'warning')}.</p>"
    )
    if found:
        lines = [
            (rule, severity, many, messages.get(rule, ""), _named(cases[rule]))
            for (severity, rule), many in sorted(found.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        ]
        text += table(("rule", "severity", "findings", "what is wrong", "cases"), lines, text_columns=(0, 1, 3, 4))
    if excluded:
        rows = {case: ", ".join(rules) for case, rules in excluded.items()}
        text += f"<details><summary>Excluded cases</summary>{facts_table(rows)}</details>"
    return text


def cost_section(model: Mapping[str, Any], prediction: Mapping[str, Any] | None, training: Mapping[str, Any]) -> str:
    """Parameters, operations, seconds and memory, a column for training and one for prediction.

    Args:
        model: of model.json.
        prediction: of `cost.prediction_cost`, None where nothing was predicted.
        training: of `cost.training_cost`.
    """
    prediction = prediction or {}

    def text(of: Mapping[str, Any], key: str, form: str = "", unit: str = "") -> str:
        value = of.get(key)
        return "-" if value is None else f"{value:{form}}{unit}"

    lines = [
        ("seconds", text(training, "seconds", ",.0f"), text(prediction, "seconds", ",.1f")),
        ("seconds per epoch, per volume (median)", text(training, "seconds_per_epoch", ".2f"),
         text(prediction, "seconds_per_volume", ".3f")),
        ("epochs, volumes", text(training, "epochs"), str(len(prediction.get("cases", ())))),
        ("peak memory", text(training, "peak_memory_gb", ".2f", " GB"),
         text(prediction, "peak_memory_gb", ".2f", " GB")),
        ("peak GPU memory", text(training, "peak_gpu_memory_gb", ".2f", " GB"),
         text(prediction, "peak_gpu_memory_gb", ".2f", " GB")),
        ("device", text(training, "device_name"), text(prediction, "device_name")),
        ("threads", text(training, "threads"), text(prediction, "threads")),
        ("processes", text(training, "processes"), "1"),
        ("precision", text(training, "precision"), "-"),
    ]  # fmt: skip
    return (
        f"<p>{model['parameters']:,} parameters, {model['macs_per_voxel']:,.0f} multiply-accumulate operations of "
        f"convolutions per voxel.</p>{table(('', 'training', 'prediction'), lines)}"
        "<p class='small'>Training without validation and without reading files, prediction without reading and "
        "writing; memory is that of the main process.</p>"
    )


def _volumes(rows: Rows, label: str) -> tuple[list[float], list[float]]:
    of = [row for row in rows if row["label"] == label]
    return [row["volume_truth_ml"] for row in of], [row["volume_predicted_ml"] for row in of]


def _low_cases(rows: Rows) -> list[str]:
    ranked = sorted((row for row in rows if row["dice"] < LOW_DICE), key=lambda row: row["dice"])
    return list(dict.fromkeys(row["case"] for row in ranked))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _count(many: int, what: str) -> str:
    return f"{many} {what}{'' if many == 1 else 's'}"


def _between(interval: Sequence[float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _interval_text(interval: Sequence[float] | None, digits: int) -> str:
    return f"95 % interval {_between(interval, digits)}" if interval else "too few cases for an interval"
