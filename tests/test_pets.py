"""The mathematics of pets.py against slow and obvious references."""

import math
import operator
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from torch import distributions

pets = module("pets")
ARGS = pets.Args(candidates=40, elites=8, hidden=8, horizon=4)


class Env(gym.Env):
    def __init__(self, size, low, high):
        self.observation_space = gym.spaces.Box(-9, 9, (size,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))


BOX, TOY = Env(3, [-1, -1], [1, 1]), Env(1, [-2], [1])


def ensemble(learn_reward=False, seed=0, **changes):
    torch.manual_seed(seed)
    net = pets.Ensemble(3, 2, learn_reward, replace(ARGS, **changes))
    for p in (*net.parameters(), net.input_mean, net.input_std):
        p.data += 0.3 * torch.randn_like(p)
    return net


def batch(members, n=6):
    return *(torch.randn(members, n, size) for size in (3, 2, 1, 3)), (torch.rand(members, n, 1) < 0.4).float()


@pytest.mark.parametrize("model", ["PE", "P", "DE", "D"])
@pytest.mark.parametrize("learn_reward", [False, True])
@torch.no_grad()
def test_the_batched_ensemble_is_its_members_one_by_one_and_its_loss_the_likelihood(model, learn_reward):
    net, size, expected = ensemble(learn_reward, model=model), 3 + learn_reward, 0.0
    assert net.members == (5 if "E" in model else 1)
    s, a, r, s2, terminated = data = batch(net.members)
    (mean, logvar, logit), y = net(s, a), torch.cat([s2 - s, r], -1)[..., :size]
    for b in range(net.members):
        x = (torch.cat([s[b], a[b]], 1) - net.input_mean) / net.input_std
        for i, (w, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            x = (x * torch.sigmoid(x) if i else x) @ w[b] + bias[b]
        assert torch.allclose(mean[b], x[:, :size], atol=1e-5)
        if "P" in model:
            raw = net.max_logvar - torch.log1p(torch.exp(net.max_logvar - x[:, size : 2 * size]))
            raw = net.min_logvar + torch.log1p(torch.exp(raw - net.min_logvar))
            assert torch.allclose(logvar[b], raw, atol=1e-5)
            log_prob = distributions.Normal(x[:, :size], (raw / 2).exp()).log_prob(y[b])
            expected -= (2 * log_prob + math.log(2 * math.pi)).mean()
        else:
            assert x.shape[1] == size + learn_reward and (logvar[b].exp() == 0).all()
            expected += 0.5 * (x[:, :size] - y[b]).square().mean()
        if learn_reward:
            assert torch.allclose(logit[b], x[:, -1], atol=1e-5)
            expected -= distributions.Bernoulli(logits=x[:, -1]).log_prob(terminated[b, :, 0]).mean()
    if "P" in model:
        expected += 0.01 * (net.max_logvar - net.min_logvar).sum()
    assert pets.ensemble_loss(net, *data).item() == pytest.approx(expected.item(), rel=1e-4)


def test_fresh_networks_and_the_optimiser_follow_the_official_code():
    torch.manual_seed(0)
    net = pets.Ensemble(3, 2, False, replace(ARGS, hidden=400))
    for w, fan_in in zip(net.weights, (5, 400, 400), strict=True):
        assert w.abs().max() <= fan_in**-0.5 and w.std().item() == pytest.approx(0.44 * fan_in**-0.5, rel=0.05)
    assert all((bias == 0).all() for bias in [*net.biases, net.input_mean]) and (net.input_std == 1).all()
    assert (net.max_logvar == 0.5).all() and (net.min_logvar == -10).all()
    groups = pets.make_optimizer(net, replace(ARGS, weight_decay=(0.3, 0.2, 0.1))).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.2, 1), (0.1, 1), (0, 5)]


def filled(n=60, length=7):
    """The third coordinate of a state counts the steps."""
    replay, rng = pets.Replay(n, BOX, "cpu"), np.random.default_rng(0)
    for i in range(n):
        s = rng.normal(2, 3, 3)
        replay.add(np.append(s[:2], i), [rng.uniform(-1, 1), 0.5], i, np.append(s[1:], i + 1), False, i - i % length)
    return replay


