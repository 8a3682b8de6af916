"""DETR against the same in plain PyTorch, its matching against every permutation, its loss pair by pair."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from gate_modules import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_drop_in, assert_runs_everywhere, settled
from torch import nn

import attnk
from attnk.models.detr import DETR, DETRLoss, generalized_box_iou, hungarian_match

DIM, HEADS, CLASSES, QUERIES, PATCH = 16, 2, 3, 5, 4
SIZES = {"dim": DIM, "num_heads": HEADS, "feedforward_dim": 24, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0}


class PlainLayer(nn.Module):
    """A layer of the encoder, or with cross attention of the decoder, as the paper's appendix draws them."""

    def __init__(self, dim, heads, hidden, crosses):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        if crosses:
            self.multihead_attn = nn.MultiheadAttention(dim, heads)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        if crosses:
            self.norm3 = nn.LayerNorm(dim)

    def ffn(self, x):
        return self.linear2(F.relu(self.linear1(x)))

    def encode(self, x, position, mask):
        x = self.norm1(x + self.self_attn(x + position, x + position, x, key_padding_mask=mask)[0])
        return self.norm2(x + self.ffn(x))

    def decode(self, x, queries, memory, position, mask):
        x = self.norm1(x + self.self_attn(x + queries, x + queries, x)[0])
        y = self.multihead_attn(x + queries, memory + position, memory, key_padding_mask=mask)[0]
        x = self.norm2(x + y)
        return self.norm3(x + self.ffn(x))


