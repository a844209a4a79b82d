"""The Transformer: token ids in, logits and router statistics out. Parameter names are open_lm's.

Shapes: B batch, S sequence, D model width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import EXPERTS_CHOOSE
from open_lm.loss import LinearLoss, linear_cross_entropy
from open_lm.moe.layer import MoE, Tokens
from open_lm.moe.placement import layer_config, moe_layers
from open_lm.moe.stats import RouterStats
from open_lm.nn.attention import LayerCache, positions
from open_lm.nn.block import Block
from open_lm.nn.documents import Documents, find_documents
from open_lm.nn.ffn import FFNS
from open_lm.nn.init import initialize_
from open_lm.nn.norm import NORMS
from open_lm.nn.rotary import Table


class Output(NamedTuple):
    """What a forward pass returns."""

    logits_BSV: Tensor | None
    """In the dtype of the computation; None where targets were given."""
    router_stats: tuple[RouterStats, ...]
    """One per MoE layer, lowest layer first; empty for a dense model."""
    loss: LinearLoss | None = None
    """Where targets were given."""


class Transformer(nn.Module):
    """A decoder-only language model with mixture-of-experts layers where `config.moe` says so.

    `grad_checkpointing = True` keeps only each block's input and recomputes the rest in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        norm, sparse = NORMS[config.model_norm], set(moe_layers(config))
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        learned = config.positional_embedding_type == "learned"
        self.pos_embeddings = nn.Embedding(config.seq_len, config.dim) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.post_embed_norm = norm(config.dim, config.norm_eps) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList()
        for layer in range(config.n_layers):
            mixed = layer in sparse
            feed_forward = MoE(layer_config(config, layer)) if mixed else FFNS[config.ffn_type](config)
            self.layers.append(Block(config, feed_forward, sparse=mixed))
        self.norm = norm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights_()

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        *,
        real_BS: Tensor | None = None,
        documents: Documents | None = None,
        caches: Sequence[LayerCache] | None = None,
        z_loss_coefficient: float = 0.0,
    ) -> Output:
        """Logits of each next token; or, given the targets, their loss without logits in memory.

        real_BS (bool) is False for padding, of which MoE layers take no notice; None: all tokens are real.
        With `documents` attention and positions stay within each; with --document-attention they are looked for in
        the tokens if not given. With caches, one per layer, the tokens follow those already there.
        """
        if self.config.document_attention and documents is None and caches is None:
            documents = documents_of(tokens_BS.cpu(), self.config, tokens_BS.device)
        position_S = positions(tokens_BS, caches[0] if caches else None, documents)
        x_BSD = self.embed(tokens_BS, position_S, caches[0].length if caches else 0)
        # once, not in every block: compiled blocks would compute each cosine anew for each batch and head
        first = self.layers[0]
        assert isinstance(first, Block)
        table = first.attention.position_table(position_S)
        about = Tokens(tokens_BS if self.config.moe.router == "hash" else None, real_BS)
        if caches is None:
            x_BSD, router_stats = self.body(x_BSD, table, about, documents)
        else:
            router_stats = []
            for block, cache in zip(self.layers, caches, strict=True):
                x_BSD, stats = block(x_BSD, cache, table, about, documents)
                router_stats += [] if stats is None else [stats]
            x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return Output(self.output(x_BSD), tuple(router_stats))
        loss = linear_cross_entropy(
            x_BSD,
            self.output.weight,
            targets_BS,
            z_loss_coefficient=z_loss_coefficient,
        )
        return Output(None, tuple(router_stats), loss)

    def body(
        self, x_BSD: Tensor, table: Table, about: Tokens, documents: Documents | None
    ) -> tuple[Tensor, list[RouterStats]]:
        """All blocks in turn and the last norm: x_BSD and the statistics of the sparse ones."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        router_stats = []
        for block in self.layers:
            if recompute:
                x_BSD, stats = checkpoint(block, x_BSD, None, table, about, documents, use_reentrant=False)
            else:
                x_BSD, stats = block(x_BSD, None, table, about, documents)
            if stats is not None:
                router_stats.append(stats)
        return self.norm(x_BSD), router_stats

    def embed(self, tokens_BS: Tensor, position_S: Tensor, offset: int) -> Tensor:
        """x_BSD of tokens at positions (S,) or (B, S), behind `offset` others. Raises ValueError for texts beyond
        seq_len where positions are learned."""
        x_BSD = self.tok_embeddings(tokens_BS)
        if self.pos_embeddings is not None:
            end, seq_len = offset + tokens_BS.shape[1], self.config.seq_len
            if end > seq_len:
                raise ValueError(
                    f"a text of {end} tokens, but the model has learned the positions of seq_len {seq_len}: "
                    "shorten it"
                )
            x_BSD = x_BSD + self.pos_embeddings(position_S)
        return self.dropout(self.post_embed_norm(x_BSD))

    def tie_weights_(self) -> None:
        """With weight_tying, makes the embedding and the output one Parameter again (to_empty parts them)."""
        if self.config.weight_tying:
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn, recurse=True):
        """Behind .to, .to_empty, .bfloat16 …, which replace each module's parameters one by one."""
        super()._apply(fn, recurse)
        self.tie_weights_()
        return self


def documents_of(tokens_BS: Tensor, config: ModelConfig, device: torch.device) -> Documents | None:
    """Where the documents of tokens in host memory begin, on `device`; None unless --document-attention asks."""
    if not config.document_attention:
        return None
    assert config.end_of_text is not None
    return find_documents(tokens_BS, config.end_of_text % config.vocab_size).to(device)


def build(config: ModelConfig, device: torch.device | str = "meta", seed: int = 0) -> Transformer:
    """The model in fp32: shapes only on the meta device (the default), initialised from `seed` elsewhere."""
    with torch.device("meta"):
        model = Transformer(config)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialize_(model, config, seed)
    return model


class Count(NamedTuple):
    """Parameters of a model, tied ones once."""

    total: int
    active: int
    """Those that one token uses: of each MoE layer's experts, top_k; where experts choose tokens, the mean of how
    many choose it, which the capacity sets: top_k * capacity_factor."""


def count_parameters(config: ModelConfig) -> Count:
    """Exact numbers, from the meta device: no memory is taken."""
    total = idle = 0
    for name, parameter in build(config).named_parameters():
        total += parameter.numel()
        if is_of_experts(name):
            experts = parameter.shape[0]
            used = min(experts_per_token(config.moe), experts)
            idle += parameter.numel() - round(parameter.numel() / experts * used)
    return Count(total, total - idle)


def is_of_experts(name: str) -> bool:
    """Whether the parameter is a stack of one slice per expert."""
    return ".experts.mlp." in name


def experts_per_token(moe: MoEConfig) -> float:
    """How many experts compute a token, drops not counted; in the mean, where experts choose."""
    return moe.top_k * moe.capacity_factor if moe.router in EXPERTS_CHOOSE else moe.top_k
