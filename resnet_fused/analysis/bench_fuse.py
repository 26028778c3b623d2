"""``resnet-fused bench fuse``: nets of other packages, as they are and fused.

For each net: the units that fuse, the error of the fused net against float64 beside the plain one's, and a
training step of both. Nothing is timed that is not verified first.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .. import fusion
from ..training.options import OneLineParser, at_least
from .measure import Timing, environment, interleave
from .result_file import check_writable, write_json
from .user_models import build, image_batch, image_size

__all__ = ["main"]

MODELS = (
    "timm:resnetv2_18", "timm:resnetv2_50", "timm:resnetv2_50d", "timm:resnetv2_101", "timm:densenet121",
    "torchvision:densenet121", "torchvision:resnet50",
)  # fmt: skip
_VERIFY_BATCH = 4
_WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class _Row:
    """One net of the table; timings are None with --no-timing."""

    model: str
    size: int
    explanation: fusion.Explanation
    ratios: tuple[float, float]  # train, eval
    timings: dict[str, Timing] | None

    def markdown(self) -> str:
        e, size = self.explanation, self.size
        cells = [
            self.model,
            f"{size}",
            f"{e.units_fused} / {e.units_found}",
            f"{e.convs_fused} / {e.convs_found}",
            f"{self.ratios[0]:.2f} / {self.ratios[1]:.2f}",
        ]
        if self.timings is not None:
            nchw, last, fused = (self.timings[k].p50 * 1e3 for k in _CONTENDERS)
            speed_up = min(nchw, last) / fused
            cells += [f"{nchw:.1f}", f"{last:.1f}", f"{fused:.1f}", f"{speed_up:.2f} x"]
        return f"| {' | '.join(cells)} |"

    def as_dict(self) -> dict:
        """For JSON; quantiles in ms."""
        e = self.explanation
        found = {"model": self.model, "pixels": self.size, "units_fused": e.units_fused, "units_found": e.units_found,
                 "convs_fused": e.convs_fused, "convs_found": e.convs_found,
                 "error_ratio_train": self.ratios[0], "error_ratio_eval": self.ratios[1]}
        for contender, timing in (self.timings or {}).items():
            found.setdefault("ms", {})[contender] = {q: 1e3 * seconds for q, seconds in asdict(timing).items()}
        return found


_CONTENDERS = ("eager NCHW", "eager channels_last", "fused")
_HEADER = ("net", "pixels", "units fused / found", "convolutions fused / found",
           "error ratio, train / eval")  # fmt: skip
_TIMES = ("eager NCHW, ms", "eager channels_last, ms", "fused, ms", "speed-up")


class _Step:
    """A training step: forward, cross-entropy, backward, SGD with momentum."""

    def __init__(self, model: nn.Module, images: torch.Tensor, memory_format: torch.memory_format,
                 parameters: torch.memory_format | None = None) -> None:
        self.model = model.train().to(memory_format=memory_format if parameters is None else parameters)
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = torch.arange(len(images)) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if a fused net's numbers are wrong: it is not timed.
    """
    parser = OneLineParser(
        prog="resnet-fused bench fuse", allow_abbrev=False,
        description="Verify and time nets of timm and torchvision, as they are and fused; prints Markdown.",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="timm:NAME, ...")
    parser.add_argument("-b", "--batch-size", type=at_least(int, 1), default=16, help="default: %(default)s")
    parser.add_argument("--input-size", type=at_least(int, 1), metavar="S", help="default: 64")
    parser.add_argument("--rounds", type=at_least(int, 1), default=7, help="samples (default: %(default)s)")
    parser.add_argument("--threads", type=at_least(int, 1), help="default: PyTorch's")
    parser.add_argument("--no-timing", dest="timing", action="store_false", help="only verify")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = environment()
    header = (*_HEADER, *(_TIMES if arguments.timing else ()))
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['simd']}, "
        f"PyTorch {machine['torch']}, {machine['date']}; float32, batch {arguments.batch_size}\n"
    )
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}", flush=True)
    rows: list[dict] = []
    for name in arguments.models:
        row, failed = _measure(name, arguments)
        if failed is not None:
            print(f"resnet-fused bench fuse: {name}: {failed}; not timed", file=sys.stderr)
            return 1
        print(row.markdown(), flush=True)
        rows.append(row.as_dict())
        if arguments.json is not None:  # after every net: what was measured stays if the next one is interrupted
            write_json(arguments.json, {"environment": machine, "dtype": "float32", "rounds": arguments.rounds,
                                        "batch_size": arguments.batch_size, "nets": rows})
    return 0


def _measure(name: str, arguments) -> tuple[_Row | None, fusion.Verification | None]:
    model, size = build(name), image_size(name, arguments.input_size)
    ratios = []
    for training in (True, False):
        found = fusion.verify(model.train(training), image_batch(name, _VERIFY_BATCH, size))
        if not found:
            return None, found
        ratios.append(found.ratio)
    explanation = fusion.explain(model)
    timings = None
    if arguments.timing:
        images = image_batch(name, arguments.batch_size, size)
        steps = {
            "eager NCHW": _Step(copy.deepcopy(model), images, torch.contiguous_format),
            "eager channels_last": _Step(copy.deepcopy(model), images, torch.channels_last),
            "fused": _Step(fusion.fuse(copy.deepcopy(model)), images, torch.channels_last, torch.preserve_format),
        }
        interleave(steps, _WARMUP_ROUNDS)
        samples = interleave(steps, arguments.rounds, lead_in=steps)
        timings = {key: Timing.of(values) for key, values in samples.items()}
    return _Row(name, size, explanation, tuple(ratios), timings), None