class Holder(nn.Module):
    """Layers, and a norm behind them, under the published keys."""

    def __init__(self, layers, norm=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class PlainDETR(nn.Module):
    """The network with its tokens first, one layer and one position after the other; answers in one tensor."""

    def __init__(self, backbone, channels, aux, mask=None):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.encoder = Holder(PlainLayer(DIM, HEADS, 24, False) for _ in range(2))
        self.transformer.decoder = Holder((PlainLayer(DIM, HEADS, 24, True) for _ in range(2)), nn.LayerNorm(DIM))
        self.class_embed = nn.Linear(DIM, CLASSES + 1)
        self.bbox_embed = Holder([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 4)])
        self.query_embed = nn.Embedding(QUERIES, DIM)
        self.input_proj = nn.Conv2d(channels, DIM, kernel_size=1)
        self.backbone = backbone
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # an empty one is in DETR's positions
        self.aux, self.mask = aux, mask

    def forward(self, x):
        features = self.backbone(x)
        height, width = features.shape[2:]
        padded = x.new_zeros(len(x), *x.shape[2:], dtype=torch.bool) if self.mask is None else self.mask
        padded = padded[:, :: x.shape[2] // height, :: x.shape[3] // width]
        position = torch.stack([published_position(one, DIM) for one in padded.tolist()], 1)
        memory = self.input_proj(features).flatten(2).permute(2, 0, 1)
        for layer in self.transformer.encoder.layers:
            memory = layer.encode(memory, position, padded.flatten(1))
        queries = self.query_embed.weight.unsqueeze(1).repeat(1, len(x), 1)
        state, answers = torch.zeros_like(queries), []
        for layer in self.transformer.decoder.layers:
            state = layer.decode(state, queries, memory, position, padded.flatten(1))
            seen = self.transformer.decoder.norm(state).transpose(0, 1)
            first, second, last = self.bbox_embed.layers
            boxes = last(F.relu(second(F.relu(first(seen))))).sigmoid()
            answers.append(torch.cat([self.class_embed(seen), boxes], -1))
        return torch.cat(answers if self.aux else answers[-1:])


def published_position(padded, dim):
    """Of one image, from a list of rows: (h w, dim), number by number."""
    seen = [[not pixel for pixel in row] for row in padded]
    rows = []
    for i, j in itertools.product(range(len(seen)), range(len(seen[0]))):
        column = [row[j] for row in seen]
        vector = []
        for before, every in ((column[: i + 1], column), (seen[i][: j + 1], seen[i])):
            place = sum(before) / (sum(every) + 1e-6) * 2 * math.pi
            for index in range(dim // 2):
                angle = place / 10000 ** (2 * (index // 2) / (dim // 2))
                vector.append(math.cos(angle) if index % 2 else math.sin(angle))
        rows.append(vector)
    return torch.tensor(rows, dtype=torch.float64)


class Flat(nn.Module):
    """A DETR whose answers are one tensor, those of the auxiliary layers first; under the DETR's keys."""

    def __init__(self, model, mask=None):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.model, self.mask = [model], mask

    def forward(self, x):
        out = self.model[0](x, self.mask)
        return torch.cat([torch.cat([one["pred_logits"], one["pred_boxes"]], -1) for one in answers_of(out)])


class Joined(nn.Module):
    """A DETR whose last answer is one tensor."""

    def __init__(self, model, mask=None):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x):
        out = self.model(x, None if self.mask is None else self.mask[: len(x)])
        return torch.cat([out["pred_logits"], out["pred_boxes"]], -1)


def answers_of(out):
    return [*out.get("aux_outputs", []), out]


def patches():
    """A backbone that carries nothing from a patch to the next."""
    return nn.Conv2d(3, 6, PATCH, stride=PATCH)


def stem():
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    )  # fmt: skip


def small(**options):
    return DETR(CLASSES, QUERIES, **{**SIZES, **options})


def on_patches(**options):
    return small(backbone=patches(), backbone_channels=6, **options)


def padding(*sizes, height=16, width=24):
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for one, (rows, columns) in zip(mask, sizes, strict=True):
        one[:rows, :columns] = False
    return mask


def predictions(batch=2, queries=QUERIES, dtype=torch.float64, layers=1):
    """Answers with a gradient."""
    outs = []
    for _ in range(layers):
        logits = torch.randn(batch, queries, CLASSES + 1, dtype=dtype, requires_grad=True)
        boxes = (torch.rand(batch, queries, 4, dtype=dtype) * 0.5 + 0.1).requires_grad_()
        outs.append({"pred_logits": logits, "pred_boxes": boxes})
    return outs[-1] if layers == 1 else {**outs[-1], "aux_outputs": outs[:-1]}


def objects(*numbers, dtype=torch.float64):
    return [
        {"labels": torch.randint(CLASSES, (number,)), "boxes": torch.rand(number, 4, dtype=dtype) * 0.5 + 0.2}
        for number in numbers
    ]


# The network.


@pytest.mark.parametrize("aux", [True, False])
def test_equals_its_formula(aux):
    x = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    assert_drop_in(PlainDETR(stem(), DIM, aux), Flat(small(aux=aux)), x)


def test_padded_equals_its_formula():
    mask = padding((16, 24), (8, 20), (12, 4))
    x = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    assert_drop_in(PlainDETR(patches(), 6, True, mask), Flat(on_patches(), mask), x)


def test_keys():
    keys = set(on_patches().state_dict())
    layer = "transformer.decoder.layers.1"
    assert {f"{layer}.{leaf}" for leaf in ("multihead_attn.in_proj_weight", "norm3.bias", "linear1.weight")} <= keys
    assert {"transformer.decoder.norm.weight", "query_embed.weight", "bbox_embed.layers.2.bias"} <= keys
    parts = {key.split(".")[0] for key in keys}
    assert parts == {"transformer", "class_embed", "bbox_embed", "query_embed", "input_proj", "backbone"}


def test_count():
    """DETR-R50 trains 41,302,368 numbers, as its logs say, of which ResNet-50's convolutions from stage 2 on have
    23,232,512 (its stem and first stage, and the batch norms, are frozen)."""
    with torch.device("meta"):
        model = DETR(91, backbone=nn.Identity(), backbone_channels=2048)
    assert attnk.count_parameters(model) == 41_302_368 - 23_232_512


def test_auxiliary_answers():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = settled(small(decoder_layers=3))
    out = model(x)
    assert set(out) == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert len(out["aux_outputs"]) == 2
    for answer in answers_of(out):
        assert answer["pred_logits"].shape == (2, QUERIES, CLASSES + 1)
        assert answer["pred_boxes"].shape == (2, QUERIES, 4)
        assert answer["pred_boxes"].min() > 0
        assert answer["pred_boxes"].max() < 1
    model.aux = False
    last = model(x)
    assert set(last) == {"pred_logits", "pred_boxes"}
    for name in last:  # the heads read three layers at once, or one
        torch.testing.assert_close(last[name], out[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aux", [True, False])
def test_any_size_without_memory_of_the_last(aux):
    model = settled(small(aux=aux)).eval()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in ((40, 24), (7, 90), (1, 1), (40, 24))]
    first = model(images[0])["pred_boxes"]
    for image in images[1:3]:
        assert model(image)["pred_boxes"].isfinite().all()
    assert torch.equal(model(images[0])["pred_boxes"], first)


def test_dropout_in_training():
    torch.manual_seed(1)
    model, x = small(dropout=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x)["pred_logits"], model(x)["pred_logits"])
    model.eval()
    assert torch.equal(model(x)["pred_logits"], model(x)["pred_logits"])


def test_what_is_dropped():
    """The attention weights, the hidden layer, and what each branch adds; all dropped, the norms are left."""
    model, x, other = small(dropout=0.5).double(), *torch.randn(2, 1, 6, DIM, dtype=torch.float64)
    for stack, inputs, branches in (("encoder", (x, other, None), 2), ("decoder", (x, other, x, x, None), 3)):
        layer, shapes = model.transformer.get_submodule(stack)["layers"][0], []
        for part in layer.children():
            if isinstance(part, nn.MultiheadAttention):
                assert part.dropout == 0.5
        layer.dropout.p = 1.0
        layer.dropout.register_forward_pre_hook(lambda module, args, shapes=shapes: shapes.append(args[0].shape[-1]))
        expected = x
        for norm in range(branches):
            expected = layer.get_submodule(f"norm{norm + 1}")(expected)
        torch.testing.assert_close(layer(*inputs), expected)
        assert sorted(shapes) == [DIM] * branches + [24]


def test_starts_as_published():
    """Xavier's uniform distribution for the matrices of the transformer, a normal one for the queries."""
    model = DETR(2, 400, dim=64, num_heads=2, feedforward_dim=100, encoder_layers=1, decoder_layers=1)
    for name, parameter in model.transformer.named_parameters():
        if parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound, name
    assert 0.9 < model.query_embed.weight.std() < 1.1


# Padding.


def test_padded_images_are_as_they_are_alone():
    model, sizes = settled(on_patches()), ((16, 24), (8, 20), (12, 4))
    mask = padding(*sizes)
    x = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    out = model(x, mask)
    for index, (rows, columns) in enumerate(sizes):
        alone = model(x[index : index + 1, :, :rows, :columns])
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(out[name][index : index + 1], alone[name], rtol=1e-9, atol=1e-11)


def test_padding_is_not_seen():
    model, mask = settled(on_patches()), padding((16, 24), (8, 20))
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(Joined(model, mask)(x).square().sum(), x)
    assert not grad.masked_select(mask.unsqueeze(1)).any()
    assert grad.masked_select(~mask.unsqueeze(1)).all()


def test_nothing_padded():
    model, x = settled(on_patches()), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = torch.zeros(2, 16, 24, dtype=torch.bool)
    torch.testing.assert_close(outcome(Joined(model, mask), x), outcome(Joined(model), x), rtol=1e-9, atol=1e-11)


def test_everything_padded():
    model, x = settled(on_patches()), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    out = outcome(Joined(model, padding((16, 24), (0, 0))), x)
    assert all(tensor.isfinite().all() for tensor in out)


def test_padded_in_bfloat16():
    model, mask = on_patches().bfloat16(), padding((16, 24), (8, 20))
    assert Joined(model, mask)(torch.randn(2, 3, 16, 24).bfloat16()).dtype == torch.bfloat16


# Generalised IoU.


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0),  # side by side: the hull is the union
        ((0, 0, 1, 1), (2, 2, 3, 3), -7 / 9),
        ((0, 0, 4, 4), (1, 1, 2, 3), 1 / 8),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # points
        ((1, 1, 1, 1), (2, 3, 2, 3), -1),
        ((1, 1, 1, 1), (0, 0, 2, 2), 0),
    ],
)
def test_giou_by_hand(box, other, expected):
    boxes = torch.tensor([box], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([other], dtype=torch.float64)
    found = generalized_box_iou(boxes, others)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.grad(found, boxes)[0].isfinite().all()


def boxes_of(numbers):
    corner, size = torch.tensor(numbers, dtype=torch.float64).view(-1, 2, 2).unbind(1)
    return torch.cat([corner, corner + size], 1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 8), min_size=8, max_size=24).map(lambda x: x[: len(x) // 4 * 4]), st.integers(-5, 5))
def test_giou_properties(numbers, shift):
    boxes = boxes_of(numbers)
    table = generalized_box_iou(boxes, boxes)
    assert table.shape == (len(boxes), len(boxes))
    torch.testing.assert_close(table, table.T)
    assert table.min() >= -1
    assert table.max() <= 1
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    torch.testing.assert_close(table.diagonal(), (area > 0).double())
    torch.testing.assert_close(generalized_box_iou(boxes + shift, boxes + shift), table)
    torch.testing.assert_close(generalized_box_iou(boxes * 3, boxes * 3), table)
    for (i, one), (j, other) in itertools.product(enumerate(boxes.tolist()), repeat=2):
        assert table[i, j].item() == pytest.approx(plain_giou(one, other), abs=1e-12)


def plain_giou(one, other):
    def over(numerator, denominator):
        return numerator / denominator if denominator > 0 else 0

    def area(left, top, right, bottom):
        return max(0, right - left) * max(0, bottom - top)

    inner = area(*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:]))
    hull = area(*map(min, one[:2], other[:2]), *map(max, one[2:], other[2:]))
    union = area(*one) + area(*other) - inner
    return over(inner, union) - over(hull - union, hull)


