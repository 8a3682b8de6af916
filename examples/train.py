"""Train one of attnk's networks on scikit-learn's digits, or on a folder of pictures.

    python examples/train.py vit --epochs 5 --out out/vit
    python examples/train.py vgg16_with_attention --data ~/pictures --size full --device cuda --autocast
    python examples/train.py vit --compare  # times the tutorials' network beside attnk's

Writes checkpoint.pt, log.csv and curve.png to --out. Ctrl-C stops after the step at work; --resume goes on from there
to the losses of a run that was never interrupted, to the bit on a CPU. Without --resume a run begins anew.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import itertools
import os
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, random_split

import attnk
from attnk import dispatch, models
from attnk.testing import published

try:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"train.py needs {error.name}: pip install numpy scikit-learn matplotlib tqdm")

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COLUMNS = ("epoch", "step", "loss", "accuracy", "validation", "seconds")
MAY_CHANGE = ("compare", "device", "out", "resume", "workers")  # options that a resumed run need not share
ROUNDS, WARM_UP = 15, 3  # steps of each network that --compare times, and before that


class CBAMNet(nn.Module):
    """Three times convolution, batch norm, ReLU, CBAM and pooling; then the mean over the pixels, and a linear layer.

    Args:
        num_classes: how many logits.
        width: channels of the first block, at least 16 with the tutorials' CBAM; the others have 2 and 4 times as many.
        attention: from channels to a module.
        compat: None or "original", as the other networks have it; both compute the same.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: int = 64,
        attention: Callable[[int], nn.Module] = attnk.CBAM,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [attention(outputs), nn.MaxPool2d(2)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.features(x).mean((2, 3)))


def published_senet(num_classes: int = 1000, reduction: int = 16) -> nn.Module:
    """attnk's ``SENet`` with the tutorials' SELayer; the tutorials' SENet takes pictures up to 2 x 2 alone."""
    model = models.SENet(num_classes, reduction)
    model.se = published.SELayer(model.conv1.out_channels, reduction)
    return model


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        make: attnk's, of real size by default; takes num_classes.
        small: options for small pictures.
        lr: learning rate for them.
        published: the tutorials', with the same options and keys.
        compat: whether it has ``compat="original"``.
        sized: whether it wants image_size.
    """

    make: Callable[..., nn.Module]
    small: dict[str, Any]
    lr: float
    published: Callable[..., nn.Module] | None = None
    compat: bool = False
    sized: bool = False


SWIN = {"embed_dim": 64, "depths": (2, 2), "num_heads": (4, 8), "window_size": 4}
VIT = {"patch_size": 4, "dim": 64, "depth": 4, "num_heads": 4}
VGG, SPATIAL_VGG = models.vgg16_with_attention, models.vgg16_with_spatial_attention
RESNET, RESNET_SIZES = models.resnet50_with_attention, {"layers": (1, 1, 1, 1), "width": 16}
NETWORKS = {
    "axial_resnet26": Network(models.axial_resnet26, {"width": 16, "num_heads": 4}, 3e-3, sized=True),
    "cbam": Network(CBAMNet, {"width": 16}, 3e-3, partial(CBAMNet, attention=published.CBAM), compat=True),
    "resnet50_with_attention": Network(RESNET, RESNET_SIZES, 1e-3, sized=True),
    "senet": Network(models.SENet, {}, 3e-2, published_senet),
    "swin_tiny": Network(models.swin_tiny, SWIN, 1e-3),
    "vgg16_with_attention": Network(VGG, {"width": 8}, 3e-4, published.VGG16WithAttention, True),
    "vgg16_with_spatial_attention": Network(SPATIAL_VGG, {"width": 8}, 1e-3, published.VGG16WithSpatialAttention, True),
    "vit": Network(models.ViT, VIT, 2e-3, published.ViT, True, sized=True),
}


# Pictures: tensors (3, side, side) from -1 to 1, and numbers of classes.


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits of 8 x 8, enlarged."""

    classes = tuple("0123456789")

    def __init__(self, side: int) -> None:
        self.side = side
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 1, 8, 8) / 8 - 1
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = F.interpolate(self.images[index], (self.side, self.side), mode="bilinear")[0]
        return image.expand(3, -1, -1), self.labels[index]


