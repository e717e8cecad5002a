"""A policy outside its run: in another program, and as a video."""

import importlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, checkpoint
from moviepy import VideoFileClip

import ddpg_bn
import ppo_bn


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_policy_acts_elsewhere_by_the_statistics_of_its_run(name, small):
    script = importlib.import_module(name)
    args = small(script, env="Countdown-v0", norm="zfilter", total_steps=200)
    script.train(args)
    obs, _ = gym.make("Countdown-v0").reset()
    with np.load(f"{args.run_dir}/obs_stats.npz") as stats:
        z = np.clip((np.float32(obs) - stats["mean"]) / (stats["std"] + 1e-8), -10, 10)
    actor = script.make_agent(script.make_env(args), args, "cpu").actor.eval()
    actor.load_state_dict(checkpoint(args.run_dir)["agent"]["actor"])
    action = actor(torch.tensor(z, dtype=torch.float32).unsqueeze(0))
    action = (action if torch.is_tensor(action) else action.mode).detach().numpy()[0]
    expected = np.clip(1 + 2 * action, -1, 3)  # in units of the plain environment
    np.testing.assert_allclose(script.load_policy(args.run_dir)(obs), expected, rtol=1e-5)


@pytest.mark.parametrize("script", [ppo_bn, ddpg_bn])
def test_a_finished_run_shows_its_policy(small, script):
    args = small(script, total_steps=128)
    script.train(args)
    script.train(script.Args(**vars(args) | {"resume": args.run_dir, "capture_video": True}))
    (video,) = sorted(Path(args.run_dir, "videos").glob("*.mp4"))
    with VideoFileClip(str(video)) as clip:
        assert clip.duration > 0.1 and clip.get_frame(0).shape[2] == 3


def test_the_faster_products_are_those_of_float32():
    cpu = torch.cpu.get_capabilities()
    if not cpu.get("avx512_f") or cpu.get("amx_tile"):
        pytest.skip("this processor does not take them")
    a, b = torch.randn(2, 256, 256)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    product = a @ b
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    exact = a.double() @ b.double()
    assert (product - exact).norm() / exact.norm() < 1e-6


CPUS = {"none": {}, "AVX-512": {"avx512_f": True}, "AMX": {"avx512_f": True, "amx_tile": True}}


@pytest.mark.parametrize("cpu", CPUS)
def test_they_are_taken_by_avx512_without_amx_only(script, small, cpu, monkeypatch):
    found, products = [], torch.backends.mkldnn.matmul
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CPUS[cpu])
    monkeypatch.setattr(script, "update", lambda *_: found.append(products.fp32_precision) or {})
    script.train(small(script, total_steps=102))
    assert found == ["bf16" if cpu == "AVX-512" else "none"] * 2
    assert products.fp32_precision == "none"
