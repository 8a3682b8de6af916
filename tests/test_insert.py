"""attnk.insert and attnk.remove: modules behind any part of a model, without a change to anything else."""

import copy
import io

import pytest
import torch
from torch import nn

import attnk


class Block(nn.Module):
    """A residual block whose convolutions share one ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class Walker(nn.ModuleDict):
    """A container whose forward walks through its children, as torchvision's dense blocks."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Sequential(Block(), Block()), nn.MaxPool2d(2)
        )
        self.walker = Walker({"a": nn.Conv2d(8, 8, 1)})
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        return self.classifier(self.walker(self.features(x)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gate(**options):
    return attnk.SpatialAttention(output="gated", **options)


def loaded(model):
    """A model that went through pickle."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def same_state(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


PARTS = ["", "features", "features.0", "features.2", "features.2.0", "features.2.1.conv2", "features.3", "walker.a"]


@pytest.mark.parametrize("after", PARTS)
def test_computes_what_is_inserted(model, x, after):
    module = nn.Linear(4, 4) if after == "" else attnk.CBAM(8)
    expected = copy.deepcopy(model)
    expected.get_submodule(after).register_forward_hook(lambda part, args, out: module(out))
    assert attnk.insert(model, after, module) is model
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("after", PARTS)
def test_changes_nothing_else(model, after):
    plain = copy.deepcopy(model)
    attnk.insert(model, after=after, module=nn.Linear(4, 4) if after == "" else gate())
    for (name, part), (plain_name, plain_part) in zip(
        [(n, p) for n, p in model.named_modules() if "inserted" not in n], plain.named_modules(), strict=True
    ):
        assert name == plain_name
        assert type(part) is type(plain_part)
        if isinstance(part, nn.Sequential | nn.ModuleDict):
            assert len(part) == len(plain_part)
    keys = [key for key in model.state_dict() if "inserted" not in key]
    assert keys == list(plain.state_dict())
    path = {"": "", "features": "features.3.", "features.2": "features.2.1."}.get(after, f"{after}.")
    added = set(model.state_dict()) - set(keys)
    assert added
    assert all(key.startswith(f"{path}inserted.module.") for key in added)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("after", PARTS[1:])
def test_remove_undoes_it(model, x, after, identity):
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    printed, hooks = repr(model), [dict(part._forward_hooks) for part in model.modules()]
    attnk.insert(model, after, gate(), identity)
    attnk.insert(model, "features.1", attnk.SELayer(8, 4))
    assert not torch.equal(model(x), expected)
    assert attnk.remove(model) is model
    assert same_state(model.state_dict(), state)
    assert torch.equal(model(x), expected)
    assert repr(model) == printed
    assert [dict(part._forward_hooks) for part in model.modules()] == hooks
    assert same_state(attnk.remove(model).state_dict(), state)


def test_remove_leaves_other_hooks(model, x):
    seen = []
    model.features[3].register_forward_hook(lambda *args: seen.append(1))
    attnk.insert(model, "features.3", gate())
    model.features[3].register_forward_hook(lambda *args: seen.append(2))
    attnk.remove(model)(x)
    assert seen == [1, 2]


def test_identity_at_step_0(model, x):
    expected = model(x)
    attnk.insert(model, "features.3", attnk.CBAM(8), identity=True)
    attnk.insert(model, "features.0", gate(), identity=True)
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    module = model.features[3].inserted.module
    before = copy.deepcopy(module.state_dict())
    for step in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert model.features[3].inserted.alpha != 0
        assert same_state(module.state_dict(), before) == (step == 0)
    assert not torch.equal(model(x), expected)


def test_identity_keeps_the_dtype():
    class Widens(nn.Module):
        def forward(self, x):
            return x.float() / 2

    model = attnk.insert(nn.Conv2d(3, 8, 1), "", Widens(), identity=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 6, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_plain_weights_load_strictly(model, x, identity, assign):
    torch.manual_seed(7)
    plain = Network().eval()
    before = attnk.insert(copy.deepcopy(plain), "features.3", attnk.CBAM(8, norm=True).eval(), identity)
    module = before.features[3].inserted.module
    attnk.insert(model, "features.3", copy.deepcopy(module), identity)
    gates = list(model.features[3].inserted.parameters())
    state = plain.state_dict()
    keys = list(state)
    model.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == keys
    assert [id(p) for p in model.features[3].inserted.parameters()] == [id(p) for p in gates]
    assert all(p.requires_grad for p in gates)
    assert torch.equal(model(x), before(x))
    # a part of the weights is no plain model's
    broken = dict(before.state_dict())
    del broken["features.3.inserted.module.spatial_attention.conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*spatial_attention\.conv\.weight"):
        model.load_state_dict(broken)
    # and no other key goes missing unseen
    del state["classifier.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"classifier.weight\"\. $"):
        model.load_state_dict(state)


@pytest.mark.parametrize("way", [copy.deepcopy, loaded, "state_dict"])
def test_survives(model, x, way):
    attnk.insert(model, "features.3", attnk.CBAM(8), identity=True)
    nn.init.ones_(model.features[3].inserted.alpha)
    expected = model(x)
    if way == "state_dict":
        other = attnk.insert(Network().eval(), "features.3", attnk.CBAM(8), identity=True)
        other.load_state_dict(model.state_dict(), strict=True)
    else:
        other = way(model)
        other.features[0].register_forward_hook(lambda *args: None)
        # what registers next in this process must not take the place of what came with the copy
        for _ in range(3):
            other.features[3].register_forward_hook(lambda *args: None).remove()
    assert torch.equal(other(x), expected)
    nn.init.zeros_(other.features[3].inserted.alpha)  # the copy has a module of its own
    assert torch.equal(model(x), expected)
    assert not torch.equal(other(x), expected)
    plain = Network()
    plain.load_state_dict(attnk.remove(other).state_dict(), strict=True)


def test_compiles(model, x):
    attnk.insert(model, "features.2.0", gate(), identity=True)
    attnk.insert(model, "features.3", attnk.SELayer(8, 4))
    nn.init.ones_(model.features[2][0].inserted.alpha)
    expected, compiled = model(x), torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_is_traced(model, x):
    attnk.insert(model, "features.0", gate())
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_slices_take_it_along(model, x):
    attnk.insert(model, "features.1", gate())
    expected = model.features[1].inserted.module(torch.relu(model.features[0](x)))
    assert torch.equal(model.features[:2](x), expected)


def test_goes_where_the_model_is(model):
    model.double().train()
    model.features.eval()
    attnk.insert(model, "features.3", nn.Sequential(nn.BatchNorm2d(8), nn.Dropout()), identity=True)
    inserted = model.features[3].inserted
    assert {parameter.dtype for parameter in inserted.parameters()} == {torch.float64}
    assert not any(part.training for part in inserted.modules())
    attnk.insert(model, "classifier", nn.Dropout())
    assert model.classifier.inserted.module.training
    model.eval()
    assert not model.classifier.inserted.module.training
    model.requires_grad_(False)
    assert not inserted.alpha.requires_grad


def test_insert_after_an_insertion(model, x):
    attnk.insert(model, "features.3", gate())
    with pytest.raises(ValueError, match=r"'features\.3' has an insertion: .*insert after 'features\.3\.inserted'"):
        attnk.insert(model, "features.3", gate())
    expected = model.features(x) / 2
    attnk.insert(model, "features.3.inserted", Half())
    torch.testing.assert_close(model.features(x), expected)
    assert "inserted" not in repr(attnk.remove(model))


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def test_a_part_that_runs_twice(model, x):
    block = model.features[2][0]
    x = torch.randn(1, 8, 4, 4)
    attnk.insert(model, "features.2.0.relu", Half())
    plain = copy.deepcopy(attnk.remove(copy.deepcopy(block)))
    assert torch.equal(block(x), torch.relu(x + plain.conv2(torch.relu(plain.conv1(x)) / 2)) / 2)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("features.7", r"no part named 'features.7'; it has .*'features\.3'"),
        ("walker", "'walker' is a container, Walker, whose children are all called"),
        ("twice.0", r"'twice\.0' is the same module as 'twice\.1'"),
        ("empty", "'empty' is a container, Sequential"),
    ],
)
def test_refuses(model, after, message):
    relu = nn.ReLU()
    model.twice, model.empty = nn.Sequential(relu, relu), nn.Sequential()
    state = repr(model)
    with pytest.raises(ValueError, match=message):
        attnk.insert(model, after, gate())
    assert repr(model) == state


def test_refuses_types(model, x):
    with pytest.raises(TypeError, match="module must be a module, got str"):
        attnk.insert(model, "features.0", "gate")
    scripted = nn.Sequential(torch.jit.trace(nn.Conv2d(3, 3, 1), x))
    with pytest.raises(TypeError, match="'0' is TorchScript"):
        attnk.insert(scripted, "0", gate())
    attnk.insert(model, "features.3", attnk.SpatialAttention())
    with pytest.raises(ValueError, match=r'\(2, 8, 4, 4\), and SpatialAttention returned \(2, 1, 4, 4\).*"gated"'):
        model(x)
    lstm = attnk.insert(nn.LSTM(3, 4), "", gate())
    with pytest.raises(TypeError, match="this one returned tuple"):
        lstm(torch.randn(5, 2, 3))
