"""dispatch and combine against indexing and index_add, values and gradients, with and without `row_TK`."""

import itertools

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


SOME = [dims for dims in itertools.product([0, None], repeat=3) if 0 in dims]


@pytest.mark.parametrize("in_dims", SOME, ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_many_samples(gather, in_dims):
    """vmap, values and gradients, whichever of rows, weights and assignments differ between samples."""
    N = 3
    expert_NTK = torch.stack([torch.rand(T, E).topk(K).indices for _ in range(N)])
    weight_TK = torch.rand(T, K)
    routings = [sort_by_expert(expert_TK, weight_TK, torch.zeros(T, E)) for expert_TK in expert_NTK]
    token_NR, row_NTK = (torch.stack([r[i] for r in routings]) for i in (0, 4))
    inputs = [torch.randn(N, T, D), torch.rand(N, T * K), (token_NR, row_NTK)]
    slope_NTD = torch.randn(N, T, D)

    def one(n, dim, value):
        pick = (lambda v: v[0]) if dim is None else (lambda v: v[n]) if n is not None else lambda v: v
        return tuple(map(pick, value)) if isinstance(value, tuple) else pick(value)

    def gradients(x_TD, weight_R, indices, slope_TD):
        token_R, row_TK = indices
        routing = routings[0]._replace(token_R=token_R, row_TK=row_TK if gather else None)

        def value(x_TD, weight_R):
            y_TD = combine(dispatch(x_TD, routing).sin(), routing._replace(weight_R=weight_R))
            return (y_TD * slope_TD).sum(), y_TD

        return torch.func.grad(value, argnums=(0, 1), has_aux=True)(x_TD, weight_R)

    together = [one(None, dim, value) for dim, value in zip(in_dims, inputs, strict=True)]
    ours = torch.vmap(gradients, in_dims=(*in_dims, 0))(*together, slope_NTD)
    for n in range(N):
        alone = [one(n, dim, value) for dim, value in zip(in_dims, inputs, strict=True)]
        wanted = gradients(*alone, slope_NTD[n])
        torch.testing.assert_close(ours[1][n], wanted[1])
        torch.testing.assert_close(ours[0][0][n], wanted[0][0])
        torch.testing.assert_close(ours[0][1][n], wanted[0][1])


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "index_add"])
def test_second_derivatives(gather):
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(T, K, dtype=torch.float64, requires_grad=True)

    def there_and_back(x_TD, weight_TK):
        routing = make_routing(weight_TK, gather=gather)
        return combine(dispatch(x_TD, routing).sin(), routing)

    assert torch.autograd.gradgradcheck(there_and_back, (x_TD, weight_TK))
