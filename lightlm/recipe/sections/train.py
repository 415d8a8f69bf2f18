"""The section `train`: length of the run, batches, device and precision."""

from typing import Annotated, Literal

from pydantic import Field

from lightlm.optim.section import Problem
from lightlm.quantities.types import BatchTokens, Span, Tokens, span_tokens
from lightlm.recipe.sections.distill import STORED, DistillSection
from lightlm.recipe.sections.section import Section


class MTPSection(Section):
    """Multi-token prediction, as DeepSeek-V3 trains with it (arXiv 2412.19437, section 2.2)."""

    depth: int = Field(default=0, ge=0)
    """Heads, each with a block of its own, that predict the tokens after the next one: 1 is DeepSeek-V3's. They share
    the token table and the output head with the model. 0 trains without them."""
    weight: float = Field(default=0.3, gt=0)
    """Factor of their mean loss in what is minimized, until `anneal`."""
    anneal: Span = "66%"
    """Part of the run after which the weight is `final_weight`. 100% keeps `weight`."""
    final_weight: float = Field(default=0.1, ge=0)
    """Factor in the rest of the run. DeepSeek-V3's is 0.1; 0 trains the model on the next token only."""

    def idle(self) -> dict[str, str]:
        if not self.depth:
            return dict.fromkeys(("weight", "anneal", "final_weight"), "without train.mtp.depth")
        tokens, share = span_tokens(self.anneal, 10**6), self.anneal.endswith("%")
        if not tokens:
            return {"weight": f"with train.mtp.anneal={self.anneal}"}
        return {"final_weight": "with train.mtp.anneal=100%"} if share and tokens == 10**6 else {}


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
    mtp: MTPSection = MTPSection()
    """Multi-token prediction: an objective beside the next token. The losses shown and validated leave it out; exports
    leave out its heads."""
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

    def problems(self) -> list[Problem]:
        found = super().problems() + [(f"mtp.{key}", message) for key, message in self.mtp.problems()]
        if self.distill is not None and self.distill.teacher == STORED and self.distill.temperature != 1:
            given = f"{self.distill.temperature:g}, but stored probabilities are those at temperature 1"
            found.append(("distill.temperature", f"{given}; leave it out, or name a model in train.distill.teacher"))
        return found

    @property
    def averages(self) -> bool:
        """Whether the run keeps an average of its weights."""
        return span_tokens(self.ema, 10**18) > 0
