"""The mathematics of algos/mage.py against slow and obvious references."""

import copy
import math
import shutil
import threading
import types

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from torch import distributions

mage, pets = helpers.module("mage"), helpers.module("pets")
Args = mage.Args
CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ensemble(members=4, state=3, action=2, unread=0, ends=False, rewards=0):
    """Random biases, so that no two members agree, and means and deviations that are not 0 and 1."""
    torch.manual_seed(0)
    model = mage.GaussianEnsemble(members, state, action, 2, 16, unread, ends, rewards)
    model.set_normalizer(columns(100, state, action))
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_()
    return model


def columns(n, state=3, action=2, seed=0):
    s, a = 2 + 3 * numbers(n, state, seed=seed), numbers(n, action, seed=seed + 1).tanh()
    s2 = s + 0.5 + a.sum(1, keepdim=True) + 0.1 * numbers(n, state, seed=seed + 2)
    r = s2.sum(1) + 0.1 * numbers(n, seed=seed + 3)
    ended = numbers(n, seed=seed + 4) > 1
    return mage.Transitions(s, a, r, s2, ended, torch.zeros(n, dtype=torch.bool))


def learner(state=3, action=2, unread=0, **settings):
    torch.manual_seed(1)
    made = mage.TD3(state, action, unread, Args(hidden=16, **settings), CPU)
    made.set_normalizer(columns(100, state, action).obs)
    with torch.no_grad():  # targets that are not what they follow
        for p in (*made.target_policy.parameters(), *made.target_critics.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return made


class NoLog:
    def __init__(self):
        self.means = {}

    def mean(self, tag, value):
        self.means.setdefault(tag, []).append(float(torch.as_tensor(value).detach()))


def smooth_task(monkeypatch, env_id="Pendulum-v1"):
    """A reward that needs s, a and s', in a table of its own."""
    task = mage.Task(lambda s, a, s2: s[..., 0] * a[..., 0] + (s2[..., 1] - s[..., 1]).sin())
    monkeypatch.setitem(mage.TASKS, env_id, task)
    return task


# ── (2) The model ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("unread", "ends"), [(0, False), (1, True)])
def test_the_batched_module_is_a_network_for_each_member(unread, ends):
    model, data = ensemble(unread=unread, ends=ends), columns(20, seed=9)
    x = model.inputs(data.obs, data.action).expand(4, -1, -1)
    mean, logvar, logit = model(x)
    reference = columns(100)
    read = torch.cat([reference.obs[:, unread:], reference.action], 1)
    for b in range(4):
        y = (torch.cat([data.obs[:, unread:], data.action], 1) - read.mean(0)) / read.std(0, correction=0)
        for i, (w, bias) in enumerate(zip(model.weights, model.biases, strict=True)):
            y = (y / (1 + (-y).exp()) if i else y) @ w[b] + bias[b, 0]
        assert torch.allclose(mean[b], y[:, :3], atol=1e-5)
        assert torch.allclose(logvar[b], -5 + 4 / (1 + (-y[:, 3:6]).exp()), atol=1e-5)
        if ends:
            assert torch.allclose(logit[b], y[:, 6], atol=1e-5)
    assert y.shape[1] == 6 + ends


def test_the_loss_is_twice_the_negative_log_likelihood():
    model, data = ensemble(), columns(20, seed=9)
    own = mage.Transitions(*(torch.stack([c[torch.randperm(20)] for _ in range(4)]) for c in data))
    mean, logvar, _ = model(model.inputs(own.obs, own.action))
    change = columns(100).next_obs - columns(100).obs
    y = (own.next_obs - own.obs - change.mean(0)) / change.std(0, correction=0)
    likelihood = distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(y).mean()
    assert mage.world_loss(model, own).item() == pytest.approx(-2 * likelihood.item() - math.log(2 * math.pi), rel=1e-4)


def test_ends_and_rewards_add_their_losses():
    plain, both = ensemble(), ensemble(ends=True, rewards=8)
    data = columns(20, seed=9)
    own = mage.Transitions(*(c.expand(4, *c.shape) for c in data))
    mean, logvar, logit = both(both.inputs(own.obs, own.action))
    y = both.changes(own.obs, own.next_obs)
    fit = ((mean - y) ** 2 / logvar.exp() + logvar).mean()
    p = logit.sigmoid()
    ends = -torch.where(own.terminated, p, 1 - p).log().mean()
    r = (own.reward - columns(100).reward.mean()) / columns(100).reward.std(correction=0)
    reward = ((both.rewards(own.obs, own.action, own.next_obs) - r) ** 2).mean()
    assert mage.world_loss(both, own).item() == pytest.approx((fit + ends + reward).item(), rel=1e-4)
    assert plain.reward is None and not plain.ends


def test_a_learned_reward_sees_the_next_state():
    """The official code's is shown the state twice. Here a reward that is a function of s' alone is learned."""
    model = ensemble(members=2, rewards=32)
    s, a, s2 = (numbers(4, 3, seed=i).requires_grad_() for i in range(3))
    (slope,) = torch.autograd.grad(model.rewards(s, a[:, :2], s2).sum(), s2)
    assert (slope.abs().sum(1) > 0).all()
    n = 400
    s, a, s2 = numbers(n, 3, seed=1), numbers(n, 2, seed=2).tanh(), numbers(n, 3, seed=3)
    data = mage.Transitions(s, a, s2[:, 0].sin(), s2, torch.zeros(n, dtype=torch.bool), None)
    data = data._replace(truncated=data.terminated)
    optimizer = torch.optim.RAdam(model.parameters(), 1e-2)
    args = Args(members=2, model_batch_size=100, model_batches=400)
    mage.fit_passes(model, mage.world_loss, optimizer, data, args, NoLog())
    seen = model.rewards(s, a, s2) * model.reward_std + model.reward_mean
    assert (seen - data.reward).square().mean() < 0.05 * data.reward.var()


@pytest.mark.parametrize(("count", "size", "passes"), [(100, 30, 3), (20, 30, 7), (210, 30, 1), (90, 30, 3)])
def test_whole_passes_each_member_in_its_own_order(count, size, passes):
    model, data, seen = ensemble(members=3), columns(count), []
    data = data._replace(reward=torch.arange(count, dtype=torch.float32))

    def loss(model, batch):
        seen.append(batch.reward.clone())
        return sum(p.square().sum() for p in model.parameters())

    args, log = Args(model_batch_size=size, model_batches=7), NoLog()
    mage.fit_passes(model, loss, torch.optim.SGD(model.parameters(), 1e-9), data, args, log)
    each = max(count // size, 1)
    assert len(seen) == passes * each >= 7 and len(log.means["losses/model"]) == len(seen)
    assert (passes - 1) * each < 7
    orders = []
    for k in range(passes):
        rows = torch.cat(seen[k * each : (k + 1) * each], 1)
        for b in range(3):
            order = rows[b].tolist()
            assert len(order) == len(set(order)) == each * min(size, count)  # what is left over waits
            orders.append(tuple(order))
    assert len(set(orders)) == len(orders)


def test_gradients_are_clipped_by_value():
    p = torch.nn.Parameter(torch.zeros(3))
    other = torch.nn.Parameter(torch.ones(()))
    mage.descend(torch.optim.SGD([p], 1.0), other * (p * torch.tensor([100.0, -7.0, 0.5])).sum(), 5.0)
    assert p.tolist() == [-5.0, 5.0, -0.5] and other.grad is None


def test_normalisers_are_the_datas():
    model, data = ensemble(rewards=8), columns(50, seed=7)
    data.obs[:, 1], data.next_obs[:, 1] = 4.0, 4.0
    model.set_normalizer(data)
    x = model.inputs(data.obs, data.action)
    assert torch.allclose(x.mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.tensor([1.0, 0, 1, 1, 1]), atol=1e-4)
    y = model.changes(data.obs, data.next_obs)
    assert torch.allclose(y.std(0, correction=0), torch.tensor([1.0, 0, 1]), atol=1e-4)
    assert model.moves.tolist() == [1, 0, 1]
    assert model.reward_mean.item() == pytest.approx(data.reward.mean().item(), rel=1e-5)
    made = learner()
    made.set_normalizer(data.obs)
    for network in made.networks().values():
        assert torch.allclose(network.mean, data.obs.mean(0), atol=1e-5)
        spread = [data.obs[:, 0].std(correction=0).item(), 1, data.obs[:, 2].std(correction=0).item()]
        assert network.std.tolist() == pytest.approx(spread)


# ── (3) The imagined step, its target and its slope ───────────────────────────────────────────────────────────────


def test_each_row_goes_through_one_member(monkeypatch):
    """The members' means far apart, no noise: a row shows whose it is."""
    task, model = smooth_task(monkeypatch), ensemble(members=4)
    with torch.no_grad():
        model.weights[-1].zero_()
        model.biases[-1].copy_(torch.arange(4.0)[:, None, None] * 100)
    model.moves[1] = 0
    predict = mage.sampler(Args(), model, torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0]))
    monkeypatch.setattr(mage.torch, "randn_like", torch.zeros_like)
    s, a = numbers(40, 3), numbers(40, 2).tanh()
    whose = []
    for _ in range(200):
        s2, r, ended = predict(s, a)
        change = (s2 - s - model.change_mean) / model.change_std
        assert torch.equal(s2[:, 1], s[:, 1])  # what never moved
        whose.append((change[:, 0] / 100).round())
        assert torch.bincount(whose[-1].long(), minlength=4).tolist() == [10, 10, 10, 10]
        assert torch.allclose(r, task.reward(s, 0.5 + 2 * a, s2)) and not ended.any()
    share = torch.stack(whose).eq(2).float().mean(0)  # of each row alone
    assert share.min() > 0.12 and share.max() < 0.4
    assert len(predict(s[:7], a[:7])[0]) == 7  # members and rows need not match


