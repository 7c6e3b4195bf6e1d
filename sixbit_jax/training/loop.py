"""The training loop that the VAE and the diffusion model share: optimizer, averaged weights, checkpoints, log.

A run is limited by time, by steps, or both. Its learning rate follows the share of the budget that is used up, which is
stored in the checkpoint, so a run that is cut and resumed goes down the same curve. Randomness is folded from the seed
and the step number: with a budget in steps, a resumed run takes the same steps as one that was never cut.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm import tqdm

from sixbit_jax.training.recipe import OptimizerRecipe

SHARD_BYTES = 15 * 2**20
"""Largest weight file that `save_weights` writes."""

_MATRIX = re.compile(r"\.blocks\.(attn|ff)_(in|out)\.kernel$")

Params = Any
"""Any pytree of float32 arrays."""
LossFn = Callable[[Params, Any, PRNGKeyArray], tuple[Array, dict[str, Array]]]
"""(parameters, data, key) -> (loss, further scalars to log by name)."""


@struct.dataclass(kw_only=True)
class TrainState:
    """What changes from step to step, and what a checkpoint holds.

    Attributes:
        step: int32 [], optimizer steps taken.
        params: float32 parameters.
        average: exponential moving average of `params`, the weights to keep.
        optimizer: state of `make_optimizer`.
    """

    step: Any
    params: Params
    average: Params
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """When a run ends: at whichever limit comes first.

    Attributes:
        seconds: wall-clock time from `started` to the last optimizer step, compilation included.
        steps: optimizer steps, those before a resumption included; rounded up to whole compiled calls.
        started: `time.monotonic()` at the start of the command.
    """

    seconds: float | None = None
    steps: int | None = None
    started: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.seconds is None and self.steps is None:
            raise ValueError("a training budget needs seconds, steps, or both")
        for name, value in (("seconds", self.seconds), ("steps", self.steps)):
            if value is not None and value <= 0:
                raise ValueError(f"budget: {name}={value} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes.

    Attributes:
        folder: of `<name>.jsonl` (the loss curve) and the averaged weights.
        name: "vae" or "diffusion".
        checkpoints: folder of the full state for resumption.
        save_every: seconds between checkpoints, and between writings of the averaged weights.
        dtype: of the averaged weights on disk.
        metadata: strings stored in the weight files.
    """

    folder: Path
    name: str
    checkpoints: Path
    save_every: float = 90.0
    dtype: Any = jnp.float32
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by dotted path; for a module's state these are the parameter paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}


def from_named_leaves(like: Any, leaves: Mapping[str, Any]) -> Any:
    """A pytree of the structure of `like` with leaves by name.

    Raises:
        ValueError: listing every name that is missing, unexpected or of another shape.
    """
    wanted = named_leaves(like)
    faults = [f"missing {k}" for k in wanted.keys() - leaves.keys()]
    faults += [f"unexpected {k}" for k in leaves.keys() - wanted.keys()]
    faults += [
        f"{k}: found {tuple(leaves[k].shape)}, wanted {tuple(wanted[k].shape)}"
        for k in wanted.keys() & leaves.keys()
        if tuple(leaves[k].shape) != tuple(wanted[k].shape)
    ]
    if faults:
        raise ValueError("stored weights are not those of this model:\n" + "\n".join(sorted(faults)))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[k] for k in wanted])


def make_optimizer(recipe: OptimizerRecipe) -> optax.GradientTransformation:
    """Clipping, Muon or Adam, and decay of kernels; its updates are to be multiplied by the negative learning rate.

    With `recipe.muon`, the stacked attention and feed-forward kernels of all blocks are updated by Muon (orthogonalised
    momentum, each layer by itself) at the update size of Adam (arXiv:2502.16982), and everything else by Adam with
    Nesterov momentum, which optax's Muon brings with it.
    """

    def by_name(params: Params, choose: Callable[[str], Any]) -> Params:
        return jax.tree.unflatten(jax.tree.structure(params), [choose(name) for name in named_leaves(params)])

    def is_kernel(name: str) -> bool:
        return name.endswith("kernel")

    def matrices(params: Params) -> Params:
        axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return by_name(params, lambda name: axes if _MATRIX.search(name) else None)

    adam = optax.scale_by_adam(b1=recipe.b1, b2=recipe.b2)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.contrib.muon(
            -1.0,  # the loop multiplies by the negative rate
            adam_b1=recipe.b1,
            adam_b2=recipe.b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
        if recipe.muon
        else adam,
        optax.add_decayed_weights(recipe.weight_decay, mask=lambda params: by_name(params, is_kernel)),
    )


