"""What the project exists for: expert stacks in 4 bits, and LoRA on them in split form."""

from finetune.experts import nf4
from finetune.experts.loading import EXPERTS, Nf4Config, prepare_experts
from finetune.experts.lora import ExpertsLora
from finetune.experts.scratch import SCRATCH

__all__ = ["EXPERTS", "SCRATCH", "ExpertsLora", "Nf4Config", "nf4", "prepare_experts"]
