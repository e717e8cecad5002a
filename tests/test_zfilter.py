"""RunningStat and ZFilter against numpy over the whole history."""

import numpy as np
import pytest

from zfilter import RunningStat, ZFilter


def history(n, mean=0.0, shape=(3,)):
    return mean + np.random.default_rng(0).normal(size=(n, *shape)) * np.arange(1, shape[0] + 1)


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_one_sample_at_a_time_equals_numpy(mean):
    xs, stat = history(2000, mean), RunningStat(3)
    for x in xs:
        stat.push(x)
    assert stat.count == 2000
    np.testing.assert_allclose(stat.mean, xs.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stat.var, xs.var(0, ddof=1), rtol=1e-6 if mean else 1e-12)


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_a_million_samples_in_uneven_batches_equal_numpy(mean):
    xs, stat = history(1_000_000, mean), RunningStat(3)
    for part in np.array_split(xs, [1, 2, 10, 5000, 5001, 400_000]):
        stat.push(part)
    assert stat.count == 1_000_000
    np.testing.assert_allclose(stat.mean, xs.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(stat.std, xs.std(0, ddof=1), rtol=1e-7)


def test_many_single_samples_equal_numpy():
    xs, stat = history(100_000, 1e8, (1,)), RunningStat(1)
    for x in xs:
        stat.push(x)
    np.testing.assert_allclose(stat.mean, xs.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stat.std, xs.std(0, ddof=1), rtol=1e-6)


def test_float32_samples_are_counted_in_float64():
    stat = RunningStat(3)
    stat.push(history(10).astype(np.float32))
    assert stat.mean.dtype == stat.m2.dtype == np.float64


def test_one_sample_passes_centered_and_unscaled():
    z = ZFilter(3)
    np.testing.assert_array_equal(z(np.array([5.0, -3.0, 0.0])), 0)
    np.testing.assert_allclose(z(np.array([7.0, -3.5, 0.0]), update=False), [2, -0.5, 0])


def test_constant_features_become_zero():
    z = ZFilter(2)
    for _ in range(1000):
        out = z(np.array([0.1, -7.3]))
    np.testing.assert_allclose(out, 0, atol=1e-6)


def test_scalar_statistics():
    stat = RunningStat(())
    stat.push(np.arange(10.0).reshape(10))
    assert stat.mean == 4.5 and stat.count == 10
    RunningStat(()).load_state_dict(stat.state_dict())


@pytest.mark.parametrize("demean", [True, False])
@pytest.mark.parametrize("destd", [True, False])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_filter_is_the_formula(demean, destd, clip):
    xs, z = history(500, 3.0), ZFilter(3, demean, destd, clip)
    z(xs)
    expected = (xs - demean * xs.mean(0)) / (xs.std(0, ddof=1) + 1e-8 if destd else 1)
    expected = expected.clip(-clip, clip) if clip else expected
    np.testing.assert_allclose(z(xs, update=False), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(z(xs[7], update=False), expected[7], rtol=1e-9, atol=1e-12)


def test_only_update_learns():
    z = ZFilter(3)
    z(history(10))
    before = z.stat.state_dict()
    z(history(10) + 5, update=False)
    for key, value in z.stat.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    z(history(10) + 5)
    assert z.stat.count == 20 and not np.array_equal(z.stat.mean, before["mean"])


def test_save_and_load_to_the_bit_and_learn_on(tmp_path):
    a, b = ZFilter(3), ZFilter(3)
    a(history(100, 1e8))
    a.stat.save(tmp_path / "stats.npz", env="Ant-v4")
    b.stat.load(tmp_path / "stats.npz", env="Ant-v4")
    assert a.state_dict() == b.state_dict()
    with pytest.raises(ValueError, match="Ant-v4"):
        b.stat.load(tmp_path / "stats.npz", env="Hopper-v4")
    more = history(50) - 4
    np.testing.assert_array_equal(a(more), b(more))
    with np.load(tmp_path / "stats.npz") as saved:  # people find the std in the file too
        np.testing.assert_allclose(saved["std"] ** 2 * 99, saved["m2"])


@pytest.mark.parametrize(
    "bad",
    [
        {"count": 2, "mean": np.zeros(2), "m2": np.zeros(2)},
        {"count": 2, "mean": np.zeros(3), "m2": np.full(3, -1.0)},
        {"count": 2, "mean": np.full(3, np.nan), "m2": np.zeros(3)},
        {"count": np.inf, "mean": np.zeros(3), "m2": np.zeros(3)},
        {"count": 2, "mean": np.array(["a", "b", "c"]), "m2": np.zeros(3)},
    ],
)
def test_impossible_statistics_are_refused(tmp_path, bad):
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(ValueError):
        RunningStat(3).load(tmp_path / "bad.npz")


def test_pickles_are_not_executed(tmp_path):
    evil = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "bad.npz", count=evil, mean=evil, m2=evil)
    with pytest.raises(ValueError, match="pickle"):
        RunningStat(3).load(tmp_path / "bad.npz")