def test_each_member_keeps_its_bootstrap_for_a_whole_training(monkeypatch):
    net, seen, loss = ensemble(), [], pets.ensemble_loss
    monkeypatch.setattr(pets, "ensemble_loss", lambda m, *data: seen.append(data[0][..., 2].long()) or loss(m, *data))
    args = replace(ARGS, epochs=2, batch_size=25)
    pets.fit(net, pets.make_optimizer(net, args), filled().rows(), args)
    assert [b.shape for b in seen] == [(5, 25), (5, 25), (5, 10)] * 2
    first, second = (torch.cat(seen[i : i + 3], 1) for i in (0, 3))
    assert torch.equal(first.sort(1).values, second.sort(1).values) and not torch.equal(first, second)
    assert not torch.equal(first[0].sort().values, first[1].sort().values)
    assert all(30 <= len(row.unique()) <= 46 for row in first)  # of 60 rows sampled 60 times: 38 on average
    data = torch.cat([filled().rows().s, filled().rows().a], 1)
    std = torch.cat([data[:, :4].std(0, correction=0), torch.ones(1)])  # the last action is constant
    assert torch.allclose(net.input_mean, data.mean(0)) and torch.allclose(net.input_std, std)


class Linear(torch.nn.Module):
    """Member b: s' ~ N(g_b s + a, σ²)."""

    members, learn_reward = 2, False

    def forward(self, s, a):
        mean = (torch.tensor([0.5, 1.5]).view(2, 1, 1) - 1) * s + a
        return mean, torch.full_like(mean, 2 * math.log(0.01)), torch.zeros(s.shape[:-1])


def planner(monkeypatch, env=TOY, **changes):
    monkeypatch.setitem(pets.REWARDS, "Toy-v0", lambda s, a, s2: s2[..., 0])
    torch.manual_seed(0)
    agent = pets.Agent(env, replace(ARGS, env_id="Toy-v0", members=2, **{"particles": 2, **changes}))
    agent.model = Linear()
    return agent


MEANS = {"TSinf": (0.5**3 + 1.5**3) / 2, "TS1": 1.0, "DS": 1.0, "MM": 1.0, "E": 1.0}


@pytest.mark.parametrize("method", MEANS)
def test_propagation_in_closed_form(method, monkeypatch):
    """TS∞ keeps g_b and ends at the mean of g_b³; TS1 samples g_b at each step and ends at (mean g_b)³."""
    agent = planner(monkeypatch, propagation=method, particles=4_000)
    states, returns = agent.imagine(torch.ones(agent.particles, 1), torch.zeros(agent.particles, 3, 1))
    ends = states[:, -1, 0]
    assert ends.mean().item() == pytest.approx(MEANS[method], abs=0.06)
    assert torch.allclose(returns, states.sum((1, 2)), atol=1e-5)
    assert agent.particles == (1 if method == "E" else 4_000)
    reached = {"TSinf": (0.125, 3.375), "TS1": (0.125, 0.375, 1.125, 3.375), "E": (1.0,)}.get(method, ())
    assert all(((ends - c).abs() < 0.05).float().mean() > 0.05 for c in reached)
    if method == "TSinf":  # the noise of each step, shrunk by g in each later one
        assert ends[ends < 1].std().item() == pytest.approx(0.01 * (1 + 0.5**2 + 0.5**4) ** 0.5, rel=0.1)
    if method in ("DS", "MM"):  # E s² = (1 + 0.5²) E s² of the step before, plus σ²
        assert ends.square().mean().item() == pytest.approx(1.25**3, rel=0.1)
        assert states[:, 0].std().item() == pytest.approx(math.sqrt(0.25 + 0.01**2), rel=0.05)


def test_a_particle_earns_nothing_after_its_end_and_both_are_learned_where_the_task_is_unknown(monkeypatch):
    agent = planner(monkeypatch)
    agent.predict = lambda s, a: (s + 1, s[:, 0] + 1, s[:, 0] + 1 >= 2)
    assert agent.imagine(torch.zeros(3, 1), torch.zeros(3, 5, 1))[1].tolist() == [3.0] * 3  # 1 + 2, then the end
    agent = pets.Agent(TOY, replace(ARGS, env_id="Unknown-v0", propagation="E", model="D"))
    agent.model.forward = lambda s, a: (torch.cat([a, 7 * s], -1), torch.zeros(2), s[..., 0] - 1)
    s2, r, terminated = agent.predict(torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0], [1.0]]))
    assert s2[:, 0].tolist() == [1.5, 3.0] and r.tolist() == [3.5, 14.0] and terminated.tolist() == [False, True]


