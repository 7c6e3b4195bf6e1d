"""The smallest rotary transformer that tests of the model and of the sampler share, and the inputs of its sampler."""

import jax
import jax.numpy as jnp
import numpy as np

from sixbit_jax.config import SchedulerConfig, TransformerConfig
from sixbit_jax.sampling import sampler, schedulers

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    time_embed_dim=16,
    text_embed_dim=12,
    in_channels=4,
    out_channels=4,
    sample_width=4,
    sample_height=4,
    sample_frames=9,
    use_rotary_positional_embeddings=True,
)


def sampler_inputs(kind: str, steps: int, *, batch: int, seed: int = 0, guided: bool = True) -> tuple:
    """What `sampler.sample` takes after the transformer; `kind` is the scheduler's class."""
    config = SchedulerConfig(
        class_name=kind, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    schedule = schedulers.make_schedule(config, steps)
    scale = schedulers.guidance_schedule(6.0, schedule.timesteps, steps, use_dynamic_cfg=False)
    rng = np.random.default_rng(seed)
    latents = jnp.asarray(rng.standard_normal((batch, 3, 4, 4, 4)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((2, batch, 5, 12)), jnp.float32)
    conditioning = sampler.Conditioning(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1] if guided else None,
        keys=jax.random.split(jax.random.key(seed), batch),
    )
    return schedule, scale, latents, conditioning