def test_samples_have_the_members_mean_and_noise(monkeypatch):
    smooth_task(monkeypatch)
    model, s, a = ensemble(members=2), numbers(1, 3), numbers(1, 2).tanh()
    predict = mage.sampler(Args(), model, torch.zeros(2), torch.ones(2))
    torch.manual_seed(3)
    s2 = predict(s.expand(40_000, -1), a.expand(40_000, -1))[0]
    mean, logvar, _ = model(model.inputs(s, a).expand(2, 1, -1))
    mean = (mean[:, 0] * model.change_std + model.change_mean + s).detach()
    var = (logvar[:, 0].exp() * model.change_std**2).detach()
    assert torch.allclose(s2.mean(0), mean.mean(0), atol=0.03)
    # law of total variance
    assert torch.allclose(s2.var(0), var.mean(0) + mean.var(0, correction=0), rtol=0.03)


def frozen_dice(monkeypatch, model, rows):
    """The same noise and the same members in each call, in double precision."""
    noise = numbers(model.members, -(-rows // model.members), model.state_size, seed=5).double()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(mage.torch, "randn_like", lambda x: noise)
    monkeypatch.setattr(mage.torch, "randperm", lambda n, device=None: order)


@pytest.mark.parametrize("learned", [False, True])
def test_the_slope_is_the_derivative_of_the_whole_target(monkeypatch, learned):
    """∇_a y against finite differences: through the reward, the dynamics, the target actor and the target critics."""
    smooth_task(monkeypatch)
    model, made, n = ensemble(rewards=8 if learned else 0).double(), learner(), 12
    for network in made.networks().values():
        network.double()
    predict = mage.sampler(Args(), model, torch.zeros(2).double(), 2 * torch.ones(2).double())
    frozen_dice(monkeypatch, model, n)
    s, a = numbers(n, 3).double(), numbers(n, 2).double().tanh()
    noise = 0.1 * numbers(n, 2, seed=8).double()
    y, slope = mage.imagined_target(made, predict, s, a, noise, 0.9)
    assert not y.requires_grad and not slope.requires_grad
    s2, r, _ = predict(s, a)
    a2 = (made.target_policy(s2) + noise).clamp(-1, 1)
    assert torch.allclose(y, r + 0.9 * made.target_critics(s2, a2).min(0).values)
    for j in range(2):
        step = torch.zeros(2).double()
        step[j] = 1e-6
        up, down = (mage.imagined_target(made, predict, s, a + sign * step, noise, 0.9)[0] for sign in (1, -1))
        assert torch.allclose(slope[:, j], (up - down) / 2e-6, atol=1e-6, rtol=1e-5)
    # Each path carries some of it: cut one, and the slope is another.
    (through_reward,) = torch.autograd.grad(predict(s, a := a.requires_grad_())[1].sum(), a)
    assert (slope - through_reward).abs().mean() > 1e-3
    policy = made.target_policy
    made.target_policy = lambda s: policy(s.detach())
    without_actor = mage.imagined_target(made, predict, s, a, noise, 0.9)[1]
    assert (slope - without_actor).abs().mean() > 1e-4


def test_a_terminal_state_has_no_value(monkeypatch):
    monkeypatch.setitem(mage.TASKS, "Pendulum-v1", mage.Task(lambda s, a, s2: a[..., 0], lambda s: s[..., 0] > 2))
    model, made = ensemble(), learner()
    predict = mage.sampler(Args(), model, torch.zeros(2), torch.ones(2))
    s, a = 2 + numbers(50, 3), numbers(50, 2).tanh()
    torch.manual_seed(5)
    y, slope = mage.imagined_target(made, predict, s, a, torch.zeros(50, 2), 0.9)
    torch.manual_seed(5)
    _, r, ended = predict(s, a)
    assert 5 < ended.sum() < 45
    assert torch.equal(y[ended], r[ended]) and torch.equal(
        slope[ended], torch.tensor([[1.0, 0.0]]).expand(ended.sum(), 2)
    )
    assert (y[~ended] != r[~ended]).all()


def test_learned_ends_are_drawn():
    model = ensemble(ends=True, rewards=8)
    with torch.no_grad():
        model.weights[-1][..., -1] = 0
        model.biases[-1][..., -1] = math.log(0.3 / 0.7)
    predict = mage.sampler(Args(env_id="Unknown-v0"), model, torch.zeros(2), torch.ones(2))
    torch.manual_seed(0)
    ended = predict(numbers(4_000, 3), numbers(4_000, 2))[2]
    assert ended.dtype == torch.bool and ended.float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_actions_in_targets_are_blurred_and_clipped(monkeypatch, weight):
    smooth_task(monkeypatch)
    made, model, asked = learner(gradient_weight=weight, target_noise=0.4, noise_clip=0.5), ensemble(), []
    made.target_policy = lambda s: torch.full((len(s), 2), 0.8) + 0 * s[:, :2]
    critics = made.target_critics
    made.target_critics = lambda s, a: [critics(s, a), asked.append(a.detach())][0]
    data, predict = columns(2_000), mage.sampler(Args(), model, torch.zeros(2), torch.ones(2))
    a, _, slope = made.target(data, predict)
    assert torch.equal(a, made.policy(data.obs)) and not a.requires_grad  # its own action, without noise
    assert (slope is None) == (weight == 0)
    noise = (asked[0] - 0.8).flatten()
    assert noise.min().item() == pytest.approx(-0.5) and noise.max().item() == pytest.approx(0.2)
    inside = noise[noise.abs() < 0.19]
    beyond = distributions.Normal(0, 0.4).cdf(torch.tensor(-0.5)).item()
    assert (noise < -0.499).float().mean().item() == pytest.approx(beyond, abs=0.02)
    assert inside.mean().abs() < 0.02


def test_without_imagination_it_is_td3():
    made, data = learner(gradient_weight=0.0, imagine=False), columns(30)
    torch.manual_seed(4)
    a, y, slope = made.target(data, None)
    torch.manual_seed(4)
    noise = (0.2 * torch.randn(30, 2)).clamp(-0.5, 0.5)
    for i in range(30):
        s2 = data.next_obs[i : i + 1]
        q = made.target_critics(s2, (made.target_policy(s2) + noise[i]).clamp(-1, 1)).min()
        expected = data.reward[i] + (0 if data.terminated[i] else 0.99 * q)
        assert y[i].item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.equal(a, data.action) and slope is None and data.terminated.any()


# ── (4) The critics ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_losses_are_hubers_of_error_and_of_the_slopes_length():
    made, n = learner(), 40
    s, a, y, slope = numbers(n, 3), numbers(n, 2).tanh(), 2 * numbers(n), 2 * numbers(n, 2, seed=3)
    loss, slope_loss, value = mage.critic_losses(made.critics, s, a, y, slope)

    def huber(x):
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    errors, lengths, small = [], [], 0
    for i in range(n):
        for k in range(2):
            at = a[i : i + 1].clone().requires_grad_()
            q = made.critics(s[i : i + 1], at)[k, 0]
            (dq,) = torch.autograd.grad(q, at)
            errors.append(huber((y[i] - q).item()))
            lengths.append(huber((slope[i] - dq[0]).norm().item()))
            small += lengths[-1] < 0.5
    assert 0 < small < 2 * n  # both of Huber's branches
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)  # ½ Σ_i mean: the mean over both critics
    assert slope_loss.item() == pytest.approx(np.mean(lengths), rel=1e-4)
    assert value.item() == pytest.approx(made.critics(s, a).mean().item(), rel=1e-4)
    only = mage.critic_losses(made.critics, s, a, y, None)
    assert torch.allclose(only[0], loss) and only[1] == 0


def test_one_backward_through_the_model_gives_the_double_backwards_loss_and_gradients(monkeypatch):
    """As the official code has it: δ̂ with the graph of everything, ∇_a δ̂ with create_graph, then backward."""
    smooth_task(monkeypatch)
    model, made, n = ensemble(rewards=8).double(), learner(), 12
    for network in made.networks().values():
        network.double()
    predict = mage.sampler(Args(), model, torch.zeros(2).double(), torch.ones(2).double())
    frozen_dice(monkeypatch, model, n)
    s, noise = numbers(n, 3).double(), 0.1 * numbers(n, 2, seed=8).double()
    parameters = list(made.critics.parameters())

    a = made.policy(s).detach()
    y, slope = mage.imagined_target(made, predict, s, a, noise, 0.99)
    loss, slope_loss, _ = mage.critic_losses(made.critics, s, a, y, slope)
    ours = torch.autograd.grad(loss + 5 * slope_loss, parameters)

    a = made.policy(s)  # with the policy's graph
    s2, r, ended = predict(s, a)
    a2 = (made.target_policy(s2) + noise).clamp(-1, 1)
    target = r + 0.99 * (~ended) * made.target_critics(s2, a2).min(0).values
    total = 0.0
    for k in range(2):
        error = target - made.critics(s, a)[k]
        (gradient,) = torch.autograd.grad(error, a, torch.ones_like(error), create_graph=True)
        length = gradient.norm(dim=1)
        total = total + 0.5 * torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error))
        total = total + 5 * 0.5 * torch.nn.functional.smooth_l1_loss(length, torch.zeros_like(length))
    theirs = torch.autograd.grad(total, parameters)
    assert (loss + 5 * slope_loss).item() == pytest.approx(total.item(), abs=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12) and one.abs().max() > 1e-6


