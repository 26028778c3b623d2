"""The primitives: registered, functional, not differentiable; every backend provides them or declines a case.

The functions here are what ops/ calls. Their registered twins ``torch.ops.resnet_fused.<name>`` take the same
arguments in any layout. The *acc* dtype is float64 for float64 activations, else float32.
"""

from .bn_act_backward import bn_act_backward
from .bn_act_forward import bn_act_forward
from .bn_act_pool_backward import bn_act_pool_backward
from .bn_act_pool_forward import bn_act_pool_forward
from .channel_stats import channel_stats
from .finalize_backward import finalize_backward
from .finalize_forward import finalize_forward
from .max_pool_backward import max_pool_backward
from .max_pool_forward import max_pool_forward
from .preact_apply import preact_apply
from .preact_conv_backward_1x1 import preact_conv_backward_1x1
from .preact_conv_dgrad import preact_conv_dgrad
from .preact_conv_forward import preact_conv_forward
from .preact_conv_wgrad import preact_conv_wgrad
from .residual_add import residual_add
from .update_running_stats import update_running_stats

__all__ = [
    "bn_act_backward",
    "bn_act_forward",
    "bn_act_pool_backward",
    "bn_act_pool_forward",
    "channel_stats",
    "finalize_backward",
    "finalize_forward",
    "max_pool_backward",
    "max_pool_forward",
    "preact_apply",
    "preact_conv_backward_1x1",
    "preact_conv_dgrad",
    "preact_conv_forward",
    "preact_conv_wgrad",
    "residual_add",
    "update_running_stats",
]
