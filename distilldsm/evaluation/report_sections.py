"""The sentences and table cells of an evaluation's page, made from the numbers.

The page itself is the template evaluation.html. Each function here makes the content of one section.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distilldsm.evaluation.metrics import METRICS, VOLUMES, main_metrics
from distilldsm.evaluation.postprocess import Postprocessing
from distilldsm.evaluation.statistics import Agreement, bland_altman
from distilldsm.report.page import count, named, number

LOW_DICE = 0.7
"""A structure with a lower Dice counts as failed."""
TIMES = " \u00d7 "
LAST_PART, STILL_RISING = 0.75, 0.003
"""The curve of held-out Dice still rises if it gained this much since this share of the epochs."""
LARGE_GAP = 0.02
"""Training cases that are better by this much in Dice show that more cases would help."""
ROWS_SHOWN = 5000
"""The table of cases shows at most this many rows, the worst first. More rows make a page slow; cases.csv has all."""

Rows = Sequence[Mapping[str, Any]]


def networks_named(networks: Sequence[Mapping[str, Any]]) -> str:
    """Names and options of networks as text; equal networks are counted: `2 x distill_dsm (width=1) + unet2d`."""
    texts = []
    for network in networks:
        options = ", ".join(f"{key}={value}" for key, value in network["options"].items())
        texts.append(f"{network['name']} ({options})" if options else str(network["name"]))
    return " + ".join(text if n == 1 else f"{n}{TIMES}{text}" for text, n in Counter(texts).items())


def mean_dice(rows: Rows) -> dict[str, float]:
    """Mean Dice over the labels of each case, the worst case first."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.mean(values)) for case, values in cases.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def overview(rows: Rows, summary: Mapping[str, Any], intervals: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the first sentence, the most important ones as cards (name, value, remark), and findings."""
    labels, mean = summary["labels"], summary["mean"]
    ranked, low = mean_dice(rows), _low_cases(rows)
    dice = sorted(((of["dice"]["mean"], label) for label, of in labels.items()), key=lambda pair: pair[0])
    weakest, best = ({"label": label, "dice": value} for value, label in (dice[0], dice[-1]))
    worst = next(iter(ranked))

    def card(name: str, metric: str, value: float | None, interval: Sequence[float] | None) -> tuple[str, str, str]:
        digits = min(METRICS[metric].digits, 3)
        extra = f"95 % interval {_between(interval, digits)}" if interval else "too few cases for an interval"
        return name, f"{number(value, digits)} {METRICS[metric].unit}".rstrip(), extra

    of_weakest = intervals["labels"][weakest["label"]]["dice"]
    return {
        "cases": len(ranked),
        "mean": mean["dice"],
        "interval": _between(intervals["mean"]["dice"], 3) if intervals["mean"]["dice"] else "",
        "weakest": weakest,
        "best": best if len(labels) > 1 else None,
        "worst": {"case": worst, "dice": ranked[worst]},
        "low": len(low),
        "low_dice": f"{LOW_DICE:g}",
        "cards": [
            *(card(f"mean {m.title}", m.name, mean[m.name], intervals["mean"][m.name]) for m in main_metrics()),
            card(f"lowest label: {weakest['label']}", "dice", weakest["dice"], of_weakest),
            (f"cases below Dice {LOW_DICE:g}", f"{len(low)} of {len(ranked)}", named(low)),
        ],
        "findings": observations(rows, summary),
    }