def learning_rates(recipe: OptimizerRecipe, step: int, fraction: float) -> Float[np.ndarray, " steps_per_call"]:
    """Rates of the steps of one compiled call, float32.

    Args:
        step: optimizer steps taken before the call, for the linear warm-up.
        fraction: share of the budget used, in [0, 1], for the cosine.
    """
    warmup = np.minimum(1.0, (step + 1.0 + np.arange(recipe.steps_per_call)) / recipe.warmup_steps)
    cosine = recipe.final_fraction + (1 - recipe.final_fraction) * (1 + math.cos(math.pi * fraction)) / 2
    return (recipe.learning_rate * cosine * warmup).astype(np.float32)


def init_state(params: Params, recipe: OptimizerRecipe) -> TrainState:
    """The state before the first step; `params` is copied, so that the state can be donated."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=jax.tree.map(jnp.copy, params),
        optimizer=make_optimizer(recipe).init(params),
    )


def make_update(loss_fn: LossFn, recipe: OptimizerRecipe) -> jax.stages.Wrapped:
    """The jitted function that takes several optimizer steps: (state, data, key, rates) -> (state, mean metrics).

    `state` is donated; one step is taken for each of `rates` (float32). A step whose gradients are not finite
    changes nothing but the step number; the share of such steps is the metric "skipped".
    """
    optimizer = make_optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        state: TrainState, data: Any, key: PRNGKeyArray, rates: Float[Array, " steps"]
    ) -> tuple[TrainState, dict[str, Array]]:
        def one(state: TrainState, rate: Array) -> tuple[TrainState, dict[str, Array]]:
            step_key = jax.random.fold_in(key, state.step)
            (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, data, step_key)
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
            finite = jnp.isfinite(norm)
            with jax.numpy_dtype_promotion("standard"):  # optax raises a decay to an integer step
                updates, opt = optimizer.update(gradients, state.optimizer, state.params)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            count = state.step.astype(jnp.float32)
            keep = jnp.minimum(recipe.ema_decay, (1 + count) / (10 + count))
            average = jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), state.average, params)
            new = (params, average, opt)
            old = (state.params, state.average, state.optimizer)
            params, average, opt = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            metrics = {"loss": loss, "gradient_norm": norm, **parts}
            metrics = {k: jnp.where(finite, v, 0.0) for k, v in metrics.items()} | {
                "skipped": 1.0 - finite.astype(jnp.float32)
            }
            return TrainState(step=state.step + 1, params=params, average=average, optimizer=opt), metrics

        state, metrics = jax.lax.scan(one, state, rates)
        skipped = metrics.pop("skipped")
        taken = jnp.maximum(jnp.sum(1.0 - skipped), 1.0)
        return state, {k: jnp.sum(v) / taken for k, v in metrics.items()} | {"skipped": jnp.mean(skipped)}

    return update


def save_checkpoint(folder: Path, state: TrainState, fraction: float) -> None:
    """Writes the full state under `folder`, atomically; the two newest checkpoints are kept."""
    with _manager(folder) as manager:
        manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(named_leaves(state)), progress=ocp.args.JsonSave({"fraction": fraction})
            ),
        )


def restore_checkpoint(folder: Path, state: TrainState) -> tuple[TrainState, float]:
    """The newest checkpoint under `folder` and the share of the budget it used; `state` and 0 if there is none.

    Raises:
        ValueError: if the checkpoint is of another model, or otherwise not readable as `state`.
    """
    with _manager(folder) as manager:
        if (step := manager.latest_step()) is None:
            return state, 0.0
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named_leaves(state))
        found = manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
    return from_named_leaves(state, found["state"]), found["progress"]["fraction"]


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save_weights(
    folder: Path, name: str, params: Params, *, dtype: Any, metadata: Mapping[str, str], limit: int = SHARD_BYTES
) -> list[Path]:
    """Writes a pytree as `<name>-00001-of-0000N.safetensors`, each at most `limit` bytes unless one array is larger.

    Every file is written beside its place and then renamed, so a run that is cut leaves complete files.

    Args:
        metadata: stored in every file, for `load_metadata`.
    """
    leaves = {k: np.asarray(x.astype(dtype)) for k, x in named_leaves(params).items()}
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, x in leaves.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > limit:
            shards.append({})
        shards[-1][key] = x
    paths = [folder / f"{name}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        safetensors.numpy.save_file(shard, path.with_suffix(".partial"), metadata=dict(metadata))
    for path in paths:
        os.replace(path.with_suffix(".partial"), path)
    return paths


def load_weights(folder: Path, name: str, like: Params) -> Params:
    """Reads what `save_weights` wrote, as float32 arrays in the structure of `like`.

    Raises:
        FileNotFoundError: if shards are missing.
        ValueError: if the names or shapes are not those of `like`.
    """
    leaves = {}
    for path in _shards(folder, name):
        leaves |= safetensors.flax.load_file(path)
    return jax.tree.map(lambda x: x.astype(jnp.float32), from_named_leaves(like, leaves))


def load_metadata(folder: Path, name: str) -> dict[str, str]:
    """The metadata that `save_weights` stored. Raises FileNotFoundError if shards are missing."""
    with safetensors.safe_open(_shards(folder, name)[0], framework="numpy") as file:
        return file.metadata()


def _shards(folder: Path, name: str) -> list[Path]:
    paths = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem.rsplit("-", 1)[1]):
        raise FileNotFoundError(
            f"{folder} should hold every shard {name}-*.safetensors of one training run; "
            f"found {[p.name for p in paths]}"
        )
    return paths


def _open_log(path: Path, step: int) -> TextIO:
    """The loss curve, one JSON object a line, to append to; lines after `step` (of a run that was cut) are removed."""
    kept = [x for x in path.read_text().splitlines() if json.loads(x)["step"] <= step] if path.exists() else []
    path.write_text("".join(x + "\n" for x in kept))
    return path.open("a")


def train(
    loss_fn: LossFn,
    state: TrainState,
    data: Any,
    *,
    key: PRNGKeyArray,
    recipe: OptimizerRecipe,
    budget: Budget,
    outputs: Outputs,
    fraction: float = 0.0,
    refresh: Callable[[Any, int], Any] | None = None,
) -> TrainState:
    """Takes optimizer steps until the budget is used up, then writes the averaged weights and a checkpoint.

    The host hands out one compiled call while the device runs the one before, and never waits for a single step.

    Args:
        state: from `init_state` or `restore_checkpoint`; donated.
        data: pytree of device arrays that the loss reads.
        key: of the run; step n uses `fold_in(key, n)`.
        fraction: share of the budget used before a resumption.
        refresh: (data, number of the compiled call) -> data, before every call; may donate its argument.

    Raises:
        ValueError: if compilation alone used up the budget.
        FloatingPointError: if no step of a compiled call had finite gradients; the weights on disk are from before.
    """
    for folder in (outputs.folder, outputs.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    step = int(state.step)
    rates = jnp.asarray(learning_rates(recipe, step, fraction))
    update = make_update(loss_fn, recipe).lower(state, data, key, rates).compile()
    begin, before = time.monotonic(), fraction
    end = None if budget.seconds is None else budget.started + budget.seconds
    if end is not None and end <= begin:
        raise ValueError(f"a budget of {budget.seconds} s ended before the first step: compilation alone took longer")

    def used() -> float:
        timed = 0.0 if end is None else before + (1 - before) * (time.monotonic() - begin) / (end - begin)
        return min(1.0, max(timed, 0.0 if budget.steps is None else step / budget.steps))

    def report(step: int, fraction: float, rate: float, metrics: dict[str, Array]) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        if values["skipped"] == 1.0:
            raise FloatingPointError(f"{outputs.name}: no finite gradients in {recipe.steps_per_call} steps to {step}")
        values |= {"seconds": time.monotonic() - budget.started, "fraction": fraction, "rate": rate}
        log.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in values.items()}) + "\n")
        log.flush()
        bar.update(round(100 * fraction) - bar.n)
        bar.set_postfix(step=step, loss=f"{values['loss']:.4f}", refresh=False)

    def save() -> None:
        metadata = dict(outputs.metadata) | {"step": str(step), "fraction": f"{used():.4f}"}
        save_weights(outputs.folder, outputs.name, state.average, dtype=outputs.dtype, metadata=metadata)
        save_checkpoint(outputs.checkpoints, state, used())

    redraw = 0.5 if sys.stderr.isatty() else 15.0
    pending, saved = None, time.monotonic()
    with (
        _open_log(outputs.folder / f"{outputs.name}.jsonl", step) as log,
        tqdm(total=100, initial=round(100 * fraction), unit="%", desc=outputs.name, mininterval=redraw) as bar,
    ):
        while (fraction := used()) < 1:
            if refresh is not None:
                data = refresh(data, step // recipe.steps_per_call)
            rates = learning_rates(recipe, step, fraction)
            state, metrics = update(state, data, key, jnp.asarray(rates))
            step += recipe.steps_per_call
            if pending is not None:
                report(*pending)
            pending = (step, fraction, float(rates[-1]), metrics)
            if time.monotonic() - saved > outputs.save_every:
                save()
                saved = time.monotonic()
        if pending is not None:
            report(*pending)
            save()
        bar.update(100 - bar.n)
    return state
