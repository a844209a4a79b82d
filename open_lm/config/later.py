"""open_lm's flags that have no work to do here, and those whose work is still to come."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg


@dataclass(frozen=True)
class LaterConfig:
    """Accepted from open_lm's commands: either a warning (the flag has no work to do here) or "not yet"."""

    data_tolerate_error_p: float = 0.09
    """Does nothing: exactly the requested tokens are read, or the run does not start."""
    data_tolerate_num_ckpts: int = 0
    """Does nothing: as --data-tolerate-error-p."""
    hf_model: str | None = None
    """Not yet: refused with an error."""
    hf_seq_len: int | None = None
    """Not yet: refused with an error."""
    hf_fsdp_block: str | None = None
    """Not yet: refused with an error."""
    torchscript: bool = False
    """Does nothing: use --torchcompile."""
    trace: bool = False
    """Does nothing: use --torchcompile."""
    use_bn_sync: bool = False
    """Does nothing: there is no batch norm."""
    moe_weight_parallelism: Annotated[bool, arg(name="moe-weight-parallelism")] = False
    """Does nothing: --fsdp shards the experts' weights."""
    moe_expert_model_parallelism: Annotated[bool, arg(name="moe-expert-model-parallelism")] = False
    """Not yet: refused with an error."""
    fsdp_use_orig_params: bool = False
    """Does nothing: FSDP2 always keeps the original parameters."""
    fsdp_backward_prefetch: bool = False
    """Does nothing: FSDP2 always prefetches the next block in the backward pass."""
    fsdp_limit_all_gathers: bool = False
    """Does nothing: FSDP2 bounds its gathered memory by itself."""
    fsdp_checkpoint: bool = False
    """Does nothing, as in open_lm: use --grad-checkpointing."""
    distill_model: str | None = None
    """Not yet: refused with an error."""
    distill_pretrained: str | None = None
    """Not yet: refused with an error."""
    use_bnb_linear: str | None = None
    """Not yet: refused with an error."""
