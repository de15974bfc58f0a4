import pytest
import torch
from torch import nn

from megakernel.adapters.weights import (
    pack_gate_up,
    pack_stacked,
    read_gate_up,
    read_stacked,
    view_gate_up,
    view_stacked,
)


def parameters(number: int, *shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape), requires_grad=False) for _ in range(number)]


def test_matrices_in_a_row_are_read_in_place() -> None:
    block = torch.randn(5, 3, 4)
    view = view_stacked(list(block[1:4]))
    assert view is not None and view.data_ptr() == block[1].data_ptr()
    assert torch.equal(view, block[1:4])


@pytest.mark.parametrize(
    "matrices",
    [
        [torch.ones(3, 4), torch.ones(3, 4)],
        list(torch.ones(4, 3, 4))[::2],
        list(torch.ones(2, 3, 4))[::-1],
        list(torch.ones(2, 4, 3).mT),
        [torch.ones(3, 4), torch.ones(4, 3)],
    ],
    ids=["apart", "with gaps", "backwards", "transposed", "of other shapes"],
)
def test_other_matrices_are_no_view(matrices: list[torch.Tensor]) -> None:
    assert view_stacked(matrices) is None


def test_matrices_apart_are_copied_at_each_read() -> None:
    matrices = parameters(3, 2, 4)
    assert torch.equal(read_stacked(matrices), torch.stack(list(matrices)))
    matrices[1].data.fill_(7.0)  # changes no version counter
    assert torch.equal(read_stacked(matrices), torch.stack(list(matrices)))


def test_packed_parameters_are_the_same_objects_read_in_place() -> None:
    matrices = parameters(3, 2, 4)
    values = torch.stack(list(matrices))
    pack_stacked(matrices)
    view = view_stacked(matrices)
    assert view is not None and torch.equal(view, values)
    assert all(isinstance(matrix, nn.Parameter) for matrix in matrices)
    matrices[2].data.fill_(7.0)
    assert bool((view[2] == 7.0).all())


def test_gate_and_up_apart_are_copied_at_each_read() -> None:
    gate, up = parameters(2, 3, 2, 4)
    assert view_gate_up(gate, up) is None
    assert torch.equal(read_gate_up(gate, up), torch.cat([gate, up], 1))
    up.data.fill_(7.0)
    assert torch.equal(read_gate_up(gate, up), torch.cat([gate, up], 1))


def test_packed_gate_and_up_are_read_in_place() -> None:
    gate, up = parameters(2, 3, 2, 4)
    values = torch.cat([gate, up], 1)
    pack_gate_up(gate, up)
    view = view_gate_up(gate, up)
    assert view is not None and view.is_contiguous() and torch.equal(view, values)
    up.data[1].fill_(7.0)
    assert bool((view[1, 2:] == 7.0).all())
    pack_gate_up(gate, up)  # has nothing to do
    assert gate.data_ptr() == view.data_ptr()
    assert view_gate_up(up, gate) is None  # the other way round


@pytest.mark.parametrize("pack", [lambda a, b: pack_stacked([a, b]), pack_gate_up],
                         ids=["stacked", "gate and up"])  # fmt: skip
def test_parameters_packed_in_inference_mode_can_be_trained(pack) -> None:
    first, second = (nn.Parameter(torch.randn(2, 3, 4)) for _ in range(2))
    with torch.inference_mode():
        pack(first, second)
    assert not (first.is_inference() or second.is_inference())
    (first * second).sum().backward()
    assert torch.equal(first.grad, second)


# Gradients


def trained(number: int, *shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for _ in range(number)]


@pytest.mark.parametrize("pack", [True, False], ids=["in a row", "apart"])
def test_each_stacked_parameter_gets_its_own_gradient(pack: bool) -> None:
    matrices, incoming = trained(3, 2, 4), torch.randn(3, 2, 4)
    if pack:
        pack_stacked(matrices)
    (read_stacked(matrices) * incoming).sum().backward()
    for matrix, expected in zip(matrices, incoming, strict=True):
        assert torch.equal(matrix.grad, expected)


@pytest.mark.parametrize("pack", [True, False], ids=["in a row", "apart"])
def test_gate_and_up_get_their_own_gradients(pack: bool) -> None:
    (gate, up), incoming = trained(2, 3, 2, 4), torch.randn(3, 4, 4)
    if pack:
        pack_gate_up(gate, up)
    (read_gate_up(gate, up) * incoming).sum().backward()
    assert torch.equal(gate.grad, incoming[:, :2]) and torch.equal(up.grad, incoming[:, 2:])


def test_a_frozen_parameter_in_a_row_gets_no_gradient() -> None:
    matrices = trained(3, 2, 4)
    pack_stacked(matrices)
    matrices[0].requires_grad_(False)
    read_stacked(matrices).sum().backward()
    assert matrices[0].grad is None and torch.equal(matrices[2].grad, torch.ones(2, 4))
    assert not read_stacked([matrix.requires_grad_(False) for matrix in matrices]).requires_grad


def test_a_change_of_any_parameter_before_the_backward_is_an_error() -> None:
    """What is read in place has no version counter in common with them."""
    for changed in range(3):
        matrices = trained(3, 2, 4)
        pack_stacked(matrices)
        loss = read_stacked(matrices).square().sum()
        with torch.no_grad():
            matrices[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
