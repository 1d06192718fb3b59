"""Gradient steps a second of this package and of other libraries, from drawing the batch to the update of the targets.

``python tests/benchmarks/bench.py`` measures beside the libraries that are installed; ``--help`` has the options.
"""

import io
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from contestants import PEERS, Maker, Size, dataset_of, installed, makers, ours
from interleaved import Steps, Timing, now, timings

from iql_plugins import _compat, checkpoint
from iql_plugins.cli.errors import UserError, imported
from iql_plugins.cli.output import Result, captured_stdout, json_text, show, table
from iql_plugins.cli.train import device_name

REFERENCE, PEAK = "iql-plugins", "matrix products"
#: Rows and columns of the matrices by which the peak of a machine is measured, by the type of the device: so many that
#: what a call costs beside the product counts little.
SIDES = {"cpu": 512, "cuda": 4096}
#: Steps in a round, by the type of the device: on a GPU they are short.
STEPS = {"cuda": 1000}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures gradient steps a second, of this package and of other libraries side by side."""

    peers: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME|FILE ...]")] = None
    """Libraries to measure beside it, by name (plain, torchrl, d3rlpy, sb3-sac, jax) or as Python files; by default
    those that are installed, and none after a bare --peers."""
    adapters: tuple[str, ...] = ()
    """Further adapters to measure, beside the one for plain tensors."""
    size: Annotated[Size, tyro.conf.arg(name="")] = field(default_factory=Size)
    rounds: int = 9
    """How often each is measured; rounds are interleaved."""
    steps: int | Literal["auto"] = "auto"
    """Gradient steps in a round: many, so that what a library does once in a call counts little; auto takes 200, on a
    GPU 1000."""
    device: str = "auto"
    """Torch's name of the device; auto takes the GPU if there is one. There, CUDA graphs are measured, too."""
    threads: int | None = None
    """Torch's threads; by default as many as torch takes."""
    plot: Path | None = None
    """File for a bar chart."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON document on stdout, and nothing else."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and prints a table or JSON; status 2 for a mistake of the user."""
    threads = torch.get_num_threads()
    try:
        options = tyro.cli(Options, args=arguments, config=(tyro.conf.DisallowNone,))
        # What libraries have to say is not the result.
        with captured_stdout(restore=True) as write:
            result = bench(options)
            if options.json:
                write(json_text(result.document) + "\n")
        if not options.json:
            show(result)
        return 0
    except (UserError, ValueError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def bench(options: Options) -> Result:
    """Measures this package's step against peers.

    Raises:
        UserError: for a peer or an adapter that is unknown or not installed, a device that is not there, or a picture
            that cannot be written.
    """
    for name in ("rounds", "steps", "threads"):
        value = getattr(options, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.plot is not None:
        _check_picture(options.plot)
    device, size = torch.device(device_name(options.device)), options.size
    steps = STEPS.get(device.type, 200) if options.steps == "auto" else options.steps
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    peers = makers(installed() if options.peers is None else options.peers)
    missing = [] if options.peers is not None else [name for name in PEERS if name not in installed()]
    through = {f"{REFERENCE} through {name}": ours(name, "yes") for name in options.adapters}
    data = dataset_of(size).to(device)
    begin = now(device)
    contestants = {REFERENCE: ours("tensor", "yes")(size, data)}
    contestants[REFERENCE](1)
    warm_up = now(device) - begin
    others: dict[str, Maker] = {f"{REFERENCE}, eager": ours("tensor", "no")}
    if device.type == "cuda":
        others[f"{REFERENCE}, reduce-overhead"] = ours("tensor", "yes", mode="reduce-overhead")
        others[f"{REFERENCE}, CUDA graph"] = ours("tensor", "yes", capture=True)
    contestants |= {name: make(size, data) for name, make in (others | through | peers).items()}
    measured = timings({**contestants, PEAK: products(device)}, options.rounds, steps, device)
    peak = 2 * SIDES[device.type] ** 3 / (measured.pop(PEAK).ms * 1e-3)
    share = size.multiplications / (measured[REFERENCE].ms * 1e-3) / peak
    threads = torch.get_num_threads()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    processor = platform.processor() or platform.machine()
    document = {
        "machine": {"processor": processor, "threads": threads, "device": str(device), "gpu": gpu},
        "size": vars(size),
        "rounds": options.rounds,
        "steps": steps,
        "warm_up_seconds": warm_up,
        "peak_gflops": peak / 1e9,
        "share_of_peak": share,
        "timings": {name: asdict(timing) for name, timing in measured.items()},
    }
    rows = [
        [name, f"{timing.ms:.2f}", f"{1e3 / timing.ms:.0f}", f"{timing.ratio:.2f}"] for name, timing in measured.items()
    ]
    lines = [
        table(["", "ms a step", "steps a second", "times as long"], rows),
        f"observation {size.observation}, action {size.action}, batch {size.batch}, hidden {size.hidden}; "
        f"{gpu or f'{threads} threads'}, median of {options.rounds} rounds of {steps} steps",
        f"{share:.0%} of the {peak / 1e9:.0f} GFLOP/s that matrix products reach here; compiled in {warm_up:.1f} s",
    ]
    if missing:
        lines.append(f"not installed, and not measured: {', '.join(missing)}")
    if options.plot is not None:
        _draw(measured, options.plot)
        lines.append(f"wrote {options.plot}")
    return Result(document, lines)


def products(device: torch.device) -> Steps:
    """Matrix products: what the device can do at most."""
    left, right = torch.randn(2, SIDES[device.type], SIDES[device.type], device=device)
    by_onednn = device.type == "cpu" and _compat.onednn_is_faster()
    multiply = _compat.onednn_product if by_onednn else torch.mm

    def steps(count: int) -> None:
        for _ in range(count):
            multiply(left, right)

    return steps


def _check_picture(path: Path) -> None:
    """Raises :class:`UserError` for what would fail after minutes of measuring."""
    known = imported("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise UserError(f"--plot must be a file with one of the suffixes {', '.join(sorted(known))}, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")


def _draw(measured: dict[str, Timing], path: Path) -> None:
    figure_module: Any = imported("matplotlib.figure")
    figure = figure_module.Figure(figsize=(6, 0.5 * len(measured) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(measured), [1e3 / timing.ms for timing in measured.values()])
    axes.invert_yaxis()
    axes.set(xlabel="gradient steps a second")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".").lower(), dpi=150)
    checkpoint.write_bytes(path, image.getvalue())


if __name__ == "__main__":
    sys.exit(main())
