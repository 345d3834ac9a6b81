"""One line for each file of algos/: what tests/test_scripts.py needs to know of it.

quick     flags under which a run takes a second or two and every optimiser steps. They hold --total-timesteps N; with
          seed 1 an episode ends between N/2 and N, and none is longer than N/2 (stop and resume, kill); losses are
          written before the end.
options   a preset or none, and flags that change the code path; each runs with the quick flags too
resume    presets or options for which stop and resume is shown too: each kind of state that a checkpoint holds
bad       flags of a user's mistake, and a word that the one sentence must hold
optional  presets that need a package which is not among the requirements
presets   flags that a preset needs beside the quick ones, where its episodes are too long for them
"""

from dataclasses import dataclass, field


@dataclass
class Case:
    quick: str
    options: list[str] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    optional: dict[str, str] = field(default_factory=dict)
    presets: dict[str, str] = field(default_factory=dict)


CASES = {
    "muzero": Case(
        quick="--total-timesteps 400 --envs 4 --simulations 3 --hidden 16 --latent 8 --channels 4 --blocks 1 "
        "--batch-size 16 --unroll 2 --steps 3 --learning-starts 150 --train-every 10 "
        "--replay-size 320 --episode-limit 60 --log-every 100 --eval-every 200 --eval-episodes 3 --eval-max-steps 20 "
        "--picture-every 400",
        options=[
            "tictactoe --search puct --reanalyze 1 --temperature-moves 3 --capture-video --eval-max-steps 9",
            "connect4 --network mlp --opponent one-ply",
            "--prioritized --no-fresh-values --reanalyze 0.5 --no-vtrace",
            "--search puct --no-squash --support 60 --env-id Acrobot-v1",
        ],
        resume=[
            "tictactoe --reanalyze 1",
            "--prioritized --search puct",
            "breakout",
        ],
        bad=[
            ("--env-id Pendulum-v1", "Discrete"),
            ("--env-id FrozenLake-v1", "observations"),
            ("--network conv", "--network"),
            ("--simulations 0", "--simulations"),
            ("--envs 0", "--envs"),
            ("--unroll 0", "--unroll"),
            ("--steps 0", "--steps"),
            ("--steps 300", "--replay-size"),
            ("--env-id TicTacToe-v0 --openings 5", "--openings"),
            ("--reanalyze 0", "--vtrace"),
            ("--batch-size 2000 --replay-size 1000", "--batch-size"),
            ("--batch-size 630 --replay-size 640", "--batch-size"),
            ("--gamma 1.1", "--gamma"),
            ("--noise-share 2", "--noise-share"),
            ("--averaging 0", "--averaging"),
            ("--learning-rate 0", "--learning-rate"),
            ("--temperature -1", "--temperature"),
            ("--reanalyze -1", "--reanalyze"),
            ("--env-id ConnectFour-v0 --opponent perfect", "minimax"),
            ("--play no_such_folder", "no_such_folder"),
        ],
        optional={"lunarlander": "Box2D"},
    ),
}