def test_cems_update_is_the_smoothed_mean_and_variance_of_the_elites_and_its_noise_stays_inside_the_box():
    torch.manual_seed(0)
    seen, low, high = [], torch.tensor([-100.0]), torch.tensor([100.0])
    args = replace(ARGS, iterations=3, alpha=0.3, candidates=400, elites=80)
    found = pets.cem(lambda x: seen.append(x) or -x[:, 0, 0].abs(), torch.zeros(4, 1), low, high, args)
    mean, var = np.zeros((4, 1)), np.full((4, 1), 50.0**2)
    for actions in seen:
        assert actions.std(0).numpy() == pytest.approx(0.88 * np.sqrt(var), rel=0.12)  # truncated at 2 std
        elites = np.array(sorted(actions.tolist(), key=lambda x: abs(x[0][0]))[:80])
        mean, var = 0.3 * mean + 0.7 * elites.mean(0), 0.3 * var + 0.7 * elites.var(0)
    assert found.numpy() == pytest.approx(mean, abs=1e-3)
    pets.cem(lambda x: seen.append(x) or x.sum((1, 2)), torch.full((2, 1), 0.8), low / 50, high / 100, args)
    assert (seen[3] - 0.8).abs().max() <= 0.2 and seen[5].min() >= -2 and seen[5].max() <= 1


