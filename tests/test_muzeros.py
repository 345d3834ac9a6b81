"""What muzero.py and gumbel_muzero.py have in common: network, loss, replay, games and training."""

import math
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import module
from PIL import Image, ImageSequence
from torch.nn.utils import get_total_norm

both = pytest.mark.parametrize("mz", [module("muzero"), module("gumbel_muzero")], ids=lambda mz: mz.ALGORITHM)


class Task(gym.Env):
    def __init__(self, *shape, dtype=np.float32, sign=1):
        self.observation_space, self.action_space = gym.spaces.Box(0, 9, shape, dtype), gym.spaces.Discrete(3)
        self.sign = sign


gym.register("Cart10-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=10)
gym.register("Table-v0", lambda **_: Task(3, 3))


def make_args(mz, **changes):
    small = {"latent": 5, "hidden": 7, "channels": 4, "blocks": 1, "support": 6, "unroll": 2, "n_steps": 3, "envs": 2}
    return mz.Args(**{"device": "cpu", "gamma": 0.9, "replay_size": 80, "simulations": 3} | small | changes)


def make_agent(mz, env, noise=0.5, **changes):
    torch.manual_seed(0)
    agent = mz.Agent(env, make_args(mz, **changes))
    for p in agent.parameters():
        p.data += noise * torch.randn_like(p)
    return agent


@both
def test_numbers_are_squashed_two_hot_and_scaled(mz):
    x, s = torch.linspace(-7, 7, 401).double() ** 3, torch.randn(5, 2, 3, 3)
    s *= torch.tensor([0, 1e-6, 1, 1, 9])[:, None, None, None]
    expected = [math.copysign(math.sqrt(abs(a) + 1) - 1, a) + 0.001 * a for a in x.tolist()]
    assert mz.squash(x).tolist() == pytest.approx(expected) and torch.allclose(mz.unsquash(mz.squash(x)), x)
    assert torch.allclose(mz.unsquash(mz.squash(x.float())), x.float(), rtol=1e-5, atol=1e-5)
    for support, squash in ((1, False), (6, True), (20, False), (60, True)):
        probs, clipped = mz.two_hot(x.float(), support), x.float().clamp(-support, support)
        expected = 1 - (clipped[:, None] - torch.arange(-support, support + 1)).abs()
        stub = SimpleNamespace(args=make_args(mz, support=support, squash=squash))
        mean, nothing = mz.Agent.scalar(stub, probs.log()), mz.Agent.scalar(stub, torch.full((9, 2 * support + 1), 0.3))
        assert torch.allclose(probs, expected.clamp(min=0), atol=1e-5) and (nothing == 0).all()  # exactly
        assert torch.allclose(mean, mz.unsquash(clipped) if squash else clipped, rtol=1e-4, atol=1e-4)
    expected = [(row - row.min()) / max(row.max() - row.min(), 1e-5) for row in s]
    assert torch.allclose(mz.to_unit(s), torch.stack(expected), atol=1e-6)


@both
@torch.no_grad()
def test_networks_of_vectors_images_and_boards(mz):
    agent, fresh, odd = make_agent(mz, Task(4)), make_agent(mz, Task(4), noise=0.0), make_agent(mz, Task(2, 9, 5))
    board, images = make_agent(mz, mz.TicTacToe()), make_agent(mz, Task(4, 96, 96, dtype=np.uint8), blocks=2)
    obs, pixels = torch.randn(2, 4), torch.randint(256, (2, 4, 96, 96), dtype=torch.uint8)
    a, one_hot, s = torch.tensor([0, 2]), torch.tensor([[1.0, 0, 0], [0, 0, 1]]), agent.representation(obs)
    expected = [agent.prediction(s)[0], *(agent.scalar(x) for x in agent.prediction(s)[1:])]
    assert torch.allclose(s, mz.to_unit(agent.encoder(obs))) and s.shape == (2, 5) and expected[0].shape == (2, 3)
    assert torch.allclose(agent.dynamics(s, a), mz.to_unit(s + agent.step(torch.cat([s, one_hot], 1))))
    assert torch.allclose(agent.values(obs.double().numpy()), expected[1]) and agent.gamma == 0.9 == -board.gamma
    assert all(np.allclose(x, y, atol=1e-5) for x, y in zip(agent.numbers(s), expected, strict=True))
    assert not any(x.any() for x in fresh.numbers(fresh.representation(obs))) and agent.legal(obs).all()  # 0 exactly
    assert torch.equal(board.codes, torch.eye(9).view(9, 1, 3, 3)) and board.legal_moves == mz.TicTacToe.legal
    assert odd.representation(torch.rand(2, 2, 9, 5)).shape == (2, 4, 5, 3)
    s, planes, block = images.representation(pixels), one_hot[:, :, None, None].expand(-1, -1, 6, 6), images.step[1]
    assert torch.allclose(s, mz.to_unit(images.encoder(pixels / 255))) and s.shape == (2, 4, 6, 6)
    assert torch.allclose(images.dynamics(s, a), mz.to_unit(images.step(torch.cat([s, planes], 1))))
    assert torch.equal(block(s), (s + block.layers(s)).relu()) and images.prediction(s)[0].shape == (2, 3)
    assert [str(part).count("Residual") for part in (images.encoder, images.step)] == [6, 2]


@both
@pytest.mark.parametrize("squash", [True, False])
def test_the_loss_and_its_gradient_row_by_row(mz, squash):
    """Each unrolled step halves the gradient."""
    agent, parts = make_agent(mz, Task(4), squash=squash, value_weight=0.3, unroll=3), [0.0, 0.0, 0.0]
    masks, a, pi = torch.rand(2, 5, 4) < 0.7, torch.randint(3, (5, 3)), torch.randn(5, 4, 3).softmax(-1)
    obs, u, z, weights = torch.randn(5, 4), 4 * torch.randn(5, 3), 4 * torch.randn(5, 4), torch.rand(5)

    def cross_entropy(logits, x):
        x = (mz.squash(x) if squash else x).clamp(-6, 6).item()
        return -sum(max(0, 1 - abs(i - x)) * logits.log_softmax(0)[i + 6] for i in range(-6, 7))

    for b, known, alive in zip(range(5), *masks, strict=True):
        s = agent.representation(obs[[b]])
        for k in range(4):
            s = agent.dynamics((s + s.detach()) / 2, a[b, k - 1 : k]) if k else s
            (p, v, r), weight = (x[0] for x in agent.prediction(s)), weights[b] / (3 if k else 1) / 5
            parts[0] -= weight * alive[k] * (pi[b, k] * p.log_softmax(0)).sum()
            parts[1] += weight * known[k] * cross_entropy(v, z[b, k])
            parts[2] += weight * known[k - 1] * cross_entropy(r, u[b, k - 1]) if k else 0.0
    loss, metrics = mz.muzero_loss(agent, mz.Batch(obs, a, u, z, pi, *masks, weights))
    parts.append(parts[0] + 0.3 * parts[1] + parts[2])
    assert torch.allclose(torch.stack([*metrics.values(), loss]), torch.stack(parts), rtol=1e-4)
    gradients = (torch.autograd.grad(x, [*agent.parameters()]) for x in (loss, parts[3]))
    assert all(torch.allclose(g, h, rtol=1e-3, atol=1e-5) for g, h in zip(*gradients, strict=True))


def filled(mz, moves, sign=1, **changes):
    """Two games whose observations are the numbers t and 1000 + t, in 50 rows of which 40 are kept; and their moves."""
    rng, replay = np.random.default_rng(0), mz.Replay(Task(1, sign=sign), make_args(mz, **changes))
    over, cut = rng.random((2, moves, 2)) < 0.15
    h = {name: rng.normal(size=(moves, 2)) for name in ("reward", "value", "bootstrap")}
    h |= {"policy": rng.dirichlet(np.ones(3), (moves, 2)), "action": rng.integers(3, size=(moves, 2))}
    h |= {"terminated": over, "truncated": cut & ~over, "bootstrap": (cut & ~over) * h["bootstrap"]}
    for t in range(moves):
        replay.add(np.float32([[t], [1000 + t]]), **{name: torch.from_numpy(x[t]) for name, x in h.items()})
    return replay, SimpleNamespace(**h)


def state(h, g, t, k):
    """Where game g is k moves after move t: alive, over, or, after a time limit, unknown."""
    ends = (h.terminated | h.truncated)[t : t + k, g]
    return "alive" if not ends.any() else "over" if h.terminated[t + ends.argmax(), g] else "unknown"


def slow_return(h, g, t, gamma, value):
    moves = [gamma**i * (h.reward + h.bootstrap)[t + i, g] for i in range(3) if state(h, g, t, i) == "alive"]
    return sum(moves) + gamma**3 * value(g, t + 3) * (state(h, g, t, 3) == "alive")


@both
@pytest.mark.parametrize(("moves", "fresh", "sign"), [(45, True, 1), (137, True, 1), (137, False, -1)])
def test_batches_are_those_of_a_loop_over_episodes(mz, moves, fresh, sign):
    (replay, h), kinds, anything = filled(mz, moves, sign, fresh_values=fresh), set(), set()
    agent = SimpleNamespace(actions=3, values=lambda obs: torch.from_numpy(obs[:, 0]))
    games, rows = divmod(np.array([1000 * g + t for t in range(moves - 40, moves - 6) for g in (0, 1)]), 1000)
    torch.manual_seed(0)
    data = replay.batch(torch.from_numpy(rows % 50), torch.from_numpy(games), torch.from_numpy(rows), agent)
    assert data.weight.tolist() == rows.tolist() and data.obs[:, 0].tolist() == (1000 * games + rows).tolist()
    for (b, k), g, t in zip(np.ndindex(len(rows), 3), games.repeat(3), rows.repeat(3), strict=True):
        kind = state(h, g, t, k)
        z = slow_return(h, g, t + k, sign * 0.9, lambda g, t: 1000 * g + t if fresh else h.value[t, g])
        kinds.add((kind, k))
        assert (data.alive[b, k], data.known[b, k]) == (kind == "alive", kind != "unknown")
        assert data.value[b, k].item() == pytest.approx(z * (kind == "alive"), rel=1e-5, abs=1e-5)
        assert k == 2 or data.reward[b, k].item() == pytest.approx(h.reward[t + k, g] * (kind == "alive"), abs=1e-6)
        assert kind != "alive" or np.allclose(data.policy[b, k], h.policy[t + k, g])
        assert kind != "alive" or k == 2 or data.action[b, k] == h.action[t + k, g]
        anything |= {data.action[b, k].item()} if k < 2 and kind == "over" else set()
    assert len(kinds) == 7 and anything == {0, 1, 2}  # an absorbing state stays the same under all actions


@both
@pytest.mark.parametrize("prioritized", [False, True])
def test_positions_are_sampled_uniformly_or_by_the_error_of_the_value(mz, prioritized):
    """Only those whose targets are complete and that are not about to be overwritten, with the weights 1 / (N P(i))."""
    torch.manual_seed(0)
    assert len(filled(mz, 6)[0].sample(9, False)[0]) == 0
    for moves in (7, 20, 111):
        (replay, h), (shares, p) = filled(mz, moves, prioritized=prioritized), np.zeros((2, 2, moves))
        for g, t in np.ndindex(2, moves - 6):
            z = slow_return(h, g, t, 0.9, lambda g, t: h.value[t, g])  # noqa: B023
            p[g, t] = (abs(h.value[t, g] - z) + 1e-3 if prioritized else 1) * (t >= moves - 40)
        row, game, weight = replay.sample(20_000, prioritized)
        where, p = divmod(replay.obs[row, game, 0].astype(int), 1000), p / p.sum()
        np.add.at(shares, where, 1 / 20_000)
        assert np.allclose(shares, p, 0, 5 * math.sqrt(p.max() / 20_000)) and p[where].all()
        assert np.allclose(weight, 1 / (p > 0).sum() / p[where], rtol=1e-3)


@both
@pytest.mark.parametrize("size", [(71, 70, 1), (2, 50, 50)])  # 4,970 and 5,000 numbers; these are kept in a file
def test_a_resumed_replay_holds_what_its_checkpoint_held(mz, size, tmp_path):
    """A killed run has written a quarter of the kept rows after its last checkpoint."""
    (replay, again), saved = (mz.Replay(Task(*size, dtype=np.uint8), make_args(mz)) for _ in range(2)), {}
    replay.open(tmp_path)
    for t in range(121):
        saved[t] = replay.state_dict() if t in (20, 111) else None
        replay.add(np.full((2, *size), t, np.uint8), reward=torch.full((2,), float(t)))
    again.load_state_dict(saved[111])
    again.open(tmp_path)
    row, game, _ = again.sample(500, False)
    t = again.columns["reward"][row, game].numpy()
    assert {*t} == {*range(71, 105)} and again.size == 111 and {len(x) for x in saved[20]["columns"].values()} == {20}
    assert all(np.array_equal(again.obs[(row + k) % 50, game].reshape(500, -1).max(1), t + k) for k in range(6))
    assert ("obs" in saved[20]["columns"]) == (size[0] == 71)
    if size[0] == 2:
        assert (tmp_path / "replay.dat").stat().st_size == 50 * 2 * 5_000
        again.obs = again.obs[:0]
        with pytest.raises(mz.UserError, match="missing"):
            again.open(tmp_path / "nowhere")


@both
def test_heldout_metrics_of_a_model_that_errs_by_a_known_amount(mz, monkeypatch):
    """The value of an observation is its number, and action a adds 2 + a in place of 1."""
    learner, agent = SimpleNamespace(representation=lambda obs: obs, tensor=torch.from_numpy), make_agent(mz, Task(1))
    learner.dynamics, learner.prediction = lambda s, a: s + 2 + a[:, None], lambda s: (None, s, None)
    learner.scalar = learner.value = lambda x: x[:, 0]
    monkeypatch.setattr(mz, "muzero_loss", lambda model, batch: (batch.obs.sum() if model is learner else None, {}))
    for moves in range(46, 60):
        (replay, h), t = filled(mz, moves), moves - 6
        expected = {"model/heldout_loss": 1000 + 2 * t}
        for k in (1, 2):
            errors = [(h.action[t : t + k, g] + 1).sum() for g in (0, 1) if state(h, g, t, k) == "alive"]
            expected[f"model/value_error_{k}"] = sum(errors) / max(len(errors), 1)
        assert mz.heldout_metrics(agent, learner, replay) == pytest.approx(expected)


@both
def test_games_are_those_of_single_environments_and_continue_exactly(mz):
    args, rng, finished = make_args(mz, env_id="Cart10-v0"), np.random.default_rng(0), []
    torch.manual_seed(0)
    envs, copies = mz.Environments(args), [mz.make_env(args) for _ in range(2)]
    seeds = [*envs.seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(copies, seeds, strict=True)]
    for actions in rng.choice(2, (101, 2), p=[0.2, 0.8]).tolist():
        assert np.array_equal(envs.obs, obs)
        for i, (env, *found) in enumerate(zip(copies, *envs.step(actions), strict=True)):
            obs[i], r, terminated, truncated, info = env.step(actions[i])
            assert np.array_equal(found[0], obs[i]) and found[1:] == [r, terminated, truncated and not terminated]
            if terminated or truncated:
                finished.append([info["episode"][key] for key in "rl"])
                seeds.append(envs.seeds[i])
                obs[i], _ = env.reset(seed=seeds[-1])
    assert [*envs.statistics()["episode"].values()] == pytest.approx(np.mean(finished, 0)) and envs.statistics() == {}
    torch.manual_seed(0)
    assert seeds == [int(torch.randint(2**31, ())) for _ in seeds] and any(envs.actions)
    other = mz.Environments(args)
    other.load_state_dict(envs.state_dict())
    for step, actions in enumerate(rng.integers(2, size=(30, 2)).tolist()):
        one, two = ((x.obs.copy(), torch.manual_seed(step), *x.step(actions)) for x in (envs, other))
        assert all(map(np.array_equal, one, two))
    envs.envs[1].step = lambda _: (obs[1], math.nan, False, False, {})
    with pytest.raises(mz.UserError, match="NaN"):
        envs.step(actions)
    for env_id, word in (("Pendulum-v1", "Discrete"), ("FrozenLake-v1", "vectors"), ("Table-v0", "vectors")):
        with pytest.raises(mz.UserError, match=word):
            mz.make_task(make_args(mz, env_id=env_id))


@both
def test_tic_tac_toe_with_and_without_an_opponent(mz):
    env, games = mz.TicTacToe(), [("012435768", "", 0), ("00", "", -1), ("03", "3", -1)]
    check_env(env, skip_render_check=True)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])  # the opponent may begin, anywhere
    assert not starts[:, 0].any() and (starts[:, 1].max(0) == env.observation_space.high[1]).all()
    assert (
        120 < starts.sum() < 180
        and mz.Environments(make_args(mz, env_id="TicTacToe-v0")).envs[0].unwrapped.opponent is None
    )
    for line in ("012", "345", "678", "036", "147", "258", "048", "246"):
        (x, y, z), (a, b, _, c, *_) = line, sorted({*"012345678"} - {*line})
        games += [(x + a + y + b + z, "", 1), (line, a + b, 1), (a + b + c, line, -1)]
    for moves, replies, result in games:
        env.opponent = None
        env.reset()
        env.opponent = Mock(side_effect=map(int, replies)) if replies else None
        *first, last = (env.step(int(a))[1:3] for a in moves)
        assert first == [(0.0, False)] * len(first) and last == (result, True)


