"""Every number that decides what the mini model is and how it is trained.

What a step costs, measured on one H200 (`benchmarks/mini_model/run`): 32 ms for 128 clips of diffusion training, 9,900
steps in 319 s after 59 s of start-up, filling of the pool and compilation; 41 ms for 16 clips of VAE training, 1,980
steps in 81 s after 80 s that were mostly compilation.

Multiply-adds counted twice: 6.3 M parameters see each of a clip's 352 tokens (32 text, 320 video), 4.4 GFLOP, and
attention over 352 tokens at width 256 in 8 blocks adds 1.0 GFLOP; forward and backward are three times that, 16 GFLOP
a clip, 2.1 TFLOP a step. That is 8 % of the 790 TFLOP/s which the card reaches in large bf16 products, where 20 to 30 %
had been expected, 9 to 13 ms. At width 256 a product does too little work for every byte that passes through the norms,
modulations, rotations and activations around it, which are bound by memory, so that is where the time most likely goes;
Muon's iterations and the encoding of new clips are in the 32 ms too. Nothing depends on a number of steps: the learning
rate follows the elapsed share of the budget.
"""

import dataclasses

from sixbit_jax.config import SchedulerConfig, T5Config, TransformerConfig, VAEConfig
from sixbit_jax.training.tokenizer import MAX_LENGTH, VOCABULARY

MINI_VAE = VAEConfig(
    down_block_types=("CogVideoXDownBlock3D",) * 3,
    up_block_types=("CogVideoXUpBlock3D",) * 3,
    block_out_channels=(32, 48, 64),
    latent_channels=8,
    layers_per_block=1,
    norm_num_groups=8,
    temporal_compression_ratio=4,
    sample_height=64,
    sample_width=64,
    scaling_factor=1.0,
)
"""64 x 64 x 17 frames -> 16 x 16 x 5 latents of 8 channels. The scaling factor is measured after training."""

MINI_TRANSFORMER = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=8,
    out_channels=8,
    time_embed_dim=64,
    text_embed_dim=128,
    num_layers=8,
    sample_width=16,
    sample_height=16,
    sample_frames=17,
    patch_size=2,
    max_text_seq_length=MAX_LENGTH,
    use_rotary_positional_embeddings=True,
)

MINI_T5 = T5Config(
    vocab_size=-(-len(VOCABULARY) // 32) * 32,
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
)

MINI_SCHEDULER = SchedulerConfig(
    class_name="CogVideoXDDIMScheduler",
    clip_sample=False,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
    snr_shift_scale=1.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW, or Muon with AdamW: linear warm-up, cosine over the training budget, and an average of the weights.

    Attributes:
        learning_rate: the peak.
        warmup_steps: steps of the linear warm-up.
        final_fraction: share of the peak that the cosine ends at.
        muon: update the kernels of the transformer's blocks by Muon; see `loop.make_optimizer`.
        b1, b2: decay of Adam's first and second moment.
        weight_decay: decoupled, on kernels only.
        clip_norm: global norm above which gradients are scaled down.
        ema_decay: decay per step of the averaged weights; lower in the first steps, (1 + n) / (10 + n) at step n.
        batch: clips per step.
        steps_per_call: optimizer steps in one compiled call; a run's number of steps is a multiple of it.
    """

    learning_rate: float
    warmup_steps: int
    batch: int
    muon: bool = False
    final_fraction: float = 0.01
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.9995
    steps_per_call: int = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAERecipe:
    """How the VAE is trained.

    The loss is mse * MSE + l1 * L1 + gradient * (L1 of the differences between neighbours in space) + kl * KL, each a
    mean over its elements, for videos in [-1, 1]. L1 alone stalls at all black, the median of most pixels.

    Attributes:
        config: of the model; its scaling factor is replaced by the measured one.
        measured_clips: clips from which the scaling factor and, held out, the closing PSNR are measured.
    """

    config: VAEConfig = MINI_VAE
    optimizer: OptimizerRecipe = OptimizerRecipe(
        learning_rate=1.5e-3, warmup_steps=100, batch=16, weight_decay=1e-4, ema_decay=0.995, steps_per_call=10
    )
    mse: float = 4.0
    l1: float = 0.5
    gradient: float = 0.25
    kl: float = 1e-4
    measured_clips: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """How the transformer and the text encoder are trained, jointly, on latents of the frozen VAE.

    Guidance compares the prediction for a prompt with the one for no prompt, so the latter has to be good: its share of
    the batch is at the upper end of what is usual.

    Attributes:
        transformer, text_encoder, scheduler: configurations of the parts.
        prompt_dropout: share of the clips whose prompt is replaced by the empty one.
        unknown_words: share of the words replaced by <unk>, so that a word outside the grammar means "any".
        pool_clips: encoded clips held on the device, from which batches are drawn.
        refresh_clips: clips replaced by new ones, oldest first, before every compiled call.
        encode_batch: clips rendered and encoded at once.
    """

    transformer: TransformerConfig = MINI_TRANSFORMER
    text_encoder: T5Config = MINI_T5
    scheduler: SchedulerConfig = MINI_SCHEDULER
    optimizer: OptimizerRecipe = OptimizerRecipe(
        learning_rate=1e-3, warmup_steps=300, batch=128, muon=True, steps_per_call=50
    )
    prompt_dropout: float = 0.15
    unknown_words: float = 0.005
    pool_clips: int = 32_768
    refresh_clips: int = 512
    encode_batch: int = 128