def test_only_the_critics_learn_from_their_loss(monkeypatch):
    smooth_task(monkeypatch)
    model, made, data = ensemble(rewards=8), learner(learning_rate=1e-2), columns(30)
    predict = mage.sampler(Args(), model, torch.zeros(2), torch.ones(2))
    others = [made.policy, made.target_policy, made.target_critics, model]
    before = copy.deepcopy([[p.detach() for p in net.parameters()] for net in (made.critics, *others)])
    made.fit_critics(data.obs, *made.target(data, predict))
    after = [[p.detach() for p in net.parameters()] for net in (made.critics, *others)]
    assert all((x != y).any() for x, y in zip(before[0], after[0], strict=True))
    for old, new, net in zip(before[1:], after[1:], others, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))
        assert all(p.grad is None for p in net.parameters())


def test_with_gradients_the_critic_comes_to_the_closed_form(monkeypatch):
    """A linear world, a quadratic cost, a linear policy: Q^π is a quadratic form, known from a Lyapunov equation.
    Values at the policy's own actions do not tell how Q changes with the action; the gradients do."""
    A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]]).double()
    B = torch.tensor([[0.0], [0.3]]).double()
    K = torch.tensor([[-0.2, -0.4]]).double()
    cost, effort, gamma = torch.tensor([[1.0, 0.0], [0.0, 0.5]]).double(), 0.3, 0.9
    closed = A + B @ K
    P = torch.zeros(2, 2).double()
    for _ in range(500):
        P = -(cost + effort * K.T @ K) + gamma * closed.T @ P @ closed

    def predict(s, a):
        s2 = s @ A.T + a @ B.T
        return s2, -((s @ cost) * s).sum(-1) - effort * a[..., 0] ** 2, torch.zeros(s.shape[:-1], dtype=torch.bool)

    class Quadratic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2, 3, 3).double())

        def forward(self, s, a):
            x = torch.cat([s.expand(2, *s.shape[-2:]), a.expand(2, *a.shape[-2:])], -1)
            return torch.einsum("knd,kde,kne->kn", x, self.w, x)

    errors = {}
    for weight in (0.0, 5.0):
        generator, critics = torch.Generator().manual_seed(0), Quadratic()
        followed = copy.deepcopy(critics).requires_grad_(False)
        stub = types.SimpleNamespace(target_policy=lambda s: s @ K.T, target_critics=followed)
        optimizer = torch.optim.Adam(critics.parameters(), 0.02)
        errors[weight] = []
        for step in range(700):
            s = 2 * torch.rand(64, 2, generator=generator).double() - 1
            a = s @ K.T
            y, slope = mage.imagined_target(stub, predict, s, a, torch.zeros_like(a), gamma)
            loss, slope_loss, _ = mage.critic_losses(critics, s, a, y, slope if weight else None)
            mage.descend(optimizer, loss + weight * slope_loss, 5.0)
            followed.w.lerp_(critics.w, 0.05)
            if step in (499, 699):
                at = a.expand(2, -1, -1).clone().requires_grad_()
                (dq,) = torch.autograd.grad(critics(s, at).sum(), at)
                # ∇_a Q^π = −2 R a + 2 γ Bᵀ P (A s + B a)
                true = -2 * effort * a + 2 * gamma * (s @ A.T + a @ B.T) @ P @ B
                errors[weight].append(((dq - true).norm() / (2**0.5 * true.norm())).item())
    assert errors[5.0][0] < 0.05 and errors[5.0][1] < 0.005
    assert min(errors[0.0]) > 1


