"""Logits that are computed only if an operation needs them, and losses that do not need them.

A head (a Linear whose logits go into a cross entropy) returns `DeferredLogits`: a tensor with the
logits' shape, strides, dtype and place in the graph, but without memory. It is the output of the
affine map's Function (F1), whose backward (F8) runs only if the logits are materialised.

- `steps`: the operations after which logits stay deferred, such as views and scales.
- `combinations`: elementwise operations on probabilities and log-probabilities, also of two heads,
  which are recorded, too.
- `expansion`: the terms that such operations add up to.
- `divergences`: sums of these terms as divergences of two heads (F25 to F27).
- `rows`: deferred logits as arguments of the fused head.
- `losses`: the losses that apply these steps to the features and call the fused head (F14, F15).
  They do so only if the graph between head and loss consists of exactly these steps. Otherwise
  they materialise the logits, so that a hook, a checkpoint or a Function in the graph still runs.
- `sums`: the sum of the logits of two heads, as of a Linear and its adapter, is one head.
- `observers`: the functions that observe the gradient of logits or read their memory.
- `reductions`: the operations, such as `argmax`, that are computed from blocks of logits.
- `operands`: what the product takes: features, weight and bias, cast as under autocast.
- `optimizers`: hooks of optimizers, whose steps change the operands of deferred logits.
- `recipes`: a call of a head, and how its logits and the steps on them are computed.
- `logits`: the tensor. Any other operation materialises the logits, once for every tensor that
  came from the same call of the head; from then on they behave as plain tensors.
"""

from torch_nnmath.deferred import losses, observers, sums
from torch_nnmath.deferred.log import HeadLog, MaterializedLogits
from torch_nnmath.deferred.logits import DeferredLogits, has_few_classes, linear, materialize
from torch_nnmath.deferred.mark import get_head_log, get_mark, set_mark
from torch_nnmath.deferred.optimizers import compute_logits_before_update, track_optimizers

__all__ = [
    "DeferredLogits",
    "HeadLog",
    "MaterializedLogits",
    "compute_logits_before_update",
    "get_head_log",
    "get_mark",
    "has_few_classes",
    "linear",
    "losses",
    "materialize",
    "observers",
    "set_mark",
    "sums",
    "track_optimizers",
]