@both
def test_evaluate_plays_the_episodes_of_play(mz, tmp_path):
    args, logged = make_args(mz, env_id="CartPole-v1", episodes=4, capture_video=True), []
    envs, run = [mz.make_env(args) for _ in range(4)], SimpleNamespace(args=args, step=7, dir=tmp_path)
    agent, generator, run.log = make_agent(mz, envs[0]), torch.get_rng_state(), lambda *x: logged.append(x)
    mz.evaluate(agent, envs, run)
    video = ImageSequence.Iterator(Image.open(tmp_path / "video_00000007.gif"))
    assert sum(frame.info["duration"] for frame in video) == 40 * envs[0].length_queue[0]
    assert torch.equal(generator, torch.get_rng_state()) and len({env.length_queue[0] for env in envs}) > 1
    assert logged == [("eval/episodic_return", mz.play(agent, envs[0], args, "", tmp_path / "play.gif"))]


@both
def test_training_does_what_its_steps_say(mz, tmp_path, monkeypatch):
    """Two games of at most 10 moves."""
    flags = {"env_id": "Cart10-v0", "total_timesteps": 120, "round_moves": 10, "episodes": 3, "gradient_clip": 0.01}
    flags |= {"reanalyze": 0.25, "learning_starts": 7, "train_every": 5, "batch_size": 5, "copy_every": 11, "seed": 8}
    calls, logged, values, losses, steps, copies = {}, {}, [], [], [], []  # calls: function → last result and arguments

    def spy(owner, name, note=lambda *_, **__: None):
        def wrapped(*x, **y):
            calls[name] = found = original(*x, **y), *x
            note(*found, **y)
            return found[0]

        original, _ = getattr(owner, name), monkeypatch.setattr(owner, name, wrapped)

    def added(_, replay, obs, **columns):
        (row, game, _), n, (found, agent, searched) = calls["sample"][0], replay.size * 2, calls["search"]
        (next_obs, _, _, cut), _, actions = calls["step"]
        for name, expected in {"value": found.value, "policy": getattr(found, "policy", found[0] / 3)}.items():
            assert np.allclose([*columns[name], *replay.columns[name][row, game]], expected)
        assert np.array_equal(searched, [*obs, *replay.obs[row.numpy(), game.numpy()]])
        assert len(row) == (n // 4 - (n - 2) // 4) * (n > 14) and columns["action"].tolist() == actions
        assert torch.allclose(columns["bootstrap"], cut * 0.9 * agent.values(next_obs))
        assert mz.ALGORITHM == "muzero" or actions == found.action[:2].tolist()

    def trained(found, learner, _):
        if torch.is_grad_enabled():
            norm = get_total_norm(torch.autograd.grad(found[0], [*learner.parameters()], retain_graph=True))
            losses.append([2 * calls["add"][1].size, *(x.item() for x in (*found[1].values(), norm))])

    def stepped(_, optimizer):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        steps.append([optimizer.param_groups[0]["lr"], get_total_norm(gradients).item()])

    (
        spy(mz.Environments, "step"),
        spy(mz.Replay, "sample"),
        spy(mz.Replay, "add", added),
        spy(mz, "muzero_loss", trained),
    )
    spy(mz, "search", lambda found, *_, noise: values.append(found.value[:2].mean() if noise else None))
    spy(mz.Agent, "load_state_dict", lambda _, agent, __: copies.append((len(losses), agent)))
    spy(mz.Run, "log", lambda _, run, tag, x: logged.setdefault((run.step, tag), float(x)))
    spy(torch.optim.Adam, "step", stepped), monkeypatch.setattr(mz.Run, "due", lambda *_: False)
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda x: x)  # values that differ
    mz.train(make_args(mz, **flags, run_dir=str(tmp_path / "run")))
    moves = [s for s in range(14, 121, 2) for _ in range((s - 7) // 5 - (s - 9) // 5)]
    assert [x[0] for x in losses] == moves and copies == [(n, calls["search"][1]) for n in (0, 10, 21)]
    assert np.allclose(steps, [[2e-3 * 0.1 ** ((s - 1) // 20 / 6), 0.01] for s in moves], rtol=1e-3)
    for end in range(20, 121, 20):
        expected = np.mean([x[1:] for x in losses if end - 20 < x[0] <= end], 0)
        tags = "losses/policy", "losses/value", "losses/reward", "losses/gradient_norm", "model/value"
        expected = [*expected, np.mean(values[end // 2 - 10 : end // 2])]
        assert [logged[end, tag] for tag in tags] == pytest.approx(expected, rel=1e-4)
    assert calls["add"][1].columns["truncated"].sum() > 3