# ── (5) The policy ────────────────────────────────────────────────────────────────────────────────────────────────


def test_policy_and_targets_follow_by_turns():
    made, s = learner(learning_rate=1e-2, policy_every=3, tau=0.25), numbers(20, 3)
    for turn in range(1, 7):
        before = {name: copy.deepcopy(list(net.parameters())) for name, net in made.networks().items()}
        metrics = made.improve(s)
        moved = {name: any(not torch.equal(p, q) for p, q in zip(before[name], net.parameters(), strict=True))
                 for name, net in made.networks().items()}  # fmt: skip
        due = turn % 3 == 0
        assert moved == {"policy": due, "critics": False, "target_policy": due, "target_critics": True}
        assert ("losses/policy" in metrics) == due
        for name in ("critics", "policy")[: 1 + due]:
            now, targets = (made.networks()[x].parameters() for x in (name, f"target_{name}"))
            for old, p, target in zip(before[f"target_{name}"], now, targets, strict=True):
                assert torch.allclose(target, 0.75 * old + 0.25 * p, atol=1e-6)
    a = made.policy(s)
    assert mage.actor_loss(made.policy, made.critics, s).item() == pytest.approx(
        -np.mean([min(q) for q in made.critics(s, a).T.tolist()]), rel=1e-5
    )


