"""attnk.lint: every bug of the tutorials that a probe can see is found and named, and what is right is left alone."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnk
from attnk import models


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def found(model, x):
    """Rules to modules of what is found, having checked that the model stays what it is."""
    state, attributes = copy.deepcopy(model.state_dict()), [set(vars(part)) for part in model.modules()]
    training, generator = [part.training for part in model.modules()], torch.get_rng_state()
    findings = attnk.lint(model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [set(vars(part)) for part in model.modules()] == attributes
    assert [part.training for part in model.modules()] == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    for finding in findings:
        assert finding.evidence
        assert finding.fix
        assert str(finding).startswith(finding.module or "(model)")
    return {(finding.rule, finding.module): finding for finding in findings}


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(4))
MAPS = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(5))


# As published, bugs included


class ViTBlock(nn.Module):
    """Attention without batch_first on (B, N, C)."""

    def __init__(self, dim, heads, batch_first=False):
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=batch_first)
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 4), nn.ReLU(), nn.Linear(dim * 4, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.norm1(x + self.mha(x, x, x)[0])
        return self.norm2(x + self.ffn(x))


class ViT(nn.Module):
    """A class token that is to gather patches, with positions for one size."""

    def __init__(self, dim=32, batch_first=False):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(ViTBlock(dim, 2, batch_first), ViTBlock(dim, 2, batch_first))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.blocks(x)[:, 0])


def test_attention_over_the_batch():
    findings = found(ViT(), IMAGES)
    assert set(findings) == {("batch", "blocks.0.mha"), ("gradient", "patch_embed"), ("size", "")}
    batch = findings["batch", "blocks.0.mha"]
    assert "when the other images of the batch change" in batch.evidence
    assert "batch_first=True" in batch.fix
    assert "the gradient of x is 0 everywhere" in findings["gradient", "patch_embed"].evidence
    assert set(found(ViT(batch_first=True), IMAGES)) == {("size", "")}
    assert ("batch", "mha") in found(ViTBlock(64, 2), TOKENS)
    assert not found(ViTBlock(64, 2, batch_first=True), TOKENS)


def test_one_image_will_do():
    assert ("batch", "blocks.0.mha") in found(ViT(), IMAGES[:1])


def test_sequence_first_on_purpose():
    class Transposes(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(64, 2)

        def forward(self, x):
            x = x.transpose(0, 1)
            return self.mha(x, x, x)[0].transpose(0, 1)

    assert not found(Transposes(), TOKENS)


def test_batch_norm_of_the_batch():
    findings = found(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), IMAGES)
    assert set(findings) == {("batch", "1")}
    assert "track_running_stats=True" in findings["batch", "1"].fix
    assert not found(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), IMAGES)


class SELayer(nn.Module):
    def __init__(self, channel, reduction=16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction), nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3))).view(b, c, 1, 1)


class SENet(nn.Module):
    """No pooling before the linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.se = SELayer(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(torch.flatten(self.se(torch.relu(self.conv1(x))), 1))


def test_no_pooling():
    findings = found(SENet(), IMAGES)
    assert set(findings) == {("fails", "fc")}
    assert "it fails on (2, 3, 32, 32): RuntimeError: mat1 and mat2" in findings["fails", "fc"].evidence
    assert "pool the pixels" in findings["fails", "fc"].fix
    findings = found(SENet(), IMAGES[:, :, :2, :2])
    assert set(findings) == {("size", "fc")}
    assert not found(models.SENet(10), IMAGES)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), "function"])
@pytest.mark.parametrize("copied", [False, True])
def test_attention_before_a_relu(relu, copied):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, 4, 1)
            self.attention = attnk.TransformerEncoderLayer(16, 2)
            self.relu = F.relu if relu == "function" else relu

        def forward(self, x):
            x = self.conv(x)
            out = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)
            return self.relu(out.contiguous() if copied else out)

    findings = found(Network(), IMAGES)
    assert set(findings) == {("relu", "attention")}
    assert "% of it to 0" in findings["relu", "attention"].evidence

    class Adds(Network):
        def forward(self, x):
            x = self.conv(x)
            out = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)
            return F.relu(x + out)

    assert not found(Adds(), IMAGES)


