"""Every setting of a job, typed, with its meaning under it.

A `Recipe` is complete: every default stands here once, the YAML files under `recipes/` say only what differs, and
nothing behind `compose.from_config` sees a Hydra object. Prices and speeds stand in `rates.py`, what is
measured afterwards in `judging.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.judging import Evaluate as Evaluate
from finetune.rates import Costs, Tco
from finetune.setting import one_of as one_of


@dataclass(kw_only=True, slots=True)
class Model:
    """The base model: where its files are, and the published facts that `plan` computes with."""

    name: str = "unnamed"
    """Short name, as in `recipes/model/<name>.yaml`."""
    title: str = ""
    """The name its publisher gave it."""
    family: str = ""
    """Key of the family, one of `finetune.families.FAMILIES`."""
    source: str = ""
    """Where the weights are: a folder, a hub id `org/name`, or `package:<name>==<version>/<file>`."""
    revision: str = ""
    """Commit of the hub repository. Required with a hub id, so that the same recipe loads the same bytes."""
    sha256: str = ""
    """Hash of the package archive. Required with a `package:` source."""
    chat_template_sha256: str = ""
    """Hash of the chat template that the base must have; empty takes the one it has, and the record says which."""
    code: str = one_of("refuse", "ignore")
    """Code of its publisher in the folder (.py files, `auto_map`): an error, or left unread and out of every copy."""
    licence: str = ""
    """Licence key of the weights, as in `finetune/licences.yaml`, e.g. `apache-2.0`."""
    licence_url: str = ""
    """Where the licence text can be read."""
    pretraining_tokens: float = 0.0
    """Tokens that the base was trained on, as published; 0 means not known. The record compares compute with it."""
    pretraining_source: str = ""
    """Where that was read."""
    facts_source: str = ""
    """Where the facts in `config` were read."""
    facts_date: str = ""
    """When they were read, as YYYY-MM-DD."""
    note: str = ""
    """One sentence a user must know before using this base; printed by `plan`."""
    download_gib: float = 0.0
    """Size of the published weight files in GiB; 0 means computed from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the published config.json that determine shapes; families compute parameter counts from them."""
    upcycle_experts: int = 0
    """Experts per layer that a dense GGUF file in a package is copied into; 0 where `source` is no such file."""
    upcycle_top_k: int = 2
    """Experts per token of an upcycled model."""
    tiny: bool = False
    """Use a tiny random model of the same family instead of the real weights (set by scale=rehearsal)."""


@dataclass(kw_only=True, slots=True)
class Adapter:
    """What is trained: LoRA beside the frozen base, or the base itself."""

    method: str = one_of("lora", "dora", "full")
    """`lora`: an update B A beside each weight. `dora`: that, and the length of each row of the sum; not for experts.
    `full`: the base's own weights, without an adapter; ranks and alphas then mean nothing. Use a smaller `train.lr`."""
    load_in_4bit: bool = True
    """Store the frozen weights in 4 bits (NF4, block 64). False keeps them in bf16."""
    double_quantisation: bool = False
    """Store the maxima of NF4 in 8 bits too: 0.516 instead of 0.5625 bytes per weight, and a little more error."""
    targets: str = one_of("experts", "attention", "all")
    """`attention`; `experts` = attention and routed experts; `all` = these and shared experts and dense MLPs. With
    method=full norms and biases of these parts are trained too, and with `all` every other one."""
    rank: int = 16
    """Width of the update outside the routed experts. Doubling it doubles adapter memory."""
    expert_rank: int = 8
    """Width of the update inside each routed expert. There are many of them, so it is usually smaller than `rank`."""
    alpha: float = 32.0
    """LoRA scaling numerator: the update is multiplied by alpha / rank."""
    expert_alpha: float = 16.0
    """The same for routed experts: alpha / expert_rank."""
    dropout: float = 0.0
    """Dropout before the LoRA matrices. Must be 0 when experts are adapted: fused experts have no input to drop."""
    router: bool = False
    """Also adapt the router. Off by default: a router that moves changes which expert answers."""
    embeddings: bool = False
    """With method=full: also train token embeddings and output head. A few rows train few of the words in them."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), so that wide updates do not learn more slowly."""
    init: str = one_of("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16", "eva")
    """How A and B begin. The update is zero at first in all of them. `pissa` (exact, or 16 iterations: far faster) and
    `olora` begin at the base's own main directions; the file then has twice the rank, half of it subtracting them.
    `eva` begins at the main directions of what linear maps are given on training rows; experts begin by default."""
    eva_rho: float = 2.0
    """With `eva`: how many times its rank a map may get, at the cost of maps that explain less; 1 keeps all ranks."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """End of a weight's path (a regular expression) -> its rank, e.g. {self_attn.q_proj: 32, mlp.experts.down_proj: 4}.
    The first that matches counts; an expression that matches nothing is an error."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+); its authors found 16 good, with a smaller train.lr."""


