"""Every headline kernel once, on tensors that do not fit into the L2 cache: what a profiler runs.

``python -m modeprobe.benchmarks.headline_kernels``
"""

from __future__ import annotations

import torch

import modeprobe as mp

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    ops = torch.ops.modeprobe
    key = mp.mask.key(1, 2, device="cuda")
    for dtype in DTYPES:
        x = torch.randn(1 << 26, device="cuda", dtype=dtype)
        ops.dropout(x, key, 0.1)
        ops.alpha_dropout(x, key, 0.1, [])
        x = x.view(-1, 4096)
        ops.bias_dropout_add(x, x[0].clone(), x, key, 0.1)
        ops.bias_dropout_add_backward(x, key, 0.1)
        x = x.view(32, -1, 512, 512)
        _, probabilities = ops.softmax_dropout(x, None, key, 0.1, True)
        ops.softmax_dropout_backward(x, probabilities, key, 0.1)
        weight = torch.ones(64, device="cuda")
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(256, 64, 56, 56, device="cuda").to(dtype, memory_format=memory_format)
            ops.structured_dropout(x, key, 0.1, [2, 3])
            _, statistics, _ = ops.batch_norm_train(x, weight, weight, None, None, None, None, 0.1, 1e-5)
            ops.batch_norm_backward(x, x, statistics, weight, weight, True, True, True, False)
        # A layer that takes one launch each way.
        x = torch.randn(32, 256, 14, 14, device="cuda").to(dtype)
        weight = torch.ones(256, device="cuda")
        _, statistics, _ = ops.batch_norm_train(x, weight, weight, None, None, None, None, 0.1, 1e-5)
        ops.batch_norm_backward(x, x, statistics, weight, weight, True, True, True, False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
