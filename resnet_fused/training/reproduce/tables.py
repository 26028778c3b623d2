"""The rows of the papers' tables of CIFAR-10: net, recipe, and the error that the paper has.

[1] He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385).
[2] He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016 (arXiv:1603.05027).

[2] reports the median of 5 runs, [1] a single run (ResNet-110: the best of 5, then mean +- deviation).
Not here: "ResNet-110 (1layer skip)" of [2], table 3, whose units have a single convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UserError

__all__ = ["CIFAR10", "Row", "at_depth", "choose_rows", "describe_rows"]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: by which it is chosen.
        table: paper and table, as in "2016-table1".
        title: the paper's words.
        model, options: of ``create_model``.
        error: test error in % as printed; None where the paper has none, or only a curve.
        remark: what the paper says instead of, or beside, a number.
        recipe: the recipe, with ``settings`` in the place of its own.
    """

    name: str
    table: str
    title: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    remark: str = ""
    recipe: str = "he2016"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def paper(self) -> str:
        """What the paper says, for a table."""
        number = "" if self.error is None else f"{self.error:.2f}"
        return " ".join(filter(None, [number, self.remark])) or "-"


#: [1] warms up ResNet-110 alone; [2] all nets.
_COLD = {"warmup_iterations": 0}


def _table6() -> list[Row]:
    errors = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}
    rows = [
        Row(
            f"resnet{depth}",
            "2015-table6",
            f"ResNet-{depth}",
            f"resnet{depth}_cifar",
            error=error,
            remark="(6.61 +- 0.16)" if depth == 110 else "",
            settings={} if depth >= 110 else _COLD,
        )
        for depth, error in errors.items()
    ]
    rows += [
        Row(
            f"plain{depth}",
            "2015-figure6",
            f"plain-{depth}",
            f"plain{depth}_cifar",
            remark="curve only",
            settings=_COLD,
        )
        for depth in (20, 32, 44, 56)
    ]
    return rows


def _table1() -> list[Row]:
    def row(
        name: str, title: str, error: float | None, shortcut: str | None = None, **shortcut_options
    ) -> Row:
        options: dict[str, Any] = {} if shortcut is None else {"shortcut": shortcut}
        if shortcut_options:
            options["shortcut_options"] = shortcut_options
        remark = "" if error is not None else "fail (> 20)"
        return Row(f"shortcut-{name}", "2016-table1", title, "resnet110_cifar", options, error, remark)

    def scaled(shortcut: float, residual: float, error: float | None) -> Row:
        name = f"constant-{shortcut:g}-{residual:g}"
        title = f"constant scaling: shortcut {shortcut:g}, F {residual:g}"
        scales = {"shortcut_scale": shortcut, "residual_scale": residual}
        return row(name, title, error, "constant_scaling", **scales)

    def gated(kind: str, bias: float, error: float | None) -> Row:
        title = f"{kind} gating, initial bias {bias:g}"
        name = f"{kind.removeprefix('shortcut-')}-gating-b{bias:g}"
        return row(name, title, error, f"{kind.replace('-', '_')}_gating", gate_bias=bias)

    return [
        row("original", "original", 6.61),
        scaled(0.0, 1.0, None),
        scaled(0.5, 1.0, None),
        scaled(0.5, 0.5, 12.35),
        gated("exclusive", -5.0, None),
        gated("exclusive", -6.0, 8.70),
        gated("exclusive", -7.0, 9.81),
        gated("shortcut-only", 0.0, 12.86),
        gated("shortcut-only", -6.0, 6.91),
        row("conv", "1x1 conv shortcut", 12.22, "conv"),
        row("dropout", "dropout shortcut, 0.5", None, "dropout", p=0.5),
    ]


def _table2() -> list[Row]:
    orders = {
        "original": ("original", "original unit", 6.61, 5.93),
        "bn-after-addition": ("bn_after_addition", "BN after addition", 8.17, 6.50),
        "relu-before-addition": ("relu_before_addition", "ReLU before addition", 7.84, 6.14),
        "relu-only": ("relu_only_preactivation", "ReLU-only pre-activation", 6.71, 5.91),
        "full": ("full_preactivation", "full pre-activation", 6.37, 5.46),
    }
    rows = []
    for depth in (110, 164):
        for name, (order, title, *errors) in orders.items():
            model, options = f"resnet{depth}_cifar", {} if order == "original" else {"order": order}
            if name == "full":
                # Appendix of [2]: nets of bottlenecks have projections, others are as in [1]: option A.
                model, options = f"preact_resnet{depth}_cifar", {"projection": "A"} if depth == 110 else {}
            error = errors[0] if depth == 110 else errors[1]
            title_ = f"ResNet-{depth}, {title}"
            rows.append(Row(f"order-{name}-{depth}", "2016-table2", title_, model, options, error))
    return rows


def _tables3_and_4() -> list[Row]:
    deep = "preact_resnet1001_cifar"
    return [
        Row("original-1001", "2016-table3", "ResNet-1001, original unit", "resnet1001_cifar", error=7.61),
        Row(
            "preact-1001", "2016-table3", "ResNet-1001, pre-activation unit", deep, {}, 4.92, "(4.89 +- 0.14)"
        ),
        Row(
            "preact-1001-batch64",
            "2016-table4",
            "ResNet-1001, pre-activation unit, batch 64",
            deep,
            error=4.62,
            remark="(4.69 +- 0.20)",
            recipe="he2016-batch64",
        ),
    ]


CIFAR10: tuple[Row, ...] = (*_table6(), *_table1(), *_table2(), *_tables3_and_4())


def choose_rows(patterns: Iterable[str]) -> list[Row]:
    """The rows whose name or table one of the shell patterns matches, in the order of the tables.

    Raises:
        UserError: a pattern that matches none.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if pattern != "all" and not any(_matches(row, pattern) for row in CIFAR10):
            raise UserError(f"no row or table is named {pattern!r}: --list shows them")
    return [row for row in CIFAR10 if any(p == "all" or _matches(row, p) for p in patterns)]


def _matches(row: Row, pattern: str) -> bool:
    return fnmatchcase(row.name, pattern) or fnmatchcase(row.table, pattern)


def at_depth(row: Row, depth: int | None) -> Row:
    """The row with another number of layers; its error stays that of the paper, of the paper's depth."""
    if depth is None:
        return row
    model = re.sub(r"\d+", str(depth), row.model, count=1)
    return replace(row, model=model)


def describe_rows(rows: Iterable[Row] = CIFAR10) -> str:
    """The rows as text: what ``--list`` prints."""
    cells = [("row", "table", "net", "paper's error, %")]
    cells += [(row.name, row.table, row.title, row.paper) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )
