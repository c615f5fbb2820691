"""What the tests put in Unsloth's place: `FastModel` out of stock transformers and PEFT, on a CPU.

A test copies this file to a folder on the path as `unsloth.py`. It writes down, in the file that $FAKE_UNSLOTH names,
what it was given and by whom. $FAKE_UNSLOTH_FAULT makes it do something wrong.
"""

import json
import os
import sys
from pathlib import Path

FAULT = os.environ.get("FAKE_UNSLOTH_FAULT", "")
IMPORTED_BEFORE = [name for name in ("transformers", "trl", "peft") if name in sys.modules]
if FAULT == "import":
    raise NotImplementedError("Unsloth cannot find any torch accelerator? You need a GPU.\nmore lines")

import torch  # noqa: E402
import transformers  # noqa: E402

transformers.patched_by_unsloth = True


def note(**values):
    path = Path(os.environ["FAKE_UNSLOTH"])
    known = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*known, values | {"process": os.getpid()}], default=str))


generated = Path(os.environ["UNSLOTH_COMPILE_LOCATION"])
generated.mkdir(parents=True)
note(
    call="import",
    imported_before=IMPORTED_BEFORE,
    generated=str(generated),
    environment={name: value for name, value in os.environ.items() if name.startswith(("UNSLOTH_", "HF_HUB_", "RANK"))},
)


class FastModel:
    @staticmethod
    def from_pretrained(**given):
        note(call="from_pretrained", **given)
        quantised = {}
        if given["load_in_4bit"]:
            quantised["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=given["dtype"],
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            given["model_name"], dtype=given["dtype"], local_files_only=given["local_files_only"], **quantised
        )
        return model, None

    @staticmethod
    def get_peft_model(model, **given):
        from peft import LoraConfig, get_peft_model

        note(call="get_peft_model", untouched=os.environ["UNSLOTH_IGNORED_TOKENIZER_NAMES"], **given)
        transformers.set_seed(given.pop("random_state"))
        if given.pop("use_gradient_checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if FAULT == "experts":
            given["target_parameters"] = given["target_parameters"][:1]
        model.requires_grad_(False)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)).to(torch.bfloat16)
