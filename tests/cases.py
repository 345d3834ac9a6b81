"""One line for each file of algos/: what tests/test_scripts.py needs to know of it.

quick     flags under which a run takes a second or two and every optimiser steps. They hold --total-timesteps N; with
          seed 1 an episode ends between N/2 and N, and none is longer than N/2 (stop and resume, kill); losses are
          written before the end.
options   a preset or none, and flags that change the code path; each runs with the quick flags too
resume    presets or options for which stop and resume is shown too: each kind of state that a checkpoint holds
bad       flags of a user's mistake, and a word that the one sentence must hold
"""

from dataclasses import dataclass, field


@dataclass
class Case:
    quick: str
    options: list[str] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


CASES = {
    "dyna_q": Case(
        quick="--total-timesteps 1200 --planning-steps 5 --picture-every 500 --eval-every 600 --eval-max-steps 100",
        options=[
            "maze --planning-steps 0 --total-timesteps 4000",
            "maze --planner prioritized --total-timesteps 4000",
            "maze --model expectation --initial-value 1",
            "maze --maze-scale 2 --initial-value 1",
            "shortcut --bonus 0",
            "frozenlake --model sample",
            "frozenlake --planner prioritized",
            "--env-id CliffWalkingSlippery-v1 --model sample --bonus 0.1 --total-timesteps 4000",
            "maze --capture-video",
            "frozenlake --capture-video --eval-episodes 1",
        ],
        resume=[
            "maze --planner prioritized --total-timesteps 4000",
            "frozenlake --model sample",
            "shortcut --total-timesteps 3400",
            "blocking --total-timesteps 1500",
        ],
        bad=[
            ("--env-id CartPole-v1", "observations"),
            ("--env-id Pendulum-v1", "Discrete"),
            ("--env-id Blackjack-v1", "Discrete observations"),
            ("--planning-steps -1", "--planning-steps"),
            ("--planner prioritized --planning-steps 0", "--planning-steps"),
            ("--planner prioritized --model sample", "expectation"),
            ("--planner prioritized --bonus 0.1", "--bonus"),
            ("--bonus -1", "--bonus"),
            ("--alpha 0", "--alpha"),
            ("--gamma 1.5", "--gamma"),
            ("--maze-scale 0", "--maze-scale"),
            ("--env-id Taxi-v4 --maze-scale 2", "--maze-scale"),
            ("--bonus nan", "--bonus"),
            ("--initial-value inf", "--initial-value"),
            ("--maze-scale 100", "--maze-scale"),
        ],
    ),
}
