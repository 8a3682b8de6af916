"""DETR, which finds objects as a set (Carion et al., 2020, https://arxiv.org/abs/2005.12872), and its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk.models.common import check_images
from attnk.modules._checks import check_heads, check_positive, check_shape, check_sizes
from attnk.modules.multihead import MultiheadAttention
from attnk.modules.position import SinusoidalPosition2d

MARGIN = 0.01  # by which boxes may lie outside their image before they are taken for pixels


class DETR(nn.Module):
    """A transformer that reads a backbone's map and answers with a fixed number of boxes and their classes.

    ``memory = encoder(input_proj(backbone(x)))`` and ``states = decoder(queries, memory)``, layers with the norm behind
    the residual, ReLU, and sinusoidal positions that are added to queries and keys of every attention, not to values.
    Each query's last state, normalised, gives logits (``class_embed``, the last one "no object") and a box
    (``sigmoid(bbox_embed)``). A widely copied tutorial says that DETR improves the detection of small objects; the
    paper reports the opposite, and that it is better at large ones.

    Keys: those of facebookresearch/detr, ``transformer.{encoder,decoder}.layers.{i}.*``,
    ``transformer.decoder.norm.*``, ``class_embed.*``, ``bbox_embed.layers.{i}.*``, ``query_embed.weight``,
    ``input_proj.*``; of published weights everything but the backbone loads. The default sizes are those of DETR-R50,
    whose backbone has 2048 channels.

    Args:
        num_classes: classes, numbered from 0; for published weights the largest number and one, 91 for COCO.
        num_queries: how many boxes are found in every image, most of them "no object".
        dim: channels of the tokens, a multiple of 4.
        num_heads: heads; a divisor of ``dim``.
        encoder_layers: how many.
        decoder_layers: how many.
        feedforward_dim: hidden channels of the feed-forward networks.
        dropout: share to drop in training, of the attention weights and in the branches.
        aux: whether the other decoder layers' answers are returned too; training wants them, ``torch.jit.trace`` does
            not take them.
        backbone: a module from images (B, 3, H, W) to a map (B, backbone_channels, h, w). By default four 3 x 3
            convolutions with stride 2, batch norm and ReLU.
        backbone_channels: of its map; to be given with a backbone.

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that is no multiple of 4 or that the heads do not
            divide, a dropout that is no share, a backbone without its channels or channels without a backbone.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 100,
        *,
        dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        aux: bool = True,
        backbone: nn.Module | None = None,
        backbone_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, num_queries=num_queries, feedforward_dim=feedforward_dim)
        check_sizes(encoder_layers=encoder_layers, decoder_layers=decoder_layers)
        check_heads(dim, num_heads)
        if (backbone is None) != (backbone_channels is None):
            raise ValueError(f"backbone and backbone_channels come together, got backbone_channels={backbone_channels}")
        channels = dim if backbone_channels is None else backbone_channels
        check_sizes(backbone_channels=channels)
        self.aux = aux
        self.position = SinusoidalPosition2d(dim, normalize=True)
        self.transformer = _Transformer(dim, num_heads, encoder_layers, decoder_layers, feedforward_dim, dropout)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = _BoxHead(dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(channels, dim, 1)
        self.backbone = _stem(dim) if backbone is None else backbone

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Find objects.

        Args:
            x: images (B, 3, H, W), in the dtype of the weights (under autocast, any float dtype).
            mask: (B, H, W), bool, True where an image is padded to the size of the batch: no token attends there, and
                positions and boxes are relative to what is not padded. What the backbone carries over the edge is seen.

        Returns:
            ``pred_logits`` (B, num_queries, num_classes + 1) and ``pred_boxes`` (B, num_queries, 4), which are centre
            x, centre y, width and height from 0 to 1; with ``aux``, ``aux_outputs``, a list of such dicts, one for each
            decoder layer but the last.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_images(x, self.input_proj.weight)
        features = self.backbone(x)
        if not isinstance(features, torch.Tensor):
            raise TypeError(f"the backbone must return one map, a tensor, got {type(features).__name__}")
        check_shape("the backbone's map", features, "(B, C, h, w)", 1, self.input_proj.in_channels)
        height, width = features.shape[2:]
        padded = None
        if mask is None:
            position = self.position(height, width, like=self.input_proj.weight)
        else:
            _check_mask(mask, x)
            grid = F.interpolate(mask.unsqueeze(1).float(), (height, width)).squeeze(1).bool()
            position, padded = self._padded_position(grid), grid.flatten(1)
        tokens = self.input_proj(features).flatten(2).transpose(1, 2)
        states = self.transformer(tokens, position, padded, self.query_embed.weight, self.aux)
        logits, boxes = self.class_embed(states), self.bbox_embed(states).sigmoid()
        answers = [{"pred_logits": one, "pred_boxes": other} for one, other in zip(logits, boxes, strict=True)]
        return {**answers[-1], "aux_outputs": answers[:-1]} if self.aux else answers[-1]

    def _padded_position(self, padded: torch.Tensor) -> torch.Tensor:
        """``self.position`` of maps padded where a mask (B, h, w) is True, for each image: (B, h w, dim)."""
        weight, seen = self.input_proj.weight, ~padded
        dtype = torch.promote_types(weight.dtype, torch.float32)
        exponents = torch.arange(self.position.dim // 4, device=seen.device, dtype=dtype) / (self.position.dim // 4)
        sides = []
        for axis in (1, 2):
            size = seen.sum(axis, keepdim=True, dtype=dtype)
            place = seen.cumsum(axis).to(dtype) / (size + 1e-6) * self.position.scale
            angle = place.unsqueeze(-1) / self.position.temperature**exponents
            sides.append(torch.stack((angle.sin(), angle.cos()), -1).flatten(-2))
        return torch.cat(sides, -1).flatten(1, 2).to(weight.dtype)

    @staticmethod
    @torch.no_grad()
    def postprocess(
        outputs: Mapping[str, torch.Tensor], sizes: torch.Tensor | Sequence[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """What was found, in pixels, in float32 or wider.

        Args:
            outputs: as ``forward`` returns them.
            sizes: height and width of each image without its padding, (B, 2).

        Returns:
            For each image ``scores`` (num_queries,), the largest probability of a class that is not "no object";
            ``labels`` (num_queries,), which class; ``boxes`` (num_queries, 4), left, top, right and bottom.

        Raises:
            ValueError: other than two sizes for each image.
        """
        scores, labels = _wide(outputs["pred_logits"]).softmax(-1)[..., :-1].max(-1)
        boxes = _corners(_wide(outputs["pred_boxes"]))
        scale = torch.as_tensor(sizes, device=boxes.device, dtype=torch.float32)
        if scale.shape != (len(boxes), 2):
            raise ValueError(f"sizes must be (B, 2) with B = {len(boxes)}, got {tuple(scale.shape)}")
        boxes = boxes * scale.flip(1).repeat(1, 2).unsqueeze(1)
        return [
            {"scores": score, "labels": label, "boxes": box}
            for score, label, box in zip(scores, labels, boxes, strict=True)
        ]

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"aux={self.aux}"


class _Transformer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, encoder_layers: int, decoder_layers: int, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = (dim, num_heads, feedforward_dim, dropout)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_EncoderLayer(*sizes) for _ in range(encoder_layers))})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(_DecoderLayer(*sizes) for _ in range(decoder_layers))})
        self.decoder["norm"] = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        memory: torch.Tensor,
        position: torch.Tensor,
        padded: torch.Tensor | None,
        queries: torch.Tensor,
        every: bool,
    ) -> torch.Tensor:
        """The normalised states of the queries (layers, B, num_queries, dim), of every decoder layer or of the last."""
        for layer in self.encoder["layers"].children():
            memory = layer(memory, position, padded)
        state = torch.zeros_like(queries).expand(memory.shape[0], -1, -1)
        keys, states = memory + position, []
        for layer in self.decoder["layers"].children():
            state = layer(state, queries, memory, keys, padded)
            states.append(state)
        return self.decoder["norm"](torch.stack(states if every else states[-1:]))


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, position: torch.Tensor, padded: torch.Tensor | None) -> torch.Tensor:
        """Tokens (B, N, dim)."""
        placed = x + position
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, padded, need_weights=False)[0]))
        return self.norm2(x + _feed_forward(self, x))


