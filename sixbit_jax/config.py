"""Model and scheduler configurations: frozen dataclasses read from, and written as, diffusers and transformers JSON.

Field names are those of the published `config.json` files. Fields that only matter to training in torch (dropout
and the like) are accepted and dropped; a field this project does not know is an error, since ignoring it would
silently compute something else.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sixbit_jax.errors import SixbitError

if TYPE_CHECKING:
    from typing import Self
else:
    Self = Any  # beartype knows it in whole classes only, not in methods one by one


class ConfigError(SixbitError, ValueError):
    """A configuration file that describes something this project cannot compute exactly."""


MAX_LAYERS = 1024
"""Of any stack; the largest published one has 42. A number that is far beyond would take hours to be found wrong."""
MAX_LEVELS = 16
MAX_WIDTH = 2**20
"""Of anything else that is counted: channels, heads, positions."""
MAX_SIZE = 2**31 - 1


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value, lists as tuples, is of an annotated type; numbers finite, and of a size that can be."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(one, typing.get_args(kind)[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and -MAX_SIZE <= value <= MAX_SIZE
    if kind is int:
        return type(value) is int and -MAX_SIZE <= value <= MAX_SIZE
    return isinstance(value, kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    @classmethod
    def _ignored(cls) -> frozenset[str]:
        """Published fields that do not change what is computed at inference."""
        return frozenset()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from a published JSON object.

        Keys that start with an underscore and `transformers`/`torch` bookkeeping are dropped.

        Raises:
            ConfigError: on an unknown field, or a value that is not supported.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        taken, unknown = {}, []
        for key, value in values.items():
            if key in known:
                taken[key] = tuple(value) if isinstance(value, list) else value
            elif not key.startswith("_") and key not in cls._ignored():
                unknown.append(f"{key}={value!r}")
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown field(s) {', '.join(sorted(unknown))}")
        return cls._made(taken)

    @classmethod
    def _made(cls, values: Mapping[str, Any]) -> Self:
        for field in dataclasses.fields(cls):
            if field.name in values and not _is_of(value := values[field.name], field.type):
                kind = getattr(field.type, "__name__", field.type)
                raise ConfigError(
                    f"{cls.__name__}: {field.name}={value!r:.80} must be {kind}, if a number of usual size"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON object; `from_dict(to_dict(c)) == c`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def _require(self, **allowed: tuple[Any, ...]) -> None:
        for name, values in allowed.items():
            if (found := getattr(self, name)) not in values:
                raise ConfigError(f"{type(self).__name__}: {name}={found!r} is not supported; supported: {values}")

    def _require_sizes(self, *names: str, most: int = MAX_WIDTH) -> None:
        """That these fields are from 1 to `most`; None is no size."""
        for name in names:
            if (found := getattr(self, name)) is not None and not 1 <= found <= most:
                raise ConfigError(f"{type(self).__name__}: {name}={found} must be between 1 and {most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(_Config):
    """`CogVideoXTransformer3DModel` of diffusers. Field meanings and defaults are those of its constructor."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        self._require(
            activation_fn=("gelu-approximate",),
            timestep_activation_fn=("silu",),
            norm_elementwise_affine=(True,),
            use_learned_positional_embeddings=(False,),
        )
        self._require_sizes("num_layers", most=MAX_LAYERS)
        self._require_sizes("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        self._require_sizes("time_embed_dim", "ofs_embed_dim", "text_embed_dim", "max_text_seq_length")
        self._require_sizes("sample_width", "sample_height", "sample_frames", "patch_size", "patch_size_t")
        self._require_sizes("temporal_compression_ratio")
        if self.attention_head_dim % 16:
            raise ConfigError(f"TransformerConfig: attention_head_dim={self.attention_head_dim} must divide by 16")

    @classmethod
    def _ignored(cls) -> frozenset[str]:
        return frozenset({"dropout"})

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def cogvideox_2b(cls) -> "TransformerConfig":
        """THUDM/CogVideoX-2b: sincos positions."""
        return cls()

    @classmethod
    def cogvideox_5b(cls) -> "TransformerConfig":
        """THUDM/CogVideoX-5b: 3D rotary positions."""
        return cls(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)

    @classmethod
    def cogvideox_1_5_5b(cls) -> "TransformerConfig":
        """THUDM/CogVideoX1.5-5B: temporal patches of 2 latent frames."""
        return cls(
            num_attention_heads=48,
            num_layers=42,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
            sample_frames=81,
            sample_height=300,
            sample_width=300,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(_Config):
    """`AutoencoderKLCogVideoX` of diffusers. Field meanings and defaults are those of its constructor."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not 1 <= levels <= MAX_LEVELS or not all(1 <= width <= MAX_WIDTH for width in self.block_out_channels):
            found = f"{self.block_out_channels!r:.80}"
            raise ConfigError(f"VAEConfig: block_out_channels={found} must be 1 to {MAX_LEVELS} numbers of channels")
        self._require_sizes("layers_per_block", most=64)
        self._require_sizes("in_channels", "out_channels", "latent_channels", "norm_num_groups")
        self._require_sizes("sample_height", "sample_width")
        self._require(
            act_fn=("silu",),
            shift_factor=(None,),
            latents_mean=(None,),
            latents_std=(None,),
            down_block_types=(("CogVideoXDownBlock3D",) * levels,),
            up_block_types=(("CogVideoXUpBlock3D",) * levels,),
            temporal_compression_ratio=tuple(2**k for k in range(levels)),
        )

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent position along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(_Config):
    """The encoder half of T5 v1.1 (`T5EncoderModel` of transformers): gated GELU, no bias, RMS norms."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        self._require(feed_forward_proj=("gated-gelu",))
        self._require_sizes("num_layers", most=MAX_LAYERS)
        self._require_sizes("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")
        self._require_sizes("relative_attention_num_buckets", "relative_attention_max_distance")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the encoder's fields from a T5 `config.json` and leaves the decoder's and the bookkeeping.

        transformers' own files mix hundreds of generation settings in, so unknown fields are not errors here.

        Raises:
            ConfigError: on a value that is not supported.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        return cls._made({k: v for k, v in values.items() if k in known})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(_Config):
    """`CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler` of diffusers, told apart by `class_name`.

    Betas are "scaled_linear", as in every published CogVideoX file. The other schedule of diffusers, "linear", is
    refused: diffusers makes its coefficients in float32, so nobody's steps would be those of the equations.
    """

    class_name: str = "CogVideoXDDIMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0

    def __post_init__(self) -> None:
        self._require(
            class_name=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
            beta_schedule=("scaled_linear",),
            trained_betas=(None,),
            prediction_type=("epsilon", "sample", "v_prediction"),
            timestep_spacing=("linspace", "leading", "trailing"),
        )
        self._require_sizes("num_train_timesteps")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from a published JSON object; `class_name` is the file's `_class_name`.

        Raises:
            ConfigError: on an unknown field, or a value that is not supported.
        """
        return super().from_dict({"class_name": values.get("_class_name", cls.class_name), **values})

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {"_class_name": values.pop("class_name"), **values}
