"""The mathematics of algos/icm.py against slow and obvious references."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

icm = helpers.module("icm")
Args = icm.Args
CPU = torch.device("cpu")
FOUR, BOX = gym.spaces.Discrete(4), gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


def module(actions=FOUR, shape=(6,), seed=0, **settings):
    torch.manual_seed(seed)
    net = icm.ICM(shape, actions, Args(hidden=16, feature_size=5, model_hidden=16, **settings))
    torch.nn.init.normal_(net.forecast[-1].weight, 0, 0.2)  # which begins as 0
    return net


def transitions(count=32, actions=FOUR, shape=(6,), seed=0):
    torch.manual_seed(seed)
    s, s2 = torch.randn(2, count, *shape)
    a = torch.randint(4, (count,)) if actions is FOUR else torch.randn(count, 2)
    return s, a, s2


# ── (1) Playing ───────────────────────────────────────────────────────────────────────────────────────────────────


class Counter(gym.Env):
    """Counts its own steps over all episodes; ends after three, or is cut after five where the start was odd."""

    observation_space, action_space = gym.spaces.Box(-1e6, 1e6, (2,), np.float64), gym.spaces.Discrete(2)
    count = episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.length, self.episode = self.count + 1, 0, self.episode + 1
        return np.array([self.count, self.episode]), {}

    def step(self, action):
        self.count, self.length = self.count + 1, self.length + 1
        ends, cut = self.episode % 2 == 0 and self.length == 3, self.episode % 2 == 1 and self.length == 5
        return np.array([self.count, self.episode]), float(action), ends, cut, {}


def played(envs, horizon=40):
    torch.manual_seed(0)
    agent = icm.Agent(envs.single_observation_space.shape, envs.single_action_space, 2, 8)
    torch.nn.init.normal_(agent.values.weight)
    obs, _ = envs.reset(seed=1)
    calls = []
    rollout, last = icm.play_steps(
        envs, obs, agent, lambda x: x.float() / 100, horizon, CPU, lambda: None, lambda *found: calls.append(found)
    )
    return agent, rollout, last, calls


@pytest.mark.parametrize("kind", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_no_transition_crosses_an_episodes_end(kind):
    envs = kind([Counter] * 3, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    agent, rollout, last, calls = played(envs)
    envs.close()
    obs, next_obs = rollout.obs, rollout.next_obs
    assert obs.shape == (40, 3, 2) and len(calls) == 40
    assert torch.equal(next_obs[..., 0], obs[..., 0] + 1)  # one step on
    assert torch.equal(next_obs[..., 1], obs[..., 1])  # of the same episode
    assert torch.equal(obs[1:][~rollout.over[:-1]], next_obs[:-1][~rollout.over[:-1]])
    assert torch.equal(obs[1:][rollout.over[:-1]], next_obs[:-1][rollout.over[:-1]] + 1)  # the next one begins
    episodes = obs[..., 1][rollout.over]
    assert rollout.over.sum() > 20
    assert torch.equal(rollout.terminated[rollout.over], episodes % 2 == 0)  # others are cut
    assert torch.equal(torch.from_numpy(last)[~rollout.over[-1]], next_obs[-1][~rollout.over[-1]])
    assert torch.equal(rollout.reward, rollout.action.float())
    x = obs.float() / 100
    outputs, values = agent(x.flatten(0, 1))
    chances = outputs.log_softmax(-1).gather(1, rollout.action.flatten()[:, None])[:, 0]
    assert torch.allclose(rollout.log_prob.flatten(), chances, atol=1e-5)
    assert torch.allclose(rollout.values.flatten(0, 1), values, atol=1e-5)


def test_actions_are_drawn_by_their_chances():
    agent = icm.Agent((2,), FOUR, 1, 8)
    with torch.no_grad():
        agent.policy.bias.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
        agent.policy.weight.zero_()
        outputs, _ = agent(torch.zeros(20_000, 2))
        counts = torch.bincount(agent.distribution(outputs).sample(), minlength=4) / 20_000
        assert torch.allclose(counts, outputs[0].softmax(-1), atol=0.015)
        assert agent.best(outputs)[0] == 2
        bold = icm.Agent((2,), BOX, 1, 8)
        bold.log_std.fill_(-1.0)
        outputs, _ = bold(torch.randn(1, 2).expand(20_000, 2))
        drawn = bold.distribution(outputs).sample()
        assert torch.allclose(drawn.std(0), torch.full((2,), np.exp(-1.0), dtype=torch.float32), atol=0.02)
        assert torch.allclose(drawn.mean(0), bold.best(outputs)[0], atol=0.02)
        assert bold.distribution(outputs).log_prob(drawn).shape == (20_000,)


# ── (2) Curiosity ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("actions", [FOUR, BOX])
@pytest.mark.parametrize("features", ["inverse", "random", "pixels"])
def test_bonus_is_equation_6(actions, features):
    net, (s, a, s2) = module(actions, features=features, eta=0.3), transitions(actions=actions)
    bonus, _ = net.wonder(s, a, s2)
    for i in range(len(s)):
        numbers = torch.eye(4)[a[i]] if actions is FOUR else a[i].clip(-1, 1)
        phi, phi2 = net.phi(s[i : i + 1])[0], net.phi(s2[i : i + 1])[0]
        foreseen = phi + net.forecast(torch.cat([phi, numbers])[None])[0]
        assert bonus[i].item() == pytest.approx(0.3 / 2 * sum((foreseen - phi2) ** 2).item(), rel=1e-4)


def test_at_first_nothing_is_foreseen_to_change():
    net = icm.ICM((6,), FOUR, Args())
    assert net.wonder(*transitions())[1]["model/forward_error"] == 1


def test_features_have_one_length_and_pixels_are_themselves():
    s, _, _ = transitions()
    for features in ("inverse", "random"):
        phi = module(features=features).phi(100 * s)
        assert torch.allclose(phi.square().sum(1), torch.full((32,), 5.0), rtol=1e-3)
    assert torch.equal(module(features="pixels").phi(s), s)


def test_images_are_read_by_four_convolutions():
    """The paper's: 42 × 42 × 4 gives 288 features."""
    network, size = icm.encoder((4, 42, 42), 16, 5)
    assert size == 288 == network(torch.zeros(2, 4, 42, 42)).shape[1]
    assert [layer.weight.shape[:2] for layer in network if isinstance(layer, torch.nn.Conv2d)] == [
        (32, 4), (32, 32), (32, 32), (32, 32),
    ]  # fmt: skip
    assert icm.encoder((3, 5, 5), 16, 7)[1] == icm.encoder((3,), 16, 7)[1] == 7


