"""The case table: one row per case with all values that the expectation suite can check; duplicates across cases."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distilldsm.core.machine import budget_bytes
from distilldsm.core.progress import progress
from distilldsm.core.text import csv_cell
from distilldsm.core.workers import worker_count, worker_pool
from distilldsm.data.dataset import INDEX, Case, Channel, DatasetIndex
from distilldsm.io.scan import VOXEL_SHARE
from distilldsm.validation.case_measures import PERCENTILES, measure_case, memory_bytes
from distilldsm.validation.case_row import CaseRow, Detail, Value

if TYPE_CHECKING:
    import pandas as pd

NOISE_AUC = (0.45, 0.55)
"""Areas under the ROC curve from inside to outside a label that mean: no difference."""
SERIAL_BYTES = 100_000_000
"""If measuring takes less memory in total, starting processes costs more than it saves."""


ColumnSource = Literal["image", "label", "dataset"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the case table."""

    name: str
    kind: Literal["number", "text"]
    source: ColumnSource
    """The file that a finding on this column names, if no detail names one. `dataset`: the value is the same for all
    cases, and the data set gets one finding instead of one per case."""
    meaning: str


def _column(name: str, kind: Literal["number", "text"], source: ColumnSource, meaning: str) -> Column:
    return Column(name=name, kind=kind, source=source, meaning=meaning)


COLUMNS: tuple[Column, ...] = (
    _column("case", "text", "image", "case id"),
    _column("patient", "text", "image", "patient; the cases of one patient always stay in the same fold"),
    _column("image", "text", "image", "first image file"),
    _column("label", "text", "label", "label file"),
    _column("read_error", "text", "image", "why a file of the case cannot be read; empty if all can"),
    _column("header_error", "text", "image", "header rules that image or label break; empty if none"),
    _column("surplus_bytes", "number", "image", "bytes after the last voxel that the header declares, image or label"),
    _column("has_geometry", "number", "image", "1 if image and label have a qform or an sform, else 0"),
    _column("header_flaws", "text", "image", "other flaws of the headers of image and label"),
    _column("channel_count", "number", "image", "channels found"),
    _column("channel_difference", "number", "image", "channels found minus channels declared"),
    _column("surplus_channel_files", "text", "image", "files named like further channels, which are not used"),
    _column("identical_channels", "number", "image", "channels with the same voxels as an earlier one"),
    _column("channel_shapes_agree", "number", "image", "1 if all channel files have the same shape, else 0"),
    _column("channel_offset_mm", "number", "image", "largest corner distance between channel files, mm"),
    *(_column(f"shape_{a}", "number", "image", f"voxels along the scanner's {a} axis") for a in "xyz"),
    *(_column(f"spacing_{a}_mm", "number", "image", f"voxel size along the scanner's {a} axis, mm") for a in "xyz"),
    _column("spacing_min_mm", "number", "image", "finest voxel size, mm"),
    _column("spacing_max_mm", "number", "image", "coarsest voxel size, mm"),
    _column("anisotropy", "number", "image", "coarsest divided by finest voxel size"),
    _column("orientation", "text", "image", "directions of the stored axes, e.g. RAS"),
    _column("voxel_volume_mm3", "number", "image", "volume of a voxel (affine's determinant), mm3"),
    _column("pixdim_affine_difference", "number", "image", "relative difference of voxel size, pixdim against affine"),
    _column(
        "qform_sform_mm", "number", "image", "corner distance between qform and sform, mm; empty unless both are set"
    ),
    _column("spatial_unit", "text", "image", "unit of length in the header"),
    _column("dtype", "text", "image", "stored number type"),
    _column("finite_fraction", "number", "image", "share of image voxels that are finite"),
    _column("constant_channels", "number", "image", "number of channels with one value only"),
    _column(
        "padding_fraction", "number", "image", "share of voxels equal to the corner voxel if that is not 0; not for CT"
    ),
    *(
        _column(f"intensity_{p}_{end}", "number", "image", f"{q:g} percentile of non-zero voxels, {end} over channels")
        for p, q in PERCENTILES.items()
        for end in ("min", "max")
    ),
    _column("largest_intensity", "number", "image", "largest absolute intensity"),
    _column("label_like_channels", "number", "image", "number of channels that hold only declared label values"),
    _column(
        "neighbour_correlation",
        "number",
        "image",
        "correlation between neighbouring voxels, smallest over axes and channels",
    ),
    _column("image_sha256", "text", "image", "hash of the image's voxels, independent of geometry and orientation"),
    _column("same_image_other_patient", "text", "image", "cases of other patients with the same image"),
    _column("same_image_same_patient", "text", "image", "other cases of this patient with the same image"),
    _column("label_dtype", "text", "label", "stored number type of the label"),
    _column("label_shape_agrees", "number", "label", "1 if the label has the image's shape, else 0"),
    _column("label_offset_mm", "number", "label", "corner distance between label and image, mm"),
    _column("label_finite_fraction", "number", "label", "share of label voxels that are finite"),
    _column("label_deviation", "number", "label", "largest distance of a label value from a whole number"),
    _column("label_values", "text", "label", "label values found"),
    _column("undeclared_values", "text", "label", "label values that the data set does not declare"),
    _column("ignored_voxels", "number", "label", "voxels with the label `ignore`; empty if no such label is declared"),
    _column("absent_labels", "text", "label", "declared labels that have no voxel in this case"),
    _column("labels_in_no_case", "text", "dataset", "declared labels that have no voxel in any case"),
    _column("label_auc", "number", "label", "how well intensities tell inside from outside the label; 0.5: not at all"),
    _column("labels_not_visible", "text", "dataset", "cases in which intensities do not separate the label, if most"),
    _column("foreground_fraction", "number", "label", "share of voxels that are not background"),
    _column("border_fraction", "number", "label", "share of foreground voxels on the volume's border"),
    _column("blank_foreground_fraction", "number", "label", "share of foreground voxels where the image is 0"),
    _column("label_sha256", "text", "label", "hash of the label's values"),
    _column("same_label_as", "text", "label", "other cases with the same label map on another image"),
)


