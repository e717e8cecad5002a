"""RunningStat, ZFilter and RewardScale, against numpy over the whole history and Gymnasium."""

import gymnasium as gym
import numpy as np
import pytest

from zfilter import RewardScale, RunningStat, ZFilter


def history(n, mean=0.0):
    return mean + np.random.default_rng(0).normal(size=(n, 3)) * [1, 2, 3]


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_a_million_samples_in_uneven_batches_equal_numpy(mean):
    """The first 1999 batches are single samples."""
    xs, stat = history(1_000_000, mean).astype(np.float64 if mean else np.float32), RunningStat(3)
    for part in np.array_split(xs, [*range(1, 2000), 5000, 5001, 400_000]):
        stat.push(part)
    xs = xs.astype(np.float64)  # which float32 counts in, too
    assert stat.count == 1_000_000
    np.testing.assert_allclose(stat.mean, xs.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(stat.std, xs.std(0, ddof=1), rtol=1e-7)


def test_one_sample_passes_centered_and_unscaled_and_constants_become_zero():
    z, x = ZFilter(3), np.array([5.0, -3.0, 0.1])
    z.push(x)
    np.testing.assert_array_equal(z(x), 0)
    np.testing.assert_allclose(z(np.array([7.0, -3.5, 99])), [2, -0.5, 10])  # clipped
    z.push(np.tile(x, (1000, 1)))
    np.testing.assert_allclose(z(x), 0, atol=1e-6)


def test_filter_is_the_formula():
    xs, z = history(500, 3.0), ZFilter(3)
    z.push(xs)
    expected = (xs - xs.mean(0)) / (xs.std(0, ddof=1) + 1e-8)
    np.testing.assert_allclose(z(xs), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(z(xs[7]), z(xs)[7])


@pytest.mark.parametrize("n", [1, 4])
def test_reward_scale_is_the_deviation_of_discounted_sums(n):
    rng, scale = np.random.default_rng(0), RewardScale(n, 0.9)
    rewards, dones = rng.normal(3, 2, (300, n)), rng.random((300, n)) < 0.1
    sums = np.zeros((300, n))
    for k in range(n):  # brute force: to each step from the first of its episode
        for t in range(300):
            start = max([0, *(i + 1 for i in range(t) if dones[i, k])])
            sums[t, k] = sum(0.9 ** (t - i) * rewards[i, k] for i in range(start, t + 1))
    for reward, done in zip(rewards, dones, strict=True):
        scale.learn(*((reward, done) if n > 1 else (reward[0], int(done[0]))))
    std = sums.std(ddof=1)
    np.testing.assert_allclose(scale.std, std, rtol=1e-9)
    np.testing.assert_allclose(scale(rewards), rewards / (std + 1e-8), rtol=1e-9)
    assert scale(99 * std) == -scale(-99 * std) == 10


def test_reward_scale_is_that_of_gymnasium_but_for_its_start():
    """Theirs begins with variance 1, and divides by n: after 1000 steps that is 0.1 %."""
    env = gym.wrappers.NormalizeReward(gym.make("Pendulum-v1", max_episode_steps=2000), 0.9)
    scale = RewardScale(1, 0.9)
    env.reset(seed=0)
    for t in range(2000):  # one episode: at its end theirs forgets what came before the last step
        reward = env.step([2 * np.sin(t)])[1]
        raw = reward * np.sqrt(env.return_rms.var + env.epsilon)
        scale.learn(raw, False)
        assert t < 1000 or scale(raw) == pytest.approx(reward, rel=2e-3)


def test_impossible_statistics_are_refused(tmp_path):
    good = {"count": 2, "mean": np.zeros(3), "m2": np.zeros(3)}
    wrong = [{"mean": np.zeros(2), "m2": np.zeros(2)}, {"m2": np.full(3, -1.0)}, {"count": 1}]
    wrong += [{"mean": np.full(3, np.nan)}, {"count": np.inf}, {"mean": np.full(3, "a")}]
    for bad in [{"arr": np.zeros(3)}, *(good | x for x in wrong)]:
        np.savez(tmp_path / "bad.npz", **bad)
        with pytest.raises(ValueError):
            RunningStat(3).load(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", **dict.fromkeys(good, np.array([None])))
    with pytest.raises(ValueError, match="pickle"):  # which is not executed
        RunningStat(3).load(tmp_path / "bad.npz")
