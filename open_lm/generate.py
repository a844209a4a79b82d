"""Text from a model, token by token.

Shapes: B batch, S prompt length, V vocabulary.
"""

import torch
from torch import Tensor

from open_lm.model import Transformer
from open_lm.nn.attention import LayerCache


@torch.no_grad()
def generate(
    model: Transformer, tokens_BS: Tensor, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Prompts (B, S) → prompts with their continuations (B, S + new_tokens).

    Temperature 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature),
    by a random stream seeded by `seed`. Raises ValueError for an empty prompt or beyond the model's seq_len.

    An MoE with a capacity drops tokens by how many are routed together, and here that is B at a time: for
    text that does not depend on the batching, build the model with moe.capacity_factor 0 (same parameters).
    """
    length = tokens_BS.shape[1]
    if length < 1 or new_tokens < 0 or temperature < 0:
        raise ValueError(
            f"prompt of {length} tokens, new_tokens {new_tokens}, temperature {temperature}: expected at "
            "least one prompt token, and nothing negative"
        )
    if length + new_tokens > model.config.seq_len:
        raise ValueError(
            f"prompt of {length} + new_tokens {new_tokens} > the model's seq_len {model.config.seq_len}: "
            "shorten one"
        )
    was_training = model.training
    model.eval()
    stream = torch.Generator(tokens_BS.device).manual_seed(seed)
    caches = [LayerCache() for _ in range(model.config.n_layers)]
    step_BS = tokens_BS
    for _ in range(new_tokens):
        logits_BV = model(step_BS, caches=caches).logits_BSV[:, -1].float()
        step_BS = choose(logits_BV, temperature, stream)
        tokens_BS = torch.cat((tokens_BS, step_BS), dim=1)
    model.train(was_training)
    return tokens_BS


def choose(logits_BV: Tensor, temperature: float, stream: torch.Generator) -> Tensor:
    """The next token of each sequence, (B, 1)."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=stream)
