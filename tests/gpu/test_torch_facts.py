"""What the installed torch does on this GPU. Recorded in facts.json, never a failure of modeprobe."""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F


def record(**found):
    print(json.dumps(found))
    name = os.environ.get("MODEPROBE_FACTS")
    if not name:
        return
    path = Path(name)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | found, indent=1) + "\n")


def test_eager_bfloat16_dropout_reuses_random_numbers():
    # 1.0: half of a call's mask is a copy of half of the previous call's; 0.5: independent.
    x = torch.ones(1 << 19, dtype=torch.bfloat16, device="cuda")
    a = F.dropout(x, 0.5) != 0
    b = F.dropout(x, 0.5) != 0
    agreement = (a.view(-1, 8)[:, 4:] == b.view(-1, 8)[:, :4]).float().mean().item()
    record(eager_bf16_dropout_agreement_with_previous_call=agreement)


def saved_bytes_per_element(function, x):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(saved) / x.numel()


def test_bytes_saved_by_dropout():
    x = torch.randn(1 << 20, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    record(eager_dropout_saved_bytes_per_element=saved_bytes_per_element(lambda t: F.dropout(t, 0.1), x))
    try:
        compiled = torch.compile(lambda t: F.dropout(t, 0.1))
        compiled(x)
        record(compiled_dropout_saved_bytes_per_element=saved_bytes_per_element(compiled, x))
    except Exception as error:
        record(compiled_dropout_saved_bytes_per_element=f"{type(error).__name__}: {error}"[:200])


def test_backend_that_eager_batch_norm_chooses():
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(8, 64, 28, 28, device="cuda").to(dtype, memory_format=memory_format)
            layer = torch.nn.BatchNorm2d(64).cuda()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                layer(x)
                torch.cuda.synchronize()
            names = [
                event.key
                for event in profile.key_averages()
                if "norm" in event.key.lower() or "bn" in event.key
            ]
            found[f"{str(dtype)[6:]} {str(memory_format)[6:]}"] = names[:3]
    record(eager_batch_norm_kernels=found)