def test_giou_of_batches():
    boxes, others = (boxes_of(torch.rand(4 * n).tolist()) for n in (6, 8))
    table = generalized_box_iou(boxes.view(2, 3, 4), others.view(2, 4, 4))
    assert table.shape == (2, 3, 4)
    torch.testing.assert_close(table[1], generalized_box_iou(boxes[3:], others[4:]))
    assert generalized_box_iou(boxes, others[:0]).shape == (6, 0)
    with pytest.raises(ValueError, match=r"boxes must be \(..., N, 4\) and"):
        generalized_box_iou(boxes[0], others)
    with pytest.raises(ValueError, match=r"boxes must be \(..., N, 4\) and"):
        generalized_box_iou(boxes, others[:, :3])


# Matching.


def corners(box):
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def pair_cost(logits, box, label, wanted, class_cost=1, l1_cost=5, giou_cost=2):
    distance = sum(abs(one - other) for one, other in zip(box.tolist(), wanted.tolist(), strict=True))
    overlap = plain_giou(corners(box.tolist()), corners(wanted.tolist()))
    return l1_cost * distance - class_cost * logits.softmax(-1)[label].item() - giou_cost * overlap


def best_match(logits, boxes, target, *costs):
    """Over all ways to give each target a query of its own, or each query a target."""
    labels, wanted = target["labels"], target["boxes"]
    queries, number = len(boxes), len(labels)
    few = min(queries, number)
    ways = itertools.product(
        itertools.permutations(range(queries), few) if queries > number else [range(queries)],
        itertools.permutations(range(number), few) if queries <= number else [range(number)],
    )

    def cost(way):
        return sum(pair_cost(logits[q], boxes[q], labels[t], wanted[t], *costs) for q, t in zip(*way, strict=True))

    return sorted(zip(*min(ways, key=cost), strict=True))