def test_the_unread_are_unread():
    made, model = learner(unread=1), ensemble(unread=1, rewards=8)
    s, a, s2 = numbers(9, 3), numbers(9, 2).tanh(), numbers(9, 3, seed=4)
    moved, moved2 = s + torch.tensor([5.0, 0, 0]), s2 + torch.tensor([5.0, 0, 0])
    assert torch.equal(made.policy(s), made.policy(moved)) and torch.equal(made.critics(s, a), made.critics(moved, a))
    assert torch.equal(model.inputs(s, a), model.inputs(moved, a))
    assert torch.allclose(model.rewards(s, a, s2), model.rewards(moved, a, moved2), atol=1e-5)
    assert not torch.allclose(model.rewards(s, a, s2), model.rewards(s, a, moved2))


@pytest.mark.parametrize(
    ("loss", "policy", "resets"), [(99.0, 9e4, 0), (101.0, 0.0, 1), (1.0, -2e5, 1), (math.nan, 0.0, 1)]
)
def test_the_guard_starts_anew_where_a_loss_ran_away(loss, policy, resets):
    made = learner()
    mean, old = made.policy.mean.clone(), made.critics
    metrics = {"losses/critic": torch.tensor(loss), "losses/policy": torch.tensor(policy)}
    assert made.guard(metrics) == bool(resets)
    assert made.resets == resets and (made.critics is not old) == bool(resets)
    assert all(torch.equal(net.mean, mean) for net in made.networks().values())
    assert made.optimizers["critics"].param_groups[0]["params"][0] is made.critics.weights[0]
    if resets:
        for p, q in zip(made.critics.parameters(), made.target_critics.parameters(), strict=True):
            assert torch.equal(p, q) and not q.requires_grad


