"""Fine-tune open-weight Mixture-of-Experts models in 4 bits, on premises, with proofs. Start at `finetune.run`."""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

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
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")  # it says: there is no GPU

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "load_recipe", "open_run", "open_sweep", "plan", "run", "run_sweep"]

API = {
    "load_recipe": "compose",
    "plan": "plan",
    "run": "run",
    "open_run": "notebook",
    "run_sweep": "notebook",
    "open_sweep": "notebook",
    "compare": "notebook",
}
"""What a notebook imports -> its module, which is imported when first asked for: `import finetune` stays instant."""

if TYPE_CHECKING:
    from finetune.compose import load_recipe
    from finetune.notebook import compare, open_run, open_sweep, run_sweep
    from finetune.plan import plan
    from finetune.run import run


def __getattr__(name: str) -> Any:
    """The names of `API`. Of plan and run it gives the module, which can be called as the function in it."""
    if name not in API:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    module: Any = importlib.import_module(f"finetune.{API[name]}")
    return module if API[name] == name else getattr(module, name)
