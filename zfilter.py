"""Normalize observations and rewards by statistics of everything met so far.

`RunningStat` counts, `ZFilter` normalizes observations, `RewardScale` rewards. Unlike batch norm
they have one set of statistics for acting, learning and evaluation, and count each sample once.

Sources: the z-filter is that of modular_rl (Schulman 2016), the scale of rewards that of
VecNormalize in OpenAI baselines; the update is Welford's (1962), merged batch by batch as in Chan,
Golub and LeVeque (1979).
"""

import numpy as np


class RunningStat:
    """Count, mean and variance of all samples pushed, in float64, without storing them.

    shape: shape of one sample. Units are those of the samples.
    """

    def __init__(self, shape):
        self.count = 0
        self.mean = np.zeros(shape)
        self.m2 = np.zeros(shape)  # sum of squared distances from the mean

    def push(self, x):
        """Learn from one sample, (*shape), or a batch, (n, *shape); n = 1 is Welford's update."""
        batch = np.asarray(x, np.float64).reshape(-1, *self.mean.shape)
        n, batch_mean = len(batch), batch.mean(0)
        delta, total = batch_mean - self.mean, self.count + n
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + ((batch - batch_mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.count = total

    @property
    def std(self):
        """Unbiased standard deviation, (*shape); 1 until a second sample tells the scale."""
        return np.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else np.ones_like(self.mean)

    def state_dict(self):
        """Everything that is learnt, as numbers and lists of them."""
        return {key: np.asarray(getattr(self, key)).tolist() for key in ("count", "mean", "m2")}

    def load_state_dict(self, state):
        """Restore `state_dict()`. Raises ValueError for other shapes and impossible numbers."""
        count, mean, m2 = (np.asarray(state[key], np.float64) for key in ("count", "mean", "m2"))
        if mean.shape != self.mean.shape or m2.shape != mean.shape or count.shape != ():
            raise ValueError(f"shapes of mean, m2 or count do not fit {self.mean.shape}")
        if not (np.isfinite([mean, m2]).all() and (m2 >= 0).all() and 0 <= count < np.inf):
            raise ValueError("statistics are not finite, or a variance or the count is negative")
        self.count, self.mean, self.m2 = int(count), mean, m2

    def save(self, file, **about):
        """Write count, mean, m2, words about them, and std, to look at, to an .npz file."""
        np.savez(file, **self.state_dict(), std=self.std, **about)

    def load(self, file, **about):
        """Read what `save` wrote, without pickle.

        Raises ValueError for an .npz of something else, other words about it, other shapes or
        fewer than two samples.
        """
        with np.load(file, allow_pickle=False) as state:
            if not {"count", "mean", "m2"} <= state.keys():
                raise ValueError(f"{file} holds no statistics")
            self.load_state_dict(state)
            wrong = [str(state[k]) for k, v in about.items() if str(state.get(k, v)) != str(v)]
        if wrong or self.count < 2:
            raise ValueError(f"{file} holds statistics of {' '.join(wrong) or 'too few samples'}")


class ZFilter(RunningStat):
    """Normalize observations: z = clip((x - mean) / (std + 1e-8), -10, 10)."""

    def __call__(self, x):
        """Return one sample or a batch normalized, same shape; only `push` learns."""
        return np.clip((x - self.mean) / (self.std + 1e-8), -10, 10)


class RewardScale(RunningStat):
    """Divide rewards by the running deviation of their discounted sums, and clip them at 10.

    They are never shifted, which would change what is optimal.
    n: number of environments. gamma: discount per step.
    """

    def __init__(self, n, gamma):
        super().__init__(())
        self.gamma = gamma
        self.sums = np.zeros(n)  # of each environment, since its episode began

    def learn(self, reward, done):
        """Learn from rewards and ends of one step: arrays (n,), or a number and a bool."""
        self.sums = self.gamma * self.sums + reward
        self.push(self.sums)
        self.sums = np.where(done, 0.0, self.sums)

    def __call__(self, reward):
        """Return rewards scaled, same shape."""
        return np.clip(reward / (self.std + 1e-8), -10, 10)