@pytest.mark.parametrize("costs", [(), (3, 0.5, 0), (0, 0, 2), (1, 0.01, 0)])
def test_match_against_every_permutation(costs):
    for _ in range(3):
        out, targets = predictions(4), objects(3, 0, 1, 5)
        matches = hungarian_match(out, targets, *costs)
        assert len(matches) == 4
        for index, (query, target) in enumerate(matches):
            assert query.dtype == target.dtype == torch.int64
            logits, boxes = out["pred_logits"][index], out["pred_boxes"][index]
            expected = best_match(logits, boxes, targets[index], *costs)
            assert list(zip(query.tolist(), target.tolist(), strict=True)) == expected


def test_match_of_more_targets_than_queries():
    out, targets = predictions(1, queries=2), objects(4)
    ((query, target),) = hungarian_match(out, targets)
    found = list(zip(query.tolist(), target.tolist(), strict=True))
    assert found == best_match(out["pred_logits"][0], out["pred_boxes"][0], targets[0])
    assert DETRLoss(CLASSES)(out, targets).isfinite()


def test_match_needs_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="hungarian_match needs SciPy; run: pip install scipy"):
        hungarian_match(predictions(), objects(1, 1))


def test_match_of_nothing_finite():
    out = predictions(1)
    out["pred_boxes"] = out["pred_boxes"] * math.nan
    with pytest.raises(ValueError, match="must be finite"):
        hungarian_match(out, objects(2))


# The loss.


