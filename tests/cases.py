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
    "dreamer_v1": Case(
        quick="--total-timesteps 500 --obs vector --action-repeat 1 --random-steps 200 --train-every 25 --pretrain 2 "
        "--batch-size 4 --batch-length 8 --horizon 3 --deter-size 8 --stoch-size 4 --units 8 --depth 2 "
        "--dense-units 8 --free-nats 0 --image-size 32 --log-every 50 --eval-every 200 --eval-episodes 3 "
        "--eval-max-steps 10 --picture-every 200",
        options=[
            "pendulum-pixels --obs pixels --action-repeat 4 --capture-video",
            "cartpole-pixels --obs pixels --free-each --decoder-std 1 --total-timesteps 300 --random-steps 100",
            "pendulum --bf16 --ends",
            "--env-id HalfCheetah-v5 --obs pixels --image-size 64 --action-repeat 20 --total-timesteps 3000 "
            "--random-steps 1000 --train-every 200 --log-every 200 --picture-every 1000 --eval-every 1000",
            "--env-id MountainCar-v0",
        ],
        resume=[
            "pendulum-pixels --obs pixels",
            "cartpole-pixels",
        ],
        bad=[
            ("--env-id FrozenLake-v1", "--obs pixels"),
            ("--env-id CliffWalking-v1", "--obs pixels"),
            ("--image-size 48", "--image-size"),
            ("--horizon 1", "--horizon"),
            ("--horizon 0", "--horizon"),
            ("--batch-length 1", "--batch-length"),
            ("--batch-size 0", "--batch-size"),
            ("--train-every 0", "--train-every"),
            ("--updates 0", "--updates"),
            ("--pretrain -1", "--pretrain"),
            ("--action-repeat 0", "--action-repeat"),
            ("--gamma 1", "--gamma"),
            ("--return-lambda 1.1", "--return-lambda"),
            ("--free-nats -1", "--free-nats"),
            ("--decoder-std 0", "--decoder-std"),
            ("--reward-scale 0", "--reward-scale"),
            ("--world-learning-rate 0", "--world-learning-rate"),
            ("--exploration -0.1", "--exploration"),
            ("--deter-size 0", "--deter-size"),
        ],
        optional={"walker": "dm_control", "cheetah": "dm_control", "cartpole-swingup": "dm_control"},
        presets={"halfcheetah": "--action-repeat 10 --total-timesteps 3000 --random-steps 1000"},
    ),
    "dreamer_v2": Case(
        quick="--total-timesteps 500 --random-steps 200 --train-every 25 --pretrain 2 --batch-size 4 --batch-length 8 "
        "--horizon 3 --deter-size 8 --stoch-size 3 --classes 4 --units 8 --depth 2 --dense-units 8 --free-nats 0 "
        "--image-size 32 --time-limit 20 --log-every 50 --eval-every 200 --eval-episodes 3 --eval-max-steps 10 "
        "--picture-every 200",
        options=[
            "catch --prior gaussian --capture-video",
            "catch --actor-gradient both --kl-balance 0.5 --free-each --no-ends",
            "--replay-size 100 --checkpoint-every 5",
            "--env-id Pendulum-v1 --obs vector --time-limit 60 --actor-gradient dynamics --action-repeat 2",
            "--env-id Pendulum-v1 --obs vector --actor-gradient both --bf16",
            "--env-id CartPole-v1 --obs vector --balance-ends --exploration 0.1",
            "pong --action-repeat 3 --capture-video",
        ],
        resume=[
            "--replay-size 100 --checkpoint-every 5",
            "catch --prior gaussian",
            "pong",
        ],
        bad=[
            ("--env-id FrozenLake-v1 --obs vector", "--obs pixels"),
            ("--env-id ALE/Pong-v5 --obs vector", "--obs pixels"),
            ("--env-id ALE/NoSuchGame-v5", "NoSuchGame"),
            ("--image-size 48", "--image-size"),
            ("--horizon 1", "--horizon"),
            ("--batch-length 1", "--batch-length"),
            ("--batch-size 0", "--batch-size"),
            ("--train-every 0", "--train-every"),
            ("--updates 0", "--updates"),
            ("--pretrain -1", "--pretrain"),
            ("--action-repeat 0", "--action-repeat"),
            ("--time-limit -1", "--time-limit"),
            ("--replay-size 1", "--replay-size"),
            ("--replay-size 100", "--checkpoint-every"),
            ("--replay-size 100 --checkpoint-every 0", "--checkpoint-every"),
            ("--gamma 1", "--gamma"),
            ("--return-lambda 1.1", "--return-lambda"),
            ("--kl-balance 1.1", "--kl-balance"),
            ("--reinforce-share -0.1", "--reinforce-share"),
            ("--free-nats -1", "--free-nats"),
            ("--entropy-scale -1", "--entropy-scale"),
            ("--weight-decay -1", "--weight-decay"),
            ("--decoder-std 0", "--decoder-std"),
            ("--reward-scale 0", "--reward-scale"),
            ("--world-learning-rate 0", "--world-learning-rate"),
            ("--exploration -0.1", "--exploration"),
            ("--deter-size 0", "--deter-size"),
            ("--classes 0", "--classes"),
            ("--slow-every 0", "--slow-every"),
        ],
        optional={"walker": "dm_control"},
    ),
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
