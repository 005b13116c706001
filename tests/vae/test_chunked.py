"""The VAE in chunks gives the library's results: the pass itself, the copies to the host, our kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wan.detail import heard_by
from wan.vae import chunked

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["ti2v", "i2v"])
def test_the_vae_in_chunks_is_the_library_s_pass(request: pytest.FixtureRequest, family: str) -> None:
    vae = request.getfixturevalue(family).vae.model
    clip = torch.rand(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for frames in (1, 5, 17):
        with torch.no_grad():
            modes = vae.encode(clip[:, :, :frames]).latent_dist.mode()
            pixels = vae.decode(modes).sample
            for chunk in (0, 1, 2, 3, 8):
                assert (chunked.encode(vae, clip[:, :, :frames], chunk) - modes).abs().max() < 1e-5
                decoded = chunked.decode(vae, modes, chunk)
                assert decoded.shape == pixels.shape == (1, 3, frames, 64, 96)
                assert (decoded - pixels).abs().max() < 1e-4  # noise has dark spots that norms enlarge
        assert pixels.std() > 0.01  # the comparison is of pictures, not of nothing


def test_the_vae_says_how_many_frames_are_done(ti2v: Any) -> None:
    told: list[str] = []
    with torch.no_grad(), heard_by(told.append):
        modes = chunked.encode(ti2v.vae.model, torch.zeros(1, 3, 17, 32, 32), 2)
        chunked.decode(ti2v.vae.model, modes, 2)
    assert told == 2 * [f"{frames} of 17 frames" for frames in (5, 13, 17)]


def test_the_smallest_chunks_pass_the_widest_layers_one_frame_at_a_time(
    ti2v: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[int] = []
    ends = chunked.ChunkedVae.ends

    def watched(self: chunked.ChunkedVae, network: Any, x: Tensor) -> Tensor:
        frames.append(x.shape[2])
        return ends(self, network, x)

    monkeypatch.setattr(chunked.ChunkedVae, "ends", watched)
    vae = ti2v.vae.model
    with torch.no_grad():
        chunked.decode(vae, torch.zeros(1, vae.config.z_dim, 2, 2, 2), 0)
        assert frames == [1] * 5
        frames.clear()
        chunked.decode(vae, torch.zeros(1, vae.config.z_dim, 2, 2, 2), 1)
    assert frames == [1, 4]


def test_pixels_that_arrive_late_land_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from a GPU are done when they are waited for, and a buffer is not written to before it was read."""
    pending: list[tuple[Tensor, Tensor]] = []

    class Far(Tensor):
        is_cuda = True

    class Buffer(Tensor):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
            assert non_blocking
            pending.append((self, source))
            return self

    class Event:
        def __init__(self) -> None:
            self.before = len(pending)

        def synchronize(self) -> None:
            for buffer, source in pending[: self.before]:
                buffer.as_subclass(Tensor).copy_(source.as_subclass(Tensor))

    made: list[Tensor] = []

    def locked(like: Tensor) -> Tensor:
        made.append(torch.full(like.shape, torch.nan).as_subclass(Buffer))
        return made[-1]

    monkeypatch.setattr(chunked, "_locked", locked)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(record_event=Event))
    pixels = torch.randn(1, 3, 1 + 4 * 6, 2, 2)
    landing = chunked.HostCopy(torch.empty_like(pixels))
    for chunk in torch.split(pixels, [1, *[4] * 6], dim=2):
        landing.put(chunk.clone().as_subclass(Far))
    assert torch.equal(landing.done(), pixels) and len(made) == 3


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the test below runs it")
@pytest.mark.parametrize("family", ["ti2v", "i2v"])
def test_our_kernels_have_the_library_s_results(
    request: pytest.FixtureRequest, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan.vae import kernels

    vae = request.getfixturevalue(family).vae.model
    clip = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    monkeypatch.setattr(chunked, "_kernels", lambda x: kernels)
    with torch.no_grad():
        modes = vae.encode(clip).latent_dist.mode()
        pixels = vae.decode(modes).sample
        for chunk in (0, 2):
            assert (chunked.encode(vae, clip, chunk) - modes).abs().max() < 1e-5
            assert (chunked.decode(vae, modes, chunk) - pixels).abs().max() < 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_our_kernels_run_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "our_kernels_have"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