def plain_terms(out, targets, no_object=0.1, *costs):
    """Pair by pair; class, l1, giou without weights."""
    number = max(1, sum(len(target["labels"]) for target in targets))
    entropy = weights = distance = overlap = torch.zeros((), dtype=torch.float64)
    for logits, boxes, target in zip(out["pred_logits"], out["pred_boxes"], targets, strict=True):
        wanted = dict(best_match(logits, boxes, target, *costs))
        for query in range(len(boxes)):
            label = target["labels"][wanted[query]] if query in wanted else CLASSES
            weight = 1 if query in wanted else no_object
            entropy = entropy - weight * logits[query].log_softmax(-1)[label]
            weights = weights + weight
            if query in wanted:
                goal = target["boxes"][wanted[query]]
                distance = distance + (boxes[query] - goal).abs().sum()
                pair = torch.stack(corners(boxes[query])), torch.stack(corners(goal))
                overlap = overlap + 1 - generalized_box_iou(pair[0][None], pair[1][None]).squeeze()
    return entropy / weights, distance / number, overlap / number


@pytest.mark.parametrize("numbers", [(2, 3), (0, 1), (0, 0)])
def test_loss_pair_by_pair(numbers):
    out, targets = predictions(layers=3), objects(*numbers)
    leaves = [tensor for answer in answers_of(out) for tensor in (answer["pred_logits"], answer["pred_boxes"])]
    expected = torch.zeros((), dtype=torch.float64)
    terms = DETRLoss(CLASSES).terms(out, targets)
    assert len(terms) == 9
    for suffix, answer in zip(("_0", "_1", ""), answers_of(out), strict=True):
        parts = [weight * term for weight, term in zip((1, 5, 2), plain_terms(answer, targets), strict=True)]
        for name, part in zip(("class", "l1", "giou"), parts, strict=True):
            torch.testing.assert_close(terms[name + suffix], part)
        expected = expected + sum(parts)
    loss = DETRLoss(CLASSES)(out, targets)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), wanted)


def test_weights_of_the_loss():
    out, targets = predictions(), objects(2, 1)
    base = DETRLoss(CLASSES).terms(out, targets)
    more = DETRLoss(CLASSES, class_weight=2, l1_weight=10, giou_weight=4).terms(out, targets)  # the same matching
    for name, term in base.items():
        torch.testing.assert_close(more[name], 2 * term)
    other = DETRLoss(CLASSES, no_object_weight=1).terms(out, targets)
    torch.testing.assert_close(other["class"], plain_terms(out, targets, 1)[0])
    by_class = DETRLoss(CLASSES, l1_weight=0.01, giou_weight=0.01).terms(out, targets)
    expected = plain_terms(out, targets, 0.1, 1, 0.01, 0.01)
    assert not torch.isclose(expected[0], base["class"])  # another matching
    torch.testing.assert_close(by_class["class"], expected[0])
    torch.testing.assert_close(by_class["l1"], 0.01 * expected[1])


def test_loss_does_not_mind_the_order():
    out, targets = predictions(), objects(4, 2)
    loss = DETRLoss(CLASSES)(out, targets)
    shuffled = [{name: tensor.flip(0) for name, tensor in target.items()} for target in targets]
    torch.testing.assert_close(DETRLoss(CLASSES)(out, shuffled), loss)
    order = torch.randperm(QUERIES)
    moved = {name: tensor[:, order] for name, tensor in out.items()}
    torch.testing.assert_close(DETRLoss(CLASSES)(moved, targets), loss)


def test_loss_of_the_right_answer():
    targets = objects(2, 3)
    logits = torch.full((2, QUERIES, CLASSES + 1), -30.0, dtype=torch.float64)
    boxes = torch.rand(2, QUERIES, 4, dtype=torch.float64)
    logits[:, :, CLASSES] = 30
    for index, target in enumerate(targets):
        for place, label in enumerate(target["labels"]):
            logits[index, -1 - place, CLASSES] = -30
            logits[index, -1 - place, label] = 30
            boxes[index, -1 - place] = target["boxes"][place]
    assert DETRLoss(CLASSES)({"pred_logits": logits, "pred_boxes": boxes}, targets) < 1e-9


