"""The section `train`: length of the run, batches, device and precision."""

from typing import Annotated, Literal

from pydantic import Field

from lightlm.quantities.types import BatchTokens, Span, Tokens, span_tokens
from lightlm.recipe.sections.distill import DistillSection
from lightlm.recipe.sections.section import Section


class TrainSection(Section):
    tokens: Annotated[Tokens, Field(ge=1)]
    """Tokens to train on in total, rounded up to whole batches."""
    batch_tokens: BatchTokens
    """Tokens per global batch. K and M are powers of 1,024 here, so 512K is 2**19. The batch does not depend on the
    number of devices: gradients accumulate."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens per training sequence. 0 takes model.max_seq_len."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per device and forward pass. `auto` fits them to the device's memory."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Model to start from in place of random weights: a run, a checkpoint, a Hugging Face folder or a Hub id. Only its
    weights are taken; optimizer, schedule and data order start anew. The section `model` is taken from it as well, and
    may be left out. null starts from random weights."""
    seed: int = Field(default=1337, ge=-(2**63), lt=2**63)
    """Seed of the initial weights, the data order and the samples."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of matrix products. `auto` takes bfloat16 where the device is fast at it, float16 with a scaled loss on
    CUDA before Ampere, else float32; on a CPU, a new run measures. The run's recipe.yaml keeps the answer. Weights stay
    in float32."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Threads of a CPU, for a run of one process. `auto` measures for a second at the start, since another process on a
    core makes fewer threads faster; the run's recipe.yaml keeps the number, because sums are rounded by it. The
    variable OMP_NUM_THREADS decides wherever it is set, and `--nproc` shares the cores between the processes."""
    compile: Literal["auto"] | bool = "auto"
    """Use torch.compile. `auto` decides by device and by the length of the run."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks, and compute the rest again in the backward pass: less memory, more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` keeps a copy of the model in each, `fsdp` shards one model (FSDP2)."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradients. 0 does not clip."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of values set to 0 in training, in the embeddings and in the output of attention and of each feed-forward
    network (arXiv 1706.03762): against overfitting, for several epochs on a small corpus. 0.1 is usual."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of mean(logsumexp(logits)^2), which keeps logits small. PaLM uses 1e-4 (arXiv 2204.02311). The losses
    shown leave it out."""
    distill: DistillSection | None = None
    """Learn from a larger model as well as from the tokens: {teacher: MODEL, weight: 0.5}. null learns from tokens."""
    ema: Span = "0%"
    """Half-life of an exponential moving average of the weights, a share of train.tokens or tokens. It is what the run
    validates, samples, scores and exports; checkpoints also hold the last weights. 0% keeps no average."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Validations in a row without a new lowest loss after which the run ends (early stopping). null never does."""
    skip_spikes: bool = False
    """Drop the update of a step whose loss or gradient norm is a spike, NaN or infinite."""
    spike_threshold: float = Field(default=6.0, gt=0)
    """Robust standard deviations above the median of the last steps at which a step is a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps that a step is compared with to find spikes."""

    @property
    def averages(self) -> bool:
        """Whether the run keeps an average of its weights."""
        return span_tokens(self.ema, 10**18) > 0