@given(gamma=st.floats(0, 1), seed=st.integers(0, 100), length=st.integers(1, 12))
def test_discounted_sums_go_on_where_they_were(gamma, seed, length):
    bonus = torch.rand(length, 3, generator=torch.Generator().manual_seed(seed))
    before = torch.rand(3, generator=torch.Generator().manual_seed(seed + 1))
    sums = icm.discounted(bonus, before, gamma)
    for t, i in itertools.product(range(length), range(3)):
        slow = before[i] * gamma ** (t + 1) + sum(bonus[k, i] * gamma ** (t - k) for k in range(t + 1))
        assert sums[t, i].item() == pytest.approx(slow.item(), rel=1e-4, abs=1e-6)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 1_000))
def test_moments_are_those_of_all_that_was_seen(sizes, seed):
    torch.manual_seed(seed)
    parts = [3 * torch.randn(size, 2, 3) + 5 for size in sizes]
    moments = icm.Moments((2, 3), CPU)
    for part in parts:
        moments.update(part)
    copy = icm.Moments((2, 3), CPU)
    copy.load_state_dict(moments.state_dict())
    every = torch.cat(parts).double().numpy()
    for found in (moments, copy):
        assert found.count == len(every)
        assert np.allclose(found.mean, every.mean(0))
        assert np.allclose(found.variance, every.var(0))
    moments.update(parts[0])
    assert copy.count == len(every)  # a copy is no view
    x = torch.randn(4, 2, 3)
    expected = np.clip((x.numpy() - every.mean(0)) / np.maximum(every.std(0), 1e-3), -5, 5)
    assert np.allclose(copy.scale(x), expected, atol=1e-3)
    assert copy.scale(x).dtype == torch.float32


def test_an_image_has_one_deviation():
    """A pixel that changed once in a thousand frames does not weigh a thousand times as much."""
    torch.manual_seed(0)
    frames = torch.zeros(1_000, 1, 2, 2, dtype=torch.uint8)
    frames[:, 0, 0] = torch.randint(256, (1_000, 2), dtype=torch.uint8)
    frames[7, 0, 1, 1] = 150
    moments = icm.Moments((1, 2, 2), CPU)
    moments.update(frames)
    every = frames.double().numpy()
    x = frames[7:9]
    expected = (x.numpy() - every.mean(0)) / every.std(0).mean()
    assert np.allclose(moments.scale(x), expected, atol=1e-4)
    assert moments.scale(x)[0, 0, 1, 1] < 5


# ── (3) Advantages ────────────────────────────────────────────────────────────────────────────────────────────────


