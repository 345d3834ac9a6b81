"""benchmarks/speed.py --peers measures every library that is installed."""

from importlib import import_module
from importlib.util import find_spec

from helpers import ROOT, load

speed = load(ROOT / "benchmarks" / "speed.py")
peers = import_module("speed_peers")  # beside it
PACKAGES = {"stable_baselines3": 1, "mbrl": 2, "mctx": 2, "lzero": 2}


def test_every_library_that_is_installed_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "ROOTS", (16,))  # JAX compiles for each
    speed.main(speed.Args(seconds=0, threads=1, peers=True, save=tmp_path / "peers.csv"))
    rows = speed.read_csv(tmp_path / "peers.csv")
    assert len(rows) == sum(count for package, count in PACKAGES.items() if find_spec(package))
    assert all(float(row["ours"]) > 0 and float(row["theirs"]) > 0 for row in rows)
    left_out = [package for package in PACKAGES if not find_spec(package)]
    assert capsys.readouterr().out.count("left out") == len(left_out)
