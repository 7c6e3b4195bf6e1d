"""Text to video: tokenizer and T5, the compiled sampling loop, and the VAE, behind one call."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sixbit_jax import checkpoint
from sixbit_jax.config import SchedulerConfig
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.sampling import sampler, schedulers

MINI_MODEL = Path(__file__).parent / "assets" / "moving_mnist"


class NonFiniteLatentsError(FloatingPointError):
    """Latents became NaN or Inf while sampling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        frames: uint8 [batch, frames, height, width, 3]; None with output_type="latent".
        latents: float32 [batch, latent frames, channels, h, w], diffusers' layout, not divided by the VAE's scaling
            factor. With temporal patches (CogVideoX 1.5) the padding frames are still in front, as in diffusers.
        trace: what each step did, arrays with leading axis [num_inference_steps].
        timings: wall-clock seconds of each stage (`text_encoder`, `sampling`, `vae`), compilation included, and
            `compilation`, the part of their sum that was spent compiling.
    """

    frames: UInt8[np.ndarray, "batch frames height width 3"] | None
    latents: Float[np.ndarray, "batch latent_frames channels h w"]
    trace: sampler.Trace
    timings: dict[str, float]


class _CompilationClock:
    """Counts the seconds XLA spends compiling, in this process, from the moment it is created."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


_compilation_clock = _CompilationClock()


@jax.jit
def encode_text(text_encoder: Split[T5EncoderModel], input_ids: Int[Array, "batch text"]) -> Float[Array, "..."]:
    """Token ids -> text features [batch, text, d_model]. Padding attends like any token, as in CogVideoX."""
    return text_encoder.merge()(input_ids)


