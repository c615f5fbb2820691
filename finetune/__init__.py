"""Fine-tune open-weight Mixture-of-Experts models in 4 bits, on premises, with proofs. Start at `finetune.run`."""

import logging
import os
from typing import Any

# Set before the first import of a Hugging Face library: each of these libraries calls out otherwise (TRL and datasets
# by default). `finetune.fetch` lifts them in a child process, and only where the recipe says network=true.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_EVALUATE_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment of every process of ours: nothing is sent, nothing is fetched."""

os.environ.update(OFFLINE)
if "FINETUNE_EGRESS_LOG" in os.environ:  # scripts/egress_check.sh: before anything is imported that could call out
    from finetune import egress

    egress.guard(os.environ["FINETUNE_EGRESS_LOG"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional kernel of a hub is absent

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    """`load_recipe`, imported when first asked for, so that `import finetune` stays instant."""
    if name == "load_recipe":
        from finetune.compose import load_recipe

        return load_recipe
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
