"""DDPG with prioritized replay, built on ddpg_bn.py without a line changed in it.

python -m study.prioritized --env Pendulum-v1 --total-steps 15000  # and all options of ddpg_bn.py
python -m study.prioritized --resume runs/Pendulum-v1/prioritized/RUN

Schaul et al. 2016 (arXiv 1511.05952), the proportional variant: transition i is drawn with
probability P(i) = p_i^alpha / sum_k p_k^alpha, where p is its last |TD error| + 1e-6. Its squared
error counts with weight (N P(i))^-beta, divided by the largest in the batch.
"""

import sys
from collections import namedtuple

import numpy as np
import torch
import tyro

import ddpg_bn
from ddpg_bn import Args, Batch, ReplayBuffer
from ddpg_bn import sample_batch as plain_sample_batch

ALPHA, BETA = 0.6, 0.4  # beta rises to 1 over the run
WeightedBatch = namedtuple("WeightedBatch", (*Batch._fields, "row", "weight"))


class PrioritizedReplay(ReplayBuffer):
    """The replay of ddpg_bn.py, and a tree: its leaves are p^alpha, other nodes sums of two."""

    def __init__(self, capacity, obs_dim, action_dim):
        super().__init__(capacity, obs_dim, action_dim)
        self.depth = (capacity - 1).bit_length()
        self.nodes = np.zeros(2 << self.depth)  # 1 is the root, k is the sum of 2 k and 2 k + 1
        self.leaves = self.nodes[1 << self.depth :]
        self.largest = 1.0  # priority so far

    def set_priorities(self, rows, priorities):
        self.largest = max(self.largest, float(np.max(priorities)))
        self.leaves[rows] = priorities**ALPHA
        k = np.asarray(rows) + len(self.leaves)
        for _ in range(self.depth):
            k = k // 2
            self.nodes[k] = self.nodes[2 * k] + self.nodes[2 * k + 1]

    def add(self, *transition):
        self.set_priorities([self.added % self.capacity], self.largest)
        super().add(*transition)

    def sample(self, rng, n):
        """Return a Batch of n transitions, one from each n-th of the sum; note their rows."""
        sums, k = (np.arange(n) + rng.random(n)) / n * self.nodes[1], np.ones(n, int)
        for _ in range(self.depth):  # down to the leaves at which all up to there exceed sums
            left = self.nodes[2 * k]
            k, sums = 2 * k + (sums >= left), sums - left * (sums >= left)
        self.rows = (k - len(self.leaves)).clip(max=len(self) - 1)  # rounding may lead past the end
        return Batch(*(array[self.rows] for array in self.data))

    def state_dict(self):
        return {"plain": super().state_dict(), "nodes": torch.tensor(self.nodes), "p": self.largest}

    def load_state_dict(self, state):
        super().load_state_dict(state["plain"])
        self.nodes[:], self.largest = state["nodes"], state["p"]


def sample_batch(agent, rng, args):
    """Return a batch as ddpg_bn.py does, with rows and weights."""
    batch, buffer = plain_sample_batch(agent, rng, args), agent.buffer
    leaves = buffer.leaves[buffer.rows]
    beta = BETA + (1 - BETA) * buffer.added / args.total_steps
    weight = (leaves / leaves.min()) ** -beta  # N and the sum of all leaves cancel
    return WeightedBatch(*batch, buffer.rows, torch.tensor(weight).to(batch.reward))


def critic_loss(agent, batch, args):
    """Return the mean of w (Q(s, a) - y)^2, and Q(s, a), (n,); renew the priorities."""
    with torch.no_grad():
        next_action = agent.actor_target.eval()(batch.next_obs)
    q, q_next = ddpg_bn.q_values(agent, batch, next_action, args)
    td_error = batch.reward + args.gamma * (1 - batch.terminated) * q_next - q
    agent.buffer.set_priorities(batch.row, td_error.detach().abs().cpu().numpy() + 1e-6)
    return (batch.weight * td_error**2).mean(), q


if __name__ == "__main__":
    ddpg_bn.ReplayBuffer, ddpg_bn.sample_batch = PrioritizedReplay, sample_batch
    ddpg_bn.critic_loss, ddpg_bn.__file__ = critic_loss, __file__  # whose name its runs bear
    args = tyro.cli(Args)
    if args.resume:
        args = tyro.cli(Args, default=ddpg_bn.saved_args(args.resume))
    sys.exit(3 if ddpg_bn.train(args)["diverged"] else 0)