def a_rollout(seed=0, length=9, envs=3, streams=2):
    rng = torch.Generator().manual_seed(seed)
    over = torch.rand(length, envs, generator=rng) < 0.3
    terminated = over & (torch.rand(length, envs, generator=rng) < 0.5)
    values, next_values = (torch.randn(length, envs, streams, generator=rng) for _ in range(2))
    # Inside an episode the next state is the one of the next row
    next_values[:-1] = torch.where(over[:-1, :, None], next_values[:-1], values[1:])
    reward = torch.randn(length, envs, generator=rng)
    bonus = torch.rand(length, envs, generator=rng)
    last = torch.randn(envs, streams, generator=rng)
    empty = torch.zeros(length, envs)
    return icm.Rollout(empty, empty, empty, values, reward, empty, terminated, over), bonus, next_values, last


def slow_advantage(rewards, values, following, over, gamma, lam):
    """Of one environment: the λ-weighted mean of all n-step advantages that its episode allows."""
    found = []
    for t in range(len(rewards)):
        end = next((k for k in range(t, len(rewards)) if over[k]), len(rewards) - 1)
        steps = [
            sum(gamma ** (k - t) * rewards[k] for k in range(t, n + 1))
            + gamma ** (n + 1 - t) * following[n]
            - values[t]
            for n in range(t, end + 1)
        ]
        weights = [(1 - lam) * lam**i for i in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
        found.append(sum(w * x for w, x in zip(weights, steps, strict=True)))
    return found


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0.1, 1), lam=st.floats(0, 1), length=st.integers(1, 9))
def test_gae_is_the_mean_of_n_step_advantages(seed, gamma, lam, length):
    rollout, _, next_values, _ = a_rollout(seed, length)
    following = next_values[..., 0] * ~rollout.terminated
    fast = icm.gae(rollout.reward, rollout.values[..., 0], following, rollout.over, gamma, lam)
    for i in range(3):
        columns = (rollout.reward, rollout.values[..., 0], following, rollout.over)
        slow = slow_advantage(*(column[:, i].tolist() for column in columns), gamma, lam)
        assert fast[:, i].tolist() == pytest.approx(slow, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("episodic", [True, False])
def test_bonuses_go_on_beyond_an_episodes_end_and_rewards_do_not(episodic):
    args = Args(episodic=episodic, gamma=0.9, bonus_gamma=0.8, gae_lambda=0.7, reward_weight=2.0, bonus_weight=0.5)
    rollout, bonus, next_values, last = a_rollout(3)
    advantage, targets = icm.advantages(rollout, bonus, next_values, last, 0.0, args)
    total, slow_targets = np.zeros((9, 3)), np.zeros((9, 3, 2))
    for i in range(3):
        for stream, rewards, gamma, weight in ((0, rollout.reward, 0.9, 2.0), (1, bonus, 0.8, 0.5)):
            values, over = rollout.values[:, i, stream].tolist(), rollout.over[:, i].tolist()
            following = (next_values[:, i, stream] * ~rollout.terminated[:, i]).tolist()
            if stream == 1 and not episodic:
                following, over = [*values[1:], last[i, 1].item()], [False] * 9
            slow = np.array(slow_advantage(rewards[:, i].tolist(), values, following, over, gamma, 0.7))
            total[:, i] += weight * slow
            slow_targets[:, i, stream] = slow + values
    assert np.allclose(targets, slow_targets, atol=1e-4)
    assert np.allclose(advantage, (total - total.mean()) / total.std(), atol=1e-4)


def test_counting_rewards_from_what_is_usual_changes_no_advantage():
    rollout, bonus, next_values, last = a_rollout(5, streams=1)
    args, usual = Args(reward="extrinsic", gamma=0.9), -0.7
    forever = usual / (1 - 0.9)
    moved = rollout._replace(reward=rollout.reward - usual, values=rollout.values - forever)
    assert rollout.terminated.any()
    plain, targets = icm.advantages(rollout, bonus, next_values, last, 0.0, args)
    found, moved_targets = icm.advantages(moved, bonus, next_values - forever, last, -forever, args)
    assert torch.allclose(found, plain, atol=1e-4)
    assert torch.allclose(moved_targets + forever, targets, atol=1e-4)


def test_where_all_moves_cost_the_same_the_value_stays_0(tmp_path):
    """MountainCar-v0 before the top was found."""
    learned = trained("--env-id MountainCar-v0", tmp_path)
    extrinsic, intrinsic = learned["agent"]["values.weight"]
    assert (extrinsic == 0).all() and (intrinsic != 0).all()


@pytest.mark.parametrize("reward", ["extrinsic", "intrinsic"])
def test_one_stream_alone(reward):
    rollout, bonus, next_values, last = a_rollout(1, streams=1)
    advantage, targets = icm.advantages(rollout, bonus, next_values, last, 0.0, Args(reward=reward, episodic=True))
    rewards, alone = rollout.reward if reward == "extrinsic" else bonus, np.zeros((9, 3))
    following = next_values[..., 0] * ~rollout.terminated
    for i in range(3):
        columns = (rewards, rollout.values[..., 0], following, rollout.over)
        alone[:, i] = slow_advantage(*(column[:, i].tolist() for column in columns), 0.99, 0.95)
    assert np.allclose(targets[..., 0], alone + rollout.values[..., 0].numpy(), atol=1e-4)
    assert np.allclose(advantage, (alone - alone.mean()) / alone.std(), atol=1e-4)


# ── (4) The policy learns ─────────────────────────────────────────────────────────────────────────────────────────


def test_ppo_losses_are_the_papers():
    torch.manual_seed(0)
    agent, x, action = icm.Agent((6,), FOUR, 2, 16), torch.randn(20, 6), torch.randint(4, (20,))
    for layer in (agent.policy, agent.values):
        torch.nn.init.normal_(layer.weight)
    outputs, values = agent(x)
    old = outputs.detach().log_softmax(-1).gather(1, action[:, None])[:, 0] + 0.4 * torch.randn(20)
    advantage, targets = torch.randn(20), torch.randn(20, 2)
    agent.forward = lambda _: (outputs, values)
    policy, value, entropy = icm.ppo_losses(agent, x, action, old, advantage, targets, 0.2)
    chances = outputs.softmax(-1)
    ratios = [(chances[i, action[i]] / old[i].exp()).item() for i in range(20)]
    terms = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantage.tolist(), strict=True)]
    assert policy.item() == pytest.approx(-np.mean(terms), rel=1e-4)
    assert value.item() == pytest.approx(0.5 * ((values - targets) ** 2).sum().item() / 20, rel=1e-4)
    assert entropy.item() == pytest.approx(-(chances * chances.log()).sum(-1).mean().item(), rel=1e-4)
    (slope,) = torch.autograd.grad(policy, outputs)
    held = [(r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(ratios, advantage.tolist(), strict=True)]
    assert 2 < sum(held) < 18
    assert [bool((row == 0).all()) for row in slope] == held  # no reward for going further


def test_without_rewards_their_value_stays_0(tmp_path):
    """Else its noise, which the advantages' normalisation makes large, would hide the bonuses."""
    learned = trained("--total-timesteps 700", tmp_path)
    extrinsic, intrinsic = learned["agent"]["values.weight"]
    assert (extrinsic == 0).all() and learned["agent"]["values.bias"][0] == 0
    assert (intrinsic != 0).all()


# ── (5) The two models learn ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("actions", [FOUR, BOX])
def test_losses_are_equations_3_and_5(actions):
    net, (s, a, s2) = module(actions), transitions(actions=actions)
    inverse_loss, forward_loss = net.losses(s, a, s2)
    guess = net.inverse(torch.cat([net.phi(s), net.phi(s2)], 1))
    if actions is FOUR:
        slow = -sum(guess.log_softmax(-1)[i, a[i]] for i in range(32)) / 32
    else:
        slow = sum(((guess[i] - a[i].clip(-1, 1)) ** 2).mean() for i in range(32)) / 32
    assert inverse_loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert forward_loss.item() == pytest.approx(net.wonder(s, a, s2)[0].mean().item() / net.eta, rel=1e-5)


def touched(net, loss):
    """Which parts a loss has a gradient for."""
    net.zero_grad()
    loss.backward()
    parts = {"encoder": net.encoder, "inverse": getattr(net, "inverse", None), "forecast": net.forecast}
    return {
        name
        for name, part in parts.items()
        if part and any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


def test_which_loss_shapes_which_part():
    batch, apart, joint = transitions(), module(), module(joint=True)
    assert touched(apart, apart.losses(*batch)[0]) == touched(joint, joint.losses(*batch)[0]) == {"encoder", "inverse"}
    assert touched(apart, apart.losses(*batch)[1]) == {"forecast"}
    assert touched(joint, joint.losses(*batch)[1]) == {"encoder", "forecast"}
    for features in ("random", "pixels"):
        net = module(features=features)
        assert touched(net, sum(net.losses(*batch))) == {"forecast"}
        assert set(net.learned()) == {"forecast"} and not hasattr(net, "inverse")
    assert net.losses(*batch)[0] == 0


def test_random_features_stay_and_are_saved(tmp_path):
    flags = f"{TINY} --features random"
    states = [
        helpers.checkpoint(helpers.run("icm", f"{flags} --total-timesteps {n}", tmp_path / str(n))) for n in (800, 1)
    ]
    assert helpers.differences(states[0]["fixed"], states[1]["fixed"]) == [] and states[0]["fixed"]
    assert helpers.differences(states[0]["learned"], states[1]["learned"])
    args = icm.parse_args(["--evaluate", str(tmp_path / "1")])
    env = icm.make_task(args)
    other = icm.ICM(env.observation_space.shape, env.action_space, args)
    assert helpers.differences(other.encoder.state_dict(), states[0]["fixed"])  # no other network would do


def descend(net, batch, steps, rate=1e-3, beta=0.2):
    optimizer = torch.optim.Adam([p for part in net.learned().values() for p in part.parameters()], rate)
    for _ in range(steps):
        inverse_loss, forward_loss = net.losses(*batch())
        optimizer.zero_grad()
        ((1 - beta) * inverse_loss + beta * forward_loss).backward()
        optimizer.step()


@pytest.mark.parametrize("features", ["inverse", "random", "pixels"])
def test_bonus_falls_where_it_has_been(features):
    known, other = transitions(seed=1), transitions(seed=2)
    net = module(features=features)
    before = [net.wonder(*batch)[0].mean().item() for batch in (known, other)]
    descend(net, lambda: known, 300, rate=1e-2)
    after = [net.wonder(*batch)[0].mean().item() for batch in (known, other)]
    assert after[0] < 0.3 * before[0]
    assert after[1] > 3 * after[0]


def ring(count, noise, generator):
    """A walk around a ring of eight places, and beside it numbers that nobody can foresee."""
    place, a = (torch.randint(n, (count,), generator=generator) for n in (8, 2))
    a = 3 * a  # of four actions only two are taken: one step back, one on
    place2 = (place + torch.where(a > 0, 1, -1)) % 8

    def seen(place):
        return torch.cat([torch.eye(8)[place], noise * torch.randn(count, 8, generator=generator)], 1)

    return seen(place), a, seen(place2)


@pytest.mark.learning  # it trains
@pytest.mark.parametrize(("features", "foreseen"), [("inverse", True), ("pixels", False)])
def test_inverse_features_leave_out_what_no_action_changes(features, foreseen):
    """The share of what changes in the features that the forecast misses: next to nothing, or all of the noise."""
    generator = torch.Generator().manual_seed(0)
    net = module(shape=(16,), features=features, seed=1)
    descend(net, lambda: ring(256, 1.0, generator), 1_500, rate=1e-2)
    error = net.wonder(*ring(2_000, 1.0, generator))[1]["model/forward_error"].item()
    assert (error < 0.15) if foreseen else (error > 0.4)
    if foreseen:
        assert net.wonder(*ring(2_000, 1.0, generator))[1]["model/inverse_error"] < 0.02


def test_metrics_are_shares_of_standing_still():
    net, (s, a, s2) = module(), transitions()
    _, found = net.wonder(s, a, s2)
    missed = moved = wrong = 0.0
    for i in range(32):
        phi, phi2 = net.phi(s[i : i + 1])[0], net.phi(s2[i : i + 1])[0]
        missed += ((phi + net.forecast(torch.cat([phi, torch.eye(4)[a[i]]])) - phi2) ** 2).sum().item()
        moved += ((phi - phi2) ** 2).sum().item()
        wrong += net.inverse(torch.cat([phi, phi2])).argmax().item() != a[i]
    assert found["model/forward_error"].item() == pytest.approx(missed / moved, rel=1e-4)
    assert found["model/inverse_error"].item() == pytest.approx(wrong / 32)


# ── What training makes of them ───────────────────────────────────────────────────────────────────────────────────

TINY = "--total-timesteps 800 --envs 4 --horizon 25 --maze-size 7 --episode-limit 60 --hidden 16 --model-hidden 16"


def trained(flags, folder):
    return helpers.checkpoint(helpers.run("icm", f"{TINY} {flags}", folder))["learned"]


def test_the_size_of_bonuses_is_divided_out(tmp_path):
    """η is a power of two times another: to the bit the same run. Without the division it is another one."""
    for flags, same in (("", True), ("--no-normalize", False)):
        runs = [trained(f"{flags} --eta {eta}", tmp_path / f"{flags}{eta}") for eta in (0.25, 2.0)]
        assert (helpers.differences(*runs) == []) == same


def test_which_sizes_of_rewards_count(tmp_path):
    """Of clipped ones the sign; of large ones how they compare with each other; small ones are what they are. All
    factors are powers of two: what is the same is so to the bit."""
    for name, factor in (("Tiny", 2**-8), ("Small", 2**-5), ("Large", 2**5), ("Huge", 2**8)):
        gym.register(f"{name}-v0", entry_point=Paid, kwargs={"factor": factor})
    for flags, one, other, same in (
        ("--clip-reward", "Tiny", "Huge", True),
        ("", "Large", "Huge", True),
        ("", "Tiny", "Small", False),
        ("", "Small", "Large", False),
    ):
        runs = [
            trained(f"{flags} --reward extrinsic --env-id {name}-v0", tmp_path / f"{flags}{one}{other}{name}")
            for name in (one, other)
        ]
        assert (helpers.differences(*runs) == []) == same
    for name in ("Tiny", "Small", "Large", "Huge"):
        del gym.registry[f"{name}-v0"]


class Paid(Counter):
    def __init__(self, factor=1.0):
        self.factor = factor

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.factor * (2 * reward - 1), *rest


def test_step_size_falls(tmp_path):
    """In a line, to a hundredth; at the last update of 800 steps 700 are taken."""
    for decay, share in ((0, 1.0), (1_000, 0.3), (500, 0.01)):
        run = helpers.run("icm", f"{TINY} --decay-steps {decay} --learning-rate 1e-3", tmp_path / str(decay))
        (group,) = helpers.checkpoint(run)["optimisers"]["all"]["param_groups"]
        assert group["lr"] == pytest.approx(1e-3 * share)


def test_a_run_with_processes_is_the_run_without(tmp_path):
    runs = [trained(f"--env-id MountainCar-v0 {flags}", tmp_path / f"r{flags}") for flags in ("", "--processes")]
    assert helpers.differences(*runs) == []


def test_what_was_cut_is_no_success(tmp_path):
    flags = f"{TINY} --env-id MountainCar-v0 --eval-max-steps 20 --log-every 100"
    found = helpers.scalars(helpers.run("icm", flags, tmp_path / "r"))
    for tag in ("charts/success_rate", "eval/success_rate"):
        assert set(found[tag].values()) == {0.0}


def test_numbers_that_run_away_are_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        helpers.run("icm", f"{TINY} --env-id CartPole-v1 --learning-rate 1e20", tmp_path / "r")
    assert exit.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_ctrl_c_reaches_all_processes_and_leaves_a_checkpoint(tmp_path):
    """As a terminal sends it: to the group, while steps are being played."""
    flags = f"{TINY} --env-id CartPole-v1 --processes --horizon 3000 --total-timesteps 1000000 --no-progress"
    code = f"import runpy, sys; sys.argv = ['icm.py', *{[*flags.split(), '--run-dir', str(tmp_path / 'run')]!r}]; "
    code += f"runpy.run_path({str(helpers.ROOT / 'algos' / 'icm.py')!r}, run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/events*")) and process.poll() is None:
        assert time.monotonic() < deadline or process.kill()
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in out and helpers.checkpoint(tmp_path / "run")["step"] > 0


