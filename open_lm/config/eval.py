"""Held-out perplexity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation. --val-data without training data evaluates --resume, --pretrained or
    --average and stops."""

    val_data: tuple[str, ...] | None = None
    """Each entry (shards as in --train-data, or a manifest) is evaluated by itself."""

    val_data_key: tuple[str, ...] | None = None
    """--data-key of each entry. Default: --data-key."""

    val_num_samples: int | None = None
    """Evaluate at most this many TOKENS of each entry."""

    val_frequency: int = 1
    """Evaluate after every Nth interval, and after the last."""

    global_val_batch_size: int | None = None
    """Sequences per forward pass over all ranks. Default: --batch-size per rank."""

    val_seq_ci: bool = False
    """Bootstrap 95 % interval of the mean loss over sequences."""

    val_tok_ci: bool = False
    """Bootstrap 95 % interval of the mean loss over tokens."""

    val_max_pop_ci: int | None = None
    """Draw at most this many losses per bootstrap sample. Default: as many as there are."""

    val_iter_ci: int = 10_000
    """Bootstrap samples."""
