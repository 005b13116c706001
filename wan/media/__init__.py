"""Video files in and out: exact pictures from any file, and mp4 files that give back what was put in."""

from wan.media.assembly import Assembly, assemble
from wan.media.decord_reader import check_last_frame_with_decord
from wan.media.dull_end import DullEnd, find_dull_end
from wan.media.image import as_webp, read_image, write_png
from wan.media.reading import READERS, VideoInfo, probe, read_first_frame, read_last_frame, read_tail, sample_frames
from wan.media.rewriting import rewrite_video
from wan.media.sound import SoundTrack, find_sound
from wan.media.source import VideoError
from wan.media.writing import PIECE, check_output, join_videos, write_video

__all__ = [
    "as_webp",
    "PIECE",
    "READERS",
    "Assembly",
    "DullEnd",
    "SoundTrack",
    "VideoError",
    "VideoInfo",
    "assemble",
    "check_last_frame_with_decord",
    "check_output",
    "find_dull_end",
    "find_sound",
    "join_videos",
    "probe",
    "read_first_frame",
    "read_image",
    "read_last_frame",
    "read_tail",
    "rewrite_video",
    "sample_frames",
    "write_png",
    "write_video",
]
