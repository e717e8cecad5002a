"""What a run becomes in study/results: one file, <cell>/<env>-seed<k>.csv.

It has one row for each evaluation: what was run, by which commit and versions and on which
processor (this machine's), then a column for each scalar, the mean of its points since the
evaluation before. A run that diverged has a last row where it stopped.
"""

import csv
import importlib
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from study.cells import plain, saved_options

SCALARS = "eval/return", "charts/episodic_return", "norm/actor_grad", "norm/saturation"
SCALARS += "norm/q_bias", "norm/stat_lag", "norm/first_ratio"
SCALARS += "norm/return_eval_mode", "norm/return_train_mode", "norm/return_recalibrated_mode"
COLUMNS = "cell", "script", "env", "seed", "options", "commit", "versions", "cpu", "wall_s"
COLUMNS += "diverged", "step", *SCALARS
NOT_OPTIONS = "env", "seed", "run_dir", "resume", "device"
# a run that is resumed says so in a warning
logging.getLogger("tensorboard").setLevel(logging.ERROR)


def as_option(name, value):
    """Return an option as one types it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


def processor():
    """Return the model of this machine's processor; empty where it is not known."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def wall_time(run_dir):
    """Return the seconds from first to last event, summed over the starts of a run."""
    files = [EventFileLoader(str(file)) for file in sorted(run_dir.glob("events.out.tfevents.*"))]
    times = [[event.wall_time for event in file.Load()] for file in files]
    return sum(max(x) - min(x) for x in times if x)


def described(about, script):
    """Return the options in an args.json that are not at their defaults, and the versions."""
    default = plain(importlib.import_module(script).Args())
    args = {k: v for k, v in saved_options(about, script).items() if k not in NOT_OPTIONS}
    options = " ".join(as_option(k, v) for k, v in args.items() if v != default[k])
    return options, " ".join(f"{k}=={v}" for k, v in about["versions"].items())


def rows(run, run_dir, commit):
    """Return the rows of one run that is finished or has diverged."""
    about, result = (json.loads((run_dir / x).read_text()) for x in ("args.json", "result.json"))
    options, versions = described(about, run.cell.script)
    what = run.cell.name, run.cell.script, run.env, run.seed, options, commit, versions
    what += processor(), round(wall_time(run_dir)), int(result["diverged"])

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    known = [scalar for scalar in SCALARS if scalar in events.Tags()["scalars"]]
    # by step, since a finished run that is resumed is evaluated again
    points = {scalar: {e.step: e.value for e in events.Scalars(scalar)} for scalar in known}
    points["eval/return"] = {step: mean for step, mean, _ in result["eval"]}
    ends = sorted({*points["eval/return"], *([result["steps"]] if result["diverged"] else [])})
    table = []
    for start, end in zip([0, *ends], ends, strict=False):
        row = dict(zip(COLUMNS, what, strict=False)) | {"step": end}
        for scalar, values in points.items():
            values = [value for step, value in values.items() if start < step <= end]
            row |= {scalar: f"{np.mean(values):.6g}"} if values else {}
        table.append(row)
    return table


def write(file, table, columns=COLUMNS):
    """Write rows to a file that is whole as soon as it exists."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, file)