@dataclass(kw_only=True, slots=True)
class Data:
    """The rows: where they come from, what is asked of them, and how they become tokens."""

    card: str = ""
    """Name of a data card, `data/<card>.yaml`, or path of your own. Empty when `train_files` are given."""
    train_files: list[str] = field(default_factory=list)
    """Files, folders or globs of rows, instead of a card: JSONL, JSON, CSV, Parquet, Arrow, text; also .gz, .zst."""
    heldout_files: list[str] = field(default_factory=list)
    """The same of held-out rows, never trained on."""
    heldout_fraction: float = 0.1
    """Share of `train_files` set aside, by whole groups, when there are no `heldout_files`; of a text that is longer
    than that, stretches of its passages."""
    train_rows: int = 0
    """Use at most this many training rows; 0 means all."""
    heldout_rows: int = 0
    """Use at most this many held-out rows; 0 means all."""
    format: str = one_of("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens")
    """What rows look like; `auto` goes by the keys of the first row of each file, and says what it found."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column -> the column it stands for, e.g. {question: prompt, answer: completion}."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Entry of `train_files` -> its share of the training rows, adding up to 1. Rows are left out, never repeated."""
    on_bad_row: str = one_of("error", "drop")
    """What a row with a fault means: the run ends, naming all of them, or the row is dropped with a ledger line."""
    max_drop_fraction: float = 0.01
    """With on_bad_row=drop: a larger share of faulty rows than this ends the run all the same."""
    max_length: int = 2048
    """Longest row in tokens. Plain text is cut into passages of about this length; for other rows see `too_long`."""
    too_long: str = one_of("auto", "error", "drop", "cut")
    """A longer row: the run ends, or it is dropped, or its end is cut. `auto` is what the card says, else `error`."""
    turns: str = one_of("all", "last")
    """Which answers of a conversation are trained. `last` also suits templates that rewrite earlier turns."""
    reasoning: str = one_of("keep", "strip", "template")
    """Reasoning before an answer (`reasoning_content`, or <think> in the text): trained with it, and an error where the
    chat template drops it; or taken out; or left to the template, which may keep that of the last answer only."""
    end_of_turn: str = ""
    """Token to write behind a last answer that the chat template does not end, e.g. what begins the next."""
    group_by: str = ""
    """Column whose equal values stay on one side of the split. Empty: `group` if rows have it, else the question."""
    time_by: str = ""
    """Column with a date or number: the newest rows are held out, so that the past is tested on the future."""
    duplicates: str = one_of("drop", "report")
    """Rows whose words are those of an earlier row on their side, whatever case and punctuation."""
    near_duplicates: str = one_of("report", "drop", "off")
    """Rows that share most five-word runs with an earlier row or a held-out one (MinHash; see `near_share`). A template
    that many rows share makes none of them a copy of a held-out one, unless `drop`."""
    near_share: float = 0.7
    """Share of five-word runs in common (Jaccard) from which two rows are near duplicates."""
    leakage: str = one_of("error", "drop")
    """A held-out question that is also trained on, in any turn: the run ends, or the training row is dropped."""
    privacy: str = one_of("report", "redact", "drop", "off")
    """Personal data and secrets: counted, replaced by [EMAIL] and the like, or their rows dropped."""
    quality: str = one_of("report", "drop", "off")
    """Answers that repeat themselves, are cut off, refuse, or are not text: counted, or dropped."""
    languages: list[str] = field(default_factory=list)
    """Languages to keep, as ISO 639-1 codes; empty keeps all and looks at none."""
    min_words: int = 0
    """Rows with fewer words are dropped."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Index of an evaluation set (`data index`) -> `fail`, `drop` or `report` for training rows with an item of it."""
    packing: bool = False
    """Put several rows into one sequence of `max_length`, each with its own positions: less padding."""
    excerpt_words: int = 0
    """Words of a document that a card puts into the prompt; 0 means the card's own value."""
    sample: bool = False
    """Use the card's small sample rows instead of fetching its source (set by scale=rehearsal)."""
    workers: int = 0
    """Processes that prepare rows; 0 means one per core."""