class Folder(Dataset):
    """The pictures in the sub-folders of a folder, each of which is a class, resized and cropped to their middle."""

    def __init__(self, path: pathlib.Path, side: int) -> None:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder")
        self.side = side
        self.classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        self.files = [
            (file, number)
            for number, name in enumerate(self.classes)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in ENDINGS
        ]
        found = len({number for _, number in self.files})
        if found < 2 or found < len(self.classes):
            raise ValueError(
                f"{path} must have a sub-folder with pictures for each of two or more classes, such as "
                f"{path}/cat/1.png and {path}/dog/1.png; looked for {', '.join(ENDINGS)} and found {len(self.files)} "
                f"pictures in {len(self.classes)} sub-folders"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, number = self.files[index]
        with Image.open(file) as image:
            scale = self.side / min(image.size)
            size = [max(self.side, round(side * scale)) for side in image.size]
            left, top = ((side - self.side) // 2 for side in size)
            image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            pixels = np.array(image.crop((left, top, left + self.side, top + self.side)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, number


def pictures(args: argparse.Namespace) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """What to learn from, what to check with, and the names of the classes.

    Raises:
        ValueError: a folder that is not as it must be, nothing left for one of the two.
    """
    whole: Digits | Folder
    if args.data == "digits":
        whole = Digits(args.image_size)
    else:
        path = pathlib.Path(args.data).expanduser()
        if (path / "train").is_dir() and (path / "val").is_dir():
            learn, check = (Folder(path / part, args.image_size) for part in ("train", "val"))
            if learn.classes != check.classes:
                raise ValueError(f"{path}/train has the classes {learn.classes}, {path}/val {check.classes}")
            return learn, check, learn.classes
        whole = Folder(path, args.image_size)
    checks = round(args.validation * len(whole))
    if not 0 < checks < len(whole):
        raise ValueError(f"--validation {args.validation} of {len(whole)} pictures leaves none to check or to learn")
    parts: list[Subset] = random_split(  # the same two for every --seed
        whole, [len(whole) - checks, checks], generator=torch.Generator().manual_seed(0)
    )
    return parts[0], parts[1], whole.classes


def batches(dataset: Dataset, rows: list[int], args: argparse.Namespace) -> DataLoader:
    """Pictures and labels of these rows; with a generator of its own, which leaves the run's random numbers alone."""
    parts = [rows[first : first + args.batch] for first in range(0, len(rows), args.batch)]
    return DataLoader(dataset, batch_sampler=parts, num_workers=args.workers, generator=torch.Generator())


# Steps


class Step:
    """Forward, loss, backward and optimizer of a model, which is moved to the device."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.model = model.to(args.device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        self._args = args
        self._call = torch.compile(model) if args.compile else model

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast(self._args.device.type, torch.bfloat16, enabled=self._args.autocast):
            return self._call(x).float()

    def __call__(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The loss, and the share of the batch that was right."""
        logits = self.logits(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()

    @torch.no_grad()
    def accuracy(self, dataset: Dataset) -> float:
        """The share of these pictures that is right."""
        self.model.eval()
        loader = batches(dataset, list(range(len(dataset))), self._args)
        right = [self.logits(x.to(self._args.device)).argmax(1).cpu() == y for x, y in loader]
        self.model.train()
        return torch.cat(right).float().mean().item()


def peak_memory(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What work returns, and the MiB allocated at once meanwhile above those allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return result, max(held, default=0) / 2**20


def compare(args: argparse.Namespace, options: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Any]:
    """Time a training step of the tutorials' network and of attnk's, of the same weights, in turn; print and return."""
    network = NETWORKS[args.model]
    if network.published is None:
        print(f"{args.model}: the tutorials have no code of it, so there is nothing to compare with")
        return {}
    theirs = network.published(**options)
    ours = network.make(**options, **({"compat": "original"} if network.compat else {}))
    ours.load_state_dict(theirs.state_dict())
    steps = {"the tutorials'": Step(theirs, args), "attnk's": Step(ours, args)}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(-WARM_UP, ROUNDS):
        for key in sorted(steps, reverse=turn % 2 == 1):  # take turns at going first
            start = time.perf_counter()
            steps[key](x, y)
            if turn >= 0:
                seconds[key].append(time.perf_counter() - start)
    times = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
    memory = {key: peak_memory(partial(step, x, y), args.device)[1] for key, step in steps.items()}
    print(
        f"{args.model}, a training step of {len(x)} pictures of {args.image_size} x {args.image_size} on {args.device}"
    )
    for key in steps:
        print(f"  {key:15s}{times[key]:9.2f} ms{memory[key]:9.1f} MiB at most, besides weights and optimizer")
    speed, share = (figures["the tutorials'"] / figures["attnk's"] for figures in (times, memory))
    print(f"  {'ratio':15s}{speed:9.2f}   {share:9.2f}")
    return {"ms": times, "mib": memory}


# A run


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, so that the step at work can be finished; pressed again, it stops at once."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def read_log(path: pathlib.Path, last: int) -> list[dict[str, Any]]:
    """The rows of a CSV up to a step: a run that was killed has written more than its checkpoint knows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= last]


def train(model: nn.Module, args: argparse.Namespace, learn: Dataset, check: Dataset, state: dict) -> dict[str, Any]:
    """Train, from a checkpoint's state unless it is empty; print and return the figures."""
    step = Step(model, args)
    size = min(args.batch, len(learn))
    epoch_steps = len(learn) // size  # what is left over has its turn in another epoch
    total = args.epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(step.optimizer, args.lr, total, cycle_momentum=False)
    parts = {"model": model, "optimizer": step.optimizer, "schedule": schedule}
    done, spent = state.get("step", 0), state.get("seconds", 0.0)
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def save() -> None:
        """Write the checkpoint, whole or not at all."""
        random = {"random": torch.get_rng_state(), "random_cuda": torch.cuda.get_rng_state_all()}
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, **random, "step": done, "seconds": spent, "options": told(args)}, args.out / "part")
        os.replace(args.out / "part", args.out / "checkpoint.pt")

    rows = read_log(args.out / "log.csv", done) if state else []
    seconds, peak = [], None
    with ctrl_c() as stopped, (args.out / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        bar = tqdm(total=total, initial=done, desc=args.model, unit="step", disable=None)
        while done < total and not stopped():
            epoch, begun = divmod(done, epoch_steps)
            # drawn at once from the epoch's number: a run that begins in the middle of it draws the same
            chance = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            chosen = slice(begun * size, epoch_steps * size)
            order = torch.randperm(len(learn), generator=chance)[chosen]
            turned = torch.rand(len(learn), generator=chance)[chosen] < 0.5 * (args.data != "digits")
            loader = batches(learn, order.tolist(), args)
            for (x, y), turn in zip(loader, turned.split(size), strict=True):
                x = torch.where(turn.view(-1, 1, 1, 1), x.flip(3), x).to(args.device)
                start = time.perf_counter()
                work = partial(step, x, y.to(args.device))
                if done + 1 == total:  # where memory is counted, which takes its time
                    (loss, right), peak = peak_memory(work, args.device)
                else:
                    loss, right = work()
                    seconds.append(time.perf_counter() - start)
                spent += time.perf_counter() - start
                schedule.step()
                done += 1
                ends = done % epoch_steps == 0
                values = (epoch + 1, done, loss, right, step.accuracy(check) if ends else "", spent)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                writer.writerow(rows[-1])
                file.flush()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if ends or stopped():
                    save()
                if stopped():
                    break
        bar.close()
    draw(rows, epoch_steps, args)
    checked = [100 * float(row["validation"]) for row in rows if row["validation"] != ""]
    ms = 1e3 * statistics.median(seconds) if seconds else None
    print(f"{args.model}, {attnk.count_parameters(model):,} parameters: {done} of {total} steps")
    for known, words in (
        (checked, lambda: f"{checked[-1]:.1f} % of {len(check)} pictures held back are right"),
        (ms, lambda: f"{ms:.2f} ms a step of {size} pictures on {args.device}"),
        (peak, lambda: f"{peak:.1f} MiB at most in a step, besides weights and optimizer"),
        (done < total, lambda: "stopped; --resume goes on from here"),
    ):
        if known:
            print(f"  {words()}")
    print(f"  wrote checkpoint.pt, log.csv and curve.png to {args.out}")
    return {"rows": rows, "accuracy": checked[-1] if checked else None, "ms": ms, "mib": peak}


def draw(rows: list[dict[str, Any]], epoch_steps: int, args: argparse.Namespace) -> None:
    """Loss and accuracy over the epochs, as curve.png."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window, whatever the system
    axes = figure.subplots(1, 2)
    epochs = [int(row["step"]) / epoch_steps for row in rows]
    half = min(epoch_steps, len(rows) // 10) // 2
    for axis, key, label, scale in zip(axes, ("loss", "accuracy"), ("loss", "accuracy, %"), (1, 100), strict=True):
        values = [scale * float(row[key]) for row in rows]
        smooth = [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]
        axis.plot(epochs, values, color="0.8", linewidth=0.8, label="each batch")
        axis.plot(epochs, smooth, color="tab:blue", label=f"mean of {2 * half + 1} batches")
        axis.set(xlabel="epoch", ylabel=label, ylim=(0, 102 if scale == 100 else None))
        axis.grid(alpha=0.3)
    ends = [row for row in rows if row["validation"] != ""]
    checked = [100 * float(row["validation"]) for row in ends]
    axes[1].plot([int(row["epoch"]) for row in ends], checked, "o-", color="tab:orange", label="pictures held back")
    for axis in axes:
        axis.legend(frameon=False)
    how = f"{args.model}{' as published' if args.compat else ''} on {args.data}"
    figure.suptitle(f"{how}: {checked[-1]:.1f} % right" if checked else how)
    figure.savefig(args.out / "curve.png", dpi=110)


# The command line


def option(text: str) -> tuple[str, Any]:
    """``name=value``, a Python value or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    with contextlib.suppress(SyntaxError, ValueError):
        return name, ast.literal_eval(value)
    return name, value


def count(text: str) -> int:
    """A positive whole number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def told(args: argparse.Namespace) -> dict[str, str]:
    """The options that make a run what it is."""
    return {key: str(value) for key, value in vars(args).items() if key not in MAY_CHANGE}


def parser() -> argparse.ArgumentParser:
    """All options; ``--help`` tells them."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("model", choices=NETWORKS)
    add("--data", default="digits", help="digits, or a folder: of a sub-folder of pictures for each class, or of "
        "train/ and val/ with these")  # fmt: skip
    add("--validation", type=float, default=0.2, help="share of the pictures not to learn from (0.2)")
    add("--size", choices=("small", "full"), default="small", help="small: an epoch on digits takes a CPU seconds")
    add("--image-size", type=count, help="side of the pictures (small: 32, full: 224)")
    add("--options", type=option, nargs="+", default=[], metavar="NAME=VALUE", help="of the network, as width=16")
    add("--compat", choices=("original",), help="the network as published, bugs included")
    add("--epochs", type=count, default=5)
    add("--batch", type=count, default=32)
    add("--lr", type=float, help="highest learning rate of the schedule, one cycle (by network)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto: the GPU where there is one")
    add("--autocast", action="store_true", help="bfloat16 by autocast")
    add("--compile", action="store_true", help="by torch.compile")
    add("--backend", choices=dispatch.BACKENDS, default="auto", help="of attnk's operations")
    add("--workers", type=int, default=0, help="processes that read pictures (0)")
    add("--out", type=pathlib.Path, help="folder to write to (out/MODEL)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--compare", action="store_true", help="time the tutorials' network beside attnk's, in place of training")
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns the figures that are printed.

    Raises:
        SystemExit: arguments, pictures or a checkpoint that are not as they must be; says what to change.
    """
    parse = parser()
    args = parse.parse_args(argv)
    args.image_size = args.image_size or (32 if args.size == "small" else 224)
    args.out = args.out or pathlib.Path("out") / args.model
    network, checkpoint = NETWORKS[args.model], args.out / "checkpoint.pt"
    args.lr = network.lr if args.lr is None else args.lr
    if args.compat and not network.compat:
        parse.error(f"{args.model} has no --compat original")
    state: dict[str, Any] = {}
    if args.resume:
        if not checkpoint.exists():
            parse.error(f"nothing to resume: there is no {checkpoint}")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for key, value in told(args).items():
            if state["options"][key] != value:
                parse.error(f"{checkpoint} was written with {key} {state['options'][key]}, not {value}")
    torch.manual_seed(args.seed)
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        args.device = torch.device(automatic if args.device == "auto" else args.device)
        torch.zeros(1, device=args.device)
        learn, check, classes = pictures(args)
        options: dict[str, Any] = {"num_classes": len(classes), **(network.small if args.size == "small" else {})}
        options |= ({"image_size": args.image_size} if network.sized else {}) | dict(args.options)
        model = network.make(**options, **({"compat": args.compat} if args.compat else {}))
        with torch.no_grad(), dispatch.use_backend(args.backend):
            model.to(args.device).eval()(learn[0][0].unsqueeze(0).to(args.device))
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError, attnk.Unsupported) as error:
        parse.error(str(error).splitlines()[0])
    with dispatch.use_backend(args.backend):
        if args.compare:
            x, y = next(iter(batches(learn, list(range(len(learn))), args)))
            return compare(args, options, x.to(args.device), y.to(args.device))
        args.out.mkdir(parents=True, exist_ok=True)
        return train(model, args, learn, check, state)


if __name__ == "__main__":
    main()