def observations(rows: Rows, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Findings as plain sentences; the first item of each pair is "good", "bad" or empty."""
    labels = list(summary["labels"])
    found: list[tuple[str, str]] = []
    missed = [row for row in rows if row["volume_truth_ml"] > 0 and row["volume_predicted_ml"] == 0]
    invented = [row for row in rows if row["volume_truth_ml"] == 0 and row["volume_predicted_ml"] > 0]
    for what, of in (("Missed altogether", missed), ("Found where there is none", invented)):
        if of:
            names = [f"{row['label']} in {row['case']}" for row in of]
            found.append(("bad", f"{what}: {named(names)}."))
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
        for label in labels
        if not any(r["volume_truth_ml"] or r["volume_predicted_ml"] for r in rows if r["label"] == label)
    ]
    if nowhere:
        text = "In no held-out case, neither in truth nor in prediction: "
        found.append(("bad", f"{text}{named(nowhere)}. By the convention its Dice is 1, and counts in the mean."))
    agreements = {label: one for label, one in volume_agreement(rows, labels).items() if one.mean_truth}
    if agreements:
        label, one = max(agreements.items(), key=lambda item: abs(item[1].share))
        how = "larger" if one.bias > 0 else "smaller"
        text = (
            f"Volumes: {label} is on average predicted {abs(one.share):.1%} {how} than it is ({one.bias:+.2f} ml); "
            f"95 % of the errors are expected within {one.low:+.2f} to {one.high:+.2f} ml."
        )
        found.append(("bad" if abs(one.share) > 0.1 else "", text))
    found += [("bad", text) for text in _small_is_worse(rows, labels)]
    return found


def _small_is_worse(rows: Rows, labels: Sequence[str]) -> list[str]:
    """Labels with clearly lower scores for small structures: Spearman's rank correlation of Dice and volume."""
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


def volume_agreement(rows: Rows, labels: Sequence[str]) -> dict[str, Agreement]:
    """Label to agreement of its volumes (ml), without labels that have fewer than two cases."""
    of = {label: [row for row in rows if row["label"] == label] for label in labels}
    found = {label: bland_altman(*([row[name] for row in of[label]] for name in VOLUMES)) for label in labels}
    return {label: agreement for label, agreement in found.items() if agreement is not None}


def agreement_lines(rows: Rows, labels: Sequence[str]) -> list[tuple[Any, ...]]:
    """Bias and limits of agreement of the volumes, one line per label."""
    return [
        (
            label,
            f"{one.mean_truth:.2f}",
            f"{one.bias:+.3f}",
            f"{one.share:+.1%}" if one.mean_truth else "-",
            f"{one.low:+.3f}",
            f"{one.high:+.3f}",
            one.cases,
        )
        for label, one in volume_agreement(rows, labels).items()
    ]


def score_lines(summary: Mapping[str, Any], intervals: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of every label with their intervals, and the mean of the labels."""

    def cells(means: Mapping[str, Any], of: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [
            (metric.text(means[name]), _between(of[name], min(metric.digits, 3)) if of[name] else "")
            for name, metric in METRICS.items()
        ]

    lines = []
    for label, scores in summary["labels"].items():
        means, dice = {name: scores[name]["mean"] for name in METRICS}, scores["dice"]
        spread = (number(dice["sd"], 3), number(dice["median"]), (number(dice["worst"]), str(dice["worst_case"])))
        lines.append([label, *cells(means, intervals["labels"][label]), *spread, dice["cases"]])
    return {
        "head": ["label", *(metric.heading for metric in METRICS.values()), "sd of Dice", "median", "worst", "cases"],
        "rows": lines,
        "mean": ["mean", *cells(summary["mean"], intervals["mean"]), "", "", "", ""],
        **{key: intervals[key] for key in ("method", "resamples", "seed")},
    }


def largest_component(found: Postprocessing | None) -> dict[str, Any] | None:
    """Effect of keeping only the largest connected component. The page's other scores do not use it."""
    if found is None:
        return None
    lines = [
        (name, "yes" if one.keep_largest else "no", one.reason, f"{one.cases_changed} of {found.cases}")
        for name, one in found.labels.items()
    ]
    return {"rows": lines, "not_tried": found.not_tried}


def case_lines(rows: Rows) -> dict[str, Any]:
    """All scores of all cases and labels, lowest Dice first."""
    ranked = sorted(rows, key=lambda row: row["dice"])[:ROWS_SHOWN]
    return {
        "head": ["case", "label", *(metric.heading for metric in METRICS.values()), "true ml", "predicted ml"],
        "rows": [
            [
                row["case"],
                row["label"],
                *(metric.text(row[name]) for name, metric in METRICS.items()),
                *(number(row[name], 2) for name in VOLUMES),
            ]
            for row in ranked
        ],
        "total": len(rows),
    }


def data_lines(fingerprint: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Facts about all cases of the data set."""
    if fingerprint is None:
        return None

    def line(name: str, spread: Mapping[str, Sequence[float]], form: str) -> tuple[str, ...]:
        return name, *(TIMES.join(format(v, form) for v in spread[key]) for key in ("min", "median", "max"))

    spreads = [
        line("shape, voxels", fingerprint["shape"], ".0f"),
        line("spacing, mm", fingerprint["spacing_mm"], ".3f"),
        line("voxels that are not zero", fingerprint["nonzero_fraction"], ".1%"),
        *(line(f"volume of {label}, ml", of, ".4g") for label, of in fingerprint["label_volumes_ml"].items()),
    ]
    intensity = [
        (channel, *(_short(v) for v in (one["mean"], one["sd"], *one["percentiles"])))
        for channel, one in fingerprint["foreground_intensity"].items()
    ]
    percentiles = [f"{p:g} %" for p in fingerprint["percentiles"]]
    return {"cases": fingerprint["cases"], "spread": spreads, "percentiles": percentiles, "intensity": intensity}


def next_steps(history: Rows) -> dict[str, Any]:
    """Dice of training and held-out cases at the end of the training, and what they say about the next one.

    Both are measured on the network's grid, with the same weights. If the curve no longer rises, a large difference
    means too few cases, and a small one too small a network or too coarse a grid.

    Args:
        history: the records of the epochs.
    """
    scored = [(entry["epoch"], entry["val_dice_mean"]) for entry in history if "val_dice_mean" in entry]
    last = history[-1] if history else {}
    trained, held_out = last.get("train_dice", {}), last.get("val_dice", {})
    rows = [
        [name, *(number(value, 3) for value in (dice, held_out[name], dice - held_out[name]))]
        for name, dice in trained.items()
    ]
    before = [dice for epoch, dice in scored if epoch <= LAST_PART * history[-1]["epoch"]]
    if not before:
        return {"rows": rows, "advice": ""}
    rise = scored[-1][1] - before[-1]
    text = f"In the last quarter of the epochs, the mean Dice of held-out cases changed by {rise:+.3f}. "
    if rise >= STILL_RISING:
        advice = (
            "It still rises: train longer (a larger train.budget, or distilldsm train --continue-for). As many epochs "
            f"again may gain up to about {rise:.3f}."
        )
    elif not trained:
        advice = "It hardly rises: training longer gains little."
    elif (gap := last["train_dice_mean"] - scored[-1][1]) >= LARGE_GAP:
        advice = (
            f"It hardly rises, and training cases score {gap:.3f} better: more training cases help most, and could "
            "gain up to that difference. Stronger augmentation (train.augment) is the cheaper try."
        )
    else:
        advice = (
            "It hardly rises, and training cases score about the same: neither length nor more cases are missing. Try "
            "a larger network (model=distill_dsm_m) or a finer spacing (a larger train.budget)."
        )
    return {"rows": rows, "advice": text + advice}


def plan_facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The main values of the plan."""
    schemes = zip(plan["channels"], plan["normalisation"], strict=False)
    return {
        "depth axis": plan["depth_axis"],
        "spacing of the network (depth, height, width)": TIMES.join(f"{v:.3g}" for v in plan["target_spacing_mm"])
        + " mm",
        "patch (depth, height, width)": TIMES.join(str(v) for v in plan["patch_size"]),
        "batch": plan["batch_size"],
        "normalisation": ", ".join(f"{channel['name']}: {rule['scheme']}" for channel, rule in schemes),
    }


def validation_lines(validation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The number of checked cases, and one line per rule with findings: errors first, then by number of findings."""
    if validation is None:
        return None
    found = Counter((finding["severity"], finding["rule"]) for finding in validation["findings"])
    messages = {rule["rule"]: rule["message"] for rule in validation["suite"]}
    lines = []
    for (severity, rule), many in sorted(found.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        cases = [one["case"] for one in validation["findings"] if one["rule"] == rule and one["case"]]
        lines.append((rule, severity, many, messages.get(rule, ""), named(list(dict.fromkeys(cases)))))
    counts = validation["counts"]
    text = (
        f"{count(counts['cases'], 'case')} of {count(counts['patients'], 'patient')} checked against "
        f"{count(len(validation['suite']), 'rule')}: {counts['accepted']} accepted, {counts['excluded']} excluded, "
        f"{count(counts['errors'], 'error')}, {count(counts['warnings'], 'warning')}."
    )
    return {
        "text": text,
        "rows": lines,
        "excluded": {case: ", ".join(rules) for case, rules in validation["excluded"].items()},
    }


def cost_lines(prediction: Mapping[str, Any] | None, training: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Seconds and memory: one column for training and one for prediction.

    Args:
        prediction: from `prediction_cost`; None if nothing was predicted.
        training: from `training_cost`.
    """
    prediction = prediction or {}

    def text(of: Mapping[str, Any], key: str, form: str = "", unit: str = "") -> str:
        value = of.get(key)
        return "-" if value is None else f"{value:{form}}{unit}"

    def both(title: str, key: str, form: str = "", unit: str = "") -> tuple[str, str, str]:
        return title, text(training, key, form, unit), text(prediction, key, form, unit)

    return [
        ("seconds", text(training, "seconds", ",.0f"), text(prediction, "seconds", ",.1f")),
        ("seconds per epoch, per volume (median)", text(training, "seconds_per_epoch", ".2f"),
         text(prediction, "seconds_per_volume", ".3f")),
        ("epochs, volumes", text(training, "epochs"), str(len(prediction.get("cases", ())))),
        both("peak memory", "peak_memory_gb", ".2f", " GB"),
        both("peak GPU memory", "peak_gpu_memory_gb", ".2f", " GB"),
        both("device", "device_name"),
        both("threads", "threads"),
        ("processes", text(training, "processes"), "1"),
        ("precision", text(training, "precision"), "-"),
    ]  # fmt: skip


def _low_cases(rows: Rows) -> list[str]:
    ranked = sorted((row for row in rows if row["dice"] < LOW_DICE), key=lambda row: row["dice"])
    return list(dict.fromkeys(row["case"] for row in ranked))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _between(interval: Sequence[float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
