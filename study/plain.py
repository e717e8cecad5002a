"""Print how the algorithms without normalization layers compare with others': python -m study.plain

Ours is the last evaluation of each seed, from study/results.
"""

from pathlib import Path

from study.figure import LONG, interval, iqm, read

RESULTS = Path(__file__).parent / "results"
FILTERS = "--norm zfilter --reward-norm"
ROWS = (  # file, script, environment, options of its runs, what others publish
    (
        "reinforce-plain",
        "reinforce_bn.py",
        "CartPole-v1",
        "",
        "500 is the most there is; Gymnasium calls 475 solved",
    ),
    (
        "reinforce-plain",
        "reinforce_bn.py",
        "InvertedPendulum-v4",
        "",
        "999 ± 2 (Tianshou, v2, 3 million, 10 seeds, best evaluation)",
    ),
    (
        "ppo-mujoco-relu",
        "ppo_bn.py with ReLU, commit 934fe84:",
        "HalfCheetah-v4",
        FILTERS,
        "1443 ± 46 (CleanRL, 3 seeds, training return); 5784 ± 1244 (Tianshou, v3, 10 seeds, best"
        " evaluation)",
    ),
    ("ppo-mujoco-relu", "ppo_bn.py with ReLU, commit 934fe84:", "Hopper-v4", FILTERS, "as below"),
    (
        "ppo-mujoco",
        "ppo_bn.py",
        "Hopper-v4",
        FILTERS,
        "2383 ± 272 (CleanRL, 3 seeds, training return); 2609 ± 701 (Tianshou, v3, 10 seeds, best"
        " evaluation)",
    ),
    (
        "ddpg-pendulum",
        "ddpg_bn.py",
        "Pendulum-v1",
        None,
        "-152 ± 94 (Stable-Baselines3 Zoo, 20 thousand, one run)",
    ),
    (
        "ddpg-halfcheetah-long",
        "ddpg_bn.py",
        "HalfCheetah-v4",
        None,
        "10374 ± 157 (CleanRL, one million, 3 seeds, training return)",
    ),
    (
        "sac-halfcheetah",
        "sac_bn.py",
        "HalfCheetah-v4",
        LONG,
        "5831 ± 775 (SAC with rate 1e-3 in the logs of CrossQ's authors, 10 seeds)",
    ),
)


def main():
    print("| script | environment, steps | ours: each seed; IQM (95 % interval) | published |")
    print("|---|---|---|---|")
    for file, script, env, options, published in ROWS:
        data = read(RESULTS / f"{file}.csv", env)["eval/return"]
        (options,) = [options] if options is not None else list(data)
        seeds = [points[-1] for _, points in sorted(data[options].items())]
        steps, values = max(step for step, _ in seeds), [value for _, value in seeds]
        ours = ", ".join(f"{value:.0f}" for value in values)
        if len(values) > 1:
            low, high = interval(values)
            ours += f"; {iqm(values):.0f} ({low:.0f} to {high:.0f})"
        name = f"`{script}`" if not options or options == LONG else f"`{script} {options}`"
        name = f"`{script}`" if file.startswith("ddpg") else name
        print(f"| {name} | {env}, {steps / 1e6:.3g} million | {ours} | {published} |")


if __name__ == "__main__":
    main()
