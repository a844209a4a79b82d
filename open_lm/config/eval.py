"""Held-out perplexity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation. --val-data without training data evaluates --resume, --pretrained or
    --average and stops."""

    val_data: tuple[str, ...] | None = None
    """Each entry (shards as in --train-data, or a manifest) is evaluated by itself; its metrics are valid/loss …,
    of several entries valid/NAME/loss …."""

    val_data_name: tuple[str, ...] | None = None
    """NAME of each entry in the metrics and in results.jsonl. Default: what differs in their paths."""

    val_data_key: tuple[str, ...] | None = None
    """--data-key of each entry. Default: --data-key."""

    val_num_samples: int | None = None
    """Evaluate at most this many TOKENS of each entry, from its beginning, but at least one sequence."""

    val_frequency: int = 1
    """Evaluate after every Nth interval, and after the last."""

    global_val_batch_size: int | None = None
    """Sequences per forward pass over all ranks. Default: as in training, batch over --accum-freq."""

    val_seq_ci: bool = False
    """Bootstrap 95 % interval of the mean over sequences of each one's mean loss."""

    val_tok_ci: bool = False
    """Bootstrap 95 % interval of the mean loss over tokens; 4 bytes of memory a token on rank 0."""

    val_max_pop_ci: int | None = None
    """Draw at most this many losses per bootstrap sample, which widens the interval. Default: as many as there
    are."""

    val_iter_ci: int = 10_000
    """Bootstrap samples. Those of more than 100,000 losses are not drawn: their limit is computed."""