def test_no_boxes_anywhere():
    """Every query shall say "no object"; the boxes have a gradient, of zeros."""
    out, targets = predictions(), objects(0, 0)
    terms = DETRLoss(CLASSES).terms(out, targets)
    assert terms["l1"] == terms["giou"] == 0
    torch.testing.assert_close(terms["class"], -out["pred_logits"].log_softmax(-1)[..., CLASSES].mean())
    grads = torch.autograd.grad(DETRLoss(CLASSES)(out, targets), list(out.values()))
    assert not grads[1].any()
    assert grads[0].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_in_float32(dtype):
    out, targets = predictions(dtype=dtype), objects(2, 1, dtype=torch.float32)
    wide = {name: tensor.double() for name, tensor in out.items()}
    loss = DETRLoss(CLASSES)(out, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), DETRLoss(CLASSES)(wide, targets), rtol=1e-5, atol=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(out.values())))


# Training.


@pytest.mark.parametrize("numbers", [(2, 1), (0, 0)])
def test_a_step_lowers_the_loss(numbers):
    torch.manual_seed(0)
    model, criterion = small(), DETRLoss(CLASSES)
    x, targets = torch.randn(2, 3, 32, 32), objects(*numbers, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = criterion(model(x), targets)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert criterion(model(x), targets) < loss


def test_learns_a_square():
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 64, 64)
    image[:, 1, 10:34, 24:56] = 1
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[40 / 64, 22 / 64, 32 / 64, 24 / 64]])}]
    model, criterion = small(), DETRLoss(CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = criterion(model(image), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    (found,) = model.postprocess(model(image), [(64, 64)])
    best = found["scores"].argmax()
    assert found["scores"][best] > 0.5
    assert found["labels"][best] == 1
    square = torch.tensor([[24.0, 10, 56, 34]])
    assert generalized_box_iou(found["boxes"][best : best + 1], square) > 0.5


def test_postprocess():
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 0.2]]]).repeat(2, 1, 1)
    logits = torch.tensor([[[0.0, 2, 1, 9], [3, 0, 0, 0]]]).repeat(2, 1, 1).requires_grad_()
    out = {"pred_logits": logits, "pred_boxes": boxes}
    for sizes in (torch.tensor([[100, 200], [10, 40]]), [(100, 200), (10, 40)]):
        first, second = DETR.postprocess(out, sizes)
        torch.testing.assert_close(first["boxes"], torch.tensor([[0.0, 0, 200, 100], [0, 40, 100, 60]]))
        torch.testing.assert_close(second["boxes"], torch.tensor([[0.0, 0, 40, 10], [0, 4, 20, 6]]))
        assert first["labels"].tolist() == [1, 0]
        torch.testing.assert_close(first["scores"], logits[0].softmax(-1)[[0, 1], [1, 0]].detach())
        assert not first["scores"].requires_grad
    exact = DETR.postprocess(out, [(1000, 2000), (10, 40)])[0]["boxes"]
    rough = {name: tensor.bfloat16() for name, tensor in out.items()}  # which holds 0.2 to half a thousandth
    torch.testing.assert_close(DETR.postprocess(rough, [(1000, 2000), (10, 40)])[0]["boxes"], exact, rtol=0, atol=0.5)
    with pytest.raises(ValueError, match=r"sizes must be \(B, 2\) with B = 2, got \(1, 2\)"):
        DETR.postprocess(out, [(100, 200)])


# Where it runs.


def test_runs_everywhere():
    assert_runs_everywhere(Joined(small(encoder_layers=1)), torch.randn(2, 3, 32, 32))


