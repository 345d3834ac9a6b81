"""Theorems 4.2 and 4.3 of MBPO, as docs/mbpo.md states them, with total variation for every ε and |r| ≤ 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def bounds(k, gamma, shift, error, error_of_new):
    """C in η[π] ≥ η^branch[π] − C by Theorem 4.2, with ε_m measured under π_D, and by 4.3, with ε_m' under π."""
    start = gamma ** (k + 1) * shift / (1 - gamma) ** 2 + gamma**k * shift / (1 - gamma)
    theorem_4_2 = 2 * (start + 2 * shift / (1 - gamma) + k * (error + 2 * shift) / (1 - gamma))
    return theorem_4_2, 2 * (start + k * error_of_new / (1 - gamma))


def branched_return(p, model, old, new, reward, start, gamma, k):
    """Exactly: up to any time step, the last k actions and their outcomes (s', r) come from π in the model, the earlier
    ones from π_D in the environment. k = 0: η[π_D]."""
    real, step = (np.einsum("sa,sat->st", pi, x) for pi, x in ((old, p), (new, model)))
    visits = start @ np.linalg.inv(np.eye(len(p)) - gamma * real)  # Σ_t γ^t d_t under π_D
    if k == 0:
        return visits @ np.einsum("sa,sat,sat->s", old, p, reward)
    gains = [np.linalg.matrix_power(step, t) @ np.einsum("sa,sat,sat->s", new, model, reward) for t in range(k)]
    return sum(gamma**t * start @ gains[t] for t in range(k)) + gamma ** (k - 1) * (visits - start) @ gains[-1]


def distances(p, model, old, new, start):
    """ε_π = max_s TV(π, π_D), and max_t E_{s, a ~ t}[TV(p, p_θ)] under π_D (ε_m) and under π (ε_m')."""
    gap, found = 0.5 * np.abs(p - model).sum(2), [0.5 * np.abs(old - new).sum(1).max()]
    for policy in (old, new):
        step = np.einsum("sa,sat->st", policy, p)
        found.append(max(start @ np.linalg.matrix_power(step, t) @ (policy * gap).sum(1) for t in range(60)))
    return found


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 0.95), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_theorems_4_2_and_4_3_hold_in_tabular_worlds(seed, gamma, mix_p, mix_pi, k):
    rng = np.random.default_rng(seed)
    (p, model), (old, new) = rng.dirichlet(np.ones(4), (2, 4, 3)), rng.dirichlet(np.ones(3), (2, 4))
    model, new = (1 - mix_p) * p + mix_p * model, (1 - mix_pi) * old + mix_pi * new
    world = rng.uniform(-1, 1, (4, 3, 4)), rng.dirichlet(np.ones(4)), gamma
    gap = branched_return(p, model, old, new, *world, k) - branched_return(p, p, new, new, *world, 0)
    shift, error, error_of_new = distances(p, model, old, new, world[1])
    assert all(gap <= bound + 1e-9 for bound in bounds(k, gamma, shift, error, error_of_new))
    # Lemma B.2: TV(p₁ᵗ, p₂ᵗ) ≤ t δ with δ = max_t E_{s ~ p₁ᵗ}[TV(p₁(·|s), p₂(·|s))], here at most ε_m'
    real, step = (np.linalg.matrix_power(np.einsum("sa,sat->st", new, x), k) for x in (p, model))
    assert 0.5 * np.abs(world[1] @ (real - step)).sum() <= k * error_of_new + 1e-9


def test_lemma_b_2_is_false_with_the_kl_divergence():
    one, two = np.array([0.5, 0.5]), np.array([0.6, 0.4])  # t = 1
    assert 0.5 * np.abs(one - two).sum() > (one * np.log(one / two)).sum()


@pytest.mark.parametrize(("k", "model_errs", "policy_moves"), [(1, 1, 0), (0, 0, 1), (1, 0, 1), (5, 0, 1)])
def test_no_constant_of_theorem_4_3_could_be_smaller(k, model_errs, policy_moves):
    """A small probability to fall for ever, which the model or the old policy does not have."""
    fall, stay, down = np.array([[1 - 1e-5, 1e-5], [0, 1]]), np.array([[1.0, 0], [0, 1]]), np.array([[0, 1], [0, 1]])
    model = np.stack([stay, down], 1)  # the second action falls
    p = np.stack([fall, down], 1) if model_errs else model
    old, new = np.array([[1.0, 0]] * 2), np.array([[1 - 1e-5, 1e-5] if policy_moves else [1, 0]] * 2)
    world = np.broadcast_to(np.array([1.0, -1.0]), (2, 2, 2)), np.array([1.0, 0.0]), 0.9
    gap = branched_return(p, model, old, new, *world, k) - branched_return(p, p, new, new, *world, 0)
    assert 0.999 < gap / bounds(k, 0.9, *distances(p, model, old, new, world[1]))[1] <= 1