class _DecoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        queries: torch.Tensor,
        memory: torch.Tensor,
        keys: torch.Tensor,
        padded: torch.Tensor | None,
    ) -> torch.Tensor:
        """States of the queries (B, num_queries, dim)."""
        placed = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, need_weights=False)[0]))
        found = self.multihead_attn(x + queries, keys, memory, padded, need_weights=False)[0]
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + _feed_forward(self, x))


def _feed_forward(layer: _EncoderLayer | _DecoderLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.dropout(layer.linear2(layer.dropout(F.relu(layer.linear1(x)))))


class _BoxHead(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, outputs) for outputs in (dim, dim, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Boxes before their sigmoid, (..., 4)."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


def _stem(dim: int) -> nn.Sequential:
    stem = nn.Sequential()
    channels = 3
    for shift in (3, 2, 1, 0):
        outputs = max(1, dim >> shift)
        stem.extend([nn.Conv2d(channels, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)])
        stem.append(nn.ReLU(inplace=True))
        channels = outputs
    return stem


class DETRLoss(nn.Module):
    """Each target is matched to one query, the others shall say "no object" (Carion et al., 2020).

    ``class_weight cross_entropy + l1_weight |box - target| + giou_weight (1 - GIoU)``, the last two summed over the
    matched boxes and divided by the number of targets in this batch, at least 1; with ``aux_outputs`` the sum of that
    over all decoder layers, each with a matching of its own. The weights are those of the matching too.

    Where a batch is spread over processes, each divides by its own number of targets; the published code averages that
    number over them. Its names of the terms are ``loss_ce``, ``loss_bbox`` and ``loss_giou``, of ``no_object_weight``
    ``eos_coef``.

    Args:
        num_classes: the network's.
        class_weight: of the cross entropy.
        l1_weight: of the boxes' absolute differences.
        giou_weight: of the generalised IoU.
        no_object_weight: of "no object" in the cross entropy, against 1 of every class.

    Raises:
        ValueError: a weight that is not positive, ``num_classes`` that is no positive integer.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 1,
        l1_weight: float = 5,
        giou_weight: float = 2,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_positive(class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)
        check_positive(no_object_weight=no_object_weight)
        self.num_classes = num_classes
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.no_object_weight = no_object_weight

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """The loss, a number in float32 or wider: the sum of ``terms``, whose arguments and errors these are."""
        return torch.stack(list(self.terms(outputs, targets).values())).sum()

    def terms(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What the loss is the sum of.

        Args:
            outputs: as ``DETR.forward`` returns them.
            targets: for each image ``labels`` (n,), integers below ``num_classes``, and ``boxes`` (n, 4), centre x,
                centre y, width and height from 0 to 1; n may be 0. Of more targets than queries some are left out.

        Returns:
            ``class``, ``l1`` and ``giou`` of the last layer, ``class_0`` and so on of auxiliary outputs, weighted.

        Raises:
            ValueError: a shape, label or box that does not fit, predictions that are not finite.
            ImportError: SciPy is not installed.
        """
        terms = self._terms(outputs, targets)
        for layer, answer in enumerate(outputs.get("aux_outputs", ())):
            terms.update({f"{name}_{layer}": term for name, term in self._terms(answer, targets).items()})
        return terms

    def _terms(
        self, outputs: Mapping[str, torch.Tensor], targets: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        check_shape("pred_logits", outputs["pred_logits"], "(B, num_queries, num_classes + 1)", 2, self.num_classes + 1)
        matches = hungarian_match(outputs, targets, self.class_weight, self.l1_weight, self.giou_weight)
        logits, boxes = _wide(outputs["pred_logits"]), _wide(outputs["pred_boxes"])
        image = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(matches)])
        query = torch.cat([query for query, _ in matches])
        labels = torch.cat([target["labels"][index] for target, (_, index) in zip(targets, matches, strict=True)])
        wanted = torch.cat([target["boxes"][index] for target, (_, index) in zip(targets, matches, strict=True)])

        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[image, query] = labels.long()
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        boxes, wanted = boxes[image, query], wanted.to(boxes.dtype)
        overlap = generalized_box_iou(_corners(boxes).unsqueeze(1), _corners(wanted).unsqueeze(1))
        number = max(1, sum(len(target["labels"]) for target in targets))
        return {
            "class": self.class_weight * F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight),
            "l1": self.l1_weight * (boxes - wanted).abs().sum() / number,
            "giou": self.giou_weight * (1 - overlap).sum() / number,
        }

    def extra_repr(self) -> str:
        """Options."""
        weights = f"class_weight={self.class_weight}, l1_weight={self.l1_weight}, giou_weight={self.giou_weight}"
        return f"{self.num_classes}, {weights}, no_object_weight={self.no_object_weight}"