def test_padded_runs_everywhere():
    mask = padding((16, 24), (8, 20))
    assert_runs_everywhere(Joined(on_patches(encoder_layers=1), mask), torch.randn(2, 3, 16, 24))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DETR(0), "num_classes must be a positive integer, got 0"),
        (lambda: DETR(3, 0), "num_queries must be a positive integer, got 0"),
        (lambda: small(decoder_layers=0), "decoder_layers must be a positive integer, got 0"),
        (lambda: small(dim=18), "dim must be a multiple of 4, got 18"),
        (lambda: small(num_heads=3), "embed_dim must be divisible by num_heads"),
        (lambda: small(dropout=2), "dropout must be a number from 0 to 1"),
        (lambda: small(backbone=patches()), "come together, got backbone_channels=None"),
        (lambda: small(backbone_channels=6), "come together, got backbone_channels=6"),
        (lambda: small(backbone=patches(), backbone_channels=0), "backbone_channels must be a positive integer"),
        (lambda: DETRLoss(0), "num_classes must be a positive integer, got 0"),
        (lambda: DETRLoss(3, giou_weight=-1), "giou_weight must be a positive number, got -1"),
        (lambda: DETRLoss(3, no_object_weight=0), "no_object_weight must be a positive number, got 0"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("x", "mask", "error", "words"),
    [
        (torch.zeros(3, 16, 16), None, ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (torch.zeros(1, 3, 16, 16).half(), None, TypeError, "x must have the dtype of the module"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16), TypeError, "mask must be a bool tensor, got torch.float32"),
        (torch.zeros(1, 3, 16, 16), [[True]], TypeError, "mask must be a bool tensor, got list"),
        (torch.zeros(1, 3, 16, 16), padding((4, 4)), ValueError, r"mask must be \(1, 16, 16\) on cpu, got \(1, 16, 24"),
    ],
)
def test_refuses_at_call(x, mask, error, words):
    with pytest.raises(error, match=words):
        on_patches()(x, mask)


def test_refuses_another_map():
    model = small(backbone=patches(), backbone_channels=7)
    with pytest.raises(ValueError, match=r"the backbone's map must be \(B, C, h, w\) with C = 7, got \(1, 6, 4, 4\)"):
        model(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda targets: targets[:1], "targets must be one for each image, 2, and at least one, got 1"),
        (lambda targets: [targets[0], {**targets[1], "labels": torch.tensor([3])}], "labels must be from 0 to 2"),
        (lambda targets: [targets[0], {**targets[1], "labels": torch.tensor([-1])}], "labels must be from 0 to 2"),
        (lambda targets: [targets[0], {**targets[1], "labels": torch.tensor([1, 1])}], r"got \(2,\), \(1, 4\)"),
        (lambda targets: [targets[0], {**targets[1], "boxes": torch.rand(4)}], r"got \(1,\), \(4,\)"),
        (lambda targets: [{**targets[0], "boxes": targets[0]["boxes"] * 64}, targets[1]], "from 0 to 1, not pixels"),
    ],
)
def test_loss_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        DETRLoss(CLASSES)(predictions(), change(objects(2, 1)))


def test_loss_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match=r"with num_classes \+ 1 = 3, got \(2, 5, 4\)"):
        DETRLoss(2)(predictions(), objects(1, 1))


def of_patches(**options):
    options = {"dim": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1, **options}
    return DETR(5, 7, backbone=nn.Conv2d(3, 8, 16, 16), backbone_channels=8, **options)


def test_weights_that_are_assigned():
    """Positions follow the weights: from a model without memory, and in another dtype."""
    image = torch.randn(1, 3, 64, 64)
    expected = of_patches().eval()
    with torch.device("meta"):
        model = of_patches().eval()
    model.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(model(image)["pred_boxes"], expected(image)["pred_boxes"])
    model.load_state_dict({key: tensor.bfloat16() for key, tensor in expected.state_dict().items()}, assign=True)
    assert model(image.bfloat16())["pred_boxes"].dtype == torch.bfloat16


def test_exports_for_any_batch():
    batch = torch.export.Dim("batch")
    image = torch.randn(3, 3, 64, 64)
    model = of_patches(aux=False).eval()
    program = torch.export.export(model, (image[:2],), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(image), model(image))


def test_a_backbone_with_several_maps():
    class Maps(nn.Module):
        def forward(self, x):
            return {"0": x}

    model = of_patches()
    model.backbone = Maps()
    with pytest.raises(TypeError, match="the backbone must return one map, a tensor, got dict"):
        model(torch.randn(1, 3, 64, 64))


def test_large_boxes_in_16_bits():
    boxes = torch.tensor([[0.0, 0, 300, 300]]).half()
    assert generalized_box_iou(boxes, boxes).item() == 1


@pytest.mark.parametrize("key", ["pred_logits", "pred_boxes"])
def test_predictions_that_are_not_finite(key):
    out = of_patches()(torch.randn(1, 3, 64, 64))
    out[key] = out[key] * torch.nan
    targets = [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}]
    with pytest.raises(ValueError, match="pred_logits and pred_boxes must be finite"):
        DETRLoss(5)(out, targets)
    targets[0]["boxes"][0, 2] = torch.nan
    with pytest.raises(ValueError, match="boxes must be from 0 to 1"):
        DETRLoss(5)(out, targets)
