"""Writes the T5 encoder references with transformers. Run as a script in the parity environment."""

import copy

import common
import numpy as np
import torch
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

SMALL = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "feed_forward_proj": "gated-gelu", "num_heads": 3}
DEFAULT = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
FEW_BUCKETS = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 50}

# case -> (configuration, shape of the ids)
CASES = {
    "t5_one_block": ({**DEFAULT, **SMALL, "num_layers": 1}, (2, 12)),
    "t5_deep": ({**DEFAULT, **SMALL, "num_layers": 4, "num_heads": 4, "d_kv": 8, "layer_norm_epsilon": 1e-5}, (2, 17)),
    "t5_few_buckets": ({**DEFAULT, **SMALL, **FEW_BUCKETS, "num_layers": 3, "num_heads": 6}, (1, 60)),
    "t5_long": ({**DEFAULT, **SMALL, "num_layers": 2, "d_model": 32}, (2, 226)),
}
BUCKETS_LENGTH = 300


def as_loaded(model: T5EncoderModel, dtype: torch.dtype) -> T5EncoderModel:
    """A copy in the dtypes that `from_pretrained(dtype=...)` gives: float16 alone keeps `wo` in float32."""
    model = copy.deepcopy(model).to(dtype)
    if dtype == torch.float16:
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.float()
    return model


@torch.no_grad()
def reference(case: str) -> None:
    config, shape = CASES[case]
    model = T5EncoderModel(T5Config(**config)).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = common.weights(shapes)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    ids = torch.from_numpy(np.abs(1e4 * common.values("ids", shape)).astype(np.int64) % config["vocab_size"])
    mask = torch.from_numpy((common.values("mask", shape) > -0.5).astype(np.int64))
    buckets = T5Attention._relative_position_bucket(
        torch.arange(BUCKETS_LENGTH)[None] - torch.arange(BUCKETS_LENGTH)[:, None],
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
    )
    outputs = {"ids": ids.numpy(), "mask": mask.numpy(), "buckets": buckets.numpy().astype(np.int8)}
    for name, attention_mask in (("plain", None), ("masked", mask)):
        exact = model(ids, attention_mask=attention_mask).last_hidden_state.numpy()
        outputs[name] = exact
        for dtype in (torch.bfloat16, torch.float16):
            found = as_loaded(model, dtype)(ids, attention_mask=attention_mask).last_hidden_state.float().numpy()
            outputs[f"{name}_{str(dtype).removeprefix('torch.')}_error"] = np.float64(common.relative_l2(found, exact))
    common.save(case, config=config, shapes=shapes, **outputs)


def main() -> None:
    for case in CASES:
        reference(case)


if __name__ == "__main__":
    main()
