"""A process on a GPU that dies, fails, hangs or is stopped: how soon all have ended, and what is said of it.

    python -m benchmarks.faults --gpus 2 [--faults hangs stops]

For each fault it starts so many processes as a launcher does, which compute forwards of a random model with shared
tokens until the last of them breaks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import torch

from benchmarks.parallel import build, inputs
from wan import cli
from wan.device.parallel import Team
from wan.device.ranks import Sizes, World

FAULTS = ("dies", "fails", "hangs", "stops", "interrupted")
TIMEOUT = 10.0


def work(fault: str) -> None:
    """One process."""
    world = World.read(os.environ)
    device = torch.device("cuda", world.local_rank)
    team = Team.start(world, Sizes(1, world.size), device, TIMEOUT)
    model = build("ti2v-5B", 2, device)
    model.token_group = team.tokens
    latents, steps, text = inputs("ti2v-5B", 416, 224, 21, device)
    with team.watched(), torch.no_grad():
        for count in range(10**6):
            model(latents, steps, text, return_dict=False)
            if count % 20 == 0:
                torch.cuda.synchronize()
            if count == 200:
                print(f"BREAKS {time.time()}", flush=True)
                if world.rank == world.size - 1:
                    break_as(fault)


def break_as(fault: str) -> None:
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hangs":
        time.sleep(1000)
    elif fault == "fails":
        raise ValueError("a bug")


def measure(fault: str, gpus: int) -> None:
    """All processes, with one fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(gpus):
        launched = {"RANK": rank, "WORLD_SIZE": gpus, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | {key: str(value) for key, value in (launched | {"MASTER_PORT": port}).items()}
        words = [sys.executable, "-m", "benchmarks.faults", "--fault", fault]
        running.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    first = running[0]
    assert first.stdout is not None
    begun, lines = 0.0, []
    for line in first.stdout:
        text = line.decode(errors="replace").rstrip()
        if text.startswith("BREAKS"):
            begun = float(text.split()[1])
            if fault == "interrupted":
                for one in running:
                    one.send_signal(signal.SIGINT)
        else:
            lines.append(text)
    first.wait()
    ended = time.time()
    if fault == "stops":  # what is stopped cannot end itself; a launcher kills it
        running[-1].kill()
    codes = [one.wait(60) for one in running]
    telling = [line for line in lines if "error" in line or "interrupted" in line or "process" in line]
    print(f"{fault}: the first had ended {ended - begun:.1f} s later, all {time.time() - begun:.1f} s; codes {codes}")
    print(*(f"    {line[:300]}" for line in telling), sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--fault", help="this is one of the processes, and what breaks the last one")
    args = parser.parse_args()
    if args.fault:
        code = cli.run(lambda argv: work(args.fault), None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as the programs do: exchanges that were broken off wait in threads that nothing can end
    for fault in args.faults:
        measure(fault, args.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
