"""The fused pre-activation modules: drop-in twins of those in :mod:`resnet_fused.nn.reference`.

Each is a subclass of its plain twin that replaces ``forward`` alone, so that the constructor, the children
and the keys of the ``state_dict`` are the same by construction. The children hold the parameters and the
settings, all of which are read when the unit is called.

``unit(x)`` returns a tensor, like the plain twin. ``unit(x, x_stats, return_stats=True)`` returns ``(y,
y_stats)``: ``x_stats`` are the statistics of ``x`` that the unit before has returned, which spares a pass
over ``x``; either can be None. :class:`PreActStage` hands them on.

Where a child is no longer what the fused operator computes (another class, as after
``convert_sync_batchnorm``; hooks, as for pruning; a padding mode other than zeros), the unit computes what
its plain twin does, with the same result and without the speed.

Under autocast the input is cast to the autocast dtype, like that of a convolution, and the output has this
dtype. (A plain unit without a projection adds its input as it is, so it returns float32 where that is
float32; behind a convolution, as in a net, the two are alike.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as nnF
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional as F
from ..primitives.layout import channels_last, convolution_is_channels_last, suggests_channels_last
from . import reference

__all__ = ["PreActBasicBlock", "PreActBottleneck", "PreActConv2d", "PreActStage", "ResidualAdd"]

UnitOutput = Tensor | tuple[Tensor, Tensor | None]


def has_hooks(module: nn.Module) -> bool:
    """Whether anything has been registered that runs when ``module`` is called; ``module.compile()`` counts."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
    )


def has_global_hooks() -> bool:
    """Whether anything has been registered that runs when any module is called."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def calls_forward_alone(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the forward of its class and nothing else: no hooks, no forward of its own."""
    return not has_hooks(module) and "forward" not in module.__dict__


def plain_forward(module: nn.Module) -> Callable:
    """The forward of a module's class as the user wrote it; ``fuse`` exchanges classes."""
    return getattr(type(module), "_plain_forward", type(module).forward)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD transforms what runs: they have formulas for PyTorch's layers alone."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def is_fusable(module: nn.Module) -> bool:
    """Whether ``module``, called now, computes nothing but a 2-D batch norm, or a convolution padded with zeros, and
    the operators may take its place."""
    if not calls_forward_alone(module) or is_transformed():
        return False
    if isinstance(module, nn.BatchNorm2d):
        return (
            type(module).forward is _BatchNorm.forward
            and type(module)._check_input_dim is nn.BatchNorm2d._check_input_dim
        )
    return (
        isinstance(module, nn.Conv2d)
        and plain_forward(module) is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and module.padding_mode == "zeros"
    )


