"""Tiny checkpoints in the number formats that publishers use, each with an fp32 twin that holds the same numbers.

The arithmetic here is written out value by value, apart from that of `finetune.formats`, which the tests compare.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny_models import checkpoint, tensors

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp8(weight: torch.Tensor, height: int, width: int):
    """(fp8 values, fp32 scales by block, what they mean) of a matrix."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    meaning = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[block].abs().max() / 448 * (1 + 0.1 * i)
            values[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meaning[block] = values[block].float() * scales[i, j]
    return values, scales, meaning


def fp4(weight: torch.Tensor, exponent_as: torch.dtype):
    """(packed bytes (rows, columns/2), exponents (rows, columns/32), what they mean) of a matrix, in groups of 32."""
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    exponents = torch.zeros(rows, columns // 32, dtype=torch.uint8)
    meaning = torch.empty(rows, columns)
    for row in range(rows):
        for group in range(columns // 32):
            part = slice(group * 32, group * 32 + 32)
            power = int(torch.log2(weight[row, part].abs().max() / 6).ceil().clamp(-100, 100))
            exponents[row, group] = power + 127
            for column in range(part.start, part.stop):
                value = float(weight[row, column]) / 2**power
                code = min(range(8), key=lambda k, value=value: abs(E2M1[k] - abs(value)))
                codes[row, column] = code + (8 if value < 0 else 0)
                meaning[row, column] = (-1 if value < 0 else 1) * E2M1[code] * 2**power
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    if exponent_as != torch.uint8:
        exponents = exponents.view(exponent_as)
    return packed, exponents, meaning


def quantised(family: str, folder: Path) -> tuple[Path, Path]:
    """(folder in the family's published number format, its fp32 twin), both made from the tiny checkpoint."""
    source = checkpoint(family, True)
    files, twin, settings = {"deepseek_v3": _block_fp8, "mistral4": _fused_fp8, "gpt_oss": _mxfp4, "deepseek_v4": _v4}[
        family
    ](tensors(source))
    for name, content in (("quantised", files), ("twin", twin)):
        target = folder / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        write(target, content)
    path = folder / "quantised" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return folder / "quantised", folder / "twin"


def write(folder: Path, content: dict[str, torch.Tensor], shards: int = 3) -> None:
    """Writes tensors into several shards, dealt out one by one, with an index."""
    keys, where = sorted(content), {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number::shards]
        save_file({key: content[key].contiguous() for key in part}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _is_linear(key: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and key.endswith(".weight") and not any(w in key for w in ("embed", "head", ".gate."))


def _block_fp8(source):
    """DeepSeek V3: blocks of 48 x 48 (the published ones are 128 x 128), so that the last ones are shorter."""
    files, twin = dict(source), dict(source)
    for key, tensor in source.items():
        if _is_linear(key, tensor):
            files[key], files[key + "_scale_inv"], twin[key] = fp8(tensor, 48, 48)
    return files, twin, {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}


def _fused_fp8(source):
    """Mistral 4: one scale per linear map, one per expert of a fused stack, and scales for activations."""
    files, twin = dict(source), dict(source)
    for key, tensor in source.items():
        if _is_linear(key, tensor):
            files[key], scale, twin[key] = fp8(tensor, *tensor.shape)
            files[key + "_scale_inv"], files[key.replace("weight", "activation_scale")] = scale.view(()), torch.ones(())
        elif ".experts." in key:
            parts = [fp8(matrix * (e + 1), *matrix.shape) for e, matrix in enumerate(tensor)]
            files[key] = torch.stack([part[0] for part in parts])
            files[key + "_scale_inv"] = torch.stack([part[1] for part in parts])
            files[key + "_activation_scale"] = torch.ones(())
            twin[key] = torch.stack([part[2] for part in parts])
    return files, twin, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}


def _mxfp4(source):
    """gpt-oss: stacks by output row in groups of 32, 16 bytes each; everything else as it is."""
    files, twin = dict(source), dict(source)
    for key, tensor in source.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            parts = [fp4(matrix.T, torch.uint8) for matrix in tensor]
            del files[key]
            experts, inputs, rows = tensor.shape
            blocks = torch.stack([part[0] for part in parts])
            files[key + "_blocks"] = blocks.view(experts, rows, inputs // 32, 16)
            files[key + "_scales"] = torch.stack([part[1] for part in parts])
            twin[key] = torch.stack([part[2].T for part in parts])
    return files, twin, {"quant_method": "mxfp4", "modules_to_not_convert": []}


def _v4(source):
    """DeepSeek V4: experts in FP4 with E8M0 exponents, other linear maps in fp8 with block scales, both `.scale`."""
    files, twin = dict(source), dict(source)
    for key, tensor in source.items():
        name = key.removesuffix("weight") + "scale"
        if ".experts." in key:
            packed, files[name], twin[key] = fp4(tensor, torch.float8_e8m0fnu)
            files[key] = packed.view(torch.int8)
        elif ".attn.w" in key or "shared_experts" in key:
            files[key], scale, _ = fp8(tensor, 128, 128)
            exponent = torch.log2(scale).ceil()
            files[name] = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
            twin[key] = files[key].float() * 2**exponent
    return files, twin, {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