def test_resets_are_logged(tmp_path, capsys):
    flags = "--catastrophe-guard --learning-rate 30 --total-timesteps 120 --random-steps 50 --model-batches 2 "
    flags += (
        "--hidden 16 --model-hidden 16 --members 2 --batch-size 16 --eval-episodes 1 --picture-every 0 --log-every 10"
    )
    run_dir = helpers.run("mage", flags, tmp_path / "r")
    resets = helpers.scalars(run_dir)["charts/resets"]
    assert max(resets.values()) >= 1
    assert max(resets.values()) <= helpers.checkpoint(run_dir)["resets"]


# ── What is measured ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5", "Pusher-v5", "ContinuousCartPole-v0"])
def test_a_simulator_goes_on_from_its_state(env_id):
    one, two = (mage.make_task(Args(env_id=env_id)) for _ in range(2))
    one.reset(seed=1)
    two.reset(seed=2)
    one.action_space.seed(0)
    actions = [0.3 * one.action_space.sample() for _ in range(12)]
    for a in actions[:6]:
        one.step(a)
        two.step(-a)
    state = mage.simulator_state(one)
    mage.set_simulator_state(two, state)
    went = [[env.step(a)[:2] for a in actions[6:]] for env in (one, two)]
    mage.set_simulator_state(two, state)  # the state is as it was
    again = [two.step(a)[:2] for a in actions[6:]]
    for (obs, r), (obs2, r2), (obs3, r3) in zip(*went, again, strict=True):
        assert obs.tolist() == pytest.approx(obs2.tolist(), abs=1e-9) and r == pytest.approx(r2, abs=1e-9)
        assert obs3.tolist() == obs2.tolist() and r3 == r2