def is_projection(shortcut: nn.Module | None) -> bool:
    """Whether ``shortcut`` is one that the operator computes: none, or a convolution without padding."""
    return shortcut is None or (
        isinstance(shortcut, nn.Conv2d)
        and is_fusable(shortcut)
        and shortcut.groups == 1
        and shortcut.padding == (0, 0)
        and shortcut.dilation == (1, 1)
    )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether ``bn`` normalises with the statistics of the batch, not with the running ones."""
    return bn.training or bn.running_mean is None


def _parameter(module: nn.Module, kind: str, name: str) -> Tensor | None:
    """module.name, without the search that nn.Module makes where it is a parameter or buffer as usual."""
    values = module.__dict__[kind]
    return values[name] if name in values else getattr(module, name)


def batch_norm_args(bn: nn.BatchNorm2d, count: bool = True) -> F.BatchNormArgs:
    """Read ``bn`` and count the batch, as ``BatchNorm2d.forward`` does; the operator does the rest.

    Args:
        count: False: residual_unit counts the batch, all of a unit's at once.
    """
    training, momentum, tracked = bn.training, bn.momentum, None
    track = training and bn.track_running_stats
    if track:
        tracked = _parameter(bn, "_buffers", "num_batches_tracked")
        if tracked is not None and (count or momentum is None):
            tracked.add_(1)
            if momentum is None:
                # cumulative average: a tensor, so that nothing waits for the device or breaks a graph
                momentum = 1.0 / tracked.double()
            tracked = None
    running = track or not training
    return F.BatchNormArgs(
        _parameter(bn, "_parameters", "weight"),
        _parameter(bn, "_parameters", "bias"),
        _parameter(bn, "_buffers", "running_mean") if running else None,
        _parameter(bn, "_buffers", "running_var") if running else None,
        training,
        0.0 if momentum is None else momentum,
        bn.eps,
        tracked,
    )


def conv_args(conv: nn.Conv2d) -> F.ConvArgs:
    return F.ConvArgs(
        _parameter(conv, "_parameters", "weight"),
        _parameter(conv, "_parameters", "bias"),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )


def unit_args(
    norms: Iterable[nn.BatchNorm2d], convs: Iterable[nn.Conv2d], shortcut: nn.Conv2d | None, slope: float
) -> F.UnitArgs:
    """What the operator of a whole unit is given. A norm without momentum counts the batch here."""
    return F.UnitArgs(
        [batch_norm_args(bn, count=False) for bn in norms],
        [conv_args(conv) for conv in convs],
        None if shortcut is None else conv_args(shortcut),
        slope,
    )


class StatsModule:
    """A module that takes the statistics of its input and can return those of its output.

    Mixed into the plain twins, in front of them.
    """

    def first_norm(self) -> nn.Module | None:
        """The norm that reads the input."""
        raise NotImplementedError

    def wants_stats(self) -> bool:
        """Whether this module, called now, would use the statistics of its input."""
        norm = self.first_norm()
        return norm is not None and not has_hooks(self) and is_fusable(norm) and uses_batch_statistics(norm)

    def _plain(self, x: Tensor, return_stats: bool) -> UnitOutput:
        y = super().forward(x)
        return (y, None) if return_stats else y


def run_in_turn(
    modules: Iterable[nn.Module], x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Call ``modules`` in turn, each with the output of the one before and the statistics of it.

    Statistics are asked for only where the next module will use them. A module that has hooks is called as
    ``module(x)``, so that they see what they would see on a plain module.

    Returns:
        The output, and its statistics: None if not asked for, or if the last module does not return any.
    """
    modules, hooked = list(modules), has_global_hooks()
    if x.dim() == 4 and not is_transformed() and suggests_channels_last(x) and not hooked:
        modules = _without_stages(modules)
    for last, step in _steps(modules, hooked):
        following = modules[last] if last < len(modules) else None
        wanted = (
            return_stats
            if following is None
            else isinstance(following, StatsModule) and following.wants_stats()
        )
        if isinstance(step, list):
            out = F.residual_units(x, step, x_stats=x_stats, return_stats=wanted)
            x, x_stats = out if wanted else (out, None)
        elif not isinstance(step, StatsModule) or has_hooks(step):
            x, x_stats = step(x), None
        elif wanted:
            x, x_stats = step(x, x_stats, return_stats=True)
        else:
            x, x_stats = step(x, x_stats), None
    return x, x_stats