# ── The maze ──────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=25)
@given(half=st.integers(2, 10), seed=st.integers(0, 1_000))
def test_one_way_leads_from_each_tile_to_each_other(half, seed):
    n = 2 * half + 1
    walls = icm.carve(n, np.random.default_rng(seed))
    assert walls[[0, -1]].all() and walls[:, [0, -1]].all()
    free = ~walls
    assert free[1::2, 1::2].all()
    joined = (free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum()
    assert joined == free.sum() - 1  # a tree, if it hangs together
    away = icm.moves_from(walls, (1, 1))
    assert ((away >= 0) == free).all()  # it does
    assert away[1, 1] == 0
    for tile in np.argwhere(away > 0):
        around = [away[tuple(tile + d)] for d in icm.STEPS]
        assert min(x for x in around if x >= 0) == away[tuple(tile)] - 1


def test_mazes_move_end_and_begin_again():
    mazes = icm.CuriousMazes(4, n=5, limit=30, layout=1)
    obs, _ = mazes.reset(seed=0)
    tile, steps = np.ones((4, 2), int), np.zeros(4, int)
    rng, ends = np.random.default_rng(0), []
    for _ in range(400):
        assert np.array_equal(obs, mazes.seen[tuple(tile.T)])
        actions = rng.integers(4, size=4)
        obs, reward, terminated, truncated, infos = mazes.step(actions)
        for i in range(4):
            ahead = tile[i] + icm.STEPS[actions[i]]
            tile[i] = tile[i] if mazes.walls[tuple(ahead)] else ahead
            steps[i] += 1
            won = tuple(tile[i]) == tuple(mazes.goal)
            assert (reward[i], terminated[i], truncated[i]) == (float(won), won, not won and steps[i] == 30)
            assert infos["tile"][i].tolist() == tile[i].tolist()
            assert np.array_equal(infos["final_obs"][i], mazes.seen[tuple(tile[i])])
            if terminated[i] or truncated[i]:
                ends.append(won)
                tile[i], steps[i] = (1, 1), 0
    assert 0 < sum(ends) < len(ends)


def test_the_window_shows_what_is_around():
    mazes = icm.CuriousMazes(1, n=9, layout=3)
    image = np.pad(mazes.image, ((0, 0), (2, 2), (2, 2)))
    for row, column in np.argwhere(~mazes.walls):
        assert np.array_equal(mazes.seen[row, column], image[:, row : row + 5, column : column + 5])
    centres = mazes.seen[~mazes.walls][:, :, 2, 2]
    assert len(np.unique(centres, axis=0)) == len(centres)  # no two places look alike
    assert mazes.image[:, mazes.walls].max() < 64 < 128 <= mazes.image[:, ~mazes.walls].min()


def test_the_screen_shows_noise_and_nothing_else_does():
    quiet, noisy = icm.CuriousMazes(1, layout=2), icm.CuriousMazes(1, layout=2, noisy_tv=True)
    noisy.reset(seed=0)
    shown = 0
    for tile in np.argwhere(~quiet.walls):
        noisy.tile = tile[None]
        one, two = noisy._observation()[0], noisy._observation()[0]
        screen = noisy.noisy[tuple(tile)]
        assert np.array_equal(one[:, ~screen], quiet.seen[tuple(tile)][:, ~screen])
        assert np.array_equal(two[:, ~screen], one[:, ~screen])
        assert not screen.any() or (one[:, screen] != two[:, screen]).mean() > 0.9
        shown += screen.any()
    assert 3 < shown < 0.5 * (~quiet.walls).sum()
    assert not noisy.noisy[1, 1].all()


def test_one_maze_is_as_many():
    one = gym.make("CuriousMaze-v0", n=7, limit=20)
    many = icm.CuriousMazes(3, n=7, limit=20)
    (obs, _), (rows, _) = one.reset(seed=0), many.reset(seed=0)
    for action in np.random.default_rng(0).integers(4, size=60):
        assert np.array_equal(obs, rows[1])
        obs, reward, terminated, truncated, _ = one.step(action)
        rows, rewards, ends, cuts, infos = many.step(np.full(3, action))
        assert (reward, terminated, truncated) == (rewards[1], ends[1], cuts[1])
        assert np.array_equal(obs, infos["final_obs"][1])
        assert (one.unwrapped.render()[10::20, 10::20] == (255, 0, 0)).all(-1)[tuple(infos["tile"][1])]
        if terminated or truncated:
            obs, _ = one.reset()
    assert one.reset(seed=0)[0].dtype == np.uint8


@pytest.mark.parametrize("noisy_tv", [False, True])
def test_mazes_go_on_where_they_were(noisy_tv, tmp_path):
    mazes = icm.CuriousMazes(5, n=9, limit=25, noisy_tv=noisy_tv)
    mazes.reset(seed=3)
    rng = np.random.default_rng(0)
    actions = rng.integers(4, size=(80, 5))
    for row in actions[:33]:
        mazes.step(row)
    icm.save_checkpoint(tmp_path, envs=mazes.state_dict())
    first = [mazes.step(row)[0] for row in actions[33:]]
    other = icm.CuriousMazes(5, n=9, limit=25, noisy_tv=noisy_tv)
    other.reset(seed=9)
    other.load_state_dict(icm.load_checkpoint(tmp_path)["envs"])
    assert np.array_equal(first, [other.step(row)[0] for row in actions[33:]])


# ── Other tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


class Window(gym.Env):
    """As MiniGrid's: a Dict with an image, the channels last, and other things."""

    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (7, 6, 3), np.uint8), "direction": gym.spaces.Discrete(4)}
    )
    action_space = gym.spaces.Discrete(3, start=5)
    taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"image": np.arange(126, dtype=np.uint8).reshape(7, 6, 3), "direction": 0}, {}

    def step(self, action):
        self.taken.append(action)
        return self.reset()[0], 0.0, False, False, {}


