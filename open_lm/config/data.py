"""Where the tokens come from, and in which order."""

from dataclasses import dataclass
from typing import Literal

DATA_KEYS = ("auto", "json", "json.gz", "txt", "u16", "u32")


@dataclass(frozen=True)
class DataConfig:
    """Training data. Every sequence is `seq_len + 1` token ids."""

    train_data: tuple[str, ...] | None = None
    """Tar shards, one entry per source: local paths, s3://, `pipe:COMMAND`, with {00..99} brace ranges;
    `::` joins several patterns into one source."""

    dataset_manifest: tuple[str, ...] | None = None
    """Manifests, one per source: JSON lines {"shard": NAME, "num_sequences": N}; tars lie beside them."""

    train_data_mix_weights: tuple[float, ...] | None = None
    """One weight per source. They hold in every batch to within one sequence. Default: all sources alike."""

    train_data_upsampling_factors: tuple[str, ...] | None = None
    """One factor per source (`2 1 0.5` or `2::1::0.5`), instead of weights: a source is read in proportion to its
    sequences times its factor. It may be used up as many times as its factor says, but at least once."""

    dataset_type: Literal["auto", "webdataset", "synthetic"] = "auto"
    """`synthetic`: random tokens, to time a model without data."""

    data_key: str = "auto"
    """Which member of a tar sample holds the tokens: json, json.gz, txt, u16 or u32 (little-endian ids); auto: the
    one of these that there is."""

    train_num_samples: int | None = None
    """TOKENS (open_lm's name notwithstanding) in a checkpoint interval, i.e. in one of --epochs."""

    dataset_resampled: bool = False
    """Draw sequences with replacement, so that no source ever runs out."""

    multiple_data_passes: bool = False
    """Let a source be read again (reshuffled) once it is used up. Without it, too little data is an error."""

    disable_buffer: bool = False
    """Read the sequences of a shard in their stored order instead of shuffling them."""

    workers: int = 1
    """Data-loading processes per rank; 0 loads in the training process. Never changes the order."""

    data_cache: str | None = None
    """Folder for shards fetched from s3://, http(s):// and `pipe:`, shared by this host's ranks and its later
    runs. Default: open_lm-shards-USER in the folder for temporary files (TMPDIR)."""

    data_cache_gib: float = 8.0
    """Size limit of --data-cache; never more than half the disk's free space. The least recently used shards
    go first. 64 per source are in use at a time, and those stay on the disk beyond the limit until the processes
    that read them close them (a warning says where that is so). Until an s3:// shard of u16 or u32 members is
    there, its rows are read by byte ranges, and compared with it when it is; a run's last batch waits for that. 0
    keeps a shard only while a process has it open, and reads nothing by ranges."""

    data_retries: int = 6
    """Retries of a remote read that is throttled, reset, stalled or answered by 5xx, after about 1, 2, 4, …
    seconds. What is denied (403) or missing (404) fails at once. (A local shard that its manifest names is looked
    for twice more, as network disks lack one that is being replaced for a moment.)"""

    data_timeout: float = 30.0
    """Seconds that connecting to a remote source, and each wait for its next bytes (of s3://, http(s)://,
    `pipe:`), may take before it is tried again."""

    ignore_parse_errors: bool = False
    """Skip (mask and count) a sample that cannot be read, or is damaged, instead of failing with its name. Of a
    local tar that is cut short the readable part is used; each of the other samples that its manifest promises
    counts as bad."""

    bad_sample_limit: int | None = None
    """With --ignore-parse-errors: more bad samples than this (unreadable or too short; of all ranks, resumed runs
    included) end the run with an error that names the last one; in evaluation, of each --val-data entry. Default:
    no limit."""

    append_data: bool = False
    """--resume: sources may have grown at their end since the checkpoint. What the present pass has left and all
    new sequences, evenly mixed, complete it, each once; later passes shuffle everything."""

    target_mask_left: int | None = None
    """Token id: targets up to and including its last occurrence among them are ignored, in training and
    evaluation; all count in a sequence without it. A negative id counts from the vocabulary's end."""

    document_loss_mask: bool = False
    """The first token of a document, behind an --end-of-text, is no target: nothing says what comes next."""

    target_mask_individual: int | None = None
    """Token id (padding): never a target, in training and evaluation. Negative: from the vocabulary's end."""

    squash_mask_left: bool = False
    """Take the --target-mask-left tokens themselves out of inputs and targets, and pad at the right with
    --target-mask-individual."""

    @property
    def upsampling_factors(self) -> tuple[str, ...]:
        """--train-data-upsampling-factors, one text per source; () without the flag."""
        factors = self.train_data_upsampling_factors
        return tuple("::".join(factors).split("::")) if factors else ()
