"""Every file trains, resumes and plays on a CUDA device, here a pretended one, without mixing it with the CPU."""

import copy

import pytest
import torch
from helpers import ROOT, TRAINED, load_again
from pretend_cuda import MixedError, OnCuda, pretended
from test_scripts import COMMON, TINY

MIXED = {
    "add": lambda a: a + torch.ones(3),
    "concatenate": lambda a: torch.cat([a, torch.ones(2)]),
    "choose": lambda a: torch.where(a > 0, torch.ones(3), a),
    "network": lambda a: torch.nn.Linear(3, 2)(a),
    "index of a CPU tensor": lambda a: torch.ones(4)[a.long()],
    "NumPy": lambda a: a.numpy(),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_devices_is_refused(name):
    with pretended(), pytest.raises((MixedError, TypeError)):
        MIXED[name](torch.zeros(3, device="cuda"))


def test_what_stays_on_the_device_is_computed():
    torch.manual_seed(0)
    network, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    copied, optimizers = copy.deepcopy(network), []
    with pretended() as waits:
        copied.to("cuda")
        for net, rows in ((network, x), (copied, x.to("cuda"))):
            optimizers.append(torch.optim.Adam(net.parameters(), fused=True))
            net(rows).square().mean().backward()
            optimizers[-1].step()
        assert isinstance(copied.weight, OnCuda) and copied.weight.device == torch.device("cuda:0") and not waits
        assert torch.equal(copied.weight.detach().cpu(), network.weight) and waits.total() == 1
        assert copied.weight.detach().tolist() == network.weight.tolist() and waits.total() == 2
        assert copied.weight[torch.tensor([1])].device.type == "cuda" and waits.total() == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "dyna_q"])  # its tables are Python lists
def test_no_file_mixes_devices(name, tmp_path, capsys):
    run = str(tmp_path / "run")
    with pretended() as waits:
        script = load_again(ROOT / "algos" / f"{name}.py")
        flags = f"{COMMON} {TINY[name]} --device cuda --total-timesteps 200 --picture-every 200"
        script.main([*flags.split(), "--run-dir", run])
        assert waits.total()
        script.main(["--resume", run, "--total-timesteps", "400"])
        script.main(["--evaluate", run, "--device", "cuda", "--episodes", "1"])
    assert capsys.readouterr().out.count("mean return") >= 3
