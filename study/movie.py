"""Film four policies side by side: MUJOCO_GL=osmesa python -m study.movie [--runs RUN...]

Writes study/figures/cheetahs.gif: an episode without noise of each of four finished runs of DDPG,
from the first start of every evaluation; under each name the return so far.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import tyro
from PIL import Image, ImageDraw, ImageFont

import ddpg_bn
from study import cells

PANELS = {  # words: cell
    "no batch norm": "ddpg-none",
    "naive batch norm": "ddpg-naive",
    "repair": "ddpg-repair",
    "recipe + weight norm": "ddpg-recipe-wn",
}
RUNS = tuple(cells.ROOT / cells.RUNS / name / "HalfCheetah-v4-seed1" for name in PANELS.values())
WIDTH, HEIGHT, COLORS, LIMIT = 240, 180, 32, 3_000_000  # of a panel, of the file, its bytes


@dataclass
class Args:
    runs: tuple[Path, ...] = RUNS  # finished runs: none, naive, repair, recipe with weight norm
    file: Path = cells.ROOT / "study/figures/cheetahs.gif"  # what is written
    frames: int = 125  # of the film
    every: int = 2  # steps of the environment from frame to frame


def panels(words, run_dir, args):
    """Yield a labelled picture for each frame; after an episode's end the last state stays."""
    policy = ddpg_bn.load_policy(run_dir)
    view = {"render_mode": "rgb_array", "width": WIDTH, "height": HEIGHT, "camera_name": "track"}
    env = gym.make(ddpg_bn.saved_args(run_dir).env, **view)  # the free camera does not follow
    obs, _ = env.reset(seed=1_000_000)  # as evaluation
    font, total, done = ImageFont.load_default(16), 0.0, False
    for _ in range(args.frames):
        picture, label = Image.fromarray(env.render()), f"{words}\nreturn {total:.0f}"
        ImageDraw.Draw(picture).text((8, 6), label, "white", font, stroke_width=1, stroke_fill=0)
        yield picture
        for _ in range(args.every):
            if not done:
                obs, reward, terminated, truncated, _ = env.step(policy(obs))
                total, done = total + float(reward), terminated or truncated
    env.close()


def main(args):
    cells.ask_finished(args.runs)
    film, columns = [], map(panels, PANELS, args.runs, [args] * len(PANELS))
    for row in zip(*columns, strict=True):
        frame = Image.new("RGB", (len(row) * WIDTH, HEIGHT))
        for k, picture in enumerate(row):
            frame.paste(picture, (k * WIDTH, 0))
        film.append(frame)
    palette = film[0].quantize(COLORS, Image.Quantize.FASTOCTREE)  # one for all: no flicker
    film = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in film]
    new = args.file.with_name(f"new-{args.file.name}")
    film[0].save(new, save_all=True, append_images=film[1:], duration=50 * args.every, loop=0)
    if new.stat().st_size > LIMIT:
        raise SystemExit(f"{new} has {new.stat().st_size} bytes: take fewer --frames")
    new.replace(args.file)  # so a kill leaves the old film or the new one


if __name__ == "__main__":
    main(tyro.cli(Args))
