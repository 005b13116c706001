"""What a viewer would notice: scores of a seam, the look and the motion of a clip, and drift taken out again."""

from wan.quality.carry import Grade, measure_colours
from wan.quality.correction import correct_drift
from wan.quality.metrics import Look, LookPart, SeamScore, measure_look, score_seam
from wan.quality.motion import Motion, measure_motion

__all__ = [
    "Grade",
    "Look",
    "LookPart",
    "Motion",
    "SeamScore",
    "correct_drift",
    "measure_colours",
    "measure_look",
    "measure_motion",
    "score_seam",
]