def table_columns(index: DatasetIndex) -> tuple[Column, ...]:
    """The columns of a data set's case table: the fixed columns, then those per channel and per label."""
    per_channel = (
        _column(f"intensity_{p}[{c.name}]", "number", "image", f"{q:g} percentile of non-zero voxels of {c.name}")
        for c in index.channels
        for p, q in PERCENTILES.items()
    )
    per_label = (
        _column(f"volume_ml[{name}]", "number", "label", f"volume of {name}, ml")
        for name, value in index.labels.items()
        if value != 0
    )
    return (*COLUMNS, *per_channel, *per_label)


@dataclass(frozen=True, kw_only=True)
class CaseTable:
    """Columns and rows, in the order of the index."""

    columns: tuple[Column, ...]
    rows: tuple[CaseRow, ...]

    @cached_property
    def by_case(self) -> dict[str, CaseRow]:
        return {str(row.values["case"]): row for row in self.rows}

    def frame(self) -> pd.DataFrame:
        """The table for pandas: numbers as float64 (NaN if not measured), text as objects (None if not measured)."""
        import pandas as pd

        return pd.DataFrame(
            {
                c.name: pd.Series(
                    [row.values.get(c.name) for row in self.rows], dtype="float64" if c.kind == "number" else object
                )
                for c in self.columns
            }
        )

    def details(self, case: str, column: str) -> list[Detail]:
        """The noted files that a value comes from. Without a note: the file of the column's `source`, and the value."""
        row = self.by_case[case]
        noted = row.details.get(column)
        if noted:
            return noted
        source = next((c.source for c in self.columns if c.name == column), "image")
        file = INDEX if source == "dataset" else str(row.values[source])
        return [Detail(file=file, seen=f"{column} {show(row.values.get(column))}")]

    def write_csv(self, path: Path) -> None:
        """Write one line per case; a cell is empty if its value could not be measured."""
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([c.name for c in self.columns])
            for row in self.rows:
                writer.writerow([_cell(row.values.get(c.name)) for c in self.columns])

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per column: `min`, `median`, `max` of numbers or the most frequent texts; number of `measured` cases."""
        columns: dict[str, dict[str, Any]] = {}
        for column in self.columns:
            values = [v for row in self.rows if (v := row.values.get(column.name)) is not None]
            entry: dict[str, Any] = {"meaning": column.meaning, "measured": len(values)}
            if column.kind == "number" and values:
                numbers = np.array(values, dtype=np.float64)
                entry |= {"min": float(numbers.min()), "median": float(np.median(numbers)), "max": float(numbers.max())}
            elif column.kind == "text":
                counts: dict[str, int] = defaultdict(int)
                for value in values:
                    counts[str(value)] += 1
                common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                entry |= {"distinct": len(counts), "common": dict(common[:5])}
            columns[column.name] = entry
        return columns


def show(value: Value, *, empty: str = "none") -> str:
    """A value as text; floats with at most nine digits."""
    if value is None:
        return empty
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _cell(value: Value) -> str:
    text = show(value, empty="")
    return csv_cell(text) if isinstance(value, str) else text


def build_case_table(root: Path, index: DatasetIndex, *, workers: int = 0) -> CaseTable:
    """Measure every case of a data set, in parallel. Nothing below `root` changes.

    A case that cannot be read gets a row with the reason in `read_error`.

    Args:
        root: the data set's root.
        index: the data set's cases, channels and labels.
        workers: number of processes; 0: one per core. For large volumes fewer are used, to limit the memory.

    Raises:
        UserError: a worker was killed, most likely because memory ran out.
    """
    rows = tuple(progress(_measure_all(root, index, workers), total=len(index.cases), title="validate", unit="case"))
    _mark_duplicates(rows)
    _mark_labels_in_no_case(rows, index.labels)
    _mark_labels_not_visible(rows)
    return CaseTable(columns=table_columns(index), rows=rows)


def _measure_all(root: Path, index: DatasetIndex, requested: int) -> Iterator[CaseRow]:
    limit = VOXEL_SHARE * budget_bytes(None)
    arguments = [(root, case, index.channels, dict(index.labels), index.ignored_value, limit) for case in index.cases]
    sizes = [size for size in (memory_bytes(root, case) for case in index.cases) if size <= limit]
    in_memory = int(limit / max(1.0, *sizes, 1.0))
    workers = max(1, min(worker_count(requested, len(arguments)), in_memory))
    if workers == 1 or sum(sizes) < SERIAL_BYTES:
        yield from (_measure(a) for a in arguments)
        return
    with worker_pool(workers, setting="validate.workers") as pool:
        yield from pool.map(_measure, arguments, chunksize=max(1, min(8, len(arguments) // (4 * workers))))


def _measure(arguments: tuple[Path, Case, Sequence[Channel], Mapping[str, int], int | None, float]) -> CaseRow:
    return measure_case(*arguments)


def _mark_duplicates(rows: Sequence[CaseRow]) -> None:
    """Fill the columns that compare cases. Constant images and empty labels are skipped: equality proves no copy."""
    images: dict[str, list[CaseRow]] = defaultdict(list)
    labels: dict[str, list[CaseRow]] = defaultdict(list)
    for row in rows:
        v = row.values
        if v.get("image_sha256") and v.get("constant_channels") != v.get("channel_count"):
            images[str(v["image_sha256"])].append(row)
        if v.get("label_sha256") and v.get("foreground_fraction"):
            labels[str(v["label_sha256"])].append(row)
    for group in images.values():
        for row in group:
            others = [o for o in group if o is not row]
            _name(row, "same_image_other_patient", [o for o in others if o.values["patient"] != row.values["patient"]])
            _name(row, "same_image_same_patient", [o for o in others if o.values["patient"] == row.values["patient"]])
    for group in labels.values():
        for row in group:
            same = row.values.get("image_sha256")
            _name(row, "same_label_as", [o for o in group if o is not row and o.values.get("image_sha256") != same])


def _mark_labels_in_no_case(rows: Sequence[CaseRow], labels: Mapping[str, int]) -> None:
    """Fill the column of labels that no case has. Cases without a measured label do not count."""
    columns = [(name, f"volume_ml[{name}]") for name, value in labels.items() if value != 0]
    measured = [row for row in rows if all(column in row.values for _, column in columns)]
    # The volume can also be 0 because a voxel has no volume; another rule reports that.
    nowhere = [
        name
        for name, column in columns
        if measured and all(row.values.get("absent_labels") and row.values[column] == 0 for row in measured)
    ]
    if nowhere:
        for row in rows:
            row.values["labels_in_no_case"] = ", ".join(nowhere)


def _mark_labels_not_visible(rows: Sequence[CaseRow]) -> None:
    """Fill the column of labels that intensities do not separate, if that is so in most measured cases."""
    areas = [float(area) for row in rows if (area := row.values.get("label_auc")) is not None]
    noise = sum(NOISE_AUC[0] <= area <= NOISE_AUC[1] for area in areas)
    if 2 * noise > len(areas):
        for row in rows:
            row.values["labels_not_visible"] = f"{noise} of {len(areas)} cases: area {NOISE_AUC[0]} to {NOISE_AUC[1]}"


def _name(row: CaseRow, column: str, others: Sequence[CaseRow]) -> None:
    if others:
        row.values[column] = ", ".join(str(o.values["case"]) for o in others)
        files = ", ".join(str(o.values["label" if column == "same_label_as" else "image"]) for o in others)
        own = "label" if column == "same_label_as" else "image"
        patients = ", ".join(sorted({str(o.values["patient"]) for o in (row, *others)}))
        row.note(column, str(row.values[own]), f"same voxels as {files} (patients: {patients})")