def test_the_planner_averages_particles_shifts_its_plan_and_survives_nan(monkeypatch):
    agent, scored = planner(monkeypatch, candidates=3, elites=1), []
    assert agent.mean.flatten().tolist() == [-0.5] * 4  # the centre of the box
    agent.predict = lambda s, a: (s, a[..., 0] * (1 + torch.arange(len(s)) // 3), torch.zeros(len(s), dtype=torch.bool))
    actions, plan = torch.rand(3, 4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    monkeypatch.setattr(pets, "cem", lambda returns_of, *_: scored.append(returns_of(actions)) or plan)
    assert agent(np.zeros(1)) == pytest.approx(0.1)
    assert agent.mean.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4, 0.0])
    assert torch.allclose(scored[0], 1.5 * actions.sum((1, 2)))
    for bad in (math.nan, math.inf, -math.inf):
        agent.predict = lambda s, a, r=bad: (s, torch.full((len(s),), r), torch.zeros(len(s), dtype=torch.bool))
        agent(np.zeros(1))
        assert (scored[-1] == -1e30).all()
    agent = planner(monkeypatch, Env(1, [0.2], [1]))
    agent(np.zeros(1))
    assert agent.mean[-1].item() == pytest.approx(0.2)  # the action closest to 0


def test_random_shooting_returns_the_best_of_as_many_candidates(monkeypatch):
    agent, seen = planner(monkeypatch, optimizer="random", candidates=500, propagation="E"), []
    agent.imagine = lambda s, actions: seen.append(actions) or (None, -(actions - 0.4).square().sum((1, 2)))
    assert agent(np.zeros(1)) == min(seen[0], key=lambda x: (x - 0.4).square().sum().item())[0].numpy()
    assert seen[0].shape == (500 * ARGS.iterations, 4, 1) and -2 <= seen[0].min() < -1.9 and 0.9 < seen[0].max() <= 1


@pytest.mark.parametrize("env_id", pets.REWARDS)
def test_rewards_are_the_environments_own(env_id):
    env, rng = pets.make_env(replace(ARGS, env_id=env_id)), np.random.default_rng(0)
    s2, _ = env.reset(seed=0)
    for _ in range(50):
        s, a = s2, rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        s2, r, *_ = env.step(a)
        assert pets.REWARDS[env_id](*map(torch.as_tensor, (s, a, s2))).item() == pytest.approx(r, abs=1e-4)


def test_the_cart_pole_obeys_its_equations_of_motion_and_pays_for_an_upright_pole_in_the_middle():
    """The accelerations over one step are those of the two linear equations in (x'', θ'') at its middle."""
    env, a, lever = pets.CartPoleSwingUp(), np.array([0.7], np.float32), 5.019 * 0.3
    env.reset(seed=0)
    state = operator.attrgetter("x", "v", "angle", "w")
    for _ in range(10):
        before, obs, after = map(np.array, (state(env), env.step(a)[0], state(env)))
        _, v, angle, w = (before + after) / 2
        m = [[15.491, lever * np.cos(angle)], [lever * np.cos(angle), 0.1887 + 5.019 * 0.09]]
        force = [70 - v + lever * w**2 * np.sin(angle), -lever * 9.81 * np.sin(angle) - w]
        assert (after - before)[[1, 3]] / 0.04 == pytest.approx(np.linalg.solve(m, force), rel=0.05, abs=0.1)
        assert (after - before)[[0, 2]] / 0.04 == pytest.approx((v, w), rel=0.05, abs=0.05)
        assert obs.tolist() == [env.x, env.v, np.cos(env.angle), np.sin(env.angle), env.w]
    pushed = [env.reset(seed=1) and env.step(np.array([force]))[0].tolist() for force in (-3.0, -9.0)]
    assert pushed[0] == pushed[1]  # the force is limited
    env.x, env.v, env.angle, env.w = 2.5, 0.0, 0.0, 0.0
    assert env.step(np.array([3.0]))[0] == pytest.approx([2.5, 0, 1, 0, 0], abs=0.01)  # a blocked cart moves no pole
    env.v = 5.0
    assert env.step(a)[0][4] > 1  # a stopped one does
    # upright; aside; hanging; horizontal with its tip above the centre
    states = torch.tensor([[0.0, 0, -1, 0, 0], [0.6, 0, -1, 0, 0], [0.0, 0, 1, 0, 0], [-0.6, 0, 0, 1, 0]])
    rewards = pets.cart_pole_reward(states, torch.eye(4)[:, 1:2], states)
    assert rewards.tolist() == pytest.approx([1, math.exp(-1) - 0.01, math.exp(-4), math.exp(-1)], abs=1e-5)


def test_the_model_is_trained_after_each_trial(monkeypatch, tmp_path):
    sizes, firsts, fit, metrics = [], [], pets.fit, pets.heldout_metrics
    monkeypatch.setattr(pets, "fit", lambda *args: sizes.append(len(args[2].s)) or fit(*args))
    monkeypatch.setattr(pets, "heldout_metrics", lambda *args: firsts.append(args[2]) or metrics(*args))
    flags = "--random-steps 150 --refit-every 100 --epochs 1 --candidates 9 --iterations 1 --elites 2 --episodes 1"
    pets.main(["pendulum", "--total-timesteps", "400", "--run-dir", str(tmp_path / "run"), *flags.split()])
    assert sizes == [150, 250, 350] and firsts == [150, 250]


def test_heldout_metrics_on_known_models():
    """A model that counts steps by 1.5 errs by half a step each; members that differ by 1 have the std 0.5."""
    replay = filled()
    replay.data[:, :2] = replay.data[:, 6:8] = 0.0
    replay.data[:, 2] += 100 * replay.data[:, -1]
    replay.data[:, 8] = replay.data[:, 2] + 1
    agent = pets.Agent(BOX, replace(ARGS, env_id="Pendulum-v1", members=2, particles=2))
    agent.predict = lambda s, a: (s + torch.tensor([0.0, 0.0, 1.5]), s[:, 0], torch.zeros(len(s), dtype=torch.bool))
    step = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])[:, None]
    agent.model.forward = lambda s, a: (step.expand(2, s.shape[1], 3), torch.zeros(2, s.shape[1], 3), s[..., 0])
    metrics, scale = pets.heldout_metrics(agent, replay, 20), replay.rows().s[:, 2].std().item()
    assert [metrics[f"model/open_loop_error_{h}"] for h in (1, 5)] == pytest.approx([0.5 / scale / 3, 2.5 / scale / 3])
    assert metrics["model/disagreement"] == pytest.approx(0.5 / scale / 3) and "model/open_loop_error_20" not in metrics
    assert metrics["model/heldout_loss"] == pytest.approx(1 / 6 + 0.01 * 3 * 10.5 / 2, rel=1e-4)