@dataclass(kw_only=True, slots=True)
class Train:
    """How the adapter is trained."""

    epochs: float = 1.0
    """Passes over the training rows. Ignored when `max_steps` > 0."""
    max_steps: int = 0
    """Optimizer updates; 0 means as many as `epochs` needs."""
    batch_size: int = 4
    """Sequences per device and forward pass."""
    accumulation: int = 1
    """Forward passes per optimizer update."""
    group_by_length: bool = False
    """Rows of like length share a batch: less padding, but the order of rows is less random."""
    optimizer: str = one_of(
        "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "lion", "lion_8bit", "paged_lion_8bit", "adafactor"
    )
    """`_8bit` keeps its moments in 8 bits (of tensors of 4,096 numbers or more); `paged_` moves them to host memory
    when the GPU's is short, and needs one. `lion` has one moment, `adafactor` sums of rows and columns."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: str = one_of("cosine", "linear", "constant_with_warmup")
    """Shape of the learning rate after warm-up."""
    warmup_fraction: float = 0.05
    """Share of the updates over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay, decoupled as in AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: str = one_of("bf16", "fp32", "auto")
    """Arithmetic of the forward and backward pass. LoRA weights are kept in fp32 either way. `auto` becomes `bf16` on a
    machine with a GPU or with CPU instructions for bf16, else `fp32`, which is several times faster there."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time if all layers do it."""
    checkpointed_layers: int = 0
    """How many layers recompute theirs; 0 means as many as memory demands, seen when training begins."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss. 0 because the router is frozen; TRL's own default would add it."""
    neftune_alpha: float = 0.0
    """Uniform noise on the embeddings while training (NEFTune), divided by sqrt(length x width); its authors used 5.
    0 adds none."""
    save_steps: int = 0
    """Updates between checkpoints; 0 means a tenth of the run, at most 100. A run that is stopped saves then too."""
    evaluate_steps: int = 0
    """Updates between two measurements of the loss on held-out rows (`evaluate.rows` of them); 0 means none."""
    adapter_of: str = one_of("last", "best")
    """Which state becomes the adapter: the last, or that of the lowest held-out loss. Scores on rows that chose it
    flatter it."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep, the newest ones. The best is kept too when held-out loss is measured."""
    allow_changed: list[str] = field(default_factory=list)
    """What may differ from the checkpoint that a run goes on from: base, data, world_size, distribution, precision,
    seed, settings, versions. It may be given beside run=, and the record keeps it."""
    rehearse_memory: bool = True
    """Run the longest batch and write a save before step 1, without a trace: what does not fit ends the run at once."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers that get every step: tensorboard, wandb, mlflow, trackio; [] for none. They write below `logs/` of the
    run and send nothing; with network=true your own variables (WANDB_MODE, MLFLOW_TRACKING_URI ...) decide."""


@dataclass(kw_only=True, slots=True)
class Launch:
    """Where the stages run."""

    kind: str = one_of("local", "slurm")
    """`local` runs here. `slurm` prepares the rows here, queues a job per stage on a cluster, and does not wait."""
    nodes: int = 1
    """Machines that train together."""
    devices: int = 1
    """Processes per machine that train together, one per device."""
    distribution: str = one_of("ddp", "fsdp2", "deepspeed")
    """With several devices: `ddp` gives each the whole base and its share of the rows; `fsdp2` also splits the base's
    weights among them (GPUs only); `deepspeed` gives each the whole base too and divides gradients and optimizer states
    (ZeRO stage 2; the extra [deepspeed])."""
    context_parallel: int = 1
    """Devices of a machine that share every row, a part each, where rows are too long for one: a divisor of `devices`
    and of the model's heads. Each computes the attention of some heads (Ulysses); losses are those of whole rows."""
    cpu_threads: int = 0
    """Threads for CPU arithmetic; 0 means one per core."""
    gpus: bool = True
    """With Slurm: ask for a GPU per process. False where training is to run on CPUs."""
    partition: str = ""
    """Slurm partition, or several with commas; empty means the cluster's default."""
    account: str = ""
    """Slurm account that the jobs are charged to; empty means your default."""
    qos: str = ""
    """Slurm quality of service; empty means your default."""
    constraint: str = ""
    """Features that nodes must have, as Slurm writes them, e.g. a100&ib."""
    time: str = ""
    """Time limit of each job, e.g. 04:00:00 or 2-00:00:00; empty means the partition's. Training goes on in another."""
    warn_seconds: int = 180
    """Seconds before that limit at which training saves and is queued again: more than one update and one save."""
    cpus_per_task: int = 0
    """Cores per process; 0 means what the partition gives."""
    memory: str = ""
    """Memory per node, e.g. 200G; empty means what the partition gives."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, one each: [--exclusive, --mail-type=END]."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the program starts, one each: [module load cuda, source env.sh]."""


@dataclass(kw_only=True, slots=True)
class Merge:
    """The adapter in the original weights."""

    base: str = one_of("original", "dequantised")
    """What the update is added to: the original weights, or what training in 4 bits saw of them (packed into NF4 and
    unpacked again), which answers more like the model that was trained and less like the published one."""
    quantised: str = one_of("bf16", "requantise")
    """What a base in fp8 or fp4 becomes: `bf16` weights, or fp8 again with new scales, of the tensors with an update
    alone, in the same layout. Never 4 bits: those are too coarse for an update."""
    tolerance: float = 100.0
    """How many times the KL divergence that rounding explains the merged weights may be away from the adapter, before
    the merge is refused; beside `export.max_kl`."""


