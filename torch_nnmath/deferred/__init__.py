"""Logits that are computed only if an operation needs them, and losses that do not need them.

From a head (a Linear whose logits go into a loss) to its loss:

1. `linear` returns `DeferredLogits`: a tensor with the logits' shape and node in the graph (F1,
   whose backward is F8), but no memory. Its `Recipe` says how to compute it from a `HeadCall`.
2. An operation in `STEPS` or `COMBINATIONS` returns another deferred tensor, whose recipe records
   the operation. One in `REDUCTIONS`, such as `argmax`, is computed from blocks of logits.
3. A loss compares the recipes with the graph between head and loss. If both consist of the same
   operations, it applies these to the features (`HeadRows`) and calls the fused head (F14, F15);
   for a sum of a combination, the divergences of two heads (F25 to F27).
4. Anything else materialises: all live tensors of the call get their values, once, and are plain
   tensors from then on. So a hook, a checkpoint or a Function in the graph still runs.

The modules, in the order of this flow:

- `mark`, `log`: what makes a Linear a head, and what happened to its logits.
- `logits`: the tensor, the call that makes it, and the dispatch to the tables.
- `operands`: features, weight and bias, cast as under autocast.
- `recipes`: calls and recipes, and how they are computed.
- `steps`, `combinations`, `reductions`: the tables of operations.
- `rows`: deferred logits as arguments of the fused head.
- `losses`: the losses; `expansion` reads a combination as a sum of terms, `divergences` sums these.
- `sums`: the sum of the logits of two heads, such as a Linear and its adapter, as one head.
- `observers`: functions that observe the gradient of logits or read their memory.
- `optimizers`: hooks of optimizers, whose steps change the operands.
- `wrappers`, `split`: FSDP2, and a head whose classes the ranks of a device mesh share.
- `compiled`: the head between two graphs of `torch.compile`.
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
