"""Attention and positions within documents: packed sequences against each document by itself."""

import pytest
import torch

from open_lm.config.model import ModelConfig
from open_lm.model import Transformer, build
from open_lm.nn.attention import can_skip, torch_attn
from open_lm.nn.documents import find_documents

END, V, S = 7, 32, 24
SHAPES = {
    "rotary": {},
    "llama_rotary, grouped queries": {"positional_embedding_type": "llama_rotary", "n_kv_heads": 2},
    "learned": {"positional_embedding_type": "learned"},
    "none": {"positional_embedding_type": "none"},
    "latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6},
}


def make_model(**options) -> Transformer:
    config = ModelConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        seq_len=S,
        vocab_size=V,
        end_of_text=END,
        document_attention=True,
        **options,
    )
    model = build(config, "cpu", seed=3)
    if model.pos_embeddings is not None:
        torch.nn.init.normal_(model.pos_embeddings.weight)
    return model


def packed() -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """(tokens_BS, the documents of each row): an empty document, one of the whole row, a row that ends in one."""
    stream = torch.Generator().manual_seed(0)
    lengths = [[5, 1, 11, 7], [24], [1, 22, 1]]
    rows = []
    for row in lengths:
        documents = [torch.randint(END + 1, V, (length,), generator=stream) for length in row]
        for document in documents[:-1]:
            document[-1] = END
        rows.append(documents)
    return torch.stack([torch.cat(row) for row in rows]), rows


def test_edges_and_positions():
    tokens_BS, rows = packed()
    documents = find_documents(tokens_BS, END)
    assert documents.edge_N.tolist() == [0, 5, 6, 17, 24, 48, 49, 71, 72]
    wanted = [[place for document in row for place in range(len(document))] for row in rows]
    assert documents.position_BS.tolist() == wanted
    number_BS = documents.number_BS()
    assert number_BS[0].tolist() == [1] * 5 + [2] + [3] * 11 + [4] * 7
    # five documents: padded to eight, the empty ones at the end
    five = find_documents(tokens_BS[:2], END)
    assert five.edge_N.tolist() == [0, 5, 6, 17, 24, 48, 48, 48, 48]
    assert find_documents(tokens_BS[1:2], END).edge_N.tolist() == [0, 24]


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_packed_row_gives_each_document_its_own_logits_and_gradients(options):
    tokens_BS, rows = packed()
    model = make_model(**options)
    slope_BSV = torch.randn(*tokens_BS.shape, V, generator=torch.Generator().manual_seed(1))

    logits_BSV = model(tokens_BS).logits_BSV
    assert logits_BSV is not None
    (logits_BSV * slope_BSV).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            alone_SV = model(document[None]).logits_BSV[0]  # type: ignore[index]
            place = slice(start, start + len(document))
            torch.testing.assert_close(logits_BSV[row, place], alone_SV, atol=1e-5, rtol=1e-5)
            (alone_SV * slope_BSV[row, place]).sum().backward()
            start += len(document)
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_without_it_documents_are_seen():
    tokens_BS, _ = packed()
    apart = make_model()
    together = build(ModelConfig(dim=32, n_layers=2, n_heads=4, seq_len=S, vocab_size=V), "cpu", seed=3)
    a, b = apart(tokens_BS).logits_BSV, together(tokens_BS).logits_BSV
    assert torch.equal(a[1], b[1])  # one document
    assert (a[0, 6:] - b[0, 6:]).abs().max() > 1e-3


def test_the_loss_and_recomputation():
    tokens_BS, _ = packed()
    model = make_model()
    targets_BS = tokens_BS.roll(-1, 1)
    plain = model(tokens_BS, targets_BS).loss.objective_sum
    model.grad_checkpointing = True
    again = model(tokens_BS, targets_BS, documents=find_documents(tokens_BS, END)).loss.objective_sum
    assert torch.equal(plain, again)
    again.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_compiles():
    tokens_BS, _ = packed()
    model = make_model()
    wanted = model(tokens_BS).logits_BSV
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(tokens_BS).logits_BSV, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped"])
def test_the_kernel_that_skips_is_the_mask(head_dim, heads):
    """bf16 flash attention of documents against fp32 attention with a mask, outputs and gradients."""
    stream = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, 40, (3, 257), generator=stream)
    documents = find_documents(tokens_BS, END).to(torch.device("cuda"))
    shapes = [(3, 257, 4, head_dim), (3, 257, heads, head_dim), (3, 257, heads, head_dim)]
    exact = [
        torch.randn(shape, generator=stream).bfloat16().float().cuda().requires_grad_() for shape in shapes
    ]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    slope = torch.randn(shapes[0], generator=stream).cuda()
    assert can_skip(low[0], low[2])
    assert not can_skip(exact[0], exact[2])
    for inputs in (exact, low):
        out = torch_attn(*inputs, causal=True, documents=documents)
        (out.float() * slope).sum().backward()
    found = [torch_attn(*inputs, causal=True, documents=documents).float() for inputs in (low, exact)]
    pairs = [found, *((a.grad.float(), b.grad) for a, b in zip(low, exact, strict=True))]  # type: ignore[union-attr]
    for ours, wanted in pairs:
        assert (ours - wanted).norm() < 1e-2 * wanted.norm()