def test_an_image_in_a_dict_comes_with_its_channels_first():
    gym.register("Window-v0", entry_point=Window)
    env = icm.make_task(Args(env_id="Window-v0"))
    obs, _ = env.reset()
    assert env.observation_space.shape == obs.shape == (3, 7, 6)
    assert np.array_equal(obs, np.arange(126).reshape(7, 6, 3).transpose(2, 0, 1))
    env.step(0)
    env.step(2)
    assert Window.taken == [5, 7] and env.action_space == gym.spaces.Discrete(3)
    del gym.registry["Window-v0"]


def test_games_are_four_small_grey_pictures():
    env = icm.make_task(Args(env_id="ALE/Breakout-v5"))
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (4, 42, 42)
    assert obs.dtype == np.uint8 and obs.max() > 100
    later = [env.step(i % 4)[0] for i in range(20)]
    assert all(np.array_equal(new[:3], old[1:]) for old, new in itertools.pairwise(later))
    assert env.unwrapped.ale.getFrameNumber() - 80 < 10  # four frames a step


def test_actions_within_bounds_are_numbers_from_minus_one_to_one():
    env = icm.make_task(Args(env_id="Pendulum-v1"))
    torques = []
    step = env.unwrapped.step
    env.unwrapped.step = lambda action: torques.append(float(action[0])) or step(action)
    env.reset(seed=0)
    for action in (-3.0, -1.0, 0.0, 0.5, 7.0):
        env.step(np.array([action], np.float32))
    assert torques == [-2.0, -2.0, 0.0, 1.0, 2.0]


