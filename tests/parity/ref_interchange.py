"""Has compressed-tensors and ModelOpt quantise a CogVideoX transformer to NVFP4, and keeps the files they write.

Run as a script in the parity environment. Weights alone are quantised: a scale of activations would depend on the
order of a processor's sums, and the files are compared byte for byte.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import modelopt.torch.quantization as mtq
import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from diffusers import CogVideoXTransformer3DModel
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 8,
}
IGNORE = ["proj_out"]
SHOWN = ("transformer_blocks.1.attn1.to_k", "transformer_blocks.0.ff.net.2", "norm_out.linear")
"""Layers whose values each library says itself."""


def model() -> tuple[CogVideoXTransformer3DModel, dict[str, tuple[int, ...]]]:
    """The model with weights from their names, and the shapes of these."""
    original = CogVideoXTransformer3DModel(**CONFIG).eval()
    shapes = {key: tuple(value.shape) for key, value in original.state_dict().items()}
    original.load_state_dict({k: torch.from_numpy(v) for k, v in common.weights(shapes).items()})
    return original, shapes


def by_modelopt(original: torch.nn.Module, folder: Path) -> None:
    mtq.quantize(original, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(original, export_dir=folder)


def by_compressed_tensors(original: torch.nn.Module, folder: Path) -> None:
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    apply_quantization_config(original, QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORE))
    for module in original.modules():
        if hasattr(module, "quantization_scheme"):
            blocks = module.weight.detach().unflatten(-1, (-1, 16))
            scale = generate_gparam(blocks.min(), blocks.max())
            scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=scale)
            module.weight_global_scale.data.copy_(scale)
            module.weight_scale.data.copy_(scales)
    compressor = ModelCompressor.from_pretrained_model(original)
    compressor.compress_model(original)
    original.save_pretrained(folder)
    compressor.update_config(folder)


def modelopt_values(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    codes = tensors[f"{name}.weight"]
    array = NVFP4QTensor((codes.shape[0], 2 * codes.shape[1]), dtype, codes)
    scales = {"scale": tensors[f"{name}.weight_scale"], "double_scale": tensors[f"{name}.weight_scale_2"]}
    return array.dequantize(dtype, block_sizes={-1: 16}, **scales)


def compressed_tensors_values(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    codes, args = tensors[f"{name}.weight_packed"], preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    codes = unpack_fp4_from_uint8(codes, codes.shape[0], 2 * codes.shape[1], dtype)
    scale = tensors[f"{name}.weight_scale"].to(dtype)
    return dequantize(codes, scale, args=args, global_scale=tensors[f"{name}.weight_global_scale"], dtype=dtype)


def reference(case: str, write: Callable, values: Callable) -> None:
    original, shapes = model()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            write(original, Path(folder))
        file = Path(folder) / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        config = json.loads((Path(folder) / "config.json").read_text())
        outputs = {"bytes": np.frombuffer(file.read_bytes(), np.uint8)}
    for name in SHOWN:
        outputs[f"float32:{name}"] = values(tensors, name, torch.float32).numpy()
        # Bit patterns: NumPy has no bfloat16.
        outputs[f"bfloat16:{name}"] = values(tensors, name, torch.bfloat16).view(torch.int16).numpy()
    common.save(case, config=config, shapes=shapes, **outputs)


def main() -> None:
    reference("interchange_modelopt", by_modelopt, modelopt_values)
    reference("interchange_compressed_tensors", by_compressed_tensors, compressed_tensors_values)


if __name__ == "__main__":
    main()
