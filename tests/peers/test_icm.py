"""icm.py against Stable-Baselines3: a whole update of PPO."""

import numpy as np
import pytest
import torch
from helpers import module

icm = module("icm")
sb3 = pytest.importorskip("stable_baselines3")
STEPS, COPIES = 32, 4


def test_a_whole_update_of_ppo():
    """The same weights and steps: advantages, then four epochs of one minibatch each."""
    torch.manual_seed(0)
    args = icm.Args(
        "CartPole-v1", envs=COPIES, horizon=STEPS, reward="extrinsic", minibatches=1, hidden=16, device="cpu"
    )
    envs = icm.Environments(args)
    agent = icm.Agent(envs.envs[0], args)
    ppo = sb3.PPO(
        "MlpPolicy", sb3.common.env_util.make_vec_env("CartPole-v1", COPIES), n_steps=STEPS, batch_size=STEPS * COPIES,
        n_epochs=4, learning_rate=args.learning_rate, gamma=args.gamma, gae_lambda=args.gae_lambda,
        clip_range=args.clip, ent_coef=args.entropy_weight, vf_coef=args.value_weight,
        max_grad_norm=args.gradient_clip, device="cpu", policy_kwargs={"net_arch": [16, 16]},
    )  # fmt: skip
    theirs, hidden = ppo.policy, ppo.policy.mlp_extractor
    pairs = [
        (agent.actor[0][1], hidden.policy_net[0]), (agent.actor[0][3], hidden.policy_net[2]),
        (agent.critic[0][1], hidden.value_net[0]), (agent.critic[0][3], hidden.value_net[2]),
        (agent.actor[1], theirs.action_net), (agent.critic[1], theirs.value_net),
    ]  # fmt: skip
    for ours, other in pairs:
        ours.weight.data += 0.3 * torch.randn_like(ours.weight)
        other.load_state_dict(ours.state_dict())
    rollout, _ = icm.act(agent, envs, STEPS)
    with torch.no_grad():
        next_value = agent.critic(rollout.s2.flatten(0, 1)).view_as(rollout.r)
    advantage = icm.gae(rollout.r, rollout.value, next_value, rollout.terminated, rollout.over, args)
    buffer, starts = ppo.rollout_buffer, np.ones(COPIES)
    buffer.reset()
    for t in range(STEPS):
        buffer.add(
            rollout.s[t].numpy(),
            rollout.a[t].numpy()[:, None],
            rollout.r[t].numpy(),
            starts,
            rollout.value[t],
            rollout.log_prob[t],
        )
        starts = rollout.over[t].numpy()
    assert rollout.over.any() and not rollout.over[-1].all()
    buffer.compute_returns_and_advantage(last_values=next_value[-1], dones=starts)
    assert advantage.numpy() == pytest.approx(buffer.advantages, abs=1e-4)

    ppo._logger, ppo._current_progress_remaining = sb3.common.logger.configure(None, []), 1.0
    ppo.train()
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    flat, target = icm.Rollout(*(x.flatten(0, 1) for x in rollout)), (advantage + rollout.value).flatten()
    before = agent.actor[0][1].weight.clone()
    for _ in range(args.epochs):
        icm.update(agent, None, optimizer, flat, advantage.flatten(), target, args)
    assert not torch.allclose(before, agent.actor[0][1].weight, atol=1e-4)
    for ours, other in pairs:
        assert torch.allclose(ours.weight, other.weight, atol=1e-5) and torch.allclose(ours.bias, other.bias, atol=1e-5)