class Flicker(gym.Env):
    """Shows the number of its frame, and ends after ten."""

    observation_space, action_space = gym.spaces.Box(0, 255, (1,), np.uint8), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.frame = 0
        return np.zeros(1, np.uint8), {}

    def step(self, action):
        self.frame += 1
        shown = self.frame if self.frame % 2 else 100 - self.frame
        return np.array([shown], np.uint8), 1.0, self.frame == 10, False, {}


def test_the_last_frames_of_a_game_are_seen():
    env = icm.FourFrames(Flicker())
    env.reset()
    steps = [env.step(0) for _ in range(3)]
    assert [int(obs[0]) for obs, *_ in steps] == [96, 92, 90]  # of frames 3 and 4, 7 and 8, 9 and 10
    assert [reward for _, reward, *_ in steps] == [4.0, 4.0, 2.0]
    assert [terminated for _, _, terminated, *_ in steps] == [False, False, True]


def test_cars_begin_again_when_they_are_cut():
    envs = icm.make_envs(Args(env_id="MountainCar-v0", envs=2))
    _, rollout, _, _ = played(envs, horizon=205)
    assert rollout.over[199].all() and rollout.over.sum() == 2 and not rollout.terminated.any()
    assert torch.equal(rollout.obs[200, :, 1], torch.zeros(2))  # at rest again
    assert (rollout.next_obs[199, :, 1] != 0).all()


