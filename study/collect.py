"""Turn finished runs into rows: python -m study.collect COMMIT RUN... > study/results/NAME.csv

One row for each run, scalar and step, with the options that were not at their defaults, the seed,
the commit of the script (as given) and the versions of the packages (as the run wrote them down).
"""

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCALARS = "eval/return", "charts/episodic_return", "norm/actor_grad", "norm/saturation"
SCALARS += "norm/q_bias", "norm/stat_lag", "norm/first_ratio", "norm/moment_gap"
SCALARS += "norm/return_eval_mode", "norm/return_train_mode", "norm/return_recalibrated_mode"
COLUMNS = "script", "env", "options", "seed", "commit", "versions", "scalar", "step", "value"
NOT_OPTIONS = "env", "seed", "run_dir", "resume", "save_every", "device"


def as_option(name, value):
    """Return an option as one types it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


def rows(run_dir, commit):
    """Yield the rows of one run; of one that was stopped or diverged, as far as it came."""
    about = json.loads((run_dir / "args.json").read_text())
    script = about.get("script", run_dir.parent.name)
    default = json.loads(json.dumps(dataclasses.asdict(importlib.import_module(script).Args())))
    changed = {k: v for k, v in about["args"].items() if v != default[k] and k not in NOT_OPTIONS}
    options = " ".join(as_option(*item) for item in changed.items())
    versions = " ".join(f"{k}=={v}" for k, v in about["versions"].items())
    run = script, about["args"]["env"], options, about["args"]["seed"], commit, versions
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    for scalar in SCALARS:
        if scalar in events.Tags()["scalars"]:
            last = {event.step: event.value for event in events.Scalars(scalar)}
            for step, value in last.items():  # a finished run that is resumed is evaluated again
                yield *run, scalar, step, f"{value:.6g}"


if __name__ == "__main__":
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for folder in sorted(map(Path, sys.argv[2:])):
        writer.writerows(rows(folder, sys.argv[1]))
