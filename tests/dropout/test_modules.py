"""The dropout modules as drop-in replacements for torch's."""

import copy
import inspect
import io
import pickle
import threading
import warnings

import pytest
import torch

import modeprobe as mp
from modeprobe import functional as F
from modeprobe.nn._backend import on_own_backend
from modeprobe.ops import backend

pytestmark = pytest.mark.rung("reference")

NAMES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
SHAPES = [(), (3,), (3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 2), (2, 3, 1, 2, 2, 2)]


@pytest.fixture(params=NAMES)
def pair(request):
    return getattr(mp.nn, request.param), getattr(torch.nn, request.param)


def behaviour(function):
    """What a call does besides drawing numbers: shape and aliasing of the result, the error, the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except (RuntimeError, ValueError) as error:
            result = type(error)
    return result, [(item.category, str(item.message)) for item in caught]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_rules_and_warnings(pair, shape, training):
    def call(module):
        x = torch.ones(shape)
        y = module.train(training)(x)
        return y.shape, y.data_ptr() == x.data_ptr()

    ours, theirs = (behaviour(lambda cls=cls: call(cls(0.5))) for cls in pair)
    assert ours == theirs


@pytest.mark.parametrize("p", [0.3, 0, 1, 0.0, 1.0])
@pytest.mark.parametrize("inplace", [True, False])
def test_constructor_and_repr(pair, p, inplace):
    ours, theirs = (cls(p, inplace) for cls in pair)
    assert isinstance(ours, pair[1])
    assert repr(ours) == repr(theirs)
    assert (ours.p, ours.inplace, ours.training) == (theirs.p, theirs.inplace, theirs.training)
    assert repr(pair[0](p=p, inplace=inplace)) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_bad_probability(pair, p):
    errors = [behaviour(lambda cls=cls: cls(p))[0] for cls in pair]
    assert errors == [ValueError, ValueError]
    module = pair[0](0.5)
    module.p = p
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        module(torch.ones(2, 3, 4))


FUNCTIONS = [
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
]


@pytest.mark.parametrize("name", [*NAMES, *FUNCTIONS])
def test_arguments_start_as_torchs(name):
    packages = (mp.nn, torch.nn) if name in NAMES else (mp.functional, torch.nn.functional)
    ours, theirs = (
        [(a.name, a.default, a.kind) for a in inspect.signature(getattr(package, name)).parameters.values()]
        for package in packages
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.filterwarnings("ignore:dropout")
def test_p_and_mode_may_change(pair):
    module, x = pair[0](0.5), torch.rand(50, 40, 2) + 1
    module.p = 0.0
    assert torch.equal(module(x), x)
    module.p = 1.0
    assert not module(x).any()
    module.p = torch.tensor(0.5)
    assert not torch.equal(module(x), module(x))
    assert module.eval()(x) is x


@pytest.mark.filterwarnings("ignore:dropout")
def test_the_probe_reads_them_as_it_reads_torchs(pair):
    x = torch.randn(3, 5, 4)
    reports = [mp.probe(torch.nn.Sequential(torch.nn.Linear(4, 4), cls(0.5)), x) for cls in pair]
    ours, theirs = ([(site.what, site.p, site.cause) for site in report.sites] for report in reports)
    assert ours == theirs


class Calls(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.function(x * self.weight, self.training)


@pytest.mark.parametrize(
    ("cause", "function"),
    [
        ("functional_dropout", lambda x, on: F.dropout(x, 0.3, on)),
        ("functional_dropout", lambda x, on: F.softmax_dropout(x, 0.3, None, on)),
        ("functional_dropout", lambda x, on: F.bias_dropout_add(x, None, x, 0.3, training=on)),
        ("functional_dropout", lambda x, on: F.bias_dropout_add(x, x[0], x, 0.3, on)),
        ("stochastic_depth", lambda x, on: x + F.drop_path(x, 0.3, training=on)),
        (None, lambda x, on: F.softmax_dropout(x, 0.0, None, on)),
        (None, lambda x, on: F.bias_dropout_add(x, None, x, 0.3, False)),
    ],
)
def test_the_probe_knows_our_functions(cause, function):
    model, x = Calls(function), torch.randn(6, 8)
    report = mp.probe(model, x)
    assert report.causes == ({cause} if cause else set())
    assert [site.p for site in report.sites] == ([0.3] if cause else [])
    with mp.no_dropout(model.train()):  # stochastic depth goes on
        assert torch.equal(model(x), model(x)) == (cause != "stochastic_depth")


@pytest.mark.filterwarnings("ignore:dropout")
def test_in_place_as_in_torch(pair):
    for cls in pair:
        x = torch.rand(50, 40, 2) + 1
        y = cls(0.5, inplace=True)(x)
        assert (y is x) == (cls.__name__ not in ("AlphaDropout", "FeatureAlphaDropout"))


def test_copies(pair):
    module = pair[0](0.25, True)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)


def test_own_backends_in_threads():
    """As in nn.DataParallel: a layer's choice is seen by no other, and is gone when all have ended."""
    inside, seen = threading.Barrier(2, timeout=60), {}

    class Layer(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.backend = name

        @on_own_backend
        def forward(self, input):
            inside.wait()
            seen[self.backend] = backend.resolve("cpu")
            inside.wait()
            return input

    before = backend.resolve("cpu")
    threads = [threading.Thread(target=Layer(name), args=(None,)) for name in ("auto", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"auto": before, "reference": "reference"}
    assert backend.resolve("cpu") == before


def test_classic_scaling():
    module = mp.nn.Dropout(0.25, scaling="classic")
    x = torch.rand(10_000) + 1
    y = module(x)
    assert set((y / x).tolist()) == {0.0, 1.0}
    assert torch.equal(module.eval()(x), x * 0.75)
    assert abs(y.mean() - module(x).mean()) < 0.05
    assert repr(module) == "Dropout(p=0.25, inplace=False, scaling='classic')"
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)
    with pytest.raises(ValueError, match="scaling must be"):
        mp.nn.Dropout(scaling="other")


def test_a_torch_module_whose_class_is_changed_works(pair):
    module = pair[1](0.5)
    module.__class__ = pair[0]
    assert module.eval()(torch.ones(2, 3, 4)).shape == (2, 3, 4)
    assert pair[0].__name__ in repr(module)


def test_drop_path():
    module, x = mp.nn.DropPath(0.5), torch.ones(200, 3, 4)
    y = module(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y, y[:, :1, :1].expand(200, 3, 4))
    assert module.eval()(x) is x
    assert repr(module) == "DropPath(p=0.5, inplace=False)"
    assert mp.nn.DropPath(0.5, inplace=True)(x) is x
    with pytest.raises(ValueError, match="p must be in"):
        mp.nn.DropPath(1.5)


def test_modules_differ_only_by_numbers_drawn():
    """The chance of being kept, and the value if so, are torch's."""
    x = torch.full((400, 300), 3.0)
    for name in ("Dropout", "AlphaDropout"):
        a, b = (getattr(package, name)(0.2)(x) for package in (mp.nn, torch.nn))
        assert torch.allclose(a.unique(), b.unique())
        assert abs(a.mean() - b.mean()) < 0.02 * b.mean()
