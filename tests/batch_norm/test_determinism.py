"""The same bits for every number of threads and every instruction set."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.rung("reference")

SCRIPT = """
import hashlib, json, sys, torch
from modeprobe import functional as MF
import modeprobe as mp

def digest(*tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]

SHAPES = [(4, 16), (4100, 65), (3, 130, 77), (8, 64, 14, 14), (6, 33, 15, 13), (1, 3, 150, 151)]
SHAPES += [(2, 1, 160, 161)]
out = {"capability": torch.ops.modeprobe.cpu_capability()}
for threads in map(int, sys.argv[1].split(",")):
    torch.set_num_threads(threads)
    found = out[str(threads)] = {}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for last in (False, True):
                for activation in (None, "relu"):
                    torch.manual_seed(1)
                    x = torch.randn(shape).to(dtype)
                    residual = torch.randn(shape).to(dtype) if activation else None
                    if last:
                        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                    acc = torch.float64 if dtype == torch.float64 else torch.float32
                    weight, bias = (torch.rand(shape[1], dtype=acc).requires_grad_() for _ in range(2))
                    mean, var = torch.zeros(shape[1], dtype=acc), torch.ones(shape[1], dtype=acc)
                    x.requires_grad_()
                    y = MF.batch_norm(
                        x, mean, var, weight, bias, True, activation=activation, residual=residual,
                        dropout_p=0.0 if activation is None else 0.25, key=mp.mask.key(3),
                    )
                    torch.manual_seed(2)
                    y.backward(torch.randn(shape).to(dtype))
                    key = f"{shape} {dtype} {last} {activation}"
                    found[key] = digest(y, mean, var, x.grad, weight.grad, bias.grad)
print(json.dumps(out))
"""


def run(threads, capability):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, threads],
        capture_output=True,
        text=True,
        env=os.environ | {"MODEPROBE_CPU_CAPABILITY": capability},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def best():
    return run("1,2,1,3", "avx512")


def test_threads(best):
    assert best["1"] == best["2"] == best["3"]
    assert len(set(best["1"].values())) > 80


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_instruction_sets(best, capability):
    if best["capability"] == "portable":
        pytest.skip("this machine has one instruction set: x86-64 with AVX2 or AVX-512 has more")
    other = run("1", capability)
    assert other["capability"] == capability
    assert other["1"] == best["1"]


def test_runs(best):
    torch.manual_seed(0)
    assert run("2", "avx512")["2"] == best["2"]