def test_published_vgg_with_attention():
    findings = found(models.VGG16WithAttention(5, (3, 4, 5), compat="original", width=8), IMAGES)
    assert set(findings) == {("relu", f"attention_layers.block{i}") for i in (3, 4, 5)}
    assert not found(models.VGG16WithAttention(5, (3, 4, 5), width=8), IMAGES)


class SelfAttention(nn.Module):
    """Logits without a scale."""

    def __init__(self, embed_dim, scale=1.0):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.scale = scale

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = torch.matmul(q, k.transpose(-2, -1))
        if self.scale != 1:
            scores = scores * self.scale
        return torch.matmul(F.softmax(scores, dim=-1), v)


@pytest.mark.parametrize("build", [SelfAttention, lambda dim: attnk.SingleHeadSelfAttention(dim, compat="original")])
def test_unscaled_softmax(build):
    (finding,) = found(nn.Sequential(build(64)), TOKENS).values()
    assert (finding.rule, finding.module) == ("unscaled", "0")
    assert "the logits of 64 channels" in finding.evidence
    assert "64 ** -0.5" in finding.fix


@pytest.mark.parametrize("build", [lambda: SelfAttention(64, 64**-0.5), lambda: attnk.SingleHeadSelfAttention(64)])
def test_scaled_softmax(build):
    assert not found(build(), TOKENS)


def test_saturated_on_purpose():
    """Scaled logits may be as large as training made them."""
    module = SelfAttention(64, 64**-0.5)
    nn.init.normal_(module.query.weight, std=10.0)
    assert not found(module, TOKENS)


def test_masked_in_place():
    """What a mask adds to the logits of shifted windows is no missing scale."""
    block = attnk.SwinBlock(24, 3, 4, 2)
    assert not found(block, torch.randn(2, 8, 8, 24))


def test_heads_that_do_not_divide():
    class MultiHeadSelfAttention(nn.Module):
        def __init__(self, embed_dim, num_heads):
            super().__init__()
            self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
            self.query = nn.Linear(embed_dim, embed_dim)

        def forward(self, x):
            return self.query(x).view(len(x), -1, self.num_heads, self.head_dim)

    (finding,) = found(nn.Sequential(MultiHeadSelfAttention(64, 7)), TOKENS).values()
    assert (finding.rule, finding.module) == ("fails", "0")
    assert "embed_dim % num_heads == 0" in finding.fix


