"""What Accelerate's own two ways to divide a sequence do on a CPU, beside one process with the same rows.

    .venv/bin/python scripts/accelerate_context.py            in an environment with the extra [deepspeed]

Writes scripts/bench_results/accelerate_context.json. `ulysses` is `ParallelismConfig(sp_size=2)`, DeepSpeed's attention
and data loader, through transformers' Trainer; `ring` is `cp_size=2` with FSDP2. It says why `launch.context_parallel`
has an attention of its own; when it agrees with one process to 1e-6, that can go.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_quickstart import RESULTS, machine

from finetune.launch import free_port
from finetune.rundir import write_json

CASES = {"rows": (1, False), "accumulated": (2, False), "packed": (1, True)}
"""Name -> (batches accumulated, whether a row is of two documents)."""
LENGTH, FIRST = 16, 9
"""Tokens of a row, and of the first document of two."""


def main(words: list[str]) -> None:
    """Runs every case with one process and with two, or is one of them."""
    if words:
        {"one": train, "two": train, "ring": ring}[words[0]](*words)
        return
    found: dict[str, Any] = {name: {how: case(how, name) for how in ("one", "two")} for name in CASES}
    found["two, without head_dim"] = case("two", "rows", head_dim="none")
    found["ring"], found["ring, with FSDP2 let in on a CPU"] = case("ring", "stock"), case("ring", "let in")
    packages = ("torch", "accelerate", "transformers", "deepspeed")
    about = {"machine": machine(), "date": date.today().isoformat(), "versions": {p: version(p) for p in packages}}
    write_json(RESULTS / "accelerate_context.json", found | about)
    print(json.dumps(found, indent=1))


def case(how: str, name: str, head_dim: str = "8") -> Any:
    """First losses and gradient norms, or the error of the first of the processes."""
    world = 1 if how == "one" else 2
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world), "HEAD_DIM": head_dim}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, how, name, folder]
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else place),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(world)
        ]
        said = [process.communicate(timeout=300)[1] for process in ranks]
        file = Path(folder) / "found.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    errors = re.findall(r"^(?:\[rank0\]: )?(\w*Error: .*)", said[0], re.MULTILINE)
    return {"error": errors[-1] if errors else said[0][-300:]}


def model() -> Any:
    """A tiny Mixtral in fp32, always the same."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {} if os.environ["HEAD_DIM"] == "none" else {"head_dim": int(os.environ["HEAD_DIM"])}
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="sdpa",
        **heads,
    )
    return MixtralForCausalLM(config)


def rows(packed: bool) -> list[dict[str, Any]]:
    """Rows of which 3, 9, 14 and 2 tokens are trained, and so on."""
    import torch

    drawn = torch.Generator().manual_seed(1)
    made = []
    for trained in (3, 9, 14, 2) * 4:
        ids = torch.randint(0, 64, (LENGTH,), generator=drawn)
        labels, positions = ids.clone(), torch.arange(LENGTH)
        labels[: LENGTH - trained] = -100
        if packed:
            positions = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)])
            labels[FIRST] = -100
        made.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return made


def train(how: str, name: str, folder: str) -> None:
    """Four updates through transformers' Trainer; the first process writes its losses and gradient norms."""
    accumulated, packed = CASES[name]
    more: dict[str, Any] = {}
    if how == "two":
        from finetune.train.zero import start

        start(on_gpu=False)
        from accelerate import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa", sp_seq_length_is_variable=True)
        zero = {"stage": 2, "offload_optimizer": {"device": "none"}}
        engine = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulated,
            "gradient_clipping": 1e9,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        more = {
            "deepspeed": engine,
            "accelerator_config": {"use_configured_state": True},
            "parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler),
        }
    import torch
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    trainer = InOrder(
        model=model(),
        args=settings,
        train_dataset=rows(packed),
        data_collator=lambda some: {key: torch.stack([row[key] for row in some]) for key in some[0]},
    )
    trainer.train()
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found = {"losses": [log["loss"] for log in logs], "gradient_norms": [log["grad_norm"] for log in logs]}
        write_json(Path(folder) / "found.json", found)


def ring(how: str, name: str, folder: str) -> None:
    """One forward pass with ring attention; `let in` lets Accelerate take its FSDP2 way over gloo."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import torch

    if name == "let in":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        import tests.fsdp_on_cpu  # noqa: F401  # changes two functions of other libraries in this process
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        transformer_cls_names_to_wrap=["MixtralDecoderLayer"],
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=ParallelismConfig(cp_size=2))
    made = model()
    prepared, _ = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    row = rows(packed=False)[0]
    buffers = [row["input_ids"][None].clone(), row["position_ids"][None].clone()]
    with accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1, 1], no_restore_buffers=set(buffers)):
        logits = prepared(input_ids=buffers[0], position_ids=buffers[1]).logits
    write_json(Path(folder) / "found.json", {"logits": list(logits.shape)})


if __name__ == "__main__":
    main(sys.argv[1:])
