"""The operation as it is written in `core.functional`, in torch's own functions: the form of which every other is a
faster equal, and the one for everything that looks inside (torch.compile, autocast, functorch, tracing).
"""

import torch.nn.functional as F
from torch import Tensor

from ..functional import LinearOp, Publish, scaled_parts, side_by_side, up_add


def plain_linear(op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """y = W x + b + s U (D r + c), and what is published; a kernel."""
    ups, scaling = scaled_parts(op)
    D, U = side_by_side(op.D, ups)
    own = F.linear(op.x if op.read is None else op.read, D)
    z = own if op.carry is None else own + op.carry
    y = up_add(frozen_output(op), z, U, scaling)
    published = {Publish.OWN: own, Publish.SUM: z}.get(op.publish)
    return y, F.linear(op.x, op.ahead) if op.ahead is not None else published


def closed_linear(op: LinearOp) -> tuple[Tensor, Tensor | None]:
    """y = W x + b where every scaling is the number 0: no product of low rank but one that another layer reads."""
    y = frozen_output(op)
    if op.ahead is not None:
        return y, F.linear(op.x, op.ahead)
    if op.publish is Publish.SUM and op.carry is not None:
        return y, op.carry
    if op.publish in (Publish.OWN, Publish.SUM):
        return y, op.x.new_zeros(*op.x.shape[:-1], sum(len(part) for part in op.D))
    return y, None


def frozen_output(op: LinearOp) -> Tensor:
    """W x + b."""
    if op.base is not None:
        return op.base
    assert op.weight is not None
    return F.linear(op.x, op.weight, op.bias)
