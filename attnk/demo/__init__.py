"""What `python -m attnk demo` runs: accuracy, a picture and a stopwatch, all on real images and without a download.

1. `digits`: a small network on real handwritten digits, without attention and with seven kinds of it, several seeds.
2. `photographs`: a small VGG learns on two photographs which way is up, looking through six kinds of attention; what
   each looks at is drawn over the photographs.
3. `stopwatch`: the tutorials' spatial attention against `attnk.SpatialAttention`: the same result, two times.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import torch

from attnk.demo.digits import compare_on_digits
from attnk.demo.photographs import draw_attention
from attnk.demo.stopwatch import time_both


def main(quick: bool = False, out: pathlib.Path = pathlib.Path("out")) -> dict:
    """Run the three parts of the demo, print their results and write one picture.

    Args:
        quick: Fewer seeds, steps and shapes: seconds in place of minutes, and results to match.
        out: Folder for `attention.png`; made if absent.

    Returns:
        The numbers printed: `digits` (what `compare_on_digits` returns), `photographs` (what `draw_attention` does),
        `timing` (what `time_both` does), `device` and `threads`.

    Raises:
        SystemExit: If scikit-learn, matplotlib or tqdm is missing.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise SystemExit(f'The demo needs {error.name}, which is missing; run: pip install "attnk[demo]"') from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"attnk demo on {name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    with torch.random.fork_rng():  # the caller's random state stays as it was
        with _one_thread():
            digits = compare_on_digits(quick, device)
            photographs = draw_attention(quick, device, out)
        timing = time_both(quick, device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "digits": digits,
        "photographs": photographs,
        "timing": timing,
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: work this small only loses by sharing, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
