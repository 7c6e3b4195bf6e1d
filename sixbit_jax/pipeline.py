"""Text to video: tokenizer and T5, the compiled sampling loop, and the VAE, behind one call."""

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from convert.errors import CheckpointError
from convert.published import locate
from sixbit_jax import checkpoint
from sixbit_jax.config import ConfigError, SchedulerConfig
from sixbit_jax.errors import ArgumentError, NonFiniteLatentsError, TruncatedPromptWarning
from sixbit_jax.models.cogvideox import CogVideoXTransformer3DModel
from sixbit_jax.models.split import Split
from sixbit_jax.models.t5 import T5EncoderModel
from sixbit_jax.models.vae import AutoencoderKLCogVideoX
from sixbit_jax.precision import PrecisionPolicy, accounting
from sixbit_jax.precision import calibration as calibrations
from sixbit_jax.precision.accounting import Summary
from sixbit_jax.precision.calibration import Calibration
from sixbit_jax.precision.targets import QuantizationConfig, solve
from sixbit_jax.qtensor import QuantLinear, quantize_model
from sixbit_jax.sampling import sampler, schedulers
from sixbit_jax.sampling.noise import initial_latents, seed_list, video_keys
from sixbit_jax.timing import compilation_clock, stage

logger = logging.getLogger(__name__)
MINI_MODEL = Path(__file__).parent / "assets" / "moving_mnist"
ANY_SIZE = 300
"""Height and width, in latent pixels, that the configurations of CogVideoX 1.5 state: 2400 pixels, a place holder."""
SIZE_1_5 = 768, 1360
"""Height and width, in pixels, at which its authors give CogVideoX 1.5's quality."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        frames: uint8 [batch, frames, height, width, 3]; None with output_type="latent".
        latents: float32 [batch, latent frames, channels, h, w], diffusers' layout, not divided by the VAE's scaling
            factor. With temporal patches (CogVideoX 1.5) the padding frames are still in front, as in diffusers.
        trace: what each step did, arrays with leading axis [num_inference_steps].
        timings: wall-clock seconds of each stage (`text_encoder`, `sampling`, `vae`), compilation included, and
            `compilation`, the part of their sum that went into tracing and compiling.
        summary: mean activation bits, skip share and share of each route, of a quantised run; else None.
    """

    frames: UInt8[np.ndarray, "batch frames height width 3"] | Any  # not None: who asked for frames has them
    latents: Float[np.ndarray, "batch latent_frames channels h w"]
    trace: sampler.Trace
    timings: dict[str, float]
    summary: Summary | None = None


@jax.jit
def encode_text(text_encoder: Split[T5EncoderModel], input_ids: Int[Array, "batch text"]) -> Float[Array, "..."]:
    """Text features of token ids. Padding attends like any token, as in CogVideoX.

    Args:
        text_encoder: the T5 encoder.
        input_ids: from `Pipeline.tokenize`.

    Returns:
        [batch, text, d_model], in the encoder's dtype.
    """
    return text_encoder.merge()(input_ids)


