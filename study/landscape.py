"""See a critic as its actor does: python -m study.landscape COMMIT RUN_FOLDER...

Writes study/landscape.csv: mean Q(s, k a) over (s, a) of the run's replay, for factors k from -1 to
1, with the critic in train mode and in eval mode. The runs are of ddpg_bn.py, by COMMIT; each row
has their options, seed and versions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import ddpg_bn
from study import cells, collect

FILE = cells.ROOT / "study" / "landscape.csv"
COLUMNS = "script", "env", "seed", "options", "commit", "versions", "mode", "factor", "q"
STATES = 256  # as many as learn together


@dataclass
class Args:
    commit: Positional[str]  # of the script that made the runs
    runs: Positional[tuple[Path, ...]]  # their folders
    file: Path = FILE  # what is written


@torch.no_grad()
def look(run_dir, commit):
    """Return the rows of a run that is finished."""
    args = ddpg_bn.saved_args(run_dir)
    about = json.loads((run_dir / "args.json").read_text())
    options, versions = collect.described(about, "ddpg_bn")
    what = "ddpg_bn", args.env, args.seed, options, commit, versions
    agent = ddpg_bn.make_agent(ddpg_bn.make_env(args), args, "cpu")
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    obs, action, *_ = state["buffer"]["data"]
    drawn = np.random.default_rng(0).integers(len(obs), size=STATES)
    table = []
    for mode in ("train", "eval"):
        for factor in np.linspace(-1, 1, 41, dtype=np.float32):
            agent.critic.load_state_dict(state["critic"])  # train mode moves running statistics
            q = agent.critic.train(mode == "train")(obs[drawn], action[drawn] * factor).mean()
            row = *what, mode, f"{factor:.2f}", f"{q.item():.6g}"
            table.append(dict(zip(COLUMNS, row, strict=True)))
    return table


def main(args):
    cells.ask_finished(args.runs)
    table = [row for run_dir in args.runs for row in look(run_dir, args.commit)]
    collect.write(args.file, table, COLUMNS)


if __name__ == "__main__":
    main(tyro.cli(Args))
