"""A small run of every CUDA kernel, for compute-sanitizer; sizes leave ragged chunks and several slices.

Takes the types, "float32 bfloat16"; without arguments all of them.
"""

import sys

import torch

import modeprobe as mp
from modeprobe import mask

DTYPES = ("float32", "float16", "bfloat16", "float64")


def main(dtypes):
    ops = torch.ops.modeprobe
    key = mask.key(1, 2, device="cuda")
    p = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    with mp.backend("native"):
        for dtype in (getattr(torch, name) for name in dtypes):
            for n in (1, 7, 4099):
                x = torch.randn(n + 1, device="cuda").to(dtype)[1:]
                ops.dropout(x, key, 0.1)
                ops.dropout_(x, key, 0.1, 3)
                ops.dropout(x, key, 0.0, 0, True, p)
                ops.dropout(x, key, 0.1, 3)
                ops.alpha_dropout(x, key, 0.1, [])
            for shape in ((3, 5, 7, 9), (4, 8, 16, 64)):
                x = torch.randn(shape, device="cuda").to(dtype)
                ops.structured_dropout(x, key, 0.3, [2, 3])
                ops.bias_dropout_add(x, x[0, 0, 0], x, key, 0.1)
                ops.bias_dropout_add_backward(x, key, 0.1)
                _, probabilities = ops.softmax_dropout(x, x[:1] > 0, key, 0.1, True)
                ops.softmax_dropout_backward(x, probabilities, key, 0.1)
            ops.dropout_mask(key, 1001, 0.5)
            ops.fold_in(key, 3)
            # The first two take one launch, the last two.
            for shape in ((4, 3, 7, 7), (16, 64, 9, 8), (64, 8, 40, 41)):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x = torch.randn(shape, device="cuda").to(dtype, memory_format=memory_format)
                    wide = torch.promote_types(dtype, torch.float32)
                    w, b, m, v = (torch.ones(shape[1], device="cuda", dtype=wide) for _ in range(4))
                    count = torch.zeros((), dtype=torch.int64, device="cuda")
                    for activation in (0, 1, 3):
                        extra = (
                            x if activation else None,
                            activation,
                            0.01,
                            key if activation else None,
                            0.2,
                        )
                        y, statistics, _ = ops.batch_norm_train(
                            x, w, b, m, v, count, None, None, 1e-5, *extra
                        )
                        ops.batch_norm_backward(
                            y, x, statistics, w, b, True, True, True, bool(activation), *extra
                        )
                    ops.batch_norm_eval(x, m, v, w, b, 1e-5, save=True)
                    moments = torch.stack([ops.batch_norm_moments(x)] * 2)
                    ops.batch_norm_merge(moments, m, v, count, None, None)
                    sums = ops.batch_norm_backward_reduce(x, x, statistics, w, b)
                    ops.batch_norm_backward_input(x, x, statistics, sums, w, b, False)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main(sys.argv[1:] or DTYPES)
