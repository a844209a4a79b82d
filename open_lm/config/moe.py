"""The mixture-of-experts layers. `moe.num_experts` is the flag `--moe-num-experts`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

RouterName = Literal[
    "top_k",
    "expert_choice",
    "expert_choice_causal",
    "sinkhorn",
    "threshold",
    "coordinate_descent",
    "quantile",
    "hash",
    "uniform",
]
BalanceName = Literal["aux", "sequence", "global", "first_choice", "importance", "bias", "none"]
ExpertName = Literal[
    "gelu",
    "gelu_exact",
    "relu",
    "relu_squared",
    "silu",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "reglu",
    "bilinear",
]
BackendName = Literal["auto", "reference", "grouped_mm", "triton", "megablocks"]
DropName = Literal["position", "choice", "probs", "random"]


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts. Defaults are open_lm's: ungated tanh-GELU experts of width 4d, capacity 1.25."""

    freq: Annotated[int, arg(name="moe-freq")] = 0
    """Layer N is an MoE when N % freq == 0; 0: a dense model."""

    layers: Annotated[tuple[int, ...] | None, arg(name="moe-layers")] = None
    """The MoE layers by their numbers, from 0, instead of --moe-freq."""

    layer_pattern: Annotated[str | None, arg(name="moe-layer-pattern")] = None
    """One 0 (dense) or 1 (MoE) per layer, as Megatron writes it: "[0]*3+[1]*24" or "([0]+[1])*12"."""

    first_dense: Annotated[int, arg(name="moe-first-dense")] = 0
    """The first so many layers stay dense, whatever --moe-freq says (DeepSeek's first_k_dense_replace)."""

    num_experts: Annotated[int | tuple[int, ...] | None, arg(name="moe-num-experts")] = None
    """Experts in each MoE layer; several numbers, one per MoE layer, make a pyramid (PR-MoE)."""

    top_k: Annotated[int, arg(name="moe-top-k")] = 2
    """Experts that each token is sent to."""

    router: Annotated[RouterName, arg(name="moe-router")] = "top_k"
    """How tokens choose experts: a function in open_lm/moe/routers."""

    score: Annotated[Literal["softmax", "sigmoid"], arg(name="moe-score")] = "softmax"
    """What turns a token's logits into the scores that it chooses by and weighs with."""

    score_order: Annotated[Literal["before", "after"], arg(name="moe-score-order")] = "before"
    """The softmax over all experts, before the selection, or over the k chosen, after it (Megatron's default)."""

    normalize_weights: Annotated[bool, arg(name="moe-normalize-weights")] = False
    """Rescale a token's k combine weights to sum to one (Mixtral does, OLMoE and open_lm do not)."""

    normalize_after_drops: Annotated[bool, arg(name="moe-normalize-after-drops")] = False
    """Rescale what is left of a token's combine weights after drops to sum to one (GShard, DeepSpeed)."""

    weight_scale: Annotated[float, arg(name="moe-weight-scale")] = 1.0
    """Multiplies the combine weights (DeepSeek-V3: 2.5)."""

    num_groups: Annotated[int, arg(name="moe-num-groups")] = 1
    """Group-limited routing: experts come in so many groups, of which a token may use --moe-top-groups."""

    top_groups: Annotated[int, arg(name="moe-top-groups")] = 1
    """Groups that a token's experts come from: those whose best k/top_groups scores have the largest sum."""

    jitter: Annotated[float, arg(name="moe-jitter")] = 0.0
    """In training the router sees its input times U(1-jitter, 1+jitter); the experts do not. DeepSpeed: .01."""

    noise: Annotated[Literal["none", "rsample", "second_expert"], arg(name="moe-noise")] = "none"
    """In training, Gumbel noise on the logits that experts are selected by: for all choices (DeepSpeed's RSample),
    or for all but the first (its and GShard's sampled second expert). The weights are without it."""

    threshold: Annotated[float | tuple[float, ...], arg(name="moe-threshold")] = 0.2
    """Routers threshold and coordinate_descent: choice j >= 2 with weight g is kept with probability g / threshold;
    in evaluation, which must repeat, if that is more than 1/2. One number for all these choices, or one each."""

    eval_threshold: Annotated[float | tuple[float, ...] | None, arg(name="moe-eval-threshold")] = None
    """The same in evaluation. Default: as in training."""

    straight_through: Annotated[bool, arg(name="moe-straight-through")] = False
    """Multiply what an expert sees by 1 whose gradient is the combine weight's (ST-MoE's dispatch)."""

    balance: Annotated[tuple[BalanceName, ...] | None, arg(name="moe-balance")] = None
    """What keeps the experts' loads even. aux: Switch's loss per micro-batch; sequence: per sequence; global: with
    the counts of all ranks and the step's micro-batches so far; first_choice: of first choices; importance:
    Shazeer's two CV²; bias: DeepSeek-V3's, no loss. Default: aux; none for routers that balance by themselves."""

    loss_weight: Annotated[float | tuple[float, ...], arg(name="moe-loss-weight")] = 0.1
    """Weight of each balancing loss, one for all or one for each loss of --moe-balance. A loss is 1 when balanced
    (importance: 0), a mean over MoE layers and micro-batches."""

    bias_rate: Annotated[float, arg(name="moe-bias-rate")] = 1e-3
    """--moe-balance bias: by how much an expert's bias moves after each step."""

    z_loss_weight: Annotated[float, arg(name="moe-z-loss-weight")] = 0.0
    """Weight of the router z-loss: mean over MoE layers and tokens of logsumexp(router logits) squared."""

    capacity_factor: Annotated[float, arg(name="moe-capacity-factor")] = 1.25
    """An expert takes at most int(factor * k * T / E) of T tokens; 0: dropless."""

    eval_capacity_factor: Annotated[float | None, arg(name="moe-eval-capacity-factor")] = None
    """The factor in evaluation. Default: as in training."""

    min_capacity: Annotated[int, arg(name="moe-min-capacity")] = 0
    """An expert's capacity is at least this (DeepSpeed, ST-MoE: 4)."""

    capacity_rounding: Annotated[Literal["down", "up"], arg(name="moe-capacity-rounding")] = "down"
    """Of factor * k * T / E: down as MegaBlocks and ST-MoE, up as DeepSpeed."""

    capacity_per: Annotated[Literal["batch", "sequence"], arg(name="moe-capacity-per")] = "batch"
    """T is a micro-batch of a rank, or each sequence for itself (ST-MoE)."""

    drop_policy: Annotated[DropName, arg(name="moe-drop-policy")] = "position"
    """Who is dropped by a full expert. position: the last tokens; choice: second choices after all first ones, then
    the last tokens (GShard, DeepSpeed, ST-MoE); probs: the smallest weights; random: any, in training (DeepSpeed's
    random token selection), in evaluation as `choice`."""

    pad_to_capacity: Annotated[bool, arg(name="moe-pad-to-capacity")] = False
    """Compute every expert on exactly its capacity of rows, empty ones as zeros: the same numbers, other shapes."""

    ffn_type: Annotated[ExpertName, arg(name="moe-ffn-type")] = "gelu"
    """What an expert is: act(x w1) w2, or gated, act(x w1) * (x v1) w2: swiglu, geglu, geglu_tanh, reglu, bilinear.
    gelu is the tanh approximation."""

    hidden_dim: Annotated[int | None, arg(name="moe-hidden-dim")] = None
    """Width of an expert. Default: 4d ungated, 256*ceil(int(8d/3)/256) gated."""

    expert_bias: Annotated[bool, arg(name="moe-expert-bias")] = False
    """Give each expert's products biases of its own."""

    output_bias: Annotated[bool, arg(name="moe-output-bias")] = True
    """The one bias that MegaBlocks and open_lm add to every token's output."""

    shared_hidden_dim: Annotated[int, arg(name="moe-shared-hidden-dim")] = 0
    """Width of the shared expert, which every token goes to (n shared experts of width F: n * F); 0: none."""

    shared_mix: Annotated[Literal["sum", "olmo", "gate"], arg(name="moe-shared-mix")] = "sum"
    """routed + shared; (k routed + shared) / (k + 1); or routed + sigmoid(x w) shared."""

    residual: Annotated[bool, arg(name="moe-residual")] = False
    """PR-MoE: softmax(x w + b) mixes the routed output and an MLP as wide as an expert, for each token."""

    dense_before: Annotated[bool, arg(name="moe-dense-before")] = False
    """ST-MoE's sparse block: a dense FFN with its norm and residual before the MoE layer."""

    dense_after: Annotated[bool, arg(name="moe-dense-after")] = False
    """The same after the MoE layer."""

    init: Annotated[Literal["open_lm", "scaled"], arg(name="moe-init")] = "open_lm"
    """Expert initialisation: N(0, .02) as open_lm, or scaled by fan-in and depth as its dense layers."""

    backend: Annotated[BackendName, arg(name="moe-backend")] = "auto"
    """Expert computation: `reference` loops over experts, `grouped_mm` is one grouped matrix product, `triton` has
    kernels of its own (a GPU, Ampere or newer), `megablocks` has its (a GPU, and the package). auto: triton on a
    Hopper GPU in 16 bits, else grouped_mm."""

    recompute: Annotated[bool, arg(name="moe-recompute")] = False
    """--moe-backend triton: save the experts' input alone, and compute their pre-activation anew in backward."""

    dim: Suppress[int | None] = None
    """Width d of the tokens; a model gives it to its layers (`placement.layer_config`), a library's user here."""

    @property
    def enabled(self) -> bool:
        """Whether a model has MoE layers at all."""
        return self.freq > 0 or self.layers is not None or self.layer_pattern is not None

    @property
    def balances(self) -> tuple[str, ...]:
        """The methods of --moe-balance, its default resolved, "none" left out."""
        default = () if self.router in SELF_BALANCED else ("aux",)
        return tuple(name for name in (default if self.balance is None else self.balance) if name != "none")

    @property
    def losses(self) -> dict[str, float]:
        """Each balancing loss of --moe-balance and its weight."""
        names = [name for name in self.balances if name != "bias"]
        weights = (
            self.loss_weight if isinstance(self.loss_weight, tuple) else (self.loss_weight,) * len(names)
        )
        return dict(zip(names, weights, strict=True))


# Routers whose assignments are even by construction, or do not depend on what is learned.
SELF_BALANCED = ("expert_choice", "expert_choice_causal", "sinkhorn", "quantile", "hash", "uniform")