def _without_stages(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules, and in place of a stage that nobody has hooked or changed its own: a row of units can go on
    from stage to stage. For channels_last inputs, which a stage hands to its units as they are."""
    flat: list[nn.Module] = []
    for module in modules:
        if isinstance(module, PreActStage) and _runs_as_written(module, PreActStage):
            flat += _without_stages(module)
        else:
            flat.append(module)
    return flat


def _runs_as_written(module: nn.Module, of: type) -> bool:
    """Whether calling the module is nothing but the forward of that class."""
    return type(module).forward is of.forward and calls_forward_alone(module)


def _steps(modules: list[nn.Module], hooked: bool) -> list[tuple[int, nn.Module | list[F.UnitArgs]]]:
    """What to call in turn, modules and rows of fused units, each with the index of the module behind it.

    Args:
        hooked: there are global hooks, which have to see every unit.
    """
    steps: list[tuple[int, nn.Module | list[F.UnitArgs]]] = []
    for index, module in enumerate(modules, start=1):
        args = None
        if isinstance(module, _ResidualUnit) and not hooked and _runs_as_written(module, _ResidualUnit):
            args = module.unit_args()
        if args is None:
            steps.append((index, module))
        elif steps and isinstance(steps[-1][1], list):
            steps[-1] = (index, [*steps[-1][1], args])
        else:
            steps.append((index, [args]))
    return steps


def convolution_with_stats(conv: nn.Conv2d, x: Tensor, following: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``conv(x)``, a net's first convolution, and the statistics of it where ``following`` will use them."""
    if not (is_fusable(conv) and isinstance(following, StatsModule) and following.wants_stats()):
        return conv(x), None
    return conv2d_stats(conv, x)


def conv2d_stats(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """``conv(x)`` and the statistics of it; ``conv`` is one that the operator takes."""
    return F.conv2d_stats(x, **conv_args(conv)._asdict())


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``; ``conv`` is one that the operator takes."""
    return F.conv2d(x, **conv_args(conv)._asdict())


def pooled_norm_with_stats(bn: nn.Module, x: Tensor, x_stats: Tensor | None, negative_slope: float) -> Tensor:
    """The mean of ``act(bn(x))`` over each image's pixels, [N, C], the end of a net, given the statistics of
    ``x`` or None."""
    if not (isinstance(bn, nn.BatchNorm2d) and is_fusable(bn)):
        x = reference.activation(bn(x), negative_slope)
        # Its gradient keeps channels_last; mean()'s does not.
        return nnF.avg_pool2d(x, x.shape[2:]).flatten(1)
    return normalize(bn, x, x_stats, negative_slope, global_avg_pool=True).flatten(1)


def normalize(
    bn: nn.BatchNorm2d,
    x: Tensor,
    x_stats: Tensor | None,
    negative_slope: float,
    global_avg_pool: bool = False,
) -> Tensor:
    """``act(bn(x))`` by the operator, or its means; ``bn`` is one that it takes."""
    args = batch_norm_args(bn)
    return F.preact(
        x,
        args.weight,
        args.bias,
        args.running_mean,
        args.running_var,
        training=args.training,
        momentum=args.momentum,
        eps=args.eps,
        negative_slope=negative_slope,
        x_stats=x_stats,
        global_avg_pool=global_avg_pool,
    )


class PreActConv2d(StatsModule, reference.PreActConv2d):
    __doc__ = reference.PreActConv2d.__doc__

    def first_norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False) -> UnitOutput:
        if not (is_fusable(self.bn) and is_fusable(self.conv)):
            return self._plain(x, return_stats)
        bn, conv = batch_norm_args(self.bn), conv_args(self.conv)
        return F.preact_conv2d(
            x,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            conv.weight,
            conv.bias,
            training=bn.training,
            momentum=bn.momentum,
            eps=bn.eps,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            negative_slope=self.negative_slope,
            x_stats=x_stats,
            return_stats=return_stats,
        )


class _ResidualUnit(StatsModule):
    """A unit of norms bn1, bn2, ... and convolutions conv1, conv2, ..., run as one operator."""

    _norms: tuple[str, ...]
    _convs: tuple[str, ...]

    def first_norm(self) -> nn.Module:
        return self.bn1

    def unit_args(self) -> F.UnitArgs | None:
        """:func:`unit_args` of the children; None if the operator does not compute what they do."""
        children = self._modules
        norms = [children[name] for name in self._norms]
        convs = [children[name] for name in self._convs]
        shortcut = self.shortcut
        if not is_projection(shortcut) or not all([is_fusable(child) for child in (*norms, *convs)]):
            return None
        return unit_args(norms, convs, shortcut, self.negative_slope)

    def forward(self, x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False) -> UnitOutput:
        args = self.unit_args()
        if args is None:
            return self._plain(x, return_stats)
        return F.residual_unit(
            x,
            args.norms,
            args.convs,
            shortcut=args.shortcut,
            negative_slope=args.negative_slope,
            x_stats=x_stats,
            return_stats=return_stats,
        )


class PreActBasicBlock(_ResidualUnit, reference.PreActBasicBlock):
    __doc__ = reference.PreActBasicBlock.__doc__
    _norms, _convs = ("bn1", "bn2"), ("conv1", "conv2")


class PreActBottleneck(_ResidualUnit, reference.PreActBottleneck):
    __doc__ = reference.PreActBottleneck.__doc__
    _norms, _convs = ("bn1", "bn2", "bn3"), ("conv1", "conv2", "conv3")


class PreActStage(StatsModule, reference.PreActStage):
    """Residual units that run one after another and hand on the statistics of what they return.

    Args:
        units: the residual units, as in :class:`torch.nn.Sequential`. Any module may be among them;
            statistics travel between fused units, see :func:`run_in_turn`.

    ``stage(x)`` returns a tensor; ``stage(x, x_stats, return_stats=True)`` returns ``(y, y_stats)``, for the
    next stage.
    """

    def first_norm(self) -> nn.Module | None:
        first = next(iter(self), None)
        return first.first_norm() if isinstance(first, StatsModule) and not has_hooks(first) else None

    def forward(self, x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False) -> UnitOutput:
        if x.dim() == 4 and not is_transformed() and not suggests_channels_last(x):
            # Once for the stage, not once for each unit; the output's layout is that of the plain units.
            weights = [module.weight for module in self.modules() if isinstance(module, nn.Conv2d)]
            contiguous = not convolution_is_channels_last(x, *weights)
            x, x_stats = run_in_turn(self, channels_last(x), x_stats, return_stats)
            x = x.contiguous() if contiguous else x
        else:
            x, x_stats = run_in_turn(self, x, x_stats, return_stats)
        return (x, x_stats) if return_stats else x


class ResidualAdd(reference.ResidualAdd):
    __doc__ = reference.ResidualAdd.__doc__

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        if is_transformed():
            return super().forward(x, y, gate)
        return F.residual_add(x, y, gate=gate, alpha=self.alpha, negative_slope=self.negative_slope)
