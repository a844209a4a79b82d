"""open_lm's flags that have no work to do here, and those whose work is still to come."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class LaterConfig:
    """Accepted from open_lm's commands: either a warning (the flag has no work to do here) or "not yet"."""

    train_data_upsampling_factors: str | None = None
    """Not yet."""
    target_mask_left: int | None = None
    """Not yet."""
    target_mask_individual: int | None = None
    """Not yet."""
    squash_mask_left: bool = False
    """Not yet."""
    data_tolerate_error_p: float = 0.09
    """Does nothing: exactly the requested tokens are read, or the run does not start."""
    data_tolerate_num_ckpts: int = 0
    """Does nothing: as --data-tolerate-error-p."""
    hf_model: str | None = None
    """Not yet."""
    hf_seq_len: int | None = None
    """Not yet."""
    hf_fsdp_block: str | None = None
    """Not yet."""
    torchscript: bool = False
    """Does nothing: use --torchcompile."""
    trace: bool = False
    """Does nothing: use --torchcompile."""
    use_bn_sync: bool = False
    """Does nothing: there is no batch norm."""
    moe_weight_parallelism: Annotated[bool, arg(name="moe-weight-parallelism")] = False
    """Does nothing: --fsdp shards the experts' weights."""
    moe_expert_model_parallelism: Annotated[bool, arg(name="moe-expert-model-parallelism")] = False
    """Not yet."""
    fsdp_cpu_offload: bool = False
    """Not yet."""
    fsdp_use_orig_params: bool = False
    """Does nothing: FSDP2 always keeps the original parameters."""
    fsdp_backward_prefetch: bool = False
    """Does nothing: FSDP2 always prefetches the next block in the backward pass."""
    fsdp_limit_all_gathers: bool = False
    """Does nothing: FSDP2 bounds its gathered memory by itself."""
    fsdp_checkpoint: bool = False
    """Does nothing: use --grad-checkpointing."""
    fsdp_hybrid: bool = False
    """Not yet."""
    fsdp_hybrid_o2: bool = False
    """Not yet."""
    preset_world_size: int | None = None
    """Not yet."""
    log_logit_mean: bool = False
    """Not yet."""
    copy_codebase: bool = False
    """Not yet."""
    load_pretrained_state: bool = False
    """Not yet."""
    save_most_recent: bool = False
    """Not yet."""
    delete_previous_checkpoint: bool = False
    """Not yet."""
    remote_sync: str | None = None
    """Not yet."""
    remote_sync_frequency: int = 300
    """Not yet."""
    remote_sync_protocol: Literal["s3", "fsspec"] = "s3"
    """Not yet."""
    val_seq_ci: bool = False
    """Not yet."""
    val_tok_ci: bool = False
    """Not yet."""
    val_max_pop_ci: int | None = None
    """Not yet."""
    val_iter_ci: int = 10_000
    """Not yet."""
    average: tuple[str, ...] | None = None
    """Not yet."""
    average_coefficients: tuple[float, ...] | None = None
    """Not yet."""
    averagers: str | None = None
    """Not yet."""
    log_avg_model_training_loss: int = 0
    """Not yet."""
    distill_model: str | None = None
    """Not yet."""
    distill_pretrained: str | None = None
    """Not yet."""
    use_bnb_linear: str | None = None
    """Not yet."""