@jax.jit(static_argnames="tiled")
def decode_latents(
    vae: Split[AutoencoderKLCogVideoX], latents: Float[Array, "batch f channels h w"], *, tiled: bool = False
) -> UInt8[Array, "batch frames height width 3"]:
    """Denoised latents in diffusers' layout -> video, rounded to 8 bits on the device.

    Args:
        vae: the autoencoder; its `scaling_factor` is divided out.
        latents: as the sampler returns them.
        tiled: decode overlapping spatial tiles, which bounds memory for large frames.
    """
    model = vae.merge()
    z = (latents / model.config.scaling_factor).transpose(0, 1, 3, 4, 2)
    video = model.decode(z, tiled=tiled).astype(jnp.float32)
    return jnp.round(jnp.clip(video / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def initial_latents(
    keys: jax.Array, shape: tuple[int, int, int, int]
) -> Float[Array, "batch frames channels height width"]:
    """Standard normal latents [frames, channels, height, width] for each video's key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def video_keys(seed: int | Sequence[int], batch: int) -> jax.Array:
    """One key a video: of its own seed, or of one seed and its position in the batch.

    Raises:
        ValueError: if several seeds are given and their number is not `batch`.
    """
    if isinstance(seed, int):
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))
    if len(seed) != batch:
        raise ValueError(f"seed: got {len(seed)} seeds for {batch} videos; give one seed, or one for each video")
    return jnp.concatenate([video_keys(s, 1) for s in seed])


def _prompt_list(name: str, prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a string or a list of strings, not {prompt!r}")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one prompt")
    return list(prompts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A loaded CogVideoX checkpoint, ready to be called.

    Attributes:
        transformer: the denoiser.
        scheduler: how its noise schedule is walked. `dataclasses.replace(pipe, scheduler=...)` changes it.
        vae, text_encoder, tokenizer: None where the checkpoint has none; then latents, or `prompt_embeds`, are all a
            call can return, or take.
        vae_tiling: decode in overlapping spatial tiles (less memory, for large frames).
    """

    transformer: Split[CogVideoXTransformer3DModel]
    scheduler: SchedulerConfig
    vae: Split[AutoencoderKLCogVideoX] | None = None
    text_encoder: Split[T5EncoderModel] | None = None
    tokenizer: Any = None
    vae_tiling: bool = False

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: Any = jnp.bfloat16, vae_tiling: bool = False) -> "Pipeline":
        """Loads a diffusers folder, or one made by `sixbit convert`.

        Args:
            path: the folder, or "mini" for the small trained model that ships with this package.
            dtype: compute and parameter dtype of all models.
            vae_tiling: see the class.

        Raises:
            convert.ConversionError: if the folder is not what it should be: says which file, key and shape.
        """
        loaded = checkpoint.load(MINI_MODEL if path == "mini" else path, dtype=dtype)
        if loaded.transformer is None or loaded.scheduler is None:
            raise ValueError(f"{path}: a pipeline needs a transformer and a scheduler; found {sorted(loaded.info)}")
        return cls(
            transformer=Split.of(loaded.transformer),
            scheduler=loaded.scheduler,
            vae=loaded.vae and Split.of(loaded.vae),
            text_encoder=loaded.text_encoder and Split.of(loaded.text_encoder),
            tokenizer=loaded.tokenizer,
            vae_tiling=vae_tiling,
        )

    @property
    def _compression(self) -> tuple[int, int]:
        """(spatial, temporal) pixels per latent position; CogVideoX's own where there is no VAE to ask."""
        if self.vae is None:
            return 8, 4
        config = self.vae.merge().config
        return config.spatial_compression_ratio, int(config.temporal_compression_ratio)

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "batch text"]:
        """Token ids, padded or cut to the model's text length. Warns with the text that was cut."""
        limit = self.transformer.merge().config.max_text_seq_length
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, add_special_tokens=True
        ).input_ids
        for prompt, full in zip(prompts, self.tokenizer(list(prompts)).input_ids, strict=True):
            if len(full) > limit:
                cut = self.tokenizer.decode(full[limit - 1 : -1])
                warnings.warn(
                    f"the prompt {prompt!r} has {len(full)} tokens, the model takes {limit}; cut: {cut!r}", stacklevel=3
                )
        return np.asarray(ids, np.int32)

    def _embed(self, name: str, prompts: list[str]) -> Float[Array, "batch text text_dim"]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"this checkpoint has no text encoder or no tokenizer, so {name} cannot be encoded: "
                f"pass {name}_embeds instead"
            )
        return encode_text(self.text_encoder, jnp.asarray(self.tokenize(prompts)))

    def _check_embeds(self, name: str, embeds: Any, batch: int | None = None) -> Float[Array, "batch text text_dim"]:
        width = self.transformer.merge().config.text_embed_dim
        if embeds.ndim != 3 or embeds.shape[2] != width or (batch is not None and embeds.shape[0] != batch):
            raise ValueError(f"{name} must be [{batch or 'batch'}, text, {width}], not {list(embeds.shape)}")
        return jnp.asarray(embeds)

    def _encode(
        self, prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_prompt_embeds: Any, guided: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Validates the four text arguments and returns (prompt_embeds, negative_prompt_embeds or None)."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give exactly one of prompt and prompt_embeds")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give at most one of negative_prompt and negative_prompt_embeds")
        if prompt_embeds is None:
            positive = self._embed("prompt", _prompt_list("prompt", prompt))
        else:
            positive = self._check_embeds("prompt_embeds", prompt_embeds)
        if not guided:
            return positive, None
        batch = positive.shape[0]
        if negative_prompt_embeds is not None:
            negative = self._check_embeds("negative_prompt_embeds", negative_prompt_embeds, batch)
        elif negative_prompt is None and self.text_encoder is None:
            raise ValueError(
                "guidance needs an unconditional embedding and this checkpoint has no text encoder: "
                "pass negative_prompt_embeds, or guidance_scale=1"
            )
        else:
            texts = [""] if negative_prompt is None else _prompt_list("negative_prompt", negative_prompt)
            texts = texts * batch if len(texts) == 1 else texts
            if len(texts) != batch:
                raise ValueError(f"negative_prompt: got {len(texts)} for {batch} prompts; give one, or one for each")
            negative = self._embed("negative_prompt", texts)
        if negative.shape != positive.shape:
            raise ValueError(
                f"prompt_embeds {list(positive.shape)} and negative_prompt_embeds {list(negative.shape)} "
                "must have the same shape"
            )
        return positive, negative

    def _latents_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Validates a size; -> latents [frames, channels, height, width], frames padded to whole temporal patches."""
        config, (space, time_) = self.transformer.merge().config, self._compression
        if num_frames < 1 or (num_frames - 1) % time_:
            near = max(1, round((num_frames - 1) / time_) * time_ + 1)
            raise ValueError(f"num_frames={num_frames} must be of the form {time_}k + 1; the nearest is {near}")
        for name, size in (("height", height), ("width", width)):
            unit = space * config.patch_size
            if size < unit or size % unit:
                raise ValueError(f"{name}={size} must be a positive multiple of {unit} (VAE {space} x patch size)")
        frames = (num_frames - 1) // time_ + 1
        frames += -frames % (config.patch_size_t or 1)
        return frames, config.in_channels, height // space, width // space

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        seed: int | Sequence[int] = 0,
        latents: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
        prompt_embeds: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
        negative_prompt_embeds: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
        output_type: Literal["np", "latent"] = "np",
        on_step: Callable[[jax.Array], None] | None = None,
    ) -> PipelineOutput:
        """Generates one video for each prompt. Arguments are those of diffusers' `CogVideoXPipeline`.

        Args:
            prompt: one text or several; None with `prompt_embeds`.
            negative_prompt: what to steer away from; default the empty text.
            height, width: pixels; default the model's own size.
            num_frames: 4k + 1 for CogVideoX; default the model's own length.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; at most 1 turns it off and halves the work.
            use_dynamic_cfg: let the guidance scale grow over the steps.
            seed: one for all videos (each draws its own noise from it), or one for each.
            latents: starting noise [batch, latent frames, channels, h, w] instead of noise from the seed.
            prompt_embeds, negative_prompt_embeds: text features [batch, text, text_dim] instead of texts.
            output_type: "np" decodes frames, "latent" returns latents alone.
            on_step: called in order with each finished step's index; keep one function object for many calls.

        Raises:
            ValueError: on a bad argument, which it names; before anything is compiled.
            NonFiniteLatentsError: if latents become NaN or Inf; names the video and the step.
        """
        if output_type not in ("np", "latent"):
            raise ValueError(f'output_type={output_type!r} is not one of "np", "latent"')
        if output_type == "np" and self.vae is None:
            raise ValueError('this checkpoint has no VAE: pass output_type="latent"')
        config, (space, _) = self.transformer.merge().config, self._compression
        num_frames = config.sample_frames if num_frames is None else num_frames
        height = config.sample_height * space if height is None else height
        width = config.sample_width * space if width is None else width
        shape = self._latents_shape(num_frames, height, width)
        schedule = schedulers.make_schedule(self.scheduler, num_inference_steps)
        scale = schedulers.guidance_schedule(guidance_scale, schedule.timesteps, num_inference_steps, use_dynamic_cfg)

        timings: dict[str, float] = {}
        compiled_before = _compilation_clock.seconds
        with _stage(timings, "text_encoder"):
            positive, negative = jax.block_until_ready(
                self._encode(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale > 1)
            )
        batch = positive.shape[0]
        keys = video_keys(seed, batch)
        if latents is None:
            latents = initial_latents(keys, shape)
        elif tuple(latents.shape) != (batch, *shape):
            raise ValueError(f"latents must be {[batch, *shape]} for this call, not {list(latents.shape)}")
        with _stage(timings, "sampling"):
            conditioning = sampler.Conditioning(prompt_embeds=positive, negative_prompt_embeds=negative, keys=keys)
            latents, trace = jax.block_until_ready(
                sampler.sample(
                    self.transformer, schedule, scale, jnp.asarray(latents, jnp.float32), conditioning, on_step=on_step
                )
            )
            jax.effects_barrier()
        trace = jax.device_get(trace)
        _raise_if_not_finite(trace)

        frames = None
        if output_type == "np":
            padding = shape[0] - ((num_frames - 1) // self._compression[1] + 1)
            with _stage(timings, "vae"):
                # One video at a time, so that memory does not grow with the batch.
                frames = np.concatenate(
                    [
                        np.asarray(decode_latents(self.vae, latents[i : i + 1, padding:], tiled=self.vae_tiling))
                        for i in range(batch)
                    ]
                )
        timings["compilation"] = _compilation_clock.seconds - compiled_before
        return PipelineOutput(frames=frames, latents=np.asarray(latents), trace=trace, timings=timings)


@contextlib.contextmanager
def _stage(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _raise_if_not_finite(trace: sampler.Trace) -> None:
    if trace.finite.all():
        return
    step, video = np.argwhere(~trace.finite)[0]
    raise NonFiniteLatentsError(
        f"the latents of video {video} became NaN or Inf at step {step} of {len(trace.finite)} "
        f"(timestep {trace.timestep[step]}); check the inputs, or use a wider dtype"
    )
