"""The small transformer, inputs and policies that tests of the precision package share."""

import dataclasses

import jax.numpy as jnp
import tiny
from flax import nnx

from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.linears import SITES
from sixbit_jax.models.split import Split
from sixbit_jax.precision import (
    ConstantRouter,
    CostAwareRouter,
    DeltaSkipper,
    EveryNth,
    PrecisionPolicy,
    VolatilityRouter,
    edges,
)
from sixbit_jax.qtensor import quantize_model

CONFIG = dataclasses.replace(tiny.TRANSFORMER, time_embed_dim=32)
BLOCKS = CONFIG.num_layers
STEPS = 8


def make(quantized: bool, dtype=jnp.float32):
    model = CogVideoXTransformer3DModel(CONFIG, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    return Split.of(quantize_model(model) if quantized else model)


def arguments(batch=1, seed=0, kind="CogVideoXDDIMScheduler", guided=True):
    return tiny.sampler_inputs(kind, STEPS, batch=batch, seed=seed, guided=guided)


def volatility_router(threshold=0.05):
    ones = jnp.ones((BLOCKS, len(SITES)), jnp.float32)
    return VolatilityRouter(alpha=0.1 * ones, beta=0 * ones, threshold=jnp.asarray(threshold, jnp.float32))


def delta_skipper(threshold=1e9, **limits):
    limits = {"max_skips": 2, "warm_up": 2, "cool_down": 1, **limits}
    return DeltaSkipper(threshold=jnp.asarray(threshold, jnp.float32), **limits)


POLICIES = {
    "weights only": PrecisionPolicy(),
    "int8": PrecisionPolicy(router=ConstantRouter(route="int8")),
    "nvfp4": PrecisionPolicy(router=ConstantRouter(route="nvfp4")),
    "edges": PrecisionPolicy(router=edges(STEPS, BLOCKS, len(SITES), first=1, last=1), carrier="fp8"),
    "volatility": PrecisionPolicy(router=volatility_router()),
    "cost aware": PrecisionPolicy(
        router=CostAwareRouter.of(volatility_router(), {"nvfp4": 0.5, "int8": 1.0, "16bit": 2.0})
    ),
    "cache": PrecisionPolicy(skipper=delta_skipper()),
    "every second": PrecisionPolicy(skipper=EveryNth(n=2, warm_up=1, cool_down=1)),
    "sixbit": PrecisionPolicy(
        router=volatility_router(), skipper=delta_skipper(warm_up=3), outlier_limit=5.0, cache_format="nvfp4"
    ),
}