def test_true_gradients_are_those_of_the_true_dynamics():
    """In the pendulum, whose equations are known: by automatic differentiation through 40 steps."""
    gain = torch.tensor([[0.3, 0.9, 0.3]])

    def policy(s):
        return torch.tanh(-s @ gain.to(s.dtype).T)

    def act(obs):
        return policy(torch.as_tensor(np.asarray(obs))).numpy()

    envs = [mage.make_task(Args()) for _ in range(2)]
    s, found, finer = mage.true_gradients(act, envs, 3, 8, 100, 40, 0.95)
    assert s.shape == (8, 3) and found.shape == (8, 1) and finer.shape == (2, 1)
    at = torch.as_tensor(s, dtype=torch.float64)
    a = policy(at).requires_grad_()
    total, state, action = 0.0, at, a
    for t in range(40):
        torque = 2 * action
        total = total + 0.95**t * pets.pendulum_reward(state, torque, None)
        state = pets.pendulum_dynamics(state, torque)
        action = policy(state)
    (true,) = torch.autograd.grad(total.sum(), a)
    assert found[:, 0].tolist() == pytest.approx(true[:, 0].tolist(), rel=0.02, abs=0.01)
    assert finer[:, 0].tolist() == pytest.approx(true[:2, 0].tolist(), rel=0.005, abs=0.01)
    assert len({tuple(x) for x in s.round(2).tolist()}) == 8 and np.abs(s[:, 2]).max() > 1.5  # no two alike
    assert true.abs().max() > 0.5


def test_in_a_body_with_contacts_steps_of_two_sizes_agree_for_a_while():
    envs = [mage.make_task(Args(env_id="HalfCheetah-v5")) for _ in range(12)]
    torch.manual_seed(0)
    policy = mage.deterministic(mage.Actor(18, 6, 8, 1), CPU)
    trust = {}
    for horizon in (2, 200):
        s, found, finer = mage.true_gradients(policy, envs, 0, 8, 20, horizon, 0.99)
        assert s.shape == (8, 18) and found.shape == (8, 6) and finer.shape == (2, 6)
        trust[horizon] = mage.gradient_fit(finer, found[:2])[0]
    assert trust[2] > 0.98 > trust[200]  # chaos: what the metric model/gradient_trust is for


