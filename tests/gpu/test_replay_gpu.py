"""The benchmarks' CUDA graphs: each provider's forward and backward pass, replayed, is judged."""

import pytest
from modeprobe.benchmarks import replay
from modeprobe.benchmarks import works_batch_norm as norms


@pytest.mark.parametrize("provider", ["modeprobe", "modeprobe triton", "torch", "torch.compile"])
@pytest.mark.parametrize("layout", norms.LAYOUTS)
def test_a_replay_does_the_work(layout, provider):
    work = norms.norm("forward_backward", (8, 16, 7, 7), "bfloat16", layout=layout, compiled=True)
    problem = work.setup(work, "cuda")
    again = replay.captured(problem.candidates[provider](), calls=3)
    results = again.run()
    assert problem.verify(results) is None
    for result in results:
        result.detach().zero_()
    assert problem.verify(results) is not None
    assert problem.verify(again.run()) is None
