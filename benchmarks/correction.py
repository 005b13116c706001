"""How long `--drift_correction` takes of a clip of 832x480 and 81 frames, by device and threads.

    python -m benchmarks.correction [--threads 1 2 8]

A picture is panned over and grows brighter by 6 %. Prints a line of JSON for each way; the results are compared.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import timed
from wan.quality import correct_drift

FRAMES, HEIGHT, WIDTH, KNOWN = 81, 480, 832, 17
CPU = torch.device("cpu")


def footage() -> tuple[Tensor, Tensor]:
    """The end of a clip [17, H, W, 3], and the next one, which begins with its last frame and drifts."""
    noise = torch.rand(1, 3, 40, 80, generator=torch.Generator().manual_seed(0))
    picture = functional.interpolate(noise, size=(HEIGHT, WIDTH + 200), mode="bicubic")[0].permute(1, 2, 0) * 1.6 - 0.8
    frames = torch.stack([picture[:, time : time + WIDTH] for time in range(KNOWN + FRAMES - 1)])
    drift = 1 + torch.linspace(0, 0.06, FRAMES)[:, None, None, None]
    return frames[:KNOWN].contiguous(), frames[KNOWN - 1 :] * drift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, torch.get_num_threads()])
    before, clip = footage()
    reference = correct_drift(clip, before, known=1)
    for name in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for threads in sorted(set(parser.parse_args().threads)):
            torch.set_num_threads(threads)
            made = correct_drift(clip, before, known=1, device=torch.device(name))
            correct = partial(correct_drift, clip, before, known=1, device=torch.device(name))
            seconds = timed(correct, CPU, repeats=3)
            apart = float((made - reference).abs().max())
            row = {"removed_on": name, "threads": threads, "seconds": round(min(seconds), 3), "apart": apart}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
