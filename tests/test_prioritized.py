"""Prioritized replay, built on ddpg_bn.py from outside."""

import copy
import runpy
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import checkpoint, same

import ddpg_bn
from study import prioritized

P = np.array([0.5, 2.0, 1.0, 8.0, 1.0])  # priorities of five transitions


def make(small, replay=prioritized.PrioritizedReplay, **options):
    """Return an agent whose replay is full of five transitions, and its Args."""
    args = small(ddpg_bn, total_steps=10, batch_size=8, **options)
    torch.manual_seed(0)
    agent = ddpg_bn.make_agent(ddpg_bn.make_env(args), args, "cpu")
    agent.buffer, rng = replay(5, 3, 1), np.random.default_rng(0)
    for k in range(5):
        agent.buffer.add(rng.normal(size=3), rng.normal(size=1), k, rng.normal(size=3), k % 2)
    return agent, args


def test_transitions_are_drawn_as_often_as_their_priorities_say(small):
    buffer = make(small)[0].buffer
    buffer.set_priorities(np.arange(5), P)
    buffer.add(np.zeros(3), np.zeros(1), 9.0, np.zeros(3), False)  # over the oldest
    rewards = buffer.sample(np.random.default_rng(1), 1000).reward
    counts = (rewards == buffer.data.reward[:, None]).sum(1)
    raised = np.array([8.0, 2.0, 1.0, 8.0, 1.0]) ** 0.6  # the new one: the largest so far
    assert counts == pytest.approx(1000 * raised / raised.sum(), abs=2)  # one from each 1000th


def test_weights_are_those_of_the_paper(small):
    agent, args = make(small)
    agent.buffer.set_priorities(np.arange(5), P)
    batch = prioritized.sample_batch(agent, np.random.default_rng(0), args)
    assert (agent.buffer.data.reward[batch.row] == batch.reward.numpy()).all()
    weight = (5 * P[batch.row] ** 0.6 / (P**0.6).sum()) ** -0.7  # beta: half way from 0.4 to 1
    assert batch.weight.numpy() == pytest.approx(weight / weight.max()) and len(set(batch.row)) > 2
    loss, raised = prioritized.critic_loss(agent, batch, args)[0], agent.buffer.leaves[batch.row]
    assert loss.item() == pytest.approx((batch.weight.numpy() * raised ** (2 / 0.6)).mean(), 1e-3)


def test_with_equal_priorities_an_update_is_the_plain_one(small, monkeypatch):
    agent, args = make(small, norm="batchnorm")
    plain, _ = make(small, ddpg_bn.ReplayBuffer, norm="batchnorm")
    batch = prioritized.sample_batch(agent, np.random.default_rng(0), args)
    (s, a, reward, after, ends), before = batch[:5], copy.deepcopy(plain)
    ddpg_bn.update(plain, ddpg_bn.Batch(*batch[:5]), args)
    monkeypatch.setattr(ddpg_bn, "critic_loss", prioritized.critic_loss)
    ddpg_bn.update(agent, batch, args)
    for part in ("actor", "critic", "actor_target", "critic_target"):
        torch.testing.assert_close(*(getattr(x, part).state_dict() for x in (agent, plain)))
    q_next = before.critic_target.eval()(after, before.actor_target.eval()(after))
    p = (reward + 0.99 * (1 - ends) * q_next - before.critic(s, a)).abs().detach().numpy() + 1e-6
    assert agent.buffer.leaves[batch.row] == pytest.approx(p**0.6, rel=1e-3)


def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_was_not(tmp_path):
    def play(words, end=SystemExit, **replaced):
        words = patch("sys.argv", ["prioritized", *words.split()])
        with words, patch.dict(vars(ddpg_bn), replaced), pytest.raises(end):
            runpy.run_path(prioritized.__file__, run_name="__main__")

    options = "--env ShortPendulum-v0 --total-steps 120 --learning-starts 30 --buffer-size 50"
    options += " --save-every 40 --eval-every 90 --hidden-sizes 8 8 --run-dir"
    play(f"{options} {tmp_path}/calm")
    stop = Mock(side_effect=KeyboardInterrupt)  # at step 90, where the first evaluation is due
    play(f"{options} {tmp_path}/storm", KeyboardInterrupt, evaluate=stop)
    assert checkpoint(tmp_path / "storm")["progress"][0] == 80
    play(f"--resume {tmp_path}/storm")
    calm, storm = (checkpoint(tmp_path / x) for x in ("calm", "storm"))
    assert calm["progress"][:2] == (120, 90) and "nodes" in calm["agent"]["buffer"]
    assert all(same(calm[key], storm[key]) for key in ("progress", "agent", "random", "torch"))