@jax.jit(static_argnames="tiled")
def decode_latents(
    vae: Split[AutoencoderKLCogVideoX], latents: Float[Array, "batch f channels h w"], *, tiled: bool = False
) -> UInt8[Array, "batch frames height width 3"]:
    """The video of denoised latents, rounded to 8 bits on the device.

    Args:
        vae: the autoencoder; its `scaling_factor` is divided out.
        latents: as `sixbit_jax.sampling.sampler.sample` returns them, without the padding frames of temporal patches.
        tiled: decode overlapping spatial tiles, which bounds memory for large frames.
    """
    model = vae.merge()
    z = (latents / model.config.scaling_factor).transpose(0, 1, 3, 4, 2)
    video = model.decode(z, tiled=tiled).astype(jnp.float32)
    return jnp.round(jnp.clip(video / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def prompt_list(name: str, prompt: Any) -> list[str]:
    """One text or several as a list.

    Raises:
        ArgumentError: if there is none, or something else among them; `name` is the argument's.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise ArgumentError(f"{name} must be a string or a list of strings, not {prompt!r}")
    if not prompts:
        raise ArgumentError(f"{name} is an empty list: give at least one prompt")
    return list(prompts)


def find_model[R](path: str | Path, use: Callable[[str | Path], R] = locate) -> R:
    """What `use` makes of a model: by default its folder, to which a hub id `org/name` is downloaded.

    Args:
        path: "mini" for the one that ships with this package, a folder, or a hub id.
        use: is given the folder or the hub id.

    Raises:
        CheckpointError: if there is none of that name; or from `use`.
    """
    try:
        return use(MINI_MODEL if path == "mini" else path)
    except CheckpointError as error:
        if Path(path).is_dir():
            raise
        raise CheckpointError(f'{error} (the model that ships with this package is called "mini")') from error


def _check_guidance(scale: float) -> None:
    if not math.isfinite(scale):
        raise ArgumentError(f"guidance_scale={scale} must be a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A loaded CogVideoX checkpoint, ready to be called.

    Attributes:
        transformer: the denoiser.
        scheduler: how its noise schedule is walked. `dataclasses.replace(pipe, scheduler=...)` changes it.
        vae, text_encoder, tokenizer: None where the checkpoint has none; then latents, or `prompt_embeds`, are all a
            call can return, or take.
        vae_tiling: decode in overlapping spatial tiles (less memory, for large frames).
        quantization: how the transformer's linears are quantised and run; None runs them as they are.
        calibration: measurements that the thresholds of `quantization` are solved from.
    """

    transformer: Split[CogVideoXTransformer3DModel]
    scheduler: SchedulerConfig
    vae: Split[AutoencoderKLCogVideoX] | None = None
    text_encoder: Split[T5EncoderModel] | None = None
    tokenizer: Any = None
    vae_tiling: bool = False
    quantization: QuantizationConfig | None = None
    calibration: Calibration | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = jnp.bfloat16,
        vae_tiling: bool = False,
        quantization: str | QuantizationConfig | None = None,
        calibration: str | Path | Calibration | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> "Pipeline":
        """Loads a diffusers folder, or one made by `sixbit convert`.

        Args:
            path: the folder; or a hub id `org/name`, which is downloaded; or "mini" for the small trained model that
                ships with this package.
            dtype: compute and parameter dtype of all models.
            vae_tiling: see the class.
            quantization: "w4a16" (weights only), "int8", "nvfp4" (activations on one route), "int8-reuse" (INT8, with
                every second step adding what all blocks added at the last), "sixbit" (routed to a mean of 6 bits, with
                blocks skipped as they allow it), or a `QuantizationConfig`. None leaves the model as it is.
            calibration: a file of `sixbit calibrate`; None takes the one in the folder, if there is one.
            progress: called with the bytes of parameters that are loaded, and those of all.

        Raises:
            CheckpointError: if there is no such checkpoint, or it is not what it should be: says which file, key and
                shape. Likewise if a calibration is needed and there is none, or it is of another model.
            ArgumentError: if the quantization has an unknown name.
        """
        if isinstance(quantization, str):
            quantization = QuantizationConfig.named(quantization)
        folder = find_model(path)
        required = calibration is not None or (quantization is not None and quantization.needs_calibration)
        measured = calibrations.find(folder, calibration, required=required)
        loaded = checkpoint.load(folder, dtype=dtype, progress=progress)
        if loaded.transformer is None or loaded.scheduler is None:
            held = ", ".join(name for name, part in vars(loaded).items() if part is not None) or "nothing"
            raise CheckpointError(f"{folder}: a pipeline needs a transformer and a scheduler; the folder holds {held}")
        try:
            pipe = cls(
                transformer=Split.of(loaded.transformer),
                scheduler=loaded.scheduler,
                vae=None if loaded.vae is None else Split.of(loaded.vae),
                text_encoder=None if loaded.text_encoder is None else Split.of(loaded.text_encoder),
                tokenizer=loaded.tokenizer,
                vae_tiling=vae_tiling,
            )
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        if quantization is not None:
            pipe = pipe.quantized(quantization)
        return pipe._with_calibration(measured, required=required)

    def quantized(
        self,
        quantization: QuantizationConfig | None = None,
        *,
        moments: Mapping[str, Float32[Array, "blocks groups size size"]] | None = None,
    ) -> "Pipeline":
        """The pipeline with its block linears quantised, if they are not yet, and calls that run as configured.

        Args:
            quantization: None stores weights as a `QuantizationConfig` does by default, and runs the 16-bit route.
            moments: of what the linears see, from `sixbit_jax.moments.gather`, to round the weights for it; None rounds
                to the nearest.

        Raises:
            ArgumentError: if the weights are stored quantised, and `quantization` or `moments` says how to quantise
                them.
            CheckpointError: if the format does not fit the model; or if `quantization` needs the pipeline's
                calibration, and that is of other weights.
        """
        config = QuantizationConfig.named("w4a16") if quantization is None else quantization
        if self.is_quantized:
            if config.hadamard is not None or config.four_over_six or moments is not None:
                raise ArgumentError(
                    "the weights are quantised already, with a hadamard, four_over_six and moments of their own"
                )
            pipe = dataclasses.replace(self, quantization=config)
            return pipe._with_calibration(self.calibration, required=config.needs_calibration)
        try:
            model = quantize_model(
                self.transformer.merge(),
                hadamard=config.hadamard,
                four_over_six=config.four_over_six,
                moments=moments,
            )
        except ValueError as error:
            raise CheckpointError(f"the transformer cannot be quantised: {error}") from error
        pipe = dataclasses.replace(self, transformer=Split.of(model), quantization=config)
        return pipe._with_calibration(self.calibration, required=config.needs_calibration)

    @property
    def is_quantized(self) -> bool:
        """Whether the linears of the blocks are stored in NVFP4."""
        return isinstance(self.transformer.merge().blocks.attn_in, QuantLinear)

    def _with_calibration(self, calibration: Calibration | None, *, required: bool) -> "Pipeline":
        """With a calibration, or without if it is of another model: which shows if this one is quantised."""
        if calibration is not None and self.is_quantized:
            try:
                calibration.check(self.transformer)
            except CheckpointError as error:
                if required:
                    raise
                logger.warning("not used: %s", error)
                calibration = None
        return dataclasses.replace(self, calibration=calibration)

    def policy(self, num_inference_steps: int = 50) -> PrecisionPolicy | None:
        """What decides the precision of calls with that number of steps; None where nothing is quantised.

        Raises:
            ArgumentError: if a target cannot be met (says what can), or a calibration is needed and there is none.
        """
        if self.quantization is None:
            return None
        return solve(self.quantization, self.calibration, num_inference_steps)

    def __post_init__(self) -> None:
        """Checks that the models fit each other.

        Raises:
            ConfigError: if they do not.
        """
        config = self.transformer.merge().config
        fits = [("in_channels", config.in_channels, "the transformer's out_channels", config.out_channels)]
        if self.vae is not None:
            channels = self.vae.merge().config.latent_channels
            fits.append(("in_channels", config.in_channels, "the VAE's latent_channels", channels))
        if self.text_encoder is not None:
            width = self.text_encoder.merge().config.d_model
            fits.append(("text_embed_dim", config.text_embed_dim, "the text encoder's d_model", width))
        for name, value, other, wanted in fits:
            if value != wanted:
                raise ConfigError(f"the transformer's {name} is {value} and {other} is {wanted}; they must be equal")

    @property
    def _compression(self) -> tuple[int, int]:
        """(spatial, temporal) pixels per latent position; CogVideoX's own where there is no VAE to ask."""
        if self.vae is None:
            return 8, 4
        config = self.vae.merge().config
        return config.spatial_compression_ratio, int(config.temporal_compression_ratio)

    @property
    def default_size(self) -> tuple[int, int, int]:
        """What a call that does not say makes, and the model was trained for, as (num_frames, height, width)."""
        config, (space, _) = self.transformer.merge().config, self._compression
        if (config.sample_height, config.sample_width) == (ANY_SIZE, ANY_SIZE):
            return config.sample_frames, *SIZE_1_5
        return config.sample_frames, config.sample_height * space, config.sample_width * space

    def size(self, *, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """What is given, and of `default_size` what is not.

        Args:
            num_frames: of a video.
            height, width: pixels.
        """
        given = num_frames, height, width
        frames, height, width = (own if x is None else x for x, own in zip(given, self.default_size, strict=True))
        return frames, height, width

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "batch text"]:
        """Token ids, int32, padded or cut to the model's text length; a `TruncatedPromptWarning` shows what was cut."""
        limit = self.transformer.merge().config.max_text_seq_length
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, add_special_tokens=True
        ).input_ids
        for prompt, full in zip(prompts, self.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if len(full) > limit:
                cut = self.tokenizer.decode(full[limit - 1 : -1])
                warnings.warn(
                    f"the prompt {prompt!r} has {len(full)} tokens, the model takes {limit}; cut: {cut!r}",
                    TruncatedPromptWarning,
                    stacklevel=2,
                )
        return np.asarray(ids, np.int32)

    def _checked_text(self, name: str, prompts: Any, embeds: Any) -> list[str] | jax.Array | np.ndarray:
        """The texts, or the features given instead of them."""
        if embeds is None:
            if self.text_encoder is None or self.tokenizer is None:
                raise ArgumentError(
                    f"this checkpoint has no text encoder or no tokenizer, so {name} cannot be encoded: "
                    f"pass {name}_embeds instead"
                )
            return prompt_list(name, prompts)
        width = self.transformer.merge().config.text_embed_dim
        if embeds.ndim != 3 or not embeds.shape[0] or embeds.shape[2] != width:
            raise ArgumentError(f"{name}_embeds must be [batch, text, {width}], not {list(embeds.shape)}")
        return embeds

    def checked_texts(
        self,
        prompt: Any,
        negative_prompt: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        *,
        guided: bool,
    ) -> tuple[list[str] | jax.Array | np.ndarray, list[str] | jax.Array | np.ndarray | None]:
        """Validates the four text arguments and returns those to use, positive and negative, of equal batch size."""
        if (prompt is None) == (prompt_embeds is None):
            raise ArgumentError("give exactly one of prompt and prompt_embeds")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ArgumentError("give at most one of negative_prompt and negative_prompt_embeds")
        positive = self._checked_text("prompt", prompt, prompt_embeds)
        if not guided:
            return positive, None
        without = self.text_encoder is None or self.tokenizer is None
        if negative_prompt is None and negative_prompt_embeds is None and without:
            raise ArgumentError(
                "guidance needs an unconditional embedding and this checkpoint has no text encoder or no "
                "tokenizer: pass negative_prompt_embeds, or guidance_scale=1"
            )
        negative = self._checked_text(
            "negative_prompt", "" if negative_prompt is None else negative_prompt, negative_prompt_embeds
        )
        batch = len(positive)
        if len(negative) == 1:
            negative = negative * batch if isinstance(negative, list) else np.repeat(negative, batch, axis=0)
        if len(negative) != batch:
            raise ArgumentError(f"negative_prompt: got {len(negative)} for {batch} prompts; give one, or one for each")
        limit = self.transformer.merge().config.max_text_seq_length
        lengths = [limit if isinstance(text, list) else text.shape[1] for text in (positive, negative)]
        if lengths[0] != lengths[1]:
            raise ArgumentError(
                f"prompt_embeds and negative_prompt_embeds must have the same text length, not {lengths[0]} and "
                f"{lengths[1]} (texts have {limit})"
            )
        return positive, negative

    def encode(self, text: list[str] | jax.Array | np.ndarray) -> Float[Array, "batch text text_dim"]:
        """Text features of prompts; features that are given instead, in the model's dtype."""
        if not isinstance(text, list):
            return jnp.asarray(text, self.transformer.merge().dtype)
        return encode_text(self.text_encoder, jnp.asarray(self.tokenize(text)))

    def _latents_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Validates a size; -> latents [frames, channels, height, width], frames padded to whole temporal patches."""
        config, (space, time_) = self.transformer.merge().config, self._compression
        if num_frames < 1 or (num_frames - 1) % time_:
            near = max(1, round((num_frames - 1) / time_) * time_ + 1)
            raise ArgumentError(f"num_frames={num_frames} must be of the form {time_}k + 1; the nearest is {near}")
        for name, size in (("height", height), ("width", width)):
            unit = space * config.patch_size
            if size < unit or size % unit:
                raise ArgumentError(f"{name}={size} must be a positive multiple of {unit} (VAE {space} x patch size)")
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
            num_frames: 4k + 1 for CogVideoX; default the model's own length. As in diffusers, the VAE gives exactly so
                many for an odd number of latent frames (even k), and three more, in front, for an even one.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; at most 1 turns it off and halves the work.
            use_dynamic_cfg: let the guidance scale grow over the steps.
            seed: one for all videos (each draws its own noise from it), or one for each; 0 to 2^32 - 1.
            latents: starting noise [batch, latent frames, channels, h, w] instead of noise from the seed.
            prompt_embeds, negative_prompt_embeds: text features [batch, text, text_dim] instead of texts.
            output_type: "np" decodes frames, "latent" returns latents alone.
            on_step: called in order with each finished step's index; keep one function object for many calls.

        Raises:
            ArgumentError: (a ValueError) on a bad argument, which it names; before anything is compiled.
            ConfigError: if the scheduler cannot take that number of steps; likewise.
            NonFiniteLatentsError: if latents become NaN or Inf; names the video and the step.
        """
        if output_type not in ("np", "latent"):
            raise ArgumentError(f'output_type={output_type!r} is not one of "np", "latent"')
        if output_type == "np" and self.vae is None:
            raise ArgumentError('this checkpoint has no VAE: pass output_type="latent"')
        _check_guidance(guidance_scale)
        num_frames, height, width = self.size(num_frames=num_frames, height=height, width=width)
        shape = self._latents_shape(num_frames, height, width)
        texts = self.checked_texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guided=guidance_scale > 1
        )
        batch = len(texts[0])
        seed_list(seed, batch)
        if latents is not None and tuple(latents.shape) != (batch, *shape):
            raise ArgumentError(f"latents must be {[batch, *shape]} for this call, not {list(latents.shape)}")
        schedule = schedulers.make_schedule(self.scheduler, num_inference_steps)
        policy = self.policy(num_inference_steps)
        if self.calibration is not None and self.quantization is not None and self.quantization.needs_calibration:
            size = num_frames, height, width
            self.calibration.warn_of_other_runs(self.scheduler.class_name, size, guided=guidance_scale > 1)

        timings: dict[str, float] = {}
        start = time.time()
        with stage(timings, "text_encoder"):
            positive, negative = jax.block_until_ready([None if text is None else self.encode(text) for text in texts])
        with stage(timings, "sampling"):
            inputs = self.sampler_inputs(
                positive,
                negative,
                video_keys(seed, batch),
                shape,
                schedule,
                guidance_scale=guidance_scale,
                use_dynamic_cfg=use_dynamic_cfg,
                latents=latents,
            )
            latents, trace = jax.block_until_ready(
                sampler.sample(self.transformer, *inputs, policy=policy, on_step=on_step)
            )
            jax.effects_barrier()
        trace = jax.device_get(trace)
        _raise_if_not_finite(trace)

        frames = None
        if output_type == "np":
            with stage(timings, "vae"):
                frames = self.decode(latents, num_frames)
        timings["compilation"] = compilation_clock.seconds_since(start)
        summary = None
        if trace.precision is not None:
            summary = accounting.summary(trace.precision.bits, accounting.site_weights(self.transformer.merge().config))
        return PipelineOutput(frames=frames, latents=np.asarray(latents), trace=trace, timings=timings, summary=summary)

    def sampler_inputs(
        self,
        positive: Float[Array, "batch text text_dim"],
        negative: Float[Array, "batch text text_dim"] | None,
        keys: jax.Array,
        shape: tuple[int, int, int, int],
        schedule: schedulers.Schedule,
        *,
        guidance_scale: float,
        use_dynamic_cfg: bool = False,
        latents: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
    ) -> tuple[schedulers.Schedule, sampler.PerStep, Float[Array, "..."], sampler.Conditioning]:
        """What `sampler.sample` takes after the transformer.

        Args:
            positive: text features to follow, from `encode`.
            negative: text features to steer away from; None turns guidance off.
            keys: one a video, from `video_keys`.
            shape: of one video's latents, [frames, channels, height, width].
            schedule: from `schedulers.make_schedule`.
            guidance_scale: classifier-free guidance.
            use_dynamic_cfg: let the guidance scale grow over the steps.
            latents: starting noise [batch, *shape] instead of noise from the keys.

        Returns:
            Schedule, guidance scale of every step, starting noise, conditioning.
        """
        steps = len(schedule.timesteps)
        scale = schedulers.guidance_schedule(guidance_scale, schedule.timesteps, steps, use_dynamic_cfg)
        noise = initial_latents(keys, shape) if latents is None else jnp.asarray(latents, jnp.float32)
        conditioning = sampler.Conditioning(prompt_embeds=positive, negative_prompt_embeds=negative, keys=keys)
        return schedule, scale, noise, conditioning

    def separate_runs(
        self,
        prompts: Sequence[str],
        size: tuple[int, int, int],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
    ) -> Callable[[int], tuple]:
        """Each prompt as a video of its own, with the noise of its position -> `sampler_inputs` by position.

        Args:
            prompts: one text a video.
            size: num_frames, height and width of a video.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; at most 1 turns it off.
            seed: of all videos.

        Raises:
            ArgumentError: on a size, guidance or seed that cannot be.
            ConfigError: if the scheduler cannot take that number of steps.
        """
        _check_guidance(guidance_scale)
        shape, schedule = self._latents_shape(*size), schedulers.make_schedule(self.scheduler, num_inference_steps)
        keys = video_keys(seed, len(prompts))

        def inputs(index: int) -> tuple:
            texts = self.checked_texts([prompts[index]], guided=guidance_scale > 1)
            positive, negative = self.encode(texts[0]), None if texts[1] is None else self.encode(texts[1])
            one = keys[index : index + 1]
            return self.sampler_inputs(positive, negative, one, shape, schedule, guidance_scale=guidance_scale)

        return inputs

    def decode(
        self, latents: Float[Array, "batch f channels h w"], num_frames: int
    ) -> UInt8[np.ndarray, "batch frames height width 3"]:
        """The video of latents, one of a batch at a time, so that memory does not grow with the batch.

        Args:
            latents: as the sampler returns them.
            num_frames: of the call; what the latents have more, in front, is padding.
        """
        padding = latents.shape[1] - ((num_frames - 1) // self._compression[1] + 1)
        return np.concatenate(
            [
                np.asarray(decode_latents(self.vae, latents[i : i + 1, padding:], tiled=self.vae_tiling))
                for i in range(latents.shape[0])
            ]
        )


def _raise_if_not_finite(trace: sampler.Trace) -> None:
    if trace.finite.all():
        return
    step, video = np.argwhere(~trace.finite)[0]
    raise NonFiniteLatentsError(
        f"the latents of video {video} became NaN or Inf at step {step} of {len(trace.finite)} "
        f"(timestep {trace.timestep[step]}); check the inputs, or use a wider dtype"
    )