class Bottleneck(nn.Module):
    def __init__(self, channels, reduction_ratio=16):
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels // reduction_ratio, 1), nn.ReLU(),
            nn.Conv2d(channels // reduction_ratio, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return x * self.attention(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_dead_gates():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        se, bottleneck = SELayer(8), Bottleneck(8)
    findings = found(se, MAPS[:, :8])
    assert set(findings) == {("dead gate", "fc.0")}
    assert "weight is (0, 8)" in findings["dead gate", "fc.0"].evidence
    assert "max(1, channels // reduction)" in findings["dead gate", "fc.0"].fix
    findings = found(bottleneck, MAPS[:, :8])
    assert ("dead gate", "attention.1") in findings
    assert {rule for rule, _ in findings} <= {"dead gate", "fails"}
    assert not found(SELayer(16), MAPS)
    assert not found(attnk.SELayer(8), MAPS[:, :8])


class SpatialAttention(nn.Module):
    """Returns the map."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv1(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)))


class VGG(nn.Module):
    """Maps among the features, and a list of all results."""

    def __init__(self, keeps=True):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 16, 16, 16, 16):
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU(inplace=True), nn.MaxPool2d(2, 2), SpatialAttention()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 4)
        self.keeps = keeps

    def forward(self, x):
        features, last = [], x
        for layer in self.features:
            x = last * layer(last) if isinstance(layer, SpatialAttention) else layer(last)
            last = x
            if self.keeps:
                features.append(x)
        return self.classifier(torch.flatten(self.avgpool(x), 1))


def test_published_vgg_with_spatial_attention():
    findings = found(VGG(), IMAGES)
    assert set(findings) == {("shrinkage", "features.3"), ("kept", "features"), ("walk", "features")}
    evidence = findings["shrinkage", "features.3"].evidence
    assert "5 gates (features.3, features.7, features.11, features.15, features.19)" in evidence
    share = float(evidence.split(" with ")[1].split()[0])
    assert 0.5**5 / 3 < share < 0.5**5 * 3
    assert "expected input[3, 1, 16, 16] to have 16 channels" in findings["walk", "features"].evidence
    assert "(in 'features.4')" in findings["walk", "features"].evidence
    kept = findings["kept", "features"].evidence
    assert "are alive when the last module 'classifier' starts: from 'features.0'" in kept
    assert {rule for rule, _ in found(VGG(keeps=False), IMAGES)} == {"shrinkage", "walk"}


@pytest.mark.parametrize(
    ("compat", "rules"), [("original", {("shrinkage", "features.5")}), (None, set())]
)  # fmt: skip
def test_vgg_with_spatial_attention(compat, rules):
    assert set(found(models.VGG16WithSpatialAttention(5, compat, width=8), IMAGES)) == rules


def test_inserted_gates_shrink_unless_they_start_as_the_identity():
    def network(identity):
        model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4)], nn.AdaptiveAvgPool2d(1))
        for i in range(4):
            attnk.insert(model, f"{i}", attnk.SpatialAttention(output="gated"), identity)
        return model

    assert set(found(network(False), IMAGES)) == {("shrinkage", "0.inserted")}
    assert not found(network(True), IMAGES)


@pytest.mark.parametrize("where", ["attribute", "list", "outside"])
def test_kept_after_the_forward(where):
    outside = []

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)
            self.maps = []

        def forward(self, x):
            hidden = self.conv(x)
            if where == "attribute":
                self.last_map = hidden
            elif where == "list":
                self.maps.append(hidden)
            else:
                outside.append(hidden)
            return hidden.mean((2, 3))

    (finding,) = found(nn.Sequential(nn.Identity(), Remembers()), MAPS).values()
    assert (finding.rule, finding.module) == ("kept", "1")
    assert {"attribute": "'last_map'", "list": "'maps'", "outside": "1.conv"}[where] in finding.evidence


def test_kept_with_its_graph():
    """Such a module cannot even be copied."""
    model = nn.Sequential(nn.Conv2d(16, 1, 1))
    model[0].last_map = model(MAPS)
    (finding,) = attnk.lint(model, MAPS)
    assert (finding.rule, finding.module) == ("kept", "0")
    assert "'last_map'" in finding.evidence


def test_in_place():
    class Doubles(nn.Module):
        def forward(self, x):
            y = torch.sigmoid(x)
            y *= 2
            return y

    (finding,) = found(nn.Sequential(Doubles()), MAPS).values()
    assert "with gradients it fails: RuntimeError: one of the variables needed" in finding.evidence
    assert not found(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(16, 4, 1)), MAPS)


def test_an_error_that_the_model_catches():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(5, 5), nn.Linear(64, 8)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return F.dropout(self.right(x), share)

    share = 0.0
    assert not found(nn.Sequential(Tries(), nn.Linear(8, 8)), TOKENS)
    share = 0.5
    assert set(found(nn.Sequential(Tries(), nn.Linear(8, 8)), TOKENS)) == {("random", "0")}


def test_maps_of_another_rank():
    (finding,) = found(SELayer(16), MAPS.unsqueeze(2)).values()
    assert (finding.rule, finding.module) == ("fails", "")
    assert "too many values to unpack" in finding.evidence
    assert not found(attnk.SELayer(16), MAPS.unsqueeze(2))


def test_a_cache_is_not_kept():
    module = attnk.FeatureMapAttention(attnk.SelfAttention(16, 2), position=attnk.SinusoidalPosition2d(16))
    assert not found(module, MAPS)


def test_skips_are_not_kept():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))
            self.up = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(6))

        def forward(self, x):
            skips = []
            for layer in self.down:
                x = layer(x)
                skips.append(x)
            for layer in self.up:
                x = layer(torch.cat([x, skips.pop()], 1))
            return x

    assert not found(UNet(), IMAGES)


def test_random_in_evaluation():
    class Drops(nn.Module):
        def forward(self, x):
            return F.dropout(x)

    findings = found(nn.Sequential(nn.Conv2d(3, 4, 1), Drops()), IMAGES)
    assert set(findings) == {("random", "1")}
    assert "training=self.training" in findings["random", "1"].fix
    assert not found(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), IMAGES)


def test_layout():
    class Views(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], x.shape[1], -1).transpose(1, 2)

    findings = found(nn.Sequential(Views()), MAPS)
    assert set(findings) == {("layout", "0")}
    assert "reshape" in findings["layout", "0"].fix


def test_position():
    layer = attnk.TransformerEncoderLayer(16, 2)
    findings = found(attnk.FeatureMapAttention(layer), MAPS)
    assert set(findings) == {("position", "layer.self_attn")}
    assert "SinusoidalPosition2d" in findings["position", "layer.self_attn"].fix
    assert not found(attnk.FeatureMapAttention(layer, position=attnk.LearnedPosition2d(8, 8, 16)), MAPS)


def test_batch_size_that_is_written_down():
    class Two(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)[:, :4] + torch.zeros(2, 4) if len(x) == 2 else x.reshape(2, 7, -1)

    (finding,) = found(nn.Sequential(Two()), IMAGES).values()
    assert (finding.rule, finding.module) == ("fails", "0")
    assert finding.evidence.startswith("a batch of 3 fails, one of 2 does not")


RIGHT = {
    "vit": lambda: (models.ViT(32, 8, 32, 2, 2, 5), IMAGES),
    "spatial": lambda: (attnk.SpatialAttention(output="gated"), MAPS),
    "cbam": lambda: (attnk.CBAM(16), MAPS),
    "cbam_norm": lambda: (attnk.CBAM(16, norm=True), MAPS),
    "coordinate": lambda: (attnk.CoordinateAttention(16), MAPS),
    "self": lambda: (attnk.SelfAttention(64), TOKENS),
    "layer": lambda: (attnk.TransformerEncoderLayer(64), TOKENS),
    "axial": lambda: (attnk.SeparableSelfAttention(16, 2), MAPS),
    "pool": lambda: (nn.Sequential(nn.Conv2d(3, 16, 4, 4), attnk.AttentionPool2d(8, 16, 2)), IMAGES),
    "double": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double(), IMAGES.double()),
    "bfloat16": lambda: (models.ViT(32, 8, 32, 2, 2, 5).bfloat16(), IMAGES.bfloat16()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_left_alone(name):
    assert found(*RIGHT[name]()) == {}


def test_compiled_models():
    assert ("batch", "blocks.0.mha") in {
        (f.rule, f.module) for f in attnk.lint(torch.compile(ViT(), backend="eager"), IMAGES)
    }


def test_errors():
    with pytest.raises(TypeError, match="model must be a module, got str"):
        attnk.lint("model", IMAGES)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        attnk.lint(nn.Linear(3, 3), torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must be \(B, ...\)"):
        attnk.lint(nn.Linear(3, 3), torch.ones(3))


def test_leaves_nothing_behind():
    from attnk.ops import _watch

    for x in (IMAGES, torch.randn(2, 3, 4, 4)):
        attnk.lint(ViT(), x)
    assert not _watch.watchers
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