@torch.no_grad()
def hungarian_match(
    outputs: Mapping[str, torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    class_cost: float = 1,
    l1_cost: float = 5,
    giou_cost: float = 2,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Match queries and targets, one to one, at the least sum of costs.

    A pair costs ``l1_cost |box - target| - class_cost probability - giou_cost GIoU``, the probability being that of the
    target's class.

    Args:
        outputs: ``pred_logits`` (B, num_queries, num_classes + 1) and ``pred_boxes`` (B, num_queries, 4).
        targets: as ``DETRLoss.terms`` takes them.
        class_cost, l1_cost, giou_cost: what each of the three weighs.

    Returns:
        For each image the numbers of queries, in order, and of their targets: two int64 tensors of
        min(num_queries, n) elements, where the outputs lie.

    Raises:
        ValueError: a shape, label or box that does not fit, predictions that are not finite.
        ImportError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("hungarian_match needs SciPy; run: pip install scipy") from error
    logits, boxes = _wide(outputs["pred_logits"]), _wide(outputs["pred_boxes"])
    labels, wanted = _checked_targets(targets, *logits.shape[::2])
    wanted = wanted.to(boxes.dtype)
    probability = logits.softmax(-1)[..., labels]
    distance = (boxes.unsqueeze(2) - wanted).abs().sum(-1)
    overlap = generalized_box_iou(_corners(boxes), _corners(wanted))
    cost = l1_cost * distance - class_cost * probability - giou_cost * overlap
    cost = cost.cpu()
    if not cost.isfinite().all():
        raise ValueError("pred_logits and pred_boxes must be finite")
    parts = cost.split([len(target["labels"]) for target in targets], -1)
    pairs = [linear_sum_assignment(part[image].numpy()) for image, part in enumerate(parts)]
    return [(torch.from_numpy(q).to(boxes.device), torch.from_numpy(t).to(boxes.device)) for q, t in pairs]


def generalized_box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al., 2019, https://arxiv.org/abs/1902.09630) of each box with each other.

    ``IoU - (hull - union) / hull``, areas of the smallest box around both and of their union: 1 for equal boxes, down
    to -1 for distant ones. Boxes without an area give no NaN: what would be divided by 0 is 0.

    Args:
        boxes: (..., N, 4), left, top, right and bottom, with left <= right and top <= bottom.
        others: (..., M, 4), alike.

    Returns:
        (..., N, M), in float32 or wider: the area of a box in pixels may exceed float16.

    Raises:
        ValueError: boxes that have other than 4 numbers.
    """
    if min(boxes.dim(), others.dim()) < 2 or boxes.shape[-1] != 4 or others.shape[-1] != 4:
        raise ValueError(f"boxes must be (..., N, 4) and (..., M, 4), got {tuple(boxes.shape)}, {tuple(others.shape)}")
    one, other = _wide(boxes).unsqueeze(-2), _wide(others).unsqueeze(-3)
    inner = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    outer = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    shared, hull = inner.clamp(min=0).prod(-1), outer.prod(-1)
    union = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - shared
    return shared / torch.where(union > 0, union, 1) - (hull - union) / torch.where(hull > 0, hull, 1)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """Left, top, right and bottom of boxes given by centre, width and height."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    needed = (x.shape[0], *x.shape[2:])
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != needed or mask.device != x.device:
        raise ValueError(f"mask must be {needed} on {x.device}, got {tuple(mask.shape)} on {mask.device}")


def _checked_targets(
    targets: Sequence[Mapping[str, torch.Tensor]], batch: int, channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (n,) and boxes (n, 4) of all images."""
    if len(targets) != batch or not batch:
        raise ValueError(f"targets must be one for each image, {batch}, and at least one, got {len(targets)}")
    for target in targets:
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or boxes.shape != (len(labels), 4):
            raise ValueError(f"labels and boxes must be (n,), (n, 4), got {tuple(labels.shape)}, {tuple(boxes.shape)}")
    labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    if ((labels < 0) | (labels >= channels - 1)).any():
        raise ValueError(f"labels must be from 0 to {channels - 2}, got {labels.min()} to {labels.max()}")
    if not ((boxes >= -MARGIN) & (boxes <= 1 + MARGIN)).all():  # also finds NaN
        raise ValueError(f"boxes must be from 0 to 1, not pixels, got {boxes.min():.4g} to {boxes.max():.4g}")
    return labels.long(), boxes
