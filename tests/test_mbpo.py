"""The mathematics of mbpo.py against slow and obvious references."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions

mbpo = module("mbpo")
ARGS = mbpo.Args(model_layers=2, model_hidden=8, weight_decay=(0.3, 0.2, 0.1), hidden=8, members=4, elites=3)


class Env(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (3,))
    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([1, 5]))


def agent_of(env_id="Unknown-v0", fresh=False, **changes):
    torch.manual_seed(0)
    agent = mbpo.Agent(Env(), replace(ARGS, env_id=env_id, device="cpu", **changes))
    for p in () if fresh else [*agent.parameters(), agent.model.input_mean, agent.model.input_std]:
        p.data += 0.4 * (torch.rand_like(p) - 0.5)
    return agent


def batch(*shape):
    s, a, r, s2 = (torch.randn(*shape, size) for size in (3, 2, 1, 3))
    return mbpo.Transitions(s, a.tanh(), r, s2, (torch.rand(*shape, 1) < 0.4).float(), None)


def targets(s, a):
    """In `filled`, whose second action is constant: the change of the state, then the reward."""
    return torch.cat([0.1 * s.flip(-1).tanh() + a[..., :1], s[..., :1] * a[..., :1]], -1)


def filled(n, length=7):
    replay, (s, a, *_) = mbpo.Replay(n, Env(), "cpu"), batch(n)
    a[:, 1] = 0.5
    for i, (x, u, y) in enumerate(zip(s, a, targets(s, a), strict=True)):
        replay.add(x, u, y[3], x + y[:3], i % length == 6, i - i % length)
    return replay


@pytest.mark.parametrize("env_id", ["Unknown-v0", "Pendulum-v1"])
@torch.no_grad()
def test_the_batched_ensemble_is_its_members_one_by_one_and_its_loss_the_likelihood(env_id):
    net, data = agent_of(env_id).model, batch(4, 6)
    (mean, logvar, logit), y = net(data.s, data.a), torch.cat([data.s2 - data.s, data.r], 2)
    expected = 0.01 * (net.max_logvar - net.min_logvar).sum() - 4 * math.log(2 * math.pi)
    for b in range(4):
        x = (torch.cat([data.s[b], data.a[b]], 1) - net.input_mean) / net.input_std
        for i, (w, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            x = (x * torch.sigmoid(x) if i else x) @ w[b] + bias[b]
        raw = net.max_logvar - torch.log1p(torch.exp(net.max_logvar - x[:, 4:8]))
        raw = net.min_logvar + torch.log1p(torch.exp(raw - net.min_logvar))
        assert torch.allclose(mean[b], x[:, :4], atol=1e-5) and torch.allclose(logvar[b], raw, atol=1e-5)
        expected -= 2 * distributions.Normal(x[:, :4], (raw / 2).exp()).log_prob(y[b]).mean()
        assert x.shape[1] == (9 if net.learn_end else 8) and torch.equal(logit, net(data.s, data.a)[2])
        if net.learn_end:
            expected -= distributions.Bernoulli(logits=x[:, 8]).log_prob(data.terminated[b, :, 0]).mean()
    assert mbpo.ensemble_loss(net, data).item() == pytest.approx(expected.item(), rel=1e-4)


def test_fresh_networks_and_the_optimiser_follow_the_official_code():
    agent = agent_of(fresh=True, model_hidden=300, hidden=300)
    net, critics, layers = agent.model, agent.critics, agent.policy.net[::2]
    for w, fan_in in zip(net.weights, (5, 300, 300), strict=True):  # a normal truncated at 2 std
        assert w.abs().max() <= fan_in**-0.5 and w.std().item() == pytest.approx(0.44 * fan_in**-0.5, rel=0.05)
    for w in (*critics.weights, *(layer.weight for layer in layers)):
        edge = math.sqrt(6 / sum(w.shape[-2:]))  # Glorot's uniform distribution
        assert 0.9 * edge < w.abs().max() <= edge and w.std().item() == pytest.approx(edge / math.sqrt(3), rel=0.1)
    assert all((x == 0).all() for x in (*net.biases, net.input_mean, *critics.biases, *(x.bias for x in layers)))
    assert (net.input_std == 1).all() and (net.max_logvar == 0.5).all() and (net.min_logvar == -10).all()
    groups = mbpo.make_optimizer(net, ARGS).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.2, 1), (0.1, 1), (0, 5)]


@pytest.mark.parametrize("patience", [0, 2])
def test_each_member_trains_on_its_bootstrap_and_keeps_its_best_pass(patience, monkeypatch):
    net, replay, seen, history, loss = agent_of().model, filled(200), [], [], mbpo.ensemble_loss
    args = replace(ARGS, patience=patience, model_batch_size=100, holdout=0.25, model_learning_rate=1e-2)
    monkeypatch.setattr(mbpo, "ensemble_loss", lambda m, data: seen.append(data.s[..., 0]) or loss(m, data))
    forward, unseen = net.forward, set()

    def watch(s, a):
        predicted = forward(s, a)
        if not torch.is_grad_enabled():  # once per pass, on the held-out rows
            unseen.update(s[0, :, 0].tolist())
            errors = (predicted[0] - targets(s, a)).square().mean((1, 2)).tolist()
            history.append((errors, [p.clone() for p in (*net.weights, *net.biases)]))
        return predicted

    monkeypatch.setattr(net, "forward", watch)
    metrics = mbpo.fit(net, mbpo.make_optimizer(net, args), replay, args)
    assert [x.shape for x in seen] == [(4, 100), (4, 50)] * len(history) and len(unseen) == 50
    passes = [torch.cat(seen[i : i + 2], 1) for i in range(0, len(seen), 2)]
    assert not unseen & set(torch.cat(passes).flatten().tolist()) and not torch.equal(passes[0], passes[1])
    assert all(torch.equal(x.sort(1).values, passes[0].sort(1).values) for x in passes)  # the same rows, reordered
    assert all(80 <= len(row.unique()) <= 110 for row in passes[0])  # of 150 rows sampled 150 times: 95 on average
    assert len({tuple(row.sort().values.tolist()) for row in passes[0]}) == 4
    best, kept, last = [1e10] * 4, [None] * 4, 0
    for number, (errors, weights) in enumerate(history, 1):  # the official code's rule
        for b, now in enumerate(errors):
            if (best[b] - now) / best[b] > 0.01:
                best[b], kept[b], last = now, weights, number
    assert metrics["model/passes"] == len(history) == last + patience + 1
    for b in range(4):
        assert all(torch.equal(p[b], q[b]) for p, q in zip((*net.weights, *net.biases), kept[b], strict=True))
    assert net.elites.tolist() == sorted(range(4), key=lambda b: best[b])[:3]
    assert metrics["model/heldout_mse"].item() == pytest.approx(np.mean(sorted(best)[:3]), rel=1e-4)
    rows = replay.data[[x not in unseen for x in replay.data[:, 0].tolist()], :5]
    assert torch.allclose(net.input_mean, rows.mean(0), atol=1e-5) and net.input_std[4] == 1  # a constant action
    assert torch.allclose(net.input_std[:4], rows.std(0, correction=0)[:4], atol=1e-5)


def test_the_length_grows_as_scheduled():
    args = mbpo.PRESETS["hopper"][1]
    lengths = [mbpo.rollout_length(args, 5_000 + 1_000 * epoch) for epoch in (0, 29, 30, 85, 149, 150, 400)]
    assert lengths == [1, 1, 2, 8, 14, 15, 15]  # 1 + 14 (e − 20) / 130, rounded down
    args = replace(ARGS, random_steps=500, epoch_steps=100, rollout_schedule=(0, 2, 1, 3))
    assert [mbpo.rollout_length(args, step) for step in (0, 599, 600, 699, 700, 900)] == [1, 1, 2, 2, 3, 3]
    assert [mbpo.rollout_length(replace(args, rollout_length=k), 900) for k in (0, 7)] == [0, 7]


@pytest.mark.parametrize("n", [0, 1, 4, 101])
@torch.no_grad()
def test_an_imagined_step_samples_an_elite_its_gaussian_and_its_end_for_each_row(n):
    agent, (s, a, *_), counts, found, rows = agent_of(), batch(n), torch.zeros(n, 4), [], range(n)
    agent.model.elites.copy_(torch.tensor([3, 0, 1]))
    agent.model.biases[-1] += 50 * torch.arange(4.0).view(4, 1, 1) * (torch.arange(9) < 4)  # the means are far apart
    agent.model.biases[-1][:, 0, -1] += torch.tensor([-2, 0, 0, 2])
    mean, logvar, logit = agent.model(s.expand(4, -1, -1), a.expand(4, -1, -1))
    for _ in range(300 if n else 1):
        s2, r, terminated = agent.predict(s, a)
        error = torch.cat([s2 - s, r[:, None]], 1) - mean
        member = error.square().sum(2).argmin(0)
        assert (member.bincount(minlength=4) <= -(-n // 3)).all() and len(s2) == len(r) == len(terminated) == n
        counts[rows, member] += 1
        noise, surprise = error / (0.5 * logvar).exp(), terminated.float() - logit.sigmoid()
        found.append(torch.stack([x[member, rows].mean() for x in (noise, noise.square(), surprise)]))
    if n:
        assert (counts[:, [3, 0, 1]] - 100).abs().max() < 45
        assert torch.stack(found).mean(0).tolist() == pytest.approx([0, 1, 0], abs=0.1)


def test_branches_continue_from_their_own_states_up_to_an_end():
    agent = agent_of()
    agent.policy.forward = lambda s: (torch.ones(len(s), 1), None)
    agent.predict = lambda s, a: (  # counts up; 3 is terminal, beyond 10 the model overflows
        torch.where(s + a > 10, torch.inf, s + a), s[:, 0] * 10, (s + a)[:, 0] == 3)  # fmt: skip
    rows = mbpo.branch(agent, torch.tensor([[0.0], [2.0], [8.0]]), 4)
    assert sorted(map(tuple, rows.tolist())) == [  # s, a, r, s', terminated
        (0, 1, 0, 1, 0), (1, 1, 10, 2, 0), (2, 1, 20, 3, 1), (2, 1, 20, 3, 1), (8, 1, 80, 9, 0), (9, 1, 90, 10, 0),
    ]  # fmt: skip
    assert len(mbpo.branch(agent, torch.zeros(25_000, 1), 1)) == 25_000


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(9, 20))
def test_the_pool_keeps_the_latest_rows(sizes, capacity):
    pool, made = mbpo.ModelPool(1, "cpu"), []
    for size in sizes:
        made += range(len(made), len(made) + size)
        pool.add(torch.tensor(made[len(made) - size :]).view(-1, 1), capacity)
        assert pool.data.flatten().tolist() == made[-capacity:]


@pytest.mark.parametrize(("ratio", "length", "real"), [(0.05, None, 12), (0.5, 3, 128), (0.0, None, 0), (0.5, 0, 256)])
def test_a_batch_holds_the_share_of_real_rows(ratio, length, real):
    replay, pool = filled(60), mbpo.ModelPool(10, "cpu")
    pool.add(torch.full((7, 10), 77.0), 7)
    columns = mbpo.sample_batch(replay, pool, replace(ARGS, real_ratio=ratio, rollout_length=length, device="cpu"))
    rows, stored = torch.cat(columns, 1), replay.data[:, :-1].tolist()
    assert [x.shape for x in columns] == [(256, size) for size in (3, 2, 1, 3, 1)]
    assert (rows == 77).all(1).sum() == 256 - real and sum(row in stored for row in rows.tolist()) == real


@torch.no_grad()
def test_the_policy_is_a_squashed_gaussian_and_its_mean_acts_inside_the_environments_bounds():
    agent, s = agent_of().double(), torch.randn(50, 3).double()
    (a, log_prob), (mean, log_std) = agent.policy(s), agent.policy.net(s).chunk(2, 1)
    normal = distributions.Normal(mean, log_std.exp())
    squashed = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    assert torch.allclose(log_prob[:, 0], squashed.log_prob(a).sum(1), atol=1e-6)
    noise = (torch.atanh(torch.stack([agent.policy(s)[0] for _ in range(300)])) - mean) / log_std.exp()
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    action, middle, half = agent.float()(s[0].numpy()), torch.tensor([-0.5, 2.5]), torch.tensor([1.5, 2.5])
    assert action == pytest.approx((middle + half * mean[0].tanh()).numpy(), abs=1e-5)
    for bias, std in ((-1e4, math.exp(-20)), (1e4, math.exp(2))):  # the std is clipped
        agent.policy.net[-1].bias[2:] = bias
        torch.manual_seed(0)
        sample, noise = agent.policy(s[:1].float()), torch.manual_seed(0) and torch.randn(1, 2)
        assert torch.allclose(sample[0], (mean[:1].float() + std * noise).tanh(), atol=1e-4) and sample[1].isfinite()


def test_an_update_is_the_papers_written_out():
    """Each loss by itself, with plain gradient descent in place of Adam."""
    agent, (s, a, r, s2, terminated, _) = agent_of(target_entropy=-0.7), batch(20)
    plain, args = copy.deepcopy(agent), replace(ARGS, gamma=0.9, tau=0.1)
    groups = agent.critics.parameters(), [*agent.policy.parameters(), agent.log_alpha]
    torch.manual_seed(1)
    metrics = mbpo.update(agent, *(torch.optim.SGD(x, 0.1) for x in groups), (s, a, r, s2, terminated), args)

    def q(nets, s, a):
        x = [torch.cat([s, a], 1)] * 2
        for layer, (w, b) in enumerate(zip(nets.weights, nets.biases, strict=True)):
            x = [(x[i].clamp(min=0) if layer else x[i]) @ w[i] + b[i] for i in range(2)]
        return x

    def descend(loss, parameters):
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            p.data -= 0.1 * gradient
        return loss.item()

    torch.manual_seed(1)
    alpha, (a2, log_prob) = plain.log_alpha.exp().item(), plain.policy(s2)
    y = (r + 0.9 * (1 - terminated) * (torch.minimum(*q(plain.targets, s2, a2)) - alpha * log_prob)).detach()
    value = sum(x.mean().item() for x in q(plain.critics, s, a)) / 2
    loss_q = descend(sum((0.5 * (x - y) ** 2).mean() for x in q(plain.critics, s, a)), [*plain.critics.parameters()])
    b, log_prob = plain.policy(s)
    loss_pi = (alpha * log_prob - torch.minimum(*q(plain.critics, s, b))).mean()
    loss_alpha = (-plain.log_alpha * (log_prob.detach() - 0.7)).mean()
    losses = descend(loss_pi, [*plain.policy.parameters()]), descend(loss_alpha, [plain.log_alpha])
    for target, p in zip(plain.targets.parameters(), plain.critics.parameters(), strict=True):
        target.data = 0.9 * target + 0.1 * p
    expected = (loss_q, *losses, value, -log_prob.mean().item(), alpha)
    assert [x.item() for x in metrics.values()] == pytest.approx(expected, rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(agent.parameters(), plain.parameters(), strict=True))


def test_a_run_trains_imagines_and_updates_when_it_should(tmp_path, monkeypatch):
    calls, starts, errors, logged, fit, branch, update = [], [], [], {}, mbpo.fit, mbpo.branch, mbpo.update
    monkeypatch.setattr(mbpo, "fit", lambda *args: calls.append(args[2].size) or fit(*args))
    monkeypatch.setattr(mbpo, "branch", lambda *args: calls.append(args[2]) or starts.append(args[1]) or branch(*args))
    monkeypatch.setattr(mbpo, "update", lambda *args: calls.append("update") or update(*args))
    monkeypatch.setattr(mbpo, "open_loop_error", lambda *args: errors.append(args[2:]) or torch.zeros(args[3]))
    monkeypatch.setattr(mbpo.Run, "log", lambda run, tag, x: logged.setdefault(tag, {}).setdefault(run.step, x))
    mbpo.train(replace(
        ARGS, env_id="Pendulum-v1", total_timesteps=700, random_steps=300, model_every=100, epoch_steps=200, updates=1,
        rollouts=2_000, rollout_schedule=(0, 1, 1, 2), batch_size=8, patience=1, episodes=1, picture_every=10**6,
        run_dir=str(tmp_path / "run"), device="cpu"))  # fmt: skip
    rounds = [[size, k, *["update"] * 100] for size, k in ((300, 1), (400, 1), (500, 2), (600, 2))]
    assert calls == [call for each in rounds for call in each]
    assert errors[:9] == [(n, h) for n in (300, 400, 500) for h in (1, 5, 20)]
    assert logged["model/rollout_length"] == {300: 1, 400: 1, 500: 2, 600: 2}
    assert [*logged["model/passes"]] == [300, 400, 500, 600] and [*logged["losses/critic"]] == [400, 600, 700]
    assert [*logged["model/open_loop_error_20"]] == [400, 500, 600]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["pool"]["rows"]) == 2 * 2 * 2_000  # as many as an epoch makes, of 12,000
    s, a, r, s2, terminated, episode = checkpoint["replay"]["rows"].split((3, 1, 1, 3, 1, 1), 1)
    for sample, size in zip(starts, (300, 400, 500, 600), strict=True):
        row_of = {tuple(row): i for i, row in enumerate(s[:size].tolist())}
        counts = torch.tensor([row_of[tuple(row)] for row in sample.tolist()]).bincount(minlength=size)
        assert (counts > 0).float().mean() > 0.9 and counts.max() < 5 * 2_000 / size  # uniform over D_env
    assert a.abs().max() <= 1 and a[:300].std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    reward = -(torch.atan2(s[:, 1:2], s[:, :1]) ** 2 + 0.1 * s[:, 2:] ** 2 + 0.001 * (2 * a) ** 2)  # torque: ± 2
    assert torch.equal(s[1:200], s2[:199]) and not terminated.any() and torch.allclose(r, reward, atol=1e-4)
    assert episode.unique().tolist() == [0, 200, 400, 600]


@pytest.mark.parametrize(("env_id", "entropy", "alive", "over"), [
    ("InvertedPendulum-v5", -0.05, [(9, 0.19), (9, -0.19)], [(0, 0.21), (0, -0.21)]),
    ("Hopper-v5", -1, [(0.71, 0.19, 99, -99)], [(0.69, 0, 0, 0), (1, -0.21, 0, 0), (1, 0, -150, 0), (1, 0, 0, 150)]),
    ("Walker2d-v5", -3, [(0.81, -0.99), (1.99, 0.99)], [(0.79, 0), (2.01, 0), (1, 1.01), (1, -1.01)]),
    ("Ant-v5", -4, [(0.2, 0), (1, 0)], [(0.19, 0), (1.01, 0)]),
    ("Humanoid-v5", -2, [(1, 0), (2, 0)], [(0.99, 0), (2.01, 0)]),
    ("HalfCheetah-v5", -3, [(1e9, 0)], []),
    ("Pendulum-v1", -2, [(1e9, 0)], []),  # of an environment with two actions
])  # fmt: skip
def test_known_ends_and_target_entropies(env_id, entropy, alive, over):
    ends = mbpo.TERMINAL[env_id](torch.tensor(alive + over, dtype=torch.float32)).tolist()
    assert ends == [False] * len(alive) + [True] * len(over)
    assert agent_of(env_id).target_entropy == entropy and agent_of(env_id, target_entropy=0.0).target_entropy == 0


def test_open_loop_errors_stay_inside_an_episode_and_count_in_std():
    agent, data = agent_of(), filled(60).rows()
    s = torch.arange(60.0)[:, None] + 100 * data.episode
    agent.predict = lambda s, a: (s + 1.5 * a, None, None)
    data = data._replace(s=s, a=torch.ones(60, 1), s2=s + 1)
    expected = [0.5 * h / s.std().item() for h in range(1, 6)]
    assert mbpo.open_loop_error(agent, data, 10, 5).tolist() == pytest.approx(expected, rel=1e-3)
    assert mbpo.open_loop_error(agent, data, 10, 8).isnan().all()
