"""A weight as the kernel takes it: a tensor, or a descriptor for the copy engine."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megakernel.plan.rules import WeightRule


def as_operand(weight_EXY: Tensor, rule: WeightRule, step: int) -> Tensor | TensorDescriptor:
    """Return the weight, or a descriptor of its single matrices where the rule says ``tma``.

    Args:
        weight_EXY: weight of all experts.
        rule: how it lies.
        step: depth of a step.
    """
    if not rule.tma:
        return weight_EXY
    num_experts = weight_EXY.shape[0]
    stacked, height, width = rule.stacked, rule.height, rule.width
    if rule.transposed:
        return TensorDescriptor(
            weight_EXY.mT,
            [num_experts, width, stacked, height],
            [rule.expert_stride, rule.column_stride, rule.stack_stride, 1],
            [1, step, stacked, rule.block],
        )
    return TensorDescriptor(
        weight_EXY,
        [num_experts * stacked, height, width],
        [rule.stack_stride, rule.row_stride, 1],
        [stacked, rule.block, step],
    )