class Ending(gym.Env):
    """Begins at 0, moves by the first action alone, ends in step 3 or, from where it is above 0, in step 4; after its
    end it would pay a lot."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,), np.float64), gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.move = self.moved  # a reference to itself

    def moved(self, a):
        self.x = self.x if self.t else float(a[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t, self.goal = 0.0, 0, self.np_random.normal()
        return np.zeros(1), {}

    def step(self, a):
        self.move(a)
        self.t += 1
        over = self.t >= 3 + (self.x > 0)
        return np.array([self.x]), self.goal if self.t <= 3 + (self.x > 0) else 1e6, over, False, {}


def test_at_an_end_nothing_more_is_earned():
    """γ³ times one reward, over the distance of the actions; it is the reward that the first environment drew."""
    one = np.float32(1)
    envs = [gym.wrappers.RescaleAction(gym.wrappers.OrderEnforcing(Ending()), -one, one) for _ in range(2)]
    _, *found = mage.true_gradients(lambda obs: np.zeros_like(obs, np.float32), envs, 7, 1, 1, 50, 0.9)
    envs[0].reset(seed=7)
    envs[0].reset()
    goal = envs[0].unwrapped.goal
    assert np.ravel(found).tolist() == pytest.approx([0.9**3 * goal / 0.02, 0.9**3 * goal / 0.01], rel=1e-4)


class Outside(Ending):
    """What decides is kept elsewhere."""

    kept: list = []

    def reset(self, **settings):
        super().reset(**settings)
        self.number = len(self.kept)
        self.kept.append(self.np_random.normal())
        return np.zeros(1), {}

    def step(self, a):
        self.kept[self.number] += 1
        return np.array([self.kept[self.number]]), 0.0, False, False, {}


class Locked(Ending):
    def __init__(self, render_mode=None):
        self.lock = threading.Lock()
        super().__init__()


def test_what_cannot_be_copied_is_noticed():
    plain = [mage.make_task(Args()) for _ in range(2)]
    before = mage.random_states()
    assert mage.goes_on_alike(*plain)
    assert not helpers.differences(before, mage.random_states())
    assert mage.goes_on_alike(Ending(), Ending())
    assert not mage.goes_on_alike(Outside(), Outside())
    assert not mage.goes_on_alike(Locked(), Locked())


def test_a_world_that_cannot_be_copied_is_learned_without_pictures(tmp_path, capsys, monkeypatch):
    gym.register("Locked-v0", entry_point=Locked, max_episode_steps=20)
    flags = "--env-id Locked-v0 --total-timesteps 60 --random-steps 40 --model-batches 2 --hidden 8 --model-hidden 8"
    run_dir = helpers.run(
        "mage", f"{flags} --members 2 --batch-size 8 --eval-episodes 1 --eval-every 50", tmp_path / "r"
    )
    assert "no pictures: the state of Locked-v0" in capsys.readouterr().out
    assert not (run_dir / "picture.png").exists() and helpers.scalars(run_dir)["losses/critic"]
    del gym.registry["Locked-v0"]


def test_fit_of_gradients():
    true = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert mage.gradient_fit(2 * true, true) == pytest.approx((1.0, 1.0))
    assert mage.gradient_fit(-true, true) == pytest.approx((-1.0, 2.0))
    assert mage.gradient_fit(np.array([[0.0, 1.0], [1.0, 0.0]]), true)[0] == pytest.approx(0)
    assert mage.gradient_fit(0 * true, true) == pytest.approx((0.0, 1.0))


def test_the_critics_gradient_is_what_the_policy_climbs():
    made, s = learner(), numbers(7, 3)
    found = mage.critic_gradients(made, s)
    a = made.policy(s).detach().double()
    networks = copy.deepcopy(made.critics).double()
    for j in range(2):
        step = torch.zeros(2).double()
        step[j] = 1e-5
        up, down = (networks(s.double(), a + sign * step).min(0).values for sign in (1, -1))
        assert torch.allclose(found[:, j].double(), (up - down) / 2e-5, atol=1e-4)


# ── The tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("env_id", list(mage.TASKS))
def test_the_known_rewards_and_ends_are_the_simulators(env_id):
    env, task = mage.make_task(Args(env_id=env_id)), mage.TASKS[env_id]
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    inner = env.env.action_space
    middle, half = (inner.low + inner.high) / 2, (inner.high - inner.low) / 2
    rows = []
    for _ in range(400):
        a = env.action_space.sample()
        obs2, r, terminated, truncated, _ = env.step(a)
        rows.append((np.array(obs), middle + half * a, np.array(obs2), r, terminated))
        obs = env.reset()[0] if terminated or truncated else np.array(obs2)
    s, a, s2, r, ended = (torch.as_tensor(np.array(x), dtype=torch.float64) for x in zip(*rows, strict=True))
    assert torch.allclose(task.reward(s, a, s2).double(), r, atol=1e-4)
    assert task.ended(s2).tolist() == ended.bool().tolist()


def test_the_continuous_cart_pole_has_cart_poles_two_actions():
    for force, action in ((1.0, 1), (-1.0, 0)):
        mine, other = gym.make("ContinuousCartPole-v0"), gym.make("CartPole-v1")
        mine.reset(seed=4)
        other.reset(seed=4)
        for _ in range(5):
            assert mine.step(np.array([force], np.float32))[0].tolist() == other.step(action)[0].tolist()


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.learning  # for its minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_updates_are_those_of_eager_mode(monkeypatch):
    smooth_task(monkeypatch)
    made, data = [], columns(20)
    for compiled in (False, True):
        model, now = ensemble(), learner(learning_rate=1e-2, compile=compiled)
        assert hasattr(now.critic_losses, "_torchdynamo_orig_callable") == compiled
        predict = mage.sampler(Args(), model, torch.zeros(2), torch.ones(2))
        torch.manual_seed(0)
        start = [p.detach().clone() for p in now.critics.parameters()]
        for _ in range(4):
            now.fit_critics(data.obs, *now.target(data, predict))
            now.improve(data.obs)
        made.append([p.detach() for net in now.networks().values() for p in net.parameters()])
        own = mage.Transitions(*(column.expand(4, *column.shape) for column in data))
        loss = torch.compile(mage.world_loss) if compiled else mage.world_loss
        made[-1] += torch.autograd.grad(loss(model, own), list(model.parameters()))
    assert all(torch.allclose(p, q, atol=2e-3) for p, q in zip(*made, strict=True))
    assert max((p - q).abs().max() for p, q in zip(start, now.critics.parameters(), strict=True)) > 0.01


@pytest.mark.learning
def test_it_swings_the_pendulum_up(tmp_path):
    """1,500 steps. A random agent and an untrained policy are measured too."""
    run_dir = helpers.run("mage", "--total-timesteps 1500 --eval-every 0 --picture-every 0", tmp_path / "r")
    env = mage.make_task(Args())
    env.action_space.seed(0)
    by_chance, _ = mage.evaluate(lambda: lambda obs: env.action_space.sample(), env, 20, 1, 200)
    torch.manual_seed(1)
    policy = mage.Actor(3, 1, 64, 0)
    untrained, _ = mage.evaluate(lambda: mage.deterministic(policy, CPU), env, 20, 1, 200)
    assert max(np.mean(by_chance), np.mean(untrained)) < -900
    assert helpers.scalars(run_dir)["eval/episodic_return"][1500] > -500