@dataclass(kw_only=True, slots=True)
class Export:
    """What is left for a server."""

    formats: list[str] = field(default_factory=lambda: ["hf", "peft"])
    """`hf` = merged weights that stock transformers loads; `peft` = the adapter alone; `peft_per_expert` = the adapter
    with a pair of matrices per expert, for servers; `gguf` = merged weights for llama.cpp; `ollama` = a Modelfile for
    the first GGUF file; `vllm` = a start line for `hf`. Each is loaded by its client and asked, where that is here."""
    gguf: list[str] = field(default_factory=lambda: ["f16"])
    """Types of GGUF files: f32, f16, bf16, q8_0; smaller ones such as q4_k_m need llama.cpp's quantiser."""
    gguf_adapter: bool = False
    """With peft_per_expert: the adapter as a GGUF file too, which llama.cpp adds to the base's when it starts."""
    ask: bool = True
    """Load every export by its client and compare its answers with the adapter's own. Off where nothing can hold it."""
    name: str = ""
    """Name of the exported model; empty means `<recipe>-<run>`. Some licences prescribe how it must begin."""
    croissant: bool = False
    """Write croissant.json too: the rows by file, hash, column and split, for data catalogues; none of their words."""
    parity_prompts: int = 8
    """Held-out rows on which merged and adapter are compared before the merge counts as done; their answers are what
    exports and servers are compared with."""
    max_kl: float = 0.05
    """Largest mean KL divergence (nats per token) allowed between merged weights and the adapter beside its base."""
    max_single_kl: float = 2.0
    """The largest that it may be at any one token: a mean over many hides a few that went wrong."""
    min_top1: float = 0.75
    """Least share of tokens at which both find the same one likeliest. Where two are near ties, rounding may decide."""


@dataclass(kw_only=True, slots=True)
class Licence:
    """What you say about your use of base and data, so that their licences can be checked. Nothing is sent."""

    use: str = one_of("not_said", "commercial", "research", "personal")
    """What the tuned model is for. Bases and rows that are not for commercial use ask for it."""
    established_in: str = ""
    """Country of your domicile or principal place of business, e.g. US or DE; empty means not said."""
    monthly_users: int = 0
    """Monthly users of your products, as the base's licence counts them; 0 means not said."""
    accept: str = ""
    """sha256 of an unknown licence text beside the weights that you have read and accept; also beside run=."""
    of_rows: str = ""
    """Licence of your own rows (`data.train_files`), e.g. CC-BY-4.0; empty means that they are yours. Cards say it."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A whole job. `finetune.compose.load_recipe` makes one; `finetune.run.run` carries it out."""

    name: str = ""
    """Name of the recipe; the run folder is `<runs_dir>/<name>/<number>`."""
    purpose: str = ""
    """One sentence: what the recipe is for."""
    scale: str = one_of("full", "rehearsal")
    """`rehearsal` runs the same chain on a tiny random model of the same family."""
    engine: str = one_of("finetune", "unsloth")
    """Whose layers train. `unsloth` takes Unsloth's kernels for the families and settings they cover: one NVIDIA GPU
    and the extra [unsloth]. Adapter, checkpoints and all other stages stay the same."""
    seed: int = 17
    """Seed of the LoRA initialisation, the row order and everything else that is drawn."""
    runs_dir: str = "runs"
    """Folder for run folders, relative to where the command is typed."""
    cache_dir: str = ""
    """Folder for downloads and converted bases; empty means `$FINETUNE_CACHE` or `~/.cache/finetune`."""
    network: bool = False
    """Allow this job to fetch what its recipe names. Nothing is sent, unless `train.report_to` names a tracker and your
    own variables give it a server."""
    model: Model = field(default_factory=Model)
    """The base model."""
    adapter: Adapter = field(default_factory=Adapter)
    """What is trained."""
    data: Data = field(default_factory=Data)
    """The rows."""
    train: Train = field(default_factory=Train)
    """How it is trained."""
    launch: Launch = field(default_factory=Launch)
    """Where it runs."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """How base and tuned are compared."""
    merge: Merge = field(default_factory=Merge)
    """What the adapter is added to."""
    export: Export = field(default_factory=Export)
    """What is left for a server."""
    licence: Licence = field(default_factory=Licence)
    """What you say about your use of base and data."""
    sign: str = ""
    """Private key (EC, PEM file) that signs export/ and run.json at the end (extra [sign]). Empty: none does."""
    costs: Costs = field(default_factory=Costs)
    """Prices and speeds that `plan` uses."""
    tco: Tco = field(default_factory=Tco)
    """What `plan tco` uses besides."""
