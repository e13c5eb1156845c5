"""What bad input gets: a Python error that names the argument, what came and what is expected."""

import subprocess
import sys

import numpy
import pytest
import torch

import modeprobe as mp
from modeprobe import _extension, mask
from modeprobe import functional as F

pytestmark = pytest.mark.rung("reference")

X = torch.ones(4, 6)
KEY = mask.key(1)
NAN = float("nan")


def nested(layout):
    return torch.nested.nested_tensor([X, X[:3]], layout=layout)


CASES = {
    "p below": (lambda: F.dropout(X, -0.1), ValueError, r"dropout: p must be in \[0, 1\], got -0.1"),
    "p above": (lambda: F.dropout(X, 1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
    "p nan": (lambda: F.dropout(X, NAN), ValueError, r"p must be in \[0, 1\], got nan"),
    "p checked in evaluation": (lambda: F.dropout(X, 2.0, training=False), ValueError, r"got 2.0"),
    "p text": (lambda: F.dropout(X, "0.5"), TypeError, "p must be a float or a tensor, got str"),
    "p array": (lambda: F.dropout(X, numpy.array([0.3, 0.4])), TypeError, "p must be .* got ndarray"),
    "p huge": (lambda: F.dropout(X, 10**400), ValueError, "p must be in"),
    "p of many": (
        lambda: F.dropout(X, torch.rand(2)),
        ValueError,
        r"one element, got torch.float32 of shape \(2,\)",
    ),
    "p complex": (lambda: F.dropout(X, torch.tensor(1j)), ValueError, "real tensor .* got torch.complex64"),
    "integers": (lambda: F.dropout(X.long()), TypeError, "input must be float16, .* got torch.int64"),
    "complex": (lambda: F.dropout(X.cfloat()), TypeError, "got torch.complex64"),
    "bool": (lambda: F.dropout2d(X.bool()), TypeError, "dropout2d: input must be .* got torch.bool"),
    "sparse": (
        lambda: F.dropout(X.to_sparse()),
        TypeError,
        "dropout: input must be a dense .* torch.sparse_coo",
    ),
    "nested": (
        lambda: F.dropout(nested(torch.strided)),
        TypeError,
        "got a nested tensor of layout torch.strided",
    ),
    "channels of nested": (
        lambda: F.dropout1d(nested(torch.jagged)),
        TypeError,
        "dropout1d: input must be a dense tensor, got a nested tensor of layout torch.jagged",
    ),
    "nested in place": (
        lambda: F.dropout(nested(torch.jagged), inplace=True),
        ValueError,
        "not written in place .* inplace=True, mask_shape=None, contiguous=True",
    ),
    "nested, transposed": (
        lambda: F.dropout(nested(torch.jagged).transpose(1, 2)),
        ValueError,
        "must be contiguous, .* contiguous=False",
    ),
    "key type": (lambda: F.dropout(X, key=3), TypeError, "dropout: key must be a tensor .* got int"),
    "key dtype": (lambda: F.dropout(X, key=torch.zeros(2)), ValueError, r"int64 .* got torch.float32"),
    "key shape": (
        lambda: F.dropout(X, key=KEY[:1]),
        ValueError,
        r"shape \(2,\), got torch.int64 of shape \(1,\)",
    ),
    "key device": (
        lambda: F.dropout(X, key=KEY.to("meta")),
        ValueError,
        "key must be on the input's device, cpu",
    ),
    "offset type": (lambda: F.dropout(X, offset=1.0), TypeError, "offset must be an int, got float"),
    "offset below": (
        lambda: F.dropout(X, offset=-1),
        ValueError,
        r"offset must be in \[0, 2\*\*64\), got -1",
    ),
    "offset above": (lambda: F.dropout(X, offset=2**64), ValueError, "offset must be in"),
    "scaling": (lambda: F.dropout(X, scaling="none"), ValueError, "scaling must be .* got 'none'"),
    "mask_shape": (
        lambda: F.dropout(X, mask_shape=(4, 5)),
        ValueError,
        r"input's shape \(4, 6\), got \(4, 5\)",
    ),
    "mask_shape long": (
        lambda: F.dropout(X, mask_shape=(1, 4, 6)),
        ValueError,
        "mask_shape must be broadcastable",
    ),
    "mask size": (lambda: F.dropout_mask((2, -1), 0.5, KEY), ValueError, r"negative sizes, got \(2, -1\)"),
    "mask key": (lambda: F.dropout_mask(3, 0.5, None), TypeError, "dropout_mask: key must be a tensor"),
    "dropout1d": (lambda: F.dropout1d(torch.ones(3)), RuntimeError, "Expected 2D or 3D input"),
    "feature_alpha": (
        lambda: F.feature_alpha_dropout(torch.ones(3), 0.5, True),
        RuntimeError,
        "at least 2 dim",
    ),
    "drop_path": (lambda: F.drop_path(torch.tensor(1.0)), RuntimeError, "at least 1 dimensions"),
    "bias shape": (
        lambda: F.bias_dropout_add(X, torch.ones(5), X),
        ValueError,
        r"bias .* shape \(6,\) .* got .*\(5,\)",
    ),
    "bias dtype": (lambda: F.bias_dropout_add(X, X[0].half(), X), ValueError, "bias must be torch.float32"),
    "residual shape": (
        lambda: F.bias_dropout_add(X, X[0], X[:1]),
        ValueError,
        r"residual must be .* \(4, 6\)",
    ),
    "residual device": (
        lambda: F.bias_dropout_add(X, None, X.to("meta")),
        ValueError,
        "on cpu, got .* on meta",
    ),
    "scalar": (lambda: F.softmax_dropout(torch.tensor(1.0)), ValueError, "at least one dimension"),
    "softmax mask dtype": (
        lambda: F.softmax_dropout(X, 0.5, X.long()),
        ValueError,
        "mask must be torch.bool or",
    ),
    "softmax mask shape": (
        lambda: F.softmax_dropout(X, 0.5, X[:3] > 0),
        ValueError,
        r"shape \(4, 6\), got shape \(3",
    ),
    "backend": (lambda: F.dropout(X, backend="x"), TypeError, "unexpected keyword"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, error, match = CASES[name]
    with pytest.raises(error, match=match):
        call()


def test_nothing_is_half_done():
    x = torch.arange(6.0)
    for arguments in ({"key": KEY[:1]}, {"offset": -1}, {"p": 2.0}, {"mask_shape": (5,)}):
        with pytest.raises(ValueError):
            F.dropout(x, **{"p": 0.5, "inplace": True, **arguments})
    assert torch.equal(x, torch.arange(6.0))


@pytest.mark.parametrize("p", [-0.5, 1.5, NAN, 2])
@pytest.mark.parametrize("backend", ["native", "reference"] if _extension.loaded() else ["reference"])
def test_a_tensor_p_is_checked_where_that_costs_no_synchronisation(p, backend):
    with mp.backend(backend), pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got"):
        F.dropout(X, torch.tensor(p))


def test_overlapping_memory_in_place():
    with pytest.raises(RuntimeError, match="more than one element"):
        F.dropout(torch.ones(3, 1).expand(3, 4), 0.5, inplace=True)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda o: o.dropout(X.long(), KEY, 0.5), "input must be"),
        (lambda o: o.dropout(X, KEY.int(), 0.5), "key must be an int64"),
        (lambda o: o.dropout(X, KEY, 1.5), r"p must be in \[0, 1\]"),
        (lambda o: o.dropout(X, KEY, 0.5, 0, True, torch.tensor(0.5)), "p_tensor must be a float64"),
        (lambda o: o.dropout(X, KEY, 0.5, 0, True, torch.tensor(1.5).double()), r"p must be in \[0, 1\]"),
        (lambda o: o.structured_dropout(X, KEY, 0.5, [1, 0]), "ascending"),
        (lambda o: o.structured_dropout(X, KEY, 0.5, [2]), "shared_dims"),
        (lambda o: o.bias_dropout_add(X, None, X[:2], KEY, 0.5), "same shape"),
        (lambda o: o.bias_dropout_add(X, X[0, :3], X, KEY, 0.5), "bias must have"),
        (lambda o: o.softmax_dropout(X, X[:3], KEY, 0.5, False), "cannot be expanded"),
        (lambda o: o.softmax_dropout_backward(X, X.double(), KEY, 0.5), "same dtype"),
        (lambda o: o.dropout_mask(KEY, -1, 0.5), "must not be negative"),
    ],
)
def test_operators_check_for_themselves(call, match):
    if not _extension.loaded():
        pytest.skip("the compiled library is not built: pip install -e .")
    with pytest.raises(RuntimeError, match=match):
        call(torch.ops.modeprobe)


WITHOUT_LIBRARY = """
import sys
sys.modules["modeprobe._C"] = None
import torch
import modeprobe as mp
x, key = torch.randn(40, 30, requires_grad=True), mp.mask.key(1)
y = mp.functional.dropout(x, 0.3, key=key)
assert torch.equal(y != 0, mp.functional.dropout_mask(x.shape, 0.3, key))
y.sum().backward()
assert torch.equal(y != 0, x.grad != 0)
assert mp.nn.Dropout2d(0.5)(torch.ones(2, 3, 4, 4)).shape == (2, 3, 4, 4)
mp.functional.softmax_dropout(x).sum().backward()
try:
    with mp.backend("native"):
        mp.functional.dropout(x)
except RuntimeError as error:
    assert "could not be loaded" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError
"""


def test_without_the_compiled_library():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_backends_are_named():
    with (
        pytest.raises(ValueError, match="name must be one of auto, native, triton, reference"),
        mp.backend("x"),
    ):
        pass
