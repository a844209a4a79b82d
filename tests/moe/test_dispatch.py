"""dispatch and combine against indexing and index_add, values and gradients, with and without `row_TK`."""

import pytest
import torch

from open_lm.moe.capacity import drop_by
from open_lm.moe.dispatch import combine, dispatch
from open_lm.moe.routing import sort_by_expert

T, E, K, D = 7, 5, 3, 4


def make_routing(weight_TK: torch.Tensor, *, gather: bool):
    expert_TK = (2 * torch.arange(T)[:, None] + torch.arange(K)) % E
    routing = drop_by(sort_by_expert(expert_TK, weight_TK, torch.zeros(T, E)), capacity=3)
    return routing if gather else routing._replace(row_TK=None)


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_against_indexing(gather):
    x_TD = torch.randn(T, D, dtype=torch.float64)
    y_RD = torch.randn(T * K, D, dtype=torch.float64)
    routing = make_routing(torch.rand(T, K), gather=gather)
    assert torch.equal(dispatch(x_TD, routing), x_TD[routing.token_R])
    wanted_TD = torch.zeros_like(x_TD).index_add(0, routing.token_R, y_RD * routing.weight_R[:, None])
    torch.testing.assert_close(combine(y_RD, routing), wanted_TD)


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_gradients(gather):
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(T * K, D, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    routing = make_routing(weight_TK.detach(), gather=gather)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, routing), x_TD)
    assert torch.autograd.gradcheck(
        lambda y, w: combine(y, make_routing(w, gather=gather)), (y_RD, weight_TK)
    )


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_sixteen_bits_are_added_in_float32(gather):
    # 1 + 256 is 256 in bfloat16; three rows of 1, 256, 1 must give 258, forward and backward.
    routing = sort_by_expert(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), torch.zeros(1, 3))
    routing = routing if gather else routing._replace(row_TK=None)
    y_RD = torch.tensor([[1.0], [256.0], [1.0]], dtype=torch.bfloat16)
    assert combine(y_RD, routing).item() == 258
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatch(x_TD, routing).backward(y_RD)
    assert x_TD.grad is not None
    assert x_TD.grad.item() == 258


# torch's compiler uses what torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_compiled_gradients(gather, dtype):
    def there_and_back(x_TD, weight_TK):
        routing = make_routing(weight_TK, gather=gather)
        return combine(dispatch(x_TD, routing).sin(), routing)

    x_TD = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight_TK = torch.rand(T, K, requires_grad=True)
    slope_TD = torch.randn(T, D, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager_decomp_partition", fullgraph=True)
    found = []
    for function in (there_and_back, compiled):
        y_TD = function(x_TD, weight_TK)
        found.append((y_TD, *torch.autograd.grad(y_TD, (x_TD, weight_TK), slope_TD)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)
