"""One frozen row per model, with the official attribute names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # names, and bytes of a number

# The official shared negative prompt; it is what an empty `n_prompt` means.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)

# Per-channel statistics of the released VAEs' latents. They are in no checkpoint file (source: the official code).
VAE_2_1_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
VAE_2_1_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
VAE_2_2_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
VAE_2_2_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


# How the norm of what the blocks add changes from one step to the next, which MagCache reads: the first number is 1,
# the others are the conditional branch's at the default steps and shift (source: MagCache's tables for Wan2.2).
I2V_HIGH_RATIOS = (
    *(1.0, 0.9919, 0.9936, 0.9933, 0.9925, 0.9939, 0.9943, 0.9928, 0.9939, 0.9927, 0.9932, 0.9938),
    *(0.9927, 0.9922, 0.9918),
)
I2V_LOW_RATIOS = (
    *(1.0, 0.9893, 0.9909, 0.9885, 0.9889, 0.9881, 0.9871, 0.9861, 0.9843, 0.983, 0.9819, 0.9813),
    *(0.9783, 0.9762, 0.9726, 0.9709, 0.9657, 0.9605, 0.9532, 0.9458, 0.933, 0.917, 0.8917, 0.8541),
    *(0.7982,),
)
T2V_HIGH_RATIOS = (
    *(1.0, 1.0012, 0.9982, 0.997, 0.997, 0.9966, 0.996, 0.9958, 0.9948, 0.9963, 0.9966, 0.9953),
    *(0.9958, 0.9968, 0.9956, 0.9944, 0.9959, 0.9947, 0.9945, 0.9939, 0.9939, 0.9935, 0.9928, 0.9927),
    *(0.9906, 0.9912),
)
T2V_LOW_RATIOS = (
    *(1.0, 0.9881, 0.9877, 0.9851, 0.9831, 0.9805, 0.9778, 0.9728, 0.9673, 0.9586, 0.9438, 0.9212),
    *(0.8811, 0.8026),
)
TI2V_RATIOS = (
    *(1.0, 0.9951, 0.9956, 0.996, 0.9951, 0.9955, 0.9954, 0.995, 0.995, 0.9944, 0.9948, 0.9943),
    *(0.9943, 0.9941, 0.9937, 0.9941, 0.9936, 0.9933, 0.9924, 0.9923, 0.9924, 0.9916, 0.9915, 0.9919),
    *(0.9898, 0.9899, 0.9885, 0.9885, 0.9886, 0.9874, 0.9859, 0.9854, 0.9844, 0.9831, 0.9812, 0.98),
    *(0.9786, 0.9756, 0.9739, 0.9715, 0.9687, 0.9644, 0.9613, 0.9564, 0.9518, 0.9445, 0.9397, 0.9357),
    *(0.9354, 0.9666),
)


class _Dtype:
    """A field that takes a dtype or its name and gives the dtype, so that rows need no PyTorch before a model does."""

    def __init__(self, default: str) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._slot = f"_{name}"

    def __get__(self, row: Any, owner: type | None = None) -> Any:
        if row is None:
            return self._default  # `dataclass` asks the class for the field's default
        value = row.__dict__[self._slot]
        if isinstance(value, str):
            import torch

            value = getattr(torch, value)
        return value

    def __set__(self, row: Any, value: Any) -> None:
        if isinstance(value, str) and value not in DTYPES:
            raise UserError(f"{self._slot[1:]} must be one of {', '.join(DTYPES)}; {value!r} is not")
        row.__dict__[self._slot] = value


def _dtype(default: str) -> Any:
    return _Dtype(default)


@dataclass(frozen=True)
class ModelConfig:
    """All that differs between checkpoints. Change one with `dataclasses.replace`, never in place.

    Sizes are "width*height" strings as on the command line; `sample_guide_scale` is one number or (low noise, high
    noise). A dtype may be given by its name.
    """

    name: str
    model_type: str  # "i2v": mask and image channels; "ti2v": known latent frames; "t2v": text only
    vae_stride: tuple[int, int, int]
    vae_mean: tuple[float, ...]
    vae_std: tuple[float, ...]
    vae_checkpoint: str
    sizes: tuple[str, ...]
    sample_fps: int
    frame_num: int
    sample_steps: int
    sample_shift: float
    sample_guide_scale: float | tuple[float, float]
    boundary: float | None = None  # share of the schedule from which the high-noise expert works; None: one expert
    low_noise_checkpoint: str = "low_noise_model"
    high_noise_checkpoint: str = "high_noise_model"
    t5_checkpoint: str = "models_t5_umt5-xxl-enc-bf16.pth"
    t5_tokenizer: str = "google/umt5-xxl"
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_train_timesteps: int = 1000
    sample_neg_prompt: str = NEGATIVE_PROMPT
    t5_dtype: torch.dtype = _dtype("bfloat16")
    param_dtype: torch.dtype = _dtype("bfloat16")
    vae_dtype: torch.dtype = _dtype("float32")
    low_precision: str | None = None  # "fp8": the blocks' matrix products in 8 bits; "fp8_attention": attention too
    mag_ratios: tuple[tuple[float, ...], ...] = ()  # by expert from high noise to low; (): not measured

    def variant(self, **changes: Any) -> ModelConfig:
        """As `dataclasses.replace`, which would import PyTorch to copy dtypes that are still names."""
        names = [field.name for field in dataclasses.fields(self)]
        given: dict[str, Any] = {name: self.__dict__.get(f"_{name}", self.__dict__.get(name)) for name in names}
        return ModelConfig(**given | changes)

    def dtype_name(self, field: str) -> str:
        """The name of a dtype among the fields, which needs no PyTorch."""
        return str(self.__dict__[f"_{field}"]).removeprefix("torch.")

    @property
    def z_dim(self) -> int:
        """Latent channels z."""
        return len(self.vae_mean)

    @property
    def in_channels(self) -> int:
        """Input channels of the denoiser: an "i2v" model takes 4 mask and z image channels beside the z noisy ones."""
        return 2 * self.z_dim + 4 if self.model_type == "i2v" else self.z_dim

    @property
    def lowest_timesteps(self) -> tuple[float, ...]:
        """The lowest timestep that each expert works at, from high noise to low."""
        return (0,) if self.boundary is None else (self.boundary * self.num_train_timesteps, 0)

    @property
    def guidance(self) -> tuple[float, float]:
        """Guidance as (low noise, high noise)."""
        scale = self.sample_guide_scale
        return scale if isinstance(scale, tuple) else (scale, scale)


i2v_A14B = ModelConfig(
    name="i2v-A14B",
    model_type="i2v",
    vae_stride=(4, 8, 8),
    vae_mean=VAE_2_1_MEAN,
    vae_std=VAE_2_1_STD,
    vae_checkpoint="Wan2.1_VAE.pth",
    sizes=("1280*720", "720*1280", "832*480", "480*832"),
    sample_fps=16,
    frame_num=81,
    sample_steps=40,
    sample_shift=5.0,
    sample_guide_scale=(3.5, 3.5),
    boundary=0.900,
    mag_ratios=(I2V_HIGH_RATIOS, I2V_LOW_RATIOS),
)
t2v_A14B = i2v_A14B.variant(
    name="t2v-A14B",
    model_type="t2v",
    sample_shift=12.0,
    sample_guide_scale=(3.0, 4.0),
    boundary=0.875,
    mag_ratios=(T2V_HIGH_RATIOS, T2V_LOW_RATIOS),
)
ti2v_5B = ModelConfig(
    name="ti2v-5B",
    model_type="ti2v",
    vae_stride=(4, 16, 16),
    vae_mean=VAE_2_2_MEAN,
    vae_std=VAE_2_2_STD,
    vae_checkpoint="Wan2.2_VAE.pth",
    sizes=("1280*704", "704*1280"),
    sample_fps=24,
    frame_num=121,
    sample_steps=50,
    sample_shift=5.0,
    sample_guide_scale=5.0,
    mag_ratios=(TI2V_RATIOS,),
)
v2v_14B = i2v_A14B.variant(name="v2v-14B")
v2v_5B = ti2v_5B.variant(name="v2v-5B")