def test_places_on_the_map():
    envs = icm.make_envs(Args(env_id="MountainCar-v0", envs=3))
    assert icm.place_grid(envs) == (40, 40)
    low, high = envs.single_observation_space.low, envs.single_observation_space.high
    rows, columns = icm.places(envs, np.stack([low, high, (low + high) / 2]), {})
    assert rows.tolist() == [39, 0, 19] and columns.tolist() == [0, 39, 20]
    assert icm.place_grid(icm.make_envs(Args())) == (13, 13)
    assert icm.place_grid(icm.make_envs(Args(env_id="CartPole-v1", envs=1))) is None


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.learning
def test_curiosity_finds_what_rewards_do_not(tmp_path):
    """The default maze; what the policy alone reaches, and what random moves do, is measured too."""
    found = {
        reward: helpers.scalars(helpers.run("icm", f"--reward {reward} --picture-every 0", tmp_path / reward))
        for reward in ("both", "extrinsic")
    }
    tiles = {reward: max(curves["charts/places"].values()) for reward, curves in found.items()}
    success = {reward: list(curves["charts/success_rate"].values()) for reward, curves in found.items()}
    mazes, rng = icm.CuriousMazes(64), np.random.default_rng(0)
    mazes.reset(seed=0)
    by_chance = {tuple(tile) for _ in range(18_750) for tile in mazes.step(rng.integers(4, size=64))[4]["tile"]}
    assert tuple(mazes.goal) not in by_chance
    assert max(success["extrinsic"]) == 0 and success["both"][-1] > 0.9
    assert list(found["both"]["eval/success_rate"].values())[-1] >= 0.9
    assert tiles["both"] > len(by_chance) > tiles["extrinsic"]


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_losses_are_those_of_eager_mode(tmp_path):
    runs = [trained(f"{flags} --total-timesteps 300", tmp_path / f"r{flags}") for flags in ("", "--compile")]
    for part in runs[0]:
        for name, value in runs[0][part].items():
            assert torch.allclose(value, runs[1][part][name], atol=1e-3)
