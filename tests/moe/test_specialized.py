"""The kernels in Gluon: when they are chosen, and on a GPU that they compute what `rows`' kernels do."""

import pytest
import torch

pytest.importorskip("triton")

from open_lm.moe.backends.triton import launch, specialized
from open_lm.moe.backends.triton.table import Tile, choose, hopper_table

KERNELS = ("up_specialized", "up_backward_specialized")
GATHERS = Tile(256, 64, 4, 4, registers=232)
GATHERED = Tile(256, 64, 4, 4, gathered=True, registers=240)
IN_TURN = Tile(128, 64, 4, 5, take_turns=True, registers=240)
TOGETHER = Tile(256, 64, 4, 4, registers=240)


@pytest.fixture
def another_triton(monkeypatch):
    monkeypatch.setattr(specialized.triton, "__version__", "3.9.0")
    specialized.gluon.cache_clear()
    yield
    specialized.gluon.cache_clear()


def test_not_with_another_triton(another_triton):
    assert specialized.gluon() is None


def test_not_without_its_gpu():
    assert specialized.tile_of("up", torch.device("cpu"), torch.bfloat16, 768, 3072) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_of_the_table_are_possible(kernel):
    """They divide the widths they were measured with, and what they hold is in a Hopper's shared memory."""
    for D, F, tile in hopper_table()[kernel]:
        if tile is None:
            continue
        assert specialized.fits(tile, D, F)
        pieces = 4 * 64 * (tile.rows if tile.take_turns else tile.rows // 2)  # two of each consumer
        assert 2 * (tile.stages * tile.depth * (tile.rows + tile.columns) + pieces) + 1024 <= 227 * 1024


def test_widths_that_do_not_fit():
    assert not specialized.fits(TOGETHER, 768, 1152)
    assert specialized.fits(IN_TURN, 768, 1152)
    assert not specialized.fits(IN_TURN, 288, 1152)
    assert not specialized.fits(TOGETHER, 192, 1024)


def ragged(D: int, F: int, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Groups of rows, an empty one among them, and 100 rows that were dropped; numbers of the size of a layer's."""
    torch.manual_seed(0)
    T, R, E = 1000, sum(rows) + 100, len(rows)
    end_E = torch.tensor(rows, device="cuda").cumsum(0).int()
    weight_R = torch.rand(R, device="cuda")
    weight_R[end_E[-1] :] = 0

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").bfloat16()

    h_RF = random(R, F)
    h_RF[end_E[-1] :] = 0
    return {
        "x": random(T, D), "h": h_RF, "w1": random(E, D, F) * D**-0.5, "w2": random(E, F, D) * D**-0.5,
        "token_R": torch.randint(T, (R,), device="cuda").int(), "weight_R": weight_R, "end_E": end_E,
        "table": launch.schedule(end_E, R, 128),
    }  # fmt: skip


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability()[0] != 9
    or specialized.gluon() is None,
    reason="needs a Hopper GPU and the release of Triton of these kernels",
)
GROUPS = [(1, 127, 0, 300, 1000, 128), (4000, 0, 77, 513), (3,)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", ["gelu", "gelu_exact", "relu", "relu_squared", "silu"])
@pytest.mark.parametrize("tile", [GATHERS, GATHERED], ids=["gathers", "gathered"])
@pytest.mark.parametrize("rows", GROUPS)
@pytest.mark.parametrize("results", [(True, True, True), (False, True, False), (True, False, False)])
def test_up(kind, tile, rows, results):
    save, activate, weighted = results
    of = ragged(256, 512, rows)
    weight_R = of["weight_R"] if weighted else None
    x = launch.gather(of["x"], of["token_R"], of["end_E"]) if tile.gathered else of["x"]
    h, a = specialized.up(x, of["token_R"], of["w1"], of["table"], kind, save, activate, weight_R, tile)
    wanted = launch.up(
        of["x"], of["token_R"], of["w1"], None, None, None, None, of["table"], kind, save, activate, weight_R,
        choose("up", of["x"].device, torch.bfloat16, 256, 512),
    )  # fmt: skip
    real = of["end_E"][-1]
    for ours, theirs in ((h, wanted[0]), (a, wanted[2])):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours[:real], theirs[:real])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", ["gelu", "gelu_exact", "relu", "relu_squared", "silu"])
@pytest.mark.parametrize("tile", [IN_TURN, TOGETHER], ids=["in turn", "together"])
@pytest.mark.parametrize("rows", GROUPS)
@pytest.mark.parametrize("in_place", [False, True])
def test_up_backward(kind, tile, rows, in_place):
    of = ragged(256, 512, rows)
    g_RD = launch.gather(of["x"], of["token_R"], of["end_E"])
    wanted, _, _, wanted_weight = launch.up_backward(
        of["x"], of["token_R"], of["w2"], None, of["weight_R"], of["h"], None, of["table"], kind, g_RD,
        choose("up_backward", g_RD.device, torch.bfloat16, 256, 512), False,
    )  # fmt: skip
    dh = of["h"] if in_place else poisoned(of["h"])
    weight = specialized.up_backward(g_RD, of["w2"], of["weight_R"], of["h"], of["table"], kind, dh, tile)
    real = of["end_E"][-1]
    if tile.take_turns:
        assert torch.equal(dh[:real], wanted[:real])
        torch.testing.assert_close(weight, wanted_weight, rtol=1e-4, atol=1e-4)
    else:  # p is rounded
        assert (dh[:real].float() - wanted[:real].float()).norm() <= 4e-3 * wanted[:real].float().norm()
        assert (weight - wanted_weight).norm() <= 5e-3 * wanted_weight.norm()
